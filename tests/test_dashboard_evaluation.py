"""The pages of evaluations and of runs: their numbers are the command line's, their videos play."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import av
import lance
import numpy as np
import pyarrow as pa
import pytest
from clips import encode
from conftest import REPOSITORY

from cluster.dashboard import evaluation, evaluation_charts, page_runs, runs
from engine.provenance import provenance
from engine.schema import CLIPS, GENERATIONS, RUNS, SCORES, SOURCES
from engine.tables import DatasetError, Writer, create
from evals.evaluation import KIND, Plan
from evals.models import Model
from evals.report import ModelNight, Report, Score
from evals.suites import Prompt, Suite
from trainers.videos import write_mp4

CATEGORIES = ("animal", "food", "human")
DIMENSIONS = ("aesthetic_quality", "motion_smoothness", "dynamic_degree", "text_alignment")
MODELS = {"ours": 0.05, "theirs": 0.0, "third <b>": -0.02}
"""By name, how much better its scores are."""
FRAMES, FPS = 12, 8.0
DRIFT = {"ours": 0.0, "theirs": -0.012, "third <b>": 0.0}
"""Added to the aesthetic score from one frame to the next."""
PROMPTS = tuple(f"prompt {number} of {c}" for c in CATEGORIES for number in range(3))
STARTED = datetime.datetime(2026, 11, 20, 12, tzinfo=datetime.UTC)


def score_of(model: str, dimension: str, number: int) -> float:
    """What a video scores: known, and different in each."""
    if dimension == "dynamic_degree":
        return float((number + len(model)) % 3 > 0)
    return 0.5 + MODELS[model] + 0.01 * number + 0.001 * DIMENSIONS.index(dimension)


def film(path: Path, shade: int) -> bytes:
    frames = np.full((FRAMES, 48, 64, 3), shade, np.uint8)
    for number, frame in enumerate(frames):
        frame[:, 4 * number : 4 * number + 8] = 255 - shade
    if shade > 100:  # as a folder of finished videos may hold it, and VBench reads it
        return encode(path, frames, codec="mpeg4", fps=int(FPS)).read_bytes()
    write_mp4(path, frames, FPS)
    return path.read_bytes()


def suite() -> Suite:
    prompts = tuple(
        Prompt(prompt=text, text=text, dimensions=DIMENSIONS, categories=(text.split()[-1],),
               samples=1)
        for text in PROMPTS
    )  # fmt: skip
    return Suite(name="nine", source="this test", prompts=prompts)


def plan(recipe: str, models: Sequence[str] = tuple(MODELS)) -> Plan:
    return Plan(
        recipe=recipe,
        suite=suite(),
        models=tuple(
            Model(name=name, kind="folder", at=f"/videos/{name}", about="made elsewhere").describe()
            for name in models
        ),
        dimensions=DIMENSIONS,
        metrics={d: {"fingerprint": f"print of {d}", "implementation": "native"}
                 for d in DIMENSIONS},
        seed=0,
        clips=False,
        drift=(),
        is_tiny=recipe.startswith("tiny_"),
        is_filtered=False,
    )  # fmt: skip


def add_run(writer: Writer, of: Plan, run_id: str, hours: float, **values: Any) -> None:
    row = dict.fromkeys(RUNS.names) | provenance(of.resolved(), ["ours=/videos/ours"])
    row |= {"run_id": run_id, "recipe": f"{KIND}{of.recipe}", "seconds": 12.5,
            "started_at": STARTED + datetime.timedelta(hours=hours), "interrupted": False,
            "counts": json.dumps({"scores": {"scored": 3, "failed": 0}})}  # fmt: skip
    writer.add_run(row | values)


def generation(model: str, number: int, mp4: bytes, run_id: str) -> dict[str, Any]:
    about = {"generation_id": f"{model} {number}", "model": model, "model_kind": "folder",
             "prompt": PROMPTS[number], "text": PROMPTS[number], "sample": 0, "settings": "{}",
             "created_at": STARTED, "run_id": run_id}  # fmt: skip
    if model == "third <b>" and number == 8:
        return about | {"error_type": "DamagedError", "error": "its end <i>is</i> missing",
                        "error_transient": False}  # fmt: skip
    return about | {"num_frames": FRAMES, "fps": FPS, "width_px": 64, "height_px": 48,
                    "duration_s": FRAMES / FPS, "size_bytes": len(mp4), "sha256": f"{len(mp4)}",
                    "mp4": mp4}  # fmt: skip


def scores(model: str, number: int, run_id: str) -> list[dict[str, Any]]:
    found = []
    for dimension in DIMENSIONS:
        score = score_of(model, dimension, number)
        frames = None
        if dimension == "aesthetic_quality":
            middle = (FRAMES - 1) / 2
            frames = [score + DRIFT[model] * (i - middle) for i in range(FRAMES)]
        row = {"score_id": f"{model} {number} {dimension}", "generation_id": f"{model} {number}",
               "model": model, "prompt": PROMPTS[number], "sample": 0, "dimension": dimension,
               "implementation": "native", "score": score, "raw_score": score,
               "frame_scores": frames, "num_frames": FRAMES, "seconds": 0.5,
               "details": json.dumps({"video_results": score, "num_frames": FRAMES}),
               "fingerprint": f"print of {dimension}", "run_id": run_id}  # fmt: skip
        if model == "third <b>" and number == 7 and dimension == "text_alignment":
            row |= dict.fromkeys(("score", "raw_score", "details")) | {
                "error_type": "TimeoutError",
                "error": "no answer",
                "error_transient": True,
            }
        found.append(row)
    return found


def report(date: str, value: float) -> Report:
    score = Score(
        dimension="aesthetic_quality", value=value, stderr=0.01, num_videos=9, num_prompts=9,
        num_expected=9, num_failed=0, fingerprint="print of aesthetic_quality",
    )  # fmt: skip
    model = ModelNight(
        name="ours", kind="folder", checkpoint=None, at="/videos/ours", export="x",
        unchanged_since=None, run_id=f"night {date}", is_tiny=False, num_made=9, scores=(score,),
    )  # fmt: skip
    return Report(
        date=date, recipe="rise", asked="a", suite="nine", num_prompts=9, seconds=1.0,
        num_scored=9, nights=7, tolerance=0.0, since=None, models=(model,), comparisons=(),
        losses=(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models on nine prompts of three categories, of recipe `rise`, and two nights of one."""
    folder = tmp_path_factory.mktemp("evaluated")
    root = folder / "set"
    create(str(root), "evaluations")
    writer = Writer(str(root), "made")
    films = [film(folder / f"{n}.mp4", 40 + 50 * n) for n in range(len(MODELS))]
    videos, rows = [], []
    for model, mp4 in zip(MODELS, films, strict=True):
        for number in range(len(PROMPTS)):
            videos.append(generation(model, number, mp4, "second run"))
            if not videos[-1].get("error_type"):
                rows += scores(model, number, "second run")
    schema = pa.schema([lance.blob_field("mp4") if f.name == "mp4" else f for f in GENERATIONS])
    blobs = lance.blob_array([video.pop("mp4", None) for video in videos])
    table = pa.Table.from_pylist(videos, schema=schema.remove(schema.get_field_index("mp4")))
    table = table.append_column(schema.field("mp4"), blobs).select(schema.names)
    writer.append("generations", table)
    writer.append("scores", pa.Table.from_pylist(rows, schema=SCORES))
    first = dataclasses.replace(plan("rise", ("ours",)), dimensions=DIMENSIONS[:2])
    add_run(writer, first, "first run", 0)
    add_run(writer, plan("rise"), "second run", 24)
    add_run(writer, plan("tiny_rise"), "tiny run", -24)
    for day, value in ((18, 0.61), (19, 0.58)):
        date = f"2026-11-{day}"
        night = plan("rise", ("ours",))
        counts = json.dumps({"scores": {}, "night": report(date, value).to_dict()})
        add_run(writer, night, f"night {date}", -72 + day, counts=counts, night=date)
    return root


@pytest.fixture(scope="module")
def url(evaluated: Path, serve: Callable[..., str]) -> str:
    return serve("dashboard", evaluated)


def table_of(browser: Any, name: str) -> list[list[str]]:
    """The cells of a table on the page."""
    rows = browser.until(lambda: browser.all(f"#{name} tbody tr"))
    return [[cell.text for cell in row.find_elements("css selector", "td")] for row in rows]


@pytest.mark.slow
def test_the_leaderboard_is_that_of_the_command(evaluated: Path, url: str, browser: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "evals", "table", str(evaluated), "rise_3", "--format", "json"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    told = json.loads(done.stdout)
    browser.visit(f"{url}/evaluation")
    shown = table_of(browser, "leaderboard")
    assert [row[0] for row in shown] == [row["model"] for row in told["rows"]] == list(MODELS)
    assert "meaningless" not in browser.text.lower()
    columns = {column["dimension"]: column for column in told["columns"]}
    for row, line in zip(told["rows"], shown, strict=True):
        for (name, cell), text in zip(row["cells"].items(), line[1:], strict=True):
            assert text.startswith(cell["printed"]), (cell, text)
            if cell["stderr"] is not None:
                error = (
                    f"± {columns[name]['multiplier'] * cell['stderr']:.{columns[name]['digits']}f}"
                )
                assert error in text, (error, text)
    # by hand: the mean over nine prompts of 0.55 + 0.01 n, printed times ten
    assert shown[0][1].split() == ["5.90", "±", "0.09"]
    incomplete = shown[2][1]
    assert "n=8" in incomplete, "one of its videos is damaged"
    assert "1 failed" in browser.text and "8 of 9 videos" in browser.text


@pytest.mark.slow
def test_two_videos_play_side_by_side(url: str, browser: Any) -> None:
    browser.visit(f"{url}/evaluation?view=Videos&prompt={PROMPTS[3].replace(' ', '+')}")
    videos = browser.until(lambda: len(found := browser.all("video")) == 2 and found)
    play = "const v = arguments[0]; return !v.paused && v.currentTime > 0 && v.videoWidth"
    for video in videos:
        assert browser.until(lambda v=video: browser.driver.execute_script(play, v)) == 64
    assert len({video.get_attribute("src") for video in videos}) == 2
    left, right = (video.location["x"] for video in videos)
    assert right > left and videos[0].location["y"] == videos[1].location["y"]
    shown = {row[0]: row[1:] for row in table_of(browser, "video-scores")}
    expected = [f"{score_of(m, 'text_alignment', 3):.4f}" for m in ("ours", "theirs")]
    assert shown["Text Alignment"] == expected
    assert "prompt 0 of food" in browser.html


@pytest.mark.slow
def test_drift_nights_and_differences(url: str, browser: Any) -> None:
    browser.visit(f"{url}/evaluation?view=Drift")
    browser.until(lambda: browser.all("[data-testid='stVegaLiteChart'] canvas, .vega-embed svg"))
    assert "Aesthetic Quality over the length of the videos" in browser.html
    shown = {row[0]: row for row in table_of(browser, "drift")}
    # of twelve frames one is in the first 15 %, and one in the last: they are eleven apart
    assert shown["theirs"][2] == f"{11 * DRIFT['theirs']:+.4f}" == "-0.1320"
    assert shown["theirs"][3] == f"{DRIFT['theirs'] * FPS:+.5f}"
    assert shown["ours"][2] == "+0.0000"
    browser.visit(f"{url}/evaluation?view=Trend")
    assert table_of(browser, "trend") == [["ours", "2026-11-19", "0.5800", "0.0100", "9", "no"]]
    assert "nothing was compared: no earlier night evaluated other exports" in browser.text
    browser.visit(f"{url}/evaluation?view=Differences")
    found = {row[0]: row for row in table_of(browser, "differences")}
    assert found["Motion Smoothness"][3] == "+0.0500", "of the first model less the second"
    assert found["Motion Smoothness"][-1] == "yes: ours"
    assert found["Dynamic Degree"][-1] == "no"


@pytest.mark.slow
def test_categories_and_marks_of_tiny_recipes(url: str, browser: Any) -> None:
    browser.visit(f"{url}/evaluation?view=Categories&recipe=tiny_rise")
    assert "MEANINGLESS" in browser.text
    charts = browser.until(lambda: browser.all("[data-testid='stVegaLiteChart']"))
    assert charts and not browser.all("[data-testid='stException']")
    assert "missing or incomplete: third <b> in" in browser.text, "why there are no ranks"


@pytest.mark.slow
def test_runs_say_what_failed_and_what_changed(url: str, browser: Any, tmp_path: Path) -> None:
    browser.visit(f"{url}/runs")
    failed = table_of(browser, "failures")
    assert [row[:3] for row in failed] == [
        ["generations", "third <b>", "DamagedError"],
        ["scores", "text_alignment", "TimeoutError"],
    ]
    assert failed[0][3] == "its end <i>is</i> missing", "as it is, not as HTML"
    assert [row[4:] for row in failed] == [["final", "1"], ["may pass", "1"]]
    changes = {row[1]: row[2:] for row in table_of(browser, "changed")}
    assert changes["dimensions"] == [", ".join(DIMENSIONS[:2]), ", ".join(DIMENSIONS)]
    assert browser.picture(tmp_path / "runs.png").stat().st_size > 10_000


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """An evaluation that has begun, in tables as an earlier version made them."""
    root = tmp_path / "begun"
    create(str(root), "evaluations")
    writer = Writer(str(root), "made")
    add_run(writer, plan("rise"), "the run", 0, seconds=None, interrupted=True, counts="{}")
    lance.dataset(str(root / "runs.lance")).drop_columns(["night"])
    return root


@pytest.mark.slow
def test_what_is_half_written_gives_friendly_pages(
    begun: Path, serve: Callable[..., str], browser: Any
) -> None:
    url = serve("dashboard", begun)
    for view in ("Leaderboard", "Differences", "Drift", "Videos"):
        browser.visit(f"{url}/evaluation?view={view}")
        assert not browser.all("[data-testid='stException']"), view
        assert "Run the run has not ended: 0 of 108 scores are there" in browser.text
    assert "This video is not there (yet)" in browser.text
    browser.visit(f"{url}/runs")
    assert "under way, or died" in browser.text
    assert not browser.all("[data-testid='stException']")


# Without a browser


def test_a_run_is_chosen_with_its_own_suite(evaluated: Path) -> None:
    found = {run.run_id: run for run in evaluation.runs(str(evaluated))}
    assert found["second run"].models == tuple(MODELS) and not found["second run"].night
    newest = evaluation.evaluation(str(evaluated), "rise", None)
    assert newest.models == list(MODELS) and newest.progress == (103, 108, 5)
    first = evaluation.evaluation(str(evaluated), "rise", "first run")
    assert first.models == ["ours"] and first.dimensions == [DIMENSIONS[1], DIMENSIONS[0]]
    assert [preset.name for preset in newest.presets()][:3] == ["rise_3", "rise_figure4", "plain"]
    assert evaluation.evaluation(str(evaluated), "tiny_rise", None).is_meaningless
    with pytest.raises(DatasetError, match="has no run gone any more"):
        evaluation.evaluation(str(evaluated), "rise", "gone")


def test_videos_that_browsers_do_not_know_become_h264(evaluated: Path, tmp_path: Path) -> None:
    how = {"cache": str(tmp_path), "cache_bytes": 10**8}
    as_it_is = evaluation.video_bytes(str(evaluated), "ours 0", **how)
    assert as_it_is == (evaluated.parent / "0.mp4").read_bytes() and not list(tmp_path.iterdir())
    made = evaluation.video_bytes(str(evaluated), "third <b> 0", **how)
    assert b"mp4v" in (evaluated.parent / "2.mp4").read_bytes() and b"avc1" in made
    (kept,) = tmp_path.iterdir()
    with av.open(str(kept)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert sum(1 for _ in container.decode(video=0)) == FRAMES
    assert evaluation.video_bytes(str(evaluated), "third <b> 0", **how) == made
    with pytest.raises(DatasetError, match="has no video third <b> 8"):
        evaluation.video_bytes(str(evaluated), "third <b> 8", **how)


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "plays"),
    [
        ("libx264", "yuv420p", True),
        ("libx264", "yuv444p", False),
        ("libx264", "yuv420p10le", False),
        ("libvpx-vp9", "yuv420p", True),
    ],
)
def test_what_an_mp4_says_of_its_codec(
    tmp_path: Path, codec: str, pix_fmt: str, plays: bool
) -> None:
    frames = np.zeros((2, 64, 64, 3), np.uint8)
    path = encode(tmp_path / "a.mp4", frames, codec=codec, pix_fmt=pix_fmt, fps=8)
    assert bool(evaluation._PLAYS.search(path.read_bytes())) == plays


def test_a_radar_puts_each_value_on_its_spoke() -> None:
    by = {"north": {"a": 1.0}, "east": {"a": 2.0}, "south": {"a": 3.0}, "west": {"a": 1.0}}
    chart = evaluation_charts.radar(
        by, ["a"], title="t", rings=(1, 3), inner=3.5, outer=1.0, unit="rank"
    )
    points = chart.to_dict()["layer"][2]["data"]["values"]
    where = {p["spoke"]: (round(p["x"], 6), round(p["y"], 6)) for p in points}
    assert where == {"north": (0, 1), "east": (0.6, 0), "south": (0, -0.2), "west": (-1, 0)}
    assert len(points) == 5 and points[0]["spoke"] == points[-1]["spoke"], "it is closed"
    assert isinstance(chart, alt.LayerChart)


def test_what_changed_is_named_by_what_it_is_of() -> None:
    rule = {"column": "brightness", "lo": 0.2, "hi": 1.0}
    before = {"stages": [{"name": "basic", "rules": [rule]}], "seed": 0}
    after = {"stages": [{"name": "basic", "rules": [{**rule, "lo": 0.3}]}], "seed": 0, "new": [1]}
    found = {one.path: (one.before, one.after) for one in runs.changed(before, after)}
    lo = "stages › [basic] › rules › [brightness] › lo"
    assert found == {lo: (0.2, 0.3), "new": (None, [1])}
    assert runs.changed(before, before) == []
    (whole,) = runs.changed({"stages": []}, before | {"seed": None})
    assert (whole.path, whole.before, runs.num_leaves(whole.after)) == ("stages", [], 4)
    prompts = [{"prompt": f"p{n}", "samples": 5} for n in range(4)]
    fewer = [{**one, "samples": 1} for one in prompts]
    (one,) = runs.changed({"prompts": prompts}, {"prompts": fewer})
    assert (one.path, one.places, one.after) == ("prompts › […] › samples", 4, 1)
    (_, two) = runs.changed({"prompts": prompts[:2]}, {"prompts": fewer[:2]})
    assert two.path == "prompts › [p1] › samples"


def test_rules_are_told_in_words() -> None:
    tell = page_runs._readable
    assert tell({"column": "motion", "lo": None, "hi": None, "above": 0.0}) == "motion > 0"
    assert tell([{"column": "ratio", "lo": 1, "hi": 2}]) == ["ratio ≥ 1 and ratio ≤ 2"]


def test_failures_of_clips_are_counted_for_the_run_that_read_their_source(tmp_path: Path) -> None:
    root, of = str(tmp_path / "set"), {"media": "video", "source_uri": "x"}
    create(root, "classic")
    writer = Writer(root, "r")
    sources = [{"source_id": s, "uri": s, "run_id": f"run of {s}", "state": "done"} for s in "ab"]
    failed = {"state": "failed", "error_type": "DecodeError", "error": "a\n frame " + "x" * 200}
    clips = [of | failed | {"clip_id": f"{n}", "source_id": "ab"[n > 2]} for n in range(5)]
    clips.append(of | {"clip_id": "well", "source_id": "a", "state": "kept"})
    writer.append("sources", pa.Table.from_pylist(sources, schema=SOURCES))
    writer.append("clips", pa.Table.from_pylist(clips, schema=CLIPS))
    odd = dict.fromkeys(RUNS.names) | {"run_id": "run of a", "recipe": "classic"}
    writer.add_run(odd | {"started_at": STARTED})
    lance.dataset(f"{root}/clips.lance").drop_columns(["error_operator"])  # of an earlier version
    (run,) = runs.runs([root])
    (told,) = runs.failures(run)
    assert told == {"table": "clips", "at": "scan", "error_type": "DecodeError", "kind": "final",
                    "message": "a frame " + "x" * 192 + " …", "count": 3}  # fmt: skip


def test_runs_are_read_whatever_wrote_them(evaluated: Path, tmp_path: Path) -> None:
    found = runs.runs([str(evaluated), str(evaluated)])
    assert [run.kind for run in found].count("night") == 2 and len(found) == 5
    assert [run.is_tiny for run in found].count(True) == 1
    one = next(run for run in found if run.run_id == "second run")
    work = {row["what"]: (row["seconds"], row["rows"], row["failed"]) for row in runs.work(one)}
    assert work["score text_alignment"] == (13.0, 26, 1)
    create(str(tmp_path / "old"), "classic")
    writer = Writer(str(tmp_path / "old"), "r")
    odd = dict.fromkeys(RUNS.names) | {"run_id": "r", "recipe": "classic", "resolved": "{torn"}
    writer.add_run(odd | {"started_at": STARTED})
    (old,) = runs.runs([str(tmp_path / "old")])
    assert old.resolved == {} and runs.work(old) == [] and runs.failures(old) == []
    assert runs.runs([]) == []
    with contextlib.suppress(AttributeError):
        old.recipe = "x"  # type: ignore[misc]
    assert old.recipe == "classic"
