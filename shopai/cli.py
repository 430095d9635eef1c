"""The `shopai` command: wiring between a terminal and the library. What it calls is explained in the notebooks; heavy imports happen inside the commands."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

import typer
from rich.console import Console
from rich.table import Table

import shopai
from shopai.core.config import Settings, UsageError, get_settings
from shopai.core.manifest import BundleError

__all__ = ["app", "main"]

if TYPE_CHECKING:
    from threading import Event

plain = {"markup": False, "emoji": False, "highlight": False}  # what users and shops call their things may look like markup
out, err = Console(**plain), Console(stderr=True, **plain)
group = {"no_args_is_help": True, "rich_markup_mode": "rich"}
app = typer.Typer(**group, pretty_exceptions_enable=False, add_completion=False,
                  help="From a shop's data to a served model. Start with [bold]shopai demo[/bold].")
data_app = typer.Typer(**group, help="Build and look at the lake.")
models_app = typer.Typer(**group, help="Look at models; promote one or go back.")
pipeline_app = typer.Typer(**group, help="Run the whole chain, as Dagster would.")
events_app = typer.Typer(**group, help="Events on their way from the shop into the lake: take them in, send recorded ones, see how they stand.")
features_app = typer.Typer(**group, help="What the shop knows about customers and items: for training from the lake, for answers from the online store.")
app.add_typer(data_app, name="data")
app.add_typer(models_app, name="models")
app.add_typer(pipeline_app, name="pipeline")
app.add_typer(events_app, name="events")
app.add_typer(features_app, name="features")

Profile = Annotated[str, typer.Option("--profile", "-P", help="Which params/<profile>/ to use: smoke (minutes), default (a laptop's coffee break), gpu.")]
Source = Annotated[str, typer.Option("--source", help="Where the data come from: synthetic (a simulated shop), or a file: "
                                                   "online-retail, rees46, retailrocket, shopify, woocommerce, csv.")]
DataPath = Annotated[Path | None, typer.Option("--path", help="The file that the source reads.")]
ColumnMap = Annotated[Path | None, typer.Option("--map", help="csv: a YAML file that tells what the columns mean.")]
Customers = Annotated[int | None, typer.Option("--customers", help="synthetic: number of customers, 1 to 100,000; default 5,000")]
Items = Annotated[int | None, typer.Option("--items", help="synthetic: number of items, 40 to 10,000; default 1,000")]
Days = Annotated[int | None, typer.Option("--days", help="synthetic: length of the history, 1 to 1,825 days; default 365")]
Seed = Annotated[int | None, typer.Option("--seed", help="synthetic: same seed, same shop; default 0")]
Model = Annotated[str, typer.Argument(help="Name of the model, such as recommend.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


WrongWords = typer.BadParameter.__base__  # what Typer raises when it can't read the command line; it has no public name


def main() -> None:
    "Run the command line: 0 done, 1 failed, 2 wrong use, 130 stopped. Whatever went wrong is one line, never a traceback."
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, so that what was started is ended, too
    try:
        sys.exit(app(standalone_mode=False))
    except WrongWords as error:
        if type(error).__name__ != "NoArgsIsHelpError": _complain("error", f"{error.format_message().rstrip('.')}; see: {error.ctx.command_path} --help")
        sys.exit(2)
    except UsageError as error:
        _complain("error", str(error))
        sys.exit(2)
    except (BundleError, OSError) as error:  # the model is unfit, or a place can't be reached: nothing that other words on the command line would mend
        _complain("failed", str(error))
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        err.print("stopped")
        sys.exit(130)
    except Exception as error:
        if os.environ.get("SHOPAI_DEBUG"): raise
        _complain("failed", f"{type(error).__name__}: {error} (SHOPAI_DEBUG=1 shows where)")
        sys.exit(1)


def _complain(kind: str, message: str) -> None:
    "One line on stderr."
    err.print(f"{kind}: ", style="bold red", end="")
    err.print(" ".join(message.split("\n")), soft_wrap=True)


def _failed(message: str) -> None:
    "Say why it failed and end with exit code 1."
    _complain("failed", message)
    raise typer.Exit(1)


def _table(title: str, *columns: str, rows: list[tuple] = ()) -> Table:
    "A Rich table under its title; columns that start with `#` are right-aligned numbers."
    out.print(f"\n{title}", style="bold", soft_wrap=True)
    table = Table()
    for column in columns: table.add_column(column.lstrip("#"), justify="right" if column.startswith("#") else "left")
    for row in rows: table.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    return table


@app.callback(invoke_without_command=True)
def root(
    home: Annotated[Path | None, typer.Option("--home", help="Folder of lake, runs and models; default $SHOPAI_HOME, else .shopai")] = None,
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.")] = False,
) -> None:
    if home: os.environ["SHOPAI_HOME"] = str(home.absolute())
    if version:
        out.print(f"shopai {shopai.__version__}")
        raise typer.Exit
    if (place := get_settings().home).is_file(): raise UsageError(f"SHOPAI_HOME: {place} is a file, not a folder")


# --- data -------------------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int, str], None]]:
    "A progress bar a stage, on stderr and only where somebody looks; gives the function that moves them."
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    text = lambda format: TextColumn(format, markup=False)
    columns = text("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), text("{task.fields[note]}")
    with Progress(*columns, console=err, disable=not err.is_terminal) as bars:
        tasks: dict[str, int] = {}

        def move(stage: str, done: int, of: int, note: str = "") -> None:
            if stage not in tasks: tasks[stage] = bars.add_task(stage, total=of, note=note)
            bars.update(tasks[stage], completed=done, note=note)
        yield move


def _build(settings: Settings, source: str, path: Path | None, pictures: bool = True, **options) -> None:
    "Fill the lake from a source and print what came in and what did not."
    from shopai.core.lake import Lake
    from shopai.data.sources import build_source

    started, lake = time.perf_counter(), Lake.from_settings(settings)
    before = lake.versions().get("events")
    images = settings.home.absolute() / "images" if pictures else None
    given = {name: value for name, value in options.items() if value is not None}
    with _bars() as progress: report = build_source(source, lake, path, images, progress, **given)
    _forget_online(settings)
    seconds = time.perf_counter() - started
    if report.get("simulated"): _tell_simulated(report, seconds)
    else: _tell_export(report, seconds)
    if report.get("pictures"): out.print(f"pictures: {images}", soft_wrap=True)
    if kept := report.get("untouched"):
        out.print(f"left as they were: {', '.join(kept)} (the source has none; if they belong to another shop, use another home)", soft_wrap=True)
    out.print(f"lake: {settings.lake_location}" + ("" if before is None else f" (the events before are version {before})"), soft_wrap=True)


def _forget_online(settings: Settings) -> None:
    "What is online of the shop before goes, too."
    from shopai.features.online import StoreUnavailable

    from shopai.features.live import forget_online

    try: forgotten = forget_online(settings)
    except StoreUnavailable as error: _failed(f"the lake is built anew, but features of the old one are still online: {error}")
    if forgotten: out.print("features of the shop before were taken offline; make new ones with: shopai run features")


def _tell_export(report: dict, seconds: float) -> None:
    "Where every line and every pound of a file went."
    rows = [(f"accepted: {name}", count) for name, count in report["accepted"].items()]
    rows += [(f"rejected: {reason}", count) for reason, count in report["rejected"].items()]
    out.print(_table(f"{report['source']}: {report['rows_in']:,} rows in, {seconds:.1f} s", "rows", "#count", rows=rows))
    money = report["net_value"]
    shown = {name: f"{Decimal(money[name]):,.2f}" for name in ("raw", "purchase", "refund")}
    rejected = f"{sum(map(Decimal, money['rejected'].values())):,.2f}"
    out.print(f"net value {shown['raw']} = purchases {shown['purchase']} - refunds {shown['refund']} + rejected {rejected}; difference {money['difference']}",
              soft_wrap=True)
    for note in report.get("notes", ()): out.print(f"note: {note}", soft_wrap=True)


def _tell_simulated(report: dict, seconds: float) -> None:
    "What happened in a simulated shop, and what it took."
    counts = {name: table["rows"] for name, table in report["tables"].items()}
    out.print(_table(f"a simulated shop: {counts['events']:,} events", "event", "#rows", rows=list(report["events"].items())))
    revenue = f"{report['revenue']:,.2f} {report['currency']}"
    out.print(f"{report['orders']:,} orders of {counts['users']:,} customers from {counts['items']:,} items; revenue {revenue}", soft_wrap=True)
    memory = f", at most {report['peak_memory']:,} MiB of memory" if report["peak_memory"] else ""
    out.print(f"{seconds:.1f} s, {counts['events'] / seconds:,.0f} events a second{memory}", soft_wrap=True)


@data_app.command("build")
def data_build(
    source: Source = "synthetic",
    path: DataPath = None,
    column_map: ColumnMap = None,
    customers: Customers = None,
    items: Items = None,
    days: Days = None,
    seed: Seed = None,
    pictures: Annotated[bool, typer.Option("--pictures/--no-pictures", help="synthetic: draw the items into <home>/images.")] = True,
) -> None:
    """Put a shop into the lake, in the place of the one that is there; old versions stay readable.

    A simulated shop needs no data, and its truth is known. Rows of a file that cannot be used go to the quarantine table with a reason.

    shopai data build --customers 1000 --items 300 --days 180 --seed 7

    shopai data build --source online-retail --path online_retail.parquet

    shopai data build --source csv --path orders.csv --map orders.yaml
    """
    _build(get_settings(), source, path, pictures, map=column_map, customers=customers, items=items, days=days, seed=seed)


@data_app.command("describe")
def data_describe(as_json: AsJson = False) -> None:
    "Tables of the lake, their rows and versions; events by name; quarantined rows by reason."
    import duckdb

    from shopai.core.lake import Lake

    duckdb.default_connection().execute("set enable_progress_bar_print = false")  # a long query's bar would go to stdout, into the JSON
    lake = Lake.from_settings(get_settings())
    counts = {table: lake.read(table, as_="duckdb").aggregate("count(*)").fetchall()[0][0] for table in lake.tables()}
    if not counts: raise UsageError(f"the lake {lake.location} is empty; fill it with: shopai data build")
    versions = lake.versions()
    sql = {
        "events": "select event_name, count(*), count(distinct user_id), min(event_time)::date, max(event_time)::date from rows group by 1 order by 2 desc",
        "quarantine": "select reason, count(*) from rows group by 1 order by 2 desc",
    }
    details = {table: lake.read(table, as_="duckdb").query("rows", query).fetchall() for table, query in sql.items() if table in counts}
    if as_json:
        print(json.dumps({"tables": {table: {"rows": counts[table], "version": versions[table]} for table in counts}, **details}, default=str, indent=2))
        return
    out.print(_table(str(lake.location), "table", "#rows", "#version", rows=[(table, rows, versions[table]) for table, rows in counts.items()]))
    out.print(_table("events", "event", "#rows", "#customers", "first", "last", rows=details.get("events", [])))
    if "quarantine" in details: out.print(_table("quarantine", "reason", "#rows", rows=details["quarantine"]))


# --- events -----------------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _until_stopped() -> Iterator["Event"]:
    "An event that Ctrl-C and SIGTERM set, so that the batch at hand is finished first; a second Ctrl-C stops at once."
    import threading

    stop = threading.Event()

    def ask(number: int, frame) -> None:
        if stop.is_set(): raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try: yield stop
    finally:
        for number, handler in before.items(): signal.signal(number, handler)


def _landed(landed) -> str:
    "Where records went, in one line."
    others = {"repeated": sum(landed.duplicates.values()), "in quarantine": sum(landed.quarantined.values()), "unreadable": landed.dead}
    return ", ".join([f"{landed.events:,} events", *(f"{count:,} {what}" for what, count in others.items() if count)])


@contextmanager
def _ingest_display(every: float = 10.) -> Iterator[Callable]:
    "A line that moves where somebody looks; else one line now and then, when something has landed."
    from rich.live import Live
    from rich.text import Text

    started, told = time.monotonic(), [0., 0]  # when a line was printed last, and of how many records it knew

    def line(progress) -> str:
        waiting = "" if progress.lag is None else f" · {progress.lag:,} wait"
        return f"{_landed(progress.landed)}{waiting} · {time.monotonic() - started:,.0f} s" + (f" · {progress.problem}" if progress.problem else "")

    with Live(console=err, auto_refresh=False, transient=True) as live:

        def tell(progress) -> None:
            if err.is_terminal: live.update(Text(line(progress)), refresh=True)
            elif time.monotonic() - told[0] > every and (progress.landed.records > told[1] or progress.problem):
                told[:] = time.monotonic(), progress.landed.records
                err.print(line(progress), soft_wrap=True)
        yield tell


@events_app.command("ingest")
def events_ingest(
    once: Annotated[bool, typer.Option("--once", help="Take in what is there, then end.")] = False,
    batch: Annotated[int, typer.Option("--batch", min=1, max=1_000_000, help="Records that land in one commit, at most.")] = 20_000,
    wait: Annotated[float, typer.Option("--wait", min=.01, max=60, help="Seconds between two looks at an empty bus.")] = 1.0,
    spark: Annotated[bool, typer.Option("--spark", help="The same job as Spark Structured Streaming, for a shop that outgrows one machine.")] = False,
    push: Annotated[bool | None, typer.Option("--push/--no-push", help="Keep the online features at what comes in; default: if shopai features apply was run. "
                                                                       "With --spark, run shopai features push --follow beside it.")] = None,
) -> None:
    """Take events from the bus, enrich them, and put them into the lake, each exactly once.

    Runs until Ctrl-C or SIGTERM, and finishes the batch at hand first. Kill it as you like: it goes on where the lake says it was.

    SHOPAI_BUS names the bus (a folder, or kafka://host:port/prefix), SHOPAI_GEO_DATABASE a MaxMind database, SHOPAI_TIMEZONE the shop's time zone.

    shopai events ingest --once

    shopai events ingest --spark --batch 200000 --wait 10
    """
    from shopai.events.ingest import Overtaken

    settings = get_settings()
    with _until_stopped() as stop, _ingest_display() as tell:
        try: done = _by_spark(settings, once, stop, tell, batch, wait) if spark else _in_process(settings, once, stop, tell, batch, wait, push)
        except Overtaken as error: _failed(str(error))
    out.print(f"{_landed(done)} · {settings.lake_location}", soft_wrap=True)


def _in_process(settings: Settings, once: bool, stop: "Event", tell: Callable, batch: int, wait: float, push: bool | None):
    "Ingest on one core, and with it what the online store knows of customers and visits."
    from shopai.events.ingest import ingest_from_settings, serve_ingest

    ingest = ingest_from_settings(settings)
    live = _live(settings) if push or (push is None and (settings.home / "features" / "registry.db").exists()) else None
    if live: ingest.listeners.append(live)

    def told(progress) -> None:
        if live: live.flush()  # what waited for a store that was down
        tell(progress)

    try: return serve_ingest(ingest, once, stop, told, batch, wait)
    finally:
        ingest.close()
        if live and (pushed := live.flush(at_once=True)): out.print(f"features: {pushed}", soft_wrap=True)


def _live(settings: Settings):
    "What pushes features, once it has read the past."
    from shopai.features.live import live_context

    with err.status("reading what is known of customers and visits"): return live_context(settings)


def _by_spark(settings: Settings, once: bool, stop: "Event", tell: Callable, batch: int, wait: float):
    "Ingest on as many machines as Spark has."
    from shopai.events.spark import spark_ingest

    return spark_ingest(settings, once=once, stop=stop, tell=tell, every=wait, most=batch)


@events_app.command("status")
def events_status(as_json: AsJson = False) -> None:
    "What waits on the bus, what has landed in the lake, and what could not."
    from shopai.core.lake import Lake
    from shopai.events.bus import open_bus
    from shopai.events.ingest import Landed, status

    settings = get_settings()
    now = status(open_bus(settings.bus_location), open_bus(settings.bus_location, "events.dead"), Lake.from_settings(settings))
    if as_json:
        print(json.dumps(now, indent=2))
        return
    columns = ("partition", "kept_from", "landed_to", "end", "lag")
    names = ("#partition", "#kept from", "#landed up to", "#end", "#waiting")
    out.print(_table(f"{now['bus']} · {settings.bus_location}", *names, rows=[tuple(row[name] for name in columns) for row in now["partitions"]]))
    out.print(f"{now['lag']:,} records wait; {now['dead']:,} could not be read (dead letters)")
    if now["last_commit"]: out.print(f"last batch {now['last_commit']}: {_landed(Landed(**now['last_batch']))}", soft_wrap=True)
    else: out.print("nothing has landed yet; take it in with: shopai events ingest")


@events_app.command("replay")
def events_replay(
    what: Annotated[str, typer.Argument(metavar="FILE|TABLE", help="events (the lake's table), or a file: .parquet or .csv in its columns, .jsonl of events.")],
    to: Annotated[str, typer.Option("--to", help="Where to: an API (http://host:port), a bus (folder or kafka://…); default: the bus of SHOPAI_BUS.")] = "",
    speed: Annotated[str, typer.Option("--speed", help="max, a factor such as 60x (an hour a minute), or events a second such as 500/s.")] = "max",
    shift: Annotated[str, typer.Option("--shift", help="now: move all events so that the last one happens now; they get new ids.")] = "",
    source: Annotated[str, typer.Option("--source", help="Read FILE as an export that this source knows, such as rees46 or shopify.")] = "",
    version: Annotated[int | None, typer.Option("--version", min=0, help="events: as of this version of the table; default: the newest.")] = None,
) -> None:
    """Send recorded events once more, to the bus or to an API, as fast as you like. A repeated event is recognised by its id, so a replay can be repeated, too.

    shopai events replay clicks.jsonl --to http://127.0.0.1:8000 --speed 100/s

    shopai events replay 2019-Oct.parquet --source rees46
    """
    from shopai.core.lake import Lake
    from shopai.events.replay import open_target, read_recorded, read_speed, replay
    from shopai.events.wire import Door

    settings = get_settings()
    door = Door.from_settings(settings)
    read_speed(speed)
    if source or what != "events": _existing(what)
    target = open_target(to or settings.bus_location, door)
    recorded = read_recorded(what, Lake.from_settings(settings), version=version, source=source or None, shift=shift or None, door=door)
    with _until_stopped() as stop, _bars() as progress:
        done = replay(recorded, target, speed, lambda so_far: progress("events", so_far.sent, recorded.total, so_far.at[:16]), stop)
    rate = f", {done.sent / done.seconds:,.0f} a second" if done.seconds else ""
    out.print(f"{done.sent:,} events sent to {to or settings.bus_location}{rate}{' (stopped)' if done.stopped else ''}", soft_wrap=True)
    if done.refused: out.print(_table("refused", "reason", "#events", rows=done.refused.most_common()))


def _existing(file: str) -> None:
    "Raise `UsageError` if there is no such file."
    if not Path(file).exists(): raise UsageError(f"FILE: {file} does not exist; a table's name would be events")


@events_app.command("signals")
def events_signals(
    file: Annotated[Path | None, typer.Argument(help="YAML file that names the sources and how often each is asked.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Ask the sources that are due, land what they say, then end.")] = False,
    example: Annotated[bool, typer.Option("--example", help="Print a file to begin with, then end.")] = False,
) -> None:
    """Ask for what the shop doesn't know by itself, on a schedule: holidays, rivals' prices, weather, sentiment.

    A source that doesn't answer keeps its last known values and stops nobody else. Secrets come from environment variables that the file names.

    shopai events signals --example > signals.yaml

    shopai events signals signals.yaml --once
    """
    from shopai.core.lake import Lake
    from shopai.events.bus import open_bus
    from shopai.events.landing import run
    from shopai.events.signals import Poller, example_signals, read_signals

    if example:
        print(example_signals(), end="")
        return
    if file is None: raise UsageError("FILE is missing: the YAML file that names the sources; begin with: shopai events signals --example")
    settings = get_settings()
    bus = open_bus(settings.bus_location, "signals")
    with _until_stopped() as stop:
        poller = Poller(read_signals(file), bus, settings.home.absolute() / "signals")
        run(poller, Lake.from_settings(settings), once, stop, lambda told: out.print(str(told), soft_wrap=True))
    bus.close()


# --- features ---------------------------------------------------------------------------------------------------------------------------------

Views = Annotated[list[str] | None, typer.Option("--view", help="Only this view; may be repeated. See: shopai features list")]


@features_app.command("list")
def features_list(view: Views = None, as_json: AsJson = False) -> None:
    "All features: what they mean, in which unit, how old they may be, and who answers for them."
    from shopai.features.catalogue import VIEWS
    from shopai.features.catalogue import view as named

    chosen = [named(name) for name in view or VIEWS]
    if as_json:
        features = lambda found: [{name: getattr(one, name) for name in ("name", "dtype", "unit", "description")} for one in (*found.features, *found.derived)]
        print(json.dumps([{"view": found.name, "keys": found.keys, "owner": found.owner, "ttl_days": found.ttl.days, "description": found.description,
                           "features": features(found)} for found in chosen], indent=2))
        return
    for found in chosen:
        out.print(_table(f"{found.name} · by {' and '.join(found.keys)} · {found.owner} · good for {found.ttl.days} days", "feature", "type", "unit", "meaning",
                         rows=[(one.name, one.dtype, one.unit, one.description) for one in (*found.features, *found.derived)]))
    out.print("what follows from the facts at the moment of the question is worked out then; the rest is stored", style="dim")


@features_app.command("apply")
def features_apply() -> None:
    """Set the feature store up: its registry, and the tables of the online store. Doing it again changes nothing.

    SHOPAI_ONLINE_STORE names the online store: redis://host:port/db, or, by default, an SQLite file in the home.
    """
    from shopai.features.store import FeatureStore

    settings = get_settings()
    with err.status("waking Feast up"):
        applied = FeatureStore(settings).apply()
    out.print(f"the feature store is ready: {len(applied['views'])} views · {_online(settings)}", soft_wrap=True)
    out.print("fill it with: shopai run features", style="dim")


def _online(settings: Settings) -> str:
    "Where the online store is, without a password."
    scheme, _, place = settings.online_location.partition("://")
    return f"{scheme}://{place.rpartition('@')[2]}"


@features_app.command("materialize")
def features_materialize(
    view: Views = None,
    until: Annotated[str, typer.Option("--until", help="Only what was known by then, such as 2026-01-31T12:00:00Z; default: everything.")] = "",
    full: Annotated[bool, typer.Option("--full", help="Everything anew, not only what has come since the last time.")] = False,
) -> None:
    """Put the latest features of every customer and item from the lake into the online store.

    shopai features materialize

    shopai features materialize --view user_context --until 2026-01-31T12:00:00Z --full
    """
    from shopai.features.store import FeatureStore

    settings, started = get_settings(), time.perf_counter()
    moment = _moment(until, "--until") if until else None
    with err.status("waking Feast up"):
        store = FeatureStore(settings)
        store.apply()
    with err.status("filling the online store"): rows = store.materialize(view or None, until=moment, full=full)
    out.print(_table(f"{_online(settings)}", "view", "#rows written", rows=list(rows.items())))
    out.print(f"{time.perf_counter() - started:.1f} s")


def _moment(text: str, name: str):
    "A time with a zone."
    from datetime import datetime

    try: moment = datetime.fromisoformat(text)
    except ValueError: raise UsageError(f"{name} must be a time such as 2026-01-31T12:00:00Z, got {text!r}") from None
    if moment.tzinfo is None: raise UsageError(f"{name} must have a zone, such as 2026-01-31T12:00:00Z, got {text!r}")
    return moment


@features_app.command("push")
def features_push(
    view: Annotated[str, typer.Argument(help="A view from: shopai features list. Without one: what the lake's events have brought since the last push.")] = "",
    file: Annotated[Path | None, typer.Argument(help="Its rows: .parquet, or .csv; the keys, event_timestamp and the features.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until Ctrl-C, and push what comes.")] = False,
    wait: Annotated[float, typer.Option("--wait", min=.1, max=3600, help="With --follow: seconds between two looks at the lake.")] = 5.0,
) -> None:
    """Put new features online at once: those of what has just happened, or rows of your own.

    Where `shopai events ingest` runs, it pushes by itself; this is for lakes that something else fills, such as Spark.

    shopai features push --follow

    shopai features push item_recommender vectors.parquet
    """
    if view and file is None: raise UsageError("FILE is missing: the rows of the view, .parquet or .csv")
    if view: _push_file(view, file)
    else: _push_events(follow, wait)


def _push_file(view: str, file: Path) -> None:
    import pandas as pd

    from shopai.features.catalogue import view as named
    from shopai.features.store import FeatureStore

    named(view)
    if file.suffix not in (".parquet", ".csv"): raise UsageError(f"FILE must be .parquet or .csv, got {file}")
    if not file.exists(): raise UsageError(f"FILE: {file} does not exist")
    rows = pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file, parse_dates=["event_timestamp"])
    with err.status("pushing"):
        store = FeatureStore(get_settings())
        store.apply()
        pushed = store.push(view, rows)
    out.print(f"{pushed:,} rows of {view} are online")


def _push_events(follow: bool, wait: float) -> None:
    from shopai.features.live import follow_lake

    with _until_stopped() as stop:
        for told in follow_lake(get_settings(), stop, once=not follow, wait=wait): out.print(str(told), soft_wrap=True)


@features_app.command("get")
def features_get(
    user: Annotated[str, typer.Option("--user", help="A customer's user_id.")] = "",
    item: Annotated[str, typer.Option("--item", help="An item_id.")] = "",
    session: Annotated[str, typer.Option("--session", help="A session_id.")] = "",
    view: Views = None,
    at: Annotated[str, typer.Option("--at", help="As of this past moment, from the lake: what a training set says. Default: now, from the online store.")] = "",
    as_json: AsJson = False,
) -> None:
    """What the shop knows about a customer, an item or a visit.

    shopai features get --user 12583

    shopai features get --user 12583 --at 2011-11-30T12:00:00Z
    """
    key, value = _one_entity(user, item, session)
    chosen = _views_by(key, view)
    settings = get_settings()
    told = _as_of(settings, key, value, chosen, _moment(at, "--at")) if at else _by_now(settings, key, value, chosen)
    if as_json:
        print(json.dumps({name: {"status": status, "at": known, "features": {n: _plain(v) for n, v in values.items()}} for name, (status, known, values) in told.items()},
                         indent=2))
        return
    for name, (status, known, values) in told.items():
        since = f" · as of {known}" if known else ""
        out.print(_table(f"{name} · {value} · {status}{since}", "feature", "value", rows=[(n, _shown(n, v)) for n, v in values.items() if v is not None]))


def _one_entity(user: str, item: str, session: str) -> tuple[str, str]:
    given = [(key, value) for key, value in (("user_id", user), ("item_id", item), ("session_id", session)) if value]
    if len(given) != 1: raise UsageError("give exactly one of --user, --item and --session")
    return given[0]


def _views_by(key: str, names: list[str] | None) -> list[str]:
    "The views that are asked for, or all with this key."
    from shopai.features.catalogue import VIEWS
    from shopai.features.catalogue import view as named

    if wrong := [name for name in names or () if named(name).keys != (key,)]:
        raise UsageError(f"--view: {wrong[0]} is by {' and '.join(named(wrong[0]).keys)}, not by {key}")
    return names or [name for name, found in VIEWS.items() if found.keys == (key,)]


Told = dict[str, tuple[str, str, dict]]  # view → status, time of the row, values


def _by_now(settings: Settings, key: str, value: str, views: list[str]) -> Told:
    from datetime import UTC, datetime

    from shopai.features.online import StoreUnavailable, open_reader

    moment = lambda us: "" if us is None else datetime.fromtimestamp(us / 1e6, UTC).isoformat(timespec="seconds")
    reader = open_reader(settings.online_location, settings.feature_project)
    try: found = reader.entity({key: value}, views)
    except StoreUnavailable as error: _failed(f"{error}; set it up with: shopai run features")
    finally: reader.close()
    return {name: (one.status, moment(one.at), one.values) for name, one in found.items()}


def _as_of(settings: Settings, key: str, value: str, views: list[str], at) -> Told:
    import pandas as pd

    from shopai.features.catalogue import view as named
    from shopai.features.store import FeatureStore

    with err.status("looking into the lake"):
        store = FeatureStore(settings)
        store.apply()
        row = store.training_set(pd.DataFrame({key: [value], "event_timestamp": [pd.Timestamp(at).tz_convert("UTC")]}), views).iloc[0]
    told = {}
    for name in views:
        values = {feature: _native(row[f"{name}__{feature}"]) for feature in named(name).all_names}
        told[name] = ("known" if any(v is not None for v in values.values()) else "unknown", at.isoformat(), values)
    return told


def _native(value):
    "A cell of a frame as plain Python; None where it is missing."
    import numpy as np
    import pandas as pd

    if isinstance(value, np.ndarray | list): return np.asarray(value, "float32")
    return None if pd.isna(value) else value.item() if hasattr(value, "item") else value


def _plain(value):
    "For JSON."
    return value.tolist() if hasattr(value, "tolist") else value


def _shown(name: str, value) -> str:
    "For the eye: times as times, vectors as their beginning, numbers with four digits."
    from datetime import UTC, datetime

    if name.endswith("_at"): return f"{datetime.fromtimestamp(value / 1e6, UTC):%Y-%m-%d %H:%M:%S} UTC"
    if hasattr(value, "tolist"): return f"{', '.join(f'{x:.3f}' for x in value.tolist()[:4])}, … ({len(value)} numbers)"
    return str(value) if not isinstance(value, float) else f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


# --- simulation ----------------------------------------------------------------------------------------------------------------------------


class _Taught(typer.core.TyperCommand):
    "A command whose help lists the hooks and policies, which are looked up only when somebody asks."

    def format_help(self, ctx, formatter) -> None:
        from dataclasses import fields

        from shopai.data.policies import POLICIES

        def words(name: str, policy: type) -> str:
            settable = ", ".join(f"{f.name}={f.default:g}" for f in fields(policy) if isinstance(f.default, int | float))
            return f"{name}({settable})" if settable else name

        known = [f"[bold]{hook}[/bold]: " + ", ".join(words(*one) for one in policies.items()) for hook, policies in POLICIES.items()]
        self.epilog = "Hooks and their policies, with the parameters that can be set:\n\n" + "\n\n".join(known)
        super().format_help(ctx, formatter)


@app.command("simulate", cls=_Taught)
def simulate(
    policy: Annotated[list[str] | None, typer.Option("--policy", help="NAME=SPEC, may be repeated; SPEC: hook:policy(parameter=number), joined by +")] = None,
    customers: Annotated[int, typer.Option(help="Customers of the shop, 1 to 100,000.")] = 1_000,
    items: Annotated[int, typer.Option(help="Items on sale, 40 to 10,000.")] = 300,
    days: Annotated[int, typer.Option(help="Days of business, 1 to 1,825.")] = 180,
    seed: Annotated[int, typer.Option(help="The shop: same seed, same customers and items.")] = 0,
    seeds: Annotated[int, typer.Option(help="Times that each policy lives these days, each time with other luck, 2 to 1,000.")] = 5,
    ab: Annotated[bool, typer.Option("--ab", help="One shop whose customers are split between the policies, as in a real A/B test.")] = False,
    as_json: AsJson = False,
) -> None:
    """Let policies do the same business in a simulated shop, and compare what they earn.

    Every policy meets the same customers, the same days and the same luck, so that small differences show.

    All are compared with [bold]default[/bold]: popularity, cost-plus, reorder-point and no reminders, unless you name one default yourself.

    Hooks that a policy doesn't name are as in these.

    shopai simulate --policy "cheap=price:fixed(factor=.9)"

    shopai simulate --policy "kind=recover:flat(discount=.1)" --seeds 10

    shopai simulate --policy "x=price:fixed+recommend:random" --ab --json
    """
    from shopai.data.duels import compare, differences
    from shopai.data.sources import SOURCES, Option
    from shopai.data.world import make_world

    given = {"customers": customers, "items": items, "days": days, "seed": seed}
    for name, value in given.items(): SOURCES["synthetic"].options[name].check(name, value)
    Option(5, 2, 1_000, "times that each policy is run").check("seeds", seeds)
    policies, specs = _policies(policy or [])
    if ab and len(policies) < 2: raise UsageError("--ab needs a policy to compare with default: --policy NAME=SPEC")
    started = time.perf_counter()
    with _bars() as progress:
        world = make_world(**given)
        figures = compare(world, policies, range(seeds), ab, progress=lambda done, of: progress("simulated days", done, of))
    told = differences(figures)
    if as_json: print(json.dumps(_duel_json(given, seeds, ab, specs, figures, told), indent=2))
    else: _tell_duel(given, seeds, ab, figures, told, time.perf_counter() - started)


def _policies(given: list[str]) -> tuple[dict, dict[str, str]]:
    "Policies and their specifications by name, `default` first."
    from shopai.data.policies import parse_policies

    specs: dict[str, str] = {}
    for text in given:
        name, equals, spec = (part.strip() for part in text.partition("="))
        if not equals or not re.fullmatch(r"\w[\w-]*", name):
            raise UsageError(f"policy must be NAME=SPEC, such as \"cheap=price:fixed(factor=.9)\", got {text!r}")
        if name in specs: raise UsageError(f"policy {name!r} is given twice")
        specs[name] = spec
    specs = {"default": "default"} | specs
    return {name: parse_policies(spec) for name, spec in specs.items()}, specs


def _duel_json(world: dict, seeds: int, ab: bool, specs: dict, figures, told) -> dict:
    "All figures of a comparison; what doesn't exist (nan) is null."
    def rows(frame) -> list[dict]:
        records = frame.reset_index().to_dict("records")
        return [{key: None if value != value else value for key, value in row.items()} for row in records]
    return {"simulated": True, "world": world, "seeds": list(range(seeds)), "ab": ab, "level": .95, "policies": specs,
            "figures": rows(figures), "differences": rows(told)}


def _tell_duel(world: dict, seeds: int, ab: bool, figures, told, seconds: float) -> None:
    "One table: each policy's means, then its difference to the first."
    from shopai.data.duels import SHOWN

    means = figures.groupby(level="policy", sort=False)[list(SHOWN)].mean()
    first, *others = means.index
    share = lambda measure: measure == "unmet share"
    plain_number = lambda measure, value: f"{value:.2%}" if share(measure) else f"{value:,.0f}"
    signed = lambda measure, value: f"{round(100 * value, 2) + 0:+.2f}" if share(measure) else f"{round(value) + 0:+,d}"

    def change(measure: str, c) -> str:
        return f"{signed(measure, c.difference)}{' points' if share(measure) else ''} [{signed(measure, c.low)}, {signed(measure, c.high)}]"

    def cells(measure: str) -> list[str]:
        return [*(plain_number(measure, value) for value in means[measure]), *(change(measure, told.loc[(other, measure)]) for other in others)]

    how = f"one shop, its customers split between {len(means)} policies" if ab else "the same luck for every policy"
    title = f"simulated: {world['customers']:,} customers, {world['items']:,} items, {world['days']:,} days; means of {seeds} runs, {how}"
    units = {"revenue": "revenue, GBP", "refunds": "refunds, GBP", "profit": "profit, GBP", "unmet share": "wanted, but sold out",
             "carts": "carts left behind", "reminders": "reminders sent", "returned": "bought the next day"}
    out.print(_table(title, "", *(f"#{name}" for name in means.index), *(f"#{other} - {first} (95 %)" for other in others),
                     rows=[(units.get(measure, measure), *cells(measure)) for measure in SHOWN]))
    meaning = f"In brackets: paired 95 % intervals over the luck of {seeds} runs in this one shop; a difference counts where they leave out 0. "
    out.print(f"{meaning if others else ''}{seconds:.1f} s", soft_wrap=True)


# --- jobs -------------------------------------------------------------------------------------------------------------------------------------


def _run(job: str, profile: str, parameters: list[str] | None = None, settings: Settings | None = None):
    "Run a job and print its figures; a failed one ends with exit code 1."
    from shopai.core.jobs import JobFailed, parse_parameters, run_job

    try:
        result = run_job(job, profile, parse_parameters(parameters or []), settings or get_settings())
    except JobFailed as error:
        _failed(str(error))
    rows = [(name, f"{value:.4f}" if isinstance(value, float) else value) for name, value in result.metrics.items()]
    out.print(_table(f"{job} · {profile} · {result.run_id}", "metric", "#value", rows=rows))
    if decision := result.manifest.get("decision"):
        outcome = result.manifest.get("outcome") or ("promoted" if decision["promote"] else "refused")
        out.print(outcome, style="green" if decision["promote"] else "yellow", end="")
        out.print(f": {'; '.join(decision['reasons'])}", soft_wrap=True)
    out.print(f"report: {result.folder / 'notebook.html'}", soft_wrap=True)
    return result


@app.command("run")
def run(
    job: Annotated[str, typer.Argument(help="The notebook's name without its number: recommend, …")],
    profile: Profile = "smoke",
    parameter: Annotated[list[str] | None, typer.Option("--parameter", "-p", help="key=value, wins over the profile; may be repeated.")] = None,
) -> None:
    """Run one training job: its notebook, executed by papermill into runs/<job>/.

    shopai run recommend --profile default -p seeds='[0,1,2]'
    """
    _run(job, profile, parameter)


@pipeline_app.command("run")
def pipeline_run(
    profile: Profile = "smoke",
    source: Annotated[str, typer.Option("--source", help="Rebuild the lake from this source; empty: keep it if it has events.")] = "",
    path: DataPath = None,
    customers: Customers = None,
    items: Items = None,
    days: Days = None,
    seed: Seed = None,
) -> None:
    "Run data and jobs in this process, in the order of their dependencies. `dagster dev -f experiments/pipeline.py` shows the same in a browser."
    import importlib.util

    settings = get_settings()
    file = settings.project / "experiments" / "pipeline.py"
    if not file.exists(): raise UsageError(f"{file} does not exist; run in a checkout of the project, or set SHOPAI_PROJECT to it")
    spec = importlib.util.spec_from_file_location("shopai_pipeline", file)
    pipeline = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pipeline)
    options = {"customers": customers, "items": items, "days": days, "seed": seed}
    steps = pipeline.run(profile=profile, source=source, path=str(path or ""), **{name: value for name, value in options.items() if value is not None})
    out.print(_table(f"pipeline · {profile}", "asset", "outcome", rows=list(steps.items())))
    for asset, outcome in steps.items():
        what, _, reason = outcome.partition(": ")
        if what == "wrong use": raise UsageError(f"{asset}: {reason}")
        if what == "failed": _failed(f"{asset}: {reason}")


# --- models -----------------------------------------------------------------------------------------------------------------------------------


def _versions(name: str) -> list[dict]:
    from shopai.core.tracking import Tracker

    with err.status("asking the registry"):
        versions = Tracker(get_settings()).versions(name)
    if not versions: raise UsageError(f"no model {name!r} in the registry; train it with: shopai run {name}")
    return versions


@models_app.command("list")
def models_list(name: Annotated[str, typer.Argument(help="Name of the model.")] = "recommend", as_json: AsJson = False) -> None:
    "All versions of a model, newest first; the champion is the one that is served."
    versions = _versions(name)
    if as_json:
        print(json.dumps(versions, default=str, indent=2))
        return
    rows = [(v["number"], v["version"], "champion" if v["champion"] else "", v["kind"], f"{v['metrics'].get('ndcg@10', float('nan')):.4f}") for v in versions]
    out.print(_table(name, "#number", "version", "", "kind", "#ndcg@10", rows=rows))


@models_app.command("show")
def models_show(name: Model = "recommend", version: Annotated[str, typer.Option(help="Default: the champion.")] = "") -> None:
    "One version: its figures, the run that made it, and what the gate said."
    versions = _versions(name)
    chosen = next((v for v in versions if (version in (v["version"], str(v["number"])) if version else v["champion"])), None)
    wanted, there = f"version {version!r}" if version else "champion", ", ".join(f"{v['version']} ({v['number']})" for v in versions)
    if chosen is None: raise UsageError(f"{name} has no {wanted}; there are {there}")
    print(json.dumps(chosen, default=str, indent=2))


@models_app.command("promote")
def models_promote(
    name: Model,
    version: Annotated[str, typer.Argument(help="A version or number from: shopai models list")],
    reason: Annotated[str, typer.Option(help="Kept with the decision.")] = "by hand",
) -> None:
    "Make a version the champion by hand, past the gate. The API picks it up without a restart."
    from shopai.core.tracking import Tracker

    out.print(f"{name} {Tracker(get_settings()).promote(name, version, reason=reason)} is the champion")


@models_app.command("rollback")
def models_rollback(name: Model) -> None:
    "Go back to the champion before this one."
    from shopai.core.tracking import Tracker

    out.print(f"{name} {Tracker(get_settings()).rollback(name)} is the champion again")


# --- serving ----------------------------------------------------------------------------------------------------------------------------------

Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")]


@app.command()
def serve(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes, one inference thread each.")] = 1,
) -> None:
    "Serve the champion models over HTTP. The interactive documentation is at /docs."
    _check_port(host, port)
    err.print(f"shopai serves {get_settings().store_location} at http://{host}:{port}/docs; Ctrl-C stops it", soft_wrap=True)
    os.execve(sys.executable, _serve_command(host, port, workers), _environment())  # noqa: S606 - becomes the server, so that signals reach it


def _serve_command(host: str, port: int, workers: int = 1) -> list[str]:
    "Serving is started as a program of its own: the library does not import what is built on it."
    return [sys.executable, "-m", "serving", "--host", host, "--port", str(port), "--workers", str(workers)]


def _environment() -> dict[str, str]:
    return {**os.environ, "SHOPAI_HOME": str(get_settings().home.absolute())}


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option("--data", help="Online Retail as Parquet, CSV or XLSX; default: a simulated shop.")] = None,
    profile: Profile = "smoke",
    port: Port = 8000,
    stop: Annotated[bool, typer.Option("--stop", help="Stop after the example calls instead of serving on.")] = False,
) -> None:
    "The whole loop: a shop's data into the lake, its last week over the bus, features, train, judge, publish, serve; then example calls."
    from shopai.core.jobs import find_notebook, find_profile

    settings, started = get_settings(), time.perf_counter()
    if data and not data.exists(): raise UsageError(f"data: the file {data} does not exist")
    _check_port("127.0.0.1", port, " (make demo PORT=…)")
    for job in ("features", "recommend"): find_notebook(job, settings), find_profile(job, profile, settings)  # rather now than after the lake was built
    out.rule("1 · a shop's data into the lake")
    if data: _build(settings, "online-retail", data)
    else: _build(settings, "synthetic", None, customers=1_500, items=400, days=365)
    if not data: _live_week(settings)
    out.rule("2 · what the shop knows: features, offline and online")
    _run("features", profile, settings=settings)
    out.rule("3 · train, judge against the baselines, publish the champion")
    _run("recommend", profile, settings=settings)
    out.rule("4 · serve")
    environment = {"SHOPAI_SERVE_LOG_LEVEL": "warning", **_environment()}
    server = subprocess.Popen(_serve_command("127.0.0.1", port), env=environment)  # noqa: S603 - our own interpreter and module
    try:
        _example_calls(f"http://127.0.0.1:{port}", server, settings)
        out.print("ready", style="bold green", end="")
        out.print(f" after {time.perf_counter() - started:.0f} s: http://127.0.0.1:{port}/docs")
        if not stop:
            out.print("Ctrl-C stops it; shopai serve starts it again.")
            if server.wait(): _failed(f"the API ended with code {server.returncode}")
    finally:
        _stop(server)


def _live_week(settings: Settings) -> None:
    "Let the last week of the simulated shop come in as a live shop's would: out of the lake, over the bus, enriched, and into the lake again."
    import tempfile

    from shopai.core.lake import Lake
    from shopai.events.ingest import ingest_from_settings, serve_ingest
    from shopai.events.replay import open_target, read_recorded, replay
    from shopai.events.wire import Door

    lake, started = Lake.from_settings(settings), time.perf_counter()
    (first,), = lake.read("events", as_="duckdb").aggregate("max(event_time) - interval 7 days").fetchall()
    week = f"event_time > '{first.isoformat()}'"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "week.parquet"
        lake.read("events", where=week).to_parquet(file)
        lake.delete("events", week)
        sent = replay(read_recorded(str(file)), open_target(settings.bus_location, Door.from_settings(settings)))
    ingest = ingest_from_settings(settings)
    with _ingest_display() as tell: done = serve_ingest(ingest, once=True, tell=tell, wait=.05)
    ingest.close()
    out.print(f"its last week came over the bus: {sent.sent:,} events sent; in the lake {_landed(done)}; {time.perf_counter() - started:.1f} s", soft_wrap=True)


def _stop(server: subprocess.Popen, patience: float = 15) -> None:
    "Ask it to finish what it is answering; end it if it doesn't."
    server.terminate()
    try: server.wait(patience)
    except subprocess.TimeoutExpired: server.kill()


def _check_port(host: str, port: int, hint: str = "") -> None:
    "Raise `UsageError` if nothing can listen there."
    import socket

    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error: raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}; choose another one with --port{hint}") from None


def _get(url: str, body: dict | None = None) -> dict:
    "One JSON call to the API that this process has started on loopback."
    request = urllib.request.Request(url, data=body and json.dumps(body).encode(), headers={"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=10) as answer: return json.load(answer)  # noqa: S310


def _example_calls(address: str, server: subprocess.Popen, settings: Settings, patience: float = 30) -> None:
    "Wait until the API is ready, then make three calls and show command and answer."
    deadline = time.monotonic() + patience
    while True:
        try:
            _get(f"{address}/readyz")
            break
        except (urllib.error.URLError, OSError) as error:
            if server.poll() is not None or time.monotonic() > deadline: _failed(f"the API did not become ready: {error}")
            time.sleep(.1)
    user, items = _example_customer(settings)
    calls = [
        ("what to show to a customer", "/v1/recommendations", {"user_id": user, "k": 3}),
        ("what to show to a visitor who looked at two items", "/v1/recommendations", {"item_ids": items[-2:], "k": 3}),
        ("what is similar to an item", f"/v1/items/{quote(items[-1], safe='')}/similar?k=3", None),
    ]
    for title, path, body in calls:
        payload = f" -H 'Content-Type: application/json' -d '{json.dumps(body)}'" if body else ""
        out.print(f"\n{title}", style="bold")
        out.print(f"curl -s{' -X POST' if body else ''} '{address}{path}'{payload}", soft_wrap=True)
        answer = _get(f"{address}{path}", body)
        for item in answer["items"]:
            out.print(f"  {item['rank']}. {item['title'] or 'no title'}  ({item['item_id']}, score {item['score']:.3f})", soft_wrap=True)
    _example_event(address, user, items[-1], settings)


def _example_event(address: str, user: str, item: str, settings: Settings) -> None:
    "Send what a customer does, as the shop's pages would, let it land, and ask again: the answer knows."
    event = {"event_name": "add_to_cart", "user_id": user, "session_id": "demo", "item_id": item, "consent": True}
    body = {"events": [event]}
    out.print("\nwhat a customer does, sent by the shop", style="bold")
    out.print(f"curl -s -X POST '{address}/v1/events' -H 'Content-Type: application/json' -d '{json.dumps(body)}'", soft_wrap=True)
    verdict, = _get(f"{address}/v1/events", body)["events"]
    out.print(f"  {verdict['status']}: event {verdict['event_id']} is safe on the bus")
    out.print("\nit lands in the lake, and what is known of the customer changes at once", style="bold")
    out.print(f"shopai events ingest --once\nshopai features get --user {user} --view user_context", soft_wrap=True)
    from threading import Event

    _in_process(settings, True, Event(), lambda progress: None, 20_000, .05, True)
    told = _get(f"{address}/v1/recommendations", {"user_id": user, "k": 3})
    out.print(f"  asked again, the answer to the first call has the context {told['context']}: "
              f"{', '.join(str(item['title'] or item['item_id']) for item in told['items'])}", soft_wrap=True)


def _example_customer(settings: Settings) -> tuple[str, list[str]]:
    "A customer with a typical history, and the items of it."
    import numpy as np

    from shopai.core.lake import Lake
    from shopai.data.interactions import purchases

    bought = purchases(Lake.from_settings(settings).read("events", where="event_name = 'purchase'"))
    counts = np.bincount(bought.users)
    user = np.flatnonzero(counts >= np.median(counts))[0]
    return str(bought.user_ids[user]), [str(bought.item_ids[item]) for item in dict.fromkeys(bought.items[bought.users == user])]
