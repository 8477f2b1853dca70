"""Signed packages: where a key is set, nothing loads what is unsigned, signed by somebody else or changed."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import COMMAND

from intel_nb.model import load_package, sign_package
from intel_nb.serving.endpoints import EndpointError, LocalEndpoints
from intel_nb.serving.ray import serve_config
from intel_nb.storage import InputError, sha256_file


@pytest.fixture(scope="session")
def keys(tmp_path_factory) -> dict[str, Path]:
    "Private and public keys of two people, made as the README says."
    folder, made = tmp_path_factory.mktemp("keys"), {}
    for name in ("ours", "theirs"):
        private, public = made[name], made[f"{name}.pub"] = folder / f"{name}.pem", folder / f"{name}.pub.pem"
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
        subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return made


def unsigned(package: Path, keys: dict[str, Path]) -> None:
    "Leave the package as it is."


def wrongly_signed(package: Path, keys: dict[str, Path]) -> None:
    sign_package(package, keys["theirs"])


def changed(package: Path, keys: dict[str, Path]) -> None:
    "Change a file and its digest in the manifest, as somebody without the key can."
    sign_package(package, keys["ours"])
    (package / "labels.json").write_text(json.dumps(["sea"] * 6))
    manifest = json.loads((package / "manifest.json").read_text())
    manifest["files"]["labels.json"] = sha256_file(package / "labels.json")
    (package / "manifest.json").write_text(json.dumps(manifest))


REFUSED = {unsigned: "is not signed", wrongly_signed: "is not the signature", changed: "is not the signature"}


@pytest.fixture
def package(sample_model, tmp_path) -> Path:
    return shutil.copytree(sample_model, tmp_path / "model")


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_what_is_refused_where_a_key_is_set(spoil, package, keys, monkeypatch, tmp_path):
    spoil(package, keys)
    load_package(package)  # without a key its digests are right
    monkeypatch.setenv("INTEL_NB_VERIFY_KEY", str(keys["ours.pub"]))
    for load in (load_package, serve_config):
        with pytest.raises(InputError, match=REFUSED[spoil]):
            load(package)
    served = subprocess.run([COMMAND, "serve", package, "--port", "0"], capture_output=True, text=True, timeout=60)
    assert (served.returncode, REFUSED[spoil] in served.stderr) == (2, True), served.stderr
    with pytest.raises(EndpointError, match=REFUSED[spoil]):
        LocalEndpoints(tmp_path / "endpoints", owned=True, first_port=18900).deploy("staging", package, "1")


def test_a_signed_package_is_served(package, keys, monkeypatch, tmp_path):
    before = load_package(package).fingerprint
    command = [COMMAND, "sign", package, "--key", keys["ours"]]
    signed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert signed.returncode == 0, signed.stderr
    monkeypatch.setenv("INTEL_NB_VERIFY_KEY", str(keys["ours.pub"]))
    assert load_package(package).fingerprint == before
    endpoints = LocalEndpoints(tmp_path / "endpoints", owned=True, first_port=18900)
    assert endpoints.deploy("staging", package, "1").status == "running"
    endpoints.stop("staging")


def test_a_version_is_signed_before_it_is_deployed(waiting, keys, monkeypatch):
    "A key that is set later stops the deployment of what was registered before, until somebody signs it."
    monkeypatch.setenv("INTEL_NB_VERIFY_KEY", str(keys["ours.pub"]))
    answer = waiting("approve", "1")
    assert answer.status != 0 and "is not signed" in answer.err + answer.out
    assert waiting("sign", "1", "--key", str(keys["ours"])).status == 0
    assert waiting("approve", "1").status == 0


@pytest.mark.slow
def test_every_new_package_is_signed(empty, keys, monkeypatch):
    monkeypatch.setenv("INTEL_NB_SIGNING_KEY", str(keys["ours"]))
    monkeypatch.setenv("INTEL_NB_VERIFY_KEY", str(keys["ours.pub"]))
    assert empty.run("--approve").status == 0
    [model] = (empty.home / "store" / "train").glob("*/model")
    assert (model / "manifest.sig").stat().st_size == 64
    assert os.environ["INTEL_NB_SIGNING_KEY"] not in (model / "manifest.json").read_text()


OLD = "config.yaml", "deployment.py"


def add_code(package: Path, ran: Path, listed: bool) -> None:
    "Put the two files of code into a package that those of 0.1 had; `ran` is written if one of them is run."
    manifest = json.loads((package / "manifest.json").read_text())
    for name in OLD:
        (package / name).write_text(f"open({str(ran)!r}, 'w')")
        manifest["files"][name] = sha256_file(package / name) if listed else "0" * 64
    (package / "manifest.json").write_text(json.dumps(manifest))


def test_code_in_an_old_package_is_never_run(package, tmp_path):
    add_code(package, ran := tmp_path / "ran", listed=True)
    endpoints = LocalEndpoints(tmp_path / "endpoints", owned=True, first_port=18900)
    assert endpoints.deploy("staging", package, "1").status == "running"
    endpoints.stop("staging")
    assert serve_config(package)["applications"][0]["import_path"] == "intel_nb.serving.ray:build_app"
    assert not ran.exists()


def test_code_that_was_tampered_with_is_refused(package, tmp_path):
    add_code(package, ran := tmp_path / "ran", listed=False)
    with pytest.raises(InputError, match=r"config\.yaml is not the file that the manifest lists"):
        load_package(package)
    assert not ran.exists()


@pytest.mark.slow
def test_a_file_that_is_not_the_pinned_one_is_not_installed(tmp_path):
    lock = (Path(__file__).parents[1] / "locks" / "build.txt").read_text()
    (tmp_path / "spoiled.txt").write_text(re.sub(r"sha256:(.)", lambda m: f"sha256:{'10'[m[1] == '1']}", lock))
    given = ["--require-hashes", "--dest", tmp_path, "-r", tmp_path / "spoiled.txt"]
    done = subprocess.run([sys.executable, "-m", "pip", "download", *given], capture_output=True, text=True)
    assert done.returncode and "DO NOT MATCH THE HASHES" in done.stderr, done.stderr
