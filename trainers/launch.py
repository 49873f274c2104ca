"""Where a job runs: under Ray Train, or in this process. The one file that imports ray.train."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import logs, observe, storage
from trainers import tracking
from trainers.dataset import Manifest, read_manifest
from trainers.job import Job, Stopped

POLL_S = 0.5
TABLE_EVERY_S = 30.0
"""Between updates of a run's `train_metrics.lance`."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a stage is."""

    stage: str
    step: int
    """Steps that are done."""
    steps: int
    batch: int
    """Samples of a step."""
    figures: dict[str, float]
    """Of the newest line of metrics."""


Watch = Callable[[Progress], None]


def check(job: Job, workers: int) -> Manifest:
    """Raises ValueError, one line, for all that can be known to be wrong before any work.

    Returns:
        What the dataset has for the stage.
    """
    if storage.is_remote(job.out):
        raise ValueError(f"{job.out}: a run's folder is a path that all workers see, not a URI")
    if not job.stage.batch > 0 or job.stage.batch % workers:
        raise ValueError(
            f"stage {job.stage.name}: a batch of {job.stage.batch} cannot be shared equally by"
            f" {workers} workers"
        )
    tracking.check(job.options.trackers)
    job.system.check(job.stage)
    manifest = read_manifest(job.root, job.stage.data)
    from trainers.checkpoint import check_same, check_steps  # torch, which --help does without

    check_same(job.folder, job.config(manifest))
    check_steps(job.folder, job.stage.steps)
    return manifest


def has_ended(job: Job) -> bool:
    """Whether a stage that `check` has passed took all its steps already."""
    from trainers.checkpoint import ended_at

    return ended_at(job.folder) == job.stage.steps


def default_workers() -> int:
    """One for each GPU of the connected cluster; one where there are none."""
    import ray

    return max(1, int(ray.cluster_resources().get("GPU", 0)))


def alone(job: Job, watch: Watch | None = None) -> int:
    """Trains in this process; gives the step at which it began."""
    import torch

    from trainers.loop import train
    from trainers.parallel import World

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _observed(job), _watched(job, watch):
        return train(job, World(device=device))


def on_ray(job: Job, workers: int, watch: Watch | None = None, *, max_failures: int = 3) -> int:
    """Trains on actors of the connected cluster, on GPUs where it has any.

    A worker that dies takes its group along, which starts again from the last checkpoint.

    Args:
        job: What is trained.
        workers: How many.
        watch: Told of progress.
        max_failures: Times that the group is started again.

    Raises:
        Stopped: It cannot go on, or died too often.
    """
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    there = ray.cluster_resources()
    use_gpu = there.get("GPU", 0) > 0
    cpus = max(1, int((there.get("CPU", 1)) // workers))
    own = tempfile.mkdtemp(prefix=".ray-", dir=_made(job.out))
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job, "environment": tuple(storage.worker_environment().items())},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": min(cpus, 8), **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=RunConfig(
            name=job.stage.name,
            storage_path=own,  # checkpoints are ours: Ray's own may lag behind what was written
            failure_config=FailureConfig(max_failures=max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        with _observed(job), _quiet(), _watched(job, watch):
            told = _fitted(trainer)
    except TrainingFailedError as error:
        raise Stopped(_cause(error)) from error
    finally:
        shutil.rmtree(own, ignore_errors=True)
    if "stopped" in told:
        raise Stopped(told["stopped"])
    return told["start"]


def _fitted(trainer: Any) -> dict[str, Any]:
    """What the first worker's function gave.

    In a thread, for Ray Train's own answer to Ctrl-C ends the process with code 1; here it raises,
    and the workers end with the connection to Ray.
    """
    found: dict[str, Any] = {}

    def fit() -> None:
        try:
            found["value"] = trainer.fit().return_value
        except BaseException as error:  # noqa: BLE001 - raised again by who waits
            found["error"] = error

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_S)  # Ctrl-C arrives between two of these
    if "error" in found:
        raise found["error"]
    return found["value"]


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """What each of Ray Train's workers runs."""
    from ray.train.torch import get_device

    from trainers.loop import train
    from trainers.parallel import World

    job: Job = config["job"]
    storage.take_environment(config["environment"])
    logs.set_up_worker(_run_id(job))
    try:
        return {"start": train(job, World.joined(get_device()))}
    except Stopped as stopped:  # all workers alike; another try would end as this one
        return {"stopped": str(stopped)}


def _cause(error: Exception) -> str:
    """The workers' own error in one line."""
    found = getattr(error, "worker_failures", None)
    cause: BaseException = next(iter(found.values())) if found else error
    while getattr(cause, "cause", None) is not None:
        cause = cause.cause
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(cause).__name__


def _made(folder: str) -> str:
    Path(folder).mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray Train says a line for every report and state; ours are in metrics.jsonl."""
    before = os.environ.get("RAY_TRAIN_ENABLE_PRINT_PATCH")
    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
    loggers = [logging.getLogger(n) for n in ("ray.train", "ray.tune")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if before is None:
            del os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"]
        else:
            os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = before


def _observed(job: Job) -> AbstractContextManager[None]:
    """Metrics and log lines are a run's, which its folder names."""
    return observe.of_run(_run_id(job))


def _run_id(job: Job) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, job.out))


@contextmanager
def _watched(job: Job, watch: Watch | None) -> Iterator[None]:
    """From a thread: tells `watch` of new lines of metrics, and keeps their table up to date."""
    ended, seen = threading.Event(), -1
    table = _Table(job.out)

    def look() -> None:
        nonlocal seen
        line = tracking.last(job.folder) if watch else None
        if watch and line and line["step"] != seen:
            seen = line["step"]
            stage = job.stage
            told = {"steps": stage.steps, "batch": stage.batch, "figures": line}
            watch(Progress(stage=stage.name, step=seen + 1, **told))
            observe.progress(f"train {stage.name}", seen + 1, stage.steps)

    def go_on() -> None:
        due = time.monotonic() + TABLE_EVERY_S
        while not ended.wait(POLL_S):
            look()
            if time.monotonic() >= due:
                table.update()
                due = time.monotonic() + TABLE_EVERY_S

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        look()
        table.end()


def store_metrics(out: str) -> None:
    """Brings a run's table up to date with what a killed driver left, or an earlier version."""
    _Table(out).end()


class _Table:
    """A run's table of metrics; that it cannot be written stops no training."""

    def __init__(self, out: str):
        self._run, self._table = out, tracking.MetricsTable(Path(out))

    def update(self) -> None:
        self._do(self._table.update)

    def end(self) -> None:
        self._do(self._table.end)

    def _do(self, what: Callable[[], object]) -> None:
        try:
            what()
        except (OSError, ValueError, RuntimeError) as error:
            _log.warning(
                "%s of %s is behind its %s files: %s",
                tracking.TABLE, self._run, tracking.METRICS, str(error).splitlines()[0],
            )  # fmt: skip
