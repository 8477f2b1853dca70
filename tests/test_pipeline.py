"""Test the pipeline's definition: mistakes are found without an account, and Amazon's own SDK writes the same."""
import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from intel_nb.aws.definition import walk_steps
from intel_nb.aws.pipeline import (
    NOTEBOOKS,
    PipelineConfig,
    check_pipeline,
    code_environment,
    pipeline_definition,
    pipeline_problems,
)
from intel_nb.chain.plan import notebooks_folder
from intel_nb.storage import InputError

CONFIG = PipelineConfig()


@pytest.fixture(scope="module")
def made() -> dict:
    return pipeline_definition(CONFIG)


def steps_of(made: dict) -> dict[str, dict]:
    "Return the steps by name, those in branches too."
    return {step["Name"]: step for step, _ in walk_steps(made["Steps"])}


def test_the_definition_passes(made):
    assert pipeline_problems(made) == []
    assert [step["Name"] for step in made["Steps"]] == ["data", "train", "evaluate", "gate", "keep", "once"]
    assert {name: step["Type"] for name, step in steps_of(made).items() if name not in NOTEBOOKS} == {
        "gate": "Condition", "keep": "Processing", "once": "Condition", "register": "RegisterModel", "refuse": "Fail"}
    assert set(json.loads(json.dumps(made))) == {"Version", "Metadata", "Parameters", "Steps"}


@pytest.mark.parametrize("config", [
    PipelineConfig(spot=True, instance_train="ml.g5.xlarge", region="eu-central-1"),
    PipelineConfig(annotations="s3://labels/annotations/", data="s3://data/intel.zip", cached_days=1),
    PipelineConfig(image_steps="123456789012.dkr.ecr.us-east-1.amazonaws.com/own:1", min_accuracy=0.9)])
def test_the_definition_passes_with_other_settings(config):
    assert pipeline_problems(pipeline_definition(config)) == []


def test_what_each_step_runs(made):
    steps = steps_of(made)
    for name, notebook in {"data": "00_data.ipynb", "train": "01_train.ipynb", "evaluate": "02_evaluate.ipynb"}.items():
        arguments = steps[name]["Arguments"]
        app = arguments.get("AppSpecification") or arguments["AlgorithmSpecification"]
        assert app["ContainerArguments"][0] == notebook
        assert steps[name]["CacheConfig"]["Enabled"] and steps[name]["RetryPolicies"]
    for name in ("data", "evaluate"):
        assert "executed" in [o["OutputName"] for o in steps[name]["Arguments"]["ProcessingOutputConfig"]["Outputs"]]
    assert steps["train"]["Arguments"]["TensorBoardOutputConfig"]["LocalPath"] == "/opt/ml/output/tensorboard"
    assert steps["register"]["Arguments"]["ModelApprovalStatus"] == "PendingManualApproval"


def test_spot_training_waits_and_keeps_checkpoints():
    arguments = steps_of(pipeline_definition(PipelineConfig(spot=True)))["train"]["Arguments"]
    assert arguments["EnableManagedSpotTraining"]
    assert arguments["CheckpointConfig"]["LocalPath"] == "/opt/ml/checkpoints"
    stop = arguments["StoppingCondition"]
    assert stop["MaxWaitTimeInSeconds"] > stop["MaxRuntimeInSeconds"]


def test_the_cache_key_does_not_change_with_the_execution(made):
    "With an execution's id in one of these arguments, the cache would never find a step."
    compared = {"Processing": ("AppSpecification", "Environment", "ProcessingInputs"),
                "Training": ("AlgorithmSpecification", "CheckpointConfig", "Environment", "HyperParameters",
                             "InputDataConfig")}
    for step in steps_of(made).values():
        for key in compared.get(step["Type"], ()):
            assert "Execution." not in json.dumps(step["Arguments"].get(key)), (step["Name"], key)


def test_each_job_knows_its_code(made, tmp_path, monkeypatch):
    (tmp_path / "nbs").mkdir()
    for notebook in NOTEBOOKS.values():
        shutil.copy(notebooks_folder() / notebook, tmp_path / "nbs")
    before = code_environment()
    steps = steps_of(made)
    for name in ("data", "train", "evaluate", "keep"):
        assert steps[name]["Arguments"]["Environment"].items() >= before.items()
    assert before["INTEL_NB_CODE"] in steps["train"]["Arguments"]["CheckpointConfig"]["S3Uri"]["Std:Join"]["Values"]
    assert "PYTHONPATH" not in json.dumps(made) and "code" not in json.dumps(sorted(inputs_of(made)))
    monkeypatch.setenv("INTEL_NB_NOTEBOOKS", str(tmp_path / "nbs"))
    assert code_environment() == before, "the same content has the same digest"
    (tmp_path / "nbs" / "01_train.ipynb").write_text("{}")
    assert code_environment() != before


def inputs_of(made: dict) -> set[str]:
    "Return the names of all inputs."
    return {one.get("InputName") or one["ChannelName"] for step in steps_of(made).values()
            for key in ("ProcessingInputs", "InputDataConfig") for one in step["Arguments"].get(key, [])}


def test_only_the_registrar_writes_where_registered_packages_lie(made):
    "And what is registered comes from there."
    for name, step in steps_of(made).items():
        arguments = step["Arguments"]
        outputs = [arguments.get(key) for key in ("ProcessingOutputConfig", "OutputDataConfig", "CheckpointConfig")]
        roles = {arguments.get("RoleArn", CONFIG.role)}
        assert roles == {CONFIG.registrar_role if "/registry" in json.dumps(outputs) else CONFIG.role}, name
    register = json.dumps(steps_of(made)["register"]["Arguments"])
    assert register.count("Steps.keep.ProcessingOutputConfig") == 2 and "Steps.train" not in register


@pytest.mark.slow
def test_an_installed_wheel_has_the_same_code(tmp_path):
    "What the image gets and what the checkout has: one digest."
    source = notebooks_folder().parent
    for name in ("pyproject.toml", "README.md", "LICENSE", "settings.ini"):
        shutil.copy(source / name, tmp_path)
    shutil.copytree(source / "intel_nb", tmp_path / "intel_nb", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
             "--wheel-dir", tmp_path / "wheels", tmp_path]
    subprocess.run(build, check=True, timeout=300)
    [wheel] = (tmp_path / "wheels").glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    code = "from intel_nb.aws.pipeline import code_files, digest_code as d; import intel_nb; print(intel_nb.__file__); "
    bare = {"PYTHONPATH": str(tmp_path / "installed"), "INTEL_NB_NOTEBOOKS": str(notebooks_folder())}
    done = subprocess.run([sys.executable, "-P", "-c", code + "print(d(code_files()))"], env=os.environ | bare,
                          cwd=tmp_path / "wheels", capture_output=True, text=True, check=True, timeout=60)
    where, digest = done.stdout.split()
    assert where.startswith(str(tmp_path / "installed"))
    assert digest == code_environment()["INTEL_NB_CODE"]


def setting(step: str, *path, value):
    "Return a change that sets one argument of a step."
    def change(steps: dict[str, dict]) -> None:
        arguments = steps[step]["Arguments"]
        for part in path[:-1]:
            arguments = arguments[part]
        arguments[path[-1]] = value
    return change


def dropping(step: str, *path):
    "Return a change that removes one argument of a step."
    def change(steps: dict[str, dict]) -> None:
        arguments = steps[step]["Arguments"]
        for part in path[:-1]:
            arguments = arguments[part]
        del arguments[path[-1]]
    return change


def updating(step: str, **values):
    "Return a change that sets keys of a step beside its arguments."
    return lambda steps: steps[step].update(values)


def get(path: str) -> dict:
    return {"Get": path}


def read(path: str, file: str = "Steps.evaluate.PropertyFiles.Evaluation") -> dict:
    return {"Std:JsonGet": {"PropertyFile": get(file), "Path": path}}


CLUSTER = ("ProcessingResources", "ClusterConfig")
URI = ("S3Input", "S3Uri")
OUTPUT_PATH = ("OutputDataConfig", "S3OutputPath")
DATASET = ("InputDataConfig", 0, "DataSource", "S3DataSource", "S3Uri")
RETRY = {"ExceptionType": ["Step.THROTTLING"], "IntervalSeconds": 1, "BackoffRate": 2.0, "MaxAttempts": 2}
ENDLESS = {key: value for key, value in RETRY.items() if key != "MaxAttempts"}
OUT = {"S3Uri": "s3://b/o", "LocalPath": "/opt/ml/processing/o", "S3UploadMode": "EndOfJob"}
TWO_OUTPUTS = [{"OutputName": "o", "S3Output": OUT},
               {"OutputName": "o", "S3Output": OUT | {"LocalPath": "/opt/ml/processing/p"}}]
MISPLACED_FILE = {"PropertyFileName": "Evaluation", "OutputName": "evaluation", "FilePath": "evaluation.json"}

BROKEN = {  # the change, the step that the problem must name, and a part of its message
    "unknown instance type": (setting("data", *CLUSTER, "InstanceType", value="ml.huge"), "data", "'ml.huge'"),
    "missing role": (dropping("train", "RoleArn"), "train", "RoleArn"),
    "role that is no ARN": (setting("evaluate", "RoleArn", value="me"), "evaluate", "RoleArn"),
    "misspelt argument": (setting("data", *CLUSTER, "VolumeSizeGB", value=1), "data", "VolumeSizeGB"),
    "wrong type of an argument": (
        setting("train", "ResourceConfig", "InstanceCount", value="one"), "train", "InstanceCount"),
    "value outside an enumeration": (
        setting("data", "ProcessingInputs", 0, "S3Input", "S3InputMode", value="Files"), "data", "'Files'"),
    "number where text is needed": (
        setting("data", "Environment", "INTEL_NB_DATA_VERSION", value=get("Parameters.AccuracyThreshold")),
        "data", "INTEL_NB_DATA_VERSION"),
    "unknown parameter": (
        setting("data", "ProcessingInputs", 0, *URI, value=get("Parameters.InputDataUri")),
        "data", "did you mean InputDataUrl?"),
    "unknown variable of the execution": (
        setting("train", *OUTPUT_PATH, value=get("Execution.Id")), "train", "Execution.Id is not there"),
    "reference to nothing known": (
        setting("train", *OUTPUT_PATH, value=get("Step.data.X")), "train", "begins with none of"),
    "unknown step": (
        setting("evaluate", "ProcessingInputs", 1, *URI, value=get("Steps.trian.ModelArtifacts.S3ModelArtifacts")),
        "evaluate", "there is no step trian; did you mean train?"),
    "unknown property": (
        setting("evaluate", "ProcessingInputs", 1, *URI, value=get("Steps.train.ModelArtifact.S3ModelArtifacts")),
        "evaluate", "did you mean ModelArtifacts?"),
    "unknown output": (
        setting("train", *DATASET, value=get("Steps.data.ProcessingOutputConfig.Outputs['dta'].S3Output.S3Uri")),
        "train", "did you mean data?"),
    "property of a step that has none": (
        setting("refuse", "ErrorMessage", value=get("Steps.gate.Outcome")), "refuse", "which has no properties"),
    "property file not declared": (
        updating("evaluate", PropertyFiles=[]), "gate", "declares no property file Evaluation"),
    "property file of another step": (
        setting("refuse", "ErrorMessage", value=read("gate.reason", "Steps.data.PropertyFiles.Evaluation")),
        "refuse", "step data declares no property file Evaluation"),
    "property file in an unknown output": (
        updating("evaluate", PropertyFiles=[MISPLACED_FILE]), "evaluate", "there is no such output"),
    "entry that is no number": (
        setting("gate", "Conditions", 0, "LeftValue", value=read("multiclass_classification_metrics.accuracy")),
        "gate", "cannot be decided"),
    "misspelt path": (
        setting("gate", "Conditions", 1, "LeftValue", value=read("gate.pased")), "gate", "will hold no gate.pased"),
    "number against text": (setting("gate", "Conditions", 0, "RightValue", value="0.8"), "gate", "cannot be compared"),
    "unknown condition": (
        setting("gate", "Conditions", 0, "Type", value="AtLeast"), "gate", "there are Equals, GreaterThan"),
    "condition without a side": (dropping("gate", "Conditions", 0, "RightValue"), "gate", "malformed"),
    "no conditions": (setting("gate", "Conditions", value=[]), "gate", "has no Conditions"),
    "same name twice": (updating("evaluate", Name="data"), "data", "2 steps of that name"),
    "same name in a branch": (updating("register", Name="train"), "train", "2 steps of that name"),
    "name with a blank": (updating("data", Name="the data"), "the data", "letters, digits"),
    "unknown type of step": (updating("train", Type="Trainig"), "train", "did you mean Training?"),
    "misspelt key": (updating("train", CacheConfi={}), "train", "did you mean CacheConfig?"),
    "cached condition": (
        updating("gate", CacheConfig={"Enabled": True, "ExpireAfter": "P1d"}), "gate", "has no CacheConfig"),
    "no arguments": (lambda steps: steps["train"].pop("Arguments"), "train", "Arguments are missing"),
    "dependency that does not exist": (
        updating("train", DependsOn=["dat"]), "train", "there is no such step; did you mean data?"),
    "waits for itself": (updating("data", DependsOn=["data"]), "data", "waits for itself"),
    "waits in a circle": (updating("data", DependsOn=["evaluate"]), "data", "waits for itself, by way of"),
    "waits for a branch": (
        updating("evaluate", DependsOn=["register"]), "evaluate", "runs only in once.IfSteps"),
    "waits for the other branch": (updating("refuse", DependsOn=["register"]), "refuse", "runs only in once.IfSteps"),
    "cached for a month or so": (
        updating("data", CacheConfig={"Enabled": True, "ExpireAfter": "a month"}), "data", "no duration"),
    "retried for ever": (updating("train", RetryPolicies=[ENDLESS]), "train", "either MaxAttempts or"),
    "retried too often": (updating("train", RetryPolicies=[RETRY | {"MaxAttempts": 21}]), "train", "from 1 to 20"),
    "retried after an unknown error": (
        updating("data", RetryPolicies=[RETRY | {"ExceptionType": ["Step.TIMEOUT"]}]), "data", "Step.TIMEOUT"),
    "malformed join": (
        setting("train", *OUTPUT_PATH, value={"Std:Join": {"On": "/"}}), "train", "no call of Std:Join"),
    "get of a list": (setting("train", *OUTPUT_PATH, value=get(["Parameters", "X"])), "train", "no call of Get"),
    "spot that does not wait": (setting("train", "EnableManagedSpotTraining", value=True), "train", "go together"),
    "spot that waits too short": (
        lambda steps: steps["train"]["Arguments"].update(
            EnableManagedSpotTraining=True,
            StoppingCondition={"MaxRuntimeInSeconds": 100, "MaxWaitTimeInSeconds": 50}),
        "train", "below MaxRuntimeInSeconds"),
    "two slashes in an address": (
        setting("train", *OUTPUT_PATH, value="s3://bucket//train"), "train", "two slashes in a row"),
    "registered without a look": (
        setting("once", "Conditions", 0, "LeftValue", value=read("neu", "Steps.keep.PropertyFiles.Keep")),
        "once", "keep.json of step keep will hold no neu"),
    "output named twice": (
        lambda steps: steps["data"]["Arguments"]["ProcessingOutputConfig"]["Outputs"].extend(TWO_OUTPUTS),
        "data", "output o twice"),
    "two mounts in one folder": (
        setting("data", "ProcessingInputs", 1, "S3Input", "LocalPath", value="/opt/ml/processing/input/archive"),
        "data", "folder /opt/ml/processing/input/archive twice"),
    "mount elsewhere": (
        setting("data", "ProcessingInputs", 0, "S3Input", "LocalPath", value="/data"),
        "data", "not below /opt/ml/processing"),
    "name of the job": (setting("data", "ProcessingJobName", value="mine"), "data", "cannot be set"),
    "failure without a message": (setting("refuse", "ErrorMessage", value=""), "refuse", "1 to 3072 characters"),
    "status of approval": (setting("register", "ModelApprovalStatus", value="Maybe"), "register", "'Maybe'"),
    "evaluation without a URI": (
        setting("register", "ModelMetrics", "ModelQuality", "Statistics", "S3Uri", value="evaluation.json"),
        "register", "S3Uri"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_definition_names_the_step(made, name):
    change, step, expected = BROKEN[name]
    broken = copy.deepcopy(made)
    change(steps_of(broken))
    problems = pipeline_problems(broken)
    assert any(p.step == step and expected in p.message for p in problems), [str(p) for p in problems]
    with pytest.raises(InputError, match=f"step {step}: |more"):
        check_pipeline(broken)


@pytest.mark.parametrize("change, expected", [
    (lambda made: made.pop("Steps"), "a list of Steps"),
    (lambda made: made.update(Version="2021"), "only '2020-12-01' is known"),
    (lambda made: made.update(Step=[]), "no Step; did you mean Steps?"),
    (lambda made: made["Parameters"][0].pop("DefaultValue"), "InputDataUrl is None, which is no String"),
    (lambda made: made["Parameters"][6].update(DefaultValue="high"), "AccuracyThreshold is 'high', which is no Float"),
    (lambda made: made["Parameters"][0].update(Type="Text"), "a type of String, Integer"),
    (lambda made: made["Parameters"].append(made["Parameters"][0]), "2 parameters called InputDataUrl")])
def test_a_definition_that_is_broken_outside_its_steps_says_so(made, change, expected):
    broken = copy.deepcopy(made)
    change(broken)
    assert expected in "; ".join(map(str, pipeline_problems(broken)))


def test_parameter_values_are_checked(made):
    assert pipeline_problems(made, {"TrainingInstanceType": "ml.p3.2xlarge", "AccuracyThreshold": "0.9"}) == []
    assert [p.step for p in pipeline_problems(made, {"TrainingInstanceType": "ml.none"})] == ["train"]
    assert {p.step for p in pipeline_problems(made, {"ProcessingInstanceType": "m5.large"})} == {
        "data", "evaluate", "keep"}
    [problem] = pipeline_problems(made, {"TrainSettings": "x" * 300})
    assert str(problem) == ("step train: AlgorithmSpecification.ContainerArguments[4] has 300 characters, "
                            "more than 256; it comes from the parameter TrainSettings")
    assert pipeline_problems(made, {"TrainSettings": "x" * 256}) == []
    [problem] = pipeline_problems(made, {"InputDataUrl": "s3://photographs//intel.zip"})
    assert problem.step == "data" and "two slashes in a row" in problem.message


def test_the_definition_is_the_same_in_every_process():
    "It needs neither a network nor credentials."
    code = """import json
from intel_nb.aws.pipeline import pipeline_definition
print(json.dumps(pipeline_definition(), sort_keys=True))"""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    runs = [subprocess.Popen([sys.executable, "-c", code], env=bare | {"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE)
            for seed in ("1", "2")]
    first, second = (run.communicate(timeout=60)[0] for run in runs)
    assert first and first == second
    assert pipeline_problems(json.loads(first)) == []


@pytest.mark.slow
def test_amazons_sdk_writes_the_same(made, tmp_path):
    "The SDK is the oracle: whatever it can express, it writes as we do."
    (tmp_path / "config.yaml").write_text(
        "SchemaVersion: '1.0'\nSageMaker: {PythonSDK: {Modules: {TelemetryOptOut: true}}}\n")
    offline = {"AWS_DEFAULT_REGION": "us-east-1", "SAGEMAKER_VALIDATE_ROLE": "false",
               "AWS_EC2_METADATA_DISABLED": "true",
               "SAGEMAKER_USER_CONFIG_OVERRIDE": str(tmp_path / "config.yaml")}
    script = Path(__file__).with_name("sdk_oracle.py")
    done = subprocess.run([sys.executable, script, tmp_path / "sdk.json"], env=os.environ | offline,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    written, expected = json.loads((tmp_path / "sdk.json").read_text()), copy.deepcopy(made)
    assert pipeline_problems(written) == []
    for key in ("ContainerEntrypoint", "ContainerArguments"):  # the SDK cannot set a training job's entry point
        del steps_of(expected)["train"]["Arguments"]["AlgorithmSpecification"][key]
    for container in steps_of(written)["register"]["Arguments"]["InferenceSpecification"]["Containers"]:
        environment = container.pop("Environment")  # it is for a script, and our container has none
        assert all(name.startswith("SAGEMAKER_") for name in environment)
    assert without_defaults(written) == without_defaults(expected)


# Values that the service takes when a key is left out.
DEFAULTS = [("AppManaged", False), ("S3DataDistributionType", "FullyReplicated"), ("S3CompressionType", "None"),
            ("SkipModelValidation", "None")]


def without_defaults(value):
    "Return a definition without empty values and the service's defaults."
    if isinstance(value, list):
        return [without_defaults(one) for one in value]
    if not isinstance(value, dict):
        return value
    plain = {name: without_defaults(one) for name, one in value.items() if (name, one) not in DEFAULTS}
    return {name: one for name, one in plain.items() if one is not None and one != {}}
