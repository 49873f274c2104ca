"""The newest export of each training run, half-written ones passed over."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from engine import storage
from evals.models import NAME
from trainers.system import system_of

_DEPTH = 2
"""Folders between that of a run and its exports, at most."""
_FILES = ("pipeline.json", "training.json", "README.md")
_CHECKSUM = re.compile(r"^\| (?P<file>\S+) \| .* \| (?P<sha256>[0-9a-f]{16}) \|$", re.MULTILINE)
"""A line of a model card's table of files."""


def models_in(
    specs: Sequence[str], say: Callable[[str], None]
) -> tuple[dict[str, Path], frozenset[str]]:
    """Folders that exports are looked for in, by the model's name.

    NAME=FOLDER is one model; a FOLDER alone has a folder for each, which is called like it.

    Args:
        specs: As they are given.
        say: Called with a line about each folder in a FOLDER that is passed over.

    Returns:
        The folders, and the names of those that lie in a FOLDER: one may have no export yet.

    Raises:
        ValueError: There is no such folder, it is empty, or two have one name.
    """
    found, beside = dict[str, Path](), set[str]()
    for spec in specs:
        name, equals, where = spec.partition("=")
        named = bool(equals and NAME.fullmatch(name))
        folder = _folder(where if named else spec)
        some = {name: folder} if named else {p.name: p for p in _shown(folder)}
        for odd in [one for one in some if not NAME.fullmatch(one)]:
            path = some.pop(odd)
            say(f"{path} is passed over: give it a name: --exports NAME={path}")
        if not some:
            raise ValueError(f"--exports {spec}: {folder} has no folder of a model's exports")
        for one, path in some.items():
            if one in found:
                raise ValueError(f"two models are called {one}: {found[one]} and {path}")
            found[one] = path
        beside |= set() if named else some.keys()
    return found, frozenset(beside)


def newest(name: str, folder: Path, say: Callable[[str], None]) -> Path:
    """The newest whole export at or below a folder.

    New is told by when its `training.json` was written, and among equals by its name. Whole is what
    has all the files that its model card lists, with their checksums.

    Args:
        name: Of the model.
        folder: Its exports'.
        say: Called with a line about each newer one that is passed over.

    Raises:
        ValueError: There is none.
    """
    found = sorted(_exports(folder, _DEPTH), key=_age, reverse=True)
    for export in found:
        lack = lacks(export)
        if lack is None:
            return export
        say(f"{name}: {export} is passed over: {lack}")
    raise ValueError(
        f"model {name}: {folder} has no finished export"
        f"{f' ({len(found)} half-written)' if found else ''}: make one with"
        " `python -m trainers export RUN FOLDER`"
    )


def lacks(export: Path) -> str | None:
    """What an export lacks to be whole; None where nothing does."""
    for name in _FILES:
        if not (export / name).is_file():
            return f"half-written, it has no {name}"
    try:
        system_of(export)
    except (ValueError, KeyError, TypeError) as error:
        return f"its pipeline.json cannot be read ({type(error).__name__})"
    card = (export / "README.md").read_text(encoding="utf-8", errors="replace")
    for match in _CHECKSUM.finditer(card.partition("## Files")[2]):
        file = export / match["file"]
        if not file.is_file():
            return f"half-written, it has no {match['file']}"
        if not storage.sha256(str(file)).startswith(match["sha256"]):
            return f"half-written, {match['file']} is not what its README.md says"
    return None


def _folder(where: str) -> Path:
    if storage.is_remote(where):
        raise ValueError(
            f"--exports {where}: exports are loaded from folders that all machines see, not from"
            " a store: copy them first"
        )
    folder = Path(storage.local_path(storage.absolute(where)))
    if not folder.is_dir():
        raise ValueError(f"--exports {where}: there is no folder {folder}")
    return folder


def _shown(folder: Path) -> list[Path]:
    """Folders in a folder; `export` writes into one whose name begins with a dot."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _exports(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "pipeline.json").is_file():
        yield folder
    elif depth:
        for below in _shown(folder):
            yield from _exports(below, depth - 1)


def _age(export: Path) -> tuple[int, str]:
    written = export / "training.json"
    made = written if written.is_file() else export / "pipeline.json"
    return made.stat().st_mtime_ns, export.name
