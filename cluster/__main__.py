"""Checks a cluster, submits jobs to it, and shows what they left.

python -m cluster check     [--dataset DATASET] …    what would go wrong, before a long job
python -m cluster submit    SCRIPT [ARGUMENTS …]     `ray job submit`, watched and tried again
python -m cluster dashboard DATASET …                pages over the Lance tables
python -m cluster vote      DATASET --votes PATH …   the blind comparison alone, for its voters
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

# Ray reads these when it is imported; it must not start anew in a thread that Ctrl-C leaves behind.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"

import tyro

from cluster.check import Check, check
from cluster.dashboard.serve import Dashboard, Vote, serve, serve_vote
from cluster.submit import Submit, submit, with_separator
from engine import command

Command = (
    Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Submit, tyro.conf.subcommand("submit")]
    | Annotated[Dashboard, tyro.conf.subcommand("dashboard")]
    | Annotated[Vote, tyro.conf.subcommand("vote")]
)


def main() -> int:
    """Does what the command line says; gives the exit code."""
    sys.argv = with_separator(sys.argv)
    args = command.arguments(Command, __doc__ or "")  # type: ignore[arg-type]
    command.set_up_logging()
    does = {Check: check, Submit: submit, Dashboard: serve, Vote: serve_vote}
    with command.in_one_line(stopped="stopped"):
        return does[type(args)](args)


if __name__ == "__main__":
    command.end(main())
