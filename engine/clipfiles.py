"""Files of kept clips for an export: cuts of the dataset, cuts made now, images as they are."""

from __future__ import annotations

import os
import shutil
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from engine import storage
from engine.blobs import take_blobs
from engine.cut import Cut
from engine.cutter import place_of
from engine.export import Request, Sample, cut_unit_of
from engine.operator import Failed
from engine.roots import NotAllowed
from engine.sandbox import Sandbox
from engine.tables import read
from engine.worker import Unwritable

_TRUE = ("start_s", "end_s", "num_frames", "width_px", "height_px")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of cutting now."""

    workers: int = 1
    time_limit_s: float = 600.0
    """For each clip."""
    memory_limit_bytes: int = 4 * 2**30


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, kw_only=True)
class Made:
    """A clip's media, in a file of its own on this machine, and what it truly holds."""

    path: str
    facts: dict[str, Any]

    @property
    def ending(self) -> str:
        """Such as `mp4`."""
        return os.path.splitext(self.path)[1][1:].lower()


class MediaOf:
    """Gives clips their media: from the table `cuts`, cut now, or the image itself.

    Args:
        request: What to write.
        samples: All that will be asked for.
        limits: Of cutting now.
        stack: Closes what is opened here.

    Raises:
        ValueError: Clips are not cut, and are not to be cut now.
    """

    def __init__(
        self,
        request: Request,
        samples: Sequence[Sample],
        limits: Limits,
        stack: ExitStack,
    ):
        self._request, self._limits = request, limits
        self._local, self._sandboxes = threading.local(), list[Sandbox]()
        self._cuts: dict[str, dict[str, Any]] = {}
        if request.media == "video":
            self._table = read(request.root, "cuts")
            self._cuts = self._usable_cuts()
            lacking = {s.span.clip_id for s in samples} - self._cuts.keys()
            if lacking and not request.cut:
                raise ValueError(
                    f"{len(lacking)} kept clip(s) of {request.root} are not cut: add --cut encode"
                    " (exact) or --cut copy (on key frames), or name spans: --format jsonl --spans"
                )
        stack.callback(lambda: [sandbox.close() for sandbox in self._sandboxes])

    def _usable_cuts(self) -> dict[str, dict[str, Any]]:
        """Rows of `cuts` by clip, with their place in the table: those that were asked for."""
        names = ["clip_id", "mode", "path", "error_type", "error", *_TRUE]
        rows = self._table.to_table(columns=names).to_pylist()
        wanted = self._request.cut
        return {
            row["clip_id"]: row | {"row": number}
            for number, row in enumerate(rows)
            if wanted is None or (row["mode"] == wanted and not row["error_type"])
        }

    def of(
        self, groups: Sequence[list[Sample]], scratch: str
    ) -> Iterator[tuple[list[Sample], dict[str, Made | Failed]]]:
        """Groups in order, each with its clips' media, which is gone when the next is asked for."""
        workers = max(1, self._limits.workers)
        left = iter(enumerate(groups))
        waiting: deque[tuple[list[Sample], str, Future[Any]]] = deque()
        with ThreadPoolExecutor(workers) as pool:
            try:
                while True:
                    while len(waiting) <= workers and (item := next(left, None)):
                        folder = os.path.join(scratch, f"{item[0]:08d}")
                        future = pool.submit(self._made, item[1], folder)
                        waiting.append((item[1], folder, future))
                    if not waiting:
                        return
                    group, folder, future = waiting.popleft()
                    yield group, future.result()
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                for *_, future in waiting:
                    future.cancel()

    def _made(self, group: list[Sample], folder: str) -> dict[str, Made | Failed]:
        os.mkdir(folder)
        wanted = {s.span.clip_id: s for s in group}
        if self._request.media == "image":
            return {clip_id: _image(sample, folder) for clip_id, sample in wanted.items()}
        found = {i: self._stored(self._cuts[i], folder) for i in wanted if i in self._cuts}
        missing = [sample for clip_id, sample in wanted.items() if clip_id not in found]
        return found | (self._cut(missing, folder) if missing else {})

    def _stored(self, row: dict[str, Any], folder: str) -> Made | Failed:
        if row["error_type"]:
            return Failed(row["error_type"], row["error"])
        path = row["path"]
        try:
            if path is None:
                (blob,) = take_blobs(self._table, "mp4", indices=[row["row"]])
                path = _unpacked(blob, os.path.join(folder, row["clip_id"]))
                return Made(path=path, facts=_true_facts(row))
            uri = place_of(self._request.root, path)
            return Made(path=_copied(uri, folder), facts=_true_facts(row))
        except FileNotFoundError:
            return Failed("FileNotFoundError", f"its cut file {uri} is gone: add --cut")
        except NotAllowed as error:
            return Failed("NotAllowed", str(error))

    def _cut(self, samples: Sequence[Sample], folder: str) -> dict[str, Made | Failed]:
        unit, sandbox = cut_unit_of(samples), self._sandbox()
        sandbox.time_limit_s = self._limits.time_limit_s * len(unit.clips)
        try:
            found = sandbox.call((unit, folder, self._request.cut, self._request.encoding))
        except Failed as failure:
            if failure.error_type == Unwritable.__name__:
                raise OSError(failure.message) from failure
            return {span.clip_id: failure for span in unit.clips}
        return {
            clip_id: Made(path=one.path, facts=_true_facts(vars(one)))
            if isinstance(one, Cut)
            else Failed(*one)
            for clip_id, one in found.items()
        }

    def _sandbox(self) -> Sandbox:
        """This thread's child."""
        if not hasattr(self._local, "sandbox"):
            self._local.sandbox = Sandbox(
                "engine.cutter:cut_files",
                time_limit_s=self._limits.time_limit_s,
                memory_limit_bytes=self._limits.memory_limit_bytes,
            )
            self._sandboxes.append(self._local.sandbox)
        return self._local.sandbox


def _true_facts(row: Mapping[str, Any]) -> dict[str, Any]:
    facts = {name: row[name] for name in _TRUE}
    return facts | {"duration_s": facts["end_s"] - facts["start_s"]}


def _copied(uri: str, folder: str) -> str:
    path = os.path.join(folder, os.path.basename(storage.local_path(uri)))
    with storage.open_read(uri) as source, open(path, "wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
    return path


def _image(sample: Sample, folder: str) -> Made | Failed:
    """The image as it lies in its source, under the name of its clip."""
    ending = os.path.splitext(storage.local_path(sample.source_uri))[1].lower()
    try:
        path = _copied(sample.source_uri, folder)
    except OSError as error:
        return Failed(type(error).__name__, f"{sample.source_uri}: {error.strerror or error}")
    named = os.path.join(folder, f"{sample.span.clip_id}{ending}")
    os.rename(path, named)
    return Made(path=named, facts={})


def _unpacked(blob: Any, stem: str) -> str:
    """Writes a blob of `cuts` to a file whose ending says what it is."""
    head = blob.read(64)
    is_ebml = head.startswith(b"\x1aE\xdf\xa3")
    path = f"{stem}.{'webm' if b'webm' in head else 'mkv'}" if is_ebml else f"{stem}.mp4"
    with open(path, "wb") as file:
        file.write(head)
        shutil.copyfileobj(blob, file, 1 << 20)
    return path
