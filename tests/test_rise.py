"""RISE-T2V from a curated dataset to videos: both architectures, every stage, the baselines."""

import dataclasses
import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import Cluster
from huggingface_hub import constants
from safetensors.torch import load_file
from training import Trained, job_of, train
from training import refused as one_line

from engine.weights import Weights, tiny_folder
from trainers import launch, tracking
from trainers.adapter import RephrasingAdapter, null_of, padded
from trainers.checkpoint import load_final
from trainers.export import export
from trainers.finetune_pipeline import FinetunedPipeline
from trainers.generation import Generated, load_pipeline
from trainers.job import Job, Options
from trainers.recipes import NAMES, TINY, Recipe, recipe, with_settings, with_stages
from trainers.rise import LORA, Rise
from trainers.rise_pipeline import RisePipeline, shares_of
from trainers.system import Bucket, Data, Noise
from trainers.vdm import Conditioning

REPOSITORY = Path(__file__).parents[1]
RISE = ("rise_animatediff", "rise_cogvideox")


Runs = Callable[[str], Trained]


@pytest.fixture(scope="module")
def runs(small: None, quadruples: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The run of each tiny recipe, made when it is first asked for."""

    @functools.cache
    def made(name: str) -> Trained:
        return Trained.of(recipe(f"tiny_{name}"), quadruples, tmp_path_factory.mktemp(name))

    return made


@pytest.fixture(scope="module", params=[*RISE, "baseline_finetune"])
def trained(request: pytest.FixtureRequest, runs: Runs) -> Trained:
    return runs(request.param)


@pytest.fixture(scope="module", params=RISE)
def rise(request: pytest.FixtureRequest, runs: Runs) -> Trained:
    return runs(request.param)


@pytest.fixture(scope="module")
def pipe(rise: Trained) -> RisePipeline:
    return RisePipeline.from_export(rise.export)


def test_training_lowers_the_loss(
    runs: Runs, trained: Trained, quadruples: Path, tmp_path: Path
) -> None:
    """Against the same steps at a rate of 0: the same samples and noise, so learning alone."""
    for stage in trained.recipe.stages:
        losses = [line["loss"] for line in tracking.read(trained.run / stage.name)]
        assert len(losses) == stage.steps
        if stage.name == "domain":
            continue  # too short
        still = with_settings(trained.recipe, [f"{stage.name}.lr=0"])
        for parent in stage.after:
            shutil.copytree(trained.run / parent, tmp_path / parent, dirs_exist_ok=True)
        train(dataclasses.replace(still, stages=(still.stage(stage.name),)), quadruples, tmp_path)
        unmoved = [line["loss"] for line in tracking.read(tmp_path / stage.name)]
        assert unmoved[0] == losses[0]
        later = stage.steps // 2
        assert sum(losses[later:]) < sum(unmoved[later:]), stage.name
        shutil.rmtree(tmp_path / stage.name)


def test_each_stage_trains_its_own(trained: Trained) -> None:
    """A stage's result names what it trained; what an earlier one trained stays as it was."""
    names = {stage.name: set(trained.stage(stage.name)) for stage in trained.recipe.stages}
    adapter = {n for n in names.get("image", ()) if n.startswith("adapter.")}
    lora = {n for n in names["motion"] if ".lora_" in n}
    assert lora == names["motion"]
    if isinstance(trained.recipe.system, Rise):
        assert names["image"] == adapter | lora and names["domain"] == adapter
        image, domain, motion = (trained.stage(n) for n in ("image", "domain", "motion"))
        assert any(not torch.equal(image[n], domain[n]) for n in adapter)
        moved = [n for n in lora if not torch.equal(image[n], motion[n])]
        assert len(moved) == len(lora), "the LoRA of image went on"


@pytest.mark.parametrize("stage_name", ["image", "domain", "motion"])
@pytest.mark.parametrize("name", ["rise_animatediff", "rise_cogvideox"])
def test_frozen_weights_are_bitwise_unchanged(
    small: None, quadruples: Path, tmp_path: Path, name: str, stage_name: str
) -> None:
    """Trains one step of a stage with everything in view."""
    from trainers.dataset import read_manifest
    from trainers.loop import Trainer
    from trainers.parallel import World

    found = with_settings(recipe(f"tiny_{name}"), [f"{stage_name}.steps=2", "image.lr=0.1"])
    stage = dataclasses.replace(found.stage(stage_name), after=())
    job = Job(
        recipe=name,
        system=found.system,
        stage=stage,
        root=str(quadruples),
        out=str(tmp_path),
        options=Options(trackers=()),
    )
    learner = found.system.learner(stage, torch.device("cpu"), {})
    before = {n: t.clone() for n, t in learner.module.state_dict().items()}
    job.folder.mkdir(parents=True)
    world = World(device=torch.device("cpu"))
    Trainer(job, world, read_manifest(str(quadruples), stage.data), learner).run(0, {})
    after = learner.module.state_dict()
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    grouped = {n for names in learner.groups.values() for n in names}
    assert changed <= grouped and changed, changed - grouped
    wanted = {"image": {"adapter", "lora"}, "domain": {"adapter"}, "motion": {"lora"}}
    kinds = {"adapter" if n.startswith("adapter.") else "lora" for n in changed}
    assert kinds == wanted[stage_name]


@pytest.mark.parametrize("name", ["rise_animatediff", "rise_cogvideox"])
def test_the_base_model_is_untouched_at_the_start(small: None, name: str) -> None:
    """With the null sequence a fresh RISE is the base model with its empty prompt, bit for bit."""
    found = recipe(f"tiny_{name}")
    for stage in found.stages:
        module = found.system.learner(
            dataclasses.replace(stage, after=()), torch.device("cpu"), {}
        ).module
        plain = found.system.vdm.load(
            video=stage.name == "motion", device=torch.device("cpu"), dtype=torch.float32
        )
        bucket = stage.data.buckets[0]
        shape = plain.latent_shape(bucket.frames, bucket.height_px, bucket.width_px)
        noisy = Noise(0, 0, [0]).normal("x", shape)
        null_LD = module.adapter.null_LD.detach()
        own = plain.encode_text([""])[0]
        assert torch.equal(null_LD[: len(own)], own)
        text, at = Conditioning(null_LD[None, None]), torch.tensor([500])
        with torch.no_grad():
            said = module.vdm.denoise(noisy, at, text)
            assert torch.equal(said, plain.denoise(noisy, at, text))
            nothing = module.adapter(torch.zeros(1, len(null_LD), 64), torch.tensor([0]))
        assert torch.equal(nothing[0], null_LD)


def test_motion_starts_from_the_domains_adapter_and_the_images_lora(rise: Trained) -> None:
    parents = {name: rise.stage(name) for name in ("image", "domain")}
    stage = rise.recipe.stage("motion")
    module = rise.recipe.system.learner(stage, torch.device("cpu"), parents).module
    for name, parameter in module.named_parameters():
        if name.startswith("adapter."):
            assert torch.equal(parameter, parents["domain"][name]) and not parameter.requires_grad
        elif ".lora_" in name:
            assert torch.equal(parameter, parents["image"][name]) and parameter.requires_grad
    without = {"image": parents["image"]}
    module = rise.recipe.system.learner(stage, torch.device("cpu"), without).module
    own = dict(module.adapter.named_parameters())
    assert all(torch.equal(own[n], parents["image"][f"adapter.{n}"]) for n in own)


def test_a_share_of_texts_is_dropped_for_the_null_sequence(rise: Trained) -> None:
    stage = rise.recipe.stage("image")
    module = rise.recipe.system.learner(stage, torch.device("cpu"), {}).module
    bucket = stage.data.buckets[0]
    shape = module.vdm.latent_shape(bucket.frames, bucket.height_px, bucket.width_px)
    noise = Noise(0, 0, [0, 0])

    def losses(drop: float, scale: float) -> torch.Tensor:
        latents = {n: noise.normal(n, shape) for n in ("posterior_BCTYX", "noise_BCTYX")}
        with torch.no_grad():
            return module(
                states_BLE=scale * noise.normal("states", (module.adapter.length, 64)),
                length_B=torch.tensor([5, 5]),
                drop_B=torch.tensor([drop, 0.9]),
                moments_B2CTYX=torch.zeros(2, 2, *shape),
                at_B=torch.tensor([0.5, 0.5]),
                **latents,
            )

    assert losses(0.05, 1.0)[0] == losses(0.05, -1.0)[0], "dropped: the text is not seen"
    assert losses(0.15, 1.0)[0] != losses(0.15, -1.0)[0]
    assert losses(0.05, 1.0)[1] == losses(0.15, 1.0)[1], "the other sample stays as it is"


def test_the_exported_adapter_is_of_the_image_stage(rise: Trained) -> None:
    exported = load_file(rise.export / "adapter.safetensors")
    image = {
        n.removeprefix("adapter."): t
        for n, t in rise.stage("image").items()
        if n.startswith("adapter.")
    }
    assert exported.keys() == image.keys()
    assert all(torch.equal(exported[n], image[n]) for n in image)
    part = {"animatediff": "unet", "cogvideox": "transformer"}[rise.recipe.system.vdm.kind]
    lora = load_file(rise.export / "pytorch_lora_weights.safetensors")
    motion = rise.stage("motion")
    assert len(lora) == len(motion)
    for name, tensor in lora.items():
        own = name.replace(f"{part}.", "denoiser.", 1).replace(".weight", f".{LORA}.weight")
        assert torch.equal(tensor, motion[own])


def test_an_export_loads_into_diffusers(rise: Trained, pipe: RisePipeline) -> None:
    """Its LoRA through diffusers' own loader is the denoiser that the pipeline runs."""
    backbone = rise.recipe.system.vdm
    plain = backbone.load(video=True, device=torch.device("cpu"), dtype=torch.float32)
    part = {"animatediff": "unet", "cogvideox": "transformer"}[backbone.kind]
    plain.denoiser.load_lora_adapter(
        str(rise.export), prefix=part, weight_name="pytorch_lora_weights.safetensors"
    )
    size = pipe.size
    shape = plain.latent_shape(size.frames, size.height_px, size.width_px)
    noisy, at = Noise(0, 0, [0]).normal("x", shape), torch.tensor([500])
    text = Conditioning(pipe.adapter.null_LD[None, None])
    with torch.no_grad():
        said = plain.denoise(noisy, at, text)
        assert torch.allclose(said, pipe.vdm.denoise(noisy, at, text), atol=1e-6)
        plain.denoiser.disable_adapters()
        assert not torch.allclose(said, plain.denoise(noisy, at, text), atol=1e-6)


def test_an_export_says_what_it_is(trained: Trained) -> None:
    card = (trained.export / "README.md").read_text()
    assert "MEANINGLESS" in card and "Not evaluated" in card and trained.recipe.name in card
    facts = json.loads((trained.export / "training.json").read_text())
    assert list(facts) == [s.name for s in trained.recipe.stages]
    for name, fact in facts.items():
        assert fact["trained_parameters"] == sum(t.numel() for t in trained.stage(name).values())
        assert fact["data_hash"] in card and fact["config"]["data"]["samples"] > 0
    if isinstance(trained.recipe.system, Rise):
        (text,) = facts["image"]["config"]["data"]["instructions"]["dense"]
        assert (trained.export / "instructions" / "dense.txt").read_text() == text
        assert "{y_ori}" in text and "touch-up and rewrite" in text
    about = json.loads((trained.export / "pipeline.json").read_text())
    assert about["video"]["fps"] == 8.0
    with pytest.raises(ValueError, match="is there and not empty"):
        export(trained.recipe, trained.run, trained.export)


def test_an_export_gives_the_same_pixels(trained: Trained) -> None:
    first, again = (load_pipeline(trained.export) for _ in range(2))
    kind = RisePipeline if isinstance(trained.recipe.system, Rise) else type(first)
    assert isinstance(first, kind)
    one, two = (p("a red bus", steps=3, seed=4) for p in (first, again))
    assert isinstance(one, Generated) and isinstance(two, Generated)
    assert one.video.dtype == np.uint8 and one.video.std() > 0
    assert np.array_equal(one.video, two.video) and one.rephrased == two.rephrased
    other = first("a red bus", steps=3, seed=5)
    assert not np.array_equal(one.video, other.video)


def test_what_was_trained_changes_the_video(rise: Trained, pipe: RisePipeline) -> None:
    text = pipe.condition(["a red bus"]).conditioning
    fresh = RephrasingAdapter(
        64, pipe.vdm.text_dim, pipe.adapter.null_LD, rise.recipe.system.adapter
    )
    assert not torch.equal(fresh.layers[1].net[2].weight, pipe.adapter.layers[1].net[2].weight)
    assert text.tokens_BKLD.shape[1] == 1 and text.shares_BFK is None


def test_a_batch_is_its_members(pipe: RisePipeline) -> None:
    prompts = ["a red bus", "two cats on a long wooden wall"]
    both = pipe(prompts, steps=2, seed=[3, 9])
    for prompt, seed, made in zip(prompts, (3, 9), both, strict=True):
        alone = pipe(prompt, steps=2, seed=seed)
        assert alone.rephrased == made.rephrased
        assert np.abs(alone.video.astype(int) - made.video.astype(int)).max() <= 1


def test_conditioning_is_the_adapter_on_the_states_of_generation(pipe: RisePipeline) -> None:
    """Nothing is encoded again: the LLM is called for the prompt and for each token, no more."""
    fed = []
    hook = pipe.lm.model.get_decoder().register_forward_hook(
        lambda module, args, kwargs, output: fed.append(output.last_hidden_state.shape[1]),
        with_kwargs=True,
    )
    text = pipe.condition(["a red bus"])
    hook.remove()
    (said,) = text.rephrased
    assert len(fed) <= said.num_tokens + 2 and fed[-1] == 1
    states, length = padded([said.states_SD[said.scenes[0].span]], pipe.adapter.length)
    with torch.no_grad():
        expected = pipe.adapter(states, length)
    assert torch.equal(text.conditioning.tokens_BKLD[:, 0], expected)
    tail = expected[0, int(length[0]) :]
    assert torch.equal(tail, pipe.adapter.null_LD[int(length[0]) :])


def test_training_saw_the_states_that_generation_has(pipe: RisePipeline) -> None:
    """Teacher forcing over what was generated gives the same conditioning."""
    (said,) = pipe.condition(["a red bus"]).rephrased
    instruction = pipe.instructions["dense"]
    ids = pipe.lm.tokenized(instruction.text, None, "a red bus")
    ids = dataclasses.replace(ids, answer=said.generated)
    (forced,) = pipe.lm.teacher_forced([ids])
    assert torch.allclose(forced[said.kept], said.states_SD, atol=1e-5)


def test_modes(pipe: RisePipeline) -> None:
    multilingual = pipe("Un adorable chiot est sur le sol.", mode="multilingual", steps=1)
    assert multilingual.notes[0] == "taken for French"
    told = pipe("Un chiot", mode="multilingual", language="Occitan", steps=1)
    assert not any("taken for" in note for note in told.notes)
    two_stage = pipe("a red bus", mode="two_stage", steps=2)
    assert two_stage.rephrased == pipe("a red bus", steps=1).rephrased
    assert set(two_stage.timings) == {"rephrase_s", "text_s", "denoise_s", "decode_s"}


def test_two_stage_is_the_base_model(rise: Trained, pipe: RisePipeline) -> None:
    """Of table 2: the model's own encoder on the rephrased text, and no LoRA."""
    made = pipe("a red bus", mode="two_stage", steps=2, seed=1)
    vdm = rise.recipe.system.vdm.load(video=True, device=torch.device("cpu"), dtype=torch.float32)
    size = pipe.size
    shape = vdm.latent_shape(size.frames, size.height_px, size.width_px)
    latents = vdm.generate(
        Conditioning(vdm.encode_text([made.rephrased])[:, None]),
        vdm.encode_text([""])[0],
        Noise(1, 0, [0]).normal("latents", shape),
        steps=2,
        guidance_scale=7.5,
    )
    assert np.array_equal(vdm.decode(latents)[0].numpy(), made.video)
    assert not np.array_equal(pipe("a red bus", steps=2, seed=1).video, made.video)


def test_shares() -> None:
    step = shares_of(2, 5, "step")
    assert step[:, 0].tolist() == [1, 1, 1, 0, 0]
    smooth = shares_of(2, 5, "interpolated")
    assert smooth[:, 1].tolist() == [0, 0.25, 0.5, 0.75, 1]
    three = shares_of(3, 5, "interpolated")
    assert three.tolist() == [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]]
    for found in (
        shares_of(4, 16, "step"),
        shares_of(4, 16, "interpolated"),
        shares_of(1, 3, "step"),
    ):
        assert torch.allclose(found.sum(1), torch.ones(len(found)))


def test_scenes_reach_their_frames(pipe: RisePipeline) -> None:
    """Two scenes in one prompt and one in another, in one batch."""
    from trainers.decoder import Rephrased, Scene

    def said(*spans: tuple[int, int]) -> Rephrased:
        states = torch.randn(9, pipe.lm.width, generator=torch.Generator().manual_seed(1))
        scenes = tuple(Scene("x", slice(*span)) for span in spans)
        return Rephrased(
            text="x", states_SD=states, scenes=scenes, generated=(1,) * 9, kept=slice(0, 9),
            raw="x", stopped="eos", fault="", num_tokens=10, seconds=0.0,
        )  # fmt: skip

    with torch.no_grad():
        text = pipe._adapted([said((0, 4), (5, 9)), said((0, 9))], 8, "step")
    assert text.tokens_BKLD.shape[:2] == (2, 2)
    assert text.shares_BFK[0, :, 0].tolist() == [1] * 4 + [0] * 4
    assert text.shares_BFK[1, :, 0].tolist() == [1] * 8 and not text.shares_BFK[1, :, 1].any()
    one = said((0, 4), (5, 9)).states_SD
    states, length = padded([one[5:9]], pipe.adapter.length)
    with torch.no_grad():
        expected = pipe.adapter(states, length)[0]
    assert torch.allclose(text.tokens_BKLD[0, 1], expected, atol=1e-6)


def test_adapter_sizes() -> None:
    """The figures that the paper's settings give: 4096 wide LLaMA-2 into 768 wide CLIP."""
    with torch.device("meta"):
        null = torch.zeros(256, 768)
        sizes = {
            kind: sum(
                p.numel() for p in RephrasingAdapter(4096, 768, null, kind).layers.parameters()
            )
            for kind in ("geglu", "mlp")
        }
    assert round(sizes["geglu"] / 1e6, 1) == 228.9 and round(sizes["mlp"] / 1e6, 1) == 19.9
    assert null_of(torch.arange(6.0).view(3, 2), 5)[:, 0].tolist() == [0, 2, 4, 4, 4]
    assert null_of(torch.arange(6.0).view(3, 2), 2)[:, 0].tolist() == [0, 2]


def test_a_text_that_is_cut_is_counted(small: None, quadruples: Path, tmp_path: Path) -> None:
    found = with_stages(recipe("tiny_rise_animatediff"), ["image"])
    found = dataclasses.replace(found, system=dataclasses.replace(found.system, length=4))
    train(with_settings(found, ["image.steps=2"]), quadruples, tmp_path)
    lines = tracking.read(tmp_path / "image")
    assert [line["num_texts_cut"] for line in lines] == [4, 4]


def test_encoded_features_are_others(small: None, quadruples: Path, tmp_path: Path) -> None:
    """The ablation of figure 6 trains on other states, and so has other losses."""
    first = []
    for feature in ("rephrasing", "encoded"):
        found = with_settings(
            with_stages(recipe("tiny_rise_animatediff"), ["image"]), ["image.steps=1"]
        )
        system = dataclasses.replace(found.system, feature=feature)
        train(dataclasses.replace(found, system=system), quadruples, tmp_path / feature)
        first.append(tracking.read(tmp_path / feature / "image")[0]["loss"])
    assert first[0] != first[1]


def test_motion_modules_may_have_a_lora_of_their_own(
    small: None, quadruples: Path, tmp_path: Path
) -> None:
    found = with_settings(
        with_stages(recipe("tiny_rise_animatediff"), ["image", "motion"]),
        ["image.steps=1", "motion.steps=2"],
    )
    found = dataclasses.replace(found, system=dataclasses.replace(found.system, motion_lora=True))
    train(found, quadruples, tmp_path / "run")
    export(found, tmp_path / "run", tmp_path / "export")
    names = load_file(tmp_path / "export" / "motion_lora" / "pytorch_lora_weights.safetensors")
    assert names and all("motion_modules" in name for name in names)
    pipe = RisePipeline.from_export(tmp_path / "export")
    assert pipe("a red bus", steps=1).video.std() > 0


@pytest.mark.parametrize("name", RISE)
def test_a_run_goes_on_bit_for_bit(
    small: None, quadruples: Path, tmp_path: Path, name: str
) -> None:
    found = with_stages(recipe(f"tiny_{name}"), ["image"])
    for folder, steps in (("whole", 7), ("parts", 3), ("parts", 7)):
        train(with_settings(found, [f"image.steps={steps}"]), quadruples, tmp_path / folder)
    whole, parts = (
        [line["loss"] for line in tracking.read(tmp_path / n / "image")] for n in ("whole", "parts")
    )
    assert whole == parts and len(whole) == 7
    a, b = (load_final(tmp_path / n / "image")[1] for n in ("whole", "parts"))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_gradients_computed_again_are_the_same(
    small: None, quadruples: Path, tmp_path: Path
) -> None:
    losses = []
    for again in (False, True):
        found = with_stages(recipe("tiny_rise_animatediff"), ["image"])
        found = with_settings(found, ["image.steps=3"])
        train(found, quadruples, tmp_path / str(again), gradient_checkpointing=again)
        losses.append([line["loss"] for line in tracking.read(tmp_path / str(again) / "image")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.slow
def test_shards_train_as_the_whole_does(small: None, quadruples: Path, tmp_path: Path) -> None:
    """FSDP2 with frozen bf16 weights beside trained fp32 ones, in a process with a group."""
    program = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "import torch, torch.distributed as dist\nfrom pathlib import Path\n"
        "from test_rise import stages_of\nfrom training import job_of\n"
        "from trainers.loop import train\n"
        "from trainers.parallel import World\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "world = World.joined(torch.device('cpu'))\n"
        "found = stages_of(sys.argv[3])\n"
        "for stage in found.stages:\n"
        "    train(job_of(found, stage, sys.argv[4], Path(sys.argv[5]), parallel='fsdp'), world)\n"
    )
    given = [str(REPOSITORY), str(REPOSITORY / "tests"), "tiny_rise_animatediff", str(quadruples)]
    command = [sys.executable, "-c", program, *given, str(tmp_path / "shards")]
    subprocess.run(command, timeout=200, check=True)
    found = stages_of("tiny_rise_animatediff")
    for stage in found.stages:
        launch.alone(job_of(found, stage, quadruples, tmp_path / "whole"))
        shards, whole = (
            [x["loss"] for x in tracking.read(tmp_path / n / stage.name)]
            for n in ("shards", "whole")
        )
        assert shards == pytest.approx(whole, rel=1e-3), "bf16 rounds"


def stages_of(name: str) -> Recipe:
    """Its first and last stage, in bf16, for two steps each."""
    settings = [f"{s}.{x}" for s in ("image", "motion") for x in ("steps=2", "precision=bf16")]
    return with_settings(with_stages(recipe(name), ["image", "motion"]), settings)


def test_an_export_names_the_commits_of_hub_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit, model = "0123456789abcdef0123456789abcdef01234567", tmp_path / "models--some--llm"
    (model / "snapshots" / commit).mkdir(parents=True)
    (model / "snapshots" / commit / "config.json").write_text("{}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    assert Weights(at="some/llm").pinned() == Weights(at="some/llm", revision=commit)
    assert Weights(at="some/llm", revision="v1").pinned().revision == "v1"
    assert Weights(at=str(tmp_path)).pinned() == Weights(at=str(tmp_path))


def test_every_recipe_is_well_formed(tiny_home: Path) -> None:
    for name in (*NAMES, *(f"{TINY}{name}" for name in NAMES)):
        found = recipe(name)
        assert found.name == name
        ended: set[str] = set()
        for stage in found.stages:
            assert set(stage.after) <= ended, "a stage starts from those before it"
            ended.add(stage.name)
    paper = recipe("rise_animatediff")
    assert [s.name for s in paper.stages] == ["image", "domain", "motion"]
    image, _, motion = paper.stages
    assert {o.lr for o in image.optim} == {5e-5} and {o.lr for o in motion.optim} == {1e-4}
    assert {o.weight_decay for s in paper.stages for o in s.optim} == {0.01}
    assert paper.system.rank == 128 and paper.system.length == 256
    assert recipe("rise_cogvideox").system.length == 226
    baseline = recipe("baseline_finetune").stages[0]
    assert (baseline.data, baseline.steps, baseline.batch) == (
        motion.data,
        motion.steps,
        motion.batch,
    )


@pytest.mark.slow
def test_the_commands(
    small: None, quadruples: Path, cluster: Cluster, tiny_home: Path, tmp_path: Path
) -> None:
    """What the README says: cache, train on Ray, Ctrl-C, train again, export, generate."""
    env = cluster.env | {"XDG_CACHE_HOME": str(tiny_home)}

    def started(*arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "trainers", *map(str, arguments)],
            cwd=REPOSITORY,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ran(*arguments: object) -> str:
        process = started(*arguments)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return out + err

    name, run = "tiny_rise_animatediff", tmp_path / "run"
    said = ran("cache", name, "--data", quadruples, "--stages", "image")
    assert "image, latents: 3 computed" in said and "image, tokens: 3 computed" in said
    training = (
        "train", name, "--data", quadruples, "--out", run, "--set", "image.steps=40",
        "motion.steps=2", "--stages", "image", "motion", "--log-every", 1,
        "--checkpoint-every", 10, "--torch-threads", 1,
    )  # fmt: skip
    process = started(*training)
    lines = 0
    while process.poll() is None and lines < 11:
        time.sleep(0.1)
        lines = len(tracking.read(run / "image"))
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130, err
    assert "stopped: run the same command again to go on" in err and "Traceback" not in err
    assert "image: 3 samples, 40 steps of 4" in err
    assert not (run / "image" / "final.safetensors").exists()
    ran(*training)
    resumed = [line["loss"] for line in tracking.read(run / "image")]
    found = with_settings(with_stages(recipe(name), ["image"]), ["image.steps=40"])
    train(found, quadruples, tmp_path / "undisturbed", micro_batch=4)
    undisturbed = [line["loss"] for line in tracking.read(tmp_path / "undisturbed" / "image")]
    assert resumed == undisturbed

    export_folder = tmp_path / "export"
    ran("export", run, export_folder)
    generating = ("generate", export_folder, "A red bus!", "a cat", "--steps", 2, "--json")
    videos = json.loads(ran(*generating, "--out", tmp_path / "videos").splitlines()[0])["videos"]
    assert [Path(v["video"]).name for v in videos] == ["a-red-bus-0-0.mp4", "a-cat-0-1.mp4"]
    with av.open(videos[0]["video"]) as container:
        assert sum(1 for _ in container.decode(video=0)) == 8


def test_bad_input_is_one_line(
    small: None,
    quadruples: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny = tiny_folder()

    refused = functools.partial(one_line, monkeypatch, capsys)

    def training(*more: object, data: object = quadruples, name: str = "tiny_rise_animatediff"):
        return ("train", name, "--data", data, "--out", tmp_path / "run", "--local", *more)

    (tmp_path / "empty").mkdir()
    refused(*training(name="rice"), words=["no recipe 'rice'", "rise_animatediff"])
    refused(*training("--llm", tmp_path / "empty"), words=[str(tmp_path / "empty")])
    refused(*training("--video-model", tiny / "llama"), words=["llama"])
    refused(*training("--video-model", tiny / "cogvideox"), words=["cogvideox"])
    refused(*training("--llm", "nobody/nothing"), words=["hf download nobody/nothing"])
    refused(*training(data=tmp_path), words=["holds no dataset"])
    refused(*training("--set", "image.colour=red"), words=["image.colour=red", "steps"])
    refused(*training("--set", "image.batch=0"), words=["image", "batch"])
    refused(*training("--trackers", "abacus"), words=["abacus"])
    refused("export", tmp_path, tmp_path / "x", words=["is no run"])
    refused("generate", tmp_path, "a cat", words=["is no export"])
    refused("generate", tmp_path, words=["prompt"])
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_shapes_that_do_not_meet(small: None) -> None:
    for name, change, words in (
        ("rise_cogvideox", {"length": 128}, "length 128: .* takes texts of"),
        ("rise_cogvideox", {"motion_lora": True}, "has no motion modules"),
        ("rise_animatediff", {}, "bucket 8x65x64: .* multiples of 8 px"),
        ("rise_animatediff", {}, "bucket 99x64x64: .* at most"),
        ("rise_cogvideox", {}, "bucket 8x64x64: .* nearest"),
    ):
        found = recipe(f"tiny_{name}")
        stage = found.stage("motion")
        if "bucket" in words:
            sides = [int(n) for n in words.split(":")[0].split()[1].split("x")]
            bucket = Bucket(frames=sides[0], height_px=sides[1], width_px=sides[2])
            stage = dataclasses.replace(stage, data=Data(buckets=(bucket,)))
        with pytest.raises(ValueError, match=words) as said:
            dataclasses.replace(found.system, **change).check(stage)
        assert "\n" not in str(said.value)


def test_a_prompt_that_is_too_long_is_one_line(rise: Trained, pipe: RisePipeline) -> None:
    with pytest.raises(ValueError, match=r"4[,.]?096") as said:
        pipe("cat " * 5000, steps=1)
    assert "\n" not in str(said.value)
    with pytest.raises(ValueError, match="nearest"):
        pipe("a cat", height=65, steps=1)
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        pipe(["a cat", "a dog"], seed=[1])
    with pytest.raises(ValueError, match="of rise, not of finetune"):
        FinetunedPipeline.from_export(rise.export)
