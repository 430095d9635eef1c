"Events from file to lake as a stranger sends them: what each command says, what is repeated, stopped or wrong, and that nothing is lost or doubled."

import json
import os
import pty
import shutil
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from shop_command import ROOT, SHOPAI, called, complaint, done, environment, shopai
from shop_server import running

from shopai.core.lake import Lake
from shopai.events.bus import LocalBus
from shopai.events.wire import Door, read_event

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
NEEDS_NO_PLACE = {"anonymous_id": "v1", "item_id": "mug", "consent": True}


def view(number: int, time: datetime = START, **fields) -> dict:
    return {"event_id": f"e{number}", "event_name": "view_item", "event_time": time.isoformat(), **NEEDS_NO_PLACE, **fields}


def written(path: Path, events: list) -> Path:
    "A file of JSON lines; text is written as it is."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{event if isinstance(event, str) else json.dumps(event)}\n" for event in events))
    return path


def sent(home: Path, number: int, first: int = 0) -> None:
    "Views of many visitors on the bus, as the API would have put them."
    at = lambda n: START + timedelta(seconds=n)
    events = [read_event(view(n, at(n), anonymous_id=f"v{n % 97}"), at(n), Door()) for n in range(first, first + number)]
    bus = LocalBus(home / "bus")
    bus.send([(event.key, event.to_json()) for event in events])
    bus.close()


def rows(home: Path, table: str = "events"): return Lake(str(home / "lake")).read(table)


def status(home: Path) -> dict: return json.loads(done(home, "events", "status", "--json"))


def ingested(home: Path, *arguments, **variables) -> str:
    "Take in what is there; what the command says."
    return done(home, "events", "ingest", "--once", "--wait", ".05", *arguments, **variables)


def started(home: Path, *arguments, **variables) -> subprocess.Popen:
    command = [SHOPAI, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment(home, **variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition, seconds: float = 30.) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(.05)


# --- it explains itself ---


@pytest.mark.parametrize(("command", "told"), [
    ("", ["ingest", "status", "replay", "signals", "lake"]),
    ("ingest", ["--once", "--batch", "SHOPAI_BUS", "SHOPAI_GEO_DATABASE", "shopai events ingest --once", "exactly once"]),
    ("status", ["--json"]), ("replay", ["--to", "--speed", "60x", "500/s", "--shift", "--source", "--version", ".jsonl", "--source rees46"]),
    ("signals", ["--once", "--example", "shopai events signals --example > signals.yaml"])])
def test_help(home, monkeypatch, capsys, command: str, told: list):
    code, page, complaints = called(monkeypatch, capsys, "events", *command.split(), "--help", COLUMNS="200")
    assert (code, complaints) == (0, "") and all(word in page for word in told), page
    assert not home.exists()


# --- mistakes ---


@pytest.fixture
def files(tmp_path: Path) -> Path:
    "A folder with files that can't be used, and one that can."
    written(tmp_path / "good.jsonl", [view(1)])
    for name in ("noise.parquet", "noise.csv", "words.txt", "geo.mmdb"): (tmp_path / name).write_text("hello")
    (tmp_path / "latin.jsonl").write_bytes(b"caf\xe9\n")
    (tmp_path / "broken.yaml").write_text("{")
    (tmp_path / "short.yaml").write_text("sources: [{name: x}]")
    return tmp_path


@pytest.mark.parametrize(("arguments", "message"), [
    ("replay good.jsonl --speed fast", "speed must be max, a factor such as 60x, or events a second such as 500/s; got 'fast'"),
    ("replay good.jsonl --speed 0x", "speed must be max"),
    ("replay good.jsonl --shift tomorrow", "shift must be now, or nothing, got 'tomorrow'"),
    ("replay nope.jsonl", "FILE: nope.jsonl does not exist; a table's name would be events"),
    ("replay orders", "FILE: orders does not exist"),
    ("replay words.txt", "what must be events (the lake's table), or a file: .parquet, .csv, .jsonl or .ndjson; got 'words.txt'"),
    ("replay .", "what must be events (the lake's table), or a file"),
    ("replay noise.parquet", "noise.parquet: can't be read"),
    ("replay noise.csv", "error: events: unknown column 'hello'; known are event_id"),
    ("replay latin.jsonl", "latin.jsonl: can't be read"),
    ("replay events", "the lake has no table 'events'"),
    ("replay good.jsonl --version 0", "version is of the lake's table events, got 'good.jsonl'"),
    ("replay good.jsonl --source nope", "unknown source 'nope'; known are synthetic, online-retail, rees46"),
    ("replay good.jsonl --source rees46", "good.jsonl ends in '.jsonl'; expected is a file"),
    ("replay good.jsonl --to http://", "to must be an address such as http://localhost:8000, got 'http://'"),
    ("replay good.jsonl --to http://localhost:99999", "to must be an address such as http://localhost:8000"),
    ("replay good.jsonl --to http://[::1", "to must be an address such as http://localhost:8000"),
    ("replay good.jsonl --to redis://:secret@x", "SHOPAI_BUS: must be a folder or kafka://host:port[,host:port]/prefix, got 'redis://'"),
    ("replay good.jsonl --to words.txt", "SHOPAI_BUS: must be a folder or kafka://host:port[,host:port]/prefix; words.txt is a file"),
    ("replay", "Missing argument 'FILE|TABLE'; see: "),
    ("ingest --batch 0", "Invalid value for '--batch'"),
    ("ingest --wait 61", "Invalid value for '--wait'"),
    ("signals", "FILE is missing: the YAML file that names the sources; begin with: shopai events signals --example"),
    ("signals nope.yaml --once", "nope.yaml: can't be read: No such file or directory"),
    ("signals broken.yaml --once", "broken.yaml: not YAML"),
    ("signals short.yaml --once", "short.yaml: source x: table: Field required"),
])
def test_a_mistake_is_one_line(home, files, monkeypatch, capsys, arguments: str, message: str):
    monkeypatch.chdir(files)
    code, shown, line = called(monkeypatch, capsys, "events", *arguments.split())
    assert (code, shown, line.count("\n")) == (2, "", 1) and line.startswith("error: ") and message in line, (code, shown, line)
    assert not (home / "lake").exists()


@pytest.mark.parametrize(("name", "value", "message"), [
    ("BUS", "words.txt", "SHOPAI_BUS: must be a folder or kafka://host:port[,host:port]/prefix; words.txt is a file"),
    ("BUS", "ftp://x", "SHOPAI_BUS: must be a folder or kafka://"),
    ("BUS", "kafka://jane:secret@localhost:1/shop", "SHOPAI_BUS: must hold no user and no password"),
    ("TIMEZONE", "London", "SHOPAI_TIMEZONE: Value error, must be an IANA time zone such as Europe/London, got 'London'"),
    ("GEO_DATABASE", "nope.mmdb", "SHOPAI_GEO_DATABASE must name a MaxMind City or Country database (.mmdb); there is no file nope.mmdb"),
    ("GEO_DATABASE", "geo.mmdb", "geo.mmdb is none"),
    ("PSEUDONYM_KEY", "hunter2", "SHOPAI_PSEUDONYM_KEY: Value should have at least 16 items"),
    ("UNSAID_CONSENT", "maybe", "SHOPAI_UNSAID_CONSENT: Input should be 'refused' or 'given', got 'maybe'"),
])
def test_a_wrong_setting_is_one_line(home, files, monkeypatch, capsys, name: str, value: str, message: str):
    monkeypatch.chdir(files)
    code, shown, line = called(monkeypatch, capsys, "events", "ingest", "--once", **{f"SHOPAI_{name}": value})
    assert (code, shown, line.count("\n")) == (2, "", 1) and message in line and "secret" not in line and "hunter2" not in line, (code, shown, line)


def test_an_api_that_cannot_be_reached(home, files):
    waiting = started(home, "events", "replay", files / "good.jsonl", "--to", "http://127.0.0.1:9")  # an API may be about to come; whoever can't wait says so
    time.sleep(2)
    waiting.terminate()
    shown, line = waiting.communicate(timeout=15)
    assert (waiting.returncode, shown, line) == (1, "", "failed: the API can't be reached: Connection refused\n")


# --- from a file to the lake ---


def test_an_empty_bus(home):
    first = shopai(home, "events", "ingest", "--once")
    assert (first.returncode, first.stdout, first.stderr) == (0, f"0 events · {home}/lake\n", "")
    assert not (home / "lake").exists()
    told = done(home, "events", "status")
    assert "0 records wait; 0 could not be read (dead letters)" in told and "nothing has landed yet; take it in with: shopai events ingest" in told
    assert "local/events" in told


def test_whatever_is_sent_again_counts_once(home, tmp_path):
    "A file of JSON lines, the lake's own table, and a Parquet file in the contract."
    ga4 = {"name": "add_to_cart", "client_id": "v2", "event_id": "e2", "consent": {"analytics_storage": "granted"}, "timestamp_micros": 1772366400000000,
           "params": {"items": [{"item_id": "cup"}, {"item_id": "pot"}]}}
    lines = written(tmp_path / "clicks.jsonl", [view(1), ga4, view(3, event_name="sneeze"), "nonsense", view(1)])
    told = done(home, "events", "replay", lines)
    assert told.startswith(f"3 events sent to {home}/bus") and "unknown event name 'sneeze'" in told and "line: is no JSON" in told
    LocalBus(home / "bus").send([(None, b"garbage")])
    waiting = status(home)
    assert (waiting["lag"], waiting["last_commit"]) == (4, None)
    assert ingested(home) == f"3 events, 1 repeated, 1 unreadable · {home}/lake\n"
    landed = status(home)
    assert (landed["lag"], landed["dead"], landed["last_batch"]["records"]) == (0, 1, 4) and landed["last_commit"]
    assert "last batch " in (table := done(home, "events", "status")) and "3 events, 1 repeated, 1 unreadable" in table
    before = rows(home)
    assert sorted(before["event_id"]) == ["e1", "e2", "e2:2"]
    before.to_parquet(tmp_path / "events.parquet")
    for what in (lines, "events", tmp_path / "events.parquet"): done(home, "events", "replay", what)
    assert ingested(home).startswith("0 events, 10 repeated · ")
    assert rows(home).equals(before)
    assert done(home, "events", "replay", "events", "--shift", "now").startswith("2 events sent")
    assert ingested(home).startswith("3 events · ")
    assert rows(home)["event_time"].max() > datetime.now(UTC) - timedelta(minutes=5)


def test_an_export_of_another_shop(home, data_dir):
    file = data_dir / "rees46_oct2019_sample.parquet"
    if not file.exists(): pytest.skip(f"no {file.name}")
    told = [done(home, "events", "replay", file, "--source", "rees46") for _ in range(2)]
    number = int(told[0].partition(" events sent")[0].replace(",", ""))
    shown = ingested(home, SHOPAI_UNSAID_CONSENT="given")
    found = rows(home)
    assert number > 1000 and len(found) >= number and shown.startswith(f"{len(found):,} events, {len(found):,} repeated"), (told, shown)
    assert found["event_id"].is_unique and found["user_id"].notna().all()


def test_to_an_api_at_a_speed(home, tmp_path):
    lines = written(tmp_path / "clicks.jsonl", [view(n, START + timedelta(minutes=n)) for n in range(31)])
    with running(home, home.with_suffix(".log")) as server:
        server.wait(lambda: server.ask("/healthz")[0] == 200)
        for speed in ("20/s", "1200x"):  # 1.5 s: 30 events at 20 a second; half an hour at 20 minutes a second
            began = time.monotonic()
            assert done(home, "events", "replay", lines, "--to", server.address, "--speed", speed).startswith(f"31 events sent to {server.address}, ")
            assert 1.3 < time.monotonic() - began < 10
        assert "HTTP 404 from /nowhere/v1/events; is it an API of shopai?" in complaint(home, 2, "events", "replay", lines, "--to", f"{server.address}/nowhere")
    assert ingested(home).startswith("31 events, 31 repeated")


# --- stopped, and two at once ---


def test_sigterm_ends_after_the_batch_and_nothing_is_lost(home):
    sent(home, 5_000)
    ingest = started(home, "events", "ingest", "--batch", "500")
    until(lambda: (home / "lake" / "events" / "_delta_log" / "00000000000000000002.json").exists())
    ingest.terminate()
    shown, complaints = ingest.communicate(timeout=30)
    assert ingest.returncode == 0 and shown.endswith(f" events · {home}/lake\n") and "Traceback" not in complaints, complaints
    landed = int(shown.split()[0].replace(",", ""))
    assert 1_000 <= landed < 5_000 and landed % 500 == 0 and len(rows(home)) == landed
    assert ingested(home).startswith(f"{5_000 - landed:,} events · ")
    assert set(rows(home)["event_id"]) == {f"e{n}" for n in range(5_000)} and len(rows(home)) == 5_000


def test_two_at_once_double_nothing(home):
    sent(home, 2_000)
    both = [started(home, "events", "ingest", "--once", "--wait", ".05", "--batch", "250") for _ in range(2)]
    ends = [(process.communicate(timeout=60), process.returncode) for process in both]
    assert 0 in (codes := {code for _, code in ends}) and codes <= {0, 1}, ends
    for (shown, complaints), code in ends:
        assert "Traceback" not in complaints
        assert " events" in shown if code == 0 else "another process takes local/events" in complaints, (shown, complaints)
    found = rows(home)
    assert len(found) == 2_000 and found["event_id"].is_unique


def test_a_bus_that_was_replaced(home):
    "By a new one: it is read from its beginning. By an old copy: that is said, since records are missing."
    sent(home, 10)
    shutil.copytree(home / "bus", home / "copy")
    sent(home, 10, first=10)
    assert ingested(home).startswith("20 events · ")
    shutil.rmtree(home / "bus")
    (home / "copy").rename(home / "bus")
    assert "ends at 11, but 21 is to be read next: the queue was emptied or replaced since" in complaint(home, 2, "events", "ingest", "--once")
    shutil.rmtree(home / "bus")
    sent(home, 10, first=15)
    assert ingested(home).startswith("5 events, 5 repeated · ")


def test_nothing_is_left_over_in_a_terminal(home):
    "The moving line is gone at the end; what stays is the last line and the cursor."
    sent(home, 3)
    ours, theirs = pty.openpty()
    looks = environment(home, TERM="xterm", COLUMNS="80")
    with subprocess.Popen([SHOPAI, "events", "ingest", "--once"], env=looks, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        try:
            while piece := os.read(ours, 65536): seen += piece
        except OSError: pass  # it has ended
    os.close(ours)
    text = seen.decode()
    assert process.returncode == 0 and "3 events · 0 wait · " in text
    assert text.rpartition("\x1b[2K")[2] == f"3 events · {home}/lake\r\n" and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


# --- time ---


def test_a_session_across_midnight_and_across_clock_changes(home, tmp_path):
    "One visit each, with the hours that the visitor's clock showed."
    visits = {"midnight": ("Europe/London", ["2026-03-01T23:50", "2026-03-02T00:05"], [23, 0]),
              "forward": ("Europe/London", ["2026-03-29T00:50", "2026-03-29T01:10"], [0, 2]),  # 1:00 is followed by 2:00
              "back": (None, ["2026-11-01T05:50", "2026-11-01T06:10"], [1, 1]),               # the hour from 1:00 comes twice in New York
              "twice": ("Asia/Kathmandu", ["2026-03-29T12:00", "2026-03-29T12:31"], [17, 18])}  # + 5:45; half an hour of silence
    events = [view(f"{name}{n}", datetime.fromisoformat(f"{moment}Z"), anonymous_id=name, **({"timezone": zone} if zone else {}))
              for name, (zone, moments, _) in visits.items() for n, moment in enumerate(moments)]
    done(home, "events", "replay", written(tmp_path / "clicks.jsonl", events))
    ingested(home, "--batch", "1", SHOPAI_TIMEZONE="America/New_York")  # each batch knows only what the one before left
    found = rows(home).set_index("event_id")
    for name, (_, _, hours) in visits.items():
        mine = found.loc[[f"e{name}0", f"e{name}1"]]
        assert list(mine["local_hour"]) == hours, name
        one = name != "twice"
        assert (mine["session_id"].nunique(), list(mine["session_events"])) == ((1, [1, 2]) if one else (2, [1, 1])), name
        assert list(mine["session_seconds"]) == [0, 900 if name == "midnight" else 1200 if one else 0], name


# --- signals ---


def test_signals_from_files_and_holidays(home, tmp_path):
    (tmp_path / "example.yaml").write_text(done(home, "events", "signals", "--example"))
    assert not home.exists()
    watch = started(home, "events", "signals", tmp_path / "example.yaml")  # nobody answers there, and it goes on
    shown = [watch.stdout.readline() for _ in range(4)]
    watch.terminate()
    watch.communicate(timeout=15)
    assert watch.returncode == 0 and sum("; it has never answered; asked again in " in line for line in shown) == 3, shown
    assert any("holidays: " in line for line in shown), shown

    (tmp_path / "signals.yaml").write_text("sources:\n  - {name: holidays, table: calendar, holidays: [GB, DE], every: 30d}\n"
                                           "  - {name: mood, table: external_signals, csv: mood.csv, every: 1s}\n")
    table = tmp_path / "mood.csv"
    table.write_text("signal,region,observed_at,value\nmood,GB,2026-03-01T00:00:00Z,0.5\n")
    home = tmp_path / "another"
    told = done(home, "events", "signals", tmp_path / "signals.yaml", "--once")
    assert "mood: 1 rows sent, 0 unchanged" in told and " 0 replaced, 0 known before, 0 refused" in told
    before = {name: rows(home, name) for name in ("calendar", "external_signals")}
    assert set(before["calendar"]["country"]) == {"GB", "DE"} and list(before["external_signals"]["value"]) == [.5]
    time.sleep(1)
    assert done(home, "events", "signals", tmp_path / "signals.yaml", "--once") == "mood: 0 rows sent, 1 unchanged\n"
    assert all(rows(home, name).equals(frame) for name, frame in before.items())

    watch = started(home, "events", "signals", tmp_path / "signals.yaml")  # as a service: what is new lands by itself
    with table.open("a") as file: file.write("mood,DE,2026-03-02T00:00:00Z,0.75\n")
    until(lambda: len(rows(home, "external_signals")) == 2)
    watch.terminate()
    shown, complaints = watch.communicate(timeout=15)
    assert (watch.returncode, complaints) == (0, "") and "mood: 1 rows sent, 1 unchanged" in shown, (watch.returncode, shown, complaints)
