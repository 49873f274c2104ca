"""Opening, probing and decoding: what a file is, and what is wrong with it."""

from __future__ import annotations

import builtins
import io
import os
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from engine.sparse import read_frames
from engine.video import (
    DamagedError,
    NotVideoError,
    TooLargeError,
    TruncatedError,
    VideoError,
    check_complete,
    decode,
    open_video,
    probe,
)
from tests.clips import REAL, colourful, encode, real, shots_of

KNOWN_BROKEN = {
    "Lightricks__LTX-Video__woman.mp4": (NotVideoError, "Git LFS pointer"),
    "Zulko__moviepy__result.webm": (NotVideoError, "empty file"),
    "androidx__media__invalid-bitstream.webm": (DamagedError, "damaged at the start"),
    "androidx__media__sample_audio_only.mp4": (NotVideoError, "audio only"),
    "androidx__media__sample_with_invalid_nalu.mp4": (DamagedError, "damaged after 0.83 s"),
    "dmlc__decord__corrupted.mp4": (DamagedError, "damaged after 2.70 s"),
    "webmproject__libwebm__invalid_vp9_bitstream-bug_1416.webm": (TooLargeError, "12336x12336"),
}


def read_all(media: object) -> list[float]:
    """Times of all frames; raises as a scan does."""
    probe(media)  # type: ignore[arg-type]
    with open_video(media) as video:  # type: ignore[arg-type]
        return [frame.time_s for frame in decode(video)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    return encode(path, shots_of([40, 25]), options={"g": "20", "bf": "2"})


def test_metadata_of_a_plain_clip(clip: Path) -> None:
    found = probe(clip)
    assert (found.codec, found.pix_fmt, found.bit_depth) == ("h264", "yuv420p", 8)
    assert (found.width_px, found.height_px) == (160, 90)
    assert found.aspect_ratio == pytest.approx(16 / 9)
    assert (found.fps, found.num_frames) == (25.0, 65)
    assert found.duration_s == pytest.approx(2.6, abs=0.05)
    assert (found.rotation_deg, found.full_range, found.has_audio) == (0, False, False)


def test_a_path_and_an_open_file_read_the_same(clip: Path) -> None:
    with open(clip, "rb") as file:
        assert probe(file) == probe(clip)
        assert read_all(file) == read_all(clip)
        with open_video(file) as video:
            frames = decode(video)
            next(frames)
            check_complete(video, file)  # looks about in the file, and puts it back
            assert len(list(frames)) == 64
        assert not file.closed


def test_rotation_turns_the_shown_size(tmp_path: Path) -> None:
    path = encode(
        tmp_path / "turned.mp4", shots_of([10]), setup=lambda s: s.set_display_rotation(-90)
    )
    found = probe(path)
    assert (found.coded_width_px, found.coded_height_px) == (160, 90)
    assert (found.width_px, found.height_px, found.rotation_deg) == (90, 160, 90)


def test_sample_aspect_ratio_widens_the_shown_size(tmp_path: Path) -> None:
    def anamorphic(stream: av.VideoStream) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(3, 2)

    found = probe(encode(tmp_path / "sar.mp4", shots_of([10]), setup=anamorphic))
    assert (found.width_px, found.height_px) == (240, 90)
    assert found.aspect_ratio == pytest.approx(240 / 90)


def test_times_of_a_variable_frame_rate_come_from_the_file(tmp_path: Path) -> None:
    pts = [0, 40, 80, 500, 510, 2000]
    path = encode(tmp_path / "vfr.mkv", shots_of([6]), pts=pts, time_base=Fraction(1, 1000), fps=25)
    assert read_all(path) == pytest.approx([p / 1000 for p in pts])


def test_the_first_real_stream_is_read_and_a_cover_is_none() -> None:
    cover = probe(real("WyattBlue__auto-editor__h264-png.mp4"))
    assert (cover.codec, cover.num_video_streams, cover.note) == ("h264", 1, None)
    two = probe(real("pytorch__torchcodec__nasa_13013.mp4"))
    assert (two.width_px, two.num_video_streams) == (320, 2)
    assert two.note == "2 video streams: the first was read"


@pytest.mark.parametrize(
    ("name", "num", "duration_s"),
    [
        ("Zulko__moviepy__no_duration.webm", 74, None),
        ("androidx__media__sample_fragmented.mp4", 30, 1.001),
        ("androidx__media__sample_edit_list.mp4", 77, 2.548),
        ("androidx__media__sample.avi", 96, 4.087),
        ("androidx__media__sample_vvc.mp4", 120, 5.0),
        ("androidx__media__hdr10-av1.mp4", 127, 4.238),
    ],
)
def test_awkward_real_files_are_read_whole(name: str, num: int, duration_s: float | None) -> None:
    assert len(read_all(real(name))) == num
    found = probe(real(name)).duration_s
    assert found == (None if duration_s is None else pytest.approx(duration_s, abs=0.002))


@pytest.mark.parametrize("name", KNOWN_BROKEN)
def test_broken_real_files_say_what_is_wrong(name: str) -> None:
    kind, text = KNOWN_BROKEN[name]
    with pytest.raises(kind, match=text):
        read_all(real(name))


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real clips")
def test_every_other_real_file_is_read() -> None:
    names = {p.name for p in REAL.iterdir() if p.suffix != ".md"} - set(KNOWN_BROKEN)
    big = {n for n in names if "8k24" in n or "long_1080p" in n}
    assert names - big
    for name in sorted(names - big):
        times = read_all(str(REAL / name))
        assert times and np.all(np.diff(times) > 0), name


@pytest.mark.parametrize(
    ("suffix", "codec", "muxer"),
    [
        (".mp4", "libx264", {}),
        (".mp4", "libx264", {"movflags": "faststart"}),
        (".mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
        (".mkv", "libx264", {}),
        (".webm", "libvpx", {}),
        (".avi", "mpeg4", {}),
    ],
)
def test_a_file_cut_short_is_never_a_short_video(
    tmp_path: Path, suffix: str, codec: str, muxer: dict[str, str]
) -> None:
    whole = tmp_path / f"whole{suffix}"
    encode(whole, shots_of([50]), codec=codec, options={"g": "10"}, container_options=muxer)
    data = whole.read_bytes()
    assert len(read_all(whole)) == 50
    for length in (*(len(data) * tenths // 10 for tenths in range(1, 10)), len(data) * 97 // 100):
        cut = tmp_path / f"cut{suffix}"
        cut.write_bytes(data[:length])
        with pytest.raises(VideoError, match=r"truncated|damaged"):
            read_all(cut)


def test_a_truncated_file_with_its_index_says_how_many_frames_there_are(tmp_path: Path) -> None:
    whole = encode(
        tmp_path / "whole.mp4", shots_of([65]), container_options={"movflags": "faststart"}
    )
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    with pytest.raises(TruncatedError, match=r"truncated: \d+ of 65 frames are in the file"):
        probe(cut)


@pytest.mark.parametrize("seed", range(8))
def test_a_hole_in_the_middle_is_damage_and_not_a_picture(
    tmp_path: Path, clip: Path, seed: int
) -> None:
    data = bytearray(clip.read_bytes())
    with open_video(clip) as video:
        packets = [(e.pos, e.size) for e in video.stream.index_entries]
    position, size = packets[8 + 6 * seed]
    data[position + 8 : position + size] = np.random.default_rng(seed).bytes(size - 8)
    broken = tmp_path / "hole.mp4"
    broken.write_bytes(bytes(data))
    with pytest.raises(DamagedError, match=r"damaged after \d+\.\d\d s"):
        read_all(broken)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "empty file"),
        (b"Dear diary, today I filmed nothing at all. " * 9, "a text file that begins with"),
        (np.random.default_rng(0).bytes(50_000), "no known container format"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\0" * 9000, "no known container format"),
    ],
)
def test_what_is_not_a_video_is_called_what_it_is(tmp_path: Path, data: bytes, text: str) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(data)
    with pytest.raises(NotVideoError, match=text):
        probe(path)


def test_the_file_system_s_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        probe(tmp_path / "none.mp4")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(IsADirectoryError):
        probe(tmp_path / "folder.mp4")


def test_a_name_is_never_a_url_or_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a.mp4|b.mp4", "pipe:0", "-version.mp4", "http:%2F%2Fx.mp4", "ü b.mp4"):
        encode(tmp_path / "plain.mp4", shots_of([5])).rename(tmp_path / name)
        assert len(read_all(name)) == 5


def test_a_name_that_is_no_text(tmp_path: Path, clip: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\xfe\n.mp4"
    Path(os.fsdecode(name)).write_bytes(clip.read_bytes())
    assert read_all(os.fsdecode(name)) == read_all(clip)


def test_a_clock_that_starts_anew_goes_on(tmp_path: Path) -> None:
    """Two recordings joined byte by byte, as cameras and `cat` do."""
    data = encode(tmp_path / "a.ts", shots_of([50]), options={"bf": "2"}).read_bytes()
    (tmp_path / "joined.ts").write_bytes(data + data)
    times = read_all(tmp_path / "joined.ts")
    assert len(times) == 100
    assert np.diff(times) == pytest.approx([0.04] * 99, abs=0.001)


def test_a_playlist_opens_nothing(tmp_path: Path, clip: Path) -> None:
    playlist = tmp_path / "list.mp4"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.6,\n{clip}\n#EXT-X-ENDLIST\n")
    with pytest.raises(NotVideoError, match="text file"):
        probe(playlist)
    playlist.write_text(f"ffconcat version 1.0\nfile '{clip}'\n")
    with pytest.raises(NotVideoError, match="text file"):
        probe(playlist)


def test_a_frame_beyond_the_limit_is_not_decoded(clip: Path) -> None:
    with pytest.raises(TooLargeError, match="frames of 160x90 px: at most 14399 px"):
        probe(clip, max_pixels=160 * 90 - 1)


def test_an_error_of_the_store_is_not_blamed_on_the_file(clip: Path) -> None:
    class Failing(io.BytesIO):
        left = 3

        def read(self, size: int | None = -1) -> bytes:
            self.left -= 1
            if self.left < 0:
                raise ConnectionError("the store hung up")
            return super().read(min(size or 4096, 4096))

    with pytest.raises(ConnectionError):
        read_all(Failing(clip.read_bytes()))


# Sparse reads.


def test_both_readers_give_the_same_frames(clip: Path) -> None:
    wanted = [3, 50, 21, 22, 64, 3]
    ours, theirs = (read_frames(clip, indices=wanted, prefer=r) for r in ("pyav", "decord"))
    assert (ours.reader, ours.note, ours.indices) == ("pyav", None, tuple(wanted))
    assert ours.times_s == pytest.approx([i / 25 for i in wanted])
    if theirs.reader == "decord":  # installed on this platform
        for a, b in zip(ours.rgb, theirs.rgb, strict=True):
            assert a.shape == b.shape == (90, 160, 3)
            assert np.abs(a.astype(int) - b).mean() < 1
    with open_video(clip) as video:
        frames = [frame.picture.to_ndarray(format="rgb24") for frame in decode(video)]
    for index, image in zip(wanted, ours.rgb, strict=True):
        assert np.abs(image.astype(int) - frames[index]).mean() < 1


def test_a_time_means_the_frame_that_is_shown_then(clip: Path) -> None:
    assert read_frames(clip, times_s=[-1.0, 0.0, 0.039, 0.04, 1.0, 99.0]).indices == (
        *(0, 0, 0, 1, 25, 64),
    )


def test_without_decord_pyav_reads_and_says_so(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def hide(name: str, *rest: object) -> object:
        if name == "decord":
            raise ImportError(name)
        return real_import(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setitem(sys.modules, "decord", None)
    monkeypatch.setattr(builtins, "__import__", hide)
    found = read_frames(clip, indices=[5], prefer="decord")
    assert (found.reader, found.note) == ("pyav", "not decord: decord is not installed")


def test_decord_is_not_trusted_where_it_counts_other_frames() -> None:
    pytest.importorskip("decord")
    found = read_frames(
        real("androidx__media__sample_edit_list.mp4"), indices=[0, 76], prefer="decord"
    )
    assert (found.reader, found.note) == ("pyav", "not decord: decord counts 86 frames, PyAV 77")


def test_hidden_packets_are_no_frames() -> None:
    path = real("androidx__media__roadtrip-vp92-10bit.webm")
    with open_video(path) as video:
        times = [frame.time_s for frame in decode(video)]
    assert read_frames(path, indices=range(72)).times_s == tuple(times)
    with pytest.raises(IndexError, match="of 72"):
        read_frames(path, indices=[1, 77])


def test_an_open_file_is_read_by_pyav(clip: Path) -> None:
    with open(clip, "rb") as file:
        found = read_frames(file, indices=[7], prefer="decord")
    assert (found.reader, found.note) == ("pyav", "not decord: decord reads local files only")


def test_rotated_frames_come_upright(tmp_path: Path) -> None:
    image = colourful(90, 160, 1)
    path = encode(tmp_path / "r.mp4", [image] * 3, setup=lambda s: s.set_display_rotation(-90))
    found = read_frames(path, indices=[1]).rgb[0]
    upright = np.rot90(image[..., ::-1], -1)
    assert found.shape == (160, 90, 3)
    assert np.abs(found.astype(int) - upright).mean() < 12
