"""A model that is shown pictures and asked in words: the interface, and transformers behind it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from engine.operator import Failed
from engine.picture import rgb_of
from engine.weights import Weights

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import BatchFeature

T = TypeVar("T")
Precision = Literal["auto", "bfloat16", "float16", "float32"]
"""Of a model's weights; auto is bfloat16 on a GPU and float32 on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One frame shown to the model."""

    jpeg: bytes
    time_s: float | None = None
    """When it is shown, from the clip's start; None for an image."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question about pictures."""

    text: str
    """The user's words."""
    pictures: tuple[Picture, ...]
    """In order of time."""
    video: bool = False
    """The pictures are frames of one video, not separate images."""
    system: str | None = None
    """What the model is told before the user speaks."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said."""

    text: str
    """Word for word, without special tokens."""
    finished: bool
    """False: it was cut off by `max_new_tokens`."""


Ask = Callable[[Sequence[Request]], list[Answer | Failed]]
"""Answers a batch in order; a request that cannot be answered is a `Failed` in its place."""


@dataclass(frozen=True, kw_only=True)
class Chat(ABC):
    """A model to ask, as a value: its parameters. It is a field of the operators that ask it."""

    libraries: ClassVar[tuple[str, ...]] = ()
    """Distributions that shape the answers; their major.minor versions are in `describe`."""

    max_new_tokens: int = 512
    """An answer is cut off after as many tokens."""

    @abstractmethod
    def open(self) -> Ask:
        """Loads the model, or makes the client; gives the function that answers a batch."""

    def check(self) -> None:  # noqa: B027 - not every backend needs something
        """Raises ValueError, with what to do, where something it needs is missing."""

    def describe(self) -> dict[str, Any]:
        """Class, parameters and library versions as JSON values, for fingerprints."""
        parameters = {}
        for field in dataclasses.fields(self):
            if field.metadata.get("resource"):
                continue
            value = getattr(self, field.name)
            parameters[field.name] = value.describe() if isinstance(value, Weights) else value
        return {
            "chat": type(self).__name__,
            "parameters": parameters,
            "libraries": {
                name: ".".join(importlib.metadata.version(name).split(".")[:2])
                for name in self.libraries
            },
        }


@dataclass(frozen=True, kw_only=True)
class TransformersChat(Chat):
    """Any image-text-to-text or video model of transformers, held in this process.

    Answers are decoded greedily: the same question gets the same words, whatever the checkpoint's
    own generation settings, unless `temperature` says otherwise.
    """

    libraries: ClassVar[tuple[str, ...]] = ("torch", "torchvision", "transformers")

    weights: Weights
    max_pixels: int = 448 * 800
    """Larger pictures are shrunk to as many pixels before the processor sees them. Tokens, and so
    time and memory, grow with it: for Qwen2-VL and Qwen2.5-VL one for each 28 x 28 px of an image
    or of two frames of a video, for Qwen3-VL 32 x 32. SmolVLM and InternVL have fixed sizes."""
    dtype: Precision = "auto"
    temperature: float = 0.0
    """Above 0 words are drawn at random: answers then differ from run to run."""
    repetition_penalty: float = 1.0
    """1 is none; above, what was said becomes less likely."""
    remote_code_of: str | None = None
    """Code that comes with a checkpoint runs only where this repeats `weights.at`."""

    def check(self) -> None:
        """The weights are here, and of a kind that can be asked."""
        if self.max_pixels < 1 or self.max_new_tokens < 1 or self.temperature < 0:
            raise ValueError(
                "max_pixels and max_new_tokens are 1 or more, and temperature is 0 or more: found"
                f" {self.max_pixels}, {self.max_new_tokens} and {self.temperature}"
            )
        check_model(self.weights, self.remote_code_of)

    def open(self) -> Ask:
        """Loads model and processor, onto the GPU where there is one."""
        model = VisionLanguageModel(self.weights, self.dtype, self.remote_code_of)
        settings = {
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "do_sample": self.temperature > 0,
            # None takes back what the checkpoint's own settings say.
            "temperature": self.temperature or None,
            "top_p": None,
            "top_k": None,
        }

        def ask(requests: Sequence[Request]) -> list[Answer | Failed]:
            return model.answer(
                requests, self.max_pixels, lambda asked: model.generate(asked, settings)
            )

        return ask


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A request whose pictures are decoded."""

    request: Request
    images: tuple[Image, ...]
    video: bool
    """As frames of a video, which takes two of one size at least, and their times."""


class VisionLanguageModel:
    """A model of transformers in memory, with its processor; on the GPU where there is one."""

    def __init__(
        self, weights: Weights, dtype: Precision = "auto", remote_code_of: str | None = None
    ):
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.utils.logging import disable_progress_bar

        check_model(weights, remote_code_of)
        disable_progress_bar()
        folder, remote = str(weights.local()), remote_code_of is not None
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto":
            dtype = "bfloat16" if self.device == "cuda" else "float32"
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=remote)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"  # so that all answers of a batch start together
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        loaded = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=self.dtype, trust_remote_code=remote
        )
        self.model = loaded.to(self.device).eval()
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        self._ends = ends if isinstance(ends, list) else [ends]
        marks = {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        for kind in ("image_token", "video_token"):
            marks.add(getattr(self.processor, kind, None) or "<image>")
        self._control = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))))
        video = getattr(self.processor, "video_processor", None)
        self._sees_video = video is not None
        # Qwen's processors give patches of all pictures in one row, so that any go together; the
        # others stack them.
        self._stacks = not self._sees_video or "video_grid_thw" not in video.model_input_names

    def answer(
        self,
        requests: Sequence[Request],
        max_pixels: int,
        batch: Callable[[Sequence[Shown]], Sequence[T | Failed]],
    ) -> list[T | Failed]:
        """Answers in order: `batch` is called with what can go through the processor together.

        A request with a picture that cannot be decoded is `Failed`.
        """
        answers: list[T | Failed | None] = [None] * len(requests)
        groups: dict[tuple[bool, int], list[tuple[int, Shown]]] = defaultdict(list)
        for i, request in enumerate(requests):
            try:
                shown = self._show(request, max_pixels)
            except ValueError as error:
                answers[i] = Failed("DecodeError", str(error))
                continue
            count = len(shown.images)
            groups[shown.video, count if self._stacks else min(count, 1)].append((i, shown))
        for members in groups.values():
            given = batch([shown for _, shown in members])
            for (i, _), one in zip(members, given, strict=True):
                answers[i] = one
        return [a for a in answers if a is not None]

    def inputs(self, asked: Sequence[Shown]) -> BatchFeature:
        """What the model takes, padded on the left, on its device."""
        kwargs: dict[str, Any] = {
            "padding": True,
            # Frames are chosen already; SmolVLM's processor would choose again.
            "do_sample_frames": False,
        }
        if asked[0].video:
            kwargs["video_metadata"] = [[video_metadata(s)] for s in asked]
        features = self.processor.apply_chat_template(
            [self._conversation(s) for s in asked],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=kwargs,
        )
        return features.to(self.device, dtype=self.dtype)

    def generate(self, asked: Sequence[Shown], settings: Mapping[str, Any]) -> list[Answer]:
        """What it says to each."""
        import torch

        features = self.inputs(asked)
        with torch.inference_mode():
            given = self.model.generate(**features, **settings)
        said = given[:, features["input_ids"].shape[1] :]
        ended = torch.isin(said, torch.tensor(self._ends, device=said.device)).any(1).tolist()
        texts = self.tokenizer.batch_decode(
            said, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return [Answer(text=t, finished=e) for t, e in zip(texts, ended, strict=True)]

    def next_logits(self, asked: Sequence[Shown]) -> torch.Tensor:
        """Logits of the first token of each answer, float32 (request, vocabulary)."""
        import torch

        with torch.inference_mode():
            out = self.model(**self.inputs(asked), use_cache=False, logits_to_keep=1)
        return out.logits[:, -1].float()

    def _show(self, request: Request, max_pixels: int) -> Shown:
        images = tuple(small(p.jpeg, max_pixels) for p in request.pictures)
        video = (
            request.video
            and self._sees_video
            and len(images) > 1
            and all(p.time_s is not None for p in request.pictures)
        )
        if video and len({i.size for i in images}) > 1:
            raise ValueError("the frames of a video differ in size")
        return Shown(request=request, images=images, video=video)

    def _conversation(self, shown: Shown) -> list[dict[str, Any]]:
        import numpy as np

        content: list[dict[str, Any]] = [{"type": "image", "image": i} for i in shown.images]
        if shown.video:
            content = [{"type": "video", "video": np.stack([np.asarray(i) for i in shown.images])}]
        content.append({"type": "text", "text": self._plain(shown.request.text)})
        spoken: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if shown.request.system is not None:
            told = {"type": "text", "text": self._plain(shown.request.system)}
            spoken.insert(0, {"role": "system", "content": [told]})
        return spoken

    def _plain(self, text: str) -> str:
        """Text in which "<|image_pad|>" and the like are words: captions from outside hold any."""
        return self._control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)


def small(jpeg: bytes, max_pixels: int) -> Image:
    """A JPEG's picture, shrunk to at most `max_pixels`; never enlarged.

    Raises:
        ValueError: It is no picture that can be decoded.
    """
    from PIL import Image

    image = Image.fromarray(rgb_of(jpeg))
    scale = math.sqrt(max_pixels / (image.width * image.height))
    if scale >= 1:
        return image
    width, height = (max(1, int(side * scale)) for side in image.size)
    width = min(width, max_pixels // height)  # of a sliver that is one pixel high
    height = min(height, max_pixels // width)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def video_metadata(shown: Shown) -> dict[str, Any]:
    """When its frames are seen, as the processors of transformers take it.

    They know frames of a video of constant rate by index: here of one with 1000 frames a second.
    Where the rate of the frames shown matters (Qwen2.5-VL) it is their mean.
    """
    times = [p.time_s for p in shown.request.pictures if p.time_s is not None]
    gap_s = max((times[-1] - times[0]) / (len(times) - 1), 1e-3)
    return {
        "fps": 1000.0,
        "frames_indices": [round(1000 * t) for t in times],
        "total_num_frames": round(1000 * gap_s * len(times)),
        "duration": gap_s * len(times),
        "width": shown.images[0].width,
        "height": shown.images[0].height,
    }


def check_model(weights: Weights, remote_code_of: str | None = None) -> None:
    """Whether a checkpoint is here and can be loaded by `VisionLanguageModel`; loads nothing.

    Raises:
        ValueError: It is not or cannot; says what to do.
    """
    missing = [
        name
        for name in ("torch", "torchvision", "transformers", "PIL")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ValueError(
            f"{weights.at} needs {', '.join(missing)}: pip install 'reelwright[models]'"
        )
    if remote_code_of not in (None, weights.at):
        raise ValueError(f"remote_code_of is {remote_code_of!r}, but the weights are {weights.at}")
    path = weights.local() / "config.json"
    if not path.is_file():
        raise ValueError(f"{weights.at} has no config.json: it is no checkpoint of transformers")
    config = json.loads(path.read_text(encoding="utf-8"))
    kind = config.get("model_type", "?")
    # It reads the cache of keys and values as tuples: github.com/zai-org/CogVLM2/issues/156
    if any(name.startswith("CogVLM") for name in config.get("architectures") or ()):
        raise ValueError(
            f"the code that comes with {weights.at} is written for transformers 4.40 and does not"
            f" run with {importlib.metadata.version('transformers')}: serve it with an environment"
            " of its own behind an OpenAI-compatible endpoint, and ask that endpoint"
        )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN,
    )

    if kind in KNOWN:
        pass
    elif "auto_map" not in config:
        raise ValueError(
            f"{weights.at} is a {kind} model, which transformers does not know as one that is"
            " shown pictures: name another"
        )
    elif remote_code_of is None:
        raise ValueError(
            f"{weights.at} comes with code of its own, which runs on this machine when it is"
            f" loaded: read it, then allow it with remote_code_of={weights.at!r}"
        )
    if kind == "smolvlm" and importlib.util.find_spec("num2words") is None:
        raise ValueError(f"the processor of {weights.at} needs num2words: pip install num2words")
