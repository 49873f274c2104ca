"""Killed anywhere, it goes on: the rows equal an undisturbed run's and nothing is done twice."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import Cluster, Driver, rows

from engine.tables import read

pytestmark = pytest.mark.slow

TRIALS = 20
TABLES = ("sources", "clips", "keyframes")
SOME = (
    "coffee_pan.mp4", "dark.mp4", "astronaut_zoom.mp4", "cuts.mp4", "static.mp4", "fades.mp4",
    "truncated.mp4", "portrait.mp4", "same_as_coffee_pan.mp4",
)  # fmt: skip


@pytest.fixture(scope="module")
def source(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("some")
    for name in SOME:
        shutil.copy2(samples / name, folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(
    source: Path, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict]]:
    root = tmp_path_factory.mktemp("undisturbed") / "set"
    done = Driver(cluster, source, root).end()
    assert done.code == 0, done.err
    return {table: rows(root, table) for table in TABLES}


def committed(root: Path) -> tuple[set[str], int]:
    """uris that are committed, and the frames that they took."""
    try:
        found = read(str(root), "sources").to_table(columns=["uri", "frames_decoded"]).to_pylist()
    except ValueError:
        return set(), 0  # it was killed before there was a dataset
    return {r["uri"] for r in found}, sum(r["frames_decoded"] for r in found)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("seed", range(TRIALS))
def test_a_kill_at_a_random_moment_costs_nothing_that_was_committed(
    seed: int,
    source: Path,
    cluster: Cluster,
    undisturbed: dict[str, list[dict]],
    tmp_path: Path,
) -> None:
    chance = random.Random(seed)
    kind, root = ("driver", "actor", "child", "gauge")[seed % 4], tmp_path / "set"
    driver = Driver(cluster, source, root)
    if kind == "driver":
        time.sleep(chance.uniform(1, 8))
        driver.process.kill()
        driver.end()
    else:
        victims: list[psutil.Process] = []
        while not victims and driver.process.poll() is None:
            time.sleep(0.02)
            victims = cluster.processes(kind)
        time.sleep(chance.uniform(0, 2))
        for victim in chance.sample(victims, 1) if victims else ():
            if victim.is_running():
                victim.kill()
        done = driver.end()
        assert done.code == 0, done.err  # the run itself survives that
    before, frames = committed(root)
    done = Driver(cluster, source, root).end()
    assert done.code == 0, done.err
    assert {table: rows(root, table) for table in TABLES} == undisturbed
    everything, all_frames = committed(root)
    assert before <= everything
    assert done.json["frames_decoded"] == all_frames - frames


@pytest.mark.parametrize("store", ["local", "s3"])
def test_a_stopped_driver_that_was_replaced_wakes_up_and_adds_no_row(
    store: str, source: Path, cluster: Cluster, undisturbed: dict, tmp_path: Path, request
) -> None:
    if store == "s3":
        bucket = request.getfixturevalue("bucket")
        root, cluster = f"{bucket.uri}/set", bucket.on(cluster)
    else:
        root = str(tmp_path / "set")
    # one worker: what it holds of the cluster it keeps while it is stopped
    asleep = Driver(cluster, source, root, "--lease-expiry-s", 15, "--workers", 1)
    deadline = time.monotonic() + 60
    while not committed(root)[1]:  # frames: copies are committed before there are workers
        assert time.monotonic() < deadline and asleep.process.poll() is None, asleep.end()
        time.sleep(0.05)
    asleep.process.send_signal(signal.SIGSTOP)
    refused = Driver(cluster, source, root).end()
    time.sleep(15.5)
    awake = Driver(cluster, source, root).end()
    asleep.process.send_signal(signal.SIGCONT)
    woken = asleep.end()
    assert refused.code == 2 and "in use by run" in refused.err
    said = refused.err.strip().splitlines()
    assert len(said) == 2, refused.err  # what it was about to do, and the reason
    assert awake.code == 0, awake.err
    assert woken.code == 1 and "taken over" in woken.err, woken.err
    assert {table: rows(root, table) for table in TABLES} == undisturbed


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "ray job stop"])
def test_ctrl_c_commits_what_is_done_and_says_how_to_go_on(
    how: signal.Signals, source: Path, cluster: Cluster, undisturbed: dict, tmp_path: Path
) -> None:
    root = tmp_path / "set"
    driver = Driver(cluster, source, root)
    deadline = time.monotonic() + 60
    while not cluster.processes("child") and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(1)
    driver.process.send_signal(how)
    stopped = driver.end(30)
    assert stopped.code == 130, stopped.err
    assert "run the same command again" in stopped.err
    assert "Traceback" not in stopped.err
    assert stopped.json["clips"]["total"] == len(rows(root, "clips"))
    done = Driver(cluster, source, root).end()
    assert done.code == 0, done.err
    assert {table: rows(root, table) for table in TABLES} == undisturbed


def test_two_runs_at_once_are_one_run_and_a_refusal(
    source: Path, cluster: Cluster, undisturbed: dict, tmp_path: Path
) -> None:
    root = tmp_path / "set"
    both = [Driver(cluster, source, root) for _ in range(2)]
    ended = sorted((d.end() for d in both), key=lambda ran: ran.code)
    assert [ran.code for ran in ended] == [0, 2], [ran.err for ran in ended]
    assert "in use by run" in ended[1].err
    assert {table: rows(root, table) for table in TABLES} == undisturbed


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(
    source: Path, cluster: Cluster, undisturbed: dict, tmp_path: Path
) -> None:
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("mounting a small file system needs root on Linux")
    small = tmp_path / "small"
    small.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(small)], capture_output=True
    )
    if mount.returncode:
        pytest.skip("this machine does not let us mount")
    try:
        full = Driver(cluster, source, small / "set").end()
        assert full.code not in (0, None)
        assert "Traceback" not in full.err, full.err
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        done = Driver(cluster, source, small / "set").end()
        assert done.code == 0, done.err
        assert {table: rows(small / "set", table) for table in TABLES} == undisturbed
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
