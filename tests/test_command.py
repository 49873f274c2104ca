"""How every command ends on what a user or the world did: in one line, with an exit code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from engine.command import in_one_line
from engine.tables import DatasetError, LeaseLost
from pipelines import refilter, report


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DatasetError("no dataset"), 2, "no dataset"),
        (ConnectionError("no cluster"), 1, "no cluster"),
        (LeaseLost("taken over"), 1, "taken over"),
        (OSError("No space left, /rust/src/io.rs:1\nmore"), 1, "/set: No space left"),
        (OSError(), 1, "/set: OSError"),
        (KeyboardInterrupt(), 130, "stopped: run the same command again to go on"),
    ],
)
def test_each_end_is_one_line(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop, in_one_line(LeaseLost, failing="/set"):
        raise error
    assert (stop.value.code, capsys.readouterr().err) == (code, f"error: {said}\n")


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(LeaseLost), in_one_line():
        raise LeaseLost("nobody expects it here")


@pytest.mark.parametrize("script", [refilter, report])
@pytest.mark.parametrize(
    ("error", "code"), [(PermissionError("denied"), 1), (KeyboardInterrupt, 130)]
)
def test_scripts_that_only_read_end_so_too(
    script: object,
    error: BaseException,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(root: str) -> None:
        raise error

    monkeypatch.setattr(script, "identity", fails)
    monkeypatch.setattr(sys, "argv", ["script", str(tmp_path)])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        script.main()  # type: ignore[attr-defined]
    said = capsys.readouterr().err
    assert stop.value.code == code and said.startswith("error: ") and said.count("\n") == 1
