"""Following runs while they train: no science and no web framework, only the journal.

One `Watch` serves every viewer. Its thread reads the runs that somebody looks at and publishes each as a
`Moment`, which never changes afterwards, so that viewers need no lock and no database.
"""
import json
import logging
import math
import sqlite3
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from scipy.signal import lfilter

from sdalab.checked import BadInput
from sdalab.decisions.model import Decision
from sdalab.journal.reader import Run, fetch, reading
from sdalab.journal.schema import JournalError, is_held

LIVE = "running", "paused"
GROUPS = tuple(f"learning_rate_{group}" for group in ("attention", "mlp", "embedding", "norms", "head"))
REGIMES = "learning", "plateau", "oscillating", "chaotic", "benign_divergence", "catastrophic_divergence", "overfitting"
PROBABILITIES = tuple(f"regime_{name}" for name in REGIMES)
SENSES = ("uncertainty_index", *PROBABILITIES)
SIGNALS = ("loss", "validation_loss", "gradient_norm", "learning_rate", *GROUPS, *SENSES)
PLOTTED = "step", "loss", "gradient_norm", "learning_rate", "validation_step", "validation_loss"
TOLD = "frozen", "alarm", "stressor", "sense_failed"  # kinds of events that a page shows
UNREADABLE = ValueError, KeyError, OSError, sqlite3.Error, JournalError  # what a broken or vanished journal raises
log = logging.getLogger(__name__)


class Column:
    "Numbers that only grow at the end. A slice that was handed out keeps its values."

    def __init__(self, dtype=float):
        self._block, self._length = np.empty(1024, dtype), 0

    def extend(self, values):
        "Appends; the block doubles when it is full."
        end = self._length + len(values)
        if end > len(self._block):
            block = np.empty(max(end, 2 * len(self._block)), self._block.dtype)
            block[:self._length] = self._block[:self._length]
            self._block = block
        self._block[self._length:end] = values
        self._length = end

    @property
    def values(self):
        "All of them, without a copy."
        return self._block[:self._length]


@dataclass(frozen=True)
class Series:
    "What one lane did, step after step, over all nodes that continue each other."
    key: int  # its first node
    lane: int
    settings: dict
    step: np.ndarray
    loss: np.ndarray
    gradient_norm: np.ndarray
    learning_rate: np.ndarray
    validation_step: np.ndarray
    validation_loss: np.ndarray
    frozen_at: int | None  # step at which it stopped being finite
    senses: dict = field(default_factory=dict)  # column -> one value a step; NaN where the monitor said nothing
    alarms: np.ndarray = field(default_factory=lambda: np.empty((0, 2)))  # steps and the index at each


@dataclass(frozen=True)
class Moment:
    "A run as it was at one look."
    key: str
    config: dict
    status: str = "unknown"
    progress: dict = field(default_factory=dict)
    series: tuple = ()
    commands: tuple = ()  # newest first, plain dicts
    updated: float | None = None  # Unix time of the last step
    generation: int = 0  # another number: what was seen before no longer holds
    problem: str | None = None  # why this is not up to date
    sensed: frozenset = frozenset()  # of "index" and "regimes": what a monitor has written so far
    stressors: tuple = ()  # (step, name, key of the series or None for the whole run), oldest first
    failed: dict = field(default_factory=dict)  # sense -> why it failed

    @property
    def live(self):
        "Whether a process is training it."
        return self.problem is None and self.status in LIVE


class Tail:
    "Reads what is new in one run."
    def __init__(self, run_dir, key):
        self.run_dir, self.key, self.generation, self.created = Path(run_dir), key, 0, None
        self.now = None  # the last Moment; None before the first look
        self._restart()

    def _restart(self):
        "Forgets everything, as for a journal never seen."
        self.generation += 1
        self._rowid, self._event, self._updated = 0, 0, None
        self._nodes, self._first, self._columns, self._frozen = {}, {}, {}, {}
        self._sensed, self._alarms, self._stressors, self._failed = frozenset(), {}, (), {}

    def look(self):
        "Reads on and publishes a new moment; a problem is published with the last data."
        try:
            self.now = self._read()
        except UNREADABLE as problem:
            before = self.now or Moment(self.key, {})
            self.now = replace(before, problem=str(problem))

    def _read(self):
        alive = is_held(self.run_dir)  # before the rows: a run that has ended by now has written all of them
        with reading(self.run_dir) as db:  # one transaction, so all of it belongs together
            facts = {key: json.loads(value) for key, value in db.execute("SELECT key, value FROM meta")}
            if self.created not in (None, facts["created"]): self._restart()
            self.created = facts["created"]
            self._take_nodes(db)
            self._take_rows(db)
            self._take_events(db)
            commands = rows_of(db, "SELECT id, kind, status, reason, sent FROM commands ORDER BY id DESC LIMIT 5")
        for command in commands:
            if command["status"] == "pending" and not alive: command["status"] = "expired"
        status = "killed" if facts["status"] in LIVE and not alive else facts["status"]
        series = tuple(self._series(key) for key in self._columns)
        return Moment(self.key, facts["config"], status, facts["progress"], series, tuple(commands), self._updated, self.generation,
                      sensed=self._sensed, stressors=self._stressors, failed=dict(self._failed))

    def _take_nodes(self, db):
        "New nodes, and those that may have ended since."
        still_open = [node for node, facts in self._nodes.items() if facts["last_step"] is None]
        query = "SELECT * FROM nodes WHERE id > ? OR id IN (SELECT value FROM json_each(?)) ORDER BY id"
        for facts in rows_of(db, query, (max(self._nodes, default=0), json.dumps(still_open))):
            node = facts["id"]
            self._nodes[node] = facts
            if node not in self._first: self._first[node] = self._first_node(facts)
            if facts["outcome"] == "frozen": self._frozen.setdefault(self._first[node], facts["last_step"])

    def _first_node(self, facts):
        "The node with which this node's series began: a child in the same fork continues its parent."
        node, parent = facts["id"], facts["parent"]
        if parent is None or fork_and_lane(self._nodes[parent]) != fork_and_lane(facts):
            self._columns[node] = {name: Column() for name in PLOTTED} | {name: Column("f4") for name in SENSES}
            return node
        return self._first[parent]

    def _take_rows(self, db):
        rows = fetch(db, ["node", "step", "wall_time", *SIGNALS], self._rowid)
        if not len(rows["id"]): return
        if self._went_back(rows):
            self._restart()
            self._take_nodes(db)
            return self._take_rows(db)
        self._rowid, self._updated = int(rows["id"][-1]), float(rows["wall_time"][-1])
        for what, name in ("index", "uncertainty_index"), ("regimes", PROBABILITIES[0]):
            if np.isfinite(rows[name]).any(): self._sensed |= {what}
        for node in np.unique(rows["node"]): self._append(self._columns[self._first[int(node)]], rows, rows["node"] == node)

    def _went_back(self, rows):
        "Whether a run was rewound: a step comes again."
        for node in np.unique(rows["node"]):
            before = self._columns[self._first[int(node)]]["step"].values
            if len(before) and rows["step"][rows["node"] == node][0] <= before[-1]: return True
        return False

    def _append(self, columns, rows, where):
        for name in ("step", "loss", "gradient_norm", *SENSES): columns[name].extend(rows[name][where])
        columns["learning_rate"].extend(common_rate(rows, where))
        validated = where & ~np.isnan(rows["validation_loss"])
        columns["validation_step"].extend(rows["step"][validated])
        columns["validation_loss"].extend(rows["validation_loss"][validated])

    def _take_events(self, db):
        query = "SELECT id, kind, node, step, detail FROM events WHERE id > ? AND kind IN (SELECT value FROM json_each(?)) ORDER BY id"
        for event in rows_of(db, query, (self._event, json.dumps(TOLD))):
            self._event, detail = event["id"], json.loads(event["detail"])
            self._take_event(event["kind"], event["step"], self._first.get(event["node"]), detail)

    def _take_event(self, kind, step, key, detail):
        if kind == "stressor": self._stressors += (step, str(detail.get("name", kind)), key),
        elif kind == "sense_failed": self._failed[str(detail.get("sense"))] = str(detail.get("reason", ""))
        elif key is not None and kind == "frozen": self._frozen[key] = step
        elif key is not None: self._alarms.setdefault(key, Column()).extend([step, detail.get("index", math.nan)])

    def _series(self, key):
        facts = self._nodes[key]
        columns = {name: column.values for name, column in self._columns[key].items()}
        plotted, senses = ({name: columns[name] for name in names} for names in (PLOTTED, SENSES))
        alarms = self._alarms.get(key, Column()).values.reshape(-1, 2)
        return Series(key=key, lane=facts["lane"], settings=settings_of(facts), frozen_at=self._frozen.get(key), senses=senses, alarms=alarms, **plotted)


def fork_and_lane(facts):
    "What a node shares with those that it continues; the main line is fork 0, as in journals that know of no forks."
    return facts.get("fork", 0), facts["lane"]


def settings_of(facts):
    "What sets a series apart: the settings of its lane and, in a fork, the decision that it was forked under."
    settings = json.loads(facts["settings"] or "{}")
    if not facts.get("fork"): return settings
    return settings | {"fork": facts["fork"]} | Decision(**json.loads(facts["decision"] or "{}")).changes()


def rows_of(db, query, parameters=()):
    "The answer as plain dicts."
    cursor = db.execute(query, parameters)
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row)) for row in cursor]


def common_rate(rows, where):
    "The learning rate of some rows; the largest of the groups where they differ."
    rate = rows["learning_rate"][where]
    return np.where(np.isnan(rate), np.fmax.reduce([rows[name][where] for name in GROUPS]), rate)


@dataclass(frozen=True)
class Entry:
    "A run that can be chosen."
    key: str  # its folder, as seen from the folder of all runs
    run_dir: Path
    created: float
    live: bool


def find_runs(root, known):
    "The runs below a folder, running ones first and then newest first, and a sentence for each that cannot be read."
    entries, problems = [], []
    for path in sorted(Path(root).rglob("journal.db")):
        run_dir = path.parent
        key = run_dir.relative_to(root).as_posix()
        try:
            stamp = path, path.stat().st_ino
            if stamp not in known: known[stamp] = Run(run_dir).created
            entries.append(Entry(run_dir.name if key == "." else key, run_dir, known[stamp], is_held(run_dir)))
        except UNREADABLE as problem:
            problems.append(str(problem))
    return sorted(entries, key=lambda entry: (entry.live, entry.created), reverse=True), problems


class Watch:
    "Follows the runs of one folder for all viewers, from one thread that rests when nobody looks."
    PERIOD = 0.4  # seconds between looks at a run
    LIST_EVERY = 2.0  # seconds between looks for new runs
    PATIENCE = 10.0  # seconds after which a run that nobody asks for is forgotten

    def __init__(self, root):
        self.root, self.entries, self.problems, self.listed = Path(root).absolute(), [], [], False
        self._known, self._tails, self._asked, self._last_asked, self._last_list = {}, {}, {}, 0.0, -math.inf
        self._wake = threading.Event()
        threading.Thread(target=self._work, name="watch", daemon=True).start()

    def ask(self, key=None):
        "Says that a viewer is there, and which run it looks at: its last moment, or None while it is first read."
        fresh = key is not None and key not in self._asked
        self._last_asked = time.monotonic()
        if key is not None: self._asked[key] = self._last_asked
        if fresh or not self.listed: self._wake.set()
        tail = self._tails.get(key)
        return tail and tail.now

    def run(self, key):
        "The run of that name, to send commands to. Only runs that were found below the folder have one."
        for entry in self.entries:
            if entry.key == key: return Run(entry.run_dir)
        raise BadInput(f"run = {key!r}: there is no such run below {self.root}")

    def _work(self):
        while True:
            self._wake.wait(self.PERIOD)
            self._wake.clear()
            try:
                self.turn()
            except Exception:  # the thread serves everybody: it must not end with one run's surprise
                log.exception("looking below %s failed", self.root)

    def turn(self):
        "One round: list the runs now and then, look at those that are asked for, forget the others."
        now = time.monotonic()
        if now - self._last_asked < self.PATIENCE and (now - self._last_list > self.LIST_EVERY or self._unknown()):
            self.entries, self.problems = self._find()
            self._last_list, self.listed = now, True
        for key, asked in list(self._asked.items()):
            if now - asked > self.PATIENCE: self._forget(key)
            else: self._look(key)

    def _find(self): return find_runs(self.root, self._known)

    def _follow(self, entry): return Tail(entry.run_dir, entry.key)

    def _unknown(self):
        return any(key not in self._tails for key in list(self._asked))

    def _look(self, key):
        if key not in self._tails:
            found = [entry for entry in self.entries if entry.key == key]
            if not found: return
            self._tails[key] = self._follow(found[0])
        self._tails[key].look()

    def _forget(self, key):
        del self._asked[key]
        self._tails.pop(key, None)


def debiased(values, weight, state=(0.0, 0)):
    "Exponential moving average without the bias of its start; what is not finite is left out. Returns it and the state."
    average, count = state
    finite = np.isfinite(values)
    smooth = np.full(len(values), np.nan)
    if not finite.any(): return smooth, state
    raw, _ = lfilter([1 - weight], [1, -weight], values[finite], zi=[weight * average])
    seen = count + 1 + np.arange(len(raw))
    smooth[finite] = raw / (1 - weight ** seen)
    return smooth, (float(raw[-1]), int(seen[-1]))


def thin(loss, gradient_norm, limit):
    "Positions of at most `limit` rows that look like all of them: from each stretch both extremes, the largest gradient and the end."
    n = len(loss)
    if n <= limit: return np.arange(n)
    stride = math.ceil(4 * n / limit)
    firsts = np.arange(0, n, stride)
    low = _stretches(np.where(np.isfinite(loss), loss, np.inf), stride, np.inf).argmin(1)
    high = _stretches(np.where(np.isfinite(loss), loss, -np.inf), stride, -np.inf).argmax(1)
    steep = _stretches(np.where(np.isfinite(gradient_norm), gradient_norm, -np.inf), stride, -np.inf).argmax(1)
    ends = np.minimum(firsts + stride, n) - 1
    return np.unique(np.concatenate([firsts + low, firsts + high, firsts + steep, ends]))


def _stretches(values, stride, filling):
    "The values in lines of `stride`, the last one filled up."
    padded = np.full(math.ceil(len(values) / stride) * stride, filling)
    padded[:len(values)] = values
    return padded.reshape(-1, stride)


SHORT = {"learning_rate": "lr", "weight_decay": "wd"}


def short_number(value):
    "1e-3 for 0.001, 0.3 for 0.3."
    if not isinstance(value, (int, float)) or isinstance(value, bool): return str(value)
    if value == 0 or not math.isfinite(value) or 0.1 <= abs(value) < 1e5: return f"{value:.6g}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def short_setting(name, value):
    "lr attention 1e-3 for learning_rate.attention: 0.001."
    head, _, tail = name.partition(".")
    return " ".join(filter(None, [SHORT.get(head, head.replace("_", " ")), tail.replace("_", " "), short_number(value)]))


def differing(series):
    "Names of the settings that are not the same for all series."
    names = dict.fromkeys(name for one in series for name in one.settings)
    return [name for name in names if len({repr(one.settings.get(name)) for one in series}) > 1]


def lane_labels(series):
    "For each series what sets it apart from the others; its lane where nothing does."
    names = differing(series)
    labels = [" · ".join(short_setting(name, one.settings[name]) for name in names if name in one.settings) for one in series]
    alone = [label for label in labels if label and labels.count(label) == 1]
    return [label if label in alone else f"{label} · lane {one.lane}".removeprefix(" · ") for label, one in zip(labels, series)]


def last_finite(values):
    "The last value that is a number, or None."
    for value in values[::-1]:
        if math.isfinite(value): return float(value)
    return None
