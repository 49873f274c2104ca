"""What is evaluated: prompts, how often, in which dimensions, and the tables that show it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from evals.dimensions import DIMENSIONS, VBENCH
from evals.suites import Suite, categories, custom, standard

TINY = "tiny_"
"""Prefix of a recipe whose metrics have small random weights: for tests, it means nothing."""
FILTERED_SAMPLES = 25
"""Videos of a flickering prompt before VBench's static filter, which leaves five at most."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An evaluation."""

    name: str
    about: str
    prompts: Literal["standard", "categories", "custom"]
    """VBench's own, its eight categories (from a folder), or a file's."""
    dimensions: tuple[str, ...]
    samples: int = 5
    """Videos of a prompt."""
    drift: tuple[str, ...] = ()
    """Dimensions whose drift is measured."""
    clips: bool = False
    """Score two-second clips of each video, and take their mean."""
    tables: tuple[str, ...] = ()
    """Presets that are printed at the end."""
    num_prompts: int | None = None
    """Take so many, spread evenly; None is all."""

    @property
    def is_tiny(self) -> bool:
        """Its weights are small and random."""
        return self.name.startswith(TINY)


_SIX = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "imaging_quality",
    "aesthetic_quality",
)

_RECIPES = (
    Recipe(
        name="vbench",
        about="VBench's 946 prompts, all 16 dimensions, total score",
        prompts="standard",
        dimensions=VBENCH,
        tables=("vbench",),
    ),
    Recipe(
        name="mimir",
        about="Mimir, tables 1 and 3: eight dimensions of VBench",
        prompts="standard",
        dimensions=(
            "background_consistency",
            "aesthetic_quality",
            "imaging_quality",
            "object_class",
            "multiple_objects",
            "color",
            "spatial_relationship",
            "temporal_style",
        ),
        tables=("mimir_1",),
    ),
    Recipe(
        name="rise",
        about="RISE-T2V, tables 2 to 7: 800 prompts of eight categories",
        prompts="categories",
        dimensions=("aesthetic_quality", "motion_smoothness", "dynamic_degree", "text_alignment"),
        samples=1,
        tables=("rise_3", "rise_figure4"),
    ),
    Recipe(
        name="semanticgen",
        about="SemanticGen, table 1: six dimensions of VBench, short videos",
        prompts="standard",
        dimensions=_SIX,
        tables=("semanticgen_1",),
    ),
    Recipe(
        name="semanticgen_ablation",
        about="SemanticGen, table 3: the same on 47 prompts",
        prompts="standard",
        dimensions=_SIX,
        samples=1,
        num_prompts=47,
        tables=("semanticgen_3",),
    ),
    Recipe(
        name="semanticgen_long",
        about="SemanticGen, table 2: two-second clips of long videos, and their drift",
        prompts="standard",
        dimensions=_SIX,
        samples=1,
        clips=True,
        drift=("imaging_quality",),
        tables=("semanticgen_2",),
    ),
    Recipe(
        name="custom",
        about="prompts of your own, the dimensions that need nothing but a video and its prompt",
        prompts="custom",
        dimensions=(
            *(n for n in VBENCH if DIMENSIONS[n].is_custom and n != "human_action"),
            "text_alignment",
        ),
        drift=("imaging_quality",),
        tables=("plain",),
    ),
)
NAMES = {recipe.name: recipe.about for recipe in _RECIPES}


def recipe(name: str) -> Recipe:
    """A recipe by name; `tiny_NAME` is the same with small random weights.

    Raises:
        ValueError: There is none; lists those there are.
    """
    for found in _RECIPES:
        if found.name == name:
            return found
        if TINY + found.name == name:
            return dataclasses.replace(found, name=name)
    raise ValueError(
        f"there is no recipe {name!r}: choose of {', '.join(NAMES)}, or {TINY}NAME of these"
    )


def with_dimensions(found: Recipe, dimensions: Sequence[str]) -> Recipe:
    """The recipe with other dimensions.

    Raises:
        ValueError: One of them is not known.
    """
    unknown = [name for name in dimensions if name not in DIMENSIONS]
    if unknown:
        raise ValueError(
            f"there is no dimension {', '.join(unknown)}: choose of {', '.join(DIMENSIONS)}"
        )
    drift = tuple(name for name in found.drift if name in dimensions)
    return dataclasses.replace(found, dimensions=tuple(dimensions), drift=drift)


def suite_of(
    found: Recipe, *, prompts: str | None, enhanced: str | None, flickering_samples: int | None
) -> Suite:
    """The recipe's prompts.

    Args:
        found: A recipe.
        prompts: Folder with VBench's prompts (categories), or file with prompts (custom).
        enhanced: Folder with VBench's prompts, whose long forms models are given.
        flickering_samples: Videos of a flickering prompt, where a static filter follows.

    Raises:
        ValueError: Prompts are missing, or are not what is needed.
    """
    if found.prompts == "standard":
        made = standard(
            dimensions=found.dimensions,
            samples=found.samples,
            flickering_samples=flickering_samples,
            enhanced=enhanced,
        )
    elif prompts is None:
        what = (
            "the folder `prompts` of a checkout of VBench"
            if found.prompts == "categories"
            else "a file with a prompt a line"
        )
        raise ValueError(f"recipe {found.name} needs --prompts: {what}")
    elif found.prompts == "categories":
        made = categories(
            enhanced or prompts,
            dimensions=found.dimensions,
            samples=found.samples,
            enhanced=enhanced is not None,
        )
    else:
        made = custom(prompts, dimensions=found.dimensions, samples=found.samples)
    return made.spread(found.num_prompts) if found.num_prompts else made
