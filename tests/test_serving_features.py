"What the shop knows about a customer now, over HTTP: looked up, used, labelled, and done without when the store is away."

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from feast_store import Feast, free_port, redis_at, stop
from shop_server import ASK, ROOT, running

from serving.features import VISIT, combine
from shopai.features.catalogue import DAY, HOUR, MINUTE, PROJECT, VIEWS
from shopai.features.online import Looked


def now() -> int: return time.time_ns() // 1_000


def feast(folder: Path, redis: str | None = None) -> Callable[..., None]:
    "A new store, made as the shop makes it, and how to write into it: what a visit or customer has seen until `at` (µs; default just now), oldest first."
    folder.mkdir(parents=True, exist_ok=True)
    store = Feast(folder, PROJECT, [VIEWS["user_context"], VIEWS["session_context"]], redis, guarded=True)

    def write(view: str, key: str, items: list[str], at: int | None = None, **features: int) -> None:
        at = now() if at is None else at
        (name,), places = VIEWS[view].keys, {f"recent_item_{place}": item for place, item in enumerate(items[::-1], 1)}
        store.write(view, [({name: key}, {"seen_at": at, **places, **features}, at)])

    return write


class Redis:
    "A server of one's own that can be frozen, killed and started again, empty."

    def __init__(self):
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.location = f"redis://{self.address}/0"
        self.start()

    def start(self) -> None: self.process = redis_at(self.port)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=15)

    def freeze(self) -> None: self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None: self.process.send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def redis():
    if shutil.which("redis-server") is None: pytest.skip("redis-server is not installed")
    server = Redis()
    yield server
    server.thaw()
    stop(server.process)


@pytest.fixture(scope="module")
def write_redis(redis: Redis, tmp_path_factory): return feast(tmp_path_factory.mktemp("redis"), redis.address)


@pytest.fixture(scope="module", params=["sqlite", "redis"])
def store(request, shop, tmp_path_factory):
    "A server over a store of either kind, and how to write into it."
    folder = tmp_path_factory.mktemp("store")
    if request.param == "redis": location, write = request.getfixturevalue("redis").location, request.getfixturevalue("write_redis")
    else: location, write = str(folder / "online.db"), feast(folder)
    with running(shop[0], folder / "log", SHOPAI_ONLINE_STORE=location) as server:
        server.wait_ready()
        server.wait(lambda: server.ask(ASK, {"user_id": "somebody"})[1]["context"] == "none")
        yield server, write


def ask(server, **body) -> tuple[str, dict]:
    "The label, and the answer as the package gives it."
    status, answer = server.ask(ASK, body)
    assert status == 200, answer
    return answer["context"], {name: answer[name] for name in ("fallback", "items")}


# --- what is known is used ---


def test_a_visit_under_way_is_used(shop, store):
    "A known customer, one who is new, and a visitor: each gets what the package gives for the same items."
    (_, bought, recommender), (server, write) = shop, store
    looked = bought.item_ids[[3, 9, 20]].tolist()
    customer = str(bought.user_ids[1])
    for user in (customer, "newcomer"):
        write("user_context", user, looked)
        assert ask(server, user_id=user, k=7) == ("live", recommender.recommend(user, k=7, recent=looked).to_dict())
    assert recommender.recommend(customer, recent=looked).items != recommender.recommend(customer).items
    assert recommender.recommend("newcomer", recent=looked).fallback is None
    write("session_context", "visit", looked)
    assert ask(server, session_id="visit") == ("live", recommender.recommend(item_ids=looked).to_dict())
    items = bought.item_ids[[4, 9]].tolist()
    assert ask(server, session_id="visit", item_ids=items) == ("live", recommender.recommend(item_ids=items, recent=looked).to_dict())


def test_the_visit_goes_before_the_customer_and_the_newer_before_the_older(shop, store):
    (_, bought, recommender), (server, write) = shop, store
    customer, at = str(bought.user_ids[2]), now() - 5 * MINUTE
    here, elsewhere = bought.item_ids[[5]].tolist(), bought.item_ids[[6]].tolist()
    write("session_context", "here", here, at)
    for seconds, used in ((0, here), (60, elsewhere)):  # at the same moment; on another device, a minute later
        write("user_context", customer, elsewhere, at + seconds * 1_000_000)
        assert ask(server, user_id=customer, session_id="here") == ("live", recommender.recommend(customer, recent=used).to_dict())


def test_an_earlier_visit_is_not_told_to_the_model(shop, store):
    (_, bought, recommender), (server, write) = shop, store
    customer = str(bought.user_ids[3])
    write("user_context", customer, bought.item_ids[[5]].tolist(), now() - 2 * HOUR)
    assert ask(server, user_id=customer) == ("none", recommender.recommend(customer).to_dict())


def test_what_was_ordered_since_the_models_data_is_not_offered_again(shop, store):
    (_, bought, recommender), (server, write) = shop, store
    customer, at = str(bought.user_ids[4]), now() - 2 * DAY
    best = [item.item_id for item in recommender.recommend(customer, k=3).items]
    write("user_context", customer, best, at, orders=3, last_order_at=at)
    assert ask(server, user_id=customer) == ("live", recommender.recommend(customer, exclude=best).to_dict())
    write("user_context", customer, best, at, orders=3, last_order_at=(recommender.histories.now - 1) * 1_000_000)  # an order that the model's data hold
    assert ask(server, user_id=customer) == ("none", recommender.recommend(customer).to_dict())


def test_what_is_too_old_and_what_is_unknown_is_labelled(shop, store):
    (_, bought, recommender), (server, write) = shop, store
    customer, items = str(bought.user_ids[5]), bought.item_ids[[5]].tolist()
    write("user_context", customer, items, now() - 401 * DAY)
    write("session_context", "long-ago", items, now() - 2 * DAY)
    plain = recommender.recommend(customer).to_dict()
    assert ask(server, user_id=customer) == ("stale", plain)
    assert ask(server, user_id=customer, session_id="long-ago") == ("stale", plain)
    assert ask(server, session_id="long-ago") == ("stale", recommender.recommend(item_ids=[]).to_dict())
    assert ask(server, user_id="nobody") == ("none", recommender.recommend("nobody").to_dict())
    assert ask(server, session_id="nothing") == ("none", recommender.recommend(item_ids=[]).to_dict())
    assert ask(server, item_ids=items) == ("none", recommender.recommend(item_ids=items).to_dict())


def test_odd_names_are_looked_up(shop, store):
    server, write = store
    for name in ("語 😀", "a\0b", "'; DROP TABLE x; --", "x" * 128, " "):
        assert ask(server, user_id=name)[0] == ask(server, session_id=name)[0] == "none"
        write("user_context", name, shop[1].item_ids[[5]].tolist())
        assert ask(server, user_id=name)[0] == "live"


# --- the store is away ---


def test_a_store_that_comes_later_is_found(shop, tmp_path):
    "Nobody has made one yet: answers say so, until it is there; and again when it is taken away."
    _, bought, recommender = shop
    file, looked, customer = tmp_path / "features" / "online.db", bought.item_ids[[5]].tolist(), str(bought.user_ids[0])
    with running(shop[0], tmp_path / "log", SHOPAI_ONLINE_STORE=str(file)) as server:
        server.wait_ready()
        assert ask(server, user_id=customer) == ("off", recommender.recommend(customer).to_dict())
        assert ask(server, session_id="visit")[0] == "off"
        feast(file.parent)("user_context", customer, looked)
        server.wait(lambda: ask(server, user_id=customer) == ("live", recommender.recommend(customer, recent=looked).to_dict()))
        file.unlink()
        server.wait(lambda: ask(server, user_id=customer)[0] == "off")
        assert [line["state"] for line in server.events("online features")] == ["off", "live", "off"]
        assert "shopai features apply" in server.events("online features")[0]["reason"]


def test_a_file_that_is_no_store_is_unavailable(shop, tmp_path):
    (tmp_path / "online.db").write_bytes(b"no database" * 1000)
    with running(shop[0], tmp_path / "log", SHOPAI_ONLINE_STORE=str(tmp_path / "online.db")) as server:
        server.wait_ready()
        server.wait(lambda: ask(server, user_id="a")[0] == "unavailable")
        assert "Traceback" not in server.log


def test_a_store_that_is_down_keeps_nothing_from_starting(shop, tmp_path):
    "Nobody listens there. It is said once, without the password."
    with running(shop[0], tmp_path / "log", SHOPAI_ONLINE_STORE="redis://:a-secret@127.0.0.1:1/0") as server:
        server.wait_ready()
        for _ in range(5): assert ask(server, user_id="a") == ("unavailable", shop[2].recommend("a").to_dict())
        assert [line["state"] for line in server.wait(lambda: server.events("online features"))] == ["unavailable"]
        assert "a-secret" not in server.log and "Traceback" not in server.log


def test_a_location_that_is_none_is_one_line_and_exit_code_2(shop, tmp_path):
    with running(shop[0], tmp_path / "log", SHOPAI_ONLINE_STORE="mysql://host/db") as server:
        assert server.process.wait(timeout=30) == 2
        assert server.log.count("\n") == 1 and "online store: must be sqlite:///" in server.log


class Load(threading.Thread):
    "50 requests a second; each is kept with its label and its seconds."

    def __init__(self, server, body: dict):
        super().__init__(daemon=True)
        self.server, self.body, self.answers, self._ended = server, body, [], threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.02):
            began = time.monotonic()
            try: status, answer = self.server.ask(ASK, self.body)
            except Exception as error: status, answer = 0, {"context": repr(error)}
            self.answers.append((status, answer["context"], len(answer.get("items", ())), time.monotonic() - began))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self.join(timeout=20)

    def reach(self, label: str) -> None:
        "Wait until ten answers in a row bear a label."
        end = time.monotonic() + 20
        while [answer[1] for answer in self.answers[-10:]] != [label] * 10:
            assert time.monotonic() < end, f"waited in vain for {label}: {self.answers[-10:]}\n{self.server.log}"
            time.sleep(0.05)


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_redis_goes_in_mid_load_and_comes_back(how: str, shop, redis: Redis, write_redis, tmp_path: Path):
    "Answers go on, labelled; when it is back, so are the features."
    _, bought, _ = shop
    customer, looked = str(bought.user_ids[0]), bought.item_ids[[5]].tolist()
    write_redis("user_context", customer, looked)
    with running(shop[0], tmp_path / "log", SHOPAI_ONLINE_STORE=redis.location) as server:
        server.wait_ready()
        with Load(server, {"user_id": customer}) as load:
            load.reach("live")
            if how == "killed": redis.kill()
            else: redis.freeze()
            load.reach("unavailable")
            time.sleep(1)  # some questions of the thread's are in vain meanwhile
            before = len(load.answers)
            if how == "killed":
                redis.start()
                write_redis("user_context", customer, looked)
            else:
                redis.thaw()
            load.reach("live")
        assert before < len(load.answers) and {status for status, *_ in load.answers} == {200}
        assert {count for _, _, count, _ in load.answers} == {10}
        assert set(label for _, label, *_ in load.answers) <= {"unavailable", "live", "none"}  # none: started again, and not yet filled
        assert max(seconds for *_, seconds in load.answers) < 1
        states = [line["state"] for line in server.events("online features")]
        assert states[-2:] == ["unavailable", "live"] and len(states) <= 5, "a change is told once, and not with each request"
        assert "Traceback" not in server.log


# --- the parts ---


def test_a_visit_ends_where_sessions_end():
    from shopai.events.sessions import GAP
    assert VISIT == GAP


def looked(age: int, items: list[str], status: str = "fresh", **values: int) -> Looked:
    nothing = dict.fromkeys(VIEWS["user_context"].all_names)
    if status != "fresh": return Looked(status, nothing, None)
    return Looked(status, nothing | {f"recent_item_{place}": item for place, item in enumerate(items[::-1], 1)} | values, 10**15 - age)


@pytest.mark.parametrize(("found", "label", "recent", "withheld"), [
    ([], "none", "", ""),
    ([looked(0, [], "unknown")], "none", "", ""),
    ([looked(0, [], "stale"), looked(0, [], "unknown")], "stale", "", ""),
    ([looked(0, [], "stale"), looked(VISIT, ["a", "b"])], "live", "ab", ""),
    ([looked(VISIT + 1, ["a"])], "none", "", ""),
    ([looked(0, [])], "none", "", ""),  # has only searched so far
    ([looked(-5 * MINUTE, ["a"])], "live", "a", ""),  # a clock that is ahead
    ([looked(0, ["a"], last_order_at=8)], "live", "a", "a"),
    ([looked(DAY, ["a"], last_order_at=8)], "live", "", "a"),
    ([looked(DAY, ["a"], last_order_at=7)], "none", "", ""),
    ([looked(0, ["a"]), looked(DAY, ["b", "c"], last_order_at=8)], "live", "a", "bc"),
])
def test_what_is_known_becomes_one_context(found, label, recent, withheld):
    context = combine(found, 10**15, data_until=7)
    assert (context.label, context.recent, context.withheld) == (label, tuple(recent), tuple(withheld))


def test_a_process_that_asks_redis_holds_none_of_the_training_libraries(shop, redis: Redis):
    code = f"""
import json, sys
from serving.app import create_app
from shopai.core.config import Settings
features = create_app(Settings(home={str(shop[0])!r}, online_store={redis.location!r})).state.features
features.away = None
assert features.context("nobody", "nothing", 0).label == "none"
print(json.dumps(sorted({{"feast", "pandas", "torch", "pyarrow", "sqlalchemy", "narwhals", "deltalake", "mlflow"}} & set(sys.modules))))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
