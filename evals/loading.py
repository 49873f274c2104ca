"""Models that are evaluated, loaded: exports, diffusers pipelines, and endpoints over HTTP.

No code runs that lies in a model's folder, nothing is fetched, and no pickle is read.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.operator import Failed
from evals.models import COMMON, Asked, Made, Make, Model, Setting

FPS = {
    "AllegroPipeline": 15.0,
    "AnimateDiffPipeline": 8.0,
    "AnimateDiffSDXLPipeline": 8.0,
    "CogVideoXPipeline": 8.0,
    "EasyAnimatePipeline": 8.0,
    "HunyuanVideo15Pipeline": 24.0,
    "HunyuanVideoPipeline": 15.0,
    "Kandinsky5T2VPipeline": 24.0,
    "LattePipeline": 8.0,
    "LTXPipeline": 24.0,
    "MochiPipeline": 30.0,
    "SanaVideoPipeline": 16.0,
    "SkyReelsV2Pipeline": 24.0,
    "TextToVideoSDPipeline": 8.0,
    "WanPipeline": 16.0,
}
"""Frames a second that videos are shown at, by the examples in diffusers' documentation. Later
checkpoints of a class may differ (CogVideoX 1.5 has 16, Wan 2.2 5B 24): the setting `fps`."""
Run = Callable[[Asked, Mapping[str, Any]], Made]
_CALLED = {
    "steps": ("num_inference_steps",),
    "frames": ("num_frames", "video_length", "frames"),
    "fps": ("frame_rate", "fps"),
}
"""What pipelines of diffusers call our settings, where it is something else."""
_PIPELINES = {
    "rise": ("trainers.rise_pipeline", "RisePipeline"),
    "finetune": ("trainers.finetune_pipeline", "FinetunedPipeline"),
    "mimir": ("trainers.mimir_pipeline", "MimirPipeline"),
    "semanticgen": ("trainers.semantic_pipeline", "SemanticGenPipeline"),
}
_PRECISION = Setting(str, None, ("bf16", "fp32"))
_NOT_TEXT = re.compile(r"image2?to?video|img2vid|i2v|video2?to?video|v2v|videotovideo", re.I)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def load(model: Model, device: str) -> Make:
    """See `Model.load`."""
    run = loaded(model, device)
    return lambda asked: [run(one, model.settings) for one in asked]


def loaded(model: Model, device: str) -> Run:
    """What makes a video of a text, a seed and settings, on `device`."""
    if model.kind == "export":
        return _export(model, device)
    if model.kind == "diffusers":
        return _diffusers(model, device)
    assert model.kind == "served", "a folder of videos makes none"
    from evals.served import Endpoint

    return Endpoint(model.at).ask


def _export(model: Model, device: str) -> Run:
    from trainers.generation import load_pipeline

    precision = model.settings.get("precision")
    pipe = load_pipeline(Path(model.at), device=device, precision=precision)

    def run(asked: Asked, settings: Mapping[str, Any]) -> Made:
        how = {name: value for name, value in settings.items() if name != "precision"}
        one = pipe(asked.text, seed=asked.seed, **how)
        return Made(
            frames=one.video,
            fps=one.fps,
            rephrased=one.rephrased if one.rephrased != asked.text else None,
            notes=one.notes,
            timings=one.timings,
        )

    return run


def settings_of_export(system: str) -> dict[str, Setting]:
    """What pipelines of a system of `trainers` take, with their defaults."""
    if system not in _PIPELINES:
        raise ValueError(f"this program knows no system {system}: update it")
    module, name = _PIPELINES[system]
    pipeline = getattr(importlib.import_module(module), name)
    taken = [n for n in (*COMMON, *pipeline.modes) if n != "reference"]  # a video, for all alike
    hints = typing.get_type_hints(pipeline.__call__)
    parameters = inspect.signature(pipeline.__call__).parameters
    found = {
        name: _setting(hints.get(name), parameters[name].default)
        for name in taken
        if name in parameters
    }
    return found | {"precision": _PRECISION}


def _setting(hint: Any, default: Any) -> Setting:
    """A parameter by its annotation, of which None and further forms are passed over."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return Setting(str, default, options)
    for kind in (bool, float, int, str):
        if hint is kind or kind in options:
            return Setting(kind, default)
    return Setting(str, default)


def _diffusers(model: Model, device: str) -> Run:
    import torch
    from diffusers import DiffusionPipeline

    precision = model.settings.get("precision") or ("bf16" if device == "cuda" else "fp32")
    dtypes = {"default": torch.bfloat16 if precision == "bf16" else torch.float32}
    index = json.loads((Path(model.at) / "model_index.json").read_text(encoding="utf-8"))
    if "AutoencoderKLWan" in (index.get("vae") or ()):
        dtypes["vae"] = torch.float32  # as its authors decode
    pipe = DiffusionPipeline.from_pretrained(
        model.at,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        dtype=dtypes,
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    parameters = inspect.signature(pipe.__call__).parameters

    def run(asked: Asked, settings: Mapping[str, Any]) -> Made:
        arguments = {_called(name, parameters): value for name, value in settings.items()}
        began = time.perf_counter()
        with torch.no_grad():
            found = pipe(
                prompt=asked.text,
                generator=torch.Generator("cpu").manual_seed(asked.seed),
                output_type="np",
                **{name: value for name, value in arguments.items() if name in parameters},
            )
        return Made(
            frames=_bytes_of(np.asarray(found.frames[0])),
            fps=settings["fps"],
            timings={"pipeline_s": time.perf_counter() - began},
        )

    return run


def _bytes_of(video_FHW3: np.ndarray) -> np.ndarray:
    """uint8 frames from ones between 0 and 1."""
    if not np.isfinite(video_FHW3).all():
        raise Failed("NotFinite", "the model made pixels that are no numbers: try precision=fp32")
    return (video_FHW3.clip(0, 1) * 255).round().astype(np.uint8)


def settings_of_diffusers(name: str, folder: Path) -> tuple[str, dict[str, Setting]]:
    """Class of the pipeline in a folder, and what it takes, with its defaults.

    Raises:
        ValueError: It does not make videos of text alone, or would need code or pickles.
    """
    pipeline = _class_of(name, folder)
    parameters = inspect.signature(pipeline.__call__).parameters
    hints = _hints(pipeline.__call__)
    found = {}
    for ours, kind in COMMON.items():
        theirs = _called(ours, parameters)
        if theirs in parameters:
            default = parameters[theirs].default
            found[ours] = Setting(kind, None if default is None else kind(default))
    known = found.get("fps")
    found["fps"] = Setting(float, FPS.get(pipeline.__name__) or (known and known.default))
    for other, parameter in parameters.items():
        is_ours = any(other == _called(ours, parameters) for ours in COMMON)
        is_number = isinstance(parameter.default, bool | int | float)
        if is_number and not is_ours and other not in ("return_dict", "num_videos_per_prompt"):
            kind = _setting(hints.get(other), None).kind
            found[other] = Setting(kind if kind is not str else type(parameter.default))
    return pipeline.__name__, found | {"precision": _PRECISION}


def _class_of(name: str, folder: Path) -> Any:
    import diffusers

    try:
        index = dict(json.loads((folder / "model_index.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"model {name}: {folder / 'model_index.json'} is not what diffusers writes ({error}):"
            " fetch or save the pipeline again"
        ) from None
    kind = index.get("_class_name")
    pipeline = getattr(diffusers, kind, None) if isinstance(kind, str) else None
    if not isinstance(pipeline, type) or not issubclass(pipeline, diffusers.DiffusionPipeline):
        raise ValueError(
            f"model {name}: {folder} is of class {kind}, which diffusers {diffusers.__version__}"
            " does not have: update diffusers (code that lies in a folder is never run)"
        )
    parameters = inspect.signature(pipeline.__call__).parameters
    needs = [
        p.name
        for p in list(parameters.values())[1:]
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.name != "prompt"
    ]
    frames = _called("frames", parameters) in parameters
    if needs or not frames or "prompt" not in parameters or _NOT_TEXT.search(kind):
        raise ValueError(
            f"model {name}: {kind} of {folder} does not make videos of text alone"
            f" ({'it needs ' + ', '.join(needs) if needs else 'see its documentation'}): name a"
            " folder of a text-to-video pipeline, such as WanPipeline"
        )
    for part, value in index.items():
        if isinstance(value, list) and not part.startswith("_"):
            _check_part(name, folder, part, value)
    return pipeline


def _check_part(name: str, folder: Path, part: str, value: Sequence[Any]) -> None:
    import diffusers.pipelines

    library = value[0]
    is_ours = library in (None, "diffusers", "transformers") or (
        isinstance(library, str) and hasattr(diffusers.pipelines, library)
    )
    if not is_ours:
        raise ValueError(
            f"model {name}: {part} of {folder} is of {library}, neither diffusers nor transformers:"
            " code of others is never run"
        )
    if str(value[1]).startswith("Auto") and _brings_code(folder / part):
        raise ValueError(
            f"model {name}: {part} of {folder} comes with code of its own (auto_map), which is"
            " never run: name a pipeline whose parts are classes of diffusers and transformers"
        )
    files = [path.suffix for path in (folder / part).glob("*")]
    if any(s in _PICKLES for s in files) and ".safetensors" not in files:
        raise ValueError(
            f"model {name}: {part} of {folder} has its weights as a pickle, which can run any code:"
            " convert them with save_pretrained(safe_serialization=True)"
        )


def _brings_code(folder: Path) -> bool:
    """Whether a part's own classes are named in it, about which transformers would ask."""
    return any('"auto_map"' in p.read_text(errors="replace") for p in folder.glob("*config*.json"))


def _called(ours: str, parameters: Mapping[str, Any]) -> str:
    """What a pipeline calls a setting of ours."""
    return next((name for name in _CALLED.get(ours, ()) if name in parameters), ours)


def _hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # a name that is imported for type checkers alone
        return {}
