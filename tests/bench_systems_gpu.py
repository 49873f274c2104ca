"""What training Mimir and SemanticGen costs at full size with random weights, on one GPU.

    python tests/bench_systems_gpu.py [--out FILE] [--only PART ...] [--frames NUM ...] [--quick]

Each row is a step of one sample: systems, stages and their learners are those of the recipes, with
models of random weights in place of files, and are trained as `trainers.loop` does it, with
gradient checkpointing. Pixels, tokens and cached features are random, so neither decoding nor
reading a cache is in it. Parts:

    mimir      CogVideoX-5B whole; with a LoRA if anything of that does not fit in memory. Features
               cached; on the fly with the answers at hand, and with all of them drawn anew
    latents    SemanticGen's VAE-latent generator on Wan 1.3B: 5 s in full attention; 15, 30 and
               60 s within shifted windows, and in full where that is not too long. What does not
               fit in memory is tried once more with the inputs of blocks, from which they are
               computed again, moved to the CPU between forward and backward, which `trainers` does
               not offer
    semantics  its semantic generator: the tokens of 60 s

Against each stands a plain loop as in diffusers' examples on the same model: noise drawn on the
device, AdamW, no average; for Mimir all frozen models in every step (of the answers one, and no
prefix kept), for SemanticGen full attention, with features at hand as ours has them.

Operations are those of forward and backward of the trained module as they are (of windows, what is
within windows), counted without running them; what checkpointing computes again is not work.

Needs what `bench_train_gpu.py` needs: no Ray, no files of weights and no network. `--quick` runs
the same code on models of a few megabytes, also without a GPU.

Shapes: B samples, F frames, H W pixels; L text positions, D their width; K answers of a prompt, E
width of the LLM, N attribute instructions; S semantic frames, V U their lines and columns.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_train import words_of
from bench_train_gpu import (
    SMALL_COGVIDEOX,
    Bench,
    Features,
    Row,
    prepare,
    random_text,
    table,
    trained,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine.weights import Weights
from trainers import recipes_mimir, recipes_semantic
from trainers.adapter import padded
from trainers.answers import Answered, pack
from trainers.cogvideox import CogVideoX
from trainers.decoder import DecoderLM
from trainers.features import complete
from trainers.fuser import NUM_ATTRIBUTES
from trainers.language import LanguageModel
from trainers.mimir import Mimir
from trainers.optim import adamw, average, started_average
from trainers.prompts import Prompts
from trainers.recipe import Models
from trainers.semantic import SemanticGen
from trainers.semantics import SemanticEncoder, SemanticFacts
from trainers.system import Bucket, Noise, Sample, System, TrainStage
from trainers.tiny_llm import build_tokenizer
from trainers.vdm import VDM, Backbone, Facts, Variant
from trainers.vdm_shapes import COGVIDEOX_5B, WAN_1_3B, Shapes
from trainers.wan import Wan

PARTS = ("mimir", "latents", "semantics")
PLAIN = "plain loop"
META = torch.device("meta")
CAPTION = 100
"""Tokens of a prompt; with those of its answer they are as many as the fuser reads."""
PHI_3_5_MINI = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32064,
}
"""Source: the configuration beside the weights of Phi-3.5-mini-instruct."""
SMALL_PHI = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}
SMALL_COGVIDEOX_5B: Shapes = dict(SMALL_COGVIDEOX) | {
    "transformer": SMALL_COGVIDEOX["transformer"] | {"use_rotary_positional_embeddings": True},
}
SMALL_WAN: Shapes = dict(WAN_1_3B) | {
    "transformer": WAN_1_3B["transformer"]
    | {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "ffn_dim": 64,
        "freq_dim": 16,
        "text_dim": 64,
    },
    "text_encoder": WAN_1_3B["text_encoder"] | {"d_model": 64},
}


@dataclass(frozen=True)
class Size:
    """What is measured."""

    cogvideox: Shapes
    wan: Shapes
    phi: Mapping[str, int]
    semantic_dim: int
    """Width of the semantic encoder's features."""
    rank: int
    clip: Bucket
    """Of Mimir."""
    videos: tuple[Bucket, ...]
    """Of SemanticGen, ascending; those longer than a window are trained in windows."""
    warm_up: int
    steps: int


def _wide(frames: int) -> Bucket:
    return Bucket(frames=frames, height_px=480, width_px=832)


def _small(frames: int) -> Bucket:
    return Bucket(frames=frames, height_px=64, width_px=64)


FULL = Size(
    cogvideox=COGVIDEOX_5B,
    wan=WAN_1_3B,
    phi=PHI_3_5_MINI,
    semantic_dim=2048,
    rank=128,
    clip=Bucket(frames=49, height_px=480, width_px=720),
    videos=tuple(_wide(frames) for frames in (121, 361, 721, 1441)),
    warm_up=2,
    steps=6,
)
QUICK = Size(
    cogvideox=SMALL_COGVIDEOX_5B,
    wan=SMALL_WAN,
    phi=SMALL_PHI,
    semantic_dim=32,
    rank=4,
    clip=_small(9),
    videos=(_small(121), _small(361)),
    warm_up=1,
    steps=2,
)


# Models of random weights in the places of those that recipes name


@dataclass(frozen=True, kw_only=True)
class RandomBackbone(Backbone):
    """A video model that is made where it runs."""

    shapes: Shapes = field(compare=False)

    def load(
        self,
        *,
        video: bool,
        device: torch.device,
        dtype: torch.dtype,
        variant: Variant = Variant(),  # noqa: B008 - frozen
    ) -> VDM:
        kind = CogVideoX if self.kind == "cogvideox" else Wan
        vdm = kind.random(self.shapes, video=video, device=device, dtype=dtype, variant=variant)
        # It has no tokenizer.
        vdm.encode_text = partial(_encoded, vdm)  # type: ignore[method-assign]
        vdm.text_cut = lambda texts: [0] * len(texts)  # type: ignore[method-assign]
        return vdm

    def facts(self) -> Facts:
        return self.shape().facts  # type: ignore[attr-defined]

    def shape(self) -> VDM:
        """The model where nothing has memory: for its sizes."""
        return self.load(video=True, device=META, dtype=torch.float32)


def _encoded(vdm: VDM, texts: Sequence[str]) -> Tensor:
    """Of the empty text, which a learner asks for once, zeros: no encoder is made for it."""
    if not any(texts):
        return torch.zeros(len(texts), vdm.text_len, vdm.text_dim, device=vdm.device)  # type: ignore[attr-defined]
    return random_text(vdm, texts)


@dataclass(frozen=True, kw_only=True)
class RandomPhi(LanguageModel):
    """A Phi-3 that never ends its answer, and says only what a small tokenizer knows."""

    config: Mapping[str, int] = field(compare=False)

    def width(self) -> int:
        return self.config["hidden_size"]

    def prompts(self) -> Prompts:
        return Prompts(build_tokenizer("phi3"), self._config(), "chat", "phi")

    def load(self, device: torch.device, dtype: torch.dtype) -> DecoderLM:
        from transformers import GenerationConfig, Phi3ForCausalLM

        prompts, before = self.prompts(), torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model: Any = Phi3ForCausalLM(self._config())
                head = torch.nn.Linear(self.width(), self.config["vocab_size"])
        finally:
            torch.set_default_dtype(before)
        known = prompts.tokenizer
        with torch.no_grad():
            head.bias.fill_(-math.inf)
            head.bias[: len(known)] = 0
            head.bias[list(known.added_tokens_decoder)] = -math.inf
        model.lm_head = head
        model.generation_config = GenerationConfig(eos_token_id=known.eos_token_id)
        return DecoderLM(model.eval().requires_grad_(False), prompts)

    def _config(self) -> Any:
        from transformers import Phi3Config

        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # others may lie beyond it
        return Phi3Config(**self.config, **ids, tie_word_embeddings=False)


@dataclass(frozen=True, kw_only=True)
class ShapedEncoder(SemanticEncoder):
    """A Qwen2.5-VL of which nothing but the shape of its features is asked."""

    dim: int

    def facts(self) -> SemanticFacts:
        return SemanticFacts(dim=self.dim, frames_per_token=2, pixels_per_token=28, chunk=None)


# A stage as it is trained


@cache
def row() -> dict[str, Any]:
    """Of the manifest: a caption."""
    return {"original": None, "rephrased": words_of(CAPTION)}


@dataclass(frozen=True)
class Case:
    """A stage of a system on one sample, with features as a cache gives them."""

    part: str
    system: System
    stage: TrainStage
    features: Features
    parents: Mapping[str, Features] = field(default_factory=dict)
    offload: bool = False
    """Whether what backward needs is moved to the CPU until then."""

    @property
    def bucket(self) -> Bucket:
        return self.stage.data.buckets[0]

    def trained(
        self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Features
    ) -> None:
        """A step on a batch."""
        kind = batch["at_B"].device.type
        saved = torch.autograd.graph.save_on_cpu(pin_memory=kind == "cuda")
        with saved if self.offload else contextlib.nullcontext():
            trained(module, optimizer, batch, kind)

    def cached(self) -> list[Sample]:
        return [Sample(row(), self.bucket, features=dict(self.features))]

    def without_memory(self) -> tuple[torch.nn.Module, Features]:
        """The module and what it is called with, where nothing is computed."""
        parents = {s: {n: t.to(META) for n, t in p.items()} for s, p in self.parents.items()}
        stage = replace(self.stage, precision="fp32")  # of one type: there is no autocast
        learner = self.system.learner(stage, META, parents)
        return learner.module, learner.batch(self.cached(), Noise(0, 0, (0,)))

    def flops(self) -> float:
        """Operations of a step, forward and backward."""
        module, batch = self.without_memory()
        with (
            # Even to turn it off is an error there.
            mock.patch.object(torch, "autocast", return_value=contextlib.nullcontext()),
            FlopCounterMode(display=False) as counter,
        ):
            module(**batch).mean().backward()
        return float(counter.get_total_flops())


class Run:
    """A case under training, as `trainers.loop.Trainer` puts it together.

    Args:
        case: Which.
        device: Where.
    """

    def __init__(self, case: Case, device: torch.device):
        self.case, self.decay = case, case.stage.ema_decay
        self.learner = case.system.learner(case.stage, device, case.parents)
        self.learner.checkpoint_gradients()
        self.optimizer = adamw(self.learner.module, self.learner.groups, case.stage.optim)
        self.average = started_average(self.learner.module, self.decay)

    def step(self, number: int, samples: Sequence[Sample]) -> None:
        batch = self.learner.batch(samples, Noise(0, number, range(len(samples))))
        self.case.trained(self.learner.module, self.optimizer, batch)
        if self.decay is not None:
            average(self.average, self.learner.module, self.decay)


class Plain:
    """A training loop as diffusers' examples have it.

    Args:
        case: What is trained.
        device: Where.
        batch: What the module is called with, in each step.
    """

    def __init__(self, case: Case, device: torch.device, batch: Callable[[], Features]):
        learner = case.system.learner(case.stage, device, case.parents)
        learner.checkpoint_gradients()
        self.case, self.module, self.batch = case, learner.module, batch
        weights = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=1e-5, weight_decay=0.01)
        self.rates = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)

    def step(self, _: int) -> None:
        self.case.trained(self.module, self.optimizer, self.batch())
        self.rates.step()


class SystemsBench(Bench):
    """Mimir and SemanticGen.

    Args:
        size: Of models and data.
        device: As of `Bench`.
        out: As of `Bench`.
        longest_s: Steps that would take more are not run.
    """

    def __init__(self, size: Size, device: torch.device, out: Path | None, longest_s: float):
        super().__init__(device, out, warm_up=size.warm_up, steps=size.steps)
        self.size, self.longest_s = size, longest_s

    def ours(
        self,
        case: Case,
        what: str,
        flops: float,
        features: Callable[[], Callable[[], list[Sample]]] | None = None,
    ) -> bool:
        """One way of ours; whether it could be measured.

        Args:
            case: What is trained.
            what: The way's name.
            flops: Of a step.
            features: Loads encoders, and gives what computes a step's samples; None is cached.
        """
        with self.guarded(case.part, what):
            samples = features() if features else case.cached
            run = Run(case, self.device)
            step_s = self.seconds(lambda number: run.step(number, samples()))
            self.measured(case.part, what, step_s, 1, flops)
        return self.rows[-1].step_s is not None

    def plain(self, case: Case, flops: float, batch: Callable[[], Callable[[], Features]]) -> None:
        """The plain loop, against which the part's rows are set."""
        with self.guarded(case.part, PLAIN):
            loop = Plain(case, self.device, batch())
            step_s = self.seconds(loop.step)
            self.measured(case.part, PLAIN, step_s, 1, flops)
        self.compare(case.part, PLAIN)

    # Mimir

    def mimir(self) -> None:
        """All ways; with a LoRA where some do not fit with all weights trained."""
        for tuning in ("full", "lora"):
            case, given = mimir_case(self.size, tuning)
            flops, fly = case.flops(), partial(on_the_fly, case, self.device)
            fits = self.ours(case, "features cached", flops)
            if fits:
                pixels = {"pixels": given.pop("pixels")}
                fits &= self.ours(case, "on the fly, answers at hand", flops,
                                  partial(fly, pixels | given))  # fmt: skip
                fits &= self.ours(case, "on the fly, answers drawn", flops,
                                  partial(fly, pixels))  # fmt: skip
                plain = partial(plain_mimir, case, self.device, pixels["pixels"])
                self.plain(case, flops, plain)
            if fits:
                return

    # SemanticGen

    def latents(self, frames: Sequence[int] | None = None) -> None:
        """Videos of these lengths, or of all."""
        for bucket in self.size.videos:
            if frames and bucket.frames not in frames:
                continue
            full = semantic_case(self.size, "latents", bucket, windows=False)
            case = semantic_case(self.size, "latents", bucket, windows=True)
            window_s = case.system.window_s  # type: ignore[attr-defined]
            if bucket.frames - 1 <= window_s * case.stage.data.fps:
                self.filled(full, None)
                continue
            flops, what = case.flops(), f"windows of {window_s:g} s"
            fits = self.ours(case, what, flops)
            if not fits:
                what, full = f"{what}, inputs of blocks on the CPU", replace(full, offload=True)
                fits = self.ours(replace(case, offload=True), what, flops)
            if fits:
                self.filled(full, flops / (self.rows[-1].step_s or 1))

    def filled(self, case: Case, rate: float | None) -> None:
        """In full attention, ours and plain; not where at this rate it would take too long."""
        flops = case.flops()
        if rate is not None and flops / rate > self.longest_s:
            note = (
                f"not run: {flops / 1e15:.3g} PFLOP a step are {flops / rate:.0f} s at the rate of"
                " windows"
            )
            for what in ("full attention", PLAIN):
                self.add(Row(case.part, what, note=note))
            return
        self.ours(case, "full attention", flops)
        self.plain(case, flops, partial(drawn_on, case, self.device))

    def semantics(self) -> None:
        """The planner of the longest video."""
        case = semantic_case(self.size, "semantics", self.size.videos[-1], windows=True)
        flops = case.flops()
        self.ours(case, "features cached", flops)
        self.plain(case, flops, partial(drawn_on, case, self.device))


def mimir_case(size: Size, tuning: str) -> tuple[Case, Features]:
    """Mimir of a tuning; and what it has before encoders run: pixels, and answers at hand."""
    recipe = recipes_mimir.build("mimir", Models(), tiny=False)
    (stage,) = recipe.stages
    lm = RandomPhi(weights=Weights(at="random"), config=size.phi)
    vdm = RandomBackbone(kind="cogvideox", base=Weights(at="random"), shapes=size.cogvideox)
    system = replace(recipe.system, lm=lm, vdm=vdm, tuning=tuning, rank=size.rank)
    assert isinstance(system, Mimir)
    b, shape = size.clip, vdm.shape()
    answers, limit = pack(answers_of(system, lm.prompts())), shape.text_len
    states = torch.bfloat16
    features = {
        "latents": torch.rand(2, *shape.latent_shape(b.frames, b.height_px, b.width_px)),
        "base_text": torch.randn(limit, shape.text_dim),
        "answers": answers,
        "answer_states": torch.randn(system.variants, limit, lm.width(), dtype=states),
        "attributes": torch.randn(NUM_ATTRIBUTES, lm.width(), dtype=states),
    }
    pixels_FHW3 = torch.randint(0, 256, (b.frames, b.height_px, b.width_px, 3), dtype=torch.uint8)
    case = Case(f"mimir, {tuning}, {b}", system, on(stage, b), features)
    return case, {"pixels": pixels_FHW3, "answers": answers}


def answers_of(system: Mimir, prompts: Prompts) -> list[Answered]:
    """Answers in random tokens, which fill what the fuser reads."""
    caption, limit = row()["rephrased"], system.vdm.facts().text_len
    text = prompts.tokenized(system.answer_instruction, None, caption)
    num = prompts.num_tokens(caption)
    drawn = torch.randint(10, 800, (system.variants, limit - num)).tolist()
    return [Answered(replace(text, answer=tuple(ids)), num) for ids in drawn]


def semantic_case(size: Size, name: str, bucket: Bucket, *, windows: bool) -> Case:
    """A stage of SemanticGen, with the settings of its recipe for videos of 60 s."""
    recipe = recipes_semantic.build("semanticgen_long", Models(), tiny=False)
    vdm = RandomBackbone(kind="wan", base=Weights(at="random"), shapes=size.wan)
    encoder = ShapedEncoder(
        kind="qwen2_5_vl",
        weights=Weights(at="random"),
        fps=recipes_semantic.SEMANTIC_FPS,
        dim=size.semantic_dim,
    )
    system = replace(recipe.system, vdm=vdm, encoder=encoder)
    assert isinstance(system, SemanticGen)
    if not windows:
        system = replace(system, window_s=None)
    stage, shape = on(recipe.stage(name), bucket), vdm.shape()
    grid = encoder.grid(bucket, stage.data.fps)
    channels, *latent = shape.latent_shape(bucket.frames, bucket.height_px, bucket.width_px)
    features = {
        "base_text": torch.randn(shape.text_len, shape.text_dim),
        "semantics": torch.randn(*grid, encoder.dim, dtype=torch.bfloat16),
    }
    semantic = f"{math.prod(grid):,} semantic tokens"
    if name == "semantics":
        held = {f"compressor.{n}": t for n, t in system.compressor().state_dict().items()}
        return Case(f"semantics, {semantic}", system, stage, features, {"latents": held})
    features["latents"] = torch.rand(2, channels, *latent)
    of_video = math.prod(latent) // math.prod(size.wan["transformer"]["patch_size"])
    part = f"latents, {bucket}, {of_video:,} and {semantic}"
    return Case(part, system, stage, features)


def on(stage: TrainStage, bucket: Bucket) -> TrainStage:
    """A recipe's stage on one sample of one shape."""
    return replace(stage, batch=1, data=replace(stage.data, buckets=(bucket,)))


def on_the_fly(case: Case, device: torch.device, given: Features) -> Callable[[], list[Sample]]:
    """Samples whose features are computed in each step, but for those that are given."""
    encoders = case.system.encoders(case.stage)
    functions = {e.kind: e.on(device) for e in encoders if e.kind not in given}

    def computed() -> list[Sample]:
        sample = Sample(row(), case.bucket, features=dict(given))
        complete([sample], encoders, [e.kind for e in encoders], lambda e: functions[e.kind])
        return [sample]

    return computed


def plain_mimir(case: Case, device: torch.device, pixels_FHW3: Tensor) -> Callable[[], Features]:
    """What Mimir's module takes, by all frozen models in each step."""
    system = case.system
    assert isinstance(system, Mimir)
    vdm = system.vdm.load(video=True, device=device, dtype=torch.bfloat16)
    lm = system.lm.load(device, torch.bfloat16)
    one = answers_of(system, lm.prompts)[0]
    asked = [lm.tokenized(text, None, row()["rephrased"]) for text in system.attribute_instructions]

    @torch.no_grad()
    def batch() -> Features:
        moments_B2CTYX = vdm.encode(pixels_FHW3[None])
        ((query_QE, answer_SE),) = lm.query_and_answer(
            [one.text], [one.num_query], use_prefix=False
        )
        decoder_BLE, length_B = padded([torch.cat([query_QE, answer_SE])], vdm.text_len)
        noise_BCTYX = torch.randn_like(moments_B2CTYX[:, 0])
        return {
            "encoder_BLD": vdm.encode_text(["a caption"]),
            "decoder_BLE": decoder_BLE,
            "length_B": length_B,
            "attributes_BNE": lm.last_states(asked, use_prefix=False)[None],
            "moments_B2CTYX": moments_B2CTYX,
            "posterior_BCTYX": torch.randn_like(noise_BCTYX),
            "noise_BCTYX": noise_BCTYX,
            "at_B": torch.rand(1, device=device),
        }

    return batch


def drawn_on(case: Case, device: torch.device) -> Callable[[], Features]:
    """What SemanticGen's module takes, of features at hand; all else drawn on the device."""
    shapes = case.without_memory()[1]
    of_features = {"base_text": "text_BLD", "semantics": "features_BSVUW"}
    of_features |= {"latents": "moments_B2CTYX"}
    at_hand = {of_features[kind]: tensor[None] for kind, tensor in case.features.items()}

    def drawn(like: Tensor) -> Tensor:
        if like.dtype == torch.bool:  # who is dropped
            return torch.zeros(like.shape, dtype=torch.bool, device=device)
        draws = torch.rand if like.ndim == 1 else torch.randn
        return draws(like.shape, device=device)

    def batch() -> Features:
        moved = {name: tensor.to(device) for name, tensor in at_hand.items()}
        return moved | {name: drawn(t) for name, t in shapes.items() if name not in moved}

    return batch


def main() -> None:
    """Measures the parts that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="which parts")
    parser.add_argument("--frames", nargs="+", type=int, help="which lengths of latents; all")
    parser.add_argument("--quick", action="store_true", help="small models, on the CPU too")
    parser.add_argument(
        "--longest-step-s",
        type=float,
        default=120.0,
        help="full attention is not run where a step of it would take more (%(default)g)",
    )
    args = parser.parse_args()
    if not (torch.cuda.is_available() or args.quick):
        sys.exit("there is no GPU: --quick runs the same code on small models")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = QUICK if args.quick else FULL
    if odd := set(args.frames or ()) - {bucket.frames for bucket in size.videos}:
        parser.error(f"--frames {min(odd)}: {', '.join(str(b.frames) for b in size.videos)} are")
    bench = SystemsBench(size, device, args.out, args.longest_step_s)
    prepare(quick=args.quick)
    for part in args.only:
        print(f"measuring {part} …", file=sys.stderr, flush=True)
        with bench.guarded(part, "all of it"):
            bench.latents(args.frames) if part == "latents" else getattr(bench, part)()
    print(table(bench, quick=args.quick))


if __name__ == "__main__":
    main()
