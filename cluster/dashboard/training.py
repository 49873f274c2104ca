"""Training runs for the page that shows them: what their folders say, and samples of their models.

Numbers come from `train_metrics.lance`; stages that it lacks (an earlier version trained them, or
its driver has not come to them yet) from the journals beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lance
import numpy as np
import pandas as pd
import streamlit as st

from cluster.dashboard import lance_sql
from cluster.dashboard.lance_sql import quoted
from engine import storage
from evals.evaluation import plans
from trainers.recipes import TINY

RUN, CONFIG, MACHINE, FINAL = "run.json", "config.json", "machine.json", "final.safetensors"
JOURNAL, TABLE = "metrics.jsonl", "train_metrics.lance"
SAMPLES = "samples"
"""Folder of a run in which the page looks for videos and pictures."""
MOST_POINTS = 1_200
"""Of a curve; longer ones are means over equal stretches of steps."""
_VIDEOS, _PICTURES = (".mp4", ".webm"), (".png", ".jpg", ".jpeg")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of a run, as its folder has it."""

    name: str
    lines: tuple[Mapping[str, Any], ...]
    """Of metrics, in the order of steps."""
    config: Mapping[str, Any]
    """What decided on its numbers; empty where it cannot be read."""
    machine: Mapping[str, str]
    checkpoints: tuple[int, ...]
    """Steps of the finished ones that are kept."""
    has_ended: bool

    @property
    def steps(self) -> int:
        """That are done, and logged."""
        return self.lines[-1]["step"] + 1 if self.lines else 0

    @property
    def asked(self) -> int | None:
        """Steps that were asked for; None of a stage with a constant rate, which may go on."""
        return self.config.get("stage", {}).get("steps")

    def last(self, name: str) -> Any:
        """The newest value of a figure."""
        found = (line[name] for line in reversed(self.lines) if line.get(name) is not None)
        return next(found, None)

    def total(self, name: str) -> float:
        """The sum of a figure that counts."""
        return sum(line.get(name) or 0 for line in self.lines)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run."""

    folder: str
    name: str
    about: Mapping[str, Any]
    """Recipe, settings, models, dataset: `run.json`."""
    stages: tuple[Stage, ...]
    note: str = ""
    """What could not be read."""

    @property
    def recipe(self) -> str:
        """Its name."""
        return self.about.get("recipe") or next(
            (str(s.config["recipe"]) for s in self.stages if "recipe" in s.config), "–"
        )

    @property
    def is_tiny(self) -> bool:
        """It trained small random models."""
        return self.recipe.startswith(TINY)


def runs(folders: Sequence[str]) -> list[Run]:
    """Training runs: the folders themselves, or those directly in them."""
    found = [one for folder in folders for one in _folders_of(folder)]
    names = _names(found)
    return [read_run(folder, names[folder]) for folder in dict.fromkeys(found)]


def _names_in(uri: str) -> list[str]:
    """Of what is in a folder; a file has none."""
    try:
        return storage.names_in(uri)
    except NotADirectoryError:
        return []


def _folders_of(folder: str) -> list[str]:
    inside = _names_in(folder)
    if RUN in inside or TABLE in inside or _stages_in(folder, inside):
        return [folder]
    below = [storage.join(folder, name) for name in inside]
    return [one for one in below if RUN in _names_in(one)] or [folder]


def _stages_in(folder: str, inside: Sequence[str]) -> list[str]:
    return [n for n in inside if JOURNAL in _names_in(storage.join(folder, n))]


def _names(folders: Sequence[str]) -> dict[str, str]:
    """Last parts of paths; more of them where two would be called the same."""
    parts = {folder: folder.rstrip("/").split("/") for folder in folders}
    found = {}
    for folder, own in parts.items():
        size = 1
        others = [other for at, other in parts.items() if at != folder]
        while size < len(own) and any(other[-size:] == own[-size:] for other in others):
            size += 1
        found[folder] = "/".join(own[-size:])
    return found


def read_run(folder: str, name: str) -> Run:
    """What a run's folder says; one without anything has no stages."""
    inside = _names_in(folder)
    stored, note = _table(folder) if TABLE in inside else ({}, "")
    names = dict.fromkeys([*stored, *_stages_in(folder, inside)])
    about = _json(storage.join(folder, RUN)) if RUN in inside else {}
    stages = [_stage(storage.join(folder, one), one, stored.get(one)) for one in names]
    return Run(folder=folder, name=name, about=about, stages=tuple(_in_order(stages)), note=note)


def _table(folder: str) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """Lines by stage, and what is wrong with the table."""
    uri = storage.join(folder, TABLE)
    try:
        return _rows(lance.dataset(uri, storage_options=storage.lance_options(uri))), ""
    except (ValueError, OSError) as error:
        why = str(error).splitlines()[0]
        return {}, f"{TABLE} cannot be read, its journals are shown instead: {why}"


@st.cache_resource(max_entries=16, show_spinner=False, hash_funcs=lance_sql.BY_STAMP)
def _rows(table: lance.LanceDataset) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_table(columns=["stage", "figures"]).to_pylist():
        found.setdefault(row["stage"], []).append(json.loads(row["figures"]))
    return {stage: sorted(lines, key=lambda line: line["step"]) for stage, lines in found.items()}


def _stage(folder: str, name: str, stored: list[dict[str, Any]] | None) -> Stage:
    inside = _names_in(folder)
    lines = stored if stored else (_journal(folder) if JOURNAL in inside else [])
    done = [one for one in inside if one.startswith("step_")]
    return Stage(
        name=name,
        lines=tuple(lines),
        config=_json(storage.join(folder, CONFIG)) if CONFIG in inside else {},
        machine=_json(storage.join(folder, MACHINE)) if MACHINE in inside else {},
        checkpoints=tuple(
            int(one.removeprefix("step_"))
            for one in done
            if "COMPLETE" in _names_in(storage.join(folder, one))
        ),
        has_ended=FINAL in inside,
    )


def _journal(folder: str) -> list[dict[str, Any]]:
    """Its whole lines; what is behind one that cannot be read is left out."""
    text = storage.read_bytes(storage.join(folder, JOURNAL)).decode("utf-8", "replace")
    found = []
    for line in text.splitlines(keepends=True):
        try:
            if line.endswith("\n"):
                found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def _json(uri: str) -> dict[str, Any]:
    try:
        found = json.loads(storage.read_bytes(uri))
    except (OSError, ValueError):  # it is being written
        return {}
    return found if isinstance(found, dict) else {}


def _in_order(stages: Sequence[Stage]) -> list[Stage]:
    """Each behind those that it starts from."""
    left, found = list(stages), list[Stage]()
    while left:
        names = {stage.name for stage in left}
        ready = [s for s in left if not names & set(s.config.get("stage", {}).get("after", ()))]
        found += ready or left
        left = [stage for stage in left if stage not in found]
    return found


def figures_of(stages: Sequence[Stage]) -> list[str]:
    """Names of what was logged, in the order of the lines."""
    return list(dict.fromkeys(k for s in stages for line in s.lines for k in line if k != "step"))


def curve(stage: Stage, name: str, smoothing: float) -> list[dict[str, float | None]]:
    """A figure over steps: as it was, and as a running mean. At most `MOST_POINTS` of them.

    Args:
        stage: Whose.
        name: Of the figure.
        smoothing: Weight of what was before, 0 is none; corrected for the start, as TensorBoard's.
    """
    pairs = [(line["step"], line[name]) for line in stage.lines if line.get(name) is not None]
    if not pairs:
        return []
    steps, values = (np.array(column, float) for column in zip(*pairs, strict=True))
    smooth = smoothed(values, smoothing)
    pieces = np.array_split(np.arange(len(values)), min(len(values), MOST_POINTS))
    return [
        {
            "step": float(steps[piece].mean()) if len(piece) > 1 else float(steps[piece[0]]),
            "value": float(values[piece].mean()),
            "smooth": float(smooth[piece].mean()),
        }
        for piece in pieces
    ]


def smoothed(values: np.ndarray, weight: float) -> np.ndarray:
    """The exponential running mean, of what there is at the start."""
    return pd.Series(values).ewm(alpha=1 - weight).mean().to_numpy()


# Samples


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Something to look at that a run's model made."""

    caption: str
    uri: str = ""
    """A file."""
    generation_id: str = ""
    """Or a row of `generations`."""
    is_video: bool = True
    about: str = ""


def samples_in(run: Run, most: int) -> list[Sample]:
    """Some videos and pictures of the run's folder `samples`, where `generate --out` puts them."""
    folder = storage.join(run.folder, SAMPLES)
    found = []
    names = [name for name in _names_in(folder) if name.lower().endswith(_VIDEOS + _PICTURES)]
    for name in names[:most]:
        stem = name.rpartition(".")[0]
        uri = storage.join(folder, name)
        if name.lower().endswith(_VIDEOS):
            said = _json(storage.join(folder, f"{stem}.json"))
            found.append(
                Sample(
                    caption=str(said.get("prompt") or stem),
                    uri=uri,
                    about=str(said.get("rephrased") or ""),
                )
            )
        else:
            found.append(Sample(caption=name, uri=uri, is_video=False))
    return found


def exports_of(run: Run, root: str) -> dict[str, str]:
    """Models of evaluations that are exports of this run, with their checkpoints.

    An export holds the whole configuration of each stage that it came from: where all of them are
    this run's, and as many steps were taken, so are its weights.
    """
    if not lance_sql.has_rows(root, "runs") or not run.stages:
        return {}
    evaluated = _evaluated(lance_sql.newest(root, "runs"), root)
    return {name: checkpoint for (name, at), checkpoint in evaluated.items() if _is_of(at, run)}


@st.cache_resource(max_entries=4, show_spinner=False, hash_funcs=lance_sql.BY_STAMP)
def _evaluated(table: lance.LanceDataset, root: str) -> dict[tuple[str, str], str]:
    """Newest checkpoint of each export that was evaluated, by name and folder."""
    found: dict[tuple[str, str], str] = {}
    for plan in plans(root):
        for model in plan.models:
            if model["kind"] == "export" and model["checkpoint"]:
                found.setdefault((model["name"], model["at"]), model["checkpoint"])
    return found


def _is_of(export: str, run: Run) -> bool:
    facts = _json(storage.join(export, "training.json"))
    stages = {stage.name: stage for stage in run.stages}
    return bool(facts) and all(
        name in stages
        and fact.get("config") == stages[name].config
        and fact.get("steps") == stages[name].steps
        for name, fact in facts.items()
    )


def samples_of(root: str, model: str, checkpoint: str, most: int) -> list[Sample]:
    """Videos that an evaluation has of a model, spread over its prompts."""
    if not lance_sql.has_rows(root, "generations"):
        return []
    of = f"model = {quoted(model)} AND checkpoint = {quoted(checkpoint)}"
    rows = lance_sql.newest(root, "generations").to_table(
        columns=["generation_id", "prompt", "sample", "rephrased"],
        filter=f"{of} AND error_type IS NULL",
    ).to_pylist()  # fmt: skip
    rows.sort(key=lambda row: (row["sample"], row["prompt"]))
    chosen = [rows[i * len(rows) // most] for i in range(most)] if len(rows) > most else rows
    return [
        Sample(
            caption=row["prompt"],
            generation_id=row["generation_id"],
            about=row["rephrased"] or "",
        )
        for row in chosen
    ]
