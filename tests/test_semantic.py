"""SemanticGen from a curated dataset to videos of any length: its stages, ablations, baselines."""

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from training import Trained, job_of, train
from training import refused as one_line

from engine.weights import tiny_folder
from trainers import tracking
from trainers.checkpoint import load_final
from trainers.compressor import (
    SemanticCompressor,
    Whitening,
    drawn_from,
    kl_to_normal,
)
from trainers.dataset import read_manifest
from trainers.finetune import Finetune
from trainers.generation import load_pipeline
from trainers.loop import Trainer
from trainers.parallel import World
from trainers.recipes import recipe, with_settings, with_stages
from trainers.semantic import Beside, FillModule, whitened
from trainers.semantic_pipeline import SemanticGenPipeline
from trainers.system import Bucket, Data, Noise, Sample
from trainers.videos import write_mp4

VARIANTS = (
    "semanticgen_cogvideox",
    "semanticgen_vjepa2",
    "semanticgen_uncompressed",
    "semanticgen_vae",
)
CPU = torch.device("cpu")
ROW = {"rephrased": "a cat"}

Runs = Callable[[str], Trained]


@pytest.fixture(scope="module")
def runs(small: None, spans: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The run of each tiny recipe, made when it is first asked for; variants take two steps."""

    @functools.cache
    def made(name: str) -> Trained:
        found = recipe(f"tiny_{name}")
        if name in VARIANTS:
            found = with_settings(found, [f"{s.name}.steps=2" for s in found.stages])
        return Trained.of(found, spans, tmp_path_factory.mktemp(name))

    return made


@pytest.fixture(scope="module")
def short(runs: Runs) -> Trained:
    return runs("semanticgen")


@pytest.fixture(scope="module")
def pipe(short: Trained) -> SemanticGenPipeline:
    return SemanticGenPipeline.from_export(short.export)


def test_divergence_from_the_standard_normal() -> None:
    """Against torch's own closed form, and by drawing."""
    torch.manual_seed(0)
    mean, log_variance = torch.randn(2, 3, 4, 5, 8), torch.randn(2, 3, 4, 5, 8)
    own = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    normal = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    exact = torch.distributions.kl_divergence(own, normal).flatten(1).mean(1)
    assert torch.allclose(kl_to_normal(mean, log_variance), exact, atol=1e-5)
    zero = torch.zeros_like(mean)
    assert torch.equal(kl_to_normal(zero, zero), torch.zeros(2))
    drawn = torch.stack(
        [drawn_from(mean, log_variance, torch.randn_like(mean)) for _ in range(2000)]
    )
    assert torch.allclose(drawn.mean(0), mean, atol=0.4)
    assert torch.allclose(drawn.var(0).log(), log_variance, atol=0.3)


@pytest.mark.parametrize("channels", [8, 64, None])
def test_shapes_of_the_compressor(channels: int | None) -> None:
    compressor = SemanticCompressor(96, channels)
    features = torch.randn(2, 4, 3, 5, 96)
    mean, log_variance = compressor.moments(features)
    assert mean.shape == (2, 4, 3, 5, channels or 96)
    assert mean.dtype == torch.float32
    if channels is None:
        assert log_variance is None and torch.equal(mean, features)
        assert torch.equal(drawn_from(mean, None, torch.randn_like(mean)), features)
        assert torch.equal(kl_to_normal(mean, None), torch.zeros(2))
        assert compressor.whitening.factor().shape == (96,)
    else:
        assert log_variance is not None and log_variance.shape == mean.shape
        assert compressor.whitening.factor().shape == (channels, channels)
    embeddings = compressor.whitening(mean)
    assert torch.equal(embeddings, mean), "whitening begins as the identity"
    with torch.autocast("cpu", torch.bfloat16):
        assert compressor.moments(features.bfloat16())[0].dtype == torch.float32
        assert compressor.whitening(mean).dtype == torch.float32


@pytest.mark.parametrize("together", [True, False])
def test_embeddings_of_known_statistics_are_whitened_after_training(together: bool) -> None:
    """Mean 0 and covariance 1, from correlated data of mean 2 and deviations 0.5 to 3."""
    torch.manual_seed(1)
    scale = torch.tensor([0.5, 1.0, 2.0, 3.0])
    mix = torch.diag(scale) @ (torch.eye(4) + 0.5 * torch.tril(torch.ones(4, 4), -1))
    if not together:
        mix = torch.diag(scale)

    def data(num: int) -> torch.Tensor:
        return torch.randn(num, 1, 2, 2, 4) @ mix.T + 2

    whitening = Whitening(4, together=together)
    optimizer = torch.optim.AdamW(whitening.parameters(), lr=1e-2, weight_decay=0)
    for step in range(1200):
        for group in optimizer.param_groups:
            group["lr"] = 3e-2 * (1 - step / 1200)
        optimizer.zero_grad()
        (1e-3 * whitening.unlikelihood(data(64)).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        found = whitening(data(20_000)).flatten(0, 3)
    assert found.mean(0).abs().max() < 0.05
    assert (torch.cov(found.T) - torch.eye(4)).abs().max() < 0.06
    before = data(20_000).flatten(0, 3)
    assert (torch.cov(before.T) - torch.eye(4)).abs().max() > 1


def test_whitening_learns_of_its_own_loss_alone() -> None:
    whitening = Whitening(4, together=True)
    embeddings = torch.randn(2, 1, 2, 2, 4, requires_grad=True)
    whitened(whitening, embeddings).square().sum().backward()
    assert embeddings.grad is not None and embeddings.grad.abs().sum() > 0
    assert all(p.grad is None for p in whitening.parameters())
    embeddings.grad = None
    whitening.unlikelihood(embeddings).sum().backward()
    assert embeddings.grad is None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in whitening.parameters())


def filled(found: Trained) -> tuple[FillModule, dict[str, torch.Tensor]]:
    """The latent generator as its stage starts, and a batch of made-up features."""
    stage = found.recipe.stages[0]
    learner = found.recipe.system.learner(stage, CPU, {})
    torch.manual_seed(2)
    samples = [
        Sample(ROW, stage.data.buckets[0], features={
            "latents": torch.randn(2, *shape).abs(),
            "base_text": torch.randn(16, learner.module.vdm.text_dim),
            "semantics": torch.randn(*grid, found.recipe.system.encoder.facts().dim),
        })
        for shape, grid in [_shapes(found)] * 2
    ]  # fmt: skip
    learner._null_LD = torch.zeros(16, learner.module.vdm.text_dim)
    return learner.module, learner.batch(samples, Noise(0, 0, (0, 1)))


def _shapes(found: Trained) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    stage = found.recipe.stages[0]
    bucket, system = stage.data.buckets[0], found.recipe.system
    vdm = system.vdm.load(
        video=True, device=CPU, dtype=torch.float32, variant=system.variant(stage.data.fps)
    )
    return (
        vdm.latent_shape(bucket.frames, bucket.height_px, bucket.width_px),
        system.encoder.grid(bucket, stage.data.fps),
    )


def test_the_loss_is_the_flows_and_the_divergence(short: Trained) -> None:
    module, batch = filled(short)
    with torch.no_grad():
        whole = module(**batch)
        mean, log_variance = module.compressor.moments(batch["features_BSVUW"])
        divergence = kl_to_normal(mean, log_variance)
        module.system = dataclasses.replace(module.system, kl_weight=0.0)
        assert torch.allclose(whole - module(**batch), 1e-4 * divergence, atol=1e-5)
        assert (divergence > 0).all()


def test_what_is_dropped_says_nothing(short: Trained) -> None:
    """Of a sample whose embeddings are dropped neither they nor their noise reach the loss."""
    module, batch = filled(short)
    module.system = dataclasses.replace(module.system, kl_weight=0.0)
    batch["dropped_B"] = torch.tensor([True, False])
    other = batch | {"features_BSVUW": batch["features_BSVUW"].flip(2) * 3}
    with torch.no_grad():
        before, after = module(**batch), module(**other)
    assert before[0] == after[0] and before[1] != after[1]
    beside = Beside(4, 6)
    tokens = beside(torch.randn(2, 1, 2, 2, 4), torch.tensor([True, False]))
    assert torch.equal(tokens[0], beside.null_E.expand(1, 2, 2, 6))


def test_shares_and_noise_are_drawn_by_sample(short: Trained) -> None:
    """A tenth of texts, and of embeddings, apart; noise of U(0, 0.8) deviations."""
    system = dataclasses.replace(short.recipe.system, text_dropout=0.5, semantic_dropout=0.5)
    learner = system.learner(short.recipe.stages[0], CPU, {})
    latents, grid = _shapes(short)
    features = {
        "latents": torch.zeros(2, *latents),
        "base_text": torch.ones(1, learner.module.vdm.text_dim),
        "semantics": torch.zeros(*grid, system.encoder.facts().dim),
    }
    learner._null_LD = torch.zeros(1, learner.module.vdm.text_dim)
    samples = [Sample(ROW, short.recipe.stages[0].data.buckets[0], features=features)] * 200
    batch = learner.batch(samples, Noise(0, 0, range(200)))
    silent, dropped = batch["text_BLD"][:, 0, 0] == 0, batch["dropped_B"]
    for share in (silent, dropped, silent == dropped):
        assert 0.35 < share.float().mean() < 0.65
    assert 0.75 < batch["sigma_B"].max() < 0.8 and batch["sigma_B"].min() < 0.05
    assert abs(batch["sigma_B"].mean() - 0.4) < 0.05


def test_the_planners_flow_is_shifted_by_its_size(small: None) -> None:
    system = recipe("semanticgen_dim8").system
    bucket = Bucket(frames=1441, height_px=480, width_px=832)
    facts = recipe("tiny_semanticgen").system.encoder.facts()
    assert facts.pixels_per_token == 28
    tiny = recipe("tiny_semanticgen").system
    large = dataclasses.replace(tiny, encoder=dataclasses.replace(tiny.encoder, fps=1.6))
    assert large.encoder.grid(bucket, 24.0) == (48, 17, 30)
    assert large.planner(bucket, 24.0).shift == pytest.approx(math.sqrt(48 * 17 * 30 * 8 / 4096))
    small_one = Bucket(frames=9, height_px=48, width_px=48)
    assert tiny.planner(small_one, 8.0).shift == 1.0
    assert system.channels == 8 and system.variant(24.0).window is None


@pytest.mark.parametrize("stage_name", ["latents", "semantics"])
def test_training_lowers_the_loss(
    short: Trained, spans: Path, tmp_path: Path, stage_name: str
) -> None:
    """Against the same steps at a rate of 0: the same samples and noise, so learning alone."""
    losses = short.losses(stage_name)
    still = with_settings(short.recipe, [f"{stage_name}.lr=0"])
    if stage_name == "semantics":
        shutil.copytree(short.run / "latents", tmp_path / "latents")
    train(dataclasses.replace(still, stages=(still.stage(stage_name),)), spans, tmp_path)
    unmoved = [line["loss"] for line in tracking.read(tmp_path / stage_name)]
    assert len(losses) == len(unmoved) == 10 and unmoved[0] == losses[0]
    assert sum(losses[5:]) < sum(unmoved[5:])


@pytest.mark.parametrize("tuning", ["full", "lora", "frozen"])
def test_frozen_weights_are_bitwise_unchanged(
    short: Trained, spans: Path, tmp_path: Path, tuning: str
) -> None:
    for stage in short.recipe.stages:
        planning = stage.name == "semantics"
        if planning and tuning != "full":
            continue  # it is trained whole, always
        optim = stage.optim[1:] if tuning == "frozen" else stage.optim
        stage = dataclasses.replace(stage, steps=1, optim=optim)
        system = dataclasses.replace(short.recipe.system, tuning=tuning, rank=4)
        found = dataclasses.replace(short.recipe, system=system, stages=(stage,))
        parents = {"latents": short.stage("latents")} if stage.after else {}
        learner = system.learner(stage, CPU, parents)
        before = {n: t.clone() for n, t in learner.module.state_dict().items()}
        job = job_of(found, dataclasses.replace(stage, after=()), spans, tmp_path)
        job.folder.mkdir(parents=True)
        manifest = read_manifest(str(spans), stage.data)
        Trainer(job, World(device=CPU), manifest, learner).run(0, {})
        changed = {
            n for n, t in learner.module.state_dict().items() if not torch.equal(t, before[n])
        }
        grouped = {n for names in learner.groups.values() for n in names}
        assert changed and changed <= grouped, changed - grouped
        if tuning == "lora":
            assert all(".lora_" in n for n in changed if n.startswith("denoiser."))
        if planning:
            assert not any(n.startswith("compressor.") for n in changed)
        else:
            assert any(n.startswith("compressor.layers") for n in changed)
            assert any(n.startswith("compressor.whitening") for n in changed)


@pytest.mark.parametrize("stage_name", ["latents", "semantics"])
def test_a_run_goes_on_bit_for_bit(
    short: Trained, spans: Path, tmp_path: Path, stage_name: str
) -> None:
    """Stopped after three of six steps, and the end of both is the same."""
    found = dataclasses.replace(short.recipe, stages=(short.recipe.stage(stage_name),))
    for folder, steps in (("whole", 6), ("parts", 3), ("parts", 6)):
        if stage_name == "semantics":
            before = tmp_path / folder / "latents"
            shutil.copytree(short.run / "latents", before, dirs_exist_ok=True)
        train(with_settings(found, [f"{stage_name}.steps={steps}"]), spans, tmp_path / folder)
    whole, parts = (
        [x["loss"] for x in tracking.read(tmp_path / n / stage_name)] for n in ("whole", "parts")
    )
    assert whole == parts and len(whole) == 6
    a, b = (load_final(tmp_path / n / stage_name)[1] for n in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_an_export_gives_the_same_pixels(short: Trained, pipe: SemanticGenPipeline) -> None:
    made = pipe(["a cat", "a red bus"], steps=2, seed=[3, 4])
    again = load_pipeline(short.export)("a red bus", steps=2, seed=4)
    assert made[1].video.shape == (9, 48, 64, 3)
    difference = np.abs(made[1].video.astype(int) - again.video)
    assert difference.max() <= 1, "a video does not depend on those beside it"
    assert np.abs(made[0].video.astype(int) - made[1].video).max() > 1
    assert set(again.timings) == {"text_s", "plan_s", "denoise_s", "decode_s"}
    files = {p.relative_to(short.export).as_posix() for p in short.export.rglob("*.safetensors")}
    whole = "transformer/diffusion_pytorch_model.safetensors"
    assert files == {"beside.safetensors", "compressor.safetensors"} | {
        f"{stage}/{whole}" for stage in ("latents", "semantics")
    }


def test_the_exported_denoisers_load_into_diffusers(short: Trained) -> None:
    from diffusers import WanTransformer3DModel

    for stage, channels in (("latents", 16), ("semantics", 8)):
        loaded = WanTransformer3DModel.from_pretrained(short.export / stage / "transformer")
        trained = short.stage(stage)
        for name, parameter in loaded.named_parameters():
            assert torch.equal(parameter, trained[f"denoiser.{name}"])
        if stage == "semantics":
            assert loaded.config.in_channels == loaded.config.out_channels == channels


def test_the_embeddings_reach_the_video(pipe: SemanticGenPipeline) -> None:
    """The same noise and text beside other embeddings is another video."""
    bucket = Bucket(frames=9, height_px=48, width_px=48)
    shape = pipe.filler.latent_shape(9, 48, 48)
    noise = Noise(0, 0, [0]).normal("x", shape)
    grid = pipe.system.encoder.grid(bucket, pipe.size.fps)
    said = []
    with torch.no_grad():
        text = pipe.filler.encode_text(["a cat"])
        for seed in (0, 1):
            embeddings = Noise(seed, 0, [0]).normal("e", (8, *grid))
            from trainers.vdm import Conditioning

            conditioning = Conditioning(text[:, None], context=pipe._context(embeddings))
            said.append(pipe.filler.denoise(noise, torch.tensor([500.0]), conditioning))
    assert not torch.allclose(said[0], said[1], atol=1e-3)


def test_a_reference_is_reconstructed(
    pipe: SemanticGenPipeline, tmp_path: Path, samples: Path
) -> None:
    made = pipe.reconstruct(samples / "coffee_pan.mp4", frames=5, height=48, width=48, steps=2)
    assert made.video.shape == (5, 48, 48, 3) and "plan_s" in made.timings
    other = pipe.reconstruct(samples / "long_take.mp4", frames=5, height=48, width=48, steps=2)
    assert np.abs(made.video.astype(int) - other.video).max() > 0
    bucket = Bucket(frames=5, height_px=48, width_px=48)
    own = pipe.embeddings_of(samples / "coffee_pan.mp4", bucket)
    assert own.shape == (1, 8, 1, 2, 2)
    write_mp4(tmp_path / "brief.mp4", np.zeros((3, 64, 64, 3), np.uint8), 8.0)
    with pytest.raises(ValueError, match=r"brief.mp4 is 0\.\d+ s long, and 0.50 s are needed"):
        pipe.reconstruct(tmp_path / "brief.mp4", frames=5, height=48, width=48)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_exports_and_generates(runs: Runs, name: str) -> None:
    found = runs(name)
    assert all(math.isfinite(x) for s in ("latents", "semantics") for x in found.losses(s))
    made = load_pipeline(found.export)("a cat", steps=2, height=48, width=48)
    assert made.video.shape == (9, 48, 48, 3)
    assert len(np.unique(made.video)) > 2


@pytest.mark.slow
def test_long_video_is_of_any_length(runs: Runs) -> None:
    """Trained on 2 s within windows of 1 s; makes 2 s and 3.5 s, planned as a whole."""
    found = runs("semanticgen_long")
    pipe = load_pipeline(found.export)
    assert isinstance(pipe, SemanticGenPipeline) and pipe.system.variant(8.0).window == 8
    for seconds in (2, 3.5):
        made = pipe("a cat", seconds=seconds, height=48, width=48, steps=2)
        assert made.video.shape == (round(seconds * 8) + 1, 48, 48, 3)
    with pytest.raises(ValueError, match="nearest"):
        pipe("a cat", seconds=2.3, steps=1)
    with pytest.raises(ValueError, match="seconds or frames"):
        pipe("a cat", seconds=4, frames=17)


def test_the_baselines_have_the_same_data_and_steps(runs: Runs) -> None:
    for name, beside in (("base_ct", "semanticgen"), ("base_ct_swin", "semanticgen_long")):
        for prefix in ("", "tiny_"):
            alone, both = recipe(f"{prefix}{name}"), recipe(f"{prefix}{beside}")
            stage, other = alone.stages[0], both.stages[0]
            assert isinstance(alone.system, Finetune) and alone.system.tuning == "full"
            assert dataclasses.replace(stage, optim=other.optim) == other
            assert stage.optim == other.optim[:1]
            assert alone.system.variant(24.0).window == both.system.variant(24.0).window
    found = runs("base_ct_swin")
    made = load_pipeline(found.export)("a cat", frames=9, height=48, width=48, steps=2)
    assert made.video.shape == (9, 48, 48, 3)


def test_an_export_without_the_planner_reconstructs(
    short: Trained, tmp_path: Path, samples: Path
) -> None:
    from trainers.export import export

    found = with_stages(short.recipe, ["latents"])
    export(found, short.run, tmp_path / "export")
    pipe = SemanticGenPipeline.from_export(tmp_path / "export")
    made = pipe.reconstruct(samples / "coffee_pan.mp4", frames=5, height=48, width=48, steps=1)
    assert made.video.shape == (5, 48, 48, 3)
    with pytest.raises(ValueError, match="no stage semantics"):
        pipe("a cat", steps=1)


def test_text_becomes_video_without_the_semantic_encoder(
    short: Trained, pipe: SemanticGenPipeline, tmp_path: Path, samples: Path
) -> None:
    """Its files, 150 GB of them for the paper's, are needed to take up a reference alone."""
    shutil.copytree(short.export, tmp_path / "export")
    path = tmp_path / "export" / "pipeline.json"
    about = json.loads(path.read_text())
    about["semanticgen"]["encoder"]["weights"] = {"at": "nobody/nothing", "revision": None}
    path.write_text(json.dumps(about))
    without = SemanticGenPipeline.from_export(tmp_path / "export")
    made = [p("a cat", steps=1, height=48, width=48).video for p in (without, pipe)]
    assert np.array_equal(*made)
    with pytest.raises(ValueError, match="hf download nobody/nothing"):
        without.reconstruct(samples / "coffee_pan.mp4", frames=5, height=48, width=48)


@pytest.mark.parametrize(
    ("system", "data", "words"),
    [
        ({"window_s": 0.75}, {}, "a window of 6 frames is not twice .* the nearest is 8"),
        ({"channels": 49}, {}, "49 channels .* 1 to 48"),
        ({"channels": 0}, {}, "0 channels"),
        ({}, {"fps": 9.0}, "9 fps"),
        ({}, {"frames": 18}, "the nearest is 17"),
        ({}, {"height": 60}, "nearest"),
    ],
)
def test_shapes_that_do_not_meet(
    small: None, system: dict[str, object], data: dict[str, int], words: str
) -> None:
    found = recipe("tiny_semanticgen")
    stage = found.stages[0]
    bucket = Bucket(frames=data.get("frames", 17), height_px=data.get("height", 64), width_px=64)
    new = Data(buckets=(bucket,), table="clips", media=("video",), fps=data.get("fps", 8.0))
    with pytest.raises(ValueError, match=words) as said:
        dataclasses.replace(found.system, **system).check(dataclasses.replace(stage, data=new))
    assert "\n" not in str(said.value)


def test_bad_input_is_one_line(
    small: None,
    spans: Path,
    quadruples: Path,
    short: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny = tiny_folder()

    refused = functools.partial(one_line, monkeypatch, capsys)

    def training(*more: object, data: Path = spans) -> tuple[object, ...]:
        run = tmp_path / "run"
        return ("train", "tiny_semanticgen", "--data", data, "--out", run, "--local", *more)

    refused(*training("--semantic-encoder", tiny / "llama"), words=["llama"])
    refused(*training("--video-model", tiny / "qwen2_5_vl"), words=["qwen2_5_vl"])
    refused(*training(data=quadruples), words=["no text (rephrased)"])
    refused(*training("--set", "latents.fps=7"), words=["7 fps"])
    generating = ("generate", short.export, "a cat", "--out", tmp_path / "videos")
    refused(*generating, "--seconds", 1.9, words=["nearest"])
    refused(*generating, "--mode", "multi_scene", words=["--mode", "--seconds, --reference"])
    refused(*generating, "--reference", tmp_path / "no.mp4", words=["no.mp4"])
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_texts_that_are_cut_are_counted_and_prompts_refused(
    short: Trained, runs: Runs, pipe: SemanticGenPipeline
) -> None:
    long = "cat " * 300
    with pytest.raises(ValueError, match=r"begins with 'cat .* reads 512: shorten it") as said:
        pipe(long, steps=1)
    assert "\n" not in str(said.value)
    with pytest.raises(ValueError, match="shorten it"):
        load_pipeline(runs("base_ct_swin").export)(["a cat", long], steps=1)
    learner = short.recipe.system.learner(short.recipe.stages[0], CPU, {})
    latents, grid = _shapes(short)
    features = {
        "latents": torch.zeros(2, *latents),
        "base_text": torch.zeros(512, learner.module.vdm.text_dim),
        "semantics": torch.zeros(*grid, short.recipe.system.encoder.facts().dim),
    }
    bucket = short.recipe.stages[0].data.buckets[0]
    rows = (ROW, {"rephrased": long}, {"rephrased": long + "s"})
    samples = [Sample(row, bucket, features=features) for row in rows]
    learner.batch(samples, Noise(0, 0, (0, 1, 2)))
    assert learner.counts["texts_cut"] == 2


def test_an_export_says_what_it_is(short: Trained) -> None:
    about = json.loads((short.export / "pipeline.json").read_text())
    assert about["system"] == "semanticgen" and about["stages"] == ["latents", "semantics"]
    assert about["video"] == {"frames": 9, "height_px": 48, "width_px": 64, "fps": 8.0}
    card = (short.export / "README.md").read_text()
    assert "MEANINGLESS" in card and "2512.20619" in card and "semantic encoder" in card
