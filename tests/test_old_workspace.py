"""A workspace that release 0.1.0 left behind opens today: versions, endpoints, runs, captures, and the watcher.

`data/workspace-0.1.0.tar.xz` was made with that release in /srv/intel-nb: a small package registered twice, version 1
on both stages with 20 requests answered in staging, a run `first` that waits for version 2, and a watcher that took
`intel.zip`.
"""
import hashlib
import json
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import House

MADE_IN = "/srv/intel-nb"


@pytest.fixture
def old(tmp_path):
    "The workspace of 0.1.0, moved to where the test runs; its endpoints end with the test."
    with tarfile.open(Path(__file__).parent / "data" / "workspace-0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    for record in tmp_path.rglob("*.json"):
        record.write_text(record.read_text().replace(MADE_IN, str(tmp_path)))
    notes, = (tmp_path / "workspace" / "watch").iterdir()  # named by the inbox that they are about
    notes.rename(notes.with_name(hashlib.sha256(str(tmp_path / "inbox").encode()).hexdigest()[:16]))
    house = House(tmp_path, tmp_path / "inbox" / "intel.zip")
    yield house
    house("stop")


def test_its_records_are_read(old):
    versions, runs, endpoints = (old(name, "--json").json for name in ("models", "runs", "endpoints"))
    assert [(v["version"], v["status"], v["accuracy"], v["images"]) for v in versions] == [
        ("2", "PendingManualApproval", 0.93, None), ("1", "Approved", 0.93, None)]
    assert old("models").out.count("0.930 (n unknown)") == 2
    assert sorted(versions[1]["aliases"]) == ["production", "staging"]
    assert [(r["run_id"], r["status"], r["model_version"]) for r in runs] == [("first", "waiting", "2")]
    assert [(s["name"], s["status"]) for s in runs[0]["steps"]][0] == ("data", "succeeded")
    assert {(e["stage"], e["version"], e["status"]) for e in endpoints} == {
        ("staging", "1", "stopped"), ("production", "1", "stopped")}
    assert [line.split()[3] for line in old("captures").out.splitlines() if line.startswith("staging")] == ["20"]
    assert old("report", "first").status == 0


def test_its_endpoint_goes_on(old):
    "It starts with the old package, answers, and its detector goes on from the 20 observations that it had."
    from intel_nb.images import encode_jpeg
    from intel_nb.scenes import sample_scene
    from intel_nb.serving.endpoints import drift_status, invoke
    assert old("start", "staging", "--new-port").status == 0, "another test may have its port"
    url = next(e["url"] for e in old("endpoints", "--json").json if e["stage"] == "staging")
    assert drift_status(url)["observations"] == 20
    answer = invoke(url, encode_jpeg(sample_scene(0, np.random.default_rng(0))), "image/jpeg")
    assert answer["model"]["version"] == "1" and drift_status(url)["observations"] == 21


def test_its_pending_version_can_still_be_rejected(old):
    assert old("reject", "2", "--reason", "seen again").status == 0
    assert [v["status"] for v in old("models", "--json").json] == ["Rejected", "Approved"]


def test_its_watcher_takes_nothing_twice(old):
    "The upload that 0.1.0 had taken starts no second run."
    import signal
    import subprocess

    from conftest import COMMAND
    command = [COMMAND, "watch", str(old.root / "inbox"), "--rest", "0.1"]
    watcher = subprocess.Popen(command, env=old.environ, cwd=old.root, stdout=subprocess.PIPE, text=True)
    try:
        assert "following" in watcher.stdout.readline()
        (old.root / "inbox" / "annotations").mkdir()
        (old.root / "inbox" / "annotations" / "new.csv").write_text("image,label\n")  # so that it has looked at both
        deadline = time.monotonic() + 30
        while not (started := [r for r in old("runs", "--json").json if r["run_id"] != "first"]):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        batch = json.loads((old.executed / started[0]["run_id"] / "batch.json").read_text())
        assert len(started) == 1 and [event[1] for event in batch["events"]] == ["annotations/new.csv"]
    finally:
        watcher.send_signal(signal.SIGINT)
        try:
            watcher.wait(120)  # the run has 30 s to end, and a busy disk may hold it up
        finally:
            watcher.kill()
