"""Forgetting: no byte of a source is left below the dataset, and everything else is."""

from __future__ import annotations

import json
import secrets
import subprocess
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from conftest import Bucket, Ran, command

from engine import storage
from engine.accounts import balance
from engine.cutter import SCRATCH
from engine.forget import NOTE, begun, choose, forget
from engine.operator import Rule, Stage
from engine.schema import TABLES
from engine.tables import DatasetError, FencedTable, Writer, create, read, table_uri, write_rows
from engine.worker import PARTS, source_id

STAGES = (Stage(name="quality", rules=(Rule(column="brightness", lo=0.2),)),)


@dataclass
class Source:
    """A source with content that is found nowhere else."""

    uri: str
    sha256: str = field(default_factory=lambda: secrets.token_hex(32))
    content: bytes = field(default_factory=lambda: secrets.token_bytes(60_000))
    caption: str = field(default_factory=lambda: f"A {secrets.token_hex(20)} walks.")
    copy_of: Source | None = None

    @property
    def id(self) -> str:
        return source_id(self.uri)

    @property
    def clip_ids(self) -> list[str]:
        return [str(uuid.uuid5(uuid.NAMESPACE_URL, f"{self.sha256}{i}")) for i in range(2)]


def rows(name: str, given: list[dict[str, Any]]) -> pa.Table:
    """Rows of a table; bytes in a blob column."""
    columns = []
    for column in TABLES[name]:
        values = [row.get(column.name) for row in given]
        is_blob = isinstance(column.type, pa.ExtensionType)
        columns.append(lance.blob_array(values) if is_blob else pa.array(values, column.type))
    return pa.table(columns, schema=TABLES[name])


def source_row(source: Source) -> dict[str, Any]:
    row = {"source_id": source.id, "uri": source.uri, "sha256": source.sha256, "state": "done"}
    row |= {"num_clips": 2, "caption": source.caption}
    if source.copy_of:
        row |= {"state": "duplicate", "num_clips": 0, "duplicate_of": source.copy_of.id}
    return row


def clip_rows(source: Source) -> list[dict[str, Any]]:
    return [
        {
            "clip_id": clip_id,
            "source_id": source.id,
            "source_uri": source.uri,
            "brightness": 0.5,
            "caption": source.caption,
            "state": "pending",
            "kept": False,
        }
        for clip_id in source.clip_ids
    ]


def add(writer: Writer, *sources: Source, **more: Any) -> None:
    """Commits sources as a run does, with all that can be made of them."""
    real = [s for s in sources if not s.copy_of]
    frames = [
        {"clip_id": c, "source_id": s.id, "frame": i, "jpeg": s.content + bytes([i])}
        for s in real
        for c in s.clip_ids
        for i in range(3)
    ]
    writer.commit(
        sources=rows("sources", [source_row(s) for s in sources]),
        clips=rows("clips", [row for s in real for row in clip_rows(s)]),
        keyframes=write_rows(writer.root, "keyframes", rows("keyframes", frames)),
        **more,
    )
    given = [
        {"pair_id": f"pair-{c}", "clip_id": c, "source_id": s.id, "rephrased": s.caption}
        for s in real
        for c in s.clip_ids
    ]
    writer.append("pairs", rows("pairs", given))
    cuts = []
    for source in real:
        first, second = source.clip_ids
        path = f"cuts/{first[:2]}/{first}.mp4"
        storage.make_folder(storage.parent(storage.join(writer.root, path)))
        storage.write_bytes(storage.join(writer.root, path), source.content + b"file")
        cuts.append({"clip_id": first, "source_id": source.id, "path": path})
        cuts.append({"clip_id": second, "source_id": source.id, "mp4": source.content + b"blob"})
    writer.append("cuts", rows("cuts", cuts))


def leave_rubbish(root: str, source: Source) -> None:
    """What killed workers leave: parked parts, files that no row names, fragments uncommitted."""
    part = storage.join(root, PARTS, source.sha256[:32] + "-x-y", "000000.arrow")
    for uri in (
        part,
        storage.join(root, "cuts", "00", "orphan.mp4"),
        storage.join(root, "cuts", f"{SCRATCH}abc", "half.mp4"),
    ):
        storage.make_folder(storage.parent(uri))
        storage.write_bytes(uri, source.content)
    frame = {"clip_id": source.clip_ids[0], "source_id": source.id, "jpeg": source.content}
    write_rows(root, "keyframes", rows("keyframes", [frame]))


def add_later_table(root: str, *sources: Source) -> None:
    """A table that this program does not know."""
    table = pa.table(
        {
            "clip_id": [s.clip_ids[0] for s in sources],
            "latent": [s.content for s in sources],
        }
    )
    lance.write_dataset(table, table_uri(root, "latents"), data_storage_version="2.2")


@dataclass
class World:
    """A dataset of three sources: one to forget, a copy of it elsewhere, and one to keep."""

    root: str
    secret: Source
    copy: Source
    other: Source

    def writer(self) -> Writer:
        return Writer(self.root, "again")

    def chosen(self, *names: str) -> Any:
        return choose(read(self.root, "sources").to_table(), names, begun(self.root))

    def holding(self, source: Source) -> list[str]:
        """Files below the dataset in which something of the source can be read."""
        told = (source.content[:64], source.caption.encode(), source.uri.encode())
        files = [p for p in Path(self.root).rglob("*") if p.is_file()]
        return sorted(str(p) for p in files if any(t in p.read_bytes() for t in told))


@pytest.fixture
def world(tmp_path: Path) -> World:
    root = str(tmp_path / "set")
    create(root, "classic")
    secret, other = (Source(f"/videos/{secrets.token_hex(12)}.mp4") for _ in range(2))
    copy = Source(f"/copies/{secrets.token_hex(12)}.mp4", sha256=secret.sha256, copy_of=secret)
    world = World(root, secret, copy, other)
    writer = world.writer()
    # One fragment holds the rows of both; some rows are hidden by a run that read a file again.
    add(writer, secret, other, copy)
    ids = [secret.id, other.id, copy.id]
    writer.remove("pairs", "source_id", ids)
    writer.remove("cuts", "source_id", ids)
    add(writer, secret, other, copy, replaces=ids)
    writer.publish(STAGES)
    add_later_table(root, secret, other)
    for number, src in enumerate(([secret.uri, "/videos"], [other.uri])):
        writer.add_run({"run_id": str(number), "src": json.dumps(src), "recipe": "classic"})
    leave_rubbish(root, secret)
    return world


def test_no_byte_of_a_forgotten_source_is_left_and_every_other_row_is(world: World) -> None:
    held = world.holding(world.secret)
    for where in ("keyframes", "cuts.lance", "cuts/", "parts", "latents", "runs", "orphan"):
        assert any(where in path for path in held), f"the test looks in vain: {where}"
    done = forget(world.writer(), world.chosen(world.secret.uri))
    assert world.holding(world.secret) == []
    assert world.holding(world.copy) == []
    assert done.rows == {
        "clips": 2, "keyframes": 6, "pairs": 2, "cuts": 2, "latents": 1, "sources": 2,
    }  # fmt: skip
    assert done.chosen.same_content == (world.copy.uri,)
    other = world.other
    for name, num in {"sources": 1, "clips": 2, "keyframes": 6, "pairs": 2, "cuts": 2}.items():
        found = read(world.root, name).to_table()
        assert found["source_id"].to_pylist() == [other.id] * num
    blobs = read(world.root, "keyframes").take_blobs("jpeg", indices=list(range(6)))
    assert sorted(b.read() for b in blobs) == sorted(
        2 * [other.content + bytes([i]) for i in range(3)]
    )
    (path,) = read(world.root, "cuts").to_table()["path"].drop_null().to_pylist()
    assert (Path(world.root) / path).read_bytes() == other.content + b"file"
    src = {
        r["run_id"]: json.loads(r["src"]) for r in read(world.root, "runs").to_table().to_pylist()
    }
    assert src == {"0": ["(forgotten)", "/videos"], "1": [other.uri]}
    assert balance(lambda name: read(world.root, name), None).faults == ()


def test_no_older_version_can_be_read_and_no_file_belongs_to_none(world: World) -> None:
    forget(world.writer(), world.chosen(world.secret.id))
    for folder in Path(world.root).glob("*.lance"):
        table = lance.dataset(str(folder))
        assert len(table.versions()) == 1
        with pytest.raises(ValueError, match=r"was not found|Not found|does not exist"):
            lance.dataset(str(folder), version=table.version - 1)
        metadata = [f.metadata for f in table.get_fragments()]
        assert [m.deletion_file for m in metadata] == [None] * len(metadata)
        # Whatever the encoding of values: the files are those of the rows that are left.
        named = {Path(f.path).stem for m in metadata for f in m.files}
        there = {p.relative_to(folder / "data").parts[0] for p in (folder / "data").rglob("*")}
        assert {Path(name).stem for name in there} == named
    assert not (Path(world.root) / NOTE).exists()


def test_a_run_goes_on_with_what_is_left(world: World) -> None:
    forget(world.writer(), world.chosen(world.secret.uri))
    writer = world.writer()
    assert writer.publish((Stage(name="q", rules=(Rule(column="brightness", lo=0.9),)),)) == 2
    add(writer, Source("/videos/new.mp4"))
    assert writer.table("sources").count_rows() == 2


class Killed(BaseException):
    """As if the process had ended here."""


@pytest.mark.parametrize("last", range(0, 19, 3))
def test_killed_anywhere_the_same_command_finishes_the_work(
    world: World, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    calls = {"num": 0}

    def dying(function: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            if calls["num"] == last:
                raise Killed
            calls["num"] += 1
            return function(*args, **more)

        return call

    writer, chosen = world.writer(), world.chosen(world.secret.uri)
    with monkeypatch.context() as patch:
        patch.setattr(FencedTable, "commit", dying(FencedTable.commit))
        patch.setattr(storage, "delete", dying(storage.delete))
        patch.setattr(storage, "delete_folder", dying(storage.delete_folder))
        patch.setattr(lance.LanceDataset, "cleanup_old_versions",
                      dying(lance.LanceDataset.cleanup_old_versions))  # fmt: skip
        with pytest.raises(Killed):
            forget(writer, chosen)
    again = world.writer()  # takes back what is not whole
    forget(again, world.chosen(world.secret.uri))
    assert world.holding(world.secret) == []
    assert balance(again.table, None).faults == ()
    assert again.table("clips").count_rows() == 2
    with pytest.raises(ValueError, match="no source of this dataset"):
        world.chosen(world.secret.uri)


def test_a_tag_that_keeps_an_old_version_is_named_before_anything_is_changed(world: World) -> None:
    table = read(world.root, "clips")
    table.tags.create("release-1", table.version)
    with pytest.raises(DatasetError, match=r"clips:release-1.*tags\.delete"):
        forget(world.writer(), world.chosen(world.secret.uri))
    assert read(world.root, "sources").count_rows() == 3
    assert not begun(world.root)


def test_a_near_duplicate_of_what_went_is_to_be_judged_again(tmp_path: Path) -> None:
    root = str(tmp_path / "set")
    create(root, "classic")
    writer = Writer(root, "r")
    gone, near = Source("/a.mp4"), Source("/b.mp4")
    add(writer, gone, near)
    change = {"clip_id": near.clip_ids[0], "state": "duplicate", "duplicate_of": gone.clip_ids[0]}
    writer.publish(STAGES)
    writer.amend("clips", [pa.Table.from_pylist([change])])
    sources = read(root, "sources").to_table()
    done = forget(Writer(root, "r"), choose(sources, [gone.uri]))
    assert done.pending == 1
    left = {r["clip_id"]: r for r in read(root, "clips").to_table().to_pylist()}
    first, second = (left[c] for c in near.clip_ids)
    assert (first["state"], first["kept"], first["duplicate_of"]) == ("pending", False, None)
    assert second["state"] == "kept"
    Writer(root, "r").publish(STAGES)
    assert set(read(root, "clips").to_table()["state"].to_pylist()) == {"kept"}


# Names


def some_sources(*uris: str, sha256: str | None = None) -> pa.Table:
    ids = [source_id(u) for u in uris]
    hashes = pa.array([sha256] * len(uris), pa.string())
    return pa.table({"source_id": ids, "uri": list(uris), "sha256": hashes})


def test_sources_are_named_by_path_uri_glob_or_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    uris = ("/v/a.mp4", "/v/b.mp4", "/v/deep/c.mp4", "s3://bucket/d.mp4", "/v/e[1].mp4")
    sources = some_sources(*uris)
    for name, meant in {
        "/v/a.mp4": {0},
        "v/a.mp4": {0},
        source_id("/v/b.mp4"): {1},
        "/v/?.mp4": {0, 1},
        "/v/deep/*": {2},
        "/v/**/*.mp4": {0, 1, 2, 4},
        "s3://bucket/*": {3},
        "/v/e[1].mp4": {4},
    }.items():
        assert choose(sources, [name]).uris == tuple(sorted(uris[i] for i in meant)), name


def test_a_name_that_means_nothing_is_an_error_and_a_folder_says_how_to_mean_all() -> None:
    sources = some_sources("/v/a.mp4", "/v/b.mp4")
    with pytest.raises(ValueError, match="no source of this dataset has this name"):
        choose(sources, ["/v/a.mp4", "/v/c.mp4"])
    with pytest.raises(ValueError, match=r"folder with 2 source\(s\).*'/v/\*\*'"):
        choose(sources, ["/v/"])


def test_sources_without_a_known_content_are_not_taken_for_the_same() -> None:
    sources = some_sources("/v/a.mp4", "/v/b.mp4", sha256=None)
    assert choose(sources, ["/v/a.mp4"]).uris == ("/v/a.mp4",)
    sources = some_sources("/v/a.mp4", "/v/b.mp4", sha256="x")
    assert choose(sources, ["/v/a.mp4"]).same_content == ("/v/b.mp4",)


# The command


def run(*arguments: object) -> Ran:
    """The command, which needs no cluster."""
    done = subprocess.run(command("forget", *arguments), capture_output=True, text=True, timeout=99)
    return Ran(done.returncode, done.stdout, done.stderr)


def test_the_command_forgets_and_says_what_it_did(world: World) -> None:
    shown = run(world.secret.uri, "--dst", world.root, "--dry-run", "--json")
    assert shown.code == 0, shown.err
    assert sorted(shown.json["sources"]) == sorted([world.secret.uri, world.copy.uri])
    assert len(world.holding(world.secret)) > 5
    done = run(world.secret.uri, "--dst", world.root, "--json")
    assert done.code == 0, done.err
    assert done.json["rows"]["clips"] == 2
    assert done.json["left"]["sources"]["total"] == 1
    assert done.json["still_there"] == []
    assert world.holding(world.secret) == []
    again = run(world.secret.uri, "--dst", world.root)
    assert again.code == 2
    assert again.err.startswith("error: ") and again.err.count("\n") == 1


def test_a_file_that_is_still_there_is_warned_of(tmp_path: Path) -> None:
    root, file = str(tmp_path / "set"), tmp_path / "a.mp4"
    file.write_bytes(b"x")
    create(root, "classic")
    add(Writer(root, "r"), Source(str(file)))
    done = run(file, "--dst", root)
    assert done.code == 0
    assert f"warning: {file} is still there" in done.err
    assert "not covered: other datasets" in done.out


def test_without_a_dataset_or_sources_the_command_says_so(tmp_path: Path) -> None:
    for arguments in (("/a.mp4", "--dst", tmp_path / "none"), ("--dst", tmp_path)):
        ended = run(*arguments)
        assert ended.code == 2
        assert ended.err.startswith("error: ") and ended.err.count("\n") == 1


@pytest.mark.slow
def test_forgetting_in_a_store(bucket: Bucket) -> None:
    root = f"{bucket.uri}/set"
    create(root, "classic")
    writer = Writer(root, "r")
    gone, other = Source("s3://reel/a.mp4"), Source("s3://reel/b.mp4")
    add(writer, gone, other)
    leave_rubbish(root, gone)
    sources = read(root, "sources").to_table()
    done = forget(Writer(root, "r"), choose(sources, [gone.uri]))
    assert done.rows["keyframes"] == 6
    import fsspec

    fs = fsspec.filesystem("s3", endpoint_url=bucket.env["AWS_ENDPOINT_URL"])
    for name in fs.find("reel/set"):
        content = fs.cat_file(name)
        assert gone.content[:64] not in content and gone.uri.encode() not in content, name
    assert read(root, "sources").to_table()["uri"].to_pylist() == [other.uri]
    assert np.all(read(root, "clips").to_table()["source_id"].to_numpy() == other.id)
