"""Ray's jobs over HTTP: which attempts there are, how they do, and what they print.

Ray's status alone is not trusted: a job whose machine died can stay RUNNING. `cluster.supervise`
leaves a heartbeat beside the job's log, which is read here as logs are read, with the token.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from cluster.supervise import HEARTBEAT
from engine import command

DASHBOARD = "http://127.0.0.1:8265"
"""Ray's own default."""
POLL_S = 1.0
_TIMEOUT_S = 60.0
_CONNECT_S = 5.0
_ATTEMPT = re.compile(r".+?(-r(?P<number>[1-9][0-9]*))?")
_NO_TOKEN = (
    "no token to authenticate with: put the cluster's into RAY_AUTH_TOKEN or ~/.ray/auth_token"
    " (`ray get-auth-token --generate` makes one, for every machine, before `ray start`);"
    " RAY_AUTH_MODE=disabled is for a cluster without authentication"
)
State = Literal["waiting", "live", "stale", "succeeded", "failed", "stopped"]
ENDED: tuple[State, ...] = ("succeeded", "failed", "stopped")


def token() -> str | None:
    """The token that Ray would send, by its order of precedence; None where there is none."""
    if given := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return given
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def authenticate() -> None:
    """Makes token authentication this process's mode, unless RAY_AUTH_MODE says otherwise.

    Ray reads the variable when it is imported: call this before.

    Raises:
        ValueError: There is no token; says how to make one.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    if token() is None:
        raise ValueError(_NO_TOKEN)
    os.environ["RAY_AUTH_MODE"] = "token"


@dataclass(frozen=True)
class Beat:
    """A heartbeat as it was read."""

    count: int
    at: float
    """By the clock of the job's machine, Unix time in s."""
    every_s: float


@dataclass(frozen=True)
class Attempt:
    """One submission of a job."""

    id: str
    number: int
    """1 for the first, whose id has no suffix."""
    status: str
    """Ray's: PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED."""
    started: float
    """Unix time in s."""
    ended: float | None
    exit_code: int | None
    """Of the command, once it has ended: 128 + N for signal N."""
    message: str
    node: str | None
    beat_s: float | None
    """What its supervisor promised; None where it was not submitted by us."""

    @classmethod
    def of(cls, job: Any) -> Attempt:
        """From Ray's `JobDetails`."""
        code = job.driver_exit_code
        beat_s = (job.metadata or {}).get("beat_s")
        found = _ATTEMPT.fullmatch(job.submission_id)
        return cls(
            id=job.submission_id,
            number=int(found["number"] or 1) if found else 1,
            status=str(getattr(job.status, "value", job.status)),
            started=(job.start_time or 0) / 1000,
            ended=job.end_time / 1000 if job.end_time else None,
            exit_code=128 - code if code is not None and code < 0 else code,
            message=job.message or "",
            node=job.driver_node_id,
            beat_s=float(beat_s) if beat_s else None,
        )

    def patience_s(self, stale_s: float) -> float:
        """Silence that means its end: `stale_s`, and two of the heartbeats that it promised."""
        return max(stale_s, 2 * (self.beat_s or 0))


def attempt_id(job: str, number: int) -> str:
    """The submission id of an attempt: `curate-1a2b3c4d`, then `curate-1a2b3c4d-r2`."""
    return job if number == 1 else f"{job}-r{number}"


def state_of(attempt: Attempt, beat: Beat | None, *, now: float, stale_s: float) -> State:
    """What an attempt is in, as far as one look tells.

    Args:
        attempt: The attempt.
        beat: Its newest heartbeat; None: it could not be read.
        now: Unix time in s.
        stale_s: Silence after which a job that should have a heartbeat counts as dead.
    """
    ended: Mapping[str, State] = {
        "SUCCEEDED": "succeeded", "FAILED": "failed", "STOPPED": "stopped", "PENDING": "waiting"
    }  # fmt: skip
    if attempt.status in ended:
        return ended[attempt.status]
    if attempt.beat_s is None:
        return "live"  # not ours: there is only the status to go by
    last = beat.at if beat else attempt.started
    return "stale" if now - last > attempt.patience_s(stale_s) else "live"


class Jobs:
    """The jobs of a cluster.

    Raises:
        ConnectionError: Nobody answers, it is not Ray, or it refuses the token.
    """

    def __init__(self, address: str | None = None):
        self.address = _dashboard(address)
        _probe(self.address)
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address  # Ray prefers it to what it is given
        self._client = _client(self.address)

    def attempts(self, job: str) -> list[Attempt]:
        """All attempts of a job that the cluster remembers, the first one first."""
        wanted = re.compile(re.escape(job) + r"(-r[1-9][0-9]*)?")
        listed = self._asked(self._client.list_jobs)
        found = [j for j in listed if j.submission_id and wanted.fullmatch(j.submission_id)]
        return sorted((Attempt.of(j) for j in found), key=lambda a: a.number)

    def attempt(self, submission_id: str) -> Attempt:
        """One attempt, as it is now."""
        return Attempt.of(self._asked(lambda: self._client.get_job_info(submission_id)))

    def submit(
        self,
        submission_id: str,
        entrypoint: str,
        runtime_env: Mapping[str, Any],
        metadata: Mapping[str, str],
    ) -> bool:
        """Submits; False where the id is taken, as of two who submit it at once one is told.

        Raises:
            ConnectionError: The cluster refuses it, or does not answer.
        """
        try:
            self._asked(
                lambda: self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=submission_id,
                    runtime_env=dict(runtime_env),
                    metadata=dict(metadata),
                )
            )
        except ConnectionError as error:
            if "already exists" in str(error):
                return False
            raise
        return True

    def stop(self, attempt: Attempt, wait_s: float) -> bool:
        """Stops an attempt; False where it has not ended after `wait_s`."""
        until = time.monotonic() + wait_s
        try:
            self._asked(lambda: self._client.stop_job(attempt.id))
            while self.attempt(attempt.id).status in ("PENDING", "RUNNING"):
                if time.monotonic() > until:
                    return False
                time.sleep(POLL_S / 2)
        except ConnectionError:
            return False
        return True

    def beat(self, attempt: Attempt) -> Beat | None:
        """Its newest heartbeat, or None where none can be read."""
        try:
            text = self._file(attempt, HEARTBEAT.format(id=attempt.id), lines=1)
            facts = json.loads(text)
            return Beat(int(facts["beats"]), float(facts["beat"]), float(facts["beat_s"]))
        except (ConnectionError, ValueError, KeyError, TypeError):
            return None

    def state(self, attempt: Attempt, stale_s: float) -> State:
        """What an attempt is in; one that seems stale is watched before it is called so.

        Clocks of machines differ, and a request may fail: only a heartbeat that does not move while
        somebody looks is a dead one.
        """
        beat = self.beat(attempt) if attempt.status == "RUNNING" else None
        now_s, patience_s = time.time(), attempt.patience_s(stale_s)
        state = state_of(attempt, beat, now=now_s, stale_s=stale_s)
        is_ahead = beat is not None and beat.at > now_s + beat.every_s
        if state != "stale" and not is_ahead:
            return state
        until = time.monotonic() + (min(patience_s, 3 * beat.every_s) if beat else patience_s)
        while time.monotonic() < until:
            time.sleep(POLL_S)
            now = self.attempt(attempt.id)
            if now.status != "RUNNING":
                return state_of(now, None, now=time.time(), stale_s=stale_s)
            seen = self.beat(now)
            if seen and (beat is None or seen.count != beat.count):
                return "live"
        return "stale"

    def log(self, attempt: Attempt) -> str:
        """All that an attempt has printed; undecodable bytes are replaced."""
        text = self._file(attempt, f"job-driver-{attempt.id}.log", lines=-1)
        return text.replace("\r\n", "\n").replace("\r", "\n")  # as Ray reads lines

    async def tail(self, submission_id: str, write: Callable[[str], object]) -> None:
        """Hands on what a job prints, from its beginning, until it has ended."""
        async for text in self._client.tail_job_logs(submission_id):
            write(text)

    def _file(self, attempt: Attempt, name: str, lines: int) -> str:
        """The end of a file in the folder of Ray's logs on the job's machine."""
        import requests

        if attempt.node is None:
            return ""
        response = self._asked(
            lambda: self._client._do_request(
                "GET",
                "/api/v0/logs/file",
                params={"node_id": attempt.node, "filename": name, "lines": lines},
            )
        )
        if response.status_code != requests.codes.ok:
            raise ConnectionError(f"{name}: {response.text[:200]}")
        return response.content.decode(errors="replace")

    def _asked(self, ask: Callable[[], Any]) -> Any:
        return _asked(ask, self.address)


def _asked(ask: Callable[[], Any], address: str) -> Any:
    """What a request gives; whatever goes wrong is one line."""
    import requests
    from ray.exceptions import AuthenticationError

    from engine.session import WRONG_TOKEN

    try:
        return ask()
    except AuthenticationError as error:
        what = f"wants a token: {_NO_TOKEN}" if "required" in str(error) else WRONG_TOKEN
        raise ConnectionError(f"the Ray cluster at {address} {what}") from None
    except requests.Timeout:
        raise ConnectionError(f"the Ray cluster at {address} does not answer in time") from None
    except requests.ConnectionError:
        raise ConnectionError(f"the Ray cluster at {address} does not answer any more") from None
    except requests.RequestException as error:
        raise _no_ray(error, address) from None
    except RuntimeError as error:  # Ray's server: the last line says what went wrong there
        lines = [line for line in str(error).splitlines() if line.strip(" .")] or [""]
        raise ConnectionError(f"the Ray cluster at {address}: {lines[-1]}") from None


def _dashboard(named: str | None) -> str:
    """The address of Ray's HTTP server: as named, else of the variables, else Ray's default."""
    found = named or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not found or found == "auto":
        return DASHBOARD
    if "://" in found and not found.startswith("ray://"):
        return found.rstrip("/")
    _probe(found if "://" in found else f"ray://{found}", named=found)
    from ray.dashboard.utils import get_address_for_submission_client

    return get_address_for_submission_client(found)


def _probe(address: str, named: str | None = None) -> None:
    """Somebody listens there."""
    named = named or address
    parts = urlsplit(address)
    ports = {"http": 80, "https": 443, "ray": 10001}
    try:
        where = parts.hostname or "", parts.port or ports[parts.scheme]
    except (KeyError, ValueError):
        raise ValueError(
            f"{named} is no address of a cluster: write http://HOST:8265, its dashboard's"
        ) from None
    try:
        socket.create_connection(where, timeout=_CONNECT_S).close()
    except OSError as error:
        raise ConnectionError(
            f"no Ray cluster answers at {named} ({error.strerror or error}): start it, or name"
            " its dashboard with --address or RAY_API_SERVER_ADDRESS"
        ) from None


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)

    class Client(JobSubmissionClient):
        def _do_request(self, *args: Any, **more: Any) -> Any:
            more.setdefault("timeout", _TIMEOUT_S)  # Ray's own waits for ever
            return super()._do_request(*args, **more)

    try:
        return _asked(lambda: Client(address), address)
    except ValueError as error:
        raise _no_ray(error, address) from None


def _no_ray(error: Exception, address: str) -> ConnectionError:
    words = command.first_words(error)
    return ConnectionError(f"what answers at {address} is no Ray cluster: {words}")
