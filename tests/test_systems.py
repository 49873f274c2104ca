"""Mimir and SemanticGen as a user runs them: curated tables, Ray, kills, the commands."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, Cluster
from training import Trained, job_of, train

from trainers import launch, tracking
from trainers.checkpoint import load_final
from trainers.recipes import recipe, with_settings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def short(small: None, spans: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    found = recipe("tiny_semanticgen")
    found = with_settings(found, [f"{s.name}.steps=4" for s in found.stages])
    return Trained.of(found, spans, tmp_path_factory.mktemp("short"))


@pytest.mark.parametrize("name", ["latents", "semantics", "fuse"])
def test_two_workers_are_as_one(
    connection: None, short: Trained, spans: Path, tmp_path: Path, name: str
) -> None:
    """Under Ray Train, on what curate.py made: the losses of one worker, and its weights."""
    if name == "fuse":
        found = with_settings(recipe("tiny_mimir"), ["fuse.steps=4"])
        train(found, spans, tmp_path / "one")
        one = tmp_path / "one"
    else:
        found, one = short.recipe, short.run
        if name == "semantics":
            shutil.copytree(short.run / "latents", tmp_path / "two" / "latents")
    job = job_of(found, found.stage(name), spans, tmp_path / "two")
    launch.on_ray(job, 2)
    losses = [[x["loss"] for x in tracking.read(run / name)] for run in (tmp_path / "two", one)]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    a, b = (load_final(run / name)[1] for run in (tmp_path / "two", one))
    # Adam moves a weight whose gradient is next to nothing by its sign, which rounding decides.
    far = sum(((a[n] - b[n]).abs() > 1e-4).sum().item() for n in b)
    assert far <= 1e-3 * sum(t.numel() for t in b.values())


def test_a_killed_run_goes_on_bit_for_bit(small: None, spans: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of SemanticGen's two stages, as often as it takes, and again."""
    settings = ["latents.steps=6", "semantics.steps=6"]
    command = [
        sys.executable, "-m", "trainers", "train", "tiny_semanticgen", "--data", spans,
        "--out", tmp_path / "killed", "--local", "--set", *settings, "--log-every", 1,
        "--checkpoint-every", 2, "--torch-threads", 1, "--micro-batch", 2, "--trackers",
    ]  # fmt: skip
    for stage, line in (("latents", 3), ("semantics", 5)):
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        metrics = tmp_path / "killed" / stage
        while process.poll() is None and len(tracking.read(metrics)) < line:
            time.sleep(0.01)
        assert process.poll() is None, "it had ended before it was killed"
        process.kill()
        process.wait()
    done = subprocess.run(list(map(str, command)), cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = with_settings(recipe("tiny_semanticgen"), settings)
    train(whole, spans, tmp_path / "whole")
    for stage in ("latents", "semantics"):
        a, b = (tmp_path / run / stage for run in ("killed", "whole"))
        assert [x["loss"] for x in tracking.read(a)] == [x["loss"] for x in tracking.read(b)]
        own, other = load_final(a)[1], load_final(b)[1]
        assert own.keys() == other.keys()
        assert all(torch.equal(own[n], other[n]) for n in own)


def test_the_commands(
    small: None, spans: Path, cluster: Cluster, tiny_home: Path, tmp_path: Path
) -> None:
    """What the README says of Mimir: cache, train on Ray, export, generate, analyse."""
    env = cluster.env | {"XDG_CACHE_HOME": str(tiny_home)}

    def ran(*arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "trainers", *map(str, arguments)],
            cwd=REPOSITORY,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    run, export = tmp_path / "run", tmp_path / "export"
    said = ran("cache", "tiny_mimir", "--data", spans)
    assert "fuse, latents: 4 computed" in said and "fuse, answers: 4 computed" in said
    ran(
        "train", "tiny_mimir", "--data", spans, "--out", run, "--set", "fuse.steps=3",
        "--torch-threads", 1,
    )  # fmt: skip
    ran("export", run, export)
    made = ran(
        "generate", export, "a cat", "--steps", 2, "--answers", "greedy", "--out",
        tmp_path / "videos", "--json",
    )  # fmt: skip
    (video,) = json.loads(made.splitlines()[0])["videos"]
    assert Path(video["video"]).is_file() and video["rephrased"]
    pictures = tmp_path / "figure7"
    ran("analyse", export, "--out", pictures, "--answers", 5)
    assert len(list(pictures.glob("*.png"))) >= 1
    card = (export / "README.md").read_text()
    assert "2412.03085" in card and "MEANINGLESS" in card
