"The pipeline is rehearsed: the same notebooks, the code of the image, folders for /opt/ml and S3, and a registry."
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from intel_nb.aws.pipeline import EVALUATION, KEPT, PipelineConfig, pipeline_definition
from intel_nb.aws.rehearsal import rehearsal_summary, rehearse, rehearse_in_workspace
from intel_nb.storage import InputError, read_json

QUICK = {"TrainSettings": '{"bootstraps": 2000}'}


def quiet(text: str) -> None:
    pass


def cell(source: str, *tags: str) -> dict:
    return {"cell_type": "code", "execution_count": None, "metadata": {"tags": list(tags)}, "outputs": [],
            "source": source}


def notebook(path: Path, parameters: str, run: str) -> None:
    "A step of three lines in the place of a real one; each parameter is declared with the type of its default."
    declared = [f"{line}  # {'list of str' if '[' in line else type(eval(line.split(' = ')[1])).__name__}: drawn"
                for line in parameters.split("\n")]
    run = ("import json, pathlib, shutil\nout = pathlib.Path(out_dir)\nout.mkdir(parents=True, exist_ok=True)\n"
           f"{run}\n(out / 'result.json').write_text('{{}}')")
    path.write_text(json.dumps({"cells": [cell("\n".join(declared), "parameters"), cell(run)], "nbformat": 4,
                                "nbformat_minor": 5,
                                "metadata": {"kernelspec": {"name": "python3", "display_name": "",
                                                            "language": "python"}}}))


@pytest.fixture
def tiny(tmp_path, monkeypatch, sample_model):
    "A checkout whose steps do next to nothing; the evaluation is what the environment's file `evaluation.json` says."
    from intel_nb.chain.plan import notebooks_folder
    from intel_nb.model import load_package
    shutil.copytree(notebooks_folder().parent / "locks", tmp_path / "locks")
    nbs, package = tmp_path / "nbs", shutil.copytree(sample_model, tmp_path / "package")
    nbs.mkdir()
    notebook(nbs / "00_data.ipynb", "archive = ''\nannotations = []\nbuckets = []\nout_dir = ''",
             "(out / 'dataset').mkdir()\nshutil.copy(archive, out / 'dataset' / 'seen')\nassert annotations == []")
    notebook(nbs / "01_train.ipynb",
             "dataset = ''\nprofile = 'quick'\nmodel_dir = ''\nlog_dir = ''\ncheckpoint_dir = ''\nout_dir = ''",
             f"assert pathlib.Path(dataset).read_text() == 'the archive'\n"
             f"shutil.copytree({str(package)!r}, model_dir, dirs_exist_ok=True)\n"
             "for folder in (log_dir, checkpoint_dir):\n    pathlib.Path(folder).mkdir(parents=True)\n"
             "    (pathlib.Path(folder) / 'x').write_text(profile)")
    notebook(nbs / "02_evaluate.ipynb",
             "dataset = ''\nmodel = ''\nregistry = ''\nmin_accuracy = .8\nregister = True\nout_dir = ''",
             f"assert register is False and model.endswith('model.tar.gz') and registry.startswith('sqlite:///')\n"
             f"evaluation = json.loads(pathlib.Path({str(tmp_path / 'evaluation.json')!r}).read_text())\n"
             "evaluation['gate']['min_accuracy'] = min_accuracy\n"
             "(out / 'evaluation.json').write_text(json.dumps(evaluation))\n"
             "(out / 'predictions.parquet').write_text('rows')")
    fingerprints = {"data": "d", "package": load_package(package).fingerprint}
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION | {"fingerprints": fingerprints}))
    (tmp_path / "archive.zip").write_text("the archive")
    monkeypatch.setenv("INTEL_NB_NOTEBOOKS", str(nbs))
    return tmp_path


def test_a_rehearsal_from_end_to_end(tiny, empty_database):
    "Each file is where SageMaker would put it, and the version waits in the registry."
    from intel_nb.registry import open_registry
    shutil.copyfile(empty_database, tiny / "mlflow.db")
    registry = f"sqlite:///{tiny}/mlflow.db"
    result = rehearse(pipeline_definition(PipelineConfig()), {"Profile": "original"}, tiny / "r", registry,
                       tiny / "archive.zip", quiet)
    assert (result.status, result.version, result.reason) == ("Succeeded", "1", "")
    assert [(s.step, s.status) for s in result.steps] == [
        ("data", "Succeeded"), ("train", "Succeeded"), ("evaluate", "Succeeded"), ("refuse", "Skipped"),
        ("gate", "Succeeded"), ("keep", "Succeeded"), ("register", "Succeeded"), ("once", "Succeeded")]
    [version] = open_registry(registry).versions()
    assert (version.status, version.accuracy, version.run_id) == ("PendingManualApproval", 0.9, "r")
    assert open_registry(registry).predictions("1").read_text() == "rows"
    bucket = tiny / "r" / "s3" / PipelineConfig().bucket / "pipeline" / "runs" / "r"
    [kept] = (tiny / "r" / "s3" / PipelineConfig().bucket / "registry").iterdir()
    assert kept.name == "r" and read_json(kept / "keep.json") == KEPT
    assert sorted(p.name for p in kept.iterdir()) == ["evaluation.json", "keep.json", "model.tar.gz",
                                                      "predictions.parquet"]
    assert sorted(p.name for p in (bucket / "executed").iterdir()) == ["00_data.ipynb", "02_evaluate.ipynb"]
    assert (bucket / "tensorboard" / "x").read_text() == "original"
    [kept] = bucket.glob("data/checkpoints/*/*/x")
    assert kept.read_text() == "original"
    with tarfile.open(bucket / "train" / "train-r" / "output" / "output.tar.gz") as out:
        assert "01_train.ipynb" in out.getnames()


@pytest.mark.slow
def test_a_package_with_the_same_verdict_keeps_its_version(tiny):
    registry = f"sqlite:///{tiny}/mlflow.db"
    results = [rehearse(pipeline_definition(), {"AccuracyThreshold": least}, tiny / name, registry,
                        tiny / "archive.zip", quiet)
               for name, least in {"a": 0.8, "b": 0.8, "c": 0.85, "d": 0.8}.items()]
    assert [result.version for result in results] == ["1", "1", "2", "1"]
    ends = [{one.step: one.status for one in result.steps}["register"] for result in results]
    assert ends == ["Succeeded", "Skipped", "Succeeded", "Skipped"]
    kept = tiny / "b" / "s3" / PipelineConfig().bucket / "registry" / "b"
    assert [path.name for path in kept.iterdir()] == ["keep.json"], "it is kept once"


@pytest.mark.slow
def test_another_package_than_the_evaluated_one_is_not_registered(tiny):
    (tiny / "evaluation.json").write_text(json.dumps(EVALUATION))
    with pytest.raises(InputError, match="it was changed after its evaluation and is not registered"):
        rehearse(pipeline_definition(), {}, tiny / "r", f"sqlite:///{tiny}/mlflow.db", tiny / "archive.zip", quiet)
    assert not (tiny / "mlflow.db").exists()


def test_an_image_with_other_code_runs_nothing(tiny):
    made = pipeline_definition()
    made["Steps"][0]["Arguments"]["Environment"]["INTEL_NB_CODE"] = "0" * 16
    with pytest.raises(InputError, match="the job is for the code 0{16}, and this image has the code [0-9a-f]{16}; "):
        rehearse(made, {}, tiny / "r", "sqlite:///none", tiny / "archive.zip", quiet)
    assert not list((tiny / "r").glob("s3/*/pipeline"))


@pytest.mark.parametrize("gate, threshold",
                         [({"passed": True, "reason": "high"}, 0.95),
                          pytest.param({"passed": False, "reason": "worse than champion 3"}, 0.8,
                                       marks=pytest.mark.slow)])
def test_the_failing_branch(tiny, gate, threshold):
    "Below the threshold, and above it where the gate says no; the reason is the gate's."
    evaluation = read_json(tiny / "evaluation.json")
    (tiny / "evaluation.json").write_text(json.dumps(evaluation | {"gate": gate}))
    result = rehearse(pipeline_definition(), {"AccuracyThreshold": str(threshold)}, tiny / "r",
                      f"sqlite:///{tiny}/mlflow.db",
                       tiny / "archive.zip", quiet)
    assert (result.status, result.reason, result.version) == ("Failed", gate["reason"], "")
    assert [(s.step, s.status) for s in result.steps][3:] == [("refuse", "Failed")], "it ends at the gate"
    assert not (tiny / "mlflow.db").exists()
    assert "nothing is registered" in rehearsal_summary(result)


@pytest.mark.slow
def test_a_step_that_fails_leaves_its_notebook(tiny):
    (tiny / "evaluation.json").write_text("{}")
    result = rehearse(pipeline_definition(), {}, tiny / "r", f"sqlite:///{tiny}/mlflow.db", tiny / "archive.zip", quiet)
    assert result.status == "Failed" and result.steps[-1].step == "evaluate" and "KeyError" in result.reason
    [executed] = (tiny / "r").glob("s3/*/pipeline/runs/r/executed/02_evaluate.ipynb")
    assert "KeyError" in executed.read_text()


@pytest.mark.slow
def test_an_evaluation_that_lacks_what_is_read(tiny):
    "As SageMaker, which fails the condition."
    (tiny / "evaluation.json").write_text(json.dumps({"gate": {}}))
    result = rehearse(pipeline_definition(), {}, tiny / "r", f"sqlite:///{tiny}/mlflow.db", tiny / "archive.zip", quiet)
    assert (result.status, result.steps[-1].step) == ("Failed", "gate")
    path = "multiclass_classification_metrics.accuracy.value"
    assert f"{path} cannot be read from evaluation.json of step evaluate" in result.reason


@pytest.mark.parametrize("given, expected", [
    ({"Profil": "quick"}, "no parameter Profil; did you mean Profile"),
    ({"AccuracyThreshold": "high"}, "which is no Float"),
    ({"TrainingInstanceType": "ml.none"}, "step train: "),
    ({"TrainSettings": '{"seeds": 1}'}, "step train: train has no parameter seeds; did you mean seed"),
    ({"TrainSettings": "no"}, "step train: the settings 'no' are no JSON object")])
def test_nothing_is_begun_with_wrong_parameters(tmp_path, given, expected):
    with pytest.raises(InputError, match=expected):
        rehearse(pipeline_definition(), given, tmp_path / "r", "sqlite:///none")
    assert not (tmp_path / "r").exists()


def test_an_input_that_is_not_there(tiny):
    result = rehearse(pipeline_definition(), {"InputDataUrl": "s3://elsewhere/intel.zip"}, tiny / "r",
                      "sqlite:///none", None,
                       quiet)
    assert (result.status, result.reason) == ("Failed", "there are no objects under s3://elsewhere/intel.zip")


CALL = """import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from intel_nb.aws.rehearsal import rehearse_in_workspace
print(rehearse_in_workspace(sys.argv[1]).status)"""


def test_a_rehearsal_that_is_stopped_leaves_no_process(tiny):
    notebook(tiny / "nbs" / "00_data.ipynb", "archive = ''\nannotations = []\nbuckets = []\nout_dir = ''",
             f"import os, time\npathlib.Path({str(tiny / 'pid')!r}).write_text(str(os.getpid()))\ntime.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", CALL, tiny / "archive.zip"],
                               env=os.environ | {"INTEL_NB_HOME": str(tiny / "home")},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tiny / "pid").exists() or not (tiny / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=40)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tiny / "pid").read_text()), 0)


@pytest.fixture(scope="module")
def real(tmp_path_factory, archive):
    "A rehearsal of the real notebooks on drawn scenes, in a workspace."
    home, before = tmp_path_factory.mktemp("rehearsal"), os.environ.get("INTEL_NB_HOME")
    os.environ["INTEL_NB_HOME"] = str(home)
    try:
        return home, rehearse_in_workspace(str(archive), QUICK, say=quiet)
    finally:
        os.environ.pop("INTEL_NB_HOME") if before is None else os.environ.update(INTEL_NB_HOME=before)


@pytest.mark.slow
def test_the_real_steps_in_the_pipeline(real):
    from intel_nb.registry import open_registry
    home, result = real
    assert result.status == "Succeeded", result.reason
    [version] = open_registry(f"sqlite:///{home}/mlflow.db").versions()
    [report] = result.folder.glob("s3/*/pipeline/runs/*/evaluate/evaluation.json")
    evaluation = read_json(report)
    assert version.accuracy == evaluation["multiclass_classification_metrics"]["accuracy"]["value"]
    assert version.version == result.version == "1" and version.run_id == result.folder.name


@pytest.mark.slow
def test_the_example_evaluation_has_the_form_of_a_real_one(real):
    "The example that paths are checked against has nothing that a real evaluation lacks, in the same types."
    [report] = real[1].folder.glob("s3/*/pipeline/runs/*/evaluate/evaluation.json")

    def same(example, found) -> None:
        assert type(example) is type(found), (example, found)
        for name in example if isinstance(example, dict) else ():
            same(example[name], found[name])
    same(EVALUATION, read_json(report))
    [kept] = real[1].folder.glob("s3/*/registry/*/keep.json")
    assert read_json(kept) == KEPT


@pytest.mark.slow
def test_the_same_accuracy_as_the_chain(real, waiting_once):
    "On the same data with the same settings, to the last digit."
    [step] = [s for s in waiting_once.newest()["steps"] if s["name"] == "evaluate"]
    [result] = real[1].folder.glob("s3/*/pipeline/runs/*/evaluate/result.json")
    assert abs(read_json(result)["accuracy"] - step["result"]["accuracy"]) < 1e-6
    assert (read_json(result)["fingerprint"], read_json(result)["data"]) == (step["result"]["fingerprint"],
                                                                             step["result"]["data"])


def test_a_broken_archive_is_the_users_fault(tmp_path, monkeypatch):
    monkeypatch.setenv("INTEL_NB_HOME", str(tmp_path / "home"))
    (tmp_path / "cut.zip").write_bytes(b"PK no more")
    with pytest.raises(InputError, match="no zip, or one that was cut short"):
        rehearse_in_workspace(str(tmp_path / "cut.zip"), say=quiet)
    with pytest.raises(InputError, match="nowhere.zip does not exist"):
        rehearse_in_workspace(str(tmp_path / "nowhere.zip"), say=quiet)
