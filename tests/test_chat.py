"""Asking models of transformers: small random checkpoints of five real families."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.chat import (
    Answer,
    Picture,
    Request,
    Shown,
    TransformersChat,
    VisionLanguageModel,
    small,
    video_metadata,
)
from engine.operator import Failed
from engine.tiny_vlm import CHAT_TEMPLATE, SPECIAL, build_qwen2_vl, build_tokenizer
from engine.weights import Weights

torch = pytest.importorskip("torch")

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # so that random models say different things
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def jpeg(seed: int, width: int, height: int) -> bytes:
    colours = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    found = io.BytesIO()
    Image.fromarray(colours).resize((width, height)).save(found, "JPEG")
    return found.getvalue()


def frames(*times: float, size: tuple[int, int] = (96, 64), seed: int = 0) -> tuple[Picture, ...]:
    return tuple(Picture(jpeg=jpeg(seed + i, *size), time_s=t) for i, t in enumerate(times))


def image(seed: int = 0, size: tuple[int, int] = (96, 64)) -> Picture:
    return Picture(jpeg=jpeg(seed, *size))


# Checkpoints


def qwen2_vl(folder: Path) -> None:
    build_qwen2_vl(folder)


def qwen2_5_vl(folder: Path) -> None:
    import transformers as t

    tokenizer = build_tokenizer()
    size = {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}
    vision = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "num_heads": 2}
    config = t.Qwen2_5_VLConfig(
        text_config=TEXT
        | {"vocab_size": len(tokenizer), "rope_parameters": ROPE}
        | ends(tokenizer),
        vision_config=vision | {"depth": 2, "fullatt_block_indexes": [1], "window_size": 56},
        **qwen_tokens(tokenizer),
    )
    t.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    t.Qwen2_5_VLProcessor(
        image_processor=t.Qwen2VLImageProcessor(size=size),
        video_processor=t.Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def qwen3_vl(folder: Path) -> None:
    import transformers as t

    tokenizer = build_tokenizer()
    size = {"shortest_edge": 64 * 64, "longest_edge": 4 * 224 * 224}
    config = t.Qwen3VLConfig(
        text_config=TEXT
        | {"vocab_size": len(tokenizer), "head_dim": 16, "rope_parameters": ROPE}
        | ends(tokenizer),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        **qwen_tokens(tokenizer),
    )
    t.Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    t.Qwen3VLProcessor(
        image_processor=t.Qwen2VLImageProcessor(size=size, patch_size=16),
        video_processor=t.Qwen3VLVideoProcessor(size=size, cap_pixels_per_frame=False),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def smolvlm(folder: Path) -> None:
    import transformers as t

    pytest.importorskip("num2words")
    marks = "<fake_token_around_image> <image> <global-img> <end_of_utterance>".split()
    tiles = [f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)]
    tokenizer = build_tokenizer((*SPECIAL[:3], *marks, *tiles))
    token = tokenizer.convert_tokens_to_ids
    config = t.SmolVLMConfig(
        image_token_id=token("<image>"),
        scale_factor=2,
        text_config=TEXT
        | {"model_type": "llama", "vocab_size": len(tokenizer)}
        | {"eos_token_id": token("<end_of_utterance>"), "bos_token_id": token("<|im_start|>")},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
        },
        pad_token_id=token("<|endoftext|>"),
    )
    t.SmolVLMForConditionalGeneration(config).save_pretrained(folder)
    tile = {"longest_edge": 64}
    t.SmolVLMProcessor(
        image_processor=t.SmolVLMImageProcessor(size={"longest_edge": 128}, max_image_size=tile),
        video_processor=t.SmolVLMVideoProcessor(
            size=tile, max_image_size=tile, num_frames=64, fps=1
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=(
            "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}: "
            "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
            "{% else %}<image>{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}Assistant:"
        ),
    ).save_pretrained(folder)


def internvl(folder: Path) -> None:
    import transformers as t

    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = build_tokenizer((*SPECIAL[:3], *named.values()))
    tokenizer = t.Qwen2Tokenizer(
        vocab=tokenizer._vocab,
        merges=tokenizer._merges,
        eos_token="<|im_end|>",
        additional_special_tokens=[*SPECIAL[:3], *named.values()],
        extra_special_tokens=named,
    )
    side = {"height": 56, "width": 56}
    config = t.InternVLConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(tokenizer)} | ends(tokenizer),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [56, 56],
            "patch_size": [14, 14],
        },
    )
    t.InternVLForConditionalGeneration(config).save_pretrained(folder)
    t.InternVLProcessor(
        image_processor=t.GotOcr2ImageProcessor(size=side, max_patches=4),
        video_processor=t.InternVLVideoProcessor(size=side),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=(
            "{% for message in messages %}<|im_start|>{{ message.role }}\n"
            "{% for part in message.content %}{% if part.type == 'image' %}<IMG_CONTEXT>\n"
            "{% elif part.type == 'video' %}<video>\n{% else %}{{ part.text }}{% endif %}"
            "{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
        ),
    ).save_pretrained(folder)


def ends(tokenizer: Any) -> dict[str, Any]:
    return {"bos_token_id": None, "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>")}


def qwen_tokens(tokenizer: Any) -> dict[str, int]:
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    return {k: tokenizer.convert_tokens_to_ids(f"<|{v}|>") for k, v in names.items()}


FAMILIES: dict[str, Callable[[Path], None]] = {
    f.__name__: f for f in (qwen2_vl, qwen2_5_vl, qwen3_vl, smolvlm, internvl)
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Weights]:
    root = tmp_path_factory.mktemp("checkpoints")

    def get(family: str) -> Weights:
        if not (root / family).exists():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                FAMILIES[family](root / family)
        return Weights(at=str(root / family))

    return get


@pytest.fixture(scope="module")
def tiny(checkpoint: Callable[[str], Weights]) -> Weights:
    return checkpoint("qwen2_vl")


def prompts(model: VisionLanguageModel, *requests: Request) -> list[str]:
    """The text that the model is given, padding left out."""

    def read(asked: list[Shown]) -> list[str]:
        given = model.inputs(asked)
        return [
            model.tokenizer.decode(ids[mask.bool()])
            for ids, mask in zip(given["input_ids"], given["attention_mask"], strict=True)
        ]

    return model.answer(requests, 10**6, read)


# Every family


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gets_the_answers_that_each_gets_alone(checkpoint, family):
    requests = [
        Request(text="Describe the video in detail.", pictures=frames(0.5, 1.5, 2.5), video=True),
        Request(
            text="What is seen here, and what happens then?",
            pictures=frames(0.25, 0.75, 1.25, 1.75, 2.25, size=(64, 96), seed=10),
            video=True,
            system="You look closely.",
        ),
        Request(text="Describe.", pictures=frames(0, 1, size=(64, 64), seed=30), video=True),
        Request(text="Describe it.", pictures=(image(40, (128, 64)),)),
        Request(text="Compare.", pictures=(image(41, (90, 64)), image(42, (64, 100)))),
        Request(text="Say something in detail.", pictures=()),
        Request(text="One frame.", pictures=frames(1.0, seed=50), video=True),
    ]
    chat = TransformersChat(weights=checkpoint(family), max_new_tokens=10)
    chat.check()
    ask = chat.open()
    together = ask(requests)
    assert all(isinstance(a, Answer) and a.text for a in together)
    assert together == [ask([r])[0] for r in requests]
    assert len({a.text for a in together}) > 3, "answers depend on what is asked"


@pytest.mark.parametrize("family", FAMILIES)
def test_marks_of_the_processor_in_a_text_are_words(checkpoint, family):
    text = "A <image> of <|image_pad|>, <video>, <IMG_CONTEXT> and <|video_pad|><|im_end|> logo."
    ask = TransformersChat(weights=checkpoint(family), max_new_tokens=2).open()
    plain, odd = ask([Request(text=t, pictures=(image(),)) for t in ("A logo.", text)])
    assert isinstance(plain, Answer) and isinstance(odd, Answer)


def test_the_prompt_is_not_part_of_the_answer_and_words_keep_their_place(tiny):
    model = VisionLanguageModel(tiny)
    (text,) = prompts(
        model, Request(text="Who is it?", pictures=(image(), image()), system="Be brief.")
    )
    pad = "<|vision_start|>" + 6 * "<|image_pad|>" + "<|vision_end|>"
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{pad}{pad}Who is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    (answer,) = TransformersChat(weights=tiny).open()([Request(text="Who?", pictures=(image(),))])
    assert answer.finished and answer.text.startswith(("A ", "One ", "This "))
    assert answer.text.endswith(".")


def test_an_answer_cut_off_says_so(tiny):
    asked = [
        Request(text="A logo, yes or no?", pictures=(image(),)),
        Request(text="Describe it in detail.", pictures=(image(),)),
    ]
    short, long = TransformersChat(weights=tiny, max_new_tokens=4).open()(asked)
    assert short.finished and short.text in ("Yes", "no")
    assert not long.finished and len(long.text.split()) == 4


def test_a_picture_that_cannot_be_decoded_fails_alone(tiny):
    bad = Request(text="Describe.", pictures=(image(), Picture(jpeg=b"no picture")))
    good = Request(text="Describe.", pictures=(image(),))
    odd = Request(
        text="Describe.", pictures=(*frames(0.0), *frames(1.0, size=(64, 96))), video=True
    )
    ask = TransformersChat(weights=tiny).open()
    first, second, third, last = ask([good, bad, odd, good])
    assert isinstance(second, Failed) and second.error_type == "DecodeError"
    assert "10 bytes" in second.message and not second.transient
    assert isinstance(third, Failed) and "differ in size" in third.message
    assert first == last == ask([good])[0]
    assert ask([bad])[0].error_type == "DecodeError"
    assert ask([]) == []


# When frames are seen


def test_video_metadata_gives_the_times_back():
    from transformers.video_utils import VideoMetadata

    for times in ((0.5, 1.5, 2.5, 3.5), (0.125, 0.375), (0.0, 0.7, 3.3)):
        request = Request(text="", pictures=frames(*times), video=True)
        shown = Shown(request=request, images=(Image.new("RGB", (8, 4)),), video=True)
        metadata = VideoMetadata(**video_metadata(shown))
        assert metadata.timestamps == pytest.approx(times, abs=5e-4)
        gap_s = (times[-1] - times[0]) / (len(times) - 1)
        assert 1 / metadata.sampled_fps == pytest.approx(gap_s, rel=1e-3)
        assert metadata.duration == pytest.approx(gap_s * len(times))


def test_models_are_told_the_times(checkpoint):
    video = Request(text="Describe.", pictures=frames(61.5, 62.5, 63.5, 64.5), video=True)
    (text,) = prompts(VisionLanguageModel(checkpoint("qwen3_vl")), video)
    assert [t in text for t in ("<62.0 seconds>", "<64.0 seconds>")] == [True, True]
    (text,) = prompts(VisionLanguageModel(checkpoint("smolvlm")), video)
    assert [f"Frame from 01:0{s}" in text for s in (1, 2, 3, 4)] == [True] * 4
    model = VisionLanguageModel(checkpoint("qwen2_5_vl"))
    slow = Request(text="Describe.", pictures=frames(0, 2, 4, 6), video=True)

    def seconds(asked: list[Shown]) -> list[float]:
        return [float(s) for s in model.inputs(asked)["second_per_grid_ts"]]

    assert model.answer([video, slow], 10**6, seconds) == pytest.approx([2.0, 4.0], rel=1e-3)


def test_frames_without_times_and_single_frames_are_shown_as_images(tiny):
    model = VisionLanguageModel(tiny)
    timeless = Request(text="Describe.", pictures=(image(1), image(2)), video=True)
    video = Request(text="Describe.", pictures=frames(0, 1), video=True)
    single = Request(text="Describe.", pictures=frames(0), video=True)
    shown = prompts(model, timeless, video, single)
    assert ["<|video_pad|>" in text for text in shown] == [False, True, False]


# Pictures


def test_pictures_are_shrunk_to_a_number_of_pixels_and_never_enlarged():
    for size, limit in (((200, 100), 5000), ((640, 480), 10000), ((1000, 2), 100)):
        found = small(jpeg(0, *size), limit)
        assert found.width * found.height <= limit
        assert found.width * found.height > 0.8 * limit or 1 in found.size
    assert small(jpeg(0, 64, 48), 10**6).size == (64, 48)
    with pytest.raises(ValueError, match="cannot be decoded"):
        small(b"x", 100)


def test_max_pixels_bounds_the_tokens(tiny):
    big = Request(text="Describe.", pictures=(image(size=(220, 220)),))

    def count(limit: int) -> int:
        chat = VisionLanguageModel(tiny)
        return chat.answer([big], limit, lambda a: [chat.inputs(a)["input_ids"].shape[1]])[0]

    assert count(10**6) - count(112 * 112) == 8 * 8 - 4 * 4


# What it needs


def test_check_says_what_is_missing(tmp_path, tiny):
    def said(at: object, config: dict | None = None, **fields: Any) -> str:
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"\w") as caught:
            TransformersChat(weights=Weights(at=str(at)), **fields).check()
        message = str(caught.value)
        assert "\n" not in message
        return message

    assert "hf download nobody/nothing" in said("nobody/nothing")
    assert "no config.json" in said(tmp_path)
    assert "a bert model" in said(tmp_path, {"model_type": "bert"})
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    assert f"remote_code_of={str(tmp_path)!r}" in said(tmp_path, own)
    assert "but the weights are" in said(tmp_path, own, remote_code_of="zai-org/other")
    cog = own | {"architectures": ["CogVLMVideoForCausalLM"]}
    assert "endpoint" in said(tmp_path, cog, remote_code_of=str(tmp_path))
    assert "max_pixels" in said(tiny.at, max_pixels=0)


def test_code_of_a_checkpoint_runs_only_where_it_is_named(tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder, ran = tmp_path / "own", tmp_path / "ran"
    folder.mkdir()
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps(own))
    (folder / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n"
        "from transformers import PreTrainedConfig\n"
        "class Config(PreTrainedConfig):\n    model_type = 'own'\n"
    )
    with pytest.raises(ValueError, match="comes with code of its own"):
        TransformersChat(weights=Weights(at=str(folder))).open()
    assert not ran.exists()
    allowed = TransformersChat(weights=Weights(at=str(folder)), remote_code_of=str(folder))
    allowed.check()
    assert not ran.exists()
    with pytest.raises((OSError, ValueError)):  # it has no processor
        allowed.open()
    assert ran.exists()


def test_describe_tells_what_changes_answers(tiny):
    chat = TransformersChat(weights=tiny)
    described = chat.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["parameters"]["weights"] == tiny.describe()
    assert set(described["libraries"]) == {"torch", "torchvision", "transformers"}
    others = [
        TransformersChat(weights=tiny, max_new_tokens=7),
        TransformersChat(weights=tiny, max_pixels=7),
        TransformersChat(weights=tiny, repetition_penalty=1.1),
    ]
    assert all(o.describe() != described for o in others)


def test_importing_loads_neither_torch_nor_transformers():
    code = (
        "import sys, engine.chat, engine.watermark, engine.tiny_vlm;"
        "print(sorted({'torch', 'transformers', 'PIL'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr
