"""Blind comparisons: which videos are compared, how votes are kept, and what tables say of them."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import av
import lance
import numpy as np
import pytest
from clips import colourful, encode
from scipy import stats
from studies import PROMPTS, make_evaluation

from engine.schema import VOTES
from engine.tables import DatasetError
from evals import blind, study_tables
from evals import votes as ballots
from evals.study import DESIGNS, PUBLISHED, Item, Name, Study, make_study, plain_code
from evals.tally import interval, sign_test, tally, wilson

MODELS = ("zebrafinch", "quokka", "narwhal")
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three models; one lacks a prompt."""
    root = tmp_path_factory.mktemp("evaluation") / "set"
    return make_evaluation(root, MODELS, samples=2, lacking={"narwhal": [PROMPTS[2]]})


def made(name: Name, num_prompts: int = 6, models: Sequence[str] = ("a", "b", "c")) -> Study:
    """A study of videos that nobody looks at."""
    groups = [models] if name == "rise" else list(itertools.combinations(models, 2))
    items = tuple(
        Item(
            item_id=f"{number}-{'-'.join(group)}",
            prompt=f"prompt {number}",
            sample=0,
            videos={model: f"{model}{number}" for model in group},
        )
        for number in range(num_prompts)
        for group in groups
    )
    return Study(
        name=name, models=tuple(models), reference=None, seed=0, items=items, fingerprint="made"
    )


def vote(path: Path, study: Study, voter: str, item: Item, *chosen: str) -> bool:
    """The same answer to each question."""
    answers = {question.key: chosen for question in study.design.questions}
    voter_id = study.voter_id(voter)
    return ballots.cast(
        str(path), study, item_id=item.item_id, voter_id=voter_id, chosen=answers, seconds=1.5
    )


# What is compared


def test_the_questions_are_those_that_the_papers_print() -> None:
    seeds = REPOSITORY.parent / "shared" / "seeds"
    if not seeds.is_dir():
        pytest.skip("the papers are not here")
    papers = {"rise": "001_1bd9d65938f4eeff.txt", "mimir": "003_ca8bbc573404596a.txt"}
    for name, design in DESIGNS.items():
        text = (seeds / papers[name]).read_text()
        text = " ".join(text.replace("-\n", "").split())
        assert len(design.questions) == 3
        for question in design.questions:
            assert question.text in text and question.title in text
        rows = PUBLISHED[name]
        for printed in rows.values() if name == "rise" else zip(*rows.values(), strict=True):
            assert printed and all(f"{number}%" in text for number in printed)


def test_how_the_papers_form_their_percentages() -> None:
    # RISE: of 300 results, so each is a count of 300; the paper cuts 158 / 300 off at 52.66
    for number in itertools.chain(*PUBLISHED["rise"].values()):
        assert abs(float(number) * 3 - round(float(number) * 3)) < 0.03
    # Mimir: each of six models is in 5 of 15 pairs that have one winner each
    for printed in zip(*PUBLISHED["mimir"].values(), strict=True):
        assert sum(map(float, printed)) == pytest.approx(300)


def test_rise_shows_all_models_and_mimir_every_pair(evaluation: str) -> None:
    rise = make_study(evaluation, "rise")
    assert {(item.prompt, item.sample) for item in rise.items} == {
        (prompt, sample) for prompt in PROMPTS[:2] for sample in (0, 1)
    }
    assert all(tuple(item.videos) == MODELS for item in rise.items)
    mimir = make_study(evaluation, "mimir")
    assert len(mimir.items) == 2 * (3 + 3 + 1)  # narwhal is in no pair of the last prompt
    of_one = make_study(evaluation, "mimir", reference="quokka", samples=1)
    assert len(of_one.items) == 2 + 2 + 1
    assert all("quokka" in item.videos for item in of_one.items)
    drawn = make_study(evaluation, "mimir", num_prompts=1, samples=1, seed=3)
    assert len({item.prompt for item in drawn.items}) == 1
    prints = {one.fingerprint for one in (rise, mimir, of_one, drawn)}
    assert len(prints) == 4
    assert make_study(evaluation, "rise").fingerprint == rise.fingerprint


def test_ids_say_nothing_and_a_study_comes_back_from_its_file(evaluation: str) -> None:
    study = make_study(evaluation, "mimir")
    ids = [item.item_id for item in study.items]
    assert len(set(ids)) == len(ids)
    assert not any(word in one for one in ids for word in (*MODELS, *PROMPTS))
    assert Study.from_json(study.to_json()) == study
    with pytest.raises(ValueError, match="no study"):
        Study.from_json("{}")


def test_orders_are_random_and_stay_a_voters_own() -> None:
    study = made("rise", 40)
    ann, bob = study.voter_id("ann"), study.voter_id("bob")
    assert study.ordered(ann) == study.ordered(ann) != study.ordered(bob)
    assert sorted(i.item_id for i in study.ordered(ann)) == sorted(i.item_id for i in study.items)
    first = [study.shown(study.voter_id(str(v)), i)[0] for v in range(30) for i in study.items]
    counts = [first.count(model) for model in study.models]
    assert stats.chisquare(counts).pvalue > 1e-3, "each model is first as often"
    assert dataclasses.replace(study, seed=1).ordered(ann) != study.ordered(ann)


def test_a_code_counts_however_it_is_typed() -> None:
    study = made("rise")
    assert study.voter_id(" Ann ") == study.voter_id("ANN") != study.voter_id("Anna")
    assert "ann" not in study.voter_id("ann")
    for bad in ("", "  ", "a" * 65, "a\tb"):
        with pytest.raises(ValueError, match="a code has"):
            plain_code(bad)


def test_what_cannot_be_compared_is_a_line(evaluation: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no dataset"):
        make_study(str(tmp_path), "rise")
    with pytest.raises(DatasetError, match="needs two"):
        make_study(evaluation, "rise", models=["quokka"])
    with pytest.raises(DatasetError, match="is none of"):
        make_study(evaluation, "mimir", reference="yeti")
    with pytest.raises(DatasetError, match="mimir only"):
        make_study(evaluation, "rise", reference="quokka")
    root = make_evaluation(tmp_path / "set", "ab", lacking={"a": PROMPTS[:2], "b": PROMPTS[2:]})
    with pytest.raises(DatasetError, match="no prompt has a video by all of a, b"):
        make_study(root, "rise")


# The videos


def test_a_blinded_video_has_the_same_frames_and_no_words(evaluation: str) -> None:
    study = make_study(evaluation, "rise")
    (given,) = blind.fetch(evaluation, [study.items[0].videos["quokka"]])
    assert b"quokka" in given and b"x264" in given
    found = blind.blinded(given)
    for word in (b"quokka", b"x264", b"Lavf", b"Lavc"):
        assert word not in found.mp4
    assert found.aspect_ratio == pytest.approx(64 / 48)
    assert np.array_equal(frames(found.mp4), frames(given))


@pytest.mark.parametrize(
    "name, options",
    [
        ("a.mp4", {"codec": "mpeg4"}),
        ("a.webm", {"codec": "libvpx-vp9"}),
        ("a.mp4", {"codec": "libx264", "pix_fmt": "yuv444p"}),
    ],
)
def test_what_no_browser_plays_becomes_h264(tmp_path: Path, name: str, options: dict) -> None:
    given = encode(tmp_path / name, [colourful(48, 64, i) for i in range(5)], fps=8, **options)
    found = blind.blinded(given.read_bytes()).mp4
    with av.open(io.BytesIO(found)) as opened:
        context = opened.streams.video[0].codec_context
        assert (context.codec.canonical_name, context.pix_fmt) == ("h264", "yuv420p")
    assert b"x264" not in found
    off = frames(found).astype(float) - frames(given.read_bytes())
    assert off.shape[0] == 5 and np.abs(off).mean() < 2


def frames(mp4: bytes) -> np.ndarray:
    with av.open(io.BytesIO(mp4)) as opened:
        return np.stack([f.to_ndarray(format="gray") for f in opened.decode(video=0)])


def test_a_video_that_is_gone_is_named(evaluation: str) -> None:
    with pytest.raises(DatasetError, match="no video gone any more"):
        blind.fetch(evaluation, ["gone"])


# The votes


def test_a_study_stays_as_it_was_first_opened(evaluation: str, tmp_path: Path) -> None:
    path = str(tmp_path / "votes")
    first = ballots.open_study(path, evaluation, "rise", models=["quokka", "zebrafinch"])
    assert ballots.open_study(path, evaluation, "rise") == first
    assert ballots.open_study(path, "/nowhere", "rise", models=["zebrafinch", "quokka"]) == first
    with pytest.raises(DatasetError, match="study whose models is quokka, zebrafinch"):
        ballots.open_study(path, evaluation, "rise", models=["quokka", "narwhal"])
    ballots.open_study(path, evaluation, "mimir", reference="quokka")
    with pytest.raises(DatasetError, match="study whose reference is quokka"):
        ballots.open_study(path, evaluation, "mimir", reference="narwhal")
    assert set(ballots.studies(path)) == {"rise", "mimir"}


def test_a_vote_is_stored_whole_and_the_first_one_stands(evaluation: str, tmp_path: Path) -> None:
    study = ballots.open_study(str(tmp_path), evaluation, "rise")
    item, other = study.items[:2]
    assert vote(tmp_path, study, "ann", item, "quokka", "narwhal")
    assert not vote(tmp_path, study, "Ann", item, "zebrafinch")
    assert vote(tmp_path, study, "ann", other, "zebrafinch")
    assert vote(tmp_path, study, "bob", item, "zebrafinch")
    rows = ballots.read_votes(str(tmp_path), study).to_pylist()
    assert len(rows) == 9
    ann = [r for r in rows if r["voter_id"] == study.voter_id("ann")]
    of_item = [r for r in ann if r["item_id"] == item.item_id]
    assert {r["question"] for r in of_item} == {q.key for q in study.design.questions}
    for row in of_item:
        assert set(row["chosen"]) == {"quokka", "narwhal"} and row["prompt"] == item.prompt
        assert row["shown"] == study.shown(study.voter_id("ann"), item)
        assert row["seconds"] == 1.5 and row["created_at"]
    assert ballots.voted(str(tmp_path), study, study.voter_id("ann")) == {
        item.item_id,
        other.item_id,
    }
    assert ballots.voted(str(tmp_path), study, study.voter_id("eve")) == set()


def test_an_answer_that_the_study_does_not_allow_is_refused(tmp_path: Path) -> None:
    rise, mimir = made("rise"), made("mimir")
    item = mimir.items[0]
    for chosen in ((), ("a", "b"), ("c",)):
        with pytest.raises(ValueError, match="choose exactly one of the 2 videos"):
            vote(tmp_path, mimir, "ann", item, *chosen)
    with pytest.raises(ValueError, match="choose one or more of the 3"):
        vote(tmp_path, rise, "ann", rise.items[0], "yeti")
    with pytest.raises(ValueError, match="temporal_quality: choose"):
        ballots.cast(
            str(tmp_path),
            rise,
            item_id=rise.items[0].item_id,
            voter_id="v",
            chosen={"aesthetic_quality": ["a"]},
        )
    assert not (tmp_path / "votes.lance").exists()


_PROCESS = """
import resource, sys
from evals import votes
from evals.study import Study
path, me = sys.argv[1:]
study = votes.studies(path)["rise"]

def vote(item, chosen):
    answers = {question.key: [chosen] for question in study.design.questions}
    voter = study.voter_id("ann")
    return votes.cast(path, study, item_id=item.item_id, voter_id=voter, chosen=answers)

"""
_RACER = f"""{_PROCESS}
votes.COMPACT_AT = 3
print("ready", flush=True)
sys.stdin.readline()
print(*(item.item_id for item in study.items if vote(item, me)))
"""
_FULL = f"""{_PROCESS}
assert vote(study.items[0], "a")
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
try:
    vote(study.items[1], "a")
except votes.VoteNotStored as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(vote(study.items[1], "b"))
"""


def process(code: str, path: Path, me: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path), me],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_of_racing_tabs_one_vote_counts(tmp_path: Path) -> None:
    """Three processes, each casting the same 10 votes at once, with compactions among them."""
    study = made("rise", 10)
    (tmp_path / "rise.json").write_text(study.to_json())
    racers = [process(_RACER, tmp_path, me) for me in "abc"]
    for racer in racers:
        assert racer.stdout and racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin
        racer.stdin.write("go\n")
        racer.stdin.flush()
    said = {me: racer.communicate(timeout=120)[0] for me, racer in zip("abc", racers, strict=True)}
    assert all(racer.returncode == 0 for racer in racers)
    rows = ballots.read_votes(str(tmp_path), study).to_pylist()
    assert len(rows) == len({r["vote_id"] for r in rows}) == 10 * 3
    winners = {r["item_id"]: set() for r in rows}
    for row in rows:
        winners[row["item_id"]] |= set(row["chosen"])
    assert all(len(found) == 1 for found in winners.values()), "a vote is of one tab, whole"
    told = {item: me for me, items in said.items() for item in items.split()}
    assert {item: {me} for item, me in told.items()} == winners, "who won was told so"


def test_a_table_that_several_servers_make_at_once_is_made_once(tmp_path: Path) -> None:
    """A second making would be a version that overwrites the first, and its votes."""
    study, many = made("rise", 1), 4
    with ThreadPoolExecutor(many) as pool:
        for number in range(12):
            path = tmp_path / str(number)
            ready = Barrier(many)

            def opened(_: int, path: Path = path, ready: Barrier = ready) -> set[str]:
                ready.wait()
                return ballots.voted(str(path), study, "a")

            assert list(pool.map(opened, range(many))) == [set()] * many
            assert lance.dataset(str(path / "votes.lance")).version == 1


def test_votes_leave_few_fragments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ballots, "COMPACT_AT", 8)
    study = made("rise", 30)
    for item in study.items:
        assert vote(tmp_path, study, "ann", item, "a")
    table = lance.dataset(str(tmp_path / "votes.lance"))
    assert len(table.get_fragments()) < 8
    assert table.count_rows() == 90
    assert not any(vote(tmp_path, study, "ann", item, "b") for item in study.items[:5])


def test_a_disk_that_takes_no_more_is_told_and_the_vote_can_be_given_again(tmp_path: Path) -> None:
    study = made("rise")
    (tmp_path / "rise.json").write_text(study.to_json())
    told, again = process(_FULL, tmp_path).communicate(timeout=60)[0].splitlines()
    assert told.startswith("the vote was not stored: ") and again == "True"
    rows = ballots.read_votes(str(tmp_path), study).to_pylist()
    second = study.items[1].item_id
    assert {tuple(r["chosen"]) for r in rows if r["item_id"] == second} == {("b",)}
    assert len(rows) == 6


def test_half_made_tables(tmp_path: Path) -> None:
    study = made("rise")
    (tmp_path / "votes.lance" / "data").mkdir(parents=True)  # a first server was killed here
    (tmp_path / "votes.lance" / "data" / "orphan.lance").write_bytes(b"half")
    assert ballots.read_votes(str(tmp_path), study).num_rows == 0
    assert vote(tmp_path, study, "ann", study.items[0], "a")
    (newest,) = sorted((tmp_path / "votes.lance" / "_versions").glob("*.manifest"))[:1]
    newest.write_bytes(newest.read_bytes()[:20])
    with pytest.raises(DatasetError, match="votes cannot be opened"):
        ballots.read_votes(str(tmp_path), study)
    with pytest.raises(ballots.VoteNotStored, match="cannot be opened"):
        vote(tmp_path, study, "ann", study.items[1], "a")


def test_votes_lie_in_an_object_store_as_well(
    bucket: object, evaluation: str, tmp_path: Path
) -> None:
    path = f"{bucket.uri}/votes"
    study = ballots.open_study(path, evaluation, "mimir")
    item = study.items[0]
    answers = {q.key: [next(iter(item.videos))] for q in study.design.questions}
    voter = study.voter_id("ann")
    cast = {"item_id": item.item_id, "voter_id": voter, "chosen": answers}
    assert ballots.cast(path, study, **cast)
    assert not ballots.cast(path, study, **cast)
    assert ballots.voted(path, study, voter) == {item.item_id}
    assert ballots.studies(path) == {"mimir": study}


def test_the_file_of_voters(tmp_path: Path) -> None:
    file = tmp_path / "voters.txt"
    file.write_text("Ann\n\n  bob \n")
    assert ballots.voters_of(str(file)) == {"ann", "bob"}
    file.write_text("ann\n" + "b" * 65)
    with pytest.raises(ValueError, match="line 2: a code has"):
        ballots.voters_of(str(file))
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no code"):
        ballots.voters_of(str(file))


# The tables


def test_wilsons_interval_is_the_textbooks() -> None:
    for hits, count in ((3, 10), (0, 12), (12, 12), (61, 300)):
        known = stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
        z = stats.norm.ppf(0.975)
        assert wilson(hits / count, count, z) == pytest.approx((known.low, known.high))


def test_votes_that_hang_together_count_as_fewer() -> None:
    """Two ways to have 40 of 80: with the voters of one mind the answer is that of 8 votes."""
    voters, prompts = ([str(n) for n in index.ravel()] for index in np.indices((8, 10)))
    one_mind = np.repeat([1, 1, 1, 1, 0, 0, 0, 0], 10).astype(float)
    variance = 8 / 7 * sum((10 * 0.5) ** 2 for _ in range(8)) / 80**2
    t = stats.t.ppf(0.975, 7)
    assert interval(one_mind, voters, prompts) == pytest.approx(wilson(0.5, 0.25 / variance, t))
    mixed = np.fromfunction(lambda v, p: (v + p) % 2, (8, 10)).ravel()
    assert interval(mixed, voters, prompts) == pytest.approx(wilson(0.5, 80, t))


def test_intervals_where_little_is_known() -> None:
    voters, prompts = list("aabb"), list("xyxy")
    low, high = interval(np.ones(4), voters, prompts)
    t = stats.t.ppf(0.975, 1)
    assert (low, high) == pytest.approx(wilson(1.0, 2, t)) and high == 1
    assert interval(np.ones(2), list("aa"), list("xy")) == (None, None)
    assert interval(np.ones(2), list("ab"), list("xx")) == (None, None)


@pytest.mark.parametrize("voters, prompts, spread", [(4, 12, 1.0), (10, 20, 1.0), (10, 20, 0.0)])
def test_intervals_hold_the_truth_as_often_as_they_say(
    voters: int, prompts: int, spread: float
) -> None:
    rng = np.random.default_rng(0)
    index = np.indices((voters, prompts))
    names = [[str(n) for n in one.ravel()] for one in index]
    held = 0
    for _ in range(150):
        by_voter, by_prompt = rng.normal(0, spread, voters), rng.normal(0, spread, prompts)
        chance = 1 / (1 + np.exp(-(by_voter[:, None] + by_prompt)))
        low, high = interval((rng.random(chance.shape) < chance).astype(float).ravel(), *names)
        held += low <= 0.5 <= high
    assert held >= 0.92 * 150


def test_the_sign_test_is_the_binomials() -> None:
    assert sign_test(5, 0) == pytest.approx(2 / 2**5)
    assert sign_test(1, 3) == pytest.approx((1 + 4) * 2 / 2**4)
    assert sign_test(4, 4) == 1
    assert sign_test(0, 0) is None


def filled(tmp_path: Path, name: Name, answers: dict[str, list[tuple[str, ...]]]) -> Study:
    """A study with votes: by voter the choices on the first items."""
    study = made(name)
    (tmp_path / f"{name}.json").write_text(study.to_json())
    for voter, choices in answers.items():
        for item, chosen in zip(study.items, choices, strict=False):
            assert vote(tmp_path, study, voter, item, *chosen)
    return study


def test_rises_shares_count_results_and_may_sum_to_more(tmp_path: Path) -> None:
    study = filled(
        tmp_path,
        "rise",
        {"ann": [("a",), ("a", "b"), ("a", "b", "c"), ("c",)], "bob": [("a",), ("a",)]},
    )
    found = tally(study, ballots.read_votes(str(tmp_path), study))
    shares = found.shares["temporal_quality"]
    assert {m: (s.chosen, s.of) for m, s in shares.items()} == {
        "a": (5, 6),
        "b": (2, 6),
        "c": (2, 6),
    }
    assert sum(s.value for s in shares.values()) == pytest.approx(9 / 6)
    assert (found.num_voters, found.num_finished, found.num_results) == (2, 0, 6)
    assert (found.num_items, found.num_prompts, found.num_votes) == (4, 4, 18)
    assert found.is_thin and found.pairs == ()
    (grid,) = study_tables.grids(found)
    assert grid.caption.startswith("TOO FEW VOTES")
    assert [head.text for head in grid.heads] == ["Aesthetic", "Temporal", "Text"]
    rows = {label.text: entries for label, entries in zip(grid.names, grid.entries, strict=True)}
    assert [e.number for e in rows["a"]] == ["83.33%"] * 3 and rows["a"][0].place == "best"
    assert [e.number for e in rows["b"]] == ["33.33%"] * 3 and rows["b"][0].place == "second"
    assert rows["c"][0].place == "second", "equal numbers share the place"


def test_mimirs_shares_count_comparisons_and_pairs_are_tested(tmp_path: Path) -> None:
    """Items come as ab, ac, bc of each prompt: a always wins, b wins against c but for once."""
    wins = [("a",), ("a",), ("b",)] * 6
    lost = [*wins[:2], ("c",), *wins[3:]]
    study = filled(tmp_path, "mimir", {"ann": wins, "bob": wins, "eve": lost})
    found = tally(study, ballots.read_votes(str(tmp_path), study))
    shares = found.shares["visual_quality"]
    assert {m: (s.chosen, s.of) for m, s in shares.items()} == {
        "a": (36, 36), "b": (17, 36), "c": (1, 36),
    }  # fmt: skip
    assert sum(s.value for s in shares.values()) == pytest.approx(1.5)
    assert found.num_finished == found.num_voters == 3
    pair = {(p.a, p.b): p for p in found.pairs if p.question == "visual_quality"}
    bc = pair["b", "c"]
    assert (bc.share.chosen, bc.share.of, bc.prompts_a, bc.prompts_b) == (17, 18, 6, 0)
    assert bc.p == pytest.approx(2 / 2**6)
    assert bc.p_adjusted == pytest.approx(9 * 2 / 2**6), "nine tests, all as strong"
    assert bc.p_votes == pytest.approx(2 * (1 + 18) / 2**18)
    paper, pairs = study_tables.grids(found)
    assert [label.text for label in paper.names] == [
        "Instruction Following", "Physics Simulation", "Visual Quality",
    ]  # fmt: skip
    assert [head.text for head in paper.heads] == ["a", "b", "c"]
    assert [e.number for e in paper.entries[0]] == ["100.00%", "47.22%", "2.78%"]
    assert len(pairs.names) == 9


def test_votes_of_another_study_are_left_aside(tmp_path: Path) -> None:
    study = filled(tmp_path, "rise", {"ann": [("a",)]})
    other = dataclasses.replace(study, fingerprint="other")
    assert vote(tmp_path, other, "bob", other.items[0], "b")
    everything = lance.dataset(str(tmp_path / "votes.lance")).to_table()
    assert everything.num_rows == 6 and everything.schema.equals(VOTES)
    assert tally(study, everything).num_voters == 1


def command(capsys: pytest.CaptureFixture[str], path: Path, **given: object) -> str:
    ballots.votes(ballots.Votes(votes=str(path), **given))
    return capsys.readouterr().out


def test_the_command_in_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path, "rise", {v: [("a",), ("b",), ("a", "c")] for v in ("ann", "bob")})
    filled(tmp_path, "mimir", {"ann": [("a",)]})
    told = command(capsys, tmp_path, published=True)
    for word in ("RISE-AnimateDiff†", "52.66%", "Mimir†", "89.65%", "66.67%", "TOO FEW VOTES"):
        assert word in told
    assert "Mimir†" not in command(capsys, tmp_path, study="rise", published=True)
    markdown = command(capsys, tmp_path, format="markdown")
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert "| **66.67%** " in markdown and len(lines) == 5 + 5 + 5
    latex = command(capsys, tmp_path, format="latex", published=True)
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{table}") == 3
    assert r"54.00\%" in latex
    rows = list(
        csv.DictReader(io.StringIO(command(capsys, tmp_path, format="csv", published=True)))
    )
    of_a = [r for r in rows if (r["study"], r["model"]) == ("rise", "a")]
    assert [float(r["share"]) for r in of_a] == pytest.approx([2 / 3] * 3)
    assert sum(bool(r["published"]) for r in rows) == 3 * (4 + 6)
    rise, mimir = json.loads(command(capsys, tmp_path, format="json"))
    assert (rise["study"], rise["num_voters"], rise["num_votes"]) == ("rise", 2, 18)
    assert mimir["num_results"] == 1 and mimir["too_few"] and len(mimir["rows"]) == 9 + 3


def test_a_folder_without_votes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DatasetError, match="holds no study"):
        command(capsys, tmp_path / "nowhere")
    filled(tmp_path, "rise", {})
    assert "No vote yet, on 6 items" in command(capsys, tmp_path)
    with pytest.raises(DatasetError, match="no study mimir, but rise"):
        command(capsys, tmp_path, study="mimir")
    (tmp_path / "rise.json").write_text("{")
    with pytest.raises(DatasetError, match="cannot be read"):
        command(capsys, tmp_path)
    with pytest.raises(DatasetError, match="is a file"):
        command(capsys, tmp_path / "rise.json")


def test_small_random_models_are_called_meaningless(tmp_path: Path) -> None:
    study = dataclasses.replace(made("rise"), tiny=("a", "c"))
    assert vote(tmp_path, study, "ann", study.items[0], "a")
    (grid,) = study_tables.grids(tally(study, ballots.read_votes(str(tmp_path), study)))
    assert "MEANINGLESS: small random models made the videos of a, c." in grid.caption
