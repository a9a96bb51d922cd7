"""What a monitor read while a run trained: the uncertainty index of every lane, and how probable each regime is."""
import html
import math

import numpy as np
from bokeh.events import MouseLeave, MouseMove, Tap
from bokeh.models import (Column, ColumnDataSource, CustomJS, DataRange1d, Div, FixedTicker, InlineStyleSheet, Label, Line, Node,
                          NumeralTickFormatter, Quad, Range1d, Row, Scatter, Select, Span, Stack, VArea)

from run_charts import BURST, GREY, GRID, SCREEN, short, span_of
from run_tail import PROBABILITIES, REGIMES, last_finite, thin

WORDS = ("learning", "plateau", "edge of stability/oscillating", "chaotic", "benign divergence", "catastrophic divergence", "overfitting")
NAMES = tuple(name.split("_")[0] for name in REGIMES)  # short enough for a lane's reading
# Paul Tol's "bright" set for the colour-blind, in an order of its own; none of them is a lane's colour.
HUES = "#228833", "#bbbbbb", "#66ccee", "#aa3377", "#ccbb44", "#ee6677", "#4477aa"
THRESHOLDS = 2.5, 3.2  # of the index
HIGHEST = 12.0  # where the index is drawn that is farther out, so that one lane does not flatten the others
STRIP = 400  # stretches of a lane's strip on the screen after a refill
LEVELS = 10  # steps of opacity; neighbours of one regime and one level are drawn as one
ROOM = 24  # pixels of height for a lane's strip
BADGE = dict(text_color="#ffffff", background_fill_color="#6b6b6b", border_radius=2)  # readable on lines, light and dark
EVERY, SHARES = "every lane", "Regimes: how probable each is"

READ_MIXTURE = """
const steps = source.data.step, n = steps.length
let i = 0
while (i < n - 1 && steps[i + 1] - cb_obj.x <= cb_obj.x - steps[i]) i += 1
const there = n > 0 && names.some((name) => source.data[name][i] > 0)
const values = names.map((name) => there ? `${(100 * source.data[name][i]).toFixed(0)}\\u2009%` : '–')
const text = legend.tags[0].replace(/<b>[^<]*<\\/b>/g, () => `<b>${values.shift()}</b>`)
legend.setv({text: there ? text.replace('&nbsp;', `at step ${steps[i].toLocaleString('en')}`) : text}, {sync: false})
"""
UNREAD_MIXTURE = "legend.setv({text: legend.tags[0]}, {sync: false})"
LEGEND_STYLE = """
:host { font-size: 13px; margin: 10px 12px 0; width: 100%; }
.regimes { font-variant-numeric: tabular-nums; display: flex; flex-wrap: wrap; gap: 2px 10px; align-items: center; }
.regimes span { white-space: nowrap; }
.regimes i { display: inline-block; width: 14px; height: 14px; margin-right: 6px; vertical-align: -2px; border-radius: 2px; }
.regimes b { font-weight: 500; display: inline-block; min-width: 2.9em; } .regimes .step { opacity: 0.75; min-width: 7.5em; }
"""
SELECT_STYLE = """
:host { margin: 4px 12px 0; flex: none; }
.bk-input-group { flex-direction: row !important; align-items: center; gap: 8px; font-size: 13px; }
label { margin: 0; white-space: nowrap; }
select.bk-input { color: inherit; font: inherit; border: 1px solid #8a8a8a; border-radius: 4px; height: 28px; padding: 0 26px 0 8px;
  appearance: none !important;
  background: linear-gradient(45deg, transparent 50%, #8a8a8a 50%) right 13px center / 6px 6px no-repeat,
    linear-gradient(-45deg, transparent 50%, #8a8a8a 50%) right 8px center / 6px 6px no-repeat !important; }
select.bk-input option { background: Canvas; color: CanvasText; }
"""


def most_probable(senses, where=slice(None)):
    "Number and probability of the most probable regime in some rows; -1 and NaN where there is none."
    table = np.array([senses[name][where] for name in PROBABILITIES], dtype=float)
    known = np.isfinite(table).all(0)
    table = np.where(known, table, 0.0)
    return np.where(known, table.argmax(0), -1), np.where(known, table.max(0), np.nan)


def now_of(series):
    "What a lane's table row says: words and probability of its regime, its number, and its last index."
    regime, probability = (values[-1] if len(values) else -1 for values in most_probable(series.senses, slice(-1, None)))
    words = f"{WORDS[int(regime)]} {probability:.0%}".replace("%", "\u2009%") if regime >= 0 else "–"
    return words, int(regime), last_finite(series.senses["uncertainty_index"][-100:])


def stretches(senses, step, first, last, stride):
    "Ends, regimes and levels of the stretches of `stride` rows, each under the regime that is most probable on average."
    starts = np.arange(first, last, stride)
    ends = np.minimum(starts + stride, last) - 1
    sums = [np.add.reduceat(senses[name][first:last].astype(float), starts - first) for name in PROBABILITIES]
    means = dict(zip(PROBABILITIES, np.array(sums) / (ends + 1 - starts)))
    regime, probability = most_probable(means)
    level = np.where(regime >= 0, np.ceil(LEVELS * np.nan_to_num(probability)), 0).astype(int)
    return step[ends] + 0.5, regime, level


def merged(left, right, regime, level):
    "Stretches as columns of the strip; neighbours that look the same are one, and those of no regime are left out."
    changes = np.flatnonzero((np.diff(regime) != 0) | (np.diff(level) != 0))
    heads, tails = np.concatenate([[0], changes + 1]).astype(int), np.concatenate([changes, [len(regime) - 1]]).astype(int)
    lefts = np.concatenate([[left], right[:-1]])
    drawn = [(lefts[head], right[tail], int(regime[head]), int(level[head])) for head, tail in zip(heads, tails) if regime[head] >= 0]
    return [list(column) for column in zip(*drawn)] or [[], [], [], []]


def strip_columns(left, right, regime, level):
    "What the browser draws; a regime that is barely ahead is still seen."
    opacity = [round(0.15 + 0.85 * n / LEVELS, 3) for n in level]
    return dict(left=list(map(float, left)), right=list(map(float, right)), colour=[HUES[i] for i in regime], alpha=opacity)


def packed(columns):
    "The same columns as arrays, which are fewer bytes where there are many rows."
    return {name: np.array(values, dtype="f8" if name == "step" else "f4") for name, values in columns.items()}


class SenseFeed:
    "What the senses of one lane have on the screen, and how far it has been sent."

    def __init__(self):
        self.rows = ColumnDataSource(dict(step=[], uncertainty_index=[], drawn=[], regime=[], probability=[]))
        self.strip = ColumnDataSource(strip_columns([], [], [], []))
        self.alarms = ColumnDataSource(dict(step=[], drawn=[]))
        self.sent, self.told, self.thinned, self.stride, self.edge = 0, 0, 0, 1, None

    def refill(self, series, window):
        "Sends the whole window, thinned."
        index, (first, last) = series.senses["uncertainty_index"], span_of(series.step, window)
        self.rows.data = packed(self._rows(series, first + thin(index[first:last], index[first:last], SCREEN // 2)))
        self.stride = max(1, math.ceil((last - first) / STRIP))
        self.strip.data = strip_columns(*self._strip(series, first, last, None))
        first, last = span_of(series.alarms[:, 0], window)
        self.alarms.data = self._alarms(series, first + thin(series.alarms[first:last, 1], series.alarms[first:last, 1], SCREEN // 4))
        self.sent = self.thinned = len(series.step)
        self.told = len(series.alarms)

    def stream(self, series, window):
        "Sends what came since, as far as it lies in the window; a strip that goes on as it was grows by its end alone."
        first, last = self.sent, len(series.step)
        self.sent = last
        if first < last and (window is None or series.step[first] <= window[1]):
            fresh = series.senses["uncertainty_index"][first:last]
            self.rows.stream(self._rows(series, first + thin(fresh, fresh, BURST)))
            self._grow(strip_columns(*self._strip(series, first, last, self.edge)))
        first, self.told = self.told, len(series.alarms)
        if first < self.told and (window is None or series.alarms[first, 0] <= window[1]):
            self.alarms.stream(self._alarms(series, np.arange(first, self.told)))

    def _rows(self, series, chosen):
        index, (regime, probability) = series.senses["uncertainty_index"][chosen], most_probable(series.senses, chosen)
        return dict(step=series.step[chosen].tolist(), uncertainty_index=short(index.round(3)), drawn=short(np.clip(index, -HIGHEST, HIGHEST).round(3)),
                    regime=regime.tolist(), probability=short(probability.round(3)))

    def _alarms(self, series, chosen):
        return dict(step=series.alarms[chosen, 0].tolist(), drawn=short(np.clip(series.alarms[chosen, 1], -HIGHEST, HIGHEST)))

    def _strip(self, series, first, last, edge):
        if first == last: return [], [], [], []
        right, regime, level = stretches(series.senses, series.step, first, last, self.stride)
        self.edge = float(right[-1])
        return merged(float(series.step[first]) - 0.5 if edge is None else edge, right, regime, level)

    def _grow(self, fresh):
        shown = self.strip.data
        last = {name: values[-1] for name, values in shown.items() if len(values)}
        next_one = {name: values[0] for name, values in fresh.items() if values}
        if last and next_one and (last["right"], last["colour"], last["alpha"]) == (next_one["left"], next_one["colour"], next_one["alpha"]):
            self.strip.patch({"right": [(len(shown["right"]) - 1, fresh["right"][0])]})
            fresh = {name: values[1:] for name, values in fresh.items()}
        if fresh["right"]: self.strip.stream(fresh)

    @property
    def crowded(self):
        "Whether there is more on the screen than it can show, or its end is drawn much denser than the rest."
        shown = max(len(self.rows.data["step"]), len(self.alarms.data["step"]), 2 * len(self.strip.data["right"]))
        return shown > SCREEN or self.sent > SCREEN and self.sent - self.thinned > max(BURST, self.sent // 50)


class Mixture:
    "The probabilities of all regimes of the one lane that was chosen."

    def __init__(self):
        self.source, self.sent, self.thinned = ColumnDataSource({name: [] for name in ("step", *PROBABILITIES)}), 0, 0

    def refill(self, series, window):
        first, last = span_of(series.step, window)
        self.source.data = packed(self._rows(series, first, last, SCREEN // 2))
        self.sent = self.thinned = len(series.step)

    def stream(self, series, window):
        first, last = self.sent, len(series.step)
        self.sent = last
        if first == last or window is not None and series.step[first] > window[1]: return
        self.source.stream(self._rows(series, first, last, BURST))

    def _rows(self, series, first, last, limit):
        "From each stretch the surest and the least sure row and the one nearest to catastrophe. Where nothing was read all are 0."
        _, surest = most_probable(series.senses, slice(first, last))
        chosen = first + thin(surest, series.senses["regime_catastrophic_divergence"][first:last], limit)
        shares = {name: np.nan_to_num(series.senses[name][chosen].astype(float)).round(4).tolist() for name in PROBABILITIES}
        return dict(step=series.step[chosen].tolist()) | shares

    @property
    def crowded(self):
        return len(self.source.data["step"]) > SCREEN or self.sent > SCREEN and self.sent - self.thinned > max(BURST, self.sent // 50)


class SenseCharts:
    "The index and the regimes below the other charts, with their steps, their lanes and their pointer."

    def __init__(self, charts, moment):
        self.charts, self.shown, self.filled, self.moment = charts, moment.sensed, None, moment
        self.feeds, self.mixture, self.chosen = [SenseFeed() for _ in charts.keys], Mixture(), 0 if len(charts.keys) == 1 else None
        self.floor = ColumnDataSource(dict(step=[], y=[]))
        self._names, self._grid = charts.labels, Column(sizing_mode="stretch_width", stylesheets=[InlineStyleSheet(css=GRID)])
        self._made = {}
        charts.view.children += [self._head(), self._grid] if "regimes" in self.shown else [self._grid]
        self._arrange()

    def _head(self):
        "The regimes in words, and which lane is shown whole."
        spans = "".join(f'<span><i style="background: {hue}"></i>{html.escape(words)} <b></b></span>' for hue, words in zip(HUES, WORDS))
        text = f'<div class="regimes">{spans}<span class="step">&nbsp;</span></div>'
        self.legend = Div(text=text, tags=[text], sizing_mode="stretch_width", stylesheets=[InlineStyleSheet(css=LEGEND_STYLE)])
        if len(self._names) == 1: return self.legend
        self.select = Select(title="Regimes of", value="", options=[("", EVERY), *((str(i), name) for i, name in enumerate(self._names))],
                             stylesheets=[InlineStyleSheet(css=SELECT_STYLE)])
        self.select.on_change("value", lambda attr, old, new: self.choose(int(new) if new else None))
        return Row(self.select, self.legend, sizing_mode="stretch_width", stylesheets=[InlineStyleSheet(css=":host { flex-wrap: wrap; }")])

    def choose(self, lane):
        "Shows all probabilities of one lane, or with None the strips of every lane."
        if lane == self.chosen: return
        self.chosen, self.mixture.sent = lane, 0
        self.feed(self.moment)
        self._arrange()

    def _arrange(self):
        kinds = ["index"] * ("index" in self.shown) + ["strips" if self.chosen is None else "mixture"] * ("regimes" in self.shown)
        for kind in kinds:
            if kind not in self._made: self._made[kind] = getattr(self, f"_make_{kind}")()
        if "mixture" in kinds and len(self._names) > 1: self._made["mixture"].title.text = f"{SHARES}, {self._names[self.chosen]}"
        self._grid.children = [self._made[kind] for kind in kinds]
        self.charts.connect_legend()

    def _make_index(self):
        title = "Uncertainty index, in standard deviations of its own past"
        fig = self.charts.empty_figure(title, y_range=DataRange1d(only_visible=True))
        for (colour, dash), feed, drawn in zip(self.charts.looks, self.feeds, self.charts.renderers):
            drawn.append(fig.add_glyph(feed.rows, Line(x="step", y="drawn", line_color=colour, line_dash=dash, line_width=1.2)))
            drawn.append(fig.add_glyph(feed.alarms, Scatter(x="step", y="drawn", marker="triangle", size=9, fill_color=colour, line_color=GREY)))
        fig.add_glyph(self.floor, Scatter(x="step", y="y", fill_alpha=0, line_alpha=0))
        for value in THRESHOLDS:
            fig.add_layout(Span(location=value, dimension="width", line_color=GREY, line_dash="dashed", line_width=1.5))
            fig.add_layout(Label(x=Node(target="frame", symbol="right", offset=-4), y=value, text=f"{value}", text_align="right",
                                 text_baseline="middle", text_font_size="10px", padding=2, **BADGE))
        self.charts.read_with(fig, [feed.rows for feed in self.feeds], "uncertainty_index", "Uncertainty index")
        return fig

    def _make_strips(self):
        count = len(self._names)
        title, height = "Regimes: the most probable one of each lane, stronger where it is surer", max(232, 62 + ROOM * count)
        fig = self.charts.empty_figure(title, height=height, y_range=Range1d(count, 0))
        for i, (feed, drawn) in enumerate(zip(self.feeds, self.charts.renderers)):
            bar = Quad(left="left", right="right", bottom=i + 0.9, top=i + 0.1, fill_color="colour", fill_alpha="alpha", line_color=None)
            drawn.append(fig.add_glyph(feed.strip, bar))
        fig.yaxis.ticker = FixedTicker(ticks=[i + 0.5 for i in range(count)])
        fig.yaxis.major_label_overrides = {i + 0.5: name if len(name) < 16 else name[:14] + "…" for i, name in enumerate(self._names)}
        fig.ygrid.visible = False
        self.charts.read_with(fig, [feed.rows for feed in self.feeds], "regime", "Most probable regime", NAMES)
        fig.on_event(Tap, self._tapped)
        return fig

    def _tapped(self, event):
        "A click on a lane's strip chooses it."
        if event.y is not None and 0 <= event.y < len(self._names): self.select.value = str(int(event.y))

    def _make_mixture(self):
        fig = self.charts.empty_figure(SHARES, y_range=Range1d(0, 1))
        for i, hue in enumerate(HUES):
            low, high = ({"expr": Stack(fields=list(PROBABILITIES[:n]))} if n else {"value": 0} for n in (i, i + 1))
            fig.add_glyph(self.mixture.source, VArea(x="step", y1=low, y2=high, fill_color=hue, fill_alpha=0.85))
        fig.yaxis.formatter = NumeralTickFormatter(format="0 %")
        fig.ygrid.visible = False
        both = dict(legend=self.legend)
        fig.js_on_event(MouseMove, CustomJS(args=dict(both, source=self.mixture.source, names=list(PROBABILITIES)), code=READ_MIXTURE))
        fig.js_on_event(MouseLeave, CustomJS(args=both, code=UNREAD_MIXTURE))
        return fig

    def feed(self, moment):
        "Sends what is new, or everything on the screen where that has changed."
        self.moment, window = moment, self.charts.window
        wanted, series = (moment.generation, window), self.charts.mine(moment)
        pairs = [*zip(self.feeds, series)] + ([(self.mixture, series[self.chosen])] if self.chosen is not None else [])
        for feed, one in pairs:
            if wanted != self.filled or feed.crowded or not feed.sent: feed.refill(one, window)
            else: feed.stream(one, window)
        self.filled = wanted
        start = window[0] if window else min((float(one.step[0]) for one in series if len(one.step)), default=0.0)
        floor = dict(step=[start], y=[THRESHOLDS[-1] + 0.4])  # so that the thresholds are always on the screen
        if floor != dict(self.floor.data): self.floor.data = floor
