"""`intel-nb aws …` as a person types it: exit statuses, sentences, and the life of a stack against the emulator."""
import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from cloud import emulated
from cloud_pipelines import codepipelines
from cloud_stack import stacks

from intel_nb.aws.client import client
from intel_nb.cli import main


def command(*arguments: str, typed: str = "") -> subprocess.CompletedProcess:
    "Run the command in this process, which saves the seconds of a start; standard input is `typed`."
    streams = sys.argv, sys.stdin, signal.getsignal(signal.SIGTERM)
    sys.argv, sys.stdin = ["intel-nb", "aws", *arguments], io.StringIO(typed)
    try:
        with (redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err,
              pytest.raises(SystemExit) as ended):
            main()
    finally:
        sys.argv, sys.stdin = streams[:2]
        signal.signal(signal.SIGTERM, streams[2])
    return subprocess.CompletedProcess(arguments, ended.value.code or 0, out.getvalue(), err.getvalue())


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    "A machine on which there is no account, and no region."
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("INTEL_NB_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("line", ["deploy", "destroy", "start", "status", "models", "approve 1", "invoke sea.jpg"])
def test_a_command_that_needs_an_account_says_so(no_account, line):
    done = command(*line.split())
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: no AWS credentials are here; set AWS_ACCESS_KEY_ID")
    assert done.stderr.count("\n") == 1


def test_the_command_is_the_same_in_a_process_of_its_own(no_account):
    done = subprocess.run([sys.executable, "-c", "from intel_nb.cli import main; main()", "aws", "status"],
                          capture_output=True, text=True, timeout=120)
    here = command("status")
    assert (done.returncode, done.stdout, done.stderr) == (here.returncode, here.stdout, here.stderr)


def test_the_other_commands_work_without_an_account(no_account, tmp_path):
    definition = json.loads(command("definition", "--parameter", "Profile=full").stdout)
    assert [step["Name"] for step in definition["Steps"]] == ["data", "train", "evaluate", "gate", "keep", "once"]
    template = command("template").stdout
    assert template.startswith("AWSTemplateFormatVersion")
    assert command("template", "--output", str(tmp_path / "stack.yaml"), "--option", "source=s3").stdout == ""
    assert (tmp_path / "stack.yaml").read_text() == template
    assert json.loads(command("cost", "--json").stdout)["run"]["usd"] > 0


@pytest.mark.parametrize("line, message", [
    ("template --option sauce=s3", "did you mean source?"),
    ("definition --parameter Profil=full", "did you mean Profile?"),
    ("definition --parameter Profile=fast", "Profile"), ("cost --option runs=many", "must be a number"),
    ("rehearse --data no-such.zip", "no-such.zip does not exist")])
def test_a_wrong_word_is_named(no_account, line, message):
    done = command(*line.split())
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(not (Path(__file__).parent.parent / ".git").exists(), reason="code is deployed from a clone")
def test_a_stack_from_nothing_to_nothing(tmp_path):
    with emulated(tmp_path) as cloud, stacks(cloud):
        refused = command("deploy", typed="n\n")
        assert refused.returncode == 1 and "Make these" in refused.stderr and "S3::Bucket" in refused.stdout
        images = [f"image_{target}=123456789012.dkr.ecr.us-east-1.amazonaws.com/intel-nb@sha256:{'0' * 64}"
                  for target in ("steps", "serve")]
        given = [word for image in images for word in ("--option", image)]
        made = command("deploy", "--yes", *given)
        assert made.returncode == 0 and "intel-nb aws start --data ZIP" in made.stdout
        assert command("deploy", "--yes", *given, "--option", "staging_hours=8").returncode == 0
        again = command("deploy", "--yes", *given)
        assert again.returncode == 0, "a deployment may be repeated"
        assert again.stdout.startswith("options   staging_hours=8, as in the last deployment")
        with codepipelines():  # the emulator's CloudFormation makes none
            status = command("status")
        assert status.returncode == 0
        # The emulator's CloudFormation cannot make a pipeline.
        assert status.stdout.startswith("execution    there is no pipeline intel-nb")
        assert command("destroy", typed="n\n").returncode == 1
        client("s3").put_object(Bucket="intel-nb-data-123456789012-us-east-1", Key="intel.zip", Body=b"12345")
        removed = command("destroy", "--yes", "--keep", "data")
        assert removed.returncode == 0 and "kept" in removed.stdout
        left = [bucket["Name"] for bucket in client("s3").list_buckets()["Buckets"]]
        assert left == ["intel-nb-data-123456789012-us-east-1"]
        assert command("destroy", "--yes", "--keep", "everything").returncode == 2
