"""Under load each request gets its own answer, whatever its format, while some clients hang up."""
import asyncio
import base64
import io
import json
import random
import time
from collections.abc import Callable
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image

from bench.load import Answer, exchange, raw_request
from intel_nb.images import decode, encode_jpeg
from intel_nb.scenes import sample_scene
from intel_nb.serving.endpoints import drift_status, throwaway

SCENES = [sample_scene(i % 6, np.random.default_rng([7, i])) for i in range(24)]


def encoded(scene: np.ndarray, kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(scene).save(out, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return out.getvalue()


def as_instances(scenes: list[np.ndarray]) -> bytes:
    return json.dumps({"instances": [base64.b64encode(encoded(s, "PNG")).decode() for s in scenes]}).encode()


def as_npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


FORMS: dict[str, tuple[str, Callable[[int], bytes], Callable[[int], list[int]]]] = {  # content type, body, its scenes
    "jpeg": ("image/jpeg", lambda i: encode_jpeg(SCENES[i]), lambda i: [i]),
    "png": ("image/png", lambda i: encoded(SCENES[i], "PNG"), lambda i: [i]),
    "webp": ("image/webp", lambda i: encoded(SCENES[i], "WEBP"), lambda i: [i]),
    "bmp": ("image/bmp", lambda i: encoded(SCENES[i], "BMP"), lambda i: [i]),
    "npy": ("application/x-npy", lambda i: as_npy(SCENES[i]), lambda i: [i]),
    "npy of two": ("application/x-npy", lambda i: as_npy(np.stack([SCENES[i], SCENES[i - 1]])), lambda i: [i, i - 1]),
    "inputs": ("application/json", lambda i: json.dumps({"inputs": SCENES[i].tolist()}).encode(), lambda i: [i]),
    "instances": ("application/json", lambda i: as_instances([SCENES[i - k] for k in range(3)]),
                  lambda i: [i, i - 1, i - 2]),
}


@pytest.fixture(scope="module")
def cases(package) -> list[tuple[bytes, np.ndarray]]:
    "Return a request for each scene in each form, and the package's probabilities for its images alone."
    pixels = np.stack([decode(encoded(s, "PNG"), package.image_size) for s in SCENES])
    lossless = package.predict(pixels, 1)["probabilities"]
    jpegs = package.predict_bytes([encode_jpeg(s) for s in SCENES], 1)["probabilities"]
    return [(raw_request(body(i), kind), (jpegs if form == "jpeg" else lossless)[scenes(i)])
            for form, (kind, body, scenes) in FORMS.items() for i in range(len(SCENES))]


async def hang_up(port: int, request: bytes, turns: int) -> None:
    "Send a request and close the connection: at once, or while the request is processed."
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    for _ in range(turns):
        await asyncio.sleep(0)
    writer.transport.abort()


async def under_load(url: str, requests: list[bytes], leavers: list[bytes], connections: int = 16) -> list[Answer]:
    "Return the answers to `requests` in their order, while clients send `leavers` and hang up."
    answers: list[Answer] = []
    port, rng = int(url.rpartition(":")[2]), random.Random(0)
    gone: set[asyncio.Task] = set()

    def note(answer: Answer) -> None:
        assert answer.status == 200, f"request {answer.index}: {answer.status or 'no answer'} {answer.body[:200]}"
        answers.append(answer)
        if leavers and len(answers) % 10 == 0:
            gone.add(asyncio.ensure_future(hang_up(port, leavers.pop(), rng.randrange(200))))

    await exchange(url, requests, connections, note=note)
    await asyncio.gather(*gone)
    return sorted(answers)


def wait_until_idle(url: str) -> None:
    "Wait for the requests whose clients have left: they are finished all the same."
    deadline = time.monotonic() + 30
    while "intel_nb_requests_in_hand 0.0" not in urlopen(f"{url}/metrics").read().decode():
        assert time.monotonic() < deadline


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_each_answer_under_load_is_that_of_its_request_alone(package, cases, count):
    rng = np.random.default_rng(count)
    chosen, leaving = rng.integers(len(cases), size=count), rng.integers(len(cases), size=count // 10)
    requests, leavers = [cases[k][0] for k in chosen], [cases[k][0] for k in leaving]
    with throwaway(package.path) as url:
        answers = asyncio.run(under_load(url, requests, leavers))
        wait_until_idle(url)
        observed = drift_status(url)["observations"]
    assert [a.index for a in answers] == list(range(count))
    tolerance = package.card["batch_tolerance"]
    assert not [k for k, answer in zip(chosen, answers) if difference(answer, cases[k][1]) > tolerance]
    times = [reading["time"] for answer in answers for reading in json.loads(answer.body)["drift"]]
    staying, left = (sum(len(cases[k][1]) for k in group) for group in (chosen, leaving))
    assert len(times) == staying <= observed <= staying + left


def difference(answer: Answer, expected: np.ndarray) -> float:
    "Return the largest difference of the answer's probabilities from the `expected` ones (N, C)."
    predictions = json.loads(answer.body)["predictions"]
    return float(np.abs(np.array([list(p["probabilities"].values()) for p in predictions]) - expected).max())
