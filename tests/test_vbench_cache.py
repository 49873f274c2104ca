"""Weights that VBench looks for: all missing ones are named at once, wrong ones too."""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from evals import cache
from evals.dimensions import DIMENSIONS, VBENCH

BPE = "ViCLIP/bpe_simple_vocab_16e6.txt.gz"


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VBENCH_CACHE_DIR", raising=False)


def fill(folder: Path, *dimensions: str, data: bytes = b"weights") -> None:
    """Files of the right names that hold something else."""
    for weight in cache.needed(dimensions):
        (folder / weight.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / weight.path).write_bytes(data)


def test_each_dimension_says_what_it_needs() -> None:
    assert cache.WEIGHTS.keys() == DIMENSIONS.keys()
    assert [name for name in VBENCH if not cache.needed([name])] == ["temporal_flickering"]
    names = [w.path for w in cache.needed(["background_consistency", "appearance_style"])]
    assert names == ["clip_model/ViT-B-32.pt"]


def test_the_package_looks_for_just_these_files() -> None:
    """Every file below CACHE_DIR that the installed package names."""
    spec = find_spec("vbench")
    if spec is None or spec.origin is None:
        pytest.skip("vbench is not installed")
    known = {w.path for name in VBENCH for w in cache.needed([name])}
    source = Path(spec.origin).with_name("utils.py").read_text(encoding="utf-8")
    looked_for = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr) and "CACHE_DIR" in ast.unparse(node.values[0]):
            path = "".join(part.value for part in node.values[1:] if isinstance(part, ast.Constant))
            looked_for.add(path.strip("/"))
    files = {path for path in looked_for if path.endswith((".pt", ".pth", ".gz"))}
    assert len(files) == 10
    assert files <= known
    urls = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    fetched = " ".join(w.fetch for name in VBENCH for w in cache.needed([name]))
    for url in (u for u in urls if isinstance(u, str) and u.startswith("https://")):
        assert url in fetched


def test_the_folder_is_as_named_else_as_the_package_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache.folder() == Path.home() / ".cache" / "vbench"
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "set"))
    assert cache.folder() == tmp_path / "set"
    assert cache.folder(str(tmp_path / "named")) == tmp_path / "named"


def test_all_that_is_missing_is_named_at_once_with_its_command(tmp_path: Path) -> None:
    dimensions = ("temporal_flickering", "subject_consistency", "motion_smoothness", "scene")
    with pytest.raises(ValueError, match="7 files of weights missing") as error:
        cache.check(dimensions, tmp_path)
    text = str(error.value)
    for weight in cache.needed(dimensions):
        assert weight.path in text.splitlines()[0]
        assert weight.fetch in text
    assert "CC BY-NC 4.0" in text
    assert f"cd {tmp_path}" in text

    fill(tmp_path, "subject_consistency", "scene")
    with pytest.raises(ValueError, match="1 file of weights missing") as error:
        cache.check(dimensions, tmp_path)
    assert "amt-s.pth" in str(error.value)
    assert "dino" not in str(error.value)

    fill(tmp_path, "motion_smoothness")
    cache.check(dimensions, tmp_path)


def test_an_empty_file_is_a_missing_one(tmp_path: Path) -> None:
    fill(tmp_path, "dynamic_degree", data=b"")
    assert [w.path for w in cache.missing(["dynamic_degree"], tmp_path)] == [
        "raft_model/models/raft-things.pth"
    ]


def test_weights_of_a_wrong_hash_are_named_with_both(tmp_path: Path) -> None:
    fill(tmp_path, "background_consistency", "imaging_quality")
    found = hashlib.sha256(b"weights").hexdigest()
    with pytest.raises(ValueError, match="sha256 should be") as error:
        cache.check(["background_consistency", "imaging_quality"], tmp_path)
    clip, musiq = str(error.value).splitlines()[:2]
    assert "ViT-B-32.pt" in clip
    assert "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af" in clip
    assert found in clip
    assert "358bb6af…" in musiq
    assert found in musiq
    assert f"  rm {cache.needed(['imaging_quality'])[0].path}" in str(error.value).splitlines()

    # A cache that the project built has no known hashes.
    (tmp_path / cache.MARKER).write_text(json.dumps({}))
    cache.check(["background_consistency", "imaging_quality"], tmp_path)
    with pytest.raises(ValueError, match=r"raft-things\.pth"):
        cache.check(["dynamic_degree"], tmp_path)


def test_a_replaced_file_is_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = hashlib.sha256(b"right weights").hexdigest()
    weight = cache.Weight(path="a/b.pt", fetch="wget b", sha256=right, about="B")
    monkeypatch.setitem(cache.WEIGHTS, "imaging_quality", (weight,))
    fill(tmp_path, "imaging_quality")
    with pytest.raises(ValueError, match=right):
        cache.check(["imaging_quality"], tmp_path)
    fill(tmp_path, "imaging_quality", data=b"right weights")
    cache.check(["imaging_quality"], tmp_path)


def test_weights_are_told_apart_by_what_they_hold(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    fill(one, "motion_smoothness", "temporal_style")
    fill(other, "motion_smoothness", "temporal_style")
    dimensions = ["temporal_flickering", "motion_smoothness", "temporal_style"]
    assert cache.weights_of(dimensions, one) == cache.weights_of(dimensions, other)
    assert list(cache.weights_of(dimensions, one)) == [w.path for w in cache.needed(dimensions)]
    fill(other, "motion_smoothness", data=b"others")
    assert cache.weights_of(dimensions, one) != cache.weights_of(dimensions, other)
    assert cache.weights_of(["temporal_flickering"], other) == {}
    with pytest.raises(ValueError, match=r"raft-things\.pth"):
        cache.weights_of(["dynamic_degree"], one)


def test_what_is_no_dimension_is_said() -> None:
    with pytest.raises(ValueError, match="no dimension sharpness: there are subject_consistency"):
        cache.needed(["sharpness"])


def test_commands_that_need_no_network_do_what_they_say(tmp_path: Path) -> None:
    if find_spec("clip") is None:
        pytest.skip("openai-clip is not installed")
    dino = "dino_model/dino_vitbase16_pretrain.pth"
    fill(tmp_path, "subject_consistency")
    (tmp_path / "torch_home/hub/checkpoints/dino_vitbase16_pretrain.pth").unlink()
    for weight in cache.needed(["subject_consistency", "temporal_style"]):
        if "https://" not in weight.fetch:
            subprocess.run(weight.fetch, shell=True, check=True, cwd=tmp_path)
    link = tmp_path / "torch_home/hub/checkpoints/dino_vitbase16_pretrain.pth"
    assert link.samefile(tmp_path / dino)
    assert (tmp_path / BPE).is_file()
    with pytest.raises(ValueError, match=r"^1 file of weights missing") as error:
        cache.check(["subject_consistency", "temporal_style"], tmp_path)
    assert "sha256" not in str(error.value)  # the copied one is right
    assert "ViClip-InternVid" in str(error.value)


def test_looking_for_weights_imports_no_torch() -> None:
    code = "import sys, evals.cache; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_the_table_has_all_dimensions_of_the_package() -> None:
    rows = {row.dimension: row for row in cache.table()}
    assert tuple(rows) == VBENCH
    assert rows["scene"].environment == "pinned"
    assert rows["color"].environment == "detectron2"
    assert rows["temporal_flickering"] == ("temporal_flickering", "here", ())
    assert rows["imaging_quality"].files == ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",)
