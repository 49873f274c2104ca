"""What training costs at full size with random weights, on one GPU: a Markdown table and JSON.

    python tests/bench_train_gpu.py [--out FILE] [--only PART ...] [--checkpoint] [--quick]

Per stage a step of ours with features cached, computed on the fly with the instruction's prefix
kept, and on the fly without; and of a plain loop as in diffusers' examples, on the same models.
Ours is the learner's own loss with backward, clipping and AdamW as `trainers.loop` has them; pixels
and token ids are random, so neither decoding nor reading a cache is in it. MFU counts what is
trained (denoiser, adapter), not the frozen encoders; what checkpointing computes again is not work.

Needs torch, diffusers, transformers, peft, tokenizers, safetensors, numpy, pyarrow and what
`engine/` imports with them (cv2, av, fsspec, lance), but no Ray, no files of weights and no
network. `--quick` runs the same code on models of a few megabytes, also without a GPU.

Shapes: B samples, F frames, H W pixels; L positions of the conditioning, D its width, E width of
the LLM.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_train import (
    ANSWER,
    INSTRUCTION,
    ORIGINAL,
    Plain,
    decoder,
    latency,
    texts_of,
)
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from trainers.adapter import RephrasingAdapter
from trainers.animatediff import AnimateDiff
from trainers.cogvideox import CogVideoX
from trainers.decoder import DecoderLM
from trainers.lora import add_lora
from trainers.optim import adamw
from trainers.prompts import TextIds
from trainers.rise import GROUPS, LORA, RiseLearner, RiseModule
from trainers.system import Bucket, Noise, Optim, Sample
from trainers.throughput import Meter, peak_flops
from trainers.vdm import VDM
from trainers.vdm_shapes import COGVIDEOX_2B, SD15, Shapes

PARTS = ("image", "motion", "cogvideox", "llm")
Features = dict[str, Tensor]
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
SMALL_LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
_WIDTHS = (16, 16, 32, 32)
SMALL_SD: Shapes = dict(SD15) | {
    "unet": SD15["unet"]
    | {"block_out_channels": _WIDTHS, "norm_num_groups": 8, "cross_attention_dim": 64},
    "vae": SD15["vae"] | {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 2},
    "text_encoder": SD15["text_encoder"]
    | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "motion": SD15["motion"] | {"block_out_channels": _WIDTHS, "motion_norm_num_groups": 8},
}
SMALL_COGVIDEOX: Shapes = dict(COGVIDEOX_2B) | {
    "transformer": COGVIDEOX_2B["transformer"]
    | {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 16,
        "text_embed_dim": 64,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 9,
    },
    "vae": COGVIDEOX_2B["vae"]
    | {
        "block_out_channels": (8, 8, 8, 8),
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
    },
    "text_encoder": COGVIDEOX_2B["text_encoder"]
    | {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
}


@dataclass(frozen=True)
class Case:
    """A stage on a model of some shapes."""

    stage: str
    kind: type[VDM]
    shapes: Shapes
    bucket: Bucket
    batch: int
    length: int
    checkpoint: bool = False
    """Whether activations are computed again in backward."""


@dataclass(frozen=True)
class Size:
    """What is measured."""

    cases: Mapping[str, Case]
    llm: Mapping[str, int]
    sd: Shapes
    cogvideox: Shapes
    rank: int
    warm_up: int
    steps: int


def _square(side_px: int) -> dict[str, int]:
    return {"height_px": side_px, "width_px": side_px}


FULL = Size(
    cases={
        "image": Case("image", AnimateDiff, SD15, Bucket(frames=1, **_square(512)), 8, 256),
        "motion": Case("motion", AnimateDiff, SD15, Bucket(frames=16, **_square(512)), 1, 256),
        "cogvideox": Case(
            "motion",
            CogVideoX,
            COGVIDEOX_2B,
            Bucket(frames=49, height_px=480, width_px=720),
            1,
            226,
            checkpoint=True,
        ),
    },
    llm=LLAMA_7B,
    sd=SD15,
    cogvideox=COGVIDEOX_2B,
    rank=128,
    warm_up=3,
    steps=10,
)
QUICK = Size(
    cases={
        "image": Case("image", AnimateDiff, SMALL_SD, Bucket(frames=1, **_square(64)), 2, 256),
        "motion": Case("motion", AnimateDiff, SMALL_SD, Bucket(frames=2, **_square(64)), 1, 256),
        "cogvideox": Case(
            "motion",
            CogVideoX,
            SMALL_COGVIDEOX,
            Bucket(frames=9, **_square(64)),
            1,
            226,
            checkpoint=True,
        ),
    },
    llm=SMALL_LLAMA,
    sd=SMALL_SD,
    cogvideox=SMALL_COGVIDEOX,
    rank=4,
    warm_up=1,
    steps=2,
)


@dataclass(frozen=True)
class Row:
    """A line of the table; None is what could not be measured."""

    part: str
    what: str
    step_s: float | None = None
    samples_per_s: float | None = None
    tflops_per_s: float | None = None
    mfu: float | None = None
    peak_gib: float | None = None
    against: float | None = None
    """How many times as fast as the plain loop, whole teacher forcing, or `generate` and T5."""
    note: str = ""


SLOW_S = 15.0
"""Steps of more than this are few: one of warming up, and the mean of two."""


class Bench:
    """Measures on one device, and keeps what was found.

    Args:
        device: Where.
        out: File that the rows are written to as they come.
        warm_up: Steps before those that are timed.
        steps: Timed.
    """

    def __init__(self, device: torch.device, out: Path | None, *, warm_up: int, steps: int):
        self.device, self.out, self.warm_up, self.steps = device, out, warm_up, steps
        self.dtype = torch.bfloat16
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Keeps a row, and tells it."""
        self.rows.append(row)
        print(f"  {row.what}: {row.note or cells(row)}", file=sys.stderr, flush=True)
        self._write()

    def compare(self, part: str, baseline: str) -> None:
        """Sets a part's rows against one of them."""
        of_it = [r.step_s for r in self.rows if (r.part, r.what) == (part, baseline) and r.step_s]
        if of_it:
            self.rows = [
                replace(r, against=of_it[0] / r.step_s) if r.part == part and r.step_s else r
                for r in self.rows
            ]
            self._write()

    def _write(self) -> None:
        if self.out:
            found = machine(self.device) | {"rows": [asdict(row) for row in self.rows]}
            self.out.write_text(json.dumps(found, indent=1), encoding="utf-8")

    @contextmanager
    def guarded(self, part: str, what: str) -> Iterator[None]:
        """Notes the error of a measurement, so that the others go on."""
        self._clear()
        try:
            yield
        except torch.OutOfMemoryError as error:
            first = " ".join(str(error).split())[:160]
            self.add(Row(part, what, note=f"does not fit in memory: {first}"))
        except Exception as error:  # noqa: BLE001 - a library that lacks something
            first = " ".join(str(error).split())[:160]
            self.add(Row(part, what, note=f"failed: {type(error).__name__}: {first}"))

    def _clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def synchronised_s(self) -> float:
        """The time when the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(
        self, step: Callable[[int], object], warmed_up: Callable[[], None] = lambda: None
    ) -> float:
        """Of a step, after some of warming up."""
        began_s = self.synchronised_s()
        step(0)
        slow = self.synchronised_s() - began_s > SLOW_S
        warm_up, steps = (1, min(2, self.steps)) if slow else (self.warm_up, self.steps)
        for number in range(1, warm_up):
            step(number)
        began_s = self.synchronised_s()
        warmed_up()
        for number in range(steps):
            step(warm_up + number)
        return (self.synchronised_s() - began_s) / steps

    def measured(
        self, part: str, what: str, step_s: float, samples: int, flops: float | None
    ) -> None:
        """Adds what steps of so many samples and operations took."""
        rate, peak = flops / step_s if flops else None, peak_flops(self.device, "bf16")
        self.add(
            Row(
                part,
                what,
                step_s,
                samples / step_s,
                rate / 1e12 if rate else None,
                rate / peak if rate and peak else None,
                self._peak_gib(),
            )
        )

    def _peak_gib(self) -> float | None:
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device) / 2**30


class RiseBench(Bench):
    """RISE's stages and its language model.

    Args:
        size: Of models and data.
        device: As of `Bench`.
        out: As of `Bench`.
    """

    def __init__(self, size: Size, device: torch.device, out: Path | None):
        super().__init__(device, out, warm_up=size.warm_up, steps=size.steps)
        self.size = size

    def stage(self, part: str, case: Case) -> None:
        """All ways to train a stage; models that a way does not need are not on the device."""
        training = Training(case, self.size, self.device, self.dtype)
        texts, b = texts_of(case.batch), case.bucket
        shape = (case.batch, b.frames, b.height_px, b.width_px, 3)
        drawn = torch.Generator().manual_seed(0)
        pixels_BFHW3 = torch.randint(0, 256, shape, dtype=torch.uint8, generator=drawn)
        cached = training.random_features(texts)
        with self.guarded(part, "ours, features cached"):
            self.ours(part, "ours, features cached", training, lambda: cached)
        lm = None
        with self.guarded(part, "the LLM"):
            lm = decoder(self.size.llm, str(self.device), self.dtype)
        if lm is None:
            return
        for what, keep in (("prefix kept", True), ("no prefix kept", False)):
            with self.guarded(part, f"ours, on the fly, {what}"):
                features = training.on_the_fly(lm, pixels_BFHW3, texts, use_prefix=keep)
                self.ours(part, f"ours, on the fly, {what}", training, features)
        with self.guarded(part, "plain loop"):
            training.forget_gradients()
            plain = Plain(training.learner.module, lm.model, 1e-4, self.dtype)
            step_s = self.seconds(lambda _: plain.step(pixels_BFHW3, texts))
            self.measured(part, "plain loop", step_s, case.batch, training.flops)
        self.compare(part, "plain loop")

    def ours(
        self, part: str, what: str, training: Training, features: Callable[[], list[Features]]
    ) -> None:
        """One way of ours."""
        meter = Meter(self.device, "bf16")
        step_s = self.seconds(lambda n: training.step(n, features(), meter), meter.reset)
        found = meter.read()
        num = training.case.batch
        training.flops = 1e12 * num * found["tflops_per_s"] / found["samples_per_s"]
        self.measured(part, what, step_s, num, training.flops)

    # The language model

    def prompts(self, part: str) -> None:
        """Teacher forcing with and without the prefix; from a prompt to the conditioning."""
        lm = decoder(self.size.llm, str(self.device), self.dtype)
        lengths = f"{INSTRUCTION}/{ORIGINAL}/{ANSWER}"
        with self.guarded(part, "teacher forcing"):
            texts = texts_of(8)
            whole_s, kept_s = (
                self.seconds(lambda _, keep=keep: lm.teacher_forced(texts, use_prefix=keep))
                for keep in (False, True)
            )
            what = f"teacher forcing of 8 texts of {lengths} tokens"
            self.add(Row(part, f"{what}, whole", whole_s, 8 / whole_s, against=1.0))
            against = whole_s / kept_s
            self.add(Row(part, f"{what}, prefix kept", kept_s, 8 / kept_s, against=against))
        with self.guarded(part, "prompt to conditioning"):
            self._latency(part, lm, lengths)

    @torch.no_grad()
    def _latency(self, part: str, lm: DecoderLM, lengths: str) -> None:
        sd, cog = (
            kind.random(shapes, video=False, device=self.device, dtype=self.dtype)
            for kind, shapes in ((AnimateDiff, self.size.sd), (CogVideoX, self.size.cogvideox))
        )
        encoders = {"CLIP": partial(random_text, sd), "T5": partial(random_text, cog)}
        found = latency(lm, encoders, sd.text_dim, 2 if self.size is QUICK else 5)
        one_s = found["rephrase"] + found["adapter"]
        ways = {
            "one pass and the adapter": one_s,
            "rephrase, then CLIP": found["rephrase"] + found["CLIP"],
            "rephrase, then T5": found["rephrase"] + found["T5"],
            "rephrase, then the LLM again": found["rephrase"] + found["LLM"],
            "`generate` with no prefix kept, then T5": found["generate"] + found["T5"],
        }
        generate_s = found["generate"] + found["T5"]
        for way, seconds in ways.items():
            what = f"prompt to conditioning ({lengths}): {way}"
            self.add(Row(part, what, seconds, 1 / seconds, against=generate_s / seconds))


def random_text(vdm: VDM, texts: Sequence[str]) -> Tensor:
    """As `encode_text`, but of random tokens: a model of random weights has no tokenizer."""
    encoder: Any = vdm.text_encoder  # type: ignore[attr-defined]
    ids_BL = torch.randint(3, 900, (len(texts), vdm.text_len))
    ids_BL = ids_BL.clamp(max=encoder.config.vocab_size - 1)
    return encoder(ids_BL.to(vdm.device))[0].float()  # type: ignore[attr-defined]


def trained(
    module: nn.Module, optimizer: torch.optim.Optimizer, batch: Mapping[str, Tensor], kind: str
) -> None:
    """A step on a batch as `Trainer` takes it, on a device of this kind."""
    with torch.autocast(kind, torch.bfloat16):
        losses_B = module(**batch)
    losses_B.mean().backward()
    norm = clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    if not torch.isfinite(norm):
        raise FloatingPointError("the gradient is not finite: a step was not whole")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class Training:
    """A stage of RISE by hand, as `Rise.learner` and `trainers.loop` put it together.

    Args:
        case: Which.
        size: Of the LLM and the LoRA.
        device: Where.
        dtype: Of frozen weights.
    """

    def __init__(self, case: Case, size: Size, device: torch.device, dtype: torch.dtype):
        self.case, self.width, self.device = case, size.llm["hidden_size"], device
        video = case.stage == "motion"
        self.vdm = case.kind.random(case.shapes, video=video, device=device, dtype=dtype)
        null_LD = torch.zeros(case.length, self.vdm.text_dim)
        adapter = RephrasingAdapter(self.width, self.vdm.text_dim, null_LD).to(device)
        add_lora(self.vdm.denoiser, size.rank, size.rank, self.vdm.lora_targets, LORA)
        self.learner = RiseLearner(RiseModule(self.vdm, adapter, 0.1), GROUPS[case.stage])
        if case.checkpoint:
            self.learner.checkpoint_gradients()
        optims = [Optim(group=group, lr=1e-4) for group in self.learner.groups]
        self.optimizer = adamw(self.learner.module, self.learner.groups, optims)
        self.flops = 0.0
        """Of a step, once one was measured."""

    def step(self, number: int, features: Sequence[Features], meter: Meter) -> None:
        """As `Trainer._step` and `_backward`."""
        case, device = self.case, self.device.type
        samples = [Sample({}, case.bucket, features=dict(own)) for own in features]
        batch = self.learner.batch(samples, Noise(0, number, range(case.batch)))
        meter.step(case.batch, 0.0)
        with torch.autocast(device, torch.bfloat16):
            meter.count(case.bucket, self.learner.module, batch)
        trained(self.learner.module, self.optimizer, batch, device)

    def forget_gradients(self) -> None:
        """Also those that a step has left which failed; and the optimiser's state."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()

    def random_features(self, texts: Sequence[TextIds]) -> list[Features]:
        """As a cache gives them, on the CPU."""
        b = self.case.bucket
        shape = self.vdm.latent_shape(b.frames, b.height_px, b.width_px)
        return [
            {
                "tokens": text.pack(),
                "states": torch.randn(len(text.answer), self.width, dtype=torch.bfloat16),
                "latents": torch.rand(2, *shape),
            }
            for text in texts
        ]

    def on_the_fly(
        self, lm: DecoderLM, pixels_BFHW3: Tensor, texts: Sequence[TextIds], *, use_prefix: bool
    ) -> Callable[[], list[Features]]:
        """What the frozen encoders do in a step."""

        @torch.no_grad()
        def computed() -> list[Features]:
            moments = self.vdm.encode(pixels_BFHW3.to(self.device))
            states = lm.teacher_forced(texts, use_prefix=use_prefix)
            return [
                {"tokens": text.pack(), "states": own, "latents": latents}
                for text, own, latents in zip(texts, states, moments.unbind(), strict=True)
            ]

        return computed


def machine(device: torch.device) -> dict[str, str]:
    """What was measured on, and with which versions."""
    import diffusers
    import transformers

    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "hardware": kind,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def cells(row: Row) -> str:
    """A row's figures, as in the table."""

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    found = (
        shown(row.step_s, "{:.3f}"),
        shown(row.samples_per_s, "{:.3g}"),
        shown(row.tflops_per_s, "{:.1f}"),
        shown(row.mfu, "{:.1%}"),
        shown(row.peak_gib, "{:.1f}"),
        shown(row.against, "{:.2f}"),
    )
    return " | ".join(found)


def prepare(*, quick: bool) -> None:
    """The process, before anything is measured."""
    torch.manual_seed(0)
    if quick:  # else its time goes into compiling bfloat16 kernels, and threads that wait
        torch.backends.mkldnn.enabled = False
        torch.set_num_threads(1)


def table(bench: Bench, *, quick: bool) -> str:
    """Markdown."""
    names = ("measured", "s", "per s", "TFLOP/s", "MFU", "peak GiB", "times as fast")
    lines = [f"| {' | '.join(names)} |", "|---|" + "---:|" * (len(names) - 1)]
    lines += [f"| {r.part}: {r.what} | {r.note or cells(r)} |" for r in bench.rows]
    about = ", ".join(f"{name} {value}" for name, value in machine(bench.device).items())
    says = ["--quick: models of a few megabytes, whose figures mean nothing", ""] if quick else []
    return "\n".join([*says, *lines, "", about])


def main() -> None:
    """Measures the parts that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="which parts")
    parser.add_argument(
        "--checkpoint", action="store_true", help="checkpoint activations everywhere"
    )
    parser.add_argument("--quick", action="store_true", help="small models, on the CPU too")
    args = parser.parse_args()
    if not (torch.cuda.is_available() or args.quick):
        sys.exit("there is no GPU: --quick runs the same code on small models")
    size = QUICK if args.quick else FULL
    bench = RiseBench(size, torch.device("cuda" if torch.cuda.is_available() else "cpu"), args.out)
    prepare(quick=args.quick)
    for part in args.only:
        print(f"measuring {part} …", file=sys.stderr, flush=True)
        with bench.guarded(part, "all of it"):
            if part == "llm":
                bench.prompts(part)
            else:
                case = size.cases[part]
                bench.stage(part, replace(case, checkpoint=case.checkpoint or args.checkpoint))
    print(table(bench, quick=args.quick))


if __name__ == "__main__":
    main()
