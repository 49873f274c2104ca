"""A dataset on disk: its tables, read by anyone, and changed by one driver through fenced commits.

How a driver that lost its lease is kept from adding rows (two Lance appends from one version both
land, so a lease alone cannot): whoever takes a dataset over first commits a *seal* on every table,
a `Merge` that changes nothing. Lance lets no append, update, merge or compaction land that was
begun before a `Merge`, so nothing of an earlier driver can, however late it wakes. Every later
commit starts from the version that this driver made itself, and its manifest is written put-if-
absent.

A unit of work touches several tables. `sources` is committed last, and its transaction says which
versions of the others belong to it: rows that a dead driver committed beyond those are taken back
when the dataset is opened for writing again. It is sealed last, too: who finds it naming versions
later than his own seals was overtaken while he opened the dataset, and must not take back anything.
"""

from __future__ import annotations

import json
import signal
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pyarrow.compute as pc
from lance import LanceOperation
from lance.commit import CommitConflictError
from lance.fragment import FragmentMetadata, write_fragments

from engine import storage
from engine.operator import Operator, Stage
from engine.rewrite import forgotten, overlaid, overrule_copies, overrule_unkept, rejudged
from engine.schema import FORMAT, TABLES

STORAGE_VERSION = "2.2"  # the first with blob columns
COMPACT_AT = 64
"""Small fragments a table may have before they are compacted."""
KEPT_VERSIONS = 64
"""Versions of a table that stay readable behind the newest (a tag keeps one for good)."""
KEYS = {"clips": "clip_id", "pairs": "pair_id"}
"""The column that names a row, of tables whose rows are measured and judged."""
ROWS_PER_FRAGMENT = {
    "keyframes": 8_192, "cuts": 1_024, "features": 8_192, "generations": 1_024, "scores": 16_384
}  # fmt: skip
"""Rows of a full fragment where rows are large; `_FULL` elsewhere."""
_FULL = 131_072
ROWS_PER_READ = {"keyframes": 256, "cuts": 8, "features": 8, "generations": 8}
"""Rows that a compaction holds at a time where rows are large; `_READ` elsewhere."""
_READ = 8_192
_DATA_TABLES = ("keyframes", "clips", "sources")  # in the order in which a unit commits them
_RECORDED = ("clips", "keyframes")  # whose versions each commit of `sources` records
_ASKED_AT_ONCE = 50_000  # values in one predicate


class DatasetError(ValueError):
    """A dataset that is missing, of another recipe or layout, or in use: one line for its user."""


class NoTable(DatasetError):
    """A dataset that an earlier version made, which did not have this table yet."""


class NoDataset(DatasetError):
    """There is none where one is looked for."""


class InUse(DatasetError):
    """A living driver has it."""


class LeaseLost(RuntimeError):
    """Another driver has taken the dataset over: nothing was written."""


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back to the end of a `with`: between two commits it would tear a unit apart."""
    if threading.current_thread() is not threading.main_thread():
        yield  # where it never arrives
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        signal.raise_signal(signal.SIGINT)


def table_uri(root: str, name: str) -> str:
    """Where a table lies below a dataset's root."""
    return storage.join(root, f"{name}.lance")


def read(root: str, name: str, version: int | None = None) -> lance.LanceDataset:
    """A table of a dataset, to read.

    Raises:
        NoTable: The dataset does not have it.
        DatasetError: There is no dataset there, or a newer layout made it, or it is damaged.
    """
    identity(root)
    uri = table_uri(root, name)
    try:
        table = lance.dataset(uri, version=version, storage_options=storage.lance_options(uri))
        if not table.schema.names:  # zeros, as a crash of a machine leaves them, read as no columns
            raise ValueError("its manifest is damaged")
        return table
    except (ValueError, OSError) as error:
        if f"{name}.lance" not in storage.names_in(root):
            raise NoTable(
                f"{root} has no table {name!r}: an earlier version made it, and the next run of"
                " pipelines/curate.py or `python -m evals run` on it adds what is missing"
            ) from error
        said = str(error).splitlines()[0].split(", /")[0]
        raise DatasetError(f"{root}: its table {name!r} cannot be opened: {said}") from error


def identity(root: str) -> dict[str, Any]:
    """What a dataset says of itself: `format` and `recipe`.

    Raises:
        DatasetError: There is no dataset there, or a newer layout made it.
    """
    try:
        found = json.loads(storage.read_bytes(storage.join(root, "dataset.json")))
    except (FileNotFoundError, NotADirectoryError):
        raise NoDataset(
            f"{root} holds no dataset: give the folder that `pipelines/curate.py --dst` named"
        ) from None
    except (ValueError, OSError) as error:
        raise DatasetError(f"{root}: its dataset.json cannot be read: {error}") from error
    if not isinstance(found, dict) or not {"format", "recipe"} <= found.keys():
        raise DatasetError(f"{root}: its dataset.json is not one that this program wrote")
    if found["format"] > FORMAT:
        raise DatasetError(
            f"{root} has layout {found['format']}, and this program reads up to {FORMAT}: update it"
        )
    return found


def create(root: str, recipe: str) -> None:
    """Makes an empty dataset, or does nothing where this recipe's dataset is there already.

    Raises:
        DatasetError: Another recipe's dataset is there, or it cannot be written to.
    """
    try:
        storage.make_folder(root)
        text = json.dumps({"format": FORMAT, "recipe": recipe})
        storage.put_if_absent(storage.join(root, "dataset.json"), text.encode())
    except OSError as error:
        raise DatasetError(
            f"cannot write to {root} ({error.strerror or error}): choose a --dst you may write to"
        ) from error
    found = identity(root)["recipe"]
    if found != recipe:
        raise DatasetError(
            f"{root} holds a dataset of recipe {found!r}, not {recipe!r}: "
            f"choose another --dst, or run recipe {found!r}"
        )
    for name, schema in TABLES.items():
        make_empty(table_uri(root, name), schema)


def make_empty(uri: str, schema: pa.Schema) -> None:
    """Makes an empty table, or does nothing where there is one or another process is faster.

    Of two that race to create one, Lance makes a first version and a second that overwrites it,
    with the rows that are in it. So the table is made elsewhere, and its one version put where
    none is: an empty table is nothing but its manifest and the transaction that this names.
    """
    if has_version(uri):
        return
    with tempfile.TemporaryDirectory(prefix="reelwright-") as folder:
        made = Path(folder, "made.lance")
        lance.write_dataset(
            schema.empty_table(), made, schema=schema, data_storage_version=STORAGE_VERSION
        )
        for part, files in ("_transactions", "*.txn"), ("_versions", "*.manifest"):
            for file in (made / part).glob(files):
                storage.put_if_absent(storage.join(uri, part, file.name), file.read_bytes())


def has_version(uri: str) -> bool:
    """Whether there is a table: what a process has not made to the end is none."""
    names = storage.names_in(storage.join(uri, "_versions"))
    return any(name.endswith(".manifest") for name in names)


@dataclass(kw_only=True)
class FencedTable:
    """One table as its driver sees it: `at` is always the version that the driver itself made."""

    name: str
    at: lance.LanceDataset

    def commit(self, operation: Any, **properties: str) -> None:
        """Commits on top of the version that this driver made last, or raises `LeaseLost`."""
        uri = self.at.uri
        try:
            self.at = lance.LanceDataset.commit(
                uri,
                lance.Transaction(
                    read_version=self.at.version,
                    operation=operation,
                    transaction_properties=properties,
                ),
                storage_options=storage.lance_options(uri),
                max_retries=0,
            )
        except CommitConflictError as error:
            raise LeaseLost(f"{uri} was taken over by another run; this one stops") from error

    def seal(self, **properties: str) -> None:
        """Commits a change of nothing that no commit begun earlier can get past."""
        fragments = [f.metadata for f in self.at.get_fragments()]
        self.commit(LanceOperation.Merge(fragments, self.at.lance_schema), **properties)

    def properties(self, version: int | None = None) -> dict[str, str]:
        """Those of the commit that made a version, by default the latest."""
        transaction = self.at.read_transaction(version or self.at.version)
        return (transaction.transaction_properties or {}) if transaction else {}

    def rows_with(self, column: str, values: Sequence[str]) -> pa.Table:
        """Whole rows with these values."""
        parts = [
            self.at.to_table(filter=_among(column, values[start : start + _ASKED_AT_ONCE]))
            for start in range(0, len(values), _ASKED_AT_ONCE)
        ]
        return pa.concat_tables(parts).select(TABLES[self.name].names)

    def without(self, column: str, values: Sequence[str]) -> tuple[list[FragmentMetadata], list]:
        """Fragments changed, and ids of fragments emptied, when rows with these values go."""
        held: dict[int, set[str]] = defaultdict(set)
        for start in range(0, len(values), _ASKED_AT_ONCE):
            asked = values[start : start + _ASKED_AT_ONCE]
            scanner = self.at.scanner([column], filter=_among(column, asked), with_row_id=True)
            for row in scanner.to_table().to_pylist():
                held[row["_rowid"] >> 32].add(row[column])
        changed, emptied = [], []
        for number in sorted(held):
            left = self.at.get_fragment(number).delete(_among(column, sorted(held[number])))
            if left is None:
                emptied.append(number)
            else:
                changed.append(left)
        return changed, emptied


class Writer:
    """The one driver of a dataset. Every method commits atomically or raises `LeaseLost`.

    Args:
        root: A dataset that `create` made.
        run_id: Recorded with each commit.
        recovered: Called with one line when a dead run's unfinished commit was taken back.
    """

    def __init__(self, root: str, run_id: str, recovered: Callable[[str], None] = lambda _: None):
        self.root, self.run_id = root, run_id
        for name, schema in TABLES.items():  # one made by an earlier version may lack a table
            make_empty(table_uri(root, name), schema)
        self.tables = {name: FencedTable(name=name, at=read(root, name)) for name in TABLES}
        for name in sorted(TABLES, key=lambda name: name == "sources"):
            self._seal(name)
        belonging, self._keys = self._recorded()
        if any(self.tables[name].at.version < version for name, version in belonging.items()):
            raise LeaseLost(f"{root} was taken over by another run; this one stops")
        for name, version in belonging.items():
            if self._take_back(self.tables[name], version):
                recovered(f"took back rows of {name} that a dead run had not finished committing")
        for name, table in self.tables.items():
            lacking = [f for f in TABLES[name] if f.name not in table.at.schema.names]
            if lacking:  # made by an earlier version of this program: the new columns are null
                table.at.add_columns(pa.schema(lacking))
        self.record()

    def _seal(self, name: str) -> None:
        # a live driver may commit between our read and our seal: then read again, it is losing
        for attempt in range(5):
            try:
                self.tables[name].seal(kind="seal")
                return
            except LeaseLost:
                if attempt == 4:
                    raise
                self.tables[name].at = read(self.root, name)

    def _recorded(self) -> tuple[dict[str, int], dict[str, dict[str, str]]]:
        """What `sources` says belongs to it: versions of tables, and keys of operators."""
        table = self.tables["sources"]
        for version in range(table.at.version, 0, -1):  # compactions say nothing
            found = table.properties(version)
            if found.keys() >= set(_RECORDED):
                versions = {name: int(found[name]) for name in _RECORDED}
                return versions, json.loads(found.get("operators", "{}"))
        return dict.fromkeys(_RECORDED, 1), {}

    @staticmethod
    def _take_back(table: FencedTable, recorded: int) -> bool:
        """Undoes commits of rows after version `recorded`; tells whether there were any."""
        later = range(recorded + 1, table.at.version + 1)
        if not any(table.properties(v).get("kind") == "rows" for v in later):
            return False
        old = {
            f.fragment_id: f.metadata
            for f in lance.dataset(
                table.at.uri,
                version=recorded,
                storage_options=storage.lance_options(table.at.uri),
            ).get_fragments()
        }
        new = {f.fragment_id: f.metadata for f in table.at.get_fragments()}
        table.commit(
            LanceOperation.Update(
                removed_fragment_ids=[i for i in new if i not in old],
                updated_fragments=[m for i, m in old.items() if i in new and m != new[i]],
                new_fragments=[m for i, m in old.items() if i not in new],
            ),
            kind="recovery",
        )
        return True

    def record(self) -> None:
        """Says in `sources` that the other tables, as they are now, belong to it."""
        self.tables["sources"].seal(**self.versions())

    def versions(self) -> dict[str, str]:
        """Properties of a commit of `sources`: what belongs to it."""
        versions = {n: str(self.tables[n].at.version) for n in _RECORDED}
        return versions | {"run": self.run_id, "operators": json.dumps(self._keys)}

    def keys(self, name: str, where: str) -> dict[str, str]:
        """What `adopt` recorded last for these rows."""
        return self._keys.get(f"{name} where {where}", {})

    def table(self, name: str) -> lance.LanceDataset:
        """A table as of this driver's last commit."""
        return self.tables[name].at

    @uninterrupted()
    def commit(
        self,
        *,
        sources: pa.Table,
        clips: pa.Table | None = None,
        keyframes: Iterable[FragmentMetadata] = (),
        replaces: Sequence[str] = (),
        in_tables: Sequence[str] = _DATA_TABLES,
    ) -> None:
        """Adds a unit of work, in place of what is there of the same sources.

        Args:
            sources: Rows with the schema `SOURCES`.
            clips: Rows with the schema `CLIPS`, of those sources.
            keyframes: Fragments that workers wrote with `write_rows`.
            replaces: source_ids whose rows go.
            in_tables: Tables in which they go.
        """
        new = {
            "keyframes": list(keyframes),
            "clips": self.fragments_of("clips", clips),
            "sources": self.fragments_of("sources", sources),
        }
        for name in _DATA_TABLES:
            table = self.tables[name]
            going = replaces if name in in_tables else ()
            changed, emptied = table.without("source_id", going)
            properties = {"kind": "rows"} | (self.versions() if name == "sources" else {})
            if changed or emptied:
                operation = LanceOperation.Update(
                    removed_fragment_ids=emptied,
                    updated_fragments=changed,
                    new_fragments=new[name],
                )
            elif new[name] or name == "sources":
                operation = LanceOperation.Append(new[name])
            else:
                continue
            table.commit(operation, **properties)
        self._compact()

    def fragments_of(self, name: str, rows: pa.Table | None) -> list[FragmentMetadata]:
        """Rows of a table, written and still to be committed."""
        return write_rows(self.root, name, rows) if rows is not None and rows.num_rows else []

    @uninterrupted()
    def append(self, name: str, rows: pa.Table | Sequence[FragmentMetadata]) -> None:
        """Adds rows, or fragments that workers wrote, to a table that sources do not commit to."""
        new = self.fragments_of(name, rows) if isinstance(rows, pa.Table) else list(rows)
        if new:
            self.tables[name].commit(LanceOperation.Append(new))
            self._compact()

    @uninterrupted()
    def remove(self, name: str, column: str, values: Sequence[str]) -> None:
        """Deletes rows of such a table."""
        changed, emptied = self.tables[name].without(column, values)
        if changed or emptied:
            self.tables[name].commit(
                LanceOperation.Delete(changed, emptied, predicate=f"{column} given")
            )

    @uninterrupted()
    def amend(self, name: str, changes: Sequence[pa.Table]) -> None:
        """Puts new values into rows, all in one commit.

        Rows that are not there (any more) are left out.

        Args:
            name: Table, one of `KEYS`.
            changes: Each with the key column and the columns to change, no key twice.
        """
        key, table = KEYS[name], self.tables[name]
        ids = pc.unique(pa.concat_arrays([c for t in changes for c in t[key].chunks]))
        rows = table.rows_with(key, ids.to_pylist())
        if not rows.num_rows:
            return
        for change in changes:
            rows = overlaid(rows, change, key)
        changed, emptied = table.without(key, rows[key].to_pylist())
        table.commit(
            LanceOperation.Update(
                removed_fragment_ids=emptied,
                updated_fragments=changed,
                new_fragments=self.fragments_of(name, rows),
            ),
            kind="rows",
        )
        self.record()
        self._compact()

    @uninterrupted()
    def adopt(
        self,
        name: str,
        operators: Sequence[Operator],
        keys: dict[str, str],
        *,
        where: str | None = None,
        retry_failed: bool = False,
    ) -> list[str]:
        """Forgets values that other operators measured, and failures that are to be tried again.

        Args:
            name: Table.
            operators: Those of today's stages.
            keys: For each one's marker column, what its values depend on (`engine.chain.keys`).
            where: SQL predicate of the rows concerned, which have keys of their own.
            retry_failed: Final failures too.

        Returns:
            Names of operators whose stored values went.
        """
        scope = f"{name} where {where}" if where else name
        table, known = self.tables[name], self._keys.get(scope, {})
        stale = [o for o in operators if known.get(o.marker) != keys[o.marker]]
        updates, lost = [], set()
        for fragment in table.at.get_fragments():
            updated, markers = forgotten(fragment, stale, where, retry_failed)
            if updated is not None:
                updates.append(updated)
                lost |= markers
        if updates:
            table.commit(
                LanceOperation.Update(
                    updated_fragments=[metadata for metadata, _ in updates],
                    fields_modified=updates[0][1],
                    update_mode="rewrite_columns",
                ),
                kind="rows",
            )
        if updates or stale:
            self._keys[scope] = known | keys
            self.record()
        return [type(o).__name__ for o in stale if o.marker in lost]

    @uninterrupted()
    def publish(self, stages: Sequence[Stage], name: str = "clips") -> int:
        """Judges every row by its stored columns and publishes the verdicts in one commit.

        Near-duplicates are settled here, over the whole dataset. A pair whose clip is not kept is
        rejected with it.

        Returns:
            How many rows changed their verdict.
        """
        table = self.tables[name]
        fragments = table.at.get_fragments()
        if name == "pairs":
            kept = self.table("clips").to_table(columns=["clip_id"], filter="kept")["clip_id"]
            overrule = overrule_unkept(kept)
        else:
            overrule = overrule_copies(fragments, stages)
        with ThreadPoolExecutor() as threads:  # Lance and Arrow work outside of Python's lock
            judged = threads.map(lambda f: rejudged(f, stages, overrule), fragments)
            changes = [found for found in judged if found is not None]
        updates = [updated for updated, _, _ in changes]
        num_changed = sum(num for _, _, num in changes)
        if updates:
            table.commit(
                LanceOperation.Update(
                    updated_fragments=updates,
                    fields_modified=changes[0][1],
                    update_mode="rewrite_columns",
                ),
                kind="verdicts",
            )
            self.record()
        return num_changed

    @uninterrupted()
    def add_run(self, row: dict[str, Any]) -> None:
        """Appends a row to `runs`."""
        rows = pa.Table.from_pylist([row], schema=TABLES["runs"])
        self.tables["runs"].commit(LanceOperation.Append(self.fragments_of("runs", rows)))
        self._compact()

    def _compact(self) -> None:
        """Merges small fragments and forgets old versions, where there are many."""
        compacted = False
        for name, table in self.tables.items():
            full = ROWS_PER_FRAGMENT.get(name, _FULL)
            small = sum(f.metadata.num_rows < full for f in table.at.get_fragments())
            if small < COMPACT_AT:
                continue
            try:
                table.at.optimize.compact_files(
                    target_rows_per_fragment=full,
                    batch_size=ROWS_PER_READ.get(name, _READ),
                    num_threads=1,  # memory stays flat, and the cores are the workers'
                )
            except OSError as error:
                if "conflict" not in str(error):
                    raise
                raise LeaseLost(f"{table.at.uri} was taken over by another run") from error
            table.at.cleanup_old_versions(
                retain_versions=KEPT_VERSIONS, error_if_tagged_old_versions=False
            )
            compacted = True
        if compacted:
            self.record()


def write_rows(
    root: str, name: str, rows: pa.Table | pa.RecordBatchReader
) -> list[FragmentMetadata]:
    """Writes rows as files of a table that nobody sees before they are committed."""
    uri = table_uri(root, name)
    return write_fragments(
        rows,
        uri,
        schema=TABLES[name],
        max_rows_per_file=ROWS_PER_FRAGMENT.get(name, _FULL),
        data_storage_version=STORAGE_VERSION,
        storage_options=storage.lance_options(uri),
    )


def _among(column: str, values: Collection[str]) -> str:
    quoted = ", ".join("'" + value.replace("'", "''") + "'" for value in values)
    return f"{column} IN ({quoted})"
