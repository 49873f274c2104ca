"""Videos of models as rows: made once, named by what decides on them, tried again, fetched."""

import dataclasses
import hashlib
import json
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import lance
import numpy as np
import psutil
import pytest
from conftest import REPOSITORY, Cluster
from tiny_models import TEXTS, encoded, frames_of, make_export, mp4, suite_of
from video_server import Answer, VideoServer

from engine.gauge import Unloadable
from engine.operator import Failed
from engine.tables import Writer, create, read
from engine.weights import tiny_folder
from evals.generating import Counts, Progress, even, export_videos, fetch, generate
from evals.models import Asked, Model, parse, with_settings
from evals.suites import Suite
from trainers.videos import write_mp4

A = ("a.steps=1", "a.frames=4")
LONG = "cat " * 200
W = ("w.steps=1", "w.frames=5", "w.height=32", "w.width=32")


@pytest.fixture(scope="module")
def models(small: None, tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    """An export and a diffusers pipeline."""
    export = make_export(tmp_path_factory.mktemp("models") / "export")
    return with_settings(parse([f"a={export}", f"w={tiny_folder() / 'wan'}"]), A + W)


Make = Callable[..., dict[str, Counts]]


@pytest.fixture
def root(tmp_path: Path) -> str:
    create(str(tmp_path / "set"), "evaluation")
    return str(tmp_path / "set")


@pytest.fixture
def make(connection: None, root: str) -> Make:
    def call(models: list[Model], suite: Suite, **options: Any) -> dict[str, Counts]:
        options = {"workers": 1, "commit_every_s": 0.2, "connect": lambda: None} | options
        return generate(models, suite, writer=Writer(root, str(uuid.uuid4())), **options)

    return call


def rows(root: str) -> list[dict[str, Any]]:
    table = read(root, "generations")
    found = table.to_table(columns=[n for n in table.schema.names if n != "mp4"])
    return sorted(found.to_pylist(), key=lambda r: (r["model"], r["prompt"], r["sample"]))


def videos_of(root: str, model: Model) -> dict[tuple[str, str, int], dict[str, Any]]:
    own = [r for r in rows(root) if r["model"] == model.name]
    return {(r["prompt"], r["text"], r["sample"]): r for r in own}


def told(counts: dict[str, Counts]) -> dict[str, tuple[int, int, int]]:
    return {name: (c.there, c.generated, c.failed) for name, c in counts.items()}


def test_two_models_and_four_prompts(
    make: Make, models: list[Model], root: str, tmp_path: Path
) -> None:
    """And a fifth, which is more than the one reads."""
    suite, seen = suite_of(*TEXTS, LONG), list[Progress]()
    twice = dataclasses.replace(suite, prompts=(*suite.prompts, suite.prompts[0]))
    counts = make(models, twice, watch=lambda p: seen.append(dataclasses.replace(p)))
    assert told(counts) == {"a": (0, 4, 1), "w": (0, 5, 0)}
    assert (seen[-1].done, seen[-1].total, seen[-1].failed) == (10, 10, 1)
    found = rows(root)
    assert [(r["model"], r["prompt"]) for r in found] == [
        (name, text) for name in "aw" for text in sorted((*TEXTS, LONG))
    ]
    assert {r["seed"] for r in found} == {0} and len({r["generation_id"] for r in found}) == 10
    row = found[0]
    assert (row["num_frames"], row["fps"], row["width_px"], row["height_px"]) == (4, 8.0, 64, 48)
    assert row["duration_s"] == 0.5 and row["checkpoint"] == models[0].checkpoint
    assert json.loads(row["settings"]) == {"frames": 4, "guidance_scale": 7.5, "steps": 1}
    bad = next(r for r in found if r["error_type"])
    assert (bad["model"], bad["prompt"], bad["error_type"]) == ("a", LONG, "ValueError")
    assert "tokens" in bad["error"] and bad["error_transient"] is False and not bad["sha256"]
    again = make(models, suite, connect=lambda: pytest.fail("nothing was to do"))
    assert told(again) == {"a": (5, 0, 0), "w": (5, 0, 0)} and rows(root) == found

    # the video is what the model makes of text and seed, encoded
    (path,) = fetch(root, [row["generation_id"]], tmp_path / "fetched")
    assert path.name == "A cat-0.mp4"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]
    asked = [Asked(text=row["text"], seed=seed) for seed in (0, 1)]
    own, other = (m.frames for m in models[0].load("cpu")(asked))
    kept = frames_of(path.read_bytes())
    assert abs(kept - own).mean() < 12 < abs(kept - other).mean()
    with pytest.raises(FileNotFoundError):
        fetch(root, [bad["generation_id"]], tmp_path)

    exported = export_videos(root, videos_of(root, models[0]), suite, tmp_path / "x")
    assert exported.num_written == 4 and len(exported.missing) == 1
    assert exported.notes == (
        "A cat-0.mp4 and a cat-0.mp4 are one file where a disk does not tell the case of letters",
    )
    names = sorted(p.name for p in (tmp_path / "x").iterdir())
    assert len(names) == 4 and "a red car-0.mp4" in names


def test_a_model_that_cannot_be_loaded(make: Make, models: list[Model], root: str) -> None:
    gone = dataclasses.replace(models[0], at="/nowhere")
    with pytest.raises(Unloadable, match=r"model a cannot be loaded: .*nowhere") as error:
        make([gone], suite_of("a cat"))
    assert "\n" not in str(error.value) and not rows(root)


@pytest.fixture
def server() -> Iterator[VideoServer]:
    """Gives a video by the seed, so that many can be made in no time."""
    with VideoServer(lambda asked: Answer(200, mp4(asked["seed"]))) as found:
        yield found


def test_samples_and_seeds(make: Make, server: VideoServer, root: str, tmp_path: Path) -> None:
    """Sample n has the run's seed + n; other settings and seeds are other videos."""
    (model,) = parse([f"far={server.url}"])
    suite = suite_of("a cat", samples=2)
    make([model], suite, seed=3)
    assert [(r["sample"], r["seed"]) for r in rows(root)] == [(0, 3), (1, 4)]
    make([model], suite, seed=4)
    hashes = {(r["sample"], r["seed"]): r["sha256"] for r in rows(root)}
    assert len(hashes) == 4 and hashes[1, 4] == hashes[0, 4] != hashes[0, 3]
    assert hashes[0, 3] == hashlib.sha256(mp4(3)).hexdigest()
    other = with_settings([model], ["far.steps=2"])
    assert told(make(other, suite, seed=4)) == {"far": (0, 2, 0)}
    ids = [r["generation_id"] for r in rows(root)]
    paths = fetch(read(root, "generations"), ids[::-1], tmp_path)
    assert [p.parent.name for p in paths] == ids[::-1] and len({*paths}) == len(ids) == 6
    before = paths[0].stat().st_mtime_ns
    assert fetch(root, ids[-1:], tmp_path)[0].stat().st_mtime_ns == before, "written again"
    with pytest.raises(FileNotFoundError, match="no video nobody"):
        fetch(root, ["nobody"], tmp_path)


def test_an_endpoint(make: Make, server: VideoServer, root: str, tmp_path: Path) -> None:
    """An mp4 is stored as it came, a WebM is encoded anew, what is no video fails for good."""
    answers = {
        "fine": Answer(200, mp4(0)),
        "webm": Answer(200, encoded("libvpx", "webm", 0)),
        "broken": Answer(200, mp4(0)[:900]),
        "refused": Answer(400),
        "later": Answer(403, b"not yet"),
    }
    server.reply = lambda asked: answers[asked["prompt"]]
    (model,) = parse([f"far={server.url}"])
    suite = suite_of(*answers)
    assert told(make([model], suite)) == {"far": (0, 2, 3)}
    by_prompt = {r["prompt"]: r for r in rows(root)}
    assert by_prompt["broken"]["error_type"] in ("TruncatedError", "DamagedError")
    assert by_prompt["refused"]["error_type"] == "HTTP400"
    assert by_prompt["later"]["error_transient"] and "not yet" in by_prompt["later"]["error"]
    assert by_prompt["fine"]["notes"] == "[]" and by_prompt["fine"]["num_frames"] == 4
    assert "its container is matroska" in by_prompt["webm"]["notes"]
    ids = [by_prompt[p]["generation_id"] for p in ("fine", "webm")]
    fine, webm = fetch(root, ids, tmp_path)
    assert fine.read_bytes() == mp4(0)
    with av.open(str(webm)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert sum(1 for _ in container.decode(video=0)) == 4

    # what may pass is tried again, and the rest only where that is asked for
    answers["later"] = answers["refused"] = Answer(200, mp4(1))
    assert told(make([model], suite)) == {"far": (4, 1, 0)}
    assert told(make([model], suite, retry_failed=True)) == {"far": (3, 1, 1)}
    after = {r["prompt"]: r for r in rows(root)}
    assert {p for p, r in after.items() if r["error_type"]} == {"broken"}
    assert {p: r["generation_id"] for p, r in after.items()} == {
        p: r["generation_id"] for p, r in by_prompt.items()
    }
    assert len(rows(root)) == 5


def test_a_killed_actor(make: Make, server: VideoServer, root: str, cluster: Cluster) -> None:
    """SIGKILL of an actor in the middle: nothing is lost, nothing is there twice."""
    suite, killed = suite_of(*(f"cat {n}" for n in range(6))), list[int]()

    def is_generator(process: psutil.Process) -> bool:
        line = " ".join(process.info["cmdline"] or [])
        return line.startswith("ray::") and "Generator" in line and cluster._is_of_it(process)

    def reply(asked: dict[str, Any]) -> Answer:
        if asked["prompt"] == "cat 3" and not killed:
            (process,) = filter(is_generator, psutil.process_iter(["name", "cmdline"]))
            killed.append(process.pid)
            process.kill()
        return Answer(200, mp4(asked["seed"]))

    server.reply = reply
    assert told(make(parse([f"far={server.url}"]), suite)) == {"far": (0, 6, 0)}
    found = [r["prompt"] for r in rows(root)]
    assert killed and found == [f"cat {n}" for n in range(6)]


_DRIVER = """
import contextlib, sys
sys.path[:0] = ["tests"]
from tiny_models import suite_of
from engine.session import connected
from engine.tables import Writer
from evals.generating import generate
from evals.models import parse
root, url = sys.argv[1:]
with contextlib.ExitStack() as stack:
    generate(parse([f"far={url}"]), suite_of(*(f"cat {n}" for n in range(8))),
             writer=Writer(root, "killed"), connect=lambda: stack.enter_context(connected()),
             commit_every_s=0.05, workers=1)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on(
    make: Make, server: VideoServer, root: str, cluster: Cluster, tmp_path: Path
) -> None:
    """SIGKILL of the driver: the next makes exactly what was not stored, under the same ids."""
    hold = threading.Event()

    def reply(asked: dict[str, Any]) -> Answer:
        if asked["prompt"] == "cat 3":
            hold.wait(220)
        return Answer(200, mp4(int(asked["prompt"][-1]) % 7))

    server.reply = reply
    process = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, root, server.url], cwd=REPOSITORY, env=cluster.env
    )
    deadline = time.monotonic() + 200
    while not (stored := stored_in(root)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    hold.set()
    stored = stored_in(root)
    assert 1 <= len(stored) <= 3
    models, suite = parse([f"far={server.url}"]), suite_of(*(f"cat {n}" for n in range(8)))
    asked = len(server.asked)
    assert told(make(models, suite)) == {"far": (len(stored), 8 - len(stored), 0)}
    assert len(server.asked) >= asked + 8 - len(stored)
    found = rows(root)
    assert {r["generation_id"] for r in found if r["run_id"] == "killed"} == stored
    create(str(tmp_path / "whole"), "evaluation")
    writer = Writer(str(tmp_path / "whole"), "whole")
    generate(models, suite, writer=writer, connect=lambda: None, workers=2)
    whole = rows(str(tmp_path / "whole"))
    names = ("generation_id", "prompt", "seed", "sha256", "num_frames")
    assert [[r[n] for n in names] for r in whole] == [[r[n] for n in names] for r in found]


def stored_in(root: str) -> set[str]:
    table = lance.dataset(f"{root}/generations.lance")
    return {*table.to_table(columns=["generation_id"])["generation_id"].to_pylist()}


def test_odd_sides_are_cut() -> None:
    frames, note = even(np.zeros((2, 5, 7, 3), np.uint8))
    assert frames.shape == (2, 4, 6, 3) and note and "7x5 to 6x4" in note
    same = np.zeros((2, 4, 6, 3), np.uint8)
    assert even(same) == (same, None)
    for wrong in (same[:0], same[:, :1], same.astype(np.float32), same[0]):
        with pytest.raises(Failed):
            even(wrong)


def test_the_same_frames_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    """At a size for which x264 was seen to give nine variants in ten encodes."""
    noise = np.random.default_rng(0).integers(0, 128, (240, 416, 3), np.uint8)
    frames = np.stack([np.roll(noise, 3 * t, 1) for t in range(24)])
    made = set()
    for _ in range(6):
        write_mp4(tmp_path / "video.mp4", frames, 8.0)
        made.add((tmp_path / "video.mp4").read_bytes())
    assert len(made) == 1
