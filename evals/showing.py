"""What an evaluation looks like: tables, pictures and sentences, all from what is stored."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as RichTable

from evals.compare import MIN_PROMPTS, Difference, compare_all
from evals.dimensions import DIMENSIONS
from evals.presets import PRESETS, Preset, plain
from evals.tables import Table, table

if TYPE_CHECKING:
    from evals.drift import DriftSummary
    from evals.evaluation import Results
    from evals.running import Done

PLAIN = "plain"
"""Preset with whatever was measured."""


def presets_of(results: Results, names: Sequence[str]) -> list[Preset]:
    """Presets by name, else those of the evaluation's recipe.

    Raises:
        ValueError: There is none of that name.
    """
    from evals.recipes import recipe

    plan, found = results.plan, []
    for name in names or recipe(plan.recipe).tables:
        if name == PLAIN:
            found.append(plain(plan.dimensions, plan.drift))
        elif name in PRESETS:
            found.append(PRESETS[name])
        else:
            raise ValueError(f"there is no table {name!r}: choose of {', '.join(PRESETS)}, {PLAIN}")
    return found


def tables(
    results: Results, presets: Sequence[Preset], *, with_published: bool = False
) -> list[Table]:
    """The presets filled with the evaluation's scores."""
    cells, models = results.cells(), list(results.models)
    return [table(p, cells, models=models, with_published=with_published) for p in presets]


def write(results: Results, made: Sequence[Table], folder: Path) -> list[Path]:
    """Writes tables in all formats, and as pictures; gives the files."""
    from evals import pictures

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for one in made:
        stem = folder / one.preset.name
        for suffix, text in (
            (".md", one.markdown()),
            (".tex", one.latex()),
            (".csv", one.csv()),
            (".json", one.to_json()),
        ):
            path = stem.with_suffix(suffix)
            path.write_text(text, encoding="utf-8")
            written.append(path)
        path = stem.with_suffix(".png")
        pictures.table_png(one, path)
        written.append(path)
        written += _radar(results, one, stem)
    return written


def _radar(results: Results, one: Table, stem: Path) -> list[Path]:
    """Pictures of ranks by category, where a table has them and they can be told."""
    from evals import pictures

    if "radar" not in one.preset.extras:
        return []
    made = []
    for name, draw in (("radar", pictures.radar_png), ("places", pictures.places_png)):
        path = stem.with_name(f"{stem.name}_{name}.png")
        try:
            draw(one.preset, results.cells(), path)
        except ValueError:  # ranks that cannot be told: the table's footnote says why
            continue
        made.append(path)
    return made


def as_json(done: Done, made: Sequence[Table], written: Sequence[Path]) -> dict[str, Any]:
    """A run, for programs."""
    return {
        "run_id": done.run_id,
        "generated": {name: dataclasses.asdict(of) for name, of in done.generated.items()},
        "scored": dataclasses.asdict(done.scored),
        "seconds": done.seconds,
        "tables": {one.preset.name: json.loads(one.to_json()) for one in made},
        "files": [str(path) for path in written],
    }


def tell(out: Console, done: Done, written: Sequence[Path]) -> None:
    """A run, in sentences."""
    for name, counts in done.generated.items():
        said = ", ".join(
            f"{number:,} {what.replace('_', ' ')}"
            for what, number in dataclasses.asdict(counts).items()
            if isinstance(number, int) and number
        )
        out.print(f"{name}: {said or 'nothing to do'}", highlight=False, markup=False)
    scored = done.scored
    out.print(
        f"scores: {scored.scored:,} measured, {scored.there:,} there already,"
        f" {scored.failed:,} failed, {done.seconds:.1f} s",
        highlight=False,
    )
    for path in written:
        out.print(str(path), highlight=False, soft_wrap=True, style="dim")


def runs_table(rows: Sequence[Mapping[str, Any]]) -> RichTable:
    """Rows of `runs` that are evaluations, for a terminal."""
    made = RichTable(title="Evaluations, the newest first")
    for head in ("run", "started", "recipe", "suite", "models", "seconds", "scores"):
        made.add_column(head)
    for row in rows:
        said, counts = json.loads(row["resolved"]), json.loads(row["counts"]).get("scores", {})
        made.add_row(
            row["run_id"][:8],
            f"{row['started_at']:%Y-%m-%d %H:%M}",
            said["recipe"],
            f"{said['suite']['name']}, {len(said['suite']['prompts']):,} prompts",
            ", ".join(
                f"{m['name']} ({(m['checkpoint'] or m['kind'])[:8]})" for m in said["models"]
            ),
            "did not end" if row["interrupted"] else f"{row['seconds']:.0f}",
            ", ".join(f"{number:,} {what}" for what, number in counts.items() if number),
        )
    return made


def compared(results: Results, a: str, b: str, *, seed: int = 0) -> dict[str, Difference]:
    """Differences of two models in every dimension that both were measured in."""
    values = {
        model: {d: results.values(model, d) for d in results.models[model].dimensions}
        for model in (a, b)
    }
    return compare_all(values[a], values[b], seed=seed)


def differences(found: Mapping[str, Difference], a: str, b: str) -> RichTable:
    """What `compared` gave, for a terminal."""
    made = RichTable(title=f"{a} - {b}, paired bootstrap over prompts, 95 % interval")
    made.add_column("dimension")
    for head in (a, b, "difference", "interval", "p (Holm)", "prompts", "videos"):
        made.add_column(head, justify="right")
    made.add_column("beyond noise")
    for name, one in found.items():
        better = one.mean is not None and (one.mean > 0) == DIMENSIONS[name].higher_is_better
        made.add_row(
            DIMENSIONS[name].title,
            _number(one.a),
            _number(one.b),
            _number(one.mean, "+.4f"),
            "–" if one.low is None else f"{one.low:+.4f} … {one.high:+.4f}",
            _number(one.p_adjusted, ".3f"),
            f"{one.num_prompts:,}",
            f"{one.num_videos:,}",
            _verdict(one, a if better else b),
        )
    return made


def _verdict(one: Difference, better: str) -> str:
    if one.p is None:
        return f"too few prompts ({MIN_PROMPTS} are needed)"
    return f"yes: {better}" if one.is_beyond_noise else "no"


def _number(value: float | None, how: str = ".4f") -> str:
    return "–" if value is None else format(value, how)


def drifts(results: Results, dimensions: Sequence[str] = ()) -> dict[str, dict[str, DriftSummary]]:
    """By dimension and model how far scores drift within videos.

    Raises:
        ValueError: A dimension that is named has neither scores of frames nor of heads and tails.
    """
    found: dict[str, dict[str, DriftSummary]] = {}
    for name in dimensions or results.plan.dimensions:
        of = {
            model: one
            for model, plan in results.models.items()
            if name in plan.dimensions and (one := results.drifts(model, name))
        }
        if any(one.num_videos for one in of.values()):
            found[name] = of
        elif dimensions:
            raise ValueError(
                f"{name} has no drift here: it was not scored frame by frame, nor at the start and"
                " the end of videos; evaluate it with a recipe that measures its drift"
            )
    return found


def drift_table(found: Mapping[str, Mapping[str, DriftSummary]]) -> RichTable:
    """What `drifts` gave, for a terminal."""
    made = RichTable(title="Drift: the first 15 % of a video against the last 15 %")
    made.add_column("dimension")
    made.add_column("model")
    for head in (
        "end - start, absolute", "signed", "slope /s", "R²", "VDE, mean", "worst drop",
        "head-tail similarity", "videos",
    ):  # fmt: skip
        made.add_column(head, justify="right")
    for name, of in found.items():
        for model, one in of.items():
            made.add_row(DIMENSIONS[name].title, model, *_drift_cells(one))
    return made


def _drift_cells(one: DriftSummary) -> list[str]:
    error = "" if one.absolute.stderr is None else f" ± {one.absolute.stderr:.4f}"
    return [
        _number(one.absolute.mean) + error,
        _number(one.signed.mean, "+.4f"),
        _number(one.slope_per_second.mean, "+.5f"),
        _number(one.r_squared.mean, ".2f"),
        _number(one.vde_linear_mean.mean),
        _number(one.worst_drop.mean),
        _number(one.head_tail_similarity.mean),
        f"{one.num_videos:,}",
    ]


def draw_drifts(
    results: Results, found: Mapping[str, Mapping[str, DriftSummary]], folder: Path
) -> list[Path]:
    """Draws scores over the length of the videos, a picture a dimension; gives the files."""
    from evals import pictures

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, of in found.items():
        curves = [
            pictures.curve_of(cell, results.fps(cell.model))
            for cell in results.cells([name])
            if cell.column == name and cell.category is None and cell.model in of
            if any(value.frame_scores for value in cell.values)
        ]
        if curves:
            path = folder / f"drift_{name}.png"
            title = f"{DIMENSIONS[name].title} over the length of the videos"
            label, is_tiny = DIMENSIONS[name].title, results.plan.is_tiny
            pictures.drift_png(curves, path, title=title, label=label, is_meaningless=is_tiny)
            written.append(path)
    return written
