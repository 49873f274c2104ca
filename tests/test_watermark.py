"""The watermark operator and the small Qwen2-VL on which it is tried."""

from __future__ import annotations

import importlib.resources
import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from engine.chat import Answer, Picture, Request, TransformersChat
from engine.schema import CLIPS
from engine.tiny_vlm import SECOND, SENTENCE, build_qwen2_vl, build_tokenizer
from engine.watermark import NO, YES, Watermark, spread
from engine.weights import Weights

torch = pytest.importorskip("torch")

KEYFRAMES = pa.list_(pa.struct([("time_s", pa.float64()), ("jpeg", pa.binary())]))
PHOTOS = (
    "astronaut.png brick.png camera.png chelsea.png coffee.png grass.png gravel.png ihc.png"
    " moon.png motorcycle_left.png rocket.jpg"
).split()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_qwen2_vl(tmp_path_factory.mktemp("tiny") / "qwen2_vl")


@pytest.fixture(scope="module")
def operator(tiny: Path) -> Watermark:
    return Watermark(weights=Weights(at=str(tiny)))


@pytest.fixture(scope="module")
def measure(operator: Watermark) -> Any:
    return operator.load()


def jpeg(image: Image.Image) -> bytes:
    found = io.BytesIO()
    image.save(found, "JPEG", quality=92)
    return found.getvalue()


def picture(seed: int, size: tuple[int, int] = (120, 80)) -> bytes:
    """A smooth random picture."""
    colours = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return jpeg(Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC))


def photos() -> list[bytes]:
    folder = importlib.resources.files("skimage") / "data"
    found = []
    for name in PHOTOS:
        with importlib.resources.as_file(folder / name) as path:
            photo = Image.open(path).convert("RGB")
        for left in (0, photo.width // 4):
            part = photo.crop((left, 0, left + 3 * photo.width // 4, photo.height))
            part.thumbnail((220, 160))
            found.append(jpeg(part))
    return found


def table(*clips: list[bytes] | None) -> pa.Table:
    rows = [
        None if c is None else [{"time_s": float(i), "jpeg": j} for i, j in enumerate(c)]
        for c in clips
    ]
    return pa.table({"keyframes": pa.array(rows, KEYFRAMES)})


def by_transformers(folder: Path, question: str, jpegs: list[bytes]) -> float:
    """The score as transformers alone gives it, with nothing of ours."""
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"} for _ in jpegs] + [{"type": "text", "text": question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    images = [Image.open(io.BytesIO(j)).convert("RGB") for j in jpegs]
    inputs = processor(text=[prompt], images=images, return_tensors="pt")
    out = model.generate(
        **inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
    )
    chance = out.logits[0][0].double().softmax(0)
    sums = [
        sum(float(chance[processor.tokenizer.convert_tokens_to_ids(t)]) for t in tokens)
        for tokens in (
            ("yes", "Yes", "Ġyes", "ĠYes", "YES"),
            ("no", "No", "Ġno", "ĠNo", "NO"),
        )
    ]
    return sums[0] / sum(sums)


def test_score_equals_transformers_on_the_same_checkpoint(tiny, operator, measure):
    clips = [[picture(1), picture(2), picture(3)], [picture(4, (64, 96))]]
    found = measure(table(*clips))
    assert found["error"].to_pylist() == [None, None]
    for score, clip in zip(found["watermark_score"].to_pylist(), clips, strict=True):
        assert score == pytest.approx(by_transformers(tiny, operator.question, clip), abs=1e-5)


def test_every_spelling_counts(tiny, measure):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert all(len(tokenizer.encode(w)) == 1 for w in (*YES, *NO))
    from engine.watermark import _scores

    logits = torch.full((2, 6), -9.0)
    logits[0, :4] = torch.tensor([0.1, 0.2, 0.4, 0.3]).log()
    logits[1, 5] = 0.0
    score, other = _scores(logits, [0, 1], [2, 3], lambda token: f"word {token}")
    assert score == pytest.approx(0.3, abs=1e-6)
    assert (other.error_type, other.message) == ("NoAnswer", "said 'word 5', not yes or no")
    assert not other.transient


def test_a_batch_gives_what_each_clip_gives_alone(measure):
    clips = [
        [picture(5), picture(6), picture(7)],
        [picture(8, (96, 128))],
        [picture(9, (64, 64)), picture(10, (64, 64))],
        [picture(i, (200, 112)) for i in range(11, 18)],
    ]
    together = measure(table(*clips))["watermark_score"].to_pylist()
    alone = [measure(table(c))["watermark_score"][0].as_py() for c in clips]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len({round(s, 4) for s in alone}) == 4


def test_frames_are_spread_evenly(operator, measure):
    assert [spread(n, 3) for n in (1, 2, 3, 4, 6, 10)] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 2, 3],
        [1, 3, 5],
        [1, 5, 8],
    ]
    frames = [picture(i) for i in range(20, 30)]
    ten, three = measure(table(frames, [frames[i] for i in (1, 5, 8)]))[
        "watermark_score"
    ].to_pylist()
    assert ten == pytest.approx(three, abs=1e-5)


def test_what_cannot_be_asked_fails_alone(measure):
    found = measure(table([picture(1)], None, [], [picture(2), b"not a picture"], [picture(3)]))
    assert found.schema.field("watermark_score") == CLIPS.field("watermark_score")
    assert found["error_type"].to_pylist() == [
        None,
        "NoKeyframes",
        "NoKeyframes",
        "DecodeError",
        None,
    ]
    assert found["transient"].to_pylist() == [None, False, False, False, None]
    assert [s is None for s in found["watermark_score"].to_pylist()] == [False] + 3 * [True] + [
        False
    ]
    assert measure(table(None))["error_type"].to_pylist() == ["NoKeyframes"]


def test_an_answer_that_is_neither_is_a_failure(tiny):
    asked = Watermark(weights=Weights(at=str(tiny)), question="Describe the picture.").load()
    (row,) = asked(table([picture(1)])).to_pylist()
    assert row["watermark_score"] is None and row["error_type"] == "NoAnswer"
    assert re.fullmatch(r"said '(A|One|This)', not yes or no", row["error"])


def test_max_pixels_shrinks_what_is_seen(tiny, measure):
    clip = [picture(1, (200, 120))]
    shrunk = Watermark(weights=Weights(at=str(tiny)), max_pixels=60 * 60).load()(table(clip))
    assert shrunk["watermark_score"][0].as_py() != pytest.approx(
        measure(table(clip))["watermark_score"][0].as_py(), abs=1e-4
    )


def test_check_says_what_is_missing(tiny, operator, tmp_path):
    operator.check()
    with pytest.raises(ValueError, match="hf download nobody/nothing"):
        Watermark(weights=Weights(at="nobody/nothing")).check()
    with pytest.raises(ValueError, match=r"no config\.json"):
        Watermark(weights=Weights(at=str(tmp_path))).check()
    with pytest.raises(ValueError, match="num_frames is 0"):
        Watermark(weights=Weights(at=str(tiny)), num_frames=0).check()


def test_fingerprint_follows_weights_and_parameters_not_resources(tiny, operator):
    at = Weights(at=str(tiny))
    same = Watermark(weights=at, batch_size=3, num_gpus=0.5)
    assert same.fingerprint == operator.fingerprint
    others = [
        Watermark(weights=at, question="Yes or no?"),
        Watermark(weights=at, num_frames=4),
        Watermark(weights=at, max_pixels=1000),
    ]
    assert len({o.fingerprint for o in (operator, *others)}) == 4


# The small checkpoint


def test_tiny_answers_both_ways_and_some_captions_repeat(tiny, measure):
    scores = measure(table(*[[p] for p in photos()]))["watermark_score"].to_pylist()
    assert None not in scores
    assert 0.1 < sum(s > 0.5 for s in scores) / len(scores) < 0.8
    assert max(scores) - min(scores) > 0.3
    ask = TransformersChat(weights=Weights(at=str(tiny)), max_new_tokens=60).open()
    answers = ask(
        [Request(text="Describe it in detail.", pictures=(Picture(jpeg=p),)) for p in photos()]
    )
    assert all(isinstance(a, Answer) and a.finished for a in answers)
    texts = [a.text for a in answers]
    rates = [repetition(t) for t in texts]
    assert any(r > 0.056 for r in rates) and any(r == 0 for r in rates)
    assert len(set(texts)) >= len(texts) // 2
    words = {w.strip() for place in SENTENCE for w in place} | {"and"}
    assert {w for t in texts for w in t.removesuffix(".").split()} <= words


def repetition(text: str) -> float:
    words = re.findall(r"\w+", text.lower())
    pairs = list(itertools.pairwise(words))
    return 1 - len(set(pairs)) / len(pairs)


def test_tiny_says_less_or_more_as_asked(tiny):
    ask = TransformersChat(weights=Weights(at=str(tiny)), max_new_tokens=80).open()
    shown = (Picture(jpeg=picture(1)),)
    short, long, scenes, answer = ask(
        [
            Request(text="Describe it. Watch the eyes.", pictures=shown),
            Request(text="Describe it in detail.", pictures=shown),
            Request(text="Describe two scenes, divided by |.", pictures=shown),
            Request(text="A logo, yes or no?", pictures=shown),
        ]
    )
    assert all(a.finished for a in (short, long, scenes, answer))
    assert long.text.startswith(short.text.rstrip(".")) and len(long.text) > len(short.text)
    first, second = scenes.text.split(" |")
    assert first == short.text and second.endswith("!")
    assert " " + second.split()[0] in SECOND[1]
    assert answer.text in ("Yes", "no")


def test_tiny_tokenizer_takes_any_text():
    tokenizer = build_tokenizer()
    for text in ("Ünï 你好 🎬\tمرحبا\r\n", "x" * 500, "\x00\x7f", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tiny_is_built_the_same_every_time(tiny, tmp_path):
    again = build_qwen2_vl(tmp_path / "again")
    sizes = 0
    for path in sorted(tiny.iterdir()):
        data = path.read_bytes()
        sizes += len(data)
        assert data == (again / path.name).read_bytes(), path.name
    assert sizes < 30e6
