"What every engine promises, asked of both."
import math

import pytest
import torch

import bench.engine
from bench.rows import side_by_side
from sdalab.checked import BadInput
from sdalab.decisions.model import Decision
from sdalab.training.corpus import Batch
from sdalab.training.decoder import GROUPS, DecoderConfig
from sdalab.training.engine import compact, fork, take
from sdalab.training.module import ModuleConfig, ModuleEngine, build_module
from sdalab.training.optimizer import OptimizerConfig
from sdalab.training.stacked import StackedEngine

CONTEXT, VOCABULARY = 12, 23
TINY = ModuleConfig(size="tiny", vocabulary=VOCABULARY, context=CONTEXT)


def stacked(optimizer, **settings):
    return StackedEngine(DecoderConfig(vocabulary=VOCABULARY, context=CONTEXT, width=16, inner_width=24, hidden_width=32), optimizer, **settings)


def module(optimizer, **settings):
    return ModuleEngine(lambda seed: build_module(TINY, seed), optimizer, **settings)


def batch_at(step, rows=4):
    tokens = torch.randint(VOCABULARY, (rows, CONTEXT + 1), generator=torch.Generator().manual_seed(step))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def run(engine, steps, decision=Decision(), state=None):
    state = state or engine.initial_state([3])
    for _ in range(steps):
        state = engine.step(state, decision, batch_at(state.step))
    return state


def equal(a, b):
    theirs = b.tensors()
    return a.tensors().keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in a.tensors().items())


@pytest.fixture(params=[stacked, module], ids=["stacked", "module"])
def make(request):
    return request.param


def test_it_learns_one_batch_by_heart(make):
    engine = make(OptimizerConfig(learning_rate=0.01))
    state = engine.initial_state([0])
    for _ in range(60):
        state = engine.step(state, Decision(), batch_at(0))
    assert engine.evaluate(state, batch_at(0)).mean() < 0.5 * math.log(VOCABULARY)


def test_observation_shapes(make):
    seen = run(make(OptimizerConfig()), 1).observed
    assert seen.loss.shape == (1,) and seen.token_losses.shape == (1, 4, CONTEXT)
    assert seen.gradient_norm.shape == (1, len(GROUPS)) and seen.clip_coefficient.tolist() == [1.0]
    assert seen.loss.item() == pytest.approx(seen.token_losses.double().mean().item())


def test_a_step_is_a_pure_function(make):
    engine = make(OptimizerConfig())
    assert equal(run(engine, 6), run(engine, 6))
    assert equal(run(engine, 3, state=fork(run(engine, 3), 1)), run(engine, 6))


def test_evaluation_changes_nothing(make):
    engine = make(OptimizerConfig())
    state = run(engine, 2)
    before = take(state, 0)
    first = engine.evaluate(state, batch_at(9))
    assert torch.equal(first, engine.evaluate(state, batch_at(9))) and equal(state, before)
    assert equal(run(engine, 2, state=state), run(engine, 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 4])
def test_a_gpu_repeats_to_the_bit(rows):
    engine = StackedEngine(DecoderConfig(), OptimizerConfig(), device="cuda")

    def trained(seeds):
        state = engine.initial_state(seeds)
        for step in range(20): state = engine.step(state, Decision(), batch_at(step, rows))
        return state
    for seeds in ([3], range(8)): assert equal(trained(seeds), trained(seeds))


@pytest.mark.parametrize("decision", [Decision(skip=True), Decision(learning_rate_scale=0.0, weight_decay_scale=0.0)])
def test_decisions_that_leave_the_parameters_alone(make, decision):
    engine = make(OptimizerConfig(name="sgd", learning_rate=0.1))
    state = engine.initial_state([3])
    before = take(state, 0)
    assert all(torch.equal(t, before.tensors()[n]) for n, t in run(engine, 1, decision, state).tensors().items() if n != "updates")


def test_clipping_bounds_the_update(make):
    engine = make(OptimizerConfig(name="sgd", learning_rate=1.0))
    start = engine.initial_state([3])
    before, after = take(start, 0).tensors(), run(engine, 1, Decision(clip_norm=1e-3), start)
    moved = sum((after.tensors()[n].double() - t.double()).square().sum().item() for n, t in before.items() if t.is_floating_point() and n != "updates")
    assert 0 < math.sqrt(moved) <= 1e-3 * 1.01 and after.observed.clip_coefficient.item() < 1


def test_a_learning_rate_of_zero_for_one_group(make):
    engine = make(OptimizerConfig(learning_rate={"mlp": 0.01}))
    state = run(engine, 1, state=engine.initial_state([3]))
    assert state.learning_rate.tolist() == [[0, 0, 0.01, 0, 0]]
    fresh = engine.initial_state([3])
    if isinstance(engine, StackedEngine):
        changed = {g for g, s in engine.decoder.layout.groups.items() if not torch.equal(state.parameters[:, s], fresh.parameters[:, s])}
        assert changed == {"mlp"}
    else:
        changed = {n for n, p in state.model.named_parameters() if not torch.equal(p, dict(fresh.model.named_parameters())[n])}
        assert changed and all(".mlp." in n for n in changed)


def test_a_non_finite_lane_is_frozen_with_finite_parameters(make):
    engine = make(OptimizerConfig(name="sgd", learning_rate=1e30))
    state = run(engine, 6)
    assert 0 < state.frozen_at.item() < 6
    assert all(t.isfinite().all() for t in state.tensors().values())
    parameters = take(state, 0)
    assert equal(run(engine, 2, state=state), parameters)
    if isinstance(engine, StackedEngine):
        assert len(compact(state).seeds) == 0


def test_a_copy_is_independent(make):
    engine = make(OptimizerConfig())
    state = run(engine, 2)
    kept, again = take(state, 0), take(state, 0)
    run(engine, 2, state=state)
    assert equal(kept, again) and not equal(kept, state)


def test_bad_requests_are_named(make):
    engine = make(OptimizerConfig())
    state = engine.initial_state([1])
    with pytest.raises(BadInput, match="lane = 1"):
        take(state, 1)
    with pytest.raises(BadInput, match="n = 0"):
        fork(state, 0)
    with pytest.raises(BadInput, match="2 decisions for 1 lanes"):
        engine.step(state, [Decision(), Decision()], batch_at(0))
    with pytest.raises(BadInput, match="seeds|lanes"):
        engine.initial_state([])


def test_modules_that_return_logits_or_a_loss():
    class Bigram(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(VOCABULARY, VOCABULARY)

        def forward(self, tokens):
            return self.table(tokens)

    class Loss(Bigram):
        def forward(self, inputs, targets):
            return torch.nn.functional.cross_entropy(self.table(inputs).flatten(0, 1), targets.flatten())

    def final(kind):
        def build(seed):
            torch.manual_seed(seed)
            return kind()
        state = run(ModuleEngine(build, OptimizerConfig(learning_rate=0.1)), 5)
        return state.observed.loss.item(), state.model.table.weight.detach()

    (loss_a, weight_a), (loss_b, weight_b) = final(Bigram), final(Loss)
    assert loss_a == pytest.approx(loss_b, abs=1e-5) and torch.allclose(weight_a, weight_b, atol=1e-5)


def test_bfloat16_autocast_trains():
    engine = module(OptimizerConfig(learning_rate=0.01), bfloat16=True)
    state = engine.initial_state([0])
    for _ in range(30):
        state = engine.step(state, Decision(), batch_at(0))
    assert engine.evaluate(state, batch_at(0)).mean() < math.log(VOCABULARY) - 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_edge_95k_is_bit_invariant(dtype, rows):
    "The default decoder at batch sizes with one tile, several micro-batches and an uneven last one."
    shape = DecoderConfig()
    tokens = torch.randint(101, (rows, 65), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def final(seeds, threads):
        engine = StackedEngine(shape, OptimizerConfig(weight_decay=0.1, clip_norm=1.0), dtype, threads=threads)
        state = engine.initial_state(seeds)
        for _ in range(3):
            state = engine.step(state, Decision(), batch)
        return state
    alone, among = final([5], 1), final([0, 1, 5, 2, 3], 2)
    assert torch.equal(alone.parameters[0], among.parameters[2])
    assert torch.equal(alone.observed.token_losses[0], among.observed.token_losses[2])


CLIPS = ["none", "norm", "zclip", {"name": "adagc", "warmup": 3}, "arc_robust", {"name": "spam", "period": 4, "reset_warmup": 3, "grace": 2, "threshold": 5.0},
         {"name": "stable_spam", "period": 4}, {"name": "stable_spam", "period": 4, "as_published": True}]


def eventful(engine, steps, state=None):
    "Steps with resets of either moment, a warm-up, and another beta2 on the way."
    state, seen = state or engine.initial_state([3]), []
    for _ in range(steps):
        decision = Decision(momentum_reset={3: "first", 5: True, 9: "second"}.get(state.step, False), reset_warmup=2 if state.step == 5 else 0,
                            beta2=0.9 if state.step in (2, 7) else None)
        state = engine.step(state, decision, batch_at(state.step))
        seen.append(state.observed.clip_coefficient.item())
    return state, seen


@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_a_clipper_goes_on_from_a_fork_and_from_stored_tensors(make, clip):
    engine = make(OptimizerConfig(clip=clip, learning_rate=0.01))
    straight, seen = eventful(engine, 14)
    half, first = eventful(engine, 7)
    stored, step = {name: t.clone() for name, t in half.tensors().items()}, half.step
    forked, second = eventful(engine, 7, fork(half, 1))
    assert equal(straight, forked) and first + second == seen
    loaded, third = eventful(engine, 7, engine.initial_state([8]).load(stored, step))
    assert equal(straight, loaded) and third == second


def test_a_run_that_bounds_norms_at_most_remembers_nothing(make):
    engine = make(OptimizerConfig(clip_norm=0.5))
    plain, named = run(engine, 4), run(engine, 4, Decision(clip="norm"))
    assert not plain.memory and not named.memory and equal(plain, named)
    lifted = run(engine, 4, Decision(clip="none"))
    assert equal(lifted, run(make(OptimizerConfig()), 4)) and not equal(lifted, plain)


@pytest.mark.parametrize("decision, said", [(Decision(clip="spam"), "second moment"), (Decision(momentum_reset="second"), "second moment"), (Decision(beta2=0.9), "beta2 = 0.9")])
def test_decisions_that_sgd_cannot_follow_change_nothing(make, decision, said):
    engine = make(OptimizerConfig(name="sgd", learning_rate=0.1))
    state = engine.initial_state([3])
    before = take(state, 0)
    with pytest.raises(BadInput, match=said):
        engine.step(state, decision, batch_at(0))
    assert equal(state, before)


def test_the_learning_rate_comes_back_after_a_reset(make):
    engine = make(OptimizerConfig(name="sgd", learning_rate=0.1))
    engine.watching = True
    state, sizes = engine.initial_state([3]), []
    for step in range(5):
        state = engine.step(state, Decision(momentum_reset=step == 1, reset_warmup=2 if step == 1 else 0), batch_at(step))
        sizes.append((state.observed.movement.update_norm.norm() / state.observed.gradient_norm.norm() / 0.1).item())
    assert sizes == pytest.approx([1, 0.01, 1 - 0.99 * 0.75, 1 - 0.99 * 0.25, 1], rel=1e-3)


@pytest.mark.filterwarnings("ignore:.*performance drop")
def test_what_the_engine_is_measured_against_runs():
    times = side_by_side({"stacked": bench.engine.stacked(1, 2), "vmap": bench.engine.vmapped(1, 2), "plain": bench.engine.plain(1, 1, False), "fused": bench.engine.plain(1, 1, True)}, rounds=1, seconds=0.01)
    assert set(times) == {"stacked", "vmap", "plain", "fused"} and min(times.values()) > 0
