"""The recipes: which operators and rules make whose data, each number beside its source.

A recipe is a value. What needs models takes them as an argument: `pipelines/models.py` has those of
the paper, those that fit a laptop, and the flags that put others in their places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.caption_text import CaptionFault, Repetition
from engine.duplicates import Distinct
from engine.ocr import TextCoverage
from engine.operator import Operator, Rule, Stage
from engine.overlay import StaticOverlay
from engine.phash import PerceptualHash
from engine.residual import ResidualCut
from engine.scan import Scan
from engine.signals import BlackArea, BlackFrames, Brightness, Motion

if TYPE_CHECKING:
    from engine.chat import Chat
    from engine.pairing import Pairs
    from pipelines.models import Models

INSTRUCTIONS = Path(__file__).parents[1] / "engine" / "instructions"
"""The papers' texts, which the trainers read too."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named curation: stages in the order in which they filter; the first one scans."""

    name: str
    stages: tuple[Stage, ...]
    pairs: Mapping[str, Pairs] = field(default_factory=dict)
    """RISE's quadruples that can be made of what is kept, by instruction."""
    makes: tuple[str, ...] = ()
    """Those that a run makes."""

    @property
    def scan(self) -> Scan:
        """The operator that makes clips of sources."""
        operators: list[Operator] = [o for s in self.stages for o in s.operators]
        return next(o for o in operators if isinstance(o, Scan))

    def with_scan(self, **changes: Any) -> Recipe:
        """This recipe with other parameters of the scan."""
        return self._with(lambda operator: isinstance(operator, Scan), changes)

    def with_caption_frames(self, frames: str) -> Recipe:
        """This recipe with a captioner that sees stored keyframes, or frames decoded anew."""
        return self._with(lambda operator: "caption" in operator.writes.names, {"frames": frames})

    def _with(self, which: Callable[[Operator], bool], changes: dict[str, Any]) -> Recipe:
        def changed(operator: Operator) -> Operator:
            return dataclasses.replace(operator, **changes) if which(operator) else operator

        stages = tuple(
            dataclasses.replace(s, operators=tuple(map(changed, s.operators))) for s in self.stages
        )
        return dataclasses.replace(self, stages=stages)

    def check(self) -> None:
        """Raises ValueError, with what to do, where models that a run needs cannot be had."""
        made = [s for name in self.makes for s in self.pairs[name].stages]
        wrong: dict[str, None] = {}
        for operator in (o for s in (*self.stages, *made) for o in s.measures):
            try:
                operator.check()
            except ValueError as error:
                wrong[str(error)] = None
        if wrong:
            raise ValueError("; ".join(wrong))

    def describe(self) -> dict[str, Any]:
        """The whole recipe as JSON values, for the `runs` table."""
        return {
            "name": self.name,
            "stages": [_described(s) for s in self.stages],
            "pairs": {
                name: {
                    "instruction": self.pairs[name].instruction.describe(),
                    "stages": [_described(s) for s in self.pairs[name].stages],
                }
                for name in self.makes
            },
        }


def _described(stage: Stage) -> dict[str, Any]:
    return {
        "name": stage.name,
        "operators": [o.describe() for o in stage.operators],
        "rules": [dataclasses.asdict(r) for r in stage.rules],
        "distinct": dataclasses.asdict(stage.distinct) if stage.distinct else None,
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

# Ours: "single-shot clips" (Mimir, appendix A) need their cuts to be found
SHOTS = Stage(
    name="shots",
    operators=(ResidualCut(),),
    rules=(Rule(column="residual_cut_score", hi=0.5),),
)

OCR_COVERAGE = Rule(column="ocr_area_frac", hi=0.1)  # Mimir: "OCR coverage > 0.1, excluding"

# Mimir, appendix A, "Caption Filtration"
REPETITION = (
    Rule(column="repetition_2gram", hi=0.056),  # "2-gram repetition > 0.056, excluding"
    Rule(column="repetition_5gram", hi=0.047),  # "5-gram repetition > 0.047, excluding"
    Rule(column="repetition_10gram", hi=0.045),  # "10-gram repetition > 0.045, excluding"
)
CLEAN = Rule(column="caption_fault", empty=True)  # "human designed rule-based methods"
CONSISTENT = Rule(column="clip_score", lo=0.25)  # "Semantic consistency (CLIP score) < 0.25"

# Ours: the paper says nothing of copies
DUPLICATES = Stage(
    name="duplicates", operators=(PerceptualHash(),), distinct=Distinct(phash_bits=6)
)

CLASSIC = Recipe(
    name="classic",
    stages=(
        BASIC,
        QUALITY,
        SHOTS,
        Stage(name="text", operators=(TextCoverage(),), rules=(OCR_COVERAGE,)),
        Stage(
            name="overlay",  # in place of a model that is asked about watermarks
            operators=(StaticOverlay(),),
            rules=(Rule(column="overlay_score", hi=0.5),),
        ),
        Stage(  # of captions found beside the input, where there are any
            name="caption",
            operators=(CaptionFault(of="caption_original"), Repetition(of="caption_original")),
            rules=(CLEAN, *REPETITION),
        ),
        DUPLICATES,
    ),
)


def mimir(models: Models, name: str = "mimir") -> Recipe:
    """Mimir's whole pipeline (appendix A, figure 9), and RISE-T2V's pairs of what it keeps."""
    from engine.aesthetic import AestheticScore
    from engine.caption import Caption
    from engine.clip import ClipScore, Embed
    from engine.watermark import Watermark

    caption = Caption(chat=models.captioner, **_runs(models.captioner))
    return Recipe(
        name=name,
        stages=(
            BASIC,
            QUALITY,
            SHOTS,
            Stage(  # "Aesthetic Filtration"
                name="aesthetic",
                operators=(
                    Embed(model=models.clip),
                    AestheticScore(weights=models.aesthetic, clip=models.clip),
                    TextCoverage(),
                ),
                rules=(
                    Rule(column="aesthetic_score", lo=4.0),  # "Aesthetic score < 4.0, excluding"
                    OCR_COVERAGE,
                ),
            ),
            Stage(  # "Watermark Filtration": 'flagged as "containing watermarks"'
                name="watermark",
                operators=(Watermark(weights=models.watermark),),
                rules=(Rule(column="watermark_score", hi=0.5),),  # ours: yes likelier than no
            ),
            Stage(name="recaption", operators=(caption,)),  # "Re-Caption"
            Stage(  # "Caption Filtration"
                name="caption",
                operators=(
                    CaptionFault(prompt=caption.prompt),
                    Repetition(),
                    ClipScore(model=models.clip),
                ),
                rules=(CLEAN, *REPETITION, CONSISTENT),
            ),
            dataclasses.replace(DUPLICATES, distinct=Distinct(phash_bits=6, cosine=0.97)),
        ),
        pairs=rise_pairs(models),
        makes=("dense",),
    )


def long(models: Models) -> Recipe:
    """SemanticGen's data: spans of 60 seconds with all their cuts, captioned whole.

    Source: SemanticGen (arXiv 2512.20619), "Implementation details": pieces of films and series of
    60 seconds each, with captions of a captioner of their own.
    """
    whole = mimir(models, name="long").with_scan(
        shots="none", clip_seconds=60.0, max_keyframes=30, keyframe_every_s=2.0
    )
    stages = tuple(s for s in whole.stages if s.name != "shots")
    return dataclasses.replace(whole, stages=stages, pairs={}, makes=())


def rise(models: Models) -> Recipe:
    """RISE-T2V's pairs of whatever is given, images or videos, which nothing is left out of."""
    scan = Stage(name="scan", operators=BASIC.operators)
    return _paired(Recipe(name="rise", stages=(scan,)), models)


def _paired(recipe: Recipe, models: Models) -> Recipe:
    """A recipe, with RISE's pairs and what they read of clips."""
    from engine.clip import Embed

    embed = Stage(name="embedding", operators=(Embed(model=models.clip),))
    stages, pairs = (*recipe.stages, embed), rise_pairs(models)
    return dataclasses.replace(recipe, stages=stages, pairs=pairs, makes=("dense",))


def rise_pairs(models: Models) -> dict[str, Pairs]:
    """RISE-T2V's quadruples by instruction; the paper trains on the dense one.

    Source: RISE-T2V (arXiv 2511.04317), "Adapting Rephrasing Feature", and the appendix, which
    words the instructions.
    """
    from engine.caption import Instruction, OriginalCaption, Rephrase
    from engine.clip import ClipScore
    from engine.pairing import Pairs

    chat, where = models.captioner, _runs(models.captioner)

    def pairs(name: str, scenes: int | None = None) -> Pairs:
        text = (INSTRUCTIONS / f"{name}.txt").read_text(encoding="utf-8")
        instruction = Instruction(name=name, text=text, scenes=scenes)
        return Pairs(
            instruction=instruction,
            stages=(
                Stage(name="original", operators=(OriginalCaption(chat=chat, **where),)),
                Stage(
                    name="rephrase",
                    operators=(Rephrase(chat=chat, instruction=instruction, **where),),
                ),
                Stage(  # Mimir's caption rules judge y_rephrase, too
                    name="caption",
                    operators=(
                        CaptionFault(of="rephrased", prompt=text, scenes=scenes),
                        Repetition(of="rephrased"),
                        ClipScore(model=models.clip, of="rephrased"),
                    ),
                    rules=(CLEAN, *REPETITION, CONSISTENT),
                ),
            ),
        )

    return {
        "dense": pairs("dense"),
        "multi_scene": pairs("multi_scene", scenes=2),  # "the start frame and the end frame"
        "multilingual": pairs("multilingual"),
    }


def _runs(chat: Chat) -> dict[str, Any]:
    """Where a captioner runs: on a GPU, or as one process that waits for an endpoint."""
    from engine.endpoint import EndpointChat

    if isinstance(chat, EndpointChat):
        return {"num_gpus": 0.0, "copies": 1, "batch_size": 4 * chat.concurrency}
    return {}


WITH_MODELS: dict[str, Callable[[Models], Recipe]] = {
    "mimir": mimir,
    "small": lambda models: mimir(models, name="small"),
    "tiny": lambda models: mimir(models, name="tiny"),
    "long": long,
    "rise": rise,
    "classic+rise": lambda models: _paired(CLASSIC, models),
}
"""Recipes that load models; the last is for datasets of `classic` that get pairs later."""
NAMES = (CLASSIC.name, *WITH_MODELS)


def recipe(name: str, models: Models | None = None) -> Recipe:
    """A recipe by name, with the models given, or else with its own.

    Raises:
        KeyError: There is none of that name.
    """
    if name == CLASSIC.name:
        return CLASSIC
    return WITH_MODELS[name](models or models_of(name))


@cache
def models_of(name: str) -> Models:
    """The models of a recipe."""
    from pipelines.models import PAPER, SMALL, tiny

    return {"small": SMALL, "tiny": tiny()}.get(name, PAPER)
