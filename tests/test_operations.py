"""What a person does to a deployment when something else is under way, or goes wrong in the middle."""
import time

import numpy as np
import pytest
from cloud import cloud, cloud_once  # noqa: F401
from cloud_pipelines import CodePipeline, codepipelines
from test_registry import package, register  # noqa: F401

from intel_nb.aws import operations, stages
from intel_nb.aws.client import client
from intel_nb.aws.commands import latest_alarms, stage_problems, stage_url
from intel_nb.aws.hosting import SageMakerEndpoints, alarm_requests
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
    from intel_nb.aws.package_group import describe_group
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
    from intel_nb.aws.package_group import describe_group
    bucket = describe_group("intel-nb").settings.artifacts.removeprefix("s3://").partition("/")[0]
    for key in ("state/production.json.bak", "state/a/b.json", "state/notes final.txt"):
        client("s3").put_object(Bucket=bucket, Key=key, Body=b"x")
    assert [one.stage for one in served.list()] == ["production"]


WRONG_TYPES = '{"config": 3, "history": [], "alias": "", "intent": {"since": 7}, "problem": ""}'

@pytest.mark.parametrize("text", ["{", "[" * 100_000, WRONG_TYPES])
def test_a_damaged_state_is_told_and_locks_nothing(served, package, cloud, text):
    from intel_nb.aws.package_group import describe_group
    artifacts = describe_group("intel-nb").settings.artifacts.removeprefix("s3://")
    bucket, _, prefix = artifacts.partition("/")
    client("s3").put_object(Bucket=bucket, Key=f"{prefix}/state/production.json".lstrip("/"), Body=text.encode())
    assert any("cannot be read" in problem for problem in stage_problems("intel-nb"))
    assert served.deploy("production", package, "1").version == "1"


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
