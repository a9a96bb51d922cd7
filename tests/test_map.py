"Maps as a user meets them: processes, kills, workers that die, clusters that go away, disks that are full."
import errno
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import typer
from PIL import Image

from sdalab.boundary.mapping import DaskCrew, LocalCrew, Mapper, MapStopped, load_map
from sdalab.boundary.store import MapStore, open_map, read_manifest, status
from sdalab.map_commands import compute_map
from test_cli import sdalab, start

SMALL = ["landscape.train.model={depth: 1, width: 16, inner_width: 16, hidden_width: 16}", "landscape.train.steps=12", "landscape.train.rows=1",
         "landscape.train.window=16", "landscape.train.stressors=[]", "landscape.rule={name: lab}", "width=12", "height=10", "tile=4", "stride=4", "audit=10", "x.high=1e4", "y.high=10"]
QUICK = [word for change in SMALL for word in ("--set", change)]
SLOW = [*QUICK, "--set", "landscape.train.steps=60", "--set", "width=24", "--set", "height=24", "--exhaustive"]


def same(one, other) -> bool:
    "Whether two maps are the same to the bit."
    one, other = (m if hasattr(m, "data_vars") else open_map(m).load() for m in (one, other))
    return all(np.array_equal(one[name].values, other[name].values, equal_nan=True) for name in one.data_vars)


def wait_for_tiles(folder, n, timeout=120):
    "Until the manifest counts `n` tiles."
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if (folder / "manifest.json").exists() and sum(map(len, read_manifest(folder)["passes"])) >= n: return
        time.sleep(0.05)
    raise AssertionError(f"{folder} has no {n} tiles after {timeout} s")


def mapped(root, crew, **changes):
    "A finished map's folder, and what was said."
    said = []
    with crew, Mapper(load_map("edge-95k", SMALL, **changes), root, crew, say=said.append) as mapper: return mapper.run(), said


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The slow map, computed without interruption by one process; the command's output."
    folder = tmp_path_factory.mktemp("whole")
    code, out, err = sdalab(folder, "map", *SLOW, "--workers", "1", "--name", "slow")
    assert code == 0, err
    return folder, out, err


def test_a_map_its_pixels_and_the_list(whole):
    folder, out, err = whole
    assert "576 of 576" in out and "sdalab map --like slow --pixel" in out and "to compute if all are, in about" in err
    assert (folder / "maps/slow/map.png").stat().st_size > 10_000
    code, out, err = sdalab(folder, "map", "--name", "slow", "--pixel", "23", "5")
    assert code == 0 and "in the map: the same to the bit" in out, err
    losses = (folder / "maps/slow/pixels/23_5.csv").read_text().splitlines()
    assert len(losses) == 61
    code, out, err = sdalab(folder, "train", "maps/slow/pixels/23_5.yaml")
    assert code in (0, 4), err  # a diverged pixel is a diverged run
    from sdalab.journal.reader import Run
    row = Run(folder / "runs/slow-23-5").signals(["loss"]).loss.values[0]
    assert [float(line.split(",")[1]) for line in losses[1:]] == pytest.approx(row.tolist(), abs=0), "opened as a run, the pixel is the same run"
    assert "finished" in sdalab(folder, "maps", "list")[1] and "worked" in sdalab(folder, "maps", "show", "slow", "--png", "now.png")[1]
    assert (folder / "now.png").exists()
    code, _, err = sdalab(folder, "map", *SLOW, "--set", "seed=1", "--name", "slow")
    assert code == 2 and "seed = 1: the map 'slow' was begun with 0; take another --name" in err and len(err.strip().splitlines()) == 1
    assert sdalab(folder, "map", *SLOW, "--name", "slow")[0] == 0, "a finished map is shown again"


def test_two_workers_give_the_bits_of_one(whole, tmp_path):
    code, _, err = sdalab(tmp_path, "map", *SLOW, "--workers", "2", "--name", "slow")
    assert code == 0 and same(whole[0] / "maps/slow", tmp_path / "maps/slow"), err


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_kill_loses_only_tiles_in_flight(whole, tmp_path, workers):
    words = "map", *SLOW, "--name", "slow", "--workers", workers
    process, folder = start(tmp_path, *words), tmp_path / "maps/slow"
    wait_for_tiles(folder, 3)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGSTOP)  # it does not finish while the second command starts
    code, _, err = sdalab(tmp_path, *words)
    assert code == 3 and "in use by the live process" in err
    process.kill()
    process.communicate()
    before = read_manifest(folder)["passes"]
    assert status(folder) == "interrupted" and not psutil.wait_procs(children, timeout=20)[1], "workers end with the process"
    assert sdalab(tmp_path, *words)[0] == 0
    assert set(before[0]) <= set(read_manifest(folder)["passes"][0]) and same(whole[0] / "maps/slow", folder)


def test_interrupted_by_hand(tmp_path):
    process = start(tmp_path, "map", *SLOW, "--set", "landscape.train.steps=5000", "--name", "slow", "--workers", "2")  # hours: it is not done before the signal
    wait_for_tiles(tmp_path / "maps/slow", 2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "to go on: the same command" in out and "Traceback" not in err


def test_a_worker_that_dies(tmp_path):
    plain, _ = mapped(tmp_path, LocalCrew(1), name="plain", exhaustive=True)

    class Hit(LocalCrew):
        "Its second job's worker is killed."
        jobs = 0
        def submit(self, job):
            self.jobs += 1
            future = super().submit(job)
            if self.jobs == 2: os.kill(next(iter(self.pool._processes)), signal.SIGKILL)
            return future
    hit, said = mapped(tmp_path, Hit(2), name="hit", exhaustive=True)
    assert any("a worker died" in sentence for sentence in said) and same(plain, hit)


def test_on_a_dask_cluster_that_goes_away(tmp_path):
    from distributed import LocalCluster
    plain, _ = mapped(tmp_path, LocalCrew(2), name="plain")
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        assert same(plain, mapped(tmp_path, DaskCrew(cluster.scheduler_address), name="dask")[0])

        class Leaving(DaskCrew):
            "The cluster ends after three jobs."
            jobs = 0
            def submit(self, job):
                self.jobs += 1
                if self.jobs == 4: cluster.close()
                return super().submit(job)
        with pytest.raises(MapStopped, match="went away.*the same command goes on"):
            mapped(tmp_path, Leaving(cluster.scheduler_address), name="left")
    assert status(tmp_path / "left") == "interrupted" and same(plain, mapped(tmp_path, LocalCrew(1), name="left")[0])


def test_a_full_disk(tmp_path, monkeypatch, capsys):
    config, write = load_map("edge-95k", SMALL, name="full", exhaustive=True), MapStore.write

    def full(store, tiles, *names):
        if sum(map(len, store.manifest["passes"])) >= 2: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(store, tiles, *names)
    monkeypatch.setattr(MapStore, "write", full)
    monkeypatch.setattr(MapStore, "EVERY", 0.0)
    with pytest.raises(typer.Exit) as left: compute_map(config, tmp_path, 1, None)
    assert left.value.exit_code == 5 and len(read_manifest(tmp_path / "full")["passes"][0]) == 2
    monkeypatch.undo()
    assert status(compute_map(config, tmp_path, 1, None)) == "finished"
    said = capsys.readouterr().err
    assert "full: cannot be written (No space left on device); make room, and give the same command again: finished tiles are kept" in said.replace("\n", " ")


def test_a_zoom_follows_the_boundary_and_is_filmed(tmp_path):
    (tmp_path / "well.yaml").write_text("name: well\nlandscape: {name: double-well, steps: 100}\nx: {name: learning_rate, low: 0.5, high: 2.5}\n"
                                        "y: {name: start, low: 0.2, high: 2.6}\nwidth: 24\nheight: 24\ntile: 12\nstride: 4\n")
    words = "map", "well.yaml", "--workers", "1", "--follow", "2", "--film", "zoom.png"
    code, out, err = sdalab(tmp_path, *words)
    assert code == 0 and "film:    zoom.png" in out, err
    outer = read_manifest(tmp_path / "maps/well")["configuration"]
    for name in ("well.zoom0", "well.zoom0.zoom0"):
        inner = read_manifest(tmp_path / "maps" / name)["configuration"]
        for axis in "xy":
            assert outer[axis]["low"] <= inner[axis]["low"] and inner[axis]["high"] <= outer[axis]["high"]
            assert (inner[axis]["high"] - inner[axis]["low"]) * 4 == pytest.approx(outer[axis]["high"] - outer[axis]["low"])
        assert len(np.unique(open_map(tmp_path / "maps" / name).label)) == 2, "there is a boundary in every window"
        outer = inner
    with Image.open(tmp_path / "zoom.png") as film, Image.open(tmp_path / "maps/well/zoom.gif") as other: assert film.n_frames == other.n_frames == 25
    shutil.rmtree(tmp_path / "maps/well.zoom0.zoom0")  # as after a kill: the same command goes on
    before = (tmp_path / "maps/well.zoom0/map.zarr").stat().st_mtime_ns
    assert sdalab(tmp_path, *words)[0] == 0 and read_manifest(tmp_path / "maps/well.zoom0.zoom0")["configuration"] == outer
    assert (tmp_path / "maps/well.zoom0/map.zarr").stat().st_mtime_ns == before


@pytest.mark.parametrize("words, sentence", [
    (["--set", "x.low=20"], "x.low = 20.0: should be below high = 1.0"),
    (["--set", "x.low=1"], "x.low = 1.0: should be below high = 1.0"),
    (["--set", "width=1", "--set", "height=1"], "one pixel is a run, not a map"),
    (["--set", "x.center=0.01", "--set", "x.width=1e-16"], "units in the last place of float64 apart"),
    (["--set", "x.name=momentum"], "axis = 'momentum': adam ignores it; take sgd"),
    (["--set", "landscape.name=decodr"], "landscape.name = 'decodr': did you mean 'decoder'?"),
    (["--workers", "0"], "workers = 0: should be 1 or more"),
    (["--dask", "tcp://127.0.0.1:9"], "dask = 'tcp://127.0.0.1:9': no scheduler answers there"),
    (["--pixel", "64", "0"], "column = 64: the map has columns 0 to 63"),
    (["--follow", "0"], "follow = 0: should be 1 or more"),
    (["--follow", "30"], "follow = 30: the name of a window as deep"),
    (["--follow", "2", "--film", "zoom.mp4"], "film = 'zoom.mp4': should end in .gif or .png"),
    (["--film", "zoom.gif"], "film = 'zoom.gif': belongs to a zoom; add --follow N"),
    (["--png", "nowhere/map.png"], "png = 'nowhere/map.png': there is no folder 'nowhere'"),
    (["shakespeare"], "landscape.train.corpus: path = 'shakespeare.txt': cannot be read"),
    (["edge-59k"], "did you mean 'edge-95k'?"),
])
def test_bad_input_is_one_sentence_before_any_work(tmp_path, words, sentence):
    code, _, err = sdalab(tmp_path, "map", *words)
    assert code == 2 and sentence in err and "Traceback" not in err and len(err.strip().splitlines()) == 1, err
    assert not Path(tmp_path / "maps").exists()
