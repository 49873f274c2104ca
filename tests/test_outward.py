"""From raw files to what leaves a dataset: curate with cuts, export, forget, by the commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import av
import pytest
from conftest import Run, rows

pytestmark = pytest.mark.slow


def test_what_is_kept_is_cut_exported_and_forgotten(
    samples: Path, tmp_path: Path, run: Run
) -> None:
    src, dst, out = tmp_path / "src", tmp_path / "set", tmp_path / "out"
    src.mkdir()
    for name in ("coffee_pan.mp4", "coffee_pan.txt", "vfr.mp4", "static.mp4"):
        shutil.copy(samples / name, src / name)
    ran = run("curate", "--src", src, "--dst", dst, "--cut", "encode", "--json")
    assert ran.code == 0, ran.err
    kept = {c["clip_id"]: c for c in rows(dst, "clips") if c["kept"]}
    cuts = {c["clip_id"]: c for c in rows(dst, "cuts")}
    assert cuts.keys() == kept.keys() and len(kept) == 2, "survivors only"
    for clip_id, cut in cuts.items():
        assert cut["error"] is None and cut["num_frames"] == kept[clip_id]["num_frames"]
        with av.open(str(dst / cut["path"])) as made:
            assert sum(1 for _ in made.decode(video=0)) == cut["num_frames"]

    again = run("curate", "--src", src, "--dst", dst, "--cut", "encode", "--json")
    assert again.code == 0 and rows(dst, "cuts") == list(cuts.values()), "nothing is cut twice"

    ran = run("export", dst, "--format", "hf", "--dst", out, "--caption", "caption_original")
    assert ran.code == 0, ran.err
    (line,) = (out / "metadata.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["caption" if "caption" in row else "text"].startswith("A slow pan over a cup")
    assert (out / row["file_name"]).is_file()

    ran = run("forget", src / "coffee_pan.mp4", "--dst", dst)
    assert ran.code == 0, ran.err
    assert {Path(c["source_uri"]).name for c in rows(dst, "clips")} == {"vfr.mp4", "static.mp4"}
    assert len(rows(dst, "cuts")) == 1
    (src / "coffee_pan.mp4").unlink()
    ran = run("curate", "--src", src, "--dst", dst, "--json")
    assert ran.code == 0 and ran.json["clips"]["kept"] == 1
