"""The dashboard's pages: what Streamlit runs, with its `Places` as JSON on the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import duckdb
import pyarrow as pa
import streamlit as st

from cluster.dashboard import (
    lance_sql,
    look,
    page_clips,
    page_evaluation,
    page_funnel,
    page_pairs,
    page_runs,
    page_thresholds,
    page_training,
    page_vote,
)
from cluster.dashboard.places import Places
from engine.tables import DatasetError

PAGES = (
    ("Funnel", "filter_alt", page_funnel.show),
    ("Clips", "movie", page_clips.show),
    ("Thresholds", "tune", page_thresholds.show),
    ("Pairs", "compare_arrows", page_pairs.show),
    ("Training", "show_chart", page_training.show),
    ("Evaluation", "leaderboard", page_evaluation.show),
    ("Runs", "history", page_runs.show),
)
VOTE = ("Vote", "how_to_vote", page_vote.show)


def _guarded(show: Callable[[Places], None], places: Places) -> Callable[[], None]:
    """A page that says what is wrong with a dataset in a line, in place of a stack trace."""

    def page() -> None:
        try:
            with lance_sql.snapshot():
                show(places)
        except (DatasetError, OSError, pa.ArrowException, duckdb.Error) as error:
            if places.only_vote:  # nor are voters told what they vote on
                page_vote.closed(places, error)
                return
            st.error(look.verbatim(str(error).splitlines()[0]), icon=":material/error:")
            st.caption("Nothing was changed. Reload the page when it is mended.")

    return page


def main() -> None:
    """Shows the page that the address names."""
    places = Places.from_json(sys.argv[1])
    st.set_page_config(page_title="Reelwright", page_icon=":material/movie:", layout="wide")
    shown = [] if places.only_vote else list(PAGES)
    if places.votes:
        shown.append(VOTE)
    pages = [
        st.Page(
            _guarded(show, places), title=title, icon=f":material/{icon}:", url_path=title.lower()
        )
        for title, icon, show in shown
    ]
    # Streamlit's default page has no address of its own: nobody stays on this one
    start = st.Page(
        lambda: st.switch_page(pages[0], query_params=st.query_params.to_dict()),
        title="Start",
        default=True,
        visibility="hidden",
    )
    chosen = st.navigation([start, *pages], position="hidden" if len(pages) == 1 else "sidebar")
    if not places.only_vote:
        with st.sidebar:
            st.caption(f"dataset  \n`{places.dataset}`")
            if places.evaluations != places.dataset:
                st.caption(f"evaluations  \n`{places.evaluations}`")
    chosen.run()


if __name__ == "__main__":
    main()
