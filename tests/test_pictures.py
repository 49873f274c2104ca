"""Pictures show what they are of, and nothing runs off their edges."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import matplotlib.font_manager  # finds fonts once, in the user's own cache
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from evals import pictures
from evals.pictures import Curve, bars_png, curve_of, drift_png, places_png, radar_png, table_png
from evals.presets import PRESETS
from evals.published import published
from evals.results import Cell, Value
from evals.table_picture import RED, short
from evals.tables import table

CATEGORIES = "animal architecture food human lifestyle plant scenery vehicles".split()
FEW = ("Pika", "Gen2", "ModelScope", "Latte", "VideoCrafter2", "CogVideoX-2B", "AnimateDiff", "R")
MANY = tuple(f"an-organisation/a-model-of-some-length-{num:02d}-step-1000" for num in range(20))


@pytest.fixture(autouse=True)
def few_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half as many each way: these pictures are looked at by no one."""
    monkeypatch.setattr(pictures, "_DPI", 75)


def cell(model: str, column: str, value: float, **more) -> Cell:
    about = {"category": None, "stderr": 0.004, "num_videos": 470, "num_prompts": 94}
    about |= {"num_expected": 470, "num_failed": 0}
    return Cell(model=model, column=column, value=value, **about | more)


def by_category(models: Iterable[str], categories: Iterable[str] = CATEGORIES, **more):
    """The later a model, the better, but that they take turns in one category."""
    return [
        cell(model, column.dimension, 0.5 + 0.01 * num, category=category, **more)
        for num, model in enumerate(models)
        for column in PRESETS["rise_figure4"].columns
        for category in categories
    ]


def curves(models: Iterable[str]) -> list[Curve]:
    times = np.linspace(0, 30, 16)
    return [
        Curve(
            model=model,
            times_s=times,
            scores=0.6 - 0.002 * times + 0.01 * num,
            stderr=[0.004] * 16,
            slope_per_s=-0.002,
            r_squared=1.0,
        )
        for num, model in enumerate(models)
    ]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def has(picture: np.ndarray, colour: str) -> bool:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((picture == np.array(wanted, np.uint8)).all(-1).any())


def check(path: Path, *, meaningless: bool = False) -> np.ndarray:
    """It shows something, and its outermost pixels are white: nothing is cut off."""
    picture = pixels(path)
    high, wide = picture.shape[:2]
    assert 100 < high < 2000 and 400 < wide < 2000
    assert 0.002 < (picture.min(-1) < 200).mean() < 0.6
    edges = [picture[:3], picture[-3:], picture[:, :3], picture[:, -3:]]
    assert all((edge > 250).all() for edge in edges), "something runs off the picture"
    assert has(picture, RED) == meaningless
    return picture


@pytest.fixture
def overlaps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Pairs of texts that lie on each other in pictures that are written from now on."""
    found: list[tuple[str, str]] = []
    write = Figure.savefig

    def savefig(figure: Figure, *given, **more) -> None:
        write(figure, *given, **more)
        renderer = figure.canvas.get_renderer()
        unseen = {
            tick.label1
            for axes in figure.axes
            for axis in (axes.xaxis, axes.yaxis)
            for tick in axis.get_major_ticks()
            if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
        }
        boxes = [
            (text.get_text(), text.get_window_extent(renderer).shrunk(0.96, 0.7))
            for text in figure.findobj(matplotlib.text.Text)
            if text.get_text().strip() and text.get_visible() and text not in unseen
        ]
        found.extend(
            (one, other)
            for num, (one, box) in enumerate(boxes)
            for other, beside in boxes[num + 1 :]
            if box.overlaps(beside)
        )

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found


@pytest.mark.parametrize("models", [("one",), FEW, MANY, ("x" * 90, "a $5 model, 50 % _off_")])
def test_a_table_has_all_its_numbers(
    models: tuple[str, ...], tmp_path: Path, overlaps: list
) -> None:
    columns = PRESETS["mimir_1"].columns
    cells = [
        cell(model, column.dimension, 0.6 + 0.01 * num, num_videos=470 - num % 2)
        for num, model in enumerate(models)
        for column in columns
    ]
    table_png(table("mimir_1", cells, with_published=True), tmp_path / "table.png")
    assert check(tmp_path / "table.png").shape[1] > 600
    assert not overlaps


def test_tables_of_other_shapes(tmp_path: Path, overlaps: list) -> None:
    wide = [cell(m, c.dimension, 0.5, notes=("tiny",)) for m in "ab"
            for c in PRESETS["vbench"].columns[:16]]  # fmt: skip
    for name, made in (
        ("rise", table("rise_3", published("rise_3"))),
        ("ranks", table("rise_figure4", by_category(FEW))),
        ("refused", table("rise_figure4", by_category(FEW[:1]))),
    ):
        table_png(made, tmp_path / f"{name}.png")
        check(tmp_path / f"{name}.png")
    table_png(table("vbench", wide), tmp_path / "wide.png")
    high, wide_px = check(tmp_path / "wide.png", meaningless=True).shape[:2]
    assert high > wide_px, "nineteen columns of two models are turned"
    assert not overlaps


def test_best_is_bold_and_second_underlined(tmp_path: Path) -> None:
    """The one adds ink, the other a line as wide as a number."""
    rows = {}
    for name, values in (("marked", (0.8888, 0.8887)), ("equal", (0.8888, 0.8888))):
        cells = [cell(m, "color", v, stderr=None) for m, v in zip("ab", values, strict=True)]
        table_png(table("mimir_1", cells), tmp_path / f"{name}.png")
        rows[name] = pixels(tmp_path / f"{name}.png").max(-1) < 110
    marked, equal = rows["marked"], rows["equal"]
    assert marked.shape[1] >= equal.shape[1] and marked.sum() > equal.sum() + 40

    def runs(ink: np.ndarray) -> int:
        """Horizontal lines of 25 to 60 pixels: neither a letter nor a rule of the table."""
        found = 0
        for line in ink:
            ends = np.flatnonzero(np.diff(np.concatenate([[0], line.astype(int), [0]])))
            found += int(((np.diff(ends)[::2] >= 25) & (np.diff(ends)[::2] < 60)).sum())
        return found

    assert runs(marked) == runs(equal) + 1


@pytest.mark.parametrize("models", [FEW[:2], FEW, MANY])
def test_a_radar_has_a_polygon_a_model(
    models: tuple[str, ...], tmp_path: Path, overlaps: list
) -> None:
    radar_png("rise_figure4", by_category(models), tmp_path / "radar.png")
    picture = check(tmp_path / "radar.png")
    colours = pictures._COLOURS[: len(models)] if len(models) <= 8 else pictures._COLOURS[:1]
    assert all(has(picture, colour) for colour in colours)
    assert not overlaps


def test_a_radar_puts_rank_one_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, np.ndarray] = {}
    write = Figure.savefig

    def savefig(figure: Figure, *given, **more) -> None:
        write(figure, *given, **more)
        axes = figure.axes[0]
        for line in axes.get_lines():
            if line.get_label().startswith(("first", "last")):
                at = axes.transData.transform(line.get_xydata())
                middle = axes.transAxes.transform((0.5, 0.5))
                drawn[line.get_label().split()[0]] = np.hypot(*(at - middle).T)

    monkeypatch.setattr(Figure, "savefig", savefig)
    radar_png("rise_figure4", by_category(["last", "first"]), tmp_path / "radar.png")
    assert (drawn["first"] > 2 * drawn["last"]).all() and (drawn["last"] > 10).all()


@pytest.mark.parametrize("models", [FEW[:2], FEW, MANY])
def test_places_are_bars(models: tuple[str, ...], tmp_path: Path, overlaps: list) -> None:
    places_png("rise_figure4", by_category(models), tmp_path / "places.png")
    assert has(check(tmp_path / "places.png"), pictures._COLOURS[0])
    assert not overlaps


def test_pictures_of_ranks_are_refused_with_the_tables_reason(tmp_path: Path) -> None:
    cells = by_category(FEW)
    for draw in (radar_png, places_png):
        with pytest.raises(ValueError, match=r"no ranks in category 'vehicles': .*R in Text"):
            draw("rise_figure4", cells[:-1], tmp_path / "none.png")
    with pytest.raises(ValueError, match="three categories or more: found 2"):
        radar_png("rise_figure4", by_category(FEW, CATEGORIES[:2]), tmp_path / "none.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("models", [("one",), FEW, MANY])
def test_drift_is_curves_over_seconds(
    models: tuple[str, ...], tmp_path: Path, overlaps: list
) -> None:
    drift_png(curves(models), tmp_path / "drift.png", label="Imaging Quality")
    assert has(check(tmp_path / "drift.png"), pictures._COLOURS[0])
    assert not overlaps


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    none = Curve(model="a", times_s=[], scores=[])
    for given in ([], [none]):
        with pytest.raises(ValueError, match="curves with points"):
            drift_png(given, tmp_path / "none.png")
    with pytest.raises(ValueError, match="has no number to draw"):
        bars_png(table("mimir_1", [cell("a", "scene", 0.5)]), tmp_path / "none.png")
    empty = [Value(prompt="a", sample=0, categories=(), score=None, frame_scores=(None, None))]
    for values in ([], empty):
        with pytest.raises(ValueError, match="no frame scores"):
            curve_of(cell("a", "color", 0.5, values=values), 8.0)


def test_a_curve_is_the_mean_over_videos_with_its_slope() -> None:
    """Two videos that fall by 0.016 a second at eight frames a second, one of them longer."""
    frames = np.arange(80)
    values = [
        Value(
            prompt=str(num), sample=0, categories=(), score=0.5,
            frame_scores=(*(0.9 - 0.1 * num - 0.002 * frames[:length]), None),
        )
        for num, length in enumerate((80, 40, 80))
    ]  # fmt: skip
    found = curve_of(cell("a", "aesthetic_quality", 0.5, values=values[::2]), 8.0, num_points=8)
    assert found.slope_per_s == pytest.approx(-0.016) and found.r_squared == pytest.approx(1)
    assert found.times_s == pytest.approx([4.5 / 8 + 10 / 8 * num for num in range(8)])
    assert found.scores == pytest.approx([0.8 - 0.002 * (4.5 + 10 * num) for num in range(8)])
    long = curve_of(cell("a", "aesthetic_quality", 0.5, values=values), 8.0)
    assert max(long.times_s) > 9, "frames that most videos have count"
    constant = [Value(prompt="a", sample=0, categories=(), score=1, frame_scores=(0.5,) * 9)]
    still = curve_of(cell("a", "color", 0.5, values=constant), 8.0)
    assert still.slope_per_s == pytest.approx(0) and still.r_squared is None


@pytest.mark.parametrize("models", [("one",), FEW, MANY])
def test_bars_have_a_dot_a_model(models: tuple[str, ...], tmp_path: Path, overlaps: list) -> None:
    cells = [
        cell(model, column.dimension, 0.6 + 0.01 * num)
        for num, model in enumerate(models)
        for column in PRESETS["mimir_1"].columns
    ]
    bars_png(table("mimir_1", cells, with_published=True), tmp_path / "bars.png")
    assert has(check(tmp_path / "bars.png"), pictures._COLOURS[0])
    assert not overlaps


def test_small_random_weights_are_called_meaningless(tmp_path: Path) -> None:
    tiny = by_category(FEW, notes=("tiny",))
    radar_png("rise_figure4", tiny, tmp_path / "radar.png")
    places_png("rise_figure4", tiny, tmp_path / "places.png")
    drift_png(curves(["a"]), tmp_path / "drift.png", is_meaningless=True)
    made = table("mimir_1", [cell("a", "color", 0.5, notes=("tiny",))])
    table_png(made, tmp_path / "table.png")
    bars_png(made, tmp_path / "bars.png")
    for path in tmp_path.iterdir():
        check(path, meaningless=True)


def test_the_same_draws_the_same_and_leaves_nothing_global(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams), set(sys.modules)
    for name in ("one", "other"):
        radar_png("rise_figure4", by_category(FEW), tmp_path / f"{name}.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()
    assert dict(matplotlib.rcParams) == before[0]
    assert "matplotlib.pyplot" not in set(sys.modules) - before[1]


def test_names_are_shortened_in_their_middle() -> None:
    assert short("a\nb") == "a b" and short("x" * 34) == "x" * 34
    assert short("organisation/model-step-12000", 15) == "organis…p-12000"
