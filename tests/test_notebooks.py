"""Every notebook runs, alone, in seconds.

One process a notebook: no state leaks from one to the next, a dead kernel names its notebook, and a hanging one is ended. It runs on a copy of the folder, so a
file left behind is seen. Experiments are run by the tests of the jobs.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

NOTEBOOKS = sorted(path.relative_to(ROOT) for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
SECONDS = 120  # ten are allowed on a quiet machine


def run_alone(notebook: Path, project: Path, temporary: Path) -> tuple[int, str]:
    "Run the notebook, a path relative to the project, by nbdev_test; gives the exit code and what was printed."
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary), "SHOPAI_PROJECT": str(project), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [Path(sys.executable).with_name("nbdev_test"), "--path", notebook, "--n_workers", "0"]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=project, env=environment, start_new_session=True, **streams)
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return 124, f"{output}\n{notebook} ran for more than {SECONDS} s"
    return process.returncode, output


def copy_for(notebook: Path, target: Path) -> Path:
    "A project folder that holds this one notebook; everything else that a notebook may read is a link."
    (target / notebook).parent.mkdir(parents=True)
    shutil.copy(ROOT / notebook, target / notebook)
    shutil.copy(ROOT / "settings.ini", target)
    for name in ("shopai", "experiments", "params", "docs", "benchmarks"):
        if (ROOT / name).exists(): (target / name).symlink_to(ROOT / name)
    return target


def files_in(project: Path) -> set[str]:
    return {path.relative_to(project).as_posix() for path in project.rglob("*") if path.is_file() and ".ipynb_checkpoints" not in path.parts}


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 3


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=str)
def test_notebook_runs(notebook: Path, tmp_path: Path):
    project = copy_for(notebook, tmp_path / "project")
    before = files_in(project)
    code, output = run_alone(notebook, project, tmp_path / "tmp")
    assert code == 0, output
    assert files_in(project) == before, "the notebook leaves files beside itself; write to a temporary folder"


@pytest.mark.parametrize(("cell", "complaint"), [
    ("assert 1 == 2", "AssertionError"),
    ("import os; os._exit(3)", None),
    ("import time; time.sleep(60)", "ran for more than 5 s"),
    ("from pathlib import Path; Path('left_behind.txt').write_text('x')", "left_behind"),
])
def test_a_bad_notebook_is_seen(cell: str, complaint: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import nbformat

    monkeypatch.setitem(globals(), "SECONDS", 5)
    notebook, project = Path("nbs/bad.ipynb"), tmp_path / "project"
    (project / "nbs").mkdir(parents=True)
    shutil.copy(ROOT / "settings.ini", project)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)]), project / notebook)
    before = files_in(project)
    code, output = run_alone(notebook, project, tmp_path / "tmp")
    if complaint == "left_behind": assert files_in(project) - before == {"nbs/left_behind.txt"}
    else: assert code != 0 and (complaint is None or complaint in output)
