"""What is evaluated: found by what lies in a folder, set up, loaded without its own code."""

import base64
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from tiny_models import make_export
from video_server import Answer, VideoServer

from engine.operator import Failed
from engine.weights import tiny_folder
from evals import served
from evals.models import TOKEN, Asked, parse, with_settings

SMALL = ("w.steps=1", "w.frames=5", "w.height=32", "w.width=32")


@pytest.fixture(scope="module")
def export(small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("models") / "export")


@pytest.fixture(scope="module")
def wan(small: None) -> Path:
    return tiny_folder() / "wan"


def refused(*specs: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        parse(specs)
    assert "\n" not in str(error.value)


def test_names() -> None:
    refused("a=/nowhere", words="model a: /nowhere is not there")
    refused("a b=/nowhere", words="letters, digits")
    refused("a=", words="NAME=FOLDER")
    refused(__file__, words=r"is a file: name a folder")


def test_two_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "some = videos").mkdir()
    (tmp_path / "some = videos" / "A cat-0.MP4").touch()
    (model,) = parse([str(tmp_path / "some = videos")])
    assert (model.name, model.kind, model.checkpoint) == ("some-videos", "folder", None)
    assert not model.makes and not model.known
    refused(f"A={tmp_path / 'some = videos'}", f"a={tmp_path}", words="2 models are called a")


def test_an_export(export: Path, tmp_path: Path) -> None:
    (model,) = parse([f"mine.v2={export}"])
    assert (model.name, model.kind, model.about) == ("mine.v2", "export", "finetune")
    assert dict(model.settings) == {"steps": 25, "guidance_scale": 7.5}
    assert model.notes == ("tiny",) and json.dumps(model.describe())
    assert pickle.loads(pickle.dumps(model)) == model
    copied = shutil.copytree(export, tmp_path / "copied")
    assert parse([str(copied)])[0].checkpoint == model.checkpoint
    changed = make_export(tmp_path / "changed", seed=1)
    assert parse([str(changed)])[0].checkpoint != model.checkpoint


def test_settings_of_every_system(small: None) -> None:
    """What pipelines say they take is what they take."""
    from evals.loading import _PIPELINES, settings_of_export

    known = {name: settings_of_export(name) for name in _PIPELINES}
    assert known["rise"]["mode"].choices == ("dense", "multi_scene", "multilingual", "two_stage")
    assert known["rise"]["sample"].kind is bool and known["rise"]["sample"].default is False
    assert known["mimir"]["temperature"].default == 0.7
    assert known["semanticgen"]["seconds"].kind is float
    assert "reference" not in known["semanticgen"]
    assert all(found["steps"].kind is int and found["steps"].default for found in known.values())


def test_settings(export: Path, wan: Path) -> None:
    models = parse([f"a.b={export}", f"w={wan}"])
    one, two = with_settings(models, ["a.b.steps=3", "w.fps=24", "w.negative_prompt=a=b"])
    assert one.settings["steps"] == 3 and one.settings["guidance_scale"] == 7.5
    assert two.settings["fps"] == 24.0 and two.settings["negative_prompt"] == "a=b"
    assert models[0].settings["steps"] == 25, "a value was changed"
    wrong = {
        "c.steps=3": r"with a model of a\.b, w",
        "a.b.steps": "MODEL.SETTING=VALUE",
        "a.b.fps=8": "a.b has no setting fps; it has frames, guidance_scale",
        "w.mode=dense": "w has no setting mode",
        "w.steps=0": "w.steps=0: a number of more than 0",
        "w.steps=2.5": "a whole number",
        "w.guidance_scale=nan": "at least 0",
        "w.precision=fp8": "choose of bf16, fp32",
    }
    for given, words in wrong.items():
        with pytest.raises(ValueError, match=words):
            with_settings(models, [given])


def test_what_is_no_model(wan: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    refused(f"a={folder}", words="it has nothing")
    (folder / "config.json").touch()
    refused(f"a={folder}", words=r"is no model: .* pipeline\.json.*it has config\.json")

    (folder / "pipeline.json").write_text("{")
    refused(f"a={folder}", words="model a: .*is not what an export has")
    about = {"format": 1, "system": "rise", "rise": {"vdm": {"at": "/gone", "revision": None}}}
    (folder / "pipeline.json").write_text(json.dumps(about))
    refused(f"a={folder}", words="model a: no weights at /gone")
    (folder / "pipeline.json").unlink()
    (folder / "model_index.json").write_text("[3]")
    refused(f"a={folder}", words="is not what diffusers writes")

    def index(**changed: object) -> None:
        text = json.loads((wan / "model_index.json").read_text()) | changed
        (folder / "model_index.json").write_text(json.dumps(text))

    index(_class_name=["my_pipeline", "Mine"])
    refused(f"a={folder}", words="which diffusers .* does not have")
    index(_class_name="StableDiffusionPipeline")
    refused(f"a={folder}", words="does not make videos of text alone")
    index(_class_name="CogVideoXImageToVideoPipeline")
    refused(f"a={folder}", words="it needs image")
    index(transformer=["my_transformer", "Mine"])
    refused(f"a={folder}", words="transformer of .* is of my_transformer")
    index()
    (folder / "transformer").mkdir()
    (folder / "transformer" / "diffusion_pytorch_model.bin").touch()
    refused(f"a={folder}", words="as a pickle")


def test_nobody_knows_the_frame_rate(wan: Path, tmp_path: Path) -> None:
    for file in ("model_index.json",):
        text = json.loads((wan / file).read_text()) | {"_class_name": "WanVACEPipeline"}
        (tmp_path / file).write_text(json.dumps(text))
    models = parse([f"a={tmp_path}"])
    with pytest.raises(ValueError, match=r"add --set a\.fps=24"):
        with_settings(models, ())
    assert with_settings(models, ["a.fps=12"])[0].settings["fps"] == 12


def test_diffusers(wan: Path) -> None:
    """Frames are the pipeline's own, of the seed that anyone can give it."""
    import torch
    from diffusers import WanPipeline

    (model,) = with_settings(parse([f"w={wan}"]), SMALL)
    assert model.about == "WanPipeline" and model.settings["fps"] == 16.0
    make = model.load("cpu")
    one, two = make([Asked(text="a cat", seed=5), Asked(text="a cat", seed=6)])
    assert one.frames is not None and one.frames.dtype == np.uint8
    assert one.frames.shape == (5, 32, 32, 3) and one.fps == 16.0
    assert (one.frames != two.frames).any(), "the seed did nothing"
    pipe = WanPipeline.from_pretrained(wan)
    pipe.set_progress_bar_config(disable=True)
    found = pipe(
        "a cat",
        num_inference_steps=1,
        num_frames=5,
        height=32,
        width=32,
        generator=torch.Generator().manual_seed(5),
    )
    np.testing.assert_array_equal(one.frames, (found.frames[0] * 255).round().astype(np.uint8))


def test_an_export_makes_videos(export: Path) -> None:
    from trainers.generation import load_pipeline

    (model,) = with_settings(parse([f"a={export}"]), ["a.steps=1", "a.frames=4"])
    (made,) = model.load("cpu")([Asked(text="a cat", seed=5)])
    own = load_pipeline(export, device="cpu")("a cat", seed=5, steps=1, frames=4)
    np.testing.assert_array_equal(made.frames, own.video)
    assert made.fps == own.fps and made.timings["denoise_s"] > 0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[VideoServer]:
    monkeypatch.setattr(served, "BACKOFF_S", 0.01)
    with VideoServer() as found:
        yield found


def test_an_endpoint(server: VideoServer) -> None:
    server.about = {
        "checkpoint": "abc",
        "model": "big",
        "settings": {"steps": 9, "fps": 8.0},
        "notes": ["tiny"],
    }
    (model,) = with_settings(parse([server.url]), [f"{parse([server.url])[0].name}.steps=4"])
    assert model.kind == "served" and (model.checkpoint, model.about) == ("abc", "big")
    assert model.notes == ("tiny",)
    assert dict(model.settings) == {"steps": 4, "fps": 8.0}
    server.answers = [Answer(503), Answer(429, after="0.02"), Answer(200, b"an mp4")]
    (made,) = model.load("cpu")([Asked(text="a cat", seed=3)])
    assert made.file == b"an mp4" and made.frames is None
    assert server.asked == [{"prompt": "a cat", "seed": 3, "steps": 4, "fps": 8.0}] * 3


def test_an_endpoint_that_says_nothing(server: VideoServer, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (model,) = parse([f"a={server.url}"])
    assert model.checkpoint == server.url and "steps" in model.known and not model.settings
    make = model.load("cpu")
    body = {"video": base64.b64encode(b"file").decode(), "rephrased": "more", "notes": ["cut"]}
    server.answers = [Answer(200, json.dumps(body).encode(), kind="application/json")]
    (made,) = make([Asked(text="a cat", seed=0)])
    assert (made.file, made.rephrased, made.notes) == (b"file", "more", ("cut",))
    monkeypatch.setenv(TOKEN, "a-secret")
    server.answers = [Answer(422, b"no a-secret here")]
    with pytest.raises(Failed, match="HTTP 422: no … here") as refusal:
        make([Asked(text="a cat", seed=0)])
    assert not refusal.value.transient and server.keys[-1] == "Bearer a-secret"
    server.answers = [Answer(500)] * served.ATTEMPTS
    with pytest.raises(Failed, match="5 attempts") as failure:
        make([Asked(text="a cat", seed=0)])
    assert failure.value.transient
    server.answers = [Answer(200, b"{}", kind="application/json")]
    with pytest.raises(Failed, match="no video"):
        make([Asked(text="a cat", seed=0)])


def test_no_endpoint(server: VideoServer) -> None:
    refused("a=http://127.0.0.1:9/", words="no endpoint answers")
    refused("a=http://me:key@127.0.0.1/", words="without user")
    server.status = 401
    refused(f"a={server.url}", words=f"wants a key.*{TOKEN} is not set")
    server.status = 503
    refused(f"a={server.url}", words="is not ready")
    assert httpx.get(server.url).status_code == 503
