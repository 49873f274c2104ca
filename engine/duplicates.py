"""Near-duplicates of a whole dataset: which clips are the same, and which of them stays.

Clips are taken in order of preference; one is a duplicate where it matches a clip kept before it.
So every duplicate points to a kept clip that it matches itself, no two kept clips match (of those
whose match is looked up: see `settle`), and neither the order of rows nor of arrival counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.nearest import Hyperplanes, Pairs, Tables, TooManyError, across, gathered, within
from engine.phash import FLAT

_LEAF = 256
"""So few clips are compared with each other whatever it takes."""
_SPARE = 2**21
"""Pairs compared at once, beside eight a clip."""
_CHUNK = 2**18
_VECTORS = 2048
_ROUNDING = 1e-9
_PAIRS_TO_A_MATCH = 64
"""Directions share keys by chance much more often than they match."""


@dataclass(frozen=True, kw_only=True)
class Distinct:
    """Which clips count as the same: those that either test says are.

    Both are of one medium, and neither lasts less than `overlap` of the other.
    """

    phash_bits: int | None = 6
    """Greatest mean Hamming distance of the keyframes' hashes, one sequence laid along the other
    where they agree best, with at least `overlap` of the longer one covered. Keyframes too flat
    to have a hash are left out; half of those covered must have one. None: not by hash."""
    cosine: float | None = None
    """Least cosine of the clips' stored embeddings. None: not by embedding."""
    overlap: float = 0.8
    """Share of the longer clip, in time and in keyframes, that the shorter one must have."""

    def __post_init__(self) -> None:
        if self.phash_bits is not None and not 0 <= self.phash_bits <= 16:
            raise ValueError(f"phash_bits must be from 0 to 16, and is {self.phash_bits}")
        if self.cosine is not None and not 0.5 <= self.cosine <= 1:
            raise ValueError(f"cosine must be from 0.5 to 1, and is {self.cosine}")
        if not 0.5 <= self.overlap <= 1:
            raise ValueError(f"overlap must be from 0.5 to 1, and is {self.overlap}")

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of `clips` that `settle` needs."""
        by_hash = () if self.phash_bits is None else ("phashes",)
        by_embedding = () if self.cosine is None else ("clip_embedding",)
        return (*_FACTS, *by_hash, *by_embedding)


_FACTS = ("clip_id", "media", "duration_s", "width_px", "height_px", "num_frames")


def settle(clips: pa.Table, distinct: Distinct) -> pa.Array:
    """For each clip, in order, the clip_id of the kept one that stands for it; null: it is kept.

    Preferred is the clip with more pixels a frame, then the longer one, then the one with more
    frames, then the one with the smaller clip_id. By hash every match is found; by embedding all
    but the share that `engine.nearest.Hyperplanes` states, and those that it misses it misses
    again. What has no hash or no embedding is no duplicate by it.

    A million clips with five hashes each take about 35 s of one core and 1 GB, and two minutes
    where a fifth of them are one title card. Embeddings need memory for two copies of them, and
    time that depends on how alike they are. Time grows with the square of the clips that share a
    picture (an intro) and are otherwise different; memory does not.

    Args:
        clips: What would be kept otherwise, with `distinct.columns`; clip_ids are unique.
        distinct: What counts as the same.
    """
    order = _preference(clips)
    keeper = np.full(len(order), -1, np.int64)
    media = pc.fill_null(clips["media"], "video").combine_chunks().dictionary_encode()
    codes = media.indices.to_numpy()[order]
    lasts = _numbers(clips["duration_s"])[order]
    tests: list[_Test] = []
    if distinct.phash_bits is not None:
        tests.append(_ByHash(clips["phashes"], order, lasts, distinct))
    if distinct.cosine is not None:
        tests.append(_ByEmbedding(clips["clip_embedding"], order, lasts, distinct))
    for code in range(len(media.dictionary)):
        _Settling(tests, keeper).kept(np.flatnonzero(codes == code))
    ids = clips["clip_id"].combine_chunks()
    stands = np.full(len(order), -1, np.int64)
    stands[order] = np.where(keeper < 0, -1, order[keeper])
    return ids.take(pa.array(stands, mask=stands < 0))


def _preference(clips: pa.Table) -> np.ndarray:
    area = pc.multiply(clips["width_px"].cast(pa.int64()), clips["height_px"].cast(pa.int64()))
    facts = [area, clips["duration_s"], clips["num_frames"], clips["clip_id"]]
    names = ["area", "duration_s", "num_frames", "clip_id"]
    keys = [*((name, "descending") for name in names[:3]), ("clip_id", "ascending")]
    return pc.sort_indices(pa.table(facts, names), sort_keys=keys).to_numpy().astype(np.int64)


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Null is not a number."""
    return column.cast(pa.float64()).combine_chunks().to_numpy(zero_copy_only=False)


class _Settling:
    """Takes clips in order of preference, many at a time.

    Where too many of them match (thousands of title cards, a camera that never moves) they are
    halved: what is kept of the first half takes most of the second away, before that is compared
    with itself.
    """

    def __init__(self, tests: list[_Test], keeper: np.ndarray):
        self._tests, self._keeper = tests, keeper

    def kept(self, rows: np.ndarray) -> np.ndarray:
        """Those that stay of ascending `rows`, none of which matches a clip kept before them."""
        budget = math.inf if len(rows) <= _LEAF else 8 * len(rows) + _SPARE
        try:
            found = [_packed(*pair) for test in self._tests for pair in test.within(rows, budget)]
        except TooManyError:
            middle = len(rows) // 2
            first = self.kept(rows[:middle])
            return np.concatenate([first, self.kept(self._others(rows[middle:], first))])
        edges = np.unique(np.concatenate(found)) if found else np.empty(0, np.uint64)
        keeper = self._keeper
        # Ascending by the later clip, so the earlier one of a pair is settled when it is looked at.
        for edge in edges.tolist():
            later, earlier = edge >> 32, edge & 0xFFFFFFFF
            if keeper[later] < 0 and keeper[earlier] < 0:
                keeper[later] = earlier
        return rows[keeper[rows] < 0]

    def _others(self, rows: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """Those of `rows` that match none of `kept`."""
        best = np.full(len(self._keeper), len(self._keeper))
        for test in self._tests:
            for row, match in test.across(rows, kept):
                np.minimum.at(best, row, match)
        matched = best[rows] < len(best)
        self._keeper[rows[matched]] = best[rows[matched]]
        return rows[~matched]


def _packed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    later, earlier = np.maximum(first, second), np.minimum(first, second)
    return later.astype(np.uint64) << np.uint64(32) | earlier.astype(np.uint64)


class _Test:
    """One way in which clips match; numbers of clips are places in order of preference."""

    def __init__(self, lasts_s: np.ndarray, overlap: float):
        self._lasts_s, self._overlap = lasts_s, overlap

    def within(self, rows: np.ndarray, most: float) -> Iterator[Pairs]:
        """Matches among `rows`; raises TooManyError where more than `most` had to be compared."""
        raise NotImplementedError

    def across(self, rows: np.ndarray, others: np.ndarray) -> Iterator[Pairs]:
        """Matches of one of `rows` and one of `others`."""
        raise NotImplementedError

    def _as_long(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Whether durations are alike; images have none."""
        a, b = self._lasts_s[first], self._lasts_s[second]
        none = np.isnan(a) & np.isnan(b)
        return none | (np.minimum(a, b) >= self._overlap * np.maximum(a, b))


class _ByHash(_Test):
    """Mean Hamming distance of keyframe sequences.

    Where the mean over pairs of keyframes is at most so many bits, it is for one of the pairs: it
    is enough to look up every hash.
    """

    def __init__(
        self, phashes: pa.ChunkedArray, order: np.ndarray, lasts_s: np.ndarray, distinct: Distinct
    ):
        super().__init__(lasts_s, distinct.overlap)
        assert distinct.phash_bits is not None
        self._bits = distinct.phash_bits
        lists = phashes.cast(pa.large_list(pa.uint64())).combine_chunks()
        offsets = lists.offsets.to_numpy()
        self._hashes = pc.fill_null(lists.values, FLAT).to_numpy()
        lengths = np.where(lists.is_valid().to_numpy(zero_copy_only=False), np.diff(offsets), 0)
        self._starts, self._lengths = offsets[:-1][order], lengths[order]

    def within(self, rows: np.ndarray, most: float) -> Iterator[Pairs]:
        shown = self._shown(rows)
        tables = Tables.planned(len(shown.hashes), self._bits)
        # Keyframes of one clip are alike, and by chance some share a key: neither is a crowd.
        most = max(most, 16 * len(shown.hashes), 4 * tables.by_chance(len(shown.hashes)))
        compared = 0
        for pairs in gathered(shown.sharing(most)):
            yield self._alike(*pairs)
        for near in gathered(tables.near(shown.hashes, most=most)):
            for pairs in _products(near, shown, shown):
                compared += len(pairs[0])
                if compared > most:
                    raise TooManyError
                yield self._alike(*pairs)

    def across(self, rows: np.ndarray, others: np.ndarray) -> Iterator[Pairs]:
        shown, theirs = self._shown(rows), self._shown(others)
        tables = Tables.planned(max(len(shown.hashes), len(theirs.hashes)), self._bits)
        for near in gathered(tables.near(shown.hashes, theirs.hashes)):
            for pairs in _products(near, shown, theirs):
                yield self._alike(*pairs)

    def _shown(self, rows: np.ndarray) -> _Shown:
        lengths = self._lengths[rows]
        within_row = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        hashes = self._hashes[np.repeat(self._starts[rows], lengths) + within_row]
        clips = np.repeat(rows, lengths)[hashes != FLAT]
        return _Shown(hashes[hashes != FLAT], clips)

    def _alike(self, first: np.ndarray, second: np.ndarray) -> Pairs:
        """The pairs, out of these, that match."""
        likely = np.flatnonzero((first != second) & self._as_long(first, second))
        packed = np.sort(_packed(first[likely], second[likely]))
        packed = packed[np.r_[True, packed[1:] != packed[:-1]][: len(packed)]]
        # The later clip is the first of a pair here: `across` gives later rows first as well.
        first = (packed >> np.uint64(32)).astype(np.int64)
        second = (packed & np.uint64(2**32 - 1)).astype(np.int64)
        step = max(1, _CHUNK // max(1, int(self._lengths.max(initial=1))))
        same = [
            self._same(first[low : low + step], second[low : low + step])
            for low in range(0, len(first), step)
        ]
        found = np.concatenate(same) if same else np.empty(0, bool)
        return first[found], second[found]

    def _same(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Whether the sequences match where they agree best, bool (N,)."""
        long, short = self._lengths[first], self._lengths[second]
        least = np.ceil(np.round(self._overlap * np.maximum(long, short), 9))
        same = np.zeros(len(first), bool)
        reach = range(-int((short - least).max()), int((long - least).max()) + 1)
        for shift in sorted(reach, key=abs):
            covered = np.minimum(long, short + shift) - max(0, shift)
            left = np.flatnonzero((covered >= np.maximum(least, 1)) & ~same)
            if not len(left):
                continue
            along = np.arange(covered[left].max())
            inside = along < covered[left][:, None]
            a = self._at(first[left], max(0, shift), along)
            b = self._at(second[left], max(0, -shift), along)
            both = inside & (a != FLAT) & (b != FLAT)
            num = both.sum(1)
            apart = (np.bitwise_count(a ^ b) * both).sum(1, dtype=np.int64)
            same[left] = (2 * num >= covered[left]) & (apart <= self._bits * num)
        return same

    def _at(self, clips: np.ndarray, skip: int, along: np.ndarray) -> np.ndarray:
        places = self._starts[clips][:, None] + skip + along
        return self._hashes[np.minimum(places, len(self._hashes) - 1)]


class _Shown:
    """Different hashes, and the clips that show each."""

    def __init__(self, hashes: np.ndarray, clips: np.ndarray):
        order = np.lexsort((clips, hashes))
        hashes, clips = hashes[order], clips[order]
        new = np.r_[True, (hashes[1:] != hashes[:-1])] if len(hashes) else np.empty(0, bool)
        again = ~new[1:] & (clips[1:] == clips[:-1])  # a clip that shows it twice
        once = np.r_[np.ones(min(1, len(new)), bool), ~again]
        self.clips = clips[once]
        self._of = (np.cumsum(new) - 1)[once]
        self.hashes = hashes[new]
        self.begins = np.searchsorted(self._of, np.arange(len(self.hashes)))
        self.counts = np.bincount(self._of, minlength=len(self.hashes))

    def sharing(self, most: float) -> Iterator[Pairs]:
        """Pairs of clips that show the same hash."""
        order, found = within(self._of.astype(np.uint64), most)
        clips = self.clips[order]
        for first, second in found:
            yield clips[first], clips[second]


def _products(near: Pairs, shown: _Shown, theirs: _Shown) -> Iterator[Pairs]:
    """Each clip with the first hash of a pair beside each with the second, in chunks."""
    counts = theirs.counts[near[1]]
    ends = np.cumsum(shown.counts[near[0]] * counts)
    for low in range(0, int(ends[-1]), _CHUNK):
        product = np.arange(low, min(low + _CHUNK, int(ends[-1])))
        pair = np.searchsorted(ends, product, "right")
        left, right = near[0][pair], near[1][pair]
        rest = product - np.r_[0, ends][pair]
        first = shown.clips[shown.begins[left] + rest // counts[pair]]
        yield first, theirs.clips[theirs.begins[right] + rest % counts[pair]]


class _ByEmbedding(_Test):
    """Cosine of embeddings."""

    def __init__(
        self, column: pa.ChunkedArray, order: np.ndarray, lasts_s: np.ndarray, distinct: Distinct
    ):
        super().__init__(lasts_s, distinct.overlap)
        assert distinct.cosine is not None
        self._cosine = distinct.cosine
        lists = column.combine_chunks()
        width = lists.type.list_size
        values = lists.values.slice(lists.offset * width, len(lists) * width)
        self._vectors = values.to_numpy(zero_copy_only=False).reshape(-1, width)
        self._order = order
        with np.errstate(invalid="ignore"):
            norms = np.sqrt(np.einsum("ij,ij->i", self._vectors, self._vectors, dtype=np.float64))
            usable = lists.is_valid().to_numpy(zero_copy_only=False) & (norms > 0)
        self._usable = (usable & np.isfinite(norms))[order]
        planes = Hyperplanes(self._cosine, width)
        self._bound = planes.sketch_bound
        self._keys, self._sketches = planes.keys(self._vectors, order)

    def within(self, rows: np.ndarray, most: float) -> Iterator[Pairs]:
        rows = rows[self._usable[rows]]
        compared = 0
        for band in self._keys:
            order, found = within(band[rows].astype(np.uint64), _PAIRS_TO_A_MATCH * most)
            ranked = rows[order]
            sketches = self._sketches[:, ranked]
            for first, second in gathered(found):
                compared += len(first)
                if compared > _PAIRS_TO_A_MATCH * most:
                    raise TooManyError
                close = self._close(sketches, first, sketches, second)
                yield self._alike(ranked[first[close]], ranked[second[close]])

    def across(self, rows: np.ndarray, others: np.ndarray) -> Iterator[Pairs]:
        rows, others = rows[self._usable[rows]], others[self._usable[others]]
        for band in self._keys:
            keys, theirs = (band[some].astype(np.uint64) for some in (rows, others))
            order, their_order, found = across(keys, theirs)
            ranked, their_ranked = rows[order], others[their_order]
            left, right = self._sketches[:, ranked], self._sketches[:, their_ranked]
            for first, second in gathered(found):
                close = self._close(left, first, right, second)
                yield self._alike(ranked[first[close]], their_ranked[second[close]])

    def _close(
        self, left: np.ndarray, first: np.ndarray, right: np.ndarray, second: np.ndarray
    ) -> np.ndarray:
        """Which pairs are not surely too far apart: far cheaper than a cosine."""
        apart = np.zeros(len(first), np.uint16)
        for mine, theirs in zip(left, right, strict=True):
            apart += np.bitwise_count(mine[first] ^ theirs[second])
        return np.flatnonzero(apart <= self._bound)

    def _alike(self, first: np.ndarray, second: np.ndarray) -> Pairs:
        """The pairs, out of these, that match."""
        likely = self._as_long(first, second)
        first, second = first[likely], second[likely]
        found = np.zeros(len(first), bool)
        for low in range(0, len(first), _VECTORS):
            part = slice(low, low + _VECTORS)
            a = self._vectors[self._order[first[part]]].astype(np.float64)
            b = self._vectors[self._order[second[part]]].astype(np.float64)
            lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
            found[part] = np.einsum("ij,ij->i", a, b) >= (self._cosine - _ROUNDING) * lengths
        return first[found], second[found]
