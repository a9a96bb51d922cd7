"What it costs to ask the proxy."
import math

from bench.rows import Row, side_by_side
from sdalab.futures.proposals import Grid
from sdalab.futures.proxy import load_proxy
from sdalab.futures.tuples import FEATURES


def proxy_rows():
    "128 proposals for one state, in one thread."
    proxy, state = load_proxy(), dict.fromkeys(FEATURES, math.nan) | dict(loss_now=2.0, loss_noise=-3.0, loss_level=0.0)
    proposals = Grid().propose(128, state, 0)
    seconds = side_by_side({"predict": lambda: proxy.predict(state, proposals), "propose": lambda: Grid().propose(128, state, 0)})
    yield Row("scoring 128 proposals", 1e3 * seconds["predict"], "ms", against=f"proposing them takes {1e3 * seconds['propose']:.2g} ms", target="<= 20")
