"""A challenger beside the champion: how they are compared, who passes the gate, and what a person is shown."""

import json

import numpy as np
import pytest

from intel_nb.dataset import Row, class_names, read_split, sample_dataset, write_split
from intel_nb.evaluate import decide, on_annotations
from intel_nb.model import load_package, sample_package
from intel_nb.registry import open_registry

EVALUATION = {"multiclass_classification_metrics": {"accuracy": {"value": 0.9}}, "fingerprints": {"data": "d"},
              "gate": {"min_accuracy": 0}}


def rewrite(dataset, split: str, labels: np.ndarray | None = None, sources: list[str] | None = None) -> None:
    "Write `split` of `dataset` anew, with other labels or sources."
    from PIL import Image
    import io
    old, names = read_split(dataset, split), class_names(dataset)
    sizes = [Image.open(io.BytesIO(data)).size for data in old.images]
    rows = [Row(data, int(label), sha256, *size, source) for data, label, sha256, size, source in
            zip(old.images, old.labels if labels is None else labels, old.sha256, sizes, sources or old.source)]
    write_split(dataset, split, rows, len(rows), names)


@pytest.fixture(scope="module")
def champion(tmp_path_factory):
    "A registry whose version 1, a good package, is in production; and the package."
    folder = tmp_path_factory.mktemp("champion")
    package = load_package(sample_package(folder / "model"))
    registry = open_registry(f"sqlite:///{folder}/mlflow.db")
    registry.register(package.path, EVALUATION, status="Approved", reason="", params={})
    registry.set_alias("production", "1")
    return registry, package


def test_annotated_rows_of_validation_are_measured_apart(champion, tmp_path):
    registry, package = champion
    dataset = sample_dataset(tmp_path, per_class=12)
    count = len(read_split(dataset, "validation"))
    assert on_annotations(package, registry, read_split(dataset, "validation")) == "none"
    rewrite(dataset, "validation", sources=["annotations"] * 5 + ["capture:2026-01-31T12:00:00Z"] * 4 + ["archive"] * (count - 9))
    found = on_annotations(package, registry, read_split(dataset, "validation"))
    assert (found["images"], found["difference"], found["p_value"]) == (9, 0, 1)
    assert found["accuracy"] == found["champion"] and found["low"] < 0 < found["high"]


@pytest.mark.parametrize("wrong", [.02, .05, .2])
def test_a_worse_challenger_passes_only_within_noise(wrong):
    "What passes the gate and is not better says so, with an interval that holds zero."
    rng, champion = np.random.default_rng(1), np.arange(600) >= 30
    for _ in range(20):
        right = champion & (rng.random(600) >= wrong)
        verdict = decide(right, 0, "1", champion)
        lost = int((champion & ~right).sum())
        assert verdict.passed == (lost < 6), "six to nothing is p = 0.031"
        assert ("within noise" in verdict.reason) == verdict.passed and "95 % interval" in verdict.reason


@pytest.mark.slow
def test_a_person_sees_by_how_much_and_how_sure(waiting):
    "The second version of the same package is the champion's equal, and waits for a person, with the figures in sight."
    assert waiting("approve", "1").status == 0
    assert waiting("promote", "1").status == 0
    answer = waiting.run("--param", "evaluate.min_accuracy=0.1")
    assert answer.status == 3
    assert "within noise of champion 1 (+0.0000, 95 % interval" in answer.out
    assert "within noise of champion 1" in waiting("models").out
    step = next(s for s in waiting.newest()["steps"] if s["name"] == "evaluate")
    report = json.loads((waiting.home / "store" / "evaluate" / step["key"] / "evaluation.json").read_text())
    assert report["champion"]["version"] == step["result"]["champion"] == "1" and report["annotations"] == "none"
    assert set(report["champion"]["per_class"]) == set(report["per_class"])
    for name, found in report["champion"]["per_class"].items():
        assert found["accuracy"] == found["champion"] == report["per_class"][name]["recall"] and found["difference"] == 0
    page = (waiting.executed / waiting.newest()["run_id"] / "report.html").read_text()
    assert "95 % interval" in page and 'alt="champion"' in page
