"""Log lines: for a person as ever, or, with `REELWRIGHT_LOG=json`, as JSON that tools take in.

Text is each message in a line, warnings and worse. JSON is one object a line from INFO on, in the
driver and in workers (whose lines are in Ray's log files): `ts level event message`, and where they
apply `run_id table stage operator row_id error_type` and what else is known of the event.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

VARIABLE = "REELWRIGHT_LOG"
FORMS = ("text", "json")
OURS = ("engine", "pipelines", "trainers", "evals", "cluster", "__main__")
_HELD = "reelwright"  # attribute of a log record
_run_id: ContextVar[str | None] = ContextVar("run_id", default=None)
_of_process: str | None = None


def form() -> str:
    """`text` or `json`, as the environment says.

    Raises:
        ValueError: It says something else.
    """
    said = os.environ.get(VARIABLE, "").strip().lower() or "text"
    if said not in FORMS:
        raise ValueError(f"{VARIABLE} is {' or '.join(FORMS)}, not {said!a}: correct or unset it")
    return said


def is_json() -> bool:
    """Whether this process's log was set up as JSON."""
    return any(isinstance(h.formatter, JsonLines) for h in logging.getLogger().handlers)


def set_up() -> None:
    """Sends this process's log to standard error, in the form that the environment asks for.

    Raises:
        ValueError: There is no such form.
    """
    if form() == "text":
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in OURS:  # what libraries have to say below a warning is not about rows
        logging.getLogger(name).setLevel(logging.INFO)
    logging.captureWarnings(True)


def set_up_worker(run_id: str) -> None:
    """The same in a Ray worker, whose process works for one run: text stays as Ray has it."""
    global _of_process
    _of_process = run_id
    if form() == "json":
        set_up()


@contextmanager
def of_run(run_id: str) -> Iterator[None]:
    """Names the run in every line for the time of a `with`, other threads' lines too."""
    global _of_process
    before, token = _of_process, _run_id.set(run_id)
    _of_process = run_id  # threads begin without our context
    try:
        yield
    finally:
        _run_id.reset(token)
        _of_process = before


def run_id() -> str | None:
    """Of the run that this code works for."""
    return _run_id.get() or _of_process


def fields(event: str, **values: Any) -> dict[str, Any]:
    """For `extra=` of a logging call: what happened, in one word, and what is known of it."""
    return {_HELD: {"event": event, **values}}


class JsonLines(logging.Formatter):
    """One JSON object a line, whatever is in the message."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        line: dict[str, Any] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "run_id": run_id(),
            "event": "message",
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, _HELD, {})
        if record.exc_info and record.exc_info[0]:
            line.setdefault("error_type", record.exc_info[0].__name__)
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps({k: v for k, v in line.items() if v is not None}, default=str)
