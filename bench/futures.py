"What alternate futures cost: verifying candidates side by side, and keeping watch over a quiet run. Scoring proposals is in the suite `proxy`."
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
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


class Timed:
    "An engine's pool that also keeps how long the busiest of its threads computed at each call."
    def __init__(self, pool):
        self.pool, self.longest = pool, 0.0

    def map(self, work, shares):
        def timed(share):
            began = time.thread_time()
            return work(share), time.thread_time() - began
        found = list(self.pool.map(timed, shares))
        self.longest += max(seconds for _, seconds in found)
        return [result for result, _ in found]


def spent(engine, call) -> dict[str, float]:
    "Seconds of a call: by the clock, of all processors, and along its critical path, which is what the clock says where every thread has a core of its own."
    engine._pool = timed = Timed(pool := engine._pool)
    wall, work, own = time.perf_counter(), time.process_time(), time.thread_time()
    call()
    found = dict(wall=time.perf_counter() - wall, work=time.process_time() - work, path=time.thread_time() - own + timed.longest)
    engine._pool = pool
    return found


def verifying_rows():
    "Eight candidates over 50 steps of edge-95k, 16x64 tokens; the same engine, threads, steps and evaluation on both sides."
    trunk = Trainer(load_config("edge-95k", threads=torch.get_num_threads()))
    for _ in range(100):
        trunk.step()
    threads, everyone, taken = trunk.engine.threads, raced(trunk, [STEPS]), raced(trunk, STAGES)
    steps, full = sum(r.steps for r in taken), sum(r.steps for r in everyone)
    calls, times = {"race": lambda: raced(trunk, STAGES), "lanes": lambda: raced(trunk, [STEPS]), "single": lambda: one_after_another(trunk)}, {}
    for _ in range(3):
        for name, call in calls.items():
            times.setdefault(name, []).append(spent(trunk.engine, call))
    for kind, said, target in (("path", f"a core for each of {threads} threads", ">= 2.5" if threads > 1 else ""), ("wall", "wall-clock as the machine is", ""), ("work", "processor time, which is one thread alone", "")):
        of = {name: statistics.median(found[kind] for found in each) for name, each in times.items()}
        limit = f"median of 3; {steps} of {full} lane steps are left to take: {full / steps:.2f}x from racing, {of['single'] / of['lanes']:.2f}x from lanes side by side; a lane step {1e3 * of['lanes'] / full:.2f} ms, alone {1e3 * of['single'] / full:.2f} ms"
        yield Row(f"verifying 8 candidates, {STEPS} + {SETTLE} steps of edge-95k, {said}", of["race"], "s", f"one after another: {of['single']:.2f} s", of["single"] / of["race"], limit, target)


def watching_row(pairs: int = 500, steps: int = 2, warm: int = 60) -> Row:
    "Per cent of processor time that an armed orchestrator adds to a quiet run: what it computes between the steps of a run, which is where its code and data have left the caches."
    with tempfile.TemporaryDirectory() as folder:
        plain, armed = (Trainer(load_config("edge-95k", steps=10**6, threads=1)) for _ in range(2))
        with open_journal(armed, Path(folder) / "run") as journal:
            config = armed.config.replace(futures=armed.config.futures.replace(armed=True))
            futures, kept = Futures(config), Checkpointing(Path(folder) / "run", config.checkpoints)
            armed.callbacks = [kept, futures]
            armed.nodes = [journal.node(0)]
            kept.on_train_begin(armed, journal)
            futures.on_train_begin(armed, journal)
            futures.rested = 10**9  # a quiet run: what it would do at a trigger is another row's business
            took = np.array([turn(plain, armed, futures, journal, steps, pair % 2) for pair in range(pairs)])[warm:] / steps
            kept.thread.shutdown()
    without, with_, watch = took.T
    more = 100 * (with_ - without) / np.median(without)
    drawn = np.median(np.random.default_rng(0).choice(more, (1000, len(more))), axis=1)
    return Row("an armed orchestrator over a quiet run, edge-95k 16x64", 100 * float(watch.sum() / (with_ - watch).sum()), "% of a step", f"a step takes {1e3 * np.median(without):.1f} ms, the watch {1e6 * np.median(watch):.0f} µs", None,
               f"{len(took)} turns of {steps} steps with and without it: median difference {np.median(more):+.2f} ± {drawn.std():.2f} %", "<= 1")


def turn(plain, armed, futures, journal, steps, first) -> list[float]:
    "Processor time of some steps without and with an orchestrator, and of the orchestrator alone."
    took = [0.0, 0.0, 0.0]
    for which in (first, 1 - first):
        trainer, start = (plain, armed)[which], time.process_time()
        for _ in range(steps):
            trainer.advance()
            if which:
                began = time.thread_time()
                futures.columns(armed, journal)
                futures.on_step_end(armed, journal)
                took[2] += time.thread_time() - began
        took[which] = time.process_time() - start
    return took
