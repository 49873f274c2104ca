"""A child process that works on files nobody trusts, under a limit of time and memory.

A decoder that hangs, crashes or asks for all the memory costs one call here, not the worker.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from engine.operator import Failed

_PR_SET_PDEATHSIG = 1
_ROOT = Path(__file__).resolve().parents[1]


class Sandbox:
    """Calls one function in a child process, which stays up between calls.

    Args:
        target: "module:function"; called with what `call` is given, and with nothing else.
        time_limit_s: Of one call.
        memory_limit_bytes: Of address space, beyond what the child has when it starts to work.
    """

    def __init__(self, target: str, *, time_limit_s: float, memory_limit_bytes: int):
        self.target = target
        self.time_limit_s, self.memory_limit_bytes = time_limit_s, memory_limit_bytes
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._stderr: IO[bytes] | None = None

    def call(self, argument: Any) -> Any:
        """The function's result.

        Raises:
            Failed: It raised, ran past a limit, or its process died twice.
        """
        try:
            return self._call_once(argument)
        except ChildProcessError:
            pass  # something else may have ended the child: one more try tells
        try:
            return self._call_once(argument)
        except ChildProcessError as error:
            raise Failed("WorkerDied", f"the decoder's process died twice ({error})") from None

    def _call_once(self, argument: Any) -> Any:
        pipe = self._start()
        try:
            self._forget_what_was_said()
            pipe.send(argument)
            if not pipe.poll(self.time_limit_s):
                self.close()
                raise Failed(
                    "TimeLimit",
                    f"took longer than the time limit of {self.time_limit_s:g} s (--time-limit-s)",
                )
            outcome, *values = pipe.recv()
        except (EOFError, OSError):  # the latter in the middle of an answer
            raise ChildProcessError(self._epitaph()) from None
        if outcome == "memory":
            self.close()  # what it still holds is unknown
            raise Failed(
                "MemoryLimit",
                f"needs more than the memory limit of {self.memory_limit_bytes / 2**30:.3g} GiB"
                " (--memory-limit-gib)",
            )
        if outcome == "error":
            error_type, message, transient = values
            raise Failed(error_type, message, transient=transient)
        return values[0]

    def _start(self) -> Connection:
        if self._pipe is not None and self._child is not None and self._child.poll() is None:
            return self._pipe
        self.close()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the child
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self._child = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    "import sys; from engine.sandbox import serve; serve(*sys.argv[1:])",
                    str(theirs.fileno()),
                    self.target,
                    str(self.memory_limit_bytes),
                    str(os.getpid()),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                env=os.environ | {"PYTHONPATH": path},
            )
            self._pipe = Connection(ours.detach())
        return self._pipe

    def _forget_what_was_said(self) -> None:
        """Else a child that lives long and complains of every file fills the disk."""
        assert self._stderr is not None
        self._stderr.seek(0)  # the child writes where this stands
        self._stderr.truncate()

    def _epitaph(self) -> str:
        assert self._child is not None and self._stderr is not None
        code = self._child.wait()
        self._stderr.seek(0)
        last = self._stderr.read()[-2000:].decode(errors="replace").strip().splitlines()[-1:]
        self.close()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return ": ".join([how, *last])

    def close(self) -> None:
        """Ends the child, at once."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        if self._pipe is not None:
            self._pipe.close()
        if self._stderr is not None:
            self._stderr.close()
        self._child = self._pipe = self._stderr = None


def serve(descriptor: str, target: str, memory_limit_bytes: str, parent: str) -> None:
    """The child's side: answers calls until its parent goes away."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        return  # it died before we asked to be told
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    pipe = Connection(int(descriptor))
    module, name = target.split(":")
    function = getattr(importlib.import_module(module), name)
    if sys.platform == "linux":  # elsewhere the address space cannot be limited
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + int(memory_limit_bytes)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    while True:
        try:
            argument = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(function, argument))


def _answer(function: Any, argument: Any) -> tuple[Any, ...]:
    try:
        return ("ok", function(argument))
    except MemoryError:
        return ("memory",)
    except Exception as error:  # noqa: BLE001 - the row records it, whatever it is
        message = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        return ("error", type(error).__name__, message, is_transient(error))


def is_transient(error: BaseException) -> bool:
    """Whether the failure may pass without a change of the file: network, rights, disk."""
    return isinstance(error, OSError) and not isinstance(error, ValueError)
