"The page of maps: what a map of 1024 x 1024 pixels costs to send and to draw."
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import holoviews as hv

from bench.rows import Row, side_by_side
from sdalab.boundary.mapping import Crew, Mapper, load_map
from sdalab.boundary.pictures import map_view
from sdalab.boundary.store import open_map
from sdalab.boundary.view import MapView, levels

SIDE = 1024
CONFIG = dict(name="large", landscape=dict(name="quadratic", steps=30), x=dict(name="learning_rate.first", low=0.05, high=3.0), y=dict(name="learning_rate.second", low=0.05, high=3.0),
              width=SIDE, height=SIDE, tile=128, stride=16)
REDRAW = """async () => {
  const source = [...Bokeh.documents[0]._all_models.values()].find((m) => m.type === 'ColumnDataSource' && m.data.image?.length), frame = () => new Promise(requestAnimationFrame), times = []
  for (let i = 0; i < 9; i++) {
    const began = performance.now(), image = source.data.image[0]
    image[0] = (image[0] + 1) % 255
    source.change.emit()
    await frame(); await frame()
    times.push(performance.now() - began)
  }
  return times.sort((a, b) => a - b)[4]
}"""  # two frames, at 60 Hz 33 ms, pass in any case


def page_rows():
    "Bytes and milliseconds."
    with tempfile.TemporaryDirectory() as folder:
        with Crew() as crew, Mapper(load_map(CONFIG), Path(folder) / "maps", crew, say=lambda sentence: None) as mapper: data = open_map(mapper.run()).load()
        yield from sending_rows(data)
        yield from browser_rows(Path(folder))


def sending_rows(data):
    "Bytes of a picture, and the server's time for one."
    hv.extension("bokeh", logo=False)
    element, view = map_view(data, "sohl_dickstein"), MapView(data)
    whole = sum(element.dimension_values(name, flat=False).nbytes for name in element.vdims)
    yield Row(f"map of {SIDE} x {SIDE} on a screen of 600 x 600: bytes of a picture", view.sent, "bytes", f"{whole:,} bytes of the HoloViews element, which carries all that hover shows", whole / view.sent, "one byte a pixel of the screen", ">= 100")
    seconds = side_by_side({colour: lambda colour=colour: levels(data, colour) for colour in ("class", "sohl_dickstein")} | {"thinning": lambda: view.show(data, view.painted)})
    yield Row("paint it by class, once for all viewers", 1e3 * seconds["class"], "ms", f"by score, with ranks: {1e3 * seconds['sohl_dickstein']:.0f} ms")
    yield Row("see that nothing is new for a viewer", 1e3 * seconds["thinning"], "ms", "the period of a page is 500 ms", limit="thinning and a comparison")


def browser_rows(folder: Path):
    "The page itself in a Chromium, where there is one."
    program = shutil.which(os.environ.get("CHROMIUM", "chromium"))
    if program is None: return
    from playwright.sync_api import sync_playwright
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "panel", "serve", "dashboards/boundary.py", "--address", "127.0.0.1", "--port", str(port), "--args", str(folder / "maps"), str(folder / "runs")]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
            yield from measured_page(browser.new_page(viewport=dict(width=1280, height=900)), f"http://127.0.0.1:{port}/boundary")
            browser.close()
    finally:
        server.terminate()
        server.wait(20)


def measured_page(page, address):
    "Bytes on the wire, and a redraw."
    from playwright.sync_api import Error
    sizes = []
    page.set_default_timeout(120_000)
    page.on("websocket", lambda ws: ws.on("framereceived", lambda frame: sizes.append(len(frame))))
    for attempt in range(60):
        try: page.goto(address)
        except Error: time.sleep(1)  # the server is not up yet
        else: break
    shown = "() => [...(window.Bokeh?.documents?.[0]?._all_models.values() ?? [])].some((m) => m.type === 'ColumnDataSource' && m.data.image?.length)"
    page.wait_for_function(shown)
    page.wait_for_timeout(3000)
    first = sum(sizes)
    page.wait_for_timeout(3000)
    yield Row("the page's first 3 s with that map, all messages", first, "bytes", "in the next 3 s nothing more is sent" if sum(sizes) == first else f"then {(sum(sizes) - first) / 3:,.0f} bytes a second", target="<= 2000000")
    box, before, began = page.locator(".bk-Figure").first.bounding_box(), sum(sizes), time.perf_counter()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.get_by_text("learning rate of first").first.wait_for()
    took = time.perf_counter() - began
    page.wait_for_timeout(500)  # until the last message is counted
    yield Row("read a pixel under the pointer, there and back", 1e3 * took, "ms", limit=f"{sum(sizes) - before:,} bytes")
    yield Row("redraw of that map in the browser", page.evaluate(REDRAW), "ms", "two frames of 60 Hz are 33 ms", limit="without a graphics card")
