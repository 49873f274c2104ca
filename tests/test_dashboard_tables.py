"""What pages read of tables that change, lie, or are damaged, and how they say what data says."""

from __future__ import annotations

import io
import logging
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import lance
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, PngImagePlugin
from shown_clips import clip_row, commit, film, keyframe_rows, picture, source_row

from cluster.dashboard import app, clips, keyframes, lance_sql, look, page_funnel, thresholds
from cluster.dashboard.bounds import bounds_of, scale
from cluster.dashboard.places import Places
from cluster.dashboard.runs import Run
from engine.tables import DatasetError, Writer
from pipelines.recipes import CLASSIC

STAGES = CLASSIC.stages


@pytest.fixture
def root(tmp_path: Path) -> str:
    """A dataset of two clips."""
    return _made(tmp_path, brightness=0.5)


def _made(folder: Path, **signals: float) -> str:
    source = source_row(film(folder / "film.mp4"))
    rows = [clip_row(source, first, 24) | signals for first in (24, 48)]
    commit(str(folder / "set"), [source], rows).publish(STAGES)
    return str(folder / "set")


def test_the_name_of_a_column_is_no_sql(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "1 FROM there) SELECT 1; COPY (SELECT 'x') TO 'owned'; SELECT 1 AS low, 2 AS high --"
    hostile = pa.field(name, pa.float32())
    lance.dataset(f"{root}/clips.lance").add_columns(pa.schema([hostile]))
    assert clips.extent(root, name) is None  # never measured
    assert not Path("owned").exists()
    assert "brightness" in (names := [signal.name for signal in clips.signals(root)])
    assert name not in names, "nor is it offered to filter by"
    with pytest.raises(duckdb.PermissionException):
        lance_sql.sql("SELECT 1; COPY (SELECT 'x') TO 'owned'")


def test_a_dataset_that_is_made_anew_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    root = _made(tmp_path, brightness=0.5)
    version = lance_sql.newest(root, "clips").version
    assert clips.extent(root, "brightness") == (0.5, 0.5)
    assert thresholds.values_of(root, "brightness").tolist() == [0.5, 0.5]
    shutil.rmtree(root)
    assert _made(tmp_path, brightness=0.75) == root
    assert lance_sql.newest(root, "clips").version == version
    assert clips.extent(root, "brightness") == (0.75, 0.75)
    assert thresholds.values_of(root, "brightness").tolist() == [0.75, 0.75]


def test_a_page_sees_one_state_of_a_table_while_a_run_commits(root: str) -> None:
    seen: list[int] = []

    def page(places: Places) -> None:
        now = thresholds.published(places.dataset)
        other = source_row(film(Path(root).parent / "other.mp4", "mpeg4"))
        commit(root, [other], [clip_row(other, 24, 48)]).publish(STAGES)
        then = thresholds.judged(places.dataset, STAGES, bounds_of(STAGES))
        seen.extend(thresholds.compared(now, then).gained)
        seen.append(len(then.codes))

    app._guarded(page, Places(dataset=root, evaluations=root))()
    assert seen == [2]
    assert len(thresholds.published(root).codes) == 3


def test_what_is_judged_ahead_of_a_move_is_of_the_tables_that_the_page_shows(
    root: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    judged, seen = thresholds.judged, list[int]()
    monkeypatch.setattr(thresholds, "_SHOWN_S", 0.2)
    monkeypatch.setattr(thresholds, "judged", lambda *asked: seen.append(len(judged(*asked).codes)))
    with lance_sql.snapshot():
        _, start = thresholds.published_with_bounds(root, STAGES)
        for _ in range(3):  # of which one is enough
            thresholds.prepare(root, STAGES, start)
        other = source_row(film(Path(root).parent / "other.mp4", "mpeg4"))
        commit(root, [other], [clip_row(other, 24, 48)]).publish(STAGES)
    with thresholds._preparing:
        assert seen == [2]
    monkeypatch.setattr(thresholds, "judged", lambda *_: lance_sql.newest("nowhere", "clips"))
    thresholds.prepare(root, STAGES, start)
    with thresholds._preparing, caplog.at_level(logging.WARNING):
        assert "nowhere holds no dataset" in caplog.text


def test_voters_are_not_told_what_went_wrong(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []
    monkeypatch.setattr(app.st, "error", lambda text, **_: told.append(text))

    def page(_: Places) -> None:
        raise duckdb.Error("videos of *secret* are gone")

    with caplog.at_level(logging.WARNING):
        app._guarded(page, Places(dataset="d", evaluations="d", only_vote=True))()
    assert "secret" in caplog.text and "secret" not in told.pop()
    app._guarded(page, Places(dataset="d", evaluations="d"))()
    assert told == [r"videos of \*secret\* are gone"]


def test_a_table_that_is_not_there_is_told_from_a_damaged_one(root: str) -> None:
    shutil.rmtree(Path(root, "pairs.lance"))
    assert not lance_sql.has_rows(root, "pairs")
    for manifest in Path(root, "clips.lance", "_versions").iterdir():
        manifest.write_bytes(b"has no table")
    with pytest.raises(DatasetError, match="cannot be opened"):
        lance_sql.has_rows(root, "clips")


def test_a_damaged_keyframe_is_one_picture_less(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    large, png = io.BytesIO(), io.BytesIO()
    Image.effect_noise((640, 480), 50).save(large, "JPEG")
    Image.new("RGB", (640, 480)).save(png, "PNG", pnginfo=PngImagePlugin.PngInfo())
    with Image.open(io.BytesIO(keyframes.small(large.getvalue(), 320))) as made:
        assert made.size == (320, 240)
    for bad in (b"", png.getvalue(), large.getvalue()[:2000]):
        assert keyframes.small(bad, 320) == b""
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # a bomb
        assert keyframes.small(large.getvalue(), 320) == b""
    rows = lance_sql.newest(root, "clips").to_table().to_pylist()
    frames = keyframe_rows(rows[:1], each=3)
    jpegs = lance.blob_array([b"damaged", None, picture(60)])
    writer = Writer(root, "test")
    writer.append("keyframes", frames.set_column(frames.num_columns - 1, "jpeg", jpegs))
    ids = [row["clip_id"] for row in rows]
    found = keyframes.found(root, ids, 320)
    assert [len(found[one]) for one in ids] == [5, 2]
    assert sum(jpeg == b"" for _, jpeg in found[ids[0]]) == 2


@pytest.mark.parametrize("value", [0.35, 0.7, 0.83])
def test_a_slider_reaches_to_the_bound_that_is_typed(value: float) -> None:
    low, high, step = scale((1.2, 3.0), value, 1.5)
    assert low <= value <= high and (high, step) == (3.0, 0.01)


def test_bars_of_many_runs_can_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    first = datetime(2026, 1, 1, tzinfo=UTC)
    given: dict[str, Any] = dict.fromkeys(
        ("night", "seconds", "frames_decoded", "git_commit", "resolved", "operators", "versions")
    )
    runs = [
        Run(root="", run_id=str(day), recipe="classic", kind="curation", interrupted=False, src=(),
            started_at=first + timedelta(day), counts={"clips": {"kept": 1}}, **given)
        for day in range(1000)
    ]  # fmt: skip
    charts: list[Any] = []
    monkeypatch.setattr(look, "chart", charts.append)
    page_funnel._over_runs(runs)
    assert charts[0].mark.size >= 5


def test_text_of_data_is_no_markdown() -> None:
    said = look.verbatim("$5 *or* ![](https://x)\n# <b> `c` ~~d~~ _e_ [f]")
    assert said == (
        r"\$5 \*or\* \!\[\]\(https\:\/\/x\) \# \<b\> \`c\` \~\~d\~\~ \_e\_ \[f\]"
    )  # fmt: skip
    assert look.verbatim("ein Wort, 2 猫") == r"ein Wort\, 2 猫"


def test_quotes_stay_within_what_is_quoted() -> None:
    text = """it's "both" -- '; DROP"""
    found = lance_sql.sql(f"SELECT {lance_sql.quoted(text)} AS {lance_sql.identifier(text)}")
    assert found.to_pylist() == [{text: text}]
    assert np.all(found[text].is_valid())
