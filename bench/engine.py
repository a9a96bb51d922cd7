"The stacked engine against one model after another, one process a core, and torch.func.vmap."
import multiprocessing
import os
import statistics
import time
import warnings

import torch
import torch.nn.functional as F

from bench.rows import Row, side_by_side
from sdalab.decisions.model import Decision
from sdalab.training.corpus import Batch
from sdalab.training.decoder import DecoderConfig
from sdalab.training.optimizer import OptimizerConfig
from sdalab.training.plain import PlainDecoder
from sdalab.training.stacked import StackedEngine

SHAPE = DecoderConfig()  # edge-95k
LANES = (4, 8, 16, 32, 64)  # tried once to choose from
TARGETS = {1: (4, 2, 1.5), 4: (2, 1.3, 1.5), 16: (1.5, 1.1, 1), 64: (1.15, 1, 1)}  # rows: loop, processes, vmap
CORES = os.cpu_count()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def batches(rows: int, n: int = 8) -> list[Batch]:
    "Random tokens of the model's own vocabulary."
    tokens = torch.randint(SHAPE.vocabulary, (n, rows, SHAPE.context + 1), device=DEVICE)
    return [Batch(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]


def step_flops(rows: int) -> float:
    "Floating-point operations of one lane's step: 6 per weight and token, and attention."
    c = SHAPE
    weights = c.depth * (4 * c.width * c.inner_width + 2 * c.width * c.hidden_width) + c.width * c.vocabulary
    return rows * c.context * (6 * weights + 12 * c.depth * c.context * c.inner_width)


def matrix_rate() -> float:
    "The machine's own float32 matrix rate in FLOP/s: a 2048 x 2048 product on all cores."
    a = torch.randn(2048, 2048, device=DEVICE)
    product = torch.empty_like(a)

    def multiply():
        torch.mm(a, a, out=product)
        wait()
    best = max(2 * 2048**3 / side_by_side({"mm": multiply}, seconds=1.5)["mm"] for _ in range(2))
    return best


def wait():
    "On a GPU, wait until the work is done."
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def stacked(rows: int, lanes: int):
    "A call that steps `lanes` lanes once."
    engine = StackedEngine(SHAPE, OptimizerConfig(), device=DEVICE)
    state, data, no_op = engine.initial_state(range(lanes)), batches(rows), Decision()

    def step():
        engine.step(state, no_op, data[state.step % len(data)])
        wait()
    return step


def plain(rows: int, threads: int, fused: bool):
    "A call that steps one `nn.Module` once, as anyone would write it."
    model = PlainDecoder(SHAPE).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    data = batches(rows)

    def step():
        torch.set_num_threads(threads)
        inputs, targets = data[0].inputs, data[0].targets
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    return step


def vmapped(rows: int, lanes: int):
    "A call that steps `lanes` models once through torch.func.vmap."
    models = [PlainDecoder(SHAPE).to(DEVICE) for _ in range(lanes)]
    parameters, buffers = torch.func.stack_module_state(models)
    parameters = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, fused=True)
    data = batches(rows)

    def loss(p, b, inputs, targets):
        return F.cross_entropy(torch.func.functional_call(models[0], (p, b), (inputs,)).flatten(0, 1), targets.flatten())
    gradient = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(0, 0, None, None))

    def step():
        torch.set_num_threads(CORES)
        grads, losses = gradient({n: p.detach() for n, p in parameters.items()}, buffers, data[0].inputs, data[0].targets)
        for name, p in parameters.items():
            p.grad = grads[name].contiguous()
        optimizer.step()
        losses.sum().item()
    return step


def _worker(rows, fused, barrier, rounds, seconds, results):
    "A plain loop in a process of its own: runs between one meeting and the next."
    step, times = plain(rows, 1, fused), []
    step()
    for _ in range(rounds):
        barrier.wait()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        barrier.wait()
    results.put(statistics.median(times))


def beside_processes(ours, rows: int, fused: bool, rounds: int = 5, seconds: float = 0.8) -> tuple[float, float]:
    "Median seconds of a call of `ours`, and of a lane's step when every core runs a plain loop in its own process; in turns."
    context = multiprocessing.get_context("spawn")
    barrier, results, times = context.Barrier(CORES + 1), context.Queue(), []
    workers = [context.Process(target=_worker, args=(rows, fused, barrier, rounds, seconds, results)) for _ in range(CORES)]
    for w in workers:
        w.start()
    for _ in range(rounds):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            ours()
            times.append(time.perf_counter() - start)
        barrier.wait()
        barrier.wait()
    median = statistics.mean(results.get() for _ in workers)
    for w in workers:
        w.join()
    return statistics.median(times), median / CORES


def best_lanes(rows: int) -> int:
    "The lane count with the cheapest lane, measured once."
    fitting = [n for n in LANES if n * rows <= 256]
    times = {n: side_by_side({"s": stacked(rows, n)}, rounds=1, seconds=1.0)["s"] / n for n in fitting}
    return min(times, key=times.get)


def engine_rows():
    "A row for every baseline at every batch size."
    warnings.filterwarnings("ignore", message=".*performance drop.*")
    rate = matrix_rate()
    yield Row("float32 matrix rate, 2048 x 2048", rate / 1e9, "GFLOP/s")
    for rows, (loop, processes, vmap) in TARGETS.items():
        lanes = best_lanes(rows)
        threads = (1, CORES) if DEVICE == "cpu" else (CORES,)
        contenders = {"stacked": stacked(rows, lanes), "vmap": vmapped(rows, min(lanes, 16))}
        for t in threads:
            contenders |= {f"AdamW, {t} threads": plain(rows, t, False), f"fused AdamW, {t} threads": plain(rows, t, True)}
        times = side_by_side(contenders, seconds=4.0)
        ours, theirs_vmap = times.pop("stacked") / lanes, times.pop("vmap") / min(lanes, 16)
        name, best = f"step of a lane, {rows}x64 tokens", lambda prefix: min((t, n) for n, t in times.items() if n.startswith(prefix))
        reached = f"{step_flops(rows) / ours / rate:.0%} of the matrix rate, {lanes} lanes"
        for prefix, target in (("AdamW", f">= {loop}"), ("fused", "")):
            slow, which = best(prefix)
            yield Row(name, ours * 1e3, "ms", f"plain loop, {which}: {slow * 1e3:.2f} ms", slow / ours, reached, target)
        if DEVICE == "cpu":
            for fused, target in ((False, f">= {processes}"), (True, "")):
                ours_then, slow = beside_processes(contenders["stacked"], rows, fused)
                against = f"one process a core, {'fused ' if fused else ''}AdamW: {slow * 1e3:.2f} ms"
                yield Row(name, ours_then / lanes * 1e3, "ms", against, slow * lanes / ours_then, reached, target)
        yield Row(name, ours * 1e3, "ms", f"torch.func.vmap, {min(lanes, 16)} lanes, fused AdamW: {theirs_vmap * 1e3:.2f} ms", theirs_vmap / ours, reached, f">= {vmap}")
        yield memory_row(rows, lanes)


def memory_row(rows: int, lanes: int) -> Row:
    "Bytes a lane takes: parameters, moments, gradients and buffers."
    engine = StackedEngine(SHAPE, OptimizerConfig(), device=DEVICE)
    state = engine.initial_state(range(lanes))
    engine.step(state, Decision(), batches(rows, 1)[0])
    held = sum(t.nbytes for t in state.tensors().values()) + sum(a.bytes for a in engine._arenas)
    weights = 4 * state.parameters[0].nbytes
    return Row(f"memory of a lane, {rows}x64 tokens", held / lanes / 2**20, "MiB", limit=f"{weights / 2**20:.2f} MiB of it parameters, moments and gradients")
