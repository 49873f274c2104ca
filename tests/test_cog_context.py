"""Context, windows, flow, other spaces and longer texts of CogVideoX, against diffusers' own parts
and against dense masks."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

from diffusers import CogVideoXTransformer3DModel  # noqa: E402
from diffusers.models.embeddings import (  # noqa: E402
    get_3d_rotary_pos_embed,
    get_3d_sincos_pos_embed,
)
from diffusers.pipelines.cogvideo.pipeline_cogvideox import (  # noqa: E402
    get_resize_crop_region_for_grid,
)
from torch.nn.functional import pad, scaled_dot_product_attention  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from engine.weights import Weights  # noqa: E402
from trainers.cogvideox import CogVideoX  # noqa: E402
from trainers.cogvideox_context import (  # noqa: E402
    ContextTransformer,
    rotary_at,
    rotary_of,
    sincos_at,
)
from trainers.diffusion import SEED  # noqa: E402
from trainers.lora import add_lora, load_lora, lora_state  # noqa: E402
from trainers.places import latent_middles  # noqa: E402
from trainers.tiny_vdm import TEXT_DIM, build_cogvideox  # noqa: E402
from trainers.tuning import tune  # noqa: E402
from trainers.vdm import Conditioning, Context, Variant  # noqa: E402

CPU = torch.device("cpu")
KINDS = ("rotary", "sincos")
WIDTH = 32
Load = Callable[..., CogVideoX]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cog")
    for kind in KINDS:
        build_cogvideox(folder / kind, rotary=kind == "rotary")
    return folder


@pytest.fixture(scope="module")
def load(folder: Path) -> Load:
    """A fresh model by kind and what its variant is."""

    def load(kind: str, dtype: torch.dtype = torch.float32, **variant: Any) -> CogVideoX:
        base = Weights(at=str(folder / kind))
        return CogVideoX(base, device=CPU, dtype=dtype, variant=Variant(**variant))

    return load


@pytest.fixture(scope="module")
def stock(folder: Path) -> Callable[[str], Any]:
    """diffusers' own transformer on the same files."""

    def stock(kind: str) -> Any:
        return CogVideoXTransformer3DModel.from_pretrained(folder / kind / "transformer")

    return stock


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def said_of(num: int = 2, length: int = 226, context: Context | None = None) -> Conditioning:
    return Conditioning(normal(num, 1, length, TEXT_DIM, seed=1), context=context)


def context_of(
    middles: Sequence[float], lines: int = 2, columns: int = 3, num: int = 2, seed: int = 3
) -> Context:
    tokens = normal(num, len(middles), lines, columns, WIDTH, seed=seed)
    return Context(tokens, tuple(middles))


def noisy_of(frames: int = 3, num: int = 2, seed: int = 2) -> torch.Tensor:
    return normal(num, 4, frames, 8, 8, seed=seed)


@torch.no_grad()
def said(
    model: CogVideoX, noisy: torch.Tensor, text: Conditioning, at: Sequence[float] = (100.0, 700.0)
) -> torch.Tensor:
    return model.denoise(noisy, torch.tensor(at), text)


def mask_layers(transformer: Any, masks: Sequence[torch.Tensor], num: int = 2) -> None:
    """Gives each layer a dense mask (N, N) of who sees whom, in turn."""
    for block, mask in zip(transformer.transformer_blocks, itertools.cycle(masks), strict=False):
        scores = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf).expand(num, -1, -1)

        def masked(_: Any, args: Any, kwargs: Any, scores: torch.Tensor = scores) -> Any:
            return args, kwargs | {"attention_mask": scores}

        block.attn1.register_forward_pre_hook(masked, with_kwargs=True)


# What it was stays


@pytest.mark.parametrize("kind", KINDS)
def test_without_anything_new_it_is_diffusers_own_bit_for_bit(
    kind: str, load: Load, stock: Callable[[str], Any]
) -> None:
    model, theirs = load(kind), stock(kind)
    assert isinstance(model.denoiser, ContextTransformer) and model.width == WIDTH
    assert model.denoiser.state_dict().keys() == theirs.state_dict().keys()
    text, noisy, at = said_of(), noisy_of(), torch.tensor([10, 900])
    rotary = get_3d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), 3) if kind == "rotary" else None
    with torch.no_grad():
        expected = theirs(
            noisy.transpose(1, 2), text.tokens_BKLD[:, 0], at, image_rotary_emb=rotary
        ).sample
        assert torch.equal(model.denoise(noisy, at, text), expected.transpose(1, 2))
    whole = load(kind, window=800)  # the path for windows and context, with nothing cut off
    close(said(whole, noisy, text, (10, 900)), expected.transpose(1, 2))


def close(ours: torch.Tensor, theirs: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)
    assert ours.std() > 0.01


def test_the_configuration_is_the_transformers_own(load: Load, folder: Path) -> None:
    written = json.loads((folder / "rotary/transformer/config.json").read_text())
    assert load("rotary").denoiser_config() == written


# Places


@pytest.mark.parametrize("lines, columns", [(30, 45), (4, 4), (5, 30), (45, 20), (1, 1)])
def test_rotary_at_the_videos_own_places_is_the_librarys(lines: int, columns: int) -> None:
    """In regions that are cropped, too: of the shape trained, wider and higher."""
    crop = get_resize_crop_region_for_grid((lines, columns), 45, 30)
    theirs = get_3d_rotary_pos_embed(64, crop, (lines, columns), 13)
    own = tuple(torch.arange(float(n)) for n in (13, lines, columns))
    both = rotary_of((13, lines, columns), (30, 45), 64, CPU, own)
    for ours, their in zip(both, theirs, strict=True):
        video, context = ours.chunk(2)
        assert torch.equal(video, their)
        torch.testing.assert_close(context, their, atol=2e-5, rtol=0)


def test_rotary_between_the_places_turns_by_as_much() -> None:
    at = torch.tensor([0.375, 7.25]), torch.tensor([1.5]), torch.tensor([0.5, 2.5])
    cosines, sines = (x.view(2, 1, 2, 16) for x in rotary_at(at, 16))
    # 16 are 4 for time, 6 for the line, 6 for the column, each value twice.
    for n, place in enumerate(at[0]):
        angles = place * torch.tensor([1.0, 1.0, 0.01, 0.01])
        torch.testing.assert_close(cosines[n, 0, :, :4], angles.cos().expand(2, 4))
        torch.testing.assert_close(sines[n, 0, :, :4], angles.sin().expand(2, 4))
    steps = 10000 ** -torch.tensor([0, 0, 2 / 6, 2 / 6, 4 / 6, 4 / 6])
    torch.testing.assert_close(sines[1, 0, 1, 4:10], (1.5 * steps).sin())
    torch.testing.assert_close(sines[1, 0, 1, 10:], (2.5 * steps).sin())


def test_sine_positions_at_whole_places_are_the_librarys() -> None:
    theirs = get_3d_sincos_pos_embed(64, (7, 5), 3, 1.875, 1.5).flatten(0, 1)
    ours = sincos_at((torch.arange(3.0), torch.arange(5.0), torch.arange(7.0)), 64,
                     space=1.875, time=1.5)  # fmt: skip
    assert torch.equal(ours, theirs)
    # Half a line more is half a line more of the library's scale.
    half = sincos_at((torch.zeros(1), torch.tensor([0.5]), torch.zeros(1)), 64, space=1, time=1)
    twice = get_3d_sincos_pos_embed(64, (1, 2), 1, 2.0)[0, 1:]
    torch.testing.assert_close(half, twice)


# Context


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [8, 12])
def test_a_context_of_the_videos_own_tokens_is_more_video(
    kind: str, size: int, load: Load, stock: Callable[[str], Any]
) -> None:
    """Two latent frames, and three more as a context: diffusers' five, of which two are left."""
    model, theirs = load(kind), stock(kind)
    noisy, text, side = normal(2, 4, 5, size, size, seed=2), said_of(), size // 2
    rotary = get_3d_rotary_pos_embed(16, ((0, 0), (4, 4)), (side, side), 5)
    with torch.no_grad():
        expected = theirs(
            noisy.transpose(1, 2),
            text.tokens_BKLD[:, 0],
            torch.tensor([100, 700]),
            image_rotary_emb=rotary if kind == "rotary" else None,
        ).sample.transpose(1, 2)
        tokens = theirs.patch_embed.proj(noisy[:, :, 2:].transpose(1, 2).flatten(0, 1))
    tokens_BSVUE = tokens.unflatten(0, (2, 3)).movedim(2, 4)
    context = Context(tokens_BSVUE, latent_middles(5, 4)[2:])
    ours = said(model, noisy[:, :, :2], said_of(context=context))
    close(ours, expected[:, :, :2])
    assert (ours - said(model, noisy[:, :, :2], text)).abs().max() > 1e-3
    moved = Context(tokens_BSVUE, tuple(m + 1 for m in context.middles))
    assert (ours - said(model, noisy[:, :, :2], said_of(context=moved))).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_places_of_a_context_count_and_its_order_does_not(kind: str, load: Load) -> None:
    model, noisy = load(kind), noisy_of()
    context = context_of((1, 5))
    ours = said(model, noisy, said_of(context=context))
    turned = Context(context.tokens_BSVUE.flip(1), (5, 1))
    close(said(model, noisy, said_of(context=turned)), ours)
    for other in (
        Context(context.tokens_BSVUE.flip(1), (1, 5)),
        Context(context.tokens_BSVUE.flip(2), (1, 5)),
        Context(context.tokens_BSVUE.flip(3), (1, 5)),
        Context(context.tokens_BSVUE.transpose(2, 3), (1, 5)),
    ):
        assert (said(model, noisy, said_of(context=other)) - ours).abs().max() > 1e-4


def test_a_context_for_a_picture_and_none_for_the_unconditional(load: Load) -> None:
    model, noise = load("rotary"), noisy_of(frames=1)
    context, null = context_of((0.0,)), torch.zeros(226, TEXT_DIM)
    ask = {"steps": 2, "guidance_scale": 3.0}
    made = [
        model.generate(said_of(context=context), null, noise, **ask, null_context=other)
        for other in (None, context_of((0.0,), seed=9), context)
    ]
    assert all(m.isfinite().all() for m in made)
    for a, b in itertools.combinations(made, 2):
        assert (a - b).abs().max() > 1e-3


# Windows


def dense(
    middles: Sequence[float], per_frame: Sequence[int], num_text: int, window: int, shift: int
) -> torch.Tensor:
    """Who sees whom: the text all and everyone the text, others those of their own window."""
    windows = [[(m + shift) // window] * n for m, n in zip(middles, per_frame, strict=True)]
    own = torch.tensor([number for window in windows for number in window])
    assert len(own.unique()) > 1
    return pad(own[:, None] == own, (num_text, 0, num_text, 0), value=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("middles", [(), (1.0, 5.0, 9.0, 13.0), (7.5,)])
@pytest.mark.parametrize("length", [226, 230])
def test_windows_equal_a_dense_mask(
    kind: str, middles: tuple[float, ...], length: int, load: Load
) -> None:
    noisy = noisy_of(frames=5)
    text = said_of(length=length, context=context_of(middles) if middles else None)
    full, windowed = load(kind), load(kind, window=8)
    per_frame = [16] * 5 + [6] * len(middles)
    times = (0, 2.5, 6.5, 10.5, 14.5, *middles)
    masks = [dense(times, per_frame, length, 8, shift) for shift in (0, 4)]
    if middles:  # nothing of another context is kept for this one
        other = context_of([m + 3 for m in middles])
        said(windowed, noisy, said_of(length=length, context=other))
    before = said(full, noisy, text)
    mask_layers(full.denoiser, masks)
    ours = said(windowed, noisy, text)
    close(ours, said(full, noisy, text))
    assert (ours - before).abs().max() > 1e-3
    swapped = load(kind)
    mask_layers(swapped.denoiser, masks[::-1])
    assert (ours - said(swapped, noisy, text)).abs().max() > 1e-4


class Scores(TorchFunctionMode):
    """Counts the scores that attention makes."""

    def __init__(self) -> None:
        super().__init__()
        self.num, self.most = 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            num = args[0].shape[:-1].numel() * args[1].shape[-2]
            self.num, self.most = self.num + num, max(self.most, num)
        return func(*args, **(kwargs or {}))


def test_windows_make_scores_in_proportion_to_the_videos_length(load: Load) -> None:
    counts = {}
    for window in (8, None):
        model = load("rotary", window=window)
        for frames in (5, 9, 17):
            context = context_of([8 * n + 3.5 for n in range(frames // 2)], num=1)
            text = said_of(1, context=context)
            with Scores() as scores:
                said(model, noisy_of(frames, num=1), text, (5,))
            counts[window, frames] = scores.num
    assert counts[8, 17] - counts[8, 9] == 2 * (counts[8, 9] - counts[8, 5])
    assert counts[None, 17] - counts[None, 9] > 2 * (counts[None, 9] - counts[None, 5])
    assert counts[8, 17] < counts[None, 17]


# Flow


@pytest.mark.parametrize("shift", [None, 5.0])
def test_a_flow_is_noised_and_sampled_along_straight_lines(shift: float | None, load: Load) -> None:
    model = load("sincos", flow=True, shift=shift)
    clean, noise, at = noisy_of(seed=4), noisy_of(seed=5), torch.tensor([0.5, 0.2])
    made, by = model.noised(clean, noise, at), shift or 1.0
    quantile = torch.distributions.Normal(0.0, 1.0).icdf(at)
    time = quantile.sigmoid()
    time = by * time / (1 + (by - 1) * time)
    torch.testing.assert_close(made.timestep_B, time * 1000)
    mix = time.view(2, 1, 1, 1, 1)
    torch.testing.assert_close(made.noisy_BCTYX, (1 - mix) * clean + mix * noise)
    torch.testing.assert_close(made.target_BCTYX, noise - clean)

    text, null = said_of(), torch.zeros(226, TEXT_DIM)
    ours = model.generate(text, null, noise, steps=3, guidance_scale=2.0)
    latents, nothing = noise, Conditioning(null.expand(2, 1, -1, -1))
    times = [by * t / (1 + (by - 1) * t) for t in (1, 2 / 3, 1 / 3, 0)]
    for now, then in itertools.pairwise(times):
        at_now = (now * 1000,) * 2
        asked, not_asked = (said(model, latents, t, at_now) for t in (text, nothing))
        latents = latents + (then - now) * (not_asked + 2 * (asked - not_asked))
    close(ours, latents, atol=1e-4)
    plain = load("sincos").generate(text, null, noise, steps=3, guidance_scale=2.0)
    assert (ours - plain).abs().max() > 1e-2


# Other spaces and other weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(5, 3, 7), (3, 4, 4)])
def test_another_space_has_layers_of_its_own_at_both_ends(
    kind: str, grid: tuple[int, int, int], load: Load, stock: Callable[[str], Any]
) -> None:
    model, theirs = load(kind, channels=6, flow=True), stock(kind).state_dict()
    text, noisy = said_of(), normal(2, 6, *grid)
    again, config = load(kind, channels=6), model.denoiser_config()
    own = {n for n, t in model.denoiser.state_dict().items() if not same(t, theirs[n])}
    assert own == {"patch_embed.proj.weight", "patch_embed.proj.bias",
                   "proj_out.weight", "proj_out.bias"}  # fmt: skip
    assert all(map(torch.equal, *(m.denoiser.state_dict().values() for m in (model, again))))
    assert not any(p.requires_grad for p in model.denoiser.parameters())

    assert all(model.denoiser.config[k] == v for k, v in config.items() if k[0] != "_")
    alike = CogVideoXTransformer3DModel.from_config(json.loads(json.dumps(config))).eval()
    alike.load_state_dict(model.denoiser.state_dict())
    rotary = get_3d_rotary_pos_embed(16, ((0, 0), grid[1:]), grid[1:], grid[0])
    with torch.no_grad():
        expected = alike(
            noisy.transpose(1, 2),
            text.tokens_BKLD[:, 0],
            torch.tensor([100, 700]),
            image_rotary_emb=rotary if kind == "rotary" else None,
        ).sample.transpose(1, 2)
    ours = said(model, noisy, text)
    assert ours.shape == noisy.shape and torch.equal(ours, expected)
    made = model.generate(text, torch.zeros(226, TEXT_DIM), noisy, steps=2, guidance_scale=1.0)
    assert made.shape == noisy.shape and made.isfinite().all()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def test_positions_of_another_space_are_whole_on_its_own_grid(load: Load) -> None:
    model = load("rotary", channels=6)
    ours = model._layout.rotary((2, 3, 7))
    for mine, whole in zip(
        ours, rotary_at((torch.arange(2.0), torch.arange(3.0), torch.arange(7.0)), 16), strict=True
    ):
        torch.testing.assert_close(mine, whole, atol=1e-6, rtol=0)
    embed = load("sincos", channels=6).denoiser.patch_embed
    with torch.no_grad():
        zero = torch.zeros(1, 2, 6, 3, 7)
        joint = embed(torch.zeros(1, 226, TEXT_DIM), zero)[0, 226:] - embed.proj.bias
    theirs = get_3d_sincos_pos_embed(WIDTH, (7, 3), 2, embed.spatial_interpolation_scale)
    torch.testing.assert_close(joint.double(), theirs.flatten(0, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("more", [{}, {"channels": 5}])
def test_from_scratch_are_the_librarys_weights_of_a_seed(
    more: dict[str, int], load: Load, stock: Callable[[str], Any]
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = load("sincos", scratch=True, **more)
    state = model.denoiser.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    again = load("sincos", scratch=True, **more).denoiser.state_dict()
    assert all(torch.equal(again[n], t) for n, t in state.items())
    half = load("sincos", torch.bfloat16, scratch=True, **more).denoiser.state_dict()
    assert all(torch.equal(half[n], t.bfloat16()) for n, t in state.items())
    theirs = stock("sincos")
    assert not same(state["transformer_blocks.0.ff.net.2.weight"],
                    theirs.state_dict()["transformer_blocks.0.ff.net.2.weight"])  # fmt: skip
    if not more:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            expected = CogVideoXTransformer3DModel.from_config(theirs.config).state_dict()
        assert all(torch.equal(expected[n], t) for n, t in state.items())
    channels = more.get("channels", 4)
    out = said(model, normal(2, channels, 3, 8, 8), said_of())
    assert out.shape == (2, channels, 3, 8, 8) and out.std() > 0.01


def test_random_shapes_take_a_variant(load: Load, folder: Path) -> None:
    parts = {"": "model_index", "scheduler": "scheduler/scheduler_config"}
    parts |= {p: f"{p}/config" for p in ("transformer", "vae", "text_encoder")}
    shapes = {
        part: json.loads((folder / "rotary" / f"{path}.json").read_text())
        for part, path in parts.items()
    }
    variant = Variant(window=8, flow=True, shift=3.0, scratch=True)
    model = CogVideoX.random(shapes, device=CPU, dtype=torch.bfloat16, variant=variant)
    out = said(model, noisy_of(5), said_of(context=context_of((3.5,))))
    assert (
        out.isfinite().all()
        and model.noised(out, out, torch.rand(2)).timestep_B.is_floating_point()
    )


# Text


@pytest.mark.parametrize("kind", KINDS)
def test_four_positions_more_of_text(kind: str, load: Load) -> None:
    """Zeros behind the text change little; with their keys masked for all, nothing."""
    model, noisy, plain = load(kind), noisy_of(), said_of()
    appended = Conditioning(pad(plain.tokens_BKLD, (0, 0, 0, 4)))
    before, after = said(model, noisy, plain), said(model, noisy, appended)
    change = ((after - before).norm() / before.norm()).item()
    assert 1e-4 < change < 5e-3  # 0.16 % and 0.13 % were measured
    mask = torch.ones(230 + 48, 230 + 48, dtype=torch.bool)
    mask[:, 226:230] = False
    mask_layers(model.denoiser, [mask])
    close(said(model, noisy, appended), before, atol=1e-6)
    said_something = Conditioning(torch.cat([plain.tokens_BKLD, normal(2, 1, 4, TEXT_DIM)], 2))
    assert (said(load(kind), noisy, said_something) - after).abs().max() > 1e-4


def test_longer_texts_of_several_scenes_of_the_2b(load: Load) -> None:
    model, noisy, one = load("sincos"), noisy_of(), said_of(length=230)
    second = (torch.arange(9) >= 5).float()
    shares = torch.stack([1 - second, second], -1).expand(2, 9, 2)
    twice = Conditioning(one.tokens_BKLD.expand(-1, 2, -1, -1), shares)
    close(said(model, noisy, twice), said(model, noisy, one))


def test_text_too_short_for_the_2b_is_refused(load: Load) -> None:
    with pytest.raises(ValueError, match="no less than 226 positions, not 225: fill it"):
        said(load("sincos"), noisy_of(), said_of(length=225))
    assert said(load("rotary"), noisy_of(), said_of(length=3)).isfinite().all()


# Training


@pytest.mark.parametrize(
    "kind, variant",
    [
        ("rotary", {"window": 8, "flow": True}),
        ("sincos", {"window": 8, "flow": True, "shift": 3.0}),
        ("rotary", {}),
        ("sincos", {"channels": 4, "flow": True, "scratch": True}),
    ],
)
def test_training_in_bfloat16_with_checkpointing(
    kind: str, variant: dict[str, Any], load: Load
) -> None:
    """LoRA and the context's tokens get the same gradients whether layers run once or twice."""
    grads = []
    for checkpointing in (False, True):
        model = load(kind, torch.bfloat16, **variant)
        add_lora(model.denoiser, 4, 8, model.lora_targets, "lora", seed=3)
        state = lora_state(model.denoiser, "lora")
        load_lora(
            model.denoiser,
            {k: normal(*v.shape, seed=n) * 0.1 for n, (k, v) in enumerate(state.items())},
            "lora",
        )
        if checkpointing:
            model.denoiser.enable_gradient_checkpointing()
        leaves, context = [], None
        if model.width:
            context = context_of((1.0, 9.0))
            leaves = [context.tokens_BSVUE.requires_grad_()]
        text = said_of(length=230, context=context)
        leaves += [text.tokens_BKLD.requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16):
            losses = model.errors(noisy_of(5), noisy_of(5, seed=7), torch.rand(2).fill_(0.4), text)
        losses.mean().backward()
        leaves += [p for p in model.denoiser.parameters() if p.requires_grad]
        assert len(leaves) == 17 + bool(context) and all(p.dtype == torch.float32 for p in leaves)
        grads.append([p.grad for p in leaves])
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads[0])
    for whole, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, whole, atol=1e-6, rtol=1e-2)


def test_the_whole_of_another_space_is_trained(load: Load) -> None:
    model = load("rotary", channels=6, flow=True)
    tune(model, "full", rank=4, name="lora", seed=0)
    before = copy.deepcopy(model.denoiser.state_dict())
    optimizer = torch.optim.SGD(model.denoiser.parameters(), lr=1.0)
    model.errors(normal(2, 6, 2, 3, 3), normal(2, 6, 2, 3, 3, seed=1), torch.tensor([0.3, 0.6]),
                 said_of()).mean().backward()  # fmt: skip
    optimizer.step()
    after = model.denoiser.state_dict()
    assert after.keys() == before.keys() and all(t.dtype == torch.float32 for t in after.values())
    # Keys' biases move all scores of a query alike.
    still = {n for n, t in after.items() if torch.equal(t, before[n])}
    assert all(n.endswith("to_k.bias") or ".norm_k." in n for n in still), still


# What is refused


@pytest.mark.parametrize("variant", [{}, {"window": 8}])
def test_scenes_with_context_or_windows_are_one_line(variant: dict[str, int], load: Load) -> None:
    model = load("rotary", **variant)
    context = None if variant else context_of((1.0,))
    text = Conditioning(normal(2, 2, 226, TEXT_DIM), torch.full((2, 9, 2), 0.5), context)
    with pytest.raises(ValueError, match="2 scenes with neither a context nor windows") as caught:
        said(model, noisy_of(), text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "variant, problem",
    [
        ({"window": 12}, r"window of 12 frames .* \(4 for a latent frame\): the nearest is 16"),
        ({"window": 0}, "the nearest is 8"),
        ({"window": 8, "channels": 4}, "leave out window, or channels"),
        ({"channels": 0}, "at least 1, not 0"),
        ({"shift": 3.0}, "is 3 with flow=False"),
        ({"shift": -1.0, "flow": True}, "above 0, but this is -1"),
    ],
)
def test_variants_that_there_are_not(variant: dict[str, Any], problem: str, load: Load) -> None:
    with pytest.raises(ValueError, match=problem):
        load("rotary", **variant)


def test_contexts_and_spaces_that_do_not_fit(load: Load) -> None:
    model, tokens = load("rotary"), normal(2, 2, 2, 3, WIDTH)
    for context, problem in (
        (Context(tokens, (1.0,)), r"\(2, 2, 2, 3, 32\), but 2 samples of 1 frames"),
        (Context(tokens[:1], (1.0, 5.0)), "but 2 samples of 2 frames"),
        (Context(tokens[..., :8], (1.0, 5.0)), r"\(2, 2, 2, 3, 8\), but .* of 32 are needed"),
        (Context(tokens.flatten(2, 3), (1.0, 5.0)), r"are \(2, 2, 6, 32\), but"),
    ):
        with pytest.raises(ValueError, match=problem):
            said(model, noisy_of(), said_of(context=context))
    other = load("rotary", channels=6)
    assert other.width is None
    with pytest.raises(ValueError, match="another space takes no context"):
        said(other, normal(2, 6, 3, 8, 8), said_of(context=Context(tokens, (1.0, 5.0))))
    with pytest.raises(ValueError, match="a space of 6 channels, not of 4"):
        said(other, noisy_of(), said_of())
