"""The dashboard as a whole: its pages, both themes, and datasets that are not as they should be."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import REPOSITORY, Bucket

from cluster.dashboard.look import THEME
from engine.tables import create

pytestmark = pytest.mark.slow

PAGES = ("funnel", "clips", "thresholds", "pairs", "training", "evaluation", "runs")
GROUND = {
    dark: [str(int(THEME[f"theme.{name}.backgroundColor"][at : at + 2], 16)) for at in (1, 3, 5)]
    for dark, name in ((False, "light"), (True, "dark"))
}
"""Red, green and blue of a page's background, by whether it is dark."""
Serve = Callable[..., str]


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below, with size and time stamp."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}


def dashboard(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command, where it ends at once."""
    return subprocess.run(
        [sys.executable, "-m", "cluster", "dashboard", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_every_page_opens_in_both_themes_and_writes_nothing(
    quadruples: Path, serve: Serve, browser: Any, tmp_path: Path
) -> None:
    before = listing(quadruples)
    url = serve("dashboard", quadruples, "--cache", tmp_path)
    for page in PAGES:
        for dark in (False, True):
            browser.visit(f"{url}/{page}", dark=dark)
            for bad in ("stException", "stAlertContentError"):
                assert not browser.all(f"[data-testid='{bad}']"), (page, browser.text)
            assert [title.text for title in browser.all("h1")] == [page.capitalize()]
            (app,) = browser.all("[data-testid='stApp']")
            ground = app.value_of_css_property("background-color")
            assert re.findall(r"\d+", ground)[:3] == GROUND[dark]
    assert listing(quadruples) == before


def test_it_listens_on_this_machine_alone(quadruples: Path, serve: Serve) -> None:
    port = int(serve("dashboard", quadruples).rpartition(":")[2])
    addresses = {
        one.laddr.ip
        for one in psutil.net_connections("inet")
        if one.status == psutil.CONN_LISTEN and one.laddr.port == port
    }
    assert addresses == {"127.0.0.1"}


def test_a_page_from_elsewhere_cannot_borrow_its_address(quadruples: Path, serve: Serve) -> None:
    port = int(serve("dashboard", quadruples).rpartition(":")[2])

    def status(host: str) -> str:
        asked = (
            f"GET /_stcore/stream HTTP/1.1\r\nHost: {host}:{port}\r\nOrigin: http://{host}:{port}"
            "\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13"
            "\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", port), timeout=10) as one:
            one.sendall(asked.encode())
            return one.recv(64).decode().split()[1]

    assert status("localhost") == "101"
    assert status("rebound.example") == "403"


def test_what_is_no_dataset_is_one_line(tmp_path: Path) -> None:
    said = dashboard(tmp_path)
    assert said.returncode == 2
    assert said.stderr.startswith(f"error: {tmp_path} holds no dataset: give the folder")
    assert len(said.stderr.splitlines()) == 1

    (tmp_path / "dataset.json").write_text("{")
    assert "dataset.json cannot be read" in dashboard(tmp_path).stderr
    (tmp_path / "dataset.json").write_text(json.dumps({"format": 99, "recipe": "classic"}))
    assert "has layout 99, and this program reads up to 1: update it" in dashboard(tmp_path).stderr


def test_a_dataset_that_is_only_begun_gives_friendly_pages(
    serve: Serve, browser: Any, tmp_path: Path
) -> None:
    root = tmp_path / "begun"
    create(str(root), "classic")
    shutil.rmtree(root / "generations.lance")  # as an earlier version left it
    shutil.rmtree(root / "scores.lance")
    url = serve("dashboard", root)
    for page in PAGES:
        browser.visit(f"{url}/{page}")
        for bad in ("stException", "stAlertContentError"):
            assert not browser.all(f"[data-testid='{bad}']"), (page, browser.text)
        assert browser.all("[data-testid='stAlertContentInfo']"), (page, browser.text)


def test_a_damaged_table_is_a_line_on_its_pages(
    quadruples: Path, serve: Serve, browser: Any, tmp_path: Path
) -> None:
    root = tmp_path / "damaged"
    shutil.copytree(quadruples, root)
    for manifest in (root / "clips.lance" / "_versions").iterdir():
        manifest.write_bytes(b"\0" * 64)
    url = serve("dashboard", root)
    for page in ("funnel", "clips", "thresholds"):
        browser.visit(f"{url}/{page}")
        (told,) = browser.all("[data-testid='stAlertContentError']")
        assert "its table 'clips' cannot be opened" in told.text
        assert not browser.all("[data-testid='stException']")
    browser.visit(f"{url}/evaluation")  # which reads other tables
    assert not browser.all("[data-testid='stAlertContentError']"), browser.text


def test_a_dataset_in_an_object_store_opens(
    quadruples: Path, bucket: Bucket, serve: Serve, browser: Any
) -> None:
    for path in sorted(p for p in quadruples.rglob("*") if p.is_file()):
        bucket.put(f"set/{path.relative_to(quadruples)}", path.read_bytes())
    url = serve("dashboard", f"{bucket.uri}/set")
    for page in ("funnel", "clips", "thresholds", "pairs", "runs"):
        browser.visit(f"{url}/{page}")
        for bad in ("stException", "stAlertContentError"):
            assert not browser.all(f"[data-testid='{bad}']"), (page, browser.text)
