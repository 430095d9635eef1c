"shopai.js in a real browser: what arrives on the bus, what the browser keeps, and when neither may be anything."

import json
import shutil
import socket
import threading
import time
from contextlib import contextmanager
from urllib.parse import parse_qs, quote

import anyio
import pytest
import uvicorn

from serving.app import create_app
from shopai.core.config import Settings
from shopai.events.bus import LocalBus

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None: pytest.skip("no Chromium on this machine", allow_module_level=True)
sync_playwright = pytest.importorskip("playwright.sync_api", reason="Playwright drives the browser").sync_playwright

CONSENT = "shopai.consent({analytics: true, personalisation: false})"
STRICT = "default-src 'none'; script-src 'self'; connect-src 'self'"  # no inline script, no eval


class Gate:
    """Stands before the API: hands out pages, notes what is sent to /v1/events, and answers in the API's place while it has `orders`.

    An order is a status; a negative one lets the API take the events first. `slow` holds answers back.
    """

    def __init__(self, app):
        self.app, self.orders, self.requests, self.most, self.slow = app, [], [], 10**6, threading.Event()
        self.slow.set()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http": return await self.app(scope, receive, send)
        if scope["path"] == "/page": return await self._page(scope, send)
        if (scope["path"], scope["method"]) != ("/v1/events", "POST"): return await self.app(scope, receive, send)
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"): break
        events = json.loads(body)["events"]
        order = 413 if len(events) > self.most else self.orders.pop(0) if self.orders else 0
        self.requests.append((len(events), order, dict(scope["headers"])))

        async def again(): return {"type": "http.request", "body": body}
        async def nowhere(message): pass
        async def held(message):
            await anyio.to_thread.run_sync(self.slow.wait, 10)
            await send(message)

        if order <= 0: await self.app(scope, again, nowhere if order else held)
        else: await anyio.to_thread.run_sync(self.slow.wait, 10)
        if order: await self._answer(send, abs(order), b"{}", [(b"content-type", b"application/json")])

    async def _page(self, scope, send):
        asked = parse_qs(scope["query_string"].decode(), keep_blank_values=True)
        html = asked["html"][0].encode()
        policy = [(b"content-security-policy", STRICT.encode())] if "strict" in asked else []
        await self._answer(send, 200, html, [(b"content-type", b"text/html"), *policy])

    async def _answer(self, send, status, body, headers):
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(body)), *headers]})
        await send({"type": "http.response.body", "body": body})


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def serving(app, port: int):
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", proxy_headers=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started: time.sleep(.01)
        yield
    finally:
        server.should_exit = True
        thread.join(15)


class Shop:
    "The API on one port, other sites' pages on another, and one browser."

    def __init__(self, gate, browser, bus, port, other):
        self.gate, self.browser, self._bus = gate, browser, bus
        self.own, self.listed, self.unlisted = f"http://127.0.0.1:{port}", f"http://localhost:{other}", f"http://127.0.0.1:{other}"
        self.script = f"{self.own}/v1/shopai.js"
        self._begin = bus.ends()[0]

    def visitor(self, **options):
        "A browser without a past, whose clock can be put forward."
        context = self.browser.new_context(**options)
        context.clock.install()
        return context

    def open(self, context, site=None, attributes="", head="", **query):
        site = site or self.own
        page = context.new_page()
        page.warnings = []
        page.on("console", lambda message: page.warnings.append(message.text))
        source = self.script if site != self.own else "/v1/shopai.js"
        html = f'<!doctype html><link rel="icon" href="data:,"><body><script src="{source}" {attributes}></script>{head}'
        page.goto(f"{site}/page?html={quote(html)}" + "".join(f"&{name}={value}" for name, value in query.items()))
        return page

    def kept(self) -> list[dict]: return [json.loads(record.value) for record in self._bus.read({0: self._begin}, 10_000, wait=0)]

    def wait_for(self, n: int, page=None, seconds: float = 5) -> list[dict]:
        "The events on the bus once there are `n`; the page's clock is put forward so that they come."
        end = time.monotonic() + seconds
        while len(found := self.kept()) < n and time.monotonic() < end:
            if page is None: time.sleep(.02)
            else:
                page.clock.fast_forward(2000)
                page.wait_for_timeout(20)
        assert len(found) == n, (len(found), self.gate.requests)
        return found

    def nothing_comes(self, page) -> None:
        before = len(self.kept()), len(self.gate.requests)
        for _ in range(3):
            page.clock.fast_forward(60_000)
            page.wait_for_timeout(60)
        assert (len(self.kept()), len(self.gate.requests)) == before


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    home, port, other = tmp_path_factory.mktemp("home"), free_port(), free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOPAI_SERVE_ORIGINS", f"http://localhost:{other}")
        gate = Gate(create_app(Settings(home=home)))
    bus = LocalBus(home / "bus")
    async def pages(scope, receive, send):
        if scope["type"] == "http": await gate(scope, receive, send)
    with serving(gate, port), serving(pages, other), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield gate, browser, bus, port, other
        browser.close()
    bus.close()


@pytest.fixture
def shop(world):
    "A fresh start: no orders, and only what comes from now on."
    gate = world[0]
    gate.orders, gate.requests, gate.most = [], [], 10**6
    gate.slow.set()
    yield Shop(*world)
    for context in world[1].contexts: context.close()


def stored(page) -> dict: return page.evaluate("({...localStorage})")


def track(page, *items):
    for item in items: page.evaluate("item => shopai.track('view_item', {items: [{item_id: item}]})", item)


def items(events) -> list[str]: return [event["items"][0]["item_id"] for event in events]


# --- consent ---


@pytest.mark.parametrize("site", ["own", "listed"])
def test_nothing_is_stored_or_sent_before_consent_and_all_is_sent_after(shop, site):
    context = shop.visitor(timezone_id="Asia/Tokyo", user_agent="Tester/1")
    page = shop.open(context, getattr(shop, site), 'data-view-item="85123A"')
    track(page, "b")
    shop.nothing_comes(page)
    assert stored(page) == {} and context.cookies() == [] and shop.gate.requests == []
    page.evaluate(CONSENT)
    track(page, "c")
    found = shop.wait_for(3, page)
    assert items(found) == ["85123A", "b", "c"] and {event["event_name"] for event in found} == {"view_item"}
    assert {(event["timezone"], event["ip"], event["user_agent"], event["analytics"], event["personalisation"]) for event in found} == {
        ("Asia/Tokyo", "127.0.0.1", "Tester/1", True, False)}
    kept = stored(page)
    assert kept.keys() == {"shopai.visitor", "shopai.session"} and context.cookies() == []
    assert {(event["anonymous_id"], event["session_id"]) for event in found} == {(kept["shopai.visitor"], kept["shopai.session"].split()[0])}
    assert len({event["event_id"] for event in found}) == 3 and page.warnings == []
    for _, _, headers in shop.gate.requests: assert headers[b"content-type"].startswith(b"text/plain") and b"cookie" not in headers


def test_a_page_of_another_site_that_is_not_listed_gets_nothing_in(shop):
    page = shop.open(shop.visitor(), shop.unlisted, 'data-view-item="x"')
    page.evaluate(CONSENT)
    page.clock.fast_forward(2500)
    while not shop.gate.requests: page.wait_for_timeout(10)
    page.close()
    page.context.close()
    assert shop.kept() == []


def test_what_waits_for_an_answer_is_bounded_and_a_refusal_drops_it(shop):
    page = shop.open(shop.visitor())
    track(page, *[f"i{n}" for n in range(120)])
    page.evaluate(CONSENT)
    assert items(shop.wait_for(100, page)) == [f"i{n}" for n in range(20, 120)]
    page = shop.open(shop.visitor(), attributes='data-view-item="x"')
    page.evaluate("shopai.consent({analytics: false, personalisation: true})")
    track(page, "y")
    shop.nothing_comes(page)
    assert stored(page) == {}
    page.evaluate(CONSENT)  # later the visitor agrees; what was before stays untold
    track(page, "z")
    assert items(shop.wait_for(101, page))[100:] == ["z"]


def test_withdrawal_deletes_the_ids_in_all_tabs_and_stops(shop):
    context = shop.visitor()
    page, tab = shop.open(context), shop.open(context)
    for each in (page, tab): each.evaluate(CONSENT)
    track(page, "a")
    (first,) = shop.wait_for(1, page)
    track(page, "unsent")
    track(tab, "unsent")
    tab.evaluate("addEventListener('storage', change => { window.told ||= change.key === 'shopai.visitor' && !change.newValue })")
    page.evaluate("shopai.consent({analytics: false})")
    tab.wait_for_function("window.told")
    track(page, "b")
    track(tab, "c")
    shop.nothing_comes(tab)
    shop.nothing_comes(page)
    assert stored(page) == stored(tab) == {}
    page.evaluate(CONSENT)
    track(page, "d")
    second = shop.wait_for(2, page)[1]
    assert items([second]) == ["d"] and second["anonymous_id"] != first["anonymous_id"] and second["session_id"] != first["session_id"]


def test_what_was_on_its_way_at_a_withdrawal_is_not_sent_again(shop):
    page = shop.open(shop.visitor())
    page.evaluate(CONSENT)
    shop.gate.orders, held = [503], shop.gate.slow
    held.clear()
    track(page, "a")
    page.clock.fast_forward(2500)
    while not shop.gate.requests: page.wait_for_timeout(10)
    page.evaluate("shopai.consent({analytics: false})")
    page.evaluate(CONSENT)
    held.set()
    track(page, "b")
    assert items(shop.wait_for(1, page)) == ["b"]
    shop.nothing_comes(page)


@pytest.mark.parametrize("wish", ["globalPrivacyControl = true", "doNotTrack = '1'"])
def test_a_browser_that_asks_not_to_be_tracked_is_heard(shop, wish):
    name, value = wish.split(" = ")
    context = shop.visitor()
    context.add_init_script(f"Object.defineProperty(navigator, '{name}', {{get: () => {value}}})")
    page = shop.open(context, attributes='data-view-item="x"')
    page.evaluate(CONSENT)
    track(page, "y")
    shop.nothing_comes(page)
    assert stored(page) == {} and shop.kept() == []


# --- the end of a page ---


@pytest.mark.parametrize("end", ["close", "leave"])
@pytest.mark.parametrize("site", ["own", "listed"])
def test_a_closing_page_sends_what_is_left_once(shop, end, site):
    page = shop.open(shop.visitor(), getattr(shop, site))
    page.evaluate(CONSENT)
    track(page, "a", "b", "c")
    if end == "close": page.close()
    else: page.goto("about:blank")
    assert items(shop.wait_for(3)) == ["a", "b", "c"]
    time.sleep(.1)
    assert [n for n, _, _ in shop.gate.requests] == [3]  # pagehide and visibilitychange both came; one of them found nothing left


def test_what_is_on_its_way_when_the_visitor_leaves_arrives_under_one_id(shop):
    "The page can't know whether a request outlives it. Rather than lose the events it sends them again; their ids stay, so the second time is recognised."
    page = shop.open(shop.visitor())
    page.evaluate(CONSENT)
    shop.gate.slow.clear()
    track(page, "a")
    page.clock.fast_forward(2500)
    while not shop.gate.requests: page.wait_for_timeout(10)
    track(page, "b")  # waits for the answer to the first
    page.goto("about:blank")
    shop.gate.slow.set()
    end = time.monotonic() + 5
    while len(ids := {(event["items"][0]["item_id"], event["event_id"]) for event in shop.kept()}) < 2 and time.monotonic() < end: time.sleep(.02)
    time.sleep(.1)
    assert sorted(item for item, _ in ids) == ["a", "b"] and len(shop.kept()) <= 3


# --- failures ---


def test_failures_are_retried_and_the_ids_stay(shop):
    page = shop.open(shop.visitor())
    page.evaluate(CONSENT)
    shop.gate.orders = [503, 429, -502]  # the last time the API took them, but the answer was lost
    track(page, "a", "b")
    found = shop.wait_for(4, page, seconds=8)
    assert [order for _, order, _ in shop.gate.requests] == [503, 429, -502, 0]
    assert items(found) == ["a", "b"] * 2
    assert [event["event_id"] for event in found[:2]] == [event["event_id"] for event in found[2:]]  # so the second time is recognised
    shop.nothing_comes(page)


def test_without_a_network_events_wait(shop):
    context = shop.visitor()
    page = shop.open(context)
    page.evaluate(CONSENT)
    context.set_offline(True)
    track(page, "a")
    shop.nothing_comes(page)
    context.set_offline(False)
    assert items(shop.wait_for(1, page)) == ["a"]


def test_a_beacon_that_the_browser_refuses_is_sent_later(shop):
    context = shop.visitor()
    context.add_init_script("navigator.sendBeacon = () => false")
    page = shop.open(context)
    page.evaluate(CONSENT)
    track(page, "a")
    page.evaluate("dispatchEvent(new Event('pagehide'))")
    assert items(shop.wait_for(1, page)) == ["a"]


def test_too_long_a_request_is_halved_and_what_is_refused_is_dropped_aloud(shop):
    page = shop.open(shop.visitor())
    page.evaluate(CONSENT)
    shop.gate.most = 12
    track(page, *map(str, range(30)))
    assert items(shop.wait_for(30, page)) == list(map(str, range(30)))
    assert [n for n, _, _ in shop.gate.requests] == [30, 15, 7, 7, 7, 7, 2]
    page.evaluate("shopai.track('sneeze')")
    track(page, "good")
    assert items(shop.wait_for(31, page))[30:] == ["good"]
    page.evaluate("shopai.track('cough')")
    while len(mine := [text for text in page.warnings if text.startswith("shopai: ")]) < 2:
        page.clock.fast_forward(2000)
        page.wait_for_timeout(20)
    shop.nothing_comes(page)
    assert len(mine) == 2 and "1 events refused" in mine[0] and "sneeze" in mine[0] and "1 events dropped, status 422" in mine[1] and "cough" in mine[1]


def test_long_events_go_in_requests_that_may_outlive_the_page(shop):
    "A browser lets 64 KiB outlive a page; a megabyte in one request would be refused."
    page = shop.open(shop.visitor())
    page.evaluate(CONSENT)
    for n in range(16): page.evaluate("n => shopai.track('search', {search_term: `w${n}`, note: 'x'.repeat(5000)})", n)
    page.clock.fast_forward(2500)
    found = shop.wait_for(16, page)
    assert [event["search_term"] for event in found] == [f"w{n}" for n in range(16)]
    assert max(int(headers[b"content-length"]) for _, _, headers in shop.gate.requests) < 30_000 and len(shop.gate.requests) > 2


# --- visits and pages ---


def test_a_pause_of_half_an_hour_begins_a_new_session(shop):
    context = shop.visitor()
    page = shop.open(context)
    page.evaluate(CONSENT)
    for n, minutes in enumerate((0, 29, 29, 31)):
        page.clock.fast_forward(minutes * 60_000 + 1)
        track(page, str(n))
        shop.wait_for(n + 1, page)
    page = shop.open(context)  # the next page of the same visit
    page.evaluate(CONSENT)
    track(page, "4")
    found = shop.wait_for(5, page)
    sessions = [event["session_id"] for event in found]
    assert len(set(sessions[:3])) == 1 and len(set(sessions)) == 2
    assert len({event["anonymous_id"] for event in found}) == 1


LD = '<script type="application/ld+json">{}</script>'
PRODUCT = {"@type": "Product", "sku": 85123, "name": "Lantern", "offers": {"@type": "Offer", "price": "2.55", "priceCurrency": "GBP"}}


@pytest.mark.parametrize("markup", [PRODUCT, [{"@type": "BreadcrumbList"}, PRODUCT], {"@graph": [{"@type": "WebPage"}, PRODUCT]}])
def test_a_product_page_tells_of_itself_under_a_strict_policy(shop, markup):
    page = shop.open(shop.visitor(), attributes="data-view-item", head=LD.format("{not json") + LD.format(json.dumps(markup)), strict=1)
    page.evaluate(CONSENT)
    (event,) = shop.wait_for(1, page)
    assert (event["items"], event["currency"]) == ([{"item_id": "85123", "price": 2.55}], "GBP")
    shop.nothing_comes(page)
    assert not any("Content Security Policy" in text and "shopai" in text for text in page.warnings)


def test_a_page_that_does_not_ask_for_it_tells_nothing_of_itself(shop):
    page = shop.open(shop.visitor(), head=LD.format(json.dumps(PRODUCT)))
    page.evaluate(CONSENT)
    shop.nothing_comes(page)
    assert shop.kept() == []


def test_another_endpoint_and_values_that_change_after_they_were_told(shop):
    page = shop.open(shop.visitor(), shop.listed, f'data-endpoint="{shop.own}/v1/events"')
    page.evaluate(CONSENT)
    page.evaluate("const cart = [{item_id: 'a', quantity: 1}]; shopai.track('add_to_cart', {items: cart}); cart.push({item_id: 'b'}); cart[0].quantity = 9")
    (event,) = shop.wait_for(1, page)
    assert event["items"] == [{"item_id": "a", "quantity": 1}]


def test_where_storage_is_blocked_ids_live_as_long_as_the_page(shop):
    context = shop.visitor()
    context.add_init_script("Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('blocked', 'SecurityError') }})")
    page = shop.open(context)
    page.evaluate(CONSENT)
    track(page, "a", "b")
    found = shop.wait_for(2, page)
    assert len({(event["anonymous_id"], event["session_id"]) for event in found}) == 1
