"What the tests of the command line share: the `shopai` command in a process of its own, and homes to run it in."

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import shopai.cli as cli

ROOT = Path(__file__).resolve().parents[1]
SHOPAI = Path(sys.executable).with_name("shopai")
SMALL = ("--customers", "300", "--items", "200", "--days", "150", "--no-pictures")  # a simulated shop that is quick to make and to learn from
TINY = ("--customers", "40", "--items", "40", "--days", "21", "--no-pictures")


def environment(home: Path, **variables) -> dict[str, str]:
    "This process's variables with a home. Wide, so that tables aren't broken."
    return {**os.environ, "SHOPAI_HOME": str(home), "COLUMNS": "200", **variables}


def shopai(home: Path, *arguments, cwd: Path = ROOT, timeout: float = 300, **variables) -> subprocess.CompletedProcess:
    "Run the command to its end."
    command = [SHOPAI, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(home, **variables), capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)


def done(home: Path, *arguments, **options) -> str:
    "Run a command that must end well; its stdout."
    result = shopai(home, *arguments, **options)
    assert result.returncode == 0, f"{arguments}: {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def complaint(home: Path, code: int, *arguments, **options) -> str:
    "Run a command that must end with this code, and with one line that says why: that line."
    result = shopai(home, *arguments, **options)
    assert result.returncode == code, f"{arguments}: {result.returncode}\n{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr + result.stdout
    *progress, line = result.stderr.splitlines()
    assert all(before.startswith(("recommend 2", "features 2", "shopai serves")) for before in progress), result.stderr  # a job's progress is told there, too
    kind, _, message = line.partition(": ")
    assert kind == {1: "failed", 2: "error"}[code], line
    return message


def called(monkeypatch, capsys, *arguments, **variables) -> tuple[int, str, str]:
    "The command in this process, which is quicker: exit code, stdout, stderr."
    for name, value in variables.items(): monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(sys, "argv", ["shopai", *map(str, arguments)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended: cli.main()
    finally: signal.signal(signal.SIGTERM, before)
    told = capsys.readouterr()
    return ended.value.code or 0, told.out, told.err


def runs(home: Path, job: str = "recommend") -> list[Path]:
    "Folders of a job's runs, oldest first."
    return sorted((home / "runs" / job).glob("*"), key=lambda folder: json.loads((folder / "status.json").read_text())["started"])


def read(path: Path): return json.loads(path.read_text(encoding="utf-8"))


def champion(home: Path) -> dict | None:
    path = home / "models" / "recommend" / "champion.json"
    return read(path) if path.exists() else None


def copied(home: Path, to: Path, *parts: str) -> Path:
    "A copy of a home, or of some folders of it."
    for part in parts or ("",): shutil.copytree(home / part, to / part, dirs_exist_ok=True)
    return to
