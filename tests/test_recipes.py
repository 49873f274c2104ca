"""The recipes with models, whole, on small checkpoints in place of each model."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import Curate, Run, rows
from endpoints import Reply, Server, said

from engine.caption import Caption
from engine.endpoint import EndpointChat
from engine.operator import Stage
from pipelines.models import make_tiny, tiny
from pipelines.recipes import BASIC, QUALITY, mimir, recipe

APPENDIX_A = {
    "basic": {("num_frames", "<", 65), ("duration_s", "<", 1), ("aspect_ratio", "<", 1)}
    | {("aspect_ratio", ">", 2), ("motion_score", "<=", 0)},
    "quality": {("black_area_frac", ">", 0.8), ("brightness", "<", 0.2)}
    | {("black_frame_frac", ">", 0.4)},
    "aesthetic": {("aesthetic_score", "<", 4.0), ("ocr_area_frac", ">", 0.1)},
    "watermark": {("watermark_score", ">", 0.5)},
    "recaption": set(),
    "caption": {("repetition_2gram", ">", 0.056), ("repetition_5gram", ">", 0.047)}
    | {("repetition_10gram", ">", 0.045), ("clip_score", "<", 0.25)},
}
"""Mimir's rules in the order of its figure 9."""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    make_tiny(folder)
    return folder


def flags(checkpoints: Path, **others: Path) -> list[str]:
    models = {
        "clip": checkpoints / "clip",
        "aesthetic-head": checkpoints / "aesthetic.safetensors",
        "watermark-model": checkpoints / "qwen2_vl",
        "captioner": checkpoints / "qwen2_vl",
    } | others
    return [word for name, path in models.items() for word in (f"--{name}", str(path))]


def test_each_number_of_the_paper_stands_in_its_stage_in_the_order_of_its_figure() -> None:
    stages = {s.name: s for s in mimir(tiny()).stages}
    assert [name for name in stages if name in APPENDIX_A] == list(APPENDIX_A)
    for name, expected in APPENDIX_A.items():
        found = {(r.column, *bound) for r in stages[name].rules for bound in r.bounds}
        assert found == expected, name


def test_recipes_with_other_models_judge_alike() -> None:
    rules = [[s.rules for s in recipe(name).stages] for name in ("mimir", "small", "tiny")]
    assert rules[0] == rules[1] == rules[2]


def test_long_spans_are_sixty_seconds_with_their_cuts_and_without_the_rule_on_them() -> None:
    found = recipe("long")
    assert (found.scan.shots, found.scan.clip_seconds) == ("none", 60.0)
    columns = {r.column for s in found.stages for r in s.rules}
    assert "residual_cut_score" not in columns and "clip_score" in columns


@pytest.fixture(scope="session")
def paper(
    checkpoints: Path,
    samples: Path,
    tmp_path_factory: pytest.TempPathFactory,
    run_in_session: Run,
) -> Path:
    """A dataset of the recipe `mimir`."""
    dst = tmp_path_factory.mktemp("paper") / "set"
    ran = run_in_session(
        "curate", "mimir", "--src", samples, "--dst", dst, *flags(checkpoints), "--json"
    )
    assert ran.code == 0, ran.err
    return dst


@pytest.mark.slow
def test_every_stage_of_the_paper_sees_clips_keeps_some_and_rejects_some(paper: Path) -> None:
    clips = rows(paper, "clips")
    assert all(c["state"] in ("kept", "rejected", "duplicate") for c in clips)
    order = [*APPENDIX_A]
    rejected = Counter(c["stage"] for c in clips if c["state"] == "rejected")
    left = len(clips)
    for name in order:
        if name != "recaption":
            assert rejected[name] > 0, f"{name} rejects none"
        left -= rejected[name] + (rejected["shots"] if name == "quality" else 0)
        assert left > 0, f"{name} keeps none"
    captioned = [c for c in clips if c["caption"] is not None]
    assert len(captioned) == left + rejected["caption"]
    for clip in captioned:
        assert clip["caption_raw"] and clip["caption_fault"] is not None
        assert clip["clip_model"] and clip["watermark_score"] <= 0.5
        assert len(clip["clip_embedding"]) == 768
    assert all(c["clip_score"] is not None for c in clips if c["kept"])


@pytest.mark.slow
def test_pairs_are_made_of_what_is_kept(paper: Path) -> None:
    clips = {c["clip_id"]: c for c in rows(paper, "clips") if c["kept"]}
    pairs = rows(paper, "pairs")
    assert {p["clip_id"] for p in pairs} == set(clips)
    for pair in pairs:
        given = clips[pair["clip_id"]]["caption_original"]
        assert pair["original"] and pair["original_source"] == ("given" if given else "generated")
        assert pair["rephrased"] and pair["instruction"] == "dense"
        assert "{y_ori}" in pair["instruction_text"]
        assert pair["state"] in ("kept", "rejected")


@pytest.mark.slow
def test_another_watermark_model_redoes_its_stage_and_what_follows_and_no_embedding(
    paper: Path, checkpoints: Path, samples: Path, tmp_path: Path, run: Run
) -> None:
    dst, other = tmp_path / "set", tmp_path / "other"
    shutil.copytree(paper, dst)
    shutil.copytree(checkpoints / "qwen2_vl", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"note": "other weights"}))
    named = flags(checkpoints, **{"watermark-model": other})
    ran = run("curate", "mimir", "--src", samples, "--dst", dst, *named, "--json")
    assert ran.code == 0, ran.err
    found = ran.json
    assert found["frames_decoded"] == 0
    assert "measured again" in ran.err and "Watermark" in ran.err
    measured = found["measured"]
    assert measured["Watermark"]["rows"] > 0 and measured["Caption"]["rows"] > 0
    for name in ("Embed", "AestheticScore", "TextCoverage"):
        assert measured[name]["rows"] == 0, f"{name} was measured again"
    untouched = ("clip_id", "aesthetic_score", "clip_embedding", "ocr_area_frac")
    before, after = ([{n: c[n] for n in untouched} for c in rows(d, "clips")] for d in (paper, dst))
    assert before == after


@pytest.mark.slow
def test_recaption_makes_pairs_of_images(
    checkpoints: Path, samples: Path, tmp_path: Path, run: Run
) -> None:
    src = tmp_path / "images"
    src.mkdir()
    for name in ("coins.jpg", "coins.txt", "night.png", "turned.jpg"):
        shutil.copy(samples / name, src / name)
    dst = tmp_path / "pairs"
    ran = run(
        "recaption", "--src", src, "--dst", dst, "--instruction", "dense", *flags(checkpoints)
    )
    assert ran.code == 0, ran.err
    pairs = rows(dst, "pairs")
    assert len(pairs) == 3 and {p["media"] for p in pairs} == {"image"}
    sources = Counter(p["original_source"] for p in pairs)
    assert sources == {"given": 1, "generated": 2}
    assert all(p["rephrased"] and p["start_s"] is None for p in pairs)

    more = ("--instruction", "multi_scene", *flags(checkpoints), "--json")
    ran = run("recaption", "--src", dst, *more)
    assert ran.code == 0, ran.err
    assert sum(ran.json["pairs"]["multi_scene"].values()) == 3
    scenes = [p for p in rows(dst, "pairs") if p["instruction"] == "multi_scene"]
    for pair in scenes:
        assert pair["error_type"] == "WrongScenes" or pair["rephrased"].count("|") == 1
    assert len(rows(dst, "pairs")) == 6


def test_what_a_faulty_endpoint_refuses_fails_alone_and_is_asked_again_by_the_next_run(
    curate: Curate, samples: Path, tmp_path: Path
) -> None:
    src, well = tmp_path / "src", []
    src.mkdir()
    for name in ("coffee_pan.mp4", "vfr.mp4", "shapes.mp4", "retina.avi"):
        (src / name).symlink_to(samples / name)

    def reply(body: dict[str, Any], _: int) -> Reply:
        pictures = sum(p["type"] == "image_url" for p in body["messages"][-1]["content"])
        if well or pictures % 2 == 0:
            return said(f"A scene in {pictures} pictures, seen by a camera that moves.")
        return Reply(status=500, body=b"out of memory")

    with _captioner(reply) as stage:
        first = curate(src, tmp_path / "set", further=(stage,))
        clips = rows(tmp_path / "set", "clips")
        errors = {c["clip_id"]: (c["error_operator"], c["error_type"]) for c in clips if c["error"]}
        assert 0 < len(errors) < 4 and set(errors.values()) == {("Caption", "HTTP500")}
        assert first.accounts.clips["failed"] == len(errors) and not first.accounts.faults
        well.append(True)
        second = curate(src, tmp_path / "set", further=(stage,))
    assert second.measured["Caption"].rows == len(errors), "the others are not asked again"
    assert second.accounts.clips["kept"] == 4 and second.frames_decoded == 0


class _captioner:  # noqa: N801 - a context
    """A stage whose captioner is behind a server of this test."""

    def __init__(self, reply: Any):
        self.server = Server(reply)

    def __enter__(self) -> Stage:
        url = self.server.__enter__().url
        chat = EndpointChat(url=url, model="tiny", attempts=2, backoff_s=0.01)
        caption = Caption(chat=chat, num_gpus=0.0, copies=1, batch_size=64)
        return Stage(name="recaption", operators=(caption,))

    def __exit__(self, *error: object) -> None:
        self.server.__exit__(*error)


BAD = (
    (("tiny", "--instruction", "poem"), "knows dense, multi_scene, multilingual"),
    (("tiny", "--instruction", "multilingual"), "needs --language"),
    (("classic", "--captioner", "x/y"), "recipe 'classic' loads no model"),
    (("mimir", "--endpoint", "http://localhost:1/v1"), "--endpoint needs --captioner"),
    (("mimir", "--watermark-model", "./nowhere"), "no weights at ./nowhere"),
    (("mimir",), "fetch"),
    (("nothing",), "there is no recipe 'nothing'"),
)


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_what_cannot_be_is_one_line_before_any_work(
    arguments: tuple[str, ...],
    words: str,
    samples: Path,
    tmp_path: Path,
    run: Run,
) -> None:
    ran = run(
        "curate", *arguments, "--src", samples, "--dst", tmp_path / "set",
        env={"HF_HUB_CACHE": str(tmp_path / "hub")},
    )  # fmt: skip
    assert ran.code == 2 and words in ran.err
    lines = [line for line in ran.err.splitlines() if not line.startswith("recipe tiny")]
    assert len([line for line in lines if line.startswith("error:")]) == 1
    assert "Traceback" not in ran.err and not (tmp_path / "set" / "clips.lance").exists()


def test_the_stages_that_need_no_model_are_the_same_values() -> None:
    assert recipe("mimir").stages[:2] == (BASIC, QUALITY) == recipe("classic").stages[:2]
