"""The whole chain as Dagster assets: a shop's tables, what waits on its event bus, then the jobs that learn from them.

`dagster dev -f experiments/pipeline.py` shows it in a browser, with schedules and retries; `shopai pipeline run` runs it in process. Each job runs by plain
papermill through `shopai.core.jobs`, so a notebook behaves the same from the terminal and from here.
"""

from pathlib import Path

import dagster as dg

from shopai.core.config import UsageError, get_settings
from shopai.core.jobs import find_notebook, find_profile, run_job
from shopai.core.lake import Lake
from shopai.data.sources import build_source
from shopai.events.ingest import Overtaken, ingest_from_settings, serve_ingest
from shopai.features.live import forget_online


class ShopConfig(dg.Config):
    """Where the shop's data comes from."""

    source: str = ""  # adapter to rebuild the lake from; empty: keep the lake if it has events, else build the synthetic shop
    path: str = ""  # the file that the source reads, if it reads one
    options: dict[str, int] = {}  # of the source, such as customers; what isn't named has its default


class JobConfig(dg.Config):
    """How a job runs."""

    profile: str = "smoke"  # params/<profile>/<job>.yaml


@dg.asset(group_name="lake", description="The shop's tables in the lake; rows that cannot be used are in quarantine with their reason.")
def shop_tables(config: ShopConfig) -> dg.MaterializeResult:
    settings = get_settings()
    lake = Lake.from_settings(settings)
    if config.source or not lake.exists("events"):
        build_source(config.source or "synthetic", lake, Path(config.path) if config.path else None, settings.home.absolute() / "images",
                     **config.options)
        forget_online(settings)
    return dg.MaterializeResult(metadata={"location": str(lake.location), **{f"version of {table}": version for table, version in lake.versions().items()}})


@dg.asset(deps=[shop_tables], group_name="lake", description="What waits on the event bus has landed in the lake, too, each event exactly once.")
def live_events() -> dg.MaterializeResult:
    ingest = ingest_from_settings(get_settings())
    try: landed = serve_ingest(ingest, once=True, wait=.1)
    except Overtaken as elsewhere: return dg.MaterializeResult(metadata={"left to": str(elsewhere)})  # a service of `shopai events ingest` is at it
    finally: ingest.close()
    return dg.MaterializeResult(metadata=dict(landed.note()))


def _run(job: str, profile: str) -> dg.MaterializeResult:
    """Run a job; its report and its figures become the asset's metadata."""
    result = run_job(job, profile)
    report = dg.MetadataValue.path(str(result.folder / "notebook.html"))
    return dg.MaterializeResult(metadata={"report": report, **{name: value for name, value in result.metrics.items() if isinstance(value, (int, float))}})


@dg.asset(deps=[live_events], group_name="features", description="What the shop knows: in the lake as of any moment, and online as of now.")
def features(config: JobConfig) -> dg.MaterializeResult:
    return _run("features", config.profile)


@dg.asset(deps=[features], group_name="models", description="The recommender: fitted, judged against baselines and champion, published if it wins.")
def recommend(config: JobConfig) -> dg.MaterializeResult:
    return _run("recommend", config.profile)


nightly = dg.ScheduleDefinition(name="nightly", target=dg.AssetSelection.all(), cron_schedule="0 3 * * *",
                                description="Rebuild and retrain while the shop sleeps.")
defs = dg.Definitions(assets=[shop_tables, live_events, features, recommend], schedules=[nightly])


def run(profile: str = "smoke", source: str = "", path: str = "", **options: int) -> dict[str, str]:
    """Materialise all assets in this process, in order. Returns each asset's outcome: `done`, `failed: <reason>`, `wrong use: <reason>` or `skipped`."""
    for job in ("features", "recommend"): find_notebook(job), find_profile(job, profile)  # rather now than after the lake was built
    assets, how = [shop_tables, live_events, features, recommend], {"config": {"profile": profile}}
    ops = {"shop_tables": {"config": {"source": source, "path": path, "options": options}}, "live_events": {}, "features": how, "recommend": how}
    quiet = {"console": {"config": {"log_level": "CRITICAL"}}}  # the job shows its own progress, and a failure is in the outcome
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize(assets, run_config={"ops": ops, "loggers": quiet}, instance=instance, raise_on_error=False)
    outcome = dict.fromkeys(ops, "skipped")
    for event in result.all_events:
        if event.is_step_success: outcome[event.step_key] = "done"
        if event.is_step_failure: outcome[event.step_key] = _reason(event.step_failure_data.error)
    return outcome


def _reason(error) -> str:
    """The one line of the exception that began it; Dagster wraps it in its own."""
    while error.cause: error = error.cause
    what = "wrong use" if error.cls_name == UsageError.__name__ else "failed"
    return f"{what}: {error.message.strip().splitlines()[0].partition(': ')[2]}"
