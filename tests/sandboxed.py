"""What tests have a sandboxed child do."""

from __future__ import annotations

import builtins
import os
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any


def act(argument: tuple[Any, ...]) -> Any:
    """Does what the first item says with the others."""
    what, *rest = argument
    return {
        "pid": os.getpid,
        "raise": _raise,
        "hang": lambda: time.sleep(600),
        "allocate": lambda size: len(bytearray(size)),
        "crash": _crash,
        "slow": _slow,
        "complain": _complain,
        "stop short": _stop_short,
    }[what](*rest)


def _raise(kind: str, message: str) -> None:
    raise getattr(builtins, kind)(message)


def _crash(tally: str, times: int) -> str:
    path = Path(tally)
    so_far = path.read_text() if path.exists() else ""
    if len(so_far) < times:
        path.write_text(so_far + "x")
        os.kill(os.getpid(), signal.SIGSEGV)
    return "alive"


def _slow(started: str, seconds: float) -> int:
    Path(started).touch()
    time.sleep(seconds)
    return os.getpid()


def _complain(length: int) -> int:
    os.write(2, b"x" * length)
    return os.fstat(2).st_size


def _stop_short() -> None:
    """Dies in the middle of an answer."""
    os.write(int(sys.argv[1]), struct.pack("!i", 1000) + b"not all of it")
    os._exit(3)


def die(_: Any) -> None:
    """Crashes, whatever it is asked."""
    os.kill(os.getpid(), signal.SIGSEGV)
