"The command line as a stranger meets it: each mistake is one line and an exit code, each level explains itself, and two homes never meet."

import json
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import typer.main
from shop_command import ROOT, SHOPAI, SMALL, TINY, complaint, done, environment, shopai

import shopai.cli as cli
from shopai import __version__
from shopai.data.shop_lake import SHOP_TABLES

HEADER = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n"


def commands(command=None, path=()):
    "All commands and groups with their paths."
    command = command or typer.main.get_command(cli.app)
    yield path, command
    for name, child in getattr(command, "commands", {}).items(): yield from commands(child, (*path, name))


@pytest.fixture
def busy() -> int:
    "A port that somebody listens on."
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    "A folder with exports that can't be used."
    contents = {"empty.csv": "", "empty.parquet": "", "empty.xlsx": "", "noise.xlsx": "hello", "noise.parquet": "hello",
                "header.csv": HEADER, "narrow.csv": HEADER.replace("CustomerID,", "") + "1,2,tea,1,2010-12-01 08:26:00,2.5,France\n"}
    for name, content in contents.items(): (tmp_path / name).write_text(content)
    (tmp_path / "latin.csv").write_bytes(HEADER.encode() + b"1,22423,caf\xe9,1,2010-12-01 08:26:00,2.5,7,France\n")
    return tmp_path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    "A checkout of which only the parts that jobs need are there."
    for part in ("experiments", "params"): shutil.copytree(ROOT / part, tmp_path / "project" / part)
    return tmp_path / "project"


# --- it explains itself ---


def test_everything_is_explained():
    "Every command says what it does, every option and argument what it is for."
    names = {" ".join(path) for path, _ in commands()}
    assert names >= {"data build", "data describe", "run", "pipeline run", "models list", "models show", "models promote", "models rollback", "serve", "demo",
                     "simulate"}
    for path, command in commands():
        assert command.help or not path, path
        for parameter in command.params: assert parameter.help or parameter.name == "help", (path, parameter.name)


@pytest.mark.parametrize(("arguments", "told"), [
    ((), ["data", "run", "pipeline", "models", "serve", "demo", "--home", "SHOPAI_HOME"]), (("data",), ["build", "describe"]),
    (("data", "build"), ["--source", "synthetic", "online-retail", "--path", "--customers", "--no-pictures"]),
    (("simulate",), ["--policy", "NAME=SPEC", "price:fixed(factor=.9)", "--ab", "recommend: popularity(", "cost-plus(markup=0", "plenty", "flat("]),
    (("run",), ["--profile", "smoke", "--parameter", "-p", "key=value"]),
    (("models",), ["list", "show", "promote", "rollback"]), (("serve",), ["--host", "--port", "--workers"]), (("demo",), ["--data", "--stop", "--port"]),
], ids=lambda value: " ".join(value) or "shopai" if isinstance(value, tuple) else "")
def test_help(home: Path, arguments: tuple, told: list):
    page = done(home, *arguments, "--help")
    assert all(word in page for word in told), page
    assert not home.exists()


def test_nothing_said_is_a_call_for_help(home: Path):
    for arguments in ((), ("data",), ("models",)):
        result = shopai(home, *arguments)
        assert (result.returncode, result.stderr) == (2, "") and "Usage: shopai" in result.stdout


def test_version(home: Path): assert done(home, "--version").strip() == f"shopai {__version__}"


# --- mistakes ---


@pytest.mark.parametrize(("arguments", "message"), [
    (["sell"], "No such command 'sell'; see: shopai --help"),
    (["data", "sell"], "No such command 'sell'; see: shopai data --help"),
    (["--quick"], "No such option: --quick"),
    (["data", "describe", "--quick"], "No such option: --quick; see: shopai data describe --help"),
    (["run"], "Missing argument 'job'; see: shopai run --help"),
    (["models", "promote", "recommend"], "Missing argument 'version'"),
    (["data", "build", "--seed", "x"], "Invalid value for '--seed': Input should be a valid integer"),
    (["data", "build", "--customers", "0"], "customers must be a whole number from 1 to 100,000"),
    (["data", "build", "--items", "39"], "items must be a whole number from 40 to 10,000"),
    (["data", "build", "--days", "1826"], "days must be a whole number from 1 to 1,825"),
    (["data", "build", "--source", "nope"], "unknown source 'nope'; known are synthetic, online-retail"),
    (["data", "build", "--source", "online-retail"], "source 'online-retail' needs a file"),
    (["data", "build", "--path", "x.csv"], "source 'synthetic' reads no file"),
    (["data", "build", "--source", "online-retail", "--path", "x.csv", "--seed", "1"], "has no option 'seed'"),
    (["simulate", "--policy", "cheap"], "policy must be NAME=SPEC, such as \"cheap=price:fixed(factor=.9)\", got 'cheap'"),
    (["simulate", "--policy", "=price:fixed"], "policy must be NAME=SPEC"),
    (["simulate", "--policy", "[red]=price:fixed"], "policy must be NAME=SPEC"),
    (["simulate", "--policy", "a=prize:fixed"], "unknown hook 'prize'; the hooks are recommend, price, replenish, recover"),
    (["simulate", "--policy", "a=price:nope"], "unknown policy 'nope' for price; known are cost-plus, fixed"),
    (["simulate", "--policy", "a=price:fixed(colour=1)"], "policy price:fixed has no parameter 'colour'; it has factor"),
    (["simulate", "--policy", "a=price:fixed(factor=many)"], "policy price:fixed: factor must be a number, got 'many'"),
    (["simulate", "--policy", "a=price:fixed", "--policy", "a=price:fixed"], "policy 'a' is given twice"),
    (["simulate", "--seeds", "1"], "seeds must be a whole number from 2 to 1,000 (times that each policy is run), got 1"),
    (["simulate", "--items", "3"], "items must be a whole number from 40 to 10,000 (items on sale), got 3"),
    (["simulate", "--days", "0"], "days must be a whole number from 1 to 1,825"),
    (["simulate", "--seed", "-1"], "seed must be a whole number from 0 to"),
    (["simulate", "--ab"], "--ab needs a policy to compare with default"),
    (["simulate", "--ab", "--policy", "a=replenish:plenty"], "in an A/B test all policies share the stock, so replenish must be the same; a has another"),
    (["data", "describe"], "is empty; fill it with: shopai data build"),
    (["run", "nope"], "job: there is no 'nope'; known are "),
    (["run", "[/red]"], "job: there is no '[/red]'; known are "),
    (["run", "recommend", "-P", "nope"], "profile: there is no params/nope/recommend.yaml; profiles of recommend are "),
    (["run", "recommend", "-p", "nope=1"], "unknown parameter 'nope'; known are seeds, k, "),
    (["run", "recommend", "-p", "k"], "parameter 'k' is not key=value"),
    (["run", "recommend", "-p", "k=many"], "k must be int, got 'many'"),
    (["run", "recommend", "-p", "k=[red]"], "k must be int, got ['red']"),
    (["models", "list"], "no model 'recommend' in the registry; train it with: shopai run recommend"),
    (["models", "show", "nope"], "no model 'nope' in the registry"),
    (["models", "promote", "recommend", "1"], "recommend has no version '1'; registered are none"),
    (["models", "rollback", "recommend"], "recommend has no earlier champion to return to"),
    (["serve", "--port", "0"], "Invalid value for '--port': Input should be greater than or equal to 1"),
    (["serve", "--workers", "0"], "Invalid value for '--workers'"),
    (["demo", "--port", "99999"], "Invalid value for '--port': Input should be less than or equal to 65535"),
    (["demo", "--data", "x.csv"], "data: the file x.csv does not exist"),
    (["demo", "--profile", "nope"], "profile: there is no params/nope/features.yaml"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_mistake(home: Path, arguments: list, message: str):
    assert message in complaint(home, 2, *arguments)
    assert not (home / "lake").exists()


@pytest.mark.parametrize(("file", "message"), [
    ("none.csv", "no such file: "), (".", "is a folder"), ("empty.csv", "empty.csv is empty"), ("empty.parquet", "empty.parquet is empty"),
    ("empty.xlsx", "empty.xlsx is empty"), ("noise.xlsx", "noise.xlsx can't be read as xlsx"), ("noise.parquet", "noise.parquet can't be read as parquet"),
    ("header.csv", "header.csv holds no invoice lines"), ("narrow.csv", "narrow.csv lacks the column 'CustomerID'"),
], ids=lambda value: value if "." in value else "")
def test_a_file_that_cannot_be_used(home: Path, files: Path, file: str, message: str):
    assert message in complaint(home, 2, "data", "build", "--source", "online-retail", "--path", files / file)
    assert not home.exists()


def test_a_file_in_an_old_encoding_is_read(home: Path, files: Path):
    "Spreadsheets on Windows still write Latin-1."
    assert "net value 2.50 = purchases 2.50" in done(home, "data", "build", "--source", "online-retail", "--path", files / "latin.csv")


def test_what_only_the_notebook_can_check(home: Path):
    "It takes a kernel to see these, and they are still wrong use, in one line."
    assert complaint(home, 2, "run", "recommend", "-p", "k=0") == "k must be an integer from 1 to 100, got 0"
    assert "the lake has no table 'events'" in (line := complaint(home, 2, "run", "recommend")) and "shopai data build" in line
    assert not (home / "models").exists()


def test_outside_a_checkout(home: Path, tmp_path: Path):
    for arguments in (["run", "recommend"], ["demo"], ["pipeline", "run"]):
        assert "SHOPAI_PROJECT" in complaint(home, 2, *arguments, cwd=tmp_path)
    assert not home.exists()  # the demo says so before it has built anything
    assert "unknown parameter 'nope'" in complaint(home, 2, "run", "recommend", "-p", "nope=1", cwd=tmp_path, SHOPAI_PROJECT=str(ROOT))


@pytest.mark.parametrize(("text", "message"), [("seeds: [0\n", "recommend.yaml: while parsing"), ("- 1\n", "must hold `name: value` lines"),
                                               ("sedes: [0]\n", "unknown parameter 'sedes'"), ("k: ten\n", "k must be int, got 'ten'")])
def test_a_broken_profile(home: Path, project: Path, text: str, message: str):
    (project / "params" / "smoke" / "recommend.yaml").write_text(text)
    assert message in complaint(home, 2, "run", "recommend", SHOPAI_PROJECT=str(project))


def test_a_broken_notebook(home: Path, project: Path):
    next((project / "experiments").glob("*_recommend.ipynb")).write_text("{")
    assert "is no notebook that can be run" in complaint(home, 2, "run", "recommend", SHOPAI_PROJECT=str(project))


def test_a_busy_port(home: Path, busy: int):
    for command in ("serve", "demo"):
        assert f"cannot listen on 127.0.0.1:{busy}: Address already in use; choose another one with --port" in complaint(home, 2, command, "--port", busy)
    assert not home.exists()


@pytest.mark.parametrize(("variable", "value", "arguments", "message"), [
    ("SHOPAI_TRACKING_URI", "http://127.0.0.1:9", ["models", "list"], "SHOPAI_TRACKING_URI: cannot open http://127.0.0.1:9"),
    ("SHOPAI_MODEL_STORE", "ftp://x/y", ["models", "rollback", "recommend"], "ftp://x/y is neither a folder nor an s3:// address"),
    ("SHOPAI_HOME", __file__, ["data", "build"], f"SHOPAI_HOME: {__file__} is a file, not a folder"),
])
def test_a_wrong_setting(home: Path, variable: str, value: str, arguments: list, message: str):
    assert message in complaint(home, 2, *arguments, **{variable: value})


def test_a_wrong_setting_of_the_server(home: Path, busy: int):
    result = shopai(home, "serve", "--port", busy + 1 if busy < 65535 else busy - 1, SHOPAI_SERVE_POLL_SECONDS="often")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "SHOPAI_SERVE_POLL_SECONDS: Input should be a valid number" in result.stderr.splitlines()[-1]


def test_a_failure_is_one_line_and_its_place_can_be_seen(home: Path):
    "What is no mistake on the command line ends with 1: here the lake's log is damaged."
    done(home, "data", "build", *TINY)
    for file in (home / "lake" / "events" / "_delta_log").glob("*"):
        if file.is_file(): file.write_text("{")
    assert complaint(home, 1, "data", "describe").endswith("(SHOPAI_DEBUG=1 shows where)")
    assert "Traceback" in shopai(home, "data", "describe", SHOPAI_DEBUG="1").stderr


# --- homes ---


def test_two_homes_never_meet(tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    done(one, "data", "build", *TINY, "--seed", "1")
    before = {path: path.read_bytes() for path in one.rglob("*") if path.is_file()}
    assert "is empty" in complaint(two, 2, "data", "describe")
    shown = done(one, "--home", two, "data", "build", *TINY, "--items", "45")  # the option wins over $SHOPAI_HOME
    assert str(two / "lake") in shown
    assert before == {path: path.read_bytes() for path in one.rglob("*") if path.is_file()}
    first, second = (json.loads(done(home, "data", "describe", "--json")) for home in (one, two))
    assert (first["tables"]["items"]["rows"], second["tables"]["items"]["rows"]) == (40, 45)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


def test_the_default_home_is_in_the_working_folder(tmp_path: Path):
    shown = done(Path(""), "data", "build", *TINY, "--pictures", cwd=tmp_path, SHOPAI_HOME=".shopai")
    assert f"lake: {tmp_path}/.shopai/lake" in shown
    assert json.loads(done(Path(".shopai"), "data", "describe", "--json", cwd=tmp_path))["tables"]["items"]["rows"] == 40
    assert f"pictures: {tmp_path}/.shopai/images" in shown and len(list((tmp_path / ".shopai" / "images").glob("I*.png"))) == 40


# --- data ---


def test_what_data_build_and_describe_say(home: Path):
    shown = done(home, "data", "build", *SMALL)
    assert "a simulated shop: " in shown and "events a second" in shown and "orders of " in shown and "pictures" not in shown
    result = shopai(home, "data", "describe", "--json")
    told = json.loads(result.stdout)
    assert (result.returncode, result.stderr) == (0, "")
    assert told["tables"].keys() == set(SHOP_TABLES) and told["tables"]["items"] == {"rows": 200, "version": 1}
    assert {name for name, *_ in told["events"]} >= {"ranking", "search", "view_item", "add_to_cart", "purchase", "refund"}
    assert sum(count for _, count, *_ in told["events"]) == told["tables"]["events"]["rows"]
    table = done(home, "data", "describe")
    for text in (table, shown): assert all(f"{count:,}" in text for _, count, *_ in told["events"]), text
    assert all(f"{told['tables'][name]['rows']:,}" in table for name in SHOP_TABLES)
    done(home, "data", "build", *SMALL)
    again = json.loads(done(home, "data", "describe", "--json"))
    assert again["events"] == told["events"] and again["tables"]["events"]["version"] == 2  # same seed, same shop


def test_progress_is_on_stderr_and_only_where_somebody_looks(home: Path):
    "A day's date and the events so far; a pipe or a log gets neither."
    plain = shopai(home, "data", "build", *TINY, "--pictures")
    watched = shopai(home, "data", "build", *TINY, "--pictures", FORCE_COLOR="1")
    assert (plain.returncode, plain.stderr, watched.returncode) == (0, "", 0)
    assert all(word in watched.stderr for word in ("days", "21/21", "2025-01-26", " events", "pictures", "40/40", "tables", "11/11"))
    assert not any(word in watched.stdout + plain.stdout for word in ("21/21", "11/11", "2025-01"))


def test_a_killed_build_leaves_the_lake_as_it_was(home: Path, tmp_path: Path):
    done(home, "data", "build", *TINY)
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    command = [SHOPAI, "data", "build", "--customers", "1000", "--items", "100", "--days", "1000"]
    watched = environment(home, FORCE_COLOR="1", TMPDIR=str(tmp_path))
    for end, code in ((signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)):
        with subprocess.Popen(command, cwd=ROOT, env=watched, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            seen = b""
            while b"2025-01-" not in seen and process.poll() is None: seen += process.stderr.read1()  # the simulation is under way
            process.send_signal(end)
            process.communicate(timeout=30)
        assert process.returncode == code
        assert before == {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}


def test_what_was_rejected_is_counted(home: Path, files: Path):
    good = "536365,85123A,[SALE] HOLDER,6,2010-12-01 08:26:00,2.55,17850,United Kingdom\n"
    (files / "some.csv").write_text(HEADER + good + good.replace("85123A", "POST").replace("HOLDER", "POSTAGE"))
    shown = done(home, "data", "build", "--source", "online-retail", "--path", files / "some.csv")
    told = json.loads(done(home, "data", "describe", "--json"))
    [[reason, count]] = told["quarantine"]
    assert count == 1 and f"rejected: {reason.partition(':')[0]}" in shown and reason in done(home, "data", "describe")
    assert "net value 30.60 = purchases 15.30 - refunds 0.00 + rejected 15.30; difference 0" in shown


def test_a_file_after_a_simulation_says_what_it_left(home: Path, files: Path):
    done(home, "data", "build", *TINY)
    shown = done(home, "data", "build", "--source", "online-retail", "--path", files / "latin.csv")
    assert "left as they were: calendar, external_signals, market_prices, orders, prices, stock, suppliers, touches" in shown


# --- simulate ---


WORLD = ("--customers", "80", "--items", "50", "--days", "28", "--seeds", "3")


def test_a_duel_is_one_table(home: Path):
    result = shopai(home, "simulate", "--policy", "cheap=price:fixed(factor=.8)", "--policy", "kind=recover:flat(discount=.1)", *WORLD)
    assert (result.returncode, result.stderr) == (0, "") and not home.exists()
    assert "simulated: 80 customers, 50 items, 28 days; means of 3 runs, the same luck for every policy" in result.stdout
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in result.stdout.splitlines() if line.startswith("│")]
    rows = {measure: figures for measure, *figures in cells}
    assert rows.keys() == {"visits", "orders", "pieces", "revenue, GBP", "refunds, GBP", "profit, GBP", "wanted, but sold out", "carts left behind",
                           "reminders sent", "bought the next day"}
    assert all(name in result.stdout for name in ("default", "cheap - default (95 %)", "kind - default (95 %)"))
    assert [cell.replace(",", "").lstrip("-").isdigit() for cell in rows["profit, GBP"]] == [True, True, True, False, False]
    assert rows["profit, GBP"][3].startswith("-") and rows["reminders sent"][0] == "0" and rows["reminders sent"][4].startswith("+")
    watched = shopai(home, "simulate", *WORLD, FORCE_COLOR="1")
    assert "84/84" in watched.stderr and "84/84" not in watched.stdout and "brackets" not in watched.stdout  # one policy has nothing to differ from


@pytest.mark.parametrize("ab", [False, True], ids=["worlds", "A/B"])
def test_a_duel_as_json(home: Path, ab: bool):
    "Each difference is that of the means, inside its interval; and the same command gives the same figures."
    arguments = ("simulate", "--policy", "cheap=price:fixed(factor=.8)", *WORLD, "--json", *["--ab"] * ab)
    told = json.loads(done(home, *arguments))
    assert (told["simulated"], told["ab"], told["seeds"], told["level"]) == (True, ab, [0, 1, 2], .95)
    assert told["world"] == {"customers": 80, "items": 50, "days": 28, "seed": 0}
    assert told["policies"] == {"default": "default", "cheap": "price:fixed(factor=.8)"}
    assert [(row["policy"], row["seed"]) for row in told["figures"]] == [(name, seed) for name in ("default", "cheap") for seed in range(3)]
    for row in told["differences"]:
        first, second = ([one[row["measure"]] for one in told["figures"] if one["policy"] == name] for name in ("default", "cheap"))
        assert row["difference"] == pytest.approx((sum(second) - sum(first)) / 3) and row["low"] <= row["difference"] <= row["high"]
    visits = {name: sum(one["visits"] for one in told["figures"] if one["policy"] == name) for name in ("default", "cheap")}
    alone = sum(one["visits"] for one in json.loads(done(home, "simulate", *WORLD, "--json"))["figures"])
    assert sum(visits.values()) == pytest.approx(alone, rel=.05) if ab else visits["default"] == alone  # halves of a shop, or whole shops
    assert json.loads(done(home, *arguments)) == told


def test_default_can_be_another_policy(home: Path):
    told = json.loads(done(home, "simulate", "--policy", "a=price:fixed", "--policy", "default=price:fixed", *WORLD, "--json"))
    assert list(told["policies"]) == ["default", "a"] and {row["difference"] for row in told["differences"]} == {0}
