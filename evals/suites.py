"""Suites of prompts: what is generated, how often, and what each video is measured in."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import storage
from evals.dimensions import DIMENSIONS, VBENCH
from evals.prompt_files import as_text, lines_of, long_forms, prompts_of, read_rows, sha256_of

CATEGORIES = (
    *("animal", "architecture", "food", "human", "lifestyle", "plant", "scenery", "vehicles"),
)
"""VBench's eight, in its order."""
STATIC = "static"
"""What flickering prompts are measured in besides where VBench's static filter is asked for."""
_INDEX = "VBench_full_info.json"
_FLICKERING, _CONSISTENCY = "temporal_flickering", "overall_consistency"
_PROMPT_FILES = (
    *("appearance_style", "color", "human_action", "multiple_objects", "object_class"),
    *("overall_consistency", "scene", "spatial_relationship", "subject_consistency"),
    *("temporal_flickering", "temporal_style"),
)
"""Names in prompts_per_dimension, each a dimension; the other five share one of these files."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """An entry of a suite."""

    prompt: str
    """The short one: what text metrics read, and what VBench's files are named after."""
    text: str
    """What models are given: an enhanced prompt, or the prompt itself."""
    dimensions: tuple[str, ...]
    auxiliary: Mapping[str, Any] = field(default_factory=dict)
    """By dimension, as in VBench's index (`auxiliary_info`)."""
    categories: tuple[str, ...] = ()
    samples: int = 5
    """Videos, numbered from 0: `PROMPT-0.mp4` …"""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Prompts in the order in which videos are merged.

    A prompt may be in several entries (VBench's index has two such): its videos are made once, from
    one text, and count in each entry.
    """

    name: str
    source: str
    """Where the prompts come from, with its version or hash."""
    prompts: tuple[Prompt, ...]

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError(f"the suite {self.name} has no prompts ({self.source})")
        texts: dict[str, str] = {}
        for entry in self.prompts:
            if entry.samples < 1:
                raise ValueError(f"{entry.prompt!r}: needs 1 sample or more, not {entry.samples}")
            if texts.setdefault(entry.prompt, entry.text) != entry.text:
                raise ValueError(
                    f"{entry.prompt!r} is in the suite {self.name} with two texts, and its videos"
                    " are named after the prompt alone: give it one"
                )

    @property
    def dimensions(self) -> tuple[str, ...]:
        """All that some entry is measured in, in the leaderboard's order."""
        found = {d for entry in self.prompts for d in entry.dimensions}
        return (*(d for d in DIMENSIONS if d in found), *sorted(found - {*DIMENSIONS}))

    @property
    def categories(self) -> tuple[str, ...]:
        """All categories, in order of appearance."""
        return tuple(dict.fromkeys(c for entry in self.prompts for c in entry.categories))

    @property
    def num_videos(self) -> int:
        """Videos that the entries ask for: one that two entries share counts twice, as VBench does.

        Its sixteen dimensions have 4,730, and 6,230 with 25 samples a flickering prompt.
        """
        return sum(entry.samples for entry in self.prompts)

    def videos(self) -> Iterator[tuple[Prompt, int]]:
        """Each video that is to be made, once: the first entry that asks for it, and its number."""
        seen: set[tuple[str, int]] = set()
        for entry in self.prompts:
            for sample in range(entry.samples):
                if (entry.prompt, sample) not in seen:
                    seen.add((entry.prompt, sample))
                    yield entry, sample

    def expected(self, dimension: str, category: str | None = None) -> Iterator[tuple[Prompt, int]]:
        """What a dimension is merged from, in VBench's order: entry by entry, sample by sample.

        A video that two entries share comes once an entry.
        """
        for entry in self.prompts:
            if dimension in entry.dimensions and category in (None, *entry.categories):
                yield from ((entry, sample) for sample in range(entry.samples))

    def limited(self, num: int) -> Suite:
        """The first `num` entries, or all where there are fewer."""
        _positive("a limit", num)
        if num >= len(self.prompts):
            return self
        return self._of(f"first {num}", self.prompts[:num])

    def spread(self, num: int) -> Suite:
        """Exactly `num` entries at even distances: of N entries those at floor(i N / num).

        Nothing is drawn, so the same suite gives the same entries. SemanticGen's table 3 is of 47
        prompts that the paper does not name (section 4.3); this is a choice of as many.
        """
        _positive("a number of prompts", num)
        total = len(self.prompts)
        if num > total:
            raise ValueError(f"{num} prompts are asked of the suite {self.name}, which has {total}")
        chosen = tuple(self.prompts[i * total // num] for i in range(num))
        return self if num == total else self._of(f"{num} of {total}", chosen)

    def _of(self, which: str, prompts: tuple[Prompt, ...]) -> Suite:
        return dataclasses.replace(self, name=f"{self.name} ({which})", prompts=prompts)

    @property
    def digest(self) -> str:
        """16 hex digits of what is asked: entries, their order, texts, dimensions and samples."""
        asked = json.dumps(dataclasses.asdict(self)["prompts"], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """As JSON: an object of plain values."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Suite:
        """What `to_json` gave.

        Raises:
            ValueError: It is no suite's.
        """
        values = json.loads(text)
        wanted = {f.name for f in dataclasses.fields(Prompt)}
        if {*values} != {"name", "source", "prompts"} or any(
            {*entry} != wanted for entry in values["prompts"]
        ):
            raise ValueError(
                "this is not the JSON of a suite: needs name, source, prompts, and of each prompt"
                f" {', '.join(sorted(wanted))}"
            )
        lists = ("dimensions", "categories")
        entries = (Prompt(**{**e, **{k: tuple(e[k]) for k in lists}}) for e in values["prompts"])
        return cls(name=values["name"], source=values["source"], prompts=tuple(entries))


def standard(
    *,
    dimensions: Sequence[str] | None = None,
    samples: int = 5,
    flickering_samples: int | None = None,
    enhanced: str | None = None,
) -> Suite:
    """VBench's own prompts, from the index of the installed package, in its order.

    Args:
        dimensions: Those to measure; None is VBench's sixteen. Entries of others are left out.
            text_alignment, which the index does not know, is of the prompts of overall_consistency.
        samples: Videos a prompt.
        flickering_samples: Videos a prompt of temporal_flickering, of which the static filter
            chooses (VBench: 25); they are measured in `static` as well. None: no filter.
        enhanced: Folder with prompts_per_dimension and prompts_per_dimension_longer (`prompts` of a
            checkout of VBench): models are given the long forms. Two prompts are in two files with
            two long forms; the first counts.

    Raises:
        ValueError: The package is not installed, a dimension is unknown, long forms do not fit.
    """
    wanted = _known(VBENCH if dimensions is None else dimensions)
    if flickering_samples is not None and _FLICKERING not in wanted:
        raise ValueError(
            f"{flickering_samples} samples are asked for {_FLICKERING}, which is not among the"
            f" dimensions ({', '.join(wanted)}): add it, or leave the samples out"
        )
    index, source = _index()
    if enhanced is not None:
        texts, digest = _long_by_dimension(index, wanted, enhanced)
        source = f"{source}; prompts_per_dimension_longer sha256:{digest}"
    prompts = []
    for entry in index:
        own = list(entry["dimension"])
        filtered = flickering_samples if _FLICKERING in own else None
        own += ["text_alignment"] if _CONSISTENCY in own else []
        measured = tuple(d for d in own if d in wanted)
        if not measured:
            continue
        told = entry.get("auxiliary_info", {})
        prompts.append(
            Prompt(
                prompt=entry["prompt_en"],
                text=entry["prompt_en"] if enhanced is None else texts[entry["prompt_en"]],
                dimensions=measured if filtered is None else (*measured, STATIC),
                auxiliary={d: told[d] for d in measured if d in told},
                samples=samples if filtered is None else filtered,
            )
        )
    name = "standard" if enhanced is None else "standard, enhanced"
    return Suite(name=name, source=source, prompts=tuple(prompts))


def categories(
    folder: str,
    *,
    dimensions: Sequence[str],
    samples: int = 5,
    names: Sequence[str] | None = None,
    enhanced: bool = False,
) -> Suite:
    """VBench's prompts by category: RISE-T2V's 800, 100 of each of eight categories.

    Two prompts are in two categories each: an entry of both, at the place of the first, so that
    there are 798 entries. Its videos count in both categories, and once in all.

    Args:
        folder: With prompts_per_category (`prompts` of a checkout of VBench).
        dimensions: That every prompt is measured in; those that need VBench's index are refused.
        samples: Videos a prompt.
        names: Of categories; None is all. The order is VBench's.
        enhanced: Models are given the long forms of prompts_per_category_longer.

    Raises:
        ValueError: A file is missing, a name unknown, or long forms do not fit.

    Source:
        RISE-T2V, experiments: "8 subcategories in the evaluation set".
    """
    measured = _custom_dimensions(dimensions)
    unknown = sorted({*(names or ())} - {*CATEGORIES})
    if unknown:
        raise ValueError(f"no category {unknown[0]}: VBench has {', '.join(CATEGORIES)}")
    found: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    files = []
    for category in (c for c in CATEGORIES if names is None or c in names):
        short = storage.join(folder, "prompts_per_category", f"{category}.txt")
        files.append(short)
        for prompt in _distinct(short):
            found.setdefault(prompt, []).append(category)
        if enhanced:
            longer = storage.join(folder, "prompts_per_category_longer", f"{category}_longer.txt")
            files.append(longer)
            texts = long_forms(short, longer) | texts
    return Suite(
        name="categories, enhanced" if enhanced else "categories",
        source=f"VBench prompts_per_category sha256:{sha256_of(files)}",
        prompts=tuple(
            Prompt(
                prompt=prompt,
                text=texts.get(prompt, prompt),
                dimensions=measured,
                categories=tuple(of),
                samples=samples,
            )
            for prompt, of in found.items()
        ),
    )


def custom(
    path: str, *, dimensions: Sequence[str], samples: int = 5, name: str | None = None
) -> Suite:
    """Prompts of one's own.

    Args:
        path: Text with a prompt a line (empty lines are passed over), or .jsonl or .csv with the
            columns prompt[, text][, category]. In JSON a category may be a list of them.
        dimensions: That every prompt is measured in; those that need VBench's index are refused.
        samples: Videos a prompt.
        name: Of the suite; None is the file's, without its suffix.

    Raises:
        ValueError: It is no such file, has no prompt, or one twice.
    """
    measured = _custom_dimensions(dimensions)
    base = posixpath.basename(path)
    stem, suffix = posixpath.splitext(base)
    if suffix.lower() in (".jsonl", ".csv"):
        rows = list(read_rows(path, required=("prompt",), others=("text", "category")))
    else:
        rows = [(f"{path}, line {n}", {"prompt": line}) for n, line in lines_of(path) if line]
    if not rows:
        raise ValueError(f"{path}: has no prompts")
    entries: dict[str, Prompt] = {}
    places: dict[str, str] = {}
    for place, row in rows:
        prompt = as_text(place, "prompt", row["prompt"])
        if prompt in places:
            raise ValueError(
                f"{place}: is the prompt of {places[prompt]} again, and videos are named after"
                " their prompt; remove one, or ask for more samples"
            )
        places[prompt] = place
        of = row.get("category", [])
        entries[prompt] = Prompt(
            prompt=prompt,
            text=as_text(place, "text", row.get("text", prompt)),
            dimensions=measured,
            categories=tuple(
                as_text(place, "category", c) for c in (of if isinstance(of, list) else [of])
            ),
            samples=samples,
        )
    return Suite(
        name=name or stem,
        source=f"{base} sha256:{sha256_of([path])}",
        prompts=tuple(entries.values()),
    )


def _index() -> tuple[list[dict[str, Any]], str]:
    """VBench's list of prompts, without importing the package; and what it is."""
    found = importlib.util.find_spec("vbench")
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            "VBench's prompts come with its package, which is not installed: run `pip install"
            " --no-deps vbench==0.1.5`, or ask for prompts of your own"
        )
    path = Path(found.submodule_search_locations[0]) / _INDEX
    if not path.is_file():
        raise ValueError(f"{path.parent} is no vbench 0.1.5: it has no {_INDEX}; install it again")
    try:
        version = importlib.metadata.version("vbench")
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"  # a checkout on the path; the hash tells
    index = json.loads(path.read_bytes())
    return index, f"vbench {version} {_INDEX} sha256:{sha256_of([str(path)])}"


def _long_by_dimension(
    index: Iterable[Mapping[str, Any]], wanted: Sequence[str], folder: str
) -> tuple[dict[str, str], str]:
    """Long forms of the prompts that are wanted, and a hash of the files."""
    texts: dict[str, str] = {}
    tables: dict[str, dict[str, str]] = {}
    files = []
    for entry in index:
        prompt, own = entry["prompt_en"], entry["dimension"]
        told = {*own, "text_alignment"} if _CONSISTENCY in own else {*own}
        if not told & {*wanted}:
            continue
        file = next(d for d in _PROMPT_FILES if d in own)
        short = storage.join(folder, "prompts_per_dimension", f"{file}.txt")
        longer = storage.join(folder, "prompts_per_dimension_longer", f"{file}_longer.txt")
        if file not in tables:
            tables[file] = long_forms(short, longer)
            files.append(longer)
        if prompt not in tables[file]:
            raise ValueError(
                f"{longer}: has no long form of {prompt!r}, which is on no line of {short}; take"
                " the files of the installed vbench's version"
            )
        texts.setdefault(prompt, tables[file][prompt])
    return texts, sha256_of(files)


def _distinct(uri: str) -> list[str]:
    """Prompts of a file, each of them once."""
    seen: dict[str, int] = {}
    for number, prompt in prompts_of(uri):
        if prompt in seen:
            raise ValueError(f"{uri}, line {number}: is the prompt of line {seen[prompt]} again")
        seen[prompt] = number
    return list(seen)


def _known(dimensions: Sequence[str]) -> tuple[str, ...]:
    for name in dimensions:
        if name not in DIMENSIONS:
            near = difflib.get_close_matches(name, DIMENSIONS, n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"no dimension {name}{meant}: there are {', '.join(DIMENSIONS)}")
    if not dimensions:
        raise ValueError(f"no dimension is asked for: there are {', '.join(DIMENSIONS)}")
    return tuple(dict.fromkeys(dimensions))


def _custom_dimensions(dimensions: Sequence[str]) -> tuple[str, ...]:
    known = _known(dimensions)
    refused = [d for d in known if not DIMENSIONS[d].is_custom]
    if refused:
        raise ValueError(
            f"{', '.join(refused)}: measured for VBench's standard prompts alone, whose index tells"
            " what to look for; leave out, or take the standard suite"
        )
    return known


def _positive(what: str, num: int) -> None:
    if num < 1:
        raise ValueError(f"{what} is 1 or more, not {num}")
