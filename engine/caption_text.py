"""What is done to a caption's words: cleaning, repetition rates, and what is wrong with them."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from engine.operator import Operator, results
from engine.schema import CLIPS

_THOUGHTS = re.compile(
    r"\A\s*(?:<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)|[^<]*</think>)", re.DOTALL | re.IGNORECASE
)
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)[\w+-]*[ \t]*$|^[ \t]*(?:[-*_][ \t]*){3,}$", re.MULTILINE)
_LINK = re.compile(r"!?\[([^\]\n]{0,200})\]\((?:https?://|#|data:)[^)\s]*\)")
_EMPHASIS = re.compile(
    r"(?<![\w*])(\*{1,3})(?=[^\s*])([^*\n]*[^\s*])\1(?![\w*])"
    r"|(?<![\w_])(_{1,3})(?=[^\s_])([^_\n]*[^\s_])\3(?![\w_])"
    r"|(?<!`)(`{1,3})(?=[^\s`])([^`\n]*[^\s`])\5(?!`)"
)
# A line that begins with # or is all bold, with words below it, names a section.
_HEADING = re.compile(
    r"^[ \t]*(?:#{1,6}[ \t]+[^\n]*|(\*\*|__)[^*_\n.!?]{1,60}\1:?)[ \t]*\n(?=\s*\S)", re.MULTILINE
)
_LINE_MARK = re.compile(r"^[ \t]*(?:#{1,6}|>)[ \t]+", re.MULTILINE)
_BULLET = re.compile(r"[ \t]*(?:[-*+•‣▪–][ \t]+|\(?\d{1,2}[.)][ \t]+(?=\D))")

_SAID = (
    r"(?:description|caption|prompt|sentence|version|summary|overview|breakdown|translation|output"
    r"|response|rewrite|rewritten|rephrased|rephrasing|enhanced|answer|text|scene|frame|what)"
)
_KIND = (
    r"(?:final|detailed|dense|short|long|rewritten|rephrased|enhanced|revised|refined|improved"
    r"|updated|new|video|image|scene|english|translated)"
)
_HERE = r"here(?:['’]s| is| are)"
_OPENING = re.compile(
    r"\s*(?:"
    r"(?:sure(?: thing)?|certainly|of course|absolutely|gladly|okay|ok)[,.!:]+"
    r"|i(?:['’]d| would) be (?:happy|glad|delighted) to\b[^.!?:\n]*[.!:]"
    r"|i can (?:certainly |definitely )?help (?:you )?with (?:that|this)[.!,]"
    rf"|(?:{_HERE}|(?:below|the following) (?:is|are))\b(?=[^.!?:\n]*\b{_SAID}s?\b)"
    r"[^.!?:\n]{0,160}(?::|[.!]?[ \t]*\n)"
    rf"|(?:based on|according to|from)\b[^.!?:\n]{{0,100}}\b{_HERE}\b[^.!?:\n]{{0,100}}:"
    r"|(?:example \d+\s*:\s*)?(?:input|video about)\s*:.{0,600}?\boutput\s*:"
    rf"|(?:(?:the|my|your|a)\s+)?(?:{_KIND}\s+){{0,3}}"
    r"(?:output|description|caption|answer|response|prompt|translation|rewrite|summary)"
    r"(?:\s+(?:of|for)\s+(?:the|this)\s+(?:video|image|clip|scene))?(?:\s+is)?\s*:"
    r"|(?:好的|当然(?:可以)?|没问题)[,，。!！]"
    r"|(?:以下是|下面是)[^。：:\n]{0,40}[：:]"
    r"|(?:输出|描述|视频描述|译文|翻译|出力)\s*[：:]"
    r"|(?:voici|hier ist|aquí (?:tienes|está)|ecco|aqui está)\b[^.!?:\n]{0,100}:"
    r")\s*",
    re.IGNORECASE | re.DOTALL,
)
_AFTERWORD = re.compile(
    r"(?:(?<=[.!?…。！？\"”’')])\s+|\n\s*)(?:"
    r"(?:please )?let me know (?:if|what|how|whether)\b"
    r"|i hope (?:this|that|it) (?:helps|meets|is)\b"
    r"|(?:please )?feel free to (?:ask|let|reach|modify|adjust|share|provide|request)\b"
    r"|would you like me to\b"
    r"|is there anything else\b"
    r"|if you(?:['’]d| would) like (?:me|any|more|a|to)\b"
    r"|if you (?:have any|need any|need more|want me)\b"
    r").*\Z"
    r"|\n\s*(?:now,? rewrite the prompt|now please provide"
    r"|(?:example \d+|input|video about|note)\s*:).*\Z",
    re.IGNORECASE | re.DOTALL,
)
_PAIRS = {"“": "”", "«": "»", "「": "」", "『": "』", "„": "“", '"': '"', "'": "'"}
_SENTENCE_END = re.compile(r"[.!?…]+[\"”’'»)\]]*(?=\s|\Z)|[。！？．]+[\"”’』」》）]*")
_ABBREVIATION = re.compile(
    r"\b(?:mr|mrs|ms|dr|prof|st|mt|vs|approx|e\.g|i\.e|(?-i:[A-Z]))\.\Z", re.IGNORECASE
)


def clean(text: str, *, finished: bool) -> str:
    """A caption without what a chat model puts around it; '' where nothing else was said.

    Removed are reasoning, openings ("Sure, here is a description:"), labels ("Output:"),
    afterwords, quotation marks around the whole, Markdown (headings go, bullets become
    sentences), and of an answer that was cut off what follows its last full sentence; one without
    any full sentence stays as it is. Phrases not thought of here get through, so the raw text is
    worth keeping beside it.

    Args:
        text: What the model said.
        finished: False where it was cut off.
    """
    text = _THOUGHTS.sub("", text).replace("\u200b", "").replace("\ufeff", "")
    text = _unmarked(text.replace("\r\n", "\n"))
    before = None
    while before != text:
        before = text
        text = _unquoted(_AFTERWORD.sub("", _without_opening(text)))
    text = _as_prose(text, finished=finished)
    if not finished and (ends := _sentence_ends(text)):
        text = text[: ends[-1]]
    return _unquoted(text)


def clean_scenes(text: str, delimiter: str, *, finished: bool) -> list[str]:
    """The scenes of an answer, each cleaned of labels ("First frame:"), quotes and numbers, too."""
    label = re.compile(
        r"\A(?:the )?(?:(?:first|last|start|end|final|opening|closing)(?: frame| scene)?"
        r"|(?:scene|frame|description) \d+)\s*:\s*",
        re.IGNORECASE,
    )
    whole = clean(text, finished=finished)
    scenes = [label.sub("", clean(s, finished=True)) for s in scenes_of(whole, delimiter)]
    return [cleaned for s in scenes if (cleaned := _unquoted(s))]


def scenes_of(text: str, delimiter: str = "|") -> list[str]:
    """The scenes of a text, stripped, without empty ones."""
    return [scene for part in text.split(delimiter) if (scene := part.strip())]


def first_sentence(text: str) -> str:
    """A text up to its first full stop (whole where it has none)."""
    ends = _sentence_ends(text)
    return text[: ends[0]] if ends else text


def _unmarked(text: str) -> str:
    text = _LINK.sub(r"\1", _FENCE.sub("", text)).strip()
    before = None
    while before != text:
        before = text
        text = _EMPHASIS.sub(lambda m: m[2] or m[4] or m[6], _HEADING.sub("", text))
    return _LINE_MARK.sub("", text)


def _without_opening(text: str) -> str:
    end = 0
    while found := _OPENING.match(text, end):
        end = found.end()
    return text[end:]


def _as_prose(text: str, *, finished: bool) -> str:
    """Lines joined; bullets and numbers at their beginning gone, and full stops at their end."""
    lines = [line for line in text.split("\n") if line.strip()]
    listed = sum(bool(_BULLET.match(line)) for line in lines)
    said = []
    for i, line in enumerate(lines):
        bullet = _BULLET.match(line)
        item = _SPACES.sub(" ", line[bullet.end() :] if bullet else line).strip()
        complete = i < len(lines) - 1 or (finished and listed > 1)
        if bullet and complete and item[-1:] not in ".!?…:;,。！？：；，|":
            item += "."
        said.append(item)
    return " ".join(said)


def _sentence_ends(text: str) -> list[int]:
    """Where sentences end, past their closing quotes."""
    ends = []
    for found in _SENTENCE_END.finditer(text):
        before = text[: found.start() + 1]
        # at the very end, "3." may be the beginning of 3.5
        number = found.end() == len(text) and re.search(r"\d\.\Z", text)
        if not (_ABBREVIATION.search(before[-12:]) or number):
            ends.append(found.end())
    return ends


def _unquoted(text: str) -> str:
    """Without quotation marks around the whole, or one at an edge that has no partner."""
    text = text.strip()
    while len(text) > 1 and text[0] in _PAIRS and text[-1] == _PAIRS[text[0]]:
        inner = text[1:-1]
        if not _is_one_quotation(inner, text[0], text[-1]):
            return text
        text = inner.strip()
    if text[:1] in _PAIRS and text[0] != "'" and _PAIRS[text[0]] not in text[1:]:
        text = text[1:].strip()
    if text[-1:] in ('"', "”") and not any(mark in text[:-1] for mark in '"“„'):
        text = text[:-1].strip()
    return text


def _is_one_quotation(inner: str, opening: str, closing: str) -> bool:
    """Whether marks around `inner` belong together: inside, none closes before it was opened."""
    depth = 0
    for i, mark in enumerate(inner):
        if mark not in (opening, closing):
            continue
        before, after = inner[i - 1 : i] if i else " ", inner[i + 1 : i + 2]
        if mark == "'" and before.isalnum() and after.isalnum():  # an apostrophe
            continue
        opens = mark == opening if opening != closing else before.isspace() or before in "([—"
        depth += 1 if opens else -1
        if depth < 0:
            return False
    return depth == 0


# Python's \w leaves out combining marks, with which Indic and other scripts write vowels.
_MARKS = "".join(chr(c) for c in range(0x300, 0x3000) if unicodedata.category(chr(c))[0] == "M")
_LETTER = rf"(?:[^\W_]|[{_MARKS}])"
_WORD = re.compile(
    rf"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|{_LETTER}+(?:['’]{_LETTER}+)*"
)
_SPACES = re.compile(r"[ \t\n\r\f\v]+")  # a no-break space is meant


def words(text: str) -> list[str]:
    """The words of a text, in lower case.

    A word is a run of letters, digits and combining marks of any script, with apostrophes inside
    it (don't). Han and kana, which are written without spaces, count one by one.
    """
    return _WORD.findall(text.lower())


def repetition_rate(text: str, n: int) -> float:
    """Share of a text's word n-grams that repeat an earlier one: 1 - unique / total, 0 to 1.

    Long texts repeat more than short ones by nature ("of the"), and single characters of Chinese
    or Japanese more than words: bounds made for English words do not carry over.

    Args:
        text: Split by `words`.
        n: Words in an n-gram; a text with fewer has the rate 0.

    Source:
        Mimir (arXiv:2412.03085), appendix A, caption filtration, names the rates for n = 2, 5, 10
        but no formula; this one is seq-rep-n of Welleck et al. (arXiv:1908.04319), section 6.
    """
    found = words(text)
    grams = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True, kw_only=True)
class Repetition(Operator):
    """2-, 5- and 10-gram repetition rates of a caption (see `repetition_rate`)."""

    writes: ClassVar[pa.Schema] = pa.schema(
        [CLIPS.field(f"repetition_{n}gram") for n in (2, 5, 10)]
    )

    of: str = "caption"
    """Column with the text."""

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """The column `of`."""
        return (self.of,)

    def load(self) -> Callable[[pa.Table], pa.Table]:
        """A function that needs no weights."""

        def measure(rows: pa.Table) -> pa.Table:
            return results(self.writes, [self._row(text) for text in rows[self.of].to_pylist()])

        return measure

    def _row(self, text: str) -> dict[str, float]:
        return {f"repetition_{n}gram": repetition_rate(text, n) for n in (2, 5, 10)}


_CANNOT = (
    r"(?:i cannot|i can not|i can['’]t|i could not|i couldn['’]t|i do not|i don['’]t|i will not"
    r"|i won['’]t|(?:i am|i['’]m) (?:unable|not able) to)"
)
# Titles of songs begin like refusals, so some verbs need an object.
_SHOWN = r"(?:videos?|images?|pictures?|photos?|frames?|clips?|content|request|files?|links?)"
_DECLINED = (
    r"(?:assist|comply|help (?:you|with)|provide|describe|rewrite|generate|create"
    rf"|(?:see|view|watch|access|process|identify|answer|have|continue)\b[^.]{{0,40}}\b{_SHOWN})\b"
)
_SEEMS = r"(?:it (?:seems|appears|looks like) )?(?:that )?"
_REFUSAL_START = re.compile(
    r"sorry,? (?:but )?(?:i (?:can|could|am|do)|i['’]m|as an)"
    r"|(?:i['’]m|i am) (?:\w+ )?sorry\b"
    r"|(?:my )?apologies\b"
    r"|i (?:must )?apologi[sz]e\b"
    r"|unfortunately,? (?:i|as an|no|there is no|the (?:image|video|picture)s?)\b"
    rf"|{_CANNOT} (?:\w+ )?{_DECLINED}"
    rf"|{_SEEMS}(?:there is )?no (?:image|video|picture)s? (?:(?:was|were|has been|have been) )?"
    r"(?:provided|uploaded|shared)\b"
    rf"|{_SEEMS}you (?:have not|haven['’]t|did not|didn['’]t) (?:provide|attach|upload|share)"
    r"|please (?:provide|upload|attach|(?:share|send) (?:an?|your)) "
    r"|抱歉|对不起|對不起|很遗憾|申し訳",
    re.IGNORECASE,
)
_REFUSAL_ANYWHERE = re.compile(
    r"\bas an? (?:[\w-]+ ){0,2}?(?:ai(?:,| i\b| (?:language |visual )?(?:model|assistant)\b)"
    r"|language model\b)"
    rf"|\b{_CANNOT} {_DECLINED}"
    r"|作为一?[个名]?\s*(?:ai|人工智能)",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”|«[^»]*»|「[^」]*」|『[^』]*』")


def is_refusal(text: str) -> bool:
    """Whether the model declines to describe, by set phrases, in English and a few in others.

    Only openings count, and unmistakable phrases outside of quotation marks: what is written on a
    sign in the picture is no refusal.
    """
    said = " ".join(text.split())
    return bool(_REFUSAL_START.match(said) or _REFUSAL_ANYWHERE.search(_QUOTED.sub("", said)))


def echoes(text: str, prompt: str, run: int) -> bool:
    """Whether a text shares `run` words in a row with a prompt.

    A text shorter than that is an echo if all of it, at least five words, is in the prompt.

    Args:
        text: Split by `words`, like the prompt.
        prompt: What was asked; slots such as `{y_ori}`, whose content may be repeated, part it.
        run: Words.
    """
    said = words(text)
    length = min(run, max(5, len(said)))
    parts = [words(part) for part in re.split(r"\{\w+\}", prompt)]
    asked = {tuple(p[i : i + length]) for p in parts for i in range(len(p) - length + 1)}
    return any(tuple(said[i : i + length]) in asked for i in range(len(said) - length + 1))


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language_probability(text: str, language: str) -> float:
    """Probability that a text is in a language, by py3langid's n-grams of bytes, 0 to 1.

    Misleading for less than a sentence: "A dog." counts as Croatian.

    Args:
        text: Of any length.
        language: ISO 639-1 code, such as `en`.
    """
    return dict(_identifier().rank(text)).get(language, 0.0)


def likeliest_language(text: str) -> str:
    """ISO 639-1 code of the language that a text is likeliest in, by the same n-grams.

    Misleading for less than a sentence, too.
    """
    return _identifier().classify(text)[0]


@dataclass(frozen=True, kw_only=True)
class CaptionFault(Operator):
    """What is wrong with a caption, as one word; '' where nothing is.

    The first that applies, in this order: `empty` (no word at all), `refusal` (see `is_refusal`),
    `prompt_echo` (see `echoes`), `wrong_language`, `wrong_scenes` (another number of scenes than
    expected). So a refusal is a refusal in whatever language.

    Source:
        Mimir (arXiv:2412.03085), appendix A, caption filtration: "human designed rule-based
        methods", of which it names none.
    """

    writes: ClassVar[pa.Schema] = pa.schema([CLIPS.field("caption_fault")])
    libraries: ClassVar[tuple[str, ...]] = ("py3langid",)

    of: str = "caption"
    """Column with the text."""
    language: str | None = "en"
    """ISO 639-1 code of the language wanted; None is any."""
    min_language_probability: float = 0.005
    """Under it a text is in another language. English captions full of foreign names stay above
    0.03, one sentence of another language is under 0.003, and what is in no language has 0.007."""
    min_language_bytes: int = 24
    """Letters, as bytes of UTF-8, that a text must have for its language to be judged."""
    prompt: str = ""
    """What the captioner was asked, its slots open."""
    echo_words: int = 12
    """Words in a row, shared with the prompt, that make an echo."""
    scenes: int | None = None
    """Scenes wanted; None does not count them."""
    delimiter: str = "|"
    """Between scenes."""

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """The column `of`."""
        return (self.of,)

    def check(self) -> None:
        """Raises ValueError where the language cannot be told."""
        if self.language is None:
            return
        try:
            known = _identifier().labels
        except ImportError:
            raise ValueError(
                "the language of captions needs py3langid: pip install py3langid"
            ) from None
        if self.language not in known:
            raise ValueError(
                f"no captions can be told to be in {self.language!r}: language is an ISO 639-1"
                " code such as en, or None"
            )

    def load(self) -> Callable[[pa.Table], pa.Table]:
        """A function that needs no weights but those inside py3langid."""

        def measure(rows: pa.Table) -> pa.Table:
            faults = [{"caption_fault": self.fault(text)} for text in rows[self.of].to_pylist()]
            return results(self.writes, faults)

        return measure

    def fault(self, text: str) -> str:
        """Of one text."""
        found = words(text)
        if not found:
            return "empty"
        if is_refusal(text):
            return "refusal"
        if self.prompt and echoes(text, self.prompt, self.echo_words):
            return "prompt_echo"
        if self.language is not None and self._is_foreign(text, found):
            return "wrong_language"
        if self.scenes is not None and len(scenes_of(text, self.delimiter)) != self.scenes:
            return "wrong_scenes"
        return ""

    def _is_foreign(self, text: str, found: list[str]) -> bool:
        assert self.language is not None
        if len("".join(found).encode()) < self.min_language_bytes:
            return False
        return language_probability(text, self.language) < self.min_language_probability
