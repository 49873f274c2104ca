"""What the dashboard was started on: passed to Streamlit's process as one JSON argument."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where things are; all paths are absolute or URIs."""

    dataset: str
    """Curated clips, or evaluations, or both."""
    evaluations: str
    """Dataset that holds `generations` and `scores`; `dataset` unless another is named."""
    training: tuple[str, ...] = ()
    """Folders of training runs."""
    cache: str = ""
    """Local folder for clips that were made playable."""
    cache_bytes: int = 2 * 2**30
    """What it may hold."""
    votes: str | None = None
    """Where the vote page writes; without it there is no such page."""
    study: Literal["rise", "mimir"] = "rise"
    """Of the vote page."""
    models: tuple[str, ...] = ()
    """Of the study; by default all that the evaluation has."""
    reference: str | None = None
    """Of Mimir's pairs: the model that is in each of them; None is every pair, as in the paper."""
    num_prompts: int | None = None
    """Of a new study: so many, drawn at random; None is all."""
    samples: int | None = None
    """Of a new study: videos of a prompt and model; None is all."""
    voters: str | None = None
    """File with the codes that may vote, one a line; None is any code."""
    only_vote: bool = False
    """No other page is shown: what voters see."""

    def to_json(self) -> str:
        """For a command line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Places:
        """From `to_json`."""
        said = json.loads(text)
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in said.items()})
