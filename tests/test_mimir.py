"""Mimir from captioned clips to videos, on CogVideoX like 5B and a small LLM."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_sets import Item, make_set, numbered
from torch import Tensor
from training import Trained, job_of, train

from engine.caption import Instruction
from engine.weights import Weights, tiny_folder
from trainers import tracking
from trainers.answers import Answered, lengths, pack, prompt_of, seed_of, shared, states_of, unpack
from trainers.checkpoint import load_final
from trainers.dataset import read_manifest
from trainers.features import complete
from trainers.fuser import ROWS
from trainers.language import LanguageModel
from trainers.mimir import ATTRIBUTES, LORA, Mimir, MimirLearner
from trainers.mimir_pipeline import MimirPipeline, PromptTokens
from trainers.prompts import TextIds
from trainers.recipe import Recipe
from trainers.system import Bucket, Data, Noise, Optim, Sample, TrainStage
from trainers.vdm import Backbone, Conditioning

CPU = torch.device("cpu")
DATA = Data(buckets=(Bucket(frames=9, height_px=32, width_px=32),), table="clips")
CAPTIONS = (
    "A wall in one shade of grey.",
    "two cats on a long wooden wall",
    "A red bus drives down a narrow road between tall trees.",
    "snow",
)
PROMPTS = ["a red bus", "two cats on a long wooden wall"]
TUNINGS = ("full", "lora", "frozen")


@pytest.fixture(scope="module")
def system(small: None) -> Mimir:
    return Mimir(
        lm=LanguageModel(weights=Weights(at=str(tiny_folder() / "phi3"))),
        vdm=Backbone(kind="cogvideox", base=Weights(at=str(tiny_folder() / "cogvideox_5b"))),
        rank=4,
        variants=3,
        max_answer_tokens=12,
    )


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four captioned clips, one of which had a caption before."""
    folder = tmp_path_factory.mktemp("captioned")
    film = numbered(folder / "film.mp4", 40, size=(32, 32))
    items = [
        Item(
            file=film,
            start_s=1.2 * n,
            end_s=1.2 * (n + 1),
            size=(32, 32),
            caption=caption,
            original="a grey wall" if n == 0 else None,
        )
        for n, caption in enumerate(CAPTIONS)
    ]
    return Path(make_set(folder / "set", items))


def stage_of(system: Mimir, **settings: object) -> TrainStage:
    lr = settings.pop("lr", 1e-3)
    return TrainStage(
        name="fuse",
        data=DATA,
        optim=tuple(Optim(group=g, lr=lr) for g in system.groups),  # type: ignore[arg-type]
        **{"steps": 8, "batch": 4, "precision": "fp32", **settings},  # type: ignore[arg-type]
    )


def recipe_of(system: Mimir, **settings: object) -> Recipe:
    return Recipe(name="tiny_mimir", system=system, stages=(stage_of(system, **settings),))


Runs = Callable[[str], Trained]


@pytest.fixture(scope="module")
def runs(system: Mimir, captioned: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A run for each tuning, and of some rows, with its export; made when it is asked for."""

    @functools.cache
    def made(name: str) -> Trained:
        own = dataclasses.replace(system, **ROWS.get(name, {"tuning": name}))
        found = recipe_of(own, steps=8 if name == "full" else 2)
        return Trained.of(found, captioned, tmp_path_factory.mktemp(name))

    return made


@pytest.fixture(scope="module")
def pipe(runs: Runs) -> MimirPipeline:
    return MimirPipeline.from_export(runs("full").export)


@pytest.fixture(scope="module")
def samples(system: Mimir, captioned: Path) -> list[Sample]:
    """All clips with all features."""
    manifest = read_manifest(str(captioned), DATA)
    found = [Sample(row, DATA.buckets[0]) for row in manifest.take(range(len(manifest)))]
    noise = Noise(0, 0, range(len(found)))
    for sample, pixels in zip(found, noise.uniform("pixels"), strict=True):
        sample.features["pixels"] = torch.full((9, 32, 32, 3), int(255 * pixels)).byte()
    encoders = system.encoders(stage_of(system))
    running = {e.kind: e.on(CPU) for e in encoders}
    complete(found, encoders, list(running), lambda encoder: running[encoder.kind])
    return found


def learner_of(system: Mimir) -> MimirLearner:
    return system.learner(stage_of(system), CPU, {})


# Answers


def test_answers_are_packed_and_cut() -> None:
    text = TextIds((1, 2), (3, 4, 5, 6), (7, 8, 9))
    both = [Answered(text, 3), Answered(dataclasses.replace(text, answer=()), 3)]
    packed = pack(both)
    assert packed.dtype == torch.int32 and unpack(packed) == both
    assert lengths(packed) == [6, 3]
    assert both[0].cut(5) == Answered(dataclasses.replace(text, answer=(7, 8)), 3)
    assert len(both[0].cut(2)) == 2 and both[0].cut(2).text.answer == ()
    assert both[0].cut(6) == both[0]


def test_a_row_without_an_original_is_asked_of_by_its_caption() -> None:
    row = {"original": "a cat", "rephrased": "A grey cat sits."}
    assert prompt_of(row, "original") == "a cat" and prompt_of(row) == "A grey cat sits."
    for nothing in (None, "", "  "):
        assert prompt_of(row | {"original": nothing}, "original") == "A grey cat sits."


def test_answers_are_drawn_for_each_variant_whatever_is_beside(
    system: Mimir, samples: list[Sample]
) -> None:
    encode = system.encoders(stage_of(system))[2].on(CPU)
    for sample in samples:
        answers = unpack(sample.features["answers"])
        assert len({a.text.answer for a in answers}) > 1, "they are drawn"
        assert len({(a.text.prompt, a.num_query) for a in answers}) == 1
        assert all(len(a.text.answer) <= 11 for a in answers), "the last token has no state"
        (alone,) = encode([sample])
        assert torch.equal(alone, sample.features["answers"])
    assert len({seed_of(p, k) for p in CAPTIONS for k in range(4)}) == 16


def test_query_tokens_are_the_prompts(system: Mimir, samples: list[Sample]) -> None:
    model = shared(system.lm, CPU, torch.float32)
    assert model is shared(system.lm, CPU, torch.float32)
    for sample in samples:
        one = unpack(sample.features["answers"])[0]
        query = model.prompts.said(one.text.rest[: one.num_query])
        assert query.strip() == prompt_of(sample.row)


def test_states_are_those_that_generation_had(system: Mimir) -> None:
    """Of drawn answers of different lengths; and those of the prompt are the same for all."""
    model = shared(system.lm, CPU, torch.float32)
    told = Instruction(name="answer", text=system.answer_instruction)
    said = model.rephrase(
        told, [*PROMPTS, PROMPTS[0]], sample=True, seeds=[1, 2, 3], max_new_tokens=40
    )
    texts = [model.tokenized(told.text, None, p) for p in (*PROMPTS, PROMPTS[0])]
    answers = [
        Answered(dataclasses.replace(t, answer=s.generated), model.prompts.num_tokens(p))
        for t, s, p in zip(texts, said, (*PROMPTS, PROMPTS[0]), strict=True)
    ]
    found = states_of(model, answers)
    for (_, answer_SE), one in zip(found, said, strict=True):
        assert len(answer_SE) == len(one.generated)
        assert torch.allclose(answer_SE[one.kept], one.states_SD, atol=1e-5)
    assert said[0].generated != said[2].generated
    assert torch.allclose(found[0][0], found[2][0], atol=1e-5)
    whole = model.model.get_decoder()(torch.tensor([texts[0].prompt])).last_hidden_state[0]
    start, num = len(texts[0].prefix), answers[0].num_query
    assert torch.allclose(found[0][0], whole[start : start + num], atol=1e-5)


def test_attributes_are_the_states_of_each_prompts_end(
    system: Mimir, samples: list[Sample]
) -> None:
    model = shared(system.lm, CPU, torch.float32)
    for sample in samples:
        for number, instruction in enumerate(ATTRIBUTES):
            ids = model.tokenized(instruction, None, prompt_of(sample.row)).prompt
            last = model.model.get_decoder()(torch.tensor([ids])).last_hidden_state[0, -1]
            assert torch.allclose(sample.features["attributes"][number], last, atol=1e-5)
    assert "Describe the detailed objects in the video" in ATTRIBUTES[0]


# Batches


def test_variants_take_turns_by_seed_step_and_slot(system: Mimir, samples: list[Sample]) -> None:
    learner, seen = learner_of(system), set()
    for step in range(40):
        noise = Noise(7, step, range(4))
        batch = learner.batch(samples, noise)
        again = learner.batch(samples[2:], Noise(7, step, [2, 3]))
        assert all(torch.equal(t[2:], again[n]) for n, t in batch.items())
        at, dropped = noise.uniform("answer"), noise.uniform("drop") < system.text_dropout
        for slot, sample in enumerate(samples):
            which = int(at[slot] * system.variants)
            seen.add((slot, which))
            num = lengths(sample.features["answers"])[which]
            assert batch["length_B"][slot] == (0 if dropped[slot] else num)
            states = sample.features["answer_states"][which]
            assert torch.equal(batch["decoder_BLE"][slot, :num], states[:num])
            assert not batch["decoder_BLE"][slot, num:].any()
    assert len(seen) == 4 * system.variants


def test_dropped_texts_are_the_pipelines_unconditional(
    runs: Runs, pipe: MimirPipeline, samples: list[Sample]
) -> None:
    own = dataclasses.replace(runs("full").recipe.system, text_dropout=1.0)
    learner = learner_of(own)
    with torch.no_grad():
        for name, parameter in learner.module.named_parameters():
            parameter.copy_(runs("full").stage("fuse")[name])
        batch = learner.batch(samples, Noise(0, 0, range(4)))
        names = ("encoder_BLD", "decoder_BLE", "length_B", "attributes_BNE")
        text = learner.module.fuser(*(batch[n] for n in names))
    assert not batch["length_B"].any()
    assert torch.allclose(text, pipe.null_LD.expand_as(text), atol=1e-6)
    assert pipe.null_LD.shape == (230, 32) and pipe.null_LD[226:].any()


def test_texts_that_are_cut_are_counted(system: Mimir, samples: list[Sample]) -> None:
    learner = learner_of(dataclasses.replace(system, text_dropout=0.0))
    learner._null_LD = learner._null_LD[:10]  # as if the video model took no more
    for sample in samples:
        assert min(lengths(sample.features["answers"])) > 0
    _, length_B = learner._said(samples, torch.zeros(4))
    num = [lengths(s.features["answers"])[0] for s in samples]
    assert length_B.tolist() == [min(n, 10) for n in num]
    assert learner.counts["answers_cut"] == sum(n > 10 for n in num) > 0


# Training


@pytest.mark.parametrize("name", ROWS)
def test_every_row_trains(system: Mimir, samples: list[Sample], name: str) -> None:
    """Gradients reach all that is trained, whole denoiser included, by the second step."""
    own = dataclasses.replace(system, **ROWS[name], text_dropout=0.0)
    own.check(stage_of(own))
    learner = learner_of(own)
    kinds = {e.kind for e in own.encoders(stage_of(own))}
    assert ("answers" in kinds) == own.decoder and ("attributes" in kinds) == own.stabilizer
    assert set(learner.groups) == set(own.groups)
    trained = [p for p in learner.module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        learner.module(**learner.batch(samples[:2], Noise(0, step, [0, 1]))).sum().backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
    named = dict(learner.module.named_parameters())
    still = [n for group in learner.groups.values() for n in group if not named[n].grad.any()]
    assert not still


def test_samples_do_not_depend_on_those_beside_them(system: Mimir, samples: list[Sample]) -> None:
    """So a batch may be shared by workers, and gone through in parts."""
    module, batch = learner_of(system), functools.partial(Noise, 3, 1)
    with torch.no_grad():
        whole = module.module(**module.batch(samples, batch(range(4))))
        parts = [module.module(**module.batch([s], batch([n]))) for n, s in enumerate(samples)]
    assert torch.allclose(whole, torch.cat(parts), rtol=1e-5)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_bf16_is_near_fp32(system: Mimir, samples: list[Sample], tuning: str) -> None:
    """Frozen weights and autocast are bf16; what is trained is fp32, and so is its gradient."""
    own, losses = dataclasses.replace(system, tuning=tuning), []
    for precision in ("fp32", "bf16"):
        learner = own.learner(stage_of(own, precision=precision), CPU, {})
        batch = learner.batch(samples, Noise(0, 0, range(4)))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            losses.append(learner.module(**batch))
        losses[-1].sum().backward()
        named = dict(learner.module.named_parameters())
        trained = {n for names in learner.groups.values() for n in names}
        assert all(named[n].grad.dtype == torch.float32 for n in trained)
    assert losses[1].dtype == torch.float32
    assert torch.allclose(*losses, rtol=0.02) and not torch.equal(*losses)


def test_training_lowers_the_loss(runs: Runs, captioned: Path, tmp_path: Path) -> None:
    """Against the same steps at a rate of 0: the same samples and noise, so learning alone."""
    made = runs("full")
    train(recipe_of(made.recipe.system, lr=0.0), captioned, tmp_path)
    losses = made.losses("fuse")
    unmoved = [line["loss"] for line in tracking.read(tmp_path / "fuse")]
    assert losses[0] == unmoved[0] and len(losses) == 8
    assert sum(losses[4:]) < sum(unmoved[4:])
    assert {"num_texts_cut", "num_answers_cut"} <= tracking.read(made.run / "fuse")[-1].keys()


@pytest.mark.parametrize("tuning", TUNINGS)
def test_what_is_frozen_stays_bit_for_bit(
    system: Mimir, captioned: Path, tmp_path: Path, tuning: str
) -> None:
    from trainers.loop import Trainer
    from trainers.parallel import World

    own = dataclasses.replace(system, tuning=tuning)
    stage = stage_of(own, steps=2, lr=0.01)
    job = job_of(recipe_of(own), stage, captioned, tmp_path)
    learner = own.learner(stage, CPU, {})
    before = {n: t.clone() for n, t in learner.module.state_dict().items()}
    job.folder.mkdir(parents=True)
    Trainer(job, World(device=CPU), read_manifest(str(captioned), DATA), learner).run(0, {})
    after = learner.module.state_dict()
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert changed == {n for names in learner.groups.values() for n in names}
    lora = {n for n in after if f".{LORA}." in n}
    denoiser = {n for n in changed if n.startswith("denoiser.")}
    if tuning == "full":
        assert not lora and denoiser == {n for n in after if n.startswith("denoiser.")}
    else:
        assert denoiser == lora and bool(lora) == (tuning == "lora")


def test_a_run_goes_on_bit_for_bit(system: Mimir, captioned: Path, tmp_path: Path) -> None:
    own = dataclasses.replace(system, tuning="lora")
    for folder, steps in (("whole", 3), ("parts", 1), ("parts", 3)):
        train(recipe_of(own, steps=steps), captioned, tmp_path / folder)
    whole, parts = (tracking.read(tmp_path / n / "fuse") for n in ("whole", "parts"))
    assert [x["loss"] for x in whole] == [x["loss"] for x in parts]
    one, two = (load_final(tmp_path / n / "fuse") for n in ("whole", "parts"))
    assert one and two and all(torch.equal(one[1][n], two[1][n]) for n in one[1])


# Exports and videos


@pytest.mark.parametrize("name", [*TUNINGS, "baseline", "decoder"])
def test_an_export_gives_the_same_pixels(runs: Runs, name: str) -> None:
    made = runs(name)
    first, again = (MimirPipeline.from_export(made.export) for _ in range(2))
    one, two = (p("a red bus", steps=2, seed=4) for p in (first, again))
    assert one.video.shape == (9, 32, 32, 3) and one.video.std() > 0
    assert np.array_equal(one.video, two.video) and one.rephrased == two.rephrased
    assert (one.rephrased == "a red bus") == (name == "baseline")
    assert set(one.timings) == {"rephrase_s", "text_s", "denoise_s", "decode_s"}
    fuser = dict(first.fuser.named_parameters())
    trained = {n.removeprefix("fuser."): t for n, t in made.stage("fuse").items() if "fuser." in n}
    assert fuser.keys() == trained.keys()
    assert all(torch.equal(fuser[n], trained[n]) for n in fuser)
    denoiser = dict(first.vdm.denoiser.named_parameters())
    for key, tensor in made.stage("fuse").items():
        if key.startswith("denoiser."):
            assert torch.equal(denoiser[key.removeprefix("denoiser.")], tensor)
    card = (made.export / "README.md").read_text()
    assert "2412.03085" in card and ("| LLM | phi3 |" in card) == (name != "baseline")


def test_an_export_loads_into_diffusers(runs: Runs) -> None:
    from diffusers import CogVideoXTransformer3DModel

    whole = CogVideoXTransformer3DModel.from_pretrained(runs("full").export / "transformer")
    weights = runs("full").stage("fuse")
    assert all(torch.equal(t, weights[f"denoiser.{n}"]) for n, t in whole.named_parameters())
    lora = load_file(runs("lora").export / "pytorch_lora_weights.safetensors")
    denoiser = [n for n in runs("lora").stage("fuse") if n.startswith("denoiser.")]
    assert len(lora) == len(denoiser) > 0
    assert not (runs("frozen").export / "transformer").exists()


def test_a_video_does_not_depend_on_those_beside_it(pipe: MimirPipeline) -> None:
    both = pipe.tokens(PROMPTS, [3, 9])
    fused = torch.stack([one.fused_LD for one in both])
    shape = pipe.vdm.latent_shape(9, 32, 32)
    noise = torch.cat([Noise(seed, 0, [0]).normal("latents", shape) for seed in (3, 9)])

    def latents(text: Tensor, noise: Tensor) -> Tensor:
        given = Conditioning(text[:, None])
        return pipe.vdm.generate(given, pipe.null_LD, noise, steps=2, guidance_scale=6.0)

    together = latents(fused, noise)
    for n, (prompt, seed) in enumerate(zip(PROMPTS, (3, 9), strict=True)):
        (alone,) = pipe.tokens([prompt], [seed])
        assert alone.said and both[n].said
        assert alone.said.answer.generated == both[n].said.answer.generated
        assert torch.allclose(alone.fused_LD, both[n].fused_LD, atol=1e-5)
        own = latents(alone.fused_LD[None], noise[n : n + 1])
        assert torch.allclose(own[0], together[n], atol=1e-4)
    made = pipe(PROMPTS, steps=2, seed=[3, 9])
    own = pipe(PROMPTS[1], steps=2, seed=9)
    assert np.abs(own.video.astype(int) - made[1].video.astype(int)).max() <= 1
    assert own.rephrased == made[1].rephrased


def test_tokens_are_what_figure_7_looks_at(pipe: MimirPipeline) -> None:
    """One prompt, several answers: its own tokens stay, the answer's vary."""
    found = pipe.tokens(["a red bus"] * 4, range(4))
    first, *others = found
    assert isinstance(first, PromptTokens) and first.said
    assert first.encoder_LD.shape == (226, 32) and first.fused_LD.shape == (230, 32)
    for one in others:
        assert one.said and torch.equal(one.encoder_LD, first.encoder_LD)
        assert torch.allclose(one.said.query_QE, first.said.query_QE, atol=1e-5)
    assert len({one.said.answer.generated for one in found if one.said}) > 1
    said = first.said
    assert len(said.decoder) == len(said.query_QE) + len(said.answer_SE)
    num = len(said.decoder)
    added = pipe.fuser.decoder(said.decoder)
    own = first.encoder_LD + pipe.fuser.encoder(first.encoder_LD)
    assert torch.allclose(first.fused_LD[:num], own[:num] + added, atol=1e-5)
    assert torch.allclose(first.fused_LD[num:226], own[num:], atol=1e-6)
    greedy = pipe.tokens(["a red bus"] * 2, [0, 1], answers="greedy")
    assert greedy[0].text == greedy[1].text


def test_conditioning_is_that_of_training(
    runs: Runs, pipe: MimirPipeline, samples: list[Sample]
) -> None:
    """The same text with the seed of a variant is fused to the same tokens."""
    made = runs("full")
    sample = next(s for s in samples if s.row["original"] is None)
    prompt = prompt_of(sample.row)
    for k in range(made.recipe.system.variants):
        (found,) = pipe.tokens([prompt], [seed_of(prompt, k)])
        assert found.said
        num = lengths(sample.features["answers"])[k]
        states = sample.features["answer_states"][k, :num]
        assert torch.allclose(found.said.decoder, states, atol=1e-5)
        attributes = sample.features["attributes"]
        assert torch.allclose(found.said.attributes_NE, attributes, atol=1e-5)
        assert torch.allclose(found.encoder_LD, sample.features["base_text"], atol=1e-5)


# Bad input


def test_what_does_not_fit_is_one_line(system: Mimir, tmp_path: Path) -> None:
    models = tiny_folder()
    sd, motion = (Weights(at=str(models / "animatediff" / n)) for n in ("sd", "motion"))
    animated = Backbone(kind="animatediff", base=sd, motion=motion)
    other = tmp_path / "eps"
    other.mkdir()
    for part in (models / "cogvideox_5b").iterdir():
        (other / part.name).symlink_to(part)
    (other / "scheduler").unlink()
    (other / "scheduler").mkdir()
    config = (models / "cogvideox_5b" / "scheduler" / "scheduler_config.json").read_text()
    config = config.replace('"v_prediction"', '"epsilon"')
    (other / "scheduler" / "scheduler_config.json").write_text(config)
    missing = LanguageModel(weights=Weights(at="nobody/nothing"))
    cases = [
        ({"vdm": animated}, "needs a CogVideoX"),
        ({"vdm": Backbone(kind="cogvideox", base=Weights(at=str(other)))}, "epsilon"),
        ({"lm": missing}, "hf download nobody/nothing"),
        ({"max_answer_tokens": 5000}, r"4[,.]?096"),
        ({"answer_instruction": "Describe it."}, "no slot {y_ori}"),
        ({"attribute_instructions": ATTRIBUTES[:3]}, "4 attribute instructions"),
        ({"variants": 0}, "0 answers"),
        ({"decoder": False}, "stabilizer"),
        ({"decoder": False, "stabilizer": False, "tuning": "frozen"}, "nothing can be trained"),
    ]
    for change, words in cases:
        own = dataclasses.replace(system, **change)
        with pytest.raises(ValueError, match=words) as said:
            own.check(stage_of(own))
        assert "\n" not in str(said.value)
    for change, words in (
        ({"name": "motion"}, "stage fuse, and no 'motion'"),
        ({"optim": (Optim(group="lora", lr=1e-3),)}, "fuser and denoiser can be trained"),
        ({"data": Data(buckets=(Bucket(frames=8, height_px=32, width_px=32),))}, "nearest"),
    ):
        with pytest.raises(ValueError, match=words) as said:
            system.check(dataclasses.replace(stage_of(system), **change))
        assert "\n" not in str(said.value)


def test_a_prompt_that_does_not_fit_is_one_line(pipe: MimirPipeline) -> None:
    for prompt, words in (("cat " * 300, "reads 226: shorten it"), (" ", "it is empty")):
        with pytest.raises(ValueError, match=words) as said:
            pipe(prompt, steps=1)
        assert "\n" not in str(said.value)
    with pytest.raises(ValueError, match="nearest"):
        pipe("a cat", height=65, steps=1)
