"""What training costs: under Ray and alone, with cached features and without, by a plain loop.

Models have the paper's proportions, and random weights: Stable Diffusion 1.5 with AnimateDiff a
quarter as wide, on 8 frames of 128 px in place of 16 of 512; an LLM of LLaMA's kind, 384 wide with
8 layers in place of 4096 with 32. A video's step has operations of denoiser, VAE and LLM (450
tokens) as 1 : 0.51 : 0.19; at full size, by the same count, it is 1 : 0.46 : 0.15.

Shapes: B samples, F frames, H W pixels; C latent channels, T latent frames, Y X their lines and
columns; N tokens, L positions of the conditioning, D its width, E width of the LLM; M pictures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import select
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from engine.caption import Instruction
from engine.weights import Weights
from trainers.adapter import RephrasingAdapter, padded
from trainers.decoder import DecoderLM
from trainers.job import Job, Options
from trainers.language import LanguageModel
from trainers.prompts import Prompts, TextIds
from trainers.rise import Rise, RiseLearner, RiseModule
from trainers.system import Bucket, Data, Noise, Optim, Sample, TrainStage
from trainers.tiny_llm import build_tokenizer
from trainers.vdm import Backbone
from trainers.vdm_shapes import SD15, Shapes

INSTRUCTION, ORIGINAL, ANSWER = 315, 15, 120
"""Tokens of the paper's prompt and rephrasing."""
THREADS = 1
"""Of arithmetic, everywhere: the other core decodes."""
AROUND = 4
"""Of the tokens after the instruction, those that are not the caption's: the chat's end."""
WARM_UP = 2
WAIT_S = 180
_WIDTHS = (80, 160, 320, 320)
QUARTER: Shapes = {
    part: config | own
    for (part, config), own in zip(
        SD15.items(),
        (
            {},
            {"block_out_channels": _WIDTHS, "norm_num_groups": 16, "cross_attention_dim": 192},
            {"block_out_channels": (32, 64, 128, 128), "norm_num_groups": 16},
            {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 3},
            {},
            {"block_out_channels": _WIDTHS, "motion_norm_num_groups": 16},
        ),
        strict=True,
    )
}
LLAMA = {"hidden_size": 384, "intermediate_size": 1032, "num_hidden_layers": 8}
T5 = {"d_model": 384, "d_kv": 64, "d_ff": 960, "num_layers": 6, "num_heads": 6}
"""T5-XXL as the LLM is LLaMA: 384 wide with 6 layers in place of 4096 with 24."""


class Figure(NamedTuple):
    """What was measured, and what it should have been."""

    what: str
    value: str
    target: str = ""
    met: bool | None = None


# Steps and their times


class Mark(NamedTuple):
    """A moment, or a time, in s of the clock and of this process on the CPU."""

    wall_s: float
    cpu_s: float

    def since(self, before: Mark) -> Mark:
        """What has passed."""
        return Mark(self.wall_s - before.wall_s, self.cpu_s - before.cpu_s)


def now() -> Mark:
    """This moment."""
    return Mark(time.perf_counter(), time.process_time())


def median(times: Sequence[Mark]) -> Mark:
    """Of wall and CPU seconds apart."""
    return Mark(*(statistics.median(column) for column in zip(*times, strict=True)))


@dataclass(frozen=True)
class Clock:
    """Notes how long each step of a run takes.

    Runs that are compared take turns, a step each: whatever else the machine does meanwhile slows
    all of them alike. The turn is a byte that goes round through pipes. By the clock a step is the
    run's turn, though its threads may have read ahead before it.
    """

    file: str
    steps: int
    """Of the run."""
    turn: tuple[str, str] | None = None
    """Pipes from the run before this one and to the one after it."""

    def started(self) -> Callable[[], None]:
        """What is to be called when each step begins."""
        began: Mark | None = None
        number = 0
        pipes = [os.open(path, os.O_RDWR) for path in self.turn or ()]

        def begins() -> None:
            nonlocal began, number
            ended = now()
            if pipes:
                if began:
                    os.write(pipes[1], b"x")
                if number < self.steps - 1:  # none begins after the last, to hand the turn on
                    _wait(pipes[0])
            begins_now = now()
            if began:  # what its threads read ahead in the others' turns is its work, too
                taken = Mark(ended.wall_s - began.wall_s, begins_now.cpu_s - began.cpu_s)
                with open(self.file, "a") as file:
                    file.write(json.dumps(taken) + "\n")
            began, number = begins_now, number + 1

        return begins

    def read(self) -> list[Mark]:
        """Of each step, but for those of warming up and those in which others were ending."""
        lines = Path(self.file).read_text().splitlines()
        return [Mark(*json.loads(line)) for line in lines][WARM_UP : -1 if self.turn else None]


def _wait(pipe: int) -> None:
    if not select.select([pipe], [], [], WAIT_S)[0]:
        raise TimeoutError(f"a run beside this one has not taken its turn for {WAIT_S} s")
    os.read(pipe, 1)


@contextlib.contextmanager
def turns(work: Path, num: int) -> Iterator[list[tuple[str, str]]]:
    """Pipes for runs that take turns; the first begins."""
    folder = tempfile.mkdtemp(dir=work)
    paths = [f"{folder}/{i}" for i in range(num)]
    for path in paths:
        os.mkfifo(path)
    first = os.open(paths[0], os.O_RDWR)
    os.write(first, b"x")
    try:
        yield [(path, paths[(i + 1) % num]) for i, path in enumerate(paths)]
    finally:
        os.close(first)


@dataclass(frozen=True, kw_only=True)
class Clocked(Rise):
    """RISE with a clock."""

    clock: Clock | None = dataclasses.field(default=None, metadata={"resource": True})

    def learner(
        self,
        stage: TrainStage,
        device: torch.device,
        parents: Mapping[str, Mapping[str, Tensor]],
    ) -> RiseLearner:
        """The system loaded for a stage."""
        learner = Rise.learner(self, stage, device, parents)
        if self.clock:
            batch, begins = learner.batch, self.clock.started()

            def clocked(samples: Sequence[Sample], noise: Noise) -> dict[str, Tensor]:
                begins()
                return batch(samples, noise)

            learner.batch = clocked  # type: ignore[method-assign]
        return learner


# Models and data


def build_models(folder: Path) -> None:
    """Writes `llm`, `animatediff` and `cogvideox`, whose text encoder alone is of any size."""
    from diffusers import AutoencoderKL, MotionAdapter, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from trainers.tiny_vdm import build_animatediff, build_cogvideox

    sd, cog = build_animatediff(folder / "animatediff") / "sd", folder / "cogvideox"
    build_cogvideox(cog, rotary=False)
    torch.manual_seed(0)
    random_llm(LLAMA).save_pretrained(folder / "llm")
    tokenizer().save_pretrained(folder / "llm")
    for kind, part in (
        (UNet2DConditionModel, "unet"),
        (AutoencoderKL, "vae"),
        (MotionAdapter, "motion"),
    ):
        at = sd.parent / "motion" if part == "motion" else sd / part
        kind.from_config(QUARTER[part]).save_pretrained(at)
    clip = CLIPTextConfig.from_pretrained(sd / "text_encoder").to_dict()
    changes = {k: QUARTER["text_encoder"][k] for k in ("hidden_size", "intermediate_size")}
    clip |= changes | {"num_hidden_layers": 3}
    CLIPTextModel(CLIPTextConfig(**clip)).save_pretrained(sd / "text_encoder")
    t5 = T5Config.from_pretrained(cog / "text_encoder").to_dict() | T5
    T5EncoderModel(T5Config(**t5)).save_pretrained(cog / "text_encoder")
    config = json.loads((cog / "transformer" / "config.json").read_text())
    (cog / "transformer" / "config.json").write_text(json.dumps(config | {"text_embed_dim": 384}))


def tokenizer() -> Any:
    """LLaMA's kind, with 900 tokens."""
    return build_tokenizer("llama")


@torch.no_grad()
def random_llm(
    config: Mapping[str, Any], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """A LLaMA that never ends its answer, and says only what the small tokenizer knows."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    known = tokenizer()
    heads = config["hidden_size"] // (128 if config["hidden_size"] > 1024 else 64)
    vocabulary = {"vocab_size": max(len(known), config.get("vocab_size", 0))}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            made = LlamaForCausalLM(
                LlamaConfig(**config | vocabulary, num_attention_heads=heads)
            ).eval()
    finally:
        torch.set_default_dtype(before)
    made.lm_head.weight[len(known) :] = 0
    made.lm_head.weight[known.all_special_ids] = 0
    made.generation_config = GenerationConfig(eos_token_id=known.eos_token_id)
    return made.requires_grad_(False)


def instruction_text() -> str:
    """An instruction of the paper's length in tokens, in words of the real one."""
    words = (Path(__file__).parents[1] / "engine" / "instructions" / "dense.txt").read_text()
    words = words.replace('"{y_ori}"', "").split()
    prompts = Prompts(tokenizer(), _llama_config(), "chat", "llm")
    text = ""
    for word in words * 3:
        longer = f"{text} {word}".strip()
        if len(prompts.tokenized(f"{longer}: rewrite {{y_ori}}", None, "a").prefix) > INSTRUCTION:
            break
        text = longer
    return text


def _llama_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**LLAMA)


def words_of(num: int) -> str:
    """Words of so many tokens, or one less or two."""
    known, corpus = tokenizer(), "A small white cat with a blue collar sits on the wooden floor of"
    text = ""
    for word in corpus.split() * (num // 4):
        if len(known.encode(f"{text} {word}".strip(), add_special_tokens=False)) > num:
            break
        text = f"{text} {word}".strip()
    return text


def make_dataset(root: Path, videos: Sequence[Path], instruction: str) -> str:
    """Spans of two seconds of the videos, with quadruples as long as the paper's."""
    import av
    from small_sets import Item, make_set

    items = []
    for video in videos:
        with av.open(str(video)) as container:
            seconds = (container.duration or 0) / av.time_base
        items += [
            Item(
                file=video,
                start_s=start,
                end_s=start + 2.0,
                fps=30.0,
                size=(720, 1280),
                original=words_of(ORIGINAL - AROUND),
                rephrased=words_of(ANSWER),
                instructions=(instruction,),
            )
            for start in np.arange(0, min(seconds, 10) - 2.0, 2.0).tolist()
        ]
    return make_set(root, items)


@dataclass(frozen=True)
class Ready:
    """What the runs are made of."""

    work: Path
    system: Clocked
    stages: Mapping[str, TrainStage]
    roots: Mapping[str, str]
    """`fresh`, and `cached`, whose features are all stored."""


def prepared(work: Path, videos: Sequence[Path]) -> Ready:
    """Builds what is not below `work` yet."""
    models, data = work / "models", work / "data"
    instruction = instruction_text()
    if not models.exists():
        build_models(models)
    base, motion = (Weights(at=str(models / "animatediff" / n)) for n in ("sd", "motion"))
    system = Clocked(
        lm=LanguageModel(weights=Weights(at=str(models / "llm"))),
        vdm=Backbone(kind="animatediff", base=base, motion=motion),
        rank=32,
    )
    stages = {
        name: TrainStage(
            name=name,
            data=Data(
                buckets=(Bucket(frames=frames, height_px=128, width_px=128),),
                instructions=(instruction,),
            ),
            optim=tuple(Optim(group=group, lr=1e-4) for group in groups),
            steps=1,
            batch=1,
            precision="fp32",
        )
        for name, frames, groups in (("image", 1, ("adapter", "lora")), ("motion", 8, ("lora",)))
    }
    roots = {name: str(data / name) for name in ("fresh", "cached")}
    if not data.exists():
        for root in roots.values():
            make_dataset(Path(root), videos, instruction)
        _fill(system, stages, roots["cached"])
    return Ready(work, system, stages, roots)


def _fill(system: Rise, stages: Mapping[str, TrainStage], root: str) -> None:
    from trainers.cache import fill
    from trainers.dataset import read_manifest

    with ray_of_our_own():
        for stage in stages.values():
            fill(
                root,
                read_manifest(root, stage.data),
                stage.data,
                system.encoders(stage),
                connect=contextlib.nullcontext,
            )


@contextlib.contextmanager
def ray_of_our_own() -> Iterator[None]:
    """Ray on this machine, whatever else runs on it."""
    import bench_train
    import ray

    from engine.session import connected

    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = "local"
    ray.cloudpickle.register_pickle_by_value(bench_train)
    try:
        with connected(2):
            yield
    finally:
        ray.cloudpickle.unregister_pickle_by_value(bench_train)
        os.environ.pop("RAY_ADDRESS")
        if before is not None:
            os.environ["RAY_ADDRESS"] = before


# The loop


def job_of(
    ready: Ready, name: str, root: str, steps: int, turn: tuple[str, str] | None = None
) -> Job:
    """Training a stage from its beginning."""
    out = tempfile.mkdtemp(dir=ready.work)
    return Job(
        recipe="bench",
        system=dataclasses.replace(ready.system, clock=Clock(f"{out}/clock", steps, turn)),
        stage=dataclasses.replace(ready.stages[name], steps=steps),
        root=root,
        out=out,
        options=Options(
            checkpoint_every=10**9,
            log_every=1,
            trackers=(),
            threads=2,
            torch_threads=THREADS,
        ),
    )


def alone(job: Job) -> None:
    """Trains in this process."""
    from trainers import launch

    launch.alone(job)


def processes(num: int) -> ProcessPoolExecutor:
    """Processes that have done nothing else, as Ray's workers."""
    return ProcessPoolExecutor(num, mp_context=multiprocessing.get_context("spawn"))


def ray_overhead(work: Path, videos: Sequence[Path], steps: int = 50) -> list[Figure]:
    """One worker under Ray Train against the same loop in a process of its own, step by step."""
    from trainers import launch

    ready = prepared(work, videos)
    with ray_of_our_own(), turns(work, 2) as taken, processes(1) as pool:
        jobs = [job_of(ready, "image", ready.roots["cached"], steps, turn) for turn in taken]
        running = pool.submit(alone, jobs[0])
        launch.on_ray(jobs[1], 1, max_failures=0)
        running.result()
    one, ray = (job.system.clock.read() for job in jobs)
    a, b = median(one), median(ray)
    over = [statistics.median(_ratios(ray, one, i)) - 1 for i in range(2)]
    unsure = [_uncertainty(_ratios(ray, one, i)) for i in range(2)]
    return [
        Figure(
            f"a step under Ray Train / alone, {len(one)} pairs in turn, CPU seconds",
            f"{over[1]:+.2%} ± {unsure[1]:.2%} ({1e3 * b.cpu_s:.0f} / {1e3 * a.cpu_s:.0f} ms)",
            "1 % or less",
            over[1] <= 0.01,
        ),
        Figure(
            "  the same by the clock",
            f"{over[0]:+.2%} ± {unsure[0]:.2%} ({1e3 * b.wall_s:.0f} / {1e3 * a.wall_s:.0f} ms)",
            "1 % or less",
            over[0] <= 0.01,
        ),
    ]


def _ratios(one: Sequence[Mark], other: Sequence[Mark], which: int) -> list[float]:
    return [a[which] / b[which] for a, b in zip(one, other, strict=True)]


def _uncertainty(values: Sequence[float]) -> float:
    """Standard error of a median, from the quartiles as of a normal distribution."""
    low, _, high = statistics.quantiles(values, n=4)
    return 1.25 * (high - low) / 1.35 / len(values) ** 0.5


def features(work: Path, videos: Sequence[Path]) -> list[Figure]:
    """Steps with features computed on the fly, with cached ones, and of a plain loop, in turn."""
    ready = prepared(work, videos)
    figures = []
    with processes(3) as pool:
        for name, steps in (("image", 14), ("motion", 8)):
            with turns(work, 3) as taken:
                fresh, cached = (
                    job_of(ready, name, ready.roots[root], steps, turn)
                    for root, turn in zip(("fresh", "cached"), taken, strict=False)
                )
                clock = Clock(f"{fresh.out}/plain", steps, taken[2])
                running = [pool.submit(alone, job) for job in (fresh, cached)]
                running.append(pool.submit(plain_loop, ready, name, clock))
                for each in running:
                    each.result()
            times = [c.read() for c in (fresh.system.clock, cached.system.clock, clock)]
            figures += _compared(name, *times)
    return figures


def _compared(
    name: str, fresh: Sequence[Mark], cached: Sequence[Mark], plain: Sequence[Mark]
) -> list[Figure]:
    def ratio(a: Sequence[Mark], b: Sequence[Mark]) -> str:
        wall, cpu = (statistics.median(_ratios(a, b, i)) for i in range(2))
        times = f"{median(a).cpu_s:.2f} / {median(b).cpu_s:.2f} CPU s"
        return f"{cpu:.2f} ({times}; by the clock {wall:.2f})"

    return [
        Figure(f"{name} step, latents and states on the fly / cached", ratio(fresh, cached)),
        Figure(f"{name} step, plain loop / ours on the fly", ratio(plain, fresh)),
        Figure(f"{name} step, plain loop / ours with features cached", ratio(plain, cached)),
    ]


def data_wait(work: Path, videos: Sequence[Path]) -> list[Figure]:
    """How much of a run waits for frames that are decoded for each step, after its first."""
    from trainers import tracking

    ready = prepared(work, videos)
    figures = []
    with processes(1) as pool:
        for name, steps in (("image", 14), ("motion", 5)):
            job = job_of(ready, name, ready.roots["fresh"], steps)
            pool.submit(alone, job).result()
            lines = tracking.read(job.folder)[1:]
            seconds = [1 / line["samples_per_s"] for line in lines]
            waited = [s * x["data_wait_frac"] for s, x in zip(seconds, lines, strict=True)]
            share = sum(waited) / sum(seconds)
            figures.append(
                Figure(
                    f"data-wait share, {name} stage, 720p video decoded in every step",
                    f"{share:.2%} ({len(lines)} steps of {statistics.median(seconds):.2f} s)",
                    "5 % or less",
                    share <= 0.05,
                )
            )
    return figures


# A plain loop


class Plain:
    """A training loop as diffusers' examples have it: what is frozen runs in every step.

    The LLM reads the whole padded text, the VAE every frame; noise is drawn where the model is.

    Args:
        module: With the adapter, the LoRA and the video model.
        lm: A causal language model of transformers.
        lr: Of AdamW.
        dtype: Of what is frozen; bfloat16 is autocast.
    """

    def __init__(self, module: RiseModule, lm: Any, lr: float, dtype: torch.dtype):
        self.module, self.vdm, self.lm, self.dtype = module, module.vdm, lm, dtype
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, weight_decay=0.01)
        self.rates = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)

    def step(self, pixels_BFHW3: Tensor, texts: Sequence[TextIds]) -> float:
        """Trains on a batch; gives its loss."""
        device = self.module.adapter.null_LD.device
        bf16 = self.dtype == torch.bfloat16
        with torch.no_grad():
            latents_BCTYX = self._latents(pixels_BFHW3.to(device))
            states = self._states(texts, device)
        states_BLE, length_B = padded(states, self.module.adapter.length)
        noise_BCTYX = torch.randn_like(latents_BCTYX)
        scheduler = self.vdm.scheduler
        num = scheduler.config.num_train_timesteps
        at_B = torch.randint(0, num, (len(texts),), device=device)
        noisy_BCTYX = scheduler.add_noise(latents_BCTYX, noise_BCTYX, at_B)
        target_BCTYX = noise_BCTYX
        if scheduler.config.prediction_type == "v_prediction":
            target_BCTYX = scheduler.get_velocity(latents_BCTYX, noise_BCTYX, at_B)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            text_BLD = self.module.adapter(states_BLE, length_B)
            said_BCTYX = self._denoise(noisy_BCTYX, at_B, text_BLD)
            loss = nn.functional.mse_loss(said_BCTYX.float(), target_BCTYX.float())
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.rates.step()
        self.optimizer.zero_grad()
        return loss.detach().item()

    def _latents(self, pixels_BFHW3: Tensor) -> Tensor:
        unit_BFHW3 = pixels_BFHW3.to(self.dtype) / 127.5 - 1
        num, vae = len(unit_BFHW3), self.vdm.vae
        if vae.config._class_name == "AutoencoderKL":
            unit_M3HW = unit_BFHW3.flatten(0, 1).permute(0, 3, 1, 2)
            found_MCYX = vae.encode(unit_M3HW).latent_dist.sample()
            found_BCTYX = found_MCYX.unflatten(0, (num, -1)).transpose(1, 2)
        else:
            found_BCTYX = vae.encode(unit_BFHW3.permute(0, 4, 1, 2, 3)).latent_dist.sample()
        return found_BCTYX * vae.config.scaling_factor

    def _states(self, texts: Sequence[TextIds], device: torch.device) -> list[Tensor]:
        runs = [torch.tensor(t.prompt + t.answer) for t in texts]
        ids_BN = nn.utils.rnn.pad_sequence(runs, batch_first=True).to(device)
        lengths_B1 = torch.tensor([[len(run)] for run in runs], device=device)
        mask_BN = torch.arange(ids_BN.shape[1], device=device) < lengths_B1
        said = self.lm.get_decoder()(input_ids=ids_BN, attention_mask=mask_BN.long())
        starts = [len(t.prompt) for t in texts]
        return [
            states_NE[start : len(run)]
            for states_NE, start, run in zip(said.last_hidden_state, starts, runs, strict=True)
        ]

    def _denoise(self, noisy_BCTYX: Tensor, at_B: Tensor, text_BLD: Tensor) -> Tensor:
        from diffusers import CogVideoXTransformer3DModel

        denoiser, frames = self.module.denoiser, noisy_BCTYX.shape[2]
        text_BLD = text_BLD.to(self.dtype)
        if isinstance(denoiser, CogVideoXTransformer3DModel):
            return denoiser(noisy_BCTYX.transpose(1, 2), text_BLD, at_B).sample.transpose(1, 2)
        if type(denoiser).__name__ == "UNetMotionModel":
            return denoiser(noisy_BCTYX, at_B, text_BLD.repeat_interleave(frames, 0)).sample
        return denoiser(noisy_BCTYX[:, :, 0], at_B, text_BLD).sample[:, :, None]


def plain_loop(ready: Ready, name: str, clock: Clock) -> None:
    """The same training with a DataLoader that decodes and tokenises as it goes."""
    from torch.utils.data import DataLoader

    stage, device = ready.stages[name], torch.device("cpu")
    torch.set_num_threads(THREADS)
    torch.manual_seed(stage.seed)
    module = ready.system.learner(stage, device, {}).module
    lm = ready.system.lm.load(device, torch.float32).model
    loop = Plain(module, lm, 1e-4, torch.float32)
    batches = DataLoader(
        Rows(ready, stage), batch_size=stage.batch, shuffle=True, collate_fn=_collated
    )
    begins = clock.started()
    epochs = itertools.chain.from_iterable(itertools.repeat(batches))
    for pixels_BFHW3, texts in itertools.islice(epochs, clock.steps):
        begins()
        loop.step(pixels_BFHW3, texts)


class Rows(torch.utils.data.Dataset):
    """What the plain loop reads: frames, decoded when asked for, and texts."""

    def __init__(self, ready: Ready, stage: TrainStage):
        from trainers.dataset import read_manifest

        self.manifest = read_manifest(ready.roots["fresh"], stage.data)
        self.data, self.prompts = stage.data, Prompts.load(ready.system.lm)

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> tuple[Tensor, TextIds]:
        from trainers.frames import pixels_of

        row = self.manifest.row(index)
        texts = (row[n] for n in ("instruction_text", "language", "original", "rephrased"))
        pixels_FHW3 = pixels_of(row, self.data.buckets[0], self.data.fps)
        return torch.from_numpy(pixels_FHW3), self.prompts.tokenized(*texts)


def _collated(rows: Sequence[tuple[Tensor, TextIds]]) -> tuple[Tensor, list[TextIds]]:
    return torch.stack([r[0] for r in rows]), [r[1] for r in rows]


# The language model


def texts_of(num: int, vocabulary: int = 800, seed: int = 0) -> list[TextIds]:
    """Texts of the paper's lengths with one instruction, in random tokens."""
    drawn = np.random.default_rng(seed)

    def run(length: int) -> tuple[int, ...]:
        return tuple(drawn.integers(10, vocabulary, length).tolist())

    prefix = run(INSTRUCTION)
    return [TextIds(prefix, run(ORIGINAL), run(ANSWER)) for _ in range(num)]


@contextlib.contextmanager
def counted(lm: DecoderLM) -> Iterator[list[int]]:
    """Tokens that a decoder is given, call by call."""
    fed: list[int] = []
    hook = lm.model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        yield fed
    finally:
        hook.remove()


def prefix(repeats: int = 8, batch: int = 4) -> list[Figure]:
    """Teacher forcing with the instruction's keys and values kept, against without."""
    from torch.utils.flop_counter import FlopCounterMode

    lm, texts, threads = decoder(LLAMA), texts_of(batch), torch.get_num_threads()
    torch.set_num_threads(THREADS)
    lm.teacher_forced(texts)  # computes the prefix, once for a whole run
    seconds: dict[bool, list[Mark]] = {False: [], True: []}
    fed, flops = {}, {}
    for use in seconds:
        with counted(lm) as tokens, FlopCounterMode(display=False) as counter:
            lm.teacher_forced(texts, use_prefix=use)
        fed[use], flops[use] = sum(tokens), counter.get_total_flops()
    for _ in range(repeats):
        for use, found in seconds.items():
            before = now()
            lm.teacher_forced(texts, use_prefix=use)
            found.append(now().since(before))
    torch.set_num_threads(threads)
    whole, kept = (median(seconds[use]) for use in (False, True))
    ratio = whole.cpu_s / kept.cpu_s
    return [
        Figure(
            f"teacher forcing of {INSTRUCTION}/{ORIGINAL}/{ANSWER} tokens, whole / prefix kept",
            f"{ratio:.2f} ({1e3 * whole.cpu_s:.0f} / {1e3 * kept.cpu_s:.0f} CPU ms for {batch})",
            "2 or more",
            ratio >= 2,
        ),
        Figure(
            "  tokens fed; operations",
            f"{fed[False] / fed[True]:.2f} ({fed[False]} / {fed[True]});"
            f" {flops[False] / flops[True]:.2f}",
        ),
    ]


def decoder(
    config: Mapping[str, Any], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> DecoderLM:
    """A random LLM as the trainers hold it."""
    model = random_llm(config, device, dtype)
    return DecoderLM(model, Prompts(tokenizer(), model.config, "chat", "llm"))


def conditioning(work: Path, repeats: int = 6) -> list[Figure]:
    """From a prompt to the conditioning: one pass, against rephrasing and then encoding.

    All rephrase alike, so this is timed apart; what follows it is timed on what it gave.
    """
    models, device, threads = work / "models", torch.device("cpu"), torch.get_num_threads()
    if not models.exists():
        build_models(models)
    torch.set_num_threads(THREADS)
    lm = LanguageModel(weights=Weights(at=str(models / "llm"))).load(device, torch.float32)
    clip, t5 = (
        Backbone(kind=kind, base=Weights(at=str(base))).load(
            video=False, device=device, dtype=torch.float32
        )
        for kind, base in (
            ("animatediff", models / "animatediff" / "sd"),
            ("cogvideox", models / "cogvideox"),
        )
    )
    times = latency(lm, {"CLIP": clip.encode_text, "T5": t5.encode_text}, t5.text_dim, repeats)
    torch.set_num_threads(threads)
    of_it = times["rephrase"] + times["adapter"]
    lengths = f"{INSTRUCTION} + {ORIGINAL} tokens, {ANSWER} new ones"

    def against(first: str, second: str) -> str:
        other = times[first] + times[second]
        return f"{other / of_it:.3f} ({1e3 * other:.0f} / {1e3 * of_it:.0f} CPU ms)"

    return [
        Figure(f"prompt to conditioning ({lengths}): rephrase, then T5 / one pass",
               against("rephrase", "T5")),
        Figure("  rephrase, then CLIP / one pass", against("rephrase", "CLIP")),
        Figure("  rephrase, then the LLM again / one pass", against("rephrase", "LLM")),
        Figure("  `generate` with no prefix kept, then T5 / one pass", against("generate", "T5")),
    ]  # fmt: skip


@torch.no_grad()
def latency(
    lm: DecoderLM,
    encoders: Mapping[str, Callable[[Sequence[str]], Tensor]],
    text_dim: int,
    repeats: int,
) -> dict[str, float]:
    """Seconds of each part of making a conditioning: on a GPU by the clock, else of the CPU.

    Args:
        lm: Rephrases with the states of its tokens.
        encoders: That encode a rephrased text instead.
        text_dim: Of the conditioning.
        repeats: Medians are of so many.
    """
    on_gpu = lm.device.type == "cuda"
    told = Instruction(name="dense", text=f"{instruction_text()}: rewrite {{y_ori}}")
    prompt, null_LD = words_of(ORIGINAL - AROUND), torch.zeros(ANSWER, text_dim)
    adapter = RephrasingAdapter(lm.width, text_dim, null_LD).to(lm.device).requires_grad_(False)
    found: dict[str, list[float]] = {}

    def timed(name: str, does: Callable[[], Any]) -> Any:
        if on_gpu:
            torch.cuda.synchronize()
        before = now()
        given = does()
        if on_gpu:
            torch.cuda.synchronize()
        found.setdefault(name, []).append(now().since(before)[0 if on_gpu else 1])
        return given

    for _ in range(repeats + 1):
        (said,) = timed("rephrase", lambda: lm.rephrase(told, [prompt], max_new_tokens=ANSWER + 1))
        states = [said.states_SD]
        timed("adapter", lambda states=states: adapter(*padded(states, ANSWER)))
        for name, encode in encoders.items():
            timed(name, lambda encode=encode, text=said.text: encode([text]))
        ids = lm.tokenized(told.text, None, prompt, said.text)
        ids = TextIds(ids.prefix, ids.rest, ids.answer[:ANSWER])
        timed("LLM", lambda ids=ids: adapter(*padded(lm.encoded([ids]), ANSWER)))
        timed("generate", lambda ids=ids: plainly(lm, ids.prompt))
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def plainly(lm: DecoderLM, prompt: Sequence[int]) -> str:
    """Rephrases as transformers alone would."""
    ids_1N = torch.tensor([prompt], device=lm.device)
    said_1N = lm.model.generate(
        ids_1N,
        attention_mask=torch.ones_like(ids_1N),
        max_new_tokens=ANSWER + 1,
        do_sample=False,
        pad_token_id=lm.prompts.tokenizer.pad_token_id,
    )
    return lm.prompts.said(said_1N[0, len(prompt) :].tolist())
