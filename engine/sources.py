"""What to read: videos and images of folders, globs, manifests or by name, with what is beside."""

from __future__ import annotations

import json
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from typing import Any

from engine import storage
from engine.folders import Entry, listing
from engine.manifest import SUFFIXES, as_caption, as_extra, read_manifest, shown, suffix_of

VIDEO_SUFFIXES = frozenset(
    ".3g2 .3gp .asf .avi .divx .f4v .flv .m1v .m2ts .m2v .m4v .mkv .mov .mp4 .mpe .mpeg .mpg .mts"
    " .mxf .ogm .ogv .qt .rm .rmvb .ts .vob .webm .wmv .y4m".split()
)
IMAGE_SUFFIXES = frozenset(".avif .bmp .jfif .jpe .jpeg .jpg .png .tif .tiff .webp".split())
"""What is read of still pictures. A GIF, which moves, is a video, and only where a manifest names
it; HEIC, JPEG XL and JPEG 2000 are not read."""
MEDIA_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES
"""In a folder or glob, a name with one of these (in any case) is a source whatever it holds."""
SIDECAR_SUFFIXES = (".txt", ".json")
MAX_SIDECAR_BYTES = 1 << 20
WILDCARD = r"[*?\[]"


@dataclass(frozen=True)
class Span:
    """A part of a source that is one clip, never split."""

    start_s: float
    end_s: float
    caption: str | None = None
    extra: str | None = None


@dataclass(frozen=True)
class Source:
    """One file to read, or with `error` one that cannot be: a row either way.

    Attributes:
        uri: Absolute local path, or URI.
        spans: The clips that a manifest asks for, sorted; none: the whole file, split into shots.
        caption: Of the whole file, from a manifest or else a sidecar.
        extra: Manifest columns and sidecar keys that we do not know, as one JSON object.
        error: One line for a person, e.g. that a manifest lists a file which is not there.
        media: `video` or `image`, by what a manifest says, else by the suffix; None: neither tells,
            and the content decides when it is read.
    """

    uri: str
    size_bytes: int | None = None
    mtime_ns: int | None = None
    etag: str | None = None
    spans: tuple[Span, ...] = ()
    caption: str | None = None
    extra: str | None = None
    error: str | None = None
    media: str | None = "video"


@dataclass(frozen=True)
class Listing:
    """Sources by uri, each once; `ignored` counts other files, `repeated` what was named again."""

    sources: tuple[Source, ...]
    ignored: int
    repeated: int


@dataclass(slots=True)
class _Named:
    """A source as one place names it; None for what is not looked up yet."""

    place: str
    uri: str
    span: tuple[float, float] | None = None
    caption: str | None = None
    extra: str | None = None
    entry: Entry | None = None
    sidecars: Sequence[Entry] | None = None
    media: str | None = None


def list_sources(src: str | Sequence[str]) -> Listing:
    """The sources that `src` names, looked at but not opened (their sidecars are).

    A picture beside a video, such as its thumbnail, is a source of its own; a caption beside both
    is the caption of each.

    Args:
        src: Any number of folders (taken with all below), globs (`**` for any depth), manifests
            (`.txt`, `.csv`, `.jsonl`, `.parquet`, `.lance`) and single videos or images, local or
            remote. In a glob, a folder that matches is taken with all below.

    Raises:
        ValueError: For a person: one line that says what was needed, what was found and what to do.
    """
    given = [src] if isinstance(src, str) else list(src)
    if not given or not all(given):
        raise ValueError("needs a folder, glob, manifest, video or image, found an empty name")
    named: dict[str, list[_Named]] = defaultdict(list)
    ignored: set[str] = set()
    for one in _without_sidecars(given):
        try:
            for found in _expand(one, ignored):
                named[found.uri].append(found)
        except OSError as e:
            raise ValueError(f"{shown(one)}: cannot be read: {_reason(e)}") from e
    spans = {uri: _spans_of(rows) for uri, rows in named.items()}
    try:
        entries = _entries_of(named)
        beside = _beside_of(named, entries)
    except OSError as e:
        raise ValueError(f"the store does not answer: {_reason(e)}") from e
    sources = tuple(
        _source(named[uri], spans[uri], entries[uri], beside.get(uri, _Beside()))
        for uri in sorted(named)
    )
    counted = sum(len(source.spans) or 1 for source in sources)
    return Listing(sources, len(ignored), sum(map(len, named.values())) - counted)


def is_media(uri: str) -> bool:
    """Whether a name says that a video or an image is meant."""
    return suffix_of(uri) in MEDIA_SUFFIXES


def media_of(uri: str) -> str | None:
    """`video` or `image`, as the name says; None where it says neither."""
    suffix = suffix_of(uri)
    return "image" if suffix in IMAGE_SUFFIXES else "video" if suffix in VIDEO_SUFFIXES else None


def _without_sidecars(given: Sequence[str]) -> Iterator[str]:
    """A shell that opens `videos/*` also names captions, which must not be read as manifests."""
    stems = {_stem(one) for one in given if is_media(one)}
    for one in given:
        if suffix_of(one) not in SIDECAR_SUFFIXES or _stem(one) not in stems:
            yield one


def _expand(src: str, ignored: set[str]) -> Iterator[_Named]:
    uri = storage.absolute(src)
    kind = storage.kind(uri)
    suffix = suffix_of(uri)
    manifests = {"folder": (".lance",), "file": tuple(s for s in SUFFIXES if s != ".lance")}
    if kind and suffix in manifests[kind]:
        yield from _of_manifest(uri)
    elif kind == "folder":
        yield from _of_entries(src, uri, listing(uri, closed=is_media), ignored)
    elif kind == "file" and is_media(uri):
        yield _Named(shown(src), uri)
    elif kind == "file":
        raise ValueError(
            f"{shown(src)}: needs a video, an image or a manifest ({', '.join(SUFFIXES)}), found "
            f"{f'a {suffix} file' if suffix else 'a file without a suffix'}; "
            "name the files in one of these, one `uri` a row"
        )
    elif re.search(WILDCARD, src):
        yield from _of_glob(src, uri, ignored)
    else:
        raise ValueError(f"{shown(src)}: there is no such file or folder; check the path")


def _of_manifest(uri: str) -> Iterator[_Named]:
    empty = True
    for row in read_manifest(uri):
        empty = False
        yield _Named(row.place, row.uri, row.span, row.caption, row.extra, media=row.media)
    if empty:
        raise ValueError(f"{shown(uri)}: needs at least one `uri`, found an empty manifest")


def _of_glob(src: str, uri: str, ignored: set[str]) -> Iterator[_Named]:
    root, parts = split_glob(uri)
    if storage.kind(root) != "folder":
        raise ValueError(f"{shown(src)}: there is no folder {shown(root)}; check the path")
    glob = Glob(parts)
    yield from _of_entries(src, root, listing(root, is_media, glob.may_hold), ignored, glob)


def _of_entries(
    src: str, root: str, entries: Iterable[Entry], ignored: set[str], glob: Glob | None = None
) -> Iterator[_Named]:
    named: list[Entry] = []
    others: list[tuple[Entry, bool]] = []
    for entry in entries:
        wanted = glob is None or glob.matches(parts_below(root, entry.uri))
        if entry.folder and not is_media(entry.uri):
            named.append(entry)  # nobody may look inside: what it holds must not be lost silently
        elif not is_media(entry.uri):
            others.append((entry, wanted))
        elif wanted:
            named.append(entry)
    stems = {_stem(entry.uri) for entry in named}
    beside: dict[str, list[Entry]] = defaultdict(list)
    num_others = 0
    for entry, wanted in others:
        if suffix_of(entry.uri) in SIDECAR_SUFFIXES and _stem(entry.uri) in stems:
            beside[_stem(entry.uri)].append(entry)
        elif wanted:
            num_others += 1
            ignored.add(entry.uri)
    if not named:
        raise ValueError(
            f"{shown(src)}: needs at least one video or image (a name in .mp4, .webm, .jpg or the "
            f"like), found none among {num_others} {'matching' if glob else 'other'} files; "
            "check the path"
        )
    for entry in named:
        sidecars = beside.get(_stem(entry.uri), ())
        yield _Named(shown(src), entry.uri, entry=entry, sidecars=sidecars)


class Glob:
    """A pattern in parts; a folder that matches is taken with all below it."""

    def __init__(self, parts: Sequence[str]):
        self._parts = [None if part == "**" else re.compile(translate(part)) for part in parts]

    def matches(self, names: Sequence[str]) -> bool:
        """Whether the path in `names`, or a folder above it, matches."""
        return len(self._parts) in self._reached(names)

    def may_hold(self, names: Sequence[str]) -> bool:
        """Whether something below the folder `names` can match."""
        return bool(self._reached(names))

    def _reached(self, names: Sequence[str]) -> set[int]:
        """How many parts of the pattern can be used up by `names`."""
        end = len(self._parts)
        reached = self._with_empty_stars({0})
        for name in names:
            if end in reached:
                return {end}
            after = {i for i in reached if self._parts[i] is None}
            after |= {i + 1 for i in reached - after if self._parts[i].match(name)}
            reached = self._with_empty_stars(after)
        return reached

    def _with_empty_stars(self, reached: set[int]) -> set[int]:
        for i in range(len(self._parts)):
            if i in reached and self._parts[i] is None:
                reached.add(i + 1)  # `**` also stands for no folder at all
        return reached


def split_glob(uri: str) -> tuple[str, list[str]]:
    """The folder above the first part with a wildcard, and the parts from there on."""
    start = uri.index("://") + 3 if storage.is_remote(uri) else 0
    parts = (uri[start:] if start else storage.local_path(uri)).split("/")
    first = next(i for i, part in enumerate(parts) if re.search(WILDCARD, part))
    root = "/".join(parts[:first])
    return (uri[:start] + root if start else storage.local_uri(root or "/")), parts[first:]


def parts_below(root: str, uri: str) -> list[str]:
    """Names of the folders between a root and what lies below it, and its own."""
    if not storage.is_remote(root):
        root, uri = storage.local_path(root), storage.local_path(uri)
    return uri[len(root.rstrip("/")) + 1 :].split("/")


def _stem(uri: str) -> str:
    return posixpath.splitext(uri)[0]


def _spans_of(rows: Sequence[_Named]) -> tuple[Span, ...]:
    """The spans that these rows of one source ask for; none: the whole file.

    Raises:
        ValueError: They contradict each other.
    """
    by_span: dict[tuple[float, float] | None, _Named] = {}
    for row in rows:
        first = by_span.setdefault(row.span, row)
        if row.caption and first.caption and row.caption != first.caption:
            raise ValueError(
                f"{row.place}: gives {shown(row.uri)} another caption than {first.place}; keep one"
            )
        if row.media and rows[0].media and row.media != rows[0].media:
            raise ValueError(
                f"{row.place}: says that {shown(row.uri)} is {row.media}, and {rows[0].place} that "
                f"it is {rows[0].media}; keep one"
            )
        if (row.span is None) != (rows[0].span is None):
            raise ValueError(
                f"{row.place}: names {shown(row.uri)} {'with' if row.span else 'without'} a span, "
                f"and {rows[0].place} {'with' if rows[0].span else 'without'}; keep one kind"
            )
        first.caption = first.caption or row.caption
        first.extra = first.extra or row.extra
        rows[0].media = rows[0].media or row.media
    spans = [Span(*span, row.caption, row.extra) for span, row in by_span.items() if span]
    return tuple(sorted(spans, key=lambda span: (span.start_s, span.end_s)))


def _entries_of(named: Mapping[str, Sequence[_Named]]) -> dict[str, Entry]:
    """What is known of every source; files that only a manifest names are looked at."""
    known = {uri: row.entry for uri, rows in named.items() for row in rows if row.entry is not None}
    unknown = [uri for uri in named if uri not in known]
    looked_at = storage.map_requests(lambda uri: _look(uri, named[uri][0].place), unknown)
    return known | dict(zip(unknown, looked_at, strict=True))


def _look(uri: str, place: str) -> Entry:
    try:
        return Entry(uri, storage.stat(uri))
    except (ConnectionError, TimeoutError):
        raise  # says nothing about this file
    except FileNotFoundError:
        return Entry(uri, None, f"{place} names it, but there is no such file")
    except IsADirectoryError:
        return Entry(uri, None, "is a folder, not a file")
    except (OSError, ValueError) as e:
        return Entry(uri, None, f"cannot be read: {_reason(e)}")


@dataclass(frozen=True, slots=True)
class _Beside:
    """What the sidecars of one source say."""

    caption: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


def _beside_of(
    named: Mapping[str, Sequence[_Named]], entries: Mapping[str, Entry]
) -> dict[str, _Beside]:
    """Reads the sidecars of the sources for which no manifest gives all captions."""
    wanted: dict[str, Sequence[Entry] | None] = {}
    for uri, rows in named.items():
        if entries[uri].error or all(row.caption for row in rows):
            continue
        known = [row.sidecars for row in rows if row.sidecars is not None]
        if not known:
            wanted[uri] = None
        elif known[0]:
            wanted[uri] = known[0]
    read = storage.map_requests(lambda uri: _read_sidecars(uri, wanted[uri]), list(wanted))
    return dict(zip(wanted, read, strict=True))


def _read_sidecars(uri: str, sidecars: Sequence[Entry] | None) -> _Beside:
    names = [_stem(uri) + suffix for suffix in SIDECAR_SUFFIXES]
    if sidecars is not None:
        names = [entry.uri for entry in sidecars]
    captions: dict[str, str | None] = {}
    extra: dict[str, Any] = {}
    for name in names:
        try:
            text = storage.read_bytes(name, MAX_SIDECAR_BYTES).decode("utf-8-sig")
            if suffix_of(name) == ".json":
                extra = _json_object(text)
                captions[".json"] = as_caption(extra.pop("caption", None))
            else:
                captions[".txt"] = as_caption(text)
        except (ConnectionError, TimeoutError):
            raise
        except (OSError, ValueError) as e:
            absent = (FileNotFoundError, IsADirectoryError)
            if storage.is_remote(name):
                absent += (PermissionError,)  # S3's answer to those who may not list the bucket
            if sidecars is None and isinstance(e, absent):
                continue
            file = shown(posixpath.basename(name))
            return _Beside(error=f"its caption in {file} cannot be read: {_reason(e)}")
    return _Beside(captions.get(".txt") or captions.get(".json"), extra)


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except RecursionError as e:
        raise ValueError("its JSON is nested too deeply") from e
    if not isinstance(found, dict):
        raise ValueError(f'it needs an object such as {{"caption": "…"}}, found {text!a:.40}')
    return found


def _source(
    rows: Sequence[_Named], spans: tuple[Span, ...], entry: Entry, beside: _Beside
) -> Source:
    first = rows[0]
    extra = dict(beside.extra) | json.loads(("" if spans else first.extra) or "{}")
    media = first.media or media_of(first.uri)
    found = entry.stat or storage.Stat(None, None)
    return Source(
        uri=first.uri,
        size_bytes=found.size_bytes,
        mtime_ns=found.mtime_ns,
        etag=found.etag,
        spans=spans,
        caption=(None if spans else first.caption) or beside.caption,
        extra=as_extra(extra),
        error=entry.error or beside.error or _misplaced_span(first, media),
        media=media,
    )


def _misplaced_span(row: _Named, media: str | None) -> str | None:
    if media != "image" or row.span is None:
        return None
    start_s, end_s = row.span
    return (
        f"{row.place} asks for a span of an image ({start_s:g} to {end_s:g} s), which has no time: "
        "leave start_s and end_s empty there"
    )


def _reason(error: Exception) -> str:
    """One line, without the number and name that the system's own errors carry."""
    return " ".join((getattr(error, "strerror", None) or str(error)).split())
