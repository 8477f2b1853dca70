"""The stack: two linters on all its variants, its properties, and the order in which it is deployed and removed."""
import itertools
import json
import os
import re
import shutil
import subprocess

import pytest

from intel_nb.aws.base import TEMPLATE_BYTES
from intel_nb.aws.stack import (
    ACCOUNT,
    BUILD_SPECS,
    Options,
    base_template,
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
             "other-name": Options(name="scenes", log_days=365),
             "short-staging": Options(staging_hours=4, capture_days=7, watch=("staging",)),
             "images": Options(**{f"image_{target}": f"123456789012.dkr.ecr.us-east-1.amazonaws.com/intel-nb@sha256:"
                                  f"{digit * 64}" for target, digit in (("steps", "0"), ("serve", "1"))})}
ALL = VARIANTS | ELSEWHERE


@pytest.fixture(scope="session")
def made():
    "The templates of all variants."
    return {name: template(options) for name, options in ALL.items()}


@pytest.fixture(scope="session")
def base():
    "The templates of what stays, of all variants."
    return {name: base_template(options, ACCOUNT) for name, options in ALL.items()}


def of_kind(made: dict, kind: str) -> dict[str, dict]:
    return {name: one["Properties"] for name, one in made["Resources"].items() if one["Type"] == f"AWS::{kind}"}


def definition_text(made: dict) -> str:
    "The pipeline's definition in a template, with CloudFormation's references in it."
    pipeline = of_kind(made, "SageMaker::Pipeline")["Pipeline"]
    return pipeline["PipelineDefinition"]["PipelineDefinitionBody"]["Fn::Sub"]


SOME = ("s3-direct-mail-watch2", "connection-cloudtrail-watch0", "frankfurt", "images")  # between them every resource

@pytest.mark.parametrize("name", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in ALL])
def test_cfn_lint_finds_nothing(made, base, name):
    from cfnlint import ManualArgs, lint
    for one in (made[name], base[name]):
        found = lint(template_yaml(one),
                     config=ManualArgs(regions=[ALL[name].region], ignore_checks=[], include_checks=["I"]))
        assert [str(match) for match in found if match.rule.id[0] in "EW"] == []


def test_cfn_lint_would_find_something(made):
    from cfnlint import ManualArgs, lint
    needed = ("Pipeline", "PipelineRole", "JobRole", "RegistrarRole")
    broken = {"AWSTemplateFormatVersion": "2010-09-09", "Resources": {}}
    for name in needed:
        broken["Resources"][name] = json.loads(json.dumps(made["s3-direct-watch0"]["Resources"][name]))
    before = {str(match) for match in lint(json.dumps(broken), config=ManualArgs(regions=["us-east-1"]))}
    broken["Resources"]["Pipeline"]["Properties"].pop("RoleArn")
    found = lint(json.dumps(broken), config=ManualArgs(regions=["us-east-1"]))
    assert [(m.rule.id, "RoleArn" in m.message) for m in found if str(m) not in before] == [("E3003", True)]


@pytest.mark.parametrize("stack", ["made", "base"])
@pytest.mark.parametrize("name", ["s3-direct-mail-watch2", "connection-cloudtrail-mail-watch2"])
def test_checkov_finds_nothing_that_is_not_excepted(request, name, stack, tmp_path):
    "In an environment of its own (pipx install checkov): it pins old versions of what we use."
    checkov = os.environ.get("CHECKOV") or shutil.which("checkov")
    if not checkov:
        pytest.skip("checkov is not installed: pipx install checkov, or set CHECKOV to its path")
    one = request.getfixturevalue(stack)[name]
    (tmp_path / "stack.json").write_text(json.dumps(one))
    done = subprocess.run([checkov, "-f", "stack.json", "--framework", "cloudformation", "-o", "json", "--compact"],
                          cwd=tmp_path,
                          capture_output=True, text=True,
                          env=os.environ | {"BC_SKIP_MAPPING": "TRUE", "CHECKOV_RUN_SCA_PACKAGE_SCAN_V2": "false"})
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0 and report["summary"]["passed"] > 50
    assert [(one["check_id"], one["resource"]) for one in report["results"]["failed_checks"]] == []
    excepted = {(one["check_id"], one["resource"].rpartition(".")[2]) for one in report["results"]["skipped_checks"]}
    assert excepted == {(skip["id"], name) for name, resource in one["Resources"].items()
                        for skip in skips(resource)}, "an exception that excepts nothing"


def skips(one: dict) -> list[dict]:
    return one.get("Metadata", {}).get("checkov", {}).get("skip", [])


@pytest.mark.parametrize("name", ALL)
def test_exceptions_say_why(made, base, name):
    for one in (*made[name]["Resources"].values(), *base[name]["Resources"].values()):
        for skip in skips(one):
            assert re.fullmatch(r"CKV2?_AWS_\d+", skip["id"]) and len(skip["comment"]) > 30


@pytest.mark.parametrize("name", ALL)
def test_a_template_fits_into_one_call(made, base, name):
    for one in (made[name], base[name]):
        text = template_json(one)
        assert len(text.encode()) < TEMPLATE_BYTES and len(one["Resources"]) < 500
        assert json.loads(text) == one


def test_a_template_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match=f"CloudFormation takes {TEMPLATE_BYTES:,}"):
        template_json({"Description": "x" * TEMPLATE_BYTES})


@pytest.mark.parametrize("name", ALL)
def test_buckets_are_private_encrypted_versioned_and_tls_only(base, name):
    buckets, policies = of_kind(base[name], "S3::Bucket"), of_kind(base[name], "S3::BucketPolicy")
    assert set(buckets) == {"DataBucket", "AnnotationsBucket", "ArtifactBucket", "LogBucket", "CodeBucket"}
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


@pytest.mark.parametrize("name", ALL)
def test_a_bucket_that_was_kept_can_be_taken_in(base, name):
    "CloudFormation imports what exists by a name in plain text, and only what it would keep."
    buckets = [one for one in base[name]["Resources"].values() if one["Type"] == "AWS::S3::Bucket"]
    for one in buckets:
        assert re.fullmatch(rf"{ALL[name].name}-[a-z]+-{ACCOUNT}-{ALL[name].region}", one["Properties"]["BucketName"])
        assert one["DeletionPolicy"] == "RetainExceptOnCreate" and one["UpdateReplacePolicy"] == "Retain"
    assert base[name]["Resources"]["Repository"]["Properties"]["RepositoryName"] == ALL[name].name


@pytest.mark.parametrize("name", ALL)
def test_the_two_stacks_share_names_and_nothing_else(made, base, name):
    "No resource is in both, no bucket is in the second, and neither imports or refers to what is in the other."
    one, other = made[name]["Resources"], base[name]["Resources"]
    assert not set(one) & set(other) and "ImportValue" not in json.dumps(made[name])
    assert not of_kind(made[name], "S3::Bucket")
    for resources in (one, other):
        text = json.dumps(resources)
        named = set(re.findall(r'"Ref": "(\w+)"', text)) | set(re.findall(r'"Fn::GetAtt": \["(\w+)"', text))
        assert named <= set(resources)
    keys = ("Name", "QueueName", "BucketName", "LogGroupName", "TopicName", "AlarmName", "RepositoryName")
    physical = [(o["Type"], str(o["Properties"][key])) for o in (*one.values(), *other.values()) for key in keys
                if key in o["Properties"]]
    assert len(physical) > 40 and len(physical) == len(set(physical)), "two things of a kind have one name"


def test_no_lifecycle_rule_deletes_what_the_registry_is_made_of(base):
    for name in ALL:
        rules = of_kind(base[name], "S3::Bucket")["ArtifactBucket"]["LifecycleConfiguration"]["Rules"]
        expiring = {rule["Prefix"]: rule["ExpirationInDays"] for rule in rules if "ExpirationInDays" in rule}
        assert expiring["captures/"] == ALL[name].capture_days and len(expiring) == 2
        for key in ("pipeline/runs/x", "registry/1/model.tar.gz", "state/staging.json", "drift/x/state.npz"):
            assert not key.startswith(tuple(expiring))


@pytest.mark.parametrize("name", VARIANTS)
def test_rules_have_one_target_and_a_queue_for_what_fails(made, name):
    found = of_kind(made[name], "Events::Rule")
    assert len([key for key in found if key.startswith("Rule")]) == (5 if VARIANTS[name].source == "s3" else 3)
    for rule in found.values():
        (target,) = rule["Targets"]
        assert target["DeadLetterConfig"] and target["RetryPolicy"]
    policy = made[name]["Resources"]["UndeliveredPolicy"]["Properties"]["PolicyDocument"]
    allowed = policy["Statement"][0]["Condition"]["ArnEquals"]["aws:SourceArn"]
    assert [one["Fn::GetAtt"][0] for one in allowed] == list(found)


@pytest.mark.parametrize("name", VARIANTS)
def test_rules_match_real_events_with_the_names_that_the_other_stack_gives(made, base, name):
    "The pattern in the template, its references resolved, matches an upload to the bucket in the other template."
    from event_delivery import resolved
    from event_patterns import matches
    from test_rules import created, logged
    bucket = of_kind(base[name], "S3::Bucket")["DataBucket"]["BucketName"]
    pattern = resolved(of_kind(made[name], "Events::Rule")["RuleDataUploaded"]["EventPattern"])
    upload = created(bucket, "intel.zip") if VARIANTS[name].events == "direct" else logged("PutObject", bucket,
                                                                                           "intel.zip")
    assert matches(pattern, upload)
    assert not matches(pattern, json.loads(json.dumps(upload).replace("intel.zip", "other.zip")))


@pytest.mark.parametrize("name", VARIANTS)
def test_what_a_pipe_hands_to_the_pipeline_is_one_of_its_parameters(made, name):
    body = definition_text(made[name])
    declared = {p["Name"]: p for p in json.loads(body.replace("${!", "${"))["Parameters"]}
    pipes = of_kind(made[name], "Pipes::Pipe")
    assert len(pipes) == 2
    for pipe in pipes.values():
        (one,) = pipe["TargetParameters"]["SageMakerPipelineParameters"]["PipelineParameterList"]
        assert declared[one["Name"]]["Type"] == "String"
        assert pipe["Target"]["Fn::Sub"].endswith(f":pipeline/{VARIANTS[name].name}")


@pytest.mark.parametrize("name", VARIANTS)
def test_uploads_are_noticed_in_the_way_that_was_chosen(made, base, name):
    options, buckets = VARIANTS[name], of_kind(base[name], "S3::Bucket")
    told = {key for key, one in buckets.items() if "NotificationConfiguration" in one}
    watched = {"DataBucket", "AnnotationsBucket", "CodeBucket"}
    assert told == (watched if options.events == "direct" else set())
    trails = of_kind(made[name], "CloudTrail::Trail")
    assert len(trails) == (options.events == "cloudtrail")
    for trail in trails.values():
        values = trail["EventSelectors"][0]["DataResources"][0]["Values"]
        named = {one["Fn::Sub"].replace("${AWS::AccountId}", ACCOUNT).rpartition(":")[2] for one in values}
        assert named == {f"{buckets[key]['BucketName']}/" for key in watched}
        logs = buckets["LogBucket"]["BucketName"]
        assert trail["S3BucketName"]["Fn::Sub"].replace("${AWS::AccountId}", ACCOUNT) == logs


@pytest.mark.parametrize("name", ALL)
def test_the_definition_in_the_template_is_the_checked_one(made, name):
    from intel_nb.aws.pipeline import pipeline_problems
    body = definition_text(made[name])
    assert ACCOUNT not in body
    places = {"${JobRole.Arn}": "arn:aws:iam::123456789012:role/x", "${AWS::AccountId}": ACCOUNT,
              "${RegistrarRole.Arn}": "arn:aws:iam::123456789012:role/y"}
    for place, value in places.items():
        body = body.replace(place, value)
    assert "${AWS" not in body and pipeline_problems(json.loads(body.replace("${!", "${"))) == []


@pytest.mark.parametrize("name", ALL)
def test_no_account_is_written_anywhere(made, name):
    given = {ALL[name].connection, ALL[name].image_steps, ALL[name].image_serve}
    text = json.dumps(made[name])
    for one in given - {""}:
        text = text.replace(one, "")
    assert set(re.findall(r"(?<!\d)\d{12}(?!\d)", text)) <= {"763104351884"}, "Amazon's account for images alone"


def deploy_pipeline(made: dict) -> dict:
    return of_kind(made["s3-direct-watch0"], "CodePipeline::Pipeline")["ModeldeployPipeline"]


def variables_of(action: dict) -> dict[str, str]:
    return {v["name"]: v["value"] for v in json.loads(action["Configuration"].get("EnvironmentVariables", "[]"))}


def test_modeldeploy_goes_to_production_only_past_the_tests_and_a_person(made):
    stages = deploy_pipeline(made)["Stages"]
    assert [stage["Name"] for stage in stages] == ["Source", "Choose", "Staging", "Approval", "Production"]
    assert [a["RunOrder"] for a in stages[2]["Actions"]] == [1, 2, 3]
    steps = [[variables_of(a)["STEP"] for a in stages[i]["Actions"]] for i in (1, 2, 4)]
    assert steps == [["choose"], ["deploy", "drift", "staging"], ["promote", "confirm"]]
    assert stages[3]["Actions"][0]["ActionTypeId"]["Category"] == "Approval"
    assert "ROLLBACK" not in json.dumps(stages), "it cannot cross a pipeline that was changed"


def test_all_steps_after_the_choice_use_what_was_chosen(made):
    pipeline = deploy_pipeline(made)
    choose, *others = [a for s in pipeline["Stages"] for a in s["Actions"] if a["ActionTypeId"]["Category"] == "Build"]
    assert variables_of(choose) == {"STEP": "choose", "VERSION": "#{variables.VERSION}"}
    assert choose["Namespace"] == "Choose" and {variables_of(a)["VERSION"] for a in others} == {"#{Choose.VERSION}"}
    assert pipeline["PipelineType"] == "V2" and [v["Name"] for v in pipeline["Variables"]] == ["VERSION"]
    assert pipeline["Variables"][0]["DefaultValue"] == "newest"
    assert BUILD_SPECS["modeldeploy"]["env"]["exported-variables"] == ["VERSION"]


def test_only_steps_with_a_notebook_promise_an_artifact(made):
    actions = [a for s in deploy_pipeline(made)["Stages"] for a in s["Actions"] if variables_of(a)]
    assert {variables_of(a)["STEP"] for a in actions if "OutputArtifacts" not in a} == {"choose", "confirm"}


# CodePipeline's user guide, "How do stage conditions work?" and "VariableCheck": an entry condition is met when all its
# rules pass; when it is not, its result engages. SKIP passes the stage by, and only rules of LambdaInvoke and
# VariableCheck may be in such a condition, in pipelines of type V2. A stage has one entry condition, with five rules.
OPERATORS = {"EQ": lambda a, b: a == b, "NE": lambda a, b: a != b, "CONTAINS": lambda a, b: b in a,
             "MATCHES": lambda a, b: bool(re.fullmatch(b, a))}


def stages_that_run(pipeline: dict, variables: dict[str, str]) -> list[str]:
    "Return the names of the stages that an execution enters when the variables have these values."
    assert pipeline["PipelineType"] == "V2"
    entered = []
    for stage in pipeline["Stages"]:
        (condition,) = stage.get("BeforeEntry", {"Conditions": [{"Rules": []}]})["Conditions"]
        assert len(condition["Rules"]) <= 5
        providers = {rule["RuleTypeId"]["Provider"] for rule in condition["Rules"]}
        assert condition.get("Result") != "SKIP" or providers <= {"LambdaInvoke", "VariableCheck"}
        if all(rule_passes(rule, variables) for rule in condition["Rules"]):
            entered.append(stage["Name"])
        else:
            assert condition["Result"] == "SKIP", "the execution would be red"
    return entered


def rule_passes(rule: dict, variables: dict[str, str]) -> bool:
    given = rule["Configuration"]
    assert rule["RuleTypeId"] == {"Category": "Rule", "Owner": "AWS", "Provider": "VariableCheck", "Version": "1"}
    assert set(given) == {"Variable", "Operator", "Value"}
    return OPERATORS[given["Operator"]](variables[given["Variable"]], given["Value"])


@pytest.mark.parametrize("chosen, entered", [
    ("none", ["Source", "Choose"]), ("3", ["Source", "Choose", "Staging", "Approval", "Production"]),
    ("12", ["Source", "Choose", "Staging", "Approval", "Production"])])
def test_without_an_approved_version_nothing_is_deployed_and_nothing_is_red(made, chosen, entered):
    assert stages_that_run(deploy_pipeline(made), {"#{Choose.VERSION}": chosen}) == entered


def test_a_variable_is_used_after_the_stage_that_makes_it(made):
    seen: set[str] = {"variables"}
    for stage in deploy_pipeline(made)["Stages"]:
        assert set(re.findall(r"#\{(\w+)\.", json.dumps(stage))) <= seen, stage["Name"]
        seen |= {a["Namespace"] for a in stage["Actions"] if "Namespace" in a}


def test_the_steps_of_the_builds_are_those_of_the_module(made):
    from intel_nb.aws.stages import NOTEBOOKS
    steps = {variables_of(a)["STEP"] for s in deploy_pipeline(made)["Stages"] for a in s["Actions"] if variables_of(a)}
    assert steps == {*NOTEBOOKS, "choose", "confirm"}
    assert all("python -m intel_nb.aws.stages" in json.dumps(spec) for spec in BUILD_SPECS.values())


@pytest.mark.parametrize("name", ALL)
def test_the_settings_are_json_that_our_code_reads(made, name):
    (one,) = of_kind(made[name], "SSM::Parameter").values()
    assert one["Name"] == f"/{ALL[name].name}/settings" and one["Type"] == "String"
    values = json.loads(one["Value"]["Fn::Sub"].replace("${AWS::AccountId}", ACCOUNT))
    assert list(values) == ["artifacts", "role", "image", "instance", "scheduler", "options"]
    assert values["role"] == "${ModelRole.Arn}"
    assert values["artifacts"] == f"s3://{ALL[name].name}-artifacts-{ACCOUNT}-{ALL[name].region}"
    assert values["image"] == ALL[name].image_serve or values["image"].endswith(f"/{ALL[name].name}:serve")
    assert "Tags" not in of_kind(made[name], "SageMaker::ModelPackageGroup")["Group"]


def test_images_are_named_by_digest_everywhere(made):
    text = json.dumps(made["images"])
    assert ":steps" not in text and ":serve" not in text
    assert text.count("@sha256:") >= 5 and "repository/intel-nb@" not in text


def test_the_schedule_that_ends_staging_has_a_form_that_the_service_takes():
    from datetime import datetime

    from intel_nb.aws.client import request_problems
    from intel_nb.aws.permissions import RESOURCES
    from intel_nb.aws.stack import staging_end_request
    role = "arn:aws:iam::123456789012:role/x"
    for hours in (1, 720):
        request = staging_end_request(Options(staging_hours=hours), datetime(2026, 1, 31, 22), role)
        for operation in ("create_schedule", "update_schedule"):
            assert request_problems("scheduler", operation, request) == []
        assert json.loads(request["Target"]["Input"]) == {"EndpointName": "intel-nb-staging"}
        assert RESOURCES["staging schedule"].replace("{name}", "intel-nb").endswith(f"/{request['Name']}")


def test_a_push_to_a_repository_starts_the_pipelines_themselves(made):
    from intel_nb.aws.rules import PUSH_PATHS
    for key, one in of_kind(made["connection-direct-watch0"], "CodePipeline::Pipeline").items():
        (trigger,) = one["Triggers"]
        (push,) = trigger["GitConfiguration"]["Push"]
        assert push["Branches"] == {"Includes": ["main"]}
        assert push["FilePaths"]["Includes"] == list(PUSH_PATHS[one["Name"].rpartition("-")[2]]), key


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
    assert {one["RetentionInDays"] for one in groups.values()} == {ALL[name].log_days} and len(groups) == 5


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
    ({"staging_hours": -1}, "staging_hours -1 is out of range; it takes 0 to 720"),
    ({"staging_hours": 721}, "it takes 0 to 720"), ({"capture_days": 0}, "capture_days 0 is out of range"),
    ({"region": "Frankfurt"}, "a region, as in us-east-1")])
def test_wrong_options_are_refused(change, said):
    with pytest.raises(InputError, match=re.escape(said)):
        checked_options(Options(**change))


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


def test_the_bill_counts_what_an_update_a_short_staging_and_images_cost():
    from dataclasses import replace

    from intel_nb.aws.cost import HOURS, Usage, deployment_items, make_bill, price_table, staging_hours
    usage = Usage()
    fleet = next(item for item in deployment_items(usage) if "second fleet" in item.reason)
    assert fleet.quantity == usage.production_instances * usage.fleet_minutes / 60
    short = replace(usage, staging_hours=4)
    assert staging_hours(usage) == HOURS and staging_hours(short) == 5 * usage.deployments
    assert staging_hours(replace(usage, staging_hours=720)) == HOURS, "a month has no more"
    saved = (HOURS - 5 * usage.deployments) * price_table().price(usage.instance_serve).usd
    assert make_bill(usage).per_month - make_bill(short).per_month == pytest.approx(saved)
    more = replace(usage, image_gb=usage.image_gb + 10, images=usage.images + 1)
    extra = 10 * price_table().price("ecr storage").usd + usage.image_minutes * price_table().price("build minute").usd
    assert make_bill(more).per_month - make_bill(usage).per_month == pytest.approx(extra)


def test_the_bill_counts_the_alarms_that_the_stack_has(made):
    from intel_nb.aws.cost import Usage
    assert Usage().alarms == len(of_kind(made["s3-direct-watch0"], "CloudWatch::Alarm"))
