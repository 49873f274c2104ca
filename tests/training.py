"""Trains recipes on small random models, for the tests of each system."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from trainers import launch, tracking
from trainers.checkpoint import load_final
from trainers.export import export
from trainers.job import Job, Options
from trainers.recipes import Recipe
from trainers.system import TrainStage


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
