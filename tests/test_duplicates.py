"""Near-duplicates: against all pairs compared one by one, and on videos encoded twice."""

from __future__ import annotations

import dataclasses
import math
import tracemalloc
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pytest

from engine.duplicates import Distinct, settle
from engine.nearest import Hyperplanes, Tables
from engine.phash import PerceptualHash
from engine.scan import Scan, scan_source

VIDEO = {"media": "video", "width_px": 640, "height_px": 360, "num_frames": 120, "duration_s": 5.0}


def table(rows: list[dict[str, Any]], width: int = 0) -> pa.Table:
    schema = pa.schema(
        [
            ("clip_id", pa.string()),
            ("media", pa.string()),
            ("duration_s", pa.float64()),
            ("width_px", pa.int32()),
            ("height_px", pa.int32()),
            ("num_frames", pa.int64()),
            ("phashes", pa.list_(pa.uint64())),
            ("clip_embedding", pa.list_(pa.float32(), width)),
        ]
    )
    return pa.Table.from_pylist([VIDEO | row for row in rows], schema=schema)


def clip(name: str, *hashes: int, **facts: Any) -> dict[str, Any]:
    return {"clip_id": name, "phashes": list(hashes)} | facts


def settled(rows: list[dict[str, Any]], distinct: Distinct | None = None, **kw: Any) -> list[Any]:
    return settle(table(rows, **kw), distinct or Distinct()).to_pylist()


def flipped(value: int, num: int, rng: np.random.Generator) -> int:
    for bit in rng.choice(64, num, replace=False).tolist():
        value ^= 1 << bit
    return value


# The rule, pair by pair, as the docstrings say it.


def preference(row: dict[str, Any]) -> tuple:
    area = row["width_px"] * row["height_px"]
    return -area, -row["duration_s"], -row["num_frames"], row["clip_id"]


def alike(a: dict[str, Any], b: dict[str, Any], distinct: Distinct) -> bool:
    longer = max(a["duration_s"], b["duration_s"])
    if a["media"] != b["media"] or min(a["duration_s"], b["duration_s"]) < 0.8 * longer:
        return False
    if distinct.cosine is not None:
        x, y = (np.array(row["clip_embedding"], np.float64) for row in (a, b))
        if x @ y / np.linalg.norm(x) / np.linalg.norm(y) >= distinct.cosine:
            return True
    if distinct.phash_bits is None:
        return False
    first, second = a["phashes"], b["phashes"]
    least = math.ceil(round(0.8 * max(len(first), len(second)), 9))
    for shift in range(-len(second) + 1, len(first)):
        both = range(max(0, shift), min(len(first), len(second) + shift))
        pairs = [(first[i], second[i - shift]) for i in both]
        seen = [(x, y) for x, y in pairs if x and y]
        if len(pairs) < least or 2 * len(seen) < len(pairs):
            continue
        if np.mean([(x ^ y).bit_count() for x, y in seen]) <= distinct.phash_bits:
            return True
    return False


def expected(rows: list[dict[str, Any]], distinct: Distinct) -> list[str | None]:
    kept: list[dict[str, Any]] = []
    found = {}
    for row in sorted((VIDEO | r for r in rows), key=preference):
        match = next((k["clip_id"] for k in kept if alike(k, row, distinct)), None)
        found[row["clip_id"]] = match
        if match is None:
            kept.append(row)
    return [found[row["clip_id"]] for row in rows]


def crowd(num: int, seed: int) -> list[dict[str, Any]]:
    """Random clips, of which many are variants of few, at distances on both sides of the rule."""
    rng = np.random.default_rng(seed)
    words = rng.integers(1, 2**64, (num // 4, 6), np.uint64).tolist()
    rows = []
    for _ in range(num):
        hashes = list(words[rng.integers(len(words))][: rng.integers(3, 7)])
        most = int(rng.integers(0, 10)) if rng.random() < 0.7 else 0
        hashes = [flipped(h, int(rng.integers(0, most + 1)), rng) for h in hashes]
        hashes = [0 if rng.random() < 0.1 else h for h in hashes]
        if rng.random() < 0.3:  # trimmed or begun earlier
            hashes = hashes[1:] if rng.random() < 0.5 else [int(rng.integers(2**63)), *hashes]
        rows.append(
            clip(
                str(uuid.UUID(int=int(rng.integers(2**63)))),
                *hashes,
                duration_s=float(rng.choice([3.0, 4.0, 4.9, 6.0])),
                width_px=int(rng.choice([320, 640])),
                media=str(rng.choice(["video", "image"], p=[0.9, 0.1])),
            )
        )
    return rows


@pytest.mark.parametrize("bits", [0, 3, 6, 8])
def test_it_is_what_comparing_all_pairs_gives(bits: int) -> None:
    rows = crowd(600, seed=bits)
    distinct = Distinct(phash_bits=bits)
    found = settled(rows, distinct)
    assert found == expected(rows, distinct)
    assert 10 < sum(f is not None for f in found) < 500


def test_it_is_the_same_where_crowds_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.duplicates._LEAF", 4)
    monkeypatch.setattr("engine.duplicates._SPARE", -10_000)  # always too many
    for seed in range(3):
        rows = crowd(300, seed)
        assert settled(rows) == expected(rows, Distinct())
        for row in rows:
            row["phashes"] = [h & 0xFF for h in row["phashes"]]  # many matches for each
        assert settled(rows) == expected(rows, Distinct())


@pytest.mark.parametrize("bits", [3, 6, 9])
def test_no_pair_within_the_bits_is_missed(bits: int) -> None:
    rng = np.random.default_rng(bits)
    hashes = rng.integers(0, 2**64, 2000, np.uint64)
    flips = [flipped(int(h), int(rng.integers(0, bits + 3)), rng) for h in hashes[:1000]]
    hashes = np.unique(np.r_[hashes, np.array(flips, np.uint64)])
    apart = np.bitwise_count(hashes[:, None] ^ hashes)
    near = {(int(i), int(j)) for i, j in np.argwhere(np.triu(apart <= bits, 1))}
    for blocks in (bits + 1, bits + 2, bits + 3):
        tables = Tables(bits, blocks)
        found = listed(tables.near(hashes))
        assert sorted((min(p), max(p)) for p in found) == sorted(near)
        left, right = hashes[::2], hashes[1::2]
        close = np.argwhere(np.bitwise_count(left[:, None] ^ right) <= bits)
        assert sorted(listed(tables.near(left, right))) == [(int(i), int(j)) for i, j in close]


def listed(chunks: Any) -> list[tuple[int, int]]:
    return [p for a, b in chunks for p in zip(a.tolist(), b.tolist(), strict=True)]


def test_the_order_of_rows_does_not_count() -> None:
    rows = crowd(500, seed=11)
    first = dict(zip((r["clip_id"] for r in rows), settled(rows), strict=True))
    for seed in range(3):
        mixed = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
        whole = table(mixed)
        parts = pa.concat_tables([whole.slice(0, 7), whole.slice(7, 200), whole.slice(207)])
        found = settle(parts, Distinct()).to_pylist()
        assert dict(zip((r["clip_id"] for r in mixed), found, strict=True)) == first


def test_what_is_left_has_no_duplicates_and_each_points_to_what_is_left() -> None:
    rows = crowd(800, seed=12)
    found = settled(rows)
    kept = [row for row, of in zip(rows, found, strict=True) if of is None]
    assert settled(kept) == [None] * len(kept)
    assert {of for of in found if of} <= {row["clip_id"] for row in kept}


def test_no_chains() -> None:
    """b is like a and like c, but a and c are not alike: c stays."""
    a, b, c = 0xFFFF_0000_FFFF_0000, 0xFFFF_0000_FFFF_003F, 0xFFFF_0000_FFFF_0FFF
    rows = [clip("a", a, a, a), clip("b", b, b, b), clip("c", c, c, c)]
    assert settled(rows) == [None, "a", None]


def test_the_mean_over_the_keyframes_counts() -> None:
    a = [0x0123_4567_89AB_CDEF, 0xFEDC_BA98_7654_3210, 0x0F1E_2D3C_4B5A_6978]
    near = [a[0], a[1], a[2] ^ 0x3FFFF]  # 18 bits in one of three: 6 in the mean
    far = [a[0], a[1], a[2] ^ 0x7FFFF]
    assert settled([clip("a", *a), clip("b", *near)]) == [None, "a"]
    assert settled([clip("a", *a), clip("b", *far)]) == [None, None]


def test_the_larger_then_the_longer_then_the_first_name_is_kept() -> None:
    h = 0x0123_4567_89AB_CDEF
    small = clip("a", h, h, h, width_px=320)
    large = clip("b", h, h, h, width_px=1280, height_px=720)
    long = clip("c", h, h, h, width_px=1280, height_px=720, duration_s=5.5)
    longer = clip("d", h, h, h, width_px=1280, height_px=720, duration_s=5.5, num_frames=240)
    assert settled([small, large]) == ["b", None]
    assert settled([small, large, long]) == ["c", "c", None]
    assert settled([small, large, long, longer]) == ["d", "d", "d", None]
    assert settled([small | {"clip_id": "z"}, small]) == ["a", None]


def test_media_and_lengths_that_differ_are_different() -> None:
    h = 0x0123_4567_89AB_CDEF
    image = {"media": "image", "duration_s": None, "num_frames": None}
    assert settled([clip("a", h), clip("b", h, **image)]) == [None, None]
    assert settled([clip("a", h, **image), clip("b", h, **image)]) == [None, "a"]
    assert settled([clip("a", h, h), clip("b", h, h, duration_s=4.0)]) == [None, "a"]
    assert settled([clip("a", h, h), clip("b", h, h, duration_s=3.9)]) == [None, None]
    assert settled([clip("a", h, media=None), clip("b", h)]) == [None, "a"]


def test_flat_pictures_make_no_duplicates() -> None:
    h = 0x0123_4567_89AB_CDEF
    other = 0xFEDC_BA98_7654_3210
    assert settled([clip("a", 0, 0, 0), clip("b", 0, 0, 0)]) == [None, None]
    assert settled([clip("a", 0, 0, h), clip("b", 0, 0, h)]) == [None, None]
    assert settled([clip("a", 0, h, h), clip("b", 0, h, h)]) == [None, "a"]
    assert settled([clip("a", 0, h, h), clip("b", other, h, h)]) == [None, "a"]
    assert settled([clip("a", 0, h, h), clip("b", 0, other, other)]) == [None, None]


def test_what_was_not_measured_is_kept() -> None:
    rows = [clip("a"), clip("b"), {"clip_id": "c", "phashes": None}]
    assert settled(rows) == [None, None, None]
    assert settled([]) == []
    assert settled(rows, Distinct(phash_bits=None)) == [None, None, None]


def cards(num: int, spread: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    hashes = [flipped(0x0123_4567_89AB_CDEF, spread, rng) for _ in range(3 * num)]
    return [clip(f"{i:05}", *hashes[3 * i : 3 * i + 3]) for i in range(num)]


@pytest.mark.parametrize("spread", [0, 2])
def test_of_thousands_of_title_cards_one_stays(spread: int) -> None:
    alone = clip("other", 0xFEDC_BA98_7654_3210, 0xFEDC_BA98_7654_3211, 0xFEDC_BA98_7654_3212)
    assert settled([*cards(6000, spread), alone]) == [None, *["00000"] * 5999, None]


def test_a_crowd_takes_little_memory() -> None:
    clips = table(cards(4000, spread=2))
    tracemalloc.start()
    settle(clips, Distinct())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6  # all pairs at once take 1.7 GB


def vectors(num: int, cosine: float, seed: int = 0) -> list[dict[str, Any]]:
    """`num` random directions, and of each another one at `cosine`."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, num, 64))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y -= (x * y).sum(1, keepdims=True) * x
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    both = np.concatenate([x, cosine * x + math.sqrt(1 - cosine**2) * y])
    both *= rng.uniform(0.5, 2, (2 * num, 1))  # lengths do not count
    return [clip(f"{i:05}", clip_embedding=v) for i, v in enumerate(both.astype("f4"))]


def test_by_embedding() -> None:
    distinct = Distinct(phash_bits=None, cosine=0.95)
    near = settled(vectors(1000, 0.97), distinct, width=64)
    assert near[:1000] == [None] * 1000
    hits = sum(of == f"{i:05}" for i, of in enumerate(near[1000:]))
    assert hits == sum(of is not None for of in near)
    assert hits > 990
    at_bound = settled(vectors(1000, 0.9501), distinct, width=64)
    assert sum(of is not None for of in at_bound) > 970
    assert settled(vectors(1000, 0.9499), distinct, width=64) == [None] * 2000
    missing = vectors(3, 1.0)
    missing[4]["clip_embedding"] = None
    missing[5]["clip_embedding"] = np.zeros(64, "f4")
    assert settled(missing, distinct, width=64) == [None, None, None, "00000", None, None]


def test_by_embedding_it_is_what_comparing_all_pairs_gives() -> None:
    rng = np.random.default_rng(3)
    centres = rng.standard_normal((30, 64))
    rows = crowd(300, seed=5)
    for row in rows:
        row["clip_embedding"] = (
            centres[rng.integers(30)] + rng.uniform(0.02, 0.25) * rng.standard_normal(64)
        ).astype("f4")
    for distinct in (Distinct(phash_bits=None, cosine=0.97), Distinct(cosine=0.97)):
        found = settled(rows, distinct, width=64)
        assert found == expected(rows, distinct)
        kept = [row for row, of in zip(rows, found, strict=True) if of is None]
        assert settled(kept, distinct, width=64) == [None] * len(kept)
        mixed = [rows[i] for i in rng.permutation(len(rows))]
        again = dict(
            zip((r["clip_id"] for r in mixed), settled(mixed, distinct, width=64), strict=True)
        )
        assert [again[r["clip_id"]] for r in rows] == found


@pytest.mark.parametrize("cosine", [0.5, 0.9, 0.95, 0.97, 0.99, 1.0])
def test_bands_miss_at_most_one_in_a_hundred(cosine: float) -> None:
    planes = Hyperplanes(cosine, 64)
    agree = (1 - math.acos(cosine) / math.pi) ** planes.bits_each
    assert (1 - agree) ** planes.num_bands <= 0.0101


def test_what_a_policy_reads_and_refuses() -> None:
    assert "clip_embedding" not in Distinct().columns
    assert {"phashes", "clip_embedding"} <= set(Distinct(cosine=0.9).columns)
    assert "phashes" not in Distinct(phash_bits=None).columns
    assert dataclasses.asdict(Distinct())["phash_bits"] == 6
    for wrong in ({"phash_bits": 40}, {"cosine": 1.5}, {"overlap": 0.2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Distinct(**wrong)
    needed = table(crowd(20, 1)).select(Distinct().columns)
    assert len(settle(needed, Distinct())) == 20


# Videos encoded again.


def encoded_again(source: Path, target: Path, width: int, height: int, crf: int) -> None:
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        old = reader.streams.video[0]
        new = writer.add_stream("libx264", rate=old.average_rate)
        new.width, new.height, new.pix_fmt = width, height, "yuv420p"
        new.options = {"crf": str(crf), "preset": "veryfast"}
        for index, frame in enumerate(reader.decode(old)):
            frame = frame.reformat(width, height, "yuv420p")
            frame.pts, frame.time_base = index, 1 / old.average_rate
            writer.mux(new.encode(frame))
        writer.mux(new.encode())


NAMES = ("coffee_pan", "astronaut_zoom", "cuts", "shapes", "subtitled", "square", "two_to_one")


def test_videos_encoded_again_point_to_the_larger_one(samples: Path, tmp_path: Path) -> None:
    rows = []
    for name in NAMES:
        source, small = samples / f"{name}.mp4", tmp_path / f"{name}.mp4"
        with av.open(str(source)) as reader:
            shown = reader.streams.video[0]
            size = shown.width * 2 // 3 // 2 * 2, shown.height * 2 // 3 // 2 * 2
        encoded_again(source, small, *size, crf=33)
        # The same spans: of another encoding, the shots may be others.
        spans = [(row["start_s"], row["end_s"]) for row in clips_of(source, name)]
        for path, copy in ((source, "large"), (small, "small")):
            rows += clips_of(path, f"{name}/{copy}", spans)
    found = settled(rows)
    for row, of in zip(rows, found, strict=True):
        name, copy, index = row["clip_id"].split("/")
        assert of == (f"{name}/large/{index}" if copy == "small" else None), row["clip_id"]


def clips_of(path: Path, name: str, spans: Sequence[tuple[float, float]] = ()) -> list[dict]:
    _, clips, found = scan_source(str(path), Scan(signals=()), spans)
    keyframes: list[list[dict]] = [[] for _ in range(len(clips))]
    for k in found.to_pylist():
        keyframes[k["clip"]].append({"time_s": k["time_s"], "jpeg": k["jpeg"]})
    hashed = PerceptualHash().load()(pa.table({"keyframes": keyframes})).to_pylist()
    facts = ("start_s", "end_s", "duration_s", "width_px", "height_px", "num_frames")
    return [
        {"clip_id": f"{name}/{i}", "phashes": h["phashes"]} | {fact: c[fact] for fact in facts}
        for i, (c, h) in enumerate(zip(clips.to_pylist(), hashed, strict=True))
    ]
