"""Cached outputs of frozen encoders: their names, their bytes, and reading them.

A feature is named by what it was computed from (a clip's frames as they are taken, or a text), by
its kind, and by the fingerprint of its encoder and of all before it. One of another encoder, frame
rate or text has another name: it is never taken for today's.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import threading
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine import storage
from engine.tables import read
from engine.worker import NAMESPACE
from trainers import frames
from trainers.dataset import Manifest
from trainers.system import Bucket, Data, Encoder, Sample

if TYPE_CHECKING:
    from torch import Tensor

_VERSION_BITS = np.uint64(0xF000)  # of a uuid, in its first eight bytes
_VERSION_5 = np.uint64(0x5000)
_HEX_DIGITS = [i for i in range(18) if i not in (8, 13)]  # of the first eight bytes, as text
_TEXTS = ("instruction_text", "language", "original", "rephrased")
_NAMED_BY = ("sample_id", "clip_id", "media")
_ROWS_AT_ONCE = 65_536


# Names


def place_of(encoder: Encoder, sample: Sample, data: Data) -> str:
    """What of its subject a feature was computed from.

    For frames the bucket, with the rate or which of the pictures of a video; an image has one. For
    texts their hash: a pair keeps its id when it is rephrased anew.
    """
    row, bucket = sample.row, sample.bucket
    if encoder.of == "pair":
        instruction = _digest(row["instruction_text"] or "")
        texts = [instruction, *(row[name] or "" for name in _TEXTS[1:])]
        return _digest(",".join(str(len(text)) for text in texts) + ":" + "".join(texts))
    if bucket.frames > 1:
        return f"{bucket} {data.fps:g} fps"
    return str(bucket) if row["media"] == "image" else f"{bucket} {sample.variant}/{data.variants}"


@lru_cache(maxsize=256)
def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def subject_of(encoder: Encoder, row: Mapping[str, Any]) -> str:
    """The clip or pair that a feature is of; a clip's caption is the clip's."""
    return row["clip_id"] if encoder.of == "clip" else row["sample_id"]


def variant_of(row: Mapping[str, Any], bucket: Bucket, variant: int) -> int:
    """The variant of a sample: what is no picture of a video has one only."""
    return 0 if bucket.frames > 1 or row["media"] == "image" else variant


def fingerprints(encoders: Sequence[Encoder]) -> dict[str, str]:
    """By kind what a feature depends on: its encoder, and those it needs, down to the pixels."""
    versions = [importlib.metadata.version(name).split(".")[:2] for name in frames.LIBRARIES]
    found = {"pixels": json.dumps([frames.VERSION, versions])}
    for encoder in encoders:
        needs = {name: found[name] for name in sorted(encoder.needs)}
        assert encoder.of == "clip" or "pixels" not in needs, f"{encoder.kind}: pixels are a clip's"
        words = json.dumps([encoder.fingerprint, needs])
        found[encoder.kind] = hashlib.sha256(words.encode()).hexdigest()[:16]
    del found["pixels"]
    return found


def feature_id(name: str) -> str:
    """The id of a feature by its name."""
    return str(uuid.uuid5(NAMESPACE, name))


@dataclass(frozen=True)
class Namer:
    """Names features of one encoder."""

    encoder: Encoder
    fingerprint: str
    data: Data

    def name(self, sample: Sample) -> str:
        """The name of a sample's feature."""
        subject = subject_of(self.encoder, sample.row)
        place = place_of(self.encoder, sample, self.data)
        return f"{subject}:{self.encoder.kind}:{place}:{self.fingerprint}"


def keys_of(names: Iterable[str]) -> np.ndarray:
    """uint64: the first eight bytes of the ids of features with these names."""
    salt = hashlib.sha1(NAMESPACE.bytes)
    digests = []
    for name in names:
        digest = salt.copy()
        digest.update(name.encode())
        digests.append(digest.digest()[:8])
    keys = np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)
    return keys & ~_VERSION_BITS | _VERSION_5


def _keys_of_ids(ids: pa.Array) -> np.ndarray:
    """The same, read out of a column of ids."""
    text = ids.cast(pa.string())
    if not len(text):
        return np.empty(0, np.uint64)
    _, offsets, content = text.buffers()
    start = np.frombuffer(offsets, np.int32)[text.offset]
    characters = np.frombuffer(content, np.uint8)[start : start + 36 * len(text)].reshape(-1, 36)
    digits = characters[:, _HEX_DIGITS]
    nibbles = np.where(digits >= ord("a"), digits - (ord("a") - 10), digits - ord("0"))
    eight = (nibbles[:, ::2] << 4 | nibbles[:, 1::2]).astype(np.uint8)
    return np.ascontiguousarray(eight).view(">u8").ravel().astype(np.uint64)


# Computing


def to_compute(
    have: Collection[str], encoders: Sequence[Encoder], wanted: Collection[str]
) -> list[Encoder]:
    """The encoders to run for the kinds wanted, in order, where some features are there already."""
    kinds, found = set(wanted), []
    for encoder in reversed(encoders):
        if encoder.kind in kinds and encoder.kind not in have:
            found.append(encoder)
            kinds |= set(encoder.needs)
    return found[::-1]


def complete(
    samples: Sequence[Sample],
    encoders: Sequence[Encoder],
    kinds: Collection[str],
    function: Callable[[Encoder], Callable[[Sequence[Sample]], list[Tensor]]],
) -> None:
    """Computes the features of these kinds that samples of one bucket lack.

    Args:
        samples: With `pixels` where they are needed.
        encoders: Each after those it needs.
        kinds: Wanted.
        function: What an encoder's `on` gave.
    """
    import torch

    needed = {id(s): {e.kind for e in to_compute(s.features, encoders, kinds)} for s in samples}
    for encoder in encoders:
        lacking = [s for s in samples if encoder.kind in needed[id(s)]]
        if lacking:
            with torch.no_grad():
                found = function(encoder)(lacking)
            for sample, tensor in zip(lacking, found, strict=True):
                sample.features[encoder.kind] = tensor


def needs_pixels(sample: Sample, encoders: Sequence[Encoder], kinds: Collection[str]) -> bool:
    """Whether a sample must be decoded to have features of these kinds."""
    if "pixels" in sample.features:
        return False
    return any("pixels" in e.needs for e in to_compute(sample.features, encoders, kinds))


# Tensors as bytes


def to_bytes(tensor: Tensor) -> tuple[str, list[int], bytes]:
    """A tensor's dtype as torch names it, its shape, and its bits in order of rows."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    name = str(tensor.dtype).removeprefix("torch.")
    return name, list(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def from_bytes(dtype: str, shape: Sequence[int], data: bytes | memoryview) -> Tensor:
    """The tensor with these bits, on the CPU."""
    import torch

    kind, size = getattr(torch, dtype), list(shape)
    if not len(data):
        return torch.empty(size, dtype=kind)
    held = np.frombuffer(data, np.uint8).copy()
    return torch.from_numpy(held).view(kind).reshape(size)


# Reading


@dataclass(frozen=True, kw_only=True)
class Found:
    """Features of one fingerprint in one version of the table."""

    keys: np.ndarray
    """uint64, ascending."""
    offsets: np.ndarray
    """Where the row with each key lies in the table."""
    failed: pa.Table
    """`feature_id` and `error_transient` of what could not be computed."""


def scan(root: str, wanted: Collection[str]) -> tuple[lance.LanceDataset | None, dict[str, Found]]:
    """The table, and what is in it by fingerprint; None where a dataset has none yet."""
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {f: [] for f in wanted}
    failed: dict[str, list[pa.Table]] = {f: [] for f in wanted}
    table = None
    if "features.lance" in storage.names_in(root):
        table = read(root, "features")
        columns = ["feature_id", "fingerprint", "error_type", "error_transient"]
        offset = 0
        for batch in table.scanner(columns=columns, batch_size=_ROWS_AT_ONCE).to_batches():
            there = pc.unique(batch["fingerprint"]).to_pylist()
            for fingerprint in (f for f in wanted if f in there):
                of_it = pc.equal(batch["fingerprint"], fingerprint)
                good = pc.and_(of_it, pc.is_null(batch["error_type"]))
                keys = _keys_of_ids(batch["feature_id"].filter(good))
                parts[fingerprint].append((keys, offset + np.flatnonzero(good.to_numpy(False))))
                bad = pc.and_(of_it, pc.is_valid(batch["error_type"]))
                rows = pa.Table.from_batches([batch]).select(["feature_id", "error_transient"])
                failed[fingerprint].append(rows.filter(bad))
            offset += batch.num_rows
    return table, {f: _sorted(parts[f], failed[f]) for f in wanted}


def _sorted(parts: Sequence[tuple[np.ndarray, np.ndarray]], failed: Sequence[pa.Table]) -> Found:
    keys = np.concatenate([np.empty(0, np.uint64), *(k for k, _ in parts)])
    offsets = np.concatenate([np.empty(0, np.int64), *(o for _, o in parts)])
    order = np.argsort(keys)
    nothing = pa.table({"feature_id": pa.array([], pa.string()),
                        "error_transient": pa.array([], pa.bool_())})  # fmt: skip
    return Found(
        keys=keys[order], offsets=offsets[order], failed=pa.concat_tables([nothing, *failed])
    )


class Cache:
    """Features of one encoder as they were when it was opened; safe for several threads.

    Args:
        root: The dataset.
        namer: Of its features.
        table: The features, or None where there are none.
        found: Which are this encoder's.
        manifest: Whose share of cached features is wanted.
    """

    def __init__(
        self,
        root: str,
        namer: Namer,
        table: lance.LanceDataset | None,
        found: Found,
        manifest: Manifest | None = None,
    ):
        self.root, self.namer, self._manifest = root, namer, manifest
        self._open = table, found
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open[1].keys)

    def get(self, samples: Sequence[Sample]) -> list[Tensor | None]:
        """The feature of each sample on the CPU, None where it is not cached."""
        ids = [self.namer.name(sample) for sample in samples]
        before = self._open
        try:
            return self._read(ids)
        except (OSError, ValueError):  # its files went with old versions of the table
            with self._lock:
                if self._open is before:
                    fingerprint = self.namer.fingerprint
                    table, found = scan(self.root, [fingerprint])
                    self._open = table, found[fingerprint]
            return self._read(ids)

    def _read(self, names: Sequence[str]) -> list[Tensor | None]:
        table, found = self._open
        tensors: list[Tensor | None] = [None] * len(names)
        if table is None or not len(found.keys) or not names:
            return tensors
        keys = keys_of(names)
        at = np.minimum(np.searchsorted(found.keys, keys), len(found.keys) - 1)
        hits = np.flatnonzero(found.keys[at] == keys)
        if not len(hits):
            return tensors
        offsets, back = np.unique(found.offsets[at[hits]], return_inverse=True)
        rows = table.take(offsets.tolist(), columns=["feature_id", "dtype", "shape", "data"])
        columns = [rows[name].combine_chunks() for name in rows.column_names]
        for hit, row in zip(hits, back, strict=True):
            stored_id, dtype, shape, data = (column[int(row)] for column in columns)
            if stored_id.as_py() == feature_id(names[hit]):
                tensors[hit] = from_bytes(
                    dtype.as_py(), shape.as_py(), memoryview(data.as_buffer())
                )
        return tensors

    @cached_property
    def coverage(self) -> float:
        """Share of the manifest's samples, in all their variants, whose feature is cached."""
        if self._manifest is None:
            raise ValueError("coverage needs the manifest: open the cache with one")
        keys = keys_of(names_of(self._manifest, self.namer))
        return float(np.isin(keys, self._open[1].keys).mean()) if len(keys) else 0.0


def names_of(manifest: Manifest, namer: Namer) -> Iterator[str]:
    """Names of one encoder's features: of every sample in each of its variants."""
    texts = _TEXTS if namer.encoder.of == "pair" else ()
    rows = manifest.rows.select([*_NAMED_BY, *texts])
    return (namer.name(sample) for sample in _samples(rows, manifest.bucket, namer.data))


def samples_of(manifest: Manifest, data: Data) -> Iterator[Sample]:
    """Every sample of a manifest in each of its variants."""
    return _samples(manifest.rows, manifest.bucket, data)


def _samples(rows: pa.Table, bucket_of_row: np.ndarray, data: Data) -> Iterator[Sample]:
    for start in range(0, rows.num_rows, _ROWS_AT_ONCE):
        some = rows.slice(start, _ROWS_AT_ONCE)
        columns = [column.to_pylist() for column in some.columns]
        places = bucket_of_row[start : start + _ROWS_AT_ONCE].tolist()
        for values, place in zip(zip(*columns, strict=True), places, strict=True):
            row = dict(zip(rows.column_names, values, strict=True))
            bucket = data.buckets[place]
            for variant in range(1 + variant_of(row, bucket, data.variants - 1)):
                yield Sample(row, bucket, variant)


def open_caches(
    root: str, encoders: Sequence[Encoder], manifest: Manifest | None, data: Data
) -> dict[str, Cache]:
    """By kind the cache of each encoder, an empty one where nothing of it is cached.

    Args:
        root: The dataset.
        encoders: Each after those it needs.
        manifest: For `Cache.coverage`.
        data: How frames are taken.
    """
    known = fingerprints(encoders)
    table, found = scan(root, list(known.values()))
    return {
        e.kind: Cache(root, Namer(e, known[e.kind], data), table, found[known[e.kind]], manifest)
        for e in encoders
    }
