"""What a person does to a deployment when something else is under way, or goes wrong in the middle."""
import json
import re
import time
from datetime import UTC, datetime

import numpy as np
import pytest
from cloud import ROLE, cloud, cloud_once  # noqa: F401
from cloud_pipelines import CodePipeline, codepipelines
from test_registry import package, register  # noqa: F401

from intel_nb.aws import operations, stages
from intel_nb.aws.client import client
from intel_nb.aws.commands import deployment_status, latest_alarms, stage_problems, stage_url, status_lines
from intel_nb.aws.hosting import SageMakerEndpoints, alarm_requests
from intel_nb.aws.package_group import PackageGroup, describe_group
from intel_nb.aws.stack import Options, template
from intel_nb.aws.state import begin_change
from intel_nb.registry import open_registry
from intel_nb.serving.endpoints import EndpointError
from intel_nb.storage import InputError

SMALL = {"Version": "2020-12-01", "Parameters": [], "Steps": []}
quiet = lambda line: None


@pytest.fixture
def served(cloud, package):
    "Production serves version 2, and served version 1 before."
    registry, hosting = open_registry(cloud.group()), SageMakerEndpoints("intel-nb", cloud.settle)
    for version in ("1", "2"):
        register(registry, package)
        registry.set_status(version, "Approved", "seen")
        hosting.deploy("production", package, version)
    return hosting


@pytest.fixture
def asking(tmp_path):
    "A CodePipeline modeldeploy whose last execution waits with version 1."
    pipeline = CodePipeline(template(Options(), SMALL), "ModeldeployPipeline", tmp_path)
    pipeline.start({})
    pipeline.last.states["Approval"], pipeline.last.outputs["Choose"] = "InProgress", {"VERSION": "1"}
    with codepipelines(pipeline):
        yield pipeline


def test_a_rejection_without_a_codepipeline_withdraws_all_the_same(served, monkeypatch, cloud):
    monkeypatch.setattr(stages, "SageMakerEndpoints", lambda name: SageMakerEndpoints(name, cloud.settle))
    with codepipelines():
        operations.reject("intel-nb", "2", "snow", quiet)
    assert served.describe("production").version == "1"


def test_a_roll_back_that_is_refused_deletes_no_endpoint(served, cloud):
    cloud.refused["UpdateEndpoint"] = "the quota for instances is reached"
    with codepipelines(), pytest.raises(InputError, match="UpdateEndpoint"):
        operations.reject("intel-nb", "2", "snow", quiet)
    cloud.refused.clear()
    assert served.describe("production").status == "running"


def test_a_rejection_during_the_change_to_that_version_says_so(served):
    from intel_nb.aws.state import serving_now
    third = served.state("production").config.replace("-v2-", "-v3-")
    registry = open_registry("sagemaker://intel-nb")
    register(registry, registry.package("1"))
    begin_change(describe_group("intel-nb").settings.artifacts, "production", "deploy", lambda state: third,
                 lambda: serving_now(None))
    client("sagemaker").update_endpoint(EndpointName="intel-nb-production",
                                        EndpointConfigName=served.state("production").history[0])
    with codepipelines(), pytest.raises(EndpointError, match="version 3 is Rejected, but production is being changed"):
        operations.reject("intel-nb", "3", "snow", quiet)
    assert registry.get("3").status == "Rejected"


def test_a_rejected_version_is_not_brought_back_by_a_question(served, cloud):
    registry = open_registry("sagemaker://intel-nb")
    served.stop("production")
    registry.set_status("2", "Rejected", "snow")
    with pytest.raises(InputError, match="production is stopped, and served version 2 last, which is not approved"):
        stage_url("production")


def test_a_version_that_waits_makes_way(served, asking):
    "The execution with version 2 is held in front of the stage, and comes in once version 1 was refused."
    held = {"pipelineExecutionId": "00000000-0000-4000-8000-000000000002", "status": "InProgress"}
    state, actions, seconds = asking.state, asking.actions, []
    asking.state = lambda: {**state(), "stageStates": [
        one | ({"inboundExecutions": [held]} if one["stageName"] == "Approval" else {})
        for one in state()["stageStates"]]}
    asking.actions = lambda execution: actions(execution) if execution == asking.last.id else [
        {"actionName": "Choose", "output": {"outputVariables": {"VERSION": "2"}}}]

    def come_in(after: float) -> None:
        seconds.append(after)
        assert asking.answered["status"] == "Rejected"
        asking.last.outputs["Choose"] = {"VERSION": "2"}
    assert operations.promote("intel-nb", "2", quiet, come_in) is True
    assert asking.answered["status"] == "Approved" and seconds == [5]
    assert open_registry("sagemaker://intel-nb").get("1").status == "Approved", "it only made way"


def test_foreign_objects_beside_the_states_are_left_alone(served):
    bucket = describe_group("intel-nb").settings.artifacts.removeprefix("s3://").partition("/")[0]
    for key in ("state/production.json.bak", "state/a/b.json", "state/notes final.txt"):
        client("s3").put_object(Bucket=bucket, Key=key, Body=b"x")
    assert [one.stage for one in served.list()] == ["production"]


WRONG_TYPES = '{"config": 3, "history": [], "alias": "", "intent": {"since": 7}, "problem": ""}'

@pytest.mark.parametrize("text", ["{", "[" * 100_000, WRONG_TYPES])
def test_a_damaged_state_is_told_and_locks_nothing(served, package, cloud, text):
    artifacts = describe_group("intel-nb").settings.artifacts.removeprefix("s3://")
    bucket, _, prefix = artifacts.partition("/")
    client("s3").put_object(Bucket=bucket, Key=f"{prefix}/state/production.json".lstrip("/"), Body=text.encode())
    assert any("cannot be read" in problem for problem in stage_problems("intel-nb"))
    assert served.deploy("production", package, "1").version == "1"


@pytest.mark.parametrize("stage, options, end", [
    ("staging", "staging_hours=8", ["intel-nb-staging-end"]), ("staging", "", []),
    ("production", "staging_hours=8", [])])
def test_an_endpoint_that_is_made_again_ends_as_after_a_test(served, cloud, capsys, stage, options, end):
    settings = {**vars(describe_group("intel-nb").settings), "scheduler": ROLE, "options": options}
    client("ssm").put_parameter(Name="/intel-nb/settings", Type="String", Value=json.dumps(settings), Overwrite=True)
    if stage == "staging":
        served.deploy("staging", open_registry("sagemaker://intel-nb").package("1"), "1")
    served.stop(stage)
    assert stage_url(stage) == f"sagemaker://intel-nb-{stage}" and served.describe(stage).status == "running"
    assert [one["Name"] for one in client("scheduler").list_schedules()["Schedules"]] == end
    if end:
        made = client("scheduler").get_schedule(Name=end[0])
        after = datetime.fromisoformat(made["ScheduleExpression"][3:-1]) - datetime.now(UTC).replace(tzinfo=None)
        assert 7.9 < after.total_seconds() / 3600 < 8.1 and made["Target"]["RoleArn"] == ROLE
    assert ("is deleted after 8 hours" if end else "and stays") in capsys.readouterr().err


def test_a_staging_endpoint_is_not_made_again_where_nothing_could_end_it(served, cloud):
    settings = {**vars(describe_group("intel-nb").settings), "options": "staging_hours=8"}
    client("ssm").put_parameter(Name="/intel-nb/settings", Type="String", Value=json.dumps(settings), Overwrite=True)
    served.deploy("staging", open_registry("sagemaker://intel-nb").package("1"), "1")
    served.stop("staging")
    with pytest.raises(InputError, match="have no scheduler; intel-nb aws deploy makes it"):
        stage_url("staging")
    assert served.describe("staging").status == "stopped"


def test_status_shows_what_lies_in_the_queues_for_dead_letters(cloud):
    cloud.group()
    for name in ("undelivered", "data-dead.fifo", "labels-dead.fifo"):
        fifo = {"FifoQueue": "true", "ContentBasedDeduplication": "true"} if name.endswith("fifo") else {}
        client("sqs").create_queue(QueueName=f"intel-nb-{name}", Attributes=fifo)
    url = lambda name: client("sqs").get_queue_url(QueueName=f"intel-nb-{name}")["QueueUrl"]
    event = {"detail": {"object": {"key": "annotations/a\x1b[2J.json"}}}
    for _ in range(5):
        client("sqs").send_message(QueueUrl=url("undelivered"), MessageBody=json.dumps(event), MessageAttributes={
            "ERROR_MESSAGE": {"DataType": "String", "StringValue": "no permission to send"}})
    client("sqs").send_message(QueueUrl=url("data-dead.fifo"), MessageBody='{"version": "4kEx"}', MessageGroupId="data")
    with codepipelines():
        lines = [line for line in status_lines(deployment_status("intel-nb")) if line.startswith("undelivered")]
        again = [line for line in status_lines(deployment_status("intel-nb")) if line.startswith("undelivered")]
    assert lines[0].split(maxsplit=1)[1] == "5 in intel-nb-undelivered" and len(lines) == 6 and again == lines
    assert re.fullmatch(r"undelivered +\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ annotations/a·\[2J.json "
                        r"\(no permission to send\)", lines[1])
    assert lines[-2].endswith("1 in intel-nb-data-dead.fifo") and lines[-1].endswith('Z {"version": "4kEx"}')


def test_an_evaluation_that_cannot_be_read_is_told(served, capsys):
    from intel_nb.cli import print_versions
    found = client("sagemaker").describe_model_package(ModelPackageName=PackageGroup("intel-nb").describe("2")[
        "ModelPackageArn"])
    client("sagemaker").create_model_package(  # as the pipeline's step does, without our metadata
        ModelPackageGroupName="intel-nb", ModelApprovalStatus="PendingManualApproval",
        InferenceSpecification=found["InferenceSpecification"], ModelMetrics={"ModelQuality": {"Statistics": {
            "ContentType": "application/json", "S3Uri": "s3://intel-nb-artifacts/registry/none/evaluation.json"}}})
    print_versions(PackageGroup("intel-nb"), False, "")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["3"])
    assert "unreadable" in line and "nan" not in line
    assert "the evaluation cannot be read: ObjectNotFound: " in line
    print_versions(PackageGroup("intel-nb"), True, "")
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)[0]["accuracy"] is None


def test_alarms_of_a_deployment_with_a_longer_name_are_not_ours(cloud):
    for endpoint in ("intel-nb-production", "intel-nb-x-production"):
        client("cloudwatch").put_metric_alarm(**alarm_requests(endpoint)[0])
    assert [one["alarm"] for one in latest_alarms("intel-nb")] == ["intel-nb-production-errors"]


def test_logs_of_drift_are_those_of_the_newest_jobs_of_this_deployment(cloud):
    group = "/aws/sagemaker/ProcessingJobs"
    client("logs").create_log_group(logGroupName=group)
    rng, now = np.random.default_rng(0), int(1000 * time.time())
    for number in range(60):
        name = f"intel-nb-production-{rng.bytes(8).hex()}/algo-1"
        client("logs").create_log_stream(logGroupName=group, logStreamName=name)
        client("logs").put_log_events(logGroupName=group, logStreamName=name, logEvents=[
            {"timestamp": now - 100_000 + 1000 * number, "message": f"job {number}\x1b[2J"}])
    other = "intel-nb-production-production-00ff00ff00ff00ff/algo-1"
    client("logs").create_log_stream(logGroupName=group, logStreamName=other)
    client("logs").put_log_events(logGroupName=group, logStreamName=other, logEvents=[
        {"timestamp": now, "message": "another deployment"}])
    lines = operations.read_log("intel-nb", "drift")
    assert lines[-1].endswith("job 59·[2J") and not [line for line in lines if "another" in line]
