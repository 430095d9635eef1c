"The same customer gets the same items and scores from the executed notebook, from the package and over HTTP; and what is served is what was measured."

import time
from pathlib import Path

import numpy as np
import pytest
from feast_store import Feast
from shop_command import SMALL, champion, done, read, runs
from shop_server import running

from shopai.core.config import get_settings
from shopai.core.lake import Lake
from shopai.data.interactions import purchases
from shopai.data.splits import temporal_split
from shopai.features.catalogue import PROJECT, VIEWS
from shopai.recommend.bundle import Recommender
from shopai.recommend.leaderboard import evaluate

ASK = "/v1/recommendations"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    "A home with a champion."
    home = tmp_path_factory.mktemp("parity")
    done(home, "data", "build", *SMALL)
    done(home, "run", "recommend")
    return home


@pytest.fixture(scope="module")
def package(home: Path) -> Recommender: return Recommender.load(home / "models" / "recommend" / champion(home)["version"])


@pytest.fixture(scope="module")
def server(home: Path):
    with running(home, home / "log") as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def answers(home: Path) -> dict: return read(runs(home)[0] / "answers.json")


def assert_same(one: list[dict], other: list[dict], count: int) -> None:
    "The same items in the same places, under the same titles, with scores that differ by less than 1e-5."
    assert len(one) == len(other) == count
    for key in ("rank", "item_id", "title"): assert [item[key] for item in one] == [item[key] for item in other]
    np.testing.assert_allclose([item["score"] for item in one], [item["score"] for item in other], rtol=0, atol=1e-5)


def test_customers_get_the_same_from_notebook_package_and_http(answers: dict, package: Recommender, server):
    assert len(answers) >= 20
    for user, written in answers.items():
        status, served = server.ask(ASK, {"user_id": user})
        assert (status, served["model_version"], written["fallback"]) == (200, package.version, None)
        computed = package.recommend(user_id=user).to_dict()
        assert served["fallback"] is computed["fallback"] is None
        assert_same(written["items"], computed["items"], 10)
        assert_same(written["items"], served["items"], 10)
    lists = {tuple(item["item_id"] for item in written["items"]) for written in answers.values()}
    assert len(lists) > len(answers) / 2, "that everybody gets the same would make parity easy"


def test_nobody_is_recommended_what_they_have(home: Path, answers: dict):
    "By the events themselves, not by the bundle's histories."
    events = Lake(home / "lake").read("events", where="event_name = 'purchase'")
    for user, written in answers.items():
        assert not {item["item_id"] for item in written["items"]} & set(events.loc[events["user_id"] == user, "item_id"])


def test_sessions_get_the_same_from_package_and_http(package: Recommender, server):
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 5, 8) * 4:
        session = [package.item_ids[i] for i in rng.choice(len(package.item_ids), size, replace=False)]
        _, served = server.ask(ASK, {"item_ids": [*session, "no such item"], "k": 7, "exclude": [package.item_ids[0]]})
        computed = package.recommend(item_ids=[*session, "no such item"], k=7, exclude=[package.item_ids[0]]).to_dict()
        assert served["fallback"] is computed["fallback"] is None
        assert_same(computed["items"], served["items"], 7)
        assert not {item["item_id"] for item in served["items"]} & {*session, package.item_ids[0]}


def test_a_visit_under_way_gets_the_same_from_package_and_http(home: Path, answers: dict, package: Recommender, server):
    "What the online store tells the API, told to the package by hand; customers whom the notebook asked for without a visit are left alone."
    folder = Path(get_settings(home=home).online_location.removeprefix("sqlite://")).parent
    folder.mkdir(exist_ok=True)
    store, now, rng = Feast(folder, PROJECT, [VIEWS["user_context"]], guarded=True), time.time_ns() // 1_000, np.random.default_rng(1)
    users = [user for user in package.user_ids if user not in answers][:10] + ["newcomer"]
    seen = {user: [package.item_ids[i] for i in rng.choice(len(package.item_ids), 5, replace=False)] for user in users}
    store.write("user_context", [({"user_id": user}, {"seen_at": now, **{f"recent_item_{5 - place}": item for place, item in enumerate(items)}}, now)
                                 for user, items in seen.items()])
    server.wait(lambda: server.ask(ASK, {"user_id": "somebody"})[1]["context"] == "none")
    for user, items in seen.items():
        _, served = server.ask(ASK, {"user_id": user})
        computed = package.recommend(user, recent=items).to_dict()
        assert (served["context"], served["fallback"], computed["fallback"]) == ("live", None, None)
        assert_same(computed["items"], served["items"], 10)
        assert computed["items"] != package.recommend(user).to_dict()["items"]


def test_strangers_get_the_same_from_package_and_http(package: Recommender, server):
    for body, reason in (({"user_id": "nobody"}, "unknown_user"), ({"item_ids": ["no such item"]}, "unknown_items")):
        _, served = server.ask(ASK, body)
        computed = package.recommend(**body).to_dict()
        assert served["fallback"] == computed["fallback"] == reason
        assert_same(computed["items"], served["items"], 10)


def test_similar_items_are_the_same_from_package_and_http(package: Recommender, server):
    told = 0
    for code in range(len(package.item_ids)):
        item = package.item_ids[code]
        status, served = server.ask(f"/v1/items/{item}/similar?k=5")
        computed = package.similar(item, 5)
        assert status == 200
        assert_same([each.to_dict() for each in computed], served["items"], len(computed))
        told += len(computed)
    assert told > 3 * len(package.item_ids)


def test_what_is_served_is_what_was_measured(home: Path, package: Recommender, server):
    "The published bundle, asked about the weeks before the test window, earns the figures of the run once more: in the run, in its manifest and over HTTP."
    bought = purchases(Lake(home / "lake").read("events"))
    figures = evaluate(package.ranker(bought.item_ids), temporal_split(bought).test)
    assert figures == pytest.approx(read(runs(home)[0] / "metrics.json"), abs=1e-9)
    [told] = server.ask("/v1/models")[1]["models"]
    assert told["metrics"] == pytest.approx(figures, abs=1e-9)
