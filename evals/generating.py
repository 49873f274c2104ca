"""Generates videos: work by (model, prompt, sample) on actors that load a model once, resumably.

What is to be done is what `generations` lacks: a video is named by its model, checkpoint, prompt,
text, seed and settings. The seed of sample n is the run's seed + n, for all prompts alike, as in
VBench's own sampling; so anyone can make a video again by hand. Actors write rows with the video as
a blob into fragments that nobody sees yet, and only what names them passes through Ray. The driver
commits fragments as they come; a killed run loses those it had not committed, and the next
generates just these.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import pickle
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from engine import logs, observe, storage
from engine.gauge import Unloadable
from engine.operator import Failed
from engine.tables import Writer
from evals.models import TOKEN, Asked, Made, Make, Model
from evals.suites import Prompt, Suite
from evals.videofiles import (
    DIED,
    Facts,
    Inspector,
    Outcome,
    columns_of,
    export_videos,
    failed,
    failures_of,
    fetch,
    new_row,
    stored_as_they_come,
    write,
)

__all__ = [
    "Counts",
    "Generator",
    "Progress",
    "export_videos",
    "fetch",
    "generate",
    "generation_id",
    "seed_of",
]

SERVED_AT_ONCE = 4
"""Requests to endpoints under way at once, unless another number of workers is asked for."""
_NAMESPACE = uuid.UUID("0d8a6f0e-4f0b-5a55-9d3b-5f0f3f1f6c7e")
_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Progress:
    """Where a run is; handed to its watcher whenever it changes."""

    total: int = 0
    done: int = 0
    failed: int = 0
    doing: str = "looking for what is generated"
    unit: str = "videos"
    started: float = field(default_factory=time.monotonic)

    @property
    def rate(self) -> float:
        """Videos a second."""
        return self.done / max(time.monotonic() - self.started, 1e-9)


@dataclass(kw_only=True)
class Counts:
    """What a run did for a model."""

    there: int = 0
    """That were there before, or had failed for good."""
    generated: int = 0
    failed: int = 0
    """That cannot be made; their rows say why."""
    seconds: float = 0.0
    """Of all actors together, without loading the model."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A video to be made."""

    generation_id: str
    model: int
    """Its place among the job's models."""
    prompt: str
    text: str
    sample: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all units of a run share."""

    root: str
    run_id: str
    models: tuple[Model, ...]
    device: str
    environment: tuple[tuple[str, str], ...]


def generation_id(model: Model, prompt: Prompt, sample: int, seed: int) -> str:
    """Names a video by all that decides on it."""
    settings = json.dumps(dict(model.settings), sort_keys=True)
    says = [model.name, model.kind, model.checkpoint, prompt.prompt, prompt.text, sample, seed]
    return str(uuid.uuid5(_NAMESPACE, json.dumps([*says, settings])))


def seed_of(seed: int, sample: int) -> int:
    """Seed of a sample, given the run's: the same for every prompt."""
    return seed + sample


def generate(
    models: Sequence[Model],
    suite: Suite,
    *,
    writer: Writer,
    connect: Callable[[], Any],
    watch: Callable[[Progress], None] = lambda _: None,
    workers: int | None = None,
    seed: int = 0,
    retry_failed: bool = False,
    commit_every_s: float = 10.0,
) -> dict[str, Counts]:
    """Makes the videos of a suite that are not stored; the same call again goes on.

    Args:
        models: That make videos.
        suite: What is asked for; entries that share a prompt share its videos.
        writer: Of the dataset.
        connect: Makes sure that Ray is there; called only where something is to do.
        watch: Called with the run's progress.
        workers: Actors at once; None is one a GPU, or one a core where there are none.
        seed: Of sample 0; see `seed_of`.
        retry_failed: Try final failures again; those that may pass are tried in any case.
        commit_every_s: What a death may cost.

    Returns:
        By model what was done.

    Raises:
        ValueError: A model lacks a setting.
        Unloadable: A model cannot be loaded.
        OSError: The dataset cannot be read or written.
        LeaseLost: Another driver has taken over.
    """
    assert all(model.makes for model in models), "videos of folders are imported"
    for model in models:
        model.check()
    generating = _Generating(writer, models, watch, workers, commit_every_s)
    watch(generating.progress)
    units = generating.lacking(suite, seed, retry_failed=retry_failed)
    generating.progress.total = len(units)
    if units:
        connect()
    for on_device in (True, False):
        some = [u for u in units if models[u.model].on_device == on_device]
        if some:
            generating.run(some, on_device=on_device)
    return generating.counts


class _Generating:
    """One run of `generate`."""

    def __init__(
        self,
        writer: Writer,
        models: Sequence[Model],
        watch: Callable[[Progress], None],
        workers: int | None,
        commit_every_s: float,
    ):
        self.writer, self.models, self.workers = writer, tuple(models), workers
        self.watch, self.commit_every_s = watch, commit_every_s
        self.progress = Progress()
        self.counts = {model.name: Counts() for model in models}

    def lacking(self, suite: Suite, seed: int, *, retry_failed: bool) -> list[Unit]:
        """Videos to make, by model; failures that are tried again are taken away first."""
        units = {
            unit.generation_id: unit
            for number, model in enumerate(self.models)
            for unit in _units(number, model, suite, seed)
        }
        stored = self.writer.table("generations").to_table(
            columns=["generation_id", "error_type", "error_transient"]
        )
        there, again = set[str](), list[str]()
        for row in stored.to_pylist():
            failed = row["error_type"] is not None
            if row["generation_id"] not in units:
                continue
            if failed and (retry_failed or row["error_transient"]):
                again.append(row["generation_id"])
            else:
                there.add(row["generation_id"])
        self.writer.remove("generations", "generation_id", again)
        for found in there:
            self.counts[self.models[units[found].model].name].there += 1
        return [unit for unit in units.values() if unit.generation_id not in there]

    def run(self, units: Sequence[Unit], *, on_device: bool) -> None:
        """Makes these, which are all of models that run in the worker, or of none."""
        import ray

        gpus = int(ray.cluster_resources().get("GPU", 0)) if on_device else 0
        workers = self.workers or gpus or (None if on_device else SERVED_AT_ONCE)
        self.progress.doing = "loading models"
        job = Job(
            root=self.writer.root,
            run_id=self.writer.run_id,
            models=self.models,
            device="cuda" if gpus else "cpu",
            environment=_environment(),
        )
        for outcome in stored_as_they_come(
            self.writer,
            units,
            job,
            commit_every_s=self.commit_every_s,
            lost=lambda unit: [_died(job, unit)],
            actor=Generator,
            workers=workers,
            share=1.0 if on_device else 0.25,
            num_gpus=1.0 if gpus else 0.0,
        ):
            if outcome is not None:
                self._account(outcome)
            self.watch(self.progress)
            observe.progress("generating", self.progress.done, self.progress.total)

    def _account(self, outcome: Outcome) -> None:
        model = self.models[outcome.unit.model]
        counts = self.counts[model.name]
        counts.generated += outcome.num_done - outcome.num_failed
        counts.failed += outcome.num_failed
        counts.seconds += outcome.seconds
        observe.worked(
            table="generations",
            stage="generate",
            operator=model.name,
            states={"done": outcome.num_done - outcome.num_failed, "failed": outcome.num_failed},
            failures=outcome.failures,
            seconds=outcome.seconds,
        )
        self.progress.doing = f"generating with {model.name}"
        self.progress.done += outcome.num_done
        self.progress.failed += outcome.num_failed


def _units(number: int, model: Model, suite: Suite, seed: int) -> Iterator[Unit]:
    for prompt, sample in suite.videos():
        own = seed_of(seed, sample)
        yield Unit(
            generation_id=generation_id(model, prompt, sample, own),
            model=number,
            prompt=prompt.prompt,
            text=prompt.text,
            sample=sample,
            seed=own,
        )


def _environment() -> tuple[tuple[str, str], ...]:
    """What workers on other machines need of the driver's: for object stores, for endpoints."""
    key = {TOKEN: os.environ[TOKEN]} if TOKEN in os.environ else {}
    return tuple((storage.worker_environment() | key).items())


class Generator:
    """The actor: units in, outcomes out, one bad prompt costing its own row."""

    def __init__(self, job: Job):
        storage.take_environment(job.environment)
        logs.set_up_worker(job.run_id)
        self.job = job
        self._model: int | None = None
        self._make: Make | None = None
        self._inspector: Inspector | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A column `unit` in, a column `outcome` out, both pickled by this very program."""
        units = [pickle.loads(u) for u in batch["unit"].to_pylist()]
        return pa.table({"outcome": [pickle.dumps(self.do(unit)) for unit in units]})

    def do(self, unit: Unit) -> Outcome:
        """The outcome of one unit; never raises for what a model does with a text."""
        try:
            make = self._loaded(unit.model)
        except Unloadable as error:
            return Outcome(unit=unit, unloadable=str(error))
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="reelwright-") as folder:
            row, path = self._made(make, unit, folder)
            files = {} if path is None else {unit.generation_id: path}
            try:
                fragments = write(self.job.root, [row], files)
            except OSError as error:
                return Outcome(unit=unit, unwritable=f"{self.job.root}: {error}")
        failures = failures_of([row])
        operator = self.job.models[unit.model].name
        observe.log_failures(failures, stage="generate", operator=operator)
        return Outcome(
            unit=unit,
            num_failed=int(path is None),
            failures=failures,
            seconds=time.perf_counter() - began,
            fragments=fragments,
        )

    def _loaded(self, number: int) -> Make:
        if self._make is None or self._model != number:
            self._make, self._model = None, number
            if self.job.device == "cuda":
                import torch

                gc.collect()
                torch.cuda.empty_cache()
            model = self.job.models[number]
            try:
                self._make = model.load(self.job.device)
            except Exception as error:
                words = " ".join(str(error).split())[:1000]
                raise Unloadable(f"model {model.name} cannot be loaded: {words}") from error
        return self._make

    def _made(self, make: Make, unit: Unit, folder: str) -> tuple[dict[str, Any], str | None]:
        """A row, and the file of its video, if there is one."""
        row = _row(self.job, unit)
        try:
            (made,) = make([Asked(text=unit.text, seed=unit.seed)])
            facts, notes = self._file_of(made, folder)
        except Exception as error:  # noqa: BLE001 - whatever a model does costs one row
            _end_where_broken(error)
            return failed(row, error), None
        more = {
            "rephrased": made.rephrased,
            "notes": json.dumps(notes, ensure_ascii=False),
            "timings": json.dumps(dict(made.timings)),
        }
        return row | columns_of(facts) | more, facts.path

    def _file_of(self, made: Made, folder: str) -> tuple[Facts, list[str]]:
        from trainers.videos import write_mp4

        path = os.path.join(folder, "video.mp4")
        notes = list(made.notes)
        if made.file is not None:  # of an endpoint: kept as it came, where VBench reads it
            Path(path).write_bytes(made.file)
            self._inspector = self._inspector or Inspector()
            facts = self._inspector.look(path, os.path.join(folder, "anew"))
            return facts, notes + ([facts.note] if facts.note else [])
        assert made.frames is not None and made.fps is not None
        frames_FHW3, note = even(made.frames)
        write_mp4(Path(path), frames_FHW3, made.fps)
        num, height, width = frames_FHW3.shape[:3]
        fps = float(Fraction(made.fps).limit_denominator(1001))
        facts = Facts(
            path=path,
            num_frames=num,
            fps=fps,
            width_px=width,
            height_px=height,
            duration_s=num / fps,
        )
        return facts, notes + ([note] if note else [])


def even(frames_FHW3: np.ndarray) -> tuple[np.ndarray, str | None]:
    """Frames with even sides, as 4:2:0 needs them: an odd line or column is cut off, with a note.

    Raises:
        Failed: These are no frames.
    """
    if frames_FHW3.dtype != np.uint8 or frames_FHW3.ndim != 4 or frames_FHW3.shape[3] != 3:
        shape, kind = frames_FHW3.shape, frames_FHW3.dtype
        raise Failed("NotAVideo", f"the model gave {kind} of shape {shape}: uint8 (F, H, W, 3)"
                     " is needed")  # fmt: skip
    height, width = frames_FHW3.shape[1:3]
    if not len(frames_FHW3) or min(height, width) < 2:
        raise Failed("NotAVideo", f"the model gave {len(frames_FHW3)} frames of {width}x{height}")
    if height % 2 == 0 and width % 2 == 0:
        return frames_FHW3, None
    note = f"cut from {width}x{height} to {width // 2 * 2}x{height // 2 * 2} px: H.264 needs even"
    return frames_FHW3[:, : height // 2 * 2, : width // 2 * 2], note


def _row(job: Job, unit: Unit) -> dict[str, Any]:
    model = job.models[unit.model]
    return new_row(
        job.run_id,
        model=model.name,
        model_kind=model.kind,
        checkpoint=model.checkpoint,
        settings=json.dumps(dict(model.settings), sort_keys=True, ensure_ascii=False),
        **{f.name: getattr(unit, f.name) for f in dataclasses.fields(unit) if f.name != "model"},
    )


def _died(job: Job, unit: Unit) -> dict[str, Any]:
    return failed(_row(job, unit), DIED)


def _end_where_broken(error: Exception) -> None:
    """Ends this process where its GPU is of no more use: the next one tries the unit again."""
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.AcceleratorError):
        _log.warning("the device is of no more use: %s", str(error).splitlines()[0])
        os._exit(1)
