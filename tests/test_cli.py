"""The command: its exit statuses, what it prints, what it decides, and what it leaves running."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
from conftest import COMMAND, House

from intel_nb.cli import call

COMMANDS = ("run", "probe", "runs", "report", "compare", "models", "trace", "endpoints", "drift", "status", "captures",
            "suspects", "measure", "approve", "reject", "withdraw", "promote", "rollback", "shadow", "start", "stop",
            "predict", "serve", "sign", "export", "import", "watch", "audit", "check", "cancel", "logs", "prune", "ui",
            "aws")
AWS_COMMANDS = ("template", "definition", "rehearse", "cost", "deploy", "start", "status", "models", "approve",
                "promote", "reject", "rollback", "invoke", "logs", "destroy")


def alive(pid: int) -> bool:
    import psutil
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def endpoints_of(house) -> dict[str, dict]:
    return {e["stage"]: e for e in house("endpoints", "--json").json}


# Help


LIGHT = """
import sys, intel_nb.cli
try:
    status = intel_nb.cli.call(sys.argv[1:])
except SystemExit as end:  # of a completion
    status = end.code
heavy = {"torch", "mlflow", "onnxruntime", "papermill", "numpy", "rich", "fastapi", "pyarrow"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else status)
"""


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(option):
    assert subprocess.run([sys.executable, "-c", LIGHT, option], stdout=subprocess.DEVNULL).returncode == 0
    subprocess.run([COMMAND, option], stdout=subprocess.DEVNULL, check=True)


def test_the_version_of_the_command_and_of_the_module():
    from intel_nb import __version__
    for command in ([COMMAND], [sys.executable, "-m", "intel_nb"]):
        for line in (["--version"], ["--debug", "--version"], ["--version", "nonsense"]):
            done = subprocess.run([*command, *line], capture_output=True, text=True)
            assert (done.returncode, done.stdout, done.stderr) == (0, f"intel-nb {__version__}\n", "")
    wrong = subprocess.run([sys.executable, "-m", "intel_nb", "nonsense"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "nonsense" in wrong.stderr


# Completion


def asked(words: str) -> dict[str, str]:
    "What bash puts into the environment to complete the last of `words`."
    return {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_INTEL_NB_COMPLETE": "complete_bash"}


def complete(words: str, house: House, monkeypatch, capsys) -> list[str]:
    "Return what is offered for the last of `words`."
    for name, value in (house.environ | asked(words)).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        call([])
    return sorted(capsys.readouterr().out.split())


COMPLETED = {
    "intel-nb ex": ["export"], "intel-nb aws app": ["approve"], "intel-nb run --fr": ["--from"],
    "intel-nb models --j": ["--json"], "intel-nb run --from e": ["evaluate"], "intel-nb start p": ["production"],
    "intel-nb run --profile ": ["full", "original", "quick"], "intel-nb run --engine r": ["ray"],
    "intel-nb run --param train.e": ["train.epochs=", "train.ert="],
    "intel-nb run --param train.se": ["train.seed=", "train.seed=0"], "intel-nb run --param nothing.x": [],
    "intel-nb run --param evaluate.reg": ["evaluate.register=", "evaluate.register=true"],  # the chain sets .registry
    "intel-nb approve ": ["1"], "intel-nb report ": ["first", "latest"], "intel-nb export 7": [],
}


@pytest.mark.parametrize("words", COMPLETED)
def test_completion(words, waiting_once, monkeypatch, capsys):
    assert complete(words, waiting_once, monkeypatch, capsys) == COMPLETED[words]


@pytest.mark.parametrize("words", ["intel-nb ", "intel-nb run --param ", "intel-nb approve "])
def test_completion_imports_nothing_heavy(words, waiting_once):
    done = subprocess.run([sys.executable, "-c", LIGHT], env=waiting_once.environ | asked(words), capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout


def test_completion_in_an_empty_or_broken_workspace(empty, monkeypatch, capsys):
    assert complete("intel-nb approve ", empty, monkeypatch, capsys) == []
    empty.home.mkdir()
    (empty.home / "mlflow.db").write_text("no database")
    assert complete("intel-nb approve ", empty, monkeypatch, capsys) == []
    monkeypatch.setenv("INTEL_NB_NOTEBOOKS", "nowhere")
    assert complete("intel-nb run --param tr", empty, monkeypatch, capsys) == []


def test_bash_completes():
    "A real bash, with the function that the command prints for it."
    script = subprocess.run([COMMAND], env=os.environ | {"_INTEL_NB_COMPLETE": "source_bash"}, capture_output=True,
                            text=True, check=True).stdout
    ask = f"""{script}
COMP_WORDS=(intel-nb run --to st) COMP_CWORD=3
_intel_nb_completion {COMMAND}
echo "${{COMPREPLY[@]}}" """
    assert subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True).stdout == "staging\n"


def test_every_command_is_listed(empty):
    for group, names in ([], COMMANDS), (["aws"], AWS_COMMANDS):
        listed = empty(*group, "--help").out
        assert re.findall(r"^  (\w+) ", listed.partition("Commands:")[2], re.M) == list(names)
        for name in names:
            assert empty(*group, name, "--help").status == 0
    assert list(empty.root.iterdir()) == []


@pytest.mark.parametrize("path", [[name] for name in COMMANDS] + [["aws", name] for name in AWS_COMMANDS], ids=" ".join)
def test_every_command_and_every_option_has_help(path):
    "A command is described by a sentence, and so is each of its arguments and options."
    import typer

    from intel_nb.cli import app
    command = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]
    texts = {"": command.help} | {p.name: getattr(p, "help", "") for p in command.params}
    assert [name for name, text in texts.items() if not re.fullmatch(r"[A-Za-z].*[.…]", text or "", re.S)] == []


# Where things stand


def test_the_command_alone_says_what_comes_next(waiting_once, staged_once, empty):
    for house, following in ((waiting_once, ["approve 1", "reject 1"]), (staged_once, ["promote 1"]),
                             (empty, ["run", "run --data intel.zip"])):
        answer, found = house(), house("status", "--json").json
        assert answer.status == 0 and answer.out.startswith(house("status").out)
        assert [one["command"] for one in found["next"]] == [f"intel-nb {line}" for line in following]
        assert all(f"{one['why']}:\n          {one['command']}\n" in answer.out for one in found["next"])
        assert max(map(len, answer.out.splitlines())) <= 80 or house is not empty
    assert list(empty.root.iterdir()) == []


def test_the_command_alone_imports_nothing_heavy(waiting_once):
    done = subprocess.run([sys.executable, "-c", LIGHT], env=waiting_once.environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "approve 1" in done.stdout


def test_the_end_of_a_run_names_the_next_command(staged_once):
    answer = staged_once("report", "latest")
    for line in ("version   1, accuracy 0.", "replaces  none in staging", "intel-nb promote 1"):
        assert line in answer.out.replace("accuracy 1.", "accuracy 0."), answer.out


def test_mlflow_has_the_run_under_our_id(staged_once):
    from intel_nb.registry import MODEL, import_client
    client = import_client()(f"sqlite:///{staged_once.home}/mlflow.db")
    experiment = client.get_experiment_by_name(MODEL).experiment_id
    (run,) = client.search_runs([experiment], "attributes.run_name = 'first'")
    used = {"data.seed": "0", "train.seed": "0", "train.profile": "quick", "train.bootstraps": "2000",
            "evaluate.min_accuracy": "0.8", "drift.runs": "50", "staging.sample": "32"}
    assert run.data.params == run.data.params | used
    assert not any("[[" in value for value in run.data.params.values()), "no matrices"
    for name in ("accuracy", "recall/sea", "expected_calibration_error", "drift/run_time", "staging/passed"):
        assert name in run.data.metrics
    assert len(client.get_metric_history(run.info.run_id, "training/log_loss")) > 1
    data = staged_once.record("first")["steps"][0]["result"]["fingerprint"]
    assert (run.data.tags["version"], run.data.tags["data"]) == ("1", data)
    assert [one.dataset.name for one in run.inputs.dataset_inputs] == ["scenes.zip"]
    kept = {path.name for path in (staged_once.home / "artifacts" / run.info.run_id / "artifacts").iterdir()}
    assert {"package", "evaluation.json", "report.html", "train", "drift", "staging"} <= kept
    assert staged_once("check").status == 0


def test_the_ui_serves_and_ends_with_ctrl_c(staged_once):
    command = subprocess.Popen([COMMAND, "ui", "--tensorboard", "--port", "0"], env=staged_once.environ, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    url = command.stdout.readline().split()[0]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            assert urlopen(f"{url}data/runs", timeout=10).read() == b'["first/tensorboard"]'
            break
        except (OSError, AssertionError):
            time.sleep(.2)
    else:
        raise AssertionError(command.communicate())
    command.send_signal(signal.SIGINT)
    assert "Traceback" not in command.communicate(timeout=60)[1] and command.returncode == 0


# A workspace in which nothing was done


@pytest.mark.parametrize("line", ["models", "runs", "endpoints"])
def test_lists_of_nothing(empty, line):
    assert empty(line, "--json").json == []
    answer = empty(line)
    where = empty.executed if line == "runs" else empty.home
    assert f"no {line if line != 'models' else 'versions'} yet in {where}" in answer.out and answer.status == 0
    assert list(empty.root.iterdir()) == []


STEPS = "The steps: data, train, evaluate, deploy, drift, staging"
UNKNOWN = {  # a person may be in the wrong folder, so the message names it
    **dict.fromkeys(("approve 7", "promote 7", "reject 7", "trace 7", "export 7", "serve 7"),
                    "no version 7 in {home}; "),
    "report 7": "no run 7 in {executed}; ",
    **dict.fromkeys(("rollback staging", "start staging", "stop staging", "predict x.jpg"),
                    "no endpoint staging in {home}; "),
    "run --from evalute": f"no step evalute; did you mean evaluate? {STEPS}",
    "run --to x": "no step x; there are: data, train, evaluate, deploy, drift, staging",
    "run --param trian.seed=1": f"no step trian; did you mean train? {STEPS}",
    "import x.tar.gz": "x.tar.gz does not exist",
    "ui": "no version in {home} yet", "ui --tensorboard": "no run in {executed} has trained yet",
    "watch inbox": "is no folder", "aws cost --option runs=x": "must be a number",
    "approve": "VERSION", "models --jsn": "--jsn", "nonsense": "nonsense",
}


@pytest.mark.parametrize("line", UNKNOWN)
def test_wrong_input_is_exit_2_in_one_sentence(empty, line):
    answer = empty(*line.split())
    assert answer.status == 2 and answer.out == ""
    expected = UNKNOWN[line].format(home=empty.home, executed=empty.executed)
    assert expected in answer.err and "Traceback" not in answer.err
    assert list(empty.root.iterdir()) == []


def test_debug_shows_the_traceback(empty):
    from intel_nb.storage import InputError
    with pytest.raises(InputError):
        empty("approve", "7", "--debug")


# From the approval to production and back


def test_the_documents(staged_once):
    (version,) = staged_once("models", "--json").json
    low, high = version["interval"]
    assert version == {"version": "1", "status": "Approved", "accuracy": version["accuracy"], "aliases": ["staging"],
                       "run_id": "first", "images": version["images"], "interval": [low, high],
                       "reason": "approved with intel-nb approve", "imported": None, "production": {}}
    assert 0 <= low <= version["accuracy"] <= high <= 1 and version["images"] > 0
    (endpoint,) = staged_once("endpoints", "--json").json
    assert list(endpoint) == ["stage", "url", "version", "status", "engine", "pid", "drift", "error", "shadow"]
    assert (endpoint["drift"]["alarms"], endpoint["error"], endpoint["shadow"]) == (0, "", None)
    assert (endpoint["stage"], endpoint["version"], endpoint["status"]) == ("staging", "1", "running")
    assert alive(endpoint["pid"])
    (run,) = staged_once("runs", "--json").json
    report = staged_once("report", "latest", "--json").json
    more = {"data": report["data"], "became": "Approved, in staging"}
    assert run == staged_once.record("first") | more and run["cause"] == "command"
    assert report | {"check": run["check"]} == run
    left_out = sum(run["steps"][0]["result"]["left_out"].values())  # drawn scenes may resemble one another
    assert (report["data"]["images"] + left_out, report["data"]["same_as"]) == (240, None)
    assert (run["status"], run["endpoint"]) == ("succeeded", endpoint["url"])
    assert [step["status"] for step in run["steps"]] == ["succeeded"] * 6
    for listing in ("models", "endpoints", "runs"):
        assert "1" in staged_once(listing).out
    page = (staged_once.executed / "first" / "report.html").read_text()
    assert "data:image/jpeg;base64," in page and endpoint["url"] in page and len(page) < 2**20
    assert '<a href="05_test_staging.ipynb">' in page
    assert "Version 1 serves in staging" in page and "intel-nb promote 1" in page


def test_the_endpoint_answers(staged_once, tmp_path):
    import numpy as np

    from intel_nb.images import encode_jpeg
    from intel_nb.scenes import SAMPLE_CLASSES, sample_scene
    endpoint = endpoints_of(staged_once)["staging"]
    assert urlopen(f"{endpoint['url']}/ping", timeout=10).status == 200
    images = []
    for label in range(len(SAMPLE_CLASSES)):
        images.append(tmp_path / f"{SAMPLE_CLASSES[label]}.jpg")
        images[-1].write_bytes(encode_jpeg(sample_scene(label, np.random.default_rng(label))))
    answers = staged_once("predict", *map(str, images), "--json").json
    assert sum(a["label"] == Path(a["image"]).stem for a in answers) >= 4
    table = staged_once("predict", str(images[0]))
    assert table.status == 0 and answers[0]["label"] in table.out
    assert staged_once("predict", str(tmp_path / "none.jpg")).status == 2
    images[0].write_bytes(b"no image")
    refused = staged_once("predict", str(images[0]))
    assert refused.status == 1 and "Traceback" not in refused.err
    assert "not one of JPEG" in refused.out


def test_the_same_command_again_is_all_cached(staged_once):
    answer = staged_once.run("--approve", "--run-id", "again")
    try:
        assert answer.status == 0
        assert [step["status"] for step in staged_once.record("again")["steps"]] == ["cached"] * 6
        assert endpoints_of(staged_once)["staging"]["url"] in answer.out and "version   1" in answer.out
    finally:
        shutil.rmtree(staged_once.executed / "again")


def test_to_production_and_back(staged):
    house = staged
    assert house.record("first")["status"] == "succeeded"
    url = endpoints_of(house)["staging"]["url"]
    assert house("rollback", "production").status == 2
    assert house("rollback", "staging").status == 1, "there is nothing earlier"

    assert house("promote", "1").status == 0
    run = house.newest()
    assert (run["trigger"], run["status"], [s["name"] for s in run["steps"]]) == ("promote", "succeeded", ["deploy"])
    assert run["endpoint"] == endpoints_of(house)["production"]["url"] != url
    assert house("models", "--json").json[0]["aliases"] == ["production", "staging"]
    assert house.run("--approve").status == 0, "a run touches staging alone"
    assert set(house.statuses().values()) == {"cached"}

    # Another version, of another package: a rejection is of the package, and not of the number alone.
    lower = ("--param", "train.seed=1")
    assert house.run(*lower, "--approve").status == 0
    assert list(house.statuses().values()) == ["cached"] + ["succeeded"] * 5
    now = endpoints_of(house)
    assert (now["staging"]["version"], now["production"]["version"], now["staging"]["url"]) == ("2", "1", url)
    assert house("promote", "2").status == 0
    assert {v["version"]: v["aliases"] for v in house("models", "--json").json} == {
        "2": ["production", "staging"], "1": []}

    assert house("rollback", "production").status == 0
    assert house.newest()["trigger"] == "rollback" and endpoints_of(house)["production"]["version"] == "1"
    assert house("rollback", "production").status == 1
    assert house("promote", "2").status == 0

    rejected = house("reject", "2", "--reason", "it mistakes fog for sea")
    assert rejected.status == 0
    assert [r["trigger"] for r in house("runs", "--json").json[:2]] == ["reject", "reject"]
    assert {e["version"] for e in endpoints_of(house).values()} == {"1"}
    assert {v["version"]: (v["status"], v["aliases"]) for v in house("models", "--json").json} == {
        "2": ("Rejected", []), "1": ("Approved", ["production", "staging"])}
    assert house.run(*lower, "--approve").status == 1, "--approve revives nothing"
    assert house("approve", "2").status == 1 and house("promote", "2").status == 1

    # A process that dies is seen, and started again.
    killed = endpoints_of(house)["staging"]
    os.kill(killed["pid"], signal.SIGKILL)
    waiting_for_death(killed["pid"])
    dead = endpoints_of(house)["staging"]
    assert (dead["status"], dead["pid"]) == ("dead", None)
    assert house("predict", "x.jpg").status == 2
    assert house("start", "staging").status == 0
    started = endpoints_of(house)["staging"]
    assert (started["status"], started["url"]) == ("running", url) and urlopen(f"{url}/ping", timeout=10).status == 200

    assert house("reject", "1").status == 0
    assert not alive(started["pid"])
    assert {e["status"] for e in endpoints_of(house).values()} == {"stopped"}
    assert house("start", "staging").status == 1, "it would serve a rejected version"


def test_what_waits_is_not_promoted_but_can_be_rejected(waiting):
    refused = waiting("promote", "1")
    assert refused.status == 1 and "PendingManualApproval" in refused.err
    assert waiting("reject", "1").status == 0
    assert waiting.record("first")["status"] == "rejected"
    answer = waiting.run()
    assert answer.status == 1 and "rejected with intel-nb reject" in answer.out


def waiting_for_death(pid: int) -> None:
    deadline = time.monotonic() + 20
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_approving_a_version_whose_run_is_gone(staged_once):
    from intel_nb.chain.history import version_entries
    from intel_nb.chain.plan import open_workspace
    workspace = open_workspace(staged_once.environ)
    found = version_entries(workspace, workspace.registry().get("1"))
    made = {step["name"]: step["key"] for step in staged_once.record("first")["steps"]}
    assert {step: e.key for step, e in found.items()} == {step: made[step] for step in ("data", "train", "evaluate")}


def test_approving_what_the_store_lost(waiting):
    shutil.rmtree(waiting.executed / "first")
    shutil.rmtree(waiting.home / "store")
    answer = waiting("approve", "1")
    assert answer.status == 2 and "run the chain on its data again" in answer.err


# Processes


def test_a_reader_that_goes_away_is_no_error(staged_once):
    command = subprocess.Popen([COMMAND, "runs", "--json"], env=staged_once.environ, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    command.stdout.close()
    assert b"Traceback" not in command.stderr.read()
    command.stderr.close()
    command.wait()


@pytest.mark.parametrize("status", [0, 1, 2, 3])
def test_make_says_what_the_status_means(tmp_path, status):
    "make itself knows only 2. A script stands for the command: what is tested is the Makefile."
    from intel_nb.cli import app
    shutil.copy(Path(__file__).parents[1] / "Makefile", tmp_path)
    for name in ("pyproject.toml", ".venv/run.stamp", "bin/intel-nb"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/sh\necho $@\nexit {status}\n")
    (tmp_path / "bin" / "intel-nb").chmod(0o755)
    environ = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    made = subprocess.run(["make", "run", "BIN=bin", "DATA=a b.zip"], cwd=tmp_path, capture_output=True, text=True,
                          env=environ)  # which `make test` has set
    assert made.stdout == "run --approve --data a b.zip\n" and bool(made.returncode) == bool(status)
    meanings = dict(re.findall(r"(\d) ([a-z ]+)", app.info.help.partition("Exit status: ")[2]))
    lines = [f"intel-nb ended with {status}: {meanings[str(status)]}"] if status else []
    assert made.stderr.splitlines()[:-1] == lines, "and make's own line is the last"
