"""Which rows are the batch of a step: a pure function of (rows, seed, step), with no state.

Any step may be asked for in any order: to go on, a run needs the number of its next step alone.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")
_BLOCK = 4096
"""Steps of a cycle between two counts that are kept."""
_CYCLE = 1 << 20
"""Beside a bucket and an epoch no other seed has three numbers that end so."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The samples of a step."""

    bucket: int
    rows: np.ndarray
    """int64 (batch,): indices into the manifest."""
    variants: np.ndarray
    """int64 (batch,): which frame of a video, where it is a picture."""


class Plan:
    """The batches of a run.

    Each bucket has an endless stream of seeded permutations of its rows, cut into batches: nothing
    is dropped, and every row comes equally often, also in a bucket smaller than a batch. Buckets
    take turns in proportion to their rows: exactly so in each cycle of sum(rows) / gcd(rows) steps,
    in seeded random order within it.

    Args:
        bucket_of_row: int (rows,), from 0.
        batch: Samples in a step.
        seed: Of the run.
        variants: Frames of a video that take turns, one in each epoch.
    """

    def __init__(self, bucket_of_row: np.ndarray, batch: int, seed: int, variants: int = 1):
        if not len(bucket_of_row):
            raise ValueError("a plan needs at least one row, and there is none")
        if batch < 1 or variants < 1:
            raise ValueError(f"batch {batch} and variants {variants} must be at least 1")
        self.batch_size, self.seed, self.variants = batch, seed, variants
        self.num_rows = len(bucket_of_row)
        order = np.argsort(bucket_of_row, kind="stable")
        if self.num_rows < 2**31:
            order = order.astype(np.int32)
        self.buckets, starts = np.unique(bucket_of_row[order], return_index=True)
        self._rows = np.split(order, starts[1:])
        sizes = [len(rows) for rows in self._rows]
        self._turns = np.array(sizes) // math.gcd(*sizes)
        self.cycle = int(self._turns.sum())
        """Steps after which the buckets' shares are exact."""
        self._lock = threading.Lock()
        self._permutations = [
            _Recent(2) for _ in sizes
        ]  # small buckets must not push out large ones
        self._cycles = _Recent(2)

    def batch(self, step: int) -> Batch:
        """The samples of a step, from 0."""
        with self._lock:
            which, number = self._turn(step)
            rows, epochs = self._stream(which, number * self.batch_size)
        return Batch(int(self.buckets[which]), rows, (epochs + rows) % self.variants)

    def epoch(self, step: int) -> float:
        """How often a row has come before a step, on average."""
        return step * self.batch_size / self.num_rows

    def _turn(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many steps it had before."""
        cycle, place = divmod(step, self.cycle)
        turns = self._turns
        if len(turns) == 1:
            return 0, step
        order, counts = self._cycles.get(cycle, lambda: self._order(cycle))
        which = int(order[place])
        block = place // _BLOCK
        rank = int(counts[block, which])
        rank += int(np.count_nonzero(order[block * _BLOCK : place] == which))
        return which, int(cycle * turns[which] + rank)

    def _order(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """The buckets of a cycle's steps, and how often each came before every `_BLOCK` steps."""
        order = np.repeat(np.arange(len(self._turns), dtype=np.int16), self._turns)
        np.random.default_rng([self.seed, _CYCLE, cycle]).shuffle(order)
        blocks = [order[start : start + _BLOCK] for start in range(0, len(order), _BLOCK)]
        each = [np.bincount(block, minlength=len(self._turns)) for block in blocks]
        return order, np.cumsum([np.zeros_like(each[0]), *each], axis=0)

    def _stream(self, which: int, start: int) -> tuple[np.ndarray, np.ndarray]:
        """A batch out of a bucket's stream, and the epoch of each of its rows."""
        size, stop = len(self._rows[which]), start + self.batch_size
        rows, epochs = [], []
        while start < stop:
            epoch, first = divmod(start, size)
            last = min(size, first + stop - start)
            order = self._permutations[which].get(
                epoch, lambda epoch=epoch: self._permutation(which, epoch)
            )
            rows.append(order[first:last])
            epochs.append(np.full(last - first, epoch))
            start += last - first
        return np.concatenate(rows).astype(np.int64), np.concatenate(epochs)

    def _permutation(self, which: int, epoch: int) -> np.ndarray:
        bucket = int(self.buckets[which])
        return np.random.default_rng([self.seed, bucket, epoch]).permutation(self._rows[which])


class _Recent:
    """A few values that are dear to make: those that were asked for last."""

    def __init__(self, most: int):
        self._most = most
        self._values: OrderedDict[int, object] = OrderedDict()

    def get(self, key: int, make: Callable[[], T]) -> T:
        if key not in self._values:
            if len(self._values) >= self._most:
                self._values.popitem(last=False)
            self._values[key] = make()
        self._values.move_to_end(key)
        return self._values[key]  # type: ignore[return-value] - what `make` gave
