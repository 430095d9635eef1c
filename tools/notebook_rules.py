"""The rules of notebooks that a machine can check; CONTRIBUTING.md tells them to people. Usage: python tools/notebook_rules.py [NOTEBOOK…]

A rule is a function from a notebook to complaints. tests/test_notebook_rules.py holds, for each rule, a notebook that breaks it.
"""

import ast
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
MOST_CELLS, LONGEST_CELL, MEDIAN_CELL, LARGEST_FILE = 80, 80, 12, 400_000


@dataclass
class Cell:
    kind: str
    source: str
    tags: tuple[str, ...] = ()
    outputs: list[dict] = field(default_factory=list)

    @property
    def directives(self) -> list[str]:
        "What follows `#|`, such as `export` or `default_exp core.lake`."
        return [line.strip()[2:].strip() for line in self.source.splitlines() if re.match(r"\s*#\s*\|", line)]

    @property
    def code(self) -> str:
        "The source without directives and IPython's magic lines."
        return "\n".join(line for line in self.source.splitlines() if not re.match(r"\s*(#\s*\||[%!])", line))

    def has(self, *names: str) -> bool: return any(directive.split()[0].rstrip(":") in names for directive in self.directives if directive)

    @property
    def exported(self) -> bool: return self.has("export", "exports", "exporti")

    @property
    def tree(self) -> ast.Module: return ast.parse(self.code)

    @property
    def asserts(self) -> bool:
        "Does it test something: `assert`, or a call whose name says so (`test_eq`, `raises`, `assert_allclose`)?"
        called = [ast.unparse(node.func).rpartition(".")[2] for node in ast.walk(self.tree) if isinstance(node, ast.Call)]
        return any(isinstance(node, ast.Assert) for node in ast.walk(self.tree)) or any(re.match(r"(test_|assert_|raises\b|check_)", name) for name in called)


@dataclass
class Notebook:
    path: Path  # relative to the project
    cells: list[Cell]
    size: int = 0
    kernel: str = "python3"

    @classmethod
    def read(cls, path: Path, root: Path = ROOT) -> "Notebook":
        content = json.loads((root / path).read_text())
        cells = ((cell["cell_type"], "".join(cell["source"]), tuple(cell["metadata"].get("tags", ())), cell.get("outputs", [])) for cell in content["cells"])
        return cls(path, [Cell(*cell) for cell in cells], (root / path).stat().st_size, content["metadata"].get("kernelspec", {}).get("name", ""))

    @property
    def code(self) -> list[Cell]: return [cell for cell in self.cells if cell.kind == "code" and cell.code.strip()]

    @property
    def exported(self) -> list[Cell]: return [cell for cell in self.code if cell.exported]

    @property
    def default_exp(self) -> str | None:
        return next((directive.split()[1] for cell in self.cells for directive in cell.directives if directive.startswith("default_exp ")), None)


def lines_of(cell: Cell) -> int: return sum(bool(line.strip()) for line in cell.code.splitlines())


def text_outputs(cell: Cell) -> Iterator[str]:
    for output in cell.outputs:
        yield "".join(output.get("text", ()))
        yield from ("".join(value) for kind, value in output.get("data", {}).items() if kind.startswith("text/"))


# Rules of every notebook

def begins_with_title_and_subtitle(notebook: Notebook) -> Iterator[str]:
    first = notebook.cells[0] if notebook.cells else Cell("markdown", "")
    lines = [line for line in first.source.splitlines() if line.strip()]
    if first.kind != "markdown" or len(lines) < 2 or not lines[0].startswith("# ") or not lines[1].startswith("> "):
        yield "the first cell is not `# Title` and a `> subtitle`"


def is_numbered(notebook: Notebook) -> Iterator[str]:
    if notebook.path.name == "index.ipynb": return
    found = re.fullmatch(r"([1-9])(\d)_[a-z][a-z0-9_]*\.ipynb", notebook.path.name)
    if not found: yield "its name is not NN_name.ipynb"
    elif found[2] not in "05" and not list((ROOT / notebook.path.parent).glob(f"{found[1]}{5 * (int(found[2]) // 5)}_*.ipynb")):
        yield "numbers go in tens, with 15 to insert one; others only fill a gap after such a one"


def is_small(notebook: Notebook) -> Iterator[str]:
    if notebook.size > LARGEST_FILE: yield f"{notebook.size:,} bytes, more than {LARGEST_FILE:,}"
    if len(notebook.cells) > MOST_CELLS: yield f"{len(notebook.cells)} cells, more than {MOST_CELLS}"


def names_no_absolute_path(notebook: Notebook) -> Iterator[str]:
    pattern = re.compile(r"(?<![\w.:/<~}-])(/(?:home|root|work|tmp|mnt|opt|var|Users|content|private)/[\w.-]+|[A-Z]:\\\w+)")
    for number, cell in enumerate(notebook.cells):
        for text in (cell.source, *text_outputs(cell)):
            if found := pattern.search(text): yield f"cell {number}: the absolute path {found[0]}"


def needs_no_network(notebook: Notebook) -> Iterator[str]:
    clients = {"requests", "urllib.request", "urllib3", "httpx", "aiohttp", "ftplib"}
    for number, cell in enumerate(notebook.cells):
        if cell.kind != "code": continue
        if re.search(r"^\s*[%!]\s*(pip|curl|wget|conda|git|apt)", cell.source, re.MULTILINE): yield f"cell {number}: a command that needs the network"
        imported = {alias.name for node in ast.walk(cell.tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in ast.walk(cell.tree) if isinstance(node, ast.ImportFrom)}
        if imported & clients: yield f"cell {number}: imports {', '.join(imported & clients)}"
        literals = [node.value for node in ast.walk(cell.tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        remote = any(text.startswith(("http://", "https://")) for text in literals)
        if remote and re.search(r"\bread_\w+\(", cell.code): yield f"cell {number}: reads from the network"


def restores_the_environment(notebook: Notebook) -> Iterator[str]:
    text = "\n".join(cell.code for cell in notebook.code)
    for name in set(re.findall(r"""os\.environ\[(["'][^"']+["'])\]\s*=(?!=)""", text)):
        if not re.search(rf"(del os\.environ\[|os\.environ\.pop\(){re.escape(name)}", text): yield f"leaves os.environ[{name}] set"


def shows_no_error_and_no_warning(notebook: Notebook) -> Iterator[str]:
    for number, cell in enumerate(notebook.cells):
        if any(output["output_type"] == "error" or output.get("name") == "stderr" for output in cell.outputs):
            yield f"cell {number}: an error or warning is in its output"


def uses_the_plain_kernel(notebook: Notebook) -> Iterator[str]:
    if notebook.kernel != "python3": yield f"its kernel is {notebook.kernel!r}, not python3"


# Rules of notebooks that define a module

def exports_to_the_module_of_its_name(notebook: Notebook) -> Iterator[str]:
    expected = f"{notebook.path.parent.name}.{notebook.path.stem.partition('_')[2]}"
    if notebook.default_exp != expected: yield f"default_exp is {notebook.default_exp}, the name asks for {expected}"


def exported_cells_are_short(notebook: Notebook) -> Iterator[str]:
    lengths = [lines_of(cell) for cell in notebook.exported]
    if lengths and max(lengths) > LONGEST_CELL: yield f"an exported cell of {max(lengths)} lines, more than {LONGEST_CELL}"
    if lengths and median(lengths) > MEDIAN_CELL: yield f"exported cells have a median of {median(lengths):g} lines, more than {MEDIAN_CELL}"


def exported_imports_are_absolute(notebook: Notebook) -> Iterator[str]:
    for cell in notebook.exported:
        for node in ast.walk(cell.tree):
            if isinstance(node, ast.ImportFrom) and node.level: yield f"a relative import: {ast.unparse(node)}"
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*": yield f"an import of everything: {ast.unparse(node)}"


def public_symbols(cell: Cell) -> list[str]:
    "What the cell defines for others and does something: functions, and classes with methods. A constant, a record or an exception is tested where it is used."
    def behaves(node: ast.AST) -> bool:
        return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (isinstance(node, ast.ClassDef) and any(behaves(part) for part in node.body))

    return [node.name for node in cell.tree.body if behaves(node) and not node.name.startswith("_")]


def public_symbols_are_tested_at_once(notebook: Notebook) -> Iterator[str]:
    "One of the next two code cells that are not exported must test something and use the name."
    if notebook.exported and not any(cell.asserts for cell in notebook.code if not cell.exported): yield "nothing is asserted"
    for position, cell in enumerate(notebook.code):
        if not cell.exported or cell.has("exporti"): continue
        following = [other for other in notebook.code[position + 1:] if not other.exported and not other.has("hide")][:2]
        for name in public_symbols(cell):
            if not any(other.asserts and re.search(rf"\b{name}\b", other.code) for other in following): yield f"{name} is not asserted within two cells"


def public_functions_are_documented(notebook: Notebook) -> Iterator[str]:
    for cell in notebook.exported:
        for node in cell.tree.body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"): continue
            if not ast.get_docstring(node): yield f"{node.name} has no docstring"
            if isinstance(node, ast.ClassDef): continue
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [parameter.arg for parameter in parameters if parameter.annotation is None and parameter.arg not in ("self", "cls")]
            if bare: yield f"{node.name}: no type for {', '.join(bare)}"
            if node.returns is None: yield f"{node.name}: no return type"


def keeps_tests_visible(notebook: Notebook) -> Iterator[str]:
    for number, cell in enumerate(notebook.cells):
        if cell.kind == "code" and cell.has("hide", "echo") and cell.asserts: yield f"cell {number}: a hidden test"


def skipped_cells_say_why(notebook: Notebook) -> Iterator[str]:
    for number, cell in enumerate(notebook.cells):
        has_comment = re.search(r"^\s*#(?!\s*\|)\s*\w", cell.source, re.MULTILINE)
        if cell.kind == "code" and cell.has("eval") and not has_comment: yield f"cell {number}: eval: false without a reason"


def demos_end_in_a_value(notebook: Notebook) -> Iterator[str]:
    for number, cell in enumerate(notebook.cells):
        if cell.kind != "code" or cell.exported or not (body := cell.tree.body): continue
        if ast.unparse(body[-1]).startswith("print("): yield f"cell {number}: ends in print"


def outputs_are_kept(notebook: Notebook) -> Iterator[str]:
    if notebook.code and not any(cell.outputs for cell in notebook.code): yield "no output is stored: run it before committing"


# Rules of notebooks that define no module

def exports_nothing(notebook: Notebook) -> Iterator[str]:
    if notebook.exported or notebook.default_exp: yield "it exports, and is no notebook of a layer"


# Rules of experiments

def has_a_parameters_cell(notebook: Notebook) -> Iterator[str]:
    first = next(iter(notebook.code), Cell("code", ""))
    if "parameters" not in first.tags: yield "the first code cell has no tag `parameters`"
    for line in filter(str.strip, first.source.splitlines()):
        if not re.fullmatch(r"\w+: [\w\[\], |.]+ = .+?  # .+", line): yield f"not `name: type = value  # meaning`: {line}"


def defines_nothing(notebook: Notebook) -> Iterator[str]:
    for number, cell in enumerate(notebook.cells):
        if cell.kind == "code" and any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) for node in ast.walk(cell.tree)):
            yield f"cell {number}: defines a function or class"


def validates_before_it_works(notebook: Notebook) -> Iterator[str]:
    if "validate_parameters(" not in "\n".join(cell.code for cell in notebook.code[1:3]): yield "the cell after the parameters doesn't call validate_parameters"


def finishes_last(notebook: Notebook) -> Iterator[str]:
    if not notebook.code or not re.search(r"\.finish\(", notebook.code[-1].code): yield "the last cell doesn't write the manifest (run.finish)"


Rule = Callable[[Notebook], Iterator[str]]
EVERY: list[Rule] = [
    begins_with_title_and_subtitle, is_numbered, is_small, names_no_absolute_path, needs_no_network, restores_the_environment, shows_no_error_and_no_warning,
    uses_the_plain_kernel,
]
COMPONENT: list[Rule] = [
    exports_to_the_module_of_its_name, exported_cells_are_short, exported_imports_are_absolute, public_symbols_are_tested_at_once,
    public_functions_are_documented, keeps_tests_visible, skipped_cells_say_why, demos_end_in_a_value, outputs_are_kept,
]
STORY: list[Rule] = [exports_nothing, keeps_tests_visible, skipped_cells_say_why, demos_end_in_a_value, outputs_are_kept]
EXPERIMENT: list[Rule] = [has_a_parameters_cell, defines_nothing, exports_nothing, validates_before_it_works, finishes_last]


def notebooks_in(folder: str) -> list[Path]:
    "The notebooks below a folder of the project, as paths relative to it."
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def complaints(notebook: Notebook, rules: list[Rule]) -> list[str]:
    "What each rule has to say, with the notebook and the rule named."
    return [f"{notebook.path}: {text} [{rule.__name__}]" for rule in rules for text in rule(notebook)]


def rules_for(path: Path) -> list[Rule]:
    "Notebooks directly in nbs/ and the tutorials tell a story and define nothing; every other folder of nbs/ is a layer of the package."
    if path.parts[0] == "experiments": return EVERY + EXPERIMENT
    return EVERY + (STORY if path.parent.name in ("nbs", "tutorials") else COMPONENT)


def parameter_faults(notebook: Notebook, profile: dict) -> list[str]:
    "Names that the notebook doesn't have, and text where a number was meant: YAML reads 1e-4 as text."
    known = {node.target.id for node in notebook.code[0].tree.body if isinstance(node, ast.AnnAssign)}
    texts = {name: value for name, value in profile.items() if isinstance(value, str)}
    return [f"{name} is no parameter" for name in profile if name not in known] + [
        f"{name}: {value!r} is text, write 1.0e-4" for name, value in texts.items() if re.fullmatch(r"[+-]?\d+e[+-]?\d+", value)]


if __name__ == "__main__":
    named = [Path(name).resolve().relative_to(ROOT) for name in sys.argv[1:]]
    found = [text for path in named or notebooks_in("nbs") + notebooks_in("experiments") for text in complaints(Notebook.read(path), rules_for(path))]
    sys.exit("\n".join(found) or 0)
