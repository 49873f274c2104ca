"""The papers' tables: which columns each has, and in which unit and with how many digits.

Facts of the papers, each beside its table. `evals.published` has the numbers that they print.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal
from types import MappingProxyType
from typing import Literal

from evals.dimensions import DIMENSIONS, VBENCH

Extra = Literal["rank", "places", "radar", "totals"]
"""What a table has beyond its columns: the average rank of a model over them, how often it is first
and second over the categories, the picture of that, VBench's three totals."""

MIMIR = "Mimir (arXiv 2412.03085)"
SEMANTICGEN = "SemanticGen (arXiv 2512.20619)"
RISE = "RISE-T2V (arXiv 2511.04317)"
VBENCH_PAPER = "VBench (arXiv 2311.17982)"


@dataclass(frozen=True, kw_only=True)
class Column:
    """How a table prints one dimension."""

    dimension: str
    """As in `Cell.column`: of `evals.dimensions`, a drift, or one of VBench's totals."""
    header: str
    """As the paper prints it."""
    multiplier: int
    """Printed number = value on the scale 0 to 1, times this."""
    digits: int
    """Behind the decimal point."""
    suffix: str = ""
    higher_is_better: bool = True
    meaning: str
    """What the value is, with the model that it is of."""
    clip: str | None = None
    """CLIP model that ours is measured with, where it is one."""
    note: str | None = None
    """What the paper leaves open; a footnote of the column."""

    def rounded(self, value: float) -> Decimal:
        """The number as printed. What was read from print comes back digit for digit."""
        scaled = Decimal(repr(float(value))) * self.multiplier
        printed = scaled.quantize(Decimal(1).scaleb(-self.digits), ROUND_HALF_EVEN)
        return printed or printed.copy_abs()

    @property
    def unit(self) -> str:
        """For a person: how the printed number comes from the value on the scale 0 to 1."""
        times = f"x{self.multiplier}"
        return f"printed {times} in {self.suffix}" if self.suffix else f"printed {times}"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A table of a paper."""

    name: str
    title: str
    paper: str = ""
    table: str = ""
    """Which one of the paper: `table 3`, `figure 4`."""
    columns: tuple[Column, ...]
    extras: tuple[Extra, ...] = ()
    suite: str = ""
    """What the paper scored."""
    arrows: bool = False
    """The paper's headers say which direction is better."""

    @property
    def source(self) -> str:
        """Paper and table, as a published row is marked with."""
        return f"{self.paper}, {self.table}" if self.table else self.paper

    @property
    def by_category(self) -> bool:
        """It ranks models in each category, over its columns."""
        return "places" in self.extras


_CLIP_B, _CLIP_L = "CLIP ViT-B/32", "CLIP ViT-L/14"
_MEANING = {
    "subject_consistency": "DINO ViT-B/16: each frame against the first and the one before",
    "background_consistency": f"{_CLIP_B}: each frame against the first and the one before",
    "temporal_flickering": "1 - mean absolute difference of neighbouring frames / 255",
    "motion_smoothness": "AMT-S: every other frame against its interpolation",
    "dynamic_degree": "RAFT: share of videos that move",
    "aesthetic_quality": f"LAION's predictor on {_CLIP_L}, score / 10",
    "imaging_quality": "MUSIQ (SPAQ), score / 100",
    "object_class": "GRiT: share of frames with the object",
    "multiple_objects": "GRiT: share of frames with both objects",
    "human_action": "UMT ViT-L: share of videos with the action",
    "color": "GRiT: share of frames with the object in its colour",
    "spatial_relationship": "GRiT: score of where the objects lie",
    "scene": "Tag2Text: share of frames with the scene",
    "appearance_style": f"{_CLIP_B}: frames against the style",
    "temporal_style": "ViCLIP: video against prompt",
    "overall_consistency": "ViCLIP: video against prompt",
    "text_alignment": f"{_CLIP_B}: mean cosine of prompt and each frame",
    "quality": "VBench's quality score: weighted mean of seven normalised dimensions",
    "semantic": "VBench's semantic score: mean of nine normalised dimensions",
    "total": "VBench's total score: (4 quality + semantic) / 5",
}
_CLIPS = {
    "background_consistency": _CLIP_B,
    "aesthetic_quality": _CLIP_L,
    "appearance_style": _CLIP_B,
    "text_alignment": _CLIP_B,
}


_DRIFT_MEANING = (
    "FramePack's start-end contrast, the mean over videos of |last 15 % - first 15 %| of frames, of"
)


def _meaning(dimension: str) -> str:
    if dimension.startswith("drift:"):
        return f"{_DRIFT_MEANING} {_meaning(dimension.removeprefix('drift:'))}"
    return _MEANING.get(dimension) or DIMENSIONS[dimension].about


_TITLES = {name: one.title for name, one in DIMENSIONS.items()}
_PERCENT = (100, 2, "%")


def _column(
    dimension: str,
    header: str,
    look: tuple[int, int, str],
    *,
    higher_is_better: bool = True,
    note: str | None = None,
) -> Column:
    multiplier, digits, suffix = look
    return Column(
        dimension=dimension,
        header=header,
        multiplier=multiplier,
        digits=digits,
        suffix=suffix,
        higher_is_better=higher_is_better,
        meaning=_meaning(dimension),
        clip=_CLIPS.get(dimension),
        note=note,
    )


# Mimir's appendix B names the models of its metrics: VBench's own. Raw scores, in percent.
_MIMIR_COLUMNS = (
    _column("background_consistency", "Background Consistency", _PERCENT),
    _column("aesthetic_quality", "Aesthetic Quality", _PERCENT),
    _column("imaging_quality", "Imaging Quality", _PERCENT),
    _column("object_class", "Object Class", _PERCENT),
    _column("multiple_objects", "Multiple Objects", _PERCENT),
    _column("color", "Color Consistency", _PERCENT),
    _column("spatial_relationship", "Spatial Relationship", _PERCENT),
    _column("temporal_style", "Temporal Style", _PERCENT),
)
# SemanticGen, section 4.1: "standard VBench metrics". Raw scores, in percent.
_SEMANTICGEN_COLUMNS = tuple(
    _column(name, _TITLES[name], _PERCENT)
    for name in (
        "subject_consistency",
        "background_consistency",
        "temporal_flickering",
        "motion_smoothness",
        "imaging_quality",
        "aesthetic_quality",
    )
)
_DRIFT = _column(
    "drift:imaging_quality",
    "Δdrift (imaging)",
    _PERCENT,
    higher_is_better=False,
    note="the paper does not print which metric its Δdrift is of: ours is of imaging quality",
)
# RISE-T2V, appendix "Metrics": "four key evaluation metrics from VBench"; CLIP's size is not said.
_AESTHETIC = _column("aesthetic_quality", "Aesthetic", (10, 2, ""))
_MOTION = _column("motion_smoothness", "Motion", (1, 3, ""))
_DYNAMIC = _column("dynamic_degree", "Dynamic", (1, 3, ""))
_TEXT = _column(
    "text_alignment",
    "Text",
    (100, 2, ""),
    note=f"cosine of prompt and frames, x100; the paper does not say which CLIP: ours is {_CLIP_B}",
)
_RISE_COLUMNS = (_AESTHETIC, _MOTION, _TEXT)
_CATEGORIES = "VBench's prompts per category: 8 categories of 100"


def _rise(table: str, title: str, *columns: Column, suite: str = _CATEGORIES) -> Preset:
    return Preset(
        name="rise_" + table.replace("table ", "").replace(" ", ""),
        title=title,
        paper=RISE,
        table=table,
        columns=columns or _RISE_COLUMNS,
        suite=suite,
        arrows=True,
        extras={"table 3": ("rank",), "figure 4": ("rank", "places", "radar")}.get(table, ()),
    )


def _mimir(table: str, title: str) -> Preset:
    return Preset(
        name="mimir_" + table.removeprefix("table "),
        title=title,
        paper=MIMIR,
        table=table,
        columns=_MIMIR_COLUMNS,
        suite="VBench's prompts",
    )


def _semanticgen(table: str, title: str, suite: str, *more: Column) -> Preset:
    return Preset(
        name="semanticgen_" + table.removeprefix("table "),
        title=title,
        paper=SEMANTICGEN,
        table=table,
        columns=(*_SEMANTICGEN_COLUMNS, *more),
        suite=suite,
    )


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        one.name: one
        for one in (
            _mimir("table 1", "Quantitative results on VBench"),
            _mimir("table 3", "Ablation study results"),
            _semanticgen("table 1", "Short video generation", "VBench's prompts, extended"),
            _semanticgen(
                "table 2", "Long video generation", "VBench-Long's prompts, extended", _DRIFT
            ),
            _semanticgen("table 3", "Compression of the semantic space", "47 prompts"),
            _rise("table 2", "Comparison with the baseline models"),
            _rise("table 3", "Quantitative analysis of text-to-video models"),
            _rise("table 5", "Ablation study on different diffusion models"),
            _rise("table 6", "Ablation study on the impact of training data"),
            _rise("table 7", "Ablation study on the LLM", _AESTHETIC, _MOTION, _DYNAMIC, _TEXT),
            _rise("figure 4", "Average rank in each category"),
            Preset(
                name="vbench",
                title="VBench's sixteen dimensions and total scores",
                paper=VBENCH_PAPER,
                table="leaderboard",
                columns=(
                    *(_column(name, _TITLES[name], _PERCENT) for name in VBENCH),
                    _column("quality", "Quality Score", _PERCENT),
                    _column("semantic", "Semantic Score", _PERCENT),
                    _column("total", "Total Score", _PERCENT),
                ),
                extras=("totals",),
                suite="VBench's prompts",
            ),
        )
    }
)
"""By name."""


def plain(dimensions: Sequence[str], drifts: Sequence[str] = ()) -> Preset:
    """A table of whatever was measured, in percent; it is of no paper.

    Args:
        dimensions: By name.
        drifts: Names of dimensions whose drift is measured.
    """
    columns = [_column(name, _TITLES[name], _PERCENT) for name in dimensions]
    columns += [
        _column(f"drift:{name}", f"Δdrift {_TITLES[name]}", _PERCENT, higher_is_better=False)
        for name in drifts
    ]
    return Preset(name="plain", title="Everything that was measured", columns=tuple(columns))


def preset_named(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in PRESETS:
        raise ValueError(f"no table {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
