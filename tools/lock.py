"""Write requirements.lock and environment.yml from pyproject.toml.

    python tools/lock.py              keep every version that still fits
    python tools/lock.py NAME NAME    let these move to their newest version

The lock is one resolution of `shopai[all]`. environment.yml names the direct dependencies with the lock's versions, for conda users.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCK, ENVIRONMENT = ROOT / "requirements.lock", ROOT / "environment.yml"
HEADER = "# Every package of `shopai[all]`, pinned. `make lock` writes this file; `make setup` installs it.\n"
# What torch's CUDA build brings along on Linux. It differs by platform, and torch itself names it, so it is not for a lock that others share.
PLATFORM_ONLY = ("nvidia-", "cuda-", "triton")


def direct_requirements(pyproject: Path = ROOT / "pyproject.toml") -> list[Requirement]:
    "The dependencies and those of every extra, each once, sorted by name; specifiers of the same package are joined."
    project = tomllib.loads(pyproject.read_text())["project"]
    found: dict[str, Requirement] = {}
    for line in [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name == project["name"]: continue
        if name in found:
            found[name].specifier &= requirement.specifier
            found[name].extras |= requirement.extras
        else:
            found[name] = requirement
    return [found[name] for name in sorted(found)]


def read_lock(text: str) -> dict[str, str]:
    "Canonical name → version."
    pins = (line.partition("==") for line in text.splitlines() if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, _, version in pins}


def lock_text(pins: dict[str, str]) -> str:
    "The lock as text: sorted, without the local suffix (`+cpu`) that only one platform's build has."
    lines = {f"{name}=={version.partition('+')[0]}" for name, version in pins.items() if not canonicalize_name(name).startswith(PLATFORM_ONLY)}
    return HEADER + "".join(f"{line}\n" for line in sorted(lines, key=str.lower))


def environment_text(requirements: list[Requirement], pins: dict[str, str]) -> str:
    "environment.yml: Python from conda, the rest by pip, since some of it is on PyPI only."
    lines = [
        "# For conda users: `conda env create -f environment.yml`. `make lock` writes this file, from pyproject.toml and requirements.lock.",
        "name: shopai",
        "channels:",
        "  - conda-forge",
        "dependencies:",
        "  - python=3.11",
        "  - pip",
        "  - pip:",
        "      - --constraint requirements.lock",
    ]
    for requirement in requirements:
        extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
        marker = f" ; {str(requirement.marker).replace(chr(34), chr(39))}" if requirement.marker else ""
        pin = f"{requirement.name}{extras}=={pins[canonicalize_name(requirement.name)]}{marker}"
        lines.append(f'      - "{pin}"' if marker else f"      - {pin}")
    return "\n".join([*lines, "      - --editable .", ""])


def resolve(constraints: str) -> dict[str, str]:
    "Ask pip for one resolution of `shopai[all]` under the constraints; nothing is installed."
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "constraints.txt").write_text(constraints)
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report),
                   "--constraint", f"{folder}/constraints.txt", f"{ROOT}[all]"]
        subprocess.run(command, check=True)  # noqa: S603
        packages = (entry["metadata"] for entry in json.loads(report.read_text())["install"])
        return {package["name"]: package["version"] for package in packages if package["name"] != "shopai"}


def main(move: list[str]) -> None:
    moving = {canonicalize_name(name) for name in move}
    kept = [line for line in LOCK.read_text().splitlines() if canonicalize_name(line.partition("==")[0]) not in moving]
    LOCK.write_text(lock_text(resolve("\n".join(kept))))
    ENVIRONMENT.write_text(environment_text(direct_requirements(), read_lock(LOCK.read_text())))


if __name__ == "__main__":
    main(sys.argv[1:])
