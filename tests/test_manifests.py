"""The files that start clusters: strictly valid, true to policies, with commands that exist."""

from __future__ import annotations

import copy
import importlib
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import manifests
import pytest
import tyro
import yaml
from conftest import REPOSITORY, tool
from manifests import CLUSTER, CRONTAB, DOCKERFILE, POLICIES, Files

FILES = manifests.shipped()
WHOLE = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


# Validity


def check(document: dict[str, Any]) -> None:
    """Raises ValidationError for a resource of Kubernetes that is not valid, strictly."""
    if not document["apiVersion"].startswith("ray.io/"):
        kubernetes_validate.validate(document, manifests.KUBERNETES, strict=True)
        return
    if not manifests.SCHEMAS.is_dir():
        pytest.skip("KubeRay's schemas are not here")
    jsonschema.Draft7Validator(manifests.schema(document["kind"])).validate(document)


def check_cluster(whole: dict[str, Any]) -> None:
    """The same for the cluster file, as `ray up` does it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(whole))


@pytest.mark.parametrize("path", [p for p in FILES if p.startswith("kubernetes/")])
def test_manifest_is_valid(path: str) -> None:
    found = list(yaml.safe_load_all(FILES[path]))
    assert found
    for one in found:
        check(one)


def test_cluster_file_is_valid() -> None:
    check_cluster(yaml.safe_load(FILES[CLUSTER]))


def at(document: Any, path: str) -> tuple[Any, Any]:
    """What holds the value at a path such as spec.groups.0.name, and its key there."""
    *way, last = [int(k) if k.isdigit() else k for k in path.split(".")]
    for key in way:
        document = document[key]
    assert document[last] is not None
    return document, last


def misspelt(document: Any, path: str) -> None:
    parent, key = at(document, path)
    parent[key[:-1] + key[-1] * 2] = parent.pop(key)


def mistyped(document: Any, path: str) -> None:
    parent, key = at(document, path)
    parent[key] = {"not": "this"} if isinstance(parent[key], str | int) else "not this"


def missing(document: Any, path: str) -> None:
    parent, key = at(document, path)
    del parent[key]


GROUP, HEAD = "workerGroupSpecs.0", "headGroupSpec.template.spec.containers.0"
CRON = "spec.jobTemplate.spec"
TYPOS: dict[str, list[tuple[Callable[[Any, str], None], str]]] = {
    "kubernetes/raycluster.yaml": [
        (misspelt, "spec.authOptions.mode"),
        (misspelt, f"spec.{GROUP}.maxReplicas"),
        (mistyped, f"spec.{HEAD}.ports.0.containerPort"),
        (missing, f"spec.{GROUP}.groupName"),
        (misspelt, "spec.autoscalerOptions.idleTimeoutSeconds"),
    ],
    **{
        f"kubernetes/rayjob-{name}.yaml": [
            (misspelt, "spec.activeDeadlineSeconds"),
            (misspelt, f"spec.rayClusterSpec.{HEAD}.securityContext"),
            (mistyped, "spec.backoffLimit"),
            (missing, f"spec.rayClusterSpec.{GROUP}.minReplicas"),
        ]
        for name in ("curate", "train", "evaluate")
    },
    "kubernetes/raycronjob-nightly.yaml": [
        (misspelt, "spec.timeZone"),
        (misspelt, f"spec.jobTemplate.rayClusterSpec.{HEAD}.envFrom"),
        (mistyped, "spec.schedule"),
        (missing, "spec.schedule"),
    ],
    "kubernetes/cronjob-nightly.yaml": [
        (misspelt, "spec.concurrencyPolicy"),
        (misspelt, f"{CRON}.template.spec.containers.0.env.0.name"),
        (mistyped, f"{CRON}.backoffLimit"),
        (missing, "spec.schedule"),
    ],
    "kubernetes/namespace.yaml": [
        (misspelt, "metadata.labels"),
        (mistyped, "metadata.name"),
    ],
    "kubernetes/networkpolicy.yaml": [
        (misspelt, "spec.ingress.0.from.0.podSelector.matchLabels"),
        (mistyped, "spec.policyTypes"),
        (misspelt, "spec.podSelector"),
    ],
    "kubernetes/storage.yaml": [
        (misspelt, "spec.accessModes"),
        (mistyped, "spec.resources.requests"),
    ],
    CLUSTER: [
        (misspelt, "idle_timeout_minutes"),
        (misspelt, "available_node_types.gpu.max_workers"),
        (misspelt, "docker.pull_before_run"),
        (mistyped, "available_node_types.decoder.min_workers"),
        (missing, "available_node_types.gpu.resources"),
        (missing, "head_node_type"),
    ],
}


@pytest.mark.parametrize(
    "path, typo, where",
    [(path, typo, where) for path, typos in TYPOS.items() for typo, where in typos],
)
def test_a_mistake_in_a_manifest_is_found(
    path: str, typo: Callable[[Any, str], None], where: str
) -> None:
    document = copy.deepcopy(next(yaml.safe_load_all(FILES[path])))
    typo(document, where)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        (check_cluster if path == CLUSTER else check)(document)


def test_every_manifest_has_mistakes_to_find() -> None:
    assert {p for p in FILES if p.endswith(".yaml")} == set(TYPOS)


# Policies


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.__name__)
def test_policy(policy: Callable[[Files], Any]) -> None:
    assert list(policy(FILES)) == []


IMAGE = "registry.example.com/reelwright:0.1.0"
K8S = "kubernetes/"
BROKEN: list[tuple[str, str, str, str]] = [
    ("authenticated", f"{K8S}raycluster.yaml", "mode: token", "mode: disabled"),
    ("authenticated", f"{K8S}rayjob-train.yaml", "secretName: reelwright-token", "#"),
    ("authenticated", f"{K8S}raycronjob-nightly.yaml", "mode: token", "mode: disabled"),
    ("authenticated", f"{K8S}cronjob-nightly.yaml", "value: token", "value: disabled"),
    ("authenticated", f"{K8S}cronjob-nightly.yaml", "key: auth_token", "key: token"),
    ("authenticated", CLUSTER, "65536; RAY_AUTH_MODE=token", "65536;"),
    ("authenticated", CLUSTER, "  ~/.ray/auth_token: ~/.ray/auth_token", "  ~/a: ~/a"),
    ("authenticated", CRONTAB, "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled"),
    ("closed", CLUSTER, "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"),
    ("closed", f"{K8S}networkpolicy.yaml", 'ray.io/is-ray-node: "yes"\n  policy', "a: b\n  policy"),
    ("closed", f"{K8S}networkpolicy.yaml", "policyTypes: [Ingress]", "policyTypes: [Egress]"),
    ("closed", f"{K8S}networkpolicy.yaml", "port: 8080", "port: 8265"),
    ("closed", f"{K8S}networkpolicy.yaml", "  ingress:\n", "  ingress:\n    - {}\n"),
    (
        "closed",
        f"{K8S}networkpolicy.yaml",
        "  ingress:\n",
        "  ingress:\n    - from: [{namespaceSelector: {}, podSelector: {matchLabels: {a: b}}}]\n",
    ),
    ("closed", f"{K8S}rayjob-curate.yaml", "serviceType: ClusterIP", "serviceType: LoadBalancer"),
    ("closed", f"{K8S}rayjob-curate.yaml", "restartPolicy: Never", "hostNetwork: true"),
    ("one_image", f"{K8S}raycluster.yaml", IMAGE, "registry.example.com/reelwright:latest"),
    ("one_image", f"{K8S}cronjob-nightly.yaml", IMAGE, "registry.example.com/reelwright"),
    ("one_image", CLUSTER, f"image: {IMAGE}", "image: registry.example.com/reelwright:0.0.9"),
    ("one_image", DOCKERFILE, "FROM python:3.11.14-slim", "FROM python:3.11-slim"),
    ("one_image", DOCKERFILE, "-t registry.example.com/reelwright:0.1.0", f"-t {IMAGE}.1"),
    (
        "no_secrets",
        f"{K8S}raycluster.yaml",
        "- {name: HF_HOME,",
        "- {name: HF_TOKEN, value: secret}\n              - {name: HF_HOME,",
    ),
    ("no_secrets", f"{K8S}raycluster.yaml", "value: /weights/vbench", f"value: {'0a' * 16}"),
    ("no_secrets", DOCKERFILE, "PYTHONUNBUFFERED=1", "HF_TOKEN=abc"),
    ("no_secrets", CRONTAB, "RAY_AUTH_TOKEN_PATH=", "RAY_AUTH_TOKEN="),
    ("no_secrets", CLUSTER, "--env RAY_AUTH_MODE=token", "--env AWS_SECRET_ACCESS_KEY=x"),
    (
        "no_secrets",
        f"{K8S}namespace.yaml",
        "apiVersion: v1\nkind: Namespace",
        "apiVersion: v1\nkind: Secret\nmetadata: {name: a}\n---\napiVersion: v1\nkind: Namespace",
    ),
    ("unprivileged", f"{K8S}rayjob-evaluate.yaml", "runAsNonRoot: true", "runAsNonRoot: false"),
    ("unprivileged", f"{K8S}rayjob-evaluate.yaml", "drop: [ALL]", "drop: [NET_RAW]"),
    (
        "unprivileged",
        f"{K8S}raycluster.yaml",
        "allowPrivilegeEscalation: false",
        "privileged: true",
    ),
    (
        "unprivileged",
        f"{K8S}raycluster.yaml",
        "serviceAccountName: reelwright-head",
        "hostPID: true",
    ),
    ("unprivileged", f"{K8S}cronjob-nightly.yaml", "automountServiceAccountToken: false", ""),
    ("unprivileged", f"{K8S}cronjob-nightly.yaml", "serviceAccountName: reelwright", ""),
    ("unprivileged", f"{K8S}namespace.yaml", "automountServiceAccountToken: false", ""),
    ("unprivileged", f"{K8S}namespace.yaml", "enforce: restricted", "enforce: baseline"),
    (
        "unprivileged",
        f"{K8S}rayjob-train.yaml",
        "emptyDir: {sizeLimit: 40Gi}",
        "hostPath: {path: /}",
    ),
    (
        "unprivileged",
        f"{K8S}raycluster.yaml",
        "- {name: runs, mountPath: /runs}",
        "- {name: api-token, mountPath: /var/run/secrets/kubernetes.io/serviceaccount}",
    ),
    ("bounded", f"{K8S}cronjob-nightly.yaml", "concurrencyPolicy: Forbid", ""),
    ("bounded", f"{K8S}cronjob-nightly.yaml", "timeZone: Etc/UTC", ""),
    ("bounded", f"{K8S}cronjob-nightly.yaml", 'limits: {cpu: "1", memory: 1Gi,', "limits: {"),
    ("bounded", f"{K8S}cronjob-nightly.yaml", "schedule: 30 2 * * *", "schedule: 30 3 * * *"),
    ("bounded", f"{K8S}raycronjob-nightly.yaml", "Seconds: 21600", "Seconds: 86400"),
    ("bounded", f"{K8S}rayjob-curate.yaml", "activeDeadlineSeconds: 172800", ""),
    ("bounded", f"{K8S}rayjob-curate.yaml", "shutdownAfterJobFinishes: true", ""),
    ("bounded", f"{K8S}rayjob-curate.yaml", 'requests: {cpu: "16",', "requests: {"),
    ("bounded", CRONTAB, "30 2 * * *", "0 3 * * *"),
    ("fitting", f"{K8S}raycluster.yaml", "mountPath: /dev/shm", "mountPath: /shm"),
    ("fitting", f"{K8S}raycluster.yaml", "medium: Memory, sizeLimit: 4Gi", "sizeLimit: 4Gi"),
    ("fitting", f"{K8S}raycluster.yaml", "sizeLimit: 4Gi", "sizeLimit: 900Mi"),
    ("fitting", f"{K8S}raycluster.yaml", "version: v2", "version: v1"),
    ("fitting", f"{K8S}raycluster.yaml", 'num-cpus: "0"', 'num-cpus: "4"'),
    ("fitting", f"{K8S}raycluster.yaml", "minReplicas: 1\n      maxReplicas: 4", "minReplicas: 0"),
    ("fitting", f"{K8S}rayjob-train.yaml", "maxReplicas: 4", "maxReplicas: 8"),
    ("fitting", f"{K8S}rayjob-train.yaml", "key: nvidia.com/gpu,", "key: gpu,"),
    ("fitting", f"{K8S}rayjob-train.yaml", "claimName: reelwright-runs", "claimName: runs"),
    ("fitting", CLUSTER, "worker_run_options: [--gpus all]", "worker_run_options: []"),
    ("limited", f"{K8S}rayjob-curate.yaml", "name: REELWRIGHT_ALLOWED_ROOTS", "name: ROOTS"),
    ("limited", f"{K8S}rayjob-curate.yaml", "value: s3://reelwright,", "value: s3://other,"),
    ("limited", f"{K8S}raycluster.yaml", "/runs,", ""),
    ("limited", f"{K8S}raycluster.yaml", "{name: REELWRIGHT_LOG, value: json}", "{name: A}"),
    ("limited", CLUSTER, "--env REELWRIGHT_ALLOWED_ROOTS", "--env ROOTS"),
    ("versioned", f"{K8S}rayjob-curate.yaml", "rayVersion: 2.60.0", "rayVersion: 2.59.0"),
    ("versioned", CLUSTER, "== '2.60.0'", "== '2.59.0'"),
    ("in_our_namespace", f"{K8S}networkpolicy.yaml", "namespace: reelwright", "namespace: other"),
    ("in_our_namespace", f"{K8S}rayjob-curate.yaml", "  namespace: reelwright\n", ""),
    ("in_our_namespace", f"{K8S}namespace.yaml", "generic reelwright-token", "generic token"),
]


@pytest.mark.parametrize("policy, path, old, new", BROKEN)
def test_a_policy_finds_what_breaks_it(policy: str, path: str, old: str, new: str) -> None:
    assert old in FILES[path]
    broken = {**FILES, path: FILES[path].replace(old, new)}
    held = next(p for p in POLICIES if p.__name__ == policy)
    assert list(held(broken))


def test_every_policy_is_seen_to_fail() -> None:
    assert {p.__name__ for p in POLICIES} == {name for name, *_ in BROKEN}


# Commands

COMMANDS = list(manifests.commands(FILES))


def parse(words: list[str]) -> Any:
    """The value that our command's own parser makes of a command line; raises SystemExit."""
    assert words[0] == "python"
    if words[1] == "-m":
        module, kind = importlib.import_module(f"{words[2]}.__main__"), "Command"
        rest = words[3:]
    else:
        name = words[1].removeprefix("pipelines/").removesuffix(".py")
        assert words[1] == f"pipelines/{name}.py"
        module, kind, rest = importlib.import_module(f"pipelines.{name}"), "Args", words[2:]
    return tyro.cli(getattr(module, kind), args=rest)


def whole(words: list[str]) -> Any:
    """The same, of what it submits where that is what it does."""
    made = parse(words)
    return parse(list(made.command)) if words[1:4] == ["-m", "cluster", "submit"] else made


@pytest.mark.parametrize("path, words", COMMANDS)
def test_commands_are_ours_and_their_flags_exist(path: str, words: list[str]) -> None:
    from evals import recipes as evaluations
    from pipelines import recipes as curations
    from trainers import recipes as trainings

    made = whole(words)
    known = {
        "pipelines.curate": curations.NAMES,
        "trainers.__main__": trainings.NAMES,
        "evals.__main__": evaluations.NAMES,
    }
    assert made.recipe in known[type(made).__module__]


@pytest.mark.parametrize("path, words", COMMANDS)
def test_a_mistake_in_a_flag_is_found(path: str, words: list[str]) -> None:
    flags = [i for i, word in enumerate(words) if re.match(r"--\w", word)]
    assert flags
    for i in flags:
        wrong = [*words[:i], re.sub(r"^--\w", "--q", words[i]), *words[i + 1 :]]
        with pytest.raises(SystemExit) as stop:
            whole(wrong)
        assert stop.value.code == 2, words[i]


def test_the_three_schedules_evaluate_the_same() -> None:
    found = [whole(words) for _, words in COMMANDS if "nightly" in words]
    assert len(found) == 3
    assert found[0] == found[1] == found[2]


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_start_knows_its_flags() -> None:
    from ray.scripts.scripts import start

    for words in manifests.ray_starts(FILES):
        rest = words[words.index("start") + 1 :]
        start.make_context("start", rest)  # raises for one that it does not know


# Cron


def test_cron_fields() -> None:
    variables, fields, command = manifests.schedule(FILES)
    bounds = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
    for one, (lo, hi) in zip(fields.split(), bounds, strict=True):
        assert one == "*" or lo <= int(one) <= hi
    assert "%" not in command  # which cron takes for a line break
    for name, value in variables.items():
        assert "$" not in value and "~" not in value, name  # cron expands nothing
    used = set(re.findall(r'"\$([A-Z_]+)"', command))
    assert used <= set(variables)
    assert all(Path(variables[name]).is_absolute() for name in used)


def runs_cron(folder: Path, python: str) -> subprocess.Popen[str]:
    """The crontab's very line, by its shell, in the environment that cron would give it."""
    variables, _, line = manifests.schedule(FILES)
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{python}\n", encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    here = {"PYTHON": program, "REELWRIGHT": folder, "LOG": folder / "log", "LOCK": folder / "lock"}
    return subprocess.Popen(
        [variables["SHELL"], "-c", line],
        env={**variables, **{name: str(path) for name, path in here.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_cron_says_nothing_of_a_night_that_goes_well(tmp_path: Path) -> None:
    tool("flock")
    ran = runs_cron(tmp_path, 'echo "$PWD: $*"; echo "$RAY_AUTH_MODE" >&2')
    assert ran.communicate(timeout=20)[0] == ""
    assert ran.returncode == 0
    log = (tmp_path / "log").read_text()
    assert f"{tmp_path}: -m cluster submit" in log and "\ntoken\n" in log


def test_cron_mails_the_end_of_the_log_of_a_night_that_fails(tmp_path: Path) -> None:
    tool("flock")
    ran = runs_cron(tmp_path, "seq 100; echo REGRESSION; exit 3")
    said = ran.communicate(timeout=20)[0]
    assert ran.returncode == 3
    assert "exit code 3" in said and "REGRESSION" in said
    assert len(said.splitlines()) < 50


def test_cron_refuses_a_second_start_until_the_first_has_ended(tmp_path: Path) -> None:
    tool("flock")
    busy = tmp_path / "busy"
    first = runs_cron(tmp_path, f"touch {busy}; while [ -e {busy} ]; do sleep 0.05; done")
    deadline = time.monotonic() + 20
    while not busy.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second = runs_cron(tmp_path, "echo ran twice")
    said = second.communicate(timeout=20)[0]
    assert second.returncode == 75
    assert "failed to get lock" in said and "ran twice" not in said
    busy.unlink()
    assert first.wait(timeout=20) == 0
    third = runs_cron(tmp_path, "echo ran later")
    assert third.wait(timeout=20) == 0
    assert "ran later" in (tmp_path / "log").read_text()


# The image


def steps(name: str) -> list[str]:
    return [rest for one, rest in manifests.instructions(FILES[DOCKERFILE]) if one == name]


def test_dockerfile_has_instructions_that_exist() -> None:
    known = {"FROM", "RUN", "ENV", "WORKDIR", "ARG", "COPY", "USER"}
    found = [name for name, _ in manifests.instructions(FILES[DOCKERFILE])]
    assert found[0] == "FROM" and set(found) == known


def test_image_has_what_cv2_needs() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    packages = re.search(r"^packages = \{(.*?)^\}", makefile, re.MULTILINE | re.DOTALL)
    assert packages
    needed = set(re.findall(r': "([\w.-]+)"', packages[1]))
    assert needed == {"libgl1", "libglib2.0-0", "libxcb1"}
    installed = next(step for step in steps("RUN") if "apt-get install" in step).split()
    assert needed | {"wget", "rsync", "openssh-client"} <= set(installed)


def test_image_does_not_run_as_root() -> None:
    assert manifests.instructions(FILES[DOCKERFILE])[-1] == ("USER", "1000:1000")
    (made,) = (step for step in steps("RUN") if "useradd" in step)
    assert "useradd --uid 1000" in made and "groupadd --gid 1000" in made
    ids = {(p.spec["securityContext"]["runAsUser"], p.spec["securityContext"]["runAsGroup"])
           for p in manifests.pods(FILES)}  # fmt: skip
    assert ids == {(1000, 1000)}


def test_image_is_where_the_files_look_for_it() -> None:
    (env,) = steps("ENV")
    values = dict(pair.split("=") for pair in env.split())
    assert values["HOME"] == "/home/ray"
    assert steps("WORKDIR") == [values["PYTHONPATH"]] == ["/home/ray/reelwright"]


def copied() -> list[tuple[str, str]]:
    """What the image copies: from where, to where."""
    found = []
    for step in steps("COPY"):
        *sources, to = step.split()
        found += [(source, to) for source in sources]
    return found


def test_image_has_all_of_the_code_and_nothing_else() -> None:
    sources = {source for source, _ in copied()}
    assert all((REPOSITORY / source).exists() for source in sources)
    packages = {p.rstrip("*") for p in WHOLE["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert sources == packages | {"pyproject.toml", "constraints.txt", "LICENSE"}
    assert all(to in ("./", f"./{source}") for source, to in copied())


def test_the_builder_gets_what_is_copied_and_nothing_else() -> None:
    lines = [n for n in FILES[".dockerignore"].splitlines() if n and not n.startswith("#")]
    assert lines[0] == "*"  # then what is let in, then what is not of that
    let_in = [line[1:] for line in lines if line.startswith("!")]
    assert set(let_in) == {source for source, _ in copied()}
    assert all(line.startswith("**/") for line in lines[1 + len(let_in) :])


def requirements(tmp_path: Path, extras: str | None = None) -> tuple[list[str], list[str], str]:
    """What the image's script has pip resolve, and take as it is; and its calls of pip."""
    (script,) = (step for step in steps("RUN") if "requirements.txt" in step)
    (given,) = (step for step in steps("ARG") if step.startswith("EXTRAS="))
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    kept = tmp_path / "kept"
    kept.mkdir()
    # a pip that keeps what it is given, in place of minutes of downloads
    (tmp_path / "python").write_text(
        f'#!/bin/sh\nif [ "$1" = -m ]; then echo "$@" >> {kept}/calls; cp {tmp_path}/*.txt {kept};'
        f' elif [ "$1" = - ]; then exec {sys.executable} "$@"; fi\n'
    )
    (tmp_path / "python").chmod(0o755)
    env = os.environ | {
        "EXTRAS": extras if extras is not None else shlex.split(given)[0].partition("=")[2],
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    subprocess.run(
        ["sh", "-c", script.replace("/tmp/", f"{tmp_path}/")], env=env, cwd=tmp_path, check=True
    )
    resolved = (kept / "requirements.txt").read_text().splitlines()
    alone = (kept / "without-dependencies.txt").read_text().splitlines()
    return resolved, alone, (kept / "calls").read_text()


def test_image_installs_what_is_pinned(tmp_path: Path) -> None:
    resolved, alone, calls = requirements(tmp_path)
    whole = WHOLE["project"]["optional-dependencies"]
    extras = set(whole) - {"demo", "lint", "test"}
    wanted = {*WHOLE["project"]["dependencies"], *(line for e in extras for line in whole[e])}
    assert set(resolved) == wanted | {"boto3"}
    assert alone == WHOLE["tool"]["reelwright"]["without-dependencies"]["evals"]
    first, second = calls.splitlines()
    assert "-c constraints.txt -r " in first and "--no-deps" not in first
    assert "-c constraints.txt --no-deps -r " in second
    for line in [*resolved, *alone]:
        assert manifests.pinned(re.match(r"[\w-]+", line)[0])  # type: ignore[index]


def test_image_without_evaluation_has_nothing_noncommercial(tmp_path: Path) -> None:
    _, alone, calls = requirements(tmp_path, "models train s3")
    assert alone == [] and len(calls.splitlines()) == 1


def test_image_has_a_python_that_the_project_runs_on() -> None:
    from packaging.specifiers import SpecifierSet

    (base,) = steps("FROM")
    version = base.removeprefix("python:").split("-")[0]
    assert version in SpecifierSet(WHOLE["project"]["requires-python"])


def test_paths_in_comments_exist() -> None:
    for path, text in FILES.items():
        for found in re.findall(r"cluster/[\w./-]+\.(?:yaml|crontab)|cluster/Dockerfile", text):
            assert (REPOSITORY / found).is_file(), f"{path}: {found}"
