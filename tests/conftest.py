"""Shared fixtures. Kept tiny: what only one file of tests needs stands in that file."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA_DIR = Path(os.environ.get("SHOPAI_DATA_DIR") or ROOT / ".." / "shared" / "data").resolve()

# A developer's own settings must not decide whether a test passes. Set at import, so that subprocesses and modules that read the environment early see it too.
for name in [name for name in os.environ if name.startswith(("SHOPAI_", "MLFLOW_"))]:
    del os.environ[name]
os.environ["SHOPAI_DATA_DIR"] = str(DATA_DIR)
# One thread a process: results don't depend on the machine, and parallel workers don't fight for its cores.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"), MPLBACKEND="Agg")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    "With `-n`, the tests of one file go to one worker, since they share what is dear to make. Notebooks share nothing and are spread."
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if file.endswith("test_notebooks.py") else file

    return ByFile(config, log)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    "Folder of the public data sets; a test that needs it is skipped where it is missing."
    if not DATA_DIR.is_dir():
        pytest.skip(f"no public data in {DATA_DIR} (set SHOPAI_DATA_DIR)")
    return DATA_DIR


@pytest.fixture(scope="session")
def online_retail(data_dir: Path) -> Path:
    "The Online Retail file (UCI 352) as Parquet."
    path = data_dir / "online_retail.parquet"
    if not path.is_file():
        pytest.skip(f"no online_retail.parquet in {data_dir}")
    return path


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory):
    "Folder of two bundles over the same customers of the toy shop, `ease` and `knn`, and what these customers bought."
    from shop_server import toy_bundle  # here, since most tests need no recommender

    from shopai.recommend.baselines import ItemKNN
    folder = tmp_path_factory.mktemp("bundles")
    bought, _ = toy_bundle(folder / "ease")
    toy_bundle(folder / "knn", ItemKNN())
    return folder, bought


@pytest.fixture(scope="module")
def shop(bundles, tmp_path_factory: pytest.TempPathFactory):
    "Home with a champion, what its customers bought, and the published bundle."
    from shop_server import publish

    from shopai.recommend.bundle import Recommender
    (folder, bought), home = bundles, tmp_path_factory.mktemp("home")
    return home, bought, Recommender.load(publish(home, folder / "ease", "1"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A `SHOPAI_HOME` of the test's own, empty."
    path = tmp_path / "home"
    monkeypatch.setenv("SHOPAI_HOME", str(path))
    return path
