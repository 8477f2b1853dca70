"""Send requests to an endpoint from processes of their own, count the answers, and watch the processes that answer.

The module is a plain one because the client runs in a process that imports it.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
import time
import zipfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from intel_nb.images import ImageError, encode_jpeg, open_image
from intel_nb.scenes import SAMPLE_CLASSES, sample_scene
from intel_nb.serving.worker import python_command
from intel_nb.storage import InputError, python_path, write_bytes, write_text


def read_images(path: str | Path = "", limit: int = 300) -> list[bytes]:
    "Read at most `limit` encoded images, evenly spread, from a folder, zip or shards; draw scenes if `path` is empty."
    if not path:
        scenes = (sample_scene(i % len(SAMPLE_CLASSES), np.random.default_rng(i)) for i in range(min(limit, 60)))
        return [encode_jpeg(scene) for scene in scenes]
    found = [data for data in _members(Path(path), limit) if _is_image(data)]
    if not found:
        raise InputError(
            f"{path} holds no images; give a folder or a zip of JPEG files, or a dataset's folder of shards"
        )
    return found


def _members(path: Path, limit: int) -> list[bytes]:
    "Read at most `limit` files, evenly spread."
    spread = lambda items: [items[k * len(items) // limit] for k in range(limit)] if limit < len(items) else items
    if path.is_dir() and any(path.glob("test-*.parquet")):
        from intel_nb.dataset import read_split

        return list(spread(read_split(path, "test").images))
    if path.is_dir():
        return [p.read_bytes() for p in spread(sorted(p for p in path.rglob("*") if p.is_file()))]
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is neither a folder nor a zip; give one that holds images")
    with zipfile.ZipFile(path) as archive:
        return [archive.read(name) for name in spread(sorted(n for n in archive.namelist() if not n.endswith("/")))]


def _is_image(data: bytes) -> bool:
    try:
        return bool(open_image(data))
    except ImageError:
        return False


@dataclass(frozen=True)
class Load:
    "Figures of a load; None where one is not known."

    rate: float  # images, or answers of 200, a second
    p50: float | None = None  # milliseconds until one was there: the median
    p99: float | None = None  # and the 99th percentile
    statuses: dict[str, int] | None = None  # all answers by HTTP status
    client: float | None = None  # cores that the client took for itself


def raw_request(body: bytes, content_type: str) -> bytes:
    "Return the bytes of an HTTP/1.1 request to `/invocations`, with the token in `INTEL_NB_TOKEN` if there is one."
    token = os.environ.get("INTEL_NB_TOKEN")
    head = [
        "POST /invocations HTTP/1.1",
        "Host: localhost",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
    ]
    head += [f"Authorization: Bearer {token}"] if token else []
    return "\r\n".join([*head, "", ""]).encode() + body


def write_requests(folder: str | Path, requests: Iterable[bytes]) -> Path:
    "Write each of `requests` to a file in `folder`: `00001`, `00002`, …"
    for k, request in enumerate(requests, 1):
        write_bytes(Path(folder) / f"{k:05}", request)
    return Path(folder)


@dataclass(frozen=True)
class LoadSpec:
    "Send the requests in `folder` over and over, until `seconds` have passed or `requests` are sent."

    url: str
    folder: str
    connections: int = 8
    seconds: float = 60
    requests: int | None = None
    rate: float = 0  # requests a second, as long as there are free connections; 0: as many as there are answers


class Answer(NamedTuple):
    "The answer to request `index`: HTTP status (0 if the connection was lost), seconds that it took, and body."

    index: int
    status: int
    seconds: float
    body: bytes


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
    "Read the next HTTP response, which must have a length; return status, body, and whether the connection closes."
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(re.search(rb"\r\ncontent-length: *(\d+)", head)[1])
    return int(head[9:12]), await reader.readexactly(length), b"\r\nconnection: close" in head


async def send_over_one_connection(url: str, take: Callable[[], Any], note: Callable[[Answer], None]) -> None:
    "Send each (index, request) that `take` returns until it returns None; connect again when the connection is lost."
    host, port = url.removeprefix("http://").split(":")
    writer = None
    while (taken := await take()) is not None:
        index, request = taken
        began, status, body, ends = time.perf_counter(), 0, b"", True
        with suppress(OSError, EOFError):  # a TimeoutError is the former
            async with asyncio.timeout(60):
                if writer is None:
                    reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(request)
                status, body, ends = await read_answer(reader)
        note(Answer(index, status, time.perf_counter() - began, body))
        if ends and writer is not None:
            writer.close()
            writer = None
    if writer is not None:
        writer.close()


async def exchange(
    url: str,
    requests: Iterable[bytes],
    connections: int = 8,
    *,
    note: Callable[[Answer], None],
    seconds: float = math.inf,
    rate: float = 0,
) -> float:
    "Send `requests` over `connections` until `seconds` have passed, `note` each answer, return the seconds taken."
    began, turn = time.perf_counter(), enumerate(requests)
    passed = lambda: time.perf_counter() - began

    async def take() -> tuple[int, bytes] | None:
        taken = next(turn, None)
        due = taken[0] / rate if taken and rate else 0
        if due > passed():
            await asyncio.sleep(min(due, seconds) - passed())
        return taken if max(due, passed()) < seconds else None

    await asyncio.gather(*(send_over_one_connection(url, take, note) for _ in range(connections)))
    return passed()


class Tally:
    "Counts answers."

    def __init__(self):
        self.statuses, self.times = Counter(), array("f")

    def note(self, answer: Answer) -> None:
        self.statuses[str(answer.status) if answer.status else "lost"] += 1
        if answer.status == 200:
            self.times.append(answer.seconds)

    def load(self, seconds: float, cpu: float = 0) -> Load:
        "Summarise a load of `seconds`, in which the client used `cpu` seconds of processor time."
        p50, p99 = (np.percentile(self.times, (50, 99)) * 1000).tolist() if self.times else (None, None)
        return Load(len(self.times) / seconds, p50, p99, dict(self.statuses), cpu / seconds)


def run_client(fields: dict[str, Any]) -> None:
    "Carry out the `LoadSpec` with these `fields` here: print a line when it begins, and its `Load` at the end."
    spec, tally = LoadSpec(**fields), Tally()
    files = [p.read_bytes() for p in sorted(Path(spec.folder).iterdir())]
    try:
        from uvloop import new_event_loop
    except ImportError:
        from asyncio import new_event_loop
    print("sending", flush=True)
    began = time.process_time()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        seconds = runner.run(
            exchange(
                spec.url,
                islice(cycle(files), spec.requests),
                spec.connections,
                note=tally.note,
                seconds=spec.seconds,
                rate=spec.rate,
            )
        )
    print(json.dumps(asdict(tally.load(seconds, time.process_time() - began))))


def start_client(spec: LoadSpec) -> subprocess.Popen:
    "Start a process that carries out `spec`; `read_result` waits for its figures."
    return start_python("bench.load:run_client", asdict(spec), stdout=subprocess.PIPE)


def start_python(function: str, argument: Any, **streams: Any) -> subprocess.Popen:
    "Start a process that calls `function` with `argument` (see `python_command`); it finds the folder of `bench`."
    found = os.environ | {"PYTHONPATH": python_path(Path(__file__).parents[1])}
    return subprocess.Popen(python_command(function, argument), text=True, env=found, **streams)


def read_result(process: subprocess.Popen) -> Load:
    "Wait for a client process and return its figures; raise `RuntimeError` if it died."
    printed, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the client died with exit status {process.returncode}")
    found = Load(**json.loads(printed.splitlines()[-1]))
    return replace(found, statuses={status: n for status, n in found.statuses.items() if n})


WRK = """
local requests, turn = {}, 0
function init(args)
  for path in io.lines(args[1]) do
    local file = io.open(path, "rb")
    requests[#requests + 1] = file:read("*a")
    file:close()
  end
end
function request()
  turn = turn % #requests + 1
  return requests[turn]
end
function done(summary, latency)
  local e, s = summary.errors, summary.duration / 1e6
  local lost, good = e.connect + e.read + e.write + e.timeout, summary.requests - e.status
  io.write(string.format('\\n{"rate": %f, "p50": %f, "p99": %f, "statuses": {"200": %d, "other": %d, "lost": %d}}\\n',
    good / s, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, good, e.status, lost))
end
"""


def wrk_command(spec: LoadSpec, folder: Path) -> list[str]:
    "Return the `wrk` command for `spec`; its script and its list of requests go into `folder`."
    script = write_text(folder / "turn.lua", WRK)
    files = write_text(folder / "files", "".join(f"{p}\n" for p in sorted(Path(spec.folder).absolute().iterdir())))
    options = ["-t1", f"-c{spec.connections}", f"-d{max(1, round(spec.seconds))}s", "--timeout=60s", f"-s{script}"]
    return ["wrk", *options, spec.url, "--", str(files)]


def _wrk(spec: LoadSpec) -> Load:
    with tempfile.TemporaryDirectory(prefix="intel-nb-") as folder:
        before = os.times()
        found = read_result(subprocess.Popen(wrk_command(spec, Path(folder)), text=True, stdout=subprocess.PIPE))
        after = os.times()
    cpu = sum(after[2:4]) - sum(before[2:4])  # of children that have ended
    return replace(found, client=cpu / (after.elapsed - before.elapsed))


def load(spec: LoadSpec, wrk: bool | None = None) -> Load:
    "Carry out `spec` and return its figures; with `wrk` None, the client is wrk where it is installed and able."
    if (shutil.which("wrk") and spec.requests is None and not spec.rate) if wrk is None else wrk:
        return _wrk(spec)
    return read_result(start_client(spec))


def check_all_answered(load: Load) -> Load:
    "Return `load` if all its answers are 200; raise `RuntimeError` otherwise."
    if load.statuses is not None and set(load.statuses) != {"200"}:
        raise RuntimeError(f"not all requests were answered with 200: {load.statuses}")
    return load


def listening_processes(url: str) -> list[int]:
    "Return the ids of the processes on this machine that hold the listening socket of `url`; empty without `/proc`."
    port, listening, sockets = f"{int(url.rpartition(':')[2]):04X}", "0A", Path("/proc/net/tcp")
    lines = [line.split() for line in sockets.read_text().splitlines()[1:]] if sockets.exists() else []
    inodes = {f"socket:[{line[9]}]" for line in lines if line[1].endswith(f":{port}") and line[3] == listening}
    return sorted(int(p.parent.name) for p in Path("/proc").glob("[0-9]*/fd") if inodes & _open_files(p))


def _open_files(folder: Path) -> set[str]:
    "Return what a process has open, from its `/proc/<pid>/fd`; empty if it is gone or another user's."
    found = set()
    with suppress(OSError):
        for link in folder.iterdir():
            with suppress(OSError):
                found.add(str(link.readlink()))
    return found


def footprint(pids: Sequence[int]) -> dict[str, float]:
    "Add up resident memory (MB), open files and threads of the processes `pids`."
    total = {"memory_mb": 0.0, "files": 0, "threads": 0}
    for pid in pids:
        fields = dict(re.findall(r"^(\w+):\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M))
        total["memory_mb"] += int(fields["VmRSS"]) / 1024
        total["threads"] += int(fields["Threads"])
        total["files"] += sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    return total


def soak(spec: LoadSpec, every: float) -> tuple[Load, list[dict[str, float]]]:
    "Carry out `spec` and measure the endpoint's processes every `every` seconds; return load and measurements."
    running, rows = start_client(spec), []
    running.stdout.readline()  # it has begun
    began = time.monotonic()
    while (passed := time.monotonic() - began) < spec.seconds and running.poll() is None:
        rows.append({"seconds": passed, **footprint(listening_processes(spec.url))})
        with suppress(subprocess.TimeoutExpired):
            running.wait(every)
    return read_result(running), rows


def growth(rows: Sequence[dict[str, float]], warm_up: float = 0.2) -> dict[str, float]:
    "Fit a straight line through each column and return its slope an hour, without the first `warm_up` share of it."
    rows = [row for row in rows if row["seconds"] >= warm_up * rows[-1]["seconds"]]
    hours = [row["seconds"] / 3600 for row in rows]
    columns = [name for name in rows[0] if name != "seconds"]
    return {
        name: float(np.polyfit(hours, [row[name] for row in rows], 1)[0]) if len(rows) > 1 else 0.0 for name in columns
    }


def overload(spec: LoadSpec, queue: int, factor: float = 4) -> dict[str, Any]:
    """Flood the endpoint twice with `factor` times the rate of `spec`; return loads and footprints.

    Memory may grow at the first flood, whose batches are the largest so far. `queue` is the number of requests that the
    endpoint holds. In the result, `queues` is the 99th percentile in units of the time that a full queue takes, and
    `factor` is what the client really reached."""
    pids, before = listening_processes(spec.url), check_all_answered(load(spec))
    many = spec.requests and int(factor * spec.requests)
    flood = replace(
        spec, connections=min(4 * queue, 900), rate=factor * before.rate, requests=many
    )  # each is an open file
    loads, footprints = {"before": before}, {"before": footprint(pids)}
    for name, one in {"flood": flood, "again": flood, "after": spec}.items():
        loads[name], footprints[name] = load(one), footprint(pids)
    return {
        "loads": {name: asdict(found) for name, found in loads.items()},
        "footprints": footprints,
        **_strain(loads["again"], queue, spec.seconds, before.rate),
        "recovered": loads["after"].rate / before.rate,
    }


def _strain(flood: Load, queue: int, seconds: float, rate: float) -> dict[str, float | None]:
    "Work out `factor` and `queues` of a flood sent within `seconds` to an endpoint that answers `rate` a second."
    good, sent = flood.statuses.get("200", 0), sum(flood.statuses.values())
    if not good:
        return {"factor": None, "queues": None}
    return {"factor": sent / min(seconds, good / flood.rate) / rate, "queues": flood.p99 / 1000 / (queue / flood.rate)}
