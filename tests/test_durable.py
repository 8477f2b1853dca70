"""What was written is on the disk: bytes before the name, the name before the answer. And clocks decide nothing."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from intel_nb.chain.watch import alarm_events
from intel_nb.evaluate import register_package
from intel_nb.registry import LocalRegistry, append_decision, import_client
from intel_nb.storage import Damaged, sync, write_json

WRITE = "import sys; from intel_nb.storage import write_json; write_json(sys.argv[1], {'a': 1})"


def test_bytes_then_name_then_folder(tmp_path):
    "As the interpreter calls the system. New folders are synced from above."
    calls = []

    def note(frame, event, function):
        if event == "c_call" and function in (os.fsync, os.replace, os.mkdir):
            place = frame.f_locals.get("path", frame.f_locals.get("self", frame.f_locals.get("source", "")))
            calls.append((function.__name__, Path(str(place)).name))
    sys.setprofile(note)
    try:
        write_json(tmp_path / "new" / "deep" / "a.json", {"a": 1})
    finally:
        sys.setprofile(None)
    assert [(name, re.sub(r"^\.a\.json\..*", "aside", place)) for name, place in calls] == [
        ("mkdir", "new"), ("fsync", tmp_path.name), ("mkdir", "deep"), ("fsync", "new"), ("fsync", "aside"),
        ("replace", "aside"), ("fsync", "deep")]


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_bytes_then_name_then_folder_in_the_systems_own_words(tmp_path):
    trace = tmp_path / "trace"
    path = tmp_path / "new" / "a.json"
    subprocess.run(["strace", "-f", "-y", "-o", trace, "-e", "trace=fsync,fdatasync,rename,renameat,renameat2,mkdir",
                    sys.executable, "-c", WRITE, path], check=True)
    calls = re.findall(r"(fsync|rename|mkdir)\w*\((.*)", trace.read_text())
    seen = [(name, re.sub(r"\.a\.json\.[\w.]+", "ASIDE", where)) for name, where in calls if str(tmp_path) in where]
    assert [name for name, _ in seen] == ["mkdir", "fsync", "fsync", "rename", "fsync"]
    assert "ASIDE" in seen[2][1] and seen[4][1].split(">")[0].endswith("new")


def test_a_sync_that_fails_is_a_write_that_failed():
    with pytest.raises(OSError):
        sync("/dev/zero")  # the system refuses to sync it


def test_mlflow_waits_for_the_disk(empty_database, tmp_path):
    "SQLite's synchronous is FULL (2) in the connections that MLflow opens."
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    store = import_client()(tracking_uri=uri, registry_uri=uri)._get_registry_client().store
    with store.engine.connect() as connection:
        assert connection.exec_driver_sql("pragma synchronous").scalar() >= 2


def test_an_alarm_of_a_clock_that_was_ahead_hides_none(tmp_path):
    "The clock was a year ahead, an alarm was told, and the clock was set right."
    alarms = tmp_path / "production" / "state" / "alarms"
    told = write_json(alarms / "2027-01-31T120000Z-00000040.json", {}).stem
    write_json(alarms / "2026-01-31T120000Z-00000055.json", {})
    assert [e.id[:4] for e in alarm_events(tmp_path, {"production": [told]})] == ["2026"]
    assert [e.id[-2:] for e in alarm_events(tmp_path, {})] == ["40", "55"], "by the number of observations"


def test_lines_are_in_the_order_in_which_they_were_written(tmp_path, monkeypatch):
    import intel_nb.registry as registry
    for now in ("2027-01-01T00:00:00Z", "2026-01-01T00:00:00Z"):
        monkeypatch.setattr(registry, "utc_now", lambda now=now: now)
        append_decision(tmp_path / "decisions.jsonl", "reject" if now > "2027" else "withdraw", fingerprint="f",
                        status="Rejected")
    assert registry.read_decisions(tmp_path / "decisions.jsonl").rejection("f") is None, "it was withdrawn last"


@pytest.fixture
def registry(empty_database, tmp_path):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return LocalRegistry(tmp_path / "mlflow.db")


def report(passed: bool, min_accuracy: float, champion: str = "") -> dict:
    return {"multiclass_classification_metrics": {"accuracy": {"value": .85}}, "images": 100,
            "fingerprints": {"data": "d", "package": ""},
            "gate": {"passed": passed, "min_accuracy": min_accuracy, "champion": champion, "reason": f"{min_accuracy}"}}


def test_a_verdict_belongs_to_package_threshold_and_champion(registry, package):
    register = lambda *gate: register_package(registry, package, report(*gate), {}, [])
    assert register(False, .9) == register(False, .9) == "1"
    assert register(True, .8) == "2" and registry.get("2").status == "PendingManualApproval"
    assert "version 1 is the same package and was rejected" in registry.get("2").reason
    assert register(False, .9, "2") == "3", "beside another champion it might have passed"
    registry.set_status("2", "Rejected", "it takes fog for sea")
    assert register(True, .7) == "4"
    assert (registry.get("4").status, registry.get("4").reason) == ("Rejected", "it takes fog for sea")
    registry.set_status("2", "PendingManualApproval", "it was the camera")
    assert [registry.get(v).status for v in "1234"] == ["Rejected", "PendingManualApproval"] * 2


@pytest.mark.slow
def test_a_database_that_was_deleted_is_made_again_before_it_is_written_to(registry, package, twin_model):
    "Numbers that would begin at 1 again would take over what was decided about others."
    register = lambda folder: registry.register(folder, report(True, .8), status="PendingManualApproval",
                                                reason="passed", params={})
    assert [register(package.path), register(twin_model)] == ["1", "2"]
    registry.set_status("1", "Approved", "good")
    registry.set_status("2", "Rejected", "it takes fog for sea")
    registry.set_alias("production", "1", "promote")
    registry.database.unlink()
    known = [("2", "Rejected", []), ("1", "Approved", ["production"])]
    assert [(v.version, v.status, v.aliases) for v in registry.versions()] == known
    with pytest.raises(Damaged, match="is missing; intel-nb check --repair makes it again"):
        register(twin_model)
    registry.set_status("1", "Rejected", "a person can reject what serves all the same")
    assert registry.rebuild() == 2 and registry.get("1").status == "Rejected"


@pytest.mark.slow
def test_a_shard_that_has_lost_a_bit_is_made_again(waiting):
    (shard,) = waiting.home.glob("store/data/*/dataset/test-*.parquet")
    before = hashlib.sha256(shard.read_bytes()).hexdigest()
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    answer = waiting.run("--param", "evaluate.min_accuracy=0.1", "--to", "evaluate")
    assert answer.status in (0, 3) and "is damaged; data is done again" in answer.out, answer
    (shard,) = waiting.home.glob("store/data/*/dataset/test-*.parquet")
    assert hashlib.sha256(shard.read_bytes()).hexdigest() == before
