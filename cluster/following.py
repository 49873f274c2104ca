"""Follows a job to its end: prints what it prints, and watches its heartbeat."""

from __future__ import annotations

import asyncio
import sys
import threading
import time

from cluster.jobs import POLL_S, Attempt, Jobs, State, state_of


class Follower:
    """Prints what an attempt prints, and watches its heartbeat.

    Args:
        jobs: The cluster's.
        stale_s: Silence of the heartbeat, or of the cluster, after which it is given up.
    """

    def __init__(self, jobs: Jobs, *, stale_s: float):
        self._jobs, self._stale_s = jobs, stale_s
        self._printed = 0
        self._lock = threading.Lock()

    def follow(self, attempt: Attempt) -> tuple[Attempt, State]:
        """Waits for an attempt's end; gives it as it was then, and its state (`stale` is one).

        Raises:
            ConnectionError: The cluster has not answered for `stale_s`.
        """
        self._printed = 0
        tail = threading.Thread(target=self._tail, args=(attempt.id,), daemon=True)
        tail.start()
        moved = answered = looked = time.monotonic()
        count = -1
        while attempt.status in ("PENDING", "RUNNING"):
            time.sleep(POLL_S / 2)
            now = time.monotonic()
            try:
                attempt, answered = self._jobs.attempt(attempt.id), now
            except ConnectionError:
                if now - answered > self._stale_s:
                    raise
                continue
            if attempt.status == "PENDING" or attempt.beat_s is None:
                moved = now
            elif now - looked >= min(attempt.beat_s, self._stale_s / 4):
                looked = now
                beat = self._jobs.beat(attempt)
                if beat and beat.count != count:
                    moved, count = now, beat.count
                if now - moved > attempt.patience_s(self._stale_s):
                    return attempt, "stale"
            if not tail.is_alive() and attempt.status == "RUNNING":  # the connection was cut
                tail = threading.Thread(target=self._tail, args=(attempt.id,), daemon=True)
                tail.start()
        self._rest(attempt, tail)
        return attempt, state_of(attempt, None, now=time.time(), stale_s=self._stale_s)

    def _tail(self, submission_id: str) -> None:
        seen = 0

        def take(text: str) -> None:
            nonlocal seen
            with self._lock:
                seen += len(text)
                new = seen - self._printed
                if new > 0:
                    self._printed = seen
                    _write(text[-new:])

        try:
            asyncio.run(self._jobs.tail(submission_id, take))
        except Exception:  # noqa: BLE001 - however the connection ends, what is missing is fetched
            return

    def _rest(self, attempt: Attempt, tail: threading.Thread) -> None:
        """What the tail, which is seconds late, has not brought."""
        tail.join(timeout=0.3)
        try:
            text = self._jobs.log(attempt)
        except ConnectionError:
            tail.join(timeout=10)
            return
        with self._lock:
            _write(text[self._printed :])
            self._printed = max(len(text), self._printed)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
