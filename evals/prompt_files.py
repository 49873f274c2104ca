"""Reads files of prompts: one a line, tables of them, VBench's long forms beside the short."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine import storage


def lines_of(uri: str) -> list[tuple[int, str]]:
    """Lines of a text file with their numbers, without outer white space; none empty at the end.

    Raises:
        ValueError: It cannot be read, or is not UTF-8.
    """
    lines = [line.strip() for line in _text(uri).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return list(enumerate(lines, start=1))


def prompts_of(uri: str) -> list[tuple[int, str]]:
    """The same of a file that has a prompt on every line.

    Raises:
        ValueError: A line is empty, or there is none.
    """
    lines = lines_of(uri)
    empty = next((number for number, line in lines if not line), None)
    if empty is not None:
        raise ValueError(f"{uri}, line {empty}: is empty, and every line needs a prompt")
    if not lines:
        raise ValueError(f"{uri}: has no prompts")
    return lines


def long_forms(short: str, longer: str) -> dict[str, str]:
    """By prompt of the file `short`, what stands on the same line of the file `longer`.

    Raises:
        ValueError: The files differ in their number of lines, or a line is empty.
    """
    prompts, texts = prompts_of(short), prompts_of(longer)
    if len(prompts) != len(texts):
        at = min(len(prompts), len(texts)) + 1
        raise ValueError(
            f"{longer}: has {len(texts)} lines, and {short} {len(prompts)}: from line {at} on one"
            " has no other; they must be of the same version"
        )
    return {prompt: text for (_, prompt), (_, text) in zip(prompts, texts, strict=True)}


def read_rows(
    uri: str, *, required: Sequence[str], others: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a table in .csv or .jsonl, each with its place for a person, as in `a.csv, line 3`.

    Empty values are left out; texts are without outer white space.

    Args:
        uri: Of the file.
        required: Columns that each row must have.
        others: Columns that it may have.

    Raises:
        ValueError: It is no such file; one line that names the place.
    """
    known = (*required, *others)
    for line, values in (_csv if uri.lower().endswith(".csv") else _jsonl)(uri):
        place = f"{uri}, {line}"
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(
                f"{place}: has a column {unknown[0]!a:.80}, and it may have {', '.join(known)};"
                " rename or remove it"
            )
        row = {k: v.strip() if isinstance(v, str) else v for k, v in values.items()}
        row = {k: v for k, v in row.items() if v is not None and v != ""}
        missing = [name for name in required if name not in row]
        if missing:
            raise ValueError(f"{place}: has no {missing[0]}; fill it in or remove the row")
        yield place, row


def as_text(place: str, name: str, value: Any) -> str:
    """A value that must be a text.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(value, str) or not value.strip() or not storage.is_text(value):
        raise ValueError(f"{place}: {name} must be text, found {value!a:.80}")
    return value.strip()


def sha256_of(uris: Sequence[str]) -> str:
    """The first 16 hex digits of the hash of what files hold, in order."""
    return hashlib.sha256(b"".join(_bytes(uri) for uri in uris)).hexdigest()[:16]


def _jsonl(uri: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in lines_of(uri):
        if not line:
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{uri}, line {number}: is not JSON: {e}") from e
        if not isinstance(values, dict):
            raise ValueError(
                f'{uri}, line {number}: needs an object such as {{"prompt": "a dog"}}, found'
                f" {line!a:.80}"
            )
        yield f"line {number}", values


def _csv(uri: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.reader(io.StringIO(_text(uri), newline=""), strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        for fields in reader:
            if len(fields) > len(names):
                raise ValueError(
                    f"{uri}, line {reader.line_num}: needs at most {len(names)} values, found"
                    f' {len(fields)}; put values with a comma into "quotes"'
                )
            if fields:
                yield f"line {reader.line_num}", dict(zip(names, fields, strict=False))
    except csv.Error as e:
        raise ValueError(f"{uri}, line {reader.line_num}: is not CSV: {e}") from e


def _text(uri: str) -> str:
    data = _bytes(uri)
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise ValueError(
            f"{uri}, line {line}: needs UTF-8 text, found the byte 0x{data[e.start]:02x}; save it"
            " as UTF-8"
        ) from e


def _bytes(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except OSError as e:
        raise ValueError(f"{uri}: cannot be read ({e.strerror or e}): name a file that is") from e
