"""Cells gathered into rows of models: what may be compared, and what is derived from several.

Ranks and totals are refused while something that they are made of is missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from evals import leaderboard
from evals.presets import Column, Preset, preset_named
from evals.ranks import average_ranks
from evals.results import Cell

_PARTS = {
    "quality": leaderboard.QUALITY,
    "semantic": leaderboard.SEMANTIC,
    "total": tuple(leaderboard.BOUNDS),
}
"""Dimensions that VBench's totals are made of."""
_SELECTED = {"color", "temporal_flickering"}
"""Dimensions that leave out videos by what is in them."""


@dataclass(frozen=True)
class Model:
    """A row to be: a model's cells, ours or published in one place."""

    name: str
    published: str | None
    cells: Mapping[tuple[str, str | None], Cell]
    """By column and category."""

    @property
    def key(self) -> str:
        """What tells it from rows of the same name that were published elsewhere."""
        return f"{self.name} ({self.published or 'ours'})"

    def cell(self, column: Column, category: str | None = None) -> Cell | None:
        """Its cell of a column, over all videos or a category's."""
        return self.cells.get((column.dimension, category))

    def counts(self, column: Column, category: str | None = None) -> bool:
        """It has a number that may be compared with others."""
        return is_whole(self.cell(column, category))


def category_ranks(
    preset: Preset | str, cells: Iterable[Cell], *, models: Sequence[str] | None = None
) -> dict[str, dict[str, float]]:
    """Average rank over the preset's columns, by category and model: 1 is best.

    Raises:
        ValueError: It cannot be told, because something is missing.
    """
    preset = preset_named(preset) if isinstance(preset, str) else preset
    shown = models_of(preset, list(cells), models)
    found = {}
    for category in categories_of(shown):
        reason = obstacle(preset.columns, shown, category)
        if reason:
            raise ValueError(f"no ranks in category {category!r}: {reason}")
        by_key = ranked(preset.columns, shown, category)
        found[category] = {one.name: by_key[one.key] for one in shown}
    return found


def models_of(preset: Preset, cells: Sequence[Cell], chosen: Sequence[str] | None) -> list[Model]:
    """Rows to be, published ones first.

    Raises:
        ValueError: A model has two of the same cell, or there is nothing to show.
    """
    wanted = {column.dimension for column in preset.columns}
    if "totals" in preset.extras:
        wanted.update(*_PARTS.values())
    found: dict[tuple[str, str | None], dict[tuple[str, str | None], Cell]] = {}
    for cell in cells:
        if cell.column not in wanted or (cell.category is not None) != preset.by_category:
            continue
        own = found.setdefault((cell.model, cell.published), {})
        if (cell.column, cell.category) in own:
            raise ValueError(
                f"two cells of {cell.model!r} in {cell.column}"
                f" (category {cell.category}): give each model another name"
            )
        own[cell.column, cell.category] = cell
    keys = [key for key in found if key[1] is not None]
    keys += [(name, None) for name in _ours(cells, chosen)]
    if not keys or (preset.by_category and not found):
        by = " by category" if preset.by_category else ""
        there = ", ".join(sorted({cell.column for cell in cells})) or "none"
        raise ValueError(
            f"table {preset.name} has nothing to show: it needs cells{by} of"
            f" {', '.join(sorted(wanted))}; cells are of: {there}"
        )
    return [Model(*key, found.get(key, {})) for key in keys]


def _ours(cells: Sequence[Cell], chosen: Sequence[str] | None) -> list[str]:
    """Names of our models; one without a cell of the table is there with dashes.

    Raises:
        ValueError: A chosen one has no cell at all.
    """
    there = list(dict.fromkeys(cell.model for cell in cells if cell.published is None))
    unknown = [name for name in chosen or () if name not in there]
    if unknown:
        raise ValueError(
            f"no cell is of model {', '.join(unknown)}: there are {', '.join(there) or 'none'}"
        )
    return there if chosen is None else list(dict.fromkeys(chosen))


def categories_of(models: Sequence[Model]) -> list[str]:
    """Categories of their cells, as they come."""
    found = dict.fromkeys(category for one in models for _, category in one.cells)
    return [category for category in found if category is not None]


def totals(model: Model) -> dict[str, tuple[float | None, str | None]]:
    """VBench's scores of a model of ours, or why each is refused."""
    if model.published is not None:
        return {}
    cells = {name: model.cells.get((name, None)) for name in leaderboard.BOUNDS}
    found: dict[str, tuple[float | None, str | None]] = {}
    for name, parts in _PARTS.items():
        bad = [f"{part} ({lacks(cells[part])})" for part in parts if not is_whole(cells[part])]
        if bad:
            found[name] = (None, f"refused: missing or incomplete: {_some(bad)}")
            continue
        values = {part: cells[part].value for part in parts}  # type: ignore[union-attr]
        score = getattr(leaderboard, name)(values)
        found[name] = (score.total if name == "total" else score, None)
    return found


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def ranked(
    columns: Sequence[Column], models: Sequence[Model], category: str | None
) -> dict[str, float]:
    """Average rank of each row, by its key, where there is no `obstacle`."""
    table = {
        column.dimension: {
            one.key: signed(column, cell.value)
            for one in models
            if (cell := one.cell(column, category)) and cell.value is not None
        }
        for column in columns
    }
    return average_ranks(table)


def obstacle(
    columns: Sequence[Column], models: Sequence[Model], category: str | None
) -> str | None:
    """Why models cannot be ranked over columns; None if they can."""
    if len(models) < 2:
        return "ranks are of two models or more"
    missing = [
        f"{one.name} in {column.header} ({lacks(one.cell(column, category))})"
        for one in models
        for column in columns
        if not one.counts(column, category)
    ]
    if missing:
        return f"missing or incomplete: {_some(missing)}"
    other = next((c for c in columns if differ(c, models, category)), None)
    return (
        f"models were scored on different prompts or samples in {other.header}" if other else None
    )


def differ(column: Column, models: Sequence[Model], category: str | None) -> bool:
    """Our models' scores are not of the same videos, though nothing selects them by content."""
    cells = [one.cell(column, category) for one in models if one.published is None]
    videos = {
        frozenset((v.prompt, v.sample) for v in cell.values)
        for cell in cells
        if cell is not None and cell.values and is_whole(cell)
    }
    return len(videos) > 1 and column.dimension not in _SELECTED


def signed(column: Column, value: float) -> float:
    """The number as printed, so that higher is better and equal digits tie."""
    printed = float(column.rounded(value))
    return printed if column.higher_is_better else -printed


def has_value(cell: Cell | None) -> TypeGuard[Cell]:
    """It has a number."""
    return cell is not None and cell.value is not None and math.isfinite(cell.value)


def is_whole(cell: Cell | None) -> TypeGuard[Cell]:
    """It has a number, of every video that it should be of."""
    return has_value(cell) and (cell.published is not None or cell.is_complete)


def lacks(cell: Cell | None) -> str:
    """What is missing in a cell, for a person."""
    if cell is None:
        return "not scored"
    if cell.published is not None:
        return "not readable"
    if cell.value is not None and not math.isfinite(cell.value):
        return "not a finite number"
    waiting = cell.num_expected - cell.num_videos - cell.num_failed
    told = [f"{cell.num_failed:,} failed"] if cell.num_failed else []
    told += [f"{waiting:,} not scored yet"] if waiting > 0 else []
    return f"{cell.num_videos:,} of {cell.num_expected:,} videos" + "".join(f", {t}" for t in told)
