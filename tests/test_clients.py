"""What clients of six kinds send, in their real forms: each request is answered, or refused with the reason."""
import base64
import json
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import boto3
import botocore.exceptions
import httpx
import numpy as np
import pytest
import requests
from PIL import Image

from intel_nb.images import encode_jpeg, encode_png
from intel_nb.scenes import sample_scene
from intel_nb.serving.endpoints import drift_status, throwaway
from intel_nb.serving.shadow import Copy, ShadowClient, Tally

SCENE = sample_scene(3, np.random.default_rng(0))
PHOTO, PICTURE = encode_jpeg(SCENE), encode_png(SCENE)
SCALED = (SCENE[:12, :14] / 255).round(3).tolist()
TEXT = base64.b64encode(PHOTO).decode()


class Reply(NamedTuple):
    status: int
    text: str

    def is_as(self, status: int, what: int | str) -> bool:
        "Whether it has this status, and so many predictions, or this word."
        found = len(json.loads(self.text)["predictions"]) if isinstance(what, int) else what in self.text
        return self.status == status and (found == what if isinstance(what, int) else found)


@pytest.fixture(scope="module")
def url(sample_model):
    with throwaway(sample_model) as url:
        yield url


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    "A folder of files as a person has them."
    folder = tmp_path_factory.mktemp("files")
    (folder / "photo.jpg").write_bytes(PHOTO)
    (folder / "picture.png").write_bytes(PICTURE)
    (folder / "photo").write_bytes(PHOTO)
    (folder / "cut.jpg").write_bytes(PHOTO[:500])
    (folder / "large.bmp").write_bytes(bytes(17 * 2**20))
    Image.fromarray(SCENE).save(folder / "scene.gif")
    (folder / "instances.json").write_text(json.dumps({"instances": [TEXT, TEXT]}))
    (folder / "scaled.json").write_text(json.dumps({"inputs": SCALED}))
    (folder / "lines.json").write_text(json.dumps({"instances": [base64.encodebytes(PHOTO).decode()]}))
    np.save(folder / "scene.npy", np.stack([SCENE] * 3))
    return folder


# --- curl -------------------------------------------------------------------------------------------------------------

JPEG = ["-H", "Content-Type: image/jpeg"]
CURL = [  # arguments, status, and the number of predictions or a word of the answer
    (["--data-binary", "@photo.jpg", *JPEG], 200, 1),
    (["--data-binary", "@photo.jpg"], 415, "-F file=@photo.jpg"),
    (["-d", "@photo.jpg"], 415, "'Content-Type: image/jpeg'"),
    (["--data-binary", "@photo", "-H", "Content-Type:"], 200, 1),
    (["--data-binary", "@photo.jpg", "-H", "Content-Type: application/octet-stream"], 200, 1),
    (["--data-binary", "@picture.png", "-H", "Content-Type: image/x-png"], 200, 1),
    (["--data-binary", "@photo.jpg", *JPEG, "-H", "Transfer-Encoding: chunked"], 200, 1),
    (["--data-binary", "@photo.jpg", *JPEG, "-H", "Expect: 100-continue"], 200, 1),
    (["--data-binary", "@photo.jpg", *JPEG, "--http2"], 200, 1),
    (["--data-binary", "@photo.jpg", *JPEG, "--http1.0"], 200, 1),
    (["-F", "file=@photo.jpg"], 200, 1),
    (["-F", "a=@photo.jpg", "-F", "b=@picture.png"], 200, 2),
    (["-F", "file=@photo;type=text/plain;filename=scène.txt"], 200, 1),
    (["-F", "file=@photo.jpg", "-F", "note=hello"], 422, "the field 'note' of the form has no file"),
    (["-F", "file=photo.jpg"], 422, "curl -F file=@photo.jpg"),
    (["-F", "file=@photo.jpg", "-F", "file=@cut.jpg"], 400, "file 2 of 2, 'cut.jpg': "),
    (["-F", "file=@photo.jpg", "-H", "Content-Type: multipart/form-data"], 200, 1),  # curl adds the boundary
    (["--json", "@instances.json"], 200, 2),
    (["--json", "@lines.json"], 200, 1),
    (["--json", "@scaled.json"], 422, "multiply by 255"),
    (["--data-binary", "@scene.npy", "-H", "Content-Type: application/x-npy"], 200, 3),
    (["--data-binary", "@scene.gif", "-H", "Content-Type: image/gif"], 400, "not one of JPEG, PNG, WEBP, BMP"),
    (["--data-binary", "@large.bmp", "-H", "Content-Type: image/bmp"], 413, "at most 16,777,216"),
    (["-T", "photo.jpg"], 405, "send the image by POST"),
    (["-X", "POST"], 400, "there are no bytes"),
    ([], 405, "send the image by POST"),
]


def curl(target: str, folder: Path, *arguments: str) -> Reply:
    done = subprocess.run(["curl", "-sS", "-w", "\n%{http_code}", *arguments, target], cwd=folder, capture_output=True,
                          timeout=60)
    text, _, status = done.stdout.decode().rpartition("\n")
    assert done.returncode == 0, done.stderr
    return Reply(int(status), text)


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
@pytest.mark.parametrize("case", CURL, ids=lambda case: " ".join(case[0]))
def test_curl(url, files, case):
    arguments, status, what = case
    reply = curl(f"{url}/invocations", files, *arguments)
    assert reply.is_as(status, what), reply


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_a_slash_at_the_end_and_head(url, files):
    for path in ("/invocations/", "/invocations"):
        assert curl(url + path, files, "-L", "-F", "file=@photo.jpg").is_as(200, 1)
    for path in ("/ping", "/ping/", "/drift", "/history/", "/metrics", "/openapi.json", "/"):
        asked, told = curl(url + path, files, "-i"), curl(url + path, files, "-I")
        headers = [{line.partition(":")[0] for line in reply.text.replace("\r", "").partition("\n\n")[0].splitlines()}
                   for reply in (asked, told)]
        assert (asked.status, told.status, headers[0]) == (200, 200, headers[1])
        assert told.text.rstrip("\r\n").count("\r\n\r\n") == 0, "no body"
    assert curl(f"{url}/nowhere/", files, "-I").status == 404


# --- Bytes on the wire: browsers, wrk, Java ---------------------------------------------------------------------------

def raw(url: str, head: str, body: bytes = b"", *, waits: bool = False) -> Reply:
    "Send a request's exact bytes; with `waits` the body only after the interim answer 100. Return the last answer."
    host = url.removeprefix("http://")
    lines = "\r\n".join(line.strip() for line in head.strip().splitlines()).format(host=host, length=len(body))
    with socket.create_connection(tuple(host.split(":")), timeout=60) as connection, connection.makefile("rb") as file:
        connection.sendall(lines.encode() + b"\r\n\r\n" + (b"" if waits else body))
        status, text = read_reply(file)
        if status == 100:
            if waits:
                connection.sendall(body)
            status, text = read_reply(file)
        return Reply(status, text)


def read_reply(file) -> tuple[int, str]:
    status, length = int(file.readline().split()[1]), 0
    while line := file.readline().strip():
        name, _, value = line.decode().partition(":")
        length = int(value) if name.lower() == "content-length" else length
    return status, file.read(length).decode()


def form(boundary: str, *parts: tuple[str, bytes]) -> bytes:
    "A form whose parts have these heads."
    found = [f"--{boundary}\r\n{head}\r\n\r\n".encode() + data + b"\r\n" for head, data in parts]
    return b"".join([*found, f"--{boundary}--\r\n".encode()])


CHROME = """POST {path} HTTP/1.1
    Host: {{host}}
    Connection: keep-alive
    Content-Length: {{length}}
    Cache-Control: max-age=0
    Origin: http://{{host}}
    Content-Type: {kind}
    Upgrade-Insecure-Requests: 1
    User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0.0.0 Safari/537.36
    Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8
    Sec-Fetch-Mode: navigate
    Accept-Encoding: gzip, deflate, br, zstd"""
FIREFOX = """POST {path} HTTP/1.1
    Host: {{host}}
    User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0
    Accept: */*
    Accept-Encoding: gzip, deflate, br
    Content-Type: {kind}
    Content-Length: {{length}}
    Origin: http://{{host}}
    Connection: keep-alive
    Priority: u=0"""
WEBKIT = "----WebKitFormBoundaryePkpFF7tjBAqx29L"
GECKO = "---------------------------9051914041544843365972754266"
SHORT_GECKO = "----geckoformboundary3f9f1e0a4dc3d2b7c0e7a0c1b2d3e4f5"
ONE = ('Content-Disposition: form-data; name="file"; filename="sea.jpg"\r\nContent-Type: image/jpeg', PHOTO)
UNKNOWN = ('Content-Disposition: form-data; name="more"; filename="Küste"\r\nContent-Type: application/octet-stream',
           PICTURE)
NOTHING = ('Content-Disposition: form-data; name="file"; filename=""\r\nContent-Type: application/octet-stream', b"")
SUBMIT = ('Content-Disposition: form-data; name="send"', b"Send it")
BROWSER = {
    "Chrome's form": (CHROME, WEBKIT, form(WEBKIT, ONE), 200, 1),
    "Chrome's form with two files": (CHROME, WEBKIT, form(WEBKIT, ONE, UNKNOWN), 200, 2),
    "Chrome's form, nothing chosen": (CHROME, WEBKIT, form(WEBKIT, NOTHING), 422, "the form has no file"),
    "Chrome's form with a button's value": (CHROME, WEBKIT, form(WEBKIT, ONE, SUBMIT), 422, "the field 'send'"),
    "Firefox's form": (FIREFOX, GECKO, form(GECKO, ONE), 200, 1),
    "Firefox's form of today, one field empty": (FIREFOX, SHORT_GECKO, form(SHORT_GECKO, NOTHING, UNKNOWN), 200, 1),
    "Firefox's form, broken off": (FIREFOX, GECKO, form(GECKO, ONE)[:-70], 400, "before its last boundary"),
}
PLAIN = {  # a page's fetch, and forms without enctype
    "a drop of a file without a type": (CHROME, "application/octet-stream", PHOTO, 200, 1),
    "a drop of a photograph": (FIREFOX, "image/jpeg", PHOTO, 200, 1),
    "a drop of a text": (CHROME, "application/octet-stream", b"hello", 400, "not one of JPEG"),
    "a form without enctype": (CHROME, "application/x-www-form-urlencoded", b"file=sea.jpg", 415, "-F file=@photo.jpg"),
    "a form as text": (FIREFOX, "text/plain", b"file=sea.jpg\r\n", 415, "multipart/form-data"),
    "a canvas as data URL": (CHROME, "application/json",
                             json.dumps({"instances": [f"data:image/jpeg;base64,{TEXT}"]}).encode(), 200, 1),
}
BROWSER |= {name: (head, "", body, status, what) for name, (head, _, body, status, what) in PLAIN.items()}


@pytest.mark.parametrize("name", BROWSER)
def test_browser(url, name):
    head, boundary, body, status, what = BROWSER[name]
    kind = f"multipart/form-data; boundary={boundary}" if boundary else PLAIN[name][1]
    reply = raw(url, head.format(path="/invocations", kind=kind), body)
    assert reply.is_as(status, what), reply


WRK = """{method} {path} HTTP/1.1
    Host: {{host}}"""
LENGTH = "\n    Content-Length: {{length}}"
JAVA = """POST /invocations HTTP/1.1
    Connection: Upgrade, HTTP2-Settings
    Content-Length: {{length}}
    Host: {{host}}
    HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA
    Upgrade: h2c
    User-Agent: Java-http-client/17.0.15
    Content-Type: {kind}"""
APACHE = """POST /invocations HTTP/1.1
    Accept-Encoding: gzip, x-gzip, deflate
    Content-Type: multipart/form-data; charset=ISO-8859-1; boundary=WbrAdXqNiCNpV6Pv8oyLsqHnEBMnhFCt
    Host: {{host}}
    Transfer-Encoding: chunked
    Connection: keep-alive
    User-Agent: Apache-HttpClient/5.3.1 (Java/17.0.15)"""
SPRING = ('Content-Disposition: form-data; name="file"; filename="=?UTF-8?Q?K=C3=BCste.jpg?="\r\n'
          f"Content-Type: image/jpeg\r\nContent-Length: {len(PHOTO)}", PHOTO)
BINARY = ('Content-Disposition: form-data; name="file"; filename="sea.jpg"\r\nContent-Type: image/jpeg\r\n'
          "Content-Transfer-Encoding: binary", PHOTO)


def chunked(data: bytes, size: int = 2048) -> bytes:
    parts = [data[i:i + size] for i in range(0, len(data), size)] + [b""]
    return b"".join(b"%X\r\n%s\r\n" % (len(part), part) for part in parts)


WIRE: dict[str, tuple[str, bytes, bool, int, int | str]] = {
    "wrk": (WRK.format(method="GET", path="/"), b"", False, 200, "What is in the image?"),
    "wrk with a script": (WRK.format(method="POST", path="/invocations") + "\n    Content-Type: image/jpeg" +
                          LENGTH.format(), PHOTO, False, 200, 1),
    "wrk without a type": (WRK.format(method="POST", path="/invocations") + LENGTH.format(), PHOTO, False, 200, 1),
    "wrk without a body": (WRK.format(method="POST", path="/invocations") + LENGTH.format(), b"", False, 400,
                           "there are no bytes"),
    "wrk at a path with a slash": (WRK.format(method="GET", path="/drift/"), b"", False, 200, "observations"),
    "Java's HttpClient": (JAVA.format(kind="image/jpeg"), PHOTO, False, 200, 1),
    "Java, HTML": (JAVA.format(kind="text/html"), b"<p>", False, 415, "are accepted"),
    "Java that expects 100": (JAVA.format(kind="image/jpeg") + "\n    Expect: 100-continue", PHOTO, True, 200, 1),
    "Java's HttpURLConnection, whose default is a form": (
        JAVA.format(kind="application/x-www-form-urlencoded"), PHOTO, False, 415, "'Content-Type: image/jpeg'"),
    "Spring's form": (JAVA.format(kind="multipart/form-data;boundary=OJ_3xk"), form("OJ_3xk", SPRING), False, 200, 1),
    "Apache's form, chunked": (
        APACHE.format(), chunked(form("WbrAdXqNiCNpV6Pv8oyLsqHnEBMnhFCt", BINARY)), False, 200, 1),
}


def test_blanks_are_no_part_of_the_mark_of_a_test(url):
    mark = "POST /invocations HTTP/1.1\r\nHost: {host}\r\nX-Amzn-SageMaker-Custom-Attributes:\ttest \t"
    mark += LENGTH.format()
    host = url.removeprefix("http://")
    with socket.create_connection(tuple(host.split(":")), timeout=60) as connection, connection.makefile("rb") as file:
        lines = mark.replace("\n    ", "\r\n").format(host=host, length=len(PHOTO))
        connection.sendall(lines.encode() + b"\r\n\r\n" + PHOTO)
        assert json.loads(read_reply(file)[1])["drift"] == []


@pytest.mark.parametrize("name", WIRE)
def test_wire(url, name):
    head, body, waits, status, what = WIRE[name]
    reply = raw(url, head, body, waits=waits)
    assert reply.is_as(status, what), reply


# --- Python -----------------------------------------------------------------------------------------------------------

def by_urllib(url: str, **headers: str) -> Reply:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, PHOTO, headers), timeout=60) as reply:
            return Reply(reply.status, reply.read().decode())
    except urllib.error.HTTPError as e:
        return Reply(e.code, e.read().decode())


def answer_of(reply: requests.Response | httpx.Response) -> Reply:
    return Reply(reply.status_code, reply.text)


FOR_URLS = base64.urlsafe_b64encode(PHOTO).decode().rstrip("=")
PYTHON: dict[str, tuple[Callable[[str], requests.Response | httpx.Response | Reply], int, int | str]] = {
    "requests, bytes": (lambda url: requests.post(url, data=PHOTO), 200, 1),
    "requests, a file": (lambda url: requests.post(url, files={"file": ("sea.jpg", PHOTO)}), 200, 1),
    "requests, files of one name": (lambda url: requests.post(
        url, files=[("files", ("a.jpg", PHOTO, "image/jpeg")), ("files", ("b", PICTURE))]), 200, 2),
    "requests, fields beside a file": (lambda url: requests.post(
        url, data={"user": "me"}, files={"file": PHOTO}), 422, "the field 'user'"),
    "requests, fields alone": (lambda url: requests.post(url, data={"file": "sea.jpg"}), 415, "-F file=@"),
    "requests, the header by hand": (lambda url: requests.post(
        url, files={"file": PHOTO}, headers={"Content-Type": "multipart/form-data"}), 400, "boundary"),
    "requests, a generator": (lambda url: requests.post(url, data=iter([PHOTO[:1000], PHOTO[1000:]])), 200, 1),
    "requests, scaled pixels": (lambda url: requests.post(url, json={"inputs": SCALED}), 422, "multiply by 255"),
    "requests, base64 for URLs": (lambda url: requests.post(url, json={"instances": [FOR_URLS]}), 200, 1),
    "requests, base64 of a bytes' repr": (lambda url: requests.post(
        url, json={"instances": [TEXT, str(TEXT.encode())]}), 400, "instance 1: not base64"),
    "requests, compressed": (lambda url: requests.post(
        url, data=PHOTO, headers={"Content-Encoding": "gzip"}), 415, "content encoding 'gzip'"),
    "requests, a preamble": (lambda url: requests.post(
        url, data=b"This is a message in parts.\r\n" + form("b", ONE),
        headers={"Content-Type": "multipart/form-data; boundary=b"}), 200, 1),
    "httpx, bytes": (lambda url: httpx.post(url, content=PHOTO), 200, 1),
    "httpx, files": (lambda url: httpx.post(url, files={"a": PHOTO, "b": ("b.png", PICTURE)}), 200, 2),
    "urllib": (by_urllib, 415, "'Content-Type: image/jpeg'"),
    "urllib with a type": (lambda url: by_urllib(url, **{"Content-Type": "image/JPEG; q=1"}), 200, 1),
}


@pytest.mark.parametrize("name", PYTHON)
def test_python(url, name):
    send, status, what = PYTHON[name]
    reply = send(f"{url}/invocations")
    reply = reply if isinstance(reply, Reply) else answer_of(reply)
    assert reply.is_as(status, what), reply


# --- boto3, through a front that does what SageMaker's runtime does ---------------------------------------------------

class Front(BaseHTTPRequestHandler):
    "Pass type, custom attributes and body on to a container, and wrap what is not 2xx in a ModelError."
    container = ""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        names = ("Content-Type", "X-Amzn-SageMaker-Custom-Attributes")
        passed = {name: self.headers[name] for name in names if self.headers[name]}
        reply = httpx.post(f"{self.container}/invocations", content=body, headers=passed, timeout=60)
        status, answer = reply.status_code, reply.content
        if status >= 300:
            answer = json.dumps({"Message": "Received an error from primary", "OriginalStatusCode": status,
                                 "OriginalMessage": answer.decode(), "LogStreamArn": ""}).encode()
        self.send_response(200 if status < 300 else 424)
        self.send_header("Content-Length", str(len(answer)))
        self.send_header("Content-Type", "application/json")
        if status >= 300:
            self.send_header("x-amzn-ErrorType", "ModelError")
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def runtime(url):
    "A runtime client whose endpoint is the running one."
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("FrontOfOne", (Front,), {"container": url}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield boto3.client("sagemaker-runtime", region_name="eu-west-1", endpoint_url=f"http://127.0.0.1:{server.server_port}",
                       aws_access_key_id="none", aws_secret_access_key="none")
    server.shutdown()


BOTO3: dict[str, tuple[dict[str, str], bytes, int, int | str]] = {
    "no type": ({}, PHOTO, 200, 1),
    "an image": ({"ContentType": "application/x-image", "Accept": "application/json"}, PHOTO, 200, 1),
    "any bytes": ({"ContentType": "application/octet-stream"}, PICTURE, 200, 1),
    "a form": ({"ContentType": f"multipart/form-data; boundary={GECKO}"}, form(GECKO, ONE, UNKNOWN), 200, 2),
    "instances": ({"ContentType": "application/json"}, json.dumps({"instances": [TEXT]}).encode(), 200, 1),
    "scaled pixels": ({"ContentType": "application/json"}, json.dumps({"inputs": SCALED}).encode(), 422, "by 255"),
    "CSV": ({"ContentType": "text/csv"}, b"1,2,3", 415, "application/x-npy are accepted"),
    "a test": ({"ContentType": "image/jpeg", "CustomAttributes": "test"}, PHOTO, 200, '"drift": []'),
}


@pytest.mark.parametrize("name", BOTO3)
def test_boto3(url, runtime, name):
    arguments, body, status, what = BOTO3[name]
    before = drift_status(url)["observations"]
    try:
        reply = Reply(200, runtime.invoke_endpoint(EndpointName="x", Body=body, **arguments)["Body"].read().decode())
    except botocore.exceptions.ClientError as e:
        assert e.response["Error"]["Code"] == "ModelError"
        reply = Reply(int(e.response["OriginalStatusCode"]), e.response["OriginalMessage"])
    assert reply.is_as(status, what), reply
    assert drift_status(url)["observations"] - before == (what if isinstance(what, int) else 0)


# --- Java itself ------------------------------------------------------------------------------------------------------

PROGRAM = """
import java.net.URI; import java.net.http.*; import java.net.http.HttpRequest.*; import java.nio.file.*;
public class Send {
    public static void main(String[] given) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        Path photo = Path.of(given[1]);
        HttpRequest.Builder to = HttpRequest.newBuilder(URI.create(given[0]));
        for (HttpRequest one : new HttpRequest[] {
                to.copy().POST(BodyPublishers.ofFile(photo)).build(),
                to.copy().POST(BodyPublishers.ofFile(photo)).header("Content-Type", "image/jpeg").build(),
                to.copy().POST(BodyPublishers.ofFile(photo)).expectContinue(true).build(),
                to.copy().POST(BodyPublishers.ofInputStream(() -> {
                    try { return Files.newInputStream(photo); } catch (Exception e) { throw new RuntimeException(e); }
                })).build(),
                to.copy().POST(BodyPublishers.noBody()).build(),
                to.copy().GET().build()}) {
            HttpResponse<String> reply = client.send(one, HttpResponse.BodyHandlers.ofString());
            System.out.println(reply.version() + " " + reply.statusCode() + " " + reply.body());
        }
    }
}
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("javac"), reason="needs a JDK")
def test_java(url, files, tmp_path):
    (tmp_path / "Send.java").write_text(PROGRAM)
    done = subprocess.run(["java", "Send.java", f"{url}/invocations", str(files / "photo")], cwd=tmp_path, timeout=120,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    replies = [line.split(" ", 2) for line in done.stdout.splitlines()]
    assert {version for version, _, _ in replies} == {"HTTP_1_1"}
    for (_, status, text), wanted in zip(replies, [(200, 1)] * 4 + [(400, "no bytes"), (405, "by POST")], strict=True):
        assert Reply(int(status), text).is_as(*wanted), text


def test_a_shadow_reads_whatever_production_read(url):
    client, tally, copies = ShadowClient(), Tally("2", url), []
    for name, (_, boundary, body, status, _) in BROWSER.items():
        if status == 200:
            copies.append((f"multipart/form-data; boundary={boundary}" if boundary else PLAIN[name][1], body))
    for kind, body in [("", PHOTO), *copies]:
        answer = httpx.post(f"{url}/invocations", content=body, headers={"content-type": kind}, timeout=60)
        client.compare(Copy(kind, body, answer.content, 0.1), tally)
    client.close()
    assert (tally.failed, tally.requests, tally.agreed) == (0, 1 + len(copies), tally.images)
    assert tally.images > tally.requests > 4


def test_there_are_forty_of_six_kinds():
    assert len(CURL) + len(BROWSER) + len(WIRE) + len(PYTHON) + len(BOTO3) >= 40
