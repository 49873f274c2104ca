"""Lance tables for pages: columns that are read once a version, and SQL over them.

DuckDB cannot open every Lance table by itself (float16, blobs), so it gets what a scanner read:
only the columns that a page names.
"""

from __future__ import annotations

import duckdb
import lance
import pyarrow as pa
import streamlit as st

from engine import tables
from engine.schema import TABLES
from engine.tables import DatasetError


def newest(root: str, name: str) -> lance.LanceDataset:
    """A table as it is now; runs may be writing to it.

    Raises:
        DatasetError: There is no dataset, or it lacks the table, or the table is damaged.
    """
    return tables.read(root, name)


def has_rows(root: str, name: str) -> bool:
    """Whether a table is there and holds anything; a damaged one is raised, not hidden."""
    try:
        return newest(root, name).count_rows() > 0
    except DatasetError as error:
        if "has no table" in str(error):
            return False
        raise


def columns(root: str, name: str, wanted: tuple[str, ...], where: str | None = None) -> pa.Table:
    """Columns of a table, read once for each of its versions.

    A column that an older dataset lacks is null. Shared between sessions: never changed.

    Args:
        root: The dataset.
        name: Of the table.
        wanted: Names of columns, none of them a blob.
        where: Lance's (DataFusion's) filter.
    """
    table = newest(root, name)
    return _columns(root, name, table.version, wanted, where)


@st.cache_resource(max_entries=64, show_spinner=False)
def _columns(
    root: str, name: str, version: int, wanted: tuple[str, ...], where: str | None
) -> pa.Table:
    table = tables.read(root, name, version=version)
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

    For sums over many rows; the answer is computed once for each version of the table. A column
    that an older dataset lacks is null.

    Args:
        root: The dataset.
        name: Of the table.
        wanted: Columns of `rows`, none of them a blob.
        query: What is asked of `rows`; its answer is small.
        where: Lance's (DataFusion's) filter.
    """
    table = newest(root, name)
    return _streamed(root, name, table.version, wanted, query, where)


@st.cache_resource(max_entries=256, show_spinner=False)
def _streamed(
    root: str, name: str, version: int, wanted: tuple[str, ...], query: str, where: str | None
) -> pa.Table:
    table = tables.read(root, name, version=version)
    there = [column for column in wanted if column in table.schema.names]
    lacking = [column for column in wanted if column not in there]
    reader = table.scanner(columns=there, filter=where).to_reader()
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone='UTC'")
        connection.register("there", reader)
        nulls = "".join(f", NULL::{_sql_type(name, column)} AS {column}" for column in lacking)
        named = f"WITH rows AS (SELECT {', '.join(there)}{nulls} FROM there) "
        return connection.sql(named + query).to_arrow_table()


def _sql_type(name: str, column: str) -> str:
    kind = TABLES[name].field(column).type
    if pa.types.is_boolean(kind):
        return "BOOLEAN"
    if pa.types.is_integer(kind):
        return "BIGINT"
    return "DOUBLE" if pa.types.is_floating(kind) else "VARCHAR"


def sql(query: str, **named: pa.Table) -> pa.Table:
    """The answer of DuckDB to a query over Arrow tables, each under its name."""
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone='UTC'")
        for name, table in named.items():
            connection.register(name, table)
        return connection.sql(query).to_arrow_table()
