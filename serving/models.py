"Keeps the champion of the model store in memory: loads it beside the requests, proves it, and only then puts it in its place."

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serving.logs import event
from serving.problems import Problem
from shopai.core.artifacts import BundleError, ModelStore
from shopai.core.config import UsageError
from shopai.recommend.bundle import Recommender

LONGEST_PAUSE = 60.0  # seconds between attempts to load a champion that was refused
EXPECTED = (BundleError, UsageError)  # their text is one clear line
RETRY_AFTER = 5       # seconds; what a client without an answer is told


@dataclass(frozen=True)
class Served:
    "A loaded model and the promotion that put it here."

    recommender: Recommender
    champion: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        "What `GET /v1/models` tells."
        manifest = self.recommender.manifest
        told = {name: getattr(manifest, name) for name in ("name", "version", "kind", "created", "data_until", "metrics")}
        return {**told, "promoted_at": self.champion.get("promoted_at")}


def warm_up(recommender: Recommender) -> None:
    "Ask what customers will ask. Raises `UsageError` if there is no answer: such a model must not go live."
    item_ids, user_ids = recommender.item_ids, recommender.user_ids
    some_items = [item_ids[i] for i in range(min(3, len(item_ids)))]
    answers = [recommender.recommend(item_ids=some_items), recommender.recommend(user_id="\0nobody")]
    answers += [recommender.recommend(user_id=user_ids[i]) for i in np.linspace(0, len(user_ids) - 1, min(8, len(user_ids)), dtype=int)]
    recommender.similar(some_items[0])
    if not all(answer.items for answer in answers[:2]):
        raise UsageError("the model recommends nothing to a visitor")


class LiveModel:
    """The champion of one name.

    `refresh` may take seconds and runs in a thread of its own; `current` is swapped in one step, so a request sees one model or the other.
    """

    def __init__(self, store: ModelStore, name: str, cache_dir: str | Path, poll_seconds: float = 5.0):
        self.store, self.name, self.cache_dir, self.poll_seconds = store, name, Path(cache_dir), poll_seconds
        self.current: Served | None = None
        self.refused: str | None = "the champion is being loaded"  # why the newest champion is not (yet) the current one
        self._logged: str | None = None
        self._broken: dict[str, Any] | None = None  # a champion that could not be loaded, how often that was tried, and when to try again
        self._attempts, self._retry_at = 0, 0.0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def require(self) -> Served:
        "The current model; a 503 problem when there is none."
        if self.current is None:
            raise Problem(503, "no-model", f"no model is ready: {self.refused}", {"Retry-After": str(RETRY_AFTER)})
        return self.current

    def refresh(self) -> None:
        "Load the champion if it changed. Never raises: what failed is kept in `refused` and logged once, and what was served before is served on."
        champion = None
        try:
            champion = self.store.champion(self.name)
            if champion is None:
                raise UsageError(f"the model store has no champion of {self.name!r} yet; train and promote one with: shopai run {self.name}")
            if champion == self._broken and time.monotonic() < self._retry_at:
                return
            if self.current is None or champion != self.current.champion:
                self.current = self._load(champion)
                event("info", "champion loaded", model=self.name, version=champion["version"], kind=self.current.recommender.manifest.kind)
            self.refused, self._logged, self._broken = None, None, None
        except Exception as error:  # whatever is wrong with a new champion, requests must go on
            self._refuse(champion, error)

    def _load(self, champion: dict[str, Any]) -> Served:
        if self.current is not None and self.current.champion["manifest_sha256"] == champion["manifest_sha256"]:
            return Served(self.current.recommender, champion)  # promoted anew; the bundle is the same
        recommender = Recommender.load(self.store.fetch(self.name, champion["version"], self.cache_dir))
        warm_up(recommender)
        return Served(recommender, champion)

    def _refuse(self, champion: dict[str, Any] | None, error: Exception) -> None:
        self._attempts = self._attempts + 1 if champion == self._broken else 0
        self._broken, self._retry_at = champion, time.monotonic() + min(self.poll_seconds * 2 ** min(self._attempts, 10), LONGEST_PAUSE)
        reason = f"{type(error).__name__}: {error}"
        if reason != self._logged:
            event("error" if self.current is None else "warning", "champion refused", model=self.name, reason=reason,
                  still_served=self.current and self.current.recommender.version, exc_info=not isinstance(error, EXPECTED))
        self._logged = reason
        # The log says where the store is; a client is told which file, not where this machine keeps it.
        told = str(error) if isinstance(error, EXPECTED) else f"the champion could not be loaded ({type(error).__name__}); the log has the reason"
        self.refused = told.replace(f"{self.store.location}/", "")

    def _watch(self) -> None:
        self.refresh()
        while not self._stopping.wait(self.poll_seconds):
            self.refresh()

    def start(self) -> None:
        "Load now and then look for a new champion, in the background, so that the process answers `/healthz` from its first moment."
        self._thread = threading.Thread(target=self._watch, name=f"champion-{self.name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
