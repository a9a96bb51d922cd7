"""A run that only looks like training: a process that writes a growing journal and obeys commands.

python tests/synthetic_run.py RUN_DIR --lanes 8 --steps 4000 --rate 40
"""
import argparse
import math
import random
import time

from sdalab.journal.writer import Journal

RATES = 1e-4, 3e-4, 1e-3, 3e-3, 6e-3, 1.2e-2, 3e-2, 0.3
FACTS = dict(parameters=95973, corpus=dict(vocabulary=101, unigram_loss=3.12, characters_per_token=1.0, fingerprint="synthetic"))


def loss_of(rate, step, noise):
    "A curve that falls with the rate, until the rate is too hot."
    if rate >= 0.3: return 4.6 * 1.12 ** step
    speed, floor = rate * 12, 1.45 + 0.12 * abs(math.log10(rate / 4e-3))
    return floor + (4.7 - floor) / (1 + speed * step) ** 0.55 + random.gauss(0, noise)


def columns(rates, step, evaluate_every):
    "The journal's columns of one step."
    warm = min(1.0, (step + 1) / 20)
    losses = [loss_of(rate, step, 0.05) for rate in rates]
    made = dict(loss=losses, gradient_norm=[0.2 + 2 / (1 + step / 50) * random.lognormvariate(0, 0.2) * min(loss, 50) / 3 for loss in losses],
                learning_rate=[rate * warm for rate in rates])
    if (step + 1) % evaluate_every == 0: made["validation_loss"] = [loss_of(rate, step, 0.004) + 0.05 for rate in rates]
    return made


def obey(journal, paused):
    "Answers what is pending; returns whether to go on, and whether paused."
    for command in journal.pending():
        if command.kind == "decide":
            journal.answer(command, "refused", "a synthetic run has nothing to decide")
            continue
        journal.answer(command, "done")
        if command.kind == "stop": return False, paused
        paused = command.kind == "pause"
        journal.set_status("paused" if paused else "running")
    return True, paused


def write(journal, options):
    "Steps until the end or a stop; a lane whose loss passes 1e6 is frozen."
    rates = list(RATES[:options.lanes])
    nodes = [journal.node(lane, settings={"seed": 0, "learning_rate": rate}) for lane, rate in enumerate(rates)]
    alive, paused, step = list(range(options.lanes)), False, 0
    journal.progress(planned_steps=options.steps, step=0)
    while step < options.steps:
        going, paused = obey(journal, paused)
        if not going: return "interrupted"
        if paused or step >= options.hold:
            time.sleep(0.02)
            continue
        made = columns([rates[lane] for lane in alive], step, options.evaluate_every)
        journal.steps(step, [nodes[lane] for lane in alive], made)
        for lane, loss in list(zip(alive, made["loss"])):
            if loss > 1e6:
                journal.event("frozen", step, nodes[lane], lane=lane, reason="loss is not finite")
                alive.remove(lane)
        step += 1
        if step % 10 == 0:
            rate = options.rate * options.lanes * 512
            journal.progress(step=step, tokens_per_second=rate, seconds_left=(options.steps - step) / options.rate)
        if step > options.at_once: time.sleep(1 / options.rate)
    return "finished"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir")
    parser.add_argument("--lanes", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--rate", type=float, default=40.0, help="steps a second")
    parser.add_argument("--at-once", type=int, default=0, help="steps written before the clock counts")
    parser.add_argument("--hold", type=float, default=math.inf, help="wait at this step for commands")
    parser.add_argument("--evaluate-every", type=int, default=25)
    options = parser.parse_args()
    config = dict(name="synthetic", steps=options.steps, rows=8, model=dict(context=64), facts=FACTS)
    with Journal.create(options.run_dir, config, dict(platform="synthetic")) as journal:
        journal.close(write(journal, options))


if __name__ == "__main__": main()
