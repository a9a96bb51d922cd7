"The command line as a user meets it: real processes, exit codes, sentences, interruptions."
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdalab.journal.reader import Run, runs
from sdalab.views.alerts import Alerts
from sdalab.views.following import Tail, sample_run

QUICK = ["--set", "model.depth=1", "--set", "rows=2"]


def start(folder, *words):
    "The command in a process of its own."
    environment = {**os.environ, "COLUMNS": "160"}
    return subprocess.Popen([sys.executable, "-m", "sdalab.cli", *words], cwd=folder, env=environment, text=True,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def sdalab(folder, *words):
    "Exit code, standard output, standard error."
    process = start(folder, *words)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def wait_for_step(folder, name, step, timeout=90):
    "Until the run's journal shows `step`."
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if (folder / "runs" / name / "journal.db").exists() and Run(folder / "runs" / name).rows_since(0, ["loss"])[0].step.max() >= step:
            return
        time.sleep(0.1)
    raise AssertionError(f"{name} did not reach step {step} in {timeout} s")


def test_help_teaches(tmp_path):
    code, out, _ = sdalab(tmp_path, "train", "--help")
    assert code == 0 and "sweep.learning_rate" in out and "--dry-run" in out and "Exit codes" in out


def test_train_list_show_export_delete(tmp_path):
    code, out, err = sdalab(tmp_path, "train", *QUICK, "--steps", "8", "--name", "a", "--set", "sweep.learning_rate=[1e-3,1e-2]")
    assert code == 0, err
    assert "a: finished" in out and "sdalab runs show a" in out
    assert Run(tmp_path / "runs" / "a").signals(["loss"]).loss.shape == (2, 8)
    assert "finished" in sdalab(tmp_path, "runs", "list")[1]
    assert "0.01" in sdalab(tmp_path, "runs", "show", "a")[1]
    assert sdalab(tmp_path, "runs", "export", "a")[0] == 0 and (tmp_path / "a.parquet").stat().st_size > 0
    assert sdalab(tmp_path, "runs", "export", "a")[0] == 2, "nothing is overwritten unless asked"
    assert sdalab(tmp_path, "runs", "export")[0] == 0 and (tmp_path / "runs" / "log_db.parquet").exists()
    assert sdalab(tmp_path, "runs", "delete", "a")[0] == 1, "no answer is not a yes"
    assert sdalab(tmp_path, "runs", "delete", "a", "--yes")[0] == 0 and not (tmp_path / "runs" / "a").exists()


def test_dry_run_trains_nothing(tmp_path):
    code, out, _ = sdalab(tmp_path, "train", *QUICK, "--dry-run")
    assert code == 0 and all(words in out for words in ("parameters a lane", "tokens in all", "memory", "estimated time"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words, sentence", [
    (["nowhere.yaml"], "neither a readable file nor a preset"),
    (["--set", "optimizer.learning_rte=1"], "did you mean 'learning_rate'?"),
    (["--set", "rows=0"], "rows = 0: should be greater than or equal to 1"),
    (["--set", "rows=two"], "rows = 'two'"),
    (["--set", "corpus.path=/no/such/file.txt"], "path = '/no/such/file.txt': cannot be read"),
    (["--set", "corpus.path=short.txt"], "context = 64: the text has 5 tokens"),
    (["--set", "corpus.path=binary.txt"], "not UTF-8 text"),
    (["--set", "model.vocabulary=7"], "model.vocabulary = 7: the corpus has"),
    (["--set", "device=cuda:99"], "device = 'cuda:99'"),
    (["--name", "../up"], "name = '../up'"),
    (["bad.yaml"], "not valid YAML"),
])
def test_bad_input_is_one_sentence_before_any_work(tmp_path, words, sentence):
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81" * 400)
    (tmp_path / "bad.yaml").write_text("steps: [1")
    code, out, err = sdalab(tmp_path, "train", *words)
    assert code == 2 and sentence in err and "Traceback" not in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "runs").exists()


def test_a_data_set_that_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = sdalab(tmp_path, "train", "--set", "corpus.dataset=nobody/nothing-at-all")
    assert code == 2 and "dataset = 'nobody/nothing-at-all': could not be loaded" in err and "Traceback" not in err


def test_a_name_is_taken_and_a_run_in_use(tmp_path):
    process = start(tmp_path, "train", *QUICK, "--steps", "100000", "--name", "busy")
    wait_for_step(tmp_path, "busy", 2)
    code, _, err = sdalab(tmp_path, "train", *QUICK, "--name", "busy")
    assert code == 3 and "a live process is training it" in err
    assert sdalab(tmp_path, "runs", "delete", "busy", "--yes")[0] == 3
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in out and "to go on" in out and "Traceback" not in err
    assert Run(tmp_path / "runs" / "busy").status() == "interrupted"
    code, _, err = sdalab(tmp_path, "train", *QUICK, "--name", "busy")
    assert code == 2 and "steps = 2000: the run 'busy' was begun with 100000" in err
    code, out, err = sdalab(tmp_path, "train", *QUICK, "--steps", "100000", "--name", "busy", "--seconds", "1")
    assert code == 0 and "busy: going on at step" in err and "out of time" in out, "the same command goes on"


def test_kill_leaves_a_journal_that_opens(tmp_path):
    process = start(tmp_path, "train", *QUICK, "--steps", "100000", "--name", "killed")
    wait_for_step(tmp_path, "killed", 20)
    process.kill()
    process.communicate()
    run = Run(tmp_path / "runs" / "killed")
    losses = run.signals(["loss"]).loss
    assert run.status() == "killed" and losses.shape[1] > 20 and bool(losses.notnull().all())
    with sqlite3.connect(tmp_path / "runs" / "killed" / "journal.db") as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    code, _, err = sdalab(tmp_path, "train", *QUICK, "--steps", "100000", "--name", "killed", "--seconds", "1")
    assert code == 0 and "killed: going on at step" in err and "rewind" in set(run.events().kind)


def test_tree_branch_replay_and_checkpoints(tmp_path):
    words = *QUICK, "--steps", "40", "--name", "t", "--set", "checkpoints.every=15", "--set", "evaluate_every=20"
    assert sdalab(tmp_path, "train", *words)[0] == 0
    code, _, err = sdalab(tmp_path, "train", *words)
    assert code == 2 and "finished run of that name" in err
    code, out, err = sdalab(tmp_path, "branch", "t", "--at", "22", "--set", "lr_scale=0.5,momentum_reset=true", "--set", "noop", "--steps", "10")
    assert code == 0 and "fork 1: 2 futures of node 1 from step 22" in err and "learning_rate_scale=0.5" in out and "noop" in out, err
    code, out, _ = sdalab(tmp_path, "tree", "t")
    assert code == 0 and "3 nodes, 1 fork," in out and "fork 1: learning_rate_scale=0.5, momentum_reset=True  steps 22–31" in out
    code, out, _ = sdalab(tmp_path, "replay", "t", "2")
    assert code == 0 and "node 2, steps 22 to 31" in out and "identical to the bit" in out
    with sqlite3.connect(tmp_path / "runs/t/journal.db") as db:
        db.execute("UPDATE steps SET gradient_norm = gradient_norm * 2 WHERE node = 2 AND step = 25")
        db.execute("DELETE FROM packs")
    db.close()
    code, out, _ = sdalab(tmp_path, "replay", "t", "2")
    assert code == 1 and "step 25 differs first: gradient_norm was" in out
    code, out, _ = sdalab(tmp_path, "checkpoints", "list", "t")
    assert code == 0 and all(words in out for words in ("cp_40.ptz", "fork_1/cp_22.ptz", "best", "fork 1"))
    assert sdalab(tmp_path, "checkpoints", "pin", "t", "30", "--note", "keep me")[0] == 0
    assert "keep me" in sdalab(tmp_path, "checkpoints", "list", "t")[1]
    assert "first_moment" in sdalab(tmp_path, "checkpoints", "show", "t", "30")[1]
    code, out, _ = sdalab(tmp_path, "checkpoints", "prune", "t")
    assert code == 0 and "removed checkpoints/cp_15.ptz" in out and not (tmp_path / "runs/t/checkpoints/cp_15.ptz").exists()
    damaged = tmp_path / "runs/t/checkpoints/cp_30.ptz"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    code, out, _ = sdalab(tmp_path, "checkpoints", "verify", "t")
    assert code == 1 and "damaged: " in out and "cp_30.ptz: is cut off or damaged" in out
    assert Run(tmp_path / "runs/t").status() == "finished"


@pytest.mark.parametrize("words, sentence", [
    (["tree", "b"], "run = 'b': none of that name"),
    (["branch", "a", "--at", "99", "--set", "noop"], "at = 99: the path to node 1 can be left at steps 0 to 6"),
    (["branch", "a", "--at", "3", "--set", "lr_scle=2"], "lr_scle is not a field of Decision"),
    (["branch", "a", "--at", "3", "--set", "lr_scale=-1"], "learning_rate_scale = -1.0: should be greater than or equal to 0"),
    (["branch", "a", "--at", "3", "--set", "noop", "--node", "7"], "node = 7: the run has nodes 1 to 1"),
    (["replay", "a", "7"], "node = 7: the run has nodes 1 to 1"),
    (["checkpoints", "show", "a", "5"], "step = 5: no checkpoint of that step in fork 0; there are 6"),
    (["checkpoints", "pin", "a", "5"], "step = 5: no checkpoint of that step"),
    (["checkpoints", "export", "a", "6", "out"], "only a module-engine run can be exported"),
    (["train", "--set", "checkpoints.every=0"], "checkpoints.every = 0"),
    (["train", "--set", "checkpoints.kind=tiny"], "checkpoints.kind = 'tiny'"),
])
def test_bad_input_to_the_tree_commands(small_run, words, sentence):
    code, _, err = sdalab(small_run, *words)
    assert code == 2 and sentence in err and "Traceback" not in err and len(err.strip().splitlines()) == 1, err
    assert Run(small_run / "runs/a").status() == "finished"


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    assert sdalab(folder, "train", *QUICK, "--steps", "6", "--name", "a")[0] == 0
    (folder / "empty").mkdir()
    return folder


def test_pins_of_a_living_run(tmp_path):
    process = start(tmp_path, "train", *QUICK, "--steps", "100000", "--name", "alive", "--set", "checkpoints.memory_every=5", "--set", "checkpoints.memory_keep=400")
    wait_for_step(tmp_path, "alive", 12)
    assert sdalab(tmp_path, "checkpoints", "pin", "alive", "10", "--note", "calm")[0] == 0
    code, _, _ = sdalab(tmp_path, "branch", "alive", "--at", "5", "--set", "noop", "--steps", "2")
    assert code == 0
    deadline = time.monotonic() + 60
    while 1 not in set(Run(tmp_path / "runs" / "alive").nodes().fork) and time.monotonic() < deadline:  # the run's own trainer grows the fork
        time.sleep(0.2)
    assert 1 in set(Run(tmp_path / "runs" / "alive").nodes().fork)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    table = Run(tmp_path / "runs" / "alive").checkpoints().set_index("step")
    assert process.returncode == 130 and table.pins[10] == ["calm"]


def test_every_lane_diverged(tmp_path):
    code, out, _ = sdalab(tmp_path, "train", *QUICK, "--steps", "50", "--name", "hot", "--set", "optimizer={name: sgd, learning_rate: 1e30}")
    assert code == 4 and "diverged" in out
    events = Run(tmp_path / "runs" / "hot").events()
    assert "frozen" in set(events.kind)


def test_commands_from_another_process(tmp_path):
    process = start(tmp_path, "train", *QUICK, "--steps", "100000", "--name", "steered")
    wait_for_step(tmp_path, "steered", 5)
    run = Run(tmp_path / "runs" / "steered")

    def answered(command):
        end = time.monotonic() + 30
        while run.command(command)["status"] == "pending" and time.monotonic() < end:
            time.sleep(0.05)
        return run.command(command)
    assert answered(run.send("pause"))["status"] == "done"
    time.sleep(0.6)
    assert run.status() == "paused"
    held = run.rows_since(0, ["loss"])[0].step.max()
    time.sleep(0.8)
    assert run.rows_since(0, ["loss"])[0].step.max() == held
    assert answered(run.send("decide", {"learning_rate_scale": -2}))["status"] == "refused"
    assert answered(run.send("decide", {"learning_rate_scale": 0.5}))["status"] == "done"
    assert answered(run.send("resume"))["status"] == "done"
    wait_for_step(tmp_path, "steered", held + 3)
    assert answered(run.send("stop"))["status"] == "done"
    process.communicate(timeout=60)
    assert process.returncode == 130 and len(run.nodes()) == 2
    assert run.command(run.send("pause"))["status"] == "expired", "nobody is there to take it"


def test_two_at_once_share_a_folder(tmp_path):
    both = [start(tmp_path, "train", *QUICK, "--steps", "30", "--name", name) for name in ("one", "two")]
    for process in both:
        process.communicate(timeout=240)
        assert process.returncode == 0
    assert {run.name for run in runs(tmp_path / "runs")} == {"one", "two"}


def test_the_module_engine_from_a_preset(tmp_path):
    code, out, err = sdalab(tmp_path, "train", "gpt2-tiny", "--steps", "6", "--set", "rows=2", "--set", "module.context=32")
    assert code == 0 and "gpt2-tiny: finished" in out, err


def test_a_short_demo(tmp_path):
    code, out, err = sdalab(tmp_path, "demo", "--seconds", "6")
    assert code == 0, err
    assert all(words in out for words in ("validation bits", "tokens per second", "picture:", "What to try next", "diverged"))
    picture, = (tmp_path / "runs").glob("*/losses.png")
    assert picture.stat().st_size > 20_000
    code, _, err = sdalab(tmp_path, "demo", "--seconds", "0")
    assert code == 2 and "seconds = 0" in err


def test_console_script_is_installed():
    script = Path(sys.executable).parent / "sdalab"
    assert subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout.count("runs") >= 1


def test_interrupt_while_paused(tmp_path):
    process = start(tmp_path, "train", *QUICK, "--steps", "100000", "--name", "paused")
    wait_for_step(tmp_path, "paused", 3)
    run = Run(tmp_path / "runs" / "paused")
    run.send("pause")
    end = time.monotonic() + 30
    while run.status() != "paused" and time.monotonic() < end:
        time.sleep(0.05)
    assert run.status() == "paused"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and "to go on" in out and run.status() == "interrupted"


def test_malformed_commands_do_not_end_a_run(tmp_path):
    process = start(tmp_path, "train", *QUICK, "--steps", "100000", "--name", "tough")
    wait_for_step(tmp_path, "tough", 3)
    run = Run(tmp_path / "runs" / "tough")
    node = int(run.nodes().node[0])
    sent = [run.send("decide", {"nonsense": 1}), run.send("pause", node=node), run.send("decide", {"data_order": "shuffle_block"}, node=node)]
    end = time.monotonic() + 30
    while any(run.command(c)["status"] == "pending" for c in sent) and time.monotonic() < end:
        time.sleep(0.05)
    assert [run.command(c)["status"] for c in sent] == ["refused"] * 3
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)


def test_the_shown_configuration_trains_the_same_model(tmp_path):
    code, shown, _ = sdalab(tmp_path, "train", "--show-config", *QUICK, "--steps", "5", "--name", "again")
    (tmp_path / "again.yaml").write_text(shown)
    assert code == 0 and sdalab(tmp_path, "train", "again.yaml")[0] == 0
    assert sdalab(tmp_path, "train", *QUICK, "--steps", "5", "--name", "first")[0] == 0
    a, b = (Run(tmp_path / "runs" / name).signals(["loss"]).loss.values for name in ("again", "first"))
    assert (a == b).all()
    assert Run(tmp_path / "runs" / "again").config["facts"]["model"]["vocabulary"] == Run(tmp_path / "runs" / "again").config["facts"]["corpus"]["vocabulary"]


def test_out_of_time_is_no_failure(tmp_path):
    code, out, _ = sdalab(tmp_path, "train", *QUICK, "--steps", "1000000", "--seconds", "1", "--name", "short")
    assert code == 0 and "out of time" in out and "to go on" in out
    (tmp_path / "afile").write_text("")
    code, _, err = sdalab(tmp_path, "train", *QUICK, "--runs", "afile")
    assert code == 2 and "is a file" in err


def test_alerts_are_listed(tmp_path):
    root = tmp_path / "runs"
    for name in ("one", "other"): sample_run(root, forked=False, name=name)
    assert sdalab(tmp_path, "alerts") == (0, "", "No alerts of any run in runs.\n")
    (root / "alerts.yaml").write_text("- {name: low, signal: loss, below: 3.0, steps: 3, level: error}\n")
    alerts = Alerts(root)
    for name in ("one", "other"): alerts.check(Tail(root / name).look())
    code, out, _ = sdalab(tmp_path, "alerts", "one")
    assert code == 0 and "error" in out and "low: loss = " in out and "other" not in out
    found = [json.loads(line) for line in sdalab(tmp_path, "alerts", "--json")[1].splitlines()]
    assert {one["run"] for one in found} == {"one", "other"} and all(one["value"] < 3 for one in found)
    code, _, err = sdalab(tmp_path, "alerts", "ones")
    assert code == 2 and "run = 'ones'" in err and "one" in err
