"""What operators over stored clips cost: each by itself, in a run, and how full batches are."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import ray
import ray.cloudpickle
import ray.data

from engine.gauge import PICTURES
from engine.measuring import Measuring, Tally
from engine.operator import Operator, Rule, Stage, results
from engine.scan import scan_source
from engine.schema import CLIPS, SOURCES
from engine.tables import Writer, create
from pipelines.models import make_tiny, tiny
from pipelines.recipes import CLASSIC, mimir

ROWS, BATCH, REJECTED = 6_400, 64, 0.7


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of one operator, in this process."""

    name: str
    clips_per_s: float
    batch_size: int


def speeds(videos: Sequence[Path], folder: Path) -> list[Speed]:
    """Clips a second of each operator of `classic`, and of `mimir` on small random checkpoints."""
    make_tiny(folder)
    clips = keyframes_of(videos)
    columns: dict[str, Any] = {
        "caption_original": ["A dog runs over a wide field and stops at a gate."] * clips.num_rows
    }
    found = []
    for name, values in columns.items():
        clips = clips.append_column(name, pa.array(values))
    operators = {type(o).__name__: o for s in CLASSIC.stages for o in s.measures}
    of_paper = [o for s in mimir(tiny(folder)).stages for o in s.measures]
    for operator in (*operators.values(), *of_paper):
        given = clips.select(["clip_id", *operator.reads])
        measure = operator.load()
        measure(given)
        started = time.perf_counter()
        values = measure(given)
        seconds = time.perf_counter() - started
        for column in operator.writes.names:
            if column not in clips.column_names:
                clips = clips.append_column(column, values[column])
        is_new = type(operator).__name__ not in {s.name for s in found}
        if is_new:
            speed = clips.num_rows / seconds
            found.append(
                Speed(
                    name=type(operator).__name__, clips_per_s=speed, batch_size=operator.batch_size
                )
            )
    return found


def keyframes_of(videos: Sequence[Path]) -> pa.Table:
    """A row a clip, as operators get it."""
    rows = []
    for video in videos:
        _, clips, keyframes = scan_source(str(video), CLASSIC.scan)
        for index, clip in enumerate(clips.to_pylist()):
            pictures = [
                {"time_s": k["time_s"], "jpeg": k["jpeg"]}
                for k in keyframes.to_pylist()
                if k["clip"] == index
            ]
            rows.append((f"{video}{index}", str(video), clip["start_s"], clip["end_s"], pictures))
    ids, uris, starts, ends, pictures = zip(*rows, strict=True)
    columns = [ids, uris, starts, ends, pa.array(pictures, PICTURES)]
    names = ["clip_id", "source_uri", "start_s", "end_s", "keyframes"]
    return pa.table([pa.array(c) if isinstance(c, tuple) else c for c in columns], names=names)


def full_size_clip(videos: Sequence[Path]) -> tuple[float, float]:
    """Keyframes a second through CLIP ViT-L/14 at its true size, and peak memory in GiB."""
    import open_clip
    import torch

    model, _, preprocess = open_clip.create_model_and_transforms("ViT-L-14", force_quick_gelu=True)
    from PIL import Image

    from engine.picture import rgb_of

    pictures = [p for k in keyframes_of(videos)["keyframes"].to_pylist() for p in k][:8]
    batch = torch.stack([preprocess(Image.fromarray(rgb_of(p["jpeg"]))) for p in pictures])
    with torch.inference_mode():
        model.encode_image(batch[:1])
        started = time.perf_counter()
        model.encode_image(batch)
        seconds = time.perf_counter() - started
    return len(batch) / seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@dataclass(frozen=True, kw_only=True)
class Draw(Operator):
    """A number from a clip's id, evenly spread."""

    reads: ClassVar[tuple[str, ...]] = ("source_uri",)
    writes: ClassVar[pa.Schema] = pa.schema([CLIPS.field("aesthetic_score")])

    def load(self) -> Callable[[pa.Table], pa.Table]:
        """A function that needs no weights."""

        def measure(clips: pa.Table) -> pa.Table:
            drawn = [float(uri) for uri in clips["source_uri"].to_pylist()]
            return results(self.writes, [{"aesthetic_score": d} for d in drawn])

        return measure


@dataclass(frozen=True, kw_only=True)
class Model(Draw):
    """Stands behind the rule that rejects most."""

    writes: ClassVar[pa.Schema] = pa.schema([CLIPS.field("watermark_score")])

    def load(self) -> Callable[[pa.Table], pa.Table]:
        """A function that needs no weights."""
        return lambda clips: results(self.writes, [{"watermark_score": 0.1}] * clips.num_rows)


def fill(work: Path) -> tuple[Tally, float]:
    """How full batches are behind 70 % rejection: here, and with Ray Data's own batching."""
    import bench_measure

    ray.cloudpickle.register_pickle_by_value(bench_measure)
    drawn = np.random.default_rng(0).random(ROWS)
    root = str(work / "fill")
    create(root, "bench")
    writer = Writer(root, "bench")
    writer.commit(sources=_sources(), clips=_clips(drawn))
    stages = (
        Stage(
            name="most",
            operators=(Draw(batch_size=BATCH),),
            rules=(Rule(column="aesthetic_score", lo=REJECTED),),
        ),
        Stage(name="model", operators=(Model(batch_size=BATCH),)),
    )
    with _ray():
        measuring = Measuring(writer, stages, connect=lambda: None, environment=())
        measuring.drain(lambda: None)
        measuring.close()
        return measuring.tallies["Model"], _fill_of_ray_data(drawn)


@contextlib.contextmanager
def _ray() -> Iterator[None]:
    from engine.session import connected

    with connected(2):
        yield


def _fill_of_ray_data(drawn: np.ndarray) -> float:
    def kept(batch: pa.Table) -> pa.Table:
        return batch.filter(pa.array(batch["drawn"].to_numpy() >= REJECTED))

    def size(batch: pa.Table) -> pa.Table:
        return pa.table({"size": [batch.num_rows]})

    blocks = [pa.table({"drawn": drawn[i : i + BATCH]}) for i in range(0, ROWS, BATCH)]
    done = (
        ray.data.from_arrow(blocks)
        .map_batches(kept, batch_size=BATCH, batch_format="pyarrow")
        .map_batches(size, batch_size=BATCH, batch_format="pyarrow", num_cpus=0.5)
    )
    sizes = [row["size"] for row in done.iter_rows()]
    return sum(sizes) / (BATCH * len(sizes))


def _sources() -> pa.Table:
    row = {"source_id": "s", "uri": "/s", "state": "done", "num_clips": ROWS}
    return pa.Table.from_pylist([row], schema=SOURCES)


def _clips(drawn: np.ndarray) -> pa.Table:
    rows = [
        {"clip_id": f"{i:032x}", "source_id": "s", "source_uri": str(d), "state": "pending"}
        for i, d in enumerate(drawn)
    ]
    return pa.Table.from_pylist(rows, schema=CLIPS)


def shares(measured: dict[str, Tally]) -> dict[str, float]:
    """Of the time in operators, each one's part."""
    total = sum(t.seconds for t in measured.values()) or 1.0
    return {name: t.seconds / total for name, t in measured.items() if t.rows}
