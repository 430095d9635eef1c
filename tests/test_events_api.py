"POST /v1/events by its contract: verdicts, durability, refusals, other sites, and what it must never tell."

import json
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta
from http.client import HTTPException

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from shop_server import ASK, ROOT, publish, running
from test_serving import anything, problem

from serving.app import create_app
from serving.config import get_serve_settings
from serving.schemas import MAX_BODY, EventsAccepted
from serving.services import events as service
from shopai.core.config import Settings, UsageError
from shopai.events.bus import BusUnavailable, LocalBus

EVENTS = "/v1/events"


def view(**fields) -> dict:
    "A page view of this moment, its ids new."
    return {"event_id": str(uuid.uuid4()), "event_name": "view_item", "anonymous_id": str(uuid.uuid4()), "item_id": "85123A", "consent": True, **fields}


class Client(TestClient):
    "A client of an app of its own, with eyes on the bus behind it."

    def __init__(self, home, origins=""):
        self.home = home
        super().__init__(create_app(Settings(home=home)), raise_server_exceptions=False)

    def kept(self) -> list[dict]:
        "All events on the bus, read as another process would."
        bus = LocalBus(self.home / "bus")
        try: return [json.loads(record.value) for record in bus.read({0: 0}, 100_000, wait=0)]
        finally: bus.close()

    def events(self, *events, **more): return self.post(EVENTS, json={"events": events, **more})


@pytest.fixture
def client(tmp_path):
    with Client(tmp_path) as client: yield client


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with Client(tmp_path_factory.mktemp("home")) as client: yield client


# --- taken ---


def test_events_are_on_the_bus_when_the_answer_comes_and_there_need_be_no_model(client):
    assert client.get("/readyz").status_code == 503
    sent = [view(), view(event_name="purchase", transaction_id="t1", items=[{"item_id": "a", "quantity": 2, "price": 1.5}, {"item_id": "b"}]), view()]
    answer = client.events(*sent)
    assert answer.status_code == 202
    EventsAccepted.model_validate(answer.json(), strict=True, extra="forbid")
    assert answer.json() == {"request_id": answer.headers["x-request-id"], "accepted": 3, "refused": 0,
                             "events": [{"status": "accepted", "event_id": event["event_id"]} for event in sent]}
    kept = client.kept()
    assert [event["event_id"] for event in kept] == [event["event_id"] for event in sent]
    assert kept[1]["items"][0] == {"item_id": "a", "quantity": 2, "price": 1.5} and kept[1]["transaction_id"] == "t1"
    assert all(abs(datetime.fromisoformat(event["received_at"]) - datetime.now(UTC)) < timedelta(minutes=1) for event in kept)


def test_each_event_has_its_verdict_and_a_wrong_one_harms_no_other(client):
    good, unknown, no_object, without_id = view(), view(event_name="sneeze"), 7, {"event_name": "view_item", "item_id": "a", "consent": True}
    answer = client.events(good, unknown, no_object, without_id).json()
    assert (answer["accepted"], answer["refused"]) == (2, 2)
    assert [verdict["status"] for verdict in answer["events"]] == ["accepted", "refused", "refused", "accepted"]
    assert "sneeze" in answer["events"][1]["reason"] and "\n" not in answer["events"][1]["reason"]
    assert [event["event_id"] for event in client.kept()] == [good["event_id"], answer["events"][3]["event_id"]]


def test_what_was_changed_on_the_way_in_is_said(client):
    answer = client.events(view(user_id="jane@example.com")).json()
    assert "SHOPAI_PSEUDONYM_KEY" in " ".join(answer["events"][0]["notes"])
    assert "jane@" not in json.dumps(client.kept()) and "jane@" not in json.dumps(answer)


def test_if_all_are_refused_it_is_a_422_with_all_reasons(client):
    answer = client.events(*[view(event_name=f"sneeze{i}") for i in range(12)])
    assert problem(answer, 422, "all-refused").startswith("none of 12 events could be taken; the first: ")
    assert [error["pointer"] for error in answer.json()["errors"]] == [f"#/events/{i}" for i in range(12)]
    assert "sneeze11" in answer.json()["errors"][11]["detail"]
    assert client.kept() == []


def test_500_events_are_one_request(client):
    sent = [view() for _ in range(500)]
    assert client.events(*sent).json()["events"] == [{"status": "accepted", "event_id": event["event_id"]} for event in sent]  # no note: a UUID names nobody
    assert [event["event_id"] for event in client.kept()] == [event["event_id"] for event in sent]


def test_a_beacon_is_taken_like_any_other_body(client):
    for kind in ("application/json", "text/plain", "text/plain;charset=UTF-8", None):
        answer = client.post(EVENTS, content=json.dumps({"events": [view()]}), headers={"content-type": kind} if kind else {})
        assert answer.status_code == 202
    assert len(client.kept()) == 4


def test_the_examples_of_the_documentation_are_accepted(client):
    operation = client.get("/openapi.json").json()["paths"][EVENTS]["post"]
    for name, example in operation["requestBody"]["content"]["application/json"]["examples"].items():
        moved = json.loads(json.dumps(example["value"]).replace("2026-03-01T", f"{datetime.now(UTC) - timedelta(days=1):%Y-%m-%d}T"))
        assert "sent_at" not in moved or moved.pop("sent_at")
        for event in moved["events"]: event.pop("timestamp_micros", None)
        answer = client.post(EVENTS, json=moved).json()
        assert answer.get("refused") == 0, (name, answer)
    EventsAccepted.model_validate(operation["responses"]["202"]["content"]["application/json"]["example"], extra="forbid")
    assert set(operation["responses"]) == {"202", "400", "403", "413", "422", "500", "503"}
    assert {event["event_name"] for event in client.kept()} == {"view_item", "purchase", "add_to_cart"}


def test_a_senders_wrong_clock_is_corrected_by_sent_at(client):
    wrong = datetime.now(UTC) + timedelta(days=400)
    assert client.events(view(event_time=wrong.isoformat())).status_code == 422  # from the future
    assert client.events(view(event_time=wrong.isoformat()), sent_at=wrong.isoformat()).status_code == 202
    assert abs(datetime.fromisoformat(client.kept()[0]["event_time"]) - datetime.now(UTC)) < timedelta(minutes=1)


# --- refused as a whole ---


@pytest.mark.parametrize(("body", "detail"), [
    ([], "the body must be a JSON object with events, sent_at, got a list of 0"),
    (None, "the body must be a JSON object with events, sent_at, got null"),
    ({}, "events must be a list of 1 to 500 events, got null"),
    ({"events": []}, "events must be a list of 1 to 500 events, got a list of 0"),
    ({"events": [{}] * 501}, "events must be a list of 1 to 500 events, got a list of 501"),
    ({"events": {"event_name": "view_item"}}, "events must be a list of 1 to 500 events, got an object"),
    ({"events": [{}], "batch": 1}, 'unknown field "batch"; known are events, sent_at'),
    ({"events": [{}], "\ud800\n": 1}, 'unknown field "\\ud800\\n"; known are events, sent_at'),
    ({"events": [{}], "sent_at": "noon"}, 'sent_at must be an ISO-8601 time with its offset, such as 2026-03-01T09:30:00Z, got "noon"'),
    ({"events": [{}], "sent_at": "2026-03-01T09:30:00"}, 'sent_at must be an ISO-8601 time with its offset, such as 2026-03-01T09:30:00Z, got "2026'),
    ({"events": [{}], "sent_at": 1772357398}, "sent_at must be an ISO-8601 time with its offset, such as 2026-03-01T09:30:00Z, got 1772357398"),
    ({"events": [{}], "sent_at": "0001-01-01T00:00:00+23:59"}, "sent_at must be"),
])
def test_a_wrong_request_is_told_what_to_change(shared, body, detail):
    answer = shared.post(EVENTS, content=json.dumps(body))
    assert problem(answer, 422, "invalid-request").startswith(detail)
    assert answer.json()["errors"][0]["detail"] == answer.json()["detail"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"events": ' + b"9" * 5000 + b"}", b'{"events": [NaN]}', b"events=1"])
def test_malformed_json_is_a_400(shared, content):
    assert "JSON" in problem(shared.post(EVENTS, content=content), 400, "invalid-json")


def test_a_body_that_is_too_long_is_refused(client):
    content = json.dumps({"events": [view(search_term="x" * 100_000)] * 21}).encode()
    assert f"{MAX_BODY} bytes" in problem(client.post(EVENTS, content=content), 413, "too-large")
    problem(client.post(EVENTS, content=(content[i : i + 65536] for i in range(0, len(content), 65536))), 413, "too-large")
    assert client.kept() == []


json_like = st.fixed_dictionaries({}, optional={
    name: anything for name in ("event_id", "event_name", "event_time", "user_id", "anonymous_id", "session_id", "items", "consent", "params", "properties",
                                "context", "name", "event", "timestamp", "ip", "quantity", "price", "item_id", "currency", "search_term", "timezone")})
named = st.builds(lambda name, rest: {**rest, "event_name": name}, st.sampled_from(["view_item", "purchase", "search"]), json_like)


@given(st.lists(named | json_like | anything, max_size=3) | anything, anything)
@settings(max_examples=200, deadline=None)
def test_fuzz_nothing_makes_a_500_and_what_is_accepted_is_kept(shared, events, sent_at):
    before = len(shared.kept())
    body = {"events": events} | ({} if sent_at is None else {"sent_at": sent_at})
    answer = shared.post(EVENTS, content=json.dumps(body, allow_nan=True))
    assert answer.status_code in (202, 400, 422), answer.text
    assert service.UNREADABLE not in answer.text
    assert len(shared.kept()) == before + (answer.json()["accepted"] if answer.status_code == 202 else 0)


# --- a bus that fails ---


def test_without_a_bus_it_is_a_503_with_nothing_half_and_a_retry_is_taken(client, caplog):
    (client.home / "bus").write_text("a file where the folder should be")
    sent = [view(search_term="a secret wish") for _ in range(3)]
    for _ in range(2):
        answer = client.events(*sent)
        assert "same event_id" in problem(answer, 503, "bus-unavailable") and str(client.home) not in answer.text
        assert int(answer.headers["retry-after"]) > 0
    (client.home / "bus").unlink()
    assert client.events(*sent).json()["accepted"] == 3
    assert [event["event_id"] for event in client.kept()] == [event["event_id"] for event in sent]
    assert [record.message for record in caplog.records if record.name == "shopai.serving" and "bus" in record.message] == [
        "bus unavailable", "bus available again"]  # said once, not with each request
    assert "wish" not in caplog.text


def test_another_process_that_holds_the_bus_is_waited_for_and_then_given_up(client, monkeypatch):
    monkeypatch.setattr(service, "SEND_SECONDS", .3)
    assert client.events(view()).status_code == 202
    other = sqlite3.connect(client.home / "bus" / "events.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    threading.Timer(.1, other.execute, ["ROLLBACK"]).start()
    assert client.events(view()).status_code == 202
    other.execute("BEGIN IMMEDIATE")
    problem(client.events(view()), 503, "bus-unavailable")
    other.execute("ROLLBACK")
    other.close()
    assert len(client.kept()) == 2


def test_nobody_else_waits_for_the_bus_and_only_so_many_wait_for_it(client, monkeypatch):
    "While the bus hangs: other addresses answer, a few requests wait, the next is sent away at once."
    monkeypatch.setattr(service, "MOST_WAITING", 2)
    release, busy = threading.Event(), threading.Semaphore(0)

    class Hanging:
        def send(self, records, timeout):
            busy.release()
            release.wait(20)

        def close(self): pass

    monkeypatch.setattr(client.app.state.intake, "_bus", Hanging())
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(client.events(view()).status_code)) for _ in range(service.THREADS + 2)]
    try:
        for thread in threads: thread.start()
        for _ in range(service.THREADS): assert busy.acquire(timeout=10)
        turns = client.app.state.intake._turns
        while turns.statistics().tasks_waiting < 2: time.sleep(.005)
        began = time.monotonic()
        assert client.get("/healthz").status_code == 200
        assert client.get("/v1/models").status_code == 200
        problem(client.events(view()), 503, "bus-unavailable")
        assert time.monotonic() - began < 1
    finally:
        release.set()
        for thread in threads: thread.join(20)
    assert answers == [202] * (service.THREADS + 2)


def test_an_error_of_ours_costs_one_event_and_its_text_is_not_logged(client, monkeypatch, caplog):
    read = service.read_event

    def broken(raw, *more):
        if raw.get("item_id") == "bad": raise KeyError("jane@example.com")
        return read(raw, *more)

    monkeypatch.setattr(service, "read_event", broken)
    answer = client.events(view(item_id="bad"), view()).json()
    assert answer["events"][0] == {"status": "refused", "reason": service.UNREADABLE} and answer["accepted"] == 1
    (line,) = [record for record in caplog.records if record.message == "event could not be read"]
    assert line.fields["error"] == "KeyError" and line.fields["file"] == "test_events_api.py"
    assert "jane" not in caplog.text and "jane" not in str(line.fields)


def test_the_bus_is_closed_at_the_end_and_refusals_open_none(tmp_path, monkeypatch):
    opened = []

    class Recorded(LocalBus):
        closed = False

        def __init__(self, *given):
            super().__init__(*given)
            opened.append(self)

        def close(self):
            self.closed = True
            super().close()

    monkeypatch.setattr(service, "open_bus", Recorded)
    with Client(tmp_path) as client:
        client.events(view(event_name="sneeze"))
        assert opened == [] and not (tmp_path / "bus").exists()
        for _ in range(3): client.events(view())
        assert len(opened) == 1 and not opened[0].closed
    assert opened[0].closed


# --- who sends ---


@pytest.mark.parametrize(("proxies", "forwarded", "found"), [
    (0, [], "192.0.2.1"),
    (0, ["203.0.113.9"], "192.0.2.1"),                       # nobody of ours wrote that
    (1, [], "192.0.2.1"),
    (1, ["203.0.113.9"], "203.0.113.9"),
    (1, ["10.6.6.6, 203.0.113.9"], "203.0.113.9"),           # the visitor claimed to be 10.6.6.6
    (2, ["203.0.113.9, 198.51.100.2"], "203.0.113.9"),
    (2, ["10.6.6.6, 203.0.113.9", "198.51.100.2"], "203.0.113.9"),
    (2, ["203.0.113.9"], "203.0.113.9"),
    (1, ["203.0.113.9:4711"], "203.0.113.9"),
    (1, ["[2001:db8::7]:443"], "2001:db8::7"),
    (1, ["2001:DB8::7"], "2001:db8::7"),
    (1, ["unknown"], None),
    (1, ["<script>"], None),
])
def test_the_address_of_a_sender(tmp_path, monkeypatch, proxies, forwarded, found):
    monkeypatch.setenv("SHOPAI_SERVE_TRUSTED_PROXIES", str(proxies))
    client = Client(tmp_path)
    client._transport.client = ("192.0.2.1", 5)
    headers = [("x-forwarded-for", value) for value in forwarded] + [("user-agent", "Tester/1"), ("sec-fetch-site", "same-origin")]
    of_visitor = {"event": "Product Viewed", "context": {"ip": "198.51.100.77", "userAgent": "Phone/2"}}  # a shop's server speaks of its visitor
    assert client.post(EVENTS, json={"events": [view(), view(ip="198.51.100.77", user_agent="Phone/2"), of_visitor]}, headers=headers).status_code == 202
    from_browser, *from_server = client.kept()
    assert (from_browser.get("ip"), from_browser["user_agent"]) == (found, "Tester/1")
    assert [(event["ip"], event["user_agent"]) for event in from_server] == [("198.51.100.77", "Phone/2")] * 2


def test_a_shops_server_is_no_visitor(tmp_path):
    "It sends for everybody: its address and agent would make one fast bot of all customers."
    with Client(tmp_path) as client:
        assert client.post(EVENTS, json={"events": [view()]}, headers={"user-agent": "python-requests/2.34"}).status_code == 202
        (kept,) = client.kept()
    assert not {"ip", "user_agent"} & set(kept)


@pytest.mark.parametrize(("name", "value"), [("ORIGINS", "*"), ("ORIGINS", "https://shop.example/"), ("ORIGINS", "https://ok.example, shop.example"),
                                             ("ORIGINS", "null"), ("TRUSTED_PROXIES", "-1"), ("TRUSTED_PROXIES", "some")])
def test_a_wrong_setting_is_named(monkeypatch, name, value):
    monkeypatch.setenv(f"SHOPAI_SERVE_{name}", value)
    with pytest.raises(UsageError, match=f"^SHOPAI_SERVE_{name}: "): get_serve_settings()


# --- other sites ---

SHOP, OTHER = "https://shop.example", "https://other.example"


@pytest.fixture
def open_client(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOPAI_SERVE_ORIGINS", f"{SHOP}, http://localhost:3000")
    with Client(tmp_path) as client: yield client


def cors(answer) -> dict: return {name: value for name, value in answer.headers.items() if name.startswith("access-control")}


def test_listed_sites_may_send_and_read_the_answer_even_a_refusal(open_client):
    asked = {"origin": SHOP, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    preflight = open_client.options(EVENTS, headers=asked)
    assert preflight.status_code == 204 and preflight.headers["vary"] == "Origin"
    assert cors(preflight) == {"access-control-allow-origin": SHOP, "access-control-allow-methods": "POST", "access-control-max-age": "86400",
                               "access-control-allow-headers": "Content-Type, X-Request-ID", "access-control-expose-headers": "Retry-After, X-Request-ID"}
    for body in ({"events": [view()]}, {"events": []}, "x" * (MAX_BODY + 1)):
        answer = open_client.post(EVENTS, content=json.dumps(body), headers={"origin": SHOP, "sec-fetch-site": "cross-site"})
        assert cors(answer)["access-control-allow-origin"] == SHOP and answer.headers["vary"] == "Origin"
    assert len(open_client.kept()) == 1


def test_sites_that_are_not_listed_may_not(open_client):
    for origin in (OTHER, "null", "https://shop.example.evil", "http://shop.example", "https://SHOP.example"):
        for answer in (open_client.options(EVENTS, headers={"origin": origin, "access-control-request-method": "POST"}),
                       open_client.post(EVENTS, json={"events": [view()]}, headers={"origin": origin, "sec-fetch-site": "cross-site"})):
            assert cors(answer) == {}
        assert "SHOPAI_SERVE_ORIGINS" in problem(answer, 403, "unknown-origin")
    assert open_client.kept() == []


def test_the_shops_own_pages_and_servers_need_no_list(client):
    for headers in ({"origin": SHOP, "sec-fetch-site": "same-origin"}, {"origin": SHOP}, {}):
        answer = client.post(EVENTS, json={"events": [view()]}, headers=headers)
        assert answer.status_code == 202 and cors(answer) == {}


def test_no_other_address_speaks_to_other_sites(open_client):
    for answer in (open_client.get("/healthz", headers={"origin": SHOP}), open_client.post(ASK, json={"user_id": "a"}, headers={"origin": SHOP}),
                   open_client.options(ASK, headers={"origin": SHOP, "access-control-request-method": "POST"})):
        assert cors(answer) == {}


# --- the script ---


def test_the_script_is_kept_by_browsers_and_small(shared):
    answer = shared.get("/v1/shopai.js")
    assert answer.headers["content-type"].startswith("text/javascript") and "max-age=86400" in answer.headers["cache-control"]
    assert answer.headers["content-encoding"] == "gzip" and int(answer.headers["content-length"]) < 3000
    plain = shared.get("/v1/shopai.js", headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers and plain.content == answer.content == service.SCRIPT
    again = shared.get("/v1/shopai.js", headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", answer.headers["etag"])
    assert shared.get("/v1/shopai.js", headers={"if-none-match": '"old"'}).status_code == 200


def test_the_script_is_part_of_the_package():
    "setuptools takes files that are no Python only if told."
    import tomllib
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["serving"]
    found = {path for pattern in patterns for path in (ROOT / "serving").glob(pattern)}
    assert {path for path in (ROOT / "serving").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")} == found != set()


# --- real processes ---


def test_two_workers_lose_nothing_they_answered_for_when_they_are_killed(tmp_path):
    "Senders go on while the workers get SIGKILL: every event that got a 202 is on the bus, once, whole requests only."
    with running(tmp_path, workers=2) as server:
        server.wait(lambda: server.ask("/healthz")[0] == 200)
        import psutil
        workers = psutil.Process(server.process.pid).children(recursive=True)
        answered, sent, stop = set(), {}, threading.Event()

        def sender(number):
            while not stop.is_set():
                events = [view() for _ in range(5)]
                ids = [event["event_id"] for event in events]
                sent[ids[0]] = ids
                try:
                    if server.ask(EVENTS, {"events": events}, {"X-Forwarded-For": "203.0.113.9", "Origin": server.address})[0] == 202: answered.update(ids)
                except (OSError, HTTPException, ValueError):  # the answer broke off, before or in the middle
                    return

        threads = [threading.Thread(target=sender, args=(i,)) for i in range(3)]
        for thread in threads: thread.start()
        time.sleep(1.0)
        for process in [psutil.Process(server.process.pid), *workers]: process.kill()
        stop.set()
        for thread in threads: thread.join(15)
    bus = LocalBus(tmp_path / "bus")
    events = [json.loads(record.value) for record in bus.read({0: 0}, 1_000_000, wait=0)]
    bus.close()
    kept = [event["event_id"] for event in events]
    assert {event["ip"] for event in events} == {"127.0.0.1"}  # no proxy is trusted, so nobody believes the header, uvicorn included
    assert len(answered) > 50 and len(kept) == len(set(kept))
    assert answered <= set(kept) <= {id for ids in sent.values() for id in ids}
    for ids in sent.values(): assert len(set(ids) & set(kept)) in (0, 5)


def test_a_long_body_is_refused_before_it_is_sent_and_no_log_holds_an_event(bundles, tmp_path):
    publish(tmp_path, bundles[0] / "ease", "1")
    with running(tmp_path, SHOPAI_SERVE_LOG_LEVEL="debug", SHOPAI_SERVE_TRUSTED_PROXIES="1") as server:
        server.wait_ready()
        with socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2])), timeout=10) as connection:
            connection.sendall(b"POST /v1/events HTTP/1.1\r\nHost: x\r\nContent-Length: 2000001\r\n\r\n")
            assert b" 413 " in connection.recv(4096).splitlines()[0]
        with socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2])), timeout=10) as connection:  # and one that hangs up in the middle
            connection.sendall(b"POST /v1/events HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        forwarded = {"X-Forwarded-For": "203.0.113.99", "User-Agent": "Tell-Tale/1", "Sec-Fetch-Site": "same-origin"}
        assert server.ask(EVENTS, {"events": [view(user_id="jane@example.com", search_term="a secret wish")]}, forwarded)[0] == 202
        assert server.ask(EVENTS, {"events": [view(event_name="Jane Doe")]}, forwarded)[0] == 422
        assert server.ask(ASK, {"user_id": "a"})[0] == 200
        server.wait(lambda: len([line for line in server.events("answered") if line["path"] == EVENTS]) == 4)
        for secret in ("jane", "Jane", "wish", "203.0.113.99", "Tell-Tale"): assert secret not in server.log
        server.stop()
        assert "Traceback" not in server.log and "internal error" not in server.log
    (kept,) = LocalBus(tmp_path / "bus").read({0: 0}, 10, wait=0)
    assert json.loads(kept.value)["ip"] == "203.0.113.99"


def test_taking_events_loads_nothing_heavy(tmp_path):
    code = f"""
import json, sys
from serving.app import create_app
from shopai.core.config import Settings
from datetime import UTC, datetime

intake = create_app(Settings(home={str(tmp_path)!r})).state.intake
(verdict,) = intake._take(json.dumps({{"events": [{view()!r}]}}).encode(), "192.0.2.1", "x", datetime.now(UTC))
assert verdict["status"] == "accepted"
heavy = {{"pandas", "pyarrow", "scipy", "duckdb", "deltalake", "narwhals", "pyspark", "torch", "mlflow", "onnxruntime", "confluent_kafka", "sqlalchemy"}}
print(json.dumps(sorted(heavy & set(sys.modules))))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_bus_unavailable_is_an_oserror(): assert issubclass(BusUnavailable, OSError)  # what a sender that knows no bus may catch


def test_the_benchmark_runs(bundles, tmp_path):
    "A second of load: no figure worth the name, but what makes the figures works."
    publish(tmp_path, bundles[0] / "ease", "1")
    done = subprocess.run([sys.executable, "benchmarks/events_api.py", "--home", tmp_path, "--seconds", "1", "--rate", "10", "--out", tmp_path / "out.json"],
                          cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    for name in ("events", "recommendations_alone", "recommendations_beside"):
        assert (figures[name]["requests"], figures[name]["errors"]) == (10, 0)
        assert 0 < figures[name]["p50_ms"] <= figures[name]["p99_ms"] <= figures[name]["max_ms"]
    assert (figures["events_sent"], figures["events_lost"], figures["events_double"]) == (1000, 0, 0)
