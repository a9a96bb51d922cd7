"What the journal costs the training loop, and how fast a reader gets one signal of a long run."
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.rows import Row
from sdalab.journal.reader import Run
from sdalab.journal.schema import signal_columns
from sdalab.journal.writer import Journal
from sdalab.training.configuration import load_config
from sdalab.training.train import Trainer

ROWS = 1_000_000
LANES = 8


def journal_rows():
    "Writer and reader."
    with tempfile.TemporaryDirectory() as folder:
        yield writer_row(Path(folder), rows=16, steps=12, target="<= 2")
        yield writer_row(Path(folder), rows=1, steps=60, target="")
        yield reader_row(Path(folder))


def writer_row(folder: Path, rows: int, steps: int, target: str, rounds: int = 12) -> Row:
    "Share of a step of 8 lanes of edge-95k that the journal takes, its own thread included: rounds with and without in turns."
    config = load_config("edge-95k", ["sweep.seed=[0,1,2,3,4,5,6,7]"], rows=rows, steps=10**6, evaluate_every=10**6)
    trainer, ratios, plain = Trainer(config), [], []
    timed(trainer.step, steps)
    with Journal.create(folder / f"cost-{rows}", {}, {}) as journal:
        trainer.nodes = [journal.node(lane) for lane in range(LANES)]
        for _ in range(rounds):
            without = timed(trainer.step, steps)
            ratios.append(timed(lambda: trainer.journal_step(journal), steps) / without - 1)
            plain.append(without)
    return Row(f"journal, share of a step (8 lanes, {rows}x64 tokens)", 100 * statistics.median(ratios), "%",
               f"the same step without: {statistics.median(plain) / steps * 1e3:.2f} ms", None, "one wide row a lane and step, SQLite in WAL mode", target)


def timed(call, times: int) -> float:
    "Seconds for so many calls."
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start


def reader_row(folder: Path) -> Row:
    "Seconds from opening a journal of a million step rows to one signal of every lane."
    rng, steps = np.random.default_rng(0), ROWS // LANES
    names = [name for name in signal_columns("signals") if name != "validation_loss"]
    with Journal.create(folder / "long", {}, {}) as journal:
        nodes = [journal.node(lane) for lane in range(LANES)]
        values = rng.standard_normal((len(names), LANES)).tolist()
        for step in range(steps):
            journal.steps(step, nodes, dict(zip(names, values)))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        loss = Run(folder / "long").signals(["loss"]).loss
        times.append(time.perf_counter() - start)
    assert loss.shape == (LANES, steps)
    size = (folder / "long" / "journal.db").stat().st_size
    return Row(f"one signal of {ROWS:,} step rows", statistics.median(times), "s", limit=f"a file of {size / 2**20:.0f} MiB", target="<= 1")
