"""What is in a dataset: its funnel, one clip's whole record, or the rejects nearest to a threshold.

python pipelines/report.py DATASET
python pipelines/report.py DATASET --clip CLIP_ID
python pipelines/report.py DATASET --near brightness
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow as pa
import pyarrow.compute as pc
import tyro
from rich.table import Table

from engine import command, storage
from engine.accounts import balance
from engine.tables import identity, read
from pipelines import cli
from pipelines.sheet import contact_sheet


@dataclass(frozen=True, kw_only=True)
class Args:
    """Reports on a dataset."""

    dataset: tyro.conf.Positional[str]
    """The dataset."""
    clip: str | None = None
    """The id of a clip (or how it begins), to show whole."""
    near: str | None = None
    """A column with a threshold: shows the rejects that missed it by least."""
    num: int = 10
    """How many rows of --near."""
    sheet: Path | None = None
    """A file for a picture of kept and rejected clips."""
    json: bool = False
    """JSON on standard output."""


def main() -> int:
    """Reports as the command line says; gives the exit code."""
    args = command.arguments(Args, __doc__ or "")
    command.set_up_logging()
    root = command.destination(args.dataset)
    with command.in_one_line(failing=root):
        recipe = cli.recipe_named(identity(root)["recipe"])
        if args.clip is not None:
            _show(clip_record(root, args.clip), as_json=args.json)
        elif args.near is not None:
            _show_near(nearest(root, args.near, args.num), as_json=args.json)
        elif args.sheet is not None:
            num_shown = contact_sheet(root, args.sheet)
            command.err.print(f"{num_shown} clips in {args.sheet}", highlight=False, soft_wrap=True)
        else:
            accounts = balance(lambda name: read(root, name), None)
            if args.json:
                command.print_json({"dataset": root, "recipe": recipe.name} | accounts.as_dict())
            else:
                command.out.print(cli.funnel(accounts, recipe.stages, cli.mean_kept_s(root)))
                cli.show_pairs(root)
                cli.show_failures(root)
    return 0


def clip_record(root: str, clip_id: str) -> dict[str, Any]:
    """All that is known of a clip: its row, its source's row and its keyframes.

    Raises:
        ValueError: No clip, or more than one, has an id that begins so.
    """
    escaped = clip_id.replace("'", "''")
    rows = read(root, "clips").to_table(filter=f"clip_id LIKE '{escaped}%'").to_pylist()
    if len(rows) != 1:
        raise ValueError(
            f"{len(rows)} clips have an id that begins with {clip_id!r}: give the whole id of one"
        )
    clip = rows[0]
    of = f"source_id = '{clip['source_id']}'"
    source = read(root, "sources").to_table(filter=of).to_pylist()[0]
    keyframes = read(root, "keyframes").to_table(
        columns=["frame", "time_s", "width_px", "height_px"],
        filter=f"clip_id = '{clip['clip_id']}'",
    )
    of = f"clip_id = '{clip['clip_id']}'"
    has_pairs = "pairs.lance" in storage.names_in(root)
    texts = ["instruction", "original", "original_source", "rephrased", "state", "reason"]
    pairs = read(root, "pairs").to_table(columns=texts, filter=of).to_pylist() if has_pairs else []
    return clip | {
        "pairs": pairs,
        "source": source,
        "keyframes": keyframes.sort_by("time_s").to_pylist(),
    }


def nearest(root: str, column: str, num: int) -> pa.Table:
    """The rejects that crossed a column's bound by the least, nearest first.

    Raises:
        ValueError: No rejected clip names that column.
    """
    names = ["clip_id", "source_uri", "start_s", "end_s", "reason", "rule_value", "rule_bound"]
    rejected = read(root, "clips").to_table(
        columns=[*names, "rule_column"], filter="state = 'rejected'"
    )
    found = rejected.filter(pc.equal(rejected["rule_column"], column))
    if not found.num_rows:
        there = sorted(set(rejected["rule_column"].to_pylist()))
        raise ValueError(f"no clip was rejected by {column!r}; those that rejected any: {there}")
    missed_by = pc.abs(pc.subtract(found["rule_value"], found["rule_bound"]))
    return (
        found.drop_columns(["rule_column"])
        .append_column("missed_by", missed_by)
        .sort_by([("missed_by", "ascending"), ("clip_id", "ascending")])
        .slice(0, num)
    )


def _show(record: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        command.print_json(record)
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in record.items():
        if name not in ("source", "keyframes", "pairs") and value is not None:
            table.add_row(name, _plain(value))
    for name, value in record["source"].items():
        if value is not None and name not in ("source_id", "uri"):
            table.add_row(f"source.{name}", _plain(value))
    times = ", ".join(f"{k['time_s']:.2f}" for k in record["keyframes"])
    table.add_row("keyframes", f"{len(record['keyframes'])} at {times} s")
    for pair in record["pairs"]:
        verdict = pair["reason"] or pair["state"]
        table.add_row(f"pair, {pair['instruction']}", f"{pair['original']} ({verdict})")
        table.add_row("", pair["rephrased"] or "")
    unmeasured = [n for n, v in record.items() if v is None]
    table.add_row("[dim]null", f"[dim]{', '.join(unmeasured)}")
    command.out.print(table)


def _show_near(rows: pa.Table, *, as_json: bool) -> None:
    if as_json:
        command.print_json(rows.to_pylist())
        return
    table = Table(box=None, pad_edge=False)
    for name in rows.column_names:
        table.add_column(name, overflow="fold", no_wrap=name in ("clip_id", "reason"))
    for row in rows.to_pylist():
        table.add_row(*(_plain(v) for v in row.values()))
    command.out.print(table)


def _plain(value: Any) -> str:
    if isinstance(value, list) and len(value) > 4:
        return f"{len(value)} numbers, from {', '.join(_plain(v) for v in value[:3])} …"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
