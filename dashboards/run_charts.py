"""The charts of a run's lanes: Bokeh figures that are sent only what is new."""
import math

import numpy as np
from bokeh.events import MouseLeave, MouseMove, RangesUpdate, Reset
from bokeh.models import (BoxZoomTool, CheckboxButtonGroup, Column, ColumnDataSource, CrosshairTool, CustomJS, DataRange1d, Div, HoverTool,
                          InlineStyleSheet, Label, Line, LinearScale, Node, NumeralTickFormatter,
                          PanTool, Range1d, ResetTool, SaveTool, Scatter, Span, WheelZoomTool)
from bokeh.plotting import figure

from run_tail import debiased, differing, lane_labels, thin

# Okabe and Ito's colours for the colour-blind, without black and yellow, which one of the two backgrounds would swallow.
COLOURS = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#8c8c8c", "#8f7d00"
DASHES = "solid", "dashed", "dotted", "dotdash"
LANES = len(COLOURS) * len(DASHES)  # lanes that can be told apart; more are not drawn
GREY = "#8a8a8a"  # readable on light and dark
SCREEN = 2000  # rows of a lane on the screen before they are thinned to half of that
DOT, DOTS = 4, 60  # size of the mark at a validation, and how many of them a lane may have
BURST = 64  # new rows of a lane in one message
ROWS = "step", "loss", "smooth", "gradient_norm", "learning_rate"

READ = """
const at = cb_obj.x, labels = legend.tags, shown = []
let nearest = null
for (const source of sources) {
  const steps = source.data.step, values = source.data[column], n = steps.length
  let low = 0, high = n - 1
  while (low < high) { const middle = (low + high) >> 1; if (steps[middle] < at) low = middle + 1; else high = middle }
  if (low > 0 && at - steps[low - 1] < steps[low] - at) low -= 1
  const gap = n > 1 ? (steps[n - 1] - steps[0]) / n : 1
  const there = n > 0 && at <= steps[n - 1] + 3 * gap + 1 && at >= steps[0] - 3 * gap - 1
  if (there && (nearest === null || Math.abs(steps[low] - at) < Math.abs(nearest - at))) nearest = steps[low]
  const value = there ? values[low] : NaN
  if (words.length) shown.push(words[value] ? `${words[value]} ${(100 * source.data.probability[low]).toFixed(0)}\u2009%` : '–')
  else shown.push(Number.isFinite(value) ? (Math.abs(value) >= 0.01 && Math.abs(value) < 1e4 ? value.toFixed(3) : value.toExponential(1)) : '–')
}
legend.setv({labels: labels.map((label, i) => `${label}\\u2002${shown[i]}`)}, {sync: false})
const where = nearest === null ? '' : ` at step ${nearest.toLocaleString('en')}`
caption.setv({text: title + where}, {sync: false})
"""
UNREAD = """
legend.setv({labels: legend.tags}, {sync: false})
caption.setv({text: caption.tags[0]}, {sync: false})
"""
HIDE = "for (const [i, lane] of renderers.entries()) for (const renderer of lane) renderer.visible = cb_obj.active.includes(i)"
HINT = "All charts go by optimizer step. Point at a chart to read every lane at a step; click a lane to hide it; drag across a chart to zoom."

TITLES = dict(smooth="Training loss, nats per token", validation_loss="Validation loss, nats per token",
              gradient_norm="Gradient norm before clipping", learning_rate="Learning rate")
TALL = ":host { max-height: none !important; }"  # Bokeh ends a box at the window's height, and what is below would be painted over
GRID = TALL + ":host { display: grid !important; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); }"
LEGEND_STYLE = """
:host { width: 100%; }
.bk-btn-group { display: grid !important; grid-template-columns: repeat(auto-fill, minmax(var(--lane-width), 1fr)); gap: 4px; width: 100%; }
.bk-btn-group .bk-btn { margin: 0 !important; padding: 3px 8px; border: 1px solid transparent; border-radius: 4px !important;
  background: transparent; color: inherit; font: inherit; font-size: 13px; font-variant-numeric: tabular-nums; text-align: left;
  white-space: nowrap; overflow: hidden; text-overflow: ellipsis; opacity: 0.45; text-decoration: line-through; box-shadow: none; }
.bk-btn-group .bk-btn.bk-active { opacity: 1; text-decoration: none; background: transparent; color: inherit; box-shadow: none; }
.bk-btn-group .bk-btn:hover, .bk-btn-group .bk-btn:focus-visible { border-color: #8a8a8a; }
.bk-btn-group .bk-btn::before { content: ''; display: inline-block; width: 18px; margin-right: 6px; vertical-align: middle;
  border-top: 3px solid; }
"""
HEAD_STYLE = ":host { position: sticky; top: 0; z-index: 2; max-height: 40vh; overflow-y: auto; background: var(--mui-palette-background-default, Canvas); }"  # read at any chart
CSS_DASHES = {"solid": "solid", "dashed": "dashed", "dotted": "dotted", "dotdash": "double"}


def look_of(index):
    "Colour and dash of a lane."
    return COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]


def finite(values):
    "What Bokeh draws as a gap where there is no number."
    return np.where(np.isfinite(values), values, np.nan)


def short(values):
    "Plain numbers of six digits, which are fewer bytes on the wire."
    return [float(f"{value:.6g}") for value in finite(np.asarray(values, dtype=float)).tolist()]


class LaneFeed:
    "What one lane has on the screen, and how far it has been sent."

    def __init__(self):
        self.rows = ColumnDataSource({name: [] for name in ROWS})
        self.validation = ColumnDataSource({"step": [], "validation_loss": []})
        self.sent, self.validated, self.average = 0, 0, (0.0, 0)
        self.thinned = 0  # rows seen at the last refill
        self._dots = []

    def dots(self, colour):
        "Marks at the validations, as long as they are few."
        self._dots.append(Scatter(x="step", y="validation_loss", fill_color=colour, line_color=None, size=DOT))
        return self._dots[-1]

    def _fit_dots(self):
        size = DOT if len(self.validation.data["step"]) <= DOTS else 0
        for dots in self._dots:
            if dots.size != size: dots.size = size

    def refill(self, series, weight, window):
        "Sends the whole window, thinned."
        smooth, self.average = debiased(series.loss, weight)
        first, last = span_of(series.step, window)
        chosen = first + thin(series.loss[first:last], series.gradient_norm[first:last], SCREEN // 2)
        data = dict(loss=series.loss, smooth=smooth, gradient_norm=series.gradient_norm, learning_rate=series.learning_rate)
        self.rows.data = {"step": series.step[chosen], **{name: finite(values[chosen]).astype("f4") for name, values in data.items()}}
        first, last = span_of(series.validation_step, window)
        chosen = first + thin(series.validation_loss[first:last], series.validation_loss[first:last], SCREEN // 2)
        self.validation.data = dict(step=series.validation_step[chosen], validation_loss=finite(series.validation_loss[chosen]).astype("f4"))
        self.sent, self.validated = len(series.step), len(series.validation_step)
        self.thinned = self.sent
        self._fit_dots()

    def stream(self, series, weight, window):
        "Sends the rows that came since, as far as they lie in the window."
        fresh = slice(self.sent, len(series.step))
        if fresh.start == fresh.stop: return
        smooth, self.average = debiased(series.loss[fresh], weight, self.average)
        chosen = thin(series.loss[fresh], series.gradient_norm[fresh], BURST)
        data = dict(step=series.step[fresh], loss=series.loss[fresh], smooth=smooth,
                    gradient_norm=series.gradient_norm[fresh], learning_rate=series.learning_rate[fresh])
        if window is None or data["step"][0] <= window[1]: self.rows.stream({name: short(values[chosen]) for name, values in data.items()})
        fresh = slice(self.validated, len(series.validation_step))
        if fresh.start < fresh.stop and (window is None or series.validation_step[fresh.start] <= window[1]):
            self.validation.stream(dict(step=short(series.validation_step[fresh]), validation_loss=short(series.validation_loss[fresh])))
        self.sent, self.validated = len(series.step), len(series.validation_step)
        self._fit_dots()

    @property
    def crowded(self):
        "Whether there is more on the screen than it can show, or its end is drawn much denser than the rest."
        shown = max(len(self.rows.data["step"]), len(self.validation.data["step"]))
        return shown > SCREEN or self.sent > SCREEN and self.sent - self.thinned > max(BURST, self.sent // 50)


def span_of(steps, window):
    "First and last position of the rows inside a window, and one beyond on each side."
    if window is None: return 0, len(steps)
    first, last = np.searchsorted(steps, window)
    return max(0, int(first) - 1), min(len(steps), int(last) + 1)


class Charts:
    "Figures, legend and caption for the lanes of one run."

    def __init__(self, moment, log=False):
        self.keys, self.labels = [one.key for one in moment.series[:LANES]], lane_labels(moment.series)[:LANES]
        self.looks, self.feeds = [look_of(i) for i in range(len(self.keys))], [LaneFeed() for _ in self.keys]
        self.window, self.filled = None, None  # steps on the screen, None: all; what the last refill was for
        self.marks = ColumnDataSource(dict(step=[], loss=[], capped=[], colour=[]))
        self.stressors, self._hit = ColumnDataSource(dict(step=[], name=[], lanes=[], colour=[])), None
        self.renderers = [[] for _ in self.keys]
        self._facts = moment.config.get("facts", {}).get("corpus", {})
        self._steps = DataRange1d(only_visible=True, range_padding=0.02)
        self._cross = Span(dimension="height", line_color=GREY, line_dash="dotted", line_width=1)
        self.caption = Div(text=HINT, tags=[HINT], stylesheets=[InlineStyleSheet(css=":host { font-size: 12px; opacity: 0.75; margin: 2px 12px; }")])
        self.legend = self._make_legend(144 if "regimes" in moment.sensed else 86)
        self._rates = "log" if any("learning_rate" in name for name in differing(moment.series)) else "linear"
        self.figures, self._grid = {}, Column(sizing_mode="stretch_width", stylesheets=[InlineStyleSheet(css=GRID)])
        head = Column(self.legend, self.caption, sizing_mode="stretch_width", stylesheets=[InlineStyleSheet(css=HEAD_STYLE)])
        self.view = Column(head, self._grid, sizing_mode="stretch_width", stylesheets=[InlineStyleSheet(css=TALL)])
        self.show_log(log)

    def _make_legend(self, room):
        "One button a lane, with room for a reading; labels are shown as text, whatever is in them."
        colours = "".join(f".bk-btn:nth-child({i + 1})::before {{ border-top-color: {colour}; border-top-style: {CSS_DASHES[dash]}; }}\n"
                          for i, (colour, dash) in enumerate(self.looks))
        width = f":host {{ --lane-width: {max(map(len, self.labels), default=0) * 6.6 + room:.0f}px; }}"
        sheets = [InlineStyleSheet(css=css) for css in (LEGEND_STYLE, colours, width)]
        legend = CheckboxButtonGroup(labels=self.labels, tags=self.labels, margin=(2, 12), active=list(range(len(self.keys))), stylesheets=sheets, sizing_mode="stretch_width")
        return legend

    def show_log(self, log):
        "Arranges the figures, with linear or logarithmic losses."
        scale = "log" if log else "linear"
        wanted = ("smooth", scale), ("validation_loss", scale), ("gradient_norm", "log"), ("learning_rate", self._rates)
        self._grid.children = [self._figure(*one) for one in wanted]
        self.connect_legend()

    def connect_legend(self):
        "A click on a lane hides all that was drawn of it up to now."
        self.legend.js_property_callbacks = {"change:active": [CustomJS(args=dict(renderers=self.renderers), code=HIDE)]}

    def _ceiling(self):
        "Where the linear loss axis ends, so that a lane that diverges does not flatten the others: above an untrained model."
        vocabulary = self._facts.get("vocabulary")
        return None if not vocabulary else 1.15 * math.log(vocabulary)

    def _figure(self, column, scale):
        "The figure of one column, made when it is first needed."
        if (column, scale) not in self.figures: self.figures[column, scale] = self._make_figure(column, scale)
        return self.figures[column, scale]

    def _make_figure(self, column, scale):
        title, loss = TITLES[column], column in ("smooth", "validation_loss")
        cap = dict(end=self._ceiling()) if loss and scale == "linear" and self._ceiling() else {}
        fig = self.empty_figure(title + (" (log)" if scale == "log" else ""), y_axis_type=scale, y_range=DataRange1d(only_visible=True, **cap))
        for index in range(len(self.keys)): self._draw(fig, index, column)
        if column == "smooth":
            fig.add_glyph(self.marks, Scatter(x="step", y="capped" if cap else "loss", marker="x", size=11, line_width=3, line_color="colour"))
            self._mark_stressors(fig)
        if loss: self._mark_unigram(fig)
        sources = [feed.validation if column == "validation_loss" else feed.rows for feed in self.feeds]
        self.read_with(fig, sources, column, title + (", smoothed," if column == "smooth" else ""))
        return fig

    def empty_figure(self, title, **options):
        "A figure over the steps that all figures share. A zoom is told to the server, which sends what it shows."
        tools = [BoxZoomTool(dimensions="width"), PanTool(dimensions="width"), WheelZoomTool(dimensions="width"), ResetTool(), SaveTool(),
                 CrosshairTool(overlay=self._cross)]
        fig = figure(title=title, sizing_mode="stretch_width", x_range=self._steps, tools=tools, min_border_left=52, min_border_right=8, window_axis="x",
                     **dict(height=232) | options)
        fig.toolbar.autohide, fig.toolbar.logo, fig.toolbar.active_drag = True, None, tools[0]
        fig.xaxis.formatter = NumeralTickFormatter(format="0,0")
        fig.xgrid.visible, fig.yaxis.ticker.desired_num_ticks = False, 5
        fig.on_event(RangesUpdate, self._zoomed)
        fig.on_event(Reset, self._unzoomed)
        return fig

    def _draw(self, fig, index, column):
        "One lane's lines in one figure."
        (colour, dash), feed, drawn = self.looks[index], self.feeds[index], self.renderers[index]
        source = feed.validation if column == "validation_loss" else feed.rows
        width = 1.2 if column == "gradient_norm" else 2
        # `add_glyph` where `fig.line` would make three more models for each line
        if column == "smooth": drawn.append(fig.add_glyph(source, Line(x="step", y="loss", line_color=colour, line_alpha=0.28, line_width=1)))
        drawn.append(fig.add_glyph(source, Line(x="step", y=column, line_color=colour, line_dash=dash, line_width=width)))
        if column == "validation_loss": drawn.append(fig.add_glyph(source, feed.dots(colour)))

    def read_with(self, fig, sources, column, title, words=()):
        "Every lane's value under the pointer, read in the browser. With words the value is the number of a word, read with its probability."
        both = dict(legend=self.legend, caption=self.caption)
        fig.js_on_event(MouseMove, CustomJS(args=dict(both, sources=sources, column=column, title=title, words=list(words)), code=READ))
        fig.js_on_event(MouseLeave, CustomJS(args=both, code=UNREAD))

    def _zoomed(self, event): self.window = (event.x0, event.x1)

    def _unzoomed(self, event): self.window = None

    def _mark_unigram(self, fig):
        "What predicting from token frequencies alone would give."
        loss = self._facts.get("unigram_loss")
        if loss is None: return
        fig.add_layout(Span(location=loss, dimension="width", line_color=GREY, line_dash="dashed", line_width=1.5))
        fig.add_layout(Label(x=Node(target="frame", symbol="right", offset=-4), y=loss, y_offset=2, text="token frequencies only",
                             text_color=GREY, text_font_size="11px", text_align="right"))

    def _mark_stressors(self, fig):
        "Ticks along the bottom, named under the pointer; they have no say in the range of the losses."
        fig.y_range.renderers = list(fig.renderers)
        fig.extra_y_ranges, fig.extra_y_scales = {"bottom": Range1d(0, 1)}, {"bottom": LinearScale()}
        tick = Scatter(x="step", y=0.045, marker="dash", angle=math.pi / 2, size=13, line_width=3, line_color="colour")
        ticks = fig.add_glyph(self.stressors, tick, y_range_name="bottom")
        fig.add_tools(HoverTool(renderers=[ticks], tooltips=[("stressor", "@name"), ("on", "@lanes"), ("step", "@step{0,0}")], visible=False))

    def feed(self, moment, weight):
        "Sends what is new, or everything on the screen where that has changed."
        wanted = moment.generation, weight, self.window
        for feed, series in zip(self.feeds, self.mine(moment)):
            if wanted != self.filled or feed.crowded: feed.refill(series, weight, self.window)
            else: feed.stream(series, weight, self.window)
        self.filled = wanted
        self._mark_frozen(moment)
        self._feed_stressors(moment)

    def _feed_stressors(self, moment):
        "One tick for all lanes that one stressor hits at once."
        if moment.stressors is self._hit: return
        self._hit, hit, at = moment.stressors, {}, {key: i for i, key in enumerate(self.keys)}
        for step, name, key in moment.stressors:
            if key is None or key in at: hit.setdefault((step, name), set()).update(at.values() if key is None else [at[key]])
        told = ["every lane" if len(lanes) == len(self.keys) else ", ".join(self.labels[i] for i in sorted(lanes)) for lanes in hit.values()]
        colours = [self.looks[min(lanes)][0] if len(lanes) == 1 else GREY for lanes in hit.values()]
        self.stressors.data = dict(step=[step for step, _ in hit], name=[name for _, name in hit], lanes=told, colour=colours)

    def mine(self, moment):
        "The drawn series, in the order of their lines."
        known = {series.key: series for series in moment.series}
        return [known[key] for key in self.keys]

    def _mark_frozen(self, moment):
        "A cross where a lane stopped being finite; at the edge where that is off the linear axis."
        cap, marks = self._ceiling() or math.inf, dict(step=[], loss=[], capped=[], colour=[])
        for (colour, _), series in zip(self.looks, self.mine(moment)):
            sound = np.flatnonzero(np.isfinite(series.loss))
            if series.frozen_at is None or not len(sound): continue
            loss = float(series.loss[sound[-1]])
            for name, value in dict(step=float(series.step[sound[-1]]), loss=loss, capped=min(loss, 0.99 * cap), colour=colour).items():
                marks[name].append(value)
        if marks == dict(self.marks.data): return
        self.marks.data = marks
        frozen = {series.key for series in moment.series if series.frozen_at is not None}
        labels = [f"{label} ✕" if key in frozen else label for key, label in zip(self.keys, self.labels)]
        self.legend.update(labels=labels, tags=labels)
