"What each clip policy adds to a step of edge-95k, in processor time."
import time

from bench.engine import DEVICE, SHAPE, batches
from bench.rows import Row, side_by_side
from sdalab.decisions.model import Decision
from sdalab.training.clipping import CLIPPERS
from sdalab.training.optimizer import OptimizerConfig
from sdalab.training.stacked import StackedEngine

LANES = {1: 16, 4: 8, 16: 2}  # rows: lanes


def stepper(rows: int, lanes: int, optimizer: OptimizerConfig, decision: Decision = Decision()):
    "A call that steps some lanes once."
    engine = StackedEngine(SHAPE, optimizer, device=DEVICE, threads=1)
    state, data = engine.initial_state(range(lanes)), batches(rows)
    return lambda: engine.step(state, decision, data[state.step % len(data)])


def clipping_rows():
    "A row for every policy at every batch size, beside the same engine without clipping."
    for rows, lanes in LANES.items():
        contenders = {name: stepper(rows, lanes, OptimizerConfig(clip=name)) for name in CLIPPERS if rows >= 4 or name != "arc_robust"}
        contenders["another beta2"] = stepper(rows, lanes, OptimizerConfig(), Decision(beta2=0.99))
        times = side_by_side(contenders, rounds=20, seconds=5.0, clock=time.process_time)
        plain = times.pop("none")
        for name, seconds in times.items():
            yield Row(f"{name}, {rows}x64 tokens", 100 * (seconds / plain - 1), "% of a step", f"without: {plain / lanes * 1e3:.2f} ms a lane")
