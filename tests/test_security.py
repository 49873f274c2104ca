"""What neither a manifest, nor a dataset, nor a checkpoint can make this program do."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import lance
import pyarrow as pa
import pytest
from conftest import REPOSITORY, Bucket, Run, rows

from engine import blobs, logs, roots, storage
from engine.cutter import place_of
from engine.roots import NotAllowed
from engine.schema import TABLES
from engine.tables import Writer, create

PACKAGES = ("engine", "pipelines", "trainers", "evals", "cluster")


@pytest.fixture
def allow(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the allowed roots."""
    return lambda *named, by=",": monkeypatch.setenv(roots.VARIABLE, by.join(map(str, named)))


def made(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# Allowed roots

OPENS = {
    "stat": storage.stat,
    "kind": storage.kind,
    "names_in": storage.names_in,
    "open_read": lambda uri: storage.open_read(uri).close(),
    "fetch": lambda uri: storage.fetch(uri).__enter__(),
    "read_bytes": storage.read_bytes,
    "sha256": storage.sha256,
    "write_bytes": lambda uri: storage.write_bytes(uri, b""),
    "put_if_absent": lambda uri: storage.put_if_absent(uri, b""),
    "make_folder": storage.make_folder,
    "delete": storage.delete,
    "delete_folder": storage.delete_folder,
    "allowed_path": storage.allowed_path,
}


@pytest.mark.parametrize("opens", OPENS.values(), ids=OPENS)
def test_nothing_is_opened_or_changed_outside(opens, allow, tmp_path: Path) -> None:
    outside = made(tmp_path / "theirs" / "a.mp4")
    (tmp_path / "ours").mkdir()
    link = tmp_path / "ours" / "link.mp4"
    link.symlink_to(outside)
    (tmp_path / "ours" / "folder").symlink_to(outside.parent)
    made(tmp_path / "ours-too" / "a.mp4")
    allow(tmp_path / "ours", "s3://bucket/ours")
    refused = [
        outside,
        f"file://{outside}",
        link,
        tmp_path / "ours" / "folder" / "a.mp4",
        f"{tmp_path}/ours/../theirs/a.mp4",
        tmp_path / "ours-too" / "a.mp4",
        "s3://bucket/theirs/a.mp4",
        "s3://bucket/ours/../theirs/a.mp4",
        "s3://bucket/ours-too/a.mp4",
        "s3://other/ours/a.mp4",
        "gs://bucket/ours/a.mp4",
    ]
    before = sorted(p.name for p in tmp_path.rglob("*"))
    for uri in map(str, refused):
        with pytest.raises(NotAllowed) as caught:
            opens(uri)
        said = str(caught.value)
        assert uri.removeprefix("file://") in said and "outside REELWRIGHT_ALLOWED_ROOTS" in said
        assert "\n" not in said and str(tmp_path / "ours") in said
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("by", [",", ":", " ", ", "])
def test_what_is_inside_is_as_ever(by: str, allow, tmp_path: Path) -> None:
    one, other = made(tmp_path / "a" / "x.mp4"), made(tmp_path / "b" / "y.mp4")
    (tmp_path / "a" / "back.mp4").symlink_to(other)
    (tmp_path / "linked").symlink_to(tmp_path / "a")  # a root may be named by a link
    allow(tmp_path / "linked", "memory://held", f"{tmp_path}/b/", by=by)
    for path in (one, other, tmp_path / "a" / "back.mp4"):
        assert storage.read_bytes(str(path)) == b"x"
    storage.write_bytes("memory://held/z", b"z")
    assert storage.read_bytes("memory://held/z") == b"z"
    with pytest.raises(NotAllowed):
        storage.read_bytes("memory://free/z")
    storage.delete_folder("memory://held")


@pytest.mark.parametrize("wrong", ["data/videos", "http://host/videos", "s4://bucket"])
def test_roots_that_are_none_are_said_and_open_nothing(wrong: str, allow, tmp_path: Path) -> None:
    allow(wrong)
    for opens in OPENS.values():
        with pytest.raises(ValueError, match="REELWRIGHT_ALLOWED_ROOTS: needs absolute folders"):
            opens(str(tmp_path / "a"))


ALWAYS = [
    "http://169.254.169.254/latest/meta-data",
    "https://example.org/a.mp4",
    "ftp://example.org/a.mp4",
    "HTTP://example.org/a.mp4",
    "zip://a.mp4::file:///etc/passwd",
    "pipe://0",
    "data://text/a",
    "/proc/self/environ",
    "/proc/self/root/etc/passwd",
    "/dev/zero",
    "/sys/kernel/notes",
    "file:///proc/self/environ",
    "/tmp/../proc/self/environ",
]


@pytest.mark.parametrize("uri", ALWAYS)
def test_what_is_never_opened(uri: str, allow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(roots.VARIABLE, raising=False)
    for opens in OPENS.values():
        with pytest.raises(NotAllowed):
            opens(uri)
    allow("/")
    with pytest.raises(NotAllowed):
        storage.open_read(uri)


@pytest.mark.parametrize("name", ["environ.mp4", "self/environ", "self/fd/../environ", "below"])
def test_a_link_to_what_is_never_opened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(roots.VARIABLE, raising=False)
    (tmp_path / "environ.mp4").symlink_to("/proc/self/environ")
    (tmp_path / "self").symlink_to("/proc/self")
    (tmp_path / "below").symlink_to("self/environ")
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path / name), name, f"file://{tmp_path / name}"):
        with pytest.raises(NotAllowed, match="nothing in there is opened"):
            storage.open_read(path)


def test_installed_packages_are_neither_changed_nor_read_but_for_prompts(
    allow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = made(tmp_path / "packages" / "vbench" / "prompts.txt")
    code = made(tmp_path / "packages" / "engine" / "code.py")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "packages"))
    roots._read.cache_clear()
    allow(tmp_path / "ours")
    assert storage.read_bytes(str(prompts)) == b"x"
    for path, opens in ((prompts, storage.delete), (code, storage.delete), (code, storage.stat)):
        with pytest.raises(NotAllowed):
            opens(str(path))


@pytest.mark.parametrize("root", ["/ds", "s3://bucket/ds"])
def test_a_table_of_cuts_names_no_file_outside_its_dataset(root: str) -> None:
    """Such files are deleted when clips are cut anew or forgotten."""
    assert place_of(root, "cuts/ab/ab.mp4") == f"{root}/cuts/ab/ab.mp4"
    for name in ("/home/me/a.py", "../../home/me/a.py", "cuts/../../a", "s3://bucket/a",
                 "file:///home/me/a.py", "//home/me"):  # fmt: skip
        place = place_of(root, name)
        assert place.startswith(f"{root}/") and ".." not in place


def test_a_store_may_be_named_with_its_port(allow, tmp_path: Path) -> None:
    allow("hdfs://namenode:8020/data", tmp_path, "s3://bucket", by=":")
    roots.check_remote("hdfs://namenode:8020/data/a.mp4")
    roots.check_local(str(tmp_path / "a.mp4"))
    roots.check_remote("s3://bucket/a.mp4")
    for outside in ("hdfs://namenode:9000/data/a.mp4", "hdfs://namenode:8020/a.mp4"):
        with pytest.raises(NotAllowed):
            roots.check_remote(outside)


@pytest.mark.slow
def test_refused_names_of_a_manifest_become_failed_rows(curate, allow, tmp_path, samples) -> None:
    """Nothing is lost: good rows are made, refused ones stay failed until the roots change."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    theirs.mkdir()
    shutil.copy(samples / "coins.jpg", theirs / "secret.jpg")
    ours.mkdir()
    shutil.copy(samples / "coins.jpg", ours / "good.jpg")
    (ours / "link.jpg").symlink_to(theirs / "secret.jpg")
    named = ["good.jpg", "link.jpg", str(theirs / "secret.jpg"), "/etc/passwd",
             "http://169.254.169.254/a.jpg", "concat:good.jpg|/etc/passwd", "pipe:0"]  # fmt: skip
    manifest = made(ours / "list.csv", "uri\n" + "\n".join(named))
    listed = ours / "listed" / "link.jpg"
    listed.parent.mkdir()
    listed.symlink_to(theirs / "secret.jpg")
    allow(ours)
    result = curate([manifest, listed.parent], ours / "set")
    assert result.accounts.faults == ()
    found = {r["uri"]: r for r in rows(ours / "set", "sources")}
    assert len(found) == len(named) + 1
    assert [uri for uri, r in found.items() if r["state"] == "done"] == [str(ours / "good.jpg")]
    for uri in (*map(str, (ours / "link.jpg", theirs / "secret.jpg")), "/etc/passwd"):
        said = f"cannot be read: is outside REELWRIGHT_ALLOWED_ROOTS ({ours})"
        assert found[uri]["error"].startswith(said) and found[uri]["transient"]
    assert "is of http://" in found["http://169.254.169.254/a.jpg"]["error"]
    # a folder is listed without a look behind its links: the worker is the one who refuses
    refused = found[str(listed)]
    assert (refused["state"], refused["error_type"]) == ("failed", "NotAllowed")
    assert refused["transient"]
    # and when they are allowed, the same command reads them
    allow(ours, theirs)
    curate([manifest, listed.parent], ours / "set")
    found = {r["uri"]: r["state"] for r in rows(ours / "set", "sources")}
    assert found[str(theirs / "secret.jpg")] in ("done", "duplicate")
    assert found["/etc/passwd"] == "failed"


def test_a_dataset_outside_is_one_line(run: Run, samples: Path, tmp_path: Path) -> None:
    env = {roots.VARIABLE: str(tmp_path)}
    done = run("curate", "--src", samples / "coins.jpg", "--dst", tmp_path / "set", env=env)
    assert done.code == 2 and "outside REELWRIGHT_ALLOWED_ROOTS" in done.err
    assert len(done.err.splitlines()) == 1


def test_another_tenants_bucket_is_refused(bucket: Bucket, allow, tmp_path: Path) -> None:
    bucket.put("ours/a.txt", b"ours")
    bucket.put("theirs/a.txt", b"theirs")
    allow(f"{bucket.uri}/ours")
    assert storage.read_bytes(f"{bucket.uri}/ours/a.txt") == b"ours"
    assert storage.names_in(f"{bucket.uri}/ours") == ["a.txt"]
    for uri in (f"{bucket.uri}/theirs/a.txt", bucket.uri, f"s3a://{bucket.uri[5:]}/theirs/a.txt"):
        with pytest.raises(NotAllowed):
            storage.open_read(uri)


@pytest.mark.parametrize("own", ["/data/of/this/machine", ""])
def test_roots_of_a_machine_stand_where_a_driver_has_others(
    own: str, allow, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow("/")
    monkeypatch.setenv(logs.VARIABLE, "json")
    given = storage.worker_environment()
    monkeypatch.setenv(roots.VARIABLE, own)
    monkeypatch.setenv(logs.VARIABLE, "text")
    storage.take_environment(given.items())
    assert os.environ[roots.VARIABLE] == (own or "/")
    assert os.environ[logs.VARIABLE] == "json"


# Blobs


@pytest.fixture
def pictures(tmp_path: Path) -> lance.LanceDataset:
    """Two rows: a picture, and the address of a file of somebody else."""
    secret = made(tmp_path / "secret.txt", "secret")
    schema = pa.schema([pa.field("clip_id", pa.string()), lance.blob_field("jpeg")])
    table = pa.table(
        [pa.array(["a", "b"]), lance.blob_array([b"a picture", f"file://{secret}"])], schema=schema
    )
    return lance.write_dataset(
        table,
        str(tmp_path / "keyframes.lance"),
        data_storage_version="2.2",
        allow_external_blob_outside_bases=True,
    )


def test_a_blob_that_lies_elsewhere_is_not_read(pictures: lance.LanceDataset) -> None:
    assert pictures.take_blobs("jpeg", indices=[1])[0].read() == b"secret"  # as Lance has it
    for name in ("indices", "ids", "addresses"):
        (good,) = blobs.take_blobs(pictures, "jpeg", **{name: [0]})
        assert good.read() == b"a picture"
        with pytest.raises(NotAllowed, match=r"secret\.txt: lies outside of .*keyframes\.lance"):
            blobs.take_blobs(pictures, "jpeg", **{name: [0, 1]})
    assert blobs.read_blobs(pictures, "jpeg", [0]) == [(0, b"a picture")]
    with pytest.raises(NotAllowed):
        blobs.read_blobs(pictures, "jpeg", [1, 0])
    assert blobs.take_blobs(pictures, "jpeg", ids=[]) == []


# What the code does not do


NODES = [
    (path.relative_to(REPOSITORY).as_posix(), node)
    for package in PACKAGES
    for path in sorted((REPOSITORY / package).rglob("*.py"))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
]
CALLS = [(where, n, ast.unparse(n.func)) for where, n in NODES if isinstance(n, ast.Call)]
"""Each call in our packages: where, the node, and the dotted name that is called."""


def keyword(node: ast.Call, name: str) -> str | None:
    found = [ast.unparse(k.value) for k in node.keywords if k.arg == name]
    return found[0] if found else None


def test_weights_are_loaded_as_nothing_but_weights() -> None:
    loads = [(where, node) for where, node, name in CALLS if name.endswith("torch.load")]
    assert len(loads) >= 5
    unsafe = [(w, ast.unparse(n)) for w, n in loads if keyword(n, "weights_only") != "True"]
    # VBench's own, by a reader that imports three names and makes nothing else of a file's classes
    assert unsafe == [
        (
            "evals/vbench_worker.py",
            "torch.load(path, **named, weights_only=False, pickle_module=reader)",
        )
    ]
    others = [
        where
        for where, node, _ in CALLS
        if keyword(node, "weights_only") not in (None, "True") and (where, node) not in loads
    ]
    assert others == ["engine/clip.py"]  # OpenAI's archives, told by their hashes
    assert not [w for w, _, name in CALLS if name.endswith("jit.load")]


def test_code_is_not_made_of_data() -> None:
    banned = {"eval", "exec", "os.system", "os.popen", "marshal.loads", "joblib.load", "dill.loads"}
    assert [(w, name) for w, _, name in CALLS if name in banned] == []
    for where, node, name in CALLS:
        assert keyword(node, "shell") in (None, "False"), where
        assert keyword(node, "allow_pickle") in (None, "False"), where
        if re.search(r"yaml\.(load|unsafe_load|full_load)(_all)?$", name):
            assert "Safe" in (keyword(node, "Loader") or ""), where


def test_pickles_are_read_only_from_this_very_run() -> None:
    """What Ray carries between a driver and its actors, and nothing that lies in a file."""
    reads = {(w, ast.unparse(n)) for w, n, name in CALLS if re.search(r"pickle\.loads?$", name)}
    assert {text for _, text in reads} == {
        "pickle.loads(u)", "pickle.loads(unit)", "pickle.loads(item)",
        "pickle.loads(request.recipe or b'')",
    }  # fmt: skip
    assert {where for where, _ in reads} == {
        "engine/worker.py", "engine/cutter.py", "engine/pipeline.py", "trainers/filler.py",
        "evals/generating.py", "evals/importing.py", "evals/scoring.py", "cluster/probe.py",
    }  # fmt: skip


def test_a_models_own_code_is_asked_for_by_one_flag_alone() -> None:
    given = {(w, keyword(n, "trust_remote_code")) for w, n, _ in CALLS}
    given = {(where, value) for where, value in given if value not in (None, "False")}
    assert given == {("engine/chat.py", "remote")}  # --trust-model-code, which repeats its name


def test_auto_classes_never_ask_a_question() -> None:
    """Without the word transformers asks on the terminal whether to run a checkpoint's code."""
    for where, node, name in CALLS:
        if re.search(r"\bAuto\w+\.from_pretrained$|DiffusionPipeline\.from_pretrained$", name):
            assert keyword(node, "trust_remote_code"), f"{where}: {ast.unparse(node)}"


def test_blobs_are_taken_in_one_place() -> None:
    takes = {w for w, n, _ in CALLS if isinstance(n.func, ast.Attribute)
             and n.func.attr in ("take_blobs", "read_blobs")}  # fmt: skip
    assert takes == {"engine/blobs.py"}


def test_files_are_opened_by_name_in_few_places() -> None:
    """Of `local_path`, which looks at no root: only what works on names alone may ask it."""
    users = {w for w, _, name in CALLS if name == "storage.local_path"}
    assert users <= {
        "engine/clipfiles.py", "engine/exporting.py", "engine/cutter.py", "engine/sources.py",
        "evals/importing.py", "evals/models.py", "evals/exports.py", "trainers/cache.py",
        "cluster/dashboard/playable.py",
    }  # fmt: skip
    takers = {w for w, _, name in CALLS if name.endswith(("store_of", "fsspec.open"))}
    assert takers <= {"engine/storage.py", "engine/stores.py", "engine/folders.py",
                      "engine/cutter.py"}  # fmt: skip


def test_nothing_listens_on_all_addresses() -> None:
    everywhere = {"0.0.0.0", "::", "[::]"}
    found = [
        (where, node.value)
        for where, node in NODES
        if isinstance(node, ast.Constant) and node.value in everywhere
    ]
    assert found == []


# No pickle in tables


def test_tables_hold_no_objects() -> None:
    """The one binary columns are pictures, videos and encoders' tensors, each with its format."""
    binary = {
        (name, field.name)
        for name, schema in TABLES.items()
        for field in schema
        if re.search(r"binary|blob|pickle", str(field.type), re.I)
    }
    assert binary == {
        ("keyframes", "jpeg"), ("cuts", "mp4"), ("generations", "mp4"), ("features", "data")
    }  # fmt: skip
    for schema in TABLES.values():
        for field in schema:
            assert "object" not in str(field.type) and "pickle" not in str(field.metadata)


def test_what_a_commit_says_is_json(tmp_path: Path) -> None:
    create(str(tmp_path / "set"), "classic")
    Writer(str(tmp_path / "set"), "run").record()
    table = lance.dataset(str(tmp_path / "set" / "sources.lance"))
    said = [table.read_transaction(v["version"]).transaction_properties for v in table.versions()]
    told = {key: value for one in said for key, value in (one or {}).items()}
    assert isinstance(json.loads(told["operators"]), dict)
    for value in told.values():
        assert value.isprintable()
    files = (p for p in (tmp_path / "set").rglob("*") if p.is_file())
    assert not [p for p in files if b"\x80\x04\x95" in p.read_bytes()[:4096]]  # how pickles begin


# Checkpoints


class Touch:
    """Pickled, it makes a file when it is read by what runs code in pickles."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that code of a checkpoint would make: it is not there afterwards."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists(), "code that lies in a checkpoint was run"


def test_a_pickle_in_place_of_weights_is_not_run(marker: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from engine.aesthetic import AestheticScore
    from engine.clip import ClipModel
    from engine.weights import Weights

    file = tmp_path / "head.pth"
    torch.save({"layers.0.weight": torch.zeros(1), "more": Touch(marker)}, file)
    with pytest.raises(ValueError, match=r"head\.pth"):
        AestheticScore(weights=Weights(at=str(file))).load()
    with pytest.raises(ValueError, match=r"head\.pth"):
        ClipModel(weights=Weights(at=str(file))).load("image")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file)


def test_an_archive_of_code_is_told_by_its_hash_before_it_is_loaded(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from engine.clip import ClipModel
    from engine.weights import Weights

    file = tmp_path / "ViT-L-14.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    with pytest.raises(ValueError, match="a TorchScript archive, which can hold code, and not Op"):
        ClipModel(weights=Weights(at=str(file))).load("image")


def test_wrong_weights_of_vbench_are_refused_before_they_are_loaded(
    marker: Path, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    from evals.cache import needed
    from evals.native import Native

    for weight in needed(["appearance_style"]):
        (tmp_path / weight.path).parent.mkdir(parents=True)
        torch.save({"more": Touch(marker)}, tmp_path / weight.path)
    with pytest.raises(ValueError, match="its sha256 should be 40d365715913c9da98579312b702a82c"):
        Native(dimensions=("appearance_style",), cache=str(tmp_path)).load()


CODE = "import pathlib\npathlib.Path({marker!r}).touch()\n"


def test_the_package_loads_only_weights_where_it_says_otherwise(
    marker: Path, tmp_path: Path
) -> None:
    """pyiqa reads MUSIQ's file, and torch.hub DINO's, with whatever code is in them."""
    torch = pytest.importorskip("torch")
    arch_util = pytest.importorskip("pyiqa.archs.arch_util")
    from evals import vbench_worker

    file = tmp_path / "weights.pth"
    torch.save({"weight": torch.ones(1, 1), "more": Touch(marker)}, file)
    with vbench_worker._inert(arch_util), pytest.raises(RuntimeError, match="Unexpected key"):
        arch_util.load_pretrained_network(torch.nn.Linear(1, 1, bias=False), str(file))
    hub = made(
        tmp_path / "hub" / "hubconf.py",
        "import torch\ndef dino(**_):\n"
        "    return torch.hub.load_state_dict_from_url("
        f"'file://{file}', model_dir={str(tmp_path)!r}, file_name='copy.pth')\n",
    )
    with pytest.raises(pickle.UnpicklingError):
        vbench_worker._hub({"repo_or_dir": str(hub.parent), "model": "dino", "source": "local"})


@pytest.fixture
def with_code(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder that brings code of its own; nobody at the terminal is there to be asked."""
    dynamic = pytest.importorskip("transformers.dynamic_module_utils")
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    folder = tmp_path / "model"
    own = {
        "AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model",
        "AutoTokenizer": ["own.Tokenizer", None], "AutoProcessor": "own.Processor",
        "AutoModel": "own.Model", "AutoModelForImageTextToText": "own.Model",
    }  # fmt: skip
    config = {"model_type": "own", "architectures": ["Model"], "auto_map": own}
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        made(folder / name, json.dumps(config))
    made(folder / "tokenizer.json", "{}")
    made(folder / "own.py", CODE.format(marker=str(marker)))
    return folder


def test_code_of_a_checkpoint_never_runs(with_code: Path, tmp_path: Path) -> None:
    from engine.chat import TransformersChat
    from engine.weights import Weights
    from trainers.language import LanguageModel
    from trainers.semantics import SemanticEncoder

    weights = Weights(at=str(with_code))
    loads = {
        "captioner": lambda: TransformersChat(weights=weights).open(),
        "llm": lambda: LanguageModel(weights=weights).check(),
        "encoder": lambda: SemanticEncoder(kind="vjepa2", weights=weights).check(),
    }
    for what, load in loads.items():
        with pytest.raises(ValueError, match=r"\w") as caught:
            load()
        assert "\n" not in str(caught.value), what
    # of a type that transformers knows, its own class is used and that of the folder is not
    config = json.loads((with_code / "config.json").read_text()) | {"model_type": "qwen2"}
    (with_code / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the tokenizer of .* cannot be loaded"):
        LanguageModel(weights=weights).check()


def test_an_evaluated_pipeline_runs_no_code_of_its_folder(with_code: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from evals.loading import settings_of_diffusers

    pipeline = tmp_path / "pipeline"
    index = {"_class_name": "WanPipeline", "tokenizer": ["transformers", "AutoTokenizer"]}
    made(pipeline / "model_index.json", json.dumps(index))
    shutil.copytree(with_code, pipeline / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer of .* comes with code of its own"):
        settings_of_diffusers("a", pipeline)
