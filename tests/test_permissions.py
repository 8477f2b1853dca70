"""Least privilege: a role may do what its code does, and it has a wildcard only where a service takes nothing finer."""
import ast
import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from permission_reader import ENTRY_POINTS, PACKAGE, Call, actions_of, calls_from, calls_in, derived, granted

from intel_nb.aws.client import service_model
from intel_nb.aws.permissions import DEPLOY, IMPLIED, ROLES, UNSCOPED, Grant, policy, with_implied

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
    for call in found:
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


# What the documentation and reports say that the caller of a deployment needs beyond its own calls.
DOCUMENTED = {
    "sagemaker:DescribeEndpoint": "endpoint/", "sagemaker:UpdateEndpointWeightsAndCapacities": "endpoint/",
    "sagemaker:DescribeEndpointConfig": "*", "cloudwatch:PutMetricAlarm": "alarm:TargetTracking-",
    "cloudwatch:DescribeAlarms": "alarm:TargetTracking-", "cloudwatch:DeleteAlarms": "alarm:TargetTracking-",
    "application-autoscaling:DeregisterScalableTarget": "scalable-target/",
    "sagemaker:UpdateEndpoint": "endpoint-config/",
}


def lacking(role) -> set[str]:
    "Return the documented actions that `role` may not take on their resource."
    statements = policy(role.grants, **NAMES)["Statement"]
    allowed = {(action, json.dumps(arn)) for s in statements for action in s["Action"] for arn in s["Resource"]}
    return {action for action, resource in DOCUMENTED.items()
            if not any(action == a and resource in arn for a, arn in allowed)}


def test_a_deployment_has_what_services_check_on_its_behalf():
    assert lacking(ROLES["Deploy"]) == set()


def test_the_endpoints_own_role_reads_the_alarms_that_roll_an_update_back():
    "SageMaker's developer guide asks it of the execution role, beside whoever calls UpdateEndpoint."
    reading = [g for g in ROLES["Model"].grants if "cloudwatch:DescribeAlarms" in g.actions]
    assert [(g.actions, g.resources) for g in reading] == [(("cloudwatch:DescribeAlarms",), ("alarms",))]
    statement, = policy(reading, **NAMES)["Statement"]
    assert statement["Resource"][0]["Fn::Sub"].endswith(":alarm:intel-nb-*") and "developer guide" in reading[0].reason


def test_the_state_of_a_stage_is_written_by_whoever_deploys_and_by_nobody_else():
    writers = {name for name, role in ROLES.items() for grant in role.grants
               if "s3:PutObject" in grant.actions and "state files" in grant.resources}
    assert writers == {"Deploy"}


@pytest.mark.parametrize("row", IMPLIED, ids=lambda row: f"{row.call}-{row.actions[0]}")
def test_no_row_of_implied_rights_may_go(row):
    poorer = with_implied(DEPLOY, [other for other in IMPLIED if other is not row])
    explicit = {(a, r) for grant in DEPLOY.grants for a in grant.actions for r in grant.resources}
    beyond = {a for a in row.actions for r in row.resources if (a, r) not in explicit}
    assert lacking(poorer) == beyond, "what our own calls need is granted twice, and stays"


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
    assert resources == [] or action == "cloudwatch:PutMetricData" or action in implied


def test_metrics_are_narrowed_by_their_namespace():
    grants = [g for role in ROLES.values() for g in role.grants if "cloudwatch:PutMetricData" in g.actions]
    assert grants and all("cloudwatch:namespace" in str(g.condition) for g in grants)


@pytest.mark.parametrize("name", ROLES)
def test_every_action_exists_and_takes_the_resources_it_is_granted_on(name):
    "By the linter's table: a misspelt action grants nothing, and so does one on a resource that it does not take."
    for grant in ROLES[name].grants:
        for arn in policy([grant], **NAMES)["Statement"][0]["Resource"]:
            text = arn["Fn::Sub"] if isinstance(arn, dict) else arn
            if text == "*" or re.fullmatch(r"\$\{\w+(\.Arn)?\}(/.*)?", text):
                continue
            assert [a for a in grant.actions if takes(a, text)], f"{name}: none of {grant.actions} takes {text}"
        for action in grant.actions:
            service, _, operation = action.partition(":")
            assert operation.lower() in linter_table()[service]["Actions"], action


def takes(action: str, arn: str) -> bool:
    "Return whether one of the kinds of resource that `action` takes has an ARN of this form."
    service, _, name = action.partition(":")
    table, plain = linter_table()[service], re.sub(r"\$\{(AWS::\w+|\w+)\}", "x", arn)
    for kind in table["Actions"].get(name.lower(), {}).get("Resources", []):
        for form in table["Resources"].get(kind.lower(), {}).get("ARNFormats", []):
            start = re.sub(r"\$\{\w+\}", "x", form).split(".*")[0]
            same_service = plain.split(":")[2] == start.split(":")[2]
            if same_service and plain.split(":", 5)[5].startswith(start.split(":", 5)[5][:5]):
                return True
    return False


@pytest.mark.parametrize("name", ROLES)
def test_a_role_is_passed_on_only_to_sagemaker(name):
    for grant in ROLES[name].grants:
        if "iam:PassRole" in grant.actions:
            assert grant.condition == {"StringEquals": {"iam:PassedToService": "sagemaker.amazonaws.com"}}
            assert all(resource.endswith(" role") for resource in grant.resources)


def test_only_the_builds_deploy_and_no_role_deletes_data():
    actions = {name: {a for g in role.grants for a in g.actions} for name, role in ROLES.items()}
    assert {name for name, found in actions.items() if "sagemaker:UpdateEndpoint" in found} == {"Deploy"}
    assert {name for name, found in actions.items() if "sagemaker:CreateModelPackage" in found} == {"Pipeline"}
    assert not [name for name, found in actions.items()
                if found & {"s3:DeleteObject", "s3:DeleteObjectVersion", "s3:DeleteBucket"}]


def test_the_services_are_known_to_the_models_that_are_shipped():
    assert service_model("sagemaker").operation_names
