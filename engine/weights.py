"""Which weights a model is loaded from, known by what they hold and not by where they lie."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_EDGE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model by hub id (fetched before, with the command that the error names) or local path."""

    at: str
    """Hub id such as `Qwen/Qwen2-VL-7B-Instruct`, or a local folder or file."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None is its main branch as it was fetched."""

    def local(self) -> Path:
        """The folder or file with the weights on this machine.

        Raises:
            ValueError: They are not here; says how to fetch them.
        """
        path = Path(self.at).expanduser()
        if path.exists():
            return path.resolve()
        if self.at.startswith((".", "/", "~")) or self.at.count("/") != 1:
            raise ValueError(f"no weights at {self.at}: name a folder, a file or a hub id")
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(self.at, revision=self.revision, local_files_only=True))
        except LocalEntryNotFoundError:
            revision = f" --revision {self.revision}" if self.revision else ""
            raise ValueError(
                f"the weights of {self.at} are not on this machine: fetch them with"
                f" `hf download {self.at}{revision}`, or name a local folder"
            ) from None

    def pinned(self) -> Weights:
        """The same with the commit that a hub id without a revision stands for on this machine."""
        if self.revision or Path(self.at).expanduser().exists():
            return self
        folder = self.local()
        is_snapshot = folder.parent.name == "snapshots"  # as the hub's cache lays them out
        return Weights(at=self.at, revision=folder.name if is_snapshot else None)

    def describe(self) -> dict[str, Any]:
        """What tells these weights from others, as JSON values."""
        return {"weights": digest(self.local())}


def tiny_folder() -> Path:
    """Where the small random checkpoints of the recipes `tiny` are kept between runs."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "reelwright" / "tiny"


def make_missing(folder: Path, builders: Mapping[str, Callable[[Path], object]]) -> None:
    """Builds what is not below `folder` yet, by name; each is there whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, build in builders.items():
        if not (folder / name).exists():
            made = folder / f".{os.getpid()}-{name}"
            build(made)
            try:
                made.rename(folder / name)
            except OSError:
                if not (folder / name).exists():
                    raise
                shutil.rmtree(made)  # another process was first


def digest(path: Path) -> str:
    """Hash of a file, or of a folder with all below, by names, sizes and both ends of each file.

    Gigabytes of weights are told apart without being read whole.
    """
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    facts = tuple((p, p.stat().st_size, p.stat().st_mtime_ns) for p in files)
    return _digest(path, facts)


@functools.lru_cache(maxsize=64)
def _digest(path: Path, facts: tuple[tuple[Path, int, int], ...]) -> str:
    found = hashlib.sha256()
    for file, size, _ in facts:
        name = file.relative_to(path).as_posix() if file != path else ""
        found.update(f"{name}:{size}:".encode())
        with file.open("rb") as opened:
            found.update(opened.read(_EDGE_BYTES))
            opened.seek(max(0, size - _EDGE_BYTES))
            found.update(opened.read(_EDGE_BYTES))
    return found.hexdigest()[:16]
