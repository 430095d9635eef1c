"""MLflow on a real PostgreSQL: in production the tracking database is one, and several machines open it at once."""

import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from shopai.core.config import UsageError, get_settings
from shopai.core.manifest import write_manifest
from shopai.core.tracking import Tracker, gate

psycopg2 = pytest.importorskip("psycopg2")
SERVER = {"host": "127.0.0.1", "port": 5432, "user": "postgres"}


def administer(*statements: str) -> None:
    connection = psycopg2.connect(dbname="postgres", connect_timeout=5, **SERVER)
    connection.autocommit = True  # a database can't be made in a transaction
    try:
        with connection.cursor() as cursor:
            for statement in statements: cursor.execute(statement)
    finally: connection.close()


@pytest.fixture
def database():
    "Address of an empty database of the test's own."
    name = f"shopai_test_{uuid4().hex[:12]}"
    try: administer(f"create database {name}")
    except psycopg2.OperationalError as error: pytest.skip(f"no PostgreSQL on 127.0.0.1:5432: {str(error).splitlines()[0]}")
    yield f"postgresql://postgres@127.0.0.1:5432/{name}"
    administer(f"drop database {name} with (force)")


ONE_RUN = """
import sys
from shopai.core.config import get_settings
from shopai.core.tracking import Tracker
with Tracker(get_settings(home=sys.argv[1], tracking_uri=sys.argv[2])).run("recommend", sys.argv[3], {"epochs": 3}) as run: run.log_metrics({"ndcg@10": .098})
"""


def test_a_season_on_postgresql(database: str, tmp_path: Path):
    # homes on two machines share nothing but the database
    processes = [subprocess.Popen([sys.executable, "-c", ONE_RUN, tmp_path / f"home-{number}", database, f"run-{number}"],
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for number in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert outputs == ["", ""]

    tracker = Tracker(get_settings(home=tmp_path / "home", tracking_uri=database))
    assert tracker.uri.startswith("postgresql+psycopg2://")
    runs = tracker.client.search_runs([tracker.client.get_experiment_by_name("recommend").experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["run-0", "run-1"]
    assert {(run.info.status, run.data.metrics["ndcg_at_10"]) for run in runs} == {("FINISHED", .098)}

    for version in ("1.0", "2.0"):
        folder = tmp_path / version
        folder.mkdir()
        (folder / "weights.json").write_text(version)
        write_manifest(folder, name="recommend", kind="ease", version=version)
        tracker.register(folder, "recommend")
        tracker.record("recommend", version, gate({"ndcg@10": .098}, None))
        tracker.promote("recommend", version)
    versions = [(entry["version"], entry["champion"], entry["gate"]) for entry in tracker.versions("recommend")]
    assert versions == [("2.0", True, "promote"), ("1.0", False, "promote")]
    assert tracker.rollback("recommend") == "1.0"
    assert str(tracker.client.get_model_version_by_alias("recommend", "champion").version) == "1"
    assert tracker.mark_failed("run-1", "the kernel was killed")
    assert not (tmp_path / "home" / "mlflow.db").exists()


def test_a_database_that_is_not_there_is_named(database: str, tmp_path: Path):
    missing = database.replace("postgres@", "postgres:sesame@") + "_missing"
    with pytest.raises(UsageError, match="SHOPAI_TRACKING_URI: cannot open .*_missing.*does not exist") as caught:
        Tracker(get_settings(home=tmp_path, tracking_uri=missing)).versions("recommend")
    assert "sesame" not in str(caught.value)
