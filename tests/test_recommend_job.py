"The training job end to end, by the command that people use: what a run leaves behind, who is published and why, and what happens when it is killed."

import csv
import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml
from shop_command import ROOT, SHOPAI, SMALL, champion, complaint, copied, done, environment, read, runs
from shop_server import flip, running

from shopai.core.config import get_settings
from shopai.core.jobs import job_status
from shopai.core.manifest import verify
from shopai.core.tracking import Tracker
from shopai.data.shop_lake import SHOP_TABLES
from shopai.recommend.bundle import Recommender

ASK = "/v1/recommendations"
NOTEBOOK = ROOT / "experiments" / "20_recommend.ipynb"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    "A home with a small simulated shop and a first champion. Tests copy it."
    home = tmp_path_factory.mktemp("trained")
    done(home, "data", "build", *SMALL)
    (home / "shown").write_text(done(home, "run", "recommend"))
    return home


@pytest.fixture(scope="module")
def twice(trained: Path, tmp_path_factory) -> Path:
    "The same after a second, identical run."
    home = copied(trained, tmp_path_factory.mktemp("twice"))
    (home / "shown").write_text(done(home, "run", "recommend"))
    return home


def alias(home: Path) -> str:
    "The bundle's version that MLflow's alias `champion` points to."
    tracker = Tracker(get_settings(home=home))
    return tracker.client.get_model_version_by_alias("recommend", "champion").tags["shopai.version"]


def registered(home: Path) -> list[dict]: return Tracker(get_settings(home=home)).versions("recommend")


def leaderboard_cell() -> int:
    "The number that papermill gives it: counted from 1, behind the cell with the parameters that it adds."
    cells = ["".join(cell["source"]) for cell in read(NOTEBOOK)["cells"]]
    return next(place for place, source in enumerate(cells) if "figures = leaderboard(" in source) + 2


# --- what a run leaves behind ---


def test_a_run_leaves_everything_behind(trained: Path):
    [folder] = runs(trained)
    assert {path.name for path in folder.iterdir()} == {"params.yaml", "status.json", "log.txt", "notebook.ipynb", "notebook.html", "leaderboard.csv",
                                                        "metrics.json", "answers.json", "gate.json", "bundle", "manifest.json"}
    assert job_status(folder)["status"] == "done"
    given, profile = (yaml.safe_load(path.read_text()) for path in (folder / "params.yaml", ROOT / "params" / "smoke" / "recommend.yaml"))
    assert given == {**profile, "run_dir": str(folder), "home": str(trained)}
    executed = read(folder / "notebook.ipynb")
    assert all(cell["execution_count"] for cell in executed["cells"] if cell["cell_type"] == "code")
    page = (folder / "notebook.html").read_text()
    assert "Train a recommender" in page and "data:image/png;base64" in page.replace("\n", "")

    manifest, metrics = read(folder / "manifest.json"), read(folder / "metrics.json")
    assert (manifest["run_id"], manifest["outcome"], manifest["profile"]) == (folder.name, "promoted", "smoke")
    assert manifest["metrics"] == metrics and manifest["lake_versions"] == dict.fromkeys(SHOP_TABLES, 1)
    shown = (trained / "shown").read_text()
    assert f"{metrics['ndcg@10']:.4f}" in shown and "promoted: " in shown and str(folder / "notebook.html") in shown

    answers = read(folder / "answers.json")
    assert len(answers) >= 20 and all(len(answer["items"]) == 10 and answer["fallback"] is None for answer in answers.values())


def test_the_figures_are_the_candidates_row_of_the_leaderboard(trained: Path):
    "The bundle, read back and judged by what serves it, has the figure that the leaderboard gives the model that validation prefers."
    [folder] = runs(trained)
    manifest, metrics = read(folder / "manifest.json"), read(folder / "metrics.json")
    rows = list(csv.DictReader((folder / "leaderboard.csv").open()))
    profile = yaml.safe_load((folder / "params.yaml").read_text())
    assert {(row["split"], row["model"]) for row in rows} == {(split, model) for split in profile["splits"] for model in profile["models"]}
    part = {name: {row["model"]: row for row in rows if (row["split"], row["part"]) == ("temporal", name)} for name in ("validation", "test")}
    assert manifest["model"] == max(part["validation"], key=lambda model: float(part["validation"][model]["ndcg@10"]))
    for name, value in metrics.items(): assert float(part["test"][manifest["model"]][name]) == pytest.approx(value, abs=1e-6), name
    assert metrics["ndcg@10"] > float(part["test"]["popularity"]["ndcg@10"])  # the shop has tastes to be learnt
    assert read(folder / "bundle" / "manifest.json")["metrics"] == metrics


def test_the_champion_is_published(trained: Path):
    [folder] = runs(trained)
    decision, [entry] = read(folder / "gate.json"), registered(trained)
    assert decision["promote"] and decision["champion"] is None and "there is no champion to compare with" in decision["reasons"][0]
    assert (entry["version"], entry["champion"], entry["gate"], entry["reasons"]) == (folder.name, True, "promote", decision["reasons"][0])
    assert champion(trained)["version"] == folder.name == alias(trained)
    assert champion(trained)["reason"] == decision["reasons"][0]
    published = verify(trained / "models" / "recommend" / folder.name)
    assert published.files == verify(folder / "bundle").files and published.fitted_until < published.data_until
    assert json.loads(done(trained, "models", "list", "--json")) == [entry] == [json.loads(done(trained, "models", "show"))]
    assert "promoted" in (folder / "log.txt").read_text() and folder.name in done(trained, "models", "list")

    tracker = Tracker(get_settings(home=trained))
    run = tracker.client.get_run(tracker._find(folder.name))
    assert run.info.status == "FINISHED" and run.data.metrics["ndcg_at_10"] == pytest.approx(decision["candidate"]["ndcg@10"])


# --- who is published ---


def test_an_equal_run_is_not_promoted(trained: Path, twice: Path):
    first, second = runs(twice)
    decision = read(second / "gate.json")
    assert decision["promote"] is False and decision["candidate"] == decision["champion"] == read(first / "metrics.json")
    assert "does not beat the champion's" in decision["reasons"][0] and decision["reasons"][0] in (twice / "shown").read_text()
    new, old = registered(twice)
    assert (new["version"], new["champion"], new["gate"], new["reasons"]) == (second.name, False, "refuse", decision["reasons"][0])
    assert (old["champion"], champion(twice)) == (True, champion(trained))
    assert read(second / "manifest.json")["outcome"] == "refused" and read(second / "manifest.json")["remark"] == f"champion {first.name}"


def test_the_same_seed_gives_the_same_bytes(twice: Path):
    first, second = runs(twice)
    assert read(first / "bundle" / "manifest.json")["files"] == read(second / "bundle" / "manifest.json")["files"]
    for name in ("metrics.json", "answers.json"): assert (first / name).read_bytes() == (second / name).read_bytes()


def test_promote_false_only_says_what_it_would_do(trained: Path, tmp_path: Path):
    home = copied(trained, tmp_path / "home", "lake")
    shown = done(home, "run", "recommend", "-p", "promote=false", "-p", "k=5", "-p", "splits=[temporal]")
    [folder] = runs(home)
    assert champion(home) is None and read(folder / "manifest.json")["outcome"] == "would be promoted" and "would be promoted: ndcg@5 " in shown
    assert read(folder / "gate.json")["promote"] is True and "ndcg@5" in read(folder / "metrics.json")
    [entry] = registered(home)
    assert (entry["champion"], entry["gate"]) == (False, "promote")
    assert f"recommend has no champion; there are {folder.name} (1)" in complaint(home, 2, "models", "show")


def test_a_limit_refuses_with_its_reason(trained: Path, tmp_path: Path):
    home = copied(trained, tmp_path / "home")
    shown = done(home, "run", "recommend", "-p", "min_ndcg=.99", "-p", "splits=[temporal]", "-p", "models=[popularity]")
    _, folder = runs(home)
    limit, comparison = read(folder / "gate.json")["reasons"]
    assert re.fullmatch(r"ndcg@10 \.\d{4} is under the limit \.9900", limit) and "does not beat the champion's" in comparison
    assert f"refused: {limit}; {comparison}" in shown and registered(home)[0]["reasons"] == f"{limit}; {comparison}"
    assert champion(home) == champion(trained)


def test_plain_papermill_does_the_same_work(trained: Path, tmp_path: Path):
    home = copied(trained, tmp_path / "home", "lake")
    command = [sys.executable, "-m", "papermill", NOTEBOOK, tmp_path / "out.ipynb", "-f", ROOT / "params" / "smoke" / "recommend.yaml", "--no-progress-bar"]
    subprocess.run(command, cwd=ROOT, env=environment(home), check=True, capture_output=True, timeout=120)
    [folder], [by_command] = runs(home), runs(trained)
    assert job_status(folder)["status"] == "done" and champion(home)["version"] == folder.name == alias(home)
    for name in ("metrics.json", "answers.json"): assert (folder / name).read_bytes() == (by_command / name).read_bytes()
    assert verify(folder / "bundle").files == verify(by_command / "bundle").files
    assert not list((ROOT / "experiments").glob("out*"))


# --- by hand, and in front of customers ---


def test_promote_and_rollback_move_store_alias_and_api_together(twice: Path, tmp_path: Path):
    home, (first, second) = copied(twice, tmp_path / "home"), runs(twice)
    with running(home, tmp_path / "log") as server:
        server.wait_ready()

        def everybody_says(version: str):
            server.wait(lambda: server.ask("/readyz")[1]["model_version"] == version)
            assert champion(home)["version"] == alias(home) == version == next(entry["version"] for entry in registered(home) if entry["champion"])

        everybody_says(first.name)
        assert f"recommend {second.name} is the champion" in done(home, "models", "promote", "recommend", "2", "--reason", "[trial]")
        everybody_says(second.name)
        assert champion(home)["reason"] == "[trial]"
        assert f"recommend {first.name} is the champion again" in done(home, "models", "rollback", "recommend")
        everybody_says(first.name)
        assert "no earlier champion" in complaint(home, 2, "models", "rollback", "recommend")
        assert f"registered are {second.name} (2), {first.name} (1)" in complaint(home, 2, "models", "promote", "recommend", "3")
        assert "has no version '3'" in complaint(home, 2, "models", "show", "--version", "3")
        everybody_says(first.name)


def test_a_damaged_champion_is_refused_and_replaced(trained: Path, tmp_path: Path):
    "The API names the file, commands end with one line, and the next run says why there was nothing to compare with."
    home = copied(trained, tmp_path / "home")
    [first] = runs(home)
    flip(home / "models" / "recommend" / first.name / "model" / "arrays.npz")
    with running(home, tmp_path / "log") as server:
        server.wait(lambda: "model/arrays.npz" in server.ask("/readyz")[1].get("detail", ""))
        assert server.ask("/readyz")[0] == server.ask(ASK, {"user_id": "anyone"})[0] == 503
        assert "model/arrays.npz" in complaint(home, 1, "models", "promote", "recommend", first.name)
        shown = done(home, "run", "recommend")
        _, second = runs(home)
        remark = read(second / "manifest.json")["remark"]
        assert remark.startswith(f"the champion {first.name} can't be compared: ") and "model/arrays.npz" in remark
        assert "promoted: " in shown and champion(home)["version"] == second.name and read(second / "gate.json")["champion"] is None
        server.wait_ready()
        assert server.ask("/readyz")[1]["model_version"] == second.name
        assert "model/arrays.npz" in complaint(home, 1, "models", "rollback", "recommend")  # no way back to it
        assert champion(home)["version"] == second.name == alias(home)


# --- killed ---


class Job:
    "A run of the job in the background."

    def __init__(self, home: Path, *arguments: str):
        before = set(runs(home))
        self.process = subprocess.Popen([SHOPAI, "run", "recommend", *arguments], cwd=ROOT, env=environment(home), stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True)
        self.folder = self.wait(lambda: next(iter(set((home / "runs" / "recommend").glob("*")) - before), None))

    def wait(self, condition, seconds: float = 60):
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end and self.process.poll() is None, "waited in vain"
            time.sleep(.005)
        return value

    def reaches(self, text: str):
        log = self.folder / "log.txt"
        self.wait(lambda: log.exists() and text in log.read_text())

    def kernel(self) -> psutil.Process:
        return next(child for child in psutil.Process(self.process.pid).children(recursive=True) if "ipykernel_launcher" in " ".join(child.cmdline()))

    def ends(self, code: int) -> str:
        output, complaints = self.process.communicate(timeout=60)
        assert self.process.returncode == code and "Traceback" not in complaints, complaints
        return complaints.splitlines()[-1]


@pytest.fixture
def job(trained: Path, tmp_path: Path):
    "A run over a home with a champion, and the home."
    home = copied(trained, tmp_path / "home")
    done(home, "data", "build")  # a larger shop, so that there is time
    job = Job(home)
    yield home, job
    for process in (psutil.Process(job.process.pid).children(recursive=True) if job.process.poll() is None else []): process.kill()
    job.process.kill()
    job.process.communicate()


def assert_failed(home: Path, folder: Path, reason: str) -> None:
    "Marked as failed everywhere, and nothing came of it."
    status = job_status(folder)
    assert status["status"] == "failed" and re.fullmatch(reason, status["reason"]), status
    assert not (folder / "manifest.json").exists() and not (folder / "bundle").exists() and "Train a recommender" in (folder / "notebook.html").read_text()
    tracker = Tracker(get_settings(home=home))
    run = tracker.client.get_run(tracker._find(folder.name))
    assert (run.info.status, run.data.tags["shopai.reason"]) == ("FAILED", status["reason"])
    assert [entry["champion"] for entry in registered(home)] == [True]  # the old one, and it alone


def test_a_killed_kernel_changes_nothing_for_customers(trained: Path, job, tmp_path: Path):
    home, job = job
    before, [version] = champion(trained), runs(trained)
    user = next(iter(read(version / "answers.json")))
    with running(home, tmp_path / "log") as server:
        server.wait_ready()
        answers, stop = [], threading.Event()

        def ask():
            while not stop.wait(.02): answers.append(server.ask(ASK, {"user_id": user}))

        customer = threading.Thread(target=ask)
        customer.start()
        try:
            job.reaches(f"Executing Cell {leaderboard_cell()}-")
            job.kernel().send_signal(signal.SIGKILL)
            line = job.ends(1)
        finally:
            stop.set()
            customer.join()
        assert len(answers) > 20 and {(status, answer["model_version"]) for status, answer in answers} == {(200, version.name)}
        assert all(answer["items"] == read(version / "answers.json")[user]["items"] for _, answer in answers)
        assert server.ask("/readyz") == (200, {"status": "ready", "model_version": version.name, "refused": None})
    reason = rf"the kernel died in cell {leaderboard_cell()} \(killed, or out of memory\)"
    assert re.fullmatch(f"failed: recommend failed: {reason}; see {job.folder}/notebook.html", line), line
    assert_failed(home, job.folder, reason)
    assert champion(home) == before and alias(home) == version.name
    assert Recommender.load(home / "models" / "recommend" / version.name).version == version.name


def test_a_job_that_is_asked_to_end_takes_its_kernel_along(job):
    "SIGTERM is what a supervisor or a shutdown sends."
    home, job = job
    job.reaches(f"Executing Cell {leaderboard_cell() - 4}-")
    kernel = job.kernel()
    job.process.send_signal(signal.SIGTERM)
    job.ends(130)
    assert_failed(home, job.folder, "interrupted")
    assert not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE
