"""Submission: what is sent and called what; the supervisor; attempts on a real cluster."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY, Cluster, free_ports, rows

from cluster import shipping
from cluster.jobs import Attempt, Beat, state_of
from cluster.submit import Submit, entrypoint, environment, job_id, with_separator
from engine.tables import DatasetError
from pipelines.samples import SAMPLES

TODAY = datetime.date(2026, 11, 22)


def wait_for(found: Callable[[], object], timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# the command line


@pytest.mark.parametrize(
    ("given", "separated"),
    [
        ("a.py --id 3", "-- a.py --id 3"),
        ("--id x a.py", "--id x -- a.py"),
        ("--id=x --detach --no-working-dir a.py -v", "--id=x --detach --no-working-dir -- a.py -v"),
        ("--env A=1 --env B=2 a.py", "--env A=1 --env B=2 -- a.py"),
        ("--retries 2 -- python -m evals run", "--retries 2 -- python -m evals run"),
        ("--follow --id x", "--follow --id x"),
        ("--help", "--help"),
    ],
)
def test_what_follows_the_script_is_the_scripts(given: str, separated: str) -> None:
    line = ["cluster", "submit", *given.split()]
    assert with_separator(line) == ["cluster", "submit", *separated.split()]
    assert with_separator(["cluster", "check", *given.split()]) == [
        "cluster", "check", *given.split()
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "begins"),
    [
        ("pipelines/curate.py --src a --dst b", "curate-"),
        ("python pipelines/curate.py --src a", "curate-"),
        ("python -m trainers train mimir", "trainers-train-"),
        ("python -m evals nightly --dst e", "nightly-2026-11-22-"),
        ("python -m evals nightly --date 2026-01-02", "nightly-"),
        ("python -c pass", "python-"),
        ("/opt/my_job.sh", "my-job-"),
    ],
)
def test_an_id_says_what_runs_and_is_the_same_for_the_same(command: str, begins: str) -> None:
    def made(words: str) -> str:
        return job_id(Submit(command=tuple(words.split())), TODAY)

    found = made(command)
    digest = found.removeprefix(begins)
    assert len(digest) == 8 and int(digest, 16) >= 0
    assert made(command) == found != made(command + " --more")


def test_an_id_may_be_given_with_the_date() -> None:
    args = Submit(command=("a.py",), id="nightly-{date}")
    assert job_id(args, TODAY) == "nightly-2026-11-22"


def test_the_entrypoint_quotes_the_command_and_names_the_deadline() -> None:
    line = entrypoint(Submit(command=("a.py", "two words", "$HOME"), deadline_s=60))
    assert line == (
        "exec python -m cluster.supervise --beat-s 10 --grace-s 30 --deadline-s 60 --"
        " python a.py 'two words' '$HOME'"
    )


@pytest.mark.parametrize(
    "pair",
    [
        "AWS_SECRET_ACCESS_KEY=x", "HF_TOKEN=x", "DB_PASSWORD=x", "OPENAI_API_KEY=x", "apikey=x",
        "DB=postgres://me:word@host/db",
    ],
)  # fmt: skip
def test_secrets_are_no_variables_of_a_job(pair: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        environment([pair])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert pair.split("=")[0] in said and pair.split("=", 1)[1] not in said


def test_other_variables_are() -> None:
    given = ["AWS_REGION=us-east-1", "TOKENIZERS_PARALLELISM=false", "A==", "PASSES=2"]
    assert environment(given) == {
        "AWS_REGION": "us-east-1", "TOKENIZERS_PARALLELISM": "false", "A": "=", "PASSES": "2"
    }  # fmt: skip


# what is sent


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A small working tree with code, data beside it and data within it."""
    root = tmp_path / "tree"
    for name in (
        "engine/a.py", "engine/instructions/dense.txt", "pipelines/curate.py", "pyproject.toml",
        ".gitignore", "README.md", "mine.py",
    ):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")
    (root / ".gitignore").write_text("/out/\n__pycache__/\n")
    for command in ("init -q", "add -A", "-c user.name=a -c user.email=b commit -qm all"):
        subprocess.run(["git", "-C", str(root), *command.split()], check=True)
    for name in (
        "out/demo/clips.lance", "engine/clip.mp4", "engine/__pycache__/a.pyc", "engine/data.txt",
        "videos/a.mp4", ".venv/lib/big.py",
    ):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes(2**20))
    (root / "engine" / "new.py").write_text("# not added yet\n")
    return root


CODE = ["engine/a.py", "engine/instructions/dense.txt", "engine/new.py", "pipelines/curate.py"]


def test_code_is_sent_and_data_is_not(copy: Path, tmp_path: Path) -> None:
    assert shipping.code_files(copy) == [*CODE, "pyproject.toml"]
    into = tmp_path / "sent"
    size = shipping.ship(["python", "mine.py"], into, max_mib=1, root=copy)
    sent = {p.relative_to(into).as_posix(): p.stat().st_size for p in into.rglob("*.*")}
    assert set(sent) == {*CODE, "pyproject.toml", "mine.py"} and sum(sent.values()) == size


def test_without_git_what_looks_like_code_is_sent(copy: Path) -> None:
    shutil.rmtree(copy / ".git")
    assert shipping.code_files(copy) == sorted([*CODE, "engine/data.txt", "pyproject.toml"])


def test_what_is_too_large_for_code_is_refused_by_name(copy: Path, tmp_path: Path) -> None:
    subprocess.run(["git", "-C", str(copy), "add", "engine/clip.mp4"], check=True)
    with pytest.raises(ValueError, match=r"engine/clip\.mp4 \(1\.0 MiB\).*--no-working-dir"):
        shipping.ship(["mine.py"], tmp_path / "sent", max_mib=0.5, root=copy)


@pytest.mark.parametrize("script", ["no_such.py", "../other.py"])
def test_a_script_elsewhere_is_refused(script: str, copy: Path, tmp_path: Path) -> None:
    (tmp_path / "other.py").touch()
    with pytest.raises(ValueError, match=f"there is no script {script}"):
        shipping.ship([script], tmp_path / "sent", max_mib=1, root=copy)


# what an attempt is in


@pytest.mark.parametrize(
    ("status", "beat_s", "beat_age_s", "state"),
    [
        ("PENDING", 10, None, "waiting"),
        ("RUNNING", 10, 5, "live"),
        ("RUNNING", 10, 121, "stale"),
        ("RUNNING", 10, None, "stale"),  # none since its start, long ago
        ("RUNNING", None, None, "live"),  # of plain `ray job submit`
        ("SUCCEEDED", 10, 900, "succeeded"),
        ("FAILED", 10, 900, "failed"),
        ("STOPPED", 10, 900, "stopped"),
    ],
)
def test_a_silent_heartbeat_overrules_the_status(
    status: str, beat_s: float | None, beat_age_s: float | None, state: str
) -> None:
    attempt = Attempt("a", 1, status, 0.0, None, None, "", "node", beat_s)
    beat = Beat(3, 1000 - beat_age_s, 10) if beat_age_s is not None else None
    assert state_of(attempt, beat, now=1000.0, stale_s=120) == state


def test_a_job_with_a_slow_heartbeat_is_given_two_of_them_whoever_looks() -> None:
    attempt = Attempt("a", 1, "RUNNING", 0.0, None, None, "", "node", 300.0)
    beats = [Beat(3, 1000 - age_s, 300) for age_s in (599, 601)]
    found = [state_of(attempt, beat, now=1000.0, stale_s=120) for beat in beats]
    assert found == ["live", "stale"]


# the supervisor


def supervised(*arguments: str, log: Path | None = None) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "cluster.supervise", *arguments]
    with open(log or os.devnull, "wb") as out:
        return subprocess.Popen(line, cwd=REPOSITORY, stdout=out, stderr=out)


@pytest.mark.parametrize(
    ("command", "code"),
    [("exit 7", 7), ("true", 0), ("kill -9 $$", 137), ("kill -TERM $$", 143)],
)
def test_the_commands_exit_code_is_the_supervisors(command: str, code: int) -> None:
    assert supervised("--", "sh", "-c", command).wait(30) == code


def test_a_command_that_is_not_there_is_127() -> None:
    assert supervised("--", "no-such-program").wait(30) == 127


DEAF = "trap '' TERM; echo started; sleep 300 & wait; sleep 300"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """As Ray names a job's log."""
    return tmp_path / "job-driver-mine-1.log"


def beat(log: Path) -> dict:
    return json.loads((log.parent / "heartbeat-mine-1.json").read_text())


def started(log: Path) -> object:
    path = log.with_name("heartbeat-mine-1.json")
    return path.exists() and path.read_text() and "started" in log.read_text()


def test_the_deadline_ends_the_whole_group_even_a_deaf_one(log: Path) -> None:
    began = time.monotonic()
    job = supervised("--deadline-s", "3", "--grace-s", "0.5", "--", "sh", "-c", DEAF, log=log)
    wait_for(lambda: started(log))
    group = psutil.Process(beat(log)["pid"])
    members = [group, *group.children(recursive=True)]
    assert job.wait(30) == 124
    assert time.monotonic() - began >= 3.5
    wait_for(lambda: not any(p.is_running() and p.status() != "zombie" for p in members), 20)


def test_a_supervisor_that_is_killed_takes_its_command_along(log: Path) -> None:
    job = supervised("--", "sh", "-c", DEAF, log=log)
    wait_for(lambda: started(log))
    group = psutil.Process(beat(log)["pid"])
    members = [group, *group.children(recursive=True)]
    assert len(members) == 2
    job.kill()
    job.wait()
    wait_for(lambda: not any(p.is_running() and p.status() != "zombie" for p in members), 20)


def test_a_job_whose_ray_has_gone_is_stopped(log: Path) -> None:
    line = f'{sys.executable} -m cluster.supervise --grace-s 0.5 -- sh -c "{DEAF}"'
    with open(log, "wb") as out:
        ray = subprocess.Popen(["sh", "-c", f"{line}; exit"], cwd=REPOSITORY, stdout=out)
    wait_for(lambda: started(log))
    members = [psutil.Process(beat(log)["supervisor"]), psutil.Process(beat(log)["pid"])]
    assert members[0].ppid() == ray.pid
    ray.kill()
    ray.wait()
    wait_for(lambda: not any(p.is_running() and p.status() != "zombie" for p in members), 15)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on(number: signal.Signals, log: Path) -> None:
    script = f"trap 'echo heard; exit 5' {number.name[3:]}; echo started; sleep 300 & wait"
    job = supervised("--", "sh", "-c", script, log=log)
    wait_for(lambda: started(log))
    job.send_signal(number)
    assert job.wait(30) == 5
    assert "heard" in log.read_text()


def test_what_ray_sends_to_all_itself_is_not_passed_on(log: Path) -> None:
    """A second SIGTERM would tear apart the orderly end that the first one began."""
    sent = log.with_name("sent")
    script = "trap 'echo heard' TERM; echo started; until [ -e $0 ]; do sleep 0.1; done; sleep 0.5"
    job = supervised("--", "sh", "-c", script, str(sent), log=log)
    wait_for(lambda: started(log))
    send = f"exec -a ray::JobSupervisor {sys.executable} -c"
    code = f'import os, time; os.kill({job.pid}, 15); open("{sent}", "w"); time.sleep(60)'
    ray = subprocess.Popen(["bash", "-c", f"{send} '{code}'"])
    assert job.wait(30) == 0
    ray.kill()
    ray.wait()
    assert log.read_text() == "started\n"


def test_the_heartbeat_goes_on_beside_the_log_and_not_into_it(log: Path) -> None:
    script, end = "echo started; until [ -e $0 ]; do sleep 0.1; done", log.with_name("end")
    job = supervised("--beat-s", "0.1", "--", "sh", "-c", script, str(end), log=log)
    wait_for(lambda: started(log))
    first = beat(log)
    assert abs(first["beat"] - time.time()) < 2 and first["supervisor"] == job.pid
    wait_for(lambda: beat(log)["beats"] >= first["beats"] + 5, 20)
    end.touch()
    assert job.wait(30) == 0
    assert log.read_text() == "started\n"


# on a cluster


class Submitter:
    """`python -m cluster submit` from here to a cluster, which knows the way to it by variables."""

    def __init__(self, cluster: Cluster):
        # token mode is the command's own default
        self.env = {k: v for k, v in cluster.job_env().items() if k != "RAY_AUTH_MODE"}
        self.env.pop("RAY_ADDRESS")
        self.logs = cluster.repository.parent / "session_latest" / "logs"

    def start(self, *arguments: object, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "cluster", "submit", *map(str, arguments)],
            cwd=REPOSITORY,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: object, **env: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        job = self.start(*arguments, **env)
        out, err = job.communicate(timeout=250)
        assert "Traceback" not in err
        return job.returncode, out, err

    def heartbeat(self, submission_id: str) -> dict:
        path = self.logs / f"heartbeat-{submission_id}.json"
        wait_for(path.exists)
        return json.loads(path.read_text())

    def log(self, submission_id: str) -> str:
        path = self.logs / f"job-driver-{submission_id}.log"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def submit(cluster: Cluster) -> Submitter:
    return Submitter(cluster)


@pytest.mark.slow
@pytest.mark.timeout(600)  # two whole jobs
def test_a_curation_that_dies_in_the_middle_is_finished_by_the_same_command(
    submit: Submitter, samples: Path, tmp_path: Path
) -> None:
    names = "coffee_pan two_to_one wide short portrait truncated coins long_take".split()
    chosen = [s for s in SAMPLES if Path(s.name).stem in names]
    src, dst = tmp_path / "src", tmp_path / "set"
    src.mkdir()
    for sample in chosen:
        shutil.copy(samples / sample.name, src)
    line = ("pipelines/curate.py", "--src", src, "--dst", dst, "--commit-every-s", "0.1")
    first = submit.start("--beat-s", "1", "--stale-s", "20", *line)
    assert first.stderr is not None
    name = first.stderr.readline().split()[1].rstrip(",")
    assert name.startswith("curate-")
    expected = sum(len(s.clips) for s in chosen)

    def num_clips() -> int:
        try:
            return len(rows(dst, "clips"))
        except DatasetError:  # not there yet, or being made
            return 0

    wait_for(num_clips, 240)
    os.kill(submit.heartbeat(name)["supervisor"], signal.SIGKILL)
    _, err = first.communicate(timeout=120)
    assert first.returncode == 137 and "failed" in err
    before = len(rows(dst, "clips"))
    assert before < expected

    code, out, err = submit(*line)
    assert code == 0, out + err
    assert f"submitted {name}-r2 ({name} failed with exit code 137)" in err
    assert "beats" not in out and f"dataset: {dst}" in out
    assert out.count("dataset: ") == 1  # the tail and the rest of the log overlap nowhere
    by_uri: dict[str, list] = {}
    for clip in rows(dst, "clips"):
        by_uri.setdefault(Path(clip["source_uri"]).name, []).append((clip["state"], clip["reason"]))
    assert by_uri == {s.name: list(s.clips) for s in chosen if s.clips}

    code, _, err = submit(*line)
    assert code == 2 and f"{name}-r2 has succeeded" in err and err.count("\n") == 1
    code, replayed, _ = submit("--follow", *line)
    assert code == 0 and replayed == out


ONCE = """
import os, sys, time
path, first_s = sys.argv[1], float(sys.argv[2])
first = not os.path.exists(path)
open(path, "w").close()
print("started", *sorted(os.listdir()), flush=True)
time.sleep(first_s if first else 0)
"""


@pytest.mark.slow
def test_one_attempt_at_a_time_and_a_stale_one_is_replaced(
    submit: Submitter, tmp_path: Path
) -> None:
    line = ("--", "python", "-c", ONCE, tmp_path / "marker", "600")
    flags = ("--id", "sleeper", "--beat-s", "0.5", "--stale-s", "2", "--grace-s", "2")
    racers = [submit.start("--detach", *flags, *line) for _ in range(2)]
    said = [racer.communicate(timeout=120)[1] for racer in racers]
    assert sorted(racer.returncode for racer in racers) == [0, 2], said
    wait_for(lambda: "\nstarted" in submit.log("sleeper"))
    assert "\nstarted LICENSE cluster constraints.txt engine" in submit.log("sleeper")
    code, _, err = submit("--detach", *flags, *line)
    assert code == 2 and "sleeper is running: --follow attaches to it" in err

    follower = submit.start("--follow", "--id", "sleeper")
    assert follower.stdout is not None
    while not follower.stdout.readline().startswith("started"):
        pass
    follower.send_signal(signal.SIGINT)
    _, err = follower.communicate(timeout=60)
    assert follower.returncode == 130
    assert "sleeper goes on" in err and "ray job stop sleeper" in err

    beat = submit.heartbeat("sleeper")
    job = psutil.Process(beat["pid"])
    assert job.is_running()
    os.kill(beat["supervisor"], signal.SIGSTOP)
    code, _, err = submit("--follow", *flags)
    assert code == 1 and err.endswith("its heartbeat is silent\n")
    assert job.is_running(), "who only looks stops nothing"
    code, out, err = submit(*flags, *line)
    assert code == 0, out + err
    assert "its heartbeat is silent: stopping it" in err
    assert "submitted sleeper-r2 (sleeper was lost)" in err
    assert not job.is_running() and "\nstarted " in out


@pytest.mark.slow
def test_a_deadline_fails_an_attempt_and_the_same_call_tries_again(
    submit: Submitter, tmp_path: Path
) -> None:
    code, out, err = submit(
        "--deadline-s", "1", "--grace-s", "5", "--retries", "1", "--id", "late", "--env", "A_B=c d",
        "--", "python", "-c", ONCE, tmp_path / "marker", "600",
    )  # fmt: skip
    assert code == 0, out + err
    assert "late failed" in err and "exit code 124, its deadline" in err
    assert "submitted late-r2" in err and "late-r2 succeeded" in err
    assert out.count("\nstarted ") == 2


HEARS = """
import signal, sys, time
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
print("started", flush=True)
while not heard:
    time.sleep(0.05)
time.sleep(4)  # longer than what Ray gives by itself
print("ended in order", flush=True)
"""


@pytest.mark.slow
def test_a_job_that_is_stopped_may_end_in_order(submit: Submitter, cluster: Cluster) -> None:
    follower = submit.start("--id", "polite", "--", "python", "-c", HEARS)
    wait_for(lambda: "started\n" in submit.log("polite"))
    ray = str(Path(sys.executable).parent / "ray")
    stop = [ray, "job", "stop", "--no-wait", "polite"]
    subprocess.run(stop, env=cluster.job_env(), check=True, capture_output=True)
    out, err = follower.communicate(timeout=120)
    assert follower.returncode == 1 and "polite was stopped" in err
    assert "\nended in order\n" in out


def test_a_cluster_that_cannot_be_had_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    class NotRay(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    other = HTTPServer(("127.0.0.1", 0), NotRay)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    (port,) = free_ports(1)
    submit = Submitter(cluster)
    line = ("--detach", "--", "true")
    cases = {
        "no Ray cluster answers at": submit.start("--address", f"http://127.0.0.1:{port}", *line),
        "is no address of a cluster": submit.start("--address", "ftp://x", *line),
        "refuses this token": submit.start(*line, RAY_AUTH_TOKEN="0" * 64),
        "is no Ray cluster": submit.start(
            "--address", f"http://127.0.0.1:{other.server_port}", *line
        ),
        "wants a token": submit.start(*line, RAY_AUTH_MODE="disabled"),
        "ray get-auth-token --generate": submit.start(*line, RAY_AUTH_TOKEN="", HOME=str(tmp_path)),
    }
    for words, process in cases.items():
        _, err = process.communicate(timeout=120)
        bad_input = words.startswith(("is no address", "ray get-auth"))
        assert process.returncode == (2 if bad_input else 1), err
        assert words in err and err.startswith("error: ") and err.count("\n") == 1, err
    other.shutdown()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "nothing to submit"),
        ("--id a/b -- true", "letters, digits"),
        ("--id a-r2 -- true", "no -rN"),
        ("--deadline-s 0 -- true", "must be more than 0"),
        ("--stale-s 5 -- true", "at least twice --beat-s"),
        ("--retries 1 --detach -- true", "--retries 1"),
        ("--retries 1 --follow --id a", "without a script"),
        ("--env HF_TOKEN=abc -- true", "looks like a secret"),
    ],
)
def test_bad_input_is_one_line(
    arguments: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cluster.__main__ import main

    monkeypatch.setattr(sys, "argv", ["cluster", "submit", *arguments.split()])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
