"""The training loop in one process: what a step is, and going on after whatever happens."""

import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import learners
import pytest
import torch
from learners import Denoise, job, make_pictures
from safetensors.torch import load_file
from small_sets import Letters

from engine.tables import read
from trainers import launch, tracking
from trainers.checkpoint import complete, folder_of, load_final
from trainers.dataset import read_manifest
from trainers.job import Job, Stopped
from trainers.optim import rate
from trainers.plan import Plan
from trainers.system import Bucket, Data, Encoder, Noise, Optim, Sample, TrainStage


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def undisturbed(root: str, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run from beginning to end."""
    whole = job(root, tmp_path_factory.mktemp("undisturbed"))
    launch.alone(whole)
    return whole


def losses(job: Job) -> list[float]:
    lines = tracking.read(job.folder)
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return [line["loss"] for line in lines]


def same_result(one: Job, other: Job) -> bool:
    (_, a), (_, b) = load_final(one.folder), load_final(other.folder)  # type: ignore[misc]
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_noise_is_of_the_slot_and_not_of_the_batch() -> None:
    whole = Noise(3, 7, range(6)).normal("x", (2, 5))
    parts = [Noise(3, 7, slots).normal("x", (2, 5)) for slots in ((0, 1), (2,), (3, 4, 5))]
    assert torch.equal(whole, torch.cat(parts))
    assert len({float(v) for v in whole.flatten()}) == 60
    for other in (Noise(4, 7, [0]), Noise(3, 8, [0])):
        assert not torch.equal(other.normal("x", (2, 5))[0], whole[0])
    assert not torch.equal(Noise(3, 7, [0]).normal("y", (2, 5))[0], whole[0])
    many = torch.cat([Noise(0, step, range(64)).uniform("u") for step in range(32)])
    assert many.min() >= 0 and many.max() < 1
    assert abs(many.mean() - 0.5) < 4 / math.sqrt(12 * len(many))
    normal = torch.cat([Noise(0, s, range(64)).normal("n", (8,)).flatten() for s in range(32)])
    assert abs(normal.mean()) < 4 / math.sqrt(len(normal)) and abs(normal.std() - 1) < 0.03


def test_a_run_is_the_same_every_time(undisturbed: Job, root: str, tmp_path: Path) -> None:
    again = job(root, tmp_path, ahead=0, threads=1, log_every=5, checkpoint_every=100)
    launch.alone(again)
    assert losses(again) == losses(undisturbed)
    assert same_result(again, undisturbed)
    assert len(losses(again)) == 12


def test_a_micro_batch_changes_nothing_but_rounding(
    undisturbed: Job, root: str, tmp_path: Path
) -> None:
    whole = job(root, tmp_path, micro_batch=4)
    launch.alone(whole)
    assert losses(whole) == pytest.approx(losses(undisturbed), rel=1e-5)


def test_a_loss_falls_and_frozen_weights_stay(root: str, tmp_path: Path) -> None:
    long = job(root, tmp_path, stage={"steps": 60, "ema_decay": None})
    launch.alone(long)
    found = losses(long)
    assert sum(found[-10:]) < 0.8 * sum(found[:10])
    torch.manual_seed(long.stage.seed)
    fresh = learners.DenoiseModule(16).state_dict()
    trained = load_final(long.folder)[1]  # type: ignore[index]
    assert trained.keys() == {n for n in fresh if n.startswith("blocks")}
    assert not any(torch.equal(trained[n], fresh[n]) for n in trained)


def test_a_step_against_its_equation(root: str, tmp_path: Path) -> None:
    """One step of AdamW, by hand, on the gradient of the mean loss of all slots."""
    once = job(root, tmp_path, stage={"steps": 1, "clip_norm": 0.05, "ema_decay": 0.75})
    launch.alone(once)
    manifest = read_manifest(root, once.stage.data)
    system, stage = once.system, once.stage
    from trainers.features import open_caches
    from trainers.loader import Loader

    torch.manual_seed(stage.seed)
    learner = system.learner(stage, torch.device("cpu"), {})
    loader = Loader(
        manifest,
        stage.data,
        Plan(manifest.bucket, 4, stage.seed),
        system.encoders(stage),
        open_caches(root, system.encoders(stage), manifest, stage.data),
        micro_batch=4,
    )
    (micro,) = loader.get(0)
    loader.close()
    encode = system.encoders(stage)[0].on(torch.device("cpu"))
    for sample, found in zip(micro.samples, encode(micro.samples), strict=True):
        sample.features["latents"] = found
    loss = learner.module(**learner.batch(micro.samples, Noise(stage.seed, 0, range(4)))).mean()
    loss.backward()
    (line,) = tracking.read(once.folder)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-6)
    named = dict(learner.module.named_parameters())
    trained = load_final(once.folder)[1]  # type: ignore[index]
    norm = math.sqrt(sum(float(named[n].grad.square().sum()) for n in trained))
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert norm > 0.05, "or the test clips nothing"
    lr, decay = 1e-2 / 3, 0.01  # the first of three steps of warm-up
    assert line["lr_all"] == pytest.approx(lr)
    for name, found in trained.items():
        gradient = named[name].grad * 0.05 / (norm + 1e-6)
        moved = named[name] * (1 - lr * decay) - lr * gradient / (gradient.abs() + 1e-8)
        averaged = 0.75 * named[name] + 0.25 * moved
        assert torch.allclose(found, averaged, atol=1e-7)


def test_rates() -> None:
    flat = Optim(group="g", lr=2.0, warmup_steps=4)
    assert [rate(flat, s, 9) for s in (0, 1, 3, 4, 8)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    cosine = dataclasses.replace(flat, schedule="cosine", warmup_steps=0)
    assert [rate(cosine, s, 4) for s in range(5)] == pytest.approx(
        [2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0.0]
    )


@pytest.mark.parametrize("beside", [True, False])
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(
    undisturbed: Job, root: str, tmp_path: Path, beside: bool
) -> None:
    first = job(root, tmp_path, stage={"steps": 6}, async_save=beside)
    launch.alone(first)
    assert complete(first.folder) == [4, 6]
    rest = job(root, tmp_path, async_save=beside)
    assert launch.alone(rest) == 6
    assert losses(rest) == losses(undisturbed)
    assert same_result(rest, undisturbed)
    assert launch.alone(rest) == 12, "nothing is left to do"
    assert losses(rest) == losses(undisturbed)


def test_fewer_steps_than_were_taken_are_refused(root: str, tmp_path: Path) -> None:
    """Else what twelve steps trained would be called the result of four."""
    launch.alone(job(root, tmp_path))
    fewer = job(root, tmp_path, stage={"steps": 4})
    for refused in (lambda: launch.check(fewer, 1), lambda: launch.alone(fewer)):
        with pytest.raises(ValueError, match="has taken 12 steps, and 4 are asked for"):
            refused()
    assert load_final(fewer.folder)[0] == 12  # type: ignore[index]


def test_a_killed_run_goes_on_bit_for_bit(undisturbed: Job, root: str, tmp_path: Path) -> None:
    program = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from pathlib import Path\nfrom learners import Denoise, job\nfrom trainers import launch\n"
        "system = Denoise(kill_at=10, kill_flag=sys.argv[5])\n"
        "launch.alone(job(sys.argv[3], Path(sys.argv[4]), system=system))\n"
    )
    tests = Path(__file__).parent
    given = [str(tests.parent), str(tests), root, str(tmp_path / "run"), str(tmp_path / "killed")]
    died = subprocess.run([sys.executable, "-c", program, *given], timeout=120)
    assert died.returncode == -signal.SIGKILL
    resumed = job(root, tmp_path / "run")
    assert len(losses(resumed)) == 10, "steps that are done again"
    assert launch.alone(resumed) in (4, 8), "the save of step 8 may not have been marked yet"
    assert losses(resumed) == losses(undisturbed)
    assert same_result(resumed, undisturbed)


def test_a_checkpoint_that_was_cut_off_is_never_read(
    undisturbed: Job, root: str, tmp_path: Path
) -> None:
    cut = job(root, tmp_path, stage={"steps": 8})
    launch.alone(cut)
    newest = folder_of(cut.folder, 8)
    (newest / "COMPLETE").unlink()
    for part in newest.glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:100])
    (cut.folder / "final.safetensors").unlink()
    rest = job(root, tmp_path)
    assert launch.alone(rest) == 4
    assert losses(rest) == losses(undisturbed) and same_result(rest, undisturbed)


def test_a_checkpoint_of_another_training_is_refused(
    undisturbed: Job, root: str, tmp_path: Path
) -> None:
    other = job(root, tmp_path, system=Denoise(width=8), stage={"steps": 4})
    launch.alone(other)
    shutil.rmtree(folder_of(other.folder, 4))
    shutil.copytree(folder_of(undisturbed.folder, 12), folder_of(other.folder, 12))
    with pytest.raises(ValueError, match=r"step_00000012 is a checkpoint of another training"):
        launch.check(other, 1)
    with pytest.raises(ValueError, match="take it away"):
        launch.alone(other)


def test_only_the_newest_checkpoints_stay(root: str, tmp_path: Path) -> None:
    kept = job(root, tmp_path, checkpoint_every=2, keep=2)
    launch.alone(kept)
    assert complete(kept.folder) == [10, 12]
    assert len(list(kept.folder.glob("step_*"))) == 2


def test_a_step_that_is_not_finite_is_skipped(root: str, tmp_path: Path) -> None:
    burst = job(root, tmp_path, system=Denoise(burst_from=5, burst_for=2))
    launch.alone(burst)
    lines = tracking.read(burst.folder)
    assert [line["num_skipped"] for line in lines] == [0] * 5 + [1, 1] + [0] * 5
    assert [line["loss"] is None for line in lines] == [False] * 5 + [True] * 2 + [False] * 5
    trained = load_final(burst.folder)[1]  # type: ignore[index]
    assert all(t.isfinite().all() for t in trained.values())


def test_steps_that_are_never_finite_stop_a_run(root: str, tmp_path: Path) -> None:
    burst = job(root, tmp_path, system=Denoise(burst_from=3), patience=4)
    with pytest.raises(Stopped, match="not finite for 4 steps in a row, the last being 6"):
        launch.alone(burst)
    assert not (burst.folder / "final.safetensors").exists()


def test_another_configuration_is_refused(undisturbed: Job, root: str, tmp_path: Path) -> None:
    there = Path(undisturbed.out)
    with pytest.raises(ValueError, match=r"stage\.clip_norm: 1\.0 there, 2\.0 asked for") as said:
        launch.check(job(root, there, stage={"clip_norm": 2.0}), 1)
    assert "\n" not in str(said.value)
    with pytest.raises(ValueError, match=r"system\.width: 16 there, 8 asked for"):
        launch.alone(job(root, there, system=Denoise(width=8)))
    launch.check(job(root, there, micro_batch=4, keep=1), 2)  # how, and not what
    other = make_pictures(tmp_path / "other")
    from engine.tables import Writer

    writer = Writer(other, "test")
    gone = read(other, "pairs").to_table(columns=["pair_id"])["pair_id"][0].as_py()
    writer.remove("pairs", "pair_id", [gone])
    with pytest.raises(ValueError, match=r"data\.hash: .*data\.samples: 13 there, 12 asked for"):
        launch.check(job(other, there), 1)


def test_what_is_wrong_is_said_before_any_work(root: str, tmp_path: Path) -> None:
    def refused(match: str, workers: int = 1, **changes: object) -> None:
        with pytest.raises(ValueError, match=match) as said:
            launch.check(dataclasses.replace(job(root, tmp_path / "new"), **changes), workers)
        assert "\n" not in str(said.value)
        assert not (tmp_path / "new").exists()

    refused("width 0: at least 1", system=Denoise(width=0))
    refused("a batch of 4 cannot be shared equally by 3 workers", workers=3)
    refused("s3://bucket/run: a run's folder is a path", out="s3://bucket/run")
    refused("holds no dataset", root=str(tmp_path))
    plain = job(root, tmp_path)
    options = dataclasses.replace(plain.options, trackers=("abacus",))
    refused("there is no tracker 'abacus'", options=options)
    longer = Data(buckets=(Bucket(frames=400, height_px=8, width_px=8),))
    refused("bucket|fit|long", stage=dataclasses.replace(plain.stage, data=longer))


def test_a_stage_starts_from_one_that_ended(root: str, tmp_path: Path) -> None:
    second = {"name": "second", "after": ("denoise",), "steps": 2}
    with pytest.raises(ValueError, match=r"stage denoise of .* has not ended: train it first"):
        launch.alone(job(root, tmp_path, stage=second))
    first = job(root, tmp_path)
    launch.alone(first)
    still = job(root, tmp_path, stage=second | {"optim": (Optim(group="all", lr=0.0),)})
    launch.alone(still)
    assert same_result(first, still), "at a rate of 0 it is what it started from"
    launch.check(still, 1)
    launch.alone(job(root, tmp_path, stage={"steps": 14}))
    with pytest.raises(ValueError, match=r"starts_from\.denoise: "):
        launch.check(still, 1)


def test_what_cannot_be_read_has_no_weight(root: str, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    there = make_pictures(folder)
    (folder / "3.png").unlink()
    gone = job(there, tmp_path / "run", stage={"steps": 20, "ema_decay": None})
    launch.alone(gone)
    lines = tracking.read(gone.folder)
    assert sum(line["num_unreadable"] for line in lines) > 0
    assert all(line["loss"] is not None for line in lines)
    assert load_final(gone.folder)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picky(Letters):
    """Refuses the texts of some samples, as a model does that they are too long for."""

    kind = "picky"
    refuses: tuple[str, ...] = ()

    def on(self, device: torch.device) -> Callable[[Sequence[Sample]], list[torch.Tensor]]:
        encode = super().on(device)

        def picky(samples: Sequence[Sample]) -> list[torch.Tensor]:
            if any(s.row["sample_id"] in self.refuses for s in samples):
                raise ValueError("a text of 9 tokens: 8 are read")
            return encode(samples)

        return picky


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoisePicky(Denoise):
    refuses: tuple[str, ...] = ()

    def encoders(self, stage: TrainStage) -> tuple[Encoder, ...]:
        return (*super().encoders(stage), Picky(refuses=self.refuses))


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("first", [True, False])
def test_what_cannot_be_encoded_has_no_weight(
    root: str, tmp_path: Path, micro_batch: int, first: bool
) -> None:
    """Be it the very first sample: its step's loss is less by its share, and those before equal."""
    manifest = read_manifest(root, learners.DATA)
    ids = manifest.rows["sample_id"].to_pylist()
    picked = Plan(manifest.bucket, 4, seed=5).batch(0 if first else 3).rows[0]
    system = DenoisePicky(refuses=(ids[picked],))
    refused = job(root, tmp_path, system=system, micro_batch=micro_batch)
    launch.alone(refused)
    lines = tracking.read(refused.folder)
    plain = job(root, tmp_path / "plain", micro_batch=micro_batch)
    launch.alone(plain)
    unweighed = [line["num_unreadable"] for line in lines]
    begins = next(step for step, num in enumerate(unweighed) if num)
    assert 0 < sum(unweighed) < 12 and (begins == 0) == first, "one of thirteen samples"
    before, now = losses(plain), losses(refused)
    assert now[:begins] == before[:begins] and 0 < now[begins] < before[begins]
    with pytest.raises(ValueError, match=r"can be encoded.* a text of 9 tokens: 8 are read"):
        launch.alone(job(root, tmp_path / "all", system=DenoisePicky(refuses=tuple(ids))))


def test_figures_of_a_run(undisturbed: Job) -> None:
    lines = tracking.read(undisturbed.folder)
    for line in lines:
        assert line["samples_per_s"] > 0 and 0 <= line["data_wait_frac"] <= 1
        assert line["memory_gib"] > 0.01 and line["tflops_per_s"] > 0
        assert "mfu" not in line, "of a CPU nothing is claimed"
        assert line["num_first_slots"] == 1
    config = json.loads((undisturbed.folder / "config.json").read_text())
    assert config["data"]["samples"] == 13 and len(config["data"]["hash"]) >= 16


def test_operations_are_counted() -> None:
    from trainers.throughput import Meter

    meter = Meter(torch.device("cpu"), "fp32")
    layers = torch.nn.Sequential(torch.nn.Linear(32, 64, bias=False), torch.nn.Linear(64, 32))
    batch = {"input": torch.ones(8, 32)}
    for _ in range(3):
        meter.count("shape", layers, batch)
    forward = 2 * 8 * (32 * 64 + 64 * 32)
    assert meter._flops == 3 * 3 * forward, "forward, and twice as much backward"
    layers[0].requires_grad_(False)
    meter.count("half", layers, batch)
    assert meter._flops == 9 * forward + 2.5 * forward, "of the other half no gradient is wanted"
    layers.register_parameter("own", torch.nn.Parameter(torch.zeros(1)))
    meter.count("own", layers, batch)
    assert meter._flops == 11.5 * forward + 2.5 * forward, "a weight above counts no layer twice"


def test_attention_counts_twice_in_backward() -> None:
    from trainers.throughput import Meter

    class Attention(torch.nn.Module):
        def forward(self, query: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(query, query, query)

    meter = Meter(torch.device("cpu"), "fp32")
    query = torch.empty(2, 3, 64, 16, device="meta")  # the CPU's own kernel is not counted
    meter.count("shape", Attention(), {"query": query})
    products = 2 * (2 * 2 * 3 * 64 * 64 * 16)
    assert meter._flops == products + 2 * products


def test_tensorboard_has_every_step_once(root: str, tmp_path: Path) -> None:
    launch.alone(job(root, tmp_path, stage={"steps": 6}, trackers=("tensorboard",)))
    both = job(root, tmp_path, trackers=("tensorboard",))
    launch.alone(both)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(both.folder / "tensorboard"))
    events.Reload()
    found = events.Scalars("loss")
    assert [e.step for e in found] == list(range(12))
    assert [e.value for e in found] == pytest.approx(losses(both), rel=1e-6)


def test_progress_is_told(root: str, tmp_path: Path) -> None:
    seen: list[launch.Progress] = []
    launch.alone(job(root, tmp_path, stage={"steps": 40}), seen.append)
    assert (
        seen and seen[-1].step == seen[-1].steps == 40 and all(p.figures["loss"] > 0 for p in seen)
    )


def test_the_average_is_what_the_stage_gives(root: str, tmp_path: Path) -> None:
    averaged = job(root, tmp_path / "a")
    plain = job(root, tmp_path / "b", stage={"ema_decay": None})
    launch.alone(averaged)
    launch.alone(plain)
    assert losses(averaged) == losses(plain)
    assert not same_result(averaged, plain)


def test_bf16_trains_fp32_weights(root: str, tmp_path: Path) -> None:
    rough = job(root, tmp_path, stage={"precision": "bf16", "steps": 4})
    launch.alone(rough)
    tensors = load_file(rough.folder / "final.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_shards_on_one_worker(undisturbed: Job, root: str, tmp_path: Path) -> None:
    """FSDP2 needs a process group, so this runs in a process of its own."""
    program = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from pathlib import Path\nimport torch, torch.distributed as dist\n"
        "from learners import job\nfrom trainers.loop import train\n"
        "from trainers.parallel import World\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "world = World.joined(torch.device('cpu'))\n"
        "train(job(sys.argv[3], Path(sys.argv[4]), parallel='fsdp', stage={'steps': 6}), world)\n"
        "train(job(sys.argv[3], Path(sys.argv[4]), parallel='fsdp'), world)\n"
    )
    tests = Path(__file__).parent
    given = [str(tests.parent), str(tests), root, str(tmp_path)]
    subprocess.run([sys.executable, "-c", program, *given], timeout=120, check=True)
    sharded = job(root, tmp_path)
    assert losses(sharded) == pytest.approx(losses(undisturbed), rel=1e-6)
    a, b = load_final(sharded.folder)[1], load_final(undisturbed.folder)[1]  # type: ignore[index]
    assert all(torch.allclose(a[n], b[n], atol=1e-6) for n in b)


@pytest.mark.parametrize("beside", [True, False])
def test_a_full_disk_is_one_line_and_loses_nothing(
    undisturbed: Job, root: str, tmp_path: Path, beside: bool
) -> None:
    """No file of more than 4 kB can be written after the first checkpoint."""
    first = job(root, tmp_path, stage={"steps": 4})
    launch.alone(first)
    program = (
        "import resource, sys; sys.path[:0] = sys.argv[1:3]\n"
        "from pathlib import Path\nfrom learners import job\nfrom trainers import launch\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n launch.alone(job(sys.argv[3], Path(sys.argv[4]), async_save=sys.argv[5] == '1'))\n"
        "except OSError as error:\n print(error)\n"
    )
    tests = Path(__file__).parent
    given = [str(tests.parent), str(tests), root, str(tmp_path), str(int(beside))]
    full = subprocess.run(
        [sys.executable, "-c", program, *given], timeout=120, capture_output=True, text=True
    )
    assert full.returncode == 0, full.stderr
    assert full.stdout.count("\n") == 1 and "step_00000008 cannot be written" in full.stdout
    rest = job(root, tmp_path)
    assert launch.alone(rest) == 4
    assert losses(rest) == losses(undisturbed) and same_result(rest, undisturbed)


def test_threads_end_with_the_run(root: str, tmp_path: Path) -> None:
    before = threading.active_count()
    launch.alone(job(root, tmp_path, stage={"steps": 2}))
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before
