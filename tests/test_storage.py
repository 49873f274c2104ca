"""Paths that may be local or in an object store, against a real S3 server on this machine."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import fsspec
import lance
import pyarrow as pa
import pyarrow.fs
import pytest

from engine import storage, stores
from engine.folders import listing
from engine.storage import Stat

ROOT = Path(__file__).parents[1]


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


def test_names_are_local_unless_they_name_a_store() -> None:
    assert not storage.is_remote("a/b.mp4")
    assert not storage.is_remote("/a: b/c.mp4")
    assert not storage.is_remote("file:///a.mp4")
    assert storage.is_remote("s3://bucket/a.mp4")
    assert storage.is_remote("gs://bucket/a.mp4")


def test_join_and_parent() -> None:
    assert storage.join("/data", "a", "b.mp4") == "/data/a/b.mp4"
    assert storage.join("s3://bucket/", "a/", "b.mp4") == "s3://bucket/a/b.mp4"
    assert storage.parent("/data/b.mp4") == "/data"
    assert storage.parent("s3://bucket/a/b.mp4") == "s3://bucket/a"
    assert storage.parent("s3://bucket/b.mp4") == "s3://bucket"


def test_absolute_keeps_links_and_store_uris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real" / "below").mkdir(parents=True)
    (tmp_path / "real" / "x.mp4").touch()
    (tmp_path / "link").symlink_to("real/below")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert storage.absolute("link/x.mp4") == f"{tmp_path}/link/x.mp4"
    assert storage.absolute("real/../real/x.mp4") == f"{tmp_path}/real/x.mp4"
    assert Path(storage.absolute("link/../x.mp4")).exists()  # beside `below`, not beside `link`
    assert storage.absolute("file:///a%20b.mp4") == "/a b.mp4"
    assert storage.absolute("~/x.mp4") == "/home/someone/x.mp4"
    assert storage.absolute("s3://b/../x.mp4") == "s3://b/../x.mp4"


def test_a_name_that_is_not_utf8_becomes_a_uri_that_finds_it(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 1.mp4")
    Path(path).write_bytes(b"content")
    uri = storage.absolute(path)
    assert uri == f"file://{tmp_path}/caf%E9%201.mp4"
    assert storage.is_text(uri)
    assert storage.read_bytes(uri) == b"content"
    assert storage.stat(uri).size_bytes == 7
    assert storage.kind(uri) == "file"


def test_small_files_are_written_read_and_deleted(root: str) -> None:
    uri = storage.join(root, "below", "ä b [1].json")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(uri)
    assert storage.kind(uri) is None
    storage.write_bytes(uri, b"one")
    storage.write_bytes(uri, b"three")
    assert storage.read_bytes(uri) == b"three"
    assert storage.kind(uri) == "file"
    assert storage.kind(storage.join(root, "below")) == "folder"
    assert storage.names_in(storage.join(root, "below")) == ["ä b [1].json"]
    assert storage.delete(uri)
    assert not storage.delete(uri)
    assert storage.names_in(storage.join(root, "below")) == []


def test_stat_tells_size_and_time_and_what_is_no_file(root: str) -> None:
    uri = storage.join(root, "below", "a.mp4")
    storage.write_bytes(uri, b"12345")
    found = storage.stat(uri)
    assert found.size_bytes == 5
    assert found.mtime_ns is not None and found.mtime_ns > 1.7e18
    etag = hashlib.md5(b"12345").hexdigest() if storage.is_remote(root) else None
    assert found.etag == etag
    assert [entry.stat for entry in listing(root)] == [found]  # else each run reads each file again
    with pytest.raises(FileNotFoundError):
        storage.stat(storage.join(root, "below", "b.mp4"))
    with pytest.raises(IsADirectoryError):
        storage.stat(storage.join(root, "below"))
    uris = [uri, storage.join(root, "b.mp4"), storage.join(root, "below")]
    assert storage.exists_many(uris) == [True, False, True]


def test_only_what_is_gone_counts_as_gone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    uris = [str(tmp_path / name) for name in ("file", "pipe", "link", "file/x", "nul\0")]
    assert storage.exists_many(uris) == [True, True, False, False, False]
    assert storage.exists_many(["nosuch://a/b.mp4"]) == [True]


def test_stat_of_a_time_is_exact() -> None:
    info = {"size": 1, "mtime": datetime(2026, 1, 1, microsecond=123457)}
    assert stores.stat_of(info) == Stat(1, 1767225600123457000, None)
    assert stores.stat_of({"size": None, "type": "file"}) == Stat(None, None, None)


def test_stat_never_opens_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.mp4")
    with pytest.raises(OSError, match="is a named pipe, not a file"):
        storage.stat(str(tmp_path / "x.mp4"))


def test_a_missing_bucket_is_not_found(s3: str) -> None:
    with pytest.raises(FileNotFoundError):
        storage.stat("s3://no-such-bucket/a.mp4")
    with pytest.raises(FileNotFoundError):
        list(listing("s3://no-such-bucket"))
    assert storage.names_in("s3://no-such-bucket/below") == []


def test_open_read_seeks_like_a_local_file(root: str) -> None:
    data = os.urandom(9_500_000)  # three blocks of a remote file, the last one short
    uri = storage.join(root, "a.mp4")
    storage.write_bytes(uri, data)
    truth = io.BytesIO(data)
    with storage.open_read(uri) as file:
        assert file.seekable()
        for offset, count in [
            (9_400_000, 200_000),
            (0, 10),
            (4_194_300, 10),
            (8_388_607, 2),
            (3, 0),
        ]:
            assert file.seek(offset) == truth.seek(offset)
            assert file.read(count) == truth.read(count)
            assert file.tell() == truth.tell()
        assert file.seek(-5, os.SEEK_END) == len(data) - 5
        assert file.read() == data[-5:]
        assert file.read(1) == b""
    assert storage.sha256(uri) == hashlib.sha256(data).hexdigest()
    assert storage.sha256(io.BytesIO(data)) == hashlib.sha256(data).hexdigest()


def test_an_object_replaced_while_open_is_an_error_not_a_mixture(s3: str) -> None:
    uri = f"{s3}/a.mp4"
    storage.write_bytes(uri, b"a" * 9_000_000)
    with storage.open_read(uri) as file:
        assert file.read(1) == b"a"
        storage.write_bytes(uri, b"b" * 9_000_000)
        file.seek(8_500_000)
        with pytest.raises(OSError, match="no longer exists"):
            file.read(1)


def test_fetch_gives_a_path_and_leaves_nothing_behind(root: str) -> None:
    uri = storage.join(root, "a.mp4")
    storage.write_bytes(uri, b"12345")
    with storage.fetch(uri, max_bytes=5) as path:
        assert Path(path).read_bytes() == b"12345"
        assert path.endswith(".mp4")
    assert Path(path).exists() == (not storage.is_remote(root))


def test_fetch_refuses_what_is_too_large(s3: str) -> None:
    storage.write_bytes(f"{s3}/a.mp4", b"12345")
    with (
        pytest.raises(ValueError, match="at most 4 bytes are read, and it has 5"),
        storage.fetch(f"{s3}/a.mp4", max_bytes=4),
    ):
        pass


def test_read_bytes_has_a_limit(root: str) -> None:
    for size in (0, 4, 5):
        uri = storage.join(root, str(size))
        storage.write_bytes(uri, b"x" * size)
        if size <= 4:
            assert storage.read_bytes(uri, max_bytes=4) == b"x" * size
        else:
            with pytest.raises(ValueError, match="at most 4 bytes are read, and it has 5"):
                storage.read_bytes(uri, max_bytes=4)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "missing"), max_bytes=4)


def test_of_eight_racing_writers_exactly_one_wins(root: str) -> None:
    for turn in range(5):
        uri = storage.join(root, "lease", str(turn))
        barrier = threading.Barrier(8)
        won: dict[int, bool] = {}

        def race(
            writer: int,
            uri: str = uri,
            barrier: threading.Barrier = barrier,
            won: dict[int, bool] = won,
        ) -> None:
            barrier.wait()
            won[writer] = storage.put_if_absent(uri, f"writer {writer}".encode())

        threads = [threading.Thread(target=race, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [writer for writer, result in won.items() if result]
        assert len(won) == 8
        assert len(winners) == 1
        assert storage.read_bytes(uri) == f"writer {winners[0]}".encode()
        assert storage.names_in(storage.join(root, "lease")) == [str(i) for i in range(turn + 1)]


def test_put_if_absent_asks_s3_for_the_condition_itself(s3: str, s3_server: str) -> None:
    """S3's own answer to the second writer is 412, so nothing was looked up first."""
    from botocore.exceptions import ClientError

    assert storage.put_if_absent(f"{s3}/a", b"1")
    fs, _ = stores.store_of(s3)
    with pytest.raises((FileExistsError, ClientError)) as refused:
        fs.pipe_file("bucket/a", b"2", mode="create")
    assert refused.value.__cause__.response["ResponseMetadata"]["HTTPStatusCode"] == 412
    assert not storage.put_if_absent(f"{s3}/a", b"2")
    assert storage.read_bytes(f"{s3}/a") == b"1"


def test_put_if_absent_refuses_a_store_that_cannot_promise_it() -> None:
    with pytest.raises(
        ValueError, match="needs a store that writes a name only where it is absent"
    ):
        storage.put_if_absent("hf://datasets/someone/videos/a", b"1")


def test_written_files_can_be_read_by_others(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        storage.put_if_absent(str(tmp_path / "a"), b"1")
        storage.write_bytes(str(tmp_path / "b"), b"1")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [0o644, 0o644]


def test_the_variables_alone_configure_fsspec_pyarrow_and_lance(s3: str) -> None:
    assert sorted(storage.aws_environment()) == [
        "AWS_ACCESS_KEY_ID",
        "AWS_DEFAULT_REGION",
        "AWS_ENDPOINT_URL",
        "AWS_SECRET_ACCESS_KEY",
    ]
    with fsspec.open(f"{s3}/from fsspec.txt", "wb") as file:
        file.write(b"fsspec")
    fs, path = pyarrow.fs.FileSystem.from_uri(s3)
    with fs.open_input_file(f"{path}/from fsspec.txt") as file:
        assert file.read() == b"fsspec"
    with fs.open_output_stream(f"{path}/from pyarrow.txt") as file:
        file.write(b"pyarrow")
    assert storage.read_bytes(f"{s3}/from pyarrow.txt") == b"pyarrow"
    table = pa.table({"uri": ["a.mp4", "b.mp4"]})
    options = storage.lance_options(f"{s3}/t.lance")
    for mode in ("create", "append"):
        lance.write_dataset(table, f"{s3}/t.lance", mode=mode, storage_options=options)
    found = lance.dataset(f"{s3}/t.lance", storage_options=options)
    assert found.to_table()["uri"].to_pylist() == ["a.mp4", "b.mp4"] * 2


WORKER = """
import os, sys
import lance, pyarrow.fs
from engine import storage, stores
os.environ.update({aws!r})
root = "s3://bucket"
fs, path = pyarrow.fs.FileSystem.from_uri(root)
options = storage.lance_options(root + "/t.lance")
print(
    storage.read_bytes(root + "/a.txt").decode(),
    fs.open_input_file(path + "/a.txt").read().decode(),
    lance.dataset(root + "/t.lance", storage_options=options).count_rows(),
)
"""


@pytest.mark.parametrize(
    "names",
    [
        {"AWS_ENDPOINT_URL": "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION": "AWS_DEFAULT_REGION"},
        {"AWS_ENDPOINT_URL": "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION": "AWS_REGION"},
    ],
    ids=["general", "of_s3"],
)
def test_a_worker_given_the_variables_reads_as_the_driver_does(
    s3: str, names: dict[str, str]
) -> None:
    storage.write_bytes(f"{s3}/a.txt", b"hello")
    lance.write_dataset(
        pa.table({"a": [1, 2]}), f"{s3}/t.lance", storage_options=storage.lance_options(s3)
    )
    aws = {names.get(name, name): value for name, value in storage.aws_environment().items()}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    done = subprocess.run(
        [sys.executable, "-c", WORKER.format(aws=aws)],
        env=clean | {"PYTHONPATH": str(ROOT), "AWS_EC2_METADATA_DISABLED": "true"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout == "hello hello 2\n", done.stderr


def test_lance_options_hold_no_secret(
    s3: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert storage.lance_options(f"{s3}/t.lance") == {
        "aws_endpoint": s3_server,
        "allow_http": "true",
        "aws_virtual_hosted_style_request": "false",
        "aws_region": "us-east-1",
    }
    assert storage.lance_options("/data/t.lance") is None
    assert storage.lance_options("gs://bucket/t.lance") is None
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://s3.example.org")
    assert "allow_http" not in storage.lance_options(s3)
    for name in storage.aws_environment():
        monkeypatch.delenv(name)
    assert storage.lance_options(f"{s3}/t.lance") is None


def test_a_store_that_does_not_answer_is_a_connection_error(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(ConnectionError, match=r"s3://bucket/a\.mp4"):
        storage.stat(f"{s3}/a.mp4")


def test_an_unknown_store_says_what_to_install() -> None:
    with pytest.raises(ValueError, match="nothing installed here opens viewfs://"):
        storage.stat("viewfs://a/b.mp4")


def test_a_store_that_only_pyarrow_opens_is_read_through_pyarrow(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if s3fs were not installed, which fsspec reports by an ImportError."""
    storage.write_bytes(f"{s3}/below/a b.mp4", b"12345")

    def not_installed(scheme: str) -> type:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", not_installed)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "so that the connection is made anew")
    assert storage.stat(f"{s3}/below/a b.mp4").size_bytes == 5
    assert [entry.uri for entry in listing(s3)] == [f"{s3}/below/a b.mp4"]
    with storage.open_read(f"{s3}/below/a b.mp4") as file:
        file.seek(3)
        assert file.read() == b"45"
    with pytest.raises(FileNotFoundError):
        storage.stat(f"{s3}/below/b.mp4")
    with pytest.raises(ValueError, match="pip install s3fs"):
        storage.put_if_absent(f"{s3}/lease", b"1")


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def test_listing_is_recursive_and_sorted_by_whole_names(root: str) -> None:
    names = ["a b.mp4", "a-b.mp4", "a.mp4", "a/b.mp4", "a/b/c.mp4", "a0.mp4", "Z.mp4", "é.mp4"]
    if not storage.is_remote(root):
        names.append("two\nlines.mp4")  # moto's routes know no such name
    for name in names:
        storage.write_bytes(storage.join(root, name), b"1")
    found = [entry.uri for entry in listing(root)]
    assert found == sorted(storage.join(root, name) for name in names)


def test_listing_follows_links_but_never_for_ever(tmp_path: Path) -> None:
    make(tmp_path, "root/a/x.mp4", "elsewhere/y.mp4")
    (tmp_path / "root/a/self").symlink_to(".")
    (tmp_path / "root/a/up").symlink_to("..")
    (tmp_path / "root/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "root")
    (tmp_path / "root/c.mp4").symlink_to("a/x.mp4")
    (tmp_path / "root/d.mp4").symlink_to("nowhere.mp4")
    (tmp_path / "root/e.mp4").symlink_to("e.mp4")
    root = tmp_path / "root"
    found = {entry.uri.removeprefix(f"{root}/"): entry for entry in listing(str(root))}
    assert list(found) == ["a/x.mp4", "b/y.mp4", "c.mp4", "d.mp4", "e.mp4"]
    assert found["c.mp4"].stat == found["a/x.mp4"].stat
    assert found["d.mp4"].stat is None
    assert found["d.mp4"].error == "a broken link to 'nowhere.mp4'"
    assert found["e.mp4"].error == "a broken link to 'e.mp4'"


def test_listing_of_a_deep_folder(tmp_path: Path) -> None:
    deep = str(tmp_path)
    for _ in range(1200):  # deeper than Python's recursion goes
        deep += "/d"
        os.mkdir(deep)
    Path(deep, "x.mp4").touch()
    assert [entry.uri for entry in listing(str(tmp_path))] == [f"{deep}/x.mp4"]
    Path(deep, "x.mp4").unlink()
    os.removedirs(deep)


def test_listing_gives_what_is_closed_or_special_as_an_entry(root: str) -> None:
    storage.write_bytes(storage.join(root, "x.mp4", "part", "y.mp4"), b"1")
    storage.write_bytes(storage.join(root, "x.mp4", "z.mp4"), b"1")
    storage.write_bytes(storage.join(root, "y.mp4"), b"1")
    found = list(listing(root, closed=lambda name: name.endswith(".mp4")))
    assert [entry.uri for entry in found] == [storage.join(root, n) for n in ("x.mp4", "y.mp4")]
    assert (found[0].error, found[0].folder) == ("is a folder, not a file", True)
    assert found[1].error is None


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


@pytest.fixture
def open_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that another user may reach (pytest's own are for its user alone)."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_listing_names_folders_that_it_may_not_read(open_folder: Path) -> None:
    make(open_folder, "open/x.mp4", "shut/y.mp4")
    (open_folder / "shut").chmod(0)
    (open_folder / "open/x.mp4").chmod(0)

    def check() -> None:
        opened, shut = listing(str(open_folder))
        assert opened.stat is not None and opened.stat.size_bytes == len("open/x.mp4")
        assert shut.uri == f"{open_folder}/shut"
        assert shut.error == "a folder that cannot be read (Permission denied)"
        with pytest.raises(PermissionError):
            storage.open_read(opened.uri)
        with pytest.raises(PermissionError):
            storage.stat(f"{open_folder}/shut/y.mp4")
        assert storage.exists_many([f"{open_folder}/shut/y.mp4"]) == [True]

    as_nobody(check)
    (open_folder / "shut").chmod(0o755)


def test_a_folder_is_removed_with_all_below_it(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").touch()
    storage.delete_folder(str(tmp_path / "a"))
    storage.delete_folder(str(tmp_path / "a"))
    assert list(tmp_path.iterdir()) == []
