"""The real vbench package through this project's worker, against the package's own run."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import math
import pickle
import shutil
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch
from clips import encode

from engine.operator import FAILURE
from evals import cache as caches
from evals import vbench_worker
from evals.dimensions import DIMENSIONS, VBENCH
from evals.merge import merge
from evals.metric import ASKED, SCORED
from evals.package import Package
from evals.tiny_weights import is_tiny, make_vbench_cache
from evals.vbench_worker import FILES, VBenchWorker, package, prepare, replaced, tiny_sizes, undone

GRIT = ["object_class", "multiple_objects", "color", "spatial_relationship"]
HERE = [name for name in VBENCH if name not in (*GRIT, "scene")]
CLAPPING, BIKE = "A person is clapping", "A person is riding a bike"
STYLE = {"appearance_style": "oil painting"}
LOSSLESS = {"qp": "0"}


def scenery(num: int, seed: int, *, width: int = 128, step: int = 0) -> list[np.ndarray]:
    """A disc over a noisy colour texture that pans; BGR."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (4 + seed, 5, 3), np.uint8)
    wide = cv2.resize(coarse, (2 * width, 128), interpolation=cv2.INTER_CUBIC)
    frames = []
    for t in range(num):
        frame = np.roll(wide, -step * t, 1)[:, :width].copy()
        cv2.circle(frame, (20 + 8 * t, 64), 16, (60, 200, 20), -1)
        frames.append(np.clip(frame + rng.normal(0, 1 + seed, frame.shape), 0, 255))
    return [frame.astype(np.uint8) for frame in frames]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Of what is compared, too: a sum over other parts differs in its last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three videos of two prompts in the package's order, of different lengths, sizes and rates."""
    folder = tmp_path_factory.mktemp("films")
    return [
        encode(folder / f"{CLAPPING}-0.mp4", scenery(12, 0), fps=24, options=LOSSLESS),
        encode(folder / f"{CLAPPING}-1.mp4", scenery(9, 1, step=6), fps=24, options=LOSSLESS),
        encode(folder / f"{BIKE}-0.mp4", scenery(8, 2, width=192, step=16), fps=16),
    ]


@pytest.fixture(scope="module")
def worker(tiny_cache: Path) -> VBenchWorker:
    return VBenchWorker(HERE, str(tiny_cache))


def prompt_of(path: Path) -> str:
    return path.stem.rpartition("-")[0]


def score(worker: VBenchWorker, dimension: str, path: Path, **more: Any) -> dict[str, Any]:
    told = STYLE if dimension == "appearance_style" else None
    found = worker.score(dimension, str(path), prompt_of(path), told, **more)
    assert json.loads(json.dumps(found)) == found  # what crosses between two Pythons
    return found


def by_the_package(
    folder: Path, out: Path, dimensions: list[str], auxiliary: Mapping[str, Any]
) -> dict[str, tuple[float, list[dict[str, Any]]]]:
    """What `VBench.evaluate` writes for the videos of a folder: an aggregate and rows."""
    from vbench import VBench

    prompts = dict.fromkeys(prompt_of(path) for path in sorted(folder.iterdir()))
    info = out / "info.json"
    entries = [
        {"prompt_en": prompt, "dimension": dimensions, "auxiliary_info": auxiliary}
        for prompt in prompts
    ]
    info.write_text(json.dumps(entries))
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with undone(), quiet[0], quiet[1]:
        VBench(torch.device("cpu"), str(info), str(out)).evaluate(
            videos_path=str(folder), name="run", dimension_list=dimensions, local=True
        )
    return json.loads((out / "run_eval_results.json").read_text())


@pytest.fixture(scope="module")
def reference(
    tiny_cache: Path, films: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[float, list[dict[str, Any]]]]:
    prepare(str(tiny_cache))
    with tiny_sizes(HERE):
        return by_the_package(
            films[0].parent,
            tmp_path_factory.mktemp("reference"),
            HERE,
            {"appearance_style": STYLE},
        )


def bare(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "video_path"} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("dimension", HERE)
def test_rows_and_merges_are_the_packages(dimension, reference, worker, films):
    aggregate, rows = reference[dimension]
    assert [Path(row["video_path"]) for row in rows] == films
    found = [score(worker, dimension, film) for film in films]
    assert [one["row"] for one in found] == bare(rows)
    assert merge(dimension, [one["details"] for one in found]) == aggregate
    values = [row["video_results"] for row in rows]
    assert len(set(values)) > 1 and all(map(math.isfinite, values)), "the weights tell nothing"


@pytest.mark.slow
def test_merges_are_not_those_of_several_gpus(reference, worker, films):
    """Upstream's own: mean of videos for the one, mean of last frames for the other."""
    for dimension, key in [
        ("subject_consistency", "video_results"),
        ("appearance_style", "cur_sim"),
    ]:
        rows = [score(worker, dimension, film)["details"] for film in films]
        several = sum(row[key] for row in rows) / len(rows)
        assert merge(dimension, rows) == reference[dimension][0]
        assert abs(merge(dimension, rows) - several) > 1e-5


@pytest.mark.slow
def test_frame_scores_are_of_each_frame(worker, films):
    for dimension in ("aesthetic_quality", "imaging_quality", "appearance_style"):
        found = score(worker, dimension, films[1])
        assert found["num_frames"] == len(found["frame_scores"]) == 9
        mean = np.mean(found["frame_scores"])
        assert mean == pytest.approx(found["row"]["video_results"], abs=1e-6)
        assert np.ptp(found["frame_scores"]) > 0
    for dimension in ("subject_consistency", "background_consistency"):
        first, *rest = score(worker, dimension, films[1])["frame_scores"]
        assert first is None and len(rest) == 8
        found = score(worker, dimension, films[1])["row"]["video_results"]
        assert np.mean(rest) == pytest.approx(found, abs=1e-12)


def test_flickering_has_its_closed_form(worker, tmp_path):
    still = encode(tmp_path / "x-0.mp4", [np.full((64, 64), 90, np.uint8)] * 4)
    assert score(worker, "temporal_flickering", still)["row"]["video_results"] == 1.0
    levels = [np.full((64, 64), 90 + 40 * (i % 2), np.uint8) for i in range(4)]
    blinks = encode(tmp_path / "y-0.mp4", levels, options=LOSSLESS)
    found = score(worker, "temporal_flickering", blinks)["row"]["video_results"]
    assert found == pytest.approx(1 - 40 / 255, abs=1 / 255)  # limited range rounds a level


SPANS = {"imaging_quality": (3, 6), "dynamic_degree": (3, 11)}
"""Where frames are dear; of dynamic_degree, at 24 frames a second, every third counts."""


@pytest.mark.slow
@pytest.mark.parametrize("dimension", HERE)
def test_a_span_scores_as_the_file_of_these_frames(dimension, worker, films, tmp_path):
    whole, (start, stop) = films[0], SPANS.get(dimension, (2, 11))
    part = encode(tmp_path / whole.name, scenery(12, 0)[start:stop], fps=24, options=LOSSLESS)
    found = score(worker, dimension, whole, span=[start, stop])
    assert found == score(worker, dimension, part)
    sampled = {"human_action": 16, "temporal_style": 8, "overall_consistency": 8}
    counted = sampled | {"dynamic_degree": 3}
    assert found["num_frames"] == counted.get(dimension, stop - start)
    if dimension in SPANS:
        return
    if dimension != "human_action":  # which says yes or no
        assert found["row"] != score(worker, dimension, whole)["row"]
    end = score(worker, dimension, whole, span=[4, None])
    assert end == score(worker, dimension, whole, span=[4, 12])
    beyond = score(worker, dimension, whole, span=[3, 13])
    assert beyond["error"] == "frames 3 to 13 were asked for, the video has 12"


def test_what_a_call_replaces_is_put_back(worker, films):
    score(worker, "subject_consistency", films[0], span=[0, 4])
    score(worker, "temporal_flickering", films[0], span=[0, 4])
    module, utils = package("subject_consistency"), package("utils")
    assert module.load_video is utils.load_video
    assert module.F is torch.nn.functional
    import decord

    assert utils.VideoReader is decord.VideoReader
    assert package("temporal_flickering").cv2 is cv2


LEAST = {name: DIMENSIONS[name].min_frames for name in HERE if DIMENSIONS[name].min_frames > 1}


@pytest.mark.parametrize("dimension", LEAST)
def test_too_few_frames_are_said(dimension, worker, tmp_path):
    few = LEAST[dimension] - 1
    short = encode(tmp_path / "x-0.mp4", scenery(few, 0))
    found = score(worker, dimension, short)
    assert found == {
        "error_type": "ValueError",
        "error": f"needs at least {LEAST[dimension]} frames, has {few}",
    }
    assert vbench_worker._LEAST == LEAST


@pytest.mark.parametrize("dimension", HERE)
def test_what_is_no_video_fails_in_a_line(dimension, worker, tmp_path):
    torn = tmp_path / f"{CLAPPING}-0.mp4"
    torn.write_bytes(b"\0\0\0\x18ftypmp42 and no more")
    for path in (torn, tmp_path / f"{CLAPPING}-1.mp4"):
        found = score(worker, dimension, path)
        assert set(found) == {"error_type", "error"}
        assert found["error"] and "\n" not in found["error"] and len(found["error"]) <= 300
    assert found["error_type"] == "FileNotFoundError"


def test_what_is_asked_wrongly_fails_in_a_line(worker, films, tmp_path):
    upper = tmp_path / f"{CLAPPING}-0.MP4"
    shutil.copy(films[0], upper)
    assert ".mp4" in score(worker, "subject_consistency", upper)["error"]
    assert "index" in worker.score("appearance_style", str(films[0]), CLAPPING)["error"]
    other = worker.score("human_action", str(films[0]), "A person is running")
    assert "file's name" in other["error"]
    with pytest.raises(ValueError, match="no dimension speed"):
        VBenchWorker(["speed"], str(tmp_path))


def test_missing_weights_are_named_and_not_fetched(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"raft-things\.pth"):
        VBenchWorker(["temporal_flickering", "dynamic_degree"], str(tmp_path))
    assert not any(tmp_path.iterdir())
    assert VBenchWorker(["temporal_flickering"], str(tmp_path)).about()["vbench"] == "0.1.5"


def test_the_worker_runs_in_another_python():
    """Nothing but the standard library and itself, until it is used."""
    tree = ast.parse(Path(vbench_worker.__file__).read_text(encoding="utf-8"))
    names = {
        name.split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
        )
    }
    assert names <= sys.stdlib_module_names
    files = {name: tuple(w.path for w in caches.WEIGHTS[name]) for name in FILES}
    assert files == FILES and vbench_worker.MARKER == caches.MARKER


def test_a_second_model_does_not_answer_with_the_texts_of_the_first(tiny_cache, films, tmp_path):
    shutil.copytree(tiny_cache / "ViCLIP", tmp_path / "ViCLIP")
    shutil.copy(tiny_cache / "TINY", tmp_path)
    weights = tmp_path / "ViCLIP" / "ViClip-InternVid-10M-FLT.pth"
    state = torch.load(weights)["model"]
    state["text_encoder.text_projection"] *= -1
    torch.save({"model": state}, weights)
    first, second = (VBenchWorker(["overall_consistency"], str(c)) for c in (tiny_cache, tmp_path))
    a = score(first, "overall_consistency", films[0])["row"]["video_results"]
    b = score(second, "overall_consistency", films[0])["row"]["video_results"]
    assert a == -b != 0
    assert score(first, "overall_consistency", films[0])["row"]["video_results"] == a


class Touch:
    """Pickled, it writes a file when it is read by what runs code in pickles."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_weights_does_not_run(tiny_cache, films, tmp_path):
    """AMT's published weights hold a configuration object, for which torch refuses them."""
    from omegaconf import OmegaConf

    state = torch.load(tiny_cache / "amt_model" / "amt-s.pth")
    touched = tmp_path / "touched"
    more = {"config": OmegaConf.create({"a": [1]}), "epoch": np.float64(3), "more": Touch(touched)}
    (tmp_path / "amt_model").mkdir()
    file = tmp_path / "amt_model" / "amt-s.pth"
    torch.save(state | more, file)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file)
    found, expected = (
        score(VBenchWorker(["motion_smoothness"], str(c)), "motion_smoothness", films[1])
        for c in (tmp_path, tiny_cache)
    )
    assert found == expected and "row" in found
    assert not touched.exists()


def test_the_cache_is_marked_and_the_same_every_time(tiny_cache, tmp_path):
    assert is_tiny(tiny_cache) and caches.is_tiny(tiny_cache) and not is_tiny(tmp_path)
    caches.check(HERE, tiny_cache)
    kept = [path.name for path in tiny_cache.iterdir() if path.name not in ("dino_model", "TINY")]
    for name in kept:
        (tmp_path / name).symlink_to(tiny_cache / name)
    again = make_vbench_cache(tmp_path)
    assert {path.name for path in again.iterdir()} == {*kept, "dino_model", "TINY"}
    assert not (again / "dino_model").is_symlink() and is_tiny(again)
    one, other = (torch.load(c / FILES["subject_consistency"][1]) for c in (tiny_cache, again))
    assert all(torch.equal(one[key], other[key]) for key in one)


# A detector of what is drawn: upright patches are boats, others cars, each of its own colour.
COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200)}
CAR, BOAT = (24, 36), (36, 24)


def drawn(*patches: tuple[str, tuple[int, int], tuple[int, int]]) -> np.ndarray:
    """Grey, with patches of a colour, a height and width, and a corner; BGR."""
    frame = np.full((128, 128, 3), 128, np.uint8)
    for colour, (height, width), (y, x) in patches:
        frame[y : y + height, x : x + width] = COLOURS[colour][::-1]
    return frame


class DenseCaptioning:
    """In place of GRiT, with its answers: a caption, a box and all names of a frame, each patch."""

    def __init__(self, device: torch.device):
        self.task = ""

    def initialize_model_det(self, model_weight: str) -> None:
        self.task = "ObjectDet"

    def initialize_model(self, model_weight: str) -> None:
        self.task = "DenseCap"

    def run_caption_tensor(self, frame: np.ndarray) -> tuple[list[Any], None]:
        found = []
        for colour, rgb in COLOURS.items():
            near = (np.abs(np.asarray(frame, float) - rgb).max(-1) < 40).astype(np.uint8)
            num, _, stats, _ = cv2.connectedComponentsWithStats(near)
            for x, y, width, height, area in stats[1:num]:
                if area > 200:
                    box = [int(v) for v in (x, y, x + width, y + height)]
                    found.append((colour, "boat" if height > width else "car", box))
        names = [name for _, name, _ in found]
        return [
            (f"a {c} {n}" if self.task == "DenseCap" else n, b, names) for c, n, b in found
        ], None


@pytest.fixture
def drawings(tmp_path: Path) -> list[Path]:
    """A car left of a boat that leaves; a car alone; nothing; a car that turns blue."""
    folder = tmp_path / "drawings"
    folder.mkdir()
    car, boat = ("red", CAR, (40, 10)), ("blue", BOAT, (44, 80))
    videos = [
        [drawn(car, boat)] * 12 + [drawn(car)] * 4,
        [drawn(car)] * 5,
        [drawn()] * 6,
        [drawn(car)] * 10 + [drawn(("blue", CAR, (40, 10)))] * 6,
    ]
    return [
        encode(folder / f"a red car-{n}.mp4", frames, options=LOSSLESS)
        for n, frames in enumerate(videos)
    ]


@pytest.fixture
def grit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], VBenchWorker]:
    """The package's modules on a detector that stands in for GRiT."""
    for file in FILES["color"]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    stand_in = types.ModuleType("vbench.third_party.grit_model")
    stand_in.DenseCaptioning = DenseCaptioning
    prepare(str(tmp_path))
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    for name in GRIT:  # imported with the stand-in here, and forgotten after
        monkeypatch.delitem(sys.modules, f"vbench.{name}", raising=False)
        monkeypatch.setitem(sys.modules, f"vbench.{name}", package(name))
    return lambda: VBenchWorker(GRIT, str(tmp_path))


TOLD = {
    "object_class": {"object": "car"},
    "multiple_objects": {"object": "car and boat"},
    "color": {"color": "red"},
    "spatial_relationship": {
        "spatial_relationship": {
            "object_a": "car",
            "object_b": "boat",
            "relationship": "on the left of",
        }
    },
}
CLOSED = {
    "object_class": ([1.0, 1.0, 0.0, 1.0], 48 / 64),
    "multiple_objects": ([12 / 16, 0.0, 0.0, 0.0], 12 / 64),
    "color": ([1.0, 1.0, None, 10 / 16], (1 + 1 + 10 / 16) / 3),
    "spatial_relationship": ([12 / 16, 0.0, 0.0, 0.0], 12 / 64),
}


def test_detected_dimensions_are_the_packages(grit, drawings, tmp_path):
    """Four dimensions need detectron2, which is not here: the package's modules of these run with a
    stand-in for its detector that finds what is drawn, so all but the detector is the package's.
    """
    (out := tmp_path / "out").mkdir()
    reference = by_the_package(drawings[0].parent, out, GRIT, TOLD)
    worker = grit()
    for dimension in GRIT:
        aggregate, rows = reference[dimension]
        found = [worker.score(dimension, str(d), "a red car", TOLD[dimension]) for d in drawings]
        kept = [one for one in found if one["row"] is not None]
        assert [one["row"] for one in kept] == bare(rows)
        values, merged = CLOSED[dimension]
        assert [one["row"] and one["row"]["video_results"] for one in found] == values
        assert merge(dimension, [one["details"] for one in kept]) == aggregate
        assert aggregate == pytest.approx(merged, abs=1e-12)
        assert {one["num_frames"] for one in found} == {16}
        if dimension == "color":
            assert found[2]["note"] == "no_object"
    shared = {id(m) for key, m in worker._models.items() if key.startswith("grit")}
    assert len(shared) == 2  # one that names, one that captions


def asked(*rows: Mapping[str, Any]) -> pa.Table:
    empty = dict.fromkeys(ASKED.names)
    return pa.Table.from_pylist([empty | dict(row) for row in rows], schema=ASKED)


def test_no_object_is_no_score_and_no_fault(grit, drawings, tmp_path):
    del grit
    metric = Package(dimensions=("color",), cache=str(tmp_path))
    common = {"dimension": "color", "prompt": "a red car", "auxiliary": json.dumps(TOLD["color"])}
    with replaced(caches, "check", lambda *_: None):  # empty files are no weights
        found = metric.load()(asked(*({"path": str(d)} | common for d in drawings[1:3])))
    assert found["raw_score"].to_pylist() == [1.0, None]
    assert found["error_type"].to_pylist() == [None, "NoObject"]
    assert found["transient"].to_pylist() == [None, False]


def test_the_metric_gives_what_the_package_says(tiny_cache, films, tmp_path):
    metric = Package(
        dimensions=("background_consistency", "appearance_style"), cache=str(tiny_cache)
    )
    torn = tmp_path / "torn-0.mp4"
    torn.write_bytes(b"no video")
    told = json.dumps(STYLE)
    rows = asked(
        {"path": str(films[0]), "dimension": "background_consistency", "prompt": CLAPPING},
        {"path": str(films[0]), "dimension": "appearance_style", "auxiliary": told},
        {"path": str(torn), "dimension": "background_consistency", "prompt": "torn"},
        {"path": str(films[0]), "dimension": "appearance_style", "auxiliary": told}
        | {"start_frame": 2, "stop_frame": 6},
    )
    found = metric.load()(rows)
    assert found.schema.names == [*SCORED.names, *FAILURE.names]
    consistency, style, failed, part = found.to_pylist()
    details = json.loads(consistency["details"])
    assert consistency["raw_score"] == details["video_results"]
    assert details["cnt_per_video"] == 11 and details["num_frames"] == 12
    assert consistency["frame_scores"][0] is None and len(consistency["frame_scores"]) == 12
    assert style["frame_scores"] == json.loads(style["details"])["frame_results"]
    assert failed["raw_score"] is None and failed["error_type"] == "RuntimeError"
    assert part["num_frames"] == 4
    assert part["frame_scores"] == pytest.approx(style["frame_scores"][2:6], abs=1e-6)
    about = metric.environment()
    assert about["vbench"] == "0.1.5" and about["tiny"] and about["device"] == "cpu"


def test_a_score_is_known_by_its_own_weights(tiny_cache, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(tiny_cache, moved)
    metric, other = (
        Package(dimensions=("imaging_quality", "aesthetic_quality"), cache=str(folder), device=d)
        for folder, d in ((tiny_cache, None), (moved, "cpu"))
    )
    assert metric.describe()["libraries"] == {"vbench": "0.1.5"}
    assert set(metric.weights()) == {*FILES["imaging_quality"], *FILES["aesthetic_quality"]}
    assert metric.fingerprint == other.fingerprint
    before = {name: other.key(name) for name in other.dimensions}
    (moved / FILES["imaging_quality"][0]).write_bytes(b"other")
    assert other.key("imaging_quality") != before["imaging_quality"]
    assert other.key("aesthetic_quality") == before["aesthetic_quality"]
    shutil.rmtree(moved / "clip_model")
    with pytest.raises(ValueError, match=r"ViT-L-14\.pt"):
        other.check()


@pytest.mark.slow
def test_another_python_measures_the_same(connection, tiny_cache, films):
    """In an actor that is started with the Python that is named; here it is this one again."""
    chosen = Package(
        dimensions=("background_consistency",), cache=str(tiny_cache), python=sys.executable
    )
    here = Package(dimensions=("background_consistency",), cache=str(tiny_cache))
    rows = asked(
        *({"path": str(f), "dimension": "background_consistency", "prompt": "x"} for f in films),
        {"path": "gone-0.mp4", "dimension": "background_consistency", "prompt": "x"},
    )
    found = chosen.load()(rows)
    assert found.equals(here.load()(rows))
    assert found["error_type"].to_pylist() == [None, None, None, "FileNotFoundError"]
    assert chosen.environment() == here.environment()
    with pytest.raises(ValueError, match="make vbench-env"):
        Package(dimensions=("temporal_flickering",), cache=".", python="/no/python").check()


def test_torn_pictures_are_not_taken_for_whole_ones_once_the_package_is_imported() -> None:
    """Its AMT tells Pillow so, for every other user of this process."""
    from PIL import ImageFile

    package("motion_smoothness")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
