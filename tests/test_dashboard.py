"""The dashboard as a whole: its pages, both themes, and datasets that are not as they should be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def test_every_page_opens_in_both_themes(
    quadruples: Path, serve: Callable[..., str], browser: Any
) -> None:
    url = serve("dashboard", quadruples)
    for page in ("funnel", "clips", "thresholds", "pairs", "training", "evaluation", "runs"):
        for dark in (False, True):
            browser.visit(f"{url}/{page}", dark=dark)
            assert not browser.all("[data-testid='stException']"), browser.text
            assert page.capitalize() in browser.text
