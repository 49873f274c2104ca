"""VBench's static filter: which videos are of a scene at rest, so that flicker can be told."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from engine.operator import Failed, resource, results
from evals.cache import check, weights_of
from evals.metric import Metric
from evals.suites import STATIC
from evals.vbench_worker import package, prepare, replaced

_WEIGHTS = "raft_model/models/raft-things.pth"
_LEAST_FRAMES = 2


@dataclass(frozen=True, kw_only=True)
class StaticFilter(Metric):
    """Whether next to nothing moves in a video (1) or something does (0), by the package's code.

    RAFT's flow between neighbouring frames, and between the first and the last both ways: the mean
    of the longest 2 % of it, in pixels, is over 3 px (at 256 px of the shorter side) in no more
    than an eighth of the neighbours, and from end to end is under a bound that grows with the
    number of frames.

    Misleads: flicker itself can look like motion; slow motion over a long video passes as long as
    its ends are alike.

    Source:
        vbench 0.1.5, `vbench/cli/static_filter.py`; VBench (arXiv 2311.17982), temporal flickering.
    """

    implementation: ClassVar[str] = "vbench"
    libraries: ClassVar[tuple[str, ...]] = ("vbench",)

    dimensions: tuple[str, ...] = (STATIC,)
    cache: str = dataclasses.field(metadata={"resource": True})  # its content counts: `describe`
    """Folder with VBench's weights (`evals.cache`)."""
    device: str | None = dataclasses.field(default=None, metadata={"resource": True})
    """As torch names it; None is a GPU where this process has one."""

    batch_size: int = resource(1)
    num_gpus: float = resource(0.5)

    def check(self) -> None:
        """RAFT's weights are in the cache."""
        check((STATIC,), Path(self.cache))

    def describe(self) -> dict[str, Any]:
        """See `Operator.describe`; with the weights' content."""
        return super().describe() | {"weights": self.weights()}

    def weights(self) -> dict[str, str]:
        """See `Metric.weights`."""
        return weights_of((STATIC,), Path(self.cache))

    def environment(self) -> dict[str, Any]:
        """See `Metric.environment`; with the device."""
        versions = {name: importlib.metadata.version(name) for name in ("torch", "opencv-python")}
        return super().environment() | versions | {"device": self._device()}

    def _device(self) -> str:
        if self.device:
            return self.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    def load(self) -> Callable[[pa.Table], pa.Table]:
        """Loads RAFT."""
        self.check()
        filter_ = _filter(self.cache, self._device())

        def measure(asked: pa.Table) -> pa.Table:
            return results(self.writes, [_measured(filter_, row) for row in asked.to_pylist()])

        return measure


def _measured(filter_: Any, row: Mapping[str, Any]) -> dict[str, Any] | Failed:
    filter_.span = slice(row["start_frame"], row["stop_frame"])
    try:
        is_static = filter_.infer(row["path"])
    except _Unreadable as error:
        return Failed("DecodeError", f"{row['path']}: {error}")
    return {
        "raw_score": float(is_static),
        "frame_scores": None,
        "num_frames": len(filter_.flows) - 1,  # its neighbours, and both ways between the ends
        "details": json.dumps({"flow_px": filter_.flows, **filter_.params}),
    }


class _Unreadable(Exception):
    """A video that has too few frames."""


def _filter(cache: str, device: str) -> Any:
    """The package's filter with its weights loaded, for any device, and what it saw kept."""
    import torch
    from easydict import EasyDict

    prepare(cache)
    upstream = package("cli.static_filter")

    class Kept(upstream.StaticFilter):
        """The package's, which knows no device but CUDA."""

        span = slice(None)

        def load_model(self) -> None:
            state = torch.load(self.args.model, map_location="cpu", weights_only=True)
            self.model = upstream.RAFT(self.args)
            self.model.load_state_dict(
                {name.removeprefix("module."): value for name, value in state.items()}
            )
            self.model.to(self.device).eval()

        def get_frames(self, path: str) -> list[torch.Tensor]:
            try:
                with replaced(upstream, "DEVICE", self.device):
                    frames = super().get_frames(path)[self.span]
            except AssertionError:  # its way to say that there is none
                frames = []
            if len(frames) < _LEAST_FRAMES:
                raise _Unreadable(f"needs {_LEAST_FRAMES} frames or more, found {len(frames)}")
            return frames

        def check_static(self, flows: list[Any]) -> bool:
            self.flows = [float(flow) for flow in flows]
            return super().check_static(flows)

    args = {"model": str(Path(cache, _WEIGHTS)), "small": False, "mixed_precision": False}
    return Kept(EasyDict(args | {"alternate_corr": False}), device)


def chosen(rows: Iterable[Mapping[str, Any]], per_prompt: int = 5) -> dict[str, list[int]]:
    """The videos of each prompt that temporal flickering is measured on: its first static ones.

    First in VBench's order, that of the sorted names of files, in which PROMPT-10.mp4 comes before
    PROMPT-2.mp4: samples 0, 1, 10, 11 … 19, 2, 20 … VBench numbers its copies 0 to 4 in this order,
    so it is also the order in which they are merged.

    Args:
        rows: Of the dimension `static`: prompt, sample and raw_score (1 is static; null, of a video
            that could not be measured, is not).
        per_prompt: Videos a prompt.

    Returns:
        Samples by prompt, for every prompt of the rows: fewer than `per_prompt` where no more of
        its videos are static (see `short`).

    Raises:
        ValueError: A video is there twice.

    Source:
        vbench 0.1.5, `vbench/cli/static_filter.py`, `static_filter` and `check_and_move`.
    """
    found: dict[str, dict[int, bool]] = {}
    for row in rows:
        own = found.setdefault(row["prompt"], {})
        if row["sample"] in own:
            raise ValueError(f"sample {row['sample']} of {row['prompt']!r} is there twice")
        own[row["sample"]] = row["raw_score"] == 1.0
    return {
        prompt: [sample for sample in sorted(own, key="{}.mp4".format) if own[sample]][:per_prompt]
        for prompt, own in found.items()
    }


def short(samples: Mapping[str, Iterable[int]], per_prompt: int = 5) -> dict[str, int]:
    """Prompts that `chosen` found fewer videos of than it should, and how many."""
    counted = {prompt: len(list(own)) for prompt, own in samples.items()}
    return {prompt: num for prompt, num in counted.items() if num < per_prompt}
