"""Archives of any size, and small ones that pretend to be large: how much memory and time reading them takes."""
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from many_images import write_archive

MEASURE = """
import json, resource, sys, time
from intel_nb.data import build_dataset
from intel_nb.storage import InputError
start, report, error = time.monotonic(), {}, ""
try:
    report = build_dataset(sys.argv[1], sys.argv[2], scratch=sys.argv[3])
except InputError as e:
    error = str(e)
own, child = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(json.dumps({"seconds": time.monotonic() - start, "MiB": own, "child MiB": child, "error": error,
                  "left_out": report.get("left_out"), "fingerprint": report.get("fingerprint")}))
"""


def start(source: Path, out: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", MEASURE, str(source), str(out), str(out / "scratch")],
                            stdout=subprocess.PIPE, text=True, start_new_session=True)


def measure(source: Path, out: Path) -> dict:
    "Build the dataset of `source` in a process of its own; return seconds, MiB at most, and what became of it."
    process = start(source, out)
    printed, _ = process.communicate(timeout=3000)
    assert process.returncode == 0
    return json.loads(printed)


def patch(data: bytearray, mark: bytes, offset: int, value: int) -> None:
    "Write `value` to the entries of a zip that begin with `mark`."
    at = data.find(mark)
    while at >= 0:
        struct.pack_into("<L", data, at + offset, value)
        at = data.find(mark, at + 4)


def bomb(path: Path, method: int) -> Path:
    "Write a zip of twelve files that declare 1,000 bytes and inflate to a gigabyte each."
    with zipfile.ZipFile(path, "w", method) as made:
        for k in range(12):
            with made.open(f"{'cat' if k % 2 else 'dog'}/{k}.jpg", "w", force_zip64=True) as out:
                for _ in range(64 if method == zipfile.ZIP_LZMA else 1024):
                    out.write(bytes(2**20))
    data = bytearray(path.read_bytes())
    patch(data, b"PK\1\2", 24, 1000)
    path.write_bytes(data)
    return path


def overlapping(path: Path) -> Path:
    "Write a zip in which 1,000 files are one and the same 16 MB."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for k in range(1000):
            made.writestr(f"{'cat' if k % 2 else 'dog'}/{k}.jpg", bytes(2**24) if k == 0 else b"x")
    data = bytearray(path.read_bytes())
    patch(data, b"PK\1\2", 42, 0)
    path.write_bytes(data)
    return path


def many(path: Path, folders: int) -> Path:
    "Write a zip of 100,000 tiny files in so many folders, which claim to be images."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for k in range(100_000):
            made.writestr(f"class{k % folders}/{k}.jpg", b"\xff\xd8\xff no image")
    return path


LIES = {"deflate": lambda p: bomb(p, zipfile.ZIP_DEFLATED), "bzip2": lambda p: bomb(p, zipfile.ZIP_BZIP2),
        "lzma": lambda p: bomb(p, zipfile.ZIP_LZMA), "overlapping": overlapping, "100,000 files": lambda p: many(p, 6),
        "100,000 classes": lambda p: many(p, 100_000)}


@pytest.mark.slow
@pytest.mark.parametrize("lie", LIES)
def test_a_zip_that_lies_costs_next_to_nothing(tmp_path, lie):
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as made:
        made.writestr("cat/1.jpg", b"")
    empty = measure(tmp_path / "empty.zip", tmp_path / "a")
    found = measure(LIES[lie](tmp_path / "lie.zip"), tmp_path / "b")
    print(lie, found, empty)
    assert found["error"]
    assert found["MiB"] <= empty["MiB"] + 100 and found["child MiB"] <= empty["MiB"] + 100
    assert found["seconds"] <= 60


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    "What was checked is not checked again, and the dataset is the same as without the kill."
    archive = write_archive(tmp_path / "many.zip", 5000)
    whole = measure(archive, tmp_path / "whole")
    process = start(archive, tmp_path / "killed")
    chunks = tmp_path / "killed" / "scratch" / "checked"
    while len(list(chunks.glob("*.table"))) < 3:
        assert process.poll() is None
        time.sleep(.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in chunks.glob("*.table")}
    process = start(archive, tmp_path / "killed")
    time.sleep(1)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in done.items() if path.exists())
    assert json.loads(process.communicate(timeout=600)[0])["fingerprint"] == whole["fingerprint"]


@pytest.mark.slow
def test_workers_end_with_their_parent(tmp_path):
    process = start(write_archive(tmp_path / "many.zip", 5000), tmp_path / "out")
    deadline = time.monotonic() + 60
    children = lambda: subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True).stdout.split()
    while len(children()) < 2:
        assert time.monotonic() < deadline
        time.sleep(.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while children():
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(.1)


@pytest.mark.long
def test_memory_and_time_do_not_grow(tmp_path):
    "Ten times as many images take the same memory but for some bytes each, and the same time each."
    small, large = (measure(write_archive(tmp_path / f"{n}.zip", n), tmp_path / f"{n}") for n in (10_000, 100_000))
    print(small, large)
    assert large["MiB"] <= small["MiB"] + 90_000 * 800 / 2**20
    assert large["seconds"] / 10 <= 1.1 * small["seconds"]
