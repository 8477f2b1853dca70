"""The registry with several processes, in a moved workspace, and after a process was killed."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from intel_nb.model import load_package
from intel_nb.registry import Registry, open_registry
from intel_nb.storage import InputError, is_locked, locked, write_text

REGISTER = """
import sys
from pathlib import Path
from intel_nb.registry import open_registry
registry = open_registry(sys.argv[1])
evaluation = {"multiclass_classification_metrics": {"accuracy": {"value": 0.9}}, "fingerprints": {"data": "d"}}
print(registry.register(Path(sys.argv[2]), evaluation, status="PendingManualApproval", reason="", params={}))
"""


def evaluation(accuracy: float) -> dict:
    return {"multiclass_classification_metrics": {"accuracy": {"value": accuracy, "standard_deviation": 0.01}},
            "fingerprints": {"data": "d1"}}


@pytest.fixture(scope="module")
def package(sample_model) -> Path:
    return sample_model


class Finished(NamedTuple):
    "Processes that registered a version each in one fresh registry, and the folder that they ran in."
    folder: Path
    statuses: list[int]
    out: list[str]
    err: list[str]


@pytest.fixture(scope="module")
def finished(package, tmp_path_factory) -> Finished:
    "Two processes at once: creating a database takes seconds, so the other tests copy this one."
    folder = tmp_path_factory.mktemp("fresh")
    command = [sys.executable, "-c", REGISTER, f"sqlite:///{folder}/home/mlflow.db", str(package)]
    started = [subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
               for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in started]
    return Finished(folder, [process.returncode for process in started], *map(list, zip(*answers)))


@pytest.fixture
def registry(finished, tmp_path) -> Registry:
    "A registry that has the versions 1 and 2."
    shutil.copytree(finished.folder / "home", tmp_path / "home")
    return open_registry(f"sqlite:///{tmp_path}/home/mlflow.db")


def register(registry, package, accuracy=0.9, **more) -> str:
    options = {"status": "PendingManualApproval", "reason": "passed", "params": {"seed": 0}}
    return registry.register(package, evaluation(accuracy), **options | more)


def test_an_empty_registry_answers_and_creates_nothing(tmp_path):
    registry = open_registry(f"sqlite:///{tmp_path}/home/mlflow.db")
    assert registry.versions() == []
    assert registry.champion() is None
    with pytest.raises(InputError, match=f"there is no version 1 in {tmp_path}/home; there are: none yet"):
        registry.get("1")
    assert not (tmp_path / "home").exists()


def test_two_processes_share_a_fresh_database(finished):
    assert finished.statuses == [0, 0], finished
    assert sorted(out.strip() for out in finished.out) == ["1", "2"]
    assert finished.err == ["", ""]
    assert [p.name for p in finished.folder.iterdir()] == ["home"], "MLflow must not write into the current folder"
    made = sorted(p.name for p in (finished.folder / "home").iterdir())
    assert made == ["artifacts", "decisions.jsonl", "mlflow.db"]


def test_everything_about_a_version(registry, package, tmp_path):
    before = [v.version for v in registry.versions()]
    predictions = write_text(tmp_path / "predictions.parquet", "rows")
    first = register(registry, package, artifacts=[predictions])
    second = register(registry, package, 0.8, status="Rejected", reason="0.8 is less accurate than the champion")
    newest, older, *earlier = registry.versions()
    assert (newest.version, newest.status, newest.accuracy) == (second, "Rejected", 0.8)
    assert (older.version, older.status, older.accuracy) == (first, "PendingManualApproval", 0.9)
    assert [v.version for v in earlier] == before
    assert registry.predictions(first).read_text() == "rows" and registry.predictions(second) is None
    assert registry.evaluation(second) == evaluation(0.8)
    fingerprint = load_package(package).fingerprint
    assert registry.find(fingerprint).version == second
    assert registry.find(fingerprint, "d1").version == second
    assert registry.find(fingerprint, "d2") is None and registry.find("other") is None
    registry.set_status(first, "Approved", "seen")
    registry.set_alias("staging", first)
    registry.set_alias("production", first)
    registry.set_tag(first, "staging_test", "passed")
    registry.set_tag(first, "run_id", "r1")
    found = registry.get(first)
    assert (found.status, found.reason, found.aliases) == ("Approved", "seen", ["production", "staging"])
    assert (found.staging_test, found.run_id) == ("passed", "r1")
    registry.set_alias("production", second)
    assert registry.champion() is None, "it is rejected"
    assert (registry.get(second).aliases, registry.get(first).aliases) == (["production"], ["staging"])
    with pytest.raises(ValueError, match="is no status"):
        registry.set_status(first, "approved")


def test_a_version_outlives_its_package_and_a_moved_workspace(registry, package, tmp_path):
    copy = Path(shutil.copytree(package, tmp_path / "copy"))
    version = register(registry, copy)
    shutil.rmtree(copy)
    (tmp_path / "home").rename(tmp_path / "elsewhere")
    moved = open_registry(f"sqlite:///{tmp_path}/elsewhere/mlflow.db")
    assert load_package(moved.package(version)).fingerprint == moved.get(version).fingerprint
    later = register(moved, package)
    assert moved.package(later).is_relative_to(tmp_path / "elsewhere")
    assert not (tmp_path / "home").exists()


def test_a_changed_package_is_not_registered(registry, package, tmp_path):
    before = registry.versions()
    copy = Path(shutil.copytree(package, tmp_path / "copy"))
    with open(copy / "labels.json", "a") as f:
        f.write(" ")
    with pytest.raises(InputError, match="labels.json"):
        register(registry, copy)
    assert registry.versions() == before


def test_a_lock_of_a_killed_process_is_free(tmp_path):
    code = ("import sys; from intel_nb.storage import locked\n"
            "with locked(sys.argv[1]): print('held', flush=True); input()")
    path = tmp_path / "x.lock"
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    assert is_locked(path)
    with pytest.raises(BlockingIOError), locked(path, patience=0.05):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    assert not is_locked(path)
    with locked(path, patience=0):
        assert is_locked(path)
    assert not path.exists()
