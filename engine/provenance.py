"""What a run records of where its numbers come from."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DISTRIBUTIONS = (
    "ray pylance pyarrow av opencv-python scenedetect decord rapidocr onnxruntime"
    " torch torchvision transformers diffusers open-clip-torch openai-clip timm pyiqa vbench"
).split()


def provenance(resolved: str, src: Sequence[str]) -> dict[str, Any]:
    """Columns of the `runs` table: what was asked for, library versions, git commit, what for.

    Args:
        resolved: The whole recipe, as JSON.
        src: What it was run on.
    """
    return {
        "resolved": resolved,
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
