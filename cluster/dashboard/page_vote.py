"""Vote: anonymised videos of one prompt, and the questions of a paper's user study.

What names a model stays in this process: the browser gets letters, and videos without metadata
under addresses that are hashes of their bytes (so they are the same for every voter, and tell
nothing). Errors go to the server's log, for they may name models and paths.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import pyarrow as pa
import streamlit as st

from cluster.dashboard import look, markup
from cluster.dashboard.places import Places
from engine.integrity import VideoError
from engine.operator import Failed
from engine.tables import DatasetError
from evals import blind
from evals import votes as ballots
from evals.study import Design, Item, Study, plain_code

_log = logging.getLogger(__name__)
_MAX_IN_A_ROW = 4
_STYLE = """
<style>
  .block-container {max-width: 1320px; padding-top: 1.6rem; padding-bottom: 2rem;}
  [data-testid="stVideo"] {width: 100%; height: auto; max-height: 46vh; object-fit: contain;
    background: rgba(127, 127, 127, .12); border-radius: .4rem;}
  .letter {font-weight: 650; font-size: 1.05rem; letter-spacing: .02em;}
  .prompt {font-size: 1.15rem; line-height: 1.5; border-left: 3px solid #3d7dca;
    padding: .1rem 0 .1rem .9rem; margin: .1rem 0 .4rem; overflow-wrap: anywhere;}
  .asked {font-size: .95rem; line-height: 1.45;}
  .asked b {display: block; margin-bottom: .1rem;}
  .asked span {opacity: .8;}
  [data-testid="stButtonGroup"] button {min-width: 3rem; min-height: 2.5rem;}
  [data-testid="stButtonGroup"] button:is([aria-pressed="true"], [aria-checked="true"]) {
    background: #3d7dca !important; color: #fff !important;}
  button:focus-visible {outline: 3px solid #3d7dca; outline-offset: 2px;}
  @media (max-width: 640px) {
    [data-testid="stVideo"] {max-height: 38vh;}
    .st-key-questions [data-testid="stHorizontalBlock"] {gap: .3rem;}
    [data-testid="stButton"] kbd {display: none;}
  }
</style>
"""
_TO_THE_TOP = "<script>document.querySelector('[data-testid=\"stMain\"]').scrollTo(0, 0)</script>"
_CLOSED = "Voting is not possible just now. Please tell who invited you, and try again later."


def show(places: Places) -> None:
    """The page."""
    try:
        study, shown = _opened(places)
        # read at every step: whoever was taken out of it votes no more
        allowed = ballots.voters_of(places.voters) if places.voters else None
    except (DatasetError, ValueError, OSError, pa.ArrowException) as error:
        _begin("A blind comparison of videos.")
        closed(places, error)
        return
    _begin(study.design.task)
    code = _code(allowed)
    if code is None:
        return
    voter = study.voter_id(code)
    try:
        done = _done(places, study, voter)
    except (DatasetError, OSError, pa.ArrowException) as error:
        closed(places, error)
        return
    items = [item for item in study.ordered(voter) if item.item_id in shown]
    skipped: set[str] = st.session_state.setdefault("skipped", set())
    left = [item for item in items if item.item_id not in done | skipped]
    num_done = sum(item.item_id in done for item in items)
    if left:
        _ask(places, study, voter, left[0], num_done, len(items))
    else:
        _end(num_done, len(items))
    _who(code)


def _begin(about: str) -> None:
    look.begin("Which video is better?", about)
    st.html(_STYLE)


def closed(places: Places, error: Exception) -> None:
    """In place of the page: the reason where the other pages are shown too, else in the log."""
    _log.warning("the vote page cannot be shown: %s", error)
    said = _CLOSED if places.only_vote else look.verbatim(error)
    st.error(said, icon=":material/block:")


def open_study(places: Places) -> Study:
    """The study that is voted on, made where there is none.

    Raises:
        DatasetError: No study can be made, or another one is there.
        OSError: The folder of votes cannot be written to.
    """
    assert places.votes
    return ballots.open_study(
        places.votes,
        places.evaluations,
        places.study,
        models=places.models,
        reference=places.reference,
        num_prompts=places.num_prompts,
        samples=places.samples,
    )


# anew now and then: somebody may have removed the folder, and votes need their study beside them
@st.cache_resource(ttl=60, max_entries=4, show_spinner=False)
def _opened(places: Places) -> tuple[Study, frozenset[str]]:
    """The study, and ids of the items whose videos are all there."""
    study = open_study(places)
    there = blind.stored(places.evaluations)
    shown = [item.item_id for item in study.items if there.issuperset(item.videos.values())]
    if not shown:
        raise DatasetError(f"{places.evaluations} has none of the study's videos any more")
    return study, frozenset(shown)


def _code(allowed: frozenset[str] | None) -> str | None:
    """The voter's code, of the address or typed; None while there is none that counts."""
    given = st.query_params.get("voter", "")
    try:
        if given and (allowed is None or plain_code(given) in allowed):
            return plain_code(given)
        wrong = "This code is not known here." if given else ""
    except ValueError as error:
        wrong = f"Not this one: {error}."
    with st.form("code", width=460):
        st.markdown("**Your code**  \nIt keeps your place, and counts each of your votes once.")
        typed = st.text_input("Your code", max_chars=64, label_visibility="collapsed")
        is_sent = st.form_submit_button("Begin", type="primary")
    if wrong:
        st.error(wrong, icon=":material/block:")
    if is_sent and typed.strip():
        st.query_params["voter"] = typed.strip()
        st.rerun()
    return None


def _done(places: Places, study: Study, voter: str) -> set[str]:
    """Items that this voter has voted on: read once a session, and after each vote."""
    key = f"done-{voter}"
    if key not in st.session_state:
        assert places.votes
        st.session_state[key] = ballots.voted(places.votes, study, voter)
    return st.session_state[key]


def _ask(
    places: Places, study: Study, voter: str, item: Item, num_done: int, num_items: int
) -> None:
    models = study.shown(voter, item)
    try:
        videos = [_video(places.evaluations, item.videos[model]) for model in models]
    except (DatasetError, VideoError, Failed, OSError, pa.ArrowException) as error:
        _log.warning("item %s cannot be shown and is left out: %s", item.item_id, error)
        st.session_state["skipped"].add(item.item_id)
        st.rerun()
    st.progress(num_done / num_items, f"**{num_done + 1}** of {num_items}")
    _notice()
    st.html(f'<div class="prompt">{markup.text(item.prompt)}</div>')
    letters = [_letter(place) for place in range(len(models))]
    _play(letters, videos)
    answers = _questions(study.design, item, letters)
    lacking = sum(not answer for answer in answers.values())
    seen = st.session_state.setdefault(f"seen-{voter}-{item.item_id}", time.monotonic())
    st.button(
        "Submit" if not lacking else f"Submit ({lacking} to answer)",
        key=f"submit-{item.item_id}",
        type="primary",
        width="stretch",
        disabled=lacking > 0,
        shortcut="Ctrl+Enter",
        on_click=_submit,
        args=(places, study, voter, item, answers, dict(zip(letters, models, strict=True)), seen),
    )
    # the same text again would not run again
    st.html(f"{_TO_THE_TOP}<!-- {item.item_id} -->", unsafe_allow_javascript=True)


@st.cache_resource(max_entries=48, show_spinner=False)
def _video(root: str, generation_id: str) -> blind.Blinded:
    (found,) = blind.fetch(root, [generation_id])
    return blind.blinded(found)


def _play(letters: list[str], videos: list[blind.Blinded]) -> None:
    """Side by side and equally high, all at once, without sound, again and again."""
    ratio = min(video.aspect_ratio for video in videos)
    st.html(f'<style>[data-testid="stVideo"] {{aspect-ratio: {ratio:.3f};}}</style>')
    num_rows = -(-len(videos) // _MAX_IN_A_ROW)
    in_a_row = -(-len(videos) // num_rows)
    for start in range(0, len(videos), in_a_row):
        columns = st.columns(in_a_row, gap="small")
        row = slice(start, start + in_a_row)
        for column, letter, video in zip(columns, letters[row], videos[row], strict=False):
            with column:
                st.html(f'<div class="letter">{letter}</div>')
                st.video(video.mp4, loop=True, autoplay=True, muted=True, alt=f"Video {letter}")


def _questions(design: Design, item: Item, letters: list[str]) -> dict[str, list[str]]:
    """Letters by question, as far as they are chosen."""
    answers = {}
    with st.container(border=True, key="questions"):
        for question in design.questions:
            about, choice = st.columns([2, 1], gap="medium", vertical_alignment="center")
            about.html(
                f'<div class="asked"><b>{markup.text(question.title)}</b>'
                f"<span>{markup.text(question.text)}</span></div>"
            )
            key = f"{question.key}-{item.item_id}"
            with choice:
                label = f"{question.title}: {'one or more' if design.several else 'one'}"
                mode: Any = "multi" if design.several else "single"
                chosen = st.pills(
                    label, letters, selection_mode=mode, key=key, label_visibility="collapsed"
                )
            answers[question.key] = chosen if isinstance(chosen, list) else [chosen] * bool(chosen)
    return answers


def _submit(
    places: Places,
    study: Study,
    voter: str,
    item: Item,
    answers: dict[str, list[str]],
    models: dict[str, str],
    seen: float,
) -> None:
    """Stores what was answered; runs before the page is drawn again."""
    assert places.votes
    chosen = {key: [models[letter] for letter in letters] for key, letters in answers.items()}
    try:
        counts = ballots.cast(
            places.votes,
            study,
            item_id=item.item_id,
            voter_id=voter,
            chosen=chosen,
            seconds=time.monotonic() - seen,
        )
    except (ballots.VoteNotStored, ValueError) as error:
        _log.warning("a vote was not stored: %s", error)
        st.session_state["notice"] = (
            "Your vote could not be stored. Your answers are still marked: please press Submit"
            " again in a moment."
        )
        return
    st.session_state.pop(f"done-{voter}", None)  # another tab may have gone on meanwhile
    if not counts:
        st.session_state["notice"] = "You had voted on those videos before: that vote stands."


def _notice() -> None:
    """What the last vote came to, where it is not simply stored; said once."""
    if said := st.session_state.pop("notice", None):
        st.warning(said, icon=":material/info:")


def _end(num_done: int, num_items: int) -> None:
    _notice()
    st.progress(1.0, f"**{num_done}** of {num_items}")
    if num_done == num_items:
        st.success(f"You have voted on all {num_items}. Thank you!", icon=":material/check_circle:")
    else:
        st.info(
            f"You have voted on all that can be shown ({num_done} of {num_items}). Thank you!",
            icon=":material/check_circle:",
        )


def _who(code: str) -> None:
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.caption(f"Voting as {look.verbatim(code)}", width="content")
        if st.button("Not you?", type="tertiary"):
            st.query_params.clear()
            st.rerun()


def _letter(place: int) -> str:
    return chr(ord("A") + place) if place < 26 else f"A{_letter(place - 26)}"
