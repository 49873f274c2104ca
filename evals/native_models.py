"""The models of the native dimensions, and the package's formulas on what they give.

Shapes: F frames, D width of the features, C H W a picture.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from engine.operator import Failed
from evals.segments import head_tail
from evals.vbench_worker import _hub as from_hub
from evals.vbench_worker import prepare

if TYPE_CHECKING:
    import torch

CONTEXT = 77
"""Tokens of CLIP's text, with the two that begin and end it."""


class Score(NamedTuple):
    """Of a span in a dimension."""

    value: float
    frames: list[float | None]
    details: dict[str, Any]
    """Beyond the value and the number of frames."""


class Models:
    """What features and their scores come from, on one device."""

    def __init__(self, names: Set[str], folder: Path, device: torch.device):
        self.device, self._folder = device, folder
        prepare(str(folder))
        self.encoders: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        """From what a model is shown, (F, C, H, W), to features (F, D), by name."""
        if "dino" in names:
            self.encoders["dino"] = self._dino()
        if "clip_b" in names:
            self._clip_b = self._clip("ViT-B-32")
            self.encoders["clip_b"] = self._clip_b.encode_image
        if "clip_l" in names:
            clip_l, self._head = self._clip("ViT-L-14"), self._aesthetic_head()
            self.encoders["clip_l"] = lambda shown: clip_l.encode_image(shown).float()
        self._texts: dict[str, tuple[torch.Tensor, bool]] = {}

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

        return torch.nn.functional.normalize(self.encoders[model](shown_FCHW), dim=-1)

    def aesthetics(self, features_FD: torch.Tensor) -> Score:
        """LAION's score / 10."""
        import torch

        with torch.inference_mode():
            scores_F = self._head(features_FD).squeeze(-1) / 10
        return Score(scores_F.mean().item(), scores_F.tolist(), {})

    def style(self, features_FD: torch.Tensor, text: str) -> Score:
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
        return Score(float(np.mean(each)), each, details)

    def alignment(self, features_FD: torch.Tensor, text: str) -> Score:
        """The cosine. Of a text that is too long the end is cut off, and the details say so."""
        import torch

        text_1D, is_cut = self._text(text)
        with torch.inference_mode():
            each = (features_FD @ text_1D.T)[:, 0].tolist()
        return Score(float(np.mean(each)), each, {"truncated": True} if is_cut else {})

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


def flickering(differences: Sequence[np.float32]) -> Score:
    """(255 - mean difference) / 255, the mean being of float32 as in the package."""
    value = (255.0 - np.mean(np.array(differences)).item()) / 255.0
    return Score(value, [None, *((255.0 - d.item()) / 255.0 for d in differences)], {})


def consistency(features_FD: torch.Tensor, *, counted: bool) -> Score:
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
    return Score(total / (num - 1), [None, *each], details)


def _distances(num_frames: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 … frames, as far as the video goes."""
    found = (lead * 10**zeros for zeros in itertools.count() for lead in (1, 2, 5))
    return list(itertools.takewhile(lambda distance: distance < num_frames, found))
