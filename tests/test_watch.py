"""The watcher as a real process: uploads of every kind, killed watchers, two at once, and what they start."""
import hashlib
import json
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import COMMAND, QUICK

from intel_nb.chain.plan import RunRequest, Workspace
from intel_nb.chain.runs import Run, StepRecord, list_runs, read_run, write_run
from intel_nb.chain.watch import KEEP, RunProcess, UploadBatch, read_batches, release_run, watch_folder
from intel_nb.storage import utc_now, write_json

# Stands for `intel-nb`: a process that records which files it got, and which of them are not whole.
STAND_IN = """
import hashlib, json, os, pathlib, sys, time
out, pause, arguments = sys.argv[1], float(sys.argv[2]), sys.argv[3:]
options = dict(zip(arguments[1::2], arguments[2::2]))
files = [p for p in [pathlib.Path(options.get("--data", "nowhere"))] if p.is_file()]
files += [p for p in pathlib.Path(options.get("--annotations", "nowhere")).rglob("*") if p.is_file()]
def whole(path):
    head, _, body = path.read_bytes().partition(b"\\n")
    return head.decode() == hashlib.sha256(body).hexdigest()
note = {"run": options["--run-id"], "digests": sorted({hashlib.sha256(p.read_bytes()).hexdigest() for p in files}),
        "torn": [p.name for p in files if p.suffix == ".csv" and not whole(p)],
        "kept": options.get("--param") == "train.profile=quick"}
time.sleep(pause)
with open(out, "a") as record:
    record.write(json.dumps(note) + "\\n")
path = pathlib.Path(os.environ["INTEL_NB_EXECUTED"], note["run"], "run.json")
done = json.loads(path.read_text().replace("check", "old")) | {"status": "succeeded"}
path.with_name("new.json").write_text(json.dumps(done))
path.with_name("new.json").replace(path)
"""

WATCHER = """
import json, signal, sys
from pathlib import Path
from intel_nb.chain.plan import RunRequest, Workspace
from intel_nb.chain.watch import Times, watch_inbox
def interrupt(number, frame):
    raise KeyboardInterrupt
signal.signal(signal.SIGTERM, interrupt)
root, command, rest, patience, poll, parameters = json.loads(sys.argv[1])
root = Path(root)
try:
    workspace = Workspace(root / "workspace", root / "executed", root)
    watch_inbox(root / "inbox", workspace, RunRequest(parameters), poll=poll, command=command,
                times=Times(rest, patience), tell=lambda text: print(text, flush=True))
except KeyboardInterrupt:
    pass
"""


class Scene:
    "A folder with an inbox, and watchers of it."
    def __init__(self, root: Path, pause: float = 0.3):
        self.root, self.inbox, self.record, self.watchers = root, root / "inbox", root / "record.jsonl", []
        (self.inbox / "annotations").mkdir(parents=True)
        (root / "workspace").mkdir()
        self.add_version("1", approval="Approved", fingerprint="f1")
        self.add_run("before", "run", "1", data={})
        self.command = [sys.executable, "-c", STAND_IN, str(self.record), str(pause)]

    def add_version(self, version: str, **tags: str) -> None:
        "Write a version as the registry reads it. MLflow would take seconds to make its database."
        tables = {"model_versions": "name, version, creation_time, run_id, current_stage",
                  "model_version_tags": "name, version, key, value", "registered_model_aliases": "name, version, alias"}
        with closing(sqlite3.connect(self.root / "workspace" / "mlflow.db")) as db, db:
            for table, columns in tables.items():
                db.execute(f"create table if not exists {table} ({columns})")
            db.execute("insert into model_versions values ('intel-nb', ?, 1769860800000, '', 'None')", [int(version)])
            rows = [(int(version), *tag) for tag in tags.items()]
            db.executemany("insert into model_version_tags values ('intel-nb', ?, ?, ?)", rows)

    def add_run(self, run_id: str, trigger: str, version: str | None = None, **parameters: dict) -> None:
        "Record a run with the `parameters` of its steps, and the `version` that it made."
        steps = [StepRecord(name, "") for name in parameters]
        steps += [StepRecord("evaluate", "", result={"fingerprint": f"f{version}"})] if version else []
        run = Run(run_id, "succeeded", utc_now(), utc_now(), trigger, version, steps=steps)
        write_run(self.root / "executed", run)
        write_json(self.root / "executed" / run_id / "request.json", asdict(RunRequest(parameters, trigger)))

    def judge(self, run_id: str, version: str, status: str) -> None:
        "Let the run have made a `version` of this status."
        self.add_version(version, approval=status, fingerprint=f"f{version}")
        steps = [StepRecord("evaluate", "", result={"fingerprint": f"f{version}"})]
        run = read_run(self.root / "executed", run_id)
        write_run(self.root / "executed", replace(run, model_version=version, steps=steps))

    def watch(self, rest: float = 0.2, patience: float = 15, poll: bool = False,
              **parameters: dict) -> subprocess.Popen:
        arguments = json.dumps([str(self.root), self.command, rest, patience, poll, parameters])
        with open(self.root / "watch.log", "ab") as log:
            watcher = subprocess.Popen([sys.executable, "-c", WATCHER, arguments], stdout=log, stderr=log)
        self.watchers.append(watcher)
        return watcher

    def log(self) -> str:
        path = self.root / "watch.log"
        return path.read_text() if path.exists() else ""

    def notes(self) -> list[dict]:
        return [json.loads(line) for line in self.record.read_text().splitlines()] if self.record.exists() else []

    def batches(self) -> list[UploadBatch]:
        return read_batches(self.root / "executed", self.inbox.resolve())

    def runs(self) -> dict[str, Run]:
        return {run.run_id: run for run in list_runs(self.root / "executed")}

    def idle(self) -> bool:
        return not {run.status for run in self.runs().values()} & {"queued", "running"}

    def close(self) -> None:
        for watcher in self.watchers:
            watcher.kill()
            watcher.wait()


@pytest.fixture
def scene(tmp_path):
    scene = Scene(tmp_path)
    yield scene
    scene.close()


def until(condition, seconds: float = 60, pause: float = 0.02) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(pause)


def content(number: int) -> bytes:
    "A label file that begins with the digest of the rest, so that a part of it can be told from the whole."
    body = f"image,label\nimages/{number}.jpg,sea\n".encode() * (200 + number)
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_slowly(path: Path, data: bytes, pauses: list[float]) -> None:
    "Write in as many pieces as there are pauses, with the file open all the time."
    size = -(-len(data) // len(pauses))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for place, pause in enumerate(pauses):
            file.write(data[place * size:(place + 1) * size])
            file.flush()
            time.sleep(pause)


def upload(inbox: Path, number: int) -> None:
    "Upload one of fifty: most are written slowly, some are moved in, some come twice, under the same name or another."
    chance, data = random.Random(number), content(number)
    time.sleep(chance.uniform(0, 4))
    path = inbox / "annotations" / (f"batch{number % 3}/{number}.csv" if number % 4 else f"{number}.csv")
    if number % 5 == 0:
        write_slowly(path.with_name(f".{path.name}.upload"), data, [0.1] * 3)
        path.with_name(f".{path.name}.upload").replace(path)
    else:
        longest = 1.2 if sys.platform == "linux" else 0.2  # longer than a file must rest: the open file tells
        write_slowly(path, data, [chance.uniform(0.05, 0.2), longest if number % 7 == 0 else 0.1, 0.05, 0.05])
    if number % 6 == 0:
        time.sleep(chance.uniform(0, 2))
        write_slowly(path if number % 12 else path.with_name(f"again-{number}.csv"), data, [0.1, 0.1])


def test_fifty_uploads_in_a_burst_lead_to_one_run_each(scene):
    options = {"rest": 0.5, "patience": 0.5, "train": {"profile": "quick"}}
    scene.watch(**options)
    writers = [threading.Thread(target=upload, args=[scene.inbox, number]) for number in range(50)]
    for writer in writers:
        writer.start()
    for way in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
        watcher, twin = scene.watchers[-1], scene.watch(**options)
        time.sleep(1.7)
        watcher.send_signal(way)
        watcher.wait()
        assert twin.poll() is None
    for writer in writers:
        writer.join()
    contents = {digest(content(number)) for number in range(50)}
    until(lambda: scene.idle() and contents <= {d for note in scene.notes() for d in note["digests"]})
    time.sleep(1.5)  # a second upload of the same content would start something now
    until(scene.idle)

    notes, batches = scene.notes(), scene.batches()
    assert [note["torn"] for note in notes] == [[]] * len(notes)
    answered = Counter(event.id for batch in batches for event in batch.events)
    assert set(answered) == contents and set(answered.values()) == {1}
    assert all(batch.events for batch in batches) and len({b.run_id for b in batches}) == len(batches) < 50
    started = Counter(note["run"] for note in notes)
    assert set(started) == {batch.run_id for batch in batches}
    assert sum(started.values()) <= len(batches) + 2, "but for those whose watcher was killed in between"
    seen = {note["run"]: set(note["digests"]) for note in notes}
    for batch in batches:
        assert {event.id for event in batch.events} <= seen[batch.run_id]
        assert seen[batch.run_id] <= contents
    runs = [scene.runs()[batch.run_id] for batch in batches]
    assert {(run.trigger, run.status) for run in runs} == {("annotations-added", "succeeded")}
    assert all(note["kept"] for note in notes)


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
    assert set(scene.runs()[note["run"]].trigger.split(", ")) == {"data-uploaded", "annotations-added"}
    scene.judge(note["run"], "2", "Approved")
    (scene.inbox / "intel.zip").unlink()
    (scene.inbox / "annotations" / "2.csv").write_bytes(content(2))
    until(lambda: len(scene.notes()) == 2)
    assert digest(archive.read_bytes()) in scene.notes()[1]["digests"], "gone from the inbox, and still the base"
    (scene.inbox / "intel.zip").write_bytes(archive.read_bytes()[:-100])
    until(lambda: "intel.zip is not taken" in scene.log())
    assert len(scene.batches()) == 2


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_rejected_archive_does_not_spoil_the_labels_after_it(scene, is_gone):
    "The data of the version that was approved is what they add to, for as long as it takes."
    made = {}
    for name in ("good", "bad"):
        with zipfile.ZipFile(scene.root / f"{name}.zip", "w") as made_zip:
            made_zip.writestr("sea/1.jpg", name.encode() * 1000)
        made[name] = digest((scene.root / f"{name}.zip").read_bytes())
    scene.watch()
    for number, (name, status) in enumerate({"good": "Approved", "bad": "Rejected"}.items(), 2):
        shutil.copy(scene.root / f"{name}.zip", scene.inbox / "intel.zip")
        until(lambda count=number - 1: len(scene.notes()) == count and scene.idle())
        assert made[name] in scene.notes()[-1]["digests"]
        scene.judge(scene.notes()[-1]["run"], str(number), status)
    if is_gone:
        (scene.inbox / "intel.zip").unlink()
    for number in range(KEEP + 2):
        (scene.inbox / "annotations" / f"{number}.csv").write_bytes(content(number))
        until(lambda count=number + 3: len(scene.notes()) == count and scene.idle())
        assert made["good"] in scene.notes()[-1]["digests"] and made["bad"] not in scene.notes()[-1]["digests"]


def test_a_command_that_crashes_ends_no_watcher(scene):
    crash = "import os, signal; print('the last words', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    scene.command = [sys.executable, "-c", crash]
    watcher = scene.watch()
    for number in (1, 2):
        (scene.inbox / "annotations" / f"{number}.csv").write_bytes(content(number))
        until(lambda count=number: len(scene.batches()) == count and scene.idle())
    assert watcher.poll() is None and scene.log().count("ended with -9: the last words") == 2
    assert [scene.runs()[batch.run_id].status for batch in scene.batches()] == ["failed", "failed"]


def test_a_watcher_that_ends_queues_its_run_again(scene):
    scene.command = [sys.executable, "-c", STAND_IN, str(scene.record), "60"]
    watcher = scene.watch(poll=True)
    (scene.inbox / "annotations" / "1.csv").write_bytes(content(1))
    until(scene.batches)
    (batch,) = scene.batches()
    until(lambda: f"run {batch.run_id} for annotations/1.csv" in scene.log())
    watcher.terminate()
    assert watcher.wait(20) == 0 and scene.notes() == []
    assert scene.runs()[batch.run_id].status == "queued"
    scene.command[-1] = "0"
    scene.watch()
    until(scene.idle)
    assert [note["run"] for note in scene.notes()] == [batch.run_id]


def test_an_upload_whose_run_was_removed_is_not_run_again(scene):
    (scene.inbox / "annotations" / "1.csv").write_bytes(content(1))
    scene.watch()
    until(lambda: scene.notes() and scene.idle())
    scene.close()
    (batch,) = scene.batches()
    shutil.rmtree(scene.root / "executed" / batch.run_id)
    scene.watch()
    (scene.inbox / "annotations" / "2.csv").write_bytes(content(2))
    until(lambda: len(scene.notes()) == 2 and scene.idle())
    (batch,) = scene.batches()
    assert [event.key for event in batch.events] == ["annotations/2.csv"]


def test_an_approval_that_was_cut_off_is_followed_again(scene):
    "The watcher and its `approve` were killed at once, so the run's record still says that it is running."
    executed = scene.root / "executed"
    scene.add_run("cut", "run", data={})
    write_run(executed, replace(read_run(executed, "cut"), status="running", model_version="7"))
    workspace = Workspace(scene.root / "workspace", executed, scene.root)
    note = watch_folder(workspace, scene.inbox.resolve()) / "approval.json"
    write_json(note, {"version": "7", "run_id": "cut"})
    scene.watch()
    until(lambda: "approve cut for version 7" in scene.log())
    until(lambda: not note.exists())


def test_a_watcher_that_ends_leaves_all_runs_of_its_approval_waiting(scene):
    "`approve` begins with the oldest run that waits, and its process is named by the newest."
    executed = scene.root / "executed"
    workspace = Workspace(scene.root / "workspace", executed, scene.root)
    for run_id, status in (("older", "interrupted"), ("newer", "waiting")):
        scene.add_run(run_id, "run", data={})
        write_run(executed, replace(read_run(executed, run_id), status=status, model_version="7"))
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    release_run(workspace, RunProcess("newer", executed / "newer", ["approve", "7"], process))
    assert process.poll() is not None
    assert {scene.runs()[run_id].status for run_id in ("older", "newer")} == {"waiting"}


def test_labels_of_a_capture_get_its_images(scene):
    "A person drops an export of Label Studio, without images. A later run still has them when the capture has gone."
    image = b"pixels"
    capture = scene.root / "workspace" / "captures" / "staging" / "2026-01-31T120000Z-00000042"
    kept = capture / "images" / f"{digest(image)}.jpg"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(image)
    scene.watch()
    export = [{"data": {"image": f"images/{kept.name}"}}]
    (scene.inbox / "annotations" / "export.json").write_text(json.dumps(export))
    until(lambda: len(scene.notes()) == 1)
    assert digest(image) in scene.notes()[0]["digests"]
    shutil.rmtree(capture)
    (scene.inbox / "annotations" / "1.csv").write_bytes(content(1))
    until(lambda: len(scene.notes()) == 2 and scene.idle())
    assert {digest(image), digest(content(1))} <= set(scene.notes()[1]["digests"])


def test_labels_add_to_what_an_approved_version_was_made_of(scene):
    "An experiment is no base, and what waits or was rejected is none where a version is approved."
    for run in (scene.root / "executed").iterdir():
        shutil.rmtree(run)
    scene.add_run("promoted", "promote", deploy={"version": "1"})
    scene.add_run("experiment", "run", data={"archive": "/photos/other.zip"})
    scene.watch()
    (scene.inbox / "annotations" / "1.csv").write_bytes(content(1))
    until(lambda: "the labels have no photographs to add to, because no run has a version" in scene.log())
    assert scene.batches() == []
    scene.add_version("2", approval="PendingManualApproval", fingerprint="f2")
    scene.add_version("3", approval="Rejected", fingerprint="f3")
    scene.add_run("built", "run", "1", data={"archive": "/photos/intel.zip", "annotations": ["/photos/by_hand.zip"]})
    for run_id, version in (("waits", "2"), ("rejected", "3"), ("newer-experiment", None)):
        scene.add_run(run_id, "run", version, data={"archive": f"/photos/{run_id}.zip"})
    until(lambda: scene.notes() and scene.idle())
    (batch,) = scene.batches()
    request = json.loads((scene.root / "executed" / batch.run_id / "request.json").read_text())
    data = request["parameters"]["data"]
    assert (data["archive"], data["annotations"][0]) == ("/photos/intel.zip", "/photos/by_hand.zip")
    assert scene.notes()[0]["digests"] == [digest(content(1))]


def test_what_version_0_1_0_has_dealt_with_is_not_started_again(scene):
    "Its orders lie in the watcher's folder: one has ended, one is a run, and one was never started."
    workspace = Workspace(scene.root / "workspace", scene.root / "executed", scene.root)
    orders = watch_folder(workspace, scene.inbox.resolve())
    for number, order_id in enumerate(("ended", "before", "never"), 1):
        (scene.inbox / "annotations" / f"{number}.csv").write_bytes(content(number))
        events = [["annotations-added", f"annotations/{number}.csv", digest(content(number))]]
        order = {"id": order_id, "number": number, "made": utc_now(), "arguments": ["run"], "events": events,
                 "files": {f"annotations/{number}.csv": digest(content(number))}, "marks": {}}
        write_json(orders / order_id / "order.json", order)
    write_json(orders / "ended" / "outcome.json", {"status": 0, "ended": utc_now()})
    scene.watch(patience=0.5)
    until(lambda: scene.notes() and scene.idle())
    (batch,) = scene.batches()
    assert [event.key for event in batch.events] == ["annotations/3.csv"]
    assert set(scene.notes()[0]["digests"]) == {digest(content(number)) for number in (1, 2, 3)}
    assert "trouble" not in scene.log()


@pytest.mark.slow
def test_an_upload_becomes_a_run_and_an_approval_a_live_endpoint(empty):
    inbox = empty.root / "inbox"
    (inbox / "annotations").mkdir(parents=True)
    with open(empty.root / "watch.log", "w") as log:
        watcher = subprocess.Popen([COMMAND, "watch", "inbox", *QUICK], env=empty.environ, cwd=empty.root,
                                   stdout=log, stderr=log)
    try:
        shutil.copy(empty.archive, inbox / "intel.zip")
        unfinished = ("queued", "running", "failed")
        until(lambda: empty("runs", "--json").json and empty.newest()["status"] not in unfinished, 240, 1)
        run = empty.newest()
        assert (run["status"], run["trigger"], run["model_version"]) == ("waiting", "data-uploaded", "1")
        until(lambda: "is waiting" in (empty.root / "watch.log").read_text(), 60, 0.5)  # the decision has a reason too
        from intel_nb.registry import open_registry
        registry = open_registry(f"sqlite:///{empty.home / 'mlflow.db'}")
        registry.set_status("1", "Approved", "by another way than the command")
        until(lambda: empty.newest()["status"] == "succeeded", 240, 1)
        assert len(empty("runs", "--json").json) == 1
        (endpoint,) = empty("endpoints", "--json").json
        assert (endpoint["stage"], endpoint["version"], endpoint["status"]) == ("staging", "1", "running")
        watcher.terminate()
        assert watcher.wait(30) == 0
    finally:
        watcher.kill()
    log = (empty.root / "watch.log").read_text()
    assert "is waiting, version 1: accuracy " in log and "; no champion yet; intel-nb approve 1" in log
    assert "trouble" not in log
    assert f"approve {run['run_id']} for version 1" in log
