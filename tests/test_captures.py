"""Images that an alarm keeps: a real endpoint, scenes in fog, and a folder that Label Studio imports."""
import asyncio
import base64
import hashlib
import io
import json
import time
from pathlib import Path
from xml.etree import ElementTree

import httpx
import numpy as np
import pytest
from PIL import Image

from intel_nb.images import encode_jpeg
from intel_nb.scenes import SAMPLE_CLASSES, sample_scene
from intel_nb.serving.captures import CaptureRecord, list_captures
from intel_nb.serving.dataplane import InferenceRequest, Service, Settings
from intel_nb.serving.endpoints import LocalEndpoints, drift_status, invoke


def photo(number: int) -> bytes:
    return encode_jpeg(sample_scene(number % 6, np.random.default_rng([5, number])))


def fogged(number: int) -> bytes:
    "A scene in fog: all colours drawn towards grey."
    scene = sample_scene(number % 6, np.random.default_rng([7, number])).astype(np.float32)
    return encode_jpeg((0.45 * scene + 0.55 * 200).astype(np.uint8))


def serve(tmp_path: Path, package: Path, **env: str):
    "Serve `package` in staging of a workspace below `tmp_path`; return the endpoints and the URL."
    endpoints = LocalEndpoints(tmp_path / "workspace" / "endpoints", owned=True, first_port=18500, env=env)
    return endpoints, endpoints.deploy("staging", package, "7").url


def captures_in(tmp_path: Path) -> list[CaptureRecord]:
    return list_captures(tmp_path / "workspace" / "captures")


def alarms_in(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "workspace" / "endpoints" / "staging" / "state" / "alarms").glob("*.json"))


def send_until_alarm(url: str, first: int = 0) -> list[bytes]:
    "Send scenes in fog until the endpoint alarms, and return them."
    sent = []
    while len(sent) < 200:
        sent.append(fogged(first + len(sent)))
        if invoke(url, sent[-1], "image/jpeg")["drift"][0]["is_drift"]:
            return sent
    raise AssertionError("no alarm in fog")


def test_a_test_is_no_traffic(tmp_path, sample_model):
    "It is answered; the detector does not see it, and nothing of it is kept or reported."
    endpoints, url = serve(tmp_path, sample_model, INTEL_NB_CAPTURE="5")
    answers = [invoke(url, fogged(k), "image/jpeg", test=True) for k in range(40)]
    assert all(len(answer["predictions"]) == 1 and answer["drift"] == [] for answer in answers)
    assert (drift_status(url)["observations"], drift_status(url)["alarms"]) == (0, 0)
    sent = send_until_alarm(url, first=500)
    assert drift_status(url)["observations"] == len(sent)
    endpoints.stop("staging")
    capture, = captures_in(tmp_path)
    digests = {hashlib.sha256(image).hexdigest() for image in sent}
    assert {path.stem for path in (capture.where / "images").iterdir()} <= digests
    alarm, = alarms_in(tmp_path)
    assert alarm.stem == capture.where.name


def test_an_alarm_keeps_its_window_and_what_follows(tmp_path, sample_model):
    endpoints, url = serve(tmp_path, sample_model, INTEL_NB_CAPTURE="30")
    calm = [photo(k) for k in range(20)]
    assert not any(invoke(url, image, "image/jpeg")["drift"][0]["is_drift"] for image in calm)
    sent = send_until_alarm(url)
    deadline = time.monotonic() + 30
    while not captures_in(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)  # they appear while the endpoint serves
    assert captures_in(tmp_path)[0].images > 0
    follow = [fogged(1000 + k) for k in range(40)]
    answers = {}
    for image in follow:
        answers[hashlib.sha256(image).hexdigest()] = invoke(url, image, "image/jpeg")["predictions"][0]
    again = invoke(url, sent[-1], "image/jpeg")
    assert set(again["drift"][0]) == {"time", "statistic", "threshold", "is_drift"}
    endpoints.stop("staging")

    capture, = captures_in(tmp_path)
    assert (capture.stage, capture.version, capture.images) == ("staging", "7", 30)
    alarm, = (path for path in alarms_in(tmp_path) if path.stem == capture.where.name)
    window = json.loads(alarm.read_text())["window"]
    tasks = json.loads((capture.where / "tasks.json").read_text())
    expected = [*[*calm, *sent][-window:], *follow][:30]
    assert [t["data"]["image"] for t in tasks] == [f"images/{hashlib.sha256(i).hexdigest()}.jpg" for i in expected]
    for task, image in zip(tasks, expected):
        assert (capture.where / task["data"]["image"]).read_bytes() == image
        assert task["meta"] == {"source": "capture", "captured": capture.time, "endpoint": "staging", "version": "7"}
        (guess,) = task["predictions"]
        assert 0 <= guess["score"] <= 1 and guess["model_version"] == "pooled_pixels 7"
        (result,) = guess["result"]
        assert (result["type"], result["from_name"], result["to_name"]) == ("choices", "label", "image")
        if answer := answers.get(hashlib.sha256(image).hexdigest()):
            assert (result["value"]["choices"], guess["score"]) == ([answer["label"]], round(answer["confidence"], 4))
    view = ElementTree.fromstring((capture.where / "labels.xml").read_text())
    assert [c.get("value") for c in view.iter("Choice")] == list(SAMPLE_CLASSES)
    choices, image = view.find("Choices"), view.find("Image")
    assert (choices.get("name"), choices.get("toName"), image.get("value")) == ("label", "image", "$image")


@pytest.mark.slow
def test_images_of_every_form_are_kept(tmp_path, sample_model):
    endpoints, url = serve(tmp_path, sample_model, INTEL_NB_CAPTURE="200", INTEL_NB_CAPTURES="3")
    send_until_alarm(url)
    texts = [base64.b64encode(fogged(500 + k)).decode() for k in range(3)]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(fogged(600 + k)))) for k in range(2)])
    array = io.BytesIO()
    np.save(array, pixels)
    invoke(url, json.dumps({"instances": texts}).encode(), "application/json")
    invoke(url, array.getvalue(), "application/x-npy")
    invoke(url, json.dumps({"inputs": pixels[0].tolist()}).encode(), "application/json")
    sent = [fogged(700 + k) for k in range(4)]
    body = httpx.Request("POST", url, files=[("file", sent[0]), ("file", sent[1])])
    invoke(url, body.read(), body.headers["content-type"])
    invoke(url, sent[2], "application/octet-stream")
    invoke(url, json.dumps({"instances": [f"data:;base64,{base64.encodebytes(sent[3]).decode()}"]}).encode(),
           "application/json")
    endpoints.stop("staging")
    capture, = captures_in(tmp_path)
    names = [t["data"]["image"] for t in json.loads((capture.where / "tasks.json").read_text())][-9:]
    assert [(capture.where / n).read_bytes() for n in names[:3]] == [base64.b64decode(t) for t in texts]
    assert [(capture.where / n).read_bytes() for n in names[5:]] == sent
    assert [n.rpartition(".")[2] for n in names[3:5]] == ["png", "png"]  # the same pixels as JSON are not kept again
    stored = [np.asarray(Image.open(capture.where / name)) for name in names[3:5]]
    assert [np.array_equal(image, p) for image, p in zip(stored, pixels)] == [True, True]


@pytest.mark.slow
def test_a_capture_of_0_images_keeps_nothing(tmp_path, sample_model):
    endpoints, url = serve(tmp_path, sample_model, INTEL_NB_CAPTURE="0")
    send_until_alarm(url)
    endpoints.stop("staging")
    assert not (tmp_path / "workspace" / "captures").exists()


@pytest.mark.slow
def test_a_full_disk_does_not_stop_the_endpoint(tmp_path, sample_model):
    "Here: the folder for captures cannot be made, as a file stands in its place."
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace" / "captures").write_text("in the way")
    endpoints, url = serve(tmp_path, sample_model)
    send_until_alarm(url)
    assert [invoke(url, fogged(300 + k), "image/jpeg")["model"]["version"] for k in range(5)] == ["7"] * 5
    endpoints.stop("staging")
    assert "a capture is given up" in (tmp_path / "workspace" / "endpoints" / "staging" / "supervisor.log").read_text()


@pytest.mark.slow
def test_on_a_cluster_the_front_keeps_them(tmp_path, sample_model):
    "The detector is a process of its own there; the bodies are with the application in front of it."
    pytest.importorskip("ray")
    endpoints = LocalEndpoints(tmp_path / "workspace" / "endpoints", owned=True, first_port=18500,
                               env={"INTEL_NB_REPLICAS": "1"})
    url = endpoints.deploy("staging", sample_model, "7", engine="ray").url
    sent = send_until_alarm(url)
    endpoints.stop("staging")
    capture, = captures_in(tmp_path)
    tasks = json.loads((capture.where / "tasks.json").read_text())
    assert tasks[-1]["data"]["image"] == f"images/{hashlib.sha256(sent[-1]).hexdigest()}.jpg"
    assert capture.where.name in {alarm.stem for alarm in alarms_in(tmp_path)}


@pytest.mark.slow
def test_probes_change_no_alarm(package, tmp_path):
    "Two thousand scenes, the last in fog, alone and with a probe at every tenth: the same readings and alarms."
    images = [InferenceRequest("image/jpeg", photo(k) if k < 1500 else fogged(k)) for k in range(2000)]
    probe = InferenceRequest("image/jpeg", photo(0), is_test=True)

    async def readings(name: str, every: int | None) -> list[dict]:
        service, found = Service(package, tmp_path / name, "1", Settings(threads=2)), []
        service.warm()
        service.start()
        for k, image in enumerate(images):
            together = [image, probe] if every and k % every == 0 else [image]
            answer, *probed = await asyncio.gather(*map(service.submit, together))
            found += json.loads(answer)["drift"]
            assert all(json.loads(one)["drift"] == [] for one in probed)
        await service.release()
        assert service.monitor.status()["observations"] == len(images)
        service.batcher.close()
        return found

    alone, probed = asyncio.run(readings("alone", None)), asyncio.run(readings("probed", 10))
    alarms = [[k for k, reading in enumerate(run) if reading["is_drift"]] for run in (alone, probed)]
    assert alarms[0] == alarms[1] and max(alarms[0]) >= 1500
    assert [r["time"] for r in alone] == [r["time"] for r in probed]
    assert [r["statistic"] for r in probed] == pytest.approx([r["statistic"] for r in alone], abs=1e-3)
