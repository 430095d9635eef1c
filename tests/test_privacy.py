"""Nobody is named: events full of personal data come by the API and by other producers, in every spelling; then every file of the lake is read.

What can't be told from a harmless word, such as a name typed into the search box, is not claimed: names are looked for where they stand as identifiers or in
fields of their own.
"""

import hashlib
import hmac
import json
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote
from urllib.request import Request, urlopen

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shop_command import done, shopai
from shop_server import running

from shopai.core.lake import Lake
from shopai.events.bus import LocalBus

KEY = "a key that only this test knows"
EMAIL, NAME, PHONE, STREET = "Ingeborg.Oettinger@Quarles-Mail.example", "Ingeborg Öttinger", "+49 171 5550199", "Lindenweg 17b"
IP, IP6, PROXY_IP = "81.2.69.142", "2001:db8:77:9::42", "198.51.100.77"  # the first is London's in MaxMind's test database
TOKEN, AGENT = "tok_5EcReT0815", "Mozilla/5.0 (iPhone; CPU iPhone OS 17_0 like Mac OS X) AppleWebKit/605.1.15 QuarlesBrowser/7.1 Mobile/15E148 Safari/604.1"
ADDRESSES, PERSONAL = (IP, IP6, PROXY_IP, "QuarlesBrowser"), (EMAIL, "Oettinger", NAME, "Öttinger", PHONE, "5550199", STREET, "Lindenweg", TOKEN)

IDS = ("event_id", "user_id", "anonymous_id", "session_id", "transaction_id", "request_id")
FREE = ("search_term", "channel", "campaign", "city", "region", "country", "device_type")
HIDDEN = {"email": EMAIL, "name": NAME, "first_name": "Ingeborg", "phone": PHONE, "street": STREET, "token": TOKEN,
          "address": {"street": STREET, "lines": [NAME, EMAIL]}}
SAID = {"yes": {"consent": True}, "no": {"consent": False}, "unsaid": {}}


# --- events full of personal data ---


def placed(event: dict, path: str, value) -> dict:
    "Put a value where a dotted path says."
    *boxes, last = path.split(".")
    box = event
    for name in boxes: box = box.setdefault(name, {})
    box[last] = value
    return event


WHERE = {  # field → its place in GA4's and in Segment's spelling
    "event_id": ("event_id", "messageId"), "event_time": ("timestamp_micros", "timestamp"), "consent": ("consent", "context.consent"),
    "user_id": ("user_id", "userId"), "anonymous_id": ("client_id", "anonymousId"), "session_id": ("params.ga_session_id", "context.sessionId"),
    "transaction_id": ("params.transaction_id", "properties.order_id"), "request_id": ("params.request_id", "properties.request_id"),
    "ip": ("ip_override", "context.ip"), "user_agent": ("user_agent", "context.userAgent"), "search_term": ("params.search_term", "properties.query"),
    "channel": ("params.medium", "context.campaign.medium"), "campaign": ("params.campaign", "context.campaign.name"),
    "city": ("params.city", "context.location.city"), "region": ("user_location.region_id", "context.location.region"),
    "country": ("params.country", "context.location.country"), "device_type": ("device.category", "properties.device_type"),
    "item_id": ("params.item_id", "properties.product_id"), "currency": ("params.currency", "properties.currency"),
    "model_version": ("params.model_version", "properties.model_version")}


def spelt(style: int, **fields) -> dict:
    "A view of an item in our own spelling, GA4's or Segment's, with hidden personal data around its fields."
    fields = {"item_id": "mug", **fields}
    if style == 0: return {"event_name": "view_item", **HIDDEN, **fields}
    event = [{"name": "view_item", "user_properties": HIDDEN, "user_data": {"sha256": TOKEN, **HIDDEN},
              "params": {**HIDDEN, "page_location": f"https://x.example/?m={quote(EMAIL)}"}},
             {"event": "Product Viewed", "properties": {**HIDDEN, "url": f"https://x.example/?m={EMAIL}"},
              "context": {"traits": HIDDEN, "page": {"referrer": EMAIL}}, "traits": HIDDEN}][style - 1]
    for name, value in fields.items(): placed(event, WHERE[name][style - 1], value)
    return event


def telling(value: str) -> list[str]:
    "Free text around an address."
    return [value, f"  mail to:{value}, please", f"next=/account?who={quote(value, safe='')}&x=1", quote(quote(value, safe=""), safe="")]


def good_events() -> list[dict]:
    "Each identifying text in each field, spelling and consent. Identifiers hide behind pseudonyms, free texts and machines' names lose their addresses."
    values = [*((name, value) for name in IDS for value in (EMAIL, EMAIL.upper(), quote(EMAIL), NAME, PHONE, IP, IP6)),
              *((name, text) for name in FREE for value in (EMAIL, IP, IP6, PHONE) for text in telling(value)),
              ("item_id", EMAIL), ("model_version", EMAIL), ("ip", IP6)]
    return [spelt(style, **{name: value}, **consent, **({"ip": IP, "user_agent": AGENT} if n % 2 and name != "ip" else {}))
            for style in range(3) for consent in SAID.values() for n, (name, value) in enumerate(values)]


def bad_events() -> list:
    "What the door must refuse, each with personal data where it is wrong."
    wrong = [{"currency": EMAIL}, {"event_time": EMAIL}, {"consent": EMAIL}, {"event_time": NAME}, {"user_id": {"mail": EMAIL}}, {"session_id": [EMAIL]},
             {"ip": {"a": IP}}, {"item_id": EMAIL * 10}, {"search_term": EMAIL * 10}, {"event_id": NAME * 20}]
    named = [{"event_name": EMAIL}, {"event_name": NAME}, {"name": NAME}, {"name": EMAIL}, {"event": NAME}, {"event_name": {"x": EMAIL}},
             {"who": EMAIL}, {EMAIL: NAME}]
    return [*(spelt(style, **fields) for style in range(3) for fields in wrong), *named, EMAIL, [EMAIL, NAME], 7, None]


def marked(number: int, **fields) -> dict:
    "An event by which rows can be found again: its item is its own."
    return spelt(number % 3, **{"item_id": f"marked-{number}", "consent": True, "ip": IP, "user_agent": AGENT, **fields})


CUSTOMER = [marked(0, user_id=EMAIL), marked(1, user_id=f" {EMAIL.lower()} "), marked(2, user_id=EMAIL.upper()), {**marked(3), "user_id": None, "email": EMAIL}]
SECRET = [spelt(style, item_id=f"unnamed-{style}", event_id=f"own-id-{style}", user_id="customer-4711", session_id="visit-4711", anonymous_id="browser-4711",
                transaction_id="order-4711", request_id="answer-4711", ip=IP, user_agent=AGENT, **consent)
          for style in range(3) for consent in (SAID["no"], SAID["unsaid"])]


def foreign_records() -> list[bytes]:
    "What other producers put onto the bus past the door: canonical records of all kinds, other spellings, broken contracts, garbage."
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    plain = {"v": 1, "event_id": "f", "event_name": "purchase", "event_time": now, "received_at": now, "analytics": True,
             "ip": IP, "user_agent": AGENT, **HIDDEN}
    number = iter(range(10**6))
    new = lambda **fields: {**plain, "event_id": f"f-{next(number)}", "transaction_id": f"F-{next(number)}", **fields}
    records = [new(**{name: value}) for name in IDS for value in (EMAIL, NAME, PHONE, IP)]
    records += [new(**{name: text}) for name in FREE for value in (EMAIL, IP, PHONE) for text in telling(value)]
    records += [new(items=[{"item_id": EMAIL, "name": NAME}, {"item_id": f"x {quote(EMAIL)}"}], model_version=EMAIL)]
    rest = {"user_id": EMAIL, "session_id": NAME, "transaction_id": PHONE, "search_term": EMAIL, "campaign": quote(EMAIL)}
    broken = [{"event_name": EMAIL}, {"event_name": NAME}, {"event_name": f"view {IP}"}, {"currency": EMAIL}, {"currency": NAME}, {"currency": PHONE},
              {"items": [{"item_id": EMAIL, "price": -1}]}]
    records += [new(**{**rest, **wrong}, analytics=allowed) for wrong in broken for allowed in (True, False)]  # → quarantine
    records += [new(transaction_id=EMAIL, items=[{"item_id": "mug"}]) for _ in range(3)]  # the same purchase by other events → quarantine
    records += [{name: value for name, value in new(user_id=EMAIL).items() if name != "v"}, *good_events()[:200:7], *bad_events()]
    garbage = [f"{EMAIL} {NAME} {IP}".encode(), b"\xff\xfe" + EMAIL.encode("utf-16-le"), b'{"v":1,"event_id":"' + EMAIL.encode(), b"",
               json.dumps({**plain, "v": 2}).encode()]
    return [json.dumps(record, separators=(",", ":"), ensure_ascii=n % 2 == 0).encode() for n, record in enumerate(records)] + garbage


# --- looking for it ---


def forms(needle: str) -> set[str]:
    "A text as it may be written, in lower case."
    encoded = quote(needle, safe="")
    return {form.lower() for form in (needle, quote(needle), encoded, quote(encoded, safe=""), json.dumps(needle)[1:-1],
                                      needle.replace(" ", ""), needle.replace(" ", "+"))}


def found(content: str, needles) -> set[str]:
    content = content.lower()
    return {needle for needle in needles if any(form in content for form in forms(needle))}


def contents(folder: Path) -> dict[Path, str]:
    "All that each file below a folder says: its bytes, and for Parquet all columns, with what their dictionaries hold beside them."
    told = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        told[file] = str(file) + file.read_bytes().decode("utf-8", "replace") + file.read_bytes().decode("utf-16-le", "ignore")
        if file.suffix != ".parquet": continue
        schema = pq.read_schema(file)
        table = pq.read_table(file, read_dictionary=[field.name for field in schema if pa.types.is_string(field.type)])
        dictionaries = [chunk.dictionary.to_pylist() for column in table.columns if pa.types.is_dictionary(column.type) for chunk in column.chunks]
        told[file] += json.dumps([table.to_pydict(), dictionaries], default=str, ensure_ascii=False) + str(pq.read_metadata(file)) + str(schema.metadata)
    return told


def leaks(folder: Path, needles) -> dict[str, set[str]]: return {file.name: hits for file, text in contents(folder).items() if (hits := found(text, needles))}


def raw(folder: Path) -> str: return "".join(file.read_bytes().decode("utf-8", "replace") for file in folder.glob("events.db*"))


# --- the shop ---


def send(server, events: list, headers: dict | None = None) -> list[dict]:
    "Verdicts of the API."
    verdicts = []
    for first in range(0, len(events), 400):
        status, answer = server.ask("/v1/events", {"events": events[first:first + 400]}, headers)
        assert status == 202, answer
        verdicts += answer["events"]
    return verdicts


def strange_requests(server, headers: dict) -> None:
    "What a log might quote."
    garbage = [f"{EMAIL} {NAME}".encode(), json.dumps([EMAIL]).encode(), json.dumps({"events": [{}], EMAIL: NAME}).encode(),
               json.dumps({"events": EMAIL}).encode(), json.dumps({"events": [{"name": EMAIL}], "sent_at": EMAIL}).encode(),
               b'{"events": [{"event_name": "' + EMAIL.encode()]
    for body in garbage:
        with pytest.raises(OSError, match="HTTP Error 4"): urlopen(Request(f"{server.address}/v1/events?mail={quote(EMAIL)}", body, headers), timeout=10)  # noqa: S310
    for path in (f"/v1/events?email={quote(EMAIL)}&name={quote(NAME)}", f"/healthz?ip={IP}&token={TOKEN}"): server.ask(path, headers=headers)
    server.ask("/v1/recommendations", {"user_id": EMAIL, "context": {"ip": IP}}, headers)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "A shop whose customers have told too much, by both ways in; all of it is in the lake."
    home = tmp_path_factory.mktemp("shop")
    geo = Path(os.environ["SHOPAI_DATA_DIR"]) / "geo" / "GeoIP2-City-Test.mmdb"
    headers = {"User-Agent": AGENT, "X-Forwarded-For": PROXY_IP, "Sec-Fetch-Site": "same-origin"}
    variables = {"SHOPAI_PSEUDONYM_KEY": KEY, **({"SHOPAI_GEO_DATABASE": str(geo)} if geo.exists() else {})}
    with running(home, SHOPAI_SERVE_TRUSTED_PROXIES="1", SHOPAI_SERVE_LOG_LEVEL="debug", **variables) as server:
        server.wait(lambda: server.ask("/healthz")[0] == 200)
        verdicts = {"good": send(server, [*good_events(), *CUSTOMER, *SECRET], headers), "bad": send(server, [*bad_events(), marked(9)], headers)}
        strange_requests(server, headers)
        log = server.log
    after_api = raw(home / "bus")
    bus = LocalBus(home / "bus")
    bus.send([(EMAIL, record) for record in foreign_records()])
    ingested, status = shopai(home, "events", "ingest", "--once", "--batch", "700", **variables), shopai(home, "events", "status", **variables)
    assert ingested.returncode == 0, ingested.stderr
    told, lake = ingested.stdout + ingested.stderr + status.stdout + status.stderr, Lake(str(home / "lake"))
    yield SimpleNamespace(home=home, verdicts=verdicts, log=log, after_api=after_api, told=told, located=geo.exists(), lake=lake, rows=lake.read("events"))
    bus.close()


def test_no_file_of_the_lake_names_anyone(shop):
    assert leaks(shop.home / "lake", PERSONAL + ADDRESSES) == {}
    kinds = {file.suffix for file in contents(shop.home / "lake")}
    assert {".parquet", ".json"} <= kinds and len(shop.rows) > 1000 and len(shop.lake.read("quarantine")) >= 16


def test_a_leak_would_be_seen(shop, tmp_path):
    "The search above finds what is planted, wherever it is and however it is written."
    for number, needle in enumerate([EMAIL.lower(), quote(EMAIL), NAME, IP]):
        lake = Lake(str(tmp_path / str(number)))
        lake.append("events", shop.rows.head(50).assign(event_id=[f"e{n}" for n in range(50)], campaign=f"x{needle}"))
        seen = leaks(tmp_path / str(number), PERSONAL + ADDRESSES)
        assert {Path(name).suffix for name in seen} == {".parquet", ".json"}, (needle, seen)  # the log has the smallest and the largest value of each column


def test_events_were_not_just_refused(shop):
    assert {verdict["status"] for verdict in shop.verdicts["good"]} == {"accepted"}
    refused = [verdict for verdict in shop.verdicts["bad"][:-1] if verdict["status"] == "refused"]
    assert len(refused) == len(bad_events())
    told = " ".join(verdict["reason"] for verdict in refused if not verdict["reason"].startswith("event_name: unknown"))  # the sender must see what is misspelt
    assert found(told, PERSONAL + ADDRESSES) == set()
    reasons = " ".join(shop.lake.read("quarantine")["reason"])
    assert all(words in reasons for words in ("event_name: ", "currency: ", "price: ", "transaction_id: "))
    assert "dead letters" in shop.told and LocalBus(shop.home / "bus", "events.dead").ends()[0] > len(bad_events())


def test_neither_the_log_nor_the_terminal_names_anyone(shop):
    assert shop.log.count('"answered"') > 10 and found(shop.log, PERSONAL + ADDRESSES) == set()
    assert "events" in shop.told and found(shop.told, PERSONAL + ADDRESSES) == set()


def test_a_customer_is_one_pseudonym_however_she_is_spelt(shop):
    expected = "p-" + hmac.new(KEY.encode(), EMAIL.lower().encode(), hashlib.sha256).hexdigest()[:32]
    rows = shop.rows[shop.rows["item_id"].isin([f"marked-{n}" for n in range(4)])]
    assert len(rows) == 4 and set(rows["user_id"]) == {expected}


def test_where_she_was_is_known_only_coarsely(shop):
    if not shop.located: pytest.skip("no geo/GeoIP2-City-Test.mmdb")
    rows = shop.rows[shop.rows["item_id"].isin([f"marked-{n}" for n in range(4)])]
    assert set(zip(rows["country"], rows["city"], strict=True)) == {("GB", "London")} and set(rows["device_type"]) == {"mobile"}


def test_without_consent_an_event_keeps_no_identifier(shop):
    rows = shop.rows[shop.rows["item_id"].fillna("").str.startswith("unnamed-")]
    assert len(rows) == 3  # one of each spelling: silence is refusal, so the second of each is the same event once more
    quiet = shop.rows[shop.rows["event_id"].str.startswith("x-")]
    assert len(quiet) > 500 and set(rows.index) <= set(quiet.index)
    assert quiet[["user_id", "session_id", "transaction_id", "request_id", "session_events", "session_seconds"]].isna().all(axis=None)
    assert leaks(shop.home / "lake", [f"{name}-4711" for name in ("customer", "visit", "browser", "order", "answer")] + ["own-id-"]) == {}


def test_the_bus_holds_addresses_for_a_while_and_names_never(shop):
    "Of what came by the API: the address is needed until the event has landed. Then the log forgets it, in the file, too."
    assert found(shop.after_api, PERSONAL) == set() and found(shop.after_api, ADDRESSES) == set(ADDRESSES)
    copy = shop.home / "copy"
    shutil.copytree(shop.home / "bus", copy)
    bus = LocalBus(copy)
    assert bus.trim(bus.ends()) > 1000
    bus.close()
    assert found(raw(copy), PERSONAL + ADDRESSES) == set()


def test_without_a_key_identifying_ids_are_dropped(home):
    names = ("user_id", "session_id", "transaction_id", "request_id", "event_id")
    events = [*(marked(n, **{name: EMAIL}) for n, name in enumerate(names)), {**marked(6), "email": EMAIL}]
    with running(home, home.with_suffix(".log")) as server:
        server.wait(lambda: server.ask("/healthz")[0] == 200)
        verdicts, log = send(server, events), server.log
    for verdict, name in zip(verdicts, (*names, "email"), strict=True):
        assert verdict["status"] == "accepted" and any(note.startswith(f"{name} was ") and "SHOPAI_PSEUDONYM_KEY" in note for note in verdict["notes"]), verdict
    LocalBus(home / "bus").send([(None, record) for record in foreign_records()])
    done(home, "events", "ingest", "--once")
    rows = Lake(str(home / "lake")).read("events")
    mine = rows[rows["item_id"].fillna("").str.startswith("marked-")]
    assert len(mine) == 6 and mine[["user_id", "transaction_id", "request_id"]].isna().all(axis=None)
    assert leaks(home / "lake", PERSONAL + ADDRESSES) == {} and found(log, PERSONAL + ADDRESSES) == set()
    assert datetime.now(UTC) - mine["received_at"].max() < timedelta(minutes=5)
