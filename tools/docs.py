"""Write README.md and the documentation site from the notebooks.

    python tools/docs.py readme    README.md, from nbs/index.ipynb
    python tools/docs.py site      site/, a page for each notebook

Each notebook becomes Markdown: hidden cells and directives are left out, stored outputs are kept, names of the library link to where they are defined.
mkdocs-material does the rest. It loads this file as its hooks, too, for edit links and for formulas as MathML, so that a page needs nothing from another host.
"""

import ast
import base64
import configparser
import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import yaml

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ["core", "data", "events", "features", "recommend", "pricing", "demand", "inventory", "marketing", "ops"]  # reading order
IMAGES = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg"}
PROSE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}  # pages that are no notebooks


@dataclass(frozen=True)
class Notebook:
    source: PurePosixPath  # in the project, such as nbs/core/10_config.ipynb
    content: dict

    @property
    def page(self) -> PurePosixPath:
        "Where the page lies in the site's source: `nbs/core/10_config.ipynb` → `core/config.md`."
        inside = self.source.relative_to("nbs") if self.source.parts[0] == "nbs" else self.source
        return inside.with_name(re.sub(r"^\d+_", "", inside.stem) + ".md")

    @property
    def cells(self) -> list[dict]: return self.content["cells"]

    @property
    def title(self) -> str: return next((line[2:].strip() for line in text_of(self.cells[0]).splitlines() if line.startswith("# ")), self.source.stem)

    @property
    def module(self) -> str | None:
        found = re.search(r"^#\s*\|\s*default_exp\s+(\S+)", "\n".join(map(text_of, self.cells)), re.MULTILINE)
        return f"shopai.{found[1]}" if found else None


def text_of(cell: dict) -> str: return "".join(cell["source"])


def directives(cell: dict) -> dict[str, str]:
    "`#| export` → {'export': ''}, `#| eval: false` → {'eval': 'false'}."
    lines = (re.match(r"\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*)", line) for line in text_of(cell).splitlines())
    return {found[1]: found[2].strip() for found in lines if found}


def without_directives(source: str) -> str: return re.sub(r"^\s*#\s*\|.*\n?", "", source, flags=re.MULTILINE).strip("\n")


def read_notebooks(root: Path) -> list[Notebook]:
    paths = [path for folder in ("nbs", "experiments") for path in sorted((root / folder).rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]
    return [Notebook(PurePosixPath(path.relative_to(root)), json.loads(path.read_text())) for path in paths]


# From cells to Markdown

def fenced(text: str, info: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{info}\n{text.rstrip()}\n{fence}"


def outside_code(text: str, change: Callable[[str], str]) -> str:
    "Apply `change` to what is not fenced code."
    parts = re.split(r"(^ *(?P<fence>```+|~~~+).*?^ *(?P=fence) *$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if position % 3 == 1 else change(part) for position, part in enumerate(parts) if position % 3 != 2)


def moved_links(text: str, move: Callable[[str], str]) -> str:
    "Apply `move` to each relative address in links and images, of Markdown and of HTML."
    def one(found: re.Match) -> str: return found[1] + (found[2] if re.match(r"[a-z]+:|#|/|$", found[2]) else move(found[2])) + found[3]
    return outside_code(text, lambda part: re.sub(r"""((?:src|href)=["'])([^"']*)(["'])""", one, re.sub(r"(\]\()([^)\s]*)([^)]*\))", one, part)))


def spaced_lists(text: str) -> str:
    "Python-Markdown wants an empty line before a list; Jupyter and GitHub don't."
    item = r"(?:[-*+]|\d+\.)[ \t]"
    return outside_code(text, lambda part: re.sub(rf"^(?![ \t]*{item})(\S.*\n)(?={item})", r"\1\n", part, flags=re.MULTILINE))


def output_parts(cell: dict, save_image: Callable[[bytes, str], str], rich: bool) -> Iterator[str]:
    "The stored outputs as Markdown; `rich` also keeps HTML, such as the tables of data frames. Warnings and progress bars (stderr) are left out."
    for output in cell.get("outputs", []):
        data = {kind: "".join(value) if isinstance(value, list) else value for kind, value in output.get("data", {}).items()}
        if output["output_type"] == "stream":
            if output["name"] == "stdout": yield fenced(re.sub(r"\x1b\[[\d;]*m", "", "".join(output["text"])), "text")
        elif kind := next((kind for kind in IMAGES if kind in data), None):
            content = data[kind].encode() if kind == "image/svg+xml" else base64.b64decode(data[kind])
            yield f"![]({save_image(content, IMAGES[kind])})"
        elif "text/markdown" in data: yield data["text/markdown"]
        elif rich and "text/html" in data:
            table = re.sub(r"<style.*?</style>", "", data["text/html"], flags=re.DOTALL).replace(' border="1"', "")
            yield '<div class="result">\n' + re.sub(r"\n\s*\n", "\n", table).strip() + "\n</div>"
        elif "text/plain" in data: yield fenced(re.sub(r"\x1b\[[\d;]*m", "", data["text/plain"]), "text")
        elif output["output_type"] == "error": yield fenced(f"{output['ename']}: {output['evalue']}", "text")


def is_hidden(cell: dict) -> bool:
    found = directives(cell)
    return "hide" in found or found.get("include") == "false" or (cell["cell_type"] == "code" and not without_directives(text_of(cell)).strip())


def shows_code(cell: dict) -> bool: return directives(cell).get("echo") != "false" and "hide_input" not in directives(cell)


def shows_output(cell: dict) -> bool: return directives(cell).get("output") != "false" and "hide_output" not in directives(cell)


# README.md

def readme(root: Path = ROOT, notebook: str = "nbs/index.ipynb") -> tuple[str, dict[str, bytes]]:
    "The text of README.md, and the images that it shows by their path in the project. Addresses are made relative to the project."
    source, images = PurePosixPath(notebook), {}

    def save_image(content: bytes, ending: str) -> str:
        path = f"docs/images/{source.stem}-{len(images) + 1}.{ending}"
        images[path] = content
        return path

    def move(address: str) -> str: return os.path.normpath(source.parent / address)

    parts = [f"<!-- Written by `make readme` from {notebook}: edit that. -->"]
    for cell in json.loads((root / notebook).read_text())["cells"]:
        if is_hidden(cell): continue
        if cell["cell_type"] == "markdown": parts.append(moved_links(text_of(cell), move))
        elif cell["cell_type"] == "code":
            if shows_code(cell): parts.append(fenced(without_directives(text_of(cell)), "python"))
            if shows_output(cell): parts += output_parts(cell, save_image, rich=False)
    return "\n\n".join(part.strip("\n") for part in parts) + "\n", images


def write_readme(root: Path = ROOT) -> None:
    text, images = readme(root)
    for old in (root / "docs/images").glob("index-*"): old.unlink()
    for path, content in images.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    (root / "README.md").write_text(text)


# The site

def symbols_of(cell: dict) -> list[str]:
    "Public functions and classes that an exported cell defines."
    if not {"export", "exports"} & directives(cell).keys(): return []
    nodes = ast.parse(without_directives(text_of(cell))).body
    return [node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_")]


class Site:
    "Turns a project's notebooks into the source of a mkdocs site below `target`."

    def __init__(self, root: Path, target: Path):
        settings = configparser.ConfigParser()
        settings.read(root / "settings.ini")
        self.root, self.target, self.settings = root, target, settings["DEFAULT"]
        self.notebooks = read_notebooks(root)
        self.pages = {str(notebook.source): notebook.page for notebook in self.notebooks}
        self.pages |= {source: PurePosixPath(page) for source, page in PROSE.items() if (root / source).is_file()} | {"README.md": PurePosixPath("index.md")}
        self.places: dict[str, list[Notebook]] = {}  # symbol → where it is defined
        for notebook in self.notebooks:
            for name in [name for cell in notebook.cells if cell["cell_type"] == "code" for name in symbols_of(cell)]:
                self.places.setdefault(name, []).append(notebook)

    def blob(self, path: str, verb: str = "blob") -> str: return f"{self.settings['git_url']}/{verb}/{self.settings['branch']}/{path}"

    def moved(self, address: str, source: PurePosixPath, page: PurePosixPath) -> str:
        "An address as written in `source`, as it must be on `page`: of another page, of a file in docs/, or at the code host."
        path, mark, fragment = address.partition("#")
        target = os.path.normpath(source.parent / path)
        if target in self.pages: inside = str(self.pages[target])
        elif target.startswith("docs/"): inside = target.removeprefix("docs/")
        else: return self.blob(target) + mark + fragment
        return os.path.relpath(inside, page.parent) + mark + fragment

    def linked_names(self, text: str, notebook: Notebook) -> str:
        "`name` or `Class.method()` in prose becomes a link to the other page that defines it, if only one does."
        def one(found: re.Match) -> str:
            dotted = found[1].removesuffix("()")
            name = dotted.rpartition(".")[2] if dotted.startswith("shopai.") else dotted.partition(".")[0]
            places = self.places.get(name, [])
            if len(places) != 1 or places[0] is notebook: return found[0]
            return f"[{found[0]}]({os.path.relpath(places[0].page, notebook.page.parent)}#{name})"
        return outside_code(text, lambda part: re.sub(r"(?m)(?<![\[`])`([A-Za-z_][\w.]*(?:\(\))?)`(?![`\]])", one, part))

    def prose(self, text: str, notebook: Notebook) -> str:
        return spaced_lists(self.linked_names(moved_links(text, lambda address: self.moved(address, notebook.source, notebook.page)), notebook))

    def opening(self, notebook: Notebook) -> list[str]:
        "The first cell: title, subtitle, what it is about; then where the code lives."
        head, _, rest = text_of(notebook.cells[0]).partition("\n> ")
        subtitle, _, intro = rest.partition("\n")
        meta = {"title": notebook.title, "edit_url": self.blob(str(notebook.source), "edit")} | ({"description": subtitle} if subtitle else {})
        parts = ["---\n" + yaml.safe_dump(meta, allow_unicode=True, sort_keys=False, width=1000) + "---", self.prose(head, notebook)]
        if subtitle: parts.append(f"{self.prose(subtitle, notebook)}\n{{ .subtitle }}")
        if notebook.module:
            where = f"`{notebook.module}` · [the notebook]({self.blob(str(notebook.source))})"
            parts.append(f"{where} · cells with a bar are the module, the others show and test it\n{{ .module }}")
        return [*parts, self.prose(intro, notebook)]

    def code(self, cell: dict) -> str:
        "A code cell; an exported one gets a bar, and a heading that bears the names it defines."
        exported, names = {"export", "exports", "exporti"} & directives(cell).keys(), symbols_of(cell)
        block = fenced(without_directives(text_of(cell)), "{ .python .exported }" if exported else "python")
        if not names: return block
        anchors = "".join(f'<a id="{name}"></a>' for name in names[1:])
        return f"#### {' · '.join(f'`{name}`' for name in names)} {{ #{names[0]} .symbol }}\n\n{anchors}\n\n{block}" if anchors else (
            f"#### `{names[0]}` {{ #{names[0]} .symbol }}\n\n{block}")

    def markdown(self, notebook: Notebook) -> str:
        "The whole page. Images are written beside it."
        count = 0

        def save_image(content: bytes, ending: str) -> str:
            nonlocal count
            count += 1
            path = self.target / notebook.page.with_name(f"{notebook.page.stem}-{count}.{ending}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            return path.name

        parts = self.opening(notebook)
        for cell in notebook.cells[1:]:
            if is_hidden(cell): continue
            if cell["cell_type"] == "markdown": parts.append(self.prose(text_of(cell), notebook))
            elif cell["cell_type"] == "code":
                if shows_code(cell): parts.append(self.code(cell))
                if shows_output(cell): parts += [f'<div class="output" markdown="1">\n\n{part}\n\n</div>' for part in output_parts(cell, save_image, rich=True)]
        return "\n\n".join(parts) + "\n"

    def executed(self, notebook: Notebook) -> Notebook:
        "An experiment as its last successful run left it, if there is one here and the notebook itself holds no output."
        if any(cell.get("outputs") for cell in notebook.cells): return notebook
        job = re.sub(r"^\d+_", "", notebook.source.stem)
        home = Path(os.environ.get("SHOPAI_HOME") or self.root / ".shopai")
        runs = [path.with_name("notebook.ipynb") for path in sorted((home / "runs" / job).glob("*/manifest.json"))]
        return Notebook(notebook.source, json.loads(runs[-1].read_text())) if runs and runs[-1].is_file() else notebook

    def modules(self) -> dict[str, dict]:
        "Module → its page in the site and the names that have a place on it."
        found = {notebook.module: {"page": str(notebook.page.with_suffix(".html")), "names": []} for notebook in self.notebooks if notebook.module}
        for name, places in self.places.items():
            for notebook in places: found[notebook.module]["names"].append(name)
        return found

    def navigation(self) -> list[dict]:
        def entries(folder: str) -> list[dict]:
            return [{notebook.title: str(notebook.page)} for notebook in self.notebooks if str(notebook.source.parent) == folder]

        library = [{layer: found} for layer in LAYERS if (found := entries(f"nbs/{layer}"))]
        project = [{title: page} for title, page in (("Contributing", "contributing.md"), ("Changes", "changelog.md")) if (self.target / page).is_file()]
        tabs = {"Home": "index.md", "Tutorials": entries("nbs/tutorials"), "Library": library, "Experiments": entries("experiments"), "Project": project}
        return [{title: content} for title, content in tabs.items() if content]

    def write(self) -> None:
        shutil.rmtree(self.target, ignore_errors=True)
        shutil.copytree(self.root / "docs", self.target)
        for notebook in self.notebooks:
            (self.target / notebook.page).parent.mkdir(parents=True, exist_ok=True)
            (self.target / notebook.page).write_text(self.markdown(self.executed(notebook) if notebook.source.parts[0] == "experiments" else notebook))
        for source, page in PROSE.items():
            if not (self.root / source).is_file(): continue
            places = PurePosixPath(source), PurePosixPath(page)
            text = moved_links((self.root / source).read_text(), lambda address, places=places: self.moved(address, *places))
            (self.target / page).write_text(f"---\nedit_url: {self.blob(source, 'edit')}\n---\n\n{spaced_lists(text)}")


def build_site(root: Path = ROOT, folder: Path | None = None, output: Path | None = None) -> Path:
    "Write the source of the site to `folder` (build/) and the site to `output` (site/)."
    folder, output = folder or root / "build", output or root / "site"
    site = Site(root, folder / "docs")
    site.write()
    config = {"INHERIT": str(root / "mkdocs.yml"), "docs_dir": str(folder / "docs"), "hooks": [str(Path(__file__).resolve())], "nav": site.navigation(),
              "extra": {"modules": site.modules()}}
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False))
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", str(folder / "mkdocs.yml"), "--site-dir", str(output)]
    subprocess.run(command, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})  # noqa: S603
    return output


# Hooks of mkdocs

def on_page_markdown(markdown: str, page, **_) -> str:
    page.edit_url = page.meta.get("edit_url")
    return markdown


def on_page_content(content: str, page, config, **_) -> str:
    content = re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', lambda found: mathml(html.unescape(found[2])), content, flags=re.DOTALL)
    return linked_imports(content, page.url, config["extra"]["modules"])


def linked_imports(content: str, page: str, modules: dict[str, dict]) -> str:
    "In highlighted code, `from shopai.core.lake import Lake` leads to the page of the module and to the place of the name."
    def line(found: re.Match) -> str:
        module = modules.get(html.unescape(found[1]))
        if module is None or module["page"] == page: return found[0]
        address = os.path.relpath(module["page"], os.path.dirname(page))

        def name(span: re.Match) -> str:
            return f'<a class="name" href="{address}#{span[1]}">{span[0]}</a>' if span[1] in module["names"] else span[0]
        return f'<a class="name" href="{address}"><span class="nn">{found[1]}</span></a>' + re.sub(r'<span class="n">(\w+)</span>', name, found[2])
    return re.sub(r'<span class="nn">(shopai\.[\w.]+)</span>(.*)', line, content)


def mathml(formula: str) -> str:
    r"`\(x^2\)` or `\[x^2\]` as MathML, which browsers draw without a script."
    from latex2mathml.converter import convert

    display = "block" if formula.strip().startswith(r"\[") else "inline"
    tex = formula.strip()[2:-2].strip()
    tex = re.sub(r"\\begin\{aligned\}", r"\\begin{array}{rl}", tex).replace(r"\end{aligned}", r"\end{array}")
    return convert(tex, display=display)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["readme"]: write_readme()
        case ["site"]: print(f"the site is in {build_site().relative_to(ROOT)}/: python -m http.server --directory site")
        case _: sys.exit(__doc__)
