"""Wan against diffusers on the same weights; windows, rectified flow and places in closed form."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

from diffusers import (  # noqa: E402
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

from engine.weights import Weights  # noqa: E402
from trainers.context_wan import rotary  # noqa: E402
from trainers.diffusion import Euler, flow_noised, sampled, shifted  # noqa: E402
from trainers.lora import add_lora, load_lora, lora_state, save_lora  # noqa: E402
from trainers.places import latent_middles, latent_time, spread  # noqa: E402
from trainers.tiny_vdm import TEXT_DIM, build_wan  # noqa: E402
from trainers.tuning import tune  # noqa: E402
from trainers.vdm import Backbone, Conditioning, Context, Variant  # noqa: E402
from trainers.vdm_shapes import WAN_1_3B, WAN_14B  # noqa: E402
from trainers.wan import Wan  # noqa: E402
from trainers.windows import attend, check_window, plan_windows  # noqa: E402

CPU = torch.device("cpu")
WIDTH = 24
Load = Callable[..., Wan]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def load(folder: Path) -> Load:
    """A fresh model, of the variant that keywords tell."""

    def load(dtype: torch.dtype = torch.float32, **variant: Any) -> Wan:
        source = Backbone(kind="wan", base=Weights(at=str(folder)))
        model = source.load(video=True, device=CPU, dtype=dtype, variant=Variant(**variant))
        assert isinstance(model, Wan)
        return model

    return load


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def texts(*, num: int = 2, length: int = 16, seed: int = 1) -> torch.Tensor:
    return normal(num, 1, length, TEXT_DIM, seed=seed)


def noise_of(model: Wan, *, frames: int = 9, num: int = 2, seed: int = 2) -> torch.Tensor:
    return normal(num, *model.latent_shape(frames, 64, 64), seed=seed)


def context_of(*middles: float, num: int = 2, side: int = 2, seed: int = 3) -> Context:
    return Context(normal(num, len(middles), side, side, WIDTH, seed=seed), middles)


@torch.no_grad()
def said(
    model: Wan, noisy: torch.Tensor, context: Context | None = None, text: Any = None
) -> torch.Tensor:
    text = texts(num=len(noisy)) if text is None else text
    return model.denoise(noisy, torch.full((len(noisy),), 500.5), Conditioning(text, None, context))


def pipeline_of(folder: Path) -> Any:
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Against diffusers


def test_the_denoiser_is_that_of_diffusers_bit_for_bit(load: Load, folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = load(dtype)
        stock = WanTransformer3DModel.from_pretrained(folder / "transformer", dtype=dtype)
        text, noisy, at = texts(), noise_of(model, frames=13), torch.tensor([10.25, 900.0])
        given = (noisy.to(dtype), at, text[:, 0].to(dtype))
        with torch.no_grad():
            ours = model.denoise(noisy, at, Conditioning(text, torch.ones(2, 13, 1)))
            theirs = stock(*given).sample
            assert torch.equal(ours, theirs.float()) and ours.std() > 0.1
            assert torch.equal(model.denoiser(*given, return_dict=False)[0], theirs)
        kept = {name: p.dtype for name, p in stock.named_parameters()}
        assert {name: p.dtype for name, p in model.denoiser.named_parameters()} == kept


def test_text_is_encoded_as_by_the_pipeline(load: Load, folder: Path) -> None:
    model, pipeline = load(), pipeline_of(folder)
    prompts = ["A small\n cat &amp;amp; a dog. ", "", "word " * 200]
    with torch.no_grad():
        theirs, _ = pipeline.encode_prompt(prompts, None, False, max_sequence_length=512)
    ours = model.encode_text(prompts)
    assert ours.shape == (3, 512, TEXT_DIM) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    of_text = ours.abs().sum(2) > 0
    # A character is a piece here; one more marks the end.
    assert of_text.sum(1).tolist() == [len(" A small cat & a dog.") + 1, 1, 512]


class SameSigmas(FlowMatchEulerDiscreteScheduler):
    """Ours: evenly spaced before the shift, the last step to no noise."""

    def set_timesteps(self, num: int, device: Any = None) -> None:
        super().set_timesteps(sigmas=[1 - n / num for n in range(num)], device=device)


@pytest.mark.parametrize("shift", [None, 1.0])
def test_generating_equals_the_pipeline(shift: float | None, load: Load, folder: Path) -> None:
    model, pipeline = load(shift=shift), pipeline_of(folder)
    assert model.shift == (shift or 3.0)
    pipeline.scheduler = SameSigmas(shift=model.shift)
    text, noise = texts(), noise_of(model)
    null = torch.zeros_like(text[:, 0])
    for scale in (5.0, 1.0):
        theirs = pipeline(
            prompt_embeds=text[:, 0],
            negative_prompt_embeds=null,
            latents=noise,
            num_frames=9,
            height=64,
            width=64,
            num_inference_steps=4,
            guidance_scale=scale,
            output_type="latent",
        ).frames
        numbers: list[int] = []
        ours = model.generate(
            Conditioning(text),
            null[0],
            noise,
            steps=4,
            guidance_scale=scale,
            progress=numbers.append,
        )
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert ours.std() > 0.1 and numbers == [1, 2, 3, 4]


def test_pixels_are_scaled_as_the_pipeline_scales_them(load: Load, folder: Path) -> None:
    model, pipeline = load(), pipeline_of(folder)
    pixels = (torch.rand(2, 17, 32, 48, 3) * 255).to(torch.uint8)
    assert model.latent_shape(17, 32, 48) == (4, 5, 4, 6) and model.num_latent_frames(17) == 5
    moments = model.encode(pixels)
    assert moments.shape == (2, 2, 4, 5, 4, 6) and moments.dtype == torch.float32
    unit = pixels[1:].permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        posterior = model.vae.encode(unit).latent_dist
        mean = torch.tensor([-0.5, 0.25, 0.0, 0.125])[:, None, None, None]
        deviation = torch.tensor([0.5, 1.5, 2.0, 1.0])[:, None, None, None]
        expected = torch.stack([posterior.mean - mean, posterior.std], 1) / deviation
        torch.testing.assert_close(moments[1:], expected, atol=1e-5, rtol=1e-5)
        latents = normal(1, 4, 3, 4, 6)
        # The pipeline decodes what its last step gives: here of a prediction of nothing.
        pipeline.transformer.proj_out.weight.zero_()
        pipeline.transformer.proj_out.bias.zero_()
        theirs = pipeline(
            prompt_embeds=texts(num=1)[:, 0],
            latents=latents,
            num_frames=9,
            height=32,
            width=48,
            num_inference_steps=2,
            guidance_scale=1.0,
        ).frames
    ours = model.decode(latents)
    assert ours.shape == (1, 9, 32, 48, 3) and ours.dtype == torch.uint8
    assert abs(ours.numpy().astype(int) - (theirs * 255).round().astype(int)).max() <= 1
    assert ours.float().std() > 1


def test_latents_do_not_depend_on_later_frames_or_other_samples(load: Load) -> None:
    model = load()
    pixels = (torch.rand(2, 13, 16, 16, 3) * 255).to(torch.uint8)
    whole = model.encode(pixels)
    torch.testing.assert_close(model.encode(pixels[:, :5]), whole[:, :, :, :2])
    assert torch.equal(model.encode(pixels[1:]), whole[1:])
    picture = model.encode(pixels[:, :1])
    torch.testing.assert_close(picture, whole[:, :, :, :1])
    assert model.decode(picture[:, 0]).shape == (2, 1, 16, 16, 3)


@pytest.mark.parametrize(
    "asked, nearest",
    [((6, 64, 64), "5 of 64x64"), ((17, 60, 72), "17 of 64x64"), ((0, 16, 16), "1 of 16x16")],
)
def test_shapes_that_there_are_not_name_the_nearest(
    asked: tuple[int, int, int], nearest: str, load: Load
) -> None:
    with pytest.raises(ValueError, match=f"nearest are {nearest}"):
        load().latent_shape(*asked)


# Places


def test_places_at_whole_numbers_are_those_of_diffusers(load: Load) -> None:
    rope = load().denoiser.rope
    ours = rotary(rope, [(range(5), range(3), range(4))], CPU)
    theirs = rope(torch.empty(1, 4, 5, 6, 8))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    # Places between and beyond are the same function of the angle.
    cos, sin = rotary(rope, [((2000.5,), (0,), (0.25,))], CPU)
    angles = torch.tensor([2000.5, 2000.5 * 10_000**-0.5, 0, 0, 0.25, 0.25 * 10_000**-0.5])
    angles = angles.double().repeat_interleave(2)
    torch.testing.assert_close(cos[0, 0, 0].double(), angles.cos(), atol=1e-4, rtol=0)
    torch.testing.assert_close(sin[0, 0, 0].double(), angles.sin(), atol=1e-4, rtol=0)


def test_times_of_latent_frames_are_the_middles_of_their_frames() -> None:
    assert latent_middles(4, 4) == (0, 2.5, 6.5, 10.5)  # frames 0; 1 to 4; 5 to 8; 9 to 12
    assert latent_middles(3, 1) == (0, 1, 2)
    for each in (1, 2, 4):
        places = [latent_time(middle, each) for middle in latent_middles(5, each)]
        assert places == pytest.approx([0, 1, 2, 3, 4])
    assert latent_time(4.5, 4) == pytest.approx(1.5)  # between those of 2.5 and 6.5
    assert latent_time(1.25, 4) == pytest.approx(0.5)


def test_a_context_covers_the_grid_of_the_video(load: Load) -> None:
    assert spread(4, 4) == [0, 1, 2, 3]
    assert spread(2, 4) == [0.5, 2.5]
    assert spread(4, 2) == [-0.25, 0.25, 0.75, 1.25]
    model, given = load(), {}
    model.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: given.update(kwargs), with_kwargs=True
    )
    # A context on the video's own grid is where the video is.
    said(model, noise_of(model), context_of(*latent_middles(3, 4), side=4))
    for table in given["rotary_emb"]:
        assert table.shape == (1, 96, 1, 12)
        torch.testing.assert_close(table[:, :48], table[:, 48:])


def test_a_context_is_seen_by_its_places_and_not_by_its_order(load: Load) -> None:
    model = load()
    noisy, context = noise_of(model), context_of(1.0, 6.5)
    plain, with_it = said(model, noisy), said(model, noisy, context)
    assert with_it.shape == noisy.shape and (with_it - plain).abs().max() > 1e-3
    turned = Context(context.tokens_BSVUE.flip(1), context.middles[::-1])
    torch.testing.assert_close(said(model, noisy, turned), with_it, atol=1e-5, rtol=0)
    moved = Context(context.tokens_BSVUE, (1.0, 8.0))
    assert (said(model, noisy, moved) - with_it).abs().max() > 1e-5
    flipped = Context(context.tokens_BSVUE.flip(2), context.middles)
    assert (said(model, noisy, flipped) - with_it).abs().max() > 1e-5


def test_guidance_takes_a_context_of_its_own(load: Load) -> None:
    model = load()
    text, noise = Conditioning(texts(), None, context_of(1.0, 6.5)), noise_of(model)
    null, ask = texts(num=1)[0, 0], {"steps": 2, "guidance_scale": 3.0}
    other = context_of(1.0, 6.5, seed=9)
    with_it = model.generate(text, null, noise, null_context=other, **ask)
    assert (with_it - model.generate(text, null, noise, **ask)).abs().max() > 1e-4
    # A single step goes from time 1 to 0, whatever the shift.
    first = model.generate(text, null, noise, null_context=other, steps=1, guidance_scale=3.0)
    at = torch.full((2,), 1000.0)
    with torch.no_grad():
        said_text = model.denoise(noise, at, text)
        said_null = model.denoise(noise, at, Conditioning(null.expand(2, 1, -1, -1), None, other))
    torch.testing.assert_close(
        first, noise - (said_null + 3 * (said_text - said_null)), atol=1e-5, rtol=1e-5
    )


# Windows

EVEN, ODD = (0, 0, 0, 1, 1), (0, 0, 1, 1, 2)
"""Windows of 8 frames: those of five latent frames, with middles at 0, 2.5, 6.5, 10.5, 14.5."""
CONTEXT_EVEN, CONTEXT_ODD = (0, 0, 1, 1), (0, 1, 1, 2)
"""Those of a context's frames with middles at 2.5, 6.5, 10.5, 14.5."""


class Masked(WanAttnProcessor):
    """Diffusers' own dense attention with a mask."""

    def __init__(self, mask_NN: torch.Tensor):
        super().__init__()
        self.mask_NN = mask_NN

    def __call__(
        self, attn: Any, hidden: Any, text: Any = None, mask: Any = None, rotary_emb: Any = None
    ) -> torch.Tensor:
        return super().__call__(attn, hidden, text, self.mask_NN, rotary_emb)


def same_window(
    video: Sequence[int], context: Sequence[int], per_frame: int, per_context: int
) -> torch.Tensor:
    numbers = torch.tensor([n for n in video for _ in range(per_frame)]
                           + [n for n in context for _ in range(per_context)])  # fmt: skip
    return numbers[:, None] == numbers[None]


@pytest.mark.parametrize("with_context", [False, True])
def test_windows_equal_a_dense_mask(with_context: bool, load: Load) -> None:
    model, dense = load(window=8), load()
    noisy = noise_of(model, frames=17)
    context = context_of(2.5, 6.5, 10.5, 14.5) if with_context else None
    for number, block in enumerate(dense.blocks):
        video = (EVEN, ODD)[number % 2]
        beside = (CONTEXT_EVEN, CONTEXT_ODD)[number % 2] if with_context else ()
        block.attn1.set_processor(Masked(same_window(video, beside, 16, 4)))
    ours = said(model, noisy, context)
    torch.testing.assert_close(ours, said(dense, noisy, context), atol=1e-5, rtol=0)
    assert (ours - said(load(), noisy, context)).abs().max() > 1e-3
    # One window that holds all is full attention.
    torch.testing.assert_close(
        said(load(window=64), noisy, context), said(load(), noisy, context), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("kind", [0, 1])
def test_a_layer_sees_its_own_windows_alone(kind: int, load: Load) -> None:
    model, seen, given = load(window=8), [], {}
    model.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: given.update(kwargs, args=args), with_kwargs=True
    )
    said(model, noise_of(model, frames=17), context_of(2.5, 6.5, 10.5, 14.5))
    model.blocks[0].register_forward_hook(lambda *call: seen.append(call[2]))
    args, windows, tokens = (given[name] for name in ("args", "windows", "context_BME"))
    rest = {"rotary_emb": given["rotary_emb"]}
    # The context's last frame has its last four tokens.
    for context in (tokens, torch.cat([tokens[:, :12], tokens[:, 12:].flip(2)], 1)):
        own = {"context_BME": context, "windows": (windows[kind],) * 2}
        with torch.no_grad():
            model.denoiser(*args, **rest | own)
    before, after = (x.split([80, 16], 1) for x in seen)
    changed = (before[0] != after[0]).any(-1).view(2, 5, 16)
    own = (CONTEXT_EVEN, CONTEXT_ODD)[kind][-1]
    for frame, window in enumerate((EVEN, ODD)[kind]):
        assert changed[:, frame].any() == (window == own)
        assert window != own or changed[:, frame].all()


def test_every_token_is_in_one_window() -> None:
    for shifted_by_half in (False, True):
        for num in (1, 2, 5, 31, 62):
            middles = latent_middles(num, 4)
            context = [7.0 + 15 * n for n in range(max(1, num * 4 // 15))]
            plan = plan_windows(
                middles, 3, 40, shifted=shifted_by_half, context_middles=context,
                context_per_frame=2, device=CPU,
            )  # fmt: skip
            total = 3 * num + 2 * len(context)
            assert sorted(plan.order_N.tolist()) == list(range(total))
            assert torch.equal(plan.order_N[plan.back_N], torch.arange(total))
            assert sum(n * length for n, length in plan.groups) == total
            sizes = [length for _, length in plan.groups]
            assert sizes == sorted(set(sizes))


def windows_of(middles: Sequence[float], window: float, *, shifted: bool) -> list[list[int]]:
    plan = plan_windows(middles, 1, window, shifted=shifted, device=CPU)
    order, found = plan.order_N.tolist(), []
    for num, length in plan.groups:
        for _ in range(num):
            found.append(order[:length])
            order = order[length:]
    return sorted(found)


def test_the_first_window_is_half_in_odd_layers() -> None:
    middles = latent_middles(11, 4)  # 41 frames
    even, odd = (windows_of(middles, 16, shifted=shifted) for shifted in (False, True))
    assert even == [[0, 1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert odd == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10]]
    # Frames of a video without a VAE: a window holds as many as it is long.
    assert windows_of(range(7), 4, shifted=False) == [[0, 1, 2, 3], [4, 5, 6]]
    assert windows_of(range(7), 4, shifted=True) == [[0, 1], [2, 3, 4, 5], [6]]
    assert windows_of(range(7), 100, shifted=True) == [list(range(7))]


def test_tokens_that_all_windows_see_see_everything() -> None:
    numbers = torch.tensor([0, 0, 1, 1, 1, 2])
    plan = plan_windows((0, 1, 4, 5, 6, 8), 1, 4, shifted=False, device=CPU)
    query, key, value = (normal(2, 3, 8, 4, seed=n) for n in range(3))
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[2:, 2:] = numbers[:, None] == numbers[None]
    ours = attend(query, key, value, plan, num_shared=2)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
    alone = attend(query[:, :, 2:], key[:, :, 2:], value[:, :, 2:], plan)
    expected = scaled_dot_product_attention(
        query[:, :, 2:], key[:, :, 2:], value[:, :, 2:], attn_mask=mask[2:, 2:]
    )
    torch.testing.assert_close(alone, expected, atol=1e-6, rtol=0)


def test_windows_that_hold_no_whole_frames_are_refused(load: Load) -> None:
    check_window(120, {"the VAE": 4, "semantic": 15})
    with pytest.raises(ValueError, match=r"4 for the VAE and 15 for semantic.*nearest is 120"):
        check_window(100, {"the VAE": 4, "semantic": 15})
    for window in (0, -8):
        with pytest.raises(ValueError, match="nearest is 8"):
            check_window(window, {"the VAE": 4})
    with pytest.raises(ValueError, match="a window of 12 frames is not twice"):
        load(window=12)
    with pytest.raises(ValueError, match="a window of 8 frames is of the VAE's space"):
        load(window=8, channels=5)


# Rectified flow


def test_times_of_a_flow_are_logit_normal_and_shifted() -> None:
    at = torch.tensor([0.0, 0.5, 0.8413447, 0.99999])
    clean, noise = normal(4, 2, 1, 3, 3), normal(4, 2, 1, 3, 3, seed=1)
    made = flow_noised(clean, noise, at)
    expected = [0, 500, 1000 / (1 + math.exp(-1)), 1000 / (1 + math.exp(-4.2649))]
    assert made.timestep_B.tolist() == pytest.approx(expected, rel=1e-3)
    time = (made.timestep_B / 1000)[:, None, None, None, None]
    torch.testing.assert_close(made.noisy_BCTYX, (1 - time) * clean + time * noise)
    assert torch.equal(made.target_BCTYX, noise - clean)
    assert torch.equal(made.noisy_BCTYX[0], clean[0])
    moved = flow_noised(clean, noise, at, 3.0).timestep_B / 1000
    assert moved[1] == pytest.approx(0.75)  # 3 / 2 over 1 + 2 / 2
    times = torch.linspace(0, 1, 11)
    assert torch.equal(shifted(times, 1.0), times)
    assert shifted(times, 5.0)[[0, -1]].tolist() == [0, 1]
    assert (shifted(times, 5.0)[1:-1] > times[1:-1]).all()
    with pytest.raises(TypeError, match="float32"):
        flow_noised(clean.bfloat16(), noise, at)


def test_the_model_trains_on_its_own_shift(load: Load) -> None:
    clean, noise, at = normal(1, 4, 1, 8, 8), normal(1, 4, 1, 8, 8, seed=1), torch.tensor([0.5])
    for shift, expected in ((None, 750), (1.0, 500), (9.0, 900)):
        made = load(shift=shift).noised(clean, noise, at)
        assert made.timestep_B.tolist() == pytest.approx([expected])
    model = load(flow=True)
    text = Conditioning(texts(num=1))
    assert model.shift == 3.0
    with torch.no_grad():
        loss = model.errors(clean, noise, at, text)
        velocity = model.denoise(0.25 * clean + 0.75 * noise, torch.tensor([750.0]), text)
        expected = (velocity - (noise - clean)).square().mean()
        torch.testing.assert_close(loss, expected[None])
        moments = torch.stack([clean, torch.full_like(clean, 0.5)], 1)
        drawn = model.losses(moments, normal(*clean.shape, seed=3), noise, at, text)
        other = clean + 0.5 * normal(*clean.shape, seed=3)
        torch.testing.assert_close(drawn, model.errors(other, noise, at, text))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_eulers_method_follows_a_straight_flow_exactly(shift: float) -> None:
    clean, noise = normal(2, 3, 2, 4, 4), normal(2, 3, 2, 4, 4, seed=1)
    told: list[float] = []

    def denoise(noisy: torch.Tensor, timestep_B: torch.Tensor, _: Any) -> torch.Tensor:
        time = timestep_B[0].item() / 1000
        told.append(time)
        torch.testing.assert_close(noisy, (1 - time) * clean + time * noise, atol=1e-5, rtol=0)
        return noise - clean

    out = sampled(
        denoise, Euler(shift), Conditioning(texts()), texts()[0, 0], noise, steps=5,
        guidance_scale=1.0, progress=lambda _: None,
    )  # fmt: skip
    torch.testing.assert_close(out, clean, atol=1e-5, rtol=0)
    even = torch.tensor([1, 0.8, 0.6, 0.4, 0.2])
    assert told == pytest.approx(shifted(even, shift).tolist(), abs=1e-6)


# Variants


def test_another_space_has_layers_of_its_own(load: Load, folder: Path) -> None:
    states = []
    for channels in (None, 6):  # diffusers' own loading draws something
        torch.manual_seed(5)
        again = load(channels=channels)
        assert again.denoiser
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    model = load(channels=6)
    before = model.denoiser.state_dict()
    for name, value in again.denoiser.state_dict().items():
        assert torch.equal(value, before[name])
    stock = WanTransformer3DModel.from_pretrained(folder / "transformer")
    own = {"patch_embedding.weight", "patch_embedding.bias", "proj_out.weight", "proj_out.bias"}
    for name, value in stock.state_dict().items():
        assert name in own or torch.equal(value, before[name])
    assert before["patch_embedding.weight"].shape == (WIDTH, 6, 1, 1, 1)
    assert before["patch_embedding.weight"].std() > 0.1
    clean, noise = normal(2, 6, 3, 5, 7), normal(2, 6, 3, 5, 7, seed=1)
    assert not said(model, clean).any()  # zeros at first, so the loss is known
    with torch.no_grad():
        loss = model.errors(clean, noise, torch.tensor([0.3, 0.6]), Conditioning(texts()))
    torch.testing.assert_close(loss, (noise - clean).square().flatten(1).mean(1))
    torch.nn.init.normal_(model.denoiser.proj_out.weight)
    config = json.loads(json.dumps(model.denoiser_config()))
    plain = WanTransformer3DModel.from_config(config)
    plain.load_state_dict(model.denoiser.state_dict())
    ours = said(model, clean)
    with torch.no_grad():
        theirs = plain(clean, torch.full((2,), 500.5), texts()[:, 0]).sample
    assert torch.equal(ours, theirs) and ours.std() > 0.1
    made = model.generate(Conditioning(texts()), texts()[0, 0], noise, steps=2, guidance_scale=2.0)
    assert made.shape == noise.shape
    # The VAE's space stays what it was.
    assert model.latent_shape(9, 64, 64) == (4, 3, 8, 8) and model.width is None
    with pytest.raises(ValueError, match="takes no context"):
        said(model, clean, context_of(1.0))


def test_a_denoiser_from_scratch_is_seeded(load: Load, folder: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = (load(scratch=True).denoiser.state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    pretrained = load().denoiser.state_dict()
    assert first.keys() == pretrained.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    same = [name for name, value in first.items() if torch.equal(value, pretrained[name])]
    assert all("norm" in name for name in same), same  # ones and zeros
    half, theirs = load(torch.bfloat16, scratch=True), load(torch.bfloat16)
    assert {n: p.dtype for n, p in half.denoiser.named_parameters()} == {
        n: p.dtype for n, p in theirs.denoiser.named_parameters()
    }
    both = load(scratch=True, channels=6)
    assert not said(both, normal(2, 6, 1, 3, 3)).any()
    assert torch.equal(
        both.denoiser.blocks[0].attn1.to_q.weight, first["blocks.0.attn1.to_q.weight"]
    )


# Training


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_training_in_bfloat16_with_checkpointing(tuning: Any, load: Load) -> None:
    """Autocast in bfloat16; gradients reach weights, text and context, and checkpointing's."""
    grads = []
    for checkpointing in (False, True):
        model = load(torch.bfloat16, window=8)
        tune(model, tuning, rank=4, name="lora", seed=3)
        if tuning == "lora":
            some = {
                k: normal(*v.shape) * 0.1 for k, v in lora_state(model.denoiser, "lora").items()
            }
            load_lora(model.denoiser, some, "lora")
        if checkpointing:
            model.denoiser.enable_gradient_checkpointing()
        text, context = texts().requires_grad_(), context_of(2.5, 6.5, 10.5, 14.5)
        context.tokens_BSVUE.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = model.denoise(
                noise_of(model, frames=17), torch.tensor([1.0, 900.0]),
                Conditioning(text, None, context),
            )  # fmt: skip
        assert out.dtype == torch.float32 and out.isfinite().all()
        out.square().mean().backward()
        own = [p for p in model.denoiser.parameters() if p.requires_grad]
        assert {p.dtype for p in own} == {torch.float32}
        assert text.grad.abs().sum(-1).all() and context.tokens_BSVUE.grad.abs().sum(-1).all()
        grads.append([p.grad for p in own])
    assert all(g.isfinite().all() for g in grads[0]) and grads[0][0].any()
    for whole, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, whole, atol=1e-6, rtol=1e-2)


def test_checkpointing_gives_the_same_gradients(load: Load) -> None:
    grads = []
    for checkpointing in (False, True):
        model = load(window=8)
        tune(model, "full", rank=4, name="lora", seed=3)
        if checkpointing:
            model.denoiser.enable_gradient_checkpointing()
        at = torch.tensor([0.2, 0.7])
        noise = noise_of(model, frames=17)
        text = Conditioning(texts(), None, context_of(2.5, 6.5, 10.5, 14.5))
        model.errors(noise_of(model, frames=17, seed=8), noise, at, text).mean().backward()
        grads.append([p.grad for p in model.denoiser.parameters()])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*grads, strict=True))


def test_fresh_lora_changes_nothing_and_only_it_is_trained(load: Load) -> None:
    model = load(window=8)
    noisy = noise_of(model)
    before = said(model, noisy)
    expected = [f"blocks.{n}.attn{k}.{p}" for n in (0, 1) for k in (1, 2)
                for p in ("to_q", "to_k", "to_v", "to_out.0")]  # fmt: skip
    assert list(model.lora_targets) == expected
    add_lora(model.denoiser, 4, 4, model.lora_targets, "lora", seed=3)
    assert torch.equal(said(model, noisy), before)
    weights = copy.deepcopy(model.denoiser.state_dict())
    parameters = [p for p in model.denoiser.parameters() if p.requires_grad]
    assert len(parameters) == 2 * len(expected)
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        text = Conditioning(texts())
        model.denoise(noisy, torch.tensor([1.0, 500.0]), text).square().mean().backward()
        optimizer.step()
    for name, value in model.denoiser.state_dict().items():
        assert torch.equal(value, weights[name]) == ("lora_" not in name), name
    assert not torch.equal(said(model, noisy), before)


def test_exported_lora_loads_into_the_pipeline(
    load: Load, folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model, noisy = load(), noise_of(load())
    plain = said(model, noisy)
    add_lora(model.denoiser, 4, 8, model.lora_targets, "lora")
    state = {k: normal(*v.shape) * 0.1 for k, v in lora_state(model.denoiser, "lora").items()}
    load_lora(model.denoiser, state, "lora")
    save_lora(state, tmp_path, alpha=8, part="transformer")
    pipeline = pipeline_of(folder)
    pipeline.load_lora_weights(tmp_path)
    assert not [w for w in recwarn if "target" in str(w.message)]
    given = noisy, torch.full((2,), 500.5), texts()[:, 0]
    with torch.no_grad():
        theirs = pipeline.transformer(*given).sample
        halved = pipeline.transformer(*given, attention_kwargs={"scale": 0.5}).sample
        assert torch.equal(said(model, noisy), theirs) and (theirs - plain).abs().max() > 1e-3
        ours = model.denoiser(*given, attention_kwargs={"scale": 0.5}).sample
    assert torch.equal(ours, halved) and not torch.equal(halved, theirs)
    assert torch.equal(said(model, noisy), theirs)


# Bad input


def test_conditioning_that_does_not_fit_is_refused(load: Load) -> None:
    model = load()
    noisy, text = noise_of(model), texts()
    context = context_of(1.0, 6.5)
    narrow = Context(context.tokens_BSVUE[..., :7], context.middles)
    few = Context(context.tokens_BSVUE, (1.0,))
    for given, problem in (
        ((noisy, None, text[..., :7]), "32 wide, but the conditioning 7"),
        ((noisy, None, text.expand(-1, 2, -1, -1)), "2 scenes need their share"),
        ((noisy, narrow, text), "tokens are 24 wide, but the context's 7"),
        ((noisy, few, text), "2 samples of 2 frames does not meet 2 samples and 1 middles"),
        ((noisy[:, :3], None, text), "latents of 4 channels and sides of multiples of 2"),
        ((noisy[..., :7], None, text), r"not of \(4, 3, 8, 7\)"),
    ):
        with pytest.raises(ValueError, match=problem) as caught:
            said(model, *given)
        assert "\n" not in str(caught.value)
    shares = torch.full((2, 9, 2), 0.5)
    with pytest.raises(ValueError, match="Wan follows one text, but there are 2 scenes"):
        model.denoise(noisy, torch.ones(2), Conditioning(text.expand(-1, 2, -1, -1), shares))


def edit(**change: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return edit


@pytest.mark.parametrize(
    "file, damage, problem",
    [
        ("model_index.json", Path.unlink, "holds no Wan: .* is missing"),
        ("transformer/config.json", lambda p: p.write_text("{"), "is not JSON"),
        ("transformer/diffusion_pytorch_model.safetensors", Path.unlink, "holds no weights"),
        ("vae/config.json", edit(_class_name="AutoencoderKL"), "needs a AutoencoderKLWan"),
        ("transformer/config.json", edit(in_channels=36), "more channels than the VAE"),
        ("transformer/config.json", edit(image_dim=1280), "takes pictures: it has image_dim"),
        ("transformer/config.json", edit(added_kv_proj_dim=8), "it has added_kv_proj_dim"),
        ("transformer/config.json", edit(patch_size=[2, 2, 2]), "patches of 2x2x2"),
        ("transformer/config.json", edit(text_dim=48), "text encoder is 32 wide.*takes 48"),
        ("vae/config.json", edit(is_residual=True), "2.2 or takes pictures: it has is_residual"),
        ("vae/config.json", edit(temperal_downsample=[False] * 3), "VAE of 1 frames a latent"),
        ("model_index.json", edit(boundary_ratio=0.875), "it has boundary_ratio"),
        ("model_index.json", edit(expand_timesteps=True), "it has expand_timesteps"),
    ],
)
def test_a_base_that_is_none_is_refused_before_it_is_loaded(
    file: str, damage: Callable[[Path], None], problem: str, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "wan")
    damage(tmp_path / "wan" / file)
    with pytest.raises(ValueError, match=problem) as caught:
        Backbone(kind="wan", base=Weights(at=str(tmp_path / "wan"))).facts()
    assert "\n" not in str(caught.value)


def test_facts_are_read_without_weights(folder: Path, load: Load) -> None:
    base = Weights(at=str(folder))
    facts = Backbone(kind="wan", base=base).facts()
    assert (facts.text_dim, facts.text_len, facts.any_text_len) == (TEXT_DIM, 512, True)
    assert (facts.frames_per_latent, facts.pixels_per_latent, facts.max_frames) == (4, 16, None)
    model = load()
    assert model.width == WIDTH and len(model.blocks) == 2
    assert not {"vae", "text_encoder"} & vars(model).keys()
    with pytest.raises(ValueError, match="give it no motion adapter"):
        Backbone(kind="wan", base=base, motion=base).facts()


def test_the_tiny_model_is_the_same_every_time(folder: Path, tmp_path: Path) -> None:
    build_wan(tmp_path)
    for path in folder.rglob("*.safetensors"):
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes()
    assert sum(p.stat().st_size for p in folder.rglob("*")) < 4e6


# Random weights


def test_a_model_of_random_weights_runs(folder: Path) -> None:
    parts = ("transformer", "vae", "text_encoder", "scheduler")
    shapes = {p: json.loads(next((folder / p).glob("*.json")).read_text()) for p in parts}
    shapes[""] = json.loads((folder / "model_index.json").read_text())
    for variant in (Variant(), Variant(window=8), Variant(channels=6)):
        model = Wan.random(shapes, device=CPU, dtype=torch.bfloat16, variant=variant)
        noisy = noise_of(model, frames=17) if variant.channels is None else normal(2, 6, 3, 5, 7)
        out = said(model, noisy)
        assert out.shape == noisy.shape and out.isfinite().all()
        assert {p.dtype for p in model.denoiser.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="no tokenizer"):
        model.encode_text(["a cat"])


def test_full_sizes_have_as_many_weights_as_the_published() -> None:
    def size(module: Any) -> int:
        return sum(p.numel() for p in module.parameters())

    where = {"device": torch.device("meta"), "dtype": torch.bfloat16}
    for shapes, expected in ((WAN_1_3B, 1_418_996_800), (WAN_14B, 14_288_491_584)):
        model = Wan.random(shapes, variant=Variant(window=120), **where)
        assert size(model.denoiser) == expected
        assert model.latent_shape(81, 480, 832) == (16, 21, 60, 104)
        assert model.shift == 3.0
    assert size(model.vae) == 126_892_531
    assert size(model.text_encoder) == 5_680_910_336
    config = model.vae.config
    assert len(config.latents_mean) == len(config.latents_std) == 16
    assert np.isclose(config.latents_std[0], 2.8184)
