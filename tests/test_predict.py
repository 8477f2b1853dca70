"""`intel-nb predict`: which files it takes, what it prints, and that each of them has a row whatever happens."""

import csv
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from conftest import COMMAND

from intel_nb.images import decode
from intel_nb.model import load_package
from intel_nb.scenes import sample_jpeg
from intel_nb.serving.endpoints import Refused, drift_status, throwaway
from intel_nb.serving.predict import (
    TRIES,
    ImageFile,
    csv_text,
    find_files,
    json_text,
    open_version,
    predict_endpoint,
    predict_package,
)

BROKEN = {"cut.jpg": "cannot be decoded", "empty.png": "there are no bytes", "notes.txt": "not one of JPEG",
          "film.mp4": "at most 16,777,216", "pipe": "is no file", "link.jpg": "does not exist"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    "A folder as people have them: photographs in folders, some broken, and what file managers leave behind."
    folder = tmp_path_factory.mktemp("home") / "photos"
    (folder / "2024" / "@eaDir").mkdir(parents=True)
    for k in range(20):
        (folder / ("2024" if k % 2 else "") / f"{k:02}.jpg").write_bytes(sample_jpeg(k % 6, [7, k]))
    (folder / "2024" / "no suffix").write_bytes(sample_jpeg(3, [8]))
    (folder / "2024" / "@eaDir" / "01.jpg").write_bytes(sample_jpeg(3, [9]))
    for name in (".hidden.jpg", "Thumbs.db", "empty.png"):
        (folder / name).touch()
    (folder / "cut.jpg").write_bytes(sample_jpeg(0, [7])[:-900])
    (folder / "notes.txt").write_text("no image")
    (folder / "link.jpg").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    with open(folder / "film.mp4", "wb") as film:
        film.truncate(17 * 2**20)
    return folder


@pytest.fixture(scope="module")
def url(sample_model):
    with throwaway(sample_model) as url:
        yield url


def command(model: Path, *arguments: str, cwd: Path, **more) -> subprocess.CompletedProcess:
    line = [COMMAND, "predict", "--package", str(model), *arguments]
    return subprocess.run(line, cwd=cwd, capture_output=True, timeout=120, **more)


def paths(*names: str, listed: bytes = b"") -> list[str]:
    return [file.path for file in find_files(names, lambda: listed)]


# Names


def test_a_folder_is_each_file_that_is_not_hidden(photos):
    found = paths(str(photos))
    assert found == sorted(found) and len(found) == 21 + len(BROKEN)
    assert not [name for name in found if "hidden" in name or "Thumbs" in name or "@eaDir" in name]


def test_names_in_the_order_in_which_they_are_given(photos, monkeypatch):
    monkeypatch.chdir(photos.parent)
    shutil.copy("photos/00.jpg", "a[1].jpg")
    assert paths("photos/02.jpg", "none.jpg", "-", "a[1].jpg", listed=b"photos/04.jpg\nphotos/00.jpg\n") == [
        "photos/02.jpg", "none.jpg", "photos/04.jpg", "photos/00.jpg", "a[1].jpg"]
    assert paths("photos/**/1?.jpg") == sorted(f"photos/{'2024/' * (k % 2)}{k}.jpg" for k in range(10, 20))
    assert len(paths("photos/**/*.jpg")) == 22, "without what a network drive keeps"
    assert paths("photos/20*") == paths("photos/2024")
    (photos.parent / "a[1].jpg").unlink()


def test_a_folder_that_cannot_be_read_has_a_row(photos, monkeypatch):
    from intel_nb.serving import predict
    real = os.walk

    def walk(folder, onerror):  # root may read any folder
        onerror(PermissionError(13, "Permission denied", f"{folder}/locked"))
        return real(folder)

    monkeypatch.setattr(predict.os, "walk", walk)
    (locked,) = [file for file in find_files([str(photos)]) if file.error]
    assert locked == ImageFile(f"{photos}/locked", "the folder cannot be read (Permission denied)")


# Rows


@pytest.mark.parametrize("way", ["package", "endpoint"])
def test_a_row_for_each_file(way, photos, package, url):
    files = find_files([str(photos), "none.jpg"])
    rows = list(predict_package(package, files) if way == "package" else predict_endpoint(url, files))
    assert [row["image"] for row in rows] == [file.path for file in files]
    failed = {Path(row["image"]).name: row["error"] for row in rows if "error" in row}
    assert sorted(failed) == sorted([*BROKEN, "none.jpg"])
    assert [name for name in BROKEN if BROKEN[name] not in failed[name]] == []
    good = [row for row in rows if "error" not in row]
    expected = package.predict_bytes([Path(row["image"]).read_bytes() for row in good])["probabilities"]
    for row, probabilities in zip(good, expected, strict=True):
        assert row["label"] == package.labels[probabilities.argmax()]
        assert list(row["probabilities"]) == package.labels
        assert list(row["probabilities"].values()) == pytest.approx(probabilities, abs=1e-4)
        assert row["confidence"] == max(row["probabilities"].values())


def test_the_detector_sees_only_what_is_to_be_observed(photos, url):
    files = find_files([str(photos / "2024")])
    before = drift_status(url)["observations"]
    assert len(list(predict_endpoint(url, files))) == 11
    assert drift_status(url)["observations"] == before
    assert len(list(predict_endpoint(url, files, test=False))) == 11
    assert drift_status(url)["observations"] == before + 11


class Server:
    "An endpoint that gives `answers` (status, headers, document) one after another, and goes on with the last."
    def __init__(self, *answers):
        server, self.asked = self, []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["content-length"]))
                server.asked.append((self.path, dict(self.headers)))
                status, headers, document = answers[min(len(server.asked), len(answers)) - 1]
                body = json.dumps(document).encode()
                self.send_response(status)
                for pair in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(*pair)
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b'"ready"')

            def log_message(self, *arguments):
                "Say nothing."

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()


def refusal(status: int, code: str, **headers: str) -> tuple:
    return status, {"Retry-After": "0", **headers}, {"error": {"code": code, "message": "said the endpoint"}}


GOOD = (200, {}, {"predictions": [{"label": "sea", "confidence": 1.0, "probabilities": {"sea": 1.0}}]})


@pytest.mark.parametrize("answers, asked, outcome", [
    ([refusal(503, "overloaded"), refusal(503, "not_ready"), GOOD], 3, "sea"),
    ([refusal(503, "overloaded")], TRIES, "said the endpoint"),
    ([refusal(503, "failed"), GOOD], 2, "sea"),
    ([refusal(500, "failed")], 2, "said the endpoint"),
    ([refusal(422, "values"), GOOD], 1, "said the endpoint"),
])
def test_an_endpoint_without_room_is_asked_again(answers, asked, outcome, photos):
    with Server(*answers) as server:
        (row,) = predict_endpoint(server.url, find_files([str(photos / "00.jpg")]))
    assert (len(server.asked), outcome in row.get("label", row.get("error"))) == (asked, True)


def test_requests_are_marked_as_a_test_unless_they_are_observed(photos):
    with Server(GOOD) as server:
        for test in True, False:
            list(predict_endpoint(server.url, find_files([str(photos / "00.jpg")]), test))
    marks = [{k.lower(): v for k, v in headers.items()}.get("x-amzn-sagemaker-custom-attributes")
             for _, headers in server.asked]
    assert marks == ["test", None]


def test_another_token_is_asked_for_once(photos):
    with Server(refusal(401, "unauthorized")) as server, pytest.raises(Refused):
        list(predict_endpoint(server.url, find_files([str(photos)])))


def test_what_was_answered_before_the_endpoint_died_stays(photos, sample_model):
    files = find_files([str(photos / "2024")]) * 40
    with throwaway(sample_model) as url:
        rows = predict_endpoint(url, files)
        first = [next(rows) for _ in range(50)]
    rest = list(rows)
    assert all("label" in row for row in first) and len(rest) == len(files) - 50
    assert {row["error"] for row in rest if "error" in row} == {"the endpoint does not answer"}


def test_a_version_is_the_package_that_was_registered(waiting):
    from intel_nb.chain.plan import open_workspace
    from intel_nb.storage import InputError
    registry = open_workspace(waiting.environ).registry()
    assert open_version(registry, "1").fingerprint == registry.get("1").fingerprint
    manifest = registry.package("1") / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(InputError, match="is another one than version 1 was registered with"):
        open_version(registry, "1")


# The command


def test_the_table_of_a_folder_with_broken_files(photos, sample_model):
    done = command(sample_model, "photos", cwd=photos.parent)
    head, *lines = done.stdout.decode().splitlines()
    assert head.split() == ["image", "label", "confidence", "error"] and len(lines) == 21 + len(BROKEN)
    assert done.stderr.decode() == f"error: {len(BROKEN)} of {len(lines)} images have no prediction\n"
    assert done.returncode == 1


def test_the_table_of_good_files_has_no_errors(photos, sample_model):
    names = b"\0".join(b"photos/%02d.jpg" % k for k in (4, 0, 2))
    done = command(sample_model, "-", cwd=photos.parent, input=names)
    head, *lines = done.stdout.decode().splitlines()
    assert head.split() == ["image", "label", "confidence"]
    assert [line.split()[0] for line in lines] == ["photos/04.jpg", "photos/00.jpg", "photos/02.jpg"]
    assert (done.returncode, done.stderr) == (0, b"")


def test_csv_and_json_hold_the_same_rows(photos, sample_model):
    as_csv, as_json = (command(sample_model, "photos", kind, cwd=photos.parent) for kind in ("--csv", "--json"))
    assert as_csv.returncode == as_json.returncode == 1
    documents = json.loads(as_json.stdout)
    rows = list(csv.DictReader(as_csv.stdout.decode().splitlines()))
    for row, document in zip(rows, documents, strict=True):
        assert {name: value for name, value in row.items() if value} == {
            name: str(value) for name, value in document.items() if name != "probabilities"}


def test_any_name_survives(photos, sample_model, tmp_path):
    "In a table as text, in CSV to the byte, and no name is a formula."
    names = [b'a,"b".jpg', b"new\nline.jpg", b"\xff.jpg", b"\x1b[31mred.jpg", b"=1+1.jpg", b"-x.jpg", "ä.jpg".encode(),
             b"z\r=1+1.jpg"]
    for name in names:
        shutil.copy(photos / "00.jpg", os.fsencode(tmp_path) + b"/" + name)
    table = command(sample_model, "*", cwd=tmp_path).stdout
    assert b"\x1b" not in table and len(table.splitlines()) == 1 + len(names)
    raw = command(sample_model, "*", "--csv", cwd=tmp_path).stdout.decode(errors="surrogateescape")
    found = [row["image"] for row in csv.DictReader(raw.splitlines(keepends=True))]
    assert sorted(os.fsencode(Path(name)) for name in found) == sorted(names)
    assert not [name for name in found if name[0] in "=+-@"]
    assert len(json.loads(command(sample_model, "*", "--json", cwd=tmp_path).stdout)) == len(names)


def test_no_row_is_lost_where_the_terminal_lacks_a_character(photos, sample_model, tmp_path):
    for name in ("\uff1dfull.jpg", "\x1bred.jpg"):
        shutil.copy(photos / "00.jpg", tmp_path / name)
    for more in (["--csv"], []):
        done = command(sample_model, ".", *more, cwd=tmp_path, env=os.environ | {"PYTHONIOENCODING": "ascii"})
        assert (done.returncode, done.stderr) == (0, b"") and len(done.stdout.splitlines()) == 3


def test_a_pattern_follows_no_links_in_circles(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(photos / "00.jpg", "sea.jpg")
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(".")
    assert set(paths("**/*.jpg")) >= {"sea.jpg"} and len(paths("**/*.jpg")) <= 3
    assert paths("-", listed=b"\xef\xbb\xbfsea.jpg\r\n") == ["sea.jpg"]


def test_empty_lists():
    assert "".join(json_text([])) == "[]\n" and "".join(csv_text([])) == "image,label,confidence,error\n"


@pytest.mark.parametrize("line, said", {
    "none.jpg": "none.jpg: does not exist; name image files",
    "none.jpg *.gif": "none.jpg: does not exist, and 1 more like it",
    "-": "no image is named",
    "photos --version 1": "--version and --package exclude each other",
    "photos --stage staging": "--package and --stage exclude each other",
    "photos --observe": "--package and --observe exclude each other",
    "photos --csv --json": "--csv and --json exclude each other",
}.items())
def test_wrong_input_is_exit_2(line, said, photos, sample_model):
    done = command(sample_model, *line.split(), cwd=photos.parent, input=b"")
    assert (done.returncode, done.stdout) == (2, b"") and said in done.stderr.decode()


def test_who_reads_no_further_ends_the_command():
    code = ("from itertools import repeat\nfrom intel_nb.cli import print_predictions\n"
            "print_predictions(repeat({'image': 'sea.jpg', 'error': 'no image'}), 10**12, False, True)")
    line = f"{sys.executable} -c \"{code}\" | head -2"
    done = subprocess.run(line, shell=True, capture_output=True, timeout=120, text=True)
    assert len(done.stdout.splitlines()) == 2 and "BrokenPipeError" in done.stderr  # which is exit 0 for a command


def test_the_commands_of_a_workspace(staged_once, photos):
    name = str(photos / "00.jpg")
    by_stage, by_version = (staged_once("predict", name, "--json", *more).json for more in ([], ["--version", "1"]))
    assert by_stage[0]["label"] == by_version[0]["label"]
    assert by_stage[0]["confidence"] == pytest.approx(by_version[0]["confidence"], abs=1e-4)
    assert staged_once("predict", name, "--version", "7").status == 2
    failed = staged_once("predict", name, str(photos / "notes.txt"))
    assert (failed.status, failed.err) == (1, "error: 1 of 2 images have no prediction\n") and "00.jpg" in failed.out


# How fast


def bare_loop(folder: Path, files: list[Path]) -> int:
    "Classify files as anyone would in ten lines, and return how many were broken."
    import onnxruntime
    package = load_package(folder)
    session, broken = onnxruntime.InferenceSession(str(folder / "model.onnx")), 0
    for start in range(0, len(files), 8):
        images = []
        for file in files[start:start + 8]:
            try:
                images.append(decode(file.read_bytes(), package.image_size))
            except ValueError:
                broken += 1
        session.run(["probabilities"], {"images": np.stack(images)})[0].argmax(axis=1)
    return broken


@pytest.mark.slow
def test_two_thousand_files_with_ten_broken_ones(sample_model, package, tmp_path):
    "2,000 rows, the broken ones among them, and none of them moves a detector."
    broken = set(range(100, 2000, 190))
    for k in range(2000):
        (tmp_path / f"{k:04}.jpg").write_bytes(sample_jpeg(k % 6, [11, k % 50])[:400 if k in broken else None])
    files = find_files([str(tmp_path)])
    rows = list(predict_package(package, files))
    assert [row["image"] for row in rows] == [file.path for file in files] and len(broken) == 10
    assert {k for k, row in enumerate(rows) if "error" in row} == broken
    with throwaway(sample_model) as url:
        rows = list(predict_endpoint(url, files))
        assert {k for k, row in enumerate(rows) if "error" in row} == broken and len(rows) == 2000
        assert drift_status(url)["observations"] == 0


@pytest.mark.slow
def test_no_slower_than_a_bare_loop(waiting_once, tmp_path):
    """At least 0.9 of the bare loop's rate: the median of pairs that are measured side by side.

    The network is a real one. One that costs nothing would compare the threads' overhead with Pillow alone."""
    (model,) = waiting_once.home.glob("store/train/*/model")
    for k in range(400):
        (tmp_path / f"{k:03}.jpg").write_bytes(sample_jpeg(k % 6, [11, k % 50]))
    files, ratios, loaded = find_files([str(tmp_path)]), [], load_package(model)
    for _ in range(5):
        start = time.perf_counter()
        assert len(list(predict_package(loaded, files))) == 400
        between = time.perf_counter()
        assert bare_loop(model, [Path(file.path) for file in files]) == 0
        ratios.append((time.perf_counter() - between) / (between - start))
    print(*(f"{ratio:.2f}" for ratio in ratios))
    assert median(ratios) >= 0.9, ratios

