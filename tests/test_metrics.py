"""Which metric measures what: the README's table, and a metric of one's own."""

from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
from conftest import REPOSITORY
from sharpness import Sharpness

from evals.cache import table
from evals.dimensions import DIMENSIONS, VBENCH, Dimension
from evals.metric import ASKED
from evals.metrics import choose
from trainers.videos import write_mp4

WHERE = {
    "here": "here",
    "pinned": "`make vbench-env`",
    "detectron2": "`make vbench-env` with detectron2",
}


def test_the_readme_says_of_each_dimension_what_it_is_and_where_it_runs() -> None:
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]
    told = {row[0].strip("`"): [cell.strip() for cell in row[1:]] for row in rows if len(row) == 5}
    assert {row.dimension for row in table()} == set(VBENCH) <= set(told)
    for row in table():
        dimension = DIMENSIONS[row.dimension]
        where, native, about, weights = told[row.dimension]
        assert where == WHERE[row.environment]
        assert native == ("yes" if "native" in dimension.implementations else "")
        assert about == dimension.about
        for name in {Path(f).name for f in row.files if f.endswith((".pt", ".pth"))}:
            assert name in weights


def test_models_are_loaded_once_a_group_and_detectors_come_first() -> None:
    chosen = choose(VBENCH, cache="weights", python="python")
    assert sorted(d for m in chosen for d in m.dimensions) == sorted(VBENCH)
    groups = [m.dimensions for m in chosen]
    assert ("temporal_style", "overall_consistency") in groups
    assert ("object_class", "multiple_objects", "spatial_relationship") in groups
    apart = [m for m in chosen if getattr(m, "python", None)]
    assert apart == chosen[: len(apart)] and len(apart) == 3
    assert chosen[-1].implementation == "native"
    package = choose(VBENCH, cache="weights", implementation="vbench")
    assert {m.implementation for m in package} == {"vbench"}


def test_a_metric_of_ones_own_is_a_file_and_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    line = Dimension(
        name="sharpness",
        title="Sharpness",
        kind="other",
        unit="variance",
        implementations=("sharpness:Sharpness",),
        group="sharpness",
        frames="mean",
    )
    monkeypatch.setitem(DIMENSIONS, line.name, line)
    (metric,) = choose(["sharpness"], cache="weights")
    assert isinstance(metric, Sharpness)
    rng = np.random.default_rng(0)
    still = rng.integers(0, 255, (64, 64, 3), np.uint8)
    for name, picture in (("sharp", still), ("soft", cv2.GaussianBlur(still, (0, 0), 3))):
        write_mp4(tmp_path / f"{name}-0.mp4", np.stack([picture] * 4), 8.0)
    asked = [
        dict.fromkeys(ASKED.names)
        | {"path": str(tmp_path / f"{name}-0.mp4"), "dimension": "sharpness"}
        for name in ("sharp", "soft")
    ]
    sharp, soft = metric.load()(pa.Table.from_pylist(asked, schema=ASKED))["raw_score"].to_pylist()
    assert sharp > 20 * soft > 0
