"What the live page costs: opening a very long run, zooming, the way of a point to the screen, a tick on the wire, and five viewers beside training."
import asyncio
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.websocket import websocket_connect

from bench.rows import Row
from sdalab.journal.reader import Run, fetch, reading
from sdalab.journal.schema import signal_columns
from sdalab.journal.writer import Journal
from sdalab.views.following import PROBABILITIES, Tail
from sdalab.views.now import RunView

STEPS, SHORT, VIEWERS = 1_000_000, 2_000, 5  # of the long run; of one that is opened beside it; pages open at once
PAIRS, TURN, POINTS = 20, 6.0, 200  # turns with and without viewers, and seconds of each; points whose way to the screen is timed
ROOT = Path(__file__).parents[1]
NAMES = [*(name for name in signal_columns() if name != "validation_loss" and not name.startswith(("regime_", "index_", "uncertainty")))][:19]
WATCHED = [*NAMES, "uncertainty_index", "index_volatility", "index_entropy", "index_disagreement", *PROBABILITIES]


def live_rows():
    "On the server, and in a real browser where there is one."
    with tempfile.TemporaryDirectory() as folder:
        write_long(Path(folder) / "long")
        write_long(Path(folder) / "short", SHORT)
        yield from server_rows(Path(folder) / "long")
        if program := find_chromium():
            yield from browser_rows(Path(folder), program)
        yield training_row(Path(folder))


def write_long(run_dir: Path, steps: int = STEPS):
    "A run of one lane with thirty signals."
    rng, names = np.random.default_rng(0), WATCHED
    values = rng.standard_normal((len(names), 1000))
    values[-len(PROBABILITIES):] = np.abs(values[-len(PROBABILITIES):]) / np.abs(values[-len(PROBABILITIES):]).sum(0)
    cells = [[[float(value)] for value in row] for row in values]
    with Journal.create(run_dir, dict(steps=steps, rows=8, model=dict(context=64)), {}) as journal:
        node = journal.node(0, settings=dict(seed=0))
        for step in range(steps):
            journal.steps(step, [node], {name: cells[i][step % 1000] for i, name in enumerate(names)})


def server_rows(run_dir: Path):
    "Processor time of the server: from a journal to all that a first picture shows, and of a zoom."
    size = (run_dir / "journal.db").stat().st_size / 2**20
    start = time.process_time()
    tail = Tail(run_dir)
    view = RunView(source=lambda names: look(tail, names))
    view.tick()
    opened = time.process_time() - start
    yield Row(f"live: open {STEPS:,} steps x {len(WATCHED)} signals, server", opened, "s", limit=f"processor time; a file of {size:.0f} MiB", target="<= 2")
    view.tick()
    zooms = []
    for i in range(9):
        start = time.process_time()
        view.charts._look_at((1e5 * i, 1e5 * i + 5e4))
        zooms.append(time.process_time() - start)
    yield Row("live: a zoom into it, server", 1e3 * statistics.median(zooms), "ms", limit="processor time", target="<= 200")


def look(tail: Tail, names) -> object:
    "The next moment, with some further columns."
    tail.wanted |= frozenset(names)
    return tail.look()


def find_chromium() -> str | None:
    "The browser, where there is one."
    named = os.environ.get("CHROMIUM")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)


@contextmanager
def served(folder: Path):
    "The page for a folder, in a process of its own: its address and process."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "panel", "serve", str(ROOT / "dashboards/live.py"), "--address", "127.0.0.1", "--port", str(port), "--args", str(folder)]
    log = (folder / "log").open("w+")
    process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        while "app running" not in (folder / "log").read_text():
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/live", process
    finally:
        process.terminate()
        process.wait(20)


MODELS = "[...new Set(window.Bokeh?.documents[0]?.roots().flatMap((root) => [...root.references()]))]"  # on the page; the browser keeps others for a while
FULL = """() => {
    const models = MODELS, painted = (view) => view?.has_finished() && view.bbox.width > 0
    return models.some((m) => m.data?.smooth && m.data.loss && m.data.step.length > 100) && models.every((m) => m.type !== 'Figure' || painted(Bokeh.index.find_one(m)))
}""".replace("MODELS", MODELS)  # the points are there, and all figures are painted
DRAGGED = """() => { addEventListener('pointerup', () => {
    const source = MODELS.find((m) => m.data?.smooth && m.data.loss), before = source.data, released = performance.now()
    const wait = () => source.data === before ? setTimeout(wait, 2) : requestAnimationFrame(() => setTimeout(() => { window.dragged = performance.now() - released }))
    wait()
}, {capture: true, once: true}) }""".replace("MODELS", MODELS)


def drag(page) -> float:
    "Milliseconds from the release of the mouse after a drag across the loss until the new points are painted."
    plot = page.locator(".bk-Figure").first.bounding_box()
    page.evaluate("() => { delete window.dragged }")
    page.evaluate(DRAGGED)
    page.mouse.move(plot["x"] + 0.4 * plot["width"], plot["y"] + 0.5 * plot["height"])
    page.mouse.down()
    page.mouse.move(plot["x"] + 0.6 * plot["width"], plot["y"] + 0.5 * plot["height"], steps=3)
    page.mouse.up()
    took = page.wait_for_function("window.dragged", timeout=120_000).json_value()
    page.wait_for_timeout(500)
    return took


def browser_rows(folder: Path, program: str):
    "What a viewer waits for, what a step sends, and what five viewers take."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright, served(folder) as (address, process):
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        opened, zoomed = {}, {}
        for name in ("short", "long") * 3:  # in turn, so that what else the machine does falls on both
            page = browser.new_page(viewport=dict(width=1280, height=1000))
            start = time.perf_counter()
            page.goto(f"{address}?run={name}")
            page.wait_for_function(FULL, timeout=120_000, polling="raf")
            opened.setdefault(name, []).append(time.perf_counter() - start)
            page.wait_for_timeout(1000)
            zoomed.setdefault(name, []).extend(drag(page) for _ in range(3))  # each into the one before
            page.close()
        yield against_short("live: the same in a browser, page included", opened, "s", "scripts are loaded anew", "<= 2")
        yield against_short("live: a zoom, in a browser", zoomed, "ms", "from the mouse's release until the new points are painted", "<= 200")
        training = subprocess.Popen([sys.executable, "tests/synthetic_run.py", str(folder / "eight"), "--rate", "20", "--steps", "100000", "--sensed", "1"], cwd=ROOT)
        try:
            yield screen_row(browser, address, folder / "eight")
            yield from viewer_rows(browser, address, process)
        finally:
            training.terminate()
            training.wait(20)


def against_short(what: str, found: dict, unit: str, limit: str, target: str) -> Row:
    "A row of what the long run takes, against a short run: what they share is the page, the browser and the machine."
    long, short = (statistics.median(found[name]) for name in ("long", "short"))
    return Row(what, long, unit, against=f"a run of {SHORT:,} steps: {short:.3g} {unit}, {long / short:.2f} times", limit=limit, target=target)


ARRIVALS = """(count) => new Promise((done) => {
    const source = MODELS.find((m) => m.data?.smooth && m.data.loss), seen = []
    let last = source.data.step.at(-1)
    const look = () => {
        const fresh = [...source.data.step].filter((step) => step > last)
        if (fresh.length) last = fresh.at(-1)
        if (fresh.length) requestAnimationFrame(() => setTimeout(() => seen.push(...fresh.map((step) => [step, Date.now() / 1000]))))
        seen.length < count ? setTimeout(look, 5) : done(seen)
    }
    look()
})""".replace("MODELS", MODELS)


def screen_row(browser, address: str, run_dir: Path) -> Row:
    "Of each step the time from when it was written into the journal's buffer until its point was painted."
    page = browser.new_page()
    page.goto(f"{address}?run={run_dir.name}")
    page.wait_for_function(FULL.replace("length > 100", "length > 5"), timeout=120_000, polling=20)
    page.wait_for_timeout(3000)
    seen = page.evaluate(ARRIVALS, POINTS)
    page.close()
    with reading(run_dir) as db:
        rows = fetch(db, ["step", "wall_time"])
    begun = dict(zip(rows["step"], rows["wall_time"]))
    late = [painted - begun[step] for step, painted in seen]
    return Row(f"live: from a step to its point on the screen, worst of {len(late)}", max(late), "s", against=f"median {statistics.median(late):.2f} s",
               limit="8 lanes, 20 steps a second: a look every 0.5 s (0.75 s for more than two viewers), right after the journal's writer; the message, the paint", target="<= 1")


READY = '{"events": [{"kind": "MessageSent", "msg_type": "bokeh_event", "msg_data": {"type": "event", "name": "document_ready", "values": {"type": "map"}}}]}'


async def view(address: str):
    "A viewer on another machine: takes what a browser takes, and draws nothing."
    page = (await AsyncHTTPClient().fetch(address)).body.decode()
    token = re.search(r'"token": ?"([^"]+)"', page)[1]
    place = address.split("?")[0]
    socket = await websocket_connect(HTTPRequest(place.replace("http", "ws", 1) + "/ws", headers={"Origin": place.rsplit("/", 1)[0]}), subprotocols=["bokeh", token])
    for _ in range(3):  # the server's greeting
        await socket.read_message()
    for parts in (['{"msgid": "1", "msgtype": "PULL-DOC-REQ"}', "{}", "{}"], ['{"msgid": "2", "msgtype": "PATCH-DOC"}', "{}", READY]):
        for part in parts:
            await socket.write_message(part)
    while await socket.read_message() is not None:
        pass


async def views(address: str):
    "All viewers, until the server ends."
    await asyncio.gather(*(view(address) for _ in range(VIEWERS)))


def training_row(folder: Path) -> Row:
    "How much longer a step takes while the viewers are served: turns with the server running and stopped, in pairs."
    sets = ["sweep.seed=[0,1,2,3,4,5,6,7]", "evaluate_every=1000000", "checkpoints.every=1000000", 'monitor.preset="light"']
    command = [sys.executable, "-m", "sdalab.cli", "train", "edge-95k", "--runs", str(folder), "--name", "training", "--steps", "1000000", *(word for one in sets for word in ("--set", one))]
    training = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (folder / "training/journal.db").exists() or Run(folder / "training").progress().get("step", 0) < 100:
            time.sleep(0.5)
        with served(folder) as (address, process):
            threading.Thread(target=lambda: asyncio.run(views(f"{address}?run=training")), daemon=True).start()
            time.sleep(10)
            turns = [turn(process, running) for pair in range(PAIRS) for running in ((True, False) if pair % 2 else (False, True))]
    finally:
        training.terminate()
        training.wait(60)
    with reading(folder / "training") as db:
        rows = fetch(db, ["step", "wall_time"])
    times = np.sort(rows["wall_time"][np.unique(rows["step"], return_index=True)[1]])
    seconds = {running: np.array([np.diff(times[(times > start + 0.3) & (times < end)]).mean() for is_on, start, end in turns if is_on == running]) for running in (True, False)}
    slower = 100 * (seconds[True] / seconds[False] - 1)
    low, high = np.quantile(np.median(np.random.default_rng(0).choice(slower, (2000, PAIRS)), axis=1), [0.025, 0.975])
    return Row(f"live: {VIEWERS} viewers slow training of edge-95k, 8 lanes", float(np.median(slower)), "% of a step", against=f"a step without: {1e3 * np.median(seconds[False]):.1f} ms",
               limit=f"{PAIRS} pairs of turns of {TURN:g} s, 95 % {low:.1f} to {high:.1f} %; {os.cpu_count()} cores; their browsers draw elsewhere", target="<= 3")


def turn(process, running: bool) -> tuple[bool, float, float]:
    "Some seconds with the server running or stopped, and when they began and ended."
    process.send_signal(signal.SIGCONT if running else signal.SIGSTOP)
    start = time.time()
    time.sleep(TURN)
    process.send_signal(signal.SIGCONT)
    return running, start, start + TURN


def viewer_rows(browser, address: str, process):
    "Five pages on a run of eight lanes that takes twenty steps a second."
    frames, pages = [], [browser.new_page() for _ in range(VIEWERS)]
    pages[0].on("websocket", lambda ws: ws.on("framereceived", lambda frame: frames.append(len(frame))))
    for page in pages:
        page.goto(f"{address}?run=eight")
    for page in pages:
        page.wait_for_selector(".bk-Figure", timeout=120_000)
    pages[0].wait_for_timeout(3000)  # not asleep: what comes meanwhile is counted before
    server, sent, start = psutil.Process(process.pid), len(frames), time.perf_counter()
    before = sum(server.cpu_times()[:2])
    pages[0].wait_for_timeout(20_000)
    wall = time.perf_counter() - start
    share = 100 * (sum(server.cpu_times()[:2]) - before) / (wall * (os.cpu_count() or 1))
    yield Row(f"live: {VIEWERS} viewers of a run of 8 lanes", share, "% of the machine", limit=f"the server's processor time, {os.cpu_count()} cores")
    yield Row("live: a tick of the page with 10 new steps of 8 lanes", sum(frames[sent:]) / (wall / 0.5) / 1e3, "kB", limit="all that came through the websocket", target="<= 20")
    for page in pages:
        page.close()
