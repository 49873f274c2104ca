"""One driver a dataset: refusal with the reason, takeover after death, release and silence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine import storage
from engine.lease import Lease, _process_identity, holder
from engine.tables import DatasetError

REPOSITORY = Path(__file__).parents[1]
HOLD = (
    "import sys, time\n"
    "from engine.lease import Lease\n"
    "with Lease(sys.argv[1], 'holder', float(sys.argv[2])):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(600)\n"
)


def hold(root: str, expiry_s: float) -> subprocess.Popen[bytes]:
    """Another process that has the lease."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, root, str(expiry_s)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path)


def test_a_second_driver_is_refused_and_told_who_has_it(root: str) -> None:
    with (
        Lease(root, "one"),
        pytest.raises(DatasetError, match=r"in use by run one .process \d+ on"),
    ):
        Lease(root, "two").__enter__()


def test_who_has_it_is_told(root: str) -> None:
    assert holder(root) is None
    with Lease(root, "one"):
        assert str(holder(root)).startswith("in use by run one (process ")
    assert holder(root) is None
    process = hold(root, 600)
    assert str(holder(root)).startswith("in use by run holder (process ")
    process.kill()
    process.wait()
    assert holder(root) is None, "this machine can tell that it has ended"


def test_a_released_lease_is_free_at_once(root: str) -> None:
    with Lease(root, "one"):
        pass
    with Lease(root, "two") as second:
        assert second.term == 2


def test_a_killed_owner_on_this_machine_is_replaced_at_once(root: str) -> None:
    process = hold(root, 600)
    process.kill()
    process.wait()
    with Lease(root, "next"):
        pass


def test_an_owner_that_hangs_is_replaced_after_its_expiry_and_not_before(root: str) -> None:
    process = hold(root, 1.5)
    process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(DatasetError, match="in use by run holder"):
            Lease(root, "next").__enter__()
        time.sleep(2)
        with Lease(root, "next") as lease:
            process.send_signal(signal.SIGCONT)
            time.sleep(1)  # it wakes, beats, and must see that it lost
            newest = max(storage.names_in(storage.join(root, "lease")))
            owner = json.loads(storage.read_bytes(storage.join(root, "lease", newest)))
            assert owner["run_id"] == "next" and lease.term == 2
    finally:
        process.kill()
        process.wait()


def test_a_living_owner_keeps_its_lease_past_the_expiry(root: str) -> None:
    with Lease(root, "one", expiry_s=0.6):
        time.sleep(1.2)
        with pytest.raises(DatasetError, match="in use"):
            Lease(root, "two").__enter__()


def test_an_owner_on_another_machine_is_trusted_until_its_expiry(root: str) -> None:
    here = _process_identity(os.getpid())
    assert here is not None
    owner = {
        "run_id": "far",
        "host": "elsewhere",
        "process": here | {"machine": "another"},
        "pid": 1,
        "beat": time.time(),
        "expiry_s": 1.0,
        "released": False,
    }
    (Path(root) / "lease").mkdir()
    (Path(root) / "lease" / "00000001.json").write_text(json.dumps(owner))
    with pytest.raises(DatasetError, match="on elsewhere"):
        Lease(root, "near").__enter__()
    time.sleep(1.1)
    with Lease(root, "near"):
        pass


def test_old_terms_are_forgotten(root: str) -> None:
    for number in range(8):
        with Lease(root, f"run {number}"):
            pass
    assert len(storage.names_in(storage.join(root, "lease"))) <= 4
