"""The samples of each step for one worker, read ahead by threads.

What a step gives is a function of the step alone, whoever asks and in whatever order.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from engine import logs
from trainers.dataset import Manifest
from trainers.features import Cache, needs_pixels, variant_of
from trainers.frames import pixels_of
from trainers.plan import Plan
from trainers.system import Bucket, Data, Encoder, Sample

_log = logging.getLogger(__name__)
_MOST_UNREADABLE_STEPS = 8
"""In a row, of which one worker of several could read no sample at all."""


@dataclass(frozen=True)
class Micro:
    """Samples of one bucket that go through the model together."""

    slots: tuple[int, ...]
    """Their places in the step's batch."""
    samples: tuple[Sample, ...]
    """With the features that are cached, and `pixels` where another encoder needs them."""
    failed: tuple[str | None, ...]
    """Why a sample could not be read, in one line. It is black then, and must have no weight."""


class Loader:
    """Reads samples ahead of training.

    Args:
        manifest: Of the dataset.
        data: How frames are taken.
        plan: Which rows are a step's.
        encoders: Whose features are wanted, each after those it needs.
        caches: By kind, of those that may be cached.
        rank: Of this worker: it has the slots from rank * batch / world on.
        world: Workers that share a step.
        micro_batch: Samples that go through the model together, by bucket or for all.
        ahead: Steps that are read before they are asked for.
        threads: That decode.

    Raises:
        ValueError: The workers cannot share a batch evenly.
    """

    def __init__(
        self,
        manifest: Manifest,
        data: Data,
        plan: Plan,
        encoders: Sequence[Encoder],
        caches: Mapping[str, Cache],
        *,
        rank: int = 0,
        world: int = 1,
        micro_batch: Callable[[Bucket], int] | int,
        ahead: int = 2,
        threads: int = 4,
    ):
        if plan.batch_size % world:
            raise ValueError(
                f"a batch of {plan.batch_size} cannot be shared by {world} workers evenly: choose"
                " a batch that is a multiple of the workers"
            )
        self.manifest, self.data, self.plan = manifest, data, plan
        self.encoders, self.caches = tuple(encoders), dict(caches)
        self.kinds = tuple(e.kind for e in encoders)
        share = plan.batch_size // world
        self.slots = range(rank * share, (rank + 1) * share)
        self.world, self.ahead = world, ahead
        self._micro_batch = micro_batch if callable(micro_batch) else lambda _: micro_batch
        self.waited_s = 0.0
        """How long `get` has waited, in all."""
        self.num_failed = 0
        """Samples that could not be read, in all."""
        self._said: set[str] = set()
        self._unreadable_steps = 0
        self._coming: dict[int, Future[list[Micro]]] = {}
        self._closed = threading.Event()
        self._steps = ThreadPoolExecutor(ahead + 1, thread_name_prefix="steps")
        self._decoders = ThreadPoolExecutor(max(1, threads), thread_name_prefix="decoders")

    def start(self, step: int) -> None:
        """Begins to read a step and those after it."""
        wanted = range(step, step + self.ahead + 1)
        for other in [s for s in self._coming if s not in wanted]:
            self._coming.pop(other).cancel()
        for each in wanted:
            if each not in self._coming:
                self._coming[each] = self._steps.submit(self._read, each)

    def get(self, step: int) -> list[Micro]:
        """This worker's part of a step, in order of the slots.

        Raises:
            ValueError: Not one of its samples can be read.
        """
        self.start(step)
        began = time.monotonic()
        micros = self._coming.pop(step).result()
        self.waited_s += time.monotonic() - began
        self.start(step + 1)
        self._account(step, micros)
        return micros

    def close(self) -> None:
        """Ends the threads."""
        self._closed.set()
        for future in self._coming.values():
            future.cancel()
        self._coming.clear()
        for pool in (self._decoders, self._steps):
            pool.shutdown(wait=False, cancel_futures=True)

    def _account(self, step: int, micros: Sequence[Micro]) -> None:
        """Counts what could not be read, and says of each sample once why."""
        failed = [
            (s.row, why) for m in micros for s, why in zip(m.samples, m.failed, strict=True) if why
        ]
        self.num_failed += len(failed)
        for row, why in failed:
            if row["sample_id"] not in self._said:
                self._said.add(row["sample_id"])
                told = logs.fields(
                    "sample_failed",
                    stage="train",
                    row_id=row["sample_id"],
                    uri=row["source_uri"],
                    error=why,
                )
                said = "not trained on %s: %s: %s"
                _log.warning(said, row["sample_id"], row["source_uri"], why, extra=told)
        if len(failed) < len(self.slots):
            self._unreadable_steps = 0
            return
        self._unreadable_steps += 1
        if self.world == 1 or self._unreadable_steps >= _MOST_UNREADABLE_STEPS:
            row, why = failed[0]
            raise ValueError(
                f"no sample of step {step} can be read, the first being {row['source_uri']}: {why};"
                " see whether the sources are there"
            )

    def _read(self, step: int) -> list[Micro]:
        batch = self.plan.batch(step)
        bucket = self.data.buckets[batch.bucket]
        mine = slice(self.slots.start, self.slots.stop)
        samples = [
            Sample(row, bucket, variant_of(row, bucket, variant))
            for row, variant in zip(
                self.manifest.take(batch.rows[mine]), batch.variants[mine].tolist(), strict=True
            )
        ]
        for kind in self.kinds:
            if kind in self.caches and len(self.caches[kind]):
                found = self.caches[kind].get(samples)
                for sample, tensor in zip(samples, found, strict=True):
                    if tensor is not None:
                        sample.features[kind] = tensor
        failed = self._decode(samples)
        size = max(1, self._micro_batch(bucket))
        return [
            Micro(
                tuple(self.slots[start : start + size]),
                tuple(samples[start : start + size]),
                tuple(failed[start : start + size]),
            )
            for start in range(0, len(samples), size)
        ]

    def _decode(self, samples: Sequence[Sample]) -> list[str | None]:
        """Gives samples the pixels they need; tells why one has none."""
        import torch

        coming = {
            index: self._decoders.submit(self._pixels, sample)
            for index, sample in enumerate(samples)
            if needs_pixels(sample, self.encoders, self.kinds)
        }
        failed: list[str | None] = [None] * len(samples)
        for index, future in coming.items():
            sample = samples[index]
            try:
                pixels_FHW3 = future.result()
            except (OSError, ValueError) as error:  # VideoError is one of these
                failed[index] = " ".join(str(error).split()) or type(error).__name__
                b = sample.bucket
                pixels_FHW3 = np.zeros((b.frames, b.height_px, b.width_px, 3), np.uint8)
            sample.features["pixels"] = torch.from_numpy(pixels_FHW3)
        return failed

    def _pixels(self, sample: Sample) -> np.ndarray:
        if self._closed.is_set():
            raise OSError("the loader was closed")
        return pixels_of(
            sample.row, sample.bucket, self.data.fps, sample.variant, self.data.variants
        )
