"""Putting both stacks into an account and out again, from every state in which a deployment may have been left."""
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from cloud import emulated
from cloud_stack import stacks

from intel_nb.aws.client import client, request_problems
from intel_nb.aws.deploy import StackError, deploy_stack, destroy_stack, find_stack, list_buckets
from intel_nb.aws.stack import ACCOUNT, Options, base_template, template
from intel_nb.aws.state import STAGES
from intel_nb.storage import InputError

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="code is deployed from a clone")

DEFAULTS = Options()
SMALL = {"Version": "2020-12-01", "Parameters": [], "Steps": []}
DATA, CODE = (f"intel-nb-{kind}-{ACCOUNT}-us-east-1" for kind in ("data", "code"))


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    with emulated(tmp_path_factory.mktemp("cloud")) as cloud:
        yield cloud


@pytest.fixture
def aws(emulator):
    "An account without anything in it; afterwards all requests must have had the form that the service takes."
    with stacks(emulator) as state:
        yield state
    problems, emulator.problems = emulator.problems, []
    emulator.reset()
    assert problems == []


def no_pause(seconds: float) -> None:
    "Wait for nothing: the emulator's time does not pass."


def deploy(options: Options = DEFAULTS, ask=lambda question: True, say=None, rebuild: bool = False) -> bool:
    return deploy_stack(options, ask=ask, say=say or (lambda line: None), pause=no_pause, definition=SMALL,
                        rebuild=rebuild)


def destroy(options: Options = DEFAULTS, say=None, **more) -> bool:
    return destroy_stack(options, ask=lambda question: True, say=say or (lambda line: None), pause=no_pause, **more)


def keys(bucket: str) -> list[str]:
    return [one["Key"] for one in client("s3").list_objects_v2(Bucket=bucket).get("Contents", [])]


# -- deploying

def test_a_deployment_goes_through_its_parts_in_order(aws):
    said: list[str] = []
    assert deploy(say=said.append)
    phases = [line.split()[0] for line in said if re.match(r"(preflight|stack|code|image|logs|data) ", line)]
    assert list(dict.fromkeys(phases)) == ["preflight", "stack", "code", "image", "logs", "data"]
    assert {find_stack(name)["StackStatus"] for name in ("intel-nb", "intel-nb-base")} == {"CREATE_COMPLETE"}
    assert {key for key in keys(CODE) if "/" not in key} == {"modelbuild.zip", "modeldeploy.zip"}
    assert [line for line in said if "about 20 minutes" in line], "each wait says how long it is"
    tag = next(iter(aws.builds.values()))["environment"]["environmentVariables"][0]["value"]
    assert aws.images() == {f"steps-{tag}-{aws.base}", f"serve-{tag}-{aws.base}"}


def test_the_stack_names_the_images_by_digest(aws):
    assert deploy()
    body = client("cloudformation").get_template(StackName="intel-nb")["TemplateBody"]
    text = body if isinstance(body, str) else json.dumps(body)
    for tag in aws.images():
        digest = client("ecr").describe_images(repositoryName="intel-nb", imageIds=[{"imageTag": tag}])
        assert digest["imageDetails"][0]["imageDigest"] in text
        assert tag not in text


WORK = ("start_build", "put_object", "execute_change_set", "put_retention_policy", "create_bucket",
        "create_log_group", "start_pipeline_execution")


def test_a_second_deployment_starts_nothing(aws, emulator):
    assert deploy()
    before, said = emulator.calls.copy(), []
    assert deploy(ask=lambda question: pytest.fail(f"there is nothing to ask, but: {question}"), say=said.append)
    made = {method for (service, method), count in emulator.calls.items() if count > before[service, method]}
    # the large template is put into its bucket to be compared; a group that exists is asked for and refused
    assert made & {*WORK} - {"put_object"} == set()
    assert emulator.calls["s3", "put_object"] - before["s3", "put_object"] <= 1
    assert sum("is up to date" in line for line in said) == 4 and any("is built already" in line for line in said)


@pytest.mark.parametrize("refused, left", [("intel-nb-base", (None, None)), ("intel-nb", ("CREATE_COMPLETE", None))])
def test_a_refused_deployment_goes_on_from_where_it_stopped(aws, refused, left):
    def refuse(question: str) -> bool:
        return not question.endswith(f"the stack {refused}?")
    assert deploy(ask=refuse) is False
    found = [find_stack(name) for name in ("intel-nb-base", "intel-nb")]
    assert tuple(stack and stack["StackStatus"] for stack in found) == left
    builds = len(aws.builds)
    assert deploy() and find_stack("intel-nb")["StackStatus"] == "CREATE_COMPLETE"
    assert len(aws.builds) == max(builds, 1), "what was built is not built again"


def test_images_that_are_given_are_not_built(aws):
    registry = f"{ACCOUNT}.dkr.ecr.us-east-1.amazonaws.com/other"
    said: list[str] = []
    assert deploy(Options(image_steps=f"{registry}@sha256:{'1' * 64}", image_serve=f"{registry}@sha256:{'2' * 64}"),
                  say=said.append)
    assert aws.builds == {} and any("as given" in line for line in said)


def test_a_large_template_goes_through_a_bucket_of_its_own(aws):
    from intel_nb.aws.changes import apply_template
    topics = {f"Topic{i}": {"Type": "AWS::SNS::Topic", "Properties": {"TopicName": f"{'x' * 200}{i}"}}
              for i in range(250)}
    large = {"AWSTemplateFormatVersion": "2010-09-09", "Resources": topics}
    assert apply_template(Options(), "intel-nb", large, lambda question: True, lambda line: None, no_pause)
    asked = aws.change_sets[-1]
    bucket = f"intel-nb-template-{ACCOUNT}-us-east-1"
    assert asked["TemplateURL"].startswith(f"https://{bucket}.s3.us-east-1.amazonaws.com/") and keys(bucket) == []
    small = {"Resources": {"Topic": {"Type": "AWS::SNS::Topic", "Properties": {}}}}
    assert apply_template(Options(), "intel-nb", small, lambda question: False, lambda line: None, no_pause) is False
    assert aws.change_sets[-1]["TemplateBody"] and not aws.change_sets[-1]["TemplateURL"]


@pytest.mark.parametrize("stack", ["intel-nb-base", "intel-nb"])
def test_an_error_of_cloudformation_is_named(aws, stack):
    aws.fails[stack] = ("DataBucket", "the name is taken")
    with pytest.raises(StackError, match=f"the stack {stack} is ROLLBACK_COMPLETE: DataBucket: the name is taken"):
        deploy()
    aws.fails.clear()
    builds, said = len(aws.builds), []
    assert deploy(say=said.append), "the stack that failed is removed, and what stands stays"
    assert any(f"the stack {stack} could not be made (DataBucket: the name is taken)" in line for line in said)
    assert len(aws.builds) == max(builds, 1)


def test_a_failed_stack_is_removed_only_when_a_person_agrees(aws):
    aws.fails["intel-nb"] = ("DataBucket", "the name is taken")
    with pytest.raises(StackError):
        deploy()
    aws.fails.clear()
    assert deploy(ask=lambda question: not question.startswith("Remove")) is False
    assert find_stack("intel-nb")["StackStatus"] == "ROLLBACK_COMPLETE"


def test_a_no_leaves_what_another_has_made_meanwhile(aws):
    from intel_nb.aws.changes import ChangeSet, create_change_set, discard_change_set, execute_change_set
    made = {"Resources": {"Topic": {"Type": "AWS::SNS::Topic", "Properties": {}}}}
    proposed = create_change_set(Options(), "intel-nb", made, lambda seconds: None)
    execute_change_set(proposed, lambda seconds: None)
    more = {"Resources": made["Resources"] | {"Other": {"Type": "AWS::SNS::Topic", "Properties": {}}}}
    another = create_change_set(Options(), "intel-nb", more, lambda seconds: None)  # moto has lost the first one by now
    discard_change_set(ChangeSet(another.arn, "intel-nb", "CREATE", []), lambda seconds: None)
    assert find_stack("intel-nb")["StackStatus"] == "CREATE_COMPLETE"


# -- the image

def test_a_build_that_fails_is_shown_with_the_end_of_its_log(aws):
    aws.build_fails = True
    said: list[str] = []
    with pytest.raises(StackError, match="(?s)the image was not built: failed in build Error while.*no space left"):
        deploy(say=said.append)
    assert any(line.split() == ["image", "provisioning"] for line in said), "its phases are shown"
    assert find_stack("intel-nb") is None
    aws.build_fails = False
    assert deploy() and len(aws.builds) == 2


def test_a_build_that_ends_well_without_an_image_is_an_error(aws):
    aws.build_pushes = ("serve",)
    with pytest.raises(StackError, match="has no images [0-9a-f]{16} for jobs and for endpoints"):
        deploy()
    aws.build_pushes = ("steps", "serve")
    assert deploy()


def digests(aws) -> dict[str, str]:
    "The digests of the images that the stack names, by target, as it has them."
    body = client("cloudformation").get_template(StackName="intel-nb")["TemplateBody"]
    text = body if isinstance(body, str) else json.dumps(body)
    found = {tag: client("ecr").describe_images(repositoryName="intel-nb", imageIds=[{"imageTag": tag}])
             for tag in aws.images()}
    return {tag: one["imageDetails"][0]["imageDigest"] for tag, one in found.items()
            if one["imageDetails"][0]["imageDigest"] in text}


def test_a_new_base_is_taken_when_somebody_asks_for_it(aws):
    assert deploy()
    first, aws.base = digests(aws), "fedcba987654"
    assert deploy() and len(aws.builds) == 1 and digests(aws) == first, "a deployment alone changes nothing"
    assert deploy(rebuild=True) and len(aws.builds) == 2
    assert len(first) == 2 and set(digests(aws)) == {tag.replace("0123456789ab", aws.base) for tag in first}
    assert set(first) < aws.images(), "the old ones stay, and may be gone back to"


def test_a_rebuild_on_the_same_base_changes_nothing(aws):
    assert deploy()
    before, said = aws.images(), []
    assert deploy(ask=lambda question: pytest.fail(f"there is nothing to ask, but: {question}"), say=said.append,
                  rebuild=True)
    assert aws.images() == before and any("the base image is the same" in line for line in said)


def test_a_build_that_runs_already_is_watched_and_not_started_again(aws):
    aws.build_hangs = True
    with pytest.raises(StackError, match="has not ended after 90 minutes; it goes on"):
        deploy()
    aws.build_hangs, said = False, []
    assert deploy(say=said.append)
    assert len(aws.builds) == 1 and any("builds" in line and "already" in line for line in said)


def test_an_image_needs_a_checkout(aws, monkeypatch, tmp_path):
    import intel_nb
    from intel_nb.aws.image import checkout_folder
    monkeypatch.setattr(intel_nb, "__file__", str(tmp_path / "site-packages" / "intel_nb" / "__init__.py"))
    with pytest.raises(InputError, match="is no checkout of intel-nb.*run this in a checkout"):
        checkout_folder()


def test_what_the_dockerfile_copies_is_in_the_archive():
    from intel_nb.aws.image import image_files
    files = image_files(ROOT)
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        words = line.split()
        if words[:1] == ["COPY"] and "--from=" not in line:
            for source in [word for word in words[1:-1] if not word.startswith("--")]:
                pattern = re.escape(source).replace(r"\?", "[^/]").replace(r"\*", "[^/]*")
                assert [name for name in files if re.match(f"{pattern}(/|$)", name)], source


# -- what the account lacks

def test_all_that_is_too_small_is_said_at_once(aws):
    aws.quotas |= {"ml.m5.large for endpoint usage": 4.0, "ml.m5.xlarge for training job usage": 0.0,
                   "Concurrently running builds for Linux/Medium environment": 0.0}
    with pytest.raises(InputError) as refused:
        deploy()
    lines = str(refused.value).splitlines()
    assert lines[0] == "intel-nb cannot be deployed yet:" and len(lines) == 4
    assert "'ml.m5.large for endpoint usage' is 4, and has to be 10" in lines[1]
    assert "ask for 10 at https://us-east-1.console.aws.amazon.com/servicequotas/home/services/sagemaker/" in lines[1]
    assert "/services/codebuild/" in lines[3]
    assert aws.change_sets == [], "nothing was made"


def test_quotas_that_cannot_be_read_are_said_and_passed_over(aws):
    aws.quotas_denied = True
    said: list[str] = []
    assert deploy(say=said.append)
    assert sum("cannot be read (AccessDenied" in line for line in said) == 1


def test_a_quota_that_is_not_listed_is_said(aws):
    del aws.quotas["ml.m5.large for endpoint usage"]
    said: list[str] = []
    assert deploy(say=said.append)
    assert sum("'ml.m5.large for endpoint usage' is not in the account's list" in line for line in said) == 1


def test_needs_follow_the_options():
    from intel_nb.aws.preflight import quota_needs
    options = Options(instance_serve="ml.c5.large", instance_train="ml.g5.xlarge", spot=True, watch=STAGES)
    needs = {need.quota: need.needed for need in quota_needs(options)}
    assert needs == {"ml.c5.large for endpoint usage": 10, "ml.g5.xlarge for spot training job usage": 1,
                     "ml.m5.xlarge for processing job usage": 1, "ml.m5.large for processing job usage": 2}


def test_names_that_are_taken_are_said_at_once(aws):
    aws.foreign.add(DATA)
    client("sagemaker").create_model_package_group(ModelPackageGroupName="intel-nb")
    client("s3").create_bucket(Bucket=CODE)
    said: list[str] = []
    with pytest.raises(InputError) as refused:
        deploy(say=said.append)
    assert f"Bucket {DATA} belongs to another account" in str(refused.value)
    assert "ModelPackageGroup intel-nb exists already and belongs to no stack" in str(refused.value)
    assert any(f"Bucket {CODE} exists, and is taken in" in line for line in said)
    assert aws.change_sets == []


# -- removing

def leave_endpoint(name: str = "intel-nb", stage: str = "staging") -> str:
    "An endpoint that serves, with its configuration and its model, of which no note is kept."
    endpoint, sagemaker = f"{name}-{stage}", client("sagemaker")
    container = {"Image": f"{ACCOUNT}.dkr.ecr.us-east-1.amazonaws.com/x:1", "ModelDataUrl": "s3://x/model.tar.gz"}
    sagemaker.create_model(ModelName=f"{name}-v1-0123abcd", Containers=[container],
                           ExecutionRoleArn=f"arn:aws:iam::{ACCOUNT}:role/x")
    variant = {"VariantName": "AllTraffic", "ModelName": f"{name}-v1-0123abcd", "InstanceType": "ml.m5.large",
               "InitialInstanceCount": 1}
    sagemaker.create_endpoint_config(EndpointConfigName=f"{endpoint}-v1-0123abcd", ProductionVariants=[variant])
    sagemaker.create_endpoint(EndpointName=endpoint, EndpointConfigName=f"{endpoint}-v1-0123abcd")
    return endpoint


def start_jobs(*names: str) -> None:
    machine = {"InstanceCount": 1, "InstanceType": "ml.m5.large", "VolumeSizeInGB": 30}
    for name in names:
        client("sagemaker").create_processing_job(
            ProcessingJobName=name, ProcessingResources={"ClusterConfig": machine},
            AppSpecification={"ImageUri": f"{ACCOUNT}.dkr.ecr.us-east-1.amazonaws.com/x:1"},
            RoleArn=f"arn:aws:iam::{ACCOUNT}:role/x")


def nothing_is_left(name: str = "intel-nb") -> bool:
    from intel_nb.aws.deploy import list_assets, running_work
    return list_assets(Options(name=name)) == [] and running_work(name) == []


def test_a_removal_leaves_nothing_whatever_was_there(aws):
    deploy()
    leave_endpoint()
    client("sagemaker").create_model_package_group(ModelPackageGroupName="intel-nb")
    client("sagemaker").create_model_package(ModelPackageGroupName="intel-nb", ModelApprovalStatus="Approved")
    client("ssm").put_parameter(Name="/intel-nb/settings", Value="{}", Type="String", Overwrite=True)
    said: list[str] = []
    assert destroy(say=said.append)
    assert nothing_is_left()
    sagemaker = client("sagemaker")
    assert (sagemaker.list_endpoints()["Endpoints"], sagemaker.list_models()["Models"],
            sagemaker.list_endpoint_configs()["EndpointConfigs"],
            sagemaker.list_model_package_groups()["ModelPackageGroupSummaryList"]) == ([], [], [], [])
    assert client("ssm").describe_parameters()["Parameters"] == []
    assert client("s3").list_buckets()["Buckets"] == [] and client("ecr").describe_repositories()["repositories"] == []
    assert any("intel-nb-staging" in line for line in said), "what is lost was shown"
    said.clear()
    assert destroy_stack(Options(), ask=lambda q: pytest.fail("there is nothing to ask"), say=said.append)
    assert said == ["nothing is left of intel-nb"]


def test_a_removal_that_nobody_agrees_to_changes_nothing(aws):
    deploy()
    said: list[str] = []
    assert destroy_stack(Options(), say=said.append, pause=no_pause) is False
    assert len(list_buckets(Options())) > 3 and find_stack("intel-nb")
    assert any(DATA in line and "object versions" in line for line in said)


# after which of its steps; the slow ones differ in what is left alone
@pytest.mark.parametrize("last", [one if one in (3, 6) else pytest.param(one, marks=pytest.mark.slow)
                                  for one in range(12)])
def test_a_removal_that_was_cut_off_is_finished_by_the_next(aws, last):
    from intel_nb.aws.deploy import removal_steps
    deploy()
    leave_endpoint()
    client("sagemaker").create_model_package_group(ModelPackageGroupName="intel-nb")
    for i, (_, work) in enumerate(removal_steps(Options(), lambda line: None, no_pause, ())):
        if i == last:
            break
        work()
    assert destroy() and nothing_is_left()
    assert deploy(), "and all names are free again"


@pytest.mark.parametrize("gone", ["all but the stacks", *(pytest.param(one, marks=pytest.mark.slow) for one in (
    "base stack", "stack", "buckets", "repository"))])
def test_a_removal_does_not_mind_what_is_gone(aws, gone):
    deploy()
    if gone == "stack":
        client("cloudformation").delete_stack(StackName="intel-nb")
    if gone == "base stack":
        client("cloudformation").delete_stack(StackName="intel-nb-base")
    if gone in ("buckets", "all but the stacks"):
        from intel_nb.aws.changes import delete_bucket
        for name in list_buckets(Options()):
            delete_bucket(name)
    if gone in ("repository", "all but the stacks"):
        client("ecr").delete_repository(repositoryName="intel-nb", force=True)
    assert destroy() and nothing_is_left()


def test_a_wait_for_what_does_not_stop_ends_too(aws):
    from intel_nb.aws.deploy import stop_work
    aws.build_hangs = aws.build_never_stops = True
    with pytest.raises(StackError, match="has not ended"):
        deploy()
    with pytest.raises(StackError, match="not everything that runs has stopped after 1 minutes; run intel-nb aws d"):
        stop_work("intel-nb", lambda line: None, no_pause, minutes=1)


def test_a_removal_stops_what_runs(aws):
    from moto.sagemaker.models import sagemaker_backends

    from intel_nb.aws.deploy import running_drift_jobs, running_work, stop_work
    aws.build_hangs = True
    with pytest.raises(StackError, match="has not ended"):
        deploy()
    jobs = [f"intel-nb-{middle}-d32c5kddcf5bb8c3" for middle in ("staging", "staging-production", "2-staging")]
    start_jobs(*jobs)
    for job in sagemaker_backends[ACCOUNT]["us-east-1"].processing_jobs.values():
        job.processing_job_status = "InProgress"  # moto's jobs have ended when they begin
    assert running_drift_jobs("intel-nb") == ["intel-nb-staging-d32c5kddcf5bb8c3"]
    assert len(running_work("intel-nb")) == 2
    stop_work("intel-nb", lambda line: None, no_pause)
    assert [one["buildStatus"] for one in aws.builds.values()] == ["STOPPED"]
    ended = {name: client("sagemaker").describe_processing_job(ProcessingJobName=name)["ProcessingJobStatus"]
             for name in jobs}
    assert [ended[name] for name in jobs] == ["Stopped", "InProgress", "InProgress"]


def test_kept_data_are_taken_in_by_the_next_deployment(aws):
    deploy()
    client("s3").put_object(Bucket=DATA, Key="intel.zip", Body=b"12345")
    said: list[str] = []
    assert destroy(keep=("data",), say=said.append)
    assert list_buckets(Options()) == [DATA] and any(line.startswith(f"kept      {DATA}") for line in said)
    said.clear()
    assert deploy(say=said.append)
    assert any(DATA in line and "taken in" in line for line in said)
    assert client("s3").get_object(Bucket=DATA, Key="intel.zip")["Body"].read() == b"12345"
    base = [one for one in aws.change_sets if one["StackName"] == "intel-nb-base"]
    assert all(one["ImportExistingResources"] for one in base)
    assert destroy() and nothing_is_left()


def test_what_may_be_kept_has_a_plain_name_and_outlives_its_stack():
    made = base_template(Options(), ACCOUNT)["Resources"]
    buckets = [one for one in made.values() if one["Type"] == "AWS::S3::Bucket"]
    assert DATA in [one["Properties"]["BucketName"] for one in buckets]
    for one in buckets:
        assert isinstance(one["Properties"]["BucketName"], str) and "${" not in one["Properties"]["BucketName"]
        assert one["DeletionPolicy"] in ("Retain", "RetainExceptOnCreate")


def test_without_its_permission_an_existing_bucket_is_refused(aws):
    "The stand-in for CloudFormation would notice if a request forgot to ask for it."
    from intel_nb.aws.changes import apply_template
    client("s3").create_bucket(Bucket=DATA)
    with pytest.raises(StackError, match=f"{DATA} already exists"):
        apply_template(Options(), "intel-nb-base", base_template(Options(), ACCOUNT), lambda question: True,
                       lambda line: None, no_pause)


def test_another_deployment_beside_it_stays_as_it_is(aws):
    from intel_nb.aws.deploy import list_assets
    other = Options(name="intel-nb-2")
    deploy()
    deploy(other)
    endpoint = leave_endpoint("intel-nb-2")
    client("sagemaker").create_model_package_group(ModelPackageGroupName="intel-nb-2")
    before = list_assets(other)
    assert destroy() and list_assets(other) == before
    assert client("sagemaker").describe_endpoint(EndpointName=endpoint)["EndpointStatus"] == "InService"
    assert client("sagemaker").list_models()["Models"] and deploy(other)


def test_a_bucket_is_kept_by_what_it_is_for_and_not_by_a_part_of_its_name(aws):
    odd = Options(name="x-data-x")
    deploy(odd)
    assert destroy(odd, keep=("data",))
    assert list_buckets(odd) == [f"x-data-x-data-{ACCOUNT}-us-east-1"]
    assert destroy(odd) and list_buckets(odd) == []


def test_the_requests_of_a_deployment_have_the_form_that_the_services_take():
    asked = {"StackName": "intel-nb-base", "ChangeSetName": "intel-nb-0", "ImportExistingResources": True,
             "TemplateBody": "{}", "ChangeSetType": "CREATE", "Capabilities": ["CAPABILITY_NAMED_IAM"]}
    assert request_problems("cloudformation", "create_change_set", asked) == []
    assert request_problems("service-quotas", "list_service_quotas", {"ServiceCode": "sagemaker"}) == []
    assert request_problems("ecr", "delete_repository", {"repositoryName": "intel-nb", "force": True}) == []


def test_templates_differ_only_in_their_images(aws):
    given = replace(Options(), image_steps=f"{ACCOUNT}.dkr.ecr.us-east-1.amazonaws.com/intel-nb@sha256:{'1' * 64}")
    assert list(template(given, SMALL)["Resources"]) == list(template(Options(), SMALL)["Resources"])


def test_requests_that_the_emulator_lacks_have_the_form_that_the_service_takes():
    from intel_nb.aws.executions import stop_execution_request
    arn = "arn:aws:sagemaker:us-east-1:123456789012:pipeline/intel-nb/execution/abcdefghijkl"
    assert request_problems("sagemaker", "stop_pipeline_execution", stop_execution_request(arn)) == []
    assert request_problems("sagemaker", "delete_model_package",
                         {"ModelPackageName": arn.replace("pipeline/intel-nb/execution/abcdefghijkl",
                                                          "model-package/intel-nb/1")}) == []
    assert request_problems("sagemaker", "delete_model_package_group", {"ModelPackageGroupName": "intel-nb"}) == []


def test_without_credentials_there_is_a_sentence(monkeypatch):
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "none")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "none")
    for work in (deploy_stack, destroy_stack):
        with pytest.raises(InputError, match="no AWS credentials are here"):
            work(Options())
