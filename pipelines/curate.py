"""Raw video in, a Lance dataset out.

    python pipelines/curate.py [RECIPE] --src FOLDER_GLOB_OR_MANIFEST --dst DATASET

With no arguments it curates the sample corpus into ./out/demo. Run the same command again to go on
after an interruption, to pick up new and changed files, or to apply other thresholds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Ray reads these when it is imported; it must not start anew in a thread that Ctrl-C leaves behind.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"

import tyro

from engine import command
from engine.curation import Curation, Cutting, Options, Result
from engine.gauge import Unloadable
from engine.provenance import provenance
from engine.session import connected
from engine.sources import Listing, list_sources
from engine.tables import LeaseLost, create
from pipelines import cli
from pipelines.flags import ModelFlags
from pipelines.recipes import Recipe

DEMO_DST = "out/demo"
POSITIVE = (
    "clip_seconds max_shot_s time_limit_s memory_limit_gib commit_every_s lease_expiry_s".split()
)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Curates videos and images into a Lance dataset."""

    recipe: tyro.conf.Positional[str] = "classic"
    """Which operators and rules: see pipelines/recipes.py."""
    src: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH")] = ()
    """Folders, globs, files or manifests (txt, csv, jsonl, parquet, lance), local or s3://…"""
    dst: str | None = None
    """The dataset: made where it is missing, continued where it is there."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN.BOUND=VALUE")] = ()
    """Other thresholds, such as brightness.lo=0.3."""
    shots: Literal["adaptive", "content", "threshold", "none"] | None = None
    """Shot detector, adaptive unless the recipe says otherwise; none cuts fixed spans."""
    clip_seconds: float | None = None
    """Length of the fixed spans of --shots none, 60 unless the recipe says otherwise."""
    max_shot_s: float | None = None
    """Longer shots are split evenly, 20 unless the recipe says otherwise."""
    instruction: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME")] = None
    """Which pairs a recipe with models makes: dense (its default), multi_scene, multilingual."""
    language: str | None = None
    """Of the captions that --instruction multilingual rephrases, e.g. French."""
    caption_frames: Literal["keyframes", "decode"] = "keyframes"
    """What the captioner sees: the stored keyframes, or frames of survivors decoded anew."""
    cut: Literal["none", "copy", "encode"] = "none"
    """Cut what is kept: without re-encoding between key frames, or exact to the frame."""
    cut_to: Literal["files", "blob"] = "files"
    """Where cuts go: files below the dataset, or the blob column of its table `cuts`."""
    measure: Literal["survivors", "all"] = "survivors"
    """Whether rejected clips are measured too."""
    retry_failed: bool = False
    """Try failures again that were final."""
    verify: bool = False
    """Hash every file, whatever its size and time stamp say."""
    time_limit_s: float = 600.0
    """Of reading one source, or one part of a long one."""
    memory_limit_gib: float = 4.0
    """Of reading one source, or one part of a long one."""
    workers: int | None = None
    """Processes that read; by default one a core of the cluster."""
    commit_every_s: float = 10.0
    """What a death may cost."""
    lease_expiry_s: float = 60.0
    """Silence after which another machine may take this dataset over."""
    json: bool = False
    """One JSON object on standard output, and nothing else."""
    models: Literal["mimir", "small", "tiny"] | None = None
    """Whose models, in place of the recipe's own: `long --models small`."""
    model: tyro.conf.OmitArgPrefixes[ModelFlags] = field(default_factory=ModelFlags)
    """Models in place of the recipe's own."""


def main() -> int:
    """Curates as the command line says; gives the exit code."""
    args = command.arguments(Args, __doc__ or "")
    command.set_up_logging()
    recipe = resolve(args)
    with command.in_one_line(stopped=cli.NOT_BEGUN):
        recipe.check()
        dst, listing = sources_of(args)
    failing = f"{dst} cannot be written"
    with command.in_one_line(LeaseLost, Unloadable, failing=failing, stopped=cli.NOT_BEGUN):
        create(dst, recipe.name)
        told = f"{len(listing.sources)} sources to {dst}"
        command.err.print(told, highlight=False, soft_wrap=True)
        with cli.Watcher() as watch:
            result = Curation(
                dst,
                recipe=recipe.name,
                scan=recipe.scan,
                stages=recipe.stages,
                pairs=tuple(recipe.pairs[name] for name in recipe.makes),
                cuts=None if args.cut == "none" else Cutting(mode=args.cut, where=args.cut_to),
                options=options(args),
                connect=lambda: connected(args.workers),
                watch=watch,
                about=provenance(json.dumps(recipe.describe()), args.src),
            ).run(listing)
    show(result, recipe, as_json=args.json)
    return exit_code(result)


def resolve(args: Args) -> Recipe:
    """The recipe with what the command line changes of it."""
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and not value > 0:
            command.fail(f"--{name.replace('_', '-')} {value:g}: must be more than 0")
    if args.workers is not None and args.workers < 1:
        command.fail(f"--workers {args.workers}: must be 1 or more")
    scan = {n: getattr(args, n) for n in ("shots", "clip_seconds", "max_shot_s")}
    recipe = cli.recipe_with(args.recipe, args.model, models_like=args.models)
    recipe = recipe.with_scan(**{n: value for n, value in scan.items() if value is not None})
    recipe = recipe.with_caption_frames(args.caption_frames)
    recipe = cli.with_pairs(recipe, args.instruction, args.language)
    return dataclasses.replace(recipe, stages=cli.with_bounds(recipe.stages, args.set))


def sources_of(args: Args) -> tuple[str, Listing]:
    """Where to, and what from; the sample corpus where nothing is named."""
    if args.src and args.dst is None:
        command.fail(
            "--dst is missing: name the dataset to make or to continue, e.g. --dst out/mine"
        )
    dst = command.destination(args.dst or DEMO_DST)
    if args.src:
        return dst, list_sources(args.src)
    from pipelines.samples import make_samples

    folder = Path(command.destination(DEMO_DST)).with_name("samples")
    command.err.print(f"making the sample corpus in {folder}", highlight=False)
    make_samples(folder)
    return dst, list_sources(str(folder))


def options(args: Args) -> Options:
    """How the run goes about it."""
    return Options(
        measure_all=args.measure == "all",
        retry_failed=args.retry_failed,
        verify=args.verify,
        time_limit_s=args.time_limit_s,
        memory_limit_gib=args.memory_limit_gib,
        commit_every_s=args.commit_every_s,
        lease_expiry_s=args.lease_expiry_s,
        workers=args.workers,
    )


def show(result: Result, recipe: Recipe, *, as_json: bool) -> None:
    """The funnel and the dataset's path, for a person or for a program."""
    accounts = result.accounts
    if as_json:
        command.print_json(
            {"dataset": result.root, "run_id": result.run_id}
            | accounts.as_dict()
            | {"frames_decoded": result.frames_decoded, "seconds": round(result.seconds, 3)}
            | {"measured": {n: dataclasses.asdict(t) for n, t in result.measured.items()}}
        )
    else:
        rate = result.frames_decoded / max(result.seconds, 1e-9)
        command.out.print(cli.funnel(accounts, recipe.stages, cli.mean_kept_s(result.root)))
        cli.show_pairs(result.root)
        cli.show_failures(result.root)
        command.out.print(
            f"{result.seconds:.1f} s, {result.frames_decoded:,} frames, {rate:.0f} frames/s",
            highlight=False,
        )
        command.out.print(f"dataset: {result.root}", highlight=False, soft_wrap=True)
    for fault in accounts.faults:
        command.err.print(f"does not balance: {fault}", highlight=False, soft_wrap=True)
    if result.interrupted:
        command.err.print(
            "stopped: what was done is committed. To go on, run the same command again."
        )


def exit_code(result: Result) -> int:
    """0 only when the accounts balance."""
    if result.interrupted:
        return command.INTERRUPTED
    return command.UNBALANCED if result.accounts.faults else 0


if __name__ == "__main__":
    try:
        command.end(main())
    except SystemExit as stop:  # --help, or an error that was said
        command.end(stop.code if isinstance(stop.code, int) else 0)
