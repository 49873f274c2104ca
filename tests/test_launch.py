"""The loop under Ray Train: workers that share steps, and workers that die."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import learners
import pytest
import ray
import small_sets
import torch
from learners import Denoise, job, make_pictures

from trainers import launch, tracking
from trainers.checkpoint import load_final
from trainers.job import Job, Stopped

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def session(connection: None) -> Iterator[None]:
    """The session's cluster, with the test's own system sent along by value."""
    for module in (learners, small_sets):
        ray.cloudpickle.register_pickle_by_value(module)
    yield
    for module in (learners, small_sets):
        ray.cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def alone(root: str, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The run in this process."""
    whole = job(root, tmp_path_factory.mktemp("alone"), torch_threads=1)
    threads = torch.get_num_threads()
    launch.alone(whole)
    torch.set_num_threads(threads)
    return whole


@pytest.fixture(scope="module")
def shared(session: None, root: str, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The run of two workers that nothing happens to."""
    two = job(root, tmp_path_factory.mktemp("shared"), torch_threads=1)
    assert launch.on_ray(two, 2) == 0
    return two


def losses(job: Job) -> list[float]:
    lines = tracking.read(job.folder)
    assert [line["step"] for line in lines] == list(range(job.stage.steps))
    return [line["loss"] for line in lines]


def results(job: Job) -> dict[str, torch.Tensor]:
    found = load_final(job.folder)
    assert found
    return found[1]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_workers_are_as_one(
    session: None, shared: Job, alone: Job, root: str, tmp_path: Path, parallel: str
) -> None:
    two = shared
    if parallel == "fsdp":
        two = job(root, tmp_path, parallel="fsdp", torch_threads=1)
        assert launch.on_ray(two, 2) == 0
    assert losses(two) == pytest.approx(losses(alone), rel=1e-5)
    assert [line["num_first_slots"] for line in tracking.read(two.folder)] == [1] * 12
    a, b = results(two), results(alone)
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[n], b[n], atol=1e-5) for n in a)
    assert not list(Path(two.out).glob(".ray-*")), "Ray's own folder is gone"
    # what two workers saved, one goes on with
    shutil.copytree(two.folder, tmp_path / "more" / "denoise")
    more = job(root, tmp_path / "more", stage={"steps": 14}, torch_threads=1)
    assert launch.alone(more) == 12
    assert len(losses(more)) == 14


def test_a_killed_worker_changes_nothing(
    session: None, shared: Job, root: str, tmp_path: Path
) -> None:
    """Two workers, one of them killed at a step of no one's choice."""
    step, rank = random.randrange(12), random.randrange(2)
    flag = tmp_path / "killed"
    system = Denoise(kill_at=step, kill_flag=str(flag), kill_rank=rank)
    killed = job(root, tmp_path / "run", system=system, torch_threads=1)
    launch.on_ray(killed, 2)
    assert flag.exists(), f"rank {rank} died at step {step}"
    assert losses(killed) == losses(shared), f"killed: rank {rank}, step {step}"
    a, b = results(killed), results(shared)
    assert all(torch.equal(a[n], b[n]) for n in b)


def test_what_stops_a_run_is_one_line(session: None, root: str, tmp_path: Path) -> None:
    burst = job(root, tmp_path, system=Denoise(burst_from=2), patience=3, torch_threads=1)
    with pytest.raises(Stopped, match="not finite for 3 steps in a row, the last being 4"):
        launch.on_ray(burst, 2)
