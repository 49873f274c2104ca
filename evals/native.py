"""VBench's dimensions that are embeddings and dot products, and text alignment, measured here.

One decode of a file serves all of its dimensions and spans; frames go through the models in
batches, and what is kept of them is features and scores. The models, the weights, what they are
shown and the formulas are the package's.

Shapes: F frames, D width of the features.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from engine.operator import Failed, resource, results
from engine.video import VideoError
from evals import cache as weights
from evals import frames
from evals.dimensions import DIMENSIONS
from evals.frames import Differences, View
from evals.metric import Metric
from evals.native_models import Models, Score, consistency, flickering

if TYPE_CHECKING:
    import torch

_MOST_PIXELS = 2**25
"""Of frames that are held at once: 400 MB as float32."""
_LENS: dict[str, tuple[View, str]] = {
    "subject_consistency": ("wide", "dino"),
    "background_consistency": ("square", "clip_b"),
    "aesthetic_quality": ("square", "clip_l"),
    "appearance_style": ("picture", "clip_b"),
    "text_alignment": ("picture", "clip_b"),
}
"""How frames are prepared for a dimension, and the model that sees them; flickering has neither."""
_Lens = tuple[View, str]
_Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Native(Metric):
    """Temporal flickering, subject and background consistency, aesthetics, style, text alignment.

    Scores of a video are the package's on the same weights and device, flickering to the bit, the
    others to 1e-6 in float32. On a GPU CLIP is in float16, as in the package.

    `frame_scores` of a whole video tell of a part of it without measuring again, but not always
    what the package would say of that part alone: of flickering, aesthetics, style and text their
    mean over a span is the span's score (to rounding; the difference from the frame before the span
    counts too); of consistency each is (similarity to the frame before + similarity to the first
    frame of the whole video) / 2, so that their mean over a span says how near it still is to the
    video's beginning, and a span measured by itself compares with its own first frame.

    Misleads: consistency is highest for a still; CLIP sees 224 pixels, of wide videos the middle.

    Source:
        `vbench==0.1.5`, the modules of these names. Text alignment: RISE-T2V, appendix, the mean
        over frames of the similarity of prompt and frame by CLIP ViT-B/32.
    """

    implementation: ClassVar[str] = "native"

    cache: str
    """Folder with VBench's weights (`evals.cache`)."""

    num_gpus: float = resource(0.25)
    device: str | None = resource(None)
    """As torch names it; None is a GPU where there is one."""
    frames_at_once: int = resource(32)
    """That a model sees."""

    @property
    def libraries(self) -> tuple[str, ...]:
        """See `Operator`: of flickering it is no more than a decoder and a mean."""
        found = ["av", "numpy", "opencv-python"]
        if lenses := {_LENS[name] for name in self.dimensions if name in _LENS}:
            found += ["torch", "torchvision"]
            found += ["openai-clip"] if any(model != "dino" for _, model in lenses) else []
            found += ["pillow"] if any(view == "picture" for view, _ in lenses) else []
        return tuple(found)

    def check(self) -> None:
        """Raises ValueError, with what to do, where weights are missing or a dimension is not ours.

        Nothing is fetched.
        """
        if others := [n for n in self.dimensions if "native" not in DIMENSIONS[n].implementations]:
            raise ValueError(f"{', '.join(others)} cannot be measured natively, only by VBench")
        weights.check(self.dimensions, self._folder)

    def load(self) -> Callable[[pa.Table], pa.Table]:
        """Loads each model once."""
        self.check()
        return _Measure(self)

    def describe(self) -> dict[str, Any]:
        """See `Operator.describe`; weights count by what is in them, not by where they lie."""
        found = super().describe()
        del found["parameters"]["cache"]
        return found | {"weights": self.weights()}

    def weights(self) -> dict[str, str]:
        """See `Metric.weights`."""
        return weights.weights_of(self.dimensions, self._folder)

    def environment(self) -> dict[str, Any]:
        """See `Metric.environment`; with the device and CLIP's precision."""
        found = super().environment()
        if any(name in _LENS for name in self.dimensions):
            import torch

            device = self.torch_device()
            dtype = "float16" if device.type == "cuda" else "float32"
            found |= {"device": str(device), "clip_dtype": dtype}
            if device.type == "cuda":
                found["gpu"] = torch.cuda.get_device_name(device)
        return found

    def torch_device(self) -> torch.device:
        """Where models run on this machine."""
        import torch

        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def _folder(self) -> Path:
        return weights.folder(self.cache)


@dataclass
class _Seen:
    """What is kept of the frames of a file."""

    num_frames: int = 0
    differences: Differences = field(default_factory=Differences)
    features: dict[_Lens, list[torch.Tensor | None]] = field(default_factory=dict)
    """Of unit length (D,), one a frame; None for frames that no span needs."""
    faults: dict[_Lens, Failed] = field(default_factory=dict)
    """Why features are missing."""

    def features_of(self, dimension: str, start: int, stop: int) -> torch.Tensor:
        """Of a span, (F, D)."""
        import torch

        lens = _LENS[dimension]
        if lens in self.faults:
            raise self.faults[lens]
        found_FD = torch.stack([f for f in self.features[lens][start:stop] if f is not None])
        if not torch.isfinite(found_FD).all():
            raise Failed("NotFinite", f"{lens[1]} gave features that are no numbers")
        return found_FD


class _Chunk(NamedTuple):
    """Neighbouring frames on their way to the models."""

    wanted: list[bool]
    """Which of them; what follows is of these alone."""
    prepared: list[Future[dict[View, torch.Tensor]]]
    images: list[np.ndarray]
    """For the views that the device makes itself."""
    on_device: Set[View]

    def shown(self, device: torch.device) -> dict[View, torch.Tensor]:
        """What models see."""
        import torch

        each = [one.result() for one in self.prepared]
        found = {view: torch.stack([e[view] for e in each]).to(device) for view in each[0]}
        if self.on_device:
            found |= frames.prepare_on(device, self.images, self.on_device)
        return found


class _Measure:
    """The function that `Native.load` gives, and the models that it holds."""

    def __init__(self, metric: Native):
        self.metric = metric
        self.decodes = 0
        """Files that were read."""
        self._lenses = list(dict.fromkeys(_LENS[n] for n in metric.dimensions if n in _LENS))
        if self._lenses:
            # Each thread has a frame of its own: torch's threads within would only be in its way.
            threads = max(1, math.ceil(metric.num_cpus))
            self._pool = ThreadPoolExecutor(threads, initializer=_one_thread)
            names = {model for _, model in self._lenses}
            self._models = Models(names, weights.folder(metric.cache), metric.torch_device())

    def __call__(self, asked: pa.Table) -> pa.Table:
        """Rows of `ASKED` in, rows of `SCORED` or failures out."""
        found: list[dict[str, Any] | Failed] = []
        for path, rows in itertools.groupby(asked.to_pylist(), key=lambda row: row["path"]):
            found += self._of_file(path, list(rows))
        return results(self.metric.writes, found)

    def _of_file(self, path: str, rows: Sequence[_Row]) -> list[dict[str, Any] | Failed]:
        try:
            seen = self._watch(path, rows)
        except VideoError as error:
            return [Failed(type(error).__name__, str(error))] * len(rows)
        except OSError as error:
            return [Failed(type(error).__name__, str(error), transient=True)] * len(rows)
        return [self._of_row(seen, row) for row in rows]

    def _watch(self, path: str, rows: Sequence[_Row]) -> _Seen:
        """Decodes the file once, and whole: damage behind the last frame asked for counts."""
        self.decodes += 1
        asked = {row["dimension"] for row in rows}
        spans = [_span(row) for row in rows if row["dimension"] in _LENS]
        lenses = [lens for lens in self._lenses if any(_LENS.get(name) == lens for name in asked)]
        seen = _Seen(features={lens: [] for lens in lenses})
        images = frames.rgb_frames(path)
        waiting: _Chunk | None = None
        for held in frames.chunks(images, self.metric.frames_at_once, _MOST_PIXELS):
            if "temporal_flickering" in asked:
                for image in held:
                    seen.differences.add(image)
            numbers = range(seen.num_frames, seen.num_frames + len(held))
            seen.num_frames += len(held)
            if lenses:
                wanted = [any(a <= n < b for a, b in spans) for n in numbers]
                chunk = self._prepared(held, wanted, {view for view, _ in lenses})
                if waiting:
                    self._embed(seen, waiting)
                waiting = chunk  # prepared by threads while models look at the one before
        if waiting:
            self._embed(seen, waiting)
        return seen

    def _prepared(self, held: Sequence[np.ndarray], wanted: list[bool], views: Set[View]) -> _Chunk:
        images = list(itertools.compress(held, wanted))
        device = self._models.device
        on_device = views - {"picture"} if device.type != "cpu" else frozenset()
        in_threads = [self._pool.submit(frames.prepare, i, views - on_device) for i in images]
        return _Chunk(wanted, in_threads, images if on_device else [], on_device)

    def _embed(self, seen: _Seen, chunk: _Chunk) -> None:
        """Adds the features of these frames; a model that fails costs only what it is for."""
        import torch

        with torch.inference_mode():
            shown = chunk.shown(self._models.device) if any(chunk.wanted) else {}
            for (view, model), found in seen.features.items():
                if (view, model) in seen.faults:
                    continue
                try:
                    features = iter(self._models.features(model, shown[view]) if shown else ())
                except RuntimeError as error:  # memory of the device, above all
                    said = " ".join(str(error).split())[:300]
                    seen.faults[view, model] = Failed(type(error).__name__, said)
                else:
                    found += [next(features) if is_wanted else None for is_wanted in chunk.wanted]

    def _of_row(self, seen: _Seen, row: _Row) -> dict[str, Any] | Failed:
        name, (start, stop) = row["dimension"], _span(row)
        stop = seen.num_frames if stop == math.inf else stop
        if not 0 <= start < stop <= seen.num_frames:
            said = f"frames {start}:{stop} were asked for, and the video has {seen.num_frames}"
            return Failed("NoSuchFrames", said)
        least = DIMENSIONS[name].min_frames
        if stop - start < least:
            return Failed("TooShort", f"{name} needs {least} frames, and there is {stop - start}")
        try:
            score = self._score(seen, row, start, stop)
        except Failed as failure:
            return failure
        about = {"video_results": score.value, "num_frames": stop - start}
        return {
            "raw_score": score.value,
            "frame_scores": score.frames,
            "num_frames": stop - start,
            "details": json.dumps(about | score.details),
        }

    def _score(self, seen: _Seen, row: _Row, start: int, stop: int) -> Score:
        name = row["dimension"]
        if name == "temporal_flickering":
            return flickering(seen.differences.values[start : stop - 1])
        if name == "appearance_style":
            text = _style(row["auxiliary"])
            return self._models.style(seen.features_of(name, start, stop), text)
        if name == "text_alignment":
            return self._models.alignment(seen.features_of(name, start, stop), row["prompt"])
        features_FD = seen.features_of(name, start, stop)
        if name == "aesthetic_quality":
            return self._models.aesthetics(features_FD)
        return consistency(features_FD, counted=name == "background_consistency")


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)  # of this thread; that of the models keeps its own


def _span(row: _Row) -> tuple[int, float]:
    start, stop = row["start_frame"], row["stop_frame"]
    return start or 0, math.inf if stop is None else stop


def _style(auxiliary: str | None) -> str:
    told = json.loads(auxiliary) if auxiliary else None
    style = told.get("appearance_style") if isinstance(told, dict) else None
    if not isinstance(style, str):
        raise Failed(
            "NoStyle",
            "appearance_style needs the name of the style beside the prompt, as VBench's index has"
            f' it ({{"appearance_style": "oil painting"}}), and was told {told}',
        )
    return style
