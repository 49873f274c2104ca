"""What a machine of the cluster says of itself; it is sent there by value.

So it runs where our code is not, and says that. Only the standard library is imported on top; each
part that fails is a sentence in place of its facts, and the others are told all the same.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pickle
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_GPU_S = 60  # less than `check --timeout-s`, which loses all that a machine would have said
_HTTP_S = 10
_READ_BYTES = 65_536
_NAMED = 5
_DEVICES = ("/dev/dxg", "/dev/kfd")  # of WSL, and of AMD
_GPUS = """
import json, torch
found = []
for i in range(torch.cuda.device_count()):
    facts = {"name": torch.cuda.get_device_name(i), "error": None}
    try:
        a = torch.full((64, 64), 2.0, device=f"cuda:{i}")
        if (a @ a).sum().item() != 64 * 64 * 64 * 4.0:
            facts["error"] = "computes a wrong product"
        facts["free_bytes"] = torch.cuda.mem_get_info(i)[0]
    except RuntimeError as error:
        facts["error"] = str(error).splitlines()[0]
    found.append(facts)
print(json.dumps(found))
"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a machine is asked for."""

    packages: tuple[str, ...]
    """Ours: where from, and what is in them."""
    distributions: tuple[str, ...]
    """Their versions."""
    imports: tuple[str, ...]
    """Modules that have to load their libraries."""
    folders: tuple[str, ...] = ()
    """Whose room is asked for, beside the temporary folder's."""
    dataset: str | None = None
    """Its root."""
    place: str | None = None
    """Folder that a probe is written into: the root, or the nearest above it that is there."""
    mark: str | None = None
    """File in it that the driver wrote, and what it holds, which is its own name."""
    sources: tuple[str, ...] = ()
    """Some that are read from."""
    recipe: bytes | None = None
    """Of `pipelines`, pickled."""
    training: str | None = None
    """A recipe of `trainers`."""
    dimensions: tuple[str, ...] = ()
    """Of an evaluation."""
    weights: str | None = None
    """Folder with VBench's weights."""
    models: tuple[str, ...] = ()
    """As `evals run --models` names them."""
    dashboard: str | None = None
    """Asked without a token."""
    gpus: float | None = None
    """As many as Ray counts there; None: torch is not asked."""


@dataclass
class Facts:
    """What a machine has said; a part that failed is in `errors`, and has no facts."""

    python: str = ""
    clock: float = 0.0
    versions: dict[str, str | None] = field(default_factory=dict)
    packages: dict[str, tuple[str, str] | None] = field(default_factory=dict)
    """By name: its folder and a digest of its code; None where it cannot be found."""
    lance: tuple[str, ...] = ()
    """Distributions that `import lance` may come from: pylance, and another one of that name."""
    rooms: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By folder: free bytes, all bytes."""
    shm: tuple[int, int] | None = None
    gpus: list[dict[str, Any]] = field(default_factory=list)
    dashboard: int | None = None
    """Status of an answer to a request without a token; None: nobody was asked, or listens."""
    token_mode: int | None = None
    """Permissions of ~/.ray/auth_token."""
    errors: dict[str, str] = field(default_factory=dict)


def probe(request: Request) -> Facts:
    """Looks at this machine."""
    facts = Facts(
        python=platform.python_version(),
        versions={name: _version(name) for name in request.distributions},
        token_mode=_mode(Path.home() / ".ray" / "auth_token"),
    )

    def part(name: str, does: Callable[[], None]) -> None:
        try:
            does()
        except Exception as error:  # noqa: BLE001 - whatever is wrong there is what is asked for
            words = " ".join(str(error).split()) or type(error).__name__
            named = isinstance(error, ValueError | OSError)
            facts.errors[name] = words if named else f"{type(error).__name__}: {words}"

    def room() -> None:
        for folder in (tempfile.gettempdir(), *request.folders):
            if os.path.isdir(folder):
                facts.rooms[folder] = _room(folder)
        facts.shm = _room("/dev/shm") if os.path.isdir("/dev/shm") else None

    def packages() -> None:
        for name in request.packages:
            facts.packages[name] = _package(name)
        facts.lance = tuple(name for name in ("lance", "pylance") if _version(name))

    part("room", room)
    part("packages", packages)
    for name in request.imports:
        part(f"import {name}", lambda name=name: importlib.import_module(name))
    if request.gpus or (request.gpus is not None and _has_device()):
        part("gpus", lambda: facts.gpus.extend(_gpus()))
    if request.place is not None and request.mark is not None:
        part("dataset", lambda: _dataset(request))
    for uri in request.sources:
        part(f"source {uri}", lambda uri=uri: _read(uri))
    if request.recipe is not None:
        part("recipe", lambda: pickle.loads(request.recipe or b"").check())
    if request.training is not None:
        part("training", lambda: _training(request.training or ""))
    if request.dimensions:
        part("evaluation", lambda: _evaluation(request))
    if request.models:
        part("models", lambda: _models(request))
    if request.dashboard is not None:
        part("dashboard", lambda: setattr(facts, "dashboard", _status(request.dashboard or "")))
    facts.clock = time.time()
    return facts


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _mode(path: Path) -> int | None:
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return None


def _room(folder: str) -> tuple[int, int]:
    found = shutil.disk_usage(folder)
    return found.free, found.total


def _package(name: str) -> tuple[str, str] | None:
    """Folder and digest of a package's code."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.origin:
        return None
    folder = Path(spec.origin).parent
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        found.update(f"{file.relative_to(folder).as_posix()}:".encode())
        found.update(file.read_bytes())
    return str(folder), found.hexdigest()[:16]


def _has_device() -> bool:
    """Whether there is a device that torch may find: to ask it takes seconds."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or any(map(os.path.exists, _DEVICES))


def _gpus() -> list[dict[str, Any]]:
    """GPUs of torch, each after a small product; in a process of its own, which frees them.

    Ray hides GPUs from a task that asks for none.
    """
    if importlib.util.find_spec("torch") is None:
        return []
    env = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", _GPUS], env=env, capture_output=True, text=True, timeout=_GPU_S
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"torch cannot be asked: {lines[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _dataset(request: Request) -> None:
    """Reads what the driver wrote, writes and removes something, and counts rows."""
    from engine import storage

    assert request.place is not None and request.mark is not None and request.dataset is not None
    try:
        seen = storage.read_bytes(storage.join(request.place, request.mark)).decode()
    except FileNotFoundError:
        seen = ""
    if seen != request.mark:
        raise FileNotFoundError(f"{request.place} is another one here than where this was started")
    own = storage.join(request.place, f".reelwright-check-{uuid.uuid4().hex}")
    storage.write_bytes(own, own.encode())
    try:
        if storage.read_bytes(own) != own.encode():
            raise OSError(f"{own}: what was written is not what is read")
    finally:
        storage.delete(own)
    if request.place == request.dataset and storage.kind(
        storage.join(request.dataset, "dataset.json")
    ):
        from engine.tables import read

        read(request.dataset, "clips").count_rows()


def _read(uri: str) -> None:
    from engine import storage

    with storage.open_read(uri) as file:
        if not file.read(_READ_BYTES):
            raise OSError(f"{uri} is empty")


def _training(name: str) -> None:
    from trainers.recipes import recipe

    found = recipe(name)
    for stage in found.stages:
        found.system.check(stage)


def _evaluation(request: Request) -> None:
    from evals import cache, environments

    reasons = environments.available(request.dimensions, environments.python_of())
    if reasons:
        raise ValueError("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    if request.weights is None:
        return
    missing = [w.path for w in cache.missing(request.dimensions, Path(request.weights))]
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise ValueError(
            f"{len(missing)} files of weights are missing in {request.weights}:"
            f" {', '.join(missing[:_NAMED])}{more}"
        )
    cache.check(request.dimensions, Path(request.weights))  # that each is what it is called


def _models(request: Request) -> None:
    from evals.models import parse

    parse(request.models)


def _status(url: str) -> int | None:
    """Of an answer to a request without a token, whatever proxies are set; None: nobody listens."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=_HTTP_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except urllib.error.URLError as error:
        if isinstance(error.reason, ConnectionRefusedError):
            return None
        raise
