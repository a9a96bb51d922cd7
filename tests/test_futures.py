"Alternate futures in real runs: killed in the middle of a decision, starved of roots and disk, stormed by triggers, asked by people."
import json
import multiprocessing
import os
import shutil
import signal
import time
from functools import wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sdalab.checked import BadInput
from sdalab.checkpoints import store as store_module
from sdalab.checkpoints.branch import branch, replay
from sdalab.checkpoints.codec import Checkpoint
from sdalab.checkpoints.resume import train
from sdalab.checkpoints.store import Checkpointing
from sdalab.cli import app
from sdalab.decisions.model import Decision
from sdalab.evaluation.compute import step_tokens
from sdalab.futures import orchestrator
from sdalab.futures.calibration import Adaptive
from sdalab.futures.orchestrator import Futures, futures, propose, record_path, records
from sdalab.futures.rollouts import Group
from sdalab.journal.reader import Run
from sdalab.journal.schema import RunInUse
from sdalab.journal.tree import history, lineage, main_line
from sdalab.regime import monitor
from sdalab.training.configuration import TrainConfig, load_config
from sdalab.tree_commands import draw_tree
from test_cli import sdalab, start, wait_for_step

FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["sdalab.futures.orchestrator", "sdalab.checkpoints.resume"])
HAZARD = dict(name="constant_hazard", hazard=0.02)  # fires at 25, where fork 3 begins, then at 117


def config(steps=130, rate=2e-2, stressors=(), checkpoints=None, **changes):
    "A run of 10,000 parameters that tries alternate futures."
    return TrainConfig(name="r", steps=steps, rows=2, threads=1, evaluate_every=30, evaluate_batches=4, optimizer=dict(name="adam", learning_rate=rate),
                       model=dict(depth=1, context=32, width=32, inner_width=32, hidden_width=64), monitor=dict(preset="off"), stressors=list(stressors),
                       checkpoints=dict(every=50, memory_every=10) | (checkpoints or {}),
                       futures=dict(armed=True, budget=20.0, proxy=None, back=5, pass_over=20, verified=3, confidence=0.6, rollout=[5, 10, 20], refractory=40,
                                    proposer=dict(name="random"), proposals=16, trigger=HAZARD) | changes)


def eager(judged):
    "The best of those that were tried, staying aside: so that every decision is a collapse."
    return min((j for j in judged[1:] if j.rollout.settled is not None), key=lambda j: j.rollout.settled.mean())


def go(settings, run_dir, report=None, winner=orchestrator.winner, carried=futures):
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orchestrator, "winner", winner)
        return train(settings, run_dir, report=report, callbacks=carried)


def stopping(*moments):
    "A report that stops at each of these (fork, step) once."
    left = set(moments)

    def report(trainer):
        here = trainer.fork, trainer.state.step
        return here in left and not left.remove(here)
    return report


def losses(run_dir):
    "What the main line saw, to the bit."
    run = Run(run_dir)
    seen = history(run, main_line(run), ["loss", "gradient_norm", "validation_loss"])
    return seen.step.values.tolist(), {name: seen[name].values for name in seen}


def assert_same_line(one, other):
    (steps, a), (others, b) = losses(one), losses(other)
    assert steps == others
    for name in a: assert np.array_equal(a[name], b[name], equal_nan=True), name


def decided(run_dir):
    "All records without the clock, and without the numbers that count what a kill left behind."
    plain = json.loads(json.dumps(records(run_dir)))
    for record in plain:
        for name in ("seconds", "run", "fork", "node"): del record[name]
        record["collapse"] = record["collapse"] is not None
        del record["root"]["node"], record["root"]["path"]
        for tried in record["tried"]: del tried["node"]
    return plain


def taken(record):
    "What the main line went on under."
    return Decision(**record["decision"]).compose(Decision(pass_over=record["pass_over"]))


def kinds(run_dir):
    return set(Run(run_dir).events().kind)


def assert_account(run_dir):
    "Every row is a step of the main line, was rewound, or belongs to a decision or a failure."
    run = Run(run_dir)
    a_step = step_tokens(run)
    spent = sum(r["tokens"] for r in records(run_dir)) + sum(d["tokens"] for d in run.events().query("kind == 'futures_failed'").detail)
    rewound = sum(r["step"] - r["root"]["step"] for r in records(run_dir) if r["collapse"] is not None)
    assert len(run.rows_since(0, ["loss"])[0]) == len(losses(run_dir)[0]) + rewound + spent // a_step and spent % a_step == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run with two decisions, the second in the fork of the first, never interrupted."
    run_dir = tmp_path_factory.mktemp("whole") / "r"
    assert go(config(), run_dir, winner=eager) == "finished"
    return run_dir


def test_a_run_that_steers_itself(whole):
    first, second = records(whole)
    assert [first["fork"], second["fork"]] == [0, first["collapse"]] and first["collapse"] and second["collapse"]
    assert second["step"] >= first["root"]["step"] + 40, "refractory"
    run = Run(whole)
    nodes = run.nodes().set_index("node")
    line = lineage(nodes, main_line(run))
    assert [int(nodes.fork[n]) for n in line] == [0, first["collapse"], second["collapse"]] and nodes.outcome[line].tolist()[:2] == ["left", "left"]
    assert_account(whole)
    assert not nodes[nodes.settings.map(lambda s: "tried" in s)].last_step.isna().any(), "nothing that was tried is open"


def replays(run_dir):
    "What was tried, what was settled, and the line after each collapse."
    nodes = Run(run_dir).nodes().set_index("node")
    tried = nodes[nodes.settings.map(lambda s: "tried" in s)]
    return [*tried.groupby("outcome").head(1).index, *nodes.index[nodes.outcome == "settled"][:2], *lineage(nodes, main_line(Run(run_dir)))[1:]]


def test_whatever_was_tried_and_done_is_replayed_to_the_bit(whole):
    found = [replay(whole, int(node)) for node in replays(whole)]
    assert len(found) >= 5
    for verdict in found: assert verdict.identical, str(verdict)


def dying(moment, count, after):
    "Kill this process before, or after, the call of that number."
    owner, name = OWNERS[moment.split(".")[0]], moment.split(".")[1]
    call, calls = getattr(owner, name), [0]

    @wraps(call)
    def dies(*arguments, **named):
        calls[0] += 1
        if calls[0] == count and not after: os.kill(os.getpid(), signal.SIGKILL)
        result = call(*arguments, **named)
        if calls[0] == count: os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, dies)


def doomed(settings, run_dir, moment, count, after, carried=futures):
    dying(moment, count, after)
    go(settings, run_dir, winner=eager, carried=carried)


def killed_at(settings, run_dir, moment, count, after, carried=futures):
    process = FRESH.Process(target=doomed, args=(settings, run_dir, moment, count, after, carried))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, (moment, count, process.exitcode)


OWNERS = dict(futures=Futures, keeper=Checkpointing, group=Group, module=orchestrator)
MOMENTS = [("futures._root", 1, False), ("keeper.keep", 1, True), ("futures._root", 1, True), ("keeper.keep", 1, True), ("futures._groups", 1, True), ("group.step", 7, True),
           ("group.settle", 1, True), ("group.step", 60, True), ("module.write_record", 1, False), ("module.write_record", 1, True), ("futures._new_line", 1, True),
           ("module.restore", 1, True), ("keeper.on_rewind", 1, True), ("futures._collapse", 1, False), ("futures._collapse", 1, True)]


def test_killed_around_a_decision_it_is_the_same_decision(whole, tmp_path):
    run_dir, killed = tmp_path / "r", 0
    for decision in (1, 2):
        for moment, count, after in MOMENTS if decision == 1 else MOMENTS[2::3]:
            killed_at(config(), run_dir, moment, count, after)
            run = Run(run_dir)
            assert run.status() == "killed" and main_line(run) and draw_tree(run)
            killed += 1
        fork = int(Run(run_dir).nodes().set_index("node").fork[main_line(Run(run_dir))])
        assert len(records(run_dir)) == decision and records(run_dir)[-1]["collapse"] == fork
        if decision == 1: assert go(config(), run_dir, stopping((fork, 70)), eager) == "interrupted"
    assert go(config(), run_dir, winner=eager) == "finished" and killed == len(MOMENTS) + len(MOMENTS[2::3])
    assert decided(run_dir) == decided(whole)
    assert_same_line(run_dir, whole)
    assert_account(run_dir)
    assert "futures_failed" not in kinds(run_dir)
    nodes = Run(run_dir).nodes()
    assert (nodes.outcome == "abandoned").any() and len(Run(run_dir).events().query("kind == 'collapse'")) == 2
    for node in replays(run_dir)[-2:]: assert replay(run_dir, int(node)).identical


@pytest.mark.parametrize("checkpoints", [{}, dict(every=7, best=False), dict(every=1000, keep=1), dict(every=10, keep=2, kind="compact")], ids=str)
def test_interrupted_and_resumed_it_is_the_same_run(whole, tmp_path, checkpoints):
    run_dir = tmp_path / "r"
    settings = config(checkpoints=checkpoints)
    stops = [(0, 3), (0, 24), (3, 20), (3, 27), (3, 66), (3, 113), (3, 116)]
    for stop in stops: assert go(settings, run_dir, stopping(stop), eager) == "interrupted", stop
    assert go(settings, run_dir, winner=eager) == "finished"
    assert decided(run_dir) == decided(whole)
    assert_same_line(run_dir, whole)
    assert_account(run_dir)


QUIET = dict(rate=3e-3, steps=110, stressors=[dict(name="hot_rate", factor=100.0, start=60, stop=64)], trigger=dict(name="loss_z", window=40, warmup=30, threshold=3.0))


@pytest.fixture(scope="module")
def unarmed(tmp_path_factory):
    "The run that nobody steers."
    run_dir = tmp_path_factory.mktemp("unarmed") / "r"
    settings = config(**QUIET)
    assert train(settings.replace(futures=settings.futures.replace(armed=False)), run_dir) == "finished"
    return run_dir


def test_a_run_that_stays_is_the_run_that_was_not_armed(unarmed, tmp_path):
    go(config(**QUIET), tmp_path / "r")
    record, = records(tmp_path / "r")
    assert record["verdict"] == "stay" and record["collapse"] is None and record["trigger"].startswith("loss_z")
    assert_same_line(tmp_path / "r", unarmed)
    assert_account(tmp_path / "r")


def breaks_at(call, count, problem):
    calls = [0]

    @wraps(call)
    def breaks(*arguments, **named):
        calls[0] += 1
        if calls[0] == count: raise problem
        return call(*arguments, **named)
    return breaks


@pytest.mark.parametrize("owner, name, count, problem", [
    (Group, "step", 9, RuntimeError("a rollout raised")), (Group, "settle", 2, MemoryError("no memory")), (orchestrator, "with_effect", 1, ValueError("a proposer raised")),
    (orchestrator, "write_record", 1, OSError(28, "No space left on device")), (Futures, "_number", 1, KeyError("no row"))])
def test_what_a_future_does_is_no_business_of_the_main_line(unarmed, tmp_path, monkeypatch, owner, name, count, problem):
    monkeypatch.setattr(owner, name, breaks_at(getattr(owner, name), count, problem))
    assert go(config(**QUIET), tmp_path / "r") == "finished"
    events = Run(tmp_path / "r").events().query("kind == 'futures_failed'")
    assert len(events) == 1 and type(problem).__name__ in events.detail.iloc[0]["reason"] and not records(tmp_path / "r")
    assert_same_line(tmp_path / "r", unarmed)
    assert_account(tmp_path / "r")
    nodes = Run(tmp_path / "r").nodes()
    assert not nodes.last_step.isna().any() and (nodes.outcome == "failed").any() == (owner is Group)


def test_a_disk_that_takes_no_state(unarmed, tmp_path, monkeypatch):
    def full(path, header, snapshot): raise OSError(28, "No space left on device", str(path))
    monkeypatch.setattr(store_module, "write_snapshot", full)
    assert go(config(**QUIET), tmp_path / "r") == "finished"
    failed, = Run(tmp_path / "r").events().query("kind == 'futures_failed'").detail
    assert "could not be written" in failed["reason"] and failed["tokens"] == 0
    assert_same_line(tmp_path / "r", unarmed)


def test_futures_that_diverge(unarmed, tmp_path):
    hot = dict(name="random", space=dict(learning_rate_scale=[1.0, 1e25, 1e30], weight_decay_scale=[1.0], clip=[None], momentum_reset=[False]))
    go(config(**QUIET | dict(proposer=hot)), tmp_path / "r")
    record, = records(tmp_path / "r")
    assert [t["dropped_at"] is not None for t in record["tried"]] == [False, False, True, True] and None in record["tried"][2]["losses"] and record["verdict"] == "stay"
    assert_same_line(tmp_path / "r", unarmed)
    assert_account(tmp_path / "r")
    assert "frozen" in set(Run(tmp_path / "r").nodes().outcome)


@pytest.mark.parametrize("winner", [orchestrator.winner, eager])
def test_a_storm_is_bounded(tmp_path, winner):
    settings = config(steps=200, trigger=dict(name="constant_hazard", hazard=1.0), refractory=30, budget=2.5)
    go(settings, tmp_path / "r", winner=winner)
    found = records(tmp_path / "r")
    rest = [(r["root"]["step"] if r["collapse"] else r["step"]) + 30 for r in found]
    assert len(found) >= 2 and all(r["step"] >= end for r, end in zip(found[1:], rest))
    spent = sum(r["tokens"] + (r["step"] - r["root"]["step"]) * 64 * (r["collapse"] is not None) for r in found)
    assert spent <= 2.5 * 200 * 64
    ignored = Run(tmp_path / "r").events().query("kind == 'trigger_ignored'")
    assert len(ignored) == 1 and "futures.budget = 2.5" in ignored.detail.iloc[0]["reason"]
    assert_account(tmp_path / "r")


@pytest.mark.parametrize("name, learned", [("bandit", {"precision", "sum"}), ("bayesian", {"outcomes"})])
def test_a_proposer_that_learns_remembers(tmp_path, name, learned):
    settings = config(proposer=dict(name=name), proxy="proxy.safetensors")
    go(settings, tmp_path / "whole", winner=eager)
    first, second = records(tmp_path / "whole")
    go(settings, tmp_path / "parts", stopping((first["collapse"], 116)), eager)
    state = Checkpoint(sorted((tmp_path / "parts").glob("checkpoints/**/*.ptz"), key=lambda p: p.stat().st_mtime)[-1]).header["state"]["callbacks"]["futures"]["proposer"]
    go(settings, tmp_path / "parts", winner=eager)
    assert set(state) == learned and decided(tmp_path / "parts") == decided(tmp_path / "whole") and len(second["proposals"]) == 16


def test_the_gradient_gives_a_hint(tmp_path):
    settings = config(proposer=dict(name="hypergradient"), steps=60).replace(monitor=dict(budget=1e3, periods=dict(every_step=1)))
    go(settings, tmp_path / "r", winner=eager, carried=sensing)
    record, = records(tmp_path / "r")
    hints = [1.0, *np.clip(1 + record["features"]["gradient_cosine"] * np.array([0.25, 0.5, 1.0, 2.0]), 0.25, 2.0)]
    scales = {p["decision"].get("learning_rate_scale", 1.0) for p in record["proposals"]}
    assert all(np.isclose(scale, hints, atol=1e-5).any() for scale in scales) and len(scales) > 1


def test_a_root_that_is_gone(tmp_path):
    "The next older one serves, and an event says so."
    settings = config(checkpoints=dict(every=40, best=False), steps=122)
    parts = tmp_path / "r"
    assert go(settings, parts, stopping((0, 116))) == "interrupted"
    kept = {path.stem: path for path in (parts / "checkpoints").glob("*.ptz")}
    assert {"cp_80", "cp_110", "cp_116"} <= set(kept), "what a decision soon after 116 may go back to is there"
    for name in ("damaged", "pruned", "late"): shutil.copytree(parts, tmp_path / name)
    damaged = tmp_path / "damaged/checkpoints/cp_110.ptz"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    (tmp_path / "pruned/checkpoints/cp_110.ptz").unlink()
    for path in (tmp_path / "late/checkpoints").glob("*.ptz"):
        if path.stem != "cp_116": path.unlink()
    roots = {}
    for name in ("r", "damaged", "pruned", "late"):
        assert go(settings, tmp_path / name) == "finished"
        roots[name] = records(tmp_path / name)[-1]["root"]["step"]
    assert roots == dict(r=110, damaged=80, pruned=80, late=116)
    assert "checkpoint_damaged" in kinds(tmp_path / "damaged") and {"root_is_older"} <= kinds(tmp_path / "pruned") & kinds(tmp_path / "damaged") and "root_is_late" in kinds(tmp_path / "late")


def test_no_root_at_all(tmp_path):
    def thief(trainer):
        if trainer.state.step == 24:
            while not (found := list((tmp_path / "none/checkpoints").glob("*.ptz"))): time.sleep(0.01)  # it is written in a thread
            for path in found: path.unlink()
    assert go(config(steps=60, checkpoints=dict(every=1000, memory_keep=0, best=False)), tmp_path / "none", thief) == "finished"
    failed, = Run(tmp_path / "none").events().query("kind == 'futures_failed'").detail
    assert "no state is kept to go back to from step 25: set checkpoints.memory_keep above 0" in failed["reason"] and "checkpoint_damaged" in kinds(tmp_path / "none")


def test_a_recorded_root_that_is_gone_is_decided_anew(tmp_path):
    killed_at(config(steps=60), tmp_path / "r", "module.write_record", 1, True)
    record, = records(tmp_path / "r")
    (tmp_path / "r" / record["root"]["path"]).unlink()
    assert go(config(steps=60), tmp_path / "r", winner=eager) == "finished"
    again, = records(tmp_path / "r")
    assert record["root"]["step"] == 20 and again["root"]["step"] in (0, 25) and again["collapse"] and main_line(Run(tmp_path / "r")) > 1
    assert_account(tmp_path / "r")


def test_a_loss_that_is_not_finite_is_rewound(tmp_path):
    fatal = [dict(name="gradient_spikes", start=50, stop=51, share=1.0, factor=1e38, coordinates=0.5)]
    settings = config(steps=90, stressors=fatal, trigger=dict(name="by_hand"), proposals=1)
    assert train(settings.replace(futures=settings.futures.replace(armed=False)), tmp_path / "dies") == "finished" and len(losses(tmp_path / "dies")[0]) == 51
    assert go(settings, tmp_path / "lives") == "finished" and losses(tmp_path / "lives")[0][-1] == 89
    record, = records(tmp_path / "lives")
    assert record["trigger"] == "loss or gradient is not finite" and record["decision"] == {"pass_over": 20} and record["pass_over"] == 51 - record["root"]["step"]
    assert np.isfinite(losses(tmp_path / "lives")[1]["loss"]).all()
    assert_account(tmp_path / "lives")
    go(settings, tmp_path / "parts", stopping((0, 45), (3, 60)))
    for _ in range(2): go(settings, tmp_path / "parts") if Run(tmp_path / "parts").status() != "finished" else None
    assert decided(tmp_path / "parts") == decided(tmp_path / "lives")
    assert_same_line(tmp_path / "parts", tmp_path / "lives")


def test_trouble_that_comes_again_ends_with_the_budget(tmp_path):
    settings = config(steps=80, stressors=[dict(name="hot_rate", start=50, stop=51, factor=1e38)], trigger=dict(name="by_hand"), budget=4.0)
    assert go(settings, tmp_path / "r") == "finished"
    assert 1 <= len(records(tmp_path / "r")) <= 4 and "trigger_ignored" in kinds(tmp_path / "r") or "stay" in {r["verdict"] for r in records(tmp_path / "r")}
    assert_account(tmp_path / "r")


def write_foreign(path, **changes):
    "A file that says it is a proxy of another kind."
    from safetensors.numpy import save_file
    from sdalab.futures import proxy
    about = dict(proxy_version=proxy.PROXY_VERSION, log_version=proxy.LOG_VERSION, features=list(proxy.FEATURES), encoded=list(proxy.ENCODED), horizons=list(proxy.HORIZONS), level=0.9, parts={}, facts={}) | changes
    save_file({"margin": np.zeros(4)}, path, {"sdalab.proxy": json.dumps(about)})


@pytest.mark.parametrize("changes, sentence", [
    (dict(trigger=dict(name="index_robst")), "futures.trigger.name = 'index_robst'"), (dict(trigger=dict(name="loss_z", windw=3)), "windw"),
    (dict(trigger=dict(name="sensed", signal="uncertainty", above=1.0)), "futures.trigger.signal = 'uncertainty'"), (dict(proposer=dict(name="gird")), "did you mean 'grid'?"),
    (dict(proposer=dict(name="grid", space=dict(lerning_rate_scale=[0.5]))), "lerning_rate_scale"), (dict(proposer=dict(name="grid", space=dict(clip=["zlip"]))), "zlip"),
    (dict(proxy="nowhere.safetensors"), "nowhere.safetensors"), (dict(proxy="features"), "was made for other features"), (dict(proxy="log_version"), "has log_version 0"),
    (dict(proxy="text"), "not a file of a proxy")])
def test_what_there_is_not_is_refused_before_anything_is_written(tmp_path, changes, sentence):
    write_foreign(tmp_path / "features", features=["loss", "weather"])
    write_foreign(tmp_path / "log_version", log_version=0)
    (tmp_path / "text").write_text("no proxy")
    if (tmp_path / str(changes.get("proxy"))).is_file(): changes = dict(proxy=str(tmp_path / changes["proxy"]))
    with pytest.raises(BadInput) as refused: go(config(**changes), tmp_path / "r")
    assert sentence in str(refused.value) and "\n" not in str(refused.value) and not (tmp_path / "r").exists()


def test_the_module_engine_tries_one_after_another(tmp_path):
    torch.set_num_threads(1)
    small = load_config("gpt2-tiny", ["module.context=16", "module.dropout=0.2"], steps=46, rows=2, evaluate_every=20, evaluate_batches=1, policy={"name": "constant"}, monitor=dict(preset="off"),
                        checkpoints=dict(every=20, memory_every=10), futures=config(rollout=[5, 8], verified=3, refractory=60).futures.model_dump())
    for name, winner in (("stays", lambda judged: None), ("goes", eager)): assert go(small, tmp_path / name, winner=winner) == "finished"
    train(small.replace(futures=small.futures.replace(armed=False)), tmp_path / "unarmed")
    assert_same_line(tmp_path / "stays", tmp_path / "unarmed")
    record, = records(tmp_path / "goes")
    nodes = Run(tmp_path / "goes").nodes()
    assert record["step"] == 25 and record["collapse"] and len(record["tried"]) == 5 and nodes.fork.nunique() == 7, "a fork each"
    assert any(t["dropped_at"] == 5 for t in record["tried"]), "who is dropped steps no more"
    assert_account(tmp_path / "goes")
    for node in replays(tmp_path / "goes"): assert replay(tmp_path / "goes", int(node)).identical
    go(small, tmp_path / "parts", stopping((0, 24)), eager)
    go(small, tmp_path / "parts", winner=eager)
    assert_same_line(tmp_path / "parts", tmp_path / "goes")


def test_a_person_asks_of_a_stored_run(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "r")
    before, line = losses(tmp_path / "r"), main_line(Run(tmp_path / "r"))
    fork = int(Run(tmp_path / "r").nodes().set_index("node").fork[line])
    asked = propose(tmp_path / "r", 128)
    assert asked["asked"] and asked["collapse"] is None and record_path(tmp_path / "r", fork, 128, True).exists() and asked["root"]["step"] == 123
    on_fork = branch(tmp_path / "r", 60, [Decision(learning_rate_scale=0.5)], steps=20)[0]
    node = int(Run(tmp_path / "r").nodes().query("fork == @on_fork").node.iloc[0])
    assert propose(tmp_path / "r", 75, node)["fork"] == on_fork
    near = propose(tmp_path / "r", 112)  # the root lies before the fork that the main line goes on in
    assert near["root"]["step"] == 107 and near["fork"] == fork
    assert main_line(Run(tmp_path / "r")) == line and np.array_equal(losses(tmp_path / "r")[1]["loss"], before[1]["loss"])
    for record in (asked, near):
        for tried in record["tried"][:3]: assert replay(tmp_path / "r", tried["node"]).identical
    for at, sentence in ((128, "was decided already"), (3, "futures.back = 5"), (500, "can be left at steps 0 to 130")):
        with pytest.raises(BadInput, match=sentence): propose(tmp_path / "r", at)
    assert Run(tmp_path / "r").status() == "finished" and decided(whole) == [r for r in decided(tmp_path / "r") if not r["asked"]]


def test_what_a_person_asks_changes_nothing_when_the_run_goes_on(whole, tmp_path):
    go(config(), tmp_path / "r", stopping((0, 22)), eager)
    assert propose(tmp_path / "r", 21)["asked"] and propose(tmp_path / "r", 22)["root"]["step"] == 17
    assert Run(tmp_path / "r").status() == "interrupted"
    assert go(config(), tmp_path / "r", winner=eager) == "finished"
    assert [r for r in decided(tmp_path / "r") if not r["asked"]] == decided(whole)
    assert_same_line(tmp_path / "r", whole)


def test_a_run_that_trains_is_asked_by_a_command(unarmed, tmp_path):
    refused, sent = [], []
    settings = config(**QUIET | dict(trigger=dict(name="by_hand")))

    def person(trainer):
        if trainer.state.step == 40 and not sent:
            with pytest.raises(RunInUse): propose(tmp_path / "r", 30)
            refused.append(True)
            sent.extend(Run(tmp_path / "r").send("propose", payload) for payload in ({}, {}, {"at": 3}))
            time.sleep(0.6)
    assert go(settings, tmp_path / "r", person, winner=lambda judged: None) == "finished" and refused
    answers = [Run(tmp_path / "r").command(number) for number in sent]
    assert [a["status"] for a in answers] == ["done", "refused", "refused"] and "at this very step" in answers[1]["reason"] and "at is not a field" in answers[2]["reason"]
    record, = records(tmp_path / "r")
    assert record["step"] == 40 and not record["asked"] and record["trigger"] == "a person asked for it"
    assert_same_line(tmp_path / "r", unarmed)


def test_what_a_person_decided_after_the_root_stays_in_force(tmp_path):
    sent = []

    def person(trainer):
        if trainer.state.step == 22 and not sent:
            sent.append(Run(tmp_path / "r").send("decide", dict(learning_rate_scale=0.5)))
            time.sleep(0.6)
    go(config(steps=60), tmp_path / "r", person, eager)
    record, = records(tmp_path / "r")
    nodes = Run(tmp_path / "r").nodes().set_index("node")
    line = lineage(nodes, main_line(Run(tmp_path / "r")))
    assert record["root"]["step"] == 20 and [int(n) for n in line][0] == 1 and len(line) == 2, "the line leaves node 1, before the person's node"
    standing = Decision(**nodes.decision[line[-1]])
    assert standing == Decision(learning_rate_scale=0.5).compose(taken(record))
    assert all(Decision(**nodes.decision[t["node"]]).learning_rate_scale == 0.5 * t["decision"].get("learning_rate_scale", 1.0) for t in record["tried"])
    for node in replays(tmp_path / "r"): assert replay(tmp_path / "r", int(node)).identical


def test_a_person_takes_the_number_of_the_fork_to_come(whole, tmp_path):
    killed_at(config(), tmp_path / "r", "module.write_record", 1, True)
    record, = records(tmp_path / "r")
    assert branch(tmp_path / "r", 10, [Decision(learning_rate_scale=0.1)], steps=3) == [record["collapse"]]
    assert go(config(), tmp_path / "r", winner=eager) == "finished"
    assert decided(tmp_path / "r") == decided(whole)
    assert_same_line(tmp_path / "r", whole)


def test_the_winner_by_hand_is_a_fork_of_its_own(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "r")
    record = records(whole)[0]
    twin, = branch(tmp_path / "r", record["root"]["step"], [taken(record)], node=1, steps=10)
    nodes = Run(tmp_path / "r").nodes()
    assert twin == nodes.fork.max() > records(whole)[-1]["collapse"], "not the main line itself"
    node = int(nodes.node[nodes.fork == twin].iloc[0])
    one, other = (history(Run(tmp_path / "r"), n, ["loss"]).loss.values[:30] for n in (node, main_line(Run(tmp_path / "r"))))
    assert np.array_equal(one, other), "and to the bit the same"


def test_the_state_a_fork_began_with_may_go(whole, tmp_path):
    "Later ones serve; where none is whole, one sentence and nothing taken back."
    go(config(), tmp_path / "r", stopping((0, 25), (3, 70)), eager)
    if Run(tmp_path / "r").status() == "finished": pytest.fail("it should have stopped")
    shutil.copytree(tmp_path / "r", tmp_path / "none")
    root = tmp_path / "r" / records(tmp_path / "r")[0]["root"]["path"]
    root.unlink()
    assert go(config(), tmp_path / "r", winner=eager) == "finished"
    assert_same_line(tmp_path / "r", whole)
    for path in (tmp_path / "none/checkpoints").rglob("*.ptz"): path.write_bytes(b"damaged")
    rows = len(Run(tmp_path / "none").rows_since(0, ["loss"])[0])
    with pytest.raises(BadInput, match="fork 3 begins at step 20"): go(config(), tmp_path / "none")
    assert len(Run(tmp_path / "none").rows_since(0, ["loss"])[0]) == rows


ARMED = ["model.depth=1", "rows=2", "futures.armed=true", "futures.proxy=null", "futures.back=5", "futures.verified=2", "futures.rollout=[5,10]", "futures.trigger={name: by_hand}", "checkpoints.memory_every=10"]
ARMED = [word for setting in ARMED for word in ("--set", setting)]


def here(folder, *words):
    "The command in this process: output, and the sentence it is refused with."
    result = CliRunner().invoke(app, [*words, "--runs", str(folder / "runs")])
    return result.output, str(result.exception or "")


def test_the_command_line_proposes(tmp_path):
    process = start(tmp_path, "train", *ARMED, "--steps", "100000", "--name", "busy")
    try:
        wait_for_step(tmp_path, "busy", 30)
        out, refused = here(tmp_path, "propose", "busy")
        assert not refused and "futures tried at step" in out and "rewind and skip" in out and "the measure of" in out, out
        assert "leave the run as it is" in out or "the run goes on from step" in out
        assert "in use by the live process" in here(tmp_path, "branch", "busy", "--at", "25", "--propose")[1]
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    code, out, err = sdalab(tmp_path, "branch", "busy", "--at", "25", "--propose")
    assert code == 0 and "futures tried at step 25, from step 20" in out and "settled loss" in out, out + err
    assert "futures tried at step 25" in here(tmp_path, "branch", "busy", "--at", "25", "--propose")[0], "asked again, it is shown again"
    out, _ = here(tmp_path, "tree", "busy")
    assert "tried: stay, 10 steps, settled at" in " ".join(out.split()) and "tried: rewind and skip" in out
    for words, sentence in ((["branch", "busy", "--at", "25"], "give at least one future"), (["branch", "busy", "--at", "25", "--propose", "--set", "noop"], "leave --set"),
                            (["branch", "busy", "--at", "2", "--propose"], "futures.back = 5"), (["propose", "busy"], "expired")):
        assert sentence in here(tmp_path, *words)[1]


def test_the_tree_shows_the_path_that_survived(whole, capsys):
    from rich.console import Console
    Console(width=200).print(draw_tree(Run(whole)))
    shown, fork = capsys.readouterr().out, records(whole)[-1]["collapse"]
    assert shown.count("tried: ") == 10 and "accepted" in shown and f"fork {fork}, decided at step 117: " in shown
    line, = [text for text in shown.splitlines() if "← main line" in text]
    assert f"fork {fork}" in line


def test_the_shipped_proxy_chooses_and_says_what_it_expects(tmp_path):
    settings = config(steps=70, proxy="proxy.safetensors", proposals=32, proposer=dict(name="grid"))
    for name, stops in (("whole", []), ("parts", [(0, 24)])):
        for stop in stops: go(settings, tmp_path / name, stopping(stop))
        assert go(settings, tmp_path / name) == "finished"
    record, = records(tmp_path / "whole")
    assert decided(tmp_path / "whole") == decided(tmp_path / "parts") and len(record["proposals"]) == 32
    assert all(t["risk"] <= record["forecast"]["highest_risk"] + 1e-6 for t in record["tried"] if t["kind"] == "proposal")
    assert all(len(p["median"]) == len(record["forecast"]["horizons"]) for p in record["proposals"])


PROXIED = dict(proxy="proxy.safetensors", proposals=32, proposer=dict(name="grid"), rollout=[5, 10], confidence=0.999)


def levels(run_dir):
    "What the last checkpoint remembers of the intervals."
    return Checkpoint(sorted(Path(run_dir).glob("checkpoints/**/*.ptz"), key=lambda p: p.stat().st_mtime)[-1]).header["state"]["callbacks"]["futures"]["levels"]


@pytest.fixture(scope="module")
def proxied(tmp_path_factory):
    "Two decisions of a run with a proxy."
    run_dir = tmp_path_factory.mktemp("proxied") / "r"
    assert go(config(**PROXIED), run_dir, winner=eager) == "finished"
    return run_dir


def test_the_verified_move_the_level_of_the_intervals_to_come(proxied):
    first, second = records(proxied)
    assert first["forecast"]["level"] == second["forecast"]["level"] == 0.8 and first["forecast"]["fitted"] == [10, 50, 200, 2000]
    assert set(first["forecast"]["in_use"]) == {"10"}, "the horizons that rollouts reach"
    outcomes = [score for t in first["tried"] for score in t["outside"].values() if score is not None]
    before, after = (r["forecast"]["in_use"]["10"] for r in (first, second))
    assert before["level"] == 0.8 and before["scores"] == 0 and after["scores"] == len(outcomes) > 0 and after["level"] != 0.8
    shipped = Futures(config(**PROXIED)).proxy.margin[0]
    expected = Adaptive(0.2, start=shipped)
    for score in outcomes: expected.update(score)
    assert after == dict(level=round(1 - expected.alpha, 6), margin=round(expected.margin, 6), scores=len(outcomes))
    assert len({p["median"][3] for p in first["proposals"] if p["decision"]}) == 1 < len({p["median"][1] for p in first["proposals"] if p["decision"]}), "at 2,000 steps all decisions are alike to it"
    assert levels(proxied)["10"]["scores"][:len(outcomes)] == outcomes


def test_killed_around_a_decision_the_levels_are_the_same(proxied, tmp_path):
    for moment, count, after in (("group.step", 7, True), ("module.write_record", 1, True), ("futures._calibrate", 1, True), ("futures._new_line", 1, True), ("futures._collapse", 1, True)):
        killed_at(config(**PROXIED), tmp_path / "r", moment, count, after)
    fork = int(Run(tmp_path / "r").nodes().set_index("node").fork[main_line(Run(tmp_path / "r"))])
    assert go(config(**PROXIED), tmp_path / "r", stopping((fork, 116)), eager) == "interrupted"
    for moment in ("futures._calibrate", "module.restore"): killed_at(config(**PROXIED), tmp_path / "r", moment, 1, True)
    assert go(config(**PROXIED), tmp_path / "r", winner=eager) == "finished"
    assert decided(tmp_path / "r") == decided(proxied) and levels(tmp_path / "r") == levels(proxied)


def sensing(settings):
    "A monitor beside the futures."
    return [*monitor.senses(settings), *futures(settings)]


def slow(sense):
    "As on a machine on which readings are five times as dear."
    return lambda self, name, period: 5 * sense(self, name, period)


def test_a_decision_is_the_same_whatever_the_clock_makes_of_the_senses(tmp_path, monkeypatch):
    settings = config(**PROXIED | dict(steps=60, trigger=dict(name="sensed", signal="loss_average", above=0.0, steps=44))).replace(monitor=dict(budget=1e3, periods=dict(edge=3, activity=3)))
    killed_at(settings, tmp_path / "r", "module.write_record", 1, True, sensing)
    first, = records(tmp_path / "r")
    assert first["features"]["edge_coordinate"] is not None and first["trigger"].startswith("loss_average")
    record_path(tmp_path / "r", first["fork"], first["step"]).unlink()
    killed_at(settings, tmp_path / "from the root", "keeper.keep", 1, True, sensing)  # the steps up to the trigger are taken again
    monkeypatch.setattr(monitor.Ledger, "effective", slow(monitor.Ledger.effective))
    for folder in (tmp_path / "r", tmp_path / "from the root"):
        go(settings, folder, winner=eager, carried=sensing)
        again = records(folder)[0]
        assert again["step"] == first["step"] and again["features"] == first["features"] and again["trigger"] == first["trigger"]
        assert [t["decision"] for t in again["tried"]] == [t["decision"] for t in first["tried"]] and [t["losses"] for t in again["tried"]] == [t["losses"] for t in first["tried"]]


def test_what_a_person_asked_is_not_lost_by_a_kill(tmp_path):
    settings = config(**QUIET | dict(trigger=dict(name="by_hand"), steps=60))
    for moment, after in (("keeper.keep", False), ("group.step", True)):
        run_dir = tmp_path / moment
        assert go(settings, run_dir, stopping((0, 40))) == "interrupted"
        process = FRESH.Process(target=asked_and_killed, args=(settings, run_dir, moment, after))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL and not records(run_dir)
        assert len(Run(run_dir).commands()) == 1
        assert go(settings, run_dir, winner=lambda judged: None) == "finished"
        record, = records(run_dir)
        assert record["step"] == 45 and record["trigger"] == "a person asked for it" and not record["asked"]
        assert_account(run_dir)


def asked_and_killed(settings, run_dir, moment, after):
    sent = []

    def person(trainer):
        if trainer.state.step == 45 and not sent:
            sent.append(Run(run_dir).send("propose", {}))
            dying(moment, 1, after)
            time.sleep(0.6)
    go(settings, run_dir, person, lambda judged: None)


def asked_by_hand(run_dir, at):
    dying("module.write_record", 1, False)
    propose(run_dir, at)


def test_what_was_asked_of_a_stored_run_and_killed_is_said_and_finished(tmp_path):
    go(config(), tmp_path / "r", stopping((0, 22)), eager)
    process = FRESH.Process(target=asked_by_hand, args=(tmp_path / "r", 21))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and not records(tmp_path / "r")
    for stop in ((0, 23), (0, 24)):
        assert go(config(), tmp_path / "r", stopping(stop), eager) == "interrupted"
        told = Run(tmp_path / "r").events().query("kind == 'futures_unfinished'")
        assert len(told) == 1 and "sdalab branch r --at 21 --node 1 --propose" in told.detail.iloc[0]["reason"]
    assert propose(tmp_path / "r", 21)["asked"] and len(records(tmp_path / "r")) == 1
    assert go(config(), tmp_path / "r", winner=eager) == "finished"
    assert len(Run(tmp_path / "r").events().query("kind == 'futures_unfinished'")) == 1
    assert_account(tmp_path / "r")
