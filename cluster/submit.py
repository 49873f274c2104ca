"""`ray job submit`, with an id that follows from what is asked, watched, and tried again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Submit:
    """Submits a script of this project as a Ray job, and follows it."""


def submit(args: Submit) -> int:
    """`python -m cluster submit`."""
    raise NotImplementedError
