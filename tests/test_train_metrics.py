"""`train_metrics.lance`: always what the journals say, whatever was killed, resumed or lost."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lance
import pytest
from learners import job, make_pictures

from engine.schema import TRAIN_METRICS
from trainers import launch, tracking
from trainers.checkpoint import folder_of
from trainers.job import FINAL
from trainers.tracking import COMPACT_AT, TABLE, Metrics, MetricsTable


def journal(run: Path, stage: str, steps: Sequence[int], *, start: int = 0, at: float = 0) -> None:
    """Trains: logs steps, those from `start` on done anew."""
    (run / stage).mkdir(parents=True, exist_ok=True)
    metrics = Metrics(run / stage, "run", (), {}, start)
    metrics.log([{"step": step, "loss": at + step / 7, "lr_all": 0.1} for step in steps])
    metrics.close()


def stored(run: Path) -> dict[str, list[dict[str, Any]]]:
    """The table's rows by stage, as lines of metrics."""
    rows = lance.dataset(str(run / TABLE)).to_table().to_pylist()
    assert {row["run"] for row in rows} <= {str(run)}
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        line = json.loads(row["figures"])
        assert (row["step"], row["loss"]) == (line["step"], line["loss"])
        found.setdefault(row["stage"], []).append(line)
    return found


def journals(run: Path) -> dict[str, list[dict[str, Any]]]:
    found = {path.parent.name: tracking.read(path.parent) for path in run.glob("*/metrics.jsonl")}
    return {stage: lines for stage, lines in found.items() if lines}


def test_rows_are_the_journals_through_a_resume(tmp_path: Path) -> None:
    table = MetricsTable(tmp_path)
    assert table.update() == 0 and not (tmp_path / TABLE).exists(), "nothing was logged"
    journal(tmp_path, "image", range(10))
    assert table.update() == 10
    assert table.update() == 0 and lance.dataset(str(tmp_path / TABLE)).version == 1
    journal(tmp_path, "motion", range(3))
    assert table.update() == 3
    assert stored(tmp_path) == journals(tmp_path)
    # the trainer alone begins again, and is further than it was before the next update
    journal(tmp_path, "image", range(6, 14), start=6, at=0.5)
    assert table.update() == 17
    assert stored(tmp_path) == journals(tmp_path)
    assert [line["step"] for line in stored(tmp_path)["image"]] == list(range(14))
    # or not as far
    journal(tmp_path, "image", [8], start=8, at=0.5)
    table.update()
    assert [line["step"] for line in stored(tmp_path)["image"]] == list(range(9))
    assert lance.dataset(str(tmp_path / TABLE)).schema.equals(TRAIN_METRICS)


def test_a_driver_that_died_is_gone_on_from(tmp_path: Path) -> None:
    journal(tmp_path, "image", range(5))
    assert MetricsTable(tmp_path).update() == 5
    journal(tmp_path, "image", range(5, 9), start=5)
    assert MetricsTable(tmp_path).update() == 4, "what is there is known again"
    journal(tmp_path, "image", range(2, 4), start=2, at=1.0)
    MetricsTable(tmp_path).update()
    assert stored(tmp_path) == journals(tmp_path)
    with (tmp_path / "image" / tracking.METRICS).open("a") as file:
        file.write('{"step": 4, "lo')  # the trainer was killed in the middle of a line
    MetricsTable(tmp_path).update()
    assert [line["step"] for line in stored(tmp_path)["image"]] == [0, 1, 2, 3]


def test_what_does_not_belong_goes(tmp_path: Path) -> None:
    run, uri = tmp_path / "run", tmp_path / "run" / TABLE
    journal(run, "image", range(3))
    journal(run, "motion", range(3))
    table = MetricsTable(run)
    table.update()
    shutil.rmtree(run / "motion")  # its user trains it anew
    table.update()
    assert stored(run).keys() == {"image"}
    for file in (uri / "_versions").iterdir():
        file.write_bytes(b"torn")
    MetricsTable(run).update()
    assert stored(run) == journals(run)
    moved = run.rename(tmp_path / "moved")
    MetricsTable(moved).update()
    assert stored(moved) == journals(moved), "and its rows say where it is"


def test_many_commits_leave_few_fragments(tmp_path: Path) -> None:
    table = MetricsTable(tmp_path)
    for step in range(COMPACT_AT + 3):
        journal(tmp_path, "image", [step], start=step)
        table.update()
    fragments = lance.dataset(str(tmp_path / TABLE)).get_fragments()
    assert len(fragments) < COMPACT_AT
    table.end()
    assert len(lance.dataset(str(tmp_path / TABLE)).get_fragments()) == 1
    assert stored(tmp_path) == journals(tmp_path)
    assert len(list((tmp_path / TABLE / "_versions").iterdir())) <= 10


def test_what_fails_after_a_commit_adds_no_row_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal(tmp_path, "image", range(3))
    table = MetricsTable(tmp_path)
    table.update()
    journal(tmp_path, "image", range(3, 5), start=3)
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "COMPACT_AT", 0)
        patch.setattr(tracking, "_compact", lambda _: (tmp_path / "no" / "room").touch())
        with pytest.raises(OSError, match="No such file"):
            table.update()
    table.update()
    assert stored(tmp_path) == journals(tmp_path)


def test_a_training_stores_its_metrics_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The loop itself: twelve steps, then from the checkpoint of step 4 again."""
    root, run = make_pictures(tmp_path / "pictures"), tmp_path / "run"
    one = job(root, run, torch_threads=1)
    launch.alone(one)
    before = stored(run)
    assert before == journals(run) and len(before["denoise"]) == 12
    (one.folder / FINAL).unlink()
    for step in (8, 12):
        shutil.rmtree(folder_of(one.folder, step))
    monkeypatch.setattr(launch, "TABLE_EVERY_S", 0.0)
    monkeypatch.setattr(launch, "POLL_S", 0.01)
    assert launch.alone(one) == 4
    after = stored(run)
    assert after == journals(run)
    assert [line["step"] for line in after["denoise"]] == list(range(12))
    assert [r["loss"] for r in after["denoise"]] == [r["loss"] for r in before["denoise"]]
    assert after != before, "it was faster or slower this time"
    # a table that cannot be written stops no training
    shutil.rmtree(run / TABLE)
    (run / TABLE).write_text("in the way")
    with caplog.at_level(logging.WARNING):
        launch.store_metrics(str(run))
    assert "is behind its metrics.jsonl files" in caplog.text


def test_readers_see_whole_tables(tmp_path: Path) -> None:
    """While one is replaced and appended to, every version that a reader gets is of one moment."""
    journal(tmp_path, "image", range(4))
    MetricsTable(tmp_path).update()
    ended = threading.Event()

    def look() -> list[list[int]]:
        seen = []
        while not ended.is_set():
            seen.append(lance.dataset(str(tmp_path / TABLE)).to_table()["step"].to_pylist())
        return seen

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        table = MetricsTable(tmp_path)
        try:
            for turn in range(30):
                start = 4 + turn % 3
                journal(tmp_path, "image", range(start, start + 3), start=start, at=turn)
                table.update()
        finally:
            ended.set()
        seen = looking.result()
    assert len({len(steps) for steps in seen}) > 1, "it read while the table changed"
    assert all(steps == list(range(len(steps))) and len(steps) >= 4 for steps in seen)
