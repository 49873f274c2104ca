"""Encodes samples in a worker: decodes them, runs a frozen encoder, writes rows of `features`.

A `Filler` is an actor of a Ray Data pipeline, as `engine.worker.Reader` is: numbers and names pass
through Ray, never a frame or a tensor.
"""

from __future__ import annotations

import gc
import json
import pickle
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from lance.fragment import FragmentMetadata

from engine import logs, storage
from engine.gauge import Unloadable
from engine.operator import Failed
from engine.schema import FEATURES
from engine.tables import write_rows
from trainers.features import (
    Cache,
    Namer,
    complete,
    feature_id,
    fingerprints,
    needs_pixels,
    open_caches,
    place_of,
    subject_of,
    to_bytes,
    to_compute,
)
from trainers.frames import pixels_of
from trainers.system import Data, Encoder, Sample

if TYPE_CHECKING:
    import torch

FRAGMENT_BYTES = 256 * 2**20
"""Of tensors that an actor holds before it writes them."""
DECODERS = 4
"""Threads of an actor that decode."""
_TRANSIENT = (OSError, TimeoutError)


@dataclass(frozen=True, kw_only=True)
class FillJob:
    """What all units of a run share."""

    root: str
    run_id: str
    data: Data
    encoders: tuple[Encoder, ...]
    """Each after those it needs."""
    todo: str
    """The folder with the rows of the units, a file for each kind."""
    gpu: bool
    environment: tuple[tuple[str, str], ...]


class Unit(NamedTuple):
    """Samples of one bucket to be encoded: a batch of its kind's file."""

    kind: str
    number: int


@dataclass(frozen=True, kw_only=True)
class FillOutcome:
    """What came of a unit."""

    unit: Unit
    num_done: int = 0
    num_failed: int = 0
    seconds: float = 0.0
    fragments: tuple[str, ...] = ()
    """As JSON: written and to be committed."""
    unwritable: str | None = None
    """Why nothing could be written: the run cannot go on."""
    unloadable: str | None = None
    """Why there is no encoder: nor can it."""


class Filler:
    """The actor: units in, outcomes out, one bad sample costing its own feature."""

    def __init__(self, job: FillJob):
        storage.take_environment(job.environment)
        logs.set_up_worker(job.run_id)
        self.job = job
        self.threads = ThreadPoolExecutor(DECODERS)
        self._running: dict[str, Callable[[Sequence[Sample]], list[torch.Tensor]]] = {}
        self._kind: _Kind | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A column `unit` in, a column `outcome` out, both pickled by this very program."""
        asked = [pickle.loads(unit) for unit in batch["unit"].to_pylist()]
        return pa.table({"outcome": [pickle.dumps(self.do(unit)) for unit in asked]})

    def do(self, unit: Unit) -> FillOutcome:
        """The outcome of one unit; never raises for what is in a file."""
        try:
            if self._kind is None or self._kind.encoder.kind != unit.kind:
                self._kind = _Kind(self, unit.kind)
                self._unload({e.kind for e in self._kind.encoders})
            return self._kind.do(unit)
        except Unloadable as error:
            return FillOutcome(unit=unit, unloadable=str(error))
        except OSError as error:
            return FillOutcome(unit=unit, unwritable=f"{self.job.root}: {error}")

    def function(self, encoder: Encoder) -> Callable[[Sequence[Sample]], list[torch.Tensor]]:
        """What an encoder's `on` gives, loaded once while it is needed."""
        import torch

        if encoder.kind not in self._running:
            device = torch.device("cuda" if self.job.gpu else "cpu")
            try:
                self._running[encoder.kind] = encoder.on(device)
            except Exception as error:
                words = " ".join(str(error).split())
                raise Unloadable(f"{type(encoder).__name__} cannot be loaded: {words}") from error
        return self._running[encoder.kind]

    def _unload(self, kinds: Collection[str]) -> None:
        """Lets go of the models that are not needed any more."""
        gone = [self._running.pop(kind) for kind in list(self._running) if kind not in kinds]
        if gone and self.job.gpu:
            import torch

            del gone
            gc.collect()
            torch.cuda.empty_cache()


class _Kind:
    """The features of one kind, as an actor makes them."""

    def __init__(self, filler: Filler, kind: str):
        self.filler, self.job = filler, filler.job
        self.encoders = to_compute((), self.job.encoders, [kind])
        self.encoder = self.encoders[-1]
        self._namer = Namer(self.encoder, fingerprints(self.encoders)[kind], self.job.data)
        self._file = storage.open_read(storage.join(self.job.todo, f"{kind}.arrow"))
        self._todo = pa.ipc.open_file(self._file)

    @cached_property
    def _caches(self) -> list[Cache]:
        """Of the encoders before it: read, where a run stored what they gave."""
        before = self.encoders[:-1]
        return [*open_caches(self.job.root, before, None, self.job.data).values()]

    def do(self, unit: Unit) -> FillOutcome:
        """Encodes a unit's samples and writes their features."""
        self.filler.function(self.encoder)  # what cannot be loaded is no sample's fault
        rows = self._todo.get_batch(unit.number).to_pylist()
        samples = [
            Sample(row, self.job.data.buckets[row.pop("bucket")], row.pop("variant"))
            for row in rows
        ]
        return self._written(unit, samples, self._encoded(samples))

    def _encoded(self, samples: Sequence[Sample]) -> Iterator[list[torch.Tensor | Failed]]:
        """Batch by batch what the encoder gives, the next batch being decoded meanwhile."""
        size = self.encoder.batch_size
        batches = [samples[start : start + size] for start in range(0, len(samples), size)]
        coming = [self._prepared(batch) for batch in batches[:1]]
        for number, batch in enumerate(batches):
            if number + 1 < len(batches):
                coming.append(self._prepared(batches[number + 1]))
            yield self._batch(batch, coming.pop(0))

    def _prepared(self, samples: Sequence[Sample]) -> list[Future[np.ndarray] | None]:
        """Starts to decode the samples that need it, and reads what is cached of the others."""
        for cache in self._caches:
            for sample, tensor in zip(samples, cache.get(samples), strict=True):
                if tensor is not None:
                    sample.features[cache.namer.encoder.kind] = tensor
        data = self.job.data
        return [
            self.filler.threads.submit(
                pixels_of, s.row, s.bucket, data.fps, s.variant, data.variants
            )
            if needs_pixels(s, self.encoders, [self.encoder.kind])
            else None
            for s in samples
        ]

    def _batch(
        self, samples: Sequence[Sample], decoded: Sequence[Future[np.ndarray] | None]
    ) -> list[torch.Tensor | Failed]:
        import torch

        found: dict[int, torch.Tensor | Failed] = {}
        for index, (sample, future) in enumerate(zip(samples, decoded, strict=True)):
            try:
                if future is not None:
                    sample.features["pixels"] = torch.from_numpy(future.result())
            except Exception as error:  # noqa: BLE001 - whatever a file does costs one feature
                found[index] = _failure(error)
        there = [i for i in range(len(samples)) if i not in found]
        given = self._attempt([samples[i] for i in there])
        found |= dict(zip(there, given, strict=True))
        for sample in samples:
            sample.features.clear()
        return [found[i] for i in range(len(samples))]

    def _attempt(self, samples: Sequence[Sample]) -> list[torch.Tensor | Failed]:
        """A tensor for each sample; where something raises, halves are tried by themselves."""
        kind = self.encoder.kind
        try:
            complete(samples, self.encoders, [kind], self.filler.function)
        except Unloadable:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a model raises costs one feature
            if len(samples) == 1:
                return [_failure(error)]
            half = len(samples) // 2
            return self._attempt(samples[:half]) + self._attempt(samples[half:])
        return [sample.features.pop(kind).cpu() for sample in samples]

    def _written(
        self,
        unit: Unit,
        samples: Sequence[Sample],
        batches: Iterator[list[torch.Tensor | Failed]],
    ) -> FillOutcome:
        fragments: list[FragmentMetadata] = []
        rows: list[dict[str, Any]] = []
        num_done = num_failed = held = 0
        started = time.perf_counter()
        for batch in batches:
            for found in batch:
                row = self._row(samples[num_done], found)
                rows.append(row)
                num_done += 1
                num_failed += row["data"] is None
                held += len(row["data"] or b"")
            if held >= FRAGMENT_BYTES:
                fragments += self._fragments(rows)
                rows, held = [], 0
        fragments += self._fragments(rows)
        return FillOutcome(
            unit=unit,
            num_done=num_done,
            num_failed=num_failed,
            seconds=time.perf_counter() - started,
            fragments=tuple(json.dumps(f.to_json()) for f in fragments),
        )

    def _fragments(self, rows: list[dict[str, Any]]) -> list[FragmentMetadata]:
        if not rows:
            return []
        table = pa.table([pa.array([r[f.name] for r in rows], f.type) for f in FEATURES],
                         schema=FEATURES)  # fmt: skip
        return write_rows(self.job.root, "features", table)

    def _row(self, sample: Sample, found: torch.Tensor | Failed) -> dict[str, Any]:
        row: dict[str, Any] = dict.fromkeys(FEATURES.names)
        row |= {
            "feature_id": feature_id(self._namer.name(sample)),
            "subject_id": subject_of(self.encoder, sample.row),
            "clip_id": sample.row["clip_id"],
            "kind": self.encoder.kind,
            "place": place_of(self.encoder, sample, self.job.data),
            "fingerprint": self._namer.fingerprint,
            "run_id": self.job.run_id,
        }
        if isinstance(found, Failed):
            return row | {
                "error_type": found.error_type,
                "error": found.message,
                "error_transient": found.transient,
            }
        dtype, shape, data = to_bytes(found)
        return row | {"dtype": dtype, "shape": shape, "data": data}


def _failure(error: Exception) -> Failed:
    if isinstance(error, Failed):
        return error
    words = " ".join(str(error).split())[:500] or type(error).__name__
    return Failed(type(error).__name__, words, transient=isinstance(error, _TRANSIENT))
