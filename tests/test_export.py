"""Exports: what trainers read, whole files only, and the same whether it was interrupted or not."""

from __future__ import annotations

import csv
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from clips import encode
from conftest import Bucket, Ran, command

from engine import exporting
from engine.clipfiles import Limits
from engine.cut import Cut, Encoding, Span, cut_clips
from engine.cutter import SCRATCH, CutJob, Cutter, units
from engine.export import Request, Selection, select
from engine.exporting import ABOUT, Exported, export
from engine.schema import TABLES
from engine.tables import Writer, create
from engine.video import decode, open_video, probe

FAST = Encoding(preset="ultrafast")
CLOSED = {"g": "20", "keyint_min": "20", "sc_threshold": "0", "bf": "0"}
LIMITS = Limits(workers=1)


def rows(name: str, given: list[dict[str, Any]]) -> pa.Table:
    columns = []
    for column in TABLES[name]:
        values = [row.get(column.name) for row in given]
        is_blob = isinstance(column.type, pa.ExtensionType)
        columns.append(lance.blob_array(values) if is_blob else pa.array(values, column.type))
    return pa.table(columns, schema=TABLES[name])


def clip(source: str, uri: Path, index: int, **more: Any) -> dict[str, Any]:
    """The second of two clips begins where the first ends, after 20 frames of 1/25 s."""
    first = 20 * index
    row = {
        "clip_id": f"{source}-{index}",
        "source_id": source,
        "source_uri": str(uri),
        "media": "video",
        "start_s": first / 25,
        "end_s": (first + 20) / 25,
        "start_frame": first,
        "num_frames": 20,
        "fps": 25.0,
        "width_px": 64,
        "height_px": 48,
        "duration_s": 0.8,
        "motion_score": 1.5,
        "caption": f"Clip {index} of {source}.",
        "caption_original": f"given {source} {index}",
        "state": "kept",
        "kept": True,
    }
    return row | more


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    found = {}
    for number, name in enumerate("ab"):
        level = [np.full((48, 64), 30 + 100 * number + i, np.uint8) for i in range(41)]
        found[name] = encode(folder / f"{name}.mp4", level, options=CLOSED)
    return found


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory, sources: dict[str, Path]) -> pa.Table:
    """Rows of `cuts` for the four clips, with blobs."""
    folder, found = tmp_path_factory.mktemp("cuts"), []
    for name, path in sources.items():
        spans = [clip(name, path, i) for i in range(2)]
        names = "start_s end_s start_frame num_frames".split()
        wanted = [(Span(**{n: s[n] for n in names}), s["clip_id"]) for s in spans]
        for _, cut in cut_clips(str(path), wanted, str(folder), mode="encode", encoding=FAST):
            assert isinstance(cut, Cut)
            row = {"clip_id": Path(cut.path).stem, "source_id": name, "run_id": "r"} | vars(cut)
            found.append(row | {"path": None, "mp4": Path(cut.path).read_bytes()})
    return rows("cuts", found)


@pytest.fixture
def dataset(bare: Writer, cuts: pa.Table) -> Writer:
    """The same, all cut."""
    bare.append("cuts", cuts)
    return bare


@pytest.fixture
def bare(tmp_path: Path, sources: dict[str, Path]) -> Writer:
    """Four kept clips, and one that is not."""
    root = str(tmp_path / "set")
    create(root, "classic")
    writer = Writer(root, "r")
    clips = [clip(name, uri, i) for name, uri in sources.items() for i in range(2)]
    clips[0]["extra"] = json.dumps({"place": "sea", "stars": 4, "caption": "x", "tags": [1, 2]})
    clips[1]["extra"] = json.dumps({"place": "hill", "stars": 4.5, "mixed": "one"})
    clips[2]["extra"] = json.dumps({"mixed": 1, "thumb_file_name": "t.jpg", "empty": None})
    clips.append(clip("b", sources["b"], 1, clip_id="no", state="rejected", kept=False))
    writer.commit(sources=rows("sources", []), clips=rows("clips", clips))
    pairs = [
        {"pair_id": f"p-{c['clip_id']}-{kind}", "clip_id": c["clip_id"],
         "source_id": c["source_id"], "media": "video", "instruction": kind,
         "original": f"short {c['clip_id']}", "rephrased": f"A long {kind} text.",
         "kept": kind != "multi_scene" or c["source_id"] == "a"}
        for c in clips[:4]
        for kind in ("dense", "multi_scene")
    ]  # fmt: skip
    writer.append("pairs", rows("pairs", pairs))
    return writer


def cut_in(writer: Writer, mode: Any = "encode", where: Any = "files") -> None:
    clips = writer.table("clips").to_table(filter="kept")
    names = ["clip_id", "source_id", "source_uri", "start_s", "end_s", "start_frame", "num_frames"]
    cutter = Cutter(CutJob(root=writer.root, run_id="r", mode=mode, where=where, encoding=FAST))
    for unit in units(clips.select([*names, "media"])):
        writer.append("cuts", cutter.do(unit).fragments)
    cutter.close()


def write(writer: Writer, dst: Path, **options: Any) -> tuple[Exported, Selection]:
    request = Request(**{"root": writer.root, "encoding": FAST} | options)
    selection = select(request)
    return export(request, selection, str(dst), LIMITS), selection


def lines(path: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return {row.get("pair_id") or row["clip_id"]: row for row in found}


def level(path: Path | str) -> float:
    with open_video(path) as video:
        return float(next(decode(video)).picture.to_ndarray(format="gray").mean())


def names_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_a_hugging_face_folder_names_each_file_once_with_its_caption(
    dataset: Writer, tmp_path: Path
) -> None:
    done, _ = write(dataset, tmp_path / "out", format="hf")
    found = lines(tmp_path / "out" / "metadata.jsonl")
    assert set(found) == {"a-0", "a-1", "b-0", "b-1"}
    assert names_in(tmp_path / "out") == {
        "metadata.jsonl", ABOUT, *(f"videos/{key}.mp4" for key in found)
    }  # fmt: skip
    assert (done.samples, done.files) == (4, 4)
    for key, row in found.items():
        assert row["file_name"] == f"videos/{key}.mp4"
        assert row["caption"] == f"Clip {key[-1]} of {key[0]}."
        path = tmp_path / "out" / row["file_name"]
        first = 30 + 100 * (key[0] == "b") + 20 * int(key[-1])
        assert level(path) == pytest.approx(first, abs=2)
        assert (row["width_px"], row["num_frames"]) == (64, 20)
    assert done.bytes == sum(p.stat().st_size for p in (tmp_path / "out" / "videos").iterdir())


def test_unknown_manifest_columns_are_columns_of_one_kind_under_free_names(
    dataset: Writer, tmp_path: Path
) -> None:
    write(dataset, tmp_path / "out", format="hf")
    found = lines(tmp_path / "out" / "metadata.jsonl")
    assert [found["a-0"][n] for n in ("place", "stars", "extra_caption", "tags")] == [
        "sea", 4, "x", "[1, 2]"
    ]  # fmt: skip
    assert all(type(found[key][n]) is float for key, n in (("a-0", "stars"), ("a-0", "start_s")))
    assert found["a-0"]["caption"] == "Clip 0 of a."
    assert (found["a-1"]["mixed"], found["b-0"]["mixed"]) == ('"one"', "1")
    assert found["b-0"]["thumb_filename"] == "t.jpg", "datasets would open thumb_file_name"
    assert found["b-1"]["place"] is None, "every row has every column"
    assert "empty" not in found["b-0"] and "aesthetic_score" not in found["b-0"]
    text = (tmp_path / "out" / "metadata.jsonl").read_text()
    order = [json.loads(line) for line in text.splitlines()][:5]
    for name in ("place", "stars", "mixed", "thumb_filename", "tags"):
        assert any(row[name] is not None for row in order), "types are taken from the first rows"
    import pyarrow.json as paj

    table = paj.read_json(tmp_path / "out" / "metadata.jsonl")
    assert table.schema.field("stars").type == pa.float64()


def test_lists_for_other_trainers_name_the_same_files(dataset: Writer, tmp_path: Path) -> None:
    write(dataset, tmp_path / "out", format="jsonl")
    found = lines(tmp_path / "out" / "clips.jsonl")
    videox_fun = json.loads((tmp_path / "out" / "videox_fun.json").read_text())
    assert {r["file_path"] for r in videox_fun} == {r["file_name"] for r in found.values()}
    assert videox_fun[0]["type"] == "video"
    assert videox_fun[0]["text"] in {r["caption"] for r in found.values()}
    with open(tmp_path / "out" / "diffsynth.csv", encoding="utf-8", newline="") as file:
        listed = list(csv.DictReader(file))
    assert {r["video"]: r["prompt"] for r in listed} == {
        r["file_name"]: r["caption"] for r in found.values()
    }
    assert not (tmp_path / "out" / "metadata.jsonl").exists()


def test_spans_name_the_sources_and_write_no_media(
    dataset: Writer, tmp_path: Path, sources: dict[str, Path]
) -> None:
    done, _ = write(dataset, tmp_path / "out", format="jsonl", spans=True)
    assert names_in(tmp_path / "out") == {"clips.jsonl", ABOUT}
    row = lines(tmp_path / "out" / "clips.jsonl")["b-1"]
    assert row["source_uri"] == str(sources["b"])
    assert [row[n] for n in ("start_s", "end_s", "start_frame", "num_frames")] == [0.8, 1.6, 20, 20]
    assert (done.samples, done.files) == (4, 0)


def members(folder: Path) -> list[list[str]]:
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found.append(tar.getnames())
    return found


def test_shards_hold_whole_samples_and_are_bounded(dataset: Writer, tmp_path: Path) -> None:
    done, _ = write(dataset, tmp_path / "out", format="webdataset", shard_bytes=12_000)
    found = members(tmp_path / "out")
    assert done.files == len(found) >= 2
    assert sum(map(len, found)) == 4 * 3
    for names in found:
        assert len(names) % 3 == 0
        for i in range(0, len(names), 3):
            key = names[i].removesuffix(".mp4")
            assert names[i : i + 3] == [f"{key}.mp4", f"{key}.txt", f"{key}.json"]
    for path in (tmp_path / "out").glob("*.tar"):
        assert path.stat().st_size < 12_000 + 20_480, "tar pads to blocks of 10 KiB"
        with tarfile.open(path) as tar:
            for member in tar:
                data = tar.extractfile(member).read()
                if member.name.endswith(".json"):
                    facts = json.loads(data)
                    text = tar.extractfile(member.name.replace(".json", ".txt")).read().decode()
                    assert facts["caption"] == text == f"Clip {text[5]} of {text[-2]}."
                elif member.name.endswith(".mp4"):
                    (tmp_path / "clip.mp4").write_bytes(data)
                    assert probe(tmp_path / "clip.mp4").num_frames == 20


def test_pairs_are_samples_of_their_own_over_one_file_a_clip(
    dataset: Writer, tmp_path: Path
) -> None:
    done, selection = write(dataset, tmp_path / "hf", format="hf", pairs=True)
    found = lines(tmp_path / "hf" / "metadata.jsonl")
    assert selection.caption == "rephrased"
    assert (done.samples, done.files) == (6, 4)
    row = found["p-a-0-multi_scene"]
    assert (row["file_name"], row["caption"]) == ("videos/a-0.mp4", "A long multi_scene text.")
    assert (row["original"], row["instruction"]) == ("short a-0", "multi_scene")
    assert "p-b-0-multi_scene" not in found, "it is not kept"
    write(dataset, tmp_path / "wds", format="webdataset", pairs=True)
    (names,) = members(tmp_path / "wds")
    assert len(names) == 6 * 3 and "p-a-0-multi_scene.mp4" in names
    write(dataset, tmp_path / "short", format="hf", pairs=True, caption="caption_original")
    found = lines(tmp_path / "short" / "metadata.jsonl")
    assert found["p-a-0-dense"]["caption"] == "short a-0"


@pytest.mark.parametrize("where", ["files", "blob"])
def test_the_cuts_of_the_dataset_are_used_as_they_are(
    bare: Writer, tmp_path: Path, sources: dict[str, Path], where: str
) -> None:
    cut_in(bare, where=where)
    hidden = {name: path.rename(path.with_suffix(".gone")) for name, path in sources.items()}
    try:
        done, _ = write(bare, tmp_path / "out", format="hf")
    finally:
        for name, path in hidden.items():
            path.rename(sources[name])
    assert done.samples == 4 and not done.left_out
    path = tmp_path / "out" / "videos" / "a-1.mp4"
    if where == "files":
        assert path.read_bytes() == (Path(bare.root) / "cuts" / "a-" / "a-1.mp4").read_bytes()
    assert probe(path).num_frames == 20


def test_a_copied_cut_is_told_with_its_true_span(bare: Writer, tmp_path: Path) -> None:
    change = {"clip_id": "a-0", "start_s": 0.6, "end_s": 1.4, "start_frame": 15, "num_frames": 20}
    bare.amend("clips", [pa.Table.from_pylist([change])])
    write(bare, tmp_path / "out", format="hf", cut="copy")
    row = lines(tmp_path / "out" / "metadata.jsonl")["a-0"]
    assert (row["start_s"], row["num_frames"]) == (pytest.approx(0.8), 15)
    assert row["duration_s"] == pytest.approx(0.6)


def test_clips_without_media_or_text_are_left_out_and_counted(
    bare: Writer, tmp_path: Path, sources: dict[str, Path]
) -> None:
    change = {"clip_id": "a-0", "caption": " "}
    bare.amend("clips", [pa.Table.from_pylist([change])])
    moved = sources["b"].rename(tmp_path / "elsewhere.mp4")
    done, _ = write(bare, tmp_path / "out", format="webdataset", cut="encode")
    assert dict(done.left_out) == {"no text": 1, "FileNotFoundError": 2}
    assert done.samples == 1 and len(done.failures) == 2
    moved.rename(sources["b"])
    done, _ = write(bare, tmp_path / "out", format="webdataset", cut="encode")
    assert dict(done.left_out) == {"no text": 1} and done.samples == 3
    assert members(tmp_path / "out")[0][0] == "a-1.mp4", "what was written stays"


def test_images_are_exported_as_their_files_are(dataset: Writer, tmp_path: Path) -> None:
    picture = tmp_path / "p.PNG"
    picture.write_bytes(b"\x89PNG rest")
    image = clip("c", picture, 0, media="image", start_s=None, end_s=None, num_frames=None)
    dataset.commit(sources=rows("sources", []), clips=rows("clips", [image]))
    done, _ = write(dataset, tmp_path / "out", format="hf", media="image")
    assert done.samples == 1
    assert (tmp_path / "out" / "images" / "c-0.png").read_bytes() == b"\x89PNG rest"
    row = lines(tmp_path / "out" / "metadata.jsonl")["c-0"]
    assert row["file_name"] == "images/c-0.png"
    done, _ = write(dataset, tmp_path / "videos", format="hf")
    assert done.samples == 4, "an export is of one medium"


# Killed and run again


class Killed(BaseException):
    """As if the process had ended here."""


@pytest.mark.parametrize("format_", ["hf", "webdataset", "jsonl"])
def test_an_export_that_was_killed_goes_on_to_the_same_files(
    dataset: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_: str
) -> None:
    options = {"format": format_, "shard_bytes": 1}  # a shard a sample
    whole, _ = write(dataset, tmp_path / "whole", **options)
    placed: list[str] = []

    def dying(path: str, uri: str) -> None:
        if len(placed) == 2:
            raise Killed
        place(path, uri)
        placed.append(uri)

    place = exporting.place
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "place", dying)
        with pytest.raises(Killed):
            write(dataset, tmp_path / "out", **options)
    (tmp_path / "out" / f"{SCRATCH}left").mkdir()
    (tmp_path / "out" / f"{SCRATCH}left" / "half").write_bytes(b"x")
    times = {uri: Path(uri).stat().st_mtime_ns for uri in placed}
    done, _ = write(dataset, tmp_path / "out", **options)
    assert done == whole
    assert names_in(tmp_path / "out") == names_in(tmp_path / "whole")
    for name in names_in(tmp_path / "whole") - {ABOUT}:
        one, two = (tmp_path / folder / name for folder in ("whole", "out"))
        assert one.read_bytes() == two.read_bytes(), name
    assert {uri: Path(uri).stat().st_mtime_ns for uri in placed} == times, "nothing twice"
    assert write(dataset, tmp_path / "out", **options)[0] == whole


def test_a_folder_of_something_else_is_refused_and_left_alone(
    dataset: Writer, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="not empty and no export is in it"):
        write(dataset, tmp_path / "full", format="hf")
    assert names_in(tmp_path / "full") == {"mine.txt"}
    write(dataset, tmp_path / "out", format="hf")
    for options in ({"format": "jsonl"}, {"format": "hf", "caption": "caption_original"}):
        with pytest.raises(ValueError, match="holds another export"):
            write(dataset, tmp_path / "out", **options)
    dataset.amend("clips", [pa.Table.from_pylist([{"clip_id": "a-0", "caption": "Other."}])])
    with pytest.raises(ValueError, match="holds another export"):
        write(dataset, tmp_path / "out", format="hf")


def test_what_cannot_be_asked_is_one_clear_line(bare: Writer, tmp_path: Path) -> None:
    for options, says in (
        ({"format": "hf"}, r"4 kept clip\(s\) .* are not cut: add --cut encode"),
        ({"format": "hf", "spans": True}, "use --format jsonl"),
        ({"format": "jsonl", "spans": True, "cut": "copy"}, "leave one out"),
        ({"format": "hf", "caption": "rephrased"}, "add --pairs"),
        ({"format": "hf", "media": "image"}, "keeps no image clip"),
    ):
        with pytest.raises(ValueError, match=says):
            write(bare, tmp_path / "out", **options)


def run(*arguments: object) -> Ran:
    """The command, which needs no cluster."""
    done = subprocess.run(command("export", *arguments), capture_output=True, text=True, timeout=99)
    return Ran(done.returncode, done.stdout, done.stderr)


def test_the_command_exports_and_says_what_it_did(bare: Writer, tmp_path: Path) -> None:
    given = (bare.root, "--format", "hf", "--dst", tmp_path / "out")
    refused = run(*given)
    assert refused.code == 2
    assert refused.err.splitlines()[-1].startswith("error: 4 kept clip(s)")
    done = run(*given, "--cut", "encode", "--json")
    assert done.code == 0, done.err
    assert (done.json["samples"], done.json["caption"]) == (4, "caption")
    assert len(lines(tmp_path / "out" / "metadata.jsonl")) == 4


@pytest.mark.slow
def test_an_export_into_a_store(dataset: Writer, tmp_path: Path, bucket: Bucket) -> None:
    import fsspec

    write(dataset, tmp_path / "here", format="webdataset", shard_bytes=1)
    request = Request(root=dataset.root, format="webdataset", encoding=FAST, shard_bytes=1)
    done = export(request, select(request), f"{bucket.uri}/out", LIMITS)
    assert done.samples == 4
    fs = fsspec.filesystem("s3", endpoint_url=bucket.env["AWS_ENDPOINT_URL"])
    for path in (tmp_path / "here").glob("*.tar"):
        assert fs.cat_file(f"reel/out/{path.name}") == path.read_bytes()
