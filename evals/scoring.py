"""Scores videos: work by (dimension, video) on actors that load their models once, resumably.

What is to be done is what `scores` lacks: a score is named by its video, dimension, segment, the
text it is measured against and the metric's fingerprint (weights, versions, parameters). Metrics
run one after the other, so that an actor holds the models of one group; each actor fetches videos
from `generations` into files of its own, and only numbers come back. The driver commits rows as
they come; a killed run loses those it had not committed, and the next measures just these.
"""

from __future__ import annotations

import datetime
import json
import pickle
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from engine import logs, observe, storage
from engine.gauge import Unloadable, attempt
from engine.operator import Failed, results
from engine.schema import SCORES
from engine.tables import Writer, read
from evals.dimensions import DIMENSIONS
from evals.leaderboard import CONSTANTS_VERSION, normalised
from evals.metric import ASKED, Metric
from evals.videofiles import DIED, fetch

_NAMESPACE = uuid.UUID("7b0f3c52-9a54-4d0e-8f0e-6c3f3f6f2d11")


@dataclass(frozen=True)
class Video:
    """A row of `generations` that has a video, as scoring needs it."""

    generation_id: str
    model: str
    prompt: str
    sample: int
    sha256: str
    num_frames: int
    fps: float


@dataclass(frozen=True)
class Ask:
    """A score that is wanted."""

    video: Video
    dimension: str
    segment: str | None = None
    auxiliary: str | None = None

    def score_id(self, fingerprint: str) -> str:
        """Names the score, given the metric's fingerprint for its dimension."""
        says = [self.video.generation_id, self.dimension, self.segment, self.auxiliary, fingerprint]
        return str(uuid.uuid5(_NAMESPACE, json.dumps(says)))


@dataclass(frozen=True)
class Unit:
    """What is wanted of one video: it is fetched once."""

    asks: tuple[Ask, ...]


@dataclass(frozen=True, kw_only=True)
class ScoreJob:
    """What all units of a metric share."""

    root: str
    run_id: str
    metric: Metric
    generations: int
    """Version of the table."""
    environment: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class ScoreOutcome:
    """What came of a unit."""

    unit: Unit
    rows: pa.Table | None = None
    """Of `scores`."""
    unloadable: str | None = None
    """Why there is no metric: the run cannot go on."""
    unwritable: str | None = None
    """Why videos cannot be fetched: nor can it."""


@dataclass(kw_only=True)
class Progress:
    """Where scoring is; handed to its watcher whenever it changes."""

    total: int = 0
    done: int = 0
    failed: int = 0
    doing: str = "looking for what is scored"
    started: float = field(default_factory=time.monotonic)


@dataclass(kw_only=True)
class Counts:
    """What a run did."""

    scored: int = 0
    failed: int = 0
    there: int = 0
    """That an earlier run had scored, or failed on for good."""


def score(
    writer: Writer,
    asks: Sequence[Ask],
    metrics: Sequence[Metric],
    *,
    connect: Callable[[], Any],
    watch: Callable[[Progress], None] = lambda _: None,
    workers: int | None = None,
    retry_failed: bool = False,
    commit_every_s: float = 10.0,
) -> Counts:
    """Measures what is wanted and not stored; the same call again goes on.

    Args:
        writer: Of the dataset that holds the videos.
        asks: What is wanted, each dimension being of one of `metrics`.
        metrics: In the order in which they run.
        connect: Makes sure that Ray is there; called only where something is to do.
        watch: Called with the run's progress.
        workers: Actors at once; None is one a GPU, or one a core where there are none.
        retry_failed: Try final failures again; those that may pass are tried in any case.
        commit_every_s: What a death may cost.

    Raises:
        Unloadable: A metric cannot be loaded.
        OSError: The dataset cannot be read or written.
        LeaseLost: Another driver has taken over.
    """
    scoring = _Scoring(writer, watch, workers, commit_every_s)
    watch(scoring.progress)
    lacking = scoring.lacking(asks, metrics, retry_failed=retry_failed)
    scoring.progress.total = sum(len(found) for found in lacking)
    if scoring.progress.total:
        connect()
    for metric, found in zip(metrics, lacking, strict=True):
        if found:
            scoring.run(metric, found)
    return scoring.counts


class _Scoring:
    """One run of `score`."""

    def __init__(
        self,
        writer: Writer,
        watch: Callable[[Progress], None],
        workers: int | None,
        commit_every_s: float,
    ):
        self.writer, self.watch = writer, watch
        self.workers, self.commit_every_s = workers, commit_every_s
        self.progress, self.counts = Progress(), Counts()
        self._waiting: list[pa.Table] = []
        self._committed_at = time.monotonic()

    def lacking(
        self, asks: Sequence[Ask], metrics: Sequence[Metric], *, retry_failed: bool
    ) -> list[list[Ask]]:
        """For each metric what is not stored; failures that are tried again are taken away."""
        of = {d: m for m in metrics for d in m.dimensions}
        keys = {d: m.key(d) for d, m in of.items()}
        wanted = {ask.score_id(keys[ask.dimension]): ask for ask in asks}
        stored = self.writer.table("scores").to_table(
            columns=["score_id", "error_type", "error_transient"]
        )
        stored = stored.filter(pc.is_in(stored["score_id"], pa.array(wanted, pa.string())))
        again = pc.and_(
            pc.is_valid(stored["error_type"]),
            pc.or_(pc.fill_null(stored["error_transient"], False), retry_failed),
        )
        self.writer.remove("scores", "score_id", stored.filter(again)["score_id"].to_pylist())
        there = set(stored.filter(pc.invert(again))["score_id"].to_pylist())
        self.counts.there = len(there)
        found: dict[str, list[Ask]] = defaultdict(list)
        for score_id, ask in wanted.items():
            if score_id not in there:
                found[of[ask.dimension].fingerprint].append(ask)
        return [found[metric.fingerprint] for metric in metrics]

    def run(self, metric: Metric, asks: Sequence[Ask]) -> None:
        """Measures these with one metric."""
        import ray

        from engine.pipeline import Lost, settled

        job = ScoreJob(
            root=self.writer.root,
            run_id=self.writer.run_id,
            metric=metric,
            generations=self.writer.table("generations").version,
            environment=tuple(storage.worker_environment().items()),
        )
        gpus = ray.cluster_resources().get("GPU", 0.0)
        share = metric.num_gpus if gpus else 0.0
        first, *others = metric.dimensions
        more = f" and {len(others)} more" if others else ""
        self.progress.doing = f"scoring {first}{more}"
        self.watch(self.progress)
        try:
            for outcome in settled(
                _units(asks),
                job,
                actor=Scorer,
                workers=self.workers or (int(gpus / share) if share else None),
                share=metric.num_cpus,
                num_gpus=share,
                wait_s=min(1.0, self.commit_every_s),
            ):
                if isinstance(outcome, Lost):
                    self._take(_failed_rows(job, outcome.unit, DIED))
                elif outcome is not None:
                    _check(outcome)
                    self._take(outcome.rows)
                self.watch(self.progress)
                observe.progress("scoring", self.progress.done, self.progress.total)
                if time.monotonic() - self._committed_at > self.commit_every_s:
                    self._commit()
        finally:
            self._commit()

    def _take(self, rows: pa.Table) -> None:
        failed = pc.sum(pc.is_valid(rows["error_type"])).as_py()
        self._waiting.append(rows)
        self.counts.scored += rows.num_rows - failed
        self.counts.failed += failed
        self.progress.done += rows.num_rows
        self.progress.failed += failed
        for dimension in pc.unique(rows["dimension"]).to_pylist():
            some = rows.filter(pc.equal(rows["dimension"], dimension))
            observe.measured(
                some,
                "score_id",
                table="scores",
                stage="score",
                operator=dimension,
                seconds=pc.sum(some["seconds"]).as_py(),
            )

    def _commit(self) -> None:
        rows, self._waiting = self._waiting, []
        if rows:
            self.writer.append("scores", pa.concat_tables(rows))
        self._committed_at = time.monotonic()


def _units(asks: Sequence[Ask]) -> list[Unit]:
    """By video, in the order in which they are first asked for."""
    by_video: dict[str, list[Ask]] = defaultdict(list)
    for ask in asks:
        by_video[ask.video.generation_id].append(ask)
    return [Unit(tuple(found)) for found in by_video.values()]


def _check(outcome: ScoreOutcome) -> None:
    if outcome.unloadable:
        raise Unloadable(outcome.unloadable)
    if outcome.unwritable:
        raise OSError(outcome.unwritable)


class Scorer:
    """The actor: units in, outcomes out, one bad video costing its own scores."""

    def __init__(self, job: ScoreJob):
        storage.take_environment(job.environment)
        logs.set_up_worker(job.run_id)
        self.job = job
        self._function: Callable[[pa.Table], pa.Table] | None = None
        self._scratch = tempfile.TemporaryDirectory(prefix="reelwright-score-")

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A column `unit` in, a column `outcome` out, both pickled by this very program."""
        units = [pickle.loads(u) for u in batch["unit"].to_pylist()]
        return pa.table({"outcome": [pickle.dumps(self.do(unit)) for unit in units]})

    def do(self, unit: Unit) -> ScoreOutcome:
        """The outcome of one unit; never raises for what is in a video."""
        try:
            if self._function is None:
                self._function = self._loaded()
            return ScoreOutcome(unit=unit, rows=self._scored(unit, self._function))
        except Unloadable as error:
            return ScoreOutcome(unit=unit, unloadable=str(error))
        except OSError as error:
            return ScoreOutcome(unit=unit, unwritable=f"{self.job.root}: {error}")

    def _loaded(self) -> Callable[[pa.Table], pa.Table]:
        metric = self.job.metric
        self._generations = read(self.job.root, "generations", self.job.generations)
        try:
            function = metric.load()
        except Exception as error:
            words = " ".join(str(error).split())
            raise Unloadable(
                f"{', '.join(metric.dimensions)} cannot be measured: {words}"
            ) from error
        self._about = _about(metric)
        return function

    def _scored(self, unit: Unit, function: Callable[[pa.Table], pa.Table]) -> pa.Table:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=self._scratch.name) as folder:
            (path,) = fetch(self._generations, [unit.asks[0].video.generation_id], Path(folder))
            asked = pa.Table.from_pylist([_asked(a, str(path)) for a in unit.asks], schema=ASKED)
            found = attempt(function, self.job.metric, asked)
        seconds = (time.perf_counter() - began) / len(unit.asks)
        rows = _rows(self.job, unit, found, self._about | {"seconds": seconds})
        observe.log_failures(
            observe.failures_in(rows, "score_id"),
            stage="score",
            operator=", ".join(self.job.metric.dimensions[:1]),
        )
        return rows


def _asked(ask: Ask, path: str) -> dict[str, Any]:
    start, stop = (int(n) for n in ask.segment.split(":")) if ask.segment else (None, None)
    return {
        "path": path,
        "dimension": ask.dimension,
        "prompt": ask.video.prompt,
        "auxiliary": ask.auxiliary,
        "start_frame": start,
        "stop_frame": stop,
    }


def _about(metric: Metric) -> dict[str, Any]:
    """Columns that all scores of a metric share, by dimension where they differ."""
    environment = metric.environment()
    return {
        "vbench_version": environment.get("vbench"),
        "weights": json.dumps(metric.weights(), sort_keys=True),
        "environment": json.dumps(environment, sort_keys=True),
    }


def _failed_rows(job: ScoreJob, unit: Unit, failure: Failed) -> pa.Table:
    return _rows(job, unit, results(job.metric.writes, [failure] * len(unit.asks)), {})


def _rows(job: ScoreJob, unit: Unit, found: pa.Table, about: Mapping[str, Any]) -> pa.Table:
    """Rows of `scores` from what a metric gave."""
    keys = {d: job.metric.key(d) for d in {a.dimension for a in unit.asks}}
    rows = []
    for ask, row in zip(unit.asks, found.to_pylist(), strict=True):
        dimension, raw = DIMENSIONS[ask.dimension], row["raw_score"]
        scaled = None if raw is None else raw * dimension.scale
        rows.append(
            dict.fromkeys(SCORES.names)
            | about
            | row
            | {
                "error_transient": row["transient"] if row["error_type"] else None,
                "score_id": ask.score_id(keys[ask.dimension]),
                "generation_id": ask.video.generation_id,
                "model": ask.video.model,
                "prompt": ask.video.prompt,
                "sample": ask.video.sample,
                "video_sha256": ask.video.sha256,
                "dimension": ask.dimension,
                "segment": ask.segment,
                "implementation": job.metric.implementation,
                "score": scaled,
                "raw_unit": dimension.unit,
                "normalised_score": None if scaled is None else normalised(ask.dimension, scaled),
                "constants": CONSTANTS_VERSION,
                "fingerprint": keys[ask.dimension],
                "created_at": datetime.datetime.now(datetime.UTC),
                "run_id": job.run_id,
            }
        )
    return pa.Table.from_pylist(rows, schema=SCORES)
