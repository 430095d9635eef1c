"What the shop knows about a customer now: looked up in the online store, and done without while the store is away."

import threading
import time
from dataclasses import dataclass
from pathlib import Path

from serving.logs import event
from shopai.core.config import Settings
from shopai.features.catalogue import MINUTE
from shopai.features.online import Looked, StoreUnavailable, open_reader

VISIT = 30 * MINUTE  # a longer pause ends a visit, as it does where sessions are made
SHORTEST_PAUSE, LONGEST_PAUSE = 0.25, 5.0  # seconds between questions to a store that is away
HINT = "no features are online yet; shopai features apply makes the store, and it is found when it is there"


@dataclass(frozen=True)
class Context:
    "What of a customer's present goes into an answer."

    label: str  # live, none, stale, unavailable or off: the answer's `context`
    recent: tuple[str, ...] = ()    # items of the visit under way, oldest first: for the model
    withheld: tuple[str, ...] = ()  # items of a visit that is over, with an order in it that the model's data don't hold: not to be offered again


class LiveFeatures:
    """The online store, asked within the event loop: a look-up takes a fraction of a millisecond, less than to hand it to a thread.

    Only the first request to find the store away waits for it, as long as the timeout says. From then on a thread asks, ever less often, and requests are
    answered without features until the store is back. Nothing here raises.
    """

    def __init__(self, location: str, project: str, timeout: float):
        self._reader = open_reader(location, project, timeout)
        self._file = Path(location.removeprefix("sqlite://")) if location.startswith("sqlite://") else None
        self.away: str | None = "unavailable" if self._file is None else "off"  # why the store isn't asked; None: it is
        self._told: str | None = None  # what was logged last
        self._pause, self._back_at = SHORTEST_PAUSE, 0.0
        self._gone, self._stopping = threading.Event(), threading.Event()
        self._gone.set()  # until it is found
        self._thread: threading.Thread | None = None

    @classmethod
    def from_settings(cls, settings: Settings, timeout_ms: float) -> "LiveFeatures":
        return cls(settings.online_location, settings.feature_project, timeout_ms / 1000)

    def context(self, user_id: str | None, session_id: str | None, data_until: int) -> Context:
        "What is known of a customer or a visit now; `data_until` is the end of the model's data in seconds since 1970."
        keys = {name: value for name, value in (("session_id", session_id), ("user_id", user_id)) if value is not None}
        if not keys: return Context("none")
        if away := self.away: return Context(away)
        now = time.time_ns() // 1_000
        try: found = self._reader.entity(keys, [VIEW_OF[name] for name in keys], now)
        except Exception as error: return Context(self._lost(error))  # whatever is wrong with the store, requests must go on
        return combine(list(found.values()), now, data_until * 1_000_000)

    def _lost(self, error: Exception) -> str:
        "Stop asking, and let the thread look for the store. A store that fails again soon after it came back is given longer."
        self._pause = SHORTEST_PAUSE if time.monotonic() - self._back_at > LONGEST_PAUSE else min(2 * self._pause, LONGEST_PAUSE)
        self.away = away = self._reason()
        self._tell(away, error)
        self._gone.set()
        return away

    def _reason(self) -> str: return "off" if self._file is not None and not self._file.exists() else "unavailable"

    def _tell(self, state: str, error: Exception | None = None) -> None:
        "Log a change."
        if state == self._told: return
        self._told, reason = state, HINT if state == "off" else error and str(error)
        unforeseen = error is not None and not isinstance(error, StoreUnavailable)
        event("warning" if state == "unavailable" else "info", "online features", state=state, reason=reason, exc_info=unforeseen and error)

    def _watch(self) -> None:
        "Look for the store whenever it is away."
        while not self._stopping.is_set():
            self._gone.clear()
            try:
                self._reader.get("user_context", {"user_id": ""})
            except Exception as error:
                self.away = self._reason()
                self._tell(self.away, error)
                self._stopping.wait(self._pause)
                self._pause = min(2 * self._pause, LONGEST_PAUSE)
            else:
                self._back_at = time.monotonic()
                self._tell("live")
                self.away = None
                if not self._stopping.is_set(): self._gone.wait()
                self._stopping.wait(self._pause)

    def start(self) -> None:
        "Look for the store in the background, so that none keeps the API from starting."
        self._thread = threading.Thread(target=self._watch, name="online-features", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._gone.set()
        if self._thread is not None: self._thread.join(timeout=5)
        self._reader.close()


VIEW_OF = {"session_id": "session_context", "user_id": "user_context"}


def combine(found: list[Looked], now: int, data_until: int) -> Context:
    """One context of what is known of the visit and of the customer, the visit first; times in µs since 1970.

    Items of the visit under way go to the model. Those of an earlier visit don't: they make its answer worse (`benchmarks/live_context.py`). But after an order
    that its data don't hold, the model can't know what the customer has by now, and they are withheld.
    """
    fresh = [each for each in found if each.status == "fresh"]
    if not fresh: return Context("stale" if any(each.status == "stale" for each in found) else "none")
    newest = max(fresh, key=lambda each: each.at)
    recent = _recent(newest) if now - newest.at <= VISIT else ()
    withheld = tuple(item for each in fresh if (each.values["last_order_at"] or 0) > data_until for item in _recent(each))
    return Context("live" if recent or withheld else "none", recent, withheld)


def _recent(known: Looked) -> tuple[str, ...]:
    "The last items, oldest first."
    return tuple(item for place in (5, 4, 3, 2, 1) if (item := known.values[f"recent_item_{place}"]) is not None)
