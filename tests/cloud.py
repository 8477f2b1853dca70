"""Emulate AWS on this machine for tests: moto over real HTTP, with its gaps filled, and containers that serve.

Where moto lacks an operation, or differs from AWS, it is corrected here; stacks, builds and quotas in cloud_stack.py,
CodePipelines in cloud_pipelines.py. CONTRIBUTING.md says what is tested instead of what this leaves unproven.

* It has no update_endpoint, and its create_model and create_endpoint accept a name twice.
* Its update_model_package forgets metadata and status that the request leaves out.
* Its invoke_endpoint answers with a fixed text, and accepts only UTF-8. Here a container answers: our serving process,
  started on the package of the endpoint's model. Requests and answers are captured in SageMaker's format.
* It has no list_pipeline_execution_steps. Here it returns the steps that a test sets.
* It has no delete_model_package, delete_model_package_group and stop_pipeline_execution.
* Its create_model forgets EnableNetworkIsolation, and its list_models ignores NameContains.
* It knows no rights and quotas. Here a test names calls of auto-scaling, or UpdateEndpoint, that are refused.
* Its S3 answers 412 to a condition that does not hold, and never 409 to requests that race, as AWS may do. Here a test
  sets how many of the next conditional writes are answered so. (That it honours conditions, tests/test_state.py shows.)
* Its processing jobs are done at once. Here a test may let one go on.
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
import moto.applicationautoscaling.responses
import moto.s3.responses
import moto.sagemaker.models
import moto.sagemaker.responses
import moto.sagemakerruntime.responses
import pytest
from botocore import xform_name
from moto.core.exceptions import JsonRESTError
from moto.core.responses import ActionResult
from moto.s3.exceptions import S3ClientError
from moto.sagemaker.exceptions import AWSValidationException
from moto.server import ThreadedMotoServer

from intel_nb.aws.client import client, request_problems
from intel_nb.aws.package_group import GroupSettings, settings_parameter

REGION = "us-east-1"
IMAGE = "123456789012.dkr.ecr.us-east-1.amazonaws.com/intel-nb:1"
ROLE = "arn:aws:iam::123456789012:role/intel-nb-serve"


class Cloud:
    "The emulator, a record of its calls, and the containers behind its endpoints."
    def __init__(self, url: str, folder: Path):
        from intel_nb.serving.endpoints import LocalEndpoints
        self.url, self.folder = url, folder
        self.calls: Counter[tuple[str, str]] = Counter()  # answered calls, as (service, method)
        self.problems: list[str] = []  # of requests, checked against the service's model
        self.steps: dict[str, list[dict]] = {}  # of each pipeline execution
        self.pending: dict[str, str] = {}  # endpoints in an update, and the new configuration
        self.alarmed: dict[str, str] = {}  # endpoints whose next update is rolled back, and the reason
        self.captured: dict[str, list[dict]] = {}  # of each endpoint, until it is flushed
        self.refused: dict[str, str] = {}  # calls that are refused, and what AWS says
        self.races = 0  # how many of the next conditional writes to S3 are answered by 409
        self._clients: dict[str, object] = {}
        self._client_lock = threading.Lock()
        self.containers = LocalEndpoints(folder / "containers", owned=True, first_port=0, env={"INTEL_NB_CAPTURE": "0"})

    def reset(self) -> None:
        "Stop all containers and delete everything, except the record of calls."
        for one in self.containers.list():
            self.containers.stop(one.stage)
        shutil.rmtree(self.containers.folder, ignore_errors=True)  # with the state of their detectors
        urllib.request.urlopen(f"{self.url}/moto-api/reset", b"", timeout=30).close()
        for record in (self.steps, self.pending, self.alarmed, self.captured, self.refused):
            record.clear()
        self.races = 0

    def aws(self, service: str):
        "Return a client whose calls are not recorded."
        with self._client_lock:
            if service not in self._clients:
                self._clients[service] = boto3.session.Session().client(service)
                self._clients[service].uncounted = True
            return self._clients[service]

    def bucket(self, name: str) -> str:
        self.aws("s3").create_bucket(Bucket=name)
        return f"s3://{name}"

    def group(self, name: str = "intel-nb") -> str:
        "Create a Model Package Group, its bucket and its settings, as the stack does, and return the group's URI."
        bucket = self.bucket(f"{name}-artifacts")
        self.aws("s3").put_bucket_versioning(Bucket=f"{name}-artifacts", VersioningConfiguration={"Status": "Enabled"})
        create_group(name, GroupSettings(bucket, ROLE, IMAGE))
        return f"sagemaker://{name}"

    def container(self, endpoint: str) -> str:
        "Return the URL of the process that serves the configured version of `endpoint`, and start it if needed."
        sagemaker = self.aws("sagemaker")
        config = sagemaker.describe_endpoint(EndpointName=endpoint)["EndpointConfigName"]
        served = {one.stage: one.version for one in self.containers.list()}
        variant, = sagemaker.describe_endpoint_config(EndpointConfigName=config)["ProductionVariants"]
        container, = sagemaker.describe_model(ModelName=variant["ModelName"])["Containers"]
        version = container["Environment"]["INTEL_NB_VERSION"]
        if served.get(endpoint) != version:
            package = sagemaker.describe_model_package(ModelPackageName=container["ModelPackageName"])
            data_url = package["InferenceSpecification"]["Containers"][0]["ModelDataUrl"]
            bucket, key = data_url.removeprefix("s3://").split("/", 1)
            archive = self.folder / f"{uuid.uuid4().hex}" / "model.tar.gz"
            archive.parent.mkdir(parents=True)
            self.aws("s3").download_file(bucket, key, str(archive))
            self.containers.deploy(endpoint, archive, version)
        return self.containers.describe(endpoint).url

    def drift_job(self, name: str) -> None:
        "Start a processing job that goes on until it is stopped."
        self.aws("sagemaker").create_processing_job(
            ProcessingJobName=name, RoleArn=ROLE, AppSpecification={"ImageUri": IMAGE},
            ProcessingResources={"ClusterConfig": {
                "InstanceCount": 1, "InstanceType": "ml.m5.large", "VolumeSizeInGB": 30}})
        backend(self).processing_jobs[name].processing_job_status = "InProgress"

    def settle(self, seconds: float = 0) -> None:
        "End all updates, as if time had passed; tests pass this as `pause`."
        for name, config in self.pending.items():
            endpoint = backend(self).endpoints[name]
            endpoint.endpoint_status, endpoint.failure_reason = "InService", self.alarmed.get(name)
            endpoint.endpoint_config_name = endpoint.endpoint_config_name if name in self.alarmed else config
        self.pending.clear()

    def capture(self, endpoint: str, content_type: str, body: bytes, answer: bytes, custom: list[str]) -> None:
        "Record a request with its custom attributes, and its answer, as SageMaker does."
        sent = {"observedContentType": content_type, "mode": "INPUT", "encoding": "BASE64",
                "data": base64.b64encode(body).decode()}
        got = {"observedContentType": "application/json", "mode": "OUTPUT", "encoding": "JSON", "data": answer.decode()}
        if content_type == "application/json":
            sent |= {"encoding": "JSON", "data": body.decode()}
        when = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self.captured.setdefault(endpoint, []).append({
            "captureData": {"endpointInput": sent, "endpointOutput": got},
            "eventMetadata": {"eventId": str(uuid.uuid4()), "inferenceTime": when,
                              **({"customAttributes": custom} if custom else {})}, "eventVersion": "0"})

    def flush(self, endpoint: str, instances: int = 1) -> None:
        "Write the captured requests to S3, as so many instances would that share the traffic."
        name = self.aws("sagemaker").describe_endpoint(EndpointName=endpoint)["EndpointConfigName"]
        config = self.aws("sagemaker").describe_endpoint_config(EndpointConfigName=name)
        uri = config["DataCaptureConfig"]["DestinationS3Uri"]
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        entries, now = self.captured.pop(endpoint, []), datetime.now(UTC)
        for i in range(instances):
            key = f"{prefix}/{endpoint}/AllTraffic/{now:%Y/%m/%d/%H/%M-%S}-{i:03}-{uuid.uuid4()}.jsonl"
            lines = "".join(json.dumps(entry) + "\n" for entry in entries[i::instances])
            self.aws("s3").put_object(Bucket=bucket, Key=key, Body=lines.encode())


def create_group(name: str, settings: GroupSettings) -> None:
    "Create a Model Package Group, and the parameter with these settings."
    client("sagemaker").create_model_package_group(ModelPackageGroupName=name)
    client("ssm").put_parameter(Name=settings_parameter(name), Type="String", Overwrite=True,
                                Value=json.dumps(vars(settings)))


@contextmanager
def emulated(folder: Path):
    "Run the emulator during the block, and set the environment so that this process and its children call it."
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    cloud = Cloud("http://{}:{}".format(*server.get_host_and_port()), folder)
    before = dict(os.environ)
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        del os.environ[name]
    os.environ |= {"AWS_ENDPOINT_URL": cloud.url, "AWS_DEFAULT_REGION": REGION, "AWS_MAX_ATTEMPTS": "1",
                   "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true",
                   "AWS_CONFIG_FILE": str(folder / "none"), "AWS_SHARED_CREDENTIALS_FILE": str(folder / "none")}
    with moto_completed(cloud), calls_recorded(cloud):
        try:
            yield cloud
        finally:
            cloud.reset()
            server.stop()
            os.environ.clear()
            os.environ.update(before)


@contextmanager
def calls_recorded(cloud: Cloud):
    "Record each answered call of boto3 during the block, and check its request against the service's model."
    call = botocore.client.BaseClient._make_api_call

    def call_and_record(self, operation: str, params: dict):
        service = self.meta.service_model.service_name
        answer = call(self, operation, params)
        if hasattr(self, "uncounted"):
            return answer
        cloud.calls[service, xform_name(operation)] += 1
        problems = request_problems(service, operation, params)
        cloud.problems += [f"{service}.{operation}: {problem}" for problem in problems]
        return answer
    botocore.client.BaseClient._make_api_call = call_and_record
    try:
        yield
    finally:
        botocore.client.BaseClient._make_api_call = call


@contextmanager
def moto_completed(cloud: Cloud):
    "Give moto what it lacks during the block."
    responses = moto.sagemaker.responses.SageMakerResponse
    runtime = moto.sagemakerruntime.responses.SageMakerRuntimeResponse
    models = moto.sagemaker.models.SageMakerModelBackend
    scaling = moto.applicationautoscaling.responses.ApplicationAutoScalingResponse
    s3 = moto.s3.responses.S3Response
    additions = {
        (responses, "update_endpoint"): lambda self: update_endpoint(self, cloud),
        (responses, "create_model"): keeping_isolation(refusing_duplicates("create_model", "ModelName", "_models")),
        (responses, "list_models"): list_models,
        (responses, "create_endpoint"): refusing_duplicates("create_endpoint", "EndpointName", "endpoints"),
        (responses, "create_endpoint_config"): refusing_duplicates(
            "create_endpoint_config", "EndpointConfigName", "endpoint_configs"),
        (responses, "list_pipeline_execution_steps"): lambda self: list_steps(self, cloud),
        (responses, "delete_model_package"): delete_package,
        (responses, "delete_model_package_group"): delete_group,
        (responses, "stop_pipeline_execution"): stop_execution,
        (models, "update_model_package"): keeping_the_rest(models.update_model_package),
        (s3, "put_object"): racing(s3.put_object, cloud),
        **{(scaling, call): refusing(scaling, call, cloud) for call in (
            "register_scalable_target", "put_scaling_policy", "deregister_scalable_target")},
        (runtime, "invoke_endpoint"): lambda self: invoke_endpoint(self, cloud),
        (runtime, "use_raw_body"): True}
    before = {(owner, name): owner.__dict__.get(name) for owner, name in additions}
    for (owner, name), value in additions.items():
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
    if "UpdateEndpoint" in cloud.refused:
        raise AWSValidationException(cloud.refused["UpdateEndpoint"])
    if name not in found.endpoints or config not in found.endpoint_configs:
        raise AWSValidationException(f"Could not find endpoint {name} or configuration {config}.")
    if found.endpoints[name].endpoint_status != "InService":
        raise AWSValidationException(f"Cannot update in-progress endpoint {name!r}.")
    found.endpoints[name].endpoint_status = "Updating"
    cloud.pending[name] = config
    return ActionResult({"EndpointArn": found.endpoints[name].arn})


def delete_package(self):
    found, arn = self.sagemaker_backend, self._get_param("ModelPackageName")
    name = found.model_package_name_mapping.get(arn, arn)
    if name not in found.model_packages:
        raise AWSValidationException(f"Model package {arn} does not exist.")
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


def refusing_duplicates(method: str, parameter: str, attribute: str):
    "Return moto's method, with AWS's error for a name that exists."
    real = getattr(moto.sagemaker.responses.SageMakerResponse, method)

    def create(self):
        name = self._get_param(parameter)
        if name in getattr(self.sagemaker_backend, attribute):
            kind = parameter.removesuffix("Name").lower()
            raise AWSValidationException(f"Cannot create already existing {kind} {name!r}.")
        return real(self)
    return create


def keeping_isolation(create):
    "Return moto's create_model, so that it keeps what the request says of the network."
    def create_model(self):
        answer = create(self)
        model = self.sagemaker_backend._models[self._get_param("ModelName")]
        model.enable_network_isolation = bool(self._get_param("EnableNetworkIsolation"))
        return answer
    return create_model


def list_models(self):
    part = self._get_param("NameContains") or ""
    return ActionResult({"Models": [model.response_object for model in self.sagemaker_backend.list_models()
                                    if part in model.model_name]})


def refusing(owner, call: str, cloud: Cloud):
    "Return moto's method, which is refused when the test says so."
    real = getattr(owner, call)

    def method(self):
        if call in cloud.refused:
            raise JsonRESTError("AccessDeniedException", cloud.refused[call])
        return real(self)
    return method


class Conflict(S3ClientError):
    code = "ConditionalRequestConflict"

    def __init__(self):
        super().__init__("The conditional request cannot succeed due to a conflicting operation against this resource.")


def racing(real, cloud: Cloud):
    "Return moto's put_object, which answers as in a race while the test says so."
    def put_object(self):
        if cloud.races and ("If-Match" in self.headers or "If-None-Match" in self.headers):
            cloud.races -= 1
            raise Conflict
        return real(self)
    return put_object


def keeping_the_rest(real):
    "Return moto's update_model_package, so that it keeps what the request leaves out."
    def update(self, model_package_arn, model_approval_status, approval_description, customer_metadata_properties,
               *rest, **more):
        status, description, metadata = model_approval_status, approval_description, customer_metadata_properties
        name = self.model_package_name_mapping.get(model_package_arn, model_package_arn)
        if found := self.model_packages.get(name):
            status = status or found.model_approval_status
            description = found.approval_description if description is None else description
            metadata = {**(found.customer_metadata_properties or {}), **(metadata or {})}
        return real(self, model_package_arn, status, description, metadata, *rest, **more)
    return update


def list_steps(self, cloud: Cloud):
    return ActionResult({"PipelineExecutionSteps": cloud.steps.get(self._get_param("PipelineExecutionArn"), [])})


def invoke_endpoint(self, cloud: Cloud):
    "Pass the body to a container, and wrap an answer other than 2xx in an error, as SageMaker's runtime does."
    endpoint = re.search(r"/endpoints/([^/]+)/invocations", self.uri)[1]
    content_type, body = self.headers.get("Content-Type", ""), bytes(self.raw_body or b"")
    custom = {k: v for k, v in self.headers.items() if k.lower() == "x-amzn-sagemaker-custom-attributes"}
    try:
        request = urllib.request.Request(
            f"{cloud.container(endpoint)}/invocations", body, {"Content-Type": content_type, **custom})
    except botocore.exceptions.ClientError:
        message = f"Endpoint {endpoint} of account 123456789012 not found."
        return error_answer(400, "ValidationError", {"Message": message})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            answer = reply.read()
    except urllib.error.HTTPError as e:
        return error_answer(424, "ModelError", {
            "Message": f"Received status {e.code} from primary", "OriginalStatusCode": e.code,
            "OriginalMessage": e.read().decode(), "LogStreamArn": ""})
    cloud.capture(endpoint, content_type, body, answer, [*custom.values()])
    return 200, {"Content-Type": "application/json", "x-Amzn-Invoked-Production-Variant": "AllTraffic"}, answer


def error_answer(status: int, code: str, body: dict):
    headers = {"Content-Type": "application/json", "x-amzn-ErrorType": code, "status": status}
    return status, headers, json.dumps(body)


@pytest.fixture(scope="module")
def cloud_once(tmp_path_factory):
    "Start one emulator for all tests of a module."
    with emulated(tmp_path_factory.mktemp("cloud")) as cloud:
        yield cloud


@pytest.fixture
def cloud(cloud_once):
    "Return an emulator without any resources; afterwards all requests of the test must have been valid."
    yield cloud_once
    assert cloud_once.problems == [], cloud_once.problems
    cloud_once.reset()
