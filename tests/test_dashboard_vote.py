"""The vote page in a real browser: what voters see, what is stored, and what never reaches them."""

from __future__ import annotations

import dataclasses
import io
import itertools
import re
import resource
import shutil
import urllib.request
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pyarrow as pa
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from streamlit.testing.v1 import AppTest
from studies import make_evaluation

from cluster.dashboard import page_vote
from cluster.dashboard.places import Places
from engine.integrity import VideoError
from engine.tables import DatasetError
from evals import blind
from evals import votes as ballots
from evals.study import Name, Study

pytestmark = pytest.mark.slow

MODELS = ("zebrafinch", "quokka", "narwhal")
_LISTEN = """
window.heard = [];
const Native = WebSocket;
window.WebSocket = class extends Native {
  constructor(...given) {
    super(...given);
    this.addEventListener('message', async (event) => {
      const said = event.data instanceof Blob ? await event.data.arrayBuffer() : event.data;
      heard.push(typeof said === 'string' ? said : new TextDecoder('latin1').decode(said));
    });
  }
};
"""


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_evaluation(tmp_path_factory.mktemp("evaluation") / "set", MODELS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of votes: the tests' own voters keep them apart."""
    return tmp_path_factory.mktemp("votes")


@pytest.fixture
def rise(serve: Callable[..., str], evaluation: str, folder: Path) -> str:
    return serve("vote", evaluation, "--votes", folder)


def study(folder: Path, name: Name = "rise") -> Study:
    return ballots.studies(str(folder))[name]


def rows(folder: Path, voter: str, name: Name = "rise") -> list[dict[str, Any]]:
    one = study(folder, name)
    found = ballots.read_votes(str(folder), one).to_pylist()
    return [row for row in found if row["voter_id"] == one.voter_id(voter)]


def answer(browser: Any, *letters: str) -> None:
    """Chooses letters for every question."""
    for place in range(3):
        for letter in letters:
            group = browser.all("[data-testid='stButtonGroup']")[place]
            (button,) = [b for b in group.find_elements("tag name", "button") if b.text == letter]
            button.click()
            browser.settle()


def submit(browser: Any) -> None:
    browser.until(lambda: submit_button(browser).is_enabled())
    submit_button(browser).click()
    browser.settle()


def submit_button(browser: Any) -> Any:
    return next(b for b in browser.all("button") if b.text.startswith("Submit"))


def videos(browser: Any) -> list[dict[str, Any]]:
    return browser.driver.execute_script(
        "return [...document.querySelectorAll('video')].map(v => ({src: v.currentSrc,"
        " time: v.currentTime, ended: v.ended, paused: v.paused, muted: v.muted,"
        " height: v.clientHeight, alt: v.getAttribute('aria-label')}))"
    )


@contextmanager
def listening(browser: Any) -> Iterator[Callable[[], str]]:
    """Gives all that the server has said to the page since it was opened."""
    add, remove = (f"Page.{verb}ScriptToEvaluateOnNewDocument" for verb in ("add", "remove"))
    mark = browser.driver.execute_cdp_cmd(add, {"source": _LISTEN})
    try:
        yield lambda: "\n".join(browser.driver.execute_script("return window.heard"))
    finally:
        browser.driver.execute_cdp_cmd(remove, mark)


def test_a_vote_is_stored_a_reload_keeps_the_place_and_no_name_gets_out(
    rise: str, browser: Any, folder: Path, evaluation: str
) -> None:
    with listening(browser) as said:
        browser.visit(f"{rise}/vote?voter=ann")
        assert "1 of 3" in browser.text and "Voting as ann" in browser.text
        first, second = study(folder).ordered(study(folder).voter_id("ann"))[:2]
        assert first.prompt in browser.text, "as it is written, whatever signs are in it"
        for question in study(folder).design.questions:
            assert question.title in browser.text and question.text in browser.text
        assert not submit_button(browser).is_enabled()
        heard = browser.html + files(browser)
        answer(browser, "C", "A")
        submit(browser)
        browser.until(lambda: "2 of 3" in browser.text)
        heard += said() + browser.html
        browser.visit(f"{rise}/?voter=ANN")
        assert "2 of 3" in browser.text and second.prompt in browser.text
        heard += said() + browser.html
        for page in ("evaluation", "nowhere"):
            browser.visit(f"{rise}/{page}")
            # there is no other page: this one opens, in a second run of the script
            browser.until(lambda: "Which video is better?" in browser.text)
            heard += said() + browser.html
    shown = study(folder).shown(study(folder).voter_id("ann"), first)
    found = rows(folder, "ann")
    assert [set(row["chosen"]) for row in found] == [{shown[0], shown[2]}] * 3
    assert all(row["item_id"] == first.item_id and row["seconds"] > 0 for row in found)
    assert heard.count("Which sample exhibits") >= 3, "it did listen"
    ids = {one for item in study(folder).items for one in item.videos.values()}
    for secret in (*MODELS, *ids, evaluation, str(folder), "x264", "Lavf"):
        assert secret not in heard


def files(browser: Any) -> str:
    """Everything that came with the videos, and the addresses of all that the page asked for."""
    heard = browser.driver.execute_script("return performance.getEntries().map(one => one.name)")
    for video in videos(browser):
        with urllib.request.urlopen(video["src"]) as answered:
            heard += [str(answered.headers), answered.read().decode("latin1")]
    assert len(heard) > 6
    return "\n".join(heard)


def test_videos_play_at_once_and_equally_high(rise: str, browser: Any) -> None:
    browser.visit(f"{rise}/vote?voter=watcher")
    seen: list[list[float]] = [[], [], []]

    def all_began_again() -> bool:  # each lasts a second
        found = videos(browser)
        assert len({video["height"] for video in found}) == 1 and found[0]["height"] > 100
        for times, video in zip(seen, found, strict=True):
            times.append(video["time"])
        return all(any(b < a for a, b in itertools.pairwise(times)) for times in seen)

    browser.until(all_began_again)
    assert all(video["muted"] and not video["paused"] for video in videos(browser))
    assert [video["alt"] for video in videos(browser)] == ["Video A", "Video B", "Video C"]


def test_a_second_tab_cannot_vote_again(rise: str, browser: Any, folder: Path) -> None:
    browser.visit(f"{rise}/vote?voter=twice")
    tab = browser.driver.current_window_handle
    browser.driver.switch_to.new_window("tab")
    try:
        browser.visit(f"{rise}/vote?voter=twice")
        answer(browser, "A")
        submit(browser)
        browser.until(lambda: "2 of 3" in browser.text)
    finally:
        browser.driver.close()
        browser.driver.switch_to.window(tab)
    before = rows(folder, "twice")
    assert "1 of 3" in browser.text and len(before) == 3
    answer(browser, "B")
    submit(browser)
    browser.until(lambda: "that vote stands" in browser.text)
    assert "2 of 3" in browser.text and rows(folder, "twice") == before


def test_a_vote_that_cannot_be_stored_is_not_lost_silently(
    rise: str, browser: Any, folder: Path
) -> None:
    browser.visit(f"{rise}/vote?voter=unlucky")
    answer(browser, "A")
    port = urlsplit(rise).port
    (pid,) = {
        c.pid
        for c in psutil.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == port
    }
    server = psutil.Process(pid)
    was = server.rlimit(resource.RLIMIT_FSIZE)
    server.rlimit(resource.RLIMIT_FSIZE, (0, was[1]))  # as a disk that is full
    try:
        submit(browser)
        browser.until(lambda: "could not be stored" in browser.text)
    finally:
        server.rlimit(resource.RLIMIT_FSIZE, was)
    assert "1 of 3" in browser.text and rows(folder, "unlucky") == []
    submit(browser)  # the answers are still there
    browser.until(lambda: "2 of 3" in browser.text)
    assert len(rows(folder, "unlucky")) == 3


def test_pairs_to_the_end_by_keyboard(
    serve: Callable[..., str], browser: Any, folder: Path, evaluation: str
) -> None:
    pair = ("quokka", "narwhal")
    mimir = ballots.open_study(str(folder), evaluation, "mimir", models=pair)
    voter = mimir.voter_id("keys")
    *before, item = mimir.ordered(voter)
    for one in before:
        chosen = {question.key: ["quokka"] for question in mimir.design.questions}
        assert ballots.cast(str(folder), mimir, item_id=one.item_id, voter_id=voter, chosen=chosen)
    browser.visit(serve("vote", evaluation, "--votes", folder, "--study", "mimir"))
    assert "Your code" in browser.text and not browser.all("video")
    (field,) = browser.all("input[type=text]")
    field.send_keys("Keys", Keys.ENTER)
    browser.until(lambda: "3 of 3" in browser.text and len(browser.all("video")) == 2)
    browser.settle()
    assert item.prompt in browser.text
    keys = ActionChains(browser.driver)
    browser.driver.execute_script("document.querySelector('[role=radio]').focus()")
    for _ in range(3):
        keys.send_keys(Keys.SPACE).send_keys(Keys.TAB).perform()
        browser.settle()
    browser.until(lambda: submit_button(browser).is_enabled())
    keys.reset_actions()
    keys.key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
    browser.until(lambda: "You have voted on all 3" in browser.text)
    assert "voter=Keys" in browser.driver.current_url, "a reload keeps the code"
    (row, *_) = found = [r for r in rows(folder, "keys", "mimir") if r["item_id"] == item.item_id]
    assert len(found) == 3 and row["prompt"] == item.prompt
    assert [r["chosen"] for r in found] == [mimir.shown(voter, item)[:1]] * 3, "A was chosen"


# Without a browser


def page(places: Places, address: str = "") -> AppTest:
    """The page as Streamlit runs it."""

    def script(places: object) -> None:
        from cluster.dashboard import page_vote

        page_vote.show(places)

    made = AppTest.from_function(script, args=(places,), default_timeout=30)
    if address:
        made.query_params["voter"] = address
    return made.run()


def told(made: AppTest) -> str:
    assert not made.exception
    said = " ".join(str(one.value) for one in (*made.error, *made.caption, *made.markdown))
    return re.sub(r"\\(.)", r"\1", said)  # as Markdown shows it


def test_only_codes_of_the_file_may_vote(evaluation: str, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "voters.txt"
    file.write_text("Ann\nbob\n")
    votes = {"evaluations": evaluation, "votes": str(folder), "voters": str(file)}
    places = Places(dataset=evaluation, only_vote=True, **votes)
    assert "Voting as ann" in told(page(places, " ANN "))
    assert "This code is not known here" in told(page(places, "eve"))
    assert "a code has 1 to 64" in told(page(places, "a\tb"))
    assert "Your code" in told(page(places))
    file.write_text("eve\n")
    assert "This code is not known here" in told(page(places, "ann")), "no longer"
    assert "Voting as eve" in told(page(places, "eve"))


def test_each_voter_has_a_clock_of_their_own(evaluation: str, folder: Path) -> None:
    places = Places(dataset=evaluation, evaluations=evaluation, votes=str(folder), only_vote=True)
    made = page(places, "early*bird")
    assert r"Voting as early\*bird" in [one.value for one in made.caption], "a code is no Markdown"
    made.query_params["voter"] = "late"
    made.run()
    assert "Voting as late" in told(made)
    for voter in map(study(folder).voter_id, ("early*bird", "late")):
        item = study(folder).ordered(voter)[0]
        assert f"seen-{voter}-{item.item_id}" in made.session_state


def test_a_video_that_cannot_be_shown_is_left_out(
    evaluation: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise pa.ArrowException("narwhal's file is damaged")

    monkeypatch.setattr(page_vote, "_video", fails)
    places = Places(dataset=evaluation, evaluations=evaluation, votes=str(folder), only_vote=True)
    made = page(places, "patient")
    assert "narwhal" not in told(made)
    assert "all that can be shown (0 of 3)" in made.info[0].value


def test_what_is_no_video_is_a_video_error(
    evaluation: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16000))
    with pytest.raises(VideoError):
        blind.blinded(sound.getvalue())
    monkeypatch.setattr(blind, "take_blobs", lambda *_, **__: [None])
    there = next(iter(blind.stored(evaluation)))
    with pytest.raises(DatasetError, match=f"has no video {there} any more"):
        blind.fetch(evaluation, [there])


def test_what_is_wrong_with_the_data_is_not_told_to_voters(
    evaluation: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "set-of-narwhal"
    shutil.copytree(evaluation, copy)
    places = Places(
        dataset=str(copy), evaluations=str(copy), votes=str(tmp_path / "votes"), only_vote=True
    )
    table, aside = copy / "generations.lance", copy / "aside"
    table.rename(aside)
    said = told(page(places, "ann"))
    assert "Voting is not possible just now" in said and "narwhal" not in said
    assert "has no table 'generations'" in caplog.text, "the server's log has it"
    among_others = dataclasses.replace(places, only_vote=False)
    assert "has no table 'generations'" in told(page(among_others, "ann"))
    aside.rename(table)
    assert "Voting as ann" in told(page(places, "ann")), "it goes on once the data are mended"
