"""Runs a job's command on the cluster: heartbeat, deadline, signals. Standard library only.

python -m cluster.supervise [--deadline-s S] [--beat-s S] [--grace-s S] -- COMMAND …

The heartbeat is one line of JSON in a file beside the job's log, `heartbeat-ID.json`: what reads
the log over HTTP, with the token, reads it too, and the log itself stays the command's own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

OVERDUE = 124
"""Exit code of a command that was stopped at its deadline, as of `timeout`."""
HEARTBEAT = "heartbeat-{id}.json"
_LOG = re.compile(r"job-driver-(.+)\.log")
_RECORD_BYTES = 256
_ASKS_TO_END = (signal.SIGTERM, signal.SIGINT)
_WATCHED = (*_ASKS_TO_END, signal.SIGCHLD)
_GUARD = "trap '' TERM INT HUP; read -r _; kill -9 -$0"


def main(arguments: Sequence[str]) -> int:
    """Runs the command; gives its exit code (128 + N for signal N, 124 at the deadline)."""
    parser = argparse.ArgumentParser(prog="python -m cluster.supervise")
    parser.add_argument("--deadline-s", type=float)
    parser.add_argument("--beat-s", type=float, default=10.0)
    parser.add_argument("--grace-s", type=float, default=30.0)
    parser.add_argument("command", nargs="+")
    args = parser.parse_args(arguments)
    return supervise(
        args.command,
        deadline_s=args.deadline_s,
        beat_s=args.beat_s,
        grace_s=args.grace_s,
        heartbeat=heartbeat_of_log(),
    )


def heartbeat_of_log() -> Path | None:
    """Where the heartbeat goes: beside the file that Ray writes our output to, if that is one."""
    try:
        log = Path(os.readlink("/proc/self/fd/1"))
    except OSError:
        return None
    found = _LOG.fullmatch(log.name)
    return log.with_name(HEARTBEAT.format(id=found[1])) if found else None


def supervise(
    command: Sequence[str],
    *,
    deadline_s: float | None,
    beat_s: float,
    grace_s: float,
    heartbeat: Path | None,
) -> int:
    """Runs a command as the leader of a process group; gives the exit code as `main` does.

    Args:
        command: What to run.
        deadline_s: After so long its group gets SIGTERM; None is never.
        beat_s: Time between two heartbeats.
        grace_s: From that SIGTERM to SIGKILL.
        heartbeat: File that is written over at each beat; of a job of Ray, whose end is ours, too.
    """
    parent = os.getppid()
    # Taken from a queue below, with who sent them, and never in the middle of something.
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    for number in _WATCHED:  # what is inherited as ignored would never arrive
        signal.signal(number, signal.SIG_DFL)
    try:
        child = subprocess.Popen(command, process_group=0, preexec_fn=_unblock)
    except OSError as error:
        sys.stderr.write(f"error: {command[0]} cannot be run: {error.strerror or error}\n")
        return 127 if isinstance(error, FileNotFoundError) else 126
    # However we end, the guard reads the end of its input, and no process of the group outlives us.
    guard = subprocess.Popen(
        ["sh", "-c", _GUARD, str(child.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    overdue = _wait(child, deadline_s, beat_s, grace_s, heartbeat, parent)
    guard.communicate()
    if overdue:
        return OVERDUE
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _wait(
    child: subprocess.Popen[bytes],
    deadline_s: float | None,
    beat_s: float,
    grace_s: float,
    heartbeat: Path | None,
    parent: int,
) -> bool:
    """Waits for the child's end; gives whether the deadline has ended it."""
    started = time.monotonic()
    ends_at = started + deadline_s if deadline_s is not None else None
    killed_at: float | None = None
    overdue = False
    beats = 0
    while child.poll() is None:
        now = time.monotonic()
        if now >= started + beats * beat_s:
            beats += 1
            _beat(heartbeat, beats, beat_s, child.pid)
        if killed_at is None:
            overdue = ends_at is not None and now >= ends_at
            # a cluster may die so suddenly that nobody is left to end its jobs
            if overdue or (heartbeat is not None and os.getppid() != parent):
                why = f"the deadline of {deadline_s:g} s has passed" if overdue else "Ray has gone"
                killed_at = now + grace_s
                sys.stderr.write(f"supervisor: {why}: stopping\n")
                _signal_group(child.pid, signal.SIGTERM)
        elif now >= killed_at:
            _signal_group(child.pid, signal.SIGKILL)
        # a second at most: SIGCHLD may have come before it was waited for
        found = signal.sigtimedwait(_WATCHED, min(1.0, max(0.01, started + beats * beat_s - now)))
        if found and found.si_signo in _ASKS_TO_END and not _is_of_ray(found.si_pid):
            _signal_group(child.pid, found.si_signo)
    return overdue


def _unblock() -> None:
    """In the child: Ray's processes block SIGINT, and so do we."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)


def _is_of_ray(pid: int) -> bool:
    """Whether a signal comes from Ray's job supervisor, which sends it to all below it itself.

    Passed on, it would come twice, and the second one into the orderly end that the first began.
    """
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::")
    except OSError:
        return False


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return  # it has ended by itself


def _beat(path: Path | None, beats: int, beat_s: float, pid: int) -> None:
    if path is None:
        return
    facts = {
        "beat": time.time(), "beats": beats, "beat_s": beat_s, "pid": pid,
        "supervisor": os.getpid(), "host": socket.gethostname()[:64],
    }  # fmt: skip
    record = json.dumps(facts).ljust(_RECORD_BYTES - 1) + "\n"
    try:  # in place: that works on a full disk, too
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(file, record.encode(), 0)
        finally:
            os.close(file)
    except OSError as error:
        sys.stderr.write(f"supervisor: no heartbeat: {error}\n")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
