"""How long a page of a million clips takes to open in a browser, and a threshold to move.

    python tests/bench_dashboard.py [DATASET] [--clips 1000000]

A page counts as open when its numbers, its charts and its last picture are there.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lance
import numpy as np
import pyarrow as pa
import tyro
from bench import CLIPS_A_COMMIT, MILLION, a_commit
from shown_clips import picture

from engine.schema import KEYFRAMES
from engine.tables import Writer, create
from pipelines.recipes import CLASSIC

KEYFRAMES_A_CLIP = 3
TARGET_S = 3.0
MOVE_S = 1.0
PAGES = {
    "Funnel": ("funnel", ("#states td", ".marks")),
    "Clips": ("clips", (".rw-card img",)),
    "Thresholds": ("thresholds", ("#by-rule td", ".marks", "[data-testid=stDownloadButton]")),
}
"""Each with its path, and with what is there when all of it is."""


@dataclass(frozen=True)
class Opened:
    """One figure."""

    what: str
    seconds: float
    target_s: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether it is below its target."""
        return None if self.target_s is None else self.seconds < self.target_s


def make(root: str, num_clips: int, *, keyframes: bool = True) -> None:
    """A judged dataset of made-up clips, written by the real writer in many commits."""
    create(root, CLASSIC.name)
    writer, rng = Writer(root, "bench"), np.random.default_rng(0)
    pictures = [picture(level) for level in range(16, 240, 8)]
    for first in range(0, num_clips, CLIPS_A_COMMIT):
        unit = a_commit(first, rng)
        clips = _placed(unit["clips"], first)
        rows = _keyframes(clips, pictures) if keyframes else None
        writer.commit(
            sources=unit["sources"],
            clips=clips,
            keyframes=writer.fragments_of("keyframes", rows) if rows is not None else (),
        )
    writer.publish(CLASSIC.stages)


def _placed(clips: pa.Table, first: int) -> pa.Table:
    """Clips with the span and the source that `a_commit` leaves open."""
    numbers = np.arange(first, first + clips.num_rows)
    start_s = numbers % 10 * 20.0
    given = {
        "source_uri": [f"s3://bucket/raw/{n // 10_000:03d}/{n // 10:06d}.mp4" for n in numbers],
        "media": ["video"] * len(numbers),
        "start_s": start_s,
        "end_s": start_s + clips["duration_s"].to_numpy(),
        "codec": ["h264"] * len(numbers),
        "fps": np.full(len(numbers), 30.0),
    }
    for name, values in given.items():
        at = clips.schema.get_field_index(name)
        field = clips.schema.field(name)
        clips = clips.set_column(at, field, pa.array(values, field.type))
    return clips


def _keyframes(clips: pa.Table, pictures: list[bytes]) -> pa.Table:
    each, num = KEYFRAMES_A_CLIP, clips.num_rows
    columns = {
        name: np.repeat(clips[name].to_numpy(), each) for name in ("clip_id", "source_id")
    } | {
        "frame": np.tile(np.arange(each), num),
        "time_s": np.tile(np.arange(each, dtype=float), num),
        "width_px": np.full(num * each, 160),
        "height_px": np.full(num * each, 90),
    }
    arrays = [pa.array(columns[f.name], f.type) for f in KEYFRAMES if f.name != "jpeg"]
    blobs = [pictures[i % len(pictures)] for i in range(num * each)]
    return pa.table([*arrays, lance.blob_array(blobs)], schema=KEYFRAMES)


def opening(root: str) -> float:
    """Seconds of CPU that the three pages spend on a dataset that they have not seen before."""
    from cluster.dashboard import clips, funnel, keyframes, thresholds

    began = time.process_time()
    recipe = funnel.recipe_of(root)
    assert recipe is not None
    funnel.steps(recipe.stages, funnel.tallies(root))
    funnel.sources(root)
    funnel.failures(root)
    choice = clips.Choice(sort="brightness", ranges=(("motion_score", 0.2, 0.8),))
    clips.num(root, choice)
    ids = [row["clip_id"] for row in clips.found(root, choice, 0, 24)]
    keyframes.found(root, ids, keyframes.CARD_PX, most=1)
    now, bounds = thresholds.published_with_bounds(root, recipe.stages)
    thresholds.compared(now, thresholds.judged(root, recipe.stages, bounds))
    return time.process_time() - began


def moving(root: str, bound: float) -> float:
    """Seconds of CPU that a move of one threshold takes."""
    from cluster.dashboard import funnel, thresholds
    from cluster.dashboard.bounds import published_bounds

    recipe = funnel.recipe_of(root)
    assert recipe is not None
    bounds = published_bounds(root, recipe.stages)
    began = time.process_time()
    then = thresholds.judged(root, recipe.stages, bounds | {("brightness", "lo"): bound})
    outcome = thresholds.compared(thresholds.published(root), then)
    thresholds.states(outcome.then)
    return time.process_time() - began


def measure(root: str) -> list[Opened]:
    """Pages in a real browser, on a server that has just been started, and then again.

    The browser has seen the dashboard of another dataset before, and has its scripts.
    """
    from pages import Browser

    found = []
    browser = Browser(_program("chromium"), _program("chromedriver"))
    port = _free_port()
    with contextlib.ExitStack() as stack:
        stack.callback(browser.quit)
        small = f"{stack.enter_context(tempfile.TemporaryDirectory())}/small"
        make(small, CLIPS_A_COMMIT)
        with _server(small, port) as url:
            took = _visit(browser, f"{url}/runs", ("h1",))
            found.append(Opened("the first page of a new server, its imports and scripts", took))
            for path, there in PAGES.values():
                _visit(browser, f"{url}/{path}", there)
        for name, (path, there) in PAGES.items():
            with _server(root, port) as url:
                _visit(browser, f"{url}/runs", ("h1",))  # Python's imports
                target = f"{url}/{path}"
                for when in ("first", "again"):
                    took = _visit(browser, target, there)
                    found.append(Opened(f"{name}, {when}", took, TARGET_S))
                if name == "Thresholds":
                    for what, bound in (("first", "0.21"), ("then", "0.22")):
                        took = _move(browser, bound)
                        found.append(Opened(f"a threshold is moved, {what}", took, MOVE_S))
    return found


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _program(name: str) -> str:
    found = shutil.which(name)
    if not found:
        raise SystemExit(f"{name} is not installed: run make system-deps")
    return found


@contextlib.contextmanager
def _server(root: str, port: int) -> Iterator[str]:
    command = [sys.executable, "-m", "cluster", "dashboard", root, "--port", str(port)]
    repository = Path(__file__).resolve().parents[1]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=repository, stdout=quiet, stderr=quiet)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def _visit(browser: Any, url: str, there: tuple[str, ...]) -> float:
    """Seconds from the request to a page that is all there."""
    began = time.perf_counter()
    browser.driver.get(url)
    _wait(browser, lambda: all(browser.all(one) for one in there) and _has_pictures(browser))
    seconds = time.perf_counter() - began
    browser.settle()
    return seconds


def _has_pictures(browser: Any) -> bool:
    """No picture is on its way, and of a page of clips the last one is there."""
    waiting = "return [...document.images].some(i => !i.complete)"
    cards = browser.all(".rw-card")
    return not browser.driver.execute_script(waiting) and len(cards) in (0, 24)


def _move(browser: Any, bound: str) -> float:
    """Seconds from a new bound to the numbers that it gives."""
    from selenium.webdriver.common.keys import Keys

    box = browser.all("[data-testid='stSelectbox'] input")[0]
    box.click()
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys("brightness", Keys.ENTER)
    selector = ".st-key-bound-brightness-lo-number input"
    _wait(browser, lambda: browser.all(selector))
    browser.settle()
    field = browser.all(selector)[0]
    field.send_keys(Keys.CONTROL, "a")
    began = time.perf_counter()
    field.send_keys(bound, Keys.ENTER)
    said = f"brightness<{bound}"  # the table may be away for a moment, as it moves down
    _wait(browser, lambda: any(said in table.text for table in browser.all("#by-rule")))
    seconds = time.perf_counter() - began
    browser.settle()
    return seconds


def _wait(browser: Any, holds: Any) -> None:
    from selenium.common.exceptions import StaleElementReferenceException

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(StaleElementReferenceException):
            if holds():
                return
        time.sleep(0.02)
    raise SystemExit(f"it did not come to pass:\n{browser.text}")


def main(dataset: tyro.conf.Positional[str | None] = None, clips: int = MILLION) -> None:
    """Measures; makes the dataset first where none is named."""
    with tempfile.TemporaryDirectory() as folder:
        root = dataset or f"{folder}/million"
        if dataset is None:
            make(root, clips)
        for one in measure(root):
            met = {None: "", True: f"  (under {one.target_s} s)", False: f"  OVER {one.target_s} s"}
            print(f"{one.what}: {one.seconds:.2f} s{met[one.met]}")
        print(f"CPU of the three pages' data: {opening(root):.2f} s")
        print(f"CPU of a move: {moving(root, 0.21):.2f} s")


if __name__ == "__main__":
    tyro.cli(main)
