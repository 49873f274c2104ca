"""Semantic encoders against their libraries on the same weights, and against closed forms."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("torchvision")

from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torchvision.transforms.v2 import functional as torchvision_functional  # noqa: E402
from transformers import (  # noqa: E402
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLVideoProcessor,
    VJEPA2Model,
    VJEPA2VideoProcessor,
)

from engine.weights import Weights  # noqa: E402
from trainers import features, frames  # noqa: E402
from trainers.semantic_towers import resized  # noqa: E402
from trainers.semantics import SemanticEncoder, Semantics  # noqa: E402
from trainers.system import Bucket, Sample  # noqa: E402
from trainers.tiny_semantics import (  # noqa: E402
    QWEN_DIM,
    VJEPA2_DIM,
    build_qwen2_5_vl,
    build_vjepa2,
)
from trainers.tiny_vdm import build_cogvideox, build_wan  # noqa: E402

CPU = torch.device("cpu")
KINDS = ("qwen2_5_vl", "vjepa2", "vae")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each kind by its name, `wan` of the kind vae, and `shards`, the Qwen2.5-VL in many files."""
    folder = tmp_path_factory.mktemp("semantics")
    build_qwen2_5_vl(folder / "qwen2_5_vl")
    build_qwen2_5_vl(folder / "shards", shards=True)
    build_vjepa2(folder / "vjepa2")
    build_cogvideox(folder / "vae", rotary=True)
    build_wan(folder / "wan")
    return folder


def encoder(folder: Path, kind: str, at: str | None = None, **how: float) -> SemanticEncoder:
    return SemanticEncoder(kind=kind, weights=Weights(at=str(folder / (at or kind))), **how)


def random_frames(*, num: int = 1, frames: int = 4, height: int = 84, width: int = 112):
    generator = torch.Generator().manual_seed(frames)
    shape = (num, frames, height, width, 3)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-6) -> bool:
    assert found.shape == wanted.shape
    return float((found.float() - wanted.float()).abs().max()) <= tolerance


# Each encoder gives what its library gives


@torch.no_grad()
@pytest.mark.parametrize("at", ["qwen2_5_vl", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_qwen_gives_what_the_whole_model_and_its_processor_give(
    folder: Path, at: str, dtype: torch.dtype
) -> None:
    video_BFHW3 = random_frames(frames=6)
    processor = Qwen2VLVideoProcessor.from_pretrained(folder / "qwen2_5_vl")
    ready = processor(
        videos=[video_BFHW3[0].movedim(-1, 1)],
        do_resize=False,
        do_sample_frames=False,
        cap_pixels_per_frame=False,
        return_tensors="pt",
    )
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "qwen2_5_vl", dtype=dtype)
    said = model.eval().model.visual(
        ready["pixel_values_videos"].to(dtype), grid_thw=ready["video_grid_thw"]
    )
    found = encoder(folder, "qwen2_5_vl", at).load(CPU, dtype).encode(video_BFHW3)
    assert found.shape == (1, 3, 3, 4, QWEN_DIM) and found.dtype == dtype
    assert said.pooler_output.std() > 0.01
    assert close(found[0], said.pooler_output.view(3, 3, 4, QWEN_DIM))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vjepa2_gives_what_the_whole_model_and_its_processor_give(
    folder: Path, dtype: torch.dtype
) -> None:
    video_BFHW3 = random_frames(frames=8, height=64, width=64)
    processor = VJEPA2VideoProcessor.from_pretrained(folder / "vjepa2")
    ready = processor(
        videos=[video_BFHW3[0].movedim(-1, 1)],
        do_resize=False,
        do_center_crop=False,
        do_sample_frames=False,
        return_tensors="pt",
    )
    model = VJEPA2Model.from_pretrained(folder / "vjepa2", dtype=dtype).eval()
    said = model(ready["pixel_values_videos"].to(dtype), skip_predictor=True).last_hidden_state
    found = encoder(folder, "vjepa2").load(CPU, dtype).encode(video_BFHW3)
    assert found.shape == (1, 4, 4, 4, VJEPA2_DIM) and found.dtype == dtype
    assert close(found[0], said.view(4, 4, 4, VJEPA2_DIM))


@torch.no_grad()
def test_vjepa2_on_larger_frames_is_the_model_made_for_them(folder: Path, tmp_path: Path) -> None:
    """The library numbers tokens by `crop_size`; ours by the frames that it is given."""
    larger = tmp_path / "larger"
    shutil.copytree(folder / "vjepa2", larger)
    changed(larger / "config.json", crop_size=96)
    video_BFHW3 = random_frames(frames=4, height=96, width=96)
    mean, deviation = (
        torch.tensor(x)[:, None, None] for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    unit = (video_BFHW3.movedim(-1, 2) / 255 - mean) / deviation
    model = VJEPA2Model.from_pretrained(larger).eval()
    wanted = model(unit, skip_predictor=True).last_hidden_state.view(1, 2, 6, 6, VJEPA2_DIM)
    small = VJEPA2Model.from_pretrained(folder / "vjepa2").eval()
    misnumbered = small(unit, skip_predictor=True).last_hidden_state.view_as(wanted)

    found = encoder(folder, "vjepa2").load(CPU, torch.float32).encode(video_BFHW3)
    assert close(found, wanted, 1e-5)
    assert not close(found, misnumbered, 1e-2)


def test_vjepa2_is_told_lines_and_columns_of_frames_that_are_not_square(folder: Path) -> None:
    tower = encoder(folder, "vjepa2").load(CPU, torch.float32)
    attention, told = tower._encoder.layer[0].attention, []

    def listen(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        told.extend(x[0, 0].tolist() for x in module.get_position_ids(args[0], kwargs["masks"]))

    attention.register_forward_pre_hook(
        lambda module, args, kwargs: listen(module, args, {"masks": kwargs["position_mask"]}),
        with_kwargs=True,
    )
    tower.encode(random_frames(frames=4, height=32, width=80))
    steps, lines, columns = told
    assert steps == [0] * 10 + [1] * 10
    assert lines == ([0] * 5 + [1] * 5) * 2
    assert columns == [0, 1, 2, 3, 4] * 4


@torch.no_grad()
@pytest.mark.parametrize("at", ["vae", "wan"])
def test_vae_tokens_gather_the_latents_of_two_pictures(folder: Path, at: str) -> None:
    video_BFHW3 = random_frames(num=2, frames=4, height=64, width=96)  # 2 x 3 tokens of 28 px
    chosen = encoder(folder, "vae", at)
    found = chosen.load(CPU, torch.float32).encode(video_BFHW3)
    kind = AutoencoderKLWan if at == "wan" else AutoencoderKLCogVideoX
    vae = kind.from_pretrained(folder / at, subfolder="vae").eval()
    config = vae.config

    def latents_of(picture_HW3: torch.Tensor) -> torch.Tensor:
        unit = picture_HW3.movedim(-1, 0)[None, :, None] / 127.5 - 1
        mean = vae.encode(unit).latent_dist.mean[0, :, 0]
        if at == "vae":
            return mean * config.scaling_factor
        center, deviation = (
            torch.tensor(x)[:, None, None] for x in (config.latents_mean, config.latents_std)
        )
        return (mean - center) / deviation

    channels = config.z_dim if at == "wan" else config.latent_channels
    assert found.shape == (2, 2, 2, 3, chosen.facts().dim)
    assert chosen.facts().dim == 2 * 4 * 4 * channels
    for video, step, line, column in ((0, 0, 0, 0), (1, 1, 0, 2), (0, 1, 1, 1), (1, 0, 1, 2)):
        token = found[video, step, line, column].view(2, 4, 4, channels)
        for number in range(2):
            latents_CYX = latents_of(video_BFHW3[video, 2 * step + number])
            assert latents_CYX.shape == (channels, 8, 12)
            patch = latents_CYX[:, 4 * line : 4 * line + 4, 4 * column : 4 * column + 4]
            assert close(token[number], patch.movedim(0, -1), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "vjepa2"])
def test_pixels_are_normalised_as_the_checkpoint_says(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    """A frame of twice the mean and deviation, shown in twice the brightness, is the same."""
    pixels = {"image_mean": [0.2, 0.3, 0.4], "image_std": [0.1, 0.2, 0.3]}
    twice = {name: [2 * x for x in values] for name, values in pixels.items()}
    found = []
    for number, (about, scale) in enumerate(((pixels, 1), (twice, 2), (pixels, 2))):
        shutil.copytree(folder / kind, tmp_path / str(number))
        # As transformers 5 saves it; it stands before the older file of the checkpoint.
        text = json.dumps({"video_processor": about})
        (tmp_path / str(number) / "processor_config.json").write_text(text)
        video_BFHW3 = random_frames(frames=2, height=112, width=112) // 2 * scale
        tower = encoder(tmp_path, kind, str(number)).load(CPU, torch.float32)
        found.append(tower.encode(video_BFHW3))
    assert close(found[0], found[1], 1e-5)
    assert not close(found[0], found[2], 1e-3)


# Where a token lies, and what it sees


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_where_its_pixels_are(folder: Path, kind: str) -> None:
    tower, side = encoder(folder, kind).load(CPU, torch.float32), 16 if kind == "vjepa2" else 28
    video_BFHW3 = random_frames(frames=4, height=3 * side, width=5 * side)
    before = tower.encode(video_BFHW3)
    for step, line, column in ((0, 0, 1), (1, 2, 4), (1, 1, 0), (0, 2, 3)):
        changed = video_BFHW3.clone()
        lines = slice(line * side, (line + 1) * side)
        columns = slice(column * side, (column + 1) * side)
        changed[:, 2 * step : 2 * step + 2, lines, columns] ^= 128
        moved = (tower.encode(changed) - before).norm(dim=-1)[0]
        assert moved.shape == (2, 3, 5)
        assert torch.unravel_index(moved.argmax(), moved.shape) == (step, line, column)
        if kind != "vjepa2":
            assert not moved[1 - step].any()


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "vae"])
def test_encoding_in_parts_is_encoding_whole(folder: Path, kind: str) -> None:
    tower, video_BFHW3 = encoder(folder, kind).load(CPU, torch.float32), random_frames(frames=10)
    tower.frames_at_once = 10
    whole = tower.encode(video_BFHW3)
    for at_once in (2, 4, 6):
        tower.frames_at_once = at_once
        assert close(tower.encode(video_BFHW3), whole)
    alone = torch.cat([tower.encode(pair) for pair in video_BFHW3.split(2, 1)], 1)
    assert close(alone, whole)


def test_vjepa2_in_other_chunks_is_another_encoder(folder: Path) -> None:
    video_BFHW3 = random_frames(frames=10, height=32, width=48)
    whole, some = (encoder(folder, "vjepa2", chunk=chunk) for chunk in (10, 4))
    found = {e.chunk: e.load(CPU, torch.float32).encode(video_BFHW3) for e in (whole, some)}
    assert not close(found[10], found[4], 1e-3)
    alone = some.load(CPU, torch.float32)
    parts = [alone.encode(part) for part in video_BFHW3.split(4, 1)]  # 4, 4 and 2 frames
    assert close(torch.cat(parts, 1), found[4])
    assert fingerprint(whole) != fingerprint(some)
    assert (whole.facts().chunk, some.facts().chunk) == (10, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_video_does_not_depend_on_those_beside_it(folder: Path, kind: str) -> None:
    tower = encoder(folder, kind).load(CPU, torch.float32)
    videos = random_frames(num=3, frames=4, height=60, width=90)
    together = tower.encode(videos)
    for number in range(3):
        assert close(tower.encode(videos[number : number + 1])[0], together[number], 1e-5)
    assert not close(together[0], together[1], 1e-2)


def test_frames_are_resized_as_the_processors_do() -> None:
    frames_N3HW = random_frames(frames=2, height=90, width=161)[0].movedim(-1, 1)
    bicubic = torchvision_functional.InterpolationMode.BICUBIC
    for size in ([84, 168], [28, 56], [112, 196]):
        found = resized(frames_N3HW, *size)
        in_float = torchvision_functional.resize(frames_N3HW.float(), size, bicubic, antialias=True)
        assert torch.equal(found.float(), in_float.round().clamp(0, 255))
        # Of uint8 torchvision rounds between lines and columns too.
        of_bytes = torchvision_functional.resize(frames_N3HW, size, bicubic, antialias=True)
        assert (found.float() - of_bytes.float()).abs().mean() < 0.5
    assert resized(frames_N3HW, 90, 161) is frames_N3HW
    flat = torch.full((1, 3, 40, 40), 77, dtype=torch.uint8)
    assert (resized(flat, 28, 56) == 77).all()


# Which frames it sees


@pytest.mark.parametrize(
    "video_fps, fps, num, wanted",
    [
        (24, 1.6, 61, [8, 23, 38, 53]),
        (24, 1.6, 31, [8, 23]),
        (8, 4, 9, [2, 4, 6, 8]),
        (8, 8, 5, [1, 2, 3, 4]),
        (6, 2, 7, [2, 5]),
    ],
)
def test_frames_are_taken_from_the_middle(
    folder: Path, video_fps: float, fps: float, num: int, wanted: list[int]
) -> None:
    bright_BFHW3 = torch.arange(num, dtype=torch.uint8)[None, :, None, None, None].expand(
        1, num, 28, 28, 3
    )
    taken = encoder(folder, "qwen2_5_vl", fps=fps)
    found = taken.sampled(bright_BFHW3, video_fps)[0, :, 0, 0, 0].tolist()
    assert found == wanted

    # A semantic frame is the mean of what it stands for in time, and holds its own samples.
    every = taken.every(video_fps)
    stands_for = [list(range(a + 1, a + 1 + 2 * every)) for a in range(0, num - 1, 2 * every)]
    middles = taken.middles(len(stands_for), video_fps)
    assert middles == tuple(sum(span) / len(span) for span in stands_for)
    for number, span in enumerate(stands_for):
        assert set(found[2 * number : 2 * number + 2]) <= set(span)
    bucket = Bucket(frames=num, height_px=28, width_px=28)
    assert taken.grid(bucket, video_fps) == (len(stands_for), 1, 1)


def test_windows_hold_whole_semantic_frames(folder: Path) -> None:
    """5 s at 24 fps: 4 semantic frames in each window."""
    middles = encoder(folder, "qwen2_5_vl").middles(8, 24)
    assert middles[:2] == (15.5, 45.5)
    assert [int(time // 120) for time in middles] == [0] * 4 + [1] * 4


def test_the_grid_is_the_nearest_to_the_frames(folder: Path) -> None:
    video = Bucket(frames=61, height_px=480, width_px=832)
    assert encoder(folder, "qwen2_5_vl").grid(video, 24) == (2, 17, 30)
    assert encoder(folder, "vae").grid(video, 24) == (2, 17, 30)
    assert encoder(folder, "vjepa2").grid(video, 24) == (2, 30, 52)
    small = Bucket(frames=31, height_px=9, width_px=43)
    assert encoder(folder, "qwen2_5_vl").grid(small, 24) == (1, 1, 2)


@pytest.mark.parametrize(
    "num, nearest", [(49, 61), (45, 31), (60, 61), (1, 31), (30, 31), (121, None)]
)
def test_a_length_that_holds_no_whole_semantic_frames_is_refused(
    folder: Path, num: int, nearest: int | None
) -> None:
    bucket = Bucket(frames=num, height_px=56, width_px=56)
    if nearest is None:
        assert encoder(folder, "qwen2_5_vl").grid(bucket, 24)[0] == 4
        return
    with pytest.raises(ValueError, match=rf"31, 61, …; the nearest is {nearest}$") as error:
        encoder(folder, "qwen2_5_vl").grid(bucket, 24)
    assert "\n" not in str(error.value)


def test_rates_that_do_not_meet_are_refused(folder: Path) -> None:
    found = encoder(folder, "qwen2_5_vl")
    assert found.every(24) == 15 and found.every(8) == 5
    with pytest.raises(ValueError, match=r"25 fps .* 1\.6 a second.* 25\.6 fps of video or 1\.56"):
        found.every(25)
    with pytest.raises(ValueError, match=r"1 fps .* nearest rates are 1\.6 fps of video or 1 samp"):
        found.every(1)
    for fps in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="need a rate above 0"):
            dataclasses.replace(found, fps=fps).check()


# The encoder behind training


def fingerprint(of: SemanticEncoder, video_fps: float = 24, precision: str = "bf16") -> str:
    return Semantics(encoder=of, video_fps=video_fps, precision=precision).fingerprint


def test_what_changes_features_changes_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    qwen, vjepa2 = encoder(folder, "qwen2_5_vl"), encoder(folder, "vjepa2")
    others = [
        fingerprint(qwen),
        fingerprint(vjepa2),
        fingerprint(encoder(folder, "vae")),
        fingerprint(encoder(folder, "qwen2_5_vl", fps=2)),
        fingerprint(encoder(folder, "vjepa2", chunk=2)),
        fingerprint(qwen, video_fps=8),
        fingerprint(qwen, precision="fp32"),
    ]
    assert len(set(others)) == len(others)

    # 8 frames are what this V-JEPA 2 was trained on; where and how it runs changes nothing.
    assert fingerprint(encoder(folder, "vjepa2", chunk=8)) == fingerprint(vjepa2)
    shutil.copytree(folder / "qwen2_5_vl", tmp_path / "moved")
    moved = encoder(tmp_path, "qwen2_5_vl", "moved")
    assert fingerprint(moved) == fingerprint(qwen)
    assert fingerprint(dataclasses.replace(vjepa2, fps=2)) == fingerprint(
        dataclasses.replace(vjepa2, fps=2.0)
    )
    elsewhere = Semantics(encoder=qwen, video_fps=24, batch_size=1, num_gpus=0.5)
    assert elsewhere.fingerprint == fingerprint(qwen)


def samples_of(pixels_BFHW3: torch.Tensor) -> list[Sample]:
    _, num, height, width, _ = pixels_BFHW3.shape
    bucket = Bucket(frames=num, height_px=height, width_px=width)
    return [Sample({}, bucket, features={"pixels": pixels}) for pixels in pixels_BFHW3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_features_go_through_the_cache_bit_for_bit(folder: Path, kind: str, precision: str) -> None:
    chosen = encoder(folder, kind, fps=4)
    operator = Semantics(encoder=chosen, video_fps=8, precision=precision)
    operator.check()
    found = operator.on(CPU)(samples_of(random_frames(num=2, frames=9, height=60, width=90)))
    assert len(found) == 2
    for tensor in found:
        assert tensor.shape == (*chosen.grid(Bucket(frames=9, height_px=60, width_px=90), 8),
                                chosen.facts().dim)  # fmt: skip
        assert tensor.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
        dtype, shape, data = features.to_bytes(tensor)
        assert torch.equal(features.from_bytes(dtype, shape, data), tensor)
    assert not torch.equal(found[0], found[1])


def test_only_the_sampled_frames_matter(folder: Path) -> None:
    operator = Semantics(encoder=encoder(folder, "qwen2_5_vl"), video_fps=24, precision="fp32")
    encode = operator.on(CPU)
    video_BFHW3 = random_frames(frames=31, height=28, width=56)
    before = encode(samples_of(video_BFHW3))[0]
    noise_BFHW3 = random_frames(frames=31, height=28, width=56) ^ 255
    seen = torch.zeros(31, dtype=torch.bool)
    seen[[8, 23]] = True
    unseen_changed = torch.where(seen[:, None, None, None], video_BFHW3, noise_BFHW3)
    assert torch.equal(encode(samples_of(unseen_changed))[0], before)
    seen_changed = torch.where(seen[:, None, None, None], noise_BFHW3, video_BFHW3)
    assert not torch.equal(encode(samples_of(seen_changed))[0], before)
    with pytest.raises(ValueError, match="nearest is 31"):
        encode(samples_of(random_frames(frames=1, height=28, width=56)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_clip_is_encoded(folder: Path, videos: Path, kind: str) -> None:
    row = {"source_uri": str(videos / "a-r-r-o-w__finetrainers__hiker.mp4"), "media": "video",
           "start_s": 0.0, "end_s": 6.0}  # fmt: skip
    bucket = Bucket(frames=17, height_px=96, width_px=144)
    pixels = torch.from_numpy(frames.pixels_of(row, bucket, 8.0))
    operator = Semantics(encoder=encoder(folder, kind, fps=4), video_fps=8)
    (found,) = operator.on(CPU)([Sample(row, bucket, features={"pixels": pixels})])
    assert found.shape[:3] == operator.encoder.grid(bucket, 8)
    assert found.isfinite().all() and found.float().std(0).max() > 0


def test_an_export_names_an_encoder(folder: Path) -> None:
    chosen = encoder(folder, "vjepa2", fps=2, chunk=4).pinned()
    about = json.loads(json.dumps(dataclasses.asdict(chosen)))
    assert SemanticEncoder.from_portable(about) == chosen


def test_the_values_load_no_torch() -> None:
    code = "import sys, trainers.semantics; print({'torch', 'transformers'} & set(sys.modules))"
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.stdout.strip() == "set()", run.stderr


# What is no such encoder is refused in one line


def changed(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Iterator[Path]:
    """Copies of the checkpoints, to break."""
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def refusal(of: SemanticEncoder) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        of.check()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_model_is_refused(copy: Path) -> None:
    assert "is a model of type vjepa2, not qwen2_5_vl" in refusal(
        encoder(copy, "qwen2_5_vl", "vjepa2")
    )
    assert "is a model of type qwen2_5_vl, not vjepa2" in refusal(
        encoder(copy, "vjepa2", "qwen2_5_vl")
    )
    assert "has no config.json" in refusal(encoder(copy, "qwen2_5_vl", "vae"))
    assert "vae/config.json is missing" in refusal(encoder(copy, "vae", "vjepa2"))
    changed(copy / "vae" / "vae" / "config.json", _class_name="AutoencoderKL")
    assert "a CogVideoX or a Wan, but" in refusal(encoder(copy, "vae"))
    assert "name a folder" in refusal(encoder(copy, "vjepa2", "./nowhere/at/all"))
    (copy / "vjepa2" / "config.json").write_text("{")
    assert "is no JSON" in refusal(encoder(copy, "vjepa2"))
    changed(copy / "qwen2_5_vl" / "config.json", vision_config={"depth": "deep"})
    assert "the config.json of" in refusal(encoder(copy, "qwen2_5_vl"))
    (copy / "wan" / "model_index.json").unlink()
    assert "model_index.json is missing" in refusal(encoder(copy, "vae", "wan"))
    assert "no semantic encoder videomae" in refusal(encoder(copy, "videomae", "vjepa2"))


def test_missing_weights_are_told_before_any_work(copy: Path) -> None:
    for kind in ("qwen2_5_vl", "vjepa2"):
        whole = copy / kind / "model.safetensors"
        whole.write_bytes(whole.read_bytes()[:1000])
        assert "cannot be read" in refusal(encoder(copy, kind))
        whole.unlink()
        assert "has no weights" in refusal(encoder(copy, kind))
    for file in (copy / "vae" / "vae").glob("*.safetensors"):
        file.unlink()
    assert "holds no weights" in refusal(encoder(copy, "vae"))

    index = json.loads((copy / "shards" / "model.safetensors.index.json").read_text())
    towers = {file for name, file in index["weight_map"].items() if "visual." in name}
    (copy / "shards" / min(towers)).unlink()
    assert f"lacks {min(towers)}" in refusal(encoder(copy, "qwen2_5_vl", "shards"))


def test_a_qwen_needs_only_the_files_that_hold_its_tower(copy: Path) -> None:
    chosen, video_BFHW3 = encoder(copy, "qwen2_5_vl", "shards"), random_frames()
    before = chosen.load(CPU, torch.float32).encode(video_BFHW3)
    index = json.loads((copy / "shards" / "model.safetensors.index.json").read_text())
    towers = {file for name, file in index["weight_map"].items() if "visual." in name}
    others = set(index["weight_map"].values()) - towers
    assert others
    for file in others:
        (copy / "shards" / file).unlink()
    chosen.check()
    assert torch.equal(chosen.load(CPU, torch.float32).encode(video_BFHW3), before)


def test_a_tower_that_is_not_whole_is_refused(copy: Path) -> None:
    path = copy / "qwen2_5_vl" / "model.safetensors"
    tensors = load_file(path)
    merger = next(name for name in tensors if name.endswith("merger.mlp.2.weight"))
    for broken in (
        {n: t for n, t in tensors.items() if n != merger},
        tensors | {merger: tensors[merger][:-1].clone()},
        tensors | {merger.replace("mlp.2", "mlp.9"): tensors[merger].clone()},
    ):
        save_file(broken, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"1 tensors are .* visual\.merger\.mlp\.[29]\.weight"):
            encoder(copy, "qwen2_5_vl").load(CPU, torch.float32)
    save_file({n: t for n, t in tensors.items() if "visual." not in n}, path)
    assert "does not hold the encoder" in refusal(encoder(copy, "qwen2_5_vl"))

    path = copy / "vjepa2" / "model.safetensors"
    tensors = load_file(path)
    name = "encoder.layer.1.mlp.fc1.weight"
    for broken in (
        {n: t for n, t in tensors.items() if n != name},
        tensors | {name: tensors[name][:-1].clone()},
    ):
        save_file(broken, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"1 tensors are .* encoder\.layer\.1\.mlp\.fc1"):
            encoder(copy, "vjepa2").load(CPU, torch.float32)


def test_chunks_are_of_encoders_that_attend_over_time(folder: Path) -> None:
    for kind in ("qwen2_5_vl", "vae"):
        assert encoder(folder, kind).facts().chunk is None
        assert "leave chunk out" in refusal(encoder(folder, kind, chunk=8))
    assert encoder(folder, "vjepa2").facts().chunk == 8
    for chunk, nearest in ((5, 4), (0, 2), (1, 2), (-4, 2)):
        assert refusal(encoder(folder, "vjepa2", chunk=chunk)).endswith(f"nearest is {nearest}")


def test_half_tokens_are_refused(folder: Path) -> None:
    tower = encoder(folder, "qwen2_5_vl").load(CPU, torch.float32)
    with pytest.raises(ValueError, match="of 2 frames each in uint8: 3 in"):
        tower.encode(random_frames(frames=3))
    with pytest.raises(ValueError, match=r"4 in torch\.float32"):
        tower.encode(random_frames().float())
