"""Imports videos that were made elsewhere: looked at in a sandbox, stored as generated ones are.

A file is known again by size and time stamp (ETag), and where these differ by its content. A file
whose content changed takes the place of the one before; one that nobody can decode is a row with
the reason, and never reaches a scorer.
"""

from __future__ import annotations

import json
import os
import pickle
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from engine import logs, observe, storage
from engine.folders import Entry, listing
from engine.operator import Failed
from engine.stores import Stat
from engine.tables import Writer
from evals.generating import Progress
from evals.models import Model
from evals.names import MANIFESTS, match
from evals.suites import Suite
from evals.videofiles import (
    DIED,
    Inspector,
    Outcome,
    columns_of,
    failed,
    failures_of,
    new_row,
    stored_as_they_come,
    write,
)

FILES_PER_UNIT = 8
MAX_BYTES = 4 * 2**30
"""Of a file: a row holds it whole."""
_NAMESPACE = uuid.UUID("5c0e8c4b-1f9d-5a2e-8a53-5f5f7a2f9b61")


@dataclass(kw_only=True)
class Counts:
    """What a run did for a folder."""

    there: int = 0
    """That were stored before and have not changed, or had failed for good."""
    imported: int = 0
    failed: int = 0
    """That cannot be read; their rows say why."""
    missing: int = 0
    """That the suite asks for, and no file is named after: counted as missing by every table."""
    unknown: int = 0
    """Files that are no video of the suite."""
    lines: list[str] = field(default_factory=list)
    """On what is missing, unknown or not quite as it should be: a line each, for a person."""
    seconds: float = 0.0
    """Of all actors together."""


@dataclass(frozen=True, kw_only=True)
class File:
    """A video of the folder, and what is stored of it."""

    uri: str
    stamp: str
    """Size, time stamp and ETag, as JSON."""
    prompt: str
    text: str
    sample: int
    seed: int | None
    replaces: tuple[str, ...] = ()
    """generation_ids of what is stored of this video."""
    known: str | None = None
    """SHA-256 of the file that was stored last, if that row is to stand for the same content."""


@dataclass(frozen=True)
class Unit:
    """Files that are imported together."""

    files: tuple[File, ...]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all units of a run share."""

    root: str
    run_id: str
    model: Model
    environment: tuple[tuple[str, str], ...]


def import_folder(
    model: Model,
    suite: Suite,
    *,
    writer: Writer,
    connect: Callable[[], Any],
    watch: Callable[[Progress], None] = lambda _: None,
    workers: int | None = None,
    retry_failed: bool = False,
    commit_every_s: float = 10.0,
) -> Counts:
    """Stores the videos of a folder that a suite asks for; the same call again takes up changes.

    Args:
        model: Whose kind is `folder`.
        suite: What is asked for.
        writer: Of the dataset.
        connect: Makes sure that Ray is there; called only where something is to do.
        watch: Called with the run's progress.
        workers: Actors at once; None is one a core.
        retry_failed: Look again at files that failed for good and have not changed.
        commit_every_s: What a death may cost.

    Raises:
        ValueError: A manifest in the folder cannot be read.
        OSError: The folder or the dataset cannot be read or written.
        LeaseLost: Another driver has taken over.
    """
    progress, counts = Progress(doing=f"looking at {model.at}"), Counts()
    watch(progress)
    files = _to_look_at(model, suite, writer, counts, retry_failed=retry_failed)
    progress.total = len(files)
    progress.doing = f"importing {model.name}"
    if not files:
        return counts
    connect()
    job = Job(
        root=writer.root,
        run_id=writer.run_id,
        model=model,
        environment=tuple(storage.worker_environment().items()),
    )
    units = [
        Unit(tuple(files[start : start + FILES_PER_UNIT]))
        for start in range(0, len(files), FILES_PER_UNIT)
    ]
    for outcome in stored_as_they_come(
        writer,
        units,
        job,
        commit_every_s=commit_every_s,
        lost=lambda unit: [_died(job, file) for file in unit.files],
        actor=Importer,
        workers=workers,
        share=1.0,
    ):
        if outcome is not None:
            same = len(outcome.unit.files) - outcome.num_done
            counts.there += same
            counts.imported += outcome.num_done - outcome.num_failed
            counts.failed += outcome.num_failed
            counts.seconds += outcome.seconds
            progress.done += len(outcome.unit.files)
            progress.failed += outcome.num_failed
            observe.worked(
                table="generations",
                stage="import",
                operator=model.name,
                states={
                    "done": outcome.num_done - outcome.num_failed,
                    "failed": outcome.num_failed,
                },
                failures=outcome.failures,
                seconds=outcome.seconds,
            )
        observe.progress("importing", progress.done, progress.total)
        watch(progress)
    return counts


def _to_look_at(
    model: Model, suite: Suite, writer: Writer, counts: Counts, *, retry_failed: bool
) -> list[File]:
    """Files that are new or have changed; counts the others."""
    entries = {_below(model.at, e.uri): e for e in listing(model.at) if e.stat or e.error}
    manifest = next((name for name in MANIFESTS if name in entries), None)
    names = [name for name in entries if name not in MANIFESTS]
    if manifest is None:
        matched = match(names, suite)
    else:
        with storage.fetch(entries[manifest].uri) as path:
            matched = match(names, suite, path)
    stored = _stored(writer, model)
    texts = {entry.prompt: entry.text for entry in suite.prompts}
    files = []
    for (prompt, sample), name in matched.found.items():
        entry, rows = entries[name], stored.get((prompt, texts[prompt], sample), [])
        stamp = _stamp(entry)
        rows_now = [r for r in rows if r["source_uri"] == entry.uri and _said(r, "stamp") == stamp]
        again = any(
            r["error_type"] is not None and (retry_failed or r["error_transient"]) for r in rows_now
        )
        if len(rows_now) == len(rows) == 1 and not again:
            counts.there += 1
            continue
        good = [r for r in rows if r["error_type"] is None]
        files.append(
            File(
                uri=entry.uri,
                stamp=stamp,
                prompt=prompt,
                text=texts[prompt],
                sample=sample,
                seed=matched.seeds.get((prompt, sample)),
                replaces=tuple(r["generation_id"] for r in rows),
                known=_said(good[0], "sha256") if len(good) == len(rows) == 1 else None,
            )
        )
    gone = [key for key in matched.missing if (key[0], texts[key[0]], key[1]) in stored]
    elsewhere = [
        row["generation_id"]
        for prompt, sample in gone
        for row in stored[prompt, texts[prompt], sample]
        if not row["source_uri"].startswith(model.at.rstrip("/") + "/")
    ]
    writer.remove("generations", "generation_id", elsewhere)  # of a folder of the same name
    counts.missing, counts.unknown = len(matched.missing), len(matched.unknown)
    counts.lines = matched.lines()
    return files


def _below(root: str, uri: str) -> str:
    """A file's path below the folder."""
    if storage.is_remote(root):
        return uri.removeprefix(root.rstrip("/") + "/")
    return os.path.relpath(storage.local_path(uri), storage.local_path(root))


def _stored(writer: Writer, model: Model) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    """Rows of this folder's name, by prompt, text and sample."""
    names = [
        *("generation_id", "prompt", "text", "sample", "settings", "source_uri"),
        *("error_type", "error_transient"),
    ]
    rows = writer.table("generations").to_table(
        columns=names, filter=f"model = '{model.name}' AND model_kind = 'folder'"
    )
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows.to_pylist():
        found.setdefault((row["prompt"], row["text"], row["sample"]), []).append(row)
    return found


def _said(row: Mapping[str, Any], name: str) -> str | None:
    """What an imported row says of its source."""
    return json.loads(row["settings"] or "{}").get(name)


def _stamp(entry: Entry) -> str:
    found = entry.stat or Stat(None, None)
    return json.dumps([found.size_bytes, found.mtime_ns, found.etag])


class Importer:
    """The actor: units in, outcomes out, one bad file costing its own row."""

    def __init__(self, job: Job):
        storage.take_environment(job.environment)
        logs.set_up_worker(job.run_id)
        self.job = job
        self._inspector = Inspector()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A column `unit` in, a column `outcome` out, both pickled by this very program."""
        units = [pickle.loads(u) for u in batch["unit"].to_pylist()]
        return pa.table({"outcome": [pickle.dumps(self.do(unit)) for unit in units]})

    def do(self, unit: Unit) -> Outcome:
        """The outcome of one unit; never raises for what is in a file."""
        began = time.perf_counter()
        rows: list[dict[str, Any]] = []
        replaces: list[str] = []
        with tempfile.TemporaryDirectory(prefix="reelwright-") as folder:
            paths: dict[str, str] = {}
            for number, file in enumerate(unit.files):
                own = os.path.join(folder, str(number))
                os.mkdir(own)
                found = self._row(file, own)
                if found is not None:
                    row, path = found
                    rows.append(row)
                    replaces += file.replaces
                    paths |= {} if path is None else {row["generation_id"]: path}
            try:
                fragments = write(self.job.root, rows, paths)
            except OSError as error:
                return Outcome(unit=unit, unwritable=f"{self.job.root}: {error}")
        failures = failures_of(rows)
        observe.log_failures(failures, stage="import", operator=self.job.model.name)
        return Outcome(
            unit=unit,
            num_done=len(rows),
            num_failed=len(failures),
            failures=failures,
            seconds=time.perf_counter() - began,
            fragments=fragments,
            replaces=tuple(replaces),
        )

    def _row(self, file: File, folder: str) -> tuple[dict[str, Any], str | None] | None:
        """A row and the file of its video; None where what is stored still holds."""
        sha256 = None
        try:
            path = os.path.join(folder, "video" + os.path.splitext(file.uri)[1].lower())
            _copy(file.uri, path)
            sha256 = storage.sha256_of_file(path)
            if file.known == sha256:
                return None
            facts = self._inspector.look(path, os.path.join(folder, "anew"))
        except (Failed, OSError, ValueError) as error:
            return failed(_row(self.job, file, sha256), error), None
        notes = [facts.note] if facts.note else []
        row = _row(self.job, file, sha256)
        row |= {"notes": json.dumps(notes, ensure_ascii=False)} | columns_of(facts)
        return row, facts.path


def _copy(uri: str, path: str) -> None:
    """Copies a file, as it is now, to where nobody changes it."""
    size = storage.stat(uri).size_bytes
    if size is not None and size > MAX_BYTES:
        raise ValueError(f"{size:,} bytes: at most {MAX_BYTES:,} are imported")
    with storage.open_read(uri) as source, open(path, "wb") as target:
        while chunk := source.read(1 << 20):
            target.write(chunk)


def _row(job: Job, file: File, sha256: str | None) -> dict[str, Any]:
    says = [job.model.name, file.prompt, file.text, file.sample, sha256 or file.stamp]
    return new_row(
        job.run_id,
        generation_id=str(uuid.uuid5(_NAMESPACE, json.dumps(says))),
        model=job.model.name,
        model_kind=job.model.kind,
        checkpoint=job.model.checkpoint,
        prompt=file.prompt,
        text=file.text,
        sample=file.sample,
        seed=file.seed,
        settings=json.dumps({"stamp": file.stamp, "sha256": sha256}),
        source_uri=file.uri,
    )


def _died(job: Job, file: File) -> dict[str, Any]:
    return failed(_row(job, file, None), DIED)
