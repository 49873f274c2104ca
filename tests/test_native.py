"""VBench's dimensions as they are measured natively, against the real package and closed forms."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch
from clips import encode, texture

from engine.operator import FAILURE
from evals import frames, native
from evals.dimensions import DIMENSIONS
from evals.frames import chunks, prepare, prepare_on, rgb_frames
from evals.merge import merge
from evals.metric import ASKED, SCORED
from evals.metrics import choose
from evals.native import Native
from evals.native_models import consistency
from evals.vbench_worker import VBenchWorker, package

BOTH = [n for n, d in DIMENSIONS.items() if d.implementations == ("native", "vbench")]
ALL = (*BOTH, "text_alignment")
STYLE = {"appearance_style": "oil painting"}
PROMPT = "a disc over a texture"
LOSSLESS = {"qp": "0"}
REAL = (
    "WyattBlue__auto-editor__testsrc.mp4",
    "NVIDIA-NeMo__Curator__test_video.mp4",
    "androidx__media__checkerboard_854x356_avc_baseline.mp4",
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def scenery(num: int, height: int, width: int, seed: int = 0) -> list[np.ndarray]:
    """A disc over a coloured texture that pans, with noise that grows; BGR."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (5, 7, 3), np.uint8)
    wide = cv2.resize(coarse, (2 * width, height), interpolation=cv2.INTER_CUBIC)
    found = []
    for t in range(num):
        image = np.roll(wide, -5 * t, 1)[:, :width].copy()
        cv2.circle(image, (20 + 9 * t, height // 2), height // 6, (60, 200, 20), -1)
        noisy = np.clip(image + rng.normal(0, 1 + t, image.shape), 0, 255)
        found.append(noisy.astype(np.uint8))
    return found


SIZES = {"landscape": (234, 416, 11), "portrait": (346, 194, 9), "small": (100, 130, 7)}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of sizes that are no multiples of 16, named as VBench names them."""
    folder = tmp_path_factory.mktemp("films")
    made = {
        name: encode(folder / f"{PROMPT} {name}-0.mp4", scenery(num, height, width, i), fps=16)
        for i, (name, (height, width, num)) in enumerate(SIZES.items())
    }
    mpeg4 = folder / f"{PROMPT} mpeg4-0.mp4"
    return made | {"mpeg4": encode(mpeg4, scenery(6, 128, 176, 5), codec="mpeg4")}


@pytest.fixture(scope="module")
def measure(tiny_cache: Path) -> Callable[[pa.Table], pa.Table]:
    return Native(dimensions=ALL, cache=str(tiny_cache), device="cpu").load()


@pytest.fixture(scope="module")
def worker(tiny_cache: Path) -> VBenchWorker:
    return VBenchWorker(BOTH, str(tiny_cache))


Span = tuple[int, int] | None


def asked(path: Path, *dimensions: str, spans: tuple[Span, ...] = (None,), **more: Any) -> pa.Table:
    rows = [
        {
            "path": str(path),
            "dimension": name,
            "prompt": PROMPT,
            "auxiliary": json.dumps(STYLE) if name == "appearance_style" else None,
            "start_frame": span and span[0],
            "stop_frame": span and span[1],
        }
        | more
        for name in dimensions
        for span in spans
    ]
    return pa.Table.from_pylist(rows, schema=ASKED)


def scores(table: pa.Table) -> list[dict[str, Any]]:
    """Rows without failures, their details read."""
    rows = table.to_pylist()
    assert [r["error"] for r in rows] == [None] * len(rows)
    return [row | {"details": json.loads(row["details"])} for row in rows]


def by_package(worker: VBenchWorker, name: str, path: Path, span: Span = None) -> dict[str, Any]:
    told = STYLE if name == "appearance_style" else None
    found = worker.score(name, str(path), PROMPT, told, span=span and [*span])
    assert "error" not in found, found
    return found


def agree(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Flickering to the bit, the others to 1e-6; so do frames, and whatever merging reads."""
    near = {"abs": 0, "rel": 0} if name == "temporal_flickering" else {"abs": 1e-6, "rel": 0}
    assert ours["raw_score"] == pytest.approx(theirs["row"]["video_results"], **near)
    assert ours["num_frames"] == theirs["num_frames"]
    for key, value in theirs["details"].items():
        each = {"abs": 1e-5} if key == "video_sim" else near  # a sum over frames
        assert ours["details"][key] == pytest.approx(value, **each), key
    if theirs["frame_scores"]:
        assert ours["frame_scores"] == pytest.approx(theirs["frame_scores"], abs=2e-6)


# Frames


def by_opencv(path: Path | str) -> np.ndarray:
    video, found = cv2.VideoCapture(str(path)), []
    while (read := video.read())[0]:
        found.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
    return np.stack(found)


def by_decord(path: Path | str) -> np.ndarray:
    decord = pytest.importorskip("decord")
    decord.bridge.set_bridge("native")
    video = decord.VideoReader(str(path), num_threads=1)
    return video.get_batch(range(len(video))).asnumpy()


def test_frames_are_those_of_decord_and_opencv(films):
    for path in films.values():
        ours = np.stack([*rgb_frames(path)])
        assert np.array_equal(ours, by_opencv(path)), path
        assert np.array_equal(ours, by_decord(path)), path


@pytest.mark.parametrize(
    "name",
    [
        *REAL,
        "WyattBlue__auto-editor__test_yuv422p.mp4",
        "androidx__media__sample_rotate_and_reflect.mp4",  # shown turned by 90 degrees
        "dmlc__decord__video_90.mov",
    ],
)
def test_frames_of_real_clips_are_those_of_decord_and_opencv(videos, name):
    ours = np.stack([*itertools.islice(rgb_frames(videos / name), 40)])
    assert np.array_equal(ours, by_opencv(videos / name)[:40])
    assert np.array_equal(ours, by_decord(videos / name)[:40])


def test_frames_are_held_a_few_at_a_time():
    drawn = []

    def draw() -> Iterator[np.ndarray]:
        for i in range(100):
            drawn.append(i)
            yield np.zeros((10, 20, 3), np.uint8)

    parts = chunks(draw(), 8, 200 * 5)
    assert len(next(parts)) == 5 and len(drawn) == 5
    assert [len(p) for p in parts] == [5] * 19
    assert [len(p) for p in chunks(draw(), 8, 10**9)] == [8] * 12 + [4]
    assert [len(p) for p in chunks(draw(), 8, 1)] == [1] * 100  # one frame larger than allowed


@pytest.mark.parametrize("size", [(234, 416), (346, 194), (100, 130), (224, 500), (5, 3), (1, 1)])
def test_what_models_are_shown_is_what_the_package_shows_them(tiny_cache, size):
    from PIL import Image

    utils = package("utils")
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for _ in range(2)]
    given = torch.Tensor(np.stack(images)).permute(0, 3, 1, 2)
    transform = utils.clip_transform_Image(224)
    expected = {
        "square": utils.clip_transform(224)(given),
        "wide": utils.dino_transform(224)(given),
        "picture": torch.stack([transform(Image.fromarray(image)) for image in images]),
    }
    each = [prepare(image, expected) for image in images]
    found = {view: torch.stack([one[view] for one in each]) for view in expected}
    for view, value in expected.items():
        assert found[view].shape == value.shape
        assert torch.allclose(found[view], value, rtol=0, atol=2e-6), view
    assert torch.equal(found["picture"], expected["picture"])
    # As a GPU does it: both of one upload.
    for view, value in prepare_on(CPU, images, ["square", "wide"]).items():
        assert torch.equal(value, expected[view]), view


# Against the package


def test_differences_are_the_packages_to_the_bit():
    """Of large frames sums are rounded; where halves cut a pixel, the order of colours tells."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (1086, 1930, 3), np.uint8) for _ in range(6)]
    theirs = package("temporal_flickering").mae_seq([i[..., ::-1] for i in images])
    found = {name: frames.Differences() for name in ("rgb", "bgr")}
    for image in images:
        found["rgb"].add(image)
        found["bgr"].add(np.ascontiguousarray(image[..., ::-1]))
    assert np.array_equal(found["rgb"].values, theirs)
    assert not np.array_equal(found["bgr"].values, theirs)


@pytest.mark.parametrize("which", [*SIZES, "mpeg4"])
def test_scores_are_the_packages(measure, worker, films, which):
    rows = scores(measure(asked(films[which], *BOTH)))
    for name, ours in zip(BOTH, rows, strict=True):
        agree(name, ours, by_package(worker, name, films[which]))


@pytest.mark.parametrize("real", REAL)
def test_scores_of_real_clips_are_the_packages(measure, worker, videos, real):
    rows = scores(measure(asked(videos / real, *BOTH)))
    for name, ours in zip(BOTH, rows, strict=True):
        agree(name, ours, by_package(worker, name, videos / real))


def test_scores_of_spans_are_the_packages_of_those_frames(measure, worker, films):
    spans = ((0, 2), (3, 8), (6, 11))
    rows = scores(measure(asked(films["landscape"], *BOTH, spans=spans)))
    for (name, span), ours in zip(itertools.product(BOTH, spans), rows, strict=True):
        agree(name, ours, by_package(worker, name, films["landscape"], span))


def test_chunks_change_nothing(tiny_cache, films):
    found = []
    for size in (1, 3, 100):
        metric = Native(dimensions=ALL, cache=str(tiny_cache), device="cpu", frames_at_once=size)
        found.append(scores(metric.load()(asked(films["portrait"], *ALL))))
    for name, *rows in zip(ALL, *found, strict=True):
        values = [row["raw_score"] for row in rows]
        near = 0 if name == "temporal_flickering" else 1e-6
        assert values == pytest.approx([values[0]] * 3, abs=near, rel=0), name
        assert len({len(row["frame_scores"]) for row in rows}) == 1


def test_merged_like_the_packages_rows(measure, worker, films):
    paths = [films[name] for name in SIZES]
    tables = [scores(measure(asked(path, *BOTH))) for path in paths]
    for i, name in enumerate(BOTH):
        theirs = [by_package(worker, name, path)["details"] for path in paths]
        ours = [table[i]["details"] for table in tables]
        assert merge(name, ours) == pytest.approx(merge(name, theirs), abs=1e-6, rel=0)


def test_text_alignment_is_the_cosine_of_prompt_and_frame(tiny_cache, measure, films):
    import clip
    from PIL import Image

    model, _ = clip.load(str(tiny_cache / "clip_model" / "ViT-B-32.pt"), "cpu")
    transform = package("utils").clip_transform_Image(224)
    (ours,) = scores(measure(asked(films["small"], "text_alignment")))
    with torch.no_grad():
        text = model.encode_text(clip.tokenize([PROMPT]))
        shown = [transform(Image.fromarray(image))[None] for image in rgb_frames(films["small"])]
        images = [model.encode_image(one) for one in shown]
    expected = [torch.nn.functional.cosine_similarity(i, text).item() for i in images]
    assert ours["frame_scores"] == pytest.approx(expected, abs=1e-6)
    assert ours["raw_score"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert "truncated" not in ours["details"]
    (other,) = scores(measure(asked(films["small"], "text_alignment", prompt="rain at night")))
    assert abs(other["raw_score"] - ours["raw_score"]) > 1e-3


# Closed forms


def test_a_still_is_consistent_and_does_not_flicker(measure, tmp_path):
    image = cv2.cvtColor(texture(120, 160), cv2.COLOR_GRAY2BGR)
    path = encode(tmp_path / "still-0.mp4", [image] * 8, options=LOSSLESS)
    names = ("temporal_flickering", "subject_consistency", "background_consistency")
    flickering, subject, background = scores(measure(asked(path, *names)))
    assert flickering["raw_score"] == 1.0 and flickering["frame_scores"] == [None, *[1.0] * 7]
    for row in (subject, background):
        assert row["raw_score"] == pytest.approx(1, abs=1e-6)
        assert row["frame_scores"] == [None, *[pytest.approx(1, abs=1e-6)] * 7]
        assert row["details"]["head_tail_similarity"] == pytest.approx(1, abs=1e-6)


def test_grey_that_alternates_flickers_by_its_step(measure, tmp_path):
    images = [np.full((64, 96), 100 + 40 * (t % 2), np.uint8) for t in range(9)]
    path = encode(tmp_path / "grey-0.mp4", images, full_range=True, options=LOSSLESS)
    whole, part = scores(measure(asked(path, "temporal_flickering", spans=(None, (2, 5)))))
    expected = pytest.approx(1 - 40 / 255, abs=1e-9)
    assert whole["raw_score"] == expected and part["raw_score"] == expected
    assert whole["frame_scores"] == [None, *[expected] * 8]
    assert part["frame_scores"] == [None, *[expected] * 2] and part["num_frames"] == 3


def test_no_similarity_is_below_zero():
    """Frames 0 to 3 point right, left, up and right: cosines by hand."""
    features = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [1, 0]])
    found = consistency(features, counted=True)
    assert found.frames == [None, 0, 0, pytest.approx(0.5)]
    assert found.value == pytest.approx(0.5 / 3)
    assert found.details["video_sim"] == pytest.approx(0.5)
    assert found.details["cnt_per_video"] == 3
    # these are as they are: the reader sees frames that are opposite
    assert found.details["similarity_at"]["dt_frames"] == [1, 2]
    assert found.details["similarity_at"]["similarity"] == pytest.approx([-1 / 3, -0.5])


def test_features_of_head_and_tail_and_by_distance(measure, tmp_path):
    """Of two stills in a row all is known from the cosine of the two."""
    first, second = (cv2.cvtColor(texture(128, 128, seed), cv2.COLOR_GRAY2BGR) for seed in (1, 2))
    second = 255 - second // 3
    path = encode(tmp_path / "two-0.mp4", [first] * 6 + [second] * 6, options=LOSSLESS)
    row, head = scores(measure(asked(path, "subject_consistency", spans=(None, (0, 6)))))
    apart = row["details"]["head_tail_similarity"]
    assert 0 < apart < 0.99
    curve = row["details"]["similarity_at"]
    assert curve["dt_frames"] == [1, 2, 5, 10]
    # of 12 - dt pairs, dt reach across the middle (as many as there are, beyond half)
    across = [min(dt, 12 - dt) / (12 - dt) for dt in (1, 2, 5, 10)]
    expected = [1 - share + share * apart for share in across]
    assert curve["similarity"] == pytest.approx(expected, abs=1e-5)
    # frames 6 to 11: the first of them differs from both, later ones only from the first
    expected = [None, *[1] * 5, apart, *[(1 + apart) / 2] * 5]
    assert row["frame_scores"][1:] == pytest.approx(expected[1:], abs=1e-5)
    assert row["frame_scores"][0] is None
    assert head["details"]["head_tail_similarity"] == pytest.approx(1, abs=1e-6)


def test_frame_scores_give_scores_of_parts(measure, films):
    """What the documentation says of their means."""
    part = (4, 9)
    names = ("aesthetic_quality", "text_alignment")
    rows = scores(measure(asked(films["landscape"], *names, spans=(None, part))))
    for whole, own in (rows[:2], rows[2:]):
        assert np.mean(whole["frame_scores"][4:9]) == pytest.approx(own["raw_score"], abs=1e-6)
        assert np.mean(whole["frame_scores"]) == pytest.approx(whole["raw_score"], abs=1e-6)
    whole, own = scores(
        measure(asked(films["landscape"], "temporal_flickering", spans=(None, part)))
    )
    assert np.mean(whole["frame_scores"][5:9]) == pytest.approx(own["raw_score"], abs=1e-6)
    assert whole["frame_scores"][1] > whole["frame_scores"][-1]  # the noise grows


# Decoding once


def test_a_file_is_decoded_once_for_all_that_is_asked_of_it(measure, films, monkeypatch):
    opened = []
    own = frames.open_video

    def counted(path: Any, **named: Any) -> Any:
        opened.append(str(path))
        return own(path, **named)

    monkeypatch.setattr(frames, "open_video", counted)
    before = measure.decodes
    rows = pa.concat_tables(
        asked(films[name], *ALL, spans=(None, (0, 3), (4, 7))) for name in ("small", "portrait")
    )
    assert len(scores(measure(rows))) == 2 * 3 * len(ALL)
    assert opened == [str(films["small"]), str(films["portrait"])]
    assert measure.decodes - before == 2


def test_frames_that_no_span_needs_are_not_embedded(tiny_cache, films):
    metric = Native(dimensions=("background_consistency",), cache=str(tiny_cache), device="cpu")
    measure, shown = metric.load(), []
    own = measure._models.encoders["clip_b"]
    measure._models.encoders["clip_b"] = lambda x: (shown.append(len(x)), own(x))[1]
    spans = ((0, 2), (8, 11))
    scores(measure(asked(films["landscape"], "background_consistency", spans=spans)))
    assert sum(shown) == 5


# What goes wrong


def failures(table: pa.Table) -> list[tuple[str | None, str | None, bool | None]]:
    assert table.schema.names == [*SCORED.names, *FAILURE.names]
    return [(r["error_type"], r["error"], r["transient"]) for r in table.to_pylist()]


def test_a_video_of_one_frame_has_no_consistency_and_the_rest_is_scored(measure, tmp_path):
    path = encode(tmp_path / "one-0.mp4", scenery(1, 96, 128))
    found = measure(asked(path, *ALL))
    said = dict(zip(ALL, failures(found), strict=True))
    for name in ("temporal_flickering", "subject_consistency", "background_consistency"):
        assert said[name] == ("TooShort", f"{name} needs 2 frames, and there is 1", False)
    for name in ("aesthetic_quality", "appearance_style", "text_alignment"):
        assert said[name] == (None, None, None)
    assert all(r["raw_score"] is None for r in found.to_pylist()[:3])


def test_a_damaged_file_fails_and_its_neighbour_is_scored(measure, films, tmp_path):
    data = films["landscape"].read_bytes()
    cut, junk = tmp_path / "cut-0.mp4", tmp_path / "junk-0.mp4"
    frames_at = data.index(b"mdat")
    assert data.index(b"moov") > frames_at  # behind the frames, as the muxer leaves it
    cut.write_bytes(data[: len(data) // 2])
    junk.write_bytes(bytes(range(256)) * 40)
    flipped = bytearray(data)
    with av.open(str(films["landscape"])) as container:
        sixth = sorted(entry.pos for entry in container.streams.video[0].index_entries)[5]
    flipped[sixth : sixth + 64] = b"\xff" * 64  # the length of its first unit, above all
    damaged = tmp_path / "damaged-0.mp4"
    damaged.write_bytes(flipped)
    paths = (cut, junk, damaged, tmp_path / "none-0.mp4")
    for path in paths:
        rows = pa.concat_tables([asked(path, *ALL), asked(films["small"], *ALL)])
        found = measure(rows)
        errors = failures(found)
        kinds = {kind for kind, _, _ in errors[: len(ALL)]}
        assert len(kinds) == 1 and None not in kinds, path
        assert all(said and "\n" not in said for _, said, _ in errors[: len(ALL)])
        assert errors[len(ALL) :] == [(None, None, None)] * len(ALL)


def test_a_truncated_file_is_no_shorter_video(measure, tmp_path):
    """Cut between two frames, with the index in front: OpenCV takes what is there for all."""
    whole, cut = tmp_path / "whole-0.mp4", tmp_path / "cut-0.mp4"
    encode(whole, scenery(12, 120, 160), container_options={"movflags": "+faststart"})
    with av.open(str(whole)) as container:
        ninth = sorted(entry.pos for entry in container.streams.video[0].index_entries)[8]
    cut.write_bytes(whole.read_bytes()[:ninth])
    assert 2 <= len(by_opencv(cut)) < 12
    rows = failures(measure(asked(cut, *ALL, spans=((0, 2),))))
    assert [kind for kind, _, _ in rows] == ["TruncatedError"] * len(ALL)


def test_spans_beyond_the_video_and_what_is_not_told(measure, films):
    spans = ((5, 50), (3, 3), (4, 5))
    beyond, empty, one = failures(
        measure(asked(films["small"], "subject_consistency", spans=spans))
    )
    assert beyond == ("NoSuchFrames", "frames 5:50 were asked for, and the video has 7", False)
    assert empty[0] == "NoSuchFrames" and one[0] == "TooShort"
    (untold,) = failures(measure(asked(films["small"], "appearance_style", auxiliary=None)))
    assert untold[0] == "NoStyle" and "told None" in untold[1]
    long = " ".join(["word"] * 100)
    told = json.dumps({"appearance_style": long})
    (style,) = failures(measure(asked(films["small"], "appearance_style", auxiliary=told)))
    assert style[0] == "TextTooLong"
    (row,) = scores(measure(asked(films["small"], "text_alignment", prompt=long)))
    assert row["details"]["truncated"] is True


def test_a_model_that_fails_costs_its_own_dimensions(tiny_cache, films):
    measure = Native(dimensions=ALL, cache=str(tiny_cache), device="cpu").load()

    def fails(_shown: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory\nby 3 GiB")

    measure._models.encoders["clip_l"] = fails
    said = dict(zip(ALL, failures(measure(asked(films["small"], *ALL))), strict=True))
    assert said.pop("aesthetic_quality") == ("RuntimeError", "out of memory by 3 GiB", False)
    assert set(said.values()) == {(None, None, None)}
    measure._models.encoders["dino"] = lambda shown: torch.full((len(shown), 8), math.nan)
    said = dict(zip(ALL, failures(measure(asked(films["small"], *ALL))), strict=True))
    assert said["subject_consistency"][0] == "NotFinite"


# The metric as a value


def test_the_fingerprint_is_of_what_is_in_the_weights(tiny_cache, tmp_path):
    metric = Native(dimensions=ALL, cache=str(tiny_cache))
    copied = tmp_path / "copied"
    for part in ("clip_model", "dino_model", "torch_home", "aesthetic_model"):
        shutil.copytree(tiny_cache / part, copied / part)
    shutil.copy(tiny_cache / "TINY", copied)
    elsewhere = dataclasses.replace(metric, cache=str(copied), device="cpu", frames_at_once=3)
    assert elsewhere.fingerprint == metric.fingerprint
    assert str(tiny_cache) not in json.dumps(metric.describe())
    head = copied / "aesthetic_model" / "emb_reader" / "sa_0_4_vit_l_14_linear.pth"
    torch.save({k: v + 1 for k, v in torch.load(head).items()}, head)
    changed = {name for name in ALL if elsewhere.key(name) != metric.key(name)}
    assert changed == {"aesthetic_quality"}
    assert metric.key("temporal_flickering") != metric.key("text_alignment")


def test_weights_that_are_missing_are_named(tmp_path):
    metric = Native(dimensions=ALL, cache=str(tmp_path))
    for ask in (metric.check, metric.load, lambda: metric.fingerprint):
        with pytest.raises(ValueError, match=r"ViT-B-32\.pt"):
            ask()
    with pytest.raises(ValueError, match="motion_smoothness cannot be measured natively"):
        Native(dimensions=("motion_smoothness",), cache=str(tmp_path)).check()
    flickering = Native(dimensions=("temporal_flickering",), cache=str(tmp_path))
    assert flickering.weights() == {} and "torch" not in flickering.libraries
    flickering.check()


def test_it_is_chosen_and_says_what_computed(tiny_cache):
    (metric,) = choose(ALL, cache=str(tiny_cache), device="cpu")
    assert isinstance(metric, Native) and metric.implementation == "native"
    said = metric.environment()
    assert said["device"] == "cpu" and said["clip_dtype"] == "float32"
    assert said["torch"] == torch.__version__.partition("+")[0]
    assert set(native._LENS) | {"temporal_flickering"} == set(ALL)
