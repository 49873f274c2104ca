"""CLIP embeddings and scores against open-clip itself, on the small CLIP that we build."""

from __future__ import annotations

import hashlib
import importlib.resources
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from engine.clip import ClipModel, ClipScore, Embed, windows
from engine.schema import CLIPS
from engine.tiny_clip import build_clip
from engine.weights import Weights

torch = pytest.importorskip("torch")
open_clip = pytest.importorskip("open_clip")

KEYFRAMES = pa.list_(pa.struct([("time_s", pa.float64()), ("jpeg", pa.binary())]))
SHORT = "A cup of coffee on a wooden table."
LONG = (
    "A woman in an orange suit stands before two flags, and smiles. Behind her a model of a rocket"
    " is seen! Is it a portrait? Her hair is red, her helmet is white, and a patch on her arm shows"
    " the name of her mission. The light comes from the left, the background is out of focus, and"
    " nothing moves but the camera, which comes nearer, slowly and steadily, until only her face"
    " is left in the picture. At the end the picture turns dark."
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_clip(tmp_path_factory.mktemp("tiny") / "clip")


@pytest.fixture(scope="module")
def model(tiny: Path) -> ClipModel:
    return ClipModel(weights=Weights(at=str(tiny)))


@pytest.fixture(scope="module")
def direct(tiny: Path) -> tuple:
    """What open-clip itself makes of the folder: model, preprocessing, tokenizer."""
    name = f"local-dir:{tiny}"
    loaded, _, preprocess = open_clip.create_model_and_transforms(name)
    return loaded.eval(), preprocess, open_clip.get_tokenizer(name)


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    """Photographs of all shapes, as JPEG."""
    folder = importlib.resources.files("skimage") / "data"
    found = []
    for name in "astronaut brick camera chelsea coffee grass ihc moon motorcycle_left".split():
        with importlib.resources.as_file(folder / f"{name}.png") as path:
            photo = Image.open(path).convert("RGB")
        photo.thumbnail((320, 200))
        found.append(jpeg(photo))
    return found


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def clips(*rows: list[bytes]) -> pa.Table:
    keyframes = [[{"time_s": float(t), "jpeg": j} for t, j in enumerate(row)] for row in rows]
    ids = pa.array([f"{i}" for i in range(len(rows))], pa.string())
    return pa.table({"clip_id": ids, "keyframes": pa.array(keyframes, KEYFRAMES)})


def embeddings(table: pa.Table) -> np.ndarray:
    return np.array(table["clip_embedding"].to_pylist())


def frames_by_hand(direct: tuple, jpegs: list[bytes]) -> torch.Tensor:
    """Unit-length embedding of each, one at a time."""
    loaded, preprocess, _ = direct
    found = []
    with torch.inference_mode():
        for data in jpegs:
            picture = preprocess(Image.open(io.BytesIO(data))).unsqueeze(0)
            found.append(loaded.encode_image(picture, normalize=True)[0])
    return torch.stack(found)


def text_by_hand(direct: tuple, text: str) -> torch.Tensor:
    loaded, _, tokenize = direct
    with torch.inference_mode():
        return loaded.encode_text(tokenize([text]), normalize=True)[0]


def test_embedding_is_mean_of_unit_embeddings(model, direct, photos):
    found = Embed(model=model).load()(clips(photos[:4], photos[4:5]))
    assert found["clip_embedding"].type == CLIPS.field("clip_embedding").type
    frames = frames_by_hand(direct, photos[:5]).numpy()
    np.testing.assert_allclose(embeddings(found)[0], frames[:4].mean(0), atol=1e-5)
    np.testing.assert_allclose(embeddings(found)[1], frames[4], atol=1e-5)
    # pictures that differ leave a mean shorter than 1, and it stays so
    norms = np.linalg.norm(embeddings(found), axis=1)
    assert norms[0] < 0.95 and norms[1] == pytest.approx(1, abs=1e-5)
    assert found["clip_model"].to_pylist() == [model.label] * 2
    assert re.fullmatch(r"folder/[0-9a-f]{16}", model.label)


def test_neither_batch_nor_pass_counts(model, photos):
    rows = [photos[:3], photos[3:4], photos[2:9], photos[7:]]
    together = Embed(model=model).load()(clips(*rows))
    small = Embed(model=model, pictures_per_pass=2, num_cpus=1).load()
    alone = pa.concat_tables([small(clips(row)) for row in rows])
    np.testing.assert_allclose(embeddings(together), embeddings(alone), atol=1e-5)
    again = Embed(model=model).load()(clips(*rows))
    assert again.equals(together)


def test_rows_that_cannot_be_embedded(model, photos):
    rows = [photos[:2], [], [photos[0], photos[1][: len(photos[1]) // 2]], [b"no"], photos[2:4]]
    embed = Embed(model=model, pictures_per_pass=3).load()
    found = embed(clips(*rows))
    assert found["error_type"].to_pylist() == [
        None,
        "NoKeyframes",
        "DecodeError",
        "DecodeError",
        None,
    ]
    assert "keyframe of 2 bytes cannot be decoded" in found["error"][3].as_py()
    assert found["clip_model"].is_null().to_pylist() == [False, True, True, True, False]
    left = embed(clips(rows[0], rows[4]))
    both = np.array([found["clip_embedding"][i].as_py() for i in (0, 4)])
    np.testing.assert_allclose(both, embeddings(left), atol=1e-5)
    assert embed(clips()).num_rows == 0
    assert embed(clips([b"no"]))["error_type"].to_pylist() == ["DecodeError"]


def captioned(embedded: pa.Table, *texts: str, column: str = "caption") -> pa.Table:
    return embedded.select(["clip_embedding", "clip_model"]).append_column(
        column, pa.array(texts, pa.string())
    )


@pytest.fixture(scope="module")
def embedded(model, photos) -> pa.Table:
    return Embed(model=model).load()(clips(photos[:3], photos[3:6], photos[6:]))


def test_clip_score_of_a_short_caption(model, direct, photos, embedded):
    score = ClipScore(model=model).load()
    texts = (SHORT, "", "Zwei Hunde & ein café — 猫")
    found = score(captioned(embedded, *texts))["clip_score"].to_pylist()
    frames = frames_by_hand(direct, photos)
    for i, text in enumerate(texts):
        cosines = frames[3 * i : 3 * i + 3] @ text_by_hand(direct, text)
        assert found[i] == pytest.approx(cosines.mean().item(), abs=1e-5)
    one_by_one = [
        score(captioned(embedded, *texts).slice(i, 1))["clip_score"][0].as_py() for i in range(3)
    ]
    assert one_by_one == pytest.approx(found, abs=1e-5)


def test_clip_score_of_a_long_caption(model, direct, photos, embedded):
    tokenizer = direct[2]
    assert len(tokenizer.encode(LONG)) > 75
    # by hand: as many whole sentences as fit into 75 tokens, then the others
    sentences = re.findall(r"[^.!?]+[.!?]", LONG)
    first, second = "".join(sentences[:4]), "".join(sentences[4:])
    sizes = [len(tokenizer.encode(part)) for part in (first, second)]
    assert max(sizes) <= 75 < sizes[0] + len(tokenizer.encode(sentences[4]))
    parts = torch.stack([text_by_hand(direct, part) for part in (first, second)])
    scores = parts @ frames_by_hand(direct, photos[:3]).mean(0)
    expected = (scores[0] * sizes[0] + scores[1] * sizes[1]) / sum(sizes)

    score = ClipScore(model=model, windows_per_pass=3).load()
    found = score(captioned(embedded, LONG, SHORT, LONG))["clip_score"].to_pylist()
    assert found[0] == pytest.approx(expected.item(), abs=1e-5)
    assert found[0] != pytest.approx(scores[0].item(), abs=1e-3)  # what comes later counts
    alone = frames_by_hand(direct, photos[3:6]) @ text_by_hand(direct, SHORT)
    assert found[1] == pytest.approx(alone.mean().item(), abs=1e-5)


@pytest.mark.parametrize(
    "text",
    [
        LONG,
        LONG.replace(".", ",").replace("!", "").replace("?", ""),
        "He said “go now.” Then nothing. " * 12,
        "一只猫坐在门口。它看着街道！" * 12,
        "word " * 300,
        "Well... " + "pneumonoultramicroscopic" * 40 + " ends here.",
    ],
)
def test_windows_lose_nothing(text: str, direct: tuple):
    encode = direct[2].encode
    found = windows(text, encode, 75)
    assert [t for w in found for t in w] == encode(text)
    assert len(found) > 1 and max(map(len, found)) <= 75
    # two windows side by side would not fit into one, unless a whole sentence kept them apart
    assert len(found) <= 2 * -(-len(encode(text)) // 75)


def test_windows_by_hand():
    words: list[str] = []

    def encode(text: str) -> list[int]:
        """A token for each letter of a word; a word of three is one word."""
        found = []
        for word in text.split():
            if word not in words:
                words.append(word)
            found += [words.index(word)] * len(word)
        return found

    def shown(text: str, room: int) -> list[str]:
        runs = [[words[t] for t in w] for w in windows(text, encode, room)]
        return [" ".join(dict.fromkeys(run)) for run in runs]

    assert shown("aa bb. cc", 10) == ["aa bb. cc"]
    assert shown("aa bb. cc dd! ee? ff", 9) == ["aa bb.", "cc dd! ee?", "ff"]
    assert shown("a. bb cc dd ee ff. g.", 5) == ["a. bb", "cc dd", "ee ff.", "g."]
    assert [len(w) for w in windows("aaaaaaaaaaaaa", encode, 5)] == [5, 5, 3]
    assert windows("", encode, 5) == [[]]


def test_captions_need_no_pictures(model, embedded):
    """One forward pass over pictures serves all: the others have no vision tower to run."""
    assert not {"keyframes"} & set(ClipScore(model=model).reads)
    assert ClipScore(model=model, of="rephrased").reads[0] == "rephrased"
    text, image = model.load("text").model, model.load("image").model
    assert [n for n, _ in text.named_children() if "visual" in n] == []
    assert [n for n, _ in image.named_children()] == ["visual"]
    score = ClipScore(model=model, of="rephrased").load()
    assert score(captioned(embedded, "a", "b", "c", column="rephrased"))["error"].null_count == 3


def test_score_of_another_models_embedding_fails(model, embedded):
    table = captioned(embedded, "a", "b", "c")
    others = pa.array([model.label, "ViT-L-14/openai", model.label])
    found = ClipScore(model=model).load()(table.set_column(1, "clip_model", others))
    assert found["error_type"].to_pylist() == [None, "OtherModel", None]
    assert found["clip_score"].is_null().to_pylist() == [False, True, False]
    assert "ViT-L-14/openai" in found["error"][1].as_py()


def embed_one(model: ClipModel, data: bytes) -> np.ndarray:
    return embeddings(Embed(model=model).load()(clips([data])))[0]


def score_one(model: ClipModel, text: str) -> np.ndarray:
    loaded, tokenizer = model.load("text"), model.tokenizer()
    return loaded.embed_texts(tokenizer([text]))[0]


@pytest.fixture
def known(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """open-clip lists the small model with a tag `openai`; the result puts its weights into the
    hub's cache, which is empty before.
    """
    from huggingface_hub import constants
    from open_clip import factory, pretrained

    config = json.loads((tiny / "open_clip_config.json").read_text())["model_cfg"]
    del config["quick_gelu"]  # as open-clip's own list of architectures
    path = tmp_path / "ViT-tiny.json"
    path.write_text(json.dumps(config))
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", [*factory._MODEL_CONFIG_PATHS])
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", {**factory._MODEL_CONFIGS})
    open_clip.add_model_config(path)
    listed = pretrained._pcfg(hf_hub="someone/tiny.openai/", quick_gelu=True)
    other = pretrained._pcfg(hf_hub="someone/tiny.other/")
    tags = {"openai": listed, "other": other}
    monkeypatch.setitem(pretrained._PRETRAINED, "ViT-tiny", tags)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def fetch() -> str:
        cache = tmp_path / "hub" / "models--someone--tiny.openai"
        snapshot = cache / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        shutil.copy(tiny / "open_clip_model.safetensors", snapshot)
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("0" * 40)
        return str(snapshot / "open_clip_model.safetensors")

    return fetch


class Tree(torch.nn.Module):
    """Modules with nothing but the tensors of a state dict, under its names."""

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__()
        for top in dict.fromkeys(key.partition(".")[0] for key in state):
            below = {k.partition(".")[2]: v for k, v in state.items() if k.partition(".")[0] == top}
            if "" in below:
                self.register_parameter(top, torch.nn.Parameter(below[""]))
            else:
                self.add_module(top, Tree(below))

    def forward(self) -> int:
        return 0


def test_openai_weights_by_tag_file_folder_and_archive(known, tiny, tmp_path, photos):
    """All give the numbers that open-clip's loader of OpenAI's checkpoints gives."""
    from open_clip import pretrained

    known()
    plain = open_clip.create_model("ViT-tiny", str(tiny / "open_clip_model.safetensors"))
    state, archive = tmp_path / "state.pt", tmp_path / "archive.pt"
    torch.save({k: v.half() for k, v in plain.state_dict().items()}, state)
    reference = open_clip.load_openai_model(str(state), precision="fp32", device="cpu")
    # OpenAI's come as TorchScript with three numbers beside the weights
    extra = {n: torch.tensor(1.0) for n in ("input_resolution", "context_length", "vocab_size")}
    torch.jit.save(torch.jit.script(Tree(plain.half().state_dict() | extra)), archive)
    with pytest.raises(
        ValueError, match="TorchScript archive, which can hold code, and not OpenAI"
    ):
        ClipModel(name="ViT-tiny", weights=Weights(at=str(archive))).load("image")
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    listed = pretrained._PRETRAINED["ViT-tiny"]["openai"]
    listed["url"] = f"https://models/{sha256}/ViT-tiny.pt"

    *_, preprocess = open_clip.create_model_and_transforms("ViT-tiny", "openai")
    picture = preprocess(Image.open(io.BytesIO(photos[0]))).unsqueeze(0)
    with torch.inference_mode():
        image = reference.encode_image(picture, normalize=True)[0].numpy()
        text = reference.encode_text(open_clip.tokenize([SHORT]), normalize=True)[0].numpy()

    places = {
        "tag": "openai",
        "file": Weights(at=str(tiny / "open_clip_model.safetensors")),
        "pth": Weights(at=str(state)),
        "archive": Weights(at=str(archive)),
        "folder": Weights(at=str(tiny)),
    }
    for place, weights in places.items():
        model = ClipModel(name="ViT-tiny", weights=weights)
        np.testing.assert_allclose(embed_one(model, photos[0]), image, atol=1e-5, err_msg=place)
        np.testing.assert_allclose(score_one(model, SHORT), text, atol=1e-5, err_msg=place)
        kinds = {type(m).__name__ for m in model.load("image").model.modules()}
        assert "QuickGELU" in kinds and "GELU" not in kinds

    # the activation is what makes the difference: with GELU the same weights say something else
    file = places["file"]
    gelu = ClipModel(name="ViT-tiny", weights=file, quick_gelu=False)
    assert abs(embed_one(gelu, photos[0]) - image).max() > 1e-3
    other = ClipModel(name="ViT-tiny", weights=file, tag="other")  # whose listing says GELU
    np.testing.assert_array_equal(embed_one(other, photos[0]), embed_one(gelu, photos[0]))
    assert other.label != ClipModel(name="ViT-tiny", weights=file).label
    folder = ClipModel(name="ViT-tiny", weights=places["folder"], quick_gelu=False)
    np.testing.assert_allclose(embed_one(folder, photos[0]), embed_one(gelu, photos[0]), atol=1e-5)


def test_weights_of_a_tag_are_looked_for_without_network(known):
    model = ClipModel(name="ViT-tiny")
    with pytest.raises(ValueError, match="weights openai of ViT-tiny are not on this") as caught:
        Embed(model=model).check()
    (command,) = re.findall(r'`python -c "([^"]*)"`', str(caught.value))
    file = known()
    # the command asks open-clip for the very file that is then found (its hub is this cache)
    asked = command.replace("o.download", "found = o.download")
    said: dict[str, str] = {}
    exec(asked, said)
    assert said["found"] == file
    for operator in (Embed(model=model), ClipScore(model=model)):
        operator.check()


def test_paper_model_is_known_to_open_clip(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"get_pretrained_cfg\('ViT-L-14', 'openai'\)") as caught:
        ClipModel().check()
    assert "\n" not in str(caught.value)
    assert open_clip.get_pretrained_cfg("ViT-L-14", "openai")["quick_gelu"]


@pytest.mark.parametrize(
    "model, said",
    [
        (ClipModel(name="ViT-L-15"), "no model 'ViT-L-15'"),
        (ClipModel(name="hf-hub:timm/x"), "no model 'hf-hub:timm/x'"),
        (ClipModel(weights="OpenAI"), "no weights 'OpenAI' of ViT-L-14: it has openai, "),
        (ClipModel(name="ViT-B-32"), "embeds in 512 numbers"),
        (ClipModel(weights=Weights(at="{at}/none")), "no weights at"),
        (ClipModel(weights=Weights(at="{at}")), "has no open_clip_config.json"),
        (ClipModel(weights=Weights(at="{at}/bare")), "no weights beside it"),
        (ClipModel(weights=Weights(at="{at}/broken")), "is no configuration of open-clip"),
        (ClipModel(weights=Weights(at="{at}/f.pt"), tag="mine"), "or quick_gelu"),
    ],
)
def test_check_says_what_is_wrong(model, said, tiny, tmp_path, known):
    known()
    (tmp_path / "f.pt").touch()
    for name in ("bare", "broken"):
        (tmp_path / name).mkdir()
        shutil.copy(tiny / "open_clip_config.json", tmp_path / name)
    (tmp_path / "broken" / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 768}}')
    (tmp_path / "broken" / "a.bin").touch()
    weights = model.weights
    if isinstance(weights, Weights):
        weights = Weights(at=weights.at.format(at=tmp_path))
    placed = ClipModel(name=model.name, weights=weights, tag=model.tag)
    if placed.name == "ViT-B-32":  # whose weights must be here for the check to come so far
        placed = ClipModel(name="ViT-B-32", weights=Weights(at=str(tmp_path / "f.pt")))
    for operator in (Embed(model=placed), ClipScore(model=placed)):
        with pytest.raises(ValueError, match=re.escape(said)) as caught:
            operator.check()
        assert "\n" not in str(caught.value)


def test_a_captioners_tokenizer_must_be_clips():
    model = ClipModel(name="ViT-B-16-SigLIP", weights=Weights(at=__file__), tag="webli")
    Embed(model=model).check()
    with pytest.raises(ValueError, match="has a tokenizer of its own"):
        ClipScore(model=model).check()


@pytest.mark.parametrize("content", [b"", b"not one", b"PK\5\6" + bytes(18), None])
def test_a_file_without_weights_is_said(content, tiny, tmp_path, known):
    file = tmp_path / "some.pt"
    if content is None:
        torch.save({"layers.0.weight": torch.zeros(2, 2)}, file)
    else:
        file.write_bytes(content)
    model = ClipModel(name="ViT-tiny", weights=Weights(at=str(file)))
    model.check()
    with pytest.raises(ValueError, match=r"some\.pt holds no weights of ViT-tiny/") as caught:
        Embed(model=model).load()
    assert "\n" not in str(caught.value)


def test_fingerprint_goes_by_content(model, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "copy")
    copy = ClipModel(weights=Weights(at=str(tmp_path / "copy")))
    assert Embed(model=copy).fingerprint == Embed(model=model).fingerprint
    assert copy.label == model.label
    assert Embed(model=model, pictures_per_pass=3).fingerprint == Embed(model=model).fingerprint
    config = tmp_path / "copy" / "open_clip_config.json"
    config.write_text(config.read_text().replace('"quick_gelu": true', '"quick_gelu": false'))
    different = [
        model,
        copy,
        ClipModel(),
        ClipModel(weights="laion2b_s32b_b82k"),
        ClipModel(quick_gelu=False),
        ClipModel(dtype="bfloat16"),
    ]
    assert len({Embed(model=m).fingerprint for m in different}) == len(different)
    assert len({ClipScore(model=m).fingerprint for m in different}) == len(different)
    assert copy.label != model.label


def test_low_precision_is_near(model, photos):
    low = ClipModel(weights=model.weights, dtype="bfloat16")
    exact, rough = embed_one(model, photos[0]), embed_one(low, photos[0])
    assert exact @ rough > 0.99 and (exact != rough).any()


def test_the_small_model_is_the_same_every_time(tiny, tmp_path):
    again = build_clip(tmp_path / "again")
    for name in ("open_clip_model.safetensors", "open_clip_config.json"):
        assert (again / name).read_bytes() == (tiny / name).read_bytes()


def test_the_small_models_scores_fall_on_both_sides(model, photos):
    """Of the threshold of Mimir's recipe."""
    rows = clips(*([p] for p in photos))
    table = (
        Embed(model=model)
        .load()(rows)
        .append_column(
            "caption", pa.array([f"{SHORT} {i} {'dogs' * (i % 3)}" for i in range(len(photos))])
        )
    )
    found = np.array(ClipScore(model=model).load()(table)["clip_score"].to_pylist())
    assert (found > 0.25).any() and (found < 0.25).any()


def test_importing_loads_no_model_library():
    code = (
        "import sys, engine.clip, engine.aesthetic, engine.tiny_clip;"
        "print({'torch', 'open_clip', 'transformers', 'torchvision'} & set(sys.modules) or 'none')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "none"


def test_what_is_recorded_of_a_file_goes_by_content_and_activation(known, tiny, tmp_path):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    content = (tiny / "open_clip_model.safetensors").read_bytes()
    first.write_bytes(content)
    second.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said = ClipModel(name="ViT-L-14", weights=Weights(at=str(first)))
    same = ClipModel(name="ViT-L-14", weights=Weights(at=str(first)), quick_gelu=True)
    gelu = ClipModel(name="ViT-L-14", weights=Weights(at=str(first)), quick_gelu=False)
    other = ClipModel(name="ViT-L-14", weights=Weights(at=str(second)))
    assert (
        said.label == same.label and Embed(model=said).fingerprint == Embed(model=same).fingerprint
    )
    assert ClipModel(quick_gelu=True).describe() == ClipModel().describe()
    assert ClipModel().label == "ViT-L-14/openai"
    assert ClipModel(quick_gelu=False).label == "ViT-L-14/openai+gelu"
    assert len({m.label for m in (said, gelu, other)}) == 3
    assert len({Embed(model=m).fingerprint for m in (said, gelu, other)}) == 3


@pytest.mark.parametrize("text", ["word" * 125, "", "🎬🎥🐶 " * 60, "<b>&amp;</b> é ñ ß " * 30])
def test_odd_captions_are_scored_whole(text, model, direct, embedded):
    encode = direct[2].encode
    found = windows(text, encode, 75)
    assert [t for w in found for t in w] == encode(text) and max(map(len, found)) <= 75
    scored = ClipScore(model=model).load()(captioned(embedded, text, text, SHORT))
    assert scored["error"].null_count == 3 and np.isfinite(scored["clip_score"][0].as_py())


def test_small_captions_of_the_sample_corpus_fall_on_both_sides(model, samples, tmp_path):
    """Of 0.25: the captions are those of the small captioner, on keyframes of the scan."""
    from engine.caption import Caption
    from engine.chat import TransformersChat
    from engine.scan import Scan, scan_source
    from engine.tiny_vlm import build_qwen2_vl

    rows, starts = [], []
    for name in ("astronaut_zoom", "blink", "coffee_pan", "cuts", "fades", "letterboxed"):
        _, found, keyframes = scan_source(str(samples / f"{name}.mp4"), Scan())
        for i, clip in enumerate(found.to_pylist()):
            keys = [k for k in keyframes.to_pylist() if k["clip"] == i]
            rows.append([{"time_s": k["time_s"], "jpeg": k["jpeg"]} for k in keys])
            starts.append(clip["start_s"])
    table = pa.table({"start_s": starts, "keyframes": pa.array(rows, KEYFRAMES)})
    chat = TransformersChat(weights=Weights(at=str(build_qwen2_vl(tmp_path))), max_new_tokens=64)
    captions = Caption(chat=chat).load()(table)["caption"]
    embedded = Embed(model=model).load()(table).append_column("caption", captions)
    scores = np.array(ClipScore(model=model).load()(embedded)["clip_score"].to_pylist())
    assert 0.4 <= (scores >= 0.25).mean() <= 0.9
