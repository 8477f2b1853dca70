"""The whole loop, with real processes: the world changes, and a version comes of it that knows the world as it is now."""
import hashlib
import json
import subprocess
import time

import numpy as np
import pytest
from conftest import COMMAND, QUICK, House

from intel_nb.chain.plan import open_workspace
from intel_nb.drift import fog
from intel_nb.images import encode_jpeg
from intel_nb.scenes import SAMPLE_CLASSES, sample_archive, sample_scene
from intel_nb.serving.endpoints import drift_status, invoke
from intel_nb.streams import run_time


def in_fog(number: int) -> tuple[bytes, str]:
    "A scene in such fog that a model which never saw any is often wrong, and its label."
    rng = np.random.default_rng([99, number])
    scene = sample_scene(number % 6, rng)
    return encode_jpeg(fog(scene, 0.95, rng)), SAMPLE_CLASSES[number % 6]


def accuracy(url: str, numbers: range) -> float:
    "How often the endpoint is right about scenes in fog."
    scenes = [in_fog(k) for k in numbers]
    return float(np.mean([invoke(url, image, "image/jpeg")["predictions"][0]["label"] == label for image, label in scenes]))


def labelled(tasks: list[dict], labels: dict[str, str]) -> list[dict]:
    "What Label Studio exports once a person has labelled `tasks`; `labels` are by the digest in an image's name."
    choice = lambda task: {"choices": [labels[task["data"]["image"].split("/")[1].split(".")[0]]]}
    result = lambda task: [{"type": "choices", "from_name": "label", "to_name": "image", "value": choice(task)}]
    return [task | {"id": k, "annotations": [{"id": k, "result": result(task)}]} for k, task in enumerate(tasks)]


def wait_for_run(house: House, known: set[str], watcher: subprocess.Popen) -> dict:
    "The run that is not among the `known`, when it has come to its end."
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        assert watcher.poll() is None, watcher.stdout.read()
        new = [run for run in house("runs", "--json").json if run["run_id"] not in known]
        if new and new[0]["status"] != "running":
            return new[0]
        time.sleep(1)
    raise AssertionError("no run ended")


@pytest.mark.slow
def test_the_loop_closes(tmp_path):
    house = House(tmp_path, sample_archive(tmp_path / "scenes.zip", per_class=60, seed=0))
    inbox = tmp_path / "inbox"
    (inbox / "annotations").mkdir(parents=True)
    try:
        assert house.run("--approve").status == 0
        first = house.newest()["run_id"]
        assert house("promote", "1").status == 0
        url = next(e["url"] for e in house("endpoints", "--json").json if e["stage"] == "production")
        labels = dict((hashlib.sha256(image).hexdigest(), label) for image, label in map(in_fog, range(600)))
        old = accuracy(url, range(600))  # production's traffic, and so what an alarm captures
        assert drift_status(url)["alarms"] > 0
        house("stop", "production")  # with which the last images are on the disk
        kept = max(house("captures", "--json").json, key=lambda one: one["images"])
        assert kept["stage"] == "production" and kept["images"] >= 200

        house("start", "production")
        known = {run["run_id"] for run in house("runs", "--json").json}
        watcher = subprocess.Popen([COMMAND, "watch", str(inbox), "--rest", "0.5", *QUICK], env=house.environ, cwd=tmp_path,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            tasks = json.loads((house.root / kept["where"] / "tasks.json").read_text())
            (inbox / "annotations" / ".export").write_text(json.dumps(labelled(tasks, labels)))
            (inbox / "annotations" / ".export").rename(inbox / "annotations" / "export.json")
            run = wait_for_run(house, known, watcher)
        finally:
            watcher.terminate()
            watcher.wait(60)
        assert run["status"] == "waiting" and run["model_version"] == "2", run
        before, after = (house("report", name, "--json").json["data"]["images"] for name in (first, run["run_id"]))
        words = next(s for s in run["steps"] if s["name"] == "evaluate")["result"]["annotations"]
        assert f"of capture:{kept['time']} (+" in words, "a person sees by how much it is better where it matters"
        assert after == before + len(tasks), "the labels add to the archive that the run before was built on"
        assert house("approve", "2").status == 0 and house("promote", "2").status == 0
        new = accuracy(url, range(10_000, 10_300))
        print(f"accuracy in fog {old:.3f} before and {new:.3f} after")
        assert new >= old + 0.10

        package = open_workspace(house.environ).registry().package("2")
        from intel_nb.model import load_package
        loaded = load_package(package)
        rows = loaded.predict_bytes([in_fog(k)[0] for k in range(20_000, 20_600)])["drift"]
        found = run_time(loaded.detector(), rows, 300, seed=0)
        print(f"run time in fog {found.mean:.1f}")
        assert found.mean >= loaded.detector().calibration.ert / 2
    finally:
        house("stop")
