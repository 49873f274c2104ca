"""What a run has to do: what was asked for, held against what the dataset has."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.sources import Source
from engine.worker import Unit, beside_of, request_of, source_id

STORED = (
    "source_id uri state transient duplicate_of missing size_bytes mtime_ns etag sha256 request"
    " beside fingerprint"
).split()
"""Columns of `sources` that planning reads."""

Row = Mapping[str, Any]
Stored = Mapping[str, Row]
"""Rows of `sources` by uri."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What makes stored work stale."""

    fingerprint: str
    retry_failed: bool = False
    verify: bool = False
    unmeasured: frozenset[str] = frozenset()
    """source_ids with clips that today's thresholds admit and nothing has measured."""


@dataclass(kw_only=True)
class Plan:
    """The work of one run, each source that needs any in exactly one place."""

    units: list[Unit] = field(default_factory=list)
    """To scan, or to record as failed."""
    hashes: dict[str, str] = field(default_factory=dict)
    """Content hash by uri, of sources that are stale though their file is as it was."""
    to_hash: list[Unit] = field(default_factory=list)
    """Their content decides: the same may be stored already, or be listed twice."""
    touched: list[Source] = field(default_factory=list)
    """The same content with another time stamp, or back: the row is renewed, nothing is scanned."""
    recaptioned: list[Source] = field(default_factory=list)
    """The same, and what lies beside the file has changed."""
    missing: list[str] = field(default_factory=list)
    """uris of stored sources that are gone."""
    duplicates: list[tuple[Source, str, str]] = field(default_factory=list)
    """(source, content hash, source_id of the one that stands for it), where not stored yet."""


def first_look(sources: Sequence[Source], stored: Stored, policy: Policy) -> Plan:
    """Sorts sources by their stat alone: unchanged, to hash first, or to scan (and hash) at once.

    Only files of equal size can have equal content, so only those are hashed ahead of the scan.
    """
    plan = Plan()
    listed = {s.uri for s in sources}
    sizes = Counter(s.size_bytes for s in sources)
    sizes.update(r["size_bytes"] for uri, r in stored.items() if uri not in listed)
    for source in sources:
        row = stored.get(source.uri)
        if source.error and row and row["state"] != "failed":
            if not row["missing"]:
                plan.missing.append(source.uri)
        elif source.error:
            plan.units.append(Unit(source=source))
        elif row and not policy.verify and _same_stat(source, row):
            if not _work_stands(source, row, policy):
                if row["sha256"]:
                    plan.hashes[source.uri] = row["sha256"]
                else:
                    plan.units.append(Unit(source=source))
            elif row["beside"] != beside_of(source):
                plan.recaptioned.append(source)
            elif row["missing"]:
                plan.touched.append(source)  # it is back
        elif sizes[source.size_bytes] > 1 or (row and row["sha256"]):
            plan.to_hash.append(Unit(source=source, hash_only=True))
        else:
            plan.units.append(Unit(source=source))
    return plan


def settle(
    plan: Plan, hashed: Mapping[str, str], sources: Sequence[Source], stored: Stored, policy: Policy
) -> None:
    """Settles by content what `first_look` left open, and which of equal sources stands for them.

    That is the one whose work is stored, else the first by uri.

    Args:
        plan: Changed in place.
        hashed: Content hash by uri, of what was in `plan.to_hash` and could be read.
        sources: All that were listed.
        stored: Rows of `sources`.
        policy: As for `first_look`.
    """
    open_ = plan.hashes | dict(hashed)
    unread = {u.source.uri for u in plan.to_hash} - set(hashed)
    readable = {s.uri: s for s in sources if not s.error}
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for uri in sorted({*readable, *stored}):
        sha256 = open_.get(uri) or (stored[uri]["sha256"] if uri in stored else None)
        if sha256:
            source = readable.get(uri)
            groups[sha256, request_of(source) if source else stored[uri]["request"]].append(uri)

    for (sha256, _), uris in groups.items():
        first, heir_of = _who_stands(uris, sha256, readable, stored)
        for uri in uris:
            source, row = readable.get(uri), stored.get(uri)
            if source is None or uri in unread:
                continue
            if uri != first:
                if uri in open_ or row is None or row["duplicate_of"] != source_id(first):
                    plan.duplicates.append((source, sha256, source_id(first)))
            elif heir_of or (row and row["state"] == "duplicate"):
                plan.units.append(Unit(source=source, sha256=sha256, heir_of=heir_of))
            elif uri in open_:
                if not row or row["sha256"] != sha256 or not _work_stands(source, row, policy):
                    plan.units.append(Unit(source=source, sha256=sha256))
                elif row["beside"] != beside_of(source):
                    plan.recaptioned.append(source)
                else:
                    plan.touched.append(source)
    plan.units += [Unit(source=readable[uri]) for uri in sorted(unread)]
    placed = {u.source.uri for u in plan.units} | {s.uri for s, _, _ in plan.duplicates}
    plan.touched = [s for s in plan.touched if s.uri not in placed]
    plan.recaptioned = [s for s in plan.recaptioned if s.uri not in placed]


def _who_stands(
    uris: Sequence[str], sha256: str, readable: Mapping[str, Source], stored: Stored
) -> tuple[str, str | None]:
    """The uri that stands for equal sources, and the vanished one whose place it takes."""
    done = [
        uri
        for uri in uris
        if uri in stored and stored[uri]["state"] == "done" and stored[uri]["sha256"] == sha256
    ]
    present = [uri for uri in uris if uri in readable]
    for uri in done:
        if uri in readable or not stored[uri]["missing"]:
            return uri, None
    if done and present:
        return present[0], done[0]
    return (done or present or list(uris))[0], None


def _same_stat(source: Source, row: Row) -> bool:
    stat = (source.size_bytes, source.mtime_ns, source.etag)
    return stat == (row["size_bytes"], row["mtime_ns"], row["etag"])


def _work_stands(source: Source, row: Row, policy: Policy) -> bool:
    """Whether what is stored of this content is what a run would store today."""
    if row["state"] == "failed" and (row["transient"] or policy.retry_failed):
        return False
    return (
        row["fingerprint"] == policy.fingerprint
        and row["request"] == request_of(source)
        and row["source_id"] not in policy.unmeasured
    )
