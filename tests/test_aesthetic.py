"""The aesthetic score against its predictor, run by hand."""

from __future__ import annotations

import importlib.resources
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from engine.aesthetic import CLIP_MODEL, LAION, AestheticScore
from engine.clip import ClipModel, Embed
from engine.schema import EMBEDDING
from engine.tiny_clip import build_aesthetic_head, build_clip
from engine.weights import Weights

torch = pytest.importorskip("torch")
open_clip = pytest.importorskip("open_clip")

KEYFRAMES = pa.list_(pa.struct([("time_s", pa.float64()), ("jpeg", pa.binary())]))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small CLIP and two forms of the small head."""
    folder = tmp_path_factory.mktemp("tiny")
    build_clip(folder / "clip")
    build_aesthetic_head(folder / "head.pth")
    build_aesthetic_head(folder / "head.safetensors")
    return folder


@pytest.fixture(scope="module")
def clips() -> list[list[bytes]]:
    """Photographs, three frames a clip: the whole, and two parts of it."""
    found = []
    data = importlib.resources.files("skimage") / "data"
    for name in "astronaut brick camera chelsea coffee grass ihc moon motorcycle_left".split():
        with importlib.resources.as_file(data / f"{name}.png") as path:
            photo = Image.open(path).convert("RGB")
        photo.thumbnail((300, 200))
        width, height = photo.size
        parts = [photo, photo.crop((0, 0, width // 2, height)), photo.crop((0, 40, width, 120))]
        frames = [io.BytesIO() for _ in parts]
        for part, file in zip(parts, frames, strict=True):
            part.save(file, "JPEG", quality=90)
        found.append([file.getvalue() for file in frames])
    return found


@pytest.fixture(scope="module")
def embedded(folder: Path, clips: list[list[bytes]]) -> pa.Table:
    rows = [[{"time_s": 0.0, "jpeg": j} for j in clip] for clip in clips]
    model = ClipModel(weights=Weights(at=str(folder / "clip")))
    return Embed(model=model).load()(pa.table({"keyframes": pa.array(rows, KEYFRAMES)}))


def score(table: pa.Table, path: Path, **more: ClipModel) -> pa.Table:
    return AestheticScore(weights=Weights(at=str(path)), **more).load()(table)


def given(*rows: tuple[np.ndarray, str]) -> pa.Table:
    vectors, models = zip(*rows, strict=True)
    return pa.table({"clip_embedding": pa.array(list(vectors), EMBEDDING), "clip_model": models})


def test_score_is_the_predictors(folder, clips, embedded):
    """The independent computation of a few lines: open-clip, then the head, frame by frame."""
    linear, dropout = torch.nn.Linear, torch.nn.Dropout
    head = torch.nn.Sequential(
        *(linear(768, 1024), dropout(0.2), linear(1024, 128), dropout(0.2), linear(128, 64)),
        *(dropout(0.1), linear(64, 16), linear(16, 1)),
    ).eval()
    state = torch.load(folder / "head.pth", weights_only=True)
    head.load_state_dict({k.removeprefix("layers."): v for k, v in state.items()})
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder / 'clip'}")
    model.eval()
    expected = []
    with torch.inference_mode():
        for clip in clips:
            pictures = torch.stack([preprocess(Image.open(io.BytesIO(j))) for j in clip])
            features = model.encode_image(pictures)
            features /= features.norm(dim=-1, keepdim=True)
            expected.append(head(features).mean().item())
    found = score(embedded, folder / "head.safetensors")
    assert found["error"].null_count == len(clips)
    assert found["aesthetic_score"].to_pylist() == pytest.approx(expected, abs=1e-5)
    alone = [score(embedded.slice(i, 1), folder / "head.safetensors") for i in range(len(clips))]
    assert pa.concat_tables(alone)["aesthetic_score"].equals(found["aesthetic_score"])
    # random weights, but of use: both sides of the threshold of Mimir's recipe, not all alike
    assert min(expected) < 4.0 < max(expected) < 10
    assert 4.0 < np.mean(expected) < 6.0


def test_mean_of_scores_is_score_of_mean(folder):
    rng = np.random.default_rng(0)
    units = rng.normal(size=(7, 768))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    rows = [(unit, "x") for unit in (*units, units.mean(0))]
    found = score(given(*rows), folder / "head.safetensors")["aesthetic_score"].to_pylist()
    assert found[7] == pytest.approx(np.mean(found[:7]), abs=1e-5)
    assert np.std(found[:7]) > 0.05


def test_no_picture_is_looked_at_again():
    assert AestheticScore.reads == ("clip_embedding", "clip_model")
    assert not AestheticScore().num_gpus


def test_embeddings_of_another_model_fail(folder):
    vector = np.full(768, 768**-0.5)
    table = given((vector, CLIP_MODEL), (vector, "ViT-L-14-336/openai"))
    found = score(table, folder / "head.pth", clip=ClipModel())
    assert found["error_type"].to_pylist() == [None, "OtherModel"]
    assert found["aesthetic_score"].is_null().to_pylist() == [False, True]
    assert "ViT-L-14-336/openai" in found["error"][1].as_py()
    assert score(table, folder / "head.pth")["error"].null_count == 2


def test_a_model_that_the_head_was_not_fitted_to_is_refused_at_once(folder):
    laion, small = (Weights(at=str(folder / f"head.{end}")) for end in ("pth", "safetensors"))
    at = Weights(at=str(folder / "clip"))
    fit = [ClipModel(), ClipModel(weights=at), ClipModel(name="ViT-L-14-quickgelu"), None]
    for clip in fit:  # of local weights only the activation tells
        AestheticScore(weights=laion, clip=clip).check()
    for clip in (
        ClipModel(weights="laion2b_s32b_b82k"),
        ClipModel(name="ViT-L-14-336"),
        ClipModel(quick_gelu=False),
        ClipModel(weights=at, quick_gelu=False),
    ):
        with pytest.raises(ValueError, match="reads embeddings of ViT-L-14/openai") as caught:
            AestheticScore(weights=laion, clip=clip).check()
        assert "\n" not in str(caught.value)
        AestheticScore(weights=small, clip=clip).check()  # its metadata says: any


def test_laions_head_is_asked_for_with_the_command(monkeypatch, tmp_path, folder):
    monkeypatch.setenv("HOME", str(tmp_path))
    for ask in (AestheticScore().check, AestheticScore().describe, AestheticScore().load):
        with pytest.raises(ValueError, match="`curl -fL --create-dirs -o ~/") as caught:
            ask()
        assert "\n" not in str(caught.value) and "--aesthetic-head" in str(caught.value)
    assert re.search(
        r"improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE\.pth`",
        str(caught.value),
    )
    place = Path(LAION.at).expanduser()
    assert place.is_relative_to(tmp_path)
    place.parent.mkdir(parents=True)
    place.write_bytes((folder / "head.pth").read_bytes())
    AestheticScore().check()
    same = AestheticScore(weights=Weights(at=str(folder / "head.pth")))
    assert AestheticScore().fingerprint == same.fingerprint
    assert AestheticScore(clip=ClipModel()).fingerprint != same.fingerprint


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: s | {"layers.7.weight": torch.zeros(1, 8)}, "layers.7.weight it has (1, 8)"),
        (lambda s: {k: v for k, v in s.items() if k != "layers.2.bias"}, "layers.2.bias"),
        (lambda s: s | {"more": torch.zeros(3)}, "of more it has (3,), and None is needed"),
        (lambda s: {f"model.{k}": v for k, v in s.items()}, "(20 tensors differ)"),
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_other_checkpoints_are_refused(change, said, suffix, folder, tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / f"head.{suffix}"
    content = change(torch.load(folder / "head.pth", weights_only=True))
    save_file(content, file) if suffix == "safetensors" else torch.save(content, file)
    refused(file, said)


@pytest.mark.parametrize("content", [[1, 2], {"a": "b"}, b"<!DOCTYPE html>", b""])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_what_is_no_checkpoint_is_refused(content, suffix, tmp_path):
    file = tmp_path / f"head.{suffix}"
    if isinstance(content, bytes):  # HTML is what a wrong address gives
        file.write_bytes(content)
    else:
        torch.save(content, file)
    refused(file, f"head.{suffix} is no checkpoint")


def refused(file: Path, said: str) -> None:
    operator = AestheticScore(weights=Weights(at=str(file)))
    for ask in (operator.check, operator.load):
        with pytest.raises(ValueError, match=re.escape(said)) as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_the_small_head_is_the_same_every_time(folder, tmp_path):
    again = build_aesthetic_head(tmp_path / "again.safetensors")
    assert again.read_bytes() == (folder / "head.safetensors").read_bytes()
