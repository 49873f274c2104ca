"""The same run against a local S3 server: sources and dataset both remote."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import Bucket, Cluster, Run, rows

pytestmark = pytest.mark.slow


def test_a_run_from_s3_to_s3_gives_the_rows_of_a_local_one(
    bucket: Bucket, cluster: Cluster, samples: Path, tmp_path: Path, run: Run
) -> None:
    local = tmp_path / "local"
    local.mkdir()
    for name in ("coffee_pan.mp4", "dark.mp4", "truncated.mp4", "same_as_coffee_pan.mp4"):
        shutil.copy2(samples / name, local)
        bucket.put(f"videos/{name}", (samples / name).read_bytes())
    here = run("curate", "--src", local, "--dst", tmp_path / "set", "--json")
    there = run(
        "curate", "--src", f"{bucket.uri}/videos", "--dst", f"{bucket.uri}/set", "--json",
        env=bucket.env,
    )  # fmt: skip
    assert (here.code, there.code) == (0, 0), there.err
    for key in ("sources", "clips", "reasons", "frames_decoded"):
        assert there.json[key] == here.json[key]
    placed = (
        "source_id",
        "source_uri",
        "uri",
        "etag",
        "duplicate_of",
        "error",
        "beside",
        "caption",
    )
    for table in ("sources", "clips", "keyframes"):
        found = [
            [{k: v for k, v in r.items() if k not in (*placed, "extra")} for r in rows(root, table)]
            for root in (tmp_path / "set", f"{bucket.uri}/set")
        ]
        assert sorted(map(repr, found[0])) == sorted(map(repr, found[1]))
    again = run(
        "curate", "--src", f"{bucket.uri}/videos", "--dst", f"{bucket.uri}/set", "--json",
        env=bucket.env,
    )  # fmt: skip
    assert again.code == 0 and again.json["frames_decoded"] == 0
    changed = run(
        "refilter", f"{bucket.uri}/set", "--set", "brightness.lo=0", "--json", env=bucket.env
    )
    assert (
        changed.code == 0 and changed.json["clips"]["pending"] == 1
    )  # the rest of it is to measure
    report = run("report", f"{bucket.uri}/set", "--json", env=bucket.env)
    assert report.json["clips"] == changed.json["clips"]
