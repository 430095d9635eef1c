"""What it costs /v1/recommendations to look up the visit under way: one process and thread, without a store, with SQLite and with Redis, and when Redis goes.

    python benchmarks/serving_features.py --home .shopai --rate 50 --seconds 20

Needs a home with a champion (`shopai demo` makes one). Every customer of the bundle and as many visits get five recent items, written with Feast into the
shop's own kinds of stores: a file in a temporary folder, and a Redis of its own on a free port. Then the load of `benchmarks/serving.py` is sent to a fresh
server for each store, of 70 % customers, 20 % visits and 10 % customers nobody knows. In the last two runs Redis is frozen (it keeps its connections and says
nothing), or killed, after the first third of the time, and is back, thawed or empty, after the second: each third has its figures. First, look-ups alone are
timed in this process. Load generator, server and Redis share the machine.
"""

import argparse
import json
import os
import platform
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil

from shopai.core.artifacts import ModelStore
from shopai.core.config import UsageError, get_settings
from shopai.core.files import write_json
from shopai.features.catalogue import PROJECT, VIEWS
from shopai.features.online import open_reader
from shopai.recommend.bundle import Recommender

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from feast_store import Feast, free_port, redis_at, stop  # noqa: E402

from serving import load, start  # noqa: E402  benchmarks/serving.py, which stands beside this file

RESULT = ROOT / "benchmarks" / "results" / "serving_features.json"
CLIENTS = 2  # see benchmarks/serving.py


def fill(store: Feast, bundle: Recommender, seed: int = 0) -> None:
    "A context of the last minutes for every customer, and for as many visits."
    rng, now = random.Random(seed), time.time_ns() // 1_000
    def context() -> dict:
        items = {f"recent_item_{place}": bundle.item_ids[rng.randrange(len(bundle.item_ids))] for place in range(1, 6)}
        counts = {name: rng.randrange(20) for name in ("session_events", "cart_size", "orders")}
        times = {"seen_at": now, "session_started_at": now - 10**8, "cart_changed_at": now}
        return {**times, "cart_value": 9.5, "views_7d": 3.5, "orders_30d": 0.5, **counts, **items}

    users, visits = list(bundle.user_ids), [f"visit-{n}" for n in range(len(bundle.user_ids))]
    for view, key, names in (("user_context", "user_id", users), ("session_context", "session_id", visits)):
        for first in range(0, len(names), 5_000): store.write(view, [({key: name}, context(), now) for name in names[first:first + 5_000]])


def traffic(bundle: Recommender, n: int, seed: int = 0) -> list[dict]:
    "`n` request bodies in random order, the same for the same seed."
    rng, customers = random.Random(seed), len(bundle.user_ids)
    def customer(): return {"user_id": bundle.user_ids[rng.randrange(customers)]}
    def visit(): return {"session_id": f"visit-{rng.randrange(customers)}"}
    def stranger(): return {"user_id": f"nobody-{rng.randrange(10**9)}"}
    return [make() for make in rng.choices((customer, visit, stranger), (70, 20, 10), k=n)]


def told(starts: np.ndarray, times: np.ndarray, labels: np.ndarray) -> dict:
    "Figures of some answers."
    p50, p99 = (round(float(np.percentile(times, q)), 2) for q in (50, 99))
    return {"requests": len(times), "p50_ms": p50, "p99_ms": p99, "max_ms": round(float(times.max()), 2),
            "rate_reached": round((len(times) - 1) / float(np.ptp(starts)), 1), "context": dict(Counter(labels.tolist()))}


def run(home: Path, folder: Path, location: str, bodies: list[dict], given: argparse.Namespace, faults: tuple[Callable, ...] = ()) -> dict:
    "Load on a fresh server; the `faults` happen after each third."
    with open(folder / "server.log", "wb") as log:
        process, address, ready = start(home, log, SHOPAI_ONLINE_STORE=location)
        try:
            server = psutil.Process(process.pid)
            memory, cpu, moments = server.memory_info().rss, sum(server.cpu_times()[:2]), []

            def after_thirds() -> None:
                for fault in faults:
                    time.sleep(given.seconds / 3)
                    fault()
                    moments.append(time.time())

            time.sleep(1)  # the store has been found
            thread = threading.Timer(locust_starts(), after_thirds)
            thread.start()
            found = load(address, bodies, given.rate, CLIENTS, given.seconds, folder)
            thread.join()
            cpu = sum(server.cpu_times()[:2]) - cpu
        finally:
            process.terminate()
            process.wait(timeout=15)
    starts, times, labels = np.array(found["starts"]), np.array(found["milliseconds"]), np.array([str(label) for label in found["labels"]])
    whole = {**told(starts, times, labels), "errors": len(found["errors"]), "start_to_ready_s": round(ready, 2), "rss_mb_ready": round(memory / 1e6, 1),
             "server_cpu_share": round(cpu / given.seconds, 3)}
    part = np.searchsorted(moments, starts)
    return whole | {name: told(starts[part == n], times[part == n], labels[part == n]) for n, name in enumerate(("before", "away", "back")) if faults}


def locust_starts() -> float: return 2.5  # seconds until the load generator sends its first request, about; the thirds are cut by the clock


def look_up(location: str, users: list[str]) -> dict:
    "One customer's context, as the server asks for it."
    reader, times = open_reader(location), []
    for user in users:
        began = time.perf_counter()
        reader.entity({"user_id": user}, ["user_context"])
        times.append(1e3 * (time.perf_counter() - began))
    reader.close()
    return {"look_ups": len(times), "p50_ms": round(float(np.percentile(times, 50)), 3), "p99_ms": round(float(np.percentile(times, 99)), 3)}


def measure(given: argparse.Namespace) -> dict:
    "All figures of one run."
    home, models = given.home.absolute(), ModelStore.from_settings(get_settings(home=given.home.absolute()))
    champion = models.champion("recommend")
    if champion is None: raise UsageError(f"home: {home} has no champion of 'recommend'; shopai demo makes one")
    bundle = Recommender.load(models.fetch("recommend", champion["version"]))
    bodies, views = traffic(bundle, int(given.rate * given.seconds) + CLIENTS), [VIEWS["user_context"], VIEWS["session_context"]]
    with tempfile.TemporaryDirectory() as place:
        folder, port, began = Path(place), free_port(), time.perf_counter()
        redis = [redis_at(port)]
        def killed(): redis[0].kill()
        def started(): redis[0] = redis_at(port)
        def frozen(): redis[0].send_signal(signal.SIGSTOP)
        def thawed(): redis[0].send_signal(signal.SIGCONT)
        try:
            location = {"sqlite": f"sqlite:///{folder / 'online.db'}", "redis": f"redis://127.0.0.1:{port}/0"}
            stores = {"sqlite": Feast(folder, PROJECT, views, guarded=True)}
            (folder / "redis").mkdir()
            stores["redis"] = Feast(folder / "redis", PROJECT, views, f"127.0.0.1:{port}", guarded=True)
            for store in stores.values(): fill(store, bundle)
            filled = time.perf_counter() - began

            found = {"look_up": {name: look_up(where, [body["user_id"] for body in bodies if "user_id" in body]) for name, where in location.items()}}
            found["no store"] = run(home, folder, str(folder / "none.db"), bodies, given)
            found["sqlite"] = run(home, folder, location["sqlite"], bodies, given)
            found["redis"] = run(home, folder, location["redis"], bodies, given)
            found["redis frozen"] = run(home, folder, location["redis"], bodies, given, (frozen, thawed))
            found["redis killed"] = run(home, folder, location["redis"], bodies, given, (killed, started))
        finally:
            thawed()
            stop(redis[0])
    return {"command": f"python benchmarks/serving_features.py --rate {given.rate:g} --seconds {given.seconds:g}",
            "rate_wanted": given.rate, "clients": CLIENTS, "seconds_each": given.seconds, **found, "seconds_to_fill": round(filled, 1),
            "model": {"kind": bundle.manifest.kind, "version": bundle.version},
            "items": len(bundle.item_ids), "customers": len(bundle.user_ids),
            "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "load_before": round(os.getloadavg()[0], 2)},
            "measured": datetime.now(UTC).isoformat(timespec="seconds")}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--home", type=Path, default=Path(".shopai"), help="folder with a model store that has a champion")
    options.add_argument("--rate", type=float, default=50.0, help="requests a second")
    options.add_argument("--seconds", type=float, default=20.0, help="length of each of the five runs")
    options.add_argument("--out", type=Path, default=RESULT, help="where the figures go")
    given = options.parse_args()
    try: figures = measure(given)
    except UsageError as error: raise SystemExit(str(error)) from None
    write_json(given.out, figures)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
