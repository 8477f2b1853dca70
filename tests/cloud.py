"""An AWS on this machine for tests: moto over real HTTP, with its holes filled in, and containers that serve.

What moto lacks, or does otherwise than AWS, is put right here and nowhere else:

* update_endpoint is not there; create_model and create_endpoint take a name twice;
* update_model_package forgets the metadata and the status that it is not told;
* invoke_endpoint answers with a fixed text, and cannot take bytes that are no UTF-8. Here it asks a container: our own serving
  process, started on the package that the endpoint's model names; and what goes in and out is captured as SageMaker does it;
* list_pipeline_execution_steps is not there; here it lists what a test says;
* delete_model_package, delete_model_package_group and stop_pipeline_execution are not there.
"""
import base64
import json
import os
import re
import shutil
import threading
import urllib.error
import urllib.request
import uuid
from collections import Counter
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import boto3
import botocore.client
import botocore.exceptions
import moto.sagemaker.models
import moto.sagemaker.responses
import moto.sagemakerruntime.responses
import pytest
from botocore import xform_name
from moto.core.responses import ActionResult
from moto.sagemaker.exceptions import AWSValidationException
from moto.server import ThreadedMotoServer

from intel_nb.aws.client import check_request
from intel_nb.aws.package_group import Settings, create_group

REGION = "us-east-1"
IMAGE = "123456789012.dkr.ecr.us-east-1.amazonaws.com/intel-nb:1"
ROLE = "arn:aws:iam::123456789012:role/intel-nb-serve"


class Cloud:
    "The emulator, what was asked of it, and the containers behind its endpoints."
    def __init__(self, url: str, folder: Path):
        from intel_nb.serving.endpoints import LocalEndpoints
        self.url, self.folder = url, folder
        self.calls: Counter[tuple[str, str]] = Counter()  # (service, method) that were answered
        self.problems: list[str] = []  # with the form of what was asked, against the service's own model
        self.steps: dict[str, list[dict]] = {}  # of each pipeline execution
        self.pending: dict[str, str] = {}  # endpoints that are being updated, and to what
        self.alarmed: dict[str, str] = {}  # endpoints whose next update is called back, and why
        self.captured: dict[str, list[dict]] = {}  # of each endpoint, until it is flushed
        self._own: dict[str, object] = {}
        self._making = threading.Lock()
        self.containers = LocalEndpoints(folder / "containers", owned=True, first_port=0, env={"INTEL_NB_CAPTURE": "0"})

    def reset(self) -> None:
        "Forget everything but the record of calls."
        for one in self.containers.list():
            self.containers.stop(one.stage)
        shutil.rmtree(self.containers.folder, ignore_errors=True)  # what their detectors have seen, too
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/moto-api/reset", b"", method="POST"), timeout=30).close()
        for record in (self.steps, self.pending, self.alarmed, self.captured):
            record.clear()

    def aws(self, service: str):
        "A client of the emulator's own, whose calls are not counted."
        with self._making:
            if service not in self._own:
                self._own[service] = boto3.session.Session().client(service)
                self._own[service].uncounted = True
            return self._own[service]

    def bucket(self, name: str) -> str:
        self.aws("s3").create_bucket(Bucket=name)
        return f"s3://{name}"

    def group(self, name: str = "intel-nb") -> str:
        "A Model Package Group as the stack makes it, with a bucket of its own; returns its URI."
        create_group(name, Settings(f"{self.bucket(f'{name}-artifacts')}/models", ROLE, IMAGE))
        return f"sagemaker://{name}"

    def container(self, endpoint: str) -> str:
        "The URL of the process that serves what `endpoint` is configured to serve."
        sagemaker = self.aws("sagemaker")
        config = sagemaker.describe_endpoint(EndpointName=endpoint)["EndpointConfigName"]
        served = {one.stage: one.version for one in self.containers.list()}
        variant, = sagemaker.describe_endpoint_config(EndpointConfigName=config)["ProductionVariants"]
        container, = sagemaker.describe_model(ModelName=variant["ModelName"])["Containers"]
        version = container["Environment"]["INTEL_NB_VERSION"]
        if served.get(endpoint) != version:
            found = sagemaker.describe_model_package(ModelPackageName=container["ModelPackageName"])
            bucket, key = found["InferenceSpecification"]["Containers"][0]["ModelDataUrl"].removeprefix("s3://").split("/", 1)
            archive = self.folder / f"{uuid.uuid4().hex}" / "model.tar.gz"
            archive.parent.mkdir(parents=True)
            self.aws("s3").download_file(bucket, key, str(archive))
            self.containers.deploy(endpoint, archive, version)
        return self.containers.describe(endpoint).url

    def settle(self, seconds: float = 0) -> None:
        "Some time passes: updates come to their end."
        for name, config in self.pending.items():
            endpoint = backend(self).endpoints[name]
            endpoint.endpoint_status, endpoint.failure_reason = "InService", self.alarmed.get(name)
            endpoint.endpoint_config_name = endpoint.endpoint_config_name if name in self.alarmed else config
        self.pending.clear()

    def capture(self, endpoint: str, kind: str, body: bytes, answer: bytes) -> None:
        sent = {"observedContentType": kind, "mode": "INPUT", "encoding": "BASE64", "data": base64.b64encode(body).decode()}
        got = {"observedContentType": "application/json", "mode": "OUTPUT", "encoding": "JSON", "data": answer.decode()}
        if kind == "application/json":
            sent |= {"encoding": "JSON", "data": body.decode()}
        when = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self.captured.setdefault(endpoint, []).append({
            "captureData": {"endpointInput": sent, "endpointOutput": got},
            "eventMetadata": {"eventId": str(uuid.uuid4()), "inferenceTime": when}, "eventVersion": "0"})

    def flush(self, endpoint: str, instances: int = 1) -> None:
        "Write down what was captured, as so many instances would that shared the requests."
        config = self.aws("sagemaker").describe_endpoint(EndpointName=endpoint)["EndpointConfigName"]
        to = self.aws("sagemaker").describe_endpoint_config(EndpointConfigName=config)["DataCaptureConfig"]["DestinationS3Uri"]
        bucket, _, prefix = to.removeprefix("s3://").partition("/")
        entries, now = self.captured.pop(endpoint, []), datetime.now(UTC)
        for i in range(instances):
            key = f"{prefix}/{endpoint}/AllTraffic/{now:%Y/%m/%d/%H/%M-%S}-{i:03}-{uuid.uuid4()}.jsonl"
            lines = "".join(json.dumps(entry) + "\n" for entry in entries[i::instances])
            self.aws("s3").put_object(Bucket=bucket, Key=key, Body=lines.encode())


@contextmanager
def emulated(folder: Path):
    "The emulator while the block lasts, with an environment that sends all calls of this process and its children there."
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    cloud = Cloud("http://{}:{}".format(*server.get_host_and_port()), folder)
    before = dict(os.environ)
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        del os.environ[name]
    os.environ |= {"AWS_ENDPOINT_URL": cloud.url, "AWS_DEFAULT_REGION": REGION, "AWS_ACCESS_KEY_ID": "test", "AWS_MAX_ATTEMPTS": "1",
                   "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": str(folder / "none"),
                   "AWS_SHARED_CREDENTIALS_FILE": str(folder / "none")}
    with holes_filled(cloud), recorded(cloud):
        try:
            yield cloud
        finally:
            cloud.reset()
            server.stop()
            os.environ.clear()
            os.environ.update(before)


@contextmanager
def recorded(cloud: Cloud):
    "Every call that boto3 makes here is noted when it was answered, and its form is held against the service's model."
    call = botocore.client.BaseClient._make_api_call

    def noted(self, operation: str, params: dict):
        service = self.meta.service_model.service_name
        answer = call(self, operation, params)
        if hasattr(self, "uncounted"):
            return answer
        cloud.calls[service, xform_name(operation)] += 1
        cloud.problems += [f"{service}.{operation}: {problem}" for problem in check_request(service, operation, params)]
        return answer
    botocore.client.BaseClient._make_api_call = noted
    try:
        yield
    finally:
        botocore.client.BaseClient._make_api_call = call


@contextmanager
def holes_filled(cloud: Cloud):
    "moto with what it lacks, while the block lasts."
    responses, runtime = moto.sagemaker.responses.SageMakerResponse, moto.sagemakerruntime.responses.SageMakerRuntimeResponse
    models = moto.sagemaker.models.SageMakerModelBackend
    filled = {(responses, "update_endpoint"): lambda self: update_endpoint(self, cloud),
              (responses, "create_model"): once("create_model", "ModelName", "_models"),
              (responses, "create_endpoint"): once("create_endpoint", "EndpointName", "endpoints"),
              (responses, "create_endpoint_config"): once("create_endpoint_config", "EndpointConfigName", "endpoint_configs"),
              (responses, "list_pipeline_execution_steps"): lambda self: list_steps(self, cloud),
              (responses, "delete_model_package"): delete_package, (responses, "delete_model_package_group"): delete_group,
              (responses, "stop_pipeline_execution"): stop_execution,
              (models, "update_model_package"): merged(models.update_model_package),
              (runtime, "invoke_endpoint"): lambda self: invoke_endpoint(self, cloud), (runtime, "use_raw_body"): True}
    before = {(owner, name): owner.__dict__.get(name) for owner, name in filled}
    for (owner, name), value in filled.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name), value in before.items():
            delattr(owner, name) if value is None else setattr(owner, name, value)


def backend(cloud: Cloud):
    return moto.sagemaker.models.sagemaker_backends["123456789012"][REGION]


def update_endpoint(self, cloud: Cloud):
    found, name, config = self.sagemaker_backend, self._get_param("EndpointName"), self._get_param("EndpointConfigName")
    if name not in found.endpoints or config not in found.endpoint_configs:
        raise AWSValidationException(f"Could not find endpoint {name} or configuration {config}.")
    if found.endpoints[name].endpoint_status != "InService":
        raise AWSValidationException(f"Cannot update in-progress endpoint {name!r}.")
    found.endpoints[name].endpoint_status = "Updating"
    cloud.pending[name] = config
    return ActionResult({"EndpointArn": found.endpoints[name].arn})


def delete_package(self):
    found, asked = self.sagemaker_backend, self._get_param("ModelPackageName")
    name = found.model_package_name_mapping.get(asked, asked)
    if name not in found.model_packages:
        raise AWSValidationException(f"Model package {asked} does not exist.")
    del found.model_packages[name]
    return ActionResult({})


def delete_group(self):
    found, name = self.sagemaker_backend, self._get_param("ModelPackageGroupName")
    if name not in found.model_package_groups:
        raise AWSValidationException(f"Model package group {name} does not exist.")
    if any(package.model_package_group_name == name for package in found.model_packages.values()):
        raise AWSValidationException(f"Model package group {name} still has model packages.")
    del found.model_package_groups[name]
    return ActionResult({})


def stop_execution(self):
    arn = self._get_param("PipelineExecutionArn")
    for pipeline in self.sagemaker_backend.pipelines.values():
        if arn in pipeline.pipeline_executions:
            pipeline.pipeline_executions[arn].pipeline_execution_status = "Stopped"
            return ActionResult({"PipelineExecutionArn": arn})
    raise AWSValidationException(f"Pipeline execution {arn} does not exist.")


def once(method: str, parameter: str, kept: str):
    "The method, but with an error as AWS gives it for a name that is taken."
    real = getattr(moto.sagemaker.responses.SageMakerResponse, method)

    def create(self):
        name = self._get_param(parameter)
        if name in getattr(self.sagemaker_backend, kept):
            raise AWSValidationException(f"Cannot create already existing {parameter.removesuffix('Name').lower()} {name!r}.")
        return real(self)
    return create


def merged(real):
    "update_model_package, but what is not told stays as it is."
    def update(self, model_package_arn, model_approval_status, approval_description, customer_metadata_properties, *rest, **more):
        name = self.model_package_name_mapping.get(model_package_arn, model_package_arn)
        if found := self.model_packages.get(name):
            model_approval_status = model_approval_status or found.model_approval_status
            approval_description = found.approval_description if approval_description is None else approval_description
            customer_metadata_properties = {**(found.customer_metadata_properties or {}), **(customer_metadata_properties or {})}
        return real(self, model_package_arn, model_approval_status, approval_description, customer_metadata_properties, *rest, **more)
    return update


def list_steps(self, cloud: Cloud):
    return ActionResult({"PipelineExecutionSteps": cloud.steps.get(self._get_param("PipelineExecutionArn"), [])})


def invoke_endpoint(self, cloud: Cloud):
    "What SageMaker's runtime does: the body goes to a container, and an answer that is no 2xx comes back within an error of its own."
    endpoint = re.search(r"/endpoints/([^/]+)/invocations", self.uri)[1]
    kind, body = self.headers.get("Content-Type", ""), bytes(self.raw_body or b"")
    passed = {"Content-Type": kind} | {k: v for k, v in self.headers.items() if k.lower() == "x-amzn-sagemaker-custom-attributes"}
    try:
        url = cloud.container(endpoint)
    except botocore.exceptions.ClientError:
        return error(400, "ValidationError", {"Message": f"Endpoint {endpoint} of account 123456789012 not found."})
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/invocations", body, passed), timeout=60) as reply:
            answer = reply.read()
    except urllib.error.HTTPError as e:
        said = e.read().decode()
        return error(424, "ModelError", {"Message": f"Received status {e.code} from primary", "OriginalStatusCode": e.code,
                                         "OriginalMessage": said, "LogStreamArn": ""})
    cloud.capture(endpoint, kind, body, answer)
    return 200, {"Content-Type": "application/json", "x-Amzn-Invoked-Production-Variant": "AllTraffic"}, answer


def error(status: int, code: str, body: dict):
    return status, {"Content-Type": "application/json", "x-amzn-ErrorType": code, "status": status}, json.dumps(body)


@pytest.fixture(scope="module")
def cloud_once(tmp_path_factory):
    "The emulator of a module."
    with emulated(tmp_path_factory.mktemp("cloud")) as cloud:
        yield cloud


@pytest.fixture
def cloud(cloud_once):
    "An empty AWS for a test."
    yield cloud_once
    assert cloud_once.problems == []
    cloud_once.reset()
