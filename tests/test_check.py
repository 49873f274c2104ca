"""The preflight: each thing that it is to find, found; and nothing found where all is well."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from conftest import REPOSITORY, Cluster

from cluster import check, verdicts
from cluster.probe import Facts, Request, probe
from cluster.shipping import FOLDERS
from cluster.verdicts import Finding, Needs, Node
from engine.lease import Lease
from engine.tables import create

GIB = 2**30
NODE = Node(id="n", name="m", is_head=True, gpus=0, store_bytes=GIB, folders=())


@pytest.fixture(scope="module")
def mine() -> Facts:
    """What this process says of itself."""
    request = dataclasses.replace(check._baseline(), imports=("cv2", "lance"))
    return probe(request)


def test_a_machine_like_this_one_is_right(mine: Facts) -> None:
    found = list(verdicts.of_machine(NODE, mine, mine, 0.0, Needs(disk_gib=0.001, store_gib=0.25)))
    assert [(f.check, f.verdict) for f in found] == [
        (name, "ok")
        for name in ("versions", "code", "imports", "GPUs", "disk", "object store", "clock")
    ]
    assert f"in {REPOSITORY}" in found[1].found


@pytest.mark.parametrize(
    ("there", "verdict", "words"),
    [
        ({"ray": "2.59.9"}, "wrong", "ray 2.59.9 (here 2.60"),
        ({"pyarrow": "1.0.0"}, "wrong", "pyarrow 1.0.0 (here"),
        ({"numpy": "+1"}, "warning", "numpy"),  # another patch
        ({"av": None}, "wrong", "av is missing"),
        ({"transformers": None}, "warning", "transformers is missing"),
    ],
)
def test_other_versions_are_found(
    there: dict[str, str | None], verdict: str, words: str, mine: Facts
) -> None:
    versions = mine.versions | {"transformers": "5.1.0"}
    here = dataclasses.replace(mine, versions=versions)
    (name, version), *_ = there.items()
    if version == "+1":
        version = f"{mine.versions[name]}1"
    facts = dataclasses.replace(mine, versions=versions | {name: version})
    found = verdicts.of_versions(facts, here, "m", verdicts.ALWAYS)
    assert found.verdict == verdict and words in found.found and "constraints.txt" in found.todo


def test_another_python_is_found(mine: Facts) -> None:
    for python, verdict in (("3.9.1", "wrong"), (f"{mine.python}9", "warning")):
        facts = dataclasses.replace(mine, python=python)
        assert verdicts.of_versions(facts, mine, "m", ()).verdict == verdict


def test_other_code_under_our_names_is_found(tmp_path: Path, mine: Facts) -> None:
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    code = (
        "import pickle, sys; from cluster_probe import *;"
        f"pickle.dump(probe(Request(packages={FOLDERS[:4]!r}, distributions=(), imports=())),"
        "sys.stdout.buffer)"
    )
    (tmp_path / "cluster_probe.py").write_text((REPOSITORY / "cluster" / "probe.py").read_text())
    sys.path.append(str(tmp_path))
    try:
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
        found = verdicts.of_code(pickle.loads(done.stdout), mine, "m")
    finally:
        sys.path.remove(str(tmp_path))
    assert found.verdict == "wrong"
    assert f"engine in {tmp_path / 'engine'} is another version" in found.found
    assert "no cluster" in found.found
    facts = dataclasses.replace(mine, lance=("lance", "pylance"))
    assert "not from pylance alone" in verdicts.of_code(facts, mine, "m").found


def test_a_machine_without_our_code_says_so() -> None:
    """The probe travels by value: it needs nothing of ours there."""
    from ray import cloudpickle

    import cluster.probe

    cloudpickle.register_pickle_by_value(cluster.probe)
    try:
        request = Request(
            packages=("engine",), distributions=("ray",), imports=("no_such_module",),
            dataset="/data", place="/data", mark="x",
        )  # fmt: skip
        sent = cloudpickle.dumps(lambda: dataclasses.asdict(probe(request)))
    finally:
        cloudpickle.unregister_pickle_by_value(cluster.probe)
    code = f"""
import json, pickle, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {FOLDERS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}")
sys.meta_path.insert(0, Hidden())
from ray import cloudpickle
print(json.dumps(pickle.loads(sys.stdin.buffer.read())()))
"""
    done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    facts = Facts(**json.loads(done.stdout))
    assert facts.versions["ray"] and facts.rooms
    assert "No module named 'engine'" in facts.errors["packages"]
    assert "No module named 'engine'" in facts.errors["dataset"]
    assert "No module named 'no_such_module'" in facts.errors["import no_such_module"]
    assert verdicts.of_code(facts, facts, "m").verdict == "wrong"


def test_a_library_that_cv2_lacks_is_named_with_its_package(mine: Facts) -> None:
    error = "ImportError: libGL.so.1: cannot open shared object file: No such file or directory"
    facts = dataclasses.replace(mine, errors={"import cv2": error})
    found = verdicts.of_imports(facts, "m")
    assert found.verdict == "wrong" and "libGL.so.1" in found.found
    assert "apt-get install libgl1" in found.todo


@pytest.mark.parametrize(
    ("ray", "torch", "verdict", "words"),
    [
        (0, [], "ok", "none"),
        (2, [None, None], "ok", "2 (H100), each computes"),
        (2, [None], "wrong", "Ray counts 2, torch finds 1"),
        (0, [None], "warning", "Ray counts 0, torch finds 1"),
        (1, ["CUDA error: out of memory"], "wrong", "out of memory"),
    ],
)
def test_gpus_of_ray_and_of_torch_are_compared(
    ray: int, torch: list[str | None], verdict: str, words: str, mine: Facts
) -> None:
    gpus = [{"name": "H100", "error": error} for error in torch]
    facts = dataclasses.replace(mine, gpus=gpus, versions={"torch": "2.14.1"})
    found = verdicts.of_gpus(facts, dataclasses.replace(NODE, gpus=float(ray)))
    assert (found.verdict, words in found.found) == (verdict, True), found


@pytest.mark.gpu
def test_the_gpus_of_this_machine_compute() -> None:
    import torch

    facts = probe(Request(packages=(), distributions=("torch",), imports=(), gpus=1))
    assert not facts.errors
    assert [g["name"] for g in facts.gpus] == [
        torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
    ]
    assert all(g["error"] is None and g["free_bytes"] > 0 for g in facts.gpus)


def test_room_is_compared_with_its_limits(mine: Facts) -> None:
    facts = dataclasses.replace(mine, rooms={"/tmp": (5 * GIB, 100 * GIB)}, shm=(GIB, 2 * GIB))
    assert verdicts.of_room(facts, NODE, 4).verdict == "ok"
    low = verdicts.of_room(facts, NODE, 6)
    assert low.verdict == "wrong" and "5.0 of 100 GiB free in /tmp; 6 GiB are needed" in low.found
    assert verdicts.of_store(facts, NODE, 0.25).verdict == "ok"
    assert "needed" in verdicts.of_store(facts, NODE, 1.5).found
    large = dataclasses.replace(NODE, store_bytes=3 * GIB)
    assert "--shm-size" in verdicts.of_store(facts, large, 0.25).todo


def test_clocks_may_be_half_a_minute_apart() -> None:
    assert [verdicts.of_clock(s, "m").verdict for s in (0.0, 29.0, 31.0)] == ["ok", "ok", "warning"]


@pytest.fixture
def dashboard(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that answers everyone with one status."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
    ("dashboard", "verdict"), [(401, "ok"), (200, "warning")], indirect=["dashboard"]
)
def test_a_dashboard_that_asks_for_no_token_is_found(dashboard: str, verdict: str) -> None:
    request = Request(
        packages=(), distributions=(), imports=(), dashboard=f"http://{dashboard}/jobs/"
    )
    facts = dataclasses.replace(probe(request), token_mode=0o600)
    assert verdicts.of_authentication(facts, dashboard, "m").verdict == verdict


def test_a_dashboard_that_cannot_be_asked_is_not_taken_for_one_that_is_safe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("cluster.probe._HTTP_S", 0.2)
        request = Request(packages=(), distributions=(), imports=(), dashboard=f"http://{host}/")
        found = verdicts.of_authentication(probe(request), host, "m")
    assert (found.verdict, found.todo.split(" in ")[0]) == ("warning", "look at dashboard.log")
    assert "timed out" in found.found
    found = verdicts.of_authentication(probe(request), host, "m")
    assert (found.verdict, found.found.split(",")[0]) == ("ok", "no dashboard listens")


@pytest.mark.parametrize(
    ("status", "host", "mode", "verdict", "words"),
    [
        (200, "10.0.0.7:8265", 0o600, "wrong", "answers without a token"),
        (401, "10.0.0.7:8265", 0o600, "warning", "can be reached from other machines"),
        (401, "127.0.0.1:8265", 0o644, "warning", "can read ~/.ray/auth_token (mode 644)"),
        (401, "[::1]:8265", None, "ok", "token authentication is on"),
    ],
)
def test_who_can_reach_the_dashboard_is_told(
    status: int, host: str, mode: int | None, verdict: str, words: str
) -> None:
    found = verdicts.of_authentication(Facts(dashboard=status, token_mode=mode), host, "m")
    assert found.verdict == verdict and words in found.found


# a dataset


def asked(root: Path, place: Path, mark: str) -> Facts:
    return probe(
        Request(
            packages=(), distributions=(), imports=(), dataset=str(root),
            place=str(place), mark=mark,
        )
    )  # fmt: skip


def test_a_dataset_is_written_to_and_left_as_it_was(tmp_path: Path) -> None:
    root = tmp_path / "set"
    create(str(root), "classic")
    (root / "mark").write_text("mark")
    before = sorted(os.listdir(root))
    assert not asked(root, root, "mark").errors
    assert sorted(os.listdir(root)) == before
    (root / "clips.lance" / "_versions").rename(root / "clips.lance" / "_gone")
    assert "clips" in asked(root, root, "mark").errors["dataset"]


def test_a_folder_that_is_another_one_there_is_found(tmp_path: Path) -> None:
    assert "is another one here" in asked(tmp_path, tmp_path, "never-written").errors["dataset"]


def test_who_has_a_dataset_is_told(tmp_path: Path) -> None:
    root = str(tmp_path / "set")
    create(root, "classic")
    assert check._state(root).found == f"{root}: recipe classic, 0 sources, 0 clips; free"
    with Lease(root, "run-7"):
        found = check._state(root)
        assert found.verdict == "warning" and "in use by run run-7 (process" in found.found
    assert check._state(root).verdict == "ok"


# all of it


def run(env: dict[str, str], *arguments: object) -> tuple[int, list[Finding], str]:
    done = subprocess.run(
        [sys.executable, "-m", "cluster", "check", "--json", *map(str, arguments)],
        cwd=REPOSITORY,
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert "Traceback" not in done.stderr
    rows = json.loads(done.stdout)["findings"] if done.stdout else []
    return done.returncode, [Finding(**row) for row in rows], done.stderr


@pytest.mark.slow
def test_a_cluster_that_is_right(cluster: Cluster, samples: Path, tmp_path: Path) -> None:
    code, found, err = run(
        cluster.env, "--src", samples, "--dataset", tmp_path / "set", "--recipe", "classic",
        "--disk-gib", 0.001,
    )  # fmt: skip
    assert code == 0, err
    by_check = {(f.check, f.machine == "here"): f for f in found}
    assert [c for c, here in by_check if here] == ["dataset", "sources"]
    verdicts = {c: f.verdict for (c, here), f in by_check.items() if not here}
    store = verdicts.pop("object store")
    assert store == "warning"  # 200 MB, where 256 MiB are asked for
    authentication = verdicts.pop("authentication")
    assert set(verdicts.values()) == {"ok"}
    assert list(verdicts) == [
        "versions", "code", "imports", "GPUs", "disk", "clock", "dataset", "source", "recipe"
    ]  # fmt: skip
    assert authentication == "ok"
    assert not (tmp_path / "set").exists() and not list(tmp_path.glob(".reelwright*"))


@pytest.mark.slow
def test_all_that_is_wrong_is_told_at_once(cluster: Cluster, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    taken = tmp_path / "a file"
    taken.touch()
    code, found, _ = run(
        cluster.env, "--src", tmp_path / "nowhere", "--dataset", taken / "set",
        "--recipe", "mimir", "--captioner", "/no/weights", "--evaluation", "custom",
        "--weights", weights, "--models", f"a={weights}", "--training", "mimir",
        "--disk-gib", 10**6, "--gpus", 64,
    )  # fmt: skip
    assert code == 1
    wrong = {f.check: f for f in found if f.verdict == "wrong"}
    assert set(wrong) == {
        "sources", "dataset", "recipe", "evaluation", "models", "training", "disk", "GPUs"
    }  # fmt: skip
    assert f"{taken} is a file" in wrong["dataset"].found
    assert "no weights at /no/weights" in wrong["recipe"].found
    assert f"files of weights are missing in {weights}" in wrong["evaluation"].found
    assert "python -m evals weights custom" in wrong["evaluation"].todo
    assert "is no model" in wrong["models"].found
    assert "hf download" in wrong["training"].found
    assert "1e+06 GiB are needed" in wrong["disk"].found
    assert wrong["GPUs"].found.endswith(", 64 needed")
    assert all(f.todo for f in found if f.verdict != "ok")


@pytest.mark.slow
def test_a_machine_that_starts_no_task_and_a_cluster_that_is_none(cluster: Cluster) -> None:
    code, found, _ = run(cluster.env, "--timeout-s", 0.01)
    assert code == 1
    assert [(f.check, f.verdict) for f in found] == [("tasks", "wrong")]
    assert "no task has ended there within 0.01 s" in found[0].found
    code, found, err = run(cluster.env | {"RAY_ADDRESS": "127.0.0.1:1"})
    assert (code, found) == (1, [])
    assert "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1" in err and err.count("\n") == 1
    code, found, err = run(cluster.env | {"RAY_AUTH_TOKEN": "0" * 64})
    assert (code, found) == (1, []) and err.count("\n") == 1
    assert "refuses this token" in err


@pytest.mark.slow
def test_without_a_cluster_this_machine_is_looked_at() -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_A")}
    code, found, err = run(env | {"RAY_ADDRESS": "local"}, "--disk-gib", 0.001)
    assert code == 0, (found, err)
    assert {f.check for f in found} >= {"versions", "code", "GPUs", "authentication"}
