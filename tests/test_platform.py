"""Test the registry, the endpoints, the drift job and executions on AWS, against an emulator over real HTTP.

The emulator is moto, and tests/cloud.py adds what it lacks. Each request is also checked against the service's model.
"""
import ast
import itertools
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import papermill
import pytest
from cloud import ROLE, backend, cloud, cloud_once, create_group  # noqa: F401
from cloud_pipelines import CodePipeline, codepipelines
from cloud_stack import stacks
from test_deploy_staging import NOTEBOOKS
from test_registry import (  # noqa: F401
    evaluation,
    package,
    register,
    test_a_changed_package_is_not_registered,
    test_everything_about_a_version,
)

from intel_nb.aws import capture, changes, deploy, executions, hosting as hosting_module, operations, stages
from intel_nb.aws.client import client
from intel_nb.aws.definition import Scope, lookup_path, resolve_value, step_arguments
from intel_nb.aws.hosting import SageMakerEndpoints, instance_limits
from intel_nb.aws.objects import upload
from intel_nb.aws.package_group import GroupSettings, PackageGroup
from intel_nb.aws.pipeline import EVALUATION, PipelineConfig, register_step as register_step
from intel_nb.aws.stack import Options, template
from intel_nb.aws.stages import Platform
from intel_nb.dataset import read_split, sample_dataset, write_predictions
from intel_nb.images import encode_jpeg
from intel_nb.model import load_package, pack
from intel_nb.registry import open_registry
from intel_nb.scenes import sample_scene
from intel_nb.serving.endpoints import EndpointError, LocalEndpoints, Refused, drift_status, invoke, is_answering
from intel_nb.storage import InputError, read_json, write_json, write_text

SMALL = {"Version": "2020-12-01", "Parameters": [], "Steps": []}
PHOTO = encode_jpeg(sample_scene(4, np.random.default_rng(0)))  # a sea that a small package knows


@pytest.fixture
def registry(cloud):
    return open_registry(cloud.group())


# The registry. The imported tests of MLflow's registry run here too; the tests below are about what only AWS has.

def test_an_empty_group_answers(registry):
    assert registry.versions() == [] and registry.champion() is None
    with pytest.raises(InputError, match="there is no version 1; there are: none yet"):
        registry.get("1")
    with pytest.raises(InputError, match="no version 1"):
        registry.set_status("1", "Approved")


def test_versions_are_listed_and_approved_from_the_command_line(cloud, registry, package):
    from test_aws_commands import command
    version, rejected = register(registry, package), register(registry, package, status="Rejected", reason="too dark")
    rows = json.loads(command("models", "--json").stdout)
    assert [(row["version"], row["status"]) for row in rows] == [
        (rejected, "Rejected"), (version, "PendingManualApproval")]
    for _ in range(2):
        done = command("approve", version)
        assert (done.returncode, "is Approved" in done.stdout) == (0, True), done.stderr
    assert registry.get(version).status == "Approved"
    done = command("approve", rejected)
    assert (done.returncode, "is rejected (too dark) and stays so" in done.stderr) == (1, True)
    assert command("approve", "77").returncode == 2


def test_a_group_that_is_not_there(cloud, package):
    registry = open_registry("sagemaker://nowhere")
    assert registry.versions() == [] and registry.champion() is None
    with pytest.raises(InputError, match="no deployment nowhere, .* is missing; intel-nb aws deploy"):
        register(registry, package)


def test_more_versions_than_a_page_has(registry, package, cloud):
    described = registry.describe(register(registry, package))
    keys = ("ModelPackageGroupName", "InferenceSpecification", "ModelMetrics", "CustomerMetadataProperties",
            "ModelApprovalStatus")
    for _ in range(104):
        client("sagemaker").create_model_package(**{key: described[key] for key in keys})
    assert [v.version for v in registry.versions()] == [str(n) for n in range(105, 0, -1)]
    assert registry.get("2").accuracy == 0.9


def test_an_alias_moves_in_one_step(registry, package):
    first, second = register(registry, package), register(registry, package)
    registry.set_alias("production", first)
    registry.set_alias("production", second)
    assert [v.aliases for v in registry.versions()] == [["production"], []]
    registry.set_alias("production", None)
    assert registry.champion() is None


def test_a_version_that_the_pipeline_registered(registry, package, cloud, tmp_path):
    "Such a version lacks our metadata, so they are read from its evaluation; its predictions are beside that."
    specification = registry.describe(register(registry, package))["InferenceSpecification"]
    bucket = cloud.bucket("pipeline-outputs")
    figures = evaluation(0.87) | {"fingerprints": {"data": "d9", "package": load_package(package).fingerprint},
                                  "gate": {"passed": True, "reason": "accuracy 0.87; no champion yet"}}
    upload(pack(package, tmp_path / "model.tar.gz"), f"{bucket}/train/output/model.tar.gz")
    upload(write_json(tmp_path / "evaluation.json", figures), f"{bucket}/evaluate/evaluation.json")
    upload(write_text(tmp_path / "predictions.parquet", "rows"), f"{bucket}/evaluate/predictions.parquet")
    container = specification["Containers"][0] | {"ModelDataUrl": f"{bucket}/train/output/model.tar.gz"}
    statistics = {"ContentType": "application/json", "S3Uri": f"{bucket}/evaluate/evaluation.json"}
    client("sagemaker").create_model_package(
        ModelPackageGroupName="intel-nb", ModelApprovalStatus="PendingManualApproval",
        InferenceSpecification=specification | {"Containers": [container]},
        ModelMetrics={"ModelQuality": {"Statistics": statistics}})
    found = registry.get("2")
    assert (found.accuracy, found.data, found.reason) == (0.87, "d9", "accuracy 0.87; no champion yet")
    assert registry.find(load_package(package).fingerprint, "d9").version == "2"
    assert load_package(registry.package("2")).fingerprint == found.fingerprint
    assert registry.predictions("2").read_text() == "rows"
    registry.set_tag("2", "staging_test", "passed")
    assert (registry.get("2").staging_test, registry.get("2").accuracy) == ("passed", 0.87)


# Endpoints. The same tests run against those of this machine and those of SageMaker.

@pytest.fixture(params=["this machine", "SageMaker"])
def served(request, tmp_path, package):
    "Return endpoints, and three versions of one package that they can serve."
    if request.param == "this machine":
        endpoints = LocalEndpoints(tmp_path / "endpoints", owned=True, first_port=0)
        yield endpoints, ["1", "2", "3"]
        for endpoint in endpoints.list():
            endpoints.stop(endpoint.stage)
        return
    cloud = request.getfixturevalue("cloud")
    registry = open_registry(cloud.group())
    versions = [register(registry, package, status="Approved") for _ in range(3)]
    yield SageMakerEndpoints("intel-nb", pause=cloud.settle), versions


def test_a_stage_from_its_first_version_to_its_end(served, package):
    endpoints, (one, two, three) = served
    assert endpoints.list() == []
    for early in (endpoints.describe, endpoints.start, endpoints.stop, endpoints.history):
        with pytest.raises(InputError, match="there is no endpoint staging; deploy a version first"):
            early("staging")
    first = endpoints.deploy("staging", package, one)
    assert (first.stage, first.version, first.status) == ("staging", one, "running") and is_answering(first.url)
    answer = invoke(first.url, PHOTO, "image/jpeg")
    assert answer["predictions"][0]["label"] == "sea" and answer["model"]["version"] == one
    second = endpoints.deploy("staging", package, two)
    assert (second.url, second.version) == (first.url, two)
    assert invoke(first.url, PHOTO, "image/jpeg")["model"]["version"] == two
    assert endpoints.deploy("staging", package, two).version == two
    endpoints.deploy("staging", package, three)
    assert endpoints.history("staging") == [one, two, three]
    assert endpoints.previous("staging", lambda version: True) == two
    assert endpoints.previous("staging", lambda version: version == one) == one
    assert endpoints.deploy("staging", package, one, back=True).version == one
    assert (endpoints.history("staging"), endpoints.previous("staging", lambda version: True)) == ([one], None)
    endpoints.stop("staging")
    assert [(e.stage, e.version, e.status) for e in endpoints.list()] == [("staging", one, "stopped")]
    assert not is_answering(first.url)
    with pytest.raises(EndpointError, match="does not answer"):
        invoke(first.url, PHOTO, "image/jpeg")
    again = endpoints.start("staging")
    assert (again.url, again.version, again.status) == (first.url, one, "running")
    assert endpoints.start("staging") == again
    with pytest.raises(InputError, match="no endpoint production; there are: staging"):
        endpoints.describe("production")
    with pytest.raises(InputError, match="no name for a stage"):
        endpoints.describe("a/b")


def test_a_refusal_is_the_callers_error(served, package):
    endpoints, versions = served
    url = endpoints.deploy("staging", package, versions[0]).url
    for body, content_type, status, code in (
            (b"no image", "image/jpeg", 400, "undecodable"), (b"{", "application/json", 400, "malformed"),
            (b"x", "text/plain", 415, "unsupported_media_type"), (bytes(2**24 + 1), "image/png", 413, "too_large")):
        with pytest.raises(Refused) as refused:
            invoke(url, body, content_type)
        assert (refused.value.status, refused.value.code) == (status, code)
    before = drift_status(url)
    assert before["observations"] == 0
    invoke(url, PHOTO, "image/jpeg")
    assert drift_status(url)["observations"] == 1 and drift_status(url).keys() == before.keys()


# The tests below are about what only SageMaker's endpoints have.

def test_the_content_type_for_drift_is_the_endpoints_own():
    "The constant stands in both modules, so that a command need not import FastAPI."
    from intel_nb.serving import app
    assert hosting_module.DRIFT_TYPE.encode() == app.DRIFT_TYPE


@pytest.fixture
def hosting(cloud, registry, package):
    for _ in range(2):
        register(registry, package, status="Approved")
    return SageMakerEndpoints("intel-nb", pause=cloud.settle)


def test_an_alarm_calls_an_update_back(cloud, hosting, package):
    hosting.deploy("staging", package, "1")
    cloud.alarmed["intel-nb-staging"] = "One or more alarms went off: intel-nb-staging-errors"
    with pytest.raises(EndpointError, match="version 2 does not serve intel-nb-staging: One or more alarms went off"):
        hosting.deploy("staging", package, "2")
    assert hosting.describe("staging").version == "1" and hosting.history("staging") == ["1"]
    cloud.alarmed.clear()
    assert hosting.deploy("staging", package, "2").version == "2"


def test_an_endpoint_that_never_served_is_made_anew(cloud, hosting, package):
    hosting.deploy("staging", package, "1")
    backend(cloud).endpoints["intel-nb-staging"].endpoint_status = "Failed"
    assert hosting.describe("staging").status == "dead"
    assert hosting.deploy("staging", package, "2").status == "running"


def test_production_scales_and_is_updated_by_a_canary(cloud, hosting, package):
    hosting.deploy("production", package, "1")
    scaling = client("application-autoscaling")
    target, = scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
    assert (target["MinCapacity"], target["MaxCapacity"]) == instance_limits("production") == (2, 4)
    assert len(scaling.describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"]) == 1
    config = client("sagemaker").describe_endpoint_config(
        EndpointConfigName=client("sagemaker").describe_endpoint(EndpointName="intel-nb-production")["EndpointConfigName"])
    assert config["DataCaptureConfig"]["DestinationS3Uri"] == "s3://intel-nb-artifacts/captures"
    hosting.deploy("production", package, "2")
    assert {a["AlarmName"] for a in client("cloudwatch").describe_alarms()["MetricAlarms"]} == {
        "intel-nb-production-errors", "intel-nb-production-latency"}
    hosting.stop("production")
    assert scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"] == []


def test_another_package_is_not_deployed_under_a_version(hosting, package, tmp_path):
    other = shutil.copytree(package, tmp_path / "other")
    manifest = read_json(other / "manifest.json")
    write_json(other / "manifest.json", manifest | {"data": "other data"})
    with pytest.raises(EndpointError, match="version 1 of intel-nb is another package"):
        hosting.deploy("staging", other, "1")
    with pytest.raises(InputError, match="there is no version 9"):
        hosting.deploy("staging", tmp_path, "9")
    assert hosting.list() == []


def test_nothing_that_costs_money_is_left(cloud, hosting, package):
    for stage in ("staging", "production"):
        hosting.deploy(stage, package, "1")
    hosting.deploy("staging", package, "2")
    hosting.clear()
    sagemaker = client("sagemaker")
    assert sagemaker.list_endpoints()["Endpoints"] == sagemaker.list_endpoint_configs()["EndpointConfigs"] == []
    assert sagemaker.list_models()["Models"] == client("cloudwatch").describe_alarms()["MetricAlarms"] == []
    assert hosting.list() == [] and len(PackageGroup("intel-nb").versions()) == 2


@pytest.mark.slow
def test_the_steps_deploy_and_staging_on_sagemaker(cloud, registry, package, tmp_path):
    "papermill runs the same notebooks with other URIs."
    def run(name: str, **parameters) -> dict:
        parameters["out_dir"] = str(tmp_path / "out")
        papermill.execute_notebook(NOTEBOOKS / name, tmp_path / name, parameters, progress_bar=False)
        return json.loads((tmp_path / "out" / "result.json").read_text())
    version = register(registry, package)
    with pytest.raises(papermill.PapermillExecutionError, match=f"intel-nb approve {version}"):
        run("03_deploy.ipynb", version=version, registry="sagemaker://intel-nb", endpoints="sagemaker://")
    registry.set_status(version, "Approved")
    deployed = run("03_deploy.ipynb", version=version, registry="sagemaker://intel-nb", endpoints="sagemaker://")
    assert (deployed["url"], deployed["version"]) == ("sagemaker://intel-nb-staging", version)
    split, loaded = read_split(sample_dataset(tmp_path / "dataset"), "test"), load_package(package)
    true = loaded.predict_bytes(split.images)["probabilities"]
    about = {"batch_tolerance": 1e-5, "fingerprint": loaded.fingerprint}
    write_predictions(tmp_path / "true.parquet", split, true, **about)
    write_predictions(tmp_path / "false.parquet", split, np.roll(true, 1, axis=1), **about)
    inputs = {"url": deployed["url"], "version": version, "dataset": str(tmp_path / "dataset"), "sample": 12}
    result = run("05_test_staging.ipynb", predictions=str(tmp_path / "true.parquet"), **inputs)
    assert result["passed"] and result["images"] == 12
    with pytest.raises(papermill.PapermillExecutionError, match="a probability differs"):
        run("05_test_staging.ipynb", predictions=str(tmp_path / "false.parquet"), **inputs)


@pytest.mark.slow
def test_what_the_pipeline_registers_goes_through_modeldeploy(cloud, package, tmp_path):
    "Send the register step's request, deploy the version, run drift and the staging test on it, and promote it."
    cloud.group()
    bucket, loaded = cloud.bucket("intel-nb-artifacts-123456789012"), load_package(package)
    split = read_split(sample_dataset(tmp_path / "dataset"), "test")
    predicted = write_predictions(
        tmp_path / "predictions.parquet", split, loaded.predict_bytes(split.images)["probabilities"],
        batch_tolerance=1e-5, fingerprint=loaded.fingerprint)
    figures = EVALUATION | {"fingerprints": {"data": "d9", "package": loaded.fingerprint}}
    places = {"Steps.data": f"{bucket}/data", "Steps.keep": f"{bucket}/registry/an-execution"}
    upload(tmp_path / "dataset", f"{bucket}/data/dataset")
    upload(pack(package, tmp_path / "model.tar.gz"), f"{places['Steps.keep']}/model.tar.gz")
    upload(write_json(tmp_path / "evaluation.json", figures), f"{places['Steps.keep']}/evaluation.json")
    upload(predicted, f"{places['Steps.keep']}/predictions.parquet")
    scope = Scope(lambda path: next((uri for start, uri in places.items() if path.startswith(start)), "an-execution"),
                  lambda file, path: lookup_path(figures, path))
    request = resolve_value(step_arguments(register_step(PipelineConfig())), scope)
    client("sagemaker").create_model_package(**request)
    here = Platform("sagemaker://intel-nb", "sagemaker://intel-nb")
    registry = open_registry(here.registry)
    with pytest.raises(InputError, match="PendingManualApproval .*; nothing is deployed"):
        stages.run_modeldeploy("deploy", here, "1", tmp_path)
    registry.set_status("1", "Approved", "seen")
    with pytest.raises(InputError, match="has not passed the staging test"):
        stages.run_modeldeploy("promote", here, "1", tmp_path)
    assert stages.run_modeldeploy("deploy", here, "1", tmp_path)["version"] == "1"
    assert "run_time" in stages.run_modeldeploy("drift", here, "1", tmp_path)
    assert stages.run_modeldeploy("staging", here, "1", tmp_path)["passed"] is True
    assert stages.run_modeldeploy("promote", here, "1", tmp_path)["stage"] == "production"
    assert sorted(registry.get("1").aliases) == ["production", "staging"]


# Drift, found in the captured requests of all instances.

def test_one_detector_sees_what_all_instances_captured(cloud, hosting, package, capsys):
    url = hosting.deploy("production", package, "1").url
    scenes = itertools.count()  # the same scene again and again would be drift

    def send(count: int) -> None:
        for i in itertools.islice(scenes, count):
            invoke(url, encode_jpeg(sample_scene(i % 6, np.random.default_rng(i))), "image/jpeg")
    send(5)
    with pytest.raises(Refused):
        invoke(url, b"no image", "image/jpeg")
    assert invoke(url, PHOTO, "image/jpeg", test=True)["drift"] == []
    cloud.flush("intel-nb-production", instances=2)
    first = capture.feed_new_captures("intel-nb", "production")
    assert (first["requests"], first["images"], first["refused"], first["drift"]["observations"]) == (5, 5, 0, 5)
    assert capture.feed_new_captures("intel-nb", "production")["requests"] == 0
    send(3)
    cloud.flush("intel-nb-production")
    later = capture.feed_new_captures("intel-nb", "production")
    assert (later["requests"], later["drift"]["observations"], later["drift"]["time"]) == (3, 8, 8)
    seen = client("cloudwatch").list_metrics(Namespace="intel-nb")["Metrics"]
    assert {m["MetricName"] for m in seen} == {"DriftAlarms", "Images", "DriftStatistic"}
    capture.run_drift_job("intel-nb", "staging")  # a stage that was never deployed
    assert json.loads(capsys.readouterr().out)["images"] == 0


def test_the_same_reading_as_at_the_endpoint(cloud, hosting, package):
    "The job's detector and the endpoint's see the same images, so their statistics are the same."
    url = hosting.deploy("staging", package, "1").url
    for i in range(20):
        answer = invoke(url, encode_jpeg(sample_scene(i % 6, np.random.default_rng(i))), "image/jpeg")
    cloud.flush("intel-nb-staging")
    drift = capture.feed_new_captures("intel-nb", "staging")["drift"]
    assert drift["time"] == answer["drift"][0]["time"]
    assert drift["statistic"] == pytest.approx(answer["drift"][0]["statistic"], abs=1e-4)


def test_an_alarm_is_raised_and_kept(cloud, hosting, package):
    url, noise = hosting.deploy("staging", package, "1").url, np.random.default_rng(0)
    for _ in range(60):
        invoke(url, encode_jpeg(noise.integers(0, 255, (48, 48, 3), np.uint8)), "image/jpeg")
    cloud.flush("intel-nb-staging")
    assert capture.feed_new_captures("intel-nb", "staging")["alarms"] > 0
    kept = client("s3").list_objects_v2(Bucket="intel-nb-artifacts", Prefix="drift/intel-nb-staging/alarms/")
    assert len(kept["Contents"]) == 1


# Executions.

@pytest.fixture
def pipeline(cloud):
    definition = {"Version": "2020-12-01", "Steps": [],
                  "Parameters": [{"Name": "Profile", "Type": "String", "DefaultValue": "quick"}]}
    client("sagemaker").create_pipeline(PipelineName="intel-nb", PipelineDefinition=json.dumps(definition),
                                        RoleArn=ROLE, ClientRequestToken=32 * "0")


def test_an_execution_is_started_and_watched(cloud, pipeline):
    with pytest.raises(InputError, match="no parameter Profil; did you mean Profile"):
        executions.start_execution("intel-nb", {"Profil": "full"})
    assert executions.latest_execution("intel-nb") is None
    arn = executions.start_execution("intel-nb", {"Profile": "full"})
    hit = {"SourcePipelineExecutionArn": arn}
    cloud.steps[arn] = [{"StepName": "Data", "StepStatus": "Succeeded", "CacheHitResult": hit},
                        {"StepName": "Train", "StepStatus": "Succeeded"}]
    lines = []
    assert executions.watch_execution(arn, lines.append, pause=cloud.settle).status == "Succeeded"
    assert lines == ["Data         cached", "Train        succeeded", "execution    succeeded"]
    assert executions.latest_execution("intel-nb").arn == arn
    with pytest.raises(InputError, match="there is no pipeline other"):
        executions.latest_execution("other")


# Every call.

SOURCES = sorted((Path(__file__).parents[1] / "intel_nb" / "aws").glob("*.py"))
TRANSFERS = {"upload_file": "put_object", "download_file": "get_object"}  # the calls that boto3's helpers make


def calls_in(path: Path) -> set[tuple[str, str]]:
    "Return the calls `client(SERVICE).METHOD` in a module, as (service, method)."
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        is_method = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Call)
        if is_method and getattr(node.value.func, "id", "") == "client":
            found.add((ast.literal_eval(node.value.args[0]), TRANSFERS.get(node.attr, node.attr)))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_calls_are_written_in_plain_sight(path):
    "A client is never kept in a variable, so that a module's calls, and its role's permissions, can be read off."
    tree = ast.parse(path.read_text())
    direct = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    kept = [node.lineno for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "client" and id(node) not in direct]
    assert kept == [] or path.stem == "client"


def test_every_call_is_made(cloud, registry, package, pipeline):
    "Go through everything that the package does on AWS; no call may be left that was never sent to the emulator."
    cloud.calls.clear()
    for version in ("1", "2"):
        register(registry, package)
        registry.set_status(version, "Approved", "seen")
    registry.set_tag("1", "staging_test", "passed")
    registry.set_alias("production", "1")
    registry.set_alias("production", None)
    registry.package("1")
    hosting = SageMakerEndpoints("intel-nb", pause=cloud.settle)
    for stage, version in (("production", "1"), ("production", "2")):
        hosting.deploy(stage, package, version)
    invoke("sagemaker://intel-nb-production", PHOTO, "image/jpeg")
    cloud.flush("intel-nb-production")
    capture.feed_new_captures("intel-nb", "production")
    assert hosting_module.scaling_problem("intel-nb", "production") == ""
    cloud.drift_job("intel-nb-production-d32c5kddcf5bb8c3")
    hosting.clear()
    executions.watch_execution(executions.start_execution("intel-nb"), lambda line: None)
    executions.latest_execution("intel-nb")
    a_person_decides(cloud, hosting, package)
    with stacks(cloud):
        a_stack_comes_and_goes(cloud)
    others = ("changes", "deploy", "image", "preflight")  # tests/test_deploy_stack.py goes through their cases
    expected = set().union(*(calls_in(path) for path in SOURCES if path.stem not in others))
    assert expected - set(cloud.calls) == set()


def a_person_decides(cloud, hosting, package):
    pipeline = CodePipeline(template(Options(), SMALL), "ModeldeployPipeline", cloud.folder)
    with codepipelines(pipeline):
        assert operations.promote("intel-nb", "1", lambda line: None) is False
        assert pipeline.last.variables["variables"] == {"VERSION": "1"}
        pipeline.last.states["Approval"], pipeline.last.outputs["Choose"] = "InProgress", {"VERSION": "1"}
        assert operations.waiting_decision("intel-nb").version == "1"
        assert operations.promote("intel-nb", "1", lambda line: None) is True
        assert pipeline.answered == {"status": "Approved", "summary": "promoted with intel-nb aws promote"}
    client("sns").create_topic(Name="intel-nb-news")
    assert operations.unconfirmed("intel-nb") == []
    client("sqs").create_queue(QueueName="intel-nb-undelivered")
    client("sqs").send_message(QueueUrl=client("sqs").get_queue_url(QueueName="intel-nb-undelivered")["QueueUrl"],
                               MessageBody="{}")
    assert len(operations.dead_letters("intel-nb")) == 2
    client("logs").create_log_group(logGroupName="/aws/codebuild/intel-nb-image")
    client("logs").create_log_stream(logGroupName="/aws/codebuild/intel-nb-image", logStreamName="a")
    assert operations.read_log("intel-nb", "image") == []
    stages.schedule_staging_end(Options(staging_hours=1), ROLE)
    stages.cancel_staging_end("intel-nb")


def a_stack_comes_and_goes(cloud):
    quiet = {"say": lambda line: None, "pause": cloud.settle}
    options = Options(name="scenes")
    assert deploy.deploy_stack(options, ask=lambda question: False, **quiet) is False
    assert deploy.deploy_stack(options, **quiet)
    assert changes.first_failure("scenes") == ""
    environ = {"INTEL_NB_STACK": json.dumps({"name": "scenes"}), "INTEL_NB_ACCOUNT": "123456789012",
               "TAG": stages.note_tag(cloud.folder), "INTEL_NB_JOB_ROLE": ROLE, "INTEL_NB_REGISTRAR_ROLE": ROLE,
               "INTEL_NB_PIPELINE_ROLE": ROLE}
    assert stages.run_modelbuild(environ).startswith("created the pipeline scenes; it starts when s3://scenes-data-")
    client("s3").put_object(Bucket="scenes-data-123456789012-us-east-1", Key="intel.zip", Body=b"12345")
    assert stages.run_modelbuild(environ).startswith("updated the pipeline scenes, and started arn:")
    assert "is as it was, and arn:" in stages.run_modelbuild(environ), "a second start with the same data is none"
    cloud.aws("s3").put_bucket_versioning(Bucket="scenes-data-123456789012-us-east-1",  # moto's stack does not
                                          VersioningConfiguration={"Status": "Enabled"})
    with zipfile.ZipFile(cloud.folder / "scenes.zip", "w") as archive:
        archive.writestr("seg_train/sea/1.jpg", b"a photograph")
    assert executions.start_upload("scenes", cloud.folder / "scenes.zip", **quiet).startswith("arn:")
    for execution in backend(cloud).pipelines["scenes"].pipeline_executions.values():
        execution.pipeline_execution_status = "Executing"
    create_group("scenes", GroupSettings())
    client("sagemaker").create_model_package(ModelPackageGroupName="scenes", ModelApprovalStatus="Rejected")
    assert deploy.destroy_stack(options, ask=lambda question: True, **quiet)
    assert changes.find_stack("scenes") is None
    assert deploy.list_buckets(options) == deploy.list_packages("scenes") == []
