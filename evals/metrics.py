"""Which metric measures a dimension."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from evals.dimensions import DIMENSIONS
from evals.metric import Metric

Implementation = Literal["default", "vbench"]
_LAST = ("native",)
"""What is quick comes last: a run then ends with all its actors busy."""


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
    order = sorted(grouped, key=lambda key: key[0] in _LAST)
    return [
        _made(kind, tuple(grouped[kind, group]), cache, python, device) for kind, group in order
    ]


def _made(
    kind: str, dimensions: tuple[str, ...], cache: str, python: str | None, device: str | None
) -> Metric:
    if kind == "native":
        from evals.native import Native

        return Native(dimensions=dimensions, cache=cache, device=device)
    if kind == "static":
        from evals.static import StaticFilter

        return StaticFilter(dimensions=dimensions, cache=cache, device=device)
    from evals.package import Package

    needs = any(DIMENSIONS[name].environment != "here" for name in dimensions)
    return Package(
        dimensions=dimensions, cache=cache, device=device, python=python if needs else None
    )
