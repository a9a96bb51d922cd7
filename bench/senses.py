"The Lyapunov exponent of a series beside the packages people use for it."
import math
import time
from importlib import import_module

import numpy as np

from bench.rows import Row, side_by_side
from sdalab.regime.chaos import estimate, permutation_entropy, sample_entropy, zero_one_test
from sdalab.regime.early_warning import early_warning
from sdalab.regime.modes import hankel_dmd
from sdalab.regime.systems import logistic, orbit

SAMPLES, SEEDS, WINDOW = 2000, 50, 512


def series_rows():
    "Error and time on the logistic map at r = 4, whose exponent is ln 2; then the cost of the senses on a monitor's window."
    starts = np.random.default_rng(0).uniform(0.1, 0.9, (SEEDS, 1))
    series = orbit(logistic(4.0), SAMPLES, 500, starts)[..., 0].T.copy()
    ours = median_error(lambda x: estimate(x).exponent, series)
    rivals = {name: call for name, call in {"nolds": nolds_call(), "neurokit2": neurokit_call()}.items() if call}
    missing = [name for name in ("nolds", "neurokit2") if name not in rivals]
    timed = side_by_side({name: lambda call=call: call(series[0]) for name, call in {"ours": lambda x: estimate(x).exponent, **rivals}.items()}, seconds=3)
    errors = {name: median_error(call, series) for name, call in rivals.items()}
    against = [f"{name} {errors[name]:.2f} % in {1e3 * timed[name]:.0f} ms" for name in rivals] + [f"{name} not installed" for name in missing]
    limit = f"median of {SEEDS} seeds"
    yield Row(f"Lyapunov exponent, logistic map, {SAMPLES:,} samples: error", ours, "% of ln 2", "; ".join(against), None, limit, "<= 0.1")
    yield Row("the same, one estimate with its label", 1e3 * timed["ours"], "ms", "; ".join(against), None, "surrogates and divergence curve included", "<= 50")
    yield labels_row(rivals, missing)
    yield from window_rows()


def median_error(call, series) -> float:
    "Median error in per cent of ln 2."
    return 100 * float(np.median([abs(call(x) / math.log(2) - 1) for x in series]))


def nolds_call():
    "nolds' Rosenstein estimate with settings that suit a one-dimensional map; None where it is not installed."
    try:
        nolds = import_module("nolds")
    except ImportError:
        return None
    return lambda x: nolds.lyap_r(x, emb_dim=2, lag=1, trajectory_len=8, min_tsep=1)


def neurokit_call():
    "neurokit2's Rosenstein estimate with the same settings; None where it is not installed."
    try:
        neurokit = import_module("neurokit2")
    except ImportError:
        return None
    return lambda x: neurokit.complexity_lyapunov(x, delay=1, dimension=2, method="rosenstein1993", separation=1, len_trajectory=8)[0]


def labels_row(rivals, missing) -> Row:
    "What each says of 20 series of white noise: the share called chaotic, or given an exponent above 0."
    noise = np.random.default_rng(0).standard_normal((20, SAMPLES))
    ours = 100 * float(np.mean([estimate(x).label == "chaotic" for x in noise]))
    said = [f"{name}'s exponents: {np.median([call(x) for x in noise[:3]]):+.2f}" for name, call in rivals.items()] + [f"{name} not installed" for name in missing]
    return Row("white noise called chaotic", ours, "%", "; ".join(said), None, "20 series", "<= 0")


def window_rows():
    "Milliseconds of CPU of each sense on the last 512 numbers of a noisy signal."
    x = np.random.default_rng(0).standard_normal(WINDOW)
    senses = {"chaos estimate": estimate, "0-1 test": zero_one_test, "permutation entropy": permutation_entropy, "sample entropy": sample_entropy,
              "early warning": lambda x: early_warning(x, WINDOW // 2), "Hankel-DMD": hankel_dmd}
    for name, call in senses.items():
        taken = []
        for _ in range(20):
            start = time.process_time()
            call(x)
            taken.append(time.process_time() - start)
        yield Row(f"{name}, {WINDOW} samples of noise", 1e3 * float(np.median(taken)), "ms")
