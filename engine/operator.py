"""What a curation is made of: an Operator measures, a Rule decides, a Stage joins them."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class Operator(ABC):
    """A measurement as a value: what it reads, what it writes, and its parameters.

    A few hundred bytes, safe to pickle; weights live only inside the function that `load` gives.
    """

    reads: ClassVar[tuple[str, ...]]
    """Columns it needs."""
    writes: ClassVar[pa.Schema]
    """Columns it produces: exact Arrow types, with `unit` and `source` in the field metadata."""
    version: ClassVar[int] = 1
    """Raised when the numbers change for the same parameters."""
    libraries: ClassVar[tuple[str, ...]] = ()
    """Distributions that compute the numbers; their major.minor versions are in the fingerprint."""

    @abstractmethod
    def load(self) -> Callable[[pa.Table], pa.Table]:
        """The function that measures: a table with `reads` in, one with `writes` out."""

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


def _plain(value: Any) -> Any:
    if isinstance(value, Operator):
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
