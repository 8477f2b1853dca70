"""The OpenAPI description is true: the endpoint answers as it says, and a generator of requests finds nothing else."""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import jsonschema
import numpy as np
import pytest
from openapi_spec_validator import validate

from intel_nb.images import MAX_BYTES, MAX_PIXELS, encode_jpeg
from intel_nb.scenes import sample_scene
from intel_nb.serving.app import DRIFT_TYPE, ROUTES
from intel_nb.serving.endpoints import throwaway
from intel_nb.serving.monitor import ALARMS, HISTORY
from intel_nb.serving.openapi import IMAGE_TYPES, REFUSALS, describe_api
from intel_nb.serving.payloads import CONTENT_TYPES, MAX_INSTANCES, STATUS

API = describe_api(with_token=True)
PHOTO = encode_jpeg(sample_scene(3, np.random.default_rng(0)))
TOKEN, OPEN = {"authorization": "Bearer s3cret"}, {}
BESIDE = Path(sys.executable).with_name("schemathesis")
SCHEMATHESIS = str(BESIDE) if BESIDE.exists() else shutil.which("schemathesis")


@pytest.fixture(scope="module")
def url(sample_model):
    with throwaway(sample_model, INTEL_NB_TOKEN="s3cret", INTEL_NB_BODY_SECONDS="1") as url:
        yield url


@pytest.mark.parametrize("with_token", [True, False])
def test_it_is_openapi(with_token):
    validate(describe_api(with_token))


def test_it_names_every_route_type_and_code():
    methods = {path: set(operations) for path, operations in API["paths"].items()}
    assert methods == {"/invocations": {"post"}, **{path: {"get", "head"} for path in ROUTES}}
    accepted = set(API["paths"]["/invocations"]["post"]["requestBody"]["content"])
    assert accepted == {*CONTENT_TYPES, DRIFT_TYPE.decode()} and set(IMAGE_TYPES) < accepted
    assert {code: status for status, (_, codes) in REFUSALS.items() for code in codes} == {
        code: status for code, status in STATUS.items() if code != "left"}, "the client that left reads no answer"
    text = json.dumps(API)
    assert set(map(int, re.findall(r'"maxItems": (\d\d+)', text))) == {MAX_INSTANCES, HISTORY, ALARMS}
    assert f"at most {MAX_BYTES >> 20} MiB and {MAX_PIXELS // 10**6} megapixels" in text


def schema_of(path: str, method: str, reply: httpx.Response) -> dict | None:
    "Return the schema of this answer; assert that the answer and its headers are described."
    operation = API["paths"].get(path, {}).get(method.lower(), {"responses": {}})
    by_path = operation["responses"].get(str(reply.status_code))
    found = by_path or API["components"]["responses"][str(reply.status_code)]
    if "$ref" in found:
        found = API["components"]["responses"][found["$ref"].rpartition("/")[2]]
    assert set(found["headers"]) <= {name.title().replace("Www", "WWW") for name in reply.headers}
    if method == "HEAD":
        return None
    return found["content"][reply.headers["content-type"].partition(";")[0]].get("schema")


JSON = {"content-type": "application/json"}
EXAMPLES = [  # method, path, headers, body, status
    ("POST", "/invocations", TOKEN, PHOTO, 200),
    ("POST", "/invocations", TOKEN | {"x-amzn-sagemaker-custom-attributes": "test"}, PHOTO, 200),
    ("POST", "/invocations", TOKEN | {"content-type": DRIFT_TYPE.decode()}, b"-", 200),
    ("POST", "/invocations", TOKEN, b"no image", 400),
    ("POST", "/invocations", TOKEN | JSON, b"{", 400),
    ("POST", "/invocations", OPEN, PHOTO, 401),
    ("POST", "/invocations", TOKEN, bytes(2**24 + 1), 413),
    ("POST", "/invocations", TOKEN | {"content-type": "text/csv"}, b"1,2", 415),
    ("POST", "/invocations", TOKEN | JSON, b'{"inputs": [[[0.5, 0, 0]]]}', 422),
    ("POST", "/invocations", TOKEN | JSON, b"{}", 422),
    *((method, path, TOKEN, None, 200) for path in ROUTES for method in ("GET", "HEAD")),
    *(("GET", path, OPEN, None, 401) for path in ROUTES if path != "/ping"),
    ("GET", "/ping", OPEN, None, 200),
    ("GET", "/nowhere", TOKEN, None, 404),
    ("PUT", "/drift", TOKEN, None, 405),
    ("GET", "/invocations", TOKEN, None, 405),
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: f"{e[0]} {e[1]} {e[4]} {len(e[2])} {(e[3] or b'')[:8]}")
def test_examples_are_answered_as_described(url, example):
    method, path, headers, body, status = example
    reply = httpx.request(method, url + path, headers=headers, content=body, timeout=60)
    assert reply.status_code == status
    schema = schema_of(path, method, reply)
    if schema is not None:
        jsonschema.Draft202012Validator(schema | {"components": API["components"]}).validate(reply.json())


def test_a_slow_body_is_answered_as_described(url):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as slow:
        slow.sendall(f"POST /invocations HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer s3cret\r\n"
                     "Content-Length: 10\r\n\r\nabc".encode())
        text = b"".join(iter(lambda: slow.recv(2000), b"")).decode()  # to the end of the connection
    assert text.startswith("HTTP/1.1 408 ")
    assert json.loads(text.partition("\r\n\r\n")[2])["error"]["code"] == "slow_body"


def test_the_endpoint_returns_it(url, sample_model):
    assert httpx.get(f"{url}/openapi.json", headers=TOKEN).json() == API


@pytest.mark.slow
@pytest.mark.skipif(not SCHEMATHESIS, reason="needs schemathesis, which is in the extra dev")
def test_schemathesis_finds_nothing(url, tmp_path):
    "All default checks, over at least five thousand requests."
    here = Path(__file__).parent
    done = subprocess.run(
        [SCHEMATHESIS, "--config-file", str(here / "schemathesis.toml"), "run", f"{url}/openapi.json", "--no-color",
         "-H", "Authorization: Bearer s3cret", "--max-examples", "5000", "--continue-on-failure"],
        env=os.environ | {"SCHEMATHESIS_HOOKS": "openapi_hooks", "PYTHONPATH": str(here)}, cwd=tmp_path,
        capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert int(re.search(r"(\d+) generated", done.stdout)[1]) >= 5000, done.stdout[-2000:]
