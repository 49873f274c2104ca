"""Starts the dashboard: Streamlit in a process of its own, on localhost unless told otherwise."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cluster.dashboard.places import Places
from engine import command
from engine.tables import identity

APP = Path(__file__).with_name("app.py")
LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class _Server:
    host: str = "127.0.0.1"
    """Address to listen on: only this machine by default. There is no login."""
    port: int = 8501
    """Port to listen on."""
    theme: Literal["light", "dark"] | None = None
    """In place of what the browser prefers."""


@dataclass(frozen=True, kw_only=True)
class _Study(_Server):
    study: Literal["rise", "mimir"] = "rise"
    """What is voted on."""
    models: tuple[str, ...] = ()
    """Of the study; by default all that the evaluation has."""
    reference: str | None = None
    """Of mimir: pairs with this model only; by default every pair, as in the paper."""
    num_prompts: int | None = None
    """Of a new study: so many prompts, drawn at random (Mimir: 20); by default all."""
    samples: int | None = None
    """Of a new study: videos of a prompt and model (both papers: 1); by default all."""
    voters: str | None = None
    """File with the codes that may vote, one a line, read at every step; by default any code."""


@dataclass(frozen=True, kw_only=True)
class Dashboard(_Study):
    """Shows the tables of a dataset in the browser; nothing is written but votes."""

    dataset: tyro.conf.Positional[str]
    """That `pipelines/curate.py --dst` or `python -m evals run --dst` named."""
    evaluations: str | None = None
    """Dataset with the evaluations, where it is another one."""
    training: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FOLDER")] = ()
    """Folders of training runs."""
    votes: str | None = None
    """Shows the vote page as well, which writes there."""
    cache: str = "~/.cache/reelwright/playable"
    """Folder for clips that were made playable."""
    cache_gb: float = 2.0
    """What that folder may hold."""


@dataclass(frozen=True, kw_only=True)
class Vote(_Study):
    """Shows the blind comparison alone: what its voters get."""

    dataset: tyro.conf.Positional[str]
    """With the evaluation whose videos are compared."""
    votes: str
    """Where votes are stored."""


def serve(args: Dashboard) -> int:
    """`python -m cluster dashboard`."""
    places = dataclasses.replace(
        _places(args),
        training=tuple(command.destination(folder) for folder in args.training),
        cache=command.destination(args.cache),
        cache_bytes=int(args.cache_gb * 1e9),
    )
    if args.evaluations:
        places = dataclasses.replace(places, evaluations=command.destination(args.evaluations))
    return _run(args, places)


def serve_vote(args: Vote) -> int:
    """`python -m cluster vote`."""
    return _run(args, dataclasses.replace(_places(args), only_vote=True))


def _places(args: Dashboard | Vote) -> Places:
    """What both have in common."""
    root = command.destination(args.dataset)
    return Places(
        dataset=root,
        evaluations=root,
        votes=command.destination(args.votes) if args.votes else None,
        study=args.study,
        models=args.models,
        reference=args.reference,
        num_prompts=args.num_prompts,
        samples=args.samples,
        voters=command.destination(args.voters) if args.voters else None,
    )


def _run(args: _Server, places: Places) -> int:
    """Checks, then runs Streamlit until it is stopped."""
    if not find_spec("streamlit") or not find_spec("duckdb"):
        raise ValueError(
            "the dashboard needs streamlit and duckdb: make setup, or"
            " pip install -c constraints.txt '.[dashboard]'"
        )
    for root in dict.fromkeys((places.dataset, places.evaluations)):
        identity(root)  # or one line that says what is wrong
    if places.only_vote:
        _check_study(places)
    host = f"[{args.host}]" if ":" in args.host else args.host
    command.err.print(f"http://{host}:{args.port}  {places.dataset}", highlight=False)
    if args.host not in LOCAL:
        command.err.print(
            f"note: whoever reaches {args.host} sees all of it: there is no login", highlight=False
        )
    process = subprocess.Popen(command_line(args, places), stdout=subprocess.DEVNULL)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        process.wait()
        return 0


def _check_study(places: Places) -> None:
    """Makes the study, or opens it: what is wrong is told here, for voters are not told."""
    from cluster.dashboard.page_vote import open_study
    from evals.votes import voters_of

    if places.voters:
        voters_of(places.voters)
    command.err.print(f"{len(open_study(places).items):,} items to vote on", highlight=False)


def command_line(args: _Server, places: Places) -> list[str]:
    """What is run."""
    from cluster.dashboard.look import THEME

    settings = {
        "server.address": args.host,
        "server.port": args.port,
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "minimal",
        "client.showErrorDetails": "none",
        "logger.level": "warning",
    }
    settings |= THEME
    if args.theme:
        settings["theme.base"] = args.theme
    flags = [f"--{name}={value}" for name, value in settings.items()]
    if args.host in LOCAL:  # or a page from elsewhere could give this address a name of its own
        flags += [f"--server.allowedHosts={host}" for host in LOCAL]
    return [sys.executable, "-m", "streamlit", "run", str(APP), *flags, "--", places.to_json()]
