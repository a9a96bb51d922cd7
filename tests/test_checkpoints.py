"Runs that are killed, interrupted, forked and starved of disk, and go on as if nothing had happened."
import json
import multiprocessing
import os
import random
import resource
import sqlite3
import threading
import time
from pathlib import Path

import pytest
import torch

from sdalab.checked import BadInput
from sdalab.checkpoints import store as store_module
from sdalab.checkpoints.branch import branch, replay
from sdalab.checkpoints.codec import Checkpoint
from sdalab.checkpoints.resume import load_file, train
from sdalab.checkpoints.store import Checkpointing, Store
from sdalab.decisions.model import Decision, PolicyClass
from sdalab.decisions.schedules import SCHEDULES
from sdalab.journal.reader import Run
from sdalab.journal.schema import RunInUse, create_tables
from sdalab.journal.tree import ends, history
from sdalab.journal.writer import Journal
from sdalab.training.configuration import load_config
from sdalab.training.train import Trainer, open_journal

KILLS = 100 if os.environ.get("SDALAB_SOAK") else 5  # of each engine
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["sdalab.checkpoints.branch", "transformers.models.gpt2.modeling_gpt2"])


class Brake:
    "A policy with a memory: brakes for a while when the loss rises twice in a row."
    policy_class = PolicyClass.PFA

    def __init__(self):
        self.last, self.rises, self.until = None, 0, -1

    def decide(self, information):
        loss = information.signals.get("loss")
        if loss is not None:
            self.rises, self.last = self.rises + 1 if self.last is not None and loss > self.last else 0, loss
            if self.rises == 2: self.until = information.step + 7
        return Decision(learning_rate_scale=0.5 if information.step < self.until else 1.0, momentum_reset=self.until == information.step + 7)

    def state_dict(self):
        return dict(last=self.last, rises=self.rises, until=self.until)

    def load_state_dict(self, state):
        self.last, self.rises, self.until = state["last"], state["rises"], state["until"]


SCHEDULES["brake"] = Brake
KEEPING = dict(every=3, keep=2, memory_every=2, memory_keep=2)
STACKED = load_config("edge-95k", ["model.depth=1", "sweep.learning_rate=[1e-3, 3e-2]", "threads=1"], steps=150, rows=4, micro_rows=2, evaluate_every=20, evaluate_batches=1,
                      policy={"name": "brake"}, checkpoints=KEEPING)
MODULE = load_config("gpt2-tiny", ["module.context=16", "module.dropout=0.2"], steps=60, rows=4, micro_rows=2, evaluate_every=20, evaluate_batches=1, policy={"name": "brake"}, checkpoints=KEEPING)


def go(config, run_dir, stop_at=None):
    "Train in this process, to the end or to a step."
    return train(config, run_dir, report=lambda trainer: trainer.state.step == stop_at)


def what_happened(run_dir):
    "All of the journal but the clock: rows, tree, what is on disk."
    run = Run(run_dir)
    rows = run.signals().drop_vars("step_seconds").assign_attrs(run="")
    nodes = run.nodes().drop(columns=["created", "checkpoint"])  # how many files were written before is a matter of speed
    files = [(path.name, {name: Checkpoint(path).entry(name)["hash"] for name in Checkpoint(path).names}) for path in sorted((run.run_dir / "checkpoints").rglob("*.ptz"))]
    return rows, nodes, run.nonfinite().drop(columns="id"), files


def assert_same(one, other):
    for a, b in zip(what_happened(one)[:3], what_happened(other)[:3]):
        assert a.identical(b) if hasattr(a, "identical") else a.equals(b)


def child(config, run_dir, begun):
    torch.set_num_threads(1)
    begun.set()
    train(config, run_dir)


def newest(run_dir):
    "The step of the newest checkpoint on disk; -1 without one."
    return max((int(path.stem.split("_")[1]) for path in (run_dir / "checkpoints").glob("cp_*.ptz")), default=-1)


def is_finished(run_dir):
    return (run_dir / "journal.db").exists() and Run(run_dir).status() == "finished"


@pytest.mark.parametrize("config", [STACKED, MODULE], ids=["stacked", "module"])
def test_killed_at_any_moment_it_is_the_same_run(tmp_path, config):
    torch.set_num_threads(1)
    assert go(config, tmp_path / "whole") == "finished"
    draw, kills, finished, resumed_at = random.Random(3), 0, 0, set()
    while kills < KILLS:
        run_dir, begun = tmp_path / f"killed-{finished}", FRESH.Event()
        process = FRESH.Process(target=child, args=(config, run_dir, begun))
        process.start()
        assert begun.wait(60)
        goal = newest(run_dir) + draw.choice([0, 1, 1, 20, 40])  # steps, not seconds: machines differ
        while process.is_alive() and newest(run_dir) < goal: time.sleep(0.005)
        process.join(draw.uniform(0.0, 0.5))
        if process.is_alive():
            kills += 1
            process.kill()
            process.join()
            if not is_finished(run_dir): continue
        else: assert process.exitcode == 0
        assert_same(tmp_path / "whole", run_dir)
        resumed_at |= set(Run(run_dir).events().query("kind == 'resume'").step)
        finished += 1
    if not is_finished(run_dir): assert go(config, run_dir) == "finished"
    assert_same(tmp_path / "whole", run_dir)
    events = Run(run_dir).events()
    assert (resumed_at | set(events.query("kind == 'resume'").step)) - {0}, "some run went on from a checkpoint"
    assert what_happened(run_dir)[3][-1] == what_happened(tmp_path / "whole")[3][-1], "the last states are the same, too"
    assert not list(run_dir.rglob("*.tmp"))


def dies_at_the_end(run_dir):
    Checkpointing.on_train_end = lambda self, trainer, journal, status: os._exit(9)
    train(STACKED, run_dir)


def test_killed_between_the_last_step_and_the_end(tmp_path):
    go(STACKED, tmp_path / "whole")
    process = FRESH.Process(target=dies_at_the_end, args=(tmp_path / "r",))
    process.start()
    process.join(60)
    assert process.exitcode == 9 and Run(tmp_path / "r").status() == "killed"
    assert go(STACKED, tmp_path / "r") == "finished" and Run(tmp_path / "r").checkpoints().step.max() == STACKED.steps
    assert_same(tmp_path / "whole", tmp_path / "r")


def test_interrupted_and_resumed_twice(tmp_path):
    go(STACKED, tmp_path / "whole")
    for stop in (31, 77): assert go(STACKED, tmp_path / "parted", stop) == "interrupted"
    assert go(STACKED, tmp_path / "parted") == "finished"
    assert_same(tmp_path / "whole", tmp_path / "parted")
    assert Run(tmp_path / "parted").events().query("kind == 'resume'").step.tolist() == [31, 77], "a clean end keeps its last state"


def test_a_run_that_is_interrupted_clips_as_one_that_is_not(tmp_path):
    "What ZClip remembers is in every file, and a run that does not use it has nothing of the kind."
    config = STACKED.replace(steps=40, optimizer=STACKED.optimizer.replace(clip={"name": "zclip", "warmup": 5}))
    assert go(config, tmp_path / "whole") == "finished"
    for stop in (2, 13, 27): assert go(config, tmp_path / "parts", stop) == "interrupted"
    assert go(config, tmp_path / "parts") == "finished"
    assert_same(tmp_path / "whole", tmp_path / "parts")
    names = [set(Checkpoint(path).names) for path in (tmp_path / "whole/checkpoints").rglob("*.ptz")]
    assert all({"memory.zclip.mean", "memory.zclip.variance", "memory.zclip.count"} <= held for held in names)
    assert Run(tmp_path / "whole").signals().clip_coefficient.min() < 1
    go(STACKED.replace(steps=4), tmp_path / "plain")
    assert not any(name.startswith("memory.") for path in (tmp_path / "plain/checkpoints").rglob("*.ptz") for name in Checkpoint(path).names)


def test_a_fork_that_was_interrupted_goes_on_with_the_same_command(tmp_path):
    futures = [Decision(), Decision(learning_rate_scale=0.5, momentum_reset=True), Decision(skip=True)]
    for name in ("whole", "parted"): go(STACKED.replace(steps=40), tmp_path / name)
    node = int(Run(tmp_path / "whole").nodes().node[1])
    assert branch(tmp_path / "whole", 25, futures, node) == [1]
    assert branch(tmp_path / "parted", 25, futures, node, report=lambda trainer: trainer.state.step == 33) == [1]
    assert branch(tmp_path / "parted", 25, futures, node) == [1]
    assert_same(tmp_path / "whole", tmp_path / "parted")
    with pytest.raises(BadInput, match="fork 1 has taken these steps already"): branch(tmp_path / "parted", 25, futures, node)
    assert branch(tmp_path / "parted", 25, futures, node, steps=20) == [1], "the same fork, further"
    run = Run(tmp_path / "parted")
    nodes = run.nodes().set_index("node")
    assert nodes.fork.max() == 1 and set(nodes[nodes.fork == 1].last_step) == {44} and run.status() == "finished"
    for end in ends(nodes): assert (history(run, end, ["loss"]).step.diff("step") == 1).all(), "the step never goes back"
    trunk, no_op = (history(run, end, ["loss", "gradient_norm"]) for end in (node, int(nodes.index[2])))
    assert trunk.drop_vars(["node", "lane"]).identical(no_op.sel(step=trunk.step).drop_vars(["node", "lane"]))
    assert all(replay(run.run_dir, n).identical for n in nodes.index)


def test_forks_of_forks(tmp_path):
    go(STACKED.replace(steps=30, sweep={}), tmp_path / "r")
    branch(tmp_path / "r", 10, [Decision(learning_rate_scale=0.5)])
    branch(tmp_path / "r", 20, [Decision(), Decision(weight_decay_scale=2.0)], node=2)
    run = Run(tmp_path / "r")
    nodes = run.nodes().set_index("node")
    assert nodes.parent.astype("Int64").tolist()[1:] == [1, 2, 2] and nodes.fork.tolist() == [0, 1, 2, 2]
    assert Decision(**nodes.decision[4]) == Decision(learning_rate_scale=0.5, weight_decay_scale=2.0), "what was in force stays in force"
    assert history(run, 4, ["loss"]).node.values.tolist() == [1] * 10 + [2] * 10 + [4] * 10
    assert (history(run, 3, ["loss"]).loss == history(run, 2, ["loss"]).loss).all()
    assert replay(run.run_dir, 4).identical


def test_a_fork_of_the_module_engine(tmp_path):
    torch.set_num_threads(1)
    go(MODULE.replace(steps=20), tmp_path / "r")
    both = [Decision(), Decision(learning_rate_scale=0.5)]
    assert branch(tmp_path / "r", 8, both, steps=6, report=lambda trainer: trainer.fork == 2 and trainer.state.step == 10) == [1, 2]
    assert branch(tmp_path / "r", 8, both, steps=6) == [1, 2], "what was interrupted goes on, what is complete stays"
    with pytest.raises(BadInput, match="seconds = -1"): branch(tmp_path / "r", 5, both, seconds=-1)
    assert Run(tmp_path / "r").nodes().fork.max() == 2 and Run(tmp_path / "r").status() == "finished"
    run = Run(tmp_path / "r")
    trunk, no_op, calm = (history(run, node, ["loss", "gradient_norm"]) for node in (1, 2, 3))
    assert (trunk.loss[:14] == no_op.loss).all() and not (trunk.loss[9:14] == calm.loss[9:]).any()
    assert replay(run.run_dir, 3).identical


def commanding(run_dir, at, commands):
    "A report that sends commands before step `at`, and waits until each is answered."
    sent = []

    def report(trainer):
        if trainer.state.step == at and not sent:
            sent.extend(Run(run_dir).send(kind, payload) for kind, payload in commands)
            time.sleep(0.6)  # the writer looks at its inbox every quarter of a second
    return report, sent


PLAIN = STACKED.replace(steps=40, sweep={}, policy={"name": "constant"}, checkpoints=dict(every=10, best=False))


def test_decisions_that_were_replaced_at_once_stay_replaced(tmp_path):
    report, sent = commanding(tmp_path / "r", 12, [("decide", dict(learning_rate_scale=0.5)), ("decide", dict(weight_decay_scale=3.0)), ("stop", {})])
    assert train(PLAIN, tmp_path / "r", report=report) == "interrupted"
    assert go(PLAIN, tmp_path / "r") == "finished"
    nodes, rows = Run(tmp_path / "r").nodes().set_index("node"), Run(tmp_path / "r").signals(["loss"]).loss
    assert nodes.last_step.tolist() == [11, 11, 39] and rows.notnull().sum("step").values.tolist() == [12, 0, 28]
    assert replay(tmp_path / "r", 3).identical


def test_nobody_decides_while_decisions_are_taken_again(tmp_path):
    report, sent = commanding(tmp_path / "r", 16, [("decide", dict(learning_rate_scale=0.5))])
    train(PLAIN, tmp_path / "r", report=lambda trainer: report(trainer) or trainer.state.step == 18)
    for path in (tmp_path / "r/checkpoints").glob("cp_18*"): path.unlink()
    late, refused = commanding(tmp_path / "r", 12, [("decide", dict(learning_rate_scale=0.1))])
    assert train(PLAIN, tmp_path / "r", report=late) == "finished"
    answer = Run(tmp_path / "r").command(refused[0])
    assert answer["status"] == "refused" and "up to step 16" in answer["reason"]
    assert all(replay(tmp_path / "r", node).identical for node in (1, 2))


def test_a_frozen_lane_has_no_say_in_the_order_of_the_data(tmp_path):
    config = PLAIN.replace(sweep={"learning_rate": [1e-3, 1e38]}, optimizer=dict(name="sgd"), steps=20)
    first, _ = commanding(tmp_path / "r", 1, [("decide", dict(data_order="shuffle_block"))])
    then, _ = commanding(tmp_path / "r", 10, [("decide", dict(data_order="sequential"))])
    train(config, tmp_path / "r", report=lambda trainer: first(trainer) or then(trainer))
    run = Run(tmp_path / "r")
    nodes = run.nodes().set_index("node")
    assert (nodes.outcome == "frozen").sum() == 1
    assert all(replay(run.run_dir, node).identical for node in nodes[(nodes.lane == 0)].index)
    frozen = int(nodes.index[nodes.outcome == "frozen"][0])
    with pytest.raises(BadInput, match="was not finite any more"): branch(run.run_dir, int(nodes.last_step[frozen]) + 1, [Decision()], frozen, steps=3)


def test_a_fork_of_the_beginning_and_of_a_decision_taken_there(tmp_path):
    trainer = Trainer(PLAIN)
    with open_journal(trainer, tmp_path / "r") as journal:
        Run(tmp_path / "r").send("decide", dict(learning_rate_scale=0.5))
        time.sleep(0.6)
        trainer.run(journal, until=20)
    assert len(Run(tmp_path / "r").nodes()) == 2
    assert branch(tmp_path / "r", 0, [Decision()], steps=5) == [1]
    with pytest.raises(BadInput, match="fork 1 has taken these steps already"): branch(tmp_path / "r", 0, [Decision()], steps=5)
    assert Run(tmp_path / "r").nodes().parent.tolist()[-1] == 1 and replay(tmp_path / "r", 3).identical


def test_retention_never_takes_what_a_fork_started_from(tmp_path):
    config = STACKED.replace(steps=40, sweep={})
    go(config, tmp_path / "r", 20)
    branch(tmp_path / "r", 18, [Decision(skip=True)], steps=2)
    root = Run(tmp_path / "r").checkpoints().set_index("id").loc[Run(tmp_path / "r").nodes().checkpoint.dropna().iloc[0]]
    assert root.step == 18 and root.pins == ["fork 1"]
    go(config, tmp_path / "r")
    run = Run(tmp_path / "r")
    assert root.path in set(run.checkpoints().path) and 15 not in set(run.checkpoints().query("fork == 0").step)
    Checkpoint(tmp_path / "r" / root.path).verify()
    with Journal.open(tmp_path / "r", running=False) as journal:
        store = Store(tmp_path / "r", journal, int(root.fork))
        assert all(file.path != root.path for file in store.superfluous(keep=1))
        with pytest.raises(BadInput, match="fork 1 started from it"): store.unpin(store.at(18))


def test_going_on_never_takes_rows_from_under_a_fork(tmp_path):
    config = STACKED.replace(steps=40, sweep={}, checkpoints=KEEPING | dict(best=False))
    go(config, tmp_path / "r", 20)
    branch(tmp_path / "r", 19, [Decision(skip=True)], steps=2)
    for path in (tmp_path / "r/checkpoints").glob("cp_*"): path.unlink()
    with pytest.raises(BadInput, match="where a fork begins"): go(config, tmp_path / "r")
    assert Run(tmp_path / "r").signals(["loss"], nodes=[1]).loss.sizes["step"] == 20, "and nothing was taken back"


def test_a_full_disk_does_not_stop_training(tmp_path):
    config = STACKED.replace(steps=30, checkpoints=KEEPING | dict(every=5))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_and_free(trainer):
        if trainer.state.step == 11: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
        if trainer.state.step == 25: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    try: assert train(config, tmp_path / "r", report=fill_and_free) == "finished"
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run = Run(tmp_path / "r")
    failed = run.events().query("kind == 'checkpoint_failed'")
    assert set(failed.step) & {15, 20} and all("File too large" in detail["reason"] for detail in failed.detail)
    assert run.signals(["loss"]).loss.notnull().all() and 30 in set(run.checkpoints().step)
    for path in run.checkpoints().path: Checkpoint(tmp_path / "r" / path).verify()
    go(config, tmp_path / "same")
    assert_same(tmp_path / "r", tmp_path / "same")


def test_slow_writing_is_bounded_and_never_waited_for(tmp_path, monkeypatch):
    config = STACKED.replace(steps=60, sweep={}, checkpoints=dict(every=1, keep=3, memory_every=1, memory_keep=2, best=False))
    write, at_once, most = store_module.write_snapshot, threading.Semaphore(1), []

    def slowly(path, header, snapshot):
        assert at_once.acquire(blocking=False), "one file at a time"
        time.sleep(0.1)
        size = write(path, header, snapshot)
        at_once.release()
        return size
    monkeypatch.setattr(store_module, "write_snapshot", slowly)
    trainer = Trainer(config)
    with open_journal(trainer, tmp_path / "r") as journal:
        keeper = Checkpointing(tmp_path / "r", config.checkpoints)
        trainer.callbacks = [keeper]

        def count(trainer):
            held = {id(s) for s in keeper.memory} | {id(job.snapshot) for job in ([keeper.running[0]] if keeper.running else []) + ([keeper.waiting] if keeper.waiting else [])}
            most.append(len(held) + len(keeper.pool._free))
        begun = time.perf_counter()
        trainer.run(journal, report=count)
        took = time.perf_counter() - begun
    assert max(most) <= 2 + 2 + 1, "two in memory, one written, one waiting, one to take the next into"
    assert took < 60 * 0.1 and "checkpoint_skipped" in set(Run(tmp_path / "r").events().kind)
    assert Run(tmp_path / "r").checkpoints().step.max() == 60


def test_a_pin_fetches_a_state_from_memory(tmp_path):
    config, sent = STACKED.replace(steps=10_000, sweep={}, checkpoints=dict(every=1000, memory_every=5, memory_keep=4, best=False)), []

    def person(trainer):
        run = Run(tmp_path / "r")
        if trainer.state.step == 23: sent.extend(run.send("pin", payload) for payload in (dict(step=15, note="before the spike"), dict(step=3), dict(nonsense=1), dict(step=20, note="fork 9"), dict(step=15, fork=[1]), dict(step=15, fork="../..")))
        if trainer.state.step == 24: sent.append(run.send("checkpoint", dict(note="now")))
        if trainer.state.step > 24 and all(run.command(number)["status"] != "pending" for number in sent): return True
        if sent: time.sleep(0.05)
    train(config, tmp_path / "r", report=person)
    run = Run(tmp_path / "r")
    answers = [run.command(number) for number in sent]
    assert [a["status"] for a in answers] == ["done", *["refused"] * 5, "done"], answers
    assert "no checkpoint of that step" in answers[1]["reason"] and "not a field of pin" in answers[2]["reason"] and "own word" in answers[3]["reason"]
    assert all("no such fork" in answer["reason"] for answer in answers[4:6])
    pins = {step: pins for step, pins in zip(run.checkpoints().step, run.checkpoints().pins)}
    assert pins[15] == ["before the spike"] and ["now"] in pins.values()
    alone = Trainer(config)
    load_file(alone, tmp_path / "r/checkpoints/cp_15.ptz")
    assert alone.state.step == 15 and alone.step()["loss"][0] == float(run.signals(["loss"]).loss.sel(step=15)[0])


def test_old_files_become_compact_and_no_run_goes_on_from_one(tmp_path):
    def idle(trainer):
        keeper = trainer.callbacks[0]
        while keeper.running and not keeper.running[1].done(): time.sleep(0.01)
    train(STACKED.replace(steps=12, checkpoints=KEEPING | dict(kind="compact", keep=5, best=False)), tmp_path / "r", report=idle)
    table = Run(tmp_path / "r").checkpoints().drop_duplicates("path").set_index("step")
    assert table.kind.to_dict() == {3: "compact", 6: "compact", 9: "compact", 12: "exact"}
    files = {step: Checkpoint(tmp_path / "r" / path) for step, path in table.path.items()}
    assert files[9].kind == "compact" and table.bytes[9] == files[9].path.stat().st_size < 0.65 * table.bytes[12]
    with pytest.raises(BadInput, match="a compact checkpoint is an approximation"): load_file(Trainer(STACKED), files[9].path)
    assert branch(tmp_path / "r", 10, [Decision()], node=1, steps=1) == [1], "a step beside a compact file is reached from the beginning"


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    go(STACKED.replace(steps=3), tmp_path / "r")
    path = tmp_path / "r/checkpoints/cp_3.ptz"
    with pytest.raises(BadInput, match="belongs to another model"): load_file(Trainer(STACKED.replace(model={"depth": 2})), path)
    with pytest.raises(BadInput, match="no part of the state of a module engine"): load_file(Trainer(MODULE), path)
    with pytest.raises(BadInput, match="lanes"): load_file(Trainer(STACKED.replace(sweep={})), path)


def test_the_second_writer_is_refused(tmp_path):
    refused = []

    def second(trainer):
        if trainer.state.step == 5:
            for attempt in (lambda: go(STACKED, tmp_path / "r"), lambda: branch(tmp_path / "r", 2, [Decision()], node=1)):
                with pytest.raises(RunInUse) as caught: attempt()
                refused.append(str(caught.value))
    train(STACKED.replace(), tmp_path / "r", report=second)
    assert len(refused) == 2 and all("in use by the live process" in sentence for sentence in refused)


def test_nothing_is_begun_for_an_impossible_time(tmp_path):
    with pytest.raises(BadInput, match="seconds = -1"): train(PLAIN, tmp_path / "r", seconds=-1)
    assert not (tmp_path / "r").exists()


def test_the_text_and_the_configuration_must_be_the_same(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 300)
    config = STACKED.replace(steps=30, corpus=dict(path=str(text), blocks=10))
    go(config, tmp_path / "r", 10)
    before = what_happened(tmp_path / "r")[0]
    text.write_text("the quick brown fox jumps over the lazy cat. " * 300)
    with pytest.raises(BadInput, match="the text has changed"): go(config, tmp_path / "r")
    with pytest.raises(BadInput, match=r"optimizer.beta2 = 0.9: the run 'r' was begun with 0.999"): go(config.replace(optimizer=config.optimizer.replace(beta2=0.9)), tmp_path / "r")
    assert before.identical(what_happened(tmp_path / "r")[0]) and Run(tmp_path / "r").status() == "interrupted"


def test_a_run_of_an_older_journal_opens(tmp_path):
    (tmp_path / "old").mkdir()
    db = sqlite3.connect(tmp_path / "old/journal.db")
    create_tables(db, version=1)
    facts = dict(name="old", created=1.0, config={}, machine={}, status="finished", progress={}, next_row=1)
    db.executemany("INSERT INTO meta VALUES (?, ?)", [(key, json.dumps(value)) for key, value in facts.items()])
    db.execute("INSERT INTO nodes(id, lane, first_step, last_step, created) VALUES (1, 0, 0, 1, 0)")
    db.executemany("INSERT INTO steps(id, node, step, wall_time, loss) VALUES (?, 1, ?, 0, ?)", [(1, 0, 4.0), (2, 1, 3.5)])
    db.commit()
    db.close()
    run = Run(tmp_path / "old")
    assert run.nodes().fork.tolist() == [0] and len(run.checkpoints()) == 0
    assert history(run, 1, ["loss"]).loss.values.tolist() == [4.0, 3.5]
    with Journal.open(tmp_path / "old") as journal: journal.node(0, 1, 1, {}, fork=1)
    assert Run(tmp_path / "old").nodes().fork.tolist() == [0, 1]


def test_a_pickle_in_a_pretrained_folder_runs_nothing(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    class Harmful:
        def __reduce__(self): return os.system, (f"touch {tmp_path / 'harmed'}",)
    GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=16, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Harmful()}, tmp_path / "model/pytorch_model.bin")
    with pytest.raises(BadInput, match="would run code"): Trainer(MODULE.replace(module=dict(pretrained=str(tmp_path / "model"), context=16)))
    assert not (tmp_path / "harmed").exists()
