"""Mimir's figure 7 of a small model: pictures, and the numbers behind them."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.font_manager  # noqa: F401 - finds fonts once, in the user's own cache
import numpy as np
import pytest
import torch
from PIL import Image

from engine.weights import Weights, tiny_folder
from trainers import token_figures
from trainers.fuser import ROWS
from trainers.generation import Size
from trainers.language import LanguageModel
from trainers.mimir import Mimir
from trainers.mimir_pipeline import MimirPipeline
from trainers.token_figures import check, draw, prompts_of
from trainers.token_numbers import (
    Measured,
    embedded,
    facts,
    first_same,
    measured,
    point_facts,
    texts,
    value_facts,
)
from trainers.vdm import Backbone

CPU = torch.device("cpu")
PROMPTS = prompts_of()[:6]
PROMPT = "a red bus for $5 or \\frac $6"  # which is no formula
ANSWERS = 7
PNGS = ("figure7", "figure7_a", "figure7_b", "figure7_c", "figure7_d")


def pipe_of(*, trained: bool = True, **settings: object) -> MimirPipeline:
    """Untrained, but for a fuser whose weights are as if it were."""
    system = Mimir(
        lm=LanguageModel(weights=Weights(at=str(tiny_folder() / "phi3"))),
        vdm=Backbone(kind="cogvideox", base=Weights(at=str(tiny_folder() / "cogvideox_5b"))),
        **{"max_answer_tokens": 16, **settings},  # type: ignore[arg-type]
    )
    fuser = system.fuser().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in fuser.parameters() if trained else ():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return MimirPipeline(
        system,
        system.lm.load(CPU, torch.float32) if system.decoder else None,
        system.vdm.load(video=False, device=CPU, dtype=torch.float32),
        fuser,
        Size(frames=9, height_px=32, width_px=32, fps=8),
    )


@pytest.fixture(scope="module")
def pipe(small: None) -> MimirPipeline:
    return pipe_of(alpha=0.5)


@pytest.fixture(scope="module")
def drawn(pipe: MimirPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "new" / "folder"
    draw(pipe, PROMPTS, PROMPT, folder, answers=ANSWERS, batch=3)
    return folder


@pytest.fixture(scope="module")
def numbers(drawn: Path) -> dict:
    return json.loads((drawn / "tokens.json").read_text(encoding="utf-8"))


def measure(pipe: MimirPipeline, **settings: object) -> Measured:
    given = {"answers": ANSWERS, "seed": 0, "batch": 10, "progress": lambda *_: None} | settings
    return measured(pipe, PROMPTS, PROMPT, **given)  # type: ignore[arg-type]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def has(picture: np.ndarray, color: str) -> bool:
    wanted = [int(color[n : n + 2], 16) for n in (1, 3, 5)]
    return bool((picture == wanted).all(-1).any())


def pairs(points: np.ndarray) -> np.ndarray:
    apart = np.linalg.norm(points[:, None] - points[None], axis=-1)
    return apart[np.triu_indices(len(points), 1)]


# Pictures


def test_each_part_is_drawn_and_all_together(drawn: Path) -> None:
    assert {p.name for p in drawn.iterdir()} == {*(f"{n}.png" for n in PNGS), "tokens.json"}
    for name in PNGS:
        picture = pixels(drawn / f"{name}.png")
        assert min(picture.shape[:2]) >= 800 and (picture != 255).any(-1).mean() > 0.02
        assert has(picture, token_figures._ORANGE), "of the LLM there is something in each"
    whole, part = (pixels(drawn / f"figure7{n}.png").shape for n in ("", "_a"))
    assert whole[:2] == (2 * part[0], 2 * part[1])
    for kind, part in (("_BLUE", "a"), ("_GREEN", "a"), ("_GREEN", "b"), ("_PURPLE", "b")):
        assert has(pixels(drawn / f"figure7_{part}.png"), getattr(token_figures, kind))


def test_what_small_models_show_is_called_meaningless(
    pipe: MimirPipeline, drawn: Path, tmp_path: Path
) -> None:
    assert all(has(pixels(drawn / f"{name}.png"), token_figures._RED) for name in PNGS)
    found = measure(pipe)
    assert found.meaningless
    real = dataclasses.replace(found, meaningless=False, prompt="a red 公共汽车 for $5 or $6")
    maps = embedded(real.prompts, 0), embedded(real.drawn_answers, 0)
    for path in token_figures._written(real, *maps, tmp_path):
        assert not has(pixels(path), token_figures._RED)


def test_the_same_seed_draws_the_same(pipe: MimirPipeline, drawn: Path, tmp_path: Path) -> None:
    """And nothing global is left behind."""
    import matplotlib

    before = dict(matplotlib.rcParams), set(sys.modules)
    again = draw(pipe, PROMPTS, PROMPT, tmp_path, answers=ANSWERS, batch=3)
    assert [p.name for p in again] == [*(f"{name}.png" for name in PNGS), "tokens.json"]
    for path in again:
        assert path.read_bytes() == (drawn / path.name).read_bytes()
    assert dict(matplotlib.rcParams) == before[0]
    assert "matplotlib.pyplot" not in set(sys.modules) - before[1]
    one, other = (measure(pipe, seed=seed).answers["answer"] for seed in (0, ANSWERS))
    assert not np.allclose(one, other)


# Numbers


def test_numbers_are_numpys_on_the_tokens(pipe: MimirPipeline, numbers: dict) -> None:
    found = pipe.tokens(PROMPTS, [0] * len(PROMPTS))
    num = [len(pipe.vdm.tokenizer(p).input_ids) for p in PROMPTS]  # type: ignore[attr-defined]
    own = [one.encoder_LD[:n].numpy() for one, n in zip(found, num, strict=True)]
    said = [one.said.decoder for one in found if one.said]
    scaled = pipe.fuser.decoder[0]  # type: ignore[index]
    expected = {
        "encoder": np.concatenate([x.ravel() for x in own]),
        "decoder": np.concatenate([x.numpy().ravel() for x in said]),
        "decoder_normed": np.concatenate(
            [
                (x / x.pow(2).mean(-1, keepdim=True).sqrt() * scaled.scale_E + scaled.bias_E)
                .numpy()
                .ravel()
                for x in said
            ]
        ),
    }
    for kind, values in expected.items():
        about = numbers["values"][kind]
        assert about["num"] == values.size
        assert about["min"] == pytest.approx(values.min(), abs=1e-5)
        assert about["max"] == pytest.approx(values.max(), abs=1e-5)
        assert about["std"] == pytest.approx(values.std(), rel=1e-4)
        for limit in (0.5, 1):
            share = np.mean((values >= -limit) & (values <= limit))
            assert about[f"share_within_{limit}"] == pytest.approx(share, abs=1e-4)
        assert sum(about["share_in"].values()) == pytest.approx(1)
    means = np.stack([x.mean(0) for x in own])
    with torch.no_grad():
        sums = [
            one.fused_LD[: max(n, len(x))].mean(0).numpy()
            for one, n, x in zip(found, num, said, strict=True)
        ]
        read = means + pipe.fuser.encoder(torch.from_numpy(means)).numpy()  # type: ignore[misc]
        added = np.stack([0.5 * pipe.fuser.decoder(x).mean(0).numpy() for x in said])  # type: ignore[misc]
    for kind, points in (("encoder", read), ("decoder", added), ("sum", np.stack(sums))):
        about = numbers["prompts"]["points"][kind]
        assert about["mean_distance"] == pytest.approx(pairs(points).mean(), rel=1e-4)
        assert about["num_different"] == len(PROMPTS)
    between = np.linalg.norm(read - added, axis=1).mean()
    assert numbers["prompts"]["mean_distance"]["encoder-decoder"] == pytest.approx(between)


def test_a_prompts_own_tokens_stay_and_answers_vary(numbers: dict) -> None:
    about = numbers["answers"]
    points = about["points"]
    assert about["prompt"] == PROMPT and about["num"] == ANSWERS
    for kind in ("query", "llm_query"):
        assert points[kind]["num"] == ANSWERS and points[kind]["num_different"] == 1
        assert points[kind]["max_distance"] < 1e-4 * points[kind]["mean_length"]
    for kind in ("answer", "llm_answer", "final"):
        assert points[kind]["num_different"] == about["different_texts"] > 1
        assert points[kind]["max_distance"] > 1e-4 * points[kind]["mean_length"]
    where = {kind: np.array(p) for kind, p in about["map"]["points"].items()}
    assert len(np.unique(where["query"], axis=0)) == 1
    assert len(np.unique(where["answer"], axis=0)) == about["different_texts"]


def test_a_sum_is_of_its_branches_and_final_tokens_are_all(pipe: MimirPipeline) -> None:
    for text in texts(pipe, PROMPTS[:2], [0, 1], 2, "", lambda *_: None):
        encoder, decoder = text.encoder_branch_MD, text.decoder_branch
        num = min(len(encoder), len(decoder))
        assert np.allclose(text.sum_KD[:num], encoder[:num] + decoder[:num], atol=1e-5)
        assert len(text.sum_KD) == max(len(encoder), len(decoder)) < 226
        assert text.final_LD.shape == (230, 32)


def test_before_training_the_llm_adds_nothing_and_that_is_said(
    pipe: MimirPipeline, tmp_path: Path
) -> None:
    found = measure(pipe_of(trained=False))
    assert found.is_zero and not measure(pipe).is_zero
    maps = embedded(found.prompts, 0), embedded(found.drawn_answers, 0)
    about = facts(found, *maps)
    assert about["prompts"]["points"]["decoder"]["num_different"] == 1
    assert about["answers"]["points"]["final"]["num_different"] == 1
    assert about["answers"]["points"]["llm_answer"]["num_different"] > 1
    assert maps[1].perplexity is None, "two points have no t-SNE"
    token_figures._written(found, *maps, tmp_path)


def test_a_row_without_norm_and_zero_conv_has_none(small: None) -> None:
    found = measure(pipe_of(trained=False, **ROWS["decoder"]))
    assert not found.normed and not found.is_zero
    values = found.values
    assert np.array_equal(np.sort(values["decoder"]), np.sort(values["decoder_normed"]))


def test_rounding_does_not_part_a_prompts_own_tokens(pipe: MimirPipeline) -> None:
    """Of bfloat16, say, where answers of other lengths stand beside it."""
    found = measure(pipe)
    (query_D, *_) = found.answers["query"]
    jitter_PD = np.random.default_rng(0).normal(size=(ANSWERS, len(query_D)))
    jitter_PD *= 0.01 * np.linalg.norm(query_D) / np.linalg.norm(jitter_PD, axis=1)[:, None]
    jittered = found.answers | {"query": query_D + jitter_PD}
    for rounding, num in ((0.03, 1), (1e-4, ANSWERS)):
        now = dataclasses.replace(found, answers=jittered, rounding=rounding)
        assert len(np.unique(now.drawn_answers["query"], axis=0)) == num
        maps = embedded(now.prompts, 0), embedded(now.drawn_answers, 0)
        assert facts(now, *maps)["answers"]["points"]["query"]["num_different"] == num


# Closed forms


def test_points_of_known_distance() -> None:
    square = np.array([[1.0, 1], [1, 2], [2, 1], [2, 2], [1, 1 + 1e-9]])
    assert first_same(square, 1e-5).tolist() == [0, 1, 2, 3, 0]
    about = point_facts(square[:4], 1e-5)
    assert about["mean_distance"] == pytest.approx((4 + 2 * 2**0.5) / 6)
    assert about["max_distance"] == pytest.approx(2**0.5)
    assert about["num_different"] == 4 and point_facts(square, 1e-5)["num_different"] == 4
    assert point_facts(square[:1], 1e-5)["max_distance"] == 0


def test_values_of_known_shares() -> None:
    about = value_facts(np.array([-3.0, -0.75, -0.5, 0.25, 0.5, 0.6, 1.0, 7.0]))
    assert (about["share_within_0.5"], about["share_within_1"]) == (3 / 8, 6 / 8)
    shares = dict(zip(("-inf to -1", "0 to 0.5", "1 to inf"), (1 / 8, 1 / 8, 2 / 8), strict=True))
    assert about["share_in"] | shares == about["share_in"]
    assert (about["min"], about["max"], about["num"]) == (-3, 7, 8)


def test_clouds_that_are_apart_stay_apart_and_equal_points_equal() -> None:
    noise = np.random.default_rng(0).normal(size=(3, 12, 64))
    one, other = noise[0], noise[1] + 20
    found = embedded({"one": one, "other": other, "again": one}, 0)
    assert found.perplexity == pytest.approx(23 / 3)
    assert np.array_equal(found.kinds["one"], found.kinds["again"])
    middles = found.kinds["one"].mean(0), found.kinds["other"].mean(0)
    widest = max(pairs(found.kinds[kind]).max() for kind in ("one", "other"))
    assert np.linalg.norm(middles[0] - middles[1]) > widest / 2
    for num in (1, 2, 4):
        few = embedded({"one": one[:num]}, 0)
        assert few.perplexity is None and few.kinds["one"].shape == (num, 2)
    assert pairs(embedded({"one": one[:2]}, 0).kinds["one"]) == pytest.approx(pairs(one[:2]))


# Prompts and bad input


def test_prompts_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(set(prompts_of())) == 50
    (tmp_path / "own.txt").write_text(" a cat \n\na dog\n", encoding="utf-8")
    assert prompts_of("own.txt") == ("a cat", "a dog")
    (tmp_path / "picture").write_bytes(b"\x89PNG\xff")
    for name, why in (("missing", "No such file"), ("picture", "not UTF-8"), (".", "directory")):
        with pytest.raises(ValueError, match=why):
            prompts_of(Path(name))


def test_bad_input_is_one_line_before_any_work(
    pipe: MimirPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    other = SimpleNamespace(lm=pipe.lm)
    baseline = pipe_of(**ROWS["baseline"])
    for given, why in (
        ({"prompts": PROMPTS[:4]}, "4 different prompts: figure 7 needs at least 5"),
        ({"prompts": ["a cat"] * 50}, "1 different prompts"),
        ({"answers": 2}, "2 answers: figure 7 needs at least 5"),
        ({"prompt": "  "}, "a prompt is empty"),
        ({"prompts": [*PROMPTS, "cat " * 9000]}, "at most: shorten"),
        ({"pipe": other}, "a SimpleNamespace has none"),
        ({"pipe": baseline}, "has no LLM"),
        ({"batch": 0}, "at least 1"),
    ):
        whole = {"pipe": pipe, "prompts": PROMPTS, "prompt": PROMPT, "answers": ANSWERS} | given
        with pytest.raises(ValueError, match=why) as error:
            draw(folder=out, **whole)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"pip install -c constraints.txt '\.\[figures\]'"):
        check(PROMPTS, PROMPT, ANSWERS)
    assert not out.exists()


def test_answers_that_nothing_is_read_of_are_no_figure(small: None) -> None:
    silent = pipe_of(max_answer_tokens=1)  # the last token has no state
    with pytest.raises(ValueError, match="no answer of the LLM to 'a red bus"):
        measure(silent)


def test_what_is_not_finite_is_told(small: None) -> None:
    broken = pipe_of()
    broken.vdm.text_encoder.shared.weight.data.mul_(float("nan"))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="not finite"):
        measure(broken)
