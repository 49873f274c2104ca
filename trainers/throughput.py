"""How fast a run is, against what the machine could do."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trainers.parallel import World

DENSE_BF16_TFLOPS = {
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.1,
    "L4": 121.0,
    "A10G": 70.0,
    "RTX 4090": 165.2,
    "B200": 2250.0,
}
"""Peak of a GPU's tensor cores without sparsity, by its maker's data sheet."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations a second that the device could do in bf16; None where nothing is known of it."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * v for known, v in DENSE_BF16_TFLOPS.items() if known in name), None)


_OF_ACTIVATIONS = ("attention", "bmm")
"""In names of operations that multiply activations with each other, as no layer's weights are."""


class Meter:
    """Seconds, samples and operations of the steps since it was last read."""

    def __init__(self, device: torch.device, precision: str):
        self._device, self._peak = device, peak_flops(device, precision)
        self._flops_of: dict[object, float] = {}
        self.reset()

    def reset(self) -> None:
        """Starts a new window."""
        self._began = time.perf_counter()
        self._samples = self._waited_s = self._flops = 0.0

    def step(self, samples: int, waited_s: float) -> None:
        """A step ended: its samples over all workers, and how long it waited for data."""
        self._samples += samples
        self._waited_s += waited_s

    def count(self, shape: object, module: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """Adds the operations of a micro-batch, forward and backward.

        Those of a forward pass are counted once for each shape, in a pass of its own (what counts
        also chooses other kernels, and a step must not depend on whether it was counted).
        Backward has as many for the activations, those of the layers that are trained once more,
        and those of attention, too: each of its two products has two gradients. What gradient
        checkpointing computes again is work of the machine, not the model's.
        """
        if shape not in self._flops_of:
            eager = torch.compiler.set_stance("force_eager")
            with torch.no_grad(), eager, FlopCounterMode(display=False) as counter:
                module(**batch)
            of_layer = {name: sum(f.values()) for name, f in counter.get_flop_counts().items()}
            trained = sum(of_layer.get(name, 0) for name in _trained_layers(module))
            attention = sum(
                flops
                for operation, flops in counter.get_flop_counts().get("Global", {}).items()
                if any(name in str(operation) for name in _OF_ACTIVATIONS)
            )
            self._flops_of[shape] = 2 * counter.get_total_flops() + trained + attention
        self._flops += self._flops_of[shape]

    def read(self) -> dict[str, float]:
        """Figures of the window, and a new one begins."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        found = {
            "samples_per_s": self._samples / seconds,
            "data_wait_frac": self._waited_s / seconds,
            "tflops_per_s": self._flops / seconds / 1e12,  # of this worker
        }
        if self._peak:
            found["mfu"] = self._flops / seconds / self._peak
        if self._device.type == "cuda":
            found["memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        else:
            import resource

            found["memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.reset()
        return found


def _trained_layers(module: nn.Module) -> list[str]:
    """Names, as the counter has them, of the layers that have trained weights of their own."""
    root = type(module).__name__
    return [
        f"{root}.{name}"
        for name, layer in module.named_modules()
        if not any(layer.children())  # a layer above has those of all below it
        and any(p.requires_grad for p in layer.parameters())
    ]


def note_machine(stage: Path, world: World) -> None:
    """Writes `machine.json`: on what the stage was trained last."""
    kind = "CPU"
    if world.device.type == "cuda":
        kind = torch.cuda.get_device_name(world.device)
    noted = {"hardware": f"{world.size} × {kind}", "torch": torch.__version__}
    (stage / "machine.json").write_text(json.dumps(noted), encoding="utf-8")
