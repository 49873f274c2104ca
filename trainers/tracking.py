"""Where the figures of a run go: JSON lines always, and the trackers that were asked for.

A stage's `metrics.jsonl` is the journal: its trainer writes it, and cuts it back where steps are
done again. `train_metrics.lance` in the run's folder is what all journals say, as one table for
those who query; the driver brings it up to date every half a minute.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import lance
    import pyarrow as pa

METRICS = "metrics.jsonl"
TABLE = "train_metrics.lance"
"""Of a run, with the schema `TRAIN_METRICS`."""
COMPACT_AT = 32
"""Fragments that the table may have before they are compacted."""
_KEPT_VERSIONS = 8  # for those who are reading them
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


class MetricsTable:
    """The table of a run, made of its stages' journals and never ahead of them; one writer a run.

    Every change is one commit: what journals have gained is appended, and where one of them no
    longer begins as the table has it (its last steps were done again, or it is gone), the whole
    table is replaced. So whatever was killed when, the next update makes it whole.

    Args:
        run: Its folder.
    """

    def __init__(self, run: Path):
        self._run, self._uri = run, str(run / TABLE)
        self._held: dict[str, _Beginning] | None = None  # None: not looked at yet

    def update(self) -> int:
        """Makes the table say what the journals say; gives the number of rows it wrote."""
        found = sorted(self._run.glob(f"*/{METRICS}"))
        journals = {path.parent.name: _whole_lines(path) for path in found}
        journals = {stage: lines for stage, lines in journals.items() if lines}
        held = self._looked_at() if self._held is None else self._held
        self._held = None  # until what follows has come to its end: it may fail half-way
        is_grown = all(begin.is_of(journals.get(stage, b"")) for stage, begin in held.items())
        news = (
            {stage: lines[held[stage].size :] if stage in held else lines
             for stage, lines in journals.items()}
            if is_grown
            else journals
        )  # fmt: skip
        rows = self._rows(news)
        if rows.num_rows or not is_grown:
            table = self._write(rows, mode="append" if held and is_grown else "overwrite")
            if len(table.get_fragments()) >= COMPACT_AT:
                _compact(table)
        self._held = {stage: _Beginning.of(lines) for stage, lines in journals.items()}
        return rows.num_rows

    def end(self) -> None:
        """The last update of a stage, which leaves no small fragments."""
        self.update()
        if self._held:
            table = self._open()
            if len(table.get_fragments()) > 1:
                _compact(table)

    def _open(self) -> lance.LanceDataset:
        import lance

        return lance.dataset(self._uri)

    def _looked_at(self) -> dict[str, _Beginning]:
        """What the table holds; a damaged one, or an earlier version's, goes."""
        from engine.schema import TRAIN_METRICS

        if not Path(self._uri).exists():
            return {}
        try:
            found = self._open().to_table()
        except (OSError, ValueError):
            shutil.rmtree(self._uri)
            return {}
        is_ours = found.schema.names == TRAIN_METRICS.names
        if not is_ours or set(found["run"].to_pylist()) - {str(self._run)}:
            shutil.rmtree(self._uri)
            return {}
        lines: dict[str, list[str]] = {}
        for stage, line in zip(*(found[n].to_pylist() for n in ("stage", "figures")), strict=True):
            lines.setdefault(stage, []).append(line)
        return {
            stage: _Beginning.of("".join(f"{line}\n" for line in of).encode())
            for stage, of in lines.items()
        }

    def _rows(self, journals: Mapping[str, bytes]) -> pa.Table:
        import pyarrow as pa

        from engine.schema import TRAIN_METRICS

        lines = [
            (stage, line) for stage, of in journals.items() for line in of.decode().splitlines()
        ]
        said = [json.loads(line) for _, line in lines]
        columns = {
            "run": [str(self._run)] * len(lines),
            "stage": [stage for stage, _ in lines],
            "step": [one["step"] for one in said],
            "figures": [line for _, line in lines],
            "loss": [one.get("loss") for one in said],
        }
        return pa.table(columns, schema=TRAIN_METRICS)

    def _write(self, rows: pa.Table, *, mode: str) -> lance.LanceDataset:
        import lance

        there = Path(self._uri).exists()  # else Lance warns that it makes one
        return lance.write_dataset(rows, self._uri, mode=mode if there else "create")


class _Beginning:
    """So many bytes with this hash: what the table has of a journal."""

    def __init__(self, size: int, sha256: bytes):
        self.size, self._sha256 = size, sha256

    @classmethod
    def of(cls, lines: bytes) -> _Beginning:
        return cls(len(lines), hashlib.sha256(lines).digest())

    def is_of(self, lines: bytes) -> bool:
        """Whether the journal begins so."""
        return (
            len(lines) >= self.size and hashlib.sha256(lines[: self.size]).digest() == self._sha256
        )


def _compact(table: lance.LanceDataset) -> None:
    table.optimize.compact_files(num_threads=1)
    table.cleanup_old_versions(retain_versions=_KEPT_VERSIONS, error_if_tagged_old_versions=False)


def _whole_lines(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1]


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
