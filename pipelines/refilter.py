"""Judges a finished dataset again with other thresholds: seconds, and nothing is decoded.

    python pipelines/refilter.py DATASET --set brightness.lo=0.3

Clips that the new thresholds admit, and whose signals were never measured, become pending; the same
--set given to pipelines/curate.py measures just these.
"""

from __future__ import annotations

import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from engine import command
from engine.accounts import balance
from engine.forget import check_whole
from engine.lease import Lease
from engine.tables import LeaseLost, Writer, identity
from pipelines import cli


@dataclass(frozen=True, kw_only=True)
class Args:
    """Judges a dataset again."""

    dataset: tyro.conf.Positional[str]
    """The dataset."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN.BOUND=VALUE")] = ()
    """Thresholds that differ from the recipe's, such as brightness.lo=0.3."""
    json: bool = False
    """One JSON object on standard output, and nothing else."""


def main() -> int:
    """Judges as the command line says; gives the exit code."""
    args = command.arguments(Args, __doc__ or "")
    command.set_up_logging()
    root, run_id, clock = command.destination(args.dataset), str(uuid.uuid4()), time.monotonic()
    with command.in_one_line(LeaseLost, failing=root):
        recipe = cli.recipe_named(identity(root)["recipe"])
        stages = cli.with_bounds(recipe.stages, args.set)
        with Lease(root, run_id):
            check_whole(root)
            writer = Writer(root, run_id)
            num_changed = writer.publish(stages)
            for pairs in recipe.pairs.values():
                writer.publish(pairs.stages, "pairs")
                break  # all instructions have the same rules
            accounts = balance(writer.table, None)
    seconds = time.monotonic() - clock
    if args.json:
        command.print_json(
            {"dataset": root, "changed": num_changed, "seconds": round(seconds, 3)}
            | accounts.as_dict()
        )
        return 0
    command.out.print(cli.funnel(accounts, stages, cli.mean_kept_s(root)))
    command.out.print(f"{num_changed:,} verdicts changed in {seconds:.1f} s", highlight=False)
    if accounts.clips["pending"]:
        flags = " ".join(f"--set {change}" for change in args.set)
        command.out.print(
            f"to measure the pending ones: python pipelines/curate.py {recipe.name} --src … "
            f"--dst {root} {flags}",
            highlight=False,
            soft_wrap=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
