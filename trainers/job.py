"""What is trained and how: values that a launcher sends to every worker."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engine.weights import digest
from trainers.system import Bucket, System, TrainStage, plain

if TYPE_CHECKING:
    from trainers.dataset import Manifest


FINAL = "final.safetensors"
"""What a stage trained, in its folder when it has ended."""


class Stopped(RuntimeError):
    """Training cannot go on, and trying again would not help: one line for its user."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a run is carried out. Nothing here changes a result beyond rounding."""

    micro_batch: int = 1
    """Samples of the recipe's largest bucket that a worker holds at once; of smaller ones more."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Copies of the model (ddp), or its shards (fsdp: FSDP2)."""
    gradient_checkpointing: bool = False
    """Compute activations again in backward: less memory, a third more work."""
    compile: bool = False
    """torch.compile of the model's blocks."""
    deterministic: bool = False
    """Only algorithms that give the same bits on a GPU every time; the CPU's always do."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep: int = 3
    """Newest checkpoints that stay."""
    async_save: bool = True
    """Save beside the training."""
    log_every: int = 10
    """Steps whose figures are written together."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """tensorboard, wandb, mlflow."""
    patience: int = 20
    """Steps in a row without a finite gradient after which a run stops."""
    ahead: int = 2
    """Steps whose samples are read in advance."""
    threads: int = 4
    """That read samples, for each worker."""
    torch_threads: int | None = None
    """Of a worker's arithmetic on the CPU; None is its share of the cores."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One stage of a run, as every worker is told it; a value that can be sent to them."""

    recipe: str
    system: System
    stage: TrainStage
    root: str
    """Of the dataset."""
    out: str
    """Folder of the run, absolute, seen by all workers."""
    options: Options
    largest_px: int | None = None
    """Pixels of a sample of the recipe's largest bucket; None is the stage's own."""

    @property
    def folder(self) -> Path:
        """The stage's own."""
        return Path(self.out) / self.stage.name

    def micro_batch(self, bucket: Bucket) -> int:
        """Samples of a bucket that a worker holds at once."""
        largest = self.largest_px or max(b.pixels for b in self.stage.data.buckets)
        return max(1, self.options.micro_batch * largest // bucket.pixels)

    def config(self, manifest: Manifest) -> dict[str, Any]:
        """What decides on the numbers: another one is another training."""
        stage = plain(self.stage)
        if all(o.schedule == "constant" for o in self.stage.optim):
            del stage["steps"]  # more of the same
        data = {
            "hash": manifest.hash,
            "samples": len(manifest),
            "instructions": manifest.instructions,
        }
        found = {"recipe": self.recipe, "system": self.system.describe(), "stage": stage}
        ended = {name: Path(self.out) / name / FINAL for name in self.stage.after}
        parents = {name: digest(path) if path.exists() else None for name, path in ended.items()}
        return found | {"data": data, "starts_from": parents}
