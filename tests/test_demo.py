"`shopai demo`, as a stranger runs it: from nothing to answers over HTTP, twice in one home."

import json
import os
import re
import selectors
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from shop_command import ROOT, SHOPAI, champion, done, environment, runs


@pytest.fixture
def port() -> int:
    "A port that was free a moment ago."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path: return tmp_path_factory.mktemp("demo") / "home"


def listens(port: int) -> bool:
    with socket.socket() as probe: return probe.connect_ex(("127.0.0.1", port)) == 0


def test_the_demo_shows_the_whole_loop(home: Path, port: int):
    shown = done(home, "demo", "--stop", "--port", port)
    told = ("1 · ", "a simulated shop: ", "orders of ", "pictures: ", "its last week came over the bus: ", "2 · ", "online_difference", "3 · ", "ndcg@10",
            "promoted: ", "4 · ", "curl -s -X POST", "is safe on the bus", "rows put online", "has the context live", "ready after")
    steps = [shown.index(step) for step in told]
    assert steps == sorted(steps)
    calls = re.findall(r"^curl -s.*$", shown, re.MULTILINE)
    assert len(calls) == 4 and all(f"http://127.0.0.1:{port}/v1/" in call for call in calls)
    assert len(re.findall(r"^  [123]\. \S.* \(\S+, score \d", shown, re.MULTILINE)) == 9 and "no title" not in shown
    assert champion(home)["version"] == runs(home)[0].name
    assert not listens(port)  # --stop


def test_the_demo_serves_until_it_is_stopped_and_its_examples_work(home: Path, port: int):
    "Once more in the same home: the equal model isn't promoted, and the old champion answers the example calls as printed."
    before = champion(home)
    process = subprocess.Popen([SHOPAI, "demo", "--port", str(port)], cwd=ROOT, env=environment(home, PYTHONUNBUFFERED="1"), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    try:
        shown = read_until(process, "Ctrl-C stops it")
        assert "refused: " in shown and champion(home) == before
        server = psutil.Process(process.pid).children()
        for call in re.findall(r"^curl -s.*$", shown, re.MULTILINE):
            address, body = re.search(r"'(http\S+)'", call)[1], re.search(r"-d '(.*)'$", call)
            request = urllib.request.Request(address, body and body[1].encode(), {"Content-Type": "application/json"})  # noqa: S310 - our own server
            with urllib.request.urlopen(request, timeout=10) as answer: told = json.load(answer)  # noqa: S310
            if address.endswith("/v1/events"):
                assert (told["accepted"], told["refused"]) == (1, 0)
                continue
            assert told["model_version"] == before["version"] and told.get("fallback") is None
            if told.get("context") == "live": continue  # the demo has put something into this customer's cart since
            assert all(f"  {item['rank']}. {item['title']}  ({item['item_id']}, score {item['score']:.3f})" in shown for item in told["items"])
        process.send_signal(signal.SIGTERM)
        _, complaints = process.communicate(timeout=30)
        assert process.returncode == 130 and b"Traceback" not in complaints
        assert len(server) == 1 and not psutil.wait_procs(server, timeout=10)[1] and not listens(port)
    finally:
        for child in (psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []): child.kill()
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen, text: str, seconds: float = 300) -> str:
    "Stdout up to the line that holds this text."
    shown, end = b"", time.monotonic() + seconds
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        while text not in shown.decode(errors="replace"):
            assert time.monotonic() < end, f"waited in vain:\n{shown.decode(errors='replace')}"
            if ready.select(1):
                piece = os.read(process.stdout.fileno(), 65536)
                assert piece, f"it ended:\n{shown.decode()}\n{process.stderr.read().decode()}"
                shown += piece
    return shown.decode()
