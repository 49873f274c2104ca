"""Manifests: lists of sources with captions, spans and columns of their own, in five formats."""

from __future__ import annotations

import base64
import codecs
import csv
import io
import json
import logging
import math
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, time
from typing import Any

import lance
import pyarrow as pa
import pyarrow.parquet as pq

from engine import storage

_log = logging.getLogger(__name__)

SUFFIXES = (".txt", ".csv", ".jsonl", ".parquet", ".lance")
_COLUMNS = ("uri", "caption", "start_s", "end_s", "media")
_MEDIA = ("video", "image")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a manifest; `place` names it for a person, as in `list.csv, line 3`."""

    place: str
    uri: str
    span: tuple[float, float] | None
    caption: str | None
    extra: str | None
    media: str | None = None
    """video or image, where the row says so."""


def read_manifest(manifest: str) -> Iterator[Row]:
    """The rows of a manifest, relative uris resolved against its folder.

    Args:
        manifest: Path or URI with one of the suffixes in `SUFFIXES`. Its `uri` column is required,
            `caption`, `start_s`, `end_s` and `media` (video or image) are optional, others become
            `extra`. Text has one uri a line, and comments after a `#` at a line's start.

    Raises:
        ValueError: A row is not usable; one line that names it.
        OSError: The manifest cannot be read.
    """
    readers = {
        ".txt": _lines,
        ".csv": _csv,
        ".jsonl": _jsonl,
        ".parquet": _parquet,
        ".lance": _lance,
    }
    folder = storage.parent(manifest)
    for place, values in readers[suffix_of(manifest)](manifest):
        yield _row(f"{shown(manifest)}, {place}", values, folder)


def suffix_of(uri: str) -> str:
    """The lower-case suffix of a manifest's or media file's name, with its dot."""
    return posixpath.splitext(uri.rstrip("/"))[1].lower()


def shown(uri: str) -> str:
    """A name as part of one line: quoted where it holds a line break or the like."""
    return uri if uri.isprintable() else ascii(uri)


def as_caption(value: Any) -> str | None:
    """A caption without outer white space, None where nothing is left.

    Raises:
        ValueError: It is not a text.
    """
    if value is None:
        return None
    if not isinstance(value, str) or not storage.is_text(value):
        raise ValueError(f"a caption must be text, found {value!a:.80}")
    return value.strip() or None


def as_extra(values: Mapping[str, Any]) -> str | None:
    """Columns that we do not know as one JSON object; empty ones left out, None if none is left."""
    known = {name: _json_value(v) for name, v in values.items()}
    kept = {name: v for name, v in known.items() if v is not None and v != ""}
    if not kept:
        return None
    text = json.dumps(kept, ensure_ascii=False)
    return text if storage.is_text(text) else json.dumps(kept)


def _row(place: str, values: Mapping[str, Any], folder: str) -> Row:
    uri = values.get("uri")
    if not isinstance(uri, str) or not uri.strip():
        found = "an empty one" if uri is None or uri == "" else f"{uri!a:.80}"
        raise ValueError(f"{place}: needs a `uri`, found {found}; fill it in or remove the row")
    if not storage.is_text(uri):
        raise ValueError(f"{place}: its `uri` is not valid Unicode: {uri!a:.200}")
    try:
        caption = as_caption(values.get("caption"))
    except ValueError as e:
        raise ValueError(f"{place}: {e}") from e
    extra = as_extra({name: v for name, v in values.items() if name not in _COLUMNS})
    span, media = _span(place, values), _media(place, values)
    return Row(place, _resolve(folder, uri), span, caption, extra, media)


def _resolve(folder: str, uri: str) -> str:
    if storage.is_remote(uri) or uri.startswith(("/", "file://")):
        return storage.absolute(uri)
    if not storage.is_remote(folder):
        return storage.absolute(storage.join(folder, uri))
    scheme, rest = storage.join(folder, uri).split("://", 1)
    return f"{scheme}://{posixpath.normpath(rest)}"


def _media(place: str, values: Mapping[str, Any]) -> str | None:
    value = values.get("media")
    word = value.strip().lower() if isinstance(value, str) else value
    if not word:
        return None
    if word not in _MEDIA:
        raise ValueError(
            f"{place}: media must be video or image, found {value!a:.80}; correct it, or rename "
            "the column if it means something else"
        )
    return word


def _span(place: str, values: Mapping[str, Any]) -> tuple[float, float] | None:
    start_s, end_s = (_seconds(place, name, values.get(name)) for name in ("start_s", "end_s"))
    if start_s is None and end_s is None:
        return None
    if start_s is None or end_s is None:
        missing = "start_s" if start_s is None else "end_s"
        raise ValueError(f"{place}: a span needs start_s and end_s, found no {missing}; give both")
    if start_s >= end_s:
        raise ValueError(
            f"{place}: start_s must be less than end_s, found {start_s:g} and {end_s:g}"
        )
    return start_s, end_s


def _seconds(place: str, name: str, value: Any) -> float | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(
            f"{place}: {name} must be a number of seconds, 0 or more, found {value!a:.80}"
        )
    return seconds


def _lines(manifest: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_text(manifest).split("\n"), start=1):
        line = line.strip()
        if line and not line.startswith("#"):
            yield f"line {number}", {"uri": line}


def _csv(manifest: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(_text(manifest), newline=""))
    try:
        names = [name.strip() for name in next(reader, [])]
        if not names:
            return
        _check_columns(manifest, names)
        for fields in reader:
            place = f"line {reader.line_num}"
            if not fields:
                continue
            if len(fields) > len(names):
                raise ValueError(
                    f"{shown(manifest)}, {place}: needs at most {len(names)} values, found "
                    f'{len(fields)}; put values with a comma into "quotes"'
                )
            yield place, dict(zip(names, fields, strict=False))
    except csv.Error as e:
        raise ValueError(f"{shown(manifest)}, line {reader.line_num}: is not CSV: {e}") from e


def _jsonl(manifest: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_text(manifest).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{shown(manifest)}, {place}: is not JSON: {e}") from e
        if not isinstance(values, dict):
            raise ValueError(
                f'{shown(manifest)}, {place}: needs an object such as {{"uri": "a.mp4"}}, '
                f"found {line.strip()!a:.80}"
            )
        yield place, values


def _parquet(manifest: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with storage.open_read(manifest) as file:
        try:
            table = pq.ParquetFile(file)
            names = _carried(manifest, table.schema_arrow)
            yield from _arrow_rows(table.iter_batches(columns=names))
        except pa.ArrowException as e:
            raise ValueError(f"{shown(manifest)}: is not readable Parquet: {_one_line(e)}") from e


def _lance(manifest: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        options = storage.lance_options(manifest)
        table = lance.dataset(storage.allowed_path(manifest), storage_options=options)
    except (OSError, ValueError) as e:
        raise ValueError(f"{shown(manifest)}: is not a readable Lance table: {_one_line(e)}") from e
    yield from _arrow_rows(table.to_batches(columns=_carried(manifest, table.schema)))


def _arrow_rows(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            yield f"row {number}", values


def _carried(manifest: str, schema: pa.Schema) -> list[str]:
    """Names of the columns to read: all but those of bytes, which no table should carry along."""
    _check_columns(manifest, schema.names)
    left = [f.name for f in schema if f.name not in _COLUMNS and _is_bytes(f.type)]
    if left:
        _log.warning("%s: its columns of bytes do not travel along: %s", manifest, ", ".join(left))
    return [name for name in schema.names if name not in left]


def _is_bytes(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return "blob" in kind.extension_name or _is_bytes(kind.storage_type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _check_columns(manifest: str, names: list[str]) -> None:
    if "uri" not in names:
        raise ValueError(
            f"{shown(manifest)}: needs a column `uri`, found "
            f"{', '.join(map(shown, names)) or 'none'}; rename the one that holds the paths"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{shown(manifest)}: has two columns named {twice[0]!a}; rename one")


def _text(manifest: str) -> str:
    data = storage.read_bytes(manifest)
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise ValueError(
            f"{shown(manifest)}, line {line}: needs UTF-8 text, found the byte"
            f" 0x{data[e.start]:02x}; save it as UTF-8"
        ) from e


def _json_value(value: Any) -> Any:
    """A JSON value for what Arrow gives; JSON has no NaN, times or bytes."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Mapping):
        return {str(name): _json_value(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(v) for v in value]
    return str(value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
