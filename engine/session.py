"""Where a run's Ray is: the cluster that runs already, or else one on this machine for its time."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray._raylet import GcsClient
from ray.util.annotations import RayDeprecationWarning

REPOSITORY = Path(__file__).resolve().parents[1]
OBJECT_STORE_BYTES = 256 * 2**20
"""Of a cluster of our own: only numbers and file names pass through it."""
NO_PROGRESS_S = 1800
WRONG_TOKEN = (
    "refuses this token: give it the one that it was started with (RAY_AUTH_TOKEN,"
    " RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token)"
)
_log = logging.getLogger(__name__)


@contextmanager
def connected(workers: int | None = None) -> Iterator[str]:
    """Connects to Ray for the time of a `with`, and gives one line that says to which.

    The cluster is the one that `RAY_ADDRESS` names, else the one that `ray start` last started on
    this machine, else a new one with this machine's cores (or `workers`), ended afterwards.

    Raises:
        ConnectionError: `RAY_ADDRESS` names a cluster that does not answer, or refuses the token.
    """
    address = _running()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        if address:
            _start(address=address, runtime_env={"env_vars": {"PYTHONPATH": _python_path()}})
            yield f"Ray cluster at {address}"
        else:
            os.environ["PYTHONPATH"] = _python_path()  # what its workers inherit
            _start(
                address="local",
                num_cpus=workers,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
            )
            yield f"Ray on this machine, {int(ray.cluster_resources()['CPU'])} cores"
    finally:
        ray.shutdown()


def _start(**how: Any) -> None:
    """`ray.init`, quietly, and without its taking SIGTERM over."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with _without_stderr():
            if _host_port(how["address"]):
                GcsClient(address=how["address"])  # tells at once what `init` retries for 30 s
            ray.init(log_to_driver=False, logging_level="ERROR", **how)
    except ray.exceptions.AuthenticationError:
        raise ConnectionError(f"the Ray cluster at {how['address']} {WRONG_TOKEN}") from None
    except ray.exceptions.RaySystemError as error:
        raise ConnectionError(f"Ray does not start: {str(error).splitlines()[0]}") from error
    if in_main_thread:
        signal.signal(signal.SIGTERM, on_sigterm)
    _quiet()


def _running() -> str | None:
    named = os.environ.get("RAY_ADDRESS")
    if named == "local":
        return None
    if named:
        if _host_port(named) and not _answers(named):
            raise ConnectionError(
                f"no Ray cluster answers at RAY_ADDRESS={named}: start it, or unset RAY_ADDRESS"
            )
        return named
    last = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    found = last.read_text().strip() if last.is_file() else ""
    return found if found and _answers(found) else None


def _host_port(address: str) -> tuple[str, int] | None:
    host, _, port = address.rpartition(":")
    return (host, int(port)) if host and port.isdigit() and "/" not in host else None


def _answers(address: str) -> bool:
    where = _host_port(address)
    if where is None:
        return False
    try:
        socket.create_connection(where, timeout=2).close()
    except OSError:
        return False
    return True


def _python_path() -> str:
    """This repository first: workers import it, installed or not, from wherever we were run."""
    rest = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(REPOSITORY), *(p for p in rest if p and p != str(REPOSITORY))])


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Without what Ray's core prints while it starts; what goes wrong there is raised, too."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _quiet() -> None:
    """Ray's own words go to its log files; ours are for the person at the terminal."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it logs it raises, too
    # how often an actor restarts has no named parameter yet
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated", RayDeprecationWarning)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_S
