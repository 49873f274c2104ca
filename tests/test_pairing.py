"""RISE's quadruples: which clips get them, from what, and what becomes of them later."""

from __future__ import annotations

import contextlib
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gauges
import pytest
import ray.cloudpickle
from conftest import Curate, rows
from gauges import Length, Lightness, Longer, Short, asked

from engine.caption import Instruction
from engine.curation import Curation, Options
from engine.operator import Rule, Stage
from engine.pairing import Pairs
from engine.tables import Writer
from pipelines.recipes import CLASSIC

NAMES = "coffee_pan.mp4 coffee_pan.txt astronaut_zoom.mp4 astronaut_zoom.json shapes.mp4 vfr.mp4"


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


@pytest.fixture
def few(samples: Path, tmp_path: Path) -> Path:
    """Two videos with a caption beside, two without, one of which the basic stage rejects."""
    folder = tmp_path / "few"
    folder.mkdir()
    for name in (*NAMES.split(), "static.mp4"):
        (folder / name).write_bytes((samples / name).read_bytes())
    return folder


def light(log: Path) -> tuple[Stage, ...]:
    return (Stage(name="aesthetic", operators=(Lightness(log=str(log)),)),)


def dense(log: Path, *, words: str = "with", lo: float = 0.0, name: str = "dense") -> Pairs:
    folder = str(log)
    return Pairs(
        instruction=Instruction(name=name, text="Rewrite: {y_ori}"),
        stages=(
            Stage(name="original", operators=(Short(log=folder),)),
            Stage(name="rephrase", operators=(Longer(log=folder, words=words),)),
            Stage(
                name="caption",
                operators=(Length(log=folder),),
                rules=(Rule(column="clip_score", lo=lo),),
            ),
        ),
    )


def test_each_kept_clip_gets_a_pair_from_its_own_caption_or_from_a_generated_one(
    curate: Curate, few: Path, tmp_path: Path, log: Path
) -> None:
    dst = tmp_path / "set"
    result = curate(few, dst, further=light(log), pairs=(dense(log, lo=8.0),))
    clips = {c["clip_id"]: c for c in rows(dst, "clips")}
    pairs = rows(dst, "pairs")
    kept = {i for i, c in clips.items() if c["kept"]}
    assert sorted(p["clip_id"] for p in pairs) == sorted(kept) and len(kept) == 4
    for pair in pairs:
        clip = clips[pair["clip_id"]]
        given = clip["caption_original"]
        assert pair["original_source"] == ("given" if given else "generated")
        assert pair["original"] == (given or pair["original"])
        assert given or pair["original"].endswith(" pictures")
        expected = f"{pair['original']} with {clip['aesthetic_score']:.1f}"
        assert pair["rephrased"] == expected and pair["instruction"] == "dense"
        assert pair["instruction_text"] == "Rewrite: {y_ori}" and pair["media"] == "video"
        assert (pair["source_uri"], pair["start_s"]) == (clip["source_uri"], clip["start_s"])
        assert pair["kept"] == (len(expected.split()) >= 8)
        assert uuid.UUID(pair["pair_id"]).version == 5
    assert Counter(p["reason"] for p in pairs if not p["kept"]) == {"clip_score<8": 2}
    assert sorted(asked(log, "Short")) == sorted(
        i for i in kept if not clips[i]["caption_original"]
    )
    assert result.measured["pairs.Longer"].rows == 4


def test_a_second_run_makes_none_again_and_a_new_caption_beside_remakes_its_own(
    curate: Curate, few: Path, tmp_path: Path, log: Path
) -> None:
    dst = tmp_path / "set"
    curate(few, dst, further=light(log), pairs=(dense(log),))
    before = rows(dst, "pairs")
    curate(few, dst, further=light(log), pairs=(dense(log),))
    assert rows(dst, "pairs") == before and len(asked(log, "Longer")) == 4
    (few / "vfr.txt").write_text("A wooden bench in the rain.\n")
    curate(few, dst, further=light(log), pairs=(dense(log),))
    changed = [p for p in rows(dst, "pairs") if p not in before]
    assert [p["original"] for p in changed] == ["A wooden bench in the rain."]
    assert changed[0]["original_source"] == "given" and len(asked(log, "Longer")) == 5


def test_another_captioner_remakes_all_pairs_of_its_instruction_and_no_other(
    curate: Curate, few: Path, tmp_path: Path, log: Path
) -> None:
    dst, other = tmp_path / "set", dense(log, name="multi_scene")
    curate(few, dst, further=light(log), pairs=(dense(log), other))
    assert len(asked(log, "Longer")) == 8
    curate(few, dst, further=light(log), pairs=(dense(log, words="and"), other))
    pairs = rows(dst, "pairs")
    assert Counter(p["instruction"] for p in pairs) == {"dense": 4, "multi_scene": 4}
    assert all((" and " in p["rephrased"]) == (p["instruction"] == "dense") for p in pairs)
    assert len(asked(log, "Longer")) == 12 and len(asked(log, "Lightness")) == 4


def test_a_pair_goes_with_its_clip_and_is_not_kept_when_its_clip_is_not(
    curate: Curate, few: Path, tmp_path: Path, log: Path
) -> None:
    dst = tmp_path / "set"
    curate(few, dst, further=light(log), pairs=(dense(log),))
    writer = Writer(str(dst), "refilter")
    writer.publish((*CLASSIC.stages[:2], *_brighter(log)))
    writer.publish(dense(log).stages, "pairs")
    kept = {c["clip_id"] for c in rows(dst, "clips") if c["kept"]}
    assert 0 < len(kept) < 4
    for pair in rows(dst, "pairs"):
        assert pair["kept"] == (pair["clip_id"] in kept)
        assert pair["kept"] or pair["reason"] == "clip is not kept"
    (few / "shapes.mp4").write_bytes((few / "static.mp4").read_bytes())
    curate(few, dst, further=light(log), pairs=(dense(log),))
    clips = {c["clip_id"] for c in rows(dst, "clips")}
    assert all(p["clip_id"] in clips for p in rows(dst, "pairs"))


def _brighter(log: Path) -> tuple[Stage, ...]:
    (stage,) = light(log)
    rule = Rule(column="aesthetic_score", lo=4.4)
    return (Stage(name=stage.name, operators=stage.operators, rules=(rule,)),)


def test_pairs_of_a_finished_dataset_measure_what_they_read_and_judge_no_clip(
    curate: Curate, connection: None, few: Path, tmp_path: Path, log: Path
) -> None:
    dst = tmp_path / "set"
    curate(few, dst, bounds=("num_frames.lo=80",))
    before: list[dict[str, Any]] = rows(dst, "clips")
    assert not asked(log, "Lightness")
    Curation(
        str(dst),
        recipe="classic",
        scan=CLASSIC.scan,
        stages=(*CLASSIC.stages[:2], *light(log)),
        pairs=(dense(log),),
        options=Options(),
        connect=contextlib.nullcontext,
    ).run(None)
    after = rows(dst, "clips")
    kept = {c["clip_id"] for c in after if c["kept"]}
    assert {c["clip_id"] for c in before if c["kept"]} == kept, "other thresholds were in force"
    assert sorted(asked(log, "Lightness")) == sorted(kept)
    assert sorted(p["clip_id"] for p in rows(dst, "pairs")) == sorted(kept)
    assert all(p["rephrased"] for p in rows(dst, "pairs"))
