"""Endpoints as real processes, over real HTTP."""
import asyncio
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

from intel_nb.images import encode_jpeg
from intel_nb.model import load_package, sample_package, write_manifest
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


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("packages")
    shutil.copytree(sample_package(folder / "a"), folder / "b")
    write_manifest(folder / "b", load_package(folder / "a").card | {"profile": "another"}, "other data")
    return folder / "a", folder / "b"


@pytest.fixture
def endpoints(tmp_path):
    made = LocalEndpoints(tmp_path / "endpoints", owned=True, first_port=18300)
    yield made
    for endpoint in made.list():
        made.stop(endpoint.stage)
    assert processes_of(tmp_path) == []


def processes_of(folder: Path) -> list[str]:
    "Command lines of living processes that name `folder`."
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
    detector = load_package(packages[0]).detector()
    rows = load_package(packages[0]).predict_bytes([encode_jpeg(sample_scene(i % 6, np.random.default_rng(i))) for i in range(21)])
    undisturbed = [detector.update(row) for row in rows["drift"]]
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
    assert reading["is_drift"] and reading["statistic"] > reading["threshold"] and reading["time"] == sent
    after = drift_status(url)
    assert after.pop("last_alarm").startswith("20")
    assert after == {"observations": sent, "time": 0, "statistic": None, "threshold": None, "is_drift": False, "alarms": 1}
    (alarm,) = (tmp_path / "endpoints" / "staging" / "state" / "alarms").iterdir()
    report = json.loads(alarm.read_text())
    assert (report["version"], report["observations"], report["time"]) == ("1", sent, sent)
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
    "Clients that send one request after another until told to stop, and count what they got."
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
                reply = one.post(f"{self.url}/invocations", content=PHOTO, headers={"content-type": "image/jpeg"}, timeout=30)
                self.versions.append(reply.json()["model"]["version"])
            except Exception as e:
                self.failures.append(repr(e))
        client.close()

    def watch(self) -> None:
        with httpx.Client() as client:
            while not self.stop.is_set():
                self.observations.append(client.get(f"{self.url}/drift", timeout=30).json()["observations"])

    def wait_for(self, count: int) -> None:
        wanted = len(self.versions) + count
        while len(self.versions) < wanted and not self.failures:
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
    "Living workers of a supervisor."
    return {int(p.name) for p in Path("/proc").glob("[0-9]*") if parent_of(p) == endpoint.pid}


def warm(endpoints, stage: str) -> str:
    return json.loads((endpoints.folder / stage / "endpoint.json").read_text())["warm"]


def wait_until(holds) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def test_a_rollback_under_load_hands_over_to_the_worker_that_stood_by(packages, tmp_path):
    "It is the very process of before; no request fails, and what was promoted and rolled back ends."
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
        time.sleep(1.5)  # it was asked meanwhile
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
    "Nor does the load on its predecessor notice; who stood by stands by still."
    first = endpoints.deploy("staging", packages[0], "1")
    endpoints.deploy("staging", packages[1], "2")
    known, said = workers_of(first), []

    def deploy():
        with pytest.raises(EndpointError, match="version 3 does not serve staging") as error:
            endpoints.deploy("staging", packages[0], "3")
        said.append(error)

    with Load(first.url) as load:
        load.wait_for(10)
        update = threading.Thread(target=deploy)
        update.start()
        wait_until(lambda: workers_of(first) - known)
        os.kill((workers_of(first) - known).pop(), signal.SIGKILL)
        update.join()
        load.wait_for(10)
    assert said and load.failures == [] and set(load.versions) == {"2"}
    assert endpoints.describe("staging").version == "2" and endpoints.history("staging") == ["1", "2"]


def test_a_client_that_kept_its_connection_reaches_the_new_version(endpoints, packages):
    url = endpoints.deploy("staging", packages[0], "1").url
    post = dict(content=PHOTO, headers={"content-type": "image/jpeg"})
    with httpx.Client() as client:
        assert client.post(f"{url}/invocations", **post).json()["model"]["version"] == "1"
        endpoints.deploy("staging", packages[0], "2")
        reply = client.post(f"{url}/invocations", **post).json()
    assert (reply["model"]["version"], reply["drift"][0]["time"]) == ("2", 2)  # same package: the detector goes on


def test_a_version_that_crashes_never_takes_the_stage(endpoints, packages, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(packages[0], broken)
    (broken / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(EndpointError, match="model.onnx"):
        endpoints.deploy("staging", broken, "1")
    assert endpoints.list() == []
    first = endpoints.deploy("staging", packages[0], "1")
    with pytest.raises(EndpointError, match="version 2 does not serve staging.*model.onnx"):
        endpoints.deploy("staging", broken, "2")
    assert endpoints.describe("staging") == first
    assert invoke(first.url, PHOTO, "image/jpeg")["model"]["version"] == "1"


def test_ports(endpoints, packages):
    with socket.create_server(("127.0.0.1", 18300)):
        staging = endpoints.deploy("staging", packages[0], "1")
        assert staging.url == "http://127.0.0.1:18301"
    endpoints.stop("staging")
    assert endpoints.deploy("production", packages[0], "1").url == "http://127.0.0.1:18300"
    assert endpoints.start("staging").url == "http://127.0.0.1:18301"  # it was remembered
    endpoints.stop("staging")
    with socket.create_server(("127.0.0.1", 18301)):
        assert endpoints.start("staging").url == "http://127.0.0.1:18302"
    assert [e.stage for e in endpoints.list()] == ["production", "staging"]


def test_an_endpoint_outlives_the_command_that_made_it(packages, tmp_path):
    code = "import sys; from intel_nb.serving.endpoints import LocalEndpoints as E; print(E(sys.argv[1], first_port=18300).deploy('staging', sys.argv[2], '1').url)"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "endpoints", packages[0]], capture_output=True, text=True, timeout=60)
    endpoints = LocalEndpoints(tmp_path / "endpoints")
    try:
        assert done.stderr == "" and done.returncode == 0  # and its output ended: nothing holds the pipe
        assert is_answering(done.stdout.strip())
    finally:
        endpoints.stop("staging")
    assert processes_of(tmp_path) == []


def test_a_throwaway_endpoint_does_not_outlive_its_owner(packages, tmp_path):
    code = ("import os, sys; from intel_nb.serving.endpoints import LocalEndpoints as E; "
            "print(E(sys.argv[1], owned=True, first_port=0).deploy('staging', sys.argv[2], '1').pid, flush=True); os.kill(os.getpid(), 9)")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "endpoints", packages[0]], capture_output=True, text=True, timeout=60)
    deadline = time.monotonic() + 20
    while not is_gone(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes_of(tmp_path) == []
    assert LocalEndpoints(tmp_path / "endpoints").describe("staging").status == "stopped"


@pytest.mark.slow
def test_two_deployments_at_once_take_turns(endpoints, packages):
    found = {}
    threads = [threading.Thread(target=lambda v=v: found.update({v: endpoints.deploy("staging", packages[0], v)})) for v in "12"]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert {e.version for e in found.values()} == {"1", "2"} and len({(e.url, e.pid) for e in found.values()}) == 1
    assert sorted(endpoints.history("staging")) == ["1", "2"]


def test_wrong_input(endpoints, packages, tmp_path):
    for wrong, match in ((lambda: endpoints.start("nowhere"), "no endpoint nowhere"), (lambda: endpoints.describe("x"), "no endpoint"),
                         (lambda: endpoints.deploy("a/b", packages[0], "1"), "no name for a stage"),
                         (lambda: endpoints.deploy("s", packages[0], "1", engine="thread"), "there are process and ray"),
                         (lambda: open_endpoints("ftp://x"), "folder")):
        with pytest.raises(InputError, match=match):
            wrong()
    assert not (tmp_path / "endpoints").exists()


def test_a_refusal_is_the_callers_error(endpoints, packages):
    url = endpoints.deploy("staging", packages[0], "1").url
    with pytest.raises(Refused) as refused:
        invoke(url, b"no image", "image/jpeg")
    assert (refused.value.status, refused.value.code) == (400, "undecodable")
    assert drift_status(url)["observations"] == 0


def test_our_own_clients_bear_the_token(packages, monkeypatch):
    with throwaway(packages[0], INTEL_NB_TOKEN="s3cret") as url:
        assert is_answering(url)
        for ask in (lambda: invoke(url, PHOTO, "image/jpeg"), lambda: drift_status(url)):
            with pytest.raises(Refused, match="401 unauthorized"):
                ask()
        monkeypatch.setenv("INTEL_NB_TOKEN", "s3cret")
        assert invoke(url, PHOTO, "image/jpeg")["predictions"] and drift_status(url)["observations"] == 1


def test_a_slow_upload_survives_an_update(endpoints, packages):
    "The old worker answers a client that was still sending when it left; the new one serves meanwhile."
    endpoint = endpoints.deploy("staging", packages[0], "1")
    host, port = endpoint.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as slow:
        head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: {len(PHOTO)}\r\n\r\n".encode()
        slow.sendall(head + PHOTO[:100])
        while not is_answering(endpoint.url):  # a round trip: the worker has seen the head
            pass
        endpoints.deploy("staging", packages[0], "2")
        assert invoke(endpoint.url, PHOTO, "image/jpeg")["model"]["version"] == "2"
        slow.sendall(PHOTO[100:])
        reply = slow.makefile("rb").read()
    assert reply.startswith(b"HTTP/1.1 200") and json.loads(reply.split(b"\r\n\r\n")[1])["model"]["version"] == "1"
    assert drift_status(endpoint.url)["observations"] == 1


async def hurried(url: str, count: int) -> list[int]:
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=60) as client:
        replies = await asyncio.gather(*(client.post(f"{url}/invocations", content=PHOTO, headers={"content-type": "image/jpeg"})
                                         for _ in range(count)))
    assert all(r.headers["retry-after"] == "1" and r.json()["error"]["code"] == "overloaded" for r in replies if r.status_code == 503)
    return [r.status_code for r in replies]


def test_overload_is_503_and_passes(packages):
    with throwaway(packages[0], INTEL_NB_QUEUE="4", INTEL_NB_THREADS="1") as url:
        statuses = asyncio.run(hurried(url, 100))
        assert set(statuses) == {200, 503}
        assert invoke(url, PHOTO, "image/jpeg")["predictions"]
        assert drift_status(url)["observations"] == statuses.count(200) + 1


@pytest.mark.slow
def test_a_shadow_sees_production_and_answers_nobody(endpoints, packages, tmp_path):
    "Whatever becomes of it: it hangs, it dies, production is updated under it; no request fails or waits for it."
    url = endpoints.deploy("production", packages[0], "1").url
    assert endpoints.shadowed("production") is None and not endpoints.unshadow("production")
    endpoints.shadow("production", sample_package(tmp_path / "other", seed=1), "9")
    beside = endpoints._beside("production").describe("production")
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


def test_a_shadow_is_told_apart_by_what_it_answers(endpoints, packages, tmp_path):
    "The same package agrees always, and another as often as it does when it is asked itself; both go with their stage."
    url = endpoints.deploy("production", packages[0], "1").url
    other = sample_package(tmp_path / "other", seed=1)
    scenes = [encode_jpeg(sample_scene(i % 6, np.random.default_rng([5, i])) // 3) for i in range(40)]  # dark: not easy
    ours, theirs = (load_package(p).predict_bytes(scenes)["probabilities"].argmax(1) for p in (packages[0], other))
    for version, package, agreed in (("2", packages[1], 40), ("3", other, int((ours == theirs).sum()))):
        endpoints.shadow("production", package, version)
        time.sleep(1.1)  # who serves looks once a second
        for scene in scenes:
            assert invoke(url, scene, "image/jpeg")["model"]["version"] == "1"
        wait_until(lambda: endpoints.shadowed("production")["requests"] == 40)
        known = endpoints.shadowed("production")
        assert (known["version"], known["images"], known["agreed"], known["status"]) == (version, 40, agreed, "running")
        assert (known["failed"], known["dropped"]) == (0, 0) and known["shadow_ms"]["median"] > 0
    endpoints.stop("production")
    assert processes_of(tmp_path / "endpoints") == [] and endpoints.shadowed("production")["agreed"] == agreed
