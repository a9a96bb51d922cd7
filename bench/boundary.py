"Maps: small networks against a plain batched loop, the decoder against one run after another, workers, and the estimate."
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from bench.rows import Row
from sdalab.boundary.landscape import Scores
from sdalab.boundary.mapping import Crew, LocalCrew, Mapper, MapConfig, build_landscape, load_map
from sdalab.boundary.refinement import Audit, compute
from sdalab.boundary.store import open_map
from sdalab.training.configuration import fitted
from sdalab.training.corpus import philox
from sdalab.training.plain import PlainDecoder
from sdalab.training.stressors import stressed

FULL = bool(os.environ.get("SDALAB_BENCH_FULL"))  # the decoder's map at 64 x 64 pixels, 4 x 64 tokens, 256 steps: most of an hour
NETWORKS = ["landscape.width=8", "landscape.steps=100", "audit=400"]  # as the public notebook's defaults
DECODER = ["landscape.train.rows=4", "landscape.train.window=64", "landscape.train.steps=256"] if FULL else []
CORES = os.cpu_count()


def boundary_rows():
    "Pixels a second, labels, workers, and how well the time was foretold."
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        overview = load_map("sohl-dickstein", NETWORKS, name="overview")
        data, seconds = finished(overview, Path(folder), Crew())
        yield from network_rows("small networks, overview of 256 x 256", overview, data, seconds, ">= 8", ">= 99.9")
        deep = load_map("sohl-dickstein", [*NETWORKS, *window_at_the_edge(data, 0.56)], name="deep", width=128, height=128, reach=2)
        yield from network_rows("small networks, deep window of 128 x 128", deep, *finished(deep, Path(folder), Crew()), ">= 1.5", ">= 99")
        config = load_map("edge-95k", DECODER, name="decoder")
        before = plain_seconds(config)
        data, seconds = finished(config, Path(folder), LocalCrew(CORES))
        yield from decoder_rows(config, data, seconds, (before + plain_seconds(config)) / 2)  # the machine is not the same all the time
        yield estimate_row(config, data)
        yield workers_row(Path(folder))


def finished(config: MapConfig, root: Path, crew):
    "The map, and the seconds it took."
    began = time.perf_counter()
    with crew, Mapper(config, root, crew, say=lambda sentence: None) as mapper: folder = mapper.run()
    return open_map(folder).load(), time.perf_counter() - began


def window_at_the_edge(data, decades: float) -> list[str]:
    "Changes that put a window where changes of class are densest."
    from scipy.ndimage import uniform_filter
    label = data.label.values
    edges = np.zeros(label.shape)
    edges[1:, 1:] = (label[1:, 1:] != label[:-1, 1:]) | (label[1:, 1:] != label[1:, :-1])
    j, i = np.unravel_index(uniform_filter(edges, 16).argmax(), label.shape)
    return [change for name, at in (("x", data.x[i]), ("y", data.y[j])) for change in (f"{name}.center={float(at)!r}", f"{name}.width={decades}")]


def plain_networks(landscape, x, y):
    "[lanes, steps] losses of gradient descent as anyone would batch it: autograd over stacked weights, every lane to its end."
    inputs, targets = landscape.data
    inputs = inputs / 2  # the landscape's hold the 2 of tanh(z) = 2 sigmoid(2 z) - 1
    W, w = (t.repeat(len(x), *[1] * t.dim()).requires_grad_() for t in landscape.weights)
    losses = []
    for _ in range(landscape.steps):
        out = (w[:, None] @ torch.tanh(W @ inputs))[:, 0] / landscape.width
        loss = (out - targets).square().mean(1)
        losses.append(loss.detach())
        grads = torch.autograd.grad(loss.sum(), (W, w))
        with torch.no_grad():
            W -= x[:, None, None] * grads[0]
            w -= y[:, None] * grads[1]
    return torch.stack(losses, 1)


def network_rows(what: str, config, data, seconds, faster: str, equal: str, sample: int = 4096, lanes: int = 256):
    "Pixels a second of the whole map against the plain loop on a random sample; labels of that sample."
    landscape, n = build_landscape(config), config.width * config.height
    chosen = philox(0, 0, "map").choice(n, sample, replace=False)
    X, Y = config.settings(chosen)
    began, labels = time.perf_counter(), []
    for a, b in zip(X.split(lanes), Y.split(lanes)):
        labels.append(landscape.judge.labels(Scores(len(a), landscape.steps).add(plain_networks(landscape, a, b)).ended()))
    plain = (time.perf_counter() - began) / sample
    mapped, every = data.label.values.ravel()[chosen], compute(landscape, X, Y, stop=False)["label"]
    theirs = 100 * (torch.cat(labels).numpy() == every).mean()
    computed = float((data.source > 0).mean())
    yield Row(what, n / seconds, "pixels/s", f"a plain batched loop: {1 / plain:,.0f} pixels/s on {sample} of them", n * plain / seconds, f"{computed:.1%} of the pixels computed; one thread", faster)
    yield Row(f"{what}: labels equal", 100 * (mapped == every).mean(), "%", f"every pixel computed, {sample} drawn at random",
              limit=f"the plain loop, which rounds differently, agrees with the computed ones on {theirs:.2f} %; the map's own audit: {Audit(**data.attrs['manifest']['audit'])}", target=equal)


def plain_run(landscape, x: float, y: float):
    "[steps] losses of one pixel as one `nn.Module` with fused Adam, two groups of rates."
    run = landscape.run(x, y)
    torch.manual_seed(0)
    model = PlainDecoder(fitted(run.model, landscape.corpus))
    rates = run.optimizer.learning_rate
    attention = [p for name, p in model.named_parameters() if "qkv" in name or ".out" in name]
    rest = [p for p in model.parameters() if not any(p is q for q in attention)]
    optimizer = torch.optim.Adam([dict(params=attention, lr=rates["attention"]), dict(params=rest, lr=rates["mlp"])], fused=True)
    losses = []
    for step in range(run.steps):
        batch = stressed(landscape.stressors, landscape.corpus, run.seed, step).batch
        loss = F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def plain_seconds(config, sample: int = 8) -> float:
    "Seconds that one of a few pixels takes, one run after another in one process."
    landscape = build_landscape(config)
    X, Y = config.settings(philox(0, 0, "map").choice(config.width * config.height, sample, replace=False))
    plain_run(landscape, X[0].item(), Y[0].item())
    began = time.perf_counter()
    for x, y in zip(X.tolist(), Y.tolist()): plain_run(landscape, x, y)
    return (time.perf_counter() - began) / sample


def decoder_rows(config, data, seconds, plain: float):
    "The whole map against one run after another in one process."
    landscape, n = build_landscape(config), config.width * config.height
    train, audit, computed = landscape.config, data.attrs["manifest"]["audit"], float((data.source > 0).mean())
    what = f"decoder map of {config.width} x {config.height}, batch {train.rows} x {train.context}, {train.steps} steps"
    yield Row(what, n / seconds, "pixels/s", f"one run after another in one thread: {1 / plain:.3g} pixels/s, on eight pixels, before and after, so {n * plain / 60:.0f} min for all", n * plain / seconds,
              f"{computed:.1%} of the pixels computed, {CORES} workers", ">= 8")
    wrong = audit["wrong"] / max(audit["drawn"], 1) * (1 - computed)
    yield Row(f"{what}: labels equal", 100 * (1 - wrong), "%", "every pixel computed", limit=f"computed pixels are the same to the bit; {audit['wrong']} of {audit['drawn']} audited ones differ, at most {audit['error'] * (1 - computed):.2%} of all", target=">= 99.5")


def estimate_row(config, data) -> Row:
    "The time said before the work against the time it took."
    facts = data.attrs["manifest"]
    off = max(facts["estimate"] / facts["took"], facts["took"] / facts["estimate"])
    return Row("estimate of the decoder map's time: off by", off, "times", f"{facts['estimate']:.0f} s said after the first pass, {facts['took']:.0f} s taken; {facts['expected']:,} pixels expected, {facts['computed']:,} computed", target="<= 1.5")


def workers_row(root: Path) -> Row:
    "The same jobs by one worker and by two, both started before the clock."
    config, took = load_map("edge-95k", ["landscape.train.steps=32", "width=24", "height=24", "tile=4"], exhaustive=True), {}
    for workers in (1, 2):
        with LocalCrew(workers) as crew:
            entries, pixels = config.model_dump_json(), np.arange(16)
            list(crew.results({i: (entries, pixels, float("inf")) for i in range(4 * workers)}))
            began = time.perf_counter()
            with Mapper(config.replace(name=f"by-{workers}"), root, crew, say=lambda sentence: None) as mapper: mapper.run()
            took[workers] = time.perf_counter() - began
    return Row("two workers against one", took[2], "s", f"{took[1]:.1f} s", took[1] / took[2], f"{CORES} cores", ">= 1.7")
