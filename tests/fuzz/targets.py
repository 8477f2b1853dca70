"""What reads bytes from outside, as functions of bytes: each either reads them, or raises an error that it promises."""

import asyncio
import contextlib
import hashlib
import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from intel_nb.chain.runs import read_run
from intel_nb.images import ImageError, check_image, decode, encode_jpeg, encode_png
from intel_nb.labels.files import read_labels
from intel_nb.labels.members import READ_ERRORS, list_members
from intel_nb.labels.records import UnusableLabel
from intel_nb.model import Package, load_package, sample_package
from intel_nb.parameters import declared, read_declarations, read_value
from intel_nb.registry import read_decisions
from intel_nb.scenes import sample_scene
from intel_nb.serving.app import check_caller
from intel_nb.serving.monitor import load_state, save_state
from intel_nb.serving.payloads import Refusal, parse
from intel_nb.serving.protocol import Connection, HttpServer
from intel_nb.serving.supervisor import StageRecord, read_record, read_request
from intel_nb.storage import InputError, with_check

PROMISED = (InputError, Refusal, ImageError, UnusableLabel)
SCENE = sample_scene(3, np.random.default_rng(0))[:48, :48]
FOLDER = Path(tempfile.mkdtemp(prefix="intel-nb-fuzz-"))


@dataclass(frozen=True)
class Target:
    "A reader of bytes, bytes to begin with, and how many cases it gets of a million."
    read: Callable[[bytes], object]
    seeds: list[bytes]
    share: int = 80_000


def as_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    "Return a function that writes bytes to a file, and reads that."
    path = FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)

    def write_and_read(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return write_and_read


def body(kind: str) -> Callable[[bytes], object]:
    return lambda data: parse(kind, data, 32)


def read_archive(path: Path) -> object:
    for member in list_members(path, FOLDER / "scratch")[:20]:
        with contextlib.suppress(*READ_ERRORS):  # of one member; the others are read all the same
            member.read()
    return None


class Wire:
    "What a connection needs of a transport."
    def __init__(self): self.written, self.is_over = b"", False
    def write(self, data: bytes) -> None: self.written += data
    def write_eof(self) -> None: pass
    def close(self) -> None: self.is_over = True
    abort = close
    def is_closing(self) -> bool: return self.is_over
    def pause_reading(self) -> None: pass
    resume_reading = pause_reading
    def get_write_buffer_size(self) -> int: return 0
    def get_extra_info(self, name: str, default: object = None) -> object: return default


async def ask(scope, receive, send) -> None:
    "Ask of a request whether its caller may, and read its body."
    with contextlib.suppress(Refusal):
        check_caller(scope, dict(scope["headers"]), "")
    while (await receive()).get("more_body"):
        continue
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


LOOP, SERVER = asyncio.new_event_loop(), HttpServer(ask)
SERVER.config.load()


def read_head(data: bytes) -> None:
    "Bring `data` to a connection in two pieces, and let the application answer what it takes for requests."
    asyncio.set_event_loop(LOOP)
    connection = Connection(SERVER.config, SERVER.server_state, {}, LOOP)
    connection.connection_made(Wire())
    for piece in (data[:len(data) // 2], data[len(data) // 2:]):
        if piece and not connection.transport.is_over:
            connection.data_received(piece)
            for _ in range(4):
                LOOP.call_soon(LOOP.stop)
                LOOP.run_forever()
    assert b"HTTP/1.1 500" not in connection.transport.written, "uvicorn has caught an error"
    connection.connection_lost(None)
    LOOP.call_soon(LOOP.stop)
    LOOP.run_forever()


def read_parameter(data: bytes) -> object:
    text = data.decode(errors="replace")
    for default, comment in ((1, "int ≥ 1: x"), (0.5, "float 0–1: x"), ("a", "a | b: x"), ([], "list of str: x")):
        with contextlib.suppress(InputError):
            read_value(text, declared("x", default, comment, "x"))
    return read_declarations(text, "x")


def package_with(name: str) -> Callable[[bytes], object]:
    "Return a function that loads a package in which the file `name` has other bytes, and its manifest says so."
    folder = sample_package(FOLDER / f"package-{name}")
    manifest = json.loads((folder / "manifest.json").read_text())

    def load(data: bytes) -> object:
        (folder / name).write_bytes(data)
        if name != "manifest.json":
            files = manifest["files"] | {name: hashlib.sha256(data).hexdigest()}
            (folder / "manifest.json").write_text(json.dumps(manifest | {"files": files}))
        found = load_package(folder)
        return found.labels, found.card, found.detector() if name == "drift.npz" else None

    return load


def state_reader() -> Callable[[bytes], object]:
    package = load_package(sample_package(FOLDER / "served"))
    return as_file("state.json", lambda path: load_state(path, package))


def seed_state() -> bytes:
    package: Package = load_package(sample_package(FOLDER / "served"))
    state, detector = load_state(FOLDER / "none.json", package)
    save_state(FOLDER / "seed.json", state, detector, package.fingerprint)
    return (FOLDER / "seed.json").read_bytes()


def seed_archive() -> bytes:
    with zipfile.ZipFile(stream := io.BytesIO(), "w") as archive:
        for k in range(3):
            archive.writestr(f"sea/{k}.png", encode_png(SCENE[k:k + 8, :8]))
    return stream.getvalue()


def seed_npy() -> bytes:
    np.save(stream := io.BytesIO(), SCENE[:8, :8])
    return stream.getvalue()


def of_package(name: str) -> bytes:
    return (sample_package(FOLDER / "seeds") / name).read_bytes()


LABELS = {
    "labels.csv": b"image,label\na.jpg,sea\nb.jpg,forest\n",
    "labels.json": json.dumps([{"data": {"image": "a.jpg"}, "annotations": [{"result": [
        {"type": "choices", "from_name": "label", "to_name": "image", "value": {"choices": ["sea"]}}]}]}]).encode(),
    "labels.manifest": json.dumps({"source-ref": "s3://b/a.jpg", "job": 0, "job-metadata": {
        "class-name": "sea", "type": "groundtruth/image-classification", "confidence": 0.9}}).encode() + b"\n",
    "coco.json": json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "categories": [{"id": 1, "name": "sea"}],
                             "annotations": [{"image_id": 1, "category_id": 1}]}).encode(),
}
FORM = b'--x\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\n%s\r\n--x--\r\n' % encode_png(SCENE)


def targets() -> dict[str, Target]:
    "Return all targets by name."
    found = {
        "image": Target(lambda data: (check_image(data), decode(data, 16)),
                        [encode_jpeg(SCENE[:16, :16]), encode_png(SCENE[:16, :16])], 80_000),
        "archive": Target(as_file("a.zip", read_archive), [seed_archive()], 60_000),
        "tarball": Target(as_file("a.tar", read_archive), [bytes(1024)], 40_000),
        "json": Target(body("application/json"), [json.dumps({"inputs": SCENE[:3, :3].tolist()}).encode(),
                                                  b'{"instances": ["aGVsbG8="]}']),
        "npy": Target(body("application/x-npy"), [seed_npy()]),
        "multipart": Target(body("multipart/form-data; boundary=x"), [FORM]),
        "head": Target(read_head, [b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc",
                                   b"GET http://a/ HTTP/1.1\r\nHost: b\r\nTransfer-Encoding: chunked\r\n\r\n"
                                   b"1\r\na\r\n0\r\n\r\n"],
                       120_000),
        "parameters": Target(read_parameter, [b"epochs = 3  # int \xe2\x89\xa5 1: passes\n", b"[1, 2]", b"0.5"]),
        "decisions": Target(as_file("decisions.jsonl", read_decisions), [b'{"number": 1}\n'], 60_000),
        "record": Target(as_file("stage/endpoint.json", lambda path: (read_record(path.parent))), [
            json.dumps(with_check(StageRecord("stage", "http://127.0.0.1:1", "1"))).encode()], 60_000),
        "request": Target(as_file("stage2/request.json", lambda path: read_request(path.parent)), [b"{}"], 40_000),
        "run": Target(as_file("executed/one/run.json", lambda path: read_run(path.parents[1], "one")), [b"{}"], 40_000),
        "state": Target(state_reader(), [seed_state()], 40_000),
        "manifest": Target(package_with("manifest.json"), [of_package("manifest.json")], 20_000),
        "labels file": Target(package_with("labels.json"), [of_package("labels.json")], 10_000),
        "drift file": Target(package_with("drift.npz"), [of_package("drift.npz")], 10_000),
    }
    for name, seed in LABELS.items():
        found[name] = Target(lambda data, name=name: [list(part) for part in read_labels(name, data)], [seed], 45_000)
    return found


def try_case(target: Target, data: bytes) -> None:
    "Read `data`; any error but the promised ones is a find."
    with contextlib.suppress(*PROMISED):
        target.read(data)
