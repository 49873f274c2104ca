"""Files of videos as `generations` holds them: looked at in a sandbox, stored, and fetched back."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import shutil
import time
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
from lance.fragment import FragmentMetadata

from engine import observe
from engine.blobs import take_blobs
from engine.cut import Encoding, cut_clip
from engine.gauge import Unloadable
from engine.operator import Failed
from engine.sandbox import Sandbox, is_transient
from engine.schema import GENERATIONS
from engine.tables import Writer, read, write_rows
from engine.video import DamagedError, check_complete, decode, metadata_of, open_video
from evals.names import file_name
from evals.suites import Suite

TIME_LIMIT_S = 600.0
"""For looking at one file."""
MEMORY_LIMIT_BYTES = 4 * 2**30
NEAR_LOSSLESS = Encoding(crf=4, preset="fast")
"""How a file is encoded anew that VBench's readers do not read as it is."""
DIED = Failed("WorkerDied", "workers died while they made or read it", transient=True)
"""Of a row on which workers are lost again and again."""
_CODECS = ("h264", "mpeg4")
_COPY_BYTES = 1 << 20
_AT_ONCE, _MAKING = 256, ".making"  # of an export


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a file holds, as its frames have it; all of them were decoded."""

    path: str
    """The file that is kept: the one looked at, or one made of it."""
    num_frames: int
    fps: float
    width_px: int
    height_px: int
    duration_s: float
    note: str | None = None
    """Why it was encoded anew."""


class Inspector:
    """Looks at files that nobody trusts, in a child under a limit of time and memory."""

    def __init__(
        self,
        time_limit_s: float = TIME_LIMIT_S,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    ):
        self._sandbox = Sandbox(
            "evals.videofiles:look",
            time_limit_s=time_limit_s,
            memory_limit_bytes=memory_limit_bytes,
        )

    def look(self, path: str, made: str) -> Facts:
        """What a file holds.

        Args:
            path: The file.
            made: Path without ending for one that is made of it, where that is needed.

        Raises:
            Failed: It is no video, or is damaged, truncated or without end.
        """
        try:
            return self._sandbox.call((path, made))
        except Failed as error:
            words = error.message.partition(" (--")[0]  # which no command here has
            raise Failed(error.error_type, words, transient=error.transient) from None

    def close(self) -> None:
        """Ends the child."""
        self._sandbox.close()


def look(argument: tuple[str, str]) -> Facts:
    """`Inspector.look`, in the child."""
    path, made = argument
    facts, (start_s, end_s), wrong = _seen(path)
    if not wrong:
        return facts
    cut = cut_clip(
        path,
        made,
        start_s=start_s,
        end_s=end_s,
        start_frame=0,
        num_frames=facts.num_frames,
        mode="encode",
        encoding=NEAR_LOSSLESS,
    )
    note = f"encoded anew, almost without loss, for VBench to read it: {', '.join(wrong)}"
    return dataclasses.replace(_seen(cut.path)[0], note=note)


def _seen(path: str) -> tuple[Facts, tuple[float, float], list[str]]:
    """What a file holds, first and last time in s, and why VBench would not read it so."""
    with open_video(path) as video:
        check_complete(video, path)
        first, last, count = None, None, 0
        for last in decode(video):
            first, count = first or last, count + 1
        if first is None or last is None:
            raise DamagedError("no frame could be decoded")
        about = metadata_of(video, first.picture)
        family = video.family
    spread_s = last.time_s - first.time_s
    fps = about.fps or ((count - 1) / spread_s if spread_s > 0 else 1.0)
    facts = Facts(
        path=path,
        num_frames=count,
        fps=fps,
        width_px=about.width_px,
        height_px=about.height_px,
        duration_s=count / fps,
    )
    coded = (about.coded_width_px, about.coded_height_px)
    reasons = [
        (family != "mov", f"its container is {family}"),
        (about.codec not in _CODECS, f"its codec is {about.codec}"),
        (about.pix_fmt != "yuv420p", f"its pixels are {about.pix_fmt}"),
        (bool(about.rotation_deg), f"it is turned by {about.rotation_deg}°"),
        (coded != (about.width_px, about.height_px), "its pixels are not square"),
        (about.num_video_streams > 1, f"it has {about.num_video_streams} video streams"),
        (about.num_frames != count, f"its index says {about.num_frames} frames, it has {count}"),
    ]
    span_s = (first.time_s, last.time_s + 1 / fps)
    return facts, span_s, [reason for is_so, reason in reasons if is_so]


def columns_of(facts: Facts) -> dict[str, Any]:
    """What a row says of its file."""
    content = Path(facts.path).read_bytes()
    names = ("num_frames", "fps", "width_px", "height_px", "duration_s")
    return {name: getattr(facts, name) for name in names} | {
        "size_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def new_row(run_id: str, **values: Any) -> dict[str, Any]:
    """A row of `generations`, without the video."""
    row: dict[str, Any] = dict.fromkeys(n for n in GENERATIONS.names if n != "mp4")
    assert values.keys() <= row.keys(), values.keys() - row.keys()
    now = datetime.datetime.now(datetime.UTC)
    return row | {"created_at": now, "run_id": run_id} | values


def failed(row: Mapping[str, Any], error: Exception) -> dict[str, Any]:
    """A row without a video, and why there is none."""
    if isinstance(error, Failed):
        error_type, said, transient = error.error_type, error.message, error.transient
    else:
        said = str(getattr(error, "strerror", None) or error) or type(error).__name__
        error_type, transient = type(error).__name__, is_transient(error)
    words = " ".join(said.split())[:500]
    return {**row, "error_type": error_type, "error": words, "error_transient": transient}


def failures_of(rows: Sequence[Mapping[str, Any]]) -> tuple[observe.Failure, ...]:
    """Those of rows that have no video."""
    return tuple(
        observe.Failure(row["generation_id"], row["error_type"], row["error"])
        for row in rows
        if row["error_type"] is not None
    )


def write(
    root: str, rows: Sequence[Mapping[str, Any]], files: Mapping[str, str]
) -> tuple[str, ...]:
    """Writes rows of `generations`, one video in memory at a time; gives the fragments as JSON.

    Args:
        root: The dataset.
        rows: As of `new_row`.
        files: By generation_id; rows without one have no video.
    """

    def batches() -> Iterator[pa.RecordBatch]:
        for row in rows:
            columns: dict[str, Any] = {
                f.name: pa.array([row[f.name]], f.type) for f in GENERATIONS if f.name != "mp4"
            }
            path = files.get(row["generation_id"])
            content = None if path is None else Path(path).read_bytes()
            columns["mp4"] = lance.blob_array([content])
            yield pa.record_batch([columns[n] for n in GENERATIONS.names], schema=GENERATIONS)

    if not rows:
        return ()
    reader = pa.RecordBatchReader.from_batches(GENERATIONS, batches())
    fragments = write_rows(root, "generations", reader)
    return tuple(json.dumps(fragment.to_json()) for fragment in fragments)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a unit."""

    unit: Any
    num_done: int = 1
    num_failed: int = 0
    seconds: float = 0.0
    failures: tuple[observe.Failure, ...] = ()
    fragments: tuple[str, ...] = ()
    """Of `generations`, as JSON: written and to be committed."""
    replaces: tuple[str, ...] = ()
    """generation_ids whose rows go."""
    unloadable: str | None = None
    """Why there is no model: the run cannot go on."""
    unwritable: str | None = None
    """Why nothing could be written: nor can it."""


def stored_as_they_come(
    writer: Writer,
    units: Sequence[Any],
    job: Any,
    *,
    commit_every_s: float,
    lost: Callable[[Any], list[Mapping[str, Any]]],
    **options: Any,
) -> Iterator[Outcome | None]:
    """Runs units, commits what actors wrote every few seconds, and gives outcomes on the way.

    None comes whenever nothing else did for a while.

    Args:
        writer: Of the dataset.
        units: What to do.
        job: What they share.
        commit_every_s: What a death may cost.
        lost: Rows of a unit on which workers die again and again.
        options: Of `engine.pipeline.outcomes`.
    """
    from engine.pipeline import Lost, settled

    waiting: list[Outcome] = []

    def commit() -> None:
        some, waiting[:] = list(waiting), []
        replaced = [one for outcome in some for one in outcome.replaces]
        if replaced:
            writer.remove("generations", "generation_id", replaced)
        fragments = [text for outcome in some for text in outcome.fragments]
        writer.append("generations", [FragmentMetadata.from_json(text) for text in fragments])

    committed_at = time.monotonic()
    try:
        for found in settled(units, job, wait_s=min(1.0, commit_every_s), **options):
            outcome = found
            if isinstance(found, Lost):
                rows = lost(found.unit)
                outcome = Outcome(
                    unit=found.unit,
                    num_done=len(rows),
                    num_failed=len(rows),
                    failures=failures_of(rows),
                    fragments=write(writer.root, rows, {}),
                )
            if outcome is not None:
                _check(outcome)
                waiting.append(outcome)
            yield outcome
            if waiting and time.monotonic() - committed_at > commit_every_s:
                commit()
                committed_at = time.monotonic()
    finally:
        commit()


def _check(outcome: Outcome) -> None:
    if outcome.unloadable:
        raise Unloadable(outcome.unloadable)
    if outcome.unwritable:
        raise OSError(outcome.unwritable)


def fetch(
    generations: lance.LanceDataset | str, generation_ids: Sequence[str], folder: Path
) -> list[Path]:
    """Files of videos on this machine, named as VBench names them, each in a folder of its id.

    Args:
        generations: The table, or the root of its dataset.
        generation_ids: Of the videos.
        folder: Where to; what is there already is not written again.

    Returns:
        Paths, in the order of the ids.

    Raises:
        FileNotFoundError: There is no such row, or it has no video.
        OSError: The table cannot be read, or the file not written.
    """
    table = read(generations, "generations") if isinstance(generations, str) else generations
    wanted = ", ".join("'" + one.replace("'", "''") + "'" for one in dict.fromkeys(generation_ids))
    rows = table.scanner(
        ["generation_id", "prompt", "sample", "size_bytes"],
        filter=f"generation_id IN ({wanted}) AND error_type IS NULL" if wanted else "false",
        with_row_id=True,
    ).to_table()
    found: dict[str, tuple[Path, int]] = {}
    for row in rows.to_pylist():
        path = folder / row["generation_id"] / file_name(row["prompt"], row["sample"])
        if not (path.is_file() and path.stat().st_size == row["size_bytes"]):
            found[row["generation_id"]] = path, row["_rowid"]
        else:
            found[row["generation_id"]] = path, -1
    lacking = [generation_id for generation_id in generation_ids if generation_id not in found]
    if lacking:
        raise FileNotFoundError(f"{table.uri} has no video {lacking[0]} (any more)")
    todo = [(path, row_id) for path, row_id in found.values() if row_id >= 0]
    blobs = take_blobs(table, "mp4", ids=[row_id for _, row_id in todo]) if todo else []
    for (path, _), blob in zip(todo, blobs, strict=True):
        _placed(blob, path)
    return [found[generation_id][0] for generation_id in generation_ids]


def _placed(blob: Any, path: Path) -> None:
    """Whole, or not at all: a scorer may look while it is being written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.parent / f".{os.getpid()}"
    with made.open("wb") as file:
        shutil.copyfileobj(blob, file, _COPY_BYTES)
    made.replace(path)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What `export_videos` wrote."""

    num_written: int
    missing: tuple[str, ...]
    """Names of files that the suite asks for and nobody has made, in its order."""
    notes: tuple[str, ...]
    """Names that only the case of letters tells apart."""


def export_videos(
    generations: lance.LanceDataset | str,
    videos: Mapping[tuple[str, str, int], Mapping[str, Any]],
    suite: Suite,
    folder: Path,
) -> Exported:
    """Writes the videos of a suite into one folder, as the `vbench` command wants them.

    Args:
        generations: The table, or the root of its dataset.
        videos: A model's rows by prompt, text and sample (`evals.evaluation.videos_of`).
        suite: Whose videos.
        folder: A new or empty one, or one that this wrote before.
    """
    names, missing = dict[str, str](), []
    for prompt, sample in suite.videos():
        name = file_name(prompt.prompt, sample)
        row = videos.get((prompt.prompt, prompt.text, sample))
        if row is None or row["error_type"] is not None:
            missing.append(name)
        else:
            names[name] = row["generation_id"]
    folder.mkdir(parents=True, exist_ok=True)
    todo = list(names.items())
    for start in range(0, len(todo), _AT_ONCE):
        some = todo[start : start + _AT_ONCE]
        paths = fetch(generations, [generation_id for _, generation_id in some], folder / _MAKING)
        for (name, _), path in zip(some, paths, strict=True):
            path.replace(folder / name)
    shutil.rmtree(folder / _MAKING, ignore_errors=True)
    alike = defaultdict(list)
    for name in names:
        alike[unicodedata.normalize("NFC", name).casefold()].append(name)
    return Exported(
        num_written=len(names),
        missing=tuple(missing),
        notes=tuple(
            f"{' and '.join(same)} are one file where a disk does not tell the case of letters"
            for same in alike.values()
            if len(same) > 1
        ),
    )
