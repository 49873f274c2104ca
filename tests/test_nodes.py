"""Several nodes, each a raylet of its own: one joins in the middle of a run, another is lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from conftest import Cluster, Driver, free_ports, rows

from engine.tables import read

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TABLES = ("sources", "clips", "keyframes")
SOME = (  # many more than the workers of two nodes take up before they are held
    "coffee_pan.mp4", "dark.mp4", "astronaut_zoom.mp4", "cuts.mp4", "static.mp4", "fades.mp4",
    "truncated.mp4", "portrait.mp4", "same_as_coffee_pan.mp4", "blackout.mp4", "blink.mp4",
    "grass.webm", "letterboxed.mp4", "pinhole.mp4", "retina.avi", "rotated_portrait.mp4",
    "short.mp4", "square.mp4", "two_to_one.mp4", "vfr.mp4",
)  # fmt: skip
STARTED, TRIALS = "Ray runtime started", 3


@dataclass
class Node:
    """A raylet and all that runs on it, as `ray start --block` started them."""

    process: subprocess.Popen[bytes]
    log: Path

    def has_joined(self) -> bool:
        return STARTED in self.log.read_text()

    def decoders(self) -> list[psutil.Process]:
        """Children of actors, one each, that read a video at this moment."""
        found = []
        for one in self._descendants():
            with contextlib.suppress(psutil.NoSuchProcess):
                if any("engine.sandbox" in part for part in one.cmdline()):
                    found.append(one)
        return found

    def hold(self) -> None:
        """Stops them where they are."""
        for one in self.decoders():
            with contextlib.suppress(psutil.NoSuchProcess):
                one.suspend()

    def release(self) -> None:
        for one in self.decoders():
            with contextlib.suppress(psutil.NoSuchProcess):
                one.resume()

    def kill(self) -> None:
        """At once and all of it, as when the machine loses power."""
        everything = self._descendants()
        self.process.kill()
        for one in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.process.wait()

    def _descendants(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []


@dataclass
class Nodes:
    """A head, and workers that come and go."""

    folder: Path
    env: dict[str, str]
    port: int
    all: list[Node] = field(default_factory=list)

    @property
    def cluster(self) -> Cluster:
        """As a driver sees it."""
        return Cluster(self.env["RAY_ADDRESS"], "", self.env, self.folder, self.folder)

    def start(self, *how: str, meanwhile: Callable[[], None] = lambda: None) -> Node:
        """A node with one core that has joined.

        One after the other: two that start at once on one machine take each other's sockets. Ray
        gives a node 30 s to join, which on a busy machine it may miss.
        """
        for _ in range(TRIALS):
            node = self._begin(*how)
            while node.process.poll() is None:
                if node.has_joined():
                    return node
                meanwhile()
                time.sleep(0.1)
            node.kill()
        raise AssertionError(node.log.read_text())

    def _begin(self, *how: str) -> Node:
        listen, grpc, metrics = free_ports(3)
        log = self.folder / f"node{len(self.all)}.log"
        command = [
            str(Path(sys.executable).parent / "ray"),
            "start",
            "--block",
            *how,
            "--node-ip-address=127.0.0.1",
            "--num-cpus=1",
            "--object-store-memory=100000000",
            "--include-log-monitor=false",
            f"--dashboard-agent-listen-port={listen}",
            f"--dashboard-agent-grpc-port={grpc}",
            f"--metrics-export-port={metrics}",
            # which are the machine's: two raylets of one range would take each other's
            "--min-worker-port=0",
            "--max-worker-port=0",
        ]
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, env=self.env, stdout=out, stderr=out, start_new_session=True
            )
        self.all.append(Node(process, log))
        return self.all[-1]

    def join(self, meanwhile: Callable[[], None] = lambda: None) -> Node:
        """One more worker."""
        return self.start(f"--address=127.0.0.1:{self.port}", meanwhile=meanwhile)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head and a worker, a core each."""
    folder = Path(tempfile.mkdtemp(prefix="rw", dir="/tmp"))  # short: it holds sockets
    (port,) = free_ports(1)
    env = os.environ | {
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HOME": str(folder),
        "RAY_health_check_period_ms": "1000",  # a lost node is noticed after 5 s, not 15
    }
    made = Nodes(folder, env, port)
    try:
        made.start("--head", f"--port={port}", f"--temp-dir={folder}", "--include-dashboard=false")
        made.join()
        yield made
    finally:
        for one in psutil.process_iter(["cmdline"]):
            if any(str(folder) in part for part in one.info["cmdline"] or ()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        for one in made.all:
            one.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def source(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("some")
    for name in SOME:
        shutil.copy2(samples / name, folder)
    return folder


def until(what: Callable[[], object], driver: Driver) -> None:
    deadline = time.monotonic() + 150
    while not what():
        if time.monotonic() > deadline:
            driver.process.kill()
        elif driver.process.poll() is None:
            time.sleep(0.02)
            continue
        raise AssertionError(driver.end())


def num_committed(root: Path) -> int:
    """Videos that workers have read, and the driver has committed."""
    try:
        found = read(str(root), "sources").to_table(columns=["frames_decoded"])
    except ValueError:
        return 0
    return sum(n > 0 for n in found["frames_decoded"].to_pylist())


def test_a_node_joins_in_the_middle_and_another_is_lost(
    nodes: Nodes, source: Path, tmp_path: Path
) -> None:
    head, early = nodes.all[0], nodes.all[-1]
    root = tmp_path / "disturbed"
    # more than there are cores: one waits for the node that joins
    driver = Driver(nodes.cluster, source, root, "--workers", 3)
    until(lambda: num_committed(root) and early.decoders(), driver)

    def hold() -> None:  # so that work is left for who joins, however slow this machine is
        head.hold()
        early.hold()

    def is_used() -> bool:
        hold()
        return bool(late.decoders())

    late = nodes.join(meanwhile=hold)
    until(is_used, driver)
    assert early.decoders()
    early.kill()
    before = num_committed(root)
    assert 0 < before < len(SOME) - 3
    head.release()
    done = driver.end(300)
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    # in balance: every source in one state, and no row that another run would not have
    counts = json.loads(done.out.splitlines()[-1])["sources"]  # before it, Ray tells of the node
    found = {t: rows(root, t) for t in TABLES}
    assert len({r["uri"] for r in found["sources"]}) == len(found["sources"]) == len(SOME)
    states = [r["state"] for r in found["sources"]]
    assert counts["total"] == len(SOME)
    assert {s: states.count(s) for s in ("done", "failed", "duplicate")} == {
        s: counts[s] for s in ("done", "failed", "duplicate")
    }
    again = Driver(nodes.cluster, source, tmp_path / "undisturbed").end()
    assert again.code == 0, again.err
    assert found == {t: rows(tmp_path / "undisturbed", t) for t in TABLES}
