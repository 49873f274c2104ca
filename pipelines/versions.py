"""What a run records of where its numbers come from."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.recipes import Recipe

DISTRIBUTIONS = (
    "ray pylance pyarrow av opencv-python scenedetect decord rapidocr onnxruntime"
    " torch torchvision transformers open-clip-torch"
).split()


def provenance(recipe: Recipe, src: Sequence[str]) -> dict[str, Any]:
    """Columns of the `runs` table: the resolved recipe, library versions, git commit, what for."""
    return {
        "resolved": json.dumps(recipe.describe()),
        "versions": json.dumps({name: _version(name) for name in DISTRIBUTIONS}),
        "git_commit": _git_commit(),
        "src": json.dumps(list(src)),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
