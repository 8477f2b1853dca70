"""What a deployment replaces: it is said, and an older version takes the place of a newer one only with consent."""
import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import COMMAND, QUICK, House, copy_of

from intel_nb.chain.plan import Workspace, open_workspace


def workspace_of(house: House) -> Workspace:
    return open_workspace(house.environ)


def put_newer_version(house: House, model: Path) -> House:
    "Register `model` as version 2, approved and tested, and let it serve both stages. Version 1 waits for approval."
    workspace = workspace_of(house)
    registry, endpoints = workspace.registry(), workspace.endpoints()
    evaluation = {"multiclass_classification_metrics": {"accuracy": {"value": 0.9, "images": 60}}}
    version = registry.register(model, evaluation, status="Approved", reason="better", params={})
    registry.set_tag(version, "staging_test", "passed")
    for stage in ("staging", "production"):
        endpoints.deploy(stage, registry.package(version), version)
        registry.set_alias(stage, version)
    return house


@pytest.fixture(scope="module")
def newer_once(waiting_once, twin_model, tmp_path_factory):
    "Version 2 serves, and version 1 waits. It is shared: what is refused here changes nothing."
    house = put_newer_version(copy_of(waiting_once, tmp_path_factory.mktemp("newer")), twin_model)
    yield house
    house("stop")


def state_of(house: House) -> tuple:
    "Return all that a refused command must leave as it is."
    run = {name: value for name, value in house.record("first").items() if name != "finished"}
    runs = sorted(path.name for path in house.executed.iterdir())
    return house("models", "--json").json, house("endpoints", "--json").json, run, runs


def serving(house: House) -> dict[str, str]:
    return {endpoint["stage"]: endpoint["version"] for endpoint in house("endpoints", "--json").json}


def at_terminal(house: House, *arguments: str, answer: str = "", seconds: float = 120) -> tuple[int, str]:
    "Run a command at a terminal, and type `answer` once it asks. Return its exit status and what the terminal showed."
    ours, its = pty.openpty()
    command = subprocess.Popen([COMMAND, *arguments], env=house.environ | {"TERM": "xterm"}, cwd=house.root, stdin=its,
                               stdout=its, stderr=its, start_new_session=True)
    os.close(its)
    shown, deadline, answered = "", time.monotonic() + seconds, not answer
    try:
        while time.monotonic() < deadline:
            if not select.select([ours], [], [], 0.5)[0]:
                continue
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux says so when the other end is closed
                break
            if not part:
                break
            shown += part.decode(errors="replace")
            if not answered and "[y/N]" in shown:
                os.write(ours, answer.encode())
                answered = True
        return command.wait(max(1, deadline - time.monotonic())), shown
    finally:
        command.kill()
        command.wait()
        os.close(ours)


WAYS = {"a new run": ("run", "--approve"), "the run that waits": ("run", "--approve", "--run-id", "first"),
        "approve": ("approve", "1")}


def command_of(house: House, arguments: tuple[str, ...]) -> tuple[str, ...]:
    return (*arguments, "--data", str(house.archive), *QUICK) if arguments[0] == "run" else arguments


@pytest.mark.parametrize("way", WAYS)
def test_an_older_version_is_refused_where_nobody_can_be_asked(newer_once, way):
    before = state_of(newer_once)
    answer = newer_once(*command_of(newer_once, WAYS[way]))
    assert answer.status == 2 and answer.err.startswith("error: staging has version 2, accuracy 0.900 (95 %: "), answer
    assert ", and version 1, accuracy " in answer.err
    assert answer.err.endswith(", is older; --replace puts it there all the same\n")
    assert state_of(newer_once) == before, "version 1 still waits, and the run `first` with it"


@pytest.mark.parametrize("way", ["a new run", "approve"])
def test_a_person_who_says_no_changes_nothing(newer_once, way):
    before = state_of(newer_once)
    status, shown = at_terminal(newer_once, *command_of(newer_once, WAYS[way]), answer="n\n")
    assert status == 1 and shown.count("Replace it with the older version 1, accuracy ") == 1, shown
    assert "staging has version 2, accuracy 0.900 (95 %: " in shown
    assert "error: nothing was replaced; staging stays at version 2" in shown
    assert state_of(newer_once) == before


def test_a_person_who_ends_the_question_changes_nothing(newer_once):
    "Ctrl-D at the question is no answer; Ctrl-C is taken alike."
    before = state_of(newer_once)
    status, shown = at_terminal(newer_once, "approve", "1", answer="\x04")
    assert status == 130 and "interrupted" in shown, shown
    assert state_of(newer_once) == before


def test_a_watcher_never_puts_an_older_version_back(newer_once, tmp_path):
    "The uploaded archive is the one that version 1 was made of. The message of the watcher says all of it."
    house = copy_of(newer_once, tmp_path)
    workspace = workspace_of(house)
    workspace.endpoints().deploy("staging", workspace.registry().package("2"), "2")
    inbox, log = house.root / "inbox", house.root / "watch.log"
    (inbox / "annotations").mkdir(parents=True)
    shutil.copy(house.archive, inbox / "intel.zip")
    with open(log, "w") as out:
        watcher = subprocess.Popen([COMMAND, "watch", "inbox", "--approve", "--rest", "0.2", *QUICK], stdout=out,
                                   stderr=out, env=house.environ, cwd=house.root)
    try:
        deadline = time.monotonic() + 120
        while " is waiting" not in log.read_text():
            assert watcher.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        assert serving(house) == {"staging": "2"}
        run = house.newest()
        assert (run["trigger"], run["status"], run["model_version"]) == ("data-uploaded", "waiting", "1")
        line = next(line for line in log.read_text().splitlines() if " is waiting" in line)
        assert f"run {run['run_id']} is waiting, version 1: accuracy " in line
        assert ": staging has version 2, accuracy 0.900 (95 %: " in line
        assert line.endswith(", is older; --replace puts it there all the same; intel-nb approve 1")
    finally:
        watcher.terminate()
        watcher.wait(30)
        house("stop")


@pytest.fixture
def newer(newer_once, tmp_path):
    "A copy of it with stages of its own, in which version 1 is approved and tested."
    house = copy_of(newer_once, tmp_path)
    workspace = workspace_of(house)
    workspace.registry().set_status("1", "Approved", "as a person decided")
    workspace.registry().set_tag("1", "staging_test", "passed")
    workspace.endpoints().deploy("production", workspace.registry().package("2"), "2")
    yield house
    house("stop")


@pytest.mark.slow
def test_promote_asks_and_says_what_it_replaces(newer):
    refused = newer("promote", "1")
    assert refused.status == 2 and "production has version 2, accuracy 0.900" in refused.err
    assert serving(newer) == {"production": "2"} and [r["run_id"] for r in newer("runs", "--json").json] == ["first"]
    status, shown = at_terminal(newer, "promote", "1", answer="y\n")
    assert status == 0 and serving(newer) == {"production": "1"}, shown
    assert "deploy    production: version 1, accuracy " in " ".join(shown.split(" "))
    assert "replaces version 2, accuracy 0.900" in shown.replace("\r\n", "")
    assert newer("rollback", "production").status == 0, "whoever goes back is not asked"
    assert serving(newer) == {"production": "2"}


@pytest.mark.slow
def test_older_data_again(waiting):
    "The chain runs on data A, on B, and on A again: staging keeps what B gave it until a person wants it otherwise."
    other = ("--param", "evaluate.min_accuracy=0.1")  # another version, of the same package
    answer = waiting("approve", "1")
    assert answer.status == 0 and "staging: version 1, accuracy " in answer.out and ", the first\n" in answer.out
    answer = waiting.run(*other, "--approve")
    assert answer.status == 0 and "staging: version 2, accuracy " in answer.out
    assert ", replaces version 1, accuracy " in answer.out
    before = state_of(waiting)
    for more in ((), ("--approve",), ("--run-id", "third")):
        answer = waiting.run(*more)
        assert answer.status == 2 and "staging has version 2, accuracy " in answer.err
        assert state_of(waiting) == before
    status, shown = at_terminal(waiting, "run", "--data", str(waiting.archive), *QUICK, answer="y\n", seconds=240)
    assert status == 0 and serving(waiting) == {"staging": "1"}, shown
    assert waiting.run(*other).status == 0 and serving(waiting) == {"staging": "2"}, "the newer one needs no consent"
    answer = waiting.run("--run-id", "third", "--replace")
    assert answer.status == 0 and serving(waiting) == {"staging": "1"}
    assert waiting.run("--run-id", "third").status == 0, "with it or without, the parameters are the same"
    assert waiting.record("third")["status"] == "succeeded"


@pytest.mark.slow
def test_a_stage_whose_registry_was_deleted_is_said_and_not_asked_about(waiting, twin_model):
    put_newer_version(waiting, twin_model)
    for name in ("mlflow.db", "decisions.jsonl", "artifacts"):  # without the record, from which it would be made again
        path = waiting.home / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    command = ("run", "--approve", "--data", str(waiting.archive), *QUICK)
    status, shown = at_terminal(waiting, *command, seconds=240)  # MLflow would remember the old one in this process
    assert status == 0 and "replaces version 2 of an earlier registry" in shown.replace("\r\n", ""), shown
    assert "[y/N]" not in shown and serving(waiting) == {"staging": "1", "production": "2"}
