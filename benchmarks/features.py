"""How long a customer waits for features: our reader and Feast's get_online_features side by side, on SQLite and on Redis.

    python benchmarks/features.py
    python benchmarks/features.py --customers 2000 --items 200 --rounds 2 --store sqlite

A store of 20,000 customers (17 features and a vector each) and 2,000 items (a vector of 64 numbers, and two numbers for each of their categories and weeks) is
written with Feast, into the shop's own kinds of stores: a SQLite file in a temporary folder, and a Redis of its own on a free port of this machine. Then both
are asked the same questions in turn, by one thread pinned to one core, and it is checked that they give the same answers. A round's p99 is the time that one
in a hundred look-ups exceeds; reported is the median of the rounds' p50 and p99, in milliseconds, by the clock on the wall and in time on the processor, which
leaves out waiting, for Redis and for whoever else uses the machine. Both give Python values: Feast's answer is turned into a dictionary, ours has the derived
features as well. Last, a fresh process tells how long each takes from its start to its first answer, and its memory then.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import numpy as np
import psutil

from shopai.core.files import write_json
from shopai.core.manifest import code_version
from shopai.features.catalogue import SECOND, VIEWS
from shopai.features.online import open_reader

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "features.json"
sys.path.insert(0, str(ROOT / "tests"))
USED = ["user_context", "user_als", "item_text", "category_season"]
LIMITS_MS = {"one customer": 1, "one customer, two views": 1, "vectors of 100 items": 5, "numbers of 100 categories": 5, "100 customers": 5}  # p99


def customer(rng: random.Random, now: int) -> dict:
    "The 17 features of a customer."
    moments = {name: now - rng.randrange(10**12) for name in ("seen_at", "session_started_at", "cart_changed_at", "first_order_at", "last_order_at")}
    counts = {name: rng.randrange(50) for name in ("session_events", "cart_size", "orders")}
    numbers = {name: rng.random() * 100 for name in ("cart_value", "value", "views_7d", "orders_30d")}
    return {**moments, **counts, **numbers, **{f"recent_item_{place}": f"item-{rng.randrange(99_999)}" for place in range(1, 6)}}


def fill(feast, customers: int, items: int, now: int) -> float:
    "Write everything; the seconds it took."
    rng, vectors, began = random.Random(0), np.random.default_rng(0), time.perf_counter()
    for start in range(0, customers, 5_000):
        users = [{"user_id": f"u{n}"} for n in range(start, min(start + 5_000, customers))]
        feast.write("user_context", [(user, customer(rng, now), now) for user in users])
        feast.write("user_als", [(user, {"vector": vectors.normal(size=64)}, now) for user in users])
    feast.write("item_text", [({"item_id": f"i{n}"}, {"vector": vectors.normal(size=64)}, now) for n in range(items)])
    seasons = [({"category": f"c{n}", "week": week}, {"season_index": rng.random(), "years": 3}, now) for n in range(items // 10) for week in range(1, 11)]
    feast.write("category_season", seasons)
    return time.perf_counter() - began


def questions(customers: int, items: int, seed: int) -> dict[str, Callable[[], tuple]]:
    "What is asked: views, and the keys of entities, drawn anew each time."
    rng = random.Random(seed)
    def user(): return {"user_id": f"u{rng.randrange(customers)}"}
    def item(): return {"item_id": f"i{rng.randrange(items)}"}
    def season(): return {"category": f"c{rng.randrange(items // 10)}", "week": rng.randint(1, 10)}
    return {"one customer": lambda: (["user_context"], [user()]), "one customer, two views": lambda: (["user_context", "user_als"], [user()]),
            "vectors of 100 items": lambda: (["item_text"], [item() for _ in range(100)]),
            "numbers of 100 categories": lambda: (["category_season"], [season() for _ in range(100)]),
            "100 customers": lambda: (["user_context"], [user() for _ in range(100)])}


def ours(reader, views: list[str], keys: list[dict], now: int) -> list:
    if len(views) > 1: return [[looked.values for looked in reader.entity(keys[0], views, now).values()]]
    return [[looked.values] for looked in reader.get_many(views[0], keys, now)]


def theirs(feast, views: list[str], keys: list[dict]) -> dict:
    names = [f"{view}:{feature}" for view in views for feature in VIEWS[view].names]
    return feast.store.get_online_features(names, keys).to_dict()


def check(reader, feast, ask: tuple, now: int) -> None:
    "Both know everything, and the same."
    (views, keys), found = ask, theirs(feast, *ask)
    for place, values in enumerate(ours(reader, views, keys, now)):
        for view, mine in zip(views, values, strict=True):
            for name in VIEWS[view].names:
                told = mine[name].tolist() if isinstance(mine[name], np.ndarray) else mine[name]
                assert told is not None and told == found[name][place], f"{view}.{name}: {told!r} and {found[name][place]!r}"


def timed(look: Callable[[tuple], object], draw: Callable[[], tuple], times: int) -> dict[str, float]:
    "p50 and p99 in ms; what is asked is drawn before the clocks start."
    taken = np.zeros((times, 2))
    for number, ask in enumerate([draw() for _ in range(times)]):
        start, processor = time.perf_counter(), time.thread_time()
        look(ask)
        taken[number] = time.perf_counter() - start, time.thread_time() - processor
    p50, p99 = 1e3 * np.percentile(taken, [50, 99], axis=0)
    return dict(zip(("p50_ms", "processor_p50_ms", "p99_ms", "processor_p99_ms"), map(float, (*p50, *p99)), strict=True))


def middle(rounds: list[dict[str, float]]) -> dict:
    medians = {name: round(median(each[name] for each in rounds), 4) for name in rounds[0]}
    return {**medians, "all_p99_ms": [round(each["p99_ms"], 3) for each in rounds]}


def compare(reader, feast, customers: int, items: int, now: int, rounds: int) -> dict:
    "Each question to both, in turn."
    found = {name: {"reader": [], "feast": []} for name in LIMITS_MS}
    for number in range(rounds + 1):
        asked = questions(customers, items, number)
        for name, draw in asked.items():
            check(reader, feast, draw(), now)
            few = 1 if name.startswith("one") else 5
            mine = timed(lambda ask: ours(reader, *ask, now), draw, 2_000 // few)
            other = timed(lambda ask: theirs(feast, *ask), draw, 500 // few)
            if number: found[name]["reader"].append(mine), found[name]["feast"].append(other)  # the first round warms up
    return {name: summary(middle(both["reader"]), middle(both["feast"]), LIMITS_MS[name]) for name, both in found.items()}


def summary(reader: dict, feast: dict, limit: float) -> dict:
    faster = {name: round(feast[name] / reader[name], 1) for name in ("p50_ms", "p99_ms")}
    return {"reader": reader, "feast": feast, "times_faster_p50": faster["p50_ms"], "times_faster_p99": faster["p99_ms"],
            "limit_p99_ms": limit, "holds": reader["p99_ms"] < limit}


def start(kind: str, location: str, project: str, folder: str) -> None:
    "In a fresh process: import, open, look one customer up; seconds since the process began, and the memory."
    if kind == "reader":
        from shopai.features.online import open_reader
        known = open_reader(location, project, 5).get("user_context", {"user_id": "u1"}).status == "fresh"
    else:
        from feast_store import Feast
        feast = Feast(Path(folder), project, [VIEWS[name] for name in USED], location.removeprefix("redis://").removesuffix("/0") or None, guarded=True)
        known = theirs(feast, ["user_context"], [{"user_id": "u1"}])["orders"][0] is not None
    assert known
    print(json.dumps({"rss_mb": round(psutil.Process().memory_info().rss / 1e6, 1)}))


def started(kind: str, location: str, project: str, folder: Path) -> dict:
    "The middle one of three starts."
    runs = []
    for _ in range(3):
        began = time.perf_counter()
        words = [sys.executable, str(Path(__file__).resolve()), "--start", kind, location, project, str(folder)]
        answer = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
        runs.append({"seconds": round(time.perf_counter() - began, 2), **json.loads(answer.stdout.splitlines()[-1])})
    return sorted(runs, key=lambda run: run["seconds"])[1]


@contextmanager
def own_redis():
    from feast_store import free_port, redis_at, stop
    port = free_port()
    process = redis_at(port)
    try: yield f"127.0.0.1:{port}"
    finally: stop(process)


def measure(kind: str, address: str | None, customers: int, items: int, rounds: int) -> dict:
    "One store: written, asked, started."
    from feast_store import Feast
    project, now = f"bench{uuid.uuid4().hex[:8]}", int(time.time()) * SECOND
    with tempfile.TemporaryDirectory(prefix="features-") as folder:
        feast = Feast(Path(folder), project, [VIEWS[name] for name in USED], address, guarded=True)
        written = fill(feast, customers, items, now)
        location = f"redis://{address}/0" if address else f"sqlite:///{folder}/online.db"
        reader = open_reader(location, project, timeout=5)
        found = compare(reader, feast, customers, items, now, rounds)
        begun = {name: started(name, location, project, Path(folder)) for name in ("reader", "feast")} if address else {}
        reader.close()
    return {"store": kind, "written_s": round(written, 1), "questions": found, **({"start_to_first_answer": begun} if begun else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", nargs="+", choices=["sqlite", "redis"], default=["sqlite", "redis"])
    parser.add_argument("--customers", type=int, default=20_000)
    parser.add_argument("--items", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--start", nargs=4, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.start: return start(*a.start)
    load, stores = os.getloadavg()[0], []
    with own_redis() as address:
        if hasattr(os, "sched_setaffinity"): os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # Redis was started before, and may use any core
        for kind in a.store: stores.append(measure(kind, address if kind == "redis" else None, a.customers, a.items, a.rounds))
    write_json(a.out, {
        "command": "python benchmarks/features.py", "measured": datetime.now(UTC).isoformat(timespec="seconds"), "code": code_version(),
        "customers": a.customers, "items": a.items, "rounds": a.rounds, "stores": stores,
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "load_before": round(load, 2)}})
    print(json.dumps(stores, indent=2))


if __name__ == "__main__": main()
