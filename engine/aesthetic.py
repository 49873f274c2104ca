"""LAION's improved aesthetic predictor, on the embeddings that are stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from engine.operator import Failed, Operator, resource, results
from engine.schema import CLIPS, EMBEDDING
from engine.weights import Weights

if TYPE_CHECKING:
    import torch

FILE = "sac+logos+ava1-l14-linearMSE.pth"
LAION = Weights(at=FILE)
SOURCE = "https://github.com/christophschuhmann/improved-aesthetic-predictor"
CLIP = "ViT-L-14/openai"
"""The model whose embeddings it was fitted to."""
WIDTHS = (EMBEDDING.list_size, 1024, 128, 64, 16, 1)
LAYERS = (0, 2, 4, 6, 7)
"""Places of the linear layers; dropout, which does nothing here, stands between."""


@dataclass(frozen=True, kw_only=True)
class AestheticScore(Operator):
    """How people would rate the keyframes' looks, 1 to 10, mean over keyframes.

    The predictor is linear layers with nothing between them, so the mean of the frames' scores is
    its value at the mean of the frames' embeddings, which is stored. Misleads on drawings and
    screenshots, and says nothing of motion.

    Source:
        Schuhmann, improved-aesthetic-predictor (github.com/christophschuhmann), model
        `sac+logos+ava1-l14-linearMSE`; Mimir (arXiv 2412.03085), appendix A.
    """

    reads: ClassVar[tuple[str, ...]] = ("clip_embedding", "clip_model")
    writes: ClassVar[pa.Schema] = pa.schema([CLIPS.field("aesthetic_score")])
    libraries: ClassVar[tuple[str, ...]] = ("torch",)

    weights: Weights = LAION
    clip: str | None = CLIP
    """Label that the embedding must have; None: any, and the number means what you make of it."""

    batch_size: int = resource(256)

    def check(self) -> None:
        """The weights are here."""
        path(self.weights)

    def load(self) -> Callable[[pa.Table], pa.Table]:
        """Loads the head."""
        head = load_head(path(self.weights))

        def measure(clips: pa.Table) -> pa.Table:
            import torch

            embeddings = np.array(clips["clip_embedding"].to_pylist(), np.float32)
            with torch.inference_mode():
                scores = head(torch.from_numpy(embeddings)).squeeze(-1).tolist()
            models = clips["clip_model"].to_pylist()
            rows = [self._row(s, m) for s, m in zip(scores, models, strict=True)]
            return results(self.writes, rows)

        return measure

    def _row(self, score: float, model: str) -> dict[str, float] | Failed:
        if self.clip is not None and model != self.clip:
            return Failed(
                "OtherModel", f"the embedding is of {model}, and the predictor is for {self.clip}"
            )
        return {"aesthetic_score": score}


def path(weights: Weights) -> Path:
    """The file with the head.

    Raises:
        ValueError: It is not there; says how to fetch it.
    """
    try:
        return weights.local()
    except ValueError:
        raise ValueError(
            f"the aesthetic predictor is not at {weights.at}: fetch it with `curl -LO"
            f" {SOURCE}/raw/main/{FILE.replace('+', '%2B')}`, and name it by --aesthetic-head"
        ) from None


def load_head(file: Path) -> torch.nn.Sequential:
    """The head from a `.pth` or `.safetensors` file.

    Raises:
        ValueError: It holds something else.
    """
    import torch
    from torch import nn

    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        state: dict[str, Any] = load_file(file)
    else:
        state = torch.load(file, map_location="cpu", weights_only=True)
    shapes = zip(WIDTHS, WIDTHS[1:], strict=False)
    layers = [nn.Linear(*shape) for shape in shapes]
    own = {}
    for place, layer in zip(LAYERS, layers, strict=True):
        for name, parameter in layer.named_parameters():
            found = state.get(f"layers.{place}.{name}")
            if found is None or found.shape != parameter.shape:
                has = "none" if found is None else str(tuple(found.shape))
                raise ValueError(
                    f"{file} is no aesthetic predictor: layers.{place}.{name} should have shape"
                    f" {tuple(parameter.shape)}, found {has}"
                )
            own[f"{len(own) // 2}.{name}"] = found.float()
    head = nn.Sequential(*layers)
    head.load_state_dict(own)
    return head.eval().requires_grad_(False)
