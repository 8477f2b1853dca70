"""A challenger beside the champion: the comparison, the gate, and what a person sees of it."""

import io
import json
import random
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_endpoint import Load, wait_until

from intel_nb.dataset import Row, class_names, read_split, sample_dataset, write_split
from intel_nb.evaluate import decide_gate, evaluate_annotated
from intel_nb.model import load_package
from intel_nb.registry import open_registry

EVALUATION = {"multiclass_classification_metrics": {"accuracy": {"value": 0.9}}, "fingerprints": {"data": "d"},
              "gate": {"min_accuracy": 0}}


def set_sources(dataset: Path, split: str, sources: list[str]) -> None:
    "Write `split` of `dataset` again with other sources."
    old = read_split(dataset, split)
    sizes = [Image.open(io.BytesIO(data)).size for data in old.images]
    rows = [Row(data, int(label), sha256, *size, source) for data, label, sha256, size, source in
            zip(old.images, old.labels, old.sha256, sizes, sources)]
    write_split(dataset, split, rows, len(rows), class_names(dataset))


@pytest.fixture(scope="module")
def champion(sample_model, empty_database, tmp_path_factory):
    "A registry whose version 1 is in production; and its package."
    folder = tmp_path_factory.mktemp("champion")
    package = load_package(sample_model)
    shutil.copyfile(empty_database, folder / "mlflow.db")
    registry = open_registry(f"sqlite:///{folder}/mlflow.db")
    registry.register(package.path, EVALUATION, status="Approved", reason="", params={})
    registry.set_alias("production", "1")
    return registry, package


def test_annotated_rows_of_validation_are_measured_apart(champion, tmp_path):
    registry, package = champion
    dataset = sample_dataset(tmp_path, per_class=12)
    count = len(read_split(dataset, "validation"))
    assert evaluate_annotated(package, registry, read_split(dataset, "validation")) == {}
    captures = ["capture:2026-01-31T12:00:00Z", *["capture:2026-02-28T12:00:00Z"] * 3]
    set_sources(dataset, "validation", [*["annotations"] * 5, *captures, *["archive"] * (count - 9)])
    found = evaluate_annotated(package, registry, read_split(dataset, "validation"))
    assert {name: seen["images"] for name, seen in found.items()} == {"all": 9, "capture:2026-02-28T12:00:00Z": 3}
    for seen in found.values():
        assert (seen["difference"], seen["p_value"]) == (0, 1)
        assert seen["accuracy"] == seen["champion"] and seen["low"] < 0 < seen["high"]


@pytest.mark.parametrize("wrong", [.02, .05, .2])
def test_a_worse_challenger_passes_only_within_noise(wrong):
    "A challenger that passes without being better says so, with an interval."
    rng, champion = np.random.default_rng(1), np.arange(600) >= 30
    for _ in range(20):
        right = champion & (rng.random(600) >= wrong)
        verdict = decide_gate(right, 0, "1", champion)
        lost = int((champion & ~right).sum())
        assert verdict.passed == (lost < 6), "six to nothing is p = 0.031"
        assert ("within noise" in verdict.reason) == verdict.passed and "95 % interval" in verdict.reason


@pytest.mark.slow
def test_a_person_sees_by_how_much_and_how_sure(waiting):
    "The second version of the same package is the champion's equal. It waits, and a person sees the figures."
    assert waiting("approve", "1").status == 0
    assert waiting("promote", "1").status == 0
    answer = waiting.run("--param", "evaluate.min_accuracy=0.1")
    assert answer.status == 3
    assert "within noise of champion 1 (+0.0000, 95 % interval" in answer.out
    assert "within noise of champion 1" in waiting("models").out
    step = next(s for s in waiting.newest()["steps"] if s["name"] == "evaluate")
    report = json.loads((waiting.home / "store" / "evaluate" / step["key"] / "evaluation.json").read_text())
    assert report["champion"]["version"] == step["result"]["champion"] == "1" and report["annotations"] == {}
    assert set(report["champion"]["per_class"]) == set(report["per_class"])
    for name, found in report["champion"]["per_class"].items():
        assert found["accuracy"] == found["champion"] == report["per_class"][name]["recall"]
        assert found["difference"] == 0
    page = (waiting.executed / waiting.newest()["run_id"] / "report.html").read_text()
    assert "No difference that shows: +0.0 percentage points against version 1 in production" in page
    assert "95 % interval" in page and f"intel-nb approve {waiting.newest()['model_version']}" in page


def shuffled(archive: Path, out: Path) -> Path:
    "Write `archive` to `out` with the classes of its training images shuffled; the test images keep their classes."
    rng = random.Random(0)
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(out, "w") as new:
        names = [n for n in old.namelist() if not n.endswith("/")]
        wrong = [n for n in names if "seg_train" in n]
        folders = [n.rpartition("/")[0] for n in wrong]
        rng.shuffle(folders)
        pairs = enumerate(zip(wrong, folders))
        moved = {name: f"{folder}/shuffled-{k}-{Path(name).name}" for k, (name, folder) in pairs}
        for name in names:
            new.writestr(moved.get(name, name), old.read(name))
    assert len(wrong) > len(names) / 3
    return out


@pytest.mark.slow
def test_a_challenger_of_shuffled_labels_never_passes(waiting, tmp_path):
    "It fails by its accuracy, or without a threshold beside the champion on the same test images, even with --approve."
    assert waiting("approve", "1").status == 0 and waiting("promote", "1").status == 0
    before = waiting("endpoints", "--json").json
    waiting.archive = shuffled(waiting.archive, tmp_path / "shuffled.zip")
    for version, threshold, reason in (("2", "0.0", "worse than champion 1"), ("3", "0.8", "is below 0.8")):
        answer = waiting.run("--param", f"evaluate.min_accuracy={threshold}", "--approve")
        assert answer.status == 1 and reason in answer.out
        run, models = waiting.newest(), waiting("models", "--json").json
        outcome = waiting("report", run["run_id"], "--json").json["became"]
        assert (run["status"], run["model_version"], outcome.split(":")[0]) == ("rejected", version, "Rejected")
        assert [(m["version"], m["status"], m["aliases"]) for m in models[:1]] == [(version, "Rejected", [])]
        assert [waiting(command, version).status for command in ("approve", "promote", "shadow")] == [1, 1, 1]
    assert waiting("endpoints", "--json").json == before


@pytest.mark.slow
def test_commands_go_back_under_load(waiting):
    "Promote, shadow, rollback and reject fail no request of clients meanwhile; a damaged package is not deployed."
    house = waiting
    assert house("approve", "1").status == 0 and house("promote", "1").status == 0
    assert house.run("--param", "train.seed=1", "--approve").status == 0, "another package"
    serving = lambda: {e["stage"]: e["version"] for e in house("endpoints", "--json").json}
    url = next(e["url"] for e in house("endpoints", "--json").json if e["stage"] == "production")
    with Load(url) as load:
        assert house("shadow", "2").status == 0
        shadow = lambda: house("shadow", "--json").json
        wait_until(lambda: shadow()["images"] >= 20)
        assert shadow()["version"] == "2" and shadow()["agreement"] == 1
        assert "version 2 agrees on 100.00%" in house("endpoints").out
        assert house("promote", "2").status == 0 and serving()["production"] == "2"
        assert shadow()["status"] == "stopped", "the promoted version is no shadow any more"
        assert "agrees" not in house("endpoints").out
        began = time.monotonic()
        answer = house("rollback", "production")
        print(f"rollback took {time.monotonic() - began:.1f} s")
        assert answer.status == 0 and "production goes back from version 2 to 1" in answer.out
        assert serving()["production"] == "1"
        assert house("promote", "2").status == 0
        assert house("reject", "2").status == 0 and serving() == {"production": "1", "staging": "1"}
        load.wait_for(20)
    assert load.failures == [] and set(load.versions) == {"1", "2"}
    assert [r["trigger"] for r in house("runs", "--json").json[:2]] == ["reject", "reject"]
    page = house("report", house("models", "--json").json[0]["run_id"])
    assert page.status == 0
    text = (house.executed / house("models", "--json").json[0]["run_id"] / "report.html").read_text()
    assert "As a shadow of production" in text and "Reason: rejected with intel-nb reject" in text

    assert house.run("--param", "evaluate.min_accuracy=0.2").status == 3
    threshold = lambda artifacts: json.loads((artifacts / "evaluation.json").read_text())["gate"]["min_accuracy"]
    (artifacts,) = {path for path in house.home.glob("artifacts/*/artifacts") if threshold(path) == 0.2}
    (artifacts / "package" / "model.onnx").write_bytes(b"no graph")
    failed = house("approve", "3")
    assert failed.status == 1 and serving() == {"production": "1", "staging": "1"}
    assert house("models", "--json").json[0]["aliases"] == [] and house.newest()["status"] == "failed"
