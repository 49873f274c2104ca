"""Blind comparisons of videos by people: the user studies of RISE-T2V and of Mimir.

A study is a value: which videos are shown together, and what is asked about them. Nothing here
knows how a page shows them, nor where votes are stored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import random
import unicodedata
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from engine.tables import DatasetError
from evals.presets import MIMIR, RISE

Name = Literal["rise", "mimir"]
MAX_CODE = 64
"""Characters of a voter's code."""
_NAMESPACE = uuid.UUID("2f1c9a6e-5a43-5d0b-9b7e-6f0d4f0c8a11")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What voters are asked about videos of one prompt."""

    key: str
    """As in the column `question` of votes."""
    title: str
    """What it is about, as the paper's text prints it."""
    text: str
    """Word for word as the paper prints it."""
    header: str
    """In the paper's table."""


@dataclass(frozen=True, kw_only=True)
class Design:
    """How a paper asked people."""

    name: Name
    questions: tuple[Question, ...]
    several: bool
    """More than one video may be chosen."""
    task: str
    """What a voter does, in a sentence."""
    source: str
    """Paper and table."""


DESIGNS: Mapping[Name, Design] = {
    "rise": Design(
        name="rise",
        several=True,
        task="Watch the videos, all made for the prompt above them. For each question choose the"
        " best one, or several where they are equally good.",
        source=f"{RISE}, table 4",
        questions=(
            Question(
                key="aesthetic_quality",
                title="Aesthetic Quality",
                header="Aesthetic",
                text="Which sample exhibits the best overall performance in visual effects,"
                " composition, and color use in the video?",
            ),
            Question(
                key="temporal_quality",
                title="Temporal Quality",
                header="Temporal",
                text="Which sample achieves the highest quality regarding the temporal scale of"
                " the video, considering the smoothness of motion and the dynamics’ intensity?",
            ),
            Question(
                key="text_alignment",
                title="Text Alignment",
                header="Text",
                text="Which sample demonstrates the greatest consistency between the video content"
                " and the textual prompt?",
            ),
        ),
    ),
    "mimir": Design(
        name="mimir",
        several=False,
        task="Watch the two videos, both made for the prompt above them. For each question choose"
        " the one that does better.",
        source=f"{MIMIR}, table 2",
        questions=(
            Question(
                key="instruction_following",
                title="Instruction Following",
                header="Instruction Following",
                text="Determine which video aligns more closely with the prompt, evaluate whether"
                " the main content is adequately presented in the video, and assess the accuracy"
                " and completeness of the prompt.",
            ),
            Question(
                key="physics_simulation",
                title="Physics Simulation",
                header="Physics Simulation",
                text="Determine which video aligns more closely with real-world physical laws,"
                " including object motion, transformations, and other dynamics.",
            ),
            Question(
                key="visual_quality",
                title="Visual Quality",
                header="Visual Quality",
                text="Determine which video has a more harmonious overall visual composition and"
                " showcases finer details more exquisitely.",
            ),
        ),
    ),
}
"""RISE's questions stand in its appendix (`User Study`), Mimir's in its appendix C.

RISE shows the videos of all (four) models at once: "select the best one(s)". Mimir shows two videos
and asks "which one performed better", for each of the C(6, 2) pairs of its six models: every choice
is made, there is no tie.
"""

PUBLISHED: Mapping[Name, Mapping[str, tuple[str, str, str]]] = {
    "rise": {
        "Latte": ("20.33", "18.67", "32.00"),
        "VideoCrafter2": ("14.00", "16.33", "34.00"),
        "AnimateDiff": ("36.67", "33.33", "50.00"),
        "RISE-AnimateDiff": ("49.00", "54.00", "52.66"),
    },
    "mimir": {
        "ModelScopeT2V": ("2.45", "3.50", "1.60"),
        "OpenSora": ("52.15", "47.95", "49.20"),
        "OpenSoraPlan": ("27.75", "54.75", "41.50"),
        "CogVideoX-2b": ("63.50", "52.85", "54.80"),
        "CogVideoX-5b": ("72.15", "57.30", "63.25"),
        "Mimir": ("82.00", "83.65", "89.65"),
    },
}
"""As printed, in percent, by model, in the order of the questions."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """Videos that are shown together."""

    item_id: str
    """Says nothing about what it is of."""
    prompt: str
    sample: int
    videos: Mapping[str, str]
    """generation_id by model."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Which videos are compared, by which questions."""

    name: Name
    models: tuple[str, ...]
    reference: str | None
    """Of pairs: the model that is in each of them; None is every pair of models."""
    seed: int
    """Of the prompts that were drawn, and of the orders in which things are shown."""
    items: tuple[Item, ...]
    fingerprint: str
    """Of all of this, the videos' contents among it."""
    tiny: tuple[str, ...] = ()
    """Models that are small random ones: what people make of their videos means nothing."""

    @property
    def design(self) -> Design:
        """How the paper asked."""
        return DESIGNS[self.name]

    @cached_property
    def _items(self) -> Mapping[str, Item]:
        return {item.item_id: item for item in self.items}

    def item(self, item_id: str) -> Item:
        """An item by its id."""
        return self._items[item_id]

    def voter_id(self, code: str) -> str:
        """What stands for a voter's code in the table; the code is not stored.

        The salt is the study's fingerprint: a voter has another id in each study. Who has the table
        and guesses a code can tell whether it voted: codes that are names are no secret.
        """
        salted = f"{self.fingerprint}\n{plain_code(code)}"
        return hashlib.sha256(salted.encode()).hexdigest()[:32]

    def vote_id(self, item_id: str, question: str, voter_id: str) -> str:
        """The key of a vote: the same voter's second answer has the same one."""
        said = json.dumps([self.fingerprint, item_id, question, voter_id])
        return str(uuid.uuid5(_NAMESPACE, said))

    def ordered(self, voter_id: str) -> list[Item]:
        """The items in the order of one voter: random, and the same each time."""
        return sorted(self.items, key=lambda item: self._draw(voter_id, item.item_id, "place"))

    def shown(self, voter_id: str, item: Item) -> list[str]:
        """The models of an item in the order in which one voter sees their videos."""
        return sorted(item.videos, key=lambda model: self._draw(voter_id, item.item_id, model))

    def _draw(self, *what: str) -> bytes:
        said = json.dumps([self.fingerprint, self.seed, *what])
        return hashlib.sha256(said.encode()).digest()

    def to_json(self) -> str:
        """Everything, readable."""
        said = {
            "study": self.name,
            "source": self.design.source,
            "fingerprint": self.fingerprint,
            "models": self.models,
            "reference": self.reference,
            "seed": self.seed,
            "tiny": self.tiny,
            "questions": [vars(question) for question in self.design.questions],
            "items": [vars(item) for item in self.items],
        }
        return json.dumps(said, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Study:
        """From `to_json`.

        Raises:
            ValueError: It is not that.
        """
        try:
            said = json.loads(text)
            return cls(
                name=DESIGNS[said["study"]].name,
                models=tuple(said["models"]),
                reference=said["reference"],
                seed=said["seed"],
                items=tuple(Item(**item) for item in said["items"]),
                fingerprint=said["fingerprint"],
                tiny=tuple(said["tiny"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is no study that this program wrote ({error})") from error


def plain_code(code: str) -> str:
    """A voter's code as it counts: without regard to case, spaces around it and form of Unicode.

    Raises:
        ValueError: It is empty, too long, or has characters that cannot be seen.
    """
    plain = unicodedata.normalize("NFKC", code).casefold().strip()
    if not plain or len(plain) > MAX_CODE or not plain.isprintable():
        raise ValueError(f"a code has 1 to {MAX_CODE} letters, digits or signs")
    return plain


def make_study(
    root: str,
    name: Name,
    *,
    models: Sequence[str] = (),
    reference: str | None = None,
    num_prompts: int | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> Study:
    """The study of the newest evaluation of a dataset.

    Args:
        root: The dataset.
        name: rise: all models at once; mimir: pairs of models.
        models: These alone; by default all that the evaluation has.
        reference: Of mimir: pairs with this model only, in place of every pair.
        num_prompts: So many prompts, drawn at random (Mimir: 20); by default all.
        samples: So many videos of a prompt and model (both papers: 1); by default all.
        seed: Of what is drawn.

    Raises:
        DatasetError: There is no evaluation, a model has no part in it, or too few videos.
    """
    from evals.evaluation import Results, videos_of

    results = Results.read(root, models=models or None)
    names = tuple(results.models)
    if len(names) < 2:
        raise DatasetError(f"{root} has videos of {len(names)} model: a comparison needs two")
    if reference is not None and (name != "mimir" or reference not in names):
        what = "is for mimir only" if name != "mimir" else f"is none of {', '.join(names)}"
        raise DatasetError(f"the reference {reference!r} {what}")
    stored, tiny = {}, []
    for one, plan in results.models.items():
        described = plan.model(one.partition("@")[0])
        tiny += [one] if "tiny" in described.get("notes", ()) else []
        rows = videos_of(root, described, plan.seed)
        stored[one] = {k: r for k, r in rows.items() if not r["error_type"] and r["size_bytes"]}
    places: dict[str, list[tuple[str, str, int]]] = defaultdict(list)
    for prompt, sample in results.plan.suite.videos():
        if samples is None or sample < samples:
            places[prompt.prompt].append((prompt.prompt, prompt.text, sample))
    groups = list(_groups(name, names, reference))
    whole = {
        prompt: found
        for prompt, keys in places.items()
        if (found := [(k, g) for k in keys for g in groups if all(k in stored[m] for m in g)])
    }
    if not whole:
        need = "all of" if name == "rise" else "both models of a pair of"
        raise DatasetError(
            f"{root}: no prompt has a video by {need} {', '.join(names)}: leave models out"
            " (--models), or generate what is missing (`python -m evals run`)"
        )
    chosen = _drawn(list(whole), num_prompts, seed)
    rows = [
        (key, {model: stored[model][key] for model in group})
        for prompt in chosen
        for key, group in whole[prompt]
    ]
    made = _study(name, names, reference, seed, rows)
    return dataclasses.replace(made, tiny=tuple(tiny))


def _groups(
    name: Name, models: tuple[str, ...], reference: str | None
) -> Iterator[tuple[str, ...]]:
    """Which models are compared at once."""
    if name == "rise":
        yield models
        return
    for pair in itertools.combinations(models, 2):
        if reference in (None, *pair):
            yield pair


def _drawn(prompts: list[str], num: int | None, seed: int) -> list[str]:
    """Some of the prompts, in their order."""
    if num is None or num >= len(prompts):
        return prompts
    if num < 1:
        raise ValueError(f"a study needs 1 prompt or more, not {num}")
    drawn = set(random.Random(seed).sample(prompts, num))
    return [prompt for prompt in prompts if prompt in drawn]


def _study(
    name: Name,
    models: tuple[str, ...],
    reference: str | None,
    seed: int,
    rows: Sequence[tuple[tuple[str, str, int], Mapping[str, Mapping[str, Any]]]],
) -> Study:
    questions = [vars(question) for question in DESIGNS[name].questions]
    contents = [
        [prompt, sample, {m: [row["generation_id"], row["sha256"]] for m, row in of.items()}]
        for (prompt, _, sample), of in rows
    ]
    said = json.dumps([name, models, reference, seed, questions, contents], sort_keys=True)
    fingerprint = hashlib.sha256(said.encode()).hexdigest()[:32]
    items = tuple(
        Item(
            item_id=str(uuid.uuid5(_NAMESPACE, json.dumps([fingerprint, *content]))),
            prompt=content[0],
            sample=content[1],
            videos={model: row["generation_id"] for model, row in of.items()},
        )
        for content, (_, of) in zip(contents, rows, strict=True)
    )
    return Study(
        name=name,
        models=models,
        reference=reference,
        seed=seed,
        items=items,
        fingerprint=fingerprint,
    )
