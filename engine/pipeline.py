"""Units in, outcomes out: the Ray Data pipeline of a run, with its losses."""

from __future__ import annotations

import functools
import logging
import pickle
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data

from engine.worker import Reader, Unit

DEATHS_ALLOWED = 3
"""Times that an actor is started again for a block before the pipeline is given up."""
BUNDLE_UNITS, BUNDLE_BYTES = 16, 4 * 2**20
"""Where there are many, small sources go to a worker in bundles: Ray's bookkeeping is per bundle.
So are results: a bundle's come when the last of it is done."""
STARVED_AFTER_S = 60.0

_log = logging.getLogger(__name__)
_LOST_WORKER = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.NodeDiedError,
)


@dataclass(frozen=True)
class Lost:
    """A unit that has no outcome: workers die on it again and again, though it is alone."""

    unit: Any


def settled(units: Sequence[Any], job: Any, **options: Any) -> Iterator[Any]:
    """As `outcomes`, until every unit has an outcome or is `Lost`.

    Ray says that a worker was lost, not on what: what is left comes again in halves.

    Args:
        units: What to do; can be hashed. An outcome names its own as `unit`.
        job: What they share.
        options: See `outcomes`.
    """
    waves = deque([list(units)] if units else [])
    while waves:
        wave = waves.popleft()
        left = dict.fromkeys(wave)
        for outcome in outcomes(list(wave), job, **options):
            if outcome is None:
                yield None
            elif outcome.unit in left:  # a unit that was tried again may come twice
                del left[outcome.unit]
                yield outcome
        lost = list(left)
        if len(wave) == 1:
            yield from map(Lost, lost)
        elif lost:
            half = -(-len(lost) // 2)
            waves += [part for part in (lost[:half], lost[half:]) if part]


def outcomes(
    units: Sequence[Any],
    job: Any,
    *,
    actor: Callable[[Any], Any] = Reader,
    workers: int | None,
    share: float,
    num_gpus: float = 0.0,
    wait_s: float,
) -> Iterator[Any]:
    """Outcomes as they come, and None whenever none came for `wait_s`.

    Ends early where workers were lost for good: the units without an outcome are the caller's to
    give again.

    Args:
        units: What to do.
        job: What they share.
        actor: Made with the job; does units.
        workers: Actors; None is one a core of the cluster.
        share: Of a core, what each asks Ray for: less than 1 where others work beside them.
        num_gpus: What each asks for, too; may be a share of one.
        wait_s: In seconds.

    Raises:
        Exception: What a worker raised, which is never for what is in a file.
    """
    if not units:
        return
    began, silent = time.monotonic(), True
    found: queue.SimpleQueue[Any] = queue.SimpleQueue()
    pipeline = functools.partial(_pipeline, units, job, actor, workers, share, num_gpus)
    threading.Thread(target=_feed, args=(pipeline, found), daemon=True).start()
    while True:
        try:
            item = found.get(timeout=wait_s)
        except queue.Empty:
            yield None
            if silent and time.monotonic() - began > STARVED_AFTER_S:
                silent = False
                free = ray.available_resources().get("CPU", 0)
                _log.warning(
                    "nothing has come in %.0f s; %g CPUs of the cluster are free: if other work"
                    " holds them, this run waits",
                    STARVED_AFTER_S,
                    free,
                )
            continue
        silent = False
        if item is None:
            return
        if isinstance(item, BaseException):
            if isinstance(item, _LOST_WORKER) and "creation task" not in str(item):
                _log.warning("a worker was lost: %s", str(item).splitlines()[0])
                return
            raise item
        yield pickle.loads(item)


def _feed(pipeline: Callable[[], ray.data.Dataset], found: queue.SimpleQueue[Any]) -> None:
    try:
        for row in pipeline().iter_rows():
            found.put(row["outcome"])
        found.put(None)
    except BaseException as error:  # noqa: BLE001 - the driver's thread raises it
        found.put(error)


def _pipeline(
    units: Sequence[Any],
    job: Any,
    actor: Callable[[Any], Any],
    workers: int | None,
    share: float,
    num_gpus: float,
) -> ray.data.Dataset:
    cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
    size = min(len(units), workers or cores)
    blocks = [
        pa.table({"unit": [pickle.dumps(unit) for unit in bundle]})
        for bundle in _bundles(units, at_most=max(1, len(units) // (64 * size)))
    ]
    return ray.data.from_arrow(blocks).map_batches(
        actor,
        fn_constructor_args=(job,),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=share,
        num_gpus=num_gpus,
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=size, initial_size=size, max_tasks_in_flight_per_actor=2
        ),
        max_restarts=-1,
        max_task_retries=DEATHS_ALLOWED,
    )


def _bundles(units: Sequence[Any], at_most: int) -> Iterator[list[Any]]:
    """Small units together; large ones, parts, and those on which a worker died, alone."""
    bundle: list[Any] = []
    size = 0
    for unit in units:
        alone = not isinstance(unit, Unit) or unit.died or unit.part is not None
        own = BUNDLE_BYTES if alone else unit.source.size_bytes or 0
        full = len(bundle) >= min(at_most, BUNDLE_UNITS) or size + own > BUNDLE_BYTES
        if bundle and full:
            yield bundle
            bundle, size = [], 0
        bundle.append(unit)
        size += own
    yield bundle
