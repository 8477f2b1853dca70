"""Plan what the benchmark measures, and work out the ratios."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.bare import Bare, best_loop, without_drift
from bench.load import Load, LoadSpec, check_all_answered, load, raw_request, write_requests
from bench.original import BODIES
from intel_nb.model import Package


def bare_plan(
    package: Package, images: Sequence[bytes], seconds: float, name: str = ""
) -> dict[str, Callable[[], Load]]:
    "Plan the best bare loops of `package`, with all outputs and without `drift`, and one image at a time."
    bare = Bare(package.path / "model.onnx", package.image_size, images)
    less = Bare(without_drift(bare.model), bare.side, images)
    best = best_loop(bare, seconds / 10)
    plan = {
        "bare loop": partial(bare.load, best, seconds),
        "bare loop, one image": partial(bare.one_image, seconds),
        "bare loop without drift": partial(less.load, best, seconds),
    }
    return {name + what: measure for what, measure in plan.items()}


def load_plan(name: str, spec: LoadSpec) -> dict[str, Callable[[], Load]]:
    "Plan the load of `spec`, and the same over one connection."
    alone = replace(spec, connections=1, requests=spec.requests and -(-spec.requests // 4))
    return {
        name: lambda: check_all_answered(load(spec)),
        f"{name}, one connection": lambda: check_all_answered(load(alone)),
    }


def original_plan(url: str, images: Sequence[bytes], folder: Path, connections: int, requests: int) -> dict:
    "Plan loads of the original at `url` with each form of body; `folder` takes the requests."
    plan = {}
    for form, encode in BODIES.items():
        bodies = (json.dumps(encode(data)).encode() for data in images[:40])
        written = write_requests(folder / form, (raw_request(body, "application/json") for body in bodies))
        plan |= load_plan(f"original, {form}", LoadSpec(url, str(written), connections, requests=requests))
    return plan


RATIOS = (  # what, beside what, in which figure
    ("endpoint", "bare loop", "rate"),
    ("endpoint, one connection", "bare loop, one image", "p50"),
    ("endpoint", "other bare loop", "rate"),
    ("bare loop", "bare loop without drift", "rate"),
    ("other settings", "endpoint", "rate"),
    *(("endpoint", f"original, {form}", "rate") for form in BODIES),
    *((f"original, {form}", "endpoint", "p50") for form in BODIES),
    *((f"original, {form}, one connection", "endpoint, one connection", "p50") for form in BODIES),
)


def compare(found: dict[str, list[Load]]) -> list[dict[str, Any]]:
    "Work out median, lowest and highest ratio over the rounds, for each of `RATIOS` that was measured."
    rows = []
    for what, beside, figure in RATIOS:
        if what in found and beside in found:
            pairs = [(getattr(a, figure), getattr(b, figure)) for a, b in zip(found[what], found[beside])]
            ratios = [a / b for a, b in pairs if a and b] or [math.nan]
            rows.append(
                {
                    "ratio": f"{what} / {beside}",
                    "figure": figure,
                    "median": statistics.median(ratios),
                    "lowest": min(ratios),
                    "highest": max(ratios),
                }
            )
    return rows


def table(found: dict[str, list[Load]], ratios: Sequence[dict[str, Any]]) -> str:
    "Lay out figures (medians over the rounds) and ratios as lines of text."
    lines = [f"{'':40}{'images/s':>10}{'p50 ms':>10}{'p99 ms':>10}{'client':>10}"]
    for name, loads in found.items():
        columns = [
            [v for load in loads if (v := getattr(load, f)) is not None] for f in ("rate", "p50", "p99", "client")
        ]
        lines.append(f"{name:40}" + "".join(f"{statistics.median(c):10.2f}" if c else f"{'–':>10}" for c in columns))
    lines += ["", f"{'':70}{'median':>10}{'lowest':>10}{'highest':>10}"]
    for r in ratios:
        lines.append(
            f"{r['ratio'] + ', ' + UNITS[r['figure']]:70}{r['median']:10.3f}{r['lowest']:10.3f}{r['highest']:10.3f}"
        )
    return "\n".join(lines)


UNITS = {"rate": "images/s", "p50": "p50"}
