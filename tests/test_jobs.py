"""`ray job submit`, both ways, on a real local cluster."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
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


def jobs_of(cluster: Cluster, token: str | None) -> tuple[int, str]:
    """The list of jobs as HTTP gives it: status and text."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{cluster.dashboard}/api/jobs/", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_nobody_gets_in_without_the_token_and_no_job_shows_it(cluster: Cluster) -> None:
    assert jobs_of(cluster, None)[0] == 401
    assert jobs_of(cluster, "0" * 64)[0] == 403
    status, text = jobs_of(cluster, cluster.env["RAY_AUTH_TOKEN"])
    assert status == 200 and isinstance(json.loads(text), list)
    assert cluster.env["RAY_AUTH_TOKEN"] not in text


def test_a_used_id_is_refused(cluster: Cluster) -> None:
    line = [RAY, "job", "submit", "--no-wait", "--submission-id", "only-once", "--", "true"]
    codes = []
    for _ in range(2):
        done = subprocess.run(
            line, env=cluster.job_env(), capture_output=True, text=True, timeout=120
        )
        codes.append(done.returncode)
    assert codes == [0, 1]
    assert "already exists" in done.stdout + done.stderr
