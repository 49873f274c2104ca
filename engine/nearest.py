"""Look-up of near neighbours without comparing all with all: bit strings and directions.

Both cut what they look up into keys of which near ones surely, or very likely, share one, sort the
keys, and compare only what shares a key. Pairs come in chunks, so memory is bounded however many.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

Pairs = tuple[np.ndarray, np.ndarray]
"""Indices, int64 (N,) each."""

_ODD = np.uint64(0x9E3779B97F4A7C15)  # of 64-bit multiplicative hashing, Knuth vol. 3, 6.4
_HALF, _LOWER = np.uint64(32), np.uint64(2**32 - 1)
_CHUNK = 2**17  # fits a core's cache
_ROWS = 4096
_SEED = 20241203
_SORT_NS, _PAIR_NS = 25.0, 15.0
"""What a key costs to make and sort, and a pair to compare; only chooses the number of tables."""


class TooManyError(Exception):
    """More pairs share a key than the caller wants to look at."""


def within(keys: np.ndarray, most: float) -> tuple[np.ndarray, Iterator[Pairs]]:
    """All pairs with equal keys.

    Args:
        keys: Below 2^32, uint64 (N,).
        most: Pairs allowed.

    Returns:
        An order that sorts the keys, and pairs of different places in that order, in chunks.

    Raises:
        TooManyError: There are more.
    """
    ranked, order = _sorted(keys)
    same = ranked[1:] == ranked[:-1]
    sizes = np.diff(np.flatnonzero(np.r_[True, ~same, True]))
    if np.dot(sizes, sizes - 1) / 2 > most:
        raise TooManyError
    return order, _equal(ranked, np.flatnonzero(same))


def _equal(ranked: np.ndarray, left: np.ndarray) -> Iterator[Pairs]:
    """Pairs of places with equal keys; `left` are the places whose next one is equal."""
    for lag in itertools.count(1):
        if not len(left):
            return
        for begin in range(0, len(left), _CHUNK):
            part = left[begin : begin + _CHUNK]
            yield part, part + lag
        left = left[: np.searchsorted(left, len(ranked) - lag - 1)]
        left = left[ranked[left + (lag + 1)] == ranked[left]]


def across(keys: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray, Iterator[Pairs]]:
    """All pairs of one of `keys` and an equal one of `others`.

    Returns:
        An order that sorts each, and pairs of places in those orders, in chunks.
    """
    wanted, mine = _sorted(keys)
    ranked, theirs = _sorted(others)
    low = np.searchsorted(ranked, wanted, "left")
    high = np.searchsorted(ranked, wanted, "right")
    return mine, theirs, _between(low, high)


def _between(low: np.ndarray, high: np.ndarray) -> Iterator[Pairs]:
    """Each index with each place from its `low` up to before its `high`."""
    left = np.flatnonzero(low < high)
    for lag in itertools.count():
        if not len(left):
            return
        for begin in range(0, len(left), _CHUNK):
            part = left[begin : begin + _CHUNK]
            yield part, low[part] + lag
        left = left[low[left] + (lag + 1) < high[left]]


def _sorted(keys: np.ndarray) -> Pairs:
    """Keys in ascending order, and where each was: sorted as one number, several times faster."""
    packed = keys << _HALF
    packed |= np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    order = (packed & _LOWER).astype(np.int64)
    packed >>= _HALF
    return packed, order


def gathered(chunks: Iterator[Pairs]) -> Iterator[Pairs]:
    """The same pairs in fewer, larger chunks."""
    held: list[Pairs] = []
    num = 0
    for pairs in chunks:
        held.append(pairs)
        num += len(pairs[0])
        if num >= _CHUNK:
            yield _joined(held)
            held, num = [], 0
    if held:
        yield _joined(held)


def _joined(chunks: list[Pairs]) -> Pairs:
    first, second = zip(*chunks, strict=True)
    return np.concatenate(first), np.concatenate(second)


# Bit strings


@dataclass(frozen=True)
class Tables:
    """Keys of 64-bit strings such that any two within `bits` bits share one: no pair is missed.

    The 64 bits are cut into `blocks` bands. `bits` differing bits spoil at most as many bands, so
    at least `blocks - bits` bands are equal; there is a table for each choice of that many bands,
    whose key is those bands. With `blocks = bits + 1` that is the plain banded look-up.

    Source:
        Manku, Jain, Das Sarma, "Detecting Near-Duplicates for Web Crawling" (WWW 2007), section 3.
    """

    bits: int
    blocks: int

    @classmethod
    def planned(cls, num: int, bits: int) -> Tables:
        """The cheapest tables for `num` strings; which ones does not change what is found."""

        def cost(tables: Tables) -> float:
            each = num * _SORT_NS + tables.by_chance(num) * _PAIR_NS
            return math.comb(tables.blocks, bits) * each

        return min((cls(bits, blocks) for blocks in range(bits + 1, bits + 7)), key=cost)

    def by_chance(self, num: int) -> float:
        """Pairs of `num` random strings that share a key in a table."""
        return num * num / 2 * 2 ** (-64 * (self.blocks - self.bits) / self.blocks)

    def near(
        self, hashes: np.ndarray, others: np.ndarray | None = None, most: float = math.inf
    ) -> Iterator[Pairs]:
        """Each pair within `bits` bits once: of different `hashes`, or of one and one of `others`.

        Args:
            hashes: uint64 (N,), all different.
            others: uint64 (M,), all different.
            most: Pairs with an equal key allowed in a table.

        Raises:
            TooManyError: A table has more.
        """
        edges = [64 * i // self.blocks for i in range(self.blocks + 1)]
        bands = [np.uint64((1 << high) - (1 << low)) for low, high in itertools.pairwise(edges)]
        for chosen in itertools.combinations(range(self.blocks), self.blocks - self.bits):
            mask = np.bitwise_or.reduce([bands[i] for i in chosen])
            passed = [bands[i] for i in range(chosen[-1]) if i not in chosen]
            keys = (hashes & mask) * _ODD >> _HALF
            if others is None:
                mine, found = within(keys, most)
                left, theirs, right = hashes[mine], mine, hashes[mine]
            else:
                mine, theirs, found = across(keys, (others & mask) * _ODD >> _HALF)
                left, right = hashes[mine], others[theirs]
            for first, second in found:
                apart = left[first] ^ right[second]
                close = np.flatnonzero(np.bitwise_count(apart) <= self.bits)
                apart = apart[close]
                # A pair is in the table of its first equal bands, and in others: told only there.
                here = apart & mask == 0
                for band in passed:
                    here &= apart & band != 0
                close = close[here]
                if len(close):
                    yield mine[first[close]], theirs[second[close]]


# Directions


@dataclass(frozen=True)
class Hyperplanes:
    """Keys of vectors such that two with a cosine of `cosine` share one with 99 % probability.

    A bit says on which side of a random hyperplane a vector lies; it differs for two vectors with
    probability p = arccos(cosine) / pi. A band is as many bits as agree with probability 0.1 or
    more, at most 64, and there are as many bands as miss a pair with probability 0.01 or less.
    The closer, the fewer are missed: where `cosine` is 0.97 (43 bands of 28 bits), one in 300 at
    0.975 and one in 18 000 at 0.985. The planes depend on `cosine` and the width alone, never on
    the data: a pair that is missed once is missed always.

    Source:
        Charikar, "Similarity Estimation Techniques from Rounding Algorithms" (STOC 2002), 3.
    """

    cosine: float
    width: int

    @property
    def bits_each(self) -> int:
        """Bits of a band."""
        return max(1, min(64, int(math.log(0.1) / math.log1p(-self._differ))))

    @property
    def num_bands(self) -> int:
        """Bands."""
        agree = (1 - self._differ) ** self.bits_each
        return max(1, math.ceil(math.log(0.01) / math.log1p(-agree)))

    @property
    def _differ(self) -> float:
        return max(1e-3, math.acos(self.cosine) / math.pi)

    @property
    def sketch_bound(self) -> int:
        """Bits of 256 in which two vectors at `cosine` differ, and four standard deviations."""
        p = self._differ
        return math.ceil(256 * p + 4 * math.sqrt(256 * p * (1 - p)))

    def keys(self, vectors: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A key in each band, uint32 (bands, N), and 256 bits of other planes, uint64 (4, N).

        Args:
            vectors: float32 (M, width).
            order: Of which of them, int64 (N,).
        """
        each = self.bits_each
        rng = np.random.default_rng(_SEED)
        planes = rng.standard_normal((self.width, 256 + each * self.num_bands), np.float32)
        sketch = np.empty((4, len(order)), np.uint64)
        keys = np.empty((self.num_bands, len(order)), np.uint32)
        for low in range(0, len(order), _ROWS):
            part = slice(low, low + _ROWS)
            above = vectors[order[part]] @ planes > 0
            sketch[:, part] = np.packbits(above[:, :256], axis=1).view(np.uint64).T
            bits = np.zeros((len(above), self.num_bands, 64), bool)
            bits[:, :, :each] = above[:, 256:].reshape(len(above), self.num_bands, each)
            words = np.packbits(bits, axis=2).view(np.uint64)[:, :, 0]
            keys[:, part] = (words * _ODD >> _HALF).T
        return keys, sketch
