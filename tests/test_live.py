"The live page in a real browser, served by one process and fed by another."
import io
import json
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image, ImageColor

from sdalab.journal.reader import Run
from sdalab.journal.schema import create_tables
from sdalab.journal.tree import main_lines
from sdalab.views.following import Tail, sample_run
from sdalab.views.ribbons import HUES, WORDS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from synthetic_run import ALARM, REGIMES, SHOCK, WARM_UP, index_of, planted  # noqa: E402

POLLING = 150  # ms; looking at every frame would keep the page from its work
PATIENCE = 120.0  # seconds for what takes a second on an idle machine
# The browser keeps what was taken off the page for a while; these are the models that are on it.
MODELS = "((page) => ((on) => [...page?._all_models.values() ?? []].filter((m) => on.has(m)))(new Set(page?.roots().flatMap((r) => [...r.references()]))))(window.Bokeh?.documents[0])"
MARKUP = "<img src=x onerror=document.title='taken'>&amp;"


def wait_until(true, what, seconds=PATIENCE):
    "Waits for a condition outside the browser."
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def processes():
    "Starts processes, and ends those that still run."
    started = []

    def start(*command, **options):
        started.append(subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, **options))
        return started[-1]
    yield start
    for process in started:
        if process.poll() is None: process.send_signal(signal.SIGTERM)
    for process in started: process.wait(PATIENCE)


@pytest.fixture(scope="module")
def train(processes):
    "Starts a process that writes a run, and returns it with the run."
    def start(run_dir, **options):
        words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
        process = processes("tests/synthetic_run.py", run_dir, *words)
        wait_until((run_dir / "journal.db").is_file, "the journal")
        return process, Run(run_dir)
    return start


@pytest.fixture(scope="module")
def serve(processes, tmp_path_factory):
    "Serves the page for a folder of runs, as its documentation says, and returns its address."
    def start(folder, address="127.0.0.1", *options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = tmp_path_factory.mktemp("serve") / "log"
        processes("-m", "panel", "serve", "dashboards/live.py", "--address", address, "--port", port, *options, "--args", folder, stderr=log.open("w"))
        wait_until(lambda: "app running" in log.read_text(), "the server", PATIENCE)
        return f"http://localhost:{port}/live" if address == "0.0.0.0" else f"http://127.0.0.1:{port}/live"
    return start


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def address(serve, runs):
    "One server for the tests of this file; its folder begins empty."
    return serve(runs)


@pytest.fixture(scope="module")
def profile(chromium):
    "One browser profile for this file: the page's scripts are fetched and compiled once."
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    yield context
    context.close()


@pytest.fixture
def browser(profile, request, tmp_path):
    "A page that lists in `troubles` every error and every request that leaves this machine; where a test fails, what it showed is kept."
    page = profile.new_page()
    page.troubles, page.frames_seen = [], []
    page.on("pageerror", lambda error: page.troubles.append(str(error)))
    page.on("console", lambda message: page.troubles.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if re.match(r"(https?://(127\.0\.0\.1|(\w+\.)?localhost)[:/]|data:|blob:|file:)", request.url)
            else page.troubles.append(request.url))
    page.on("websocket", lambda ws: ws.on("framereceived", lambda frame: page.frames_seen.append(frame)))
    page.set_default_timeout(PATIENCE * 1000)
    failed = request.session.testsfailed
    yield page
    if request.session.testsfailed > failed: page.screenshot(path=tmp_path / "failed.png", full_page=True)
    page.close()
    assert page.troubles == []


def visit(page, address):
    "Goes there, and waits until everything on the page is in its place: the picture comes before that."
    page.goto(address)
    page.wait_for_function("window.Bokeh?.documents[0]?.is_idle", polling=POLLING)


def see_refused(page, address):
    "Asks for a page by a name of this machine that its server was not told."
    other = address.replace("127.0.0.1", "lab.localhost")
    page.goto(other)
    page.get_by_text(f"This page is not shown under the name {urlsplit(other).netloc}").wait_for()
    assert page.locator(".bk-Figure, button").count() == 0


def card(page, what):
    "The text of a headline number."
    return page.locator(f".card:has(.what:text-is('{what}'))")


def shows(page, what, pattern):
    "Waits until a headline number matches."
    page.wait_for_function("""([what, pattern]) => {
        const all = (root) => [...root.querySelectorAll('*')].flatMap((e) => [e, ...(e.shadowRoot ? all(e.shadowRoot) : [])])
        const found = all(document).find((e) => e.classList?.contains('card') && e.querySelector('.what')?.textContent === what)
        return found && new RegExp(pattern).test(found.textContent.slice(what.length))
    }""", arg=[what, pattern], polling=POLLING)


def points(page, column="loss"):
    "How many points the browser holds of each lane, and the last step."
    return page.evaluate("""(column) => {
        const sources = MODELS.filter((m) => m.type === 'ColumnDataSource' && m.data[column] && m.data.smooth)
        return sources.map((s) => [s.data.step.length, s.data.step[s.data.step.length - 1]])
    }""".replace("MODELS", MODELS), column)


def until(page, condition, argument=None):
    "Waits in the browser for a condition on `models`, all of Bokeh's."
    page.wait_for_function(f"(argument) => {{ const models = {MODELS}; return {condition} }}", arg=argument, polling=POLLING)


def sources(page, *columns):
    "The data of every source in the browser that has one of the columns, by the order of the lanes, all at one moment."
    return page.evaluate("""(columns) => MODELS.filter((m) => m.type === 'ColumnDataSource' && columns.some((c) => m.data[c]))
        .map((s) => Object.fromEntries(Object.entries(s.data).map(([name, values]) => [name, [...values]])))""".replace("MODELS", MODELS), list(columns))


def spot(page, title, step, height):
    "Where on the page a step and a height of the figure with such a title are; None is near the bottom."
    page.wait_for_function("""(title) => MODELS.some((m) => m.type === 'Figure' && m.title.text.startsWith(title)
        && Bokeh.index.find_one(m)?.el.getBoundingClientRect().width > 0)""".replace("MODELS", MODELS), arg=title, polling=POLLING)
    return page.evaluate("""([title, step, height]) => {
        const figure = MODELS.find((m) => m.type === 'Figure' && m.title.text.startsWith(title))
        const view = Bokeh.index.find_one(figure)
        view.el.scrollIntoView({block: 'center'})
        const box = view.el.getBoundingClientRect()
        return [box.x + view.frame.x_scale.compute(step), box.y + (height === null ? view.frame.bbox.bottom - 9 : view.frame.y_scale.compute(height))]
    }""".replace("MODELS", MODELS), [title, step, height])


def colour_at(page, title, step, height):
    "What is painted there: red, green, blue."
    x, y = spot(page, title, step, height)
    clip = dict(x=round(x), y=round(y), width=1, height=1)
    return np.array(Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB").getpixel((0, 0)), dtype=float)


def nearest_regime(colour):
    "Number of the regime whose colour on white, at any opacity, is nearest."
    inks = [np.array(ImageColor.getrgb(hue)) for hue in HUES]
    return int(np.argmin([min(np.abs(255 + a * (ink - 255) - colour).sum() for a in np.linspace(0.4, 1, 61)) for ink in inks]))


def press(page, name): page.get_by_role("button", name=name, exact=True).click()


def test_empty_then_a_run_appears(address, runs, browser, train):
    visit(browser, address)
    assert "sdalab train" in browser.locator(".message code").last.inner_text()
    assert str(runs) in browser.locator(".message").inner_text()
    assert browser.get_by_role("button", name="Pause").is_disabled()
    process, run = train(runs / "first", steps=120, rate=200, lanes=3)
    shows(browser, "status", "finished")
    shows(browser, "step", "120.*of 120")
    assert process.wait(PATIENCE) == 0
    wait_until(lambda: browser.get_by_role("button", name="Stop").is_disabled(), "nobody is there to obey, so the button is off")
    assert "run=first" in browser.url
    losses = run.signals(["validation_loss"])["validation_loss"]
    validation, first = losses.min().item(), losses.isel(node=0)
    browser.get_by_role("button", name=f"lr 1e-4 · best {first.min().item():.4g} at {first.argmin('step').item()}").wait_for()  # beside the lane, and in the table
    assert f"{first.min().item():.3f} ({first.argmin('step').item()})" in browser.locator("tbody tr").first.inner_text()
    assert f"{validation:.3f} nats" in card(browser, "best validation loss").inner_text()
    assert f"{validation / np.log(2):.3f} bits/char" in card(browser, "best validation loss").inner_text()


def test_points_stream_in_and_the_run_obeys(address, runs, browser, train):
    process, run = train(runs / "obeys", at_once=300, rate=40, steps=100_000)
    visit(browser, f"{address}?run=obeys")
    shows(browser, "status", "running")
    bar = browser.get_by_role("progressbar", name="steps")
    assert re.fullmatch(r"step [\d,]+ of 100,000 · \d+% · 40 steps/s · \d+ min \d+ s left", bar.inner_text()) and bar.get_attribute("aria-valuemax") == "100000"
    before = points(browser)
    assert len(before) == 8
    until(browser, "models.some((m) => m.data?.smooth && m.data.step.at(-1) > argument + 40)", max(step for _, step in before))
    after = points(browser)
    assert all(now > then for (_, then), (_, now) in list(zip(before, after))[:7])
    assert after[7] == before[7] and "1 frozen" in card(browser, "lanes").inner_text()  # the lane that was too hot
    assert "frozen at step" in browser.locator("tbody tr").nth(7).inner_text()
    assert browser.locator("tbody tr").count() == 8

    hold = browser.get_by_role("button", name="Hold view")
    hold.focus()
    browser.keyboard.press("Enter")  # the view pauses, and not the training
    behind = browser.get_by_role("button", name=re.compile(r"Paused view: catch up \(\+\d\d"))
    behind.wait_for()
    held, headline = points(browser), browser.locator(".progress").inner_text()
    browser.get_by_label("Log loss").click()  # what is held can be looked at in other ways
    until(browser, "models.some((m) => m.type === 'Figure' && m.title.text === 'Training loss, nats per token (log)')")
    last = run.rows_since(0, ["loss"])[1]
    wait_until(lambda: run.rows_since(0, ["loss"])[1] > last, "the training goes on")
    assert [step for _, step in points(browser)] == [step for _, step in held] and browser.locator(".progress").inner_text() == headline
    behind.focus()
    browser.keyboard.press("Enter")
    hold.wait_for()
    until(browser, "models.some((m) => m.data?.smooth && m.data.step.at(-1) > argument + 10)", max(step for _, step in held))

    press(browser, "Pause")
    shows(browser, "status", "paused")
    wait_until(lambda: run.status() == "paused", "the writer pauses")
    browser.get_by_text("acknowledged").first.wait_for()
    still = run.rows_since(0, ["loss"])[1]
    time.sleep(0.6)
    assert run.rows_since(0, ["loss"])[1] == still
    assert browser.get_by_role("button", name="Pause", exact=True).is_disabled()

    press(browser, "Resume")
    shows(browser, "status", "running")
    wait_until(lambda: run.rows_since(still, ["loss"])[1] > still, "the writer goes on")

    press(browser, "Stop")
    press(browser, "Keep training")
    browser.get_by_role("dialog").wait_for(state="hidden")
    assert run.status() == "running"
    press(browser, "Stop")
    press(browser, "Stop the run")
    shows(browser, "status", "interrupted")
    assert process.wait(PATIENCE) == 0
    assert list(run.commands()["kind"]) == ["pause", "resume", "stop"] and set(run.commands()["status"]) == {"done"}


def test_what_a_run_does_while_a_slow_browser_connects_is_seen(address, runs, browser, train):
    process, run = train(runs / "slow", steps=100_000, rate=5, lanes=1)
    asked = []
    browser.route("**/panel-material-ui.bundle.js*", lambda route: (asked.append(time.sleep(3)), route.continue_()))  # so long it has the document, and is not ready
    visit(browser, f"{address}?run=slow")
    until(browser, "models.find((m) => m.data?.smooth)?.data.step.length > 60")
    steps, = (source["step"] for source in sources(browser, "smooth"))
    assert asked and steps == list(range(len(steps)))
    process.terminate()
    process.wait(PATIENCE)


def test_a_real_training_run_is_watched_and_stopped(address, runs, browser, processes):
    "The trainer itself in another process: its lanes stream in, and the page's stop ends it as it should."
    process = processes("-m", "sdalab.cli", "train", "edge-95k", "--runs", runs, "--name", "real", "--steps", 1_000_000,
                        "--set", "rows=2", "--set", "sweep.learning_rate=[1e-3, 1e-2, 1e-1]")
    wait_until(lambda: (runs / "real" / "journal.db").exists(), "the run", PATIENCE)
    visit(browser, f"{address}?run=real")
    shows(browser, "status", "running")
    wait_until(lambda: len(points(browser)) == 3, "three lanes")
    first = points(browser)[0][1]
    wait_until(lambda: points(browser)[0][1] > first, "further steps")
    press(browser, "Stop")
    press(browser, "Stop the run")
    shows(browser, "status", "interrupted")
    assert process.wait(PATIENCE) == 130
    assert Run(runs / "real").commands()["status"].tolist() == ["done"]


def test_one_step_is_a_small_message_and_charts_can_be_explored(address, runs, browser, train):
    train(runs / "small", at_once=3000, rate=4, steps=100_000)
    visit(browser, f"{address}?run=small")
    shows(browser, "step", "^3,")
    assert all(count <= 2000 for count, _ in points(browser))  # thinned
    browser.wait_for_timeout(1500)
    first, sent = max(step for _, step in points(browser)), len(browser.frames_seen)
    until(browser, 'models.some((m) => m.data?.smooth && m.data.step.at(-1) >= argument + 6)', first)
    steps = max(step for _, step in points(browser)) - first
    size = sum(len(frame) for frame in browser.frames_seen[sent:])
    assert steps >= 6 and size / steps < 20_000, f"{size / steps:.0f} bytes a step"

    titles = lambda: browser.evaluate(f"() => {MODELS}.filter((m) => m.type === 'Figure').map((f) => f.title.text)")
    assert titles()[0] == "Training loss, nats per token"
    browser.get_by_label("Log loss").click()
    until(browser, "models.some((m) => m.type === 'Figure' && m.title.text === 'Training loss, nats per token (log)')")
    browser.wait_for_timeout(300)  # the new figures take their places
    plot = browser.locator(".bk-Figure").first.bounding_box()
    middle = plot["y"] + plot["height"] / 2
    browser.mouse.move(plot["x"] + plot["width"] / 2, middle)
    browser.get_by_text(re.compile("at step 1,")).first.wait_for()  # read under the pointer
    browser.mouse.move(plot["x"] + 0.45 * plot["width"], middle)
    browser.mouse.down()
    browser.mouse.move(plot["x"] + 0.55 * plot["width"], middle, steps=4)
    browser.mouse.up()
    until(browser, 'models.filter((m) => m.data?.smooth && m.data.step.length).every((m) => m.data.step.at(-1) < 2500)')
    zoomed = points(browser)
    steps = browser.evaluate(f"() => [...{MODELS}.find((m) => m.data?.smooth).data.step]")
    assert 100 < zoomed[0][0] < 1000 and set(np.diff(steps)) == {1.0}  # every step of the window, none thinned away
    browser.mouse.dblclick(plot["x"] + plot["width"] / 2, middle)  # all of it again
    until(browser, 'models.some((m) => m.data?.smooth && m.data.step.at(-1) > 3000)')
    browser.wait_for_function("() => !location.href.includes('zoom=')", polling=POLLING)
    until(browser, "models.find((m) => m.type === 'Figure').x_range.end > 3000")
    legend = browser.locator(".bk-btn-group button")
    assert legend.count() == 8 and legend.first.inner_text().startswith("lr 1e-4")
    legend.first.click()
    until(browser, "models.filter((m) => m.type === 'GlyphRenderer' && !m.visible).length >= 5")
    until(browser, "decodeURIComponent(location.href).includes('hidden=[1]')")
    browser.reload()  # the link shows what its sender saw
    until(browser, "models.filter((m) => m.type === 'GlyphRenderer' && !m.visible).length >= 5")
    assert legend.first.get_attribute("aria-pressed") == "false" or "bk-active" not in legend.first.get_attribute("class")


def test_a_view_that_was_left_misses_nothing(address, runs, browser, train):
    "What the server holds of its sources is true, although their rows go past it."
    train(runs / "left", at_once=20, rate=10, steps=100_000, sensed=1)
    visit(browser, f"{address}?run=left")
    end = "models.some((m) => m.data?.smooth && m.data.loss && m.data.step.at(-1) > argument)"
    until(browser, end, 40)
    press(browser, "Tree")
    until(browser, "models.every((m) => !m.data?.smooth)")
    press(browser, "Now")
    until(browser, end, 60)
    until(browser, end, points(browser)[0][1] + 5)
    rows, strips = [*sources(browser, "loss"), *sources(browser, "probability")], sources(browser, "alpha")
    rows = [source for source in rows if "smooth" in source or "probability" in source]
    assert len(rows) == 16 and all(source["step"][:40] == list(range(40)) for source in rows)
    assert all(source["step"] == sorted(set(source["step"])) for source in rows)  # none twice; of many at once some are left out
    assert len(strips) == 8 and all(right == left for source in strips for left, right in zip(source["left"][1:], source["right"]))


def test_a_piece_of_the_wire_waits_for_its_model(address, runs, browser, train):
    train(runs / "early", at_once=20, rate=1, steps=100_000)
    visit(browser, f"{address}?run=early")
    until(browser, "models.some((m) => m.data?.smooth)")
    steps = browser.evaluate("""() => {
        const doc = Bokeh.documents[0], model = new (Bokeh.Models.get("ColumnDataSource"))({data: {step: [1]}})
        const come = (...pieces) => { doc._trigger_on_message("wire", JSON.stringify(pieces)); return model.data.step.map(String) }
        const before = come(["stream", model.id, {step: [2, null]}])
        doc.add_root(model, {sync: false})
        const after = come()
        doc.remove_root(model, {sync: false})
        return [before, after, come()]
    }""")
    assert steps == [["1"], ["1", "2", "NaN"], ["1", "2", "NaN"]]  # and once only


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_page_that_was_cut_off_comes_back(address, runs, browser, train, when):
    if not (runs / "cut").exists(): train(runs / "cut", at_once=60, rate=10, steps=100_000)
    browser.add_init_script("""window.sockets = []
        window.WebSocket = class extends WebSocket { constructor(...all) { super(...all); sockets.push(this) } }
        if (WHEN === "at once" && !sessionStorage.cut) {
            const look = () => sockets[0]?.readyState === 1 ? (sessionStorage.cut = true, sockets[0].close()) : setTimeout(look)
            look()
        }""".replace("WHEN", json.dumps(when)))
    visit(browser, f"{address}?run=cut&smoothing=0.5&log_y=true")
    until(browser, "models.some((m) => m.data?.smooth && m.data.step.at(-1) > 60)")
    if when == "later":
        with browser.expect_navigation(): browser.evaluate("sockets.at(-1).close()")
    until(browser, "models.some((m) => m.type === 'Figure' && m.title.text === 'Training loss, nats per token (log)')")
    assert browser.evaluate("sessionStorage.cut") == ("true" if when == "at once" else None)
    browser.troubles[:] = [told for told in browser.troubles if "websocket" not in told.lower() and "Disconnected" not in told]  # Bokeh goes on for a while with what is closed


def test_a_page_whose_connection_is_refused_says_so(address, browser):
    browser.add_init_script("window.WebSocket = class extends WebSocket { constructor(where, ...more) { super(where.replace('127.0.0.1', 'localhost'), ...more) } }")  # as behind a proxy
    browser.goto(address)
    browser.get_by_text(f"--allow-websocket-origin {urlsplit(address).netloc}").wait_for()
    assert any("403" in told for told in browser.troubles)
    browser.troubles.clear()


def test_what_a_monitor_read_is_drawn_as_it_was(address, runs, browser, train):
    train(runs / "sensed", steps=200, rate=500, lanes=3, sensed=1)[0].wait(PATIENCE)
    visit(browser, f"{address}?run=sensed")
    shows(browser, "status", "finished")
    shows(browser, "step", "200")
    shows(browser, "monitor", "^7.1.%of 10.% · 1 off")
    assert "lyapunov is off: needs twins" in card(browser, "monitor").get_attribute("title")
    assert "sharpness failed and is off: no <b>probe</b> batch" in browser.get_by_role("alert").first.inner_text()
    for lane, rows in enumerate(sources(browser, "uncertainty_index")):
        index = [index_of(lane, int(step)) for step in rows["step"]]
        assert rows["step"] == list(range(200)) and np.allclose(np.array(rows["uncertainty_index"], dtype=float), index, atol=1e-3, equal_nan=True)
        assert np.isnan(index[:WARM_UP]).all() and rows["regime"] == [planted(lane, step)[0] for step in range(200)]
    alarms = [data for data in sources(browser, "drawn") if "uncertainty_index" not in data]
    assert [data["step"] for data in alarms] == [[ALARM - 1, 2 * ALARM - 1, 3 * ALARM - 1]] * 3 and alarms[0]["drawn"] == [3.5] * 3
    marks = sources(browser, "lanes")[0]
    ticks = [(step, lanes) for step, kind, lanes in zip(marks["step"], marks["kind"], marks["lanes"]) if kind == "stressor"]
    assert ticks == [(n * SHOCK - 1, "every lane") for n in (1, 2, 3, 4)]
    row = browser.locator("tbody tr").nth(1)
    top, probability = planted(1, 199)
    assert f"{WORDS[top]} {100 * probability:.0f}" in row.inner_text() and f"{index_of(1, 199):.2f}" in row.inner_text()

    strips = "Regimes: the most probable one"
    for lane, step in (0, 20), (1, 60), (2, 100), (0, 180):  # what is painted, not only what was sent
        assert nearest_regime(colour_at(browser, strips, step, lane + 0.5)) == planted(lane, step)[0]
    browser.mouse.move(*spot(browser, strips, 100, 0.5))
    told = f"lr 1e-4\u2002{REGIMES[planted(0, 100)[0]]} {100 * planted(0, 100)[1]:.0f}"
    until(browser, "models.some((m) => m.labels?.some((label) => label.startsWith(argument)))", told)
    browser.mouse.move(*spot(browser, "Uncertainty index", 100, 0.5))
    until(browser, "models.some((m) => m.labels?.some((label) => label === argument))", f"lr 3e-4\u2002{index_of(1, 100):.3f}")
    browser.mouse.move(*spot(browser, "Training loss", SHOCK - 1, None))
    browser.get_by_text("gradient spike").first.wait_for()  # named under the pointer

    browser.mouse.click(*spot(browser, strips, 100, 1.5))  # the strip of lane 1
    until(browser, "models.some((m) => m.type === 'Figure' && m.title.text === 'Regimes: how probable each is, lr 3e-4')")
    until(browser, "location.search.includes('regimes=2')")
    mixture = next(data for data in sources(browser, "regime_learning"))
    assert mixture["step"] == list(range(200)) and np.allclose(np.sum([mixture[f"regime_{name}"] for name in REGIMES], axis=0), 1, atol=1e-3)
    for step in 20, 60, 100:
        top, probability = planted(1, step)
        rest = (1 - probability) / 6
        assert nearest_regime(colour_at(browser, "Regimes: how", step, top * rest + probability / 2)) == top
    browser.mouse.move(*spot(browser, "Regimes: how", 60, 0.5))
    browser.get_by_text("at step 60").last.wait_for()
    assert re.search(rf"{WORDS[planted(1, 60)[0]]} 95.%", browser.locator(".regimes").inner_text())
    browser.get_by_label("Regimes of").select_option(label="every lane")
    spot(browser, strips, 10, 0.5)
    browser.set_viewport_size({"width": 700, "height": 900})
    browser.wait_for_timeout(500)
    boxes = [part.bounding_box() for part in (*browser.locator(".bk-Figure").all()[:6], browser.locator("table"))]
    assert len(boxes) == 7 and all(one["y"] + one["height"] <= other["y"] + 1 for one, other in zip(boxes, boxes[1:]))  # one below the other


def test_senses_stream_in_small_messages(address, runs, browser, train):
    train(runs / "sensing", at_once=3000, rate=4, steps=100_000, lanes=7, sensed=1)
    visit(browser, f"{address}?run=sensing")
    shows(browser, "step", "^3,")
    browser.get_by_label("Regimes of").select_option(label="lr 1e-3")
    until(browser, "models.some((m) => m.data?.regime_learning?.length > 100)")
    browser.wait_for_timeout(1500)
    first, sent = max(step for _, step in points(browser)), len(browser.frames_seen)
    until(browser, "models.some((m) => m.data?.regime_learning && m.data.step.at(-1) >= argument + 6)", first)
    steps = max(step for _, step in points(browser)) - first
    size = sum(len(frame) for frame in browser.frames_seen[sent:])
    assert steps >= 6 and size / steps < 20_000, f"{size / steps:.0f} bytes a step"
    both = sources(browser, "uncertainty_index", "right")
    for rows, strip in zip([data for data in both if "step" in data], [data for data in both if "right" in data]):
        assert len(rows["step"]) <= 2000 and len(strip["right"]) <= 1000
        assert strip["right"][-1] == rows["step"][-1] + 0.5 and strip["left"][1:] == strip["right"][:-1]  # without a gap


def test_a_run_without_a_monitor_says_so_and_draws_nothing_more(address, browser):
    visit(browser, f"{address}?run=first")
    shows(browser, "status", "finished")
    browser.get_by_text("Not sensed: this run has no monitor.").wait_for()
    assert browser.locator(".bk-Figure").count() == 4 and browser.locator(".regimes").count() == 0
    assert browser.locator("th").all_inner_texts()[-2:] == ["gradient norm", "state"] and card(browser, "monitor").count() == 0


def test_dark_mode_reaches_the_charts_and_a_phone_shows_them(address, browser):
    visit(browser, f"{address}?run=first")
    shows(browser, "status", "finished")
    fill = lambda: browser.evaluate(f"() => {MODELS}.find((m) => m.type === 'Figure').background_fill_color")
    ink = lambda: browser.locator(".card .value").first.evaluate("e => getComputedStyle(e).color")
    light = fill()
    wait_until(lambda: brightness(ink()) < 80, "dark letters")
    browser.get_by_role("button", name=re.compile("theme|dark|mode", re.I)).first.click()
    until(browser, "models.find((m) => m.type === 'Figure').background_fill_color !== argument", light)
    assert light.lower() in ("#fff", "#ffffff") and fill().lower() == "#121212"
    until(browser, "location.search.includes('theme=dark')")
    browser.reload()  # the link is dark too
    until(browser, "models.find((m) => m.type === 'Figure')?.background_fill_color === '#121212'")
    wait_until(lambda: brightness(ink()) > 200, "light letters")
    browser.set_viewport_size({"width": 390, "height": 844})  # a phone
    browser.wait_for_timeout(500)
    boxes = [figure.bounding_box() for figure in browser.locator(".bk-Figure").all()]
    assert len(boxes) == 4 and all(box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["width"] > 300 for box in boxes)


def brightness(colour):
    "0 to 255; 128 for an element that was just replaced."
    return np.mean([float(part) for part in re.findall(r"[\d.]+", colour)[:3]] or [128])


def test_figures_that_left_the_page_are_let_go_of(address, browser, profile):
    visit(browser, address)
    until(browser, "models.some((m) => m.data?.smooth && m.data.step.length)")
    title = lambda words: until(browser, f"models.some((m) => m.type === 'Figure' && m.title.text === 'Training loss, nats per token{words}')")
    for words in (" (log)", "", " (log)", ""):  # the very first figures stay; those of the first change should not
        browser.get_by_label("Log loss").click()
        title(words)
        if words: browser.evaluate(f"() => {{ window.left ??= new WeakRef(Bokeh.index.find_one({MODELS}.find((m) => m.type === 'Figure'))) }}")
    memory = profile.new_cdp_session(browser)

    def gone():
        memory.send("HeapProfiler.collectGarbage")
        return browser.evaluate("() => left.deref() === undefined")
    wait_until(gone, "the first figure is free")


def test_names_are_text_and_unknown_runs_are_named(address, runs, browser, train):
    train(runs / MARKUP, steps=60, rate=500, lanes=2)[0].wait(PATIENCE)
    visit(browser, f"{address}?run=..%2Fruns0%2F%3Cimg%20src%3Dx%20onerror%3Ddocument.title%3D%27gone%27%3E")
    browser.get_by_text("There is no run named").wait_for()
    assert browser.locator(".message code").first.inner_text() == "../runs0/<img src=x onerror=document.title='gone'>"
    browser.get_by_role("combobox", name="Run").click()
    browser.locator(".MuiMenuItem-root").filter(has_text=MARKUP).click()
    shows(browser, "status", "finished")
    assert MARKUP in browser.get_by_role("combobox", name="Run").inner_text()
    assert browser.title() == "sdalab live" and browser.locator("img[src=x]").count() == 0


def test_a_journal_that_disappears_and_comes_back(address, runs, browser, train):
    train(runs / "lost", steps=60, rate=500, lanes=2)[0].wait(PATIENCE)
    visit(browser, f"{address}?run=lost")
    shows(browser, "step", "60")
    (runs / "lost").rename(runs.parent / "elsewhere")
    browser.get_by_text("cannot be read just now").wait_for()
    train(runs / "lost", steps=90, rate=500, lanes=4)  # another run of the same name
    shows(browser, "step", "90")
    browser.get_by_text("cannot be read just now").wait_for(state="hidden")
    assert browser.locator("tbody tr").count() == browser.locator(".bk-btn-group button").count() == 4


def test_buttons_need_a_password_where_others_can_reach_the_page(serve, runs, browser, train):
    run = train(runs / "exposed", rate=20, steps=100_000)[1]
    visit(browser, serve(runs, "0.0.0.0") + "?run=exposed")
    shows(browser, "status", "running")
    assert "--address 127.0.0.1" in browser.get_by_role("alert").first.inner_text()
    assert all(browser.get_by_role("button", name=name, exact=True).is_disabled() for name in ("Pause", "Resume", "Stop"))
    assert len(run.commands()) == 0


@pytest.mark.parametrize("version", [1, 2])
def test_journals_of_older_versions_open(tmp_path, version):
    facts = dict(name="old", created=1.0, config={}, machine={}, status="finished", progress={}, next_row=3)
    with sqlite3.connect(tmp_path / "journal.db") as db:
        create_tables(db, version)
        db.executemany("INSERT INTO meta VALUES (?, ?)", [(key, json.dumps(value)) for key, value in facts.items()])
        db.execute("INSERT INTO nodes(id, lane, first_step, settings, created) VALUES (1, 0, 0, '{}', 1.0)")
        db.executemany("INSERT INTO steps(id, node, step, wall_time, loss) VALUES (?, 1, ?, 2.0, 0.5)", [(1, 0), (2, 1)])
    db.close()
    tail = Tail(tmp_path, "old")
    tail.look()
    assert tail.now.problem is None and list(tail.now.series[0].loss) == [0.5, 0.5] and not tail.now.sensed
    assert all(np.isnan(values).all() and len(values) == 2 for values in tail.now.series[0].senses.values())
