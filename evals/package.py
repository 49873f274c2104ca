"""The real vbench package as a metric, in this Python or in an environment of its own."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from engine.operator import Failed, resource, results
from evals import cache as caches
from evals.metric import NO_OBJECT, Metric
from evals.vbench_worker import VERSION, VBenchWorker

_TRANSIENT = ("OutOfMemoryError", "WorkerDied")
_START_S = 300.0

_loaded: dict[Package, dict[str, Any]] = {}
"""What the metrics of this process compute with."""


@dataclass(frozen=True, kw_only=True)
class Package(Metric):
    """Dimensions by `vbench==0.1.5`, unmodified; those together that share models.

    Misleads: see each dimension's `about`. A GPU's CLIP computes in half precision, a CPU's does
    not: scores differ a little, and each says what it was computed with.
    """

    implementation: ClassVar[str] = "vbench"
    libraries: ClassVar[tuple[str, ...]] = ("vbench",)

    cache: str = dataclasses.field(metadata={"resource": True})  # its content counts: `describe`
    """Folder with VBench's weights (`evals.cache`)."""
    python: str | None = dataclasses.field(default=None, metadata={"resource": True})
    """Of an environment with the package, which then measures there; None is this one."""
    device: str | None = dataclasses.field(default=None, metadata={"resource": True})
    """As torch names it; None is a GPU where this process has one."""

    batch_size: int = resource(1)
    num_gpus: float = resource(0.5)

    def check(self) -> None:
        """The weights are in the cache and are what they are called; that Python is there."""
        caches.check(self.dimensions, Path(self.cache))
        if self.python and not os.access(self.python, os.X_OK):
            raise ValueError(f"no Python at {self.python}: run make vbench-env, or name another")

    def describe(self) -> dict[str, Any]:
        """See `Operator.describe`; with the weights' content and the package's whole version.

        Which environment computes is no part of it: where both can, they give the same numbers.
        """
        return {
            "operator": type(self).__name__,
            "version": self.version,
            "parameters": {"dimensions": list(self.dimensions)},
            "libraries": {"vbench": VERSION},
            "weights": self.weights(),
        }

    def weights(self) -> dict[str, str]:
        """See `Metric.weights`."""
        return caches.weights_of(self.dimensions, Path(self.cache))

    def environment(self) -> dict[str, Any]:
        """What its worker computes with, once it is loaded."""
        return dict(_loaded[self])

    def load(self) -> Callable[[pa.Table], pa.Table]:
        """Loads the models, here or in an actor of the other Python."""
        self.check()
        score, about = self._remote() if self.python else self._local()
        _loaded[self] = about

        def measure(asked: pa.Table) -> pa.Table:
            return results(self.writes, [_scored(score, row) for row in asked.to_pylist()])

        return measure

    def _local(self) -> tuple[Callable[..., Any], dict[str, Any]]:
        worker = VBenchWorker(list(self.dimensions), self.cache, self._device())
        return worker.score, worker.about()

    def _remote(self) -> tuple[Callable[..., Any], dict[str, Any]]:
        """An actor on this machine, which lives as long as what is returned.

        It reserves nothing: its cores and GPU are those of the process that waits for it.
        """
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = ray.get_runtime_context().get_node_id()
        worker = (
            ray.remote(VBenchWorker)
            .options(
                num_cpus=0,
                max_restarts=-1,
                max_task_retries=1,
                scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
                runtime_env={
                    "py_executable": self.python,
                    "env_vars": {"PYTHONPATH": str(Path(__file__).resolve().parents[1])},
                },
            )
            .remote(
                list(self.dimensions),
                self.cache,
                self._device(),
                threads=max(1, int(self.num_cpus)),
                visible_gpus=os.environ.get("CUDA_VISIBLE_DEVICES"),
            )
        )
        try:
            about = ray.get(worker.about.remote(), timeout=_START_S)
        except (RayActorError, RayTaskError, GetTimeoutError) as error:
            said = " ".join(str(error).split())[-500:]
            raise ValueError(f"{self.python} does not run VBench: {said}") from error

        def score(*given: Any) -> dict[str, Any]:
            try:
                return ray.get(worker.score.remote(*given))
            except RayActorError:
                said = "VBench's process died while it measured this video, and again"
                return {"error_type": "WorkerDied", "error": said}

        return score, about

    def _device(self) -> str:
        if self.device:
            return self.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"


def _scored(score: Callable[..., Any], row: Mapping[str, Any]) -> dict[str, Any] | Failed:
    auxiliary = json.loads(row["auxiliary"]) if row["auxiliary"] else None
    start, stop = row["start_frame"], row["stop_frame"]
    span = None if start is None and stop is None else [start or 0, stop]
    found = score(row["dimension"], row["path"], row["prompt"], auxiliary, span)
    if "error_type" in found:
        kind = found["error_type"]
        return Failed(kind, found["error"], transient=kind in _TRANSIENT)
    if found["row"] is None:
        return Failed(NO_OBJECT, "its object is found in no frame: VBench leaves such videos out")
    return {
        "raw_score": float(found["row"]["video_results"]),
        "frame_scores": found["frame_scores"],
        "num_frames": found["num_frames"],
        "details": json.dumps(found["details"]),
    }
