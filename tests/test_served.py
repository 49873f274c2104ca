"""A model behind an endpoint of Ray Serve: what it says, makes and refuses."""

import asyncio
import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import REPOSITORY, Cluster, free_ports
from tiny_models import frames_of, make_export

from evals.models import TOKEN, Asked, Model, parse, with_settings
from evals.served import VideoService, check_host


@pytest.fixture(scope="module")
def export(small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("served") / "export")


@pytest.fixture(scope="module")
def model(export: Path) -> Model:
    return with_settings(parse([f"a={export}"]), ["a.steps=1", "a.frames=4"])[0]


@pytest.fixture(scope="module")
def service(model: Model) -> VideoService:
    return VideoService(model, "cpu", "the key")


def ask(service: VideoService, body: Any, **headers: str) -> tuple[int, str, bytes]:
    shown = {"authorization": "Bearer the key"} | headers
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return asyncio.run(service.answer("POST", shown, content))


def test_what_it_says(service: VideoService, model: Model) -> None:
    status, _, content = asyncio.run(
        service.answer("GET", {"authorization": "Bearer the key"}, b"")
    )
    said = json.loads(content)
    assert status == 200 and said["checkpoint"] == model.checkpoint and said["notes"] == ["tiny"]
    assert said["settings"]["steps"] == 1 and "precision" not in said["settings"]
    for shown in ({}, {"authorization": "Bearer the kez"}, {"authorization": "Bearer "}):
        assert asyncio.run(service.answer("GET", shown, b""))[0] == 401


def test_what_it_makes(service: VideoService, model: Model) -> None:
    status, kind, mp4 = ask(service, {"prompt": "a cat", "seed": 3})
    assert (status, kind) == (200, "video/mp4")
    (made,) = model.load("cpu")([Asked(text="a cat", seed=3)])
    _, _, content = ask(service, {"prompt": "a cat", "seed": 3}, accept="application/json")
    said = json.loads(content)
    assert said["timings"].keys() == made.timings.keys() and said["notes"] == []
    for file in (mp4, base64.b64decode(said["video"])):
        assert abs(frames_of(file) - made.frames).mean() < 12
    other = ask(service, {"prompt": "a cat", "seed": 4})[2]
    assert abs(frames_of(other) - made.frames).mean() > 12
    asked = {"prompt": "a cat", "seed": 3, "frames": 2, "height": 32, "width": None}
    assert frames_of(ask(service, asked)[2]).shape == (2, 32, 64, 3)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"no json", 400, "no JSON"),
        ([1], 400, "needs"),
        ({"prompt": 3}, 400, "needs"),
        ({"prompt": "a", "seed": -1}, 400, "seed"),
        ({"prompt": "a", "seed": True}, 400, "seed"),
        ({"prompt": "a", "steps": 0}, 400, "more than 0"),
        ({"prompt": "a", "fps": 3}, 400, "no setting fps"),
        ({"prompt": "cat " * 200}, 422, "tokens"),
    ],
)
def test_what_it_refuses(service: VideoService, body: Any, status: int, words: str) -> None:
    found, _, content = ask(service, body)
    assert found == status and words in json.loads(content)["error"]


def test_others_need_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    for own in ("127.0.0.1", "::1", "localhost"):
        check_host(own)
    with pytest.raises(ValueError, match="lets others ask"):
        check_host("0.0.0.0")
    monkeypatch.setenv(TOKEN, "a key")
    check_host("0.0.0.0")


@pytest.fixture
def url(export: Path, cluster: Cluster) -> Iterator[str]:
    """`python -m evals.served`, on the session's cluster."""
    pytest.importorskip("ray.serve", exc_type=ImportError, reason="Ray Serve is not installed")
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "evals.served", str(export), "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--set", "steps=1", "frames=4"],
        cwd=REPOSITORY,
        env=cluster.env | {TOKEN: "the key", "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.slow
def test_ray_serve(url: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client of the evaluation against the server: the export's own video comes back."""
    with pytest.raises(ValueError, match=f"{TOKEN} is not set"):
        parse([f"far={url}"])
    monkeypatch.setenv(TOKEN, "the key")
    (far,) = parse([f"far={url}"])
    assert (far.checkpoint, far.about) == (model.checkpoint, "finetune")
    assert far.settings["steps"] == 1
    (made,) = far.load("cpu")([Asked(text="a cat", seed=3)])
    (own,) = model.load("cpu")([Asked(text="a cat", seed=3)])
    assert made.file and "denoise_s" in made.timings
    assert abs(frames_of(made.file) - own.frames).mean() < 12
    assert httpx.post(url, json={"prompt": "a cat"}).status_code == 401
