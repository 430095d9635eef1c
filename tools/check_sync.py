"""Is the package exactly what the notebooks export? Usage: python tools/check_sync.py

Everything in shopai/ that a notebook should write is removed from a copy, exported afresh and compared byte for byte. That finds a module edited by hand, a
module whose notebook is gone, a notebook not exported, and a notebook not cleaned; `nbdev_export` over the old files would hide the first two.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BY_HAND = {"shopai/cli.py"}  # wiring that has no idea to explain
KEPT = BY_HAND | {"shopai/__init__.py"}  # nbdev only renews the version in the latter, so its text is checked by itself
NOTEBOOKS = ("nbs", "experiments")
IGNORED = shutil.ignore_patterns("__pycache__", ".*", "_proc", "_docs")


def copy_project(source: Path, target: Path) -> Path:
    "Copy what the export reads and writes."
    for folder in ("shopai", *NOTEBOOKS):
        if (source / folder).is_dir(): shutil.copytree(source / folder, target / folder, ignore=IGNORED)
    shutil.copy(source / "settings.ini", target)
    return target


def contents(root: Path) -> dict[str, bytes]:
    "Relative path → bytes of the package's files and of all notebooks."
    paths = [path for path in (root / "shopai").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    paths += [path for folder in NOTEBOOKS for path in (root / folder).rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def export_afresh(root: Path) -> None:
    "Remove every exported file below `root`, then export and clean all notebooks."
    for path in (root / "shopai").rglob("*"):
        if path.is_file() and path.relative_to(root).as_posix() not in KEPT: path.unlink()
    environment = {name: value for name, value in os.environ.items() if name != "IN_TEST"}  # nbdev exports nothing under IN_TEST
    for command in (["nbdev_export"], *(["nbdev_clean", "--fname", folder] for folder in NOTEBOOKS if (root / folder).is_dir())):
        subprocess.run([str(Path(sys.executable).with_name(command[0])), *command[1:]], cwd=root, env=environment, check=True)  # noqa: S603


def differences(root: Path = ROOT) -> list[str]:
    "One line for each file that is not what the notebooks say; none if all is in step."
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_project(root, Path(folder))
        export_afresh(copy)
        ours, fresh = contents(root), contents(copy)
    lines = []
    for name in sorted(ours.keys() | fresh.keys()):
        if name not in fresh: lines.append(f"{name}: no notebook exports it")
        elif name not in ours: lines.append(f"{name}: missing, run nbdev_export")
        elif ours[name] != fresh[name]:
            lines.append(f"{name}: not cleaned, run nbdev_clean" if name.endswith(".ipynb") else f"{name}: differs from what its notebook exports")
    if not ours["shopai/__init__.py"].startswith(b"__version__ = ") or ours["shopai/__init__.py"].count(b"\n") != 1:
        lines.append("shopai/__init__.py: holds more than the version")
    return lines


if __name__ == "__main__":
    sys.exit("\n".join(differences()) or 0)
