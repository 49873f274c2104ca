"""An evaluation with videos of known models, made without running any model."""

from __future__ import annotations

import datetime
import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
from clips import colourful, encode
from lance.fragment import FragmentMetadata

from engine.schema import RUNS
from engine.tables import Writer, create
from evals.evaluation import KIND, Plan
from evals.suites import Prompt, Suite
from evals.videofiles import new_row, write

PROMPTS = ("a cat rides a bicycle", "waves at dusk", "a <b>bold</b> & 'quoted' kite")


def video(path: Path, model: str, seed: int, size: tuple[int, int] = (48, 64)) -> Path:
    """A small video that says in its metadata, and to who reads its bytes, what made it."""
    images = [np.roll(colourful(*size, seed), 4 * i, 1) for i in range(8)]
    plain = encode(path.with_suffix(".plain.mp4"), images, fps=8)
    with av.open(str(plain)) as source, av.open(str(path), "w") as target:
        target.metadata.update(title=f"made by {model}", comment=model, artist=model)
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                target.mux_one(packet)
    assert model.encode() in path.read_bytes()
    return path


def make_evaluation(
    root: Path,
    models: Sequence[str],
    *,
    prompts: Sequence[str] = PROMPTS,
    samples: int = 1,
    lacking: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """A dataset with an evaluation of these models.

    Args:
        root: Where it is made.
        models: Their names.
        prompts: Of the suite.
        samples: Videos of a prompt.
        lacking: By model the prompts that it has no video of.
    """
    files = root.parent / f"{root.name}-files"
    files.mkdir(parents=True)
    create(str(root), "evaluation")
    writer = Writer(str(root), "made")
    rows, paths = [], {}
    for place, model in enumerate(models):
        for number, prompt in enumerate(prompts):
            for sample in range(samples):
                if prompt in (lacking or {}).get(model, ()):
                    continue
                file = video(files / f"{place}-{number}-{sample}.mp4", model, 100 * place + number)
                one = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{model} {prompt} {sample}"))
                paths[one] = str(file)
                content = file.read_bytes()
                rows.append(
                    new_row(
                        "made",
                        generation_id=one,
                        model=model,
                        model_kind="folder",
                        prompt=prompt,
                        text=prompt,
                        sample=sample,
                        settings="{}",
                        fps=8.0,
                        num_frames=8,
                        size_bytes=len(content),
                        sha256=hashlib.sha256(content).hexdigest(),
                    )
                )
    fragments = write(str(root), rows, paths)
    writer.append("generations", [FragmentMetadata.from_json(one) for one in fragments])
    plan = Plan(
        recipe="custom",
        suite=Suite(
            name="made",
            source="a test",
            prompts=tuple(
                Prompt(prompt=p, text=p, dimensions=("aesthetic_quality",), samples=samples)
                for p in prompts
            ),
        ),
        models=tuple(
            {"name": model, "kind": "folder", "checkpoint": None, "settings": {}, "notes": []}
            for model in models
        ),
        dimensions=("aesthetic_quality",),
        metrics={"aesthetic_quality": {"fingerprint": "f", "implementation": "native"}},
        seed=0,
        clips=False,
        drift=(),
        is_tiny=False,
        is_filtered=False,
    )
    run = {
        "run_id": "made",
        "recipe": f"{KIND}custom",
        "resolved": plan.resolved(),
        "started_at": datetime.datetime.now(datetime.UTC),
        "interrupted": False,
        "counts": json.dumps({}),
    }
    writer.append("runs", pa.Table.from_pylist([run], schema=RUNS))
    return str(root)
