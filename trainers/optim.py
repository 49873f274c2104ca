"""AdamW by parameter groups, their rates as functions of the step, and the moving average."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from trainers.parallel import local
from trainers.system import Optim


def adamw(
    module: nn.Module, groups: Mapping[str, Sequence[str]], optims: Sequence[Optim]
) -> torch.optim.AdamW:
    """The optimiser of a stage.

    Raises:
        ValueError: The stage's groups are not the learner's, or a trained weight is in none.
    """
    wanted, known = {o.group for o in optims}, set(groups)
    if wanted != known:
        raise ValueError(
            f"the stage names optimiser groups {sorted(wanted)}, the learner has {sorted(known)}"
        )
    named = dict(module.named_parameters())
    made = [
        {
            "params": [named[name] for name in groups[optim.group]],
            "lr": optim.lr,
            "weight_decay": optim.weight_decay,
            "betas": optim.betas,
            "eps": optim.eps,
        }
        for optim in optims
    ]
    grouped = {name for names in groups.values() for name in names}
    trained = {name for name, p in named.items() if p.requires_grad}
    assert grouped == trained, sorted(grouped ^ trained)
    assert all(named[name].dtype == torch.float32 for name in grouped), "trained weights are fp32"
    return torch.optim.AdamW(made)


def rate(optim: Optim, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    done = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * done))


def started_average(module: nn.Module, decay: float | None) -> dict[str, Tensor]:
    """Copies of the trained weights, by name; empty where no average is kept."""
    if decay is None:
        return {}
    named = module.named_parameters()
    return {n: p.detach().clone() for n, p in named if p.requires_grad}


@torch.no_grad()
def average(held: Mapping[str, Tensor], module: nn.Module, decay: float) -> None:
    """Moves the average by one step: held = decay * held + (1 - decay) * weight."""
    named = dict(module.named_parameters())
    torch._foreach_lerp_(
        [local(t) for t in held.values()], [local(named[n].detach()) for n in held], 1 - decay
    )
