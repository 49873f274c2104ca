"""VBench's own environment: where it is, what can be measured there and why the rest cannot.

The package asks for libraries older than ours. Most dimensions run with ours all the same; `scene`
needs the old ones, and four need detectron2 beside them. `make vbench-env` builds an environment
with both; this module imports nothing but the standard library, since it runs there too.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evals.dimensions import DIMENSIONS

VARIABLE = "REELWRIGHT_VBENCH_PYTHON"
COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
"""Of detectron2, which has no release for this Python: its Python files alone are enough."""
_REPOSITORY = Path(__file__).resolve().parents[1]
_OWN = _REPOSITORY / ".venv-vbench" / "bin" / "python"
_DETECTRON2 = f"https://github.com/facebookresearch/detectron2/archive/{COMMIT}.tar.gz"
_LATER = "make vbench-env DETECTRON2=/path/to/a/checkout/of/detectron2"
_FETCH_S = 60
_ASK_S = 300
_ASKED = """
import importlib, importlib.metadata, json, os, platform, sys
out, sys.stdout = sys.stdout, sys.stderr
found = {"python": platform.python_version(), "errors": {}}
for name in ("ray", "vbench", "numpy", "pyarrow"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
for module in sys.argv[1:] if found["vbench"] else ():
    try:
        importlib.import_module(f"vbench.{module}")
    except Exception as error:
        found["errors"][module] = f"{type(error).__name__}: {error}"
print(json.dumps(found), file=out)
"""


def python_of(named: str | None = None) -> str | None:
    """The Python of VBench's own environment: as named, else by the variable, else this folder's.

    None where none is named and `make vbench-env` has not run.

    Raises:
        ValueError: The one that is named is not there.
    """
    chosen = named or os.environ.get(VARIABLE)
    if not chosen:
        return str(_OWN) if _OWN.exists() else None
    # Not resolved: by the link inside its folder a Python knows that it is a virtual environment's.
    path = Path(chosen).expanduser().absolute()
    if not os.access(path, os.X_OK) or path.is_dir():
        said = "--vbench-python" if named else VARIABLE
        raise ValueError(
            f"{said} names no Python: {chosen}; `make vbench-env` makes .venv-vbench/bin/python"
        )
    return str(path)


def available(dimensions: Iterable[str], python: str | None) -> dict[str, str]:
    """Why dimensions cannot be measured on this machine, and what to do; those that can have none.

    Args:
        dimensions: Names in `evals.dimensions`.
        python: Of VBench's own environment, see `python_of`.
    """
    names = list(dict.fromkeys(dimensions))
    found = {}
    for name in names:
        reason = _lacks_here(name) if _is_here(name) else _lacks_there(name, python)
        if reason:
            found[name] = reason
    return found


def _is_here(name: str) -> bool:
    return DIMENSIONS[name].environment == "here"


def _lacks_here(name: str) -> str | None:
    if DIMENSIONS[name].implementations[0] != "vbench":
        return None
    lacking = [one for one in ("vbench", "clip", "pyiqa") if importlib.util.find_spec(one) is None]
    if not lacking:
        return None
    return f"{' and '.join(lacking)} not installed in this environment: run `make setup`"


def _lacks_there(name: str, python: str | None) -> str | None:
    if python is None:
        return (
            "measured in VBench's own environment, which is not here: build it with"
            f" `make vbench-env`, or name its Python with --vbench-python or {VARIABLE}"
        )
    found = _asked(python)
    if isinstance(found, str):
        return found
    ours = {"python": platform.python_version(), "ray": _version("ray")}
    minor = {"python": _minor(found["python"]), "ray": found["ray"]}
    if minor != {"python": _minor(ours["python"]), "ray": ours["ray"]}:
        return (
            f"{python} has Python {found['python']} and ray {found['ray']}, but this process"
            f" {ours['python']} and {ours['ray']}, and Ray needs the same: run `make vbench-env`"
            " with this Python"
        )
    if found["vbench"] is None:
        return f"{python} has no vbench: name the Python that `make vbench-env` makes"
    if found["pyarrow"] and found["numpy"] and found["numpy"].startswith("1."):
        return (
            f"{python} has pyarrow {found['pyarrow']} beside numpy {found['numpy']}, with which"
            f" Ray's workers die: {python} -m pip uninstall pyarrow"
        )
    error = found["errors"].get(name)
    if error and "detectron2" in error and DIMENSIONS[name].environment == "detectron2":
        return f"{python} has no detectron2: add it with `{_LATER}`"
    return f"{python} cannot import vbench.{name}: {error}" if error else None


@functools.lru_cache
def _asked(python: str) -> dict[str, Any] | str:
    """What a Python has and cannot import, or why it does not say."""
    there = [name for name in DIMENSIONS if not _is_here(name)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    try:
        done = subprocess.run(
            [python, "-W", "ignore", "-c", _ASKED, *there],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_ASK_S,
        )
        return json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{python} does not run: {error}; run `make vbench-env`"
    except (ValueError, IndexError):
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        return f"{python} does not say what it has, but: {said}; run `make vbench-env`"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def add_detectron2(packages: Path, checkout: Path | None = None, url: str = _DETECTRON2) -> None:
    """Puts detectron2's Python files, of a checkout or else fetched, into a folder of packages.

    Nothing is compiled: what VBench uses of it is Python and torchvision.

    Raises:
        ValueError: The folder named is no checkout of detectron2.
        OSError: It cannot be fetched.
    """
    with tempfile.TemporaryDirectory(dir=packages) as made:
        if checkout is None:
            with (
                urllib.request.urlopen(url, timeout=_FETCH_S) as response,
                tarfile.open(fileobj=response, mode="r|gz") as archive,
            ):
                archive.extractall(made, filter="data")
            (checkout,) = Path(made).iterdir()
        source = checkout / "detectron2"
        if not (source / "__init__.py").is_file():
            raise ValueError(f"{checkout} is no checkout of detectron2: no detectron2/__init__.py")
        whole = shutil.copytree(source, Path(made, "whole"), ignore=_ignored)
        shutil.rmtree(packages / "detectron2", ignore_errors=True)
        whole.rename(packages / "detectron2")


def _ignored(folder: str, names: list[str]) -> list[str]:
    """Links that its own installation makes, and what Python caches."""
    return [n for n in names if n == "__pycache__" or Path(folder, n).is_symlink()]


def main(arguments: list[str]) -> int:
    """What `make vbench-env` runs in that environment: adds detectron2, says what there is."""
    packages = Path(sysconfig.get_path("purelib"))
    there = [name for name in DIMENSIONS if not _is_here(name)]
    why = ""
    try:
        if arguments:
            add_detectron2(packages, Path(arguments[0]).expanduser())
        elif not (packages / "detectron2").exists():
            add_detectron2(packages)
    except ValueError as error:
        print(f"vbench-env: {error}", file=sys.stderr)
        return 1
    except (OSError, EOFError, tarfile.TarError) as error:
        why = f" (it could not be fetched: {getattr(error, 'reason', error)})"
    lacking = available(there, sys.executable)
    print(f"vbench-env: ready for {', '.join(n for n in there if n not in lacking) or 'nothing'}")
    by_reason: dict[str, list[str]] = {}
    for name, reason in lacking.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        print(f"vbench-env: {', '.join(names)} stay unavailable: {reason}{why}")
    return 1 if any(DIMENSIONS[n].environment != "detectron2" for n in lacking) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
