"""The vbench package as it is, run video by video; it is the only module that touches the package.

Another Python with other library versions runs this too (VBench's own environment), so it imports
nothing but the standard library at its top, nothing of this project at all, and what it takes and
gives is JSON. The functions of the package are called that take loaded models (`compute_*` loads
them again on every call). In the package nothing is changed for good: what a call replaces (a
frame loader, to count frames) it puts back. It is one long module since it travels alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import io
import logging
import math
import os
import pickle
import platform
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

VERSION = "0.1.5"
"""Of the package: the one that this module was written against."""
MARKER = "TINY"
"""A file in a cache of small random models, whose sizes are not what the package expects."""

_CLIP_B, _CLIP_L = "clip_model/ViT-B-32.pt", "clip_model/ViT-L-14.pt"
_VICLIP = ("ViCLIP/ViClip-InternVid-10M-FLT.pth", "ViCLIP/bpe_simple_vocab_16e6.txt.gz")
_GRIT = ("grit_model/grit_b_densecap_objectdet.pth", "bert-base-uncased/vocab.txt")
FILES: dict[str, tuple[str, ...]] = {
    "subject_consistency": (
        "dino_model/facebookresearch_dino_main/hubconf.py",
        "dino_model/dino_vitbase16_pretrain.pth",
        "torch_home/hub/checkpoints/dino_vitbase16_pretrain.pth",
    ),
    "background_consistency": (_CLIP_B,),
    "temporal_flickering": (),
    "motion_smoothness": ("amt_model/amt-s.pth",),
    "dynamic_degree": ("raft_model/models/raft-things.pth",),
    "aesthetic_quality": (_CLIP_L, "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth"),
    "imaging_quality": ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",),
    "object_class": _GRIT,
    "multiple_objects": _GRIT,
    "human_action": ("umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",),
    "color": _GRIT,
    "spatial_relationship": _GRIT,
    "scene": (
        "caption_model/tag2text_swin_14m.pth",
        "bert-base-uncased/vocab.txt",
        "bert-base-uncased/pytorch_model.bin",
    ),
    "appearance_style": (_CLIP_B,),
    "temporal_style": _VICLIP,
    "overall_consistency": _VICLIP,
}
"""What the package reads below its cache, by dimension; where one is missing it would fetch it."""

_LEAST = {
    "subject_consistency": 2,
    "background_consistency": 2,
    "temporal_flickering": 2,
    "motion_smoothness": 3,
    "dynamic_degree": 2,
}
"""Frames of a video below which there is no number (or, of dynamic_degree, one of nothing)."""
_TOLD = (
    "object_class",
    "multiple_objects",
    "color",
    "spatial_relationship",
    "scene",
    "appearance_style",
)
"""Dimensions that need more than a prompt: `auxiliary`."""
_SAYS_CHARS = 300

Rows = list[dict[str, Any]]
Span = list[int | None]
"""First frame, and the frame after the last; None is the file's own."""
Score = Callable[[str, str, Any], Rows]
"""From a file, its prompt and what else the dimension is told to the package's own rows of it."""


def prepare(cache: str) -> None:
    """Makes the package importable in this process, with its weights below `cache`.

    Libraries that the package was written for had two modules that today's lack: of
    `pkg_resources` openai-clip needs `packaging`, of `numpy.lib.function_base` UMT imports `disp`
    and never uses it.
    """
    os.environ |= {
        "VBENCH_CACHE_DIR": cache,
        "TORCH_HOME": str(Path(cache, "torch_home")),
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
    }
    try:
        import pkg_resources  # noqa: F401
    except ImportError:
        import packaging.version

        shim = types.ModuleType("pkg_resources")
        shim.packaging = packaging
        sys.modules["pkg_resources"] = shim
    try:
        import numpy.lib.function_base  # noqa: F401
    except ImportError:
        shim = types.ModuleType("numpy.lib.function_base")
        shim.disp = print
        sys.modules["numpy.lib.function_base"] = shim
    utils = package("utils")
    for module in list(sys.modules.values()):  # they copied it when they were imported
        if module is utils or (
            getattr(module, "__name__", "").startswith("vbench.") and hasattr(module, "CACHE_DIR")
        ):
            module.CACHE_DIR = cache


@contextlib.contextmanager
def undone() -> Iterator[None]:
    """While the package is imported or builds models: what it changes for its process is undone.

    It sets up the root logger, and has Pillow take torn pictures for whole ones.
    """
    from PIL import ImageFile

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    are_torn_taken = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        ImageFile.LOAD_TRUNCATED_IMAGES = are_torn_taken


def package(name: str) -> Any:
    """A module of the package."""
    with undone():
        return importlib.import_module(f"vbench.{name}")


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of a module or an object is another one for a while."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


class _Instead:
    """A module with some attributes replaced, for one module that uses it."""

    def __init__(self, module: Any, **others: Any):
        self.__dict__.update(others)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextlib.contextmanager
def tiny_sizes(dimensions: list[str]) -> Iterator[None]:
    """While models are built of the sizes that `evals.tiny_weights` writes, in place of the real.

    Architectures that have their size in the package's code are replaced: ViCLIP, UMT, MUSIQ and
    Tag2Text.
    """
    with contextlib.ExitStack() as stack:
        if {"temporal_style", "overall_consistency"} & {*dimensions}:
            viclip = package("third_party.ViCLIP.viclip")
            stack.enter_context(replaced(viclip, "clip_joint_l14", tiny_viclip_vision))
            stack.enter_context(replaced(viclip, "clip_text_l14", _tiny_viclip_text))
        if "human_action" in dimensions:
            stack.enter_context(replaced(package("human_action"), "create_model", tiny_umt))
        if "imaging_quality" in dimensions:
            stack.enter_context(replaced(package("imaging_quality"), "MUSIQ", tiny_musiq))
        if "scene" in dimensions:
            from evals.tiny_scene import shrink

            stack.enter_context(shrink())
        yield


TINY_TEXT = {"width": 64, "heads": 1, "layers": 2}
"""Of the text tower of the small ViCLIP; CLIP's has the same."""


def tiny_viclip_vision(
    *, input_resolution: int = 224, num_frames: int = 8, kernel_size: int = 1, **_: Any
) -> Any:
    """ViCLIP's own vision tower, small."""
    return package("third_party.ViCLIP.viclip_vision").VisionTransformer(
        input_resolution=input_resolution,
        patch_size=32,
        width=64,
        layers=2,
        heads=1,
        output_dim=768,
        kernel_size=kernel_size,
        num_frames=num_frames,
    )


def _tiny_viclip_text(*, embed_dim: int, context_length: int, vocab_size: int, **_: Any) -> Any:
    return package("third_party.ViCLIP.viclip_text").CLIP_TEXT(
        embed_dim, context_length, vocab_size, *TINY_TEXT.values(), checkpoint_num=0
    )


def tiny_umt(_name: str = "", **given: Any) -> Any:
    """UMT's own transformer, small."""
    from torch.nn import LayerNorm

    kept = ("num_classes", "all_frames", "tubelet_size", "use_mean_pooling", "init_scale")
    with contextlib.redirect_stdout(io.StringIO()):
        return package("third_party.umt.models.modeling_finetune").VisionTransformer(
            patch_size=16,
            embed_dim=64,
            depth=2,
            num_heads=1,
            qkv_bias=True,
            norm_layer=functools.partial(LayerNorm, eps=1e-6),
            **{name: given[name] for name in kept},
        )


def tiny_musiq(**given: Any) -> Any:
    """Pyiqa's own MUSIQ, small."""
    from pyiqa.archs.musiq_arch import MUSIQ

    return MUSIQ(hidden_size=48, mlp_dim=96, num_heads=2, num_layers=2, **given)


class VBenchWorker:
    """Models of some dimensions, loaded once, and the package's score of one video after another.

    Args:
        dimensions: VBench's names; what can share a model does.
        cache: Folder with the package's weights, laid out as it lays out its own.
        device: As torch names it.
        threads: Of torch on the CPU; None leaves it.
        visible_gpus: CUDA_VISIBLE_DEVICES, for a process that has not loaded torch yet.

    Raises:
        FileNotFoundError: Weights are missing; names them. The package would try to fetch them.
        ValueError: Another version of the package is installed, or a dimension is unknown.
    """

    def __init__(
        self,
        dimensions: list[str],
        cache: str,
        device: str = "cpu",
        threads: int | None = None,
        visible_gpus: str | None = None,
    ):
        if visible_gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus
        if found := [name for name in dimensions if name not in FILES]:
            raise ValueError(f"VBench has no dimension {found[0]}: it has {', '.join(FILES)}")
        self.cache = os.path.abspath(cache)
        self.is_tiny = Path(self.cache, MARKER).exists()
        _must_exist(self.cache, dimensions)
        _must_be_installed()
        prepare(self.cache)
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        self.device = torch.device(device)
        self._models: dict[str, Any] = {}
        self._seen = _Seen()
        self._run: dict[str, Score] = {}
        self._loaders: dict[str, list[tuple[Any, str]]] = {}
        sizes = tiny_sizes(dimensions) if self.is_tiny else contextlib.nullcontext()
        with undone(), _quiet(), torch.no_grad(), sizes:
            for name in dimensions:
                self._run[name] = self._load(name)

    def about(self) -> dict[str, Any]:
        """Versions of what computes, the device, and the precision of the weights."""
        import cv2
        import torch

        found = {"python": platform.python_version(), "cv2": cv2.__version__}
        for name in ("vbench", "torch", "numpy", "transformers", "timm", "decord", "pyiqa"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
        kinds = {
            str(p.dtype).removeprefix("torch.")
            for model in self._models.values()
            if isinstance(model, torch.nn.Module)
            for p in model.parameters()
        }
        found |= {"device": str(self.device), "dtype": "+".join(sorted(kinds)) or None}
        if self.device.type == "cuda":
            found["gpu"] = torch.cuda.get_device_name(self.device)
        return found | ({"tiny": True} if self.is_tiny else {})

    def score(
        self,
        dimension: str,
        path: str,
        prompt: str,
        auxiliary: dict[str, Any] | None = None,
        span: Span | None = None,
    ) -> dict[str, Any]:
        """What the package says of one video.

        Args:
            dimension: One of those loaded.
            path: A `.mp4` (in lower case: the package knows no other), named PROMPT-N.mp4.
            prompt: The short one.
            auxiliary: What VBench's index has for this prompt under this dimension.
            span: Frames [start, stop) of the file are the video, where a stop of None is its end;
                None is all.

        Returns:
            `row`, the package's row of this video without its path, or None with a `note` where the
            package leaves the video out (`no_object`); `num_frames` that the dimension counted;
            `frame_scores`, one a frame (None for one that has none) in the unit of the row, or
            None; `details`, the row and what merging videos needs beside it. Where it cannot be
            scored: `error_type` and `error`, one line.
        """
        import torch

        self._seen.clear()
        try:
            _check_asked(dimension, path, prompt, auxiliary)
            with _quiet(), torch.no_grad(), self._watched(dimension, span):
                rows = self._run[dimension](path, prompt, auxiliary)
            return _result(dimension, rows, self._seen)
        except Exception as error:  # noqa: BLE001 - whatever a video makes the package raise
            return _failure(error)

    def _load(self, dimension: str) -> Score:
        """As `compute_*` of the dimension does it; `_load_*` are its lines before the scoring."""
        module = package(dimension)
        self._loaders[dimension] = [(module, "load_video")]
        known = package("utils").init_submodules([dimension], local=True)[dimension]
        return getattr(self, f"_load_{dimension}")(module, known)

    def _shared(self, key: str, build: Callable[[], Any]) -> Any:
        if key not in self._models:
            self._models[key] = build()
        return self._models[key]

    def _clip(self, module: Any, path: str) -> Any:
        return self._shared(path, lambda: module.clip.load(path, device=self.device)[0])

    def _load_subject_consistency(self, module: Any, known: dict[str, Any]) -> Score:
        model = self._shared("dino", lambda: _hub(known).to(self.device))
        return lambda path, *_: module.subject_consistency(model, [path], self.device, False)[1]

    def _load_background_consistency(self, module: Any, known: list[Any]) -> Score:
        model = self._clip(module, known[0])
        return lambda path, *_: module.background_consistency(
            model, None, [path], self.device, False
        )[1]

    def _load_temporal_flickering(self, module: Any, _known: Any) -> Score:
        self._loaders["temporal_flickering"] = [(module, "get_frames")]
        return lambda path, *_: module.temporal_flickering([path])[1]

    def _load_motion_smoothness(self, module: Any, known: dict[str, str]) -> Score:
        with _inert(module):
            motion = module.MotionSmoothness(known["config"], known["ckpt"], self.device)
        self._models["amt"] = motion.model
        self._loaders["motion_smoothness"] = [(motion.fp, "get_frames")]
        return lambda path, *_: module.motion_smoothness(motion, [path])[1]

    def _load_dynamic_degree(self, module: Any, known: dict[str, str]) -> Score:
        given = {"small": False, "mixed_precision": False, "alternate_corr": False}
        with _inert(module):
            degree = module.DynamicDegree(module.edict(known | given), self.device)
        self._models["raft"] = degree.model
        self._loaders["dynamic_degree"] = [(degree, "extract_frame")]
        return lambda path, *_: module.dynamic_degree(degree, [path])[1]

    def _load_aesthetic_quality(self, module: Any, known: list[str]) -> Score:
        clip = self._clip(module, known[0])
        with _inert(module):
            head = module.get_aesthetic_model(known[1]).to(self.device)
        self._models["laion"] = head
        head.register_forward_hook(
            lambda _model, _given, out: self._seen.frames.extend((out.squeeze(-1) / 10).tolist())
        )
        return lambda path, *_: module.laion_aesthetic(head, clip, [path], self.device)[1]

    def _load_imaging_quality(self, module: Any, known: dict[str, str]) -> Score:
        with _inert(importlib.import_module("pyiqa.archs.arch_util")):
            model = module.MUSIQ(pretrained_model_path=known["model_path"]).to(self.device)
        model.training = False
        self._models["musiq"] = model
        model.register_forward_hook(
            lambda _model, _given, out: self._seen.frames.append(float(out))
        )
        return lambda path, *_: module.technical_quality(model, [path], self.device)[1]

    def _load_appearance_style(self, module: Any, known: dict[str, str]) -> Score:
        return self._told(module.appearance_style, self._clip(module, known["name"]))

    def _load_temporal_style(self, module: Any, known: dict[str, str]) -> Score:
        return self._viclip(module, module.temporal_style, known)

    def _load_overall_consistency(self, module: Any, known: dict[str, str]) -> Score:
        return self._viclip(module, module.overall_consistency, known)

    def _viclip(self, module: Any, of: Callable[..., Any], known: dict[str, str]) -> Score:
        def build() -> tuple[Any, Any]:
            vocabulary = str(Path(self.cache, _VICLIP[1]))
            # The default was read from the cache of whoever imported the module first.
            module.SimpleTokenizer.__init__.__defaults__ = (vocabulary,)
            tokenizer = module.SimpleTokenizer(vocabulary)
            with _inert(package("third_party.ViCLIP.viclip")):
                model = module.ViCLIP(tokenizer=tokenizer, **known)
            self._models["viclip"] = model.to(self.device)
            return self._models["viclip"], tokenizer

        model, tokenizer = self._shared("viclip and its tokenizer", build)
        name = module.__name__.rpartition(".")[2]
        self._loaders[name] = [(module, "read_frames_decord_by_fps")]

        def score(*given: Any) -> Rows:
            # A default that is kept between calls, by text alone: those of another model would do.
            module.get_text_features.__defaults__[0].clear()
            return of(model, _entries(*given), tokenizer, self.device)[1]

        return score

    def _load_human_action(self, module: Any, known: list[str]) -> Score:
        """Its function loads the model itself: it is let do so once, and given that one after."""
        create = module.create_model

        def keep(*given: Any, **named: Any) -> Any:
            self._models["umt"] = create(*given, **named)
            return self._models["umt"]

        with (
            _inert(module),
            replaced(module, "create_model", keep),
            contextlib.suppress(ZeroDivisionError),  # the mean of no videos, its last line
        ):
            module.human_action(known[0], [], self.device)
        loaded = _Instead(module.torch, load=lambda *_, **__: {})

        def score(path: str, *_: Any) -> Rows:
            with (
                replaced(module, "create_model", lambda *_, **__: self._models["umt"]),
                replaced(module, "torch", loaded),
            ):
                return module.human_action(known[0], [path], self.device)[1]

        return score

    def _grit(self, module: Any, known: dict[str, str], task: str) -> Any:
        def build() -> Any:
            detector = module.DenseCaptioning(self.device)
            with contextlib.chdir(self.cache):  # for bert-base-uncased, looked for by that name
                getattr(detector, task)(**known)
            return detector

        return self._shared(f"grit {task}", build)

    def _load_object_class(self, module: Any, known: dict[str, str]) -> Score:
        return self._told(module.object_class, self._grit(module, known, "initialize_model_det"))

    def _load_multiple_objects(self, module: Any, known: dict[str, str]) -> Score:
        model = self._grit(module, known, "initialize_model_det")
        return self._told(module.multiple_objects, model)

    def _load_spatial_relationship(self, module: Any, known: dict[str, str]) -> Score:
        model = self._grit(module, known, "initialize_model_det")
        return self._told(module.spatial_relationship, model)

    def _load_color(self, module: Any, known: dict[str, str]) -> Score:
        colour = self._told(module.color, self._grit(module, known, "initialize_model"))

        def score(*given: Any) -> Rows:
            try:
                return colour(*given)
            except ZeroDivisionError:  # the mean of no videos: the object was found in none
                return []

        return score

    def _load_scene(self, module: Any, known: dict[str, Any]) -> Score:
        with contextlib.chdir(self.cache):  # for bert-base-uncased, looked for by that name
            model = module.tag2text_caption(**known)
        self._models["tag2text"] = model.eval().to(self.device)
        return self._told(module.scene, self._models["tag2text"])

    def _told(self, of: Callable[..., Any], model: Any) -> Score:
        return lambda *given: of(model, _entries(*given), self.device)[1]

    @contextlib.contextmanager
    def _watched(self, dimension: str, span: Span | None) -> Iterator[None]:
        """While the package scores a video: its frames are counted, and limited to the span."""
        least = _LEAST.get(dimension, 1)
        module = package(dimension)
        with contextlib.ExitStack() as stack:
            for owner, name in self._loaders[dimension]:
                turned = dimension == "human_action"
                counting = self._seen.counting(getattr(owner, name), least, turned=turned)
                stack.enter_context(replaced(owner, name, counting))
            if dimension in ("subject_consistency", "background_consistency"):
                counting = self._seen.similarity(module.F.cosine_similarity)
                functional = _Instead(module.F, cosine_similarity=counting)
                stack.enter_context(replaced(module, "F", functional))
            if span is not None:
                utils = package("utils")
                reader = functools.partial(_SpanReader, utils.VideoReader, span)
                stack.enter_context(replaced(utils, "VideoReader", reader))
                if hasattr(module, "cv2"):
                    capture = functools.partial(_SpanCapture, module.cv2, span)
                    cv2 = _Instead(module.cv2, VideoCapture=capture)
                    stack.enter_context(replaced(module, "cv2", cv2))
            yield


class _Seen:
    """What is noticed of one video while the package scores it."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.num_frames: int | None = None
        self.frames: list[float] = []
        """Scores that a model gave, in order."""
        self.similarities: list[float] = []
        """Of each frame but the first: with the one before, with the first."""

    def counting(self, load: Callable[..., Any], least: int, *, turned: bool) -> Callable[..., Any]:
        """A frame loader (or what thins frames out) that says how many there are, if enough."""

        def call(*given: Any, **named: Any) -> Any:
            if given and isinstance(given[0], list):
                _check_count(len(given[0]), least)
            frames = load(*given, **named)
            # Only UMT's frames come out turned, as (channels, frames, height, width).
            self.num_frames = frames.shape[1] if turned else len(frames)
            if not (given and isinstance(given[0], list)):
                _check_count(self.num_frames, least)
            return frames

        return call

    def similarity(self, cosine: Callable[..., Any]) -> Callable[..., Any]:
        """The cosine of two frames, remembered as the package takes it."""

        def call(*given: Any, **named: Any) -> Any:
            found = cosine(*given, **named)
            self.similarities.append(max(0.0, found.item()))
            return found

        return call


class _SpanReader:
    """decord's reader of a file, of whose frames only [start, stop) are there."""

    def __init__(self, reader: Callable[..., Any], span: Span, path: str, **named: Any):
        self._reader = reader(path, **named)
        start, stop = span
        self._start, self._stop = start or 0, len(self._reader) if stop is None else stop
        _check_span(span, len(self._reader))

    def __len__(self) -> int:
        return self._stop - self._start

    def get_batch(self, indices: Any) -> Any:
        return self._reader.get_batch([self._start + int(i) for i in indices])

    def get_avg_fps(self) -> float:
        return self._reader.get_avg_fps()


class _SpanCapture:
    """OpenCV's reader of a file, of whose frames only [start, stop) are there.

    Frames are decoded in order from the first: where OpenCV seeks, it misses frames of some files.
    """

    def __init__(self, cv2: Any, span: Span, path: str):
        self._capture = cv2.VideoCapture(path)
        self._span, self._at = span, 0

    def isOpened(self) -> bool:  # noqa: N802 - OpenCV's name
        return self._capture.isOpened()

    def get(self, what: int) -> float:
        return self._capture.get(what)

    def read(self) -> tuple[bool, Any]:
        start, stop = self._span
        while self._at < (start or 0) and self._capture.grab():
            self._at += 1
        if stop is not None and self._at >= stop > (start or 0):
            return False, None
        found, frame = self._capture.read()
        if found:
            self._at += 1
        elif stop is not None or self._at <= (start or 0):
            _check_span(self._span, self._at)
        return found, frame

    def release(self) -> None:
        self._capture.release()


def _check_span(span: Span, num_frames: int) -> None:
    start, stop = (span[0] or 0), num_frames if span[1] is None else span[1]
    if not 0 <= start < stop <= num_frames:
        raise ValueError(f"frames {start} to {stop} were asked for, the video has {num_frames}")


def _check_count(num_frames: int, least: int) -> None:
    if num_frames < least:
        raise ValueError(f"needs at least {least} frames, has {num_frames}")


def _check_asked(dimension: str, path: str, prompt: str, auxiliary: Any) -> None:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    if not path.endswith(".mp4"):
        raise ValueError(f"VBench reads .mp4, in lower case, and this is {os.path.basename(path)}")
    if dimension in _TOLD and not auxiliary:
        raise ValueError(f"{dimension} needs what VBench's index says of a prompt beside it")
    named = os.path.basename(path).rpartition("-")[0]
    if dimension == "human_action" and named != prompt:
        raise ValueError(f"the action is read from the file's name, which is of {named!r}")


def _must_exist(cache: str, dimensions: list[str]) -> None:
    wanted = dict.fromkeys(file for name in dimensions for file in FILES[name])
    if missing := [file for file in wanted if not Path(cache, file).exists()]:
        raise FileNotFoundError(f"VBench's weights are not below {cache}: {', '.join(missing)}")


def _must_be_installed() -> None:
    try:
        found = importlib.metadata.version("vbench")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"vbench {VERSION} is not installed for {sys.executable}: run make vbench-env"
        ) from None
    if found != VERSION:
        raise ValueError(f"vbench {VERSION} is needed, {found} is installed for {sys.executable}")


class _Inert:
    """What an object of any class becomes that is no part of weights: it does nothing."""

    def __new__(cls, *_given: Any, **_named: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_given: Any, **_named: Any):
        pass

    def __call__(self, *_given: Any, **_named: Any) -> _Inert:
        return self

    def __setstate__(self, _state: Any) -> None:
        pass

    def __setitem__(self, _key: Any, _value: Any) -> None:
        pass

    def append(self, _value: Any) -> None:
        pass


_WEIGHTS = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
}


class _Unpickler(pickle.Unpickler):
    """Reads weights, and imports and calls nothing else that a file names."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if (module, name) in _WEIGHTS else _Inert


@contextlib.contextmanager
def _inert(module: Any) -> Iterator[None]:
    """While a module of the package loads weights: pickles run no code.

    From torch 2.6 on torch refuses files that hold more than weights, which AMT's do (the
    configuration of its training); the package's remedy since is to run whatever is in them.
    """
    torch = module.torch

    def load(path: Any, **named: Any) -> Any:
        named.pop("weights_only", None)  # which pyiqa says is False
        try:
            return torch.load(path, **named, weights_only=True)
        except pickle.UnpicklingError:
            reader = types.ModuleType("inert_pickle")
            reader.Unpickler = _Unpickler
            reader.load = lambda file, **how: _Unpickler(file, **how).load()
            return torch.load(path, **named, weights_only=False, pickle_module=reader)

    with replaced(module, "torch", _Instead(torch, load=load)):
        yield


def _hub(known: dict[str, Any]) -> Any:
    """DINO from its folder, whose code imports modules of names that anything may have.

    That code is the folder's own and runs; the weights that it loads are read as weights alone.
    """
    import torch

    names = ("utils", "vision_transformer", "hubconf")
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    read = functools.partial(torch.hub.load_state_dict_from_url, weights_only=True)
    try:
        with replaced(torch.hub, "load_state_dict_from_url", read):
            return torch.hub.load(**known)
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(others)


def _entries(path: str, prompt: str, auxiliary: Any) -> Rows:
    """One video as an entry of VBench's index."""
    told = {"auxiliary_info": auxiliary} if auxiliary else {}
    return [{"prompt": prompt, "video_list": [path], **told}]


def _result(dimension: str, rows: Rows, seen: _Seen) -> dict[str, Any]:
    if not rows and dimension == "color":
        counted = {"num_frames": seen.num_frames}
        return {"row": None, "note": "no_object", "details": None, "frame_scores": None, **counted}
    if not rows:
        raise AssertionError
    row = {k: _plain(v) for k, v in rows[0].items() if k != "video_path"}
    if not math.isfinite(row["video_results"]):
        raise ArithmeticError(f"VBench gives {row['video_results']}")
    details = row | {"num_frames": seen.num_frames}
    frames: list[float | None] | None = list(seen.frames) or row.get("frame_results")
    if dimension == "spatial_relationship":
        frames = None  # of sixteen frames somewhere in the video
    if pairs := seen.similarities:
        found = [(a + b) / 2 for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
        frames = [None, *found]
        # The row has its quotient by the frames, from which it does not come back to the bit.
        details["video_sim"] = functools.reduce(lambda total, one: total + one, found, 0.0)
    return {
        "row": row,
        "num_frames": seen.num_frames,
        "frame_scores": frames,
        "details": details,
    }


def _plain(value: Any) -> Any:
    """Numpy's numbers as Python's."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value.item() if hasattr(value, "item") else value


def _failure(error: Exception) -> dict[str, Any]:
    kind, said = type(error).__name__, " ".join(str(error).split())
    if kind == "AssertionError" and not said:  # what the package asserts is that there are frames
        kind, said = "DecodeError", "no frame of the video could be decoded"
    return {"error_type": kind, "error": (said or kind)[:_SAYS_CHARS]}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The package prints what it does."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
