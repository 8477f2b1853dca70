"""The state of a stage in S3: two writers at once, processes that are killed, and stacks that are updated.

The emulator is moto over real HTTP, with what it lacks added in tests/cloud.py.
"""
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cloud import cloud, cloud_once  # noqa: F401
from test_registry import package, register  # noqa: F401

from intel_nb.aws.client import client
from intel_nb.aws.executions import champion_version
from intel_nb.aws.hosting import SageMakerEndpoints, alarm_requests, scaling_problem
from intel_nb.aws.package_group import describe_group
from intel_nb.aws.state import (
    HeldStage,
    Serving,
    StageBusy,
    StageState,
    TakenOver,
    begin_change,
    end_change,
    read_state,
    write_alias,
    write_state,
)
from intel_nb.registry import open_registry
from intel_nb.serving.endpoints import EndpointError
from intel_nb.storage import InputError

BUCKET = "s3://intel-nb-artifacts"


@pytest.fixture
def registry(cloud):
    return open_registry(cloud.group())


@pytest.fixture
def hosting(cloud, registry, package):
    for _ in range(4):
        register(registry, package, status="Approved")
    return SageMakerEndpoints("intel-nb", pause=cloud.settle)


def at_once(*works: Callable[[], object]) -> list[object]:
    "Do all `works` in threads of their own, and return what each returned or raised."
    results: list[object] = [None] * len(works)

    def run(i: int) -> None:
        try:
            results[i] = works[i]()
        except Exception as error:
            results[i] = error
    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@contextmanager
def before_sending(operation: str, act: Callable[..., None], event: str = "before-call"):
    "Let boto3 call `act` before each request of `operation`, such as s3.PutObject."
    service = operation.partition(".")[0]
    client(service).meta.events.register(f"{event}.{operation}", act)
    try:
        yield
    finally:
        client(service).meta.events.unregister(f"{event}.{operation}", act)


# Two writers.

def test_the_emulator_honours_conditions(cloud):
    "Otherwise no test here could fail."
    cloud.bucket("models")
    s3, where = client("s3"), {"Bucket": "models", "Key": "x", "Body": b"1"}
    tag = s3.put_object(**where, IfNoneMatch="*")["ETag"]
    for condition in ({"IfNoneMatch": "*"}, {"IfMatch": '"0"'}):
        with pytest.raises(s3.exceptions.ClientError, match="PreconditionFailed"):
            s3.put_object(**where, **condition)
    s3.put_object(**where, IfMatch=tag)


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_of_two_who_begin_at_once_one_wins(cloud, conditional, known):
    "Both have read before either writes. Without conditions both win, so this test can fail."
    cloud.group()
    if known:
        write_alias(BUCKET, "production", "1")
    both_have_read = threading.Barrier(2, timeout=30)
    waited = threading.local()

    def wait(**about) -> None:
        if not hasattr(waited, "once"):  # the loser writes again
            waited.once = both_have_read.wait()

    def strip(params: dict, **about) -> None:
        for name in ("IfMatch", "IfNoneMatch"):
            params.pop(name, None)

    def begin(config: str) -> HeldStage:
        return begin_change(BUCKET, "production", "deploy", lambda state: config, Serving)
    with before_sending("s3.PutObject", wait):
        if conditional:
            results = at_once(lambda: begin("a-v1-00000000"), lambda: begin("a-v2-00000000"))
        else:
            with before_sending("s3.PutObject", strip, "before-parameter-build"):
                results = at_once(lambda: begin("a-v1-00000000"), lambda: begin("a-v2-00000000"))
    won = [one for one in results if isinstance(one, HeldStage)]
    assert len(won) == (1 if conditional else 2), results
    if conditional:
        lost, = [one for one in results if isinstance(one, StageBusy)]
        intent = won[0].state.intent
        assert f"production is being changed (deploy of version {intent.config[3]} by {intent.by}" in str(lost)
        assert f"since {intent.since}" in str(lost)
        assert read_state(BUCKET, "production").state == won[0].state


def test_of_two_deployments_at_once_one_serves_and_the_other_says_who_does(cloud, hosting, package):
    hosting.deploy("staging", package, "1")
    lost = threading.Event()

    def pause(seconds: float) -> None:
        assert lost.wait(30)
        cloud.settle()

    def deploy(version: str) -> str:
        try:
            return SageMakerEndpoints("intel-nb", pause=pause).deploy("staging", package, version).version
        except StageBusy:
            lost.set()
            raise
    results = at_once(lambda: deploy("2"), lambda: deploy("3"))
    busy, = [one for one in results if isinstance(one, StageBusy)]
    served, = [one for one in results if isinstance(one, str)]
    assert f"staging is being changed (deploy of version {served} by" in str(busy)
    assert hosting.history("staging") == ["1", served] and hosting.describe("staging").version == served
    assert hosting.state("staging").intent is None


@pytest.mark.parametrize("races", [1, 3])
def test_a_race_that_s3_tells_of_is_tried_again(cloud, races):
    "AWS answers 409 when conditional writes collide."
    cloud.group()
    cloud.races = races
    held = begin_change(BUCKET, "staging", "deploy", lambda state: "a-v1-00000000", Serving)
    cloud.races = races
    end_change(held, replace(held.state, config="a-v1-00000000"))
    cloud.races = races
    write_alias(BUCKET, "staging", "1")
    assert read_state(BUCKET, "staging").state == StageState("a-v1-00000000", alias="1")
    cloud.races = 1000
    with pytest.raises(EndpointError, match="others write it all the time"):
        write_alias(BUCKET, "staging", "2")
    with pytest.raises(StageBusy, match="others change it all the time"):
        begin_change(BUCKET, "staging", "deploy", lambda state: "", Serving)


def test_who_was_away_for_too_long_is_told(cloud, hosting, package):
    "The stage was taken over while this deployment hung; what it did is not noted over the other's result."
    hosting.deploy("staging", package, "1")

    def hang(seconds: float) -> None:
        cloud.settle()
        age_intent("staging")
        SageMakerEndpoints("intel-nb", pause=cloud.settle).deploy("staging", package, "3")
    with pytest.raises(TakenOver, match="somebody else has taken over staging"):
        SageMakerEndpoints("intel-nb", pause=hang).deploy("staging", package, "2")
    assert hosting.describe("staging").version == "3" and hosting.history("staging") == ["1", "2", "3"]


def test_an_alias_may_move_while_a_stage_is_changed(cloud, hosting, registry, package):
    hosting.deploy("production", package, "1")
    held = begin_change(BUCKET, "production", "stop", lambda state: "", lambda: Serving())
    registry.set_alias("production", "2")
    end_change(held, held.state)
    assert registry.champion().version == "2" and hosting.history("production") == ["1"]


# Processes that are killed. The child is a process of its own, and SIGKILL ends it at a chosen point.

CHILD = """
import os, signal, sys
from pathlib import Path
from intel_nb.aws.client import client
from intel_nb.aws.executions import champion_version
from intel_nb.aws.hosting import SageMakerEndpoints
def die(*args, **more):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "before the act":
    client("sagemaker").meta.events.register("before-call.sagemaker.UpdateEndpoint", die)
SageMakerEndpoints("intel-nb", pause=die).deploy(sys.argv[3], Path(sys.argv[2]), "2")
"""


def kill_a_deployment(when: str, package: Path, stage: str = "staging") -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, when, str(package), stage], timeout=120)
    assert done.returncode == -9


def age_intent(stage: str, minutes: int = 11) -> None:
    "Let the intent in the state of `stage` be so much older."
    state, tag = read_state(BUCKET, stage)
    since = (datetime.now(UTC) - timedelta(minutes=minutes)).strftime("%Y-%m-%dT%H:%M:%SZ")
    write_state(BUCKET, stage, replace(state, intent=replace(state.intent, since=since)), tag)


def test_a_deployment_that_was_killed_before_its_act(cloud, hosting, package):
    hosting.deploy("staging", package, "1")
    kill_a_deployment("before the act", package)
    assert read_state(BUCKET, "staging").state.intent.act == "deploy"
    assert (hosting.describe("staging").version, hosting.history("staging")) == ("1", ["1"])
    with pytest.raises(StageBusy, match=r"staging is being changed \(deploy of version 2 by .*, process \d+, since"):
        hosting.deploy("staging", package, "3")
    age_intent("staging")
    assert hosting.deploy("staging", package, "3").version == "3"
    assert hosting.history("staging") == ["1", "3"] and read_state(BUCKET, "staging").state.intent is None


def test_a_deployment_that_was_killed_before_its_result(cloud, hosting, registry, package):
    hosting.deploy("staging", package, "1")
    kill_a_deployment("before the result", package)
    age_intent("staging")
    with pytest.raises(StageBusy, match="staging is being changed"):  # SageMaker is still at it
        hosting.rollback("staging")
    assert hosting.history("staging") == ["1"]
    cloud.settle()
    assert (hosting.describe("staging").version, hosting.history("staging")) == ("2", ["1", "2"])
    assert read_state(BUCKET, "staging").state.history != hosting.state("staging").history  # corrected, not yet written
    assert hosting.rollback("staging").version == "1"
    assert hosting.history("staging") == ["1"] and registry.get("1").aliases == ["staging"]


def test_the_registry_names_what_serves_after_a_deployment_was_killed(cloud, hosting, registry, package):
    "Nobody changes the stage afterwards, and reading writes nothing."
    hosting.deploy("production", package, "1")
    kill_a_deployment("before the result", package, "production")
    before = read_state(BUCKET, "production")
    assert registry.champion().version == champion_version("intel-nb") == "1"  # the update goes on
    cloud.settle()
    assert registry.champion().version == champion_version("intel-nb") == "2"
    assert {one.version: one.aliases for one in registry.versions()} == {
        "1": [], "2": ["production"], "3": [], "4": []}
    assert registry.get("2").aliases == ["production"] and registry.get("1").aliases == []
    assert read_state(BUCKET, "production") == before


def test_an_update_that_failed_leaves_the_champion(cloud, hosting, registry, package):
    "Its process was killed, so nobody has noted that SageMaker rolled it back."
    hosting.deploy("production", package, "1")
    cloud.alarmed["intel-nb-production"] = "an alarm went off"
    kill_a_deployment("before the result", package, "production")
    cloud.settle()
    assert registry.champion().version == "1" and registry.get("2").aliases == []


def test_an_update_that_was_interrupted_is_left_to_the_service(cloud, hosting, package):
    "Ctrl-C ends our waiting, not the update: the intent keeps others away until that is over."
    hosting.deploy("staging", package, "1")

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        SageMakerEndpoints("intel-nb", pause=interrupt).deploy("staging", package, "2")
    with pytest.raises(StageBusy):
        hosting.deploy("staging", package, "3")
    cloud.settle()
    age_intent("staging")
    hosting.deploy("staging", package, "3")
    assert hosting.history("staging") == ["1", "2", "3"]


def test_a_failed_update_frees_the_stage_and_is_noted(cloud, hosting, package):
    hosting.deploy("staging", package, "1")
    cloud.alarmed["intel-nb-staging"] = "an alarm went off"
    with pytest.raises(EndpointError, match="an alarm went off"):
        hosting.deploy("staging", package, "2")
    assert hosting.state("staging").intent is None
    assert hosting.state("staging").problem == "version 2 does not serve intel-nb-staging: an alarm went off"
    cloud.alarmed.clear()
    hosting.deploy("staging", package, "2")
    assert hosting.state("staging").problem == "" and hosting.history("staging") == ["1", "2"]


# Where nothing is lost.

def test_an_update_of_the_stack_loses_no_stage(cloud, hosting, registry, package):
    "CloudFormation removes tags that its template does not have from the Model Package Group."
    for stage, version in (("staging", "1"), ("staging", "2"), ("production", "1")):
        hosting.deploy(stage, package, version)
    registry.set_alias("production", "1")
    arn = client("sagemaker").describe_model_package_group(ModelPackageGroupName="intel-nb")["ModelPackageGroupArn"]
    for tag in client("sagemaker").list_tags(ResourceArn=arn)["Tags"]:
        client("sagemaker").delete_tags(ResourceArn=arn, TagKeys=[tag["Key"]])
    client("sagemaker").add_tags(ResourceArn=arn, Tags=[{"Key": "owner", "Value": "the stack"}])
    assert [(e.stage, e.version) for e in hosting.list()] == [("production", "1"), ("staging", "2")]
    assert hosting.history("staging") == ["1", "2"] and registry.champion().version == "1"
    assert registry.get("2").aliases == ["staging"]


def test_a_state_that_cannot_be_read_stops_nobody(cloud, hosting, package):
    hosting.deploy("staging", package, "1")
    client("s3").put_object(Bucket="intel-nb-artifacts", Key="state/staging.json", Body=b"{")
    assert [(e.stage, e.version) for e in hosting.list()] == [("staging", "1")]
    assert hosting.deploy("staging", package, "2").version == "2"
    assert hosting.history("staging") == ["1", "2"]


# Back to what served before.

def created(cloud) -> int:
    "How many models and configurations were made."
    return sum(cloud.calls["sagemaker", f"create_{kind}"] for kind in ("model", "endpoint_config"))


def test_a_second_rollback_goes_further_back(cloud, hosting, registry, package):
    for version in ("1", "2", "3", "4"):
        hosting.deploy("production", package, version)
    before = created(cloud)
    assert hosting.rollback("production", lambda version: version == "3").version == "2"
    assert registry.champion().version == "2"
    assert hosting.rollback("production").version == "1"
    assert created(cloud) == before and hosting.history("production") == ["1"]
    state = read_state(BUCKET, "production")
    with pytest.raises(InputError, match="no earlier version that is not rejected; it stays at version 1, and nothing"):
        hosting.rollback("production")
    assert read_state(BUCKET, "production") == state
    assert hosting.describe("production").version == "1"


def test_a_rollback_goes_to_the_same_configuration(cloud, hosting, package):
    "Not to what the present settings would make of that version."
    hosting.deploy("staging", package, "1")
    first = client("sagemaker").describe_endpoint(EndpointName="intel-nb-staging")["EndpointConfigName"]
    hosting.deploy("staging", package, "2")
    changed = vars(describe_group("intel-nb").settings) | {"instance": "ml.m5.xlarge"}
    client("ssm").put_parameter(Name="/intel-nb/settings", Type="String", Value=json.dumps(changed), Overwrite=True)
    hosting.rollback("staging")
    assert client("sagemaker").describe_endpoint(EndpointName="intel-nb-staging")["EndpointConfigName"] == first
    hosting.deploy("staging", package, "2")
    assert hosting.deploy("staging", package, "1", back=True).version == "1"
    assert client("sagemaker").describe_endpoint(EndpointName="intel-nb-staging")["EndpointConfigName"] == first


def test_a_stage_whose_endpoint_was_deleted_goes_back_too(cloud, hosting, package):
    for version in ("1", "2"):
        hosting.deploy("production", package, version)
    client("sagemaker").delete_endpoint(EndpointName="intel-nb-production")
    assert hosting.describe("production").status == "stopped"
    assert hosting.rollback("production").version == "1"
    assert hosting.describe("production").status == "running"


# Auto-scaling that is refused.

DENIED = "arn:aws:sts::123456789012:assumed-role/deploy is not authorized to perform: sagemaker:DescribeEndpointConfig"


def test_a_live_endpoint_that_may_not_scale(cloud, hosting, registry, package):
    "The endpoint serves and costs money, so it is known, said to be wrong, and removed like any other."
    for call in ("register_scalable_target", "put_scaling_policy", "deregister_scalable_target"):
        cloud.refused[call] = DENIED
    with pytest.raises(EndpointError, match="version 1 serves intel-nb-production, but production does not scale: .*D"):
        hosting.deploy("production", package, "1")
    assert (hosting.describe("production").version, hosting.history("production")) == ("1", ["1"])
    assert registry.champion().version == "1"
    assert hosting.state("production").problem.startswith("production does not scale: AWS does not allow Register")
    assert scaling_problem("intel-nb", "production") == hosting.state("production").problem
    assert scaling_problem("intel-nb", "staging") == ""
    cloud.refused.clear()
    assert hosting.deploy("production", package, "1").version == "1"
    assert hosting.state("production").problem == scaling_problem("intel-nb", "production") == ""


def test_an_endpoint_that_may_not_scale_is_removed(cloud, hosting, package):
    for call in ("register_scalable_target", "put_scaling_policy", "deregister_scalable_target"):
        cloud.refused[call] = DENIED
    with pytest.raises(EndpointError, match="does not scale"):
        hosting.deploy("production", package, "1")
    hosting.clear()
    assert nothing_is_left("intel-nb") and hosting.list() == []


def test_scaling_that_somebody_took_away_is_seen(cloud, hosting, package):
    hosting.deploy("production", package, "1")
    client("application-autoscaling").deregister_scalable_target(
        ServiceNamespace="sagemaker", ResourceId="endpoint/intel-nb-production/variant/AllTraffic",
        ScalableDimension="sagemaker:variant:DesiredInstanceCount")
    assert scaling_problem("intel-nb", "production") == "production does not scale: auto-scaling does not know it"


# What is removed.

def resources(name: str) -> dict[str, list[str]]:
    "Return what exists of a deployment, by kind; names of others may begin with its own."
    sagemaker = client("sagemaker")
    targets = client("application-autoscaling").describe_scalable_targets(ServiceNamespace="sagemaker")
    jobs = sagemaker.list_processing_jobs(StatusEquals="InProgress")["ProcessingJobSummaries"]
    found = {"endpoints": [e["EndpointName"] for e in sagemaker.list_endpoints()["Endpoints"]],
             "configs": [c["EndpointConfigName"] for c in sagemaker.list_endpoint_configs()["EndpointConfigs"]],
             "models": [m["ModelName"] for m in sagemaker.list_models()["Models"]],
             "alarms": [a["AlarmName"] for a in client("cloudwatch").describe_alarms()["MetricAlarms"]],
             "targets": [t["ResourceId"] for t in targets["ScalableTargets"]],
             "jobs": [j["ProcessingJobName"] for j in jobs]}
    starts = (name, f"endpoint/{name}", f"TargetTracking-endpoint/{name}")
    return {kind: [one for one in names if one.startswith(starts)] for kind, names in found.items()}


def nothing_is_left(name: str) -> bool:
    return not any(resources(name).values())


def put_scaling_alarm(endpoint: str) -> None:
    "Put an alarm as auto-scaling does, which moto's does not."
    name = f"TargetTracking-endpoint/{endpoint}/variant/AllTraffic-AlarmHigh-0000aaaa"
    client("cloudwatch").put_metric_alarm(**alarm_requests(endpoint)[0] | {"AlarmName": name})


@pytest.mark.parametrize("notes", ["lost", "unreadable", "held by a killed process", "settings gone", "bucket gone"])
def test_a_removal_leaves_nothing_whatever_the_notes_say(cloud, hosting, package, notes):
    for stage in ("staging", "production"):
        hosting.deploy(stage, package, "1")
        hosting.deploy(stage, package, "2")
        put_scaling_alarm(f"intel-nb-{stage}")
        cloud.drift_job(f"intel-nb-{stage}-d32c5kddcf5bb8c3")
    s3 = client("s3")
    for stage in ("staging", "production"):
        if notes in ("lost", "bucket gone"):
            s3.delete_object(Bucket="intel-nb-artifacts", Key=f"state/{stage}.json")
        if notes == "unreadable":
            s3.put_object(Bucket="intel-nb-artifacts", Key=f"state/{stage}.json", Body=b"\xff{")
        if notes == "held by a killed process":
            begin_change(BUCKET, stage, "deploy", lambda state: "intel-nb-staging-v3-00000000", Serving)
    if notes == "settings gone":
        client("ssm").delete_parameter(Name="/intel-nb/settings")
    if notes == "bucket gone":
        settings = json.dumps({"artifacts": "s3://no-such-bucket"})
        client("ssm").put_parameter(Name="/intel-nb/settings", Type="String", Value=settings, Overwrite=True)
    assert [(e.stage, e.version, e.status) for e in hosting.list()] == [
        ("production", "2", "running"), ("staging", "2", "running")]
    hosting.clear()
    assert nothing_is_left("intel-nb") and hosting.list() == []


def test_a_removal_spares_deployments_with_longer_names(cloud, hosting, package):
    "Of a deployment intel-nb-x, and of one that is called after a stage of ours."
    others = ("intel-nb-x", "intel-nb-staging")
    for name in others:
        registry = open_registry(cloud.group(name))
        register(registry, package, status="Approved")
        for stage in ("staging", "production"):
            SageMakerEndpoints(name, pause=cloud.settle).deploy(stage, package, "1")
            put_scaling_alarm(f"{name}-{stage}")
            cloud.drift_job(f"{name}-{stage}-d32c5kddcf5bb8c3")
        client("cloudwatch").put_metric_alarm(**alarm_requests(f"{name}-staging")[0])
    before = {name: resources(name) for name in others}
    hosting.deploy("staging", package, "1")
    hosting.deploy("production", package, "2")
    cloud.drift_job("intel-nb-staging-d32c5kddcf5bb8c3")
    cloud.drift_job("intel-nb-production-0f0e7f9a-1d1f-4c8e-9f2b-6a4a3f1f0c11")
    hosting.clear()
    assert {name: resources(name) for name in others} == before
    everything = resources("intel-nb")
    assert {kind: sorted(names) for kind, names in everything.items()} == {
        kind: sorted({*before["intel-nb-x"][kind], *before["intel-nb-staging"][kind]}) for kind in everything}
    assert all(before["intel-nb-x"].values()) and all(before["intel-nb-staging"].values())


# What an endpoint may do.

def test_a_container_has_no_network_and_knows_the_package_that_was_approved(cloud, hosting, registry, package):
    hosting.deploy("staging", package, "1")
    name, = [m["ModelName"] for m in client("sagemaker").list_models()["Models"]]
    model = client("sagemaker").describe_model(ModelName=name)
    assert model["EnableNetworkIsolation"] is True
    container, = model["Containers"]
    assert container["Environment"] == {"INTEL_NB_VERSION": "1", "INTEL_NB_FINGERPRINT": registry.get("1").fingerprint}


def test_serve_refuses_a_package_that_was_not_approved(package):
    command = [sys.executable, "-c", "from intel_nb.cli import main; main()", "serve", str(package), "--port", "0"]
    done = subprocess.run(command, env=os.environ | {"INTEL_NB_FINGERPRINT": "f" * 64}, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 2, done.stderr
    assert "is not the package that was approved: INTEL_NB_FINGERPRINT is ffffffffffff…" in done.stderr
