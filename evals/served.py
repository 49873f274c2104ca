"""A model behind an endpoint: the client that evaluation has, and a server that Ray runs.

    python -m evals.served FOLDER
    serve run evals.served:app folder=FOLDER replicas=2

These serve an export or a diffusers pipeline by Ray Serve, the first at http://127.0.0.1:8000.
`POST URL` with the JSON `{"prompt": …, "seed": …}` and the model's settings answers the video as
`video/mp4`, or as JSON with `video` (base64), `rephrased`, `notes` and `timings`. `GET URL` may say
`checkpoint`, `model`, `settings` (names with their defaults) and `notes` as JSON. Whatever speaks
this can be evaluated.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import ipaddress
import json
import os
import random
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import tyro

from engine import command
from engine.endpoint import retry_after_s
from engine.operator import Failed
from evals.models import COMMON, TOKEN, Asked, Made, Model, Setting, parse, with_settings

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.requests import Request
    from starlette.responses import Response

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

    def says(self) -> dict[str, Any]:
        """What it says of itself, as fields of `Model`.

        Where it says nothing, its URL stands for its weights, and it is told what is common.

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
        notes = about.get("notes")
        return {
            "checkpoint": str(about.get("checkpoint") or self.url),
            "about": str(about.get("model", "")),
            "notes": tuple(map(str, notes)) if isinstance(notes, list) else (),
            "known": known,
        }

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


class VideoService:
    """The server's side: one model, one video at a time.

    Args:
        model: An export or a diffusers pipeline.
        device: Where it runs.
        key: That requests are to show; None asks for none.
    """

    def __init__(self, model: Model, device: str, key: str | None):
        from evals.loading import loaded

        self.model, self._key = model, key
        self._run = loaded(model, device)
        self._turn = asyncio.Lock()

    async def __call__(self, request: Request) -> Response:
        """Answers a request; see the top of this file."""
        from starlette.responses import Response

        status, kind, content = await self.answer(
            request.method, dict(request.headers), await request.body()
        )
        return Response(content, status_code=status, media_type=kind)

    async def answer(
        self, method: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, str, bytes]:
        """Status, content type and content, for a request with header names in small letters."""
        shown = headers.get("authorization", "").removeprefix("Bearer ")
        if self._key is not None and not hmac.compare_digest(shown.encode(), self._key.encode()):
            return _said(401, error="a key is wanted: Authorization: Bearer KEY")
        if method != "POST":
            return _said(200, **self._about())
        try:
            asked, settings = self._read(body)
        except ValueError as error:
            return _said(400, error=str(error))
        try:
            async with self._turn:
                made = await asyncio.to_thread(self._made, asked, settings)
        except OSError as error:
            return _said(500, error=_cause(error))
        except Exception as error:  # noqa: BLE001 - whatever the model does is told
            return _said(422, error=_cause(error))
        assert made.file is not None
        if "application/json" not in headers.get("accept", ""):
            return 200, "video/mp4", made.file
        return _said(
            200,
            video=base64.b64encode(made.file).decode(),
            rephrased=made.rephrased,
            notes=list(made.notes),
            timings=dict(made.timings),
        )

    def _about(self) -> dict[str, Any]:
        settings = {n: self.model.settings.get(n) for n in self.model.known if n != "precision"}
        about = {"model": self.model.about, "checkpoint": self.model.checkpoint}
        return about | {"settings": settings, "notes": list(self.model.notes)}

    def _read(self, body: bytes) -> tuple[Asked, dict[str, Any]]:
        try:
            given = json.loads(body)
        except (ValueError, RecursionError):
            raise ValueError("the request's body is no JSON") from None
        if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
            raise ValueError('the request needs {"prompt": TEXT}')
        seed = given.get("seed", 0)
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise ValueError("seed must be a whole number, 0 or more")
        settings = dict(self.model.settings)
        for name, value in given.items():
            if name in ("prompt", "seed") or value is None:
                continue
            if name not in self.model.known or name == "precision":
                raise ValueError(f"there is no setting {name}: see GET")
            settings[name] = self.model.known[name].value(name, _words(value))
        return Asked(text=given["prompt"], seed=seed), settings

    def _made(self, asked: Asked, settings: Mapping[str, Any]) -> Made:
        from evals.generating import even
        from trainers.videos import write_mp4

        made = self._run(asked, settings)
        assert made.frames is not None and made.fps is not None
        frames_FHW3, note = even(made.frames)
        with tempfile.TemporaryDirectory(prefix="reelwright-") as folder:
            write_mp4(Path(folder, "video.mp4"), frames_FHW3, made.fps)
            file = Path(folder, "video.mp4").read_bytes()
        notes = (*made.notes, *([note] if note else []))
        return Made(file=file, rephrased=made.rephrased, notes=notes, timings=made.timings)


def _words(value: Any) -> str:
    """As it would be written on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _said(status: int, **about: Any) -> tuple[int, str, bytes]:
    return status, "application/json", json.dumps(about).encode()


def app(arguments: Mapping[str, str]) -> Application:
    """What `serve run` runs.

    Args:
        arguments: `folder`; `replicas`, by default 1; `gpus` of each, by default 1 where the
            cluster has any; further ones are settings of the model.

    Raises:
        ValueError: The folder holds no model, or there is no such setting.
    """
    import ray

    serve = _serve()
    rest = {**arguments}
    folder, replicas = rest.pop("folder", ""), int(rest.pop("replicas", "1"))
    ray.is_initialized() or ray.init(address="auto", log_to_driver=False)
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    gpus = float(rest.pop("gpus", "1" if has_gpus else "0"))
    (model,) = parse([f"model={folder}"])
    if not model.on_device:
        raise ValueError(f"{folder} is no export and no diffusers pipeline: nothing else is served")
    (model,) = with_settings([model], [f"model.{name}={value}" for name, value in rest.items()])
    deployment = serve.deployment(
        VideoService,
        name="video",
        num_replicas=replicas,
        max_ongoing_requests=64,  # which wait for their turn, and GET does not
        ray_actor_options={"num_gpus": gpus},
    )
    return deployment.bind(model, "cuda" if gpus else "cpu", os.environ.get(TOKEN) or None)


def _serve() -> Any:
    try:
        from ray import serve
    except ModuleNotFoundError as error:
        raise ValueError(
            f"Ray Serve lacks {error.name}: install it with `pip install 'ray[serve]'`"
        ) from None
    return serve


@dataclass(frozen=True, kw_only=True)
class Options:
    """Serves a model by Ray Serve until it is stopped by Ctrl-C."""

    folder: tyro.conf.Positional[str]
    """An export or a diffusers pipeline."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SETTING=VALUE")] = ()
    """Of the model, such as steps=20; requests may ask for others."""
    host: str = "127.0.0.1"
    """Address that is listened at; another than this machine's own needs a key in
    REELWRIGHT_SERVED_TOKEN."""
    port: int = 8000
    replicas: int = 1
    """Copies of the model, a GPU each where there are any."""


def check_host(host: str) -> None:
    """Raises ValueError where others could ask without a key."""
    try:
        is_own = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_own = host == "localhost"
    if not is_own and not os.environ.get(TOKEN):
        raise ValueError(
            f"--host {host} lets others ask, too: set {TOKEN} to a key that they must show"
        )


def main() -> int:
    """Does what the command line says; gives the exit code."""
    from engine.session import connected

    args = command.arguments(Options, __doc__ or "")
    command.set_up_logging()
    try:
        check_host(args.host)
        serve = _serve()
        given = {"folder": args.folder, "replicas": str(args.replicas)}
        given |= dict(one.partition("=")[::2] for one in args.set)
        with connected():
            if serve.status().applications:
                raise ValueError(
                    "Ray Serve runs on this cluster already: add this model to it with"
                    f" `serve run evals.served:app folder={args.folder} --name NAME"
                    " --route-prefix /NAME`"
                )
            try:
                serve.start(http_options={"host": args.host, "port": args.port})
                serve.run(app(given), name="video")
                command.out.print(f"http://{args.host}:{args.port}/", highlight=False)
                while True:
                    time.sleep(3600)
            finally:
                serve.shutdown()  # else it stays on a cluster that is not ours
    except (ValueError, ConnectionError) as error:
        command.fail(str(error))
    except KeyboardInterrupt:
        command.fail("stopped", code=command.INTERRUPTED)
    return 0


if __name__ == "__main__":
    command.end(main())
