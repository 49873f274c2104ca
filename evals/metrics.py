"""Which metric measures a dimension."""

from __future__ import annotations

import dataclasses
import importlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from evals.dimensions import DIMENSIONS
from evals.metric import Metric

Implementation = Literal["default", "vbench"]
_CLASSES = {"vbench": "evals.package:Package", "native": "evals.native:Native"}
"""What `Dimension.implementations` names; any other metric is there by its module and class."""


def choose(
    dimensions: Sequence[str],
    *,
    cache: str,
    python: str | None = None,
    implementation: Implementation = "default",
    device: str | None = None,
) -> list[Metric]:
    """Metrics for these dimensions, those that take long first.

    Args:
        dimensions: Names in `evals.dimensions`.
        cache: Folder with VBench's weights.
        python: Of VBench's own environment, for dimensions that need it.
        implementation: The package for all that it measures, or ours where there is one.
        device: cpu or cuda; None is a GPU where the cluster has one.
    """
    grouped: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in dimensions:
        dimension = DIMENSIONS[name]
        of = dimension.implementations
        chosen = implementation if implementation in of else of[0]
        grouped[chosen, "" if chosen == "native" else dimension.group].append(name)
    # detectors take longest by far, and our own the least: a run ends with all its actors busy
    order = sorted(grouped, key=lambda key: (key[0] == "native", not _is_apart(grouped[key])))
    return [
        _made(kind, tuple(grouped[kind, group]), cache, python, device) for kind, group in order
    ]


def _is_apart(dimensions: Sequence[str]) -> bool:
    """Whether the package measures some of these in an environment of its own."""
    return any(DIMENSIONS[name].environment != "here" for name in dimensions)


def _made(
    kind: str, dimensions: tuple[str, ...], cache: str, python: str | None, device: str | None
) -> Metric:
    module, name = _CLASSES.get(kind, kind).split(":")
    metric: type[Metric] = getattr(importlib.import_module(module), name)
    given = {"cache": cache, "device": device, "python": python if _is_apart(dimensions) else None}
    known = {field.name for field in dataclasses.fields(metric)}
    return metric(dimensions=dimensions, **{n: v for n, v in given.items() if n in known})
