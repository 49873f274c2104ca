"""The pages of what training learns from and how it goes: pairs and training runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import lance
import numpy as np
import pyarrow as pa
import pytest
from small_sets import Item, make_set, picture
from streamlit.testing.v1 import AppTest

from cluster.dashboard import keyframes, page_training, pairs, training
from engine.schema import KEYFRAMES
from engine.tables import Writer, read
from trainers import tracking
from trainers.job import FINAL
from trainers.tracking import Metrics, MetricsTable
from trainers.videos import write_mp4


def train(
    run: Path, stage: str, losses: list[float], *, after: tuple[str, ...] = (), start: int = 0
) -> None:
    """What a training leaves in its folder, without the training."""
    folder = run / stage
    (folder / "step_00000004").mkdir(parents=True, exist_ok=True)
    (folder / "step_00000004" / "COMPLETE").touch()
    (folder / "step_00000008").mkdir(exist_ok=True)  # cut off
    metrics = Metrics(folder, "run", (), {}, start)
    lines = [
        {"step": start + n, "loss": loss, "grad_norm": 0.5, "lr_lora": 1e-4}
        for n, loss in enumerate(losses)
    ]
    lines[-1] |= {"samples_per_s": 12.5, "memory_gib": 1.5, "data_wait_frac": 0.25,
                  "num_skipped": 2, "num_unreadable": 0}  # fmt: skip
    metrics.log(lines)
    metrics.close()
    settings = {"name": stage, "after": list(after), "batch": 4,
                "optim": [{"group": "lora", "lr": 1e-4}],
                "data": {"buckets": [{"frames": 8, "height_px": 64, "width_px": 96}]}}  # fmt: skip
    config = {"recipe": "rise_animatediff", "stage": settings, "data": {"samples": 5}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "machine.json").write_text('{"hardware": "2 × H100"}')
    (run / "run.json").write_text(json.dumps({"recipe": "rise_animatediff", "set": []}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: one with its table, and one of an earlier version with journals alone."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder / "new", "motion", [0.9, 0.7, 0.6], after=("image",))
    train(folder / "new", "image", [1.0 / (n + 1) for n in range(9)])
    (folder / "new" / "image" / FINAL).touch()
    MetricsTable(folder / "new").end()
    train(folder / "earlier", "image", [2.0, 1.5, 1.25])
    samples = folder / "new" / training.SAMPLES
    samples.mkdir()
    write_mp4(samples / "a-cat.mp4", np.full((9, 32, 48, 3), 90, np.uint8), 8.0)
    (samples / "a-cat.json").write_text('{"prompt": "a cute cat", "rephrased": "A cat, cute."}')
    return folder


@pytest.fixture(scope="module")
def quadruples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of twelve pictures with a pair each, every third of them rejected."""
    folder = tmp_path_factory.mktemp("pairs")
    items = [
        Item(file=picture(folder / f"{n}.png", 20 * n), original=f"a grey wall {n}, seen <b>",
             rephrased=f"A grey wall {n}, tall and seen <b> at noon.", pair_kept=n % 3 > 0,
             instructions=("dense",) if n % 2 else ("multi_scene",))
        for n in range(12)
    ]  # fmt: skip
    root = make_set(folder / "set", items)
    writer = Writer(root, "more")
    clips = writer.table("clips").to_table(columns=["clip_id", "source_id"]).to_pylist()
    jpeg = cv2.imencode(".jpg", np.full((300, 400, 3), 120, np.uint8))[1].tobytes()
    rows = [clip | {"frame": n, "time_s": n / 2} for clip in clips for n in range(3)]
    at = KEYFRAMES.get_field_index("jpeg")
    table = pa.Table.from_pylist(rows, schema=KEYFRAMES.remove(at))
    blobs = lance.blob_array([jpeg] * len(rows))
    writer.append("keyframes", table.append_column(KEYFRAMES.field(at), blobs))
    return Path(root)


@pytest.mark.slow
def test_losses_are_on_the_page(
    trained: Path, quadruples: Path, serve: Callable[..., str], browser: Any
) -> None:
    url = serve("dashboard", quadruples, "--training", trained)
    browser.visit(f"{url}/training")
    rows = browser.until(lambda: browser.all("#stands tbody tr"))
    shown = {row.text.split()[0]: row.text for row in rows}
    assert "1.2500" in shown["earlier"] and "not ended" in shown["earlier"]
    assert "not ended" not in shown["new"], "the stage that is under way is chosen, if there is one"
    assert "12.50" in shown["new"] and "25.0 %" in shown["new"] and "2 × H100" in shown["new"]
    last = tracking.read(trained / "new" / "image")[-1]["loss"]
    assert f"{last:.4f}" == "0.1111" and "0.1111" in shown["new"]
    charts = browser.until(lambda: browser.all("[data-testid='stVegaLiteChart']"))
    assert len(charts) >= 4
    assert "a cute cat" in browser.text
    (video,) = browser.all("video")
    play = "return !arguments[0].paused && arguments[0].videoWidth"
    assert browser.until(lambda: browser.driver.execute_script(play, video)) == 48
    assert not browser.all("[data-testid='stException']")


@pytest.mark.slow
def test_a_pair_shows_both_its_texts(
    trained: Path, quadruples: Path, serve: Callable[..., str], browser: Any
) -> None:
    url = serve("dashboard", quadruples, "--training", trained)
    browser.visit(f"{url}/pairs")
    first = read(str(quadruples), "pairs").to_table(limit=1).to_pylist()[0]
    text = browser.until(lambda: first["state"] in browser.text and browser.text)
    plain = " ".join(text.split())
    assert " ".join(first["original"].split()) in plain
    assert " ".join(first["rephrased"].split()) in plain
    assert first["instruction"] in plain
    images = browser.until(lambda: browser.all(".strip img"))
    width = "return arguments[0].complete && arguments[0].naturalWidth"
    assert browser.until(lambda: browser.driver.execute_script(width, images[0])) > 50
    assert "12 pairs, 1 to 8 shown" in plain
    browser.visit(f"{url}/pairs?pairs_state=rejected")
    assert "4 pairs" in browser.text and "12 pairs" not in browser.text


# Without a browser


def test_runs_are_what_their_folders_say(trained: Path) -> None:
    earlier, new = training.runs([str(trained)])
    assert (earlier.name, new.name) == ("earlier", "new")
    assert [stage.name for stage in new.stages] == ["image", "motion"], "in the order of training"
    image, motion = new.stages
    assert image.has_ended and not motion.has_ended
    assert (image.steps, image.checkpoints, image.total("num_skipped")) == (9, (4,), 2)
    assert image.last("samples_per_s") == 12.5 and image.last("mfu") is None
    assert not new.is_tiny and new.recipe == "rise_animatediff"
    (sample,) = training.samples_in(new, 6)
    assert (sample.caption, sample.about, sample.is_video) == ("a cute cat", "A cat, cute.", True)


def test_a_table_that_cannot_be_read_is_no_end(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "new"
    shutil.copytree(trained / "new", run)
    (whole,) = training.runs([str(run)])
    for file in (run / training.TABLE / "_versions").iterdir():
        file.write_bytes(b"torn")
    (damaged,) = training.runs([str(run)])
    assert "journals are shown instead" in damaged.note and not whole.note
    assert [s.lines for s in damaged.stages] == [s.lines for s in whole.stages]
    shutil.rmtree(run / training.TABLE)
    with (run / "motion" / training.JOURNAL).open("a") as file:
        file.write('{"step": 3, "lo')
    (journals,) = training.runs([str(run)])
    assert [s.lines for s in journals.stages] == [s.lines for s in whole.stages]
    (nothing,) = training.runs([str(tmp_path / "none")])
    assert nothing.stages == ()


def test_a_stage_that_the_table_lacks_comes_from_its_journal(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "new"
    shutil.copytree(trained / "new", run)
    train(run, "domain", [3.0, 2.0], after=("image",))
    (found,) = training.runs([str(run)])
    by_name = {stage.name: stage for stage in found.stages}
    assert by_name["domain"].last("loss") == 2.0 and by_name["image"].steps == 9


def test_an_export_is_told_by_its_training(trained: Path, tmp_path: Path) -> None:
    (run,) = training.runs([str(trained / "new")])
    facts = {s.name: {"config": dict(s.config), "steps": s.steps} for s in run.stages}
    (tmp_path / "training.json").write_text(json.dumps(facts))
    assert training._is_of(str(tmp_path), run)
    facts["image"]["steps"] = 8
    (tmp_path / "training.json").write_text(json.dumps(facts))
    assert not training._is_of(str(tmp_path), run)
    assert not training._is_of(str(tmp_path / "none"), run)


def test_smoothing_is_the_mean_of_what_there_is() -> None:
    values = np.array([1.0, 3.0, 2.0])
    found = training.smoothed(values, 0.5)
    assert found == pytest.approx([1.0, (0.5 * 1 + 3) / 1.5, (0.25 * 1 + 0.5 * 3 + 2) / 1.75])
    assert training.smoothed(np.full(50, 7.0), 0.99) == pytest.approx(np.full(50, 7.0))
    assert np.array_equal(training.smoothed(values, 0.0), values)


def test_of_many_samples_only_those_that_are_shown_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / training.SAMPLES
    folder.mkdir()
    for name in ("notes.txt", *(f"{n}.mp4" for n in range(9))):
        (folder / name).touch()
    read: list[str] = []
    monkeypatch.setattr(training, "_json", lambda uri: read.append(uri) or {})
    run = training.Run(folder=str(tmp_path), name="r", about={}, stages=())
    assert [one.caption for one in training.samples_in(run, 2)] == ["0", "1"]
    assert len(read) == 2


def test_runs_are_not_read_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, ...]] = []
    monkeypatch.setattr(training, "runs", lambda folders: read.append(folders) or [])
    assert page_training._runs(("a folder",)) == page_training._runs(("a folder",)) == []
    assert read == [("a folder",)]


def test_what_a_prompt_says_is_no_markdown(tmp_path: Path) -> None:
    def script(path: str) -> None:
        from cluster.dashboard import page_training
        from cluster.dashboard.places import Places
        from cluster.dashboard.training import Sample

        one = Sample(caption="![](http://x.y/z) $5 *or* $10", uri=path, is_video=False)
        page_training._sample(one, Places(dataset="", evaluations=""))

    shown = AppTest.from_function(script, args=(str(picture(tmp_path / "a.png", 90)),)).run()
    assert not shown.exception
    assert shown.caption[0].value.startswith(r"\!\[\]\(http")
    assert shown.caption[0].value.endswith(r"\$5 \*or\* \$10")


def test_a_long_curve_is_thinned_to_means() -> None:
    lines = tuple({"step": n, "loss": float(n)} for n in range(10 * training.MOST_POINTS))
    stage = training.Stage(
        name="s", lines=lines, config={}, machine={}, checkpoints=(), has_ended=False
    )
    found = training.curve(stage, "loss", 0.0)
    assert len(found) == training.MOST_POINTS
    assert found[0] == {"step": 4.5, "value": 4.5, "smooth": 4.5}
    assert training.curve(stage, "mfu", 0.5) == []


def test_what_was_kept_of_a_text_is_told_from_what_was_added() -> None:
    before, after = pairs.marked("A cat, red.", "A <big> Cat sits, red.")
    assert after.startswith('<span class="kept">A</span> <mark class="added">&lt;big&gt;</mark> ')
    assert "&lt;big" in after and "<big>" not in after, "what comes from data is no HTML"
    assert '<span class="kept">Cat</span>' in after, "in any case"
    assert "<s>" not in before
    gone, come = pairs.marked("a dog", "birds fly")
    assert "<s>a dog</s>" in gone and '<mark class="added">birds fly</mark>' in come
    assert pairs.kept_share("a red cat", "A cat is red") == pytest.approx(2 / 3)
    assert pairs.kept_share("一只猫", "一只白猫") == 1.0, (
        "signs are words where there are no spaces"
    )
    assert pairs.kept_share("", "anything") is None
    assert pairs.marked("", "") == ("", "")


def test_pairs_are_found_by_filter(quadruples: Path) -> None:
    root = str(quadruples)
    rows = read(root, "pairs").to_table().to_pylist()
    assert pairs.num(root, pairs.Filter()) == len(rows)
    assert len(pairs.found(root, pairs.Filter(), 0, 2)) == 2
    kept = pairs.num(root, pairs.Filter(state="kept"))
    assert kept == sum(row["state"] == "kept" for row in rows)
    counted = pairs.counts(root).to_pylist()
    assert sum(row["num_pairs"] for row in counted) == len(rows)
    word = rows[0]["rephrased"].split()[-1].strip(".").upper()
    some = pairs.found(root, pairs.Filter(words=word), 0, 100)
    sought = [r for r in rows if word.lower() in f"{r['original']}\n{r['rephrased']}".lower()]
    assert len(some) == len(sought) > 0
    assert not pairs.found(root, pairs.Filter(words="it's % _ no"), 0, 5)
    clips = [row["clip_id"] for row in rows]
    pictures = keyframes.found(root, clips, 160, most=2)
    assert set(pictures) == set(clips)
    assert all(len(of) == 2 for of in pictures.values())
    small = cv2.imdecode(np.frombuffer(pictures[clips[0]][0][1], np.uint8), cv2.IMREAD_COLOR)
    assert small.shape == (120, 160, 3)
