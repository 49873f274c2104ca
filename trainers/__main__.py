"""Trains text-to-video systems on curated datasets, and makes videos with them.

    python -m trainers cache    RECIPE --data DATASET                frozen encoders' outputs, once
    python -m trainers train    RECIPE --data DATASET --out RUN      all its stages, or goes on
    python -m trainers export   RUN FOLDER                           what others load
    python -m trainers generate FOLDER "a prompt" --out VIDEOS
    python -m trainers analyse  FOLDER --out PICTURES                figure 7 of Mimir

Run the same command again to go on after an interruption.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

# Ray reads these when it is imported; it must not start anew in a thread that Ctrl-C leaves behind.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"

import tyro

from engine import command
from engine.lease import Lease
from engine.session import connected
from engine.tables import LeaseLost
from trainers.job import Job, Options, Stopped
from trainers.recipes import (
    NAMES,
    TINY,
    Models,
    Recipe,
    make_tiny,
    recipe,
    with_settings,
    with_stages,
)

RUN = "run.json"
_NAMES = "\n".join(
    [
        *(f"{name}: {about}" for name, about in NAMES.items()),
        f"{TINY}NAME: any of these on small random models; runs anywhere, and means nothing",
    ]
)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Which recipe, and what differs from it."""

    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STAGE.SETTING=VALUE")] = ()
    """Other settings, such as image.steps=1000 or motion.batch=8."""
    stages: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STAGE")] = ()
    """Some stages alone, such as image motion; by default all."""
    models: tyro.conf.OmitArgPrefixes[Models] = field(default_factory=Models)


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Stores what frozen encoders give, so that training need not compute it again."""

    recipe: tyro.conf.Positional[str]
    """See `trainers/recipes.py`."""
    data: str
    """The dataset."""
    what: tuple[str, ...] = ("latents", "tokens", "semantics", "answers")
    """Of what the recipe's encoders give; states and texts are large: 1 MB for each text of 120
    tokens and a 7B model."""
    retry_failed: bool = False
    """Try failures again that were final."""
    workers: int | None = None
    """Actors; by default one a GPU, or a core where there are none."""
    commit_every_s: float = 10.0
    """What a death may cost."""
    lease_expiry_s: float = 60.0
    """Silence after which another machine may take this dataset over."""
    chosen: tyro.conf.OmitArgPrefixes[Chosen] = field(default_factory=Chosen)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Trains a recipe's stages, one after the other, from where each stands."""

    recipe: tyro.conf.Positional[str]
    """See `trainers/recipes.py`."""
    data: str
    """The dataset."""
    out: str
    """Folder of the run, seen by all workers."""
    workers: int | None = None
    """By default one a GPU of the cluster, or one."""
    local: bool = False
    """In this process, without Ray."""
    max_failures: int = 3
    """Times that workers are started again after one has died."""
    chosen: tyro.conf.OmitArgPrefixes[Chosen] = field(default_factory=Chosen)
    options: tyro.conf.OmitArgPrefixes[Options] = field(default_factory=Options)


@dataclass(frozen=True, kw_only=True)
class Export:
    """Writes what a run trained as a folder that pipelines load."""

    run: tyro.conf.Positional[str]
    """Folder of the run."""
    folder: tyro.conf.Positional[str]
    """A new one."""


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Makes videos from prompts."""

    export: tyro.conf.Positional[str]
    """Folder that `export` wrote."""
    prompt: tyro.conf.Positional[tuple[str, ...]]
    """One or more."""
    out: str = "out/videos"
    """Folder for the videos."""
    mode: Literal["dense", "multi_scene", "multilingual", "two_stage"] = "dense"
    """What the LLM is asked for (RISE-T2V); two_stage rephrases to text and encodes that."""
    frames: int | None = None
    """Of a video; like height and width, by default as it was trained."""
    height: int | None = None
    """In px."""
    width: int | None = None
    """In px."""
    seconds: float | None = None
    """Length of the video, in place of frames (SemanticGen)."""
    steps: int | None = None
    """Of the sampler; by default as the system's paper has it."""
    guidance_scale: float | None = None
    """Of classifier-free guidance; 1 is none."""
    seed: int = 0
    """Of the noise."""
    schedule: Literal["step", "interpolated"] = "interpolated"
    """How frames pass from scene to scene."""
    language: str | None = None
    """Of the prompts in mode multilingual; by default detected."""
    sample: bool = False
    """Draw the LLM's tokens; else the likeliest are taken (RISE-T2V)."""
    answers: Literal["sample", "greedy"] = "sample"
    """How the LLM answers (Mimir)."""
    temperature: float = 0.7
    """Of answers that are sampled."""
    reference: str | None = None
    """A video to make others like, in place of planning from the text (SemanticGen)."""
    batch: int = 1
    """Prompts at once."""
    device: str | None = None
    """By default a GPU where there is one."""
    json: bool = False
    """One JSON object on standard output, and nothing else."""


_MODES = (
    "mode", "schedule", "language", "sample", "answers", "temperature", "seconds", "reference",
)  # fmt: skip
"""Options of `generate` that not every system has."""


@dataclass(frozen=True, kw_only=True)
class Analyse:
    """Draws figure 7 of Mimir: what its encoder, its LLM and their fusion make of prompts."""

    export: tyro.conf.Positional[str]
    """Folder that `export` wrote, of Mimir."""
    out: str = "out/figure7"
    """Folder for the pictures, and the numbers behind them."""
    prompts: str | None = None
    """File with a prompt a line, in place of fifty of our own."""
    prompt: str = "a red car drives down a road"
    """That is answered many times."""
    answers: int = 50
    """How often."""
    seed: int = 0
    """Of the answers, and of t-SNE."""
    device: str | None = None
    """By default a GPU where there is one."""


Command = (
    Annotated[Cache, tyro.conf.subcommand("cache")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Analyse, tyro.conf.subcommand("analyse")]
)


def main() -> int:
    """Does what the command line says; gives the exit code."""
    args = command.arguments(Command, f"{__doc__}\nRecipes:\n\n{_NAMES}")  # type: ignore[arg-type]
    command.set_up_logging()
    does = {Cache: cache, Train: train, Export: export, Generate: generate, Analyse: analyse}
    with command.in_one_line(LeaseLost, Stopped):
        does[type(args)](args)
    return 0


def train(args: Train) -> None:
    """`python -m trainers train`."""
    from trainers import launch

    chosen = _recipe(args.recipe, args.chosen)
    out = command.destination(args.out)
    jobs = [
        Job(
            recipe=chosen.name,
            system=chosen.system,
            stage=stage,
            root=command.destination(args.data),
            out=out,
            options=args.options,
            largest_px=max(b.pixels for s in chosen.stages for b in s.data.buckets),
        )
        for stage in chosen.stages
    ]
    for job in jobs:
        manifest = launch.check(job, args.workers or 1)
        _say(job, manifest)
    with Lease(out, str(uuid.uuid4())), _Bars() as bars:
        _note(out, args)
        launch.store_metrics(out)
        if all(launch.has_ended(job) for job in jobs):
            pass  # neither Ray nor a model is started for nothing
        elif args.local:
            for job in jobs:
                launch.check(job, 1)  # an earlier stage may have ended anew
                launch.alone(job, bars.train)
        else:
            with connected():
                workers = args.workers or launch.default_workers()
                for job in jobs:
                    launch.check(job, workers)
                    if not launch.has_ended(job):
                        launch.on_ray(job, workers, bars.train, max_failures=args.max_failures)
    command.out.print(f"trained: {out}", highlight=False, soft_wrap=True)


def cache(args: Cache) -> None:
    """`python -m trainers cache`."""
    from trainers.cache import fill
    from trainers.dataset import read_manifest

    chosen = _recipe(args.recipe, args.chosen)
    root = command.destination(args.data)
    for stage in chosen.stages:
        chosen.system.check(stage)
        encoders = chosen.system.encoders(stage)
        kinds = [e.kind for e in encoders]
        wanted = [kind for kind in args.what if kind in kinds]
        if not wanted:
            raise ValueError(f"--what {' '.join(args.what)}: {chosen.name} has {', '.join(kinds)}")
        with _Bars() as bars:
            counts = fill(
                root,
                read_manifest(root, stage.data),
                stage.data,
                encoders,
                kinds=wanted,
                connect=lambda: connected(args.workers),
                workers=args.workers,
                retry_failed=args.retry_failed,
                commit_every_s=args.commit_every_s,
                lease_expiry_s=args.lease_expiry_s,
                watch=bars.cache,
            )
        for kind, found in counts.items():
            command.out.print(
                f"{stage.name}, {kind}: {found.computed:,} computed, {found.cached:,} there"
                f" already, {found.failed:,} failed, {found.seconds:.1f} s",
                highlight=False,
            )


def export(args: Export) -> None:
    """`python -m trainers export`."""
    from trainers.export import export as write

    run = Path(command.destination(args.run))
    if not (run / RUN).is_file():
        raise ValueError(f"{run} is no run (it has no {RUN}): name what `train --out` made")
    noted = json.loads((run / RUN).read_text(encoding="utf-8"))
    chosen = Chosen(
        set=tuple(noted["set"]), stages=tuple(noted["stages"]), models=Models(**noted["models"])
    )
    folder = Path(command.destination(args.folder))
    write(_recipe(noted["recipe"], chosen), run, folder)
    command.out.print(f"export: {folder}", highlight=False, soft_wrap=True)


def generate(args: Generate) -> None:
    """`python -m trainers generate`."""
    from trainers.generation import load_pipeline
    from trainers.videos import write_mp4

    if not args.prompt:
        raise ValueError('no prompt: python -m trainers generate FOLDER "a prompt"')
    pipe = load_pipeline(Path(command.destination(args.export)), device=args.device)
    _check_modes(args, pipe.modes)
    folder = Path(command.destination(args.out))
    folder.mkdir(parents=True, exist_ok=True)
    shape = {n: getattr(args, n) for n in ("frames", "height", "width")}
    how = {n: getattr(args, n) for n in pipe.modes} | {
        n: getattr(args, n)
        for n in ("steps", "guidance_scale")
        if getattr(args, n) is not None  # else as the system has it
    }
    told = []
    with _Bars() as bars:
        for start in range(0, len(args.prompt), args.batch):
            prompts = args.prompt[start : start + args.batch]
            made = pipe(prompts, **shape, **how, seed=args.seed, progress=bars.generate)
            for number, one in enumerate(made, start):
                path = folder / f"{_slug(one.prompt)}-{args.seed}-{number}.mp4"
                write_mp4(path, one.video, one.fps)
                about = dataclasses.asdict(one) | {"video": str(path)}
                path.with_suffix(".json").write_text(json.dumps(about, indent=1), "utf-8")
                told.append(about)
    if args.json:
        command.print_json({"videos": told})
        return
    for about in told:
        seconds = ", ".join(
            f"{n.removesuffix('_s')} {s:.1f} s" for n, s in about["timings"].items()
        )
        command.out.print(about["video"], highlight=False, soft_wrap=True, style="bold")
        command.out.print(about["rephrased"], highlight=False, soft_wrap=True, markup=False)
        command.out.print(seconds, highlight=False, style="dim")
        for note in about["notes"]:
            command.out.print(f"note: {note}", highlight=False, markup=False)


def analyse(args: Analyse) -> None:
    """`python -m trainers analyse`."""
    from trainers.mimir_pipeline import MimirPipeline
    from trainers.token_figures import check, draw, prompts_of

    prompts = prompts_of(args.prompts)
    check(prompts, args.prompt, args.answers)
    pipe = MimirPipeline.from_export(command.destination(args.export), device=args.device)
    folder = Path(command.destination(args.out))
    with _Bars() as bars:
        written = draw(
            pipe,
            prompts,
            args.prompt,
            folder,
            answers=args.answers,
            seed=args.seed,
            progress=bars.generate,
        )
    for path in written:
        command.out.print(str(path), highlight=False, soft_wrap=True)


def _check_modes(args: Generate, known: tuple[str, ...]) -> None:
    """Raises ValueError where an option was given that this system has no use for."""
    for one in dataclasses.fields(Generate):
        is_mode = one.name in _MODES and one.name not in known
        if is_mode and getattr(args, one.name) != one.default:
            has = ", ".join(f"--{name}" for name in known) or "none of its own"
            option = one.name.replace("_", "-")
            raise ValueError(f"--{option} is nothing to the system of this export: it has {has}")


def _recipe(name: str, chosen: Chosen) -> Recipe:
    found = recipe(name, chosen.models)
    if chosen.stages:
        found = with_stages(found, chosen.stages)
    found = with_settings(found, chosen.set)
    if name.startswith(TINY):
        command.err.print(
            f"recipe {name}: small random models, their outputs mean nothing", highlight=False
        )
        make_tiny()
    return found


def _say(job: Job, manifest: Any) -> None:
    left = ", ".join(f"{n:,} {why}" for why, n in manifest.left_out.items())
    beside = f"  (left out: {left})" if left else ""
    command.err.print(
        f"{job.stage.name}: {len(manifest):,} samples, {job.stage.steps:,} steps of"
        f" {job.stage.batch}{beside}",
        highlight=False,
    )


def _note(out: str, args: Train) -> None:
    """What `export` needs to know of the command line."""
    noted = {
        "recipe": args.recipe,
        "set": args.chosen.set,
        "stages": args.chosen.stages,
        "models": dataclasses.asdict(args.chosen.models),
        "data": args.data,
    }
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN).write_text(json.dumps(noted, indent=1), encoding="utf-8")


def _slug(prompt: str) -> str:
    words = "".join(c if c.isalnum() else " " for c in prompt).split()
    return "-".join(words)[:60].strip("-").lower() or "video"


class _Bars(command.Bars):
    """Progress of what these commands do."""

    def train(self, now: Any) -> None:
        """Of a stage: a `launch.Progress`."""
        loss = now.figures["loss"]
        facts = "loss not finite" if loss is None else f"loss {loss:.4f}"
        rate = now.figures.get("samples_per_s")
        if rate:
            facts += f", {rate:.1f} samples/s"
        for name, count in now.figures.items():
            if name.startswith("num_") and count:
                facts += f", {count} {name.removeprefix('num_').replace('_', ' ')}"
        self.show(now.stage, now.step, now.steps, facts, rate=rate and rate / now.batch)

    def cache(self, now: Any) -> None:
        """Of a cache: a `trainers.cache.Progress`."""
        rate = now.done / max(time.monotonic() - now.started, 1e-9)
        facts = f"{now.failed} failed, {rate:.1f} {now.unit}/s"
        self.show("cache", now.done, now.total, facts, doing=now.doing, rate=rate)

    def generate(self, doing: str, done: int, total: int) -> None:
        """Of a video."""
        self.show(doing, done, total, "")


if __name__ == "__main__":
    try:
        command.end(main())
    except SystemExit as stop:  # --help, or an error that was said
        command.end(stop.code if isinstance(stop.code, int) else 0)
