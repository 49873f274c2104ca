"""Tables against what the papers print, and what a reader is told of every number."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re

import pytest
from rich.console import Console

from evals import leaderboard
from evals.dimensions import DIMENSIONS, VBENCH
from evals.presets import PRESETS, plain, preset_named
from evals.published import published
from evals.results import Cell, Value
from evals.rows import category_ranks
from evals.tables import Entry, Row, Table, table

# As the papers' texts have them, a line a model; a name ends where its numbers begin.
PRINTED = {
    "mimir_1": """
        ModelscopeT2V 92.00%37.14%55.85%31.17%1.52%63.20%8.26%14.52%
        OpenSora 97.20%58.57%63.38%90.79%64.81%84.67%76.63%25.51%
        OpenSoraPlan 97.50%59.40%57.79%67.39%26.98%83.38%38.69%21.86%
        CogVideoX-2B 94.71%60.27%60.52%84.86%65.70%86.21%70.49%25.10%
        CogVideoX-5B 95.60%60.62%61.35%87.82%65.70%84.17%64.86%25.86%
        Mimir 97.68%62.92%63.91%92.87%85.29%86.50%78.67%26.22%
    """,
    "mimir_3": """
        Baseline 95.60%60.62%61.35%87.82%65.70%84.17%64.86%25.86%
        B+Decoder-only 94.66%36.38%60.10%4.97%0.00%37.50%2.36%3.66%
        B+Decoder-only+Norm 97.12%61.68%62.52%85.50%65.24%84.85%59.28%25.26%
        B+Decoder-only+Norm+SS 96.48%58.11%62.49%87.18%68.83%85.21%67.86%24.33%
        B+Decoder-only+ZeroConv 97.20%61.21%62.99%92.03%84.98%86.21%69.17%25.03%
        B+Decoder-only+ZeroConv+SS 97.33%62.14%63.02%91.21%84.47%86.43%70.16%23.68%
        Mimir 97.68%62.92%63.91%92.87%85.29%86.50%78.67%26.22%
    """,
    "semanticgen_1": """
        Hunyuan-Video 91.11%95.32%97.49%99.07%64.23%62.60%
        Wan2.1-T2V-14B 97.23%98.28%98.35%99.08%66.63%65.61%
        Base-CT 96.17%97.27%98.07%99.07%65.77%63.97%
        SemanticGen 97.79%97.68%98.47%99.17%65.23%64.60%
    """,
    "semanticgen_2": """
        SkyReels-V2 93.13%95.11%98.41%99.24%66.00%62.17%9.00%
        Self-Forcing 90.41%93.42%98.51%99.17%70.23%62.73%12.39%
        LongLive 94.77%95.90%98.48%99.21%70.17%64.73%4.08%
        Base-CT-Swin 94.01%94.84%98.64%99.32%68.15%61.66%5.20%
        SemanticGen 95.07%96.70%98.31%99.55%70.47%64.09%3.58%
    """,
    "semanticgen_3": """
        w.o. compression (dim=2048) 96.29%96.54%96.39%99.31%67.42%58.88%
        w. compression (dim=64) 97.36%96.85%98.23%98.34%68.16%60.62%
        w. compression (dim=8) 97.49%97.34%98.27%99.38%68.43%60.95%
    """,
    "rise_2": """
        AnimateDiff 6.39 0.983 31.36
        AnimateDiff, dense prompt 6.54 0.981 32.69
        RISE-AnimateDiff 6.61 0.984 31.95
    """,
    "rise_3": """
        Pika 6.11 0.996 29.65 4.33
        Gen2 6.45 0.995 31.35 3.33
        ModelScope 4.94 0.967 31.61 6.67
        Latte 5.60 0.970 32.07 4.67
        VideoCrafter2 6.00 0.984 31.86 3.67
        CogVideoX-2B 5.40 0.983 30.12 6.33
        AnimateDiff 6.39 0.983 31.36 4.33
        RISE-AnimateDiff 6.61 0.984 31.95 2.00
    """,
    "rise_6": """
        AnimateDiff 6.39 0.983 31.36
        AnimateDiff, fine-tuned 5.93 0.970 30.50
        RISE-AnimateDiff 6.61 0.984 31.95
    """,
    "rise_7": """
        AnimateDiff 6.39 0.983 0.083 31.36
        RISE-T2V (LLaMA2) 6.61 0.984 0.273 31.95
        RISE-T2V (ChatGLM3) 6.72 0.985 0.151 30.90
    """,
}


def printed(name: str) -> dict[str, list[str]]:
    """By model, the numbers as the paper has them, ranks of RISE's table 3 with them."""
    found = {}
    for line in PRINTED[name].strip().splitlines():
        model, numbers = re.fullmatch(r"(.*?) ((?:\d+\.\d+[% ]*)+)", line.strip()).groups()
        found[model] = re.findall(r"\d+\.\d+%?", numbers)
    return found


def cell(model: str = "ours", column: str = "color", value: float | None = 0.5, **more) -> Cell:
    about = {
        "category": None,
        "stderr": 0.0031,
        "num_videos": 470,
        "num_prompts": 94,
        "num_expected": 470,
        "num_failed": 0,
    }
    return Cell(model=model, column=column, value=value, **about | more)


def row(made: Table, model: str) -> Row:
    (found,) = [one for one in made.rows if one.model == model]
    return found


def entry(made: Table, model: str, column: str) -> Entry:
    columns = [heading.column.dimension for heading in made.headings]
    return row(made, model).entries[columns.index(column)]


def told(made: Table, of: Entry) -> str:
    texts = dict(made.footnotes)
    return "; ".join(texts[mark] for mark in of.notes)


def places(made: Table, column: str) -> dict[str, str]:
    of = {one.model: entry(made, one.model, column).place for one in made.rows}
    return {model: place for model, place in of.items() if place}


def on_terminal(made: Table, width: int = 200) -> str:
    out = Console(file=io.StringIO(), width=width, record=True)
    out.print(made.rich())
    return out.export_text()


# The papers


@pytest.mark.parametrize("name", PRINTED)
def test_published_rows_read_as_the_paper_prints_them(name: str) -> None:
    made = table(name, published(name))
    assert {one.model: [e.number for e in one.entries] for one in made.rows} == printed(name)
    assert [one.model for one in made.rows] == list(printed(name)), "in the paper's order"


def test_ranks_are_those_that_rise_prints() -> None:
    made = table("rise_3", published("rise_3"))
    found = {one.model: entry(made, one.model, "rank").number for one in made.rows}
    assert found == {model: numbers[-1] for model, numbers in printed("rise_3").items()}
    assert places(made, "rank") == {"RISE-AnimateDiff": "best", "Gen2": "second"}
    assert made.headings[-1].title == "Rank↓" and made.headings[0].title == "Aesthetic↑"


def test_best_and_second_stand_where_the_papers_have_them() -> None:
    made = table("mimir_1", published("mimir_1"))
    seconds = {
        "background_consistency": {"OpenSoraPlan"},
        "aesthetic_quality": {"CogVideoX-5B"},
        "imaging_quality": {"OpenSora"},
        "object_class": {"OpenSora"},
        "multiple_objects": {"CogVideoX-2B", "CogVideoX-5B"},  # 65.70 twice
        "color": {"CogVideoX-2B"},
        "spatial_relationship": {"OpenSora"},
        "temporal_style": {"CogVideoX-5B"},
    }
    for column, models in seconds.items():
        expected = {"Mimir": "best"} | dict.fromkeys(models, "second")
        assert places(made, column) == expected, column
    drift = places(table("semanticgen_2", published("semanticgen_2")), "drift:imaging_quality")
    assert drift == {"SemanticGen": "best", "LongLive": "second"}, "less drift is better"


def test_what_cannot_be_read_is_left_out_and_says_so() -> None:
    made = table("rise_5", published("rise_5"))
    unread = entry(made, "RISE-AnimateDiff, 3D cartoon", "text_alignment")
    assert unread.number == "–" and "does not give this number for certain" in told(made, unread)
    assert entry(made, "RISE-CogVideoX", "text_alignment").number == "33.33"
    assert sum(e.number == "–" for one in made.rows for e in one.entries) == 6


def test_presets_say_what_each_column_is() -> None:
    for name, preset in PRESETS.items():
        assert preset.name == name and preset.source and preset.columns
        for column in preset.columns:
            dimension = column.dimension.removeprefix("drift:")
            assert dimension in DIMENSIONS or dimension in ("quality", "semantic", "total")
            assert column.meaning and column.multiplier in (1, 10, 100)
            assert column.higher_is_better != column.dimension.startswith("drift:")
    aesthetic, motion, text = PRESETS["rise_3"].columns
    assert (aesthetic.multiplier, motion.digits, text.multiplier) == (10, 3, 100)
    assert text.clip == "CLIP ViT-B/32" and "does not say which CLIP" in (text.note or "")
    assert "does not print which metric" in (PRESETS["semanticgen_2"].columns[-1].note or "")
    assert PRESETS["semanticgen_3"].suite == "47 prompts"
    assert all(c.suffix == "%" for c in PRESETS["mimir_1"].columns)
    assert [c.dimension for c in PRESETS["vbench"].columns[:16]] == list(VBENCH)
    assert published("rise_figure4") == [], "the paper draws it and prints no numbers"
    with pytest.raises(ValueError, match="no table 'mimir_2': choose one of mimir_1"):
        preset_named("mimir_2")


def test_a_plain_table_has_whatever_was_measured() -> None:
    made = table(plain(["text_alignment"], ["imaging_quality"]), [cell(column="text_alignment")])
    assert made.title == "Everything that was measured"
    assert [h.title for h in made.headings] == ["Text Alignment", "Δdrift Imaging Quality"]
    assert not made.headings[1].column.higher_is_better


# Places


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"a": 0.4, "b": 0.3, "c": 0.3, "d": 0.2}, {"a": "best", "b": "second", "c": "second"}),
        ({"a": 0.4, "b": 0.4, "c": 0.3}, {"a": "best", "b": "best"}),
        ({"a": 0.12341, "b": 0.12339, "c": 0.1}, {"a": "best", "b": "best"}),  # both 12.34%
        ({"a": 0.12346, "b": 0.12344}, {"a": "best", "b": "second"}),
        ({"a": 0.4, "b": 0.4}, {}),
        ({"a": 0.4}, {}),
    ],
)
def test_equal_digits_share_the_better_place(
    values: dict[str, float], expected: dict[str, str]
) -> None:
    made = table("mimir_1", [cell(model, value=value) for model, value in values.items()])
    assert places(made, "color") == expected


def test_published_rows_stand_above_ours_and_are_marked() -> None:
    made = table("mimir_1", [cell("Mimir", value=0.999)], with_published=True)
    assert [one.published is None for one in made.rows] == [False] * 6 + [True]
    colours = [one.entries[5].place for one in made.rows]
    assert colours == [None, None, None, None, None, "second", "best"], "theirs, then ours"
    assert made.footnotes[0] == ("†", "Mimir (arXiv 2412.03085), table 1")
    assert all(one.notes == ("†",) for one in made.rows[:6]) and not made.rows[-1].notes
    assert "Mimir† |" in made.markdown() and "among all rows" in made.caption
    alone = table("mimir_1", [cell("a"), cell("b", value=0.4)], with_published=True, mark="ours")
    assert {one.model for one in alone.rows if one.entries[5].place} == {"a", "b"}
    assert "among our rows" in alone.caption


# What a number says of itself


def test_a_number_has_its_error_and_count_in_every_format() -> None:
    made = table("mimir_1", [cell(value=0.62921), cell(column="imaging_quality", num_videos=465,
                                                       num_expected=465)])  # fmt: skip
    assert entry(made, "ours", "color") == Entry(
        number="62.92%", stderr="0.31", value=0.62921, cell=cell(value=0.62921)
    )
    assert "62.92% ± 0.31 |" in made.markdown()
    assert "Color Consistency<br>n=470" in made.markdown()
    assert "Imaging Quality<br>n=465" in made.markdown()
    assert r"62.92\% {\scriptsize $\pm$ 0.31}" in made.latex()
    assert r"{\scriptsize n=465}" in made.latex()
    shown = on_terminal(made)
    assert "62.92%" in shown and "±0.31" in shown and "n=470" in shown
    assert "standard error of the mean over prompts" in made.caption


def test_an_error_below_the_last_digit_is_not_none() -> None:
    made = table("rise_2", [cell(column="motion_smoothness", value=0.98, stderr=0.0001)])
    assert entry(made, "ours", "motion_smoothness").stderr == "<0.001"
    alone = table("rise_2", [cell(column="motion_smoothness", stderr=None, num_prompts=1)])
    found = entry(alone, "ours", "motion_smoothness")
    assert found.stderr is None and "needs two prompts" in told(alone, found)


def test_a_count_of_its_own_stands_with_the_number() -> None:
    cells = [cell("a"), cell("b"), cell("c", num_videos=1_470, num_expected=1_470)]
    made = table("mimir_1", cells)
    assert [entry(made, model, "color").n for model in "abc"] == [None, None, 1_470]
    assert "50.00% ± 0.31 (n=1,470)" in made.markdown()


def test_an_incomplete_cell_is_shown_and_takes_no_place() -> None:
    cells = [
        cell("a", value=0.9, num_videos=466, num_failed=4),
        cell("b", value=0.5),
        cell("c", value=0.4),
        cell("d", value=None, num_videos=0, num_failed=470, stderr=None),
        cell("e", value=0.8, num_videos=400, num_failed=0),
        cell("f", value=math.nan),
    ]
    made = table("mimir_1", cells)
    first = entry(made, "a", "color")
    assert (first.number, first.n, first.place) == ("90.00%", 466, None)
    assert told(made, first) == "466 of 470 videos, 4 failed"
    assert places(made, "color") == {"b": "best", "c": "second"}
    dead = entry(made, "d", "color")
    assert dead.number == "–" and told(made, dead) == "0 of 470 videos, 470 failed"
    waiting = entry(made, "e", "color")
    assert told(made, waiting) == "400 of 470 videos, 70 not scored yet"
    nan = entry(made, "f", "color")
    assert nan.number == "–" and told(made, nan) == "not a finite number"
    absent = entry(made, "a", "object_class")
    assert absent.number == "–" and told(made, absent) == "not scored"
    for text in (made.markdown(), made.latex(), on_terminal(made), made.to_json()):
        assert "466 of 470 videos, 4 failed" in text
    assert json.loads(made.to_json())["rows"][5]["cells"]["color"]["value"] is None


def test_notes_that_all_share_stand_at_the_column() -> None:
    flicker = {"column": "temporal_flickering", "notes": ("unfiltered", "native")}
    cells = [cell("a", **flicker), cell("b", **flicker | {"notes": ("unfiltered", "by hand")})]
    made = table("semanticgen_1", cells)
    texts = dict(made.footnotes)
    heading = next(h for h in made.headings if h.column.dimension == "temporal_flickering")
    assert [texts[mark] for mark in heading.notes] == [
        "unfiltered: flickering is comparable only behind VBench's static filter"
    ]
    assert "own implementation" in told(made, entry(made, "a", "temporal_flickering"))
    assert told(made, entry(made, "b", "temporal_flickering")) == "by hand"


@pytest.mark.parametrize("others", [(), ("tiny",)])
def test_small_random_weights_are_called_meaningless(others: tuple[str, ...]) -> None:
    made = table("mimir_1", [cell("a", notes=("tiny",)), cell("b", notes=others)])
    assert made.is_meaningless and json.loads(made.to_json())["is_meaningless"]
    where = "" if others else ", where it is said"
    assert made.caption.startswith(f"MEANINGLESS: measured with small random weights{where}.")
    for text in (made.markdown(), made.latex(), on_terminal(made), made.csv()):
        assert "MEANINGLESS" in text
    assert not table("mimir_1", [cell("a")]).is_meaningless


# What is derived


def rise_cells(model: str, *values: float, **more) -> list[Cell]:
    names = ("aesthetic_quality", "motion_smoothness", "text_alignment")
    return [cell(model, name, value, **more) for name, value in zip(names, values, strict=True)]


def test_ranks_are_refused_while_something_is_missing() -> None:
    whole = [*rise_cells("a", 0.6, 0.98, 0.31), *rise_cells("b", 0.5, 0.98, 0.32)]
    made = table("rise_3", whole)
    assert [entry(made, model, "rank").number for model in "ab"] == ["1.33", "1.33"]
    failed = dataclasses.replace(whole[5], num_videos=466, num_failed=4)
    for cells, reason in (
        ([*whole[:5], failed], "b in Text (466 of 470 videos, 4 failed)"),
        (whole[:5], "b in Text (not scored)"),
        (whole[:3], "two models or more"),
    ):
        made = table("rise_3", cells)
        for one in made.rows:
            found = entry(made, one.model, "rank")
            assert found.number == "–" and found.value is None
            assert told(made, found).startswith("refused: ") and reason in told(made, found)
    beside = table("rise_3", whole[:3], with_published=True)
    assert entry(beside, "a", "rank").value is not None, "published rows are taken at their word"


def test_models_that_were_scored_on_other_videos_have_no_ranks() -> None:
    def of(model: str, prompts: str) -> list[Cell]:
        values = [Value(prompt=p, sample=0, categories=(), score=0.5) for p in prompts]
        counts = {"num_videos": len(prompts), "num_expected": len(prompts)}
        return rise_cells(model, 0.5, 0.6, 0.3, values=values, **counts)

    same = table("rise_3", [*of("a", "xy"), *of("b", "yx")])
    assert entry(same, "a", "rank").value == 1.0
    made = table("rise_3", [*of("a", "xy"), *of("b", "xz")])
    reason = told(made, entry(made, "a", "rank"))
    assert "scored on different prompts or samples in Aesthetic" in reason
    texts = dict(made.footnotes)
    assert "models were scored on different prompts or samples" in texts.values()


def test_totals_are_the_leaderboards_and_refused_while_a_dimension_is_missing() -> None:
    cells = [cell("a", name, high) for name, (_, high) in leaderboard.BOUNDS.items()]
    cells += [cell("b", name, low) for name, (low, _) in leaderboard.BOUNDS.items()]
    made = table("vbench", cells)
    assert [e.number for e in row(made, "a").entries[16:]] == ["100.00%"] * 3
    assert [e.number for e in row(made, "b").entries[16:]] == ["0.00%"] * 3
    assert leaderboard.CONSTANTS_VERSION in made.caption
    lacking = [one for one in cells if (one.model, one.column) != ("a", "scene")]
    made = table("vbench", lacking)
    quality, semantic, total = row(made, "a").entries[16:]
    assert (quality.number, semantic.number, total.number) == ("100.00%", "–", "–")
    assert told(made, total) == "refused: missing or incomplete: scene (not scored)"
    assert row(made, "b").entries[18].number == "0.00%", "each model for itself"


CATEGORIES = {
    # Ranks of a, b, c in aesthetic, motion and text, by hand.
    "food": {"a": (0.7, 0.9, 0.3), "b": (0.6, 0.8, 0.2), "c": (0.5, 0.7, 0.1)},  # 1, 2, 3
    "plant": {"a": (0.5, 0.9, 0.3), "b": (0.6, 0.9, 0.2), "c": (0.4, 0.9, 0.1)},  # 4/3, 4/3, 7/3
    "human": {"a": (0.4, 0.7, 0.1), "b": (0.5, 0.8, 0.2), "c": (0.6, 0.9, 0.3)},  # 3, 2, 1
}


def category_cells() -> list[Cell]:
    return [
        one
        for category, of in CATEGORIES.items()
        for model, values in of.items()
        for one in rise_cells(model, *values, category=category)
    ]


def test_ranks_and_places_by_category_as_in_rises_figure() -> None:
    over_all = [cell("a", "aesthetic_quality", 0.1)]  # of no category: not this table's
    made = table("rise_figure4", [*category_cells(), *over_all])
    numbers = {one.model: [e.number for e in one.entries] for one in made.rows}
    assert [h.title for h in made.headings] == ["food↓", "plant↓", "human↓", "First↑", "Second↑"]
    assert numbers == {
        "a": ["1.00", "1.33", "3.00", "2", "0"],
        "b": ["2.00", "1.33", "2.00", "1", "2"],
        "c": ["3.00", "2.33", "1.00", "1", "0"],
    }
    by_category = category_ranks("rise_figure4", category_cells())
    assert by_category["plant"] == pytest.approx({"a": 4 / 3, "b": 4 / 3, "c": 7 / 3})
    lacking = category_cells()[:-1]
    with pytest.raises(ValueError, match=r"no ranks in category 'human': .*c in Text"):
        category_ranks("rise_figure4", lacking)
    made = table("rise_figure4", lacking)
    assert entry(made, "a", "rank:food").number == "1.00"
    assert entry(made, "a", "rank:human").number == "–"
    assert "no rank in human" in told(made, entry(made, "a", "places:1"))
    with pytest.raises(ValueError, match=r"nothing to show: it needs cells by category"):
        table("rise_figure4", over_all)


def test_models_are_shown_as_asked() -> None:
    cells = [cell("a"), cell("b"), cell("a", "scene")]
    assert [one.model for one in table("mimir_1", cells, models=["b"]).rows] == ["b"]
    made = table("mimir_1", [cell("a"), cell("c", "scene")])
    assert {e.number for e in row(made, "c").entries} == {"–"}
    with pytest.raises(ValueError, match="no cell is of model d: there are a, b"):
        table("mimir_1", cells, models=["d"])
    with pytest.raises(ValueError, match="two cells of 'a' in color"):
        table("mimir_1", [cell("a"), cell("a")])
    with pytest.raises(ValueError, match="table mimir_1 has nothing to show"):
        table("mimir_1", [])


# Formats

NAMES = [r"50% & more_{x}^2 ~ #1 $5 \o/", "[begin", "*star", "a|b `c` <b>", "two\nlines", '"q"']


def test_latex_is_well_formed_whatever_a_model_is_called() -> None:
    cells = [cell(name, value=0.1 * i, num_videos=400) for i, name in enumerate(NAMES)]
    for made in (
        table("mimir_1", cells, with_published=True),
        table("vbench", cells),
        table("rise_3", published("rise_3")),
    ):
        text = re.sub(r"(?m)^%.*\n", "", made.latex())
        assert text.isascii(), set(text) - set(map(chr, range(128)))
        bare = re.sub(r"\\[\\%&_#${}]", "", text)
        assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
        assert not re.search(r"[#~^_\"]", bare), "what LaTeX reads otherwise is escaped"
        for name in re.findall(r"\\begin\{(\w+)\}", text):
            assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}") == 1
        body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        spec = re.search(r"\\begin\{tabular\}\{(l+r+)\}", text)
        assert spec and len(lines) >= 1 + len(made.rows) * (made.preset.name != "vbench")
        assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(spec[1]) - 1}
        assert not any(re.match(r"\s*[\[*]", line) for line in body.splitlines())
    assert r"50\% \& more\_\{x\}\textasciicircum{}2 \textasciitilde{} \#1 \$5" in table(
        "mimir_1", cells
    ).latex()  # fmt: skip


def test_latex_sets_best_bold_and_second_underlined() -> None:
    text = table("rise_3", published("rise_3")).latex()
    assert r"RISE-AnimateDiff\textsuperscript{$\dagger$} & \textbf{6.61} & 0.984" in text
    assert r"\underline{31.95}" in text and r"Aesthetic$\uparrow$" in text
    assert r"\midrule" in text and text.count(r"\midrule") == 1
    both = table("mimir_1", [cell()], with_published=True).latex()
    assert both.count(r"\midrule") == 2, "ours below a line"


def test_markdown_has_as_many_cells_in_each_line() -> None:
    cells = [cell(name, value=0.1 * i) for i, name in enumerate(NAMES)]
    for made in (table("mimir_1", cells, with_published=True), table("vbench", cells)):
        lines = [line for line in made.markdown().splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
        assert len(lines) == 2 + (12 if made.preset.name == "mimir_1" else 19)
    text = table("rise_3", published("rise_3")).markdown()
    assert "| RISE-AnimateDiff† | **6.61** | 0.984 | <ins>31.95</ins> | **2.00** |" in text
    assert "the paper does not say which CLIP: ours is CLIP ViT-B/32" in text
    assert r"(motion\_smoothness, printed x1)" in text


def test_many_columns_and_few_models_are_turned() -> None:
    text = table("vbench", [cell("a", name) for name in VBENCH]).markdown()
    assert "|  | a |\n" in text and "| Subject Consistency (n=470) | 50.00% ± 0.31 |" in text
    shown = on_terminal(table("vbench", [cell("a", name) for name in VBENCH]), width=80)
    assert re.search(r"Overall Consistency +50\.00%", shown)


def test_csv_reads_back_to_the_same_numbers() -> None:
    ours = cell("a, b", value=0.1234567890123456, num_videos=466, num_failed=4)
    made = table("mimir_1", [ours], with_published=True)
    rows = list(csv.DictReader(io.StringIO(made.csv())))
    assert len(rows) == 7 and rows[-1]["model"] == "a, b" and rows[-1]["published"] == ""
    assert rows[0]["published"] == "Mimir (arXiv 2412.03085), table 1"
    last = rows[-1]
    assert float(last["color"]) == ours.value and float(last["color_stderr"]) == ours.stderr
    counts = ("n", "num_prompts", "num_expected", "num_failed")
    assert [int(last[f"color_{name}"]) for name in counts] == [466, 94, 470, 4]
    assert last["color_unit"] == "printed x100 in %" and last["color_printed"] == "12.35%"
    assert last["color_notes"] == "466 of 470 videos, 4 failed"
    assert float(rows[0]["color"]) == 0.632 and rows[0]["color_n"] == ""
    assert last["object_class"] == "" and last["object_class_notes"] == "not scored"


def test_json_has_everything() -> None:
    made = table("rise_3", rise_cells("a", 0.6, 0.98, 0.31), with_published=True)
    found = json.loads(made.to_json())
    assert found["preset"] == "rise_3" and found["source"] == "RISE-T2V (arXiv 2511.04317), table 3"
    text = found["columns"][2]
    assert (text["multiplier"], text["clip"]) == (100, "CLIP ViT-B/32")
    ours = found["rows"][-1]
    assert ours["model"] == "a" and ours["published"] is None
    assert ours["cells"]["text_alignment"]["value"] == 0.31
    assert ours["cells"]["text_alignment"]["n"] == 470
    assert ours["cells"]["rank"]["value"] == pytest.approx((5 + 7 + 7) / 3), "6.00 ties"
    assert found["rows"][0]["cells"]["rank"]["printed"] != "–"
