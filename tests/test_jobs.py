"""What the notebook of `core.jobs` can't show, since each costs a kernel: kernels, runners and papermill killed, cells that raise, time-outs, a terminal."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shopai.core.artifacts import ModelStore
from shopai.core.config import Settings, UsageError, get_settings
from shopai.core.jobs import JobFailed, job_status, new_run, run_job
from shopai.core.manifest import write_manifest
from shopai.core.parameters import Parameter, check_parameters, read_parameters, read_yaml
from shopai.core.tracking import Tracker

PARAMETERS = 'run_dir: str = ""  # folder of this run\nhome: str = ""  # SHOPAI_HOME\n'
BEGIN = 'from shopai.core.jobs import begin\nrun = begin("{job}", run_dir, home, {{}}, tracked={tracked})'
FINISH = 'run.finish({"answer": 42})'


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    "A project of the test's own, without jobs."
    return get_settings(project=tmp_path / "project", home=tmp_path / "home")


def add_job(settings: Settings, job: str, *cells: str, parameters: str = "", profile: dict | None = None, tracked: bool = False) -> None:
    "Write a job whose notebook begins, executes the cells and finishes."
    sources = [PARAMETERS + parameters, BEGIN.format(job=job, tracked=tracked), *cells, FINISH]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {job}"), *map(nbformat.v4.new_code_cell, sources)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "python3", "language": "python"}
    notebook.cells[1].metadata["tags"] = ["parameters"]
    for folder in ("experiments", "params/smoke"): (settings.project / folder).mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, settings.project / "experiments" / f"10_{job}.ipynb")
    (settings.project / "params" / "smoke" / f"{job}.yaml").write_text(yaml.safe_dump(profile or {}))


def failed_run(settings: Settings, job: str) -> tuple[Path, dict]:
    "The one run of a job, which must have failed and must say so everywhere."
    [folder] = (settings.runs_dir / job).iterdir()
    status = job_status(folder)
    assert status["status"] == "failed" and status["reason"] and "\n" not in status["reason"]
    assert not (folder / "manifest.json").exists()
    return folder, status


def runner(settings: Settings, job: str) -> list[str]:
    "A command that runs a job."
    code = "import sys; from shopai.core.config import get_settings; from shopai.core.jobs import run_job; " \
           "run_job(sys.argv[1], settings=get_settings(project=sys.argv[2], home=sys.argv[3]))"
    return [sys.executable, "-c", code, job, str(settings.project), str(settings.home)]


def wait_for(condition, seconds: float = 60):
    "The first true value of a condition."
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(.1)
    return value


def is_gone(pid: int) -> bool: return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# Jobs that end well


def test_a_job_gets_what_it_was_given(settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    monkeypatch.chdir(settings.home.parent)
    settings = get_settings(project="project", home="home")  # relative places hold although the notebook runs elsewhere
    add_job(settings, "typed", "import json, os\nprint(json.dumps([rate, item, until, sizes, os.getcwd(), os.environ['SHOPAI_HOME'], home]))", tracked=True,
            parameters='rate: float = 1.0  # rate\nitem: str = ""  # item\nuntil: str = ""  # until\nsizes: list[int] = []  # sizes\n',
            profile={"rate": "1e-4", "item": "tea"})
    (settings.project / "params" / "smoke" / "typed.yaml").write_text("rate: 1e-4\nitem: tea\nuntil: 2011-12-10\n")
    result = run_job("typed", parameters={"item": "85123", "sizes": "[1, 2]"}, settings=settings)
    home, project = str(settings.home.absolute()), str(settings.project.absolute())
    log = (result.folder / "log.txt").read_text()
    assert json.loads(re.search(r"^\[.*\]$", log, re.MULTILINE)[0]) == [1e-4, "85123", "2011-12-10", [1, 2], project, home, home]

    assert (result.status, result.metrics, job_status(result.folder)["status"]) == ("done", {"answer": 42.}, "done")
    assert result.manifest | {"profile": "smoke", "notebook": "experiments/10_typed.ipynb", "run_id": result.folder.name} == result.manifest
    assert "85123" in (result.folder / "notebook.html").read_text()
    tracker = Tracker(settings)
    run = tracker.client.get_run(tracker._find(result.run_id))
    assert (run.info.status, run.data.metrics, run.data.tags["shopai.folder"]) == ("FINISHED", {"answer": 42.}, str(result.folder))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0] == f"typed {result.run_id}: 6 cells" and re.fullmatch(rf"typed {result.run_id}: executed in \d+ s", lines[1])


def test_plain_papermill_does_the_same_work(settings: Settings):
    add_job(settings, "plain")
    command = [sys.executable, "-m", "papermill", "experiments/10_plain.ipynb", "out.ipynb", "-p", "home", str(settings.home), "--no-progress-bar"]
    subprocess.run(command, cwd=settings.project, check=True, capture_output=True, timeout=120)
    [folder] = (settings.runs_dir / "plain").iterdir()
    assert job_status(folder)["status"] == "done"
    assert json.loads((folder / "manifest.json").read_text())["notebook"] == "experiments/10_plain.ipynb"
    assert json.loads((folder / "metrics.json").read_text()) == {"answer": 42.}


def test_progress_on_a_terminal(settings: Settings):
    add_job(settings, "shown", "import time; time.sleep(1)")
    primary, secondary = pty.openpty()
    terminal = {"stdin": secondary, "stdout": secondary, "stderr": secondary, "env": {**os.environ, "TERM": "xterm", "COLUMNS": "120"}}
    process = subprocess.Popen(runner(settings, "shown"), **terminal)
    os.close(secondary)
    shown = b""
    try:
        while piece := os.read(primary, 4096): shown += piece
    except OSError: pass  # how Linux says that the other end is closed
    finally: os.close(primary)
    assert process.wait(60) == 0
    cells = [int(number) for number in re.findall(rb"cell (\d+) of 6", shown)]
    assert cells == sorted(cells) and cells[-1] >= 4 and b"6 cells" not in shown


def test_a_process_left_behind_holds_nobody_up(settings: Settings):
    add_job(settings, "messy", "import subprocess\nprint('pid', subprocess.Popen(['sleep', '300'], start_new_session=True).pid)")
    start = time.monotonic()
    result = run_job("messy", settings=settings, show=False)
    os.kill(int(re.search(r"pid (\d+)", (result.folder / "log.txt").read_text())[1]), signal.SIGKILL)
    assert time.monotonic() - start < 120


def test_folders_are_never_shared(settings: Settings):
    with ThreadPoolExecutor(8) as pool: folders = list(pool.map(lambda _: new_run("best", settings), range(64)))
    assert len(set(folders)) == 64


# Jobs that don't


def test_a_killed_kernel(settings: Settings, tmp_path: Path):
    "Marked as failed everywhere, nothing promoted, the old champion still there."
    for version in ("1.0", "2.0"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "weights.json").write_text(version)
        write_manifest(tmp_path / version, name="recommend", kind="ease", version=version)
    tracker = Tracker(settings)
    tracker.register(tmp_path / "1.0", "recommend")
    tracker.promote("recommend", "1.0")
    add_job(settings, "sleepy", f"number = run.tracker.register({str(tmp_path / '2.0')!r}, 'recommend', run.tracked)\nprint('still here')",
            "import os\nos.kill(os.getpid(), 9)", "run.tracker.promote('recommend', number)", tracked=True)
    with pytest.raises(JobFailed) as caught: run_job("sleepy", settings=settings, show=False)
    folder, status = failed_run(settings, "sleepy")
    assert status["reason"] == "the kernel died in cell 6 (killed, or out of memory)"
    assert str(caught.value) == f"sleepy failed: {status['reason']}; see {folder / 'notebook.html'}"
    assert "still here" in (folder / "notebook.html").read_text()
    run = tracker.client.get_run(tracker._find(folder.name))
    assert (run.info.status, run.data.tags["shopai.reason"]) == ("FAILED", status["reason"])
    assert ModelStore(settings.store_location).champion("recommend")["version"] == "1.0"
    assert str(tracker.client.get_model_version_by_alias("recommend", "champion").version) == "1"


@pytest.mark.parametrize(("cell", "reason"), [
    ("raise ValueError('no such shop:\\n  none')", "ValueError: no such shop: none"),
    ("import os, time; os.kill(os.getppid(), 9); time.sleep(60)", "papermill ended with code -9"),
    ("import sys; sys.exit()", "the notebook ended without a manifest"),
    ("run.finish = lambda metrics: None", "the notebook ended without a manifest"),
], ids=["a cell raises", "papermill is killed", "the notebook leaves early", "nothing finishes it"])
def test_a_job_that_ends_badly(settings: Settings, cell: str, reason: str):
    add_job(settings, "bad", "import os; print('kernel', os.getpid())", cell)
    with pytest.raises(JobFailed, match=re.escape(reason)) as caught: run_job("bad", settings=settings, show=False)
    folder, status = failed_run(settings, "bad")
    assert status["reason"] in str(caught.value) and "\n" not in str(caught.value)
    assert (folder / "notebook.html").stat().st_size > 1000
    if "-9" in reason: wait_for(lambda: is_gone(int(re.search(r"kernel (\d+)", (folder / "log.txt").read_text())[1])), 30)


def test_what_only_the_notebook_can_see_is_still_a_usage_error(settings: Settings):
    check = "from pydantic import Field, create_model\nfrom shopai.core.parameters import validate_parameters\n" \
            "validate_parameters(create_model('P', share=(float, Field(ge=0, le=1))), {'share': share})"
    add_job(settings, "checked", check, parameters="share: float = 0.5  # share\n")
    with pytest.raises(UsageError) as caught: run_job("checked", parameters={"share": 1.5}, settings=settings, show=False)
    assert str(caught.value) == "share must be a number from 0 to 1, got 1.5" == failed_run(settings, "checked")[1]["reason"].removeprefix("UsageError: ")


def test_a_job_that_takes_too_long(settings: Settings):
    add_job(settings, "slow", "import os, time\nprint('kernel', os.getpid())\ntime.sleep(300)")
    with pytest.raises(JobFailed, match="slow failed: stopped in cell 5, because it took longer than 15 s"):
        run_job("slow", settings=settings, timeout=15, show=False)
    folder, _ = failed_run(settings, "slow")
    assert is_gone(int(re.search(r"kernel (\d+)", (folder / "log.txt").read_text())[1]))
    assert "kernel" in (folder / "notebook.html").read_text()


def test_a_failed_run_keeps_its_reason_when_mlflow_is_out_of_reach(settings: Settings):
    add_job(settings, "alone", "raise ValueError('no such shop')")
    settings = settings.model_copy(update={"tracking_uri": "http://127.0.0.1:9"})
    with pytest.raises(JobFailed, match="ValueError: no such shop"): run_job("alone", settings=settings, show=False)
    assert "could not be marked as failed: SHOPAI_TRACKING_URI: cannot open http://127.0.0.1:9" in (failed_run(settings, "alone")[0] / "log.txt").read_text()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "Ctrl-C"])
def test_a_runner_that_is_ended(settings: Settings, how: signal.Signals):
    "No kernel lives on to finish a run that everybody believes dead."
    add_job(settings, "orphan", "import os, time\nprint('kernel', os.getpid())\ntime.sleep(300)")
    process = subprocess.Popen(runner(settings, "orphan"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # a job in the background inherits deaf ears
    log = wait_for(lambda: next((settings.runs_dir / "orphan").glob("*/log.txt"), None))
    kernel = int(wait_for(lambda: re.search(r"kernel (\d+)", log.read_text()))[1])
    assert (job_status(log.parent)["status"], is_gone(kernel)) == ("running", False)
    process.send_signal(how)
    process.wait(60)
    assert failed_run(settings, "orphan")[1]["reason"] == {signal.SIGKILL: "the runner died", signal.SIGINT: "interrupted"}[how]
    wait_for(lambda: is_gone(kernel), 30)
    assert (log.parent / "notebook.html").exists() == (how == signal.SIGINT)


# Mistakes that are seen before a kernel is started


@pytest.mark.parametrize(("changes", "message"), [
    ({"job": "wosrt"}, "job: there is no 'wosrt'; known are best"),
    ({"profile": "huge"}, "profile: there is no params/huge/best.yaml; profiles of best are smoke"),
    ({"parameters": {"tpo": 1}}, "unknown parameter 'tpo'; known are top"),
    ({"parameters": {"top": "many"}}, "top must be int, got 'many'"),
    ({"parameters": {"api_key": "x"}}, "api_key looks like a secret"),
    ({"parameters": {"run_dir": "/elsewhere"}}, "run_dir is given by the runner"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_a_mistake_is_seen_at_once(settings: Settings, changes: dict, message: str):
    add_job(settings, "best", parameters="top: int = 3  # top\n")
    with pytest.raises(UsageError, match=re.escape(message)): run_job(**{"job": "best", "settings": settings, **changes})
    assert not settings.home.exists()


@pytest.mark.parametrize(("profile", "message"), [
    ("- 1\n- 2\n", "must hold `name: value` lines"), ("top: [1\n", "best.yaml: while parsing"), ("tpo: 3\n", "unknown parameter 'tpo'"),
])
def test_a_profile_that_is_wrong_is_named(settings: Settings, profile: str, message: str):
    add_job(settings, "best", parameters="top: int = 3  # top\n")
    (settings.project / "params" / "smoke" / "best.yaml").write_text(profile)
    with pytest.raises(UsageError, match=re.escape(message)): run_job("best", settings=settings)


def test_a_folder_that_is_no_project(tmp_path: Path):
    with pytest.raises(UsageError, match="change to a checkout of the project, or set SHOPAI_PROJECT"):
        run_job("best", settings=get_settings(project=tmp_path, home=tmp_path / "home"))


def test_a_notebook_without_run_dir(settings: Settings):
    add_job(settings, "best")
    path = settings.project / "experiments" / "10_best.ipynb"
    path.write_text(path.read_text().replace("run_dir: str", "folder: str"))
    with pytest.raises(UsageError, match="has no parameter run_dir"): run_job("best", settings=settings)


# Parameters


def test_parameters_agree_with_papermill(settings: Settings):
    from papermill import inspect_notebook

    add_job(settings, "best", parameters='top: int = 3  # top\nname: str = "a # b"  # name\nrates: list[float] = [0.1, 1.0]  # rates\nfree = 1.5\n'
                                         "share: float | None = None  # share\n")
    path = settings.project / "experiments" / "10_best.ipynb"
    ours, theirs = read_parameters(path), inspect_notebook(path)
    assert set(ours) - set(theirs) == {"share"}, "papermill has learned about unions: the remark in the notebook is out of date"
    assert {name: ours[name].type for name in ("top", "name", "rates")} == {name: theirs[name]["inferred_type_name"] for name in ("top", "name", "rates")}
    assert ours["free"] == Parameter("", 1.5)


@given(value=st.floats(allow_nan=False, allow_infinity=False), style=st.sampled_from(["{!r}", "{:e}", "{:.0e}", "{:E}"]))
def test_a_number_is_a_number_however_it_is_written(value: float, style: str):
    text = style.format(value)
    assert check_parameters({"x": text}, {"x": Parameter("float")}) == {"x": float(text)}
    profile = read_yaml(f"x: {text}")  # and from a profile, where YAML 1.1 may have made text of it
    assert check_parameters(profile, {"x": Parameter("float")}) == {"x": float(text)}


@given(value=st.text())
def test_text_stays_text(value: str):
    assert check_parameters({"x": value}, {"x": Parameter("str")}) == {"x": value}


PLAIN = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), lambda inner: st.lists(inner, max_size=3))


@given(value=PLAIN, kind=st.sampled_from(["int", "float", "bool", "str", "list[int]", "int | None"]))
def test_what_passes_has_the_declared_type(value, kind):
    types = {"int": int, "float": float, "bool": bool, "str": str, "list[int]": list, "int | None": int | None}
    try: got = check_parameters({"x": value}, {"x": Parameter(kind)})["x"]
    except UsageError as error: assert str(error).startswith("x must be ")
    else: assert isinstance(got, types[kind]) and (kind == "bool" or not isinstance(got, bool))
