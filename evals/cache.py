"""Weights that VBench looks for: which, where below its cache, and how they are fetched."""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from engine.weights import digest
from evals.dimensions import DIMENSIONS

MARKER = "TINY"
"""A file of JSON in a cache that the project built itself from small random models."""
_USED = "https://huggingface.co/OpenGVLab/VBench_Used_Models/resolve/main"
_CLIP = "https://openaipublic.azureedge.net/clip/models"
_BERT = "https://huggingface.co/google-bert/bert-base-uncased/resolve/main"
_DINO = "dino_model/dino_vitbase16_pretrain.pth"


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One file that a dimension is measured with."""

    path: str
    """Below the cache's folder, with slashes."""
    fetch: str
    """A command of the shell that puts it there, run in the cache's folder."""
    sha256: str | None = None
    """Of the whole file: all of its digits, or the first of them; None: it is not known."""
    licence: str | None = None
    """Of these weights; None: look where they come from."""
    about: str


def _download(path: str, url: str) -> str:
    """Goes on where it was interrupted."""
    return f"wget -c -P {Path(path).parent.as_posix()} {url}"


def _published(path: str, folder_url: str, **facts: str | None) -> Weight:
    """A file that is called here what it is called there."""
    return Weight(path=path, fetch=_download(path, f"{folder_url}/{Path(path).name}"), **facts)


def _clip(name: str, sha256: str) -> Weight:
    return _published(
        f"clip_model/{name}.pt",
        f"{_CLIP}/{sha256}",
        sha256=sha256,
        licence="MIT",
        about=f"OpenAI CLIP {name}",
    )


_CLIP_B = _clip("ViT-B-32", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af")
_CLIP_L = _clip("ViT-L-14", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836")
_DINO_CODE = Weight(
    path="dino_model/facebookresearch_dino_main/hubconf.py",
    fetch="git clone --depth 1 https://github.com/facebookresearch/dino"
    " dino_model/facebookresearch_dino_main",
    licence="Apache-2.0",
    about="DINO's own code, which torch.hub imports from a folder",
)
_DINO_WEIGHTS = _published(
    _DINO,
    "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain",
    licence="Apache-2.0",
    about="DINO ViT-B/16, where VBench looks whether to download it",
)
# VBench hands DINO's hubconf the path above, which takes no notice of it and downloads its own copy
# into TORCH_HOME: without the link, a machine without a network fails with both files "there".
_DINO_LINK = Weight(
    path=f"torch_home/hub/checkpoints/{Path(_DINO).name}",
    fetch=f"mkdir -p torch_home/hub/checkpoints && ln -f {_DINO} torch_home/hub/checkpoints/",
    licence="Apache-2.0",
    about="the same file, where DINO's code loads it from",
)
_AMT = _published(
    "amt_model/amt-s.pth",
    "https://huggingface.co/lalala125/AMT/resolve/main",
    licence="CC BY-NC 4.0",
    about="AMT-S, frame interpolation",
)
_RAFT = Weight(
    path="raft_model/models/raft-things.pth",
    fetch="wget -c -P raft_model https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip"
    " && unzip -o raft_model/models.zip models/raft-things.pth -d raft_model",
    about="RAFT trained on FlyingThings, optical flow",
)
_LAION = _published(
    "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
    "https://github.com/LAION-AI/aesthetic-predictor/raw/main",
    licence="MIT",
    about="LAION's linear aesthetic predictor on CLIP ViT-L/14",
)
_MUSIQ = _published(
    "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",
    "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights",
    sha256="358bb6af",  # torch.hub puts the first digits into the name
    licence="PolyForm-Noncommercial 1.0 (pyiqa)",
    about="MUSIQ trained on SPAQ",
)
_GRIT = _published(
    "grit_model/grit_b_densecap_objectdet.pth",
    "https://datarelease.blob.core.windows.net/grit/models",
    about="GRiT-B, objects and dense captions",
)
_VOCABULARY = _published(
    "bert-base-uncased/vocab.txt",
    _BERT,
    licence="Apache-2.0",
    about="BERT's words, of GRiT's and Tag2Text's tokenizers",
)
_BERT_WEIGHTS = _published(
    "bert-base-uncased/pytorch_model.bin",
    _BERT,
    licence="Apache-2.0",
    about="BERT, which Tag2Text is built from before its own weights are loaded",
)
_TAG2TEXT = _published(
    "caption_model/tag2text_swin_14m.pth",
    "https://huggingface.co/spaces/xinyu1205/recognize-anything/resolve/main",
    licence="Apache-2.0",
    about="Tag2Text Swin-B, captions",
)
_UMT = _published(
    "umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",
    _USED,
    about="UMT ViT-L/16 trained on Kinetics-400, actions",
)
_VICLIP = _published(
    "ViCLIP/ViClip-InternVid-10M-FLT.pth", _USED, licence="MIT", about="ViCLIP-L/14 on InternVid"
)
_BPE = Weight(
    path="ViCLIP/bpe_simple_vocab_16e6.txt.gz",
    # No network: the installed package openai-clip holds it.
    fetch="mkdir -p ViCLIP && cp "
    f"\"$({shlex.quote(sys.executable)} -c 'from importlib.util import find_spec as find;"
    ' print(*find("clip").submodule_search_locations)\')"/bpe_simple_vocab_16e6.txt.gz ViCLIP/',
    sha256="924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
    licence="MIT",
    about="CLIP's words, of ViCLIP's tokenizer",
)

WEIGHTS: dict[str, tuple[Weight, ...]] = {
    "subject_consistency": (_DINO_CODE, _DINO_WEIGHTS, _DINO_LINK),
    "background_consistency": (_CLIP_B,),
    "temporal_flickering": (),
    "motion_smoothness": (_AMT,),
    "dynamic_degree": (_RAFT,),
    "aesthetic_quality": (_CLIP_L, _LAION),
    "imaging_quality": (_MUSIQ,),
    "object_class": (_GRIT, _VOCABULARY),
    "multiple_objects": (_GRIT, _VOCABULARY),
    "human_action": (_UMT,),
    "color": (_GRIT, _VOCABULARY),
    "spatial_relationship": (_GRIT, _VOCABULARY),
    "scene": (_TAG2TEXT, _VOCABULARY, _BERT_WEIGHTS),
    "appearance_style": (_CLIP_B,),
    "temporal_style": (_VICLIP, _BPE),
    "overall_consistency": (_VICLIP, _BPE),
    "text_alignment": (_CLIP_B,),
    "static": (_RAFT,),
}
"""By the name of a dimension, in the order in which they are fetched.

Source: vbench 0.1.5, `vbench/utils.py`, `init_submodules` with `local=True`, and the modules that
load what it names.
"""


def folder(named: str | os.PathLike[str] | None = None) -> Path:
    """Where the weights are: as named, else VBENCH_CACHE_DIR, else ~/.cache/vbench."""
    chosen = named or os.environ.get("VBENCH_CACHE_DIR") or "~/.cache/vbench"
    return Path(chosen).expanduser().absolute()


def variables(cache: Path) -> dict[str, str]:
    """Variables by which VBench, torch.hub and transformers find weights in this cache only.

    VBench reads its own when it is first imported. `bert-base-uncased` is found by whoever works
    in the cache's folder (`os.chdir`).
    """
    return {
        "VBENCH_CACHE_DIR": str(cache),
        "TORCH_HOME": str(cache / "torch_home"),
        "HF_HUB_OFFLINE": "1",
    }


def is_tiny(cache: Path) -> bool:
    """The project built these weights itself: their scores mean nothing, nor do known hashes."""
    return (cache / MARKER).is_file()


def needed(dimensions: Iterable[str]) -> tuple[Weight, ...]:
    """Files that these dimensions are measured with, each once.

    Raises:
        ValueError: A dimension is not one.
    """
    names = list(dimensions)
    if unknown := [name for name in names if name not in WEIGHTS]:
        raise ValueError(f"no dimension {', '.join(unknown)}: there are {', '.join(WEIGHTS)}")
    return tuple(dict.fromkeys(weight for name in names for weight in WEIGHTS[name]))


def missing(dimensions: Iterable[str], cache: Path) -> list[Weight]:
    """Those of them that are not in the cache, or are empty as a failed download leaves them."""
    return [w for w in needed(dimensions) if not _is_there(cache / w.path)]


def check(dimensions: Iterable[str], cache: Path) -> None:
    """All weights are there, and those whose hash is known are what they are called.

    Raises:
        ValueError: They are not; names each that is missing or wrong, and the commands that fetch
            them all.
    """
    names = list(dimensions)
    absent = missing(names, cache)
    wrong = [] if is_tiny(cache) else [w for w in needed(names) if w not in absent]
    wrong = [w for w in wrong if w.sha256 and not _sha256(cache / w.path).startswith(w.sha256)]
    if not absent and not wrong:
        return
    at = shlex.quote(str(cache))
    lines = []
    if absent:
        files = "1 file" if len(absent) == 1 else f"{len(absent)} files"
        lines += [f"{files} of weights missing in {cache}: " + ", ".join(w.path for w in absent)]
    lines += [
        f"{cache / w.path} is not {w.about}: its sha256 should be {w.sha256}"
        f"{'' if len(w.sha256 or '') == 64 else '…'} and is {_sha256(cache / w.path)}"
        for w in wrong
    ]
    lines += ["fetch with", f"  mkdir -p {at} && cd {at}"]
    lines += [f"  rm {shlex.quote(w.path)}" for w in wrong]
    lines += [
        f"  {w.fetch}  # {w.about}" + (f"; {w.licence}" if w.licence else "")
        for w in needed(names)
        if w in absent or w in wrong
    ]
    raise ValueError("\n".join(lines))


def weights_of(dimensions: Iterable[str], cache: Path) -> dict[str, str]:
    """What tells the weights of these dimensions from others: a hash by the path of each file.

    Raises:
        ValueError: Some are not there; names them, and the commands that fetch them.
    """
    names = list(dimensions)
    if missing(names, cache):
        check(names, cache)
    return {w.path: digest(cache / w.path) for w in needed(names)}


class Row(NamedTuple):
    """A dimension in the table of where it is measured and with what."""

    dimension: str
    environment: str
    files: tuple[str, ...]


def table() -> list[Row]:
    """Where the package measures each dimension, and with which files, as the README shows it."""
    names = (name for name in DIMENSIONS if "vbench" in DIMENSIONS[name].implementations)
    return [
        Row(name, DIMENSIONS[name].environment, tuple(w.path for w in WEIGHTS[name]))
        for name in names
    ]


def _is_there(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _sha256(path: Path) -> str:
    facts = path.stat()
    return _hashed(path, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _hashed(path: Path, size: int, modified_ns: int) -> str:
    """Read once while the file stays as it is."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
