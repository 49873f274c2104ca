"""What watchers see of a run: Ray's metrics, Grafana's dashboard of them, and log lines as JSON."""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from conftest import REPOSITORY, Cluster, Ran, Run, rows
from prometheus_client.parser import text_string_to_metric_families

from engine import command, logs, observe
from engine.tables import read

DASHBOARD = json.loads((REPOSITORY / "cluster" / "grafana.json").read_text(encoding="utf-8"))
PANELS = [p for p in DASHBOARD["panels"] if p["type"] != "row"]
EXPRESSIONS = [t["expr"] for p in PANELS for t in p["targets"]]
UNITS = {"short", "percentunit", "s", "rowsps", "bytes", "Bps"}
OURS = f"ray_{observe.PREFIX}"
LABELS_OF_RAY = {"run", "le", "instance", "GpuIndex", "dataset", "operator"}


def names_in(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Metrics that an expression reads, with the labels that it asks for."""
    found: list[tuple[str, set[str]]] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append((node.name, {m.name for m in node.matchers.matchers}))
        for child in ("expr", "lhs", "rhs", "vector_selector", "param"):
            if (below := getattr(node, child, None)) is not None:
                visit(below)
        for argument in getattr(node, "args", ()):
            visit(argument)

    visit(parsed(expression))
    yield from found


def parsed(expression: str) -> Any:
    filled = expression.replace("$__rate_interval", "5m").replace("$run", ".*")
    filled = filled.replace("$session", ".*")
    assert "$" not in filled, expression
    return promql_parser.parse(filled)


def exported(name: str) -> str:
    """A metric's name without what Prometheus adds to those of a histogram."""
    return re.sub(r"_(bucket|sum|count)$", "", name.removeprefix(OURS))


# The dashboard


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    read_by = {name for e in EXPRESSIONS for name, _ in names_in(e)}
    ours = {exported(name) for name in read_by if name.startswith(OURS)}
    assert ours == set(observe.METRICS)
    others = {name for name in read_by if not name.startswith(OURS)}
    assert all(re.match(r"ray_(node|data|object_store|resources)", name) for name in others)


def test_the_dashboard_asks_for_labels_that_there_are() -> None:
    for expression in EXPRESSIONS:
        for name, labels in names_in(expression):
            if name.startswith(OURS):
                known = {"run", "le", *observe.METRICS[exported(name)].labels}
                assert labels <= known, expression
                assert "run" in labels, f"not of the chosen runs: {expression}"
        grouped = re.findall(r"by \(([^)]*)\)", expression)
        for label in (one.strip() for group in grouped for one in group.split(",")):
            ours = {label for m in observe.METRICS.values() for label in m.labels}
            assert label in ours | LABELS_OF_RAY, expression


def test_a_slip_in_an_expression_is_seen() -> None:
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        parsed("sum by (stage) (rate(ray_reelwright_rows_total[5m])")
    ((name, labels),) = names_in("rate(ray_reelwright_row_total{runn='a'}[5m])")
    assert exported(name) not in observe.METRICS and labels == {"runn"}


def test_grafana_can_import_the_dashboard() -> None:
    assert DASHBOARD["schemaVersion"] >= 36 and DASHBOARD["uid"] and "id" not in DASHBOARD
    variables = {v["name"]: v for v in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    ids = [p["id"] for p in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    for panel in PANELS:
        assert panel["title"] and panel["description"]
        assert panel["datasource"]["uid"] == "${datasource}"
        unit = panel["fieldConfig"]["defaults"]["unit"]
        assert unit in UNITS or re.fullmatch(r"suffix: \w+/\w+", unit), panel["title"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}" and target["legendFormat"]
    titles = [p["title"] for p in PANELS]
    assert len(titles) == len(set(titles))


def test_panels_do_not_overlap() -> None:
    taken: Counter[tuple[int, int]] = Counter()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for x in range(at["x"], at["x"] + at["w"]):
            taken.update((x, y) for y in range(at["y"], at["y"] + at["h"]))
    assert set(taken.values()) == {1}


def test_other_code_names_no_metric() -> None:
    """All that is exported is in METRICS: nothing else makes metrics of Ray."""
    for package in ("engine", "pipelines", "trainers", "evals", "cluster"):
        for path in (REPOSITORY / package).rglob("*.py"):
            makes = "ray.util.metrics" in path.read_text(encoding="utf-8")
            assert not makes or path.name == "observe.py", path


# A run on a real head


@pytest.fixture(scope="module")
def ran(samples: Path, cluster: Cluster, run_in_session: Run, tmp_path_factory: Any) -> Any:
    """A curation by the command line with its log as JSON: its end, and its dataset."""
    src, root = tmp_path_factory.mktemp("watched"), tmp_path_factory.mktemp("data") / "set"
    for name in ("coffee_pan.mp4", "coins.jpg", "truncated.mp4", "not_a_video.mp4"):
        shutil.copy(samples / name, src)
    shutil.copy(samples / "coins.jpg", src / "same.jpg")
    env = {logs.VARIABLE: "json"}
    done = run_in_session("curate", "--src", src, "--dst", root, "--json", env=env)
    assert done.code == 0, done.err
    return done, root


def scraped(cluster: Cluster, run_id: str, timeout_s: float = 120.0) -> dict[str, dict]:
    """What the node's metrics port says of a run: by name, values by the labels that are ours.

    When it says the same twice: not all of a run's metrics need to come at once.
    """
    before: dict[str, dict] | None = None
    file = cluster.repository.parent / "prom_metrics_service_discovery.json"
    deadline = time.monotonic() + timeout_s
    while True:
        found: dict[str, dict] = defaultdict(dict)
        for address in json.loads(file.read_text())[0]["targets"]:
            try:
                with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
                    text = answer.read().decode()
            except OSError:  # ports of the head's own are the same for each Ray of a machine
                continue
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    labels = sample.labels
                    if sample.name.startswith(OURS) and labels.get("run") == run_id[:8]:
                        known = (*observe.METRICS[exported(sample.name)].labels, "le")
                        key = tuple(labels[name] for name in known if name in labels)
                        found[sample.name.removeprefix(OURS)][key] = sample.value
        if (found.get("dataset_rows") and found == before) or time.monotonic() > deadline:
            return found
        before = found
        time.sleep(3)


@pytest.mark.slow
def test_the_metrics_of_a_run_are_its_accounts(ran: tuple[Ran, Path], cluster: Cluster) -> None:
    done, root = ran
    printed = done.json
    found = scraped(cluster, printed["run_id"])
    counted = found["rows_total"]
    sources, clips = printed["sources"], printed["clips"]
    assert sources["done"] == 2 and sources["failed"] == 2 and sources["duplicate"] == 1
    for state in ("done", "failed", "duplicate"):
        assert counted["sources", "scan", "Scan", state] == sources[state]
        assert found["dataset_rows"]["sources", state] == sources[state]
    assert counted["clips", "scan", "Scan", "done"] == clips["total"] > 0
    for state in ("kept", "rejected", "failed", "duplicate", "pending"):
        assert found["dataset_rows"]["clips", state] == clips[state]
    measured = {key[2]: num for key, num in counted.items() if key[1] not in ("scan",)}
    tallies = {name: tally for name, tally in printed["measured"].items() if tally["rows"]}
    assert measured == {name: tally["rows"] for name, tally in tallies.items()} and measured
    seconds = {key[1]: num for key, num in found["seconds_total"].items() if key[0] != "scan"}
    assert seconds == pytest.approx({name: t["seconds"] for name, t in tallies.items()}, rel=1e-3)
    batches = {key[1]: n for key, n in found["batch_seconds_count"].items() if key[0] != "scan"}
    assert batches == {name: tally["batches"] for name, tally in tallies.items()}
    assert found["frames_decoded_total"][()] == printed["frames_decoded"]
    read_bytes = sum(r["size_bytes"] for r in rows(root, "sources") if r["state"] == "done")
    assert found["source_bytes_total"][()] == read_bytes
    failed = Counter(r["error_type"] for r in rows(root, "sources") if r["state"] == "failed")
    assert found["failures_total"] == {("scan", "Scan", kind): n for kind, n in failed.items()}
    assert found["progress_done"]["scanning",] == found["progress_total"]["scanning",] == 4
    assert found["waiting_rows"]["scanning",] == 0
    assert abs(found["seen_timestamp_seconds"][()] - time.time()) < 600


@pytest.mark.slow
def test_a_run_logs_json_lines_with_its_id_and_those_of_rows(
    ran: tuple[Ran, Path], cluster: Cluster
) -> None:
    done, root = ran
    run_id = done.json["run_id"]
    lines = [json.loads(line) for line in done.err.splitlines()]
    assert {line["run_id"] for line in lines if "run_id" in line} == {run_id}
    assert all({"ts", "level", "event", "message"} <= line.keys() for line in lines)
    events = [line["event"] for line in lines]
    assert events.count("run_started") == events.count("run_ended") == 1
    wrong = {r["source_id"]: r for r in rows(root, "sources") if r["state"] == "failed"}
    failed = {line["row_id"]: line for line in lines if line["event"] == "row_failed"}
    assert failed.keys() == wrong.keys() and len(wrong) == 2
    for row_id, line in failed.items():
        row = wrong[row_id]
        assert (line["stage"], line["level"]) == ("scan", "INFO")
        assert line["error_type"] == row["error_type"] and line["message"] == row["error"]
        assert line["uri"] == row["uri"]
    # and in the logs of workers, which nobody sends to the driver
    logged = [
        json.loads(text)
        for file in cluster.repository.parent.glob("session_*/logs/worker-*.err")
        for text in file.read_text(errors="replace").splitlines()
        if text.startswith("{") and run_id in text
    ]
    assert {one["row_id"] for one in logged if one["event"] == "row_failed"} == wrong.keys()
    (told,) = read(str(root), "runs").to_table(columns=["run_id"])["run_id"].to_pylist()
    assert told == run_id


# Without Ray, and without JSON


def test_nothing_is_counted_without_ray_or_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "_make", lambda name: pytest.fail(f"{name} was made"))
    monkeypatch.setattr(observe, "_made", {})
    monkeypatch.setattr(logs, "_of_process", None)  # other tests may have been workers of a run
    work = {"table": "clips", "stage": "scan", "operator": "Scan"}
    observe.worked(states={"done": 1}, seconds=1.0, **work)  # of no run
    monkeypatch.setattr(observe, "_connected", lambda: False)
    with observe.of_run("a" * 36):
        observe.worked(states={"done": 1}, seconds=1.0, **work)
        observe.progress("scanning", 1, 2)
        observe.holds({"clips": {"kept": 1}})


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What would be given to Ray: metric, what is done with it, value, labels."""
    calls: list[tuple] = []

    class Metric:
        def __init__(self, name: str):
            self.name = name

        def __getattr__(self, how: str) -> Any:
            return lambda value, tags: calls.append((self.name, how, value, tags))

    monkeypatch.setattr(observe, "_connected", lambda: True)
    monkeypatch.setattr(observe, "_make", Metric)
    monkeypatch.setattr(observe, "_made", {})
    monkeypatch.setattr(observe, "_known_errors", set())
    return calls


def test_labels_stay_few_whatever_fails(told: list[tuple]) -> None:
    failures = [observe.Failure(str(n), f"Error{n}", "of its own kind") for n in range(500)]
    failures += [observe.Failure("x", "a sentence, no class", "")]
    work = {"table": "clips", "stage": "scan", "operator": "Scan"}
    with observe.of_run("1234567890"):
        observe.worked(states={"failed": len(failures)}, failures=failures, **work)
    counted = {tags["error_type"]: v for n, _, v, tags in told if n == "failures_total"}
    assert len(counted) == observe.ERROR_TYPES + 1 and sum(counted.values()) == len(failures)
    assert counted["other"] == len(failures) - observe.ERROR_TYPES
    assert {tags["run"] for *_, tags in told} == {"12345678"}
    for name, _, _, tags in told:
        assert tags.keys() == {"run", *observe.METRICS[name].labels}


def test_what_is_counted_before_ray_is_there_is_told_when_it_is(
    told: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = {"table": "sources", "stage": "scan", "operator": "Scan"}
    with observe.of_run("r"):
        monkeypatch.setattr(observe, "_connected", lambda: False)
        observe.worked(states={"duplicate": 2}, **work)
        observe.worked(states={"duplicate": 1}, **work)
        assert told == []
        monkeypatch.setattr(observe, "_connected", lambda: True)
        observe.worked(states={"done": 4}, **work)
        observe.worked(states={"done": 5}, **work)
    assert [(v, tags["state"]) for *_, v, tags in told] == [(3, "duplicate"), (4, "done"),
                                                            (5, "done")]  # fmt: skip


def test_progress_is_told_once_a_second_and_at_the_end(told: list[tuple]) -> None:
    with observe.of_run("r"):
        for done in range(1, 2001):
            observe.progress("scanning", done, 2000)
        observe.progress("judging", 0, 0)
    said = [value for name, _, value, _ in told if name == "progress_done"]
    assert said[0] == 1 and said[-1] == 2000 and len(said) <= 4
    assert {tags["stage"] for name, _, _, tags in told if name == "progress_done"} == {"scanning"}


@pytest.fixture
def fresh_logging() -> Iterator[None]:
    """The root logger as a new process has it, put back afterwards."""
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    levels = {name: logging.getLogger(name).level for name in logs.OURS}
    yield
    root.handlers[:], root.level = before
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(False)


def log_a_few(num: int) -> None:
    with observe.of_run("run-1"):
        failures = [observe.Failure(f"row-{n}", "DecodeError", f"broken {n}") for n in range(num)]
        work = {"table": "clips", "stage": "look", "operator": "Look"}
        observe.worked(states={"failed": num}, failures=failures, **work)
        logging.getLogger("engine.anything").warning("a %s", "word\nor two")


def test_text_is_as_ever(
    fresh_logging: None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(logs.VARIABLE, raising=False)
    logging.getLogger().handlers[:] = []  # pytest's own, of this test
    command.set_up_logging()
    log_a_few(3)
    assert capsys.readouterr().err == "a word\nor two\n"


def test_thousands_of_failures_do_not_flood_the_log(
    fresh_logging: None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(logs.VARIABLE, "json")
    command.set_up_logging()
    log_a_few(5000)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    failed = [line for line in lines if line["event"] == "row_failed"]
    assert [line["row_id"] for line in failed] == [f"row-{n}" for n in range(observe.LINES)]
    assert {line["run_id"] for line in lines} == {"run-1"}
    (rest,) = [line for line in lines if line["event"] == "failures_not_logged"]
    assert rest["error_type"] == "DecodeError" and rest["level"] == "WARNING"
    (other,) = [line for line in lines if line["event"] == "message"]
    assert other["message"] == "a word\nor two" and other["logger"] == "engine.anything"
    with pytest.raises(SystemExit):
        command.fail("needs\n this")
    (last,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert (last["event"], last["message"]) == ("command_failed", "needs this")


def test_another_form_is_refused(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(logs.VARIABLE, "xml")
    with pytest.raises(SystemExit):
        command.set_up_logging()
    assert capsys.readouterr().err == (
        "error: REELWRIGHT_LOG is text or json, not 'xml': correct or unset it\n"
    )
