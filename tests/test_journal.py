"The journal under fire: kills, full disks, second writers, strangers' files, commands between processes."
import json, os, random, signal, sqlite3, subprocess, sys, textwrap, time
from pathlib import Path
import numpy as np
import pytest
from sdalab.checked import BadInput
from sdalab.journal.export import export, export_all
from sdalab.journal.reader import Run, delete_run, runs
from sdalab.journal.schema import SCHEMA_VERSION, hold, is_held, signal_columns
from sdalab.journal.writer import PACK, Journal, JournalError, RunInUse

WRITER = """
    import sys, time
    from pathlib import Path
    from sdalab.journal.writer import Journal
    run, pace = Path(sys.argv[1]), float(sys.argv[2])
    journal = Journal.open(run) if (run/'journal.db').exists() else Journal.create(run, {}, {})
    nodes = [journal.node(lane) for lane in range(4)]
    step = 0
    while True:
        journal.steps(step, nodes, {'loss': [step + lane / 8 for lane in range(4)], 'tokens': [step] * 4})
        if step % 50 == 49:
            journal.flush()
            print(nodes[0], step, flush=True)
        for command in journal.pending():
            if command.kind == 'decide': journal.answer(command, 'refused', 'this run takes no decisions')
            else: journal.answer(command, 'done')
            if command.kind == 'stop': journal.close(); sys.exit()
        step += 1
        time.sleep(pace)
"""

def start_writer(run, pace=0.0):
    code = textwrap.dedent(WRITER)
    return subprocess.Popen([sys.executable, '-c', code, str(run), str(pace)], stdout=subprocess.PIPE, text=True)

def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.02)

def integrity(run):
    db = sqlite3.connect(Path(run)/'journal.db')
    try: return db.execute('PRAGMA integrity_check').fetchone()[0]
    finally: db.close()

@pytest.fixture
def writer(tmp_path):
    "A writer process that has acknowledged something; killed at the end."
    process = start_writer(tmp_path/'run', pace=0.005)
    process.stdout.readline()
    yield process
    process.kill(); process.wait(); process.stdout.close()

@pytest.fixture
def journal(tmp_path):
    journal = Journal.create(tmp_path/'run', {'preset': 'edge-95k'}, {'cores': 2})
    yield journal
    journal.close()

# kills

def test_kill_at_any_moment_loses_nothing_acknowledged(tmp_path):
    run, chance, acknowledged = tmp_path/'run', random.Random(0), {}
    for _ in range(6):
        process = start_writer(run)
        first = process.stdout.readline()
        time.sleep(chance.uniform(0, 0.5))
        process.kill()
        lines = [first, *process.communicate()[0].splitlines()]
        acknowledged.update(map(int, line.split()) for line in lines if len(line.split()) == 2)
        assert integrity(run) == 'ok'
        assert Run(run).status() == 'killed'
        loss = Run(run).signals(['loss']).loss
        for node, last in acknowledged.items():
            for lane in range(4):
                got = loss.sel(node=node + lane, step=slice(0, last)).values
                np.testing.assert_array_equal(got, np.arange(last + 1) + lane / 8)
    assert len(acknowledged) == 6
    Journal.open(run).close()
    assert Run(run).status() == 'finished'

def test_kill_while_creating_leaves_no_half_journal(tmp_path):
    run = tmp_path/'run'
    run.mkdir()
    (run/'journal.db.draft').write_bytes(b'half')
    Journal.create(run, {}, {}).close()
    assert Run(run).status() == 'finished' and not (run/'journal.db.draft').exists()

def test_a_killed_run_continues_where_it_was(tmp_path, writer):
    writer.kill(); writer.wait()
    with Journal.open(tmp_path/'run') as journal:
        last = int(Run(tmp_path/'run').signals(['loss'], nodes=[1]).step[-1])
        with pytest.raises(BadInput, match=f'node 1 already has step {last}'): journal.steps(last, [1], {'loss': [0.]})
        journal.steps(last + 1, [1], {'loss': [-1.]})
    assert Run(tmp_path/'run').signals(['loss'], nodes=[1]).loss.sel(step=last + 1) == -1

# one writer

def test_a_run_in_use_by_a_live_process_is_refused(tmp_path, writer):
    assert Run(tmp_path/'run').status() == 'running'
    with pytest.raises(RunInUse, match=f'in use by the live process {writer.pid}'): Journal.open(tmp_path/'run')
    with pytest.raises(RunInUse, match='in use'): Journal.create(tmp_path/'run', {}, {})
    with pytest.raises(RunInUse, match='in use'): delete_run(tmp_path/'run')
    assert (tmp_path/'run'/'journal.db').exists() and writer.poll() is None

def test_two_writers_in_one_process(tmp_path, journal):
    with pytest.raises(RunInUse): Journal.open(tmp_path/'run')
    node = journal.node(0)
    journal.steps(0, [node], {'loss': [1.]}) # the first is unharmed
    journal.flush()
    assert Run(tmp_path/'run').signals(['loss']).loss.item() == 1

def test_an_existing_journal_is_not_overwritten(tmp_path, journal):
    journal.close()
    with pytest.raises(BadInput, match='resume it, delete it, or choose another name'): Journal.create(tmp_path/'run', {}, {})
    assert not is_held(tmp_path/'run')
    delete_run(tmp_path/'run')
    assert not (tmp_path/'run').exists()

def test_a_reader_asking_for_the_status_never_turns_a_writer_away(tmp_path):
    Journal.create(tmp_path/'run', {}, {}).close()
    probe = subprocess.Popen([sys.executable, '-c', 'import sys; from sdalab.journal.schema import is_held\nwhile True: is_held(sys.argv[1])',
                              str(tmp_path/'run')])
    try:
        for _ in range(50): os.close(hold(tmp_path/'run'))
        assert probe.poll() is None, 'the reader was asking all the while'
    finally: probe.kill(); probe.wait()

def test_a_forked_child_neither_writes_nor_keeps_the_lock(tmp_path):
    code = """
        import os, sys, time
        from sdalab.journal.writer import Journal, JournalError
        journal = Journal.create(sys.argv[1], {}, {})
        node = journal.node(0)
        if os.fork() == 0:
            try: journal.steps(0, [node], {'loss': [1.]})
            except JournalError as problem: print(problem, flush=True)
            time.sleep(60)
        time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, '-c', textwrap.dedent(code), str(tmp_path/'run')], stdout=subprocess.PIPE,
                               text=True, start_new_session=True)
    try:
        assert 'not to its forked child' in process.stdout.readline()
        assert is_held(tmp_path/'run')
        process.kill(); process.wait()
        assert not is_held(tmp_path/'run') # although the child lives on
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()

# a full disk

def fill_up(journal, node, steps, first=0):
    for step in range(first, first + steps): journal.steps(step, [node], {name: [step / 7] for name in signal_columns('signals')})

def limit_size(journal, pages):
    with journal._using_db: return journal._disk.db.execute(f'PRAGMA max_page_count = {pages}').fetchone()[0]

def test_a_full_database_is_waited_out_and_nothing_is_lost(tmp_path, journal):
    node = journal.node(0)
    fill_up(journal, node, 10)
    journal.flush()
    limit_size(journal, 1) # SQLite takes the present size as the limit
    fill_up(journal, node, 2000, first=10)
    wait_for(lambda: journal.trouble)
    assert 'full' in journal.trouble and Run(tmp_path/'run').signals(['loss']).sizes['step'] >= 10
    limit_size(journal, 10**9)
    journal.flush()
    assert journal.trouble is None
    loss = Run(tmp_path/'run').signals(['loss']).loss
    np.testing.assert_array_equal(loss[0], np.arange(2010) / 7)
    assert integrity(tmp_path/'run') == 'ok'

def test_a_disk_that_stays_full_ends_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(Journal, 'limit', 200)
    monkeypatch.setattr(Journal, 'patience', 0.5)
    journal = Journal.create(tmp_path/'run', {}, {})
    node = journal.node(0)
    fill_up(journal, node, 10)
    journal.flush()
    limit_size(journal, 1)
    with pytest.raises(JournalError, match='could not write for 0.5 s, 2.. rows are waiting: .*full'): fill_up(journal, node, 5000, first=10)
    assert journal._buffer.rows <= 201 # bounded
    with pytest.raises(JournalError, match='rows are waiting: .*full'): journal.flush()
    with pytest.raises(JournalError, match='closed with 2.. rows unwritten: .*full'): journal.close()
    assert not is_held(tmp_path/'run')
    assert Run(tmp_path/'run').signals(['loss']).sizes['step'] >= 10 and integrity(tmp_path/'run') == 'ok'

@pytest.fixture
def small_disk(tmp_path):
    "A real file system of 2 MB; mounting one needs root, elsewhere the page limit above has to do."
    disk = tmp_path/'disk'
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', str(disk)], capture_output=True).returncode:
        pytest.skip('mounting a small file system needs root; the page-limit tests cover the full disk')
    yield disk
    subprocess.run(['umount', '-l', str(disk)], check=True)

def test_a_full_file_system(small_disk):
    ballast = small_disk/'ballast'
    with Journal.create(small_disk/'run', {}, {}) as journal:
        node = journal.node(0)
        fill_up(journal, node, 100)
        journal.flush()
        with open(ballast, 'wb', buffering=0) as file:
            with pytest.raises(OSError):
                while True: file.write(bytes(4096))
        fill_up(journal, node, 3000, first=100)
        wait_for(lambda: journal.trouble)
        assert Run(small_disk/'run').signals(['loss']).sizes['step'] >= 100 # readers go on
        ballast.unlink()
        journal.flush()
        loss = Run(small_disk/'run').signals(['loss']).loss
        np.testing.assert_array_equal(loss[0], np.arange(3100) / 7)
    assert integrity(small_disk/'run') == 'ok'

# bad input

def set_version(run, version):
    db = sqlite3.connect(Path(run)/'journal.db')
    db.execute(f'PRAGMA user_version = {version}')
    db.close()

def test_a_journal_from_a_newer_version_is_refused(tmp_path, journal):
    journal.close()
    set_version(tmp_path/'run', SCHEMA_VERSION + 1)
    for opening in (Journal.open, Run, delete_run):
        with pytest.raises(BadInput, match=f'schema version {SCHEMA_VERSION + 1}, this sdalab knows up to {SCHEMA_VERSION}'):
            opening(tmp_path/'run')
    assert not is_held(tmp_path/'run')

def test_a_column_that_an_older_journal_lacks_reads_as_nan_and_is_added(tmp_path, journal):
    node = journal.node(0)
    journal.steps(0, [node], {'loss': [1.]})
    journal.close()
    db = sqlite3.connect(tmp_path/'run'/'journal.db')
    db.execute('ALTER TABLE steps DROP COLUMN frozen')
    db.close()
    signals = Run(tmp_path/'run').signals(['loss', 'frozen'])
    assert signals.loss.item() == 1 and np.isnan(signals.frozen.item())
    with Journal.open(tmp_path/'run') as journal: journal.steps(1, [node], {'frozen': [1]})
    np.testing.assert_array_equal(Run(tmp_path/'run').signals(['frozen']).frozen[0], [np.nan, 1])

@pytest.mark.parametrize('content', [b'', b'hello', b'\x07' * 9000], ids=['empty', 'short', 'long'])
def test_a_garbage_file_is_refused_with_a_sentence(tmp_path, content):
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'journal.db').write_bytes(content)
    for opening in (Run, Journal.open, delete_run):
        with pytest.raises(BadInput, match='journal.db .*journal'): opening(tmp_path/'run')
    with pytest.warns(UserWarning, match='journal.db'): assert runs(tmp_path) == []
    assert (tmp_path/'run'/'journal.db').read_bytes() == content

def test_a_foreign_database_is_refused(tmp_path):
    db = sqlite3.connect(tmp_path/'journal.db')
    db.execute('CREATE TABLE t (x)')
    db.close()
    with pytest.raises(BadInput, match='not a journal of this lab'): Run(tmp_path)

def test_unknown_columns_and_wrong_values(journal):
    node = journal.node(0)
    with pytest.raises(BadInput, match="did you mean 'validation_loss'"): journal.steps(0, [node], {'val_loss': [1.]})
    with pytest.raises(BadInput, match='should have 1 values'): journal.steps(0, [node], {'loss': [1., 2.]})
    with pytest.raises(BadInput, match='at least one'): journal.steps(0, [node], {})
    with pytest.raises(BadInput, match='no such open node'): journal.steps(0, [node + 1], {'loss': [1.]})
    with pytest.raises(BadInput, match='plain JSON'): journal.event('odd', 0, what={1, 2})
    with pytest.raises(BadInput, match='should be one of'): journal.set_status('done')
    journal.steps(0, [node], {'loss': [1.]})

def test_a_value_that_is_no_number_is_reported_by_the_next_call(tmp_path):
    journal = Journal.create(tmp_path/'run', {}, {})
    node = journal.node(0)
    journal.flush()
    journal.steps(0, [node], {'loss': ['high']})
    with pytest.raises(JournalError, match="loss = 'high': should be a number"): journal.flush()
    with pytest.raises(JournalError, match="loss = 'high'"): journal.steps(1, [node], {'loss': [1.]})
    with pytest.raises(JournalError, match='closed with 2 rows unwritten'): journal.close()

# round trips

def test_nan_infinity_and_nothing_round_trip(tmp_path, journal):
    nodes = [journal.node(lane) for lane in range(4)]
    journal.steps(0, nodes, {'loss': [float('nan'), float('inf'), None, 0.1], 'gradient_norm': [1., float('-inf'), 2., np.float32(3)]})
    journal.flush()
    run = Run(tmp_path/'run')
    for _ in range(2): # before and after the rows are packed
        signals = run.signals(['loss', 'gradient_norm', 'tokens'])
        np.testing.assert_array_equal(signals.loss[:, 0], [np.nan, np.inf, np.nan, 0.1])
        np.testing.assert_array_equal(signals.gradient_norm[:, 0], [1, -np.inf, 2, 3])
        assert np.isnan(signals.tokens).all()
        assert run.nonfinite()[['node', 'nonfinite']].values.tolist() == [[nodes[0], 'loss'], [nodes[1], 'loss,gradient_norm']]
        journal.close()

def test_packed_rows_equal_the_rows(tmp_path, journal):
    rng, nodes, given = np.random.default_rng(0), [journal.node(lane) for lane in range(3)], {}
    for step in range(2 * PACK // 3):
        some = nodes[:1 + step % 3]
        loss = [None if rng.random() < 0.1 else rng.standard_normal() for _ in some]
        columns = {'loss': loss, **({'validation_loss': [float(step)] * len(some)} if step % 50 == 0 else {})}
        journal.steps(step, some, columns)
        given.update({(node, step): value for node, value in zip(some, loss) if value is not None})
        if step % 500 == 0: journal.flush()
    journal.flush()
    run = Run(tmp_path/'run')
    live = run.signals(['loss', 'validation_loss', 'wall_time'])
    journal.close()
    closed = run.signals(['loss', 'validation_loss', 'wall_time'])
    assert live.identical(closed)
    assert {(n, s): v for (n, s), v in closed.loss.to_series().dropna().items()} == given
    db = sqlite3.connect(tmp_path/'run'/'journal.db')
    assert db.execute("SELECT count(*) FROM packs WHERE name = 'id'").fetchone()[0] >= 2
    db.execute('DELETE FROM packs') # the rows are the truth
    db.commit(); db.close()
    assert run.signals(['loss', 'validation_loss', 'wall_time']).identical(closed)
    table, last = run.rows_since(PACK + 7, ['loss'])
    assert len(table) == last - PACK - 7

def test_rewind_removes_rows_and_says_so(tmp_path, journal):
    a, b = journal.node(0), journal.node(1)
    for step in range(3 * PACK): journal.steps(step, [a, b], {'loss': [1., 2.]})
    run = Run(tmp_path/'run')
    journal.flush()
    seen = run.rows_since(0, ['loss'])[1]
    journal.rewind([a], 100)
    assert run.events()['detail'].tolist() == [{'rows_removed': 3 * PACK - 100, 'nodes': [a]}]
    journal.close()
    with Journal.open(tmp_path/'run') as journal:
        journal.steps(100, [a], {'loss': [9.]})
        journal.flush()
        table, _ = run.rows_since(seen, ['loss'])
        assert table[['node', 'step', 'loss']].values.tolist() == [[a, 100, 9.]]
    loss = run.signals(['loss']).loss
    assert loss.sel(node=a).notnull().sum() == 101 and loss.sel(node=b).notnull().sum() == 3 * PACK

def test_status_follows_how_a_run_ends(tmp_path):
    for problem, status in ((None, 'finished'), (KeyboardInterrupt, 'interrupted'), (ZeroDivisionError, 'failed')):
        try:
            with Journal.create(tmp_path/status, {}, {}) as journal:
                journal.set_status('paused')
                journal.flush()
                assert Run(tmp_path/status).status() == 'paused'
                if problem: raise problem
        except (KeyboardInterrupt, ZeroDivisionError): pass
        assert Run(tmp_path/status).status() == status
    assert [run.name for run in runs(tmp_path)] == ['failed', 'interrupted', 'finished']

def test_a_process_that_forgets_to_close_is_closed_at_exit(tmp_path):
    code = "import sys; from sdalab.journal.writer import Journal\nj = Journal.create(sys.argv[1], {}, {}); j.steps(0, [j.node(0)], {'loss': [1.]})"
    subprocess.run([sys.executable, '-c', code, str(tmp_path/'run')], check=True, timeout=60)
    assert Run(tmp_path/'run').status() == 'interrupted' and Run(tmp_path/'run').signals(['loss']).loss.item() == 1

# other processes

def test_a_reader_in_another_process_sees_a_row_within_a_second(tmp_path, writer):
    run, delays, seen = Run(tmp_path/'run'), [], 0
    _, seen = run.rows_since(0, ['loss'])
    for _ in range(10):
        time.sleep(0.1)
        table, seen = run.rows_since(seen, ['loss'])
        delays += (time.time() - table['wall_time']).tolist()
    assert len(delays) > 20 and max(delays) < 1.0

def test_commands_are_done_refused_or_expire(tmp_path, writer):
    run = Run(tmp_path/'run')
    status = lambda number: run.command(number)['status']
    pause, decide = run.send('pause'), run.send('decide', {'learning_rate_scale': 0.5}, node=1)
    wait_for(lambda: status(pause) == 'done' and status(decide) == 'refused')
    assert run.command(decide)['node'] == 1 and run.command(pause)['node'] is None
    assert run.command(decide)['reason'] == 'this run takes no decisions' and run.command(decide)['payload'] == {'learning_rate_scale': 0.5}
    stop = run.send('stop')
    writer.wait(timeout=20)
    assert status(stop) == 'done' and run.status() == 'finished'
    late = run.send('pause', expires_s=0.1)
    assert status(late) == 'expired' # nobody is there to take it
    assert run.commands()['status'].tolist() == ['done', 'refused', 'done', 'expired']
    with pytest.raises(BadInput, match='never got it'): run.command(99)

def test_a_command_nobody_takes_expires_and_one_begun_does_not(tmp_path, journal):
    run = Run(tmp_path/'run')
    late = run.send('pause', expires_s=0.1)
    wait_for(lambda: run.command(late)['status'] == 'expired')
    assert journal.pending() == [] and 'in time' in run.command(late)['reason']
    slow = run.send('stop', expires_s=0.6)
    wait_for(journal.pending)
    time.sleep(1)
    command, = journal.pending()
    journal.answer(command, 'done')
    with pytest.raises(BadInput, match='answered already'): journal.answer(command, 'done')
    journal.flush()
    assert run.command(slow)['status'] == 'done'

def test_a_resumed_run_does_not_obey_commands_to_its_predecessor(tmp_path, writer):
    writer.send_signal(signal.SIGSTOP)
    number = Run(tmp_path/'run').send('stop')
    writer.kill(); writer.wait()
    with Journal.open(tmp_path/'run') as journal:
        time.sleep(0.5)
        assert journal.pending() == [] and Run(tmp_path/'run').command(number)['status'] == 'expired'

# export

def test_export_carries_everything(tmp_path, journal):
    import pyarrow.parquet as pq
    parent = journal.node(3, settings={'learning_rate': 0.1})
    journal.steps(0, [parent], {'loss': [float('nan')]})
    child = journal.node(3, parent=parent, first_step=1, decision={'skip': True})
    journal.steps(1, [child], {'loss': [2.], 'tokens': [128]})
    journal.flush()
    table = pq.read_table(export(tmp_path/'run', tmp_path/'run.parquet')).select(['run', 'node', 'lane', 'parent', 'step', 'tokens'])
    assert table.to_pylist() == [dict(run='run', node=1, lane=3, parent=None, step=0, tokens=None),
                                 dict(run='run', node=2, lane=3, parent=1, step=1, tokens=128.)]
    with pytest.raises(BadInput, match='exists already'): export(tmp_path/'run', tmp_path/'run.parquet')
    export(tmp_path/'run', tmp_path/'run.parquet', overwrite=True)
    metadata = pq.read_schema(export_all(tmp_path)).metadata
    assert json.loads(metadata[b'sdalab.runs'])[0]['nodes'][1]['decision'] == {'skip': True}
    (tmp_path/'empty').mkdir()
    with pytest.raises(BadInput, match='no run below it'): export_all(tmp_path/'empty')
