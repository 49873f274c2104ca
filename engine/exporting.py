"""Writes an export, whole file by whole file: killed anywhere, the same export goes on."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

from engine import storage
from engine.clipfiles import DEFAULT_LIMITS, Limits, Made, MediaOf
from engine.cutter import SCRATCH, place
from engine.export import Request, Sample, Selection, units
from engine.operator import Failed

ABOUT = "export.json"
"""What an export's folder says of itself, from its first moment on."""
_PROGRESS = ".progress"


@dataclass(kw_only=True)
class Exported:
    """What was written."""

    samples: int = 0
    files: int = 0
    """Media files, or shards."""
    bytes: int = 0
    """Of media."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Kept clips or pairs that are not in it, by reason."""
    failures: list[str] = field(default_factory=list)
    """A line for each clip that has no media: the same export tries them again."""


def export(
    request: Request,
    selection: Selection,
    dst: str,
    limits: Limits = DEFAULT_LIMITS,
    watch: Callable[[int, int], None] = lambda done, of: None,
) -> Exported:
    """Writes a selection to a folder, or goes on with what an earlier call left there.

    Args:
        request: What to write.
        selection: From `engine.export.select`.
        dst: A folder or URI, empty or begun by the same export.
        limits: Of cutting now.
        watch: Called with the samples done and their number.

    Raises:
        ValueError: Something else is there, or clips have no media.
        OSError: It cannot be written.
    """
    about = {
        "format": request.format,
        "dataset": request.root,
        "caption": selection.caption,
        "fingerprint": selection.fingerprint(request),
    }
    with ExitStack() as stack:
        media = None if request.spans else MediaOf(request, selection.samples, limits, stack)
        if _begin(dst, about):
            there = json.loads(storage.read_bytes(storage.join(dst, ABOUT)))
            return Exported(**there["exported"])
        done = Exported(left_out=Counter(selection.left_out))
        scratch = stack.enter_context(_scratch(dst))
        if media is None:
            done.samples = len(selection.samples)
            lines = ({"caption": s.text} | s.facts for s in selection.samples)
            _write_lines(os.path.join(scratch, "lines"), storage.join(dst, "clips.jsonl"), lines)
        else:
            kind = _Shards if request.format == "webdataset" else _Folder
            writer = kind(request, dst, scratch)
            left = writer.left(selection.samples)
            for group, made in media.of(list(units(left)), scratch):
                _note_failures(group, made, done)
                found = ((s, made[s.span.clip_id]) for s in group)
                writer.add([(s, m) for s, m in found if isinstance(m, Made)])
                watch(writer.num, len(selection.samples))
            writer.end(selection.samples)
            done.samples, done.files, done.bytes = writer.num, writer.files, writer.bytes
    if not done.failures:  # else the same export tries those again
        _put(dst, ABOUT, json.dumps(about | {"exported": vars(done)}, indent=1).encode())
        storage.delete_folder(storage.join(dst, _PROGRESS))
    return done


@contextmanager
def _scratch(dst: str) -> Iterator[str]:
    """A folder for what is in the making, on the disk of `dst` where that is one."""
    beside = None if storage.is_remote(dst) else storage.local_path(dst)
    folder = tempfile.mkdtemp(prefix=SCRATCH, dir=beside)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _begin(dst: str, about: dict[str, Any]) -> bool:
    """Makes sure that the folder is this export's; tells whether it is complete."""
    if storage.kind(dst) == "file":
        raise ValueError(f"{dst} is a file: name a folder")
    names = storage.names_in(dst)
    if ABOUT in names:
        there = json.loads(storage.read_bytes(storage.join(dst, ABOUT)))
        if {k: there.get(k) for k in about} != about:
            raise ValueError(
                f"{dst} holds another export ({there.get('format')} of {there.get('dataset')}, or"
                " of other captions, clips or settings): choose an empty folder"
            )
        for name in names:
            if name.startswith(SCRATCH):
                storage.delete_folder(storage.join(dst, name))
        return "exported" in there
    if names:
        raise ValueError(f"{dst} is not empty and no export is in it: choose an empty folder")
    storage.make_folder(dst)
    _put(dst, ABOUT, json.dumps(about, indent=1).encode())
    return False


def _note_failures(group: Sequence[Sample], made: dict[str, Made | Failed], done: Exported) -> None:
    for sample in group:
        found = made[sample.span.clip_id]
        if isinstance(found, Failed):
            done.left_out[found.error_type] += 1
            done.failures.append(f"{sample.key}: {found.message}")


def _put(dst: str, name: str, data: bytes) -> None:
    storage.write_bytes(storage.join(dst, name), data)


# Formats


class _Folder:
    """Media in a folder, and files that list it."""

    def __init__(self, request: Request, dst: str, scratch: str):
        self._format, self._media = request.format, request.media
        self._dst, self._scratch = dst, scratch
        self._done: dict[str, dict[str, Any]] = {}
        self._sizes: dict[str, int] = {}

    def left(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples that an earlier call has not written."""
        folder = storage.join(self._dst, _PROGRESS)
        for name in storage.names_in(folder):
            self._learn(json.loads(storage.read_bytes(storage.join(folder, name))))
        return [s for s in samples if s.key not in self._done]

    def _learn(self, written: Sequence[dict[str, Any]]) -> None:
        for one in written:
            self._done[one["key"]] = {"file_name": one["file_name"], **one["facts"]}
            self._sizes[one["file_name"]] = one["bytes"]

    @property
    def num(self) -> int:
        return len(self._done)

    @property
    def files(self) -> int:
        return len(self._sizes)

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())

    def add(self, made: Sequence[tuple[Sample, Made]]) -> None:
        """Puts media to their places, each once, and notes that they are there."""
        written = []
        for sample, one in made:
            name = f"{self._media}s/{sample.span.clip_id}.{one.ending}"
            if os.path.exists(one.path):  # else another pair of this clip has brought it
                self._sizes[name] = os.path.getsize(one.path)
                place(one.path, storage.join(self._dst, name))
            size = self._sizes[name]
            note = {"key": sample.key, "file_name": name, "bytes": size, "facts": one.facts}
            written.append(note)
        if written:
            note = json.dumps(written).encode()
            _put(self._dst, f"{_PROGRESS}/{written[0]['key']}.json", note)
            self._learn(written)

    def end(self, samples: Sequence[Sample]) -> None:
        """Writes what lists the media."""
        rows = [(s, s.facts | self._done[s.key]) for s in samples if s.key in self._done]

        def write(name: str, lines: Iterable[Any]) -> None:
            path = os.path.join(self._scratch, name)
            _write_lines(path, storage.join(self._dst, name), lines)

        def told() -> Iterator[dict[str, Any]]:
            for sample, facts in rows:
                yield {"file_name": facts["file_name"], "caption": sample.text} | facts

        if self._format == "hf":
            write("metadata.jsonl", told())
            return
        write("clips.jsonl", told())
        path = os.path.join(self._scratch, "other")
        with open(path, "w", encoding="utf-8") as file:
            json.dump([self._of_videox_fun(*row) for row in rows], file, ensure_ascii=False)
        place(path, storage.join(self._dst, "videox_fun.json"))
        with open(path, "w", encoding="utf-8", newline="") as file:
            lines = csv.writer(file)
            lines.writerow((self._media, "prompt"))
            lines.writerows((facts["file_name"], sample.text) for sample, facts in rows)
        place(path, storage.join(self._dst, "diffsynth.csv"))

    def _of_videox_fun(self, sample: Sample, facts: dict[str, Any]) -> dict[str, Any]:
        size = {"width": facts.get("width_px"), "height": facts.get("height_px")}
        about = {"file_path": facts["file_name"], "text": sample.text, "type": self._media}
        return about | size


class _Shards:
    """Tar files of at most so many bytes, each of them whole when it has its name."""

    def __init__(self, request: Request, dst: str, scratch: str):
        self._limit, self._media, self._dst = request.shard_bytes, request.media, dst
        self._path = os.path.join(scratch, "shard")
        self._tar: tarfile.TarFile | None = None
        self.num = self.files = self.bytes = 0

    def left(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples that no finished shard holds."""
        done: set[str] = set()
        for name in storage.names_in(self._dst):
            if name.endswith(".tar"):
                with (
                    storage.open_read(storage.join(self._dst, name)) as file,
                    tarfile.open(fileobj=file, mode="r:") as tar,
                ):
                    for member in tar:
                        key, ending = os.path.splitext(member.name)
                        done |= {key} if ending == ".json" else set()
                        self.bytes += 0 if ending in (".json", ".txt") else member.size
                self.files += 1
        self.num = len(done)
        return [s for s in samples if s.key not in done]

    def add(self, made: Sequence[tuple[Sample, Made]]) -> None:
        """Adds samples, and ends the shard that is full."""
        for sample, one in made:
            size = os.path.getsize(one.path)
            if self._tar and self._tar.offset + size > self._limit:
                self._finish()
            if self._tar is None:
                self._tar = tarfile.open(self._path, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115
            with open(one.path, "rb") as file:
                self._member(f"{sample.key}.{one.ending}", file, size)
            facts = json.dumps({"caption": sample.text} | sample.facts | one.facts)
            for ending, text in (("txt", sample.text), ("json", facts)):
                data = text.encode()
                self._member(f"{sample.key}.{ending}", io.BytesIO(data), len(data))
            self.num += 1
            self.bytes += size

    def _member(self, name: str, file: IO[bytes], size: int) -> None:
        assert self._tar is not None
        member = tarfile.TarInfo(name)  # of nobody and of no time: the same bytes on every run
        member.size, member.mode = size, 0o644
        self._tar.addfile(member, file)

    def _finish(self) -> None:
        assert self._tar is not None
        self._tar.close()
        self._tar = None
        place(self._path, storage.join(self._dst, f"{self._media}-{self.files:06d}.tar"))
        self.files += 1

    def end(self, samples: Sequence[Sample]) -> None:
        """Ends the last shard."""
        if self._tar:
            self._finish()


def _write_lines(path: str, uri: str, rows: Iterable[dict[str, Any]]) -> None:
    """Writes JSON lines to a local path, then moves them to their place."""
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    place(path, uri)
