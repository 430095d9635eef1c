"""How long ten million events take to become features, and how much memory that needs.

    python benchmarks/context.py
    python benchmarks/context.py --events 1000000

The events are those of the toy shop (two years), told many times over with customers, visits and orders of their own: most arrive within seconds, one in
fifty up to a day late; a third is of nobody known, of machines, or without consent, and doesn't count. They lie in a Parquet file. Each measurement is a
process of its own: `context` of the customers as a stream of batches, as the feature store writes it; `memory`, what a whole history leaves for the next
batch; `season`, the seasons of the categories. Seconds by the clock are without the start of the process; the memory is the largest resident set of the
whole process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from shopai.core.files import write_json
from shopai.core.manifest import code_version

RESULT = Path(__file__).parent / "results" / "context.json"
TOLD = """
    select event_id || '-' || n as event_id, event_name, happened as event_time,
           happened + to_milliseconds(case when luck % 50 = 0 then 1000 * (luck // 50 % 86400) else luck % 3000 end) as received_at,
           user_id || '-' || n as user_id, session_id || '-' || n as session_id, item_id, quantity, price, transaction_id || '-' || n as transaction_id,
           is_bot, consent
    from (select *, event_time + to_seconds(n * 37 % 86400) as happened, (hash(event_id, n) % 1000000000000)::bigint as luck
          from told, range({copies}) copies(n))
    limit {events}"""


def make(events: int, folder: Path) -> None:
    "Parquet files of events and items."
    import duckdb

    from shopai.core.testing import toy_shop
    shop = toy_shop(days=730)
    with duckdb.connect(config={"memory_limit": "1GB", "preserve_insertion_order": False, "temp_directory": str(folder / "spilled")}) as connection:
        connection.execute("set TimeZone = 'UTC'")
        connection.register("told", shop.events)
        connection.sql(TOLD.format(copies=events // len(shop.events) + 1, events=events)).write_parquet(str(folder / "events.parquet"))
        connection.from_df(shop.items).write_parquet(str(folder / "items.parquet"))


def compute(what: str, folder: Path) -> dict:
    "One measurement, in this process."
    import duckdb

    from shopai.features.context import context_batches, memory_from
    from shopai.features.season import season
    from shopai.features.steps import counted
    duckdb.execute("set TimeZone = 'UTC'")
    events, items = (duckdb.read_parquet(str(folder / f"{table}.parquet")) for table in ("events", "items"))
    began = time.perf_counter()
    if what == "context": rows = sum(len(batch) for batch in context_batches(events))
    elif what == "memory": rows = len(memory_from(events))
    else: rows = len(season(events, items).fetchall())
    seconds = time.perf_counter() - began
    told = {"seconds": round(seconds, 1), "rows": rows}
    return told if what == "season" else told | {"events_that_count": counted(events).to_native().aggregate("count(*)").fetchall()[0][0]}


def measure(what: str, folder: Path, events: int) -> dict:
    "One measurement, in a process of its own, with the largest memory it held."
    process = subprocess.Popen([sys.executable, str(Path(__file__).resolve()), "--one", what, str(folder)], stdout=subprocess.PIPE, text=True)
    answer = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if status: sys.exit(f"{what} failed")
    done = json.loads(answer.splitlines()[-1])
    return {"what": what, "events": events, **done, "events_per_second": round(events / done["seconds"]), "peak_mb": round(usage.ru_maxrss / 1024),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--what", nargs="+", choices=["context", "memory", "season"], default=["context", "memory", "season"])
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        print(json.dumps(compute(a.one[0], Path(a.one[1]))))
        return
    with tempfile.TemporaryDirectory(prefix="events-") as folder:
        load = round(os.getloadavg()[0], 2)
        make(a.events, Path(folder))
        runs = [measure(what, Path(folder), a.events) for what in a.what]
    machine = {"cores": os.cpu_count(), "load_before": load}
    write_json(a.out, {"runs": runs, "code": code_version(), "machine": machine, "command": "python benchmarks/context.py",
                       "measured": datetime.now(UTC).isoformat(timespec="seconds")})
    print(json.dumps(runs, indent=2))


if __name__ == "__main__": main()
