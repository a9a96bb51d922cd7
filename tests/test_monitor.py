"What a monitor's chapter is the wrong place for: interruptions, forks, and readings on demand in a running process."
import signal

import numpy as np
import pytest

from sdalab.checkpoints.branch import branch, replay
from sdalab.checkpoints.resume import train
from sdalab.decisions.model import Decision
from sdalab.journal.reader import Run
from sdalab.journal.schema import signal_columns
from sdalab.regime.monitor import senses
from sdalab.training.configuration import TrainConfig
from test_cli import QUICK, sdalab, start, wait_for_step

SMALL = dict(steps=160, rows=8, threads=1, evaluate_every=40, evaluate_batches=1, optimizer=dict(name="adam", learning_rate=3e-3),
             model=dict(context=32, width=32, inner_width=48, hidden_width=64), checkpoints=dict(every=50, memory_every=50),
             monitor=dict(budget=1000.0), sweep=dict(seed=[0, 1]),  # a budget that never stretches a period: readings then depend on the step alone
             stressors=[dict(name="gradient_spikes", share=0.03), dict(name="hot_rate", factor=300.0, start=140)])


def test_an_interruption_changes_neither_signals_nor_senses(tmp_path):
    runs = {}
    for name, stops in (("whole", []), ("broken", [70, 131])):
        config = TrainConfig(name=name, **SMALL)
        for stop in [*stops, None]:
            train(config, tmp_path / name, report=lambda trainer: trainer.state.step == stop, callbacks=senses)
        runs[name] = Run(tmp_path / name)
    signals, other = (run.signals().drop_vars("step_seconds") for run in runs.values())
    for name in signal_columns("signals"):
        if name != "step_seconds":
            assert np.array_equal(signals[name], other[name], equal_nan=True), name
    resumed = [70, 131]  # the gradient before these is not part of a state
    for name in ("loss_average", "loss_volatility", "gradient_norm_attention_z", "update_ratio", "uncertainty_index", "attention_entropy", "edge_coordinate", "forecast_disagreement"):
        assert np.array_equal(signals[name], other[name], equal_nan=True), name
    cosines = [np.delete(s.gradient_cosine.values, resumed, axis=1) for s in (signals, other)]
    assert np.array_equal(*cosines, equal_nan=True) and np.isnan(other.gradient_cosine.values[:, resumed]).all()
    told = [run.events().query("kind in ('alarm', 'stressor')")[["kind", "step", "node"]].values.tolist() for run in runs.values()]
    assert told[0] == told[1] and any(kind == "alarm" and step >= 140 for kind, step, _ in told[0]) and any(kind == "stressor" for kind, *_ in told[0])


def test_forks_are_sensed_and_replays_do_not_mind(tmp_path):
    train(TrainConfig(name="trunk", **SMALL | dict(sweep={}, steps=60)), tmp_path / "trunk", callbacks=senses)
    number, = branch(tmp_path / "trunk", 40, [Decision(learning_rate_scale=0.5), Decision()], steps=20, callbacks=senses)
    run = Run(tmp_path / "trunk")
    forked = run.nodes().query("fork == @number").node.tolist()
    seen = run.signals(["loss_average", "regime_learning"], nodes=forked, first=40)
    assert seen.loss_average.notnull().all() and np.allclose(seen.regime_learning.values[:, -1] > 0, True)
    assert replay(tmp_path / "trunk", 1).identical


def test_a_reading_on_demand(tmp_path):
    process = start(tmp_path, "train", *QUICK, "--steps", "100000", "--name", "busy")
    try:
        wait_for_step(tmp_path, "busy", 30)
        code, out, err = sdalab(tmp_path, "sense", "busy", "curvature", "twins")
        assert code == 0 and "sharpness" in out and "lyapunov" in out, out + err
        assert Run(tmp_path / "runs" / "busy").signals(["sharpness"]).sharpness.notnull().any()
        code, _, err = sdalab(tmp_path, "sense", "busy", "curvatur")
        assert code == 2 and "did you mean 'curvature'?" in err
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert "sensed:" in sdalab(tmp_path, "runs", "show", "busy")[1]
    code, _, err = sdalab(tmp_path, "sense", "busy", "twins")
    assert code == 2 and "expired" in err


@pytest.mark.parametrize("setting, sentence", [
    ("monitor.periods.edge=0", "periods.edge = 0: should be 1 or more steps"),
    ("monitor.periods.egde=5", "monitor.periods.egde: did you mean 'edge'?"),
    ("monitor.index=documents", "did you mean 'document'?"),
    ("monitor.budget=0", "monitor.budget = 0"),
    ("stressors=[{name: rare_token}]", "did you mean 'rare_tokens'?"),
    ("stressors=[{name: long_sequences}]", "does not fit the model's context"),
    ("stressors=[{name: hot_rate, start: 5, stop: 5}]", "should come after start = 5"),
    ("window=128", "window = 128: should be at most the model's context, 64"),
])
def test_a_mistake_is_told_before_anything_is_written(tmp_path, setting, sentence):
    code, out, err = sdalab(tmp_path, "train", "edge-95k", "--steps", "3", "--set", setting)
    assert code == 2 and sentence in err and "Traceback" not in err, err
    assert not (tmp_path / "runs" / "edge-95k").exists()


def test_long_sequences_keep_the_number_of_tokens(tmp_path):
    code, out, err = sdalab(tmp_path, "train", "edge-95k", "--steps", "30", "--set", "window=16", "--set", "stressors=[{name: long_sequences, share: 0.5}]", "--name", "long")
    assert code == 0, err
    run = Run(tmp_path / "runs" / "long")
    assert (np.diff(run.signals(["tokens"]).tokens.values[0]) == 256).all() and (run.events().kind == "stressor").sum() > 3
