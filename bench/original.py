"""Serve the original project's handler: a PyTorch model behind HTTP, with its transform and its drift detector."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.load import start_python
from intel_nb.images import decode
from intel_nb.model import cores
from intel_nb.scenes import SAMPLE_CLASSES
from intel_nb.storage import InputError, write_bytes

if TYPE_CHECKING:
    import torch


def _as_pixels(data: bytes) -> list:
    "Return an image as H×W×3 whole numbers."
    return decode(data, 150).tolist()


def _as_tensor(data: bytes) -> list:
    "Return an image as 3×224×224 numbers from 0 to 1, rounded to eight places."
    return np.round(decode(data, 224).transpose(2, 0, 1) / 255, 8).tolist()


BODIES: dict[str, Callable[[bytes], list]] = {"pixels": _as_pixels, "tensor": _as_tensor}


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def original_transform(array: np.ndarray) -> torch.Tensor:
    "Transform an image as the original did, building the transform each time: float32 (1, 3, 224, 224)."
    import torch
    import torchvision.transforms as T

    if array.dtype.kind == "f":
        transform = T.Compose([T.Resize((224, 224)), T.Normalize(MEAN, STD)])
        return transform(torch.from_numpy(array.astype(np.float32)))[None]
    transform = T.Compose([T.ToPILImage(), T.Resize((224, 224)), T.ToTensor(), T.Normalize(MEAN, STD)])
    return transform(array.astype(np.uint8))[None]


class Original:
    "The original project's handler, with random weights; `images` (at least 50) are the detector's reference."

    def __init__(self, images: Sequence[bytes]):
        from intel_nb import _torchvision

        _torchvision.allow()
        import timm
        import torch
        from alibi_detect.cd import MMDDriftOnline

        torch.set_num_threads(cores())
        torch.manual_seed(0)
        self.model = timm.create_model("regnetz_c16", pretrained=False, num_classes=6).eval()
        reference = np.concatenate([original_transform(decode(data, 150)).numpy() for data in images[:50]])
        self.detector, self.lock = MMDDriftOnline(reference, 150, 2, backend="pytorch", verbose=False), threading.Lock()

    def answer(self, body: bytes) -> bytes:
        "Answer a request body with a response body."
        import torch

        x = original_transform(np.array(json.loads(body)))
        with self.lock, torch.no_grad():
            confidences, classes = torch.topk(torch.softmax(self.model(x), dim=1), 5)
            drift = self.detector.predict(np.array(x.squeeze(0)), return_test_stat=True)["data"]
        answer = {SAMPLE_CLASSES[k]: c for k, c in zip(classes[0].tolist(), confidences[0].tolist())}
        return json.dumps(answer | {"drift": [float(drift["test_stat"]), int(drift["is_drift"])]}).encode()


def serve_original(folder: str) -> None:
    "Print the port in this process, then serve the handler until standard input ends."
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    original = Original([p.read_bytes() for p in sorted(Path(folder).iterdir())])

    class Handler(BaseHTTPRequestHandler):
        protocol_version, disable_nagle_algorithm, wbufsize = "HTTP/1.1", True, -1

        def do_POST(self) -> None:
            answer = original.answer(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()


@contextmanager
def original_served(images: Sequence[bytes]) -> Iterator[str]:
    "Serve the original's handler inside the block and return its URL; raise `InputError` where it cannot run."
    from importlib.util import find_spec

    if not find_spec("alibi_detect") or not find_spec("timm"):
        raise InputError(
            "compare_original needs timm and alibi-detect; install intel-nb[steps,alibi], on Python below 3.13"
        )
    with tempfile.TemporaryDirectory(prefix="intel-nb-") as folder:
        for k, data in enumerate(islice(cycle(images), 50)):
            write_bytes(Path(folder) / f"{k:02}", data)
        process = start_python("bench.original:serve_original", folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            if not (port := process.stdout.readline().strip()):
                raise RuntimeError("the original's handler did not start; its error is printed above")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.stdin.close()
            process.wait(30)
