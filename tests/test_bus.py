"""The queue with real faults: processes that are killed, disks that are full, brokers that freeze."""

import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import pytest
from kafka_broker import Broker, broker

from shopai.events.bus import Bus, BusUnavailable, LocalBus, Record, open_bus


def python(code: str, *arguments: object, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def drain(bus: Bus, positions: dict[int, int] | None = None, wait: float = .5) -> tuple[list[Record], dict[int, int]]:
    "All records from there on, and the positions after them."
    positions, found = dict(positions or bus.begins()), []
    while batch := bus.read(positions, 5000, wait):
        found += batch
        positions |= {record.partition: record.offset + 1 for record in batch}
    return found, positions


# The log in a file

SENDER = """
import sys
from shopai.events.bus import LocalBus
bus, name = LocalBus(sys.argv[1]), sys.argv[2]
for batch in range(int(sys.argv[3])):
    bus.send([(name, f"{batch} {number}".encode()) for number in range(int(sys.argv[4]))], timeout=30)
    print(batch, flush=True)
"""


def test_processes_send_at_once_and_another_reads(tmp_path: Path):
    "Each sender's records are whole, in order, and the batches aren't mixed; the file is made by all of them at the same moment."
    senders = [python(SENDER, tmp_path, f"sender-{number}", 40, 25) for number in range(3)]
    bus, found, position = LocalBus(tmp_path), [], 1
    until = time.monotonic() + 60
    while len(found) < 3000 and time.monotonic() < until:
        batch = bus.read({0: position}, 100, wait=1)
        found += batch
        position = batch[-1].offset + 1 if batch else position
    for sender in senders: assert sender.communicate()[1] == "" and sender.returncode == 0
    assert [record.offset for record in found] == list(range(1, 3001))
    for at in range(0, 3000, 25): assert len({(record.key, record.value.split()[0]) for record in found[at:at + 25]}) == 1
    for name in {record.key for record in found}:
        assert [record.value.decode() for record in found if record.key == name] == [f"{batch} {number}" for batch in range(40) for number in range(25)]


def test_a_killed_sender_leaves_all_or_nothing_of_a_send(tmp_path: Path):
    "Killed at five moments; what it had been told is safe is there, and each send is whole."
    size, said = 2000, {}
    for attempt in range(5):
        sender = python(SENDER, tmp_path, f"sender-{attempt}", 100_000, size)
        sender.stdout.readline()
        time.sleep(.05 + .013 * attempt)
        sender.send_signal(signal.SIGKILL)
        said[f"sender-{attempt}"] = 1 + len(sender.communicate()[0].splitlines())
    found, positions = drain(LocalBus(tmp_path), wait=0)
    batches = Counter((record.key, record.value.split()[0]) for record in found)
    assert set(batches.values()) == {size}
    whole = Counter(key for key, _ in batches)
    for name, count in said.items(): assert count <= whole[name] <= count + 1, "a send that was confirmed is missing"
    assert [record.offset for record in found] == list(range(1, positions[0]))
    LocalBus(tmp_path).send([(None, b"life goes on")])


def test_threads_share_a_queue(tmp_path: Path):
    bus = LocalBus(tmp_path)
    with ThreadPoolExecutor(8) as pool: list(pool.map(lambda number: bus.send([(f"{number}", b"a"), (f"{number}", b"b")]), range(200)))
    found, _ = drain(bus, wait=0)
    assert [record.value for record in found] == [b"a", b"b"] * 200
    assert len({record.key for record in found}) == 200


def test_a_lock_that_is_not_had_in_time(tmp_path: Path):
    "Another process holds the writer's lock; the sender gives up when it said, readers don't care, and afterwards all goes on."
    bus = LocalBus(tmp_path)
    bus.send([(None, b"before")])
    holder = sqlite3.connect(bus.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        for failure in [pool.submit(bus.send, [(None, b"x")], .5) for _ in range(4)]: assert isinstance(failure.exception(), BusUnavailable)
    assert .4 < time.monotonic() - began < 2, "four waiting threads wait together, not one after the other"
    assert len(LocalBus(tmp_path).read({0: 1}, 10, wait=0)) == 1
    holder.close()
    bus.send([(None, b"after")])
    assert [record.value for record in drain(bus, wait=0)[0]] == [b"before", b"after"]


def test_a_full_disk(tmp_path: Path):
    "A limit on the size of files does what a full disk does: the send is refused whole, and what was there stays."
    code = """
import resource, signal, sys
from shopai.events.bus import BusUnavailable, LocalBus
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
bus, sent = LocalBus(sys.argv[1]), 0
try:
    while sent < 100: bus.send([(None, b"x" * 300_000)]); sent += 1
except BusUnavailable as error:
    print(sent, len(bus.read({0: 1}, 1000, wait=0)), str(error).count("\\n"), error)
"""
    out, err = python(code, tmp_path).communicate()
    sent, found, lines, text = out.split(maxsplit=3)
    assert (err, lines) == ("", "0") and text.startswith("local/events: ")
    assert 0 < int(sent) == int(found) < 100
    bus = LocalBus(tmp_path)
    bus.send([(None, b"room again")])
    assert bus.ends() == {0: int(sent) + 2}


def test_a_folder_that_may_not_be_written():
    "As another user where the tests run as root, who may write everywhere."
    code = """
import os, sys
from shopai.events.bus import BusUnavailable, LocalBus
if os.geteuid() == 0: os.setuid(65534)
for folder in sys.argv[1:]:
    try: LocalBus(folder).send([(None, b"y")]); print("sent")
    except BusUnavailable as error: print(error)
"""
    with TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        LocalBus(folder).send([(None, b"x")])
        for path in folder.iterdir(): path.chmod(0o444)
        folder.chmod(0o555)
        out, err = python(code, folder, folder / "new").communicate()
        folder.chmod(0o755)
    assert err == ""
    written, made = out.splitlines()
    assert written == f"local/events: attempt to write a readonly database ({folder}/events.db)"
    assert made == f"local/events: Permission denied ({folder}/new/events.db)"


def test_importing_the_bus_is_light():
    "The API imports it."
    code = "import sys, shopai.events.bus; print(sorted({'confluent_kafka', 'pandas', 'pyarrow', 'numpy'} & sys.modules.keys()))"
    assert python(code).communicate()[0].strip() == "[]"


# Kafka

@pytest.fixture(scope="module")
def kafka() -> Iterator[Broker]:
    with broker() as running: yield running


@pytest.fixture
def bus(kafka: Broker) -> Iterator[Bus]:
    "A queue of its own."
    bus = open_bus(f"kafka://{kafka.address}/{uuid4().hex[:8]}?partitions=3")
    yield bus
    bus.close()


def test_order_partitions_and_positions(bus: Bus):
    assert bus.partitions() == [0, 1, 2]
    assert bus.begins() == bus.ends() == {0: 0, 1: 0, 2: 0}
    for turn in range(20): bus.send([(f"customer-{number}", f"{turn}".encode()) for number in range(30)])
    found, positions = drain(bus)
    assert len(found) == 600 and bus.ends() == positions and sum(positions.values()) == 600
    for number in range(30):
        mine = [record for record in found if record.key == f"customer-{number}"]
        assert [record.value for record in mine] == [f"{turn}".encode() for turn in range(20)]
        assert len({record.partition for record in mine}) == 1
    assert {record.partition for record in found} == {0, 1, 2}
    # from a position in the middle, in some partitions only, and by another reader
    middle = {1: positions[1] // 2}
    assert [record.offset for record in drain(bus, middle)[0]] == list(range(middle[1], positions[1]))
    again, _ = drain(open_bus(f"kafka://{bus.address.servers}/{bus.address.prefix}"))
    assert sorted(again) == sorted(found)


def test_the_end_is_known_without_reading(bus: Bus):
    "Also on a broker whose own answer lacks the last batch, and to a process that reads nothing."
    other = open_bus(f"kafka://{bus.address.servers}/{bus.address.prefix}")
    for count in (1, 2, 500):
        bus.send([(f"customer-{number}", b"x") for number in range(count)])
        assert sum(other.ends().values()) == {1: 1, 2: 3, 500: 503}[count]
    assert sum(other.begins().values()) == 0
    other.close()


def test_a_read_that_goes_on_is_not_placed_again(bus: Bus):
    "Placing throws away what was fetched ahead, so it is done once."
    bus.send([("anna", b"x")] * 1000)
    reader, places = bus._reader(), []
    assign = reader.consumer.assign

    class Counting:
        def __getattr__(self, name: str): return getattr(consumer, name)

        def assign(self, positions):
            places.append(positions)
            assign(positions)

    consumer, reader.consumer = reader.consumer, Counting()
    positions, count = bus.begins(), 0
    while count < 1000:
        batch = bus.read(positions, 70, wait=5)
        count += len(batch)
        positions |= {record.partition: record.offset + 1 for record in batch}
    assert (count, len(places)) == (1000, 1)


def test_what_was_fetched_is_not_lost_by_an_error(bus: Bus, monkeypatch: pytest.MonkeyPatch):
    "The reader fails after it took records from the client: the next read has them."
    bus.send([("anna", f"{number}".encode()) for number in range(50)])
    first, positions = bus.read(bus.begins(), 10, wait=5), bus.begins()
    positions, reader = positions | {first[0].partition: first[-1].offset + 1}, bus._reader()
    with monkeypatch.context() as patch:
        patch.setattr(reader, "_sort", lambda messages: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): bus.read(positions, 10, wait=5)
    rest, _ = drain(bus, positions)
    assert [record.value for record in first + rest] == [f"{number}".encode() for number in range(50)]


def test_a_frozen_broker_costs_no_event(kafka: Broker, bus: Bus):
    "The sender is told in time and sends again; nothing is lost. What was on its way may come twice."
    bus.send([("anna", b"first")])
    _, positions = drain(bus)
    kafka.freeze()
    try:
        began = time.monotonic()
        for name in ("second", "third"):
            with pytest.raises(BusUnavailable, match=r"^kafka/\S+: \S+ did not confirm 1 of 1 records within 1 s") as told:
                bus.send([("anna", name.encode())], timeout=1)
            assert "\n" not in str(told.value)
        assert 1.9 < time.monotonic() - began < 4
    finally:
        kafka.thaw()
    for name in ("second", "third"): bus.send([("anna", name.encode())], timeout=10)
    found, positions = drain(bus, positions)
    # `second` had left when the broker froze; `third` had not, and was forgotten when its sender was told
    assert [record.value for record in found] in ([b"second", b"third"], [b"second", b"second", b"third"])
    bus.send([("anna", f"{number}".encode()) for number in range(100)])
    assert [record.value for record in drain(bus, positions)[0]] == [f"{number}".encode() for number in range(100)], "and all is as before"


def test_a_short_freeze_is_not_noticed(kafka: Broker, bus: Bus):
    "Within the timeout the client waits, and the records are there once."
    bus.send([("anna", b"first")])
    kafka.freeze()
    with ThreadPoolExecutor(2) as pool:
        sends = [pool.submit(bus.send, [(f"{thread}", f"{number}".encode()) for number in range(200)], 10) for thread in "ab"]
        time.sleep(1)
        kafka.thaw()
        for sent in sends: sent.result()
    values = Counter((record.key, record.value) for record in drain(bus)[0] if record.value != b"first")
    assert len(values) == 400 and set(values.values()) == {1}


def test_threads_send_through_one_producer(bus: Bus):
    with ThreadPoolExecutor(8) as pool: list(pool.map(lambda number: bus.send([(f"{number}", b"a"), (f"{number}", b"b")]), range(200)))
    found, _ = drain(bus)
    for number in range(200): assert [record.value for record in found if record.key == f"{number}"] == [b"a", b"b"]


def test_a_record_too_large_for_the_broker(bus: Bus):
    with pytest.raises(BusUnavailable, match="Message size too large"): bus.send([("anna", b"small"), ("anna", b"x" * 2_000_000)])
    bus.send([("anna", b"next")])
    assert drain(bus)[0][-1].value == b"next"


def test_a_broker_that_is_gone():
    "Sender and reader are told in one line, and the client says nothing on its own."
    code = """
import sys, time
from shopai.events.bus import BusUnavailable, open_bus
bus, other, positions = open_bus(sys.argv[1]), open_bus(sys.argv[1], "other"), {0: 0}
bus.send([("anna", b"x")]); print(len(bus.read(bus.begins(), 10, wait=5)), flush=True)
sys.stdin.readline()
for ask in (lambda: bus.send([("anna", b"y")], timeout=1), lambda: bus.read(positions, 10, wait=2), lambda: other.send([("anna", b"z")], timeout=1)):
    began = time.monotonic()
    try: print("answered", ask())
    except BusUnavailable as error: print(time.monotonic() - began < 5, str(error).count("\\n"), error)
"""
    with broker() as running:
        client = python(code, f"kafka://{running.address}/shop", stdin=subprocess.PIPE)
        assert client.stdout.readline() == "1\n"
    out, err = client.communicate("gone\n")
    assert err == ""
    assert len(out.splitlines()) == 3 and all(line.startswith("True 0 kafka/shop.") for line in out.splitlines()), out
