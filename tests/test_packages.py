"""Packages from anywhere: signed, unsigned, changed, damaged or hostile, and what `intel-nb serve` makes of them."""
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
from conftest import COMMAND

from intel_nb.model import load_package, pack, sign_package
from intel_nb.scenes import sample_jpeg
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
    labels = json.loads((package / "labels.json").read_text())
    (package / "labels.json").write_text(json.dumps(labels[::-1]))
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


def test_an_unsigned_package_is_not_imported(package, keys, monkeypatch, empty):
    monkeypatch.setenv("INTEL_NB_VERIFY_KEY", str(keys["ours.pub"]))
    for spoil, message in REFUSED.items():
        spoil(package, keys)
        answer = empty("import", str(pack(package, package.with_name("model.tar.gz"))))
        assert answer.status == 2 and message in answer.err
    assert not empty.home.exists()


def test_what_was_verified_is_what_is_used(package, keys, monkeypatch):
    "Somebody swaps the manifest between two looks at it: only the bytes that were verified count."
    import intel_nb.model as model
    sign_package(package, keys["ours"])
    genuine = (package / "manifest.json").read_bytes()
    changed(package, keys)
    monkeypatch.setenv("INTEL_NB_VERIFY_KEY", str(keys["ours.pub"]))
    verify = model.check_signature

    def swap_and_verify(folder, key, *manifest):
        (Path(folder) / "manifest.json").write_bytes(genuine)
        verify(folder, key, *manifest)

    monkeypatch.setattr(model, "check_signature", swap_and_verify)
    with pytest.raises(InputError, match="is not the signature"):
        load_package(package)


def test_a_key_beside_the_caller_is_found_by_all_processes(package, keys, monkeypatch, tmp_path):
    sign_package(package, keys["ours"])
    monkeypatch.chdir(keys["ours.pub"].parent)
    monkeypatch.setenv("INTEL_NB_VERIFY_KEY", keys["ours.pub"].name)
    endpoints = LocalEndpoints(tmp_path / "endpoints", owned=True, first_port=18900)
    assert endpoints.deploy("staging", package, "1").status == "running"
    endpoints.stop("staging")


@pytest.mark.parametrize("name", ["INTEL_NB_SIGNING_KEY", "INTEL_NB_VERIFY_KEY"])
def test_a_wrong_key_is_noticed_before_a_run(empty, name, monkeypatch):
    monkeypatch.setenv(name, "typo.pem")
    answer = empty.run()
    assert answer.status == 2 and "typo.pem cannot be read as a" in answer.err
    assert not (empty.home / "store").exists()


@pytest.mark.slow
def test_every_new_package_is_signed(empty, keys, monkeypatch):
    monkeypatch.setenv("INTEL_NB_SIGNING_KEY", str(keys["ours"]))
    monkeypatch.setenv("INTEL_NB_VERIFY_KEY", str(keys["ours.pub"]))
    assert empty.run("--approve").status == 0
    [model] = (empty.home / "store" / "train").glob("*/model")
    assert (model / "manifest.sig").stat().st_size == 64
    assert os.environ["INTEL_NB_SIGNING_KEY"] not in (model / "manifest.json").read_text()


def as_link(package: Path) -> None:
    (package.parent / "secret").write_text("secret")
    (package / "manifest.sig").symlink_to("../secret")


def as_folder(package: Path) -> None:
    (package / "manifest.sig").mkdir()


def linked_manifest(package: Path) -> None:
    (package / "manifest.json").rename(package.parent / "elsewhere.json")
    (package / "manifest.json").symlink_to("../elsewhere.json")


@pytest.mark.parametrize("spoil", [as_link, as_folder, linked_manifest], ids=lambda spoil: spoil.__name__)
def test_the_two_files_outside_the_manifest_are_plain_files(spoil, package):
    spoil(package)
    with pytest.raises(InputError, match="do not trust|is not a model package"):
        load_package(package)


def rewrite(package: Path, name: str, text: str) -> None:
    "Write a file of a package and its digest."
    (package / name).write_text(text)
    manifest = json.loads((package / "manifest.json").read_text())
    manifest["files"][name] = sha256_file(package / name)
    (package / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("labels", ["{}", "[]", "[1, 2]", '["a", "a"]', "[" * 100_000])
def test_labels_that_nobody_can_answer_with(labels, package):
    rewrite(package, "labels.json", labels)
    with pytest.raises(InputError, match=r"labels\.json"):
        load_package(package)


CARDS = {"image_size": "x"}, {"image_size": 10**6}, {"image_size": True}, {"model_name": None}


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_a_card_that_nobody_can_serve_with(card, package):
    manifest = json.loads((package / "manifest.json").read_text())
    manifest["card"] |= card
    (package / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="the card in"):
        load_package(package)


def member(name: str, data: bytes) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, io.BytesIO(data)


@pytest.mark.parametrize("members", [
    [member("labels.json", b"[]"), member("labels.json", b"{}")], [member("evil.py", b"")], [member("..", b"")],
    [member("manifest.json", bytes(2**24 + 1))]], ids=["twice", "another", "above", "large"])
def test_members_that_no_package_has(members, tmp_path):
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as archive:
        for info, data in members:
            archive.addfile(info, data)
    with pytest.raises(InputError, match="which no package holds"):
        load_package(tmp_path / "model.tar.gz")


def test_a_flipped_bit_is_said_plainly(package, tmp_path):
    whole = pack(package, tmp_path / "model.tar.gz").read_bytes()
    for at in range(20, len(whole), len(whole) // 200):
        (tmp_path / "broken.tar.gz").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        try:  # a bit between the files changes nothing
            assert load_package(tmp_path / "broken.tar.gz").fingerprint == load_package(package).fingerprint
        except InputError as error:
            assert "broken.tar.gz" in str(error)


def test_files_beside_a_package_are_no_modules(package, keys, tmp_path):
    "Whoever unpacks a mail and serves the package in it runs none of its other files."
    for name in ("uvloop", "json", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    served = start_serving(package, tmp_path)
    stop(served)
    assert not (tmp_path / "ran").exists()


def start_serving(package: Path, cwd: Path, *more: str) -> tuple[subprocess.Popen, int]:
    "Start `intel-nb serve` and return it with its port, once it serves."
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([COMMAND, "serve", package, "--port", str(port), *more], cwd=cwd, text=True,
                               stderr=subprocess.PIPE)
    assert any("serves at" in line for line in process.stderr)
    return process, port


def stop(served: tuple[subprocess.Popen, int], signals: int = 1) -> None:
    for _ in range(signals):
        served[0].send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert served[0].wait(30) == 0, served[0].stderr.read()


@pytest.mark.parametrize("signals", [1, 2])
def test_a_slow_upload_is_answered_after_the_signal(signals, package, tmp_path):
    "It was accepted, so it is finished, also by somebody who presses Ctrl-C twice."
    served = start_serving(package, tmp_path)
    photo = sample_jpeg(4, [0])
    with socket.create_connection(("127.0.0.1", served[1])) as client:
        head = ["POST /invocations HTTP/1.1", "Host: localhost", "Content-Type: image/jpeg",
                f"Content-Length: {len(photo)}", "", ""]
        client.sendall("\r\n".join(head).encode() + photo[:100])
        time.sleep(0.2)
        stopping = threading.Thread(target=stop, args=[served, signals])
        stopping.start()
        for part in range(8):
            time.sleep(1)
            client.sendall(photo[100 + part:101 + part])
        client.sendall(photo[108:])
        assert client.recv(2**16).startswith(b"HTTP/1.1 200")
    stopping.join()
    assert served[0].returncode == 0


def test_serving_removes_nothing_of_its_users(package, tmp_path):
    "The state's folder may be the one in which the package lies."
    before = sorted(p.name for p in package.iterdir())
    stop(start_serving(package, package.parent, "--state", str(package.parent)))
    assert sorted(p.name for p in package.iterdir()) == before
    (tmp_path / "state" / "model").mkdir(parents=True)
    command = [COMMAND, "serve", "none.tar.gz", "--state", tmp_path / "state"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and (tmp_path / "state" / "model").is_dir()


def test_two_may_not_share_a_state(package, tmp_path):
    served = start_serving(package, tmp_path, "--state", str(tmp_path / "state"))
    second = subprocess.run([COMMAND, "serve", package, "--port", "0", "--state", tmp_path / "state"],
                            capture_output=True, text=True, timeout=60)
    assert second.returncode == 2 and "another process keeps its state" in second.stderr, second.stderr
    stop(served)


def test_an_archive_goes_on_in_rays_configuration(package, tmp_path):
    archive = pack(package, tmp_path / "model.tar.gz")
    assert serve_config(archive)["applications"][0]["args"]["package"] == str(archive)


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
