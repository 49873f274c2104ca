"""Removes sources from a dataset for good: rows, pictures, cut files, and every older version.

Deleting rows from a Lance table hides them: the bytes stay in the fragments until these are
rewritten, and in older versions until these are cleaned up. Both are done here, on every table.

A forget that was cut short leaves a note of the source_ids (never of a name) in the dataset, and
the next one, whatever it is asked for, finishes it first.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import lance
import pyarrow as pa
import pyarrow.compute as pc
from lance import LanceOperation

from engine import storage
from engine.cutter import FOLDER, SCRATCH, place_of
from engine.folders import listing
from engine.schema import CLIPS, TABLES, VERDICT
from engine.sources import WILDCARD, Glob, parts_below, split_glob
from engine.tables import (
    ROWS_PER_FRAGMENT,
    ROWS_PER_READ,
    DatasetError,
    FencedTable,
    LeaseLost,
    Writer,
    table_uri,
    uninterrupted,
)
from engine.worker import PARTS, source_id

NOTE = "forgetting.json"
"""Below a dataset's root while a forget is under way."""
REDACTED = "(forgotten)"
"""What stands in `runs` for the name of a source that was named there by itself."""
_FULL, _READ = 131_072, 8_192
_HEAVY_READ = 16
"""Rows of a table with blobs, which may be whole clips, in memory at a time."""
_LAST = ("sources",)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The sources to forget, as the dataset has them."""

    ids: tuple[str, ...]
    uris: tuple[str, ...]
    same_content: tuple[str, ...] = ()
    """Among `uris`: those that nobody named, whose content is that of one that was."""
    resumed: bool = False
    """An earlier forget, cut short, is finished with them."""


@dataclass(kw_only=True)
class Forgotten:
    """What went."""

    chosen: Chosen
    rows: dict[str, int] = field(default_factory=dict)
    """Rows by table."""
    files: int = 0
    """Cut files."""
    pending: int = 0
    """Clips of other sources that a clip of these stood for: to be judged again."""
    bytes_removed: int = 0
    still_there: tuple[str, ...] = ()
    """uris of `chosen` where there still is a file: the next run that lists it adds it again."""


def choose(sources: pa.Table, names: Sequence[str], begun: Sequence[str] = ()) -> Chosen:
    """The sources that some names mean, with all that have the same content.

    Args:
        sources: `source_id`, `uri` and `sha256` of the dataset's sources.
        names: Paths, URIs and globs (as for `engine.sources.list_sources`), and source_ids.
        begun: source_ids of a forget that was cut short.

    Raises:
        ValueError: A name means no source of this dataset.
    """
    uris = dict(zip(sources["source_id"].to_pylist(), sources["uri"].to_pylist(), strict=True))
    named = {found for name in names for found in _meant(name, uris, set(begun))}
    contents = sources.filter(pc.is_in(sources["source_id"], pa.array(sorted(named), pa.string())))
    contents = contents["sha256"].drop_null()
    same = sources.filter(pc.is_in(sources["sha256"], contents.combine_chunks()))
    same = same.filter(pc.is_valid(same["sha256"]))["source_id"].to_pylist()
    ids = named | set(same) | set(begun)
    return Chosen(
        ids=tuple(sorted(ids)),
        uris=tuple(sorted(uris[i] for i in ids if i in uris)),
        same_content=tuple(sorted(uris[i] for i in set(same) - named)),
        resumed=bool(begun),
    )


def _meant(name: str, uris: dict[str, str], begun: set[str]) -> set[str]:
    uri = storage.absolute(name)
    key = source_id(uri)
    for one in (name, key):
        if one in uris or one in begun:
            return {one}
    found = {key for key, of in uris.items() if of in (name, uri)}
    if not found and re.search(WILDCARD, name):
        root, parts = split_glob(uri)
        glob, prefix = Glob(parts), root.rstrip("/") + "/"
        below = {key: of for key, of in uris.items() if of.startswith(prefix)}
        found = {key for key, of in below.items() if glob.matches(parts_below(root, of))}
    if found or (begun and re.search(WILDCARD, name)):
        return found
    inside = sum(of.startswith(uri.rstrip("/") + "/") for of in uris.values())
    if inside:
        raise ValueError(
            f"{name} is a folder with {inside} source(s): to forget them all,"
            f" name '{name.rstrip('/')}/**'"
        )
    raise ValueError(
        f"{name}: no source of this dataset has this name; give a uri as its table `sources` has"
        " it, a source_id, or a glob in quotes"
    )


def begun(root: str) -> tuple[str, ...]:
    """source_ids of a forget that was cut short; none where none was."""
    try:
        return tuple(json.loads(storage.read_bytes(storage.join(root, NOTE)))["source_ids"])
    except FileNotFoundError:
        return ()


def check_whole(root: str) -> None:
    """Raises DatasetError where a forget was cut short: it comes first."""
    left = begun(root)
    if left:
        raise DatasetError(
            f"{root}: forgetting {len(left)} source(s) was cut short: finish it first, with"
            f" `python pipelines/forget.py {left[0]} --dst {root}`"
        )


def tags(root: str) -> list[str]:
    """Tags and branches of the tables, which keep old versions from being removed."""
    found = []
    for name in _tables_in(root):
        table = _open(root, name)
        found += [f"{name}:{tag}" for tag in table.tags.list()]
        found += [f"{name}:{branch} (a branch)" for branch in table.branches.list()]
    return sorted(found)


def forget(
    writer: Writer, chosen: Chosen, step: Callable[[str], None] = lambda _: None
) -> Forgotten:
    """Removes sources for good. Killed anywhere, the next call with `begun` finishes it.

    Args:
        writer: The dataset's, under its lease.
        chosen: From `choose`.
        step: Called with what is done next.

    Raises:
        DatasetError: Tags keep old versions; nothing was changed.
    """
    kept = tags(writer.root)
    if kept:
        raise DatasetError(
            f"{writer.root}: tags keep old versions, and with them what should go:"
            f" {', '.join(kept)}; delete them (lance.dataset(TABLE).tags.delete(TAG)), then run"
            " this again"
        )
    root, done = writer.root, Forgotten(chosen=chosen)
    note = json.dumps({"source_ids": chosen.ids}).encode()
    storage.write_bytes(storage.join(root, NOTE), note)
    step("deleting rows")
    tables = [_Purged(writer, name, chosen.ids) for name in _tables_in(root)]
    clip_ids = _ids_of_clips(writer, chosen.ids)
    _redact_runs(writer, chosen.uris)
    done.pending = _unsettle(writer, chosen.ids, clip_ids)
    done.files = _remove_files(writer, chosen.ids)
    done.rows = _delete_rows(writer, tables, clip_ids)
    storage.delete_folder(storage.join(root, PARTS))
    done.files += _sweep(writer)
    step("rewriting tables")
    for table in tables:
        table.rewrite()
    writer.record()
    step("removing old versions")
    for table in tables:
        done.bytes_removed += table.clean()
    storage.delete(storage.join(root, NOTE))
    there = storage.exists_many(chosen.uris)
    done.still_there = tuple(u for u, is_there in zip(chosen.uris, there, strict=True) if is_there)
    return done


def _tables_in(root: str) -> list[str]:
    """All tables below a dataset's root, those of later programs too; `sources` comes last."""
    names = {n.removesuffix(".lance") for n in storage.names_in(root) if n.endswith(".lance")}
    return sorted(names, key=lambda name: (name in _LAST, name))


def _open(root: str, name: str) -> lance.LanceDataset:
    uri = table_uri(root, name)
    return lance.dataset(uri, storage_options=storage.lance_options(uri))


class _Purged:
    """One table while sources are removed from it."""

    def __init__(self, writer: Writer, name: str, source_ids: Sequence[str]):
        self.name, self._ids = name, source_ids
        if name in writer.tables:
            self.table = writer.tables[name]
        else:
            self.table = FencedTable(name=name, at=_open(writer.root, name))
            self.table.seal(kind="seal")

    def delete(self, clip_ids: Sequence[str], properties: dict[str, str]) -> int:
        """Hides the rows; where `properties` are given they are committed, rows or not."""
        names = self.table.at.schema.names
        column = next((c for c in ("source_id", "clip_id") if c in names), None)
        before, changed, emptied = self.table.at.count_rows(), [], []
        if column:
            values = self._ids if column == "source_id" else clip_ids
            changed, emptied = self.table.without(column, values)
        if changed or emptied or properties:
            operation = LanceOperation.Update(
                removed_fragment_ids=emptied, updated_fragments=changed, new_fragments=[]
            )
            self.table.commit(operation, kind="rows", **properties)
        return before - self.table.at.count_rows()

    def rewrite(self) -> None:
        """Writes every fragment that holds deleted rows anew, without them."""
        if not self._num_hidden():
            return
        try:
            self.table.at.optimize.compact_files(
                target_rows_per_fragment=ROWS_PER_FRAGMENT.get(self.name, _FULL),
                materialize_deletions=True,
                materialize_deletions_threshold=0.0,
                batch_size=ROWS_PER_READ.get(self.name, _READ if self._is_light() else _HEAVY_READ),
                num_threads=1,
            )
        except OSError as error:
            if "conflict" not in str(error):
                raise
            raise LeaseLost(f"{self.table.at.uri} was taken over by another run") from error
        assert not self._num_hidden(), f"{self.name}: a fragment still holds deleted rows"

    def _is_light(self) -> bool:
        return not any(isinstance(f.type, pa.ExtensionType) for f in self.table.at.schema)

    def _num_hidden(self) -> int:
        return sum(f.metadata.deletion_file is not None for f in self.table.at.get_fragments())

    def clean(self) -> int:
        """Removes all versions but the newest, and files of none; gives their bytes."""
        removed = self.table.at.cleanup_old_versions(
            older_than=timedelta(0), delete_unverified=True, error_if_tagged_old_versions=True
        )
        return removed.bytes_removed


def _ids_of_clips(writer: Writer, source_ids: Sequence[str]) -> list[str]:
    rows = writer.table("clips").to_table(columns=["clip_id", "source_id"])
    return rows.filter(_is_of(rows, source_ids))["clip_id"].to_pylist()


def _is_of(rows: pa.Table, source_ids: Sequence[str]) -> pa.ChunkedArray:
    return pc.is_in(rows["source_id"], pa.array(source_ids, pa.string()))


@uninterrupted()
def _delete_rows(
    writer: Writer, tables: Sequence[_Purged], clip_ids: Sequence[str]
) -> dict[str, int]:
    """Hides the rows in all tables; `sources`, which says what belongs to it, comes last."""
    rows = {}
    for table in tables:
        properties = writer.versions() if table.name in _LAST else {}
        rows[table.name] = table.delete(clip_ids, properties)
    return {name: num for name, num in rows.items() if num}


def _redact_runs(writer: Writer, uris: Sequence[str]) -> None:
    """Takes the sources' names out of what runs were asked for, where they stand by themselves."""
    rows = writer.table("runs").to_table(columns=["run_id", "src"]).to_pylist()
    changed = {row["run_id"]: _redacted(row["src"], uris) for row in rows}
    stale = [row["run_id"] for row in rows if changed[row["run_id"]] != row["src"]]
    if not stale:
        return
    table = writer.tables["runs"]
    whole = table.rows_with("run_id", stale)
    src = pa.array([changed[i] for i in whole["run_id"].to_pylist()], pa.string())
    whole = whole.set_column(whole.schema.get_field_index("src"), TABLES["runs"].field("src"), src)
    gone, emptied = table.without("run_id", stale)
    table.commit(
        LanceOperation.Update(
            removed_fragment_ids=emptied,
            updated_fragments=gone,
            new_fragments=writer.fragments_of("runs", whole.combine_chunks()),
        )
    )


def _redacted(src: str | None, uris: Sequence[str]) -> str | None:
    """`src` of a run; a relative name is taken for each source that ends in it."""
    given = json.loads(src) if src else None
    if not isinstance(given, list):
        return src

    def names_one(name: Any) -> bool:
        if not isinstance(name, str):
            return False
        tail = "/" + posixpath.normpath(name).lstrip("/")
        return any(uri in (name, storage.absolute(name)) or uri.endswith(tail) for uri in uris)

    redacted = [REDACTED if names_one(name) else name for name in given]
    return src if redacted == given else json.dumps(redacted)


def _unsettle(writer: Writer, source_ids: Sequence[str], clip_ids: Sequence[str]) -> int:
    """Makes clips pending that a clip of these sources stood for; the next run judges them."""
    rows = writer.table("clips").to_table(columns=["clip_id", "source_id", "duplicate_of"])
    copies = pc.is_in(rows["duplicate_of"], pa.array(clip_ids, pa.string()))
    rows = rows.filter(pc.and_(copies, pc.invert(_is_of(rows, source_ids))))
    if rows.num_rows:
        verdict: dict[str, Any] = {"state": "pending", "kept": False}
        columns = [pa.array([verdict.get(f.name)] * rows.num_rows, f.type) for f in VERDICT]
        schema = pa.schema([CLIPS.field("clip_id"), *VERDICT])
        change = pa.table([rows["clip_id"], *columns], schema=schema)
        writer.amend("clips", [change])
    return rows.num_rows


def _remove_files(writer: Writer, source_ids: Sequence[str]) -> int:
    """Deletes the cut files that these sources' rows name."""
    if "cuts" not in writer.tables:
        return 0
    rows = writer.table("cuts").to_table(columns=["source_id", "path"])
    paths = rows.filter(_is_of(rows, source_ids))["path"].drop_null().to_pylist()
    return sum(storage.delete(place_of(writer.root, path)) for path in paths)


def _sweep(writer: Writer) -> int:
    """Deletes what killed workers left: cut files that no row names, and half-written ones."""
    root = writer.root
    for folder in (root, storage.join(root, "lease")):
        for name in storage.names_in(folder):
            if name.startswith(SCRATCH):
                _remove(storage.join(folder, name))
    folder = storage.join(root, FOLDER)
    if "cuts" not in writer.tables or storage.kind(folder) != "folder":
        return 0
    paths = writer.table("cuts").to_table(columns=["path"])["path"].drop_null().to_pylist()
    known = {place_of(root, path) for path in paths}
    for name in storage.names_in(folder):
        if name.startswith(SCRATCH):
            _remove(storage.join(folder, name))
    orphans = [uri for uri in _files_below(folder) if uri not in known]
    return sum(storage.delete(uri) for uri in orphans)


def _remove(uri: str) -> None:
    if storage.kind(uri) == "folder":
        storage.delete_folder(uri)
    else:
        storage.delete(uri)


def _files_below(folder: str) -> Iterator[str]:
    return (entry.uri for entry in listing(folder) if entry.stat is not None)
