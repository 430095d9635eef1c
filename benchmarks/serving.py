"""How fast one process with one thread answers /v1/recommendations, how soon it is ready, and how much memory it holds.

    python benchmarks/serving.py --home .shopai --rate 50 --seconds 30

Needs a home with a champion (`shopai demo` makes one). Locust sends the mixed traffic of a shop over loopback: 70 % known customers, 20 % sessions of one to
eight items, 10 % customers nobody knows. Load generator and server share the machine, so the times are upper bounds: locust's own share grows with its
clients. At the same 50 requests/s one client sees a median of 1.8 ms, two 2.6, four 3.6 and ten 7.2 ms (7.6 ms at 5 requests/s, too), where a plain HTTP
client on ten connections sees 1.7 ms. So there are two clients unless you say otherwise; each keeps its connection, as a storefront's processes do.
"""

import argparse
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil

from shopai.core.artifacts import ModelStore
from shopai.core.config import UsageError, get_settings
from shopai.core.files import write_json
from shopai.recommend.bundle import Recommender

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def traffic(bundle: Recommender, n: int, seed: int = 0) -> list[dict]:
    "`n` request bodies in random order, the same for the same seed."
    rng = random.Random(seed)
    def customer(): return {"user_id": bundle.user_ids[rng.randrange(len(bundle.user_ids))]}
    def session(): return {"item_ids": [bundle.item_ids[rng.randrange(len(bundle.item_ids))] for _ in range(rng.randint(1, 8))]}
    def stranger(): return {"user_id": f"nobody-{rng.randrange(10**9)}"}
    return [make() for make in rng.choices((customer, session, stranger), (70, 20, 10), k=n)]


def start(home: Path, log, **environment: str) -> tuple[subprocess.Popen, str, float]:
    "A server process, its address, and the seconds from its start until /readyz said 200."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, started = f"http://127.0.0.1:{port}", time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "serving", "--port", str(port)], cwd=ROOT, stdout=log, stderr=log,
                               env={**os.environ, **ONE_THREAD, "SHOPAI_HOME": str(home), **environment})
    while time.perf_counter() - started < 60 and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/readyz", timeout=5).close()  # noqa: S310
            return process, address, time.perf_counter() - started
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.01)
    process.kill()
    raise SystemExit("the server did not become ready; its log:\n" + Path(log.name).read_text())


def load(address: str, bodies: list[dict], rate: float, clients: int, seconds: float, folder: Path) -> dict:
    "Run locust; each answer's start (seconds since 1970), milliseconds and `context`, and errors."
    (folder / "bodies.json").write_text(json.dumps(bodies), encoding="utf-8")
    files = {"SHOPAI_TRAFFIC": str(folder / "bodies.json"), "SHOPAI_TIMES": str(folder / "times.json")}
    env = {**os.environ, **ONE_THREAD, **files, "SHOPAI_RATE_EACH": str(rate / clients)}
    locust = [sys.executable, "-m", "locust", "-f", str(ROOT / "benchmarks" / "locustfile.py"), "--headless", "-u", str(clients), "-r", str(clients),
              "-t", f"{seconds:g}s", "--host", address, "--only-summary", "--loglevel", "ERROR"]
    subprocess.run(locust, env=env, capture_output=True, check=False)  # its exit code only says whether a request failed
    return json.loads((folder / "times.json").read_text(encoding="utf-8"))


def measure(home: Path, rate: float, clients: int, seconds: float) -> dict:
    "All figures of one run."
    store = ModelStore.from_settings(get_settings(home=home))
    champion = store.champion("recommend")
    if champion is None: raise UsageError(f"home: {home} has no champion of 'recommend'; shopai demo makes one")
    published = store.fetch("recommend", champion["version"])
    bundle = Recommender.load(published)
    bodies = traffic(bundle, int(rate * seconds) + clients)
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "server.log", "wb") as log:
        process, address, ready = start(home, log)
        try:
            server = psutil.Process(process.pid)
            at_start, cpu = server.memory_info().rss, sum(server.cpu_times()[:2])
            found = load(address, bodies, rate, clients, seconds, Path(folder))
            cpu, memory = sum(server.cpu_times()[:2]) - cpu, server.memory_info().rss
        finally:
            process.terminate()
            process.wait(timeout=15)
    times, starts = np.array(found["milliseconds"]), np.array(found["starts"])
    return {
        "p50_ms": round(float(np.percentile(times, 50)), 2), "p99_ms": round(float(np.percentile(times, 99)), 2), "max_ms": round(float(times.max()), 2),
        "requests": len(times), "errors": len(found["errors"]), "seconds": seconds,
        "rate_wanted": rate, "clients": clients, "rate_reached": round((len(times) - 1) / float(np.ptp(starts)), 1),
        "start_to_ready_s": round(ready, 2), "rss_mb_ready": round(at_start / 1e6, 1), "rss_mb_after": round(memory / 1e6, 1),
        "server_cpu_share": round(cpu / seconds, 3), "model": {"kind": bundle.manifest.kind, "version": bundle.version},
        "items": len(bundle.item_ids), "customers": len(bundle.user_ids),
        "bundle_mb": round(sum(path.stat().st_size for path in published.rglob("*") if path.is_file()) / 1e6, 1),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "load_before": round(os.getloadavg()[0], 2)},
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--home", type=Path, default=Path(".shopai"), help="folder with a model store that has a champion")
    options.add_argument("--rate", type=float, default=50.0, help="requests a second")
    options.add_argument("--clients", type=int, default=2, help="locust's clients, which share the rate")
    options.add_argument("--seconds", type=float, default=30.0, help="length of the run")
    options.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "serving.json", help="where the figures go")
    given = options.parse_args()
    try: figures = measure(given.home.absolute(), given.rate, given.clients, given.seconds)
    except UsageError as error: raise SystemExit(str(error)) from None
    write_json(given.out, figures)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
