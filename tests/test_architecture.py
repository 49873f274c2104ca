"""The import table of the design, read from the code itself."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "engine": set(),
    "pipelines": {"engine"},
    "trainers": {"engine"},
    "evals": {"engine", "trainers"},
    "cluster": {"engine", "pipelines", "trainers", "evals"},
}
NAMELESS = {"util", "utils", "base", "common", "helpers", "misc", "manager"}
HEAVY = {"torch", "torchvision", "transformers", "open_clip"}


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import: `from a import b` is a.b, a relative one is .b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def on_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that importing runs: not those in functions, nor those for type checkers."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from on_import(node.orelse)
            continue
        yield node
        for field in ("body", "orelse", "finalbody"):
            yield from on_import(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            yield from on_import(handler.body)


def modules(tree: Path, package: str) -> list[Path]:
    return sorted((tree / package).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def import_violations(tree: Path) -> list[str]:
    found = []
    for package, allowed in MAY_IMPORT.items():
        siblings = {path.stem for path in (tree / package).glob("*.py")} - {"__init__"}
        for path in modules(tree, package):
            for line, name in imported(parse(path)):
                top = name.split(".")[0]
                where = f"{path.relative_to(tree)}:{line}"
                if not top:
                    found.append(f"{where} imports {name}: imports are absolute")
                elif top in MAY_IMPORT and top not in allowed | {package}:
                    found.append(f"{where} imports {name}: {package} may not import {top}")
                elif top in siblings and top not in sys.stdlib_module_names:
                    found.append(f"{where} imports {name}: write {package}.{name}")
    return found


def our_files(tree: Path, name: str) -> list[Path]:
    """The files of ours that importing a dotted name runs: the module and the packages above it."""
    parts = name.split(".")
    if parts[0] not in MAY_IMPORT:
        return []
    above = [tree.joinpath(*parts[:end]) for end in range(1, len(parts) + 1)]
    files = [path for base in above for path in (base.with_suffix(".py"), base / "__init__.py")]
    return [path for path in files if path.is_file()]


def heavy_imports(tree: Path, start: str) -> list[str]:
    """Chains of our modules from `start` to torch or transformers, loaded by importing."""
    found: list[str] = []
    todo: list[tuple[Path, str]] = [(tree / start, start)]
    seen = set()
    while todo:
        path, chain = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for statement in on_import(parse(path).body):
            if not isinstance(statement, ast.Import | ast.ImportFrom):
                continue
            for _, name in imported(statement):
                if name.split(".")[0] in HEAVY:
                    found.append(f"{chain} -> {name}")
                ours = our_files(tree, name)
                todo += [(file, f"{chain} -> {file.relative_to(tree)}") for file in ours]
    return found


def use_violations(tree: Path) -> list[str]:
    """Ray's `write_lance`, which does not work with this Lance, and printing in the library."""
    found = []
    for package in MAY_IMPORT:
        for path in modules(tree, package):
            for node in ast.walk(parse(path)):
                where = f"{path.relative_to(tree)}:{getattr(node, 'lineno', 0)}"
                if isinstance(node, ast.Attribute) and node.attr == "write_lance":
                    found.append(f"{where} uses write_lance: commit through engine/tables.py")
                called = node.func if isinstance(node, ast.Call) else None
                if package == "engine" and isinstance(called, ast.Name) and called.id == "print":
                    found.append(f"{where} prints: the library logs")
    return found


def name_violations(tree: Path) -> list[str]:
    return [
        f"{path.relative_to(tree)} has a name that says nothing"
        for package in (*MAY_IMPORT, "tests")
        for path in modules(tree, package)
        if any(word in NAMELESS for word in path.stem.split("_"))
    ]


@pytest.mark.parametrize("violations", [import_violations, use_violations, name_violations])
def test_the_code_keeps_the_rules(violations: Callable[[Path], list[str]]) -> None:
    assert violations(ROOT) == []


def test_one_file_knows_ray_train() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for package in MAY_IMPORT
        for path in modules(ROOT, package)
        for _, name in imported(parse(path))
        if name.startswith("ray.train")
    }
    assert users == {"trainers/launch.py"}


def test_nothing_that_classic_imports_imports_torch() -> None:
    assert heavy_imports(ROOT, "pipelines/curate.py") == []


def test_importing_curate_loads_no_torch() -> None:
    code = f"import sys, pipelines.curate; print(sorted({HEAVY!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]", "something that pipelines/curate.py imports loads these"


BROKEN = {
    "engine/clip.py": (
        "from pipelines.curate import main\nfrom . import shot\nimport shot\nprint(main)\n"
    ),
    "engine/shot.py": "def late():\n    import evals.drift\n",
    "engine/weights.py": "try:\n    import torch\nexcept ImportError:\n    torch = None\n",
    "engine/lazy.py": (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import torch\n"
        "def load():\n    import transformers\n"
    ),
    "engine/utils.py": "",
    "pipelines/curate.py": (
        "import engine.lazy\nfrom engine import weights\nimport ray\n"
        "def main(dataset):\n    dataset.write_lance('x')\n"
    ),
    "pipelines/frame_manager.py": "import trainers.fit\nimport cluster\n",
    "trainers/fit.py": "import engine.clip, json\n",
    "evals/drift.py": "import trainers.fit\nimport pipelines.curate\n",
    "cluster/nightly.py": "import engine, pipelines.curate, trainers.fit, evals.drift\n",
}


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    for name, code in BROKEN.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(code, encoding="utf-8")
    return tmp_path


def test_forbidden_imports_are_caught(broken: Path) -> None:
    assert import_violations(broken) == [
        "engine/clip.py:1 imports pipelines.curate.main: engine may not import pipelines",
        "engine/clip.py:2 imports ..shot: imports are absolute",
        "engine/clip.py:3 imports shot: write engine.shot",
        "engine/shot.py:2 imports evals.drift: engine may not import evals",
        "pipelines/frame_manager.py:1 imports trainers.fit: pipelines may not import trainers",
        "pipelines/frame_manager.py:2 imports cluster: pipelines may not import cluster",
        "evals/drift.py:2 imports pipelines.curate: evals may not import pipelines",
    ]


def test_torch_behind_another_module_is_caught_and_lazy_use_is_not(broken: Path) -> None:
    assert heavy_imports(broken, "pipelines/curate.py") == [
        "pipelines/curate.py -> engine/weights.py -> torch"
    ]


def test_forbidden_uses_and_names_are_caught(broken: Path) -> None:
    assert use_violations(broken) == [
        "engine/clip.py:4 prints: the library logs",
        "pipelines/curate.py:5 uses write_lance: commit through engine/tables.py",
    ]
    assert [line.split()[0] for line in name_violations(broken)] == [
        "engine/utils.py",
        "pipelines/frame_manager.py",
    ]
