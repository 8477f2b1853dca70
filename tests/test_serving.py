"""The HTTP application, over real sockets."""
import asyncio
import base64
import io
import json
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import httpx
import numpy as np
import pytest
from PIL import Image

from intel_nb.images import MAX_BYTES, encode_jpeg
from intel_nb.scenes import sample_scene
from intel_nb.serving.endpoints import EndpointError, LocalEndpoints, throwaway

SCENES = [sample_scene(i % 6, np.random.default_rng(i)) for i in range(24)]


def encoded(scene: np.ndarray, kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(scene).save(out, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return out.getvalue()


def as_npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def as_instances(*files: bytes) -> bytes:
    return json.dumps({"instances": [base64.b64encode(data).decode() for data in files]}).encode()


FORMS = {  # the same pixels in every lossless form
    "image/png": lambda s: encoded(s, "PNG"),
    "image/webp": lambda s: encoded(s, "WEBP"),
    "image/bmp": lambda s: encoded(s, "BMP"),
    "application/x-npy": as_npy,
    "application/json": lambda s: json.dumps({"inputs": s.tolist()}).encode(),
    "application/json; charset=utf-8": lambda s: as_instances(encoded(s, "PNG")),
}


@pytest.fixture(scope="module")
def url(package):
    with throwaway(package.path) as url:
        yield url


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client


def post(client: httpx.Client, body: bytes, kind: str) -> httpx.Response:
    return client.post("/invocations", content=body, headers={"content-type": kind})


def probabilities(reply: httpx.Response) -> np.ndarray:
    return np.array([list(p["probabilities"].values()) for p in reply.json()["predictions"]])


def test_serving_needs_the_core_alone():
    heavy = ["torch", "torchvision", "timm", "lightning", "mlflow", "pyarrow", "sklearn", "pandas", "fastcore", "onnx",
             "scipy", "alibi_detect", "matplotlib", "IPython", "boto3", "ray", "safetensors"]
    code = f"import sys, intel_nb.serving, intel_nb.serving.worker; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_commands_that_handle_endpoints_import_little():
    heavy = ["onnxruntime", "fastapi", "uvicorn", "torch", "mlflow", "pydantic", "PIL"]
    code = f"import sys, intel_nb.serving.endpoints; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_dataplane_knows_no_http():
    http = ["fastapi", "starlette", "uvicorn"]
    code = f"import sys, intel_nb.serving.dataplane; print([m for m in {http} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("kind", FORMS)
def test_every_form_of_an_image_gets_the_packages_answer(client, package, kind):
    expected = package.predict_bytes([encoded(SCENES[5], "PNG")])["probabilities"]
    reply = post(client, FORMS[kind](SCENES[5]), kind)
    assert reply.status_code == 200
    assert probabilities(reply) == pytest.approx(expected, abs=1e-6)
    answer = reply.json()
    assert answer["model"] == {"name": package.name, "version": "throwaway"}
    assert answer["predictions"][0]["label"] == package.labels[expected[0].argmax()]
    assert answer["predictions"][0]["confidence"] == pytest.approx(expected.max(), abs=1e-6)
    assert set(answer["drift"][0]) == {"time", "statistic", "threshold", "is_drift"}


def test_several_images_in_one_request(client, package):
    expected = package.predict_bytes([encode_jpeg(s) for s in SCENES])["probabilities"]
    before = client.get("/drift").json()["observations"]
    reply = post(client, as_instances(*map(encode_jpeg, SCENES)), "application/json")
    assert probabilities(reply) == pytest.approx(expected, abs=1e-5)
    assert len(reply.json()["drift"]) == len(SCENES)
    assert len(post(client, as_npy(np.stack(SCENES[:3])), "application/x-npy").json()["predictions"]) == 3
    assert client.get("/drift").json()["observations"] == before + len(SCENES) + 3


REFUSED = {
    "no image": (b"no image", "image/jpeg", 400, "undecodable"),
    "no bytes": (b"", "image/jpeg", 400, "undecodable"),
    "truncated": (encode_jpeg(SCENES[0])[:2000], "image/jpeg", 400, "undecodable"),
    "no JSON": (b"{", "application/json", 400, "malformed"),
    "NaN": (b'{"inputs": [[[NaN, 1, 2]]]}', "application/json", 400, "malformed"),
    "deep": (b'{"inputs": ' + b"[" * 5000, "application/json", 422, "shape"),
    "no base64": (b'{"instances": ["?"]}', "application/json", 400, "undecodable"),
    "no array": (b"\x93NUMPY", "application/x-npy", 400, "malformed"),
    "too many bytes": (bytes(MAX_BYTES + 1), "image/png", 413, "too_large"),
    "too many pixels": (encoded(np.zeros((1, 1, 3), np.uint8), "BMP").replace(
        b"\1\0\0\0\1\0\0\0", b"\xff\xff\0\0\xff\xff\0\0", 1), "image/bmp", 413, "too_large"),
    "too many": (json.dumps({"instances": ["AAAA"] * 65}).encode(), "application/json", 413, "too_many"),
    "text": (b"hello", "text/plain", 415, "unsupported_media_type"),
    "no type": (b"hello", "", 400, "undecodable"),
    "as curl names it": (b"hello", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
    "pixels from 0 to 1": (b'{"inputs": [[[0.5, 1, 0]]]}', "application/json", 422, "values"),
    "grey": (b'{"inputs": [[1, 2], [3, 4]]}', "application/json", 422, "shape"),
    "ragged": (b'{"inputs": [[[1, 2, 3]], [[1, 2, 3], [4, 5, 6]]]}', "application/json", 422, "shape"),
    "256": (b'{"inputs": [[[256, 0, 0]]]}', "application/json", 422, "values"),
    "1e400": (b'{"inputs": [[[1e400, 0, 0]]]}', "application/json", 422, "values"),
    "no field": (b"{}", "application/json", 422, "fields"),
    "floats": (as_npy(SCENES[0] / 255), "application/x-npy", 422, "values"),
    "four channels": (as_npy(np.zeros((4, 4, 4), np.uint8)), "application/x-npy", 422, "shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_and_not_observed(client, case):
    body, kind, status, code = REFUSED[case]
    before = client.get("/drift").json()
    reply = post(client, body, kind)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert reply.json()["error"]["message"]
    assert client.get("/drift").json() == before


def test_one_bad_instance_refuses_them_all(client):
    good = encode_jpeg(SCENES[0])
    before = client.get("/drift").json()["observations"]
    reply = post(client, as_instances(good, b"\0\0\0", good), "application/json")
    assert reply.status_code == 400 and reply.json()["error"]["message"].startswith("instance 1: ")
    assert client.get("/drift").json()["observations"] == before


def test_other_routes(client):
    assert client.get("/ping").status_code == 200
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html") and "//" not in page.text
    assert set(client.get("/drift").json()) == {
        "observations", "time", "statistic", "threshold", "is_drift", "alarms", "last_alarm", "latest_alarms", "stream"}
    assert client.get("/history").json()["readings"][-1][0] == client.get("/drift").json()["statistic"]
    assert "intel_nb_drift_observations" in client.get("/metrics").text
    for reply, code in ((client.get("/nowhere"), "not_found"), (client.get("/invocations"), "method_not_allowed"),
                        (client.get("/docs"), "not_found")):
        assert reply.json()["error"]["code"] == code


TOKEN = {"authorization": "Bearer s3cret"}


@dataclass
class Strict:
    "An endpoint with a token that gives its clients a second to send a request, and the folder of its files."
    url: str
    folder: Path


@pytest.fixture(scope="module")
def strict(package, tmp_path_factory):
    folder, env = tmp_path_factory.mktemp("strict"), {"INTEL_NB_TOKEN": "s3cret", "INTEL_NB_BODY_SECONDS": "1"}
    endpoints = LocalEndpoints(folder, owned=True, first_port=0, env=env)
    try:
        yield Strict(endpoints.deploy("staging", package.path, "1").url, folder)
    finally:
        endpoints.stop("staging")
    assert not [p for p in folder.rglob("*.*") if p.is_file() and b"s3cret" in p.read_bytes()], "no file has the token"


def lines_of(log: Path, *names: str) -> dict[str, dict]:
    "Return the lines of the named requests; they are written in groups, so wait until all are there."
    deadline, found = time.monotonic() + 20, {}
    while not set(names) <= set(found):
        assert time.monotonic() < deadline
        time.sleep(0.02)
        whole = log.read_text().rpartition("\n")[0] if log.exists() else ""
        found = {line["id"]: line for line in map(json.loads, whole.splitlines())}
    return found


def test_each_request_has_a_name_and_a_line(strict):
    with httpx.Client(base_url=strict.url, timeout=60, headers=TOKEN) as client:
        named = client.post("/invocations", content=encode_jpeg(SCENES[0]),
                            headers={"content-type": "image/jpeg", "x-request-id": "order-1"})
        unnamed = client.post("/invocations", content=b"",
                              headers={"content-type": "text/plain", "x-request-id": "bad name"})
    assert named.headers["x-request-id"] == "order-1" and len(unnamed.headers["x-request-id"]) == 16
    lines = lines_of(strict.folder / "staging" / "requests.log", "order-1", unnamed.headers["x-request-id"])
    assert {k: lines["order-1"][k] for k in ("method", "path", "status", "version")} == {
        "method": "POST", "path": "/invocations", "status": 200, "version": "1"}
    assert lines["order-1"]["bytes"] == len(named.content) and lines["order-1"]["ms"] > 0
    assert lines[unnamed.headers["x-request-id"]]["status"] == 415


def test_a_token_opens_all_but_ping(strict):
    photo = encode_jpeg(SCENES[0])
    with httpx.Client(base_url=strict.url, timeout=60) as client:
        before = client.get("/drift", headers=TOKEN).json()["observations"]
        assert client.get("/ping").status_code == 200
        assert client.get("/").status_code == 401 and "password" in client.get("/").text, "it asks for the token"
        for refused in (client.get("/drift"), client.get("/metrics"), post(client, photo, "image/jpeg"),
                        client.get("/drift", headers={"authorization": "Bearer s3creT"})):
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "unauthorized")
            assert refused.headers["www-authenticate"] == "Bearer"
        client.headers.update(TOKEN)
        assert post(client, photo, "image/jpeg").status_code == 200
        assert client.get("/drift").json()["observations"] == before + 1


def test_answers_under_load_are_those_of_each_alone(client, url):
    requests = [(encode_jpeg(s), "image/jpeg") if i % 3 else (encoded(s, "PNG"), "image/png")
                for i, s in enumerate(SCENES)]
    alone = [probabilities(post(client, *r)) for r in requests]

    async def together() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as many:
            return await asyncio.gather(*(post(many, *r) for r in requests * 8))

    before = client.get("/drift").json()["observations"]
    replies = asyncio.run(together())
    for i, reply in enumerate(replies):
        assert reply.status_code == 200
        assert probabilities(reply) == pytest.approx(alone[i % len(alone)], abs=1e-5)
    assert client.get("/drift").json()["observations"] == before + len(replies)


@contextmanager
def connection(url: str):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        yield raw


def raw_request(body: bytes, *, headers: str = "", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    head = f"POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\nContent-Length: {size}\r\n"
    return f"{head}{headers}\r\n".encode() + body


def test_callers_who_leave_delay_nobody(client, url):
    "Some waiting clients hang up; those that stay get their own answers."
    body = encode_jpeg(SCENES[3])
    expected = probabilities(post(client, body, "image/jpeg"))
    for _ in range(5):
        with connection(url) as a, connection(url) as b, connection(url) as c:
            for raw in (a, b, c):
                raw.sendall(raw_request(body))
            b.close()
        assert probabilities(post(client, body, "image/jpeg")) == pytest.approx(expected, abs=1e-6)
    deadline = time.monotonic() + 10  # requests in progress are finished even if their client has left
    while "intel_nb_requests_in_hand 0.0" not in client.get("/metrics").text:
        assert time.monotonic() < deadline


def test_half_a_request_and_a_closed_connection(client, url):
    before = client.get("/drift").json()["observations"]
    with connection(url) as raw:
        raw.sendall(raw_request(b"\xff\xd8\xff", length=1000))
    assert client.get("/drift").json()["observations"] == before


def test_the_length_is_checked_before_the_body_is_read(url):
    with connection(url) as raw:
        raw.sendall(raw_request(b"", length=MAX_BYTES + 1))  # and nothing follows
        assert raw.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_client_that_closes_reads_why_its_upload_was_refused(url):
    request = Request(f"{url}/invocations", bytes(MAX_BYTES + 1), {"Content-Type": "image/png"})
    with pytest.raises(HTTPError) as refused:
        urlopen(request, timeout=30)  # it closes its connection after each request
    assert refused.value.code == 413 and json.load(refused.value)["error"]["code"] == "too_large"


def test_a_body_without_length_is_cut_off(client):
    def endless():
        for _ in range(2 * MAX_BYTES // 65536):
            yield bytes(65536)

    assert post(client, endless(), "image/jpeg").status_code == 413


def test_pipelined_requests_are_answered_in_order(url):
    good, bad = raw_request(encode_jpeg(SCENES[0])), raw_request(b"no image", headers="Connection: close\r\n")
    with connection(url) as raw:
        raw.sendall(good + good + bad)
        answers = raw.makefile("rb").read()
    assert [int(part[:3]) for part in answers.split(b"HTTP/1.1 ")[1:]] == [200, 200, 400]


def test_a_slow_client_is_told_and_dropped(strict):
    with connection(strict.url) as raw:
        raw.sendall(raw_request(b"\xff\xd8", length=1000, headers="Authorization: Bearer s3cret\r\n"))
        answer = raw.makefile("rb").read()  # ends because the connection is closed
    assert answer.startswith(b"HTTP/1.1 408") and b"slow_body" in answer


def test_a_wrong_setting_is_named(tmp_path, package):
    endpoints = LocalEndpoints(tmp_path, owned=True, first_port=0, env={"INTEL_NB_QUEUE": "lots"})
    with pytest.raises(EndpointError, match="INTEL_NB_QUEUE='lots' must be a whole number"):
        endpoints.deploy("staging", Path(package.path), "1")
