"""Ranks of methods, as RISE-T2V's table 3 and figure 4 have them: ties share the better rank."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Set
from typing import NamedTuple

Table = Mapping[str, Mapping[str, float]]
"""Scores by column, then by model."""


def ranks(values: Mapping[str, float], higher_is_better: bool = True) -> dict[str, int]:
    """The rank of each model, 1 is best; ties share the better rank: 1, 2, 2, 4.

    Values tie where they are equal: round them first where a table shows them rounded.

    Raises:
        ValueError: A value is no number.

    Source:
        RISE-T2V, table 3: its printed ranks come out this way, and not with ties averaged.
    """
    for model, value in values.items():
        if value is None or math.isnan(value):
            raise ValueError(f"{model} has no score, so that nothing can be ranked: score it first")
    sign = 1 if higher_is_better else -1
    return {
        model: 1 + sum(sign * other > sign * value for other in values.values())
        for model, value in values.items()
    }


def average_ranks(
    table: Table,
    *,
    lower_is_better: Collection[str] = (),
    videos: Mapping[str, Mapping[str, Set[Hashable]]] | None = None,
) -> dict[str, float]:
    """The mean over columns of each model's rank.

    Args:
        table: Scores by column, then by model.
        lower_is_better: Columns where less is better.
        videos: What each of these scores is of, such as pairs of prompt and sample, by column and
            model: of those named in a column, all must be of the same.

    Raises:
        ValueError: There is no column, one lacks a model that another has, or models were scored
            on different videos.

    Source:
        RISE-T2V, table 3, "Rank".
    """
    if not table:
        raise ValueError("ranks are means over columns, and there is none")
    models = list(dict.fromkeys(model for values in table.values() for model in values))
    for column, values in table.items():
        lacking = [model for model in models if model not in values]
        if lacking:
            raise ValueError(
                f"{column} has no score of {', '.join(lacking)}, so that ranks would be of"
                " different methods: score what is missing, or leave the method out"
            )
        _same_videos(column, (videos or {}).get(column, {}))
    by_column = [ranks(values, column not in lower_is_better) for column, values in table.items()]
    return {model: sum(found[model] for found in by_column) / len(by_column) for model in models}


def _same_videos(column: str, videos: Mapping[str, Set[Hashable]]) -> None:
    first, *others = videos.items() or [("", frozenset())]
    for model, own in others:
        if own != first[1]:
            odd = min(own ^ first[1], key=str)
            alone = model if odd in own else first[0]
            raise ValueError(
                f"{first[0]} and {model} are not scored on the same videos in {column}"
                f" ({len(first[1])} and {len(own)}): {odd!r} is of {alone} alone; score what is"
                " missing, or leave one out"
            )


class Places(NamedTuple):
    """How often a model came first and second."""

    first: int
    second: int


def places(per_category: Table, *, higher_is_better: bool = False) -> dict[str, Places]:
    """How often each model comes first and second over categories.

    Args:
        per_category: By category, then by model: average ranks.
        higher_is_better: For scores in place of ranks.

    Raises:
        ValueError: A category lacks a model that another has, or there is none.

    Source:
        RISE-T2V, figure 4 (a).
    """
    average_ranks(per_category)  # for its refusals
    by_category = [ranks(values, higher_is_better) for values in per_category.values()]
    return {
        model: Places(
            sum(found[model] == 1 for found in by_category),
            sum(found[model] == 2 for found in by_category),
        )
        for model in by_category[0]
    }
