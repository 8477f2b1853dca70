"""The watcher as a real process: uploads of every kind, kills, twins, and what it starts."""
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import COMMAND, QUICK

from intel_nb.chain.plan import RunRequest
from intel_nb.chain.runs import Run, StepRecord, write_run
from intel_nb.storage import utc_now, write_json

# Stands for `intel-nb`: a process that notes what it was given, and which of it is whole.
RECORDER = """
import hashlib, json, os, pathlib, sys, time
out, pause, arguments = sys.argv[1], float(sys.argv[2]), sys.argv[3:]
given = dict(zip(arguments[1::2], arguments[2::2]))
files = [p for p in [pathlib.Path(given.get("--data", "nowhere"))] if p.is_file()]
files += [p for p in pathlib.Path(given.get("--annotations", "nowhere")).rglob("*") if p.is_file()]
def whole(path):
    head, _, body = path.read_bytes().partition(b"\\n")
    return head.decode() == hashlib.sha256(body).hexdigest()
note = {"run": given["--run-id"], "trigger": given["--trigger"], "digests": sorted({hashlib.sha256(p.read_bytes()).hexdigest() for p in files}),
        "torn": [p.name for p in files if p.suffix == ".csv" and not whole(p)], "kept": "--profile" in given}
time.sleep(pause)
with open(out, "a") as record:
    record.write(json.dumps(note) + "\\n")
"""

WATCH = """
import json, signal, sys
from pathlib import Path
from intel_nb.chain.plan import Workspace
from intel_nb.chain.watch import Times, watch
def end(number, frame):
    raise KeyboardInterrupt
signal.signal(signal.SIGTERM, end)
root, command, patience, options = json.loads(sys.argv[1])
root = Path(root)
try:
    watch(root / "inbox", Workspace(root / "workspace", root / "executed", root), **options, command=command, times=Times(0.5, patience),
          tell=lambda text: print(text, flush=True))
except KeyboardInterrupt:
    pass
"""


class Scene:
    "A folder with an inbox, and watchers on it."
    def __init__(self, root: Path, pause: float = 0.3):
        self.root, self.inbox, self.record, self.watchers = root, root / "inbox", root / "record.jsonl", []
        (self.inbox / "annotations").mkdir(parents=True)
        self.ran("before", "run", data={})
        self.command = [sys.executable, "-c", RECORDER, str(self.record), str(pause)]

    def ran(self, run_id: str, trigger: str, **parameters: dict) -> None:
        "A run that was, with the `parameters` of its steps."
        steps = [StepRecord(name, "") for name in parameters]
        write_run(self.root / "executed", Run(run_id, "succeeded", utc_now(), utc_now(), trigger, steps=steps))
        write_json(self.root / "executed" / run_id / "request.json", asdict(RunRequest(parameters, trigger)))

    def watch(self, patience: float = 15, **options) -> subprocess.Popen:
        told = json.dumps([str(self.root), self.command, patience, options])
        with open(self.root / "told.txt", "ab") as log:
            self.watchers.append(subprocess.Popen([sys.executable, "-c", WATCH, told], stdout=log, stderr=log))
        return self.watchers[-1]

    def told(self) -> str:
        path = self.root / "told.txt"
        return path.read_text() if path.exists() else ""

    def notes(self) -> list[dict]:
        return [json.loads(line) for line in self.record.read_text().splitlines()] if self.record.exists() else []

    def orders(self) -> list[dict]:
        found = [json.loads(p.read_text()) for p in (self.root / "workspace" / "watch").glob("*/*/order.json")]
        return sorted(found, key=lambda order: order["number"])

    def idle(self) -> bool:
        return all((p.parent / "outcome.json").exists() for p in (self.root / "workspace" / "watch").glob("*/*/order.json"))

    def close(self) -> None:
        for watcher in self.watchers:
            watcher.kill()
            watcher.wait()


@pytest.fixture
def scene(tmp_path):
    made = Scene(tmp_path)
    yield made
    made.close()


def until(true, seconds: float = 60, pause: float = 0.02) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(pause)


def content(number: int) -> bytes:
    "A label file that tells its own digest, so that a half of it is known as such."
    body = f"image,label\nimages/{number}.jpg,sea\n".encode() * (200 + number)
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_slowly(path: Path, data: bytes, pauses: list[float]) -> None:
    "In as many pieces as there are pauses, the file being open all the time."
    size = -(-len(data) // len(pauses))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for place, pause in enumerate(pauses):
            file.write(data[place * size:(place + 1) * size])
            file.flush()
            time.sleep(pause)


def upload(inbox: Path, number: int) -> None:
    "One of fifty: most are written slowly, some moved in, some come twice, by the same name or by another."
    chance, data = random.Random(number), content(number)
    time.sleep(chance.uniform(0, 4))
    path = inbox / "annotations" / (f"batch{number % 3}/{number}.csv" if number % 4 else f"{number}.csv")
    if number % 5 == 0:
        write_slowly(path.with_name(f".{path.name}.upload"), data, [0.1] * 3)
        os.replace(path.with_name(f".{path.name}.upload"), path)
    else:
        longest = 1.2 if sys.platform == "linux" else 0.2  # longer than a file must be at rest: the open file tells
        write_slowly(path, data, [chance.uniform(0.05, 0.2), longest if number % 7 == 0 else 0.1, 0.05, 0.05])
    if number % 6 == 0:
        time.sleep(chance.uniform(0, 2))
        write_slowly(path if number % 12 else path.with_name(f"again-{number}.csv"), data, [0.1, 0.1])


def test_fifty_uploads_in_a_burst_lead_to_one_run_each(scene):
    quick = {"patience": 0.5, "options": ["--profile", "quick"]}
    scene.watch(**quick)
    writers = [threading.Thread(target=upload, args=[scene.inbox, number]) for number in range(50)]
    for writer in writers:
        writer.start()
    for way in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
        watcher, twin = scene.watchers[-1], scene.watch(**quick)
        time.sleep(1.7)
        watcher.send_signal(way)
        watcher.wait()
        assert twin.poll() is None
    for writer in writers:
        writer.join()
    contents = {digest(content(number)) for number in range(50)}
    until(lambda: scene.idle() and contents <= {d for note in scene.notes() for d in note["digests"]})
    time.sleep(1.5)  # what came twice would start something now
    until(scene.idle)

    notes, orders = scene.notes(), scene.orders()
    assert [note["torn"] for note in notes] == [[]] * len(notes)
    led = Counter(event[2] for order in orders for event in order["events"])
    assert set(led) == contents and set(led.values()) == {1}
    assert all(order["events"] for order in orders) and len({o["id"] for o in orders}) == len(orders) < 50
    started = Counter(note["run"] for note in notes)
    assert set(started) == {order["id"] for order in orders}
    assert sum(started.values()) <= len(orders) + 2, "but for those whose watcher was killed in between"
    seen = {note["run"]: set(note["digests"]) for note in notes}
    for order in orders:
        assert {event[2] for event in order["events"]} <= seen[order["id"]]
        assert seen[order["id"]] <= contents
    assert {(note["trigger"], note["kept"]) for note in notes} == {("annotations-added", True)}


@pytest.mark.slow
def test_labels_wait_for_an_archive_that_is_coming(scene):
    scene.watch()
    archive = scene.root / "made.zip"
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("sea/1.jpg", bytes(range(256)) * 2000)
    (scene.inbox / "annotations" / "1.csv").write_bytes(content(1))
    write_slowly(scene.inbox / "intel.zip", archive.read_bytes(), [0.2, 1.2, 0.1])
    until(lambda: scene.notes() and scene.idle())
    (note,) = scene.notes()
    assert set(note["digests"]) == {digest(content(1)), digest(archive.read_bytes())}
    assert set(note["trigger"].split(", ")) == {"data-uploaded", "annotations-added"}
    (scene.inbox / "intel.zip").unlink()
    (scene.inbox / "annotations" / "2.csv").write_bytes(content(2))
    until(lambda: len(scene.notes()) == 2)
    assert digest(archive.read_bytes()) in scene.notes()[1]["digests"], "an archive that has gone is the one before"
    (scene.inbox / "intel.zip").write_bytes(archive.read_bytes()[:-100])
    until(lambda: "intel.zip is not taken" in scene.told())
    assert len(scene.orders()) == 2


def test_a_command_that_crashes_ends_no_watcher(scene):
    scene.command = [sys.executable, "-c", "import os, signal, sys; print('the last words', flush=True); os.kill(os.getpid(), signal.SIGKILL)"]
    watcher = scene.watch()
    for number in (1, 2):
        (scene.inbox / "annotations" / f"{number}.csv").write_bytes(content(number))
        until(lambda: len(scene.orders()) == number and scene.idle())
    assert watcher.poll() is None and scene.told().count("ended with -9: the last words") == 2


def test_a_watcher_that_is_told_to_end_takes_its_command_along(scene):
    scene.command = [sys.executable, "-c", RECORDER, str(scene.record), "60"]
    watcher = scene.watch(poll=True)
    (scene.inbox / "annotations" / "1.csv").write_bytes(content(1))
    until(scene.orders)
    (order,) = scene.orders()
    until(lambda: f"run {order['id']} for annotations/1.csv" in scene.told())
    watcher.terminate()
    assert watcher.wait(20) == 0 and not scene.idle() and scene.notes() == []
    scene.command[-1] = "0"
    scene.watch()
    until(scene.idle)
    assert [note["run"] for note in scene.notes()] == [order["id"]]


def test_labels_of_a_capture_get_its_images(scene):
    "A person drops the export of Label Studio, without images; a later run has them still, though the capture has gone."
    image = b"pixels"
    kept = scene.root / "workspace" / "captures" / "staging" / "2026-01-31T120000Z-00000042" / "images" / f"{digest(image)}.jpg"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(image)
    scene.watch()
    (scene.inbox / "annotations" / "export.json").write_text(json.dumps([{"data": {"image": f"images/{kept.name}"}}]))
    until(lambda: len(scene.notes()) == 1)
    assert digest(image) in scene.notes()[0]["digests"]
    shutil.rmtree(kept.parent.parent)
    (scene.inbox / "annotations" / "1.csv").write_bytes(content(1))
    until(lambda: len(scene.notes()) == 2 and scene.idle())
    assert {digest(image), digest(content(1))} <= set(scene.notes()[1]["digests"])


def test_labels_add_to_what_the_last_run_was_built_on(scene):
    "A promotion after it builds nothing; and without a run there is nothing to add to, whatever was drawn for others."
    for run in (scene.root / "executed").iterdir():
        shutil.rmtree(run)
    scene.watch()
    (scene.inbox / "annotations" / "1.csv").write_bytes(content(1))
    until(lambda: "labels wait for the photographs" in scene.told())
    assert scene.orders() == []
    scene.ran("built", "run", data={"archive": "/photos/intel.zip", "annotations": ["/photos/by_hand.zip"]})
    scene.ran("promoted", "promote", deploy={"version": "1"})
    until(lambda: scene.notes() and scene.idle())
    (order,) = scene.orders()
    assert order["arguments"][5:9] == ["--data", "/photos/intel.zip", "--annotations", "/photos/by_hand.zip"]
    assert scene.notes()[0]["digests"] == [digest(content(1))]


@pytest.mark.slow
def test_an_upload_becomes_a_run_and_an_approval_a_live_endpoint(empty):
    inbox = empty.root / "inbox"
    (inbox / "annotations").mkdir(parents=True)
    with open(empty.root / "told.txt", "w") as log:
        watcher = subprocess.Popen([COMMAND, "watch", "inbox", *QUICK], env=empty.environ, cwd=empty.root, stdout=log, stderr=log)
    try:
        shutil.copy(empty.archive, inbox / "intel.zip")
        until(lambda: empty("runs", "--json").json and empty.newest()["status"] not in ("running", "failed"), 240, 1)
        run = empty.newest()
        assert (run["status"], run["trigger"], run["model_version"]) == ("waiting", "data-uploaded", "1")
        from intel_nb.registry import open_registry
        open_registry(f"sqlite:///{empty.home / 'mlflow.db'}").set_status("1", "Approved", "by another way than the command")
        until(lambda: empty.newest()["status"] == "succeeded", 240, 1)
        assert len(empty("runs", "--json").json) == 1
        assert [(e["stage"], e["version"], e["status"]) for e in empty("endpoints", "--json").json] == [("staging", "1", "running")]
        watcher.terminate()
        assert watcher.wait(30) == 0
    finally:
        watcher.kill()
    told = (empty.root / "told.txt").read_text()
    assert "is waiting, version 1; intel-nb approve 1" in told and "approve" in told and "trouble" not in told
