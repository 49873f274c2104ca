"""VBench's own environment: what is said where it is not, and what is measured in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from clips import encode
from packaging.version import Version

from evals import environments
from evals.dimensions import DIMENSIONS, VBENCH
from evals.environments import add_detectron2, available, python_of

ROOT = Path(__file__).parents[1]
GRIT = [name for name in VBENCH if DIMENSIONS[name].environment == "detectron2"]
ALLEY = "alley"


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {name: Version(version) for name, version in (line.split("==") for line in lines)}


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(environments.VARIABLE, raising=False)


def says(folder: Path, **found: Any) -> str:
    """An interpreter that, asked what it has, says this."""
    python = folder / "python"
    known = {"python": sys.version.split()[0], "ray": str(pins("constraints.txt")["ray"])}
    known |= {"vbench": "0.1.5", "numpy": "1.26.4", "pyarrow": None, "errors": {}} | found
    python.write_text(f"#!/bin/sh\necho chatter\necho '{json.dumps(known)}'\n", encoding="utf-8")
    python.chmod(0o755)
    environments._asked.cache_clear()
    return str(python)


def test_pins_are_what_the_environment_needs_and_our_ray_and_torch() -> None:
    pinned, ours = pins("evals/vbench-env.txt"), pins("constraints.txt")
    assert list(pinned) == sorted(pinned)
    assert "pyarrow" not in pinned
    assert pinned["numpy"] < Version("2")
    assert pinned["setuptools"] < Version("82")  # openai-clip imports pkg_resources
    assert str(pinned["transformers"]) == "4.33.2"
    same = ["ray", "torch", "torchvision", "triton", "vbench", "openai-clip", "pyiqa", "decord"]
    for name in (*same, *(name for name in ours if name.startswith(("nvidia-", "cuda-")))):
        assert pinned[name] == ours[name], name


def test_what_is_installed_without_dependencies_has_its_pins() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    alone = project["tool"]["reelwright"]["without-dependencies"]
    assert alone.keys() <= project["project"]["optional-dependencies"].keys()
    assert {name for names in alone.values() for name in names} <= pins("constraints.txt").keys()


def test_the_python_is_as_named_else_of_the_variable_else_of_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / ".venv-vbench"
    monkeypatch.setattr(environments, "_OWN", own)
    assert python_of() is None
    own.symlink_to(sys.executable)
    assert python_of() == str(own)
    assert python_of(sys.executable) == sys.executable
    monkeypatch.setenv(environments.VARIABLE, says(tmp_path))
    assert python_of() == str(tmp_path / "python")
    assert python_of(sys.executable) == sys.executable

    monkeypatch.setenv(environments.VARIABLE, str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"REELWRIGHT_VBENCH_PYTHON names no Python: .*none"):
        python_of()
    with pytest.raises(ValueError, match=r"--vbench-python names no Python: .*make vbench-env"):
        python_of(str(tmp_path))


def test_without_it_just_what_needs_it_is_unavailable() -> None:
    lacking = available(VBENCH, None)
    assert lacking.keys() >= {"scene", *GRIT}
    for name in ("scene", *GRIT):
        assert "make vbench-env" in lacking[name]
        assert environments.VARIABLE in lacking[name]
    assert {"temporal_flickering", "subject_consistency"}.isdisjoint(lacking)  # they are ours


def test_what_it_has_decides(tmp_path: Path) -> None:
    dimensions = ["scene", "color", "temporal_flickering"]
    assert available(dimensions, says(tmp_path)) == {}

    absent = dict.fromkeys(GRIT, "ModuleNotFoundError: No module named 'detectron2'")
    lacking = available(dimensions, says(tmp_path, errors=absent))
    assert list(lacking) == ["color"]
    assert "make vbench-env DETECTRON2=" in lacking["color"]

    other = {"scene": "ImportError: cannot import name 'find_pruneable_heads_and_indices'"}
    lacking = available(dimensions, says(tmp_path, errors=other))
    assert list(lacking) == ["scene"]
    assert "cannot import vbench.scene: ImportError" in lacking["scene"]


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"python": "3.9.1"}, "has Python 3.9.1 and ray 2.60.0, but this process"),
        ({"ray": "2.40.0"}, "and ray 2.40.0, but this process"),
        ({"vbench": None}, "has no vbench"),
        ({"pyarrow": "26.0.1"}, "pyarrow 26.0.1 beside numpy 1.26.4"),
    ],
)
def test_why_it_does_not_serve_is_said(tmp_path: Path, found: dict[str, Any], reason: str) -> None:
    assert reason in available(["scene"], says(tmp_path, **found))["scene"]


def test_what_is_no_python_is_said(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such thing >&2\nexit 3\n")
    python.chmod(0o755)
    reason = available(["scene"], str(python))["scene"]
    assert "does not say what it has, but: no such thing" in reason


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """As detectron2's repository lies on a disk, with a link that its installation makes."""
    folder = tmp_path / "checkout"
    (folder / "detectron2" / "model_zoo").mkdir(parents=True)
    (folder / "detectron2" / "__init__.py").write_text("__version__ = '0.6'\n")
    (folder / "detectron2" / "model_zoo" / "configs").symlink_to("../../configs")
    (folder / "setup.py").touch()
    return folder


def test_detectron2_is_added_from_a_checkout_or_fetched(tmp_path: Path, checkout: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    add_detectron2(packages, checkout)
    add_detectron2(packages, checkout)  # again, in place of the first
    assert [path.name for path in packages.iterdir()] == ["detectron2"]
    files = sorted(p.name for p in (packages / "detectron2").rglob("*"))
    assert files == ["__init__.py", "model_zoo"]

    (checkout / "detectron2" / "__init__.py").write_text("__version__ = '0.7'\n")
    with tarfile.open(tmp_path / "fetched.tar.gz", "w:gz") as archive:
        archive.add(checkout, arcname=f"detectron2-{environments.COMMIT}")
    add_detectron2(packages, url=(tmp_path / "fetched.tar.gz").as_uri())
    assert "0.7" in (packages / "detectron2" / "__init__.py").read_text()

    with pytest.raises(ValueError, match="is no checkout of detectron2"):
        add_detectron2(packages, tmp_path)
    with pytest.raises(OSError, match="none"):
        add_detectron2(packages, url=(tmp_path / "none").as_uri())
    assert "0.7" in (packages / "detectron2" / "__init__.py").read_text()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not on this machine")
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="VBench's pins are for Python 3.11")
def test_make_builds_it_once_and_again_when_the_pins_change(tmp_path: Path, checkout: Path) -> None:
    """With no pins: it has no vbench, and that is what is said."""
    project = tmp_path / "project"
    (project / "evals").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", project)
    for name in ("__init__.py", "environments.py", "dimensions.py"):
        shutil.copy(ROOT / "evals" / name, project / "evals")
    (project / "evals" / "vbench-env.txt").touch()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "PYTHON"))}

    def make(**variables: object) -> subprocess.CompletedProcess[str]:
        given = [f"{name}={value}" for name, value in variables.items()]
        return subprocess.run(
            ["make", "vbench-env", f"PYTHON={sys.executable}", *given],
            cwd=project,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )

    first = make(DETECTRON2=checkout)
    assert "building .venv-vbench" in first.stdout
    assert "ready for nothing" in first.stdout
    assert "has no vbench" in first.stdout
    assert first.returncode != 0
    (packages,) = (project / ".venv-vbench").glob("lib/*/site-packages")
    assert (packages / "detectron2" / "__init__.py").is_file()

    wrong = make(DETECTRON2=tmp_path)
    assert "building" not in wrong.stdout
    assert "is no checkout of detectron2" in wrong.stderr

    (project / "evals" / "vbench-env.txt").write_text("no such\n")
    failed = make()
    assert "building" in failed.stdout
    assert "no such" in failed.stderr
    assert not list((project / ".venv-vbench").glob(".has-*"))  # the next run tries again


@pytest.fixture(scope="module")
def pinned() -> str:
    """The Python of VBench's own environment, which CI builds where it is not."""
    python = python_of()
    if python is None:
        if sys.version_info[:2] != (3, 11):
            pytest.skip("VBench's pins have wheels for Python 3.11 alone")
        if os.environ.get("CI") != "true":
            pytest.skip("VBench's own environment is not here: run make vbench-env")
        subprocess.run(["make", "vbench-env"], cwd=ROOT, check=True, timeout=1500)
        python = python_of()
    assert python is not None
    return python


@pytest.fixture(scope="module")
def weights(tiny_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The session's cache of small models, with one of `scene` besides."""
    import torch

    from evals.tiny_scene import make_scene_weights
    from evals.tiny_weights import default_folder, make_vbench_cache

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cache = tmp_path_factory.mktemp("vbench") / "cache"
    shutil.copytree(make_vbench_cache(default_folder()), cache, copy_function=os.link)
    yield make_scene_weights(cache)
    torch.set_num_threads(threads)


def frames(num: int, seed: int, size: tuple[int, int] = (96, 128)) -> list[np.ndarray]:
    """Blocks of colour that move over each other."""
    rng = np.random.default_rng(seed)
    still, moving = rng.integers(0, 255, (2, 4, 4, 3), np.uint8).repeat(size[0] // 4, 1)
    still, moving = (x.repeat(size[1] // 4, 1) for x in (still, moving))
    return [np.where(np.roll(moving, 5 * t, 1) > 128, moving, still) for t in range(num)]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("films")
    return [encode(folder / f"{ALLEY}-{n}.mp4", frames(8 + n, n), fps=8) for n in range(2)]


def asked(dimension: str, films: list[Path], auxiliary: Any = None) -> list[dict[str, Any]]:
    return [
        {
            "path": str(film),
            "dimension": dimension,
            "prompt": ALLEY,
            "auxiliary": json.dumps(auxiliary) if auxiliary else None,
            "start_frame": None,
            "stop_frame": None,
        }
        for film in films
    ]


def measured(dimensions: tuple[str, ...], rows: list, cache: Path, python: str | None) -> pa.Table:
    from evals.metric import ASKED
    from evals.package import Package

    metric = Package(dimensions=dimensions, cache=str(cache), python=python, device="cpu")
    return metric.load()(pa.Table.from_pylist(rows, ASKED))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_both_environments_give_the_same_rows_bit_for_bit(
    connection: None, pinned: str, weights: Path, films: list[Path]
) -> None:
    dimensions = ("temporal_flickering", "subject_consistency")
    assert available(dimensions, pinned) == {}
    rows = [row for name in dimensions for row in asked(name, films)]
    here = measured(dimensions, rows, weights, None)
    there = measured(dimensions, rows, weights, pinned)
    assert there.to_pylist() == here.to_pylist()
    assert len({*here["raw_score"].to_pylist()}) == 4
    assert here["raw_score"].null_count == 0


STOCK = """
import json, os, sys
from evals.vbench_worker import prepare
cache, film, info = sys.argv[1:]
prepare(cache)
os.chdir(cache)
import torch
torch.set_num_threads(1)
from evals.tiny_scene import shrink
from vbench import scene
from vbench.utils import init_submodules
with shrink(), torch.no_grad():
    known = init_submodules(["scene"], local=True)["scene"]
    found = scene.compute_scene(info, torch.device("cpu"), known)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_scene_is_measured_in_its_own_environment(
    connection: None, pinned: str, weights: Path, films: list[Path], tmp_path: Path
) -> None:
    """The same rows as by the package's own `compute_scene`."""
    assert available(["scene"], pinned) == {}
    told = {"scene": {"scene": ALLEY}}
    found = measured(("scene",), asked("scene", films, told), weights, pinned)

    info = tmp_path / "info.json"
    entry = {"prompt_en": ALLEY, "dimension": ["scene"], "auxiliary_info": {"scene": told}}
    info.write_text(json.dumps([entry | {"video_list": [str(film) for film in films]}]))
    stock = subprocess.run(
        [pinned, "-W", "ignore", "-c", STOCK, str(weights), str(films[0]), str(info)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    _, rows = json.loads(stock.stdout.splitlines()[-1])
    assert found["raw_score"].to_pylist() == [row["video_results"] for row in rows]
    assert [json.loads(d)["success_frame_count"] for d in found["details"].to_pylist()] == [
        row["success_frame_count"] for row in rows
    ]
    assert {0.0, 1.0} != {*found["raw_score"].to_pylist()}
