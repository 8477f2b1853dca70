"""Least privilege: a role may do what its code does, and it has a wildcard only where a service takes nothing finer."""
import ast
import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from permission_reader import ENTRY_POINTS, PACKAGE, Call, actions_of, calls_from, calls_in, derived, granted

from intel_nb.aws import permissions
from intel_nb.aws.client import service_model
from intel_nb.aws.permissions import BASE_ROLES, IMPLIED, ROLES, UNSCOPED, Grant, policy, with_implied

NAMES = {"name": "intel-nb", "short": "intel-nb-model",
         "connection": "arn:aws:codeconnections:us-east-1:123456789012:connection/x",
         "images": ["763104351884.dkr.ecr.us-east-1.amazonaws.com/pytorch:2.13"]}


@cache
def linter_table() -> dict:
    "The linter's own table of each service's actions, and of the resources that each can be narrowed to."
    import cfnlint
    return json.loads((Path(cfnlint.__file__).parent / "data" / "AdditionalSpecs" / "Policies.json").read_text())


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_the_table_of_grants_equals_what_the_code_calls(name):
    missing, unused = derived(name) - granted(ROLES[name]), granted(ROLES[name]) - derived(name)
    assert not missing, f"{name} lacks {sorted(missing)}"
    assert not unused, f"{name} does not need {sorted(unused)}"


def test_a_role_without_code_has_only_what_services_do():
    assert {name: granted(role) for name, role in ROLES.items() if name not in ENTRY_POINTS and granted(role)} == {}
    assert set(ENTRY_POINTS) < set(ROLES)


def test_a_missing_and_a_needless_grant_are_found():
    "The test above would fail: an action that is taken away is missing, one that is added is not needed."
    role = ROLES["Deploy"]
    poorer = replace(role, grants=tuple(g for g in role.grants if "sagemaker:CreateModel" not in g.actions))
    assert derived("Deploy") - granted(poorer) == {"sagemaker:CreateModel"}
    richer = replace(role, grants=(*role.grants, Grant(("sagemaker:DeleteModel",), ("models",))))
    assert granted(richer) - derived("Deploy") == {"sagemaker:DeleteModel"}


def test_calls_are_read_from_their_form():
    source = 'client("s3").get_object(Key="x")\nlist(paginate(client("sagemaker").list_models, "Models"))'
    assert calls_in(ast.parse(source)) == {Call("s3", "get_object"), Call("sagemaker", "list_models")}


def test_a_call_becomes_the_actions_that_it_needs():
    assert actions_of(Call("sagemaker-runtime", "invoke_endpoint")) == ("sagemaker:InvokeEndpoint",)
    assert actions_of(Call("s3", "upload_file")) == ("s3:AbortMultipartUpload", "s3:PutObject")
    with pytest.raises(ValueError, match="sagemaker has no make_model"):
        actions_of(Call("sagemaker", "make_model"))


def test_every_call_in_the_modules_is_one_that_the_service_has():
    "Each is written so that it can be read, and names an operation of the service's own model."
    found = set()
    for path in sorted((PACKAGE / "aws").glob("*.py")):
        found |= calls_in(ast.parse(path.read_text()))
    assert len(found) > 40
    for call in found - {Call("sts", "get_caller_identity")}:
        assert actions_of(call)


def test_no_call_hides_from_the_reader():
    "A client that is kept under a name, or made for a service that is computed, could make calls that nobody counts."
    for path in sorted((PACKAGE / "aws").glob("*.py")):
        if path.name == "client.py":
            continue
        nodes = list(ast.walk(ast.parse(path.read_text())))
        clients = [n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
                   and n.func.id == "client"]
        read = [n.value for n in nodes if isinstance(n, ast.Attribute)]
        assert all(isinstance(n.args[0], ast.Constant) for n in clients), path.name
        assert [n.lineno for n in clients if n not in read] == [], path.name


def test_calls_are_followed_through_functions_classes_and_imports():
    found = {f"{c.service}.{c.method}" for c in calls_from(["aws.hosting:SageMakerEndpoints.deploy"])}
    assert {"sagemaker.create_model", "sagemaker.update_endpoint", "cloudwatch.put_metric_alarm",
            "application-autoscaling.put_scaling_policy", "ssm.get_parameter", "s3.put_object",
            "sagemaker.describe_model_package"} <= found
    assert not {"sagemaker.delete_model", "cloudwatch.delete_alarms"} & found
    assert calls_from(["aws.rules:event_rules"]) == set()
    with pytest.raises(LookupError, match="has no no_such"):
        calls_from(["aws.rules:no_such"])


# What the documentation and reports say that a role needs beyond its own calls: the action, a part of its resource, and
# for a role that is given away the service that may get it. Written from the sources, not from the table.
SAGEMAKER, SCHEDULER = "sagemaker.amazonaws.com", "scheduler.amazonaws.com"
DOCUMENTED = {
    "Deploy": [
        ("sagemaker:DescribeEndpoint", ":endpoint/"), ("sagemaker:UpdateEndpointWeightsAndCapacities", ":endpoint/"),
        ("sagemaker:DescribeEndpointConfig", '"*"'), ("cloudwatch:PutMetricAlarm", "alarm:TargetTracking-"),
        ("cloudwatch:DescribeAlarms", "alarm:TargetTracking-"), ("cloudwatch:DeleteAlarms", "alarm:TargetTracking-"),
        ("cloudwatch:DescribeAlarms", "alarm:intel-nb-"),
        ("application-autoscaling:DeregisterScalableTarget", "scalable-target/"),
        ("iam:CreateServiceLinkedRole", "AWSServiceRoleForApplicationAutoScaling_SageMakerEndpoint"),
        ("sagemaker:CreateEndpoint", ":endpoint-config/"), ("sagemaker:UpdateEndpoint", ":endpoint-config/"),
        ("iam:PassRole", "${ModelRole.Arn}", SAGEMAKER), ("iam:PassRole", "${SchedulerRole.Arn}", SCHEDULER)],
    "Build": [("iam:PassRole", "${PipelineRole.Arn}", SAGEMAKER)],
    "Pipeline": [("iam:PassRole", "${JobRole.Arn}", SAGEMAKER), ("iam:PassRole", "${RegistrarRole.Arn}", SAGEMAKER)],
    "Scheduler": [("iam:PassRole", "${WatchRole.Arn}", SAGEMAKER), ("sqs:SendMessage", "${Undelivered.Arn}")],
    "Model": [("cloudwatch:DescribeAlarms", "alarm:intel-nb-")],
}


def lacking(rows=IMPLIED, names=DOCUMENTED, rights=None) -> set[tuple]:
    "Return what roles that are made with `rows` may not do of what is documented."
    found = set()
    for name in names:
        role = with_implied(getattr(permissions, name.upper()), rows)
        statements = policy(role.grants, **NAMES)["Statement"]
        allowed = [(action, json.dumps(arn), str(s.get("Condition", ""))) for s in statements
                   for action in s["Action"] for arn in s["Resource"]]
        for action, resource, *service in DOCUMENTED[name]:
            if not any(action == a and resource in arn and all(one in condition for one in service)
                       for a, arn, condition in allowed):
                found.add((name, action, resource))
    return found


def test_roles_have_what_services_check_on_their_behalf():
    assert lacking() == set()


@pytest.mark.parametrize("row", IMPLIED, ids=lambda row: f"{row.call}-{row.actions[0]}-{row.resources[0]}")
def test_no_row_of_implied_rights_may_go(row):
    "Without the row, and another call's row for the same right, roles lack just what their own calls do not need."
    rest = [other for other in IMPLIED if (other.actions, other.resources) != (row.actions, row.resources)]
    beyond = set()
    for role in (getattr(permissions, name.upper()) for name in DOCUMENTED):
        own = {(a, r) for grant in role.grants for a in grant.actions for r in grant.resources}
        if any(action == row.call and row.on in ("", resource) for action, resource in own):
            beyond |= {a for a in row.actions for r in row.resources if (a, r) not in own}
    assert {action for _, action, _ in lacking(rest)} == beyond
    assert beyond, "our own calls need it anyway"


@pytest.mark.parametrize("row", IMPLIED, ids=lambda row: f"{row.call}-{row.actions[0]}-{row.resources[0]}")
def test_each_row_of_implied_rights_has_a_source_and_reaches_a_role(row):
    assert len(row.source) > 10
    assert any(set(row.actions) <= set(grant.actions) and set(row.resources) <= set(grant.resources)
               and dict(grant.condition) == dict(row.condition) and row.source in grant.reason
               for role in ROLES.values() for grant in role.grants)


@pytest.mark.parametrize("name", ROLES)
def test_no_wildcard_action_and_no_wildcard_resource_but_those_listed(name):
    for grant in ROLES[name].grants:
        statement = policy([grant], **NAMES)["Statement"][0]
        assert not [a for a in statement["Action"] if "*" in a]
        assert statement["Resource"]
        if "*" in statement["Resource"]:
            assert statement["Resource"] == ["*"] and set(grant.actions) <= set(UNSCOPED)


@pytest.mark.parametrize("action", UNSCOPED)
def test_the_listed_actions_really_cannot_be_narrowed(action):
    service, _, name = action.partition(":")
    resources = linter_table()[service]["Actions"][name.lower()].get("Resources", [])
    # PutMetricData has no resource of this account's metrics; a condition on the namespace stands in for it.
    implied = {a for row in IMPLIED if row.resources == ("any",) for a in row.actions}
    # A look for alarms by a prefix is decided on all alarms (aws-samples/amazon-cloudwatch-auto-alarms#1).
    assert resources == [] or action in ("cloudwatch:PutMetricData", "cloudwatch:DescribeAlarms") or action in implied


def test_metrics_are_narrowed_by_their_namespace():
    grants = [g for role in ROLES.values() for g in role.grants if "cloudwatch:PutMetricData" in g.actions]
    assert grants and all("cloudwatch:namespace" in str(g.condition) for g in grants)


@pytest.mark.parametrize("name", ROLES)
def test_every_action_exists_and_takes_the_resources_it_is_granted_on(name):
    "By the linter's table: a misspelt action grants nothing, and so does one on a resource that it does not take."
    for grant in ROLES[name].grants:
        for arn in policy([grant], **NAMES)["Statement"][0]["Resource"]:
            text = arn["Fn::Sub"] if isinstance(arn, dict) else arn
            if text == "*" or re.fullmatch(r"\$\{\w+(\.Arn)?\}", text):
                continue
            assert [a for a in grant.actions if takes(a, text)], f"{name}: none of {grant.actions} takes {text}"
        for action in grant.actions:
            service, _, operation = action.partition(":")
            assert operation.lower() in linter_table()[service]["Actions"], action


def takes(action: str, arn: str) -> bool:
    "Return whether one of the kinds of resource that `action` takes has an ARN of this form."
    service, _, name = action.partition(":")
    table, plain = linter_table()[service], re.sub(r"\$\{AWS::\w+\}", "x", arn)
    for kind in table["Actions"].get(name.lower(), {}).get("Resources", []):
        for form in table["Resources"].get(kind.lower(), {}).get("ARNFormats", []):
            if re.fullmatch(ARN_FORMS.get((service, kind), re.sub(r"\$\{\w+\}", "[^:]*", form)), plain):
                return True
    return False


ARN_FORMS = {("s3", "bucket"): "arn:x:s3:::[^/]+", ("s3", "object"): "arn:x:s3:::[^/]+/.+"}  # alike in the table


@pytest.mark.parametrize("action, arn, taken", [
    ("s3:GetObject", "arn:x:s3:::b/state/*", True), ("s3:GetObject", "arn:x:s3:::b", False),
    ("s3:ListBucket", "arn:x:s3:::b", True), ("s3:ListBucket", "arn:x:s3:::b/*", False),
    ("sagemaker:DeleteEndpoint", "arn:aws:sagemaker:x:x:endpoint/intel-nb-staging", True),
    ("sagemaker:DeleteEndpoint", "arn:aws:sagemaker:x:x:endpoint-config/x", False),
    ("scheduler:CreateSchedule", "arn:aws:scheduler:x:x:schedule/default/x", True)])
def test_the_check_of_resources_tells_them_apart(action, arn, taken):
    assert takes(action, arn) is taken


@pytest.mark.parametrize("name", ROLES)
def test_a_role_is_passed_on_only_to_one_service(name):
    for grant in ROLES[name].grants:
        if "iam:PassRole" in grant.actions:
            (service,) = grant.condition.values()
            assert list(service) == ["iam:PassedToService"]
            assert service["iam:PassedToService"] == (
                SCHEDULER if grant.resources == ("scheduler role",) else SAGEMAKER)
            assert all(resource.endswith(" role") for resource in grant.resources)


# Who may write and read each prefix of the artifacts bucket, from the plan.
WRITERS = {"pipeline files": {"Job"}, "registry files": {"Registrar"}, "captures": {"Model"},
           "drift files": {"Watch"}, "state files": {"Deploy", "Operator"},
           "codepipeline files": {"Build", "Deploy", "CodePipeline"}}
READERS = {"pipeline files": {"Pipeline", "Job", "Registrar", "Deploy"},
           "registry files": {"Pipeline", "Job", "Registrar", "Model", "Watch", "Build", "Deploy", "Operator"},
           "captures": {"Watch"}, "drift files": {"Watch"},
           "state files": {"Job", "Registrar", "Watch", "Build", "Deploy", "Operator"},
           "codepipeline files": {"Build", "Deploy", "CodePipeline", "Image"}}


@pytest.mark.parametrize("action, expected", [("s3:PutObject", WRITERS), ("s3:GetObject", READERS)])
def test_each_prefix_is_written_and_read_by_those_who_need_it_alone(action, expected):
    found = {prefix: {name for name, role in ROLES.items() for grant in role.grants
                      if action in grant.actions and prefix in grant.resources} for prefix in expected}
    assert found == expected
    prefixes = [permissions.RESOURCES[prefix] for prefix in expected]
    assert len(prefixes) == len(set(prefixes)) and all(arn.endswith("*") for arn in prefixes)


def test_nobody_may_use_the_whole_bucket_of_artifacts():
    for role in ROLES.values():
        for statement in policy(role.grants, **NAMES)["Statement"]:
            if any(action.startswith("s3:") and "Object" in action for action in statement["Action"]):
                for arn in statement["Resource"]:
                    assert not re.search(r"-artifacts-[^/]*(/\*)?$", arn["Fn::Sub"])


LONGEST = {"name": "a" * 24, "short": ("a" * 24 + "-model")[:20],
           "connection": "arn:aws:codeconnections:ap-southeast-1:123456789012:connection/" + "0" * 36,
           "images": [f"123456789012.dkr.ecr.ap-southeast-1.amazonaws.com/{'a' * 24}@sha256:{'0' * 64}"]}
RESOLVED = {"${AWS::Partition}": "aws-us-gov", "${AWS::Region}": "ap-southeast-1", "${AWS::AccountId}": "123456789012"}


@pytest.mark.parametrize("name", ROLES)
def test_policies_are_below_the_limits_of_iam(name):
    "10,240 characters without white space for all inline policies of a role, and 6,144 for a managed policy."
    text = json.dumps(policy((*ROLES[name].grants, *permissions.FROM_S3), **LONGEST), separators=(",", ":"))
    for place, value in RESOLVED.items():
        text = text.replace(place, value)
    text = re.sub(r'\{"Fn::Sub":("[^"]*")\}', r"\1", text)
    text = re.sub(r"\$\{\w+(\.Arn)?\}", "arn:aws-us-gov:iam::123456789012:role/" + "a" * 64, text)
    assert "${" not in text
    assert len(text) < (10_240 if ROLES[name].principal else 6_144)


def test_the_image_is_pushed_by_its_build_alone():
    pushers = {name for name, role in ROLES.items() if any("ecr:PutImage" in g.actions for g in role.grants)}
    assert pushers == set(BASE_ROLES) == {"Image"}
    services = {a.partition(":")[0] for g in ROLES["Image"].grants for a in g.actions}
    assert services == {"ecr", "logs", "s3"}
    assert [g.resources for g in ROLES["Image"].grants if "ecr:PutImage" in g.actions] == [("repository",)]


def test_only_the_builds_deploy_people_go_back_and_no_role_deletes_data():
    actions = {name: {a for g in role.grants for a in g.actions} for name, role in ROLES.items()}
    assert {name for name, found in actions.items() if "sagemaker:UpdateEndpoint" in found} == {"Deploy", "Operator"}
    assert {name for name, found in actions.items() if "sagemaker:CreateModel" in found} == {"Deploy"}
    assert {name for name, found in actions.items() if "sagemaker:CreateModelPackage" in found} == {"Pipeline"}
    assert not [name for name, found in actions.items()
                if found & {"s3:DeleteObject", "s3:DeleteObjectVersion", "s3:DeleteBucket"}]


def test_the_services_are_known_to_the_models_that_are_shipped():
    assert service_model("sagemaker").operation_names
