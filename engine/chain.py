"""What the values of each operator depend on, as one key: a change makes them stale."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from engine.operator import Stage


def keys(stages: Sequence[Stage], given: Mapping[str, str] | None = None) -> dict[str, str]:
    """For each operator's marker column, 16 hex digits that change when it must measure again.

    An operator depends on itself (its fingerprint), on all operators of the stages before its own,
    and in its own stage on those whose columns it reads: another watermark model redoes the
    watermark stage and what follows, and leaves what came before.

    Args:
        stages: In order.
        given: Keys of columns that come from another table.

    Raises:
        ValueError: Weights are missing: which, and how to get them.
    """
    found: dict[str, str] = {}
    before: list[str] = []
    for stage in stages:
        columns = dict(given or {})
        here = []
        for operator in stage.measures:
            read = sorted(columns[name] for name in operator.reads if name in columns)
            text = json.dumps([operator.fingerprint, before, read])
            key = hashlib.sha256(text.encode()).hexdigest()[:16]
            columns |= dict.fromkeys(operator.writes.names, key)
            found[operator.marker] = key
            here.append(key)
        before = [*before, *sorted(here)]
    return found
