"""pyproject.toml, requirements.lock and environment.yml say the same."""

import re
import tomllib

import pytest
import yaml
from conftest import ROOT
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import lock

LINES = lock.LOCK.read_text().splitlines()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    return lock.read_lock(lock.LOCK.read_text())


@pytest.mark.parametrize("requirement", lock.direct_requirements(), ids=lambda requirement: requirement.name)
def test_lock_holds_every_direct_dependency(requirement: Requirement, pins: dict[str, str]):
    version = pins.get(canonicalize_name(requirement.name))
    assert version, f"{requirement.name} is not in requirements.lock, run make lock"
    assert requirement.specifier.contains(version, prereleases=True), f"{requirement} doesn't allow the locked {version}"


def test_every_extra_is_in_all():
    (everything,) = PROJECT["optional-dependencies"]["all"]
    assert Requirement(everything).extras == PROJECT["optional-dependencies"].keys() - {"all"}


def lock_faults(lines: list[str]) -> list[str]:
    pinned = [line for line in lines if not line.startswith("#")]
    names = [canonicalize_name(line.partition("==")[0]) for line in pinned]
    faults = [line for line in pinned if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line)]  # no URL, no option, no marker, no +local
    faults += ["not sorted"] * (pinned != sorted(pinned, key=str.lower)) + ["a package twice"] * (len(set(names)) != len(names))
    return faults + [line for line in lines if "://" in line]


def test_lock_is_plain_and_sorted():
    assert lock_faults(LINES) == []


@pytest.mark.parametrize("text", [
    "torch==2.13.0+cpu", "--index-url https://example.org/simple", "numpy @ file:///wheels/numpy.whl", "numpy>=2", "# from https://example.org",
    "zlib==1\nattrs==1", "x==1\nX==1",
])
def test_a_faulty_lock_is_seen(text: str):
    assert lock_faults(text.split("\n"))


def test_lock_text_is_stable_and_drops_local_versions():
    raw = dict(line.split("==") for line in LINES if not line.startswith("#"))
    assert lock.lock_text(raw) == lock.LOCK.read_text()
    assert lock.lock_text({"torch": "2.13.0+cpu", "NumPy": "2.4", "nvidia-cublas": "1"}) == lock.HEADER + "NumPy==2.4\ntorch==2.13.0\n"


def test_installed_packages_fit_together():
    "What is locked is what the tests run with."
    from importlib.metadata import PackageNotFoundError, version

    wrong = []
    for line in LINES:
        if line.startswith("#"): continue
        name, locked = line.split("==")
        try: found = version(name).partition("+")[0]
        except PackageNotFoundError: found = None
        if found != locked: wrong.append(f"{name}: locked {locked}, installed {found}")
    assert wrong == []


def test_environment_file_is_what_the_lock_says(pins: dict[str, str]):
    assert lock.ENVIRONMENT.read_text() == lock.environment_text(lock.direct_requirements(), pins), "run make lock"


def test_environment_file_can_be_read_by_conda(pins: dict[str, str]):
    content = yaml.safe_load(lock.ENVIRONMENT.read_text())
    *plain, pip = content["dependencies"]
    assert plain == ["python=3.11", "pip"]
    constraint, *requirements, project = pip["pip"]
    assert (ROOT / constraint.removeprefix("--constraint ")).is_file() and project == "--editable ."
    for line in requirements:
        requirement = Requirement(line)
        assert str(requirement.specifier) == f"=={pins[canonicalize_name(requirement.name)]}"
        assert requirement.marker is None or requirement.marker.evaluate(default_environment() | {"platform_system": "Linux"})


def test_python_versions_agree():
    supported = Requirement(f"python{PROJECT['requires-python']}").specifier
    assert supported.contains("3.11") and not supported.contains("3.10") and not supported.contains("3.13")
    assert "(3, 11) <= sys.version_info[:2] < (3, 13)" in (ROOT / "Makefile").read_text()
    assert "min_python = 3.11" in (ROOT / "settings.ini").read_text()
    assert 'python-version: "3.11"' in (ROOT / ".github/workflows/ci.yml").read_text()
