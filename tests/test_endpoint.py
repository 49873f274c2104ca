"""The captioner behind an endpoint: against a real server of a real model, and a faulty one."""

import base64
import dataclasses
import json
import os
import pickle
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from conftest import free_ports
from endpoints import Reply, Server, jpeg, question, said

from engine.chat import Answer, Picture, Request
from engine.endpoint import EndpointChat, retry_after_s
from engine.operator import Failed

KEY = "sk-secret-0123456789"
PATIENT: dict[str, Any] = {"attempts": 3, "backoff_s": 0.01, "timeout_s": 10.0}


def chat(server: Server | str, **options: Any) -> EndpointChat:
    url = server if isinstance(server, str) else server.url
    return EndpointChat(url=url, model="tiny", **(PATIENT | options))


def ask(words: str, *pictures: Picture, **options: Any) -> Request:
    return Request(text=words, pictures=pictures or (Picture(jpeg=jpeg()),), **options)


def echo(body: dict[str, Any], before: int) -> Reply:
    return said(question(body))


def test_answers_come_in_order_and_tell_whether_they_were_cut_off() -> None:
    def reply(body: dict[str, Any], before: int) -> Reply:
        late = 0.2 if question(body) == "first" else 0.0
        finish = "length" if question(body) == "second" else "stop"
        return dataclasses.replace(said(question(body), finish), after_s=late)

    with Server(reply) as server:
        given = chat(server).open()([ask("first"), ask("second"), ask("third")])
    assert given == [
        Answer(text="first", finished=True),
        Answer(text="second", finished=False),
        Answer(text="third", finished=True),
    ]


def test_a_request_holds_pictures_times_and_words() -> None:
    first, second = jpeg(1), jpeg(2)
    pictures = (Picture(jpeg=first, time_s=0.04), Picture(jpeg=second, time_s=2.5))
    with Server(echo) as server:
        one = chat(server, max_new_tokens=77).open()
        one([ask("What <|im_end|> happens?", *pictures, video=True, system="Be brief.")])
        one([ask("What is it?")])
    video, image = server.asked
    assert video["model"] == "tiny" and video["temperature"] == 0 and video["max_tokens"] == 77
    assert video["messages"][0] == {"role": "system", "content": "Be brief."}
    parts = video["messages"][1]["content"]
    texts = [p["text"] for p in parts if p["type"] == "text"]
    assert texts[1:] == ["<0.0 seconds>", "<2.5 seconds>", "What < |im_end|> happens?"]
    shown = [p["image_url"]["url"] for p in parts if p["type"] == "image_url"]
    prefix = "data:image/jpeg;base64,"
    assert [base64.b64decode(s.removeprefix(prefix)) for s in shown] == [first, second]
    assert [p["type"] for p in image["messages"][0]["content"]] == ["image_url", "text"]


FAULTS = {
    "fine": (said("a cat"),),
    "limited, then fine": (Reply(429, headers={"Retry-After": "1"}), said("a cat")),
    "broken, then fine": (Reply(500), Reply(503), said("a cat")),
    "cut, then fine": (dataclasses.replace(said("a cat"), cut=True), said("a cat")),
    "no JSON, then fine": (Reply(body=b'{"choices": [{"mess'), said("a cat")),
    "limited": (Reply(429),),
    "broken": (Reply(500, b'{"error": {"message": "out of memory"}}'),),
    "cut": (dataclasses.replace(said("a cat"), cut=True),),
    "no JSON": (Reply(body=b"<html>busy</html>"),),
    "no choices": (Reply(body=b'{"choices": []}'),),
    "no text": (Reply(body=b'{"choices": [{"message": {"content": 3}}]}'),),
    "slow": (dataclasses.replace(said("a cat"), after_s=30.0),),
    "no key": (Reply(401, b'{"detail": "who are you?"}'),),
    "no such model": (Reply(404, b'{"message": "no model tiny"}'),),
    "too long": (Reply(400, b'{"error": "more than 4096 tokens"}'),),
    "unreadable": (Reply(422),),
}
FAILURES = {
    "limited": ("HTTP429", True, 3),
    "broken": ("HTTP500", True, 3),
    "cut": ("RemoteProtocolError", True, 3),
    "no JSON": ("MalformedAnswer", True, 3),
    "no choices": ("MalformedAnswer", True, 3),
    "no text": ("MalformedAnswer", True, 3),
    "slow": ("Timeout", True, 3),
    "no key": ("HTTP401", True, 1),
    "no such model": ("HTTP404", True, 1),
    "too long": ("HTTP400", False, 1),
    "unreadable": ("HTTP422", False, 1),
}


def faulty(body: dict[str, Any], before: int) -> Reply:
    replies = FAULTS[question(body)]
    return replies[min(before, len(replies) - 1)]


def test_rows_fail_one_by_one_and_are_tried_again_where_that_may_help() -> None:
    with Server(faulty) as server:
        asking = chat(server, timeout_s=1.0, concurrency=len(FAULTS)).open()
        given = dict(zip(FAULTS, asking([ask(name) for name in FAULTS]), strict=True))
        later = asking([ask("fine")])
    good = {name for name, answer in given.items() if isinstance(answer, Answer)}
    assert good == set(FAULTS) - set(FAILURES)
    assert {given[name].text for name in good} == {"a cat"}
    found = {
        name: (failure.error_type, failure.transient, len(server.times[name]))
        for name, failure in given.items()
        if isinstance(failure, Failed)
    }
    assert found == FAILURES
    assert "out of memory (3 attempts)" in given["broken"].message
    assert given["too long"].message.endswith("HTTP 400: more than 4096 tokens")
    assert later == [Answer(text="a cat", finished=True)]

    first, second = server.times["limited, then fine"]
    assert 1.0 <= second - first < 3.0  # Retry-After, where the backoff would be 0.01 s
    first, second, third = server.times["broken, then fine"]
    assert third - first < 1.0


def test_no_wait_is_longer_than_its_cap() -> None:
    def reply(body: dict[str, Any], before: int) -> Reply:
        return Reply(429, headers={"Retry-After": "3600"}) if before == 0 else said("done")

    with Server(reply) as server:
        given = chat(server, longest_wait_s=0.3).open()([ask("x")])
    assert given == [Answer(text="done", finished=True)]
    first, second = server.times["x"]
    assert 0.3 <= second - first < 2.0


@pytest.mark.parametrize(
    ("header", "wait_s"),
    [
        (None, None),
        ("7", 7.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 40.0),
        ("Thu, 01 Jan 1970 00:00:10 GMT", 0.0),
        ("soon", None),
        ("inf", None),
        ("nan", None),
        ("", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(header: str | None, wait_s: float | None) -> None:
    assert retry_after_s(header, now_s=60.0) == wait_s


def test_requests_under_way_never_exceed_the_bound_and_reach_it() -> None:
    def reply(body: dict[str, Any], before: int) -> Reply:
        return dataclasses.replace(said("x"), after_s=0.05)

    with Server(reply) as server:
        chat(server, concurrency=3).open()([ask(str(i)) for i in range(12)])
    assert server.most_at_once == 3
    assert len(server.asked) == 12


def test_a_picture_that_is_none_costs_its_row_alone() -> None:
    with Server(echo) as server:
        given = chat(server).open()([ask("a", Picture(jpeg=b"\xff\xd8nothing")), ask("b")])
    assert isinstance(given[0], Failed) and isinstance(given[1], Answer)
    assert (given[0].error_type, given[0].transient) == ("DecodeError", False)
    assert [question(body) for body in server.asked] == ["b"]


def test_content_in_parts_or_none_is_text() -> None:
    def reply(body: dict[str, Any], before: int) -> Reply:
        if question(body) == "none":
            return said(None)
        content = [{"type": "text", "text": "a "}, {"type": "text", "text": "dog"}]
        return Reply(body=json.dumps({"choices": [{"message": {"content": content}}]}).encode())

    with Server(reply) as server:
        given = chat(server).open()([ask("none"), ask("parts")])
    assert given == [Answer(text="", finished=True), Answer(text="a dog", finished=True)]


def test_half_a_character_does_not_spoil_what_can_be_stored() -> None:
    half = Reply(body=b'{"choices": [{"message": {"content": "a \\ud83d cat"}}]}')
    with Server(lambda body, before: half) as server:
        (given,) = chat(server).open()([ask("x")])
    assert isinstance(given, Answer) and given.text == "a ? cat"
    assert given.text.encode()


def test_neither_the_key_nor_a_picture_is_in_an_error_or_in_what_is_stored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("TINY_KEY", KEY)

    def reply(body: dict[str, Any], before: int) -> Reply:
        picture = body["messages"][0]["content"][0]["image_url"]["url"]
        told = f"Bearer {KEY} sent {picture}"
        # as pydantic puts it: what was refused, in full
        details = [{"type": "missing", "msg": told, "input": body}]
        return Reply(int(question(body)), json.dumps({"detail": details}).encode())

    with Server(reply) as server:
        one = chat(server, key_variable="TINY_KEY")
        given = one.open()([ask(str(status)) for status in (400, 401, 403, 404, 422, 429, 500)])
    assert server.keys == [f"Bearer {KEY}"] * len(server.keys)
    words = base64.b64encode(jpeg()).decode()[100:140]
    for failure in given:
        assert isinstance(failure, Failed) and f"HTTP {failure.error_type[4:]}" in failure.message
        assert len(failure.message) < 350
    kept = [*(f.message for f in given), repr(one), repr(one.describe()), caplog.text]
    for text in kept:
        assert KEY not in text and words not in text
    assert KEY.encode() not in pickle.dumps(one)


def test_a_missing_key_stops_the_run_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINY_KEY", raising=False)
    with pytest.raises(ValueError, match="environment variable TINY_KEY"):
        chat("http://127.0.0.1:9/v1", key_variable="TINY_KEY").check()
    monkeypatch.setenv("TINY_KEY", "sk-žluťoučký")
    with pytest.raises(ValueError, match="TINY_KEY has characters") as raised:
        chat("http://127.0.0.1:9/v1", key_variable="TINY_KEY").open()
    assert "žlu" not in str(raised.value)


def test_an_endpoint_that_does_not_answer_stops_the_run_before_it_begins() -> None:
    (port,) = free_ports(1)
    with pytest.raises(ValueError, match=f"no endpoint answers at http://127.0.0.1:{port}/v1"):
        chat(f"http://127.0.0.1:{port}/v1").check()
    for status, words in ((401, "refuses"), (403, "refuses"), (503, "not ready")):
        with Server(echo, Reply(status)) as server, pytest.raises(ValueError, match=words):
            chat(server).check()
    for answered in (Reply(404), Reply(500), Reply(body=b"hello"), Reply(body=b'{"data": [1]}')):
        with Server(echo, answered) as server:
            chat(server).check()


def test_a_model_that_is_not_listed_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with Server(echo) as server:
        chat(server).check()
        assert not caplog.records
        EndpointChat(url=server.url, model="other").check()
    assert "does not list the model other, but ['tiny']" in caplog.text


@pytest.mark.parametrize(
    "url",
    [
        "host:8000/v1",
        "http://",
        "ftp://host/v1",
        "http://user:pass@host/v1",
        "http://host/v1?key=1",
        "http://ho st:x/v1",
    ],
)
def test_a_url_that_is_none_or_holds_a_secret_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="endpoint's url") as raised:
        EndpointChat(url=url, model="tiny")
    assert "pass@" not in str(raised.value)


def test_a_bound_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="concurrency must be at least 1"):
        chat("http://host/v1", concurrency=0)


def test_what_is_asked_is_known_by_model_and_not_by_place() -> None:
    one = EndpointChat(url="http://a:8000/v1", model="tiny")
    elsewhere = EndpointChat(
        url="http://b:9000/v1",
        model="tiny",
        concurrency=2,
        timeout_s=3.0,
        attempts=1,
        backoff_s=9.0,
        longest_wait_s=9.0,
        key_variable="K",
    )
    assert one.describe() == elsewhere.describe()
    for change in ({"model": "b"}, {"revision": "2"}, {"temperature": 0.7}, {"max_new_tokens": 9}):
        assert dataclasses.replace(one, **change).describe() != one.describe()
    assert json.dumps(one.describe())


@pytest.mark.slow
def test_a_real_model_behind_transformers_serve(tmp_path: Path) -> None:
    from engine.tiny_vlm import build_qwen2_vl

    folder = build_qwen2_vl(tmp_path / "vlm")
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)}
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        _wait_for(f"{url}/health", server, tmp_path / "log")
        one = EndpointChat(url=f"{url}/v1", model=str(folder), max_new_tokens=60, concurrency=2)
        one.check()
        pictures = [(Picture(jpeg=jpeg(i)), Picture(jpeg=jpeg(i + 9))) for i in range(4)]
        requests = [ask("Describe the video.", *some, video=True) for some in pictures]
        given = one.open()(requests)
        assert all(isinstance(a, Answer) and a.finished for a in given), (
            tmp_path / "log"
        ).read_text()
        texts = [a.text for a in given]
        assert all(text.endswith(".") and len(text.split()) > 4 for text in texts)
        assert one.open()(requests) == given
        (short,) = dataclasses.replace(one, max_new_tokens=3).open()(requests[:1])
        assert short.finished is False and texts[0].startswith(short.text)
        (unknown,) = dataclasses.replace(one, model="another").open()(requests[:1])
        assert isinstance(unknown, Failed) and unknown.error_type == "HTTP400"
    finally:
        server.kill()
        server.wait()


def _wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
