"""A model behind an endpoint: the client that evaluation has, and a server that Ray runs.

    python -m evals.served FOLDER        an export or a diffusers pipeline, at 127.0.0.1:8000

`POST URL` with the JSON `{"prompt": …, "seed": …}` and the model's settings answers the video as
`video/mp4`, or as JSON with `video` (base64), `rephrased`, `notes` and `timings`. `GET URL` may say
`checkpoint`, `model` and `settings` (names with their defaults) as JSON. Whatever speaks this can
be evaluated.
"""

from __future__ import annotations

import base64
import json
import os
import random
import time
from collections.abc import Mapping
from typing import Any

import httpx

from engine.endpoint import retry_after_s
from engine.operator import Failed
from evals.models import COMMON, TOKEN, Asked, Made, Setting

TIMEOUT_S = 3600.0
"""Until an endpoint has made a video."""
ATTEMPTS = 5
BACKOFF_S = 1.0
"""Wait before the second attempt, doubled for each further one."""
LONGEST_WAIT_S = 60.0
MAX_FILE_BYTES = 2**30
"""Of a video that an endpoint gives."""


class Endpoint:
    """Makes videos over HTTP, tried again where trying may help.

    Args:
        url: Without user, password and query, which tables would show.
    """

    def __init__(self, url: str):
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ValueError(f"{url} is no URL: {error}") from None
        if not parsed.host or parsed.userinfo or parsed.query or parsed.fragment:
            raise ValueError(
                f"the endpoint's URL must be like http://host:8000/ without user, password or"
                f" query: put a key into the environment variable {TOKEN}"
            )
        self.url = url

    def says(self) -> tuple[str | None, str, dict[str, Setting]]:
        """What it says of itself: checkpoint, model, settings; any of them may be unknown.

        Raises:
            ValueError: Nothing answers, or the key is refused.
        """
        try:
            found = httpx.get(self.url, headers=_headers(), timeout=30.0)
        except httpx.HTTPError as error:
            raise ValueError(
                f"no endpoint answers at {self.url} ({type(error).__name__}): start the server, or"
                " give the URL of one that runs"
            ) from None
        if found.status_code in (401, 403):
            has = "is refused" if os.environ.get(TOKEN) else "is not set"
            raise ValueError(f"{self.url} wants a key (HTTP {found.status_code}): {TOKEN} {has}")
        if found.status_code in (502, 503, 504):
            raise ValueError(f"the endpoint at {self.url} is not ready (HTTP {found.status_code})")
        try:
            about = found.json() if found.is_success else {}
        except (ValueError, RecursionError):
            about = {}
        about = about if isinstance(about, dict) else {}
        settings = about.get("settings")
        known = {name: Setting(kind) for name, kind in COMMON.items()}
        if isinstance(settings, dict):
            known = {str(name): _told(str(name), value) for name, value in settings.items()}
        checkpoint = about.get("checkpoint")
        return (str(checkpoint) if checkpoint else None), str(about.get("model", "")), known

    def ask(self, asked: Asked, settings: Mapping[str, Any]) -> Made:
        """The video, after as many attempts as it takes.

        Raises:
            Failed: There is none.
        """
        began = time.perf_counter()
        body = {"prompt": asked.text, "seed": asked.seed, **settings}
        failure = Failed("Unasked", "nobody was asked")
        for attempt in range(1, ATTEMPTS + 1):
            wait_s = None
            try:
                status, headers, content = self._post(body)
                if status < 300:
                    return _made(headers, content, time.perf_counter() - began)
                failure = _refusal(status, content)
                if status not in (408, 425, 429) and status < 500:
                    raise failure
                wait_s = retry_after_s(headers.get("Retry-After"), time.time())
            except httpx.HTTPError as error:
                failure = Failed(type(error).__name__, "the connection to the endpoint failed")
            if attempt < ATTEMPTS:
                backoff_s = BACKOFF_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
                time.sleep(min(LONGEST_WAIT_S, max(backoff_s, wait_s or 0.0)))
        said = f"{failure.message} ({ATTEMPTS} attempts)"
        raise Failed(failure.error_type, said, transient=True)

    def _post(self, body: Mapping[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        timeout = httpx.Timeout(TIMEOUT_S, connect=30.0)
        accept = {"Accept": "application/json, video/mp4;q=0.9"}
        with httpx.stream(
            "POST", self.url, json=body, headers=_headers() | accept, timeout=timeout
        ) as response:
            content = bytearray()
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MAX_FILE_BYTES:
                    raise Failed("TooLarge", f"its answer has more than {MAX_FILE_BYTES:,} bytes")
            return response.status_code, response.headers, bytes(content)


def _headers() -> dict[str, str]:
    key = os.environ.get(TOKEN, "").strip()
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):  # httpx would say the key in its error
        raise ValueError(f"the key in {TOKEN} has characters that no header holds")
    return {"Authorization": f"Bearer {key}"}


def _told(name: str, default: Any) -> Setting:
    if default is None:
        return Setting(COMMON.get(name, str))
    kind = type(default) if isinstance(default, bool | int | float) else str
    return Setting(COMMON.get(name, kind), default)


def _made(headers: httpx.Headers, content: bytes, seconds: float) -> Made:
    timings = {"request_s": seconds}
    if not headers.get("Content-Type", "").startswith("application/json"):
        return Made(file=content, timings=timings)
    try:
        about = json.loads(content)
        file = base64.b64decode(about["video"], validate=True)
        notes = tuple(str(note) for note in about.get("notes") or ())
        timings |= {str(k): float(v) for k, v in (about.get("timings") or {}).items()}
        rephrased = about.get("rephrased")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Failed("MalformedAnswer", "the endpoint's JSON holds no video in base64") from None
    return Made(
        file=file,
        rephrased=None if rephrased is None else str(rephrased),
        notes=notes,
        timings=timings,
    )


def _refusal(status: int, content: bytes) -> Failed:
    """400, 413 and 422 are about what was asked, and final; others end when someone repairs."""
    words = " ".join(content[:2000].decode(errors="replace").split())
    key = os.environ.get(TOKEN, "").strip()
    words = (words.replace(key, "…") if key else words)[:300]
    message = f"the endpoint answered HTTP {status}{': ' if words else ''}{words}"
    return Failed(f"HTTP{status}", message, transient=status not in (400, 413, 422))
