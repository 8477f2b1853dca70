"""An endpoint under load while its disk is full or its worker hangs. `FAULT_SECONDS` lengthens the long ones."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.request import urlopen

import pytest

from intel_nb.images import encode_jpeg
from intel_nb.scenes import sample_scene
from intel_nb.serving.endpoints import EndpointError, LocalEndpoints, drift_status, invoke
from intel_nb.storage import InputError

from .wire import draw_connection, exchange

SECONDS = float(os.environ.get("FAULT_SECONDS") or 300)


class Clients:
    "Threads that send images one after the other, and count the answers by status; 0 is a lost connection."
    def __init__(self, url: str, count: int = 4):
        import numpy as np
        self.url, self.statuses, self.answered = url, Counter(), []
        self.photos = [encode_jpeg(sample_scene(k % 6, np.random.default_rng(k))) for k in range(12)]
        self._over, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._send, args=(k,), daemon=True) for k in range(count)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *raised):
        self._over.set()
        for thread in self._threads:
            thread.join(60)

    def _send(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self._over.is_set():
            status = self._status_of(rng.choice(self.photos))
            with self._lock:
                self.statuses[status] += 1
                if status == 200:
                    self.answered.append(time.monotonic())

    def _status_of(self, photo: bytes) -> int:
        try:
            invoke(self.url, photo, "image/jpeg", timeout=30)
            return 200
        except InputError as e:
            return getattr(e, "status", 400)
        except EndpointError as e:
            return 503 if "cannot answer now" in str(e) else 0

    def wait_for_answers(self, seconds: float = 1) -> None:
        time.sleep(seconds)
        assert self.answered and time.monotonic() - self.answered[-1] < 1

    def silence_from(self, moment: float, seconds: float) -> float:
        "Return how long after `moment` an answer came that cannot have been on its way; wait up to `seconds`."
        while time.monotonic() < moment + seconds:
            later = [t for t in self.answered[-50:] if t > moment + 1]
            if later:
                return later[0] - moment
            time.sleep(0.05)
        return float("inf")


@contextmanager
def serving(folder: Path, model: Path, **env: str):
    endpoints = LocalEndpoints(folder, owned=True, first_port=0, env=env)
    try:
        yield endpoints, endpoints.deploy("staging", model, "1")
    finally:
        endpoints.stop("staging")


def worker_of(pid: int) -> int:
    return int(subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=True).stdout.split()[0])


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 8 MB."
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system takes root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@contextmanager
def without_room(disk: Path, kind: str):
    "Fill `disk`, or make it read-only, for the block."
    if kind == "full":
        with suppress(OSError), open(disk / "ballast", "wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(2**12))
    else:
        subprocess.run(["mount", "--bind", disk / "endpoints", disk / "endpoints"], check=True)  # nobody writes
        remount = ["mount", "-o", "remount,bind,ro", disk / "endpoints"]
        deadline = time.monotonic() + 30
        while subprocess.run(remount, check=False).returncode:  # it is busy while a file is being written
            assert time.monotonic() < deadline
            time.sleep(.05)
    try:
        yield
    finally:
        if kind == "full":
            (disk / "ballast").unlink()
        else:
            subprocess.run(["umount", "-l", disk / "endpoints"], check=True)


def try_disk(disk: Path, model: Path, kind: str, seconds: float) -> None:
    (disk / "ballast").touch()
    with serving(disk / "endpoints", model, INTEL_NB_CAPTURE="20") as (endpoints, endpoint):
        worker = worker_of(endpoint.pid)
        with Clients(endpoint.url) as clients:
            clients.wait_for_answers()
            with without_room(disk, kind):
                time.sleep(seconds)
                status = drift_status(endpoint.url)
                metrics = urlopen(f"{endpoint.url}/metrics").read().decode()
            clients.wait_for_answers(3)
        assert {*clients.statuses} == {200}, clients.statuses
        assert "in memory only" in status["problems"][0] and "intel_nb_drift_unwritten 1.0" in metrics
        assert worker_of(endpoint.pid) == worker and endpoints.describe("staging").status == "running"
        time.sleep(2)
        assert "problems" not in drift_status(endpoint.url)
        assert drift_status(endpoint.url)["observations"] == clients.statuses[200]
    state = json.loads((disk / "endpoints" / "staging" / "state" / "state.json").read_text())
    assert state["observations"] == clients.statuses[200]
    print(f"{kind}: {clients.statuses[200]} requests, all 200")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_no_answer_depends_on_the_disk(small_disk, sample_model, kind):
    try_disk(small_disk, sample_model, kind, 10)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_no_answer_depends_on_the_disk_for_minutes(small_disk, sample_model, kind):
    try_disk(small_disk, sample_model, kind, SECONDS)


def try_hangs(folder: Path, model: Path, times: int, seed: int) -> list[float]:
    "Stop the worker at random moments; return after how many seconds there were answers again."
    rng, found = random.Random(seed), []
    with serving(folder, model) as (endpoints, endpoint), Clients(endpoint.url) as clients:
        for _ in range(times):
            clients.wait_for_answers(rng.uniform(1, 4))
            worker, moment = worker_of(endpoint.pid), time.monotonic()
            os.kill(worker, signal.SIGSTOP)
            found.append(clients.silence_from(moment, 30))
            assert worker_of(endpoint.pid) != worker
    assert endpoints.describe("staging").status == "stopped", "its supervisor has lived all the time"
    print(f"answers again after {', '.join(f'{s:.1f}' for s in found)} s; {dict(clients.statuses)}")
    return found


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced(tmp_path, sample_model):
    assert max(try_hangs(tmp_path, sample_model, 2, 0)) < 20  # of a second on a quiet machine, see the long one


@pytest.mark.long
def test_ten_workers_that_hang(tmp_path, sample_model):
    assert max(try_hangs(tmp_path, sample_model, 10, 1)) < 10


HANGS = """
import sys, threading
from intel_nb.serving import app
from intel_nb.serving.dataplane import ModelWorker
plain = ModelWorker._pass
def hang(self, images):
    if (images[:, 0, 0, :2] == (7, 77)).all(axis=1).any():
        threading.Event().wait()
    return plain(self, images)
ModelWorker._pass = hang
create_app = app.make_app
"""


@pytest.mark.slow
def test_a_session_that_never_returns_is_noticed(tmp_path, sample_model, monkeypatch):
    "One of two threads hangs in the model; the other one goes on, but answers come out in order."
    import numpy as np

    from intel_nb.serving import supervisor
    (tmp_path / "hanging.py").write_text(HANGS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setitem(supervisor.ENGINES, "process", "hanging:create_app")
    code = ("from intel_nb.serving import supervisor; supervisor.ENGINES['process'] = 'hanging:create_app'; "
            "import sys, json; supervisor.supervise(*json.loads(sys.argv[1]))")
    monkeypatch.setattr("intel_nb.serving.endpoints.supervisor_command", lambda folder, port, owned: [
        sys.executable, "-c", code, json.dumps([str(folder), port, owned])])
    with serving(tmp_path / "endpoints", sample_model, INTEL_NB_THREADS="2") as (_, endpoint):
        worker, side = worker_of(endpoint.pid), 64
        with Clients(endpoint.url) as clients:
            clients.wait_for_answers()
            picture = np.zeros((side, side, 3), np.uint8)
            picture[..., :] = (7, 77, 7)
            import io
            np.save(body := io.BytesIO(), picture)
            moment = time.monotonic()
            with pytest.raises(EndpointError):
                invoke(endpoint.url, body.getvalue(), "application/x-npy", timeout=30)
            assert clients.silence_from(moment, 30) < 25
        assert worker_of(endpoint.pid) != worker


def try_busy(folder: Path, model: Path, seconds: float) -> None:
    "Load the machine with three busy loops; no worker may be taken for one that hangs."
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        with serving(folder, model) as (_, endpoint), Clients(endpoint.url) as clients:
            worker = worker_of(endpoint.pid)
            time.sleep(seconds)
            assert worker_of(endpoint.pid) == worker
        assert {*clients.statuses} == {200}, clients.statuses
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@pytest.mark.slow
def test_a_busy_machine_is_no_hang(tmp_path, sample_model):
    try_busy(tmp_path, sample_model, 20)


@pytest.mark.long
def test_a_machine_that_is_busy_for_half_an_hour(tmp_path, sample_model):
    try_busy(tmp_path, sample_model, 6 * SECONDS)


@pytest.mark.slow
def test_a_package_that_has_gone_is_said(tmp_path, sample_model):
    model = shutil.copytree(sample_model, tmp_path / "model")
    with serving(tmp_path / "endpoints", model) as (endpoints, endpoint):
        shutil.rmtree(model)
        os.kill(worker_of(endpoint.pid), signal.SIGKILL)
        deadline = time.monotonic() + 60
        while (found := endpoints.describe("staging")).status != "dead":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert "version 1 does not come back" in found.error and str(model) in found.error


def footprint(pid: int) -> dict[str, float]:
    "Return megabytes, open files and threads of a process."
    status = Path(f"/proc/{pid}/status").read_text()
    number = lambda name: int(status.split(f"{name}:")[1].split()[0])
    return {"MB": number("VmRSS") / 1024, "threads": number("Threads"),
            "files": len(list(Path(f"/proc/{pid}/fd").iterdir()))}


def disturb(address: tuple[str, int], disk: Path, rng: random.Random, stack: ExitStack) -> None:
    "Do one thing that an endpoint must bear without a new worker."
    kind = rng.choice(["hostile", "hostile", "idle", "full"])
    if kind == "hostile":
        for _ in range(100):
            exchange(address, draw_connection(rng.randrange(10**6)), rng, patience=0.2)
    elif kind == "idle":  # heads that never end, and clients that leave
        for _ in range(50):
            raw = stack.enter_context(socket.create_connection(address, timeout=10))
            raw.sendall(rng.choice([b"", b"POST /invocations HTT", b"POST /invocations HTTP/1.1\r\nHost: localhost\r\n"
                                    b"Content-Length: 5000\r\n\r\nabc"]))
    else:
        with without_room(disk, "full"):
            time.sleep(3)


def try_soak(disk: Path, model: Path, seconds: float) -> None:
    """Serve under load with faults: hangs and kills in the first third, the others all the time; nothing may grow.

    A capture is small, so that the disk is never full for good: images that wait for room take up to 64 MB. The first
    alarm starts a thread."""
    rng, rows, began = random.Random(0), [], time.monotonic()
    (disk / "ballast").touch()
    with (serving(disk / "endpoints", model, INTEL_NB_CAPTURE="20") as (endpoints, endpoint),
          Clients(endpoint.url, 2) as clients):
        host, _, port = endpoint.url.removeprefix("http://").partition(":")
        while (now := time.monotonic() - began) < seconds:
            with ExitStack() as stack:
                disturb((host, int(port)), disk, rng, stack)
            if now < seconds / 3:
                os.kill(worker_of(endpoint.pid), rng.choice([signal.SIGSTOP, signal.SIGKILL]))
                time.sleep(15)
                clients.wait_for_answers()
            else:
                time.sleep(2)
                rows.append([footprint(pid) for pid in (endpoint.pid, worker_of(endpoint.pid))])
        assert endpoints.describe("staging").status == "running"
    quarter = len(rows) // 4
    for k, name in enumerate(("supervisor", "worker")):
        for what, most in (("MB", 8), ("files", 3), ("threads", 1)):
            early, late = (sorted(row[k][what] for row in part)[len(part) // 2]
                           for part in (rows[quarter:2 * quarter], rows[-quarter:]))
            print(f"{name}: {early:.1f} and {late:.1f} {what}")
            assert late <= early + most, (name, what, early, late)
    print(dict(clients.statuses))


@pytest.mark.slow
def test_a_short_soak(small_disk, sample_model):
    try_soak(small_disk, sample_model, 100)


@pytest.mark.long
def test_half_an_hour_with_faults(small_disk, sample_model):
    try_soak(small_disk, sample_model, 6 * SECONDS)
