"""A system that is small enough to train in a moment: it learns to take noise off two numbers."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from small_sets import Item, Projected, make_set, numbered, picture
from torch import Tensor, nn

from engine.operator import resource
from trainers.job import Job, Options
from trainers.system import (
    Bucket,
    Card,
    Data,
    Encoder,
    Learner,
    Noise,
    Optim,
    Sample,
    System,
    TrainStage,
)

DATA = Data(
    buckets=(
        Bucket(frames=1, height_px=8, width_px=8),
        Bucket(frames=4, height_px=8, width_px=8),
    )
)


@dataclass(frozen=True, kw_only=True)
class Denoise(System):
    """Two layers that learn, between two that do not."""

    width: int = 16
    burst_from: int | None = None
    """A step from which on the loss is infinite, for samples in the first slot."""
    burst_for: int = 10**9
    kill_at: int | None = resource(None)  # type: ignore[assignment]
    """A step at which a worker dies, once."""
    kill_flag: str = resource("")  # type: ignore[assignment]
    kill_rank: int = resource(0)  # type: ignore[assignment]

    def check(self, stage: TrainStage) -> None:
        if self.width < 1:
            raise ValueError(f"width {self.width}: at least 1")

    def encoders(self, stage: TrainStage) -> tuple[Encoder, ...]:
        return (Projected(),)

    def learner(
        self,
        stage: TrainStage,
        device: torch.device,
        parents: Mapping[str, Mapping[str, Tensor]],
    ) -> DenoiseLearner:
        module = DenoiseModule(self.width).to(device)
        for trained in parents.values():
            module.load_state_dict(dict(trained), strict=False)
        return DenoiseLearner(module, self)

    def export(
        self,
        results: Mapping[str, Mapping[str, Tensor]],
        stages: Sequence[TrainStage],
        folder: Path,
    ) -> Card:
        raise NotImplementedError


class DenoiseModule(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.into = nn.Linear(3, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(2)
        )
        self.out = nn.Linear(width, 2)
        for frozen in (self.into, self.out):
            frozen.requires_grad_(False)

    def forward(self, given_BFN: Tensor, noise_BFN: Tensor, at_B: Tensor, factor_B: Tensor):
        at_BFN = at_B[:, None, None].expand(*given_BFN.shape[:2], 1)
        hidden = self.into(torch.cat([given_BFN + noise_BFN, at_BFN], -1))
        for block in self.blocks:
            hidden = block(hidden)
        error = (self.out(hidden) - noise_BFN).float()
        return error.square().flatten(1).mean(1) * factor_B


class DenoiseLearner(Learner):
    def __init__(self, module: DenoiseModule, system: Denoise):
        self.module, self.blocks, self.system = module, list(module.blocks), system
        self.groups = {"all": [n for n, p in module.named_parameters() if p.requires_grad]}
        self.counts = Counter(first_slots=0)

    def checkpoint_gradients(self) -> None:
        raise NotImplementedError

    def batch(self, samples: Sequence[Sample], noise: Noise) -> dict[str, Tensor]:
        if noise.step == self.system.kill_at and not os.path.exists(self.system.kill_flag):
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            if rank == self.system.kill_rank:
                Path(self.system.kill_flag).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        given_BFN = torch.stack([s.features["latents"] for s in samples]).transpose(1, 2)
        self.counts["first_slots"] += 0 in noise.slots
        bursts = self.system.burst_from
        burst = bursts is not None and bursts <= noise.step < bursts + self.system.burst_for
        factor = [float("inf") if burst and slot == 0 else 1.0 for slot in noise.slots]
        return {
            "given_BFN": given_BFN,
            "noise_BFN": noise.normal("noise", given_BFN.shape[1:]),
            "at_B": noise.uniform("at"),
            "factor_B": torch.tensor(factor),
        }


def make_pictures(folder: Path) -> str:
    """A dataset of nine pictures and four videos."""
    folder.mkdir(parents=True, exist_ok=True)
    items = [
        Item(file=picture(folder / f"{i}.png", 25 * i), size=(40, 40), fps=None) for i in range(9)
    ]
    film = numbered(folder / "film.mp4", 40)
    items += [Item(file=film, start_s=float(i), end_s=i + 1.0) for i in range(4)]
    return make_set(folder / "set", items)


def job(
    root: str,
    out: Path,
    *,
    system: System | None = None,
    stage: dict | None = None,
    **options: object,
) -> Job:
    """Training `Denoise` for twelve steps of four, with a checkpoint every four."""
    settings = {
        "name": "denoise",
        "data": DATA,
        "optim": (Optim(group="all", lr=1e-2, warmup_steps=3),),
        "steps": 12,
        "batch": 4,
        "precision": "fp32",
        "ema_decay": 0.9,
        "seed": 5,
    }
    chosen = {"checkpoint_every": 4, "log_every": 1, "trackers": (), "micro_batch": 1}
    return Job(
        recipe="denoise",
        system=system or Denoise(),
        stage=TrainStage(**settings | (stage or {})),
        root=root,
        out=str(out),
        options=Options(**chosen | options),  # type: ignore[arg-type]
    )
