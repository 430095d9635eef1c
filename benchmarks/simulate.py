"""How long the synthetic shop takes to simulate and to put into the lake, how much memory it holds, and how both grow with its customers.

    python benchmarks/simulate.py --customers 5000 50000

Each size is one `shopai data build --source synthetic` in a process of its own, on one core, into a temporary home: the world, a year of simulated days,
all tables of the contract, and the pictures. Seconds by the clock depend on what else the machine does; CPU seconds beside them depend less on it.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from shopai.core.files import write_json
from shopai.core.manifest import code_version

RESULT = Path(__file__).parent / "results" / "simulate.json"
BUILD = "import sys; sys.argv = ['shopai', *sys.argv[1:]]; from shopai.cli import main; main()"


def build(customers: int, items: int, days: int, home: Path) -> dict[str, float]:
    "Build one shop; seconds, CPU seconds, and the largest resident memory."
    words = ["data", "build", "--source", "synthetic", "--customers", str(customers), "--items", str(items), "--days", str(days)]
    environment = {**os.environ, "SHOPAI_HOME": str(home), **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")}
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # the child inherits it: one core
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", BUILD, *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    os.sched_setaffinity(0, cores)
    if status: sys.exit(f"shopai {' '.join(words)} failed: run it by hand to see why")
    return {"seconds": round(seconds, 1), "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1), "peak_mb": round(usage.ru_maxrss / 1024)}


def events(home: Path) -> int:
    "Rows of the events table."
    words = ["data", "describe", "--json"]
    done = subprocess.run([sys.executable, "-c", BUILD, *words], env={**os.environ, "SHOPAI_HOME": str(home)}, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)["tables"]["events"]["rows"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--customers", type=int, nargs="+", default=[5_000, 50_000], help="sizes of the shop (default: %(default)s)")
    parser.add_argument("--items", type=int, default=1_000)
    parser.add_argument("--days", type=int, default=365)
    a = parser.parse_args()
    sizes = []
    for customers in a.customers:
        with tempfile.TemporaryDirectory() as folder:
            row = {"customers": customers, **build(customers, a.items, a.days, Path(folder)), "events": events(Path(folder))}
        row["events_per_second"] = round(row["events"] / row["seconds"])
        sizes.append(row)
        print("{customers:>8,} customers: {seconds:6.1f} s, {cpu_seconds:6.1f} CPU s, {peak_mb:5,} MB at most, {events:>12,} events, "
              "{events_per_second:,} a second".format(**row))
    write_json(RESULT, {"command": f"python benchmarks/simulate.py --customers {' '.join(map(str, a.customers))}", "code_version": code_version(),
                        "measured": datetime.now(UTC).isoformat(timespec="seconds"), "items": a.items, "days": a.days, "sizes": sizes,
                        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}; one core used"})


if __name__ == "__main__":
    main()
