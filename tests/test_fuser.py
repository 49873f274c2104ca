"""The token fuser against its equation, and what it does to a video model before it has learnt."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from torch import Tensor

from engine.weights import Weights, tiny_folder
from trainers.fuser import NUM_ATTRIBUTES, ROWS, TokenFuser
from trainers.tiny_vdm import TEXT_DIM
from trainers.vdm import VDM, Backbone, Conditioning

LENGTH, WIDTH = 7, 6
DIM = 5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def given(length: int = LENGTH, dim: int = DIM, width: int = WIDTH) -> tuple[Tensor, ...]:
    """Two texts, the second shorter: encoder tokens, the LLM's, how many, and attributes."""
    return (
        drawn(2, length, dim),
        drawn(2, length, width, seed=1),
        torch.tensor([length, length // 2]),
        drawn(2, NUM_ATTRIBUTES, width, seed=2),
    )


def moved(fuser: TokenFuser) -> TokenFuser:
    """With parameters as if it had learnt."""
    with torch.no_grad():
        for number, parameter in enumerate(fuser.parameters()):
            parameter += drawn(*parameter.shape, seed=10 + number)
    return fuser


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_its_equation(name: str) -> None:
    row = ROWS[name]
    fuser = moved(TokenFuser(DIM, WIDTH, **row, alpha=0.5))
    encoder, decoder, length, attributes = given()
    own = dict(fuser.named_parameters())
    if name == "baseline":
        assert not own
        assert fuser(encoder, decoder, length, attributes) is encoder
        return

    def mapped(tokens: Tensor, branch: str) -> Tensor:
        if row["norm"]:
            tokens = tokens / (tokens.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            tokens = tokens * own[f"{branch}.0.scale_E"] + own[f"{branch}.0.bias_E"]
        return tokens @ own[f"{branch}.1.weight"].T + own[f"{branch}.1.bias"]

    expected = encoder.clone()
    if row["zero_conv"]:
        expected += encoder @ own["encoder.weight"].T + own["encoder.bias"]
    for text, num in enumerate(length.tolist()):
        expected[text, :num] += 0.5 * mapped(decoder[text, :num], "decoder")
    if row["stabilizer"]:
        semantic = mapped(attributes, "instruction") + own["learned_ND"]
        expected = torch.cat([expected, semantic], 1)
    found = fuser(encoder, decoder, length, attributes)
    assert found.shape[1] == LENGTH + fuser.num_more == LENGTH + 4 * row["stabilizer"]
    assert torch.allclose(found, expected, atol=1e-5)
    assert sum("scale" in n for n in own) == row["norm"] * (1 + row["stabilizer"])
    assert any(n.startswith("encoder.") for n in own) == row["zero_conv"]


@pytest.mark.parametrize("name", ["zeroconv", "zeroconv_ss", "mimir"])
def test_zero_convs_start_as_nothing(name: str) -> None:
    encoder, decoder, length, attributes = given()
    found = TokenFuser(DIM, WIDTH, **ROWS[name])(encoder, 1e3 * decoder, length, attributes)
    assert torch.equal(found[:, :LENGTH], encoder) and not found[:, LENGTH:].any()


@pytest.mark.parametrize("name", ["decoder", "decoder_norm_ss"])
def test_without_zero_convs_the_sum_is_not_the_encoders(name: str) -> None:
    encoder, decoder, length, attributes = given()
    found = TokenFuser(DIM, WIDTH, **ROWS[name])(encoder, decoder, length, attributes)
    assert not torch.allclose(found[:, :LENGTH], encoder, atol=1e-3)
    assert torch.equal(found[1, int(length[1]) : LENGTH], encoder[1, int(length[1]) :])


@pytest.mark.parametrize("name", list(ROWS)[1:])
def test_pads_do_not_matter(name: str) -> None:
    fuser = moved(TokenFuser(DIM, WIDTH, **ROWS[name]))
    encoder, decoder, length, attributes = given()
    other = decoder.clone()
    other[1, int(length[1]) :] = 1e6
    found = fuser(encoder, decoder, length, attributes)
    assert torch.equal(found, fuser(encoder, other, length, attributes))
    other[1, int(length[1]) - 1] += 1
    assert not torch.equal(found, fuser(encoder, other, length, attributes))


@pytest.mark.parametrize("name", ROWS)
def test_no_text_is_the_encoders_and_what_was_learnt(name: str) -> None:
    """However much was learnt, the instructions' bias is not in it."""
    fuser = moved(TokenFuser(DIM, WIDTH, **ROWS[name]))
    encoder, decoder, _, attributes = given()
    found = fuser.unconditional(encoder[0])
    dropped = fuser(encoder, decoder, torch.tensor([0, 3]), attributes)[0]
    assert torch.equal(found, dropped)
    if fuser.learned_ND is not None:
        assert torch.equal(found[LENGTH:], fuser.learned_ND)


@pytest.mark.parametrize("name", list(ROWS)[1:])
def test_gradients_reach_every_parameter_by_the_second_step(name: str) -> None:
    torch.manual_seed(0)
    fuser = TokenFuser(DIM, WIDTH, **ROWS[name])
    optimizer = torch.optim.SGD(fuser.parameters(), lr=0.1)
    target = drawn(2, LENGTH + fuser.num_more, DIM, seed=5)
    for _ in range(2):
        optimizer.zero_grad()
        (fuser(*given()) - target).square().mean().backward()
        missing = [n for n, p in fuser.named_parameters() if p.grad is None]
        assert not missing, "workers wait for the gradient of every parameter"
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in fuser.parameters())


def test_norm_brings_tokens_of_any_scale_to_one() -> None:
    fuser, decoder = TokenFuser(DIM, WIDTH, scale_init=0.25), given()[1]
    for scale in (1.0, 100.0):
        size = fuser.normed(scale * decoder).square().mean(-1).sqrt()
        assert torch.allclose(size, torch.full_like(size, 0.25), atol=1e-4)
    raw = TokenFuser(DIM, WIDTH, **ROWS["zeroconv"])
    assert torch.equal(raw.normed(decoder), decoder)


def test_sizes() -> None:
    """Phi-3.5 with T5-XXL, 3072 into 4096."""
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in TokenFuser(4096, 3072, **row).parameters())
            for name, row in ROWS.items()
        }
    into, over, scaled = 3072 * 4096 + 4096, 4096 * 4096 + 4096, 2 * 3072
    assert sizes["baseline"] == 0 and sizes["decoder"] == into
    assert sizes["decoder_norm"] == into + scaled
    assert sizes["zeroconv"] == into + over  # 29.4 million
    assert sizes["mimir"] == over + 2 * (into + scaled) + 4 * 4096
    assert sizes["mimir"] - sizes["zeroconv_ss"] == 2 * scaled


def test_a_stabilizer_needs_the_llm() -> None:
    with pytest.raises(ValueError, match="cannot be without decoder"):
        TokenFuser(DIM, WIDTH, decoder=False)


# Before the video model


class Masked(CogVideoXAttnProcessor2_0):
    """Joint attention that does not see some text positions."""

    def __init__(self, hidden: slice):
        super().__init__()
        self.hidden = hidden

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        num = hidden_states.shape[1] + encoder_hidden_states.shape[1]
        mask = torch.zeros(len(hidden_states), num)
        mask[:, self.hidden] = float("-inf")
        return super().__call__(attn, hidden_states, encoder_hidden_states, mask, image_rotary_emb)


@pytest.fixture(scope="module", params=["cogvideox", "cogvideox_5b"])
def vdm(request: pytest.FixtureRequest, small: None) -> VDM:
    base = Weights(at=str(tiny_folder() / request.param))
    backbone = Backbone(kind="cogvideox", base=base)
    return backbone.load(video=True, device=torch.device("cpu"), dtype=torch.float32)


Change = Callable[[str], float]


@pytest.fixture(scope="module")
def change(vdm: VDM) -> Change:
    """How far each row moves an untrained model's output, relative to its norm.

    Tokens of the LLM are ten times as wide as the encoder's, as figure 7 c has them.
    """
    torch.manual_seed(0)
    encoder = vdm.encode_text(["a red bus", "two cats on a long wooden wall"])
    _, decoder, _, attributes = given(vdm.text_len, TEXT_DIM, 64)
    length = torch.tensor([vdm.text_len] * 2)
    noisy, at = drawn(2, 4, 3, 16, 16, seed=3), torch.tensor([500, 900])

    @torch.no_grad()
    def measured(name: str) -> float:
        fuser = TokenFuser(TEXT_DIM, 64, **ROWS[name])
        text = fuser(encoder, 10 * decoder, length, 10 * attributes)
        base = vdm.denoise(noisy, at, Conditioning(encoder[:, None]))
        said = vdm.denoise(noisy, at, Conditioning(text[:, None]))
        return float((said - base).norm() / base.norm())

    return measured


def test_raw_summing_moves_the_model_and_the_fuser_hardly(change: Change) -> None:
    """Four tokens of zero take some of the attention; the raw sum moves every text token."""
    assert change("baseline") == change("zeroconv") == 0
    mimir, raw, normed = change("mimir"), change("decoder"), change("decoder_norm")
    print(f"relative change: mimir {mimir:.2e}, raw {raw:.2e}, normed {normed:.2e}")
    assert 0 < mimir < 5e-3 and raw > 10 * mimir
    assert normed < raw / 5, "a norm alone is smaller, and not nothing"
    assert normed > 1e-3


def test_with_semantic_tokens_masked_nothing_is_moved(vdm: VDM) -> None:
    encoder, decoder, length, attributes = given(vdm.text_len, TEXT_DIM, 64)
    fuser = TokenFuser(TEXT_DIM, 64)
    noisy, at = drawn(2, 4, 3, 8, 8, seed=3), torch.tensor([500, 900])
    plain = dict(vdm.denoiser.attn_processors)
    with torch.no_grad():
        base = vdm.denoise(noisy, at, Conditioning(encoder[:, None]))
        text = Conditioning(fuser(encoder, decoder, length, attributes)[:, None])
        moved_by = (vdm.denoise(noisy, at, text) - base).abs().max()
        vdm.denoiser.set_attn_processor(Masked(slice(vdm.text_len, vdm.text_len + 4)))
        try:
            said = vdm.denoise(noisy, at, text)
        finally:
            vdm.denoiser.set_attn_processor(plain)
    assert torch.allclose(said, base, atol=2e-6) and moved_by > 1e-4
