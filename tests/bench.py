"""`make bench`: what engine and trainers cost, each line measured in one run on one set of files.

    python tests/bench.py [--only NAME ...] [--out FILE]

Ratios are within one run; a target that is missed stays in the table as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import cv2
import numpy as np
import psutil
import pyarrow as pa
import tyro
from rich.console import Console
from rich.table import Table

from engine.schema import CLIPS, SOURCES
from engine.tables import Writer, create, read
from pipelines.recipes import CLASSIC

REPOSITORY = Path(__file__).resolve().parents[1]
MILLION = 1_000_000
CLIPS_A_COMMIT = 2_500
MANY_SOURCES = 1_000


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    what: str
    value: str
    target: str = ""
    met: bool | None = None


def bench_decode(work: Path) -> list[Line]:
    """CPU seconds of the whole pass against bare decoding, and each part's share."""
    from bench_scan import measure

    lines = []
    for row in measure(bench_videos(work)):
        shares = ", ".join(f"{name} {share:.0%}" for name, share in row.shares.items())
        lines.append(
            Line(
                f"pass / bare decoding, {row.name} ({row.frames} frames)",
                f"{row.ratio:.2f} ({row.pass_s:.2f} / {row.decode_s:.2f} CPU s)",
                "1.5 or less",
                row.ratio <= 1.5,
            )
        )
        lines.append(Line("  share of the pass", shares))
    return lines


def bench_videos(work: Path) -> list[Path]:
    """720p H.264 files: real ones where they are, and one of our own."""
    real = REPOSITORY.parent / "shared" / "videos"
    found = [
        path
        for path in (
            real / "facebookresearch__sam2__01_dog.mp4",
            real / "Breakthrough__PySceneDetect__testvideo.mp4",
        )
        if path.exists()
    ]
    return [*found, made_720p(work)]


def made_720p(work: Path) -> Path:
    """Pans over two photographs, 1280x720, 20 s, H.264 at a usual rate."""
    from skimage import data

    path = work / "made_720p.mp4"
    if path.exists():
        return path
    photos = [cv2.resize(p, (1700, 1100)) for p in (data.coffee(), data.astronaut())]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "23"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for i in range(600):
            left, top = 2 * (i % 200), (i % 300)
            picture = photos[i // 300][top : top + 720, left : left + 1280]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def two_hours_of_4k(work: Path) -> Path:
    """3840x2160, two hours at one frame a second: half a minute of H.264, its packets repeated."""
    path = work / "two_hours_of_4k" / "long.mp4"
    if path.exists():
        return path.parent
    path.parent.mkdir()
    texture = np.random.default_rng(0).integers(0, 255, (34, 60, 3), np.uint8)
    texture = cv2.resize(texture, (3900, 2220), interpolation=cv2.INTER_CUBIC)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1, options={"crf": "40", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 3840, 2160, "yuv420p"
        packets = []
        for i in range(30):
            picture = np.ascontiguousarray(texture[i * 2 : i * 2 + 2160, i * 2 : i * 2 + 3840])
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = i
            packets += stream.encode(frame)
        packets += stream.encode(None)
        payloads = [(bytes(p), p.pts, p.dts, p.is_keyframe, p.time_base) for p in packets]
        for repeat in range(7200 // 30):
            for data, pts, dts, is_keyframe, time_base in payloads:
                packet = av.Packet(data)
                packet.stream, packet.time_base = stream, time_base
                shift = round(repeat * 30 / time_base)
                packet.pts, packet.dts = pts + shift, dts + shift
                packet.is_keyframe = is_keyframe
                container.mux_one(packet)
    return path.parent


def many_sources(work: Path, num: int) -> Path:
    """Short videos of different content: one small mp4, each with an own box at its end."""
    from pipelines.samples import make_samples

    make_samples(work / "samples")
    folder = work / f"sources_{num}"
    if not folder.exists():
        folder.mkdir()
        body = (work / "samples" / "dark.mp4").read_bytes()
        for i in range(num):
            text = f"{i:08d}".encode()
            box = (8 + len(text)).to_bytes(4, "big") + b"free" + text
            (folder / f"{i:05d}.mp4").write_bytes(body + box)
    return folder


@dataclass(frozen=True)
class Measured:
    """A run of the command line, with what its processes held."""

    printed: dict[str, Any]
    wall_s: float
    driver_peak_bytes: int
    workers_peak_bytes: int


def curate(
    src: Path,
    dst: Path,
    *more: object,
    kill_after_s: float | None = None,
    watch_memory: bool = False,
) -> Measured:
    """Runs `pipelines/curate.py` on a Ray of its own. To watch memory costs it time."""
    command = [sys.executable, str(REPOSITORY / "pipelines" / "curate.py"), "--json"]
    command += ["--src", str(src), "--dst", str(dst), *map(str, more)]
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"RAY_ADDRESS": "local"},
    )
    driver, driver_peak, workers_peak = psutil.Process(process.pid), 0, 0
    while process.poll() is None:
        if watch_memory:
            with contextlib.suppress(psutil.Error):  # a process ended between two looks
                driver_peak = max(driver_peak, driver.memory_info().rss)
                readers = [p for p in driver.children(recursive=True) if is_reader(p)]
                workers_peak = max(workers_peak, sum(p.memory_info().rss for p in readers))
        if kill_after_s is not None and time.monotonic() - started > kill_after_s:
            process.kill()
        time.sleep(0.25 if watch_memory else 0.02)
    out = process.stdout.read() if process.stdout else ""
    printed = json.loads(out) if out else {}
    return Measured(printed, time.monotonic() - started, driver_peak, workers_peak)


def is_reader(process: psutil.Process) -> bool:
    """Whether a process is an actor that reads, or its sandboxed child."""
    line = " ".join(process.cmdline())
    return "engine.sandbox" in line or ("ray::" in line and "Reader" in line)


def bench_memory(work: Path) -> list[Line]:
    """Peak memory at 10 and at 1,000 sources."""
    few = curate(many_sources(work, 10), work / "memory_10", watch_memory=True)
    many = curate(many_sources(work, MANY_SOURCES), work / "memory_1000", watch_memory=True)
    lines = []
    for name in ("driver", "workers"):
        a, b = (getattr(m, f"{name}_peak_bytes") / 2**20 for m in (few, many))
        lines.append(
            Line(
                f"peak memory of the {name}, {MANY_SOURCES} sources / 10 sources",
                f"{b / a:.2f} ({b:.0f} / {a:.0f} MiB)",
                "flat (1.25 or less)",
                b / a <= 1.25,
            )
        )
    assert many.printed["sources"]["done"] == MANY_SOURCES
    long = curate(two_hours_of_4k(work), work / "memory_4k", watch_memory=True)
    assert long.printed["frames_decoded"] >= 7200
    lines.append(
        Line(
            "peak memory of two workers, one source of two hours at 4K",
            f"{long.workers_peak_bytes / 2**20:.0f} MiB in {long.printed['seconds']:.0f} s",
        )
    )
    return lines


def bench_cores(work: Path) -> list[Line]:
    """Speed-up from one core to two, of the time from the first outcome to the last."""
    source = work / "for_cores"
    if not source.exists():
        source.mkdir()
        body = made_720p(work).read_bytes()
        for i in range(24):
            text = f"{i:08d}".encode()
            (source / f"{i}.mp4").write_bytes(
                body + (8 + len(text)).to_bytes(4, "big") + b"free" + text
            )
    empty = startup(work)
    seconds = {}
    for workers in (1, 2):
        found = [
            curate(source, work / f"cores_{workers}_{k}", "--workers", workers).printed["seconds"]
            for k in range(2)
        ]
        seconds[workers] = min(found) - empty
    ratio = seconds[1] / seconds[2]
    return [
        Line(
            "speed-up from one core to two (start-up taken off)",
            f"{ratio:.2f} ({seconds[1]:.1f} / {seconds[2]:.1f} s)",
            "1.75 or more",
            ratio >= 1.75,
        )
    ]


def startup(work: Path) -> float:
    """Seconds of a run with one tiny source: Ray, its actors, the tables."""
    source = many_sources(work, 1)
    found = []
    for _ in range(3):
        root = work / "startup"
        shutil.rmtree(root, ignore_errors=True)
        found.append(curate(source, root).printed["seconds"])
    return statistics.median(found)


def bench_startup(work: Path) -> list[Line]:
    """Start-up apart from work."""
    first = startup(work)
    again = curate(many_sources(work, 1), work / "startup")
    return [
        Line("start-up: a run over one tiny source, without imports", f"{first:.1f} s"),
        Line("start-up: the whole command when nothing is left to do", f"{again.wall_s:.1f} s"),
    ]


def bench_kill(work: Path) -> list[Line]:
    """Work repeated after the driver was killed half-way."""
    source, root = many_sources(work, 200), work / "killed"
    whole = curate(source, work / "not_killed", "--commit-every-s", 1)
    curate(source, root, "--commit-every-s", 1, kill_after_s=whole.wall_s * 0.6)
    before = read(str(root), "sources").to_table(columns=["frames_decoded"])
    committed = sum(before["frames_decoded"].to_pylist())
    rest = curate(source, root, "--commit-every-s", 1)
    total = whole.printed["frames_decoded"]
    repeated = (committed + rest.printed["frames_decoded"] - total) / total
    return [
        Line(
            f"committed work repeated after a kill ({committed / total:.0%} was committed)",
            f"{repeated:.0%}",
            "0 %",
            repeated == 0,
        )
    ]


def bench_rejudge(work: Path) -> list[Line]:
    """A million clips: written by the real writer in many commits, then judged again."""
    root = str(work / "million")
    create(root, CLASSIC.name)
    writer, rng = Writer(root, "bench"), np.random.default_rng(0)
    started = time.perf_counter()
    for first in range(0, MILLION, CLIPS_A_COMMIT):
        writer.commit(**a_commit(first, rng))
    wrote_s = time.perf_counter() - started
    writer.publish(CLASSIC.stages)
    fragments = len(writer.table("clips").get_fragments())
    seconds = []
    for bound in (0.3, 0.2, 0.3):
        command = [sys.executable, str(REPOSITORY / "pipelines" / "refilter.py"), root, "--json"]
        began = time.perf_counter()
        done = subprocess.run(
            [*command, "--set", f"brightness.lo={bound}"],
            capture_output=True,
            text=True,
            check=True,
        )
        seconds.append(time.perf_counter() - began)
    changed, kept = (json.loads(done.stdout)[k] for k in ("changed", "clips"))
    manifests = sum(p.stat().st_size for p in Path(root).rglob("*.manifest"))
    whole = statistics.median(seconds)
    num_commits = MILLION // CLIPS_A_COMMIT
    return [
        Line(
            f"re-judging {MILLION:,} clips ({changed:,} verdicts changed), with near-duplicates"
            f" among {kept['kept']:,} kept, the whole command",
            f"{whole:.1f} s",
            "under 5 s",
            whole < 5,
        ),
        Line(
            f"  written in {num_commits} commits, compacted to {fragments} fragments of clips",
            f"{wrote_s:.0f} s",
        ),
        Line("  manifests of all tables and versions kept", f"{manifests / 2**20:.1f} MiB"),
    ]


def a_commit(first: int, rng: np.random.Generator) -> dict[str, pa.Table]:
    """A unit of work of `CLIPS_A_COMMIT` made-up clips, ten a source."""
    num = CLIPS_A_COMMIT
    numbers = np.arange(first, first + num)
    sources = [f"{i:032x}" for i in np.unique(numbers // 10)]
    made: dict[str, Any] = {
        "clip_id": [f"{i:032x}" for i in numbers],
        "source_id": [f"{i:032x}" for i in numbers // 10],
        "num_frames": rng.integers(30, 600, num),
        "duration_s": rng.random(num) * 20,
        "aspect_ratio": np.full(num, 16 / 9),
        "state": ["pending"] * num,
        "kept": [False] * num,
    } | {
        name: rng.random(num, np.float32)
        for name in ("motion_score", "brightness", "black_area_frac", "black_frame_frac")
    }
    made |= {  # most pass; hashes are all different
        "residual_cut_score": 0.6 * rng.random(num, np.float32),
        "ocr_area_frac": 0.12 * rng.random(num, np.float32),
        "overlay_score": 0.55 * rng.random(num, np.float32),
        "phash": rng.integers(1, 2**63, num, np.uint64),
        "phashes": list(rng.integers(1, 2**63, (num, 5), np.uint64)),
        "width_px": np.full(num, 1280),
        "height_px": np.full(num, 720),
    }
    columns = [
        pa.array(made[f.name], f.type) if f.name in made else pa.nulls(num, f.type) for f in CLIPS
    ]
    rows = [{"source_id": s, "uri": s, "state": "done", "num_clips": 10} for s in sources]
    return {
        "clips": pa.table(columns, schema=CLIPS),
        "sources": pa.Table.from_pylist(rows, schema=SOURCES),
    }


def bench_operators(work: Path) -> list[Line]:
    """Clips a second of each operator, and a CLIP of true size with random weights."""
    from bench_measure import full_size_clip, speeds

    videos = bench_videos(work)
    lines = [
        Line(f"{s.name}, batches of up to {s.batch_size}", f"{s.clips_per_s:,.1f} clips/s")
        for s in speeds(videos, work / "tiny")
    ]
    rate, gib = full_size_clip(videos)
    true_size = Line(
        "CLIP ViT-L/14 at true size, random weights", f"{rate:.2f} keyframes/s, {gib:.1f} GiB"
    )
    return [*lines, true_size]


def bench_fill(work: Path) -> list[Line]:
    """How full the batches of a model are behind 70 % rejection."""
    from bench_measure import fill

    own, of_ray = fill(work)
    return [
        Line(
            f"batch fill behind 70 % rejection, {own.batches} batches",
            f"{own.fill:.2f} (Ray Data's own batching: {of_ray:.2f})",
            "0.9 or more",
            own.fill >= 0.9,
        )
    ]


def bench_shares(work: Path) -> list[Line]:
    """Where the time of a run of every stage goes, on small random checkpoints."""
    from pipelines.samples import make_samples

    make_samples(work / "samples")
    src, dst = work / "samples", work / "shares"
    os.environ["XDG_CACHE_HOME"] = str(work)
    measured = curate(src, dst, "tiny").printed["measured"]
    total = sum(t["seconds"] for t in measured.values())
    most = sorted(measured.items(), key=lambda item: -item[1]["seconds"])
    shares = ", ".join(f"{name} {t['seconds'] / total:.0%}" for name, t in most if t["rows"])
    return [Line("time in operators, recipe tiny on the sample corpus", f"{total:.1f} s: {shares}")]


def bench_ray_train(work: Path) -> list[Line]:
    """What Ray Train adds to a training step."""
    from bench_train import ray_overhead

    return [Line(*figure) for figure in ray_overhead(work, bench_videos(work))]


def bench_data_wait(work: Path) -> list[Line]:
    """How much of training waits for decoded video."""
    from bench_train import data_wait

    return [Line(*figure) for figure in data_wait(work, bench_videos(work))]


def bench_features(work: Path) -> list[Line]:
    """Training on cached features, on the fly, and a plain loop."""
    from bench_train import features

    return [Line(*figure) for figure in features(work, bench_videos(work))]


def bench_prefix(work: Path) -> list[Line]:
    """Teacher forcing with and without the instruction's cached prefix."""
    from bench_train import prefix

    return [Line(*figure) for figure in prefix()]


def bench_conditioning(work: Path) -> list[Line]:
    """From a prompt to the video model's conditioning."""
    from bench_train import conditioning

    return [Line(*figure) for figure in conditioning(work)]


def bench_windows(work: Path) -> list[Line]:
    """A layer's time and memory on long video, in shifted windows and in full."""
    from bench_windows import windows

    return [Line(*figure) for figure in windows()]


def bench_vbench(work: Path) -> list[Line]:
    """Five of VBench's dimensions, here and by the package."""
    from bench_vbench import vbench

    return [Line(*figure) for figure in vbench(work)]


def bench_dashboard(work: Path) -> list[Line]:
    """Pages of a million clips in a browser, and a threshold that is moved there."""
    from bench_dashboard import make, measure

    root = str(work / "million")
    make(root, MILLION)
    return [
        Line(
            one.what,
            f"{one.seconds:.1f} s",
            f"under {one.target_s:g} s" if one.target_s else "",
            one.met,
        )
        for one in measure(root)
    ]


BENCHES: dict[str, Callable[[Path], list[Line]]] = {
    "decode": bench_decode,
    "cores": bench_cores,
    "memory": bench_memory,
    "kill": bench_kill,
    "rejudge": bench_rejudge,
    "startup": bench_startup,
    "operators": bench_operators,
    "fill": bench_fill,
    "shares": bench_shares,
    "ray_train": bench_ray_train,
    "data_wait": bench_data_wait,
    "features": bench_features,
    "prefix": bench_prefix,
    "conditioning": bench_conditioning,
    "windows": bench_windows,
    "vbench": bench_vbench,
    "dashboard": bench_dashboard,
}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measures and prints the table."""

    only: tuple[str, ...] = tuple(BENCHES)
    """Which benchmarks."""
    out: Path | None = None
    """Where the figures go as JSON."""


def main() -> None:
    """Runs the benchmarks that the command line names."""
    args = tyro.cli(Args)
    table = Table("measured", "figure", "target", "", box=None)
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(prefix="reelwright-bench-") as folder:
        for name in args.only:
            Console(stderr=True).print(f"measuring {name} …")
            lines += BENCHES[name](Path(folder))
    for line in lines:
        mark = {None: "", True: "met", False: "MISSED"}[line.met]
        table.add_row(line.what, line.value, line.target, mark)
    console = Console(width=150)
    console.print(table)
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, "
        f"Python {platform.python_version()}"
    )
    if args.out:
        args.out.write_text(json.dumps([dataclasses.asdict(line) for line in lines], indent=1))


if __name__ == "__main__":
    main()
