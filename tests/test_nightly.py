"""Nights: what is a regression, which export is the newest, and three nights on a cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, Cluster

from engine.tables import DatasetError, InUse, LeaseLost, Writer, create, read
from evals import exports, night_page, nightly, webhook
from evals.evaluation import KIND, Plan
from evals.models import Model
from evals.recipes import recipe
from evals.regressions import Earlier, averaged, compared, judged, needed
from evals.report import Comparison, Loss, ModelNight, Report, Score
from evals.results import Value
from evals.running import Request, _Running
from evals.suites import Prompt, Suite
from evals.trend import Night, TrendPoint, nights_of, trend
from trainers.export import _checksums, model_card
from trainers.recipes import recipe as train_recipe
from trainers.system import Card

DIMENSION = "temporal_flickering"
PROMPTS = 40


def scores(
    seed: int, shift: float = 0.0, prompts: int = PROMPTS, noise: float = 0.02
) -> list[Value]:
    """Prompts are easy or hard on every night; each night has its own way with some of them."""
    easy = np.random.default_rng(0).normal(0.6, 0.1, prompts)
    own = easy + np.random.default_rng(seed + 1).normal(0, noise, prompts) + shift
    return [
        Value(prompt=f"prompt {n}", sample=0, categories=(), score=float(x))
        for n, x in enumerate(own)
    ]


def earlier(date: str, values: Sequence[Value], **given: Any) -> Earlier:
    return Earlier(date=date, columns=[DIMENSION], read=lambda: {DIMENSION: values}, **given)


def history(shifts: Sequence[float], **how: Any) -> list[Earlier]:
    """Nights of November, the newest first; the shift of each, the oldest first."""
    found = [
        earlier(f"2026-11-{day:02d}", scores(day, shift, **how))
        for day, shift in enumerate(shifts, start=1)
    ]
    return found[::-1]


def verdicts(tonight: Sequence[Value], before: Sequence[Earlier], nights: int = 7, **how: Any):
    found, _ = compared("ours", {DIMENSION: tonight}, before, nights=nights)
    return {c.against: c for c in judged(found, **how)}


def test_a_fall_beyond_its_noise_is_a_regression_with_its_numbers() -> None:
    found = verdicts(scores(99, -0.05), history([0.0]))
    (one,) = found.values()
    assert one.verdict == "worse" and one.has_regressed
    d = one.difference
    assert d.mean == pytest.approx(-0.05, abs=0.015) and d.low < d.mean < d.high < 0
    assert d.p_adjusted < 0.05 and d.num_prompts == PROMPTS
    assert verdicts(scores(99, 0.05), history([0.0]))["previous"].verdict == "better"


def test_nights_without_a_change_are_rarely_called_different() -> None:
    """In 2 to 8 % of nights, as the README says, better or worse."""
    called = 0
    for n in range(80):
        before = [earlier(f"2026-11-0{3 - k}", scores(9 * n + k)) for k in (1, 2)]
        called += any(c.verdict != "same" for c in verdicts(scores(1000 + n), before).values())
    assert 0.02 <= called / 80 <= 0.08


def test_a_slow_decline_is_caught_by_the_window_and_not_by_the_night_before() -> None:
    falls = [-0.004 * day for day in range(8)]
    found = verdicts(scores(8, falls[-1]), history(falls[:-1]))
    assert found["previous"].verdict == "same"
    assert found["window"].verdict == "worse"
    assert len(found["window"].nights) == 7
    assert found["window"].nights_told == "the mean of 7 exports since 2026-11-01"
    short = verdicts(scores(8, falls[-1]), history(falls[:-1]), nights=1)
    assert all(not c.has_regressed for c in short.values())


def test_a_regression_stays_named_until_it_is_mended() -> None:
    """Nights that regressed are no measure: after ten bad ones the good ones still are."""
    before = history([0.0, 0.0, 0.0] + [-0.05] * 10)
    for one in before[:10]:
        one.regressed = [DIMENSION]
    bad = verdicts(scores(50, -0.05), before)
    assert bad["previous"].verdict == "same"
    assert bad["window"].verdict == "worse" and bad["window"].nights[0] == "2026-11-03"
    mended = verdicts(scores(51), before)
    assert mended["previous"].verdict == "better" and mended["window"].verdict == "same"


def test_too_few_prompts_are_said_and_never_pass_for_well() -> None:
    (one,) = verdicts(scores(9, -0.2, prompts=7), history([0.0], prompts=7)).values()
    assert one.verdict == "too few" and one.needed == 8
    told = report(comparisons=[one]).sentences()
    assert any("cannot be told" in line and "7 prompts, 8 needed" in line for line in told)
    assert told[0] == "nothing can be told: 1 comparisons of too few prompts"
    assert "no earlier night" in report().sentences()[0]


def test_what_many_tests_need_is_stated_and_a_huge_fall_is_found_with_as_many() -> None:
    """N prompts that all fall happen by chance once in 2 ** (N - 1); of 64 tests 12 are enough."""
    assert (needed(1), needed(8), needed(64)) == (8, 9, 12)

    def found(prompts: int) -> list[Comparison]:
        made = []
        for model in range(64):
            shift = -0.2 if model == 0 else 0.0
            tonight = {DIMENSION: scores(model, shift, prompts=prompts)}
            before = [earlier("2026-11-01", scores(500 + model, prompts=prompts))]
            made += compared(str(model), tonight, before, nights=7)[0]
        return judged(made)

    assert [c.model for c in found(12) if c.has_regressed] == ["0"]
    few = found(9)
    assert not any(c.has_regressed for c in few)
    assert {c.verdict for c in few} == {"too few"}
    assert any("9 prompts, 12 needed" in line for line in report(comparisons=few).sentences())


def test_more_drift_is_worse_and_a_tolerated_fall_is_none() -> None:
    name = "drift:imaging_quality"
    before = [Earlier(date="2026-11-01", columns=[name], read=lambda: {name: scores(1)})]
    for shift, verdict in ((0.05, "worse"), (-0.05, "better")):
        (one,) = judged(compared("ours", {name: scores(2, shift)}, before, nights=7)[0])
        assert one.verdict == verdict
    (one,) = verdicts(scores(2, -0.05), history([0.0]), tolerance=0.1).values()
    assert one.verdict == "same"


def test_videos_that_lose_their_score_are_named_even_where_the_rest_is_better() -> None:
    tonight = scores(2, 0.1)
    for n in range(3):
        tonight[n] = dataclasses.replace(tonight[n], score=None, error="a truncated file")
    before = history([0.0, 0.0])
    before[1].read = lambda: {DIMENSION: tonight}  # which had lost the same
    found, losses = compared("ours", {DIMENSION: tonight}, before, nights=7)
    assert [(x.num_lost, x.num_expected, x.night, x.why) for x in losses] == [
        (3, PROMPTS, "2026-11-02", "a truncated file")
    ]
    assert found[0].difference.num_prompts == PROMPTS - 3
    assert report(losses=losses).exit_code == 3
    none = [dataclasses.replace(v, score=None, error="no weights") for v in tonight]
    _, (first,) = compared("ours", {DIMENSION: none}, [], nights=7)
    assert (first.num_lost, first.night) == (PROMPTS, None)


def test_the_mean_of_nights_is_of_each_video() -> None:
    one, two = scores(1), scores(2)
    two[0] = dataclasses.replace(two[0], score=None)
    made = averaged([one, two])
    assert made[0].score == one[0].score
    assert made[1].score == pytest.approx((one[1].score + two[1].score) / 2)


def report(
    comparisons: Sequence[Comparison] = (), losses: Sequence[Loss] = (), **given: Any
) -> Report:
    score = Score(
        dimension=DIMENSION, value=0.9, stderr=0.01, num_videos=40, num_prompts=40,
        num_expected=40, num_failed=0, fingerprint="f",
    )  # fmt: skip
    model = ModelNight(
        name="ours", kind="export", checkpoint="3f9a", at="/secret/place", export="e",
        unchanged_since=None, run_id="r", is_tiny=False, num_made=40, scores=(score,),
    )  # fmt: skip
    return Report(
        **{
            "date": "2026-11-21", "recipe": "custom", "asked": "a", "suite": "<b>prompts</b>",
            "num_prompts": 40, "seconds": 1.0, "num_scored": 40, "nights": 7, "tolerance": 0.0,
            "since": None, "models": (model,), "comparisons": tuple(comparisons),
            "losses": tuple(losses), **given,
        }
    )  # fmt: skip


def regressed() -> Report:
    return report(list(verdicts(scores(99, -0.05), history([0.0, 0.0])).values()))


def test_a_report_is_read_back_as_it_was_stored() -> None:
    one = regressed()
    assert Report.of(json.loads(json.dumps(one.to_dict()))) == one
    assert one.exit_code == 3 and report().exit_code == 0


def test_a_night_of_several_runs_counts_what_all_of_them_measured() -> None:
    other = dataclasses.replace(report().models[0], name="base")
    both = Report.merged([report(), report(models=(other,)), report(seconds=5.0)], ["ours", "base"])
    assert (both.num_scored, both.seconds) == (80, 2.0)
    assert [model.name for model in both.models] == ["ours", "base"]


def test_the_page_needs_nothing_else_and_names_the_regression(tmp_path: Path) -> None:
    points = [
        TrendPoint(
            date=f"2026-11-{day}", model="ours", dimension=DIMENSION, value=0.9 - 0.01 * (day > 20),
            stderr=0.01, num_videos=40, run_id="r", regressed=day > 20,
        )
        for day in range(15, 22)
    ]  # fmt: skip
    one = regressed()
    written = night_page.write(one, points, str(tmp_path / "out"))
    assert [Path(w).name for w in written] == ["report.md", "report.json", "report.html"]
    page = Path(written[2]).read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*(?!["']?#)|@import|url\((?!#)|<script""", page)
    assert "&lt;b&gt;prompts" in page and "<b>prompts" not in page
    assert page.count("<svg") == 1 and "Temporal Flickering fell" in page
    said = json.loads(Path(written[1]).read_text())
    assert said["exit_code"] == 3 and len(said["trend"]) == 7
    text = Path(written[0]).read_text()
    assert "1 regression" in text and "WORSE than 2026-11-02" in text
    assert f"{one.regressions[0].difference.mean:+.4f}" in text


Answer = Callable[[BaseHTTPRequestHandler, bytes], tuple[int, str, bytes]]


@contextmanager
def listening(answer: Answer) -> Iterator[str]:
    """A server on this machine; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, kind, content = answer(self, body)
            try:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # who asked was killed
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_webhook_is_told_names_and_numbers_and_its_address_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(webhook, "_BACKOFF_S", 0.01)
    caplog.set_level(logging.INFO)
    got: list[dict[str, Any]] = []
    statuses = [503, 200, 404]

    def answer(_: BaseHTTPRequestHandler, body: bytes) -> tuple[int, str, bytes]:
        got.append(json.loads(body))
        return statuses.pop(0), "text/plain", b""

    loss = Loss(
        model="ours", dimension="color", num_lost=2, num_expected=40, night="2026-11-20",
        why="/secret/place is full",
    )  # fmt: skip
    one = dataclasses.replace(regressed(), losses=(loss,))
    with listening(answer) as url:
        assert webhook.post(f"{url}/hook-of-mine", webhook.told(one))
        assert len(got) == 2 and got[0] == got[1]
        assert not webhook.post(f"{url}/hook-of-mine", webhook.told(one))
        assert len(got) == 3, "what is refused for good is not tried again"
    assert not webhook.post(f"{url}/hook-of-mine", webhook.told(one))  # nobody listens
    said = got[0]
    assert said["status"] == "regressed" and "1 regression and 1 dimension lost" in said["text"]
    first = one.regressions[0].difference
    assert said["regressions"][0]["difference"] == first.mean
    assert said["regressions"][0]["p"] == first.p_adjusted
    assert said["lost"][0]["num_lost"] == 2
    everything = json.dumps(got)
    assert "secret" not in everything and "prompt 1" not in everything
    warned = [r.getMessage() for r in caplog.records]
    assert sum("webhook" in line for line in warned) == 2
    assert not any("hook-of-mine" in line or url in line for line in warned)


def test_a_hook_that_answers_for_ever_holds_no_night(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            asked, _ = server.accept()
            with asked, contextlib.suppress(OSError):  # who asked has gone
                asked.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n")
                for _ in range(50):
                    time.sleep(0.1)
                    asked.sendall(b".")

        threading.Thread(target=drip, daemon=True).start()
        began = time.monotonic()
        assert webhook.post(f"http://127.0.0.1:{server.getsockname()[1]}", {})
    assert time.monotonic() - began < 3


def test_what_a_night_comes_to_is_posted_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A failure, and a deadline, too; not what another scheduler does instead."""
    from evals import __main__ as evals

    got: list[dict[str, Any]] = []
    statuses = iter((404, 200))

    def answer(_: BaseHTTPRequestHandler, body: bytes) -> tuple[int, str, bytes]:
        got.append(json.loads(body))
        return next(statuses, 200), "text/plain", b""

    def ends(what: Report | BaseException, **given: Any) -> None:
        def night(*_: object) -> Report:
            if isinstance(what, BaseException):
                raise what
            return what

        monkeypatch.setattr(evals, "_night", night)
        args = evals.Nightly(recipe="custom", dst=str(tmp_path), **given)
        ended = pytest.raises(type(what)) if isinstance(what, BaseException) else None
        with ended or contextlib.nullcontext():
            evals.nightly(args)

    with listening(answer) as url:
        monkeypatch.setenv(webhook.VARIABLE, url)
        ends(regressed())  # nobody took it
        ends(regressed())
        ends(regressed())
        ends(report())
        assert [said["status"] for said in got] == ["regressed", "regressed"]
        ends(report(date="2026-11-22", models=()), webhook_always=True)
        ends(ValueError("/secret/place is full"))
        ends(KeyboardInterrupt())
        assert [said["status"] for said in got[2:]] == ["passed", "failed", "failed"]
        for error in (InUse("in use"), LeaseLost("taken over")):
            ends(error)
    assert len(got) == 5 and "secret" not in json.dumps(got)
    assert got[3]["date"] == nightly.today() and "was stopped" in got[4]["text"]


def test_an_address_is_taken_from_the_environment_and_never_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(webhook.VARIABLE, raising=False)
    assert webhook.address(None) is None
    monkeypatch.setenv(webhook.VARIABLE, "https://chat.example/secret")
    assert webhook.address(None) == "https://chat.example/secret"
    for bad in ("file:///secret", "secret", "https://"):
        with pytest.raises(ValueError, match="https://") as error:
            webhook.address(bad)
        assert "secret" not in str(error.value)


def export(folder: Path, made_at: int, weights: bytes = b"weights") -> Path:
    """The files of an export, with the model card that `trainers.export` writes."""
    folder.mkdir(parents=True)
    (folder / "pipeline.json").write_text(json.dumps({"format": 1, "system": "mimir"}))
    (folder / "part.safetensors").write_bytes(weights)
    (folder / "training.json").write_text("{}")
    card = Card(
        title="A", paper="B", models={"base": "c"}, usage="", files={"part.safetensors": "weights"}
    )
    words = model_card(card, train_recipe("tiny_mimir"), {}, _checksums(folder), folder.name)
    (folder / "README.md").write_text(words)
    os.utime(folder / "training.json", (made_at, made_at))
    return folder


def test_the_newest_whole_export_is_taken(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    export(runs / "ours" / "step-1000", 1)
    good = export(runs / "ours" / "step-2000", 2)
    export(runs / "base", 1)
    half = export(runs / "ours" / "step-3000", 3)
    (half / "part.safetensors").write_bytes(b"weig")
    shutil.copytree(good, runs / "ours" / ".step-4000-123")
    copied = export(runs / "ours" / "step-5000", 5)
    (copied / "README.md").unlink()
    said: list[str] = []
    found, _ = exports.models_in([str(runs)], said.append)
    assert list(found) == ["base", "ours"]
    assert exports.newest("ours", found["ours"], said.append) == good
    assert len(said) == 2 and "README.md" in said[0] and "part.safetensors" in said[1]
    assert exports.newest("base", found["base"], said.append) == runs / "base"
    named = exports.models_in([f"mine={runs / 'ours'}"], said.append)
    assert named == ({"mine": runs / "ours"}, frozenset())
    assert len(said) == 2


def test_a_night_that_died_goes_on_with_the_export_that_it_began_with(tmp_path: Path) -> None:
    begun = export(tmp_path / "ours" / "step-1", 1)
    newer = export(tmp_path / "ours" / "step-2", 2)
    tonight = nightly.Tonight(
        root=str(tmp_path), date="2026-11-21", recipe="custom", asked="a", models={},
        exports={"ours": tmp_path / "ours"},
    )  # fmt: skip
    plan = plan_of(1, models=({"name": "ours", "at": str(begun)},))
    died = night_of(21, plan, finished=False, report=None)
    other = dataclasses.replace(died, asked="a try-out")
    assert nightly.where(tonight, "ours", [other], print) == f"ours={newer}"
    assert nightly.where(tonight, "ours", [], print) == f"ours={newer}"
    assert nightly.where(tonight, "ours", [died], print) == f"ours={begun}"
    (begun / "part.safetensors").unlink()
    assert nightly.where(tonight, "ours", [died], print) == f"ours={newer}"


def plan_of(num: int, **given: Any) -> Plan:
    """Of so many prompts."""
    prompts = [Prompt(prompt=f"prompt {n}", text="", dimensions=(DIMENSION,), samples=1)
               for n in range(num)]  # fmt: skip
    return Plan(
        **{
            "recipe": "custom", "suite": Suite(name="", source="", prompts=tuple(prompts)),
            "models": ({"name": "ours"},), "dimensions": (DIMENSION,), "seed": 0, "clips": False,
            "metrics": {DIMENSION: {"fingerprint": "f"}}, "drift": (), "is_tiny": False,
            "is_filtered": False, **given,
        }
    )  # fmt: skip


def night_of(day: int, plan: Plan, *, export: str = "e", **given: Any) -> Night:
    (model,) = report().models
    said = {"asked": "a", "models": (dataclasses.replace(model, export=export),)}
    values = {"asked": "a", "finished": True, "report": report(**said), "read": lambda: plan}
    return Night(date=f"2026-11-{day:02d}", run_id="r", **values | given)


def tonight_of(root: Path, **given: Any) -> nightly.Tonight:
    """The night of 21 November."""
    values = {"models": {"ours": "/videos"}, "exports": {}}
    return nightly.Tonight(
        root=str(root), date="2026-11-21", recipe="custom", asked="a", **values | given
    )


def test_a_try_out_hides_no_night(tmp_path: Path) -> None:
    full, quick = plan_of(40), plan_of(8)

    def against(*before: Night) -> tuple[list[str], str | None]:
        found, same = nightly._earlier(tonight_of(tmp_path), full, "ours", "now", before)
        assert all(one.columns == {DIMENSION} for one in found)
        return [one.date[-2:] for one in found], same

    before = night_of(20, full, export="old")
    assert against(night_of(20, quick, export="old"), before) == (["20"], None)
    assert against(night_of(20, quick, export="now"), before) == (["20"], None)
    weights = dataclasses.replace(full, metrics={DIMENSION: {"fingerprint": "of others"}})
    assert against(night_of(20, weights, export="old"), before) == (["20"], None)
    assert against(before, night_of(19, full, export="old")) == (["20"], None)
    unchanged = night_of(19, full, export="now")
    assert against(night_of(20, quick, export="old"), unchanged) == ([], "2026-11-19")
    assert against(before, unchanged) == (["20"], None)


def test_what_old_nights_asked_for_is_not_read(tmp_path: Path) -> None:
    read, full = list[int](), plan_of(40)

    def night(number: int) -> Night:
        return night_of(1, full, export=str(number), read=lambda: read.append(number) or full)

    found, _ = nightly._earlier(tonight_of(tmp_path), full, "ours", "e", [*map(night, range(99))])
    assert len(found) == 7 and read == list(range(7))


def stored(root: Path, run_id: str, report: Report | None, plan: Plan, **counts: Any) -> None:
    """A night in `runs`, finished where it has a report."""
    create(str(root), "evaluation")
    said = counts | ({"night": report.to_dict()} if report else {})
    Writer(str(root), run_id).add_run(
        {
            "run_id": run_id,
            "recipe": f"{KIND}custom",
            "night": "2026-11-21",
            "resolved": plan.resolved(),
            "started_at": datetime.datetime.now(datetime.UTC),
            "interrupted": report is None,
            "counts": json.dumps(said),
        }
    )


def test_nights_of_one_date_are_told_apart_by_what_they_asked_for(tmp_path: Path) -> None:
    full, quick = plan_of(40), plan_of(8)
    (model,) = report().models
    few = dataclasses.replace(model, scores=(dataclasses.replace(model.scores[0], num_videos=8),))
    for n in range(2):
        stored(tmp_path, f"full {n}", report() if n else None, full, asked="a")
        stored(tmp_path, f"quick {n}", report(asked="b", models=(few,)), quick, asked="b")
        names = [night.run_id for night in nights_of(str(tmp_path))]
        assert names == (["quick 1", "full 1", "quick 0"] if n else ["quick 0", "full 0"])
        assert [p.num_videos for p in trend(str(tmp_path))] == [40 if n else 8]
    plans = [night.plan.suite for night in nights_of(str(tmp_path))]
    assert plans == [quick.suite, full.suite, quick.suite]


def request_of(root: Path) -> Request:
    video = Model(name="ours", kind="folder", at="/videos")
    suite = plan_of(1).suite
    return Request(
        root=str(root), recipe=recipe("custom"), suite=suite, models=(video,), metrics=()
    )


def test_a_night_that_another_scheduler_does_meanwhile_is_not_done_twice(tmp_path: Path) -> None:
    def request(_: Sequence[str]) -> Request:
        stored(tmp_path, "faster", report(), plan_of(1))
        return request_of(tmp_path)

    said: list[str] = []
    found = nightly.night(
        tonight_of(tmp_path), request, connect=lambda: pytest.fail("done twice"), say=said.append
    )
    assert found == report() and "is done for ours" in said[-1]
    assert read(str(tmp_path), "runs").count_rows() == 1


def test_a_run_is_recorded_anew_in_one_commit(tmp_path: Path) -> None:
    create(str(tmp_path), "evaluation")
    writer = Writer(str(tmp_path), "r")
    running = _Running(request_of(tmp_path), writer, pytest.fail, print, contextlib.ExitStack())
    versions = []
    for seconds in (None, 1.0):
        running.record(seconds=seconds, counts={})
        versions.append(writer.table("runs").version)
    assert versions[1] == versions[0] + 1
    (row,) = writer.table("runs").to_table(columns=["seconds", "interrupted"]).to_pylist()
    assert row == {"seconds": 1.0, "interrupted": False}


def prompts_file(folder: Path, num: int = 1) -> Path:
    path = folder / "prompts.txt"
    path.write_text("".join(f"scene {n}\n" for n in range(num)))
    return path


def test_folders_without_an_export_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    with pytest.raises(ValueError, match="no finished export"):
        exports.newest("ours", tmp_path / "ours", print)
    for bad in ("s3://bucket/exports", str(tmp_path / "nowhere"), str(tmp_path / "ours")):
        with pytest.raises(ValueError, match="--exports"):
            exports.models_in([bad], print)
    with pytest.raises(ValueError, match="two models"):
        exports.models_in([str(tmp_path), f"ours={tmp_path}"], print)


def test_a_folder_without_an_export_holds_up_no_other_model(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    good = export(runs / "good" / "step-1", 1)
    for name in ("lost+found", "new"):
        (runs / name).mkdir()
    shutil.copytree(good, runs / "first" / "step-1", ignore=lambda *_: ["part.safetensors"])
    said: list[str] = []
    folders, optional = exports.models_in([str(runs)], said.append)
    assert list(folders) == ["first", "good", "new"]
    assert len(said) == 1 and "lost+found is passed over" in said[0]
    tonight = tonight_of(tmp_path, models={}, exports=folders, optional=optional)
    found = [nightly.where(tonight, name, [], said.append) for name in folders]
    assert found == [None, f"good={good}", None]
    assert sum("is passed over: model" in line for line in said) == 2
    asked_for, _ = exports.models_in([f"new={runs / 'new'}"], print)
    with pytest.raises(ValueError, match="no finished export"):
        nightly.where(tonight_of(tmp_path, models={}, exports=asked_for), "new", [], print)
    alone = tonight_of(tmp_path, models={}, exports={"new": runs / "new"}, optional=["new"])
    with pytest.raises(ValueError, match="none has a finished export"):
        nightly.night(alone, pytest.fail, connect=pytest.fail)


class Endpoint:
    """Makes videos that flicker by so much, and counts those it gave by weights and prompt."""

    def __init__(self) -> None:
        self.checkpoint, self.flicker, self.seed = "", 0.0, 0
        self.given: Counter[tuple[str, str]] = Counter()
        self.most = 10**6
        """Videos before it keeps who asks waiting."""
        self.go = threading.Event()
        self._lock = threading.Lock()

    def answer(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, str, bytes]:
        if handler.command == "GET":
            said = {"checkpoint": self.checkpoint, "model": "test", "settings": {}}
            return 200, "application/json", json.dumps(said).encode()
        prompt = json.loads(body)["prompt"]
        with self._lock:
            waits = sum(n for (of, _), n in self.given.items() if of == self.checkpoint)
            waits = waits >= self.most
            if not waits:
                self.given[self.checkpoint, prompt] += 1
        if waits:
            self.go.wait(60)
            return 503, "text/plain", b""
        return 200, "video/mp4", mp4(prompt, self.seed, self.flicker)


def mp4(prompt: str, seed: int, flicker: float) -> bytes:
    from trainers.videos import write_mp4

    rng = np.random.default_rng([seed, *prompt.encode()])
    tile = np.random.default_rng([*prompt.encode()]).integers(60, 190, (4, 4, 3), np.uint8)
    still = tile.repeat(16, 0).repeat(16, 1).astype(float)
    frames = [still + rng.normal(0, 2) + flicker * (-1) ** t for t in range(6)]
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"nightly-{os.getpid()}-{time.time_ns()}.mp4"
    try:
        write_mp4(path, np.clip(frames, 0, 255).astype(np.uint8), 8.0)
        return path.read_bytes()
    finally:
        path.unlink(missing_ok=True)


def fill(folder: Path, num: int, flicker: float) -> None:
    for n in range(num):
        (folder / f"scene {n}-0.mp4").write_bytes(mp4(f"scene {n}", 7, flicker))


@dataclasses.dataclass
class Nights:
    """The command as a scheduler runs it."""

    cluster: Cluster
    root: Path
    models: tuple[str, ...]
    prompts: Path
    hook: str
    capsys: pytest.CaptureFixture[str]
    err: str = ""

    def line(self, day: int, *more: object) -> list[str]:
        found = [
            "nightly", "tiny_custom", "--models", *self.models, "--prompts", self.prompts,
            "--samples", 1, "--dimensions", DIMENSION, "--dst", self.root, "--date",
            f"2026-11-{day}", "--commit-every-s", 0.05, "--workers", 1, "--json", *more,
        ]  # fmt: skip
        return [str(part) for part in found]

    def start(self, day: int, *more: object) -> subprocess.Popen[str]:
        env = {
            webhook.VARIABLE: self.hook,
            "XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"],
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            [sys.executable, "-m", "evals", *self.line(day, *more)], cwd=REPOSITORY,
            env=self.cluster.env | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, day: int, *more: object, code: int = 0, busy: bool = True) -> dict[str, Any]:
        """In this process, on the session's Ray; where nothing is to do, without it."""
        from evals import __main__ as evals

        idle = contextlib.nullcontext() if busy else None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evals, "connected", lambda _: idle or pytest.fail("nothing is to do"))
            patch.setattr(sys, "argv", ["evals", *self.line(day, *more)])
            patch.setenv(webhook.VARIABLE, self.hook)
            self.capsys.readouterr()
            try:
                ended: object = evals.main()
            except SystemExit as stop:
                ended = stop.code
        said = self.capsys.readouterr()
        self.err = said.err
        assert ended == code, said.err
        assert self.hook not in said.out + said.err
        return json.loads(said.out) if said.out else {}

    def count(self, table: str, where: str | None = None) -> int:
        try:
            return read(str(self.root), table).count_rows(where)
        except (DatasetError, OSError):
            return 0


@pytest.mark.slow
def test_three_nights_one_killed_half_way_and_one_with_a_planted_regression(
    cluster: Cluster,
    connection: None,
    tiny_cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made, posted = Endpoint(), list[dict[str, Any]]()
    base, num = tmp_path / "base", 12
    prompts = prompts_file(tmp_path, num)
    base.mkdir()
    fill(base, num, flicker=1.0)

    def hook(_: BaseHTTPRequestHandler, body: bytes) -> tuple[int, str, bytes]:
        posted.append(json.loads(body))
        return 200, "text/plain", b"ok"

    with listening(made.answer) as url, listening(hook) as address:
        models = (f"ours={url}", f"base={base}")
        hidden = f"{address}/secret-hook"
        nights = Nights(cluster, tmp_path / "evals", models, prompts, hidden, capsys)

        made.checkpoint, made.flicker, made.seed = "night-1", 1.0, 1
        said = nights.run(11)
        assert said["comparisons"] == [] and "nothing was compared" in said["sentences"][0]
        assert (nights.count("generations"), nights.count("scores")) == (2 * num, 2 * num)

        made.checkpoint, made.seed, made.most = "night-2", 2, 5
        process = nights.start(12)
        ours = "checkpoint = 'night-2'"
        try:
            deadline = time.monotonic() + 250
            while nights.count("generations", ours) < 3:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            nights.run(12, code=2)
        finally:
            process.kill()
            process.communicate()
        last = nights.err.splitlines()[-1]
        assert last.startswith("error: ") and "in use by run" in last
        table = read(str(nights.root), "generations")
        kept = table.to_table(columns=["prompt"], filter=ours)["prompt"].to_pylist()
        assert 3 <= len(kept) <= made.most
        made.most = 10**6
        made.go.set()
        (killed, first) = nights_of(str(nights.root))
        assert (killed.date, killed.finished, first.finished) == ("2026-11-12", False, True)
        assert {p.date for p in trend(str(nights.root))} == {"2026-11-11"}
        said = nights.run(12)
        times = {
            scene: made.given["night-2", scene] for scene in prompts.read_text().split("\n")[:-1]
        }
        assert [times[scene] for scene in kept] == [1] * len(kept), (
            "what was stored is not made again"
        )
        assert sum(times.values()) - num <= 5 - len(kept), "what was not, once more"
        assert said["models"][0]["num_made"] == num - len(kept)
        assert nights.count("generations", ours) == num
        assert said["models"][1]["unchanged_since"] == "2026-11-11"
        assert said["num_scored"] == num and nights.count("scores") == 3 * num
        ids = read(str(nights.root), "scores").to_table(columns=["score_id"])["score_id"]
        assert len(set(ids.to_pylist())) == 3 * num
        assert [c["verdict"] for c in said["comparisons"]] == ["same"]
        found = nights_of(str(nights.root), "tiny_custom")
        assert [(n.date, n.finished) for n in found] == [("2026-11-12", True), ("2026-11-11", True)]
        assert posted == []

        made.checkpoint, made.flicker, made.seed = "night-3", 9.0, 3
        fill(base, num, flicker=5.0)  # what it held before is in no table any more
        out = tmp_path / "out"
        third = nights.run(13, "--out", out, code=3)
        bad = [c for c in third["comparisons"] if c["verdict"] == "worse"]
        assert [(c["model"], c["nights"]) for c in bad] == [
            ("ours", ["2026-11-12"]),
            ("ours", ["2026-11-12", "2026-11-11"]),
            ("base", ["2026-11-12"]),
        ]
        assert bad[2]["difference"]["mean"] == pytest.approx(-8 / 255, abs=0.01)
        d = bad[0]["difference"]
        assert d["mean"] == pytest.approx(-16 / 255, abs=0.01)  # 18 levels a frame, before 2
        assert d["high"] < 0 and d["p_adjusted"] < 0.05 and d["num_prompts"] == num
        assert f"{d['mean']:+.4f}" in (out / "report.md").read_text()
        assert "MEANINGLESS" in (out / "report.html").read_text()
        (message,) = posted
        assert [x["model"] for x in message["regressions"]] == ["ours", "base"]
        assert "MEANINGLESS" in message["text"]
        assert message["status"] == "regressed" and "Temporal Flickering" in message["text"]
        assert message["regressions"][0]["difference"] == d["mean"]

        before = made.given.copy()
        tables = {t: nights.count(t) for t in ("generations", "scores", "runs")}
        again = nights.run(13, code=3, busy=False)
        assert "is done for base, ours: not done again" in nights.err
        assert again["comparisons"] == third["comparisons"]
        assert made.given == before and len(posted) == 1
        assert tables == {t: nights.count(t) for t in tables}

        unchanged = nights.run(14, code=3, busy=False)
        assert unchanged["models"][0]["unchanged_since"] == "2026-11-13"
        assert made.given == before, "the same weights make no video again"
        accepted = nights.run(15, "--since", "2026-11-13", busy=False)
        assert accepted["comparisons"] == []
    points = [p for p in trend(str(nights.root)) if p.model == "ours"]
    assert [(p.date, p.regressed) for p in points] == [
        ("2026-11-11", False), ("2026-11-12", False), ("2026-11-13", True), ("2026-11-14", True),
        ("2026-11-15", False),
    ]  # fmt: skip
    assert points[2].value < points[1].value - 0.04 and all(p.num_videos == num for p in points)
    stored = [
        path.read_bytes()
        for table in ("runs", "generations", "scores")
        for path in (nights.root / f"{table}.lance").rglob("*")
        if path.is_file()
    ]
    assert not any(b"secret-hook" in content for content in stored)


@pytest.mark.slow
def test_what_is_wrong_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from evals.__main__ import main

    (tmp_path / "prompts.txt").write_text("a cat\n")
    (tmp_path / "empty").mkdir()
    monkeypatch.delenv(webhook.VARIABLE, raising=False)

    def line(*arguments: object) -> str:
        flags = ["--prompts", tmp_path / "prompts.txt", "--dst", tmp_path / "evals"]
        words = ["evals", "nightly", "tiny_custom", *arguments, *flags]
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(said) == 1 and said[0].startswith("error: "), said
        return said[0]

    assert "no model" in line()
    assert "NAME=FOLDER" in line("--models", tmp_path)
    assert "YYYY-MM-DD" in line("--models", f"a={tmp_path}", "--date", "20261121")
    assert "--nights 0" in line("--models", f"a={tmp_path}", "--nights", 0)
    assert "no finished export" in line("--exports", f"empty={tmp_path / 'empty'}")
    assert "https://" in line("--models", f"a={tmp_path}", "--webhook", "ftp://hidden")
    assert not (tmp_path / "evals").exists()
