"""What a curation is made of: an Operator measures, a Rule decides, a Stage joins them."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa

if TYPE_CHECKING:
    from engine.duplicates import Distinct


class Failed(Exception):
    """A measurement that gave no result: what a row records of it.

    Args:
        error_type: Class of what went wrong, such as `DecodeError`.
        message: For a person: what was needed, what was found.
        transient: It may pass (network, rights, a lost worker): the next run tries again.
    """

    def __init__(self, error_type: str, message: str, *, transient: bool = False):
        super().__init__(message)
        self.error_type, self.message, self.transient = error_type, message, transient


def resource(default: float | None) -> Any:
    """A field that says where an operator runs; it is no part of the fingerprint."""
    return dataclasses.field(default=default, metadata={"resource": True})


@dataclass(frozen=True, kw_only=True)
class Operator(ABC):
    """A measurement as a value: what it reads, what it writes, and its parameters.

    A few hundred bytes, safe to pickle; weights live only inside the function that `load` gives.
    """

    reads: ClassVar[tuple[str, ...]]
    """Columns it needs; a row that lacks one is not measured. `keyframes` is a clip's pictures in
    order of time: list<struct<time_s: float64, jpeg: binary>>."""
    writes: ClassVar[pa.Schema]
    """Columns it produces: exact Arrow types, with `unit` and `source` in the field metadata. The
    first that is no list (`marker`) is null only where the measurement failed."""
    version: ClassVar[int] = 1
    """Raised when the numbers change for the same parameters."""
    libraries: ClassVar[tuple[str, ...]] = ()
    """Distributions that compute the numbers; their major.minor versions are in the fingerprint."""
    media: ClassVar[tuple[str, ...]] = ("video", "image")
    """What it can be measured on."""
    row: ClassVar[str] = "clip"
    """What a row of its table is; others than clips (and pairs) are a scan's own business."""

    batch_size: int = resource(32)
    """Rows given to one call."""
    num_cpus: float = resource(1.0)
    """Share of CPU cores that one copy takes."""
    num_gpus: float = resource(0.0)
    """Share of a GPU that one copy takes, where the cluster has any."""
    copies: int | None = resource(None)
    """How many copies there may be at most; None is as many as there is room for."""

    @abstractmethod
    def load(self) -> Callable[[pa.Table], pa.Table]:
        """The function that measures: a table with `reads` in, one with `writes` out.

        Rows that cannot be measured come back with `FAILURE` beside (see `results`); what the
        function raises is pinned on single rows by trying them alone.
        """

    def check(self) -> None:  # noqa: B027 - most operators need nothing
        """Raises ValueError, with what to do, where something it needs (weights) is missing."""

    @property
    def marker(self) -> str:
        """The column that tells whether a row was measured: the first that is small."""
        return next(f.name for f in self.writes if not pa.types.is_nested(f.type))

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change when, and only when, stored values must be measured again."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """Class, version, parameters and library versions, as JSON values."""
        return {
            "operator": type(self).__name__,
            "version": self.version,
            "parameters": {
                f.name: _plain(getattr(self, f.name))
                for f in dataclasses.fields(self)
                if not f.metadata.get("resource")  # where it runs does not change what it measures
            },
            "libraries": {
                name: ".".join(importlib.metadata.version(name).split(".")[:2])
                for name in self.libraries
            },
        }


FAILURE = pa.schema(
    [("error_type", pa.string()), ("error", pa.string()), ("transient", pa.bool_())]
)
"""Columns that an operator may give beside those it writes: why a row has no values."""


def results(writes: pa.Schema, rows: Sequence[Mapping[str, Any] | Failed]) -> pa.Table:
    """What an operator's function gives: a row of `writes` each, or why there is none.

    Args:
        writes: The operator's.
        rows: In order; values by column, or the failure of that row.
    """
    columns = [
        pa.array([None if isinstance(r, Failed) else r[f.name] for r in rows], f.type)
        for f in writes
    ]
    for name in FAILURE.names:
        attribute = "message" if name == "error" else name
        found = [getattr(r, attribute) if isinstance(r, Failed) else None for r in rows]
        columns.append(pa.array(found, FAILURE.field(name).type))
    return pa.table(columns, schema=pa.schema([*writes, *FAILURE]))


def _plain(value: Any) -> Any:
    if hasattr(value, "describe"):  # an operator within an operator, or weights
        return value.describe()
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Keeps a row whose `column` lies in [lo, hi]; `above` is a lower bound that is out itself."""

    column: str
    lo: float | None = None
    hi: float | None = None
    above: float | None = None
    empty: bool = False
    """Of a column of words: a row with any word is out, and the word is part of the reason."""

    @property
    def bounds(self) -> tuple[tuple[str, float], ...]:
        """What gets a row rejected: pairs of a comparison and its bound, e.g. `("<", 65)`."""
        named = (("<", self.lo), ("<=", self.above), (">", self.hi))
        return tuple((sign, bound) for sign, bound in named if bound is not None)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Operators that measure, then rules that decide on what is stored."""

    name: str
    operators: tuple[Operator, ...] = ()
    rules: tuple[Rule, ...] = ()
    distinct: Distinct | None = None
    """Which of the clips that all rules keep count as the same; one of them stays."""

    @property
    def measures(self) -> tuple[Operator, ...]:
        """Its operators over stored rows."""
        return tuple(o for o in self.operators if o.row == "clip")
