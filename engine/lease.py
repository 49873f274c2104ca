"""One driver a dataset: a lease with an owner and a heartbeat, the same on disk and object store.

Each term of ownership is a numbered file that exactly one driver creates (put-if-absent), which it
then touches while it lives. The next driver takes over at once when the owner released it or died
on this machine, and else when the heartbeat has been silent for the stated expiry. The lease keeps
drivers politely apart; that a driver which lost it adds no row is the work of `engine.tables`.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from engine import storage
from engine.tables import InUse

_log = logging.getLogger(__name__)

EXPIRY_S = 60.0
"""Silence after which an owner on another machine, or one that hangs, counts as gone."""
_HEARTBEATS_PER_EXPIRY = 6
_WIDTH = 8


class Lease:
    """Held between `__enter__` and `__exit__`; beats in a thread of its own.

    Args:
        root: The dataset.
        run_id: Named in the refusal that another driver gets.
        expiry_s: This driver's own promise, which others go by: it is silent no longer than that.

    Raises:
        InUse: On entering, when a living driver has the dataset.
    """

    def __init__(self, root: str, run_id: str, expiry_s: float = EXPIRY_S):
        self.root, self.run_id, self.expiry_s = root, run_id, expiry_s
        self._stop = threading.Event()

    def __enter__(self) -> Lease:
        storage.make_folder(storage.join(self.root, "lease"))
        while True:
            newest = _newest_term(self.root)
            owner = _living_owner(self.root, newest)
            if owner and owner["run_id"] == self.run_id:
                self.term = newest  # a store may lose the answer to a put that succeeded
                break
            if owner:
                raise InUse(
                    f"{self.root} is {_in_words(owner)}: wait for it, stop it, or name another"
                    f" folder (it counts as gone after {owner['expiry_s']:.0f} s of silence)"
                )
            self.term = newest + 1
            if storage.put_if_absent(_term_uri(self.root, self.term), self._record()):
                break
        self._uri = _term_uri(self.root, self.term)
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()
        self._forget_old_terms()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        try:
            if _newest_term(self.root) == self.term:
                storage.write_bytes(self._uri, self._record(released=True))
        except OSError as error:  # then it ends with this process, or after its expiry
            _log.warning("could not release %s: %s", self.root, error)

    def _record(self, *, released: bool = False) -> bytes:
        owner = {
            "run_id": self.run_id,
            "host": socket.gethostname(),
            "process": _process_identity(os.getpid()),
            "pid": os.getpid(),
            "beat": time.time(),
            "expiry_s": self.expiry_s,
            "released": released,
        }
        return json.dumps(owner).encode()

    def _beat(self) -> None:
        while not self._stop.wait(self.expiry_s / _HEARTBEATS_PER_EXPIRY):
            try:
                if _newest_term(self.root) != self.term:
                    return  # taken over: the next commit fails and says so
                storage.write_bytes(self._uri, self._record())
            except OSError as error:
                _log.warning("no heartbeat for %s: %s", self.root, error)

    def _forget_old_terms(self) -> None:
        for term in _terms(self.root):
            if term < self.term - 2:
                storage.delete(_term_uri(self.root, term))


def holder(root: str) -> str | None:
    """Who has a dataset, in words; None where no living driver does."""
    owner = _living_owner(root, _newest_term(root))
    return _in_words(owner) if owner else None


def _term_uri(root: str, term: int) -> str:
    return storage.join(root, "lease", f"{term:0{_WIDTH}d}.json")


def _terms(root: str) -> list[int]:
    names = storage.names_in(storage.join(root, "lease"))
    return sorted(int(n.removesuffix(".json")) for n in names if n.endswith(".json"))


def _newest_term(root: str) -> int:
    return max(_terms(root), default=0)


def _living_owner(root: str, term: int) -> dict[str, Any] | None:
    """The driver whose term it is; None where it has ended, released it, or there is none."""
    try:
        owner: dict[str, Any] = json.loads(storage.read_bytes(_term_uri(root, term)))
    except FileNotFoundError:
        return None
    silent_s = time.time() - owner["beat"]
    gone = owner["released"] or silent_s > owner["expiry_s"] or _is_dead(owner)
    return None if gone else owner


def _in_words(owner: dict[str, Any]) -> str:
    silent_s = max(time.time() - owner["beat"], 0)
    return (
        f"in use by run {owner['run_id']} (process {owner['pid']} on {owner['host']}, last heard of"
        f" {silent_s:.0f} s ago)"
    )


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether this machine can tell that the owner's process has ended."""
    here = _process_identity(os.getpid())
    theirs = owner["process"]
    if theirs is None or here is None or theirs["machine"] != here["machine"]:
        return False
    return _process_identity(owner["pid"]) != theirs


def _process_identity(pid: int) -> dict[str, str] | None:
    """What tells this process from every other, or None where the system does not say.

    Machine is the boot and the process namespace: outside of them a pid means nothing.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
    try:
        started = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        started = "ended"
    return {"machine": f"{boot} {namespace}", "started": started}
