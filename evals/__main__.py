"""Generates videos with models, scores them with VBench, measures drift, prints the papers' tables.

    python -m evals run     RECIPE --models a=FOLDER b=FOLDER --dst DATASET
    python -m evals nightly RECIPE --exports FOLDER --dst DATASET --out REPORT
    python -m evals table   DATASET [PRESET ...]      of what is scored
    python -m evals compare DATASET A B               which differences are beyond their noise
    python -m evals drift   DATASET                   how scores change within videos
    python -m evals runs    DATASET                   what was evaluated, and when
    python -m evals videos  DATASET MODEL FOLDER      files as VBench names them
    python -m evals votes   VOTES                     tables of a blind comparison by people
    python -m evals weights RECIPE                    what is missing, and how to fetch it

A model is an export of `trainers`, a diffusers pipeline, an http:// endpoint, or a folder of
finished videos. Run the same command again to go on after an interruption. `nightly` ends with
exit code 3 where a score fell beyond its noise.
"""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

# Ray reads these when it is imported; it must not start anew in a thread that Ctrl-C leaves behind.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"

import tyro

from engine import command
from engine.gauge import Unloadable
from engine.session import connected
from engine.tables import InUse, LeaseLost
from evals import showing
from evals.recipes import NAMES, TINY
from evals.votes import Votes, votes

if TYPE_CHECKING:
    from evals.report import Report

_NAMES = "\n".join(
    [
        *(f"{name}: {about}" for name, about in NAMES.items()),
        f"{TINY}NAME: any of these with small random weights; runs anywhere, and means nothing",
    ]
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Generates what is missing, scores it, and prints the recipe's tables."""

    recipe: tyro.conf.Positional[str]
    """See `evals/recipes.py`."""
    models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=WHERE")]
    """What is evaluated: folders or endpoints."""
    dst: str = "out/evals"
    """Dataset for videos and scores; a new one, or any that is there."""
    out: str | None = None
    """Folder for the tables as Markdown, LaTeX, CSV and pictures."""
    prompts: str | None = None
    """VBench's folder `prompts` (rise), or a file of your own (custom)."""
    enhanced: str | None = None
    """VBench's folder `prompts`: models are given the long forms that are there."""
    dimensions: tuple[str, ...] = ()
    """In place of the recipe's."""
    drift: tuple[str, ...] = ()
    """Of these dimensions, in place of the recipe's; parts of videos are scored as needed."""
    skip_unavailable: bool = False
    """Leave out dimensions that cannot be measured here, and say which."""
    num_prompts: int | None = None
    """So many of the suite's prompts, spread evenly."""
    samples: int | None = None
    """Videos of a prompt."""
    static_filter: bool = False
    """Flickering on 25 videos a prompt, of which VBench's static filter leaves up to five."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME.SETTING=VALUE")] = ()
    """How a model generates, such as a.steps=20 or b.guidance_scale=5."""
    seed: int = 0
    """Of the noise: sample N of a prompt has seed + N."""
    weights: str | None = None
    """Folder with VBench's weights; by default $VBENCH_CACHE_DIR or ~/.cache/vbench."""
    implementation: Literal["default", "vbench"] = "default"
    """The package for every dimension; by default ours for those that it measures, too."""
    vbench_python: str | None = None
    """Python of VBench's own environment; by default that of `make vbench-env`."""
    workers: int | None = None
    """Actors; by default one a GPU, or a core where there are none."""
    retry_failed: bool = False
    """Try failures again that were final."""
    commit_every_s: float = 10.0
    """What a death may cost."""
    lease_expiry_s: float = 60.0
    """Silence after which another machine may take this dataset over."""
    json: bool = False
    """One JSON object on standard output, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Nightly(Run):
    """Evaluates the newest exports once a night, and compares them with those of earlier nights."""

    models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=WHERE")] = ()
    """What is evaluated: folders or endpoints."""
    exports: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=]FOLDER")] = ()
    """The newest finished export below NAME=FOLDER, or below each folder in FOLDER that has one."""
    out: str | None = None
    """Folder or URI for report.md, report.json and report.html."""
    date: str | None = None
    """Of the night, as YYYY-MM-DD; by default today's in UTC. A finished one is not done again."""
    nights: int = 7
    """Exports that tonight's is compared with, at most."""
    since: str | None = None
    """Date of the first night that is compared with: accepts what regressed before."""
    tolerance: float = 0.0
    """A fall of no more than this is no regression, of scores from 0 to 1."""
    webhook: str | None = None
    """Address that regressions are posted to; better in the environment, as EVALS_WEBHOOK."""
    webhook_always: bool = False
    """Post nights without a regression, too."""


@dataclass(frozen=True, kw_only=True)
class Show:
    """Prints tables of what is scored."""

    dataset: tyro.conf.Positional[str]
    """That `run --dst` named."""
    preset: tyro.conf.Positional[tuple[str, ...]] = ()
    """See `evals/presets.py`; by default the recipe's own."""
    recipe: str | None = None
    """Of this evaluation; by default the newest."""
    models: tuple[str, ...] = ()
    """These alone, in this order."""
    published: bool = False
    """With the numbers that the paper prints, marked as such."""
    format: Literal["terminal", "markdown", "latex", "csv", "json"] = "terminal"
    """Of what is printed."""
    out: str | None = None
    """Folder for all formats, and pictures."""


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Tells which differences of two models are beyond their noise (paired bootstrap)."""

    dataset: tyro.conf.Positional[str]
    """That `run --dst` named."""
    a: tyro.conf.Positional[str]
    """A model, or NAME@RUN: as an earlier run has it."""
    b: tyro.conf.Positional[str]
    """Another one, whose score is taken from that of the first."""
    recipe: str | None = None
    """Of this evaluation; by default the newest."""
    seed: int = 0
    """Of the resampling."""
    json: bool = False
    """One JSON object on standard output, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Shows how scores change from a video's start to its end."""

    dataset: tyro.conf.Positional[str]
    """That `run --dst` named."""
    dimensions: tuple[str, ...] = ()
    """By default those that have scores of frames, or of heads and tails."""
    recipe: str | None = None
    """Of this evaluation; by default the newest."""
    models: tuple[str, ...] = ()
    """These alone, in this order."""
    out: str | None = None
    """Folder for a picture of each dimension."""
    json: bool = False
    """One JSON object on standard output, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Lists evaluations, the newest first."""

    dataset: tyro.conf.Positional[str]
    """That `run --dst` named."""
    recipe: str | None = None
    """Of this evaluation alone."""


@dataclass(frozen=True, kw_only=True)
class Videos:
    """Writes a model's videos as files that VBench itself scores."""

    dataset: tyro.conf.Positional[str]
    """That `run --dst` named."""
    model: tyro.conf.Positional[str]
    """Its name."""
    folder: tyro.conf.Positional[str]
    """A new one."""
    recipe: str | None = None
    """Of this evaluation; by default the newest."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Tells which of a recipe's weights are missing, and the commands that fetch them."""

    recipe: tyro.conf.Positional[str]
    """See `evals/recipes.py`."""
    weights: str | None = None
    """Folder with VBench's weights; by default $VBENCH_CACHE_DIR or ~/.cache/vbench."""
    vbench_python: str | None = None
    """Python of VBench's own environment; by default that of `make vbench-env`."""


Command = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Nightly, tyro.conf.subcommand("nightly")]
    | Annotated[Show, tyro.conf.subcommand("table")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Drift, tyro.conf.subcommand("drift")]
    | Annotated[Runs, tyro.conf.subcommand("runs")]
    | Annotated[Videos, tyro.conf.subcommand("videos")]
    | Annotated[Votes, tyro.conf.subcommand("votes")]
    | Annotated[Weights, tyro.conf.subcommand("weights")]
)


def main() -> int:
    """Does what the command line says; gives the exit code."""
    args = command.arguments(Command, f"{__doc__}\nRecipes:\n\n{_NAMES}")  # type: ignore[arg-type]
    command.set_up_logging()
    does = {
        Run: run, Nightly: nightly, Show: show, Compare: compare, Drift: drift, Runs: runs,
        Videos: videos, Weights: weights, Votes: votes,
    }  # fmt: skip
    with command.in_one_line(LeaseLost, Unloadable):
        return does[type(args)](args) or 0


def run(args: Run) -> None:
    """`python -m evals run`."""
    from evals.evaluation import Results
    from evals.running import run as evaluate

    request = request_of(args)
    suite = request.suite
    command.err.print(
        f"{args.recipe}: {len(suite.prompts):,} prompts, {suite.num_videos:,} videos a model,"
        f" {len(request.models)} models, {len(request.recipe.dimensions)} dimensions",
        highlight=False,
    )
    with _Bars() as bars:
        done = evaluate(request, connect=lambda: connected(args.workers), watch=bars.watch)
    results = Results.read(
        request.root, recipe=request.recipe.name, models=[m.name for m in request.models]
    )
    presets = showing.presets_of(results, request.recipe.tables)
    tables = showing.tables(results, presets)
    out = Path(command.destination(args.out)) if args.out else None
    written = showing.write(results, tables, out) if out else []
    if args.json:
        command.print_json(showing.as_json(done, tables, written))
        return
    for table in tables:
        command.out.print(table.rich())
    showing.tell(command.out, done, written)


def nightly(args: Nightly) -> int:
    """`python -m evals nightly`."""
    from evals import webhook
    from evals.nightly import today

    url, date = webhook.address(args.webhook), args.date or today()
    try:
        report = _night(args, date)
    except (ValueError, ConnectionError, Unloadable, OSError, KeyboardInterrupt) as error:
        if url and not isinstance(error, InUse):  # then another scheduler does it
            webhook.post(url, webhook.failed(date, args.recipe, error))
        raise
    if url and (report.has_regressed or args.webhook_always):
        webhook.post_once(url, report, command.destination(args.dst))
    return report.exit_code


def _night(args: Nightly, date: str) -> Report:
    """Does what is left of a night and prints its report."""
    from evals import exports, night_page, pictures
    from evals import nightly as nights
    from evals.trend import trend

    asked = ("recipe", "set", "prompts", "enhanced", "dimensions", "drift", "skip_unavailable",
             "num_prompts", "samples", "static_filter", "seed", "implementation")  # fmt: skip

    def say(line: str) -> None:
        command.err.print(line, highlight=False, markup=False, soft_wrap=True)

    folders, optional = exports.models_in(args.exports, say)
    tonight = nights.Tonight(
        root=command.destination(args.dst),
        date=date,
        recipe=args.recipe,
        asked=nights.fingerprint({name: getattr(args, name) for name in asked}),
        models=nights.models_of(args.models),
        exports=folders,
        optional=optional,
        nights=args.nights,
        tolerance=args.tolerance,
        since=args.since,
    )
    if args.out:
        pictures.check()
    with _Bars() as bars:
        report = nights.night(
            tonight,
            lambda specs: request_of(dataclasses.replace(args, models=tuple(specs))),
            connect=lambda: connected(args.workers),
            watch=bars.watch,
            say=say,
            again=args.retry_failed,
        )
    points = [p for p in trend(tonight.root, tonight.recipe) if p.date <= tonight.date]
    written = night_page.write(report, points, command.destination(args.out)) if args.out else []
    if args.json:
        command.print_json(night_page.to_json(report, points) | {"files": written})
        return report
    for table in night_page.tables(report):
        command.out.print(table)
    for line in report.sentences():
        command.out.print(line, highlight=False, markup=False, soft_wrap=True)
    for path in written:
        command.out.print(path, highlight=False, soft_wrap=True, style="dim")
    return report


def request_of(args: Run) -> Any:
    """What a command line asks for, checked before any work starts."""
    from evals import asking

    return asking.request_of(
        recipe=args.recipe,
        models=args.models,
        settings=args.set,
        root=command.destination(args.dst),
        prompts=args.prompts,
        enhanced=args.enhanced,
        dimensions=args.dimensions,
        drift=args.drift,
        skip_unavailable=args.skip_unavailable,
        num_prompts=args.num_prompts,
        samples=args.samples,
        static_filter=args.static_filter,
        seed=args.seed,
        weights=args.weights,
        implementation=args.implementation,
        vbench_python=args.vbench_python,
        workers=args.workers,
        retry_failed=args.retry_failed,
        commit_every_s=args.commit_every_s,
        lease_expiry_s=args.lease_expiry_s,
        say=lambda line: command.err.print(line, highlight=False, markup=False),
    )


def show(args: Show) -> None:
    """`python -m evals table`."""
    from evals.evaluation import Results

    results = Results.read(
        command.destination(args.dataset), recipe=args.recipe, models=args.models
    )
    presets = showing.presets_of(results, args.preset)
    tables = showing.tables(results, presets, with_published=args.published)
    for table in tables:
        if args.format == "terminal":
            command.out.print(table.rich())
        else:
            made = {"markdown": table.markdown, "latex": table.latex, "csv": table.csv,
                    "json": table.to_json}[args.format]()  # fmt: skip
            command.out.print(made, highlight=False, markup=False, soft_wrap=True)
    if args.out:
        for path in showing.write(results, tables, Path(command.destination(args.out))):
            command.err.print(str(path), highlight=False, soft_wrap=True)


def compare(args: Compare) -> None:
    """`python -m evals compare`."""
    from evals.evaluation import Results

    results = Results.read(
        command.destination(args.dataset), recipe=args.recipe, models=[args.a, args.b]
    )
    found = showing.compared(results, args.a, args.b, seed=args.seed)
    if args.json:
        command.print_json({name: one.to_dict() for name, one in found.items()})
        return
    command.out.print(showing.differences(found, args.a, args.b))


def drift(args: Drift) -> None:
    """`python -m evals drift`."""
    from evals.evaluation import Results

    results = Results.read(
        command.destination(args.dataset), recipe=args.recipe, models=args.models
    )
    found = showing.drifts(results, args.dimensions)
    if args.json:
        command.print_json({n: {m: s.to_dict() for m, s in of.items()} for n, of in found.items()})
        return
    command.out.print(showing.drift_table(found))
    if args.out:
        folder = Path(command.destination(args.out))
        for path in showing.draw_drifts(results, found, folder):
            command.err.print(str(path), highlight=False, soft_wrap=True)


def runs(args: Runs) -> None:
    """`python -m evals runs`."""
    from evals.evaluation import runs_of

    command.out.print(showing.runs_table(runs_of(command.destination(args.dataset), args.recipe)))


def videos(args: Videos) -> None:
    """`python -m evals videos`."""
    from evals.evaluation import Results, videos_of
    from evals.videofiles import export_videos

    root = command.destination(args.dataset)
    plan = Results.read(root, recipe=args.recipe, models=[args.model]).models[args.model]
    folder = Path(command.destination(args.folder))
    stored = videos_of(root, plan.model(args.model.partition("@")[0]), plan.seed)
    told = export_videos(root, stored, plan.suite, folder)
    command.out.print(f"{told.num_written:,} videos: {folder}", highlight=False, soft_wrap=True)
    if told.missing:
        first = ", ".join(told.missing[:3])
        command.err.print(f"{len(told.missing):,} are missing: {first} …", highlight=False)
    for note in told.notes:
        command.err.print(f"note: {note}", highlight=False, markup=False)


def weights(args: Weights) -> None:
    """`python -m evals weights`."""
    from evals import cache, environments
    from evals.recipes import recipe

    found = recipe(args.recipe)
    folder = cache.folder(args.weights)
    lacking = cache.missing(found.dimensions, folder)
    if lacking:
        command.out.print(f"mkdir -p {folder} && cd {folder}", highlight=False, soft_wrap=True)
    for weight in lacking:
        command.out.print(f"{weight.path}: {weight.about}", highlight=False, style="bold")
        command.out.print(f"  {weight.fetch}", highlight=False, soft_wrap=True, markup=False)
    python = environments.python_of(args.vbench_python)
    for name, reason in environments.available(found.dimensions, python).items():
        command.out.print(f"{name}: {reason}", highlight=False, soft_wrap=True, markup=False)
    if not lacking:
        command.out.print(f"all weights are in {folder}", highlight=False, soft_wrap=True)


class _Bars(command.Bars):
    """Progress of an evaluation."""

    def watch(self, now: Any) -> None:
        """Shows a `generating.Progress` or a `scoring.Progress`."""
        rate = now.done / max(time.monotonic() - now.started, 1e-9)
        facts = f"{now.failed} failed, {rate:.2f}/s"
        self.show(type(now).__module__, now.done, now.total, facts, doing=now.doing, rate=rate)


if __name__ == "__main__":
    try:
        command.end(main())
    except SystemExit as stop:  # --help, or an error that was said
        command.end(stop.code if isinstance(stop.code, int) else 0)
