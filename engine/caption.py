"""Captioners: operators that write what a model says of a clip."""

from __future__ import annotations

import dataclasses
import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
import pyarrow as pa

from engine import storage
from engine.caption_text import clean, clean_scenes, first_sentence, is_refusal
from engine.chat import Answer, Chat, Picture, Request
from engine.operator import Failed, Operator, resource, results
from engine.picture import small_size
from engine.schema import CLIPS, PAIRS
from engine.sparse import read_frames
from engine.video import VideoError

Frames = Literal["keyframes", "decode"]

_FETCH_BYTES = 256 * 2**20  # a remote source up to this size is fetched whole
_SLOT = re.compile(r"\{(\w+)\}")

DETAILED = (
    "Describe this {media} in detail, in one paragraph: the subjects and what they look like,"
    " what they do and how that changes over time, the background and surroundings, and the camera"
    " (its angle and how it moves). Write plain English sentences, state only what can be seen,"
    " and do not guess what is outside of the picture."
)
ONE_SENTENCE = "Describe this {media} in one short English sentence: who or what does what, where."


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """How a caption is to be rephrased: y_inst of RISE-T2V, with slots in braces.

    `{y_ori}` takes the original caption and must be there; `{language}` takes the name of the
    original's language. Other braces are text.
    """

    name: str
    """As rows of `pairs` are labelled."""
    text: str
    scenes: int | None = None
    """Scenes that an answer must have; None: it is one text."""
    delimiter: str = "|"
    """Between scenes."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(_SLOT.findall(self.text)) - {"y_ori", "language"}):
            raise ValueError(
                f"instruction {self.name!r} has unknown slots {unknown}: there are {{y_ori}} and"
                " {language}"
            )
        if "{y_ori}" not in self.text:
            raise ValueError(f"instruction {self.name!r} has no slot {{y_ori}} for the caption")
        if self.scenes is not None and (self.scenes < 2 or not self.delimiter):
            raise ValueError(
                f"instruction {self.name!r} wants {self.scenes} scenes with the delimiter"
                f" {self.delimiter!r}: name at least 2 and a delimiter, or scenes=None"
            )

    @property
    def needs_language(self) -> bool:
        """Whether it names the language of the original."""
        return "{language}" in self.text

    def filled(self, y_ori: str, language: str | None = None) -> str:
        """The instruction with its slots filled; braces in a caption stay as they are.

        Raises:
            ValueError: It needs a language and there is none.
        """
        if self.needs_language and not language:
            raise ValueError(f"instruction {self.name!r} needs the language of the original")
        values = {"y_ori": y_ori.strip(), "language": language or ""}
        return _SLOT.sub(lambda slot: values[slot[1]], self.text)

    def describe(self) -> dict[str, Any]:
        """Its fields, as JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Captioner(Operator):
    """What operators share that show a clip's pictures to a model."""

    chat: Chat
    """The model."""
    batch_size: int = resource(8)
    """Rows given to one call."""
    num_gpus: float = resource(1.0)
    """Share of a GPU that one copy takes; set 0 where the model runs behind an endpoint."""

    def check(self) -> None:
        """Raises ValueError where the model cannot be had."""
        self.chat.check()

    def load(self) -> Callable[[pa.Table], pa.Table]:
        """Opens the model; the function asks it about a batch of rows at once."""
        ask = self.chat.open()

        def caption(table: pa.Table) -> pa.Table:
            asked = [_or_failed(self._request, r) for r in table.select(self.reads).to_pylist()]
            answers = iter(ask([request for request in asked if isinstance(request, Request)]))
            given = [next(answers) if isinstance(a, Request) else a for a in asked]
            rows = [_or_failed(self._values, g) if isinstance(g, Answer) else g for g in given]
            return results(self.writes, rows)

        return caption

    @abstractmethod
    def _request(self, row: dict[str, Any]) -> Request:
        """The question about a row; raises `Failed` where there is nothing to ask about."""

    @abstractmethod
    def _values(self, answer: Answer) -> dict[str, Any]:
        """What an answer is stored as; raises `Failed` where it will not do."""


@dataclass(frozen=True, kw_only=True)
class Caption(Captioner):
    """A detailed caption of each clip, from its pictures and their times in the clip.

    Models make things up and repeat themselves, which is for rules to judge; an empty text is "".
    From keyframes alone fast motion goes unseen; `decode` reads the source a second time.

    Source:
        Mimir (arXiv:2412.03085), appendix A, re-caption, with CogVLM2's video captioner. It prints
        no prompt; the default is this project's own.
    """

    writes: ClassVar[pa.Schema] = pa.schema([CLIPS.field("caption"), CLIPS.field("caption_raw")])

    prompt: str = DETAILED
    """What is asked; `{media}` becomes video or image."""
    frames: Frames = "keyframes"
    """Pictures of the scan, or frames decoded anew, evenly spaced, of videos; an image has one."""
    decode_fps: float = 2.0
    """Frames a second that are decoded anew."""
    max_frames: int = 32
    """Most frames that are decoded anew: longer clips are shown with fewer a second."""
    decode_short_side_px: int = 448
    """Of frames decoded anew; never enlarged."""
    jpeg_quality: int = 90
    """Of frames decoded anew."""

    def __post_init__(self) -> None:
        if not (self.decode_fps > 0 and self.max_frames >= 1):
            raise ValueError(
                f"decode_fps must be more than 0 and max_frames at least 1; they are"
                f" {self.decode_fps} and {self.max_frames}"
            )

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """Keyframes, and where the clip lies in its source."""
        more = ("source_uri", "end_s") if self.frames == "decode" else ()
        return ("keyframes", "start_s", *more)

    def _request(self, row: dict[str, Any]) -> Request:
        if self.frames == "decode" and row["start_s"] is not None:
            pictures = self._decoded(row["source_uri"], row["start_s"], row["end_s"])
        else:
            pictures = pictures_of(row["keyframes"], row["start_s"])
        return _question(_named(self.prompt, pictures), pictures)

    def _values(self, answer: Answer) -> dict[str, Any]:
        caption = clean(answer.text, finished=answer.finished)
        return {"caption": caption, "caption_raw": answer.text}

    def _decoded(self, uri: str, start_s: float, end_s: float) -> tuple[Picture, ...]:
        times_s = even_times(start_s, end_s, self.decode_fps, self.max_frames)
        try:
            if storage.is_remote(uri) and (storage.stat(uri).size_bytes or 0) > _FETCH_BYTES:
                with storage.open_read(uri) as file:
                    found = read_frames(file, times_s=times_s)
            else:
                with storage.fetch(uri) as path:
                    found = read_frames(path, times_s=times_s)
        except (VideoError, IndexError) as error:
            raise Failed(type(error).__name__, f"its frames cannot be read: {error}") from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise Failed(type(error).__name__, f"{uri}: {reason}", transient=True) from error
        pictures = []
        for rgb_HWC, time_s in zip(found.rgb, found.times_s, strict=True):
            jpeg = _jpeg(rgb_HWC, self.decode_short_side_px, self.jpeg_quality)
            pictures.append(Picture(jpeg=jpeg, time_s=max(0.0, time_s - start_s)))
        return tuple(pictures)


@dataclass(frozen=True, kw_only=True)
class OriginalCaption(Captioner):
    """One short sentence for a row that came without a caption: y_ori of RISE-T2V.

    Source:
        RISE-T2V, "Rephrasing Adapter", training data: pairs have an original caption; where the
        input has none, this project generates one.
    """

    writes: ClassVar[pa.Schema] = pa.schema(
        [PAIRS.field("original"), PAIRS.field("original_source")]
    )
    reads: ClassVar[tuple[str, ...]] = ("keyframes", "start_s")

    prompt: str = ONE_SENTENCE
    """What is asked; `{media}` becomes video or image."""

    def _request(self, row: dict[str, Any]) -> Request:
        pictures = pictures_of(row["keyframes"], row["start_s"])
        return _question(_named(self.prompt, pictures), pictures)

    def _values(self, answer: Answer) -> dict[str, Any]:
        sentence = first_sentence(clean(answer.text, finished=answer.finished))
        if not sentence or is_refusal(sentence):
            what = f"declined: {sentence[:80]}" if sentence else "said nothing"
            raise Failed("NoCaption", f"an original caption is needed, and the model {what}")
        return {"original": sentence, "original_source": "generated"}


@dataclass(frozen=True, kw_only=True)
class Rephrase(Captioner):
    """The original caption rewritten as an instruction says: y_rephrase of RISE-T2V.

    The model sees the pictures (x0) and the instruction filled with the original (y_ori). An
    answer with another number of scenes than the instruction's is a failure, `WrongScenes`; one
    that says nothing or declines is stored, for rules to judge.

    Source:
        RISE-T2V, "Rephrasing Adapter" and appendix, "Inference": quadruples (y_inst, y_ori,
        y_rephrase, x0).
    """

    writes: ClassVar[pa.Schema] = pa.schema(
        [PAIRS.field("rephrased"), PAIRS.field("rephrased_raw")]
    )

    instruction: Instruction

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """Pictures and caption, and the caption's language where the instruction names it."""
        more = ("language",) if self.instruction.needs_language else ()
        return ("keyframes", "start_s", "original", *more)

    def _request(self, row: dict[str, Any]) -> Request:
        if not (row["original"] or "").strip():
            raise Failed("NoCaption", "an original caption is needed to rephrase, and it is empty")
        try:
            text = self.instruction.filled(row["original"], row.get("language"))
        except ValueError as error:
            raise Failed("NoLanguage", str(error)) from error
        return _question(text, pictures_of(row["keyframes"], row["start_s"]))

    def _values(self, answer: Answer) -> dict[str, Any]:
        wanted, delimiter = self.instruction.scenes, self.instruction.delimiter
        text = clean(answer.text, finished=answer.finished)
        if wanted is not None and text and not is_refusal(text):
            scenes = clean_scenes(answer.text, delimiter, finished=answer.finished)
            if len(scenes) != wanted:
                cut = "" if answer.finished else ", cut off"
                raise Failed(
                    "WrongScenes", f"{wanted} scenes wanted, {len(scenes)} found{cut}: {text[:80]}"
                )
            text = f" {delimiter} ".join(scenes)
        return {"rephrased": text, "rephrased_raw": answer.text}


def pictures_of(
    keyframes: Sequence[dict[str, Any]] | None, start_s: float | None
) -> tuple[Picture, ...]:
    """A row's keyframes as pictures with their times in the clip.

    Args:
        keyframes: `time_s` in the source, and `jpeg`, in order of time.
        start_s: Of the clip in the source; None is an image, whose picture has no time.

    Raises:
        Failed: There is none.
    """
    if not keyframes:
        raise Failed("NoKeyframes", "a caption needs a keyframe, and there is none")
    return tuple(
        Picture(jpeg=k["jpeg"], time_s=None if start_s is None else max(0.0, k["time_s"] - start_s))
        for k in keyframes
    )


def even_times(start_s: float, end_s: float, fps: float, most: int) -> list[float]:
    """Middles of equal parts of a span: `fps` a second, at least one and at most `most`."""
    num = int(np.clip(round((end_s - start_s) * fps), 1, most))
    return [start_s + (i + 0.5) * (end_s - start_s) / num for i in range(num)]


def _named(prompt: str, pictures: tuple[Picture, ...]) -> str:
    return prompt.replace("{media}", "image" if pictures[0].time_s is None else "video")


def _question(text: str, pictures: tuple[Picture, ...]) -> Request:
    return Request(text=text, pictures=pictures, video=pictures[0].time_s is not None)


def _or_failed(function: Callable[[Any], Any], argument: Any) -> Any:
    try:
        return function(argument)
    except Failed as failure:
        return failure


def _jpeg(rgb_HWC: np.ndarray, short_side_px: int, quality: int) -> bytes:
    height, width = rgb_HWC.shape[:2]
    longer = round(max(width, height) * min(1.0, short_side_px / min(width, height)))
    size = small_size(width, height, longer)
    small = cv2.resize(rgb_HWC, size, interpolation=cv2.INTER_AREA)
    done, data = cv2.imencode(
        ".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality]
    )
    assert done, "imencode refused an 8-bit BGR image"
    return data.tobytes()
