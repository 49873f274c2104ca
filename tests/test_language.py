"""States of generated tokens are those of training; and what is a caption's, what is control."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from engine.caption import Instruction
from engine.weights import Weights
from trainers.decoder import DecoderLM, _Draw
from trainers.language import LanguageModel, States, Tokens, num_cut
from trainers.prompts import Prompts, TextIds, token_spans
from trainers.system import Bucket, Sample
from trainers.tiny_llm import FAMILIES, POSITIONS, build_llm, build_tokenizer

CPU = torch.device("cpu")
DENSE = Instruction(name="dense", text='Rewrite the prompt.\n\nInput: "{y_ori}"\n\nOutput:\n')
SCENES = Instruction(
    name="multi_scene", text='Two frames.\n\nVideo about: "{y_ori}"\n\nOutput:\n', scenes=2
)
FRENCH = Instruction(name="multilingual", text="Translate {language}.\n\nInput: {y_ori}\n\nOutput:")
ORIGINALS = ("a cat", "A dog runs across a wide field of fresh snow", "rain", "an old man walks")
SEEDS = (1, 2, 3, 4)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("llm")
    return {family: build_llm(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="session")
def models(folders):
    return {family: value(folder).load(CPU, torch.float32) for family, folder in folders.items()}


def value(folder: Path, **settings) -> LanguageModel:
    return LanguageModel(weights=Weights(at=str(folder)), **settings)


def prompts_of(folder: Path, prompt_format="chat") -> Prompts:
    return Prompts.load(value(folder, prompt_format=prompt_format))


def rephrase(lm: DecoderLM, originals=ORIGINALS, instruction=DENSE, **settings):
    settings = {"max_new_tokens": 40} | settings
    return lm.rephrase(instruction, originals, **settings)


def as_trained(lm: DecoderLM, original: str, found, instruction=DENSE, **settings) -> Tensor:
    """States of an answer's kept tokens by teacher forcing, after what was said before them."""
    text = lm.tokenized(instruction.text, None, original)
    before = found.generated[: found.kept.start]
    return lm.teacher_forced([TextIds(text.prefix, text.rest + before, found.ids)], **settings)[0]


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


@pytest.fixture
def fed(request, models):
    """Counts the tokens that a model's decoder is fed: `fed(lm)` gives a list that grows."""
    hooks = []

    def count(lm: DecoderLM) -> list[int]:
        counts: list[int] = []
        hooks.append(
            lm.model.get_decoder().register_forward_pre_hook(
                lambda _, args, kwargs: counts.append(kwargs["input_ids"].numel()),
                with_kwargs=True,
            )
        )
        return counts

    yield count
    for hook in hooks:
        hook.remove()


# --- states of generated tokens are those of training ---


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generated_states_are_the_teacher_forced_ones(models, family, sample):
    lm = models[family]
    stopped = set()
    for use_prefix in (True, False):
        found = rephrase(lm, sample=sample, seeds=SEEDS, temperature=1.0, use_prefix=use_prefix)
        for original, one in zip(ORIGINALS, found, strict=True):
            assert len(one.states_SD) == len(one.ids) > 0
            for again in (True, False):
                trained = as_trained(lm, original, one, use_prefix=again)
                assert gap(one.states_SD, trained) <= 1e-5
        stopped |= {one.stopped for one in found}
        prompts = {len(lm.tokenized(DENSE.text, None, o).rest) for o in ORIGINALS}
        assert len(prompts) > 2  # ragged, so padded on the left
        assert not sample or len({one.num_tokens for one in found}) > 1  # some stopped early
    assert "eos" in stopped


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_teacher_forced_as_each_text_alone(models, family):
    lm = models[family]
    found = rephrase(lm, sample=True, seeds=SEEDS)
    texts = []
    for original, one, instruction in zip(ORIGINALS, found, (DENSE, SCENES) * 2, strict=True):
        text = lm.tokenized(instruction.text, None, original)  # two prefixes of unlike length
        texts.append(TextIds(text.prefix, text.rest, one.generated))
    together = lm.teacher_forced(texts)
    for text, states_SD in zip(texts, together, strict=True):
        (alone,) = lm.teacher_forced([text], use_prefix=False)
        assert gap(states_SD, alone) <= 1e-5


def test_one_token_off_is_far_from_the_teacher_forced_states(models):
    for lm in models.values():
        (found, *_) = rephrase(lm, max_new_tokens=20, sample=True, seeds=SEEDS, top_p=1.0)
        text = lm.tokenized(DENSE.text, None, ORIGINALS[0])
        ids = found.generated[: found.kept.stop]
        one = TextIds(text.prefix, text.rest[:-1], text.rest[-1:] + ids)
        (states_SD,) = lm.teacher_forced([one])
        kept = slice(found.kept.start, found.kept.stop)
        predicting, of_token = states_SD[:-1][kept], states_SD[1:][kept]
        assert gap(found.states_SD, of_token) <= 1e-5
        assert gap(found.states_SD, predicting) > 0.1
        assert (found.states_SD - predicting).abs().mean() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_states_are_those_of_generate(models, family):
    lm = models[family]
    found = rephrase(lm)
    prompts = [lm.tokenized(DENSE.text, None, o).prompt for o in ORIGINALS]
    longest = max(map(len, prompts))
    pad = lm.prompts.tokenizer.pad_token_id
    ids_BN = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts])
    mask_BN = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = lm.model.generate(
        input_ids=ids_BN,
        attention_mask=mask_BN,
        max_new_tokens=40,
        do_sample=False,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    states_BND = torch.cat([step[-1] for step in out.hidden_states[1:]], 1)
    for i, one in enumerate(found):
        assert tuple(out.sequences[i, longest:][: len(one.generated)].tolist()) == one.generated
        assert gap(states_BND[i, : len(one.generated)][one.kept], one.states_SD) <= 1e-5


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_an_answer_does_not_depend_on_those_beside_it(models, sample):
    lm = models["qwen2"]
    together = rephrase(lm, sample=sample, seeds=SEEDS)
    for i, original in enumerate(ORIGINALS):
        (alone,) = rephrase(lm, [original], sample=sample, seeds=[SEEDS[i]])
        assert alone.generated == together[i].generated
        assert gap(alone.states_SD, together[i].states_SD) <= 1e-5
    other = rephrase(lm, sample=True, seeds=[s + 50 for s in SEEDS])
    if sample:
        assert [o.generated for o in other] != [o.generated for o in together]


def test_the_last_token_of_an_answer_that_was_cut_off_has_no_state(models):
    lm = models["qwen2"]
    whole = rephrase(lm)
    cut = rephrase(lm, max_new_tokens=6)
    assert all(one.num_tokens > 6 for one in whole)
    for short, full in zip(cut, whole, strict=True):
        assert short.stopped == "length" and not short.complete
        assert "cut off after 6 tokens" in short.fault
        assert short.generated == full.generated[:5]
        assert (
            full.stopped == "eos" and full.complete and len(full.generated) == full.num_tokens - 1
        )


def test_an_answer_of_nothing_but_its_end_has_no_states(tmp_path):
    lm = scripted("", DENSE, "a cat")
    (found,) = rephrase(lm, ["a cat"])
    assert (found.text, found.stopped, found.fault) == ("", "eos", "the model said nothing")
    assert found.states_SD.shape == (0, lm.width) and found.scenes == (("", slice(0, 0)),)


def test_answers_without_tokens_have_no_states(models):
    for lm in models.values():
        text = lm.tokenized(DENSE.text, None, "a cat")
        for states in (lm.encoded, lm.teacher_forced):
            assert [x.shape for x in states([text] * 2)] == [(0, 64)] * 2


def test_padding_is_within_the_vocabulary_whatever_the_tokenizer_pads_with(models, folders):
    prompts = prompts_of(folders["llama"])
    prompts.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = models["llama"].model
    assert prompts.tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings
    found = rephrase(DecoderLM(model, prompts), use_prefix=False)
    for one, expected in zip(found, rephrase(models["llama"]), strict=True):
        assert gap(one.states_SD, expected.states_SD) <= 1e-5


def test_the_encoded_feature_is_of_the_answer_alone(models):
    for lm in models.values():
        text = lm.tokenized(DENSE.text, None, "a cat", "A small white cat sits on the floor.")
        (rephrasing,), (encoded,) = lm.teacher_forced([text]), lm.encoded([text])
        assert (rephrasing - encoded).abs().mean() > 0.05
        ids_1N = torch.tensor([lm.prompts.beginning + text.answer])
        with torch.no_grad():
            alone = lm.model.get_decoder()(input_ids=ids_1N).last_hidden_state[0]
        assert gap(encoded, alone[-len(text.answer) :]) <= 1e-5


def test_states_are_the_same_with_a_sliding_window(folders, tmp_path):
    """Where the window is shorter than the text, padding between prefix and rest would shift it."""
    folder = shutil.copytree(folders["phi3"], tmp_path / "phi3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 24}))
    lm = value(folder).load(CPU, torch.float32)
    for window in (24, 200):
        config = lm.model.config
        config.sliding_window = window
        lm = DecoderLM(lm.model, lm.prompts)
        for original, one in zip(ORIGINALS, rephrase(lm), strict=True):
            for use_prefix in (True, False):
                trained = as_trained(lm, original, one, use_prefix=use_prefix)
                assert gap(one.states_SD, trained) <= 1e-5


def test_bf16_states_are_near_those_of_fp32(folders, models):
    lm = value(folders["llama"]).load(CPU, torch.bfloat16)
    text = lm.tokenized(DENSE.text, None, "a cat", "A white cat sits on the wooden floor.")
    (coarse,), (fine,) = lm.teacher_forced([text]), models["llama"].teacher_forced([text])
    assert coarse.dtype == torch.bfloat16
    assert 0 < gap(coarse, fine) < 0.1 * fine.abs().max()
    assert all(one.states_SD.dtype == torch.bfloat16 for one in rephrase(lm, max_new_tokens=5))


@pytest.mark.gpu
def test_on_a_gpu_generated_states_are_the_teacher_forced_ones(folders):
    for family, folder in folders.items():
        lm = value(folder).load(torch.device("cuda"), torch.float32)
        for original, one in zip(ORIGINALS, rephrase(lm, sample=True, seeds=SEEDS), strict=True):
            assert one.states_SD.is_cuda
            for use_prefix in (True, False):
                trained = as_trained(lm, original, one, use_prefix=use_prefix)
                assert gap(one.states_SD, trained) <= 1e-4, family


@pytest.mark.gpu
def test_on_a_gpu_padding_harms_no_bf16_states(folders):
    for family, folder in folders.items():
        lm = value(folder).load(torch.device("cuda"), torch.bfloat16)
        for share in (True, False):
            found = rephrase(lm, sample=True, seeds=SEEDS, use_prefix=share)
            for original, one in zip(ORIGINALS, found, strict=True):
                for again in (True, False):
                    trained = as_trained(lm, original, one, use_prefix=again)
                    assert trained.isfinite().all(), family
                    assert gap(one.states_SD, trained) < 0.1 * trained.abs().max(), family


# --- the prefix is computed once ---


def test_a_prefix_is_fed_once(models, fed):
    lm = DecoderLM(models["qwen3"].model, models["qwen3"].prompts)
    counts = fed(lm)
    prompt = lm.tokenized(DENSE.text, None, "a cat")
    prefix, rest = len(prompt.prefix), len(prompt.rest)
    rephrase(lm, ["a cat"], max_new_tokens=3)
    assert counts == [prefix, rest, 1, 1]
    counts.clear()
    rephrase(lm, ["a cat"], max_new_tokens=3)
    text = lm.tokenized(DENSE.text, None, "a cat", "A white cat.")
    lm.teacher_forced([text] * 3)
    assert counts == [rest, 1, 1, 3 * (rest + len(text.answer))]
    counts.clear()
    rephrase(lm, ["a cat"], max_new_tokens=3, use_prefix=False)
    assert counts == [prefix + rest, 1, 1]


def test_few_prefixes_are_kept(models, fed):
    lm = DecoderLM(models["qwen3"].model, models["qwen3"].prompts)
    counts = fed(lm)
    for token in (10, 11, 12, 13, 14, 10):
        lm.prefix([token] * 7)
    assert counts == [7] * 6  # the first was let go for the fifth
    lm.prefix([14] * 7)
    assert len(counts) == 6


def test_the_prefix_that_was_used_longest_ago_is_let_go(models, fed):
    lm = DecoderLM(models["qwen3"].model, models["qwen3"].prompts)
    for token in (10, 11, 12, 13, 10, 14):
        lm.prefix([token] * 7)
    counts = fed(lm)
    lm.prefix([10] * 7)
    assert not counts
    lm.prefix([11] * 7)
    assert counts == [7]


def test_kept_prefixes_are_only_read(models):
    lm = DecoderLM(models["qwen3"].model, models["qwen3"].prompts)
    kept = lm.prefix(lm.tokenized(DENSE.text, None, "a cat").prefix)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in kept.layers]
    for originals in (ORIGINALS, ORIGINALS[:1]):
        rephrase(lm, originals, max_new_tokens=3)
    for layer, (keys, values) in zip(kept.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


def test_a_batch_of_more_prefixes_than_are_kept_is_fed_at_once(models, fed):
    lm = DecoderLM(models["qwen3"].model, models["qwen3"].prompts)
    counts = fed(lm)
    texts = [TextIds((token,) * token, (7, 8), (9,) * 4) for token in range(10, 16)]
    together = lm.teacher_forced(texts)
    assert counts == [6 * (15 + 2 + 4)]
    alone = lm.teacher_forced(texts[1:2])
    assert gap(together[1], alone[0]) <= 1e-5


# --- the device is not waited for ---


class Reads(TorchDispatchMode):
    """Counts the numbers that are read back from tensors, for each of which a GPU is waited for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_reads_nothing_but_its_tokens(models, family, sample):
    counts: list[int] = []
    with Reads() as reads:
        rephrase(
            models[family],
            ["a cat"] * 2,  # of one length: transformers reads a mask where there is one
            sample=sample,
            seeds=(1, 2),
            max_new_tokens=5,
            progress=lambda _: counts.append(reads.count),
        )
    assert counts == counts[:1] * 5


def test_nothing_is_left_on_the_model_by_a_generation_that_was_broken_off(models):
    def stop(tokens: int) -> None:
        if tokens == 2:
            raise KeyboardInterrupt

    lm = models["qwen2"]
    hooks = len(lm.model.get_decoder()._forward_hooks)
    with pytest.raises(KeyboardInterrupt):
        rephrase(lm, progress=stop)
    assert len(lm.model.get_decoder()._forward_hooks) == hooks


def test_teacher_forcing_with_the_prefix_feeds_less_than_half_at_the_papers_lengths(models, fed):
    lm = DecoderLM(models["llama"].model, models["llama"].prompts)
    counts = fed(lm)
    text = TextIds(tuple(range(300, 615)), tuple(range(300, 315)), tuple(range(300, 420)))
    with_prefix = lm.teacher_forced([text] * 8)
    shared = sum(counts)
    counts.clear()
    whole = lm.teacher_forced([text] * 8, use_prefix=False)
    assert sum(counts) == 8 * 450
    assert shared == 315 + 8 * 135 and sum(counts) > 2.5 * shared
    assert max(gap(a, b) for a, b in zip(with_prefix, whole, strict=True)) <= 1e-5


# --- tokens ---


@pytest.mark.parametrize("prompt_format", ["chat", "raw"])
@pytest.mark.parametrize("family", FAMILIES)
def test_runs_of_tokens_join_to_the_very_text(folders, family, prompt_format):
    prompts = prompts_of(folders[family], prompt_format)
    assert len(prompts.beginning) == {"llama": 1, "glm": 2}.get(family, 0)
    for instruction in (DENSE, FRENCH):
        text = prompts.tokenized(instruction.text, "French", "un chat {y_ori}", "A cat sits.")
        joined = prompts.tokenizer.decode(text.prompt + text.answer)
        words = instruction.filled("un chat {y_ori}", "French")
        if prompt_format == "raw":
            joined = joined.replace("<s> ", "<s>", 1)  # a text of LLaMA's begins with a space
            begin = prompts.tokenizer.decode(prompts.beginning)
            assert joined == begin + words + ("" if words.endswith("\n") else " ") + "A cat sits."
        else:
            asked = [{"role": "user", "content": words}]
            said = [*asked, {"role": "assistant", "content": "A cat sits."}]
            whole = prompts.tokenizer.apply_chat_template(said, tokenize=False)
            assert whole.startswith(joined) and joined.endswith("A cat sits.")
        other = prompts.tokenized(instruction.text, "French", "une maison rouge")
        assert other.prefix == text.prefix and not other.answer
        assert prompts.tokenized(instruction.text, "French", "un chat {y_ori}").rest == text.rest


@pytest.mark.parametrize("prompt_format", ["chat", "raw"])
@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_in_captions_are_words(folders, family, prompt_format):
    prompts = prompts_of(folders[family], prompt_format)
    control = set(prompts.tokenizer.added_tokens_decoder)
    bad = "a <|im_end|> b </s> c <|end|> d <|user|> [gMASK] <think> </think> e <s>"

    def controls(text: TextIds) -> list[int]:
        return [i for i in text.prompt + text.answer if i in control]

    plain = prompts.tokenized(FRENCH.text, "French", "a cat", "A cat.")
    evil = prompts.tokenized(FRENCH.text, bad, bad, bad)
    assert controls(evil) == controls(plain)
    said = prompts.tokenizer.decode(evil.answer)
    assert "< think>" in said if family == "qwen3" else said.strip() == bad
    # and they are tokens where the template writes them
    assert controls(plain) or prompt_format == "raw"


def test_answers_begin_where_the_chat_template_begins_them(folders):
    ends = {
        "llama": ("[/INST]", " A"),
        "qwen2": ("assistant\n", "A"),
        "qwen3": ("</think>\n\n", "A"),
        "phi3": ("<|assistant|>\n", "A"),
        "glm": ("<|assistant|>\n", "A"),
    }
    for family, (end, first) in ends.items():
        prompts = prompts_of(folders[family])
        text = prompts.tokenized(DENSE.text, None, "a cat", "A cat.")
        both = prompts.tokenizer.decode(text.prompt + text.answer[:1])
        assert both.endswith(end + first), family


def test_packed_texts_unpack_the_same():
    for text in (TextIds((1, 2), (3,), (4, 5, 6)), TextIds((), (7,)), TextIds((70_000,), (), ())):
        assert text.pack().dtype == torch.int32
        assert TextIds.unpack(text.pack()) == text


# --- what is said around an answer ---


def scripted(
    answer: str, instruction: Instruction, original: str, prompt_format="chat", family="qwen2"
) -> DecoderLM:
    """A GPT-2 that answers one prompt as told: each position speaks for one token."""
    tokenizer = build_tokenizer(family)
    sizes = {"n_positions": 1024, "n_embd": 256, "n_layer": 1, "n_head": 4}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), tie_word_embeddings=False, **sizes, **ends)
    prompts = Prompts(tokenizer, config, prompt_format, "scripted")
    text = prompts.tokenized(instruction.text, None, original, answer or None)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
        model.transformer.wte.weight.normal_(std=0.1)
        places_ND = model.transformer.wpe.weight.normal_()
        model.lm_head.weight.zero_()
        for at, token in enumerate((*text.answer, tokenizer.eos_token_id), len(text.prompt) - 1):
            model.lm_head.weight[token] += places_ND[at]
    return DecoderLM(model, prompts)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize(
    "prompt_format, answer, said",
    [
        ("chat", "A white cat sits.", "A white cat sits."),
        ("chat", "Sure, here is the description: A white cat sits.", "A white cat sits."),
        ("chat", 'Output: "A white cat sits." ', "A white cat sits."),
        ("chat", "Here is the rewritten prompt:\n\n**A white cat** sits.", "A white cat sits."),
        ("chat", "A white cat sits.\n\nLet me know if you need more.", "A white cat sits."),
        ("chat", "Un café… 猫 sits.\n\nI hope this helps!", "Un café… 猫 sits."),
        ("raw", 'A white cat sits.\n\nInput: "a dog"\n\nOutput: A dog', "A white cat sits."),
        ("chat", "Output: 猫と犬", "猫と犬"),
        ("raw", "Output: 猫 sits.\n\ninput: more", "猫 sits."),
    ],
)
def test_what_is_said_around_an_answer_goes_with_its_states(family, prompt_format, answer, said):
    lm = scripted(answer, DENSE, "a cat", prompt_format, family)
    (found,) = rephrase(lm, ["a cat"], max_new_tokens=120)
    assert found.text == said and found.complete
    assert answer.startswith(found.raw.strip()) and said[:3] in found.raw
    kept = lm.prompts.tokenizer.decode(found.ids)
    assert kept.strip(' "*').replace("**", "") == said
    assert gap(found.states_SD, as_trained(lm, "a cat", found)) <= 1e-5
    assert [(s.text, s.span) for s in found.scenes] == [(said, slice(0, len(found.ids)))]
    assert found.stopped == ("stop" if "nput" in answer and prompt_format == "raw" else "eos")


def test_a_raw_prompt_that_goes_on_is_stopped_early():
    answer = "A white cat sits.\n\nInput: " + "a dog " * 30
    (found,) = rephrase(scripted(answer, DENSE, "a cat", "raw"), ["a cat"], max_new_tokens=120)
    assert found.stopped == "stop" and found.num_tokens < 20 and found.text == "A white cat sits."
    talk = Instruction(name="talk", text="{y_ori}")  # no line that begins a turn
    (found,) = rephrase(scripted(answer, talk, "a cat", "raw"), ["a cat"], instruction=talk)
    assert found.stopped == "length"


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_scenes_have_states_of_their_own(family):
    answer = "Sure! Output: First frame: A cat sits. | Last frame: A dog runs."
    lm = scripted(answer, SCENES, "a cat", family=family)
    (found,) = rephrase(lm, ["a cat"], SCENES, max_new_tokens=80)
    assert found.text == "A cat sits. | A dog runs." and found.complete
    assert [s.text for s in found.scenes] == ["A cat sits.", "A dog runs."]
    for scene in found.scenes:
        ids = found.ids[scene.span]
        assert lm.prompts.tokenizer.decode(ids).strip() == scene.text
    assert found.scenes[0].span.start == 0
    assert found.scenes[0].span.stop < found.scenes[1].span.start  # the delimiter is no one's
    assert found.scenes[1].span.stop == len(found.ids) == len(found.states_SD)
    assert gap(found.states_SD, as_trained(lm, "a cat", found, SCENES)) <= 1e-5


@pytest.mark.parametrize(
    "answer, scenes",
    [("A cat sits.", 1), ("A cat | A dog | A red car", 3), ("A cat sits. | ", 1)],
)
def test_a_wrong_number_of_scenes_is_told(answer, scenes):
    (found,) = rephrase(scripted(answer, SCENES, "a cat"), ["a cat"], SCENES)
    assert len(found.scenes) == scenes and not found.complete
    assert found.fault == f"2 scenes wanted, {scenes} found"


def test_a_token_that_two_scenes_share_is_the_firsts():
    # "A cat", ". |", " A", " dog" with a scene to the full stop, and one after the bar
    assert token_spans([0, 5, 8, 10, 14], [(0, 6), (7, 14)]) == [slice(0, 2), slice(2, 4)]
    # three tokens for one character
    assert token_spans([0, 2, 2, 2, 3], [(2, 3)]) == [slice(1, 4)]


def test_a_refusal_is_said():
    lm = scripted("I'm sorry, but I cannot help with that.", DENSE, "a cat")
    (found,) = rephrase(lm, ["a cat"])
    assert found.fault == "the model declined"


# --- drawing, likelihood ---


def test_tokens_are_drawn_with_their_probability():
    logits = torch.tensor([0.0, 2.0, 1.0])
    draw = _Draw(temperature=2.0, top_p=1.0, seeds=range(4000))
    share = torch.bincount(draw(logits.expand(4000, 3)), minlength=3) / 4000
    assert share.tolist() == pytest.approx((logits / 2).softmax(0).tolist(), abs=0.03)
    # 0.51, 0.31, 0.19: the two likeliest make up 0.6
    share = torch.bincount(_Draw(2.0, 0.6, range(4000))(logits.expand(4000, 3)), minlength=3) / 4000
    assert share[0] == 0 and share[1].item() == pytest.approx(1 / (1 + math.exp(-0.5)), abs=0.03)
    assert set(_Draw(2.0, 0.5, range(99))(logits.expand(99, 3)).tolist()) == {1}
    with pytest.raises(ValueError, match=r"temperature is more than 0 and top_p in \(0, 1\]"):
        _Draw(0.0, 1.0, [0])


def test_the_likelihood_of_an_answer_is_the_models_loss(models):
    for lm in models.values():
        text = lm.tokenized(DENSE.text, None, "a cat", "A small white cat sits on the floor.")
        ids_1N = torch.tensor([text.prompt + text.answer])
        labels_1N = ids_1N.clone()
        labels_1N[:, : len(text.prompt)] = -100
        with torch.no_grad():
            loss = lm.model(input_ids=ids_1N, labels=labels_1N).loss.item()
        other = lm.tokenized(SCENES.text, None, "rain", "Rain.")
        assert lm.nll([text, other])[0] == pytest.approx(loss, abs=1e-4)
    (own,) = rephrase(lm, ["a cat"])
    said = lm.tokenized(DENSE.text, None, "a cat")
    assert lm.nll([TextIds(said.prefix, said.rest, own.generated)])[0] < loss


# --- encoders ---


def pairs(*rephrased: str) -> list[Sample]:
    row = {"instruction_text": DENSE.text, "language": None, "original": "a cat"}
    bucket = Bucket(frames=1, height_px=64, width_px=64)
    return [Sample(row=row | {"rephrased": text}, bucket=bucket) for text in rephrased]


def test_encoders_give_what_the_model_gives(folders, models):
    lm = value(folders["glm"])
    samples = pairs("A white cat sits on the wooden floor.", "Rain.")
    for sample, tokens in zip(samples, Tokens(lm=lm).on(CPU)(samples), strict=True):
        assert tokens.dtype == torch.int32
        sample.features["tokens"] = tokens
    texts = [
        models["glm"].tokenized(DENSE.text, None, "a cat", s.row["rephrased"]) for s in samples
    ]
    whole = States(lm=lm, precision="fp32").on(CPU)(samples)
    for states_SD, expected in zip(whole, models["glm"].teacher_forced(texts), strict=True):
        assert gap(states_SD, expected) <= 1e-5 and not states_SD.requires_grad
    encoded = States(lm=lm, precision="fp32", feature="encoded").on(CPU)(samples)
    for states_SD, expected in zip(encoded, models["glm"].encoded(texts), strict=True):
        assert gap(states_SD, expected) <= 1e-5
    cut = States(lm=lm, precision="fp32", limit=4).on(CPU)(samples)
    assert [len(c) for c in cut] == [4, min(4, len(texts[1].answer))]
    assert gap(cut[0], whole[0][:4]) <= 1e-5
    counts = [num_cut(s.features["tokens"], 4) for s in samples]
    assert counts == [len(texts[0].answer) - 4, max(0, len(texts[1].answer) - 4)]
    assert States(lm=lm).on(CPU)(samples)[0].dtype == torch.bfloat16


def test_states_can_be_learned_from(models):
    text = models["llama"].tokenized(DENSE.text, None, "a cat", "A cat.")
    (states_SD,) = models["llama"].teacher_forced([text])
    adapter = torch.nn.Linear(64, 8)
    adapter(states_SD).sum().backward()
    assert adapter.weight.grad is not None and adapter.weight.grad.abs().sum() > 0


def test_fingerprints_tell_what_changes_the_states(folders):
    qwen, glm = value(folders["qwen2"]), value(folders["glm"])
    known = {
        States(lm=qwen).fingerprint,
        States(lm=glm).fingerprint,
        States(lm=value(folders["qwen2"], prompt_format="raw")).fingerprint,
        States(lm=qwen, limit=77).fingerprint,
        States(lm=qwen, feature="encoded").fingerprint,
        States(lm=qwen, precision="fp32").fingerprint,
        Tokens(lm=qwen).fingerprint,
    }
    assert len(known) == 7
    assert States(lm=qwen, batch_size=3).fingerprint in known
    json.dumps(qwen.describe())


# --- checkpoints, errors ---


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_are_the_same_every_time(folders, tmp_path, family):
    again = build_llm(tmp_path / "again", family)
    assert Weights(at=str(again)).describe() == Weights(at=str(folders[family])).describe()
    model = AutoModelForCausalLM.from_pretrained(again)
    assert model.config.model_type == family and model.config.max_position_embeddings >= 2048
    assert AutoTokenizer.from_pretrained(again).chat_template
    assert value(again).width() == 64 == value(again).load(CPU, torch.float32).width


def one_line(error: pytest.ExceptionInfo[ValueError]) -> bool:
    return "\n" not in str(error.value)


def test_a_folder_that_is_no_language_model_is_one_clear_line(folders, tmp_path):
    def broken(name: str, *remove: str, **changes) -> LanguageModel:
        folder = shutil.copytree(folders["qwen2"], tmp_path / name)
        for pattern in remove:
            for path in folder.glob(pattern):
                path.unlink()
        config = folder / "config.json"
        if changes:
            config.write_text(json.dumps(json.loads(config.read_text()) | changes))
        return value(folder)

    cases = [
        (value(tmp_path / "nowhere"), "no weights at"),
        (broken("a", "config.json"), "has no config.json"),
        (broken("b", model_type="clip"), "is a clip model, which transformers does not know"),
        (
            broken("c", model_type="x", auto_map={}),
            "without the code that comes with it, which is never run",
        ),
        (broken("d", "tokenizer*", "vocab*"), "has no tokenizer"),
        (broken("e", "*.safetensors"), r"has no weights \(\*.safetensors\)"),
        (broken("f", "chat_template.jinja"), "has no chat template: .* set prompt_format to raw"),
    ]
    (tmp_path / "a" / "readme.txt").write_text("")
    for lm, words in cases:
        with pytest.raises(ValueError, match=words) as error:
            lm.check()
        assert one_line(error)
        with pytest.raises(ValueError, match=words):
            lm.load(CPU, torch.float32)
    value(tmp_path / "f", prompt_format="raw").check()
    value(folders["qwen2"]).check()


def test_a_prompt_beyond_the_limit_is_one_clear_line(models):
    for family in ("llama", "phi3"):  # phi3 reads twice as many, at other frequencies
        lm = models[family]
        with pytest.raises(
            ValueError, match=rf"the text has \d+ tokens.* reads {POSITIONS}"
        ) as error:
            lm.tokenized(DENSE.text, None, "a cat " * 3000)
        assert one_line(error)
        text = lm.tokenized(DENSE.text, None, "cat " * 1200)
        found = len(text.prompt)
        assert POSITIONS - found > 10
        with pytest.raises(ValueError, match=rf"has {found} tokens and {POSITIONS} new ones"):
            lm.rephrase(DENSE, ["cat " * 1200], max_new_tokens=POSITIONS)


def test_seeds_are_as_many_as_captions(models):
    with pytest.raises(ValueError, match="4 captions need as many seeds: found 1"):
        rephrase(models["qwen2"], sample=True, seeds=[1])


def test_what_cannot_be_tokenised_is_one_clear_line(models):
    lm = models["qwen2"]
    with pytest.raises(ValueError, match=r"no slot \{y_ori\}"):
        lm.tokenized("Rewrite it.", None, "a cat")
    with pytest.raises(ValueError, match="needs the language of the original"):
        lm.tokenized(FRENCH.text, None, "un chat")
    with pytest.raises(ValueError, match="original caption is needed"):
        lm.tokenized(DENSE.text, None, " \n")
    assert lm.rephrase(DENSE, []) == [] and lm.teacher_forced([]) == []


def test_the_values_need_no_torch():
    code = "import sys, trainers.language; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
