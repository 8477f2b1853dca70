"""Endpoints as real processes, over real HTTP."""
import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from intel_nb.detector import Observations
from intel_nb.drift import watched_readings
from intel_nb.images import encode_jpeg
from intel_nb.model import load_package, sample_package
from intel_nb.scenes import sample_scene
from intel_nb.serving.endpoints import (
    EndpointError,
    LocalEndpoints,
    Refused,
    drift_status,
    invoke,
    is_answering,
    is_gone,
    open_endpoints,
    throwaway,
)
from intel_nb.storage import InputError

PHOTO = encode_jpeg(sample_scene(3, np.random.default_rng(0)))
POST = {"content": PHOTO, "headers": {"content-type": "image/jpeg"}}


@pytest.fixture(scope="session")
def packages(sample_model, twin_model) -> tuple[Path, Path]:
    return sample_model, twin_model


@pytest.fixture(scope="module")
def other_package(tmp_path_factory) -> Path:
    "A package with another model."
    return sample_package(tmp_path_factory.mktemp("other") / "model", seed=1)


def stop_all(endpoints: LocalEndpoints) -> None:
    for endpoint in endpoints.list():
        endpoints.stop(endpoint.stage)
    assert processes_of(endpoints.folder) == []


@pytest.fixture
def endpoints(tmp_path):
    made = LocalEndpoints(tmp_path / "endpoints", owned=True, first_port=18300)
    yield made
    stop_all(made)


@pytest.fixture(scope="module")
def running(packages, tmp_path_factory):
    "Endpoints with a running stage `staging`. Tests may send requests and deploy versions, but leave it running."
    made = LocalEndpoints(tmp_path_factory.mktemp("running") / "endpoints", owned=True, first_port=18350)
    made.deploy("staging", packages[0], "1")
    yield made
    stop_all(made)


@pytest.fixture(scope="module")
def small(packages):
    "The URL of an endpoint with a short queue, one thread and a token."
    with throwaway(packages[0], INTEL_NB_QUEUE="4", INTEL_NB_THREADS="1", INTEL_NB_TOKEN="s3cret") as url:
        yield url


def processes_of(folder: Path) -> list[str]:
    "Return the command lines of the processes that name `folder`."
    found = []
    for p in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = p.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line and p.parent.name != str(os.getpid()):
            found.append(line)
    return found


def kill(endpoint) -> None:
    os.kill(endpoint.pid, signal.SIGKILL)
    while not is_gone(endpoint.pid):
        time.sleep(0.005)


def send(url: str, count: int) -> list[dict]:
    return [invoke(url, encode_jpeg(sample_scene(i % 6, np.random.default_rng(i))), "image/jpeg") for i in range(count)]


def test_state_survives_the_death_of_all_processes(endpoints, packages):
    first = endpoints.deploy("staging", packages[0], "1")
    answers = send(first.url, 21)
    kill(first)
    assert endpoints.describe("staging").status == "dead"
    assert endpoints.describe("staging").pid is None
    second = endpoints.start("staging")
    assert (second.url, second.version, second.status) == (first.url, "1", "running")
    known = drift_status(second.url)
    assert 21 - 16 <= known["observations"] < 21
    scenes = [encode_jpeg(sample_scene(i % 6, np.random.default_rng(i))) for i in range(21)]
    seen = load_package(packages[0]).predict_bytes(scenes)
    undisturbed = watched_readings(load_package(packages[0]),
                                   Observations(seen["drift"], seen["probabilities"].argmax(axis=1)))
    assert known["statistic"] == pytest.approx(undisturbed[known["observations"] - 1]["statistic"], abs=1e-3)
    assert answers[-1]["drift"][0]["statistic"] == pytest.approx(undisturbed[-1]["statistic"], abs=1e-3)


def test_stop_keeps_every_observation_and_leaves_no_process(endpoints, packages, tmp_path):
    first = endpoints.deploy("staging", packages[0], "1")
    send(first.url, 5)
    endpoints.stop("staging")
    assert is_gone(first.pid) and processes_of(tmp_path) == []
    assert [(e.status, e.pid) for e in endpoints.list()] == [("stopped", None)]
    endpoints.stop("staging")  # again is no error
    second = endpoints.start("staging")
    assert drift_status(second.url)["observations"] == 5
    assert endpoints.start("staging") == second


def test_an_alarm_is_kept_and_the_detector_starts_anew(endpoints, packages, tmp_path):
    url = endpoints.deploy("staging", packages[0], "1").url
    for sent in range(1, 60):
        dark = (sample_scene(sent % 6, np.random.default_rng(sent)) * 0.3).astype(np.uint8)
        if (reading := invoke(url, encode_jpeg(dark), "image/jpeg")["drift"][0])["is_drift"]:
            break
    assert reading["is_drift"] and reading["statistic"] > reading["threshold"] and 1 < reading["time"] <= sent
    after = drift_status(url)
    assert after.pop("last_alarm").startswith("20")
    fresh = {"time": 0, "statistic": None, "threshold": None, "is_drift": False}
    assert after | {"observations": sent, **fresh, "alarms": 1} == after
    assert [alarm["reason"] for alarm in after["latest_alarms"]] == [after["latest_alarms"][0]["reason"]]
    (alarm,) = (tmp_path / "endpoints" / "staging" / "state" / "alarms").iterdir()
    report = json.loads(alarm.read_text())
    assert (report["version"], report["observations"], report["time"]) == ("1", sent, reading["time"])
    assert report["reason"] == after["latest_alarms"][0]["reason"]
    assert report["moved"] and sum(report["classes"].values()) == min(sent, 16)
    assert invoke(url, PHOTO, "image/jpeg")["drift"][0]["time"] == 1


@pytest.mark.slow
def test_a_worker_that_dies_comes_back(endpoints, packages, tmp_path):
    first = endpoints.deploy("staging", packages[0], "1")
    workers = [p for p in Path("/proc").glob("[0-9]*") if parent_of(p) == first.pid]
    assert len(workers) == 1
    os.kill(int(workers[0].name), signal.SIGKILL)
    assert invoke(first.url, PHOTO, "image/jpeg")["model"]["version"] == "1"  # it waited in the socket's queue
    assert endpoints.start("staging").pid == first.pid


def parent_of(process: Path) -> int | None:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return None


class Load:
    "Clients that send one request after another until they are stopped, and collect what was answered."
    def __init__(self, url: str, keep: int = 2, fresh: int = 1):
        self.url, self.stop, self.failures, self.versions, self.observations = url, threading.Event(), [], [], []
        self.threads = [threading.Thread(target=self.run, args=[True]) for _ in range(keep)]
        self.threads += [threading.Thread(target=self.run, args=[False]) for _ in range(fresh)]
        self.threads += [threading.Thread(target=self.watch)]

    def __enter__(self):
        for t in self.threads:
            t.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for t in self.threads:
            t.join()

    def run(self, keep: bool) -> None:
        client = httpx.Client()
        while not self.stop.is_set():
            try:
                one = client if keep else httpx.Client()
                self.versions.append(one.post(f"{self.url}/invocations", **POST, timeout=30).json()["model"]["version"])
            except Exception as e:
                self.failures.append(repr(e))
        client.close()

    def watch(self) -> None:
        with httpx.Client() as client:
            while not self.stop.is_set():
                self.observations.append(client.get(f"{self.url}/drift", timeout=30).json()["observations"])

    def wait_for(self, count: int) -> None:
        "Wait for `count` more answers."
        expected = len(self.versions) + count
        while len(self.versions) < expected and not self.failures:
            time.sleep(0.01)


def test_updates_and_rollbacks_under_load_fail_no_request(endpoints, packages):
    url = endpoints.deploy("production", packages[0], "1").url
    with Load(url) as load:
        load.wait_for(20)
        for version, package, back in (("2", packages[1], False), ("3", packages[0], False), ("2", packages[1], True)):
            endpoint = endpoints.deploy("production", package, version, back=back)
            assert endpoint.url == url
            assert invoke(url, PHOTO, "image/jpeg")["model"]["version"] == version
            load.wait_for(20)
    assert load.failures == []
    assert set(load.versions) == {"1", "2", "3"}
    assert load.observations == sorted(load.observations)
    assert drift_status(url)["observations"] >= len(load.versions)
    assert endpoints.history("production") == ["1", "2"]


def workers_of(endpoint) -> set[int]:
    "Return the process ids of the workers of an endpoint."
    return {int(p.name) for p in Path("/proc").glob("[0-9]*") if parent_of(p) == endpoint.pid}


def warm(endpoints, stage: str) -> str:
    return json.loads((endpoints.folder / stage / "endpoint.json").read_text())["warm"]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_a_rollback_under_load_hands_over_to_the_worker_that_stood_by(packages, tmp_path):
    "The same process serves again, no request fails, and the worker of the version that was rolled back ends."
    endpoints = LocalEndpoints(tmp_path / "endpoints", owned=True, first_port=18300, env={"INTEL_NB_WARM": "100000"})
    first = endpoints.deploy("production", packages[0], "1")
    try:
        (before,) = workers_of(first)
        with Load(first.url) as load:
            load.wait_for(20)
            endpoints.deploy("production", packages[1], "2")
            assert warm(endpoints, "production") == "1" and before in workers_of(first)
            load.wait_for(20)
            assert endpoints.deploy("production", packages[0], "1", back=True).url == first.url
            assert invoke(first.url, PHOTO, "image/jpeg")["model"]["version"] == "1"
            assert warm(endpoints, "production") == ""
            load.wait_for(20)
            wait_until(lambda: workers_of(first) == {before})
        assert load.failures == []
        assert load.observations == sorted(load.observations)
    finally:
        endpoints.stop("production")
    assert processes_of(tmp_path) == []


@pytest.mark.slow
def test_the_predecessor_goes_when_the_new_version_has_answered_enough(packages, tmp_path):
    endpoints = LocalEndpoints(tmp_path / "endpoints", owned=True, first_port=18300, env={"INTEL_NB_WARM": "5"})
    first = endpoints.deploy("production", packages[0], "1")
    try:
        endpoints.deploy("production", packages[1], "2")
        send(first.url, 4)
        time.sleep(1.5)  # the supervisor asked for the count meanwhile
        assert warm(endpoints, "production") == "1"
        send(first.url, 1)
        wait_until(lambda: warm(endpoints, "production") == "" and len(workers_of(first)) == 1)
        assert endpoints.deploy("production", packages[0], "1", back=True).version == "1"  # cold, as ever
        assert endpoints.history("production") == ["1"]
    finally:
        endpoints.stop("production")


@pytest.mark.slow
def test_a_predecessor_that_died_standing_by_is_started_anew(endpoints, packages):
    first = endpoints.deploy("production", packages[0], "1")
    (before,) = workers_of(first)
    endpoints.deploy("production", packages[1], "2")
    os.kill(before, signal.SIGKILL)
    endpoints.deploy("production", packages[0], "1", back=True)
    assert invoke(first.url, PHOTO, "image/jpeg")["model"]["version"] == "1"


def test_a_challenger_that_is_killed_as_it_starts_never_takes_the_stage(endpoints, packages):
    "No request to its predecessor fails, and the worker that stood by still does."
    first = endpoints.deploy("staging", packages[0], "1")
    endpoints.deploy("staging", packages[1], "2")
    known, errors = workers_of(first), []

    def deploy():
        with pytest.raises(EndpointError, match="version 3 does not serve staging") as error:
            endpoints.deploy("staging", packages[0], "3")
        errors.append(error)

    with Load(first.url) as load:
        load.wait_for(10)
        update = threading.Thread(target=deploy)
        update.start()
        wait_until(lambda: workers_of(first) - known)
        os.kill((workers_of(first) - known).pop(), signal.SIGKILL)
        update.join()
        load.wait_for(10)
    assert errors and load.failures == [] and set(load.versions) == {"2"}
    assert endpoints.describe("staging").version == "2" and endpoints.history("staging") == ["1", "2"]


def test_a_client_that_kept_its_connection_reaches_the_new_version(running, packages):
    "The package is the same, so the detector goes on."
    before = running.describe("staging")
    with httpx.Client() as client:
        first = client.post(f"{before.url}/invocations", **POST).json()
        assert first["model"]["version"] == before.version
        running.deploy("staging", packages[0], "kept")
        second = client.post(f"{before.url}/invocations", **POST).json()
    assert second["model"]["version"] == "kept"
    assert second["drift"] == first["drift"]  # the detector goes on, and the same picture is no news to it


def test_a_version_that_crashes_never_takes_the_stage(running, packages, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(packages[0], broken)
    (broken / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(EndpointError, match="model.onnx"):
        running.deploy("production", broken, "1")
    first, = running.list()
    with pytest.raises(EndpointError, match="version broken does not serve staging.*model.onnx"):
        running.deploy("staging", broken, "broken")
    assert running.describe("staging") == first
    assert invoke(first.url, PHOTO, "image/jpeg")["model"]["version"] == first.version


def free_ports(count: int) -> int:
    "Return the first of so many ports in a row that nobody has now."
    for first in range(20_000 + os.getpid() % 10_000, 60_000, count):
        with contextlib.suppress(OSError), contextlib.ExitStack() as taken:
            for port in range(first, first + count):
                taken.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
    raise OSError("no ports are free")


def test_ports(packages, tmp_path):
    first = free_ports(6)
    endpoints, urls = LocalEndpoints(tmp_path, owned=True, first_port=first), [
        f"http://127.0.0.1:{first + k}" for k in range(3)]
    try:
        with socket.create_server(("127.0.0.1", first)):
            assert endpoints.deploy("staging", packages[0], "1").url == urls[1]
        endpoints.stop("staging")
        assert endpoints.deploy("production", packages[0], "1").url == urls[0]
        assert endpoints.start("staging").url == urls[1]  # it was remembered
        endpoints.stop("staging")
        with socket.create_server(("127.0.0.1", first + 1)):
            with pytest.raises(EndpointError, match=f"port {first + 1}, which is the stage's, is taken by process"):
                endpoints.start("staging")
            assert endpoints.start("staging", move=True).url == urls[2]
        assert [e.stage for e in endpoints.list()] == ["production", "staging"]
    finally:
        for stage in ("staging", "production"):
            endpoints.stop(stage)


def deploy_elsewhere(folder: Path, package: Path, code: str) -> subprocess.CompletedProcess:
    "Run `code` in another process, in which `staging` holds the arguments of a deployment."
    code = f"""import os, signal, sys
from intel_nb.serving.endpoints import LocalEndpoints as E
staging = "staging", sys.argv[2], "1"
{code}"""
    command = [sys.executable, "-c", code, folder / "endpoints", package]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_an_endpoint_outlives_the_command_that_made_it(packages, tmp_path):
    done = deploy_elsewhere(tmp_path, packages[0], "print(E(sys.argv[1], first_port=18300).deploy(*staging).url)")
    endpoints = LocalEndpoints(tmp_path / "endpoints")
    try:
        assert done.stderr == "" and done.returncode == 0  # and its output ended: nothing holds the pipe
        assert is_answering(done.stdout.strip())
    finally:
        endpoints.stop("staging")
    assert processes_of(tmp_path) == []


def test_a_throwaway_endpoint_does_not_outlive_its_owner(packages, tmp_path):
    done = deploy_elsewhere(tmp_path, packages[0], """
print(E(sys.argv[1], owned=True, first_port=0).deploy(*staging).pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)""")
    deadline = time.monotonic() + 20
    while not is_gone(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes_of(tmp_path) == []
    assert LocalEndpoints(tmp_path / "endpoints").describe("staging").status == "stopped"


@pytest.mark.slow
def test_two_deployments_at_once_take_turns(endpoints, packages):
    found = {}
    deploy = lambda version: found.update({version: endpoints.deploy("staging", packages[0], version)})
    threads = [threading.Thread(target=deploy, args=[version]) for version in "12"]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert {e.version for e in found.values()} == {"1", "2"} and len({(e.url, e.pid) for e in found.values()}) == 1
    assert sorted(endpoints.history("staging")) == ["1", "2"]


def test_wrong_input(endpoints, packages, tmp_path):
    for wrong, match in ((lambda: endpoints.start("nowhere"), "no endpoint nowhere"),
                         (lambda: endpoints.describe("x"), "no endpoint"),
                         (lambda: endpoints.deploy("a/b", packages[0], "1"), "no name for a stage"),
                         (lambda: endpoints.deploy("s", packages[0], "1", engine="thread"), "are process and ray"),
                         (lambda: open_endpoints("ftp://x"), "folder")):
        with pytest.raises(InputError, match=match):
            wrong()
    assert not (tmp_path / "endpoints").exists()


def test_a_refusal_is_the_callers_error(running):
    url = running.describe("staging").url
    observed = drift_status(url)["observations"]
    with pytest.raises(Refused) as refused:
        invoke(url, b"no image", "image/jpeg")
    assert (refused.value.status, refused.value.code) == (400, "undecodable")
    assert drift_status(url)["observations"] == observed


def test_our_clients_send_the_token(small, monkeypatch):
    assert is_answering(small)
    for request in (lambda: invoke(small, PHOTO, "image/jpeg"), lambda: drift_status(small)):
        with pytest.raises(Refused, match="401 unauthorized"):
            request()
    monkeypatch.setenv("INTEL_NB_TOKEN", "s3cret")
    observed = drift_status(small)["observations"]
    assert invoke(small, PHOTO, "image/jpeg")["predictions"] and drift_status(small)["observations"] == observed + 1


def test_a_slow_upload_survives_an_update(running, packages):
    "The old worker answers a client that was still sending when it left; the new one serves meanwhile."
    endpoint = running.describe("staging")
    observed = drift_status(endpoint.url)["observations"]
    host, port = endpoint.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as slow:
        headers = "Host: localhost", "Content-Type: image/jpeg", f"Content-Length: {len(PHOTO)}"
        slow.sendall("\r\n".join(("POST /invocations HTTP/1.1", *headers, "", "")).encode() + PHOTO[:100])
        while not is_answering(endpoint.url):  # a round trip: the worker has seen the head
            pass
        running.deploy("staging", packages[0], "next")
        assert invoke(endpoint.url, PHOTO, "image/jpeg")["model"]["version"] == "next"
        slow.sendall(PHOTO[100:])
        reply = slow.makefile("rb").read()
    assert reply.startswith(b"HTTP/1.1 200")
    assert json.loads(reply.split(b"\r\n\r\n")[1])["model"]["version"] == endpoint.version
    assert drift_status(endpoint.url)["observations"] == observed + 1


async def send_at_once(url: str, count: int, token: str) -> list[httpx.Response]:
    post = {"content": PHOTO, "headers": POST["headers"] | {"Authorization": f"Bearer {token}"}}
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=60) as client:
        return await asyncio.gather(*(client.post(f"{url}/invocations", **post) for _ in range(count)))


def test_overload_is_503_and_passes(small, monkeypatch):
    monkeypatch.setenv("INTEL_NB_TOKEN", "s3cret")
    observed = drift_status(small)["observations"]
    replies = asyncio.run(send_at_once(small, 100, "s3cret"))
    statuses = [reply.status_code for reply in replies]
    assert set(statuses) == {200, 503}
    for reply in replies:
        if reply.status_code == 503:
            assert reply.headers["retry-after"] == "1" and reply.json()["error"]["code"] == "overloaded"
    assert invoke(small, PHOTO, "image/jpeg")["predictions"]
    assert drift_status(small)["observations"] == observed + statuses.count(200) + 1


@pytest.mark.slow
def test_a_shadow_sees_production_and_answers_nobody(endpoints, packages, other_package, tmp_path):
    "It hangs, it dies, production is updated meanwhile: no request fails or waits for it."
    url = endpoints.deploy("production", packages[0], "1").url
    assert endpoints.shadowed("production") is None and not endpoints.unshadow("production")
    endpoints.shadow("production", other_package, "9")
    beside = endpoints.shadows("production").describe("production")
    seen = lambda: endpoints.shadowed("production")
    with Load(url) as load:
        wait_until(lambda: seen()["images"] >= 20)
        assert seen()["agreement"] in (0, 1), "there is one photo alone"
        shown = httpx.get(f"{url}/metrics").text
        assert "intel_nb_shadow_agreement" in shown and "intel_nb_shadow_shadow_ms_median" in shown
        (worker,) = workers_of(beside)
        os.kill(worker, signal.SIGSTOP)
        load.wait_for(150)
        endpoints.deploy("production", packages[0], "2")
        load.wait_for(20)
        kill(beside)
        load.wait_for(20)
        assert endpoints.unshadow("production")
        load.wait_for(20)
    assert load.failures == [] and set(load.versions) == {"1", "2"}
    assert seen()["version"] == "9" and seen()["dropped"] > 0 and seen()["status"] == "stopped"
    assert processes_of(tmp_path / "endpoints" / "production" / "shadow") == []
    assert [e.stage for e in endpoints.list()] == ["production"] and endpoints.describe("production").version == "2"


def test_a_shadow_agrees_as_often_as_its_package_does(endpoints, packages, other_package, tmp_path):
    "The same model always agrees, and another one as often as its answers are the same. A shadow ends with its stage."
    url = endpoints.deploy("production", packages[0], "1").url
    scenes = [encode_jpeg(sample_scene(i % 6, np.random.default_rng([5, i])) // 3) for i in range(40)]  # dark: not easy
    probabilities = [load_package(p).predict_bytes(scenes)["probabilities"] for p in (packages[0], other_package)]
    classes, other_classes = (p.argmax(axis=1) for p in probabilities)
    equal = int((classes == other_classes).sum())
    for version, package, agreed in (("2", packages[1], 40), ("3", other_package, equal)):
        endpoints.shadow("production", package, version)
        time.sleep(1.1)  # the worker looks once a second whether there is another shadow
        for scene in scenes:
            assert invoke(url, scene, "image/jpeg")["model"]["version"] == "1"
        wait_until(lambda: endpoints.shadowed("production")["requests"] == 40)
        known = endpoints.shadowed("production")
        assert (known["version"], known["images"], known["agreed"], known["status"]) == (version, 40, agreed, "running")
        assert (known["failed"], known["dropped"]) == (0, 0) and known["shadow_ms"]["median"] > 0
    endpoints.stop("production")
    assert processes_of(tmp_path / "endpoints") == [] and endpoints.shadowed("production")["agreed"] == agreed
