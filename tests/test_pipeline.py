"The pipeline's definition: what SageMaker would refuse is refused here, and Amazon's own SDK writes the same."
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from intel_nb.aws.pipeline import PipelineConfig, check_definition, checked, definition
from intel_nb.storage import InputError

CONFIG = PipelineConfig(code="s3://bucket/code/0123")


@pytest.fixture(scope="module")
def made() -> dict:
    return definition(CONFIG)


def steps_of(made: dict) -> dict[str, dict]:
    "The steps by name, those in branches too."
    found = {step["Name"]: step for step in made["Steps"]}
    gate = found["gate"]["Arguments"]
    return found | {"register": gate["IfSteps"][0], "refuse": gate["ElseSteps"][0]}


def test_the_definition_passes(made):
    assert check_definition(made) == []
    assert [step["Name"] for step in made["Steps"]] == ["data", "train", "evaluate", "gate"]
    assert set(json.loads(json.dumps(made))) == {"Version", "Metadata", "Parameters", "Steps"}


@pytest.mark.parametrize("config", [
    PipelineConfig(spot=True, instance_train="ml.g5.xlarge", region="eu-central-1"),
    PipelineConfig(annotations="s3://labels/annotations/", data="s3://data/intel.zip", cached_days=1),
    PipelineConfig(image_process="123456789012.dkr.ecr.us-east-1.amazonaws.com/own:1", min_accuracy=0.9)])
def test_so_it_does_with_other_settings(config):
    assert check_definition(definition(config)) == []


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
    arguments = steps_of(definition(PipelineConfig(code="s3://b/c/1", spot=True)))["train"]["Arguments"]
    assert arguments["EnableManagedSpotTraining"] and arguments["CheckpointConfig"]["LocalPath"] == "/opt/ml/checkpoints"
    assert arguments["StoppingCondition"]["MaxWaitTimeInSeconds"] > arguments["StoppingCondition"]["MaxRuntimeInSeconds"]


def test_nothing_that_the_cache_looks_at_changes_with_the_execution(made):
    "An address with the execution's id in it, among these, and no step would ever be found in the cache."
    looked_at = {"Processing": ("AppSpecification", "Environment", "ProcessingInputs"),
                 "Training": ("AlgorithmSpecification", "CheckpointConfig", "Environment", "HyperParameters", "InputDataConfig")}
    for step in steps_of(made).values():
        for key in looked_at.get(step["Type"], ()):
            assert "Execution." not in json.dumps(step["Arguments"].get(key)), (step["Name"], key)


def test_other_code_has_another_address(tmp_path, monkeypatch):
    import shutil

    from intel_nb.aws.pipeline import code_uri
    from intel_nb.chain.plan import notebooks_folder
    shutil.copytree(notebooks_folder(), tmp_path / "nbs")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(notebooks_folder().parent / name, tmp_path)
    before = code_uri(PipelineConfig())
    monkeypatch.setenv("INTEL_NB_NOTEBOOKS", str(tmp_path / "nbs"))
    assert code_uri(PipelineConfig()) == before, "it is the content that counts"
    (tmp_path / "nbs" / "01_train.ipynb").write_text("{}")
    assert code_uri(PipelineConfig()) != before


def argument(step: str, *path, value=None, drop=False):
    "A change to one argument of a step."
    def change(steps: dict[str, dict]) -> None:
        place = steps[step]["Arguments"]
        for part in path[:-1]:
            place = place[part]
        if drop:
            del place[path[-1]]
        else:
            place[path[-1]] = value
    return change


def whole(step: str, **values):
    "A change to what stands beside a step's arguments."
    return lambda steps: steps[step].update(values)


def get(path: str) -> dict:
    return {"Get": path}


def read(path: str, file: str = "Steps.evaluate.PropertyFiles.Evaluation") -> dict:
    return {"Std:JsonGet": {"PropertyFile": get(file), "Path": path}}


CLUSTER = ("ProcessingResources", "ClusterConfig")
RETRY = {"ExceptionType": ["Step.THROTTLING"], "IntervalSeconds": 1, "BackoffRate": 2.0, "MaxAttempts": 2}
OUT = {"S3Uri": "s3://b/o", "LocalPath": "/opt/ml/processing/o", "S3UploadMode": "EndOfJob"}

BROKEN = {  # what is changed, the step that must be named, and what must be said
    "unknown instance type": (argument("data", *CLUSTER, "InstanceType", value="ml.huge"), "data", "'ml.huge'"),
    "missing role": (argument("train", "RoleArn", drop=True), "train", "RoleArn"),
    "role that is no ARN": (argument("evaluate", "RoleArn", value="me"), "evaluate", "RoleArn"),
    "misspelt argument": (argument("data", *CLUSTER, "VolumeSizeGB", value=1), "data", "VolumeSizeGB"),
    "wrong type of an argument": (argument("train", "ResourceConfig", "InstanceCount", value="one"), "train", "InstanceCount"),
    "value outside an enumeration": (argument("data", "ProcessingInputs", 1, "S3Input", "S3InputMode", value="Files"), "data", "'Files'"),
    "number where text is needed": (
        argument("data", "Environment", "INTEL_NB_DATA_VERSION", value=get("Parameters.AccuracyThreshold")), "data", "INTEL_NB_DATA_VERSION"),
    "unknown parameter": (argument("data", "ProcessingInputs", 1, "S3Input", "S3Uri", value=get("Parameters.InputDataUri")), "data", "did you mean InputDataUrl?"),
    "unknown variable of the execution": (
        argument("train", "OutputDataConfig", "S3OutputPath", value=get("Execution.Id")), "train", "Execution.Id is not there"),
    "reference to nothing known": (argument("train", "OutputDataConfig", "S3OutputPath", value=get("Step.data.X")), "train", "begins with none of"),
    "unknown step": (argument("evaluate", "ProcessingInputs", 2, "S3Input", "S3Uri", value=get("Steps.trian.ModelArtifacts.S3ModelArtifacts")),
                     "evaluate", "there is no step trian; did you mean train?"),
    "unknown property": (argument("evaluate", "ProcessingInputs", 2, "S3Input", "S3Uri", value=get("Steps.train.ModelArtifact.S3ModelArtifacts")),
                         "evaluate", "did you mean ModelArtifacts?"),
    "unknown output": (argument("train", "InputDataConfig", 1, "DataSource", "S3DataSource", "S3Uri",
                                value=get("Steps.data.ProcessingOutputConfig.Outputs['dta'].S3Output.S3Uri")), "train", "did you mean data?"),
    "property of a step that has none": (argument("refuse", "ErrorMessage", value=get("Steps.gate.Outcome")), "refuse", "which has no properties"),
    "property file not declared": (whole("evaluate", PropertyFiles=[]), "gate", "declares no property file Evaluation"),
    "property file of another step": (argument("refuse", "ErrorMessage", value=read("gate.reason", "Steps.data.PropertyFiles.Evaluation")),
                                      "refuse", "step data declares no property file Evaluation"),
    "property file in an unknown output": (whole("evaluate", PropertyFiles=[{"PropertyFileName": "Evaluation", "OutputName": "evaluation",
                                                                           "FilePath": "evaluation.json"}]), "evaluate", "there is no such output"),
    "entry that is no number": (argument(
        "gate", "Conditions", 0, "LeftValue", value=read("multiclass_classification_metrics.accuracy")), "gate", "cannot be decided"),
    "misspelt path": (argument("gate", "Conditions", 1, "LeftValue", value=read("gate.pased")), "gate", "will hold no gate.pased"),
    "number against text": (argument("gate", "Conditions", 0, "RightValue", value="0.8"), "gate", "cannot be compared"),
    "unknown condition": (argument("gate", "Conditions", 0, "Type", value="AtLeast"), "gate", "there are Equals, GreaterThan"),
    "condition without a side": (argument("gate", "Conditions", 0, "RightValue", drop=True), "gate", "malformed"),
    "no conditions": (argument("gate", "Conditions", value=[]), "gate", "has no Conditions"),
    "same name twice": (lambda steps: steps["evaluate"].update(Name="data"), "data", "2 steps of that name"),
    "same name in a branch": (whole("register", Name="train"), "train", "2 steps of that name"),
    "name with a blank": (whole("data", Name="the data"), "the data", "letters, digits"),
    "unknown type of step": (whole("train", Type="Trainig"), "train", "did you mean Training?"),
    "misspelt key": (whole("train", CacheConfi={}), "train", "did you mean CacheConfig?"),
    "cached verdict": (whole("gate", CacheConfig={"Enabled": True, "ExpireAfter": "P1d"}), "gate", "has no CacheConfig"),
    "no arguments": (lambda steps: steps["train"].pop("Arguments"), "train", "Arguments are missing"),
    "depends on nobody": (whole("train", DependsOn=["dat"]), "train", "there is no such step; did you mean data?"),
    "waits for itself": (whole("data", DependsOn=["data"]), "data", "waits for itself"),
    "waits in a circle": (whole("data", DependsOn=["evaluate"]), "data", "waits for itself, by way of"),
    "waits for a branch": (whole("evaluate", DependsOn=["register"]), "evaluate", "runs only in gate.IfSteps"),
    "waits for the other branch": (whole("refuse", DependsOn=["register"]), "refuse", "runs only in gate.IfSteps"),
    "cached for a month or so": (whole("data", CacheConfig={"Enabled": True, "ExpireAfter": "a month"}), "data", "no duration"),
    "retried for ever": (whole("train", RetryPolicies=[{k: v for k, v in RETRY.items() if k != "MaxAttempts"}]), "train", "either MaxAttempts or"),
    "retried too often": (whole("train", RetryPolicies=[RETRY | {"MaxAttempts": 21}]), "train", "from 1 to 20"),
    "retried after an unknown error": (whole("data", RetryPolicies=[RETRY | {"ExceptionType": ["Step.TIMEOUT"]}]), "data", "Step.TIMEOUT"),
    "malformed join": (argument("train", "OutputDataConfig", "S3OutputPath", value={"Std:Join": {"On": "/"}}), "train", "no call of Std:Join"),
    "get of a list": (argument("train", "OutputDataConfig", "S3OutputPath", value=get(["Parameters", "X"])), "train", "no call of Get"),
    "spot that does not wait": (argument("train", "EnableManagedSpotTraining", value=True), "train", "go together"),
    "spot that waits too short": (lambda steps: steps["train"]["Arguments"].update(
        EnableManagedSpotTraining=True, StoppingCondition={"MaxRuntimeInSeconds": 100, "MaxWaitTimeInSeconds": 50}), "train", "below MaxRuntimeInSeconds"),
    "output given twice": (lambda steps: steps["data"]["Arguments"]["ProcessingOutputConfig"]["Outputs"].extend(
        [{"OutputName": "o", "S3Output": OUT}, {"OutputName": "o", "S3Output": OUT | {"LocalPath": "/opt/ml/processing/p"}}]), "data", "output o twice"),
    "two mounts in one folder": (argument("data", "ProcessingInputs", 2, "S3Input", "LocalPath", value="/opt/ml/processing/input/archive"),
                                 "data", "folder /opt/ml/processing/input/archive twice"),
    "mount elsewhere": (argument("data", "ProcessingInputs", 1, "S3Input", "LocalPath", value="/data"), "data", "not below /opt/ml/processing"),
    "name of the job": (argument("data", "ProcessingJobName", value="mine"), "data", "cannot be set"),
    "failure without a word": (argument("refuse", "ErrorMessage", value=""), "refuse", "1 to 3072 characters"),
    "status of approval": (argument("register", "ModelApprovalStatus", value="Maybe"), "register", "'Maybe'"),
    "evaluation that lies nowhere": (argument("register", "ModelMetrics", "ModelQuality", "Statistics", "S3Uri", value="evaluation.json"),
                                     "register", "S3Uri"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_definition_names_the_step(made, name):
    change, step, expected = BROKEN[name]
    broken = copy.deepcopy(made)
    change(steps_of(broken))
    problems = check_definition(broken)
    assert any(p.step == step and expected in p.message for p in problems), [str(p) for p in problems]
    with pytest.raises(InputError, match=f"step {step}: |more"):
        checked(broken)


@pytest.mark.parametrize("change, expected", [
    (lambda made: made.pop("Steps"), "a list of Steps"), (lambda made: made.update(Version="2021"), "only '2020-12-01' is known"),
    (lambda made: made.update(Step=[]), "no Step; did you mean Steps?"), (lambda made: made["Parameters"][0].pop("DefaultValue"), "InputDataUrl is None, which is no String"),
    (lambda made: made["Parameters"][5].update(DefaultValue="high"), "AccuracyThreshold is 'high', which is no Float"),
    (lambda made: made["Parameters"][0].update(Type="Text"), "a type of String, Integer"),
    (lambda made: made["Parameters"].append(made["Parameters"][0]), "2 parameters called InputDataUrl")])
def test_so_does_one_that_is_broken_as_a_whole(made, change, expected):
    broken = copy.deepcopy(made)
    change(broken)
    assert expected in "; ".join(map(str, check_definition(broken)))


def test_parameters_are_checked_as_they_are_given(made):
    assert check_definition(made, {"TrainingInstanceType": "ml.p3.2xlarge", "AccuracyThreshold": "0.9"}) == []
    assert [p.step for p in check_definition(made, {"TrainingInstanceType": "ml.none"})] == ["train"]
    assert {p.step for p in check_definition(made, {"ProcessingInstanceType": "m5.large"})} == {"data", "evaluate"}
    assert [p.step for p in check_definition(made, {"TrainSettings": "x" * 300})] == ["train"], "an argument has 256 characters at most"


def test_the_definition_is_the_same_in_every_process():
    "And takes neither network nor credentials."
    code = "import json; from intel_nb.aws.pipeline import definition; print(json.dumps(definition(), sort_keys=True))"
    bare = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    first, second = (subprocess.run([sys.executable, "-c", code], env=bare | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True).stdout
                     for seed in ("1", "2"))
    assert first == second
    assert check_definition(json.loads(first)) == []


@pytest.mark.slow
def test_amazons_sdk_writes_the_same(made, tmp_path):
    "The SDK is the oracle: all that it can express, it expresses as we do."
    (tmp_path / "config.yaml").write_text("SchemaVersion: '1.0'\nSageMaker: {PythonSDK: {Modules: {TelemetryOptOut: true}}}\n")
    offline = {"AWS_DEFAULT_REGION": "us-east-1", "SAGEMAKER_VALIDATE_ROLE": "false", "AWS_EC2_METADATA_DISABLED": "true",
               "SAGEMAKER_USER_CONFIG_OVERRIDE": str(tmp_path / "config.yaml")}
    (tmp_path / "ours.json").write_text(json.dumps(made))
    script = Path(__file__).with_name("sdk_oracle.py")
    done = subprocess.run([sys.executable, script, tmp_path / "ours.json", tmp_path / "theirs.json"], env=os.environ | offline,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs, ours = json.loads((tmp_path / "theirs.json").read_text()), copy.deepcopy(made)
    assert check_definition(theirs) == []
    for key in ("ContainerEntrypoint", "ContainerArguments"):  # it cannot name an entry point for a training job
        del steps_of(ours)["train"]["Arguments"]["AlgorithmSpecification"][key]
    for container in steps_of(theirs)["register"]["Arguments"]["InferenceSpecification"]["Containers"]:
        assert all(name.startswith("SAGEMAKER_") for name in container.pop("Environment"))  # for a script, which ours has not
    assert without_defaults(theirs) == without_defaults(ours)


DEFAULTS = [("AppManaged", False), ("S3DataDistributionType", "FullyReplicated"), ("S3CompressionType", "None"),
            ("SkipModelValidation", "None")]  # the service's


def without_defaults(value):
    "What is said in a definition, without what goes without saying."
    if isinstance(value, list):
        return [without_defaults(one) for one in value]
    if not isinstance(value, dict):
        return value
    plain = {name: without_defaults(one) for name, one in value.items() if (name, one) not in DEFAULTS}
    return {name: one for name, one in plain.items() if one is not None and one != {}}
