"""Tables, ranks and drift as PNG: light, and told apart by shape as well as by colour."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evals.presets import Preset, preset_named
from evals.ranks import places
from evals.results import Cell
from evals.rows import category_ranks
from evals.table_picture import GREY, INK, RED, Sheet, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from evals.tables import Entry, Table

_FAINT = "#DDDDDD"
# Okabe and Ito's colours, which the colour-blind tell apart; markers and dashes say it again.
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#8A6D3B",
)
_DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
_LOOKS: tuple[dict[str, Any], ...] = tuple(
    {"color": colour, "marker": marker, "linestyle": _DASHES[num % 4], "linewidth": 1.8}
    for num, (colour, marker) in enumerate(zip(_COLOURS, "osD^vPX*", strict=True))
)
_STYLE: dict[str, Any] = {
    "axes.edgecolor": "#999999",
    "axes.labelcolor": GREY,
    "font.size": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
}
_DPI = 150
_OUTER, _LEGEND = "the outer ring is rank 1", "Model, mean of ranks"
_TOGETHER = len(_COLOURS)
"""Models that one picture can tell apart; more of them get a small picture each."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """How a model's score goes on over the seconds of its videos."""

    model: str
    times_s: Sequence[float]
    scores: Sequence[float]
    """Mean over videos at each time, 0 to 1."""
    stderr: Sequence[float] | None = None
    slope_per_s: float | None = None
    """Of the straight line that is drawn through the curve's middle."""
    r_squared: float | None = None


def curve_of(cell: Cell, fps: float, *, num_points: int = 20) -> Curve:
    """The mean over a cell's videos of their frame scores, with its least-squares line.

    Args:
        cell: Of a dimension that keeps frame scores.
        fps: Of the videos.
        num_points: Stretches of frames that scores are averaged over.

    Raises:
        ValueError: No video has frame scores.
    """
    videos = [v.frame_scores for v in cell.values if v.frame_scores]
    videos = [found for found in videos if any(score is not None for score in found)]
    if not videos:
        raise ValueError(f"{cell.column} of {cell.model} has no frame scores, so no curve of them")
    scores_VF = np.full((len(videos), max(map(len, videos))), np.nan)
    for row, found in zip(scores_VF, videos, strict=True):
        row[: len(found)] = [np.nan if score is None else score for score in found]
    is_common_F = np.isfinite(scores_VF).sum(0) * 2 >= len(videos)
    frames = np.flatnonzero(is_common_F)
    means = np.nanmean(scores_VF[:, frames], axis=0)
    parts = np.array_split(np.arange(len(frames)), min(num_points, len(frames)))
    times = [float(frames[part].mean() / fps) for part in parts]
    scores = [float(means[part].mean()) for part in parts]
    slope = r_squared = None
    if len(frames) > 1:
        slope = float(np.polyfit(frames / fps, means, 1)[0])
        if means.std() > 0:
            r_squared = float(np.corrcoef(frames, means)[0, 1] ** 2)
    return Curve(
        model=cell.model, times_s=times, scores=scores, slope_per_s=slope, r_squared=r_squared
    )


def check() -> None:
    """What can be known before a picture is drawn.

    Raises:
        ValueError: matplotlib is missing.
    """
    if not find_spec("matplotlib"):
        raise ValueError("pictures need matplotlib: pip install -c constraints.txt '.[figures]'")


def table_png(table: Table, path: str | Path) -> None:
    """A table as a picture: errors and counts beneath the numbers, footnotes beneath the table."""
    with _drawing(path, 1, 1) as figure:
        Sheet(table, figure).draw()


def radar_png(
    preset: Preset | str,
    cells: Iterable[Cell],
    path: str | Path,
    *,
    models: Sequence[str] | None = None,
) -> None:
    """Average rank in each category, a model a polygon: the outer ring is the first place.

    Raises:
        ValueError: Ranks cannot be told, or there are fewer than three categories.

    Source:
        RISE-T2V (arXiv 2511.04317), figure 4 (b).
    """
    preset = preset_named(preset) if isinstance(preset, str) else preset
    cells = list(cells)
    by_category = category_ranks(preset, cells, models=models)
    if len(by_category) < 3:
        raise ValueError(f"a radar needs three categories or more: found {len(by_category)}")
    names = list(next(iter(by_category.values())))
    mean = {name: float(np.mean([of[name] for of in by_category.values()])) for name in names}
    names.sort(key=lambda name: mean[name])
    title = f"Average rank in {len(by_category)} categories, over {_columns(preset)}"
    looks, is_tiny = dict(zip(names, _LOOKS, strict=False)), _is_tiny(cells, names)
    labels = {name: f"{short(name, 26)}  {mean[name]:.2f}" for name in names}
    if len(names) <= _TOGETHER:
        with _drawing(path, 7.0 + _room([*labels.values(), _LEGEND]), 6.6) as figure:
            wide, high = figure.get_size_inches()
            place = 1.0 / wide, 0.6 / high, 4.9 / wide, 4.9 / high
            axes = figure.add_axes(place, projection="polar")
            _web(axes, list(by_category), len(names), wrap=14)
            for name in reversed(names):
                _polygon(axes, by_category, name, label=labels[name], **looks[name])
            handles, texts = axes.get_legend_handles_labels()
            figure.legend(
                handles[::-1], texts[::-1], loc="center left", bbox_to_anchor=(6.8 / wide, 0.46),
                title=_LEGEND, alignment="left",
            )  # fmt: skip
            _titles(figure, title, _OUTER, is_meaningless=is_tiny)
        return
    grid = _Grid(len(names), wide=3.4, high=3.5)
    with _drawing(path, *grid.size) as figure:
        for num, name in enumerate(names):
            axes = figure.add_axes(grid.place(num, room=0.75), projection="polar")
            _web(axes, list(by_category), len(names), wrap=14, size=7.5)
            for other in names:
                _polygon(axes, by_category, other, color=_FAINT, linewidth=0.8)
            _polygon(axes, by_category, name, color=_COLOURS[0], linewidth=2, marker="o")
            axes.set_title(labels[name], size=8.5, weight="bold", pad=18)
        _titles(figure, title, _OUTER, is_meaningless=is_tiny)


def places_png(
    preset: Preset | str,
    cells: Iterable[Cell],
    path: str | Path,
    *,
    models: Sequence[str] | None = None,
) -> None:
    """In how many categories each model is first and second by average rank.

    Raises:
        ValueError: Ranks cannot be told.

    Source:
        RISE-T2V (arXiv 2511.04317), figure 4 (a).
    """
    preset = preset_named(preset) if isinstance(preset, str) else preset
    cells = list(cells)
    by_category = category_ranks(preset, cells, models=models)
    found = places(by_category)
    names = sorted(found, key=lambda name: (found[name].first, found[name].second))
    about = f"by average rank over {_columns(preset)}"
    with _drawing(path, 8.2, 1.9 + 0.36 * len(names)) as figure:
        axes = _axes(figure, left=_room(names), bottom=0.6, top=1.15)
        rows, left = np.arange(len(names)), np.zeros(len(names))
        for which, colour, ink in (("first", _COLOURS[0], "white"), ("second", "#9CCBEA", INK)):
            counts = np.array([getattr(found[name], which) for name in names])
            axes.barh(rows, counts, left=left, color=colour, height=0.68, label=f"{which} place")
            for row, count, start in zip(rows, counts, left, strict=True):
                if count:
                    look = {"ha": "center", "va": "center", "color": ink, "size": 9}
                    axes.text(start + count / 2, row, str(count), **look)
            left += counts
        axes.set_yticks(rows, [short(name) for name in names], color=INK)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, max(1, left.max()) * 1.02)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("categories")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.1)
        title = f"First and second places in {len(by_category)} categories"
        _titles(figure, title, about, is_meaningless=_is_tiny(cells, names))


def drift_png(
    curves: Sequence[Curve],
    path: str | Path,
    *,
    title: str = "Score over the length of the videos",
    label: str = "score",
    is_meaningless: bool = False,
) -> None:
    """How scores go on over time, with their straight lines, and the ends that drift is told from.

    Args:
        curves: A model each.
        path: To write.
        title: Above the picture.
        label: Of the scores, with the dimension's name.
        is_meaningless: Small random weights gave the scores.

    Raises:
        ValueError: There is no curve, or one without points.
    """
    if not curves or not all(len(one.times_s) for one in curves):
        raise ValueError("drift is drawn from curves with points: found none, or one without")
    about = "dashed: least-squares line; shaded: the first and the last 15 %, which drift contrasts"
    if len(curves) <= _TOGETHER:
        room = 0.7 + 0.075 * max(len(line) for c in curves for line in _told(c).split("\n"))
        with _drawing(path, 6.6 + room, 5.0) as figure:
            axes = _axes(figure, left=0.8, bottom=0.65, top=0.95, right=room)
            for one, look in zip(curves, _LOOKS, strict=False):
                _draw_curve(axes, one, **look)
            _finish_curves(axes, curves)
            axes.set_xlabel("seconds")
            axes.set_ylabel(label)
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), labelspacing=0.9)
            _titles(figure, title, about, is_meaningless=is_meaningless)
        return
    grid = _Grid(len(curves), wide=3.0, high=2.2)
    with _drawing(path, *grid.size) as figure:
        for num, one in enumerate(curves):
            axes = figure.add_axes(grid.place(num, room=0.42))
            for other in curves:
                axes.plot(other.times_s, other.scores, color=_FAINT, linewidth=0.8)
            _draw_curve(axes, one, **_LOOKS[0])
            _finish_curves(axes, curves)
            axes.set_title(_told(one), size=7.5, loc="left", pad=3)
            axes.tick_params(labelsize=7)
        _titles(figure, f"{title}: {label}, seconds below", about, is_meaningless=is_meaningless)


def bars_png(table: Table, path: str | Path) -> None:
    """A table's columns beside each other: a dot a model, with its standard error.

    Raises:
        ValueError: No column has a number.
    """
    shown = [
        (heading, [row.entries[num] for row in table.rows])
        for num, heading in enumerate(table.headings)
        if any(row.entries[num].value is not None for row in table.rows)
    ]
    if not shown:
        raise ValueError(f"table {table.preset.name} has no number to draw")
    names = [short(row.model) + ("†" if row.published else "") for row in table.rows][::-1]
    about = "± one standard error over prompts"
    if any(row.published for row in table.rows):
        about += "; † published"
    across = min(4, len(shown))
    down = math.ceil(len(shown) / across)
    left, step = _room(names), 0.7 + 0.27 * len(names)
    wide, high = max(6.4, left + 2.5 * across + 0.2), 1.0 + step * down
    with _drawing(path, wide, high) as figure:
        for num, (heading, entries) in enumerate(shown):
            row, column = divmod(num, across)
            start, bottom = left + 2.5 * column, high - 0.95 - step * (row + 1) + 0.3
            place = start / wide, bottom / high, 2.25 / wide, (step - 0.62) / high
            axes = figure.add_axes(place)
            _dots(axes, heading.column.multiplier, entries[::-1])
            axes.set_title(heading.title, loc="left", size=9, weight="bold", pad=4)
            axes.set_yticks(range(len(names)), names if column == 0 else [])
            axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=8.5)
            axes.tick_params(axis="x", labelsize=7.5)
        _titles(figure, table.title, about, is_meaningless=table.is_meaningless)


@dataclass(frozen=True)
class _Grid:
    """Small pictures beside and below each other, in inches."""

    num: int
    wide: float
    high: float
    top: float = 0.85

    @property
    def across(self) -> int:
        return min(5, math.ceil(math.sqrt(self.num)))

    @property
    def size(self) -> tuple[float, float]:
        down = math.ceil(self.num / self.across)
        return self.wide * self.across + 0.3, self.high * down + self.top

    def place(self, num: int, *, room: float) -> tuple[float, float, float, float]:
        """In shares of the figure; room is left around it."""
        row, column = divmod(num, self.across)
        wide, high = self.size
        left = 0.15 + self.wide * column + room
        bottom = high - self.top - self.high * (row + 1) + 0.3
        return (
            left / wide,
            bottom / high,
            (self.wide - 1.35 * room) / wide,
            (self.high - 0.95) / high,
        )


def _web(axes: Axes, categories: Sequence[str], num: int, *, wrap: int, size: float = 9.5) -> None:
    """The rings of a radar, rank 1 outside, and its categories."""
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    # Inverted: the last rank is near the middle, and no polygon shrinks to a point.
    axes.set_ylim(num + 0.6, 0.8)
    angles = np.linspace(0, 2 * np.pi, len(categories), endpoint=False)
    axes.set_xticks(angles, [""] * len(categories))
    for angle, name in zip(angles, categories, strict=True):
        side = np.sin(angle)
        ha = "center" if abs(side) < 0.2 else "left" if side > 0 else "right"
        va = "center" if abs(side) > 0.2 else "bottom" if np.cos(angle) > 0 else "top"
        lines = textwrap.wrap(name, wrap, break_long_words=False)
        text = "\n".join(lines[:2]) + (" …" if len(lines) > 2 else "")
        axes.annotate(
            text, (angle, 0.8), (6 * side, 6 * np.cos(angle)), textcoords="offset points",
            ha=ha, va=va, size=size, annotation_clip=False,
        )  # fmt: skip
    step = max(1, round(num / 4))
    rings = [1, *range(1 + step, num - step // 2, step), num]
    axes.set_yticks(rings, [str(ring) for ring in rings], size=size - 1.5, color=GREY, zorder=5)
    for text in axes.get_yticklabels():
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8})
    axes.set_rlabel_position(180 / len(categories))
    axes.grid(color=_FAINT, linewidth=0.8)
    axes.spines["polar"].set_visible(False)


def _polygon(axes: Axes, by_category: Any, name: str, **look: Any) -> None:
    ranks = [of[name] for of in by_category.values()]
    angles = np.linspace(0, 2 * np.pi, len(ranks), endpoint=False)
    axes.plot([*angles, angles[0]], [*ranks, ranks[0]], clip_on=False, **look)


def _draw_curve(axes: Axes, one: Curve, **look: Any) -> None:
    """A curve, its error, and the line of its slope through its middle."""
    times, scores = np.asarray(one.times_s), np.asarray(one.scores)
    axes.plot(times, scores, label=_told(one), **look | {"linestyle": "-", "markersize": 4})
    if one.stderr is not None:
        error = np.asarray(one.stderr)
        axes.fill_between(
            times, scores - error, scores + error, color=look["color"], alpha=0.15, linewidth=0
        )
    if one.slope_per_s is not None:
        line = scores.mean() + one.slope_per_s * (times - times.mean())
        axes.plot(times, line, color=look["color"], linewidth=1, linestyle=(0, (5, 3)))


def _finish_curves(axes: Axes, curves: Sequence[Curve]) -> None:
    """The same scales for all, and the ends that drift is told from."""
    ends = {max(one.times_s) for one in curves}
    spread = [(one.scores, one.stderr or [0.0] * len(one.scores)) for one in curves]
    low = min(min(np.subtract(*both)) for both in spread)
    high = max(max(np.add(*both)) for both in spread)
    room = 0.08 * (high - low) or 0.01
    end = max(ends) or 1.0
    axes.set_ylim(low - room, high + room)
    axes.set_xlim(0, end * 1.02)
    if len(ends) == 1:
        for span in ((0, 0.15 * end), (0.85 * end, end * 1.02)):
            axes.axvspan(*span, color="#F2F2F2", zorder=0, linewidth=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)


def _told(one: Curve) -> str:
    """A curve's name and slope."""
    if one.slope_per_s is None:
        return short(one.model)
    fit = "" if one.r_squared is None else f", R² {one.r_squared:.2f}"
    return f"{short(one.model)}\n{one.slope_per_s:+.4f} a second{fit}"


def _dots(axes: Axes, multiplier: int, entries: Sequence[Entry]) -> None:
    for row, entry in enumerate(entries):
        if entry.value is None:
            axes.annotate(
                "–", (0, row), xycoords=("axes fraction", "data"), color=GREY, va="center"
            )
            continue
        stderr = entry.cell.stderr if entry.cell and entry.stderr is not None else None
        is_published = entry.cell is not None and entry.cell.published is not None
        axes.errorbar(
            multiplier * entry.value, row,
            xerr=None if stderr is None else multiplier * stderr,
            fmt="D" if is_published else "o", markersize=5, capsize=2.5, linewidth=1.2,
            color=GREY if is_published else _COLOURS[0],
            markerfacecolor="white" if is_published else _COLOURS[0],
        )  # fmt: skip
    axes.set_ylim(-0.6, len(entries) - 0.4)
    axes.margins(x=0.1)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)


def _axes(figure: Figure, *, left: float, bottom: float, top: float, right: float = 0.3) -> Axes:
    """Axes with so many inches around them."""
    wide, high = figure.get_size_inches()
    place = left / wide, bottom / high, (wide - left - right) / wide, (high - bottom - top) / high
    return figure.add_axes(place)


def _room(names: Iterable[str]) -> float:
    """Inches that names beside an axis take."""
    return 0.45 + 0.085 * max(len(short(name)) for name in names)


def _columns(preset: Preset) -> str:
    return ", ".join(column.header for column in preset.columns)


def _is_tiny(cells: Iterable[Cell], models: Sequence[str]) -> bool:
    return any("tiny" in cell.notes for cell in cells if cell.model in models)


def _titles(figure: Figure, title: str, about: str, *, is_meaningless: bool) -> None:
    """In the upper left corner; the title as large as fits."""
    wide, high = figure.get_size_inches()
    left = 0.15 / wide
    if is_meaningless:
        look = {"color": RED, "weight": "bold", "ha": "right", "va": "top", "size": 9}
        figure.text(1 - left, 1 - 0.07 / high, "MEANINGLESS: small random weights", **look)
    size = min(11.5, (wide - 0.3) * 72 / (0.68 * len(title)))
    figure.text(left, 1 - 0.26 / high, title, weight="bold", size=size, va="top")
    figure.text(left, 1 - 0.52 / high, about, color=GREY, size=8.5, va="top")


@contextmanager
def _drawing(path: str | Path, wide: float, high: float) -> Iterator[Figure]:
    """A figure of so many inches, that is written when it is done."""
    check()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot, nothing global is left behind

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # A model's name may hold what the font lacks; the text formats have it whole.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure(figsize=(wide, high), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path, dpi=_DPI)
