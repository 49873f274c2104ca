"""What tests share: one Ray cluster for the session, the command line, the real videos."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

REPOSITORY = Path(__file__).resolve().parents[1]
VIDEOS = REPOSITORY.parent / "shared" / "videos"
sys.path[:0] = [str(Path(__file__).parent)]  # for helpers beside the tests
# A shell gives a background job a deaf ear for Ctrl-C, which tests press.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Ray reads these once, when it is imported.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`: files that run on a session's Ray stay in one process, for it takes long to start.

    Two such groups, about as long as each other: those with models, and the others.
    (xdist's own `--dist loadgroup` does nothing under this pytest, whose ids cannot be changed.)
    """
    from xdist.scheduler import LoadScopeScheduling

    asks = re.compile(r"\b(cluster: Cluster|connection: None|[rR]un: Run|curate: Curate)\b")
    has_models = re.compile(r"\bfrom (trainers|evals)\b")

    class ByRay(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            if file not in found:
                text = (REPOSITORY / file).read_text(encoding="utf-8")
                kind = "models" if has_models.search(text) else "media"
                found[file] = f"ray, {kind}" if asks.search(text) else file
            return found[file]

    found: dict[str, str] = {}
    return ByRay(config, log)


@pytest.fixture(autouse=True)
def no_errors_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Anything that logs an error fails its test."""
    yield
    errors = [r.getMessage() for r in caplog.get_records("call") if r.levelno >= logging.ERROR]
    assert not errors


@pytest.fixture(scope="session")
def videos() -> Path:
    """The folder of real clips beside the repository."""
    if not VIDEOS.is_dir():
        pytest.skip("the folder of real videos is not here")
    return VIDEOS


def tool(name: str) -> str:
    """The path of a program that a test needs; in CI a missing one is a failure."""
    found = shutil.which(name)
    if not found:
        assert not os.environ.get("CI"), f"{name} is missing: run make system-deps"
        pytest.skip(f"{name} is not installed: run make system-deps")
    return found


def free_ports(num: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(num)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@dataclass(frozen=True)
class Cluster:
    """A running Ray cluster and the environment that reaches it."""

    address: str
    dashboard: str
    env: dict[str, str]
    repository: Path
    """A copy of the code, where `ray start` ran."""
    home: Path
    """The home folder of its user."""

    def processes(self, kind: str) -> list[psutil.Process]:
        """Actors that read or that measure, or sandboxed children, of this cluster alone."""
        words = {
            "actor": ("ray::", "Reader"),
            "gauge": ("ray::", "Gauge"),
            "child": ("", "engine.sandbox"),
        }
        begins, holds = words[kind]
        found = []
        for one in psutil.process_iter(["name", "cmdline"]):
            line = " ".join(one.info["cmdline"] or [])
            if line.startswith(begins) and holds in line and self._is_of_it(one):
                found.append(one)
        return found

    def _is_of_it(self, process: psutil.Process) -> bool:
        folder = str(self.repository.parent)
        with contextlib.suppress(psutil.NoSuchProcess):
            return any(folder in part for p in process.parents() for part in p.cmdline())
        return False

    def job_env(self) -> dict[str, str]:
        """For `ray job submit`."""
        return self.env | {"RAY_API_SERVER_ADDRESS": self.dashboard}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """`ray start --head` with two cores, as a user would; shared by the whole session."""
    folder = tempfile.mkdtemp(prefix="rw", dir="/tmp")  # short: it holds sockets
    repository, home = Path(folder, "repository"), Path(folder, "home")
    home.mkdir()
    # as it lies on a cluster's machines, not installed
    for name in ("engine", "pipelines", "trainers", "evals", "cluster"):
        shutil.copytree(
            REPOSITORY / name, repository / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    port, dashboard, client, listen, grpc, metrics = free_ports(6)
    env = os.environ | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    env.pop("RAY_ADDRESS", None)
    command = [
        str(Path(sys.executable).parent / "ray"),
        "start",
        "--head",
        "--block",
        f"--port={port}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}",
        f"--dashboard-agent-listen-port={listen}",
        f"--dashboard-agent-grpc-port={grpc}",
        f"--metrics-export-port={metrics}",
        "--node-ip-address=127.0.0.1",
        "--num-cpus=2",
        "--object-store-memory=200000000",
        f"--temp-dir={folder}",
        "--include-log-monitor=false",  # it looks at all logs all the time, for drivers that ask
        "--disable-usage-stats",
    ]
    with open(Path(folder, "start.log"), "wb") as log:
        process = subprocess.Popen(
            command, env=env, stdout=log, stderr=log, cwd=repository, start_new_session=True
        )
    address = f"127.0.0.1:{port}"
    try:
        _wait_for_port(dashboard, process, Path(folder, "start.log"))
        yield Cluster(
            address,
            f"http://127.0.0.1:{dashboard}",
            env | {"RAY_ADDRESS": address},
            repository,
            home,
        )
    finally:
        # not `ray stop`: that ends every cluster of this user on the machine
        for one in psutil.process_iter(["cmdline"]):
            if any(folder in part for part in one.info["cmdline"] or ()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 90
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)


@dataclass(frozen=True)
class Ran:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Its standard output, which is one JSON object and nothing else."""
        return json.loads(self.out)


Run = Callable[..., Ran]


def command(script: str, *arguments: object) -> list[str]:
    """The command line of a script of `pipelines/`."""
    path = REPOSITORY / "pipelines" / f"{script}.py"
    return [sys.executable, str(path), *map(str, arguments)]


class Driver:
    """A run of the command line in a process of its own."""

    def __init__(self, cluster: Cluster, src: object, dst: object, *more: object):
        arguments = ("--src", src, "--dst", dst, "--json", "--commit-every-s", 0.3, *more)
        self.process = subprocess.Popen(
            command("curate", *arguments),
            env=cluster.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, timeout_s: float = 120) -> Ran:
        out, err = self.process.communicate(timeout=timeout_s)
        return Ran(self.process.returncode, out, err)


@pytest.fixture(scope="session")
def run_in_session(cluster: Cluster) -> Run:
    """Runs a command of the project on the session's cluster: run("curate", "--src", ...)."""

    def call(
        script: str,
        *arguments: object,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        timeout_s: float = 300,
    ) -> Ran:
        done = subprocess.run(
            command(script, *arguments),
            cwd=cwd or REPOSITORY,
            env=cluster.env | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def run(run_in_session: Run) -> Run:
    """The same."""
    return run_in_session


@pytest.fixture(scope="session")
def connection(cluster: Cluster) -> Iterator[None]:
    """This process as a driver of the session's cluster."""
    from engine.session import connected

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", cluster.env["RAY_ADDRESS"])
        with connected():
            yield


Curate = Callable[..., Any]


@pytest.fixture
def curate(connection: None) -> Curate:
    """A whole run in this process: curate(src, dst, **options) gives its result.

    The stages are the basic and quality ones, and those given as `further`.
    """
    from engine.curation import Curation, Options
    from engine.sources import list_sources
    from engine.tables import create
    from pipelines.cli import with_bounds
    from pipelines.recipes import CLASSIC

    def call(
        src: object,
        dst: object,
        *,
        bounds: tuple[str, ...] = (),
        scan: dict[str, Any] | None = None,
        further: tuple[Any, ...] = (),
        pairs: tuple[Any, ...] = (),
        cuts: Any = None,
        watch: Callable[[Any], None] = lambda _: None,
        **options: Any,
    ) -> Any:
        recipe = CLASSIC.with_scan(**(scan or {}))
        create(str(dst), recipe.name)
        return Curation(
            str(dst),
            recipe=recipe.name,
            scan=recipe.scan,
            stages=with_bounds((*recipe.stages[:2], *further), bounds),
            pairs=pairs,
            cuts=cuts,
            options=Options(**options),
            connect=contextlib.nullcontext,
            watch=watch,
        ).run(
            None
            if src is None
            else list_sources([str(s) for s in src] if isinstance(src, list) else str(src))
        )

    return call


def once(
    factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None] = lambda _: None
) -> Path:
    """A folder that is made once for all processes of this run of the tests, who only read it."""
    base = factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / f"once_{name}"
    with FileLock(folder.with_suffix(".lock"), timeout=280):
        made = folder.with_suffix(".made")
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample corpus."""
    from pipelines.samples import make_samples

    return once(tmp_path_factory, "samples", make_samples)


VOLATILE = ("run_id", "mtime_ns", "frames_decoded")


def rows(root: object, table: str, *, without: tuple[str, ...] = VOLATILE) -> list[dict[str, Any]]:
    """All rows of a table of a dataset, in a fixed order, without what differs by run."""
    from engine.tables import read

    found = read(str(root), table)
    names = [n for n in found.schema.names if n not in (*without, "jpeg", "mp4")]
    listed = found.to_table(columns=names).to_pylist()
    if table == "keyframes":
        blobs = found.take_blobs("jpeg", indices=list(range(len(listed))))
        for row, blob in zip(listed, blobs, strict=True):
            row["jpeg"] = blob.read()
    key = {
        "sources": ("uri",),
        "clips": ("source_uri", "start_s", "end_s", "clip_id"),
        "pairs": ("pair_id",),
        "cuts": ("clip_id",),
    }
    # an image has no time
    return sorted(
        listed,
        key=lambda r: [
            r[k] if r[k] is not None else 0 for k in key.get(table, ("clip_id", "frame"))
        ],
    )


@dataclass(frozen=True)
class Bucket:
    """A bucket of a local S3 server."""

    uri: str
    env: dict[str, str]

    def put(self, key: str, data: bytes) -> None:
        """Stores an object."""
        import fsspec

        fs = fsspec.filesystem("s3", endpoint_url=self.env["AWS_ENDPOINT_URL"])
        fs.pipe_file(f"{self.uri.removeprefix('s3://')}/{key}", data)

    def on(self, cluster: Cluster) -> Cluster:
        """The cluster as seen by a driver that reaches this bucket."""
        return replace(cluster, env=cluster.env | self.env)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """An empty bucket, reached by the standard AWS variables alone."""
    import boto3

    (port,) = free_ports(1)
    env = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    server = subprocess.Popen(
        [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        boto3.client("s3").create_bucket(Bucket="reel")
        yield Bucket("s3://reel", env)
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="session")
def tiny_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the small checkpoints of this session are built, in place of the user's cache."""
    folder = once(tmp_path_factory, "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_cache(tiny_home: Path) -> Path:
    """A folder with small random weights, as VBench looks for them."""
    from evals.tiny_weights import default_folder, make_vbench_cache

    return make_vbench_cache(default_folder())


@pytest.fixture(scope="module")
def small(tiny_home: Path) -> Iterator[None]:
    """The small checkpoints of training; threads would only wait for each other on them."""
    import torch

    from trainers.recipes import make_tiny

    make_tiny()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _made(script: str, *arguments: object, home: Path) -> None:
    """Runs a command on a Ray of its own, so that who asks for what it makes needs no cluster."""
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        command(script, *arguments, "--json"),
        cwd=REPOSITORY,
        env=env | {"XDG_CACHE_HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def quadruples(samples: Path, tiny_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset that curate.py made of some samples, with the pairs that recaption.py made."""
    chosen = "coins coffee_pan astronaut_zoom two_to_one wide square vfr turned motorcycle_hd"

    def make(folder: Path) -> None:
        src, dst = folder / "some", folder / "set"
        src.mkdir()
        for path in samples.iterdir():
            if path.stem in chosen.split():
                shutil.copy(path, src)
        _made("curate", "--src", src, "--dst", dst, home=tiny_home)
        _made("recaption", "--src", dst, "--models", "tiny", home=tiny_home)

    return once(tmp_path_factory, "quadruples", make) / "set"


@pytest.fixture(scope="session")
def spans(samples: Path, tiny_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of the recipe `long`, captioned by small models: most of it is kept."""
    loose = "aesthetic_score.lo=0 watermark_score.hi=1 clip_score.lo=0 ocr_area_frac.hi=1".split()
    loose += [f"repetition_{n}gram.hi=1" for n in (2, 5, 10)]

    def make(folder: Path) -> None:
        src, dst = folder / "takes", folder / "set"
        src.mkdir()
        for name in ("coffee_pan.mp4", "astronaut_zoom.mp4", "two_to_one.mp4", "long_take.mp4"):
            shutil.copy(samples / name, src)
        flags = ("--models", "tiny", "--set", *loose)
        _made("curate", "long", "--src", src, "--dst", dst, *flags, home=tiny_home)

    return once(tmp_path_factory, "spans", make) / "set"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium: see `pages.Browser`."""
    from pages import Browser

    made = Browser(tool("chromium"), tool("chromedriver"))
    yield made
    made.quit()


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[..., str]]:
    """Starts `python -m cluster dashboard` or `vote`; gives its address.

    serve("dashboard", dataset, "--votes", path). The same again is the same server.
    """
    from pages import Server

    servers: dict[tuple[str, ...], Server] = {}

    def start(*arguments: object) -> str:
        line = tuple(map(str, arguments))
        if line not in servers:
            servers[line] = Server(line, free_ports(1)[0])
        return servers[line].url

    yield start
    for server in servers.values():
        server.stop()
