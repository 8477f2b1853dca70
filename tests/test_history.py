"""Where a version comes from, and whether the same comes again."""

import shutil
import subprocess

import pytest
from conftest import COMMAND, QUICK, House

from intel_nb.model import load_package


def test_a_version_is_traced_to_data_code_and_parameters(waiting_once):
    found = waiting_once("trace", "1", "--json").json
    (version,) = waiting_once("models", "--json").json
    steps = {step["name"]: step for step in waiting_once.record("first")["steps"]}
    assert (found["run_id"], found["status"]) == ("first", "PendingManualApproval")
    assert found["accuracy"] == version["accuracy"]
    origins = found["steps"]
    assert {name: origin["key"] for name, origin in origins.items()} == {
        name: steps[name]["key"] for name in ("data", "train", "evaluate")}
    assert origins["train"]["parameters"]["bootstraps"] == 2000
    assert found["dataset"] == origins["train"]["inputs"]["dataset"] == origins["evaluate"]["inputs"]["dataset"]
    package = waiting_once.home / "store" / "train" / steps["train"]["key"] / "model"
    assert found["package"] == load_package(package).fingerprint
    text = waiting_once("trace", "1")
    assert text.status == 0 and found["package"] in text.out
    assert f"intel-nb run --data {waiting_once.archive}" in text.out


def test_a_trace_outlives_the_store(waiting):
    shutil.rmtree(waiting.home / "store")
    shutil.rmtree(waiting.executed / "first")
    answer = waiting("trace", "1")
    assert answer.status == 0 and "has lost the steps" in answer.out


def test_prune_removes_what_nothing_needs(waiting):
    "A version that waits keeps what it was made from, however old its run. A rejected one keeps its package and trace."
    assert waiting("prune", "--keep", "0", "--yes").out == f"nothing can go from {waiting.home / 'store'}\n"
    assert waiting("reject", "1").status == 0
    listed = waiting("prune", "--keep", "0")
    assert listed.status == 0 and all(step in listed.out for step in ("data", "train", "evaluate", "MB can go"))
    assert (waiting.home / "store" / "train").exists() and "nothing can go" in waiting("prune").out
    assert "MB removed" in waiting("prune", "--keep", "0", "--yes").out
    assert list((waiting.home / "store").glob("*/*")) == []
    assert waiting("trace", "1").status == 0
    load_package(next(waiting.home.glob("artifacts/*/artifacts/package")))


def test_a_run_records_the_event_that_started_it(waiting):
    environ = waiting.environ | {"INTEL_NB_CAUSE": "annotations-added: annotations/<fog>.zip"}
    command = [COMMAND, "run", "--data", str(waiting.archive), *QUICK, "--to", "data", "--run-id", "second"]
    assert subprocess.run(command, env=environ, cwd=waiting.root, stdout=subprocess.DEVNULL).returncode == 0
    assert waiting.newest()["run_id"] == "second"
    run = waiting("report", "second", "--json").json
    assert (run["run_id"], run["cause"]) == ("second", "annotations-added: annotations/<fog>.zip")
    assert run["data"]["same_as"] == "first"
    assert run["became"] == "succeeded, no version"
    assert "annotations/<fog>.zip" in waiting("runs").out
    page = (waiting.executed / "second" / "report.html").read_text()
    assert "annotations/&lt;fog&gt;.zip" in page and "It is the data of run first" in page


@pytest.mark.slow
def test_the_same_again_is_the_same_to_the_last_byte(waiting_once, tmp_path):
    "In another place, at another time, from a copy of the archive: the fingerprint of the package is the same."
    shutil.copyfile(waiting_once.archive, tmp_path / "copy.zip")
    other = House(tmp_path, tmp_path / "copy.zip")
    assert other.run("--to", "train").status == 0
    one, two = ({s["name"]: s["result"] for s in house.newest()["steps"]} for house in (waiting_once, other))
    assert one["data"]["fingerprint"] == two["data"]["fingerprint"]
    assert one["train"]["fingerprint"] == two["train"]["fingerprint"]
