"""What machines say of themselves, judged: pure functions from facts to findings."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.probe import Facts
from cluster.shipping import FOLDERS

Verdict = Literal["ok", "warning", "wrong"]
ALWAYS = ("ray", "pylance", "pyarrow", "numpy", "av", "onnxruntime", "pillow", "scenedetect")
"""Distributions that every machine needs; cv2 comes from several, and is imported instead."""
WITH_MODELS = ("torch", "transformers")
"""Those that whoever loads a model needs, too."""
FURTHER = ("torchvision", "open-clip-torch", "diffusers", "rapidocr", "opencv-python", "s3fs")
IMPORTS = ("cv2", "av", "lance", "onnxruntime")
SKEW_S = 30.0
_GIB = 2**30
_FETCH = "put them on this machine as said, or on storage that all share"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at, on one machine."""

    check: str
    machine: str
    verdict: Verdict
    found: str
    todo: str = ""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine as Ray knows it."""

    id: str
    name: str
    is_head: bool
    gpus: float
    store_bytes: int
    folders: tuple[str, ...]
    """Ray's own on it."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a job needs of each machine."""

    disk_gib: float
    store_gib: float
    distributions: tuple[str, ...] = ALWAYS
    dataset: bool = False
    sources: bool = False
    recipe: str | None = None
    training: str | None = None
    evaluation: str | None = None
    models: tuple[str, ...] = ()


def of_machine(
    node: Node, facts: Facts, mine: Facts, skew_s: float, needs: Needs
) -> Iterator[Finding]:
    """What a machine's facts mean.

    Args:
        node: The machine as Ray knows it.
        facts: What it said.
        mine: What this process says of itself.
        skew_s: Seconds by which its clock is off, at least.
        needs: What a job needs of it.
    """
    yield of_versions(facts, mine, node.name, needs.distributions)
    yield of_code(facts, mine, node.name)
    yield of_imports(facts, node.name)
    yield of_gpus(facts, node)
    yield of_room(facts, node, needs.disk_gib)
    yield of_store(facts, node, needs.store_gib)
    yield of_clock(skew_s, node.name)
    yield from of_needs(facts, node, needs)


def of_needs(facts: Facts, node: Node, needs: Needs) -> Iterator[Finding]:
    """Whether a job finds its data and models there."""
    bad = {n.split(" ")[0]: text for n, text in facts.errors.items()}  # a source of several is one
    asked = (
        (
            "dataset", needs.dataset, "readable and writable",
            "give every machine the same folder, with the right to write, or use an object store",
        ),
        ("source", needs.sources, "readable", "mount them there, or use an object store"),
        ("recipe", needs.recipe, f"models of {needs.recipe} are there", _FETCH),
        ("training", needs.training, f"models of {needs.training} are there", _FETCH),
        (
            "evaluation", needs.evaluation, f"weights of {needs.evaluation} are there",
            f"`python -m evals weights {needs.evaluation}` says there how to fetch them",
        ),
        ("models", needs.models, f"{', '.join(needs.models)}: there", _FETCH),
    )  # fmt: skip
    for name, is_asked, right, todo in asked:
        if not is_asked:
            continue
        yield _wrong(name, node, bad[name], todo) if name in bad else _ok(name, node, right)


def _ok(check: str, node: Node, found: str) -> Finding:
    return Finding(check=check, machine=node.name, verdict="ok", found=found)


def _wrong(check: str, node: Node, found: str, todo: str) -> Finding:
    return Finding(check=check, machine=node.name, verdict="wrong", found=found, todo=todo)


def of_versions(facts: Facts, mine: Facts, machine: str, needed: tuple[str, ...]) -> Finding:
    """Versions there against those here: stored signals name major.minor, Ray wants its own."""
    wrong, warned = [], []
    if _minor(facts.python) != _minor(mine.python):
        wrong.append(f"python {facts.python} (here {mine.python})")
    elif facts.python != mine.python:
        warned.append(f"python {facts.python} (here {mine.python})")
    for name, here in mine.versions.items():
        there = facts.versions.get(name)
        if there is None:
            if name in needed:
                wrong.append(f"{name} is missing")
            elif here is not None:
                warned.append(f"{name} is missing (here {here})")
        elif here is not None and there != here:
            is_wrong = name == "ray" or _minor(there) != _minor(here)
            (wrong if is_wrong else warned).append(f"{name} {there} (here {here})")
    if wrong or warned:
        return Finding(
            check="versions", machine=machine, verdict="wrong" if wrong else "warning",
            found="; ".join([*wrong, *warned]),
            todo="install the same everywhere: pip install -c constraints.txt, or the same image",
        )  # fmt: skip
    shown = [f"{n} {facts.versions[n]}" for n in ("ray", "pylance", "torch") if facts.versions[n]]
    return Finding(
        check="versions", machine=machine, verdict="ok",
        found=", ".join([f"python {facts.python}", *shown]) + ", as here",
    )  # fmt: skip


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def of_code(facts: Facts, mine: Facts, machine: str) -> Finding:
    """Our packages there against those here."""
    if "packages" in facts.errors:
        return Finding(check="code", machine=machine, verdict="wrong",
                       found=facts.errors["packages"], todo="see the error")  # fmt: skip
    missing = [n for n in FOLDERS if not facts.packages.get(n)]
    other = []
    for name in FOLDERS:
        there, here = facts.packages.get(name), mine.packages.get(name)
        if there and here and there[1] != here[1]:
            other.append(f"{name} in {there[0]} is another version, or another package")
    if facts.lance not in ((), ("pylance",)):
        other.append(f"lance comes from {', '.join(facts.lance)}, not from pylance alone")
    if missing:
        other.append(f"no {', '.join(missing)}")
    if other:
        return Finding(
            check="code", machine=machine, verdict="wrong", found="; ".join(other),
            todo="submit with the working directory (python -m cluster submit), or put the same"
            " repository there, and pip uninstall lance where that is another project",
        )  # fmt: skip
    folder = Path((facts.packages["engine"] or ("", ""))[0]).parent
    return Finding(check="code", machine=machine, verdict="ok", found=f"as here, in {folder}")


def of_imports(facts: Facts, machine: str) -> Finding:
    """Modules that bring native libraries along."""
    bad = {n: facts.errors[f"import {n}"] for n in IMPORTS if f"import {n}" in facts.errors}
    if not bad:
        return Finding(
            check="imports", machine=machine, verdict="ok", found=f"{', '.join(IMPORTS)} load"
        )
    todo = "pip install -c constraints.txt . on it"
    if "cv2" in bad and ".so" in bad["cv2"]:
        todo = "apt-get install libgl1 libglib2.0-0 there (what cv2 needs), or use the image"
    return Finding(
        check="imports", machine=machine, verdict="wrong", todo=todo,
        found="; ".join(f"{name}: {text}" for name, text in bad.items()),
    )  # fmt: skip


def of_gpus(facts: Facts, node: Node) -> Finding:
    """GPUs as Ray counts them and as torch finds them, each after a small product."""
    if "gpus" in facts.errors:
        return _wrong("GPUs", node, facts.errors["gpus"], "mend torch or the driver there")
    names = [g["name"] for g in facts.gpus]
    broken = [
        f"GPU {i} ({g['name']}): {g['error']}" for i, g in enumerate(facts.gpus) if g["error"]
    ]
    if broken:
        return _wrong("GPUs", node, "; ".join(broken), "free it, or look at nvidia-smi there")
    if len(names) == node.gpus:
        told = ", ".join(sorted(set(names)))
        return _ok("GPUs", node, f"{len(names)} ({told}), each computes" if names else "none")
    found = f"Ray counts {node.gpus:g}, torch finds {len(names)}"
    if facts.versions.get("torch") is None:
        found = f"Ray counts {node.gpus:g}, and torch is not installed"
    if node.gpus > len(names):
        return _wrong("GPUs", node, found, "install torch with CUDA and the driver there, or start"
                      " Ray with the true --num-gpus")  # fmt: skip
    return Finding(
        check="GPUs", machine=node.name, verdict="warning", found=found,
        todo="start Ray there without --num-gpus, or with the true one, to use them all",
    )  # fmt: skip


def of_room(facts: Facts, node: Node, disk_gib: float) -> Finding:
    """Disk room of temporary folders."""
    if not facts.rooms:
        return _wrong("disk", node, facts.errors.get("room", "nothing is known"), "look at it")
    told = ", ".join(
        f"{free / _GIB:.1f} of {total / _GIB:.0f} GiB free in {folder}"
        for folder, (free, total) in facts.rooms.items()
    )
    if any(free < disk_gib * _GIB for free, _ in facts.rooms.values()):
        return _wrong("disk", node, f"{told}; {disk_gib:g} GiB are needed",
                      "make room, start Ray with another --temp-dir, set TMPDIR, or say --disk-gib"
                      )  # fmt: skip
    return _ok("disk", node, told)


def of_store(facts: Facts, node: Node, store_gib: float) -> Finding:
    """Room of the object store, and whether it fits into shared memory."""
    told = f"{node.store_bytes / _GIB:.2f} GiB"
    small = node.store_bytes < store_gib * _GIB
    tight = facts.shm is not None and facts.shm[1] < node.store_bytes
    if facts.shm is not None:
        told += f", {facts.shm[0] / _GIB:.2f} of {facts.shm[1] / _GIB:.2f} GiB free in /dev/shm"
    if small:
        told += f"; {store_gib:g} GiB are needed"
    return Finding(
        check="object store", machine=node.name, found=told,
        verdict="warning" if small or tight else "ok",
        todo="start Ray with a larger --object-store-memory" if small
        else "give the container more shared memory (--shm-size)" if tight else "",
    )  # fmt: skip


def of_clock(skew_s: float, machine: str) -> Finding:
    """Clocks: leases compare them."""
    late = skew_s > SKEW_S
    return Finding(
        check="clock", machine=machine, verdict="warning" if late else "ok",
        found=f"{skew_s:.0f} s or more apart from ours" if late else "as here",
        todo="synchronise clocks (chrony, ntp): leases are taken over after 60 s" if late else "",
    )  # fmt: skip


def of_authentication(facts: Facts, dashboard: str | None, machine: str) -> Finding:
    """Whether a request without a token is refused, and who can make one."""
    name = "authentication"
    where = f"the dashboard at {dashboard}"
    if "dashboard" in facts.errors:
        return Finding(
            check=name, machine=machine, verdict="warning",
            found=f"{where} cannot be asked: {facts.errors['dashboard']}",
            todo="look at dashboard.log in the head's folder of Ray's logs",
        )  # fmt: skip
    if dashboard is None or facts.dashboard is None:
        return Finding(
            check=name, machine=machine, verdict="ok",
            found="no dashboard listens, so no jobs can be submitted",
        )  # fmt: skip
    public = _is_reachable(dashboard.rpartition(":")[0])
    on = facts.dashboard in (401, 403)
    if not on:
        return Finding(
            check=name, machine=machine, verdict="wrong" if public else "warning",
            found=f"{where} answers without a token: who reaches it runs what they like here",
            todo="`ray get-auth-token --generate`, give every machine the token, and start Ray with"
            " RAY_AUTH_MODE=token",
        )  # fmt: skip
    if public:
        return Finding(
            check=name, machine=machine, verdict="warning",
            found=f"token authentication is on, and {where} can be reached from other machines",
            todo="start Ray with --dashboard-host=127.0.0.1 and use a tunnel, or keep a firewall or"
            " NetworkPolicy before it",
        )  # fmt: skip
    if facts.token_mode is not None and facts.token_mode & 0o077:
        return Finding(
            check=name, machine=machine, verdict="warning",
            found="token authentication is on, and others on this machine can read"
            f" ~/.ray/auth_token (mode {facts.token_mode:o})",
            todo="chmod 600 ~/.ray/auth_token",
        )  # fmt: skip
    return Finding(check=name, machine=machine, verdict="ok",
                   found=f"token authentication is on, {where} is for this machine alone"
                   )  # fmt: skip


def _is_reachable(host: str) -> bool:
    """Whether an address is more than this machine's own."""
    try:
        return not ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host != "localhost"
