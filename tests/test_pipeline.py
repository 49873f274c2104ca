"""Units through Ray Data: whose workers die, and what becomes of the others."""

import os
import pickle
from typing import NamedTuple

import pyarrow as pa
import pytest

from engine.pipeline import Lost, settled


class Outcome(NamedTuple):
    unit: int
    square: int


class Deadly:
    """Squares numbers; some end the process that they come to."""

    def __init__(self, deadly: frozenset[int]):
        self.deadly = deadly

    def __call__(self, batch: pa.Table) -> pa.Table:
        found = []
        for unit in map(pickle.loads, batch["unit"].to_pylist()):
            if unit in self.deadly:
                os._exit(1)
            found.append(pickle.dumps(Outcome(unit, unit**2)))
        return pa.table({"outcome": found})


@pytest.mark.slow
def test_a_unit_on_which_workers_die_is_told_and_costs_no_other(connection: None) -> None:
    came = list(settled(range(6), frozenset({4}), actor=Deadly, workers=1, share=1.0, wait_s=0.5))
    assert Lost(4) in came and sum(isinstance(one, Lost) for one in came) == 1
    outcomes = [one for one in came if isinstance(one, Outcome)]
    assert sorted(outcomes) == [(n, n**2) for n in (0, 1, 2, 3, 5)]


def test_nothing_to_do_needs_no_ray() -> None:
    assert list(settled([], None, actor=Deadly, workers=1, share=1.0, wait_s=0.5)) == []
