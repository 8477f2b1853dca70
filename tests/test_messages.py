"""What people are told: each message for a real event, each alarm's text, and that their commands exist."""
import json
import re
import shlex

import pytest
from event_delivery import resolved, transformed
from event_patterns import matches
from test_rules import EVENTS, SMALL, build_event, endpoint_event, package_event, pipeline_event, run_event

from intel_nb.aws.base import Options
from intel_nb.aws.messages import DEAD_LETTERS, messages, refused_alarm
from intel_nb.aws.stack import template
from intel_nb.cli import aws_app

OPTIONS = {"intel-nb": Options(), "scenes": Options(name="scenes", email="ann@example.org")}

COMMANDS = {one.name for one in aws_app.registered_commands}


@pytest.fixture(scope="module", params=OPTIONS)
def made(request):
    return request.param, template(OPTIONS[request.param], SMALL)["Resources"]


def told(resources: dict, event: dict) -> list[str]:
    "Return the messages that the topic gets of `event`."
    rules = [one["Properties"] for one in resources.values() if one["Type"] == "AWS::Events::Rule"]
    return [json.loads(transformed(target, event)) for rule in rules if matches(resolved(rule["EventPattern"]), event)
            for target in rule["Targets"] if target["Arn"] == {"Ref": "Topic"}]


def registered(group: str, **changes) -> dict:
    "The event of a version that the pipeline has just registered: nothing of it was updated."
    event = package_event(group, "PendingManualApproval")
    detail = {k: v for k, v in event["detail"].items() if k != "UpdatedModelPackageFields"}
    return {**event, "detail": detail | changes}


EXPECTED = {
    "a version waits": (registered, "Version 2 of {0} passed the gate and waits for a person; put it on staging with: "
                                    "intel-nb aws approve 2"),
    "a run failed": (lambda name: pipeline_event(name=name), "An execution of the pipeline {0} failed, or its gate "
                     "refused the package; see why with: intel-nb aws status"),
    "modelbuild failed": (lambda name: run_event(f"{name}-modelbuild"),
                          "A run of modelbuild failed, or was refused; see in which stage with: intel-nb aws status"),
    "modeldeploy failed": (lambda name: run_event(f"{name}-modeldeploy"),
                           "A run of modeldeploy failed, or was refused; read its output with: "
                           "intel-nb aws logs modeldeploy"),
    "the image failed": (lambda name: build_event(f"{name}-image"),
                         "The image of {0} could not be built; read the output with: intel-nb aws logs image"),
    "staging is broken": (lambda name: endpoint_event("FAILED", "staging", name), "The endpoint of staging is not "
                          "ready (FAILED); read its output with: intel-nb aws logs staging"),
    "production is broken": (lambda name: endpoint_event(name=name), "The endpoint of production is not ready "
                             "(OUT_OF_SERVICE); read its output with: intel-nb aws logs production"),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_each_event_that_needs_a_person_is_one_sentence_with_a_command(made, case):
    name, resources = made
    event, sentence = EXPECTED[case]
    option = "" if name == "intel-nb" else f" --name {name}"
    (text,) = told(resources, event(name))
    assert text == sentence.format(name) + option
    assert_command_exists(text)


def assert_command_exists(text: str) -> None:
    found = re.search(r": (intel-nb aws .*)$", text)
    assert found, f"no command at the end of: {text}"
    program, part, command, *_ = shlex.split(re.sub("[<>#{}]", "", found[1]))
    assert (program, part) == ("intel-nb", "aws") and command in COMMANDS, text
    assert text.count(". ") == 0 and len(text) < 256 and text[0].isupper()


def test_every_message_has_a_case(made):
    assert len(messages(OPTIONS[made[0]])) == len(EXPECTED)


def test_a_command_that_nobody_has_would_be_found():
    with pytest.raises(AssertionError):
        assert_command_exists("The endpoint is gone; look with: intel-nb aws find")
    with pytest.raises(AssertionError):
        assert_command_exists("The endpoint is gone.")


@pytest.mark.parametrize("event", [
    package_event(status="PendingManualApproval", changed="CustomerMetadataProperties"), package_event(),
    package_event(status="Rejected"), registered("other"), registered("intel-nb", ModelPackageStatus="InProgress"),
    pipeline_event("Succeeded"), pipeline_event("Executing"), pipeline_event(name="other"), pipeline_event("Stopped"),
    run_event(state="SUCCEEDED"), run_event(state="SUPERSEDED"), run_event("other-modelbuild"),
    build_event(status="SUCCEEDED"), build_event("intel-nb-modelbuild"),
    endpoint_event("IN_SERVICE"), endpoint_event("UPDATING"), endpoint_event("DELETING"),
    endpoint_event(stage="other")],
    ids=lambda event: event["detail-type"])
def test_nothing_else_is_told(made, event):
    if made[0] == "intel-nb":
        assert told(made[1], event) == []


def test_a_version_that_a_person_made_wait_again_is_told(made):
    if made[0] == "intel-nb":
        assert len(told(made[1], package_event(status="PendingManualApproval"))) == 1


def test_no_event_of_the_tests_is_told_twice(made):
    for event in EVENTS.values():
        assert len(told(made[1], event)) <= 1


def test_the_topic_takes_messages_of_events_and_alarms_alone(made):
    statements = made[1]["TopicPolicy"]["Properties"]["PolicyDocument"]["Statement"]
    allowed = {s["Principal"]["Service"]: s for s in statements if s["Effect"] == "Allow"}
    assert set(allowed) == {"cloudwatch.amazonaws.com", "events.amazonaws.com"}
    assert all(s["Action"] == "sns:Publish" and s["Resource"] == {"Ref": "Topic"} for s in allowed.values())
    assert "Condition" not in allowed["events.amazonaws.com"], "EventBridge takes none in a topic's policy"


# -- alarms

def alarms_of(resources: dict) -> dict[str, dict]:
    return {one["Properties"]["AlarmName"]: one["Properties"] for one in resources.values()
            if one["Type"] == "AWS::CloudWatch::Alarm"}


def test_each_alarm_says_what_to_do(made):
    found = alarms_of(made[1])
    assert set(found) == {f"{made[0]}-{stage}-{kind}" for stage in ("staging", "production")
                          for kind in ("errors", "latency", "refused", "drift")} | {
        f"{made[0]}-{kind}" for kind in ("undelivered", "data-dead", "labels-dead")}
    for one in found.values():
        assert_command_exists(one["AlarmDescription"])
        assert one["AlarmActions"] == one["OKActions"] == [{"Ref": "Topic"}]
        assert one["TreatMissingData"] == "notBreaching"


def test_the_alarms_of_dead_letters_look_at_queues_that_are_there(made):
    for name, queue in DEAD_LETTERS.items():
        assert made[1][name]["Properties"]["QueueName"] == f"{made[0]}-{queue}"


@pytest.mark.parametrize("refused, requests, raised", [
    (0, 100, False), (20, 100, False), (21, 100, True), (100, 100, True), (4, 20, False), (5, 20, True),
    (19, 19, False), (1, 1, False), (0, 0, False)])
def test_a_share_of_refused_requests_raises_the_alarm_when_there_are_enough(refused, requests, raised):
    "The expression, evaluated: `IF(condition, then, else)` of CloudWatch's metric math for single numbers."
    alarm = refused_alarm("intel-nb-production")
    share, *counts = alarm["Metrics"]
    condition, then, other = re.fullmatch(r"IF\((.*), (.*), (.*)\)", share["Expression"]).groups()
    names = {"refused": refused, "requests": requests}
    value = eval(then if eval(condition, {}, names) else other, {}, names)
    assert (value > alarm["Threshold"]) == raised
    assert {one["Id"]: one["MetricStat"]["Metric"]["MetricName"] for one in counts} == {
        "refused": "Invocation4XXErrors", "requests": "Invocations"}
    assert [one["ReturnData"] for one in alarm["Metrics"]] == [True, False, False], "an alarm looks at one"


def test_the_request_for_approval_names_the_command(made):
    stages = made[1]["ModeldeployPipeline"]["Properties"]["Stages"]
    (approval,) = next(stage for stage in stages if stage["Name"] == "Approval")["Actions"]
    text = approval["Configuration"]["CustomData"]
    assert "intel-nb aws promote #{Choose.VERSION}" in text
    assert_command_exists(text)
