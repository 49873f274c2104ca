"""A cache of VBench's weights that this project builds itself, about 60 MB, for tests.

Formats and places are those of the published files, so the package and what is ours load them as
they load those; architectures are the real ones, most of them small. What the models say is
MEANINGLESS. All weights are random, with two things done to them, or all videos would score alike:

- random networks make nearly the same of all pictures. The bias of the layer norm before a tower's
  output takes away most of what pictures (or texts) have in common;
- the last layers of RAFT and UMT are scaled so that dynamic_degree and human_action say yes to
  some videos.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.weights import make_missing, tiny_folder
from evals.vbench_worker import (
    MARKER,
    TINY_TEXT,
    package,
    prepare,
    tiny_musiq,
    tiny_umt,
    tiny_viclip_vision,
    undone,
)

if TYPE_CHECKING:
    import torch

SEED = 11
_WIDTH = 64
_SHARED = 0.5
"""What is left of the features that all pictures have in common."""
_VOCABULARY, _CONTEXT = 49408, 77
_ACTIONS = (
    "riding a bike",
    "marching",
    "roller skating",
    "tasting beer",
    "clapping",
    "drawing",
    "petting animal (not cat)",
    "eating watermelon",
    "playing harp",
    "wrestling",
)
"""Of Kinetics-400, VBench's first: the small UMT tells these apart and gives others no chance."""
_FLOW_SCALE = 0.14
"""At which some of the small videos of tests have flows above the 3 px that count as motion."""


def default_folder() -> Path:
    """Where the cache is kept between runs."""
    return tiny_folder() / "vbench"


def is_tiny(folder: Path | str) -> bool:
    """Whether what is measured with a cache means nothing."""
    marker = Path(folder, MARKER)
    return marker.is_file() and bool(json.loads(marker.read_text(encoding="utf-8"))["tiny"])


def make_vbench_cache(folder: Path) -> Path:
    """Builds what is not below `folder` yet, and gives the folder; about ten seconds of work.

    The same numbers every time on the same machine and versions.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    prepare(str(folder))
    with undone(), _seeded(), contextlib.redirect_stdout(io.StringIO()):
        make_missing(
            folder,
            {
                "clip_model": _clips,
                "aesthetic_model": _head,
                "dino_model": _dino,
                "torch_home": lambda made: _linked(folder, made),
                "amt_model": _amt,
                "raft_model": _raft,
                "pyiqa_model": _musiq,
                "ViCLIP": _viclip,
                "umt_model": _umt,
                MARKER: lambda made: made.write_text('{"tiny": true}\n', encoding="utf-8"),
            },
        )
    return folder


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        yield


def _clips(folder: Path) -> None:
    folder.mkdir()
    for name, embed, patch in (("ViT-B-32", 64, 32), ("ViT-L-14", 768, 14)):
        _save_clip(folder / f"{name}.pt", embed, patch)


def _save_clip(path: Path, embed: int, patch: int) -> None:
    """As OpenAI publishes it, a TorchScript archive: openai-clip reads no other with this torch."""
    import torch

    model = _openai_clip(embed, patch, _CONTEXT)
    model.logit_scale.fill_(math.log(100))
    _centre(model.visual.ln_post, lambda: model.encode_image(_pictures(16)))
    _centre(model.ln_final, lambda: model.encode_text(_texts(_CONTEXT)), at=_texts(_CONTEXT))
    given = (torch.zeros(1, 3, 224, 224), torch.zeros(1, _CONTEXT, dtype=torch.long))
    torch.jit.save(torch.jit.trace(model, given, check_trace=False), path)


def _openai_clip(embed: int, patch: int, context: int) -> Any:
    import torch
    from clip.model import CLIP

    torch.manual_seed(SEED)
    text = {f"transformer_{name}": size for name, size in TINY_TEXT.items()}
    model = CLIP(
        embed_dim=embed,
        image_resolution=224,
        vision_layers=2,
        vision_width=_WIDTH,
        vision_patch_size=patch,
        context_length=context,
        vocab_size=_VOCABULARY,
        **text,
    )
    _fill(model)
    return model.eval()


def _head(folder: Path) -> None:
    import torch

    torch.manual_seed(SEED)
    head = torch.nn.Linear(768, 1)
    head.weight.normal_(0, 1)
    head.bias.fill_(5)
    (folder / "emb_reader").mkdir(parents=True)
    torch.save(head.state_dict(), folder / "emb_reader" / "sa_0_4_vit_l_14_linear.pth")


_HUBCONF = '''\
"""A small vision transformer with the keys of DINO's weights, loaded as torch.hub loads DINO."""

import math

import torch
from torch import nn

dependencies = ["torch"]
PATCH, WIDTH, HEADS, DEPTH, GRID = 16, 64, 1, 2, 14


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        weights = (qkv[0] @ qkv[1].transpose(-2, -1) * (WIDTH // HEADS) ** -0.5).softmax(-1)
        return self.proj((weights @ qkv[2]).transpose(1, 2).reshape(batch, tokens, WIDTH))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(), Mlp()

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, WIDTH, PATCH, PATCH)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, GRID**2 + 1, WIDTH))
        self.patch_embed = Patches()
        self.blocks = nn.ModuleList([Block() for _ in range(DEPTH)])
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def positions(self, rows, columns):
        """Where the picture is no square of 14 patches: interpolated, with DINO's extra tenth."""
        if rows == columns == GRID:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, GRID, GRID, WIDTH).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / GRID, (columns + 0.1) / GRID)
        grid = nn.functional.interpolate(grid, scale_factor=scale, mode="bicubic")
        grid = grid.permute(0, 2, 3, 1).reshape(1, rows * columns, WIDTH)
        return torch.cat([self.pos_embed[:, :1], grid], 1)

    def forward(self, x):
        rows, columns = x.shape[-2] // PATCH, x.shape[-1] // PATCH
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], 1)
        x = x + self.positions(rows, columns)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


def dino_vitb16(pretrained=True, path=None, **_):
    model = Transformer().eval()
    if pretrained:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model
'''
_DINO = "dino_vitbase16_pretrain.pth"


def _dino(folder: Path) -> None:
    import torch

    code = folder / "facebookresearch_dino_main"
    code.mkdir(parents=True)
    (code / "hubconf.py").write_text(_HUBCONF, encoding="utf-8")
    torch.manual_seed(SEED)
    model = torch.hub.load(str(code), "dino_vitb16", source="local", pretrained=False)
    _fill(model)
    _centre(model.norm, lambda: model(_pictures(16)))
    torch.save(model.state_dict(), folder / _DINO)


def _linked(cache: Path, folder: Path) -> None:
    """DINO's own code would look here for the same file."""
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    shutil.copy(cache / "dino_model" / _DINO, folder / "hub" / "checkpoints" / _DINO)


def _amt(folder: Path) -> None:
    import torch
    from omegaconf import OmegaConf

    folder.mkdir()
    build = package("third_party.amt.utils.build_utils")
    torch.manual_seed(SEED)
    made = build.build_from_cfg(
        OmegaConf.load(Path(build.__file__).parents[1] / "cfgs" / "AMT-S.yaml").network
    )
    torch.save({"state_dict": made.state_dict()}, folder / "amt-s.pth")


def _raft(folder: Path) -> None:
    """As it was trained, on several GPUs: keys begin with `module.`."""
    import torch
    from easydict import EasyDict

    torch.manual_seed(SEED)
    made = package("third_party.RAFT.core.raft").RAFT(
        EasyDict(small=False, mixed_precision=False, alternate_corr=False)
    )
    made.update_block.flow_head.conv2.weight.mul_(_FLOW_SCALE)
    made.update_block.flow_head.conv2.bias.zero_()
    state = {f"module.{name}": value for name, value in made.state_dict().items()}
    (folder / "models").mkdir(parents=True)
    torch.save(state, folder / "models" / "raft-things.pth")


def _musiq(folder: Path) -> None:
    import torch

    folder.mkdir()
    torch.manual_seed(SEED)
    model = tiny_musiq(pretrained=False).eval()
    model.transformer_encoder.cls.normal_(0, 1)
    model.head.weight.normal_(0, 2)
    model.head.bias.fill_(50)
    torch.save(model.state_dict(), folder / "musiq_spaq_ckpt-358bb6af.pth")


def _viclip(folder: Path) -> None:
    """The text tower is CLIP's, with the same keys: ViCLIP's wants its vocabulary when imported."""
    import clip
    import torch

    folder.mkdir()
    shutil.copy(Path(clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz", folder)
    text = _openai_clip(768, 32, 32)
    _centre(text.ln_final, lambda: text.encode_text(_texts(32)), at=_texts(32))
    torch.manual_seed(SEED + 1)
    vision = tiny_viclip_vision().eval()
    _fill(vision)
    videos = torch.stack([_pictures(8, seed) for seed in range(8)]).transpose(1, 2)
    _centre(vision.ln_post, lambda: vision(videos), first=True)
    state = {f"vision_encoder.{name}": value for name, value in vision.state_dict().items()}
    state |= {
        f"text_encoder.{name}": value
        for name, value in text.state_dict().items()
        if not name.startswith("visual.") and name != "logit_scale"
    }
    state["temp"] = torch.tensor(0.01)
    torch.save({"model": state}, folder / "ViClip-InternVid-10M-FLT.pth")


def _umt(folder: Path) -> None:
    import torch

    folder.mkdir()
    torch.manual_seed(SEED)
    model = tiny_umt(
        num_classes=400, all_frames=16, tubelet_size=1, use_mean_pooling=True, init_scale=1.0
    ).eval()
    _fill(model)
    videos = torch.stack([_pictures(16, seed) for seed in range(6)]).transpose(1, 2)
    features = torch.cat([model.forward_features(video[None]) for video in videos])
    numbers = {name: int(n) for n, name in package("human_action").build_dict().items()}
    known = [numbers[name] for name in _ACTIONS]
    head = torch.randn(len(known), _WIDTH)
    logits = features @ head.T
    head *= 4 / logits.std(0).mean()
    model.head.weight.zero_()
    model.head.bias.fill_(-20)
    model.head.weight[known] = head
    model.head.bias[known] = -(features @ head.T).mean(0)
    torch.save(model.state_dict(), folder / "l16_ptk710_ftk710_ftk400_f16_res224.pth")


def _fill(model: torch.nn.Module) -> None:
    """Weights at which what goes in matters to what comes out; none as it was left in memory."""
    import torch

    for name, value in model.named_parameters():
        if name.endswith("bias"):
            value.zero_()
        elif value.dim() < 2 and "embedding" not in name:
            value.fill_(1)
        elif "embedding" in name or "embed" in name.rpartition(".")[2] or "token" in name:
            torch.nn.init.normal_(value, std=0.3)
        else:
            torch.nn.init.normal_(value, std=1.5 * value[0].numel() ** -0.5)


def _centre(
    norm: torch.nn.Module,
    run: Callable[[], Any],
    *,
    at: torch.Tensor | None = None,
    first: bool = False,
) -> None:
    """Takes most of what examples have in common out of what a layer norm gives of them.

    Args:
        norm: Of (N, F), or of (N, tokens, F).
        run: Runs examples through it.
        at: Tokens of texts, whose last word is what counts; None is the first token.
        first: Tokens come before examples.
    """
    import torch

    seen: list[torch.Tensor] = []
    hook = norm.register_forward_hook(lambda _model, _given, out: seen.append(out))
    run()
    hook.remove()
    (found,) = seen
    if found.dim() == 3:
        found = found.transpose(0, 1) if first else found
        where = torch.zeros(len(found), dtype=torch.long) if at is None else at.argmax(-1)
        found = found[torch.arange(len(found)), where]
    norm.bias -= (1 - _SHARED) * found.mean(0)


def _pictures(num: int, seed: int = 0) -> torch.Tensor:
    """Random pictures of a few colours each, (num, 3, 224, 224), about as they are normalised."""
    import torch

    random = torch.Generator().manual_seed(SEED + seed)
    cells = 2 + seed % 5
    coarse = torch.randn(num, 3, cells, cells, generator=random)
    return torch.nn.functional.interpolate(coarse, size=(224, 224), mode="bicubic")


def _texts(context: int) -> torch.Tensor:
    """Random texts as tokens, the last of which is the highest."""
    import torch

    random = torch.Generator().manual_seed(SEED)
    found = torch.zeros(16, context, dtype=torch.long)
    for i, row in enumerate(found):
        words = torch.randint(320, 40000, (4 + i % 8,), generator=random)
        row[0], row[len(words) + 1] = _VOCABULARY - 2, _VOCABULARY - 1
        row[1 : len(words) + 1] = words
    return found
