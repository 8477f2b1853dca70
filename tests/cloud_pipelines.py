"""Carry out the CodePipeline modeldeploy of the template: moto keeps a declaration, and does nothing with it.

The stages, their conditions, the variables and the builds' environments are those of the template. A build is a real
process that runs the command of its description on this machine. Entry conditions, variables and the approval's token
work as CodePipeline's user guide describes them.

This leaves unproven: that CodePipeline and CodeBuild read the template as it is read here; the roles; the installation
at the beginning of each build, and the artifacts between stages; what is superseded when two executions overlap;
events.
"""
import json
import os
import re
import subprocess
import sys
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import moto.codepipeline.responses
from moto.codepipeline.exceptions import PipelineNotFoundException

NAMED = {"Ref": {"AWS::AccountId": "123456789012"}}


def resolved(value):
    "Return a value of the template with CloudFormation's references filled in."
    if isinstance(value, dict) and "Fn::GetAtt" in value:
        return f"arn:aws:iam::123456789012:role/{value['Fn::GetAtt'][0]}"
    if isinstance(value, dict) and "Ref" in value:
        return NAMED["Ref"].get(value["Ref"], value["Ref"])
    return value


@dataclass
class Execution:
    "An execution: the outputs of its actions by namespace, and how its stages ended."
    id: str
    variables: dict[str, dict[str, str]]
    states: dict[str, str] = field(default_factory=dict)  # of stages
    outputs: dict[str, dict[str, str]] = field(default_factory=dict)  # of actions
    done: list[str] = field(default_factory=list)  # the builds' steps, in order
    log: str = ""


class CodePipeline:
    "A pipeline of the template, and its executions; one stops where it waits for a person's answer."
    def __init__(self, made: dict, logical_id: str, folder: Path):
        self.resources, self.folder = made["Resources"], folder
        self.declared = self.resources[logical_id]["Properties"]
        self.name, self.executions = self.declared["Name"], []
        self.answered: dict | None = None  # the answer to the token of the last execution
        self.since = datetime.now(UTC)

    @property
    def last(self) -> Execution:
        return self.executions[-1]

    def start(self, variables: dict[str, str]) -> str:
        "Queue an execution; `go_on` carries it out."
        given = {v["Name"]: v["DefaultValue"] for v in self.declared.get("Variables", [])} | variables
        self.executions.append(Execution(str(uuid.uuid4()), {"variables": given}))
        self.answered = None
        return self.last.id

    def go_on(self) -> Execution:
        "Carry the last execution out until it ends, fails, or waits for an answer."
        for stage in self.declared["Stages"]:
            if self.last.states.get(stage["Name"]) in ("Succeeded", "Skipped"):
                continue
            self.last.states[stage["Name"]] = self._carry_out(stage)
            if self.last.states[stage["Name"]] in ("Failed", "InProgress"):
                break
        return self.last

    def _carry_out(self, stage: dict) -> str:
        for condition in stage.get("BeforeEntry", {}).get("Conditions", []):
            if not all(self._passes(rule) for rule in condition["Rules"]):  # then the condition's result is engaged
                return {"SKIP": "Skipped", "FAIL": "Failed"}[condition["Result"]]
        for action in sorted(stage["Actions"], key=lambda action: action["RunOrder"]):
            category = action["ActionTypeId"]["Category"]
            if category == "Approval":
                if self.answered is None:
                    self.since = datetime.now(UTC)
                    return "InProgress"
                if self.answered["status"] != "Approved":
                    return "Failed"
            if category == "Build" and not self._build(action):
                return "Failed"
        return "Succeeded"

    def _passes(self, rule: dict) -> bool:
        assert rule["RuleTypeId"]["Provider"] == "VariableCheck"
        wanted, value = rule["Configuration"]["Value"], self.filled(rule["Configuration"]["Variable"])
        return {"EQ": value == wanted, "NE": value != wanted}[rule["Configuration"]["Operator"]]

    def filled(self, text: str) -> str:
        "Return a text with the values of its variables, which are written `#{NAMESPACE.NAME}`."
        return re.sub(r"#\{(\w+)\.(\w+)\}", lambda found: self.last.variables[found[1]][found[2]], text)

    def _build(self, action: dict) -> bool:
        "Run the command of the build's description in a process of its own; return whether it succeeded."
        project = self.resources[action["Configuration"]["ProjectName"]["Ref"]]["Properties"]
        given = {one["Name"]: resolved(one["Value"]) for one in project["Environment"]["EnvironmentVariables"]}
        given |= {one["name"]: self.filled(one["value"])
                  for one in json.loads(action["Configuration"].get("EnvironmentVariables", "[]"))}
        work = self.folder / self.last.id / action["Name"]
        work.mkdir(parents=True)
        environ = os.environ | given | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        command = next(c for c in re.findall(r"^ *- (python .*)$", project["Source"]["BuildSpec"], re.MULTILINE))
        done = subprocess.run(["sh", "-c", command], cwd=work, env=environ, capture_output=True, text=True, timeout=600)
        self.last.log += done.stdout + done.stderr
        self.last.done.append(given.get("STEP", action["Name"]))
        assert list((work / "executed").glob("*")) or done.returncode, "an artifact without files fails a build"
        if "Namespace" in action and (work / "variables.env").exists():
            lines = (work / "variables.env").read_text().splitlines()
            self.last.outputs[action["Name"]] = dict(line.split("=", 1) for line in lines)
            self.last.variables[action["Namespace"]] = self.last.outputs[action["Name"]]
        return done.returncode == 0

    def state(self) -> dict:
        "Return what GetPipelineState answers."
        stages = []
        for stage in self.declared["Stages"]:
            actions: list[dict] = [{"actionName": action["Name"]} for action in stage["Actions"]]
            found: dict = {"stageName": stage["Name"], "actionStates": actions}
            status = self.last.states.get(stage["Name"]) if self.executions else None
            if status:
                found["latestExecution"] = {"pipelineExecutionId": self.last.id, "status": status}
            if status == "InProgress":
                token, since = self.last.id, self.since.timestamp()
                actions[0]["latestExecution"] = {"status": "InProgress", "token": token, "lastStatusChange": since}
            stages.append(found)
        return {"pipelineName": self.name, "pipelineVersion": 1, "stageStates": stages}

    def actions(self, execution: str) -> list[dict]:
        "Return what ListActionExecutions answers, newest first."
        found = next((one for one in self.executions if one.id == execution), None)
        return [{"pipelineExecutionId": execution, "actionName": name, "output": {"outputVariables": outputs}}
                for name, outputs in reversed(list((found.outputs if found else {}).items()))]


@contextmanager
def codepipelines(*pipelines: CodePipeline):
    "Let the emulator answer for these pipelines during the block."
    known = {pipeline.name: pipeline for pipeline in pipelines}
    responses = moto.codepipeline.responses.CodePipelineResponse

    def find(name: str) -> CodePipeline:
        if name not in known:
            raise PipelineNotFoundException(f"Account '123456789012' does not have a pipeline with name '{name}'")
        return known[name]

    def start(self):
        variables = {one["name"]: one["value"] for one in self._get_param("variables") or []}
        return json.dumps({"pipelineExecutionId": find(self._get_param("name")).start(variables)})

    def answer(self):
        pipeline = find(self._get_param("pipelineName"))
        assert self._get_param("token") == pipeline.last.id
        pipeline.answered = self._get_param("result")
        return json.dumps({"approvedAt": datetime.now(UTC).timestamp()})

    additions = {
        "get_pipeline_state": lambda self: json.dumps(find(self._get_param("name")).state()),
        "list_action_executions": lambda self: json.dumps({"actionExecutionDetails": find(
            self._get_param("pipelineName")).actions(self._get_param("filter")["pipelineExecutionId"])}),
        "start_pipeline_execution": start, "put_approval_result": answer}
    before = {name: responses.__dict__.get(name) for name in additions}
    for name, method in additions.items():
        setattr(responses, name, method)
    try:
        yield
    finally:
        for name, method in before.items():
            delattr(responses, name) if method is None else setattr(responses, name, method)
