"""The command answers at once, and serving needs only what `shopai[serve]` installs."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

# Packages that are not installed beside a served model. `None` in sys.modules makes importing them fail.
ABSENT = (
    "dagster", "deltalake", "duckdb", "lightning", "matplotlib", "mlflow", "nbconvert", "pandas", "pandera", "papermill", "pyarrow", "pyspark", "scipy",
    "sklearn", "torch",
)
SERVED = (
    "shopai", "shopai.core.config", "shopai.core.files", "shopai.core.artifacts", "shopai.data.histories", "shopai.recommend.metrics",
    "shopai.recommend.baselines", "shopai.recommend.onnx", "shopai.recommend.bundle", "shopai.features.online", "serving.features", "serving.app",
)


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", SERVED)
def test_served_modules_import_without_the_training_packages(module: str):
    python(f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); import {module}")


def test_an_absent_package_would_be_noticed():
    with pytest.raises(AssertionError, match="pandas"):
        python(f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); import shopai.core.schema")


def loaded(code: str) -> set[str]:
    "Top-level names of the modules in memory after the code; what the code itself prints is left out."
    return set(python(f"{code}\nimport sys; print(); print(*{{name.partition('.')[0] for name in sys.modules}})").splitlines()[-1].split())


def test_importing_the_package_imports_nothing_heavy():
    assert loaded("import shopai") & {*ABSENT, "numpy", "pydantic"} == set()


def test_help_imports_nothing_heavy():
    help_page = "import sys; sys.argv = ['shopai', '--help']\nfrom shopai.cli import main\ntry: main()\nexcept SystemExit: pass"
    assert loaded(help_page) & {*ABSENT, "fastapi", "onnxruntime"} == set()
    assert "pandas" in loaded("import shopai.core.schema")  # so that an empty answer means something


@pytest.mark.alone
def test_help_takes_less_than_a_second():
    "A coarse guard; the figure is measured in benchmarks/."
    command, seconds = Path(sys.executable).with_name("shopai"), []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=60)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0 and "Usage" in done.stdout
    assert min(seconds) < 1, seconds
