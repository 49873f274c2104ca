"""What of the repository a job needs on the cluster: its code, and never data."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = ("engine", "pipelines", "trainers", "evals", "cluster")
BESIDE = ("pyproject.toml", "constraints.txt", "LICENSE")
_CODE = frozenset({".py", ".txt", ".json", ".yaml", ".yml", ".toml", ".md"})
"""Suffixes of files that are shipped where git does not say what belongs to the repository."""
_LARGEST_NAMED = 3


def code_files(root: Path = REPOSITORY) -> list[str]:
    """Paths below the repository, in order, of the code that jobs run.

    What git knows of our folders, and new modules that it does not ignore; without git, what looks
    like code.
    """
    known, new = _git(root, "--cached"), _git(root, "--others", "--exclude-standard")
    if known is None or new is None:
        found = {p.relative_to(root).as_posix() for f in FOLDERS for p in (root / f).rglob("*")}
        found = {name for name in found if _is_code(name)}
        found |= set(BESIDE)
    else:
        found = known | {name for name in new if name.endswith(".py")}
    return sorted(name for name in found if (root / name).is_file())


def _is_code(name: str) -> bool:
    hidden = any(part.startswith((".", "__pycache__")) for part in name.split("/"))
    return not hidden and Path(name).suffix in _CODE


def _git(root: Path, *which: str) -> set[str] | None:
    """Names that `git ls-files` lists, or None where this is no working tree of git."""
    command = ["git", "-C", str(root), "ls-files", "-z", *which, "--", *FOLDERS, *BESIDE]
    if not (root / ".git").exists():  # not that of a folder above us
        return None
    try:
        done = subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return set(os.fsdecode(done.stdout).split("\0")) - {""}


def script_of(command: Sequence[str]) -> str | None:
    """The file that a command runs: its first word, or the one behind `python`, if it ends in .py.

    Absolute paths are files on the cluster's machines.
    """
    words = command[1:] if Path(command[0]).name.startswith("python") else command
    if words and words[0].endswith(".py") and not words[0].startswith("/"):
        return words[0]
    return None


def ship(command: Sequence[str], into: Path, *, max_mib: float, root: Path = REPOSITORY) -> int:
    """Copies the code that a command needs; gives its size in bytes.

    Args:
        command: What will run in the copy.
        into: An empty folder.
        max_mib: Larger is refused.
        root: The repository.

    Raises:
        ValueError: The script is not there, or the code is too large to be only code.
    """
    names = code_files(root)
    script = script_of(command)
    if script is not None:
        path = Path(script)
        if ".." in path.parts or not (root / path).is_file():
            raise ValueError(
                f"there is no script {script} below {root}: name one relative to it, or put it"
                " there (an absolute path is one on the cluster's machines)"
            )
        names = sorted({*names, path.as_posix()})
    _refuse_large(root, names, max_mib)
    for name in names:
        target = into / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, target)
        shutil.copymode(root / name, target)
    return _size(root, names)


def _size(root: Path, names: Iterable[str]) -> int:
    return sum((root / name).stat().st_size for name in names)


def _refuse_large(root: Path, names: Sequence[str], max_mib: float) -> None:
    total = _size(root, names) / 2**20
    if total <= max_mib:
        return
    largest = sorted(names, key=lambda n: (root / n).stat().st_size, reverse=True)[:_LARGEST_NAMED]
    told = ", ".join(f"{n} ({(root / n).stat().st_size / 2**20:.1f} MiB)" for n in largest)
    raise ValueError(
        f"the code to be sent has {total:.1f} MiB, and --max-mib is {max_mib:g}: the largest files"
        f" are {told}; keep data out of the code's folders, or use --no-working-dir"
    )
