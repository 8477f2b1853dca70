"""What a deployment meets in an account and moto lacks: stacks that fail, builds that end, quotas, taken names.

`stacks(cloud)` completes the emulator `cloud` for the block. It stands in for the following, and so leaves unproven:

* CloudFormation's change sets keep ImportExistingResources (moto drops it). An existing bucket or repository is taken
  in with it, and refused without it, or where the resource would be deleted with its stack; AWS has more conditions,
  and asks for the resource's present state. A stack named in `fails` fails as a whole and is rolled back; in AWS single
  resources fail, and a rollback can fail too. DeletionPolicy RetainExceptOnCreate keeps the resource, as it does in AWS
  after a creation. A resource that is gone already does not stop the deletion of its stack (moto fails there).
* Resources of CodeBuild::Project can be built, and no other property of them is read. moto makes only some kinds of
  resource: no pipeline, no group, no alarm and no CodePipeline comes into being, and no role is checked.
* CodeBuild: a build reads its archive and its variables, goes through phases, and puts images into the repository, or
  fails where `build_fails` says so. Nothing is built: neither buildspec nor Dockerfile is run, and no layer is pushed.
* Service Quotas lists `quotas` (moto lacks ListServiceQuotas and has defaults of one service only), or refuses.
* HeadBucket answers 403 for the buckets in `foreign`.
"""
import io
import json
import time
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, field

import moto.cloudformation.models
import moto.cloudformation.parsing
import moto.cloudformation.responses
import moto.codebuild.responses
import moto.s3.models
import moto.s3.responses
import moto.servicequotas.responses
from cloud import REGION, Cloud
from moto.codebuild.models import codebuild_backends
from moto.core.exceptions import JsonRESTError
from moto.core.responses import ActionResult
from moto.ecr.models import ECRBackend

ENOUGH = {  # an account in which a deployment with the default options has room
    "ml.m5.large for endpoint usage": 10.0, "ml.m5.xlarge for training job usage": 1.0,
    "ml.m5.xlarge for spot training job usage": 1.0, "ml.m5.xlarge for processing job usage": 1.0,
    "ml.m5.large for processing job usage": 2.0, "Concurrently running builds for Linux/Small environment": 1.0,
    "Concurrently running builds for Linux/Medium environment": 1.0,
    "Concurrently running builds for Linux/Large environment": 1.0}
PHASES = ("QUEUED", "PROVISIONING", "BUILD", "COMPLETED")


@dataclass
class Stacks:
    "What a test sets beforehand, and what it may look at afterwards."
    cloud: Cloud
    quotas: dict[str, float] = field(default_factory=lambda: dict(ENOUGH))
    quotas_denied: bool = False
    build_fails: bool = False
    build_pushes: tuple[str, ...] = ("steps", "serve")
    base: str = "0123456789ab"  # how the digest of the images' base begins
    build_hangs: bool = False
    build_never_stops: bool = False
    fails: dict[str, tuple[str, str]] = field(default_factory=dict)  # stack: the resource, and the reason
    foreign: set[str] = field(default_factory=set)
    change_sets: list[dict] = field(default_factory=list)  # requests
    builds: dict[str, dict] = field(default_factory=dict)

    def images(self, name: str = "intel-nb") -> set[str]:
        "Return the tags in the repository."
        found = self.cloud.aws("ecr").list_images(repositoryName=name)["imageIds"]
        return {one["imageTag"] for one in found}


@contextmanager
def stacks(cloud: Cloud):
    "Give moto what a deployment needs during the block."
    state = Stacks(cloud)
    formation = moto.cloudformation.responses.CloudFormationResponse
    backend, parsing = moto.cloudformation.models.CloudFormationBackend, moto.cloudformation.parsing.ResourceMap
    builds, quotas = moto.codebuild.responses.CodeBuildResponse, moto.servicequotas.responses.ServiceQuotasResponse
    buckets = moto.s3.responses.S3Response
    additions = {
        (formation, "create_change_set"): recording(state, formation.create_change_set),
        (backend, "execute_change_set"): executing(state, backend.execute_change_set),
        (parsing, "delete"): keeping(state, parsing.delete),
        (builds, "start_build"): lambda self: start_build(self, state),
        (builds, "batch_get_builds"): lambda self: batch_get_builds(self, state),
        (builds, "list_builds_for_project"): lambda self: list_builds(self, state),
        (builds, "stop_build"): lambda self: stop_build(self, state),
        (quotas, "list_service_quotas"): lambda self: list_quotas(self, state),
        (quotas, "list_aws_default_service_quotas"): lambda self: json.dumps({"Quotas": []}),
        (buckets, "head_bucket"): refusing(state, buckets.head_bucket),
    }
    before = {(owner, name): owner.__dict__.get(name) for owner, name in additions}
    for (owner, name), value in additions.items():
        setattr(owner, name, value)
    try:
        yield state
    finally:
        for (owner, name), value in before.items():
            delattr(owner, name) if value is None else setattr(owner, name, value)


# -- CloudFormation

def recording(state: Stacks, real):
    "Return moto's create_change_set, so that it keeps the request."
    def create(self):
        names = ("StackName", "ChangeSetType", "TemplateURL", "TemplateBody")
        asked = {name: self._get_param(name) for name in names}
        asked["ImportExistingResources"] = self._get_bool_param("ImportExistingResources", False)
        state.change_sets.append(asked)
        return real(self)
    return create


def executing(state: Stacks, real):
    "Return moto's execute_change_set, so that existing resources are taken in or refused, and a stack may fail."
    def execute(self, change_set_name, stack_name=None):
        found = self.describe_change_set(change_set_name)
        stack = self.stacks[found.stack_id]
        asked = [one for one in state.change_sets if one["StackName"] == stack.name][-1]
        failure = state.fails.get(stack.name) or collision(state.cloud, found, asked["ImportExistingResources"])
        if failure:
            return roll_back(stack, found, *failure)
        with adopting(asked["ImportExistingResources"]):
            real(self, change_set_name, stack_name)
        for one in found.template_dict["Resources"].values():
            if one["Type"] == "AWS::CodeBuild::Project":
                projects().setdefault(one["Properties"]["Name"], None)
        return None
    return execute


def projects() -> dict:
    return codebuild_backends["123456789012"][REGION].codebuild_projects


def collision(cloud: Cloud, found, imports: bool) -> tuple[str, str] | None:
    "Return the resource of a new stack whose name is taken, and CloudFormation's words for it."
    if found.change_set_type != "CREATE":
        return None
    buckets = {one["Name"] for one in cloud.aws("s3").list_buckets()["Buckets"]}
    images = {one["repositoryName"] for one in cloud.aws("ecr").describe_repositories()["repositories"]}
    for key, one in found.template_dict["Resources"].items():
        taken = one["Properties"].get("BucketName") in buckets or one["Properties"].get("RepositoryName") in images
        name = one["Properties"].get("BucketName") or one["Properties"].get("RepositoryName")
        if taken and isinstance(name, str) and not (imports and one.get("DeletionPolicy", "").startswith("Retain")):
            return key, f"{name} already exists"
    return None


def roll_back(stack, found, resource: str, reason: str) -> None:
    from moto.cloudformation.models import Event
    kind = found.change_set_type
    stack.events.append(Event(stack.stack_id, stack.name, resource, "", "", f"{kind}_FAILED", reason, None))
    stack.status = "ROLLBACK_COMPLETE" if kind == "CREATE" else "UPDATE_ROLLBACK_COMPLETE"


@contextmanager
def adopting(imports: bool):
    "Let a stack take in a bucket or a repository that exists, when it asked for that."
    create_bucket, create_repository = moto.s3.models.S3Backend.create_bucket, ECRBackend.create_repository

    def bucket(self, name, region_name):
        return self.buckets[name] if name in self.buckets else create_bucket(self, name, region_name)

    def repository(self, repository_name, *rest, **more):
        known = self.repositories.get(repository_name)
        return known or create_repository(self, repository_name, *rest, **more)
    if imports:
        moto.s3.models.S3Backend.create_bucket, ECRBackend.create_repository = bucket, repository
    try:
        yield
    finally:
        moto.s3.models.S3Backend.create_bucket, ECRBackend.create_repository = create_bucket, create_repository


def keeping(state: Stacks, real):
    "Return moto's deletion of a stack's resources, so that those with a policy Retain… stay, and absent ones may be."
    def delete(self):
        for one in self._resource_json_map.values():
            kept = one.get("DeletionPolicy", "").startswith("Retain")
            if one["Type"] == "AWS::CodeBuild::Project":
                projects().pop(one["Properties"]["Name"], None)
            if one["Type"] == "AWS::ECR::Repository" and not kept:
                delete_repository(state, one["Properties"])
            if kept or one["Type"] == "AWS::ECR::Repository":
                one["DeletionPolicy"] = "Retain"  # for moto, which knows no other
        return real(self)
    return delete


def delete_repository(state: Stacks, properties: dict) -> None:
    "Delete a repository as CloudFormation does: one with images only where EmptyOnDelete says so."
    ecr = state.cloud.aws("ecr")
    if properties["RepositoryName"] in {one["repositoryName"] for one in ecr.describe_repositories()["repositories"]}:
        ecr.delete_repository(repositoryName=properties["RepositoryName"], force=properties.get("EmptyOnDelete", False))


# -- CodeBuild

def start_build(self, state: Stacks):
    name = self._get_param("projectName")
    if name not in self.codebuild_backend.codebuild_projects:
        raise JsonRESTError("ResourceNotFoundException", f"Project cannot be found: {name}")
    bucket, _, key = self._get_param("sourceLocationOverride").partition("/")
    archive = state.cloud.aws("s3").get_object(Bucket=bucket, Key=key)["Body"].read()
    id_ = f"{name}:{len(state.builds) + 1:08}"
    state.builds[id_] = {
        "id": id_, "projectName": name, "buildStatus": "IN_PROGRESS", "currentPhase": PHASES[0], "phases": [],
        "environment": {"type": "LINUX_CONTAINER", "image": "x", "computeType": "BUILD_GENERAL1_MEDIUM",
                        "environmentVariables": self._get_param("environmentVariablesOverride")},
        "source": {"type": "S3", "location": f"{bucket}/{key}"}}
    state.builds[id_]["logs"] = {"groupName": f"/aws/codebuild/{name}", "streamName": id_.replace(":", "-")}
    assert "Dockerfile" in zipfile.ZipFile(io.BytesIO(archive)).namelist()
    return ActionResult({"build": state.builds[id_]})


def list_builds(self, state: Stacks):
    name = self._get_param("projectName")
    if name not in self.codebuild_backend.codebuild_projects:
        raise JsonRESTError("ResourceNotFoundException", f"The provided project {name} does not exist")
    return ActionResult({"ids": [id_ for id_, one in reversed(state.builds.items()) if one["projectName"] == name]})


def batch_get_builds(self, state: Stacks):
    "Return the builds; each look moves a running one to its next phase."
    found = [state.builds[id_] for id_ in self._get_param("ids") if id_ in state.builds]
    answer = [dict(one) for one in found]
    for one in found:
        if one["buildStatus"] == "IN_PROGRESS" and not state.build_hangs:
            one["currentPhase"] = PHASES[PHASES.index(one["currentPhase"]) + 1]
            if one["currentPhase"] == PHASES[-1]:
                end_build(one, state)
    return ActionResult({"builds": answer})


def end_build(build: dict, state: Stacks) -> None:
    "Put the images of a build into the repository, or let it fail with a log."
    variables = {one["name"]: one["value"] for one in build["environment"]["environmentVariables"]}
    repository = build["projectName"].removesuffix("-image")
    if state.build_fails:
        reason = {"message": "Error while executing command: docker build", "statusCode": "COMMAND_EXECUTION_ERROR"}
        build["buildStatus"] = "FAILED"
        build["phases"] = [{"phaseType": "BUILD", "phaseStatus": "FAILED", "contexts": [reason]}]
        return write_log(build["logs"], ["Step 3/12", "ERROR: no space left on device"], state)
    for target in state.build_pushes:
        tag = f"{target}-{variables['TAG']}-{state.base}"
        if tag not in state.images(repository):
            manifest = {"schemaVersion": 2, "layers": [{"digest": tag}],
                        "mediaType": "application/vnd.docker.distribution.manifest.v2+json"}
            state.cloud.aws("ecr").put_image(
                repositoryName=repository, imageManifest=json.dumps(manifest), imageTag=tag)
    build["buildStatus"] = "SUCCEEDED"
    return None


def write_log(place: dict, lines: list[str], state: Stacks) -> None:
    logs, names = state.cloud.aws("logs"), {"logGroupName": place["groupName"], "logStreamName": place["streamName"]}
    known = logs.describe_log_groups(logGroupNamePrefix=place["groupName"])["logGroups"]
    if not known:
        logs.create_log_group(logGroupName=place["groupName"])
    logs.create_log_stream(**names)
    events = [{"timestamp": int(time.time() * 1000) + i, "message": line} for i, line in enumerate(lines)]
    logs.put_log_events(**names, logEvents=events)


def stop_build(self, state: Stacks):
    build = state.builds[self._get_param("id")]
    if not state.build_never_stops:
        build["buildStatus"] = "STOPPED"
    return ActionResult({"build": build})


# -- quotas and buckets

def list_quotas(self, state: Stacks):
    if state.quotas_denied:
        raise JsonRESTError("AccessDeniedException", "User is not authorized to list quotas")
    service = "codebuild" if json.loads(self.body)["ServiceCode"] == "codebuild" else "sagemaker"
    found = [{"ServiceCode": service, "QuotaName": name, "QuotaCode": f"L-{i:08X}", "Value": value}
             for i, (name, value) in enumerate(state.quotas.items()) if ("builds" in name) == (service == "codebuild")]
    return json.dumps({"Quotas": found})


def refusing(state: Stacks, real):
    "Return moto's head_bucket, with S3's answer for a bucket of another account."
    def head_bucket(self):
        return (403, {}, "") if self.bucket_name in state.foreign else real(self)
    return head_bucket
