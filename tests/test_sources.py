"""What `--src` can name, and what every name leads to."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine import storage, stores
from engine.sources import Listing, Source, Span, list_sources


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket, reached by the standard variables alone."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    fs, _ = stores.store_of("s3://bucket")
    if fs.exists("bucket"):
        fs.rm("bucket", recursive=True)
    fs.mkdir("bucket")
    return "s3://bucket"


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")


def put(root: str, **files: str) -> None:
    """Files below `root`; a keyword cannot hold a dot or slash, so `files` is mostly unpacked."""
    for name, content in files.items():
        storage.write_bytes(storage.join(root, name), content.encode())


def names(root: str, found: Listing) -> list[str]:
    return [source.uri.removeprefix(f"{root}/") for source in found.sources]


def refusal(src: str | list[str]) -> str:
    """The one line that a person gets."""
    with pytest.raises(ValueError, match=r".") as refused:
        list_sources(src)
    line = str(refused.value)
    assert line == " ".join(line.split()) and line.isprintable()
    return line


# Folders, globs and files


def test_a_folder_gives_its_videos_and_counts_the_rest(root: str) -> None:
    put(root, **{"b.mp4": "x", "a/c.MKV": "xx", "a/d e.WebM": "", "ä/ö.mp4": "xxx"})
    put(root, **{"README.md": "", "a/list.csv": "uri\n", "notes.txt": "", ".DS_Store": ""})
    found = list_sources(root)
    assert names(root, found) == ["a/c.MKV", "a/d e.WebM", "b.mp4", "ä/ö.mp4"]
    assert [source.size_bytes for source in found.sources] == [2, 0, 1, 3]
    assert all(source.error is None and source.spans == () for source in found.sources)
    assert (found.ignored, found.repeated) == (4, 0)
    stats = [storage.stat(source.uri) for source in found.sources]
    assert stats == [storage.Stat(s.size_bytes, s.mtime_ns, s.etag) for s in found.sources]


def test_any_content_is_a_source_when_the_name_says_video(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "video").write_bytes(b"\0\0\0\x18ftypmp42")
    found = list_sources(str(tmp_path))
    assert names(str(tmp_path), found) == ["text.mp4"]
    assert found.ignored == 1


def test_strange_names_keep_their_files(tmp_path: Path) -> None:
    given = [
        "two\nlines.mp4",
        " edges .mp4",
        "[a]*?.mp4",
        "#.mp4",
        "%20.mp4",
        "x:y.mp4",
        "日本.mp4",
    ]
    for name in given:
        (tmp_path / name).write_text(name)
    (tmp_path / os.fsdecode(b"latin\xe9.mp4")).write_text("latin")
    found = list_sources(str(tmp_path))
    assert names(str(tmp_path), found) == [
        *sorted(given),
        f"file://{tmp_path}/latin%E9.mp4",
    ]
    table = pa.table({"uri": [source.uri for source in found.sources]})  # every name fits a table
    contents = [storage.read_bytes(uri).decode() for uri in table["uri"].to_pylist()]
    assert contents == [*sorted(given), "latin"]


def test_a_relative_folder_gives_absolute_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(str(tmp_path / "videos"), **{"a.mp4": ""})
    monkeypatch.chdir(tmp_path)
    assert [s.uri for s in list_sources("videos").sources] == [f"{tmp_path}/videos/a.mp4"]
    assert [s.uri for s in list_sources("./videos/*").sources] == [f"{tmp_path}/videos/a.mp4"]
    assert [s.uri for s in list_sources("videos/a.mp4").sources] == [f"{tmp_path}/videos/a.mp4"]


def test_links_are_sources_of_their_own(tmp_path: Path) -> None:
    put(str(tmp_path), **{"v/a.mp4": "xx", "elsewhere/b.mp4": "xxx"})
    videos = tmp_path / "v"
    (videos / "again.mp4").symlink_to("a.mp4")
    (videos / "gone.mp4").symlink_to("nowhere")
    (videos / "loop").symlink_to(".")
    (videos / "sub").symlink_to("../elsewhere")
    found = list_sources(str(videos))
    assert names(str(videos), found) == ["a.mp4", "again.mp4", "gone.mp4", "sub/b.mp4"]
    assert [source.size_bytes for source in found.sources] == [2, 2, None, 3]
    assert [s.error for s in found.sources] == [None, None, "a broken link to 'nowhere'", None]


def test_what_is_named_as_a_video_and_is_none_is_a_row_with_an_error(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "folder.mp4" / "inside.mp4").touch()
    os.mkfifo(tmp_path / "pipe.mp4")
    found = list_sources(str(tmp_path))
    assert names(str(tmp_path), found) == ["folder.mp4", "pipe.mp4"]
    errors = [source.error for source in found.sources]
    assert errors == ["is a folder, not a file", "is a named pipe, not a file"]
    (direct,) = list_sources(str(tmp_path / "pipe.mp4")).sources
    assert direct.error == "cannot be read: is a named pipe, not a file"


def test_a_folder_in_a_store_named_as_a_video_is_a_row_with_an_error(s3: str) -> None:
    put(s3, **{"x.mp4/part.bin": "", "x.mp4/y.mp4": "", "z.mp4": "", "marker/": ""})
    found = list_sources(s3)
    assert names(s3, found) == ["x.mp4", "z.mp4"]
    assert [source.error for source in found.sources] == ["is a folder, not a file", None]


@pytest.mark.parametrize(
    ("pattern", "expected", "ignored"),
    [
        ("*.mp4", ["a.mp4", "b.mp4"], 0),
        ("[ac].m??", ["a.mp4", "c.mkv"], 0),
        ("[!a].mp4", ["b.mp4"], 0),
        ("**/*.mp4", ["a.mp4", "b.mp4", "x/d.mp4", "x/y/e.mp4"], 0),
        ("x/**/*.mp4", ["x/d.mp4", "x/y/e.mp4"], 0),
        ("**/y/*", ["x/y/e.mp4"], 1),
        ("*/d.mp4", ["x/d.mp4"], 0),
        ("x/**", ["x/d.mp4", "x/y/e.mp4"], 1),
        ("x*", ["x/d.mp4", "x/y/e.mp4"], 1),
        ("*", ["a.mp4", "b.mp4", "c.mkv", "x/d.mp4", "x/y/e.mp4"], 2),
    ],
)
def test_globs(root: str, pattern: str, expected: list[str], ignored: int) -> None:
    put(root, **dict.fromkeys(["a.mp4", "b.mp4", "c.mkv", "x/d.mp4", "x/y/e.mp4"], ""))
    put(root, **{"n.md": "", "x/y/n.md": ""})
    found = list_sources(storage.join(root, pattern))
    assert names(root, found) == expected
    assert found.ignored == ignored


def test_a_name_that_exists_is_not_taken_for_a_glob(tmp_path: Path) -> None:
    put(str(tmp_path), **{"[ab].mp4": "", "a.mp4": "", "dir [1]/b.mp4": ""})
    assert names(str(tmp_path), list_sources(str(tmp_path / "[ab].mp4"))) == ["[ab].mp4"]
    assert names(str(tmp_path), list_sources(str(tmp_path / "dir [1]"))) == ["dir [1]/b.mp4"]


def test_several_names_at_once_count_what_repeats(tmp_path: Path) -> None:
    put(str(tmp_path), **{"a.mp4": "", "b.mp4": "", "n.md": "", "list.txt": "a.mp4\nc.mp4\n"})
    root = str(tmp_path)
    found = list_sources([root, f"{root}/*.mp4", f"{root}/b.mp4", f"{root}/list.txt"])
    assert names(root, found) == ["a.mp4", "b.mp4", "c.mp4"]
    assert found.repeated == 4
    assert found.ignored == 2


# Images


def media(root: str, found: Listing) -> dict[str, str | None]:
    return {source.uri.removeprefix(f"{root}/"): source.media for source in found.sources}


def test_images_are_sources_and_what_is_not_read_of_them_is_ignored(root: str) -> None:
    images = ["a.JPG", "b.jpeg", "c.png", "d/e.webp", "f.bmp", "g.tif", "h.tiff", "i.avif"]
    put(root, **dict.fromkeys([*images, "j.mp4", "k.gif", "l.heic", "m.svg", "n.jxl"], ""))
    found = list_sources(root)
    assert media(root, found) == dict.fromkeys(images, "image") | {"j.mp4": "video"}
    assert found.ignored == 4
    globbed = list_sources(storage.join(root, "*.png"))
    assert media(root, globbed) == {"c.png": "image"}
    assert media(root, list_sources(storage.join(root, "a.JPG"))) == {"a.JPG": "image"}


def test_a_picture_beside_a_video_is_a_source_and_shares_its_caption(root: str) -> None:
    put(root, **{"x.mp4": "", "x.jpg": "", "x.txt": "A dog runs.", "y.png": ""})
    put(root, **{"y.json": '{"caption": "A cat.", "licence": "CC0"}'})
    found = list_sources(root)
    assert [(Path(s.uri).name, s.media, s.caption) for s in found.sources] == [
        ("x.jpg", "image", "A dog runs."),
        ("x.mp4", "video", "A dog runs."),
        ("y.png", "image", "A cat."),
    ]
    assert (found.sources[2].extra, found.ignored) == ('{"licence": "CC0"}', 0)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "lance"])
def test_a_manifest_says_what_a_name_does_not(root: str, kind: str) -> None:
    rows = [
        {"uri": "a.jpg", "caption": "A dog", "media": "", "licence": "CC0"},
        {"uri": "b.mp4"},
        {"uri": "photo", "media": "Image "},
        {"uri": "film.gif", "media": "video"},
        {"uri": "who-knows"},
        {"uri": "c.jpg", "media": "video"},
    ]
    put(root, **{row["uri"]: "x" for row in rows})
    found = list_sources(write_manifest(root, kind, rows))
    assert media(root, found) == {
        "a.jpg": "image",
        "b.mp4": "video",
        "c.jpg": "video",
        "film.gif": "video",
        "photo": "image",
        "who-knows": None,
    }
    assert all(source.error is None for source in found.sources)
    (a,) = [s for s in found.sources if s.uri.endswith("a.jpg")]
    assert (a.caption, a.extra) == ("A dog", '{"licence": "CC0"}')


def test_what_one_list_says_of_a_file_holds_wherever_else_it_is_named(tmp_path: Path) -> None:
    put(str(tmp_path), **{"photo": "", "a.mp4": "", "plain.txt": "photo\na.mp4\n"})
    put(str(tmp_path), **{"told.csv": "uri,media\nphoto,image\n"})
    names = [str(tmp_path / "plain.txt"), str(tmp_path / "told.csv")]
    for order in (names, names[::-1]):
        assert media(str(tmp_path), list_sources(order)) == {"photo": "image", "a.mp4": "video"}
    put(str(tmp_path), **{"other.csv": "uri,media\nphoto,video\n"})
    line = refusal([str(tmp_path / "told.csv"), str(tmp_path / "other.csv")])
    assert "other.csv, line 2: says that" in line and "told.csv, line 2 that it is image" in line


def test_a_span_of_an_image_is_the_error_of_that_row_alone(tmp_path: Path) -> None:
    put(str(tmp_path), **{"a.jpg": "x", "b.mp4": "x", "c.png": "x"})
    lines = ["uri,start_s,end_s", "a.jpg,0.5,2", "b.mp4,0.5,2", "c.png,,"]
    put(str(tmp_path), **{"list.csv": "\n".join(lines)})
    found = list_sources(str(tmp_path / "list.csv"))
    a, b, c = found.sources
    assert a.error == (
        f"{tmp_path}/list.csv, line 2 asks for a span of an image (0.5 to 2 s), which has no time: "
        "leave start_s and end_s empty there"
    )
    assert (b.error, c.error) == (None, None)
    assert ([s.start_s for s in b.spans], c.spans, found.repeated) == ([0.5], (), 0)


# Captions beside the file


def test_captions_from_sidecars(root: str) -> None:
    put(root, **{"a.mp4": "", "a.txt": "\ufeffA dog runs.\n", "b.mp4": ""})
    put(root, **{"b.json": '{"caption": "Ein Hünd", "licence": "CC-BY", "tags": [1], "no": null}'})
    put(root, **{"c.mp4": "", "c.txt": " \n", "c.json": '{"caption": "from json"}', "d.mp4": ""})
    put(
        root, **{"d.txt": "text", "d.json": '{"caption": "json", "k": 1}', "e.txt": "", "f.mp4": ""}
    )
    found = list_sources(root)
    assert [(s.caption, s.extra) for s in found.sources] == [
        ("A dog runs.", None),
        ("Ein Hünd", '{"licence": "CC-BY", "tags": [1]}'),
        ("from json", None),
        ("text", '{"k": 1}'),
        (None, None),
    ]
    assert found.ignored == 1  # e.txt is beside no video


@pytest.mark.parametrize("src", ["v/*.mp4", "v/a.mp4", "list.txt"])
def test_sidecars_are_found_however_the_video_is_named(root: str, src: str) -> None:
    put(root, **{"v/a.mp4": "", "v/a.txt": "A dog runs.", "list.txt": "v/a.mp4"})
    found = list_sources(storage.join(root, src))
    assert [s.caption for s in found.sources] == ["A dog runs."]
    assert found.ignored == 0


def test_names_that_a_shell_has_opened_may_hold_sidecars(tmp_path: Path) -> None:
    put(str(tmp_path), **{"a.mp4": "", "a.txt": "A dog runs.", "a.json": "{}"})
    found = list_sources([str(tmp_path / name) for name in ("a.json", "a.mp4", "a.txt")])
    assert names(str(tmp_path), found) == ["a.mp4"]
    assert found.sources[0].caption == "A dog runs."


def test_a_caption_that_cannot_be_read_is_the_error_of_its_source(tmp_path: Path) -> None:
    put(str(tmp_path), **{f"{name}.mp4": "x" for name in "abcdefg"})
    put(str(tmp_path), **{"a.json": "{", "b.json": "[1]", "c.json": '{"caption": 3}'})
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "e.txt").write_bytes(b"x" * 2_000_000)
    put(str(tmp_path), **{"f.json": '{"caption": "\\ud800"}', "g.json": "[" * 100_000})
    found = {Path(s.uri).stem: s for s in list_sources(str(tmp_path)).sources}
    assert all(source.size_bytes == 1 for source in found.values())
    starts = {name: f"its caption in {name}.json cannot be read: " for name in "abcfg"}
    starts |= {name: f"its caption in {name}.txt cannot be read: " for name in "de"}
    for name, source in found.items():
        assert source.error is not None and source.error.startswith(starts[name])
        assert source.error.isprintable()
    assert "needs an object" in found["b"].error
    assert "2000000" in found["e"].error


# Manifests

ROWS = [
    {"uri": "v/a.mp4", "caption": "A dog", "licence": "CC-BY"},
    {"uri": "v/b.mp4", "start_s": 2.0, "end_s": 3.5, "caption": "later", "licence": "CC0"},
    {"uri": "v/b.mp4", "start_s": 0.5, "end_s": 2.0, "caption": "first", "licence": "CC0"},
    {"uri": "v/gone.mp4", "caption": "nothing"},
]


def write_manifest(root: str, kind: str, rows: list[dict]) -> str:
    uri = storage.join(root, f"list.{kind}")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if kind == "txt":
        text = "\ufeff# comment\r\n\r\n" + "".join(f"  {row['uri']} \r\n" for row in rows)
    elif kind == "csv":
        lines = [[str(row.get(name, "")) for name in columns] for row in rows]
        text = "\n".join(",".join(line) for line in [columns, *lines])
    elif kind == "jsonl":
        text = "\n\n".join(json.dumps(row) for row in rows)
    else:
        table = pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows])
        if kind == "lance":
            lance.write_dataset(table, uri, storage_options=storage.lance_options(uri))
            return uri
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        storage.write_bytes(uri, sink.getvalue().to_pybytes())
        return uri
    storage.write_bytes(uri, text.encode())
    return uri


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "lance"])
def test_manifests_of_every_kind_say_the_same(root: str, kind: str) -> None:
    put(root, **{"v/a.mp4": "xx", "v/b.mp4": "xxx"})
    uri = write_manifest(root, kind, ROWS)
    found = list_sources(uri)
    a, b, gone = found.sources
    assert names(root, found) == ["v/a.mp4", "v/b.mp4", "v/gone.mp4"]
    assert (a.caption, a.extra, a.spans, a.size_bytes) == ("A dog", '{"licence": "CC-BY"}', (), 2)
    assert [(s.start_s, s.end_s, s.caption, s.extra) for s in b.spans] == [
        (0.5, 2.0, "first", '{"licence": "CC0"}'),
        (2.0, 3.5, "later", '{"licence": "CC0"}'),
    ]
    assert (b.caption, b.extra, b.size_bytes, b.error) == (None, None, 3, None)
    place = {"parquet": "row 4", "lance": "row 4", "csv": "line 5", "jsonl": "line 7"}[kind]
    assert gone.error == f"{uri}, {place} names it, but there is no such file"
    assert (gone.caption, gone.size_bytes, found.repeated, found.ignored) == ("nothing", None, 0, 0)


def test_a_text_manifest(root: str) -> None:
    put(root, **{"v/a.mp4": "xx", "v/b.mp4": "xxx"})
    found = list_sources(write_manifest(root, "txt", ROWS))
    assert names(root, found) == ["v/a.mp4", "v/b.mp4", "v/gone.mp4"]
    assert found.repeated == 1
    assert found.sources[2].error.endswith("line 6 names it, but there is no such file")


def test_manifest_names_are_below_its_folder_or_absolute(tmp_path: Path, s3: str) -> None:
    put(str(tmp_path), **{"a.mp4": "x", "sub/b.mp4": "xx"})
    put(s3, **{"c.mp4": "xxx", "sub/d.mp4": "xxxx"})
    uris = ["../a.mp4", "b.mp4", f"file://{tmp_path}/a.mp4", f"{s3}/c.mp4", "./../sub/b.mp4"]
    put(str(tmp_path), **{"sub/list.txt": "\n".join(uris)})
    found = list_sources(str(tmp_path / "sub/list.txt"))
    local = [f"{tmp_path}/a.mp4", f"{tmp_path}/sub/b.mp4"]
    assert [s.uri for s in found.sources] == [*local, f"{s3}/c.mp4"]
    assert [s.size_bytes for s in found.sources] == [1, 2, 3]
    assert found.repeated == 2
    put(s3, **{"sub/list.txt": f"../c.mp4\nd.mp4\n{tmp_path}/a.mp4"})
    found = list_sources(f"{s3}/sub/list.txt")
    assert [s.uri for s in found.sources] == [local[0], f"{s3}/c.mp4", f"{s3}/sub/d.mp4"]
    assert [s.error for s in found.sources] == [None] * 3


def test_a_manifest_may_name_any_suffix_and_odd_names(tmp_path: Path) -> None:
    odd = ["a b.bin", "two\nlines", 'quo"te.mp4', "comma,.mp4", "null\0.mp4", "x" * 300]
    for name in odd[:4]:
        (tmp_path / name).write_text("x")
    text = "".join(json.dumps({"uri": name}) + "\n" for name in odd)
    put(str(tmp_path), **{"list.jsonl": text, "list.csv": 'uri\n"two\nlines"\n"quo""te.mp4"\n'})
    found = {
        s.uri.removeprefix(f"{tmp_path}/"): s
        for s in list_sources(str(tmp_path / "list.jsonl")).sources
    }
    assert sorted(found) == sorted(odd)
    assert [found[name].error for name in odd[:4]] == [None] * 4
    assert "no such file" in found["null\0.mp4"].error
    assert found["x" * 300].error == "cannot be read: File name too long"
    assert all((s.error or "").isprintable() for s in found.values())
    assert names(str(tmp_path), list_sources(str(tmp_path / "list.csv"))) == [
        'quo"te.mp4',
        "two\nlines",
    ]


def test_manifest_entries_that_are_no_files_are_rows_with_errors(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    put(str(tmp_path), **{"list.txt": "dir\nnosuch://a/b.mp4\nhttp:/one-slash.mp4\n"})
    found = {s.uri: s.error for s in list_sources(str(tmp_path / "list.txt")).sources}
    assert found[f"{tmp_path}/dir"] == "is a folder, not a file"
    assert "is of nosuch://, and only local files and object stores" in found["nosuch://a/b.mp4"]
    assert "no such file" in found[f"{tmp_path}/http:/one-slash.mp4"]


def test_unknown_columns_travel_as_json_whatever_their_type(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    table = pa.table(
        {
            "uri": ["a.mp4"],
            "day": [date(2026, 1, 2)],
            "nan": [float("nan")],
            "none": pa.nulls(1, pa.string()),
            "nested": [{"x": [1, 2.5], "y": None}],
            "author": ["Zoë"],
            "frames": pa.array([b"bytes"], pa.binary()),
        }
    )
    lance.write_dataset(table, str(tmp_path / "list.lance"))
    pq.write_table(table, tmp_path / "list.parquet")
    for kind in ("lance", "parquet"):
        (source,) = list_sources(str(tmp_path / f"list.{kind}")).sources
        assert source.extra == (
            '{"day": "2026-01-02", "nested": {"x": [1.0, 2.5], "y": null}, "author": "Zoë"}'
        )


def test_a_manifest_caption_goes_before_a_sidecar_which_fills_the_gaps(tmp_path: Path) -> None:
    put(
        str(tmp_path),
        **{"a.mp4": "", "a.txt": "side a", "b.mp4": "", "b.json": '{"caption": "side b", "k": 1}'},
    )
    put(str(tmp_path), **{"list.csv": "uri,caption,author\na.mp4,from list,me\nb.mp4,,you\n"})
    a, b = list_sources(str(tmp_path / "list.csv")).sources
    assert (a.caption, a.extra) == ("from list", '{"author": "me"}')
    assert (b.caption, b.extra) == ("side b", '{"k": 1, "author": "you"}')


def test_repeated_rows_are_counted_once(tmp_path: Path) -> None:
    put(str(tmp_path), **{"a.mp4": "", "b.mp4": ""})
    rows = ["a.mp4,,,", "a.mp4,,,x", "b.mp4,1,2,", "b.mp4,1,2,y", "b.mp4,2,3,"]
    put(str(tmp_path), **{"list.csv": "\n".join(["uri,start_s,end_s,caption", *rows])})
    a, b = (found := list_sources(str(tmp_path / "list.csv"))).sources
    assert found.repeated == 2
    assert (a.caption, a.spans) == ("x", ())
    assert [(s.start_s, s.end_s, s.caption) for s in b.spans] == [(1, 2, "y"), (2, 3, None)]


HEAD = "uri,start_s,end_s,caption\n"


@pytest.mark.parametrize(
    ("kind", "text", "line"),
    [
        ("csv", "path,caption\na.mp4,x\n", "needs a column `uri`, found path, caption"),
        ("csv", HEAD + "a.mp4,5,5,\n", "line 2: start_s must be less than end_s, found 5 and 5"),
        ("csv", HEAD + "a.mp4,6,5,\n", "line 2: start_s must be less than end_s, found 6 and 5"),
        (
            "csv",
            HEAD + "a.mp4,-1,5,\n",
            "start_s must be a number of seconds, 0 or more, found '-1'",
        ),
        ("csv", HEAD + "\na.mp4,0,soon,\n", "line 3: end_s must be a number of seconds"),
        ("csv", HEAD + "a.mp4,0,nan,\n", "line 2: end_s must be a number of seconds"),
        ("csv", HEAD + "a.mp4,0,inf,\n", "line 2: end_s must be a number of seconds"),
        ("csv", HEAD + "a.mp4,0,,\n", "line 2: a span needs start_s and end_s, found no end_s"),
        ("csv", HEAD + "a.mp4,,,\na.mp4,0,1,\n", "line 3: names "),
        ("csv", HEAD + "a.mp4,0,1,\na.mp4,,,\n", "line 3: names "),
        ("csv", HEAD + "a.mp4,0,1,x\na.mp4,0,1,y\n", "line 3: gives "),
        ("csv", HEAD + ",0,1,x\n", "line 2: needs a `uri`, found an empty one"),
        (
            "csv",
            "uri\na,b.mp4\n",
            'line 2: needs at most 1 values, found 2; put values with a comma into "',
        ),
        ("csv", "uri,x,x\na,1,2\n", "has two columns named 'x'"),
        ("csv", HEAD, "needs at least one `uri`, found an empty manifest"),
        ("csv", "", "needs at least one `uri`, found an empty manifest"),
        ("txt", "# nothing\n\n", "needs at least one `uri`, found an empty manifest"),
        ("jsonl", "", "needs at least one `uri`, found an empty manifest"),
        ("jsonl", '{"uri": "a.mp4"}\n{"uri": ', "line 2: is not JSON"),
        ("jsonl", '{"uri": "a.mp4"}\n[1]', "line 2: needs an object"),
        ("jsonl", '{"path": "a.mp4"}', "line 1: needs a `uri`, found an empty one"),
        ("jsonl", '{"uri": 3}', "line 1: needs a `uri`, found 3"),
        ("jsonl", '{"uri": "\\ud800.mp4"}', "line 1: its `uri` is not valid Unicode"),
        (
            "jsonl",
            '{"uri": "a.mp4", "caption": ["x"]}',
            "line 1: a caption must be text, found ['x']",
        ),
        (
            "jsonl",
            '{"uri": "a.mp4", "start_s": true, "end_s": 2}',
            "line 1: start_s must be a number",
        ),
        (
            "csv",
            "uri,media\na.mp4,photo\n",
            "line 2: media must be video or image, found 'photo'; correct it, or rename the column",
        ),
        ("jsonl", '{"uri": "a.mp4", "media": 3}', "line 1: media must be video or image, found 3"),
        ("parquet", "not parquet", "is not readable Parquet"),
    ],
)
def test_a_wrong_manifest_is_refused_in_one_line_that_names_it(
    tmp_path: Path, kind: str, text: str, line: str
) -> None:
    (tmp_path / "a.mp4").touch()
    manifest = tmp_path / f"list.{kind}"
    manifest.write_text(text)
    refused = refusal(str(manifest))
    assert line in refused
    assert refused.startswith(str(manifest))


def test_a_manifest_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"a.mp4\ncaf\xe9.mp4\n")
    assert "line 2: needs UTF-8 text, found the byte 0xe9" in refusal(str(tmp_path / "list.txt"))


@pytest.mark.parametrize("kind", ["parquet", "lance"])
def test_tables_without_uri_or_rows_are_refused(root: str, kind: str) -> None:
    wrong = write_manifest(root, kind, [{"path": "a.mp4"}])
    assert "needs a column `uri`, found path" in refusal(wrong)
    bad_span = write_manifest(
        storage.join(root, "2"), kind, [{"uri": "a"}, {"uri": "a", "start_s": -2.0, "end_s": 1.0}]
    )
    assert "row 2: start_s must be a number of seconds, 0 or more, found -2.0" in refusal(bad_span)


def test_a_folder_named_lance_that_holds_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.lance").mkdir()
    assert "is not a readable Lance table" in refusal(str(tmp_path / "list.lance"))


# What the command line gets wrong


def test_names_that_lead_nowhere(root: str) -> None:
    put(root, **{"docs/a.md": "", "docs/b.md": "", "a.xml": "", "bare": ""})
    missing = storage.join(root, "nowhere")
    assert refusal(missing) == f"{missing}: there is no such file or folder; check the path"
    docs = refusal(storage.join(root, "docs"))
    assert "needs at least one video or image" in docs and "found none among 2 other files" in docs
    assert "found none among 0 matching files" in refusal(storage.join(root, "*.mp4"))
    assert "there is no folder" in refusal(storage.join(root, "nowhere", "*.mp4"))
    assert "needs a video, an image or a manifest (.txt, .csv" in refusal(
        storage.join(root, "a.xml")
    )
    assert "found a file without a suffix" in refusal(storage.join(root, "bare"))
    assert "found an empty name" in refusal("")
    assert "found an empty name" in refusal([])


def test_an_empty_folder_and_a_broken_link(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "found none among 0 other files" in refusal(str(tmp_path / "empty"))
    (tmp_path / "link").symlink_to("nowhere")
    assert "there is no such file or folder" in refusal(str(tmp_path / "link"))
    assert "two\\nlines" in refusal(str(tmp_path / "two\nlines"))


def test_a_missing_bucket_and_a_store_that_does_not_answer(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "there is no such file or folder" in refusal("s3://no-such-bucket/videos")
    assert "is of nosuch://, and only local files and object stores" in refusal(
        "nosuch://bucket/videos"
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    assert "127.0.0.1:9" in refusal(f"{s3}/videos")


def test_a_store_that_does_not_answer_makes_no_row_of_a_manifest_wrong(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(str(tmp_path), **{"list.txt": f"{s3}/a.mp4"})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    assert "127.0.0.1:9" in refusal(str(tmp_path / "list.txt"))


def test_a_folder_that_may_not_be_read(tmp_path_factory: pytest.TempPathFactory) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        put(folder, **{"shut/a.mp4": "", "b.mp4": "xx"})
        os.chmod(f"{folder}/shut", 0)
        os.chmod(f"{folder}/b.mp4", 0)
        as_nobody(lambda: check_shut(folder))
        os.chmod(f"{folder}/shut", 0o755)


def check_shut(folder: str) -> None:
    b, shut = list_sources(folder).sources
    assert (b.size_bytes, b.error) == (2, None)  # that it cannot be opened, the scan will say
    assert shut.error == "a folder that cannot be read (Permission denied)"
    assert refusal(f"{folder}/shut") == f"{folder}/shut: cannot be read: Permission denied"


def as_nobody(function: Callable[[], None]) -> None:
    """Runs `function` without a root user's right to read everything."""
    if os.geteuid() != 0:
        function()
        return
    os.seteuid(65534)
    try:
        function()
    finally:
        os.seteuid(0)


def test_listing_ten_thousand_files_takes_no_time(tmp_path: Path) -> None:
    for folder in range(10):
        (tmp_path / str(folder)).mkdir()
        for i in range(1000):
            (tmp_path / str(folder) / f"{i}.mp4").touch()
    start = time.process_time()
    found = list_sources(str(tmp_path))
    assert len(found.sources) == 10_000
    assert time.process_time() - start < 2.0  # about 0.15 s; opening each would show


def test_a_listing_is_a_value() -> None:
    assert Source(uri="/a.mp4", spans=(Span(0, 1, "x"),)) == Source(
        uri="/a.mp4", spans=(Span(0, 1, "x"),)
    )
    assert Source(uri="/a.mp4", spans=(Span(0, 1, "x"),)) != Source(
        uri="/a.mp4", spans=(Span(0, 1, "y"),)
    )
