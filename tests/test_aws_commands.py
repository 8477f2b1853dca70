"""`intel-nb aws …` as a person types it: exit statuses, sentences, and a stack's life against the emulator."""
import json
import os
import subprocess
import sys

import pytest
from cloud import emulated

from intel_nb.aws.client import client


def command(*arguments: str, typed: str = "") -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", "from intel_nb.cli import main; main()", "aws", *arguments], capture_output=True, text=True, input=typed, timeout=120)


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    "A machine on which there is no account, and no region."
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.mark.parametrize("name", ["deploy", "destroy", "start", "status"])
def test_what_needs_an_account_says_so(nobody, name):
    done = command(name)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: no AWS credentials are here; set AWS_ACCESS_KEY_ID") and done.stderr.count("\n") == 1


def test_what_needs_none_works_without(nobody, tmp_path):
    made = json.loads(command("definition", "--parameter", "Profile=full").stdout)
    assert [step["Name"] for step in made["Steps"]] == ["data", "train", "evaluate", "gate"]
    assert command("template").stdout.startswith("AWSTemplateFormatVersion")
    assert command("template", "--output", str(tmp_path / "stack.yaml"), "--option", "source=s3").stdout == ""
    assert (tmp_path / "stack.yaml").read_text() == command("template").stdout
    assert json.loads(command("cost", "--json").stdout)["run"]["usd"] > 0


@pytest.mark.parametrize("line, said", [
    ("template --option sauce=s3", "did you mean source?"), ("definition --parameter Profil=full", "did you mean Profile?"),
    ("definition --parameter Profile=fast", "Profile"), ("cost --option runs=many", "must be a number"),
    ("rehearse --data no-such.zip", "no-such.zip does not exist")])
def test_a_wrong_word_is_named(nobody, line, said):
    done = command(*line.split())
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_a_stack_from_nothing_to_nothing(tmp_path):
    with emulated(tmp_path):
        refused = command("deploy", typed="n\n")
        assert refused.returncode == 1 and "Make these" in refused.stderr and "S3::Bucket" in refused.stdout
        made = command("deploy", "--yes")
        assert made.returncode == 0 and "the pipeline starts by itself" in made.stdout
        assert command("deploy", "--yes").returncode == 0, "as often as one likes"
        standing = command("status")
        assert standing.returncode == 0
        assert standing.stdout.startswith("execution  there is no pipeline intel-nb"), "which the emulator's CloudFormation cannot make"
        assert command("destroy", typed="n\n").returncode == 1
        client("s3").put_object(Bucket="intel-nb-data-123456789012-us-east-1", Key="intel.zip", Body=b"12345")
        gone = command("destroy", "--yes", "--keep", "data")
        assert gone.returncode == 0 and "kept" in gone.stdout
        assert [bucket["Name"] for bucket in client("s3").list_buckets()["Buckets"]] == ["intel-nb-data-123456789012-us-east-1"]
        assert command("destroy", "--yes", "--keep", "everything").returncode == 2
