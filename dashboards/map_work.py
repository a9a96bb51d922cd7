"""Worker processes that a page of maps starts: every word of their command lines is a checked name or a number."""
import atexit
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

from map_tail import one_line
from sdalab.checked import BadInput

NAME = re.compile(r"\w[\w.-]{0,94}")  # what `sdalab map` takes as a name, with room for a window's number
GRACE = 10.0  # seconds that a worker has to end when it is asked to


class Job:
    "One or more commands of the lab, one after another, in processes of their own."

    def __init__(self, kind, key, commands, stays=False):
        self.kind, self.key, self.commands, self.stays = kind, key, commands, stays
        self.state, self.said, self.told = "running", "", ""  # running, done, failed or cancelled; the last sentence on either stream
        self._process, self._lock = None, threading.Lock()
        self._thread = threading.Thread(target=self._work, name=f"{kind} {key}", daemon=True)
        self._thread.start()

    def _work(self):
        try: code = next((code for code in map(self._run, self.commands) if code), 0)
        except OSError as problem: code, self.said = 1, one_line(problem)
        with self._lock:
            if self.state == "running": self.state = "done" if code == 0 else "failed"

    def _run(self, words):
        "One command to its end: its exit code."
        with self._lock:
            if self.state != "running": return 1
            self._process = subprocess.Popen([sys.executable, "-m", "sdalab.cli", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                             text=True, errors="replace", env=os.environ | {"COLUMNS": "1000"}, start_new_session=True)
        streams = [threading.Thread(target=self._hear, args=one, daemon=True) for one in ((self._process.stderr, "said"), (self._process.stdout, "told"))]
        for stream in streams: stream.start()
        code = self._process.wait()
        for stream in streams: stream.join(GRACE)
        return code

    def _hear(self, stream, name):
        "Keeps the last lines of a stream."
        kept = deque(maxlen=40)
        for line in stream:
            if not line.strip(): continue
            kept.append(line.strip())
            setattr(self, name, one_line(kept[-1].removeprefix("sdalab: ")) if name == "said" else "\n".join(kept))

    @property
    def alive(self):
        "Whether it is at work, or still ending."
        return self._thread.is_alive()

    def cancel(self):
        "Asks its process to end as Ctrl-C would, and after a while makes it."
        with self._lock:
            if self.state == "running": self.state = "cancelled"
            process = self._process
        if process is None or process.poll() is not None: return
        self._signal(process, signal.SIGINT)
        late = threading.Timer(GRACE, lambda: process.poll() is None and self._signal(process, signal.SIGKILL, group=True))
        late.daemon = True
        late.start()

    def end(self):
        "Ends at once, with the server."
        if not self.stays and self._process is not None and self._process.poll() is None: self._signal(self._process, signal.SIGTERM, group=True)

    def _signal(self, process, number, group=False):
        try: (os.killpg if group else os.kill)(process.pid, number)
        except ProcessLookupError: pass


class Workers:
    "The jobs of one server: one map at a time, one pixel at a time, and runs."

    def __init__(self, watch, runs):
        self.watch, self.runs, self.map, self.pixel, self.trained = watch, Path(runs).absolute(), None, None, {}
        atexit.register(self.close)

    def window(self, parent, x, y, width, height, workers):
        "Begins a map of a window of another; its name. Raises `BadInput` for what cannot be one."
        entry = self._entry(parent)
        self._free()
        number = next(n for n in range(1, 10_000) if not (entry.folder.parent / f"{entry.key}.{n}").exists())
        key, words = f"{entry.key}.{number}", []
        if len(key) > 100: raise BadInput(f"map = {key!r}: the name of a window this deep is too long; begin anew from a map of a shorter name")
        for name, axis, outer in ("x", x, entry.x), ("y", y, entry.y):
            if axis.name != outer.name: raise BadInput(f"{name}.name = {axis.name!r}: the map has {outer.name!r}; draw the box again")
            words += ["--set", f"{name}.low={number_of(axis.low)}", "--set", f"{name}.high={number_of(axis.high)}"]
        for name, value in ("width", width), ("height", height):
            if not 2 <= value <= 4096: raise BadInput(f"{name} = {value}: should be 2 to 4096 pixels")
            words += ["--set", f"{name}={int(value)}"]
        self._compute(key, ["map", f"--like={entry.key}", f"--name={key}", *words], workers)
        return key

    def go_on(self, key, workers):
        "Goes on with a map that was interrupted."
        self._free()
        self._compute(key, ["map", f"--like={self._entry(key).key}"], workers)

    def _compute(self, key, words, workers):
        self.map = Job("map", key, [[*words, f"--workers={max(1, min(int(workers), os.cpu_count()))}", self._maps]])

    def look_at(self, key, column, row):
        "Runs one pixel alone, then those beside it; an earlier pixel's work is given up."
        words = self._pixel(key, column, row)
        if self.pixel: self.pixel.cancel()
        self.pixel = Job("pixel", (key, column, row), [[*words, "--neighbours"]])

    def train(self, key, column, row):
        "Trains a pixel as a run of the lab; its name."
        name, words = f"{key}-{column}-{row}", self._pixel(key, column, row)
        if name in self.trained and self.trained[name].state == "running": return name
        if self.journal(name).exists(): raise BadInput(f"run = {name!r}: is there already; watch it, or delete it with: sdalab runs delete")
        settings = self._entry(key).folder / "pixels" / f"{column}_{row}.yaml"
        self.trained[name] = Job("run", name, [words, ["train", str(settings), f"--runs={self.runs}"]], stays=True)
        return name

    def journal(self, name): return self.runs / name / "journal.db"

    def _pixel(self, key, column, row):
        entry = self._entry(key)
        if not (0 <= column < entry.size[0] and 0 <= row < entry.size[1]): raise BadInput(f"pixel = {column}, {row}: the map has {entry.size[0]} columns and {entry.size[1]} rows")
        return ["map", f"--like={entry.key}", "--pixel", str(int(column)), str(int(row)), self._maps]

    def _entry(self, key):
        entry = self.watch.entry(key)
        if not NAME.fullmatch(entry.key): raise BadInput(f"map = {entry.key!r}: nothing can be computed from a map of this name; rename its folder to letters, digits, '_', '-' and '.'")
        return entry

    @property
    def _maps(self): return f"--maps={self.watch.root}"

    def _free(self):
        if self.map and self.map.alive: raise BadInput(f"map = {self.map.key!r}: is being computed; wait for it, or cancel it")

    def close(self):
        "Ends what does not outlive the server."
        for job in (self.map, self.pixel):
            if job: job.end()


def number_of(value):
    "A finite number, to the last digit."
    if not math.isfinite(value): raise BadInput(f"window = {value!r}: should be a finite number; draw the box again")
    return repr(float(value))
