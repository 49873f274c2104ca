"""RISE-T2V's training pairs: an instruction, a caption, the caption rephrased, and what it is of.

    python pipelines/recaption.py --src DATASET --instruction dense
    python pipelines/recaption.py --src FOLDER_GLOB_OR_MANIFEST --dst DATASET

Of a dataset that curate.py made, each kept clip gets its pairs, in place. Images or videos are
first read into a dataset of their own, of which everything is kept (recipe `rise`). Run the same
command again to go on, or to try again what failed for a reason that may pass.
"""

from __future__ import annotations

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

from engine import command, storage
from engine.curation import Curation, Options, Result
from engine.gauge import Unloadable
from engine.provenance import provenance
from engine.session import connected
from engine.sources import Listing, list_sources
from engine.tables import LeaseLost, create, identity
from pipelines import cli
from pipelines.curate import exit_code
from pipelines.flags import ModelFlags
from pipelines.recipes import WITH_MODELS, Recipe


@dataclass(frozen=True, kw_only=True)
class Args:
    """Makes RISE-T2V's training pairs."""

    src: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH")]
    """A dataset; or images and videos, as curate.py takes them."""
    dst: str | None = None
    """For images and videos: the dataset to make or to continue."""
    instruction: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")] = ("dense",)
    """dense (for training), multi_scene, multilingual: see engine/instructions."""
    language: str | None = None
    """Of the captions that --instruction multilingual rephrases, e.g. French."""
    models: Literal["mimir", "small", "tiny"] | None = None
    """Whose models: by default those of the dataset's recipe, else mimir's."""
    retry_failed: bool = False
    """Try failures again that were final."""
    workers: int | None = None
    """Processes that read; by default one a core of the cluster."""
    commit_every_s: float = 10.0
    """What a death may cost."""
    lease_expiry_s: float = 60.0
    """Silence after which another machine may take this dataset over."""
    json: bool = False
    """One JSON object on standard output, and nothing else."""
    model: tyro.conf.OmitArgPrefixes[ModelFlags] = field(default_factory=ModelFlags)
    """Models in place of the recipe's own."""


def main() -> int:
    """Makes pairs as the command line says; gives the exit code."""
    args = command.arguments(Args, __doc__ or "")
    command.set_up_logging()
    with command.in_one_line(stopped=cli.NOT_BEGUN):
        dst, listing, name = _target(args)
        recipe = cli.with_pairs(
            cli.recipe_with(name, args.model, models_like=args.models),
            args.instruction,
            args.language,
        )
        recipe.check()
    failing = f"{dst} cannot be written"
    with command.in_one_line(LeaseLost, Unloadable, failing=failing, stopped=cli.NOT_BEGUN):
        if listing is not None:
            create(dst, recipe.name)
        with cli.Watcher() as watch:
            curation = Curation(
                dst,
                recipe=recipe.name,
                scan=recipe.scan,
                stages=recipe.stages,
                pairs=tuple(recipe.pairs[name] for name in recipe.makes),
                options=Options(
                    retry_failed=args.retry_failed,
                    commit_every_s=args.commit_every_s,
                    lease_expiry_s=args.lease_expiry_s,
                    workers=args.workers,
                ),
                connect=lambda: connected(args.workers),
                watch=watch,
                about=provenance(json.dumps(recipe.describe()), args.src),
            )
            result = curation.run(listing)
    show(result, recipe, as_json=args.json)
    return exit_code(result)


def _target(args: Args) -> tuple[str, Listing | None, str]:
    """The dataset, what is to be read into it (None: nothing), and the recipe."""
    if len(args.src) == 1 and storage.kind(storage.join(args.src[0], "dataset.json")) == "file":
        root = command.destination(args.src[0])
        if args.dst is not None and command.destination(args.dst) != root:
            command.fail("--dst: the pairs of a dataset go into it; leave --dst out")
        name = identity(root)["recipe"]
        return root, None, name if name in WITH_MODELS else "classic+rise"
    if args.dst is None:
        command.fail(
            "--dst is missing: name the dataset to make or to continue, e.g. --dst out/pairs"
        )
    return command.destination(args.dst), list_sources(args.src), "rise"


def show(result: Result, recipe: Recipe, *, as_json: bool) -> None:
    """The counts of the pairs, by instruction."""
    counts = cli.pair_counts(result.root)
    if as_json:
        about = {"dataset": result.root, "run_id": result.run_id}
        made = {"pairs": {name: counts.get(name, {}) for name in recipe.makes}}
        command.print_json(about | made | {"seconds": round(result.seconds, 3)})
        return
    cli.show_pairs(result.root)
    command.out.print(f"{result.seconds:.1f} s", highlight=False)
    command.out.print(f"dataset: {result.root}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        command.end(main())
    except SystemExit as stop:  # --help, or an error that was said
        command.end(stop.code if isinstance(stop.code, int) else 0)
