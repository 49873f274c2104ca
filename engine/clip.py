"""CLIP through open-clip: the keyframes' embedding, and how well a caption agrees with it.

One forward pass over the keyframes serves the aesthetic score, the CLIP score and the look-up of
near-duplicates: all three read the embedding that `Embed` stores.

Shapes: B pictures, W windows of a text, L tokens, D width of the embedding, C H W a picture.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from engine import storage
from engine.operator import Failed, Operator, resource, results
from engine.schema import CLIPS, EMBEDDING
from engine.weights import Weights

if TYPE_CHECKING:
    import torch
    from open_clip import SimpleTokenizer

WIDTH: int = EMBEDDING.list_size
"""Of the embedding that the table stores."""

Precision = Literal["float32", "float16", "bfloat16"]
Tower = Literal["image", "text"]
Frame = tuple[int, bytes]
"""Row that a keyframe is of, and its JPEG."""

_OPENAI = (
    *("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64"),
    *("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336"),
)
"""Architectures of which there are weights of OpenAI."""
_CONFIG, _CHECKPOINTS = "open_clip_config.json", (".safetensors", ".bin", ".pth")
_PREPROCESS = ("mean", "std", "interpolation", "resize_mode")
_SENTENCE_END = re.compile(
    r"(?<=[.!?…])\s+|(?<=[.!?…][\"'”’)\]])\s+|(?<=[。！？])\s*"  # CJK writes no space
)


@dataclass(frozen=True, kw_only=True)
class ClipModel:
    """A CLIP model of open-clip, as a value.

    The activation is part of the weights: OpenAI's were trained with QuickGELU, and give other
    numbers, silently, with GELU. open-clip 3 takes GELU for `ViT-L-14` even with its own tag
    `openai` (it only warns), and for any file. Here it is what open-clip's list of weights says of
    the tag, whether they come from the cache or from a file: a local file of an architecture that
    OpenAI trained is taken for OpenAI's weights, unless `tag` or `quick_gelu` says otherwise.
    """

    name: str = "ViT-L-14"
    """Architecture, as open-clip names it; a folder brings its own."""
    weights: str | Weights = "openai"
    """A tag of open-clip, whose weights lie in the cache of the Hugging Face hub; or a file (any
    that open-clip reads, and OpenAI's own TorchScript archives, told by their hashes); or a folder
    (or hub id) with open_clip_config.json and weights."""
    tag: str | None = None
    """Which training a local file comes from: says how it was trained. None: `openai`."""
    quick_gelu: bool | None = None
    """The activation; None: as open-clip's list says of the tag, or as the folder says."""
    dtype: Precision = "float32"
    """Of the arithmetic; the others are autocast, for GPUs, and move scores by some 0.001."""

    @property
    def label(self) -> str:
        """What is recorded beside numbers: `ViT-L-14/openai`, or content in place of the tag.

        Raises:
            ValueError: See `check`.
        """
        told = self.describe()
        # A file says nothing itself; without a word it is of OpenAI's kind.
        file = isinstance(self.weights, Weights) and self._folder() is None
        usual = file or self._usual()
        unusual = {(True, False): "+gelu", (False, True): "+quickgelu"}
        return f"{told['name']}/{told['weights']}{unusual.get((usual, self.activates), '')}"

    @property
    def activates(self) -> bool:
        """Whether the towers have QuickGELU, as OpenAI's weights need it.

        Raises:
            ValueError: Nothing says it of these weights.
        """
        return self._usual() if self.quick_gelu is None else self.quick_gelu

    def _usual(self) -> bool:
        folder = self._folder()
        if folder is not None:
            return bool(_config(folder).get("quick_gelu"))
        tag = self._tag()
        if tag == "openai" and self.name.removesuffix("-quickgelu") in _OPENAI:
            return True  # without importing torch: fingerprints are asked for often
        import open_clip

        config = open_clip.get_model_config(self.name) or {}
        trained = open_clip.get_pretrained_cfg(self.name, tag)
        if not trained and isinstance(self.weights, Weights):
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(self.name)) or "none is listed"
            raise ValueError(
                f"open-clip has no weights {tag!r} of {self.name}, so nothing says the activation"
                f" of {self.weights.at}: give one of its tags ({tags}), or quick_gelu"
            )
        return bool(trained.get("quick_gelu") or config.get("quick_gelu"))

    def _tag(self) -> str:
        return self.weights if isinstance(self.weights, str) else self.tag or "openai"

    def _folder(self) -> Path | None:
        path = self.weights.local() if isinstance(self.weights, Weights) else None
        return path if path is not None and path.is_dir() else None

    def check(self) -> None:
        """Raises ValueError, with what to do, where something is missing or cannot serve.

        Nothing is fetched, and no network is used.
        """
        self._find()

    def describe(self) -> dict[str, Any]:
        """What tells this model's numbers from another's, as JSON values."""
        local = isinstance(self.weights, Weights)
        folder = self._folder() is not None
        return {
            "name": "folder" if folder else self.name,  # which brings its own
            **(self.weights.describe() if local else {"weights": self.weights}),
            "preprocessing": self.tag if local and not folder else None,
            "quick_gelu": self.activates,
            "dtype": self.dtype,
        }

    def load(self, tower: Tower) -> Loaded:
        """One tower, on the GPU where there is one; the other is dropped before.

        Raises:
            ValueError: The weights are missing, or do not fit.
        """
        import open_clip
        import torch
        from safetensors import SafetensorError

        found = self._find()
        is_archive = found.file is not None and _is_torchscript(found.file)
        if is_archive:
            _check_archive(found.file, self.name)
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(
                found.at,
                pretrained=str(found.file) if found.file else None,
                weights_only=not is_archive,  # which open-clip reads only so
                **{f"image_{key}": found.trained.get(key) for key in _PREPROCESS},
                quick_gelu=found.quick_gelu,
            )
        except (
            RuntimeError,
            ValueError,
            TypeError,
            KeyError,
            OSError,
            EOFError,
            pickle.UnpicklingError,
            zipfile.BadZipFile,
            SafetensorError,
        ) as error:
            said = " ".join(str(error).split())[:200]
            where = found.file or found.at
            raise ValueError(f"{where} holds no weights of {found.label}: {said}") from error
        drop = [n for n, _ in model.named_children() if (n == "visual") == (tower == "text")]
        for name in drop:
            delattr(model, name)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = model.eval().requires_grad_(False).to(device)
        return Loaded(model, preprocess, found.label, device, getattr(torch, self.dtype))

    def tokenizer(self) -> SimpleTokenizer:
        """CLIP's own.

        Raises:
            ValueError: The model has another.
        """
        import open_clip

        found = self._find()
        text = found.config.get("text_cfg", {})
        if text.get("hf_tokenizer_name") or "siglip" in self.name.lower():
            raise ValueError(f"{found.label} has a tokenizer of its own: captions need CLIP's")
        return open_clip.get_tokenizer(found.at)

    def _find(self) -> _Found:
        """Where the weights are and how they are to be read."""
        import open_clip

        folder = self._folder()
        if folder is not None:
            config = _config(folder)
            if not any(next(folder.glob(f"*{end}"), None) for end in _CHECKPOINTS):
                raise ValueError(
                    f"{folder} has {_CONFIG}, and no weights beside it: fetch them, too"
                )
            at = f"local-dir:{folder}"
            return _wide(_Found(at, None, config, {}, self.activates, self.label))
        config = None if ":" in self.name else open_clip.get_model_config(self.name)
        if config is None:
            raise ValueError(
                f"open-clip has no model {self.name!r}: see open_clip.list_models(), or give a"
                f" folder with {_CONFIG} as weights"
            )
        tag = self._tag()
        trained = open_clip.get_pretrained_cfg(self.name, tag)
        if isinstance(self.weights, Weights):
            file = self.weights.local()
        elif tag not in (tags := open_clip.list_pretrained_tags_by_model(self.name)):
            raise ValueError(
                f"open-clip has no weights {tag!r} of {self.name}: it has {', '.join(tags)}"
            )
        else:
            file = _cached(self.name, tag, trained)
        return _wide(_Found(self.name, file, config, trained, self.activates, self.label))


class _Found(NamedTuple):
    """Weights on this machine."""

    at: str
    """Model as open-clip calls it."""
    file: Path | None
    """Checkpoint; None: open-clip finds it in the folder."""
    config: dict[str, Any]
    """The architecture."""
    trained: dict[str, Any]
    """What open-clip's list says of the tag: preprocessing and activation."""
    quick_gelu: bool
    label: str


def _config(folder: Path) -> dict[str, Any]:
    """The architecture that a folder of open-clip has."""
    file = folder / _CONFIG
    if not file.is_file():
        raise ValueError(f"{folder} has no {_CONFIG}: name a folder of open-clip, or a file")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))["model_cfg"]
        missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(config)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no configuration of open-clip: it needs model_cfg") from error
    if missing:
        raise ValueError(f"{file} is no configuration of open-clip: no {', '.join(missing)}")
    if named := config["text_cfg"].get("hf_model_name"):  # whose own code open-clip would ask about
        raise ValueError(f"{file} takes its text tower from {named!a}: one of CLIP's own is needed")
    return config


def _wide(found: _Found) -> _Found:
    if found.config["embed_dim"] != WIDTH:
        raise ValueError(
            f"{found.label} embeds in {found.config['embed_dim']} numbers: the table's column"
            f" clip_embedding has {WIDTH}, as ViT-L-14 has"
        )
    return found


def _cached(name: str, tag: str, trained: dict[str, Any]) -> Path:
    """The file that open-clip would load for a tag, without a look at the network."""
    from huggingface_hub import try_to_load_from_cache
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    if "file" in trained:
        return Path(trained["file"])
    repository, _, file = trained.get("hf_hub", "").rpartition("/")
    names = [f"{Path(file).stem}.safetensors", file] if file else []
    for wanted in names or [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]:
        found = try_to_load_from_cache(repository, wanted) if repository else None
        if isinstance(found, str):
            return Path(found)
    raise ValueError(
        f"the weights {tag} of {name} are not on this machine: fetch them with `python -c"
        ' "import open_clip as o; o.download_pretrained(o.get_pretrained_cfg('
        f"'{name}', '{tag}'))\"`, or give a local file or folder as weights"
    )


def _is_torchscript(file: Path) -> bool:
    """Whether it is an archive of TorchScript, as torch itself tells."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        names = [name.partition("/") for name in archive.namelist()]
    return len({top for top, _, _ in names}) == 1 and "constants.pkl" in [n for *_, n in names]


def _check_archive(file: Path, name: str) -> None:
    """Raises ValueError unless it is OpenAI's own: a TorchScript archive can run code on loading.

    OpenAI's addresses hold the hashes, from which open-clip's list has them.
    """
    import open_clip

    listed = open_clip.get_pretrained_cfg(name.removesuffix("-quickgelu"), "openai") or {}
    found = storage.sha256_of_file(file)
    if found not in listed.get("url", "").split("/"):
        raise ValueError(
            f"{file} is a TorchScript archive, which can hold code, and not OpenAI's of {name} (its"
            f" sha256 is {found[:16]}…): save its state dict as .safetensors, and name that"
        )


class Loaded(NamedTuple):
    """A tower in memory."""

    model: torch.nn.Module
    preprocess: Callable[[Image.Image], torch.Tensor]
    """The model's own, float32 (C, H, W)."""
    label: str
    device: torch.device
    dtype: torch.dtype

    def embed_images(self, pictures_BCHW: torch.Tensor) -> np.ndarray:
        """Unit-length embeddings, float32 (B, D)."""
        return self._embed(self.model.encode_image, pictures_BCHW)

    def embed_texts(self, tokens_WL: torch.Tensor) -> np.ndarray:
        """Unit-length embeddings, float32 (W, D)."""
        return self._embed(self.model.encode_text, tokens_WL)

    def _embed(self, encode: Callable[..., torch.Tensor], batch: torch.Tensor) -> np.ndarray:
        import torch

        cast = self.dtype is not torch.float32
        exact = contextlib.nullcontext()
        if self.device.type == "cuda" and not cast:
            # cuDNN would round the patches to TF32, which costs 0.001 of the score.
            exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with (
            torch.inference_mode(),
            exact,
            torch.autocast(self.device.type, self.dtype, enabled=cast),
        ):
            found = encode(batch.to(self.device))
        with torch.inference_mode():
            return torch.nn.functional.normalize(found.float(), dim=-1).cpu().numpy()


@dataclass(frozen=True, kw_only=True)
class Embed(Operator):
    """CLIP embedding of a clip: the mean of its keyframes' unit-length image embeddings.

    The mean is not brought to unit length, so that means over keyframes follow from it exactly: of
    a cosine with a text (a dot product with its unit vector) and of a score that is affine in the
    unit-length embedding (LAION's aesthetic predictor). Its own length tells how much the
    keyframes agree: 1 is all the same.

    Misleads where the picture is much wider than high: the model sees the square in its middle.
    """

    reads: ClassVar[tuple[str, ...]] = ("keyframes",)
    writes: ClassVar[pa.Schema] = pa.schema(
        [CLIPS.field("clip_embedding"), CLIPS.field("clip_model")]
    )
    libraries: ClassVar[tuple[str, ...]] = ("open-clip-torch", "pillow", "torch", "torchvision")

    model: ClipModel = ClipModel()

    batch_size: int = resource(64)
    num_cpus: float = resource(2.0)
    """Also the threads that read pictures while the model looks at those before."""
    num_gpus: float = resource(0.25)
    pictures_per_pass: int = resource(64)
    """Keyframes that the model sees at once."""

    def check(self) -> None:
        """The weights are here, and as wide as the column."""
        self.model.check()

    def load(self) -> Callable[[pa.Table], pa.Table]:
        """Loads the vision tower, onto the GPU where there is one."""
        import torch

        tower = self.model.load("image")
        pool = ThreadPoolExecutor(max(1, math.ceil(self.num_cpus)))

        def read(frame: Frame) -> torch.Tensor | str:
            try:
                with Image.open(io.BytesIO(frame[1])) as picture:
                    return tower.preprocess(picture.convert("RGB"))
            # SyntaxError: a damaged PNG
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                return f"a keyframe of {len(frame[1])} bytes cannot be decoded: {error}"

        def measure(clips: pa.Table) -> pa.Table:
            rows = [row or () for row in clips["keyframes"].to_pylist()]
            frames = [(i, k["jpeg"]) for i, row in enumerate(rows) for k in row]
            parts = _parts(frames, self.pictures_per_pass)
            sums = np.zeros((len(rows), WIDTH))
            faults: dict[int, str] = {}
            for part, found in zip(parts, _ahead(pool, read, parts), strict=True):
                faults |= {
                    i: p for (i, _), p in zip(part, found, strict=True) if isinstance(p, str)
                }
                good = [(i, p) for (i, _), p in zip(part, found, strict=True) if i not in faults]
                if good:
                    owners, pictures = zip(*good, strict=True)
                    np.add.at(sums, list(owners), tower.embed_images(torch.stack(pictures)))
            return results(
                self.writes,
                [
                    _embedded(sums[i], len(row), faults.get(i), tower.label)
                    for i, row in enumerate(rows)
                ],
            )

        return measure


def _embedded(
    sum_D: np.ndarray, count: int, fault: str | None, label: str
) -> dict[str, Any] | Failed:
    if not count:
        return Failed("NoKeyframes", "the clip has no keyframes to look at")
    if fault is not None:
        return Failed("DecodeError", fault)
    mean_D = (sum_D / count).astype(np.float32)
    if not np.isfinite(mean_D).all():
        return Failed("NotFinite", f"{label} gave an embedding that is no number")
    return {"clip_embedding": mean_D, "clip_model": label}


def _parts(frames: Sequence[Frame], size: int) -> list[Sequence[Frame]]:
    return [frames[i : i + size] for i in range(0, len(frames), size)]


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[Frame], Any], parts: Iterable[Sequence[Frame]]
) -> Iterator[list[Any]]:
    """The function's results part by part; one part is worked on ahead of the one asked for."""
    before: list[Future] | None = None
    for part in parts:
        started = [pool.submit(function, frame) for frame in part]
        if before is not None:
            yield [future.result() for future in before]
        before = started
    if before is not None:
        yield [future.result() for future in before]


@dataclass(frozen=True, kw_only=True)
class ClipScore(Operator):
    """Cosine of a caption and a clip's keyframes under CLIP, mean over keyframes; -1 to 1.

    Exactly the mean: the dot product of the text's embedding with the stored mean of the
    keyframes' unit-length embeddings (see `Embed`), so no picture is looked at again.

    CLIP reads 77 tokens, of which two mark start and end. A caption that fits is embedded as it
    is. A longer one is laid into windows of at most 75 tokens, in order: each takes as many whole
    sentences as fit; a sentence that is longer than a window is given to them word by word, and a
    word that is longer, cut. The score is the mean of the windows' scores, each weighted by its
    tokens: what share of the caption agrees with the pictures how well. The mean of the windows'
    unit vectors is not brought to unit length again: that would raise the scores of long captions
    above those of their parts, and a threshold would mean less for them.

    Misleads: photographs agree with any caption by about 0.15, and hardly ever by more than 0.4.
    Counts, positions and negations are hardly seen. A window in the middle of a long caption has
    lost what "it" and "they" stand for.

    Source:
        Mimir (arXiv 2412.03085), appendix A, Caption Filtration: "Semantic alignment between the
        video and the generated caption using CLIP Score"; it names neither the model nor what is
        done with captions of more than 77 tokens. The score is that of Hessel et al., CLIPScore
        (arXiv 2104.08718), equation 1, without its factor 2.5 and its floor at 0.
    """

    writes: ClassVar[pa.Schema] = pa.schema([CLIPS.field("clip_score")])
    libraries: ClassVar[tuple[str, ...]] = ("ftfy", "open-clip-torch", "torch")

    model: ClipModel = ClipModel()
    """The one that embedded the keyframes."""
    of: str = "caption"
    """Column with the text."""

    batch_size: int = resource(64)
    num_gpus: float = resource(0.25)
    windows_per_pass: int = resource(128)
    """Texts that the model reads at once."""

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """The column `of`, and the keyframes' embedding with its model."""
        return (self.of, "clip_embedding", "clip_model")

    def check(self) -> None:
        """The weights are here, and the model reads text as CLIP does."""
        self.model.tokenizer()

    def load(self) -> Callable[[pa.Table], pa.Table]:
        """Loads the text tower, onto the GPU where there is one."""
        tokenizer = self.model.tokenizer()
        tower = self.model.load("text")

        def embed(texts: Sequence[str]) -> list[np.ndarray]:
            room = tokenizer.context_length - 2
            split = [windows(text, tokenizer.encode, room) for text in texts]
            tokens_WL = _padded([w for part in split for w in part], tokenizer)
            step = self.windows_per_pass
            found = [tower.embed_texts(t) for t in tokens_WL.split(step)] if texts else []
            ends = np.cumsum([len(part) for part in split])[:-1]
            parts = np.split(np.concatenate(found), ends) if found else []
            # An empty text is one window without tokens.
            weights = [[max(1, len(w)) for w in part] for part in split]
            return [np.average(p, axis=0, weights=w) for p, w in zip(parts, weights, strict=True)]

        def measure(rows: pa.Table) -> pa.Table:
            scores: list[dict[str, Any] | Failed] = []
            texts = embed(rows[self.of].to_pylist())
            clips = zip(
                texts,
                rows["clip_embedding"].to_pylist(),
                rows["clip_model"].to_pylist(),
                strict=True,
            )
            for text_D, frames_D, label in clips:
                if label != tower.label:
                    message = (
                        f"the keyframes were embedded by {label}, the caption by {tower.label}"
                    )
                    scores.append(Failed("OtherModel", message))
                    continue
                scores.append({"clip_score": float(np.dot(text_D, frames_D))})
            return results(self.writes, scores)

        return measure


def windows(text: str, encode: Callable[[str], list[int]], room: int) -> list[list[int]]:
    """A text's tokens in windows of at most `room`, as `ClipScore` says; at least one.

    Args:
        text: As written.
        encode: Gives the tokens of a text, without marks of start and end.
        room: Tokens in a window.
    """
    whole = encode(text)
    if len(whole) <= room:
        return [whole]
    found: list[list[int]] = []
    for unit in _units(text, encode, room):
        if found and len(found[-1]) + len(unit) <= room:
            found[-1] = found[-1] + unit
        else:
            found.append(unit)
    return found


def _units(text: str, encode: Callable[[str], list[int]], room: int) -> Iterator[list[int]]:
    """Tokens that belong together: of sentences, else of words, else as many as fit."""
    for sentence in filter(None, _SENTENCE_END.split(text)):
        tokens = encode(sentence)
        if len(tokens) <= room:
            yield tokens
            continue
        for word in map(encode, sentence.split()):
            yield from (word[i : i + room] for i in range(0, len(word), room))


def _padded(parts: Sequence[list[int]], tokenizer: SimpleTokenizer) -> torch.Tensor:
    """Windows as the model reads them, int64 (W, L)."""
    import torch

    tokens_WL = torch.zeros(len(parts), tokenizer.context_length, dtype=torch.long)
    for row_L, part in zip(tokens_WL, parts, strict=True):
        marked = [tokenizer.sot_token_id, *part, tokenizer.eot_token_id]
        row_L[: len(marked)] = torch.tensor(marked)
    return tokens_WL
