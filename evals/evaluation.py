"""Scores of an evaluation as its models have them: what tables, ranks, drift and tests are made of.

Nothing is kept in memory between commands: a run's row in `runs` says what was asked for (suite,
models, metrics), `generations` and `scores` what came of it.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.tables import DatasetError, read
from evals import drift, segments
from evals.compare import mean_and_error
from evals.dimensions import DIMENSIONS
from evals.merge import merge
from evals.metric import NO_OBJECT
from evals.results import Cell, Value
from evals.static import chosen
from evals.suites import Prompt, Suite

KIND = "evaluation "
"""How `runs.recipe` of an evaluation begins."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an evaluation was asked for: a row of `runs`."""

    recipe: str
    suite: Suite
    models: tuple[Mapping[str, Any], ...]
    """As `evals.models.Model.describe` gives them."""
    dimensions: tuple[str, ...]
    metrics: Mapping[str, Mapping[str, str]]
    """By dimension: fingerprint and implementation."""
    seed: int
    clips: bool
    drift: tuple[str, ...]
    is_tiny: bool
    is_filtered: bool
    """Flickering is measured on what VBench's static filter leaves."""
    run_id: str = ""
    videos: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """By folder of finished videos what it held when the run ended; see `held`."""

    def model(self, name: str) -> Mapping[str, Any]:
        """What the run says of a model."""
        return next(m for m in self.models if m["name"] == name)

    def resolved(self) -> str:
        """As JSON, for `runs.resolved`."""
        said = {name: x for name, x in vars(self).items() if name != "videos"}
        return json.dumps(said | {"suite": json.loads(self.suite.to_json())})

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Plan:
        """From a row of `runs`."""
        said = json.loads(row["resolved"])
        return cls(
            recipe=said["recipe"],
            suite=Suite.from_json(json.dumps(said["suite"])),
            models=tuple(said["models"]),
            dimensions=tuple(said["dimensions"]),
            metrics=said["metrics"],
            seed=said["seed"],
            clips=said["clips"],
            drift=tuple(said["drift"]),
            is_tiny=said["is_tiny"],
            is_filtered=said["is_filtered"],
            run_id=row["run_id"],
            videos=json.loads(row.get("counts") or "{}").get("videos", {}),
        )


def runs_of(root: str, recipe: str | None = None) -> list[dict[str, Any]]:
    """Rows of `runs` that are evaluations, the newest first.

    Raises:
        DatasetError: There is no dataset.
    """
    name = f"{KIND}{recipe}" if recipe else KIND
    table = read(root, "runs")
    columns = ["run_id", "recipe", "resolved", "started_at", "seconds", "interrupted", "counts"]
    columns += ["night"] if "night" in table.schema.names else []  # not of an earlier version
    rows = table.to_table(columns=columns, filter=f"starts_with(recipe, '{name}')")
    found = [r for r in rows.to_pylist() if recipe is None or r["recipe"] == name]
    return sorted(found, key=lambda r: r["started_at"], reverse=True)


def plans(root: str, recipe: str | None = None) -> list[Plan]:
    """Evaluations of a dataset, the newest first."""
    return [Plan.of(row) for row in runs_of(root, recipe)]


@dataclass(kw_only=True)
class Results:
    """The scores of one evaluation: what the newest runs of its suite say of each model."""

    plan: Plan
    """The newest."""
    models: dict[str, Plan]
    """As they were asked for, with the run that each is taken from."""
    _rows: dict[str, _Stored] = field(default_factory=dict)

    @classmethod
    def read(
        cls, root: str, *, recipe: str | None = None, models: Sequence[str] | None = None
    ) -> Results:
        """Reads the newest evaluation, with all models that earlier ones had on the same suite.

        Args:
            root: The dataset.
            recipe: Of this recipe.
            models: These alone, in this order. NAME is a model as the newest run has it that
                it was part of, NAME@RUN as the run has it whose id begins so.

        Raises:
            DatasetError: There is no such evaluation, or a model has no part in it.
        """
        found = plans(root, recipe)
        if not found:
            of = f" of recipe {recipe}" if recipe else ""
            raise DatasetError(f"{root} has no evaluation{of}: `python -m evals run` makes one")
        newest = found[0]
        alike = [
            p for p in found if (p.suite.digest, p.clips) == (newest.suite.digest, newest.clips)
        ]
        asked = models or dict.fromkeys(m["name"] for plan in alike for m in plan.models)
        return cls.of(root, newest, {one: _plan_of(root, alike, one) for one in asked})

    @classmethod
    def of(cls, root: str, plan: Plan, models: Mapping[str, Plan]) -> Results:
        """Reads the scores of models, each as a run has it.

        Args:
            root: The dataset.
            plan: The newest of the runs.
            models: By NAME or NAME@RUN.
        """
        rows = {one: _Stored.read(root, _name(one), of) for one, of in models.items()}
        return cls(plan=plan, models=dict(models), _rows=rows)

    @property
    def categories(self) -> tuple[str, ...]:
        """Of the suite, in its order."""
        return tuple(dict.fromkeys(c for p in self.plan.suite.prompts for c in p.categories))

    def cells(self, dimensions: Sequence[str] | None = None) -> list[Cell]:
        """Every model's score in every dimension and its drift, overall and by category."""
        made = []
        for model, plan in self.models.items():
            for dimension in dimensions or plan.dimensions:
                if dimension in plan.dimensions:
                    values = self.values(model, dimension)
                    made += [
                        self._cell(model, dimension, category, values)
                        for category in (None, *self.categories)
                    ]
            for dimension in plan.drift:
                if not dimensions or dimension in dimensions:
                    made += [
                        self._drift_cell(model, dimension, category)
                        for category in (None, *self.categories)
                    ]
        return made

    def fps(self, model: str) -> float:
        """Frame rate of the model's videos, the middle one where they differ."""
        found = [row["fps"] for row in self._rows[model].videos.values() if row["fps"]]
        return float(np.median(found)) if found else 1.0

    def values(self, model: str, dimension: str) -> list[Value]:
        """The score of each video that the suite asks for, in its order."""
        plan, stored = self.models[model], self._rows[model]
        return [
            stored.value(plan, prompt, sample, dimension)
            for prompt, sample in self._expected(model, dimension)
        ]

    def drifts(
        self, model: str, dimension: str, category: str | None = None
    ) -> drift.DriftSummary | None:
        """How far a dimension drifts within the model's videos; None where nothing was scored."""
        plan, stored = self.models[model], self._rows[model]
        rows = [
            row
            for prompt, sample in self._expected(model, dimension)
            if category is None or category in prompt.categories
            for row in stored.all_of(plan, prompt, sample, dimension)
        ]
        return drift.measure(rows) if rows else None

    def _expected(self, model: str, dimension: str) -> Iterator[tuple[Prompt, int]]:
        plan, stored = self.models[model], self._rows[model]
        for prompt in plan.suite.prompts:
            if dimension not in prompt.dimensions:
                continue
            samples: Sequence[int] = range(prompt.samples)
            if plan.is_filtered and dimension == "temporal_flickering":
                samples = stored.static(plan, prompt)
            for sample in samples:
                yield prompt, sample

    def _cell(
        self, model: str, dimension: str, category: str | None, values: Sequence[Value]
    ) -> Cell:
        plan = self.models[model]
        values = [v for v in values if category is None or category in v.categories]
        scored = [v for v in values if v.score is not None]
        left_out = sum(v.error == NO_OBJECT for v in values)
        stderr = None
        if scored:
            _, stderr = mean_and_error([v.score or 0.0 for v in scored], [v.prompt for v in scored])
        if plan.clips:  # the mean over long videos of the mean over their clips
            merged = float(np.mean([v.score for v in scored])) if scored else None
        else:
            merged = merge(dimension, [v.details for v in scored if v.details is not None])
        return Cell(
            model=model,
            column=dimension,
            category=category,
            value=merged,
            stderr=stderr,
            num_videos=len(scored),
            num_prompts=len({v.prompt for v in scored}),
            num_expected=len(values) - left_out,
            num_failed=len(values) - left_out - len(scored),
            notes=self._notes(model, dimension),
            values=scored,
        )

    def _drift_cell(self, model: str, dimension: str, category: str | None) -> Cell:
        expected = [
            prompt
            for prompt, _ in self._expected(model, dimension)
            if category is None or category in prompt.categories
        ]
        notes = self._notes(model, dimension)
        found = self.drifts(model, dimension, category)
        if found is None:
            return Cell(
                model=model,
                column=drift.COLUMN + dimension,
                category=category,
                value=None,
                stderr=None,
                num_videos=0,
                num_prompts=0,
                num_expected=len(expected),
                num_failed=0,
                notes=notes,
            )
        (cell,) = drift.cells([found], num_expected=len(expected), notes=notes)
        lacking = len(expected) - cell.num_videos  # failed, or too short to have two ends
        return dataclasses.replace(cell, model=model, category=category, num_failed=lacking)

    def _notes(self, model: str, dimension: str) -> tuple[str, ...]:
        plan = self.models[model]
        ours, newest = plan.metrics.get(dimension), self.plan.metrics.get(dimension)
        notes = []
        if plan.is_tiny:
            notes.append("tiny")
        if "tiny" in plan.model(_name(model)).get("notes", ()):
            notes.append("MEANINGLESS: its videos are a small random model's")
        if ours and ours["implementation"] == "native":
            notes.append("native")
        if dimension == "temporal_flickering":
            notes.append("filtered" if plan.is_filtered else "unfiltered")
        if plan.clips:
            notes.append(segments.LONG_CLIP)
        if ours and newest and ours["fingerprint"] != newest["fingerprint"]:
            notes.append("scored with other weights or versions")
        return tuple(notes)


def _name(model: str) -> str:
    return model.partition("@")[0]


def _plan_of(root: str, plans: Sequence[Plan], model: str) -> Plan:
    """The newest run that a model, or a model of a run, was part of."""
    name, _, run = model.partition("@")
    for plan in plans:
        if plan.run_id.startswith(run) and any(m["name"] == name for m in plan.models):
            return plan
    there = dict.fromkeys(m["name"] for plan in plans for m in plan.models)
    of = f" in a run {run}…" if run else ""
    raise DatasetError(
        f"{root} has no scores of {name}{of}: it has {', '.join(there)}"
        " (`python -m evals runs` lists the runs)"
    )


@dataclass(kw_only=True)
class _Stored:
    """What is stored of one model's videos."""

    videos: dict[tuple[str, str, int], Mapping[str, Any]]
    """Rows of `generations` by prompt, text and sample."""
    scores: dict[tuple[str, str], list[Mapping[str, Any]]]
    """Rows of `scores` by generation and dimension: the whole video's, and segments'."""

    @classmethod
    def read(cls, root: str, name: str, plan: Plan) -> _Stored:
        videos = _as_held(plan, name)
        if videos is None:
            videos = videos_of(root, plan.model(name), plan.seed)
        ids = pa.array({row["generation_id"] for row in videos.values()}, pa.string())
        fingerprints = pa.array({m["fingerprint"] for m in plan.metrics.values()}, pa.string())
        quoted = name.replace("'", "''")
        by_key: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
        # of a model that is evaluated every night the table holds far more than what is wanted
        for batch in read(root, "scores").to_batches(filter=f"model = '{quoted}'"):
            batch = batch.filter(pc.is_in(batch["generation_id"], ids))
            for row in batch.filter(pc.is_in(batch["fingerprint"], fingerprints)).to_pylist():
                by_key[row["generation_id"], row["dimension"]].append(row)
        return cls(videos=videos, scores=by_key)

    def all_of(
        self, plan: Plan, prompt: Prompt, sample: int, dimension: str
    ) -> list[dict[str, Any]]:
        """Rows of one video and dimension, with the rate and the details that drift needs."""
        video = self.videos.get((prompt.prompt, prompt.text, sample))
        rows = self.scores.get((video["generation_id"], dimension), []) if video else []
        of_metric = plan.metrics[dimension]["fingerprint"]
        return [
            {
                **row,
                "fps": video["fps"] if video else None,
                "categories": prompt.categories,
                "details": json.loads(row["details"]) if row["details"] else None,
            }
            for row in rows
            if row["fingerprint"] == of_metric
        ]

    def static(self, plan: Plan, prompt: Prompt) -> list[int]:
        """The samples of a prompt that flickering is measured on."""
        rows = [
            row
            for sample in range(prompt.samples)
            for row in self.all_of(plan, prompt, sample, "static")
        ]
        return chosen(rows).get(prompt.prompt, [])

    def value(self, plan: Plan, prompt: Prompt, sample: int, dimension: str) -> Value:
        video = self.videos.get((prompt.prompt, prompt.text, sample))
        rows = self.all_of(plan, prompt, sample, dimension)
        in_clips = plan.clips and video and DIMENSIONS[dimension].frames != "mean"
        wanted = (
            [r for r in rows if r["segment"] in _clips(video)]
            if in_clips
            else [r for r in rows if r["segment"] is None]
        )
        about = {"prompt": prompt.prompt, "sample": sample, "categories": prompt.categories}
        if not wanted:
            why = (video["error"] if video else "there is no video") or "not scored yet"
            return Value(**about, score=None, error=why)
        failed = [r for r in wanted if r["score"] is None]
        if failed:
            error = failed[0]
            no_object = error["error_type"] == NO_OBJECT
            return Value(**about, score=None, error=NO_OBJECT if no_object else error["error"])
        if in_clips:
            score = float(np.mean([r["score"] for r in wanted]))
            return Value(**about, score=score, num_frames=video["num_frames"])
        (row,) = wanted
        scale, frames = DIMENSIONS[dimension].scale, row["frame_scores"]
        score = row["score"]
        if plan.clips and frames:
            clips = segments.two_second_clips(video["num_frames"], video["fps"])
            score = float(np.mean([np.mean(frames[a:b]) for a, b in clips])) * scale
        return Value(
            **about,
            score=score,
            num_frames=row["num_frames"],
            frame_scores=frames
            and tuple(None if score is None else score * scale for score in frames),
            details=row["details"],
        )


def _clips(video: Mapping[str, Any]) -> set[str]:
    clips = segments.two_second_clips(video["num_frames"], video["fps"])
    return {segments.str_of(clip) for clip in clips}


def videos_of(
    root: str, model: Mapping[str, Any], seed: int
) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Rows of `generations`, without the videos, of a model as it is described.

    By prompt, text and sample; where there are several, the newest.
    """
    columns = [n for n in read(root, "generations").schema.names if n != "mp4"]
    wanted = {n: model[n] for n in ("name", "checkpoint") if model[n] is not None}
    quoted = {n: value.replace("'", "''") for n, value in wanted.items()}
    where = f"model = '{quoted['name']}'"
    if "checkpoint" in quoted:
        where += f" AND checkpoint = '{quoted['checkpoint']}'"
    rows = read(root, "generations").to_table(columns=columns, filter=where)
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in sorted(rows.to_pylist(), key=lambda r: r["created_at"]):
        if row["model_kind"] != model["kind"] or row["checkpoint"] != model["checkpoint"]:
            continue
        if model["kind"] == "folder" or (
            json.loads(row["settings"]) == model["settings"] and row["seed"] == seed + row["sample"]
        ):
            found[row["prompt"], row["text"], row["sample"]] = row
    return found


_HELD = ("generation_id", "num_frames", "fps", "error")


def held(suite: Suite, videos: Mapping[tuple[str, str, int], Mapping[str, Any]]) -> list[Any]:
    """What a folder holds of a suite, for `runs`: a later import takes the place of its videos.

    In the order of `Suite.videos`; None where there is no video.
    """
    rows = (videos.get((p.prompt, p.text, sample)) for p, sample in suite.videos())
    return [row and [row[name] for name in _HELD] for row in rows]


def _as_held(plan: Plan, name: str) -> dict[tuple[str, str, int], dict[str, Any]] | None:
    """Videos of a folder as a run found them; None where the run did not say."""
    if name not in plan.videos:
        return None
    rows = zip(plan.suite.videos(), plan.videos[name], strict=True)
    return {
        (p.prompt, p.text, sample): dict(zip(_HELD, row, strict=True))
        for (p, sample), row in rows
        if row is not None
    }
