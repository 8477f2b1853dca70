"""The accuracy in production: labels that come after serving are held against the answers that were given."""
import hashlib
import json

import httpx
import numpy as np

from intel_nb.images import encode_jpeg
from intel_nb.scenes import SAMPLE_CLASSES, sample_scene
from intel_nb.storage import write_json, write_text


def scene(number: int) -> bytes:
    return encode_jpeg(sample_scene(number % 6, np.random.default_rng([11, number])))


def ask(url: str, body: bytes, name: str = "", **headers: str) -> httpx.Response:
    named = {"x-request-id": name} if name else {}
    return httpx.post(f"{url}/invocations", content=body, headers={"content-type": "image/jpeg"} | named | headers)


def serve_and_log(house, count: int) -> tuple[list[tuple[str, str]], str]:
    """Send `count` scenes, a batch of two and a test to the staging endpoint.

    Return ids and answers of the scenes, and the second answer of the batch."""
    (endpoint,) = house("endpoints", "--json").json
    answered = [ask(endpoint["url"], scene(k), f"order-{k}") for k in range(count)]
    ask(endpoint["url"], scene(1), "probe", **{"X-Amzn-SageMaker-Custom-Attributes": "test"})
    two = [("file", (f"{k}.jpg", scene(k), "image/jpeg")) for k in range(2)]
    pair = httpx.post(f"{endpoint['url']}/invocations", files=two, headers={"x-request-id": "pair"}).json()
    scenes = [(a.headers["x-request-id"], a.json()["predictions"][0]["label"]) for a in answered]
    return scenes, pair["predictions"][1]["label"]


def test_labels_of_requests(staged):
    "Ids of requests with labels give the accuracy, once however often, shown with the models and in the report."
    answers, pair = serve_and_log(staged, 24)
    staged("stop")  # the log is whole now
    rows = [f"{name},{'forest' if k == 3 and label != 'forest' else label}" for k, (name, label) in enumerate(answers)]
    wrong = int(answers[3][1] != "forest")
    labels = write_text(staged.root / "truth.csv", "\n".join(["request_id,label", *rows, "pair#1,forest", "probe,sea",
                                                              "pair,sea", "unknown,sea", "order-1,", ""]))
    first, second = (staged("measure", str(labels), "--stage", "staging", "--json").json for _ in range(2))
    assert first == second
    found = first["versions"]["1"]["requests"]
    assert (found["images"], round(found["accuracy"] * 25)) == (25, 24 - wrong + (pair == "forest"))
    left_out = {"cannot be read": 1, "name nothing that staging has answered": 3}  # of the latter: probe, pair, unknown
    assert first["left_out"] == left_out
    assert "of labelled requests" in staged("models").out
    assert staged("models", "--json").json[0]["production"]["requests"]["images"] == 25
    run = staged.newest()["run_id"]
    assert staged("report", run).status == 0
    assert "Accuracy in production" in (staged.executed / run / "report.html").read_text()


def test_labelled_captures_that_train_are_measured_too(waiting):
    "Whoever gives labelled captures to a run need not give them to `measure`."
    image = scene(5)
    name = f"images/{hashlib.sha256(image).hexdigest()}.jpg"
    folder = waiting.home / "captures" / "production" / "2026-01-31T120000Z-00000042"
    (folder / "images").mkdir(parents=True)
    (folder / name).write_bytes(image)
    guess = {"result": [{"from_name": "label", "to_name": "image", "type": "choices", "value": {"choices": ["sea"]}}]}
    task = {"data": {"image": name}, "predictions": [guess],
            "meta": {"source": "capture", "captured": "2026-01-31T12:00:00Z", "endpoint": "production", "version": "1"}}
    write_json(folder / "tasks.json", [task])
    label = {"result": [guess["result"][0] | {"value": {"choices": [SAMPLE_CLASSES[5]]}}]}
    labels = write_json(waiting.root / "export.json", [task | {"annotations": [label]}])
    assert waiting.run("--annotations", str(labels), "--to", "data").status == 0
    found = waiting("models", "--json").json[0]["production"]["captures"]
    assert (found["images"], found["accuracy"]) == (1, float(SAMPLE_CLASSES[5] == "sea"))


def test_labels_that_name_nothing(waiting):
    "They are refused with what to do."
    labels = write_text(waiting.root / "truth.csv", "request_id,label\nr1,sea\n")
    answer = waiting("measure", str(labels))
    assert (answer.status, "x-request-id" in answer.err) == (2, True)
    assert waiting("measure", str(waiting.root / "none.csv")).status == 2
    assert json.loads(waiting("models", "--json").out)[0]["production"] == {}


def test_a_damaged_record_stops_nothing(waiting):
    "`check` names it and puts it aside; other commands show nothing instead."
    record = write_text(waiting.home / "outcomes" / "1.json", '{"requests": 7}')
    assert waiting("models", "--json").json[0]["production"] == {}
    assert waiting("report", "first").status == 0
    assert str(record) in waiting("check").out
    waiting("check", "--repair")
    assert not record.exists()
