"""What a page of maps shows beside the map: legend, a pixel's record and neighbours, and loss curves."""
import html

import numpy as np
from bokeh.models import Legend
from bokeh.plotting import figure

from sdalab.boundary.landscape import LABELS
from sdalab.boundary.view import COLOURS, INK, TONES, inks, plain, told
from sdalab.views.curves import finite
from sdalab.views.following import thin

SHADES = {"learned": (TONES * 3 // 8, 1), "stuck": (TONES // 2 + 1,) * 2, "diverged": (TONES, TONES * 5 // 8 + 1)}  # first and last place of a class in the inks
MEANING = {"learned": "quick to slow", "diverged": "early to late"}
STEPS = 1500  # points of a curve on the screen
NEIGHBOUR_DASHES = {"left": "dashed", "right": "dotted", "below": "dotdash", "above": "dashdot"}


def legend(dataset, colour):
    "The classes with their shares, and what their shades mean, as HTML."
    label, shades, parts = dataset.label.values, inks(), []
    known = max(1, int((label >= 0).sum()))
    for place, name in enumerate(LABELS):
        first, last = SHADES[name]
        fill = INK[name] if colour == "class" else "linear-gradient(90deg, " + ", ".join(shades[round(k)] for k in np.linspace(first, last, 6)) + ")"
        meaning = f" <small>{MEANING[name]}</small>" if colour != "class" and name in MEANING else ""
        parts.append(f'<span><i style="background: {fill}"></i>{name} {int((label == place).sum()) / known:.1%}{meaning}</span>')
    if known < label.size: parts.append("<span><small>paler: not known yet, as the nearest known pixel</small></span>")
    return f'<div class="legend">{"".join(parts)}</div>'


def pixel_table(dataset, column, row):
    "What is known of a pixel, as HTML."
    rows = "".join(f"<tr><td>{html.escape(what)}</td><td>{html.escape(value)}</td></tr>" for what, value in told(dataset, column, row).items())
    return f'<div><h3>Pixel of column {column}, row {row}</h3><table class="facts"><tbody>{rows}</tbody></table></div>'


def neighbour_grid(dataset, column, row, colour):
    "The pixel among the eight around it, with their classes and scores, as HTML."
    score, cells = colour if colour != "class" else "sohl_dickstein", []
    for j in (row + 1, row, row - 1):
        for i in (column - 1, column, column + 1):
            if not (0 <= i < dataset.sizes["x"] and 0 <= j < dataset.sizes["y"]):
                cells.append("<div></div>")
                continue
            label = int(dataset.label.values[j, i])
            ink, letters = (INK[LABELS[label]], "#000" if LABELS[label] != "learned" else "#fff") if label >= 0 else ("rgba(128,128,128,.3)", "inherit")
            words = f"{LABELS[label]}<br>{plain(dataset[score].values[j, i])}" if label >= 0 else "not known"
            cells.append(f'<div class="{"mid" if (i, j) == (column, row) else ""}" style="background: {ink}; color: {letters}">{words}</div>')
    return f'<div><h3>Its neighbours</h3><div class="near">{"".join(cells)}</div><small style="opacity: 0.72">Below the class: {html.escape(COLOURS[score])}; – where there is none, or it was not computed.</small></div>'


def curve_figure(curves):
    "Losses over the steps: side -> (losses, class); the pixel itself is the thick line."
    sound = np.concatenate([losses[np.isfinite(losses)] for losses, _ in curves.values()] or [np.ones(1)])
    log = len(sound) > 0 and sound.min() > 0 and sound.max() > 20 * sound.min()
    fig = figure(height=270, sizing_mode="stretch_width", y_axis_type="log" if log else "linear", title="Loss at every step" + (" (log)" if log else ""),
                 tools="xpan,xwheel_zoom,box_zoom,reset,save", active_drag="box_zoom", x_axis_label="step", min_border_right=8)
    fig.toolbar.logo, fig.toolbar.autohide, fig.xgrid.visible, drawn = None, True, False, []
    for side, (losses, label) in reversed(curves.items()):
        chosen, mine = thin(losses, losses, STEPS), side == "this pixel"
        look = dict(line_width=3) if mine else dict(line_width=1.5, line_dash=NEIGHBOUR_DASHES[side], line_alpha=0.9)
        drawn.append((side, [fig.line(chosen, finite(losses[chosen]), line_color=INK[LABELS[label]] if label >= 0 else "#8a8a8a", **look)]))
    fig.add_layout(Legend(items=drawn[::-1], orientation="horizontal", label_text_font_size="12px", spacing=8, border_line_color=None, padding=2, margin=4, background_fill_alpha=0), "below")
    return fig
