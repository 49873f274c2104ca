"""Evaluations as a user runs them: folders of videos, small weights, Ray, kills, bad input."""

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, Cluster
from training import Trained

from engine.tables import DatasetError, read
from evals.dimensions import DIMENSIONS
from evals.evaluation import Results
from evals.merge import merge
from evals.metrics import choose
from evals.models import parse
from evals.package import Package
from evals.recipes import recipe
from evals.running import Request, run
from evals.suites import Prompt, Suite
from evals.vbench_worker import VBenchWorker
from trainers.recipes import recipe as train_recipe
from trainers.recipes import with_settings
from trainers.videos import write_mp4

pytestmark = pytest.mark.slow

HERE = tuple(d.name for d in DIMENSIONS.values() if d.kind != "other" and d.environment == "here")
"""Dimensions of VBench that run in this environment."""
PROMPTS = ("a person is marching", "a dog running happily")
STYLE = {"appearance_style": {"appearance_style": "Van Gogh style"}}


def video(seed: int, num_frames: int = 9, size: int = 96) -> np.ndarray:
    """Smooth noise that moves and gets grainier."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (6, 6, 3), np.uint8).repeat(size // 6, 0).repeat(size // 6, 1)
    grain = rng.normal(0, 1, (num_frames, size, size, 3))
    frames = [
        np.roll(small, 3 * t, 1).astype(float) + grain[t] * (2 + 2 * t) for t in range(num_frames)
    ]
    return np.clip(frames, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def standard_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos each of two prompts, in a folder that VBench itself scores."""
    folder = tmp_path_factory.mktemp("standard")
    for number, prompt in enumerate(PROMPTS):
        for sample in range(2):
            frames = video(10 * number + sample, 5 + number)
            write_mp4(folder / f"{prompt}-{sample}.mp4", frames, 24.0)
    return folder


@pytest.fixture(scope="module")
def by_the_package(
    tiny_cache: Path, standard_videos: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list]:
    """What VBench's own `evaluate` says of these videos in its own process."""
    out = tmp_path_factory.mktemp("package") / "results.json"
    info = out.with_name("info.json")
    entries = [{"prompt_en": p, "dimension": list(HERE), "auxiliary_info": STYLE} for p in PROMPTS]
    info.write_text(json.dumps(entries))
    script = """
import json, sys
from evals.vbench_worker import prepare, tiny_sizes
cache, videos, info, out, *dimensions = sys.argv[1:]
import torch
torch.set_num_threads(1)
prepare(cache)
with tiny_sizes(dimensions):
    from vbench import VBench
    import pathlib
    VBench(torch.device("cpu"), info, str(pathlib.Path(out).parent)).evaluate(
        videos_path=videos, name="own", dimension_list=dimensions, local=True)
pathlib.Path(out).parent.joinpath("own_eval_results.json").rename(out)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tiny_cache, standard_videos, info, out, *HERE],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


class Ray:
    """The session's, however often a run asks for it."""

    def __enter__(self) -> str:
        return "connected"

    def __exit__(self, *_: object) -> None:
        return None


def request(tiny_cache: Path, videos: Path, root: Path, workers: int) -> Request:
    """All dimensions that run here, by the package, in one actor's process."""
    prompts = [
        Prompt(prompt=p, text=p, dimensions=HERE, auxiliary=STYLE, samples=2) for p in PROMPTS
    ]
    return Request(
        root=str(root),
        recipe=dataclasses.replace(recipe("tiny_vbench"), dimensions=HERE),
        suite=Suite(name="two", source="this test", prompts=tuple(prompts)),
        models=tuple(parse([f"a={videos}"])),
        metrics=(Package(dimensions=HERE, cache=str(tiny_cache), device="cpu"),),
        workers=workers,
        commit_every_s=0.0,
    )


def same(root: Path, by_the_package: dict[str, list]) -> None:
    """Rows identical, aggregates bitwise equal."""
    results = Results.read(str(root))
    for name in HERE:
        aggregate, rows = by_the_package[name]
        own = results.values("a", name)
        assert all(v.error is None for v in own), name
        theirs = [{k: x for k, x in row.items() if k != "video_path"} for row in rows]
        ours = [{k: x for k, x in v.details.items() if k in theirs[0]} for v in own]
        assert ours == theirs, name
        (cell,) = [c for c in results.cells([name]) if c.category is None and c.column == name]
        assert cell.value == aggregate == merge(name, [v.details for v in own]), name
        assert cell.is_complete and cell.num_videos == 4 and cell.num_prompts == 2


def test_every_score_is_the_packages_after_a_kill(
    connection: None,
    tiny_cache: Path,
    standard_videos: Path,
    by_the_package: dict[str, list],
    tmp_path: Path,
) -> None:
    """Rows and aggregates of a run that was killed in the middle and gone on with."""
    root, videos = tmp_path / "one", 2 * len(PROMPTS)
    one = request(tiny_cache, standard_videos, root, workers=1)
    stored = killed(one, tmp_path, lambda: counted(root, "scores") >= len(HERE))
    assert stored and stored % len(HERE) == 0, "a video's scores are committed together"
    done = run(one, connect=Ray)
    assert (done.scored.there, done.scored.scored) == (stored, videos * len(HERE) - stored)
    same(root, by_the_package)


def test_every_score_is_the_packages_with_three_actors(
    connection: None,
    tiny_cache: Path,
    standard_videos: Path,
    by_the_package: dict[str, list],
    tmp_path: Path,
) -> None:
    """The same; and what is scored is not scored again."""
    three = request(tiny_cache, standard_videos, tmp_path / "three", workers=3)
    run(three, connect=Ray)
    same(tmp_path / "three", by_the_package)
    again = run(three, connect=lambda: pytest.fail("nothing is to do"))
    assert (again.scored.there, again.scored.scored) == (2 * len(PROMPTS) * len(HERE), 0)


def killed(one: Request, folder: Path, when: Callable[[], bool]) -> int:
    """Runs it in a process that is killed in the middle; gives how many scores were committed."""
    asked = folder / "request"
    asked.write_bytes(pickle.dumps(one))
    script = """
import pickle, sys
from engine.session import connected
from evals.running import run
run(pickle.loads(open(sys.argv[1], "rb").read()), connect=connected)
"""
    process = subprocess.Popen([sys.executable, "-c", script, asked], cwd=REPOSITORY)
    while not when():
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.05)
    process.kill()
    process.wait()
    return counted(Path(one.root), "scores")


def counted(root: Path, table: str) -> int:
    try:
        return read(str(root), table).count_rows()
    except DatasetError:
        return 0


@pytest.fixture(scope="module")
def exports(small: None, spans: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two models, hardly trained."""
    made = []
    for name, stage in (("tiny_mimir", "fuse"), ("tiny_base_ct", "latents")):
        found = with_settings(train_recipe(name), [f"{stage}.steps=1"])
        folder = tmp_path_factory.mktemp(name)
        made.append(f"{name}={Trained.of(found, spans, folder).export}")
    return made


def evals(cluster: Cluster, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "evals", *map(str, arguments)],
        cwd=REPOSITORY,
        env=cluster.env | {"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"], "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done


def test_two_exports_from_prompts_to_a_table(
    cluster: Cluster, exports: list[str], tiny_cache: Path, tmp_path: Path
) -> None:
    """Generation, scores, drift and a table by the commands of the README, in three minutes."""
    prompts, root, out = tmp_path / "prompts.txt", tmp_path / "evals", tmp_path / "tables"
    prompts.write_text("a red car\na dog on a beach\na cup of coffee\nwaves break on rocks\n")
    names = [one.split("=")[0] for one in exports]
    chosen = "temporal_flickering subject_consistency imaging_quality text_alignment".split()
    began = time.monotonic()
    flags = ["--prompts", prompts, "--samples", 1, "--dst", root, "--dimensions", *chosen]
    steps = ["--set", *(f"{name}.steps=2" for name in names)]
    done = evals(
        cluster, "run", "tiny_custom", "--models", *exports, *flags, *steps, "--out", out, "--json"
    )
    seconds = time.monotonic() - began
    said = json.loads(done.stdout)
    assert {n: c["generated"] for n, c in said["generated"].items()} == dict.fromkeys(names, 4)
    assert said["scored"] == {"scored": 32, "failed": 0, "there": 0}
    assert seconds < 180
    rows = said["tables"]["plain"]["rows"]
    assert [row["model"] for row in rows] == names
    for suffix in ("md", "tex", "csv", "json", "png"):
        assert (out / f"plain.{suffix}").stat().st_size > 100
    assert "MEANINGLESS" in (out / "plain.md").read_text()

    results = Results.read(str(root))
    cells = {(c.model, c.column): c for c in results.cells() if c.category is None}
    assert len(cells) == 2 * (len(chosen) + 1)  # with the drift of imaging quality
    for (model, column), cell in cells.items():
        assert cell.is_complete and cell.num_videos == 4, (model, column)
        if not column.startswith("drift:"):
            values = results.values(model, column)
            details = [v.details for v in values if v.details is not None]
            assert cell.value == merge(column, details)
    head_tail = [
        abs(v.frame_scores[-1] - v.frame_scores[0])  # 15 % of nine frames is one
        for v in results.values(names[0], "imaging_quality")
        if v.frame_scores
    ]
    assert cells[names[0], "drift:imaging_quality"].value == pytest.approx(np.mean(head_tail))

    shown = evals(cluster, "table", root, "semanticgen_1", "--published", "--format", "csv").stdout
    assert "SemanticGen" in shown and names[0] in shown
    compared = json.loads(evals(cluster, "compare", root, *names, "--json").stdout)
    assert compared["imaging_quality"]["num_videos"] == 4
    drifts = json.loads(evals(cluster, "drift", root, "--json", "--out", tmp_path).stdout)
    assert set(drifts["imaging_quality"]) == set(names)
    written = evals(cluster, "videos", root, names[0], tmp_path / "files").stdout
    assert written.startswith("4 videos")
    assert sorted(p.name for p in (tmp_path / "files").iterdir())[0] == "a cup of coffee-0.mp4"
    again = evals(cluster, "run", "tiny_custom", "--models", *exports, *flags, *steps, "--json")
    assert json.loads(again.stdout)["scored"] == {"scored": 0, "failed": 0, "there": 32}
    before = said["run_id"][:8]
    compared = evals(cluster, "compare", root, f"{names[0]}@{before}", names[0], "--json").stdout
    assert {d["mean"] for d in json.loads(compared).values()} == {0.0}
    assert before in evals(cluster, "runs", root).stdout


def test_what_is_wrong_costs_a_row_each_or_is_said_in_a_line(
    cluster: Cluster, tiny_cache: Path, tmp_path: Path
) -> None:
    """A corrupt, a one-frame, a missing and a misnamed video; the rest is scored."""
    folder, prompts = tmp_path / "videos", tmp_path / "prompts.txt"
    folder.mkdir()
    prompts.write_text("good\ncorrupt\nstill\nmissing\n")
    write_mp4(folder / "good-0.mp4", video(1), 8.0)
    write_mp4(folder / "still-0.mp4", video(2)[:1], 8.0)
    whole = (folder / "good-0.mp4").read_bytes()
    (folder / "corrupt-0.mp4").write_bytes(whole[: len(whole) // 3])
    (folder / "goood-0.mp4").write_bytes(whole)
    dimensions = ("temporal_flickering", "aesthetic_quality", "motion_smoothness")
    flags = ["--prompts", prompts, "--samples", 1, "--dimensions", *dimensions]
    done = evals(
        cluster, "run", "tiny_custom", "--models", f"a={folder}", *flags,
        "--dst", tmp_path / "evals", "--json",
    )  # fmt: skip
    assert "goood-0.mp4" in done.stderr and "missing" in done.stderr
    results = Results.read(str(tmp_path / "evals"))
    errors = {name: {v.prompt: v.error for v in results.values("a", name)} for name in dimensions}
    for name in dimensions:
        assert errors[name]["good"] is None
        assert errors[name]["missing"] == "there is no video"
        assert "truncated" in errors[name]["corrupt"] or "damaged" in errors[name]["corrupt"]
    assert errors["aesthetic_quality"]["still"] is None
    assert "2 frames" in errors["temporal_flickering"]["still"]
    assert "3 frames" in errors["motion_smoothness"]["still"]
    cells = {c.column: c for c in results.cells() if c.category is None}
    assert (cells["temporal_flickering"].num_videos, cells["temporal_flickering"].num_failed) == (
        1, 3,
    )  # fmt: skip
    assert cells["temporal_flickering"].num_expected == 4


def test_a_model_that_is_none_and_weights_that_are_others_are_one_line_each(
    cluster: Cluster, tiny_cache: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    (tmp_path / "empty").mkdir()
    flags = ["--prompts", prompts, "--dst", tmp_path / "evals"]

    def line(*arguments: object) -> str:
        said = evals(cluster, "run", *arguments, *flags, code=2).stderr.splitlines()
        said = [x for x in said if not x.startswith("recipe tiny")]
        assert len(said) == 1 and said[0].startswith("error: "), said
        return said[0]

    assert "empty" in line("tiny_custom", "--models", f"a={tmp_path / 'empty'}")
    assert "nowhere" in line("tiny_custom", "--models", f"a={tmp_path / 'nowhere'}")
    write_mp4(tmp_path / "empty" / "a cat-0.mp4", video(1), 8.0)
    model = ["--models", f"a={tmp_path / 'empty'}"]
    assert "no dimension beauty" in line("tiny_custom", *model, "--dimensions", "beauty")
    assert "tiny_custom" in line("custom", *model, "--weights", tiny_cache)
    others = tmp_path / "weights"
    shutil.copytree(tiny_cache, others)
    (others / "TINY").unlink()
    told = line("custom", *model, "--weights", others, "--dimensions", "background_consistency")
    assert "ViT-B-32.pt" in told and "40d365715913c9da" in told
    shutil.rmtree(others / "clip_model")
    told = line(
        "custom", *model, "--weights", others,
        "--dimensions", "background_consistency", "aesthetic_quality",
    )  # fmt: skip
    assert "ViT-B-32.pt" in told and "ViT-L-14.pt" in told and "wget" in told
    assert not (tmp_path / "evals").exists()


def test_flickering_is_measured_on_what_the_static_filter_leaves(
    connection: None, tiny_cache: Path, tmp_path: Path
) -> None:
    """VBench's filter with a RAFT that sees no motion: the first five of six videos are kept."""
    cache, folder = tmp_path / "weights", tmp_path / "videos"
    shutil.copytree(tiny_cache, cache)
    raft = cache / "raft_model" / "models" / "raft-things.pth"
    torch.save({n: torch.zeros_like(t) for n, t in torch.load(raft).items()}, raft)
    folder.mkdir()
    for sample in range(6):
        write_mp4(folder / f"a sign-{sample}.mp4", video(sample, 2), 8.0)
    dimensions = ("temporal_flickering",)
    prompt = Prompt(prompt="a sign", text="a sign", dimensions=(*dimensions, "static"), samples=6)
    how = {"cache": str(cache), "device": "cpu"}
    asked = Request(
        root=str(tmp_path / "evals"),
        recipe=dataclasses.replace(recipe("tiny_vbench"), dimensions=dimensions),
        suite=Suite(name="one", source="this test", prompts=(prompt,)),
        models=tuple(parse([f"a={folder}"])),
        metrics=tuple(choose(dimensions, **how)),
        static=choose(["static"], **how)[0],
        workers=1,
    )
    done = run(asked, connect=Ray)
    assert (done.scored.scored, done.scored.failed) == (5, 0)
    results = Results.read(asked.root)
    assert [v.sample for v in results.values("a", "temporal_flickering")] == [0, 1, 2, 3, 4]
    (cell,) = results.cells()
    assert (cell.num_videos, cell.num_expected) == (5, 5)
    assert "filtered" in cell.notes and "unfiltered" not in cell.notes


def test_long_videos_are_scored_in_clips_and_drift_from_start_to_end(
    connection: None, tiny_cache: Path, tmp_path: Path
) -> None:
    """Two seconds of eight frames a second: frames 0 to 16, and 5 to 21 for the short rest."""
    (tmp_path / "videos").mkdir()
    path = tmp_path / "videos" / "a river-0.mp4"
    write_mp4(path, video(3, 21), 8.0)
    dimensions = ("subject_consistency", "motion_smoothness", "imaging_quality")
    how = {"cache": str(tiny_cache), "device": "cpu"}
    asked = Request(
        root=str(tmp_path / "evals"),
        recipe=dataclasses.replace(recipe("tiny_semanticgen_long"), dimensions=dimensions),
        suite=Suite(
            name="one",
            source="this test",
            prompts=(Prompt(prompt="a river", text="a river", dimensions=dimensions, samples=1),),
        ),
        models=tuple(parse([f"a={tmp_path / 'videos'}"])),
        metrics=tuple(choose(dimensions, **how)),
        workers=1,
    )
    done = run(asked, connect=Ray)
    assert (done.scored.scored, done.scored.failed) == (5, 0)  # imaging quality: once, of all
    results = Results.read(asked.root)
    values = {c.column: c for c in results.cells()}
    worker = VBenchWorker(list(dimensions), str(tiny_cache), "cpu", threads=1)
    clips = ([0, 16], [5, 21])
    for name, tolerance in zip(dimensions, (1e-6, 0, 1e-6), strict=True):
        rows = [worker.score(name, str(path), "a river", None, clip)["row"] for clip in clips]
        own = float(np.mean([r["video_results"] for r in rows])) * DIMENSIONS[name].scale
        assert values[name].value == pytest.approx(own, abs=tolerance), name
        assert "long_clip" in values[name].notes
    whole = worker.score("imaging_quality", str(path), "a river")["frame_scores"]
    contrast = abs(np.mean(whole[-3:]) - np.mean(whole[:3])) / 100
    assert values["drift:imaging_quality"].value == pytest.approx(contrast, abs=1e-6)
