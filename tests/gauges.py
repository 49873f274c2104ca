"""Operators of which a test knows what they must give, and that tell what they were asked."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa

from engine.operator import Failed, Operator, resource, results
from engine.picture import rgb_of
from engine.schema import CLIPS, PAIRS


@dataclass(frozen=True, kw_only=True)
class Logged(Operator):
    """Notes each clip that it measures, a line each, in a file of its name."""

    log: str
    batch_size: int = resource(4)

    def note(self, clips: pa.Table) -> None:
        with (Path(self.log) / type(self).__name__).open("a") as file:
            file.writelines(f"{clip_id}\n" for clip_id in clips["clip_id"].to_pylist())
        with (Path(self.log) / f"{type(self).__name__}.batches").open("a") as file:
            file.write(f"{clips.num_rows}\n")


def asked(log: Path, operator: str) -> list[str]:
    """Clips that an operator was asked about, in order, with those it was asked about twice."""
    file = log / operator
    return file.read_text().split() if file.exists() else []


@dataclass(frozen=True, kw_only=True)
class Lightness(Logged):
    """Mean of the keyframes' pixels, 0 to 10, in the column of the aesthetic score."""

    reads: ClassVar[tuple[str, ...]] = ("keyframes",)
    writes: ClassVar[pa.Schema] = pa.schema([CLIPS.field("aesthetic_score")])
    scale: float = 10.0

    def load(self) -> Callable[[pa.Table], pa.Table]:
        def measure(clips: pa.Table) -> pa.Table:
            self.note(clips)
            means = []
            for pictures in clips["keyframes"].to_pylist():
                times = [p["time_s"] for p in pictures]
                assert times == sorted(times)
                values = [rgb_of(p["jpeg"]).mean() / 255 for p in pictures]
                means.append({"aesthetic_score": self.scale * sum(values) / len(values)})
            return results(self.writes, means)

        return measure


@dataclass(frozen=True, kw_only=True)
class Fussy(Logged):
    """A tenth of the lightness; what it does with some clips is a parameter."""

    reads: ClassVar[tuple[str, ...]] = ("aesthetic_score", "source_uri")
    writes: ClassVar[pa.Schema] = pa.schema([CLIPS.field("watermark_score")])
    raises_on: str = ""
    fails_on: str = ""
    dies_on: str = ""
    gives_nothing_on: str = ""
    unless: str = ""
    """A file: while it is there, nothing goes wrong."""

    def load(self) -> Callable[[pa.Table], pa.Table]:
        def measure(clips: pa.Table) -> pa.Table:
            self.note(clips)
            well = bool(self.unless) and Path(self.unless).exists()
            rows: list[dict[str, float | None] | Failed] = []
            for row in clips.to_pylist():
                name = Path(row["source_uri"]).stem
                if not well and name == self.dies_on:
                    os._exit(1)
                if not well and name == self.raises_on:
                    raise ValueError(f"cannot stand {name}")
                if not well and name == self.fails_on:
                    rows.append(Failed("Moody", f"not {name} today", transient=True))
                elif name == self.gives_nothing_on:
                    rows.append({"watermark_score": None})
                else:
                    rows.append({"watermark_score": row["aesthetic_score"] / 10})
            return results(self.writes, rows)

        return measure


@dataclass(frozen=True, kw_only=True)
class Speaker(Logged):
    """A caption that tells the lightness and the number of keyframes."""

    reads: ClassVar[tuple[str, ...]] = ("keyframes", "aesthetic_score")
    writes: ClassVar[pa.Schema] = pa.schema([CLIPS.field("caption"), CLIPS.field("caption_raw")])

    def load(self) -> Callable[[pa.Table], pa.Table]:
        def measure(clips: pa.Table) -> pa.Table:
            self.note(clips)
            texts = [
                f"{row['aesthetic_score']:.1f} over {len(row['keyframes'])}"
                for row in clips.to_pylist()
            ]
            return results(self.writes, [{"caption": t, "caption_raw": f'"{t}"'} for t in texts])

        return measure


@dataclass(frozen=True, kw_only=True)
class Unready(Logged):
    """Cannot be loaded."""

    reads: ClassVar[tuple[str, ...]] = ("keyframes",)
    writes: ClassVar[pa.Schema] = pa.schema([CLIPS.field("overlay_score")])

    def load(self) -> Callable[[pa.Table], pa.Table]:
        raise OSError("the file with its weights is cut off")


@dataclass(frozen=True, kw_only=True)
class Short(Logged):
    """An original caption for pairs that have none: how many pictures it has seen."""

    reads: ClassVar[tuple[str, ...]] = ("keyframes",)
    writes: ClassVar[pa.Schema] = pa.schema(
        [PAIRS.field("original"), PAIRS.field("original_source")]
    )

    def load(self) -> Callable[[pa.Table], pa.Table]:
        def measure(pairs: pa.Table) -> pa.Table:
            self.note(pairs)
            counts = [len(k) for k in pairs["keyframes"].to_pylist()]
            texts = [f"{n} pictures" for n in counts]
            return results(
                self.writes, [{"original": t, "original_source": "generated"} for t in texts]
            )

        return measure


@dataclass(frozen=True, kw_only=True)
class Longer(Logged):
    """The original, and what the clip's own columns say."""

    reads: ClassVar[tuple[str, ...]] = ("original", "aesthetic_score")
    writes: ClassVar[pa.Schema] = pa.schema(
        [PAIRS.field("rephrased"), PAIRS.field("rephrased_raw")]
    )
    words: str = "with"

    def load(self) -> Callable[[pa.Table], pa.Table]:
        def measure(pairs: pa.Table) -> pa.Table:
            self.note(pairs)
            texts = [
                f"{r['original']} {self.words} {r['aesthetic_score']:.1f}"
                for r in pairs.to_pylist()
            ]
            return results(self.writes, [{"rephrased": t, "rephrased_raw": t} for t in texts])

        return measure


@dataclass(frozen=True, kw_only=True)
class Length(Logged):
    """Words of what was rephrased, as a score."""

    reads: ClassVar[tuple[str, ...]] = ("rephrased",)
    writes: ClassVar[pa.Schema] = pa.schema([PAIRS.field("clip_score")])

    def load(self) -> Callable[[pa.Table], pa.Table]:
        def measure(pairs: pa.Table) -> pa.Table:
            self.note(pairs)
            counts = [len(t.split()) for t in pairs["rephrased"].to_pylist()]
            return results(self.writes, [{"clip_score": float(n)} for n in counts])

        return measure
