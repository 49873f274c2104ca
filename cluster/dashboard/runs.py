"""Runs of datasets for the page that shows them: what was done when, with what, and what failed."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import lance
import pyarrow as pa
import streamlit as st

from cluster.dashboard import lance_sql, markup
from cluster.dashboard.lance_sql import quoted
from engine.schema import RUNS, TABLES
from evals.evaluation import KIND
from evals.metric import NO_OBJECT
from evals.recipes import TINY

_WITH_RUN = ("sources", "cuts", "features", "generations", "scores")
"""Tables whose rows say which run wrote them."""
_OF_SOURCES = ("clips", "pairs")
"""Those that belong to the run that read their source."""
_DOING = {
    "sources": "", "cuts": "mode", "features": "kind", "generations": "model",
    "scores": "dimension", "clips": "error_operator", "pairs": "error_operator",
}  # fmt: skip
"""The column that says what failed at."""
_SHOWN = 200  # characters of a message


@dataclass(frozen=True, kw_only=True)
class Run:
    """A row of `runs`, with what is JSON in it read."""

    root: str
    run_id: str
    recipe: str
    kind: str
    """curation, evaluation or night."""
    night: str | None
    started_at: datetime
    seconds: float | None
    interrupted: bool
    frames_decoded: int | None
    git_commit: str | None
    resolved: Mapping[str, Any]
    operators: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str | None]
    counts: Mapping[str, Any]
    src: tuple[str, ...]

    @property
    def is_tiny(self) -> bool:
        """Its recipe has small random weights."""
        return self.recipe == TINY.rstrip("_") or self.recipe.startswith(TINY)

    @property
    def label(self) -> str:
        """For a list of choices."""
        when = f"{self.started_at:%Y-%m-%d %H:%M}"
        night = f" of {self.night}" if self.night else ""
        return f"{when} · {self.kind}{night} · {self.recipe} · {self.run_id[:8]}"

    @property
    def state(self) -> str:
        """Whether it came to its end."""
        if not self.interrupted:
            return "ended"
        return "under way, or died" if self.seconds is None else "interrupted"


def runs(roots: Sequence[str]) -> list[Run]:
    """Of these datasets, the newest first."""
    found = [
        run
        for root in dict.fromkeys(roots)
        if lance_sql.has_rows(root, "runs")
        for run in _runs(lance_sql.newest(root, "runs"), root)
    ]
    return sorted(found, key=lambda run: run.started_at, reverse=True)


@st.cache_resource(max_entries=4, show_spinner=False, hash_funcs=lance_sql.BY_STAMP)
def _runs(table: lance.LanceDataset, root: str) -> list[Run]:
    there = [name for name in RUNS.names if name in table.schema.names]
    rows = table.to_table(columns=there).to_pylist()
    return [_run(root, dict.fromkeys(RUNS.names) | row) for row in rows]


def _run(root: str, row: Mapping[str, Any]) -> Run:
    recipe = row["recipe"] or "–"
    is_evaluation = recipe.startswith(KIND)
    kind = "night" if row["night"] else "evaluation" if is_evaluation else "curation"
    names = ("run_id", "night", "started_at", "seconds", "frames_decoded", "git_commit")
    return Run(
        root=root,
        recipe=recipe.removeprefix(KIND),
        kind=kind,
        interrupted=bool(row["interrupted"]),
        src=tuple(_read(row["src"], list)),
        **{name: _read(row[name], dict) for name in ("resolved", "operators", "versions")},
        counts=_read(row["counts"], dict),
        **{name: row[name] for name in names},
    )


def _read(text: str | None, kind: type) -> Any:
    """JSON of this kind; an empty one where there is none, or another version wrote it."""
    try:
        found = json.loads(text or "null")
    except json.JSONDecodeError:
        found = None
    return found if isinstance(found, kind) else kind()


def summary(run: Run) -> str:
    """What came of it, in a few words."""
    counts, told = run.counts, list[str]()
    for table in ("clips", "scores"):
        found = counts.get(table)
        if isinstance(found, Mapping):
            told += [f"{n:,} {what}" for what, n in found.items()
                     if isinstance(n, int) and n and what != "total"]  # fmt: skip
    if isinstance(sources := counts.get("sources"), Mapping) and sources.get("total"):
        told.insert(0, f"{sources['total']:,} sources")
    return ", ".join(told) or "–"


def work(run: Run) -> list[dict[str, Any]]:
    """Seconds and rows of each operator (curation), or of models and dimensions (evaluation)."""
    if run.operators:
        return [
            {"what": name, "seconds": of.get("seconds") or 0.0, "rows": of.get("rows") or 0,
             "failed": of.get("failed") or 0}
            for name, of in run.operators.items()
        ]  # fmt: skip
    found = []
    if run.kind == "curation":
        return found
    of_run = f"run_id = {quoted(run.run_id)}"
    if lance_sql.has_rows(run.root, "scores"):
        query = (
            "SELECT 'score ' || dimension AS what, coalesce(sum(seconds), 0) AS seconds,"
            " count(*) AS rows, count(error_type) AS failed FROM rows GROUP BY dimension"
        )
        columns = ("dimension", "seconds", "error_type")
        found += lance_sql.streamed(run.root, "scores", columns, query, of_run).to_pylist()
    if lance_sql.has_rows(run.root, "generations"):
        rows = lance_sql.newest(run.root, "generations").to_table(
            columns=["model", "timings", "error_type"], filter=of_run
        )
        of: dict[str, dict[str, Any]] = {}
        for row in rows.to_pylist():
            one = of.setdefault(
                row["model"],
                {"what": f"generate {row['model']}", "seconds": 0.0, "rows": 0, "failed": 0},
            )
            timings = _read(row["timings"], dict).values()
            one["seconds"] += sum(t for t in timings if isinstance(t, int | float))
            one["rows"] += 1
            one["failed"] += row["error_type"] is not None
        found += of.values()
    return found


def failures(run: Run) -> list[dict[str, Any]]:
    """What failed in it: where, at what, the error, whether it may pass, and how often."""
    found: list[dict[str, Any]] = []
    for name in (*_WITH_RUN, *_OF_SOURCES):
        if not lance_sql.has_rows(run.root, name):
            continue
        columns = ("error_type", "error", _flag(name), *filter(None, [_DOING[name]]))
        if name in _WITH_RUN:
            where = f"error_type IS NOT NULL AND run_id = {quoted(run.run_id)}"
            rows = lance_sql.streamed(run.root, name, columns, _counted(name), where)
        else:
            rows = _of_sources(
                lance_sql.newest(run.root, name),
                lance_sql.newest(run.root, "sources"),
                name,
                columns,
                run.run_id,
            )
        found += rows.to_pylist()
    return sorted(found, key=lambda one: -one["count"])


@st.cache_resource(max_entries=32, show_spinner=False, hash_funcs=lance_sql.BY_STAMP)
def _of_sources(
    table: lance.LanceDataset,
    sources: lance.LanceDataset,
    name: str,
    columns: tuple[str, ...],
    run_id: str,
) -> pa.Table:
    """Failures of rows whose source this run was the last to read."""
    there = [column for column in (*columns, "source_id") if column in table.schema.names]
    failed = table.to_table(columns=there, filter="error_type IS NOT NULL")
    read = sources.to_table(columns=["source_id"], filter=f"run_id = {quoted(run_id)}")
    # for columns that an older dataset lacks
    none = pa.schema([TABLES[name].field(column) for column in columns]).empty_table()
    rows = "FROM failed SEMI JOIN read USING (source_id) UNION ALL BY NAME FROM none"
    return lance_sql.sql(
        f"WITH rows AS ({rows}) {_counted(name)}", failed=failed, read=read, none=none
    )


def _flag(name: str) -> str:
    """The column that says whether an error may pass."""
    return "transient" if name == "sources" else "error_transient"


def _counted(name: str) -> str:
    """SQL over failed `rows` of a table: equal ones together, the most frequent first."""
    at = f"coalesce(nullif({_DOING[name]}, ''), 'scan')" if _DOING[name] else "'scan'"
    same = f'{at} AS "at", error_type, error, {_flag(name)} AS may_pass'
    # messages are made one line after rows were counted: there are few of them
    said = r"trim(regexp_replace(coalesce(error, ''), '\s+', ' ', 'g'))"
    told = f"SELECT *, {said} AS said FROM (SELECT {same}, count(*) AS num FROM rows GROUP BY ALL)"
    return (
        f'SELECT \'{name}\' AS "table", "at", error_type,'
        f" CASE WHEN length(said) > {_SHOWN} THEN left(said, {_SHOWN}) || ' …' ELSE said END"
        f" AS message, CASE WHEN error_type = {quoted(NO_OBJECT)} THEN 'left out'"
        " WHEN may_pass THEN 'may pass' ELSE 'final' END AS kind, sum(num)::BIGINT AS count"
        f' FROM ({told}) GROUP BY ALL ORDER BY count DESC, "at", error_type, message'
    )


_STEP = " › "
_MANY = 2
"""Places that differ alike, above which they are told as one."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A value that differs between two runs, or one that differs alike in several places."""

    path: str
    """Entries of lists stand in brackets, by name where they have one."""
    before: Any
    """None where there was none."""
    after: Any
    places: int = 1


def changed(before: Any, after: Any) -> list[Change]:
    """Where two nested values differ; what only one of them has is told as a whole."""
    alike: dict[tuple[str, str, str], list[Change]] = defaultdict(list)
    for one in _changes(before, after, ""):
        shape = _STEP.join("[…]" if step[:1] == "[" else step for step in one.path.split(_STEP))
        alike[shape, repr(one.before), repr(one.after)].append(one)
    found = []
    for (shape, _, _), some in alike.items():
        if len(some) > _MANY:
            found.append(dataclasses.replace(some[0], path=shape, places=len(some)))
        else:
            found += some
    return found


def _changes(before: Any, after: Any, at: str) -> Iterator[Change]:
    old, new = _parts(before), _parts(after)
    if old is None or new is None:
        if before != after:
            yield Change(path=at, before=before, after=after)
        return
    for name in dict.fromkeys([*old, *new]):
        path = f"{at}{_STEP}{name}" if at else name
        yield from _changes(old.get(name), new.get(name), path)


def _parts(value: Any) -> dict[str, Any] | None:
    """What a nested value consists of, by name; None for a plain one."""
    if isinstance(value, Mapping):
        return {str(key): one for key, one in value.items()}
    if isinstance(value, list) and any(isinstance(one, Mapping | list) for one in value):
        names = [markup.name_of(one) for one in value]
        unique = None not in names and len(set(names)) == len(names)
        return {f"[{names[n] if unique else n}]": one for n, one in enumerate(value)}
    return None


def num_leaves(value: Any) -> int:
    """Plain values within a nested one."""
    parts = _parts(value)
    return 1 if parts is None else sum(num_leaves(one) for one in parts.values())
