"""What every command shares: arguments, errors in one line, paths, and how it ends."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from engine import logs, storage

UNBALANCED, BAD_INPUT, REGRESSION, INTERRUPTED = 1, 2, 3, 130
"""Exit codes of every command: the same command again may help after the first and the last."""


class _Console(Console):
    """Standard error for a person; where the log is JSON, what is printed is part of it."""

    def print(self, *objects: Any, **how: Any) -> None:
        if not logs.is_json():
            super().print(*objects, **how)
            return
        with self.capture() as said:
            super().print(*objects, **how)
        _log.info("%s", " ".join(said.get().split()), extra=logs.fields("note"))


err = _Console(stderr=True)
out = Console(width=None if sys.stdout.isatty() else 200)  # a pipe has no width of its own
T = TypeVar("T")
_log = logging.getLogger(__name__)


def arguments(kind: Callable[..., T], description: str) -> T:
    """The command line as a value of `kind`; a wrong one is one line and exit code 2."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, description=description)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        words = re.sub(r"[\u2500-\u257f]+", " ", said.getvalue())
        fail(" ".join(words.split()).removeprefix("Parsing error "))


def fail(message: str, code: int = BAD_INPUT) -> Any:
    """Says what is wrong in one line, and ends the program."""
    said = " ".join(message.split())
    if logs.is_json():
        _log.error(said, extra=logs.fields("command_failed", exit_code=code))
    else:
        sys.stderr.write(f"error: {said}\n")
    raise SystemExit(code)


@contextlib.contextmanager
def in_one_line(
    *given_up: type[Exception],
    failing: str = "",
    stopped: str = "stopped: run the same command again to go on",
) -> Iterator[None]:
    """Ends the program with a line, not a stack trace, on what a user or the world did.

    Args:
        given_up: What a run gives up on, beside connections and files.
        failing: What a file's error is about, where the error itself may not say.
        stopped: Said on Ctrl-C.
    """
    try:
        yield
    except ValueError as error:
        fail(str(error))
    except (ConnectionError, *given_up) as error:
        fail(str(error), code=UNBALANCED)
    except OSError as error:
        said = first_words(error)
        fail(f"{failing}: {said}" if failing else said, code=UNBALANCED)
    except KeyboardInterrupt:
        fail(stopped, code=INTERRUPTED)


def first_words(error: Exception) -> str:
    """What an error says, without where in a library's source it was raised."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].split(", /")[0]


def set_up_logging() -> None:
    """Our own words on standard error, a line each: text, or JSON (`engine.logs`)."""
    try:
        logs.set_up()
    except ValueError as error:
        fail(str(error))
    # Ray forks before any table is open, and what it forks opens none
    warnings.filterwarnings("ignore", "lance is not fork-safe")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `ray job stop` is a Ctrl-C


def destination(dst: str) -> str:
    """An absolute path or URI for what a run writes.

    A job's working directory is Ray's temporary copy of what was submitted, and goes with it: a
    relative path given there is taken below the user's home.
    """
    if storage.is_remote(dst):
        return dst
    inside_copy = "runtime_resources/working_dir_files" in str(Path.cwd())
    if inside_copy and not Path(dst).expanduser().is_absolute():
        return str(Path.home() / dst)
    return storage.absolute(dst)


class Bars:
    """Progress: live bars on a terminal, else a line now and then; used as a context."""

    def __init__(self, *, every_s: float = 10.0):
        self._live, self._every_s = err.is_terminal and not logs.is_json(), every_s
        self._said = time.monotonic()
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=err,
            transient=True,
        )

    def __enter__(self) -> Self:
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._progress.stop()

    def show(
        self,
        bar: str,
        done: int,
        total: int,
        facts: str,
        *,
        doing: str | None = None,
        rate: float | None = None,
    ) -> None:
        """Shows how far something is.

        Args:
            bar: One of several, made when it is first named.
            done: So much is done.
            total: Of so much; 0 is not known yet.
            facts: What else there is to say.
            doing: What is being done, where it is not the bar's name.
            rate: Of `done` in a second, for the time left where there is no bar.
        """
        if self._live:
            if bar not in self._tasks:
                self._tasks[bar] = self._progress.add_task(bar, total=None, facts="")
            self._progress.update(
                self._tasks[bar],
                description=doing or bar,
                completed=done,
                total=total or None,
                facts=facts,
            )
        elif total and time.monotonic() - self._said > self._every_s:
            self._said = time.monotonic()
            if logs.is_json():
                told = logs.fields("progress", stage=doing or bar, done=done, total=total)
                _log.info("%s", facts, extra=told)
                return
            left = f", {(total - done) / rate:.0f} s left" if rate else ""
            err.print(f"{doing or bar}: {done}/{total}, {facts}{left}", highlight=False)


def print_json(value: Any) -> None:
    """One object on standard output, and nothing else."""
    sys.stdout.write(json.dumps(value, default=str) + "\n")


def end(code: int) -> None:
    """Ends the process at once: threads of a pipeline that was left crash in Python's shutdown."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
