"""The path of the README, from an empty account to production and back: each command as it stands there, in order.

The emulator stands in for the account (its modules list what it leaves unproven). What an account does by itself is
done here between the commands: the upload's event starts the pipeline, which is rehearsed with the definition of the
template; an approval starts modeldeploy, whose builds run as processes with the environment of the template; nobody
has confirmed the e-mail.
"""
import json
import re
import shlex
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from cloud import Cloud, emulated
from cloud_pipelines import CodePipeline, codepipelines
from cloud_stack import stacks
from moto.sns.models import sns_backends
from test_aws_commands import command, no_account  # noqa: F401

from intel_nb.aws.client import client
from intel_nb.aws.hosting import SageMakerEndpoints
from intel_nb.aws.objects import upload
from intel_nb.aws.package_group import PackageGroup
from intel_nb.aws.rehearsal import rehearse
from intel_nb.scenes import sample_archive, sample_jpeg

README = Path(__file__).parents[1] / "README.md"
ACCOUNT, NAME = "123456789012", "intel-nb"
COMMANDS = ("deploy", "start", "status", "models", "approve", "promote", "invoke", "logs", "reject", "rollback",
            "destroy")


def path_of_readme() -> list[list[str]]:
    "Return the commands of the README's path, as lists of words after `intel-nb aws`."
    section = README.read_text().partition("## The cloud")[2].partition("\n## ")[0]
    blocks = re.findall(r"```sh[^\n]*\n(.*?)```", section, re.DOTALL)
    lines = [block.splitlines() for block in blocks if "aws deploy" in block]
    assert len(lines) == 1
    return [shlex.split(line, comments=True)[2:] for line in lines[0]]


def test_the_readme_has_the_whole_path_in_order():
    assert [words[0] for words in path_of_readme()] == list(COMMANDS)


def test_each_command_of_the_path_is_understood(no_account):
    "Without credentials each gets as far as asking for them, so no word of it is unknown."
    for words in path_of_readme():
        done = command(*words)
        assert done.returncode == 2 and "no AWS credentials are here" in done.stderr, (words, done.stderr)


@contextmanager
def in_background(step, every: float = 0.3):
    "Call `step` again and again during the block."
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(every):
            step()
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        try:
            yield
        finally:
            ended.set()
            working.result()  # raises what a step has raised


def filled(text: str) -> str:
    "Return a text of the template with the references that the test needs."
    text = re.sub(r"\$\{(\w+)\.Arn\}", rf"arn:aws:iam::{ACCOUNT}:role/\1", text)
    return text.replace("${AWS::AccountId}", ACCOUNT).replace("${!", "${")


class Account:
    "The account after the deployment: what the emulator's CloudFormation does not make, made from the template."
    def __init__(self, cloud: Cloud, folder: Path):
        self.cloud, self.folder = cloud, folder
        body = client("cloudformation").get_template(StackName=NAME)["TemplateBody"]
        self.made = body if isinstance(body, dict) else json.loads(body)
        properties = self.made["Resources"]["Pipeline"]["Properties"]
        self.definition = json.loads(filled(properties["PipelineDefinition"]["PipelineDefinitionBody"]["Fn::Sub"]))
        client("sagemaker").create_pipeline(
            PipelineName=NAME, PipelineDefinition=json.dumps(self.definition), ClientRequestToken="x" * 32,
            RoleArn=f"arn:aws:iam::{ACCOUNT}:role/PipelineRole")
        client("sagemaker").create_model_package_group(ModelPackageGroupName=NAME)
        client("ssm").put_parameter(Name=f"/{NAME}/settings", Type="String", Overwrite=True, Value=filled(
            self.made["Resources"]["Settings"]["Properties"]["Value"]["Fn::Sub"]))
        topic = client("sns").create_topic(Name=f"{NAME}-news")["TopicArn"]
        client("sns").subscribe(TopicArn=topic, Protocol="email", Endpoint="you@example.org")
        for subscription in sns_backends[ACCOUNT]["us-east-1"].subscriptions.values():
            subscription.arn = "PendingConfirmation"  # as AWS says it; moto takes each subscription for confirmed
        for kind in ("data", "artifacts"):
            client("s3").put_bucket_versioning(Bucket=f"{NAME}-{kind}-{ACCOUNT}-us-east-1",
                                               VersioningConfiguration={"Status": "Enabled"})
        self.deploying = CodePipeline(self.made, "ModeldeployPipeline", folder / "modeldeploy")
        self.building = CodePipeline(self.made, "ModelbuildPipeline", folder)  # described, not carried out
        self.seen: set[str] = set()

    def events(self) -> None:
        "Start the pipeline for a new version of intel.zip, as rule, queue and pipe do."
        found = self.cloud.aws("s3").list_object_versions(Bucket=f"{NAME}-data-{ACCOUNT}-us-east-1", Prefix="intel.zip")
        for one in found.get("Versions", []):
            if one["VersionId"] not in self.seen:
                self.seen.add(one["VersionId"])
                self.cloud.aws("sagemaker").start_pipeline_execution(
                    PipelineName=NAME, PipelineParameters=[{"Name": "DataVersion", "Value": one["VersionId"]}],
                    ClientRequestToken=one["VersionId"].ljust(32, "x"))

    def rehearse(self, archive: Path) -> str:
        "Carry the pipeline out on this machine, and register in the group; return the version."
        result = rehearse(self.definition, {"Profile": "quick"}, self.folder / "pipeline", f"sagemaker://{NAME}",
                          archive, say=lambda line: None)
        assert result.status == "Succeeded", result.reason
        dataset = next((self.folder / "pipeline" / "s3").rglob("dataset"))
        uri = f"s3://{NAME}-artifacts-{ACCOUNT}-us-east-1/pipeline/runs/1/dataset"
        upload(dataset, uri)
        PackageGroup(NAME).set_tag(result.version, "dataset", uri)
        return result.version


@pytest.mark.slow
def test_the_path_of_the_readme(tmp_path, monkeypatch):
    archive, photo = tmp_path / "intel.zip", tmp_path / "photo.jpg"
    sample_archive(archive, per_class=60, seed=0)
    photo.write_bytes(sample_jpeg(0, [1]))
    path = {words[0]: [{"intel.zip": str(archive), "photo.jpg": str(photo)}.get(word, word) for word in words]
            for words in path_of_readme()}
    def walk(name: str, *more: str, typed: str = "", status: int = 0) -> str:
        done = command(*path[name], *more, typed=typed)
        print(f"$ intel-nb aws {' '.join([*path[name], *more])}\n{done.stdout}{done.stderr}")
        assert done.returncode == status and "Traceback" not in done.stderr
        return done.stdout + done.stderr

    with emulated(tmp_path / "cloud") as cloud, stacks(cloud):
        said = walk("deploy", "--option", "confirm_minutes=0", typed="y\ny\n")
        assert "you@example.org has to confirm" in said and "Make these" in said
        account = Account(cloud, tmp_path)
        with codepipelines(account.deploying, account.building), in_background(cloud.settle):
            account.deploying.start({})  # CodePipelines start when they are created
            assert account.deploying.go_on().states == {
                "Source": "Succeeded", "Choose": "Succeeded", "Staging": "Skipped", "Approval": "Skipped",
                "Production": "Skipped"}, account.deploying.last.log
            with in_background(account.events):
                said = walk("start")
            assert "uploaded" in said and "starting the pipeline for the same version" not in said
            assert account.rehearse(archive) == "1"
            said = walk("status")
            assert "version 1 waits" in said and "intel-nb aws approve 1" in said
            assert "you@example.org gets no messages until" in said
            assert "PendingManualApproval" in walk("models")
            walk("approve")
            account.deploying.start({})  # the rule of an approval
            assert account.deploying.go_on().states["Approval"] == "InProgress", account.deploying.last.log
            assert account.deploying.last.done == ["choose", "deploy", "drift", "staging"]
            assert "version 1 passed its test on staging: intel-nb aws promote 1" in command("status").stdout
            assert "puts version 1 into production" in walk("promote")
            assert account.deploying.go_on().states["Production"] == "Succeeded", account.deploying.last.log
            assert account.deploying.last.done[-2:] == ["promote", "confirm"]
            assert "photo.jpg" in walk("invoke")
            log_of_training(account)
            assert "epoch" in walk("logs")
            more_versions(tmp_path)
            assert "production serves version 2 again" in walk("reject")
            assert "production serves version 1 again" in walk("rollback")
            said = walk("destroy", typed="y\n")
        assert "Delete intel-nb" in said
        assert cloud.problems == []
        left = [bucket["Name"] for bucket in client("s3").list_buckets()["Buckets"]]
        assert left == [] and client("sagemaker").list_endpoints()["Endpoints"] == []


def log_of_training(account: Account) -> None:
    "Let the last execution have a training job that has written a line."
    execution = client("sagemaker").list_pipeline_executions(PipelineName=NAME)["PipelineExecutionSummaries"][0]
    job = "pipelines-abc-train-xyz"
    account.cloud.steps[execution["PipelineExecutionArn"]] = [{
        "StepName": "train", "StepStatus": "Succeeded",
        "Metadata": {"TrainingJob": {"Arn": f"arn:aws:sagemaker:us-east-1:{ACCOUNT}:training-job/{job}"}}}]
    group = "/aws/sagemaker/TrainingJobs"
    client("logs").create_log_stream(logGroupName=group, logStreamName=f"{job}/algo-1")
    client("logs").put_log_events(logGroupName=group, logStreamName=f"{job}/algo-1", logEvents=[
        {"timestamp": int(time.time() * 1000), "message": "epoch 1: val_loss 0.31"}])


def more_versions(folder: Path) -> None:
    "Put versions 2 and 3 into production, which were registered and approved by hand."
    registry = PackageGroup(NAME)
    package, evaluation = registry.package("1", folder / "copy"), registry.evaluation("1")
    for number in ("2", "3"):
        version = registry.register(package, evaluation, status="Approved", reason="by hand", params={})
        assert version == number
        SageMakerEndpoints(NAME, lambda seconds: time.sleep(0.5)).deploy("production", package, version)
