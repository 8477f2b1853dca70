"""What once went wrong: a rejected version that was served, commands that were killed, files that were swapped."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from intel_nb.chain.mending import find_all_differences
from intel_nb.registry import record_of
from intel_nb.serving.supervisor import StageRequest, is_alive, read_record, read_request
from intel_nb.storage import is_locked, write_checked

from .harness import copy_house, deploy_first


@pytest.fixture
def house(three_packages, tmp_path):
    "Version 1 serves in both stages; 2 and 3 are other packages, approved and tested."
    house = deploy_first(copy_house(tmp_path, three_packages))
    yield house
    house("stop")
    assert house.strangers() == []


def serves(house, stage: str = "production") -> str:
    return house.serving().get(stage, ("", ""))[0]


def folder_of(house, stage: str = "production"):
    return house.root / "workspace" / "endpoints" / stage


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def test_a_rejection_while_the_version_is_promoted(house):
    "The deployment has read that the version is approved, and the new worker is being started."
    promoting = house.begin("promote", "2")
    wait_for(lambda: (read_request(folder_of(house)) or StageRequest("", "")).version == "2")
    assert house("reject", "2", "--reason", "it takes fog for sea").status == 0
    ended = house.end(promoting, ("promote", "2"))
    assert ended.status != 0 or serves(house) == "1"
    assert serves(house) == "1" and house.statuses()["2"] == "Rejected"
    assert house("start", "production").status == 0 and house.violated() == []


def test_a_rejection_that_was_killed_after_its_record(house):
    assert house("promote", "2").status == 0 and serves(house) == "2"
    house.workspace.registry().decide("2", "Rejected", "it takes fog for sea")
    assert "production serves version 2, which is rejected" in house("models").err
    assert "goes back to version 1" in house("start", "staging").err, "the next command that acts has mended it"
    assert serves(house) == "1" and house.violated() == []


@pytest.mark.slow
def test_a_damaged_record_of_another_run_is_in_nobodys_way(house):
    assert house("promote", "2").status == 0
    path = house.root / "executed" / "first" / "run.json"
    path.write_bytes(path.read_bytes().replace(b"succeeded", b"succeedee", 1))
    assert house("reject", "2").status == 0 and serves(house) == "1"
    said = house("runs")
    assert said.status == 0 and "first/run.json is damaged" in said.err and "reject" in said.out
    assert house("check", "--repair").status == 0 and house("runs").err == ""


@pytest.mark.slow
def test_the_champion_is_approved(house):
    "A stage that was stopped keeps its alias, until the version is rejected."
    registry = house.workspace.registry()
    assert registry.champion().version == "1"
    assert house("stop", "production").status == 0 and registry.champion().version == "1"
    assert house("reject", "1").status == 0
    assert registry.champion() is None and registry.get("1").aliases == []
    assert house("start", "production").status == 1 and house.serving() == {}


@pytest.mark.slow
def test_a_rejection_is_of_the_package_until_it_is_withdrawn(house):
    assert house("reject", "2", "--reason", "it takes fog for sea").status == 0
    for command in ("approve", "promote", "shadow"):
        assert house(command, "2").status == 1
    assert house("withdraw", "3").status == 1, "nobody rejected it"
    assert house("withdraw", "2", "--reason", "it was the camera").status == 0
    assert house.statuses()["2"] == "PendingManualApproval"
    acts = [(line.act, line.reason) for line in house.workspace.registry().record().lines][-2:]
    assert acts == [("reject", "it takes fog for sea"), ("withdraw", "it was the camera")]
    said = house("audit")
    assert said.status == 0 and "it was the camera" in said.out and "none changed" in said.out


def test_a_shadow_that_was_killed_is_found_and_ended(house):
    "Its process was started, and nothing named it yet."
    endpoints = house.workspace.endpoints()
    endpoints.shadows("production").deploy("production", house.workspace.registry().package("2"), "2")
    shadow = folder_of(house) / "shadow" / "production"
    assert is_alive(shadow) and "a shadow of production runs that nothing names" in house("endpoints").err
    assert house("stop").status == 0
    assert not is_alive(shadow) and house.strangers() == []


@pytest.mark.parametrize("is_approved", [True, False])
def test_a_deployment_that_was_killed_goes_forward_or_back(house, is_approved):
    "The request was written, and the supervisor has not heard of it."
    registry = house.workspace.registry()
    found = registry.get("2")
    if not is_approved:
        registry.set_status("2", "Rejected", "seen again")
        registry.set_status("2", "PendingManualApproval", "withdrawn")
    request = StageRequest(str(registry.package("2")), "2", fingerprint=found.fingerprint)
    write_checked(folder_of(house) / "request.json", request)
    assert "the change to version 2 was cut off" in house("endpoints").err
    said = house("start", "staging")
    assert ("is carried out" if is_approved else "is taken back") in said.err
    assert serves(house) == ("2" if is_approved else "1") and house.violated() == []


@pytest.mark.slow
def test_the_package_of_one_version_where_anothers_lies(house):
    registry = house.workspace.registry()
    mine, other = registry.package("1"), registry.package("2")
    assert house("stop").status == 0
    shutil.rmtree(mine)
    shutil.copytree(other, mine)
    for command in (("start", "production"), ("promote", "1"), ("predict", "--version", "1", "x.jpg"), ("export", "1")):
        said = house(*command)
        assert said.status in (1, 2) and "another" in said.err, said
    assert house.serving() == {}


@pytest.mark.slow
def test_a_worker_that_dies_comes_back_with_what_was_approved_alone(house):
    package = house.workspace.registry().package("1")
    shutil.move(package, package.with_name("kept"))
    shutil.copytree(house.workspace.registry().package("2"), package)
    pid = house.workspace.endpoints().describe("production").pid
    (worker, *_) = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: not is_alive(folder_of(house)))
    assert "holds another package than the one that was approved" in (folder_of(house) / "supervisor.log").read_text()


@pytest.mark.slow
def test_a_missing_registry_starts_only_what_was_approved(house):
    "The approval is kept with the stage. A stage of an earlier version has none."
    assert house("stop").status == 0
    database = house.workspace.registry().database
    for path in (database, record_of(database)):
        path.rename(path.with_name(f"elsewhere-{path.name}"))
    assert house("start", "production").status == 0 and serves(house) == "1"
    assert house("stop").status == 0
    record = json.loads((folder_of(house) / "endpoint.json").read_text())
    for name in ("endpoint.json", ".endpoint.json"):
        older = {k: v for k, v in record.items() if k not in ("fingerprint", "check")}
        (folder_of(house) / name).write_text(json.dumps(older))
    said = house("start", "production")
    assert said.status == 1 and "nobody can say whether it was approved" in said.err


@pytest.mark.slow
def test_a_port_that_another_program_has_taken(house):
    url = read_record(folder_of(house)).url
    assert house("stop", "production").status == 0
    with socket.create_server(("127.0.0.1", int(url.rpartition(":")[2]))):
        said = house("start", "production")
        assert said.status == 1 and "is taken by process" in said.err and "--new-port" in said.err
        assert house("start", "production", "--new-port").status == 0
    assert read_record(folder_of(house)).url != url


@pytest.mark.slow
def test_a_tail_that_was_cut_off_the_record_shows(house):
    "MLflow has number and hash of the last line."
    assert house("reject", "3").status == 0
    path = record_of(house.workspace.registry().database)
    lines = path.read_text().splitlines(keepends=True)
    cut = next(k for k, line in enumerate(lines) if '"act": "reject"' in line)
    path.write_text("".join(lines[:cut]))
    assert house("audit").status == 1 and house.statuses()["3"] == "Rejected"
    assert "lacks lines" in " ".join(map(str, find_all_differences(house.workspace)))
    assert house("check", "--repair").status == 0
    assert house.statuses()["3"] == "Rejected" and house("audit").status == 0


def test_looking_imports_nothing_that_takes_seconds(house):
    "In a process of its own, as `models` and `endpoints` look."
    code = ("import sys\nfrom intel_nb.chain.mending import find_differences\n"
            "from intel_nb.chain.plan import open_workspace\nassert list(find_differences(open_workspace())) == []\n"
            "print(*{'mlflow', 'torch', 'numpy', 'papermill', 'pandas'} & set(sys.modules))")
    looked = subprocess.run([sys.executable, "-c", code], env=os.environ | house.environ, capture_output=True,
                            text=True)
    assert (looked.returncode, looked.stdout) == (0, "\n"), looked.stderr


@pytest.mark.slow
def test_a_run_is_cancelled_and_leaves_no_process(house):
    running = house.begin("run", "--param", "train.seed=5", "--run-id", "long")
    path = house.root / "executed" / "long" / ".lock"
    wait_for(path.exists)
    time.sleep(1)
    assert house("cancel", "long").status == 0
    assert house.end(running, ("run",)).status == 130
    assert json.loads((path.parent / "run.json").read_text())["status"] == "failed"
    assert house("cancel", "long").status == 2 and house("logs", "staging").status == 0
    house.settle()


def database_of(house) -> Path:
    return house.root / "workspace" / "mlflow.db"


def without_last_line(house) -> None:
    path = record_of(database_of(house))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.slow
def test_a_lost_rejection_is_not_covered_by_the_next_one(house):
    "The record comes back as it was a minute ago; MLflow's head is the only witness, until it is mended."
    assert house("reject", "2", "--reason", "it takes fog for sea").status == 0
    without_last_line(house)
    assert house("reject", "3").status == 0
    said = house("models")
    assert house.statuses()["2"] == "Rejected" and "lacks lines" in said.err and said.status == 0
    assert house("audit").status == 1 and house("promote", "2").status != 0
    assert house("check", "--repair").status == 0, house.log
    assert house.statuses() == {"1": "Approved", "2": "Rejected", "3": "Rejected"}
    assert house("audit").status == 0 and house.violated() == []


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"\0" * 9000])
def test_a_record_that_was_emptied_is_put_aside(house, content):
    path = record_of(database_of(house))
    path.write_bytes(content)
    assert house("reject", "2").status == 0 and house("check").status == 1
    repaired = house("check", "--repair")
    assert repaired.status == 0 and "lost" in repaired.out, repaired
    assert house.statuses() == {"1": "Approved", "2": "Rejected", "3": "Approved"}
    assert list(path.parent.glob("decisions.jsonl.damaged-*"))


@pytest.mark.slow
def test_a_rejection_while_a_stage_starts(house):
    "The command that starts has been delayed before it had the stage."
    assert house("promote", "2").status == 0 and house("stop", "production").status == 0
    code = "import sys; from intel_nb.storage import locked\nwith locked(sys.argv[1]): sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code, folder_of(house) / "request.lock"], stdin=subprocess.PIPE)
    wait_for(lambda: is_locked(folder_of(house) / "request.lock"))
    starting = house.begin("start", "production")
    time.sleep(2)
    house.workspace.registry().decide("2", "Rejected", "it takes fog for sea")
    holder.kill()
    holder.wait()
    assert house.end(starting, ("start", "production")).status != 0 and serves(house) == ""


@pytest.mark.slow
@pytest.mark.parametrize("lost", [["endpoint.json", ".endpoint.json"], ["supervisor.lock"], ["request.json"]])
def test_a_rejection_reaches_a_stage_that_has_lost_files(house, lost):
    assert house("promote", "2").status == 0
    for name in lost:
        path = folder_of(house) / name
        path.write_bytes(b"") if "endpoint" in name else path.unlink()
    if lost == ["supervisor.lock"]:
        wait_for(lambda: is_alive(folder_of(house)), 10)  # its process takes it again
    if lost == ["request.json"]:  # the command was cut off after its line
        house.workspace.registry().decide("2", "Rejected", "it takes fog for sea")
        assert "serves version 2, which is rejected" in house("models").err
        assert house("start", "staging").status == 0
    else:
        assert house("reject", "2").status == 0, house.log
    assert serves(house) == "1" and house.violated() == []


@pytest.mark.slow
def test_a_folder_that_was_removed_below_a_stage(house):
    while folder_of(house).exists():  # whoever serves writes in it meanwhile
        shutil.rmtree(folder_of(house), ignore_errors=True)
    wait_for(lambda: is_alive(folder_of(house)), 10)
    assert "production is stopped" in house("stop").out and house.strangers() == []


@pytest.mark.slow
def test_rows_that_the_database_has_lost(house):
    "An older copy was restored: what serves can be rejected, and no number is given twice."
    import sqlite3
    assert house("promote", "3").status == 0
    with sqlite3.connect(database_of(house)) as db:
        for table in ("registered_model_aliases", "model_version_tags", "model_versions"):
            db.execute(f"delete from {table} where version = 3")
    assert "lacks version 3" in house("models").err and house.statuses()["3"] == "Approved"
    assert house("reject", "3").status == 0 and serves(house) == "1"
    assert house("check", "--repair").status == 0 and house.copies_agree() == []
    assert house.statuses() == {"1": "Approved", "2": "Approved", "3": "Rejected"}


@pytest.mark.slow
def test_a_database_that_is_missing_is_made_again(house):
    assert house("promote", "2").status == 0
    database_of(house).unlink()
    said = house("models")
    assert said.status == 0 and "is missing" in said.err and "Approved" in said.out
    assert house("reject", "2").status == 0 and serves(house) == "1"
    assert house("check").status == 0 and house.violated() == [] == house.copies_agree()


@pytest.mark.slow
def test_a_rejected_version_stays_away_without_a_registry(house):
    assert house("promote", "2").status == 0 and house("stop", "production").status == 0
    assert house("reject", "2").status == 0
    database_of(house).unlink()
    record_of(database_of(house)).unlink()
    said = house("start", "production")
    assert said.status != 0 and "was rejected" in said.err and serves(house) == ""


@pytest.mark.slow
def test_nobody_serves_a_rejected_version_by_its_number(house):
    assert house("reject", "2").status == 0
    said = house("serve", "2", "--port", "0")
    assert said.status == 1 and "is rejected" in said.err
    assert "is rejected" in house("predict", "--version", "2", "nothing.jpg").err


@pytest.mark.slow
def test_an_evaluation_is_copied_again(house):
    files = database_of(house).parent / "artifacts" / house.workspace.registry().get("1").tracking_run / "artifacts"
    (files / "evaluation.json").write_bytes(b"{}")
    (files / "predictions.parquet").unlink()
    assert house("check").status == 1
    assert house("check", "--repair").status == 0, house.log
    assert house("check").status == 0
