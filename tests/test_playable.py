"""Clips as files that a browser plays: exact, H.264 where they must be, cached within a limit."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import pytest
from conftest import Bucket
from shown_clips import FPS, FRAMES, add_cut, clip_row, commit, film, source_row

from cluster.dashboard import playable
from cluster.dashboard.playable import Playable, Unplayable
from engine import cutter, roots
from engine.cut import Span

PLENTY = 10**9


@pytest.fixture
def of(tmp_path: Path) -> Callable[..., tuple[str, dict[str, Any]]]:
    """A dataset of one clip: some frames of a file."""

    def make(path: Path, first: int = 0, num: int = FRAMES, **changes: Any) -> tuple[str, Any]:
        source = source_row(path)
        clip = clip_row(source, first, num) | changes
        root = str(tmp_path / f"set-{path.stem}-{first}-{num}")
        commit(root, [source], [clip])
        return root, clip

    return make


def frames(played: Playable, tmp_path: Path) -> tuple[list[float], Any]:
    """Which frames of a `film` a file shows, by their grey, and its codec and pixels."""
    path = tmp_path / "played"
    path.write_bytes(played.data)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        facts = stream.codec_context.codec.canonical_name, stream.codec_context.pix_fmt
        levels = [float(f.to_ndarray(format="gray").mean()) for f in container.decode(stream)]
    return [(level - 40) / 2 for level in levels], facts


def assert_shows(found: list[float], first: int, num: int) -> None:
    """A frame too early or too late would be one off on the mean."""
    assert len(found) == num
    off = [one - wanted for one, wanted in zip(found, range(first, first + num), strict=True)]
    assert abs(sum(off) / num) < 0.4 and max(map(abs, off)) < 2


def test_a_whole_file_that_browsers_know_is_played_as_it_is(
    of: Callable[..., Any], tmp_path: Path
) -> None:
    path = film(tmp_path / "whole.mp4")
    root, clip = of(path)
    offered = playable.offer(root, clip["clip_id"])
    assert offered.plays and offered.whole
    played = playable.play(offered, str(tmp_path / "cache"), PLENTY)
    assert played.data == path.read_bytes() and played.mime == "video/mp4"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("first", "num", "how"), [(24, 48, "copied"), (30, 25, "encoded"), (20, 70, "encoded")]
)
def test_a_span_has_exactly_its_frames(
    of: Callable[..., Any], tmp_path: Path, first: int, num: int, how: str
) -> None:
    root, clip = of(film(tmp_path / "film.mp4"), first, num)
    offered = playable.offer(root, clip["clip_id"])
    assert offered.plays and not offered.whole
    played = playable.play(offered, str(tmp_path / "cache"), PLENTY)
    assert played.how.startswith(how)
    shown, facts = frames(played, tmp_path)
    assert_shows(shown, first, num)
    assert facts == ("h264", "yuv420p")


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("hevc.mp4", "libx265", "yuv420p"),
        ("mpeg4.avi", "mpeg4", "yuv420p"),
        ("flash.flv", "flv", "yuv420p"),
        ("wide.mp4", "libx264", "yuv422p"),
    ],
)
def test_what_browsers_do_not_know_becomes_h264_once_and_on_request(
    of: Callable[..., Any], tmp_path: Path, name: str, codec: str, pix_fmt: str
) -> None:
    root, clip = of(film(tmp_path / name, codec, pix_fmt=pix_fmt), 24, 24)
    cache = str(tmp_path / "cache")
    offered = playable.offer(root, clip["clip_id"])
    assert not playable.is_ready(offered, cache)
    played = playable.play(offered, cache, PLENTY)
    shown, facts = frames(played, tmp_path)
    assert_shows(shown, 24, 24)
    assert facts == ("h264", "yuv420p")
    assert played.data.index(b"moov") < played.data.index(b"mdat")  # plays before it is all there
    assert playable.is_ready(offered, cache)
    assert playable.play(offered, cache, PLENTY).how == "made before"


def test_the_cache_keeps_to_its_limit_and_forgets_what_was_played_longest_ago(
    of: Callable[..., Any], tmp_path: Path
) -> None:
    path, cache = film(tmp_path / "film.mp4"), tmp_path / "cache"
    offers = []
    for first in (5, 30, 55):
        root, clip = of(path, first, 20)
        offers.append(playable.offer(root, clip["clip_id"]))
    sizes = [len(playable.play(one, str(tmp_path / "elsewhere"), PLENTY).data) for one in offers]
    for one in (*offers[:2], offers[0]):  # now the second is the older one
        playable.play(one, str(cache), PLENTY)
    (cache / "notes.txt").write_text("somebody else's")
    limit = sizes[0] + sizes[2]
    playable.play(offers[2], str(cache), limit)
    there = [playable.is_ready(replaced(o), str(cache)) for o in offers]
    assert there == [True, False, True]
    assert sum(p.stat().st_size for p in cache.glob("*.mp4")) == limit
    assert {p.name for p in cache.iterdir() if p.suffix != ".mp4"} == {"notes.txt"}
    with pytest.raises(Unplayable, match=r"the cache may hold 0\.0 MB: .*--cache-gb"):
        playable.play(offers[1], str(cache), 100)


def replaced(offered: playable.Offer) -> playable.Offer:
    """As if no browser knew it: then it is ready only where it is cached."""
    return dataclasses.replace(offered, plays=False)


def test_many_who_ask_for_one_clip_get_the_same_file(
    of: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, clip = of(film(tmp_path / "film.avi", "mpeg4"), 24, 24)
    offered, cache = playable.offer(root, clip["clip_id"]), tmp_path / "cache"
    made, original = [], playable._made
    monkeypatch.setattr(playable, "_made", lambda *a: made.append(1) or original(*a))
    got: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: got.append(playable.play(offered, str(cache), PLENTY).data))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(got) == 4 and len(set(got)) == 1
    assert len(made) == 1 and len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("where", ["file", "blob"])
def test_a_clip_that_was_cut_is_played_from_its_cut(tmp_path: Path, where: str) -> None:
    path = film(tmp_path / "hevc.mp4", "libx265")
    source = source_row(path)
    clip, root = clip_row(source), str(tmp_path / "set")
    writer = commit(root, [source], [clip])
    (Path(root) / "cuts").mkdir()
    cut = film(Path(root, "cuts", "one.mp4") if where == "file" else tmp_path / "cut.mp4")
    add_cut(writer, clip, cut, path="cuts/one.mp4" if where == "file" else None)
    offered = playable.offer(root, clip["clip_id"])
    assert offered.plays
    played = playable.play(offered, str(tmp_path / "cache"), PLENTY)
    assert played.data == cut.read_bytes()
    if where == "file":  # a cut that is gone: its source is still there
        cut.unlink()
        assert playable.offer(root, clip["clip_id"]).codec == "hevc"


def test_why_a_clip_cannot_be_played_is_one_line(of: Callable[..., Any], tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4")
    root, clip = of(path)
    with pytest.raises(Unplayable, match="no clip has the id"):
        playable.offer(root, "x' OR '1'='1")
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(Unplayable, match=r"film\.mp4 has changed since it was read"):
        playable.offer(root, clip["clip_id"])
    path.unlink()
    with pytest.raises(Unplayable, match=r"no longer at .*film\.mp4"):
        playable.offer(root, clip["clip_id"])
    text = tmp_path / "notes.avi"
    film(text, "mpeg4")
    root, clip = of(text)
    offered = playable.offer(root, clip["clip_id"])
    text.write_text("these are notes")
    with pytest.raises(Unplayable, match="not a video: a text file"):
        playable.play(offered, str(tmp_path / "cache"), PLENTY)
    assert not list((tmp_path / "cache").iterdir())


def test_what_is_named_with_quotes_is_found(tmp_path: Path) -> None:
    source = source_row(film(tmp_path / "film.mp4")) | {"source_id": "it's"}
    clip, root = clip_row(source) | {"clip_id": "one's"}, str(tmp_path / "set")
    writer = commit(root, [source], [clip])
    add_cut(writer, clip, tmp_path / "film.mp4", path=None)
    assert playable.offer(root, "one's").read is not None


def test_what_is_wrong_with_the_cache_is_one_line(of: Callable[..., Any], tmp_path: Path) -> None:
    root, clip = of(film(tmp_path / "film.mp4"), 24, 24)
    offered = playable.offer(root, clip["clip_id"])
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(Unplayable, match=r"File exists.*cache"):
        playable.play(offered, str(tmp_path / "cache"), PLENTY)


def test_what_a_table_holds_is_made_playable_whatever_roots_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = film(tmp_path / "film.mp4", "mpeg4"), str(tmp_path / "cache")
    data = path.read_bytes()
    monkeypatch.setattr(playable, "_sandbox", lambda: SimpleNamespace(call=cutter.cut_files))
    monkeypatch.setenv(roots.VARIABLE, str(tmp_path / "data"))
    length_s = FRAMES / FPS
    span = Span(clip_id="a", start_s=0.0, end_s=length_s, start_frame=0, num_frames=FRAMES)
    facts: dict[str, Any] = {"span": span, "codec": "mpeg4", "plays": False, "whole": True}
    stored = playable.Offer(uri="the table", read=lambda _: data, key="0" * 64, **facts)
    shown, _ = frames(playable.play(stored, cache, PLENTY), tmp_path)
    assert_shows(shown, 0, FRAMES)
    with pytest.raises(Unplayable, match="outside REELWRIGHT_ALLOWED_ROOTS"):
        playable.play(playable.Offer(uri=str(path), key="1" * 64, **facts), cache, PLENTY)


@pytest.mark.parametrize(
    "uri", ["http://169.254.169.254/latest/meta-data/x.mp4", "/proc/self/environ"]
)
def test_what_a_dataset_names_is_opened_only_where_it_may_be(tmp_path: Path, uri: str) -> None:
    source = source_row(film(tmp_path / "film.mp4"), uri)
    clip, root = clip_row(source), str(tmp_path / "set")
    commit(root, [source], [clip])
    with pytest.raises(Unplayable, match=r"opened"):
        playable.offer(root, clip["clip_id"])


def test_a_clip_of_a_source_that_the_dataset_does_not_list_is_not_opened(
    of: Callable[..., Any], tmp_path: Path
) -> None:
    film(tmp_path / "other.mp4")
    root, clip = of(film(tmp_path / "film.mp4"), source_uri=str(tmp_path / "other.mp4"))
    with pytest.raises(Unplayable, match=r"other\.mp4 is no source that this dataset lists"):
        playable.offer(root, clip["clip_id"])


def test_a_file_that_is_no_video_is_not_served_as_it_is(tmp_path: Path) -> None:
    """A dataset may name a secret: what does not begin as a video stays where it is."""
    path = film(tmp_path / "film.mp4")
    source = source_row(path)
    clip, root = clip_row(source), str(tmp_path / "set")
    writer = commit(root, [source], [clip])
    secret = Path(root, "cuts", "secret.mp4")
    secret.parent.mkdir()
    secret.write_text("password: hunter2")
    add_cut(writer, clip, secret, path="cuts/secret.mp4")
    offered = playable.offer(root, clip["clip_id"])
    with pytest.raises(Unplayable, match="not a video"):
        playable.play(offered, str(tmp_path / "cache"), PLENTY)


def test_a_source_in_an_object_store_is_fetched(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a child of its own: one that is there does not know this bucket's server
    monkeypatch.setattr(playable, "_workers", ThreadPoolExecutor(1))
    path = film(tmp_path / "film.avi", "mpeg4")
    bucket.put("raw/film.avi", path.read_bytes())
    source = source_row(path, f"{bucket.uri}/raw/film.avi")
    clip, root = clip_row(source, 24, 24), str(tmp_path / "set")
    commit(root, [source], [clip])
    offered = playable.offer(root, clip["clip_id"])
    shown, _ = frames(playable.play(offered, str(tmp_path / "cache"), PLENTY), tmp_path)
    assert_shows(shown, 24, 24)
