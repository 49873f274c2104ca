"""A curation run: plan what is to do, scan it on Ray, commit as it comes, judge, account."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from engine import chain, observe, storage
from engine.accounts import Accounts, balance
from engine.cut import Mode
from engine.cutter import CutJob, Where
from engine.cutting import cut, to_cut
from engine.forget import check_whole
from engine.lease import EXPIRY_S, Lease
from engine.measuring import SCAN_SHARE, Measuring, Tally
from engine.operator import Failed, Stage
from engine.pairing import Pairs, pair
from engine.pipeline import DEATHS_ALLOWED, outcomes
from engine.plan import STORED, Plan, Policy, first_look, settle
from engine.scan import Scan
from engine.schema import CLIPS, SOURCES
from engine.sources import Listing, Source
from engine.tables import Writer, uninterrupted
from engine.worker import (
    PARTS,
    Job,
    Outcome,
    Unit,
    beside_of,
    duplicate_row,
    failed,
    source_id,
    with_captions,
)

WAVE = 10_000
"""Units given to one Ray Data execution: its bookkeeping must stay bounded."""
HASH_HERE_BYTES = 256 * 2**20
"""Up to so much is hashed by the driver: less than it takes to start workers."""
COMMIT_AT = 64
"""Outcomes that wait for a commit at most: with `commit_every_s`, what a death may cost."""
PUMP_EVERY_S = 0.05
PUBLISH_EVERY_S = 600.0
PUBLISH_SHARE = 0.05
"""Of a run's time at most, that publishing verdicts before its end may take."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a run goes about it; none of these changes a stored number."""

    measure_all: bool = False
    retry_failed: bool = False
    verify: bool = False
    time_limit_s: float = 600.0
    memory_limit_gib: float = 4.0
    commit_every_s: float = 10.0
    lease_expiry_s: float = EXPIRY_S
    workers: int | None = None


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """How kept clips are cut out of their sources."""

    mode: Mode
    where: Where = "files"


@dataclass(kw_only=True)
class Progress:
    """Where a run is; handed to its watcher whenever it changes."""

    sources: int = 0
    """To read in this run."""
    done: int = 0
    failed: int = 0
    clips: int = 0
    frames: int = 0
    parts: int = 0
    parts_done: int = 0
    doing: str = "planning"
    unit: str = "sources"
    """What `sources`, `done` and `failed` count."""
    started: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run leaves."""

    root: str
    run_id: str
    accounts: Accounts
    frames_decoded: int
    measured: dict[str, Tally]
    """What each operator did, by its class."""
    seconds: float
    interrupted: bool


class Curation:
    """One run over one dataset.

    Args:
        root: A dataset that `engine.tables.create` made.
        recipe: Its name; a dataset belongs to one.
        scan: How sources become clips.
        stages: What is kept.
        pairs: Quadruples to make of what is kept.
        cuts: How what is kept is cut out of its sources; None: it is not.
        options: How to go about it.
        connect: Connects to Ray; called only when there is something to read.
        watch: Called with the run's progress.
        about: Further facts of the `runs` row: `resolved`, `versions`, `git_commit`, `src`.
    """

    def __init__(
        self,
        root: str,
        *,
        recipe: str,
        scan: Scan,
        stages: tuple[Stage, ...],
        pairs: tuple[Pairs, ...] = (),
        cuts: Cutting | None = None,
        options: Options,
        connect: Callable[[], AbstractContextManager[str]],
        watch: Callable[[Progress], None] = lambda _: None,
        about: dict[str, Any] | None = None,
    ):
        unknown = set(scan.writes.names) - set(CLIPS.names)
        if unknown:
            raise ValueError(f"engine/schema.py has no column {sorted(unknown)}: add it to CLIPS")
        self.root, self.recipe, self.stages, self.options = root, recipe, stages, options
        self.connect, self.watch, self.about = connect, _told(watch), about or {}
        self.pairs, self.cuts = pairs, cuts
        self.run_id = str(uuid.uuid4())
        self.progress = Progress()
        self.job = Job(
            root=root,
            run_id=self.run_id,
            scan=scan,
            stages=tuple(Stage(name=s.name, rules=s.rules) for s in stages),
            measure_all=options.measure_all,
            time_limit_s=options.time_limit_s,
            memory_limit_bytes=int(options.memory_limit_gib * 2**30),
            environment=tuple(storage.worker_environment().items()),
        )
        self.tallies: dict[str, Tally] = {}
        self.frames_decoded = 0
        self._uncommitted: list[Outcome] = []
        self._committed_at = time.monotonic()
        self._publish_at = self._committed_at + PUBLISH_EVERY_S
        self._pump_at = 0.0

    def run(self, listing: Listing | None) -> Result:
        """Does what is left to do; on Ctrl-C commits what is done and says so in the result.

        Args:
            listing: What is asked for; None: only pairs and cuts of the clips that are kept.

        Raises:
            DatasetError: The dataset is in use.
            OSError: The dataset cannot be written any more, for one because the disk is full.
            LeaseLost: Another driver has taken over.
        """
        started, clock = datetime.now(UTC), time.monotonic()
        interrupted = False
        with (
            observe.of_run(self.run_id),
            Lease(self.root, self.run_id, self.options.lease_expiry_s),
            contextlib.ExitStack() as self._connection,
        ):
            check_whole(self.root)
            self.writer = Writer(self.root, self.run_id, recovered=_log.warning)
            if listing is not None:
                interrupted = self._curate(listing)
            if not interrupted:
                interrupted = self._finish()
            accounts = balance(self.writer.table, listing)
            observe.holds({"sources": _states(accounts.sources), "clips": _states(accounts.clips)})
            seconds = time.monotonic() - clock
            self.writer.add_run(
                self.about
                | {
                    "run_id": self.run_id,
                    "recipe": self.recipe,
                    "fingerprint": self.job.scan.fingerprint,
                    "started_at": started,
                    "seconds": seconds,
                    "frames_decoded": self.frames_decoded,
                    "operators": json.dumps(
                        {n: dataclasses.asdict(t) for n, t in self.tallies.items()}
                    ),
                    "interrupted": interrupted,
                    "counts": json.dumps(accounts.as_dict()),
                }
            )
            if not interrupted:
                storage.delete_folder(storage.join(self.root, PARTS))
        return Result(
            root=self.root,
            run_id=self.run_id,
            accounts=accounts,
            frames_decoded=self.frames_decoded,
            measured=self.tallies,
            seconds=seconds,
            interrupted=interrupted,
        )

    def _curate(self, listing: Listing) -> bool:
        """Sources to judged clips; tells whether it was stopped."""
        interrupted = False
        self._adopt()
        self.writer.publish(self.stages)
        self._connection.callback(self.measuring.close)
        try:
            self._work(listing)
        except KeyboardInterrupt:
            interrupted = True
        self._commit()
        self.measuring.commit()
        self.progress.doing = "judging"
        self.watch(self.progress)
        self.writer.publish(self.stages)
        return interrupted

    def _finish(self) -> bool:
        """Makes of the kept clips what is to be made of them; tells whether it was stopped."""
        try:
            if self.pairs:
                self._measure_for_pairs()
            for pairs in self.pairs:
                pair(
                    self.writer,
                    pairs,
                    self.stages,
                    retry_failed=self.options.retry_failed,
                    measure=self._measure,
                    measuring=self._measuring_of,
                )
            self._cut()
        except KeyboardInterrupt:
            return True
        return False

    def _measure_for_pairs(self) -> None:
        """Measures of kept clips what their pairs read of them, where a run did not do so before.

        Nothing is judged: the thresholds that were in force when they were kept stay so.
        """
        read = {c for p in self.pairs for s in p.stages for o in s.measures for c in o.reads}
        lacking = tuple(o for s in self.stages for o in s.measures if read & set(o.writes.names))
        all_keys = chain.keys(self.stages)
        self.writer.adopt("clips", lacking, {o.marker: all_keys[o.marker] for o in lacking})
        stage = Stage(name="pairs", operators=lacking)
        self._measure(self._measuring_of((stage,), states=("kept",)))

    def _measure(self, measuring: Measuring) -> None:
        """Runs measurements to their end, or commits what there is when it is stopped."""
        self._connection.callback(measuring.close)
        self.progress = Progress(doing="pairing", unit="pairs")
        try:
            measuring.drain(lambda: self._watch_measuring(measuring))
        finally:
            measuring.commit()
            self.tallies |= {f"pairs.{n}": t for n, t in measuring.tallies.items() if t.rows}
            measuring.close()

    def _cut(self) -> None:
        if self.cuts is None:
            return
        clips = to_cut(self.writer, self.cuts.mode)
        self.progress = Progress(doing="cutting", unit="clips", sources=clips.num_rows)
        if not clips.num_rows:
            return
        self._connected()
        options = self.options
        job = CutJob(
            root=self.root,
            run_id=self.run_id,
            mode=self.cuts.mode,
            where=self.cuts.where,
            time_limit_s=options.time_limit_s,
            memory_limit_bytes=int(options.memory_limit_gib * 2**30),
            environment=self.job.environment,
        )

        def watch(num_done: int) -> None:
            self.progress.done = num_done
            self.watch(self.progress)

        cut(
            self.writer,
            clips,
            job,
            workers=options.workers,
            commit_every_s=options.commit_every_s,
            watch=watch,
        )

    def _measuring_of(self, stages: Sequence[Stage], **which: Any) -> Measuring:
        return Measuring(
            self.writer,
            stages,
            commit_every_s=self.options.commit_every_s,
            connect=self._connected,
            environment=self.job.environment,
            **which,
        )

    def _adopt(self) -> None:
        """Makes ready to measure: what other operators measured, and what is tried again, goes."""
        options = self.options
        states = ("pending", "rejected") if options.measure_all else ("pending",)
        self.measuring = self._measuring_of(self.stages, states=states)
        self.tallies = dict(self.measuring.tallies)
        redone = self.writer.adopt(
            "clips",
            self.measuring.operators,
            chain.keys(self.stages),
            retry_failed=options.retry_failed,
        )
        if redone:
            _log.warning(
                "measured again, as something they depend on changed: %s", ", ".join(redone)
            )

    # Planning

    def _work(self, listing: Listing) -> None:
        stored = self._stored()
        policy = Policy(
            fingerprint=self.job.scan.fingerprint,
            retry_failed=self.options.retry_failed,
            verify=self.options.verify,
            unmeasured=self._unmeasured(),
        )
        plan = first_look(listing.sources, stored, policy)
        plan.missing += self._vanished(listing, stored)
        self._mark_missing(plan.missing, stored)
        hashed = self._hash(plan)
        settle(plan, hashed, listing.sources, stored, policy)
        self._commit_settled(plan, stored)
        self.progress = Progress(sources=len(plan.units), doing="scanning")
        self.measuring.excluded = {u.source_id for u in plan.units}
        self.measuring.feeding = True
        self._scan(plan.units, stored)
        self._commit()
        self.progress = Progress(doing="measuring", unit="clips")
        self.measuring.drain(lambda: self._watch_measuring(self.measuring))
        self.measuring.close()

    def _watch_measuring(self, measuring: Measuring) -> None:
        done = measuring.done
        self.progress.done, self.progress.sources = done, done + measuring.waiting
        self.progress.failed = sum(t.failed for t in measuring.tallies.values())
        self.watch(self.progress)

    def _stored(self) -> dict[str, dict[str, Any]]:
        rows = self.writer.table("sources").to_table(columns=STORED).to_pylist()
        return {row["uri"]: row for row in rows}

    def _unmeasured(self) -> frozenset[str]:
        """Sources to scan although their container rejected them once: today it does not."""

        def ids(table: str, which: str) -> set[str]:
            rows = self.writer.table(table).to_table(columns=["source_id"], filter=which)
            return set(rows["source_id"].to_pylist())

        unscanned = ids("sources", "state = 'done' AND NOT scanned")
        if self.options.measure_all or not unscanned:
            return frozenset(unscanned)
        return frozenset(unscanned & ids("clips", "state = 'pending'"))

    def _vanished(self, listing: Listing, stored: dict[str, dict[str, Any]]) -> list[str]:
        listed = {s.uri for s in listing.sources}
        others = [u for u, row in stored.items() if u not in listed and not row["missing"]]
        there = storage.exists_many(others)
        return [uri for uri, exists in zip(others, there, strict=True) if not exists]

    def _mark_missing(self, uris: Sequence[str], stored: dict[str, dict[str, Any]]) -> None:
        if not uris:
            return
        _log.warning("%d source(s) of this dataset are gone; they are marked", len(uris))
        self._renew([stored[u]["source_id"] for u in uris], lambda row: row | {"missing": True})
        for uri in uris:
            stored[uri] |= {"missing": True}

    def _hash(self, plan: Plan) -> dict[str, str]:
        """Content hashes of what must be known before it is decided what to scan."""
        self.progress = Progress(sources=len(plan.to_hash), doing="hashing")
        self.watch(self.progress)
        if sum(u.source.size_bytes or 0 for u in plan.to_hash) <= HASH_HERE_BYTES:
            hashed = _hash_here(u.source.uri for u in plan.to_hash)
        else:
            hashed = {}
            waiting = plan.to_hash
            for _ in range(DEATHS_ALLOWED):
                came = set()
                for outcome in self._outcomes(waiting):
                    self.progress.done += 1
                    self.watch(self.progress)
                    came.add(outcome.unit.source.uri)
                    if outcome.sha256:
                        hashed[outcome.unit.source.uri] = outcome.sha256
                waiting = [unit for unit in waiting if unit.source.uri not in came]
        return hashed

    def _commit_settled(self, plan: Plan, stored: dict[str, dict[str, Any]]) -> None:
        """Commits what needs no reading: copies, new time stamps, other captions."""
        if plan.duplicates:
            rows = [duplicate_row(self.job, *found) for found in plan.duplicates]
            replaced = [r["source_id"] for r in rows if r["uri"] in stored]
            self.writer.commit(sources=_table(rows), replaces=replaced)
            observe.worked(
                table="sources", stage="scan", operator="Scan", states={"duplicate": len(rows)}
            )
        touched = {source_id(s.uri): s for s in plan.touched}
        self._renew(list(touched), lambda row: row | _stat_of(touched[row["source_id"]]))
        self._recaption({source_id(s.uri): s for s in plan.recaptioned}, stored)

    def _renew(
        self,
        ids: Sequence[str],
        change: Callable[[dict[str, Any]], dict[str, Any]],
        clips: pa.Table | None = None,
    ) -> None:
        """Rewrites rows of `sources` (and of `clips`, where given): nothing is read again."""
        if ids:
            rows = _rows_of(self.writer.table("sources"), ids).to_pylist()
            self.writer.commit(
                sources=_table([change(r) for r in rows]),
                clips=clips,
                replaces=ids,
                in_tables=("sources",) if clips is None else ("sources", "clips"),
            )

    def _recaption(self, changed: dict[str, Source], stored: dict[str, dict[str, Any]]) -> None:
        clips = _rows_of(self.writer.table("clips"), list(changed))
        parts = [
            with_captions(
                clips.filter(pc.equal(clips["source_id"], key)),
                source,
                stored[source.uri]["sha256"],
            )
            for key, source in changed.items()
        ]
        self._renew(
            list(changed),
            lambda row: (
                row | _stat_of(changed[row["source_id"]]) | _beside(changed[row["source_id"]])
            ),
            pa.concat_tables(parts) if parts else None,
        )

    # Scanning

    def _scan(self, units: Sequence[Unit], stored: dict[str, dict[str, Any]]) -> None:
        """Scans units in waves; parts of long sources, and what a dead worker had, come again."""
        self._stored_rows = stored
        waves = deque(_waves(units))
        settled: set[str] = set()
        joining: set[str] = set()
        while waves:
            wave = waves.popleft()
            came: set[tuple[str, int | None]] = set()
            further: list[Unit] = []
            for outcome in self._outcomes(wave):
                came.add((outcome.unit.source.uri, outcome.unit.part))
                further += self._take(outcome, settled)
            waves += _waves(further)
            waves += self._again(wave, came, settled)
            waves += self._unjoined(wave, waves, settled, joining)

    def _take(self, outcome: Outcome, settled: set[str]) -> list[Unit]:
        """Counts an outcome and queues its rows; gives the units that it calls for."""
        if outcome.unwritable:
            raise OSError(outcome.unwritable)
        unit, uri = outcome.unit, outcome.unit.source.uri
        self.frames_decoded += outcome.frames_decoded
        self.progress.frames += outcome.frames_decoded
        observe.spent("scan", "Scan", outcome.seconds)
        observe.decoded(frames=outcome.frames_decoded)
        self.progress.parts_done += unit.part is not None
        further: list[Unit] = []
        if outcome.source_row is not None and uri not in settled:
            settled.add(uri)
            self._uncommitted.append(outcome)
            self.progress.done += 1
            self.progress.failed += outcome.source_row["state"] == "failed"
            self.progress.clips += outcome.clips.num_rows
        elif outcome.parts:
            further = [
                dataclasses.replace(unit, sha256=outcome.sha256, parts=outcome.parts, part=i)
                for i in range(len(outcome.parts))
            ]
            self.progress.parts += len(further)
        self.watch(self.progress)
        began = time.monotonic()
        if len(self._uncommitted) >= COMMIT_AT or self._is_due(began):
            self._commit()
        if began > self._publish_at:
            self.writer.publish(self.stages)
            now = time.monotonic()
            self._publish_at = now + max(PUBLISH_EVERY_S, (now - began) / PUBLISH_SHARE)
        return further

    def _again(
        self, wave: Sequence[Unit], came: set[tuple[str, int | None]], settled: set[str]
    ) -> list[list[Unit]]:
        """What was lost of a wave, in halves: a unit is given up when its worker dies on it alone.

        Ray says that a worker was lost, not on what; the other units of the wave are innocent.
        """
        lost = [
            dataclasses.replace(unit, died=unit.died + 1)
            for unit in wave
            if (unit.source.uri, unit.part) not in came and unit.source.uri not in settled
        ]
        if len(wave) == len(lost) == 1:
            self._give_up(lost[0], f"its worker died {DEATHS_ALLOWED + 1} times", settled)
            return []
        half = len(lost) // 2
        return [some for some in (lost[:half], lost[half:]) if some]

    def _unjoined(
        self,
        wave: Sequence[Unit],
        waves: Iterable[Sequence[Unit]],
        settled: set[str],
        joining: set[str],
    ) -> list[list[Unit]]:
        """Units that join parts which are all scanned, where whoever should have done it died."""
        unsettled = {
            u.source.uri: u for u in wave if u.part is not None and u.source.uri not in settled
        }
        if unsettled:
            for unit in (u for one in waves for u in one if u.part is not None):
                unsettled.pop(unit.source.uri, None)
        for uri in joining & unsettled.keys():
            self._give_up(
                unsettled.pop(uri), "its parts were lost before they were joined", settled
            )
        joining.update(unsettled)
        return [[dataclasses.replace(unit, part=0)] for unit in unsettled.values()]

    def _give_up(self, unit: Unit, why: str, settled: set[str]) -> None:
        self._take(failed(self.job, unit, Failed("WorkerDied", why, transient=True)), settled)

    def _outcomes(self, units: Sequence[Unit]) -> Iterator[Outcome]:
        """Outcomes as they come, committed in between. Units whose worker died have none."""
        if units:
            self._connected()
        for outcome in outcomes(
            units,
            self.job,
            workers=self.options.workers,
            share=SCAN_SHARE if self.measuring.operators else 1.0,
            wait_s=min(0.2 if self.measuring.waiting else 1.0, self.options.commit_every_s),
        ):
            if time.monotonic() > self._pump_at:
                self.measuring.pump()
                self._pump_at = time.monotonic() + PUMP_EVERY_S
            if outcome is not None:
                yield outcome
                continue
            self.watch(self.progress)
            if self._uncommitted and self._is_due(time.monotonic()):
                self._commit()

    def _connected(self) -> None:
        if not ray.is_initialized():
            _log.info("%s", self._connection.enter_context(self.connect()))

    def _is_due(self, now: float) -> bool:
        return now - self._committed_at > self.options.commit_every_s

    def _commit(self) -> None:
        """Commits what has come, in one unit; keeps good rows where a re-read failed for now."""
        with uninterrupted():  # or what is on its way to the tables is lost
            self._commit_waiting()

    def _commit_waiting(self) -> None:
        self._committed_at = time.monotonic()
        waiting, self._uncommitted = self._uncommitted, []
        rows, clips, keyframes, replaces = [], [], [], []
        for outcome in waiting:
            assert outcome.source_row is not None
            row, old = outcome.source_row, self._stored_rows.get(outcome.unit.source.uri)
            if old and old["state"] == "done" and row["state"] == "failed" and row["transient"]:
                _log.warning("%s: %s; what is stored of it stands", row["uri"], row["error"])
                continue
            if old:
                replaces.append(old["source_id"])
            rows.append(row)
            clips.append(outcome.clips)
            keyframes += outcome.keyframes
            if outcome.unit.heir_of and row["state"] == "done":
                rows.append(self._disinherited(outcome.unit))
                replaces.append(rows[-1]["source_id"])
        _observe(waiting)
        if rows:
            self.writer.commit(
                sources=_table(rows),
                clips=pa.concat_tables(clips),
                keyframes=keyframes,
                replaces=replaces,
            )
            self.measuring.excluded -= {row["source_id"] for row in rows}
            self.measuring.rows_came()

    def _disinherited(self, unit: Unit) -> dict[str, Any]:
        """The row of a source that is gone, now that another with its content stands for it."""
        assert unit.heir_of is not None
        row = _rows_of(self.writer.table("sources"), [source_id(unit.heir_of)]).to_pylist()[0]
        return row | {"state": "duplicate", "duplicate_of": unit.source_id, "num_clips": 0}


def _told(watch: Callable[[Progress], None]) -> Callable[[Progress], None]:
    """The watcher, with whoever looks at Ray's metrics."""

    def told(progress: Progress) -> None:
        observe.progress(progress.doing, progress.done, progress.sources)
        watch(progress)

    return told


def _states(counts: dict[str, int]) -> dict[str, int]:
    """Of accounts, without what is no state."""
    return {name: num for name, num in counts.items() if name not in ("total", "ignored")}


def _observe(outcomes: Sequence[Outcome]) -> None:
    """Counts sources that were read, and their clips."""
    rows = [o.source_row for o in outcomes if o.source_row is not None]
    failures = [
        observe.Failure(r["source_id"], r["error_type"], r["error"], {"uri": r["uri"]})
        for r in rows
        if r["state"] == "failed"
    ]
    work = {"stage": "scan", "operator": "Scan"}
    states = {"done": len(rows) - len(failures), "failed": len(failures)}
    observe.worked(table="sources", states=states, failures=failures, **work)
    observe.worked(table="clips", states={"done": sum(o.clips.num_rows for o in outcomes)}, **work)
    done = (r for r in rows if r["state"] == "done")
    observe.decoded(num_bytes=sum(r["size_bytes"] or 0 for r in done))


def _waves(units: Sequence[Unit]) -> list[Sequence[Unit]]:
    return [units[start : start + WAVE] for start in range(0, len(units), WAVE)]


def _hash_here(uris: Iterable[str]) -> dict[str, str]:
    """Content hash by uri, of what can be read; the scan says what is wrong with the others."""

    def hashed(uri: str) -> tuple[str, str | None]:
        try:
            return uri, storage.sha256(uri)
        except OSError:
            return uri, None

    with ThreadPoolExecutor() as threads:
        return {uri: sha256 for uri, sha256 in threads.map(hashed, uris) if sha256}


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SOURCES)


def _rows_of(table: Any, ids: Sequence[str]) -> pa.Table:
    quoted = ", ".join(f"'{i}'" for i in ids)
    return table.to_table(filter=f"source_id IN ({quoted})") if ids else table.schema.empty_table()


def _stat_of(source: Source) -> dict[str, Any]:
    return {
        "size_bytes": source.size_bytes,
        "mtime_ns": source.mtime_ns,
        "etag": source.etag,
        "missing": False,
    }


def _beside(source: Source) -> dict[str, Any]:
    return {"caption": source.caption, "extra": source.extra, "beside": beside_of(source)}
