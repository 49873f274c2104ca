"""The training loop: one for every system, in one process or in many.

    for step:  read the step's samples -> frozen encoders -> batch -> loss -> backward
               clip -> AdamW -> average -> log -> checkpoint

The samples of step n are a function of (data, seed, n), and so is their noise (`system.Noise`):
a run that was killed goes on from its last checkpoint with the numbers that it would have had, and
workers share a step without changing it: each takes the next `batch / workers` of its samples.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from trainers import tracking
from trainers.checkpoint import (
    Checkpoints,
    check_steps,
    claim,
    complete,
    ended_at,
    fingerprint,
    forget_unfinished,
    load_final,
    save_final,
    trained,
)
from trainers.dataset import Manifest, read_manifest
from trainers.features import complete as complete_features
from trainers.features import open_caches
from trainers.job import Job, Options, Stopped
from trainers.loader import Loader, Micro
from trainers.optim import adamw, average, rate, started_average
from trainers.parallel import World
from trainers.plan import Plan
from trainers.system import Bucket, Encoder, Learner, Noise, Sample
from trainers.throughput import Meter, note_machine

_log = logging.getLogger(__name__)


def train(job: Job, world: World, manifest: Manifest | None = None) -> int:
    """Trains a stage from where it stands to its last step.

    Returns:
        The step at which this run began.

    Raises:
        Stopped: It cannot go on.
        ValueError: What was asked for does not fit; `launch.check` says so before any work.
    """
    manifest = manifest or read_manifest(job.root, job.stage.data)
    parents = {name: _trained_before(Path(job.out) / name) for name in job.stage.after}
    config = job.config(manifest)
    if world.leads:
        claim(job.folder, config)
        check_steps(job.folder, job.stage.steps)
        forget_unfinished(job.folder)
    world.wait()
    if ended_at(job.folder) == job.stage.steps:
        return job.stage.steps
    if world.leads:
        note_machine(job.folder, world)
    _prepare(job.options, job.stage.seed, world)
    learner = job.system.learner(job.stage, world.device, parents)
    trainer = Trainer(job, world, manifest, learner)
    start = max(complete(job.folder), default=0)
    trainer.run(start, config)
    return start


def _prepare(options: Options, seed: int, world: World) -> None:
    """What is built from here on is the same on all workers and in every run."""
    torch.manual_seed(seed)
    if options.torch_threads:
        torch.set_num_threads(options.torch_threads)
    torch.use_deterministic_algorithms(options.deterministic)


def _trained_before(stage: Path) -> dict[str, Tensor]:
    found = load_final(stage)
    if found is None:
        raise ValueError(f"stage {stage.name} of {stage.parent} has not ended: train it first")
    return found[1]


class Trainer:
    """A stage under way on one worker.

    Args:
        job: What is trained.
        world: This worker's place.
        manifest: Of the dataset.
        learner: The system, loaded for the stage.
    """

    def __init__(self, job: Job, world: World, manifest: Manifest, learner: Learner):
        self.job, self.stage, self.options, self.world = job, job.stage, job.options, world
        self.learner, self.module = learner, learner.module
        if self.options.gradient_checkpointing:
            learner.checkpoint_gradients()
        if self.options.compile:
            for block in learner.blocks:
                block.compile()
        self.shared = world.shared(self.module, learner.blocks, self.options.parallel)
        self.optimizer = adamw(self.module, learner.groups, self.stage.optim)
        self.average = started_average(self.module, self.stage.ema_decay)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.meter = Meter(world.device, self.stage.precision)
        self.encoders = job.system.encoders(self.stage)
        self._micros: Sequence[Micro] = ()  # of the step under way
        self._spare: dict[Bucket, dict[str, Tensor]] = {}  # features of some sample
        self._running: dict[str, Callable[[Sequence[Sample]], list[Tensor]]] = {}
        self.loader = Loader(
            manifest,
            self.stage.data,
            Plan(manifest.bucket, self.stage.batch, self.stage.seed, self.stage.data.variants),
            self.encoders,
            open_caches(job.root, self.encoders, manifest, self.stage.data),
            rank=world.rank,
            world=world.size,
            micro_batch=job.micro_batch,
            ahead=self.options.ahead,
            threads=self.options.threads,
        )
        self.counts = learner.counts  # since the last line, of this worker
        self.counts.update(skipped=0, unreadable=0)
        self.skipped_in_a_row = 0

    def run(self, start: int, config: Mapping[str, Any]) -> None:
        """From step `start` to the last."""
        saves = Checkpoints(
            self.job.folder,
            self.world,
            training=fingerprint(config),
            keep=self.options.keep,
            beside=self.options.async_save,
        )
        if start:
            noted = saves.restore(start, self.module, self.optimizer, self.average)
            self.skipped_in_a_row = noted["skipped_in_a_row"]
        metrics = None
        if self.world.leads:
            name = f"{self.job.recipe}/{Path(self.job.out).name}/{self.stage.name}"
            metrics = tracking.Metrics(self.job.folder, name, self.options.trackers, config, start)
        try:
            self._steps(start, saves, metrics)
            saves.finish()
            self._end()
        finally:
            self.loader.close()
            if metrics:
                metrics.close()

    def _steps(self, start: int, saves: Checkpoints, metrics: tracking.Metrics | None) -> None:
        waiting: list[tuple[int, Tensor]] = []
        self.loader.start(start)
        self.meter.reset()
        for step in range(start, self.stage.steps):
            waiting.append((step, self._step(step)))
            after = step + 1
            due = after % self.options.checkpoint_every == 0 or after == self.stage.steps
            if due or after % self.options.log_every == 0:
                lines = self._lines(waiting)
                waiting.clear()
                if metrics:
                    metrics.log(lines)
            saves.poll()
            if due:
                noted = {"skipped_in_a_row": self.skipped_in_a_row}
                saves.save(after, self.module, self.optimizer, self.average, noted)

    def _step(self, step: int) -> Tensor:
        """Trains on the step's samples; gives this worker's share of the loss, and the norm."""
        waited = self.loader.waited_s
        micros = self._micros = self.loader.get(step)
        self.meter.step(self.stage.batch, self.loader.waited_s - waited)
        for group, optim in zip(self.optimizer.param_groups, self.stage.optim, strict=True):
            group["lr"] = rate(optim, step, self.stage.steps)
        loss = torch.zeros((), device=self.world.device)
        for number, micro in enumerate(micros, 1):
            loss += self._backward(step, micro, last=number == len(micros))
        norm = clip_grad_norm_(self.trained, self.stage.clip_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if torch.isfinite(norm):  # the same on all workers
            self.optimizer.step()
            if self.stage.ema_decay is not None:
                average(self.average, self.module, self.stage.ema_decay)
            self.skipped_in_a_row = 0
        else:
            self._skip(step)
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss, norm])

    def _backward(self, step: int, micro: Micro, *, last: bool) -> Tensor:
        """Adds the gradient of a micro-batch; gives its part of the step's loss."""
        device, bf16 = self.world.device, self.stage.precision == "bf16"
        samples = micro.samples
        failed = self._encode(micro)
        batch = self.learner.batch(samples, Noise(self.stage.seed, step, micro.slots))
        weight_B = torch.tensor([float(f is None) for f in failed], device=device)
        self.counts["unreadable"] += sum(f is not None for f in failed)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        with autocast:
            self.meter.count((samples[0].bucket, len(samples)), self.module, batch)
        with self.world.synchronised(self.shared, last):
            with autocast:
                losses_B = self.shared(**batch)
            loss = (losses_B * weight_B).sum() / self.stage.batch
            (loss * self.world.size).backward()  # which is averaged over workers
        return loss.detach()

    def _encode(self, micro: Micro) -> list[str | None]:
        """Computes the features that the cache had not; tells why a sample has none.

        Such a one (a text too long, say) costs itself alone: it gets another's, and no weight.
        """
        samples, bucket = micro.samples, micro.samples[0].bucket
        failed = list(micro.failed)
        try:
            complete_features(samples, self.encoders, self.loader.kinds, self._function)
        except ValueError:
            for index, sample in enumerate(samples):
                try:
                    complete_features([sample], self.encoders, self.loader.kinds, self._function)
                except ValueError as error:
                    failed[index] = " ".join(str(error).split())
                    _log.warning("not trained on %s: %s", sample.row["sample_id"], failed[index])
        if bucket not in self._spare:
            self._spare[bucket] = self._stand_in()
        for sample in samples:
            if any(kind not in sample.features for kind in self.loader.kinds):
                sample.features = self._spare[bucket]
        return failed

    def _stand_in(self) -> dict[str, Tensor]:
        """Features of the first sample of this step that has them."""
        for sample in (s for micro in self._micros for s in micro.samples):
            try:
                complete_features([sample], self.encoders, self.loader.kinds, self._function)
            except ValueError as error:
                why = " ".join(str(error).split())
                continue
            return sample.features
        raise ValueError(f"no sample of this step can be encoded, the last one: {why}")

    def _function(self, encoder: Encoder) -> Callable[[Sequence[Sample]], list[Tensor]]:
        """An encoder, loaded when it is first needed."""
        if encoder.kind not in self._running:
            self._running[encoder.kind] = encoder.on(self.world.device)
        return self._running[encoder.kind]

    def _skip(self, step: int) -> None:
        self.counts["skipped"] += self.world.leads
        self.skipped_in_a_row += 1
        _log.warning("step %d was skipped: its gradient is not finite", step)
        if self.skipped_in_a_row >= self.options.patience:
            raise Stopped(
                f"the gradient was not finite for {self.skipped_in_a_row} steps in a row, the last"
                f" being {step}: lower the learning rate, or look at the samples of these steps"
            )

    def _lines(self, waiting: Sequence[tuple[int, Tensor]]) -> list[dict[str, Any]]:
        """What is written of some steps; the device is waited for here, and no earlier."""
        both_N2 = torch.stack([found for _, found in waiting])
        losses = self.world.total(both_N2[:, 0]).tolist()
        lines = []
        for (step, _), loss, norm in zip(waiting, losses, both_N2[:, 1].tolist(), strict=True):
            line = {"step": step, "loss": _finite(loss), "grad_norm": _finite(norm)}
            for optim in self.stage.optim:
                line[f"lr_{optim.group}"] = rate(optim, step, self.stage.steps)
            lines.append(line)
        lines[-1] |= self._counted() | self.meter.read()
        return lines

    def _counted(self) -> dict[str, int]:
        """What all workers counted since the last time."""
        names = sorted(self.counts)
        mine = torch.tensor([self.counts[n] for n in names], device=self.world.device)
        found = self.world.total(mine).tolist()
        self.counts.update({n: -self.counts[n] for n in names})
        return {f"num_{name}": int(value) for name, value in zip(names, found, strict=True)}

    def _end(self) -> None:
        tensors = trained(self.module, self.average)
        if self.world.leads:
            save_final(self.job.folder, self.stage.steps, tensors)
        self.world.wait()


def _finite(value: float) -> float | None:
    """JSON knows no other numbers."""
    return value if math.isfinite(value) else None
