"""The `shopai` command: wiring between a terminal and the library. What it calls is explained in the notebooks; heavy imports happen inside the commands."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer
from rich.console import Console
from rich.table import Table

import shopai
from shopai.core.config import Settings, UsageError, get_settings
from shopai.core.manifest import BundleError

__all__ = ["app", "main"]

out, err = Console(), Console(stderr=True)
group = {"no_args_is_help": True, "rich_markup_mode": "rich"}
app = typer.Typer(**group, pretty_exceptions_enable=False, add_completion=False, help="From a shop's data to a served model. Start with [bold]shopai demo[/bold].")
data_app = typer.Typer(**group, help="Build and look at the lake.")
models_app = typer.Typer(**group, help="Look at models; promote one or go back.")
pipeline_app = typer.Typer(**group, help="Run the whole chain, as Dagster would.")
app.add_typer(data_app, name="data")
app.add_typer(models_app, name="models")
app.add_typer(pipeline_app, name="pipeline")

Profile = Annotated[str, typer.Option("--profile", "-P", help="Which params/<profile>/ to use: smoke (minutes), default (a laptop's coffee break), gpu.")]
Source = Annotated[str, typer.Option("--source", help="Adapter: online-retail, or toy (a small simulated shop).")]
DataPath = Annotated[Path | None, typer.Option("--path", help="The file that the source reads.")]
Model = Annotated[str, typer.Argument(help="Name of the model, such as recommend.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    "Run the command line: 0 done, 1 failed, 2 wrong use. A user's mistake is one line, never a traceback."
    try:
        app()
    except UsageError as error:
        err.print(f"[bold red]error:[/bold red] {error}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except (BundleError, OSError) as error:  # the model is unfit, or a place can't be reached: nothing that other words on the command line would mend
        err.print(f"[bold red]failed:[/bold red] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("stopped")
        sys.exit(130)


def _failed(message: str) -> None:
    "Say why it failed and end with exit code 1."
    err.print(f"[bold red]failed:[/bold red] {message}", highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def _table(title: str, *columns: str, rows: list[tuple] = ()) -> Table:
    "A Rich table under its title; columns that start with `#` are right-aligned numbers."
    out.print(f"\n[bold]{title}[/bold]", highlight=False, soft_wrap=True)
    table = Table()
    for column in columns: table.add_column(column.lstrip("#"), justify="right" if column.startswith("#") else "left")
    for row in rows: table.add_row(*(str(cell) for cell in row))
    return table


@app.callback(invoke_without_command=True)
def root(
    home: Annotated[Path | None, typer.Option("--home", help="Folder of lake, runs and models; default $SHOPAI_HOME, else .shopai")] = None,
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.")] = False,
) -> None:
    if home: os.environ["SHOPAI_HOME"] = str(home.absolute())
    if version:
        out.print(f"shopai {shopai.__version__}", highlight=False)
        raise typer.Exit


# --- data -------------------------------------------------------------------------------------------------------------------------------------


def _build(settings: Settings, source: str, path: Path | None, **options) -> None:
    "Read a source into the lake and print what came in and what did not."
    from shopai.core.lake import Lake
    from shopai.data.sources import load_source, write_source

    started = time.perf_counter()
    with err.status(f"reading {source}"):
        tables = load_source(source, path, **{name: value for name, value in options.items() if value is not None})
    with err.status("writing the lake"):
        report = write_source(tables, Lake.from_settings(settings))
    rows = [(f"accepted: {name}", f"{count:,}") for name, count in report["accepted"].items()]
    rows += [(f"rejected: {reason}", f"{count:,}") for reason, count in report["rejected"].items()]
    out.print(_table(f"{source}: {report['rows_in']:,} rows in, {time.perf_counter() - started:.1f} s", "rows", "#count", rows=rows))
    money = report["net_value"]
    out.print(f"net value {money['raw']} = purchases {money['purchase']} - refunds {money['refund']} + rejected; difference {money['difference']}", highlight=False)
    out.print(f"lake: {settings.lake_location}", highlight=False, soft_wrap=True)


@data_app.command("build")
def data_build(
    source: Source = "toy",
    path: DataPath = None,
    customers: Annotated[int | None, typer.Option(help="toy: number of customers")] = None,
    items: Annotated[int | None, typer.Option(help="toy: number of items")] = None,
    days: Annotated[int | None, typer.Option(help="toy: length of the history, days")] = None,
    seed: Annotated[int | None, typer.Option(help="toy: same seed, same shop")] = None,
) -> None:
    """Read a shop's data into the lake. Rows that cannot be used go to the quarantine table with a reason.

    shopai data build --source online-retail --path online_retail.parquet
    """
    _build(get_settings(), source, path, customers=customers, items=items, days=days, seed=seed)


@data_app.command("describe")
def data_describe(as_json: AsJson = False) -> None:
    "Tables of the lake, their rows and versions; events by name; quarantined rows by reason."
    from shopai.core.lake import Lake

    lake = Lake.from_settings(get_settings())
    counts = {table: lake.read(table, as_="duckdb").aggregate("count(*)").fetchall()[0][0] for table in lake.tables()}
    if not counts: raise UsageError(f"the lake {lake.location} is empty; fill it with: shopai data build")
    versions = lake.versions()
    sql = {
        "events": "select event_name, count(*) as n, count(distinct user_id), min(event_time)::date, max(event_time)::date from rows group by 1 order by n desc",
        "quarantine": "select reason, count(*) as n from rows group by 1 order by n desc",
    }
    details = {table: lake.read(table, as_="duckdb").query("rows", query).fetchall() for table, query in sql.items() if table in counts}
    if as_json:
        print(json.dumps({"tables": {table: {"rows": counts[table], "version": versions[table]} for table in counts}, **details}, default=str, indent=2))
        return
    out.print(_table(str(lake.location), "table", "#rows", "#version", rows=[(table, f"{rows:,}", versions[table]) for table, rows in counts.items()]))
    out.print(_table("events", "event", "#rows", "#customers", "first", "last", rows=details.get("events", [])))
    if "quarantine" in details: out.print(_table("quarantine", "reason", "#rows", rows=details["quarantine"]))


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
        verdict = "[green]promoted[/green]" if decision["promote"] else "[yellow]not promoted[/yellow]"
        out.print(f"{verdict}: {'; '.join(decision['reasons'])}", highlight=False, soft_wrap=True)
    out.print(f"report: {result.folder / 'notebook.html'}", highlight=False, soft_wrap=True)
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
def pipeline_run(profile: Profile = "smoke", source: Annotated[str, typer.Option("--source", help="Rebuild the lake from this source; empty: keep it if it has events.")] = "", path: DataPath = None) -> None:
    "Run data and jobs in this process, in the order of their dependencies. `dagster dev -f experiments/pipeline.py` shows the same in a browser."
    import importlib.util

    settings = get_settings()
    file = settings.project / "experiments" / "pipeline.py"
    if not file.exists(): raise UsageError(f"{file} does not exist; run in a checkout of the project, or set SHOPAI_PROJECT to it")
    spec = importlib.util.spec_from_file_location("shopai_pipeline", file)
    pipeline = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pipeline)
    steps = pipeline.run(profile=profile, source=source, path=str(path or ""))
    out.print(_table(f"pipeline · {profile}", "asset", "outcome", rows=list(steps.items())))
    if any(outcome != "done" for outcome in steps.values()): raise typer.Exit(1)


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
    if chosen is None: raise UsageError(f"{name} has no {f'version {version!r}' if version else 'champion'}; there are {', '.join(v['version'] for v in versions)}")
    print(json.dumps(chosen, default=str, indent=2))


@models_app.command("promote")
def models_promote(name: Model, version: Annotated[str, typer.Argument(help="A version or number from: shopai models list")], reason: Annotated[str, typer.Option(help="Kept with the decision.")] = "by hand") -> None:
    "Make a version the champion by hand, past the gate. The API picks it up without a restart."
    from shopai.core.tracking import Tracker

    Tracker(get_settings()).promote(name, version, reason=reason)
    out.print(f"{name} {version} is the champion", highlight=False)


@models_app.command("rollback")
def models_rollback(name: Model) -> None:
    "Go back to the champion before this one."
    from shopai.core.tracking import Tracker

    out.print(f"{name} {Tracker(get_settings()).rollback(name)} is the champion again", highlight=False)


# --- serving ----------------------------------------------------------------------------------------------------------------------------------

Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")]


@app.command()
def serve(host: Host = "127.0.0.1", port: Port = 8000, workers: Annotated[int, typer.Option(min=1, max=64, help="Processes, one inference thread each.")] = 1) -> None:
    "Serve the champion models over HTTP. The interactive documentation is at /docs."
    err.print(f"shopai serves {get_settings().store_location} at http://{host}:{port}/docs; Ctrl-C stops it", highlight=False, soft_wrap=True)
    os.execve(sys.executable, _serve_command(host, port, workers), _environment())  # noqa: S606 - becomes the server, so that signals reach it


def _serve_command(host: str, port: int, workers: int = 1) -> list[str]:
    "Serving is started as a program of its own: the library does not import what is built on it."
    return [sys.executable, "-m", "serving", "--host", host, "--port", str(port), "--workers", str(workers)]


def _environment() -> dict[str, str]:
    return {**os.environ, "SHOPAI_HOME": str(get_settings().home.absolute())}


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option("--data", help="Online Retail as Parquet, CSV or XLSX; default: a small simulated shop.")] = None,
    profile: Profile = "smoke",
    port: Port = 8000,
    stop: Annotated[bool, typer.Option("--stop", help="Stop after the example calls instead of serving on.")] = False,
) -> None:
    "The whole loop: a shop's data into the lake, train, judge, publish, serve; then three example calls."
    settings, started = get_settings(), time.perf_counter()
    if data and not data.exists(): raise UsageError(f"data: the file {data} does not exist")
    if _port_taken(port): raise UsageError(f"port {port} is in use; choose another one with --port (make demo PORT=…)")
    out.rule("1 · a shop's data into the lake")
    if data: _build(settings, "online-retail", data)
    else: _build(settings, "toy", None, customers=1_000, items=200, days=180)
    out.rule("2 · train, judge against the baselines, publish the champion")
    _run("recommend", profile, settings=settings)
    out.rule("3 · serve")
    server = subprocess.Popen(_serve_command("127.0.0.1", port), env={"SHOPAI_SERVE_LOG_LEVEL": "warning", **_environment()})  # noqa: S603 - our own interpreter and module
    try:
        _example_calls(f"http://127.0.0.1:{port}", server, settings)
        out.print(f"[bold green]ready[/bold green] after {time.perf_counter() - started:.0f} s: http://127.0.0.1:{port}/docs", highlight=False)
        if not stop:
            out.print("Ctrl-C stops it; [bold]shopai serve[/bold] starts it again.")
            server.wait()
    except KeyboardInterrupt:
        out.print("stopped")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(10)


def _port_taken(port: int) -> bool:
    import socket

    with socket.socket() as probe: return probe.connect_ex(("127.0.0.1", port)) == 0


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
        out.print(f"\n[bold]{title}[/bold]\ncurl -s{' -X POST' if body else ''} '{address}{path}'{payload}", highlight=False, soft_wrap=True)
        answer = _get(f"{address}{path}", body)
        for item in answer["items"]: out.print(f"  {item['rank']}. {item['title'] or 'no title'}  [dim]({item['item_id']}, score {item['score']:.3f})[/dim]", highlight=False)


def _example_customer(settings: Settings) -> tuple[str, list[str]]:
    "A customer with a typical history, and the items of it."
    from shopai.core.lake import Lake

    bought = Lake.from_settings(settings).read("events", columns=["user_id", "item_id"], where="event_name = 'purchase' and user_id is not null")
    sizes = bought.groupby("user_id").size()
    user = sizes[sizes >= sizes.median()].index[0]
    return user, bought.loc[bought["user_id"] == user, "item_id"].drop_duplicates().astype(str).tolist()
