"""A version goes from one workspace to another: what is carried over, what is refused, and what waits for a person."""

import gzip
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from conftest import COMMAND, House

from intel_nb.model import MAX_TEXT_BYTES, load_package, pack, write_manifest
from intel_nb.scenes import sample_jpeg
from intel_nb.storage import sha256_file


@pytest.fixture
def packed(sample_model, tmp_path) -> Path:
    return pack(sample_model, tmp_path / "model.tar.gz")


@pytest.fixture
def other(tmp_path_factory, archive, empty_database):
    "Another workspace, without versions. Its endpoints end with the test."
    root = tmp_path_factory.mktemp("other")
    (root / "workspace").mkdir()
    shutil.copyfile(empty_database, root / "workspace" / "mlflow.db")
    house = House(root, archive)
    yield house
    house("stop")


def test_from_one_workspace_to_production_in_another(staged_once, other, tmp_path):
    "The package is the same to the last byte, its answers are the same, and a person decides about it again."
    written = staged_once("export", "1", "--output", str(tmp_path))
    package, evaluation = tmp_path / "model-1.tar.gz", tmp_path / "model-1.evaluation.json"
    assert written.status == 0 and f"import {package} --evaluation {evaluation}" in written.out
    assert staged_once("export", "1", "--output", str(tmp_path / "again.tar.gz")).status == 0
    assert package.read_bytes() == (tmp_path / "again.tar.gz").read_bytes()
    refused = staged_once("export", "1", "--output", str(tmp_path))
    assert refused.status == 2 and "exists already; --overwrite replaces it" in refused.err

    imported = other("import", str(package), "--evaluation", str(evaluation))
    assert imported.status == 0 and "intel-nb approve 1" in imported.out
    (here,), (there,) = staged_once("models", "--json").json, other("models", "--json").json
    assert (there["status"], there["aliases"], there["run_id"]) == ("PendingManualApproval", [], "")
    assert [there[name] for name in ("accuracy", "images")] == [here[name] for name in ("accuracy", "images")]
    assert "imported from model-1.tar.gz" in there["reason"] and there["imported"] == "model-1.tar.gz"
    fingerprints = {load_package(house.home / "artifacts" / path).fingerprint for house in (staged_once, other)
                    for path in house.home.glob("artifacts/*/artifacts/package")}
    assert len(fingerprints) == 1
    again = other("import", str(package))
    assert again.status == 0 and "is version 1 already, PendingManualApproval" in again.out
    assert len(other("models", "--json").json) == 1

    assert other("promote", "1").status == 1, "nobody approved it here"
    approved = other("approve", "1")
    assert approved.status == 0 and "measured elsewhere" in approved.out, approved
    assert other.statuses() == {"deploy": "succeeded", "staging": "succeeded"}
    image = tmp_path / "sea.jpg"
    image.write_bytes(sample_jpeg(4, [0]))
    (ours,), (theirs,) = (house("predict", str(image), "--json").json for house in (staged_once, other))
    assert ours == theirs
    assert other("promote", "1").status == 0
    assert other("models", "--json").json[0]["aliases"] == ["production", "staging"]
    trace = other("trace", "1").out
    assert "imported from model-1.tar.gz" in trace and "no run of this workspace made it" in trace


@pytest.mark.slow
def test_without_an_evaluation_the_accuracy_is_unknown(packed, other):
    assert other("import", str(packed)).status == 0
    (version,) = json.loads(other("models", "--json").out, parse_constant=pytest.fail)
    assert (version["accuracy"], version["images"], version["interval"]) == (None, None, None)
    assert "it came without an evaluation" in version["reason"]
    assert json.loads(other("trace", "1", "--json").out, parse_constant=pytest.fail)["accuracy"] is None
    assert "unknown" in other("models").out
    approved = other("approve", "1")
    assert approved.status == 0 and "accuracy unknown, Approved" in approved.out, approved


def test_what_was_rejected_stays_rejected(packed, other):
    assert other("import", str(packed)).status == 0
    assert other("reject", "1", "--reason", "too slow").status == 0
    answer = other("import", str(packed))
    assert answer.status == 1 and "is version 1, which is rejected (too slow) and stays so" in answer.err
    assert [v["status"] for v in other("models", "--json").json] == ["Rejected"]


@pytest.mark.slow
def test_two_imports_at_once_register_one_version(packed, other):
    commands = [subprocess.Popen([COMMAND, "import", packed], env=other.environ, stdout=subprocess.PIPE, text=True)
                for _ in range(3)]
    assert sorted("already" in command.communicate(timeout=120)[0] for command in commands) == [False, True, True]
    assert len(other("models", "--json").json) == 1


def member(name: str, data: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def repack(path: Path, change) -> None:
    "Write the archive again with the members that `change` makes of a list of its members and their contents."
    with tarfile.open(path) as archive:
        members = [(info, archive.extractfile(info).read()) for info in archive]
    with tarfile.open(path, "w:gz") as archive:
        for info, data in change(members):
            archive.addfile(info, io.BytesIO(data))


def flipped(name: str):
    "Flip a bit in the middle of a file."
    def change(members):
        for info, data in members:
            middle = len(data) // 2
            yield info, data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:] if info.name == name else data
    return change


TAMPERED = {
    "a flipped bit in the model": (flipped("model.onnx"), "is not the file that the manifest lists"),
    "a flipped bit in the labels": (flipped("labels.json"), "is not the file that the manifest lists"),
    "a file too many": (lambda members: [*members, member("evil.py", b"x")], "holds 'evil.py', which no package holds"),
    "a path out of the folder": (lambda members: [*members, member("../../card.md", b"x")], "'../../card.md'"),
    "an absolute path": (lambda members: [*members, member("/tmp/card.md", b"x")], "'/tmp/card.md'"),
    "a link": (lambda members: [*members[1:], member(members[0][0].name, type=tarfile.SYMTYPE, linkname="/etc/passwd")],
               "which no package holds"),
    "a file twice": (lambda members: [*members, members[0]], "which no package holds"),
    "a huge text": (lambda members: [*members, member("manifest.sig", bytes(MAX_TEXT_BYTES + 1))],
                    "'manifest.sig', which no package holds"),
    "a file too few": (lambda members: members[1:], "is not the file that the manifest lists"),
    "no manifest": (lambda members: [m for m in members if m[0].name != "manifest.json"], "has no manifest.json"),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_tampered_archive_is_refused_and_leaves_nothing(how, packed, empty):
    change, message = TAMPERED[how]
    repack(packed, change)
    answer = empty("import", str(packed))
    assert (answer.status, answer.out) == (2, "") and message in answer.err and "Traceback" not in answer.err
    assert not empty.home.exists()


@pytest.mark.parametrize("cut", ["the end", "the middle", "everything"])
def test_a_cut_archive_is_refused(cut, packed, empty):
    whole = packed.read_bytes()
    packed.write_bytes(whole[:{"the end": -5, "the middle": len(whole) // 2, "everything": 0}[cut]])
    answer = empty("import", str(packed))
    assert answer.status == 2 and "cannot be read as a model.tar.gz" in answer.err
    assert not empty.home.exists()


def test_an_archive_that_claims_to_be_huge_is_refused(tmp_path, empty):
    "Its header names more bytes than a package may have. None of them is read."
    info = tarfile.TarInfo("model.onnx")
    info.size = 2**40
    with gzip.open(tmp_path / "huge.tar.gz", "wb") as out:
        out.write(info.tobuf())
    answer = empty("import", str(tmp_path / "huge.tar.gz"))
    assert answer.status == 2 and "'model.onnx', which no package holds" in answer.err


def spoil(model: Path, name: str, data: bytes) -> None:
    "Replace a file of a package, and its digest, as somebody without a key can."
    card = load_package(model).card
    (model / name).write_bytes(data)
    write_manifest(model, card, "data")


WRONG = {
    "no graph": ("model.onnx", b"no graph", "cannot be run here"),
    "other labels": ("labels.json", b'["sea", "street"]', "a probability for each of its 2 classes"),
    "no detector": ("drift.npz", b"no detector", "cannot be run here"),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_package_that_does_not_work_is_refused(how, sample_model, tmp_path, empty):
    "The digests are right, and what they are of is not."
    name, data, message = WRONG[how]
    model = shutil.copytree(sample_model, tmp_path / "model")
    spoil(model, name, data)
    answer = empty("import", str(model))
    assert answer.status == 2 and message in answer.err and "Traceback" not in answer.err
    assert not empty.home.exists()


def test_an_evaluation_of_something_else_is_refused(packed, tmp_path, empty):
    good = {"multiclass_classification_metrics": {"accuracy": {"value": 0.9}},
            "fingerprints": {"package": load_package(packed).fingerprint}}
    for wrong, message in (("{", "is not JSON"), (json.dumps([]), "is no evaluation"),
                           (json.dumps(good | {"images": -1}), "is no evaluation"),
                           (json.dumps(good | {"gate": {"p_value": float("nan")}}), "is no evaluation"),
                           (json.dumps(good | {"fingerprints": {"package": "f" * 64}}), "is of another package")):
        (tmp_path / "evaluation.json").write_text(wrong)
        answer = empty("import", str(packed), "--evaluation", str(tmp_path / "evaluation.json"))
        assert answer.status == 2 and message in answer.err
    assert "none.json does not exist" in empty("import", str(packed), "--evaluation", "none.json").err
    assert not empty.home.exists()


def test_what_is_exported_is_what_was_registered(waiting, tmp_path):
    "Somebody put another package, whole in itself, into the registry's folder."
    (model,) = waiting.home.glob("artifacts/*/artifacts/package")
    write_manifest(model, load_package(model).card | {"profile": "another"}, "other data")
    answer = waiting("export", "1", "--output", str(tmp_path))
    assert answer.status == 2 and "is another one than version 1 was registered with" in answer.err
    assert not list(tmp_path.glob("model-1*"))


def test_an_existing_file_is_replaced_only_when_asked(waiting, tmp_path):
    beside = tmp_path / "m.evaluation.json"
    beside.write_text("mine")
    output = str(tmp_path / "m.tar.gz")
    assert waiting("export", "1", "--output", output).status == 2
    assert beside.read_text() == "mine" and not (tmp_path / "m.tar.gz").exists()
    assert waiting("export", "1", "--output", output, "--overwrite").status == 0
    evaluation = json.loads(beside.read_text())
    assert evaluation["fingerprints"]["package"] == load_package(output).fingerprint
    before = sha256_file(output)
    assert waiting("export", "1", "--output", output, "--overwrite").status == 0 and sha256_file(output) == before
    assert waiting("export", "1", "--output", str(tmp_path / "m.zip")).status == 2
