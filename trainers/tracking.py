"""Where the figures of a run go: JSON lines always, and the trackers that were asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

METRICS = "metrics.jsonl"
_TAIL_BYTES = 16_384  # a line has a few hundred
TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow-skinny"),
}
"""Each one's module, and the distribution that has it."""


class Tracker(Protocol):
    """What a tracker does with a line of figures."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes the figures of a step."""

    def close(self) -> None:
        """Ends the run."""


def check(names: Sequence[str]) -> None:
    """Raises ValueError where a tracker is unknown or not installed."""
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"there is no tracker {name!r}: choose of {', '.join(TRACKERS)}")
        module, distribution = TRACKERS[name]
        if not find_spec(module):
            raise ValueError(f"tracker {name} needs {distribution}: pip install {distribution}")


class Metrics:
    """A stage's `metrics.jsonl` and its trackers; one line a step, in order.

    Args:
        stage: The stage's folder.
        run: What the trackers call it.
        trackers: Names of `TRACKERS`.
        config: Shown beside the run where a tracker has a place for it.
        start: First step of this run: lines of later ones, which are done again, are taken away.
    """

    def __init__(
        self,
        stage: Path,
        run: str,
        trackers: Sequence[str],
        config: Mapping[str, Any],
        start: int,
    ):
        self._path = stage / METRICS
        _cut_back(self._path, start)
        self._file = self._path.open("a", encoding="utf-8")
        made = {"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _MLflow}
        self._trackers: list[Tracker] = [made[n](stage, run, config, start) for n in trackers]

    def log(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Adds lines, each with its `step`."""
        for line in lines:
            self._file.write(json.dumps(line) + "\n")
            figures = {k: v for k, v in line.items() if isinstance(v, float | int) and k != "step"}
            for tracker in self._trackers:
                tracker.log(line["step"], figures)
        self._file.flush()

    def close(self) -> None:
        """Ends the trackers' runs."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def read(stage: Path) -> list[dict[str, Any]]:
    """The lines so far; one that was cut off is not there."""
    path = stage / METRICS
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last(stage: Path) -> dict[str, Any] | None:
    """The newest line, read from the end of the file."""
    path = stage / METRICS
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = [line for line in file.read().split(b"\n")[:-1] if line.startswith(b"{")]
    return json.loads(lines[-1]) if lines else None


def _cut_back(path: Path, start: int) -> None:
    kept = [line for line in read(path.parent) if line["step"] < start]
    made = path.with_name(f".{path.name}")
    made.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    made.replace(path)


class _TensorBoard:
    def __init__(self, stage: Path, run: str, config: Mapping[str, Any], start: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(stage / "tensorboard"), purge_step=start)
        self._writer.add_text("config", f"```\n{json.dumps(config, indent=1)}\n```", start)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, stage: Path, run: str, config: Mapping[str, Any], start: int):
        import wandb

        # the same id again goes on with the run
        self._run = wandb.init(
            project="reelwright",
            name=run,
            id=run.replace("/", "-"),
            resume="allow",
            dir=str(stage),
            config=dict(config),
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, stage: Path, run: str, config: Mapping[str, Any], start: int):
        import mlflow

        mlflow.set_experiment("reelwright")
        same = mlflow.search_runs(
            filter_string=f"tags.reelwright_run = '{run}'", output_format="list", max_results=1
        )
        self._mlflow = mlflow
        mlflow.start_run(
            run_id=same[0].info.run_id if same else None,
            run_name=run,
            tags=None if same else {"reelwright_run": run},
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(figures), step=step)

    def close(self) -> None:
        self._mlflow.end_run()
