"""VBench's five dimensions that are measured natively, here and by the package as its users run it.

Both sides measure the same files with the same weights, in processes of their own with the same
number of torch's threads, one after the other in turns; imports are paid before the clock starts.
The weights are the tiny ones of the tests: what is compared is decoding, preparing and overhead,
which on a GPU is most of it. The last lines are of models of the published sizes.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from bench_train import Figure

DIMENSIONS = (
    "temporal_flickering",
    "subject_consistency",
    "background_consistency",
    "aesthetic_quality",
    "appearance_style",
)
STYLE = {"appearance_style": "oil painting"}
VIDEOS, FRAMES, FPS, WIDTH, HEIGHT = 4, 80, 16, 832, 480
REPEATS = 2
TARGET = 3.0


@dataclass(frozen=True)
class Cost:
    """Of measuring some videos in `DIMENSIONS`."""

    load_s: float
    measure_s: float
    cpu_s: float
    """Of measuring."""
    opened: int
    """Times that a reader of a file was opened: by decord, OpenCV or PyAV."""
    peak_gib: float
    scores: dict[str, list[float]]


def made_videos(folder: Path, num: int = VIDEOS, frames: int = FRAMES) -> list[Path]:
    """A disc over a noisy texture that pans, 832x480, H.264, named as VBench names files."""
    from clips import encode

    folder.mkdir(parents=True)
    found = []
    for seed in range(num):
        rng = np.random.default_rng(seed)
        coarse = rng.integers(0, 255, (40, 70, 3), np.uint8)
        wide = cv2.resize(coarse, (WIDTH + 2 * frames, HEIGHT), interpolation=cv2.INTER_CUBIC)
        images = []
        for t in range(frames):
            image = cv2.add(
                wide[:, t : t + WIDTH], rng.integers(0, 6, (HEIGHT, WIDTH, 3), np.uint8)
            )
            images.append(cv2.circle(image, (20 + 9 * t, HEIGHT // 2), 40, (30, 220, 90), -1))
        found.append(encode(folder / f"a pan over texture {seed}-0.mp4", images, fps=FPS))
    return found


def stock(videos: list[Path], cache: str, threads: int) -> Cost:
    """`VBench.evaluate` over all dimensions, as its README has it."""
    from evals.vbench_worker import package, prepare

    prepare(cache)
    import clip
    import torch
    from vbench import VBench

    torch.set_num_threads(threads)
    modules = {name: package(name) for name in DIMENSIONS}
    folder = videos[0].parent
    out = folder.parent / "stock"
    out.mkdir(exist_ok=True)
    entries = [
        {
            "prompt_en": path.stem.rpartition("-")[0],
            "dimension": DIMENSIONS,
            "auxiliary_info": {"appearance_style": STYLE},
        }
        for path in videos
    ]
    (out / "info.json").write_text(json.dumps(entries))
    loading: list[float] = []
    with _opened() as opened, contextlib.ExitStack() as stack:
        aesthetics = modules["aesthetic_quality"]
        for owner, name in (
            (clip, "load"),
            (torch.hub, "load"),
            (aesthetics, "get_aesthetic_model"),
        ):
            stack.enter_context(_timed(owner, name, loading))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        began, cpu = time.perf_counter(), time.process_time()
        VBench(torch.device("cpu"), str(out / "info.json"), str(out)).evaluate(
            videos_path=str(folder), name="stock", dimension_list=[*DIMENSIONS], local=True
        )
        whole, cpu = time.perf_counter() - began, time.process_time() - cpu
        said = json.loads((out / "stock_eval_results.json").read_text())
    rows = {name: sorted(said[name][1], key=lambda row: row["video_path"]) for name in DIMENSIONS}
    return Cost(
        load_s=sum(loading),
        measure_s=whole - sum(loading),
        cpu_s=cpu - sum(loading),
        opened=len(opened),
        peak_gib=_peak_gib(),
        scores={name: [row["video_results"] for row in of] for name, of in rows.items()},
    )


def here(videos: list[Path], cache: str, threads: int) -> Cost:
    """The function of `Native`, one call for each video as the scoring actor has it."""
    import pyarrow as pa
    import torch

    from evals.metric import ASKED
    from evals.native import Native
    from evals.vbench_worker import prepare

    prepare(cache)
    import clip  # noqa: F401 - imports are paid before the clock starts
    import torchvision  # noqa: F401

    torch.set_num_threads(threads)
    metric = Native(dimensions=DIMENSIONS, cache=cache, device="cpu", num_cpus=threads)
    scores: dict[str, list[float]] = {name: [] for name in DIMENSIONS}
    with _opened() as opened:
        began = time.perf_counter()
        measure = metric.load()
        load_s = time.perf_counter() - began
        began, cpu = time.perf_counter(), time.process_time()
        for path in videos:
            asked = [
                {
                    "path": str(path),
                    "dimension": name,
                    "prompt": path.stem.rpartition("-")[0],
                    "auxiliary": json.dumps(STYLE) if name == "appearance_style" else None,
                }
                for name in DIMENSIONS
            ]
            found = measure(pa.Table.from_pylist(asked, schema=ASKED)).to_pylist()
            for name, row in zip(DIMENSIONS, found, strict=True):
                scores[name].append(row["raw_score"])
        measure_s, cpu = time.perf_counter() - began, time.process_time() - cpu
    return Cost(load_s, measure_s, cpu, len(opened), _peak_gib(), scores)


@contextlib.contextmanager
def _opened() -> Iterator[list[str]]:
    """Files as they are opened by any of the three libraries that decode."""
    utils = importlib.import_module("vbench.utils")
    found: list[str] = []

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def opened(path: Any, *more: Any, **named: Any) -> Any:
            found.append(str(path))
            return call(path, *more, **named)

        return opened

    readers = ((utils, "VideoReader"), (cv2, "VideoCapture"), (av, "open"))
    own = [getattr(owner, name) for owner, name in readers]
    for (owner, name), call in zip(readers, own, strict=True):
        setattr(owner, name, counted(call))
    try:
        yield found
    finally:
        for (owner, name), call in zip(readers, own, strict=True):
            setattr(owner, name, call)


@contextlib.contextmanager
def _timed(owner: Any, name: str, seconds: list[float]) -> Iterator[None]:
    call = getattr(owner, name)

    def timed(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*given, **named)
        finally:
            seconds.append(time.perf_counter() - began)

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, call)


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


def _quietly(
    side: Callable[[list[Path], str, int], Cost], videos: list[Path], cache: str, threads: int
) -> Cost:
    warnings.simplefilter("ignore")
    sys.stderr = io.StringIO()
    os.environ["TQDM_DISABLE"] = "1"
    return side(videos, cache, threads)


def in_turns(videos: list[Path], cache: Path, threads: int, repeats: int) -> tuple[Cost, Cost]:
    """The package's and ours, each the quickest of its runs."""
    context = multiprocessing.get_context("spawn")
    costs: dict[Callable, list[Cost]] = {stock: [], here: []}
    for _ in range(repeats):
        for side, found in costs.items():
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                found.append(pool.submit(_quietly, side, videos, str(cache), threads).result())
    best = {side: min(found, key=lambda cost: cost.measure_s) for side, found in costs.items()}
    return best[stock], best[here]


def true_size_cache(folder: Path, tiny: Path) -> Path:
    """CLIP ViT-B/32 and L/14 and DINO ViT-B/16 of their published sizes, with random weights."""
    import torch
    from clip.model import CLIP

    shutil.copytree(tiny / "aesthetic_model", folder / "aesthetic_model")
    (folder / "clip_model").mkdir()
    for name, embed, depth, width, patch, heads in (
        ("ViT-B-32", 512, 12, 768, 32, 8),
        ("ViT-L-14", 768, 24, 1024, 14, 12),
    ):
        torch.manual_seed(0)
        model = CLIP(embed, 224, depth, width, patch, 77, 49408, 64 * heads, heads, 12).eval()
        given = (torch.zeros(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.long))
        with torch.no_grad():
            traced = torch.jit.trace(model, given, check_trace=False)
        torch.jit.save(traced, folder / "clip_model" / f"{name}.pt")
    at = Path("dino_model", "facebookresearch_dino_main")
    (folder / at).mkdir(parents=True)
    code = (tiny / at / "hubconf.py").read_text()
    small = "PATCH, WIDTH, HEADS, DEPTH, GRID = 16, 64, 1, 2, 14"
    assert small in code
    large = code.replace(small, "PATCH, WIDTH, HEADS, DEPTH, GRID = 16, 768, 12, 12, 14")
    (folder / at / "hubconf.py").write_text(large)
    model = torch.hub.load(str(folder / at), "dino_vitb16", source="local", pretrained=False)
    torch.save(model.state_dict(), folder / "dino_model" / "dino_vitbase16_pretrain.pth")
    link = folder / "torch_home" / "hub" / "checkpoints"
    link.mkdir(parents=True)
    (link / "dino_vitbase16_pretrain.pth").hardlink_to(
        folder / "dino_model" / "dino_vitbase16_pretrain.pth"
    )
    shutil.copy(tiny / "TINY", folder)  # no published hashes are asked for
    return folder


def compared(theirs: Cost, ours: Cost, num: int, what: str, *, aim: bool) -> list[Figure]:
    """Lines of one comparison of `num` videos."""
    apart = max(
        abs(a - b)
        for name in DIMENSIONS
        for a, b in zip(theirs.scores[name], ours.scores[name], strict=True)
    )
    quicker = theirs.measure_s / ours.measure_s
    whole = (theirs.load_s + theirs.measure_s) / (ours.load_s + ours.measure_s)
    return [
        Figure(
            f"five dimensions of VBench, {what}: stock / here, loading excluded",
            f"{quicker:.2f} ({theirs.measure_s / num:.2f} / {ours.measure_s / num:.2f} s a video;"
            f" CPU {theirs.cpu_s / ours.cpu_s:.2f}, {theirs.cpu_s / num:.2f} /"
            f" {ours.cpu_s / num:.2f} s)",
            f"{TARGET:.0f} or more" if aim else "",
            quicker >= TARGET if aim else None,
        ),
        Figure(
            f"  loading of models included ({theirs.load_s:.1f} / {ours.load_s:.1f} s)",
            f"{whole:.2f}",
        ),
        Figure(
            "  decodes a video, stock / here",
            f"{theirs.opened / num:.3g} / {ours.opened / num:.3g}",
            "1 here",
            ours.opened == num,
        ),
        Figure("  peak memory, stock / here", f"{theirs.peak_gib:.2f} / {ours.peak_gib:.2f} GiB"),
        Figure("  scores of videos apart by at most", f"{apart:.1e}", "1e-6", apart <= 1e-6),
    ]


def vbench(work: Path) -> list[Figure]:
    """The table of `make bench`."""
    from evals.tiny_weights import make_vbench_cache

    warnings.simplefilter("ignore")
    cache = make_vbench_cache(work / "vbench-tiny")
    videos = made_videos(work / "vbench-videos" / "five_seconds")
    lines: list[Figure] = []
    for threads in dict.fromkeys((1, os.cpu_count() or 1)):  # of an actor; by default of a user
        theirs, ours = in_turns(videos, cache, threads, REPEATS)
        what = f"{VIDEOS} videos of {FRAMES} frames, {HEIGHT}x{WIDTH}, tiny weights"
        lines += compared(theirs, ours, VIDEOS, f"{what}, {threads} of torch's threads", aim=True)
    large = true_size_cache(work / "vbench-large", cache)
    videos = made_videos(work / "vbench-short" / "half_a_second", 1, 8)
    theirs, ours = in_turns(videos, large, threads, 1)
    what = f"8 frames, models of true size, random weights, {threads} of torch's threads"
    return [*lines, *compared(theirs, ours, 1, what, aim=False)]
