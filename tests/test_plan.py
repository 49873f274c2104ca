"""Planning as a pure function: what is listed against what is stored, in closed form."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from engine.plan import STORED, Plan, Policy, first_look, settle
from engine.sources import Source, Span
from engine.worker import beside_of, request_of, source_id

NOW = "today"
POLICY = Policy(fingerprint=NOW)


def listed(name: str, content: str = "", **more: Any) -> Source:
    """A source as a listing gives it; files of one content have one size."""
    content = content or name
    size = 1000 + sum(ord(c) << 8 * i for i, c in enumerate(content))
    return Source(**({"uri": f"/{name}", "size_bytes": size, "mtime_ns": 1} | more))


def stored(source: Source, content: str = "", **more: Any) -> dict[str, Any]:
    """The row that a finished run left of it."""
    row = {
        "source_id": source_id(source.uri),
        "uri": source.uri,
        "state": "done",
        "transient": False,
        "duplicate_of": None,
        "missing": False,
        "size_bytes": source.size_bytes,
        "mtime_ns": source.mtime_ns,
        "etag": source.etag,
        "sha256": f"hash of {content or source.uri[1:]}",
        "request": request_of(source),
        "beside": beside_of(source),
        "fingerprint": NOW,
    }
    assert list(row) and set(row) == set(STORED)
    return row | more


def copy_of(source: Source, original: Source, **more: Any) -> dict[str, Any]:
    """The row of a duplicate."""
    content = original.uri[1:]
    of = source_id(original.uri)
    return stored(source, content, state="duplicate", duplicate_of=of, **more)


Found = dict[str, Any]


def planned(
    sources: Sequence[Source],
    rows: Sequence[Mapping[str, Any]] = (),
    contents: Mapping[str, str] | None = None,
    *,
    policy: Policy = POLICY,
    unreadable: Sequence[str] = (),
) -> Found:
    """What a run would do with each source by name, as words, and the plan itself.

    Args:
        sources: As listed.
        rows: As stored.
        contents: What is in a file, where that is not its name.
        policy: What makes work stale.
        unreadable: Names that cannot be hashed.
    """
    by_uri = {row["uri"]: row for row in rows}
    plan = first_look(sources, by_uri, policy)
    hashed = {
        u.source.uri: f"hash of {(contents or {}).get(u.source.uri[1:], u.source.uri[1:])}"
        for u in plan.to_hash
        if u.source.uri[1:] not in unreadable
    }
    settle(plan, hashed, sources, by_uri, policy)
    return said(plan)


def said(plan: Plan) -> Found:
    """A plan in words, each source in one place only."""
    named = {source_id(f"/{name}"): name for name in "abcdefgh"}
    words = [
        *(
            (u.source.uri, f"scan, heir of {u.heir_of}" if u.heir_of else "scan")
            for u in plan.units
        ),
        *((s.uri, "renew") for s in plan.touched),
        *((s.uri, "recaption") for s in plan.recaptioned),
        *((uri, "missing") for uri in plan.missing),
        *((s.uri, f"copy of {named[of]}") for s, _, of in plan.duplicates),
    ]
    assert len(dict(words)) == len(words), f"twice in a plan: {sorted(words)}"
    return {uri[1:]: word for uri, word in sorted(words)}


A, B, C = listed("a"), listed("b"), listed("c")


def test_a_new_file_is_scanned_without_being_hashed_first() -> None:
    plan = first_look([A, B], {}, POLICY)
    assert [u.source for u in plan.units] == [A, B]
    assert not plan.to_hash


def test_a_file_whose_stat_is_stored_is_left_alone_and_nothing_is_read() -> None:
    rows = {s.uri: stored(s) for s in (A, B)}
    plan = first_look([A, B], rows, POLICY)
    assert plan == Plan()


def test_only_equal_sizes_are_hashed_ahead() -> None:
    twin = listed("b", "a")
    assert [u.source for u in first_look([A, twin, C], {}, POLICY).to_hash] == [A, twin]
    unlisted = {"/h": stored(listed("h", "c"), "c")}
    assert [u.source for u in first_look([A, C], unlisted, POLICY).to_hash] == [C]


def test_another_time_stamp_costs_a_hash_and_renews_the_row() -> None:
    touched = dataclasses.replace(A, mtime_ns=2)
    assert planned([touched], [stored(A)]) == {"a": "renew"}
    assert planned([dataclasses.replace(A, etag="new")], [stored(A)]) == {"a": "renew"}


def test_another_time_stamp_and_other_captions_are_one_change() -> None:
    touched = dataclasses.replace(A, mtime_ns=2, caption="a cat")
    assert planned([touched], [stored(A)]) == {"a": "recaption"}


def test_other_content_is_scanned_again() -> None:
    changed = dataclasses.replace(A, mtime_ns=2)
    assert planned([changed], [stored(A)], {"a": "something else"}) == {"a": "scan"}


def test_another_fingerprint_scans_again_with_the_hash_that_is_known() -> None:
    plan = first_look([A], {A.uri: stored(A, fingerprint="yesterday")}, POLICY)
    assert plan.hashes == {"/a": "hash of a"} and not plan.to_hash
    assert planned([A], [stored(A, fingerprint="yesterday")]) == {"a": "scan"}


def test_other_spans_scan_again_and_are_no_duplicate_of_the_whole() -> None:
    spans = (Span(0.0, 1.0),)
    assert planned([dataclasses.replace(A, spans=spans)], [stored(A)]) == {"a": "scan"}
    cut = listed("b", "a", spans=spans)
    assert planned([A, cut], [stored(A)], {"b": "a"}) == {"b": "scan"}


def test_a_clip_that_was_never_measured_scans_its_source_again() -> None:
    policy = Policy(fingerprint=NOW, unmeasured=frozenset([source_id("/a")]))
    assert planned([A, B], [stored(A), stored(B)], policy=policy) == {"a": "scan"}


@pytest.mark.parametrize("transient", [True, False])
@pytest.mark.parametrize("retry", [True, False])
@pytest.mark.parametrize("known", ["hash of a", None])
def test_failures_that_may_pass_are_tried_again_and_others_on_request(
    transient: bool, retry: bool, known: str | None
) -> None:
    row = stored(A, state="failed", transient=transient, sha256=known)
    policy = Policy(fingerprint=NOW, retry_failed=retry)
    found = planned([A], [row], policy=policy)
    assert found == ({"a": "scan"} if transient or retry else {})


def test_a_final_failure_stays_one_while_its_content_does() -> None:
    row = stored(A, state="failed")
    touched = dataclasses.replace(A, mtime_ns=2)
    assert planned([touched], [row]) == {"a": "renew"}
    assert planned([touched], [row], {"a": "mended"}) == {"a": "scan"}
    assert planned([A], [stored(A, state="failed", fingerprint="yesterday")]) == {"a": "scan"}


def test_verify_hashes_everything_and_finds_what_its_stat_hides() -> None:
    policy = Policy(fingerprint=NOW, verify=True)
    rows = [stored(A), stored(B), stored(C, state="failed")]
    assert planned([A, B, C], rows, {"b": "rot"}, policy=policy) == {
        "a": "renew",
        "b": "scan",
        "c": "renew",
    }


def test_other_captions_scan_nothing() -> None:
    for more in ({"caption": "a cat"}, {"extra": '{"licence": "CC0"}'}):
        plan = first_look([dataclasses.replace(A, **more)], {A.uri: stored(A)}, POLICY)
        assert said(plan) == {"a": "recaption"}
        assert not plan.to_hash


def test_a_stored_file_that_cannot_be_found_is_marked_once() -> None:
    gone = Source(uri="/a", error="no such file")
    assert planned([gone], [stored(A)]) == {"a": "missing"}
    assert planned([gone], [stored(A, missing=True)]) == {}


def test_a_file_that_was_never_there_is_recorded_and_looked_for_again() -> None:
    gone = Source(uri="/a", error="no such file")
    assert planned([gone]) == {"a": "scan"}
    row = stored(gone, state="failed", transient=True, sha256=None)
    assert planned([gone], [row]) == {"a": "scan"}
    assert planned([A], [row]) == {"a": "scan"}


def test_a_file_that_is_back_is_renewed() -> None:
    assert planned([A], [stored(A, missing=True)]) == {"a": "renew"}
    recaptioned = dataclasses.replace(A, caption="a cat")
    assert planned([recaptioned], [stored(A, missing=True)]) == {"a": "recaption"}
    assert planned([A], [stored(A, missing=True, fingerprint="yesterday")]) == {"a": "scan"}


def test_a_moved_file_takes_the_place_of_the_one_that_is_gone() -> None:
    moved = listed("b", "a")
    assert planned([moved], [stored(A, missing=True)], {"b": "a"}) == {"b": "scan, heir of /a"}
    both = [moved, listed("c", "a")]
    assert planned(both, [stored(A, missing=True)], {"b": "a", "c": "a"}) == {
        "b": "scan, heir of /a",
        "c": "copy of b",
    }


def test_a_stored_file_that_is_elsewhere_but_there_still_stands_for_its_copies() -> None:
    assert planned([listed("b", "a")], [stored(A)], {"b": "a"}) == {"b": "copy of a"}


def test_of_equal_new_files_the_first_by_name_is_scanned() -> None:
    twins = [listed(name, "a") for name in "cab"]
    contents = dict.fromkeys("abc", "a")
    assert planned(twins, (), contents) == {"a": "scan", "b": "copy of a", "c": "copy of a"}


def test_equal_sizes_alone_make_no_copy() -> None:
    twins = [listed(name, "a") for name in "ab"]
    assert planned(twins, (), {"a": "a", "b": "b"}) == {"a": "scan", "b": "scan"}


def test_a_copy_of_a_stored_file_needs_no_scan_whatever_its_name() -> None:
    before = listed("a", "b")
    assert planned([before, B], [stored(B)], {"a": "b"}) == {"a": "copy of b"}


def test_copies_follow_when_their_original_is_scanned_anew() -> None:
    twin = listed("b", "a")
    rows = [stored(A, fingerprint="yesterday"), copy_of(twin, A, fingerprint="yesterday")]
    assert planned([A, twin], rows) == {"a": "scan", "b": "copy of a"}


def test_a_copy_whose_original_vanished_takes_its_place() -> None:
    twin = listed("b", "a")
    rows = [stored(A, missing=True), copy_of(twin, A)]
    assert planned([twin], rows) == {"b": "scan, heir of /a"}


def test_a_copy_whose_original_changed_is_scanned_itself() -> None:
    twin, changed = listed("b", "a"), listed("a", "new", mtime_ns=2)
    found = planned([changed, twin], [stored(A), copy_of(twin, A)], {"a": "new"})
    assert found == {"a": "scan", "b": "scan"}


def test_the_other_copies_follow_the_one_that_is_scanned_instead() -> None:
    twins, changed = [listed(name, "a") for name in "bc"], listed("a", "new", mtime_ns=2)
    rows = [stored(A), *(copy_of(t, A) for t in twins)]
    assert planned([changed, *twins], rows, {"a": "new"}) == {
        "a": "scan",
        "b": "scan",
        "c": "copy of b",
    }


def test_an_original_that_is_back_after_its_heir_took_over_is_a_copy() -> None:
    heir = listed("b", "a")
    rows = [copy_of(A, heir, sha256="hash of a", missing=True), stored(heir, "a")]
    assert planned([A, heir], rows) == {"a": "renew"}


def test_a_resumed_run_whose_copies_alone_were_committed_scans_the_original() -> None:
    twins = [listed(name, "a") for name in "ab"]
    assert planned(twins, [copy_of(twins[1], A)], {"a": "a"}) == {"a": "scan"}


def test_two_that_were_both_scanned_become_one_and_its_copy() -> None:
    twin = listed("b", "a")
    assert planned([A, twin], [stored(A), stored(twin, "a")]) == {"b": "copy of a"}


def test_what_cannot_be_hashed_is_left_to_the_scan_and_keeps_what_hangs_on_it() -> None:
    touched, twin = dataclasses.replace(A, mtime_ns=2), listed("b", "a")
    rows = [stored(A), copy_of(twin, A)]
    assert planned([touched, twin], rows, unreadable="a") == {"a": "scan"}
    orphan = dataclasses.replace(twin, mtime_ns=2)
    changed = listed("a", "new", mtime_ns=2)
    found = planned([changed, orphan], rows, {"a": "new"}, unreadable="b")
    assert found == {"a": "scan", "b": "scan"}


def test_what_is_scanned_unhashed_is_not_given_the_hash_of_what_it_was() -> None:
    orphan = listed("b", "a", mtime_ns=2)
    rows = {r["uri"]: r for r in (stored(A), copy_of(listed("b", "a"), A))}
    changed = listed("a", "new", mtime_ns=2)
    plan = first_look([changed, orphan], rows, POLICY)
    settle(plan, {"/a": "hash of new"}, [changed, orphan], rows, POLICY)
    assert {u.source.uri: u.sha256 for u in plan.units} == {"/a": "hash of new", "/b": None}


def everything(chance: random.Random) -> tuple[list[Source], list[dict[str, Any]], dict[str, str]]:
    """A dataset and a listing in which anything may have happened to eight files."""
    sources, rows, contents = [], [], {}
    for name in "abcdefgh":
        was, now = chance.choice("xyz"), chance.choice("xyz")
        before = listed(name, was)
        if chance.random() < 0.6:
            of = chance.choice("abcdefgh")
            row = stored(before, was, missing=chance.random() < 0.2)
            row |= chance.choice(
                [
                    {},
                    {"fingerprint": "yesterday"},
                    {"state": "failed", "transient": chance.random() < 0.5},
                    {"state": "failed", "sha256": None},
                    {"state": "duplicate", "duplicate_of": source_id(f"/{of}")},
                ]
            )
            rows.append(row)
        if chance.random() < 0.8:
            fate = chance.choice(["as it was", "touched", "changed", "recaptioned", "gone"])
            contents[name] = now if fate == "changed" else was
            sources.append(
                {
                    "as it was": before,
                    "touched": dataclasses.replace(before, mtime_ns=2),
                    "changed": listed(name, now, mtime_ns=3),
                    "recaptioned": dataclasses.replace(before, caption="new"),
                    "gone": Source(uri=f"/{name}", error="no such file"),
                }[fate]
            )
    return sources, rows, contents


@pytest.mark.parametrize("seed", range(200))
def test_whatever_happened_the_plan_is_the_same_in_any_order_and_names_a_source_once(
    seed: int,
) -> None:
    chance = random.Random(seed)
    sources, rows, contents = everything(chance)
    unreadable = [s.uri[1:] for s in sources if chance.random() < 0.1]
    found = [
        planned(a, b, contents, unreadable=unreadable)
        for a, b in itertools.product(
            (sources, sources[::-1], chance.sample(sources, len(sources))), (rows, rows[::-1])
        )
    ]
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize("seed", range(200))
def test_after_the_plan_each_content_is_scanned_once_and_nothing_is_left_to_do(seed: int) -> None:
    chance = random.Random(seed)
    sources, rows, contents = everything(chance)
    table = {row["uri"]: row for row in rows}
    carry_out(sources, table, contents)
    assert planned(sources, list(table.values()), contents) == {
        s.uri[1:]: "scan" for s in sources if s.error and table[s.uri]["state"] == "failed"
    }
    present = [s.uri for s in sources if not s.error]
    for content in "xyz":
        done = [
            u
            for u, row in table.items()
            if row["sha256"] == f"hash of {content}"
            and row["state"] == "done"
            and (u in present or not row["missing"])
        ]
        holders = [u for u in present if contents[u[1:]] == content]
        for uri in holders:
            row = table[uri]
            assert row["state"] in ("done", "failed", "duplicate")
            if row["state"] == "duplicate" and done:
                assert row["duplicate_of"] in {source_id(u) for u in done}
        assert len([u for u in holders if table[u]["state"] == "done"]) <= 1


def carry_out(
    sources: Sequence[Source], table: dict[str, dict[str, Any]], contents: Mapping[str, str]
) -> None:
    """Does what a plan says, as a run does it, with scans that always succeed."""
    plan = first_look(sources, table, POLICY)
    for uri in plan.missing:
        table[uri] = table[uri] | {"missing": True}
    hashed = {u.source.uri: f"hash of {contents[u.source.uri[1:]]}" for u in plan.to_hash}
    settle(plan, hashed, sources, table, POLICY)
    for source, sha256, of in plan.duplicates:
        table[source.uri] = stored(source, state="duplicate", duplicate_of=of, sha256=sha256)
    for source in (*plan.touched, *plan.recaptioned):
        kept = {n: table[source.uri][n] for n in ("state", "transient", "duplicate_of", "sha256")}
        table[source.uri] = stored(source) | kept
    for unit in plan.units:
        source = unit.source
        if source.error:
            table[source.uri] = stored(source, state="failed", transient=True, sha256=None)
            continue
        sha256 = f"hash of {contents[source.uri[1:]]}"
        assert unit.sha256 in (None, sha256)
        table[source.uri] = stored(source, sha256=sha256)
        if unit.heir_of:
            of = source_id(source.uri)
            table[unit.heir_of] = table[unit.heir_of] | {"state": "duplicate", "duplicate_of": of}
