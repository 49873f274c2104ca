"""One source, or one part of a long one, from file to rows: on real small files."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import lance
import pyarrow as pa
import pytest
from clips import encode, shots_of

from engine import storage
from engine.sandbox import Sandbox
from engine.scan import Scan, plan_segments
from engine.schema import CLIPS, KEYFRAMES
from engine.sources import Source, Span
from engine.tables import create, table_uri
from engine.worker import (
    Job,
    Outcome,
    Reader,
    Unit,
    beside_of,
    clip_id,
    request_of,
    source_id,
    with_captions,
)
from pipelines.recipes import CLASSIC

FPS = 25
LENGTHS = (130, 260, 90, 70, 200, 150, 180)  # frames of the shots of the long source: 43.2 s
PARTS = Scan(segment_s=3.5)  # of a picture so small a part is twice as long: 7 s
WHOLE = Scan()


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A file that is scanned in parts: H.264 with a key frame a second."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    options = {"g": str(FPS), "sc_threshold": "0", "bf": "2", "crf": "28", "preset": "veryfast"}
    encode(path, shots_of(LENGTHS), fps=FPS, options=options)
    return source_of(path, caption="a long one")


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A file of three shots, 80 frames each."""
    path = tmp_path_factory.mktemp("short") / "it's short.mp4"
    return source_of(encode(path, shots_of([80, 80, 80]), fps=FPS), caption="a short one")


def source_of(path: Path, **more: object) -> Source:
    found = storage.stat(str(path))
    return Source(str(path), found.size_bytes, found.mtime_ns, found.etag, **more)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return job_in(tmp_path / "set")


def job_in(root: Path, scan: Scan = PARTS, **more: object) -> Job:
    create(str(root), "classic")
    return Job(root=str(root), run_id="run", scan=scan, stages=CLASSIC.stages, **more)


@pytest.fixture
def reader_of() -> Iterator[Callable[[Job], Reader]]:
    """Makes readers, and ends their children afterwards."""
    made: list[Reader] = []

    def make(job: Job) -> Reader:
        made.append(Reader(job))
        return made[-1]

    yield make
    for reader in made:
        reader.sandbox.close()


def parts_of(reader: Reader, source: Source) -> list[Unit]:
    """The units that a long source calls for."""
    found = reader.do(Unit(source=source))
    assert found.source_row is None and not found.frames_decoded
    return [
        Unit(source=source, sha256=found.sha256, parts=found.parts, part=i)
        for i in range(len(found.parts))
    ]


def frames_of(root: str, outcome: Outcome) -> pa.Table:
    """The keyframes that an outcome brings, as they are when they are committed."""
    uri = table_uri(root, "keyframes")
    at = lance.dataset(uri)
    done = lance.LanceDataset.commit(
        uri, lance.LanceOperation.Append(list(outcome.keyframes)), read_version=at.version
    )
    rows = done.to_table(columns=[f.name for f in KEYFRAMES if f.name != "jpeg"])
    blobs = done.take_blobs("jpeg", indices=list(range(rows.num_rows)))
    return rows.append_column("jpeg", pa.array([blob.read() for blob in blobs], pa.binary()))


def decided(row: dict | None) -> dict:
    """A row of `sources` without what depends on the run and the scan's parts."""
    assert row is not None
    return {n: v for n, v in row.items() if n not in ("fingerprint", "frames_decoded", "run_id")}


def test_a_source_becomes_its_row_its_clips_and_their_keyframes(
    short: Source, job: Job, reader_of
) -> None:
    found = reader_of(job).do(Unit(source=short))
    row = found.source_row
    assert row is not None
    assert row["state"] == "done" and row["scanned"] and not row["transient"]
    assert row["sha256"] == found.sha256 == storage.sha256(short.uri)
    assert (row["uri"], row["source_id"]) == (short.uri, source_id(short.uri))
    assert (row["size_bytes"], row["mtime_ns"]) == (short.size_bytes, short.mtime_ns)
    assert (row["request"], row["beside"]) == (request_of(short), beside_of(short))
    assert (row["width_px"], row["height_px"], row["codec"]) == (160, 90, "h264")
    assert (row["num_clips"], row["num_frames"]) == (3, 240)
    assert row["frames_decoded"] == found.frames_decoded == 240
    assert row["fingerprint"] == PARTS.fingerprint and row["run_id"] == "run"
    clips = found.clips
    assert clips.schema.equals(CLIPS)
    assert clips["start_frame"].to_pylist() == [0, 80, 160]
    assert set(clips["state"].to_pylist()) == {"pending"}
    assert set(clips["caption_original"].to_pylist()) == {"a short one"}
    assert clips["clip_id"].to_pylist() == [
        clip_id(found.sha256, c["start_s"], c["end_s"]) for c in clips.to_pylist()
    ]
    frames = frames_of(job.root, found)
    assert set(frames["clip_id"].to_pylist()) == set(clips["clip_id"].to_pylist())
    assert set(frames["source_id"].to_pylist()) == {row["source_id"]}
    assert all(jpeg[:3] == b"\xff\xd8\xff" for jpeg in frames["jpeg"].to_pylist())


def test_only_the_hash_is_given_where_only_that_is_asked(
    short: Source, job: Job, reader_of
) -> None:
    found = reader_of(job).do(Unit(source=short, hash_only=True))
    assert found.sha256 == storage.sha256(short.uri)
    assert found.source_row is None and not found.parts and not found.frames_decoded


@pytest.mark.parametrize("order", ["forwards", "backwards"])
def test_a_long_source_in_parts_gives_the_rows_of_the_whole_bit_for_bit(
    order: str, long: Source, job: Job, tmp_path: Path, reader_of
) -> None:
    one = job_in(tmp_path / "one", WHOLE)
    whole = reader_of(one).do(Unit(source=long))
    assert not whole.parts and whole.source_row is not None
    reader = reader_of(job)
    units = parts_of(reader, long)
    assert len(units) >= 4
    found = [reader.do(u) for u in (units if order == "forwards" else units[::-1])]
    assert [f.source_row is not None for f in found] == [False] * (len(units) - 1) + [True]
    joined = found[-1]
    assert joined.clips.equals(whole.clips)
    assert joined.clips["start_frame"].to_pylist() == [0, *itertools.accumulate(LENGTHS[:-1])]
    assert frames_of(job.root, joined).equals(frames_of(one.root, whole))
    assert decided(joined.source_row) == decided(whole.source_row)
    assert joined.source_row is not None
    assert joined.source_row["frames_decoded"] == sum(f.frames_decoded for f in found)
    assert sum(LENGTHS) <= joined.source_row["frames_decoded"] < 1.2 * sum(LENGTHS)


def test_a_parked_part_is_not_decoded_again(long: Source, job: Job, reader_of) -> None:
    reader = reader_of(job)
    units = parts_of(reader, long)
    first = reader.do(units[1])
    assert first.frames_decoded > 0
    again = reader_of(dataclasses.replace(job, run_id="next")).do(units[1])
    assert (again.frames_decoded, again.source_row) == (0, None)


def test_when_all_are_parked_and_the_join_was_lost_the_first_part_joins(
    long: Source, job: Job, reader_of
) -> None:
    reader = reader_of(job)
    units = parts_of(reader, long)
    lost = [reader.do(unit) for unit in units][-1]
    again = [reader.do(dataclasses.replace(unit, died=1)) for unit in units]
    assert [f.source_row is not None for f in again] == [True] + [False] * (len(units) - 1)
    assert again[0].clips.equals(lost.clips)
    assert again[0].source_row == lost.source_row
    assert all(f.frames_decoded == 0 for f in again)


def test_parts_of_another_scan_or_of_other_spans_are_not_taken_for_these(
    long: Source, job: Job, reader_of
) -> None:
    reader = reader_of(job)
    unit = parts_of(reader, long)[0]
    reader.do(unit)
    spans = dataclasses.replace(unit, source=dataclasses.replace(long, spans=(Span(1.0, 9.0),)))
    assert reader.do(spans).frames_decoded > 0
    detector = dataclasses.replace(job, scan=dataclasses.replace(PARTS, shots="content"))
    assert reader_of(detector).do(unit).frames_decoded > 0


def test_a_part_that_is_damaged_fails_its_source(long: Source, job: Job, reader_of) -> None:
    reader = reader_of(job)
    unit = parts_of(reader, long)[1]
    start = unit.parts[1].start_pts
    assert start is not None
    shifted = dataclasses.replace(unit.parts[1], start_pts=start + 1)
    parts = (unit.parts[0], shifted, *unit.parts[2:])
    row = reader.do(dataclasses.replace(unit, parts=parts)).source_row
    assert row is not None
    assert (row["state"], row["transient"], row["sha256"]) == ("failed", False, unit.sha256)


def test_parts_depend_on_the_file_and_the_length_alone(long: Source) -> None:
    first = plan_segments(long.uri, PARTS)
    assert first == plan_segments(long.uri, dataclasses.replace(PARTS, shots="none"))
    assert len(plan_segments(long.uri, WHOLE)) == 1 < len(first)
    assert [p.stop_pts for p in first[:-1]] == [p.start_pts for p in first[1:]]


def test_spans_asked_for_are_the_clips_each_with_its_own_caption(
    short: Source, job: Job, reader_of
) -> None:
    spans = (
        Span(0.5, 2.5, caption="one"),
        Span(1.0, 4.0, extra='{"licence": "CC0"}'),
        Span(99.0, 100.0, caption="outside"),
    )
    source = dataclasses.replace(short, spans=spans, extra='{"author": "me"}')
    found = reader_of(job).do(Unit(source=source))
    rows = found.clips.to_pylist()
    assert [(r["caption_original"], r["extra"]) for r in rows] == [
        ("one", '{"author": "me"}'),
        ("a short one", '{"licence": "CC0"}'),
        ("outside", '{"author": "me"}'),
    ]
    assert [r["clip_id"] for r in rows] == [
        clip_id(storage.sha256(short.uri), s.start_s, s.end_s) for s in spans
    ]
    assert [r["error_type"] for r in rows] == [None, None, "SpanOutside"]
    assert found.source_row is not None and found.source_row["num_clips"] == 3


def test_captions_find_their_clips_in_whatever_order_these_are_stored(
    short: Source, job: Job, reader_of
) -> None:
    spans = (Span(0.999, 3.0, caption="long"), Span(1.0, 2.0, caption="brief"))  # from one frame
    source = dataclasses.replace(short, spans=spans)
    found = reader_of(job).do(Unit(source=source))
    assert found.sha256 is not None
    stored = found.clips.take([1, 0])
    changed = [dataclasses.replace(s, caption=f"so {s.caption}") for s in spans]
    renewed = with_captions(stored, dataclasses.replace(source, spans=changed), found.sha256)
    assert renewed["caption_original"].to_pylist() == ["so brief", "so long"]
    assert not with_captions(CLIPS.empty_table(), source, "").num_rows


def test_what_its_container_rejects_is_one_clip_that_spans_it_and_is_not_decoded(
    tmp_path: Path, job: Job, reader_of
) -> None:
    source = source_of(encode(tmp_path / "brief.mp4", shots_of([30]), fps=FPS), caption="brief")
    found = reader_of(job).do(Unit(source=source))
    (clip,) = found.clips.to_pylist()
    assert (clip["start_s"], clip["num_frames"], clip["brightness"]) == (0.0, 30, None)
    assert clip["end_s"] == pytest.approx(30 / FPS)
    assert clip["caption_original"] == "brief"
    assert found.source_row is not None
    assert (found.source_row["state"], found.source_row["scanned"]) == ("done", False)
    assert found.frames_decoded == 0 and not found.keyframes
    everything = dataclasses.replace(job, measure_all=True)
    measured = reader_of(everything).do(Unit(source=source))
    assert measured.frames_decoded == 30 and measured.source_row["scanned"]
    asked = dataclasses.replace(source, spans=(Span(0.0, 1.0),))
    assert reader_of(job).do(Unit(source=asked)).frames_decoded == 30


def test_what_is_no_video_is_a_final_failure(tmp_path: Path, job: Job, reader_of) -> None:
    (tmp_path / "text.mp4").write_text("not a video, but it says so\n" * 99)
    row = reader_of(job).do(Unit(source=source_of(tmp_path / "text.mp4"))).source_row
    assert row is not None
    assert (row["state"], row["transient"], row["num_clips"]) == ("failed", False, 0)
    assert row["error"] and "\n" not in row["error"]


def test_what_is_gone_or_cannot_be_looked_at_is_a_failure_that_may_pass(
    short: Source, tmp_path: Path, job: Job, reader_of
) -> None:
    reader = reader_of(job)
    gone = dataclasses.replace(short, uri=str(tmp_path / "gone.mp4"))
    for source in (gone, Source(uri="/nowhere", error="no such file")):
        row = reader.do(Unit(source=source)).source_row
        assert row is not None
        assert (row["state"], row["transient"]) == ("failed", True)
    assert reader.do(Unit(source=short)).source_row["state"] == "done"


def test_what_takes_too_long_is_a_failure_and_the_next_one_works(
    short: Source, long: Source, tmp_path: Path, reader_of
) -> None:
    reader = reader_of(job_in(tmp_path / "set", WHOLE))
    reader.do(Unit(source=short))  # the child is up
    reader.sandbox.time_limit_s = 0.05
    row = reader.do(Unit(source=long)).source_row
    assert row is not None and (row["error_type"], row["transient"]) == ("TimeLimit", False)
    reader.sandbox.time_limit_s = 60
    assert reader.do(Unit(source=short)).source_row["state"] == "done"


def test_a_child_that_dies_twice_is_a_failure_and_the_next_one_works(
    short: Source, job: Job, reader_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = reader_of(job)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    limits = {"time_limit_s": 60, "memory_limit_bytes": 2**31}
    healthy, reader.sandbox = reader.sandbox, Sandbox("sandboxed:die", **limits)
    row = reader.do(Unit(source=short)).source_row
    assert row is not None
    assert (row["state"], row["error_type"]) == ("failed", "WorkerDied")
    assert "SIGSEGV" in row["error"]
    reader.sandbox = healthy
    assert reader.do(Unit(source=short)).source_row["state"] == "done"


def test_a_dataset_that_cannot_be_written_is_no_fault_of_the_source(
    short: Source, tmp_path: Path, reader_of
) -> None:
    job = job_in(tmp_path / "set")
    data = tmp_path / "set" / "keyframes.lance" / "data"
    data.parent.mkdir(exist_ok=True)
    if data.exists():
        data.rmdir()
    data.write_text("a file where a folder must be")
    found = reader_of(job).do(Unit(source=short))
    assert found.unwritable and found.source_row is None


def test_names_with_quotes_and_bytes_that_are_no_text_are_read(
    short: Source, tmp_path: Path, job: Job, reader_of
) -> None:
    name = os.path.join(os.fsencode(tmp_path), b'it\'s \xff "so".mp4')
    Path(os.fsdecode(name)).write_bytes(Path(short.uri).read_bytes())
    uri = storage.local_uri(os.fsdecode(name))
    found = reader_of(job).do(Unit(source=dataclasses.replace(short, uri=uri)))
    assert found.source_row is not None and found.source_row["state"] == "done"
    assert set(found.clips["source_uri"].to_pylist()) == {uri}
