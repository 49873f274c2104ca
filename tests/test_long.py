"""Long sources go through the run in parts: the same rows, and a finished part is not redone."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import av
import pytest
from clips import encode, shots_of
from conftest import Cluster, Curate, Driver, rows

from engine.scan import Scan, SegmentScan, plan_segments
from engine.tables import read

pytestmark = pytest.mark.slow

TABLES = ("sources", "clips", "keyframes")
LENGTHS = (130, 260, 90, 70, 200, 150, 180)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """43 s of small pictures with a key frame a second."""
    path = tmp_path_factory.mktemp("made") / "short.mp4"
    options = {"g": "25", "sc_threshold": "0", "crf": "28", "preset": "veryfast"}
    return encode(path, shots_of(LENGTHS), fps=25, options=options)


def again_and_again(path: Path, video: Path, times: int) -> Path:
    """A video shown any number of times, without encoding it again."""
    with av.open(str(path), "w") as out:
        stream, offset = None, 0
        for _ in range(times):
            with av.open(str(video)) as once:
                given = once.streams.video[0]
                stream = stream or out.add_stream_from_template(given)
                for packet in once.demux(given):
                    if packet.dts is None or packet.pts is None:
                        continue
                    packet.stream = stream
                    packet.dts, packet.pts = packet.dts + offset, packet.pts + offset
                    out.mux(packet)
                assert given.duration is not None
                offset += given.duration
    return path


def test_in_parts_on_the_cluster_its_rows_are_those_of_the_whole(
    short: Path, tmp_path: Path, curate: Curate
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy2(short, folder / "long.mp4")
    (folder / "long.txt").write_text("a long one")
    shutil.copy2(short, folder / "same.mp4")
    scan = Scan(segment_s=3.5)
    parts = plan_segments(str(short), scan)
    assert len(parts) >= 4
    result = curate(folder, tmp_path / "parts", scan={"segment_s": scan.segment_s})
    assert result.accounts.faults == ()
    assert curate(folder, tmp_path / "whole").accounts.faults == ()
    for table in TABLES:
        without = ("run_id", "frames_decoded", "fingerprint")
        found = rows(tmp_path / "parts", table, without=without)
        assert found == rows(tmp_path / "whole", table, without=without)
        assert found
    assert sum(LENGTHS) < result.frames_decoded < 1.2 * sum(LENGTHS)
    assert not list((tmp_path / "parts").glob("parts/*/*"))


@pytest.mark.timeout(240)
def test_a_run_killed_within_a_long_source_does_not_decode_finished_parts_again(
    short: Path, tmp_path: Path, cluster: Cluster
) -> None:
    folder, root = tmp_path / "in", tmp_path / "set"
    folder.mkdir()
    longer = again_and_again(folder / "longer.mp4", short, 45)
    assert len(plan_segments(str(longer), Scan())) >= 3
    driver = Driver(cluster, folder, root, "--workers", 1)
    deadline = time.monotonic() + 100
    while not list(root.glob("parts/*/*.arrow")):
        assert time.monotonic() < deadline and driver.process.poll() is None, driver.end()
        time.sleep(0.05)
    driver.process.kill()
    driver.end()
    while cluster.processes("actor"):  # they may still finish what they are at
        assert time.monotonic() < deadline
        time.sleep(0.1)
    parked = [SegmentScan.from_bytes(p.read_bytes()) for p in root.glob("parts/*/*.arrow")]
    assert read(str(root), "sources").count_rows() == 0
    done = Driver(cluster, folder, root).end()
    assert done.code == 0, done.err
    (row,) = rows(root, "sources", without=())
    once = sum(part.frames_decoded for part in parked)
    assert 0 < once < row["frames_decoded"]
    assert done.json["frames_decoded"] == row["frames_decoded"] - once
    assert row["num_frames"] == 45 * sum(LENGTHS)
    undisturbed = Driver(cluster, folder, tmp_path / "undisturbed").end()
    assert undisturbed.code == 0, undisturbed.err
    for table in TABLES:
        assert rows(root, table) == rows(tmp_path / "undisturbed", table)
