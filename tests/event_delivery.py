"""What AWS does between an event and what it starts, as far as the tests need it, after the services' guides.

EventBridge (Input transformation): each `<name>` in the template becomes the value at its JSON path; a text gets quotes
where the template is JSON, and none within quotes. SQS (FIFO queues, content-based deduplication): a message with the
SHA-256 of a body that was accepted within the last five minutes is accepted and not delivered, also when that one was
received and deleted meanwhile; a queue's delay holds back each message. Pipes (Target parameters): a value that is a
JSON path is read from the record, whose body counts as JSON where it is JSON.
"""
import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

WINDOW = 300  # seconds of SQS's deduplication


def value_at(path: str, event: dict) -> Any:
    "Return the value at a JSON path such as `$.detail.object.version-id`."
    for name in path.removeprefix("$.").split("."):
        event = event[name]
    return event


def resolved(value: Any) -> Any:
    "Return a value of a template with the account and the region of the tests' events in its texts."
    places = {"${AWS::AccountId}": "123456789012", "${AWS::Region}": "us-east-1", "${AWS::Partition}": "aws"}
    text = re.sub(r'\{"Fn::Sub": ("[^"]*")\}', r"\1", json.dumps(value))
    for place, given in places.items():
        text = text.replace(place, given)
    return json.loads(text)


def transformed(target: dict, event: dict) -> str:
    "Return the text that the target of a rule gets."
    if "Input" in target:
        return target["Input"]
    if "InputTransformer" not in target:
        return json.dumps(event)
    transformer = target["InputTransformer"]
    values = {name: value_at(path, event) for name, path in transformer.get("InputPathsMap", {}).items()}
    template = transformer["InputTemplate"]
    quoted = template.startswith('"')
    return re.sub(r"<([a-zA-Z0-9]+)>", lambda m: str(values[m[1]]) if quoted else json.dumps(values[m[1]]), template)


@dataclass
class FifoQueue:
    "A FIFO queue with content-based deduplication, made from the properties in a template."
    properties: dict
    accepted: dict[str, float] = field(default_factory=dict)  # when, by digest
    delivered: list[tuple[float, dict]] = field(default_factory=list)  # a time, and the record that a pipe reads

    def send(self, body: str, now: float) -> None:
        assert self.properties["FifoQueue"] and self.properties["ContentBasedDeduplication"]
        digest = hashlib.sha256(body.encode()).hexdigest()
        if now - self.accepted.get(digest, -WINDOW - 1) <= WINDOW:
            return
        self.accepted[digest] = now
        record = {"messageId": f"id-{len(self.delivered)}", "body": body, "eventSource": "aws:sqs"}
        self.delivered.append((now + self.properties.get("DelaySeconds", 0), record))


def parameters_of(pipe: dict, record: dict) -> dict[str, str]:
    "Return the parameters that a pipe starts a SageMaker pipeline with."
    given = pipe["TargetParameters"]["SageMakerPipelineParameters"]["PipelineParameterList"]
    with suppress(ValueError):
        record = {**record, "body": json.loads(record["body"])}
    return {one["Name"]: value_at(one["Value"], record) if one["Value"].startswith("$.") else one["Value"]
            for one in given}
