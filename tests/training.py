"""Trains recipes on small random models, for the tests of each system."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from trainers import launch, tracking
from trainers.__main__ import main
from trainers.checkpoint import load_final
from trainers.export import export
from trainers.job import Job, Options
from trainers.recipes import Recipe
from trainers.system import TrainStage


def refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *arguments: object,
    words: Sequence[str],
) -> None:
    """Runs `python -m trainers`, which must say one line with these words, and end."""
    monkeypatch.setattr(sys, "argv", ["trainers", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("recipe tiny")]
    assert len(said) == 1 and said[0].startswith("error: "), said
    assert all(word in said[0] for word in words), said


def job_of(found: Recipe, stage: TrainStage, root: object, out: Path, **options: object) -> Job:
    chosen = {"trackers": (), "log_every": 1, "micro_batch": 2, "torch_threads": 1} | options
    return Job(
        recipe=found.name,
        system=found.system,
        stage=stage,
        root=str(root),
        out=str(out),
        options=Options(**chosen),  # type: ignore[arg-type]
    )


def train(found: Recipe, root: Path, out: Path, **options: object) -> None:
    for stage in found.stages:
        job = job_of(found, stage, root, out, **options)
        launch.check(job, 1)
        launch.alone(job)


@dataclasses.dataclass
class Trained:
    """A run of a recipe, and its export."""

    recipe: Recipe
    run: Path
    export: Path

    @classmethod
    def of(cls, found: Recipe, root: Path, folder: Path) -> Trained:
        train(found, root, folder / "run")
        export(found, folder / "run", folder / "export")
        return cls(found, folder / "run", folder / "export")

    def stage(self, name: str) -> dict[str, torch.Tensor]:
        found = load_final(self.run / name)
        assert found
        return found[1]

    def losses(self, name: str) -> list[float]:
        return [line["loss"] for line in tracking.read(self.run / name)]
