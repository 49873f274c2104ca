"""A Qwen2-VL of a few megabytes that this project builds itself, for tests and the recipe `tiny`.

Architecture, processor, tokenizer and file formats are the real ones, so the code that loads and
asks the real model runs on it. What it says is MEANINGLESS: the vision tower is random, and the
language model is written by hand, tensor by tensor, so that

- a question in whose words "yes" occurs is answered yes or no, about as often, by the picture;
- anything else is answered by a sentence whose words the picture chooses among a few: a short one,
  or, where "detail" is asked for, a long one. One branch of the long one repeats itself, as bad
  captioners do, and some pictures lead there;
- where a "|" is among the words that ask, a second sentence follows a "|".

How: every word of the grammar is one token with an axis of its own in the residual stream, and
`lm_head` allows what may follow it (a Markov chain). Attention in the first layer fetches what the
chain cannot know: the mean of the picture's features, what was asked for, and how often the branch
that repeats itself was taken. Its keys lie on the slowest rotary frequencies, so distance does not
matter. All else (the second layer, the MLPs) is small noise.

Shapes: V tokens, D width, F features of a picture, N pictures.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2Tokenizer, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

SEED = 41
"""Chosen so that the sample corpus is answered both ways, and some of its captions repeat."""


def _places(words: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(f" {word}" for word in place.split("|")) for place in words.split())


SENTENCE: tuple[tuple[str, ...], ...] = (
    ("A", "One", "This"),
    *_places(
        "quiet|bright|narrow|wide room|street|garden|river|table shows|holds|frames the"
        " small|large|round|old|young cat|dog|boat|cup|statue|rocket that"
        " moves|stands|turns|waits slowly|gently|quickly|again near|behind|under a"
        " wooden|stone|glass|paper wall|fence|window|door while soft|warm|cold|pale"
        " light|rain|wind|shadow falls|drifts|fades from|across|over its"
        " left|right|upper|lower side|corner|edge"
    ),
    (".",),
)
"""What may be said, place by place; a word stands in one place only."""
SECOND: tuple[tuple[str, ...], ...] = (
    (" |",),
    *_places(
        "Later|Then|Soon everything|nobody|somebody leaves|enters|crosses another"
        " empty|crowded|distant hall|field|bridge|valley before evening|morning|midnight"
    ),
    ("!",),
)
"""The second scene, where scenes are asked for."""
BAR = SECOND[0][0]
AGAIN, AND = " again", " and"
"""The branch that repeats itself: "again and again and again …", then a full stop."""
NOUNS, THAT = SENTENCE[6], SENTENCE[7][0]
"""Where a short sentence ends."""

YES = ("yes", "Yes", " yes", " Yes", "YES")
NO = ("no", "No", " no", " No", "NO")

END, PAD, START = "<|im_end|>", "<|endoftext|>", "<|im_start|>"
SPECIAL = (
    PAD,
    START,
    END,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_ENGLISH = """You are a helpful assistant. system user assistant
 Does this video contain a watermark, a logo, or text that was laid over it? Answer with yes or no.
 Describe the video in one short sentence. Describe the picture in detail: what is seen, who does
 what, how they look, where it is, how the camera moves. Give details: a detailed caption.
 Write in English, in plain words. Do not guess. Your task is to rewrite a given short sentence that
 describes an image. The following frames are shown at times of seconds. Input: Output:
 Now please rewrite the prompt for each scene. Detailed Detail | words
"""
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_HEADS, _KV_HEADS, _HEAD = 8, 2, 32
_WIDTH = _HEADS * _HEAD
_FEATURES = 6
# Axes of the residual stream. The first is equally large for all tokens, so RMS norms hardly vary.
_LEVEL, _IS_PICTURE, _IS_YES, _IS_BAR, _IS_DETAIL, _IS_LOOP, _IS_MARK = range(7)
_SEEN = slice(8, 8 + _FEATURES)  # features of a picture, in its own tokens
_CONTEXT = slice(16, 16 + _FEATURES)  # their mean, fetched by attention
_ASKED_YES, _ASKED_BAR, _ASKED_DETAIL, _LOOPED = range(24, 28)
_FIRST_STATE = 32
_LEVEL_SIZE, _FLAG_SIZE, _STATE_SIZE, _SEEN_SIZE = 24.0, 2.0, 3.0, 0.3
_RMS = _LEVEL_SIZE / math.sqrt(_WIDTH)  # of every token, nearly
_SCORE = 14.0  # by which a key that is looked for beats all others: e^14 of them
_ALLOWED = 60.0  # logit of a word in its place; what the picture adds is far less
_LOOPS = 4  # times that " again" is said, about


def build_qwen2_vl(folder: Path) -> Path:
    """Writes the checkpoint (about 7 MB) into `folder`, and gives the folder; seconds of work.

    It loads through `AutoProcessor` and `AutoModelForImageTextToText`. The same tensors every time
    on the same machine and versions.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    processor = build_processor()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, so the same digits on any number of cores
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(SEED)
            model = _random_model(processor.tokenizer)
            _write_embeddings(model, processor.tokenizer)
            _write_attention(model)
            _write_head(model, processor.tokenizer)
            _calibrate_vision(model, processor)
    finally:
        torch.set_num_threads(threads)
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def build_tokenizer(special: tuple[str, ...] = SPECIAL) -> Qwen2Tokenizer:
    """A byte-level BPE of Qwen2's kind: any text has tokens, and a word of the grammar is one."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    blank = Tokenizer(models.BPE())
    # Qwen2's own splitting, so that training sees the pieces that it will see
    blank.pre_tokenizer = Qwen2Tokenizer()._tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    corpus = [*_words(), *YES, *NO, *_ENGLISH.splitlines()]
    blank.train_from_iterator(corpus, trainer)
    trained = json.loads(blank.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(m) for m in trained["merges"]],
        eos_token=END,
        pad_token=PAD,
        unk_token=PAD,
        additional_special_tokens=list(special),
        model_max_length=32768,
    )


def build_processor() -> Qwen2VLProcessor:
    """The real processor of Qwen2-VL, with the small tokenizer; pictures of up to 224 x 224 px."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        video_processor=Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False),
        tokenizer=build_tokenizer(),
        chat_template=CHAT_TEMPLATE,
    )


def _words() -> Iterator[str]:
    """Every word of the grammar, which is also a state of the chain."""
    for place in (*SENTENCE, *SECOND):
        yield from place
    yield AND


def _random_model(tokenizer: Qwen2Tokenizer) -> Qwen2VLForConditionalGeneration:
    from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    token = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": _WIDTH,
            "intermediate_size": 2 * _WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": _HEADS,
            "num_key_value_heads": _KV_HEADS,
            "max_position_embeddings": 32768,
            "initializer_range": 0.004,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [4, 6, 6],
            },
            "bos_token_id": token(PAD),
            "eos_token_id": token(END),
            "pad_token_id": token(PAD),
        },
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "num_heads": 2,
            "hidden_size": _WIDTH,
            "mlp_ratio": 2,
            "initializer_range": 0.06,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    model = Qwen2VLForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(
        bos_token_id=token(PAD), eos_token_id=[token(END), token(PAD)], pad_token_id=token(PAD)
    )
    return model


def _state_axes(tokenizer: Qwen2Tokenizer) -> dict[int, int]:
    """The axis of each token that is a state; a line feed is what an answer starts from."""
    states = ["\n", *_words(), *YES, *NO]
    assert len(states) <= _WIDTH - _FIRST_STATE, "more states than axes"
    return {_single(tokenizer, word): _FIRST_STATE + i for i, word in enumerate(states)}


def _single(tokenizer: Qwen2Tokenizer, word: str) -> int:
    ids = tokenizer.encode(word, add_special_tokens=False)
    assert len(ids) == 1, f"{word!r} is {len(ids)} tokens"
    return ids[0]


def _write_embeddings(model: Qwen2VLForConditionalGeneration, tokenizer: Qwen2Tokenizer) -> None:
    table_VD = model.get_input_embeddings().weight
    # Without a picture the words asked with stand for one.
    table_VD[:, _SEEN].normal_(std=_SEEN_SIZE)
    table_VD[:, _LEVEL] = _LEVEL_SIZE
    for token, axis in _state_axes(tokenizer).items():
        table_VD[token, axis] = _STATE_SIZE
    for word, token in tokenizer.get_vocab().items():
        if word in SPECIAL:
            continue
        for part, axis in (("|", _IS_BAR), ("detail", _IS_DETAIL)):
            if part in word.lower():
                table_VD[token, axis] = _FLAG_SIZE
    for word in set(YES) - {"yes"}:  # which is in "eyes" too
        table_VD[_single(tokenizer, word), _IS_YES] = _FLAG_SIZE
    table_VD[_single(tokenizer, AGAIN), _IS_LOOP] = _FLAG_SIZE
    table_VD[tokenizer.convert_tokens_to_ids(START), _IS_MARK] = _FLAG_SIZE


def _write_attention(model: Qwen2VLForConditionalGeneration) -> None:
    """What the first layer fetches, head by head; the second layer stays noise."""
    attention = model.model.language_model.layers[0].self_attn
    for part in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
        part.weight.zero_()
    group = _HEADS // _KV_HEADS
    flag = _FLAG_SIZE / _RMS  # as the projections see it, after the norm
    key = _SCORE * math.sqrt(_HEAD) / flag
    slow = _HEAD // 2 - 1  # slowest rotary frequency; the next slower ones lie below

    def look(head: int, axis: int, flags: tuple[int, ...]) -> None:
        """Head `head` attends to tokens with one of `flags`; the key lies on rotary axis `axis`."""
        attention.q_proj.bias[head * _HEAD + axis] = 1.0
        for found in flags:
            attention.k_proj.weight[head // group * _HEAD + axis, found] = key

    def fetch(head: int, slot: int, source: int, target: int, gain: float) -> None:
        """What `head` attends to has `source` added to axis `target`, by `gain`."""
        attention.v_proj.weight[head // group * _HEAD + slot, source] = 1.0
        attention.o_proj.weight[target, head * _HEAD + slot] = gain

    look(0, slow, (_IS_PICTURE,))
    for i in range(_FEATURES):
        fetch(0, i, _SEEN.start + i, _CONTEXT.start + i, _RMS / _SEEN_SIZE)
    look(1, slow - 1, (_IS_YES,))
    fetch(1, _FEATURES, _IS_YES, _ASKED_YES, 1 / flag)
    look(group, slow, (_IS_BAR,))
    fetch(group, 0, _IS_BAR, _ASKED_BAR, 1 / flag)
    look(group + 1, slow - 1, (_IS_DETAIL,))
    fetch(group + 1, 1, _IS_DETAIL, _ASKED_DETAIL, 1 / flag)
    # Among the marks (three in a chat) and the loops: what share are loops
    look(group + 2, slow - 2, (_IS_LOOP, _IS_MARK))
    fetch(group + 2, 2, _IS_LOOP, _LOOPED, 1 / flag)


def _write_head(model: Qwen2VLForConditionalGeneration, tokenizer: Qwen2Tokenizer) -> None:
    """Which token may follow which, and what else speaks for it, in units of `_ALLOWED`.

    A word that is not in its place stays below 1 whatever is asked for.
    """
    import torch

    head_VD = model.lm_head.weight
    head_VD.normal_(std=1e-3)
    axes = _state_axes(tokenizer)

    def token(word: str) -> int:
        return tokenizer.eos_token_id if word == END else _single(tokenizer, word)

    def allow(before: str, word: str, size: float = 1.0) -> None:
        head_VD[token(word), axes[token(before)]] = size * _ALLOWED * _RMS / _STATE_SIZE

    def asked(axis: int, word: str, size: float) -> None:
        head_VD[token(word), axis] = size * _ALLOWED * _RMS

    head_VD[:, _ASKED_YES : _LOOPED + 1] = 0
    words = list(_words())
    # The picture speaks for and against every word, and not for punctuation.
    chosen = [token(w) for w in words if w.strip().isalpha() and w not in (AND, THAT)]
    head_VD[chosen, _CONTEXT] = torch.randn(len(chosen), _FEATURES) * 1.5 * _RMS
    for places in (SENTENCE, SECOND):
        for here, after in itertools.pairwise(places):
            for before, word in itertools.product(here, after):
                allow(before, word)
    for word in SENTENCE[0]:
        allow("\n", word, 1.5)
    for noun in NOUNS:
        allow(noun, ".")
        allow(noun, THAT, 0.8)
    asked(_ASKED_DETAIL, THAT, 0.6)
    # After " again" comes " and" until the loops outnumber the marks of the chat.
    for word in SENTENCE[10]:
        allow(AGAIN, word, 0)
    allow(AGAIN, AND)
    allow(AND, AGAIN)
    allow(AGAIN, ".", 0.5)
    asked(_LOOPED, ".", 0.5 * (_LOOPS - 0.5 + 3) / (_LOOPS - 0.5))
    allow(".", END)
    allow(".", BAR, 0.8)
    asked(_ASKED_BAR, BAR, 0.6)
    allow("!", END)
    side_F = torch.randn(_FEATURES)
    # Unlike spellings are likely, so that a score that leaves some out is another one.
    for sign, answers, logits in (
        (1, YES, (-1.6, -0.6, -3.1, -2.6, -3.6)),  # and "no" is somewhat likelier
        (-1, NO, (0, -1, -2, -3, -2.5)),
    ):
        for word, logit in zip(answers, logits, strict=True):
            allow("\n", word, 1 + logit / _ALLOWED)
            asked(_ASKED_YES, word, 0.75)
            allow(word, END)
            head_VD[token(word), _CONTEXT] = sign * side_F / side_F.norm() * _RMS


def _calibrate_vision(model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor) -> None:
    """Writes the vision tower's last layer: principal features of pictures, centred and scaled."""
    import torch

    vision = model.model.visual
    pictures = list(_clouds(96))
    batch = processor.image_processor(images=pictures, return_tensors="pt")
    last = vision.merger.mlp[2]
    inside: list[torch.Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, given: inside.append(given[0]))
    vision(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
    hook.remove()
    mean_ND = inside[0].reshape(len(pictures), -1, inside[0].shape[-1]).mean(1).double()
    centre_D = mean_ND.mean(0)
    _, sizes, axes_DD = torch.linalg.svd(mean_ND - centre_D, full_matrices=False)
    axes_FD = axes_DD[:_FEATURES]
    # A singular vector's sign is arbitrary: the largest entry is positive.
    largest = axes_FD.abs().argmax(1, keepdim=True)
    axes_FD = axes_FD * axes_FD.gather(1, largest).sign()
    scale_F1 = _SEEN_SIZE * math.sqrt(len(pictures)) / sizes[:_FEATURES, None]
    last.weight.zero_()
    last.bias.zero_()
    last.weight[_SEEN] = (scale_F1 * axes_FD).float()
    last.bias[_SEEN] = -(scale_F1 * axes_FD @ centre_D[:, None])[:, 0].float()
    last.bias[_LEVEL] = _LEVEL_SIZE
    last.bias[_IS_PICTURE] = _FLAG_SIZE


def _clouds(count: int) -> Iterator[np.ndarray]:
    """Random pictures with the spectrum of photographs (1 / frequency), RGB uint8, 112 px."""
    random = np.random.default_rng(SEED)
    side = 112
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = 1.0
    for _ in range(count):
        spectrum = np.fft.fft2(random.normal(size=(4, side, side))) / frequency
        spectrum[:, 0, 0] = 0
        grey, *colours = np.fft.ifft2(spectrum).real
        field = np.stack([grey + 0.4 * c for c in colours], -1)
        field = field / field.std() * random.uniform(15, 70)
        tint = random.uniform(20, 180) + random.normal(0, 18, 3)
        yield np.clip(field + tint, 0, 255).astype(np.uint8)
