"""The child process: limits hold, deaths are survived, and nothing outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine.operator import Failed
from engine.sandbox import Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")

# The target is looked up by name in the child: this folder is on its path.
HERE = str(Path(__file__).parent)


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", HERE)
    box = Sandbox("sandboxed:act", time_limit_s=5, memory_limit_bytes=256 * 2**20)
    yield box
    box.close()


def test_a_call_gives_its_result_and_the_child_stays(sandbox: Sandbox) -> None:
    first, second = sandbox.call(("pid",)), sandbox.call(("pid",))
    assert first == second != os.getpid()


def test_an_exception_comes_back_as_its_class_and_message(sandbox: Sandbox) -> None:
    with pytest.raises(Failed) as found:
        sandbox.call(("raise", "ValueError", "no such thing"))
    assert (found.value.error_type, found.value.message) == ("ValueError", "no such thing")
    assert not found.value.transient


def test_a_failure_of_the_system_is_transient(sandbox: Sandbox) -> None:
    with pytest.raises(Failed) as found:
        sandbox.call(("raise", "PermissionError", "may not"))
    assert found.value.transient


def test_a_hang_ends_at_the_time_limit_and_the_next_call_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", HERE)
    box = Sandbox("sandboxed:act", time_limit_s=1, memory_limit_bytes=256 * 2**20)
    started = time.monotonic()
    with pytest.raises(Failed, match="time limit of 1 s"):
        box.call(("hang",))
    assert time.monotonic() - started < 3
    assert box.call(("pid",))
    box.close()


def test_too_much_memory_is_a_failure_that_says_so(sandbox: Sandbox) -> None:
    with pytest.raises(Failed, match=r"memory limit of 0.25 GiB"):
        sandbox.call(("allocate", 2**30))
    assert sandbox.call(("allocate", 2**20)) == 2**20


def test_a_crash_is_tried_once_more_then_recorded(sandbox: Sandbox, tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"died twice .*SIGSEGV"):
        sandbox.call(("crash", str(tmp_path / "always"), 9))
    assert (tmp_path / "always").read_text() == "xx"
    assert sandbox.call(("crash", str(tmp_path / "once"), 1)) == "alive"


def test_killing_the_child_from_outside_costs_one_try(sandbox: Sandbox, tmp_path: Path) -> None:
    started = tmp_path / "started"
    victim = sandbox.call(("pid",))

    def kill() -> None:
        while not started.exists():
            time.sleep(0.01)
        os.kill(victim, signal.SIGKILL)

    threading.Thread(target=kill).start()
    assert sandbox.call(("slow", str(started), 0.5)) != victim


def test_a_death_in_the_middle_of_an_answer_is_one_too(sandbox: Sandbox) -> None:
    with pytest.raises(Failed, match=r"died twice .*exit code 3"):
        sandbox.call(("stop short",))
    assert sandbox.call(("pid",))


def test_what_the_child_says_does_not_pile_up(sandbox: Sandbox) -> None:
    assert [sandbox.call(("complain", 1000)) for _ in range(5)] == [1000] * 5


def test_no_descriptor_stays_behind(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.call(("pid",))
    before = len(os.listdir("/proc/self/fd"))
    for i in range(3):
        sandbox.call(("crash", str(tmp_path / str(i)), 1))
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from engine.sandbox import Sandbox\n"
        "box = Sandbox('sandboxed:act', time_limit_s=60, memory_limit_bytes=2**28)\n"
        "print(box.call(('pid',)), flush=True)\n"
        "box.call(('hang',))\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), HERE])
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}").exists() and _state(child) != "Z":
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.05)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "Z"
