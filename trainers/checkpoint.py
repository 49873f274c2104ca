"""Checkpoints of a stage: what is trained, its optimiser and average, finished by a marker.

    <run>/<stage>/config.json          what is trained on what, refused when it changes
    <run>/<stage>/metrics.jsonl        a line a step
    <run>/<stage>/step_00000500/       torch.distributed.checkpoint, then COMPLETE
    <run>/<stage>/final.safetensors    what the stage trained, when it has ended

A folder without COMPLETE was cut off: it is never read, and removed by the next run. Sharded state
is written by all workers and read by any number of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from trainers.job import FINAL
from trainers.parallel import World
from trainers.system import plain

MARKER = "COMPLETE"
_TRAINED = StateDictOptions(ignore_frozen_params=True)
_WHOLE = StateDictOptions(ignore_frozen_params=True, full_state_dict=True, cpu_offload=True)


def folder_of(stage: Path, step: int) -> Path:
    """Where the state after so many steps lies."""
    return stage / f"step_{step:08d}"


def complete(stage: Path) -> list[int]:
    """Steps of the finished checkpoints, in order."""
    found = stage.glob(f"step_*/{MARKER}")
    return sorted(int(marker.parent.name.removeprefix("step_")) for marker in found)


def forget_unfinished(stage: Path) -> None:
    """Removes checkpoints that were cut off."""
    for folder in stage.glob("step_*"):
        if not (folder / MARKER).exists():
            shutil.rmtree(folder)


class Checkpoints:
    """Saves and restores one stage's training state; saving goes on beside the training.

    Args:
        stage: The stage's folder, seen by all workers.
        world: Of this run.
        training: Fingerprint of its configuration, noted in each marker.
        keep: Newest finished checkpoints that stay.
        beside: Whether a save runs in a thread of its own, on a copy.
    """

    def __init__(self, stage: Path, world: World, *, training: str, keep: int, beside: bool = True):
        self._stage, self._world, self._training = stage, world, training
        self._keep, self._beside = keep, beside
        self._saving: tuple[int, dict[str, Any], Future[Any]] | None = None
        # what saves in a thread may not share the training's group
        group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._how: dict[str, Any] = {"process_group": group, "no_dist": world.size == 1}
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)

    def save(
        self,
        step: int,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: Mapping[str, Tensor],
        facts: Mapping[str, Any],
    ) -> None:
        """Begins to save the state after `step` steps; one save is under way at a time."""
        self.finish()
        folder = folder_of(self._stage, step)
        if self._world.leads and folder.exists():
            shutil.rmtree(folder)  # cut off, else there would be nothing to save
        self._world.wait()
        state = _state(module, optimizer, average)
        noted = dict(facts) | {"step": step, "training": self._training}
        with _one_line(folder, "written"):
            if self._beside:
                saving = dcp.async_save(state, checkpoint_id=folder, **self._how)
                self._saving = (step, noted, saving)
                return
            dcp.save(state, checkpoint_id=folder, **self._how)
        self._mark(step, noted)

    def finish(self) -> None:
        """Waits for the save that is under way, and marks it as whole."""
        if self._saving is None:
            return
        step, noted, saving = self._saving
        self._saving = None
        with _one_line(folder_of(self._stage, step), "written"):
            saving.result()
        self._mark(step, noted)

    def poll(self) -> None:
        """Marks the save that is under way, if it has ended."""
        if self._saving is not None and self._saving[2].done():
            self.finish()

    def _mark(self, step: int, noted: Mapping[str, Any]) -> None:
        # The leader's save ends last: it writes the metadata when all have written their parts.
        if not self._world.leads:
            return
        _put(folder_of(self._stage, step) / MARKER, json.dumps(noted))
        for old in complete(self._stage)[: -self._keep]:
            gone = folder_of(self._stage, old)
            (gone / MARKER).unlink()  # first: half a folder must not look whole
            shutil.rmtree(gone)

    def restore(
        self,
        step: int,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: Mapping[str, Tensor],
    ) -> dict[str, Any]:
        """Loads the state after `step` steps in place; gives what was noted with it."""
        folder = folder_of(self._stage, step)
        state = _state(module, optimizer, average)
        with _one_line(folder, "read"):  # into the tensors of `state`, which are those of `average`
            dcp.load(state, checkpoint_id=folder, **self._how)
        set_state_dict(
            module,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optim"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )
        return json.loads((folder / MARKER).read_text(encoding="utf-8"))


@contextmanager
def _one_line(folder: Path, what: str) -> Iterator[None]:
    """What goes wrong, as an OSError of one line; torch raises a BaseException with all traces."""
    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        words = " ".join(str(causes[0]).split()) if causes else "no reason was given"
        raise OSError(f"checkpoint {folder} cannot be {what}: {words}") from error


def _state(
    module: nn.Module, optimizer: torch.optim.Optimizer, average: Mapping[str, Tensor]
) -> dict[str, Any]:
    model, optim = get_state_dict(module, optimizer, options=_TRAINED)
    names = {name for name, p in module.named_parameters() if p.requires_grad}  # and no buffers
    state: dict[str, Any] = {"model": {n: t for n, t in model.items() if n in names}}
    state["optim"] = optim
    if average:
        state["average"] = dict(average)
    return state


def trained(module: nn.Module, average: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What was trained, whole, on the CPU (of the leading worker): the average where there is one.

    Called by all workers.
    """
    if average:
        found = dict(average)
        return {
            name: (t.full_tensor() if hasattr(t, "full_tensor") else t).cpu().contiguous()
            for name, t in found.items()
        }
    names = {name for name, p in module.named_parameters() if p.requires_grad}
    whole = get_model_state_dict(module, options=_WHOLE)
    return {name: tensor.contiguous() for name, tensor in whole.items() if name in names}


def save_final(stage: Path, step: int, tensors: Mapping[str, Tensor]) -> None:
    """Writes what the stage trained, all or nothing."""
    made = stage / f".{FINAL}"
    save_file(dict(tensors), made, metadata={"step": str(step)})
    made.replace(stage / FINAL)


def ended_at(stage: Path) -> int | None:
    """How many steps an ended stage took."""
    path = stage / FINAL
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def check_steps(stage: Path, steps: int) -> None:
    """Raises ValueError where a stage has taken more steps than are asked for."""
    taken = max([*complete(stage), ended_at(stage) or 0])
    if taken > steps:
        raise ValueError(
            f"{stage} has taken {taken} steps, and {steps} are asked for: ask for {taken} or more,"
            " or name another folder"
        )


def load_final(stage: Path) -> tuple[int, dict[str, Tensor]] | None:
    """How many steps an ended stage took, and what it trained."""
    path = stage / FINAL
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
        return step, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def check_same(stage: Path, config: Mapping[str, Any]) -> bool:
    """Whether a stage's folder holds a training already, which must be of this configuration.

    Raises:
        ValueError: It is of another one; says what differs.
    """
    path = stage / "config.json"
    if not path.exists():
        return False
    differing = _differences(json.loads(path.read_text(encoding="utf-8")), plain(config))
    if differing:
        shown = "; ".join(differing[:5]) + ("; …" if len(differing) > 5 else "")
        raise ValueError(
            f"{stage} holds a training of another configuration or dataset ({shown}):"
            " go on with that one, or name another folder"
        )
    for step in complete(stage):
        folder = folder_of(stage, step)
        noted = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if noted["training"] != fingerprint(config):
            raise ValueError(
                f"{folder} is a checkpoint of another training ({noted['training']}, not"
                f" {fingerprint(config)}): take it away"
            )
    return True


def fingerprint(config: Mapping[str, Any]) -> str:
    """What tells a training from others, in 16 hex digits."""
    text = json.dumps(plain(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def claim(stage: Path, config: Mapping[str, Any]) -> None:
    """Makes the stage's folder, or checks as `check_same` does that it is this training's."""
    if not check_same(stage, config):
        stage.mkdir(parents=True, exist_ok=True)
        _put(stage / "config.json", json.dumps(config, indent=1, sort_keys=True))


def _differences(old: Any, new: Any, at: str = "") -> list[str]:
    """Where two JSON values differ: `path: old, now new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            below = f"{at}.{key}" if at else key
            found += _differences(old.get(key), new.get(key), below)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            d
            for i, (a, b) in enumerate(zip(old, new, strict=True))
            for d in _differences(a, b, f"{at}[{i}]")
        ]
    return [] if old == new else [f"{at}: {_short(old)} there, {_short(new)} asked for"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _put(path: Path, text: str) -> None:
    """Writes a small file so that it is there whole or not at all."""
    made = path.with_name(f".{path.name}")
    with made.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    made.replace(path)
