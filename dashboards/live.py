"""The live page: watch a run train, and pause, resume or stop it.

panel serve dashboards/live.py --address 127.0.0.1 --port 5006 --args runs

It reads journals and sends commands into them; it never trains. Without `--address 127.0.0.1` Panel listens on
every interface: then the buttons work only behind a login (`--basic-auth`), and the page says so.
"""
import asyncio
import html
import math
import os
import sys
import time
from pathlib import Path

import panel as pn
import panel_material_ui as pmui
import numpy as np
from panel.io.callbacks import PeriodicCallback

from page_parts import EXPOSED, STYLE, card, duration, exposed, logged_in, number
from run_charts import CSS_DASHES, LANES, TALL, Charts, look_of
from run_senses import HUES, SenseCharts, now_of
from run_tail import LIVE, UNREADABLE, Watch, lane_labels, last_finite, short_setting

TICK = 500  # ms between updates of a page
STALE = 10.0  # seconds without a step after which a running run is called stale


def bits_per_character(moment, loss):
    "Nats per token as bits per character, where the run says how long a token is."
    length = moment.config.get("facts", {}).get("corpus", {}).get("characters_per_token")
    return None if loss is None or not length else loss / math.log(2) / length


def best_validation(moment):
    "The lowest validation loss so far: its value, step and label."
    found = []
    for series, label in zip(moment.series, lane_labels(moment.series)):
        sound = np.isfinite(series.validation_loss)
        if not sound.any(): continue
        lowest = np.where(sound, series.validation_loss, np.inf).argmin()
        found.append((float(series.validation_loss[lowest]), float(series.validation_step[lowest]), label))
    return min(found, default=None)


def headline(moment, now):
    "The numbers on top, as HTML."
    progress, live = moment.progress, moment.live
    step = max((int(series.step[-1]) + 1 for series in moment.series if len(series.step)), default=0)
    planned = progress.get("planned_steps") or moment.config.get("steps")
    frozen = sum(series.frozen_at is not None for series in moment.series)
    age = None if moment.updated is None else now - moment.updated
    stale = moment.status == "running" and age is not None and age > STALE
    best, rate, left = best_validation(moment), progress.get("tokens_per_second"), progress.get("seconds_left")
    cards = [card("status", moment.status, kind=html.escape(moment.status)),
             card("step", f"{step:,}", f"of {planned:,} ({step / planned:.0%})" if planned else ""),
             best_card(moment, best),
             card("tokens per second", f"{rate:,.0f}" if rate else "–", "all lanes together"),
             card("time left", duration(left) if live and left is not None else "–", "paused" if moment.status == "paused" else ""),
             card("last update", "–" if age is None else f"{duration(age)} ago", "stale: no step for a while" if stale else "", "stale" if stale else ""),
             card("lanes", f"{len(moment.series) - frozen} alive", f"{frozen} frozen")]
    if progress.get("monitor"): cards.append(monitor_card(progress["monitor"]))
    return f'<div class="cards">{"".join(cards)}</div>'


def percent(share):
    "7.1 % for 0.071."
    return f"{100 * share:.3g}\u2009%"


def monitor_card(monitor):
    "The share of time that the monitor takes; under the pointer what each sense takes, and what is off and why."
    share, budget, off = monitor.get("share"), monitor.get("budget"), monitor.get("off") or {}
    hover = [f"{name}: every {facts['period']} steps, {percent(facts['share'])}" for name, facts in (monitor.get("senses") or {}).items()
             if None not in (facts.get("period"), facts.get("share"))]
    if (monitor.get("stretch") or 1) > 1: hover.append(f"To keep to the budget all periods are {monitor['stretch']:.3g} times as long.")
    hover += [f"{name} is off: {reason}" for name, reason in off.items()]
    more = " · ".join(filter(None, [f"of {percent(budget)}" if budget is not None else "", f"{len(off)} off" if off else ""]))
    over = None not in (share, budget) and share > budget
    return card("monitor", "–" if share is None else percent(share), more, "stale" if over else "", "\n".join(hover))


def best_card(moment, best):
    "The best validation loss, in both units."
    if best is None: return card("best validation loss", "–", "none yet")
    loss, step, label = best
    bits = bits_per_character(moment, loss)
    value = f"{number(loss)} nats" + (f" · {number(bits)} bits/char" if bits is not None else "")
    return f'<div class="wide">{card("best validation loss", value, f"{label}, step {int(step):,}")}</div>'


COLUMNS = "lane", "settings", "training loss", "validation loss", "bits per character", "gradient norm", "state"
SENSED = *COLUMNS[:-1], "index", "regime", "state"


def lane_rows(moment):
    "For every lane the cells under COLUMNS, or under SENSED, as HTML."
    for series in moment.series[:LANES]:
        validation = last_finite(series.validation_loss)
        settings = ", ".join(short_setting(name, value) for name, value in series.settings.items())
        state = {"running": "training"}.get(moment.status, moment.status)
        if series.frozen_at is not None: state = f"✕ frozen at step {series.frozen_at:,}: not finite"
        cells = [str(series.lane), settings, number(last_finite(series.loss)), number(validation),
                 number(bits_per_character(moment, validation)), number(last_finite(series.gradient_norm)), state]
        cells = list(map(html.escape, cells))
        if moment.sensed: cells[-1:-1] = sense_cells(series)
        yield cells


def sense_cells(series):
    "The index and the most probable regime of a lane, as HTML."
    words, regime, index = now_of(series)
    swatch = f'<i class="regime" style="background: {HUES[regime]}"></i>' if regime >= 0 else ""
    return [number(index, 2), swatch + html.escape(words)]


def lane_table(moment):
    "The last values of every lane, as HTML. A lane's colour is that of its lines."
    head = "".join(f'<th scope="col">{name}</th>' for name in (SENSED if moment.sensed else COLUMNS))
    lines = []
    for i, cells in enumerate(lane_rows(moment)):
        colour, dash = look_of(i)
        swatch = f'<i style="border-top: 3px {CSS_DASHES[dash]} {colour}"></i>'
        lines.append(f"<tr><td>{swatch}" + "</td><td>".join(cells) + "</td></tr>")
    return f'<div class="scroll"><table class="{"sensed" if moment.sensed else ""}"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def not_sensed(moment):
    "Why there is no index and no regime to see."
    if moment.sensed: return ""
    return "The monitor of this run has written nothing yet." if moment.progress.get("monitor") else "Not sensed: this run has no monitor."


def command_line(commands, now):
    "What became of the commands of the last minute."
    words = {"pending": "sent", "done": "acknowledged"}
    told = []
    for command in commands[:3]:
        if now - command["sent"] > 60: continue
        reason = f": {command['reason']}" if command["reason"] else ""
        told.append(f"<b>{html.escape(command['kind'])}</b> {html.escape(words.get(command['status'], command['status']) + reason)}")
    return f'<div class="commands" role="status">{" &ensp;·&ensp; ".join(told)}</div>'


class LivePage:
    "One viewer's page."

    def __init__(self, watch, wanted=None):
        self.watch, self.wanted, self.charts, self.senses, self.key = watch, wanted, None, None, None
        self.entries, self.sent = [], []  # runs to choose from; commands that the journal has not shown yet
        self.allowed = not exposed() or logged_in()
        self._make_widgets()
        self._make_layout()

    def _make_widgets(self):
        self.choice = pmui.Select(label="Run", options=[], size="small", width=300, margin=(5, 10))
        self.smoothing = pmui.FloatSlider(label="Smoothing", start=0.0, end=0.99, step=0.01, value=0.9, width=170, size="small", margin=(5, 14))
        self.log = pmui.Switch(label="Log loss", value=False, margin=(14, 8))
        self.buttons = {kind: pmui.Button(label=kind.capitalize(), icon=icon, color=colour, variant="outlined", size="small", disabled=True, margin=(10, 4))
                        for kind, icon, colour in (("pause", "pause", "primary"), ("resume", "play_arrow", "primary"), ("stop", "stop", "error"))}
        self.sure = pmui.Button(label="Stop the run", color="error", variant="contained", margin=10)
        self.keep = pmui.Button(label="Keep training", variant="outlined", margin=10)
        self.dialog = pmui.Dialog(pn.pane.HTML("The run ends after its present step and keeps all it has written.", styles={"font-size": "15px"}),
                                  pn.Row(self.keep, self.sure), title="Stop this run?", title_variant="h5", close_on_click=True)
        self.choice.param.watch(self._choose, "value")
        self.log.param.watch(lambda event: self.charts and self.charts.show_log(event.new), "value")
        for kind in ("pause", "resume"): self.buttons[kind].on_click(self._sender(kind))
        self.buttons["stop"].on_click(lambda event: self.dialog.param.update(open=True))
        self.keep.on_click(lambda event: self.dialog.param.update(open=False))
        self.sure.on_click(self._sender("stop"))

    def _make_layout(self):
        text = dict(stylesheets=[STYLE], sizing_mode="stretch_width", margin=(4, 12))
        self.message, self.notice, self.commands, self.cards, self.table, self.quiet = (pn.pane.HTML("", **text) for _ in range(6))
        column = dict(stylesheets=[TALL], sizing_mode="stretch_width")
        self.drawing = pn.Column(margin=0, **column)
        self.controls = pn.FlexBox(self.choice, *self.buttons.values(), self.smoothing, self.log, align_items="center", margin=(8, 4, 0, 4))
        self.body = pn.Column(self.cards, self.drawing, self.table, self.quiet, visible=False, **column)
        self.view = pn.Column(self.controls, self.commands, self.notice, self.message, self.body, self.dialog, **column)
        self._say("Looking for runs…")

    def _say(self, sentence):
        "Shows a sentence of HTML where the charts would be; '' shows the charts."
        self.message.param.update(object=f'<div class="message" role="status">{sentence}</div>', visible=bool(sentence))
        self.body.visible = not sentence

    def start(self):
        "Begins to keep the page up to date, for as long as it is open."
        # in the background: each busy indication would walk over every model of the page, four times the work of a tick
        PeriodicCallback(callback=self.tick, period=TICK, background=True).start()
        self.tick()

    def tick(self):
        "Brings the page up to date: one message to the browser."
        with pn.io.hold():
            self.entries = self.watch.entries  # one answer for the whole tick: the watch goes on meanwhile
            self._list()
            self._show(self.watch.ask(self.key))

    def _list(self):
        "The runs to choose from; the one in the address first, else the newest that is running."
        if self.key is None and self.entries: self._turn_to(self.wanted or self.entries[0].key)
        options = {f"{entry.key} (training)" if entry.live else entry.key: entry.key for entry in self.entries}
        if self.key and self.key not in options.values(): options[f"{self.key} (not there)"] = self.key
        if options != self.choice.options: self.choice.param.update(options=options, value=self.key, disabled=not options)

    def _choose(self, event):
        if event.new in (None, self.key): return
        self._turn_to(event.new)
        self.tick()

    def _turn_to(self, key):
        "Another run: its page is built from nothing."
        self.key, self.charts, self.senses, self.sent = key, None, None, []
        self.drawing.clear()
        if pn.state.location: pn.state.location.update_query(run=key)

    def _show(self, moment):
        self._tell(moment)
        self._enable(moment)
        if self.key is None: return self._say(self._empty())
        if moment is None: return self._say(self._waiting())
        if not moment.series: return self._say(f"{html.escape(moment.key)} has begun; its first step is not written yet…")
        self._draw(moment)
        self.cards.object = headline(moment, time.time())
        self.table.object = lane_table(moment)
        self.quiet.object = f'<div class="quiet">{not_sensed(moment)}</div>'
        self._say("")

    def _empty(self):
        if not self.watch.listed: return "Looking for runs…"
        folder = html.escape(str(self.watch.root))
        return (f"There is no run below <code>{folder}</code> yet. Start one in a terminal, and it shows here by itself:<br>"
                f"<code>sdalab train demo</code>")

    def _waiting(self):
        name = html.escape(self.key)
        if any(entry.key == self.key for entry in self.entries): return f"Reading {name}…"
        return f"There is no run named <code>{name}</code> below <code>{html.escape(str(self.watch.root))}</code>; choose another one."

    def _tell(self, moment):
        "What is wrong, and what became of commands."
        told = []
        if moment and moment.problem: told.append(f"The journal cannot be read just now: {moment.problem}. This page tries again by itself.")
        if moment and len(moment.series) > LANES: told.append(f"{LANES} of {len(moment.series)} lanes are shown.")
        if moment: told += [f"The sense {name} failed and is off: {reason}." for name, reason in moment.failed.items()]
        told += [f"Left out: {problem}." for problem in self.watch.problems if not (moment and moment.problem)]
        if not self.allowed: told.append(EXPOSED)
        self.notice.param.update(object="".join(f'<div class="notice" role="alert">{html.escape(line)}</div>' for line in told), visible=bool(told))
        known = moment.commands if moment else ()
        self.sent = [command for command in self.sent if command["id"] not in {one["id"] for one in known}]
        line = command_line([*reversed(self.sent), *known], time.time())
        self.commands.param.update(object=line, visible="<b>" in line)

    def _enable(self, moment):
        status = moment.status if moment and moment.live and self.allowed else ""
        for kind, when in (("pause", ("running",)), ("resume", ("paused",)), ("stop", LIVE)): self.buttons[kind].disabled = status not in when

    def _sender(self, kind):
        async def send(event): await self._send(kind)
        return send

    async def _send(self, kind):
        "Puts a command into the run's inbox. A page that may not is refused here, whatever its buttons look like."
        self.dialog.open = False
        if not self.allowed: return
        try:
            number = await asyncio.to_thread(self._put, self.key, kind)
            self.sent.append(dict(id=number, kind=kind, status="pending", reason="", sent=time.time()))
        except UNREADABLE as problem:
            self.sent.append(dict(id=None, kind=kind, status="not sent", reason=str(problem), sent=time.time()))
        self.tick()

    def _put(self, key, kind): return self.watch.run(key).send(kind, expires_s=30.0)

    def _draw(self, moment):
        "Feeds the charts; builds them where the lanes are others."
        shown = self.charts and (self.charts.keys, self.senses.shown if self.senses else frozenset())
        new = shown != ([series.key for series in moment.series[:LANES]], moment.sensed)
        if new:
            self.charts = Charts(moment, self.log.value)
            self.senses = SenseCharts(self.charts, moment) if moment.sensed else None
        self.charts.feed(moment, self.smoothing.value)
        if self.senses: self.senses.feed(moment)
        if new: self.drawing[:] = [pn.pane.Bokeh(self.charts.view, sizing_mode="stretch_width")]


def runs_folder(arguments, environment):
    "The folder of all runs: the argument, else $SDALAB_RUNS, else ./runs."
    return Path(arguments[0] if arguments else environment.get("SDALAB_RUNS", "runs"))


def serve():
    "The page of this viewer."
    pn.extension(throttled=True)
    root = runs_folder(sys.argv[1:], os.environ)
    watch = pn.state.as_cached(f"watch {root.absolute()}", Watch, root=root)
    wanted = pn.state.session_args.get("run", [b""])[0].decode(errors="replace")
    live = LivePage(watch, wanted or None)
    pn.state.onload(live.start)  # not before: what changes while the browser connects can be lost
    pmui.Page(title="sdalab live", main=[live.view], busy_indicator=None, sx={"& .MuiToolbar-root": {"minHeight": 48}}).servable()


if pn.state.served: serve()
