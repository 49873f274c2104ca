"""What the loop trains: a System in one of its stages, and the frozen encoders before it.

To add a system, fill `System` and `Learner` in one file. The loop, the data and the cache know
nothing of any paper: a sample goes through frozen encoders (whose outputs may be cached), is
collated with its noise into a batch of tensors, and the learner's module gives a loss for each
sample.

Shapes: B samples, F frames, H lines, W columns.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pyarrow as pa

from engine.operator import Operator, resource
from engine.schema import FEATURES

if TYPE_CHECKING:
    import torch
    from torch import nn

    from engine.weights import Weights

EXPORT_FORMAT = 1
"""Layout of an export; raised when an older reader could misread it."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """The shape of one batch's videos; those of a single frame are pictures."""

    frames: int
    height_px: int
    width_px: int

    @property
    def pixels(self) -> int:
        """Of one sample, in px."""
        return self.frames * self.height_px * self.width_px

    def __str__(self) -> str:
        return f"{self.frames}x{self.height_px}x{self.width_px}"


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which rows of a curated dataset a stage learns from, and how their frames are taken."""

    buckets: tuple[Bucket, ...]
    """A sample goes to the longest it fills, and among those to the one nearest in aspect."""
    table: Literal["pairs", "clips"] = "pairs"
    """`pairs` has a row for each (clip, instruction); `clips` for each clip with a caption."""
    media: tuple[str, ...] = ("image", "video")
    instructions: tuple[str, ...] = ("dense",)
    """Of pairs: those made with these."""
    fps: float = 8.0
    """Frames taken from a second of video."""
    variants: int = 1
    """Pictures of a video: how many of its frames take turns, evenly spaced; 1 is the middle."""


@dataclass
class Sample:
    """One row of the manifest on its way to the loss."""

    row: Mapping[str, Any]
    """Of the manifest."""
    bucket: Bucket
    variant: int = 0
    """Which of a video's frames, where it is a picture: 0 to `Data.variants` - 1."""
    features: dict[str, torch.Tensor] = field(default_factory=dict)
    """`pixels`, uint8 (F, H, W, 3) on the CPU, where an encoder needs them; and by the encoder's
    kind what it gave, from the cache or computed."""


@dataclass(frozen=True, kw_only=True)
class Encoder(Operator):
    """A frozen model before the trained one: a tensor for each sample.

    Training computes it on the fly, or reads what `python -m trainers cache` stored; both run the
    function that `on` gives.
    """

    kind: ClassVar[str]
    """Its name among a sample's features."""
    needs: ClassVar[tuple[str, ...]]
    """Features that it is computed from; `pixels` are decoded for it."""
    of: ClassVar[Literal["clip", "pair"]]
    """What it depends on: a clip's frames (bucket and variant count), or a pair's text alone."""
    row: ClassVar[str] = "sample"
    reads: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[pa.Schema] = pa.schema(
        [FEATURES.field(name) for name in ("dtype", "shape", "data")]
    )

    batch_size: int = resource(8)

    @abstractmethod
    def on(self, device: torch.device) -> Callable[[Sequence[Sample]], list[torch.Tensor]]:
        """The function that encodes samples of one bucket: a tensor each, on `device`."""

    def load(self) -> Callable[[pa.Table], pa.Table]:
        """Samples are not rows of a table: `trainers.cache` runs `on`."""
        raise TypeError(f"{type(self).__name__} encodes samples: call on(device)")


class Noise:
    """The randomness of a step: a pure function of (seed, step, slot of the sample, name).

    Whoever holds a sample draws the same numbers for it, so neither the number of workers nor the
    size of a micro-batch changes a run, and to go on it takes no more than the step.

    Args:
        seed: Of the run.
        step: Of the run, from 0.
        slots: Places of the samples in the step's batch.
    """

    def __init__(self, seed: int, step: int, slots: Sequence[int]):
        self.seed, self.step, self.slots = seed, step, tuple(slots)

    def normal(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """Standard normal float32 (B, *shape), on the CPU."""
        import torch

        return torch.stack([torch.randn(*shape, generator=g) for g in self._generators(name)])

    def uniform(self, name: str) -> torch.Tensor:
        """Uniform float32 in [0, 1), (B,), on the CPU."""
        import torch

        return torch.cat([torch.rand(1, generator=g) for g in self._generators(name)])

    def _generators(self, name: str) -> list[torch.Generator]:
        import torch

        keys = (f"{self.seed}:{self.step}:{slot}:{name}" for slot in self.slots)
        hashes = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
        return [torch.Generator().manual_seed(int.from_bytes(h) >> 1) for h in hashes]


class Learner(ABC):
    """A system loaded for one stage: what the loop drives."""

    module: nn.Module
    """`module(**batch)` gives float32 losses (B,). Only what it trains requires gradients, and that
    is float32."""
    groups: Mapping[str, Sequence[str]]
    """Names of the module's trained parameters, by the optimiser group of `TrainStage`."""
    blocks: Sequence[nn.Module]
    """The module's repeated layers: units of sharding, checkpointing and compilation."""
    counts: Counter[str]
    """What `batch` counted (texts that were cut, say), by a name that is there from the start; the
    loop adds its own, logs them as `num_<name>` and sets them back."""

    @abstractmethod
    def checkpoint_gradients(self) -> None:
        """From now on activations are computed again in backward, to save memory."""

    @abstractmethod
    def batch(self, samples: Sequence[Sample], noise: Noise) -> dict[str, torch.Tensor]:
        """What the module is called with, for samples of one bucket.

        Tensors have the samples along their first axis, and are on the module's device.
        """


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW for one group of parameters."""

    group: str
    """As the learner names it."""
    lr: float
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_steps: int = 0
    """The rate rises linearly from 0 over so many steps."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up; cosine falls to 0 at the stage's last step."""


@dataclass(frozen=True, kw_only=True)
class TrainStage:
    """What trains, on which rows, after which stages, and for how long."""

    name: str
    data: Data
    optim: tuple[Optim, ...]
    steps: int
    batch: int
    """Samples in a step, over all workers."""
    after: tuple[str, ...] = ()
    """Stages whose results it starts from."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of frozen weights and of autocast; trained weights, optimiser and noising are fp32."""
    clip_norm: float = 1.0
    """Largest norm of the gradient of all that is trained."""
    ema_decay: float | None = None
    """Of the exponential moving average that is exported in place of the weights."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a system says of its export on the model card."""

    title: str
    paper: str
    models: Mapping[str, str]
    """Base models by their part, each as hub id (with revision) or folder name."""
    files: Mapping[str, str]
    """What each file that was written holds."""
    usage: str
    """Python that loads and runs it, with `{folder}` for where it lies."""
    limits: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class System(ABC):
    """A paper's system as a value: base models and the sizes of what is trained on them."""

    @abstractmethod
    def check(self, stage: TrainStage) -> None:
        """Raises ValueError, one clear line, where models are missing or shapes do not meet.

        Reads configurations only; no weights are loaded.
        """

    @abstractmethod
    def encoders(self, stage: TrainStage) -> tuple[Encoder, ...]:
        """Frozen models before the trained one, each after those it needs."""

    @abstractmethod
    def learner(
        self,
        stage: TrainStage,
        device: torch.device,
        parents: Mapping[str, Mapping[str, torch.Tensor]],
    ) -> Learner:
        """The system loaded for a stage.

        Args:
            stage: Of the recipe.
            device: Where it is trained.
            parents: By the name of a stage in `after`, the parameters it trained.
        """

    @abstractmethod
    def export(
        self,
        results: Mapping[str, Mapping[str, torch.Tensor]],
        stages: Sequence[TrainStage],
        folder: Path,
    ) -> Card:
        """Writes what a pipeline loads into a folder.

        Args:
            results: By stage, the parameters that it trained.
            stages: Those stages, in the recipe's order.
            folder: An empty one.
        """

    def describe(self) -> dict[str, Any]:
        """Class and parameters, as JSON values; weights by what they hold."""
        return {"system": type(self).__name__} | {
            f.name: plain(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if not f.metadata.get("resource")
        }


def plain(value: Any) -> Any:
    """A value of a recipe as JSON values."""
    if hasattr(value, "describe"):
        return value.describe()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f for f in dataclasses.fields(value) if not f.metadata.get("resource"))
        return {f.name: plain(getattr(value, f.name)) for f in fields}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return value


def named(weights: Weights) -> str:
    """How a model card names weights: hub id with revision, or a folder's name."""
    if Path(weights.at).expanduser().exists():
        return Path(weights.at).name
    return weights.at + (f" at {weights.revision}" if weights.revision else "")


def write_pipeline(
    folder: Path, system_name: str, system: System, stages: Sequence[TrainStage]
) -> None:
    """Writes `pipeline.json`: the system as it was trained, and the shape of its videos."""
    last = stages[-1].data
    bucket = max(last.buckets, key=lambda b: b.pixels)
    about = {
        "format": EXPORT_FORMAT,
        "system": system_name,
        "stages": [stage.name for stage in stages],
        "video": {**dataclasses.asdict(bucket), "fps": last.fps},
        system_name: dataclasses.asdict(system),
    }
    text = json.dumps(about, indent=1)
    (folder / "pipeline.json").write_text(text, encoding="utf-8")


def system_of(folder: Path) -> str:
    """Which system an export is of; raises ValueError where it is none."""
    return _about(folder)["system"]


def read_pipeline(folder: Path, system_name: str) -> dict[str, Any]:
    """What `write_pipeline` wrote.

    Raises:
        ValueError: It is no export, of another system, or of a newer layout.
    """
    about = _about(folder)
    if about["system"] != system_name:
        raise ValueError(f"{folder} is an export of {about['system']}, not of {system_name}")
    return about


def _about(folder: Path) -> dict[str, Any]:
    path = folder / "pipeline.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} is no export (it has no pipeline.json): make one with"
            " `python -m trainers export RUN FOLDER`"
        )
    about = json.loads(path.read_text(encoding="utf-8"))
    if about["format"] > EXPORT_FORMAT:
        raise ValueError(f"{folder} has layout {about['format']}: update this program")
    return about
