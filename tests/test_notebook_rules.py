"""Every notebook keeps the rules, and every rule finds a notebook that breaks it."""

from pathlib import Path

import pytest
import yaml

from tools import notebook_rules as rules
from tools.notebook_rules import LARGEST_FILE, LONGEST_CELL, MEDIAN_CELL, MOST_CELLS, ROOT, Cell, Notebook, complaints, notebooks_in, rules_for


@pytest.mark.parametrize("path", notebooks_in("nbs") + notebooks_in("experiments"), ids=str)
def test_notebook_keeps_the_rules(path: Path):
    assert complaints(Notebook.read(path), rules_for(path)) == []


@pytest.mark.parametrize("folder", sorted({path.parent for path in notebooks_in("nbs") + notebooks_in("experiments")}), ids=str)
def test_numbers_are_used_once(folder: Path):
    numbers = [path.name[:2] for path in (ROOT / folder).glob("[0-9]*.ipynb")]
    assert len(numbers) == len(set(numbers))


# Parameters of experiments: params/<profile>/<job>.yaml

PROFILES = {"smoke", "default", "gpu"}


@pytest.mark.parametrize("path", notebooks_in("experiments"), ids=str)
def test_every_profile_sets_known_parameters(path: Path):
    job = path.stem.partition("_")[2]
    files = {file.parent.name: file for file in (ROOT / "params").glob(f"*/{job}.yaml")}
    assert files.keys() == PROFILES
    for profile, file in files.items():
        assert rules.parameter_faults(Notebook.read(path), yaml.safe_load(file.read_text()) or {}) == [], profile


# Each rule finds what it is for

def code(source: str, *tags: str, **output) -> Cell: return Cell("code", source, tags, [output] if output else [])


def exported(source: str) -> Cell: return Cell("code", f"#| export\n{source}")


DOUBLE = '''
def double(
    x: float,  # any number
) -> float:  # twice as much
    "Twice `x`."
    return 2 * x
'''
FOUR = {"output_type": "execute_result", "data": {"text/plain": ["4"]}}


def component(*cells: Cell, title: str = "# Lake\n\n> Tables", path: str = "nbs/core/40_lake.ipynb", **fields) -> Notebook:
    "A notebook of a layer that keeps every rule, with more cells at its end."
    demo = code("test_eq(double(2), 4)\ndouble(2)", **FOUR)
    good = [Cell("markdown", title), code("#| default_exp core.lake"), exported("import math"), exported(DOUBLE), demo]
    return Notebook(Path(path), [*good, *cells], **fields)


def story(*cells: Cell) -> Notebook:
    return Notebook(Path("nbs/tutorials/10_walk.ipynb"), [Cell("markdown", "# A walk\n\n> From end to end"), code("double(2)", **FOUR), *cells])


def experiment(*cells: Cell, parameters: str = "seed: int = 0  # same seed, same model\nlr: float = 1.0e-3  # step", tag: str = "parameters",
               validate: str = "validate_parameters", last: str = "run.finish(metrics)") -> Notebook:
    good = [Cell("markdown", "# Recommend\n\n> The job"), code(parameters, tag), code(f"p = {validate}(Recommend, dict(seed=seed, lr=lr))")]
    return Notebook(Path("experiments/20_recommend.ipynb"), [*good, *cells, code(last)])


UNTESTED = Notebook(Path("nbs/core/40_lake.ipynb"), [
    Cell("markdown", "# Lake\n\n> Tables"), code("#| default_exp core.lake"), exported("import math"), code("math.pi", **FOUR)])
WITHOUT_OUTPUT = Notebook(Path("nbs/core/40_lake.ipynb"), [Cell(cell.kind, cell.source) for cell in component().cells])

BAD = [
    (rules.begins_with_title_and_subtitle, component(title="# Lake\n\nNo subtitle")),
    (rules.begins_with_title_and_subtitle, component(title="## Lake\n\n> Tables")),
    (rules.is_numbered, component(path="nbs/core/4_lake.ipynb")),
    (rules.is_numbered, component(path="nbs/core/91_lake.ipynb")),
    (rules.is_small, component(size=LARGEST_FILE + 1)),
    (rules.is_small, component(*[Cell("markdown", "text")] * MOST_CELLS)),
    (rules.names_no_absolute_path, component(code("open('/home/me/data.csv')"))),
    (rules.names_no_absolute_path, component(code("path", output_type="execute_result", data={"text/plain": ["PosixPath('/tmp/abc123/lake')"]}))),
    (rules.needs_no_network, component(code("!pip install something"))),
    (rules.needs_no_network, component(code("import requests"))),
    (rules.needs_no_network, component(code("from urllib.request import urlopen"))),
    (rules.needs_no_network, component(code("pd.read_csv('https://example.org/data.csv')"))),
    (rules.restores_the_environment, component(code("os.environ['SHOPAI_HOME'] = 'x'"))),
    (rules.shows_no_error_and_no_warning, component(code("warn()", output_type="stream", name="stderr", text=["UserWarning"]))),
    (rules.shows_no_error_and_no_warning, component(code("1 / 0", output_type="error", ename="ZeroDivisionError"))),
    (rules.uses_the_plain_kernel, component(kernel="my-venv")),
    (rules.exports_to_the_module_of_its_name, component(path="nbs/core/40_pond.ipynb")),
    (rules.exported_cells_are_short, component(exported("_a = (\n" + "    1 +\n" * LONGEST_CELL + "    1)"))),
    (rules.exported_cells_are_short, component(*[exported("_a = [\n" + "    1,\n" * MEDIAN_CELL + "]")] * 4)),
    (rules.exported_imports_are_absolute, component(exported("from ..core import lake"))),
    (rules.exported_imports_are_absolute, component(exported("from math import *"))),
    (rules.public_symbols_are_tested_at_once, component(exported("class Lake:\n    'Tables.'\n    def read(self): ..."))),
    (rules.public_symbols_are_tested_at_once, component(exported(DOUBLE.replace("double", "twice")), code("1"), code("2"), code("assert twice(1) == 2"))),
    (rules.public_symbols_are_tested_at_once, UNTESTED),
    (rules.public_functions_are_documented, component(exported("def half(x: float) -> float: return x / 2"), code("test_eq(half(2), 1)"))),
    (rules.public_functions_are_documented, component(exported("def half(x) -> float:\n    'Half.'"), code("test_eq(half(2), 1)"))),
    (rules.public_functions_are_documented, component(exported("def half(x: float):\n    'Half.'"), code("test_eq(half(2), 1)"))),
    (rules.keeps_tests_visible, component(code("#| hide\ntest_eq(1, 1)"))),
    (rules.skipped_cells_say_why, component(code("#| eval: false\nlong_job()"))),
    (rules.demos_end_in_a_value, component(code("print(double(2))"))),
    (rules.outputs_are_kept, WITHOUT_OUTPUT),
    (rules.exports_nothing, story(exported("x = 1"))),
    (rules.has_a_parameters_cell, experiment(tag="injected-parameters")),
    (rules.has_a_parameters_cell, experiment(parameters="seed: int = 0")),
    (rules.has_a_parameters_cell, experiment(parameters="seed = 0  # same seed, same model")),
    (rules.defines_nothing, experiment(code("def helper(): pass"))),
    (rules.exports_nothing, experiment(exported("x = 1"))),
    (rules.validates_before_it_works, experiment(validate="dict")),
    (rules.finishes_last, experiment(last="metrics")),
]


@pytest.mark.parametrize(("rule", "notebook"), BAD, ids=[rule.__name__ for rule, _ in BAD])
def test_a_broken_rule_is_seen(rule: rules.Rule, notebook: Notebook):
    found = complaints(notebook, rules_for(notebook.path))
    assert {text.rpartition("[")[2].rstrip("]") for text in found} == {rule.__name__}


def test_every_rule_has_a_bad_example():
    assert {rule for rule, _ in BAD} == {*rules.EVERY, *rules.COMPONENT, *rules.STORY, *rules.EXPERIMENT}


@pytest.mark.parametrize("notebook", [
    component(), story(), experiment(),
    component(code("os.environ['A'] = 'x'"), code("del os.environ['A']")),
    component(code("#| eval: false\n# needs a cluster\nlong_job()")),
    component(exported("LIMIT = 3"), exported("class Wrong(ValueError): 'Not so.'")),
    component(code("url = 'http://127.0.0.1:8000/v1/models'"), code("Path(folder) / 'lake'")),
])
def test_good_notebooks_pass(notebook: Notebook):
    assert complaints(notebook, rules_for(notebook.path)) == []


def test_faulty_parameter_files_are_seen():
    assert rules.parameter_faults(experiment(), {"seed": 1, "lr": 1.0e-4}) == []
    assert rules.parameter_faults(experiment(), yaml.safe_load("epochs: 3")) == ["epochs is no parameter"]
    assert rules.parameter_faults(experiment(), yaml.safe_load("lr: 1e-4")) == ["lr: '1e-4' is text, write 1.0e-4"]
