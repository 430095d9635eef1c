"Events over HTTP: read at the door, kept on the bus, and only then answered. Also the script with which a shop's pages send them."

import dataclasses
import gzip
import hashlib
import ipaddress
import json
import threading
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from serving.logs import event
from serving.models import RETRY_AFTER
from serving.problems import INTERNAL, Problem, documented, shown
from serving.schemas import EVENTS, MAX_BODY, MAX_EVENTS, EventsAccepted, EventsRequest
from shopai.core.config import Settings, UsageError
from shopai.events.bus import Bus, BusUnavailable, open_bus
from shopai.events.wire import Door, Refused, read_event

THREADS, MOST_WAITING = 8, 64  # requests that talk to the bus at a time, and that may wait for their turn: more could only pile up in memory
SEND_SECONDS = 5.0
UNREADABLE = "the event could not be read, and that is our mistake; the log has the place"
UNAVAILABLE = "the events could not be kept just now; send them again, with the same event_id each: what was kept after all is recognised"
router = APIRouter(prefix="/v1", tags=["events"])


def _constant(text: str): raise ValueError(f"{text} is not JSON")


def parse(body: bytes) -> tuple[list[Any], datetime | None]:
    "The events of a request, and when the sender's clock says it sent them. Raises the `Problem` that tells what to change."
    try: sent = json.loads(body, parse_constant=_constant)
    except json.JSONDecodeError as error: raise Problem(400, "invalid-json", f"the body is not valid JSON: {error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError): raise Problem(400, "invalid-json", "the body could not be read as JSON") from None
    known = list(EventsRequest.model_fields)
    if not isinstance(sent, dict): raise _wrong(f"the body must be a JSON object with {', '.join(known)}, got {shown(sent)}", "")
    if unknown := set(sent) - set(known): raise _wrong(f"unknown field {shown(min(unknown))}; known are {', '.join(known)}", f"/{ascii(min(unknown))[1:-1]}")
    events = sent.get("events")
    if not isinstance(events, list) or not 1 <= len(events) <= MAX_EVENTS: raise _wrong(f"events must be {EVENTS}, got {shown(events)}", "/events")
    return events, _time(sent.get("sent_at"))


def _time(text: Any) -> datetime | None:
    if text is None: return None
    try:
        if (time := datetime.fromisoformat(text)).tzinfo: return time.astimezone(UTC)
    except (ValueError, TypeError, OverflowError): pass
    raise _wrong(f"sent_at must be an ISO-8601 time with its offset, such as 2026-03-01T09:30:00Z, got {shown(text)}", "/sent_at")


def _wrong(line: str, pointer: str) -> Problem:
    return Problem(422, "invalid-request", line, errors=[{"pointer": f"#{pointer}", "detail": line}])


def client_address(request: Request, trusted_proxies: int) -> str | None:
    "Who sent a request: the connection's other end, or whom the outermost of our own proxies saw. Anyone may write what stands further left."
    seen = [part.strip() for line in request.headers.getlist("x-forwarded-for") for part in line.split(",")] if trusted_proxies else []
    seen.append(request.client.host if request.client else "")
    text = seen[max(0, len(seen) - 1 - trusted_proxies)]
    if text.startswith("["): text = text[1:].partition("]")[0]        # [2001:db8::1]:443
    elif text.count(":") == 1: text = text.partition(":")[0]          # 192.0.2.1:443
    try: return str(ipaddress.ip_address(text))
    except ValueError: return None


def visitor(request: Request, trusted_proxies: int) -> tuple[str | None, str | None]:
    """Address and agent of the visitor whose browser sent this: browsers say `Origin` or `Sec-Fetch-Site`.

    A shop's own server speaks for all its customers; its address and agent would make one machine of them. It says `ip` and `user_agent` in each event.
    """
    if not {"origin", "sec-fetch-site"} & set(request.headers.keys()): return None, None
    return client_address(request, trusted_proxies), request.headers.get("user-agent")


class Intake:
    "Takes events: opens the bus when the first ones come, and lets a few threads wait for it, so that nobody else does."

    def __init__(self, settings: Settings):
        self.location, self.door = settings.bus_location, Door.from_settings(settings)
        self._bus: Bus | None = None
        self._down: str | None = None  # why the bus is unavailable; logged once
        self._lock, self._turns = threading.Lock(), anyio.CapacityLimiter(THREADS)

    async def take(self, body: bytes, ip: str | None, user_agent: str | None) -> list[dict[str, Any]]:
        "A verdict for each event, once the accepted ones are durable. Raises a `Problem`: 400, 422, or 503 after which a client may send the same again."
        if self._turns.statistics().tasks_waiting >= MOST_WAITING: raise self._unavailable()
        return await anyio.to_thread.run_sync(self._take, body, ip, user_agent, datetime.now(UTC), limiter=self._turns)

    def _take(self, body: bytes, ip: str | None, user_agent: str | None, received_at: datetime) -> list[dict[str, Any]]:
        events, sent_at = parse(body)
        door = dataclasses.replace(self.door, ip=ip, user_agent=user_agent, sent_at=sent_at)
        records, verdicts = [], []
        for raw in events:
            try:
                found = read_event(raw, received_at, door)
                records.append((found.key, found.to_json()))
                verdicts.append({"status": "accepted", "event_id": found.event_id, **({"notes": list(found.notes)} if found.notes else {})})
            except Refused as refusal:
                verdicts.append({"status": "refused", "reason": str(refusal)})
            except Exception as error:  # our mistake costs this event, not the request; its text might quote the event, so the log gets only the place
                place = traceback.extract_tb(error.__traceback__)[-1]
                event("error", "event could not be read", error=type(error).__name__, file=Path(place.filename).name, line=place.lineno)
                verdicts.append({"status": "refused", "reason": UNREADABLE})
        if not records: raise _all_refused(verdicts)
        self._send(records)
        return verdicts

    def _send(self, records: list[tuple[str | None, bytes]]) -> None:
        try:
            with self._lock:
                if self._bus is None: self._bus = open_bus(self.location)
            self._bus.send(records, timeout=SEND_SECONDS)
            if self._down: event("info", "bus available again")
            self._down = None
        except (BusUnavailable, UsageError) as error:
            if str(error) != self._down: event("error", "bus unavailable", reason=str(error))
            self._down = str(error)
            raise self._unavailable() from None

    def _unavailable(self) -> Problem: return Problem(503, "bus-unavailable", UNAVAILABLE, {"Retry-After": str(RETRY_AFTER)})

    def close(self) -> None:
        with self._lock:
            if self._bus is not None: self._bus.close()
            self._bus = None


def _all_refused(verdicts: list[dict[str, Any]]) -> Problem:
    errors = [{"pointer": f"#/events/{i}", "detail": verdict["reason"]} for i, verdict in enumerate(verdicts)]
    return Problem(422, "all-refused", f"none of {len(errors)} events could be taken; the first: {errors[0]['detail']}", errors=errors)


def check_origin(request: Request, origins: frozenset[str]) -> None:
    "Raise a 403 for a page of a site that isn't listed. A browser says so itself (`Sec-Fetch-Site`), so it doesn't matter which name a proxy gave us."
    origin = request.headers.get("origin")
    if request.headers.get("sec-fetch-site") in ("cross-site", "same-site") and origin not in origins:
        raise Problem(403, "unknown-origin", f"pages of {shown(origin)} may not send events here; SHOPAI_SERVE_ORIGINS lists those that may")


# --- the addresses ---

_EXAMPLES = {
    "shop": {"summary": "A page view and a purchase, under our own names", "value": {"sent_at": "2026-03-01T09:30:01Z", "events": [
        {"event_id": "7c2f8a52-3d5b-4f61-9d0e-1f2a3b4c5d6e", "event_name": "view_item", "event_time": "2026-03-01T09:29:58.120Z", "anonymous_id": "b3c9f0aa",
         "session_id": "s-81", "item_id": "85123A", "timezone": "Europe/London", "consent": {"analytics": True, "personalisation": False}},
        {"event_id": "order-581587", "event_name": "purchase", "event_time": "2026-03-01T09:30:00Z", "anonymous_id": "b3c9f0aa", "transaction_id": "581587",
         "currency": "GBP", "consent": True, "items": [{"item_id": "85123A", "quantity": 6, "price": 2.55}, {"item_id": "22423", "price": 12.75}]},
    ]}},
    "ga4": {"summary": "As Google Analytics 4 spells it", "value": {"events": [
        {"name": "add_to_cart", "client_id": "1234.5678", "timestamp_micros": 1772357398120000, "event_id": "c0ffee-1",
         "consent": {"analytics_storage": "granted", "ad_personalization": "denied"},
         "params": {"currency": "GBP", "ga_session_id": "1772357000", "items": [{"item_id": "85123A", "quantity": 6, "price": 2.55}]}},
    ]}},
    "segment": {"summary": "As Segment spells it", "value": {"events": [
        {"event": "Product Viewed", "messageId": "ajs-1", "timestamp": "2026-03-01T09:29:58.120Z", "anonymousId": "b3c9f0aa", "consent": True,
         "properties": {"product_id": "85123A", "price": 2.55, "currency": "GBP"},
         "context": {"ip": "203.0.113.7", "userAgent": "Mozilla/5.0", "timezone": "Europe/London", "campaign": {"name": "spring", "source": "newsletter"}}},
    ]}},
}
_ANSWER = {"request_id": "5f0c1f6e9d5b4a0f8e0a3f5b1c2d3e4f", "accepted": 1, "refused": 1, "events": [
    {"status": "accepted", "event_id": "7c2f8a52-3d5b-4f61-9d0e-1f2a3b4c5d6e"}, {"status": "refused", "reason": "items[0].quantity: must be ≥ 0, got -1"}]}
_PATH = "/v1/events"
_SCHEMA = EventsRequest.model_json_schema()


@router.post("/events", status_code=202, response_model=EventsAccepted, summary="Send events", responses={
    202: {"description": "The accepted events are safe on disk.", "content": {"application/json": {"example": _ANSWER}}},
    **documented(400, "invalid-json", "the body is not valid JSON: Expecting value at character 8", _PATH),
    **documented(403, "unknown-origin", 'pages of "https://other.example" may not send events here; SHOPAI_SERVE_ORIGINS lists those that may', _PATH),
    **documented(413, "too-large", f"the body must not be longer than {MAX_BODY} bytes", _PATH),
    **documented(422, "invalid-request", f"events must be {EVENTS}, got a list of 501", _PATH),
    **documented(500, "internal", INTERNAL, _PATH),
    **documented(503, "bus-unavailable", UNAVAILABLE, _PATH),
}, openapi_extra={"requestBody": {"required": True, "content": {
    "application/json": {"schema": _SCHEMA, "examples": _EXAMPLES}, "text/plain": {"schema": _SCHEMA}}}})
async def events(request: Request) -> JSONResponse:
    """What visitors do: 1 to 500 events, each under our own names, Google Analytics 4's or Segment's. The body is JSON, whatever its Content-Type says: a
    browser's `sendBeacon` sends `text/plain`.

    The answer comes once all accepted events are durable, and has a verdict for each, in the order sent; a refused one doesn't hold back the others. If all are
    refused it is a 422 (`all-refused`) whose `errors` tell why. After a 503, or no answer at all, send the same events again: an event is recognised by its
    `event_id`, so none counts twice. An event without an `event_id` gets a new one each time it is sent.

    E-mail addresses, names and other texts that identify a person are replaced by pseudonyms or dropped before anything is kept, and `notes` say so. Without
    consent for analytics an event keeps no identifier. The visitor's address and agent are those of the browser that sends; a server that sends for its
    customers says `ip` and `user_agent` in each event.
    """
    app = request.app.state
    check_origin(request, app.serve.allowed_origins)
    try: body = await request.body()
    except ClientDisconnect: raise Problem(400, "invalid-json", "the body ended early") from None  # nobody is left to read it; it keeps the log clean
    verdicts = await app.intake.take(body, *visitor(request, app.serve.trusted_proxies))
    accepted = sum(verdict["status"] == "accepted" for verdict in verdicts)
    told = {"request_id": request.state.request_id, "accepted": accepted, "refused": len(verdicts) - accepted, "events": verdicts}
    return JSONResponse(told, 202)


@router.options("/events", status_code=204, include_in_schema=False)
async def preflight() -> Response:
    "What a browser asks before a page of another site sends JSON; `CrossOrigin` adds the answer that matters."
    return Response(status_code=204, headers={"Allow": "POST, OPTIONS"})


SCRIPT = (Path(__file__).parents[1] / "static" / "shopai.js").read_bytes()
PACKED = gzip.compress(SCRIPT, mtime=0)
ETAG = f'W/"{hashlib.sha256(SCRIPT).hexdigest()[:16]}"'  # weak, since it names the text, packed or not


@router.get("/shopai.js", summary="Script for the shop's pages", response_class=Response, responses={200: {"content": {"text/javascript": {}}}})
async def script(request: Request) -> Response:
    """Sends page views and whatever else `shopai.track` is told; nothing before the visitor's consent. Its head says how a page uses it. It is kept by browsers
    for a day and then asked for by its `ETag`.
    """
    headers = {"ETag": ETAG, "Cache-Control": "public, max-age=86400, stale-while-revalidate=604800", "Vary": "Accept-Encoding",
               "Cross-Origin-Resource-Policy": "cross-origin", "X-Content-Type-Options": "nosniff"}
    if ETAG in request.headers.get("if-none-match", ""): return Response(status_code=304, headers=headers)
    if "gzip" not in request.headers.get("accept-encoding", ""): return Response(SCRIPT, headers=headers, media_type="text/javascript")
    return Response(PACKED, headers={**headers, "Content-Encoding": "gzip"}, media_type="text/javascript")
