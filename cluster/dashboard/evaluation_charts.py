"""Charts of evaluations: told apart by colour and by name, with their noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from cluster.dashboard import look
from evals import segments

Rows = Sequence[Mapping[str, Any]]


def colours(models: Sequence[str]) -> alt.Scale:
    """A colour a model, the same in all charts of a page."""
    shades = [look.SERIES[n % len(look.SERIES)] for n in range(len(models))]
    return alt.Scale(domain=list(models), range=shades)


def _colour(models: Sequence[str], *, legend: bool = True) -> alt.Color:
    shown = alt.Legend(
        title=None, orient="top", labelLimit=260, symbolOpacity=1, symbolType="circle"
    )
    return alt.Color("model:N", scale=colours(models), legend=shown if legend else None)


def dots(rows: Rows, models: Sequence[str], *, title: str, unit: str) -> alt.LayerChart:
    """A model a line: its score and one standard error. Rows: model, value, stderr, n."""
    base = alt.Chart(alt.Data(values=[_bounded(row) for row in rows])).encode(
        y=alt.Y("model:N", title=None, sort=list(models), axis=alt.Axis(labelLimit=140)),
        color=_colour(models, legend=False),
    )
    x = alt.X("value:Q", title=unit, scale=alt.Scale(zero=False, nice=True, padding=12))
    return (
        base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=unit), x2="high:Q")
        + base.mark_point(filled=True, size=85, opacity=1).encode(x=x, tooltip=_tips())
    ).properties(title=title, height=26 * len(models) + 105, padding={"right": 14})


def grouped(
    rows: Rows, models: Sequence[str], groups: Sequence[str], *, title: str, unit: str
) -> alt.LayerChart:
    """Scores in each group (a category), models beside each other. Rows have `group` as well."""
    base = alt.Chart(alt.Data(values=[_bounded(row) for row in rows])).encode(
        y=alt.Y("group:N", title=None, sort=list(groups), axis=alt.Axis(grid=True)),
        yOffset=alt.YOffset("model:N", sort=list(models)),
        color=_colour(models),
    )
    x = alt.X("value:Q", title=unit, scale=alt.Scale(zero=False, padding=12))
    return (
        base.mark_rule(strokeWidth=1.6).encode(x=alt.X("low:Q", title=unit), x2="high:Q")
        + base.mark_point(filled=True, size=60, opacity=1).encode(x=x, tooltip=_tips("group"))
    ).properties(title=title, height=len(groups) * (13 * len(models) + 14) + 130)


def radar(
    values: Mapping[str, Mapping[str, float]],
    models: Sequence[str],
    *,
    title: str,
    rings: Sequence[float],
    inner: float,
    outer: float,
    unit: str,
) -> alt.LayerChart:
    """A polygon a model over spokes. `inner` and `outer` are the values at the middle and the rim.

    Args:
        values: By spoke, then by model.
        models: In the order of their colours.
        title: Of the chart.
        rings: Values at which a ring is drawn.
        inner: Value in the middle.
        outer: Value on the outermost ring.
        unit: Of the values, for the tooltip.
    """
    spokes = list(values)

    def at(angle: int, value: float) -> tuple[float, float]:
        turn = 2 * math.pi * angle / len(spokes)
        radius = max(0.0, (value - inner) / (outer - inner))
        return radius * math.sin(turn), radius * math.cos(turn)

    points = []
    for model in models:
        closed = [*range(len(spokes)), 0]
        for order, number in enumerate(closed):
            value = values[spokes[number]].get(model)
            if value is not None:
                x, y = at(number, value)
                about = {"model": model, "spoke": spokes[number], "value": value}
                points.append(about | {"x": x, "y": y, "order": order})
    web = [
        {"ring": ring, "order": order, "x": x, "y": y}
        for ring in rings
        for order in range(len(spokes) + 1)
        for x, y in [at(order, ring)]
    ]
    lines = [{"x": 0.0, "y": 0.0, "x2": x, "y2": y} for n in range(len(spokes))
             for x, y in [at(n, outer)]]  # fmt: skip
    names = [_label(spoke, *at(n, outer)) for n, spoke in enumerate(spokes)]
    marks = [{"x": 0.0, "y": at(0, ring)[1], "text": f"{ring:g}"} for ring in rings]
    domain = alt.Scale(domain=[-1.5, 1.5], nice=False)
    x, y = (alt.X("x:Q", scale=domain, axis=None), alt.Y("y:Q", scale=domain, axis=None))
    faint = {"color": look.GREY, "opacity": 0.35, "strokeWidth": 1}
    layers = [
        alt.Chart(alt.Data(values=web)).mark_line(**faint).encode(
            x=x, y=y, order="order:O", detail="ring:N"),
        alt.Chart(alt.Data(values=lines)).mark_rule(**faint).encode(x=x, y=y, x2="x2", y2="y2"),
        alt.Chart(alt.Data(values=points)).mark_line(strokeWidth=2.4).encode(
            x=x, y=y, order="order:O", color=_colour(models)),
        alt.Chart(alt.Data(values=points)).mark_point(filled=True, size=55, opacity=1).encode(
            x=x, y=y, color=_colour(models),
            tooltip=[alt.Tooltip("model:N"), alt.Tooltip("spoke:N", title="in"),
                     alt.Tooltip("value:Q", title=unit, format=".3f")]),
        alt.Chart(alt.Data(values=marks)).mark_text(
            dx=9, dy=-5, fontSize=10, color=look.GREY).encode(x=x, y=y, text="text:N"),
    ]  # fmt: skip
    for align, baseline in dict.fromkeys((one["align"], one["baseline"]) for one in names):
        some = [one for one in names if (one["align"], one["baseline"]) == (align, baseline)]
        look_of = {"align": align, "baseline": baseline, "lineBreak": "\n", "fontSize": 12}
        layers.append(
            alt.Chart(alt.Data(values=some))
            .mark_text(color=look.GREY, **look_of)
            .encode(x=x, y=y, text="text:N")
        )
    square = alt.AutoSizeParams(type="pad", contains="padding")
    return alt.layer(*layers).properties(width=420, height=420, title=title, autosize=square)


def _label(spoke: str, x: float, y: float) -> dict[str, Any]:
    """A spoke's name outside of the web."""
    align = "center" if abs(x) < 0.2 else "left" if x > 0 else "right"
    words, lines = spoke.split(), [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) > 13:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    baseline = "middle" if abs(y) < 0.8 else "bottom" if y > 0 else "top"
    place = {"x": 1.1 * x, "y": 1.1 * y, "align": align, "baseline": baseline}
    return place | {"text": "\n".join(lines)}


def curves(
    rows: Rows, models: Sequence[str], *, title: str, label: str, length_s: float
) -> alt.LayerChart:
    """Scores over the length of videos, their ends shaded. Rows: model, time_s, score, line."""
    share = segments.SHARE
    ends = [
        {"a": 0.0, "b": share * length_s},
        {"a": (1 - share) * length_s, "b": length_s},
    ]
    base = alt.Chart(alt.Data(values=list(rows))).encode(
        x=alt.X("time_s:Q", title="seconds from the start", scale=alt.Scale(nice=False)),
        color=_colour(models),
    )
    y = alt.Y("score:Q", title=label, scale=alt.Scale(zero=False, padding=8))
    tips = [alt.Tooltip("model:N"), alt.Tooltip("time_s:Q", title="seconds", format=".2f"),
            alt.Tooltip("score:Q", format=".4f")]  # fmt: skip
    return alt.layer(
        alt.Chart(alt.Data(values=ends)).mark_rect(color=look.GREY, opacity=0.13).encode(
            x=alt.X("a:Q"), x2="b:Q"),
        base.mark_line(strokeWidth=1.4, strokeDash=[6, 4], opacity=0.75).encode(
            y=alt.Y("line:Q", title=label)),
        base.mark_line(strokeWidth=2.4).encode(y=y),
        base.mark_point(filled=True, size=38, opacity=1).encode(y=y, tooltip=tips),
    ).properties(title=title, height=400)  # fmt: skip


def frames(rows: Rows, models: Sequence[str], *, label: str) -> alt.Chart:
    """Scores of the frames of single videos. Rows: model, time_s, score."""
    return (
        alt.Chart(alt.Data(values=list(rows)))
        .mark_line(point=len(rows) < 200)
        .encode(
            x=alt.X("time_s:Q", title="seconds", scale=alt.Scale(nice=False)),
            y=alt.Y("score:Q", title=label, scale=alt.Scale(zero=False)),
            color=_colour(models),
        )
        .properties(height=200)
    )


def trend(rows: Rows, models: Sequence[str], *, title: str, label: str) -> alt.LayerChart:
    """Scores of nights, with one standard error. Rows: model, date, value, stderr, n, fell."""
    nights = sorted({row["date"] for row in rows})
    axis = alt.Axis(labelAngle=0, labelOverlap="greedy")
    base = alt.Chart(alt.Data(values=[_bounded(row) for row in rows])).encode(
        x=alt.X("date:O", title="night", sort=nights, axis=axis),
        color=_colour(models),
    )
    y = alt.Y("value:Q", title=label, scale=alt.Scale(zero=False, padding=8))
    return alt.layer(
        base.mark_area(opacity=0.16).encode(y=alt.Y("low:Q", title=label), y2="high:Q"),
        base.mark_line(strokeWidth=2.2).encode(y=y),
        base.mark_point(filled=True, size=60, opacity=1).encode(
            y=y, tooltip=[alt.Tooltip("date:O", title="night"), *_tips()]),
        base.transform_filter("datum.fell").mark_point(
            size=220, strokeWidth=2.2, opacity=1).encode(y=y, color=alt.value("#d9635b")),
    ).properties(title=title, height=380)  # fmt: skip


def differences(rows: Rows, *, title: str, a: str, b: str) -> alt.LayerChart:
    """A - b with its interval. Rows: dimension, mean, low, high, verdict."""
    verdicts = ["beyond noise", "within noise", "too few prompts"]
    shades = [look.SERIES[0], look.GREY, "#c3c8d0"]
    order = [row["dimension"] for row in rows]
    base = alt.Chart(alt.Data(values=list(rows))).encode(
        y=alt.Y("dimension:N", title=None, sort=order, axis=alt.Axis(labelLimit=220)),
        color=alt.Color("verdict:N", scale=alt.Scale(domain=verdicts, range=shades),
                        legend=alt.Legend(title=None, orient="top")),
    )  # fmt: skip
    label = f"{a} − {b}, score (95 % interval)"
    zero = alt.Chart(alt.Data(values=[{"x": 0}])).mark_rule(color=look.GREY, strokeDash=[4, 4])
    tips = [alt.Tooltip("dimension:N"), alt.Tooltip("mean:Q", format="+.4f", title="difference"),
            alt.Tooltip("low:Q", format="+.4f"), alt.Tooltip("high:Q", format="+.4f"),
            alt.Tooltip("verdict:N")]  # fmt: skip
    return alt.layer(
        zero.encode(x=alt.X("x:Q", title=label)),
        base.mark_rule(strokeWidth=2.4).encode(x=alt.X("low:Q", title=label), x2="high:Q"),
        base.mark_point(filled=True, size=90, opacity=1).encode(
            x=alt.X("mean:Q", title=label), tooltip=tips
        ),
    ).properties(title=title, height=30 * len(rows) + 175)


def _tips(*more: str) -> list[alt.Tooltip]:
    return [
        alt.Tooltip("model:N"),
        *(alt.Tooltip(f"{name}:N") for name in more),
        alt.Tooltip("value:Q", format=".4f"),
        alt.Tooltip("stderr:Q", format=".4f", title="± standard error"),
        alt.Tooltip("n:Q", title="videos", format=","),
    ]


def _bounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """With the ends of one standard error; a point alone where there is none."""
    error = row["stderr"] or 0.0
    return dict(row) | {"low": row["value"] - error, "high": row["value"] + error}
