"The documentation site in a real browser, from a folder and without a network."
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = """
[project]
name = "sample"
version = "1"
urls = { Documentation = "https://docs.example.org/sample", Repository = "https://example.org/sample" }
[tool.nbdev]
lib_path = "sample"
"""


def build(root, what="site"):
    "Build the site of the notebooks below `root`; returns the finished process."
    command = [sys.executable, str(ROOT / "docs/build.py"), what, "--root", str(root)]
    return subprocess.run(command, capture_output=True, text=True)


def write_notebook(path, *cells):
    "A notebook of (type, source) cells, without outputs."
    cells = [{"cell_type": kind, "id": f"c{i}", "metadata": {}, "source": source,
              **({"outputs": [], "execution_count": None} if kind == "code" else {})}
             for i, (kind, source) in enumerate(cells)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))


@pytest.fixture(scope="module")
def site():
    "The site of this checkout, built unless it is up to date."
    done = build(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "_docs"


@pytest.fixture
def sample(tmp_path):
    "A small project with a front page and no chapters yet."
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    write_notebook(tmp_path / "nbs/index.ipynb", ("markdown", "# sample\n> A sample"), ("markdown", "<!-- chapters -->"))
    return tmp_path


@pytest.fixture
def offline(page):
    "A page that may load files only; `page.troubles` lists what went wrong in it."
    page.troubles = []
    page.route(re.compile("^(https?|wss?):"), lambda route: (page.troubles.append(route.request.url), route.abort()))
    page.on("pageerror", lambda error: page.troubles.append(str(error)))
    # aborted are the requests of a page that the browser left while a slow machine still loaded its figures
    page.on("requestfailed", lambda request: page.troubles.append(f"{request.url}: {request.failure}") if "ERR_ABORTED" not in (request.failure or "") else None)
    page.on("console", lambda message: page.troubles.append(message.text) if message.type == "error" else None)
    return page


def pages(site):
    "The pages of a site, without the theme's own files."
    return [p for p in sorted(site.rglob("*.html")) if "_static" not in p.parts]


class Links(HTMLParser):
    "Collects a page's targets and links."
    def __init__(self, text):
        super().__init__()
        self.targets, self.links = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if attributes.get("id"): self.targets.add(attributes["id"])
        if tag == "a" and attributes.get("href"): self.links.add(attributes["href"])


def broken(site):
    "The links inside a site that lead nowhere."
    read = {page.resolve(): Links(page.read_text(encoding="utf-8")) for page in pages(site)}
    found = []
    for page, content in read.items():
        for link in content.links:
            where = urlsplit(link)
            if where.scheme or where.netloc: continue
            target = (page.parent / unquote(where.path)).resolve() if where.path else page
            known = target not in read or not where.fragment or unquote(where.fragment) in read[target].targets
            if not target.exists() or not known: found.append(f"{page.name}: {link}")
    return found


def test_every_link_inside_the_site_leads_somewhere(site):
    assert broken(site) == []


def test_every_chapter_is_in_the_table_and_in_the_sidebar(site, offline):
    chapters = [p for p in pages(site) if p.name not in ("index.html", "search.html", "genindex.html")]
    offline.goto((site / "index.html").as_uri())
    table = offline.eval_on_selector_all("article table a", "links => links.map(a => a.href)")
    sidebar = offline.eval_on_selector_all(".bd-sidebar-primary nav a", "links => links.map(a => a.href)")
    assert table == [link for link in sidebar if link in table]
    assert sorted(set(table)) == sorted(page.as_uri() for page in chapters)


def test_no_page_needs_a_network_or_fails(site, offline):
    for page in pages(site):
        offline.goto(page.as_uri(), wait_until="networkidle")
        assert offline.locator(".katex-error").count() == 0, f"{page.name}: a formula that KaTeX cannot read"
        assert offline.troubles == [], page.name


def test_search_finds_a_page_by_a_name_it_defines(site, offline):
    offline.goto((site / "search.html").as_uri() + "?q=BadInput")
    offline.locator("#search-results a", has_text="checked").first.wait_for()
    assert offline.troubles == []


def test_the_pages_carry_the_figures_and_outputs(site):
    text = (site / "checked.html").read_text(encoding="utf-8")
    assert "did you mean" in text and "cell_output" in text


def test_plots_formulas_and_links_work_without_a_network(sample, offline):
    write_notebook(sample / "nbs/views/20_plots.ipynb",
                   ("markdown", "# plots\n> Live\n\nAn $x^2$ and\n\n$$\\sum_i x_i$$"),
                   ("code", "import holoviews as hv"), ("code", "hv.extension('bokeh')"),
                   ("code", "hv.HoloMap({k: hv.Curve([0, k, 2]) for k in (1, 2)}, kdims='k')"),
                   ("code", "#| hide\nprint('unseen')"))
    done = build(sample)
    assert done.returncode == 0, done.stdout + done.stderr
    offline.goto((sample / "_docs/views/plots.html").as_uri())
    offline.locator("canvas").first.wait_for()
    assert offline.locator("math").count() == 2
    assert "unseen" not in offline.content()
    assert offline.troubles == [] and broken(sample / "_docs") == []


def test_a_failing_cell_fails_the_build_and_names_the_notebook(sample):
    write_notebook(sample / "nbs/broken/30_sums.ipynb", ("markdown", "# sums\n> Wrong"), ("code", "assert 1 + 1 == 3"))
    done = build(sample)
    assert done.returncode != 0
    assert "30_sums.ipynb" in done.stderr and "assert 1 + 1 == 3" in done.stderr
    assert not (sample / "_docs").exists()


def test_a_warning_fails_the_build(sample):
    write_notebook(sample / "nbs/40_links.ipynb", ("markdown", "# links\n> Lost\n\n[nowhere](nowhere.md)"))
    done = build(sample)
    assert done.returncode != 0 and "nowhere" in done.stderr
