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


REGIMES = "learning", "plateau", "oscillating", "chaotic", "benign_divergence", "catastrophic_divergence", "overfitting"
SPAN = 40  # steps that the planted regimes last
ALARM, SHOCK, WARM_UP = 60, 50, 16  # steps: between alarms, of the first stressor and between stressors, without an index


def planted(lane, step):
    "Number of the regime of a lane at a step, and its probability: lane i begins with regime i, and the next regime comes after SPAN steps."
    return (lane + step // SPAN) % len(REGIMES), (0.55, 0.95, 0.75)[step // SPAN % 3]


def index_of(lane, step):
    "The planted index: a tenth for each lane, a wave, and 3.5 at each alarm."
    if step < WARM_UP: return math.nan
    return 3.5 if step % ALARM == ALARM - 1 else 0.1 * lane + math.sin(step / 9)


def senses(lanes, step):
    "What a monitor writes at a step."
    made = {f"regime_{name}": [] for name in REGIMES}
    for lane in lanes:
        top, probability = planted(lane, step)
        for i, name in enumerate(REGIMES): made[f"regime_{name}"].append(probability if i == top else (1 - probability) / (len(REGIMES) - 1))
    return made | dict(uncertainty_index=[index_of(lane, step) for lane in lanes])


def monitor_events(journal, step, nodes):
    "What a monitor notes beside the steps."
    if step == 0: journal.event("sense_failed", 0, sense="sharpness", reason="no <b>probe</b> batch")
    for lane, node in nodes:
        if step % ALARM == ALARM - 1: journal.event("alarm", step, node, index=index_of(lane, step))
        if step % SHOCK == SHOCK - 1: journal.event("stressor", step, node, name="gradient spike")
    if step % 10 == 0:
        facts = dict(share=0.071, budget=0.1, stretch=1.3, senses=dict(sharpness=dict(period=20, share=0.01)), off=dict(lyapunov="needs twins"))
        journal.progress(monitor=facts)


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
        if options.sensed:
            made |= senses(alive, step)
            monitor_events(journal, step, [(lane, nodes[lane]) for lane in alive])
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
    parser.add_argument("--sensed", type=int, default=0, help="1: with a monitor")
    options = parser.parse_args()
    config = dict(name="synthetic", steps=options.steps, rows=8, model=dict(context=64), facts=FACTS)
    with Journal.create(options.run_dir, config, dict(platform="synthetic")) as journal:
        journal.close(write(journal, options))


if __name__ == "__main__": main()
