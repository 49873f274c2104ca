"""A corpus of poison: the run goes on within its limits, every file gets its state and a reason."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import poison
import psutil
import pytest
from conftest import Curate, rows, tool

from engine.tables import read

pytestmark = pytest.mark.slow

LIMIT_S, LIMIT_GIB = 60.0, 2.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("poison")
    return folder, poison.make_poison(folder)


@pytest.fixture(scope="module")
def dataset(corpus, tmp_path_factory: pytest.TempPathFactory, request) -> dict:
    """The corpus, curated under limits while the memory of its readers is watched."""
    import threading

    from engine.curation import Curation, Options
    from engine.sources import list_sources
    from engine.tables import create
    from pipelines.recipes import CLASSIC

    request.getfixturevalue("connection")
    import contextlib

    root = str(tmp_path_factory.mktemp("poisoned") / "set")
    create(root, "classic")
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            for one in psutil.process_iter(["cmdline", "memory_info"]):
                if any("engine.sandbox" in part for part in one.info["cmdline"] or ()):
                    peak[0] = max(peak[0], one.info["memory_info"].rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.monotonic()
    result = Curation(
        root,
        recipe="classic",
        scan=CLASSIC.scan,
        stages=CLASSIC.stages,
        options=Options(time_limit_s=LIMIT_S, memory_limit_gib=LIMIT_GIB),
        connect=contextlib.nullcontext,
    ).run(list_sources(str(corpus[0])))
    seconds = time.monotonic() - started
    stop.set()
    watcher.join()
    return {"root": root, "result": result, "seconds": seconds, "peak_bytes": peak[0]}


def test_every_poison_file_ends_in_an_acceptable_state_with_a_reason(corpus, dataset) -> None:
    folder, expected = corpus
    found = {r["uri"]: r for r in rows(dataset["root"], "sources")}
    assert dataset["result"].accounts.faults == ()
    wrong = {}
    for name, expect in expected.items():
        row = found[str(folder / name)]
        error = row["error"] or ""
        if row["state"] not in poison.states(expect):
            wrong[name] = (row["state"], error)
        if row["state"] == "failed":
            if not error or "\n" in error or len(error) > 300:
                wrong[name] = ("no reason a person understands", error)
            if poison.fragment(expect) not in error.lower():
                wrong[name] = (expect, error)
    assert not wrong
    assert len(found) == len(expected)


def test_it_stays_within_the_limits(corpus, dataset) -> None:
    assert dataset["seconds"] < LIMIT_S + 60  # one file at its limit, the others beside it
    assert 2**26 < dataset["peak_bytes"] < (LIMIT_GIB + 0.5) * 2**30


def test_a_time_limit_fails_the_file_that_needs_longer_and_no_other(
    corpus, samples: Path, tmp_path: Path, curate: Curate
) -> None:
    src = tmp_path / "src"
    src.mkdir()
    (src / "endless.mp4").symlink_to(corpus[0] / "endless.mp4")
    (src / "dark.mp4").symlink_to(samples / "dark.mp4")
    curate(src, tmp_path / "set", time_limit_s=2.0)
    states = {Path(r["uri"]).name: r for r in rows(tmp_path / "set", "sources")}
    assert states["dark.mp4"]["state"] == "done"
    assert "time limit of 2 s" in states["endless.mp4"]["error"]


@pytest.fixture(scope="module")
def real(videos: Path, tmp_path_factory: pytest.TempPathFactory, request) -> dict:
    """The real videos, curated."""
    import contextlib

    from engine.curation import Curation, Options
    from engine.sources import list_sources
    from engine.tables import create
    from pipelines.recipes import CLASSIC

    request.getfixturevalue("connection")
    root = str(tmp_path_factory.mktemp("real") / "set")
    create(root, "classic")
    result = Curation(
        root,
        recipe="classic",
        scan=CLASSIC.scan,
        stages=CLASSIC.stages,
        options=Options(),
        connect=contextlib.nullcontext,
    ).run(list_sources(str(videos)))
    return {"root": root, "result": result, "sources": rows(root, "sources")}


BROKEN = (
    "Lightricks__LTX-Video__woman.mp4",
    "Zulko__moviepy__result.webm",
    "androidx__media__invalid-bitstream.webm",
    "androidx__media__sample_audio_only.mp4",
    "webmproject__libwebm__invalid_vp9_bitstream-bug_1416.webm",
)


@pytest.mark.timeout(600)
def test_the_real_videos_run_to_the_end_and_balance(real: dict, videos: Path) -> None:
    assert real["result"].accounts.faults == ()
    media = [p for p in videos.iterdir() if p.suffix != ".md"]
    assert len(real["sources"]) == len(media)
    failed = {Path(r["uri"]).name: r["error"] for r in real["sources"] if r["state"] == "failed"}
    assert set(BROKEN) <= set(failed), failed
    assert all(error and "\n" not in error for error in failed.values())


COUNTED_PX = 2e8


def packets(ffprobe: str, path: str) -> int:
    """Of the video, which takes no decoding."""
    shown = subprocess.run(
        [ffprobe, "-v", "error", "-select_streams", "v:0", "-of", "csv=p=0", "-count_packets",
         "-show_entries", "stream=nb_read_packets", path],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(shown.stdout.split()[0].strip(","))


def test_metadata_agrees_with_ffprobe_on_what_both_read(real: dict) -> None:
    import json

    ffprobe = tool("ffprobe")
    compared = 0
    for row in real["sources"]:
        if row["state"] != "done":
            continue
        entries = "codec_name,width,height,avg_frame_rate,nb_read_frames,pix_fmt"
        # of a long one it decodes a few, which tell whether it can, and counts those in the file
        is_short = row["num_frames"] * row["width_px"] * row["height_px"] < COUNTED_PX
        shown = subprocess.run(
            [ffprobe, "-v", "error", "-select_streams", "v:0", "-of", "json", "-count_frames",
             *([] if is_short else ["-read_intervals", "%+#5"]),
             "-show_entries", f"stream={entries}:stream_side_data=rotation", row["uri"]],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        streams = json.loads(shown.stdout or "{}").get("streams") or []
        if shown.returncode or not streams or not int(streams[0].get("nb_read_frames", 0)):
            continue  # this ffprobe cannot read it (a newer codec)
        stream = streams[0]
        compared += 1
        name = Path(row["uri"]).name
        if row["codec"] != "av1":
            assert stream["codec_name"] == row["codec"], name
        assert stream["pix_fmt"] == row["pix_fmt"], name
        _, den = map(int, stream["avg_frame_rate"].split("/"))
        if den and row["scanned"]:
            num = int(stream["nb_read_frames"]) if is_short else packets(ffprobe, row["uri"])
            assert row["num_frames"] == num, name
        turned = any(
            abs(d.get("rotation", 0)) % 180 == 90 for d in stream.get("side_data_list", ())
        )
        assert (row["rotation_deg"] % 180 == 90) == turned, name
    assert compared > 40


def test_rows_of_the_real_videos_are_whole(real: dict) -> None:
    clips = read(real["root"], "clips").to_table().to_pylist()
    for clip in clips:
        assert clip["state"] in ("kept", "rejected", "duplicate"), clip
        if clip["brightness"] is not None:
            assert 0 <= clip["brightness"] <= 1 and 0 <= clip["black_area_frac"] <= 1
            assert 0 <= clip["black_frame_frac"] <= 1 and clip["num_frames"] > 0
            assert (clip["motion_score"] is None) == (clip["error_type"] is not None)
            assert clip["motion_score"] is None or clip["motion_score"] >= 0


def test_a_file_broken_in_the_middle_fails_when_it_is_decoded(
    videos: Path, tmp_path: Path, curate: Curate
) -> None:
    (tmp_path / "src").mkdir()
    # fifty frames by its index: it is not decoded unless all are to be measured
    (tmp_path / "src" / "x.mp4").symlink_to(videos / "dmlc__decord__corrupted.mp4")
    curate(tmp_path / "src", tmp_path / "set")
    assert rows(tmp_path / "set", "clips")[0]["reason"] == "num_frames<65"
    curate(tmp_path / "src", tmp_path / "set", measure_all=True)
    (source,) = rows(tmp_path / "set", "sources")
    assert source["state"] == "failed" and "damaged after 2." in source["error"]
