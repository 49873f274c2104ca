"""VBench's dimensions that are embeddings and dot products, and text alignment, measured here.

One decode of a file serves all of its dimensions and spans; frames go through the models in
batches, and what is kept of them is features and scores. The models, the weights, what they are
shown and the formulas are the package's.

Shapes: F frames, D width of the features.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import operator
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
from evals.segments import head_tail
from evals.vbench_worker import _hub as from_hub
from evals.vbench_worker import prepare

if TYPE_CHECKING:
    import torch

CONTEXT = 77
"""Tokens of CLIP's text, with the two that begin and end it."""
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
            device = self.torch_device()
            dtype = "float16" if device.type == "cuda" else "float32"
            found |= {"device": str(device), "clip_dtype": dtype}
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


class _Score(NamedTuple):
    """Of a span in a dimension."""

    value: float
    frames: list[float | None]
    details: dict[str, Any]
    """Beyond the value and the number of frames."""


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
            self._models = _Models(metric, {model for _, model in self._lenses})

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

    def _score(self, seen: _Seen, row: _Row, start: int, stop: int) -> _Score:
        name = row["dimension"]
        if name == "temporal_flickering":
            return _flickering(seen.differences.values[start : stop - 1])
        if name == "appearance_style":
            text = _style(row["auxiliary"])
            return self._models.style(seen.features_of(name, start, stop), text)
        if name == "text_alignment":
            return self._models.alignment(seen.features_of(name, start, stop), row["prompt"])
        features_FD = seen.features_of(name, start, stop)
        if name == "aesthetic_quality":
            return self._models.aesthetics(features_FD)
        return _consistency(features_FD, counted=name == "background_consistency")


class _Models:
    """What features and their scores come from, on one device."""

    def __init__(self, metric: Native, names: Set[str]):
        self.device = metric.torch_device()
        self._folder = weights.folder(metric.cache)
        prepare(str(self._folder))
        self._encoders: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        if "dino" in names:
            self._encoders["dino"] = self._dino()
        if "clip_b" in names:
            self._clip_b = self._clip("ViT-B-32")
            self._encoders["clip_b"] = self._clip_b.encode_image
        if "clip_l" in names:
            clip_l, self._head = self._clip("ViT-L-14"), self._aesthetic_head()
            self._encoders["clip_l"] = lambda shown: clip_l.encode_image(shown).float()
        self._texts: dict[str, tuple[torch.Tensor, int]] = {}

    def _dino(self) -> torch.nn.Module:
        folder = self._folder / "dino_model"
        known = {
            "repo_or_dir": str(folder / "facebookresearch_dino_main"),
            "path": str(folder / "dino_vitbase16_pretrain.pth"),
            "model": "dino_vitb16",
            "source": "local",
        }
        return from_hub(known).eval().to(self.device)

    def _clip(self, name: str) -> Any:
        import clip

        return clip.load(str(self._folder / "clip_model" / f"{name}.pt"), self.device)[0].eval()

    def _aesthetic_head(self) -> torch.nn.Linear:
        import torch

        path = self._folder / "aesthetic_model" / "emb_reader" / "sa_0_4_vit_l_14_linear.pth"
        head = torch.nn.Linear(768, 1)
        head.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return head.eval().to(self.device)

    def features(self, model: str, shown_FCHW: torch.Tensor) -> torch.Tensor:
        """Of frames that were prepared for this model, of unit length (F, D)."""
        import torch

        return torch.nn.functional.normalize(self._encoders[model](shown_FCHW), dim=-1)

    def aesthetics(self, features_FD: torch.Tensor) -> _Score:
        """LAION's score / 10."""
        import torch

        with torch.inference_mode():
            scores_F = self._head(features_FD).squeeze(-1) / 10
        return _Score(scores_F.mean().item(), scores_F.tolist(), {})

    def style(self, features_FD: torch.Tensor, text: str) -> _Score:
        """CLIP's logit / 100: the cosine, where the model's own scale is 100 as OpenAI's is."""
        import torch

        text_1D, is_cut = self._text(text)
        if is_cut:
            raise Failed(
                "TextTooLong", f"CLIP reads {CONTEXT} tokens at most, and a style has more"
            )
        with torch.inference_mode():
            logits_F1 = self._clip_b.logit_scale.exp() * features_FD @ text_1D.T
        each = [logit / 100 for logit in logits_F1[:, 0].tolist()]
        details = {"frame_results": each, "cur_sim": each[-1]}
        return _Score(float(np.mean(each)), each, details)

    def alignment(self, features_FD: torch.Tensor, text: str) -> _Score:
        """The cosine. Of a text that is too long the end is cut off, and the details say so."""
        import torch

        text_1D, is_cut = self._text(text)
        with torch.inference_mode():
            each = (features_FD @ text_1D.T)[:, 0].tolist()
        return _Score(float(np.mean(each)), each, {"truncated": True} if is_cut else {})

    def _text(self, text: str) -> tuple[torch.Tensor, bool]:
        """Features of unit length (1, D), and whether the text was too long."""
        import clip
        import torch

        if text not in self._texts:
            try:
                tokens, is_cut = clip.tokenize([text]), False
            except RuntimeError:  # what it has for a text that is too long
                tokens, is_cut = clip.tokenize([text], truncate=True), True
            with torch.inference_mode():
                found = self._clip_b.encode_text(tokens.to(self.device))
                found = torch.nn.functional.normalize(found, dim=-1)
            self._texts = {text: (found, is_cut)}  # that of the next rows, mostly
        return self._texts[text]


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


def _flickering(differences: Sequence[np.float32]) -> _Score:
    """(255 - mean difference) / 255, the mean being of float32 as in the package."""
    value = (255.0 - np.mean(np.array(differences)).item()) / 255.0
    return _Score(value, [None, *((255.0 - d.item()) / 255.0 for d in differences)], {})


def _consistency(features_FD: torch.Tensor, *, counted: bool) -> _Score:
    """Each frame against the one before and the first, neither below 0.

    Beside it, of the same features: the cosine of the mean features of the first and the last 15 %
    of frames, and the mean cosine of frames by their distance in time.
    """
    from torch.nn.functional import cosine_similarity

    before = cosine_similarity(features_FD[:-1], features_FD[1:]).tolist()
    first = cosine_similarity(features_FD[:1], features_FD[1:]).tolist()
    each = [(max(0.0, a) + max(0.0, b)) / 2 for a, b in zip(before, first, strict=True)]
    total = functools.reduce(operator.add, each, 0.0)  # one after another, as the package adds
    exact_FD, num = features_FD.float(), len(features_FD)
    head, tail = (exact_FD[a:b].mean(0) for a, b in head_tail(num))
    steps = _distances(num)
    details = {
        "video_sim": total,
        **({"cnt_per_video": num - 1} if counted else {}),
        "head_tail_similarity": cosine_similarity(head, tail, dim=0).item(),
        "similarity_at": {
            "dt_frames": steps,
            "similarity": [
                cosine_similarity(exact_FD[:-dt], exact_FD[dt:]).mean().item() for dt in steps
            ],
        },
    }
    return _Score(total / (num - 1), [None, *each], details)


def _distances(num_frames: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 … frames, as far as the video goes."""
    found = (lead * 10**zeros for zeros in itertools.count() for lead in (1, 2, 5))
    return list(itertools.takewhile(lambda distance: distance < num_frames, found))
