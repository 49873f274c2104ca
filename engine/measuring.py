"""A run's measurements: waiting rows in full batches, to Ray actors and back into the tables.

Operators differ by orders of magnitude in what they cost, and most rows are rejected before the
dear ones. So the driver holds a window of rows by their references and small columns, a queue for
each operator, and sends a batch only when it is full, or when nothing can fill it any more. Actors
live as long as the run: weights are loaded once. Which actor measures what:

- operators that ask for a GPU, each its own actors, where the cluster has GPUs; an idle one makes
  room for another operator's when there are too few for all;
- the same on a cluster without GPUs: one actor, which runs them on all cores in turn;
- the others: a pool of actors that run whatever comes, up to one for two cores while sources are
  still being scanned, afterwards one a core.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from engine import observe
from engine.gauge import ADDRESSES, Gauge, Measured, Unloadable
from engine.judge import columns_read, judge, waiting_for
from engine.operator import FAILURE, Operator, Stage
from engine.schema import TABLES
from engine.tables import KEPT_VERSIONS, KEYS, Writer

WINDOW = 8_192
"""Rows in hand at most, without those that only wait for their commit."""
IN_FLIGHT = 2
"""Batches that an actor has at a time: one is measured while the next one's pictures are read."""
REFILL_SHARE = 0.05
"""Of the driver's time at most, that looking for further rows may take."""
DEATHS_ALLOWED = 2
SCAN_SHARE = 0.75
"""Of the cluster's cores, what scanning asks for where operators measure beside it; the rest is for
actors with a GPU and for those without, half each. It only says what Ray starts, not what runs."""

_log = logging.getLogger(__name__)
_LOST = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError)


@dataclass(kw_only=True)
class Tally:
    """What an operator did in a run."""

    rows: int = 0
    failed: int = 0
    batches: int = 0
    room: int = 0
    """Rows that its batches had room for."""
    seconds: float = 0.0
    """Inside its function, over all actors."""

    @property
    def fill(self) -> float:
        """Share of the room in its batches that was used."""
        return self.rows / self.room if self.room else 0.0


@dataclass(kw_only=True)
class _Pool:
    """Actors of one kind."""

    options: dict[str, Any]
    most: int
    threads: int = 1
    actors: list[Any] = field(default_factory=list)
    flying: dict[Any, int] = field(default_factory=dict)

    @property
    def gpus(self) -> float:
        return self.options.get("num_gpus", 0)

    def idle(self) -> list[Any]:
        return [a for a in self.actors if not self.flying[a]]


@dataclass(frozen=True, kw_only=True)
class _Flight:
    index: int
    ids: tuple[str, ...]
    pool: _Pool
    actor: Any


class Measuring:
    """The measurements of one table in one run.

    Args:
        writer: Of the dataset.
        stages: Whose operators measure.
        name: Table, `clips` or `pairs`.
        where: SQL predicate of the rows that are concerned; none: all.
        states: Of the rows that are measured; `rejected` ones are measured only where it is named.
        commit_every_s: What a death may cost.
        connect: Connects to Ray; called when there is something to measure.
        environment: Variables for workers on other machines.
    """

    def __init__(
        self,
        writer: Writer,
        stages: Sequence[Stage],
        *,
        name: str = "clips",
        where: str | None = None,
        states: tuple[str, ...] = ("pending",),
        commit_every_s: float = 10.0,
        connect: Callable[[], object],
        environment: Sequence[tuple[str, str]],
    ):
        self._writer, self._stages, self._name, self._where = writer, tuple(stages), name, where
        self._key, self._states = KEYS[name], states
        self._stage_of = {type(o).__name__: s.name for s in stages for o in s.measures}
        self._every_s, self._connect, self._environment = commit_every_s, connect, environment
        self.operators: tuple[Operator, ...] = tuple(o for s in stages for o in s.measures)
        self.tallies = {type(o).__name__: Tally() for o in self.operators}
        self.excluded: set[str] = set()
        """source_ids that are about to be scanned anew: their rows are not worth measuring."""
        self.feeding = False
        """Whether further rows may still come into the table."""
        self.done = 0
        """Rows that are through."""
        self._rows: dict[str, dict[str, Any]] = {}
        self._queues = [deque[str]() for _ in self.operators]
        self._alone = [deque[tuple[str, ...]]() for _ in self.operators]
        self._died: dict[str, int] = {}
        self._flights: dict[Any, _Flight] = {}
        self._results: list[pa.Table] = []
        self._through: set[str] = set()
        self._pools: dict[str, _Pool] = {}
        self._more = bool(self.operators)
        self._refill_at = 0.0
        self._committed_at = time.monotonic()
        self._keyframes_version = 0

    def rows_came(self) -> None:
        """Says that the table has new rows."""
        self._more = bool(self.operators)

    @property
    def waiting(self) -> int:
        """Rows in hand that are not through."""
        return len(self._rows) - len(self._through)

    def pump(self, wait_s: float = 0.0) -> None:
        """Takes what has come back, sends what is ready, commits when it is time.

        Args:
            wait_s: How long to wait for something to come back.

        Raises:
            Unloadable: A model cannot be loaded.
        """
        if not self.operators:
            return
        self._collect(wait_s)
        self._refill()
        if self._writer.table("keyframes").version > self._keyframes_version + KEPT_VERSIONS // 2:
            self._pictures_of(())  # before the version that the rows in hand point to is forgotten
        self._dispatch()
        if self._rows:
            stage = "measuring" if self._name == "clips" else "pairing"
            observe.progress(stage, self.done, self.done + self.waiting)
        if self._results and time.monotonic() - self._committed_at > self._every_s:
            self.commit()

    def drain(self, watch: Callable[[], None]) -> None:
        """Measures until nothing waits any more."""
        self.feeding = False
        while self.operators:
            self.pump(min(1.0, self._every_s))
            watch()
            if not (self._flights or self._more or self.waiting):
                break
        self.commit()

    def commit(self) -> None:
        """Commits what has come back."""
        self._committed_at = time.monotonic()
        if self._results:
            found, self._results = self._results, []
            self._writer.amend(self._name, found)
        for row_id in self._through:
            del self._rows[row_id]
        self._through.clear()

    def close(self) -> None:
        """Ends the actors."""
        for pool in self._pools.values():
            for actor in pool.actors if ray.is_initialized() else []:
                ray.kill(actor)
        self._pools.clear()
        if self._flights and ray.is_initialized():
            # Ray logs an error that nobody has read, whenever Python drops it.
            ended, _ = ray.wait(list(self._flights), num_returns=len(self._flights), timeout=1)
            for ref in ended:
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.get(ref)
        self._flights.clear()

    # Rows come in

    def _refill(self) -> None:
        """Takes further rows of the table in hand, where some wait there."""
        now = time.monotonic()
        if not self._more or self.waiting > WINDOW // 2 or now < self._refill_at:
            return
        if self._through:
            self.commit()  # what is through must not look as if it waited
        picked = []
        room = WINDOW - self.waiting
        self._more = False
        for batch in self._waiting_in_table():
            ids = batch[self._key].to_pylist()
            new = [i for i, row_id in enumerate(ids) if row_id not in self._rows]
            if len(new) > room:
                new, self._more = new[:room], True
            picked.append(batch.take(pa.array(new, pa.int64())))
            room -= len(new)
            if self._more:
                break
        rows = pa.concat_tables(picked) if picked else None
        if rows is not None and rows.num_rows:
            self._take_in(self._with_large_columns(rows))
        seconds = time.monotonic() - now
        self._refill_at = now + seconds / REFILL_SHARE if self.feeding else now

    def _waiting_in_table(self) -> Iterator[pa.Table]:
        states = ", ".join(f"'{state}'" for state in self._states)
        which = f"error_type IS NULL AND state IN ({states})"
        scanner = self._writer.table(self._name).scanner(
            columns=self._small_columns(),
            filter=f"({self._where}) AND {which}" if self._where else which,
            batch_size=WINDOW,
        )
        for batch in scanner.to_batches():
            rows = pa.Table.from_batches([batch])
            if self.excluded:
                away = pc.is_in(rows["source_id"], pa.array(list(self.excluded), pa.string()))
                rows = rows.filter(pc.invert(away))
            waits = self._waits(rows)
            yield rows.filter(pa.array(waits >= 0))

    def _waits(self, rows: pa.Table) -> Any:
        verdicts = judge(rows, self._stages)
        measure_all = "rejected" in self._states
        return waiting_for(rows, verdicts, self._stages, measure_all=measure_all)

    def _small_columns(self) -> list[str]:
        own = TABLES[self._name]
        read = [c for o in self.operators for c in o.reads if c in own.names]
        names = [self._key, "clip_id", "source_id", *columns_read(self._stages), *read]
        return [n for n in dict.fromkeys(names) if not pa.types.is_nested(own.field(n).type)]

    def _with_large_columns(self, rows: pa.Table) -> pa.Table:
        """Adds what operators read beyond small columns: embeddings, and where pictures lie."""
        read = dict.fromkeys(c for o in self.operators for c in o.reads)
        lacking = [c for c in read if c not in rows.column_names and c != "keyframes"]
        clip_ids = rows["clip_id"].to_pylist()
        if lacking:
            clips = self._clips_of(clip_ids, lacking)
            place = pc.index_in(rows["clip_id"], clips["clip_id"])
            for name in lacking:
                rows = rows.append_column(name, clips[name].take(place))
        if "keyframes" in read:
            pictures = self._pictures_of(clip_ids)
            found = [pictures.get(clip_id, []) for clip_id in clip_ids]
            rows = rows.append_column("keyframes", pa.array(found, ADDRESSES))
        return rows

    def _clips_of(self, clip_ids: Collection[str], columns: Sequence[str]) -> pa.Table:
        quoted = ", ".join(f"'{i}'" for i in clip_ids)
        return self._writer.table("clips").to_table(
            columns=["clip_id", *columns], filter=f"clip_id IN ({quoted})"
        )

    def _pictures_of(self, clip_ids: Collection[str]) -> dict[str, list[dict[str, Any]]]:
        """Times and addresses of keyframes by clip; a change of version finds those in hand anew.

        Compaction moves rows, and versions are forgotten after a while.
        """
        table = self._writer.table("keyframes")
        asked = set(clip_ids)
        in_hand = []
        if table.version != self._keyframes_version:
            self._keyframes_version = table.version
            in_hand = list(self._rows.values())
            asked |= {row["clip_id"] for row in in_hand}
        if not asked:
            return {}
        quoted = ", ".join(f"'{i}'" for i in asked)
        found = table.to_table(
            columns=["clip_id", "time_s"],
            filter=f"clip_id IN ({quoted})",
            with_row_address=True,
        ).sort_by("time_s")
        by_clip: dict[str, list[dict[str, Any]]] = {}
        columns = (found[c].to_pylist() for c in ("clip_id", "time_s", "_rowaddr"))
        for clip_id, time_s, address in zip(*columns, strict=True):
            by_clip.setdefault(clip_id, []).append({"time_s": time_s, "address": address})
        for row in in_hand:  # of a clip that was replaced there are none any more
            row["keyframes"] = by_clip.get(row["clip_id"], [])
        return by_clip

    def _take_in(self, rows: pa.Table) -> None:
        for row, index in zip(rows.to_pylist(), self._waits(rows), strict=True):
            self._rows[row[self._key]] = row
            self._queues[index].append(row[self._key])

    # Batches go out

    def _dispatch(self) -> None:
        for index in reversed(range(len(self.operators))):  # what is nearly through goes first
            while (batch := self._next_batch(index)) is not None:
                pool = self._pool(self.operators[index])
                actor = self._free(pool)
                if actor is None:
                    break
                self._send(index, self._take_batch(index, batch), pool, actor)

    def _next_batch(self, index: int) -> int | None:
        """How many rows of the queue to send now: 0 is a batch that goes alone, None is nothing."""
        if self._alone[index]:
            return 0
        size, there = self.operators[index].batch_size, len(self._queues[index])
        if there >= size:
            return size
        return there if there and self._is_last(index) else None

    def _is_last(self, index: int) -> bool:
        """Whether nothing can come into an operator's queue any more."""
        if self.feeding or self._more:
            return False
        before = any(self._queues[i] or self._alone[i] for i in range(index))
        return not before and not any(f.index < index for f in self._flights.values())

    def _take_batch(self, index: int, size: int) -> tuple[str, ...]:
        if size == 0:
            return self._alone[index].popleft()
        return tuple(self._queues[index].popleft() for _ in range(size))

    def _send(self, index: int, ids: tuple[str, ...], pool: _Pool, actor: Any) -> None:
        operator = self.operators[index]
        columns = list(dict.fromkeys([self._key, "clip_id", *operator.reads]))
        rows = [self._rows[i] for i in ids]
        types = [self._type_of(c) for c in columns]
        table = pa.table(
            [pa.array([r[c] for r in rows], t) for c, t in zip(columns, types, strict=True)],
            names=columns,
        )
        ref = actor.measure.remote(operator, table, self._keyframes_version)
        self._flights[ref] = _Flight(index=index, ids=ids, pool=pool, actor=actor)
        pool.flying[actor] += 1

    def _type_of(self, column: str) -> pa.DataType:
        if column == "keyframes":
            return ADDRESSES
        own = TABLES[self._name]
        return (own if column in own.names else TABLES["clips"]).field(column).type

    # Actors

    def _pool(self, operator: Operator) -> _Pool:
        cluster = self._cluster()
        name = type(operator).__name__
        if operator.copies is None:
            if not operator.num_gpus:
                name = "light"
            elif not cluster.gpus:
                name = "models"
        if name not in self._pools:
            self._pools[name] = self._new_pool(operator, name, cluster)
        if name == "light" and not self.feeding:
            self._pools[name].most = cluster.cores
        return self._pools[name]

    def _new_pool(self, operator: Operator, name: str, cluster: _Cluster) -> _Pool:
        half = (1 - SCAN_SHARE) / 2 * cluster.cores
        if name == "light":
            most = max(1, cluster.cores // 2)
            return _Pool(options={"num_cpus": half / most}, most=most)
        if name == "models":
            return _Pool(options={"num_cpus": half / 2}, most=1, threads=cluster.cores)
        gpus = operator.num_gpus if cluster.gpus else 0.0
        most = operator.copies or max(1, int(cluster.gpus / operator.num_gpus))
        kinds = sum(bool(o.num_gpus or o.copies) for o in self.operators)
        cpus = min(operator.num_cpus, half / 2 / most / kinds)
        return _Pool(options={"num_cpus": cpus, "num_gpus": gpus}, most=most)

    def _cluster(self) -> _Cluster:
        self._connect()
        found = ray.cluster_resources()
        return _Cluster(cores=max(1, int(found.get("CPU", 1))), gpus=found.get("GPU", 0))

    def _free(self, pool: _Pool) -> Any | None:
        """An actor of the pool with room for a batch, a new one where it may grow."""
        if pool.idle():
            return pool.idle()[0]
        if len(pool.actors) < pool.most and self._has_room(pool):
            actor = (
                ray.remote(Gauge)
                .options(max_concurrency=IN_FLIGHT, **pool.options)
                .remote(self._writer.root, self._environment, pool.threads, self._writer.run_id)
            )
            pool.actors.append(actor)
            pool.flying[actor] = 0
            return actor
        able = [a for a in pool.actors if pool.flying[a] < IN_FLIGHT]
        return min(able, key=lambda a: pool.flying[a]) if able else None

    def _has_room(self, pool: _Pool) -> bool:
        """Whether a GPU is left for another actor; idle ones of other pools make way."""
        if not pool.gpus or ray.available_resources().get("GPU", 0) >= pool.gpus:
            return True
        if not pool.actors:
            for other in self._pools.values():
                for actor in other.idle() if other is not pool and other.gpus else []:
                    ray.kill(actor)
                    other.actors.remove(actor)
        return False  # in a moment, when Ray has noticed

    # Results come back

    def _collect(self, wait_s: float) -> None:
        if not self._flights:
            if wait_s and not self._more:
                time.sleep(min(wait_s, 0.05))
            return
        flying = list(self._flights)
        ready, _ = ray.wait(flying, num_returns=1, timeout=wait_s)
        if ready:
            ready, _ = ray.wait(flying, num_returns=len(flying), timeout=0)
        for ref in ready:
            flight = self._flights.pop(ref)
            flight.pool.flying[flight.actor] -= 1
            try:
                measured: Measured = ray.get(ref)
            except _LOST as error:
                self._lost(flight, error)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, Unloadable):
                    raise error.cause from None
                raise
            else:
                self._take(flight, measured)

    def _take(self, flight: _Flight, measured: Measured) -> None:
        """Keeps a batch's results for the commit, and puts its rows on their way."""
        operator = self.operators[flight.index]
        found = measured.table
        tally = self.tallies[type(operator).__name__]
        tally.rows += found.num_rows
        tally.failed += found.num_rows - found["error_type"].null_count
        tally.batches += 1
        tally.room += max(operator.batch_size, found.num_rows)
        tally.seconds += measured.seconds
        self._keep(operator, found, measured.seconds)

    def _keep(self, operator: Operator, found: pa.Table, seconds: float | None = None) -> None:
        name = type(operator).__name__
        work = {"table": self._name, "stage": self._stage_of[name], "operator": name}
        observe.measured(found, self._key, seconds=seconds, **work)
        failed = pc.is_valid(found["error_type"])
        who = pc.if_else(failed, name, pa.scalar(None, pa.string()))
        columns = {n: found[n] for n in found.column_names if n not in FAILURE.names}
        columns |= {
            "error_operator": who,
            "error_type": found["error_type"],
            "error": found["error"],
            "error_transient": found["transient"],
        }
        self._results.append(pa.table(columns))
        ids = found[self._key].to_pylist()
        read = {c for o in self.operators for c in o.reads} | {o.marker for o in self.operators}
        read |= set(columns_read(self._stages))
        for column in (c for c in columns if c in read):
            for row_id, value in zip(ids, columns[column].to_pylist(), strict=True):
                self._rows[row_id][column] = value
        self._route(ids)

    def _route(self, ids: Sequence[str]) -> None:
        columns = self._small_columns()
        fields = [pa.field(c, self._type_of(c)) for c in columns]
        rows = pa.Table.from_pylist(
            [{c: self._rows[i][c] for c in columns} for i in ids], schema=pa.schema(fields)
        )
        for row_id, index in zip(ids, self._waits(rows), strict=True):
            if index >= 0:
                self._queues[index].append(row_id)
            else:
                self._through.add(row_id)
                self.done += 1

    def _lost(self, flight: _Flight, error: Exception) -> None:
        """Halves what a dead actor had; a row is given up when actors die on it alone."""
        _log.warning("a worker was lost: %s", str(error).splitlines()[0])
        if flight.actor in flight.pool.actors:
            flight.pool.actors.remove(flight.actor)
        if len(flight.ids) > 1:
            half = len(flight.ids) // 2
            self._alone[flight.index] += (flight.ids[:half], flight.ids[half:])
            return
        (row_id,) = flight.ids
        self._died[row_id] = self._died.get(row_id, 0) + 1
        if self._died[row_id] <= DEATHS_ALLOWED:
            self._alone[flight.index].append(flight.ids)
            return
        operator = self.operators[flight.index]
        why = f"its worker died {self._died[row_id]} times"
        nothing = {f.name: pa.nulls(1, f.type) for f in operator.writes}
        given_up = {"error_type": ["WorkerDied"], "error": [why], "transient": [True]}
        self._keep(operator, pa.table({self._key: [row_id], **nothing, **given_up}))


@dataclass(frozen=True)
class _Cluster:
    cores: int
    gpus: float
