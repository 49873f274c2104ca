"""Stores what frozen encoders give for a manifest's samples, by Ray Data, resumably.

One encoder at a time, so that an actor holds little more than its model. The driver writes what is
to do into a file beside the tables; actors get numbers of units, read their rows there, write
fragments of `features` that nobody sees yet, and give back what names them: neither frames nor
tensors pass through Ray. The driver commits fragments as they come, under the dataset's lease.
What a killed run had not committed is missing, and computed by the next.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lance.fragment import FragmentMetadata

from engine import observe, storage
from engine.cutter import place
from engine.forget import check_whole
from engine.gauge import Unloadable
from engine.lease import EXPIRY_S, Lease
from engine.tables import Writer
from trainers.dataset import Manifest
from trainers.features import (
    Cache,
    Namer,
    fingerprints,
    from_bytes,
    keys_of,
    names_of,
    open_caches,
    place_of,
    scan,
    to_bytes,
    to_compute,
)
from trainers.filler import Filler, FillJob, FillOutcome, Unit
from trainers.system import Data, Encoder

__all__ = [
    "Cache",
    "Counts",
    "Progress",
    "fill",
    "from_bytes",
    "open_caches",
    "place_of",
    "to_bytes",
]

SCRATCH = "filling"
"""Folder below a dataset's root, for what a run has still to do."""
UNITS = 10_000
"""Given to Ray Data at most: its bookkeeping is per unit."""
_BATCHES_PER_UNIT = 16
_UNITS_PER_ACTOR = 8
"""At least, so that actors end at about the same time."""
_DEATHS_ALLOWED = 3
_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Progress:
    """Where a run is; handed to its watcher whenever it changes."""

    total: int = 0
    done: int = 0
    failed: int = 0
    doing: str = "looking for what is cached"
    unit: str = "samples"
    started: float = field(default_factory=time.monotonic)


@dataclass(kw_only=True)
class Counts:
    """What a run did for one kind of feature."""

    cached: int = 0
    """That were there before."""
    computed: int = 0
    failed: int = 0
    """That cannot be computed; their rows say why."""
    seconds: float = 0.0
    """Of all actors together, without loading models."""


def fill(
    root: str,
    manifest: Manifest,
    data: Data,
    encoders: Sequence[Encoder],
    *,
    kinds: Collection[str] | None = None,
    connect: Callable[[], AbstractContextManager[Any]],
    watch: Callable[[Progress], None] = lambda _: None,
    workers: int | None = None,
    num_gpus: float | None = None,
    retry_failed: bool = False,
    commit_every_s: float = 10.0,
    lease_expiry_s: float = EXPIRY_S,
) -> dict[str, Counts]:
    """Computes and stores the features that are not cached; the same call again goes on.

    Args:
        root: The dataset.
        manifest: Whose samples.
        data: How their frames are taken.
        encoders: Each after those it needs.
        kinds: Which are stored; by default all. The others are computed where one needs them.
        connect: Connects to Ray; entered only where something is to do.
        watch: Called with the run's progress.
        workers: Actors; None is one for each share of a GPU, or one a core.
        num_gpus: Share of a GPU that an actor takes; None is what the encoder asks for.
        retry_failed: Try final failures again; those that may pass are tried in any case.
        commit_every_s: What a death may cost.
        lease_expiry_s: Silence after which another machine may take the dataset over.

    Returns:
        By kind what was done.

    Raises:
        DatasetError: The dataset is in use.
        LeaseLost: Another driver has taken over.
        OSError: The dataset cannot be written.
        Unloadable: A model cannot be loaded.
        ConnectionError: Workers are lost again and again.
    """
    unknown = set(kinds or ()) - {e.kind for e in encoders}
    if unknown:
        there = ", ".join(e.kind for e in encoders)
        raise ValueError(f"there are no features {', '.join(sorted(unknown))}: choose of {there}")
    run_id = str(uuid.uuid4())
    wanted = [e for e in encoders if kinds is None or e.kind in kinds]
    scratch = storage.join(root, SCRATCH)
    with (
        observe.of_run(run_id),
        Lease(root, run_id, lease_expiry_s),
        contextlib.ExitStack() as stack,
    ):
        check_whole(root)
        filling = _Filling(
            writer=Writer(root, run_id, recovered=_log.warning),
            manifest=manifest,
            data=data,
            encoders=tuple(encoders),
            watch=watch,
            num_gpus=num_gpus,
            workers=workers,
            commit_every_s=commit_every_s,
        )
        watch(filling.progress)
        lacking = {e.kind: filling.lacking(e, retry_failed=retry_failed) for e in wanted}
        if any(len(index_N2) for index_N2 in lacking.values()):
            stack.enter_context(connect())
            storage.delete_folder(scratch)  # of a run that was killed
            stack.callback(storage.delete_folder, scratch)
            filling.run(lacking, scratch)
    return filling.counts


@dataclass(kw_only=True)
class _Filling:
    """One run of `fill`, whose arguments these are."""

    writer: Writer
    manifest: Manifest
    data: Data
    encoders: tuple[Encoder, ...]
    watch: Callable[[Progress], None]
    workers: int | None
    num_gpus: float | None
    commit_every_s: float
    counts: dict[str, Counts] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)

    def lacking(self, encoder: Encoder, *, retry_failed: bool) -> np.ndarray:
        """Row and variant, int64 (N, 2), of the samples to encode, those of a bucket together.

        Failures that are tried again are taken away first: then they are merely missing.
        """
        fingerprint = fingerprints(self.encoders)[encoder.kind]
        found = scan(self.writer.root, [fingerprint])[1][fingerprint]
        failed = found.failed
        again = pc.or_(pc.fill_null(failed["error_transient"], False), retry_failed)
        self.writer.remove("features", "feature_id", _ids(failed.filter(again)))
        final = _keys_of_ids(_ids(failed.filter(pc.invert(again))))
        namer = Namer(encoder, fingerprint, self.data)
        keys = keys_of(names_of(self.manifest, namer))
        is_lacking = np.zeros(len(keys), bool)
        is_lacking[np.unique(keys, return_index=True)[1]] = True  # several pairs share a clip
        is_cached = np.isin(keys, found.keys)
        self.counts[encoder.kind] = Counts(cached=int((is_lacking & is_cached).sum()))
        is_lacking &= ~is_cached & ~np.isin(keys, final)
        index_N2 = _places(self.manifest, self.data)[is_lacking]
        order = np.argsort(self.manifest.bucket[index_N2[:, 0]], kind="stable")
        return index_N2[order]

    def run(self, lacking: Mapping[str, np.ndarray], folder: str) -> None:
        """Encodes these samples, by kind."""
        actors, options = self._actors([k for k, index_N2 in lacking.items() if len(index_N2)])
        batch_sizes = {e.kind: e.batch_size for e in self.encoders}
        units: list[Unit] = []
        for kind, index_N2 in lacking.items():
            bucket = self.manifest.bucket[index_N2[:, 0]]
            bounds = _units(bucket, batch_sizes[kind], actors)
            self._write(storage.join(folder, f"{kind}.arrow"), index_N2, bounds)
            units += [Unit(kind, number) for number in range(len(bounds))]
            self.progress.total += len(index_N2)
        job = FillJob(
            root=self.writer.root,
            run_id=self.writer.run_id,
            data=self.data,
            encoders=self.encoders,
            todo=folder,
            gpu=bool(options["num_gpus"]),
            environment=tuple(storage.worker_environment().items()),
        )
        losses = 0
        while units:
            left = self._commit_all(units, job, min(actors, len(units)), options)
            losses = losses + 1 if len(left) == len(units) else 0
            if losses >= _DEATHS_ALLOWED:
                raise ConnectionError(
                    "workers that encode are lost again and again: see Ray's logs; what was done"
                    " is stored, run the same command again"
                )
            units = left

    def _write(self, uri: str, index_N2: np.ndarray, bounds: Sequence[tuple[int, int]]) -> None:
        """Writes a file with a batch for each unit, so that any can be read alone."""
        storage.make_folder(storage.parent(uri))
        beside = None if storage.is_remote(uri) else storage.local_path(storage.parent(uri))
        with tempfile.TemporaryDirectory(dir=beside) as scratch:
            path = os.path.join(scratch, "todo.arrow")
            schema = self._rows(index_N2[:0]).schema
            with pa.ipc.new_file(path, schema) as file:
                for start, length in bounds:
                    (batch,) = self._rows(index_N2[start : start + length]).to_batches()
                    file.write_batch(batch)
            place(path, uri)

    def _rows(self, index_N2: np.ndarray) -> pa.Table:
        rows = self.manifest.rows.take(pa.array(index_N2[:, 0]))
        bucket = self.manifest.bucket[index_N2[:, 0]]
        rows = rows.append_column("bucket", pa.array(bucket, pa.int32()))
        rows = rows.append_column("variant", pa.array(index_N2[:, 1], pa.int32()))
        return rows.combine_chunks()

    def _actors(self, kinds: Sequence[str]) -> tuple[int, dict[str, float]]:
        """How many actors at most, and what each asks of Ray."""
        import ray

        cluster = ray.cluster_resources()
        needed = to_compute((), self.encoders, kinds)
        gpus, share = cluster.get("GPU", 0.0), self.num_gpus
        if share is None:
            share = max(e.num_gpus for e in needed)
        if not (gpus and share):
            gpus, share = 0.0, 0.0
        most = int(gpus / share) if share else int(cluster.get("CPU", 1))
        limits = [most, self.workers, *(e.copies for e in needed)]
        return max(1, min(n for n in limits if n is not None)), {"share": 1.0, "num_gpus": share}

    def _commit_all(
        self, units: Sequence[Unit], job: FillJob, actors: int, options: dict[str, float]
    ) -> list[Unit]:
        """Runs units until they are through or workers are lost, committing; gives those left."""
        from engine.pipeline import outcomes  # training reads a cache without Ray

        left = dict.fromkeys(units)
        waiting: list[FragmentMetadata] = []
        committed_at = time.monotonic()
        try:
            for outcome in outcomes(
                units,
                job,
                actor=Filler,
                workers=actors,
                wait_s=min(1.0, self.commit_every_s),
                **options,
            ):
                if outcome is not None and outcome.unit in left:
                    _raise(outcome)
                    del left[outcome.unit]
                    waiting += [FragmentMetadata.from_json(text) for text in outcome.fragments]
                    self._account(outcome)
                    observe.worked(
                        table="features",
                        stage="encode",
                        operator=outcome.unit.kind,
                        states={
                            "done": outcome.num_done - outcome.num_failed,
                            "failed": outcome.num_failed,
                        },
                        seconds=outcome.seconds,
                    )
                observe.progress("encoding", self.progress.done, self.progress.total)
                self.watch(self.progress)
                if waiting and time.monotonic() - committed_at > self.commit_every_s:
                    fragments, waiting = waiting, []
                    self.writer.append("features", fragments)
                    committed_at = time.monotonic()
        finally:
            self.writer.append("features", waiting)
        return list(left)

    def _account(self, outcome: FillOutcome) -> None:
        counts = self.counts[outcome.unit.kind]
        counts.computed += outcome.num_done - outcome.num_failed
        counts.failed += outcome.num_failed
        counts.seconds += outcome.seconds
        self.progress.doing = f"encoding {outcome.unit.kind}"
        self.progress.done += outcome.num_done
        self.progress.failed += outcome.num_failed


def _ids(rows: pa.Table) -> list[str]:
    return rows["feature_id"].to_pylist()


def _keys_of_ids(ids: Sequence[str]) -> np.ndarray:
    return np.array([uuid.UUID(i).int >> 64 for i in ids], np.uint64)


def _places(manifest: Manifest, data: Data) -> np.ndarray:
    """Row and variant, int64 (N, 2), of what `samples_of` gives."""
    is_picture = np.array([b.frames == 1 for b in data.buckets])[manifest.bucket]
    is_video = pc.not_equal(manifest.rows["media"].cast(pa.large_string()), "image").to_numpy()
    num = np.where(is_picture & is_video, data.variants, 1)
    rows = np.repeat(np.arange(len(num)), num)
    return np.stack([rows, np.arange(len(rows)) - (np.cumsum(num) - num)[rows]], axis=1)


def _units(bucket: np.ndarray, batch_size: int, actors: int) -> list[tuple[int, int]]:
    """First row and number of rows of each unit; a unit is of one bucket."""
    num = len(bucket)
    if not num:
        return []
    most = min(batch_size * _BATCHES_PER_UNIT, -(-num // (actors * _UNITS_PER_ACTOR)))
    size = max(most, batch_size, -(-num // UNITS))
    edges = (np.flatnonzero(np.diff(bucket)) + 1).tolist()
    return [
        (start, min(size, after - start))
        for first, after in zip([0, *edges], [*edges, num], strict=True)
        for start in range(first, after, size)
    ]


def _raise(outcome: FillOutcome) -> None:
    if outcome.unloadable:
        raise Unloadable(outcome.unloadable)
    if outcome.unwritable:
        raise OSError(outcome.unwritable)
