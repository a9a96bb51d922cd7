"The page of maps in a real browser; maps, windows, pixels and runs are computed by processes beside it."
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import TimeoutError

from sdalab.boundary.landscape import Axis
from sdalab.boundary.mapping import Crew, Mapper, load_map, trace
from sdalab.boundary.store import open_map, read_manifest, status
from sdalab.boundary.view import TONES, levels
from sdalab.checked import BadInput
from sdalab.journal.reader import Run

sys.path[:0] = [str(Path(__file__).parents[1] / "dashboards"), str(Path(__file__).parent)]
from map_tail import MapTail, MapWatch, find_maps  # noqa: E402
from map_work import Job, Workers  # noqa: E402
from test_live import MARKUP, ROOT, brightness, browser, card, press, processes, profile, see_refused, shows, until, wait_until  # noqa: E402, F401

BUSY = 180.0  # seconds for what starts a process or two, on a machine that has other work
SMALL = ["landscape.train.model={depth: 1, width: 16, inner_width: 16, hidden_width: 16}", "landscape.train.steps=12", "landscape.train.rows=1",
         "landscape.train.window=16", "landscape.train.stressors=[]", "landscape.rule={name: lab}", "x.high=1e4", "y.high=10"]
FILLING = [*SMALL, "width=24", "height=24", "tile=4", "stride=4", "landscape.train.steps=60"]
TOY = dict(name="toy", landscape=dict(name="double-well", steps=100), x=dict(name="learning_rate", low=0.5, high=2.5), y=dict(name="start", low=0.2, high=2.6),
           width=48, height=32, tile=16, stride=4)
SHOWN = "models.filter((m) => m.type === 'Figure' && Bokeh.index.find_one(m)).flatMap((m) => m.renderers.map((r) => r.data_source))"  # sources of figures on the page
SEEN = f"{SHOWN}.find((m) => m.data.image?.length)"


def make_map(root, name="toy", **fields):
    "A small finished map, computed here."
    with Crew() as crew, Mapper(load_map(TOY, name=name, **fields), root, crew, say=lambda sentence: None) as mapper: return mapper.run()


@pytest.fixture(scope="module")
def maps(tmp_path_factory): return tmp_path_factory.mktemp("maps")


@pytest.fixture(scope="module")
def runs(tmp_path_factory): return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def serve(processes, tmp_path_factory):
    "Serves the page for its two folders, as its documentation says, and returns its address."
    def start(*folders, host="127.0.0.1"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = tmp_path_factory.mktemp("serve") / "log"
        processes("-m", "panel", "serve", "dashboards/boundary.py", "--address", host, "--port", port, "--args", *folders, stderr=log.open("w"))
        wait_until(lambda: "app running" in log.read_text(), "the server", BUSY)
        return f"http://{'localhost' if host == '0.0.0.0' else host}:{port}/boundary"
    return start


@pytest.fixture(scope="module")
def address(serve, maps, runs): return serve(maps, runs)


@pytest.fixture
def small(maps):
    "A finished map of decoders, that of the first test where it has run."
    if not (maps / "small").exists():
        with Crew() as crew, Mapper(load_map("edge-95k", FILLING, name="small", exhaustive=True), maps, crew, say=lambda sentence: None) as mapper: mapper.run()
    return maps / "small"


@pytest.fixture(autouse=True)
def patient(request):
    "The first visit loads what the page needs; workers take seconds to start."
    if "browser" in request.fixturenames: request.getfixturevalue("browser").set_default_timeout(BUSY * 1000)


def image(page):
    "What the browser has of the map, one byte a pixel."
    until(page, SEEN)
    shape, values = page.evaluate(f"() => {{ const models = [...Bokeh.documents[0]._all_models.values()], a = {SEEN}.data.image[0]; return [a.shape, [...a]] }}")
    return np.array(values).reshape(shape)


def spot(page, x, y):
    "Where on the page a place of the map is, given as shares of its window."
    page.wait_for_function("() => { const f = [...Bokeh.documents[0]._all_models.values()].find((m) => m.type === 'Figure'); return f && Bokeh.index.find_one(f)?.el.getBoundingClientRect().width > 0 }")
    return page.evaluate("""([x, y]) => {
        const view = Bokeh.index.find_one([...Bokeh.documents[0]._all_models.values()].find((m) => m.type === 'Figure'))
        view.el.scrollIntoView({block: 'center'})
        const box = view.el.getBoundingClientRect(), frame = view.frame.bbox
        return [box.x + frame.left + x * frame.width, box.y + frame.top + (1 - y) * frame.height]
    }""", [x, y])


def drag(page, x0, y0, x1, y1, attempts=6):
    "Draws a box, given as shares of the window; again where the page was just laying itself out, which drops a drag under way."
    for attempt in range(attempts):
        page.mouse.move(*spot(page, x0, y0))
        page.mouse.down()
        page.mouse.move(*spot(page, x1, y1), steps=5)
        page.mouse.up()
        try: return page.get_by_text("A deeper window").wait_for(timeout=BUSY * 1000 / attempts)
        except TimeoutError: pass
    raise AssertionError("no box could be drawn")


def test_an_empty_page_and_a_map_that_fills_in(address, maps, browser, processes):
    browser.goto(address)
    browser.get_by_text("There is no map in").wait_for()
    words = [word for change in FILLING for word in ("--set", change)]
    process = processes("-m", "sdalab.cli", "map", *words, "--exhaustive", "--workers", 1, "--name", "small", "--maps", maps)
    shows(browser, "status", "computing")
    until(browser, f"{SEEN}?.data.image[0].some((v) => v > 0)")
    first = image(browser)
    assert first.shape == (24, 24)
    until(browser, f"{SEEN}.data.image[0].filter((v) => v > 0 && v <= {TONES}).length > argument", int(((first > 0) & (first <= TONES)).sum()))  # it fills in
    assert process.wait(BUSY) == 0
    shows(browser, "status", "finished")
    data = open_map(maps / "small").load()
    wait_until(lambda: np.array_equal(image(browser), levels(data)), "the whole map, to the byte")
    assert "map=small" in browser.url and "576" in card(browser, "computed").inner_text()
    browser.mouse.move(*spot(browser, 10.5 / 24, 20.5 / 24))
    browser.get_by_text(f"{float(data.x[10]):.4g}").first.wait_for()
    browser.mouse.move(*spot(browser, 11.5 / 24, 20.5 / 24))
    browser.get_by_text(f"{float(data.sohl_dickstein[20, 11]):.4g}").first.wait_for()


def test_a_box_is_a_deeper_window_and_history_goes_back(address, maps, small, browser):
    browser.goto(f"{address}?map=small&colour=sohl_dickstein")
    shows(browser, "status", "finished")
    drag(browser, 0.25, 0.5, 0.75, 0.75)
    assert "24 × 12 pixels" in browser.locator(".small").first.inner_text()
    press(browser, "Compute this window")
    browser.wait_for_url("**/*window=1*")
    shows(browser, "status", "finished")
    config, outer = read_manifest(maps / "small.1")["configuration"], read_manifest(maps / "small")["configuration"]
    shares = [Axis(**outer[name]).share_of(config[name][end]) for name in "xy" for end in ("low", "high")]
    assert np.allclose(shares, [0.25, 0.75, 0.5, 0.75], atol=0.01) and (config["width"], config["height"]) == (24, 12)
    assert {key: config[key] for key in ("landscape", "tile", "stride")} == {key: outer[key] for key in ("landscape", "tile", "stride")}
    wait_until(lambda: np.array_equal(image(browser), levels(open_map(maps / "small.1").load(), "sohl_dickstein")), "the window's map")
    press(browser, "small")  # the way back
    until(browser, f"{SEEN}?.data.image[0].shape[0] === 24")
    assert "window" not in browser.url and "colour=sohl_dickstein" in browser.url
    until(browser, "models.some((m) => m.data?.left && m.data.name?.[0] === '1')")  # it is drawn where it lies
    press(browser, "1")
    until(browser, f"{SEEN}?.data.image[0].shape[0] === 12")
    browser.go_back()
    until(browser, f"{SEEN}?.data.image[0].shape[0] === 24")


def test_a_click_shows_the_pixel_and_it_becomes_a_run(address, maps, small, runs, browser):
    browser.goto(f"{address}?map=small")
    shows(browser, "status", "finished")
    browser.mouse.click(*spot(browser, 7.5 / 24, 12.5 / 24))
    browser.get_by_text("Pixel of column 7, row 12").wait_for()
    browser.get_by_text("the same to the bit").wait_for()
    until(browser, "models.some((m) => m.type === 'Legend' && m.items.length === 5)")  # and those beside it
    losses = trace(load_map(read_manifest(maps / "small")["configuration"]), 7, 12).losses.numpy()
    stored = np.loadtxt(maps / "small/pixels/7_12.csv", delimiter=",", skiprows=1, usecols=1)
    assert np.array_equal(stored, losses)
    lines = browser.evaluate(f"() => {{ const models = [...Bokeh.documents[0]._all_models.values()]; return {SHOWN}.filter((m) => m.data.y?.length === 60).map((m) => [...m.data.y]) }}")
    assert len(lines) == 5 and any(np.array_equal(line, losses) for line in lines)
    assert browser.locator(".near div").count() == 9 and "pixel=7%2C12" in browser.url
    press(browser, "Train this pixel as a run")
    browser.get_by_text("small-7-12").last.wait_for()
    browser.get_by_text("It is the run").wait_for()
    wait_until(lambda: Run(runs / "small-7-12").status() == "finished", "the run", BUSY)
    assert browser.get_by_role("button", name="Train this pixel as a run").is_disabled()


def test_a_window_can_be_cancelled_and_gone_on_with(address, maps, small, browser):
    browser.goto(f"{address}?map=small")
    shows(browser, "status", "finished")
    drag(browser, 0.1, 0.1, 0.9, 0.9)
    browser.get_by_role("combobox", name="Pixels, longer side").click()
    browser.locator(".MuiMenuItem-root").get_by_text("128", exact=True).click()
    browser.get_by_text("128 × 128 pixels").wait_for()
    press(browser, "Compute this window")
    shows(browser, "status", "computing")
    name = f"small.{re.search('window=([0-9]+)', browser.url)[1]}"
    browser.get_by_text(f"Computing {name}").wait_for()
    press(browser, "Cancel")
    shows(browser, "status", "interrupted")
    browser.get_by_role("button", name="Cancel").wait_for(state="hidden")
    assert status(maps / name) == "interrupted"
    press(browser, "Go on computing")
    shows(browser, "status", "computing")
    press(browser, "Cancel")
    shows(browser, "status", "interrupted")


def test_names_are_text_and_stores_may_break(address, maps, browser):
    shutil.copytree(make_map(maps), maps / MARKUP.replace("/", ""))
    browser.goto(f"{address}?map=..%2F..%2Fetc&window=%3Cimg%20src%3Dx%3E")
    browser.get_by_text("There is no map named").wait_for()
    assert browser.locator(".message code").first.inner_text() == "../../etc.<img src=x>"
    browser.get_by_role("combobox", name="Map").click()
    browser.locator(".MuiMenuItem-root").filter(has_text=MARKUP).click()
    shows(browser, "status", "finished")
    drag(browser, 0.2, 0.2, 0.8, 0.8)
    press(browser, "Compute this window")
    browser.get_by_text("nothing can be computed from a map of this name").wait_for()
    assert browser.title() == "sdalab maps" and browser.locator("img[src=x]").count() == 0
    browser.goto(f"{address}?map=toy")
    shows(browser, "status", "finished")
    shutil.move(maps / "toy", maps.parent / "away")
    browser.get_by_text("cannot be read just now").wait_for()
    assert image(browser).shape == (32, 48)  # what was there stays
    shutil.move(maps.parent / "away", maps / "toy")
    browser.get_by_text("cannot be read just now").wait_for(state="hidden")
    (maps / "half").mkdir()
    shutil.copy(maps / "toy/manifest.json", maps / "half")
    browser.goto(f"{address}?map=half")
    browser.get_by_text("half cannot be shown yet").wait_for()
    shutil.copytree(maps / "toy/map.zarr", maps / "half/map.zarr")
    shows(browser, "status", "finished")
    (maps / "torn").mkdir()
    (maps / "torn/manifest.json").write_text('{"configuration": ')
    browser.get_by_text("Left out: torn").wait_for()
    shutil.rmtree(maps / "torn")


def test_dark_mode_and_a_phone(address, maps, browser):
    if not (maps / "toy").exists(): make_map(maps)
    browser.goto(f"{address}?map=toy&pixel=3,4")
    shows(browser, "status", "finished")
    browser.get_by_text("Pixel of column 3, row 4").wait_for()
    press(browser, "Toggle theme") if browser.get_by_role("button", name="Toggle theme").count() else browser.locator("header button").last.click()
    until(browser, "models.find((m) => m.type === 'Figure').background_fill_color.toLowerCase() === '#121212'")
    wait_until(lambda: brightness(card(browser, "status").locator(".value").evaluate("e => getComputedStyle(e).color")) > 200, "light letters")
    browser.set_viewport_size({"width": 390, "height": 844})
    wait_until(lambda: all(box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["width"] > 300 for box in [f.bounding_box() for f in browser.locator(".bk-Figure").all()]), "a map as wide as the phone")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    browser.set_viewport_size({"width": 1280, "height": 800})


def test_where_others_can_reach_the_page_it_only_shows(serve, maps, runs, browser):
    if not (maps / "toy").exists(): make_map(maps)
    browser.goto(serve(maps, runs, host="0.0.0.0") + "?map=toy")
    shows(browser, "status", "finished")
    assert "--address 127.0.0.1" in browser.get_by_role("alert").first.inner_text()
    before = sorted(path.name for path in maps.iterdir())
    drag(browser, 0.2, 0.2, 0.8, 0.8)
    assert browser.get_by_role("button", name="Compute this window").is_disabled()
    browser.mouse.click(*spot(browser, 0.5, 0.5))
    browser.get_by_text("Pixel of column 24, row 16").wait_for()
    assert sorted(path.name for path in maps.iterdir()) == before and not (maps / "toy/pixels").exists()


def test_names_that_others_point_at_this_machine_are_refused(address, browser):
    see_refused(browser, address)


def test_a_tail_reads_only_what_the_manifest_counts(tmp_path):
    folder = make_map(tmp_path)
    whole, manifest = open_map(folder).load(), json.loads((folder / "manifest.json").read_text())
    tiles = manifest["passes"][0]
    tail = MapTail(folder, "toy")
    (folder / "manifest.json").write_text(json.dumps(manifest | dict(finished=False, passes=[tiles[:2]])))
    tail.look()
    known = tail.now.dataset.label.values >= 0
    assert tail.now.status == "interrupted" and 0 < known.sum() < known.size and tail.now.painted["class"].max() > TONES
    before = tail.now
    tail.look()
    assert tail.now.dataset is before.dataset and tail.now.painted["class"] is before.painted["class"]  # nothing new: nothing is done
    (folder / "manifest.json").write_text(json.dumps(manifest))
    tail.wanted |= {"torkamandi"}
    tail.look()
    assert all(np.array_equal(tail.now.dataset[name], whole[name], equal_nan=True) for name in whole.data_vars) and tail.now.computed == int((whole.source > 0).sum())
    assert np.array_equal(tail.now.painted["torkamandi"], levels(whole, "torkamandi")) and (before.dataset.label.values >= 0).sum() == known.sum()
    shutil.rmtree(folder)
    tail.look()
    assert "manifest.json" in tail.now.problem and tail.now.dataset is not None


def test_the_page_loads_no_engine():
    code = "import sys; sys.path.insert(0, 'dashboards'); import boundary; print([name for name in sys.modules if name.startswith('sdalab.training.') and name.split('.')[-1] in ('engine', 'stacked', 'module', 'train')])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_windows_are_found_by_name_and_place(tmp_path):
    make_map(tmp_path, "a.b")
    make_map(tmp_path, "a.b.1", x=dict(name="learning_rate", low=1.0, high=2.0))
    make_map(tmp_path, "a.b.1.2", x=dict(name="learning_rate", low=1.5, high=1.75))
    make_map(tmp_path, "a.b.2", x=dict(name="learning_rate", low=1.0, high=3.0))  # not inside
    entries, problems = find_maps(tmp_path, {})
    assert {one.key: one.parent for one in entries} == {"a.b": None, "a.b.1": "a.b", "a.b.1.2": "a.b.1", "a.b.2": None} and not problems
    watch = MapWatch(tmp_path)
    watch.entries = entries
    assert watch.trail("a.b.1.2") == ["a.b", "a.b.1", "a.b.1.2"] and watch.trail("a.b.7") == ["a.b", "a.b.7"] and watch.trail("none") == ["none"]


def test_workers_get_checked_words_only(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("map_work.Job", lambda kind, key, commands, stays=False: started.append(commands) or type("Done", (), dict(alive=False, state="done", key=key, cancel=lambda self: None, end=lambda self: None))())
    for name in ("toy", "--maps=x"): shutil.copytree(make_map(tmp_path / "made", "toy"), tmp_path / "maps" / name)
    watch = MapWatch(tmp_path / "maps")
    watch.entries = find_maps(watch.root, {})[0]
    workers, x, y = Workers(watch, tmp_path / "runs"), Axis(name="learning_rate", low=1e-5, high=1.5), Axis(name="start", low=0.5, high=0.75)
    assert workers.window("toy", x, y, 32, 16, 999) == "toy.1"
    words = started[0][0]
    assert words[:9] == ["map", "--like=toy", "--name=toy.1", "--set", "x.low=1e-05", "--set", "x.high=1.5", "--set", "y.low=0.5"] and words[-1] == f"--maps={watch.root}"
    for bad, wrong in ((lambda: workers.window("--maps=x", x, y, 9, 9, 1), "rename its folder"), (lambda: workers.window("../toy", x, y, 9, 9, 1), "no such map"),
                       (lambda: workers.window("toy", y, x, 9, 9, 1), "draw the box again"), (lambda: workers.window("toy", x, y, 9, 9000, 1), "2 to 4096"),
                       (lambda: workers.look_at("toy", 48, 0), "48 columns and 32 rows"), (lambda: workers.train("toy", -1, 0), "48 columns")):
        with pytest.raises(BadInput, match=wrong): bad()
    assert len(started) == 1


def test_a_job_ends_with_a_sentence_or_when_told(tmp_path):
    make_map(tmp_path)
    deep = Job("map", "toy.1", [["map", "--like=toy", "--name=toy.1", "--set", "x.low=1.0", "--set", "x.high=1.00000000000001", f"--maps={tmp_path}"]])
    wait_until(lambda: not deep.alive, "the refusal", BUSY)
    assert deep.state == "failed" and "units in the last place of float64 apart" in deep.said and "\n" not in deep.said and not (tmp_path / "toy.1").exists()
    long = Job("map", "long", [["map", *[word for change in SMALL for word in ("--set", change)], "--exhaustive", "--workers=1", "--name=long", f"--maps={tmp_path}"], ["maps", "list"]])
    wait_until((tmp_path / "long/manifest.json").exists, "its store", BUSY)
    time.sleep(0.5)
    long.cancel()
    wait_until(lambda: not long.alive, "the end", BUSY)
    assert long.state == "cancelled" and status(tmp_path / "long") == "interrupted"
