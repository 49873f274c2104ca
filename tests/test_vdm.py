"""AnimateDiff and CogVideoX against diffusers on the same weights, and against closed forms."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

from diffusers import (  # noqa: E402
    AnimateDiffPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
)
from peft.utils import get_peft_model_state_dict  # noqa: E402

from engine.weights import Weights  # noqa: E402
from trainers.animatediff import AnimateDiff  # noqa: E402
from trainers.cogvideox import CogVideoX  # noqa: E402
from trainers.lora import add_lora, load_lora, lora_state, save_lora  # noqa: E402
from trainers.tiny_vdm import TEXT_DIM, build_animatediff, build_cogvideox  # noqa: E402
from trainers.vdm import VDM, Backbone, Conditioning  # noqa: E402
from trainers.vdm_shapes import COGVIDEOX_2B, COGVIDEOX_5B, SD15  # noqa: E402

CPU = torch.device("cpu")
Load = Callable[..., VDM]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`animatediff`, `rotary` and `sincos`."""
    folder = tmp_path_factory.mktemp("vdm")
    build_animatediff(folder / "animatediff")
    build_cogvideox(folder / "rotary", rotary=True)
    build_cogvideox(folder / "sincos", rotary=False)
    return folder


def backbone(folder: Path, kind: str) -> Backbone:
    if kind != "animatediff":
        return Backbone(kind="cogvideox", base=Weights(at=str(folder / kind)))
    base, motion = (Weights(at=str(folder / "animatediff" / part)) for part in ("sd", "motion"))
    return Backbone(kind="animatediff", base=base, motion=motion)


@pytest.fixture(scope="module")
def load(folder: Path) -> Load:
    """A fresh model by kind: `picture` is AnimateDiff's plain UNet."""

    def load(kind: str, dtype: torch.dtype = torch.float32) -> VDM:
        video = kind != "picture"
        source = backbone(folder, kind if video else "animatediff")
        return source.load(video=video, device=CPU, dtype=dtype)

    return load


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def texts(model: VDM, *, num: int = 2, scenes: int = 1, seed: int = 1) -> torch.Tensor:
    return normal(num, scenes, model.text_len, model.text_dim, seed=seed)


def steps(frames: int, *, at: int, num: int = 1) -> torch.Tensor:
    """Two scenes, the second from frame `at`."""
    second = (torch.arange(frames) >= at).float()
    return torch.stack([1 - second, second], -1).expand(num, frames, 2)


def noise_of(model: VDM, *, frames: int = 9, num: int = 2, seed: int = 2) -> torch.Tensor:
    return normal(num, *model.latent_shape(frames, 64, 64), seed=seed)


@torch.no_grad()
def said(model: VDM, text: Conditioning, noisy: torch.Tensor, at: int = 500) -> torch.Tensor:
    return model.denoise(noisy, torch.full((len(noisy),), at), text)


def trained(model: VDM, name: str = "lora", rank: int = 4) -> dict[str, torch.Tensor]:
    """Gives the model LoRA that does something; its state."""
    add_lora(model.denoiser, rank, 8, model.lora_targets, name, seed=3)
    state = {k: normal(*v.shape, seed=n) * 0.1 for n, (k, v) in enumerate(own(model, name).items())}
    load_lora(model.denoiser, state, name)
    return state


def own(model: VDM, name: str = "lora") -> dict[str, torch.Tensor]:
    return lora_state(model.denoiser, name)


def pipeline_of(model: VDM, folder: Path) -> Any:
    """diffusers' own pipeline on the same files."""
    if isinstance(model, CogVideoX):
        kind = "rotary" if model.facts.any_text_len else "sincos"
        return quiet(CogVideoXPipeline.from_pretrained(folder / kind))
    sd = folder / "animatediff" / "sd"
    if not model.video:
        return quiet(StableDiffusionPipeline.from_pretrained(sd, safety_checker=None))
    scheduler = DDIMScheduler.from_pretrained(
        sd,
        subfolder="scheduler",
        beta_schedule="linear",
        clip_sample=False,
        steps_offset=1,
    )
    motion = MotionAdapter.from_pretrained(folder / "animatediff" / "motion")
    return quiet(
        AnimateDiffPipeline.from_pretrained(sd, motion_adapter=motion, scheduler=scheduler)
    )


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def by_pipeline(
    model: VDM, pipeline: Any, text: torch.Tensor, noise: torch.Tensor, **ask: Any
) -> Any:
    """Latents (B, C, T, Y, X) or frames that the pipeline makes of one scene and zeros for null."""
    cogvideox = isinstance(model, CogVideoX)
    out = pipeline(
        prompt_embeds=text[:, 0],
        negative_prompt_embeds=torch.zeros_like(text[:, 0]),
        latents=noise.transpose(1, 2) if cogvideox else noise,
        num_frames=9,
        height=64,
        width=64,
        **{"num_inference_steps": 4, "guidance_scale": 7.5, "output_type": "latent"} | ask,
    ).frames
    return out.transpose(1, 2) if cogvideox and torch.is_tensor(out) else out


def generated(model: VDM, text: Conditioning, noise: torch.Tensor, scale: float = 7.5) -> Any:
    null = torch.zeros_like(text.tokens_BKLD[0, 0])
    return model.generate(text, null, noise, steps=4, guidance_scale=scale)


VIDEO = ("animatediff", "rotary", "sincos")
ALL = ("picture", *VIDEO)


@pytest.mark.parametrize("kind", VIDEO)
def test_generating_equals_the_pipeline_of_diffusers(kind: str, load: Load, folder: Path) -> None:
    model = load(kind)
    pipeline, text, noise = pipeline_of(model, folder), texts(model), noise_of(model)
    for scale in (7.5, 1.0):
        theirs = by_pipeline(model, pipeline, text, noise, guidance_scale=scale)
        ours = generated(model, Conditioning(text), noise, scale)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert ours.std() > 0.1
    frames = by_pipeline(model, pipeline, text, noise, output_type="np", guidance_scale=1.0)
    pixels = model.decode(ours).numpy().astype(int)
    assert abs(pixels - (frames * 255).round().astype(int)).max() <= 1
    assert pixels.std() > 1


@pytest.mark.parametrize("kind", VIDEO)
def test_the_denoiser_of_one_scene_is_that_of_diffusers_bit_for_bit(
    kind: str, load: Load, folder: Path
) -> None:
    model = load(kind)
    text, noisy, at = texts(model), noise_of(model), torch.tensor([10, 900])
    with torch.no_grad():
        ours = model.denoise(noisy, at, Conditioning(text, torch.ones(2, 9, 1)))
        if isinstance(model, CogVideoX):
            stock = CogVideoXTransformer3DModel.from_pretrained(folder / kind / "transformer")
            pipeline = pipeline_of(model, folder)
            rotary = pipeline._prepare_rotary_positional_embeddings(64, 64, 3, CPU)
            theirs = stock(
                noisy.transpose(1, 2),
                text[:, 0],
                at,
                image_rotary_emb=rotary if kind == "rotary" else None,
            ).sample.transpose(1, 2)
        else:
            stock = pipeline_of(model, folder).unet
            theirs = stock(noisy, at, text[:, 0].repeat_interleave(9, 0)).sample
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", VIDEO)
def test_text_is_encoded_as_by_the_pipeline(kind: str, load: Load, folder: Path) -> None:
    model = load(kind)
    prompts = ["A small cat walks slowly.", "word " * 60]
    pipeline = pipeline_of(model, folder)
    with torch.no_grad():
        if kind == "animatediff":
            theirs, null = pipeline.encode_prompt(prompts, CPU, 1, True)
        else:
            theirs, null = pipeline.encode_prompt(prompts, device=CPU)
    ours = model.encode_text(prompts)
    assert ours.shape == (2, model.text_len, model.text_dim)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.encode_text(["", ""]), null, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ALL)
def test_a_sample_depends_on_its_own_noise_alone(kind: str, load: Load) -> None:
    model = load(kind)
    text, noise = texts(model), noise_of(model)
    both = generated(model, Conditioning(text), noise)
    beside = torch.stack([texts(model, seed=8)[0], text[1]]), noise.clone()
    beside[1][0] = noise_of(model, seed=9)[0]
    assert torch.equal(generated(model, Conditioning(beside[0]), beside[1])[1], both[1])
    alone = generated(model, Conditioning(text[1:]), noise[1:])
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=1e-3)  # sums in another order


def test_without_guidance_nothing_unconditional_is_computed(load: Load) -> None:
    model, calls, numbers = load("animatediff"), [], []
    model.denoiser.register_forward_hook(lambda *_: calls.append(0))
    text, null = Conditioning(texts(model)), torch.full((5, TEXT_DIM), torch.nan)
    out = model.generate(
        text, null, noise_of(model), steps=4, guidance_scale=1, progress=numbers.append
    )
    assert len(calls) == 4 and numbers == [1, 2, 3, 4] and out.isfinite().all()
    generated(model, text, noise_of(model))
    assert len(calls) == 12


# Noise


def test_noising_is_the_closed_form_of_each_schedule(load: Load) -> None:
    at = torch.tensor([0.0, 0.2997, 0.99999])
    for kind, betas in (
        ("picture", np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2),
        ("animatediff", np.linspace(0.00085, 0.012, 1000)),
    ):
        model = load(kind)
        clean, noise = normal(3, 4, 1, 8, 8), normal(3, 4, 1, 8, 8, seed=1)
        made = model.noised(clean, noise, at)
        assert made.timestep_B.tolist() == [0, 299, 999]
        kept = torch.tensor(np.cumprod(1 - betas)[[0, 299, 999]]).view(3, 1, 1, 1, 1)
        expected = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        torch.testing.assert_close(made.noisy_BCTYX.double(), expected, atol=1e-5, rtol=0)
        assert torch.equal(made.target_BCTYX, noise)
        assert made.noisy_BCTYX.dtype == torch.float32
        with pytest.raises(TypeError, match="float32"):
            model.noised(clean.bfloat16(), noise, at)


@pytest.mark.parametrize("kind, shift", [("sincos", 3.0), ("rotary", 1.0)])
def test_cogvideox_predicts_velocity_down_to_zero_snr(kind: str, shift: float, load: Load) -> None:
    model = load(kind)
    clean, noise = normal(3, 4, 3, 8, 8), normal(3, 4, 3, 8, 8, seed=1)
    made = model.noised(clean, noise, torch.tensor([0.0, 0.5, 0.9999]))
    kept = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    root = np.sqrt(kept / (shift + (1 - shift) * kept))
    kept = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    kept = torch.tensor(kept[[0, 500, 999]]).view(3, 1, 1, 1, 1)
    noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
    velocity = kept.sqrt() * noise - (1 - kept).sqrt() * clean
    torch.testing.assert_close(made.noisy_BCTYX.double(), noisy, atol=2e-5, rtol=0)
    torch.testing.assert_close(made.target_BCTYX.double(), velocity, atol=2e-5, rtol=0)
    assert torch.equal(made.noisy_BCTYX[2], noise[2])
    assert torch.equal(made.target_BCTYX[2], -clean[2])
    # CogVideoX's own loss, on the clean sample and weighted by 1 / (1 - abar), is the plain MSE.
    guess = normal(3, 4, 3, 8, 8, seed=2).double()
    clean_guess = kept.sqrt() * noisy - (1 - kept).sqrt() * guess
    weighted = ((clean_guess - clean) ** 2 / (1 - kept)).mean()
    torch.testing.assert_close(weighted, ((guess - velocity) ** 2).mean())


# Pixels


@pytest.mark.parametrize("kind, frames, latents", [("animatediff", 18, 18), ("rotary", 17, 5)])
def test_videos_and_pictures_are_encoded_and_decoded(
    kind: str, frames: int, latents: int, load: Load
) -> None:
    model = load(kind)
    for num_frames, num_latents in ((frames, latents), (1, 1)):
        pixels = (torch.rand(2, num_frames, 32, 48, 3) * 255).to(torch.uint8)
        shape = model.latent_shape(num_frames, 32, 48)
        assert shape == (4, num_latents, 4, 6)
        assert model.num_latent_frames(num_frames) == num_latents
        moments = model.encode(pixels)
        assert moments.shape == (2, 2, *shape) and moments.dtype == torch.float32
        assert (moments[:, 1] > 0).all()
        back = model.decode(moments[:, 0])
        assert back.shape == pixels.shape and back.dtype == torch.uint8
        unit = pixels[1].permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad():
            if kind == "animatediff":
                posterior = model.vae.encode(unit[0].transpose(0, 1)).latent_dist
                expected = torch.stack([posterior.mean, posterior.std]).transpose(1, 2)
            else:
                posterior = model.vae.encode(unit).latent_dist
                expected = torch.stack([posterior.mean[0], posterior.std[0]])
        scale = model.vae.config.scaling_factor
        torch.testing.assert_close(moments[1], expected * scale, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "kind, asked, nearest",
    [
        ("animatediff", (33, 64, 64), "32 of 64x64"),
        ("animatediff", (16, 100, 64), "16 of 96x64"),
        ("rotary", (5, 64, 64), "1 of 64x64"),
        ("rotary", (14, 64, 72), "17 of 64x64"),
    ],
)
def test_shapes_that_there_are_not_name_the_nearest(
    kind: str, asked: tuple[int, int, int], nearest: str, load: Load
) -> None:
    with pytest.raises(ValueError, match=f"nearest are {nearest}"):
        load(kind).latent_shape(*asked)


# Scenes


def test_a_frame_of_animatediff_follows_its_own_scene_alone(load: Load) -> None:
    model, noisy = load("animatediff"), noise_of(load("animatediff"), num=1)
    text, other = texts(model, num=1, scenes=2), texts(model, num=1, scenes=2, seed=9)
    edited = torch.stack([text[:, 0], other[:, 1]], 1)
    shares = steps(9, at=4)
    with_motion = said(model, Conditioning(edited, shares), noisy)
    assert (with_motion != said(model, Conditioning(text, shares), noisy))[:, :, :4].any()
    off = [m for name, m in model.denoiser.named_modules() if name.endswith("motion_modules")]
    for module in (inner for group in off for inner in group):
        torch.nn.init.zeros_(module.proj_out.weight)
        torch.nn.init.zeros_(module.proj_out.bias)
    before = said(model, Conditioning(text, shares), noisy)
    after = said(model, Conditioning(edited, shares), noisy)
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert (before[:, :, 4:] != after[:, :, 4:]).flatten(3).any(-1).all()
    # What is left is the plain UNet, frame by frame.
    pictures = said(load("picture"), Conditioning(edited, shares), noisy)
    torch.testing.assert_close(after, pictures, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["rotary", "sincos"])
def test_a_video_token_of_cogvideox_follows_its_own_scene_alone(kind: str, load: Load) -> None:
    model, noisy = load(kind), noise_of(load(kind), num=1)
    text, other = texts(model, num=1, scenes=2), texts(model, num=1, scenes=2, seed=9)
    edited, length, seen = torch.stack([text[:, 0], other[:, 1]], 1), model.text_len, []
    model.blocks[0].attn1.register_forward_hook(lambda *call: seen.append(call[2]))
    # Frames 5 to 8 are the last of three latent frames of 16 tokens.
    for tokens in (text, edited):
        said(model, Conditioning(tokens, steps(9, at=5)), noisy)
    (video, words), (video_edited, words_edited) = seen
    assert torch.equal(video[:, :32], video_edited[:, :32])
    assert (video[:, 32:] != video_edited[:, 32:]).any(-1).all()
    assert torch.equal(words[:, :length], words_edited[:, :length])
    assert (words[:, length:] != words_edited[:, length:]).any(-1).all()


def dense_mask(shares_BTK: torch.Tensor, length: int, per_frame: int) -> torch.Tensor:
    """What is added to the score of each query (row) and key of the joint sequence."""
    num, frames, scenes = shares_BTK.shape
    text, total = scenes * length, scenes * length + frames * per_frame
    mask = torch.zeros(num, total, total)
    for k in range(scenes):
        of_scene = slice(k * length, (k + 1) * length)
        mask[:, :text, of_scene] = -torch.inf
        mask[:, of_scene, of_scene] = 0
        rows = shares_BTK[:, :, k].log().repeat_interleave(per_frame, 1)
        mask[:, text:, of_scene] = rows[:, :, None]
    return mask


@pytest.mark.parametrize(
    "kind, schedule",
    [("rotary", "steps"), ("rotary", "interpolated"), ("rotary", "different"), ("sincos", "steps")],
)
def test_scenes_of_cogvideox_equal_a_dense_mask(
    kind: str, schedule: str, load: Load, folder: Path
) -> None:
    model = load(kind)
    text, noisy = texts(model, scenes=3), noise_of(model)
    if schedule == "steps":
        shares = torch.eye(3)[[0, 0, 0, 0, 0, 1, 1, 1, 1]].expand(2, 9, 3)
        latent = torch.eye(3)[[0, 0, 1]].expand(2, 3, 3)
    else:
        shares = torch.rand(2, 9, 3, generator=torch.Generator().manual_seed(5)).round(decimals=1)
        shares = shares if schedule == "different" else shares[:1].expand(2, 9, 3)
        shares = shares / shares.sum(2, keepdim=True)
        latent = torch.stack([shares[:, 0], shares[:, 1:5].mean(1), shares[:, 5:].mean(1)], 1)
    stock = CogVideoXTransformer3DModel.from_pretrained(folder / kind / "transformer")
    if kind == "sincos":
        stock.patch_embed.max_text_seq_length *= 3
        stock.patch_embed.pos_embedding = stock.patch_embed._get_positional_embeddings(8, 8, 9)
    with torch.no_grad():
        expected = stock(
            noisy.transpose(1, 2),
            text.flatten(1, 2),
            torch.tensor([500, 500]),
            image_rotary_emb=model._layout.rotary((3, 4, 4)),
            attention_kwargs={"attention_mask": dense_mask(latent, model.text_len, 16)},
        ).sample.transpose(1, 2)
    ours = said(model, Conditioning(text, shares), noisy)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert (ours - said(model, Conditioning(text[:, :1]), noisy)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", VIDEO)
def test_scenes_of_one_text_are_one_scene(kind: str, load: Load) -> None:
    """Whatever the shares: the weights of K equal keys sum to one key's."""
    model = load(kind)
    text, noisy = texts(model), noise_of(model)
    one = said(model, Conditioning(text), noisy)
    twice = text.expand(-1, 2, -1, -1)
    stepped = said(model, Conditioning(twice, steps(9, at=5, num=2)), noisy)
    torch.testing.assert_close(stepped, one, atol=1e-6, rtol=0)
    shares = torch.linspace(0, 1, 9)
    shares = torch.stack([shares, 1 - shares], 1).expand(2, 9, 2)
    torch.testing.assert_close(
        said(model, Conditioning(twice, shares), noisy), one, atol=1e-5, rtol=0
    )
    both = generated(model, Conditioning(twice, shares), noisy)
    torch.testing.assert_close(
        both, generated(model, Conditioning(text), noisy), atol=1e-3, rtol=1e-3
    )


def test_animatediff_interpolates_the_texts(load: Load) -> None:
    model = load("picture")
    text, noisy = texts(model, num=1, scenes=2), noise_of(model, frames=3, num=1)
    shares = torch.tensor([[[1.0, 0], [0.25, 0.75], [0, 1]]])
    ours = said(model, Conditioning(text, shares), noisy)
    mixed = torch.stack([text[0, 0], 0.25 * text[0, 0] + 0.75 * text[0, 1], text[0, 1]])
    for n in range(3):
        alone = said(model, Conditioning(mixed[n][None, None]), noisy[:, :, n : n + 1])
        torch.testing.assert_close(ours[:, :, n : n + 1], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["animatediff", "sincos"])
def test_conditioning_that_does_not_fit_is_refused(kind: str, load: Load) -> None:
    model = load(kind)
    noisy, two = noise_of(model), texts(model, scenes=2)
    for text, problem in (
        (Conditioning(two), "2 scenes need their share"),
        (Conditioning(two, steps(8, at=4, num=2)), "shares are of 8 frames"),
        (Conditioning(two, steps(9, at=4, num=1)), "do not meet 2 texts of 2 scenes"),
        (Conditioning(two[:, :1, :, :7]), "32 wide, but the conditioning 7"),
    ):
        with pytest.raises(ValueError, match=problem):
            said(model, text, noisy)
    short = Conditioning(two[:, :1, :20])
    if kind == "animatediff":
        assert said(model, short, noisy).isfinite().all()
    else:
        with pytest.raises(ValueError, match="226 positions, not 20"):
            said(model, short, noisy)


# LoRA


@pytest.mark.parametrize("kind", ALL)
def test_fresh_lora_changes_nothing_and_only_it_is_trained(kind: str, load: Load) -> None:
    model = load(kind)
    text, noisy = Conditioning(texts(model)), noise_of(model)
    before = said(model, text, noisy)
    add_lora(model.denoiser, 4, 4, model.lora_targets, "lora", seed=3)
    assert torch.equal(said(model, text, noisy), before)
    down = own(model)[f"{model.lora_targets[0]}.lora_A.weight"]
    assert down.shape[0] == 4 and 0.15 < down.std() < 0.35
    weights = copy.deepcopy(model.denoiser.state_dict())
    parameters = [p for p in model.denoiser.parameters() if p.requires_grad]
    assert len(parameters) == 2 * len(model.lora_targets)
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.denoise(noisy, torch.tensor([1, 500]), text).square().mean().backward()
        optimizer.step()
    for name, value in model.denoiser.state_dict().items():
        assert torch.equal(value, weights[name]) == ("lora_" not in name), name
    assert not torch.equal(said(model, text, noisy), before)


def test_lora_is_for_spatial_attention_of_pictures_and_videos_alike(load: Load) -> None:
    picture, video = load("picture"), load("animatediff")
    assert list(picture.lora_targets) == list(video.lora_targets)
    assert len(picture.lora_targets) == 4 * 2 * 4  # transformers, attentions, projections
    assert not any("motion" in name for name in video.lora_targets)
    assert video.motion_lora_targets and not picture.motion_lora_targets
    for model in (picture, video):
        for name in model.lora_targets:
            assert isinstance(model.denoiser.get_submodule(name), torch.nn.Linear)


def test_lora_of_pictures_fits_the_video_model(load: Load) -> None:
    picture, video = load("picture"), load("animatediff")
    state = trained(picture)
    add_lora(video.denoiser, 4, 8, video.lora_targets, "lora")
    load_lora(video.denoiser, state, "lora")
    assert own(video).keys() == state.keys()
    for name, module in video.denoiser.named_modules():
        if "motion_modules" in name and name.endswith("proj_out"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    text, noisy = Conditioning(texts(video)), noise_of(video, frames=1)
    torch.testing.assert_close(
        said(video, text, noisy), said(picture, text, noisy), atol=1e-6, rtol=0
    )
    plain = said(load("picture"), text, noisy)
    assert (said(picture, text, noisy) - plain).abs().max() > 1e-3


def test_a_second_adapter_leaves_the_first_trainable_or_frozen(load: Load) -> None:
    model = load("animatediff")
    trained(model, "image")
    add_lora(model.denoiser, 2, 2, model.motion_lora_targets, "motion")
    names = {n for n, p in model.denoiser.named_parameters() if p.requires_grad}
    assert {n.split(".")[-2] for n in names} == {"image", "motion"}
    assert all("motion_modules" in n for n in own(model, "motion"))
    model.denoiser.requires_grad_(False)
    add_lora(model.denoiser, 2, 2, model.motion_lora_targets, "more")
    names = {n for n, p in model.denoiser.named_parameters() if p.requires_grad}
    assert {n.split(".")[-2] for n in names} == {"more"}
    assert set(model.denoiser.active_adapters()) == {"image", "motion", "more"}


def test_lora_is_the_same_for_a_seed_and_named_as_peft_names_it(load: Load) -> None:
    first, second, other = load("rotary"), load("rotary"), load("rotary")
    torch.manual_seed(1)
    add_lora(first.denoiser, 4, 4, first.lora_targets, "a", seed=5)
    torch.manual_seed(2)
    add_lora(second.denoiser, 4, 4, second.lora_targets, "b", seed=5)
    add_lora(other.denoiser, 4, 4, other.lora_targets, "b", seed=6)
    state, same, not_same = own(first, "a"), own(second, "b"), own(other, "b")
    assert all(torch.equal(state[k], same[k]) for k in state)
    assert not all(torch.equal(state[k], not_same[k]) for k in state)
    assert state.keys() == get_peft_model_state_dict(first.denoiser, adapter_name="a").keys()
    assert own(first, "a").keys() == lora_state(dict(first.denoiser.named_parameters()), "a").keys()


@pytest.mark.parametrize("kind", ALL)
def test_exported_lora_loads_into_the_pipeline_of_diffusers(
    kind: str, load: Load, folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model = load(kind)
    text, noisy = texts(model), noise_of(model, frames=9 if kind != "picture" else 1)
    plain = said(model, Conditioning(text), noisy)
    state = trained(model)
    part = "transformer" if isinstance(model, CogVideoX) else "unet"
    save_lora(state, tmp_path, alpha=8, part=part)
    pipeline = pipeline_of(model, folder)
    pipeline.load_lora_weights(tmp_path)
    assert not [w for w in recwarn if "target" in str(w.message)]
    if kind != "picture":
        theirs = by_pipeline(model, pipeline, text, noisy)
        torch.testing.assert_close(
            generated(model, Conditioning(text), noisy), theirs, atol=1e-5, rtol=1e-5
        )
    else:
        with torch.no_grad():
            theirs = pipeline.unet(noisy[:, :, 0], torch.tensor([500, 500]), text[:, 0]).sample
        assert torch.equal(said(model, Conditioning(text), noisy)[:, :, 0], theirs)
    assert (said(model, Conditioning(text), noisy) - plain).abs().max() > 1e-3


def test_exported_lora_of_pictures_loads_into_the_video_pipeline(
    load: Load, folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    picture, video = load("picture"), load("animatediff")
    state = trained(picture)
    save_lora(state, tmp_path, alpha=8, part="unet")
    pipeline = pipeline_of(video, folder)
    pipeline.load_lora_weights(tmp_path)
    assert not [w for w in recwarn if "target" in str(w.message)]
    add_lora(video.denoiser, 4, 8, video.lora_targets, "lora")
    load_lora(video.denoiser, state, "lora")
    text, noise = texts(video), noise_of(video)
    theirs = by_pipeline(video, pipeline, text, noise)
    torch.testing.assert_close(
        generated(video, Conditioning(text), noise), theirs, atol=1e-5, rtol=1e-5
    )


def test_lora_that_does_not_fit_is_refused(load: Load, tmp_path: Path) -> None:
    model = load("rotary")
    with pytest.raises(ValueError, match="no adapter lora: add it first"):
        own(model)
    with pytest.raises(ValueError, match=r"no layers for LoRA in the denoiser: \['nowhere"):
        add_lora(model.denoiser, 4, 4, ["nowhere.to_q"], "lora")
    state = trained(model)
    with pytest.raises(ValueError, match="ranks differ"):
        load_lora(model.denoiser, {k: torch.cat([v, v]) for k, v in state.items()}, "lora")
    with pytest.raises(ValueError, match="LoRA of 1 tensors does not fit the 16"):
        load_lora(model.denoiser, dict(list(state.items())[:1]), "lora")
    with pytest.raises(ValueError, match="LoRA of one rank is needed"):
        save_lora({}, tmp_path, alpha=1, part="unet")


@pytest.mark.parametrize("kind", ALL)
def test_training_in_bfloat16_with_checkpointing(kind: str, load: Load) -> None:
    """Frozen weights and autocast in bfloat16, LoRA in float32; gradients reach it and the text."""
    grads = []
    for checkpointing in (False, True):
        model = load(kind, torch.bfloat16)
        trained(model)
        if checkpointing:
            model.denoiser.enable_gradient_checkpointing()
        scenes = 1 if kind == "picture" else 2
        text = texts(model, scenes=scenes).requires_grad_()
        noisy, shares = noise_of(model), steps(9, at=5, num=2)
        with torch.autocast("cpu", torch.bfloat16):
            out = model.denoise(
                noisy, torch.tensor([1, 900]), Conditioning(text, shares if scenes > 1 else None)
            )
        assert out.dtype == torch.float32 and out.isfinite().all()
        out.square().mean().backward()
        named = dict(model.denoiser.named_parameters())
        assert {p.dtype for p in named.values() if not p.requires_grad} == {torch.bfloat16}
        mine = {k: p for k, p in named.items() if p.requires_grad}
        assert {p.dtype for p in mine.values()} == {torch.float32}
        assert text.grad.abs().flatten(2).sum(2).all()
        grads.append([p.grad for p in mine.values()])
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads[0])
    for whole, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, whole, atol=1e-6, rtol=1e-2)


# Configurations


def test_facts_are_read_without_weights(folder: Path, load: Load) -> None:
    facts = {kind: backbone(folder, kind).facts() for kind in VIDEO}
    assert facts["animatediff"].any_text_len and facts["animatediff"].max_frames == 32
    assert facts["rotary"].any_text_len and not facts["sincos"].any_text_len
    assert [f.text_len for f in facts.values()] == [77, 226, 226]
    assert [f.frames_per_latent for f in facts.values()] == [1, 4, 4]
    assert [f.pixels_per_latent for f in facts.values()] == [8, 16, 16]
    for kind in VIDEO:
        model = load(kind)
        assert (model.text_dim, model.text_len) == (facts[kind].text_dim, facts[kind].text_len)
        assert not {"denoiser", "vae", "text_encoder"} & vars(model).keys()


def edit(**change: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return edit


def drop(key: str) -> Callable[[Path], None]:
    def drop(path: Path) -> None:
        path.write_text(
            json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key})
        )

    return drop


@pytest.mark.parametrize(
    "kind, file, damage, problem",
    [
        ("animatediff", "sd/model_index.json", Path.unlink, "holds no Stable Diffusion"),
        ("animatediff", "sd/vae/config.json", Path.unlink, "vae/config.json is missing"),
        ("animatediff", "sd/unet/config.json", lambda p: p.write_text("{"), "is not JSON"),
        (
            "animatediff",
            "sd/unet/config.json",
            edit(_class_name="UNetMotionModel"),
            "needs a UNet2DConditionModel, but the base holds a UNetMotionModel",
        ),
        ("animatediff", "sd/unet/config.json", edit(in_channels=9), "made for text alone"),
        (
            "animatediff",
            "sd/unet/config.json",
            drop("cross_attention_dim"),
            "lacks cross_attention",
        ),
        ("animatediff", "sd/text_encoder/config.json", edit(hidden_size=48), "is 48 wide, but"),
        (
            "animatediff",
            "sd/unet/diffusion_pytorch_model.safetensors",
            Path.unlink,
            "unet holds no weights: diffusion_pytorch_model.safetensors or",
        ),
        ("animatediff", "motion/config.json", edit(_class_name="UNet"), "needs a MotionAdapter"),
        ("animatediff", "motion/config.json", edit(conv_in_channels=9), "PIA"),
        (
            "animatediff",
            "motion/config.json",
            edit(block_out_channels=[8, 24]),
            r"blocks of \[8, 24\] channels with 1 layers, but the UNet has \[8, 16\] with 1",
        ),
        ("rotary", "model_index.json", Path.unlink, "holds no CogVideoX"),
        ("rotary", "transformer/config.json", edit(ofs_embed_dim=512), "has ofs_embed_dim"),
        ("rotary", "transformer/config.json", edit(patch_size_t=2), "has patch_size_t"),
        ("rotary", "transformer/config.json", edit(in_channels=8), "more channels than the VAE"),
        ("rotary", "vae/config.json", edit(_class_name="AutoencoderKL"), "AutoencoderKLCogVideoX"),
        ("rotary", "text_encoder/config.json", edit(d_model=48), "is 48 wide, but the transformer"),
    ],
)
def test_a_folder_that_is_no_such_model_is_one_line(
    kind: str,
    file: str,
    damage: Callable[[Path], Any],
    problem: str,
    folder: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(folder / kind, tmp_path / kind)
    damage(tmp_path / kind / file)
    with pytest.raises(ValueError, match=problem) as caught:
        backbone(tmp_path, kind).facts()
    assert "\n" not in str(caught.value)


def test_the_motion_adapter_is_asked_for_where_it_belongs(folder: Path) -> None:
    sd, motion = (Weights(at=str(folder / "animatediff" / part)) for part in ("sd", "motion"))
    with pytest.raises(ValueError, match="needs a motion adapter"):
        Backbone(kind="animatediff", base=sd).facts()
    assert AnimateDiff(sd, None, video=False, device=CPU, dtype=torch.float32).text_dim == TEXT_DIM
    with pytest.raises(ValueError, match="give it no motion adapter"):
        Backbone(kind="cogvideox", base=Weights(at=str(folder / "rotary")), motion=motion).facts()


def test_tiny_models_are_the_same_every_time(folder: Path, tmp_path: Path) -> None:
    build_cogvideox(tmp_path / "again", rotary=True)
    for path in (folder / "rotary").rglob("*.safetensors"):
        again = tmp_path / "again" / path.relative_to(folder / "rotary")
        assert again.read_bytes() == path.read_bytes()
    assert sum(p.stat().st_size for p in folder.rglob("*")) < 4e6


def test_models_of_random_weights_run(folder: Path) -> None:
    """In the shapes of configurations alone, here the tiny ones."""
    where = {"device": CPU, "dtype": torch.bfloat16}
    parts = ("unet", "vae", "text_encoder", "transformer", "scheduler")
    for cls, paths in (
        (AnimateDiff, {"": "animatediff/sd", "motion": "animatediff/motion"}),
        (CogVideoX, {"": "rotary"}),
    ):
        paths |= {p: f"{paths['']}/{p}" for p in parts if (folder / paths[""] / p).is_dir()}
        shapes = {
            part: json.loads(next((folder / path).glob("*.json")).read_text())
            for part, path in paths.items()
        }
        model = cls.random(shapes, video=True, **where)
        out = said(model, Conditioning(texts(model)), noise_of(model))
        assert out.isfinite().all() and out.std() > 0
        assert {p.dtype for p in model.denoiser.parameters()} == {torch.bfloat16}


def test_full_sizes_have_as_many_weights_as_the_published(folder: Path) -> None:
    where = {"device": torch.device("meta"), "dtype": torch.bfloat16}

    def size(module: Any) -> int:
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        return sum(p.numel() for p in module.parameters())

    picture = AnimateDiff.random(SD15, video=False, **where)
    assert size(picture.denoiser) == 859_520_964
    assert size(picture.vae) == 83_653_863
    assert size(picture.text_encoder) == 123_060_480
    assert len(picture.lora_targets) == 128
    assert size(AnimateDiff.random(SD15, video=True, **where).denoiser) - 859_520_964 == 417_137_600
    for shapes, expected in ((COGVIDEOX_2B, 1_693_783_872), (COGVIDEOX_5B, 5_570_283_072)):
        model = CogVideoX.random(shapes, **where)
        assert size(model.denoiser) == expected
        assert model.latent_shape(49, 480, 720) == (16, 13, 60, 90)
    with pytest.raises(ValueError, match="no tokenizer"):
        model.encode_text(["a cat"])
