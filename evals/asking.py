"""A command line as an evaluation, checked as a whole before any work starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.weights import tiny_folder
from evals import cache, environments
from evals.metrics import Implementation, choose
from evals.models import parse, with_settings
from evals.recipes import FILTERED_SAMPLES, Recipe, recipe, suite_of, with_dimensions
from evals.running import Request


def request_of(
    *,
    recipe: str,
    models: Sequence[str],
    settings: Sequence[str] = (),
    root: str,
    prompts: str | None = None,
    enhanced: str | None = None,
    dimensions: Sequence[str] = (),
    drift: Sequence[str] = (),
    skip_unavailable: bool = False,
    num_prompts: int | None = None,
    samples: int | None = None,
    static_filter: bool = False,
    seed: int = 0,
    weights: str | None = None,
    implementation: Implementation = "default",
    vbench_python: str | None = None,
    workers: int | None = None,
    retry_failed: bool = False,
    commit_every_s: float = 10.0,
    lease_expiry_s: float = 60.0,
    say: Callable[[str], None] = lambda _: None,
) -> Request:
    """What is to be done; the arguments are those of `python -m evals run`.

    Raises:
        ValueError: Something is not as it is needed: names all of a kind that are missing.
    """
    found = _recipe(recipe, dimensions, drift, num_prompts, samples)
    chosen = with_settings(parse(models), settings)
    if not chosen:
        raise ValueError("no model: --models NAME=FOLDER, one or more")
    for model in chosen:
        model.check()
    suite = suite_of(
        found,
        prompts=prompts,
        enhanced=enhanced,
        flickering_samples=FILTERED_SAMPLES if static_filter else None,
    )
    python = environments.python_of(vbench_python)
    found = _available(found, python, skip=skip_unavailable, say=say)
    folder = _weights(found, weights, say)
    filters = ("static",) if static_filter and "temporal_flickering" in found.dimensions else ()
    cache.check((*found.dimensions, *filters), folder)
    how = {"cache": str(folder), "python": python, "implementation": implementation}
    return Request(
        root=root,
        recipe=found,
        suite=suite,
        models=tuple(chosen),
        metrics=tuple(choose(found.dimensions, **how)),
        static=choose(filters, **how)[0] if filters else None,
        seed=seed,
        workers=workers,
        retry_failed=retry_failed,
        commit_every_s=commit_every_s,
        lease_expiry_s=lease_expiry_s,
    )


def _recipe(
    name: str,
    dimensions: Sequence[str],
    drift: Sequence[str],
    num_prompts: int | None,
    samples: int | None,
) -> Recipe:
    found = recipe(name)
    if dimensions:
        found = with_dimensions(found, dimensions)
    if others := [d for d in drift if d not in found.dimensions]:
        raise ValueError(f"--drift {' '.join(others)}: measured are {', '.join(found.dimensions)}")
    if drift:
        found = dataclasses.replace(found, drift=tuple(drift))
    for what, number in (("--num-prompts", num_prompts), ("--samples", samples)):
        if number is not None and number < 1:
            raise ValueError(f"{what} {number}: one at least is needed")
    return dataclasses.replace(
        found,
        num_prompts=num_prompts or found.num_prompts,
        samples=samples or found.samples,
    )


def _available(
    found: Recipe, python: str | None, *, skip: bool, say: Callable[[str], None]
) -> Recipe:
    """The recipe without what cannot be measured here, where that may be left out."""
    reasons = environments.available(found.dimensions, python)
    if not reasons:
        return found
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    told = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())
    left = [name for name in found.dimensions if name not in reasons]
    if not skip or not left:
        raise ValueError(
            f"recipe {found.name} has dimensions that cannot be measured here. {told}."
            " Or leave them out with --skip-unavailable"
        )
    say(f"left out, {told}")
    return with_dimensions(found, left)


def _weights(found: Recipe, named: str | None, say: Callable[[str], None]) -> Path:
    """The folder with the metrics' weights; small random ones are made where they are asked for."""
    if not found.is_tiny:
        folder = cache.folder(named)
        if cache.is_tiny(folder):
            raise ValueError(
                f"{folder} holds small random weights: name real ones, or recipe tiny_{found.name}"
            )
        return folder
    from evals.tiny_scene import make_scene_weights
    from evals.tiny_weights import make_vbench_cache

    say(f"recipe {found.name}: small random weights, their scores mean nothing")
    made = make_vbench_cache(Path(named) if named else tiny_folder() / "vbench")
    return make_scene_weights(made) if "scene" in found.dimensions else made
