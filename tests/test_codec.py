"Checkpoint files that are damaged, forged, cut off, or cannot be written."
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
import zstandard
from xxhash import xxh3_128_digest, xxh3_128_hexdigest

from sdalab.checked import BadInput
from sdalab.checkpoints.codec import CHUNK, MAGIC, PREAMBLE, VERSION, BadCheckpoint, Checkpoint, sweep, write_checkpoint

FLIPS = 10_000 if os.environ.get("SDALAB_SOAK") else 500
COMPACT = {"first": "signed", "second": "squared"}


def state(seed=0, n=5000):
    "Tensors of every kind that a state holds, compressible like trained ones."
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(2, n, generator=generator) * 0.05
    return dict(parameters=normal, first=normal * 1e-3, second=(normal * 1e-3).square(), step=torch.tensor(7), flags=torch.tensor([True, False]), none=torch.zeros(0, 3))


@pytest.fixture
def whole(tmp_path):
    path = tmp_path / "cp_7.ptz"
    write_checkpoint(path, dict(run="r", step=7), state(), COMPACT)
    return path


def refused(path):
    "The sentence with which a file is refused; an AssertionError where it is not."
    with pytest.raises(BadCheckpoint) as caught:
        Checkpoint(path).verify()
    sentence = str(caught.value)
    assert str(path) in sentence and "\n" not in sentence
    return sentence


def test_every_flip_and_cut_is_seen(whole, tmp_path):
    content, draw, damaged = whole.read_bytes(), random.Random(0), tmp_path / "damaged.ptz"
    named = 0
    for _ in range(FLIPS):
        bad = bytearray(content)
        kind = draw.random()
        if kind < 0.6: bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        elif kind < 0.8:
            start = draw.randrange(len(bad))
            bad[start:start + draw.randrange(1, 64)] = draw.randbytes(draw.randrange(1, 64))
        elif kind < 0.95: del bad[draw.randrange(len(bad)):]
        else: bad += draw.randbytes(draw.randrange(1, 64))
        if bytes(bad) == content: continue
        damaged.write_bytes(bad)
        named += any(f": {name}: " in refused(damaged) for name in state())
    assert named > FLIPS / 4, "where a tensor is damaged, the sentence names it"


@pytest.mark.parametrize("content, words", [
    (b"", "is empty"),
    (b"PK\x03\x04" + bytes(100), "no pickle is opened here"),
    (pickle.dumps({"a": 1}), "a pickle; no pickle is opened here"),
    (b"\x1f\x8b" + bytes(50), "gzip"),
    (MAGIC, "is cut off or damaged"),
    (MAGIC + (VERSION + 1).to_bytes(4, "little") + bytes(60), "upgrade sdalab"),
    (b"step,loss\n1,2\n", "something else"),
])
def test_what_is_no_checkpoint(tmp_path, content, words):
    path = tmp_path / "cp_1.ptz"
    path.write_bytes(content)
    assert words in refused(path)


def test_a_pytorch_file_under_our_name(tmp_path):
    path = tmp_path / "cp_1.ptz"
    torch.save(state(), path)
    assert zipfile.is_zipfile(path) and "no pickle is opened here" in refused(path)


def forge(path, header, body=b""):
    "A file whose preamble and hashes are right, whatever the header says."
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    place = PREAMBLE + len(body)
    path.write_bytes(MAGIC + VERSION.to_bytes(4, "little") + place.to_bytes(8, "little") + len(text).to_bytes(8, "little") + xxh3_128_digest(text) + body + text)
    return path


def entry(shape, nbytes, chunks, width=4, dtype="float32", codec="exact"):
    return dict(kind="exact", tensors=dict(w=dict(dtype=dtype, shape=shape, codec=codec, streams=[[width, nbytes, chunks, "0" * 32]])))


BOMB = zstandard.ZstdCompressor().compress(bytes(64 << 20))


@pytest.mark.parametrize("header, body, words", [
    (b"not json", b"", "is not JSON"),
    (b"[" * 100_000 + b"]" * 100_000, b"", "is not JSON"),
    ([1], b"", "names no kind"),
    (dict(kind="exact"), b"", "names no kind"),
    (dict(kind="half", tensors={}), b"", "names no kind"),
    (entry([-4], 16, []), b"", "w: its entry in the header makes no sense"),
    (entry([2**62, 2**62], 16, []), b"", "makes no sense"),
    (entry(["a"], 16, []), b"", "makes no sense"),
    (entry(4, 16, []), b"", "makes no sense"),
    (entry([4], 16, []), b"", "number of chunks"),
    (entry([4], 17, [[[8, 4, 4], "0" * 32]]), b"", "sizes that do not fit the shape"),
    (entry([4], 16, [[[8, 4], "0" * 32]]), b"", "planes longer"),
    (entry([4], 16, [[[8, 4, 10**9], "0" * 32]]), b"", "planes longer"),
    (entry([4], 16, [[[8, 4, True], "0" * 32]]), b"", "planes longer"),
    (entry([4], 16, [[[8, 4, 4], 5]]), b"", "no hashes"),
    (entry([4], 16, [[[8, 4, 4], "0" * 32]], dtype="complex64"), b"", "makes no sense"),
    (entry([4], 16, [[[8, 4, 4], "0" * 32]], codec="zip"), b"", "sizes that do not fit"),
    (entry([4], 16, [[[8, 4, 4], "0" * 32]]), b"", "should end at byte"),
    (entry([4], 16, [[[8, 4, 4], "0" * 32]]), bytes(16), "w: chunk 0 is damaged"),
    (entry([4], 16, [[[8, 4, 4], xxh3_128_hexdigest(bytes(16))]]), bytes(16), "w: is not what was written"),
    (entry([CHUNK // 4], CHUNK, [[[len(BOMB)] * 3, xxh3_128_hexdigest(BOMB * 3)]]), BOMB * 3, "a frame of another size"),
    (entry([4096], 16384, [[[9] * 3, xxh3_128_hexdigest(bytes(27))]]), bytes(27), "cannot be unpacked"),
])
def test_forged_headers(tmp_path, header, body, words):
    assert words in refused(forge(tmp_path / "cp_1.ptz", header, body))


def test_an_absurd_size_is_refused_before_memory_is_taken(tmp_path):
    frame = zstandard.ZstdCompressor().compress(bytes(CHUNK // 4))
    low = zstandard.ZstdCompressor().compress(bytes(CHUNK // 2))
    stored = low + 2 * frame
    chunks = 2 * psutil.virtual_memory().total // CHUNK
    fact = [[len(low), len(frame), len(frame)], xxh3_128_hexdigest(stored)]
    header = entry([chunks * CHUNK // 4], chunks * CHUNK, [fact] * chunks)
    path = forge(tmp_path / "cp_1.ptz", header, stored * chunks)
    before = psutil.Process().memory_info().rss
    assert "this machine has" in refused(path)
    assert psutil.Process().memory_info().rss - before < 200 << 20
    place = (1 << 60).to_bytes(8, "little")
    path.write_bytes(MAGIC + VERSION.to_bytes(4, "little") + (PREAMBLE).to_bytes(8, "little") + place + bytes(16))
    assert "cut off or damaged" in refused(path)


def test_only_what_is_asked_for_is_read(whole):
    content = bytearray(whole.read_bytes())
    at = content.index(zstandard.FRAME_HEADER)  # the first frame is of the parameters
    content[at + 20] ^= 1
    whole.write_bytes(content)
    file = Checkpoint(whole)
    assert torch.equal(file.tensor("step"), torch.tensor(7)) and file.tensors(["flags", "none"]).keys() == {"flags", "none"}
    with pytest.raises(BadCheckpoint, match="parameters: chunk 0 is damaged"): file.tensor("parameters")


def test_rows_across_chunks(tmp_path):
    wide = torch.randn(7, CHUNK // 4 - 1000)
    write_checkpoint(tmp_path / "cp_1.ptz", {}, dict(wide=wide))
    file = Checkpoint(tmp_path / "cp_1.ptz")
    assert all(torch.equal(file.tensor("wide", row=i), wide[i]) for i in range(7))


def test_files_are_not_held_open(whole):
    before = psutil.Process().num_fds()
    kept = [Checkpoint(whole) for _ in range(50)]
    assert all(len(file.names) == 6 for file in kept) and psutil.Process().num_fds() == before


def test_a_full_disk_leaves_what_was_there(whole, tmp_path):
    content = whole.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError): write_checkpoint(whole, {}, state(1, n=100_000), overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert whole.read_bytes() == content and [p.name for p in tmp_path.iterdir()] == ["cp_7.ptz"]


def test_a_kill_while_writing_leaves_the_old_file_or_the_new(tmp_path):
    path, code = tmp_path / "cp_1.ptz", """
import sys, torch
from sdalab.checkpoints.codec import write_checkpoint
for i in range(10_000):
    write_checkpoint(sys.argv[1], dict(i=i), dict(w=torch.full((300_000,), float(i)), v=torch.randn(300_000)), overwrite=True)
    if i == 0: print('ready', flush=True)
"""
    draw = random.Random(1)
    for _ in range(30 if os.environ.get("SDALAB_SOAK") else 4):
        writer = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True)
        assert writer.stdout.readline() == "ready\n"
        time.sleep(draw.uniform(0.05, 0.4))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        file = Checkpoint(path)
        file.verify()
        assert (file.tensor("w") == file.header["i"]).all()
        sweep(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["cp_1.ptz"]


def test_a_compact_file_says_so_and_is_close(whole):
    file = Checkpoint(whole)
    exact = state()
    assert file.kind == "compact" and file.entry("first")["codec"] == "signed" and file.entry("step")["codec"] == "exact"
    assert torch.equal(file.tensor("parameters"), exact["parameters"])
    for name in COMPACT: assert (file.tensor(name) - exact[name]).norm() < 0.03 * exact[name].norm()
    assert torch.equal(file.tensor("first", row=1), file.tensor("first")[1])


def test_headers_that_nobody_could_have_written(tmp_path):
    path, none = tmp_path / "cp_1.ptz", xxh3_128_hexdigest(b"")
    for header in (entry([4], 16.0, [[[8, 4, 4], "0" * 32]]), entry([2**61, 2**61, 0], 0, []), entry([2**61] * 100_000, 0, []), entry([1] * 65, 4, [[[1] * 4, "0" * 32]])):
        begun = time.perf_counter()
        assert "makes no sense" in refused(forge(path, header, bytes(16))) and time.perf_counter() - begun < 2
    twice = '"w": {"dtype": "float32", "shape": [0], "codec": "exact", "streams": [[4, 0, [], "%s"]]}' % none
    assert "occurs twice" in refused(forge(path, ('{"kind": "exact", "tensors": {%s, %s}}' % (twice, twice)).encode()))
    codes, scales = b"\xff" * 4096, bytes(64)
    streams = [[1, 4096, [[[4096], xxh3_128_hexdigest(codes)]], xxh3_128_hexdigest(codes)], [4, 64, [[[32, 16, 16], xxh3_128_hexdigest(scales)]], xxh3_128_hexdigest(scales)]]
    header = dict(kind="compact", tensors=dict(w=dict(dtype="float32", shape=[4096], codec="squared", streams=streams)))
    assert "w: holds a code that stands for nothing" in refused(forge(path, header, codes + scales))


def test_what_is_not_even_a_file(tmp_path):
    assert "is not a file" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "is not a file" in refused(tmp_path / "pipe")


@pytest.mark.parametrize("header, compact, words", [
    (dict(kind="mine"), {}, "header.kind: is a key of the file's own"),
    ({}, dict(first="signd"), "compact.first = 'signd'"),
    ({}, dict(step="signed"), "step: is to be compact, but torch.int64"),
])
def test_requests_that_are_refused(tmp_path, header, compact, words):
    with pytest.raises(BadInput, match=words): write_checkpoint(tmp_path / "cp_1.ptz", header, state(n=3), compact)
    assert not list(tmp_path.iterdir())


def test_a_header_without_end_is_refused(tmp_path):
    ring = []
    ring.append(ring)
    with pytest.raises(BadInput, match="plain JSON"): write_checkpoint(tmp_path / "cp_1.ptz", dict(ring=ring), {})


def test_the_hash_tells_scaled_moments_apart(tmp_path):
    first = state()["first"]
    for i in (1, 2): write_checkpoint(tmp_path / f"cp_{i}.ptz", {}, dict(first=i * first), dict(first="signed"))
    one, two = (Checkpoint(tmp_path / f"cp_{i}.ptz") for i in (1, 2))
    assert torch.equal(one.tensor("first") * 2, two.tensor("first")) and one.entry("first")["hash"] != two.entry("first")["hash"]


def test_two_threads_may_write_one_name(tmp_path):
    path = tmp_path / "cp_1.ptz"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: write_checkpoint(path, dict(i=i), dict(w=torch.full((300_000,), float(i))), overwrite=True), range(20)))
    file = Checkpoint(path)
    assert (file.tensor("w") == file.header["i"]).all() and list(tmp_path.iterdir()) == [path]
