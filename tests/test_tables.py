"""The exactly-once writer: atomic units, fencing, recovery, verdicts, compaction."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import lance
import pyarrow as pa
import pytest
from lance.dataset import DatasetOptimizer

from engine import storage, tables
from engine.accounts import balance
from engine.operator import Rule, Stage
from engine.schema import CLIPS, KEYFRAMES, SOURCES, TABLES
from engine.tables import (
    COMPACT_AT,
    DatasetError,
    LeaseLost,
    NoTable,
    Writer,
    create,
    read,
    table_uri,
    write_rows,
)

STAGES = (Stage(name="quality", rules=(Rule(column="brightness", lo=0.2),)),)


@pytest.fixture
def root(tmp_path: Path) -> str:
    create(str(tmp_path / "data"), "classic")
    return str(tmp_path / "data")


def source_rows(*names: str, num_clips: int = 2) -> pa.Table:
    rows = [
        {"source_id": n, "uri": f"/{n}.mp4", "state": "done", "num_clips": num_clips} for n in names
    ]
    return pa.Table.from_pylist(rows, schema=SOURCES)


def clip_rows(*names: str, brightness: float | None = 0.5, num: int = 2) -> pa.Table:
    rows = [
        {
            "clip_id": f"{n}-{i}",
            "source_id": n,
            "brightness": brightness,
            "state": "pending",
            "kept": False,
        }
        for n in names
        for i in range(num)
    ]
    return pa.Table.from_pylist(rows, schema=CLIPS)


def keyframes(root: str, *names: str) -> list:
    rows = {
        "clip_id": [f"{n}-0" for n in names],
        "source_id": list(names),
        "frame": [0] * len(names),
        "time_s": [0.0] * len(names),
        "width_px": [4] * len(names),
        "height_px": [4] * len(names),
        "jpeg": lance.blob_array([n.encode() * 100 for n in names]),
    }
    table = pa.table(
        [pa.array(rows[f.name], f.type) if f.name != "jpeg" else rows["jpeg"] for f in KEYFRAMES],
        schema=KEYFRAMES,
    )
    return write_rows(root, "keyframes", table)


def unit(writer: Writer, *names: str, **more: object) -> None:
    writer.commit(
        sources=source_rows(*names),
        clips=clip_rows(*names),
        keyframes=keyframes(writer.root, *names),
        **more,
    )


def rows_in(root: str) -> dict[str, list]:
    column = {"sources": "source_id", "clips": "clip_id", "keyframes": "clip_id"}
    return {
        name: sorted(read(root, name).to_table(columns=[key])[key].to_pylist())
        for name, key in column.items()
    }


def test_a_unit_lands_in_all_tables(root: str) -> None:
    unit(Writer(root, "r"), "a", "b")
    assert rows_in(root) == {
        "sources": ["a", "b"],
        "clips": ["a-0", "a-1", "b-0", "b-1"],
        "keyframes": ["a-0", "b-0"],
    }
    frame = read(root, "keyframes").take_blobs("jpeg", indices=[1])[0]
    assert frame.read() == b"b" * 100


def test_a_unit_replaces_what_was_there_of_its_sources(root: str) -> None:
    writer = Writer(root, "r")
    unit(writer, "a", "b")
    unit(writer, "c")
    writer.commit(
        sources=source_rows("b", "c", num_clips=1),
        clips=clip_rows("b", "c", num=1),
        replaces=["b", "c"],
    )
    assert rows_in(root) == {
        "sources": ["a", "b", "c"],
        "clips": ["a-0", "a-1", "b-0", "c-0"],
        "keyframes": ["a-0"],
    }


def test_a_driver_that_was_replaced_adds_no_row_in_any_way(root: str) -> None:
    asleep = Writer(root, "asleep")
    unit(asleep, "a")
    Writer(root, "awake")
    before = rows_in(root)
    attempts = [
        lambda: unit(asleep, "z"),
        lambda: asleep.commit(sources=source_rows("z")),
        lambda: asleep.commit(sources=source_rows("a"), replaces=["a"]),
        lambda: asleep.publish(STAGES),
        lambda: asleep.add_run({"run_id": "asleep"}),
    ]
    for attempt in attempts:
        with pytest.raises(LeaseLost):
            attempt()
    assert rows_in(root) == before
    assert read(root, "runs").count_rows() == 0


def test_a_driver_replaced_in_the_middle_of_a_unit_leaves_nothing_of_it(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asleep = Writer(root, "asleep")
    unit(asleep, "a")
    before = rows_in(root)
    kind = type(asleep.tables["clips"])
    commit = kind.commit

    def stops_before_sources(table, operation, **properties):
        if table is asleep.tables["sources"]:
            monkeypatch.setattr(kind, "commit", commit)
            Writer(root, "awake")
        commit(table, operation, **properties)

    monkeypatch.setattr(kind, "commit", stops_before_sources)
    with pytest.raises(LeaseLost):
        unit(asleep, "z")
    assert rows_in(root) == before


@pytest.mark.parametrize("dies_before", ["clips", "sources"])
def test_what_a_dead_driver_left_half_committed_is_taken_back(
    root: str, dies_before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(root, "r")
    unit(writer, "a", "b")
    kind = type(writer.tables["clips"])
    commit = kind.commit

    def dies(table, operation, **properties):
        if table.name == dies_before:
            raise InterruptedError
        commit(table, operation, **properties)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "commit", dies)
        with pytest.raises(InterruptedError):
            unit(writer, "z")
        with pytest.raises(InterruptedError):
            writer.commit(sources=source_rows("a"), clips=clip_rows("a", num=1), replaces=["a"])
    said: list[str] = []
    unit(Writer(root, "next", recovered=said.append), "c")
    assert said
    assert rows_in(root) == {
        "sources": ["a", "b", "c"],
        "clips": ["a-0", "a-1", "b-0", "b-1", "c-0", "c-1"],
        "keyframes": ["a-0", "b-0", "c-0"],
    }


def test_more_rows_than_one_predicate_holds_are_replaced(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_ASKED_AT_ONCE", 7)
    names = [f"it's {i:03d}" for i in range(50)]
    writer = Writer(root, "r")
    for some in (names[:30], names[30:]):
        unit(writer, *some)
    unit(writer, *names[:45], replaces=names[:45])
    assert rows_in(root)["sources"] == names
    assert rows_in(root)["keyframes"] == [f"{n}-0" for n in names]


class Killed(Exception):
    """Stands for the end of the process."""


@contextlib.contextmanager
def at_each_step(act: Callable[[int], None]) -> Iterator[None]:
    """Calls `act` with its number before and after whatever changes a table."""
    steps = itertools.count()

    def around(change: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            act(next(steps))
            done = change(*args, **kwargs)
            act(next(steps))
            return done

        return call

    table, optimizer = tables.FencedTable, DatasetOptimizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "commit", around(table.commit))
        patch.setattr(optimizer, "compact_files", around(optimizer.compact_files))
        patch.setattr(
            lance.LanceDataset,
            "cleanup_old_versions",
            around(lance.LanceDataset.cleanup_old_versions),
        )
        yield


@contextlib.contextmanager
def killed_at(step: int) -> Iterator[list[bool]]:
    """Ends what is inside at a step; the list is empty when it has fewer."""
    died: list[bool] = []

    def act(number: int) -> None:
        if number == step:
            died.append(True)
            raise Killed

    with at_each_step(act), contextlib.suppress(Killed):
        yield died


def test_killed_at_any_step_a_unit_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "COMPACT_AT", 3)
    monkeypatch.setattr(tables, "KEPT_VERSIONS", 8)
    before = {
        "sources": ["a", "b", "c"],
        "clips": ["a-0", "a-1", "b-0", "b-1", "c-0", "c-1"],
        "keyframes": ["a-0", "b-0", "c-0"],
    }
    after = {
        "sources": ["a", "b", "c", "z"],
        "clips": ["a-0", "b-0", "b-1", "c-0", "c-1", "z-0"],
        "keyframes": ["a-0", "b-0", "c-0", "z-0"],
    }
    seen = []
    for step in itertools.count():
        root = str(tmp_path / str(step))
        create(root, "classic")
        writer = Writer(root, "r")
        unit(writer, "a", "b")
        unit(writer, "c")
        with killed_at(step) as died:
            writer.commit(
                sources=source_rows("a", "z", num_clips=1),
                clips=clip_rows("a", "z", num=1),
                keyframes=keyframes(root, "a", "z"),
                replaces=["a"],
            )
            writer.publish(STAGES)
        if not died:
            break
        with killed_at(step % 17):  # and its successor, too, while it opens the dataset
            Writer(root, "next")
        Writer(root, "last").publish(STAGES)
        assert rows_in(root) in (before, after), step
        assert not balance(lambda name, root=root: read(root, name), None).faults
        seen.append(rows_in(root) == after)
    assert True in seen and False in seen
    assert seen == sorted(seen)


def test_a_driver_overtaken_while_it_opens_the_dataset_takes_nothing_back(tmp_path: Path) -> None:
    for step in itertools.count():
        root = str(tmp_path / str(step))
        create(root, "classic")
        first = Writer(root, "first")
        unit(first, "a")
        keyframes_of_a_dead_run = keyframes(root, "dead")
        first.tables["keyframes"].commit(
            lance.LanceOperation.Append(keyframes_of_a_dead_run), kind="rows"
        )
        done: list[int] = []

        def overtake(number: int, step: int = step, root: str = root, done: list = done) -> None:
            if number == step and not done:
                done.append(number)
                unit(Writer(root, "overtaker"), "b")

        with at_each_step(overtake), contextlib.suppress(LeaseLost):
            Writer(root, "slow")
        if not done:
            break
        Writer(root, "last")
        assert rows_in(root) == {
            "sources": ["a", "b"],
            "clips": ["a-0", "a-1", "b-0", "b-1"],
            "keyframes": ["a-0", "b-0"],
        }, step
    assert step > 8


def test_ctrl_c_waits_for_the_end_of_a_unit(root: str) -> None:
    writer = Writer(root, "r")
    unit(writer, "a")

    def press(number: int) -> None:
        if number == 1:  # keyframes are in, clips are not
            os.kill(os.getpid(), signal.SIGINT)

    with at_each_step(press), pytest.raises(KeyboardInterrupt):
        unit(writer, "b")
    unit(writer, "c")
    writer.publish(STAGES)
    assert rows_in(root)["sources"] == ["a", "b", "c"]
    assert not balance(lambda name: read(root, name), None).faults


def test_verdicts_come_in_one_version_and_only_when_they_change(root: str) -> None:
    writer = Writer(root, "r")
    unit(writer, "a")
    writer.commit(sources=source_rows("dark"), clips=clip_rows("dark", brightness=0.1))
    before = writer.table("clips").version
    assert writer.publish(STAGES) == 4
    assert writer.table("clips").version == before + 1
    found = read(root, "clips").to_table(columns=["clip_id", "state", "reason"]).to_pylist()
    assert {(r["clip_id"], r["state"], r["reason"]) for r in found} == {
        ("a-0", "kept", None),
        ("a-1", "kept", None),
        ("dark-0", "rejected", "brightness<0.2"),
        ("dark-1", "rejected", "brightness<0.2"),
    }
    assert writer.publish(STAGES) == 0
    assert writer.table("clips").version == before + 1


def test_published_verdicts_survive_the_next_driver(root: str) -> None:
    writer = Writer(root, "r")
    unit(writer, "a")
    writer.publish(STAGES)
    Writer(root, "next")
    assert set(read(root, "clips").to_table(columns=["state"])["state"].to_pylist()) == {"kept"}


def test_many_commits_are_compacted_and_lose_nothing(root: str) -> None:
    writer = Writer(root, "r")
    names = [f"s{i:03d}" for i in range(COMPACT_AT + 10)]
    for name in names:
        unit(writer, name)
    assert rows_in(root)["sources"] == names
    for name in ("sources", "clips", "keyframes"):
        assert len(read(root, name).get_fragments()) < COMPACT_AT
        assert len(read(root, name).versions()) < 3 * COMPACT_AT
    table = read(root, "keyframes")
    ids = table.to_table(columns=["clip_id"])["clip_id"].to_pylist()
    blobs = [b.read() for b in table.take_blobs("jpeg", indices=list(range(len(ids))))]
    assert dict(zip(ids, blobs, strict=True)) == {f"{n}-0": n.encode() * 100 for n in names}
    unit(Writer(root, "next"), "after")
    assert balance(lambda name: read(root, name), None).faults == (
        "150 clip(s) pending: run the same command again",
    )


def test_verdicts_follow_their_rows_when_others_were_replaced_and_compacted(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "COMPACT_AT", 4)
    writer, dark = Writer(root, "r"), Stage(name="dark", rules=(Rule(column="brightness", hi=0.3),))
    levels = {}
    for i in range(12):
        names = [f"s{i}", f"t{i}"]
        gone = [f"t{i - 1}"] if i else []
        for n, name in enumerate([*names, *gone]):
            levels[name] = round(0.05 + 0.07 * ((i + 3 * n) % 12), 2)
        rows = [clip_rows(n, brightness=levels[n]) for n in (*names, *gone)]
        writer.commit(
            sources=source_rows(*names, *gone), clips=pa.concat_tables(rows), replaces=gone
        )
        writer.publish(STAGES if i % 2 else (dark,))
    found = read(root, "clips").to_table(columns=["source_id", "brightness", "state"]).to_pylist()
    assert len(found) == 2 * len(levels)
    for row in found:
        assert row["brightness"] == pytest.approx(levels[row["source_id"]])
        assert row["state"] == ("rejected" if levels[row["source_id"]] < 0.2 else "kept")


def test_a_dataset_that_several_drivers_make_at_once_is_made_once(tmp_path: Path) -> None:
    """A second making would be a version that overwrites the first, and what is in it."""
    many = 4
    with ThreadPoolExecutor(many) as pool:
        for number in range(3):
            root, ready = str(tmp_path / str(number)), Barrier(many)

            def made(_: int, root: str = root, ready: Barrier = ready) -> None:
                ready.wait()
                create(root, "classic")

            list(pool.map(made, range(many)))
            assert {read(root, name).version for name in TABLES} == {1}


def test_killed_while_it_is_made_a_dataset_is_made_by_the_next_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, put = str(tmp_path / "data"), storage.put_if_absent
    left = iter(range(6))  # dataset.json, sources and clips, and of keyframes the first file

    def dies(uri: str, data: bytes) -> bool:
        if next(left, None) is None:
            (tmp_path / "data" / "keyframes.lance" / "_versions").mkdir()
            (tmp_path / "data" / "keyframes.lance" / "_versions" / ".reelwright-0.tmp").touch()
            raise Killed
        return put(uri, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "put_if_absent", dies)
        with pytest.raises(Killed):
            create(root, "classic")
    with pytest.raises(DatasetError, match="its table 'keyframes' cannot be opened"):
        read(root, "keyframes")
    with pytest.raises(NoTable, match="has no table 'pairs'"):
        read(root, "pairs")
    create(root, "classic")
    unit(Writer(root, "r"), "a")
    assert rows_in(root)["keyframes"] == ["a-0"]


def test_another_recipe_is_refused_in_one_line(root: str) -> None:
    with pytest.raises(DatasetError, match="holds a dataset of recipe 'classic', not 'mimir'"):
        create(root, "mimir")


def test_a_folder_without_a_dataset_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no dataset"):
        read(str(tmp_path), "clips")


def test_a_newer_layout_is_refused(root: str) -> None:
    (Path(root) / "dataset.json").write_text('{"format": 99, "recipe": "classic"}')
    with pytest.raises(DatasetError, match="layout 99"):
        read(root, "clips")


def test_a_dataset_of_an_older_version_gains_the_new_columns_as_null(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path / "old")
    older = pa.schema([f for f in CLIPS if f.name != "phash"])
    with monkeypatch.context() as patch:
        patch.setitem(TABLES, "clips", older)
        create(root, "classic")
        lance.write_dataset(
            clip_rows("a").select(older.names), table_uri(root, "clips"), mode="append"
        )
    writer = Writer(root, "r")
    table = read(root, "clips").to_table(columns=["clip_id", "phash"])
    assert table["phash"].null_count == table.num_rows == 2
    unit(writer, "b")
    assert rows_in(root)["clips"] == ["a-0", "a-1", "b-0", "b-1"]
