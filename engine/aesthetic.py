"""LAION's aesthetic predictor, on the CLIP embedding that is already there."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from engine.clip import ClipModel
from engine.operator import Failed, Operator, resource, results
from engine.schema import CLIPS
from engine.weights import Weights

LAYERS = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
"""Shapes of the head's weights by layer; the layers between are dropout."""
CLIP_MODEL = "ViT-L-14/openai"
"""Whose embeddings LAION's head was fitted to."""
ANY = "any"
"""What a head says under `clip_model` in its metadata that reads embeddings of every model."""

_NAME = "sac+logos+ava1-l14-linearMSE.pth"
LAION = Weights(at=f"~/.cache/reelwright/{_NAME}")
"""The improved aesthetic predictor, where the command that `AestheticScore.check` names puts it."""
_URL = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"


@dataclass(frozen=True, kw_only=True)
class AestheticScore(Operator):
    """How pleasing people find a clip's keyframes, about 1 to 10, mean over keyframes.

    The head is five linear layers without activations, so it is affine in a picture's unit-length
    embedding, and its value at the mean of the keyframes' embeddings is the mean of its values,
    exactly: no picture is looked at again. The layers are multiplied into one vector, in float64.

    Misleads: drawings and renderings score high, plain photographs and screenshots low; motion,
    sharpness and compression are hardly seen, since CLIP sees 224 pixels; nothing bounds it.

    Source:
        Mimir (arXiv 2412.03085), appendix A, Aesthetic Filtration, footnote 1: the predictor of
        github.com/christophschuhmann/improved-aesthetic-predictor, `simple_inference.py`.
    """

    reads: ClassVar[tuple[str, ...]] = ("clip_embedding", "clip_model")
    writes: ClassVar[pa.Schema] = pa.schema([CLIPS.field("aesthetic_score")])

    weights: Weights = LAION
    """A file of torch or safetensors with the layers of `LAYERS`."""
    clip: ClipModel | None = None
    """The model that embeds the keyframes: one that is surely not the head's is refused by `check`,
    and a row with embeddings of another one fails. None: whatever the rows have."""

    batch_size: int = resource(1024)

    def check(self) -> None:
        """The head is here and is one, and the CLIP model may be the one it was fitted to."""
        head = self._head()
        if self.clip is not None and head.clip_model != ANY and not _is_openai(self.clip):
            raise ValueError(
                f"the aesthetic predictor {self.weights.at} reads embeddings of"
                f" {head.clip_model}, and the recipe's CLIP is {self.clip.label}: give OpenAI's"
                " ViT-L-14 (by tag, or a local file or folder of it)"
            )

    def load(self) -> Callable[[pa.Table], pa.Table]:
        """Loads the head, which needs no GPU."""
        head = self._head()
        expected = self.clip.label if self.clip else None

        def measure(clips: pa.Table) -> pa.Table:
            embedded = zip(
                clips["clip_embedding"].to_pylist(), clips["clip_model"].to_pylist(), strict=True
            )
            return results(self.writes, [_score(head, expected, *row) for row in embedded])

        return measure

    def describe(self) -> dict[str, Any]:
        """See `Operator.describe`; says how to fetch the head where it is missing."""
        self._file()
        return super().describe()

    def _file(self) -> Path:
        if self.weights == LAION and not Path(LAION.at).expanduser().exists():
            url = _URL + _NAME.replace("+", "%2B")
            raise ValueError(
                f"the aesthetic predictor is not on this machine: fetch it with `curl -fL"
                f" --create-dirs -o {LAION.at} {url}`, or name a local file by --aesthetic-head"
            )
        path = self.weights.local()
        if path.is_dir():
            raise ValueError(f"{path} is a folder: name the file with the predictor")
        return path

    def _head(self) -> _Head:
        return _read(self._file())


def _score(
    head: _Head, expected: str | None, embedding: list[float], model: str
) -> dict[str, float] | Failed:
    if expected not in (None, model):
        return Failed(
            "OtherModel", f"embeddings of {expected} are to be scored, and these are of {model}"
        )
    return {"aesthetic_score": float(np.dot(head.weight, embedding) + head.bias)}


def _is_openai(clip: ClipModel) -> bool:
    """Whether it can be OpenAI's ViT-L-14: of local weights only the activation tells."""
    if isinstance(clip.weights, str):
        name = clip.name.removesuffix("-quickgelu")
        return f"{name}/{clip.weights}" == CLIP_MODEL and clip.activates
    return clip.activates


class _Head(NamedTuple):
    """The layers as one: weight . embedding + bias."""

    weight: np.ndarray
    bias: float
    clip_model: str


def _read(path: Path) -> _Head:
    tensors, metadata = _tensors(path)
    kinds = {"weight": lambda shape: shape, "bias": lambda shape: shape[:1]}
    wanted = {f"layers.{n}.{k}": of(s) for n, s in LAYERS.items() for k, of in kinds.items()}
    found = {name: tuple(np.shape(value)) for name, value in tensors.items()}
    if found != wanted:
        wrong = sorted(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))
        raise ValueError(
            f"{path} is no aesthetic predictor: of {wrong[0]} it has {found.get(wrong[0])}, and"
            f" {wanted.get(wrong[0])} is needed ({len(wrong)} tensors differ)"
        )
    weight, bias = np.eye(LAYERS[0][1]), np.zeros(LAYERS[0][1])
    for n in LAYERS:
        own = np.asarray(tensors[f"layers.{n}.weight"], np.float64)
        weight, bias = own @ weight, own @ bias + tensors[f"layers.{n}.bias"]
    return _Head(weight[0], float(bias[0]), metadata.get("clip_model", CLIP_MODEL))


def _tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """What a checkpoint holds, and its metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "numpy") as file:
                return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
        import torch

        found = torch.load(path, map_location="cpu", weights_only=True)
        return {name: value.double().numpy() for name, value in found.items()}, {}
    except (
        SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        OSError,
        EOFError,
        AttributeError,
        TypeError,
    ) as error:
        said = str(error).partition("\n")[0][:200]
        raise ValueError(f"{path} is no checkpoint of torch or safetensors: {said}") from error
