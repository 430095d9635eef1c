"""What the notebook of `core.tracking` can't show: properties of the gate, several processes, crashes between two steps, and a real tracking server."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shopai.core.artifacts import ModelStore
from shopai.core.config import UsageError, get_settings
from shopai.core.manifest import BundleError, write_manifest
from shopai.core.tracking import Tracker, broken_limits, figures, gate

NUMBERS = st.floats(-1e6, 1e6)
LIMITS = st.dictionaries(st.sampled_from(["hr", "coverage"]), st.fixed_dictionaries({}, optional={"min": NUMBERS, "max": NUMBERS}), max_size=2)
METRICS = st.dictionaries(st.sampled_from(["ndcg", "hr", "coverage"]), st.one_of(NUMBERS, st.sampled_from([math.nan, math.inf, -math.inf])))


# The gate


@given(candidate=METRICS, champion=st.none() | METRICS, limits=LIMITS, gain=st.floats(0, 10))
def test_gate_does_what_its_definition_says(candidate, champion, limits, gain):
    "The rule written once more, in another way: a list of everything that must hold."
    decision = gate(candidate, champion, "ndcg", limits, gain)
    mine = candidate.get("ndcg", math.nan)
    theirs = -math.inf if champion is None else champion.get("ndcg", math.nan)
    wants = [math.isfinite(mine), champion is None or math.isfinite(theirs), mine > theirs, mine - theirs >= gain - 1e-12]
    for name, bounds in limits.items():
        value = candidate.get(name, math.nan)
        wants += [math.isfinite(value), value >= bounds.get("min", -math.inf), value <= bounds.get("max", math.inf)]
    assert decision.promote == all(wants)


@given(candidate=METRICS, champion=st.none() | METRICS, limits=LIMITS, gain=st.floats(0, 10))
def test_gate_gives_reasons_that_can_be_kept(candidate, champion, limits, gain):
    before = json.dumps([candidate, champion, limits])
    decision = gate(candidate, champion, "ndcg", limits, gain)
    assert decision.reasons and all(reason and "\n" not in reason for reason in decision.reasons)
    assert json.loads(json.dumps(decision.to_dict(), allow_nan=False))["promote"] == decision.promote
    assert json.dumps([candidate, champion, limits]) == before, "the gate changed its arguments"


@given(x=NUMBERS, y=NUMBERS, champion=NUMBERS, gain=st.floats(0, 10))
def test_gate_is_monotone(x, y, champion, gain):
    "What is good enough stays so when it gets better."
    low, high = sorted((x, y))
    assert gate({"ndcg": low}, {"ndcg": champion}, "ndcg", min_gain=gain).promote <= gate({"ndcg": high}, {"ndcg": champion}, "ndcg", min_gain=gain).promote


@given(x=NUMBERS, champion=NUMBERS, gain=st.floats(0, 10))
def test_gate_for_errors_mirrors_the_one_for_scores(x, champion, gain):
    assert gate({"loss": x}, {"loss": champion}, "loss", min_gain=gain, smaller_is_better=True).promote == \
        gate({"score": -x}, {"score": -champion}, "score", min_gain=gain).promote


@given(metrics=METRICS)
def test_no_model_beats_itself(metrics):
    assert not gate(metrics, metrics, "ndcg").promote


@given(a=NUMBERS, b=NUMBERS)
def test_figures_tell_different_numbers_apart(a, b):
    texts = figures(a, b)
    assert [float(text) for text in texts] == pytest.approx([a, b], abs=5.1e-5)
    if abs(a - b) > 1e-11: assert texts[0] != texts[1]


@pytest.mark.parametrize("value", [None, "0.3", True, math.nan])
def test_what_is_no_number_breaks_its_limit(value):
    assert "coverage is not a finite number" in broken_limits({"coverage": value}, {"coverage": {"min": 0}})[0]


# Runs


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    "An empty MLflow database; making one takes seconds, copying it none."
    home = tmp_path_factory.mktemp("template")
    assert Tracker(get_settings(home=home)).versions("recommend") == []
    return home / "mlflow.db"


@pytest.fixture
def tracker(database: Path, tmp_path: Path) -> Tracker:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(database, home)
    return Tracker(get_settings(home=home))


def bundle(folder: Path, weights: str = "{}", **fields) -> Path:
    folder.mkdir(parents=True)
    (folder / "weights.json").write_text(weights)
    write_manifest(folder, **{"name": "recommend", "kind": "ease", "metrics": {"ndcg@10": .098}, **fields})
    return folder


def run_python(code: str, *arguments, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


ONE_RUN = """
import sys
from shopai.core.config import get_settings
from shopai.core.tracking import Tracker
tracker = Tracker(get_settings(home=sys.argv[1]))
with tracker.run("recommend", sys.argv[2], {"epochs": 3}) as run:
    for epoch in range(20): run.log_metrics({"loss": 1 / (epoch + 1)}, step=epoch)
"""


def test_processes_that_start_at_once_share_a_new_database(tmp_path: Path):
    processes = [run_python(ONE_RUN, tmp_path / "home", f"run-{number}") for number in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    tracker = Tracker(get_settings(home=tmp_path / "home"))
    experiment = tracker.client.get_experiment_by_name("recommend").experiment_id
    runs = tracker.client.search_runs([experiment])
    assert sorted(run.info.run_name for run in runs) == ["run-0", "run-1"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all(len(tracker.client.get_metric_history(run.info.run_id, "loss")) == 20 for run in runs)


def test_a_process_killed_among_the_migrations_leaves_no_half_database(tmp_path: Path):
    process = run_python(ONE_RUN, tmp_path / "home", "run-0")
    def written() -> int:
        try: return max((file.stat().st_size for file in (tmp_path / "home").glob("*mlflow.db*")), default=0)
        except FileNotFoundError: return 0  # a journal that has just gone

    while written() < 50_000:  # the first tables are there
        assert process.poll() is None, process.stdout.read()
        time.sleep(.01)
    process.kill()
    process.communicate()
    assert not (tmp_path / "home" / "mlflow.db").exists()
    with Tracker(get_settings(home=tmp_path / "home")).run("recommend", "run-1"): pass


def test_nobody_hears_mlflow_and_nothing_is_left_outside_the_home(tmp_path: Path):
    code = ONE_RUN + """
import os, mlflow
assert not [name for name in os.environ if name.startswith("MLFLOW")], "the environment was changed"
assert not mlflow.is_tracking_uri_set(), "the global address was changed"
from mlflow.telemetry.client import get_telemetry_client
assert get_telemetry_client() is None, "usage is reported"
"""
    (tmp_path / "cwd").mkdir()
    process = run_python(code, tmp_path / "home", "run-0", cwd=tmp_path / "cwd")
    output, _ = process.communicate(timeout=240)
    assert (process.returncode, output) == (0, "")
    assert list((tmp_path / "cwd").iterdir()) == []


def test_import_costs_no_mlflow():
    code = "import sys, shopai.core.tracking; print(sorted({'mlflow', 'pandas', 'sqlalchemy', 'pyarrow', 'torch'} & set(sys.modules)))"
    assert run_python(code).communicate(timeout=60)[0].strip() == "[]"


def test_a_run_of_fifty_metrics_is_quick(tracker: Tracker):
    def seconds(number: int) -> float:
        start = time.perf_counter()
        with tracker.run("recommend", f"run-{number}", {"epochs": 3}) as run: run.log_metrics({f"hr@{k}": k / 50 for k in range(50)})
        return time.perf_counter() - start

    assert min(seconds(number) for number in range(3)) < 1


def test_more_metrics_than_mlflow_takes_at_once(tracker: Tracker):
    with tracker.run("recommend", "wide") as run: run.log_metrics({f"item {number}": number for number in range(1500)})
    assert len(tracker.client.get_run(run.mlflow_id).data.metrics) == 1500


def test_a_run_goes_on_under_its_id(tracker: Tracker):
    first = tracker.run("recommend", "20261124T101500-c0ffee", {"epochs": 3})
    with tracker.run("recommend", "20261124T101500-c0ffee", {"epochs": 4}) as again: pass
    assert again.mlflow_id == first.mlflow_id
    ended = tracker.client.get_run(first.mlflow_id)
    assert (ended.info.status, ended.data.params) == ("FINISHED", {"epochs": "3"})


def test_files_are_kept_in_the_home(tracker: Tracker, tmp_path: Path):
    (tmp_path / "curve.txt").write_text("loss")
    with tracker.run("recommend", "run-0") as run: run.log_file(tmp_path / "curve.txt")
    assert [path.read_text() for path in (tracker.settings.home / "mlartifacts").rglob("curve.txt")] == ["loss"]


def test_two_homes_never_meet(tracker: Tracker, database: Path, tmp_path: Path):
    (tmp_path / "other").mkdir()
    shutil.copy(database, tmp_path / "other")
    other = Tracker(get_settings(home=tmp_path / "other"))
    with tracker.run("recommend", "run-0") as run: tracker.register(bundle(tmp_path / "bundle"), "recommend", run)
    assert (len(tracker.versions("recommend")), other.versions("recommend"), other.mark_failed("run-0", "x")) == (1, [], False)


# Versions


def champions(tracker: Tracker) -> tuple[str | None, str | None]:
    "What serving reads, by a fresh eye, and what the registry says."
    served = ModelStore(tracker.settings.store_location).champion("recommend")
    alias = tracker.client.get_registered_model("recommend").aliases.get("champion")
    return served and served["version"], alias and str(alias)


@pytest.fixture
def two_versions(tracker: Tracker, tmp_path: Path) -> Tracker:
    "Version 1.0 (number 1) serves, 2.0 (number 2) is registered."
    for version in ("1.0", "2.0"): tracker.register(bundle(tmp_path / version, f'"{version}"', version=version), "recommend")
    tracker.promote("recommend", "1.0")
    assert champions(tracker) == ("1.0", "1")
    return tracker


@pytest.mark.parametrize("step", ["publish", "alias", "champion"])
def test_a_crash_between_two_steps_leaves_the_old_champion(two_versions: Tracker, step: str, monkeypatch: pytest.MonkeyPatch):
    def crash(*_, **__): raise KeyboardInterrupt
    store, client = two_versions.store, two_versions.client
    owner, method = {"publish": (store, "publish"), "alias": (client, "set_registered_model_alias"), "champion": (store, "promote")}[step]
    with monkeypatch.context() as patched:
        patched.setattr(owner, method, crash)
        with pytest.raises(KeyboardInterrupt): two_versions.promote("recommend", "2.0")
    assert champions(two_versions)[0] == "1.0"
    assert [entry["version"] for entry in two_versions.versions("recommend") if entry["champion"]] == ["1.0"]
    two_versions.promote("recommend", "2.0")  # and the next try gets there
    assert champions(two_versions) == ("2.0", "2")
    assert (two_versions.rollback("recommend"), champions(two_versions)) == ("1.0", ("1.0", "1"))


@pytest.mark.parametrize("when", ["before it is registered", "before it is promoted", "after it was published"])
def test_one_flipped_byte_is_refused(two_versions: Tracker, tmp_path: Path, when: str):
    folder = bundle(tmp_path / "3.0", '"3.0"', version="3.0")
    if when != "before it is registered": two_versions.register(folder, "recommend")
    if when == "after it was published": two_versions.store.publish(folder, "recommend", "3.0")
    spoiled = (tmp_path / "home" / "models" / "recommend" / "3.0" if when == "after it was published" else folder) / "weights.json"
    spoiled.write_text('"3.1"')
    with pytest.raises(BundleError, match="weights.json"):
        if when == "before it is registered": two_versions.register(folder, "recommend")
        else: two_versions.promote("recommend", "3.0")
    assert champions(two_versions)[0] == "1.0"


def test_an_old_version_comes_back_although_its_run_is_deleted(two_versions: Tracker, tmp_path: Path):
    two_versions.promote("recommend", "2.0")
    shutil.rmtree(tmp_path / "1.0")
    assert (two_versions.promote("recommend", "1"), champions(two_versions)) == ("1.0", ("1.0", "1"))


def test_rollback_to_a_version_of_another_home(two_versions: Tracker, database: Path, tmp_path: Path):
    "Two homes share a store; what the other one published has no number in this registry."
    (tmp_path / "other").mkdir()
    shutil.copy(database, tmp_path / "other")
    other = Tracker(get_settings(home=tmp_path / "other", model_store=two_versions.settings.store_location))
    other.register(bundle(tmp_path / "3.0", '"3.0"', version="3.0"), "recommend")
    other.promote("recommend", "3.0")
    assert (other.rollback("recommend"), champions(other)) == ("1.0", ("1.0", None))


def test_the_first_champion_has_none_to_go_back_to(two_versions: Tracker):
    with pytest.raises(UsageError, match="no earlier champion"): two_versions.rollback("recommend")
    assert champions(two_versions) == ("1.0", "1")


def test_what_a_version_tells(tracker: Tracker, tmp_path: Path):
    with tracker.run("recommend", "20261124T101500-c0ffee") as run: number = tracker.register(bundle(tmp_path / "bundle"), "recommend", run)
    tracker.record("recommend", number, gate({"ndcg@10": .098}, {"ndcg@10": .1073}))
    [entry] = tracker.versions("recommend")
    assert entry | {"created": "", "source": ""} == {
        "version": "20261124T101500-c0ffee", "number": 1, "kind": "ease", "run_id": "20261124T101500-c0ffee", "metrics": {"ndcg@10": .098}, "gate": "refuse",
        "reasons": "ndcg@10 .0980 does not beat the champion's .1073", "champion": False, "created": "", "source": ""}
    assert tracker.client.get_model_version("recommend", "1").run_id == run.mlflow_id


def test_a_home_with_an_awkward_name(database: Path, tmp_path: Path):
    home = tmp_path / "müller's shop #1 @home"
    home.mkdir()
    shutil.copy(database, home)
    tracker = Tracker(get_settings(home=home))
    with tracker.run("recommend", "20261124T101500-c0ffee") as run:
        run.log_file(database.parent / "mlflow.db.lock")
        tracker.register(bundle(home / "bundle"), "recommend", run)
    assert tracker.promote("recommend", "1") == "20261124T101500-c0ffee"
    assert [path.is_relative_to(home) for path in tmp_path.rglob("mlflow.db.lock")] == [True] * 2


def test_a_home_that_cannot_be_written_in_an_address(tmp_path: Path):
    with pytest.raises(UsageError, match="SHOPAI_TRACKING_URI: .* must not contain % or"): Tracker(get_settings(home=tmp_path / "a%20b")).versions("recommend")
    assert list(tmp_path.iterdir()) == []


# A tracking server


@pytest.fixture
def server(tmp_path: Path):
    "A real MLflow server; gives its address."
    with socket.create_server(("127.0.0.1", 0)) as probe: port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--backend-store-uri",
               f"sqlite:///{tmp_path / 'server.db'}", "--artifacts-destination", str(tmp_path / "server")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with open(tmp_path / "server.log", "w") as log:
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(240):
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            except OSError: time.sleep(.5)
            else: break
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def test_a_tracking_server_elsewhere(server: str, tmp_path: Path):
    tracker = Tracker(get_settings(home=tmp_path / "home", tracking_uri=server))
    for number, ndcg in ((1, .0331), (2, .098)):
        with tracker.run("recommend", f"2026112{number}T101500-c0ffee", {"epochs": 3}) as run:
            run.log_metrics({"ndcg@10": ndcg})
            folder = bundle(tmp_path / f"bundle-{number}", f'"{number}"', metrics={"ndcg@10": ndcg})
            assert tracker.register(folder, "recommend", run) == str(number)
        shutil.rmtree(folder)  # the server holds it now
        tracker.promote("recommend", str(number))
    assert champions(tracker) == ("20261122T101500-c0ffee", "2")
    assert (tracker.rollback("recommend"), champions(tracker)) == ("20261121T101500-c0ffee", ("20261121T101500-c0ffee", "1"))
    dead = tracker.run("recommend", "20261124T101500-c0ffee")
    assert tracker.mark_failed(dead.run_id, "the kernel was killed")
    assert tracker.client.get_run(dead.mlflow_id).info.status == "FAILED"
    with pytest.raises(UsageError, match="together with the run"): tracker.register(bundle(tmp_path / "alone", version="9"), "recommend")
