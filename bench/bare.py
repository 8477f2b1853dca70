"""Measure the bare loop of decoder and ONNX Runtime, and what the detector adds to it."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.load import Load
from intel_nb.images import decode
from intel_nb.model import Package, cores, open_session

if TYPE_CHECKING:
    import onnxruntime


@dataclass(frozen=True)
class Loop:
    "`sessions` threads, each with an ONNX Runtime session of `threads` threads, that take `batch` images at a time."

    sessions: int
    threads: int
    batch: int


def loops(cores: int, batches: Sequence[int] = (1, 2, 4, 8, 16)) -> list[Loop]:
    "List the loops to try: a session for each core, and one session for all of them."
    return [Loop(*layout, batch) for layout in sorted({(cores, 1), (1, cores)}) for batch in batches]


def paced(step: Callable[[], Any], seconds: float) -> list[float]:
    "Run `step` again and again for `seconds`, after one run to warm up; return the seconds that each took."
    step()
    times, now = [], time.perf_counter()
    until = now + seconds
    while now < until:
        before, _, now = now, step(), time.perf_counter()
        times.append(now - before)
    return times


class Bare:
    "Bare loops of the graph `model` (file or bytes) with an input of `side` pixels, over encoded `images` in turn."

    def __init__(self, model: str | Path | bytes, side: int, images: Sequence[bytes]):
        self.model, self.side, self.turn, self._sessions = model, side, cycle(images), {}

    def load(self, loop: Loop, seconds: float) -> Load:
        "Measure the images a second of `loop`."
        steps = [self._step(k, loop) for k in range(loop.sessions)]
        with ThreadPoolExecutor(loop.sessions) as pool:
            times = list(pool.map(paced, steps, [seconds] * loop.sessions))
        return Load(sum(loop.batch * len(t) / sum(t) for t in times))

    def one_image(self, seconds: float, threads: int = 1) -> Load:
        "Measure decoding one image and running the model on it, on a session of `threads` threads."
        times = paced(self._step(0, Loop(1, threads, 1)), seconds)
        return Load(len(times) / sum(times), 1000 * statistics.median(times))

    def _step(self, k: int, loop: Loop) -> Callable[[], None]:
        "Return the work that thread `k` of a loop repeats."
        if (k, loop.threads) not in self._sessions:
            self._sessions[k, loop.threads] = open_session(self.model, loop.threads)
        return partial(_forward, self._sessions[k, loop.threads], self.side, self.turn, loop.batch)


def _forward(session: onnxruntime.InferenceSession, side: int, turn: Iterator[bytes], batch: int) -> None:
    session.run(None, {"images": np.stack([decode(data, side) for data in islice(turn, batch)])})


def best_loop(bare: Bare, seconds: float, rounds: int = 2) -> Loop:
    "Find the fastest loop for this machine by trying each `rounds` times."
    tried = measure_in_turn({loop: partial(bare.load, loop, seconds) for loop in loops(cores())}, rounds)
    return max(tried, key=lambda loop: statistics.median(found.rate for found in tried[loop]))


def measure_in_turn(plan: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, list]:
    "Take each measurement in `plan` once a round, every other round in reverse, so that a slow spell meets all alike."
    found: dict[Any, list] = {name: [] for name in plan}
    for k in range(rounds):
        for name in list(plan)[:: -1 if k % 2 else 1]:
            found[name].append(plan[name]())
    return found


def without_drift(model: str | Path) -> bytes:
    "Return the graph in the file `model` without its output `drift` and the nodes that only it needs."
    import onnx
    from onnx.utils import Extractor

    graph = onnx.load(model)
    kept = [output.name for output in graph.graph.output if output.name != "drift"]
    return Extractor(graph).extract_model([graph.graph.input[0].name], kept).SerializeToString()


def update_cost(
    package: Package, images: Sequence[bytes], batch: int = 8, updates: int = 1000, every: int = 16
) -> float:
    "Measure the CPU milliseconds an image that a package's monitor takes, with its state written every `every` images."
    from intel_nb.serving.monitor import Monitor

    outputs = package.predict_bytes(list(images))
    rows, classes = outputs["drift"], outputs["probabilities"].argmax(axis=1)
    order = np.resize(np.random.default_rng(0).permutation(len(rows)), (-(-updates // batch), batch))
    with tempfile.TemporaryDirectory(prefix="intel-nb-") as folder:
        monitor = Monitor(package, folder, every=every)
        monitor.update(rows[:1], classes[:1])
        began = time.process_time()
        for index in order:
            monitor.update(rows[index], classes[index])
        return 1000 * (time.process_time() - began) / order.size


def drift_share(rate: float, rate_without: float, update_ms: float, cores: int) -> float:
    "Work out what share of throughput drift costs, from images a second with and without it, and the update's time."
    return 1 - (cores / rate_without) / (cores / rate + update_ms / 1000)
