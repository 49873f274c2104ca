"""Operators over stored clips, on Ray: who is measured, in what batches, what a change redoes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gauges
import pyarrow as pa
import pytest
import ray.cloudpickle
from conftest import Curate, rows
from gauges import Fussy, Lightness, Speaker, Unready, asked

from engine import chain
from engine.gauge import Unloadable, attempt
from engine.operator import Failed, Operator, Rule, Stage, results
from engine.tables import Writer


@pytest.fixture(autouse=True)
def by_value() -> Iterator[None]:
    """The workers cannot import the folder of the tests."""
    ray.cloudpickle.register_pickle_by_value(gauges)
    yield
    ray.cloudpickle.unregister_pickle_by_value(gauges)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    folder = tmp_path / "log"
    folder.mkdir()
    return folder


def stages(log: Path, *, scale: float = 10.0, lo: float = 4.0, **fussy: Any) -> tuple[Stage, ...]:
    return (
        Stage(
            name="aesthetic",
            operators=(Lightness(log=str(log), scale=scale),),
            rules=(Rule(column="aesthetic_score", lo=lo),),
        ),
        Stage(
            name="watermark",
            operators=(Fussy(log=str(log), **fussy),),
            rules=(Rule(column="watermark_score", hi=0.55),),
        ),
        Stage(name="recaption", operators=(Speaker(log=str(log)),)),
    )


def by_name(dst: Path) -> dict[str, dict[str, Any]]:
    """Clips by the file they are of, the first of each."""
    found: dict[str, dict[str, Any]] = {}
    for row in sorted(rows(dst, "clips"), key=lambda r: r["start_s"] or 0):
        found.setdefault(Path(row["source_uri"]).stem, row)
    return found


@pytest.fixture
def few(samples: Path, tmp_path: Path) -> Path:
    """Videos of which each stage keeps some and rejects some; the basic one takes one."""
    folder = tmp_path / "few"
    folder.mkdir()
    names = "coffee_pan.mp4 rotated_upright.mp4 square.mp4 astronaut_zoom.mp4 shapes.mp4 grass.webm"
    for name in (*names.split(), "retina.avi", "two_to_one.mp4", "vfr.mp4", "portrait.mp4"):
        (folder / name).symlink_to(samples / name)
    return folder


def test_measures_survivors_alone_stage_by_stage_and_the_accounts_balance(
    curate: Curate, few: Path, tmp_path: Path, log: Path
) -> None:
    result = curate(few, tmp_path / "set", further=stages(log))
    assert not result.accounts.faults
    clips = rows(tmp_path / "set", "clips")
    states = Counter(c["state"] for c in clips)
    assert states["kept"] and states["rejected"] and not states["failed"] and not states["pending"]
    before = {c["clip_id"] for c in clips if c["stage"] not in ("basic", "quality")}
    passed = {c["clip_id"] for c in clips if c["stage"] is None or c["stage"] == "watermark"}
    kept = {c["clip_id"] for c in clips if c["kept"]}
    assert before > passed > kept, "each stage takes some"
    assert sorted(asked(log, "Lightness")) == sorted(before)
    assert sorted(asked(log, "Fussy")) == sorted(passed)
    assert sorted(asked(log, "Speaker")) == sorted(kept)
    for clip in clips:
        assert (clip["aesthetic_score"] is not None) == (clip["clip_id"] in before)
        if clip["kept"]:
            assert clip["watermark_score"] == pytest.approx(clip["aesthetic_score"] / 10)
            assert clip["caption"].startswith(f"{clip['aesthetic_score']:.1f} over ")
            assert int(clip["caption"].split()[-1]) >= 3, "all keyframes of the clip"
            assert clip["caption_raw"] == f'"{clip["caption"]}"'
    assert result.measured["Lightness"].rows == len(before)

    again = curate(few, tmp_path / "set", further=stages(log))
    assert again.frames_decoded == 0 and not again.accounts.faults
    assert len(asked(log, "Lightness")) == len(before), "nothing is measured twice"
    assert len(asked(log, "Speaker")) == len(kept)


def test_a_change_of_an_operator_redoes_its_stage_and_what_follows_and_decodes_nothing(
    curate: Curate, few: Path, tmp_path: Path, log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    curate(few, tmp_path / "set", further=stages(log))
    counts = {name: len(asked(log, name)) for name in ("Lightness", "Fussy", "Speaker")}
    result = curate(few, tmp_path / "set", further=stages(log, unless="another parameter"))
    assert "measured again" in caplog.text and "Fussy, Speaker" in caplog.text
    assert result.frames_decoded == 0 and not result.accounts.faults
    assert len(asked(log, "Lightness")) == counts["Lightness"]
    assert len(asked(log, "Fussy")) == 2 * counts["Fussy"]
    assert len(asked(log, "Speaker")) == 2 * counts["Speaker"]


def test_a_looser_threshold_makes_clips_pending_and_the_next_run_measures_only_those(
    curate: Curate, few: Path, tmp_path: Path, log: Path
) -> None:
    dst = tmp_path / "set"
    curate(few, dst, further=stages(log, lo=4.5))
    first = set(asked(log, "Fussy"))
    Writer(str(dst), "refilter").publish(
        (*_basic(), *stages(log, lo=3.0)),
    )
    pending = {c["clip_id"] for c in rows(dst, "clips") if c["state"] == "pending"}
    assert pending and not pending & first
    result = curate(few, dst, further=stages(log, lo=3.0))
    assert set(asked(log, "Fussy")) - first == pending
    assert len(asked(log, "Fussy")) == len(first | pending)
    assert result.frames_decoded == 0 and not result.accounts.faults


def _basic() -> tuple[Stage, ...]:
    from pipelines.recipes import CLASSIC

    return CLASSIC.stages[:2]


def test_measure_all_measures_the_rejected_too(
    curate: Curate, few: Path, tmp_path: Path, log: Path
) -> None:
    curate(few, tmp_path / "set", further=stages(log), measure_all=True)
    clips = rows(tmp_path / "set", "clips")
    assert any(c["state"] == "rejected" for c in clips)
    assert all(c["caption"] for c in clips if c["error_type"] is None)


def test_what_goes_wrong_costs_a_row_each_and_the_next_run_tries_what_may_pass(
    curate: Curate, few: Path, tmp_path: Path, log: Path
) -> None:
    dst, well = tmp_path / "set", tmp_path / "well"
    plain = (*stages(log)[:1], *stages(log)[2:])
    curate(few, tmp_path / "probe", further=plain)
    able = [n for n, c in by_name(tmp_path / "probe").items() if c["kept"]]
    raising, moody, killing, silent = able[:4]
    wrong = {
        "raises_on": raising,
        "fails_on": moody,
        "dies_on": killing,
        "gives_nothing_on": silent,
        "unless": str(well),
    }
    result = curate(few, dst, further=stages(log, **wrong))
    found = by_name(dst)
    errors = {n: (c["error_operator"], c["error_type"]) for n, c in found.items() if c["error"]}
    assert errors == {
        raising: ("Fussy", "ValueError"),
        moody: ("Fussy", "Moody"),
        killing: ("Fussy", "WorkerDied"),
        silent: ("Fussy", "NoValue"),
    }
    assert found[raising]["error"] == f"cannot stand {raising}"
    assert all(found[n]["state"] == "failed" and found[n]["stage"] == "watermark" for n in errors)
    assert all(found[n]["watermark_score"] is None for n in errors)
    others = [c for n, c in found.items() if n not in errors and c["watermark_score"] is not None]
    assert len(others) >= 2 and not result.accounts.faults
    assert {n for n, c in found.items() if c["error_transient"]} == {moody, killing}

    well.touch()
    curate(few, dst, further=stages(log, **wrong))
    found = by_name(dst)
    assert {n for n, c in found.items() if c["error"]} == {raising, silent}
    assert found[moody]["watermark_score"] is not None
    curate(few, dst, further=stages(log, **wrong), retry_failed=True)
    assert {n for n, c in by_name(dst).items() if c["error"]} == {silent}


def test_stopped_in_the_middle_it_goes_on_and_repeats_no_committed_measurement(
    curate: Curate, few: Path, tmp_path: Path, log: Path
) -> None:
    curate(few, tmp_path / "whole", further=stages(log))
    whole = rows(tmp_path / "whole", "clips")
    (log / "Lightness").unlink()

    def stop(progress: Any) -> None:
        if progress.doing == "measuring" and progress.done:
            raise KeyboardInterrupt

    result = curate(few, tmp_path / "set", further=stages(log), watch=stop)
    assert result.interrupted
    curate(few, tmp_path / "set", further=stages(log))
    assert rows(tmp_path / "set", "clips") == whole
    twice = [c for c, n in Counter(asked(log, "Lightness")).items() if n > 1]
    assert len(twice) <= 8, "only what was on its way when it was stopped"


def test_a_model_that_cannot_be_loaded_ends_the_run_with_its_name(
    curate: Curate, few: Path, tmp_path: Path, log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With that alone: Ray logs what failed behind it and nobody has read."""
    further = (Stage(name="watermark", operators=(Unready(log=str(log), batch_size=1),)),)
    for turn in range(2):
        with pytest.raises(Unloadable, match="Unready cannot be loaded: the file with its weights"):
            curate(few, tmp_path / f"set{turn}", further=further)
    gc.collect()
    time.sleep(6)  # Ray says so after five seconds
    assert not [r for r in caplog.records if "Unhandled" in r.getMessage()]


def test_batches_are_full_although_most_rows_are_rejected_before_them(
    curate: Curate, samples: Path, tmp_path: Path, log: Path
) -> None:
    """Seven in ten rows rejected: Ray's own batching fills 0.64 of the batches behind that."""
    further = (
        Stage(
            name="aesthetic",
            operators=(Lightness(log=str(log), batch_size=4),),
            rules=(Rule(column="aesthetic_score", lo=4.75),),
        ),
        Stage(name="recaption", operators=(Speaker(log=str(log), batch_size=4),)),
    )
    result = curate(
        samples,
        tmp_path / "set",
        scan={"shots": "none", "clip_seconds": 1.0},
        bounds=("num_frames.lo=1", "duration_s.lo=0"),
        further=further,
    )
    before, after = result.measured["Lightness"], result.measured["Speaker"]
    assert before.rows > 80 and 0.1 < after.rows / before.rows < 0.5
    assert before.fill >= 0.9 and after.fill >= 0.9
    sizes = [int(n) for n in (log / "Speaker.batches").read_text().split()]
    assert sizes.count(4) >= len(sizes) - 1


# What needs no cluster


def operator(**values: Any) -> Operator:
    return Fussy(log=str(values.pop("log", ".")), **values)


def test_only_the_rows_that_a_function_raises_on_fail() -> None:
    fussy = operator()
    rows = pa.table({"clip_id": list("abcdefg")})

    def function(table: pa.Table) -> pa.Table:
        if set(table["clip_id"].to_pylist()) & {"c", "f"}:
            raise OSError("the line is cut\nand more")
        return results(fussy.writes, [{"watermark_score": 0.5}] * table.num_rows)

    found = attempt(function, fussy, rows).to_pylist()
    assert [r["watermark_score"] for r in found] == [0.5, 0.5, None, 0.5, 0.5, None, 0.5]
    assert found[2]["error_type"] == "OSError" and found[2]["error"] == "the line is cut"
    assert found[2]["transient"] is True and found[0]["error_type"] is None


def test_a_failure_raised_keeps_its_own_words() -> None:
    def function(_: pa.Table) -> pa.Table:
        raise Failed("NoAnswer", "said 'perhaps'")

    (row,) = attempt(function, operator(), pa.table({"clip_id": ["a"]})).to_pylist()
    assert (row["error_type"], row["error"], row["transient"]) == (
        "NoAnswer",
        "said 'perhaps'",
        False,
    )


def test_a_key_changes_with_its_operator_and_with_what_comes_before_its_stage(log: Path) -> None:
    one, other = chain.keys(stages(log)), chain.keys(stages(log, unless="x"))
    assert one["aesthetic_score"] == other["aesthetic_score"]
    assert one["watermark_score"] != other["watermark_score"]
    assert one["caption"] != other["caption"]
    assert chain.keys(stages(log, lo=1.0)) == one, "a threshold is no part of it"
    more = Stage(name="w", operators=(Fussy(log=str(log), batch_size=99, num_gpus=1.0),))
    less = Stage(name="w", operators=(Fussy(log=str(log)),))
    assert chain.keys((more,)) == chain.keys((less,)), "nor is where it runs"


def test_in_a_stage_only_who_reads_what_changed_is_redone(log: Path) -> None:
    def key_of(scale: float) -> dict[str, str]:
        folder = str(log)
        of_stage = (Lightness(log=folder, scale=scale), Fussy(log=folder), Unready(log=folder))
        return chain.keys((Stage(name="one", operators=of_stage),))

    one, other = key_of(10.0), key_of(5.0)
    assert one["overlay_score"] == other["overlay_score"]
    assert one["watermark_score"] != other["watermark_score"]


SHARED_GPU = """
import sys
sys.path[:0] = {path!r}
import numpy as np, ray, ray.cloudpickle
import bench_measure as b
from engine.measuring import Measuring
from engine.operator import Rule, Stage
from engine.tables import Writer, create

ray.cloudpickle.register_pickle_by_value(b)
ray.init("local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
create({root!r}, "bench")
writer = Writer({root!r}, "bench")
b.ROWS = 300
writer.commit(sources=b._sources(), clips=b._clips(np.linspace(0, 1, 300)))
stages = (
    Stage(name="a", operators=(b.Draw(batch_size=64, num_gpus=0.5),),
          rules=(Rule(column="aesthetic_score", lo=0.5),)),
    Stage(name="b", operators=(b.Model(batch_size=64, num_gpus=1.0),)),
)
measuring = Measuring(writer, stages, connect=lambda: None, environment=())
measuring.drain(lambda: None)
print(measuring.tallies["Draw"].rows, measuring.tallies["Model"].rows)
"""


@pytest.mark.slow
def test_operators_that_need_a_whole_gpu_each_take_turns_on_the_only_one(tmp_path: Path) -> None:
    """Ray counts a GPU that is not there; nothing runs on it. Without turns this never ends."""
    root, path = str(tmp_path / "set"), [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", SHARED_GPU.format(path=path, root=root)],
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["300", "150"], done.stderr[-2000:]
