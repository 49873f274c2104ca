"""What frozen encoders gave is stored once, found again bit for bit, and never stale."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import ray.cloudpickle
import small_sets
import torch
from conftest import REPOSITORY, Cluster
from small_sets import (
    DATA,
    PICTURES,
    Item,
    Letters,
    Projected,
    States,
    make_set,
    numbered,
    picture,
)

from engine.gauge import Unloadable
from engine.lease import Lease
from engine.tables import DatasetError, Writer, read, table_uri
from trainers.cache import Counts, Progress, fill, from_bytes, open_caches, to_bytes
from trainers.dataset import Manifest, read_manifest
from trainers.features import (
    Namer,
    complete,
    feature_id,
    fingerprints,
    keys_of,
    needs_pixels,
    samples_of,
    to_compute,
)
from trainers.frames import pixels_of
from trainers.loader import Loader
from trainers.plan import Plan
from trainers.system import Data, Encoder, Sample

ENCODERS = (Projected(), Letters(), States())


@pytest.fixture(autouse=True)
def by_value() -> Iterator[None]:
    """The workers cannot import the folder of the tests."""
    ray.cloudpickle.register_pickle_by_value(small_sets)
    yield
    ray.cloudpickle.unregister_pickle_by_value(small_sets)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    numbered(folder / "v.mp4", 60)
    for i in range(4):
        picture(folder / f"p{i}.png", 30 * i)
    return folder


def items(files: Path) -> list[Item]:
    """Five spans, each with two instructions, and four pictures; a text that is refused."""
    both = ("dense", "multi_scene")
    videos = [
        Item(file=files / "v.mp4", start_s=i, end_s=i + 2, rephrased=f"Text {i}", instructions=both)
        for i in range(5)
    ]
    pictures = [Item(file=files / f"p{i}.png", size=(40, 40)) for i in range(4)]
    pictures[3] = replace(pictures[3], rephrased="No. # 3")
    return videos + pictures


@pytest.fixture(scope="module")
def filled(
    files: Path, connection: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Counts], list[Progress]]:
    """A dataset with cached features, what `fill` said, and what it said on the way."""
    folder = tmp_path_factory.mktemp("filled")
    gone = picture(folder / "gone.png", 99)
    damaged = picture(folder / "damaged.png", 98)
    root = make_set(folder / "set", [*items(files), Item(file=gone), Item(file=damaged)])
    gone.unlink()
    damaged.write_bytes(damaged.read_bytes()[:60])
    said: list[Progress] = []
    ray.cloudpickle.register_pickle_by_value(small_sets)
    counts = fill(
        root,
        read_manifest(root, DATA),
        DATA,
        ENCODERS,
        connect=contextlib.nullcontext,
        watch=lambda now: said.append(replace(now)),
        workers=1,
    )
    return root, counts, said


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in an actor: sums in another order differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Bytes and names


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int64", "uint8"])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
def test_a_tensor_comes_back_bit_for_bit(dtype: str, shape: Sequence[int]) -> None:
    tensor = (torch.randn(shape) * 100).to(getattr(torch, dtype))
    back = from_bytes(*to_bytes(tensor))
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape) and torch.equal(back, tensor)


def test_strides_and_odd_numbers_are_kept() -> None:
    odd = torch.tensor([[float("nan"), -0.0, float("inf")], [1e-45, 1.0, -1.0]]).t()
    name, shape, data = to_bytes(odd)
    assert (name, shape) == ("float32", [3, 2])
    assert to_bytes(from_bytes(name, shape, data))[2] == data
    assert data == odd.contiguous().numpy().tobytes()


def test_keys_are_the_first_bytes_of_the_ids() -> None:
    import uuid

    names = [f"clip:{i}" for i in range(100)]
    assert keys_of(names).tolist() == [uuid.UUID(feature_id(n)).int >> 64 for n in names]


def sample(**changes: object) -> Sample:
    row = {"clip_id": "c", "sample_id": "p", "media": "video", "instruction_text": "i"}
    row |= {"language": None, "original": "o", "rephrased": "r"} | changes
    return Sample(row, DATA.buckets[1])


def test_a_name_tells_frames_rates_texts_and_encoders_apart() -> None:
    def names(encoders: Sequence[Encoder], one: Sample, data: Data = DATA) -> list[str]:
        known = fingerprints(encoders)
        return [Namer(e, known[e.kind], data).name(one) for e in encoders]

    latents, tokens, states = names(ENCODERS, sample())
    assert names(ENCODERS, sample(rephrased="s"))[0] == latents, "a clip's frames have no text"
    assert not {*names(ENCODERS, sample(rephrased="s"))[1:]} & {tokens, states}
    assert names(ENCODERS, sample(original="or", rephrased=""))[1] != tokens
    slow = names(ENCODERS, sample(), replace(DATA, fps=4.0))
    assert slow[0] != latents and slow[1:] == [tokens, states]
    shifted = names((Projected(), Letters(shift=1), States()), sample())
    assert shifted[0] == latents and shifted[1] != tokens
    assert shifted[2] != states, "states of other tokens are other states"
    assert names((Projected(log="x", batch_size=9), *ENCODERS[1:]), sample())[0] == latents
    pictures = [
        Sample(sample(media=media).row, DATA.buckets[0], variant)
        for media in ("video", "image")
        for variant in (0, 1)
    ]
    found = [names(ENCODERS, one, PICTURES)[0] for one in pictures]
    assert len(set(found)) == 3 and found[2] == found[3], "an image looks the same at any time"


def test_what_is_computed_is_what_the_wanted_features_need() -> None:
    def kinds(have: set[str], wanted: set[str]) -> list[str]:
        return [e.kind for e in to_compute(have, ENCODERS, wanted)]

    assert kinds(set(), {"states"}) == ["tokens", "states"]
    assert kinds({"tokens"}, {"states"}) == ["states"]
    assert kinds({"states"}, {"states"}) == []
    assert kinds({"states"}, {"states", "tokens", "latents"}) == ["latents", "tokens"]
    assert needs_pixels(sample(), ENCODERS, ["latents"])
    assert not needs_pixels(sample(), ENCODERS, ["states"])


# Filling


def on_the_fly(found: Sample, data: Data = DATA) -> dict[str, torch.Tensor]:
    """A sample's features, each computed alone."""
    alone = Sample(found.row, found.bucket, found.variant)
    pixels = pixels_of(alone.row, alone.bucket, data.fps, alone.variant, data.variants)
    alone.features["pixels"] = torch.from_numpy(pixels)
    functions = {e.kind: e.on(torch.device("cpu")) for e in ENCODERS}
    complete([alone], ENCODERS, [*functions], lambda e: functions[e.kind])
    return alone.features


@pytest.mark.slow
def test_a_hit_equals_computing_on_the_fly(filled: tuple) -> None:
    root, counts, said = filled
    manifest = read_manifest(root, DATA)
    caches = open_caches(root, ENCODERS, manifest, DATA)
    hits = Counter()
    for one in samples_of(manifest, DATA):
        got = {kind: cache.get([one])[0] for kind, cache in caches.items()}
        if "p" not in one.row["source_uri"].rsplit("/", 1)[1].split(".")[0] and (
            one.row["media"] == "image"
        ):
            assert got["latents"] is None  # gone or damaged
            continue
        if "#" in one.row["rephrased"]:
            assert got["tokens"] is None and got["states"] is None
            continue
        expected = on_the_fly(one)
        for kind, tensor in got.items():
            assert tensor is not None and tensor.dtype == expected[kind].dtype, kind
            exact = kind != "latents"
            torch.testing.assert_close(
                tensor, expected[kind], atol=0 if exact else 1e-5, rtol=0 if exact else 1e-5
            )
            hits[kind] += 1
    assert hits == {"latents": 13, "tokens": 13, "states": 13}
    assert {k: (c.computed, c.failed, c.cached) for k, c in counts.items()} == {
        "latents": (9, 2, 0),  # of clips: two pairs share one
        "tokens": (15, 1, 0),
        "states": (15, 1, 0),
    }
    assert said[-1].done == said[-1].total == 43 and said[-1].failed == 4
    assert caches["latents"].coverage == pytest.approx(14 / 16)
    assert caches["tokens"].coverage == pytest.approx(15 / 16)


@pytest.mark.slow
def test_a_batch_of_one_is_stored_exactly(files: Path, connection: None, tmp_path: Path) -> None:
    root = make_set(tmp_path / "set", items(files)[:2])
    manifest = read_manifest(root, PICTURES)
    one = (Projected(batch_size=1),)
    counts = fill(root, manifest, PICTURES, one, connect=contextlib.nullcontext, workers=1)
    assert counts["latents"].computed == 6, "three pictures of each video"
    cache = open_caches(root, one, manifest, PICTURES)["latents"]
    assert cache.coverage == 1.0
    for each in samples_of(manifest, PICTURES):
        (tensor,) = cache.get([each])
        assert torch.equal(tensor, on_the_fly(each, PICTURES)["latents"])


@pytest.mark.slow
def test_a_failure_is_a_row_that_says_why_and_whether_it_may_pass(filled: tuple) -> None:
    root, _, _ = filled
    columns = ["kind", "error_type", "error", "error_transient", "data", "dtype"]
    rows = read(root, "features").to_table(columns=columns).to_pylist()
    bad = {(r["kind"], r["error_type"], r["error_transient"]) for r in rows if r["data"] is None}
    assert bad == {
        ("latents", "FileNotFoundError", True),
        ("latents", "TruncatedError", False),
        ("tokens", "ValueError", False),
        ("states", "ValueError", False),
    }, bad
    assert all("\n" not in r["error"] for r in rows if r["error"])
    assert all(r["error"] is None and r["dtype"] for r in rows if r["data"] is not None)


@pytest.mark.slow
def test_a_second_run_computes_nothing_but_what_may_have_passed(
    filled: tuple, files: Path, tmp_path: Path
) -> None:
    import shutil

    root = tmp_path / "set"
    shutil.copytree(filled[0], root)
    manifest = read_manifest(str(root), DATA)

    def again(connect: object = contextlib.nullcontext, **how: object) -> dict[str, Counts]:
        return fill(str(root), manifest, DATA, ENCODERS, connect=connect, workers=1, **how)

    def never() -> None:
        raise AssertionError("there was nothing to do")

    gone = next(u for u in manifest.rows["source_uri"].to_pylist() if u.endswith("gone.png"))
    picture(Path(gone), 99)
    found = again()
    Path(gone).unlink()
    assert {k: (c.cached, c.computed, c.failed) for k, c in found.items()} == {
        "latents": (9, 1, 0),
        "tokens": (15, 0, 0),
        "states": (15, 0, 0),
    }
    assert all(c.computed == 0 for c in again(never).values())
    tried = again(retry_failed=True, kinds=("tokens",))
    assert tried == {"tokens": replace(tried["tokens"], cached=15, computed=0, failed=1)}
    ids = read(str(root), "features").to_table(columns=["feature_id"])["feature_id"].to_pylist()
    assert len(ids) == len(set(ids)) == 43


def test_features_of_other_encoders_are_not_taken_for_todays(filled: tuple) -> None:
    root, _, _ = filled
    manifest = read_manifest(root, DATA)
    others = open_caches(root, (Projected(seed=1), Letters(), States()), manifest, DATA)
    assert len(others["latents"]) == 0 and others["latents"].coverage == 0.0
    assert len(others["tokens"]) == 15
    slow = replace(DATA, fps=4.0)
    found = open_caches(root, ENCODERS, read_manifest(root, slow), slow)["latents"]
    images = [s for s in samples_of(read_manifest(root, slow), slow) if s.bucket.frames == 1]
    assert sum(t is not None for t in found.get(images)) == len(images) - 2
    rest = [s for s in samples_of(read_manifest(root, slow), slow) if s.bucket.frames > 1]
    assert not any(t is not None for t in found.get(rest))


def test_a_dataset_from_before_there_were_features_opens(files: Path, tmp_path: Path) -> None:
    import shutil

    root = make_set(tmp_path / "set", items(files))
    shutil.rmtree(table_uri(root, "features"))
    manifest = read_manifest(root, DATA)
    caches = open_caches(root, ENCODERS, manifest, DATA)
    assert caches["latents"].get([*samples_of(manifest, DATA)]) == [None] * len(manifest)
    Writer(root, "later")
    assert read(root, "features").count_rows() == 0


def test_a_cache_outlives_the_files_it_was_opened_on(filled: tuple, tmp_path: Path) -> None:
    import shutil
    from datetime import timedelta

    root = str(tmp_path / "set")
    shutil.copytree(filled[0], root)
    manifest = read_manifest(root, DATA)
    cache = open_caches(root, ENCODERS, manifest, DATA)["tokens"]
    asked = [*samples_of(manifest, DATA)]
    before = cache.get(asked)
    writer = Writer(root, "later")
    table = writer.tables["features"]
    rows = table.rows_with("kind", ["tokens", "latents", "states"])
    writer.remove("features", "kind", ["tokens", "latents", "states"])
    writer.append("features", rows.slice(20))
    writer.append("features", rows.slice(0, 20))
    table.at.cleanup_old_versions(older_than=timedelta(0), delete_unverified=True)
    after = cache.get(asked)
    assert [t if t is None else t.tolist() for t in after] == [
        t if t is None else t.tolist() for t in before
    ]


def test_the_loader_decodes_only_what_is_not_cached(filled: tuple) -> None:
    root, _, _ = filled
    manifest = read_manifest(root, DATA)
    caches = open_caches(root, ENCODERS, manifest, DATA)
    plan = Plan(manifest.bucket, 4, 0)
    loader = Loader(manifest, DATA, plan, ENCODERS, caches, micro_batch=4)
    for step in range(8):
        for micro in loader.get(step):
            for one, why in zip(micro.samples, micro.failed, strict=True):
                has = set(one.features)
                name = Path(one.row["source_uri"]).name
                if name in ("gone.png", "damaged.png"):
                    assert why and has == {"pixels", "tokens", "states"}
                else:
                    assert why is None and "latents" in has and "pixels" not in has
                    assert ("tokens" in has) == ("#" not in one.row["rephrased"])
    loader.close()


def test_what_is_forgotten_takes_its_features_along(filled: tuple, tmp_path: Path) -> None:
    import shutil

    from engine.forget import choose, forget

    root = str(tmp_path / "set")
    shutil.copytree(filled[0], root)
    manifest = read_manifest(root, DATA)
    uri = next(u for u in manifest.rows["source_uri"].to_pylist() if u.endswith("v.mp4"))
    sources = read(root, "sources").to_table(columns=["source_id", "uri", "sha256"])
    forget(Writer(root, "forget"), choose(sources, [uri]))
    left = read(root, "features").to_table(columns=["clip_id"])["clip_id"].to_pylist()
    gone = {r["clip_id"] for r in manifest.take(range(len(manifest))) if r["source_uri"] == uri}
    assert len(gone) == 5 and left and not gone & set(left)


def test_bad_calls_are_one_line_before_any_work(files: Path, tmp_path: Path) -> None:
    root = make_set(tmp_path / "set", items(files))
    manifest = read_manifest(root, DATA)

    def call(**how: object) -> None:
        fill(root, manifest, DATA, ENCODERS, connect=contextlib.nullcontext, **how)

    with pytest.raises(ValueError, match=r"no features state: choose of latents, tokens, states"):
        call(kinds=("state",))
    with Lease(root, "another"), pytest.raises(DatasetError, match="in use by run another"):
        call()


class Broken(Letters):
    """Cannot be loaded."""

    def on(self, device: torch.device) -> None:  # type: ignore[override]
        raise OSError("no weights\nat all")


@pytest.mark.slow
def test_an_encoder_that_cannot_be_loaded_ends_the_run(
    files: Path, connection: None, tmp_path: Path
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    root = make_set(tmp_path / "set", items(files))
    manifest = read_manifest(root, DATA)
    with pytest.raises(Unloadable, match="Broken cannot be loaded: no weights at all"):
        fill(root, manifest, DATA, (Broken(),), connect=contextlib.nullcontext, workers=1)
    assert read(root, "features").count_rows() == 0
    assert not (Path(root) / "filling").exists()


# Killed

DRIVER = """
import sys
sys.path[:0] = sys.argv[1:3]
import ray.cloudpickle
import small_sets
from engine.session import connected
from small_sets import PICTURES
from trainers.cache import fill
from trainers.dataset import read_manifest

ray.cloudpickle.register_pickle_by_value(small_sets)
root, log = sys.argv[3:]
slow = small_sets.Projected(log=log, delay_s=0.1, batch_size=2)
fill(root, read_manifest(root, PICTURES), PICTURES, (slow,), connect=connected,
     workers=1, commit_every_s=0.2)
"""


def encoded(log: Path) -> list[tuple[str, int]]:
    """Clips and variants that were encoded, in order."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(line.split()[0], int(line.split()[1])) for line in lines]


def stored(root: str, manifest: Manifest, encoder: Encoder) -> list[tuple[str, int]]:
    """Clips and variants whose features are there, with those that are there twice."""
    known = fingerprints([encoder])[encoder.kind]
    namer = Namer(encoder, known, PICTURES)
    by_id = {
        feature_id(namer.name(s)): (s.row["clip_id"], s.variant)
        for s in samples_of(manifest, PICTURES)
    }
    ids = read(root, "features").to_table(columns=["feature_id"])["feature_id"].to_pylist()
    return sorted(by_id[i] for i in ids)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_killed_run_goes_on_with_what_is_missing_and_loses_or_doubles_nothing(
    files: Path, cluster: Cluster, connection: None, tmp_path: Path
) -> None:
    spans = [i / 8 for i in range(20)]
    root = make_set(
        tmp_path / "set",
        [Item(file=files / "v.mp4", start_s=s, end_s=s + 2, original=f"o {s}") for s in spans],
    )
    manifest, logs = read_manifest(root, PICTURES), [tmp_path / "first", tmp_path / "second"]
    encoder = Projected(log=str(logs[1]), delay_s=0.1, batch_size=2)
    everything = sorted((s.row["clip_id"], s.variant) for s in samples_of(manifest, PICTURES))
    assert len(everything) == 60
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, REPOSITORY, REPOSITORY / "tests", root, logs[0]],
        env=cluster.env,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while len(stored(root, manifest, encoder)) < 8:
        assert driver.poll() is None and time.monotonic() < deadline, driver.communicate()
        time.sleep(0.02)
    driver.kill()
    driver.communicate()
    committed = stored(root, manifest, encoder)
    assert 8 <= len(committed) < 60

    killed: list[int] = []

    def kill_an_actor(now: Progress) -> None:
        if not killed and now.done >= 10:
            killed.append(int(logs[1].read_text().splitlines()[-1].split()[2]))
            os.kill(killed[0], signal.SIGKILL)

    counts = fill(
        root,
        manifest,
        PICTURES,
        (encoder,),
        connect=contextlib.nullcontext,
        watch=kill_an_actor,
        workers=1,
        commit_every_s=0.2,
    )
    assert killed, "an actor was killed, too"
    assert stored(root, manifest, encoder) == everything
    assert not set(encoded(logs[1])) & set(committed), "what was committed is not computed again"
    assert counts["latents"].cached == len(committed)
    assert counts["latents"].computed == 60 - len(committed)
    cache = open_caches(root, (encoder,), manifest, PICTURES)["latents"]
    assert cache.coverage == 1.0
