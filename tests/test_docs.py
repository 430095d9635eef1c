"""README.md and the documentation site are what the notebooks say, and the site is whole."""

import base64
import html
import json
import re
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath

import pytest
from conftest import ROOT

from tools import docs

WARNING = {"output_type": "stream", "name": "stderr", "text": "a warning"}
PIXEL = base64.b64encode(b"not really a picture").decode()


# README.md

def test_readme_is_what_the_index_notebook_says():
    text, images = docs.readme(ROOT)
    assert (ROOT / "README.md").read_text() == text, "run make readme"
    assert {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in (ROOT / "docs/images").glob("index-*")} == images


def test_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    targets = [target for target in re.findall(r"""(?:\]\(|src=["']|href=["'])([^)"'\s#]+)""", text) if not target.startswith("http")]
    assert [target for target in targets if not (ROOT / target).exists()] == []


def cell(source: str, kind: str = "code", *outputs: dict) -> dict:
    return {"cell_type": kind, "source": source.splitlines(keepends=True), "metadata": {}, **({"outputs": list(outputs)} if kind == "code" else {})}


def result(**data: str) -> dict:
    return {"output_type": "execute_result", "data": {kind.replace("_", "/", 1): text for kind, text in data.items()}}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    "A project of three notebooks that holds every construct once."
    index = [
        cell("# Shop\n\n> What it is\n\n[The lake](core/40_lake.ipynb#Lake), [the licence](../LICENSE), ![the loop](../docs/images/loop.svg).", "markdown"),
        cell("#| hide\nsecret = 1"),
        cell("#| eval: true\nanswer = 6 * 7\nanswer", "code", result(text_plain="42")),
        cell("plot()", "code", {"output_type": "display_data", "data": {"image/png": PIXEL, "text/plain": "<Figure>"}}),
        cell("frame", "code", result(text_html="<table class='dataframe'></table>", text_plain="   a\n0  1"), WARNING),
        cell("Costs $3, then $4.\n\n```python\n[not](a/link)\n```", "markdown"),
    ]
    lake = [
        cell("# Lake\n\n> Tables\n\nA loss $L = \\frac{1}{2}$ of two:\n- one\n- two\n", "markdown"), cell("#| default_exp core.lake"),
        cell("#| export\nclass Lake:\n    'Tables.'\n    def read(self): ..."), cell("Lake()", "code", result(text_plain="Lake()")),
    ]
    job = [
        cell("# Job\n\n> Training\n\nReads `Lake` by `Lake.read()`; leaves `lake` and `Lakes` alone.", "markdown"),
        cell("#| echo: false\n1 + 1", "code", result(text_plain="2")), cell("from shopai.core.lake import Lake, Other"),
    ]
    for name, cells in {"nbs/index.ipynb": index, "nbs/core/40_lake.ipynb": lake, "experiments/20_job.ipynb": job}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    (tmp_path / "docs/images").mkdir(parents=True)
    (tmp_path / "docs/images/loop.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    (tmp_path / "mkdocs.yml").write_text((ROOT / "mkdocs.yml").read_text().replace("extra_css: [stylesheets/shopai.css]\n", ""))
    return tmp_path


def test_readme_from_a_notebook(project: Path):
    text, images = docs.readme(project)
    assert "[The lake](nbs/core/40_lake.ipynb#Lake), [the licence](LICENSE), ![the loop](docs/images/loop.svg)" in text
    assert "```python\nanswer = 6 * 7\nanswer\n```\n\n```text\n42\n```" in text
    assert images == {"docs/images/index-1.png": b"not really a picture"} and "![](docs/images/index-1.png)" in text
    assert "```text\n   a\n0  1\n```" in text and "Costs $3, then $4." in text and "[not](a/link)" in text
    assert not any(absent in text for absent in ("secret", "#|", "a warning", "<table", "<Figure>"))


def test_page_from_a_notebook(project: Path):
    docs.Site(project, project / "build/docs").write()
    lake, job = ((project / "build/docs" / page).read_text() for page in ("core/lake.md", "experiments/job.md"))
    assert lake.startswith("---\ntitle: Lake\nedit_url: https://github.com/shopai/shopai/edit/main/nbs/core/40_lake.ipynb\ndescription: Tables\n---")
    assert "Tables\n{ .subtitle }" in lake and "`shopai.core.lake`" in lake and "default_exp" not in lake
    assert "#### `Lake` { #Lake .symbol }\n\n```{ .python .exported }\nclass Lake:" in lake and "of two:\n\n- one\n- two" in lake
    assert "Reads [`Lake`](../core/lake.md#Lake) by [`Lake.read()`](../core/lake.md#Lake); leaves `lake` and `Lakes` alone." in job
    assert "1 + 1" not in job and "```text\n2\n```" in job


def test_site_of_a_small_project(project: Path):
    site = docs.build_site(project, output=project / "site")
    page = (site / "core/lake.html").read_text()
    assert "<math" in page and "arithmatex" not in page
    assert {"../core/lake.html", "../core/lake.html#Lake"} <= {*Links((site / "experiments/job.html").read_text()).targets}  # of the import in its code
    assert broken_links(site) == []


@pytest.mark.parametrize(("before", "after"), [
    ("text\n- a\n- b", "text\n\n- a\n- b"),
    ("text\n1. a\n2. b", "text\n\n1. a\n2. b"),
    ("- a\n- b\n  more\n- c", "- a\n- b\n  more\n- c"),
    ("```\ntext\n- a\n```", "```\ntext\n- a\n```"),
    ("one\n-2 is less", "one\n-2 is less"),
])
def test_lists_get_their_empty_line(before: str, after: str):
    assert docs.spaced_lists(before) == after


def test_fences_are_longer_than_what_they_hold():
    assert docs.fenced("a\n```\nb", "text") == "````text\na\n```\nb\n````"


def test_moved_links_leave_others_alone():
    same = "[a](https://x.org) [b](#part) [c](/root) <a href='mailto:x@y.z'>d</a>"
    assert docs.moved_links(same, lambda _: "moved") == same
    moved = docs.moved_links("![a](b.png) <img src='b.png'> [c](d.md 'title')", lambda address: f"../{address}")
    assert moved == "![a](../b.png) <img src='../b.png'> [c](../d.md 'title')"


# The site of the project

class Links(HTMLParser):
    "What a page refers to, and the places in it that others may refer to."

    def __init__(self, text: str):
        super().__init__()
        self.targets, self.loaded, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        address = found.get("href") if tag in ("a", "link") else found.get("src")
        if address is None: return
        self.targets.append(address)
        if tag in ("script", "img", "iframe") or (tag == "link" and found.get("rel") in ("stylesheet", "preload", "icon")): self.loaded.append(address)


def pages(site: Path) -> dict[Path, Links]:
    return {path: Links(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}


def broken_links(site: Path) -> list[str]:
    "Relative addresses without a file, and fragments without a place."
    found, broken = pages(site), []
    for path, links in found.items():
        for target in links.targets:
            if re.match(r"[a-z]+:|//", target): continue
            address, _, fragment = target.partition("#")
            file = (path.parent / urllib.parse.unquote(address)).resolve() if address else path
            if file.is_dir(): file = file / "index.html"
            missing = not file.is_file() or (fragment and file in found and urllib.parse.unquote(fragment) not in found[file].ids)
            if missing and fragment != "__skip": broken.append(f"{path.relative_to(site)}: {target}")
    return broken


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    return docs.build_site(ROOT, folder / "build", folder / "site").resolve()


NOTEBOOKS = docs.read_notebooks(ROOT)


def test_every_notebook_has_a_page(site: Path):
    assert [str(notebook.source) for notebook in NOTEBOOKS if not (site / notebook.page.with_suffix(".html")).is_file()] == []
    assert len({notebook.page for notebook in NOTEBOOKS}) == len(NOTEBOOKS)


def test_every_page_is_in_the_navigation(site: Path):
    home = Links((site / "index.html").read_text()).targets
    assert [str(notebook.source) for notebook in NOTEBOOKS if str(notebook.page.with_suffix(".html")) not in home] == []


def test_no_link_is_broken(site: Path):
    assert broken_links(site) == []


def test_nothing_is_loaded_from_another_host(site: Path):
    assert [address for links in pages(site).values() for address in links.loaded if re.match(r"[a-z]+:|//", address) and not address.startswith("data:")] == []


def test_no_directive_and_no_raw_formula_is_left(site: Path):
    for path in site.rglob("*.html"):
        text = html.unescape(re.sub(r"<[^>]+>", "", path.read_text()))
        assert not re.search(r"^\s*#\s*\|\s*\w", text, re.MULTILINE), path
        assert "arithmatex" not in path.read_text() and not re.search(r"\\(frac|sum|sigma|log|mathbb)\b", text), path


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: str(notebook.source))
def test_page_shows_what_the_notebook_holds(notebook: docs.Notebook, site: Path):
    page = (site / notebook.page.with_suffix(".html")).read_text()
    shown = [cell for cell in notebook.cells if cell["cell_type"] == "code" and not docs.is_hidden(cell)]
    outputs = [output.get("data", {}) for cell in shown if docs.shows_output(cell) for output in cell["outputs"]]
    pictures = sum(not docs.IMAGES.keys().isdisjoint(data) for data in outputs)
    assert len(re.findall(rf'<img alt="" src="{notebook.page.stem}-\d+\.', page)) >= pictures
    assert page.count('class="dataframe"') == sum('class="dataframe"' in "".join(data.get("text/html", "")) for data in outputs)
    formulas = any(re.search(r"\$\$.+\$\$", docs.text_of(cell), re.DOTALL) for cell in notebook.cells if cell["cell_type"] == "markdown")
    assert not formulas or "<math" in page
    assert f"/edit/main/{notebook.source}" in page and (ROOT / PurePosixPath(notebook.source)).is_file()
    assert [name for cell in shown for name in docs.symbols_of(cell) if f'id="{name}"' not in page] == []


def test_broken_links_are_seen(tmp_path: Path):
    links = "".join(f'<a href="{address}"></a>' for address in ("#here", "b.html", "b.html#nowhere", "c.html"))
    (tmp_path / "a.html").write_text(f'<h2 id="here"></h2>{links}<img src="d.png">')
    (tmp_path / "b.html").write_text("<p>b</p>")
    assert broken_links(tmp_path.resolve()) == ["a.html: b.html#nowhere", "a.html: c.html", "a.html: d.png"]
