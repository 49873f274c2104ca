"""What the commands share: arguments, errors in one line, paths, progress and the funnel."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
from rich.table import Table

from engine import storage
from engine.accounts import Accounts
from engine.command import Bars, err, fail, out
from engine.operator import Stage
from engine.tables import read
from pipelines.flags import ModelFlags
from pipelines.recipes import NAMES, WITH_MODELS, Recipe, models_of, recipe

if TYPE_CHECKING:
    from pipelines.models import Models

NOT_BEGUN = "stopped before any work began"
PAPER_CLIP_S = 10.0
"""Mean clip length that Mimir's appendix A reports: "each clip averaging about 10 seconds"."""


def recipe_named(name: str, models: Models | None = None) -> Recipe:
    """A recipe, or one line that lists those there are."""
    if name not in NAMES:
        fail(f"there is no recipe {name!r}: choose one of {', '.join(NAMES)}")
    return recipe(name, models)


def recipe_with(name: str, flags: ModelFlags, *, models_like: str | None = None) -> Recipe:
    """A recipe with the models that flags name; the small checkpoints of `tiny` are made here.

    Args:
        name: Of the recipe.
        flags: What differs from its models.
        models_like: Another recipe, whose models it takes in place of its own.
    """
    given = [f for f in dataclasses.fields(ModelFlags) if getattr(flags, f.name) != f.default]
    if name not in WITH_MODELS:
        if given or models_like:
            flag = given[0].name.replace("_", "-") if given else "models"
            fail(f"--{flag}: recipe {name!r} loads no model")
        return recipe_named(name)
    lacking = [m for m in ("open_clip", "torch", "transformers") if not find_spec(m)]
    if lacking:
        fail(
            f"recipe {name!r} needs {', '.join(lacking)}: make setup, or"
            " pip install -c constraints.txt '.[models]'"
        )
    from pipelines.models import make_tiny, with_flags

    try:
        models = with_flags(models_of(models_like or name), flags)
    except ValueError as error:
        fail(str(error))
    if "tiny" in (name, models_like):
        err.print("recipe tiny: small random models, their outputs mean nothing", highlight=False)
        make_tiny()
    return recipe_named(name, models)


def with_pairs(recipe: Recipe, names: Sequence[str] | None, language: str | None) -> Recipe:
    """The recipe with other pairs to make, by the names of their instructions."""
    if names is None and language is None:
        return recipe
    for name in names or ():
        if name not in recipe.pairs:
            known = ", ".join(recipe.pairs) or "none"
            fail(f"--instruction {name}: recipe {recipe.name!r} knows {known}")
    pairs = dict(recipe.pairs)
    makes = tuple(names) if names is not None else recipe.makes
    for name in makes:
        if pairs[name].instruction.needs_language != bool(language):
            what = "needs --language, e.g. French" if not language else "takes no --language"
            fail(f"--instruction {name} {what}")
        pairs[name] = dataclasses.replace(pairs[name], language=language)
    return dataclasses.replace(recipe, pairs=pairs, makes=makes)


def with_bounds(stages: Sequence[Stage], changes: Iterable[str]) -> tuple[Stage, ...]:
    """The stages with other thresholds, each as COLUMN.BOUND=VALUE, e.g. brightness.lo=0.3."""
    for change in changes:
        found = re.fullmatch(r"(\w+)\.(lo|hi|above)=(.+)", change)
        if not found:
            fail(f"--set {change}: write COLUMN.lo=VALUE, COLUMN.hi=VALUE or COLUMN.above=VALUE")
        column, bound, text = found.groups()
        try:
            value = float(text)
        except ValueError:
            fail(f"--set {change}: {text!r} is not a number")
        if not 0 <= value < float("inf"):
            fail(f"--set {change}: a threshold is a finite number of 0 or more")
        columns = [r.column for s in stages for r in s.rules]
        if column not in columns:
            fail(f"--set {change}: no rule reads {column!r}; rules read {', '.join(columns)}")
        stages = [
            dataclasses.replace(
                stage,
                rules=tuple(
                    dataclasses.replace(rule, **{bound: value}) if rule.column == column else rule
                    for rule in stage.rules
                ),
            )
            for stage in stages
        ]
    return tuple(stages)


class Watcher(Bars):
    """Shows a run's progress."""

    def __call__(self, now: Any) -> None:
        """Shows where the run is; `now` is an `engine.curation.Progress`."""
        seconds = max(time.monotonic() - now.started, 1e-9)
        facts = f"{now.failed} failed, {now.done / seconds:.1f} {now.unit}/s"
        if now.unit == "sources":
            facts = f"{now.clips} clips, {now.failed} failed, {now.frames / seconds:.0f} frames/s"
        if now.parts:
            facts += f", parts {now.parts_done}/{now.parts}"
        rate = now.done / seconds
        self.show("run", now.done, now.sources, facts, doing=now.doing, rate=rate)


def funnel(accounts: Accounts, stages: Sequence[Stage], mean_kept_s: float | None) -> Table:
    """The counts of a dataset as a table: what went in, what each rule took, what is left."""
    sources, clips = accounts.sources, accounts.clips
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_column(justify="left")
    beside = f"  ({sources['ignored']} other files ignored)" if sources["ignored"] else ""
    table.add_row("sources", f"{sources['total']:,}", _states(sources, "done") + beside)
    table.add_row("clips", f"{clips['total']:,}", "")
    left = clips["total"]
    placed: set[str] = set()
    for stage in stages:
        columns = {r.column for r in stage.rules}
        reasons = {r: n for r, n in accounts.reasons.items() if _column_of(r) in columns}
        for reason, count in reasons.items():
            table.add_row(f"  {stage.name}", f"-{count:,}", reason)
            left -= count
        placed |= reasons.keys()
    for reason in accounts.reasons.keys() - placed:
        table.add_row("  other", f"-{accounts.reasons[reason]:,}", reason)
    for state in ("failed", "duplicate", "pending"):
        if clips[state]:
            table.add_row(f"  {state}", f"-{clips[state]:,}", "")
    share = f"{clips['kept'] / clips['total']:.0%} of clips" if clips["total"] else ""
    if mean_kept_s is not None:
        share += f", {mean_kept_s:.1f} s on average (Mimir: about {PAPER_CLIP_S:.0f} s)"
    table.add_row("[bold]kept", f"[bold]{clips['kept']:,}", share)
    return table


def mean_kept_s(root: str) -> float | None:
    """Mean length of the kept clips, in seconds."""
    kept = read(root, "clips").to_table(columns=["duration_s"], filter="kept")
    return pc.mean(kept["duration_s"]).as_py()


def pair_counts(root: str) -> dict[str, dict[str, int]]:
    """By instruction, how many pairs are kept, rejected (by reason) or in another state."""
    if "pairs.lance" not in storage.names_in(root):
        return {}  # a dataset of an earlier version
    table = read(root, "pairs").to_table(columns=["instruction", "state", "reason"])
    counts: dict[str, dict[str, int]] = {}
    for row in table.group_by(table.column_names).aggregate([([], "count_all")]).to_pylist():
        of = counts.setdefault(row["instruction"], {})
        of[row["reason"] or row["state"]] = row["count_all"]
    return {name: dict(sorted(c.items(), key=lambda i: -i[1])) for name, c in counts.items()}


def show_pairs(root: str) -> None:
    """A line for the pairs of each instruction."""
    for name, counts in pair_counts(root).items():
        words = ", ".join(f"{n:,} {what}" for what, n in counts.items())
        out.print(f"pairs, {name}: {words}", highlight=False)


def show_failures(root: str, at_most: int = 10) -> None:
    """The sources that could not be read, with the reason."""
    failed = read(root, "sources").to_table(columns=["uri", "error"], filter="state = 'failed'")
    rows = failed.sort_by("uri").slice(0, at_most).to_pylist()
    for row in rows:
        out.print(
            f"  failed: {row['uri']}: {row['error']}", highlight=False, soft_wrap=True, markup=False
        )
    if failed.num_rows > at_most:
        out.print(f"  … and {failed.num_rows - at_most} more")


def _column_of(reason: str) -> str:
    return re.split(r"[<>=]", reason)[0]


def _states(counts: Mapping[str, int], *but_always: str) -> str:
    states = {k: n for k, n in counts.items() if k not in ("total", "ignored")}
    return ", ".join(f"{n:,} {k}" for k, n in states.items() if n or k in but_always)
