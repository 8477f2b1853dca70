"""Where a version comes from, and whether the same comes again."""

import shutil
import subprocess

import pytest
from conftest import COMMAND, QUICK, House

from intel_nb.model import load_package


def test_a_version_is_traced_to_data_code_and_parameters(staged_once):
    found = staged_once("trace", "1", "--json").json
    (version,) = staged_once("models", "--json").json
    steps = {step["name"]: step for step in staged_once.record("first")["steps"]}
    assert (found["run_id"], found["status"], found["accuracy"]) == ("first", "Approved", version["accuracy"])
    assert {name: step["key"] for name, step in found["steps"].items()} == {
        name: steps[name]["key"] for name in ("data", "train", "evaluate")}
    assert found["steps"]["train"]["parameters"]["bootstraps"] == 2000
    assert found["dataset"] == found["steps"]["train"]["inputs"]["dataset"] == found["steps"]["evaluate"]["inputs"]["dataset"]
    assert found["package"] == load_package(staged_once.home / "store" / "train" / steps["train"]["key"] / "model").fingerprint
    told = staged_once("trace", "1")
    assert told.status == 0 and found["package"] in told.out and f"intel-nb run --data {staged_once.archive}" in told.out


def test_a_trace_outlives_the_store(waiting):
    shutil.rmtree(waiting.home / "store")
    shutil.rmtree(waiting.executed / "first")
    answer = waiting("trace", "1")
    assert answer.status == 0 and "has lost the steps" in answer.out


def test_what_nothing_needs_can_go_and_no_more(waiting):
    "A version that waits keeps what it was made from, however old its run; a rejected one keeps its package and its trace."
    assert waiting("prune", "--keep", "0", "--yes").out.strip() == "nothing can go"
    assert waiting("reject", "1").status == 0
    told = waiting("prune", "--keep", "0")
    assert told.status == 0 and all(step in told.out for step in ("data", "train", "evaluate", "MB can go"))
    assert (waiting.home / "store" / "train").exists() and "nothing can go" in waiting("prune").out
    assert "MB removed" in waiting("prune", "--keep", "0", "--yes").out
    assert list((waiting.home / "store").glob("*/*")) == []
    assert waiting("trace", "1").status == 0
    load_package(next(waiting.home.glob("artifacts/*/artifacts/package")))


def test_a_run_says_which_event_set_it_off(waiting):
    environ = waiting.environ | {"INTEL_NB_CAUSE": "annotations-added: annotations/<fog>.zip"}
    command = [COMMAND, "run", "--data", str(waiting.archive), *QUICK, "--to", "data", "--run-id", "second"]
    assert subprocess.run(command, env=environ, cwd=waiting.root, stdout=subprocess.DEVNULL).returncode == 0
    assert waiting.newest()["run_id"] == "second"
    run = waiting("report", "second", "--json").json
    assert (run["run_id"], run["cause"], run["data"]["same_as"]) == ("second", "annotations-added: annotations/<fog>.zip", "first")
    assert run["became"] == "succeeded, no version"
    assert "annotations/<fog>.zip" in waiting("runs").out
    page = (waiting.executed / "second" / "report.html").read_text()
    assert "annotations/&lt;fog&gt;.zip" in page and "as in first" in page


@pytest.mark.slow
def test_the_same_again_is_the_same_to_the_last_byte(waiting_once, tmp_path):
    "Elsewhere, at another time, from a copy of the archive: one fingerprint, which covers every file of the package."
    shutil.copyfile(waiting_once.archive, tmp_path / "copy.zip")
    other = House(tmp_path, tmp_path / "copy.zip")
    assert other.run("--to", "train").status == 0
    one, two = ({s["name"]: s["result"] for s in house.newest()["steps"]} for house in (waiting_once, other))
    assert one["data"]["fingerprint"] == two["data"]["fingerprint"]
    assert one["train"]["fingerprint"] == two["train"]["fingerprint"]
