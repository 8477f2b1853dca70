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
    "--param train.pretrained=yes": "train.pretrained takes packaged, hub, none or a file that ends in .safetensors",
    "--param train.pretrained=weights.pth": "a pickle such as .pt or .pth is never read, since it can run code",
    "--param train.pretrained=lost.safetensors": "lost.safetensors does not exist",
    "--param train.bootstraps=100": "train.bootstraps is 100, and must be at least ert, 150",
    "--param train.ert=200000": "train.bootstraps is 100000, and must be at least ert, 200000",
    "--param train.statistics_weight=1e300": "train.statistics_weight takes a float, 0–1000, and 1e+300 is none",
    "--param drift.slow=drak": "and ['drak'] is none; did you mean dark?",
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
    "--from=": "--from is empty",
    "--to=": "--to is empty",
    "--run-id=": "--run-id is empty",
    "--profile=": "--profile is empty",
    "--profile full --param train.profile=quick": "train.profile is quick by --param and full by an option of its own",
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


EMPTY = (("watch", ""), ("aws", "rehearse", "--data="), ("aws", "start", "--data", ""), ("stop", ""), ("stop", "  "),
         ("predict", "x.jpg", "--stage", ""), ("import", "x", "--evaluation="), ("start", "staging", "--engine", ""),
         ("export", "1", "--output", ""), ("import", ""), ("run", "--run-id", ""))


@pytest.mark.parametrize("line", EMPTY, ids=" ".join)
def test_an_empty_argument_is_refused(line, empty):
    "As by a variable of the shell that is not set: `stop \"$STAGE\"` would stop all stages."
    answer = empty(*line)
    assert answer.status == 2 and "is empty; give it a value, or leave it out" in answer.err
    assert list(empty.root.iterdir()) == []


@pytest.mark.parametrize("setting", ["data.archive=/photos.zip", "data.annotations=/labels"])
def test_the_watcher_is_not_told_what_it_fills_in(setting, empty):
    (empty.root / "inbox").mkdir()
    answer = empty("watch", "inbox", "--param", setting)
    assert answer.status == 2 and "is filled in by the watcher" in answer.err


def test_braces_in_the_folder_of_runs_are_part_of_its_name(tmp_path, archive):
    "papermill would fill in parameters there."
    from conftest import House
    (tmp_path / "{seed}{").mkdir()
    answer = House(tmp_path / "{seed}{", archive)("run", "--to", "data")
    assert answer.status == 0, answer.err


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


EDITS = {  # what a person does to the cell of parameters: what the check says
    ("seed = 0", "sead = 0"): "evaluate: the cell of parameters does not set seed",
    ("seed = 0", "seed = -1"): "evaluate.seed takes an int, 0–4294967295, and -1 is none",
    ("min_accuracy = 0.8   # float, 0–1:", "min_accuracy = 8  # float, 0–10:"): "takes a float, 0–1, and 8 is none",
    ("register = True ", "register = 1 "): "evaluate.register takes a bool, and 1 is none",
    ("seed = 0", "sead = 3  # int: of the bootstrap\nseed = 0"): "no parameter sead; did you mean seed?",
    ("#| exporti\n", "%%time\n# my values\n"): "",
    ("#| exporti\n", "# Parameters\n"): "",
    ("seed = 0", "seed = 0; sead = 4; seed = 0"): "no parameter sead; did you mean seed?",
    ("seed = 0", "sead: int\nseed = 0"): "no parameter sead; did you mean seed?",
    ("register = True      # bool: whether to write to the registry\nseed = 0", "register, seed = True, 3  #"): "",
    ("seed = 0", "seed = 3"): "",
}


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit[1].split("\n")[0])
def test_a_person_in_a_notebook_is_held_to_what_the_step_declares(edit, shell):
    "However the cell of parameters was edited, and whatever ran before."
    cells = json.loads((NOTEBOOKS / "02_evaluate.ipynb").read_text())["cells"]
    first = next(i for i, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", []))
    parameters, check = "".join(cells[first]["source"]), "".join(cells[first + 2]["source"])
    assert parameters.count(edit[0]) == 1
    for given, expected in ((parameters.replace(*edit), EDITS[edit]), (parameters, "")):
        shell("%reset -f in")  # what ran before would answer too
        assert shell(given) == ""
        shell("epochs = 3  # int, at least 1: a name of one's own")
        assert expected in (said := shell(check)) and bool(said) == bool(expected)


def test_a_corrected_cell_of_papermills_is_taken(shell):
    "As by a person who opens the notebook that papermill left, and corrects the name."
    cells = json.loads((NOTEBOOKS / "02_evaluate.ipynb").read_text())["cells"]
    first = next(i for i, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", []))
    parameters, check = "".join(cells[first]["source"]), "".join(cells[first + 2]["source"])
    for injected, expected in (("# Parameters\nsead = 3", "no parameter sead"), ("# Parameters\nseed = 3", "")):
        assert shell(parameters) == shell(injected) == ""
        assert expected in (said := shell(check)) and bool(said) == bool(expected)


@pytest.fixture(scope="module")
def kernel():
    from jupyter_client.manager import start_new_kernel
    manager, client = start_new_kernel()
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.fixture
def shell(kernel):
    "Run a cell as JupyterLab does; give the error that it ended with, or an empty text."
    return lambda source: kernel.execute_interactive(
        source, timeout=60, output_hook=lambda _: None)["content"].get("evalue", "")


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
