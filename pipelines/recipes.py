"""The recipes: which operators and rules make whose data, each number beside its source."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from engine.operator import Operator, Rule, Stage
from engine.scan import Scan
from engine.signals import BlackArea, BlackFrames, Brightness, Motion


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named curation: stages in the order in which they filter; the first one scans."""

    name: str
    stages: tuple[Stage, ...]

    @property
    def scan(self) -> Scan:
        """The operator that makes clips of sources."""
        operators: list[Operator] = [o for s in self.stages for o in s.operators]
        return next(o for o in operators if isinstance(o, Scan))

    def with_scan(self, **changes: Any) -> Recipe:
        """This recipe with other parameters of the scan."""

        def changed(operator: Operator) -> Operator:
            is_scan = isinstance(operator, Scan)
            return dataclasses.replace(operator, **changes) if is_scan else operator

        stages = tuple(
            dataclasses.replace(s, operators=tuple(map(changed, s.operators))) for s in self.stages
        )
        return dataclasses.replace(self, stages=stages)

    def describe(self) -> dict[str, Any]:
        """The whole recipe as JSON values, for the `runs` table."""
        return {
            "name": self.name,
            "stages": [
                {
                    "name": s.name,
                    "operators": [o.describe() for o in s.operators],
                    "rules": [dataclasses.asdict(r) for r in s.rules],
                }
                for s in self.stages
            ],
        }


# Mimir (arXiv 2412.03085), appendix A, "Basic Filtration"
BASIC = Stage(
    name="basic",
    operators=(Scan(signals=(Motion(), BlackArea(), Brightness(), BlackFrames())),),
    rules=(
        Rule(column="num_frames", lo=65),  # "fewer than 65 frames"
        Rule(column="duration_s", lo=1.0),  # "a duration of less than 1s"
        Rule(column="aspect_ratio", lo=1.0, hi=2.0),  # "outside the range [1, 2]"
        Rule(column="motion_score", above=0.0),  # "a motion score of 0"
    ),
)

# Mimir, appendix A, "Quality Filtration"
QUALITY = Stage(
    name="quality",
    rules=(
        Rule(column="black_area_frac", hi=0.8),  # "Black area > 0.8, excluding"
        Rule(column="brightness", lo=0.2),  # "Brightness < 0.2, excluding"
        Rule(column="black_frame_frac", hi=0.4),  # "Black frame rate > 0.4, excluding"
    ),
)

CLASSIC = Recipe(name="classic", stages=(BASIC, QUALITY))

RECIPES = {recipe.name: recipe for recipe in (CLASSIC,)}
