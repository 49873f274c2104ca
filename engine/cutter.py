"""Cuts kept clips in a worker: reads sources in a sandboxed child, writes files or Lance blobs.

A `Cutter` is an actor of a Ray Data pipeline, as `engine.worker.Reader` is: numbers and names pass
through Ray, never a video. Images are not cut, for they are files already.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import posixpath
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lance
import pyarrow as pa
from lance.fragment import FragmentMetadata

from engine import logs, observe, storage, stores
from engine.cut import DEFAULT, Cut, Encoding, Mode, NotWritten, Span, cut_clips
from engine.integrity import Media
from engine.operator import Failed
from engine.sandbox import Sandbox
from engine.schema import TABLES
from engine.tables import write_rows
from engine.worker import FETCH_BYTES, Unwritable

Where = Literal["files", "blob"]
FOLDER = "cuts"
"""Below a dataset's root, where files go; the table names them relative to the root."""
SCRATCH = ".reelwright-"
"""How names of what is not finished begin; nobody refers to them."""
READS = ("clip_id", "source_id", "source_uri", "start_s", "end_s", "start_frame", "num_frames")
"""Columns of `clips` that cutting reads."""
CLIPS_AT_ONCE = 32
BLOB_ROWS_AT_ONCE = 1


@dataclass(frozen=True, kw_only=True)
class CutJob:
    """What every clip of a run shares."""

    root: str
    run_id: str
    mode: Mode
    where: Where = "files"
    encoding: Encoding = DEFAULT
    time_limit_s: float = 600.0
    """For each clip."""
    memory_limit_bytes: int = 4 * 2**30
    environment: tuple[tuple[str, str], ...] = ()
    """Variables of the driver that workers need (`engine.stores.worker_environment`)."""

    @property
    def files(self) -> str:
        """The folder that files go to."""
        return storage.join(self.root, FOLDER)


@dataclass(frozen=True, kw_only=True)
class CutUnit:
    """Clips of one source, cut in one go."""

    source_id: str
    source_uri: str
    clips: tuple[Span, ...]


@dataclass(frozen=True, kw_only=True)
class CutOutcome:
    """What came of a unit."""

    rows: pa.Table
    """Of the table `cuts`, without `mp4`: one a clip, cut or failed."""
    fragments: tuple[FragmentMetadata, ...] = ()
    """The same rows, with their blobs, written and to be committed: without those whose failure may
    pass, so that the next run tries them again."""
    unwritable: str | None = None
    """Why nothing could be written: the run cannot go on."""


def units(clips: pa.Table) -> list[CutUnit]:
    """Clips by source and in order of time, at most `CLIPS_AT_ONCE` each; images are left out.

    Args:
        clips: `READS`, and `media`.
    """
    video = [r for r in clips.to_pylist() if r.get("media") != "image"]
    video.sort(key=lambda r: (r["source_id"], r["start_s"], r["end_s"]))
    found: list[CutUnit] = []
    for row in video:
        span = Span(**{n: row[n] for n in ("clip_id", "start_s", "end_s")},
                    start_frame=row["start_frame"], num_frames=row["num_frames"])  # fmt: skip
        last = found[-1] if found else None
        if last and last.source_id == row["source_id"] and len(last.clips) < CLIPS_AT_ONCE:
            found[-1] = CutUnit(
                source_id=last.source_id, source_uri=last.source_uri, clips=(*last.clips, span)
            )
        else:
            found.append(
                CutUnit(source_id=row["source_id"], source_uri=row["source_uri"], clips=(span,))
            )
    return found


class Cutter:
    """The actor: units in, outcomes out, one bad source costing its own clips."""

    def __init__(self, job: CutJob):
        storage.take_environment(job.environment)
        logs.set_up_worker(job.run_id)
        self.job = job
        self.sandbox = Sandbox(
            "engine.cutter:cut_unit",
            time_limit_s=job.time_limit_s,
            memory_limit_bytes=job.memory_limit_bytes,
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A column `unit` in, a column `outcome` out, both pickled by this very program."""
        asked = [pickle.loads(u) for u in batch["unit"].to_pylist()]
        return pa.table({"outcome": [pickle.dumps(self.do(unit)) for unit in asked]})

    def do(self, unit: CutUnit) -> CutOutcome:
        """The outcome of one unit; never raises for what is in a file."""
        self.sandbox.time_limit_s = self.job.time_limit_s * len(unit.clips)
        try:
            return self.sandbox.call((self.job, unit))
        except Failed as error:
            failure = error
            if failure.error_type == Unwritable.__name__:
                return CutOutcome(rows=_rows([]), unwritable=failure.message)
            rows = [_row(self.job, unit, span, failure) for span in unit.clips]
            observe.log_failures(
                observe.failures_in(_rows(rows), "clip_id"), stage="cut", operator="Cutter"
            )
        if failure.transient:
            return CutOutcome(rows=_rows(rows))
        try:
            return CutOutcome(rows=_rows(rows), fragments=_written(self.job, rows, {}))
        except Unwritable as error:
            return CutOutcome(rows=_rows([]), unwritable=str(error))

    def close(self) -> None:
        """Ends the child."""
        self.sandbox.close()


def _row(job: CutJob, unit: CutUnit, span: Span, found: Cut | Failed) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(n for n in TABLES["cuts"].names if n != "mp4")
    row |= {"clip_id": span.clip_id, "source_id": unit.source_id, "mode": job.mode}
    row |= {"run_id": job.run_id}
    if isinstance(found, Failed):
        return row | {"error_type": found.error_type, "error": found.message}
    names = "start_s end_s num_frames width_px height_px size_bytes".split()
    return row | {name: getattr(found, name) for name in names}


def _rows(rows: Sequence[dict[str, Any]]) -> pa.Table:
    schema = pa.schema([f for f in TABLES["cuts"] if f.name != "mp4"])
    return pa.Table.from_pylist(list(rows), schema=schema)


# What follows runs in the sandboxed child.


def cut_unit(argument: tuple[CutJob, CutUnit]) -> CutOutcome:
    """Cuts the clips of a unit and writes them. Called in the child, under its limits."""
    job, unit = argument
    with _scratch(job) as folder:
        found = _cut(unit, folder, job.mode, job.encoding)
        rows = {s.clip_id: _row(job, unit, s, found[s]) for s in unit.clips}
        made = {s.clip_id: cut.path for s, cut in found.items() if isinstance(cut, Cut)}
        if job.where == "files":
            for clip_id, path in made.items():
                rows[clip_id]["path"] = _placed(job, path)
            made = {}
        ordered = list(rows.values())
        return CutOutcome(rows=_rows(ordered), fragments=_written(job, ordered, made))


def cut_files(
    argument: tuple[CutUnit, str, Mode, Encoding],
) -> dict[str, Cut | tuple[str, str]]:
    """Cuts a unit into a folder; by clip_id the file, or why there is none. For the child, too."""
    unit, folder, mode, encoding = argument
    return {
        span.clip_id: (one.error_type, one.message) if isinstance(one, Failed) else one
        for span, one in _cut(unit, folder, mode, encoding).items()
    }


def _cut(unit: CutUnit, folder: str, mode: Mode, encoding: Encoding) -> dict[Span, Cut | Failed]:
    with _opened(unit.source_uri, folder) as media:
        wanted = [(span, span.clip_id) for span in unit.clips]
        try:
            return dict(cut_clips(media, wanted, folder, mode=mode, encoding=encoding))
        except NotWritten as error:
            raise Unwritable(f"{folder}: {error}") from error


@contextlib.contextmanager
def _opened(uri: str, ours: str) -> Iterator[Media]:
    """A source on this machine, or else read where it lies if it is too large to fetch.

    What is in the folder `ours`, which has a random name, no dataset can name: roots do not count.
    """
    if os.path.dirname(uri) == ours:
        yield uri
    elif not storage.is_remote(uri):
        yield storage.allowed_path(uri)
    elif (storage.stat(uri).size_bytes or 0) <= FETCH_BYTES:
        with storage.fetch(uri, FETCH_BYTES) as path:
            yield path
    else:
        with storage.open_read(uri) as file:
            yield file


@contextlib.contextmanager
def _scratch(job: CutJob) -> Iterator[str]:
    """A folder for files in the making: beside the finished ones where that is a local folder."""
    beside = None
    try:
        if job.where == "files" and not storage.is_remote(job.files):
            beside = storage.local_path(job.files)
            os.makedirs(beside, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=SCRATCH, dir=beside)
    except OSError as error:
        raise Unwritable(str(error)) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _placed(job: CutJob, path: str) -> str:
    """Moves a finished file to its place; gives its name as the table has it."""
    name = os.path.basename(path)
    uri = storage.join(job.files, name[:2], name)
    try:
        place(path, uri)
    except OSError as error:
        raise Unwritable(f"{uri}: {error}") from error
    return uri.removeprefix(job.root.rstrip("/") + "/")


def place_of(root: str, path: str) -> str:
    """Where a file is that the table `cuts` of a dataset names: below its root, whatever it says.

    It may be deleted, and a table that somebody else made could name any file.
    """
    return storage.join(root, posixpath.normpath(f"/{path}").lstrip("/"))


def place(path: str, uri: str) -> None:
    """Moves a local file to a path on the same disk, or into a store: whole, or not at all."""
    if storage.is_remote(uri):
        store, name = stores.store_of(uri)
        with stores.as_os_errors(uri):
            store.put_file(path, name)
        os.unlink(path)
        return
    storage.make_folder(storage.parent(uri))
    os.chmod(path, 0o666 & ~_umask())
    os.replace(path, storage.allowed_path(uri, to_change=True))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _written(
    job: CutJob, rows: Sequence[dict[str, Any]], made: dict[str, str]
) -> tuple[FragmentMetadata, ...]:
    """Writes rows of `cuts`, with the files named in `made` as blobs, one in memory at a time."""
    schema = TABLES["cuts"]

    def batches() -> Iterator[pa.RecordBatch]:
        step = BLOB_ROWS_AT_ONCE if made else max(1, len(rows))
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            columns: dict[str, Any] = {
                f.name: pa.array([r[f.name] for r in some], f.type)
                for f in schema
                if f.name != "mp4"
            }
            columns["mp4"] = lance.blob_array([_content(made.get(r["clip_id"])) for r in some])
            yield pa.record_batch([columns[f.name] for f in schema], schema=schema)

    try:
        reader = pa.RecordBatchReader.from_batches(schema, batches())
        return tuple(write_rows(job.root, "cuts", reader))
    except OSError as error:
        raise Unwritable(str(error)) from error


def _content(path: str | None) -> bytes | None:
    if path is None:
        return None
    with open(path, "rb") as file:
        return file.read()
