"""Blobs of a table, read only where they lie in the table's own files.

A row of Lance's may hold, in a blob's place, the URI of any file or object, which is opened by
whoever reads the blob. No table of ours has such rows; one that somebody else made may.
"""

from __future__ import annotations

from collections.abc import Sequence

import lance
import pyarrow as pa
import pyarrow.compute as pc

from engine.roots import NotAllowed

_ELSEWHERE = 3  # kind in Lance's description of a blob


def take_blobs(
    table: lance.LanceDataset,
    column: str,
    *,
    ids: Sequence[int] | None = None,
    addresses: Sequence[int] | None = None,
    indices: Sequence[int] | None = None,
) -> list[lance.BlobFile | None]:
    """`LanceDataset.take_blobs`: open files, in order; None for a null.

    Raises:
        NotAllowed: One lies outside the table.
    """
    which = {"ids": ids, "addresses": addresses, "indices": indices}
    named = {name: list(values) for name, values in which.items() if values is not None}
    _check(table, column, **named)
    return table.take_blobs(column, **named)


def read_blobs(
    table: lance.LanceDataset, column: str, addresses: Sequence[int]
) -> list[tuple[int, bytes | None]]:
    """`LanceDataset.read_blobs`: addresses and contents.

    Raises:
        NotAllowed: One lies outside the table.
    """
    _check(table, column, addresses=addresses)
    return table.read_blobs(column, addresses=addresses)


def _check(
    table: lance.LanceDataset,
    column: str,
    *,
    ids: Sequence[int] = (),
    addresses: Sequence[int] = (),
    indices: Sequence[int] = (),
) -> None:
    if indices:
        found = table.take(indices, columns=[column])
    elif ids or addresses:
        name, values = ("_rowid", ids) if ids else ("_rowaddr", addresses)
        listed = ", ".join(str(int(value)) for value in values)
        found = table.scanner([column], filter=f"{name} IN ({listed})").to_table()
    else:
        return
    about = found[column].combine_chunks()
    if not pa.types.is_struct(about.type) or about.type.get_field_index("kind") < 0:
        return  # a column from before blobs could lie elsewhere
    away = pc.equal(pc.struct_field(about, "kind"), _ELSEWHERE)
    if pc.any(away).as_py():
        uri = pc.struct_field(about, "blob_uri").filter(away)[0].as_py()
        raise NotAllowed(
            f"lies outside of {table.uri}, whose column {column} names it: nothing is read from"
            " elsewhere by way of a table",
            uri,
        )
