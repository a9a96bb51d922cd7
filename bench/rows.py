"One row of the benchmark, and how to time side by side."
import statistics
import time
from typing import Callable, NamedTuple


class Row(NamedTuple):
    "One measured number beside its baseline, its limit and its target."
    name: str
    value: float
    unit: str
    against: str = ""  # the baseline, with its own value
    ratio: float | None = None  # how many times better than the baseline
    limit: str = ""  # what bounds it, and how much of that was reached
    target: str = ""  # such as ">= 2" (of the ratio, or of the value where there is no ratio)

    @property
    def met(self) -> bool | None:
        "Whether the target is met; None where there is none."
        if not self.target:
            return None
        sign, bound = self.target.split()
        number = self.value if self.ratio is None else self.ratio
        return bool(number >= float(bound) if sign == ">=" else number <= float(bound))

    def as_dict(self) -> dict:
        "The row as bench.json keeps it."
        return {**self._asdict(), "value": float(self.value), "met": self.met}


def side_by_side(contenders: dict[str, Callable[[], None]], rounds: int = 5, seconds: float = 1.0, clock=time.perf_counter) -> dict[str, float]:
    "Median seconds of one call of each contender, measured in turns so that a slow moment hits all alike; `clock` may be of the processor."
    times = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for _ in range(rounds):
        for name, call in contenders.items():
            end = clock() + seconds / rounds
            while True:
                start = clock()
                call()
                now = clock()
                times[name].append(now - start)
                if now > end:
                    break
    return {name: statistics.median(t) for name, t in times.items()}
