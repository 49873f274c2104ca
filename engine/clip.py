"""CLIP through open-clip: one embedding a clip, and how well a caption fits it.

Shapes: N pictures or texts, D numbers of an embedding.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from engine.operator import Failed, Operator, resource, results
from engine.picture import rgb_of
from engine.schema import CLIPS, EMBEDDING
from engine.weights import Weights

if TYPE_CHECKING:
    import torch

OPENAI = "openai"
_OPENAI_MODELS = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336")
_SENTENCE = re.compile(r"(?<=[.!?。！？])\s+")
_ENDS = 2  # tokens that open-clip puts around a text


@dataclass(frozen=True, kw_only=True)
class ClipModel:
    """A CLIP model of open-clip, as a value.

    OpenAI's weights need QuickGELU. open-clip knows that of the tag `openai`, but only warns where
    the model's configuration says otherwise, and knows nothing of a local file; a local file of one
    of OpenAI's architectures is taken for OpenAI's weights unless `quick_gelu` says it is not.
    """

    name: str = "ViT-L-14"
    """Architecture, as open-clip names it; a folder brings its own."""
    weights: str | Weights = OPENAI
    """Tag of open-clip, or a local file, or a local folder with `open_clip_config.json`."""
    quick_gelu: bool | None = None
    """Activation of both towers; None is what the tag, the folder or the family of a file says."""

    @property
    def label(self) -> str:
        """What rows record of it: architecture and tag, or content of the weights."""
        if isinstance(self.weights, str):
            return f"{self.name}/{self.weights}"
        told = self.weights.describe()["weights"]
        name = "folder" if self.weights.local().is_dir() else self.name
        return f"{name}/{told}"

    def describe(self) -> dict[str, Any]:
        """What tells it from others, as JSON values."""
        own = isinstance(self.weights, str)
        weights = self.weights if own else self.weights.describe()["weights"]
        return {"clip": self.name, "weights": weights, "quick_gelu": self.quick_gelu}

    def check(self) -> None:
        """Raises ValueError where it cannot be loaded here, with the command that fetches it."""
        try:
            from open_clip.pretrained import get_pretrained_cfg
        except ModuleNotFoundError:
            raise ValueError(
                "CLIP needs open-clip-torch and torch: pip install 'reelwright[models]'"
            ) from None
        if isinstance(self.weights, Weights):
            path = self.weights.local()
            if path.is_dir() and not (path / "open_clip_config.json").is_file():
                raise ValueError(
                    f"{path} has no open_clip_config.json: name a folder that open-clip saved, or"
                    " a weights file"
                )
            return
        known = get_pretrained_cfg(self.name, self.weights)
        if not known:
            raise ValueError(f"open-clip has no weights {self.weights!r} of {self.name!r}")
        _fetched(self.name, known)

    def _forced(self) -> bool:
        """Whether open-clip is to be told to use QuickGELU."""
        if self.quick_gelu is not None:
            return self.quick_gelu
        if isinstance(self.weights, str):
            from open_clip.pretrained import get_pretrained_cfg

            return bool(get_pretrained_cfg(self.name, self.weights).get("quick_gelu"))
        return self.weights.local().is_file() and self.name in _OPENAI_MODELS

    def load(self, *, pictures: bool) -> Loaded:
        """The model, on the GPU where there is one.

        Args:
            pictures: The picture tower is needed; else only that of texts is moved to the device.

        Raises:
            ValueError: Its embeddings are not as wide as the column that holds them.
        """
        import open_clip
        import torch

        self.check()
        name, pretrained = self.name, self.weights
        if isinstance(self.weights, Weights):
            path = self.weights.local()
            folder = path.is_dir()
            name, pretrained = (f"local-dir:{path}", None) if folder else (self.name, str(path))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "QuickGELU mismatch")  # it is forced, see above
            model, _, preprocess = open_clip.create_model_and_transforms(
                name, pretrained=pretrained, force_quick_gelu=self._forced()
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if not pictures:
            model.visual = torch.nn.Identity()
        return Loaded(
            model=model.eval().requires_grad_(False).to(device),
            preprocess=preprocess,
            tokenizer=open_clip.get_tokenizer(name),
            device=device,
        )


def _fetched(name: str, known: dict[str, Any]) -> None:
    from huggingface_hub import try_to_load_from_cache

    if "file" in known:
        return
    repository = known.get("hf_hub", "").strip("/")
    files = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    if not any(isinstance(try_to_load_from_cache(repository, f), str) for f in files):
        raise ValueError(
            f"the weights of CLIP {name} are not on this machine: fetch them with"
            f" `hf download {repository}`, or name a local file"
        )


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model in memory."""

    model: Any
    preprocess: Callable[[Any], torch.Tensor]
    tokenizer: Any
    device: torch.device

    def pictures(self, jpegs: Sequence[bytes], at_once: int) -> Iterator[np.ndarray | Failed]:
        """The unit-length embedding of each picture, float32 (D,), or why there is none."""
        import torch

        with ThreadPoolExecutor(2) as threads:  # the next pictures while the model works
            prepared = threads.map(self._prepared, jpegs)
            for start in range(0, len(jpegs), at_once):
                some = [next(prepared) for _ in jpegs[start : start + at_once]]
                good = [p for p in some if not isinstance(p, Failed)]
                found = iter(())
                if good:
                    with torch.inference_mode():
                        batch = torch.stack(good).to(self.device)
                        found = iter(self.model.encode_image(batch, normalize=True).float().cpu())
                yield from (p if isinstance(p, Failed) else next(found).numpy() for p in some)

    def _prepared(self, jpeg: bytes) -> torch.Tensor | Failed:
        from PIL import Image

        try:
            return self.preprocess(Image.fromarray(rgb_of(jpeg)))
        except ValueError as error:
            return Failed("DecodeError", str(error))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """The unit-length embedding of each text, float32 (N, D), however long it is.

        A text that does not fit into the model's context (77 tokens, of which 2 are its ends) is
        cut into windows of whole sentences, as many as fit each, and a sentence that does not fit
        by itself into windows of whole words. The text's embedding is the mean of the windows'
        unit-length ones, weighted by their tokens, at unit length.
        """
        import torch

        windows = [self._windows(text) for text in texts]
        flat = [window for some in windows for window in some]
        with torch.inference_mode():
            tokens = self.tokenizer(flat, self.tokenizer.context_length).to(self.device)
            found_ND = self.model.encode_text(tokens, normalize=True).float().cpu().numpy()
        embeddings, start = [], 0
        for some in windows:
            lengths = np.array([max(1, self._length(w)) for w in some], np.float32)
            mean_D = lengths @ found_ND[start : start + len(some)] / lengths.sum()
            embeddings.append(mean_D / np.linalg.norm(mean_D))
            start += len(some)
        return np.stack(embeddings)

    def _length(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def _windows(self, text: str) -> list[str]:
        room = self.tokenizer.context_length - _ENDS
        if self._length(text) <= room:
            return [text]
        parts: list[str] = []
        for sentence in _SENTENCE.split(text.strip()):
            whole = self._length(sentence) <= room
            parts += [sentence] if whole else self._joined(sentence.split(), room)
        return self._joined(parts, room)

    def _joined(self, parts: Sequence[str], room: int) -> list[str]:
        """Neighbours joined by spaces while they fit; a part that does not fit is cut by tokens."""
        joined: list[str] = []
        for part in parts:
            together = f"{joined[-1]} {part}" if joined else part
            if joined and self._length(together) <= room:
                joined[-1] = together
            elif self._length(part) <= room:
                joined.append(part)
            else:
                tokens = self.tokenizer.encode(part)
                pieces = [tokens[i : i + room] for i in range(0, len(tokens), room)]
                joined += [self.tokenizer.decode(piece).strip() for piece in pieces]
        return joined


@dataclass(frozen=True, kw_only=True)
class Embed(Operator):
    """The mean of the keyframes' unit-length CLIP embeddings; its own length is at most 1.

    It is not brought to unit length: so the mean over keyframes of a cosine with anything is the
    product with it, and the mean of an affine function of the frames' embeddings, such as the
    aesthetic predictor, is that function of it. One forward pass serves the aesthetic score, the
    CLIP score and near-duplicates.
    """

    reads: ClassVar[tuple[str, ...]] = ("keyframes",)
    writes: ClassVar[pa.Schema] = pa.schema(
        [CLIPS.field("clip_embedding"), CLIPS.field("clip_model")]
    )
    libraries: ClassVar[tuple[str, ...]] = ("torch", "open-clip-torch")

    model: ClipModel = ClipModel()  # noqa: RUF009 - a frozen value
    pictures_at_once: int = resource(64)
    """In one forward pass."""

    batch_size: int = resource(32)
    num_gpus: float = resource(0.25)

    def check(self) -> None:
        """The weights are here."""
        self.model.check()

    def load(self) -> Callable[[pa.Table], pa.Table]:
        """Loads the model; a clip of which a keyframe cannot be decoded is a failure."""
        loaded, label = self.model.load(pictures=True), self.model.label

        def measure(clips: pa.Table) -> pa.Table:
            keyframes = [k or [] for k in clips["keyframes"].to_pylist()]
            jpegs = [picture["jpeg"] for clip in keyframes for picture in clip]
            found = loaded.pictures(jpegs, self.pictures_at_once)
            rows: list[dict[str, Any] | Failed] = []
            for clip in keyframes:
                frames = [next(found) for _ in clip]
                rows.append(self._row(frames, label))
            return results(self.writes, rows)

        return measure

    @staticmethod
    def _row(frames: Sequence[np.ndarray | Failed], label: str) -> dict[str, Any] | Failed:
        if not frames:
            return Failed("NoKeyframes", "an embedding needs a keyframe, and there is none")
        good = [f for f in frames if not isinstance(f, Failed)]
        if len(good) < len(frames):
            return next(f for f in frames if isinstance(f, Failed))
        mean_D = np.mean(good, axis=0, dtype=np.float64)
        if len(mean_D) != EMBEDDING.list_size:
            raise ValueError(
                f"CLIP {label} gives {len(mean_D)} numbers, and the column clip_embedding holds"
                f" {EMBEDDING.list_size}: choose a model as wide as ViT-L/14"
            )
        return {"clip_embedding": mean_D, "clip_model": label}


@dataclass(frozen=True, kw_only=True)
class ClipScore(Operator):
    """Cosine of a caption's and a keyframe's CLIP embedding, mean over keyframes, -1 to 1.

    Not the score of Hessel et al. (2021), which is 2.5 times this and at least 0. How captions
    longer than the model's context are read says `Loaded.texts`.

    Source: Mimir (arXiv 2412.03085), appendix A, Caption Filtration, which names no model.
    """

    writes: ClassVar[pa.Schema] = pa.schema([CLIPS.field("clip_score")])
    libraries: ClassVar[tuple[str, ...]] = ("torch", "open-clip-torch")

    of: str = "caption"
    """Column with the caption."""
    model: ClipModel = ClipModel()  # noqa: RUF009 - a frozen value

    num_gpus: float = resource(0.1)

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """The caption, and the embedding with its model."""
        return (self.of, "clip_embedding", "clip_model")

    def check(self) -> None:
        """The weights are here."""
        self.model.check()

    def load(self) -> Callable[[pa.Table], pa.Table]:
        """Loads the tower of texts."""
        loaded, label = self.model.load(pictures=False), self.model.label

        def measure(rows: pa.Table) -> pa.Table:
            captions = rows[self.of].to_pylist()
            texts_ND = loaded.texts(captions) if captions else np.empty((0, 0))
            scores: list[dict[str, float] | Failed] = []
            of_rows = zip(
                rows["clip_embedding"].to_pylist(), rows["clip_model"].to_pylist(), strict=True
            )
            for text_D, (frames_D, model) in zip(texts_ND, of_rows, strict=True):
                if model != label:
                    scores.append(
                        Failed("OtherModel", f"the embedding is of {model}, the score's is {label}")
                    )
                else:
                    scores.append({"clip_score": float(text_D @ np.asarray(frames_D, np.float64))})
            return results(self.writes, scores)

        return measure
