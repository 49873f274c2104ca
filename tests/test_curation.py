"""Who is asked again, and who is given up, when workers are lost: the run without its cluster."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from engine import tables
from engine.curation import Curation, Options
from engine.segments import Segment
from engine.sources import Listing, Source, Span
from engine.tables import create, read
from engine.worker import Outcome, Unit, failed
from pipelines.recipes import CLASSIC


class Lossy(Curation):
    """A run whose cluster is a few lines: it loses all that it holds when a poison comes up.

    Attributes:
        poison: uris that kill whoever reads them.
        long: uris of sources in three parts; the part that is parked last joins them.
        waves: What was asked for at once, by uri and part.
    """

    poison: frozenset[str] = frozenset()
    long: frozenset[str] = frozenset()
    join_lost: frozenset[str] = frozenset()
    never_joins: frozenset[str] = frozenset()

    def _outcomes(self, units: Sequence[Unit]) -> Iterator[Outcome]:
        if not hasattr(self, "waves"):
            self.waves, self.parked = [], {}
        self.waves.append([(u.source.uri, u.part) for u in units])
        for unit in units:
            uri = unit.source.uri
            if uri in self.poison:
                return
            if unit.hash_only:
                yield Outcome(unit=unit, sha256="same")
            elif uri in self.long and not unit.parts:
                yield Outcome(
                    unit=unit, sha256=uri, parts=tuple(Segment(index=i) for i in range(3))
                )
            elif uri in self.long:
                yield self.part(unit, self.parked.setdefault(uri, set()))
            else:
                yield self.done(unit)

    def part(self, unit: Unit, parked: set[int]) -> Outcome:
        uri, fresh = unit.source.uri, unit.part not in parked
        assert unit.part is not None
        parked.add(unit.part)
        joins = len(parked) == 3 and (fresh or unit.part == 0) and uri not in self.never_joins
        if joins and fresh and uri in self.join_lost:
            joins = False  # parked, and gone before it could answer
        return self.done(unit) if joins else Outcome(unit=unit, sha256=uri, frames_decoded=fresh)

    def done(self, unit: Unit) -> Outcome:
        row = failed(self.job, unit, _Nothing()).source_row
        assert row is not None
        row |= {"state": "done", "error": None, "error_type": None, "sha256": unit.source.uri}
        return Outcome(unit=unit, source_row=row)


class _Nothing:
    error_type, message, transient = "", "", False


@pytest.fixture
def lossy(tmp_path: Path) -> Lossy:
    create(str(tmp_path / "set"), "classic")
    return run_over(str(tmp_path / "set"))


def run_over(root: str) -> Lossy:
    return Lossy(
        root,
        recipe="classic",
        scan=CLASSIC.scan,
        stages=CLASSIC.stages,
        options=Options(),
        connect=contextlib.nullcontext,
    )


def sources(num: int) -> Listing:
    found = [Source(uri=f"/{i:03d}", size_bytes=i, mtime_ns=i) for i in range(num)]
    return Listing(tuple(found), 0, 0)


def states(run: Lossy) -> dict[str, str]:
    rows = read(run.root, "sources").to_table(columns=["uri", "state"]).to_pylist()
    assert len({r["uri"] for r in rows}) == len(rows)
    return {r["uri"]: r["state"] for r in rows}


def test_what_kills_its_worker_is_found_and_nothing_beside_it_is_given_up(lossy: Lossy) -> None:
    lossy.poison = frozenset({"/000", "/037", "/038", "/099"})
    result = lossy.run(sources(100))
    assert {u for u, state in states(lossy).items() if state == "failed"} == lossy.poison
    assert len(states(lossy)) == 100 and result.accounts.faults == ()
    assert len(lossy.waves) < 4 * 2 * 7  # halves of a hundred, for each of the four
    rows = read(lossy.root, "sources").to_table(filter="state = 'failed'").to_pylist()
    assert all(r["error_type"] == "WorkerDied" and r["transient"] for r in rows)


def test_the_parts_of_a_long_source_are_asked_for_and_joined_once(lossy: Lossy) -> None:
    lossy.long = frozenset({"/001"})
    assert lossy.run(sources(3)).accounts.faults == ()
    assert lossy.waves[1:] == [[("/001", 0), ("/001", 1), ("/001", 2)]]
    assert states(lossy) == {f"/00{i}": "done" for i in range(3)}


def test_parts_in_different_waves_are_joined_when_the_last_is_there(
    lossy: Lossy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.curation.WAVE", 2)
    lossy.long = frozenset({"/000", "/001"})
    assert lossy.run(sources(2)).accounts.faults == ()
    asked = [unit for wave in lossy.waves[1:] for unit in wave]
    assert sorted(asked) == [(u, i) for u in ("/000", "/001") for i in range(3)]


def test_a_join_that_was_lost_is_asked_for_again(lossy: Lossy) -> None:
    lossy.long = lossy.join_lost = frozenset({"/001"})
    assert lossy.run(sources(3)).accounts.faults == ()
    assert lossy.waves[2:] == [[("/001", 0)]]
    assert set(states(lossy).values()) == {"done"}
    assert lossy.frames_decoded == 3  # by its parts, each once


def test_parts_that_never_join_are_given_up(lossy: Lossy) -> None:
    lossy.long = lossy.never_joins = frozenset({"/001"})
    assert lossy.run(sources(3)).accounts.faults == ()
    assert states(lossy) == {"/000": "done", "/001": "failed", "/002": "done"}


def test_hashes_that_were_lost_are_asked_for_again_and_then_left_to_the_scan(
    lossy: Lossy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.curation.HASH_HERE_BYTES", 0)
    lossy.poison = frozenset({"/b"})
    twins = [Source(uri=f"/{n}", size_bytes=7, mtime_ns=1) for n in "abc"]
    lossy.run(Listing(tuple(twins), 0, 0))
    assert lossy.waves[:3] == [
        [("/a", None), ("/b", None), ("/c", None)],
        [("/b", None), ("/c", None)],
        [("/b", None), ("/c", None)],
    ]
    assert states(lossy)["/b"] == "failed"


def test_ctrl_c_while_a_unit_is_committed_loses_and_doubles_nothing(
    lossy: Lossy, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, left = tables.FencedTable.commit, [3]  # moments: while the third commit is under way

    def pressed(table, operation, **properties):
        left[0] -= properties.get("kind") == "rows"
        if not left[0]:
            left[0] = -1
            os.kill(os.getpid(), signal.SIGINT)
        commit(table, operation, **properties)

    monkeypatch.setattr(tables.FencedTable, "commit", pressed)
    monkeypatch.setattr("engine.curation.COMMIT_AT", 2)
    result = lossy.run(sources(20))
    assert result.interrupted
    there = states(lossy)
    assert 2 <= len(there) < 20
    again = run_over(lossy.root)
    assert again.run(sources(20)).accounts.faults == ()
    assert len(states(again)) == 20
    assert {u for u, _ in again.waves[0]} == {f"/{i:03d}" for i in range(20)} - set(there)


def test_other_captions_reach_what_has_no_clips_and_what_was_away(lossy: Lossy) -> None:
    def listing(caption: str) -> Listing:
        spans = (Span(0.0, 1.0, caption=caption), Span(1.0, 2.0))
        return Listing((Source("/000", 1, 1, spans=spans, caption=caption),), 0, 0)

    lossy.run(listing("one"))
    run_over(lossy.root).run(sources(0))
    assert read(lossy.root, "sources").to_table()["missing"].to_pylist() == [True]
    back = run_over(lossy.root)
    assert back.run(listing("two")).accounts.faults == ()
    (row,) = read(lossy.root, "sources").to_table().to_pylist()
    assert (row["missing"], row["caption"], row["state"]) == (False, "two", "done")
    assert not hasattr(back, "waves")
