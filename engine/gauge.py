"""The Ray actor that measures stored rows.

It holds what operators loaded, reads pictures itself, and pins what goes wrong on single rows.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import lance
import pyarrow as pa
import pyarrow.compute as pc

from engine import logs, observe, storage
from engine.blobs import read_blobs
from engine.operator import FAILURE, Failed, Operator, results
from engine.tables import table_uri

PICTURES = pa.list_(pa.struct([("time_s", pa.float64()), ("jpeg", pa.binary())]))
"""Type of the column `keyframes` that operators read."""
ADDRESSES = pa.list_(pa.struct([("time_s", pa.float64()), ("address", pa.uint64())]))
"""What the driver gives in its place: where each picture lies in the table `keyframes`."""
_TRANSIENT = (OSError, TimeoutError)  # network and disks; what content causes is none of them


class Unloadable(RuntimeError):
    """An operator's model cannot be loaded: no row's fault, and the end of the run."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a batch gave: one row each with the key, the operator's columns and `FAILURE`."""

    table: pa.Table
    seconds: float
    """In the operator's function; loading and reading pictures are not in it."""


class Gauge:
    """Measures batches of rows, one at a time, while the pictures of the next are read."""

    def __init__(
        self, root: str, environment: Sequence[tuple[str, str]], threads: int, run_id: str
    ):
        storage.take_environment(environment)
        logs.set_up_worker(run_id)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self.root = root
        self._lock = threading.Lock()
        self._functions: dict[str, Callable[[pa.Table], pa.Table]] = {}
        self._keyframes: dict[int, lance.LanceDataset] = {}

    def measure(self, operator: Operator, rows: pa.Table, version: int) -> Measured:
        """What an operator gives for rows.

        Args:
            operator: Loaded at its first batch.
            rows: The key column first, then what it reads; `keyframes` as `ADDRESSES`.
            version: Of the table `keyframes` that the addresses are of.

        Raises:
            Unloadable: The operator's `load` failed.
        """
        started = time.perf_counter()
        try:
            if "keyframes" in rows.column_names:
                rows = self._with_pictures(rows, version)
        except OSError as error:
            found = results(operator.writes, [_failure(error)] * rows.num_rows)
        else:
            with self._lock:
                function = self._function(operator)
                started = time.perf_counter()
                found = attempt(function, operator, rows)
        seconds = time.perf_counter() - started
        keyed = found.add_column(0, rows.field(0), rows.column(0))
        failures = observe.failures_in(keyed, rows.field(0).name)
        observe.log_failures(failures, stage="measure", operator=type(operator).__name__)
        return Measured(table=keyed, seconds=seconds)

    def _function(self, operator: Operator) -> Callable[[pa.Table], pa.Table]:
        key = operator.fingerprint
        if key not in self._functions:
            try:
                self._functions[key] = operator.load()
            except Exception as error:
                raise Unloadable(f"{type(operator).__name__} cannot be loaded: {error}") from error
        return self._functions[key]

    def _with_pictures(self, rows: pa.Table, version: int) -> pa.Table:
        if version not in self._keyframes:
            uri = table_uri(self.root, "keyframes")
            options = storage.lance_options(uri)
            found = lance.dataset(uri, version=version, storage_options=options)
            self._keyframes = {version: found}  # versions only move on
        wanted = rows["keyframes"].to_pylist()
        addresses = sorted({picture["address"] for row in wanted for picture in row})
        jpegs: dict[int, bytes | None] = {}
        if addresses:
            read = read_blobs(self._keyframes[version], "jpeg", addresses)
            jpegs = dict(zip(addresses, (data for _, data in read), strict=True))
        pictures = [
            [{"time_s": p["time_s"], "jpeg": jpegs[p["address"]]} for p in row] for row in wanted
        ]
        at = rows.schema.get_field_index("keyframes")
        return rows.set_column(at, "keyframes", pa.array(pictures, PICTURES))


def attempt(
    function: Callable[[pa.Table], pa.Table], operator: Operator, rows: pa.Table
) -> pa.Table:
    """A row of the operator's columns and `FAILURE` for each row given, whatever is in them.

    What the function raises is not said of a row: halves are tried by themselves, down to the rows
    that it raises on.
    """
    wanted = [*operator.writes.names, *FAILURE.names]
    try:
        found = function(rows)
    except Exception as error:  # noqa: BLE001 - whatever a model raises costs one row
        if rows.num_rows == 1:
            return results(operator.writes, [_failure(error)])
        half = rows.num_rows // 2
        parts = (rows.slice(0, half), rows.slice(half))
        return pa.concat_tables([attempt(function, operator, part) for part in parts])
    if found.column_names == operator.writes.names:
        for name in FAILURE.names:
            field = FAILURE.field(name)
            found = found.append_column(field, pa.nulls(found.num_rows, field.type))
    assert found.column_names == wanted, f"{operator} gave {found.column_names}, not {wanted}"
    assert found.num_rows == rows.num_rows, f"{operator} gave {found.num_rows} of {rows.num_rows}"
    return _without_gaps(operator, found)


def _failure(error: Exception) -> Failed:
    if isinstance(error, Failed):
        return error
    words = str(error).strip().splitlines()
    said = words[0][:500] if words else type(error).__name__
    return Failed(type(error).__name__, said, transient=isinstance(error, _TRANSIENT))


def _without_gaps(operator: Operator, found: pa.Table) -> pa.Table:
    """Says what is wrong with rows that have neither a value nor a failure."""
    gap = pc.and_(pc.is_null(found[operator.marker]), pc.is_null(found["error_type"]))
    if not pc.any(gap).as_py():
        return found
    said = {"error_type": "NoValue", "error": "it gave no value and no reason", "transient": False}
    for name, value in said.items():
        at = found.schema.get_field_index(name)
        filled = pc.if_else(gap, pa.scalar(value, FAILURE.field(name).type), found[name])
        found = found.set_column(at, FAILURE.field(name), filled)
    return found
