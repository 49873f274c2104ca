"""A night's report for people: tables for a terminal, Markdown, and one HTML file without a server.

The file needs nothing beside it: its style and its pictures are inside, and it is legible on a
light and on a dark screen.
"""

from __future__ import annotations

import datetime
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from rich.table import Table

from engine import storage
from evals.compare import LEVEL, MIN_PROMPTS
from evals.drift import COLUMN
from evals.report import Comparison, ModelNight, Report, Score, p_told, title
from evals.trend import TrendPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILES = ("report.md", "report.json", "report.html")
_HEADS = (
    "dimension", "score", "± error", "against the export before", "p", "against the last ones",
    "p", "prompts", "verdict",
)  # fmt: skip
_VERDICTS = {"worse": "WORSE", "better": "better", "same": "within noise", "too few": "cannot tell"}
# Stand-ins, which the page's style gives the colours of its theme.
_INK, _GREY, _LINE = "#010203", "#040506", "#070809"
_BAD = "#0a0b0c"
_COLOURS = tuple(f"#0d0e{num:02x}" for num in range(6))
"""Of models; the page has Okabe and Ito's for them, brighter ones on a dark screen."""
_MARKERS = "osD^vP"


def method(report: Report) -> str:
    """How it was told, in a paragraph."""
    least = max((c.needed for c in report.comparisons), default=MIN_PROMPTS)
    return (
        "Each score is compared on the same prompts, by a paired bootstrap over prompts, with that"
        f" of the export before, and with the mean of the last {report.nights:,} exports that had"
        " not regressed in it: the first catches a jump, the second a slow decline, and it keeps a"
        " regression named until it is mended or --since leaves the nights before it out. An"
        " export that did not change is not compared with itself. p is adjusted by Holm over all"
        f" comparisons of a run: where nothing has changed, about {1 - LEVEL:.0%} of nights name a"
        " difference, and half of these a fall; over many nights such false alarms add up. A"
        f" decline within its noise over {report.nights:,} exports is not seen. Intervals are"
        f" {LEVEL:.0%}, of one comparison each. Below {least:,} prompts nothing can be told."
        + (
            f" Falls of up to {report.tolerance:g} count as none (--tolerance)."
            if report.tolerance
            else ""
        )
    )


def lines_of(report: Report, model: ModelNight) -> Iterator[tuple[str, ...]]:
    """A table's lines: one a dimension."""
    by = {(c.dimension, c.against): c for c in report.comparisons if c.model == model.name}
    losses = {x.dimension for x in report.losses if x.model == model.name}
    for score in model.scores:
        some = [by.get((score.dimension, side)) for side in ("previous", "window")]
        there = [c for c in some if c is not None]
        yield (
            title(score.dimension),
            _number(score.value),
            "–" if score.stderr is None else f"± {score.stderr:.4f}",
            *(cell for one in some for cell in _against(one)),
            f"{max((c.difference.num_prompts for c in there), default=score.num_prompts):,}",
            _verdict(there, score, is_lost=score.dimension in losses),
        )


def tables(report: Report) -> Iterator[Table]:
    """A table a model, for a terminal."""
    for model in report.models:
        made = Table(title=_heading(model), title_justify="left", caption_justify="left")
        made.caption = _TINY if model.is_tiny else None
        for num, head in enumerate(_HEADS):
            made.add_column(head, justify="left" if num in (0, len(_HEADS) - 1) else "right")
        for line in lines_of(report, model):
            bad = line[-1].startswith(("WORSE", "lost"))
            made.add_row(*line, style="bold red" if bad else None)
        yield made


def markdown(report: Report) -> str:
    """The report as Markdown."""
    parts = [
        f"# Nightly evaluation {report.date}",
        _about(report),
        f"**{report.status.capitalize()}**",
    ]
    if report.is_tiny:
        parts.append(_TINY)
    parts.append("\n".join(f"- {_plain(line)}" for line in report.sentences()))
    for model in report.models:
        parts.append(f"## {_plain(_heading(model))}")
        rows = [_HEADS, ("---",) + ("---:",) * (len(_HEADS) - 2) + ("---",)]
        rows += [tuple(map(_plain, line)) for line in lines_of(report, model)]
        parts.append("\n".join("| " + " | ".join(row) + " |" for row in rows))
    parts.append(f"{method(report)}")
    return "\n\n".join(parts) + "\n"


def to_json(report: Report, points: Iterable[TrendPoint] = ()) -> dict[str, Any]:
    """The report for programs."""
    said = report.to_dict()
    return said | {
        "has_regressed": report.has_regressed,
        "exit_code": report.exit_code,
        "sentences": report.sentences(),
        "trend": [vars(point) for point in points],
    }


def write(report: Report, points: Sequence[TrendPoint], folder: str) -> list[str]:
    """Writes `FILES` into a folder, which may be in a store; gives their places."""
    storage.make_folder(folder)
    texts = (markdown(report), json.dumps(to_json(report, points), indent=1), html(report, points))
    written = []
    for name, text in zip(FILES, texts, strict=True):
        uri = storage.join(folder, name)
        storage.write_bytes(uri, text.encode())
        written.append(uri)
    return written


def html(report: Report, points: Sequence[TrendPoint]) -> str:
    """The report as one page that needs nothing else."""
    made = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    kind = "bad" if report.has_regressed else "good"
    head = (
        f"<header><p class=eyebrow>Nightly evaluation</p><h1>{escape(report.date)}</h1>"
        f"<p class=about>{escape(_about(report))}</p>"
        f'<p class="status {kind}">{escape(report.status.capitalize())}</p></header>'
    )
    parts = [head]
    if report.is_tiny:
        parts.append(f'<p class="note bad">{escape(_TINY)}</p>')
    parts.append("<ul>" + "".join(f"<li>{escape(s)}</li>" for s in report.sentences()) + "</ul>")
    parts += [_section(report, model) for model in report.models]
    names = [m.name for m in report.models]
    if some := [p for p in points if p.model in names and p.value is not None]:
        parts.append(_trends(some, names))
    parts.append(f"<footer><h2>How it was told</h2><p>{escape(method(report))}</p>"
                 f"<p>Written {made}.</p></footer>")  # fmt: skip
    return _PAGE.format(title=escape(f"Nightly evaluation {report.date}"), body="\n".join(parts))


_TINY = "MEANINGLESS: small random weights made or measured these videos"


def _about(report: Report) -> str:
    return (
        f"{report.recipe}, {report.suite}: {report.num_prompts:,} prompts;"
        f" {sum(m.num_made for m in report.models):,} videos made,"
        f" {report.num_scored:,} scores measured in {report.seconds:,.0f} s"
    )


def _heading(model: ModelNight) -> str:
    weights = f", {model.kind} {model.checkpoint}" if model.checkpoint else f", {model.kind}"
    same = f", unchanged since {model.unchanged_since}" if model.unchanged_since else ""
    return f"{model.name}{weights}{same}"


def _against(one: Comparison | None) -> tuple[str, str]:
    """A difference with its interval, and p."""
    if one is None:
        return "–", "–"
    d = one.difference
    if d.mean is None or d.low is None or d.high is None:
        return _number(d.mean, "+.4f"), "–"
    p = d.p if d.p_adjusted is None else d.p_adjusted
    return f"{d.mean:+.4f} ({d.low:+.4f} … {d.high:+.4f})", p_told(p)


def _verdict(some: Sequence[Comparison], score: Score, *, is_lost: bool) -> str:
    told = {c.verdict: c for c in reversed(some)}  # the night before first
    found = next((v for v in ("worse", "too few", "better", "same") if v in told), None)
    said = _VERDICTS[found] if found else "not compared"
    if found == "worse":
        than = told["worse"].nights
        said += f" than {than[0] if len(than) == 1 else f'the last {len(than)}'}"
    if found == "too few":
        said += f" ({told['too few'].needed} prompts needed)"
    if is_lost:
        missing = score.num_expected - score.num_videos
        said = f"lost scores ({missing:,} of {score.num_expected:,})" + (
            f", {said}" if found == "worse" else ""
        )
    return said


def _number(value: float | None, how: str = ".4f") -> str:
    return "–" if value is None else format(value, how)


def _plain(text: str) -> str:
    """Text that Markdown leaves as it is."""
    return re.sub(r"([|*_<>\[\]`])", r"\\\1", " ".join(text.split()))


def _section(report: Report, model: ModelNight) -> str:
    heads = "".join(f"<th>{escape(head)}</th>" for head in _HEADS)
    rows = []
    for line in lines_of(report, model):
        last = line[-1]
        kind = "bad" if last.startswith(("WORSE", "lost")) else "dim"
        kind = "good" if last == "better" else kind
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in line[:-1])
        rows.append(f"<tr class={kind}>{cells}<td class=verdict>{escape(last)}</td></tr>")
    return (
        f"<section><h2>{escape(_heading(model))}</h2><div class=wide><table>"
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _trends(points: Sequence[TrendPoint], models: Sequence[str]) -> str:
    by_dimension: dict[str, list[TrendPoint]] = defaultdict(list)
    for point in points:
        by_dimension[point.dimension].append(point)
    colours = {name: _COLOURS[num % len(_COLOURS)] for num, name in enumerate(models)}
    legend = "".join(
        f'<span><i style="background:var(--c{num % len(_COLOURS)})"></i>{escape(name)}</span>'
        for num, name in enumerate(colours)
    )
    charts = "".join(
        f"<figure><figcaption>{escape(title(dimension))}"
        f"{'<small>less is better</small>' if dimension.startswith(COLUMN) else ''}</figcaption>"
        f"{chart(some, colours)}</figure>"
        for dimension, some in by_dimension.items()
    )
    nights = len({point.date for point in points})
    return (
        f"<section><h2>Trend over {nights:,} {'night' if nights == 1 else 'nights'}</h2>"
        f"<p class=legend>{legend}<span><i class=ring></i>regressed</span></p>"
        f"<div class=charts>{charts}</div><p class=about>Scores, 0 to 1, ± one standard error over"
        " prompts. A line is broken where other weights or versions began to measure.</p></section>"
    )


def chart(points: Sequence[TrendPoint], colours: Mapping[str, str]) -> str:
    """A dimension's scores over the nights, as SVG whose colours are those of the page."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": "trend", "font.size": 9, "text.color": _INK,
             "text.parse_math": False, "font.family": "sans-serif"}  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.0, 2.1), facecolor="none")
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_axes((0.15, 0.16, 0.82, 0.78), facecolor="none")
        for num, (name, colour) in enumerate(colours.items()):
            own = sorted((p for p in points if p.model == name), key=lambda p: p.date)
            _draw(axes, own, colour, _MARKERS[num % len(_MARKERS)])
        _finish(axes, [datetime.date.fromisoformat(p.date) for p in points])
        out = io.BytesIO()
        canvas.print_figure(out, format="svg", metadata={"Date": None})
    return _inline(out.getvalue().decode())


def _draw(axes: Axes, points: Sequence[TrendPoint], colour: str, marker: str) -> None:
    """A model's scores; a line only between those that may be compared."""
    runs: list[list[TrendPoint]] = []
    for point in points:
        if not runs or runs[-1][-1].fingerprint != point.fingerprint:
            runs.append([])
        runs[-1].append(point)
    for some in runs:
        days = [datetime.date.fromisoformat(p.date) for p in some]
        values = [p.value for p in some]
        errors = [p.stderr or 0.0 for p in some]
        axes.errorbar(
            days, values, yerr=errors, color=colour, marker=marker, markersize=4, linewidth=1.5,
            elinewidth=0.8, capsize=0,
        )  # fmt: skip
        bad = [p for p in some if p.regressed]
        axes.plot(
            [datetime.date.fromisoformat(p.date) for p in bad], [p.value for p in bad],
            linestyle="none", marker="o", markersize=10, markerfacecolor="none",
            markeredgecolor=_BAD, markeredgewidth=1.6,
        )  # fmt: skip


def _finish(axes: Axes, days: Sequence[datetime.date]) -> None:
    """Few and short labels, and no line that says nothing."""
    from matplotlib.ticker import MaxNLocator

    first, last = min(days), max(days)
    axes.margins(x=0.06, y=0.14)
    if first == last:
        axes.set_xlim(first - datetime.timedelta(1), last + datetime.timedelta(1))
    middle = first + (last - first) // 2
    shown = sorted({first, middle, last} if (last - first).days > 3 else set(days))
    axes.set_xticks(shown, [f"{day.day} {day:%b}" for day in shown])
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.ticklabel_format(axis="y", useOffset=False, style="plain")
    axes.tick_params(colors=_GREY, labelsize=8, length=0)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def _inline(svg: str) -> str:
    """A picture for inside of a page: the page's colours, no head, no ids that nothing names."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    names = {_INK: "--ink", _GREY: "--grey", _LINE: "--line", _BAD: "--bad"}
    names |= {colour: f"--c{num}" for num, colour in enumerate(_COLOURS)}
    for stand_in, name in names.items():
        svg = svg.replace(stand_in, f"var({name})")
    svg = re.sub(r' id="(?!m[0-9a-f]|p[0-9a-f])[^"]*"', "", svg)
    svg = re.sub(r"font: ([^;\"']*?px) [^;\"]*", r"font: \1 inherit", svg)
    opening = re.compile(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>')
    return opening.sub(r'<svg role="img" viewBox="\1">', svg, count=1)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{
  color-scheme: light dark;
  --ink: #1c2024; --grey: #60646c; --line: #e3e5e8; --page: #fbfbfc; --card: #ffffff;
  --bad: #b4232c; --bad-soft: #fdecec; --good: #1a7f45; --good-soft: #e8f5ec;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #c98500; --c5: #56b4e9;
}}
@media (prefers-color-scheme: dark) {{ :root {{
  --ink: #e8eaed; --grey: #9ba1a8; --line: #2e3338; --page: #121416; --card: #1a1d20;
  --bad: #ff8a80; --bad-soft: #3a1d1f; --good: #6fcf97; --good-soft: #16301f;
  --c0: #4ba3e3; --c1: #f0883e; --c2: #2fc99b; --c3: #e39bc3; --c4: #f0b429; --c5: #8fd0f5;
}} }}
body {{ margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }}
main {{ max-width: 1180px; margin: 0 auto; padding: 32px 24px 56px; }}
h1 {{ font-size: 30px; line-height: 1.15; margin: 0 0 6px; letter-spacing: -0.01em; }}
h2 {{ font-size: 17px; margin: 34px 0 10px; overflow-wrap: anywhere; }}
.eyebrow, .about, footer p {{ color: var(--grey); margin: 0 0 4px; }}
.eyebrow {{ font-size: 13px; letter-spacing: 0.06em; text-transform: uppercase; }}
.status {{ display: inline-block; margin: 14px 0 2px; padding: 5px 12px; border-radius: 999px;
  font-weight: 600; }}
.status.bad, .note.bad {{ color: var(--bad); background: var(--bad-soft); }}
.status.good {{ color: var(--good); background: var(--good-soft); }}
.note {{ padding: 8px 12px; border-radius: 8px; font-weight: 600; }}
ul {{ padding-left: 20px; }} li {{ margin: 4px 0; overflow-wrap: anywhere; }}
.wide {{ overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }}
table {{ border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }}
th, td {{ padding: 8px 9px; text-align: right; white-space: nowrap; }}
th {{ color: var(--grey); font-weight: 500; font-size: 13px;
  border-bottom: 1px solid var(--line); }}
tr + tr td {{ border-top: 1px solid var(--line); }}
th:first-child, td:first-child, th:last-child, td:last-child {{ text-align: left; }}
tr.bad td {{ background: var(--bad-soft); }}
td.verdict {{ white-space: normal; min-width: 7em; }}
tr.bad .verdict {{ color: var(--bad); font-weight: 600; }}
tr.good .verdict {{ color: var(--good); font-weight: 600; }}
tr.dim .verdict {{ color: var(--grey); }}
.charts {{ display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); }}
figure {{ margin: 0; padding: 12px 14px 6px; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px; }}
figcaption {{ font-weight: 600; font-size: 14px; }}
figcaption small {{ color: var(--grey); font-weight: 400; margin-left: 8px; }}
svg {{ display: block; width: 100%; height: auto; }}
.legend {{ display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 0 0 12px; font-size: 14px; }}
.legend i {{ display: inline-block; width: 11px; height: 11px; border-radius: 3px;
  margin-right: 7px; }}
.legend i.ring {{ border: 2px solid var(--bad); border-radius: 50%; width: 8px; height: 8px; }}
footer {{ margin-top: 40px; border-top: 1px solid var(--line); max-width: 75ch; }}
</style></head>
<body><main>
{body}
</main></body></html>
"""
