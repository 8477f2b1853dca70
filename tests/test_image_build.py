"""The build of the image: its shell, with stand-ins on PATH that note how they are called, and what it is made from."""
import itertools
import json
import subprocess
from pathlib import Path

import pytest
import yaml

from intel_nb.aws.base import IMAGE_SPEC, Options, base_template

ROOT = Path(__file__).parent.parent
REPOSITORY = "123456789012.dkr.ecr.us-east-1.amazonaws.com/intel-nb"
BASE = next(line for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("ARG BASE="))[9:]
PINNED = f"{BASE.partition(':')[0]}@sha256:{'0123456789abcdef' * 4}"
STEPS, SERVE = "steps-abc-0123456789ab", "serve-abc-0123456789ab"  # the code's tag, and the beginning of the base's
BASH = "/bin/bash"


def spec() -> dict:
    "The build description as CodeBuild reads it from the template."
    made = base_template(Options(), "123456789012")["Resources"]["ImageBuild"]["Properties"]["Source"]["BuildSpec"]
    return yaml.safe_load(made)


def commands() -> list[str]:
    return list(itertools.chain.from_iterable(phase["commands"] for phase in spec()["phases"].values()))


def test_the_description_travels_whole():
    assert spec() == json.loads(json.dumps(IMAGE_SPEC))


@pytest.mark.parametrize("command", commands(), ids=range(len(commands())))
def test_each_command_is_shell(command):
    assert subprocess.run([BASH, "-n", "-c", command], capture_output=True, text=True).stderr == ""


def build(folder: Path, there: str = "", fails: str = "", **variables: str) -> tuple[int, list[str], str]:
    """Run the commands one after another in one shell, as CodeBuild does; return the status, the calls and the output.

    `there` are the tags that the registry has; a call that begins with `fails` fails."""
    tools = folder / "bin"
    tools.mkdir()
    for name in ("aws", "docker"):
        (tools / name).write_text(f"""#!{BASH}
echo "{name} $*" >> {folder}/calls
if [ -n "$FAILS" ]; then case "{name} $*" in "$FAILS"*) exit 1;; esac; fi
case "{name} $1 $2" in
  "aws ecr get-login-password") echo secret;;
  "aws ecr describe-images")
    if grep -q "docker push" {folder}/calls; then THERE="$THERE $LATER"; fi
    for tag in $THERE; do case "$*" in *"imageTag=$tag") exit 0;; esac; done; exit 254;;
  "aws ecr batch-get-image") echo "${{FORM:-application/vnd.docker.distribution.manifest.v2+json}}";;
  "docker login "*) cat >> {folder}/password;;
  "docker image inspect") echo "$PINNED";;
esac
""")
        (tools / name).chmod(0o755)
    shell = subprocess.run([BASH, "-c", " || exit 1\n".join(c.rstrip() for c in commands()) + " || exit 1"],
                           capture_output=True, text=True, cwd=ROOT,
                           env={"PATH": f"{tools}:/usr/bin:/bin", "REPOSITORY": REPOSITORY, "THERE": there,
                                "FAILS": fails, "TAG": "abc", "PINNED": PINNED, **variables})
    calls = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return shell.returncode, calls, shell.stdout + shell.stderr


def pushed(calls: list[str]) -> list[str]:
    return [call.split()[-1] for call in calls if call.startswith("docker push")]


def test_both_targets_are_built_and_pushed(tmp_path):
    status, calls, _ = build(tmp_path)
    assert status == 0 and pushed(calls) == [f"{REPOSITORY}:{STEPS}", f"{REPOSITORY}:{SERVE}"]
    assert (tmp_path / "password").read_text() == "secret\n"
    assert f"docker login --username AWS --password-stdin {REPOSITORY.partition('/')[0]}" in calls
    first = next(call for call in calls if call.startswith("docker build"))
    assert first == (f"docker build --build-arg BASE={PINNED} --target steps --provenance=false --sbom=false "
                     f"--tag {REPOSITORY}:{STEPS} .")


def test_the_base_is_the_one_of_the_dockerfile_with_its_present_digest(tmp_path):
    status, calls, _ = build(tmp_path)
    assert status == 0 and calls.index(f"docker pull --quiet {BASE}") + 1 == calls.index(
        f"docker image inspect --format {{{{index .RepoDigests 0}}}} {BASE}")
    assert BASE.startswith("public.ecr.aws/") and "@" not in BASE


def test_a_new_base_is_a_new_image_beside_the_old_one(tmp_path):
    status, calls, _ = build(tmp_path, there=f"{STEPS} {SERVE}", PINNED=PINNED.replace("0123", "fedc"))
    assert status == 0 and pushed(calls) == [f"{REPOSITORY}:{one.replace('-0123', '-fedc')}" for one in (STEPS, SERVE)]


@pytest.mark.parametrize("digest", ["", "<no value>"])
def test_a_base_without_a_digest_is_red(tmp_path, digest):
    status, calls, output = build(tmp_path, PINNED=digest)
    assert status != 0 and pushed(calls) == [] and "has no digest" in output


def test_another_form_than_docker_schema_2_is_red(tmp_path):
    status, calls, output = build(tmp_path, FORM="application/vnd.oci.image.index.v1+json")
    assert status != 0 and f"{STEPS} is no docker schema 2" in output


def test_a_tag_that_another_build_pushed_meanwhile_is_no_failure(tmp_path):
    "The second look finds it: the first one and the push came before."
    status, calls, _ = build(tmp_path, fails="docker push", LATER=f"{STEPS} {SERVE}")
    assert status == 0 and pushed(calls) == [f"{REPOSITORY}:{STEPS}"]


def test_what_is_there_is_not_built_again(tmp_path):
    status, calls, output = build(tmp_path, there=STEPS)
    assert status == 0 and pushed(calls) == [f"{REPOSITORY}:{SERVE}"] and f"{STEPS} is there already" in output
    asked = [call for call in calls if "describe-images" in call]
    assert asked[0] == "aws ecr describe-images --repository-name intel-nb --image-ids imageTag=" + STEPS


def test_a_second_build_does_nothing(tmp_path):
    status, calls, _ = build(tmp_path, there=f"{STEPS} {SERVE}")
    assert status == 0 and pushed(calls) == []


@pytest.mark.parametrize("fails, built", [
    (f"docker build --build-arg BASE={PINNED} --target steps", 0), ("docker login", 0), ("docker pull", 0),
    (f"docker build --build-arg BASE={PINNED} --target serve", 1), ("docker image inspect", 0),
    ("aws ecr get-login-password", 0), ("docker push", 1)])
def test_a_build_that_fails_is_red(tmp_path, fails, built):
    status, calls, _ = build(tmp_path, fails=fails)
    assert status != 0 and len(pushed(calls)) == built


def test_without_a_tag_nothing_is_built(tmp_path):
    status, calls, output = build(tmp_path, TAG="")
    assert status != 0 and calls == [] and "TAG is not set" in output


def test_the_targets_are_those_of_the_dockerfile():
    text = (ROOT / "Dockerfile").read_text()
    assert "AS steps\n" in text and "AS serve\n" in text and "in steps serve;" in commands()[-1]


def test_the_project_is_started_from_an_archive_and_pushes_to_the_repository_of_the_stack():
    made = base_template(Options(), "123456789012")["Resources"]
    project = made["ImageBuild"]["Properties"]
    assert project["Source"]["Type"] == "S3" and project["Artifacts"] == {"Type": "NO_ARTIFACTS"}
    assert project["Environment"]["PrivilegedMode"] and project["ServiceRole"] == {"Fn::GetAtt": ["ImageRole", "Arn"]}
    variables = {one["Name"]: one["Value"] for one in project["Environment"]["EnvironmentVariables"]}
    assert variables["REPOSITORY"] == {"Fn::GetAtt": ["Repository", "RepositoryUri"]}
    assert project["Source"]["Location"].startswith("intel-nb-code-123456789012-us-east-1/")


def test_the_repository_keeps_what_has_a_tag():
    made = base_template(Options(), "123456789012")["Resources"]["Repository"]["Properties"]
    assert made["ImageTagMutability"] == "IMMUTABLE" and made["ImageScanningConfiguration"] == {"ScanOnPush": True}
    (rule,) = json.loads(made["LifecyclePolicy"]["LifecyclePolicyText"])["rules"]
    assert rule["selection"]["tagStatus"] == "untagged" and rule["action"] == {"type": "expire"}
    assert "RepositoryPolicyText" not in made, "all who pull and push are roles of the same account"
