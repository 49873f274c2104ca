"""What the project's own files promise: import names, pins, the top level, the Makefile."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PACKAGES = ("engine", "pipelines", "trainers", "evals", "cluster")
WHOLE = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = WHOLE["project"]
ALONE = WHOLE["tool"]["reelwright"]["without-dependencies"]
PINS = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
TOP_LEVEL = {
    *PACKAGES,
    "tests",
    "pyproject.toml",
    "README.md",
    "constraints.txt",
    "Makefile",
    "LICENSE",
    "CHANGELOG.md",
}


def pins() -> dict[str, Version]:
    return {name: Version(version) for name, version in (line.split("==") for line in PINS)}


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(line) for line in chain(PROJECT["dependencies"], *extras)]


@pytest.mark.parametrize("package", [name for name in PACKAGES if (ROOT / name).is_dir()])
def test_import_name_is_this_repository(package: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin == str(ROOT / package / "__init__.py")


def test_distribution_is_private_and_apache_licensed() -> None:
    assert PROJECT["name"] == "reelwright"
    assert "Private :: Do Not Upload" in PROJECT["classifiers"]
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_are_names_and_versions_in_order() -> None:
    for line in PINS:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][0-9a-z.]*", line), line
    names = [line.split("==")[0] for line in PINS]
    assert names == sorted(set(names))


def test_both_opencv_distributions_have_one_version() -> None:
    """Both write into cv2/: with two versions, the files of one would stand beside the other's."""
    assert pins()["opencv-python"] == pins()["opencv-python-headless"]


def test_constraints_pin_everything_that_gets_installed() -> None:
    """Walks what our requirements require, as far as it is installed here."""
    pinned = pins()
    seen: set[tuple[str, str]] = set()
    todo = [
        (requirement, extra)
        for requirement in requirements()
        for extra in ("", *requirement.extras)
    ]
    while todo:
        requirement, extra = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        assert name in pinned, f"{requirement} has no line in constraints.txt"
        assert requirement.specifier.contains(pinned[name], prereleases=True), str(requirement)
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                todo += [(need, wanted) for wanted in ("", *need.extras)]
    assert len(seen) > 100


def test_what_is_installed_is_what_is_pinned() -> None:
    pinned = pins()
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        try:
            installed = Version(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
        assert installed.public == pinned[name].public, f"{name}: run `make setup`"


def imported_modules(path: Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    named = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module and not n.level}
    return {name.split(".")[0] for name in plain | named}


def test_every_import_is_a_declared_dependency() -> None:
    """What merely comes along with a dependency may go with its next version."""
    declared = {canonicalize_name(requirement.name) for requirement in requirements()}
    declared |= {name for names in ALONE.values() for name in names}
    owners = importlib.metadata.packages_distributions()
    for package in (*PACKAGES, "tests"):
        for path in (ROOT / package).rglob("*.py"):
            for module in imported_modules(path) & owners.keys():
                owned_by = {canonicalize_name(name) for name in owners[module]}
                assert owned_by & declared, f"{path.relative_to(ROOT)} imports {module}"


def is_runnable(path: Path) -> bool:
    tests = (
        n.test
        for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(n, ast.If)
    )
    return any(re.fullmatch(r"__name__ == '__main__'", ast.unparse(test)) for test in tests)


@pytest.mark.parametrize("package", ["pipelines", "evals"])
def test_no_file_beside_a_script_hides_a_module(package: str) -> None:
    """A script run by path has its folder first on sys.path, in every worker too."""
    taken = sys.stdlib_module_names | importlib.metadata.packages_distributions().keys()
    files = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
    assert not files & taken


def test_engine_holds_no_script() -> None:
    assert [path.name for path in (ROOT / "engine").rglob("*.py") if is_runnable(path)] == []


def test_a_script_is_told_from_a_library(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text('if __name__ == "__main__":\n    main()\n', encoding="utf-8")
    library = tmp_path / "library.py"
    library.write_text('"""if __name__ == "__main__" is for scripts."""\n', encoding="utf-8")
    assert is_runnable(script)
    assert not is_runnable(library)


def test_top_level_holds_only_what_the_design_names() -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not on this machine")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip(f"not a git work tree: {listed.stderr.strip()}")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


def test_tests_have_no_package() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not on this machine")


def make(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs make as from a shell: what an outer `make test` hands down is not passed on."""
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON", "ARGS", "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if k not in outer} | variables
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A project with our Makefile that needs no package, so that setting it up needs no network."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "constraints.txt").touch()
    (tmp_path / "pyproject.toml").write_text(
        "[project]\ndependencies = []\n[project.optional-dependencies]\ndemo = []\n",
        encoding="utf-8",
    )
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "curate.py").write_text("print('curated')\n", encoding="utf-8")
    (tmp_path / "cv2.py").touch()
    return tmp_path


@needs_make
def test_make_alone_lists_the_targets() -> None:
    lines = make(ROOT).stdout.splitlines()
    targets = [
        "help",
        "setup",
        "demo",
        "test",
        "lint",
        "bench",
        "dashboard",
        "vbench-env",
        "system-deps",
        "clean",
    ]
    assert [line.split()[1] for line in lines] == targets


@needs_make
def test_an_unfit_interpreter_is_named_in_one_line(small: Path) -> None:
    run = make(small, "demo", PYTHON="python2.7")
    assert run.returncode != 0
    assert "Python 3.11, 3.12 or 3.13 is needed and python2.7 is not one" in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert not (small / ".venv").exists()


@needs_make
@pytest.mark.slow
def test_make_sets_up_once_and_again_when_the_pins_change(small: Path) -> None:
    path = {"PYTHON": sys.executable, "PYTHONPATH": str(small)}

    first = make(small, "demo", **path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == "curated"
    assert "creating .venv" in first.stdout
    assert make(small, "demo", **path).stdout == "curated\n"

    # The full set comes on top and serves the demo too.
    full = make(small, "setup", **path)
    assert "all extras" in full.stdout
    assert "creating" not in full.stdout
    later = (small / ".venv" / ".has-all").stat().st_mtime + 2
    os.utime(small / "constraints.txt", (later, later))
    assert "installing what the demo needs" in make(small, "demo", **path).stdout
    assert "installing all extras" in make(small, "setup", **path).stdout


@needs_make
@pytest.mark.slow
def test_what_cv2_lacks_is_named_and_set_up_is_not_done(small: Path) -> None:
    path = {"PYTHON": sys.executable, "PYTHONPATH": str(small)}
    loader = "libGL.so.1: cannot open shared object file: No such file or directory"
    (small / "cv2.py").write_text(f"raise ImportError({loader!r})\n", encoding="utf-8")

    lacking = make(small, "demo", **path)
    assert lacking.returncode != 0
    line = lacking.stderr.splitlines()[0]
    assert "cv2 needs libGL.so.1" in line
    assert "apt-get install" in line
    assert "libgl1" in line

    (small / "cv2.py").write_text("", encoding="utf-8")
    assert make(small, "demo", **path).stdout.splitlines()[-1] == "curated"


@needs_make
@pytest.mark.slow
def test_a_failed_installation_says_why_and_is_tried_again(small: Path) -> None:
    pyproject = small / "pyproject.toml"
    empty = pyproject.read_text(encoding="utf-8")
    pyproject.write_text(empty.replace("dependencies = []", 'dependencies = ["no such"]', 1))
    failed = make(small, "demo", PYTHON=sys.executable, PYTHONPATH=str(small))
    assert failed.returncode != 0
    assert "no such" in failed.stderr
    assert "curated" not in failed.stdout
    assert not (small / ".venv" / ".has-demo").exists()
