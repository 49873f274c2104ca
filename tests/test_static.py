"""The static filter against the package's own, and which videos it leaves."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from clips import encode, texture

from evals.metric import ASKED
from evals.names import file_name, parse
from evals.static import StaticFilter, chosen, short
from evals.vbench_worker import package, prepare

torch = pytest.importorskip("torch")
if importlib.util.find_spec("vbench") is None:
    pytest.skip("needs the package vbench", allow_module_level=True)
EasyDict = pytest.importorskip("easydict").EasyDict

# RAFT calls torch by names of its day.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:torch.meshgrid")
WEIGHTS = "raft_model/models/raft-things.pth"
SIZES = {"small": False, "mixed_precision": False, "alternate_corr": False}
PX = 128
"""The smallest side that RAFT's four levels of correlation can do."""
BOUND_PX = 3 * PX / 256
STEPS = 20
"""Of RAFT, each of which adds to the flow at an eighth of the size."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Any:
    prepare(str(tmp_path_factory.mktemp("empty")))
    return package("cli.static_filter")


@pytest.fixture(scope="module")
def raft(upstream: Any) -> Any:
    """The real architecture, random."""
    torch.manual_seed(0)
    return upstream.RAFT(EasyDict(SIZES))


def cache(folder: Path, raft: Any, flow_px: float | None = None) -> str:
    """A cache with these weights, or with some that see one flow in every picture."""
    state = {f"module.{name}": value for name, value in raft.state_dict().items()}
    if flow_px is not None:
        head = "module.update_block.flow_head.conv2"
        step = torch.tensor([0.6, -0.8]) * flow_px / 8 / STEPS
        state |= {f"{head}.weight": torch.zeros_like(state[f"{head}.weight"])}
        state |= {f"{head}.bias": step}
    path = folder / WEIGHTS
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    return str(folder)


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> str:
    picture = texture(PX, PX + 16)
    images = [picture[:, 4 * n : 4 * n + PX] for n in range(5)]
    return str(encode(tmp_path_factory.mktemp("videos") / "a dog-0.mp4", images))


def measure(metric: StaticFilter, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    asked = [{"dimension": "static", "prompt": "a dog"} | row for row in rows]
    return metric.load()(pa.Table.from_pylist(asked, schema=ASKED)).to_pylist()


def test_flows_and_verdict_are_the_packages(
    tmp_path: Path, upstream: Any, raft: Any, moving: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cache(tmp_path, raft)
    monkeypatch.setattr(upstream, "DEVICE", "cpu")
    own = upstream.StaticFilter(EasyDict({"model": f"{folder}/{WEIGHTS}"} | SIZES), "cpu")
    flows: list[float] = []
    judge = own.check_static
    own.check_static = lambda found: (flows.extend(map(float, found)), judge(found))[1]
    verdict = own.infer(moving)
    monkeypatch.setattr(upstream, "DEVICE", "cuda")  # as it is delivered
    spans = [{"start_frame": None}, {"start_frame": 2, "stop_frame": 4}]
    whole, part = measure(
        StaticFilter(cache=folder, device="cpu"), *({"path": moving} | span for span in spans)
    )
    said = json.loads(whole["details"])
    assert whole["raw_score"] == float(verdict)
    assert said["flow_px"] == flows and len(flows) == 6
    assert (said["thres"], said["count_num"]) == (BOUND_PX, 1)
    assert whole["num_frames"] == 5 and whole["error"] is None
    assert part["num_frames"] == 2
    assert json.loads(part["details"])["flow_px"][0] == flows[2]  # the third and fourth frame's
    assert upstream.DEVICE == "cuda"


@pytest.mark.parametrize(("flow_px", "verdict"), [(0.95 * BOUND_PX, 1.0), (1.05 * BOUND_PX, 0.0)])
def test_a_flow_that_is_known_is_on_its_side_of_the_bound(
    tmp_path: Path, raft: Any, moving: str, flow_px: float, verdict: float
) -> None:
    metric = StaticFilter(cache=cache(tmp_path, raft, flow_px), device="cpu")
    (row,) = measure(metric, {"path": moving})
    assert json.loads(row["details"])["flow_px"] == pytest.approx([flow_px] * 6, rel=1e-4)
    assert row["raw_score"] == verdict


def test_a_video_that_cannot_be_measured_is_a_failed_row(tmp_path: Path, raft: Any) -> None:
    still = np.full((PX, PX), 90, np.uint8)
    broken = tmp_path / "broken-0.mp4"
    broken.write_bytes(b"no video at all")
    one = str(encode(tmp_path / "one-0.mp4", [still]))
    metric = StaticFilter(cache=cache(tmp_path / "cache", raft, 0.0), device="cpu")
    rows = measure(metric, *({"path": p} for p in (str(broken), one, str(tmp_path / "none.mp4"))))
    assert [r["raw_score"] for r in rows] == [None] * 3
    assert [r["error_type"] for r in rows] == ["DecodeError"] * 3
    assert rows[0]["error"] == f"{broken}: needs 2 frames or more, found 0"
    assert rows[1]["error"] == f"{one}: needs 2 frames or more, found 1"


def test_weights_are_known_by_their_content(tmp_path: Path, raft: Any) -> None:
    one, same = (
        StaticFilter(cache=cache(tmp_path / name, raft, 1.0), device=device)
        for name, device in (("one", None), ("same", "cpu"))
    )
    other = StaticFilter(cache=cache(tmp_path / "other", raft, 2.0))
    assert one.fingerprint == same.fingerprint == one.key("static")
    assert one.fingerprint != other.fingerprint
    assert [*one.weights()] == [WEIGHTS]
    assert same.environment()["device"] == "cpu"
    with pytest.raises(ValueError, match=rf"1 file of weights missing in .*: {WEIGHTS}"):
        StaticFilter(cache=str(tmp_path / "nothing")).check()


def test_the_first_static_videos_are_those_of_the_package(
    tmp_path: Path, upstream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own command chooses, told of each file whether it is static."""
    index = json.loads(Path(upstream.CUR_DIR, "..", "VBench_full_info.json").read_text())
    prompts = [e["prompt_en"] for e in index if "temporal_flickering" in e["dimension"]][:6]
    draw = np.random.default_rng(0)
    is_static = {
        (prompt, sample): bool(draw.random() < share)
        for prompt, share in zip(prompts, (1, 0.6, 0.4, 0.25, 0.1, 0), strict=True)
        for sample in range(25)
    }
    videos = tmp_path / "videos"
    videos.mkdir()
    for prompt, sample in is_static:
        (videos / file_name(prompt, sample)).write_text(str(sample))

    class Told:
        def __init__(self, *_: Any, **__: Any):
            pass

        def infer(self, path: str) -> bool:
            return is_static[parse(path)]

    monkeypatch.setattr(upstream, "StaticFilter", Told)
    upstream.static_filter(
        argparse.Namespace(
            videos_path=str(videos),
            result_path=str(tmp_path / "out"),
            store_name="found.json",
            filter_scope="temporal_flickering",
        )
    )
    copies = tmp_path / "out" / "filtered_videos"
    expected: dict[str, list[int]] = {prompt: [] for prompt in prompts}
    for prompt in prompts:
        while (copy := copies / file_name(prompt, len(expected[prompt]))).exists():
            expected[prompt].append(int(copy.read_text()))
    rows = [
        {"prompt": prompt, "sample": sample, "raw_score": float(found)}
        for (prompt, sample), found in is_static.items()
    ]
    draw.shuffle(rows)
    found = chosen(rows)
    assert found == expected
    assert found[prompts[0]] == [0, 1, 10, 11, 12]
    assert set(map(len, found.values())) > {0, 5}
    assert short(found) == {p: len(own) for p, own in expected.items() if len(own) < 5}


def test_choosing_by_hand() -> None:
    scores = {"a": [1.0, 0.0, 1.0, None, 1.0], "b": [0.0, math.nan], "c": [1.0] * 12}
    rows = [
        {"prompt": prompt, "sample": sample, "raw_score": score}
        for prompt, own in scores.items()
        for sample, score in enumerate(own)
    ]
    assert chosen(rows, 2) == {"a": [0, 2], "b": [], "c": [0, 1]}
    assert chosen(rows)["c"] == [0, 1, 10, 11, 2]
    assert short(chosen(rows)) == {"a": 3, "b": 0}
    with pytest.raises(ValueError, match="sample 0 of 'a' is there twice"):
        chosen([*rows, rows[0]])
