"Calibration beside an independent implementation, and the store of tuples under kills and several writers."
import json, math, random, subprocess, sys, textwrap
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save as write_arrays
from sdalab.checked import BadInput, data_file
from sdalab.decisions.model import Decision
from sdalab.futures.calibration import conformal_quantile, distance_scores, outside_scores
from sdalab.futures.proxy import PARTS, load_proxy
from sdalab.futures.tuples import FEATURES, HORIZONS, TupleLog, as_columns

class Fixed:
    "A fitted regressor: a multiple of the first input, as scikit-learn would have it."
    def __init__(self, factor): self.factor, self.fitted_ = factor, True
    def fit(self, X, y): return self
    def predict(self, X): return self.factor * np.asarray(X)[:, 0]
    def __sklearn_is_fitted__(self): return True
    def get_params(self, deep=True): return dict(factor=self.factor)
    def set_params(self, **more): return self

def cases(n, seed):
    rng = np.random.default_rng(seed)
    x = rng.uniform(1, 2, (n, 1))
    return x, x[:, 0] * rng.standard_normal(n)

@pytest.mark.parametrize('level', [0.5, 0.8, 0.9])
def test_split_conformal_is_that_of_mapie(level):
    mapie = pytest.importorskip('mapie.regression')
    x, y = cases(60, 1)
    theirs = mapie.SplitConformalRegressor(Fixed(0.5), confidence_level=level, prefit=True).conformalize(x, y).predict_interval(np.ones((1, 1)))[1][0, :, 0]
    margin = conformal_quantile(distance_scores(y, 0.5 * x[:, 0]), 1 - level)
    assert theirs == pytest.approx([0.5 - margin, 0.5 + margin])

@pytest.mark.parametrize('level', [0.5, 0.8, 0.9])
def test_conformalised_quantiles_are_those_of_mapie(level):
    mapie = pytest.importorskip('mapie.regression')
    x, y = cases(60, 2)
    models = [Fixed(-0.6), Fixed(0.6), Fixed(0.0)] # low, high, median
    oracle = mapie.ConformalizedQuantileRegressor(models, confidence_level=level, prefit=True).conformalize(x, y)
    theirs = oracle.predict_interval(np.full((1, 1), 1.5), symmetric_correction=True)[1][0, :, 0]
    margin = conformal_quantile(outside_scores(y, -0.6 * x[:, 0], 0.6 * x[:, 0]), 1 - level)
    assert theirs == pytest.approx([-0.9 - margin, 0.9 + margin])

def tuple_row(run, lane=0):
    targets = {f'{name}_{h}': 0.5 for name in ('difference', 'diverged') for h in HORIZONS}
    return dict(run=run, seed=0, corpus='', parameters=1, step=7, lane=lane, recovery=math.inf, tokens=1) | dict.fromkeys(FEATURES, 0.25) | as_columns(Decision(clip='zclip')) | targets

APPENDER = """
    import json, sys
    from sdalab.futures.tuples import TupleLog
    log, row = TupleLog(sys.argv[1]), json.loads(sys.argv[2])
    for lane in range(int(sys.argv[4])):
        log.append([row | dict(run=sys.argv[3], lane=lane)])
        print(lane, flush=True)
"""

def appender(path, name, rows):
    return subprocess.Popen([sys.executable, '-c', textwrap.dedent(APPENDER), str(path), json.dumps(tuple_row('')), name, str(rows)], stdout=subprocess.PIPE, text=True)

def test_several_writers_lose_nothing(tmp_path):
    writers = [appender(tmp_path/'tuples.parquet', name, 10) for name in 'ab']
    assert [w.wait(120) for w in writers] == [0, 0]
    table = TupleLog(tmp_path/'tuples.parquet').read()
    assert sorted(zip(table['run'], table['lane'])) == [(name, lane) for name in 'ab' for lane in range(10)]

def test_a_kill_leaves_whole_tuples(tmp_path):
    draw, path = random.Random(4), tmp_path/'tuples.parquet'
    for number in range(3):
        writer = appender(path, str(number), 10_000)
        for _ in range(draw.randint(2, 9)): said = int(writer.stdout.readline())
        writer.kill(); writer.wait()
        table = TupleLog(path).read()
        lanes = table.loc[table['run'] == str(number), 'lane'].tolist()
        assert lanes == list(range(len(lanes))) and said < len(lanes) # all that was said to be there is
    assert TupleLog(path).append([tuple_row('after')]) == len(table) + 1

def test_the_shipped_proxy_predicts_and_strangers_are_refused(tmp_path):
    said = load_proxy().predict(dict.fromkeys(FEATURES, math.nan), [Decision(), Decision(learning_rate_scale=0.8)])
    median, low, high, risk = said[1:5]
    assert load_proxy().fitted == HORIZONS and not median[0].any() and (low[1] <= median[1]).all() and (median[1] <= high[1]).all() and ((risk >= 0) & (risk <= 1)).all()
    assert load_proxy().rungs['difference_2000'].name == 'constants' and high[1, 3] - low[1, 3] > 3, 'of 2,000 steps ahead it knows that it knows next to nothing'
    with safe_open(data_file('proxy.safetensors'), 'numpy') as file: about, arrays = json.loads(file.metadata()['sdalab.proxy']), {name: file.get_tensor(name) for name in file.keys()}
    near = {name: array for name, array in arrays.items() if not name.startswith('far_')}
    said_then = {key: value for key, value in about.items() if key != 'prefixes'} | dict(proxy_version=1, parts={part: about['parts'][part] for part in PARTS})
    (older := tmp_path/'older.safetensors').write_bytes(write_arrays(near, {'sdalab.proxy': json.dumps(said_then)}))
    assert set(load_proxy(str(older)).rungs) == set(PARTS) < set(load_proxy().rungs), 'a file of an older version has no rung of its own for 2,000 steps'
    stranger = tmp_path/'pickle.safetensors'
    stranger.write_bytes(b'\x80\x04cos\nsystem\n.')
    with pytest.raises(BadInput, match='not a file of a proxy'): load_proxy(str(stranger))
