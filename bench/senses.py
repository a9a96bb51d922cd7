"What the senses cost: a series' exponent beside the packages people use for it, the monitor beside plain training, the sharpness."
import math
import statistics
import tempfile
import time
from importlib import import_module
from pathlib import Path

import numpy as np

from bench.rows import Row, side_by_side
from sdalab.regime.chaos import estimate, permutation_entropy, sample_entropy, zero_one_test
from sdalab.regime.curvature import sharpness
from sdalab.regime.early_warning import early_warning
from sdalab.regime.modes import hankel_dmd
from sdalab.regime.monitor import JUDGEMENT, NEVER, SENSES, Monitor
from sdalab.regime.systems import logistic, orbit
from sdalab.training.configuration import MonitorConfig, load_config
from sdalab.training.corpus import Batch
from sdalab.training.inside import look_inside
from sdalab.training.train import Trainer, open_journal

SAMPLES, SEEDS, WINDOW = 2000, 50, 512


LARGER = ["model.width=128", "model.inner_width=128", "model.hidden_width=512", "model.depth=4", "model.heads=4"]  # 0.8 million parameters


def sense_rows():
    "All of it."
    yield from series_rows()
    for name, changes, bound in (("edge-95k", [], 5), ("0.8 M parameters", LARGER, 3)):
        alone = MonitorConfig(budget=1e3, periods={sense: NEVER for sense in SENSES if sense != "every_step"})
        yield overhead_row(f"every-step signals, {name}, 16x64 tokens", changes, alone, f"<= {bound}", judged=False)
    yield overhead_row("the same with index and regimes, edge-95k", [], alone, "")
    yield overhead_row("default monitor in all, edge-95k", [], MonitorConfig(), "<= 10", blocks=400)  # its seldom senses cost their share in few blocks
    yield overhead_row("light monitor in all, edge-95k", [], MonitorConfig(preset="light"), "<= 3", blocks=400)
    yield sharpness_row()


def overhead_row(name: str, changes: list[str], monitor: MonitorConfig, target: str, blocks: int = 100, steps: int = 10, judged: bool = True) -> Row:
    "Per cent of processor time that sensing adds to training: short blocks of steps in turns, with and without. Sums, since a sense that is read seldom costs its share in few blocks."
    with tempfile.TemporaryDirectory() as folder:
        plain, sensed = (Trainer(load_config("edge-95k", changes, steps=10**6, threads=1)) for _ in range(2))
        with open_journal(sensed, Path(folder) / "run") as journal:
            sensed.callbacks = [Monitor(monitor)]
            sensed.nodes = [journal.node(0)]
            sensed.callbacks[0].on_train_begin(sensed, journal)
            if not judged:
                sensed.callbacks[0].off[JUDGEMENT] = "not measured here"
            warm = 20  # blocks: the first readings warm up, and the index begins to speak
            times = np.array([both(plain, sensed, journal, steps, block % 2) for block in range(warm + blocks)])[warm:]
    more = lambda rows: 100 * (times[rows, 1].sum() / times[rows, 0].sum() - 1)
    drawn = np.random.default_rng(0).integers(blocks, size=(1000, blocks))
    low, high = np.quantile([more(rows) for rows in drawn], [0.025, 0.975])
    step = 1e3 * times[:, 0].sum() / (blocks * steps)
    return Row(name, more(np.arange(blocks)), "% of a step", f"plain step {step:.1f} ms", None, f"{blocks * steps:,} steps; 95 % of resampled sums {low:.1f} to {high:.1f} %", target)


def both(plain: Trainer, sensed: Trainer, journal, steps: int, first: int) -> tuple[float, float]:
    "Processor time of a block of steps, without and with."
    took = {}
    for trainer in (plain, sensed)[:: -1 if first else 1]:
        start = time.process_time()
        for _ in range(steps):
            trainer.step()
            for callback in trainer.callbacks:
                callback.columns(trainer, journal)
        took[trainer] = time.process_time() - start
    return took[plain], took[sensed]


def sharpness_row() -> Row:
    "Error of lambda_max after eight products, from the vector of ten steps before, on four windows."
    trainer = Trainer(load_config("edge-95k", threads=1))
    for _ in range(200):
        trainer.step()
    probe, errors, vector = trainer.corpus.batch(0, 0, "probe"), [], None
    batch = Batch(probe.inputs[:4], probe.targets[:4])
    for _ in range(5):
        inside = look_inside(trainer.engine, trainer.state)
        at, gradient = inside.parameters().double(), lambda p: inside.gradient(batch, p)
        base = gradient(at)[1]
        found, truth = sharpness(gradient, at, vector, 8, base=base), sharpness(gradient, at, vector, 24, base=base)
        errors.append(100 * abs(found.largest.item() / truth.largest.item() - 1))
        vector = found.vector
        for _ in range(10):
            trainer.step()
    return Row("lambda_max of edge-95k by 8 products, warm", statistics.median(errors[1:]), "% off", f"24 products; cold: {errors[0]:.2g} %", None, f"largest of 4: {max(errors[1:]):.2g} %", "<= 0.1")


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
