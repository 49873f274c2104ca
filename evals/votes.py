"""Votes of a blind comparison: a Lance table that only grows, and the command that counts it.

    VOTES/rise.json      the study, fixed when it was first opened there
    VOTES/mimir.json
    VOTES/votes.lance    one row a vote

The key of a vote is made of study, item, question and voter, and rows come in by a merge that adds
what is missing: two tabs, a double click or a request sent again are one vote, the first. Nothing
changes or removes a vote.
"""

from __future__ import annotations

import datetime
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lance
import pyarrow as pa
import tyro

from engine import command, storage
from engine.schema import VOTES
from engine.tables import DatasetError, has_version, make_empty
from evals.study import DESIGNS, Name, Study, make_study, plain_code

COMPACT_AT = 64
"""Fragments, of one cast each, that the table may have before they become one."""
_KEPT_FOR = datetime.timedelta(hours=1)
"""Behind the newest version: longer than any merge takes that began on an older one."""
_RETRIES = 64
_ONE_AT_A_TIME = threading.Lock()  # within a server; between servers Lance settles it
_log = logging.getLogger(__name__)


class VoteNotStored(OSError):
    """A vote could not be written; nothing of it is in the table."""


@dataclass(frozen=True, kw_only=True)
class Votes:
    """Prints the tables of the papers' user studies, of votes that `cluster vote` stored."""

    votes: tyro.conf.Positional[str]
    """Folder that `--votes` named."""
    study: Literal["rise", "mimir"] | None = None
    """By default each that is there."""
    published: bool = False
    """With the numbers that the paper prints, marked as such."""
    format: Literal["terminal", "markdown", "latex", "csv", "json"] = "terminal"
    """Of what is printed."""


def votes(args: Votes) -> None:
    """`python -m evals votes`."""
    from evals import study_tables
    from evals.tally import tally

    path = command.destination(args.votes)
    found = studies(path)
    if not found:
        raise DatasetError(f"{path} holds no study: `python -m cluster vote --votes` makes one")
    if args.study and args.study not in found:
        raise DatasetError(f"{path} holds no study {args.study}, but {', '.join(found)}")
    shown = [found[args.study]] if args.study else list(found.values())
    tallies = [tally(study, read_votes(path, study)) for study in shown]
    if args.format == "terminal":
        for one in tallies:
            for made in study_tables.rich_tables(one, with_published=args.published):
                command.out.print(made)
        return
    text = study_tables.text(tallies, args.format, with_published=args.published)
    command.out.print(text, highlight=False, markup=False, soft_wrap=True, end="")


def studies(path: str) -> dict[Name, Study]:
    """The studies of a folder of votes, by name."""
    try:
        names = storage.names_in(path)
    except NotADirectoryError:
        raise DatasetError(f"{path} is a file: votes lie in a folder") from None
    return {name: _stored(path, name) for name in DESIGNS if f"{name}.json" in names}


def open_study(
    path: str,
    root: str,
    name: Name,
    *,
    models: Sequence[str] = (),
    reference: str | None = None,
    num_prompts: int | None = None,
    samples: int | None = None,
    seed: int | None = None,
) -> Study:
    """The study whose votes lie in a folder; it is made, and fixed there, when there is none.

    It stays as it was made: what is generated later, or by further models, is for another study,
    in another folder.

    Args:
        path: Folder of votes.
        root: Dataset with the evaluation.
        name: Which of the papers'.
        models: As for `make_study`; like what follows, given again it must be what it was.
        reference: As for `make_study`.
        num_prompts: As for `make_study`; counts only for a new study.
        samples: As for `make_study`; counts only for a new study.
        seed: As for `make_study`.

    Raises:
        DatasetError: No study can be made, or another one is there.
        OSError: The folder cannot be written to.
    """
    file = storage.join(path, f"{name}.json")
    if name not in studies(path):
        made = make_study(
            root,
            name,
            models=models,
            reference=reference,
            num_prompts=num_prompts,
            samples=samples,
            seed=seed or 0,
        )
        storage.make_folder(path)
        storage.put_if_absent(file, made.to_json().encode())
    found = _stored(path, name)
    asked = {
        "models": (tuple(sorted(models)), tuple(sorted(found.models))),
        "reference": (reference, found.reference),
        "seed": (seed, found.seed),
    }
    for what, (given, there) in asked.items():
        if given not in (None, (), there):
            said = ", ".join(there) if isinstance(there, tuple) else there
            raise DatasetError(
                f"{path} holds a {name} study whose {what} is {said}: leave the option out to go on"
                " with it, or give another folder of votes"
            )
    _table(path)
    return found


def _stored(path: str, name: Name) -> Study:
    file = storage.join(path, f"{name}.json")
    try:
        return Study.from_json(storage.read_bytes(file).decode())
    except ValueError as error:
        raise DatasetError(f"{file} cannot be read: {error}") from error


def _uri(path: str) -> str:
    return storage.join(path, "votes.lance")


def _table(path: str) -> lance.LanceDataset:
    """The table; an empty one where there is none, or one whose making broke off."""
    uri = _uri(path)
    make_empty(uri, VOTES)
    try:
        return lance.dataset(uri, storage_options=storage.lance_options(uri))
    except (ValueError, OSError) as error:
        said = str(error).splitlines()[0]
        raise DatasetError(f"{path}: its votes cannot be opened: {said}") from error


def read_votes(path: str, study: Study) -> pa.Table:
    """All votes of a study; the caller gets columns of `engine.schema.VOTES`."""
    if not has_version(_uri(path)):
        return VOTES.empty_table()
    return _table(path).to_table(filter=f"study = '{study.fingerprint}'")


def voted(path: str, study: Study, voter_id: str) -> set[str]:
    """item_ids on which a voter has answered every question."""
    rows = _table(path).to_table(
        columns=["item_id", "question"],
        filter=f"study = '{study.fingerprint}' AND voter_id = '{voter_id}'",
    )
    answered: dict[str, set[str]] = {}
    for row in rows.to_pylist():
        answered.setdefault(row["item_id"], set()).add(row["question"])
    asked = {question.key for question in study.design.questions}
    return {item_id for item_id, questions in answered.items() if questions >= asked}


def cast(
    path: str,
    study: Study,
    *,
    item_id: str,
    voter_id: str,
    chosen: Mapping[str, Sequence[str]],
    seconds: float | None = None,
) -> bool:
    """Stores what a voter answered about an item: all of it in one commit, or nothing.

    Args:
        path: Folder of votes.
        study: That the item is of.
        item_id: The item.
        voter_id: As `Study.voter_id` gives it.
        chosen: Models by key of the question, for every question.
        seconds: From the first sight of the item to this vote.

    Returns:
        Whether it counts: False where this voter's votes on the item were there already. Those
        stand.

    Raises:
        ValueError: A question has no answer, or one that the study does not allow.
        VoteNotStored: Nothing was written; the same call may be tried again.
    """
    rows = _rows(study, item_id, voter_id, chosen, seconds)
    try:
        with _ONE_AT_A_TIME:
            added = _merged(_table(path), rows)
    except (OSError, RuntimeError, DatasetError) as error:
        raise VoteNotStored(f"the vote was not stored: {command.first_words(error)}") from error
    _tidy(path)
    return added > 0


def _rows(
    study: Study,
    item_id: str,
    voter_id: str,
    chosen: Mapping[str, Sequence[str]],
    seconds: float | None,
) -> pa.Table:
    item, design = study.item(item_id), study.design
    shown = study.shown(voter_id, item)
    now = datetime.datetime.now(datetime.UTC)
    rows: list[dict[str, Any]] = []
    for question in design.questions:
        answer = set(chosen.get(question.key, ()))
        if not answer or not answer <= {*shown} or (len(answer) > 1 and not design.several):
            allowed = "one or more" if design.several else "exactly one"
            raise ValueError(f"{question.key}: choose {allowed} of the {len(shown)} videos")
        rows.append(
            {
                "vote_id": study.vote_id(item_id, question.key, voter_id),
                "study": study.fingerprint,
                "item_id": item_id,
                "prompt": item.prompt,
                "question": question.key,
                "voter_id": voter_id,
                "shown": shown,
                "chosen": [model for model in shown if model in answer],
                "seconds": seconds,
                "created_at": now,
            }
        )
    return pa.Table.from_pylist(rows, schema=VOTES)


def _merged(table: lance.LanceDataset, rows: pa.Table) -> int:
    """Adds the rows whose key is not there; gives their number.

    Lance compares keys with those of merges that land in between because the schema marks the key
    as primary: without that, two that race would both add theirs.
    """
    keys = ", ".join(f"'{key}'" for key in rows["vote_id"].to_pylist())
    if table.count_rows(filter=f"vote_id IN ({keys})") == rows.num_rows:
        return 0  # a merge that adds nothing would make a version all the same
    merge = table.merge_insert("vote_id").when_not_matched_insert_all()
    merge = merge.conflict_retries(_RETRIES).retry_timeout(datetime.timedelta(seconds=60))
    return merge.execute(rows)["num_inserted_rows"]


def _tidy(path: str) -> None:
    """Keeps the table fast; what fails here costs no vote, and is tried again by the next one."""
    try:
        table = _table(path)
        if len(table.get_fragments()) < COMPACT_AT:
            return
        table.optimize.compact_files()
        table.cleanup_old_versions(older_than=_KEPT_FOR, error_if_tagged_old_versions=False)
    except (OSError, RuntimeError, DatasetError) as error:
        _log.info("votes were not compacted: %s", command.first_words(error))


def voters_of(file: str) -> frozenset[str]:
    """The codes that a file allows, one a line, as they count.

    Raises:
        ValueError: A line is no code, or there is none.
        OSError: It cannot be read.
    """
    codes = set()
    for number, line in enumerate(storage.read_bytes(file).decode().splitlines(), start=1):
        if line.strip():
            try:
                codes.add(plain_code(line))
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from None
    if not codes:
        raise ValueError(f"{file} holds no code: write one a line")
    return frozenset(codes)
