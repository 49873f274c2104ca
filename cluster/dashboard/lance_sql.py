"""Lance tables for pages: columns that are read once a version, and SQL over them.

DuckDB cannot open every Lance table by itself (float16, blobs), so it gets what a scanner read:
only the columns that a page names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import duckdb
import lance
import pyarrow as pa
import streamlit as st

from engine import tables
from engine.schema import TABLES
from engine.tables import NoTable

_Opened = dict[tuple[str, str], lance.LanceDataset]
_opened: ContextVar[_Opened | None] = ContextVar("opened", default=None)


@contextmanager
def snapshot() -> Iterator[None]:
    """In a `with` and its thread, each table is opened once: what is read of it fits together."""
    before = _opened.set({})
    try:
        yield
    finally:
        _opened.reset(before)


def newest(root: str, name: str) -> lance.LanceDataset:
    """A table as it is now, or as this `snapshot` saw it first; runs may be writing to it.

    Raises:
        DatasetError: There is no dataset, or it lacks the table, or the table is damaged.
    """
    opened = _opened.get()
    if opened is None:
        return tables.read(root, name)
    if (root, name) not in opened:
        opened[root, name] = tables.read(root, name)
    return opened[root, name]


def stamp(table: lance.LanceDataset) -> tuple[str, int, str]:
    """What tells a state of a table from all others.

    The version alone does not: a dataset that is made anew in the same place counts from 1 again.
    """
    fragments = table.get_fragments()
    file = fragments[0].data_files()[0].path if fragments else ""  # its name is random
    return table.uri, table.version, file


BY_STAMP: dict[str | type, Callable[[Any], Any]] = {lance.LanceDataset: stamp}
"""`hash_funcs` of Streamlit's caches, for functions that are given an opened table."""


def has_rows(root: str, name: str) -> bool:
    """Whether a table is there and holds anything; a damaged one is raised, not hidden."""
    try:
        return newest(root, name).count_rows() > 0
    except NoTable:
        return False


def columns(root: str, name: str, wanted: tuple[str, ...], where: str | None = None) -> pa.Table:
    """Columns of a table, read once for each of its states.

    A column that an older dataset lacks is null. Shared between sessions: never changed.

    Args:
        root: The dataset.
        name: Of the table.
        wanted: Names of columns, none of them a blob.
        where: Lance's (DataFusion's) filter.
    """
    return _columns(newest(root, name), name, wanted, where)


# few: while a run writes, each of its commits adds one, and a million clips have 100 MB
@st.cache_resource(max_entries=8, show_spinner=False, hash_funcs=BY_STAMP)
def _columns(
    table: lance.LanceDataset, name: str, wanted: tuple[str, ...], where: str | None
) -> pa.Table:
    there = [column for column in wanted if column in table.schema.names]
    found = table.to_table(columns=there, filter=where)
    for column in wanted:
        if column not in there:
            kind = TABLES[name].field(column).type
            found = found.append_column(column, pa.nulls(found.num_rows, kind))
    return found.select(list(wanted))


def streamed(
    root: str, name: str, wanted: tuple[str, ...], query: str, where: str | None = None
) -> pa.Table:
    """DuckDB's answer to a query over `rows`: columns of a table that pass by and are not kept.

    For sums over many rows; the answer is computed once for each state of the table. A column
    that an older dataset lacks is null.

    Args:
        root: The dataset.
        name: Of the table.
        wanted: Columns of `rows`, none of them a blob, and at least one of them there.
        query: What is asked of `rows`; its answer is small.
        where: Lance's (DataFusion's) filter.
    """
    return _streamed(newest(root, name), name, wanted, query, where)


@st.cache_resource(max_entries=64, show_spinner=False, hash_funcs=BY_STAMP)
def _streamed(
    table: lance.LanceDataset, name: str, wanted: tuple[str, ...], query: str, where: str | None
) -> pa.Table:
    there = [column for column in wanted if column in table.schema.names]
    reader = table.scanner(columns=there, filter=where).to_reader()
    parts = [identifier(column) for column in there]
    parts += [
        f"NULL::{_sql_type(name, column)} AS {identifier(column)}"
        for column in wanted
        if column not in there
    ]
    with _connection() as connection:
        connection.register("there", reader)
        named = f"WITH rows AS (SELECT {', '.join(parts)} FROM there) "
        return connection.sql(named + query).to_arrow_table()


def _sql_type(name: str, column: str) -> str:
    kind = TABLES[name].field(column).type
    if pa.types.is_boolean(kind):
        return "BOOLEAN"
    if pa.types.is_integer(kind):
        return "BIGINT"
    return "DOUBLE" if pa.types.is_floating(kind) else "VARCHAR"


def quoted(text: str) -> str:
    """Text as a literal of SQL, for DuckDB and for Lance's filters."""
    return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
    """The name of a column as DuckDB takes any."""
    return '"' + name.replace('"', '""') + '"'


def sql(query: str, **named: pa.Table) -> pa.Table:
    """The answer of DuckDB to a query over Arrow tables, each under its name."""
    with _connection() as connection:
        for name, table in named.items():
            connection.register(name, table)
        return connection.sql(query).to_arrow_table()


@contextmanager
def _connection() -> Iterator[duckdb.DuckDBPyConnection]:
    # names and texts come from datasets of others: whatever they make of a query touches no file
    with duckdb.connect(config={"enable_external_access": "false"}) as connection:
        connection.execute("SET TimeZone='UTC'")
        yield connection
