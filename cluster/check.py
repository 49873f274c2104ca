"""The preflight: what would go wrong in a long job, told before it starts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Check:
    """Tells what is wrong with a cluster, its machines and what a job needs."""


def check(args: Check) -> int:
    """`python -m cluster check`."""
    raise NotImplementedError
