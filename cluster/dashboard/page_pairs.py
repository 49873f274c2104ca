"""Pairs."""

from __future__ import annotations

from cluster.dashboard import look
from cluster.dashboard.places import Places


def show(places: Places) -> None:
    """The page."""
    look.begin("Pairs", places.dataset)
