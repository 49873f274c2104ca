"""`ray job submit`, with an id that follows from what is asked, watched, and tried again."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_type_hints

import tyro

from cluster import shipping
from cluster.following import Follower
from cluster.jobs import ENDED, Attempt, Jobs, State, attempt_id, authenticate
from cluster.supervise import OVERDUE
from engine import command

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SECRET = frozenset(
    "AUTH BEARER CREDENTIAL CREDENTIALS KEY KEYS PASS PASSWD PASSWORD PAT PWD SECRET SECRETS TOKEN"
    " TOKENS".split()
)
_STOPS = 15.0
"""Seconds beyond its own grace that a stopped job gets to be known as stopped."""
_DATE = "{date}"
_FINAL = (None, 0, command.BAD_INPUT, command.REGRESSION)
"""Exit codes after which the same again would end the same; None: somebody stopped it."""


@dataclass(frozen=True, kw_only=True)
class Submit:
    """Submits a script of this project as a Ray job, and follows it.

    SCRIPT.py ARGUMENTS…, or behind `--` any command, such as `-- python -m evals nightly …`. Flags
    of this command come before it. The exit code is the script's own (128 + N for signal N; 124 at
    its deadline). 1: the cluster does not answer, or the job died without one; 2: refused.
    """

    command: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SCRIPT ARGUMENTS")
    ] = ()
    """What runs on the cluster."""
    id: str | None = None
    """By default of the script and a hash of the command; {date} in it is today's (UTC)."""
    address: str | None = None
    """Of the dashboard, http://HOST:8265; by default $RAY_API_SERVER_ADDRESS, else $RAY_ADDRESS."""
    deadline_s: float | None = None
    """The job is stopped after so long, and counts as failed."""
    retries: int = 0
    """Attempts after one that failed, in this same call; the next call makes one anyway. None
    follows exit code 2 (wrong input) or 3 (a regression was found), which would come again."""
    detach: bool = False
    """Submit, and do not wait."""
    follow: bool = False
    """Attach to the one that is running or has succeeded, in place of refusing."""
    again: bool = False
    """Run anew what has succeeded."""
    working_dir: bool = True
    """Send the code along; without it, the job runs where `ray start` ran on the machines."""
    max_mib: float = 32.0
    """The code that is sent may be so large."""
    env: tyro.conf.UseAppendAction[
        Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")]
    ] = ()
    """A variable of the job. No secrets: whoever may list jobs reads it."""
    beat_s: float = 10.0
    """Time between heartbeats of the job."""
    stale_s: float = 120.0
    """Silence of the heartbeat after which a job that is said to be running counts as dead."""
    grace_s: float = 30.0
    """What a job that is stopped gets to commit what it has."""


def with_separator(arguments: Sequence[str]) -> list[str]:
    """The command line with `--` before the script, so that what follows is the script's alone.

    `submit --retries 1 a.py --id 3` becomes `submit --retries 1 -- a.py --id 3`; others are
    unchanged.

    Args:
        arguments: `sys.argv`.
    """
    if arguments[1:2] != ["submit"]:
        return list(arguments)
    hints = get_type_hints(Submit)
    switches = {"h", "help", *(f.name for f in dataclasses.fields(Submit) if hints[f.name] is bool)}
    at = 2
    while at < len(arguments) and arguments[at].startswith("-") and arguments[at] != "--":
        flag = arguments[at].lstrip("-").replace("-", "_")
        at += 1 if flag.removeprefix("no_") in switches or "=" in flag else 2
    if at >= len(arguments) or arguments[at] == "--":
        return list(arguments)
    return [*arguments[:at], "--", *arguments[at:]]


def submit(args: Submit) -> int:
    """`python -m cluster submit`; gives the exit code."""
    _check(args)
    job = job_id(args, datetime.datetime.now(datetime.UTC).date())
    authenticate()
    jobs = Jobs(args.address)
    retries = args.retries
    while True:
        attempts = jobs.attempts(job)
        attempt = _standing(args, jobs, attempts, job) or _submitted(args, jobs, attempts, job)
        if attempt is None:
            continue  # somebody else was first: look again
        if args.detach:
            return 0
        code = _followed(args, jobs, job, attempt)
        if code in _FINAL or retries < 1:
            return 1 if code is None else code
        retries -= 1
        args = dataclasses.replace(args, follow=True)  # whoever makes the next one


def _check(args: Submit) -> None:
    if not args.command and not (args.follow and args.id):
        command.fail("nothing to submit: name a script, e.g. pipelines/curate.py, or -- COMMAND …")
    for name in ("deadline_s", "beat_s", "stale_s", "grace_s", "max_mib"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            command.fail(f"--{name.replace('_', '-')} {value:g}: must be more than 0")
    if args.stale_s < 2 * args.beat_s:
        command.fail(
            f"--stale-s {args.stale_s:g}: must be at least twice --beat-s ({args.beat_s:g})"
        )
    if args.retries < 0 or (args.retries and (args.detach or not args.command)):
        command.fail(
            f"--retries {args.retries}: must be 0 or more, and 0 with --detach or without a script"
        )
    if args.id is not None and (
        not _ID.fullmatch(args.id.replace(_DATE, "0")) or re.search(r"-r\d+$", args.id)
    ):
        command.fail(
            f"--id {args.id}: letters, digits and . _ - only, 100 at most, and no -rN at its end"
        )
    environment(args.env)


def environment(given: Sequence[str]) -> dict[str, str]:
    """The job's variables; ends the program where one looks like a secret.

    `ray job list` and the dashboard show what is passed here: secrets belong on the machines.
    """
    found = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            command.fail(f"--env {name}: write NAME=VALUE")
        words = name.upper().split("_")
        if _SECRET.intersection(words) or words[-1].endswith(("KEY", "TOKEN", "PASSWORD")):
            command.fail(
                f"--env {name}=…: looks like a secret, and whoever may list jobs would see it:"
                " set it on the cluster's machines (a Kubernetes secret, or before `ray start`)"
            )
        if re.search(r"://[^/@\s]*:[^/@\s]*@", value):
            command.fail(f"--env {name}=…: holds a URL with a password, which jobs' lists show")
        found[name] = value
    return found


def job_id(args: Submit, today: datetime.date) -> str:
    """The id of the first attempt: the same for the same command, whoever submits it."""
    if args.id is not None:
        return args.id.replace(_DATE, today.isoformat())
    name = name_of(args.command)
    if name == "nightly" and "--date" not in " ".join(args.command):
        name = f"{name}-{today.isoformat()}"
    digest = hashlib.sha256("\0".join(args.command).encode()).hexdigest()[:8]
    return f"{name}-{digest}"


def name_of(words: Sequence[str]) -> str:
    """What a command does, in a word: its script, or the module and what it is asked to do."""
    rest = list(words)
    if Path(rest[0]).name.startswith("python") and len(rest) > 1:
        rest = rest[1:]
    if rest[0] == "-m" and len(rest) > 1:
        does = [w for w in rest[2:3] if not w.startswith("-")]
        name = "nightly" if does == ["nightly"] else "-".join([rest[1], *does])
    else:
        name = Path(rest[0] if rest[0] != "-c" else words[0]).stem
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:60] or "job"


def entrypoint(args: Submit) -> str:
    """The shell command that Ray runs: ours, below a supervisor."""
    words = list(args.command)
    if words[0].endswith(".py"):
        words = ["python", *words]
    flags = ["--beat-s", f"{args.beat_s:g}", "--grace-s", f"{args.grace_s:g}"]
    if args.deadline_s is not None:
        flags += ["--deadline-s", f"{args.deadline_s:g}"]
    # exec: Ray's own process is then the supervisor's parent, whose end it notices
    return "exec " + shlex.join(["python", "-m", "cluster.supervise", *flags, "--", *words])


def _standing(args: Submit, jobs: Jobs, attempts: Sequence[Attempt], job: str) -> Attempt | None:
    """The attempt to follow, if one stands in the way of another; refuses where none is asked for.

    A stale one is stopped.
    """
    if not attempts:
        if not args.command:
            command.fail(f"the cluster knows no job {job}")
        return None
    newest = attempts[-1]
    state = jobs.state(newest, args.stale_s)
    if not args.command or (args.follow and state in ("waiting", "live", "succeeded")):
        return newest
    if state == "succeeded" and not args.again:
        command.fail(
            f"{newest.id} has succeeded{_when(newest)}: nothing is left to do; --follow shows its"
            " log, --again runs it anew"
        )
    if state in ("waiting", "live"):
        word = "waits to be started" if state == "waiting" else "is running"
        command.fail(
            f"{newest.id} {word}: --follow attaches to it, and {_stop(args, newest.id)} stops it"
        )
    if state == "stale":
        _stop_stale(args, jobs, newest)
    return None


def _submitted(args: Submit, jobs: Jobs, attempts: Sequence[Attempt], job: str) -> Attempt | None:
    """A new attempt; None where another submitter has made it since these were listed."""
    number = attempts[-1].number + 1 if attempts else 1
    new = attempt_id(job, number)
    runtime_env: dict[str, object] = {
        "env_vars": {
            **environment(args.env),
            "RAY_JOB_STOP_WAIT_TIME_S": f"{max(1, round(args.grace_s))}",
        }
    }
    metadata = {"beat_s": f"{args.beat_s:g}", "job": job, "attempt": str(number)}
    if args.deadline_s is not None:
        metadata["deadline_s"] = f"{args.deadline_s:g}"
    with tempfile.TemporaryDirectory(prefix="reelwright-") as folder:
        sent = ""
        if args.working_dir:
            size = shipping.ship(args.command, Path(folder), max_mib=args.max_mib)
            runtime_env["working_dir"] = folder
            sent = f", {size / 2**20:.1f} MiB of code"
        if not jobs.submit(new, entrypoint(args), runtime_env, metadata):
            return None
    _say(f"submitted {new}{_why(attempts[-1] if attempts else None)}{sent}")
    return jobs.attempt(new)


def _followed(args: Submit, jobs: Jobs, job: str, attempt: Attempt) -> int | None:
    """The exit code of an attempt that is followed to its end; None where a person stopped it."""
    again = f"python -m cluster submit --follow --id {job}{_address(args)}"
    try:
        attempt, state = Follower(jobs, stale_s=args.stale_s).follow(attempt)
    except KeyboardInterrupt:
        _say(f"{attempt.id} goes on: `{again}` follows it, {_stop(args, attempt.id)} stops it")
        raise SystemExit(command.INTERRUPTED) from None
    except ConnectionError as error:
        command.fail(
            f"{error}; {attempt.id} may go on: `{again}` follows it", code=command.UNBALANCED
        )
    if state == "stale" and not args.command:
        _say(f"{attempt.id} is said to be running, but its heartbeat is silent")
        return 1
    if state == "stale":
        _stop_stale(args, jobs, attempt)
        return 1
    return _verdict(attempt, state)


def _verdict(attempt: Attempt, state: State) -> int | None:
    assert state in ENDED
    took = f" after {attempt.ended - attempt.started:.0f} s" if attempt.ended else ""
    if state == "succeeded":
        _say(f"{attempt.id} succeeded{took}")
        return 0
    if state == "stopped":
        _say(f"{attempt.id} was stopped{took}: the same command makes another attempt")
        return None
    code = attempt.exit_code
    if not code:  # Ray could not start it, or lost it
        reason = next(iter(attempt.message.strip().splitlines()), "no reason was given")
        _say(f"{attempt.id} failed{took}: {reason}")
        return 1
    late = ", its deadline" if code == OVERDUE else ""
    _say(
        f"{attempt.id} failed{took} with exit code {code}{late}: the same command makes another"
        " attempt"
    )
    return code


def _stop_stale(args: Submit, jobs: Jobs, attempt: Attempt) -> None:
    _say(f"{attempt.id} is said to be running, but its heartbeat is silent: stopping it")
    if not jobs.stop(attempt, args.grace_s + _STOPS):
        _say(
            f"{attempt.id} could not be stopped: if it lives, its dataset's lease keeps others out"
        )


def _why(before: Attempt | None) -> str:
    if before is None:
        return ""
    how = {"SUCCEEDED": "succeeded", "STOPPED": "was stopped", "FAILED": "failed"}
    word = how.get(before.status, "was lost")
    if before.status == "FAILED" and before.exit_code:
        word += f" with exit code {before.exit_code}"
    return f" ({before.id} {word})"


def _when(attempt: Attempt) -> str:
    if attempt.ended is None:
        return ""
    ended = datetime.datetime.fromtimestamp(attempt.ended, datetime.UTC)
    return f" ({ended:%Y-%m-%d %H:%M} UTC)"


def _stop(args: Submit, submission_id: str) -> str:
    return f"`RAY_AUTH_MODE=token ray job stop{_address(args)} {submission_id}`"


def _address(args: Submit) -> str:
    return f" --address {args.address}" if args.address else ""


def _say(words: str) -> None:
    command.err.print(words, highlight=False, soft_wrap=True)
