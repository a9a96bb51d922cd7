"""Following maps while they are computed: no science and no web framework, only the stores."""
import json
import math
import time
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import xarray as xr
import zarr

from sdalab.boundary.landscape import Axis
from sdalab.boundary.store import ARRAYS, Grid, blank, open_map, read_manifest, status
from sdalab.boundary.view import levels
from sdalab.views.following import Watch, last_write

BROKEN = ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError  # what a half-written or vanished store raises
MEMORY = 20.0  # seconds over which the rate is taken


@dataclass(frozen=True)
class MapEntry:
    "A map that can be chosen."
    key: str  # its folder's name
    folder: Path
    status: str
    x: Axis
    y: Axis
    size: tuple  # columns, rows
    landscape: str
    parent: str | None = None  # the map that it is a window of


@dataclass(frozen=True)
class MapMoment:
    "A map as it was at one look."
    key: str
    dataset: xr.Dataset | None = None
    manifest: dict = field(default_factory=dict)
    status: str = "unknown"
    computed: int = 0  # pixels
    expected: int = 0  # pixels to compute in all
    rate: float | None = None  # pixels a second
    painted: dict = field(default_factory=dict)  # colour -> `levels`
    problem: str | None = None  # why this is not up to date

    @property
    def left(self):
        "Seconds left, or None."
        return (self.expected - self.computed) / self.rate if self.rate and self.status == "running" else None


class MapTail:
    "Reads the tiles of one map that are new."
    def __init__(self, folder, key):
        self.folder, self.key = Path(folder), key
        self.now, self.wanted = None, {"class"}  # the last moment; colours that viewers asked for
        self._restart()

    def _restart(self):
        self._seen, self._finished, self._arrays, self._frame, self._past, self._place = set(), False, None, None, deque(), None

    def written(self): return last_write(self.folder / "manifest.json")

    def look(self):
        "Reads on and publishes a new moment; a problem is published with the last data."
        try:
            self.now = self._read()
        except BROKEN as problem:
            self.now = replace(self.now or MapMoment(self.key), problem=one_line(problem))

    def _read(self):
        state, manifest = status(self.folder), read_manifest(self.folder)
        tiles = {(number, tile) for number, done in enumerate(manifest["passes"]) for tile in done}
        place = (self.folder / "map.zarr").stat().st_ino
        if not self._seen <= tiles or place != self._place or (self.now and self.now.manifest.get("configuration") != manifest["configuration"]): self._restart()
        if self._frame is None: self._begin(manifest)
        self._place = place
        whole = manifest["finished"] and not self._finished
        changed = self._take({tile for _, tile in tiles - self._seen}, whole)
        self._seen, self._finished = tiles, manifest["finished"]
        before = self.now if self.now and not changed and self.now.dataset is not None else None
        dataset = before.dataset if before else self._frame.assign({name: (("y", "x"), values) for name, values in self._arrays.items()})
        painted = {colour: before.painted[colour] if before and colour in before.painted else levels(dataset, colour) for colour in self.wanted}
        computed = int((self._arrays["source"] > 0).sum())
        return MapMoment(self.key, dataset, manifest, state, computed, max(computed, manifest.get("expected", self._arrays["label"].size)), self._rate(computed), painted)

    def _begin(self, manifest):
        "The axes, and a picture that knows nothing yet."
        config, stored = manifest["configuration"], open_map(self.folder)
        self._grid = Grid(config["height"], config["width"], config["tile"])
        if (stored.sizes["y"], stored.sizes["x"]) != self._grid[:2]: raise ValueError("its arrays have another size than its manifest says")
        self._frame, self._arrays = stored[["x", "y"]].load(), blank(self._grid[:2])

    def _take(self, tiles, whole):
        "Reads these tiles, or all of them; whether there were any."
        if not tiles and not whole: return False
        group, arrays = zarr.open_group(self.folder / "map.zarr", mode="r"), {name: values.copy() for name, values in self._arrays.items()}
        for name in ARRAYS:
            places = [(slice(None), slice(None))] if whole or len(tiles) > self._grid.tiles / 2 else map(self._grid.place, tiles)
            for place in places: arrays[name][place] = group[name][place]
        self._arrays = arrays
        return True

    def _rate(self, computed):
        now = time.monotonic()
        self._past.append((now, computed))
        while now - self._past[0][0] > MEMORY: self._past.popleft()
        (began, first), (ended, last) = self._past[0], self._past[-1]
        return (last - first) / (ended - began) if last > first else None


def one_line(problem):
    "An exception as a sentence."
    words = " ".join(str(problem).split()) or type(problem).__name__
    return words if len(words) <= 300 else words[:299] + "…"


def find_maps(root, known):
    "The maps in a folder, those being computed first and then newest first, and a sentence for each that cannot be read."
    entries, problems = {}, []
    for path in sorted(Path(root).glob("*/manifest.json")):
        try:
            stat = path.stat()
            stamp = path.parent.name, stat.st_mtime_ns
            if known.get(path.parent.name, (None,))[0] != stamp: known[path.parent.name] = stamp, entry_of(path)
            entries[path.parent.name] = replace(known[path.parent.name][1], status=status(path.parent)), stat.st_mtime
        except BROKEN as problem:
            problems.append(f"{path.parent.name} ({one_line(problem)})")
    found = [entry for entry, _ in sorted(entries.values(), key=lambda one: (one[0].status == "running", one[1]), reverse=True)]
    return [replace(entry, parent=parent_of(entry, found)) for entry in found], problems


def entry_of(path):
    "What a manifest says of its map."
    config = json.loads(path.read_text())["configuration"]
    size = int(config["width"]), int(config["height"])
    return MapEntry(path.parent.name, path.parent, "unknown", Axis(**config["x"]), Axis(**config["y"]), size, str(config["landscape"]["name"]))


def parent_of(entry, entries):
    "A map named `a.b.1` is a window of `a.b`, if there is such a map and the window lies in it."
    above = {one.key: one for one in entries}.get(entry.key.rpartition(".")[0])
    return above.key if above and all(lies_in(getattr(entry, name), getattr(above, name)) for name in "xy") else None


def lies_in(inner, outer):
    "Whether an axis is a part of another."
    slack = 1e-9 * (outer.high - outer.low)
    return (inner.name, inner.scale) == (outer.name, outer.scale) and outer.low - slack <= inner.low and inner.high <= outer.high + slack


class MapWatch(Watch):
    "Follows the maps of one folder for all viewers."
    WHAT = "map"
    def find(self): return find_maps(self.root, self._known)
    def tail(self, entry): return MapTail(entry.folder, entry.key)

    def trail(self, key):
        "A map and those that it is a window of, the widest first."
        parents, names = {entry.key: entry.parent for entry in self.entries}, [key]
        while above := parents.get(names[0], names[0].rpartition(".")[0] if names[0] not in parents else None):
            if above not in parents: break
            names.insert(0, above)
        return names


def curve_of(folder, column, row):
    "The losses of a pixel that was run alone, or None."
    path = Path(folder) / "pixels" / f"{column}_{row}.csv"
    try: return np.loadtxt(path, delimiter=",", skiprows=1, usecols=1, ndmin=1, converters=lambda word: float(word) if word else math.nan)
    except BROKEN: return None


def beside(column, row, size):
    "The four pixels beside one: where, and which."
    near = {"left": (column - 1, row), "right": (column + 1, row), "below": (column, row - 1), "above": (column, row + 1)}
    return {side: (i, j) for side, (i, j) in near.items() if 0 <= i < size[0] and 0 <= j < size[1]}
