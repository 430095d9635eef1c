"What the shop knows, asked for on the command line: lists, the job, look-ups of now and of then, pushes, and what is said when something is wrong."

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest
from shop_command import called, done, environment, read, runs, shopai

from shopai.core.config import get_settings
from shopai.core.lake import Lake
from shopai.events.bus import LocalBus
from shopai.events.wire import Door, read_event


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    "A tiny simulated shop whose features were computed by the job."
    home = tmp_path_factory.mktemp("features") / "home"
    done(home, "data", "build", "--customers", "40", "--items", "160", "--days", "60", "--no-pictures")
    done(home, "run", "features", "-p", "title_models=[fasttext]", "-p", "look_ups=20")
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch) -> Path:
    "A copy of it, which the command of this process finds."
    shutil.copytree(made, tmp_path / "home", ignore=shutil.ignore_patterns("runs", "mlflow*"))
    registry = tmp_path / "home" / "features" / "feature_store.yaml"
    registry.write_text(registry.read_text().replace(str(made), str(tmp_path / "home")))
    monkeypatch.setenv("SHOPAI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "home"


@pytest.fixture
def command(monkeypatch, capsys):
    "`shopai features …` in this process: exit code, what it shows, what it complains about."
    return lambda *arguments, **variables: called(monkeypatch, capsys, "features", *arguments, **variables)


def customer(home: Path) -> str:
    "Somebody who bought."
    return Lake(str(home / "lake")).read("events", ["user_id"], where="event_name = 'purchase' and consent").user_id.iloc[0]


def test_the_job_says_what_it_did(made: Path):
    [folder] = runs(made, "features")
    metrics, manifest = read(folder / "metrics.json"), read(folder / "manifest.json")
    assert metrics["online_difference"] <= 1e-6
    assert manifest["title_model"] == "fasttext" and manifest["rows"]["item_text"] == 160
    assert metrics["title_share"] > 2 * metrics["title_chance"]
    assert (folder / "encoders" / "titles").is_dir() and (folder / "notebook.html").exists()


def test_all_features_are_listed_with_unit_owner_and_age(command, tmp_path: Path):
    shown = done(tmp_path, "features", "list")
    assert "user_context · by user_id · customers · good for 400 days" in shown
    assert "since the content of the cart changed" in shown and "shop's currency" in shown
    listed = json.loads(command("list", "--json", "--view", "category_season")[1])
    assert listed[0]["keys"] == ["category", "week"] and listed[0]["features"][0]["name"] == "season_index"


def test_what_is_known_now_and_what_was_known_then(home: Path, command):
    user = customer(home)
    code, shown, _ = command("get", "--user", user, "--view", "user_context")
    assert code == 0 and f"user_context · {user} · " in shown
    bought = Lake(str(home / "lake")).read("events", where=f"user_id = '{user}' and event_name = 'purchase'").event_time
    asked = lambda moment: json.loads(command("get", "--user", user, "--view", "user_context", "--at", moment.isoformat(), "--json")[1])["user_context"]
    before, after = asked(bought.min() - timedelta(seconds=1)), asked(bought.max())
    assert before["features"]["orders"] in (0, None) and after["features"]["orders"] >= 1
    assert after["features"]["recency_days"] == 0 and after["features"]["is_first_time_shopper"] is False


def test_somebody_unknown_is_said_to_be(home: Path, command):
    told = json.loads(command("get", "--user", "nobody", "--json")[1])
    assert {view["status"] for view in told.values()} == {"unknown"} and set(told) == {"user_context", "user_als"}
    assert {view["status"] for view in json.loads(command("get", "--item", "none", "--json")[1]).values()} == {"unknown"}


def test_what_was_known_by_then_is_brought_online(home: Path, command):
    rows = lambda *more: command("materialize", "--view", "item_text", *more)[1]
    assert "│ item_text │          160 │" in rows() and "│ item_text │            0 │" in rows("--full", "--until", "2025-01-01T00:00:00Z")


def test_rows_of_ones_own_are_pushed(home: Path, command, tmp_path: Path):
    rows = pd.DataFrame({"item_id": ["mug"], "event_timestamp": [pd.Timestamp.now("UTC").as_unit("us")], "vector": [[.6, .8]]})
    rows.to_parquet(tmp_path / "rows.parquet")
    assert "1 rows of item_recommender are online" in command("push", "item_recommender", tmp_path / "rows.parquet")[1]
    assert json.loads(command("get", "--item", "mug", "--json")[1])["item_recommender"]["features"]["vector"] == pytest.approx([.6, .8])


def sent(home: Path, *events: dict) -> None:
    "On the bus, as the API would have put them."
    now, bus = datetime.now(UTC), LocalBus(home / "bus")
    read_in = [read_event({"consent": True, "event_time": (now - timedelta(seconds=2)).isoformat(), **event}, now, Door()) for event in events]
    bus.send([(event.key, event.to_json()) for event in read_in])
    bus.close()


def test_a_cart_is_known_as_soon_as_its_event_has_landed(home: Path, command, monkeypatch, capsys):
    "From the bus to the online store in one go, for a customer and for the visit of somebody without a name."
    cart = {"event_name": "add_to_cart", "item_id": "I1", "quantity": 2, "price": 3.5, "currency": "GBP"}
    sent(home, {"event_id": "a", "user_id": "newcomer", "session_id": "v1", **cart}, {"event_id": "b", "session_id": "v2", **cart})
    code, shown, complaints = called(monkeypatch, capsys, "events", "ingest", "--once", "--wait", ".05")
    assert code == 0 and "features: " in shown and "rows put online" in shown, complaints
    known = json.loads(command("get", "--user", "newcomer", "--view", "user_context", "--json")[1])["user_context"]
    assert known["status"] == "fresh" and known["features"]["cart_value"] == 7 and known["features"]["cart_abandoned"] is False
    session = Lake(str(home / "lake")).read("events", where="event_id = 'b'").session_id.iloc[0]
    assert json.loads(command("get", "--session", session, "--json")[1])["session_context"]["features"]["cart_size"] == 1


def test_without_push_nothing_goes_online_and_a_later_push_catches_up(home: Path, command, monkeypatch, capsys):
    sent(home, {"event_id": "a", "user_id": "newcomer", "session_id": "v1", "event_name": "view_item", "item_id": "I1"})
    assert "features: " not in called(monkeypatch, capsys, "events", "ingest", "--once", "--wait", ".05", "--no-push")[1]
    state = lambda: json.loads(command("get", "--user", "newcomer", "--view", "user_context", "--json")[1])["user_context"]["status"]
    assert state() == "unknown"
    assert "rows put online" in command("push")[1] and state() == "fresh"


def test_a_store_that_is_down_stops_no_event(home: Path, command, monkeypatch, capsys):
    "Events land; their features wait, and are told to."
    down = {"SHOPAI_ONLINE_STORE": "redis://127.0.0.1:1/0"}
    sent(home, {"event_id": "a", "user_id": "newcomer", "session_id": "v1", "event_name": "view_item", "item_id": "I1"})
    code, shown, _ = called(monkeypatch, capsys, "events", "ingest", "--once", "--wait", ".05", **down)
    assert code == 0 and "wait: " in shown
    assert len(Lake(str(home / "lake")).read("events", where="event_id = 'a'")) == 1
    code, _, complaints = command("get", "--user", "newcomer", **down)
    assert code == 1 and complaints.startswith("failed: ") and "127.0.0.1:1" in complaints


@pytest.mark.parametrize(("arguments", "message"), [
    (["get"], "give exactly one of --user, --item and --session"),
    (["get", "--user", "a", "--item", "b"], "give exactly one of --user, --item and --session"),
    (["get", "--user", "a", "--view", "item_text"], "--view: item_text is by item_id, not by user_id"),
    (["get", "--user", "a", "--view", "nope"], "view: there is no 'nope'; known are user_context"),
    (["get", "--user", "a", "--at", "yesterday"], "--at must be a time such as 2026-01-31T12:00:00Z, got 'yesterday'"),
    (["get", "--user", "a", "--at", "2026-01-31"], "--at must have a zone"),
    (["list", "--view", "nope"], "view: there is no 'nope'"),
    (["push", "item_text"], "FILE is missing"),
    (["push", "item_text", "rows.txt"], "FILE must be .parquet or .csv"),
    (["push", "item_text", "none.csv"], "FILE: none.csv does not exist"),
    (["materialize", "--until", "soon"], "--until must be a time"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_wrong_use_is_one_line(command, arguments: list, message: str, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("SHOPAI_HOME", str(tmp_path))
    code, shown, complaints = command(*arguments)
    assert code == 2 and message in complaints and len(complaints.splitlines()) == 1 and not shown


def test_a_wrong_place_is_named(command, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("SHOPAI_HOME", str(tmp_path))
    code, _, complaints = command("get", "--user", "a", SHOPAI_ONLINE_STORE="ftp://x")
    assert code == 2 and "online store: must be sqlite:///path/of/a/file or redis://" in complaints


def test_before_anything_is_there_the_way_is_shown(command, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("SHOPAI_HOME", str(tmp_path))
    code, _, complaints = command("get", "--user", "a")
    assert code == 1 and "shopai run features" in complaints
    code, _, complaints = command("materialize")
    assert code == 2 and "shopai run features" in complaints
    assert get_settings().home == tmp_path


@pytest.mark.parametrize(("parameter", "message"), [
    ("neighbours=0", "neighbours"), ("title_models=[bert]", "title_models"), ("new_share=2", "new_share"), ("nope=1", "nope")])
def test_a_wrong_parameter_fails_before_any_work(tmp_path: Path, parameter: str, message: str):
    result = shopai(tmp_path / "home", "run", "features", "-p", parameter)
    assert result.returncode == 2 and message in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    assert not (tmp_path / "home" / "features").exists()


def test_help_teaches(command):
    for name in ("list", "apply", "materialize", "push", "get"):
        code, page, _ = command(name, "--help")
        assert code == 0 and len(page) > 200, name
    assert environment(Path("x"))["SHOPAI_HOME"] == "x"
