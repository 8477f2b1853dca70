"Corruptions on images of any shape, and streams that are the packaged detector's own."
import numpy as np
import pytest

from intel_nb.detection.corruptions import CORRUPTIONS, corrupted
from intel_nb.detection.streams import Delay, RunTime, delay, first_alarms, run_time
from intel_nb.detector import Observations
from intel_nb.drift import (
    OUT_OF_DISTRIBUTION,
    TestImage as Sent,  # pytest takes a name with Test for a test
    case_table,
    cases_of,
    chosen_images,
    count_alarms,
    images_of,
    largest_difference,
    mean_delay,
    measure_cases,
    mix_table,
    observer,
    replay,
    stream_table,
    text_table,
    unseen_delay,
)
from intel_nb.images import decode, encode_jpeg, encode_png
from intel_nb.scenes import sample_scene


@pytest.fixture(scope="module")
def images():
    return [encode_jpeg(sample_scene(k % 6, np.random.default_rng([3, k])), 90) for k in range(60)]


def measured(package, images, n_clean, n_shifted, severities, slow=(), over=30, runs=50):
    "What the detector sees of some clean images, and its delays after each change."
    kept, changed = chosen_images(len(images), n_clean, n_shifted, seed=0)
    observe = observer(package)
    clean = observe([Sent(images[i]) for i in kept])
    cases = {case: images_of(case, images, changed, over) for case in cases_of(severities, slow)}
    return clean, measure_cases(observe, package.detector(), clean, cases, runs, seed=0)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("severity", [0.05, 1, 2, 3])
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
            assert changes == sorted(changes) and (changes[0] == 0 or name == "jpeg"), name


def test_streams_are_those_of_the_packaged_detector(package, images):
    clean, found = measured(package, images, 40, 20, [2])
    both, detector = Observations.join(clean, found["dark", 2].seen), package.detector()
    order = np.stack([np.random.default_rng(k).permutation(len(both.classes)) for k in range(8)], axis=1)
    found = first_alarms(detector, both, order)
    for time, stream in zip(found, order.T):
        detector.reset()
        readings = map(detector.update, *both.take(stream))
        assert next((s["time"] for s in readings if s["is_drift"]), 0) == time
    assert largest_difference(replay(package.detector(), both), replay(package.detector(), both)) == 0


def test_a_dark_stream_is_caught_and_a_clean_one_runs_long(package, images):
    clean, found = measured(package, images, 40, 20, [3])
    assert found["dark", 3].delay.summary()["mean"] < 10
    assert (run_time(package.detector(), clean, 200, seed=0).mean or 1e9) > 50


def test_few_images_are_enough(package, images):
    clean, found = measured(package, images[:2], 0, 2, [1, 2], ["fog"], over=7, runs=3)
    assert len(clean.classes) == 2 and len(found) == 18 + 1 + len(OUT_OF_DISTRIBUTION)
    assert all(len(one.seen.classes) in ((4, 7) if how == "slow" else (2,)) for (_, how), one in found.items())
    tables = case_table({case: one.delay for case, one in found.items()})
    counts = [len(tables[kind]) for kind in ("delays", "slow", "out_of_distribution")]
    assert counts == [18, 1, len(OUT_OF_DISTRIBUTION)]
    assert len(text_table(tables["slow"], ["corruption"]).split("\n")) == 1
    assert run_time(package.detector(), clean, 3, seed=0).summary()["length"] == 2


def test_a_delay_takes_more_images_only_where_few_do_not_tell(package, images):
    clean, found = measured(package, images, 30, 30, [1, 3])
    for (_, how), one in found.items():
        delays = one.delay.summary()
        assert delays["limit"] == len(one.seen.classes) <= 30
        if how != "slow" and delays["limit"] < min(30, len(one.seen.classes) + 1):
            assert delays["caught"] == 1 and delays["mean"] <= delays["limit"] / 2
    assert len(found["dark", 3].seen.classes) == 6 < max(len(one.seen.classes) for one in found.values())
    whole = delay(package.detector(), clean, found["dark", 3].seen, 50, seed=0)
    assert np.array_equal(whole.delays, found["dark", 3].delay.delays)


def test_streams_without_drift_alarm_plain_mmd_more_than_what_serves(package, images):
    clean = observer(package)([Sent(data) for data in images])
    rows, detectors = stream_table(package, clean, seed=0, length=400)
    by_name = {row["stream"]: row for row in rows}
    assert by_name["runs of a class"]["plain"] > 3 * by_name["runs of a class"]["watched"]
    assert all(row["level"] >= 1 and row["learned"] <= max(row["given"], row["expected"]) for row in rows)
    seen = clean.take(np.arange(60).repeat(3))
    assert count_alarms(detectors.given, seen) == sum(one["is_drift"] for one in replay(detectors.given, seen))


def test_nothing_to_measure_is_said_so():
    assert Delay(np.array([], int), 5).summary()["mean"] is None and Delay(np.array([], int), 5).summary()["missed"]
    assert RunTime(np.array([0, 0]), 5).summary()["mean"] is None
    assert mean_delay([{"severity": 2, "mean": None}, {"severity": 2, "mean": 1.0}], 2) is None


def test_a_slow_change_is_seen_later_than_a_sudden_one(package, images):
    clean, found = measured(package, images, 40, 20, [2], ["dark"], over=60, runs=60)
    tables = case_table({case: found[case].delay for case in (("dark", 2), ("dark", "slow"))})
    assert tables["delays"][0]["mean"] < tables["slow"][0]["mean"] < 60


def test_a_mix_names_its_classes_and_needs_images_of_them():
    rng = np.random.default_rng(0)
    rows, labels = rng.normal(size=(90, 17)).astype(np.float32), np.repeat([0, 1], 45)
    clean = Observations.of(rows, labels)
    found = unseen_delay(clean, labels, 1, 20, (2, 4), 20, seed=0)
    assert found["streams"] > 0 and found["limit"] == 45
    table = mix_table(clean, labels, ["a", "b", "none"], 20, 20, seed=0)
    assert [row["classes"] for row in table] == [["a"], ["b"], ["a", "b"], ["b", "none"], ["none", "a"]]
