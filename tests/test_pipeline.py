"The whole chain, as Dagster runs it and as one command does."

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from shop_command import ROOT, SMALL, TINY, champion, complaint, done, environment, read, runs, shopai

from shopai.core.jobs import job_status
from shopai.core.lake import Lake
from shopai.data.shop_lake import SHOP_TABLES

FILE = ROOT / "experiments" / "pipeline.py"


@pytest.fixture(scope="module")
def pipeline():
    "The module of the assets."
    spec = importlib.util.spec_from_file_location("shopai_pipeline", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outcomes(shown: str) -> dict[str, str]:
    "Asset → outcome, from the table."
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if line.startswith("│")]
    return {asset: outcome for asset, outcome in rows}


def test_a_fresh_home_gets_a_shop_and_a_champion(home: Path):
    shown = done(home, "pipeline", "run", "--profile", "smoke", *SMALL[:-1])
    assert outcomes(shown) == {"shop_tables": "done", "live_events": "done", "features": "done", "recommend": "done"}
    assert {table for table in Lake(home / "lake").tables() if not table.startswith("features_")} == set(SHOP_TABLES)
    [folder] = runs(home)
    assert job_status(folder)["status"] == "done" and champion(home)["version"] == folder.name
    assert read(folder / "manifest.json")["profile"] == "smoke"
    ours = {"bus", "cache", "features", "lake", "images", "runs", "models", "mlflow.db", "mlflow.db.lock"}
    assert {path.name for path in home.iterdir()} == ours  # Dagster leaves nothing behind


def test_a_lake_is_kept_and_a_failing_job_is_one_line(home: Path, tmp_path: Path):
    "The notebook of this project raises: what came before it is done, and the exit code is 1."
    project = tmp_path / "project"
    for part in ("experiments", "params"): shutil.copytree(ROOT / part, project / part)
    path = next((project / "experiments").glob("*_features.ipynb"))
    notebook = nbformat.read(path, as_version=4)
    at = next(place for place, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    notebook.cells = [notebook.cells[at], nbformat.v4.new_code_cell("raise RuntimeError('the shop is closed')")]
    nbformat.write(notebook, path)
    done(home, "data", "build", *TINY)
    result = shopai(home, "pipeline", "run", SHOPAI_PROJECT=str(project))
    assert result.returncode == 1 and "Traceback" not in result.stdout + result.stderr
    [folder] = runs(home, "features")
    reason = f"features failed: RuntimeError: the shop is closed; see {folder}/notebook.html"
    assert result.stderr.splitlines()[-1] == f"failed: features: {reason}"
    shown = outcomes(result.stdout)
    assert shown["shop_tables"] == "done" and shown["features"].startswith("failed: ") and shown["recommend"] == "skipped"
    assert Lake(home / "lake").version("events") == 1 and champion(home) is None


@pytest.mark.parametrize(("arguments", "message"), [
    (["--source", "nope"], "shop_tables: unknown source 'nope'; known are synthetic, online-retail"),
    (["--source", "online-retail", "--path", "none.csv"], "shop_tables: no such file: none.csv"),
    (["--customers", "0"], "shop_tables: customers must be a whole number from 1 to 100,000"),
    (["--source", "online-retail"], "shop_tables: source 'online-retail' needs a file"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_wrong_source_stops_the_chain(home: Path, arguments: list, message: str):
    assert message in complaint(home, 2, "pipeline", "run", *arguments)
    assert not (home / "lake" / "events").exists() and not (home / "runs").exists()


def test_a_wrong_profile_stops_before_the_lake_is_built(home: Path):
    assert "profile: there is no params/nope/features.yaml" in complaint(home, 2, "pipeline", "run", "--profile", "nope")
    assert not (home / "lake").exists()


def test_what_dagster_sees(pipeline):
    "The assets in their order, and a schedule that asks for a run of all."
    import dagster as dg

    graph = pipeline.defs.resolve_asset_graph()
    assert graph.get(dg.AssetKey("recommend")).parent_keys == {dg.AssetKey("features")}
    assert graph.get(dg.AssetKey("features")).parent_keys == {dg.AssetKey("live_events")}
    assert graph.get(dg.AssetKey("live_events")).parent_keys == {dg.AssetKey("shop_tables")}
    schedule = pipeline.defs.resolve_schedule_def("nightly")
    assert schedule.cron_schedule == "0 3 * * *"
    with dg.DagsterInstance.ephemeral() as instance, dg.build_schedule_context(instance=instance, repository_def=pipeline.defs.get_repository_def()) as context:
        [request] = schedule.evaluate_tick(context).run_requests
    job = pipeline.defs.resolve_job_def(schedule.job_name)
    assert {key.to_user_string() for key in job.asset_layer.executable_asset_keys} == {"shop_tables", "live_events", "features", "recommend"}
    assert request.run_config == {}


def test_what_waits_on_the_bus_lands(home: Path, pipeline):
    import dagster as dg

    from shopai.core.config import get_settings
    from shopai.events.bus import open_bus

    waiting = b'{"v":1,"event_id":"e1","event_name":"view_item","event_time":"2026-03-02T12:00:00.000000Z"}'
    open_bus(get_settings().bus_location).send([(None, waiting)])
    with dg.DagsterInstance.ephemeral() as instance:
        for _ in range(2): assert dg.materialize([pipeline.live_events], instance=instance).success  # the second time there is nothing to do
    assert len(Lake(home / "lake").read("events")) == 1


def test_dagster_validates_the_file(home: Path, tmp_path: Path):
    command = [sys.executable, "-m", "dagster", "definitions", "validate", "-f", FILE]
    checked = subprocess.run(command, cwd=ROOT, env=environment(home, DAGSTER_HOME=str(tmp_path)), capture_output=True, text=True, timeout=120)
    assert checked.returncode == 0 and "All code locations passed validation" in checked.stdout + checked.stderr
