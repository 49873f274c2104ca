"""Suites of prompts against VBench's own counts, and the names of their videos."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from evals.dimensions import DIMENSIONS, VBENCH
from evals.names import MANIFESTS, file_name, match, parse
from evals.suites import CATEGORIES, Prompt, Suite, categories, custom, standard

PROMPTS = Path(__file__).parents[1].parent / "shared" / "prompts" / "vbench"
NUM_PROMPTS = {
    **dict.fromkeys(("subject_consistency", "motion_smoothness", "dynamic_degree"), 72),
    **dict.fromkeys(("background_consistency", "scene"), 86),
    **dict.fromkeys(("overall_consistency", "aesthetic_quality", "imaging_quality"), 93),
    "temporal_flickering": 75,
    "object_class": 79,
    "multiple_objects": 82,
    "color": 85,
    "human_action": 100,
    "spatial_relationship": 84,
    "temporal_style": 100,
    "appearance_style": 90,
}
TWICE = (
    "A beautiful coastal beach in spring, waves lapping on sand by Hokusai, in the style of Ukiyo",
    "The bund Shanghai, oil painting",
)
FREE = ("aesthetic_quality", "motion_smoothness", "text_alignment")

needs_vbench = pytest.mark.skipif(
    importlib.util.find_spec("vbench") is None, reason="needs the package vbench"
)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A copy of VBench's folder of prompts, to be changed at will."""
    if not PROMPTS.is_dir():
        pytest.skip("VBench's folder of prompts is not here")
    return shutil.copytree(PROMPTS, tmp_path / "prompts")


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def long_form(folder: Path, file: str, prompt: str) -> str:
    short = (folder / f"{file}.txt").read_text(encoding="utf-8").splitlines()
    longer = folder.with_name(f"{folder.name}_longer") / f"{file}_longer.txt"
    return longer.read_text(encoding="utf-8").splitlines()[short.index(prompt)]


def small(*prompts: str, samples: int = 2) -> Suite:
    return Suite(
        name="small",
        source="a test",
        prompts=tuple(
            Prompt(prompt=p, text=p, dimensions=("imaging_quality",), samples=samples)
            for p in prompts
        ),
    )


@needs_vbench
def test_the_standard_suite_is_the_index_of_the_package() -> None:
    suite = standard()
    assert len(suite.prompts) == 946
    assert len({p.prompt for p in suite.prompts}) == 944
    assert Counter(d for p in suite.prompts for d in p.dimensions) == NUM_PROMPTS
    assert suite.dimensions == VBENCH
    assert suite.num_videos == 4730
    assert len(list(suite.videos())) == 944 * 5
    assert suite.prompts[0].prompt == "In a still frame, a stop sign"
    assert suite.prompts[-1].prompt == "a surfboard on the bottom of skis, front view"
    version = importlib.metadata.version("vbench")
    assert suite.source.startswith(f"vbench {version} VBench_full_info.json sha256:")


@needs_vbench
def test_an_entry_has_the_chosen_dimensions_alone_and_what_they_are_told() -> None:
    suite = standard(dimensions=["imaging_quality", "scene"], samples=3)
    assert len(suite.prompts) == 93 + 86
    assert {p.dimensions for p in suite.prompts} == {("imaging_quality",), ("scene",)}
    alley = next(p for p in suite.prompts if p.prompt == "alley")
    assert alley.auxiliary == {"scene": {"scene": {"scene": "alley"}}}
    assert suite.num_videos == (93 + 86) * 3
    without = standard(dimensions=["background_consistency"])
    assert all(p.auxiliary == {} for p in without.prompts)


@needs_vbench
def test_text_alignment_is_of_the_prompts_of_overall_consistency() -> None:
    both = standard(dimensions=["overall_consistency", "text_alignment"])
    assert {p.dimensions for p in both.prompts} == {("overall_consistency", "text_alignment")}
    assert len(both.prompts) == 93


@needs_vbench
def test_flickering_has_its_own_samples_where_the_filter_is_asked_for() -> None:
    suite = standard(flickering_samples=25)
    assert suite.num_videos == 6230
    filtered = [p for p in suite.prompts if p.samples == 25]
    assert {p.dimensions for p in filtered} == {("temporal_flickering", "static")}
    assert len(filtered) == 75
    assert len(list(suite.expected("static"))) == 75 * 25
    with pytest.raises(ValueError, match="25 samples are asked for temporal_flickering, which is"):
        standard(dimensions=["color"], flickering_samples=25)


@needs_vbench
def test_a_prompt_of_two_entries_is_made_once_and_counts_twice() -> None:
    suite = standard(samples=2)
    for prompt in TWICE:
        entries = [p for p in suite.prompts if p.prompt == prompt]
        assert [p.dimensions[0] for p in entries] == ["appearance_style", "overall_consistency"]
        assert [s for p, s in suite.videos() if p.prompt == prompt] == [0, 1]
    expected = [(p.prompt, s) for p, s in suite.expected("overall_consistency")]
    index = [p.prompt for p in suite.prompts if "overall_consistency" in p.dimensions]
    assert expected == [(prompt, sample) for prompt in index for sample in range(2)]


@needs_vbench
def test_a_long_form_is_that_of_the_line(prompts: Path) -> None:
    suite = standard(enhanced=str(prompts))
    assert len(suite.prompts) == 946
    for file, dimension in (
        ("subject_consistency", "dynamic_degree"),
        ("scene", "background_consistency"),
        ("overall_consistency", "imaging_quality"),
        ("color", "color"),
    ):
        longer = prompts / "prompts_per_dimension_longer" / f"{file}_longer.txt"
        lines = longer.read_text(encoding="utf-8").splitlines()
        own = [p for p in suite.prompts if dimension in p.dimensions]
        assert len(own) == len(lines)
        twice = [p.prompt in TWICE for p in own]
        assert [p.text for p, t in zip(own, twice, strict=True) if not t] == [
            line for line, t in zip(lines, twice, strict=True) if not t
        ]
    assert [p.prompt for p in suite.prompts] == [p.prompt for p in standard().prompts]
    assert suite.digest != standard().digest
    for prompt in TWICE:  # of two long forms the first entry's: there is one video
        first = long_form(prompts / "prompts_per_dimension", "appearance_style", prompt)
        assert first != long_form(prompts / "prompts_per_dimension", "overall_consistency", prompt)
        assert {p.text for p in suite.prompts if p.prompt == prompt} == {first}


@needs_vbench
def test_long_forms_that_do_not_fit_are_refused(prompts: Path) -> None:
    short = prompts / "prompts_per_dimension" / "color.txt"
    longer = prompts / "prompts_per_dimension_longer" / "color_longer.txt"
    lines = longer.read_text(encoding="utf-8").splitlines()
    said = "color_longer.txt: has 84 lines, and .*color.txt 85: from line 85 on"
    write(longer, *lines[:-1])
    with pytest.raises(ValueError, match=said):
        standard(dimensions=["color"], enhanced=str(prompts))
    standard(dimensions=["scene"], enhanced=str(prompts))  # needs other files
    write(longer, *lines[:6], "", *lines[7:])
    with pytest.raises(ValueError, match=r"color_longer.txt, line 7: is empty"):
        standard(dimensions=["color"], enhanced=str(prompts))
    write(longer, *lines)
    known = short.read_text(encoding="utf-8").splitlines()
    write(short, "a mauve bicycle", *known[1:])
    with pytest.raises(ValueError, match=rf"color_longer.txt: has no long form of '{known[0]}'"):
        standard(dimensions=["color"], enhanced=str(prompts))
    with pytest.raises(ValueError, match=r"color.txt: cannot be read \(No such file"):
        standard(dimensions=["color"], enhanced=str(prompts / "none"))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="not installed: run `pip install --no-deps vbench"):
        standard()


def test_categories_are_eight_hundred_prompts(prompts: Path) -> None:
    suite = categories(str(prompts), dimensions=FREE)
    assert suite.categories == CATEGORIES
    assert Counter(c for p in suite.prompts for c in p.categories) == dict.fromkeys(CATEGORIES, 100)
    assert len(suite.prompts) == len({p.prompt for p in suite.prompts}) == 798
    assert {p.prompt: p.categories for p in suite.prompts if len(p.categories) > 1} == {
        "video of a indoor green plant": ("lifestyle", "plant"),
        "a highway built across an agricultural area in the countryside": ("scenery", "vehicles"),
    }
    assert {p.dimensions for p in suite.prompts} == {FREE}
    for category in CATEGORIES:
        assert len(list(suite.expected("motion_smoothness", category))) == 500
    assert len(list(suite.expected("motion_smoothness"))) == suite.num_videos == 798 * 5


def test_of_the_long_forms_of_two_categories_the_first_counts(prompts: Path) -> None:
    suite = categories(str(prompts), dimensions=FREE, enhanced=True)
    folder = prompts / "prompts_per_category"
    for entry in suite.prompts:
        texts = [long_form(folder, category, entry.prompt) for category in entry.categories]
        assert entry.text == texts[0]
        assert len({*texts}) == len(texts)


def test_some_categories_come_in_their_own_order(prompts: Path) -> None:
    suite = categories(
        str(prompts), dimensions=FREE, names=["plant", "food"], samples=1, enhanced=True
    )
    assert suite.categories == ("food", "plant")
    assert suite.num_videos == 200
    for category, start in (("food", 0), ("plant", 100)):
        file = prompts / "prompts_per_category_longer" / f"{category}_longer.txt"
        lines = file.read_text(encoding="utf-8").splitlines()
        assert [p.text for p in suite.prompts[start : start + 100]] == lines
    with pytest.raises(ValueError, match=r"no category plants: VBench has animal, architecture"):
        categories(str(prompts), dimensions=FREE, names=["plants"])
    (prompts / "prompts_per_category" / "food.txt").unlink()
    with pytest.raises(ValueError, match=r"food.txt: cannot be read"):
        categories(str(prompts), dimensions=FREE)


def test_prompts_of_ones_own(tmp_path: Path) -> None:
    text = write(tmp_path / "mine.txt", "a dog", "", "  a cat ", "père & fils / dusk")
    suite = custom(text, dimensions=FREE, samples=2)
    assert (suite.name, suite.num_videos) == ("mine", 6)
    assert [p.prompt for p in suite.prompts] == ["a dog", "a cat", "père & fils / dusk"]
    assert all(p.text == p.prompt and p.dimensions == FREE for p in suite.prompts)
    rows = [
        {"prompt": "a dog", "text": "A brown dog runs.", "category": ["animal", "outdoor"]},
        {"prompt": "a cat", "category": "animal"},
        {"prompt": "a cup", "text": None},
    ]
    lines = write(tmp_path / "rows.jsonl", *map(json.dumps, rows))
    table = write(
        tmp_path / "rows.csv", "prompt,category,text", 'a dog,animal,"brown, runs"', "a cup,,"
    )
    found = custom(lines, dimensions=FREE, name="own")
    assert found.name == "own"
    assert [(p.text, p.categories) for p in found.prompts] == [
        ("A brown dog runs.", ("animal", "outdoor")),
        ("a cat", ("animal",)),
        ("a cup", ()),
    ]
    assert [(p.prompt, p.text, p.categories) for p in custom(table, dimensions=FREE).prompts] == [
        ("a dog", "brown, runs", ("animal",)),
        ("a cup", "a cup", ()),
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"\n \n", r"a.txt: has no prompts"),
        ("a.txt", b"a dog\na cat\n a dog\n", r"a.txt, line 3: is the prompt of .*line 1 again"),
        ("a.txt", b"a dog\n\xff\n", r"a.txt, line 2: needs UTF-8 text, found the byte 0xff"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt"\n', r"a.jsonl, line 2: is not JSON"),
        ("a.jsonl", b'["a dog"]\n', r"a.jsonl, line 1: needs an object such as"),
        ("a.jsonl", b'{"prompt": 3}\n', r"line 1: prompt must be text, found 3"),
        ("a.jsonl", b'{"prompt": "a", "category": [" "]}', r"line 1: category must be text"),
        ("a.jsonl", b'{"prompt": "\\ud800"}', r"line 1: prompt must be text"),
        ("a.csv", b"text\na dog\n", r"a.csv, line 2: has no prompt"),
        ("a.csv", b"prompt,catgory\na dog,x\n", r"line 2: has a column 'catgory', and it may have"),
        ("a.csv", b"prompt\na dog, brown\n", r"line 2: needs at most 1 values, found 2"),
    ],
)
def test_a_file_that_is_no_list_of_prompts_is_refused(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        custom(str(tmp_path / name), dimensions=FREE)
    assert "\n" not in str(caught.value)


def test_dimensions_that_need_the_index_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a dog")
    with pytest.raises(ValueError, match="color, scene: measured for VBench's standard prompts"):
        custom(path, dimensions=["color", "imaging_quality", "scene"])
    with pytest.raises(ValueError, match=r"no dimension imaging \(did you mean imaging_quality\?"):
        custom(path, dimensions=["imaging"])
    with pytest.raises(ValueError, match="no dimension is asked for"):
        custom(path, dimensions=[])


def test_a_suite_is_the_same_after_json() -> None:
    suite = Suite(
        name="one",
        source="a test",
        prompts=(
            Prompt(
                prompt="a red “car”",
                text="long",
                dimensions=("color", "object_class"),
                auxiliary={"color": {"color": "red"}, "object_class": {"object": ["car", 1, None]}},
                categories=("a", "b"),
                samples=3,
            ),
        ),
    )
    assert Suite.from_json(suite.to_json()) == suite
    assert Suite.from_json(suite.to_json()).digest == suite.digest
    broken = json.loads(suite.to_json())
    del broken["prompts"][0]["samples"]
    with pytest.raises(ValueError, match="not the JSON of a suite"):
        Suite.from_json(json.dumps(broken))


@needs_vbench
def test_the_standard_suite_is_the_same_after_json() -> None:
    assert Suite.from_json(standard().to_json()) == standard()


def test_a_digest_is_of_what_is_asked() -> None:
    suite = small("a", "b")
    assert dataclasses.replace(suite, name="other", source="else").digest == suite.digest
    assert small("b", "a").digest != suite.digest
    assert small("a", "b", samples=3).digest != suite.digest
    assert small("a").digest != suite.digest


def test_parts_of_a_suite() -> None:
    suite = small(*map(str, range(10)))
    assert [p.prompt for p in suite.limited(3).prompts] == ["0", "1", "2"]
    assert suite.limited(10) == suite.limited(11) == suite
    assert [p.prompt for p in suite.spread(4).prompts] == ["0", "2", "5", "7"]
    assert suite.spread(4).name == "small (4 of 10)"
    assert suite.spread(10) == suite
    with pytest.raises(ValueError, match="11 prompts are asked of the suite small, which has 10"):
        suite.spread(11)
    with pytest.raises(ValueError, match="1 or more, not 0"):
        suite.limited(0)


def test_what_is_no_suite_is_refused() -> None:
    with pytest.raises(ValueError, match="the suite small has no prompts"):
        small()
    with pytest.raises(ValueError, match="'a': needs 1 sample or more, not 0"):
        small("a", samples=0)
    one = small("a").prompts[0]
    with pytest.raises(ValueError, match="'a' is in the suite two with two texts"):
        Suite(name="two", source="", prompts=(one, dataclasses.replace(one, text="long")))


@needs_vbench
def test_all_prompts_of_vbench_are_names_as_they_are() -> None:
    for entry in standard().prompts:
        for sample in (0, 24):
            assert file_name(entry.prompt, sample) == f"{entry.prompt}-{sample}.mp4"
            assert parse(f"{entry.prompt}-{sample}.mp4") == (entry.prompt, sample)


def test_all_prompts_of_the_categories_are_names_as_they_are(prompts: Path) -> None:
    for entry in categories(str(prompts), dimensions=FREE).prompts:
        assert file_name(entry.prompt, 4) == f"{entry.prompt}-4.mp4"


@pytest.mark.parametrize(
    "prompt", ["an A/B test", "..", "two\nlines", "nul\0", "ü" * 200, "x" * 300, "back\\slash"]
)
def test_a_prompt_that_is_no_name_gets_one_of_its_own(tmp_path: Path, prompt: str) -> None:
    name = file_name(prompt, 1234)
    (tmp_path / name).touch()
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert len(name.encode()) <= 255 and not name.startswith(".")
    assert parse(name)[1] == 1234
    assert file_name(prompt + "!", 1234) != name
    assert match([name], small(prompt, samples=1235)).found == {(prompt, 1234): name}


def test_names_are_read_as_vbench_reads_them() -> None:
    assert parse("a dog-3.mp4") == ("a dog", 3)
    assert parse("videos/one-two-10.MP4") == ("one-two", 10)
    assert parse("a dog.mp4") == ("a dog", None)
    assert parse("a dog v1.5-0.gif") == ("a dog v1.5", 0)


def test_a_folder_is_matched_to_a_suite() -> None:
    names = ["a dog-0.mp4", "a cat-1.MP4", "a cat-0.webm", "README", ".DS_Store", "._a dog-1.mp4"]
    found = match(names, small("a dog", "a cat"))
    assert found.found == {
        ("a dog", 0): "a dog-0.mp4",
        ("a cat", 0): "a cat-0.webm",
        ("a cat", 1): "a cat-1.MP4",
    }
    assert list(found.found) == [("a dog", 0), ("a cat", 0), ("a cat", 1)]
    assert found.missing == [("a dog", 1)]
    assert found.unknown == dict.fromkeys(("README", ".DS_Store", "._a dog-1.mp4"), "is no video")
    assert found.lines()[-1] == "no video of 'a dog': expected a dog-1.mp4"


def test_names_that_fit_nothing_say_what_was_expected() -> None:
    names = ["a dgo-0.mp4", "a dog-0.mp4", "a dog-0.webm", "a dog-7.mp4", "zzz.mp4"]
    found = match(names, small("a dog"))
    assert found.unknown == {
        "a dgo-0.mp4": "is of no prompt of the suite; the nearest is 'a dog', whose first is"
        " a dog-0.mp4",
        "a dog-0.webm": "is of the same prompt and sample as a dog-0.mp4",
        "a dog-7.mp4": "is sample 7 of a prompt of which the suite asks for 2, from 0",
        "zzz.mp4": "is of no prompt of the suite; names are PROMPT-0.mp4",
    }
    assert f"a dgo-0.mp4: {found.unknown['a dgo-0.mp4']}" in found.lines()


def test_prompts_that_differ_in_case_share_no_file() -> None:
    suite = small("A fantasy landscape", "a fantasy landscape", samples=1)
    upper, lower = ("A fantasy landscape", 0), ("a fantasy landscape", 0)
    both = match(["a fantasy landscape-0.mp4", "A fantasy landscape-0.mp4"], suite)
    assert both.found == {key: f"{key[0]}-0.mp4" for key in (upper, lower)}
    assert both.lines() == []
    one = match(["A fantasy landscape-0.mp4"], suite)
    assert (one.found, one.missing) == ({upper: "A fantasy landscape-0.mp4"}, [lower])
    assert "A fantasy landscape-0.mp4 took its place" in one.notes[0]
    neither = match(["A FANTASY landscape-0.mp4"], suite)
    assert neither.found == {}
    assert "can be of 'A fantasy landscape' and 'a fantasy landscape'" in neither.lines()[0]
    suffix = match(["a fantasy landscape-0.MP4", "A fantasy landscape-0.MP4"], suite)
    assert suffix.found == {key: f"{key[0]}-0.MP4" for key in (upper, lower)}


def test_names_are_known_in_another_form_of_unicode() -> None:
    found = match(["FAC\u0327ADES-0.mp4"], small("fa\u00e7ades", samples=1))
    assert found.found == {("fa\u00e7ades", 0): "FAC\u0327ADES-0.mp4"}
    assert found.notes == ["FAC\u0327ADES-0.mp4: taken for fa\u00e7ades-0.mp4"]


def test_a_manifest_names_the_files(tmp_path: Path) -> None:
    manifest = write(
        tmp_path / MANIFESTS[0],
        "file,prompt,sample,seed",
        "0001.mp4,a dog,1,77",
        "sub/0002.mp4,a dog,0,",
        "0003.mp4,a cat,,5",
        "0004.mp4,a cat,,6",
        "0005.mp4,a cow,,",
        "gone.mp4,a sow,0,",
    )
    names = ["0001.mp4", "sub/0002.mp4", *(f"000{n}.mp4" for n in (3, 4, 5, 6)), "prompts.csv"]
    found = match(names, small("a dog", "a cat"), manifest)
    assert found.found == {
        ("a dog", 0): "sub/0002.mp4",
        ("a dog", 1): "0001.mp4",
        ("a cat", 0): "0003.mp4",
        ("a cat", 1): "0004.mp4",
    }
    assert found.seeds == {("a dog", 1): 77, ("a cat", 0): 5, ("a cat", 1): 6}
    assert found.missing == []
    assert found.unknown["0006.mp4"] == "is not named in prompts.csv"
    assert found.unknown["0005.mp4"].startswith("is of no prompt of the suite; the nearest is 'a")
    assert found.notes == [f"{manifest}, line 7: there is no file gone.mp4"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (['{"file": "a.mp4"}'], r"line 1: has no prompt"),
        (['{"file": "a.mp4", "prompt": "a", "sample": -1}'], r"line 1: sample must be a whole"),
        (['{"file": "a.mp4", "prompt": "a", "seed": true}'], r"line 1: seed must be a whole"),
        (['{"file": "a.mp4", "prompt": "a"}'] * 2, r"line 2: names a.mp4, which .*line 1 names"),
        (
            [f'{{"file": "{f}.mp4", "prompt": "a", "sample": 0}}' for f in "ab"],
            r"line 2: is sample 0 of the same prompt as .*line 1",
        ),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, rows: list[str], said: str) -> None:
    manifest = write(tmp_path / "prompts.jsonl", *rows)
    with pytest.raises(ValueError, match=said):
        match(["a.mp4"], small("a"), manifest)


def test_every_dimension_of_vbench_has_prompts() -> None:
    assert {*NUM_PROMPTS} == {*VBENCH} < {*DIMENSIONS}
