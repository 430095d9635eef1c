"""How fast one process answers POST /v1/events while it also answers /v1/recommendations, and what the one costs the other.

    python benchmarks/events_api.py --home .shopai --rate 50 --seconds 20

Needs a home with a champion (`shopai demo` makes one); the events go to a bus of the run's own. Two client processes keep a connection for each of their few
threads. A request is due at a fixed moment, whatever became of those before it, and its time counts from that moment, so a server that stalls is charged for
everybody who waited. First recommendations are asked for alone, then beside requests of 100 events each. In the end the bus must hold each event exactly once.
Clients and server share the machine, so the times are upper bounds.
"""

import argparse
import http.client
import json
import os
import platform
import random
import secrets
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # or `serving` would be the script beside this one

from benchmarks.serving import start, traffic  # noqa: E402
from shopai.core.artifacts import ModelStore  # noqa: E402
from shopai.core.config import UsageError, get_settings  # noqa: E402
from shopai.core.files import write_json  # noqa: E402
from shopai.events.bus import LocalBus  # noqa: E402
from shopai.recommend.bundle import Recommender  # noqa: E402

NAMES = ("view_item", "view_item_list", "select_item", "add_to_cart", "search", "purchase")


def make_events(n: int, items: list[str], rng: random.Random) -> list[dict]:
    "What a shop's server passes on of its visitors, in the three spellings; every fourth visitor has an e-mail address for an id."
    now, found = datetime.now(UTC).isoformat(), []
    for name in rng.choices(NAMES, (50, 15, 15, 10, 7, 3), k=n):
        visitor, item = f"{rng.getrandbits(64):016x}", {"item_id": rng.choice(items), "quantity": rng.randint(1, 9), "price": round(rng.uniform(1, 90), 2)}
        key, user = f"{rng.getrandbits(128):032x}", f"{visitor}@example.com" if rng.random() < .25 else None
        more = {"transaction_id": key[:12]} if name == "purchase" else {"search_term": "red lantern for the garden"} if name == "search" else {}
        consent = {"analytics": True, "personalisation": rng.random() < .5}
        if (spelling := rng.random()) < .8:
            found.append({"event_id": key, "event_name": name, "event_time": now, "anonymous_id": visitor, "session_id": visitor[:8], "user_id": user,
                          "timezone": "Europe/London", "currency": "GBP", "consent": consent, "items": [item], **more})
        elif spelling < .9:
            found.append({"event_id": key, "name": name, "client_id": visitor, "user_id": user, "consent": {"analytics_storage": "granted"},
                          "params": {"currency": "GBP", "ga_session_id": visitor[:8], "items": [item], **more}})
        else:
            found.append({"messageId": key, "event": name, "timestamp": now, "anonymousId": visitor, "userId": user, "consent": consent,
                          "properties": {"currency": "GBP", "products": [{"product_id": item["item_id"], **item}], "query": more.get("search_term"),
                                         "order_id": more.get("transaction_id")},
                          "context": {"ip": "203.0.113.7", "userAgent": "Mozilla/5.0 (X11; Linux x86_64)", "timezone": "Europe/London"}})
    return found


def ask(address: str, path: str, bodies: list[bytes], status: int, rate: float, threads: int, begin: float) -> tuple[list[float], list[str]]:
    "Send each body when it is due; milliseconds from that moment to the end of the answer, and what went wrong."
    times, errors, turn, lock = [0.0] * len(bodies), [], iter(range(len(bodies))), threading.Lock()

    def client():
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
        while True:
            with lock: i = next(turn, None)
            if i is None: return
            due = begin + i / rate
            time.sleep(max(0.0, due - time.time()))
            try:
                connection.request("POST", path, bodies[i], {"Content-Type": "application/json"})
                answer = connection.getresponse()
                body = answer.read()
                if answer.status != status or b'"refused":0' not in body and status == 202: errors.append(f"status {answer.status}: {body[:200]!r}")
            except OSError as error:
                errors.append(f"{type(error).__name__}: {error}")
                connection.close()
            times[i] = (time.time() - due) * 1000

    crew = [threading.Thread(target=client) for _ in range(threads)]
    for thread in crew: thread.start()
    for thread in crew: thread.join()
    return times, errors


def send_events(address: str, items: list[str], requests: int, each: int, *how) -> tuple[list[float], list[str]]:
    rng = random.Random(0)
    return ask(address, "/v1/events", [json.dumps({"events": make_events(each, items, rng)}).encode() for _ in range(requests)], 202, *how)


def recommend(address: str, bodies: list[dict], *how) -> tuple[list[float], list[str]]:
    return ask(address, "/v1/recommendations", [json.dumps(body).encode() for body in bodies], 200, *how)


def summary(found: tuple[list[float], list[str]]) -> dict:
    times, errors = np.array(found[0]), found[1]
    return {"p50_ms": round(float(np.percentile(times, 50)), 2), "p99_ms": round(float(np.percentile(times, 99)), 2), "max_ms": round(float(times.max()), 2),
            "requests": len(times), "errors": len(errors), **({"first_error": errors[0]} if errors else {})}


def measure(home: Path, rate: float, each: int, seconds: float, threads: int) -> dict:
    "All figures of one run."
    store = ModelStore.from_settings(get_settings(home=home))
    champion = store.champion("recommend")
    if champion is None: raise UsageError(f"home: {home} has no champion of 'recommend'; shopai demo makes one")
    bundle = Recommender.load(store.fetch("recommend", champion["version"]))
    items, bodies, requests = [bundle.item_ids[i] for i in range(len(bundle.item_ids))], traffic(bundle, int(rate * seconds)), int(rate * seconds)
    load_before, lead = os.getloadavg()[0], 2 + seconds / 4  # seconds; clients write their requests down beforehand
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "server.log", "wb") as log:
        os.environ |= {"SHOPAI_BUS": f"{folder}/bus", "SHOPAI_PSEUDONYM_KEY": secrets.token_hex(16)}
        process, address, ready = start(home, log)
        try:
            server = psutil.Process(process.pid)
            with ProcessPoolExecutor(2, get_context("spawn")) as pool:
                alone = pool.submit(recommend, address, bodies, rate, threads, time.time() + lead).result()
                memory, begin = server.memory_info().rss, time.time() + lead
                sending = pool.submit(send_events, address, items, requests, each, rate, threads, begin)
                asking = pool.submit(recommend, address, bodies, rate, threads, begin)
                time.sleep(max(0.0, begin - time.time()))
                cpu = sum(server.cpu_times()[:2])
                sent, beside = sending.result(), asking.result()
                cpu, memory_after = sum(server.cpu_times()[:2]) - cpu, server.memory_info().rss
        finally:
            process.terminate()
            process.wait(timeout=15)
        bus = LocalBus(f"{folder}/bus")
        kept = [json.loads(record.value)["event_id"] for record in bus.read({0: 0}, 10**9, wait=0)]
        bus.close()
        lost, double = requests * each - len(set(kept)), len(kept) - len(set(kept))
        log_lines = Path(log.name).read_text().count("\n")
    return {
        "events": summary(sent), "recommendations_beside": summary(beside), "recommendations_alone": summary(alone),
        "events_each": each, "rate_wanted": rate, "seconds": seconds, "threads": threads,
        "events_sent": requests * each, "events_lost": lost, "events_double": double,
        "server_cpu_share": round(cpu / seconds, 3), "rss_mb_before_events": round(memory / 1e6, 1), "rss_mb_after": round(memory_after / 1e6, 1),
        "start_to_ready_s": round(ready, 2), "log_lines": log_lines, "model": {"kind": bundle.manifest.kind, "items": len(items)},
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "load_before": round(load_before, 2)},
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--home", type=Path, default=Path(".shopai"), help="folder with a model store that has a champion")
    options.add_argument("--rate", type=float, default=50.0, help="requests a second, of each kind")
    options.add_argument("--events", type=int, default=100, help="events in a request")
    options.add_argument("--seconds", type=float, default=20.0, help="length of each of the two parts")
    options.add_argument("--threads", type=int, default=4, help="connections of each client process")
    options.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "events_api.json", help="where the figures go")
    given = options.parse_args()
    try: figures = measure(given.home.absolute(), given.rate, given.events, given.seconds, given.threads)
    except UsageError as error: raise SystemExit(str(error)) from None
    write_json(given.out, figures)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
