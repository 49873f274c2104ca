"""The preflight: what would go wrong in a long job, told before it starts."""

from __future__ import annotations

import dataclasses
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tyro
from rich.table import Table

from cluster.jobs import token
from cluster.probe import Facts, Request, probe
from cluster.shipping import FOLDERS
from cluster.verdicts import (
    ALWAYS,
    FURTHER,
    IMPORTS,
    WITH_MODELS,
    Finding,
    Needs,
    Node,
    Verdict,
    of_authentication,
    of_machine,
)
from engine import command, storage
from pipelines.flags import ModelFlags

_STYLE: Mapping[Verdict, str] = {"ok": "green", "warning": "yellow", "wrong": "bold red"}
_SAMPLED = 3
_ALL = "cluster"


@dataclass(frozen=True, kw_only=True)
class Check:
    """Tells what is wrong with a cluster, its machines and what a job needs.

    A small task looks at every machine of the cluster that RAY_ADDRESS names or that runs here
    (else at this machine). The exit code is 1 where something is wrong; warnings are 0.
    """

    dataset: str | None = None
    """Is it readable and writable from every machine, the same one, and free?"""
    src: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH")] = ()
    """Sources, as `curate.py --src` takes them: is each machine able to read them?"""
    recipe: str | None = None
    """Of pipelines/curate.py: are its models on every machine?"""
    models_like: Literal["mimir", "small", "tiny"] | None = None
    """As `curate.py --models`: whose models that recipe takes."""
    training: str | None = None
    """Recipe of `python -m trainers`: are its models on every machine?"""
    evaluation: str | None = None
    """Recipe of `python -m evals run`: are its weights on every machine?"""
    models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=WHERE")] = ()
    """Models to be evaluated, as `evals run --models` takes them."""
    weights: str | None = None
    """Folder with VBench's weights; by default $VBENCH_CACHE_DIR or ~/.cache/vbench."""
    gpus: int | None = None
    """So many GPUs are needed in all."""
    disk_gib: float = 10.0
    """Room that temporary folders and Ray's need (it spills to disk there)."""
    store_gib: float = 0.25
    """Room that Ray's object store needs; only numbers and file names pass through it."""
    timeout_s: float = 120.0
    """A machine that has not answered by then is wrong."""
    json: bool = False
    """One JSON object on standard output, and nothing else."""
    model: tyro.conf.OmitArgPrefixes[ModelFlags] = field(default_factory=ModelFlags)
    """Models in place of that recipe's own."""


def check(args: Check) -> int:
    """`python -m cluster check`; gives the exit code."""
    for name in ("disk_gib", "store_gib", "timeout_s"):
        if not getattr(args, name) > 0:
            command.fail(f"--{name.replace('_', '-')}: must be more than 0")
    if token() is not None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    found = list(_looked(args))
    wrong = sum(f.verdict == "wrong" for f in found)
    if args.json:
        rows = [dataclasses.asdict(f) for f in found]
        command.print_json({"wrong": wrong, "findings": rows})
    else:
        command.out.print(_table(found))
        warned = sum(f.verdict == "warning" for f in found)
        command.out.print(
            f"{wrong} wrong, {warned} warnings, {len(found) - wrong - warned} ok", highlight=False
        )
    return command.UNBALANCED if wrong else 0


def _looked(args: Check) -> Iterator[Finding]:
    """All that is found out, in the order in which it is shown."""
    from engine.session import connected

    with connected() as told:
        command.err.print(f"{told}: looking", highlight=False)
        nodes, dashboard = _nodes(), _dashboard()
        request, here, mark = _request(args, dashboard)
        yield from here
        mine = probe(_baseline())
        try:
            answers = _asked(nodes, request, args.timeout_s)
        finally:
            unclean = _removed(mark)
        yield from unclean
        yield from _of_cluster(args, request, nodes, answers, mine, dashboard)


def _of_cluster(
    args: Check,
    request: Request,
    nodes: Sequence[Node],
    answers: Mapping[str, tuple[Facts, float] | str],
    mine: Facts,
    dashboard: str | None,
) -> Iterator[Finding]:
    needs = Needs(
        disk_gib=args.disk_gib,
        store_gib=args.store_gib,
        distributions=(*ALWAYS, *(WITH_MODELS if _loads_models(args) else ())),
        dataset=request.mark is not None,
        sources=bool(request.sources),
        recipe=args.recipe,
        training=args.training,
        evaluation=args.evaluation,
        models=args.models,
    )
    for node in nodes:
        answer = answers[node.id]
        if isinstance(answer, str):
            yield Finding(
                check="tasks", machine=node.name, verdict="wrong", found=answer,
                todo="look at `ray status` and at that machine's logs; free it, or take it out",
            )  # fmt: skip
            continue
        facts, skew_s = answer
        yield from of_machine(node, facts, mine, skew_s, needs)
        if node.is_head:
            yield of_authentication(facts, dashboard, node.name)
    total = sum(node.gpus for node in nodes)
    if args.gpus is not None:
        yield Finding(
            check="GPUs", machine=_ALL, verdict="ok" if total >= args.gpus else "wrong",
            found=f"{total:g} in all, {args.gpus} needed",
            todo="" if total >= args.gpus else "start more GPU machines, or wait for them",
        )  # fmt: skip


def _loads_models(args: Check) -> bool:
    recipe = args.recipe not in (None, "classic")
    return recipe or bool(args.training or args.evaluation or args.models)


# what is asked


def _baseline() -> Request:
    """What this process says of itself, to compare with."""
    return Request(
        packages=FOLDERS,
        distributions=(*ALWAYS, *WITH_MODELS, *FURTHER),
        imports=(),
    )


def _request(args: Check, dashboard: str | None) -> tuple[Request, list[Finding], str | None]:
    """What machines are asked, what is wrong with the question itself, and the file it made."""
    found: list[Finding] = []
    changes: dict[str, Any] = {"imports": IMPORTS}
    if dashboard is not None:
        changes["dashboard"] = f"http://{dashboard}/api/jobs/"
    mark = None
    if args.dataset is not None:
        place, told = _place(command.destination(args.dataset))
        found += told
        if place is not None:
            name = f".reelwright-check-{uuid.uuid4().hex}"
            mark = storage.join(place, name)
            changes |= {
                "dataset": command.destination(args.dataset),
                "place": place,
                "mark": name,
            }
    if args.src:
        listed, told = _sources(args.src)
        found += told
        changes["sources"] = listed
    if args.recipe is not None:
        changes["recipe"] = _recipe(args)
    if args.training is not None:
        changes["training"] = args.training
    if args.evaluation is not None:
        changes |= _evaluation(args.evaluation, args.weights)
    request = dataclasses.replace(_baseline(), **changes, models=args.models)
    return request, found, mark


def _recipe(args: Check) -> bytes:
    from ray import cloudpickle

    from pipelines import cli

    return cast(
        bytes,
        cloudpickle.dumps(
            cli.recipe_with(args.recipe or "", args.model, models_like=args.models_like)
        ),
    )


def _evaluation(name: str, weights: str | None) -> dict[str, Any]:
    from engine.weights import tiny_folder
    from evals import cache
    from evals.recipes import recipe

    found = recipe(name)
    folder = str(cache.folder(weights))
    if found.is_tiny:  # the run makes them where they are missing
        made = Path(weights) if weights else tiny_folder() / "vbench"
        return {"dimensions": found.dimensions, "weights": str(made) if made.is_dir() else None}
    return {"dimensions": found.dimensions, "weights": folder}


def _sources(src: Sequence[str]) -> tuple[tuple[str, ...], list[Finding]]:
    """A few sources to be read everywhere, and what their list says."""
    from engine.sources import list_sources

    try:
        listing = list_sources(src)
    except ValueError as error:
        return (), [
            Finding(check="sources", machine="here", verdict="wrong", found=str(error),
                    todo="correct --src, or the rights to read it")
        ]  # fmt: skip
    there = [s.uri for s in listing.sources if s.error is None]
    bad = len(listing.sources) - len(there)
    found = f"{len(listing.sources)} sources, {listing.ignored} other files"
    verdict: Verdict = "ok" if there else "wrong"
    if bad and there:
        verdict, found = "warning", f"{found}, {bad} of which cannot be looked at"
    told = Finding(
        check="sources", machine="here", verdict=verdict, found=found,
        todo="" if verdict == "ok" else "name a folder, glob or manifest with media files",
    )  # fmt: skip
    step = max(1, (len(there) - 1) // max(1, _SAMPLED - 1))
    return tuple(there[::step][:_SAMPLED]), [told]


def _place(root: str) -> tuple[str | None, list[Finding]]:
    """Where a file is written to see whether the dataset can be, and what it is now."""
    place = root
    try:
        is_there = storage.kind(storage.join(root, "dataset.json")) is not None
        if not storage.is_remote(root):
            while storage.kind(place) is None and storage.parent(place) != place:
                place = storage.parent(place)
            if storage.kind(place) == "file":
                raise NotADirectoryError(f"{place} is a file")
        found = _state(root) if is_there else _to_be_made(root, place)
    except (OSError, ValueError) as error:
        found = Finding(
            check="dataset", machine="here", verdict="wrong",
            found=f"{root}: {command.first_words(error)}", todo="name another, or mend this one",
        )  # fmt: skip
        return None, [found]
    return place, [found]


def _to_be_made(root: str, place: str) -> Finding:
    names = storage.names_in(root) if place == root else []
    has = f"; the folder is there, with {len(names)} other things in it" if names else ""
    return Finding(
        check="dataset", machine="here", verdict="warning" if names else "ok",
        found=f"{root} is no dataset yet: a run makes it{has}",
        todo="name an empty folder, or check the spelling" if names else "",
    )  # fmt: skip


def _state(root: str) -> Finding:
    """A dataset that is there: rows, and who has it."""
    from engine.lease import holder
    from engine.tables import identity, read

    recipe = identity(root)["recipe"]
    counts = ", ".join(f"{read(root, t).count_rows():,} {t}" for t in ("sources", "clips"))
    owner = holder(root)
    return Finding(
        check="dataset", machine="here", verdict="warning" if owner else "ok",
        found=f"{root}: recipe {recipe}, {counts}" + (f"; {owner}" if owner else "; free"),
        todo="wait for that run, or stop it" if owner else "",
    )  # fmt: skip


# asking


def _nodes() -> list[Node]:
    """Living machines, the head first."""
    import ray

    alive = [n for n in ray.nodes() if n["Alive"]]
    names = [n["NodeManagerAddress"] for n in alive]
    found = []
    for node, address in zip(alive, names, strict=True):
        resources = node["Resources"]
        # several raylets of one machine differ by nothing else
        name = address if names.count(address) == 1 else f"{address} {node['NodeID'][:6]}"
        found.append(
            Node(
                id=node["NodeID"],
                name=name,
                is_head="node:__internal_head__" in resources,
                gpus=float(resources.get("GPU", 0)),
                store_bytes=int(resources.get("object_store_memory", 0)),
                folders=(str(Path(node["RayletSocketName"]).parent.parent),),
            )
        )
    return sorted(found, key=lambda n: (not n.is_head, n.name))


def _dashboard() -> str | None:
    """Host and port of Ray's HTTP server, as the head has published it; None where it has none."""
    from ray._private.worker import get_dashboard_url

    return get_dashboard_url() or None


def _asked(
    nodes: Sequence[Node], request: Request, timeout_s: float
) -> dict[str, tuple[Facts, float] | str]:
    """By node: what it said and how far its clock is off (s, at least), or why it said nothing."""
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    import cluster.probe

    cloudpickle.register_pickle_by_value(cluster.probe)

    def look(asked: Request) -> dict[str, Any]:
        return dataclasses.asdict(probe(asked))

    began = time.time()
    task = ray.remote(num_cpus=0, max_retries=0)(look)
    refs = {}
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
        asked = dataclasses.replace(
            request,
            folders=node.folders,
            gpus=node.gpus,
            dashboard=request.dashboard if node.is_head else None,
        )
        if request.place is not None and request.mark is not None and not refs:
            _leave_mark(storage.join(request.place, request.mark), request.mark)
        refs[task.options(scheduling_strategy=strategy).remote(asked)] = node
    found: dict[str, tuple[Facts, float] | str] = {}
    waiting = list(refs)
    until = time.monotonic() + timeout_s
    while waiting:
        ready, waiting = ray.wait(waiting, timeout=max(0.0, until - time.monotonic()))
        now = time.time()
        for ref in ready:
            try:
                facts = Facts(**ray.get(ref))
            except ray.exceptions.RayError as error:
                found[refs[ref].id] = f"a task there ends with {command.first_words(error)}"
            else:
                found[refs[ref].id] = facts, max(0.0, facts.clock - now, began - facts.clock)
        if not ready:
            break
    for ref in waiting:
        ray.cancel(ref, force=True)
        found[refs[ref].id] = f"no task has ended there within {timeout_s:g} s"
    return found


def _leave_mark(uri: str, text: str) -> None:
    try:
        storage.write_bytes(uri, text.encode())
    except OSError:
        return  # each machine says why it does not find it


def _removed(uri: str | None) -> list[Finding]:
    try:
        if uri is not None:
            storage.delete(uri)
    except OSError as error:
        return [
            Finding(check="dataset", machine="here", verdict="wrong",
                    found=f"{uri} cannot be removed: {command.first_words(error)}",
                    todo="allow to delete there: runs replace and remove files")
        ]  # fmt: skip
    return []


def _table(found: Sequence[Finding]) -> Table:
    table = Table(show_lines=False, expand=False)
    for name in ("check", "machine", "", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for one in found:
        table.add_row(
            one.check, one.machine, f"[{_STYLE[one.verdict]}]{one.verdict}[/]",
            _plain(one.found), _plain(one.todo),
        )  # fmt: skip
    return table


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
