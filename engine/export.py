"""What a dataset keeps, as trainers read it: samples, their columns, and the choice of a text.

Formats, as their readers were in late 2026 (datasets 5.2 and webdataset 1.0 were tried, the others
go by their code):

- `hf`: `metadata.jsonl` with `file_name` beside the files, as `load_dataset("videofolder")` (or
  `imagefolder`) of Hugging Face datasets reads it, and with `caption` finetrainers 0.2, which
  allows one metadata file only.
- `webdataset`: tar shards of `KEY.mp4`, `KEY.txt` and `KEY.json`. datasets takes the columns and
  types from the first five samples, so samples that have the most values come first; finetrainers
  takes `txt` for the caption.
- `jsonl`: `clips.jsonl` for programs of one's own; `videox_fun.json`, VideoX-Fun's list of
  `file_path`, `text` and `type` (its 2026 main branch; folder as `data_root`); `diffsynth.csv`,
  DiffSynth-Studio 2's `video` (or `image`) and `prompt`, for `--dataset_metadata_path`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from engine.cut import DEFAULT, Encoding, Mode, Span
from engine.cutter import CutUnit
from engine.tables import read

Format = Literal["webdataset", "hf", "jsonl"]
Media = Literal["video", "image"]
Caption = Literal["caption", "caption_original", "rephrased"]
CLIPS_AT_ONCE = 32
_FIRST = 5
_FACTS = (
    "clip_id source_id start_s end_s num_frames fps width_px height_px duration_s"
    " motion_score brightness aesthetic_score ocr_area_frac watermark_score overlay_score"
    " clip_score caption_original"
).split()
_OF_PAIRS = "pair_id instruction language original original_source".split()
_SPAN = "source_uri start_s end_s start_frame num_frames".split()
_MEANT = {
    "file_name", "caption", "text", "txt", "json", "mp4", "webm", "mkv", "video", "image", "label",
    "__key__", "__url__", "file_path", "type", "prompt", *_FACTS, *_OF_PAIRS, *_SPAN,
}  # fmt: skip
"""Names that our columns have, or that readers give a meaning."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be written."""

    root: str
    format: Format
    media: Media = "video"
    pairs: bool = False
    """RISE's pairs instead of clips: one sample a kept pair."""
    caption: Caption | None = None
    """Which text; None: `rephrased` of pairs, else `caption` where there is any, else
    `caption_original`."""
    cut: Mode | None = None
    """Cut now what the dataset has not cut in this way."""
    spans: bool = False
    """Name spans of the sources, and write no media."""
    encoding: Encoding = DEFAULT
    shard_bytes: int = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One clip or pair, with all that is written of it but its media."""

    key: str
    span: Span
    source_id: str
    source_uri: str
    text: str
    facts: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The samples of an export, in their order."""

    samples: list[Sample]
    caption: Caption
    left_out: Counter[str] = field(default_factory=Counter)
    """Kept rows that are not among them, by reason."""

    def fingerprint(self, request: Request) -> str:
        """Tells this export from every other."""
        digest = hashlib.sha256(repr(request).encode())
        for sample in self.samples:
            told = [sample.key, sample.text, sample.facts]
            digest.update(json.dumps(told, sort_keys=True).encode())
        return digest.hexdigest()


def select(request: Request) -> Selection:
    """The kept clips or pairs of a dataset that have a text.

    Raises:
        ValueError: The request contradicts itself or the dataset, in one line for a person.
    """
    _check(request)
    clips = _kept(request.root, "clips", [*_FACTS, "start_frame", "source_uri", "caption", "extra"])
    clips = clips.filter(pc.equal(pc.fill_null(clips["media"], "video"), request.media))
    rows = clips.to_pylist()
    if request.pairs:
        rows = _paired(request.root, {row["clip_id"]: row for row in rows})
    what = f"{request.media} {'pair' if request.pairs else 'clip'}"
    if not rows:
        raise ValueError(f"{request.root} keeps no {what}: there is nothing to export")
    caption = request.caption or _first_told(rows, request.pairs)
    texts = [_text(row, caption, request.pairs) for row in rows]
    if not any(texts):
        raise ValueError(
            f"no kept {what} of {request.root} has a text in {caption!r}: choose another --caption,"
            " or let a recipe with a captioner run first"
        )
    told = [(row, text) for row, text in zip(rows, texts, strict=True) if text]
    extras = _columns_of([json.loads(row["extra"] or "{}") for row, _ in told])
    samples = [_sample(row, t, e, request) for (row, t), e in zip(told, extras, strict=True)]
    samples.sort(key=lambda s: (s.source_id, s.span.start_s, s.span.end_s, s.key))
    left_out = Counter({"no text": len(rows) - len(told)} if len(told) < len(rows) else {})
    samples = _fullest_first(_without_empty_columns(samples))
    return Selection(samples=samples, caption=caption, left_out=left_out)


def _check(request: Request) -> None:
    if request.spans and request.format != "jsonl":
        raise ValueError(
            f"--spans names no files, which {request.format} needs: use --format jsonl"
        )
    if request.spans and request.cut:
        raise ValueError("--spans writes no media, so --cut has no use: leave one out")
    if request.caption == "rephrased" and not request.pairs:
        raise ValueError("--caption rephrased is a text of pairs: add --pairs")


def _kept(root: str, name: str, columns: Sequence[str]) -> pa.Table:
    table = read(root, name)
    there = [c for c in (*columns, "media") if c in table.schema.names]
    found = table.to_table(columns=there, filter="kept")
    for column in (*columns, "media"):
        if column not in there:
            found = found.append_column(column, pa.nulls(found.num_rows, pa.string()))
    return found


def _paired(root: str, clips: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    pairs = _kept(root, "pairs", [*_OF_PAIRS, "clip_id", "rephrased"]).to_pylist()
    names = [*_OF_PAIRS, "rephrased"]
    return [
        clips[pair["clip_id"]] | {name: pair[name] for name in names}
        for pair in pairs
        if pair["clip_id"] in clips
    ]


def _first_told(rows: Sequence[dict[str, Any]], pairs: bool) -> Caption:
    if pairs:
        return "rephrased"
    return "caption" if any(row["caption"] for row in rows) else "caption_original"


def _text(row: dict[str, Any], caption: Caption, pairs: bool) -> str:
    column = "original" if pairs and caption == "caption_original" else caption
    return (row[column] or "").strip()


def _sample(row: dict[str, Any], text: str, extra: dict[str, Any], request: Request) -> Sample:
    names = [*(_OF_PAIRS if request.pairs else []), *_FACTS, *(_SPAN if request.spans else [])]
    span = {n: row[n] or 0 for n in ("start_frame", "num_frames")}
    span |= {n: row[n] or 0.0 for n in ("start_s", "end_s")}
    return Sample(
        key=row["pair_id"] if request.pairs else row["clip_id"],
        span=Span(clip_id=row["clip_id"], **span),
        source_id=row["source_id"],
        source_uri=row["source_uri"],
        text=text,
        facts={name: row[name] for name in names} | extra,
    )


def _without_empty_columns(samples: list[Sample]) -> list[Sample]:
    told = {name for s in samples for name, value in s.facts.items() if value is not None}
    return [
        dataclasses.replace(s, facts={n: v for n, v in s.facts.items() if n in told})
        for s in samples
    ]


def _columns_of(extras: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Unknown manifest columns as columns: each in every row, and of one kind in all of them.

    Nested values, and those of columns whose kinds differ, become JSON text: readers take a
    column's type from its first rows.
    """
    kinds: dict[str, set[type]] = {}
    for extra in extras:
        for name, value in extra.items():
            kinds.setdefault(name, set()).add(float if type(value) is int else type(value))
    plain = {n for n, k in kinds.items() if len(k - {type(None)}) == 1 and not k & {dict, list}}
    names = {name: _free(name, kinds) for name in kinds}

    numbers = {n for n in plain if any(type(e.get(n)) is float for e in extras)}

    def told(name: str, value: Any) -> Any:
        if value is None:
            return None
        if name in plain:
            return float(value) if name in numbers else value
        return json.dumps(value, ensure_ascii=False)

    return [{free: told(n, extra.get(n)) for n, free in names.items()} for extra in extras]


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """A column name that nobody gives another meaning; datasets opens what ends in `file_name`."""
    free = name.replace("file_name", "filename")
    if free in _MEANT:
        free = f"extra_{free}"
    while free != name and free in taken:
        free = f"{free}_"
    return free


def _fullest_first(samples: list[Sample]) -> list[Sample]:
    """Moves a few samples to the front, so that every column has a value among the first five."""
    missing = {n for s in samples for n, v in s.facts.items() if v is not None}
    chosen: list[int] = []
    while missing and len(chosen) < _FIRST:
        gains = [sum(s.facts[n] is not None for n in missing) for s in samples]
        best = max(range(len(samples)), key=lambda i: (gains[i], -i))
        if not gains[best]:
            break
        chosen.append(best)
        missing -= {n for n in missing if samples[best].facts[n] is not None}
    rest = [s for i, s in enumerate(samples) if i not in set(chosen)]
    return [*(samples[i] for i in chosen), *rest]


def units(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Samples that stand together and share a source, with at most `CLIPS_AT_ONCE` clips each."""
    group: list[Sample] = []
    clips: set[str] = set()
    for sample in samples:
        other = group and group[-1].source_id != sample.source_id
        if other or (len(clips) == CLIPS_AT_ONCE and sample.span.clip_id not in clips):
            yield group
            group, clips = [], set()
        group.append(sample)
        clips.add(sample.span.clip_id)
    if group:
        yield group


def cut_unit_of(samples: Sequence[Sample]) -> CutUnit:
    """The clips of a unit, each once."""
    spans = {s.span.clip_id: s.span for s in samples}
    return CutUnit(
        source_id=samples[0].source_id,
        source_uri=samples[0].source_uri,
        clips=tuple(spans.values()),
    )
