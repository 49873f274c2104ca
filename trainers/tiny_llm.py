"""Language models of about a megabyte that this project builds itself, for tests and `tiny`.

Architectures, tokenizers, chat templates and file formats are the real ones of five families; what
they say is MEANINGLESS. Weights are random, and the output layer is shaped so that an answer is
made of some 12 to 20 words with, where a prompt of some hundred tokens has a few "|", mostly one.

Shapes: V tokens, D width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

Family = Literal["llama", "qwen2", "qwen3", "phi3", "glm"]
FAMILIES: tuple[Family, ...] = get_args(Family)
SEED = 7
POSITIONS = 4096
"""Longest text; of phi3 the same, before its frequencies switch (it has twice as many)."""

_VOCABULARY = 900
_HEAD = 16
_STEPS = 20
_IS_BAR, _ASKED_BAR = _STEPS, _STEPS + 1  # axes after those of the steps
_SIZE, _NEXT, _SPREAD, _GAIN = 4.0, 4.0, 2.5, 150.0
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEMPLATES: dict[Family, str] = {
    # As LLaMA-2's: a space before and after what the assistant says
    "llama": (
        "{% for message in messages %}{% set words = message.content | trim %}"
        "{% if message.role == 'user' %}<s>[INST] {{ words }} [/INST]"
        "{% else %} {{ words }} </s>{% endif %}{% endfor %}"
    ),
    "qwen2": _CHATML,
    # Thoughts, empty where they are not wanted, stand before an answer
    "qwen3": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
        "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
        "<think>\n\n</think>\n\n{% endif %}{% endif %}"
    ),
    "phi3": (
        "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    # A line feed that is no part of the generation prompt
    "glm": (
        "[gMASK]<sop>{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
}
_SPECIAL: dict[Family, tuple[str, ...]] = {
    "llama": ("<unk>", "<s>", "</s>"),
    "qwen2": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "qwen3": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "phi3": ("<unk>", "<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "glm": ("<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>"),
}
_ENDS: dict[Family, tuple[str, ...]] = {
    "llama": ("</s>",),
    "qwen2": ("<|im_end|>", "<|endoftext|>"),
    "qwen3": ("<|im_end|>", "<|endoftext|>"),
    "phi3": ("<|end|>", "<|endoftext|>"),
    "glm": ("<|user|>", "<|endoftext|>"),
}
_CORPUS = """Your task is to rewrite a provided short sentence that describes a video: enrich the
 details of the main objects, their type, color, shape; describe movements and gestures; provide
 context about the surrounding environment, such as the scene, place and time. Use only English.
 Input: Output: Examples: Example 1: Video about: Now, rewrite the prompt. Translate the input text.
 A small white cat with a blue collar sits on the wooden floor of a bright kitchen in the morning.
 An old man in a long coat walks slowly along the beach while gentle waves roll onto the sand and
 the sun sets behind him. A red car drives down a narrow road between tall green trees, and leaves
 fall around it. Two children play with a large yellow ball in a quiet garden; the camera moves to
 the left. A towering volcano erupts against the dark sky, with glowing lava flowing down its sides.
 A woman pours hot coffee into a ceramic cup, steam rises, soft light falls through the window. The
 first frame shows an empty street at night | The last frame shows the same street in heavy rain.
 The video features a dog that runs across a wide field of fresh snow toward a distant house.
"""


def build_llm(folder: Path, family: Family, width: int = 64, layers: int = 2) -> Path:
    """Writes a checkpoint into `folder`, and gives the folder; a second of work.

    It loads through `AutoTokenizer` and `AutoModelForCausalLM`. The same tensors every time on the
    same machine and versions.

    Args:
        folder: Made where it is missing.
        family: Whose architecture, tokenizer and chat template it has.
        width: D, a multiple of 32.
        layers: Of the decoder.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(family)
    ends = tokenizer.convert_tokens_to_ids(list(_ENDS[family]))
    config = _config(family, tokenizer, ends, width, layers)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, so the same digits on any number of cores
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(SEED)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            _write_weights(model, tokenizer, ends[0])
    finally:
        torch.set_num_threads(threads)
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[-1])
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def build_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A small BPE of the family's kind: over bytes, or over characters as LLaMA's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

    special = _SPECIAL[family]
    spaced = family in ("llama", "phi3")
    blank = Tokenizer(models.BPE())
    if spaced:
        # Words apart while learning, though LLaMA's has none: else whole sentences become tokens
        blank.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
        )
    else:
        blank.pre_tokenizer = Qwen2Tokenizer()._tokenizer.pre_tokenizer
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        min_frequency=1,
        show_progress=False,
        special_tokens=[*special, *bytes_] if spaced else [],
        initial_alphabet=[] if spaced else sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    blank.train_from_iterator(_corpus(), trainer)
    trained = json.loads(blank.to_str())["model"]
    vocab, merges = trained["vocab"], [tuple(m) for m in trained["merges"]]
    settings: dict[str, Any] = {
        "chat_template": _TEMPLATES[family],
        "model_max_length": POSITIONS,
        "additional_special_tokens": list(special),
    }
    ends = _ENDS[family]
    if spaced:
        settings |= {"eos_token": ends[-1], "pad_token": ends[-1]}
        return LlamaTokenizer(vocab, merges, add_bos_token=family == "llama", **settings)
    if family == "glm":
        blank.decoder = decoders.ByteLevel()
        blank.add_special_tokens(list(special))
        begins = [(name, blank.token_to_id(name)) for name in ("[gMASK]", "<sop>")]
        blank.post_processor = processors.TemplateProcessing(
            single="[gMASK] <sop> $A", special_tokens=begins
        )
        settings |= {"eos_token": ends[-1], "pad_token": ends[-1]}
        return PreTrainedTokenizerFast(tokenizer_object=blank, **settings)
    tokenizer = Qwen2Tokenizer(vocab, merges, eos_token=ends[0], pad_token=ends[-1], **settings)
    if family == "qwen3":
        tokenizer.add_tokens(["<think>", "</think>"])  # as Qwen3 has them: added, not special
    return tokenizer


def _corpus() -> list[str]:
    """Sentences, and the instructions that the model will be shown."""
    folder = Path(__file__).parents[1] / "engine" / "instructions"
    shown = [p.read_text(encoding="utf-8") for p in sorted(folder.glob("*.txt"))]
    return [line for text in (_CORPUS, *shown) for line in text.splitlines()]


def _config(
    family: Family, tokenizer: PreTrainedTokenizerFast, ends: list[int], width: int, layers: int
) -> PretrainedConfig:
    from transformers import GlmConfig, LlamaConfig, Phi3Config, Qwen2Config, Qwen3Config

    heads = width // _HEAD
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.15,  # attention and MLP matter as much as the embedding
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    if family == "llama":
        return LlamaConfig(**settings)
    if family == "qwen2":
        return Qwen2Config(**settings)
    if family == "phi3":
        settings |= {
            "max_position_embeddings": 2 * POSITIONS,
            "original_max_position_embeddings": POSITIONS,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "factor": 2.0,
                "short_factor": [1.0] * 8,
                "long_factor": [float(i) for i in range(1, 9)],
                "original_max_position_embeddings": POSITIONS,
            },
        }
        return Phi3Config(**settings)
    config = {"qwen3": Qwen3Config, "glm": GlmConfig}[family]
    return config(head_dim=_HEAD, **settings)


def _write_weights(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, end: int) -> None:
    """Gives each word a step of the answer, told by an axis, and lets words of the next two follow.

    Which of them is random, as are attention and MLP, and so depends on all that came before.
    """
    import torch

    table_VD = model.get_input_embeddings().weight
    head_VD = model.get_output_embeddings().weight
    step_V = torch.zeros(len(head_VD), dtype=torch.long)  # of prompts, which end with no word
    words = []
    for token, i in sorted(tokenizer.get_vocab().items()):
        word = token.lstrip("Ġ▁")
        if word != token and len(word) > 1 and word.isascii() and word.isalpha():
            step_V[i] = 1 + len(words) % (_STEPS - 1)
            words.append(i)
    bar = tokenizer("a |", add_special_tokens=False)["input_ids"][-1]
    step_V[bar] = _STEPS // 2
    table_VD[:, :_STEPS] = _SIZE * torch.nn.functional.one_hot(step_V, _STEPS)
    table_VD[:, [_IS_BAR, _ASKED_BAR]] = 0
    table_VD[bar, _IS_BAR] = _SIZE
    for layer in model.get_decoder().layers:  # which would write over it
        layer.self_attn.o_proj.weight[: _ASKED_BAR + 1] = 0
        layer.mlp.down_proj.weight[: _ASKED_BAR + 1] = 0
    _look_for_bars(model)
    # States are normed, so a row of this length gives logits of this spread.
    head_VD.zero_()
    head_VD[words] = torch.randn(len(words), head_VD.shape[1]) * _SPREAD / head_VD.shape[1] ** 0.5
    head_VD[:, : _ASKED_BAR + 1] = 0
    head_VD[bar, :_STEPS] = -4 * _NEXT  # nowhere else, however many bars are in the prompt
    for token in [*words, bar]:
        head_VD[token, max(0, step_V[token] - 2) : step_V[token]] = _NEXT
    head_VD[bar, _ASKED_BAR] = 0.75 * _NEXT
    head_VD[end, _STEPS - 3 : _STEPS] = 1.25 * _NEXT
    head_VD[end, _STEPS - 1] += _NEXT


def _look_for_bars(model: PreTrainedModel) -> None:
    """The first head of the first layer looks everywhere alike, and tells the share of bars."""
    attention = model.get_decoder().layers[0].self_attn
    if hasattr(attention, "qkv_proj"):  # Phi-3's, one below the other
        query = value = attention.qkv_proj.weight
        row = len(value) - attention.num_key_value_heads * _HEAD
    else:
        query, value, row = attention.q_proj.weight, attention.v_proj.weight, 0
    query[:_HEAD] = 0
    value[row] = 0
    value[row, _IS_BAR] = 1
    attention.o_proj.weight[:, 0] = 0
    attention.o_proj.weight[_ASKED_BAR, 0] = _GAIN
