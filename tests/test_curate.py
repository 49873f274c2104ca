"""The whole run: what each sample must get, what is redone and what is not, and bad input."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY, Curate, Run, rows

from engine.tables import read
from pipelines.samples import SAMPLES

pytestmark = pytest.mark.slow

MADE = [s for s in SAMPLES if s.source != "ignored"]


@pytest.fixture(scope="module")
def finished(samples: Path, tmp_path_factory: pytest.TempPathFactory, request) -> dict:
    """The samples, curated once by the command line, with what it printed."""
    import subprocess

    from conftest import command

    cluster = request.getfixturevalue("cluster")
    root = tmp_path_factory.mktemp("data") / "set"
    done = subprocess.run(
        command("curate", "--src", samples, "--dst", root, "--json"),
        env=cluster.env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {"root": root, "printed": json.loads(done.stdout), "lines": done.stdout.splitlines()}


@pytest.fixture
def dataset(finished: dict, tmp_path: Path) -> Path:
    """A copy of that dataset, to change."""
    return Path(shutil.copytree(finished["root"], tmp_path / "copy"))


def clips_of(root: Path, source: Path) -> list[dict]:
    return [r for r in rows(root, "clips") if r["source_uri"] == str(source)]


@pytest.mark.parametrize("sample", MADE, ids=lambda s: s.name)
def test_each_sample_gets_its_label(sample, finished: dict, samples: Path) -> None:
    uri = samples / sample.name
    (source,) = [r for r in rows(finished["root"], "sources") if r["uri"] == str(uri)]
    assert source["state"] == sample.source, source["error"]
    clips = clips_of(finished["root"], uri)
    assert [(c["state"], c["reason"]) for c in clips] == list(sample.clips)
    if sample.source == "failed":
        assert source["error"] and "\n" not in source["error"]


def test_the_json_is_one_line_with_the_stated_keys_and_adds_up(finished: dict) -> None:
    printed = finished["printed"]
    assert len(finished["lines"]) == 1
    assert list(printed) == [
        "dataset", "run_id", "sources", "clips", "reasons", "frames_decoded", "seconds",
        "measured",
    ]  # fmt: skip
    sources, clips = printed["sources"], printed["clips"]
    assert list(sources) == ["total", "done", "failed", "duplicate", "ignored"]
    assert list(clips) == ["total", "kept", "rejected", "failed", "duplicate", "pending"]
    assert sources["total"] == sources["done"] + sources["failed"] + sources["duplicate"]
    assert sources["total"] == len(MADE)
    assert sources["ignored"] == len(SAMPLES) - len(MADE)
    assert clips["total"] == sum(n for state, n in clips.items() if state != "total")
    assert clips["total"] == sum(len(s.clips) for s in SAMPLES)
    assert sum(printed["reasons"].values()) == clips["rejected"]
    assert printed["dataset"] == str(finished["root"])


def test_every_row_has_the_columns_that_the_design_names(finished: dict) -> None:
    names = (
        "clip_id source_id source_uri start_s end_s start_frame num_frames fps width_px height_px "
        "duration_s aspect_ratio codec motion_score black_area_frac brightness black_frame_frac "
        "aesthetic_score ocr_area_frac watermark_score overlay_score phash caption "
        "caption_original "
        "repetition_2gram repetition_5gram repetition_10gram clip_score state kept stage reason "
        "rule_column rule_value rule_bound error_type error duplicate_of"
    ).split()
    assert set(names) <= set(read(str(finished["root"]), "clips").schema.names)


def test_captions_beside_the_files_are_in_the_table(finished: dict, samples: Path) -> None:
    from pipelines.samples import CAPTIONS

    for name, caption in CAPTIONS.items():
        clips = clips_of(finished["root"], samples / name)
        assert clips and {c["caption_original"] for c in clips} == {caption}


def test_each_measured_clip_has_its_keyframes_within_its_span(finished: dict) -> None:
    frames: dict[str, list[dict]] = {}
    for row in rows(finished["root"], "keyframes"):
        frames.setdefault(row["clip_id"], []).append(row)
    measured = [c for c in rows(finished["root"], "clips") if c["brightness"] is not None]
    assert measured
    for clip in measured:
        found = frames[clip["clip_id"]]
        is_image = clip["media"] == "image"
        assert (1 if is_image else min(3, clip["num_frames"])) <= len(found) <= 16
        for row in found:
            assert is_image or clip["start_s"] <= row["time_s"] < clip["end_s"]
            assert row["jpeg"][:3] == b"\xff\xd8\xff"
            assert min(row["width_px"], row["height_px"]) <= 448


def test_running_again_reads_no_media_bytes(samples: Path, tmp_path: Path, curate: Curate) -> None:
    src = Path(shutil.copytree(samples, tmp_path / "src"))
    first = curate(src, tmp_path / "set")
    before = {t: rows(tmp_path / "set", t) for t in ("sources", "clips", "keyframes")}
    for path in src.rglob("*.*"):  # other bytes, same size and time stamp: reading would tell
        if path.suffix in (".mp4", ".webm", ".avi", ".mkv", ".mov"):
            stat = path.stat()
            path.write_bytes(b"\0" * stat.st_size)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = curate(src, tmp_path / "set")
    assert (first.frames_decoded > 0, again.frames_decoded) == (True, 0)
    assert {t: rows(tmp_path / "set", t) for t in before} == before
    verified = curate(src, tmp_path / "set", verify=True)
    assert verified.accounts.sources["failed"] > again.accounts.sources["failed"]


@pytest.fixture
def three(samples: Path, tmp_path: Path) -> Path:
    """A folder with three short videos."""
    folder = tmp_path / "three"
    folder.mkdir()
    for name in ("coffee_pan.mp4", "dark.mp4", "astronaut_zoom.mp4"):
        shutil.copy2(samples / name, folder)
    return folder


def test_a_changed_file_redoes_just_itself(three: Path, samples: Path, curate: Curate) -> None:
    root = three.parent / "set"
    curate(three, root)
    before = rows(root, "clips", without=())
    shutil.copy2(samples / "static.mp4", three / "dark.mp4")
    result = curate(three, root)
    source = next(r for r in rows(root, "sources", without=()) if r["uri"].endswith("dark.mp4"))
    assert result.frames_decoded == source["frames_decoded"] > 0
    after = rows(root, "clips", without=())
    assert [r for r in before if "dark" not in r["source_uri"]] == [
        r for r in after if "dark" not in r["source_uri"]
    ]
    assert [c["reason"] for c in clips_of(root, three / "dark.mp4")] == ["motion_score<=0"]


def test_a_touched_file_is_hashed_and_not_decoded(three: Path, curate: Curate) -> None:
    root = three.parent / "set"
    curate(three, root)
    before = rows(root, "clips")
    os.utime(three / "dark.mp4")
    assert curate(three, root).frames_decoded == 0
    assert rows(root, "clips") == before
    stored = next(r for r in rows(root, "sources", without=()) if r["uri"].endswith("dark.mp4"))
    assert stored["mtime_ns"] == (three / "dark.mp4").stat().st_mtime_ns


def test_another_scan_redoes_all_and_leaves_one_row_a_clip(three: Path, curate: Curate) -> None:
    root = three.parent / "set"
    first = curate(three, root)
    second = curate(three, root, scan={"shots": "none", "clip_seconds": 1.0})
    assert second.frames_decoded == first.frames_decoded
    assert second.accounts.faults == ()
    assert second.accounts.clips["total"] > first.accounts.clips["total"]
    assert max(c["duration_s"] for c in rows(root, "clips")) <= 1.0 + 1e-6
    third = curate(three, root)
    assert rows(root, "clips") and third.accounts.clips == first.accounts.clips


def test_a_new_caption_is_taken_up_without_decoding(three: Path, curate: Curate) -> None:
    root = three.parent / "set"
    curate(three, root)
    keyframes = rows(root, "keyframes")
    (three / "dark.txt").write_text("a new caption")
    assert curate(three, root).frames_decoded == 0
    assert {c["caption_original"] for c in clips_of(root, three / "dark.mp4")} == {"a new caption"}
    assert rows(root, "keyframes") == keyframes


def test_a_vanished_source_is_marked_and_stays(three: Path, curate: Curate) -> None:
    root = three.parent / "set"
    first = curate(three, root)
    (three / "dark.mp4").unlink()
    second = curate(three, root)
    assert second.accounts.clips == first.accounts.clips and second.accounts.faults == ()
    missing = {Path(r["uri"]).name: r["missing"] for r in rows(root, "sources")}
    assert missing == {"coffee_pan.mp4": False, "dark.mp4": True, "astronaut_zoom.mp4": False}


def test_a_moved_source_takes_its_clips_along(three: Path, curate: Curate) -> None:
    root = three.parent / "set"
    first = curate(three, root)
    (three / "dark.mp4").rename(three / "moved.mp4")
    second = curate(three, root)
    assert second.accounts.clips == first.accounts.clips and second.accounts.faults == ()
    assert len(clips_of(root, three / "moved.mp4")) == 1
    assert not clips_of(root, three / "dark.mp4")


def test_equal_content_is_scanned_once_whenever_it_comes(three: Path, curate: Curate) -> None:
    root = three.parent / "set"
    first = curate(three, root)
    shutil.copy2(three / "dark.mp4", three / "a copy of dark.mp4")
    second = curate(three, root)
    assert second.frames_decoded == 0
    assert second.accounts.clips == first.accounts.clips
    copy = next(r for r in rows(root, "sources") if "copy" in r["uri"])
    dark = next(r for r in rows(root, "sources") if r["uri"].endswith("/dark.mp4"))
    assert (copy["state"], copy["duplicate_of"]) == ("duplicate", dark["source_id"])


def test_a_looser_threshold_makes_pending_and_the_next_run_measures_just_these(
    dataset: Path, samples: Path, run: Run, curate: Curate
) -> None:
    changed = run("refilter", dataset, "--set", "num_frames.lo=10", "--json")
    assert changed.code == 0, changed.err
    pending = changed.json["clips"]["pending"]
    assert pending > 0 and changed.json["clips"]["total"] == len(rows(dataset, "clips"))
    waiting = {r["source_uri"] for r in rows(dataset, "clips") if r["state"] == "pending"}
    waiting &= {r["uri"] for r in rows(dataset, "sources") if not r["scanned"]}
    result = curate(samples, dataset, bounds=("num_frames.lo=10",))
    assert result.accounts.clips["pending"] == 0 and result.accounts.faults == ()
    read_again = [r for r in rows(dataset, "sources", without=()) if r["uri"] in waiting]
    assert result.frames_decoded == sum(r["frames_decoded"] for r in read_again) > 0


def test_measure_all_measures_the_rejected_too(three: Path, samples: Path, curate: Curate) -> None:
    shutil.copy2(samples / "portrait.mp4", three)
    root = three.parent / "set"
    curate(three, root)
    (clip,) = clips_of(root, three / "portrait.mp4")
    assert clip["brightness"] is None
    curate(three, root, measure_all=True)
    (clip,) = clips_of(root, three / "portrait.mp4")
    assert clip["brightness"] is not None and clip["reason"] == "aspect_ratio<1"


def test_spans_of_a_manifest_are_clips_and_its_columns_travel_along(
    samples: Path, tmp_path: Path, curate: Curate
) -> None:
    manifest = tmp_path / "list.csv"
    manifest.write_text(
        "uri,start_s,end_s,caption,licence\n"
        f"{samples / 'cuts.mp4'},0.5,3.5,across a cut,CC-BY\n"
        f"{samples / 'cuts.mp4'},1.0,4.25,,CC0\n"
        f"{samples / 'cuts.mp4'},500,501,,\n"
    )
    result = curate(manifest, tmp_path / "set")
    assert result.accounts.faults == ()
    first, second, outside = clips_of(tmp_path / "set", samples / "cuts.mp4")
    assert (first["caption_original"], json.loads(first["extra"])) == (
        "across a cut", {"licence": "CC-BY"}
    )  # fmt: skip
    assert abs(first["duration_s"] - 3.0) < 0.05 and abs(second["duration_s"] - 3.25) < 0.05
    assert outside["state"] == "failed" and "500" in outside["error"]


def test_two_runs_give_the_same_rows(three: Path, curate: Curate) -> None:
    roots = [three.parent / "one", three.parent / "two"]
    curate(three, roots[0])
    curate(three, roots[1], workers=1)
    for table in ("sources", "clips", "keyframes"):
        assert rows(roots[0], table) == rows(roots[1], table)


def test_it_runs_by_its_path_from_any_folder(three: Path, tmp_path: Path, run: Run) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = run("curate", "--src", "../three", "--dst", "set", "--json", cwd=elsewhere)
    assert done.code == 0, done.err
    assert done.json["dataset"] == str(elsewhere / "set")


def test_a_person_sees_the_funnel_and_where_the_dataset_is(
    dataset: Path, samples: Path, run: Run
) -> None:
    done = run("curate", "--src", samples, "--dst", dataset)
    assert done.code == 0, done.err
    assert f"dataset: {dataset}" in done.out
    for words in ("sources", "kept", "brightness<0.2", "Mimir: about 10 s", "failed:"):
        assert words in done.out


def test_report_shows_the_funnel_a_clip_and_near_misses(
    finished: dict, samples: Path, run: Run
) -> None:
    root = finished["root"]
    assert "brightness<0.2" in run("report", root).out
    (dark,) = clips_of(root, samples / "dark.mp4")
    record = run("report", root, "--clip", dark["clip_id"], "--json").json
    assert record["reason"] == "brightness<0.2" and record["source"]["uri"].endswith("dark.mp4")
    assert len(record["keyframes"]) >= 3
    near = run("report", root, "--near", "brightness", "--json").json
    assert near[0]["clip_id"] == dark["clip_id"]
    assert near[0]["missed_by"] == pytest.approx(0.2 - dark["brightness"])


def test_a_sheet_shows_kept_above_rejected(finished: dict, run: Run, tmp_path: Path) -> None:
    import cv2

    from pipelines.sheet import KEPT, REJECTED

    sheet = tmp_path / "sheet.png"
    assert run("report", finished["root"], "--sheet", sheet).code == 0
    image = cv2.imread(str(sheet))
    lines = [
        [y for y in range(image.shape[0]) if (image[y, 20] == c).all()] for c in (KEPT, REJECTED)
    ]
    assert lines[0] and lines[1] and max(lines[0]) < min(lines[1])
    wrong = run("report", finished["root"], "--sheet", tmp_path / "sheet.nonsense")
    assert (wrong.code, len(wrong.err.splitlines())) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--src", "no/such/folder", "--dst", "{tmp}/set"], "no/such/folder"),
        (["--src", "{tmp}/empty", "--dst", "{tmp}/set"], "empty"),
        (["--src", "{tmp}/three", "--dst", "/proc/nothing"], "choose a --dst"),
        (["--src", "{tmp}/three", "--dst", "{tmp}/other"], "holds a dataset of recipe 'mimir'"),
        (["nonsense", "--src", "{tmp}/three", "--dst", "{tmp}/set"], "choose one of classic"),
        (["--src", "{tmp}/three", "--dst", "{tmp}/set", "--nonsense"], "nonsense"),
        (["--src", "{tmp}/three"], "--dst"),
        (["--src", "{tmp}/three", "--dst", "{tmp}/set", "--set", "brightness.lo=-1"], "0 or more"),
        (["--src", "{tmp}/three", "--dst", "{tmp}/set", "--set", "colour.lo=1"], "colour"),
        (["--src", "{tmp}/three", "--dst", "{tmp}/set", "--set", "brightness=1"], "COLUMN.lo"),
        (["--src", "{tmp}/three", "--dst", "{tmp}/set", "--clip-seconds", "0"], "more than 0"),
        (["--src", "{tmp}/three", "--dst", "{tmp}/set", "--max-shot-s", "-3"], "more than 0"),
        (["--src", "{tmp}/three", "--dst", "{tmp}/set", "--workers", "0"], "1 or more"),
        (["--src", "{tmp}/three", "--dst", "{tmp}/set", "--shots", "wrong"], "shots"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_is_one_line_that_says_what_to_do_and_exit_code_2(
    arguments: list[str], says: str, three: Path, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "dataset.json").write_text('{"format": 1, "recipe": "mimir"}')
    done = run("curate", *(a.format(tmp=tmp_path) for a in arguments))
    assert (done.code, done.out) == (2, "")
    assert len(done.err.splitlines()) == 1, done.err
    assert done.err.startswith("error: ") and says in done.err


@pytest.mark.parametrize("script", ["refilter", "report"])
def test_a_folder_without_a_dataset_is_one_line_too(script: str, tmp_path: Path, run: Run) -> None:
    done = run(script, tmp_path)
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1)


def test_a_dataset_in_which_nothing_is_kept_has_a_funnel_too(
    samples: Path, tmp_path: Path, run: Run
) -> None:
    done = run("curate", "--src", samples / "portrait.mp4", "--dst", tmp_path / "set")
    assert done.code == 0, done.err
    assert "aspect_ratio<1" in done.out and "kept" in done.out


def test_help_and_scripts_start_without_ray(run: Run) -> None:
    for script in ("refilter", "report"):
        loaded = run(script, "--help", env={"PYTHONPROFILEIMPORTTIME": "1"})
        assert loaded.code == 0
        assert " ray\n" not in loaded.err
    assert "--src" in run("curate", "--help", cwd=REPOSITORY).out
