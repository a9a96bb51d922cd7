"""What the pages share: words and numbers as HTML, and who may press buttons."""
import html
import ipaddress
import math

import panel as pn
import psutil

EXPOSED = ("This page can be reached from other machines and asks for no password, so it only shows: serve it with "
           "--address 127.0.0.1, or with --basic-auth and --cookie-secret, to use the buttons.")
STYLE = """
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(118px, 1fr)); gap: 4px 18px; }
.cards .wide { grid-column: span 2; min-width: 0; }
.card { border-left: 3px solid rgba(128, 128, 128, 0.35); padding: 0 0 0 9px; }
.card .what { font-size: 12px; opacity: 0.72; }
.card .value { font-size: 18px; line-height: 1.3; font-weight: 500; font-variant-numeric: tabular-nums; white-space: nowrap; }
.card .more { font-size: 12px; opacity: 0.72; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; min-height: 1.2em; }
.running { border-left-color: #009e73; } .paused, .stale { border-left-color: #e69f00; } .failed, .killed { border-left-color: #d55e00; }
.badge { background: #e69f00; color: #000; border-radius: 3px; padding: 0 5px; font-size: 12px; margin-left: 6px; vertical-align: 2px; }
.message { font-size: 15px; line-height: 1.55; padding: 2px 0; } .message code, .notice code { font-size: 0.95em; padding: 1px 5px;
  border-radius: 3px; background: rgba(128, 128, 128, 0.18); overflow-wrap: anywhere; }
.notice { font-size: 13px; border-left: 3px solid #e69f00; padding: 3px 9px; background: rgba(230, 159, 0, 0.12); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; width: 100%; }
th { text-align: left; font-weight: 500; opacity: 0.72; } th, td { padding: 3px 14px 3px 0; white-space: nowrap; }
tbody tr { border-top: 1px solid rgba(128, 128, 128, 0.25); } td i { display: inline-block; width: 18px; margin-right: 8px; vertical-align: middle; }
th:nth-child(n+3):nth-child(-n+6), td:nth-child(n+3):nth-child(-n+6) { text-align: right; } td:last-child, th:last-child { padding-left: 14px; }
.sensed th:nth-child(7), .sensed td:nth-child(7) { text-align: right; } .sensed th:nth-child(8), .sensed td:nth-child(8) { padding-left: 14px; }
td i.regime { width: 14px; height: 14px; border-radius: 2px; margin-right: 6px; }
.quiet { font-size: 12px; opacity: 0.75; } .card[title] .more { text-decoration: underline dotted; text-underline-offset: 3px; }
.commands { font-size: 13px; min-height: 1.4em; } .commands b { font-weight: 500; }
"""


def duration(seconds):
    "3 min 20 s."
    seconds = max(0, int(seconds))
    if seconds < 60: return f"{seconds} s"
    if seconds < 3600: return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def number(value, digits=3):
    "A loss or a norm; a dash where there is none."
    if value is None or not math.isfinite(value): return "–"
    return f"{value:,.{digits}f}" if 0.001 <= abs(value) < 1e5 or value == 0 else f"{value:.2e}"


def card(what, value, more="", kind="", hover=""):
    "One headline number. All of it is text."
    what, value, more, hover = map(html.escape, (what, value, more, hover))
    title = f' title="{hover}"' if hover else ""
    return f'<div class="card {kind}"{title}><div class="what">{what}</div><div class="value">{value}</div><div class="more">{more}</div></div>'


def exposed():
    "Whether other machines can reach this server, as far as its own sockets tell."
    sockets = psutil.Process().net_connections("tcp")
    listening = {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN}
    return not all(ipaddress.ip_address(ip).is_loopback for ip in listening)


def logged_in():
    "Whether this viewer gave a password or came through a login provider."
    return bool(pn.config.oauth_provider or pn.config.basic_auth) and pn.state.user not in (None, "guest")
