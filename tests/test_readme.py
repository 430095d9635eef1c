"The README promises figures and code: both must be what the notebook gives today."

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CELLS = json.loads((ROOT / "nbs" / "index.ipynb").read_text())["cells"]
README = (ROOT / "README.md").read_text()


def source(cell: dict) -> str: return "".join(cell["source"])


def table_cell() -> dict: return next(cell for cell in CELLS if "benchmarks/results" in source(cell) and cell["cell_type"] == "code")


def table_of(results: Path, monkeypatch, tmp_path) -> str:
    "The table that the notebook's cell makes of the figures in a folder."
    (tmp_path / "nbs").mkdir(parents=True)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "results").symlink_to(results)
    monkeypatch.chdir(tmp_path / "nbs")
    *lines, last = source(table_cell()).splitlines()
    scope: dict = {}
    exec("\n".join(lines), scope)  # noqa: S102 - a cell of our own notebook
    return eval(last, scope).data  # noqa: S307


def test_the_table_shows_the_measured_figures(monkeypatch, tmp_path):
    today = table_of(ROOT / "benchmarks" / "results", monkeypatch, tmp_path)
    assert today in README
    assert len(re.findall(r"\.\d{4}", today)) >= 8


def test_a_changed_figure_is_noticed(monkeypatch, tmp_path):
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        content = json.loads(path.read_text())
        if path.stem == "recommend": content["served"]["ndcg@10"] += .001
        (changed / path.name).write_text(json.dumps(content))
    assert table_of(changed, monkeypatch, tmp_path / "elsewhere") not in README


@pytest.mark.parametrize("command", re.findall(r"`(python benchmarks/[^`]+)`", README) or ["none"])
def test_the_commands_exist(command):
    script = ROOT / command.split()[1]
    assert script.is_file(), f"README names {command}"


def test_the_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z]+)", README))
    assert named and named <= targets


def test_the_served_model_is_not_worse_than_the_best_baseline():
    "The promise of the gate, on the figures that the README shows: the served bundle against every model's mean."
    figures = json.loads((ROOT / "benchmarks" / "results" / "recommend.json").read_text())
    board = figures["leaderboard"]["temporal"]
    best = max((values["ndcg@10"]["mean"], name) for name, values in board["validation"].items())[1]
    assert figures["served"]["model"] == best, "the model that validation prefers is served"
    assert figures["served"]["ndcg@10"] >= .0980 - .002, "EASE of the protocol"
