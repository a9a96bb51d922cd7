"What alternate futures cost: verifying candidates side by side, and keeping watch over a quiet run. Scoring proposals is in the suite `proxy`."
import statistics
import tempfile
import time
from pathlib import Path

import torch

from bench.rows import Row
from sdalab.checkpoints.store import Checkpointing
from sdalab.decisions.model import Decision
from sdalab.futures.orchestrator import Futures
from sdalab.futures.rollouts import SETTLE, Candidate, Group, Rollout, race, rehearsal_seed, rehearsed
from sdalab.training.configuration import load_config
from sdalab.training.train import Trainer, open_journal

STEPS, STAGES = 50, [10, 20, 50]
TRIED = [Decision(), Decision(pass_over=150), *(Decision(learning_rate_scale=s, momentum_reset=r) for s in (0.5, 0.8, 1.1) for r in (False, True))]


def futures_rows():
    "All of it."
    yield from verifying_rows()
    yield watching_row()


def raced(trunk: Trainer, stages: list[int]) -> list[Rollout]:
    "The eight as racing lanes, with what follows for those who are left."
    rollouts = [Rollout(Candidate("stay" if not d.changes() else "rewind_and_skip" if d.pass_over else "proposal", d)) for d in TRIED]
    seed = rehearsal_seed(trunk.config.seed, trunk.state.step)
    lanes = trunk.forked([0] * len(TRIED), [rehearsed(d, trunk, trunk.state.step, seed) for d in TRIED], 1)
    race([Group(lanes, rollouts)], stages)
    return rollouts


def one_after_another(trunk: Trainer):
    "The eight as runs of their own: every one takes all steps, those at the common rate and the validation too."
    for decision in TRIED:
        seed, rollout = rehearsal_seed(trunk.config.seed, trunk.state.step), Rollout(Candidate("stay", decision))
        race([Group(trunk.forked([0], [rehearsed(decision, trunk, trunk.state.step, seed)], 1), [rollout])], [STEPS])


def verifying_rows():
    "Eight candidates over 50 steps of edge-95k, 16x64 tokens."
    trunk = Trainer(load_config("edge-95k", threads=torch.get_num_threads()))
    for _ in range(100):
        trunk.step()
    everyone = raced(trunk, [STEPS])
    taken = raced(trunk, STAGES)
    steps, full = sum(r.steps for r in taken), sum(r.steps for r in everyone)
    calls, walls, works = {"race": lambda: raced(trunk, STAGES), "lanes": lambda: raced(trunk, [STEPS]), "single": lambda: one_after_another(trunk)}, {}, {}
    for _ in range(3):
        for name, call in calls.items():
            wall, work = time.perf_counter(), time.process_time()
            call()
            walls.setdefault(name, []).append(time.perf_counter() - wall)
            works.setdefault(name, []).append(time.process_time() - work)
    for said, measured, target in (("wall-clock", walls, ">= 2.5"), ("processor time", works, "")):
        times = {name: statistics.median(seconds) for name, seconds in measured.items()}
        limit = f"median of 3; {steps} of {full} lane steps are left to take: {full / steps:.2f}x from racing, {times['single'] / times['lanes']:.2f}x from lanes; a lane step {1e3 * times['lanes'] / full:.2f} ms"
        yield Row(f"verifying 8 candidates, {STEPS} + {SETTLE} steps of edge-95k, {said}", times["race"], "s", f"one after another: {times['single']:.2f} s", times["single"] / times["race"], limit, target)


def watching_row(blocks: int = 16, steps: int = 50) -> Row:
    "Per cent of processor time that an armed orchestrator adds to a quiet run: blocks of steps in turns, with and without, and the median of their ratios."
    with tempfile.TemporaryDirectory() as folder:
        plain, armed = (Trainer(load_config("edge-95k", steps=10**6, threads=1)) for _ in range(2))
        ratios = []
        with open_journal(armed, Path(folder) / "run") as journal:
            config = armed.config.replace(futures=armed.config.futures.replace(armed=True))
            futures, kept = Futures(config), Checkpointing(Path(folder) / "run", config.checkpoints)
            armed.callbacks = [kept, futures]
            armed.nodes = [journal.node(0)]
            kept.on_train_begin(armed, journal)
            futures.on_train_begin(armed, journal)
            futures.rested = 10**9  # a quiet run: what it would do at a trigger is another row's business
            for block in range(blocks + 2):
                times = []
                for trainer, watching in ((plain, None), (armed, futures)):
                    start = time.process_time()
                    for _ in range(steps):
                        trainer.advance()
                        if watching:
                            watching.columns(trainer, journal)
                            watching.on_step_end(trainer, journal)
                    times.append(time.process_time() - start)
                if block >= 2:
                    ratios.append(100 * (times[1] / times[0] - 1))
            kept.thread.shutdown()
        call = time.process_time()
        for _ in range(1000):
            futures.columns(armed, None)
        call = time.process_time() - call
    quartiles = statistics.quantiles(ratios, n=4)
    return Row("an armed orchestrator over a quiet run, edge-95k 16x64", statistics.median(ratios), "% of a step", f"the watch alone: {1e3 * call:.0f} µs a step", None, f"blocks of {steps} steps: quartiles {quartiles[0]:.1f} to {quartiles[2]:.1f} %", "<= 1")
