"""What it costs ingest to keep the online features at what comes in, and how soon an event is known there.

    python benchmarks/live.py
    python benchmarks/live.py --events 50000 --rounds 1

The events are those of benchmarks/events.py, on the local bus. Throughput: they wait when the clock starts and are taken into the lake on one core, with and
without pushing to an SQLite store; the start of the processes isn't counted. Freshness: the service runs with its default pauses, an add_to_cart is put on the
bus every other second, and the customer is looked up every 5 ms until the store knows of it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from events import KEY, ROOT, catalogue, fill

from shopai.core.config import Settings, get_settings
from shopai.core.files import write_json
from shopai.core.manifest import code_version

RESULT = ROOT / "benchmarks" / "results" / "live.json"


def settings_of(home: Path, location: str) -> Settings: return get_settings(home=home, bus=location, pseudonym_key=KEY, online_store="")


def ingest(home: Path, location: str, batch: int, push: bool) -> dict:
    "Take everything in, in this process, on one core."
    from shopai.events.ingest import ingest_from_settings, serve_ingest
    from shopai.features.live import live_context

    if hasattr(os, "sched_setaffinity"): os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    settings = settings_of(home, location)
    running, live = ingest_from_settings(settings), live_context(settings) if push else None
    if live: running.listeners.append(live)
    began = time.perf_counter()
    done = serve_ingest(running, once=True, most=batch, wait=.05, patience=120)
    seconds = time.perf_counter() - began
    told = live.flush(at_once=True) if live else None
    assert told is None or not told.waiting, str(told)
    return {"records": done.records, "seconds": round(seconds, 3), "records_per_second": round(done.records / seconds), "rows_pushed": told.rows if told else 0}


def fresh(home: Path, location: str, count: int) -> list[float]:
    "Seconds from the bus to the online store, of single events."
    from shopai.events.bus import open_bus
    from shopai.events.ingest import ingest_from_settings, serve_ingest
    from shopai.events.wire import Door, read_event
    from shopai.features.live import live_context
    from shopai.features.online import open_reader

    settings, stop, took = settings_of(home, location), threading.Event(), []
    running = ingest_from_settings(settings)
    running.listeners.append(live_context(settings))
    service = threading.Thread(target=serve_ingest, args=(running,), kwargs={"stop": stop}, daemon=True)
    service.start()
    bus, door, reader = open_bus(location), Door(key=KEY.encode()), open_reader(settings.online_location, settings.feature_project)
    for number in range(count):
        now = datetime.now(UTC)
        event = read_event({"event_name": "add_to_cart", "event_id": f"fresh{number}", "user_id": f"fresh{number}", "session_id": f"s{number}", "item_id": "i1",
                            "event_time": now.isoformat(), "consent": True}, now, door)
        user, began = json.loads(event.to_json())["user_id"], time.perf_counter()
        bus.send([(event.key, event.to_json())])
        while reader.get("user_context", {"user_id": user}).status != "fresh": time.sleep(.005)
        took.append(round(time.perf_counter() - began, 3))
        time.sleep(2)
    stop.set()
    service.join(20)
    return took


def measure(folder: Path, location: str, batch: int, what: str, number: int) -> dict:
    "One round, in a process and a home of its own."
    home = folder / f"{what}{number}"
    catalogue(home)
    command = [sys.executable, str(Path(__file__).resolve()), "--one", str(home), location, str(batch), what]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(answer.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--batch", type=int, default=20_000, help="records in one commit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--single", type=int, default=15, help="events whose way is timed")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        home, location, batch, what = Path(a.one[0]), a.one[1], int(a.one[2]), a.one[3]
        print(json.dumps(ingest(home, location, batch, what == "push")))
        return
    load = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory(prefix="live-") as name:
        folder = Path(name)
        fill(f"{folder}/bus", a.events)
        runs = {what: [measure(folder, f"{folder}/bus", a.batch, what, number) for number in range(a.rounds)] for what in ("without", "push")}
        took = sorted(fresh(folder / "fresh", f"{folder}/quiet", a.single))
    paces = {f"{what}_per_second": round(median(run["records_per_second"] for run in found)) for what, found in runs.items()}
    result = {"records": runs["push"][0]["records"], **paces, "rows_pushed": runs["push"][0]["rows_pushed"], "fresh_median_s": median(took),
              "fresh_max_s": took[-1], "single_events": len(took), "batch": a.batch}
    write_json(a.out, {**result, "code": code_version(), "machine": {"cores": os.cpu_count(), "load_before": load}, "command": "python benchmarks/live.py",
                       "measured": datetime.now(UTC).isoformat(timespec="seconds")})
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
