"""What is evaluated: models that make videos, and folders of videos that were made elsewhere."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np

from engine import storage
from engine.folders import listing
from engine.sources import VIDEO_SUFFIXES
from engine.weights import Weights, digest
from trainers.recipes import TINY

Kind = Literal["export", "diffusers", "served", "folder"]
SUFFIXES = VIDEO_SUFFIXES | {".gif"}
"""Of files that are taken for videos, in any case."""
TOKEN = "REELWRIGHT_SERVED_TOKEN"
"""Environment variable with the key that endpoints are shown, and want, if it is set."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Of a model."""
_SHOWN = 4  # names of files in an error


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A video that a model is to make."""

    text: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Made:
    """A video, and how it came about."""

    frames: np.ndarray | None = None
    """uint8 RGB (F, H, W, 3); None where there is a file."""
    file: bytes | None = None
    """As an endpoint gave it."""
    fps: float | None = None
    """Of the frames."""
    rephrased: str | None = None
    """What the model's own LLM made of the text."""
    notes: tuple[str, ...] = ()
    """What did not go as asked, for a person."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds of what was done."""


Make = Callable[[Sequence[Asked]], list[Made]]
"""A loaded model. Raises `Failed`, or whatever its pipeline does."""


@dataclass(frozen=True)
class Setting:
    """What a model can be told beside the text and the seed."""

    kind: type
    default: Any = None
    """None where the model decides."""
    choices: tuple[str, ...] = ()

    def value(self, name: str, words: str) -> Any:
        """What is meant by its words on the command line, or raises ValueError."""
        if self.kind is bool:
            found = {"true": True, "1": True, "false": False, "0": False}.get(words.lower())
            if found is None:
                raise ValueError(f"{name}={words}: true or false is needed")
            return found
        if self.kind is str:
            if self.choices and words not in self.choices:
                raise ValueError(f"{name}={words}: choose of {', '.join(self.choices)}")
            return words
        try:
            number = self.kind(words)
        except ValueError:
            whole = "a whole number" if self.kind is int else "a number"
            raise ValueError(f"{name}={words}: {whole} is needed") from None
        if not 0 <= number < float("inf") or (name in POSITIVE and not number):
            least = "more than 0" if name in POSITIVE else "at least 0"
            raise ValueError(f"{name}={words}: a number of {least} is needed")
        return number


COMMON = {
    "steps": int,
    "guidance_scale": float,
    "frames": int,
    "height": int,
    "width": int,
    "fps": float,
    "seconds": float,
    "negative_prompt": str,
}
"""Settings that go by one name whatever the model."""
POSITIVE = ("steps", "frames", "height", "width", "fps", "seconds")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model by name; a value, which holds no weights."""

    name: str
    """As its user calls it: in tables, and in what is stored."""
    kind: Kind
    at: str
    """Folder, or URL of an endpoint."""
    checkpoint: str | None = None
    """Fingerprint of the weights; None for videos made elsewhere."""
    about: str = ""
    """The system or the class of its pipeline."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Steps, guidance, size …: what was given, and what the pipeline does by default."""
    notes: tuple[str, ...] = ()
    """`tiny` where the weights are small random ones, whose videos mean nothing."""
    known: Mapping[str, Setting] = field(default_factory=dict, repr=False, compare=False)

    @property
    def makes(self) -> bool:
        """It makes videos (a folder has them already)."""
        return self.kind != "folder"

    @property
    def on_device(self) -> bool:
        """It runs in the worker, on a GPU where there is one."""
        return self.kind in ("export", "diffusers")

    def describe(self) -> dict[str, Any]:
        """For a run's row, as JSON values."""
        names = ("name", "kind", "at", "checkpoint", "about", "settings", "notes")
        found = {name: getattr(self, name) for name in names}
        return found | {"settings": dict(self.settings), "notes": list(self.notes)}

    def check(self) -> None:
        """Raises ValueError where a setting is missing that the model cannot do without."""
        if self.kind == "diffusers" and "fps" not in self.settings:
            raise ValueError(
                f"{self.name}: nobody knows how fast videos of {self.about} are to be shown:"
                f" add --set {self.name}.fps=24 (as its model card says)"
            )

    def load(self, device: str) -> Make:
        """The function that makes videos on `device` (`cpu` or `cuda`).

        Raises:
            ValueError: It cannot be loaded, by what lies in its folder.
        """
        from evals.loading import load

        return load(self, device)


def parse(specs: Sequence[str]) -> list[Model]:
    """The models that `name=WHERE` name, looked at but not loaded.

    WHERE is an export of `trainers`, a folder of a diffusers text-to-video pipeline, the URL of an
    endpoint or a folder of finished videos (which alone may lie in an object store). Without
    `name=` it is called like its folder.

    Raises:
        ValueError: One is none of these, or two have one name.
    """
    return [_model(name, at) for name, at in named(specs)]


def named(specs: Sequence[str]) -> list[tuple[str, str]]:
    """Names and places of models, neither looked at nor loaded.

    Raises:
        ValueError: A name is none, or two have one.
    """
    found = [_named(spec) for spec in specs]
    for name, count in Counter(name.casefold() for name, _ in found).items():
        if count > 1:
            raise ValueError(f"{count} models are called {name}: give each a name: NAME=FOLDER")
    return found


def with_settings(models: Sequence[Model], settings: Sequence[str]) -> list[Model]:
    """Models with settings such as `a.steps=20`.

    Raises:
        ValueError: There is no such model, setting or value, or a setting is missing.
    """
    by_name = {model.name: dict(model.settings) for model in models}
    known = {model.name: model.known for model in models}
    for given in settings:
        key, equals, words = given.partition("=")
        name, dot, setting = key.rpartition(".")  # names of models may have dots
        if not equals or not dot or name not in by_name:
            raise ValueError(
                f"--set {given}: write MODEL.SETTING=VALUE with a model of {', '.join(by_name)}"
            )
        if setting not in known[name]:
            has = ", ".join(sorted(known[name])) or "none"
            raise ValueError(f"--set {given}: {name} has no setting {setting}; it has {has}")
        try:
            by_name[name][setting] = known[name][setting].value(setting, words)
        except ValueError as error:
            raise ValueError(f"--set {name}.{error}") from None
    changed = [dataclasses.replace(m, settings=by_name[m.name]) for m in models]
    for model in changed:
        model.check()
    return changed


def _named(spec: str) -> tuple[str, str]:
    """Name and place; what is before the first `=` may be the beginning of a path or URL."""
    name, equals, where = spec.partition("=")
    if equals and NAME.fullmatch(name):
        if not where:
            raise ValueError(f"{spec}: write NAME=FOLDER, or NAME=URL")
        return name, where
    if equals and not re.search(r"[/\\:]", name):
        raise ValueError(f"{spec}: a model's name has letters, digits and . _ - alone")
    address = urlsplit(spec)
    last = address.netloc if address.scheme in ("http", "https") else Path(spec).resolve().name
    if storage.is_remote(spec) and address.scheme not in ("http", "https"):
        last = spec.rstrip("/").rpartition("/")[2]
    found = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._")
    if not found:
        raise ValueError(f"{spec!r}: write NAME=FOLDER, or NAME=URL")
    return found, spec


def _model(name: str, where: str) -> Model:
    if where.startswith(("http://", "https://")):
        return _served(name, where)
    at = storage.absolute(where)
    if storage.kind(at) != "folder":
        what = "is a file" if storage.kind(at) else "is not there"
        raise ValueError(
            f"model {name}: {at} {what}: name a folder (an export, a diffusers pipeline, or"
            " finished videos) or a URL; fetch what lies on a hub with `hf download` first"
        )
    names = storage.names_in(at)
    if "pipeline.json" in names and not storage.is_remote(at):
        return _export(name, Path(storage.local_path(at)))
    if "model_index.json" in names and not storage.is_remote(at):
        return _diffusers(name, Path(storage.local_path(at)))
    if any(is_video(entry.uri) for entry in listing(at) if not entry.error):
        return Model(name=name, kind="folder", at=at, about="videos made elsewhere")
    found = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
    raise ValueError(
        f"model {name}: {at} is no model: an export of trainers has a pipeline.json, a diffusers"
        f" pipeline a model_index.json, a folder of videos files such as .mp4; it has"
        f" {found or 'nothing'}{' (models cannot lie in a store)' * storage.is_remote(at)}"
    )


def is_video(uri: str) -> bool:
    """Whether a file's name says that it is a video."""
    return Path(uri).suffix.lower() in SUFFIXES


def _export(name: str, folder: Path) -> Model:
    from evals.loading import settings_of_export
    from trainers.system import system_of

    try:
        system = system_of(folder)
        about = json.loads((folder / "pipeline.json").read_text(encoding="utf-8"))
        digests = [digest(folder), *(digest(w.local()) for w in _bases(about[system]))]
        known = settings_of_export(system)
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(
            f"model {name}: {folder / 'pipeline.json'} is not what an export has"
            f" ({type(error).__name__}: {error}): export it again"
        ) from None
    except ValueError as error:  # of weights that are not here, or a newer layout
        raise ValueError(f"model {name}: {error}") from None
    return Model(
        name=name,
        kind="export",
        at=str(folder),
        checkpoint=hashlib.sha256(":".join(digests).encode()).hexdigest()[:16],
        about=system,
        settings=_defaults(known),
        notes=("tiny",) if _is_tiny(folder) else (),
        known=known,
    )


def _bases(about: Any) -> Iterator[Weights]:
    """Weights that an export names, wherever they stand in it."""
    if isinstance(about, Mapping):
        if about.keys() == {"at", "revision"}:
            yield Weights(**about)
            return
        about = list(about.values())
    if isinstance(about, list):
        for one in about:
            yield from _bases(one)


def _is_tiny(folder: Path) -> bool:
    facts = folder / "training.json"
    if not facts.is_file():
        return False
    stages = json.loads(facts.read_text(encoding="utf-8")).values()
    return any(s.get("config", {}).get("recipe", "").startswith(TINY) for s in stages)


def _diffusers(name: str, folder: Path) -> Model:
    from evals.loading import settings_of_diffusers

    about, known = settings_of_diffusers(name, folder)
    return Model(
        name=name,
        kind="diffusers",
        at=str(folder),
        checkpoint=digest(folder),
        about=about,
        settings=_defaults(known),
        known=known,
    )


def _served(name: str, url: str) -> Model:
    from evals.served import Endpoint

    said = Endpoint(url).says()
    return Model(name=name, kind="served", at=url, settings=_defaults(said["known"]), **said)


def _defaults(known: Mapping[str, Setting]) -> dict[str, Any]:
    return {name: s.default for name, s in known.items() if s.default is not None}
