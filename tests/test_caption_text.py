"""Cleaning, repetition rates and faults of captions, by closed form and by example."""

import time

import pyarrow as pa
import pytest

from engine.caption_text import (
    CaptionFault,
    Repetition,
    clean,
    clean_scenes,
    echoes,
    first_sentence,
    is_refusal,
    language_probability,
    repetition_rate,
    words,
)
from engine.schema import CLIPS

UNTOUCHED = [
    "A cat sits on a mat.",
    "A cat on a mat",
    'A man says, "Let\'s go."',
    '"Stop" says the sign next to "Go"',
    "The sign reads “Open”, and a man says “Hello.”",
    "The dogs' owner calls them; it's the neighbours' garden.",
    "'Tis the season: children skate.",
    "Okay sign made by a hand.",
    "Here is a dog. It barks.",
    "Here, two men play chess: one moves a rook.",
    "Sure-footed goats climb a cliff.",
    "Of course the cat is black.",
    "Output of a factory: cars roll off a belt.",
    "A caption on the screen reads: Hello.",
    "Based on the frames provided, the video shows a sign that says: 'Hi'. A man waves.",
    "A recipe: mix 5*3*2 cups; snake_case_name stays, and 2 * 3 * 4.",
    "At 3.5 m/s, i.e. slowly, Mr. Smith walks past St. Paul's (approx. 5 p.m.).",
    "2023 appears on a banner. 10 runners pass.",
    "Children play... and laugh! Is it summer?",
    "El perro corre. ¿Dónde está? ¡Allí!",
    "Une femme dit : « Bonjour », puis s'en va.",
    "一只可爱的小狗坐在地上。它看着“天空”。",
    "子犬が床の上に座っています。「ワン」と鳴く。",
    "एक प्यारा पिल्ला फर्श पर बैठा है।",
    "A dog runs | A dog sits",
    "A woman in a #1 jersey; a C# book lies on the table.",
    "If you look closely, a fox hides in the grass.",
    "A man lets us know if the train comes.",
    "{curly} braces and <angle> brackets stay",
]

CLEANED = [
    ("Sure, here is a detailed description of the video:\n\nA cat sits.", "A cat sits."),
    ("Sure! The video shows a cat.", "The video shows a cat."),
    ("Certainly! Below is the enhanced prompt:\n\n> A dog runs.", "A dog runs."),
    ('Here’s a description of the video:\n"A man walks."', "A man walks."),
    ("Here is the rewritten prompt.\nA man walks.", "A man walks."),
    ("Here are the two descriptions:\nA | B", "A | B"),
    ("I'd be happy to help! Here's the caption: A cat.", "A cat."),
    ("Based on the provided frames, here is a description: A dog.", "A dog."),
    ("The output: A man walks.", "A man walks."),
    ('**Output:** "A man walks."', "A man walks."),
    ("Output:\nA man walks.", "A man walks."),
    ("Detailed video description: A man walks.", "A man walks."),
    ('Input: "A cat."\n\nOutput: The video features a cat.', "The video features a cat."),
    ("The video features a cat.\n\nInput: A dog.\nOutput: A", "The video features a cat."),
    (
        "### Scene\n\nA **red** car drives *fast* down a `road`.",
        "A red car drives fast down a road.",
    ),
    ("**Video Description**\n\nA __red__ car.", "A red car."),
    ("**Background:** A park.\n**Subjects:** Two men.", "Background: A park. Subjects: Two men."),
    ("- A cat\n- A dog\n- A bird sings.", "A cat. A dog. A bird sings."),
    ("It shows:\n1. A man walking\n2. A dog running", "It shows: A man walking. A dog running."),
    ("```text\nA cat.\n```", "A cat."),
    ("```A cat.```", "A cat."),
    ("A [cat](https://example.org/c) sits.\n\n---", "A cat sits."),
    ("“A man walks.”", "A man walks."),
    ("'A man's dog walks.'", "A man's dog walks."),
    ('"A sign that says "Stop" stands."', 'A sign that says "Stop" stands.'),
    ("«Un homme marche.»", "Un homme marche."),
    ("「子犬が座る。」", "子犬が座る。"),
    ("A man walks. Let me know if you'd like more details!", "A man walks."),
    ("A man walks.\n\nI hope this helps! Feel free to ask.", "A man walks."),
    ("A man walks.\n\nNote: I saw only four frames.", "A man walks."),
    ("当然，以下是视频的描述：一只小狗坐在地上。", "一只小狗坐在地上。"),
    ("Voici une description de la vidéo : Un homme marche.", "Un homme marche."),
    ("<think>The user wants a caption.</think>\n\nA cat.", "A cat."),
    ("The user wants a caption.\n</think>\nA cat.", "A cat."),
    ("  A   cat\r\n\r\n sat\u200b down.  ", "A cat sat down."),
    ("Sure!", ""),
    ('""', ""),
    ("", ""),
]

CUT_OFF = [
    ("A man stands. He walks to the", "A man stands."),
    ("A man stands. Mr. Smith wal", "A man stands."),
    ('A man says, "Go." Then he', 'A man says, "Go."'),
    ("It rained. The ratio is 3.", "It rained."),
    ('"A man walks. He st', "A man walks."),
    ("- A cat\n- A dog\n- A bi", "A cat. A dog."),
    ("一只小狗坐在地上。它很可", "一只小狗坐在地上。"),
    ("A man in a red shirt walks toward", "A man in a red shirt walks toward"),
    ("A man stands.", "A man stands."),
    ("<think>First I look at", ""),
]


@pytest.mark.parametrize("caption", UNTOUCHED)
def test_a_normal_caption_stays_as_it_is(caption: str) -> None:
    assert clean(caption, finished=True) == caption


@pytest.mark.parametrize(("said", "caption"), CLEANED)
def test_chatter_marks_and_quotes_go(said: str, caption: str) -> None:
    assert clean(said, finished=True) == caption


@pytest.mark.parametrize(("said", "caption"), CUT_OFF)
def test_a_cut_off_answer_ends_with_its_last_full_sentence(said: str, caption: str) -> None:
    assert clean(said, finished=False) == caption


def test_cleaning_twice_is_cleaning_once() -> None:
    for said in [*UNTOUCHED, *(said for said, _ in CLEANED)]:
        once = clean(said, finished=True)
        assert clean(once, finished=True) == once


@pytest.mark.parametrize(
    "unit",
    ["*", "_", "`", '"', "'", "- ", "#", "\n", "*a ", "Sure! ", "here is ", "a.b ", "|", "[("],
)
def test_cleaning_long_nonsense_takes_no_time(unit: str) -> None:
    started = time.process_time()
    clean(unit * 20_000, finished=False)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("said", "scenes"),
    [
        ("A volcano. | Lava flows.", ["A volcano.", "Lava flows."]),
        (
            'Sure! Here are the two scenes:\n\n**First frame:** "A volcano." | **End:** "Lava."',
            ["A volcano.", "Lava."],
        ),
        ("1. A volcano. |\n2. Lava.", ["A volcano.", "Lava."]),
        ('"A volcano." | "Lava."', ["A volcano.", "Lava."]),
        ("A volcano. | Lava. |", ["A volcano.", "Lava."]),
        ("A | B | C", ["A", "B", "C"]),
        ("A volcano. Then lava.", ["A volcano. Then lava."]),
        ("Sure!", []),
    ],
)
def test_scenes_are_parted_and_cleaned(said: str, scenes: list[str]) -> None:
    assert clean_scenes(said, "|", finished=True) == scenes


def test_first_sentence() -> None:
    assert first_sentence("Dr. No walks. He sits.") == "Dr. No walks."
    assert first_sentence("一只小狗。它坐。") == "一只小狗。"
    assert first_sentence("A dog at 3.5 m") == "A dog at 3.5 m"


def test_words_are_those_of_any_script() -> None:
    assert words("Don't stop: 2 cats' toys, snake_case!") == (
        ["don't", "stop", "2", "cats", "toys", "snake", "case"]
    )
    assert words("Žluťoučký KŮŇ, щенок") == ["žluťoučký", "kůň", "щенок"]
    assert words("小狗 runs") == ["小", "狗", "runs"]
    assert words("हिन्दी भाषा") == ["हिन्दी", "भाषा"]  # vowel signs are marks, not letters
    assert words("... !") == []


@pytest.mark.parametrize(
    ("text", "n", "rate"),
    [
        ("a b c d", 2, 0.0),  # ab bc cd
        ("a b a b", 2, 1 / 3),  # ab ba ab
        ("A b, a B!", 2, 1 / 3),
        ("a a a a a", 2, 3 / 4),  # aa four times
        ("the cat and the cat and the dog", 2, 3 / 7),  # the-cat, cat-and, and-the come again
        ("a b c d e a b c d e", 5, 1 / 6),  # six 5-grams, the last is the first
        ("a b c d e f g h i j " * 2, 10, 1 / 11),
        ("a b c d e f g h i j " * 3, 10, 11 / 21),
        ("a b c d", 5, 0.0),
        ("word", 2, 0.0),
        ("", 2, 0.0),
    ],
)
def test_repetition_rate_by_hand(text: str, n: int, rate: float) -> None:
    assert repetition_rate(text, n) == pytest.approx(rate, abs=1e-12)


def test_repetition_operator() -> None:
    texts = ["a b a b", "a b c d e a b c d e"]
    operator = Repetition(of="rephrased")
    assert operator.reads == ("rephrased",) and operator.marker == "repetition_2gram"
    found = operator.load()(pa.table({"rephrased": texts}))
    for n, rates in ((2, [1 / 3, 4 / 9]), (5, [0, 1 / 6]), (10, [0, 0])):
        name = f"repetition_{n}gram"
        assert found[name].to_pylist() == pytest.approx(rates)
        assert found.schema.field(name).type == CLIPS.field(name).type
    assert found["error_type"].null_count == 2
    assert Repetition().fingerprint != operator.fingerprint


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't assist with that.", True),
        ("I’m sorry, I cannot view videos.", True),
        ("I am unable to see the video.", True),
        ("I cannot see any video here.", True),
        ("I don't have access to the clip.", True),
        ("Sorry, I can't do that.", True),
        ("Please share an image.", True),
        ("As an AI language model, I cannot watch videos.", True),
        ("The frames are dark. As an AI, I cannot describe them.", True),
        ("Unfortunately, no video was provided.", True),
        ("It seems you haven't uploaded a video.", True),
        ("No image was provided.", True),
        ("Please provide the video you want described.", True),
        ("抱歉，我无法查看视频。", True),
        ('A sign reads "I\'m sorry". A man cannot read it.', False),
        ('The robot says "As an AI model, I cannot help you."', False),
        ("As an assistant hands over the scalpel, a doctor operates.", False),
        ("As an AI-generated city appears, lights flicker.", False),
        ("As a digital clock ticks, a man sleeps.", False),
        ("I can't believe this cat!", False),
        ("I can't help falling in love, a cover for piano", False),
        ("I can't see you, a song in the rain", False),
        ("Sorry, wrong number: a film of 1948", False),
        ("Please share this video of my cat!", False),
        ("No people are visible; images hang on the wall.", False),
        ("A sorry-looking dog sits in the rain.", False),
    ],
)
def test_refusals(text: str, refused: bool) -> None:
    assert is_refusal(text) is refused


ENGLISH = [
    "A dog runs along a sandy beach.",
    "A samurai in a kimono draws a katana in front of a torii gate.",
    "A mariachi band plays in the plaza of Guadalajara, Jalisco.",
    "Close-up of sushi, sashimi, tempura and ramen on a wooden table.",
    "The Arc de Triomphe and the Champs-Élysées at night.",
    "Timelapse clouds over Kilimanjaro, Tanzania.",
    "A woman in a sari dances Bharatanatyam in Chennai.",
    "blue sky white clouds green grass",
    'A sign reads "Herzlich willkommen im Hotel zur Post" over the door.',
    "This bright street frames the round statue.",
]
FOREIGN = {
    "de": "Ein Mann geht mit seinem Hund im Park spazieren.",
    "fr": "Un adorable chiot est sur le sol.",
    "es": "Un perro corre por la playa mientras cae la noche.",
    "pt": "Uma mulher caminha pela praia ao pôr do sol.",
    "zh": "一只可爱的小狗坐在地上。",
    "ja": "子犬が床の上に座っています。",
    "ru": "Милый щенок сидит на полу.",
    "ar": "جرو لطيف يجلس على الأرض.",
    "ko": "귀여운 강아지가 바닥에 앉아 있다.",
    "hi": "एक प्यारा पिल्ला फर्श पर बैठा है।",
}


def test_language_is_judged_with_room_on_both_sides_of_the_bound() -> None:
    bound = CaptionFault().min_language_probability
    assert min(language_probability(text, "en") for text in ENGLISH) > 5 * bound
    assert max(language_probability(text, "en") for text in FOREIGN.values()) < bound / 2
    for language, text in FOREIGN.items():
        assert CaptionFault(language=language).fault(text) == ""
        assert CaptionFault(language=None).fault(text) == ""
        assert CaptionFault().fault(text) == "wrong_language"


@pytest.mark.parametrize("text", ["A dog.", "Ein Hund.", "Pizza Napoli", "Volcano", "小狗"])
def test_the_language_of_a_few_words_is_not_judged(text: str) -> None:
    assert CaptionFault().fault(text) == ""


def test_text_in_no_language_is_not_judged_by_language() -> None:
    assert CaptionFault().fault("4711 0815 1234 5678 9012 3456 7890 1234") == ""


PROMPT = (
    "Describe this video in detail, in one paragraph: the subjects and what they look like, what"
    " they do. Input: {y_ori} Output: in plain English sentences, state only what can be seen."
)


def test_an_echo_is_a_long_run_of_the_prompts_words() -> None:
    ten = "DESCRIBE this video in detail, in one paragraph: the subjects"
    assert echoes(f"I will {ten} are cats", PROMPT, run=10)
    assert not echoes(f"I will {ten} are cats", PROMPT, run=11)
    assert echoes("the subjects and what they look like", PROMPT, run=12)  # all of a short one
    assert not echoes("what they do", PROMPT, run=12)  # too short to tell
    # what stands in a slot may be said again, and what surrounds it is not one run
    assert not echoes("what they do input output in plain English", PROMPT, run=6)
    assert not echoes("", PROMPT, run=12)


def test_faults_in_their_order() -> None:
    fault = CaptionFault(prompt=PROMPT, scenes=2, echo_words=8).fault
    assert fault("") == fault(" ... ") == "empty"
    assert (
        fault("I'm sorry, I cannot. Describe this video in detail, in one paragraph") == "refusal"
    )
    assert fault("Describe this video in detail, in one paragraph: Ein Hund.") == "prompt_echo"
    assert fault("Ein Mann geht mit seinem Hund im Park spazieren.") == "wrong_language"
    assert fault("A man walks his dog in the park.") == "wrong_scenes"
    assert fault("A man walks | his dog | in the park.") == "wrong_scenes"
    assert fault("A man walks his dog in the park. | They sit.") == ""
    assert CaptionFault(scenes=2, delimiter="//").fault("A dog runs on grass // It sits") == ""


def test_fault_operator() -> None:
    operator = CaptionFault(of="rephrased")
    operator.check()
    found = operator.load()(pa.table({"rephrased": ["A dog runs.", "", FOREIGN["de"]]}))
    assert found["caption_fault"].to_pylist() == ["", "empty", "wrong_language"]
    assert found["error_type"].null_count == 3
    assert operator.reads == ("rephrased",)
    with pytest.raises(ValueError, match="no captions can be told to be in 'English'"):
        CaptionFault(language="English").check()
    changes = ({"language": None}, {"prompt": "x"}, {"scenes": 2}, {"echo_words": 5})
    prints = {CaptionFault(**change).fingerprint for change in ({}, *changes)}
    assert len(prints) == 5
