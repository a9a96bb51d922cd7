"Size and speed of checkpoints on trained states, what training waits for, and what eight bits do to a run."
import io
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import zstandard

from bench.rows import Row, side_by_side
from sdalab.checkpoints.codec import CHUNK, Checkpoint, shuffle, write_checkpoint
from sdalab.checkpoints.moments import BLOCK, decode, encode
from sdalab.checkpoints.snapshot import SnapshotPool
from sdalab.checkpoints.store import Checkpointing, moments
from sdalab.decisions.model import Information
from sdalab.training.configuration import load_config
from sdalab.training.engine import take
from sdalab.training.train import Trainer, open_journal

WEIGHTS_AND_MOMENTS = "parameters", "first_moment", "second_moment"
TRAINED, APART, COPIES = 400, 25, 10  # steps before the first state, between states, and how many are put together
CORES = os.cpu_count()


def checkpoint_rows():
    "Sizes, speeds, waiting, and the price of eight bits."
    torch.set_num_threads(CORES)
    trainer = Trainer(load_config("edge-95k", ["sweep.seed=[0,1,2,3,4,5,6,7]"], rows=8, steps=10**6))
    state = trained_state(trainer)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield from size_rows(state, Path(folder))
        yield from speed_rows(state, Path(folder))
    yield copy_row("8 lanes of edge-95k", trainer)
    yield wait_row()
    yield from gpt2_rows()
    yield from eight_bit_rows()


def trained_state(trainer) -> dict[str, torch.Tensor]:
    "Weights and moments of eight lanes at several steps of their training, one after the other: large enough to time."
    for _ in range(TRAINED): trainer.step()
    kept = []
    for _ in range(COPIES):
        for _ in range(APART): trainer.step()
        kept.append({name: getattr(trainer.state, name).clone() for name in WEIGHTS_AND_MOMENTS})
    return {name: torch.cat([one[name] for one in kept]) for name in WEIGHTS_AND_MOMENTS}


def nbytes(state) -> int:
    return sum(t.nbytes for t in state.values())


def size_rows(state, folder: Path):
    "Shares of the raw bytes."
    raw, path = nbytes(state), folder / "a.ptz"
    buffer = io.BytesIO()
    torch.save(state, buffer)
    plain = sum(len(zstandard.ZstdCompressor(level=1).compress(t.numpy().tobytes())) for t in state.values())
    others = f"torch.save {buffer.tell() / raw:.3f}, safetensors {len(safetensors.torch.save(state)) / raw:.3f}, plain zstd-1 {plain / raw:.3f}"
    for article, kind, compact, target in (("an", "exact", None, "<= 0.84"), ("a", "compact", moments("stacked", state), "<= 0.48")):
        size = write_checkpoint(path, {}, state, compact, overwrite=True)
        yield Row(f"size of {article} {kind} checkpoint", size / raw, "of raw", others, limit=f"{raw / 1e6:.0f} MB, trained {TRAINED} steps and more", target=target)


def speed_rows(state, folder: Path):
    "Compressing and restoring, beside zstd alone on the same shuffled bytes and files that compress nothing."
    raw, path = nbytes(state), folder / "b.ptz"
    planes = [np.concatenate(shuffle(t.numpy().reshape(-1).view(np.uint8)[i:i + CHUNK], 4)).tobytes() for t in state.values() for i in range(0, t.nbytes, CHUNK)]
    compressor, decompressor = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    frames = [compressor.compress(plane) for plane in planes]
    torch.save(state, folder / "a.pt")
    safetensors.torch.save_file(state, folder / "a.safetensors")
    write_checkpoint(path, {}, state)
    file = Checkpoint(path)
    times = side_by_side({
        "write, a core": lambda: write_checkpoint(path, {}, state, threads=1, overwrite=True),
        "write": lambda: write_checkpoint(path, {}, state, overwrite=True),
        "zstd compresses": lambda: [compressor.compress(plane) for plane in planes],
        "torch.save": lambda: torch.save(state, folder / "a.pt"),
        "safetensors saves": lambda: safetensors.torch.save_file(state, folder / "a.safetensors"),
        "read, a core": lambda: file.tensors(threads=1),
        "read": lambda: file.tensors(),
        "zstd decompresses": lambda: [decompressor.decompress(frame) for frame in frames],
        "torch.load": lambda: torch.load(folder / "a.pt", weights_only=True),
        "safetensors loads": lambda: [t.clone() for t in safetensors.torch.load_file(folder / "a.safetensors").values()],  # it maps the file: without a copy nothing is read
    }, rounds=7, seconds=2.0)
    speed = {name: raw / t / 1e9 for name, t in times.items()}
    shown = lambda *names: ", ".join(f"{name} {speed[name]:.2f}" for name in names)
    yield Row("compressing and writing, a core", speed["write, a core"], "GB/s", shown("torch.save", "safetensors saves"), limit=shown("zstd compresses") + " GB/s on the shuffled bytes alone", target=f">= {min(0.5, speed['zstd compresses']):.2f}")
    yield Row(f"compressing and writing, {CORES} cores", speed["write"], "GB/s")
    yield Row("restoring, a core", speed["read, a core"], "GB/s", shown("torch.load", "safetensors loads"), limit=shown("zstd decompresses") + " GB/s, without unshuffling, hashing or fresh memory", target=f">= {min(1.0, speed['zstd decompresses']):.2f}")
    yield Row(f"restoring, {CORES} cores", speed["read"], "GB/s")


def copy_row(what: str, trainer) -> Row:
    "The copy of the state that training waits for, beside a plain copy of as many bytes."
    pool = SnapshotPool()
    size = pool.take(trainer).nbytes
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    times = side_by_side({"snapshot": lambda: pool.give_back(pool.take(trainer)), "copy": lambda: np.copyto(target, source)}, rounds=5, seconds=2.0)
    return Row(f"snapshot of {what}, {size / 1e6:.0f} MB", size / times["snapshot"] / 1e9, "GB/s", f"a plain copy, one thread as well: {size / times['copy'] / 1e9:.1f} GB/s", times["copy"] / times["snapshot"], target=">= 0.5")


class Timed(Checkpointing):
    "Counts the seconds that training waits for it."
    waited = 0.0

    def on_step_end(self, trainer, journal):
        begun = time.perf_counter()
        super().on_step_end(trainer, journal)
        self.waited += time.perf_counter() - begun


def wait_row() -> Row:
    "A thousand steps at the default cadence: 20 snapshots in memory, one file, and the best."
    config = load_config("edge-95k", steps=1000)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config)
        with open_journal(trainer, Path(folder) / "r") as journal:
            keeper = Timed(Path(folder) / "r", config.checkpoints)
            trainer.callbacks = [keeper]
            trainer.run(journal)
    return Row("edge-95k, one lane: waiting for checkpoints", 100 * keeper.waited / trainer.seconds, "% of the steps", limit=f"{keeper.waited * 1e3:.0f} ms in {trainer.seconds:.1f} s of steps", target="<= 1")


def gpt2_rows(tokens: int = 512):
    "A state of GPT-2 small's size: 124 million parameters. One step of one window makes its moments and is timed."
    config = load_config("gpt2-small", ["corpus.tokenizer=byte", "module.vocabulary=50257", "device=cpu", "precision=float32"], rows=1, steps=1000)
    trainer = Trainer(config.replace(module=config.module.replace(context=tokens), micro_rows=None))
    trainer.step()
    trainer.step()
    step = trainer.seconds / 2
    row = copy_row("GPT-2 small", trainer)
    yield row
    size, every = sum(t.nbytes for t in trainer.tensors().values()), config.checkpoints
    copies = 1000 / every.memory_every + 1000 / every.every + 1000 / config.evaluate_every
    share = 100 * copies * size / 1e9 / row.value / (1000 * step)
    yield Row("GPT-2 small: waiting for checkpoints", share, "% of the steps", limit=f"{copies:.0f} copies in 1,000 steps of {step:.1f} s (1x{tokens} tokens, on {CORES} cores)", target="<= 1")


COOLING = ["optimizer={name: adamw, learning_rate: 0.0003, beta2: 0.95}", "policy={name: warmup_cosine, warmup_steps: 20, final: 0.1}"]
CODINGS = {"dynamic": lambda t, kind: decode(*encode(t, kind), kind).view_as(t), "linear": lambda t, kind: linear(t, kind)}


def eight_bit_rows():
    "A hundred steps on the same batches, from exact moments and from 8 bits: late in a calm schedule, and at the preset's constant rate, where a last bit of the weights matters too."
    for what, settings, target in (("a cooling schedule", COOLING, "<= 5e-4"), ("a constant 3e-3", [], "")):
        trainer = Trainer(load_config("edge-95k", ["sweep.seed=[0,1,2,3,4,5,6,7]", *settings], rows=8, steps=420))
        for _ in range(300): trainer.step()
        exact = futures(trainer, lambda state: None)
        ulp = (futures(trainer, lambda state: state.parameters.mul_(1 + 2**-23)) - exact).abs().max()
        for name, code in CODINGS.items():
            off = (futures(trainer, lambda state: recode(state, code)) - exact).abs()
            limit = f"weights off by one unit in the last place: {ulp:.1e}"
            yield Row(f"{what}: loss after 8-bit moments ({name}), largest difference in 100 steps", off.max().item(), "nats", f"an exact resume: 0; mean of 8 lanes and 100 steps {off.mean():.1e}", limit=limit, target=target if name == "dynamic" else "")


def futures(trainer, change, steps: int = 100) -> torch.Tensor:
    "[steps, lanes] losses of the coming steps after a change to a copy of the state."
    state = take(trainer.state, range(len(trainer.lanes)))
    change(state)
    losses = []
    for _ in range(steps):
        decision = trainer.policies[0].decide(Information(state.step, trainer.config.steps))
        state = trainer.engine.step(state, decision, trainer.corpus.batch(0, state.step))
        losses.append(state.observed.loss.clone())
    return torch.stack(losses)


def recode(state, code):
    "Put the moments through a code."
    for name, kind in moments("stacked", state.tensors()).items(): getattr(state, name).copy_(code(getattr(state, name), kind))


def linear(t, kind: str):
    "The contrast: 255 even steps in each block."
    blocks = torch.nn.functional.pad(t.reshape(-1), (0, -t.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-38)
    levels = 255 if kind == "squared" else 127
    return ((blocks / scale * levels).round() / levels * scale).reshape(-1)[:t.numel()].view_as(t)
