"""The files that start clusters: how they are read, and what is asked of each of them.

A policy is a function that takes all files (text by path) and yields what is wrong, so that a test
can give it the shipped ones, and the same ones broken.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from conftest import REPOSITORY

SCHEMAS = REPOSITORY.parent / "shared" / "schemas"
KUBERNETES = "1.32"
CLUSTER, DOCKERFILE, CRONTAB = "ray-cluster.yaml", "Dockerfile", "nightly.crontab"
Files = Mapping[str, str]
"""Text of each file, by its path below `cluster/`."""


def shipped() -> dict[str, str]:
    """All of them as they are."""
    root = REPOSITORY / "cluster"
    paths = [*root.glob("*.yaml"), *root.glob("kubernetes/*"), root / DOCKERFILE, root / CRONTAB]
    found = {str(p.relative_to(root)): p.read_text(encoding="utf-8") for p in sorted(paths)}
    return found | {".dockerignore": (REPOSITORY / ".dockerignore").read_text(encoding="utf-8")}


def documents(files: Files) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every resource of Kubernetes, with the file that it stands in."""
    for path, text in files.items():
        if path.startswith("kubernetes/"):
            yield from ((path, one) for one in _loaded(text))


@functools.cache
def _loaded(text: str) -> list[dict[str, Any]]:
    return list(yaml.load_all(text, yaml.CSafeLoader))


def cluster_file(files: Files) -> dict[str, Any]:
    """The file of `ray up`."""
    return _loaded(files[CLUSTER])[0]


def of_kind(files: Files, *kinds: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from ((path, one) for path, one in documents(files) if one["kind"] in kinds)


@dataclass(frozen=True)
class Pod:
    """A template of pods."""

    path: str
    what: str
    """Which: head, the name of a group, or submitter."""
    spec: dict[str, Any]
    labels: dict[str, str]
    group: dict[str, Any]
    """Of Ray; empty for others."""

    @property
    def where(self) -> str:
        return f"{self.path}: {self.what}"


def ray_clusters(files: Files) -> Iterator[tuple[str, dict[str, Any]]]:
    """Specifications of clusters, and of those that jobs bring along."""
    for path, one in documents(files):
        match one["kind"]:
            case "RayCluster":
                yield path, one["spec"]
            case "RayJob":
                yield path, one["spec"]["rayClusterSpec"]
            case "RayCronJob":
                yield path, one["spec"]["jobTemplate"]["rayClusterSpec"]


def ray_jobs(files: Files) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, one in of_kind(files, "RayJob", "RayCronJob"):
        yield path, one["spec"].get("jobTemplate", one["spec"])


def pods(files: Files) -> Iterator[Pod]:
    """All templates of pods."""
    for path, spec in ray_clusters(files):
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            made = group["template"]
            labels = made.get("metadata", {}).get("labels", {})
            yield Pod(path, group.get("groupName", "head"), made["spec"], labels, group)
    for path, one in of_kind(files, "CronJob"):
        made = one["spec"]["jobTemplate"]["spec"]["template"]
        yield Pod(path, "submitter", made["spec"], made["metadata"].get("labels", {}), {})


def instructions(text: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions and their arguments, a heredoc's text among them."""
    found: list[tuple[str, str]] = []
    lines = iter(text.splitlines())
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        words = line.rstrip()
        while words.endswith("\\"):
            words = words[:-1] + next(lines).strip()
        if here := re.search(r"<<-?'?(\w+)'?$", words):
            body = []
            while (line := next(lines)) != here[1]:
                body.append(line)
            words = words.removesuffix(here[0]).strip() + " " + "\n".join(body) + "\n"
        name, _, rest = words.partition(" ")
        found.append((name, rest.strip(" ")))
    return found


def schedule(files: Files) -> tuple[dict[str, str], str, str]:
    """The crontab's variables, the five fields, and the command."""
    lines = [one for one in files[CRONTAB].splitlines() if one.strip() and one[0] != "#"]
    pairs = [one.split("=", 1) for one in lines if re.match(r"[A-Z_]+=", one)]
    (entry,) = [one for one in lines if not re.match(r"[A-Z_]+=", one)]
    *fields, command = entry.split(maxsplit=5)
    return dict(pairs), " ".join(fields), command


def commands(files: Files) -> Iterator[tuple[str, list[str]]]:
    """What files have our scripts do: the words of each, from `python` on."""
    for path, job in ray_jobs(files):
        yield path, shlex.split(job["entrypoint"])
    for path, one in of_kind(files, "CronJob"):
        (container,) = one["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
        yield path, container["command"] + container["args"]
    _, _, rest = schedule(files)[2].partition('"$PYTHON" ')
    yield CRONTAB, ["python", *shlex.split(rest.partition(";")[0])]


def ray_starts(files: Files) -> Iterator[list[str]]:
    """The words of each `ray start` of the cluster file, with the variables before it."""
    whole = cluster_file(files)
    for line in whole["head_start_ray_commands"] + whole["worker_start_ray_commands"]:
        for part in line.split(";"):
            words = shlex.split(part)
            if "start" in words:
                yield words


def pinned(name: str) -> str:
    """The version of a distribution."""
    text = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    return next(line.split("==")[1] for line in text.splitlines() if line.startswith(f"{name}=="))


# Policies


def authenticated(files: Files) -> Iterator[str]:
    """Token authentication is on wherever Ray starts or is asked for something."""
    for path, spec in ray_clusters(files):
        if spec.get("authOptions") != {"mode": "token", "secretName": "reelwright-token"}:
            yield f"{path}: authOptions {spec.get('authOptions')}"
    for path, one in of_kind(files, "CronJob"):
        (container,) = one["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
        env = {v["name"]: v for v in container["env"]}
        token = env.get("RAY_AUTH_TOKEN", {}).get("valueFrom", {}).get("secretKeyRef")
        if env.get("RAY_AUTH_MODE", {}).get("value") != "token":
            yield f"{path}: RAY_AUTH_MODE is not token"
        if token != {"name": "reelwright-token", "key": "auth_token"}:
            yield f"{path}: the token comes from {token}"
    for words in ray_starts(files):
        if "RAY_AUTH_MODE=token" not in words[: words.index("ray")]:
            yield f"{CLUSTER}: {' '.join(words)} without RAY_AUTH_MODE=token"
    if "~/.ray/auth_token" not in cluster_file(files).get("file_mounts", {}):
        yield f"{CLUSTER}: the token does not reach the nodes"
    variables, _, _ = schedule(files)
    if variables.get("RAY_AUTH_MODE") != "token" or "RAY_AUTH_TOKEN_PATH" not in variables:
        yield f"{CRONTAB}: no token"


def closed(files: Files) -> Iterator[str]:
    """Nobody outside reaches a dashboard: it listens on localhost, or behind the NetworkPolicy."""
    head, *workers = ray_starts(files)
    if "--dashboard-host=127.0.0.1" not in head:
        yield f"{CLUSTER}: the dashboard does not listen on localhost alone"
    if any("dashboard-host" in word for words in workers for word in words):
        yield f"{CLUSTER}: a worker has a dashboard"
    policies = [one["spec"] for _, one in of_kind(files, "NetworkPolicy")]
    ray_pods = {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    guards = [p for p in policies if p["podSelector"] == ray_pods and "Ingress" in p["policyTypes"]]
    if not guards:
        yield "kubernetes/networkpolicy.yaml: nothing guards the pods of Ray"
    for rule in (rule for policy in policies for rule in policy.get("ingress", [])):
        yield from (f"kubernetes/networkpolicy.yaml: {why}" for why in _too_open(rule, ray_pods))
    for path, spec in ray_clusters(files):
        group = spec["headGroupSpec"]
        if group.get("serviceType") != "ClusterIP" or group.get("enableIngress"):
            yield f"{path}: the head's service is seen from outside"
    yield from (
        f"{path}: a {one['kind']} of its own"
        for path, one in of_kind(files, "Service", "Ingress", "HTTPRoute", "Route")
    )
    for pod in pods(files):
        if pod.spec.get("hostNetwork"):
            yield f"{pod.where}: on the machine's network, where no policy holds"


def _too_open(rule: Mapping[str, Any], ray_pods: Mapping[str, Any]) -> Iterator[str]:
    ports = {p["port"] for p in rule.get("ports", [])}
    if not rule.get("from"):
        yield "a rule lets everybody in"
    for peer in rule.get("from", []):
        selected = peer.get("podSelector", {}).get("matchLabels")
        if not selected or "ipBlock" in peer or peer.get("namespaceSelector") == {}:
            yield f"a rule lets {peer} in"
        elif peer.get("podSelector") != ray_pods and not ports:
            yield f"{peer} reaches every port"
        elif 8265 in ports and not set(selected.values()) & {"kuberay-operator", "submitter"}:
            yield f"{peer} reaches the dashboard"


def one_image(files: Files) -> Iterator[str]:
    """One image everywhere, of this version; what it is made from has a version, too."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    expected = f"registry.example.com/reelwright:{project['version']}"
    docker = cluster_file(files)["docker"]
    images = [(CLUSTER, value) for name, value in docker.items() if name.endswith("image")]
    images += [
        (pod.where, container["image"])
        for pod in pods(files)
        for container in pod.spec["containers"] + pod.spec.get("initContainers", [])
    ]
    for path, text in files.items():
        # those of comments, which people copy
        images += [(path, found) for found in re.findall(r"\S+/reelwright:[\w.]+", text)]
    images += [
        (path, spec["autoscalerOptions"]["image"])
        for path, spec in ray_clusters(files)
        if "image" in spec.get("autoscalerOptions", {})
    ]
    yield from (f"{path}: {image}" for path, image in images if image != expected)
    for name, rest in instructions(files[DOCKERFILE]):
        if name == "FROM" and not re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+", rest):
            yield f"{DOCKERFILE}: FROM {rest} is not one version"


_SECRET_NAME = re.compile(r"(?i)token|secret|password|credential|(^|_)key(_|$)|webhook")
_SECRET_VALUE = re.compile(r"\b(AKIA[0-9A-Z]{16}|hf_\w{30,}|[0-9a-fA-F]{32,}|eyJ[\w-]{20,})\b")


def no_secrets(files: Files) -> Iterator[str]:
    """Secrets stand in no file: pods get them from Secrets, machines from files of their own."""
    yield from (f"{path}: a Secret" for path, _ in of_kind(files, "Secret"))
    for path, text in files.items():
        yield from (f"{path}: {found[0]}" for found in _SECRET_VALUE.finditer(text))
    for pod in pods(files):
        for variable in (v for c in pod.spec["containers"] for v in c.get("env", [])):
            if _SECRET_NAME.search(variable["name"]) and "value" in variable:
                yield f"{pod.where}: {variable['name']} in the open"
    for name, rest in instructions(files[DOCKERFILE]):
        if name in ("ENV", "ARG") and _SECRET_NAME.search(rest):
            yield f"{DOCKERFILE}: {name} {rest}"
    given = cluster_file(files)["docker"].get("run_options", [])
    for option in given + [" ".join(words) for words in ray_starts(files)]:
        yield from (
            f"{CLUSTER}: {name}="
            for name in re.findall(r"([A-Z_]+)=", option)
            if _SECRET_NAME.search(name)
        )
    for name in schedule(files)[0]:
        if _SECRET_NAME.search(name) and not name.endswith("_PATH"):
            yield f"{CRONTAB}: {name}="


def unprivileged(files: Files) -> Iterator[str]:
    """As nobody in particular, with no way up, and with no rights in the cluster."""
    accounts = {
        one["metadata"]["name"]: one.get("automountServiceAccountToken")
        for _, one in of_kind(files, "ServiceAccount")
    }
    yield from (f"account {n}: its token is mounted" for n, m in accounts.items() if m is not False)
    yield from (
        f"{path}: gives rights"
        for path, _ in of_kind(files, "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")
    )
    (namespace,) = [one for _, one in of_kind(files, "Namespace")]
    enforced = namespace["metadata"]["labels"].get("pod-security.kubernetes.io/enforce")
    if enforced != "restricted":
        yield f"namespace: enforces {enforced}"
    for pod in pods(files):
        says = pod.spec.get("securityContext", {})
        if not says.get("runAsNonRoot") or not says.get("runAsUser"):
            yield f"{pod.where}: may be root"
        if says.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{pod.where}: no seccomp profile"
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.where}: has the token of its account"
        if pod.spec.get("serviceAccountName") not in accounts:
            yield f"{pod.where}: account {pod.spec.get('serviceAccountName')} is not there"
        if any("hostPath" in volume for volume in pod.spec.get("volumes", [])):
            yield f"{pod.where}: mounts the machine's disk"
        if any(pod.spec.get(name) for name in ("hostPID", "hostIPC")):
            yield f"{pod.where}: sees the machine"
        for container in pod.spec["containers"]:
            yield from (f"{pod.where}: {why}" for why in _privileges(container))
            if any("serviceaccount" in m["mountPath"] for m in container.get("volumeMounts", [])):
                yield f"{pod.where}: jobs have the rights of the autoscaler"
    for path, spec in ray_clusters(files):
        if spec.get("enableInTreeAutoscaling"):
            yield from (f"{path}: autoscaler: {w}" for w in _privileges(spec["autoscalerOptions"]))


def _privileges(container: Mapping[str, Any]) -> Iterator[str]:
    says = container.get("securityContext", {})
    if says.get("allowPrivilegeEscalation") is not False or says.get("privileged"):
        yield "may become another user"
    if says.get("capabilities") != {"drop": ["ALL"]}:
        yield "has capabilities"


def bounded(files: Files) -> Iterator[str]:
    """Nothing takes all of a machine, nor runs, fails or stays for ever."""
    for pod in pods(files):
        for container in pod.spec["containers"]:
            for kind in ("requests", "limits"):
                lacks = {"cpu", "memory"} - container.get("resources", {}).get(kind, {}).keys()
                yield from (f"{pod.where}: no {name} in {kind}" for name in sorted(lacks))
    for path, job in ray_jobs(files):
        for name in ("activeDeadlineSeconds", "backoffLimit", "ttlSecondsAfterFinished"):
            if not job.get(name):
                yield f"{path}: no {name}"
        if job.get("shutdownAfterJobFinishes") is not True:
            yield f"{path}: its cluster stays"
    for path, one in of_kind(files, "CronJob", "RayCronJob"):
        spec = one["spec"]
        job = spec["jobTemplate"].get("spec", spec["jobTemplate"])
        # KubeRay's deadline is of an attempt, a Job's of all of them
        attempts = job.get("backoffLimit", 0) + 1 if one["kind"] == "RayCronJob" else 1
        if not 0 < job.get("activeDeadlineSeconds", 0) * attempts < 24 * 3600:
            yield f"{path}: a night may last into the next"
        if spec.get("timeZone") != "Etc/UTC" or "suspend" not in spec:
            yield f"{path}: whose time?"
        if one["kind"] == "CronJob":
            if spec.get("concurrencyPolicy") != "Forbid":
                yield f"{path}: concurrencyPolicy {spec.get('concurrencyPolicy')}"
            if "backoffLimit" not in job or "ttlSecondsAfterFinished" not in job:
                yield f"{path}: failed Jobs stay, or are tried for ever"
    if len({*_schedules(files)}) != 1:
        yield f"schedules differ: {[*_schedules(files)]}"


def _schedules(files: Files) -> Iterator[str]:
    yield schedule(files)[1]
    yield from (one["spec"]["schedule"] for _, one in of_kind(files, "CronJob", "RayCronJob"))


def bytes_of(quantity: str) -> int:
    """Of a quantity of Kubernetes, such as 4Gi."""
    number, unit = re.fullmatch(r"(\d+)(Ki|Mi|Gi|Ti)?", quantity).groups()  # type: ignore[union-attr]
    return int(number) * 1024 ** ("", "Ki", "Mi", "Gi", "Ti").index(unit or "")


def fitting(files: Files) -> Iterator[str]:
    """Shared memory, GPUs, scaling and volumes are as Ray, and our runs, need them."""
    claims = {one["metadata"]["name"] for _, one in of_kind(files, "PersistentVolumeClaim")}
    for pod in pods(files):
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        bound = [
            v["persistentVolumeClaim"] for v in volumes.values() if "persistentVolumeClaim" in v
        ]
        used = {claim["claimName"] for claim in bound}
        yield from (f"{pod.where}: claim {name} is not there" for name in sorted(used - claims))
        (container,) = pod.spec["containers"]
        mounts = {m["mountPath"]: m["name"] for m in container.get("volumeMounts", [])}
        yield from (f"{pod.where}: no volume {n}" for n in sorted({*mounts.values()} - {*volumes}))
        if not pod.group:
            continue
        shared = volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {})
        store = int(pod.group["rayStartParams"].get("object-store-memory", 0))
        if shared.get("medium") != "Memory" or bytes_of(shared["sizeLimit"]) < store or not store:
            yield f"{pod.where}: /dev/shm has no room for the object store"
        limits = container["resources"]["limits"]
        if bytes_of(shared.get("sizeLimit", "0")) > bytes_of(limits["memory"]) / 2:
            yield f"{pod.where}: /dev/shm takes the container's memory"
        tolerated = any(t["key"] == "nvidia.com/gpu" for t in pod.spec.get("tolerations", []))
        if ("nvidia.com/gpu" in limits) != tolerated:
            yield f"{pod.where}: GPUs without a toleration, or the reverse"
        if "nvidia.com/gpu" in limits and pod.group["minReplicas"] < 1:
            yield f"{pod.where}: a run that starts before the first GPU does without"
    for path, spec in ray_clusters(files):
        groups = spec["workerGroupSpecs"]
        grows = any(g["minReplicas"] != g["maxReplicas"] for g in groups)
        if grows != bool(spec.get("enableInTreeAutoscaling")):
            yield f"{path}: groups that grow and an autoscaler belong together"
        if grows and spec.get("autoscalerOptions", {}).get("version") != "v2":
            yield f"{path}: not the autoscaler v2"
        if spec["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
            yield f"{path}: work lands on the head"
        if not groups:
            yield f"{path}: no workers"
    types = cluster_file(files)["available_node_types"]
    for name, node in types.items():
        gpus = node["resources"].get("GPU", 0)
        if gpus and (node["min_workers"] < 1 or "--gpus all" not in str(node.get("docker"))):
            yield f"{CLUSTER}: {name}: its GPUs are not there, or not seen"
    if types["head"]["resources"] != {"CPU": 0, "GPU": 0}:
        yield f"{CLUSTER}: work lands on the head"


def versioned(files: Files) -> Iterator[str]:
    """The versions in the files are those that are pinned."""
    for path, spec in ray_clusters(files):
        if spec["rayVersion"] != pinned("ray"):
            yield f"{path}: Ray {spec['rayVersion']}"
    for found in re.findall(r"ray\.__version__ == '([\d.]+)'", files[CLUSTER]):
        if found != pinned("ray"):
            yield f"{CLUSTER}: Ray {found}"


ROOTS, LOG = "REELWRIGHT_ALLOWED_ROOTS", "REELWRIGHT_LOG"


def limited(files: Files) -> Iterator[str]:
    """Jobs are told where they may read and write, which is where the files' own commands do."""
    found: dict[str, dict[str, str]] = {}
    for pod in pods(files):
        if not pod.group:
            continue
        env = {v["name"]: v.get("value", "") for c in pod.spec["containers"] for v in c["env"]}
        if ROOTS not in env or env.get(LOG) != "json":
            yield f"{pod.where}: no {ROOTS}, or no structured log"
        if found.setdefault(pod.path, env).get(ROOTS) != env.get(ROOTS):
            yield f"{pod.where}: other roots than elsewhere in the cluster"
    options = " ".join(cluster_file(files)["docker"].get("run_options", []))
    if f"--env {ROOTS}=" not in options or f"--env {LOG}=json" not in options:
        yield f"{CLUSTER}: no {ROOTS}, or no structured log"
    for path, words in commands(files):
        env = found.get(path, found["kubernetes/raycluster.yaml"])
        yield from (f"{path}: {word} is outside" for word in _outside(words, env.get(ROOTS, "")))


def _outside(words: Sequence[str], allowed: str) -> Iterator[str]:
    for word in words:
        place = re.search(r"(?:^|=)(s3://.+|/.+)$", word)
        if place and not any(place[1].startswith(f"{root}/") for root in allowed.split(",")):
            yield place[1]


def in_our_namespace(files: Files) -> Iterator[str]:
    """The NetworkPolicy and the Secrets are where the pods are."""
    for path, one in documents(files):
        named = one["metadata"].get("namespace", one["metadata"]["name"])
        if named != "reelwright" or (one["kind"] != "Namespace") != (
            "namespace" in one["metadata"]
        ):
            yield f"{path}: {one['kind']} in {one['metadata'].get('namespace')}"
    told = "\n".join(files.values())
    for name in sorted(set(re.findall(r"(?:(?:KeyRef|Ref): \{name|secretName): ([\w-]+)", told))):
        if f"create secret generic {name} " not in told:
            yield f"no command makes the Secret {name}"


POLICIES = (
    authenticated, closed, one_image, no_secrets, unprivileged, bounded, fitting, limited,
    versioned, in_our_namespace,
)  # fmt: skip


def schema(kind: str) -> dict[str, Any]:
    """KubeRay's own, in which no field is allowed that it does not name."""
    return json.loads(Path(SCHEMAS, f"{kind.lower()}.v1.json").read_text(encoding="utf-8"))
