"""A model behind an OpenAI-compatible endpoint: vLLM, SGLang, Ray Serve LLM, `transformers serve`.

One request a question, a bounded number at a time, tried again where trying may help. What cannot
be answered is a `Failed` in its place; neither the key nor the pictures are ever part of a message.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import logging
import os
import random
import re
import ssl
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar

import httpx

from engine.chat import Answer, Ask, Chat, Request
from engine.operator import Failed, resource
from engine.picture import rgb_of

_log = logging.getLogger(__name__)

_CHECK_S = 30.0
_SAID = 300  # characters of a failure's message, which may quote the server, at most
_CONTROL = re.compile(r"<(?=\||(?:image|video|img)>)", re.IGNORECASE)
_PICTURES = re.compile(r"data:[\w/+.-]*;base64,[\w+/=-]*|[\w+/=-]{80,}")


@dataclass(frozen=True, kw_only=True)
class EndpointChat(Chat):
    """Asks a model over HTTP (`POST {url}/chat/completions`), pictures as `data:` URLs.

    The pictures of a video go as images, each after its time, because no common form of a video
    exists. A batch ends with its slowest answer, so the operator's `batch_size` should be several
    times `concurrency`. Every copy of the operator keeps `concurrency` requests under way. A server
    that takes fewer images a prompt than a clip has keyframes refuses it, finally (HTTP 400): vLLM
    is told by `--limit-mm-per-prompt`.

    Which weights a server has loaded under a name it does not say: where they change under the same
    name, give another `revision`.
    """

    prompt_version: ClassVar[int] = 1
    """Raised when the same question is put to the model in other words."""

    url: str = dataclasses.field(metadata={"resource": True})
    """Base, such as `http://host:8000/v1`; without user, password or query, which logs would show.
    A mirror gives the same answers, so it is no part of the fingerprint."""
    model: str
    """Name by which the server knows it."""
    revision: str | None = None
    """Of the weights behind the name: any text; only told apart, never sent."""
    temperature: float = 0.0
    """0: the likeliest word each time."""
    concurrency: int = resource(16)
    """Requests under way at once, at most."""
    timeout_s: float = resource(300.0)
    """From sending a request to the end of its answer; a later attempt has as long again."""
    attempts: int = resource(6)
    """Times that a request is sent, at most."""
    backoff_s: float = resource(1.0)
    """Wait before the second attempt, doubled for each further one; a random half is taken off, so
    that requests refused together do not come back together."""
    longest_wait_s: float = resource(60.0)
    """Cap on any wait, also on one that the server asks for by Retry-After."""
    key_variable: str | None = resource(None)
    """Environment variable that holds the key, on the machines that ask; None: no key is sent."""

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ValueError(f"the endpoint's url is none: {error}") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError("the endpoint's url must be like http://host:8000/v1")
        if url.userinfo or url.query or url.fragment:
            raise ValueError(
                "the endpoint's url must hold no user, password or query: name the environment"
                " variable with the key as key_variable"
            )
        for name, least in (("concurrency", 1), ("attempts", 1), ("timeout_s", 0.001)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, and is {getattr(self, name)}")

    def describe(self) -> dict[str, Any]:
        """Class and parameters: what is asked of which model, not where and how patiently."""
        return super().describe() | {"prompt_version": self.prompt_version}

    def check(self) -> None:
        """Asks for `{url}/models`, so that a run that cannot be answered does not begin.

        Raises:
            ValueError: The key's variable is not set, nothing answers, or the key is refused.
        """
        url = f"{self.url.rstrip('/')}/models"
        try:
            found = httpx.get(url, headers=self._headers(), timeout=_CHECK_S)
        except httpx.HTTPError as error:
            raise ValueError(
                f"no endpoint answers at {self.url} ({type(error).__name__}): start the server, or"
                " give the url of one that runs"
            ) from None
        if found.status_code in (401, 403):
            with_key = (
                f"the key in {self.key_variable}" if self.key_variable else "to go on keyless"
            )
            raise ValueError(f"{self.url} refuses {with_key} (HTTP {found.status_code})")
        # `transformers serve` answers 500 on a machine where no model was ever fetched
        if found.status_code in (502, 503, 504):
            raise ValueError(f"the endpoint at {self.url} is not ready (HTTP {found.status_code})")
        names = _model_names(found)
        if names and self.model not in names:  # a list need not be complete
            _log.warning("%s does not list the model %s, but %s", self.url, self.model, names[:8])

    def open(self) -> Ask:
        """The function that asks; it keeps nothing open between batches."""
        headers, trust = self._headers(), httpx.create_ssl_context()

        def ask(requests: Sequence[Request]) -> list[Answer | Failed]:
            # A thread of its own, for the caller's may run an event loop already.
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(asyncio.run, self._ask_all(requests, headers, trust)).result()

        return ask

    def _headers(self) -> dict[str, str]:
        if self.key_variable is None:
            return {}
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise ValueError(
                f"the endpoint's key is wanted in the environment variable {self.key_variable},"
                " which is not set on this machine"
            )
        if not (key.isascii() and key.isprintable()):  # httpx would say the key in its error
            raise ValueError(f"the key in {self.key_variable} has characters that no header holds")
        return {"Authorization": f"Bearer {key}"}

    async def _ask_all(
        self, requests: Sequence[Request], headers: dict[str, str], trust: ssl.SSLContext
    ) -> list[Answer | Failed]:
        limits = httpx.Limits(max_connections=self.concurrency)
        turn = asyncio.Semaphore(self.concurrency)
        async with httpx.AsyncClient(
            headers=headers, verify=trust, limits=limits, timeout=None
        ) as client:

            async def answer(request: Request) -> Answer | Failed:
                async with turn:
                    try:
                        return await self._answer(client, request)
                    except Failed as failure:
                        return Failed(
                            failure.error_type,
                            _without_secrets(failure.message, headers),
                            transient=failure.transient,
                        )

            return await asyncio.gather(*(answer(request) for request in requests))

    async def _answer(self, client: httpx.AsyncClient, request: Request) -> Answer:
        """The answer to one request, after as many attempts as it takes.

        A wait keeps its place among those under way: an endpoint that refuses is asked less.
        """
        for picture in request.pictures:
            try:  # a server may take a broken one for its own fault, and be asked again
                rgb_of(picture.jpeg)
            except ValueError as error:
                raise Failed("DecodeError", str(error)) from None
        body = json.dumps(self._body(request)).encode()
        for attempt in range(1, self.attempts + 1):
            asked_to_wait_s = None
            try:
                async with asyncio.timeout(self.timeout_s):
                    response = await client.post(
                        f"{self.url.rstrip('/')}/chat/completions",
                        content=body,
                        headers={"Content-Type": "application/json"},
                    )
                if response.is_success:
                    return _answer_of(response)
                failure = _refusal(response)
                if not _passes(response.status_code):
                    raise failure
                asked_to_wait_s = retry_after_s(response.headers.get("Retry-After"), time.time())
            except TimeoutError:
                failure = Failed("Timeout", f"no answer within {self.timeout_s:g} s")
            except httpx.HTTPError as error:
                # its words may name addresses, and its class says what happened
                failure = Failed(type(error).__name__, "the connection to the endpoint failed")
            except _MalformedAnswer as error:
                failure = Failed("MalformedAnswer", str(error))
            if attempt < self.attempts:
                await asyncio.sleep(self._wait_s(attempt, asked_to_wait_s))
        times = f"{self.attempts} attempts" if self.attempts > 1 else "one attempt"
        raise Failed(failure.error_type, f"{failure.message} ({times})", transient=True)

    def _wait_s(self, attempt: int, asked_for_s: float | None) -> float:
        backoff_s = self.backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
        return min(self.longest_wait_s, max(backoff_s, asked_for_s or 0.0))

    def _body(self, request: Request) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        if request.video and len(request.pictures) > 1:
            said = f"These {len(request.pictures)} pictures are frames of one video, in order."
            content.append({"type": "text", "text": said})
        for picture in request.pictures:
            if request.video and picture.time_s is not None:
                content.append({"type": "text", "text": f"<{picture.time_s:.1f} seconds>"})
            data = base64.b64encode(picture.jpeg).decode()
            url = {"url": f"data:image/jpeg;base64,{data}"}
            content.append({"type": "image_url", "image_url": url})
        content.append({"type": "text", "text": _plain(request.text)})
        system = []
        if request.system is not None:
            system = [{"role": "system", "content": _plain(request.system)}]
        return {
            "model": self.model,
            "messages": [*system, {"role": "user", "content": content}],
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "stream": False,
        }


def _plain(text: str) -> str:
    """Text in which "<|im_end|>" and "<image>" are words: captions from outside hold any."""
    return _CONTROL.sub("< ", text)


def retry_after_s(header: str | None, now_s: float) -> float | None:
    """Seconds that a Retry-After header asks to wait; None where it is absent or means nothing.

    Args:
        header: Seconds or an HTTP date (RFC 9110, section 10.2.3).
        now_s: Seconds since the epoch.
    """
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - now_s
        except ValueError:
            return None
    return max(0.0, seconds) if seconds < float("inf") else None  # nan, too, means nothing


class _MalformedAnswer(Exception):
    """A success whose content is not what the protocol promises."""


def _passes(status: int) -> bool:
    """Whether the same request may be answered later."""
    return status in (408, 425, 429) or status >= 500


def _refusal(response: httpx.Response) -> Failed:
    """What a status that is no success says of the row.

    400, 413 and 422 are about what was sent, a picture or the length of the text, and final; the
    others (a key, a name, a route) end when someone repairs the configuration.
    """
    status = response.status_code
    said = _words_of(response)
    message = f"the endpoint answered HTTP {status}{': ' if said else ''}{said}"
    return Failed(f"HTTP{status}", message, transient=status not in (400, 413, 422))


def _words_of(response: httpx.Response) -> str:
    """A server's own explanation, where it gives one in a known form."""
    try:
        found = response.json()
    except (ValueError, RecursionError):
        return ""
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    # servers built on pydantic repeat what they refuse in such a list, beside `msg`
    if isinstance(found, list) and found and isinstance(found[0], dict):
        found = found[0].get("msg")
    return " ".join(found.split()) if isinstance(found, str) else ""


def _without_secrets(text: str, headers: dict[str, str]) -> str:
    for value in headers.values():
        text = text.replace(value.removeprefix("Bearer "), "…")
    text = _PICTURES.sub("…", text)
    return text if len(text) <= _SAID else text[:_SAID] + "…"


def _answer_of(response: httpx.Response) -> Answer:
    try:
        choice = response.json()["choices"][0]
        content = choice["message"]["content"]
    except (ValueError, RecursionError):
        raise _MalformedAnswer("the endpoint's answer is no JSON") from None
    except (KeyError, IndexError, TypeError):
        raise _MalformedAnswer("the endpoint's JSON has no choices[0].message.content") from None
    if isinstance(content, list):  # of parts, as some servers give it
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    if content is None:  # nothing was said, or all of it was reasoning
        content = ""
    if not isinstance(content, str):
        raise _MalformedAnswer("the endpoint's message.content is no text")
    content = content.encode("utf-8", "replace").decode()  # halves of a character are no text
    return Answer(text=content, finished=choice.get("finish_reason") != "length")


def _model_names(response: httpx.Response) -> list[str]:
    try:
        return [str(entry["id"]) for entry in response.json()["data"]]
    except (ValueError, KeyError, TypeError):
        return []
