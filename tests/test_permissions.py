"""Least privilege: what a role may do is what its code does, read from the code; no wildcard but where a service knows nothing finer."""
import ast
import json
import re
from pathlib import Path

import pytest

from intel_nb.aws.client import service_model
from intel_nb.aws.permissions import ROLES, UNSCOPED, actions_of, calls_from, calls_in, derived, granted, policy

PACKAGE = Path(__file__).parent.parent / "intel_nb" / "aws"
NAMES = {"name": "intel-nb", "short": "intel-nb-model", "connection": "arn:aws:codeconnections:us-east-1:123456789012:connection/x",
         "images": ["763104351884.dkr.ecr.us-east-1.amazonaws.com/pytorch:2.13"]}
OURS = [name for name, role in ROLES.items() if role.roots]


def known() -> dict:
    "What the linter's own table says of each service's actions: the resources that each can be narrowed to."
    import cfnlint
    return json.loads((Path(cfnlint.__file__).parent / "data" / "AdditionalSpecs" / "Policies.json").read_text())


@pytest.mark.parametrize("name", OURS)
def test_a_role_lacks_nothing_and_has_nothing_too_many(name):
    role = ROLES[name]
    lacking, unused = derived(role) - granted(role), granted(role) - derived(role)
    assert not lacking, f"{name} lacks {sorted(lacking)}"
    assert not unused, f"{name} has {sorted(unused)} too many"


def test_a_role_without_code_has_only_what_services_do():
    assert {name: granted(role) for name, role in ROLES.items() if not role.roots} == {name: set() for name in ROLES if name not in OURS}


def test_a_missing_and_a_needless_grant_are_found():
    "The test above would fail: an action that is taken away is lacking, one that is added is too many."
    from dataclasses import replace

    from intel_nb.aws.permissions import Grant
    role = ROLES["Deploy"]
    poorer = replace(role, grants=tuple(g for g in role.grants if "sagemaker:CreateModel" not in g.actions))
    assert derived(poorer) - granted(poorer) == {"sagemaker:CreateModel"}
    richer = replace(role, grants=(*role.grants, Grant(("sagemaker:DeleteModel",), ("models",))))
    assert granted(richer) - derived(richer) == {"sagemaker:DeleteModel"}


def test_every_call_in_the_modules_is_one_that_the_service_has():
    "Each is written so that it can be read, and names an operation of the service's own model."
    found = set()
    for path in sorted(PACKAGE.glob("*.py")):
        found |= calls_in(ast.parse(path.read_text()))
    assert len(found) > 40
    for call in found:
        assert actions_of(call)


def test_no_call_hides_from_the_reader():
    "A client that is kept under a name, or made for a service that is computed, could make calls that nobody counts."
    for path in sorted(PACKAGE.glob("*.py")):
        if path.name == "client.py":
            continue
        tree = ast.parse(path.read_text())
        asked = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "client"]
        seen = [n.value for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
        assert all(isinstance(n.args[0], ast.Constant) for n in asked), path.name
        assert [n.lineno for n in asked if n not in seen] == [], path.name


def test_calls_are_followed_through_functions_classes_and_imports():
    found = {f"{c.service}.{c.method}" for c in calls_from(["aws.hosting:SageMakerEndpoints.deploy"])}
    assert {"sagemaker.create_model", "sagemaker.update_endpoint", "cloudwatch.put_metric_alarm", "application-autoscaling.put_scaling_policy",
            "sagemaker.list_tags", "sagemaker.describe_model_package"} <= found
    assert not {"sagemaker.delete_model", "cloudwatch.delete_alarms"} & found
    assert calls_from(["aws.rules:rules"]) == set()


@pytest.mark.parametrize("name", ROLES)
def test_no_wildcard_action_and_no_wildcard_resource_but_those_listed(name):
    for grant in ROLES[name].grants:
        statement = policy([grant], **NAMES)["Statement"][0]
        assert not [a for a in statement["Action"] if "*" in a]
        assert statement["Resource"]
        if "*" in statement["Resource"]:
            assert statement["Resource"] == ["*"] and set(grant.actions) <= set(UNSCOPED)


@pytest.mark.parametrize("action", UNSCOPED)
def test_what_is_listed_can_really_not_be_narrowed(action):
    service, _, name = action.partition(":")
    resources = known()[service]["Actions"][name.lower()].get("Resources", [])
    # PutMetricData has no resource of this account's metrics; a condition on the namespace stands in for it.
    assert resources == [] or action == "cloudwatch:PutMetricData"


def test_metrics_are_narrowed_by_their_namespace():
    grants = [g for role in ROLES.values() for g in role.grants if "cloudwatch:PutMetricData" in g.actions]
    assert grants and all("cloudwatch:namespace" in str(g.condition) for g in grants)


@pytest.mark.parametrize("name", ROLES)
def test_every_action_exists_and_takes_the_resources_it_is_granted_on(name):
    "By the linter's table: a misspelt action, or one on a thing that the action knows nothing of, would grant nothing."
    table = known()
    for grant in ROLES[name].grants:
        for arn in policy([grant], **NAMES)["Statement"][0]["Resource"]:
            text = arn["Fn::Sub"] if isinstance(arn, dict) else arn
            if text == "*" or re.fullmatch(r"\$\{\w+(\.Arn)?\}(/.*)?", text):
                continue
            takers = [a for a in grant.actions if fits(table, a, text)]
            assert takers, f"{name}: none of {grant.actions} takes {text}"
        for action in grant.actions:
            service, _, operation = action.partition(":")
            assert operation.lower() in table[service]["Actions"], action


def fits(table: dict, action: str, arn: str) -> bool:
    "Whether one of the kinds of resource that `action` takes has an ARN of this form."
    service, _, name = action.partition(":")
    plain = re.sub(r"\$\{(AWS::\w+|\w+)\}", "x", arn)
    for kind in table[service]["Actions"].get(name.lower(), {}).get("Resources", []):
        for form in table[service]["Resources"].get(kind.lower(), {}).get("ARNFormats", []):
            start = re.sub(r"\$\{\w+\}", "x", form).split(".*")[0]
            if plain.split(":")[2] == start.split(":")[2] and plain.split(":", 5)[5].startswith(start.split(":", 5)[5][:5]):
                return True
    return False


@pytest.mark.parametrize("name", ROLES)
def test_a_role_is_passed_on_only_to_sagemaker(name):
    for grant in ROLES[name].grants:
        if "iam:PassRole" in grant.actions:
            assert grant.condition == {"StringEquals": {"iam:PassedToService": "sagemaker.amazonaws.com"}}
            assert all(thing.endswith(" role") for thing in grant.on)


def test_nobody_but_the_builds_deploys_and_nobody_deletes_data():
    actions = {name: {a for g in role.grants for a in g.actions} for name, role in ROLES.items()}
    assert {name for name, found in actions.items() if "sagemaker:UpdateEndpoint" in found} == {"Deploy"}
    assert {name for name, found in actions.items() if "sagemaker:CreateModelPackage" in found} == {"Pipeline"}
    assert not [name for name, found in actions.items() if found & {"s3:DeleteObject", "s3:DeleteObjectVersion", "s3:DeleteBucket"}]


def test_the_services_are_known_to_the_models_that_are_shipped():
    assert service_model("sagemaker").operation_names
