"""Removes sources from a dataset for good, with all that was made of them, old versions included.

    python pipelines/forget.py SOURCE… --dst DATASET

SOURCE is a uri or path as the table `sources` has it, a source_id, or a glob in quotes. Sources
with the same content as one of these go with them. Gone are: their rows in every table (clips,
keyframes, pairs, features, cuts), their cut files in the dataset, parts of long sources that wait
there to be joined, and every older version of every table, for these hold them, too: no earlier
state of the dataset can be read any more.

Not covered: the files themselves (take them out of --src first, or the next run adds them again),
other datasets, exports, copies that a store keeps (S3 versioning, backups), and models trained on
them. Nobody else may be using the dataset. Killed anywhere, the same command finishes the work.
"""

from __future__ import annotations

import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from engine import command
from engine.accounts import Accounts, balance
from engine.forget import Chosen, Forgotten, begun, choose, forget
from engine.lease import Lease
from engine.tables import LeaseLost, Writer, identity, read


@dataclass(frozen=True, kw_only=True)
class Args:
    """Forgets sources."""

    sources: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="SOURCE…")]]
    """Paths, URIs, globs or source_ids."""
    dst: str
    """The dataset."""
    dry_run: bool = False
    """Only say which sources would go."""
    json: bool = False
    """One JSON object on standard output, and nothing else."""


def main() -> int:
    """Forgets what the command line names; gives the exit code."""
    args = command.arguments(Args, __doc__ or "")
    command.set_up_logging()
    root, run_id = command.destination(args.dst), str(uuid.uuid4())
    if not args.sources:
        command.fail("which sources? give paths, URIs, globs in quotes or source_ids")
    again = "run the same command again to finish"
    with command.in_one_line(LeaseLost, failing=f"{root} ({again})", stopped=f"stopped: {again}"):
        identity(root)
        if args.dry_run:
            show_chosen(chosen_of(read(root, "sources"), args, root), as_json=args.json)
            return 0
        with Lease(root, run_id):
            writer = Writer(root, run_id)
            chosen = chosen_of(writer.table("sources"), args, root)
            done = forget(writer, chosen, step=_say)
            accounts = balance(writer.table, None)
    show(root, done, accounts, as_json=args.json)
    return command.UNBALANCED if faults_of(done, accounts) else 0


def chosen_of(sources: object, args: Args, root: str) -> Chosen:
    """The sources that the command line names."""
    rows = sources.to_table(columns=["source_id", "uri", "sha256"])  # type: ignore[attr-defined]
    return choose(rows, args.sources, begun(root))


def faults_of(done: Forgotten, accounts: Accounts) -> list[str]:
    """What does not add up, but for the clips that were made pending here."""
    return [f for f in accounts.faults if not (done.pending and "pending" in f)]


def show_chosen(chosen: Chosen, *, as_json: bool) -> None:
    """What would go."""
    if as_json:
        command.print_json({"sources": chosen.uris, "same_content": chosen.same_content})
        return
    for uri in chosen.uris:
        why = "  (same content as one of these)" if uri in chosen.same_content else ""
        command.out.print(f"{uri}{why}", highlight=False, soft_wrap=True, markup=False)
    command.out.print(f"{len(chosen.uris)} source(s) would be forgotten", highlight=False)


def show(root: str, done: Forgotten, accounts: Accounts, *, as_json: bool) -> None:
    """What went and what is left, for a person or for a program."""
    chosen = done.chosen
    if as_json:
        command.print_json(
            {
                "dataset": root,
                "sources": chosen.uris,
                "same_content": chosen.same_content,
                "rows": done.rows,
                "cut_files": done.files,
                "bytes_removed": done.bytes_removed,
                "pending": done.pending,
                "still_there": done.still_there,
            }
            | {"left": accounts.as_dict()}
        )
    else:
        for uri in chosen.same_content:
            command.out.print(f"same content, gone with it: {uri}", highlight=False, soft_wrap=True)
        rows = ", ".join(f"{num:,} {name}" for name, num in done.rows.items())
        command.out.print(
            f"forgotten: {rows or 'nothing was left'}; {done.files:,} cut files;"
            f" {done.bytes_removed / 2**20:,.1f} MiB of old files",
            highlight=False,
        )
        command.out.print("not covered: other datasets, exports, backups, trained models")
    if chosen.resumed:
        command.err.print("an earlier forget that had been cut short is finished, too")
    if done.pending:
        command.err.print(
            f"{done.pending} near-duplicate(s) that they stood for are pending: run"
            " pipelines/refilter.py, or the next pipelines/curate.py, to judge them",
            highlight=False,
        )
    for uri in done.still_there:
        command.err.print(
            f"warning: {uri} is still there: a run that lists it adds it again",
            highlight=False, soft_wrap=True, markup=False,
        )  # fmt: skip
    for fault in faults_of(done, accounts):
        command.err.print(f"does not balance: {fault}", highlight=False, soft_wrap=True)


def _say(step: str) -> None:
    if command.err.is_terminal:
        command.err.print(f"{step} …", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
