"""The five rules and the paths of a push: what starts which run, and that the matcher decides as EventBridge does."""
import ast
import json
import subprocess
from pathlib import Path

import pytest
from event_delivery import FifoQueue, parameters_of, resolved, transformed
from event_patterns import FILTERS, is_pushed, matches

from intel_nb.aws.rules import PUSH_PATHS, QUEUES, STARTS, ResourceNames, event_rules
from intel_nb.aws.stack import Options, template
from intel_nb.storage import InputError

ROOT = Path(__file__).parent.parent
NAMES = ResourceNames(data="intel-nb-data", annotations="intel-nb-annotations", code="intel-nb-code", group="intel-nb")
DIRECT = {rule.name: rule for rule in event_rules(NAMES)}
TRAIL = {rule.name: rule for rule in event_rules(NAMES, events="cloudtrail")}


def created(bucket: str, key: str, reason: str = "PutObject", size: int = 5) -> dict:
    "S3's own event, field for field as in its user guide (EventBridge event message structure)."
    return {"version": "0", "id": "17793124-05d4-b198-2fde-7ededc63b103", "detail-type": "Object Created",
            "source": "aws.s3",
            "account": "123456789012", "time": "2026-01-31T12:00:00Z", "region": "us-east-1",
            "resources": [f"arn:aws:s3:::{bucket}"],
            "detail": {"version": "0", "bucket": {"name": bucket},
                       "object": {"key": key, "size": size, "etag": "b1946ac92492d2347c6235b4d2611184",
                                  "version-id": "IYV3p45BT0ac8hjHg1houSdS1a.Mro8e", "sequencer": "617f08299329d189"},
                       "request-id": "N4N7GDK58NMKJ12R", "requester": "123456789012", "source-ip-address": "1.2.3.4",
                       "reason": reason}}


def restored(bucket: str, key: str) -> dict:
    "What S3 says when an object is back from the archive."
    event = created(bucket, key)
    detail = {k: v for k, v in event["detail"].items() if k not in ("source-ip-address", "reason")}
    more = {"requester": "s3.amazonaws.com", "restore-expiry-time": "2026-02-13T00:00:00Z",
            "source-storage-class": "GLACIER"}
    return {**event, "detail-type": "Object Restore Completed", "detail": detail | more}


def other(bucket: str, key: str, kind: str) -> dict:
    "Another of S3's events about an object."
    return {**created(bucket, key), "detail-type": kind}


def logged(call: str, bucket: str, key: str, **more) -> dict:
    "A data event of CloudTrail, as EventBridge hands it on."
    return {"version": "0", "id": "d0b4e5a8-0000-4000-8000-000000000000", "detail-type": "AWS API Call via CloudTrail",
            "source": "aws.s3",
            "account": "123456789012", "time": "2026-01-31T12:00:00Z", "region": "us-east-1", "resources": [],
            "detail": {"eventVersion": "1.11",
                       "userIdentity": {"type": "IAMUser", "accountId": "123456789012", "userName": "ann"},
                       "eventTime": "2026-01-31T12:00:00Z", "eventSource": "s3.amazonaws.com", "eventName": call,
                       "awsRegion": "us-east-1",
                       "sourceIPAddress": "1.2.3.4", "userAgent": "aws-cli/2",
                       "requestParameters": {
                           "bucketName": bucket, "key": key,
                           "Host": f"{bucket}.s3.amazonaws.com"},
                       "responseElements": {"x-amz-version-id": "IYV3p45BT0ac8hjHg1houSdS1a.Mro8e"},
                       "requestID": "N4N7GDK58NMKJ12R",
                       "eventID": "5c2a0f9e-0000-4000-8000-000000000000", "readOnly": False, "managementEvent": False,
                       "resources": [{"type": "AWS::S3::Object", "ARN": f"arn:aws:s3:::{bucket}/{key}"},
                                     {"accountId": "123456789012", "type": "AWS::S3::Bucket",
                                      "ARN": f"arn:aws:s3:::{bucket}"}],
                       "eventType": "AwsApiCall", "recipientAccountId": "123456789012", "eventCategory": "Data",
                       **more}}


def package_event(group: str = "intel-nb", status: str = "Approved",
                  kind: str = "SageMaker Model Package State Change", changed: str = "ModelApprovalStatus") -> dict:
    "SageMaker's event, as in its developer guide (Model package state change), after `changed` was updated."
    arn = f"arn:aws:sagemaker:us-east-1:123456789012:model-package/{group}/2"
    return {"version": "0", "id": "844e2571-85d4-695f-b930-0153b71dcb42", "detail-type": kind,
            "source": "aws.sagemaker",
            "account": "123456789012", "time": "2026-01-31T12:00:00Z", "region": "us-east-1", "resources": [arn],
            "detail": {"ModelPackageGroupName": group, "ModelPackageVersion": 2, "ModelPackageArn": arn,
                       "CreationTime": "2026-01-31T12:00:00Z",
                       "InferenceSpecification": {"Containers": [{
                           "Image": "123456789012.dkr.ecr.us-east-1.amazonaws.com/intel-nb:serve",
                           "ImageDigest": "sha256:4dc8", "ModelDataUrl": "s3://bucket/model.tar.gz"}],
                                                  "SupportedContentTypes": ["image/jpeg"]},
                       "ModelPackageStatus": "Completed",
                       "ModelPackageStatusDetails": {"ValidationStatuses": [], "ImageScanStatuses": []},
                       "CertifyForMarketplace": False, "ModelApprovalStatus": status,
                       "UpdatedModelPackageFields": [changed],
                       "LastModifiedTime": "2026-01-31T12:00:00Z"}}


def sagemaker_event(kind: str, resource: str, **detail) -> dict:
    return {"version": "0", "id": "d2921b5a-b0ad-cace-a8e3-0f159d018e06", "detail-type": kind,
            "source": "aws.sagemaker", "account": "123456789012", "time": "2026-01-31T12:00:00Z", "region": "us-east-1",
            "resources": [f"arn:aws:sagemaker:us-east-1:123456789012:{resource}"], "detail": detail}


def pipeline_event(status: str = "Failed", name: str = "intel-nb") -> dict:
    "SageMaker's event, as in its developer guide (Pipeline execution state change)."
    arn = f"arn:aws:sagemaker:us-east-1:123456789012:pipeline/{name}"
    return sagemaker_event(
        "SageMaker Model Building Pipeline Execution Status Change", f"pipeline/{name}",
        pipelineExecutionDisplayName="execution-1", currentPipelineExecutionStatus=status,
        previousPipelineExecutionStatus="Executing", executionStartTime="2026-01-31T11:00:00Z",
        executionEndTime="2026-01-31T12:00:00Z", pipelineArn=arn, pipelineExecutionArn=f"{arn}/execution/p4jn9xou8a8s")


def endpoint_event(status: str = "OUT_OF_SERVICE", stage: str = "production", name: str = "intel-nb") -> dict:
    "SageMaker's event, as in its developer guide (Endpoint state change)."
    return sagemaker_event(
        "SageMaker Endpoint State Change", f"endpoint/{name}-{stage}", EndpointName=f"{name}-{stage}",
        EndpointArn=f"arn:aws:sagemaker:us-east-1:123456789012:endpoint/{name}-{stage}",
        EndpointConfigName=f"{name}-{stage}-v3-0123abcd", EndpointStatus=status, CreationTime=1592411992203.0,
        ProductionVariants=[{"DesiredWeight": 1.0, "DesiredInstanceCount": 1.0}], LastModifiedTime=1592411994287.0,
        Tags={})


def run_event(name: str = "intel-nb-modeldeploy", state: str = "FAILED") -> dict:
    "CodePipeline's event, as in its user guide (Monitoring CodePipeline events)."
    return {"version": "0", "id": "01234567-0123-0123-0123-012345678901",
            "detail-type": "CodePipeline Pipeline Execution State Change", "source": "aws.codepipeline",
            "account": "123456789012", "time": "2026-01-31T12:00:00Z", "region": "us-east-1",
            "resources": [f"arn:aws:codepipeline:us-east-1:123456789012:{name}"],
            "detail": {"pipeline": name, "execution-id": "12345678-1234-5678-abcd-12345678abcd", "state": state,
                       "start-time": "2026-01-31T11:00:00.000Z", "pipeline-execution-attempt": 1.0, "version": 3.0}}


def build_event(name: str = "intel-nb-image", status: str = "FAILED") -> dict:
    "CodeBuild's event, as in its user guide (Build notifications sample)."
    id_ = f"arn:aws:codebuild:us-east-1:123456789012:build/{name}:8745a7a9-c340-456a-9166-edf953571bee"
    return {"version": "0", "id": "c030038d-8c4d-6141-9545-00ff7b7153ec", "detail-type": "CodeBuild Build State Change",
            "source": "aws.codebuild", "account": "123456789012", "time": "2026-01-31T12:00:00Z", "region": "us-east-1",
            "resources": [id_], "detail": {"build-status": status, "project-name": name, "build-id": id_,
                                           "current-phase": "COMPLETED", "version": "1"}}


EVENTS = {"a run failed": pipeline_event(), "a run succeeded": pipeline_event("Succeeded"),
          "an endpoint failed": endpoint_event(), "an endpoint serves": endpoint_event("IN_SERVICE"),
          "modeldeploy failed": run_event(), "modelbuild failed": run_event("intel-nb-modelbuild"),
          "modelbuild succeeded": run_event("intel-nb-modelbuild", "SUCCEEDED"), "the image failed": build_event(),
          "a build failed": build_event("intel-nb-modelbuild")}

MUST = {
    "modelbuild-code": [created("intel-nb-code", "modelbuild.zip"),
                        created("intel-nb-code", "modelbuild.zip", "CompleteMultipartUpload")],
    "modeldeploy-code": [created("intel-nb-code", "modeldeploy.zip"),
                         created("intel-nb-code", "modeldeploy.zip", "CopyObject")],
    "model-approved": [package_event()],
    "data-uploaded": [created("intel-nb-data", "intel.zip", reason)
                      for reason in ("PutObject", "CompleteMultipartUpload", "CopyObject", "POST Object")],
    "annotations-added": [created("intel-nb-annotations", "annotations/batch1/manifest.jsonl"),
                          created("intel-nb-annotations", "annotations/a.csv"),
                          restored("intel-nb-annotations", "annotations/batch1/manifest.jsonl")],
}
MUST_NOT = {
    "modelbuild-code": [created("intel-nb-code", "modeldeploy.zip"), created("intel-nb-data", "modelbuild.zip"),
                        created("intel-nb-code", "old/modelbuild.zip"),
                        other("intel-nb-code", "modelbuild.zip", "Object Deleted")],
    "modeldeploy-code": [created("intel-nb-code", "modelbuild.zip"), restored("intel-nb-code", "modeldeploy.zip")],
    "model-approved": [package_event(status="PendingManualApproval"), package_event(status="Rejected"),
                       package_event(group="intel-nb-2"), package_event(changed="CustomerMetadataProperties"),
                       package_event(kind="SageMaker Model State Change"),
                       {**package_event(), "source": "aws.sagemaker2"}],
    "data-uploaded": [created("intel-nb-data", "intel.zip.part"), created("intel-nb-data", "backup/intel.zip"),
                      created("intel-nb-data", "Intel.zip"),
                      created("intel-nb-data2", "intel.zip"), created("intel-nb-annotations", "intel.zip"),
                      created("intel-nb-data", "intel.zip", size=0),
                      other("intel-nb-data", "intel.zip", "Object Deleted"),
                      other("intel-nb-data", "intel.zip", "Object Tags Added"),
                      restored("intel-nb-data", "intel.zip")],
    "annotations-added": [created("intel-nb-annotations", "annotations/", size=0),
                          created("intel-nb-annotations", "annotations/.nothing", size=0),
                          created("intel-nb-annotations", "annotations.csv"),
                          created("intel-nb-annotations", "old/annotations/a.csv"),
                          created("intel-nb-data", "annotations/a.csv"),
                          other("intel-nb-annotations", "annotations/a.csv", "Object Annotation Created"),
                          other("intel-nb-annotations", "annotations/a.csv", "Object Restore Initiated"),
                          other("intel-nb-annotations", "annotations/a.csv", "Object Deleted")],
}
TRAIL_MUST = {
    "modelbuild-code": [logged("PutObject", "intel-nb-code", "modelbuild.zip")],
    "modeldeploy-code": [logged("CompleteMultipartUpload", "intel-nb-code", "modeldeploy.zip")],
    "model-approved": MUST["model-approved"],
    "data-uploaded": [logged(call, "intel-nb-data", "intel.zip")
                      for call in ("PutObject", "CompleteMultipartUpload", "CopyObject")],
    "annotations-added": [logged(call, "intel-nb-annotations", "annotations/a.csv")
                          for call in ("PutObject", "CompleteMultipartUpload", "RestoreObject")],
}
TRAIL_MUST_NOT = {
    "modelbuild-code": [created("intel-nb-code", "modelbuild.zip"),
                        logged("PutObject", "intel-nb-code", "modeldeploy.zip")],
    "modeldeploy-code": [logged("GetObject", "intel-nb-code", "modeldeploy.zip")],
    "model-approved": MUST_NOT["model-approved"],
    "data-uploaded": [logged("UploadPart", "intel-nb-data", "intel.zip"),
                      logged("CreateMultipartUpload", "intel-nb-data", "intel.zip"),
                      logged("DeleteObject", "intel-nb-data", "intel.zip"),
                      logged("PutObject", "intel-nb-data", "other.zip"),
                      logged("PutObject", "intel-nb-data", "intel.zip", errorCode="AccessDenied",
                             errorMessage="Access Denied")],
    "annotations-added": [logged("PutObject", "intel-nb-data", "annotations/a.csv"),
                          logged("PutObject", "intel-nb-annotations", "a.csv")],
}
EVERY = [event for group in (MUST, MUST_NOT, TRAIL_MUST, TRAIL_MUST_NOT) for events in group.values()
         for event in events]


@pytest.mark.parametrize("name", [start.name for start in STARTS if start.place != "endpoints"])
@pytest.mark.parametrize("found, must, must_not", [(DIRECT, MUST, MUST_NOT), (TRAIL, TRAIL_MUST, TRAIL_MUST_NOT)],
                         ids=["direct", "cloudtrail"])
def test_each_rule_matches_what_it_should_and_nothing_else(name, found, must, must_not):
    pattern = found[name].pattern
    assert [event for event in must[name] if not matches(pattern, event)] == []
    assert [event for event in must_not[name] if matches(pattern, event)] == []


@pytest.mark.parametrize("must", [MUST, TRAIL_MUST], ids=["direct", "cloudtrail"])
def test_an_event_starts_one_thing(must):
    for name, events in must.items():
        for event in events:
            hit = {rule.name for rule in [*DIRECT.values(), *TRAIL.values()] if matches(rule.pattern, event)}
            assert hit == {name}


def test_the_two_ways_never_both_notice_one_upload():
    for event in EVERY:
        for name in ("data-uploaded", "annotations-added", "modelbuild-code", "modeldeploy-code"):
            assert not (matches(DIRECT[name].pattern, event) and matches(TRAIL[name].pattern, event))


def test_the_rule_of_the_original_project_never_matches():
    "It used the bucket's ARN, and the log has the bare name: no event matches it, and with the bare name some do."
    def original(bucket: str) -> dict:
        return {"source": ["aws.s3"], "detail-type": ["AWS API Call via CloudTrail"],
                "detail": {"eventSource": ["s3.amazonaws.com"], "eventName": ["PutObject", "CompleteMultipartUpload"],
                           "requestParameters": {"bucketName": [bucket], "key": ["intel.zip"]}}}
    assert [event for event in EVERY if matches(original("arn:aws:s3:::intel-nb-data"), event)] == []
    assert [event for event in EVERY if matches(original("intel-nb-data"), event)]


def test_no_rule_names_a_bucket_by_its_arn():
    assert "arn:" not in json.dumps([rule.pattern for rule in [*DIRECT.values(), *TRAIL.values()]])


def test_patterns_fit_what_eventbridge_takes():
    assert all(len(json.dumps(rule.pattern)) <= 2048 for rule in [*DIRECT.values(), *TRAIL.values()])


def test_five_rules_and_what_they_start():
    assert {rule.name: rule.starts for rule in DIRECT.values()} == {
        "modelbuild-code": "modelbuild", "modeldeploy-code": "modeldeploy", "model-approved": "modeldeploy",
        "data-uploaded": "pipeline", "annotations-added": "pipeline"}
    behind_a_connection = [rule.name for rule in event_rules(NAMES, "connection")]
    assert behind_a_connection == ["model-approved", "data-uploaded", "annotations-added"]


@pytest.mark.parametrize("found, event", [(DIRECT, MUST["data-uploaded"][0]), (TRAIL, TRAIL_MUST["data-uploaded"][0])],
                         ids=["direct", "cloudtrail"])
def test_the_message_of_an_upload_is_the_version_of_the_object(found, event):
    rule = found["data-uploaded"]
    target = {"InputTransformer": {"InputPathsMap": rule.values, "InputTemplate": rule.message}}
    assert json.loads(transformed(target, event)) == {"version": "IYV3p45BT0ac8hjHg1houSdS1a.Mro8e"}


def test_rules_by_way_of_a_queue_are_those_that_start_the_pipeline():
    assert {name for name, rule in DIRECT.items() if rule.message} == set(QUEUES)
    assert {DIRECT[name].starts for name in QUEUES} == {"pipeline"}


# -- once: the rules, queues and pipes of the template, and a simulation of what SQS keeps apart

class Cloud:
    "The rules, the queues and the pipes of a template; `starts` are the executions that events have caused."
    def __init__(self, made: dict):
        self.resources = made["Resources"]
        self.queues = {name: FifoQueue(one["Properties"]) for name, one in self.resources.items()
                       if one["Type"] == "AWS::SQS::Queue" and one["Properties"].get("ContentBasedDeduplication")}
        self.runs: list[str] = []  # of CodePipelines

    def targets(self, event: dict) -> list[dict]:
        rules = [one["Properties"] for one in self.resources.values() if one["Type"] == "AWS::Events::Rule"]
        return [target for one in rules for target in one["Targets"] if matches(resolved(one["EventPattern"]), event)]

    def send(self, event: dict, now: float = 0) -> None:
        for target in self.targets(event):
            if "SqsParameters" in target:
                self.queues[target["Arn"]["Fn::GetAtt"][0]].send(transformed(target, event), now)
            elif target["Arn"] != {"Ref": "Topic"}:
                self.runs.append(target["Id"])

    def starts(self) -> list[tuple[float, str, dict]]:
        pipes = [one["Properties"] for one in self.resources.values() if one["Type"] == "AWS::Pipes::Pipe"]
        return sorted((now, pipe["Source"]["Fn::GetAtt"][0], parameters_of(pipe, record)) for pipe in pipes
                      for now, record in self.queues[pipe["Source"]["Fn::GetAtt"][0]].delivered)


SMALL = {"Version": "2020-12-01", "Parameters": [], "Steps": []}
BUCKETS = {kind: f"intel-nb-{kind}-123456789012-us-east-1"
           for kind in ("data", "annotations", "artifacts", "code", "logs")}


@pytest.fixture(params=["direct", "cloudtrail"])
def way(request):
    "An empty cloud, and a function that makes the event of an upload in the way that the stack notices it."
    def upload(kind: str, key: str, version: str = "v1", id_: str = "1") -> dict:
        event = (created(BUCKETS[kind], key) if request.param == "direct" else logged("PutObject", BUCKETS[kind], key))
        text = json.dumps(event | {"id": id_}).replace("IYV3p45BT0ac8hjHg1houSdS1a.Mro8e", version)
        return json.loads(text)
    return Cloud(template(Options(events=request.param), SMALL)), upload


def test_500_labels_within_five_minutes_start_one_run(way):
    cloud, upload = way
    for i in range(500):
        cloud.send(upload("annotations", f"annotations/batch/{i}.json", f"v{i}", str(i)), now=i * 300 / 499)
    (start,) = cloud.starts()
    assert start == (300, "LabelQueue", {"DataVersion": "id-0"}) and cloud.runs == []


def test_the_run_begins_after_the_last_of_its_labels(way):
    "The labels that start nothing are there when the run that was started before them begins."
    cloud, upload = way
    for i, now in enumerate((0, 100, 300)):
        cloud.send(upload("annotations", f"annotations/{i}.csv", f"v{i}"), now)
    assert [now for now, _, _ in cloud.starts()] == [300]


def test_labels_after_five_minutes_start_a_second_run_with_another_version(way):
    cloud, upload = way
    cloud.send(upload("annotations", "annotations/a.csv", "v1"), 0)
    cloud.send(upload("annotations", "annotations/b.csv", "v2"), 301)
    first, second = cloud.starts()
    assert (first[0], second[0]) == (300, 601) and first[2] != second[2]


def test_an_upload_that_is_delivered_twice_starts_one_run(way):
    cloud, upload = way
    cloud.send(upload("data", "intel.zip", "v1", "1"), 0)
    cloud.send(upload("data", "intel.zip", "v1", "2"), 60)
    assert cloud.starts() == [(0, "DataQueue", {"DataVersion": "v1"})]


def test_an_upload_that_is_delivered_again_late_has_the_same_version(way):
    "After the five minutes it starts a second execution, which the pipeline answers from its cache."
    cloud, upload = way
    cloud.send(upload("data", "intel.zip", "v1"), 0)
    cloud.send(upload("data", "intel.zip", "v1"), 4000)
    assert [version for _, _, version in cloud.starts()] == [{"DataVersion": "v1"}] * 2


def test_two_uploads_of_the_archive_start_two_runs(way):
    cloud, upload = way
    cloud.send(upload("data", "intel.zip", "v1"), 0)
    cloud.send(upload("data", "intel.zip", "v2"), 60)
    assert [version for _, _, version in cloud.starts()] == [{"DataVersion": "v1"}, {"DataVersion": "v2"}]


# All that our own code writes while it works, and what it must start: nothing, but for a code archive and an approval.
WRITTEN = {
    "jobs": [("artifacts", "pipeline/runs/abc/data/report.json"),
             ("artifacts", "pipeline/runs/abc/executed/00_data.ipynb"),
             ("artifacts", "pipeline/runs/abc/annotations/a.csv"), ("artifacts", "pipeline/runs/abc/intel.zip")],
    "registrar": [("artifacts", "registry/abc/model.tar.gz"), ("artifacts", "registry/abc/evaluation.json")],
    "endpoints": [("artifacts", "captures/intel-nb-production/AllTraffic/2026/01/31/12/x.jsonl")],
    "watch": [("artifacts", "drift/intel-nb-production/state.json"),
              ("artifacts", "drift/intel-nb-production/seen.json")],
    "stages": [("artifacts", "state/staging.json"), ("artifacts", "state/production.json")],
    "CodePipeline": [("artifacts", "intel-nb-modelbuild/Code/abc.zip"),
                     ("artifacts", "intel-nb-modeldeploy/DeployNote/abc"), ("artifacts", "modelbuild.zip")],
    "S3": [("logs", "access/data/2026-01-31"), ("logs", "AWSLogs/123456789012/CloudTrail/x.json.gz")],
    "deploy": [("code", "image/abc.zip"), ("code", "image.zip")],
}


@pytest.mark.parametrize("who", WRITTEN)
def test_what_our_own_code_writes_starts_nothing(way, who):
    cloud, upload = way
    for kind, key in WRITTEN[who]:
        assert cloud.targets(upload(kind, key)) == [], (kind, key)


def test_the_placeholder_of_labels_starts_nothing():
    cloud = Cloud(template(Options(), SMALL))
    assert cloud.targets(created(BUCKETS["annotations"], "annotations/.nothing", size=0)) == []
    assert len(cloud.targets(created(BUCKETS["annotations"], "annotations/a.csv", size=1))) == 1


def test_a_code_archive_starts_its_pipeline(way):
    cloud, upload = way
    cloud.send(upload("code", "modelbuild.zip"))
    cloud.send(upload("code", "modeldeploy.zip"))
    assert cloud.runs == ["modelbuild", "modeldeploy"] and cloud.starts() == []


@pytest.mark.parametrize("status, changed, runs", [
    ("Approved", ["ModelApprovalStatus"], ["modeldeploy"]),
    ("Approved", ["CustomerMetadataProperties"], []), ("Approved", ["ModelPackageDescription"], []),
    ("Approved", ["ModelApprovalStatus", "ApprovalDescription"], ["modeldeploy"]),
    ("PendingManualApproval", ["ModelApprovalStatus"], []), ("PendingManualApproval", None, []),
    ("Rejected", ["ModelApprovalStatus"], []), ("Rejected", ["CustomerMetadataProperties"], [])])
def test_a_change_of_a_version_starts_modeldeploy_when_it_was_approved_just_now(status, changed, runs):
    "A note on an approved version (a tag, a test's result) says Approved too, and names what was changed."
    cloud = Cloud(template(Options(), SMALL))
    event = package_event(status=status)
    event["detail"].pop("UpdatedModelPackageFields")
    cloud.send({**event, "detail": event["detail"] | ({"UpdatedModelPackageFields": changed} if changed else {})})
    assert cloud.runs == runs and cloud.starts() == []


def test_the_events_of_runs_and_endpoints_start_nothing():
    cloud = Cloud(template(Options(), SMALL))
    for event in EVENTS.values():
        cloud.send(event)
    assert cloud.runs == [] and cloud.starts() == []


def test_a_queue_that_is_full_of_failures_is_given_up_and_kept():
    made = template(Options(), SMALL)["Resources"]
    for name, dead in (("DataQueue", "DataDead"), ("LabelQueue", "LabelDead")):
        queue, letters = made[name]["Properties"], made[dead]["Properties"]
        assert queue["RedrivePolicy"] == {"deadLetterTargetArn": {"Fn::GetAtt": [dead, "Arn"]}, "maxReceiveCount": 5}
        assert queue["FifoQueue"] and letters["FifoQueue"], "the queue behind a FIFO queue is one too"
        assert queue["QueueName"].endswith(".fifo") and letters["QueueName"].endswith(".fifo")
        assert queue["VisibilityTimeout"] >= 6 * 60 and "ContentBasedDeduplication" not in letters
        assert made[f"{name}Pipe"]["Properties"]["SourceParameters"] == {"SqsQueueParameters": {"BatchSize": 1}}
        (sender, _) = made[f"{name}Policy"]["Properties"]["PolicyDocument"]["Statement"]
        ((rule,),) = [[arn["Fn::GetAtt"][0] for arn in sender["Condition"]["ArnEquals"]["aws:SourceArn"]]]
        (target,) = made[rule]["Properties"]["Targets"]
        assert target["Arn"] == {"Fn::GetAtt": [name, "Arn"]} and target["SqsParameters"]["MessageGroupId"]
    assert "FifoQueue" not in made["Undelivered"]["Properties"], "EventBridge takes a standard queue alone"


def test_targets_with_a_policy_of_their_own_take_no_role():
    "EventBridge's guide: a role on a target of SQS or SNS makes its delivery fail."
    for one in template(Options(), SMALL)["Resources"].values():
        if one["Type"] == "AWS::Events::Rule":
            (target,) = one["Properties"]["Targets"]
            assert ("RoleArn" in target) == ("Fn::Sub" in target["Arn"]), "a CodePipeline alone"
            assert target["DeadLetterConfig"] == {"Arn": {"Fn::GetAtt": ["Undelivered", "Arn"]}}


BUILD, DEPLOY = "modelbuild", "modeldeploy"
# What a push of a file starts, by the longest beginning of its path that is listed here.
STARTED_BY = {
    "nbs/00_": {BUILD}, "nbs/01_": {BUILD}, "nbs/02_": {BUILD}, "nbs/03_": {DEPLOY}, "nbs/04_": {DEPLOY},
    "nbs/05_": {DEPLOY},
    "nbs/1": {BUILD, DEPLOY}, "nbs/detection/": {BUILD, DEPLOY}, "nbs/labels/": {BUILD, DEPLOY},
    "nbs/training/": {BUILD}, "nbs/serving/": {BUILD, DEPLOY},
    "nbs/chain/": {BUILD, DEPLOY}, "nbs/aws/": {BUILD, DEPLOY},
    "intel_nb/": {BUILD, DEPLOY}, "intel_nb/training/": {BUILD},
    **dict.fromkeys(("nbs/training/00_", "nbs/training/09_", "intel_nb/training/pairs", "intel_nb/training/proba"),
                    {BUILD, DEPLOY}),
    "tests/": {BUILD}, "settings.ini": {BUILD, DEPLOY}, "pyproject.toml": {BUILD, DEPLOY},
    "locks/": {BUILD, DEPLOY}, "docker/": {BUILD, DEPLOY}, "Dockerfile": {BUILD, DEPLOY},
}
# Files that no build reads: what is for people, for this machine, or for the checks before a merge.
START_NOTHING = (".ci/", ".dockerignore", ".git", ".github/", ".pre-commit", "bench/", "CHANGELOG.md",
                 "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "SECURITY.md", "docs/", "executed/", "nbs/2",
                 "nbs/index")


def started(*changed: str) -> set[str]:
    "The pipelines that a push of these files starts."
    return {name for name, paths in PUSH_PATHS.items() if is_pushed(paths, list(changed))}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the source was handed over without its history")
def test_each_tracked_file_starts_what_its_folder_says():
    expected, unlisted = {}, []
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for path in (tracked := listed.splitlines()):
        fitting = [start for start in (*STARTED_BY, *START_NOTHING) if path.startswith(start)]
        if not fitting:
            unlisted.append(path)
            continue
        expected[path] = STARTED_BY.get(max(fitting, key=len), set())
    assert unlisted == [], "say in STARTED_BY or in START_NOTHING what a push of them starts"
    unused = [start for start in (*STARTED_BY, *START_NOTHING) if not any(path.startswith(start) for path in tracked)]
    assert unused == []
    assert {path: started(path) for path in expected} == expected


def test_each_module_that_a_step_imports_starts_the_pipeline_of_the_step():
    builds = ("aws.stages", "aws.container")  # what the builds and the jobs start
    halves = {BUILD: ("data", "train", "evaluate", *builds), DEPLOY: ("deploy", "drift", "staging", *builds)}
    for name, steps in halves.items():
        files = {path for step in steps for path in imported_files(step)}
        assert len(files) > 8
        assert [path for path in sorted(files) if name not in started(path)] == []


def imported_files(module: str, seen: frozenset[str] = frozenset()) -> set[str]:
    "The files of the package that `module` imports, directly and through others, with its own."
    path = f"intel_nb/{module.replace('.', '/')}.py"
    if path in seen or not (ROOT / path).is_file():
        return set()
    found = {path}
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("intel_nb")):
            base = module.split(".")[:-node.level] if node.level else []
            start = ".".join([*base, *filter(None, [(node.module or "").removeprefix("intel_nb").lstrip(".")])])
            for name in (start, *(f"{start}.{alias.name}".lstrip(".") for alias in node.names)):
                found |= imported_files(name, seen | found)
    return found


@pytest.mark.parametrize("changed, expected", [
    (["nbs/01_train.ipynb"], {BUILD}), (["nbs/05_test_staging.ipynb", "README.md"], {DEPLOY}),
    (["nbs/01_train.ipynb", "nbs/03_deploy.ipynb"], {BUILD, DEPLOY}), (["nbs/15_detector.ipynb"], {BUILD, DEPLOY}),
    (["locks/run.txt"], {BUILD, DEPLOY}), (["nbs/aws/09_pipeline.ipynb"], {BUILD, DEPLOY}),
    (["nbs/serving/09_app.ipynb"], {BUILD, DEPLOY}), (["nbs/training/04_heads.ipynb"], {BUILD}),
    (["intel_nb/_torchvision.py"], {BUILD, DEPLOY}), (["README.md"], set()),
    (["docs/nbs/01_train.ipynb"], set()), (["nbs/old/01_train.ipynb"], set()), (["old/settings.ini"], set()),
    ([], set())])
def test_a_push_starts_what_its_files_are_part_of(changed, expected):
    assert started(*changed) == expected


# The matcher: (pattern for the field `f`, values of `f` that match, values that do not); MISSING leaves the field out.
MISSING = object()
CASES = {
    "exact text": (["a"], ["a", ["b", "a"]], ["A", "ab", "", None, 1, [], MISSING]),
    "exact number": ([300], [300, [1, 300]], [300.0, "300", True]),
    "exact truth": ([True], [True], [1, "true", False]),
    "null": ([None], [None, [None]], ["", 0, "null", [], MISSING]),
    "empty text": ([""], [""], [None, " ", [], MISSING]),
    "alternatives": (["a", None, 5], ["a", None, 5], ["b", 6]),
    "prefix": ([{"prefix": "ab"}], ["ab", "abc", ["x", "abd"]], ["Abc", "a", None, 5, MISSING]),
    "prefix, any case": ([{"prefix": {"equals-ignore-case": "AB"}}], ["abc", "ABc"], ["xab"]),
    "suffix": ([{"suffix": ".zip"}], ["a.zip", ".zip"], ["a.ZIP", "a.zip2", None]),
    "suffix, any case": ([{"suffix": {"equals-ignore-case": ".ZIP"}}], ["a.zip", "a.Zip"], ["a.zi"]),
    "any case": ([{"equals-ignore-case": "Approved"}], ["approved", "APPROVED"], ["approve", None]),
    "wildcard": ([{"wildcard": "runs/*/data.json"}], ["runs/1/data.json", "runs//data.json", "runs/a/b/data.json"],
                 ["runs/1/data.jsonl", "xruns/1/data.json"]),
    "wildcard, a star itself": ([{"wildcard": r"a\*b*"}], ["a*b", "a*bc"], ["axb"]),
    "anything but": ([{"anything-but": "a"}], ["b", None, 5, ["a", "b"]], ["a", ["a"], [], MISSING]),
    "anything but these": ([{"anything-but": ["a", 5]}], ["b", 6], ["a", 5]),
    "anything but a prefix": ([{"anything-but": {"prefix": "tmp/"}}], ["a", None], ["tmp/a"]),
    "anything but suffixes": ([{"anything-but": {"suffix": [".tmp", ".part"]}}], ["a.zip"], ["a.tmp", "a.part"]),
    "anything but a wildcard": ([{"anything-but": {"wildcard": "*/tmp/*"}}], ["a/b"], ["a/tmp/b"]),
    "there": ([{"exists": True}], ["a", None, 0, ["a"]], [MISSING, [], {"deeper": 1}]),
    "not there": ([{"exists": False}], [MISSING, []], ["a", None]),
    "number above": ([{"numeric": [">", 0]}], [1, 0.5, [-1, 2]], [0, -1, "1", True, None, MISSING]),
    "number between": ([{"numeric": [">", 0, "<=", 5]}], [5, 0.1], [0, 5.1]),
    "number equal": ([{"numeric": ["=", 3]}], [3, 3.0], [4, "3"]),
    "filters are alternatives": ([{"prefix": "a"}, {"suffix": "z"}], ["ab", "yz"], ["ba"]),
    "lists within lists": (["a"], [[["b"], ["a"]]], [[["b"]]]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_matcher(case):
    pattern, matching, others = CASES[case]

    def is_match(value):
        return matches({"detail": {"f": pattern}}, {"detail": {} if value is MISSING else {"f": value}})
    assert [value for value in matching if not is_match(value)] == []
    assert [value for value in others if is_match(value)] == []


def test_every_filter_has_a_case():
    patterns = json.dumps([pattern for pattern, _, _ in CASES.values()])
    assert [kind for kind in FILTERS if f'"{kind}"' not in patterns] == []


def test_a_list_of_objects_matches_by_one_of_them_as_a_whole():
    event = {"resources": [{"type": "Object", "arn": "a"}, {"type": "Bucket", "arn": "b"}]}
    assert matches({"resources": {"type": ["Bucket"], "arn": ["b"]}}, event)
    assert not matches({"resources": {"type": ["Bucket"], "arn": ["a"]}}, event)
    assert not matches({"resources": {"type": [{"exists": False}]}}, event)
    assert matches({"resources": {"size": [{"exists": False}]}}, event)


def test_or_is_one_of_several_patterns_beside_the_other_fields():
    pattern = {"source": ["s"], "$or": [{"detail": {"a": [1]}}, {"detail": {"b": [{"prefix": "x"}]}}]}
    assert matches(pattern, {"source": "s", "detail": {"a": 1}})
    assert matches(pattern, {"source": "s", "detail": {"a": 2, "b": "xy"}})
    assert not matches(pattern, {"source": "t", "detail": {"a": 1}})
    assert not matches(pattern, {"source": "s", "detail": {"a": 2}})


def test_all_fields_must_match_and_others_do_not_matter():
    event = {"a": 1, "b": {"c": "x", "d": 5}}
    assert matches({}, event) and matches({"a": [1], "b": {"c": ["x"]}}, event)
    assert not matches({"a": [1], "b": {"c": ["y"]}}, event)
    assert not matches({"a": {"c": [1]}}, event), "a plain value has nothing below it"


@pytest.mark.parametrize("pattern, said", [
    ({"source": "aws.s3"}, "a list of values"), ({"detail": {"key": []}}, "a list of values"),
    ({"source": [{"prefx": "a"}]}, "no filter 'prefx'"),
    ({"source": [{"prefix": "a", "suffix": "b"}]}, "no filter 'prefix', 'suffix'"),
    ({"n": [{"numeric": [">"]}]}, "refuses numeric"),
    ({"n": [{"numeric": ["~", 1]}]}, "refuses numeric"), ({"s": [{"wildcard": "a**b"}]}, "refuses the wildcard"),
    ({"$or": [{"a": [1]}, {"b": "x"}]}, "a list of values")])
def test_a_pattern_that_eventbridge_refuses_is_refused(pattern, said):
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        matches(pattern, {"source": "x", "n": 1, "s": "a", "a": 1, "detail": {"key": "x"}})


def test_an_upload_reaches_a_queue_by_these_very_patterns():
    "On an emulator over HTTP: S3 tells EventBridge, the rule of the stack matches, and its target gets the event."
    import boto3
    from botocore.config import Config
    from moto.moto_api._internal.models import moto_api_backend
    from moto.server import ThreadedMotoServer
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        def client(service):
            return boto3.client(service, endpoint_url="http://{}:{}".format(*server.get_host_and_port()),
                                region_name="us-east-1",
                                aws_access_key_id="test", aws_secret_access_key="test",
                                config=Config(retries={"max_attempts": 1}))
        s3, events, sqs = client("s3"), client("events"), client("sqs")
        for bucket in ("intel-nb-data", "intel-nb-annotations", "intel-nb-code"):
            s3.create_bucket(Bucket=bucket)
            s3.put_bucket_notification_configuration(Bucket=bucket,
                                                     NotificationConfiguration={"EventBridgeConfiguration": {}})
        queues = {}
        # The emulator does not know suffixes everywhere, nor numbers below an object.
        for name in ("modelbuild-code", "data-uploaded"):
            queues[name] = sqs.create_queue(QueueName=name)["QueueUrl"]
            arn = sqs.get_queue_attributes(QueueUrl=queues[name], AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
            events.put_rule(Name=name, EventPattern=json.dumps(DIRECT[name].pattern))
            events.put_targets(Rule=name, Targets=[{"Id": "1", "Arn": arn}])
        s3.put_object(Bucket="intel-nb-data", Key="intel.zip", Body=b"12345")
        s3.put_object(Bucket="intel-nb-data", Key="other.zip", Body=b"12345")
        s3.put_object(Bucket="intel-nb-code", Key="modelbuild.zip", Body=b"12345")
        got = {name: [json.loads(m["Body"])
                      for m in sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10).get("Messages", [])]
               for name, url in queues.items()}
        assert {name: [e["detail"]["object"]["key"] for e in found] for name, found in got.items()} == {
            "modelbuild-code": ["modelbuild.zip"], "data-uploaded": ["intel.zip"]}
        assert all(matches(DIRECT[name].pattern, event) for name, found in got.items() for event in found)
    finally:
        moto_api_backend.reset()  # its state belongs to this process, not to the server
        server.stop()
