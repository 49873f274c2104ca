"""What a run does, for those who watch it: Ray's metrics, and a log line for each row that failed.

Drivers count, batch by batch and as results come back, so that each row counts once whatever
becomes of workers, and nothing is done a row but for those that fail. Prometheus reads the metrics
from every node's metrics port under the names of `METRICS` with `ray_` before them, some ten
seconds later, the last ones after the driver's end. Without a connection to Ray nothing is counted.

Labels are few: `run` (the first digits of a run's id, which its log lines and its row of `runs`
have whole), `table`, `stage`, `operator`, `state` and `error_type`. No row, name or text is one.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from engine import logs

Kind = Literal["Counter", "Gauge", "Histogram"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric as Ray is told of it; its name has `reelwright_` before it."""

    kind: Kind
    about: str
    labels: tuple[str, ...] = ()


_WORK = ("table", "stage", "operator")
METRICS = {
    "rows_total": Metric(
        kind="Counter",
        about="Rows that a stage is through with, done or failed.",
        labels=(*_WORK, "state"),
    ),
    "failures_total": Metric(
        kind="Counter",
        about="Rows that a stage failed on, by class of error.",
        labels=("stage", "operator", "error_type"),
    ),
    "seconds_total": Metric(
        kind="Counter",
        about="Seconds that workers spent on rows, all of them together; exact.",
        labels=("stage", "operator"),
    ),
    "batch_seconds": Metric(
        kind="Histogram",
        about="Seconds of a batch. Ray adds up middles of buckets: for sums see seconds_total.",
        labels=("stage", "operator"),
    ),
    "frames_decoded_total": Metric(kind="Counter", about="Frames decoded out of sources."),
    "source_bytes_total": Metric(kind="Counter", about="Bytes of the sources that were read."),
    "waiting_rows": Metric(kind="Gauge", about="Rows that wait for a stage.", labels=("stage",)),
    "progress_done": Metric(
        kind="Gauge", about="What a run is through with of its present work.", labels=("stage",)
    ),
    "progress_total": Metric(
        kind="Gauge", about="All of a run's present work, known so far.", labels=("stage",)
    ),
    "dataset_rows": Metric(
        kind="Gauge",
        about="Rows of a dataset by state, as the run that ended last found them.",
        labels=("table", "state"),
    ),
    "seen_timestamp_seconds": Metric(
        kind="Gauge", about="When the driver last said something, in Unix time."
    ),
}
"""By name, without `reelwright_`; each has the label `run` besides. cluster/grafana.json shows
them."""
PREFIX = "reelwright_"
BOUNDARIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Of the histogram, in s."""
ERROR_TYPES = 40
"""Classes of errors that a process tells apart; further ones are `other`."""
LINES = 100
"""Rows that failed in one way are logged one by one, up to so many a process; tables have all."""
EVERY_S = 1.0
"""Between two reports of progress at least, but for the last."""

_log = logging.getLogger(__name__)
_CLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,59}")
_lock = threading.Lock()
_made: dict[str, Any] = {}
_known_errors: set[str] = set()
_logged: Counter[tuple[str, str, str]] = Counter()
_said: dict[str, float] = {}
_early: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
"""What was counted before Ray was there: a run connects when it has something to read."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A row that has no values, and why."""

    row_id: str
    error_type: str
    error: str
    about: Mapping[str, Any] | None = None
    """Further fields of its log line, such as its uri."""


@contextmanager
def of_run(run_id: str) -> Iterator[None]:
    """For the time of a `with`, what is counted and logged is this run's."""
    with logs.of_run(run_id):
        for kept in (_logged, _said, _early):
            kept.clear()
        _log.info("the run begins", extra=logs.fields("run_started"))
        began = time.monotonic()
        try:
            yield
        except BaseException as error:
            _ended("run_failed", began, error_type=type(error).__name__)
            raise
        _ended("run_ended", began)


def _ended(event: str, began: float, **more: Any) -> None:
    seconds = round(time.monotonic() - began, 3)
    _log.info("the run ends", extra=logs.fields(event, seconds=seconds, **more))


def worked(
    *,
    table: str,
    stage: str,
    operator: str,
    states: Mapping[str, int],
    failures: Iterable[Failure] = (),
    seconds: float | None = None,
) -> None:
    """Counts a batch that came back, and logs its failures.

    Args:
        table: That its rows are of.
        stage: Of the run, such as `scan`, or the recipe's stage.
        operator: Class of what did it.
        states: How many rows came out how: `done`, `failed`, `duplicate`.
        failures: Of those that failed.
        seconds: That a worker spent on them.
    """
    for state, num in states.items():
        _add("rows_total", num, table=table, stage=stage, operator=operator, state=state)
    if seconds is not None:
        spent(stage, operator, seconds)
    failures = list(failures)
    log_failures(failures, stage=stage, operator=operator)
    for error_type, num in Counter(_error_type(f.error_type) for f in failures).items():
        _add("failures_total", num, stage=stage, operator=operator, error_type=error_type)


def measured(
    rows: pa.Table, key: str, *, table: str, stage: str, operator: str, seconds: float | None = None
) -> None:
    """`worked`, of rows with columns `error_type` and `error`; `key` names a row."""
    failures = failures_in(rows, key)
    worked(
        table=table,
        stage=stage,
        operator=operator,
        states={"done": rows.num_rows - len(failures), "failed": len(failures)},
        failures=failures,
        seconds=seconds,
    )


def failures_in(rows: pa.Table, key: str) -> list[Failure]:
    """Those of rows with columns `error_type` and `error`; `key` names a row."""
    if rows["error_type"].null_count == rows.num_rows:
        return []
    wrong = rows.filter(pc.is_valid(rows["error_type"]))
    columns = (wrong[name].to_pylist() for name in (key, "error_type", "error"))
    return [Failure(*values) for values in zip(*columns, strict=True)]


def spent(stage: str, operator: str, seconds: float) -> None:
    """Counts a worker's time on a batch, or on a source."""
    _add("seconds_total", seconds, stage=stage, operator=operator)
    _tell("batch_seconds", "observe", seconds, stage=stage, operator=operator)


def decoded(*, frames: int = 0, num_bytes: int = 0) -> None:
    """Counts what was read and decoded of sources."""
    _add("frames_decoded_total", frames)
    _add("source_bytes_total", num_bytes)


def progress(stage: str, done: int, total: int, *, waiting: int | None = None) -> None:
    """Says how far the present work is: once a second, and when it is done.

    Args:
        stage: Its name: one of a few.
        done: So much is done.
        total: Of so much.
        waiting: Rows that wait for a worker; by default what is not done.
    """
    now = time.monotonic()
    if not total or (done < total and now - _said.get(stage, -EVERY_S) < EVERY_S):
        return
    _said[stage] = now
    _tell("progress_done", "set", done, stage=stage)
    _tell("progress_total", "set", total, stage=stage)
    _tell("waiting_rows", "set", total - done if waiting is None else waiting, stage=stage)
    _tell("seen_timestamp_seconds", "set", time.time())


def holds(tables: Mapping[str, Mapping[str, int]]) -> None:
    """Says what a dataset holds: by table and state, how many rows."""
    for table, states in tables.items():
        for state, num in states.items():
            _tell("dataset_rows", "set", num, table=table, state=state)


def _add(name: str, num: float, **labels: str) -> None:
    if num > 0:
        _tell(name, "inc", num, **labels)


def _tell(name: str, how: str, value: float, **labels: str) -> None:
    if (run_id := logs.run_id()) is None:
        return
    if not _connected():
        if how == "inc":
            _early[name, tuple(labels.items())] += value
        return
    while _early:
        (earlier, kept), num = _early.popitem()
        _metric(earlier).inc(num, tags={"run": run_id[:8], **dict(kept)})
    getattr(_metric(name), how)(value, tags={"run": run_id[:8], **labels})


def _metric(name: str) -> Any:
    with _lock:
        return _made.get(name) or _make(name)


def _connected() -> bool:
    ray = sys.modules.get("ray")  # who has not imported it is not connected
    return ray is not None and ray.is_initialized()


def _make(name: str) -> Any:
    """Made once a process: Ray keeps it over connections."""
    import ray.util.metrics

    about = METRICS[name]
    more = {"boundaries": list(BOUNDARIES)} if about.kind == "Histogram" else {}
    made = getattr(ray.util.metrics, about.kind)(
        PREFIX + name, description=about.about, tag_keys=("run", *about.labels), **more
    )
    _made[name] = made
    return made


def _error_type(name: str) -> str:
    """A label's value: a class's name, of a limited number of classes."""
    with _lock:
        if name in _known_errors:
            return name
        if len(_known_errors) >= ERROR_TYPES or not _CLASS.fullmatch(name):
            return "other"
        _known_errors.add(name)
    return name


def log_failures(failures: Iterable[Failure], *, stage: str, operator: str) -> None:
    """A line for each, up to `LINES` of a kind: what workers call, whose rows drivers count."""
    if not _log.isEnabledFor(logging.INFO):
        return
    for failure in failures:
        about = {"stage": stage, "operator": operator, "error_type": failure.error_type}
        kind = (stage, operator, failure.error_type)
        _logged[kind] += 1
        if _logged[kind] <= LINES:
            more = {"row_id": failure.row_id, **(failure.about or {})}
            _log.info("%s", failure.error, extra=logs.fields("row_failed", **about, **more))
        elif _logged[kind] == LINES + 1:
            said = "further rows that fail like this are not logged: the tables have them all"
            _log.warning(said, extra=logs.fields("failures_not_logged", **about))
