"""Videos made elsewhere as rows: looked at, kept or encoded anew, known again when they change."""

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from conftest import Bucket
from tiny_models import encoded, mp4, suite_of

from engine.operator import Failed
from engine.tables import Writer, create, read
from evals.generating import fetch
from evals.importing import Counts, import_folder
from evals.models import parse
from evals.suites import Suite
from evals.videofiles import Inspector

SUITE = suite_of(
    *("good", "corrupt", "one frame", "upper", "moving", "webm", "hevc", "mpeg4", "nobody", "A"),
    samples=1,
)


@pytest.fixture
def root(tmp_path: Path) -> str:
    create(str(tmp_path / "set"), "evaluation")
    return str(tmp_path / "set")


Import = Callable[..., Counts]


@pytest.fixture
def bring(connection: None, root: str) -> Import:
    def call(folder: object, suite: Suite = SUITE, **options: Any) -> Counts:
        (model,) = parse([f"else={folder}"])
        options = {"connect": lambda: None, "commit_every_s": 0.2, "workers": 1} | options
        return import_folder(model, suite, writer=Writer(root, str(uuid.uuid4())), **options)

    return call


def rows(root: str) -> dict[str, dict[str, Any]]:
    table = read(root, "generations")
    found = table.to_table(columns=[n for n in table.schema.names if n != "mp4"]).to_pylist()
    assert len(found) == len({(r["prompt"], r["sample"]) for r in found})
    return {r["prompt"]: r for r in found}


def told(counts: Counts) -> tuple[int, int, int, int, int]:
    return (counts.there, counts.imported, counts.failed, counts.missing, counts.unknown)


def brightness(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    return np.stack(frames).astype(int)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    (folder / "deeper").mkdir(parents=True)
    files = {
        "good-0.mp4": mp4(1),
        "corrupt-0.mp4": mp4(1)[:900],
        "one frame-0.mp4": mp4(1, frames=1),
        "upper-0.MP4": mp4(2),
        "moving.gif": encoded("gif", "gif", 3, pix_fmt="rgb8"),
        "deeper/webm-0.webm": encoded("libvpx", "webm", 3),
        "hevc-0.mp4": encoded("libx265", "mp4", 3),
        "mpeg4-0.mp4": encoded("mpeg4", "mp4", 3),
        "of something else-0.mp4": mp4(3),
        "good-7.mp4": mp4(3),
        "notes.txt": b"words",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_a_folder(bring: Import, folder: Path, root: str, tmp_path: Path) -> None:
    counts = bring(folder)
    assert told(counts) == (0, 7, 1, 2, 3)
    said = "\n".join(counts.lines)
    for words in ("of something else-0.mp4: is of no prompt", "good-7.mp4: is sample 7",
                  "notes.txt: is no video", "no video of 'nobody'"):  # fmt: skip
        assert words in said
    found = rows(root)
    assert {p for p, r in found.items() if r["error_type"]} == {"corrupt"}
    assert found["corrupt"]["error_type"] in ("TruncatedError", "DamagedError")
    assert found["corrupt"]["error_transient"] is False
    assert found["one frame"]["num_frames"] == 1
    fine = {p: r for p, r in found.items() if not r["error_type"]}
    assert {p for p, r in fine.items() if r["notes"] == "[]"} == {
        *("good", "one frame", "upper", "mpeg4")
    }
    assert "its codec is hevc" in found["hevc"]["notes"]
    assert {p: r["num_frames"] for p, r in fine.items() if p != "one frame"} == dict.fromkeys(
        fine.keys() - {"one frame"}, 4
    )
    assert fine["moving"]["fps"] == pytest.approx(8, abs=0.5)  # a GIF counts hundredths
    assert {r["fps"] for p, r in fine.items() if p != "moving"} == {8.0}
    paths = dict(
        zip(fine, fetch(root, [r["generation_id"] for r in fine.values()], tmp_path), strict=True)
    )
    assert paths["upper"].read_bytes() == (folder / "upper-0.MP4").read_bytes()
    assert paths["upper"].name == "upper-0.mp4"
    for prompt, path in paths.items():  # VBench reads them with OpenCV, among others
        capture = cv2.VideoCapture(str(path))
        assert int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) == fine[prompt]["num_frames"], prompt
        assert capture.read()[0]
        with av.open(str(path)) as container:
            assert container.streams.video[0].codec_context.name in ("h264", "mpeg4")
    for prompt, name in (("webm", "deeper/webm-0.webm"), ("hevc", "hevc-0.mp4")):
        kept, own = brightness(paths[prompt]), brightness(folder / name)
        assert abs(kept - own).max() <= 2, prompt
    kept, own = brightness(paths["moving"]), brightness(folder / "moving.gif")
    assert abs(kept.mean((1, 2)) - own.mean((1, 2))).max() <= 2  # its dithered colours are halved

    never = {"connect": lambda: pytest.fail("nothing was to do")}
    assert told(bring(folder, **never)) == (8, 0, 0, 2, 3) and rows(root) == found

    # what is touched is looked at and stands, what changes takes its place, what is gone stays
    os.utime(folder / "good-0.mp4", ns=(1, 1))
    (folder / "upper-0.MP4").write_bytes(mp4(5))
    (folder / "corrupt-0.mp4").write_bytes(mp4(6))
    (folder / "mpeg4-0.mp4").unlink()
    assert told(bring(folder)) == (5, 2, 0, 3, 3)
    after = rows(root)
    assert not any(r["error_type"] for r in after.values()) and after.keys() == found.keys()
    same = {p for p in found if found[p]["generation_id"] == after[p]["generation_id"]}
    assert found.keys() - same == {"upper", "corrupt"}
    assert after["upper"]["sha256"] != found["upper"]["sha256"]

    # another folder of this name: what came from the first goes
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(folder / "good-0.mp4", other)
    assert told(bring(other)) == (1, 0, 0, 9, 0)
    assert rows(root).keys() == {"good"}


def test_a_manifest_and_failures_that_are_tried_again(
    bring: Import, root: str, tmp_path: Path
) -> None:
    folder = tmp_path / "named"
    folder.mkdir()
    (folder / "001.mp4").write_bytes(mp4(1))
    (folder / "002.mp4").write_bytes(b"")
    (folder / "prompts.csv").write_text("file,prompt,seed\n001.mp4,good,12\n002.mp4,A,\n")
    assert told(bring(folder)) == (0, 1, 1, 8, 0)
    found = rows(root)
    assert found["good"]["seed"] == 12 and found["A"]["seed"] is None
    assert found["A"]["error_type"] == "NotVideoError"
    assert told(bring(folder)) == (2, 0, 0, 8, 0)
    assert told(bring(folder, retry_failed=True)) == (1, 0, 1, 8, 0)
    assert len(rows(root)) == 2


def test_a_store(bring: Import, root: str, bucket: Bucket) -> None:
    bucket.put("made/good-0.mp4", mp4(1))
    bucket.put("made/A-0.mp4", b"no video")
    assert told(bring("s3://reel/made")) == (0, 1, 1, 8, 0)
    assert rows(root)["good"]["source_uri"] == "s3://reel/made/good-0.mp4"
    assert told(bring("s3://reel/made")) == (2, 0, 0, 8, 0)


def test_a_file_without_end(tmp_path: Path) -> None:
    """What takes too long is given up, and the next file is looked at."""
    fine, long = tmp_path / "fine.mp4", tmp_path / "long.mp4"
    fine.write_bytes(mp4(1))
    long.write_bytes(encoded("mpeg4", "mp4", frames=1500))
    inspector = Inspector(time_limit_s=30.0)
    try:
        assert inspector.look(str(fine), str(tmp_path / "made")).num_frames == 4  # it has started
        inspector._sandbox.time_limit_s = 0.002
        with pytest.raises(Failed, match=r"the time limit of 0\.002 s$") as failure:
            inspector.look(str(long), str(tmp_path / "made"))
        assert failure.value.error_type == "TimeLimit"
        inspector._sandbox.time_limit_s = 30.0
        assert inspector.look(str(fine), str(tmp_path / "made")).path == str(fine)
    finally:
        inspector.close()
