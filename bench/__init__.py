"""Benchmarks: `python -m bench` prints a table and writes bench.json.

A row is {name, value, unit, against, ratio, limit, target, met}: what was measured, the baseline it is
divided into (or the other way round where more is better), the share of the hardware's own limit that
was reached, and whether the target is met. Baselines run in the same process run, interleaved.
"""
