"""How files of videos are named, as VBench names them, and whose a file in a folder is."""

from __future__ import annotations

import difflib
import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from engine.sources import VIDEO_SUFFIXES
from evals.prompt_files import as_text, read_rows
from evals.suites import Suite

MANIFESTS = ("prompts.csv", "prompts.jsonl")
"""Names of the table that says of a folder which file is of which prompt."""
SUFFIXES = VIDEO_SUFFIXES | {".gif"}
_MAX_BYTES = 255
"""Of a name in the file systems in use."""
_RESERVED_BYTES = 24
"""Kept for the number and the suffix behind a prompt: `-1234567.mp4` and more."""
_MAX_NEAREST = 50
"""Prompts for which the nearest of the suite is looked for: it takes a second or so in all."""
_Key = tuple[str, int]


def file_name(prompt: str, sample: int, suffix: str = ".mp4") -> str:
    """VBench's name of a video: `{prompt}-{sample}.mp4`.

    A prompt that no file should be named after (one with a slash, control characters or line
    breaks, one that begins with a dot, or is too long) is cleaned and cut, and has `~` and ten hex
    digits of its hash behind it: the name is its own, but tells the prompt only with the suite
    beside it (`match`). VBench's own prompts all stay as they are.

    Args:
        prompt: The short one.
        sample: Number among the videos of the prompt, from 0.
        suffix: With its dot.
    """
    return f"{_stem(prompt)}-{sample}{suffix}"


def _stem(prompt: str) -> str:
    clean = re.sub(r"[/\\\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", prompt).lstrip(".")
    if clean == prompt and len(prompt.encode()) <= _MAX_BYTES - _RESERVED_BYTES:
        return prompt
    mark = f"~{hashlib.sha256(prompt.encode()).hexdigest()[:10]}"
    room = _MAX_BYTES - _RESERVED_BYTES - len(mark)
    return clean.encode()[:room].decode(errors="ignore").strip() + mark


def parse(name: str) -> tuple[str, int | None]:
    """Prompt and sample that a file's name tells, as VBench reads it; no number is None.

    It gives back what `file_name` was given, unless that had to change the prompt (then `~` and a
    hash are at the end). Folders before the name, and the suffix, do not count.
    """
    stem = PurePosixPath(name).stem
    found = re.fullmatch(r"(.*)-(\d+)", stem, re.DOTALL)
    return (found[1], int(found[2])) if found else (stem, None)


@dataclass(frozen=True, kw_only=True)
class Matched:
    """The files of a folder beside what a suite asks for."""

    found: Mapping[_Key, str]
    """File by prompt and sample, in suite order."""
    missing: Sequence[_Key]
    """Prompts and samples without a file, in suite order."""
    unknown: Mapping[str, str]
    """Files that are no video of the suite, and why."""
    notes: Sequence[str] = ()
    """What was not exactly as it should be, and was taken nevertheless."""
    seeds: Mapping[_Key, int] = field(default_factory=dict)
    """Of the videos found, where a manifest says them."""

    def lines(self) -> list[str]:
        """What a person should know: a line a file, and one a prompt that lacks videos."""
        lacking: dict[str, list[int]] = defaultdict(list)
        for prompt, sample in self.missing:
            lacking[prompt].append(sample)
        return [
            *(f"{name}: {why}" for name, why in self.unknown.items()),
            *self.notes,
            *(
                f"no video of {prompt!r}: expected {file_name(prompt, samples[0])}"
                + (f" and {len(samples) - 1} more" if len(samples) > 1 else "")
                for prompt, samples in lacking.items()
            ),
        ]


def match(names: Sequence[str], suite: Suite, manifest: str | None = None) -> Matched:
    """Which file of a folder is which video of a suite. A file is given to one video at most.

    Files are known by VBench's names. An exact name comes first; then one that differs only in the
    case of letters, in its form of Unicode, or in a suffix of another kind of video (`.MP4`,
    `.webm`); a file without a number is sample 0.

    Args:
        names: Files of the folder (relative to it, where it has folders).
        suite: What is asked for.
        manifest: Path of a table (see `MANIFESTS`) with the columns file, prompt[, sample][, seed]
            that names the folder's videos instead; files that it does not name are unknown. Without
            `sample`, the files of a prompt are numbered in its order.

    Raises:
        ValueError: The manifest is no such table, or names a file or a video twice.
    """
    wanted = {(entry.prompt, sample): None for entry, sample in suite.videos()}
    if manifest is not None:
        return _by_manifest(names, wanted, _read(manifest), PurePosixPath(manifest).name)
    found: dict[_Key, str] = {}
    unknown: dict[str, str] = {}
    notes: list[str] = []
    exact = {file_name(*key): key for key in wanted}
    folded: dict[str, list[_Key]] = defaultdict(list)
    for key in wanted:
        folded[_folded(file_name(*key))].append(key)
    rest = []
    for name in sorted(names):
        key = exact.get(PurePosixPath(name).name)
        if key is not None and key not in found:
            found[key] = name
        else:
            rest.append(name)
    nearest = _Nearest(wanted)
    for name in rest:
        if not _is_video(name):
            unknown[name] = "is no video"
            continue
        keys = folded.get(_folded(name), [])
        # Where prompts differ in the case of letters alone, it decides.
        keys = [key for key in keys if parse(name)[0] == _stem(key[0])] or keys
        if len(keys) > 1:
            fits = " and ".join(repr(prompt) for prompt, _ in keys)
            unknown[name] = f"can be of {fits}: name it after one, letter by letter"
        elif not keys:
            unknown[name] = nearest.why(*parse(name))
        elif keys[0] in found:
            unknown[name] = f"is of the same prompt and sample as {found[keys[0]]}"
        else:
            found[keys[0]] = name
            notes.append(f"{name}: taken for {file_name(*keys[0])}")
    notes += [
        f"no video of {key[0]!r}, sample {key[1]}: on a disk that does not tell the case of"
        f" letters, {found[twin]} took its place"
        for keys in folded.values()
        for key in keys
        for twin in keys
        if key not in found and twin in found
    ]
    return _matched(wanted, found, unknown, notes)


def _is_video(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _matched(
    wanted: Mapping[_Key, Any],
    found: Mapping[_Key, str],
    unknown: Mapping[str, str],
    notes: Sequence[str],
    seeds: Mapping[_Key, int] | None = None,
) -> Matched:
    return Matched(
        found={key: found[key] for key in wanted if key in found},
        missing=[key for key in wanted if key not in found],
        unknown=unknown,
        notes=notes,
        seeds=seeds or {},
    )


def _folded(name: str) -> str:
    """What names that differ in case, Unicode form or suffix have in common."""
    prompt, sample = parse(name)
    return f"{unicodedata.normalize('NFC', prompt).casefold()}-{sample or 0}"


class _Nearest:
    """Why a prompt and a sample are not of a suite."""

    def __init__(self, wanted: Mapping[_Key, Any]):
        self._samples: dict[str, int] = defaultdict(int)
        for prompt, _ in wanted:
            self._samples[prompt] += 1
        self._by_stem = {_stem(prompt): prompt for prompt in self._samples}
        self._asked: dict[str, str] = {}

    def why(self, prompt: str, sample: int | None) -> str:
        prompt = self._by_stem.get(prompt, prompt)
        if prompt in self._samples:
            num = self._samples[prompt]
            return f"is sample {sample or 0} of a prompt of which the suite asks for {num}, from 0"
        if prompt not in self._asked:
            if len(self._asked) == _MAX_NEAREST:
                return "is of no prompt of the suite"
            near = difflib.get_close_matches(prompt, self._samples, n=1, cutoff=0.6)
            self._asked[prompt] = (
                f"; the nearest is {near[0]!r}, whose first is {file_name(near[0], 0)}"
                if near
                else "; names are PROMPT-0.mp4"
            )
        return f"is of no prompt of the suite{self._asked[prompt]}"


@dataclass(frozen=True)
class _Named:
    """A row of a manifest."""

    place: str
    prompt: str
    sample: int | None
    seed: int | None


def _read(manifest: str) -> dict[str, _Named]:
    """Rows by file."""
    rows: dict[str, _Named] = {}
    columns = {"required": ("file", "prompt"), "others": ("sample", "seed")}
    for place, values in read_rows(manifest, **columns):
        file = PurePosixPath(as_text(place, "file", values["file"])).as_posix()
        if file in rows:
            raise ValueError(f"{place}: names {file}, which {rows[file].place} names; remove one")
        rows[file] = _Named(
            place,
            as_text(place, "prompt", values["prompt"]),
            _whole(place, "sample", values.get("sample")),
            _whole(place, "seed", values.get("seed")),
        )
    return rows


def _whole(place: str, name: str, value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not re.fullmatch(r"\d+", str(value)):
        raise ValueError(f"{place}: {name} must be a whole number, 0 or more, found {value!a:.80}")
    return int(value)


def _numbered(rows: Mapping[str, _Named]) -> Iterator[tuple[str, _Named, _Key]]:
    """Each file with its prompt and sample."""
    next_sample: dict[str, int] = defaultdict(int)
    places: dict[_Key, str] = {}
    for file, row in rows.items():
        key = (row.prompt, next_sample[row.prompt] if row.sample is None else row.sample)
        if key in places:
            raise ValueError(
                f"{row.place}: is sample {key[1]} of the same prompt as {places[key]}; number them"
            )
        places[key] = row.place
        next_sample[row.prompt] = key[1] + 1
        yield file, row, key


def _by_manifest(
    names: Sequence[str], wanted: Mapping[_Key, Any], rows: Mapping[str, _Named], manifest: str
) -> Matched:
    found: dict[_Key, str] = {}
    seeds: dict[_Key, int] = {}
    unknown: dict[str, str] = {}
    notes = []
    here, nearest = {*names}, _Nearest(wanted)
    for file, row, key in _numbered(rows):
        if file not in here:
            notes.append(f"{row.place}: there is no file {file}")
        elif key not in wanted:
            unknown[file] = nearest.why(*key)
        else:
            found[key] = file
            seeds |= {} if row.seed is None else {key: row.seed}
    for name in sorted(here - {*rows, manifest}):
        unknown[name] = f"is not named in {manifest}"
    return _matched(wanted, found, unknown, notes, seeds)
