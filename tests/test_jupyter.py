"The views as objects in JupyterLab, in a real browser that reaches nothing but this machine."
import json
import os
import socket
import sys
import urllib.request
from pathlib import Path

import nbformat
import pytest

from sdalab.views.following import sample_run

sys.path.insert(0, str(Path(__file__).parent))
from test_live import POLLING, browser, press, processes, profile, shows, train, wait_until  # noqa: E402, F401

TOKEN, BUSY = "only-for-this-test", 120_000  # ms that a kernel may take on a busy machine
FOLDERS = "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR"
SERVER = ("--no-browser", "--allow-root", "--ip=127.0.0.1", "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}", "--LabApp.extension_manager=readonly",
          "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate")
SILENT = dict(fetchNews="false", checkForUpdates=False)  # else Lab asks whether it may fetch the news
# Each output of Lab is a document of Bokeh's of its own.
MODELS = "(window.Bokeh?.documents ?? []).flatMap((page) => [...page._all_models.values()])"


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def lab(processes, folder, tmp_path_factory):
    "JupyterLab for a folder, with no settings but its own: its address."
    own = tmp_path_factory.mktemp("settings")
    silent = own / "JUPYTERLAB_SETTINGS_DIR/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    silent.parent.mkdir(parents=True)
    silent.write_text(json.dumps(SILENT))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {name: str(own / name) for name in FOLDERS}
    processes("-m", "jupyterlab", *SERVER, f"--port={port}", f"--ServerApp.root_dir={folder}", env=os.environ | places | dict(PYTHONPATH=os.pathsep.join(sys.path)), stderr=(own / "log").open("w"))
    address = f"http://127.0.0.1:{port}"
    wait_until(lambda: answers(f"{address}/api/status?token={TOKEN}"), "JupyterLab", BUSY / 1000)
    return address


def answers(url):
    "Whether a server is there."
    try: return urllib.request.urlopen(url).status == 200
    except OSError: return False


@pytest.fixture
def notebook(lab, folder, browser):
    "Writes a notebook, opens it in Lab and runs all its cells."
    def run(name, *cells):
        made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        made.metadata.kernelspec = dict(name="python3", display_name="Python 3", language="python")
        nbformat.write(made, folder / f"{name}.ipynb")
        browser.goto(f"{lab}/lab/tree/{name}.ipynb?token={TOKEN}&reset")
        browser.get_by_text("| Idle").wait_for(timeout=BUSY)
        browser.get_by_text("Run", exact=True).click()
        browser.get_by_text("Run All Cells", exact=True).click()
        browser.get_by_text(f"[{len(cells)}]:").first.wait_for(timeout=BUSY)
        return browser
    return run


def until(page, condition, argument=None):
    "Waits in the browser for a condition on `models`, those of all outputs."
    page.wait_for_function(f"(argument) => {{ const models = {MODELS}; return {condition} }}", arg=argument, polling=POLLING)


def tap(page, node):
    "Taps the bar of a node in the tree."
    found = """(node) => {
        const models = MODELS, figure = models.findLast((m) => m.type === 'Figure' && m.title.text.startsWith('Time goes right'))
        const data = models.findLast((m) => m.type === 'ColumnDataSource' && m.data.decision && m.data.left)?.data, at = data ? [...data.node].indexOf(node) : -1
        const view = figure && Bokeh.index.find_one(figure)
        if (!view || at < 0) return null
        view.el.scrollIntoView({block: 'center'})
        const box = view.el.getBoundingClientRect()
        return box.width > 0 && [box.x + view.frame.x_scale.compute(data.right[at] * 0.75 + data.left[at] * 0.25), box.y + view.frame.y_scale.compute(data.row[at])]
    }""".replace("MODELS", MODELS)
    page.mouse.click(*page.wait_for_function(found, arg=node, polling=POLLING).json_value())


IMPORTS = "import panel as pn\nfrom sdalab.views.branches import TreeView\nfrom sdalab.views.compare import CompareView\nfrom sdalab.views.now import RunView\nfrom sdalab.views.past import ReplayView\npn.extension('tabulator', inline=True)"


def test_views_are_drawn_and_answer(notebook, folder):
    sample_run(folder)
    page = notebook("stored", IMPORTS, "RunView('sample')", "ReplayView('sample')", "CompareView(['sample'])", "tree = TreeView('sample', node=1)\ntree")
    shows(page, "status", "finished")
    until(page, "models.filter((m) => m.type === 'Figure' && Bokeh.index.find_one(m)).length >= 7")
    until(page, "models.some((m) => m.data?.smooth && m.data.loss?.length === 60)")
    page.get_by_text("steps taken in 4 nodes").wait_for()
    page.locator(".tabulator-row").filter(has_text="sample").first.wait_for()
    page.get_by_text("Node 1", exact=True).wait_for()
    tap(page, 2)
    page.get_by_text("Node 2", exact=True).wait_for()
    until(page, "!models.some((m) => m.type?.endsWith('HTML') && m.text?.includes('Node 1'))")


def test_views_of_a_run_that_trains_keep_up(notebook, folder, train):
    process, run = train(folder / "young", rate=10, steps=100_000, lanes=2)
    page = notebook("young", IMPORTS, "RunView('young')", "TreeView('young')")
    shows(page, "status", "running")
    last = page.wait_for_function(f"() => {MODELS}.find((m) => m.data?.smooth && m.data.loss?.length)?.data.step.at(-1)", polling=POLLING).json_value()
    until(page, "models.some((m) => m.data?.smooth && m.data.step.at(-1) > argument)", last + 5)
    process.terminate()
