"""The stack: two linters on all its variants, its properties, and the order in which it is deployed and removed."""
import itertools
import json
import os
import re
import shutil
import subprocess

import pytest
from cloud import emulated

from intel_nb.aws.client import client
from intel_nb.aws.stack import (
    ACCOUNT,
    BUILD_SPECS,
    TEMPLATE_BYTES,
    Options,
    checked_options,
    template,
    template_json,
    template_yaml,
)
from intel_nb.storage import InputError

CONNECTION = {"source": "connection",
              "connection": "arn:aws:codeconnections:us-east-1:123456789012:connection/"
                            "0f1e2d3c-0000-4000-8000-000000000000",
              "repository": "ann/intel-nb"}
VARIANTS = {
    "-".join(filter(None, (source, events, "mail" if mail else "", f"watch{len(watch)}"))): Options(
        **(CONNECTION if source == "connection" else {}), events=events, email="ann@example.org" if mail else "",
        watch=watch)
    for source, events, mail, watch in itertools.product(("s3", "connection"), ("direct", "cloudtrail"), (False, True),
                                                         ((), ("staging", "production")))}
ELSEWHERE = {"frankfurt": Options(region="eu-central-1"),
             "gpu-spot": Options(instance_train="ml.g5.xlarge", spot=True, profile="full"),
             "other-name": Options(name="scenes", log_days=365)}
ALL = VARIANTS | ELSEWHERE


@pytest.fixture(scope="session")
def made():
    "The templates of all variants; the definition is made once for each region and instance."
    return {name: template(options) for name, options in ALL.items()}


def of_kind(made: dict, kind: str) -> dict[str, dict]:
    return {name: one["Properties"] for name, one in made["Resources"].items() if one["Type"] == f"AWS::{kind}"}


def definition_text(made: dict) -> str:
    "The pipeline's definition in a template, with CloudFormation's references in it."
    pipeline = of_kind(made, "SageMaker::Pipeline")["Pipeline"]
    return pipeline["PipelineDefinition"]["PipelineDefinitionBody"]["Fn::Sub"]


SOME = ("s3-direct-mail-watch2", "connection-cloudtrail-watch0", "frankfurt")  # between them they have every resource

@pytest.mark.parametrize("name", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in ALL])
def test_cfn_lint_finds_nothing(made, name):
    from cfnlint import ManualArgs, lint
    found = lint(template_yaml(made[name]),
                 config=ManualArgs(regions=[ALL[name].region], ignore_checks=[], include_checks=["I"]))
    assert [str(match) for match in found if match.rule.id[0] in "EW"] == []


def test_cfn_lint_would_find_something(made):
    from cfnlint import ManualArgs, lint
    needed = ("Pipeline", "PipelineRole", "JobRole", "ArtifactBucket", "LogBucket")
    broken = {"AWSTemplateFormatVersion": "2010-09-09", "Resources": {}}
    for name in needed:
        broken["Resources"][name] = json.loads(json.dumps(made["s3-direct-watch0"]["Resources"][name]))
    before = {str(match) for match in lint(json.dumps(broken), config=ManualArgs(regions=["us-east-1"]))}
    broken["Resources"]["Pipeline"]["Properties"].pop("RoleArn")
    found = lint(json.dumps(broken), config=ManualArgs(regions=["us-east-1"]))
    assert [(m.rule.id, "RoleArn" in m.message) for m in found if str(m) not in before] == [("E3003", True)]


@pytest.mark.parametrize("name", ["s3-direct-mail-watch2", "connection-cloudtrail-mail-watch2"])
def test_checkov_finds_nothing_that_is_not_excepted(made, name, tmp_path):
    "In an environment of its own (pipx install checkov): it pins old versions of what we use."
    checkov = os.environ.get("CHECKOV") or shutil.which("checkov")
    if not checkov:
        pytest.skip("checkov is not installed: pipx install checkov, or set CHECKOV to its path")
    (tmp_path / "stack.json").write_text(json.dumps(made[name]))
    done = subprocess.run([checkov, "-f", "stack.json", "--framework", "cloudformation", "-o", "json", "--compact"],
                          cwd=tmp_path,
                          capture_output=True, text=True,
                          env=os.environ | {"BC_SKIP_MAPPING": "TRUE", "CHECKOV_RUN_SCA_PACKAGE_SCAN_V2": "false"})
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0 and report["summary"]["passed"] > 50
    assert [(one["check_id"], one["resource"]) for one in report["results"]["failed_checks"]] == []
    excepted = {(one["check_id"], one["resource"].rpartition(".")[2]) for one in report["results"]["skipped_checks"]}
    assert excepted == {(skip["id"], name) for name, one in made[name]["Resources"].items()
                        for skip in skips(one)}, "an exception that excepts nothing"


def skips(one: dict) -> list[dict]:
    return one.get("Metadata", {}).get("checkov", {}).get("skip", [])


@pytest.mark.parametrize("name", ALL)
def test_exceptions_say_why(made, name):
    for one in made[name]["Resources"].values():
        for skip in skips(one):
            assert re.fullmatch(r"CKV2?_AWS_\d+", skip["id"]) and len(skip["comment"]) > 30


@pytest.mark.parametrize("name", ALL)
def test_a_template_fits_into_one_call(made, name):
    text = template_json(made[name])
    assert len(text.encode()) < TEMPLATE_BYTES and len(made[name]["Resources"]) < 500
    assert json.loads(text) == made[name]


def test_a_template_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match=f"CloudFormation takes {TEMPLATE_BYTES:,}"):
        template_json({"Description": "x" * TEMPLATE_BYTES})


@pytest.mark.parametrize("name", ALL)
def test_buckets_are_private_encrypted_versioned_and_tls_only(made, name):
    buckets, policies = of_kind(made[name], "S3::Bucket"), of_kind(made[name], "S3::BucketPolicy")
    assert {"DataBucket", "AnnotationsBucket", "ArtifactBucket", "LogBucket"} <= set(buckets)
    for key, bucket in buckets.items():
        blocked = bucket["PublicAccessBlockConfiguration"]
        assert set(blocked.values()) == {True} and len(blocked) == 4
        assert bucket["VersioningConfiguration"] == {"Status": "Enabled"}
        encryption = bucket["BucketEncryption"]["ServerSideEncryptionConfiguration"][0]
        assert encryption["ServerSideEncryptionByDefault"]["SSEAlgorithm"]
        rules = {rule["Id"]: rule for rule in bucket["LifecycleConfiguration"]["Rules"]}
        assert "old-versions" in rules and "unfinished-uploads" in rules
        statements = policies[f"{key}Policy"]["PolicyDocument"]["Statement"]
        tls = next(s for s in statements if s["Effect"] == "Deny")
        assert tls["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
        assert tls["Principal"] == "*" and len(tls["Resource"]) == 2
        assert not [s for s in statements if s["Effect"] == "Allow" and s["Principal"] == "*"]
        assert made[name]["Resources"][key]["DeletionPolicy"].startswith("Retain")


def test_no_lifecycle_rule_deletes_what_the_registry_is_made_of(made):
    for name in ALL:
        rules = of_kind(made[name], "S3::Bucket")["ArtifactBucket"]["LifecycleConfiguration"]["Rules"]
        for rule in rules:
            if "ExpirationInDays" in rule:
                for key in ("pipeline/runs/x", "registry/1/model.tar.gz"):
                    assert not key.startswith(rule["Prefix"])


@pytest.mark.parametrize("name", VARIANTS)
def test_rules_have_a_role_a_target_and_a_queue_for_what_fails(made, name):
    found = of_kind(made[name], "Events::Rule")
    assert len(found) == (5 if VARIANTS[name].source == "s3" else 3)
    for rule in found.values():
        (target,) = rule["Targets"]
        assert target["RoleArn"] == {"Fn::GetAtt": ["EventsRole",
                                                    "Arn"]} and target["DeadLetterConfig"] and target["RetryPolicy"]
    (queue_policy,) = of_kind(made[name], "SQS::QueuePolicy").values()
    allowed = queue_policy["PolicyDocument"]["Statement"][0]["Condition"]["ArnEquals"]["aws:SourceArn"]
    assert [one["Fn::GetAtt"][0] for one in allowed] == list(found)


@pytest.mark.parametrize("name", VARIANTS)
def test_rules_match_real_events_with_the_names_that_the_stack_gives(made, name):
    "The pattern in the template, its references resolved, matches an upload to the bucket in the template."
    from event_patterns import matches
    from test_rules import created, logged
    resolve = lambda text: text["Fn::Sub"].replace("${AWS::AccountId}", ACCOUNT)
    bucket = resolve(of_kind(made[name], "S3::Bucket")["DataBucket"]["BucketName"])
    pattern = json.loads(re.sub(r'\{"Fn::Sub": "([^"]*)"\}', lambda m: json.dumps(resolve({"Fn::Sub": m[1]})),
                                json.dumps(of_kind(made[name], "Events::Rule")["RuleDataUploaded"]["EventPattern"])))
    upload = created(bucket, "intel.zip") if VARIANTS[name].events == "direct" else logged("PutObject", bucket,
                                                                                           "intel.zip")
    assert matches(pattern, upload)
    assert not matches(pattern, json.loads(json.dumps(upload).replace("intel.zip", "other.zip")))


@pytest.mark.parametrize("name", VARIANTS)
def test_what_a_rule_hands_to_the_pipeline_is_one_of_its_parameters(made, name):
    body = definition_text(made[name])
    declared = {p["Name"]: p for p in json.loads(body.replace("${!", "${"))["Parameters"]}
    for rule in of_kind(made[name], "Events::Rule").values():
        for one in rule["Targets"][0].get("SageMakerPipelineParameters", {}).get("PipelineParameterList", []):
            assert declared[one["Name"]]["Type"] == "String"


@pytest.mark.parametrize("name", VARIANTS)
def test_uploads_are_noticed_in_the_way_that_was_chosen(made, name):
    options, buckets = VARIANTS[name], of_kind(made[name], "S3::Bucket")
    told = {key for key, one in buckets.items() if "NotificationConfiguration" in one}
    watched = {"DataBucket", "AnnotationsBucket"} | ({"CodeBucket"} if options.source == "s3" else set())
    assert told == (watched if options.events == "direct" else set())
    trails = of_kind(made[name], "CloudTrail::Trail")
    assert len(trails) == (options.events == "cloudtrail")
    for trail in trails.values():
        values = trail["EventSelectors"][0]["DataResources"][0]["Values"]
        assert {re.search(r"\$\{(\w+)\.Arn\}/$", one["Fn::Sub"])[1] for one in values} == watched


@pytest.mark.parametrize("name", ALL)
def test_the_definition_in_the_template_is_the_checked_one(made, name):
    from intel_nb.aws.pipeline import pipeline_problems
    body = definition_text(made[name])
    assert ACCOUNT not in body
    role = "arn:aws:iam::123456789012:role/x"
    places = {"${JobRole.Arn}": role, "${RegistrarRole.Arn}": role, "${AWS::AccountId}": ACCOUNT}
    for place, value in places.items():
        body = body.replace(place, value)
    assert "${AWS" not in body and pipeline_problems(json.loads(body.replace("${!", "${"))) == []


@pytest.mark.parametrize("name", ALL)
def test_no_account_is_written_anywhere(made, name):
    given = {ALL[name].connection}
    text = json.dumps(made[name])
    for one in given - {""}:
        text = text.replace(one, "")
    assert set(re.findall(r"(?<!\d)\d{12}(?!\d)", text)) <= {"763104351884"}, "Amazon's account for images alone"


def test_modeldeploy_goes_to_production_only_past_the_tests_and_a_person(made):
    stages = of_kind(made["s3-direct-watch0"], "CodePipeline::Pipeline")["ModeldeployPipeline"]["Stages"]
    assert [stage["Name"] for stage in stages] == ["Source", "Staging", "Approval", "Production"]
    staging = stages[1]["Actions"]
    assert [a["RunOrder"] for a in staging] == [1, 2, 3]
    steps = [json.loads(a["Configuration"]["EnvironmentVariables"])[0]["value"] for a in staging + stages[3]["Actions"]]
    assert steps == ["deploy", "drift", "staging", "promote"]
    assert stages[2]["Actions"][0]["ActionTypeId"]["Category"] == "Approval"
    assert stages[3]["OnFailure"] == {"Result": "ROLLBACK"}
    rules = stages[3]["OnSuccess"]["Conditions"][0]["Rules"]
    assert [r["Configuration"]["AlarmName"] for r in rules] == ["intel-nb-production-errors",
                                                                "intel-nb-production-latency"]


def test_the_steps_of_the_builds_are_those_of_the_module(made):
    from intel_nb.aws.stages import NOTEBOOKS
    stages = of_kind(made["s3-direct-watch0"], "CodePipeline::Pipeline")["ModeldeployPipeline"]["Stages"]
    steps = {v["value"] for s in stages for a in s["Actions"]
             for v in json.loads(a["Configuration"].get("EnvironmentVariables", "[]")) if v["name"] == "STEP"}
    assert steps == set(NOTEBOOKS)
    assert all("python -m intel_nb.aws.stages" in json.dumps(spec) for spec in BUILD_SPECS.values())


def test_a_push_to_a_repository_starts_the_pipelines_themselves(made):
    from intel_nb.aws.rules import PUSH_PATHS
    for key, one in of_kind(made["connection-direct-watch0"], "CodePipeline::Pipeline").items():
        (trigger,) = one["Triggers"]
        (push,) = trigger["GitConfiguration"]["Push"]
        assert push["Branches"] == {"Includes": ["main"]}
        assert push["FilePaths"]["Includes"] == list(PUSH_PATHS[one["Name"].rpartition("-")[2]]), key


@pytest.mark.parametrize("name", ALL)
def test_alarms_tell_people_and_watch_every_stage(made, name):
    alarms = of_kind(made[name], "CloudWatch::Alarm")
    names = {one["AlarmName"] for one in alarms.values()}
    assert {f"{ALL[name].name}-{stage}-{kind}" for stage in ("staging", "production")
            for kind in ("errors", "latency", "drift")} <= names
    assert all(one["AlarmActions"] == [{"Ref": "Topic"}] for one in alarms.values())


def test_the_alarms_are_those_that_call_an_update_back(made):
    from intel_nb.aws.hosting import alarm_requests
    alarms = {one["AlarmName"]: one for one in of_kind(made["s3-direct-watch0"], "CloudWatch::Alarm").values()}
    for request in alarm_requests("intel-nb-production"):
        ours = alarms[request["AlarmName"]]
        assert {k: ours[k] for k in request if k in ours} == {k: v for k, v in request.items() if k in ours}
        assert set(request) - set(ours) <= {"ActionsEnabled"}


@pytest.mark.parametrize("name", ALL)
def test_logs_expire(made, name):
    groups = of_kind(made[name], "Logs::LogGroup")
    assert {one["RetentionInDays"] for one in groups.values()} == {ALL[name].log_days} and len(groups) == 4


def test_roles_are_taken_by_one_service_for_this_account(made):
    for key, role in of_kind(made["s3-direct-watch0"], "IAM::Role").items():
        (statement,) = role["AssumeRolePolicyDocument"]["Statement"]
        assert list(statement["Principal"]) == ["Service"] and statement["Condition"], key
        assert len(json.dumps(role["Policies"])) < 10_240, key


def test_the_schedule_starts_a_job_that_sagemaker_takes(made):
    from intel_nb.aws.client import request_problems
    for key, one in of_kind(made["s3-direct-watch2"], "Scheduler::Schedule").items():
        text = one["Target"]["Input"]["Fn::Sub"].replace("${WatchRole.Arn}", "arn:aws:iam::123456789012:role/x")
        job = json.loads(text.replace("${AWS::AccountId}", ACCOUNT).replace("<aws.scheduler.execution-id>",
                                                                            "d32c5kddcf5bb8c3"))
        assert request_problems("sagemaker", "create_processing_job", job) == [], key


def test_the_dashboard_has_the_form_that_cloudwatch_reads(made):
    body = json.loads(of_kind(made["s3-direct-watch0"], "CloudWatch::Dashboard")["Dashboard"]["DashboardBody"])
    assert len(body["widgets"]) == 7
    for widget in body["widgets"]:
        assert widget["x"] + widget["width"] <= 24 and widget["properties"]["region"] == "us-east-1"


@pytest.mark.parametrize("change, said", [
    ({"name": "Intel"}, "name 'Intel' is not valid"), ({"name": "x" * 30}, "3 to 24"),
    ({"source": "codecommit"}, "source 'codecommit' is unknown"),
    ({"events": "polling"}, "choose one of direct, cloudtrail"), ({"email": "ann"}, "an e-mail address"),
    ({"watch": ("test",)}, "watch 'test' is unknown"),
    ({"log_days": 31}, "log_days 31 is unknown"), ({"source": "connection"}, "is no ARN of a connection"),
    (CONNECTION | {"repository": "intel-nb"}, "is no OWNER/NAME"),
    ({"region": "Frankfurt"}, "a region, as in us-east-1")])
def test_wrong_options_are_refused(change, said):
    with pytest.raises(InputError, match=re.escape(said)):
        checked_options(Options(**change))


# -- deploying and removing, on an emulator over HTTP

@pytest.fixture
def emulator(tmp_path):
    with emulated(tmp_path) as cloud:
        yield cloud
        assert cloud.problems == []


SMALL = {"Version": "2020-12-01", "Parameters": [], "Steps": []}
no_pause = lambda seconds: None


def test_a_deployment_is_shown_and_made_only_when_a_person_agrees(emulator):
    from intel_nb.aws.deploy import deploy_stack, find_stack
    said, asked = [], []
    assert deploy_stack(Options(), ask=lambda q: asked.append(q), say=said.append, pause=no_pause,
                        definition=SMALL) is False
    assert find_stack("intel-nb") is None and len(asked) == 1
    assert any("S3::Bucket" in line and "DataBucket" in line for line in said)
    assert re.fullmatch(r"Make these \d+ changes to the stack intel-nb\?", asked[0])


def test_a_stack_is_deployed_twice_and_removed(emulator):
    from intel_nb.aws.deploy import BUCKETS, deploy_stack, destroy_stack, find_stack, list_assets, list_buckets
    said = []
    assert deploy_stack(Options(), say=said.append, pause=no_pause, definition=SMALL)
    assert find_stack("intel-nb")["StackStatus"] == "CREATE_COMPLETE"
    assert [name.split("-")[2] for name in list_buckets(Options())] == [what for what in BUCKETS if what != "template"]
    assert client("s3").head_object(Bucket=f"intel-nb-annotations-{ACCOUNT}-us-east-1",
                                    Key="annotations/.nothing")["ContentLength"] == 0

    assert deploy_stack(Options(), say=said.append, pause=no_pause,
                        definition=SMALL), "a second time changes nothing that matters"

    client("s3").put_object(Bucket=f"intel-nb-data-{ACCOUNT}-us-east-1", Key="intel.zip", Body=b"12345")
    named = {one.name: one.content for one in list_assets(Options()) if one.kind == "bucket"}
    assert named[f"intel-nb-data-{ACCOUNT}-us-east-1"].startswith("1 versions of objects")
    said.clear()
    assert destroy_stack(Options(), say=said.append, pause=no_pause) is False, "nobody agreed"
    assert any("intel-nb-data-" in line and "1 versions" in line for line in said)
    assert find_stack("intel-nb") is not None
    assert destroy_stack(Options(), ask=lambda q: True, say=said.append, pause=no_pause)
    assert find_stack("intel-nb") is None and list_buckets(Options()) == []
    said.clear()
    assert destroy_stack(Options(), ask=lambda q: pytest.fail("there is nothing to ask"), say=said.append,
                         pause=no_pause)
    assert said == ["nothing is left of intel-nb"]


def test_a_bucket_that_is_kept_stays(emulator):
    from intel_nb.aws.deploy import deploy_stack, destroy_stack, list_buckets
    deploy_stack(Options(), say=lambda line: None, pause=no_pause, definition=SMALL)
    client("s3").put_object(Bucket=f"intel-nb-data-{ACCOUNT}-us-east-1", Key="intel.zip", Body=b"12345")
    said = []
    assert destroy_stack(Options(), ask=lambda q: True, say=said.append, pause=no_pause, keep=("data", "annotations"))
    assert [name.split("-")[2] for name in list_buckets(Options())] == ["data", "annotations"]
    assert any("kept" in line for line in said)


def test_a_removal_deletes_the_versions_of_the_registry_too(emulator):
    from intel_nb.aws.deploy import list_assets, list_packages
    client("sagemaker").create_model_package_group(ModelPackageGroupName="intel-nb")
    client("sagemaker").create_model_package(ModelPackageGroupName="intel-nb", ModelApprovalStatus="Approved")
    assert len(list_packages("intel-nb")) == 1
    assert [(one.kind, one.content) for one in list_assets(Options())
            if one.kind == "versions"] == [("versions", "1 in the registry")]


def test_requests_that_the_emulator_lacks_have_the_form_that_the_service_takes():
    from intel_nb.aws.client import request_problems
    from intel_nb.aws.executions import stop_execution_request
    arn = "arn:aws:sagemaker:us-east-1:123456789012:pipeline/intel-nb/execution/abcdefghijkl"
    assert request_problems("sagemaker", "stop_pipeline_execution", stop_execution_request(arn)) == []
    assert request_problems("sagemaker", "delete_model_package",
                         {"ModelPackageName": arn.replace("pipeline/intel-nb/execution/abcdefghijkl",
                                                          "model-package/intel-nb/1")}) == []
    assert request_problems("sagemaker", "delete_model_package_group", {"ModelPackageGroupName": "intel-nb"}) == []


def test_without_credentials_there_is_a_sentence(monkeypatch):
    from intel_nb.aws.deploy import deploy_stack, destroy_stack
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "none")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "none")
    for work in (deploy_stack, destroy_stack):
        with pytest.raises(InputError, match="no AWS credentials are here"):
            work(Options())


# -- the costs

def test_the_price_table_says_where_each_price_is_from():
    from intel_nb.aws.cost import price_table
    table = price_table()
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", table.dated)
    for price in table.prices.values():
        assert price.usd > 0 and price.known in ("page", "second hand") and price.source.startswith("aws.amazon.com/")


def test_the_price_table_travels_with_the_code():
    from intel_nb.aws.pipeline import code_files
    assert "intel_nb/aws/prices.json" in code_files()


def test_the_bill_adds_up_and_grows_with_use():
    from dataclasses import replace

    from intel_nb.aws.cost import Usage, make_bill
    one = make_bill()
    assert one.per_run == pytest.approx(sum(i.quantity * i.price.usd for i in one.run))
    assert make_bill(replace(Usage(), runs=16)).per_month - one.per_month == pytest.approx(8 * one.per_run)
    assert make_bill(replace(Usage(), cloudtrail=True)).per_month > one.per_month
    assert make_bill(replace(Usage(), spot=True)).per_run < one.per_run


def test_the_bill_counts_the_alarms_that_the_stack_has(made):
    from intel_nb.aws.cost import Usage
    assert Usage().alarms == len(of_kind(made["s3-direct-watch0"], "CloudWatch::Alarm"))
