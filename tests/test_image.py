"""The images, built and run: as root as on SageMaker, and as any user with next to nothing. None has a network."""
import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK
from containers import MISSING, Images

from intel_nb.aws.pipeline import ENTRY, NOTEBOOKS, code_environment
from intel_nb.model import load_package, pack
from intel_nb.scenes import sample_jpeg

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"lacks {', '.join(MISSING)}")]

PHOTOS = [sample_jpeg(k % 6, [7, k]) for k in range(10)]
USERS = pytest.mark.parametrize("uid", [0, 1000], ids=["as root", "as another user"])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    kept = os.environ.get("INTEL_NB_TEST_IMAGES")  # a folder in which they stay, to test them again
    made = Images(Path(kept) if kept else tmp_path_factory.mktemp("images"))
    if not (made.folder / "images").exists():
        made.make_base()
        made.build()
    yield made
    made.release()
    if not kept:
        shutil.rmtree(made.folder, ignore_errors=True)


@pytest.fixture
def package(waiting_once) -> Path:
    "The package of a real run."
    [found] = (waiting_once.home / "store" / "train").glob("*/model")
    return found


@pytest.fixture
def ml(tmp_path, uid) -> Path:
    "A folder to be /opt/ml, which the user of the container may write to."
    folder = tmp_path / "ml"
    folder.mkdir()
    os.chown(folder, uid, uid)
    return folder


def give(folder: Path, uid: int) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, uid, uid)


def test_what_sagemaker_takes(images):
    "It refuses OCI manifests, and each layer costs a download."
    for image in ("intel-nb:serve", "intel-nb:steps"):
        found = images.describe(image)
        manifest = json.loads(found["Manifest"])
        assert manifest["mediaType"] == "application/vnd.docker.distribution.manifest.v2+json"
        assert {layer["mediaType"] for layer in manifest["layers"]} <= {
            "application/vnd.docker.image.rootfs.diff.tar", "application/vnd.docker.image.rootfs.diff.tar.gzip"}
        assert len(manifest["layers"]) <= 4
        assert not found["Docker"]["config"]["User"]
        size = sum(layer["size"] for layer in manifest["layers"])
        print(f"{image}: {len(manifest['layers'])} layers, {size / 1e6:.0f} MB")


ASK = """
import http.client, json, sys, time
port, files = int(sys.argv[1]), sys.argv[2:]
def ask(method, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, {"Content-Type": "image/jpeg"} if body else {})
    reply = connection.getresponse()
    return reply.status, json.loads(reply.read())
deadline = time.monotonic() + 60
while True:
    try:
        status, answer = ask("GET", "/ping")
        break
    except OSError:
        if time.monotonic() > deadline: raise
        time.sleep(.02)
print(json.dumps([(status, answer), *(ask("POST", "/invocations", open(file, "rb").read()) for file in files)]))
"""


def ask(container, files: list[str], port: int = 8080) -> list:
    "Return the answers to a ping and to each file, once the container answers."
    client = container.client(ASK, str(port), *files)
    out = client.communicate(timeout=120)[0]
    assert client.returncode == 0, container.log
    return json.loads(out)


@pytest.fixture
def files(tmp_path) -> list[str]:
    found = [tmp_path / f"{k}.jpg" for k in range(len(PHOTOS))]
    for path, photo in zip(found, PHOTOS):
        path.write_bytes(photo)
    return [str(path) for path in found]


@USERS
def test_a_package_is_served(images, package, ml, files, uid):
    "The package belongs to root, so that another user may read it and no more."
    shutil.copytree(package, ml / "model")
    give(ml / "model", 0)
    with images.run("intel-nb:serve", {"/opt/ml": ml}, uid=uid) as container:
        ask(container, [])
        print(f"uid {uid}: ready after {time.monotonic() - container.began:.1f} s")
        (status, ready), *answers = ask(container, files)
        assert (status, ready["status"]) == (200, "ready")
        check_answers(package, answers)
        container.signal("TERM")
        assert container.wait(30) == 0, container.log


def check_answers(path: Path, answers: list) -> None:
    package = load_package(path)
    expected = package.predict_bytes(PHOTOS)["probabilities"]
    for row, (status, answer) in zip(expected, answers, strict=True):
        [found] = answer["predictions"]
        assert (status, found["label"]) == (200, package.labels[row.argmax()])
        given = np.array([found["probabilities"][label] for label in package.labels])
        assert np.abs(given - row).max() <= package.card["batch_tolerance"]


@pytest.mark.parametrize("uid", [1000])
def test_an_archive_at_another_port(images, package, ml, files, uid):
    "SageMaker may name a port, and other tools mount the archive as it is."
    (ml / "model").mkdir()
    pack(package, ml / "model" / "model.tar.gz")
    give(ml, uid)
    with images.run("intel-nb:serve", {"/opt/ml": ml}, uid=uid, env={"SAGEMAKER_BIND_TO_PORT": "9090"}) as container:
        _, *answers = ask(container, files, 9090)
        check_answers(package, answers)


@pytest.mark.parametrize("uid", [0])
def test_a_package_that_cannot_be_trusted_is_not_served(images, package, ml, uid):
    shutil.copytree(package, ml / "model")
    (ml / "model" / "labels.json").write_text("[]")
    with images.run("intel-nb:serve", {"/opt/ml": ml}) as container:
        assert container.wait(60) == 2
        assert "labels.json is not the file that the manifest lists" in container.log


LOAD = """
import http.client, json, sys, threading
photo, outcomes, lock = open(sys.argv[1], "rb").read(), {}, threading.Lock()
def note(name):
    with lock: outcomes[name] = outcomes.get(name, 0) + 1
def send(keeps):
    connection = None
    while True:
        if connection is None:
            connection = http.client.HTTPConnection("127.0.0.1", 8080, timeout=40)
            try: connection.connect()
            except ConnectionRefusedError: return  # it has ended, and says so
        try:
            connection.request("POST", "/invocations", photo, {"Content-Type": "image/jpeg"})
            reply = connection.getresponse()
            reply.read()
            note(reply.status)
            if sum(outcomes.values()) == 40: print("under load", flush=True)
        except (OSError, http.client.HTTPException) as error:
            note(f"lost: {type(error).__name__}")
        if not keeps or connection.sock is None: connection.close(); connection = None
threads = [threading.Thread(target=send, args=[k % 2 == 0]) for k in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(outcomes))
"""


@pytest.mark.parametrize("uid", [0])
def test_sigterm_under_load_loses_no_request(images, package, ml, files, uid):
    shutil.copytree(package, ml / "model")
    with images.run("intel-nb:serve", {"/opt/ml": ml}) as container:
        ask(container, [])
        client = container.client(LOAD, files[0])
        assert client.stdout.readline() == "under load\n"
        began = time.monotonic()
        container.signal("TERM")
        assert container.wait(30) == 0, container.log
        outcomes = json.loads(client.communicate(timeout=60)[0])
        print(f"{outcomes}, ended after {time.monotonic() - began:.1f} s")
        assert set(outcomes) == {"200"}


def run_chain(images, ml: Path, archive: Path, uid: int, *more: str):
    shutil.copy(archive, ml / "scenes.zip")
    give(ml, uid)
    env = {"INTEL_NB_HOME": "/opt/ml/workspace", "INTEL_NB_EXECUTED": "/opt/ml/executed"}
    command = ["intel-nb", "run", "--data", "/opt/ml/scenes.zip", "--approve", "--run-id", "here", *more]
    return images.run("intel-nb:steps", {"/opt/ml": ml}, command, uid, env)


@USERS
def test_six_notebooks_without_a_network(images, ml, archive, uid):
    with run_chain(images, ml, archive, uid, *QUICK) as container:
        assert container.wait(400) == 0, container.log
    record = json.loads((ml / "executed" / "here" / "run.json").read_text())
    assert [step["status"] for step in record["steps"]] == ["succeeded"] * 6


@USERS
def test_a_processing_job(images, ml, archive, uid):
    "As the pipeline's definition starts it, for this code; wrong input and other code are in `message`."
    mount = ml / "processing" / "input" / "archive"
    mount.mkdir(parents=True)
    shutil.copy(archive, mount)
    give(ml, uid)
    command = [*ENTRY, NOTEBOOKS["data"]]
    with images.run("intel-nb:steps", {"/opt/ml": ml}, command, uid, code_environment()) as container:
        assert container.wait(120) == 0, container.log
    assert json.loads((ml / "processing" / "output" / "result.json").read_text())["train"]
    assert (ml / "processing" / "executed" / NOTEBOOKS["data"]).is_file()
    (mount / archive.name).write_bytes(b"no zip")
    with images.run("intel-nb:steps", {"/opt/ml": ml}, command, uid) as container:
        assert container.wait(120) == 2, container.log
    assert archive.name in (ml / "output" / "message").read_text()
    with images.run("intel-nb:steps", {"/opt/ml": ml}, command, uid, {"INTEL_NB_CODE": "0" * 16}) as container:
        assert container.wait(120) == 2, container.log
    assert "the job is for the code 0000000000000000" in (ml / "output" / "message").read_text()


def training_job(ml: Path, dataset: Path, uid: int, **hyperparameters: str) -> None:
    "Lay out /opt/ml as SageMaker does for a training job."
    shutil.copytree(dataset, ml / "input" / "data" / "dataset")
    (ml / "input" / "config").mkdir()
    (ml / "input" / "config" / "hyperparameters.json").write_text(json.dumps(hyperparameters))
    give(ml, uid)


@pytest.fixture
def dataset(waiting_once) -> Path:
    [found] = (waiting_once.home / "store" / "data").glob("*/dataset")
    return found


@USERS
def test_a_training_job(images, ml, dataset, uid):
    "Its package is what the image `serve` serves, and a wrong hyperparameter is in `failure`."
    training_job(ml, dataset, uid, bootstraps="2000", profile='"quick"')
    with images.run("intel-nb:steps", {"/opt/ml": ml}, uid=uid) as container:
        assert container.wait(200) == 0, container.log
    assert load_package(ml / "model").card["profile"] == "quick"
    assert not (ml / "output" / "failure").exists()
    (ml / "input" / "config" / "hyperparameters.json").write_text('{"epoch": "3"}')
    with images.run("intel-nb:steps", {"/opt/ml": ml}, ["train"], uid=uid) as container:
        assert container.wait(60) == 2, container.log
    assert "has no parameter epoch; did you mean epochs?" in (ml / "output" / "failure").read_text()


@pytest.mark.parametrize("uid", [0])
def test_a_training_job_that_is_stopped_goes_on_from_its_last_epoch(images, ml, dataset, uid):
    given = {"bootstraps": "2000", "profile": "full", "epochs": "8", "image_size": "64"}
    training_job(ml, dataset, uid, **given)
    with images.run("intel-nb:steps", {"/opt/ml": ml}) as container:
        deadline = time.monotonic() + 600
        while not list((ml / "checkpoints").glob("*/last.ckpt")):
            assert container.process.poll() is None and time.monotonic() < deadline, container.log
            time.sleep(0.2)
        began = time.monotonic()
        container.signal("TERM")
        assert container.wait(300) == 1
        print(f"stopped after {time.monotonic() - began:.1f} s")
    assert "stopped" in (ml / "output" / "failure").read_text()
    with images.run("intel-nb:steps", {"/opt/ml": ml}) as container:
        assert container.wait(600) == 0, container.log
    shown = (ml / "output" / "data" / "01_train.ipynb").read_text()
    epochs = [int(number) for number in re.findall(r"epoch (\d+): val_", shown)]
    assert epochs and 1 < epochs[0] == 9 - len(epochs), "it did not begin again"
