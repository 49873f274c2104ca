"""One evaluation from prompts to scores: what is missing is generated, then what is unscored."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from lance import LanceOperation

import engine.lease
from engine import observe
from engine.lease import Lease
from engine.provenance import provenance
from engine.schema import RUNS
from engine.tables import NoDataset, Writer, create, identity, uninterrupted
from evals import generating, importing, scoring, segments
from evals.dimensions import DIMENSIONS
from evals.drift import needed_segments
from evals.evaluation import KIND, Plan, held, videos_of
from evals.metric import Metric
from evals.models import Model
from evals.recipes import Recipe
from evals.scoring import Ask, Video
from evals.static import chosen
from evals.suites import Prompt, Suite

DATASET = "evaluation"
"""Recipe of a dataset that is made for evaluations; any other dataset may hold them as well."""
LINES = 20
"""About a folder's files, at most."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be done."""

    root: str
    recipe: Recipe
    suite: Suite
    models: tuple[Model, ...]
    metrics: tuple[Metric, ...]
    static: Metric | None = None
    """VBench's static filter, before flickering is measured."""
    seed: int = 0
    workers: int | None = None
    retry_failed: bool = False
    commit_every_s: float = 10.0
    lease_expiry_s: float = engine.lease.EXPIRY_S
    night: str | None = None
    """Date of a nightly evaluation, YYYY-MM-DD."""
    asked: str = ""
    """Of one, what its command asked for: `evals.nightly.fingerprint`."""

    @property
    def plan(self) -> Plan:
        """As it is recorded."""
        metrics = (*self.metrics, *([self.static] if self.static else []))
        return Plan(
            recipe=self.recipe.name,
            suite=self.suite,
            models=tuple(m.describe() for m in self.models),
            dimensions=self.recipe.dimensions,
            metrics={
                d: {"fingerprint": m.key(d), "implementation": m.implementation}
                for m in metrics
                for d in m.dimensions
            },
            seed=self.seed,
            clips=self.recipe.clips,
            drift=self.recipe.drift,
            is_tiny=self.recipe.is_tiny,
            is_filtered=self.static is not None,
        )


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a run did."""

    run_id: str
    generated: dict[str, Any]
    """By model, what was generated or imported."""
    scored: scoring.Counts
    seconds: float


def run(
    request: Request,
    *,
    connect: Callable[[], AbstractContextManager[Any]],
    watch: Callable[[Any], None] = lambda _: None,
    begin: Callable[[], None] = lambda: None,
    conclude: Callable[[Done], Mapping[str, Any]] = lambda _: {},
) -> Done:
    """Generates or imports what is missing and scores it; the same call again goes on.

    Args:
        request: What is to be done.
        connect: To Ray, where something is to do.
        watch: Called with the run's progress.
        begin: Called when nobody else can write any more, before anything is written; what it
            raises ends the run.
        conclude: Says what is recorded beside the counts. The run has ended when that is stored.

    Raises:
        DatasetError: The dataset cannot be written to, or is in use (`InUse`).
        LeaseLost: Another driver has taken over.
        OSError: A model or the dataset cannot be read.
        Unloadable: A model or a metric cannot be loaded.
    """
    run_id, began = str(uuid.uuid4()), time.monotonic()
    _make(request.root)
    with (
        observe.of_run(run_id),
        Lease(request.root, run_id, request.lease_expiry_s),
        ExitStack() as stack,
    ):
        begin()
        writer = Writer(request.root, run_id)
        running = _Running(request, writer, connect, watch, stack)
        running.record(seconds=None, counts={"asked": request.asked} if request.night else {})
        generated = running.generate()
        scored = running.score()
        seconds = time.monotonic() - began
        done = Done(run_id=run_id, generated=generated, scored=scored, seconds=seconds)
        counts = {"scores": dataclasses.asdict(scored), "videos": running.held()}
        running.record(seconds=seconds, counts=counts | dict(conclude(done)))
    return done


def _make(root: str) -> None:
    """Makes the dataset where there is none."""
    try:
        identity(root)
    except NoDataset:
        create(root, DATASET)


class _Running:
    """One call of `run`."""

    def __init__(
        self,
        request: Request,
        writer: Writer,
        connect: Callable[[], AbstractContextManager[Any]],
        watch: Callable[[Any], None],
        stack: ExitStack,
    ):
        self.request, self.writer, self.watch = request, writer, watch
        self._connect, self._stack = connect, stack
        self._started = datetime.datetime.now(datetime.UTC)
        self._is_connected = False
        self._about = provenance(
            request.plan.resolved(), [f"{m.name}={m.at}" for m in request.models]
        )

    @uninterrupted()
    def record(self, *, seconds: float | None, counts: dict[str, Any]) -> None:
        """Says in `runs` what this run is asked for, and later that it came to its end."""
        row = (
            dict.fromkeys(RUNS.names)
            | self._about
            | {
                "run_id": self.writer.run_id,
                "recipe": f"{KIND}{self.request.recipe.name}",
                "started_at": self._started,
                "seconds": seconds,
                "interrupted": seconds is None,
                "counts": json.dumps(counts),
                "night": self.request.night,
            }
        )
        rows = pa.Table.from_pylist([row], schema=RUNS)
        table = self.writer.tables["runs"]
        changed, emptied = table.without("run_id", [self.writer.run_id])
        table.commit(  # one commit: between two, a death would leave the run without a row
            LanceOperation.Update(
                removed_fragment_ids=emptied,
                updated_fragments=changed,
                new_fragments=self.writer.fragments_of("runs", rows),
            )
        )

    def connected(self) -> None:
        """Starts Ray, or connects to it, when it is first needed."""
        if not self._is_connected:
            self._stack.enter_context(self._connect())
            self._is_connected = True

    def generate(self) -> dict[str, Any]:
        """Makes or imports the videos that are missing."""
        request = self.request
        how = {
            "writer": self.writer,
            "watch": self.watch,
            "workers": request.workers,
            "connect": self.connected,
            "retry_failed": request.retry_failed,
            "commit_every_s": request.commit_every_s,
        }
        folders = [m for m in request.models if m.kind == "folder"]
        others = [m for m in request.models if m.kind != "folder"]
        found: dict[str, Any] = {}
        for model in folders:
            counts = importing.import_folder(model, request.suite, **how)
            for line in counts.lines[:LINES]:
                _log.warning("%s: %s", model.name, line)
            if len(counts.lines) > LINES:
                _log.warning("%s: and %d more such lines", model.name, len(counts.lines) - LINES)
            found[model.name] = counts
        if others:
            found |= generating.generate(others, request.suite, seed=request.seed, **how)
        return found

    def score(self) -> scoring.Counts:
        """Scores the videos that are not scored."""
        request = self.request
        how = {
            "connect": self.connected,
            "watch": self.watch,
            "workers": request.workers,
            "retry_failed": request.retry_failed,
            "commit_every_s": request.commit_every_s,
        }
        videos = {
            m.name: videos_of(request.root, m.describe(), request.seed) for m in request.models
        }
        static: dict[str, dict[str, list[int]]] | None = None
        if request.static:
            asks = [
                ask
                for found in videos.values()
                for ask in asked(request, found, ("static",), of="temporal_flickering")
            ]
            scoring.score(self.writer, asks, [request.static], **how)
            static = {name: self._static(request.static, found) for name, found in videos.items()}
        asks = [
            ask
            for name, found in videos.items()
            for ask in asked(
                request, found, request.recipe.dimensions, static=static and static[name]
            )
        ]
        return scoring.score(self.writer, asks, request.metrics, **how)

    def held(self) -> dict[str, Any]:
        """What folders hold, which their next import may replace."""
        request = self.request
        return {
            m.name: held(request.suite, videos_of(request.root, m.describe(), request.seed))
            for m in request.models
            if m.kind == "folder"
        }

    def _static(
        self, static: Metric, videos: dict[tuple[str, str, int], dict[str, Any]]
    ) -> dict[str, list[int]]:
        """The samples by prompt that flickering is measured on."""
        rows = self.writer.table("scores").to_table(
            columns=["generation_id", "prompt", "sample", "raw_score"],
            filter=f"fingerprint = '{static.key('static')}'",
        )
        ids = {row["generation_id"] for row in videos.values()}
        return chosen(row for row in rows.to_pylist() if row["generation_id"] in ids)


def asked(
    request: Request,
    videos: dict[tuple[str, str, int], dict[str, Any]],
    dimensions: Sequence[str],
    *,
    static: dict[str, list[int]] | None = None,
    of: str | None = None,
) -> list[Ask]:
    """What is wanted of the videos that are there, in the suite's order.

    Args:
        request: The evaluation.
        videos: Rows of `generations`, by prompt, text and sample.
        dimensions: To be measured.
        static: Samples by prompt that flickering is measured on; None is all.
        of: Where the videos are those of another dimension.
    """
    found: dict[Ask, None] = {}
    by = {d: m.implementation for m in request.metrics for d in m.dimensions} | {"static": "static"}
    for prompt in request.suite.prompts:
        for dimension in dimensions:
            if (of or dimension) not in prompt.dimensions:
                continue
            samples: Sequence[int] = range(prompt.samples)
            if static is not None and dimension == "temporal_flickering":
                samples = static.get(prompt.prompt, [])
            for sample in samples:
                row = videos.get((prompt.prompt, prompt.text, sample))
                if row is not None and row["error_type"] is None:
                    asks = _asks(request.recipe, prompt, row, dimension, by[dimension])
                    found |= dict.fromkeys(asks)
    return list(found)


def _asks(
    recipe: Recipe, prompt: Prompt, row: dict[str, Any], dimension: str, implementation: str
) -> list[Ask]:
    video = Video(**{f.name: row[f.name] for f in dataclasses.fields(Video)})
    auxiliary = prompt.auxiliary.get(dimension)
    said = None if auxiliary is None else json.dumps(auxiliary, sort_keys=True)
    spans: list[tuple[int, int] | None] = [None]
    known = DIMENSIONS[dimension]
    if recipe.clips and known.frames != "mean" and dimension != "static":
        clips = segments.two_second_clips(video.num_frames, video.fps)
        spans = [*clips, *(spans if dimension in recipe.drift else ())]
    if dimension in recipe.drift:
        spans += needed_segments(
            known.has_frame_scores(implementation),
            video.num_frames,
            segments.least(known),
            parts=segments.PARTS,
        )
    return [
        Ask(video, dimension, None if span is None else segments.str_of(span), said)
        for span in spans
    ]
