"""The chain: which steps run again, which requests are refused, and how a stopped run continues."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import COMMAND, QUICK

from intel_nb.chain.execution import WORK_VARIABLE
from intel_nb.chain.parameters import read_parameters
from intel_nb.chain.plan import MOVE, PLAN, notebooks_folder
from intel_nb.storage import tree_digest, write_json

STEPS = [step.name for step in PLAN]


# The plan and the notebooks


@pytest.mark.parametrize("step", PLAN, ids=STEPS)
def test_a_step_declares_what_the_chain_supplies(step):
    declared = read_parameters(notebooks_folder() / step.notebook)
    assert {*step.sources, *step.files, *step.values, *step.places, "out_dir"} <= set(declared)
    assert "any" not in {parameter.type for parameter in declared.values()}, "a None needs a type in PROFILES"


def test_the_chain_knows_which_weights_are_no_file():
    from intel_nb.training.backbone import WEIGHTS
    assert PLAN[STEPS.index("train")].words == WEIGHTS


@pytest.mark.parametrize("step", PLAN, ids=STEPS)
def test_papermill_sees_the_same_parameters(step):
    from papermill import inspect_notebook
    notebook = notebooks_folder() / step.notebook
    assert set(inspect_notebook(str(notebook))) == set(read_parameters(notebook))


def test_a_move_declares_version_and_stage():
    assert {"version", "stage", "engine", "back"} <= set(read_parameters(notebooks_folder() / MOVE[0].notebook))


# Taken from the store


def test_a_run_that_waits(waiting):
    run = waiting.record("first")
    assert list(run) == ["run_id", "status", "started", "finished", "trigger", "model_version", "endpoint", "steps",
                         "cause", "check"]
    assert (run["status"], run["trigger"], run["model_version"], run["endpoint"]) == ("waiting", "run", "1", None)
    assert [step["status"] for step in run["steps"]] == ["succeeded"] * 3 + ["skipped"] * 3
    assert list(run["steps"][0]) == ["name", "notebook", "status", "seconds", "key", "out_dir", "result"]
    for step in run["steps"][:3]:
        assert json.loads((Path(step["out_dir"]) / "result.json").read_text()) == step["result"]
        assert (waiting.executed / "first" / step["notebook"]).is_file()
    assert "evaluate" in (waiting.executed / "first" / "report.html").read_text()


def test_the_digest_that_the_data_step_gives_is_that_of_its_dataset(waiting):
    step = waiting.record("first")["steps"][0]
    folder = waiting.home / "store" / "data" / step["key"]
    digests = json.loads((folder / ".step.json").read_text())["digests"]
    assert digests == {"dataset": tree_digest(folder / step["result"]["dataset"])}


def test_unchanged_steps_do_not_run_again(waiting, tmp_path):
    assert waiting.run().status == 3
    assert list(waiting.statuses().values()) == ["cached"] * 3 + ["skipped"] * 3
    shutil.copyfile(waiting.archive, tmp_path / "moved.zip")
    waiting.archive = tmp_path / "moved.zip"
    assert waiting.run("--to", "train").status == 0
    assert list(waiting.statuses().values()) == ["cached"] * 2 + ["skipped"] * 4
    notebooks = sorted(p.name for p in (waiting.executed / waiting.newest()["run_id"]).glob("*.ipynb"))
    assert notebooks == ["00_data.ipynb", "01_train.ipynb"], "a run shows the notebooks of what it took from the store"


def test_a_parameter_of_evaluate_leaves_data_and_train_alone(waiting):
    "A network that sees eight pixels passes a low gate, and no high one."
    blind = ["--param", "train.image_size=8", "--param"]
    assert waiting.run(*blind, "evaluate.min_accuracy=0").status == 3
    assert waiting.run(*blind, "evaluate.min_accuracy=1").status == 1
    run = waiting.newest()
    assert [step["status"] for step in run["steps"]] == ["cached", "cached", "succeeded"] + ["skipped"] * 3
    assert (run["status"], run["model_version"]) == ("rejected", "3")
    assert waiting.run(*blind, "evaluate.min_accuracy=1", "--approve").status == 1, "--approve revives nothing"
    assert waiting.statuses()["evaluate"] == "cached"
    assert [v["status"] for v in waiting("models", "--json").json] == ["Rejected"] + ["PendingManualApproval"] * 2


def test_a_version_that_the_registry_lost_is_registered_again(waiting):
    (waiting.home / "mlflow.db").unlink()
    (waiting.home / "decisions.jsonl").unlink()
    assert waiting.run().status == 3
    assert waiting.statuses()["evaluate"] == "succeeded"
    assert [v["version"] for v in waiting("models", "--json").json] == ["1"]


@pytest.mark.slow
def test_a_database_that_is_lost_is_made_again_from_the_record(waiting):
    (waiting.home / "mlflow.db").unlink()
    answer = waiting.run()
    assert answer.status == 3 and "1 versions are made anew from the record" in answer.err
    assert waiting.statuses()["evaluate"] == "cached"
    assert [v["version"] for v in waiting("models", "--json").json] == ["1"]


def test_a_named_run_continues_only_with_the_same_parameters(waiting):
    before = waiting.record("first")
    assert waiting.run("--run-id", "first").status == 3
    assert waiting.record("first")["steps"] == before["steps"], "a step that the run itself did keeps its record"
    answer = waiting.run("--run-id", "first", "--param", "train.seed=1")
    assert answer.status == 2 and "other parameters" in answer.err
    assert waiting.record("first")["status"] == "waiting"


def test_from_repeats_a_step(waiting):
    assert waiting.run("--from", "evaluate").status == 3
    assert list(waiting.statuses().values())[:3] == ["cached", "cached", "succeeded"]
    assert [v["version"] for v in waiting("models", "--json").json] == ["1"], "the same package keeps its version"


# Wrong input


WRONG = {
    ("--param", "train.lerning_rate=1"): "learning_rate",
    ("--param", "trian.seed=1"): "train",
    ("--param", "train.seed=one"): "train.seed takes an int",
    ("--param", "evaluate.register=yes"): "takes a bool",
    ("--param", "train.dataset=d"): "filled in by the chain",
    ("--param", "deploy.stage=production"): "filled in by the chain",
    ("--param", "seed=1"): "step.name=value",
    ("--profile", "quik"): "did you mean quick?",
    ("--from", "evaluat"): "did you mean evaluate?",
    ("--to", "end"): "no step end",
    ("--run-id", "../up"): "will not do",
    ("--engine", "cloud"): "cloud",
    ("--param", "deploy.engine=cloud"): "cloud",
    ("--from", "train"): "leave --from out",
    ("--data", "no-such.zip"): "no-such.zip does not exist",
    ("--annotations", "labels.zip"): "labels.zip does not exist",
}


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_wrong_request_ends_at_once_and_leaves_nothing(empty, arguments):
    answer = empty("run", *arguments)
    assert answer.status == 2
    assert WRONG[arguments] in answer.err and answer.err.startswith("error: ") and "Traceback" not in answer.err
    assert answer.out == ""
    assert list(empty.root.iterdir()) == []


def test_a_wrong_archive_ends_with_the_sentence_of_the_step(empty):
    cut = empty.root / "cut.zip"
    cut.write_bytes(empty.archive.read_bytes()[:5000])
    answer = empty("run", "--data", "cut.zip")
    assert answer.status == 2 and "cut.zip" in answer.err and "Traceback" not in answer.err
    assert len(answer.err.strip().splitlines()) == 1
    assert [p.name for p in empty.root.iterdir()] == ["cut.zip"]


# Killed, interrupted, at the same time: with two small notebooks


KERNEL = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
SMALL = {
    "a.ipynb": ['out_dir = ""  # str: outputs',
                "from pathlib import Path\nfrom intel_nb.storage import tree_digest, write_json",
                "write_json(Path(out_dir) / 'n.json', 3)\nwrite_json(Path(out_dir) / 'result.json', {'n': 'n.json'})"],
    # This step counts its attempts in the checkpoint folder, and waits for a file before it ends.
    "b.ipynb": ['n = ""  # str: a file\ngate = ""  # str: a file\nout_dir = ""  # str: outputs\n'
                'checkpoint_dir = ""  # str: attempts',
                "import time\nfrom pathlib import Path\nfrom intel_nb.storage import read_json, write_json",
                "tries = Path(checkpoint_dir) / 'tries'\n"
                "tries.write_text(tries.read_text() + 'x' if tries.exists() else 'x')\n"
                "write_json(Path(out_dir) / 'begun.json', 1)\n"
                "assert len(list(Path(out_dir).iterdir())) == 1\n"
                "while not Path(gate).exists(): time.sleep(0.02)",
                "write_json(Path(out_dir) / 'result.json', {'tries': len(tries.read_text()), 'n': read_json(n)})"],
}
RUN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
import sys
from pathlib import Path
from intel_nb.chain.run import run_chain
from intel_nb.chain.plan import RunRequest, Step, Workspace
plan = (Step("a", "a.ipynb"), Step("b", "b.ipynb", files={"n": ("a", "n")}))
root = Path(sys.argv[1])
request = RunRequest({"b": {"gate": str(root / "gate")}}, run_id=sys.argv[2])
run = run_chain(Workspace(root / "home", root / "executed", root / "nbs"), request, plan)
print([step.status for step in run.steps], run.step("b").result)
"""


@pytest.fixture
def small(tmp_path):
    "A function that starts a run of two small notebooks in a process."
    for name, sources in SMALL.items():
        cells = [{"cell_type": "code", "id": f"c{i}", "metadata": {"tags": [] if i else ["parameters"]},
                  "source": source, "outputs": [], "execution_count": None} for i, source in enumerate(sources)]
        if name == "b.ipynb":
            cells.insert(1, {"cell_type": "markdown", "id": "run", "metadata": {}, "source": "## Run"})
        write_json(tmp_path / "nbs" / name, {"cells": cells, "metadata": KERNEL, "nbformat": 4, "nbformat_minor": 5})
    started = []

    def start(run_id: str) -> subprocess.Popen:
        started.append(subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path), run_id], start_new_session=True,
                                        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return started[-1]

    start.root = tmp_path
    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(found, patience: float = 60):
    "Return what `found` returns, as soon as it is true."
    deadline = time.monotonic() + patience
    while not (value := found()):
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)
    return value


def kernels(root: Path) -> list[int]:
    "Return the pids of living kernels whose working folder is below `root`."
    import psutil
    found = []
    for process in psutil.process_iter():
        try:
            kernel = "ipykernel_launcher" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
            if kernel and process.environ().get(WORK_VARIABLE, "").startswith(str(root)):
                found.append(process.pid)
        except psutil.Error:
            pass
    return found


def has_begun(root: Path) -> list[Path]:
    "Return the files that step b has written at its start."
    return list(root.glob("home/store/.work/b-*/out/begun.json"))


def test_a_killed_run_continues(small):
    from intel_nb.chain.runs import read_run
    killed = small("mine")
    wait_for(lambda: has_begun(small.root))
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    dead = read_run(small.root / "executed", "mine")
    assert (dead.status, [step.status for step in dead.steps]) == ("failed", ["succeeded", "failed"])
    (small.root / "gate").touch()
    out, err = small("mine").communicate(timeout=60)
    assert out.strip() == "['succeeded', 'succeeded'] {'tries': 2, 'n': 3}", err
    assert kernels(small.root) == []
    assert list(small.root.glob("home/store/.work/*")) == []


def test_a_closed_pipe_stops_no_work(empty):
    "Close the output as `intel-nb rollback production | head -1` does."
    command = [COMMAND, "run", "--data", str(empty.archive), *QUICK, "--to", "data"]
    run = subprocess.Popen(command, env=empty.environ, cwd=empty.root, stdout=subprocess.PIPE)
    assert b"started" in run.stdout.readline()
    run.stdout.close()
    assert run.wait(120) == 0 and empty.newest()["status"] == "succeeded"


def test_an_interrupted_run_ends_its_kernel(small):
    from intel_nb.chain.runs import read_run
    stopped = small("mine")
    wait_for(lambda: has_begun(small.root))
    os.killpg(stopped.pid, signal.SIGINT)
    stopped.communicate(timeout=60)
    assert kernels(small.root) == []
    assert read_run(small.root / "executed", "mine").status == "interrupted"
    assert json.loads((small.root / "executed" / "mine" / "run.json").read_text())["status"] == "interrupted"


def test_two_runs_do_a_step_once(small):
    from intel_nb.storage import is_locked
    one = small("one")
    wait_for(lambda: has_begun(small.root))
    two, busy = small("two"), small("one")
    assert busy.communicate(timeout=60)[0] == "" and busy.returncode != 0, "one process works on a run"
    wait_for(lambda: is_locked(small.root / "executed" / "two" / ".lock"))
    (small.root / "gate").touch()
    answers = [process.communicate(timeout=60)[0].strip() for process in (one, two)]
    assert answers == ["['succeeded', 'succeeded'] {'tries': 1, 'n': 3}", "['cached', 'cached'] {'tries': 1, 'n': 3}"]


# Killed in the real chain


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["as it begins", "as it writes"])
@pytest.mark.parametrize("step", STEPS)
def test_a_chain_killed_in_any_step_continues_to_the_same_end(staged_once, waiting, step, moment):
    for later in STEPS[STEPS.index(step):]:
        shutil.rmtree(waiting.home / "store" / later, ignore_errors=True)
    if STEPS.index(step) <= STEPS.index("evaluate"):
        (waiting.home / "mlflow.db").unlink()
    command = [COMMAND, "run", "--approve", "--run-id", "killed", "--data", str(waiting.archive)]
    killed = subprocess.Popen([*command, *QUICK], env=waiting.environ, cwd=waiting.root, start_new_session=True,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    sign = "kernel.json" if moment == "as it begins" else "out/*"
    wait_for(lambda: list(waiting.home.glob(f"store/.work/{step}-*/{sign}")) or killed.poll() is not None, 120)
    assert killed.poll() is None, killed.communicate()
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert waiting.record("killed")["status"] == "running" and waiting.newest()["status"] == "failed"
    answer = waiting.run("--approve", "--run-id", "killed")
    assert answer.status == 0, answer
    undisturbed, resumed = staged_once.record("first"), waiting.record("killed")
    for one, other in zip(undisturbed["steps"], resumed["steps"]):
        assert other["status"] in ("succeeded", "cached")
        same = one["result"].keys() & {"accuracy", "fingerprint", "passed", "version", "stage", "train", "missed"}
        assert {key: one["result"][key] for key in same} == {key: other["result"][key] for key in same}
    assert [v["version"] for v in waiting("models", "--json").json] == ["1"]
    assert kernels(waiting.home) == []
