"""A run's result as a folder that others load: weights, what they belong to, and a model card."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers import tracking
from trainers.checkpoint import load_final
from trainers.recipes import TINY, Recipe
from trainers.system import Card

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "ray")


def export(recipe: Recipe, run: Path, folder: Path) -> None:
    """Writes the export of a run whose stages have ended.

    Args:
        recipe: That was trained.
        run: Its folder.
        folder: A new one.

    Raises:
        ValueError: A stage has not ended, or the folder is there.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is there and not empty: name a new folder")
    results = {}
    for stage in recipe.stages:
        found = load_final(run / stage.name)
        if found is None:
            raise ValueError(f"{run} has no stage {stage.name} that ended: train it first")
        results[stage.name] = found[1]
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = folder.with_name(f".{folder.name}-{os.getpid()}")
    made.mkdir()
    try:
        card = recipe.system.export(results, recipe.stages, made)
        facts = {stage.name: _facts(run / stage.name) for stage in recipe.stages}
        _write_instructions(made / "instructions", facts)
        (made / "training.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        words = model_card(card, recipe, facts, _checksums(made), folder.name)
        (made / "README.md").write_text(words, encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        made.rename(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _write_instructions(folder: Path, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Puts the instructions that the pairs were made with in place of the project's own."""
    for fact in facts.values():
        for name, texts in fact["config"]["data"]["instructions"].items():
            if folder.is_dir() and len(texts) == 1:
                (folder / f"{name}.txt").write_text(texts[0], encoding="utf-8")


def model_card(
    card: Card,
    recipe: Recipe,
    facts: Mapping[str, Mapping[str, Any]],
    checksums: Mapping[str, str],
    folder: str,
) -> str:
    """The model card in Markdown, with the front matter that a model hub reads."""
    tiny = recipe.name.startswith(TINY)
    parts = [
        "---\nlibrary_name: diffusers\npipeline_tag: text-to-video\ntags: [reelwright]\n---",
        f"# {card.title}\n\nRecipe `{recipe.name}`, after {card.paper}.",
        "**Trained on small random models for tests: what it makes is MEANINGLESS.**"
        if tiny
        else "",
        "## Base models\n\nTheir licences bind what is made of them.\n\n"
        + _table(("part", "model"), card.models.items()),
        f"## Use\n\n```python\n{card.usage.format(folder=folder)}```",
        "## Training\n\n"
        + _table(
            ("stage", *_COLUMNS),
            ((name, *(_shown(f.get(c)) for c in _COLUMNS.values())) for name, f in facts.items()),
        )
        + "\n\nThe whole configuration, and the data by its hash, is in `training.json`.",
        "## Evaluation\n\nNot evaluated.",
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in card.limits) if card.limits else "",
        "## Files\n\n"
        + _table(
            ("file", "what", "sha256"),
            ((n, what, checksums.get(n, "")[:16]) for n, what in card.files.items()),
        ),
        "Made with "
        + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
        + ".",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_COLUMNS = {
    "samples": "samples",
    "data hash": "data_hash",
    "steps": "steps",
    "batch": "batch",
    "trained parameters": "trained_parameters",
    "loss, first and last tenth": "losses",
    "samples/s": "samples_per_s",
    "memory, GiB": "memory_gib",
    "hardware": "hardware",
}


def _facts(stage: Path) -> dict[str, Any]:
    """What the card says of a stage, from its configuration and its metrics."""
    config = json.loads((stage / "config.json").read_text(encoding="utf-8"))
    steps, tensors = load_final(stage) or (0, {})
    lines = tracking.read(stage)
    losses = [line["loss"] for line in lines if line["loss"] is not None]
    tenth = max(1, len(losses) // 10)
    speeds = [line for line in lines if "samples_per_s" in line]
    return {
        "samples": config["data"]["samples"],
        "data_hash": config["data"]["hash"][:16],
        "steps": steps,
        "batch": config["stage"]["batch"],
        "trained_parameters": sum(t.numel() for t in tensors.values()),
        "losses": [sum(part) / len(part) for part in (losses[:tenth], losses[-tenth:]) if part],
        "samples_per_s": speeds[-1]["samples_per_s"] if speeds else None,
        "memory_gib": max((line["memory_gib"] for line in speeds), default=None),
        "hardware": json.loads((stage / "machine.json").read_text(encoding="utf-8"))["hardware"],
        "config": config,
    }


def _checksums(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return ", ".join(_shown(v) for v in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
