"What the tests of serving share: a published bundle of the toy shop, and a real server process."

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from shopai.core.artifacts import ModelStore
from shopai.core.testing import toy_shop
from shopai.data.interactions import purchases
from shopai.recommend.baselines import EASE, Popularity
from shopai.recommend.bundle import save_bundle

ROOT = Path(__file__).resolve().parents[1]
ASK = "/v1/recommendations"


def toy_bundle(folder: Path, model=None, titles=None, **shop_options):
    "Save a bundle of the toy shop; returns its interactions and the fitted model."
    shop = toy_shop(**shop_options)
    bought = purchases(shop.events)
    model = (model or EASE(regularisation=50.0)).fit(bought)
    save_bundle(folder, model, bought, shop.items if titles is None else titles, Popularity().fit(bought), metrics={"ndcg@10": 0.25})
    return bought, model


def publish(home: Path, bundle: Path, version: str) -> Path:
    "Publish and promote; returns the published folder."
    store = ModelStore(home / "models")
    store.publish(bundle, "recommend", version)
    store.promote("recommend", version, reason="test")
    return home / "models" / "recommend" / version


def flip(file: Path) -> None:
    "Change one bit in the middle of a file."
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


class Server:
    "A `shopai` server process and its log."

    def __init__(self, process: subprocess.Popen, port: int, log: Path, started: float):
        self.process, self.address, self._log, self.started = process, f"http://127.0.0.1:{port}", log, started

    @property
    def log(self) -> str: return self._log.read_text(encoding="utf-8")

    def events(self, name: str) -> list[dict]:
        "Log lines that tell of this event."
        return [line for line in map(json.loads, self.log.splitlines()) if line["event"] == name]

    def ask(self, path: str, body=None, headers=None) -> tuple[int, dict]:
        "Status and JSON of a request; a body makes it a POST."
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json", **(headers or {})})  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=10) as answer: return answer.status, json.load(answer)  # noqa: S310
        except urllib.error.HTTPError as error:
            with error: return error.code, json.load(error)

    def wait(self, condition, seconds: float = 20.0):
        "The first true value of `condition()`; fails with the log if there is none in time."
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if value := condition(): return value
            except (urllib.error.URLError, ConnectionError):
                pass
            if self.process.poll() is not None: break
            time.sleep(0.02)
        raise AssertionError(f"waited in vain; the server's log:\n{self.log}")

    def wait_ready(self, seconds: float = 20.0) -> float:
        "Wait for /readyz; returns the seconds since the process was started."
        self.wait(lambda: self.ask("/readyz")[0] == 200, seconds)
        return time.monotonic() - self.started

    def stop(self) -> int:
        "SIGTERM; returns the exit code."
        if self.process.poll() is None: self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=15)


@contextmanager
def running(home: Path, log: Path | None = None, host: str = "127.0.0.1", workers: int = 1, **environment):
    "A server over `home` for the time of a with block; without `log`, it writes to `home/log`."
    log = log or home / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "SHOPAI_HOME": str(home), "SHOPAI_SERVE_POLL_SECONDS": "0.1", **environment}
    with open(log, "wb") as sink:
        started = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "serving", "--host", host, "--port", str(port), "--workers", str(workers)],
                                   cwd=ROOT, env=env, stdout=sink, stderr=subprocess.STDOUT)
    server = Server(process, port, log, started)
    try:
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try: process.wait(timeout=15)
            except subprocess.TimeoutExpired: process.kill()
