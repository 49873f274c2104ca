"""Funnel, Clips, Thresholds: their numbers are the tables' own, and a clip plays in a browser."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import command
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from shown_clips import (
    add_run,
    clip_row,
    commit,
    film,
    made_up,
    source_row,
)

from cluster.dashboard import clips, funnel, thresholds
from cluster.dashboard.bounds import SIGNS, bounds_of, changes, published_bounds
from engine.accounts import balance
from engine.duplicates import Distinct
from engine.operator import Stage
from engine.tables import Writer, create, read
from pipelines.cli import with_bounds
from pipelines.recipes import CLASSIC
from pipelines.report import nearest

STAGES = CLASSIC.stages


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judged dataset: spans of an H.264 film and of an AVI, and clips with random signals."""
    folder = tmp_path_factory.mktemp("shown")
    known, unknown = (
        source_row(film(folder / "film.mp4")),
        source_row(film(folder / "old.avi", "mpeg4")),
    )
    other = source_row(film(folder / "signals.webm", "libvpx-vp9"))
    clips_made = [clip_row(known, 24, 72), clip_row(known, 20, 70), clip_row(unknown, 24, 72)]
    for number, one in enumerate(clips_made):
        one["phashes"] = [2 ** (20 * number) * 12345]
    clips_made[0]["brightness"] = 0.15
    random = made_up(np.random.default_rng(3), other)
    known["num_clips"], other["num_clips"] = 2, len(random)
    failed = {
        "source_id": "f", "uri": "/nowhere/half.mp4", "state": "failed",
        "error_type": "TruncatedError", "error": "truncated: the file has 5 of 9 bytes",
    }  # fmt: skip
    root = str(folder / "set")
    writer = commit(root, [known, unknown, other, failed], [*clips_made, *random])
    writer.publish(STAGES)
    accounts = balance(writer.table, None)
    fewer = accounts.as_dict() | {"clips": accounts.clips | {"kept": 3, "pending": 60}}
    add_run(writer, fewer, day=1)
    add_run(writer, accounts.as_dict(), day=2)
    return Path(root)


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> str:
    """The same, to write to."""
    return str(shutil.copytree(made, tmp_path / "copy"))


SETTINGS: tuple[tuple[str, ...], ...] = (
    ("brightness.lo=0.4",),
    ("num_frames.lo=30", "aspect_ratio.lo=0.5"),  # admits what was never measured further
    ("brightness.lo=0", "black_area_frac.hi=1", "black_frame_frac.hi=1"),  # many copies
    ("overlay_score.hi=0.25", "aspect_ratio.hi=1.5", "motion_score.above=1.25"),
    ("brightness.lo=0.2",),  # a stored value lies on this bound
    (),
)


@pytest.mark.parametrize("cosine", [None, 0.97])
def test_numbers_equal_what_a_publication_then_writes(copied: str, cosine: float | None) -> None:
    """One after the other on one dataset, so that each also begins at published bounds."""
    stages = tuple(_with_cosine(s, cosine) for s in STAGES)
    writer = Writer(copied, "test")
    writer.publish(stages)
    seen = set()
    for setting in SETTINGS:
        bounds = bounds_of(with_bounds(stages, setting))
        now = thresholds.published(copied)
        then = thresholds.settled(copied, stages, thresholds.judged(copied, stages, bounds))
        outcome = thresholds.compared(now, then)
        ids = read(copied, "clips").to_table(columns=["clip_id"])["clip_id"].to_numpy()
        before = _kept(copied)
        writer.publish(with_bounds(stages, changes(stages, bounds)))
        accounts, after = balance(writer.table, None), _kept(copied)
        assert thresholds.states(then) == {s: n for s, n in accounts.clips.items()
                                           if n and s != "total"}  # fmt: skip
        assert thresholds.reasons(then, bounds) == accounts.reasons
        assert set(ids[outcome.gained]) == after - before
        assert set(ids[outcome.lost]) == before - after
        # and what is then shown as published is these bounds, or rejects the very same clips
        start = published_bounds(copied, stages)
        again = thresholds.judged(copied, stages, start)
        assert thresholds.same_as_published(again, thresholds.published(copied))
        seen |= thresholds.states(then).keys()
    assert seen == {"kept", "rejected", "failed", "duplicate", "pending"}  # else it proves less


def _with_cosine(stage: Stage, cosine: float | None) -> Stage:
    if stage.distinct is None:
        return stage
    return dataclasses.replace(stage, distinct=Distinct(phash_bits=6, cosine=cosine))


def _kept(root: str) -> set[str]:
    return set(
        read(root, "clips").to_table(columns=["clip_id"], filter="kept")["clip_id"].to_pylist()
    )


def test_the_line_that_is_exported_is_what_refilter_takes(copied: str) -> None:
    bounds = bounds_of(STAGES)
    assert changes(STAGES, bounds) == ()
    moved = bounds | {("brightness", "lo"): 0.35, ("num_frames", "lo"): 30.0,
                      ("motion_score", "above"): 1e-05}  # fmt: skip
    said = changes(STAGES, moved)
    assert said == ("num_frames.lo=30", "motion_score.above=1e-05", "brightness.lo=0.35")
    assert bounds_of(with_bounds(STAGES, said)) == moved
    recorded = thresholds.described(CLASSIC, moved)
    rules = {r["column"]: r for s in recorded["stages"] for r in s["rules"]}
    assert rules["brightness"]["lo"] == 0.35 and rules["aspect_ratio"]["hi"] == 2.0


def test_the_bounds_of_a_run_are_found_where_they_rejected_nothing(tmp_path: Path) -> None:
    """`curate.py --set` with bounds so loose that no reason names them."""
    source = source_row(film(tmp_path / "film.mp4"))
    dark = clip_row(source, 24, 24) | {"brightness": 0.05, "num_frames": 70}
    root = str(tmp_path / "set")
    loose = with_bounds(STAGES, ["brightness.lo=0"])
    writer = commit(root, [source], [dark])
    writer.publish(loose)
    add_run(writer, {"clips": {"kept": 1}}, 1, dataclasses.replace(CLASSIC, stages=loose))
    assert published_bounds(root, STAGES)["brightness", "lo"] == 0
    writer.publish(with_bounds(STAGES, ["brightness.lo=0.01"]))  # of which nothing is recorded
    found = published_bounds(root, STAGES)["brightness", "lo"]
    assert found <= 0.05  # kept is kept
    writer.publish(STAGES)
    assert published_bounds(root, STAGES)["brightness", "lo"] == 0.2


def test_the_funnel_adds_up_to_the_accounts(made: Path) -> None:
    root = str(made)
    accounts = balance(lambda name: read(root, name), None)
    steps = funnel.steps(STAGES, funnel.tallies(root))
    assert steps[0].num == accounts.clips["total"] and steps[-1].num == accounts.clips["kept"]
    assert {s.label: s.num for s in steps if s.state == "rejected"} == accounts.reasons
    left = accounts.clips["total"]
    for step in steps[1:-1]:
        left -= step.num
        assert step.left == left
    assert left == accounts.clips["kept"]
    order = [s.name for s in STAGES]
    stages = [order.index(s.stage) for s in steps if s.state == "rejected"]
    assert stages == sorted(stages)
    lasts = read(root, "clips").to_table(columns=["duration_s"], filter="kept")["duration_s"]
    assert steps[-1].video_s == pytest.approx(sum(lasts.to_pylist()))
    past = funnel.steps(STAGES, funnel.tallies_of(funnel.curations(root)[-1]))
    assert [(s.label, s.num) for s in past] == [(s.label, s.num) for s in steps]
    assert {s: n["num"] for s, n in funnel.sources(root).items()} == {
        "done": 3, "failed": 1, "duplicate": 0,
    }  # fmt: skip
    assert [(f["what"], f["error_type"], f["num"]) for f in funnel.failures(root)] == [
        ("clip", "DecodeError", accounts.clips["failed"]),
        ("source", "TruncatedError", 1),
    ]


def test_the_nearest_to_a_bound_are_those_of_the_command_line(made: Path) -> None:
    root = str(made)
    for (column, which), bound in published_bounds(root, STAGES).items():
        kept, out = clips.nearest(root, column, which, bound, 5)
        values = read(root, "clips").to_table(
            columns=[column], filter=f"kept and {column} is not null"
        )
        far = sorted(abs(v - bound) for v in values[column].to_pylist())
        assert [abs(r[column] - bound) for r in kept] == pytest.approx(far[:5])
        reason = f"{column}{SIGNS[which]}{bound:g}"
        if reason in balance(lambda name: read(root, name), None).reasons:
            told = [r for r in nearest(root, column, 1000).to_pylist() if r["reason"] == reason]
            assert [r["clip_id"] for r in out] == [r["clip_id"] for r in told[:5]]
        else:
            assert not out


def test_filters_find_what_a_look_at_all_rows_finds(made: Path) -> None:
    root = str(made)
    rows = read(root, "clips").to_table().to_pylist()
    choice = clips.Choice(
        states=("rejected", "kept"), ranges=(("brightness", 0.3, 0.9),), words="", source="SIGNALS",
        sort="motion_score", descending=True,
    )  # fmt: skip
    wanted = [
        r
        for r in rows
        if r["state"] in ("rejected", "kept") and 0.3 <= r["brightness"] <= 0.9
        if r["source_uri"].endswith("signals.webm")
    ]
    wanted.sort(key=lambda r: (-r["motion_score"], r["clip_id"]))
    assert clips.num(root, choice) == len(wanted) > 15
    found = clips.found(root, choice, 5, 10)
    assert [r["clip_id"] for r in found] == [r["clip_id"] for r in wanted[5:15]]
    spoken = clips.Choice(words="From FRAME 20")
    assert clips.num(root, spoken) == len(clips.found(root, spoken, 0, 5)) == 1
    injected = clips.Choice(words="it's ' OR true --")
    assert clips.num(root, injected) == 0 and not clips.found(root, injected, 0, 5)


def test_rules_say_of_a_clip_what_decided_it(made: Path) -> None:
    root = str(made)
    bounds = published_bounds(root, STAGES)
    for row in read(root, "clips").to_table().to_pylist():
        told = clips.checks(row, STAGES, bounds)
        if row["state"] == "kept":
            assert all(check.passes is not False for check in told)
        if row["state"] == "rejected":
            (decided,) = [check for check in told if check.decided]
            assert decided.passes is False and decided.value == pytest.approx(row["rule_value"])


def test_an_older_dataset_without_some_columns_is_shown(made: Path, tmp_path: Path) -> None:
    import lance

    root = str(shutil.copytree(made, tmp_path / "old"))
    for name in ("pairs", "cuts", "runs"):
        shutil.rmtree(Path(root, f"{name}.lance"))
    table = lance.dataset(f"{root}/clips.lance")
    table.drop_columns(["media", "overlay_score", "caption_original", "extra"])
    assert funnel.steps(STAGES, funnel.tallies(root))[0].num == table.count_rows()
    bounds = bounds_of(STAGES)
    found = thresholds.judged(root, STAGES, bounds)
    assert "overlay_score>" not in {g.crossed for g in found.groups}
    assert clips.num(root, clips.Choice(words="brighter")) == 3
    assert funnel.curations(root) == []
    page = _opened(root, "thresholds")
    page.selectbox(key="threshold_signal").select("overlay_score").run()
    assert not page.exception, page.exception
    assert "overlay_score was not measured" in page.info[0].value


def _page(dataset: str, name: str) -> None:
    """What `AppTest` runs: a script of its own."""
    import importlib

    from cluster.dashboard.places import Places

    page = importlib.import_module(f"cluster.dashboard.page_{name}")
    page.show(Places(dataset=dataset, evaluations=dataset))


def _opened(root: str, name: str) -> Any:
    from streamlit.testing.v1 import AppTest

    ran = AppTest.from_function(_page, kwargs={"dataset": root, "name": name}, default_timeout=60)
    ran.run()
    assert not ran.exception, ran.exception
    return ran


def _said(root: str, name: str) -> str:
    ran = _opened(root, name)
    return "\n".join(str(e.value) for e in (*ran.info, *ran.markdown, *ran.caption, *ran.metric))


@pytest.mark.parametrize("page", ["funnel", "clips", "thresholds"])
def test_datasets_that_are_not_finished_give_a_friendly_page(page: str, tmp_path: Path) -> None:
    root = str(tmp_path / "new")
    create(root, CLASSIC.name)
    assert "yet" in _said(root, page) and "pipelines/curate.py" in _said(root, page)
    source = source_row(film(tmp_path / "film.mp4"))
    commit(root, [source], [clip_row(source, 24, 24), clip_row(source, 48, 24)])
    said = _said(root, page)  # a run is under way: nothing is judged
    assert {
        "funnel": "2 clips are pending",
        "clips": "**2** clips",
        "thresholds": "these verdicts",
    }[page] in said
    other = str(tmp_path / "scores")
    create(other, "evals")
    assert "yet" in _said(other, page)


@pytest.mark.slow
def test_pages_read_large_tables_by_columns_not_row_by_row(made: Path, tmp_path: Path) -> None:
    """`tests/bench_dashboard.py` opens a million in a browser: this is CPU alone, of a fifth."""
    import bench_dashboard

    root = str(tmp_path / "large")
    bench_dashboard.make(root, 200_000, keyframes=False)
    bench_dashboard.opening(str(made))  # what is imported and set up once
    assert bench_dashboard.opening(root) < 2.0
    assert bench_dashboard.moving(root, 0.21) < 0.2


# In a browser


@pytest.fixture(scope="module")
def url(made: Path, serve: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    cache = tmp_path_factory.mktemp("playable")
    return serve("dashboard", made, "--cache", cache, "--cache-gb", 0.001)


def _shown(browser: Any, name: str) -> list[list[str]]:
    """Cells of a table of the page, those of a part that is just unfolding as well."""
    rows = browser.until(lambda: browser.all(f"#{name} tbody tr"))
    cells = [row.find_elements(By.CSS_SELECTOR, "td") for row in rows]
    return [[cell.get_attribute("innerText").strip() for cell in row] for row in cells]


def _press(browser: Any, words: str) -> None:
    """Clicks the button that ends so: before it may stand an icon's name."""

    def found() -> Any:
        buttons = browser.all("button")
        return next((b for b in buttons if b.get_attribute("textContent").endswith(words)), None)

    browser.driver.execute_script("arguments[0].click()", browser.until(found))


@pytest.mark.slow
def test_the_funnel_page(made: Path, url: str, browser: Any) -> None:
    accounts = balance(lambda name: read(str(made), name), None)
    browser.visit(url)
    states = {row[0]: int(row[1]) for row in _shown(browser, "states")}
    assert states == {s: n for s, n in accounts.clips.items() if s != "total"}
    browser.all("[data-testid='stExpander'] summary")[0].click()
    told = browser.until(lambda: [r for r in _shown(browser, "funnel") if r[0]])
    assert {r[1]: int(r[2]) for r in told if r[1]} == accounts.reasons
    assert "TruncatedError" in browser.text
    assert len(browser.all(".marks")) >= 2


@pytest.mark.slow
def test_a_clip_is_found_and_plays(made: Path, url: str, browser: Any) -> None:
    accounts = balance(lambda name: read(str(made), name), None)
    browser.visit(f"{url}/clips")
    browser.until(lambda: browser.all(".rw-card img"))
    _press(browser, f"failed {accounts.clips['failed']}")
    browser.until(lambda: f"{accounts.clips['failed']} clips pass" in browser.text)
    _press(browser, f"failed {accounts.clips['failed']}")
    field = browser.all("input[aria-label='Words in a caption']")[0]
    field.send_keys("from frame 24 on", Keys.ENTER)
    browser.until(lambda: "2 clips pass" in browser.text)
    browser.settle()
    _press(browser, "Open film.mp4 · 1.0 s")
    _plays(browser)
    assert "brightness is 0.15, and < 0.2 is out. It missed by 0.05" in browser.text
    assert "mean luma, 0 to 1" in browser.text  # what a column means
    _press(browser, "All clips")
    browser.until(lambda: "2 clips pass" in browser.text)  # the filter is still there


@pytest.mark.slow
def test_a_span_that_browsers_do_not_know_plays_when_it_is_asked_for(
    made: Path, url: str, browser: Any
) -> None:
    (clip,) = read(str(made), "clips").to_table(filter="codec = 'mpeg4'").to_pylist()
    browser.visit(f"{url}/clips?clip={clip['clip_id']}")
    assert not browser.all("video")
    _press(browser, "Make it playable")
    _plays(browser)
    browser.visit(f"{url}/clips?clip={clip['clip_id']}")  # from the cache, unasked
    _plays(browser)


def _plays(browser: Any) -> None:
    video = browser.until(lambda: browser.all("video"), 60)[0]
    facts = "return [arguments[0].readyState, arguments[0].videoWidth, arguments[0].currentTime]"
    browser.until(lambda: browser.driver.execute_script(facts, video)[0] >= 2)
    browser.driver.execute_script("arguments[0].play()", video)
    browser.until(lambda: browser.driver.execute_script(facts, video)[2] > 0.1)
    assert browser.driver.execute_script(facts, video)[1] == 160


@pytest.mark.slow
def test_the_thresholds_page_shows_what_refilter_then_publishes(
    copied: str, made: Path, url: str, browser: Any
) -> None:
    browser.visit(f"{url}/thresholds")
    for column, which, value in (
        ("num_frames", "lo", "30"), ("aspect_ratio", "lo", "0.5"), ("brightness", "lo", "0.35"),
    ):  # fmt: skip
        _choose(browser, column)
        selector = f".st-key-bound-{column}-{which}-number input"
        field = browser.until(lambda s=selector: browser.all(s))[0]
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(value, Keys.ENTER)
        change = f"{column}.{which}={value}"
        browser.until(lambda c=change: c in browser.text)
        browser.settle()
    shown = {
        label.split("\n")[0].lower(): int(label.split("\n")[1].replace(",", ""))
        for label in (m.text for m in browser.all("[data-testid='stMetric']"))
        if not label.startswith("Video")
    }
    line = re.search(r"refilter\.py \S+ --set (.+)", browser.text)
    assert line
    done = subprocess.run(
        command("refilter", copied, "--json", "--set", *line[1].split()),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    published = json.loads(done.stdout)
    assert shown["would be kept"] == published["clips"]["kept"]
    for state in ("pending", "rejected", "duplicate", "failed"):
        assert shown[state] == published["clips"][state]
    assert published["clips"]["pending"] and published["clips"]["duplicate"]
    then = {r[0].split("\n")[0]: int(r[2].split("\n")[0]) for r in _shown(browser, "by-rule")}
    assert {reason: num for reason, num in then.items() if num} == published["reasons"]


def _choose(browser: Any, column: str) -> None:
    """Picks a signal in the page's select box."""
    box = browser.all("[data-testid='stSelectbox'] input")[0]
    box.click()
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(column, Keys.ENTER)
    browser.until(lambda: browser.all(f"[class*='st-key-bound-{column}-']"))
    browser.settle()
