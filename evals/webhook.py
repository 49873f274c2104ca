"""Posts a night's report to a webhook: words that a chat shows, and the numbers for programs.

The address is a secret: it is never printed, logged or stored.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

from engine import storage
from evals.report import Report, lost, sentence

VARIABLE = "EVALS_WEBHOOK"
"""Environment variable with the address; a command line is seen by everyone on the machine."""
ATTEMPTS = 3
TIMEOUT_S = 10.0
_BACKOFF_S = 1.0
_MOST = 20
"""Lines of a message."""
_log = logging.getLogger(__name__)


def address(given: str | None) -> str | None:
    """Where to post to: as given, else as the environment says.

    Raises:
        ValueError: It is no http(s) address.
    """
    import httpx

    found = given or os.environ.get(VARIABLE) or None
    if found is None:
        return None
    try:
        url = httpx.URL(found)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        where = "--webhook" if given else VARIABLE
        raise ValueError(f"{where}: an address that begins with https:// is needed")
    return found


def told(report: Report) -> dict[str, Any]:
    """What is posted: names and numbers of models, and neither prompts nor paths.

    `text` is what Slack, Mattermost and their like show.
    """
    worse = report.regressions
    head = f"Nightly evaluation {report.date}, {report.recipe}: {report.status}"
    if report.is_tiny:
        head += " (MEANINGLESS: small random weights)"
    lines = [sentence(c) for c in worse]
    lines += [lost(one, with_reason=False) for one in report.losses]  # an error may name a path
    lines += [f"{m.name}: unchanged since {m.unchanged_since}" for m in report.models
              if m.unchanged_since]  # fmt: skip
    if len(lines) > _MOST:
        lines = [*lines[:_MOST], f"and {len(lines) - _MOST:,} more"]
    return {
        "text": "\n".join([head, *(f"• {line}" for line in lines)]),
        "status": "regressed" if report.has_regressed else "passed",
        "date": report.date,
        "recipe": report.recipe,
        "suite": report.suite,
        "num_prompts": report.num_prompts,
        "models": [
            {
                "name": m.name,
                "checkpoint": m.checkpoint if m.kind != "served" else None,  # may be an address
                "run_id": m.run_id,
                "unchanged_since": m.unchanged_since,
            }
            for m in report.models
        ],
        "regressions": [
            {
                "model": c.model,
                "dimension": c.dimension,
                "against": c.against,
                "nights": list(c.nights),
                "new": c.difference.a,
                "old": c.difference.b,
                "difference": c.difference.mean,
                "low": c.difference.low,
                "high": c.difference.high,
                "p": c.difference.p_adjusted,
                "num_prompts": c.difference.num_prompts,
            }
            for c in worse
        ],
        "lost": [
            {"model": x.model, "dimension": x.dimension, "num_lost": x.num_lost,
             "num_expected": x.num_expected, "night": x.night}
            for x in report.losses
        ],
        "num_untold": len(report.untold),
    }  # fmt: skip


def failed(date: str, recipe: str, error: BaseException) -> dict[str, Any]:
    """What is posted where a night could not be done; its log says why."""
    kind = type(error).__name__
    why = f"could not be done ({kind}): see its log"
    if isinstance(error, KeyboardInterrupt):  # by a deadline, most of all
        why = "was stopped: the same command goes on with it"
    return {
        "text": f"Nightly evaluation {date}, {recipe}: {why}",
        "status": "failed",
        "date": date,
        "recipe": recipe,
    }


def post_once(url: str, report: Report, root: str) -> None:
    """Posts a report, unless it is noted below the dataset's root that this was done.

    The note comes last: a night whose message a death or a silent chat kept back is posted by the
    next call that asks for it.
    """
    runs = ",".join(sorted({model.run_id for model in report.models}))
    note = storage.join(root, "posted", hashlib.sha256(runs.encode()).hexdigest()[:16])
    if storage.kind(note) is None and post(url, told(report)):
        storage.write_bytes(note, b"")


def post(url: str, body: Mapping[str, Any]) -> bool:
    """Posts, a few times where that may help; a failure is a warning, without the address."""
    import httpx

    logging.getLogger("httpx").setLevel(logging.WARNING)  # at INFO it logs addresses
    why = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(_BACKOFF_S * 2 ** (attempt - 1))
        try:
            # what is answered is not read: TIMEOUT_S holds for a read, of which there may be many
            with httpx.stream("POST", url, json=body, timeout=TIMEOUT_S) as answer:
                status = answer.status_code
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            why = type(error).__name__
            continue
        if status < 300:
            return True
        why = f"HTTP {status}"
        if status not in (408, 425, 429) and status < 500:
            break
    _log.warning("the webhook was not reached (%s): the report is complete without it", why)
    return False
