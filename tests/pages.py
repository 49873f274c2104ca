"""The dashboard as its users have it: a server of its own, and a headless Chromium."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

REPOSITORY = Path(__file__).resolve().parents[1]


class Server:
    """`python -m cluster …`, listening on a port of this machine."""

    def __init__(self, arguments: tuple[str, ...], port: int):
        self.url = f"http://127.0.0.1:{port}"
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cluster", *arguments, "--port", str(port)],
            cwd=REPOSITORY,
            env=os.environ | {"HOME": tempfile.gettempdir()},
            stdout=self._log,
            stderr=self._log,
        )
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            assert self._process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.1)

    @property
    def log(self) -> str:
        """What it has said."""
        return Path(self._log.name).read_text()

    def stop(self) -> None:
        """As Ctrl-C does."""
        self._process.terminate()
        self._process.wait(20)


class Browser:
    """A headless Chromium and what tests ask of it."""

    def __init__(self, chromium: str, driver: str, *, width_px: int = 1400, height_px: int = 1000):
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--autoplay-policy=no-user-gesture-required", "--mute-audio",
            f"--window-size={width_px},{height_px}",
        ):  # fmt: skip
            options.add_argument(flag)
        options.page_load_strategy = "eager"
        self.driver = webdriver.Chrome(options=options, service=Service(driver))

    def quit(self) -> None:
        """Ends it."""
        self.driver.quit()

    def visit(self, url: str, *, dark: bool = False) -> None:
        """Opens a page in one of the themes, and waits until Streamlit has run it to its end."""
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]},
        )
        self.driver.get(url)
        self.settle()

    def settle(self, timeout_s: float = 60) -> None:
        """Waits until Streamlit is idle."""
        self.until(lambda: self._is_idle(), timeout_s)
        time.sleep(0.2)
        self.until(lambda: self._is_idle(), timeout_s)

    def _is_idle(self) -> bool:
        app = self.driver.find_elements(By.CSS_SELECTOR, "[data-testid='stApp']")
        if not app or app[0].get_attribute("data-test-script-state") != "notRunning":
            return False
        skeletons = "[data-testid='stSkeleton'], [data-testid='stAppSkeleton']"
        return not self.driver.find_elements(By.CSS_SELECTOR, skeletons)

    def until(self, holds: Callable[[], Any], timeout_s: float = 30) -> Any:
        """Waits for what is true in the end, and gives it."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(StaleElementReferenceException):
                if found := holds():
                    return found
            assert time.monotonic() < deadline, f"it did not come to pass; the page:\n{self.text}"
            time.sleep(0.1)

    @property
    def text(self) -> str:
        """All that the page says."""
        return self.driver.find_element(By.TAG_NAME, "body").text

    @property
    def html(self) -> str:
        """The page's document as it is now."""
        return self.driver.execute_script("return document.documentElement.outerHTML")

    def all(self, selector: str) -> list[Any]:
        """Elements by CSS selector."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def button(self, label: str) -> Any:
        """The button that says this."""
        return self.until(
            lambda: next((b for b in self.all("button") if b.text.strip() == label), None)
        )

    def picture(self, path: Path) -> Path:
        """Writes what the whole page looks like, as PNG."""
        height = self.driver.execute_script(
            "const m = document.querySelector('[data-testid=stMainBlockContainer]');"
            "return Math.min(m ? m.scrollHeight + 40 : 1000, 4000)"
        )
        width = self.driver.execute_script("return window.innerWidth")
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": max(height, 700), "deviceScaleFactor": 1, "mobile": False},
        )
        time.sleep(0.5)
        self.driver.save_screenshot(str(path))
        self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        return path
