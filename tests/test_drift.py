"Corruptions on images of any shape, and streams that are the packaged detector's own."
import numpy as np
import pytest

from intel_nb.drift import CORRUPTIONS, Delay, RunTime, check_inputs, corrupted, delay, drift_features, first_alarms
from intel_nb.drift import largest_difference, mean_delay, replay, run_time
from intel_nb.images import decode, encode_jpeg, encode_png, sample_scene
from intel_nb.model import load_package, sample_package
from intel_nb.storage import InputError


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return load_package(sample_package(tmp_path_factory.mktemp("drift") / "model"))


@pytest.fixture(scope="module")
def images():
    return [encode_jpeg(sample_scene(k % 6, np.random.default_rng([3, k])), 90) for k in range(60)]


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("severity", [1, 2, 3])
def test_every_corruption_takes_every_shape(name, severity):
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (1, 40), (37, 5), (150, 150)):
        pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        data = corrupted(encode_png(pixels), name, severity, seed=1)
        assert decode(data, 16).shape == (16, 16, 3)
        assert data == corrupted(encode_png(pixels), name, severity, seed=1)


def test_amounts_grow_with_severity():
    scene = sample_scene(0, np.random.default_rng(0))
    for name, (corruption, amounts) in CORRUPTIONS.items():
        if name != "rotation":
            images = [corruption(scene, amount, np.random.default_rng(0)) for amount in amounts]
            changes = [np.abs(image.astype(int) - scene).mean() for image in images]
            assert changes == sorted(changes), name


def test_streams_are_those_of_the_packaged_detector(package, images):
    clean, shifted = drift_features(package, images, 40, 20, [2], seed=0)
    rows, detector = np.concatenate([clean, shifted["dark", 2]]), package.detector()
    order = np.stack([np.random.default_rng(k).permutation(len(rows)) for k in range(8)], axis=1)
    found = first_alarms(detector, rows, order)
    for time, stream in zip(found, order.T):
        detector.reset()
        assert next((s["time"] for s in map(detector.update, rows[stream]) if s["is_drift"]), 0) == time
    assert largest_difference(replay(package.detector(), rows), replay(package.detector(), rows)) == 0


def test_a_dark_stream_is_caught_and_a_clean_one_runs_long(package, images):
    clean, shifted = drift_features(package, images, 40, 20, [3], seed=0)
    assert delay(package.detector(), clean, shifted["dark", 3], 50, seed=0).summary()["mean"] < 10
    assert (run_time(package.detector(), clean, 200, seed=0).mean or 1e9) > 50


def test_few_images_are_enough(package, images):
    clean, shifted = drift_features(package, images[:2], 0, 2, [1, 2], seed=0)
    assert clean.shape[0] == 2 and all(len(rows) == 2 for rows in shifted.values()) and len(shifted) == 18
    assert run_time(package.detector(), clean, 3, seed=0).summary()["length"] == 2
    delay(package.detector(), clean, shifted["fog", 1], 3, seed=0).summary()


def test_nothing_to_measure_is_said_so():
    assert Delay(np.array([], int), 5).summary()["mean"] is None and Delay(np.array([], int), 5).summary()["missed"]
    assert RunTime(np.array([0, 0]), 5).summary()["mean"] is None
    assert mean_delay([{"severity": 2, "mean": None}, {"severity": 2, "mean": 1.0}], 2) is None


BAD = ([], 1, 1, 1), ([0], 1, 1, 1), (["2"], 1, 1, 1), ([2], 0, 1, 1), ([2], 1, -1, 1), ([2], 1, 1, 0)


@pytest.mark.parametrize("bad", BAD)
def test_senseless_parameters_are_refused(bad):
    with pytest.raises(InputError):
        check_inputs(*bad)
