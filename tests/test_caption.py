"""Captioners: what they show and ask, what they store, and how rows fail by themselves."""

import base64
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from clips import encode
from endpoints import Reply, Server, jpeg, question, said

from engine.caption import (
    Caption,
    Instruction,
    OriginalCaption,
    Rephrase,
    even_times,
    pictures_of,
)
from engine.endpoint import EndpointChat
from engine.operator import FAILURE
from engine.schema import CLIPS, PAIRS

INSTRUCTIONS = Path(__file__).parents[1] / "engine" / "instructions"
PICTURES = pa.list_(pa.struct([("time_s", pa.float64()), ("jpeg", pa.binary())]))
PLAIN = Instruction(name="plain", text="Enrich: {y_ori}")
SCENES = Instruction(name="scenes", text="Two scenes of {y_ori}, with a |", scenes=2)


def chat(server: Server | None = None) -> EndpointChat:
    url = server.url if server else "http://127.0.0.1:9/v1"
    return EndpointChat(url=url, model="tiny", attempts=1, timeout_s=20.0)


def rows(*rows: dict[str, Any]) -> pa.Table:
    """A batch; a row without pictures has three, of a clip from 10 s on."""
    times_s = (10.0, 11.0, 12.0)
    shown = [{"time_s": t, "jpeg": jpeg(i)} for i, t in enumerate(times_s)]
    filled = [{"keyframes": shown, "start_s": 10.0} | row for row in rows]
    kinds = {"keyframes": PICTURES, "start_s": pa.float64(), "end_s": pa.float64()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in filled[0]])
    return pa.Table.from_pylist(filled, schema)


def shown(body: dict[str, Any]) -> list[bytes]:
    parts = body["messages"][-1]["content"]
    urls = [p["image_url"]["url"] for p in parts if p["type"] == "image_url"]
    return [base64.b64decode(url.split(",")[1]) for url in urls]


def texts(body: dict[str, Any]) -> list[str]:
    return [p["text"] for p in body["messages"][-1]["content"] if p["type"] == "text"]


def test_a_video_is_shown_with_times_from_its_start_and_an_image_without() -> None:
    image = {"keyframes": [{"time_s": 0.0, "jpeg": jpeg(7)}], "start_s": None}
    with Server(lambda body, before: said("A cat sits.")) as server:
        found = Caption(chat=chat(server)).load()(rows({}, image))
    assert found["caption"].to_pylist() == ["A cat sits."] * 2
    video, still = sorted(server.asked, key=lambda body: -len(shown(body)))
    assert shown(video) == [jpeg(0), jpeg(1), jpeg(2)] and shown(still) == [jpeg(7)]
    assert texts(video)[1:4] == ["<0.0 seconds>", "<1.0 seconds>", "<2.0 seconds>"]
    assert question(video).startswith("Describe this video in detail")
    assert texts(still) == [question(still)]
    assert question(still).startswith("Describe this image in detail")


def test_the_raw_text_is_kept_beside_the_clean_one() -> None:
    raw = 'Sure! Here is a description:\n\n"A **cat** sits. It the'

    with Server(lambda body, before: said(raw, "length")) as server:
        found = Caption(chat=chat(server)).load()(rows({}))
    assert found["caption"].to_pylist() == ["A cat sits."]
    assert found["caption_raw"].to_pylist() == [raw]


def test_types_are_those_of_the_tables() -> None:
    one = chat()
    for operator, table in (
        (Caption(chat=one), CLIPS),
        (OriginalCaption(chat=one), PAIRS),
        (Rephrase(chat=one, instruction=PLAIN), PAIRS),
    ):
        assert all(field.type == table.field(field.name).type for field in operator.writes)
        assert pickle.loads(pickle.dumps(operator)) == operator
        assert json.dumps(operator.describe())


def test_rows_fail_one_by_one_and_an_empty_caption_is_none() -> None:
    def reply(body: dict[str, Any], before: int) -> Reply:
        by_picture = {jpeg(1): said("A dog."), jpeg(2): Reply(500), jpeg(3): Reply(400)}
        return by_picture.get(shown(body)[0], said("Sure!"))

    given = [{"keyframes": [{"time_s": 10.0, "jpeg": jpeg(i)}]} for i in (1, 2, 3, 4)]
    given += [{"keyframes": []}, {"keyframes": [{"time_s": 10.0, "jpeg": b"no picture"}]}]
    with Server(reply) as server:
        found = Caption(chat=chat(server)).load()(rows(*given))
    assert found["caption"].to_pylist() == ["A dog.", None, None, "", None, None]
    assert found["caption_raw"].to_pylist() == ["A dog.", None, None, "Sure!", None, None]
    assert found["error_type"].to_pylist() == (
        [None, "HTTP500", "HTTP400", None, "NoKeyframes", "DecodeError"]
    )
    assert found["transient"].to_pylist() == [None, True, False, None, False, False]
    assert found.schema.names == [*Caption.writes.names, *FAILURE.names]


def grey_video(path: Path) -> str:
    """Two seconds at 10 frames/s; each frame's grey level is its number times 12."""
    frames = [np.full((64, 96, 3), 12 * i, np.uint8) for i in range(20)]
    encode(path, frames, fps=10)
    return str(path)


def levels(body: dict[str, Any]) -> list[int]:
    decoded = [cv2.imdecode(np.frombuffer(j, np.uint8), cv2.IMREAD_GRAYSCALE) for j in shown(body)]
    return [round(float(image.mean()) / 12) for image in decoded]


def test_survivors_are_decoded_anew_where_asked_for(tmp_path: Path) -> None:
    uri = grey_video(tmp_path / "grey.mp4")
    span = {"keyframes": [], "source_uri": uri, "start_s": 1.0, "end_s": 2.0}
    image = span | {"keyframes": [{"time_s": 0.0, "jpeg": jpeg()}], "start_s": None, "end_s": None}
    gone = span | {"source_uri": str(tmp_path / "gone.mp4")}
    (tmp_path / "text.mp4").write_text("not a video")
    text = span | {"source_uri": str(tmp_path / "text.mp4")}
    with Server(lambda body, before: said("A cat.")) as server:
        operator = Caption(
            chat=chat(server), frames="decode", decode_fps=5.0, decode_short_side_px=32
        )
        found = operator.load()(rows(span, image, gone, text))
    assert found["caption"].to_pylist() == ["A cat.", "A cat.", None, None]
    assert found["transient"].to_pylist() == [None, None, True, False]
    assert found["error_type"][2].as_py() == "FileNotFoundError"
    video, still = sorted(server.asked, key=lambda body: -len(shown(body)))
    assert levels(video) == [11, 13, 15, 17, 19]  # shown at 1.1 s, 1.3 s, ...
    assert texts(video)[1] == "<0.1 seconds>" and shown(still) == [jpeg()]
    assert cv2.imdecode(np.frombuffer(shown(video)[0], np.uint8), 1).shape == (32, 48, 3)


def test_survivors_are_decoded_from_an_object_store(tmp_path: Path, bucket: Any) -> None:
    uri = grey_video(tmp_path / "grey.mp4")
    bucket.put("grey.mp4", Path(uri).read_bytes())
    given = {"source_uri": f"{bucket.uri}/grey.mp4", "start_s": 0.0, "end_s": 2.0}
    with Server(lambda body, before: said("A cat.")) as server:
        operator = Caption(chat=chat(server), frames="decode", max_frames=2)
        found = operator.load()(rows(given, given | {"source_uri": f"{bucket.uri}/gone.mp4"}))
    assert found["caption"].to_pylist() == ["A cat.", None]
    assert found["transient"].to_pylist() == [None, True]
    assert levels(server.asked[0]) == [5, 15]


@pytest.mark.parametrize(
    ("span", "fps", "most", "times_s"),
    [
        ((0.0, 2.0), 2.0, 32, [0.25, 0.75, 1.25, 1.75]),
        ((5.0, 65.0), 2.0, 3, [15.0, 35.0, 55.0]),
        ((1.0, 1.04), 2.0, 32, [1.02]),
    ],
)
def test_frames_are_spread_evenly(
    span: tuple[float, float], fps: float, most: int, times_s: list[float]
) -> None:
    assert even_times(*span, fps, most) == pytest.approx(times_s)


def test_a_time_before_the_start_is_the_start() -> None:
    (picture,) = pictures_of([{"time_s": 9.999, "jpeg": b""}], 10.0)
    assert picture.time_s == 0.0


def test_what_is_asked_changes_the_fingerprint_and_where_it_runs_does_not() -> None:
    one = Caption(chat=chat())
    prints = {one.fingerprint}
    for change in ({"prompt": "What?"}, {"frames": "decode"}, {"max_frames": 3}):
        prints.add(dataclasses.replace(one, **change).fingerprint)
    prints.add(dataclasses.replace(one, chat=dataclasses.replace(chat(), model="b")).fingerprint)
    assert len(prints) == 5
    moved = dataclasses.replace(chat(), url="http://elsewhere/v1", concurrency=1)
    same = dataclasses.replace(one, chat=moved, batch_size=99, num_gpus=0.0, copies=1)
    assert same.fingerprint == one.fingerprint
    assert one.reads == ("keyframes", "start_s")
    with pytest.raises(ValueError, match="max_frames at least 1"):
        Caption(chat=chat(), max_frames=0)


def test_an_endpoint_that_is_not_there_fails_the_check() -> None:
    with pytest.raises(ValueError, match="no endpoint answers"):
        Caption(chat=chat()).check()


def test_an_original_is_one_sentence() -> None:
    def reply(body: dict[str, Any], before: int) -> Reply:
        answers = ["Caption: A dog runs. It barks.", "Sure!", "I'm sorry, I cannot see it."]
        return said(answers[[jpeg(i) for i in range(3)].index(shown(body)[0])])

    given = [{"keyframes": [{"time_s": 10.0, "jpeg": jpeg(i)}]} for i in range(3)]
    with Server(reply) as server:
        found = OriginalCaption(chat=chat(server)).load()(rows(*given))
    assert found["original"].to_pylist() == ["A dog runs.", None, None]
    assert found["original_source"].to_pylist() == ["generated", None, None]
    assert found["error_type"].to_pylist() == [None, "NoCaption", "NoCaption"]
    assert question(server.asked[0]).startswith("Describe this video in one short English sentence")


def test_a_caption_is_rephrased_with_its_pictures_before_the_model() -> None:
    given = [{"original": "a {y_ori} cat"}, {"original": " "}]
    with Server(lambda body, before: said('Output: "A small cat."')) as server:
        found = Rephrase(chat=chat(server), instruction=PLAIN).load()(rows(*given))
    assert found["rephrased"].to_pylist() == ["A small cat.", None]
    assert found["rephrased_raw"].to_pylist() == ['Output: "A small cat."', None]
    assert found["error_type"].to_pylist() == [None, "NoCaption"]
    assert question(server.asked[0]) == "Enrich: a {y_ori} cat"
    assert shown(server.asked[0]) == [jpeg(0), jpeg(1), jpeg(2)]


def test_another_number_of_scenes_is_a_failure_of_that_name() -> None:
    def reply(body: dict[str, Any], before: int) -> Reply:
        return said(question(body).removeprefix("Two scenes of ").removesuffix(", with a |"))

    answers = [
        'Sure! Here are two scenes: "A volcano." | "Lava flows."',
        "A volcano. Lava flows.",
        "A | B | C",
        "I'm sorry, I cannot see the video.",
        "Sure!",
    ]
    with Server(reply) as server:
        operator = Rephrase(chat=chat(server), instruction=SCENES)
        found = operator.load()(rows(*({"original": a} for a in answers)))
    assert found["rephrased"].to_pylist() == (
        ["A volcano. | Lava flows.", None, None, answers[3], ""]
    )
    assert found["error_type"].to_pylist() == [None, "WrongScenes", "WrongScenes", None, None]
    assert found["error"][1].as_py() == "2 scenes wanted, 1 found: A volcano. Lava flows."
    assert found["error"][2].as_py().startswith("2 scenes wanted, 3 found")
    assert found["transient"].to_pylist() == [None, False, False, None, None]


def test_the_language_is_read_where_the_instruction_names_it() -> None:
    translate = Instruction(name="t", text="From {language}: {y_ori}")
    operator = Rephrase(chat=chat(), instruction=translate)
    assert operator.reads == ("keyframes", "start_s", "original", "language")
    assert Rephrase(chat=chat(), instruction=PLAIN).reads == ("keyframes", "start_s", "original")
    given = [{"original": "un chat", "language": x} for x in ("French", None)]
    with Server(lambda body, before: said("A cat.")) as server:
        operator = dataclasses.replace(operator, chat=chat(server))
        found = operator.load()(rows(*given))
    assert [question(body) for body in server.asked] == ["From French: un chat"]
    assert found["error_type"].to_pylist() == [None, "NoLanguage"]
    other = dataclasses.replace(translate, text="Out of {language}: {y_ori}")
    assert dataclasses.replace(operator, instruction=other).fingerprint != operator.fingerprint


def test_slots_are_filled_once_and_other_braces_stay() -> None:
    instruction = Instruction(name="x", text='{"{y_ori}"} in {language} and {y_ori}')
    assert instruction.filled(" {language} %s \\1 ", "French") == (
        '{"{language} %s \\1"} in French and {language} %s \\1'
    )


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("Rewrite it", {}, "no slot {y_ori}"),
        ("Rewrite {y_ori} in {tongue}", {}, r"unknown slots \['tongue'\]"),
        ("{y_ori}", {"scenes": 1}, "wants 1 scenes"),
        ("{y_ori}", {"scenes": 2, "delimiter": ""}, "wants 2 scenes with the delimiter ''"),
    ],
)
def test_an_instruction_that_cannot_be_filled_is_refused(
    text: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Instruction(name="x", text=text, **options)


@pytest.mark.parametrize("name", ["dense", "multi_scene", "multilingual"])
def test_the_papers_instructions(name: str) -> None:
    text = (INSTRUCTIONS / f"{name}.txt").read_text(encoding="utf-8")
    scenes = 2 if name == "multi_scene" else None
    instruction = Instruction(name=name, text=text, scenes=scenes)
    assert instruction.needs_language is (name == "multilingual")
    filled = instruction.filled("un chat {noir}", "French")
    assert filled.count("un chat {noir}") == 1 and "y_ori" not in filled
    assert filled.rstrip().endswith("Output:")
    assert text.isascii()  # a scan's quotes and dashes are not
    if scenes:  # each example shows two scenes, and so does the format that is asked for
        parted = [line for line in text.splitlines() if " | " in line]
        assert len(parted) == 3 and all(line.count("|") == 1 for line in parted)
    else:
        assert "|" not in text


@pytest.mark.slow
def test_a_real_model_captions_and_rephrases(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from engine.chat import TransformersChat
    from engine.tiny_vlm import build_qwen2_vl
    from engine.weights import Weights

    weights = Weights(at=str(build_qwen2_vl(tmp_path / "vlm")))
    model = TransformersChat(weights=weights, max_new_tokens=64)
    pictures = [
        [{"time_s": t, "jpeg": jpeg(i + 9 * t, 96, 64)} for t in (10, 11)] for i in range(3)
    ]
    images = [{"keyframes": p[:1], "start_s": None} for p in pictures]
    batch = rows(*({"keyframes": p, "original": "a cat"} for p in pictures))
    captions = Caption(chat=model).load()
    for table in (batch, rows(*images)):
        found = captions(table)
        assert found["error_type"].null_count == 3
        assert all(c.endswith(".") and len(c.split()) > 4 for c in found["caption"].to_pylist())
    originals = OriginalCaption(chat=model).load()(batch)
    assert originals["original_source"].to_pylist() == ["generated"] * 3
    parted = Rephrase(chat=model, instruction=SCENES).load()(batch)
    good = [text for text in parted["rephrased"].to_pylist() if text is not None]
    assert good and all(text.count(" | ") == 1 for text in good)
    cut = dataclasses.replace(model, max_new_tokens=4)
    short = Rephrase(chat=cut, instruction=SCENES).load()(batch)
    assert short["error_type"].to_pylist() == ["WrongScenes"] * 3
    assert "1 found, cut off" in short["error"][0].as_py()
