"The detector against its formula, its promise, damaged files and alibi-detect; and its monitor when it is killed."
import contextlib
import dataclasses
import math
import subprocess
import sys
import tracemalloc
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from intel_nb import detector as module
from intel_nb.detection.streams import first_alarms
from intel_nb.detector import (
    Observations,
    OnlineMMD,
    means_between,
    prepare_rows,
    stream_statistics,
    survivor_thresholds,
    window_mmd2,
)
from intel_nb.serving.monitor import HISTORY, Monitor
from intel_nb.storage import InputError

WINDOWS = (2, 3, 8)


def normal(rows: int, seed: int = 0, width: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


@cache
def kept(ert: float = 50, n_bootstraps: int = 4_000) -> OnlineMMD:
    return OnlineMMD(normal(150), ert, WINDOWS, n_bootstraps, pool=normal(300, seed=1))


def fresh() -> OnlineMMD:
    kept().reset()
    return kept()


def mean_apart(kernel: np.ndarray) -> float:
    n = len(kernel)
    return (kernel.sum() - np.trace(kernel)) / (n * (n - 1)) if n > 1 else 0.0


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 30), seed=st.integers(0, 10**6), scale=st.sampled_from([0.1, 1, 30]),
       offset=st.sampled_from([0, 5, 500]))
def test_each_window_has_the_mmd_of_the_formula(length, seed, scale, offset):
    detector, live = fresh(), normal(length, seed) * scale + offset
    for row in live:
        seen = detector.update(row)
    known = detector.calibration
    exact = lambda a, b: np.exp(-((a[:, None].astype(float) - b[None]) ** 2).sum(-1) / (2 * known.sigma**2))
    for found, size in zip(window_mmd2(detector), np.minimum(WINDOWS, length)):
        window = live[-size:]
        mmd2 = mean_apart(exact(known.reference, known.reference)) + mean_apart(exact(window, window))
        expected = mmd2 - 2 * exact(window, known.reference).mean() if size > 1 else 0  # one has no pair
        assert found == pytest.approx(expected, abs=5e-6)
    assert seen["statistic"] == detector.window_statistics.max() and seen["time"] == length


@settings(max_examples=25, deadline=None)
@given(stop=st.integers(0, 40), seed=st.integers(0, 10**6), width=st.sampled_from([1, 5, 136]))
def test_a_loaded_detector_goes_on_exactly(stop, seed, width, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "drift.npz"
    detector = OnlineMMD(normal(20, seed, width), 20, WINDOWS, 100, pool=normal(30, seed + 1, width))
    live = normal(60, seed + 2, width)
    for row in live[:stop]:
        detector.update(row)
    detector.save(path)
    first = path.read_bytes()
    again = OnlineMMD.load(path)
    again.save(path)
    assert path.read_bytes() == first
    assert [again.update(row) for row in live[stop:]] == [detector.update(row) for row in live[stop:]]


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 20), min_size=1, max_size=8), seed=st.integers(0, 10**6),
       width=st.sampled_from([1, 5, 136]), shift=st.sampled_from([0, 3]),
       windows=st.sampled_from([(2,), (2, 3, 8), (3, 30)]))
def test_batches_give_the_statistics_of_one_by_one(sizes, seed, width, shift, windows):
    detector = OnlineMMD(normal(20, seed, width), 20, windows, 100, pool=normal(61, seed + 1, width))
    live = normal(sum(sizes) + 1, seed + 2, width) + np.float32(shift)
    alone = [detector.update(row) for row in live[:-1]]
    after = detector.update(live[-1])
    detector.reset()
    batched = [seen for part in np.split(live[:-1], np.cumsum(sizes)[:-1]) for seen in detector.update_many(part)]
    for found, expected in zip([*batched, detector.update(live[-1])], [*alone, after], strict=True):
        assert found == expected | {"statistic": pytest.approx(expected["statistic"], rel=1e-6, abs=1e-9)}


def test_stopping_at_an_alarm_leaves_the_rest_out():
    detector, live = fresh(), np.concatenate([normal(12, seed=4), normal(20, seed=5) + 3])
    readings = detector.update_many(live, stop=True)
    assert [seen["is_drift"] for seen in readings] == [False] * (len(readings) - 1) + [True] and len(readings) < 20
    state = detector.state()
    detector.reset()
    for row in live[:len(readings)]:
        detector.update(row)
    assert detector.state() == state and detector.reading == readings[-1]


def test_a_bad_row_in_a_batch_changes_nothing():
    detector = fresh()
    detector.update_many(normal(11, seed=4))
    before, batch = detector.state(), normal(4)
    batch[2, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        detector.update_many(batch)
    assert detector.state() == before and detector.update_many(batch[:0]) == []


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_damaged_state_is_ever_fed_on(data):
    detector = fresh()
    detector.update_many(normal(6, seed=8))
    state = bytearray(detector.state())
    kind = data.draw(st.sampled_from(["flip", "cut", "random"]))
    if kind == "flip":
        for _ in range(data.draw(st.integers(1, 4))):
            state[data.draw(st.integers(0, len(state) - 1))] = data.draw(st.integers(0, 255))
    elif kind == "cut":
        del state[data.draw(st.integers(0, len(state) - 1)):]
    else:
        state = data.draw(st.binary(min_size=len(state), max_size=len(state)))
    before = detector.reading
    try:
        detector.restore(bytes(state))
    except InputError:
        assert detector.reading == before
    assert math.isfinite(detector.update(np.zeros(5))["statistic"])


BAD = [[np.nan, 0, 0, 0, 0], [0, 0, np.inf, 0, 0], [0, 0, 0, 0, -1e300], [0] * 4, [0] * 6, [[0] * 5], 0, [], ["x"] * 5]


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_observation_changes_nothing(bad, tmp_path):
    detector = fresh()
    for row in normal(11, seed=4):
        detector.update(row)
    detector.save(tmp_path / "before.npz")
    with pytest.raises(ValueError):
        detector.update(np.array(bad))
    detector.save(tmp_path / "after.npz")
    assert (tmp_path / "after.npz").read_bytes() == (tmp_path / "before.npz").read_bytes()


@pytest.mark.parametrize("size", [1e10, 3e38])
def test_an_enormous_observation_is_drift_and_is_forgotten(size):
    detector = fresh()
    first = [detector.update(row) for row in normal(20, seed=5)]
    for _ in range(3):
        seen = detector.update(np.full(5, size))
    assert seen["is_drift"] and np.isfinite(seen["statistic"])
    detector.reset()
    assert [detector.update(row) for row in normal(20, seed=5)] == first


def test_reset_starts_anew():
    detector, live = fresh(), normal(20, seed=6)
    once = [detector.update(row) for row in live]
    detector.reset()
    assert [detector.update(row) for row in live] == once


def test_the_same_input_gives_the_same_file(tmp_path):
    for name in ("a", "b"):
        OnlineMMD(normal(90), 20, WINDOWS, 500, seed=3).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert list(tmp_path.glob(".*")) == []


def test_memory_does_not_grow_with_updates():
    detector, live = fresh(), normal(100, seed=7)
    tracemalloc.start()
    try:
        for row in live:
            detector.update(row)
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(20):
            for row in live:
                detector.update(row)
        assert tracemalloc.get_traced_memory()[0] - before < 4_096
    finally:
        tracemalloc.stop()


def first_times(detector: OnlineMMD, rows: np.ndarray, steps: int, count: int, seed: int) -> np.ndarray:
    "Time of the first alarm (steps where there is none) of `count` streams without replacement."
    known, rng = detector.calibration, np.random.default_rng(seed)
    streams = np.stack([rng.permutation(len(rows))[:steps] for _ in range(count)], axis=1)
    statistics = stream_statistics(known, prepare_rows(known, Observations.of(rows)), streams)
    over = statistics > np.array([[known.threshold(t + 1)] for t in range(steps)])
    return np.where(over.any(axis=0), over.argmax(axis=0) + 1, steps)


def test_streams_in_stretches_are_the_whole_streams():
    detector, rows = fresh(), normal(700, seed=9)
    streams = np.stack([np.random.default_rng(k).permutation(700) for k in range(60)], axis=1)
    found, seen = first_alarms(detector, Observations.of(rows), streams), Observations.of(rows)
    limits = detector.calibration.threshold(np.arange(1, 701))[:, None]
    over = stream_statistics(detector.calibration, prepare_rows(detector.calibration, seen), streams) > limits
    assert (found == np.where(over.any(axis=0), over.argmax(axis=0) + 1, 0)).all() and (found > 128).any()


def test_thresholds_beyond_the_number_of_streams_follow_the_tail():
    noise = np.random.default_rng(0).normal(size=(40, 20_000))
    found = survivor_thresholds(noise, 10_000, 20)
    assert np.abs(found - 3.719).max() < 0.25 and abs(found.mean() - 3.719) < 0.06  # the normal law's


@pytest.mark.parametrize("ert", [20, 60])
def test_run_time_without_drift_is_as_asked(ert):
    detector = OnlineMMD(normal(1_000, 1, 12), ert, (2, 4, 8, 16), 30_000, pool=normal(2_000, 2, 12))
    times = first_times(detector, normal(2_500, 3, 12), 8 * ert, 2_000, seed=0)
    assert 0.88 * ert < times.mean() < 1.12 * ert
    early = [(times == t).sum() / (times >= t).sum() * ert for t in range(1, ert)]
    assert np.mean(early[:8]) == pytest.approx(1, abs=0.35) and np.mean(early[8:]) == pytest.approx(1, abs=0.2)


def test_a_shift_is_seen_soon():
    detector, delays = fresh(), []
    for seed in range(20):
        detector.reset()
        shifted = normal(40, 100 + seed) + 1
        delays.append(next(t for t, row in enumerate(shifted, 1) if detector.update(row)["is_drift"]))
    assert np.mean(delays) < 10


@pytest.fixture
def arrays(tmp_path):
    fresh().save(tmp_path / "drift.npz")
    return dict(np.load(tmp_path / "drift.npz"))


@pytest.mark.parametrize("name", [*module._CALIBRATION, *module._STATE])
@pytest.mark.parametrize("damage", ["missing", "nan", "shape", "empty", "pickle", "type", "negative"])
def test_a_damaged_file_is_refused(name, damage, arrays, tmp_path):
    value = arrays[name]
    if damage == "negative" and name not in ("ert", "windows", "variances", "cells", "sigma", "time", "classes"):
        pytest.skip("a negative number is possible here, or says nothing that is used")
    kind = value.dtype if value.dtype.kind == "f" else float
    arrays[name] = {"nan": np.full(value.shape, np.nan, kind), "shape": value[None], "empty": value.reshape(-1)[:0],
                    "pickle": np.array([{}]), "type": value.astype(complex), "negative": -value - 1}.get(damage)
    if damage == "missing":
        del arrays[name]
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError, match="bad.npz is no drift detector"):
        OnlineMMD.load(tmp_path / "bad.npz")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_flipped_or_missing_bytes_never_crash_the_loader(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "flipped.npz"
    fresh().save(path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)):]
    else:
        for _ in range(data.draw(st.integers(1, 5))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        OnlineMMD.load(path).update(np.zeros(5))


def test_no_file_and_no_archive(tmp_path):
    (tmp_path / "text").write_text("hello")
    np.save(tmp_path / "one.npy", normal(3))
    for name in ("text", "one.npy", "."):
        with pytest.raises(InputError, match="no drift detector"):
            OnlineMMD.load(tmp_path / name)
    with pytest.raises(InputError, match="none.npz does not exist"):
        OnlineMMD.load(tmp_path / "none.npz")


def test_alibi_detect_agrees(monkeypatch):
    "One window, plain features: the library's statistic; its thresholds within what 400 rows and its bootstraps allow."
    torch = pytest.importorskip("torch")
    no_text = SimpleNamespace(TransformerEmbedding=type)  # the library's models of text take seconds to import
    monkeypatch.setitem(sys.modules, "alibi_detect.models.pytorch.embedding", no_text)
    cd = pytest.importorskip("alibi_detect.cd")
    torch.manual_seed(0)
    rows, size, ert = normal(400), 8, 50
    theirs = cd.MMDDriftOnline(rows, ert, size, n_bootstraps=3_000, backend="pytorch", verbose=False)._detector
    pool = normal(2_000, seed=8)
    ours = OnlineMMD(rows[theirs.ref_inds.numpy()], ert, (size,), 10_000, pool=pool)
    assert ours.calibration.sigma == pytest.approx(float(theirs.kernel.sigma), rel=0.02)  # theirs: from all 400 rows
    sigma = float(theirs.kernel.sigma)
    pairs = size * (size - 1) / 2  # the statistic of a full window is then the mean of h, which is MMD²
    between = means_between(ours.calibration.reference, sigma, ours.calibration.cells)
    plain = dataclasses.replace(ours.calibration, sigma=sigma, between=between, variances=np.array([[pairs]]))
    ours.calibration = plain
    ours.reset()
    pairs = [(theirs.score(row), ours.update(row)["statistic"]) for row in normal(60, seed=9)]
    assert np.abs(np.diff(pairs[size:])).max() < 1e-6  # until then the library's window holds rows of the reference
    streams = next(module._draw_streams(len(pool), 2 * size - 1, 12_000, np.random.default_rng(0)))
    statistics = stream_statistics(plain, prepare_rows(plain, Observations.of(pool)), streams)
    full = statistics[size - 1:]  # the library's first window is full as well
    thresholds = survivor_thresholds(full, ert, size - 1)
    samples = [survivor_thresholds(full[:, i::4], ert, size - 1) for i in range(4)]  # of as many bootstraps as theirs
    tolerance = 5 * np.std(samples, axis=0, ddof=1).mean() + 0.03 * thresholds  # the latter: other rows in the pool
    assert (np.abs(thresholds - theirs.thresholds) < tolerance).all()


def traffic(package, count: int) -> tuple[np.ndarray, np.ndarray]:
    "Features that shift now and then, and classes."
    rng = np.random.default_rng(0)
    rows = package.detector().calibration.reference[rng.integers(0, 100, count)]
    rows = rows + rng.normal(scale=0.3, size=rows.shape).astype(np.float32)
    rows[np.arange(count) % 150 > 130] += 1.5
    return rows, rng.integers(0, 6, count)


FEED = """
import sys, numpy as np
from intel_nb.model import load_package
from intel_nb.serving.monitor import Monitor
monitor = Monitor(load_package(sys.argv[1]), sys.argv[2])
rows, classes, at = np.load(sys.argv[3]), np.load(sys.argv[4]), monitor.status()["observations"]
rng = np.random.default_rng(at)
while at < len(rows):
    n = int(rng.integers(1, 9))
    monitor.update(rows[at:at + n], classes[at:at + n])
    at = monitor.status()["observations"]
    print(at, flush=True)
"""


def test_a_killed_monitor_goes_on_where_an_undisturbed_one_would_be(package, tmp_path):
    rows, classes = traffic(package, 3_000)
    np.save(tmp_path / "rows.npy", rows)
    np.save(tmp_path / "classes.npy", classes)
    files = tmp_path / "rows.npy", tmp_path / "classes.npy"
    command = [sys.executable, "-c", FEED, package.path, tmp_path / "state", *files]
    for kills, lines in enumerate((9, 40, 71), 1):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for _ in range(lines):
                seen = int(process.stdout.readline())
            process.kill()
        status = Monitor(package, tmp_path / "state").status()
        assert seen - 16 <= status["observations"] and status["observations"] <= len(rows)
        undisturbed = Monitor(package, tmp_path / f"other{kills}")
        undisturbed.update(rows[:status["observations"]], classes[:status["observations"]])
        expected = undisturbed.status()
        assert (status["last_alarm"] is None) == (status["alarms"] == 0)
        for found in (status, expected):  # apart from when it was
            found["latest_alarms"] = [alarm["reason"] for alarm in found["latest_alarms"]]
            found["stream"]["expected_hours"] = found["last_alarm"] = None
        assert status == expected
    assert status["alarms"] > 0


def test_history_has_the_latest_observations(package, tmp_path):
    monitor, (rows, classes) = Monitor(package, tmp_path), traffic(package, HISTORY + 40)
    observed = [seen for i in range(0, len(rows), 7) for seen in monitor.update(rows[i:i + 7], classes[i:i + 7])]
    readings = [one.reading for one in observed]
    shown = [[r["statistic"], r["threshold"], r["is_drift"]] for r in readings if r["time"]]
    assert monitor.history() == shown[-HISTORY:]
    assert monitor.status()["alarms"] == sum(r["is_drift"] for r in readings) > 0
    anew = [one.alarm is not None and one.alarm["reason"] in ("inputs", "unknown images") for one in observed]
    after = [b["time"] for is_anew, b in zip(anew, readings[1:]) if is_anew]
    assert set(after) <= {0, 1} and 1 in after  # also within a batch; 0 where the next one is a repeat
