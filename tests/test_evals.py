"""Evaluations as a user runs them: folders of videos, small weights, Ray, kills, bad input."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

from engine.tables import read
from evals import scoring
from evals.dimensions import DIMENSIONS
from evals.evaluation import Results
from evals.merge import merge
from evals.models import parse
from evals.package import Package
from evals.recipes import recipe
from evals.running import Request, run
from evals.suites import Prompt, Suite
from evals.tiny_weights import make_vbench_cache
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
def tiny_cache(tiny_home: Path) -> Path:
    return make_vbench_cache(tiny_home / "reelwright" / "tiny" / "vbench")


@pytest.fixture(scope="module")
def standard_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos each of two prompts, in a folder that VBench itself scores."""
    folder = tmp_path_factory.mktemp("standard")
    for number, prompt in enumerate(PROMPTS):
        for sample in range(2):
            frames = video(10 * number + sample, 7 + number)
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


def test_every_score_is_the_packages_after_a_stop_and_with_three_actors_too(
    connection: None,
    tiny_cache: Path,
    standard_videos: Path,
    by_the_package: dict[str, list],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take = scoring._Scoring._take

    def dying(self: scoring._Scoring, rows: object) -> None:
        take(self, rows)
        if self.counts.scored >= 2 * len(HERE):
            raise KeyboardInterrupt

    one = request(tiny_cache, standard_videos, tmp_path / "one", workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(scoring._Scoring, "_take", dying)
        with pytest.raises(KeyboardInterrupt):
            run(one, connect=Ray)
    stored = read(str(tmp_path / "one"), "scores").count_rows()
    assert stored == 2 * len(HERE)
    done = run(one, connect=Ray)
    assert (done.scored.there, done.scored.scored) == (stored, 2 * len(HERE))
    same(tmp_path / "one", by_the_package)
    three = request(tiny_cache, standard_videos, tmp_path / "three", workers=3)
    run(three, connect=Ray)
    same(tmp_path / "three", by_the_package)
    again = run(three, connect=lambda: pytest.fail("nothing is to do"))
    assert (again.scored.there, again.scored.scored) == (4 * len(HERE), 0)
