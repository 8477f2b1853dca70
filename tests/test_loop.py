"""The whole loop, with real processes: the world changes, and a new version is made that knows the changed world."""
import hashlib
import json
import subprocess
import time

import numpy as np
import pytest
from conftest import COMMAND, QUICK, House

from intel_nb.chain.plan import open_workspace
from intel_nb.detection.corruptions import fog
from intel_nb.detection.streams import run_time
from intel_nb.detector import Observations
from intel_nb.images import encode_jpeg
from intel_nb.scenes import SAMPLE_CLASSES, sample_archive, sample_scene
from intel_nb.serving.endpoints import drift_status, invoke


def in_fog(number: int) -> tuple[bytes, str]:
    "Return a scene in dense fog, and its label. A model that has never seen fog is often wrong about it."
    rng = np.random.default_rng([99, number])
    scene = sample_scene(number % 6, rng)
    return encode_jpeg(fog(scene, 0.95, rng)), SAMPLE_CLASSES[number % 6]


def accuracy(url: str, numbers: range) -> float:
    "Return the share of scenes in fog that the endpoint is right about."
    scenes = [in_fog(k) for k in numbers]
    answers = [invoke(url, image, "image/jpeg")["predictions"][0]["label"] for image, _ in scenes]
    return float(np.mean([answer == label for answer, (_, label) in zip(answers, scenes, strict=True)]))


def labelled(tasks: list[dict], labels: dict[str, str]) -> list[dict]:
    "Return the export of Label Studio after a person has labelled `tasks`. `labels` has them by the image's digest."
    def result(task: dict) -> list[dict]:
        label = labels[task["data"]["image"].split("/")[1].split(".")[0]]
        return [{"type": "choices", "from_name": "label", "to_name": "image", "value": {"choices": [label]}}]

    return [task | {"id": k, "annotations": [{"id": k, "result": result(task)}]} for k, task in enumerate(tasks)]


def wait_for_run(house: House, known: set[str], watcher: subprocess.Popen) -> dict:
    "Wait until a run that is not among the `known` has ended. Return it."
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        assert watcher.poll() is None, watcher.stdout.read()
        new = [run for run in house("runs", "--json").json if run["run_id"] not in known]
        if new and new[0]["status"] not in ("queued", "running"):
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
        labels = {hashlib.sha256(image).hexdigest(): label for image, label in map(in_fog, range(600))}
        old = accuracy(url, range(600))  # this is production's traffic, so an alarm captures it
        assert drift_status(url)["alarms"] > 0
        house("stop", "production")  # which writes the last images to the disk
        kept = max(house("captures", "--json").json, key=lambda one: one["images"])
        assert kept["stage"] == "production" and kept["images"] >= 200

        house("start", "production")
        known = {run["run_id"] for run in house("runs", "--json").json}
        watcher = subprocess.Popen([COMMAND, "watch", str(inbox), "--rest", "0.5", *QUICK], env=house.environ,
                                   cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
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
        assert f"of capture:{kept['time']} (+" in words, "a person sees how much better it is where it matters"
        alike = run["steps"][0]["result"]["annotation_reasons"].get("near_duplicate", 0)  # to scenes of the test split
        assert alike < 50 and after == before + len(tasks) - alike, "the labels add to the archive of the run before"
        assert house("approve", "2").status == 0 and house("promote", "2").status == 0
        new = accuracy(url, range(10_000, 10_300))
        print(f"accuracy in fog {old:.3f} before and {new:.3f} after")
        assert new >= old + 0.10

        package = open_workspace(house.environ).registry().package("2")
        from intel_nb.model import load_package
        loaded = load_package(package)
        answers = loaded.predict_bytes([in_fog(k)[0] for k in range(20_000, 20_600)])
        rows = Observations(answers["drift"], answers["probabilities"].argmax(axis=1))
        found = run_time(loaded.detector(), rows, 300, seed=0)
        print(f"run time in fog {found.mean:.1f}")
        assert found.mean >= loaded.detector().calibration.ert / 2
    finally:
        house("stop")
