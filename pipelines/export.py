"""Writes what a dataset keeps as trainers read it.

    python pipelines/export.py DATASET --format webdataset|hf|jsonl --dst OUT

- `hf`: a folder that Hugging Face datasets (`videofolder`) and finetrainers load.
- `webdataset`: tar shards of video, text and JSON.
- `jsonl`: clips.jsonl, and the same list for VideoX-Fun (videox_fun.json) and DiffSynth-Studio
  (diffsynth.csv) beside a folder of videos; with --spans only clips.jsonl, naming spans of the
  sources.

Each kept clip with a text is a sample; with --pairs each kept pair of recaptioned texts. Videos are
the dataset's own cuts (`curate.py --cut`), or are cut now with --cut. Samples of one source stand
together: shuffle with a buffer. Killed, the same command goes on; another export's folder, or any
other that is not empty, is refused.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from engine import command
from engine.clipfiles import Limits
from engine.cut import Encoding
from engine.export import Request, Selection, select
from engine.exporting import Exported, export
from engine.tables import identity

SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Args:
    """Exports a dataset."""

    dataset: tyro.conf.Positional[str]
    """The dataset."""
    format: Literal["webdataset", "hf", "jsonl"]
    """How it is written."""
    dst: str
    """A new folder, local or s3://…"""
    media: Literal["video", "image"] = "video"
    """Clips, or the images among the sources, as their files are."""
    pairs: bool = False
    """The kept pairs, with rephrased captions, instead of clips."""
    caption: Literal["caption", "caption_original", "rephrased"] | None = None
    """Which text: by default rephrased of pairs, caption of clips, else caption_original."""
    cut: Literal["encode", "copy"] | None = None
    """Cut now what the dataset has not cut in this way."""
    spans: bool = False
    """With --format jsonl: name spans of the sources, write no media."""
    crf: int = 18
    """Quality of --cut encode: smaller is better and larger."""
    max_side_px: int | None = None
    """Longest side of --cut encode."""
    shard_mib: float = 256.0
    """Size of a webdataset shard."""
    workers: int | None = None
    """Processes that cut; by default one a core."""
    time_limit_s: float = 600.0
    """Of cutting one clip."""
    memory_limit_gib: float = 4.0
    """Of cutting."""
    json: bool = False
    """One JSON object on standard output, and nothing else."""


def main() -> int:
    """Exports as the command line says; gives the exit code."""
    args = command.arguments(Args, __doc__ or "")
    command.set_up_logging()
    root, dst = command.destination(args.dataset), command.destination(args.dst)
    request, limits = request_of(args, root), limits_of(args)
    with command.in_one_line(failing=dst):
        identity(root)
        selection = select(request)
        if not args.caption:
            command.err.print(f"text: {selection.caption}", highlight=False)
        done = export(request, selection, dst, limits, watch=Watch())
    show(args, dst, selection, done)
    return 0


class Watch:
    """Says now and then how far it is."""

    def __init__(self, every_s: float = 10.0):
        self._every_s, self._said = every_s, time.monotonic()

    def __call__(self, num_done: int, num: int) -> None:
        """Takes the samples done, and how many there are."""
        if time.monotonic() - self._said > self._every_s:
            self._said = time.monotonic()
            command.err.print(f"{num_done:,} of {num:,} samples", highlight=False)


def request_of(args: Args, root: str) -> Request:
    """What is to be written."""
    if args.shard_mib <= 0 or not 0 <= args.crf <= 51:
        command.fail("--shard-mib must be more than 0, and --crf lie in 0 to 51")
    if args.max_side_px is not None and args.max_side_px < 2:
        command.fail(f"--max-side-px {args.max_side_px}: must be 2 or more")
    return Request(
        root=root,
        format=args.format,
        media=args.media,
        pairs=args.pairs,
        caption=args.caption,
        cut=args.cut,
        spans=args.spans,
        encoding=Encoding(crf=args.crf, max_side_px=args.max_side_px),
        shard_bytes=int(args.shard_mib * 2**20),
    )


def limits_of(args: Args) -> Limits:
    """How cutting goes about it."""
    if args.workers is not None and args.workers < 1:
        command.fail(f"--workers {args.workers}: must be 1 or more")
    return Limits(
        workers=args.workers or os.cpu_count() or 1,
        time_limit_s=args.time_limit_s,
        memory_limit_bytes=int(args.memory_limit_gib * 2**30),
    )


def show(args: Args, dst: str, selection: Selection, done: Exported) -> None:
    """What was written, for a person or for a program."""
    if args.json:
        command.print_json(
            {
                "export": dst,
                "format": args.format,
                "caption": selection.caption,
                "samples": done.samples,
                "files": done.files,
                "bytes": done.bytes,
                "left_out": dict(done.left_out),
            }
        )
    else:
        what = "shards" if args.format == "webdataset" else "files"
        command.out.print(
            f"{done.samples:,} samples, {done.files:,} {what},"
            f" {done.bytes / 2**20:,.1f} MiB: {dst}",
            highlight=False,
            soft_wrap=True,
        )
    for reason, num in done.left_out.items():
        command.err.print(f"left out: {num:,} ({reason})", highlight=False)
    for line in done.failures[:SHOWN]:
        command.err.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)


def end(code: int) -> None:
    """Ends the process at once: threads that wait for a child would hold a Ctrl-C up."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        command.end(main())
    except SystemExit as stop:  # --help, or an error that was said
        command.end(stop.code if isinstance(stop.code, int) else 0)
