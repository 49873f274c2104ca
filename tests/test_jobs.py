"""`ray job submit`, both ways, on a real local cluster."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, Cluster, rows

from pipelines.samples import SAMPLES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

RAY = str(Path(sys.executable).parent / "ray")


def submit(cluster: Cluster, *arguments: str, cwd: Path) -> str:
    """What a submitted job printed; it must have succeeded."""
    done = subprocess.run(
        [RAY, "job", "submit", *arguments],
        env=cluster.job_env(),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def dataset_of(printed: str) -> Path:
    found = re.search(r"dataset: (\S+)", printed)
    assert found, printed
    return Path(found[1])


@pytest.mark.parametrize("form", ["working directory", "literal"])
def test_a_job_curates_the_sample_corpus(form: str, cluster: Cluster, tmp_path: Path) -> None:
    if form == "literal":
        printed = submit(cluster, "--", "python", "pipelines/curate.py", cwd=tmp_path)
        expected = cluster.repository / "out" / "demo"
    else:
        printed = submit(
            cluster, "--working-dir", ".", "--", "python", "pipelines/curate.py",
            cwd=cluster.repository,
        )  # fmt: skip
        expected = cluster.home / "out" / "demo"
    root = dataset_of(printed)
    assert root == expected  # never in Ray's temporary copy
    clips = sum(len(s.clips) for s in SAMPLES)
    assert len(rows(root, "clips")) == clips
    kept = sum(state == "kept" for s in SAMPLES for state, _ in s.clips)
    assert sum(r["kept"] for r in rows(root, "clips")) == kept


def test_a_job_that_has_bad_input_fails(cluster: Cluster) -> None:
    done = subprocess.run(
        [RAY, "job", "submit", "--", "python", "pipelines/curate.py", "--src", "/no/such"],
        env=cluster.job_env(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
