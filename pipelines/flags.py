"""Flags that commands share. Nothing is imported here that loads a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Models in place of the recipe's own, by hub id or local path."""

    clip: str | None = None
    """CLIP ViT-L/14: a weights file, a folder of open-clip, or MODEL/TAG, e.g. ViT-L-14/openai."""
    aesthetic_head: str | None = None
    """The aesthetic predictor's weights."""
    watermark_model: str | None = None
    """Model that is asked about watermarks."""
    captioner: str | None = None
    """Model that captions and rephrases; with --endpoint, its name there."""
    endpoint: str | None = None
    """OpenAI-compatible endpoint that serves the captioner, e.g. http://host:8000/v1."""
    endpoint_key: str | None = None
    """Environment variable that holds the endpoint's key."""
    endpoint_concurrency: int = 16
    """Requests under way at the endpoint at once."""
    trust_model_code: str | None = None
    """The captioner again, where code that comes with it may run on your machines."""
