"""Which samples a stage learns from: rows of a curated dataset, each with its bucket and a hash.

Columns stay in Arrow and rows become Python values one at a time: there may be 12 million.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine import storage
from engine.tables import DatasetError, identity, read
from trainers.system import Bucket, Data, plain

_TEXTS = ("instruction", "instruction_text", "language", "original", "rephrased")
_REPEATED = frozenset({"media", "instruction", "instruction_text", "language"})
"""Columns of few different values: kept once each."""
_OF_CLIP = (
    "clip_id", "source_id", "media", "start_s", "end_s", "fps", "num_frames", "width_px",
    "height_px", "duration_s",
)  # fmt: skip
_OF_SPAN = ("clip_id", "media", "start_s", "end_s")
_ROWS_AT_ONCE = 65_536
_BATCHES_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """The samples of a stage, in the order of their ids."""

    root: str
    rows: pa.Table
    """`sample_id` (a pair_id or clip_id), `pair_id` (null for clips), `clip_id`, `source_id`,
    `source_uri`, `media`, the span, shape and rate of the clip as in `clips`, and the texts:
    `instruction`, `instruction_text`, `language`, `original` and `rephrased`."""
    bucket: np.ndarray
    """int16 (rows,): which of `Data.buckets`."""
    hash: str
    """Of all that training depends on: ids, spans, texts, contents of the sources, buckets and the
    settings of `Data`. Where files lie and how the tables are stored is not in it."""
    left_out: Mapping[str, int]
    """Rows that are no samples, counted by the reason."""

    def __len__(self) -> int:
        return self.rows.num_rows

    @property
    def instructions(self) -> dict[str, list[str]]:
        """By name the texts that the pairs were made with: one, unless somebody changed it."""
        both = self.rows.select(["instruction", "instruction_text"])
        found: dict[str, list[str]] = {}
        for row in both.group_by(both.column_names).aggregate([]).to_pylist():
            if row["instruction"] is not None:
                found.setdefault(row["instruction"], []).append(row["instruction_text"])
        return {name: sorted(texts) for name, texts in sorted(found.items())}

    def row(self, index: int) -> dict[str, Any]:
        """One row."""
        return self.take([index])[0]

    def take(self, indices: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Rows, in the order asked for."""
        return self.rows.take(pa.array(indices, pa.int64())).to_pylist()


def read_manifest(root: str, data: Data) -> Manifest:
    """Reads what a stage learns from out of a dataset that `pipelines/` made.

    Raises:
        DatasetError: It is no dataset, or nothing in it can be learnt from: what is lacking.
    """
    identity(root)
    clips = _clips(root, data)
    found, left_out = (_pairs if data.table == "pairs" else _captioned)(root, data, clips)
    found, left_out = _told(root, data, found, left_out)
    bucket = bucket_of(found, data)
    if not (bucket >= 0).any():
        raise DatasetError(f"{root}: {_unfitting(found, data)}")
    left_out["fits no bucket"] = int((bucket < 0).sum())
    if left_out["fits no bucket"]:
        found, bucket = found.filter(pa.array(bucket >= 0)), bucket[bucket >= 0]
    order = pc.sort_indices(found["sample_id"])
    found, bucket = _taken(found, order), bucket[order.to_numpy()]
    return Manifest(
        root=root,
        rows=found.drop_columns(["sha256"]),
        bucket=bucket,
        hash=_hash(found, bucket, data),
        left_out={reason: count for reason, count in left_out.items() if count},
    )


def bucket_of(rows: pa.Table, data: Data) -> np.ndarray:
    """Which bucket each row goes to, int16; -1 is none.

    Pictures go to buckets of a single frame. A video goes to the longest bucket that it fills:
    from the first frame taken to the last is no longer than it, within half a frame of the source,
    and it has as many frames. Among those of one length the nearest in aspect is chosen.
    """
    is_picture = pc.equal(rows["media"], "image").to_numpy()
    duration_s, fps, num_frames = (
        pc.fill_null(pc.cast(rows[n], pa.float64()), 0.0).to_numpy()
        for n in ("duration_s", "fps", "num_frames")
    )
    aspect = np.log(_floats(rows["width_px"]) / _floats(rows["height_px"]))
    slack_s = np.divide(0.5, fps, out=np.zeros_like(fps), where=fps > 0)
    chosen = np.full(rows.num_rows, -1, np.int16)
    length = np.zeros(rows.num_rows, np.int64)
    distance = np.full(rows.num_rows, np.inf)
    for index, bucket in enumerate(data.buckets):
        away = np.abs(aspect - np.log(bucket.width_px / bucket.height_px))
        fits = np.ones(rows.num_rows, bool)
        if bucket.frames > 1:
            fits = ~is_picture & (duration_s + slack_s >= (bucket.frames - 1) / data.fps)
            fits &= num_frames >= bucket.frames
        nearer = (bucket.frames == length) & (away < distance)
        better = fits & ((bucket.frames > length) | nearer)
        chosen[better], length[better], distance[better] = index, bucket.frames, away[better]
    return chosen


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(pc.cast(column, pa.float64()), 1.0).to_numpy()


# Reading


def _clips(root: str, data: Data) -> pa.Table:
    """Kept clips, with the content hash and place of their source, and whether it is gone."""
    texts = ("caption", "caption_original") if data.table == "clips" else ()
    clips = _read(root, "clips", (*_OF_CLIP, *texts), "kept")
    sources = _read(root, "sources", ("source_id", "uri", "sha256", "missing"))
    place = pc.index_in(clips["source_id"], sources["source_id"])
    gone = pc.fill_null(sources["missing"].take(place), False)
    media = pc.fill_null(clips["media"].cast(pa.string()), "video").dictionary_encode()
    clips = clips.set_column(clips.column_names.index("media"), "media", media)
    return (
        clips.append_column("source_uri", sources["uri"].take(place))
        .append_column("sha256", sources["sha256"].take(place))
        .append_column("gone", pc.or_(gone, pc.is_null(place)))
    )


def _pairs(root: str, data: Data, clips: pa.Table) -> tuple[pa.Table, dict[str, int]]:
    """Kept pairs of kept clips."""
    quoted = ", ".join(f"'{name}'" for name in data.instructions)
    which = f"instruction IN ({quoted})"
    pairs, num_all = None, 0
    if "pairs.lance" in storage.names_in(root):  # else an earlier version made the dataset
        pairs = _read(root, "pairs", ("pair_id", "clip_id", *_TEXTS), f"kept AND {which}")
        num_all = read(root, "pairs").count_rows(filter=which)
    if pairs is None or not pairs.num_rows:
        beside = f" ({num_all} are not kept)" if num_all else ""
        raise DatasetError(
            f"{root} has no kept pairs of {' or '.join(data.instructions)}{beside}: make them with"
            f" `python pipelines/recaption.py --src {root} --instruction {data.instructions[0]}`"
        )
    left_out = {"not kept": num_all - pairs.num_rows}
    place = pc.index_in(pairs["clip_id"], clips["clip_id"])
    there = pc.is_valid(place)
    left_out["clip not kept"] = len(there) - pc.sum(there).as_py()
    if left_out["clip not kept"]:
        pairs, place = pairs.filter(there), place.drop_null()
    found = _taken(clips, place)
    for name in ("pair_id", *_TEXTS):
        found = found.append_column(name, pairs[name])
    return found.append_column("sample_id", pairs["pair_id"]), left_out


def _captioned(root: str, data: Data, clips: pa.Table) -> tuple[pa.Table, dict[str, int]]:
    """Kept clips, their caption in the place of what was rephrased."""
    if not clips.num_rows:
        raise DatasetError(
            f"{root} has no kept clips: loosen its thresholds with"
            f" `python pipelines/refilter.py --dst {root} --set COLUMN.BOUND=VALUE`"
        )
    nothing = pa.nulls(clips.num_rows, pa.large_string())
    found = clips.append_column("sample_id", clips["clip_id"]).append_column("pair_id", nothing)
    for name in ("instruction", "instruction_text", "language"):
        found = found.append_column(name, nothing.dictionary_encode())
    names = {"caption": "rephrased", "caption_original": "original"}
    found = found.rename_columns([names.get(n, n) for n in found.column_names])
    num_all = read(root, "clips").count_rows()
    return found, {"not kept": num_all - clips.num_rows}


def _told(
    root: str, data: Data, found: pa.Table, left_out: dict[str, int]
) -> tuple[pa.Table, dict[str, int]]:
    """Rows of the media asked for whose source is there and whose texts are."""
    needed = ("original", "rephrased") if data.table == "pairs" else ("rephrased",)
    reasons: dict[str, Callable[[], Any]] = {
        "another medium": lambda: pc.is_in(found["media"].cast(pa.string()), pa.array(data.media)),
        "source gone": lambda: pc.invert(found["gone"]),
    }
    for name in needed:
        reasons[f"no text ({name})"] = lambda name=name: pc.greater(
            pc.fill_null(pc.binary_length(found[name]), 0), 0
        )
    num = found.num_rows
    for reason, passes in reasons.items():
        passed = passes()
        left_out[reason] = found.num_rows - (pc.sum(passed).as_py() or 0)
        if left_out[reason]:  # a filter copies, and there may be 12 million rows
            found = found.filter(passed)
    if not found.num_rows:
        said = ", ".join(f"{n} {reason}" for reason, n in left_out.items() if n)
        raise DatasetError(
            f"{root}: none of {num} kept {data.table} can be learnt from ({said}): "
            "look at them with `python pipelines/report.py`, and see `Data.media`"
        )
    columns = ("sample_id", "pair_id", "clip_id", "source_id", "source_uri", *_OF_CLIP[2:], *_TEXTS)
    return found.select([*columns, "sha256"]), left_out


def _read(root: str, name: str, columns: Sequence[str], which: str | None = None) -> pa.Table:
    """Columns of a table; texts may be more than 2 GiB in all, and what repeats is kept once."""
    scanner = read(root, name).scanner(columns=list(columns), filter=which)
    schema = pa.schema([pa.field(f.name, _kept_as(f)) for f in scanner.projected_schema])
    parts, batches = [pa.Table.from_batches([], schema)], list[pa.RecordBatch]()
    for batch in scanner.to_batches():
        columns = [_encoded(c, f.type) for c, f in zip(batch.columns, schema, strict=True)]
        batches.append(pa.record_batch(columns, schema=schema))
        if len(batches) == _BATCHES_AT_ONCE:
            parts.append(_copied(batches))
            batches = []
    parts.append(_copied(batches) if batches else parts[0])
    return pa.concat_tables(parts).unify_dictionaries()


def _copied(batches: Sequence[pa.RecordBatch]) -> pa.Table:
    """Batches as one: what was read beside a column is held by it until it is copied."""
    return pa.Table.from_batches(batches).unify_dictionaries().combine_chunks()


def _kept_as(column: pa.Field) -> pa.DataType:
    if not pa.types.is_string(column.type):
        return column.type
    text = pa.large_string()
    return pa.dictionary(pa.int32(), text) if column.name in _REPEATED else text


def _encoded(column: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(kind):
        return column.cast(kind.value_type).dictionary_encode()
    return column.cast(kind)


def _taken(rows: pa.Table, indices: pa.Array | pa.ChunkedArray) -> pa.Table:
    return rows.take(indices).combine_chunks()


# What it comes to


def _unfitting(found: pa.Table, data: Data) -> str:
    """One line that says why no row fits."""
    videos = found.filter(pc.not_equal(found["media"].cast(pa.string()), "image"))
    num_pictures = found.num_rows - videos.num_rows
    there = [f"{num_pictures} images"] if num_pictures else []
    if videos.num_rows:
        least, most = pc.min_max(videos["duration_s"]).as_py().values()
        frames = pc.max(videos["num_frames"]).as_py()
        there.append(
            f"{videos.num_rows} videos of {least:.2f} to {most:.2f} s and at most {frames} frames"
        )
    shortest: Bucket = min(data.buckets, key=lambda b: b.frames)
    needs_s = (shortest.frames - 1) / data.fps
    return (
        f"no sample fits a bucket: the shortest, {shortest}, takes videos from {needs_s:.2f} s"
        f" ({data.fps:g} frames/s) and of {shortest.frames} frames on, and there are"
        f" {' and '.join(there)}; choose shorter buckets or another rate"
    )


def _hash(rows: pa.Table, bucket: np.ndarray, data: Data) -> str:
    """SHA-256 of the values, in the order of the ids, however Arrow holds them."""
    digest = hashlib.sha256(json.dumps(plain(data), sort_keys=True).encode())
    for name in ("sample_id", *_OF_SPAN, *_TEXTS, "sha256"):
        values, lengths = hashlib.sha256(), hashlib.sha256()
        for part in _parts(rows[name]):
            if pa.types.is_dictionary(part.type):
                part = _canonical(part, values)
            if not pa.types.is_large_string(part.type):
                values.update(np.ascontiguousarray(_floats(part)).tobytes())
                continue
            lengths.update(pc.fill_null(pc.binary_length(part), -1).to_numpy().tobytes())
            text = pc.fill_null(part, "")
            _, offsets, content = text.buffers()
            ends = np.frombuffer(offsets, np.int64)[text.offset : text.offset + len(text) + 1]
            if content is not None:
                values.update(memoryview(content)[int(ends[0]) : int(ends[-1])])
        digest.update(f"{name}:{values.hexdigest()}:{lengths.hexdigest()}".encode())
    digest.update(bucket.astype("<i2").tobytes())
    return digest.hexdigest()


def _canonical(part: pa.DictionaryArray, values: Any) -> pa.Array:
    """For each row the rank of its value among those of the part, which are hashed once each."""
    used = pc.unique(part).cast(pa.large_string())
    ranked = used.take(pc.sort_indices(used))
    values.update(json.dumps(ranked.to_pylist()).encode())
    of_entry = pc.index_in(part.dictionary, ranked)
    return pc.fill_null(of_entry.take(part.indices), -1)


def _parts(column: pa.ChunkedArray) -> Iterator[pa.Array]:
    for start in range(0, len(column), _ROWS_AT_ONCE):
        part = column.slice(start, _ROWS_AT_ONCE)
        yield pa.concat_arrays(part.chunks)
