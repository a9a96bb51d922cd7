"""Build the documentation site from the chapters, with nothing but installed packages.

    python docs/build.py notebooks     run every notebook, in a copy: this is the notebooks' test
    python docs/build.py site          run them unless that was done, then write the site to _docs/

The committed notebooks carry no outputs, so their figures come from this run. It happens below
`_docsrc/`: the checkout itself is never written to. nbdev reads the cells and their directives, Sphinx
with MyST-NB renders them, and every script a page needs is copied beside it, so that the site
works from a folder on a machine without a network.
"""
import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

from fastcore.nbio import read_nb
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.process import NBProcessor
from nbdev.processors import add_show_docs, clean_magics, hide_, hide_line, filter_stream_, strip_ansi

HERE = Path(__file__).resolve().parent
WORKERS = 2
LONG = 40  # lines of exported code beyond which a page folds it
CHAPTER_SOURCES = "nbs", "sdalab", "data", "pyproject.toml", "settings.ini", "requirements.lock"
UNSEEN = shutil.ignore_patterns(".*", "__pycache__", "_proc")
CHAPTERS_MARK = "<!-- chapters -->"


# --- The folders of one build ---

@dataclass(frozen=True)
class Folders:
    "Where a build reads and writes, below one root."
    root: Path

    @property
    def work(self): return self.root / "_docsrc"

    @property
    def copy(self): return self.work / "run"

    @property
    def pages(self): return self.work / "pages"

    @property
    def site(self): return self.root / "_docs"


def fingerprint(root, names):
    "One hash over the files and folders `names` below `root`."
    total = hashlib.sha256()
    for name in names:
        top = root / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and "__pycache__" not in path.parts and ".ipynb_checkpoints" not in path.parts:
                total.update(str(path.relative_to(root)).encode())
                total.update(path.read_bytes())
    return total.hexdigest()


def is_current(stamp, wanted):
    "Whether the file `stamp` says that what is on disk was made from `wanted`."
    return stamp.is_file() and stamp.read_text() == wanted


# --- Running the notebooks ---

def run_notebooks(folders):
    "Run a copy of every notebook and keep the outputs there; stop with nbdev's report if a cell fails."
    sources = fingerprint(folders.root, CHAPTER_SOURCES)
    shutil.rmtree(folders.copy, ignore_errors=True)
    shutil.copytree(folders.root / "nbs", folders.copy / "nbs", ignore=UNSEEN)
    shutil.copy(folders.root / "pyproject.toml", folders.copy)
    (folders.work / "run.stamp").unlink(missing_ok=True)
    nbdev_test = Path(sys.executable).with_name("nbdev-test")
    command = [nbdev_test, "nbs", "--save", "--timing", "--n-workers", str(WORKERS)]
    started = time.time()
    if subprocess.run(command, cwd=folders.copy, env=one_thread_each()).returncode:
        sys.exit("The notebooks named above do not run.")
    (folders.work / "run.stamp").write_text(sources)
    print(f"The notebooks ran in {time.time() - started:.0f} s.")


def one_thread_each():
    """The environment in which notebooks run side by side without fighting for the cores. MKL is told before any
    product how to multiply (chapter 11): a worker runs several notebooks, and not each begins with the layers."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MKL_CBWR": "AUTO"}


def notebooks_are_current(folders):
    return is_current(folders.work / "run.stamp", fingerprint(folders.root, CHAPTER_SOURCES))


# --- From a notebook to a page ---

@dataclass(frozen=True)
class Chapter:
    "One notebook of the site."
    path: Path     # the executed notebook
    folder: str    # its folder below nbs/, "" at the top
    name: str      # its file name without number and suffix
    number: float  # its number, infinite where it has none
    title: str
    summary: str

    @property
    def page(self): return f"{self.folder}/{self.name}" if self.folder else self.name

    @property
    def group(self): return self.folder.replace("/", ": ").replace("_", " ").capitalize() or "Foundations"


def read_chapter(path, nbs):
    "The chapter in the notebook at `path`: its place from the file name, its title from the first cell."
    number, name = re.fullmatch(r"(?:(\d+)[a-z]?_)?(.+)", path.stem).groups()
    heading = re.match(r"#\s+(.+)(?:\n+>\s*(.+))?", opening(path))
    if not heading: sys.exit(f"{path.relative_to(nbs)}: its first cell must be '# title' and '> one sentence'.")
    folder = path.parent.relative_to(nbs).as_posix()
    return Chapter(path, "" if folder == "." else folder, name, float(number or "inf"), heading[1], heading[2] or "")


def opening(path):
    "The text of a notebook's first markdown cell."
    return next((cell.source for cell in read_nb(path).cells if cell.cell_type == "markdown"), "").strip()


def read_chapters(nbs):
    "All notebooks below `nbs` in reading order: by number within a folder, folders by their first number."
    chapters = [read_chapter(path, nbs) for path in nbs.rglob("*.ipynb")]
    chapters.sort(key=lambda c: (c.number, c.path.name))
    folders = list(dict.fromkeys(c.folder for c in chapters))
    chapters.sort(key=lambda c: folders.index(c.folder))
    pages = [c.page for c in chapters]
    twice = {page for page in pages if pages.count(page) > 1}
    if twice: sys.exit(f"Two notebooks want the same page: {', '.join(sorted(twice))}.")
    return chapters


def exported_module(nb):
    "The module a notebook exports, or None."
    names = [cell.directives["default_exp"] for cell in nb.cells if "default_exp" in cell.directives]
    return f"{get_config().lib_path.name}.{names[0].strip()}" if names else None


def anchor(name):
    "The target that nbdev's links to `name` point at."
    return f'<a id="{name.lower()}"></a>'


def markdown_cell(source, position):
    return {"cell_type": "markdown", "id": f"c{position}", "metadata": {}, "source": source}


def described(cell):
    "The exported name that nbdev added this cell for, or None."
    return re.match(r"show_doc\(([\w.]+)\)", cell.source)[1] if getattr(cell, "has_sd", False) else None


def code_cell(cell, position):
    "A code cell as MyST-NB wants it: nbdev's directives become tags, execution metadata goes."
    return {"cell_type": "code", "id": f"c{position}", "metadata": {"tags": tags(cell)},
            "source": cell.source, "execution_count": None, "outputs": cell.outputs}


def tags(cell):
    "MyST-NB's tags for a cell."
    found = []
    if is_off(cell, "echo"): found.append("remove-input")
    if is_off(cell, "output"): found.append("remove-output")
    if is_exported(cell) and len(cell.source.splitlines()) > LONG: found.append("hide-input")
    return found


def is_off(cell, directive):
    return cell.directives_.get(directive, "").strip() == "false"


def is_exported(cell):
    return bool({"export", "exporti", "exports"} & cell.directives_.keys())


def page_cell(cell, position, lookup):
    "The page's cell for a notebook's cell, or None where there is nothing for a reader."
    if not cell.source.strip() or cell.cell_type == "raw": return None
    if cell.cell_type == "markdown": return markdown_cell(lookup.linkify(cell.source), position)
    if described(cell): return markdown_cell(anchor(described(cell)), position)
    if "default_exp" in cell.directives_ or is_off(cell, "include"): return None
    return code_cell(cell, position)


def page_of(chapter, lookup):
    "The chapter's notebook as a plain MyST notebook."
    nb = read_nb(chapter.path)
    module = exported_module(nb)
    steps = [add_show_docs, clean_magics, hide_line, hide_, filter_stream_, strip_ansi]
    NBProcessor(nb=nb, procs=steps, rm_directives=True, process=True)
    names = [described(cell) for cell in nb.cells if described(cell)]
    cells = [page_cell(cell, i, lookup) for i, cell in enumerate(targets_first(nb.cells))]
    cells = [cell for cell in cells if cell]
    cells[0]["source"] += "\n\n" + loose_anchors(module, names)
    if names: cells.append(markdown_cell(name_index(names), "names"))
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
                "language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def targets_first(cells):
    "The cells with each link target above the exported cell that nbdev added it below."
    ordered = []
    for cell in cells:
        if not described(cell): place = len(ordered)
        ordered.insert(place, cell)
    return ordered


def loose_anchors(module, names):
    "Targets for what has none of its own (methods, private helpers), so that every link finds its page."
    if not module: return ""
    others = {name.removeprefix(module + ".") for name in index_of(module)} - set(names)
    return "".join(anchor(name) for name in sorted(others))


def name_index(names):
    "The page's last section: every exported name, linked to its definition."
    links = [f'<a href="#{name.lower()}"><code>{name}</code></a>' for name in names]
    return "## Defined here\n\n" + " · ".join(links)


def index_of(module):
    "nbdev's index of the names that `module` exports."
    index = import_module(module.split(".")[0] + "._modidx").d
    return index["syms"].get(module, {})


# --- The site ---

def front_page(page, chapters):
    "Put the table of chapters and the navigation into the front page."
    for cell in page["cells"]:
        if CHAPTERS_MARK in cell["source"]: cell["source"] = chapter_tables(chapters)
    page["cells"].append(markdown_cell(navigation(chapters), "navigation"))
    return page


def chapter_tables(chapters):
    "One table a group: the chapter, and what it says."
    lines = []
    for group, members in groupby(chapters, key=lambda c: c.group):
        lines += ["", f"### {group}", "", "| Chapter | What it is about |", "|:--|:--|"]
        lines += [f"| [{c.title}]({c.page}.ipynb) | {c.summary.replace('|', chr(92) + '|')} |" for c in members]
    return "\n".join(lines)


def navigation(chapters):
    "Sphinx's table of contents, hidden: the sidebar shows it."
    lines = []
    for group, members in groupby(chapters, key=lambda c: c.group):
        lines += ["```{toctree}", ":hidden:", f":caption: {group}", "", *[c.page for c in members], "```", ""]
    return "\n".join(lines)


def write_pages(folders):
    "Write what Sphinx reads: one MyST notebook a chapter, and the pictures the chapters refer to."
    nbs = folders.copy / "nbs"
    shutil.rmtree(folders.pages, ignore_errors=True)
    shutil.copytree(nbs, folders.pages, ignore=shutil.ignore_patterns("*.ipynb", "*.py", ".*", "__pycache__"))
    lookup = NbdevLookup(incl_libs=get_config().lib_path.name)
    chapters = read_chapters(nbs)
    for chapter in chapters:
        page = page_of(chapter, lookup)
        if chapter.page == "index": page = front_page(page, [c for c in chapters if c.page != "index"])
        target = folders.pages / f"{chapter.page}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(page), encoding="utf-8")


def render(folders):
    "Run Sphinx; a warning is an error."
    shutil.rmtree(folders.site, ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-c", HERE,
               "-d", folders.work / "doctrees", "-E", folders.pages, folders.site]
    if subprocess.run(command).returncode: sys.exit("Sphinx's warnings above are errors here.")


def relative(folder, page):
    "The way from a page to a folder, as a link."
    return Path(os.path.relpath(folder, page.parent)).as_posix()


def make_local(folders):
    "Turn links to the published site and to script networks into links to files beside the pages."
    cfg, scripts, wanted = get_config(), folders.site / "_static" / "plots", set()
    home = cfg.doc_host + cfg.doc_baseurl.rstrip("/") + "/"
    for page in folders.site.rglob("*.html"):
        here, text = relative(scripts, page), page.read_text(encoding="utf-8")
        text = text.replace(home, relative(folders.site, page) + "/")
        text, bokeh = re.subn(r'https://[^"\s]*?/bokeh/release/(bokeh[a-z-]*?)-\d[\d.]*\.min\.js', rf"{here}/bokeh/\1.min.js", text)
        text, panel = re.subn(r'https://[^"\s]*?/(?:panel/|@holoviz/panel@)\d[\d.]*/dist/', f"{here}/panel/", text)
        page.write_text(text, encoding="utf-8")
        wanted |= {name for name, found in (("bokeh", bokeh), ("panel", panel)) if found}
    if "bokeh" in wanted: copy_bokeh(scripts / "bokeh")
    if "panel" in wanted: copy_panel(scripts / "panel")


def copy_bokeh(target):
    "The scripts of Bokeh, as its wheel ships them."
    target.mkdir(parents=True)
    for script in (package_folder("bokeh") / "server/static/js").glob("bokeh*.min.js"): shutil.copy(script, target)


def copy_panel(target):
    "The scripts of Panel, as its wheel ships them: what its plots and widgets load, without its templates."
    dist = package_folder("panel") / "dist"
    shutil.copytree(dist, target, ignore=shutil.ignore_patterns("*.map", "*.json", "bundled", "dts", "lib"))
    for part in "theme", "reactiveesm": shutil.copytree(dist / "bundled" / part, target / "bundled" / part)


def package_folder(name):
    "Where an installed package lies, without importing it."
    return Path(find_spec(name).origin).parent


def build_site(folders):
    "Run the notebooks where needed, then write the site where needed."
    if not notebooks_are_current(folders): run_notebooks(folders)
    wanted = (folders.work / "run.stamp").read_text() + fingerprint(HERE, ["."])
    stamp = folders.site / "build.stamp"
    if is_current(stamp, wanted): return print(f"{folders.site}/index.html is up to date.")
    started = time.time()
    write_pages(folders)
    render(folders)
    make_local(folders)
    stamp.write_text(wanted)
    print(f"{folders.site}/index.html was built in {time.time() - started:.0f} s.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["notebooks", "site"])
    parser.add_argument("--root", type=Path, default=HERE.parent, help="the folder that holds nbs/ and pyproject.toml")
    args = parser.parse_args()
    folders = Folders(args.root.resolve())
    os.chdir(folders.root)  # nbdev finds its settings from here
    run_notebooks(folders) if args.what == "notebooks" else build_site(folders)


if __name__ == "__main__": main()
