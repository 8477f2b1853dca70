"""Engine ray: real clusters on this machine, whose processes are killed while clients wait for answers."""
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from intel_nb.images import encode_jpeg
from intel_nb.model import load_package
from intel_nb.scenes import sample_scene
from intel_nb.serving.endpoints import LocalEndpoints, drift_status, invoke
from intel_nb.serving.ray import serve_config
from intel_nb.storage import InputError, python_path, sha256_file

pytestmark = [pytest.mark.skipif(not find_spec("ray"), reason="engine ray is the extra intel-nb[ray]"),
              pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")]

PHOTOS = [encode_jpeg(sample_scene(i % 6, np.random.default_rng(i))) for i in range(48)]


@pytest.fixture(scope="session")
def packages(sample_model, twin_model) -> tuple[Path, Path]:
    return sample_model, twin_model


@pytest.fixture
def endpoints(tmp_path):
    made = LocalEndpoints(tmp_path / "endpoints", owned=True, first_port=18700, env={"INTEL_NB_REPLICAS": "2"})
    yield made
    for endpoint in made.list():
        made.stop(endpoint.stage)


def processes() -> dict[int, tuple[int, int, str]]:
    "Return parent, session and command line of each process that runs, by its id."
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, _, session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
            line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if state not in "ZX":
            found[int(path.name)] = int(parent), int(session), line
    return found


def session_of(endpoint) -> int:
    "Return the session of an endpoint's cluster: the process id of its worker."
    return next(pid for pid, (parent, session, _) in processes().items() if parent == endpoint.pid and session == pid)


def named(session: int, name: str) -> list[int]:
    "Return the processes of `session` whose title begins with `name`, the oldest first."
    return sorted(pid for pid, (_, of, line) in processes().items() if of == session and line.startswith(name))


def left_of(session: int) -> list[str]:
    "Return what still runs of a session, with the process that ends it."
    sweeper = f"end_session(int(sys.argv[1]), sys.argv[2]) {session} "
    return [line for _, of, line in processes().values() if of == session or sweeper in line]


def wait(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


class Load:
    "Clients that keep their connections, and the answers that they got; they may pause between two requests."
    def __init__(self, url: str, pause: float = 0, clients: int = 8):
        self.port, self.stop, self.answers, self.failures = int(url.rpartition(":")[2]), threading.Event(), [], []
        self.pause = pause
        self.threads = [threading.Thread(target=self.run, args=[k]) for k in range(clients)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def run(self, k: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=90)
        while not self.stop.wait(self.pause):
            k += 1
            try:
                connection.request("POST", "/invocations", PHOTOS[k % len(PHOTOS)], {"Content-Type": "image/jpeg"})
                reply = connection.getresponse()
                body = reply.read()
                if reply.status == 200:
                    self.answers.append((k % len(PHOTOS), json.loads(body)))
                else:
                    self.failures.append((reply.status, body))
            except Exception as e:
                self.failures.append(repr(e))
                connection.close()

    def more(self, count: int) -> None:
        "Wait for `count` more answers."
        expected = len(self.answers) + count
        wait(lambda: len(self.answers) >= expected or self.failures, 120)
        assert self.failures == []


def check_counts(url: str, load: Load) -> None:
    "Assert that each image was counted once, and has one reading. Its time says little: the photographs come again."
    assert drift_status(url)["observations"] == len(load.answers)
    assert {len(answer["drift"]) for _, answer in load.answers} == {1}


@pytest.mark.slow
def test_whatever_dies_no_request_is_lost_and_each_image_counts_once(endpoints, packages):
    endpoint = endpoints.deploy("staging", packages[0], "1", engine="ray")
    session = session_of(endpoint)
    expected = load_package(packages[0]).predict_bytes(PHOTOS)["probabilities"]
    with Load(endpoint.url) as load:
        load.more(50)
        replicas, (detector,) = named(session, "ray::ServeReplica"), named(session, "ray::Detector")
        assert len(replicas) == 2
        os.kill(replicas[0], signal.SIGKILL)
        load.more(100)
        os.kill(detector, signal.SIGKILL)
        load.more(100)
        wait(lambda: len(named(session, "ray::ServeReplica")) == 2 and named(session, "ray::Detector"))
        for pid in named(session, "ray::ServeReplica") + named(session, "ray::Detector"):
            os.kill(pid, signal.SIGKILL)
        load.more(100)
    check_counts(endpoint.url, load)
    assert endpoints.describe("staging") == endpoint and session_of(endpoint) == session
    for k, answer in load.answers:
        assert list(answer["predictions"][0]["probabilities"].values()) == pytest.approx(expected[k], abs=1e-5)
    assert open_ports(session) and all(address == "127.0.0.1" for address in open_ports(session))
    endpoints.stop("staging")
    assert left_of(session) == []


def open_ports(session: int) -> list[str]:
    "Return the addresses on which the processes of `session` listen."
    import psutil
    found = []
    for pid, (_, of, _) in processes().items():
        if of == session:
            connections = psutil.Process(pid).net_connections("inet")
            found += [c.laddr.ip.removeprefix("::ffff:") for c in connections if c.status == psutil.CONN_LISTEN]
    return found


@pytest.mark.slow
def test_versions_and_engines_change_under_load(endpoints, packages):
    url = endpoints.deploy("production", packages[0], "1").url
    sessions = []
    with Load(url, pause=0.1) as load:  # a cluster needs some of the processor to start
        for version, k, engine in (("2", 0, "ray"), ("3", 1, "ray"), ("4", 0, "process")):
            load.more(20)
            endpoint = endpoints.deploy("production", packages[k], version, engine=engine)
            assert (endpoint.url, endpoint.engine) == (url, engine)
            sessions += [session_of(endpoint)] if engine == "ray" else []
            assert invoke(url, PHOTOS[0], "image/jpeg")["model"]["version"] == version
        load.more(20)
    assert {answer["model"]["version"] for _, answer in load.answers} == {"1", "2", "3", "4"}
    assert drift_status(url)["observations"] == len(load.answers) + 3
    for session in sessions:
        wait(lambda session=session: not left_of(session))


@pytest.mark.slow
def test_the_cluster_dies_with_the_endpoint_and_the_endpoint_survives_the_cluster(endpoints, packages):
    first = endpoints.deploy("staging", packages[0], "1", engine="ray")
    session = session_of(first)
    (raylet,) = [pid for pid, (_, of, line) in processes().items() if of == session and "/raylet " in line]
    for k in range(21):
        invoke(first.url, PHOTOS[k], "image/jpeg")
    os.kill(raylet, signal.SIGKILL)
    wait(lambda: not left_of(session))
    answer = invoke(first.url, PHOTOS[0], "image/jpeg", timeout=120)  # it waits in the socket's queue
    assert answer["model"]["version"] == "1"
    assert 21 - 16 <= drift_status(first.url)["observations"] - 1 <= 21
    session = session_of(first)
    (folder,) = [line.split()[-1] for line in left_of(session) if "end_session(" in line]
    assert Path(folder).is_dir()
    os.kill(first.pid, signal.SIGKILL)
    wait(lambda: not left_of(session), 10)
    assert not Path(folder).exists()
    endpoint = endpoints.start("staging")
    assert (endpoint.url, endpoint.engine, endpoint.status) == (first.url, "ray", "running")
    assert endpoints.start("staging", engine="process").engine == "process"


HOST = """
import os, subprocess, sys
from intel_nb.serving.ray import start_cluster
start_cluster()
import ray
from ray import serve
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
serve_command = os.path.join(os.path.dirname(sys.executable), "serve")
subprocess.run([serve_command, "run", sys.argv[1]])
"""


@pytest.mark.slow
def test_a_package_is_an_application_of_ray_serve(packages, tmp_path):
    "`serve run` serves the configuration that was made outside. Code in an old package is never run."
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    package, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(packages[0], package)
    (package / "deployment.py").write_text(f"open({str(ran)!r}, 'w')")
    manifest = json.loads((package / "manifest.json").read_text())
    manifest["files"]["deployment.py"] = sha256_file(package / "deployment.py")
    (package / "manifest.json").write_text(json.dumps(manifest))
    config = tmp_path / "serve.yaml"
    config.write_text(json.dumps(serve_config(package, "7")))
    given = {"INTEL_NB_STATE": str(tmp_path / "state"), "INTEL_NB_QUEUE": "64", "PYTHONPATH": python_path()}
    with open(tmp_path / "log", "wb") as log:
        host = subprocess.Popen([sys.executable, "-c", HOST, config, str(port)], stdin=subprocess.DEVNULL, stdout=log,
                                stderr=log, cwd=package, env=os.environ | given)
    try:
        wait(lambda: ask(port, "GET", "/ping")[0] == 200 or host.poll() is not None, 120)
        assert host.poll() is None, (tmp_path / "log").read_text()[-3000:]
        for _ in range(2):
            status, answer = ask(port, "POST", "/invocations", PHOTOS[0])
            assert (status, answer["model"]["version"]) == (200, "7")
            assert answer["drift"][0]["time"] == 1  # the second time it is no news
        status, answer = ask(port, "POST", "/invocations", b"no image")
        assert (status, answer["error"]["code"]) == (400, "undecodable")
        assert ask(port, "GET", "/drift")[1]["observations"] == 2
        assert not ran.exists()
    finally:
        host.kill()
        host.wait()
    wait(lambda: not left_of(host.pid))


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, {"Content-Type": "image/jpeg"} if body else {})
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    except (OSError, ValueError):  # nobody there yet, or the proxy, which knows no route yet
        return 0, {}
    finally:
        connection.close()


def test_engines_that_are_not_there(endpoints, tmp_path):
    with pytest.raises(InputError, match="'thread' is unknown; there are process and ray"):
        endpoints.deploy("staging", tmp_path / "model", "1", engine="thread")
    assert not (tmp_path / "endpoints").exists()
    code = "from intel_nb.serving.endpoints import check_engine; check_engine('ray')"
    source = str(Path(sys.modules["intel_nb"].__file__).parents[1])
    bare = subprocess.run([sys.executable, "-S", "-c", code], env={"PYTHONPATH": source}, capture_output=True,
                          text=True)  # without site-packages
    assert "pip install 'intel-nb[ray]'" in bare.stderr.splitlines()[-1]
