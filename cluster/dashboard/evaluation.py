"""An evaluation for the page that shows it: the numbers of `python -m evals`, read once."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import lance
import numpy as np
import streamlit as st

from cluster.dashboard import lance_sql, playable
from engine.blobs import take_blobs
from engine.cut import Span
from engine.tables import DatasetError
from evals import drift, leaderboard, showing, trend
from evals.compare import Difference
from evals.dimensions import DIMENSIONS
from evals.evaluation import Plan, Results, runs_of, videos_of
from evals.metric import NO_OBJECT
from evals.pictures import Curve, curve_of
from evals.presets import PRESETS, Preset
from evals.ranks import Places, places
from evals.results import Cell, Value
from evals.rows import category_ranks
from evals.suites import Prompt
from evals.tables import Table, table

TINY = "its numbers are of small random weights or small random models, and say nothing"
_RANKED = "rise_figure4"
# What an MP4 says of its codec: H.264 in Baseline, Main or High, VP9's profile 0 and AV1's Main are
# 4:2:0 in 8 bits (AV1: or 10). No decoder runs in this process; what lies does not play, no more.
_PLAYS = re.compile(rb"avcC\x01[BMd]|vpcC\x01\0{4}|av1C\x81[\0-\x1f]")


class Run(NamedTuple):
    """An evaluation as a choice."""

    run_id: str
    recipe: str
    started: str
    models: tuple[str, ...]
    about: str
    """Its suite in words."""
    night: str | None
    interrupted: bool


def runs(root: str) -> list[Run]:
    """Evaluations of a dataset, the newest first."""
    if not lance_sql.has_rows(root, "runs"):
        return []
    return _runs(lance_sql.newest(root, "runs"), root)


# Tables that are given and not read tell the cache what is old: `evals` opens them by itself.
@st.cache_resource(max_entries=4, show_spinner=False, hash_funcs=lance_sql.BY_STAMP)
def _runs(table: lance.LanceDataset, root: str) -> list[Run]:
    found = []
    for row in runs_of(root):
        plan = _plan(root, row)
        found.append(
            Run(
                run_id=row["run_id"],
                recipe=plan.recipe,
                started=f"{row['started_at']:%Y-%m-%d %H:%M}",
                models=tuple(model["name"] for model in plan.models),
                about=f"{plan.suite.name}, {len(plan.suite.prompts):,} prompts",
                night=row.get("night"),
                interrupted=bool(row["interrupted"]),
            )
        )
    return found


def _plan(root: str, row: Mapping[str, Any]) -> Plan:
    try:
        return Plan.of(row)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise DatasetError(
            f"{root}: its evaluation {row['run_id'][:8]} is not one that this program wrote"
            f" ({type(error).__name__}: {error})"
        ) from None


@dataclass(kw_only=True)
class Evaluation:
    """What pages show of one; everything is computed when it is first asked for, and kept."""

    root: str
    results: Results
    _compared: dict[tuple[str, str], dict[str, Difference]] = field(default_factory=dict)

    @functools.cached_property
    def cells(self) -> list[Cell]:
        """Every model's score in every dimension and its drift, overall and by category."""
        return self.results.cells()

    @property
    def plan(self) -> Plan:
        """The newest."""
        return self.results.plan

    @property
    def models(self) -> list[str]:
        """As tables name them."""
        return list(self.results.models)

    @property
    def dimensions(self) -> list[str]:
        """That any of the models was measured in, in VBench's order."""
        measured = {d for plan in self.results.models.values() for d in plan.dimensions}
        return [d for d in DIMENSIONS if d in measured]

    @property
    def is_meaningless(self) -> bool:
        """Small random weights, or models, gave some number."""
        return any(
            plan.is_tiny or "tiny" in plan.model(name.partition("@")[0]).get("notes", ())
            for name, plan in self.results.models.items()
        )

    def overall(self, dimension: str) -> list[Cell]:
        """Of each model over all its videos."""
        return [c for c in self.cells if c.column == dimension and c.category is None]

    def by_category(self, dimension: str) -> list[Cell]:
        """Of each model in each category."""
        return [c for c in self.cells if c.column == dimension and c.category is not None]

    @functools.cached_property
    def progress(self) -> tuple[int, int, int]:
        """Scores that are there, that are expected, and that failed."""
        cells = [c for c in self.cells if c.category is None and c.column in DIMENSIONS]
        return (
            sum(c.num_videos for c in cells),
            sum(c.num_expected for c in cells),
            sum(c.num_failed for c in cells),
        )

    def presets(self) -> list[Preset]:
        """Tables that its numbers fill, those of its recipe first."""
        try:
            found = showing.presets_of(self.results, ())
        except ValueError:  # a recipe that this program does not know (any more)
            found = []
        found += showing.presets_of(self.results, [showing.PLAIN])
        there = {cell.column for cell in self.cells if cell.value is not None}
        for preset in PRESETS.values():
            wanted = {column.dimension for column in preset.columns}
            totals = "totals" in preset.extras and any(
                there.issuperset(part) for part in (leaderboard.QUALITY, leaderboard.SEMANTIC)
            )
            if totals or (wanted <= there and (not preset.by_category or self.results.categories)):
                found.append(preset)
        return list({preset.name: preset for preset in found}.values())

    def table(self, preset: Preset, *, with_published: bool) -> Table:
        """A preset, as `python -m evals table` fills it.

        Raises:
            ValueError: It has nothing to show.
        """
        return table(preset, self.cells, models=self.models, with_published=with_published)

    def ranks(self) -> dict[str, dict[str, float]]:
        """Average rank by category and model, over RISE's columns, else over all dimensions.

        Raises:
            ValueError: They cannot be told, because something is missing.
        """
        rise = PRESETS[_RANKED]
        there = {cell.column for cell in self.cells if cell.value is not None}
        if {column.dimension for column in rise.columns} <= there:
            return category_ranks(rise, self.cells)
        plain = showing.presets_of(self.results, [showing.PLAIN])[0]
        return category_ranks(_by_category(plain), self.cells)

    def places(self) -> dict[str, Places]:
        """In how many categories each model is first and second by average rank."""
        return places(self.ranks())

    def compared(self, a: str, b: str) -> dict[str, Difference]:
        """As `python -m evals compare` has it."""
        if (a, b) not in self._compared:
            self._compared[a, b] = showing.compared(self.results, a, b)
        return self._compared[a, b]

    @functools.cached_property
    def drifts(self) -> dict[str, dict[str, drift.DriftSummary]]:
        """As `python -m evals drift` has it."""
        return showing.drifts(self.results)

    def curves(self, dimension: str) -> list[Curve]:
        """Scores over the length of the videos, a model each; none without scores of frames."""
        return [
            curve_of(cell, self.results.fps(cell.model))
            for cell in self.overall(dimension)
            if any(s is not None for v in cell.values for s in v.frame_scores or ())
        ]

    def length_s(self, dimension: str) -> float:
        """Of the longest video that has scores of frames."""
        return max(
            (
                len(v.frame_scores) / self.results.fps(cell.model)
                for cell in self.overall(dimension)
                for v in cell.values
                if v.frame_scores
            ),
            default=0.0,
        )

    @functools.cached_property
    def prompts(self) -> list[Prompt]:
        """Of the suite, each once."""
        return list({prompt.prompt: prompt for prompt in self.plan.suite.prompts}.values())

    def samples(self, prompt: str) -> int:
        """Videos of a prompt that the suite asks for."""
        return max(p.samples for p in self.plan.suite.prompts if p.prompt == prompt)

    @functools.cached_property
    def _videos(self) -> dict[str, dict[tuple[str, str, int], dict[str, Any]]]:
        found = {}
        for name, plan in self.results.models.items():
            model = plan.model(name.partition("@")[0])
            found[name] = videos_of(self.root, model, plan.seed)
        return found

    def video(self, model: str, prompt: Prompt, sample: int) -> dict[str, Any] | None:
        """The row of a video, without the video; None where there is none (yet)."""
        return self._videos[model].get((prompt.prompt, prompt.text, sample))

    def is_replaced(self, model: str, prompt: Prompt, sample: int) -> bool:
        """Whether another video has come in place of the one that was scored."""
        plan, name = self.results.models[model], model.partition("@")[0]
        row, asked = self.video(model, prompt, sample), list(plan.suite.videos())
        then = dict(zip(((p.prompt, n) for p, n in asked), plan.videos.get(name, ()), strict=False))
        held = then.get((prompt.prompt, sample))
        return row is not None and held is not None and held[0] != row["generation_id"]

    @functools.cached_property
    def _values(self) -> dict[tuple[str, str], dict[tuple[str, int], Value]]:
        found: dict[tuple[str, str], dict[tuple[str, int], Value]] = {}
        for model, plan in self.results.models.items():
            for dimension in plan.dimensions:
                found[model, dimension] = {
                    (v.prompt, v.sample): v for v in self.results.values(model, dimension)
                }
        return found

    def value(self, model: str, dimension: str, prompt: str, sample: int) -> Value | None:
        """The score of one video; None where the suite does not ask for it."""
        return self._values.get((model, dimension), {}).get((prompt, sample))


def evaluation(root: str, recipe: str, run_id: str | None) -> Evaluation:
    """The newest scores of a recipe's suite, or those that one run was asked for."""
    tables = tuple(lance_sql.newest(root, name) for name in ("runs", "generations", "scores"))
    return _evaluation(tables, root, recipe, run_id)


@st.cache_resource(max_entries=2, show_spinner="Reading scores …", hash_funcs=lance_sql.BY_STAMP)
def _evaluation(
    tables: tuple[lance.LanceDataset, ...], root: str, recipe: str, run_id: str | None
) -> Evaluation:
    if run_id is None:
        return Evaluation(root=root, results=Results.read(root, recipe=recipe))
    rows = [row for row in runs_of(root, recipe) if row["run_id"] == run_id]
    if not rows:
        raise DatasetError(f"{root} has no run {run_id} any more")
    plan = _plan(root, rows[0])
    asked = {model["name"]: plan for model in plan.models}
    return Evaluation(root=root, results=Results.of(root, plan, asked))


def nights(root: str, recipe: str) -> tuple[list[trend.TrendPoint], list[trend.Night]]:
    """Scores of a recipe's nights, the oldest first, and the nights, the newest first."""
    return _nights(lance_sql.newest(root, "runs"), root, recipe)


@st.cache_resource(max_entries=4, show_spinner=False, hash_funcs=lance_sql.BY_STAMP)
def _nights(
    table: lance.LanceDataset, root: str, recipe: str
) -> tuple[list[trend.TrendPoint], list[trend.Night]]:
    points = [point for point in trend.trend(root, recipe=recipe) if point.value is not None]
    return points, trend.nights_of(root, recipe)


def title(column: str) -> str:
    """A dimension's name, or that of its drift, for a person."""
    name = column.removeprefix(drift.COLUMN)
    known = DIMENSIONS[name].title if name in DIMENSIONS else name
    return f"Drift of {known}" if column.startswith(drift.COLUMN) else known


def short(model: str) -> str:
    """NAME@RUN with as much of the run as tells it apart."""
    name, at, run = model.partition("@")
    return f"{name}{at}{run[:8]}"


def _by_category(preset: Preset) -> Preset:
    columns = tuple(c for c in preset.columns if not c.dimension.startswith(drift.COLUMN))
    return dataclasses.replace(preset, columns=columns, extras=("rank", "places", "radar"))


def normalised(cells: Sequence[Cell]) -> dict[str, dict[str, float]]:
    """By dimension and model the score between the leaderboard's bounds, where it has them."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for cell in cells:
        if cell.category is None and cell.value is not None and cell.column in DIMENSIONS:
            value = leaderboard.normalised(cell.column, cell.value)
            if value is not None and math.isfinite(value):
                found[cell.column][cell.model] = value
    return dict(found)


def why_not(value: Value | None) -> str:
    """Why a video has no score, for a person."""
    if value is None:
        return "not asked for"
    return "left out: no object was found" if value.error == NO_OBJECT else str(value.error or "")


@st.cache_resource(max_entries=24, show_spinner=False, hash_funcs=lance_sql.BY_STAMP)
def _offered(table: lance.LanceDataset, root: str, generation_id: str) -> playable.Offer:
    rows = table.to_table(
        columns=["num_frames", "duration_s"],
        filter=f"generation_id = {lance_sql.quoted(generation_id)} AND error_type IS NULL",
        with_row_id=True,
    ).to_pylist()
    (blob,) = take_blobs(table, "mp4", ids=[rows[0]["_rowid"]]) if rows else [None]
    if blob is None:
        raise DatasetError(f"{root} has no video {generation_id} (any more)")
    data = blob.read()
    span = Span(clip_id="video", start_s=0.0, end_s=rows[0]["duration_s"], start_frame=0,
                num_frames=rows[0]["num_frames"])  # fmt: skip
    return playable.Offer(
        uri=table.uri,
        read=lambda _: data,
        span=span,
        codec="another codec",
        plays=_PLAYS.search(data) is not None,
        whole=True,
        key=playable.key_of("generation", hashlib.sha256(data).hexdigest()),
    )


def video_bytes(root: str, generation_id: str, *, cache: str, cache_bytes: int) -> bytes:
    """A stored video that a browser plays; one in MPEG-4 Visual, as VBench reads it, is made H.264.

    Raises:
        DatasetError: It is not there.
        Unplayable: It cannot be made H.264.
    """
    offered = _offered(lance_sql.newest(root, "generations"), root, generation_id)
    return playable.play(offered, cache, cache_bytes).data


def curve_rows(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Points of curves, and of the straight lines through them."""
    rows = []
    for one in curves:
        middle_t, middle_s = float(np.mean(one.times_s)), float(np.mean(one.scores))
        for time_s, score in zip(one.times_s, one.scores, strict=True):
            line = None
            if one.slope_per_s is not None:
                line = middle_s + one.slope_per_s * (time_s - middle_t)
            rows.append({"model": short(one.model), "time_s": time_s, "score": score, "line": line})
    return rows


def cell_row(cell: Cell, multiplier: float = 1) -> dict[str, Any]:
    """A score of a model, as charts take it."""
    value, error = cell.value or 0.0, cell.stderr
    return {
        "model": short(cell.model),
        "value": multiplier * value,
        "stderr": None if error is None else multiplier * error,
        "n": cell.num_videos,
    }
