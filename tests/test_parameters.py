"""Whoever sets a parameter, it is checked before anything runs: by the command, papermill, a job, a notebook."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parent.parent / "nbs"

WRONG = {  # arguments of `intel-nb run`: what the message says
    "--param data.val_fraction=0": "data.val_fraction takes a float, above 0, at most 0.5, and 0 is none",
    "--param data.test_fraction=0.6": "data.test_fraction takes a float, above 0, at most 0.5, and 0.6 is none",
    "--param data.seed=-1": "data.seed takes an int, 0–4294967295, and -1 is none",
    "--param train.seed=99999999999": "train.seed takes an int, 0–4294967295, and 99999999999 is none",
    "--param data.parts=a=trian": "'a' is said to be 'trian'; write one of train, validation, test, unlabelled, class",
    "--param data.encoding=cp99999": "there is no encoding 'cp99999'; write one such as",
    "--param data.near_duplicates=maybe": "data.near_duplicates takes drop, keep or empty, and 'maybe' is none",
    "--param data.parts=batch_a": "data.parts takes a dict, and 'batch_a' is none",
    "--param data.parts={\"a\":1}": "data.parts takes a dict, and {'a': 1} is none",
    "--param data.classes=[sea": "data.classes takes a list of str, and '[sea' is none",
    "--param data.test_annotations=yes": "data.test_annotations takes a bool, and 'yes' is none",
    "--param data.valfraction=0.2": "data has no parameter valfraction; did you mean val_fraction?",
    "--param data.out_dir=x": "data.out_dir is filled in by the chain and cannot be set",
    "--param train.profile=fast": "train.profile takes quick, full or original, and 'fast' is none",
    "--profile ful": "train.profile takes quick, full or original, and 'ful' is none; did you mean full?",
    "--param train.epochs=3": "train.epochs is not used by the profile quick; leave it out, or use the profile full or",
    "--param train.optimizer_name=adam": "train.optimizer_name is not used by the profile quick",
    "--profile full --param train.epochs=0": "train.epochs takes an int, at least 1, and 0 is none",
    "--profile full --param train.epochs=many": "train.epochs takes an int, at least 1, and 'many' is none",
    "--profile full --param train.learning_rate=0": "train.learning_rate takes a float, above 0, and 0 is none",
    "--profile full --param train.learning_rate=NaN": "train.learning_rate takes a float, above 0, and nan is none",
    "--profile full --param train.optimizer_name=adamm": "timm has no optimizer adamm; did you mean adam",
    "--param train.image_size=4": "train.image_size takes an int, pixels, 8–4096, and 4 is none",
    "--param train.image_size=192.5": "train.image_size takes an int, pixels, 8–4096, and 192.5 is none",
    "--param train.precision=int4": "train.precision takes int8 or float32, and 'int4' is none; did you mean int8?",
    "--param train.pretrained=yes": "train.pretrained takes packaged, hub or none, and 'yes' is none",
    "--param train.windows=[]": "train.windows takes a list of int, observations, one or more, at least 1, and [] is",
    "--param train.windows=3,x": "observations, one or more, at least 1, and [3, 'x'] is none",
    "--param train.model_name=resnet19": "timm has no network 'resnet19'; did you mean resnet",
    "--param train.model_name=regnetz_c16": "no package has weights for regnetz_c16; use tf_efficientnet_lite0",
    "--param train.sead=1": "train has no parameter sead; did you mean seed?",
    "--param trian.seed=1": "there is no step trian; did you mean train?",
    "--param seed=1": "write step.name=value, such as train.seed=1",
    "--param evaluate.min_accuracy=1.5": "evaluate.min_accuracy takes a float, 0–1, and 1.5 is none",
    "--param evaluate.register=1": "evaluate.register takes a bool, and 1 is none",
    "--param deploy.engine=rey": "deploy.engine takes process or ray, and 'rey' is none; did you mean ray?",
    "--param deploy.stage=production": "deploy.stage is filled in by the chain and cannot be set",
    "--param drift.severities=4": "drift.severities takes a list of int, one or more, 1–3, and [4] is none",
    "--param drift.slow=rain": "drift.slow takes a list of str, blur, noise, dark, bright,",
    "--param drift.runs=0": "drift.runs takes an int, at least 1, and 0 is none",
    "--param staging.sample=0": "staging.sample takes an int, at least 1, and 0 is none",
    "--from drift --to train": "--from drift comes after --to train",
    "--from evalute": "there is no step evalute; did you mean evaluate?",
    "--data=": "--data is empty",
    "--annotations=": "--annotations is empty",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_value_is_refused_before_any_work(line, empty):
    answer = empty("run", *line.split())
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.startswith("error: ") and WRONG[line] in answer.err
    assert list(empty.root.iterdir()) == []


@pytest.mark.parametrize("home", ["100 %", "what?", "a#b"])
def test_a_workspace_that_mlflow_cannot_open_is_refused_at_once(home, tmp_path, archive):
    from conftest import House
    house = House(tmp_path / home, archive)
    house.root.mkdir()
    answer = house.run()
    assert answer.status == 2 and "take a folder without %, ? and # in its path" in answer.err
    assert list(house.root.iterdir()) == []


def test_a_hub_out_of_reach_is_said_in_seconds(empty):
    "A port of this machine where nobody listens stands for the hub."
    import socket
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        code = ("import sys\nfrom intel_nb.cli import call\n"
                "sys.exit(call(['run', '--param', 'train.pretrained=hub', '--param', 'train.model_name=resnet18']))")
        environ = empty.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{taken.getsockname()[1]}",
                                   "HF_HOME": str(empty.root / "hub"), "HF_HUB_OFFLINE": "0"}
        ended = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2
    assert "the weights of resnet18 cannot be had from the hub" in ended.stderr and "HF_ENDPOINT" in ended.stderr
    assert not empty.home.exists()


def as_text(value) -> str:
    return json.dumps(value) if isinstance(value, (list, dict)) else str(value)


def papermill(name: str, out: Path, **values) -> subprocess.CompletedProcess:
    "Run a step's notebook with papermill alone, as a person does; each value is passed on as a text."
    texts = [part for key, value in values.items() for part in ("-r", key, as_text(value))]
    command = [str(Path(sys.executable).with_name("papermill")), str(NOTEBOOKS / f"{name}.ipynb"), str(out), *texts]
    return subprocess.run(command, capture_output=True, text=True, cwd=out.parent)


def test_papermill_alone_checks_too(tmp_path):
    ended = papermill("02_evaluate", tmp_path / "out.ipynb", out_dir=tmp_path / "out", sead=3, min_accuracy="0.9")
    assert ended.returncode != 0 and "evaluate has no parameter sead; did you mean seed?" in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_papermills_text_false_registers_nothing(tmp_path):
    "Its option -p takes `false` for a text, which Python takes for true."
    ended = papermill("02_evaluate", tmp_path / "out.ipynb", out_dir=tmp_path / "out", register="false")
    assert ended.returncode == 0, ended.stderr[-500:]
    assert json.loads((tmp_path / "out" / "result.json").read_text())["version"] == ""


def steady(result: dict) -> dict:
    "The result without what no two runs share."
    return {name: value for name, value in result.items() if name not in {"url", "p50_ms", "p90_ms", "p99_ms"}}


@pytest.mark.slow
def test_six_notebooks_with_every_parameter_as_text_give_what_the_chain_gives(staged, tmp_path):
    "The chain's own parameters, all of them as texts, in papermill's command: the same packages, figures and answers."
    from conftest import QUICK

    from intel_nb.chain.parameters import read_parameters
    from intel_nb.chain.plan import PLAN
    from intel_nb.chain.store import CHECKPOINTS
    settings = dict(part.split("=") for part in QUICK if "=" in part)
    results = {step["name"]: step["result"] for step in staged.newest()["steps"]}
    staged("stop")
    for step in PLAN:
        declared = read_parameters(NOTEBOOKS / step.notebook)
        values = {name: one.default for name, one in declared.items()}
        values |= {name: settings[f"{step.name}.{name}"] for name in declared if f"{step.name}.{name}" in settings}
        out = tmp_path / step.name
        made = {name: json.loads((tmp_path / name / "result.json").read_text()) for name in results
                if (tmp_path / name / "result.json").exists()}
        values |= {name: tmp_path / source / made[source][output] for name, (source, output) in step.files.items()}
        values |= {name: made[source][output] for name, (source, output) in step.values.items()}
        values |= {"registry": f"sqlite:///{tmp_path}/mlflow.db", "endpoints": tmp_path / "endpoints",
                   "archive": staged.archive, "out_dir": out, "checkpoint_dir": tmp_path / CHECKPOINTS / step.name}
        if step.name == "deploy":
            from intel_nb.registry import open_registry
            open_registry(values["registry"]).set_status(values["version"], "Approved", "by the test")
        ended = papermill(step.notebook.removesuffix(".ipynb"), tmp_path / step.notebook,
                          **{name: value for name, value in values.items() if name in declared})
        assert ended.returncode == 0, ended.stderr[-2000:]
        assert steady(json.loads((out / "result.json").read_text())) == steady(results[step.name])
    from intel_nb.serving.endpoints import LocalEndpoints
    LocalEndpoints(tmp_path / "endpoints").stop("staging")
