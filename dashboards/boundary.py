"""The page of maps: where training works, watched while it is computed, and looked into ever deeper.

panel serve dashboards/boundary.py dashboards/live.py --address 127.0.0.1 --port 5006

It shows the maps of ./maps, or of $SDALAB_MAPS, or of the folder named with --args; runs of pixels go to ./runs, $SDALAB_RUNS
or the second folder. Windows, pixels and runs are computed by processes of `sdalab`; the page itself computes nothing.
Without `--address 127.0.0.1` Panel listens on every interface: then the page only shows, unless it is behind a login.
"""
import html
import os
import sys
import urllib.parse
from pathlib import Path

import panel as pn
import panel_material_ui as pmui
import psutil
from bokeh.models import CustomJS, Div
from panel.io.callbacks import PeriodicCallback

from map_charts import curve_figure, legend, neighbour_grid, pixel_table
from map_tail import MapWatch, beside, curve_of
from map_work import Workers
from sdalab.boundary.view import COLOURS, MapView, digits, in_words, plain
from sdalab.checked import BadInput
from sdalab.views.asking import EXPOSED, may_command, refused
from sdalab.views.curves import TALL
from sdalab.views.now import STYLE, card, duration

TICK = 500  # ms between updates of a page
CORES = os.cpu_count() or 1
SIDES = 32, 64, 128, 256, 512  # pixels along the longer side of a window
MORE = """
.cards { margin-bottom: 2px; } .legend { display: flex; flex-wrap: wrap; gap: 4px 22px; font-size: 13px; }
.legend i { display: inline-block; width: 64px; height: 13px; border-radius: 2px; margin: 0 7px; vertical-align: -2px; border: 1px solid rgba(128, 128, 128, 0.5); }
.legend small { opacity: 0.72; } .finished { border-left-color: #0072b2; } .interrupted { border-left-color: #e69f00; }
.small { font-size: 13px; line-height: 1.5; } .how { font-size: 14px; line-height: 1.6; opacity: 0.85; } .how b { font-weight: 500; }
.pair { display: flex; flex-wrap: wrap; gap: 6px 26px; } .pair > * { flex: 1 1 250px; }
h3 { font-size: 16px; font-weight: 500; margin: 4px 0 6px; } .facts td:first-child { opacity: 0.72; } .facts td { white-space: normal; }
.near { display: grid; grid-template-columns: repeat(3, 1fr); gap: 2px; max-width: 300px; font-size: 12px; font-variant-numeric: tabular-nums; }
.near div { padding: 5px 4px; text-align: center; border-radius: 2px; border: 2px solid transparent; min-height: 2.4em; } .near .mid { border-color: currentColor; font-weight: 600; }
a { color: inherit; }
"""
HOW = ('<div class="how"><b>Drag a box</b> on the map to compute it as a window of its own, as deep as the arithmetic goes.<br>'
       '<b>Click a pixel</b> to run it alone: its loss at every step, and that of the pixels beside it.<br>'
       '<b>Turn the wheel</b>, with its tool on, to enlarge what is there.</div>')
HISTORY = """
const [search, key] = cb_obj.tags, fresh = window.sdalabMap !== undefined && window.sdalabMap !== key
window.sdalabMap = key
if (search !== window.location.search) window.history[fresh ? 'pushState' : 'replaceState']({}, '', window.location.pathname + search)
if (!window.sdalabBack) window.addEventListener('popstate', window.sdalabBack = () => { cb_obj.text = window.location.search })
"""  # Panel's own address is not told of steps back
GRID = TALL + ":host { display: grid !important; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); align-items: start; gap: 8px 18px; }"


class BoundaryPage:
    "One viewer's page."

    def __init__(self, watch, workers, wanted):
        self.watch, self.workers, self.key, self.view, self.moment = watch, workers, None, None, None
        self.pixel, self.window, self.wrong, self.drawn = None, None, "", None  # chosen pixel; axes of a box; a sentence; what the curves show
        self.allowed = may_command()
        self.trail, self.inner = [], []  # windows around this one and inside it, as shown
        self.wanted, colour = key_of(wanted), wanted.get("colour")
        self._make_widgets(colour if colour in COLOURS else "class")
        self._make_layout()
        self.asked_pixel = wanted.get("pixel")

    def _make_widgets(self, colour):
        small = dict(size="small", margin=(6, 6))
        self.choice = pmui.Select(label="Map", options=[], width=250, **small)
        self.colour = pmui.Select(label="Colour by", options={words: name for name, words in COLOURS.items()}, value=colour, width=210, **small)
        self.crumbs = pn.FlexBox(margin=(0, 8), align_items="center", visible=False)
        self.inside = pn.FlexBox(margin=(0, 8), align_items="center")
        self.side = pmui.Select(label="Pixels, longer side", options=list(SIDES), value=64, width=140, **small)
        self.hands = pmui.Select(label="Processes", options=list(range(1, CORES + 1)), value=CORES, width=105, **small)
        self.compute = pmui.Button(label="Compute this window", variant="contained", size="small", margin=(12, 6))
        self.dismiss = pmui.Button(label="Dismiss", variant="text", size="small", margin=(12, 6))
        self.cancel = pmui.Button(label="Cancel", color="error", variant="outlined", size="small", margin=(4, 8))
        self.go_on = pmui.Button(label="Go on computing", variant="outlined", size="small", margin=(4, 8), visible=False)
        self.run = pmui.Button(label="Train this pixel as a run", variant="outlined", size="small", margin=(6, 8))
        self.choice.param.watch(lambda event: event.new and event.new != self._root() and self._turn_to(event.new), "value")
        self.colour.param.watch(lambda event: self._recolour(), "value")
        self.side.param.watch(lambda event: self._describe(), "value")
        self.hands.param.watch(lambda event: self._describe(), "value")
        for button, act in (self.compute, self._begin), (self.cancel, self._cancel), (self.go_on, self._resume), (self.run, self._train): button.on_click(self._doing(act))
        self.dismiss.on_click(lambda event: self._unbox())

    def _make_layout(self):
        text = dict(stylesheets=[STYLE + MORE], sizing_mode="stretch_width", margin=(4, 12))
        self.message, self.notice, self.cards, self.legend, self.asked, self.work, self.facts, self.told = (pn.pane.HTML("", **text) for _ in range(8))
        column = dict(stylesheets=[TALL], sizing_mode="stretch_width")
        self.picture, self.curves = pn.Column(margin=(0, 8), **column), pn.Column(margin=(0, 8), **column)
        self.bar = pn.Column(self.asked, pn.FlexBox(self.side, self.hands, self.compute, self.dismiss, align_items="center", margin=(0, 8)), visible=False, **column)
        self.working = pn.Row(self.work, self.cancel, visible=False, sizing_mode="stretch_width", align="center")
        self.detail = pn.Column(self.facts, self.curves, self.told, pn.FlexBox(self.run, margin=(0, 4)), visible=False, **column)
        self.how = pn.pane.HTML(HOW, **text)
        left, right = pn.Column(self.picture, self.inside, **column), pn.Column(self.bar, self.detail, self.how, **column)
        self.body = pn.Column(self.cards, self.legend, pn.Column(left, right, sizing_mode="stretch_width", stylesheets=[GRID]), visible=False, **column)
        self.way = Div(visible=False)  # the address, as the browser shows it and goes back through it
        self.way.js_on_change("tags", CustomJS(code=HISTORY))
        self.way.on_change("text", self._went)
        controls = pn.FlexBox(self.choice, self.colour, self.go_on, align_items="center", margin=(8, 6, 0, 6))
        self.whole = pn.Column(controls, self.crumbs, self.working, self.notice, self.message, self.body, pn.pane.Bokeh(self.way, margin=0), **column)
        self._say("Looking for maps…")

    def _say(self, sentence):
        "Shows a sentence of HTML where the map would be; '' shows the map."
        self.message.param.update(object=f'<div class="message" role="status">{sentence}</div>', visible=bool(sentence))
        self.body.visible = not sentence

    def start(self):
        "Begins to keep the page up to date, for as long as it is open."
        PeriodicCallback(callback=self.tick, period=TICK, background=True).start()
        self.tick()

    def tick(self):
        "Brings the page up to date: one message to the browser."
        with pn.io.hold():
            if self.key is None and (self.wanted or self.watch.entries): self._turn_to(self.wanted or self.watch.entries[0].key)
            self._list()
            self._show(self.watch.ask(self.key, [self.colour.value]))
            self._tell()

    def _root(self): return self.watch.trail(self.key)[0] if self.key else None

    def _list(self):
        "The maps to choose from, without windows of others, and the windows around and inside this one."
        words = {"running": " (computing)", "interrupted": " (not finished)"}
        options = {f"{entry.key}{words.get(entry.status, '')}": entry.key for entry in self.watch.entries if entry.parent is None}
        root = self._root()
        if root and self.watch.listed and root not in options.values(): options[f"{root} (not there)"] = root
        if options != self.choice.options or root != self.choice.value: self.choice.param.update(options=options, value=root, disabled=not options)
        trail = self.watch.trail(self.key) if self.key else []
        if trail != self.trail: self._lead_back(trail)
        inner = [entry for entry in self.watch.entries if entry.parent == self.key]
        inner.sort(key=lambda entry: [int(part) if part.isdigit() else 0 for part in entry.key.split(".")])
        if (keys := [entry.key for entry in inner]) == self.inner: return
        self.inner = keys
        chips = [pmui.Button(label=entry.key.removeprefix(f"{self.key}."), variant="outlined", size="small", margin=3, on_click=lambda event, to=entry.key: self._turn_to(to)) for entry in inner]
        self.inside[:] = [pn.pane.HTML("Windows of this map:", styles={"font-size": "13px", "opacity": "0.75"}), *chips] if chips else []
        if self.view: self.view.frame(self._frames())

    def _lead_back(self, trail):
        "A way back to every wider window."
        self.trail, parts, quiet = trail, [], {"font-size": "13px", "opacity": "0.75"}
        for above, key in zip([None, *trail], trail):
            parts.append(pn.pane.HTML("›" if above else "History:", styles=quiet, margin=(0, 4)))
            parts.append(pmui.Button(label=key.removeprefix(f"{above}."), variant="text", size="small", margin=2, disabled=key == self.key, on_click=lambda event, to=key: self._turn_to(to)))
        self.crumbs.param.update(objects=parts, visible=len(trail) > 1)

    def _frames(self): return {entry.key.removeprefix(f"{self.key}."): (entry.x, entry.y) for entry in self.watch.entries if entry.parent == self.key}

    def _turn_to(self, key, pixel=None):
        "Another map, or another window of it: its page is built from nothing."
        self.key, self.view, self.moment, self.pixel, self.window, self.drawn, self.wrong = key, None, None, pixel, None, None, ""
        self.picture.clear()
        self.cards.object = self.legend.object = ""  # nothing of the map before is left to read
        self.bar.visible = self.detail.visible = False
        self._address()

    def _address(self):
        "The map, its window, the colour and the pixel in the page's address: names and numbers, never paths."
        root = self._root()
        window, pixel = self.key[len(root) + 1:], ",".join(map(str, self.pixel or ()))
        said = {"map": root, "window": window, "colour": self.colour.value if self.colour.value != "class" else "", "pixel": pixel}
        self.way.tags = ["?" + urllib.parse.urlencode({name: value for name, value in said.items() if value}), self.key]

    def _went(self, name, old, new):
        "The viewer went back, or forward, in the browser."
        key = key_of(dict(urllib.parse.parse_qsl(new.lstrip("?"))))
        if key and key != self.key: self._turn_to(key)

    def _recolour(self):
        if self.key: self._address()
        self.moment = None  # it is drawn again
        self.tick()

    def _show(self, moment):
        "The map, or why there is none."
        self.go_on.visible = bool(moment and moment.status == "interrupted" and moment.problem is None and self.allowed and not (self.workers.map and self.workers.map.alive))
        if self.key is None: return self._say(self._empty())
        if moment is None or moment.dataset is None: return self._say(self._waiting(moment))
        colour = self.colour.value
        if moment is not self.moment and colour in moment.painted: self._draw(moment, colour)
        if self.view: self._say("")
        self._follow_pixel()

    def _empty(self):
        if not self.watch.listed: return "Looking for maps…"
        folder = html.escape(str(self.watch.root))
        return f"There is no map in <code>{folder}</code> yet. Start one in a terminal, and it fills in here by itself:<br><code>sdalab map --maps {folder}</code>"

    def _waiting(self, moment):
        name, job = html.escape(self.key), self.workers.map
        if job and job.key == self.key and job.state == "running": return f"A worker begins with {name}; its first pixels show in a few seconds…"
        if job and job.key == self.key and job.state in ("failed", "cancelled"): return f"{name} was not computed. Go back to choose another window."
        if moment and moment.problem: return f"{name} cannot be shown yet."
        if any(entry.key == self.key for entry in self.watch.entries): return f"Reading {name}…"
        if not self.watch.listed: return "Looking for maps…"
        return f"There is no map named <code>{name}</code> in <code>{html.escape(str(self.watch.root))}</code>; choose another one."

    def _draw(self, moment, colour):
        "Feeds the view; builds it where the map is another."
        if self.view is None or self.view.size != (moment.dataset.sizes["x"], moment.dataset.sizes["y"]):
            self.view = MapView(moment.dataset, colour, pick=self._pick, box=self._box, painted=moment.painted[colour])
            self.view.frame(self._frames())
            self.picture[:] = [self.view]
            self._set_side(moment)
            if self.asked_pixel: self._pick_asked()
        else: self.view.show(moment.dataset, moment.painted[colour], colour)
        self.moment, self.drawn = moment, None if self.drawn is None else (*self.drawn[:-1], None)
        self.cards.object, self.legend.object = headline(moment), legend(moment.dataset, colour)

    def _set_side(self, moment):
        longest = max(moment.dataset.sizes.values())
        self.side.param.update(options=sorted({*SIDES, longest}), value=longest)

    def _pick_asked(self):
        "The pixel that the address names: its record and a curve that is there, no new work."
        numbers, self.asked_pixel = self.asked_pixel.split(","), None
        if len(numbers) == 2 and all(number.isdecimal() and len(number) < 6 for number in numbers) and all(int(at) < n for at, n in zip(numbers, self.view.size)):
            self.pixel = tuple(map(int, numbers))
            self.view.mark(*self.pixel)
            self._address()

    def _tell(self):
        "What is wrong, and what is under way."
        told, job = [self.wrong] if self.wrong else [], self.workers.map
        problem = self.moment and self.watch.ask(self.key, [self.colour.value])
        if problem and problem.problem: told.append(f"{self.key} cannot be read just now: {problem.problem}. This page tries again by itself.")
        if job and job.state == "failed" and self.key in (job.key, *self.watch.trail(job.key)): told.append(f"{job.key} could not be computed: {job.said}")
        told += [f"Left out: {problem}." for problem in self.watch.problems]
        if not self.allowed: told.append(EXPOSED)
        self.notice.param.update(object="".join(f'<div class="notice" role="alert">{html.escape(line)}</div>' for line in told), visible=bool(told))
        alive = bool(job and job.alive)
        line = f"{'Ending' if job.state == 'cancelled' else 'Computing'} <b>{html.escape(job.key)}</b>…" if alive else ""
        self.work.object = f'<div class="message" role="status">{line}</div>'
        self.working.visible, self.cancel.disabled = alive, not (alive and job.state == "running" and self.allowed)
        self.compute.disabled = alive or not self.allowed

    def _box(self, x, y):
        "A box was drawn."
        self.window = x, y
        self._describe()
        self.bar.visible = True

    def _unbox(self):
        self.window, self.bar.visible = None, False
        if self.view: self.view.unbox()

    def _shape(self):
        "Columns and rows of the window that was drawn: pixels as wide and as high as those of this map are, in proportion."
        parts = [(axis.share_of(new.high) - axis.share_of(new.low)) * n for axis, new, n in zip(self.view.axes.values(), self.window, self.view.size)]
        return tuple(max(2, round(self.side.value * part / max(parts))) for part in parts)

    def _describe(self):
        "What a box asks for, and how long that takes at most."
        if not (self.window and self.view): return
        (columns, rows), facts, lines = self._shape(), self.moment.manifest, []
        for axis in self.window:
            n = max(digits([axis.low, axis.high]) + 1, 4)
            lines.append(f"{html.escape(in_words(axis.name))}: {plain(axis.low, n)} to {plain(axis.high, n)}")
        cost = facts["seconds"] / max(self.moment.computed, 1) * columns * rows / self.hands.value
        lines.append(f"{columns} × {rows} pixels, at most about {duration(max(1, cost))}" + (" at this map's speed" if facts["seconds"] else ""))
        self.asked.object = f'<h3>A deeper window</h3><div class="small">{"<br>".join(lines)}</div>'

    def _doing(self, act):
        "A button's action; what it cannot do is said in one sentence. A page that may not is refused here, whatever its buttons look like."
        def do(event):
            if not self.allowed: return
            self.wrong = ""
            try: act()
            except (BadInput, OSError) as problem: self.wrong = str(problem)
            self.tick()
        return do

    def _begin(self):
        if not self.window: return
        key = self.workers.window(self.key, *self.window, *self._shape(), self.hands.value)
        self._unbox()
        self._turn_to(key)

    def _cancel(self): self.workers.map and self.workers.map.cancel()

    def _resume(self): self.workers.go_on(self.key, self.hands.value)

    def _train(self): self.pixel and self.workers.train(self.key, *self.pixel)

    def _pick(self, column, row):
        "A pixel was clicked: what is known of it at once, and its curve as soon as a worker has it."
        self.pixel, self.drawn, self.wrong = (column, row), None, ""
        self._address()
        folder = self.watch.entry(self.key).folder
        wanted = [(column, row), *beside(column, row, self.view.size).values()]
        if self.allowed and any(curve_of(folder, *at) is None for at in wanted):
            try: self.workers.look_at(self.key, column, row)
            except (BadInput, OSError) as problem: self.wrong = str(problem)
        self.tick()

    def _follow_pixel(self):
        "The chosen pixel: its record, its neighbours', and the curves that are there."
        self.detail.visible, self.how.visible = bool(self.pixel), not (self.pixel or self.window)
        if not self.pixel: return
        (column, row), dataset = self.pixel, self.moment.dataset
        folder, near = Path(self.watch.root) / self.key, beside(column, row, self.view.size)
        paths = [(folder / "pixels" / f"{i}_{j}.csv") for i, j in ((column, row), *near.values())]
        state = self.key, self.pixel, tuple(path.exists() and path.stat().st_mtime_ns for path in paths), "told"
        if state != self.drawn:
            self.facts.object = f'<div class="pair">{pixel_table(dataset, column, row)}{neighbour_grid(dataset, column, row, self.colour.value)}</div>'
            curves = {side: (curve_of(folder, *at), int(dataset.label.values[at[::-1]])) for side, at in {"this pixel": self.pixel, **near}.items()}
            curves = {side: one for side, one in curves.items() if one[0] is not None}
            if self.drawn is None or self.drawn[:3] != state[:3]: self.curves[:] = [pn.pane.Bokeh(curve_figure(curves), sizing_mode="stretch_width")] if curves else []
            self.drawn = state
        self._tell_pixel()

    def _tell_pixel(self):
        "What becomes of the pixel's worker, and of its run."
        job, lines, decoder = self.workers.pixel, [], self.moment.manifest["configuration"]["landscape"]["name"] == "decoder"
        if job and job.key == (self.key, *self.pixel):
            if job.state == "running": lines.append("A worker runs this pixel alone, and then those beside it…")
            if job.state == "failed": lines.append(f"Its curve could not be computed: {html.escape(job.said)}")
            lines += [f"The curve's record {html.escape(line)}." for line in job.told.splitlines() if line.startswith("in the map: ")]
        elif not self.curves and self.allowed: lines.append("Click it on the map to run it alone.")
        name = f"{self.key}-{self.pixel[0]}-{self.pixel[1]}"
        run, there = self.workers.trained.get(name), self.workers.journal(name).exists()
        if there: lines.append(self._link(name))
        elif run and run.state == "running": lines.append(f"The run {html.escape(name)} begins…")
        if run and run.state == "failed": lines.append(f"The run {html.escape(name)} failed: {html.escape(run.said)}")
        if not decoder: lines.append("Maps of this kind have no runs of the lab behind them.")
        self.run.disabled = there or not decoder or not self.allowed or bool(run and run.state == "running")
        self.told.object = '<div class="message" role="status" style="font-size: 13px">' + "<br>".join(lines) + "</div>"

    def _link(self, name):
        "Where to watch a run."
        if live_is_served(): return f'It is a run: <a href="live?{html.escape(urllib.parse.urlencode(dict(run=name)))}" target="_blank">watch {html.escape(name)}</a>'
        return f"It is the run <b>{html.escape(name)}</b>. To watch it: <code>panel serve dashboards/live.py --args {html.escape(str(self.workers.runs))}</code>"


def headline(moment):
    "The numbers on top, as HTML."
    facts, size = moment.manifest, moment.dataset.label.size
    running, audit = moment.status == "running", facts.get("audit") or {}
    cards = [card("status", {"running": "computing"}.get(moment.status, moment.status), kind=moment.status),
             card("pixels", f"{moment.dataset.sizes['x']:,} × {moment.dataset.sizes['y']:,}", facts.get("facts", {}).get("dtype", "").removeprefix("torch.")),
             card("computed", f"{moment.computed:,}", f"of about {moment.expected:,} needed" if running else f"{moment.computed / size:.0%}; the rest is filled in" if facts["finished"] and moment.computed < size else f"{moment.computed / size:.0%}")]
    if running: cards += [card("pixels per second", plain(moment.rate, 3) if moment.rate else "–"), card("time left", duration(moment.left) if moment.left is not None else "–", "about")]
    if audit.get("filled"): cards.append(card("audit of the filled", f"{audit['wrong']} of {audit['drawn']} wrong", f"at most {audit['error']:.1%} of all, at 95 % confidence"))
    if facts.get("seconds"): cards.append(card("worked", duration(facts["seconds"]), "all processes together"))
    return f'<div class="cards">{"".join(cards)}</div>'


def key_of(wanted):
    "The map, or window of one, that an address names; None where it names none."
    return ".".join(filter(None, (wanted.get("map"), wanted.get("window")))) if wanted.get("map") else None


def live_is_served():
    "Whether this server also has the page of runs."
    return any(Path(word).name == "live.py" for word in psutil.Process().cmdline())


def folders(arguments, environment):
    "The folders of maps and of runs: the arguments, else $SDALAB_MAPS and $SDALAB_RUNS, else ./maps and ./runs."
    found = [environment.get("SDALAB_MAPS", "maps"), environment.get("SDALAB_RUNS", "runs")]
    found[:len(arguments)] = arguments[:2]
    return tuple(map(Path, found))


def serve():
    "The page of this viewer."
    pn.extension(throttled=True)
    if instead := refused(): return instead.servable()
    maps, runs = folders([] if live_is_served() else sys.argv[1:], os.environ)  # with both pages --args belongs to neither
    watch = pn.state.as_cached(f"maps {maps.absolute()}", MapWatch, root=maps)
    workers = pn.state.as_cached(f"workers {maps.absolute()} {runs.absolute()}", Workers, watch=watch, runs=runs)
    wanted = {name: values[0].decode(errors="replace") for name, values in pn.state.session_args.items()}
    page = BoundaryPage(watch, workers, wanted)
    pn.state.onload(page.start)  # not before: what changes while the browser connects can be lost
    pmui.Page(title="sdalab maps", main=[page.whole], busy_indicator=None, sx={"& .MuiToolbar-root": {"minHeight": 48}}).servable()


if pn.state.served: serve()
