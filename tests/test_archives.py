"""Archives as people have them: what each folder is taken for, what is left out, and what is refused."""
import csv
import hashlib
import io
import os
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from intel_nb.data import Settings, assign_splits, build_dataset
from intel_nb.images import encode_jpeg
from intel_nb.labels.checking import CHECKED
from intel_nb.labels.naming import Named
from intel_nb.labels.summary import summary_lines
from intel_nb.storage import InputError

rng = np.random.default_rng(0)


def image(side: int = 24) -> bytes:
    "Return a JPEG of noise: no two are alike."
    return encode_jpeg(rng.integers(0, 255, (side, side, 3), np.uint8))


def images(*folders: str, classes: tuple[str, ...] = ("cat", "dog"), n: int = 12) -> dict[str, bytes]:
    "Return `n` images of each class in each folder, which ends with a slash or is empty."
    return {f"{folder}{name}/{k}.jpg": image() for folder in folders for name in classes for k in range(n)}


def pack(path: Path, files: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as made:
        for name, data in files.items():
            made.writestr(name, data)
    return path


@pytest.fixture
def build(tmp_path):
    "A function that builds the dataset of some files, and returns its report and the rows of its quarantine."
    def built(files: dict | Path, **settings):
        source = files if isinstance(files, Path) else pack(tmp_path / "data.zip", files)
        report = build_dataset(source, tmp_path / "out", **settings)
        with open(tmp_path / "out" / "quarantine.csv", newline="") as rows:
            left = {row["path"]: row["reason"] for row in csv.DictReader(rows)}
        archived = sum(pq.read_table(shard, columns=["source"])["source"].to_pylist().count("archive")
                       for shard in (tmp_path / "out" / "dataset").glob("*.parquet"))
        beside = ("outside", "broken_link", "link_loop", "archive", "too_deep")
        links = sum(report["left_out"].get(reason, 0) for reason in beside)
        assert archived + sum(report["left_out"].values()) - links == report["files"], "a file vanished"
        return report, left
    return built


def totals(report: dict) -> dict[str, int]:
    return {split: sum(counts.values()) for split, counts in report["counts"].items()}


@pytest.mark.parametrize("train, test", [
    ("Training/", "Testing/"), ("TRAIN/", "TEST/"), ("training_set/", "test_set/"),
    ("seg_train/seg_train/", "seg_test/seg_test/"),
    ("trn/", "tst/"), ("set/Train/", "set/Test/"), ("Training Set/", "Test Set/"),
    ("photos/2024/train/", "photos/2024/test/")])
def test_a_test_split_of_any_name(build, train, test):
    files = images(train) | images(test, n=6)
    report, _ = build(files)
    assert totals(report)["test"] == 12
    assert {row["taken_for"].split(",")[0] for row in report["understood"]} == {"train", "test"}
    assert f"{test.strip('/')} → test" in "\n".join(summary_lines(report))


@pytest.mark.parametrize("name", ["val", "valid", "Validation", "dev", "seg_val"])
def test_a_validation_split_that_people_made(build, name):
    files = images("train/") | images(f"{name}/", n=3) | images("test/", n=4)
    assert totals(build(files)[0]) == {"train": 24, "validation": 6, "test": 8}


def test_validation_without_test(build):
    report, _ = build(images("train/", n=20) | images("valid/", n=5))
    assert totals(report)["validation"] == 10 and totals(report)["test"] >= 2


@pytest.mark.parametrize("folders, named", [
    (("batch_a/", "batch_b/"), ("batch_a", "batch_b")), (("2023/a/", "2023/b/"), ("a", "b")),
    (("train/", "extra/"), ("extra", "train")), (("day/", "night/", "dusk/"), ("day", "night", "dusk"))])
def test_splits_of_unknown_names_are_refused(build, folders, named):
    with pytest.raises(InputError, match="data.parts") as refused:
        build(images(*folders))
    assert all(name in str(refused.value) for name in named)


def test_a_person_says_what_the_folders_are(build):
    files = images("batch_a/") | images("batch_b/", n=6) | images("left/", n=5)
    report, left = build(files, parts={"batch_a": "train", "batch_b": "test", "left": "unlabelled"})
    assert totals(report)["test"] == 12 and report["left_out"] == {"unlabelled": 10}
    with pytest.raises(InputError, match="no such folder"):
        build(files, parts={"batch_c": "train"})
    with pytest.raises(InputError, match="says nothing about"):
        build(files, parts={"batch_a": "train"})


def test_super_classes_are_no_splits(build):
    files = images("pets/") | images("wild/", classes=("wolf", "bear"))
    assert build(files)[0]["classes"] == ["bear", "cat", "dog", "wolf"]


@pytest.mark.parametrize("classes", [("bus", "car", "train"), ("test", "control"), ("val", "dev", "hill")])
@pytest.mark.parametrize("split", [True, False])
def test_a_class_may_have_the_name_of_a_split(build, classes, split):
    parts = ("train/", "test/") if split else ("",)
    files = images(*parts, classes=classes)
    report, left = build(files)
    assert report["classes"] == sorted(classes) and not left


def test_only_names_of_splits(build):
    flat = {f"{part}/{k}.jpg": image() for part in ("train", "test") for k in range(9)}
    with pytest.raises(InputError, match="no class was found"):
        build(flat)
    assert build(flat, parts={"train": "class", "test": "class"})[0]["classes"] == ["test", "train"]
    table = "name,label\n" + "".join(f"{path},{'sun' if k % 2 else 'rain'}\n" for k, path in enumerate(flat))
    assert totals(build(flat | {"labels.csv": table})[0])["test"] == 9


@pytest.mark.parametrize("stray, reason", [
    ("cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "hidden"), ("cat/.thumbnails/1.jpg", "hidden"),
    ("#recycle/cat/1.jpg", "hidden"),
    ("$RECYCLE.BIN/1.jpg", "hidden"), ("cat/thumbs/1.jpg", "off_depth"), ("backup/cat/1.jpg", "off_depth"),
    ("cover.jpg", "no_class_folder"), ("notes/readme.txt", "other_file"), ("cat/notes.txt", "unsupported_format")])
def test_what_lies_beside_the_classes(build, stray, reason):
    report, left = build(images("") | {stray: image() if stray.endswith("jpg") else b"hello"})
    assert report["classes"] == ["cat", "dog"] and left == {stray: reason}


def test_as_many_thumbnails_as_images(build):
    report, left = build(images("") | images("", classes=("cat/thumbs", "dog/thumbs")))
    assert report["classes"] == ["cat", "dog"] and set(left.values()) == {"off_depth"}


def test_classes_of_different_depth_are_refused(build):
    with pytest.raises(InputError, match="lie at different depths"):
        build(images("") | images("", classes=("bird/owl", "bird/crow")))


@pytest.mark.parametrize("written, label", [("fore\u0302t", "forêt"), (" mer ", "mer"), ("e\u0301te\u0301", "été")])
def test_one_class_however_it_is_written(build, tmp_path, written, label):
    files = images("train/", classes=(written, "hill")) | images("test/", classes=(label, "hill"), n=4)
    labels = pack(tmp_path / "labels.zip", {"a.jpg": image(), "l.csv": f"image,label\na.jpg,{label}\n".encode()})
    report, _ = build(files, annotations=[labels], classes=[written, "hill"])
    assert report["classes"] == sorted([label, "hill"])
    assert report["counts"]["test"][label] == 4 and report["annotations"]["added"] == 1


def test_names_that_differ_by_case_are_reported(build):
    assert any("differ by case alone" in note for note in build(images("", classes=("Cat", "cat", "dog")))[0]["notes"])


class Unmarked(zipfile.ZipInfo):
    "An entry whose name is written as it is, without the mark of UTF-8."
    def _encodeFilenameFlags(self):  # noqa: N802
        return self.raw, 0


def unmarked(path: Path, names: dict[str, str]) -> Path:
    "Write a zip with the class names `names`, each in an encoding, as old tools do: without the mark of UTF-8."
    with zipfile.ZipFile(path, "w") as made:
        for name, encoding in names.items():
            for k in range(12):
                entry = Unmarked(f"{len(made.filelist)}")
                entry.raw = f"{name}/{k}.jpg".encode(encoding)
                made.writestr(entry, image())
    return path


@pytest.mark.parametrize("names, encoding", [(("été", "hiver"), "cp437"), (("森林", "海辺"), "cp932"),
                                             (("лес", "море"), "cp866")])
def test_names_without_an_encoding(build, tmp_path, names, encoding):
    source = unmarked(tmp_path / "old.zip", dict.fromkeys(names, encoding))
    with pytest.raises(InputError, match=f"encoding={encoding} reads '{names[0]}"):
        build(source)
    assert build(source, encoding=encoding)[0]["classes"] == sorted(names)
    utf8 = unmarked(tmp_path / "utf8.zip", dict.fromkeys(names, "utf-8"))
    assert build(utf8)[0]["classes"] == sorted(names)


def test_a_colon_is_no_drive(build):
    assert len(build(images("", classes=("2024-05-01 10:22", "a: b c", "10:00")[::2]))[0]["classes"]) == 2
    for evil in ("C:/cat/1.jpg", "../cat/1.jpg", "/cat/1.jpg", "cat/../../1.jpg", "..\\cat\\1.jpg"):
        with pytest.raises(InputError, match="leads out of the zip"):
            build(images("") | {evil: image()})


def test_links_in_a_folder(build, tmp_path):
    folder = tmp_path / "data"
    for name, data in images("", n=10).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / ".store").mkdir()
    (folder / ".store" / "ab12").write_bytes(image())
    (tmp_path / "secret.jpg").write_bytes(image())
    (folder / "cat" / "in.jpg").symlink_to("../.store/ab12")
    (folder / "cat" / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "cat" / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "cat" / "loop").symlink_to("..")
    (folder / "cat" / "self.jpg").symlink_to("self.jpg")
    report, left = build(folder)
    assert sum(totals(report).values()) == 21
    assert left == {".store/ab12": "hidden", "cat/out.jpg": "outside", "cat/gone.jpg": "broken_link",
                    "cat/loop": "link_loop", "cat/self.jpg": "broken_link"}


def test_a_class_that_is_a_link(build, tmp_path):
    for name, data in images("", classes=("cat", ".pool/dog")).items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(data)
    (tmp_path / "data" / "dog").symlink_to(".pool/dog")
    assert build(tmp_path / "data")[0]["classes"] == ["cat", "dog"]


@pytest.mark.parametrize("target, reason", [
    ("../dog/1.jpg", ""), ("/etc/passwd", "outside"), ("../../x.jpg", "outside"), ("gone.jpg", "broken_link")])
def test_links_in_a_zip(build, target, reason):
    link = zipfile.ZipInfo("cat/link.jpg")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    _, left = build(images("") | {link: target})
    assert left.get("cat/link.jpg") == (reason or "contradictory")


def test_a_password(build, tmp_path):
    data = bytearray(pack(tmp_path / "locked.zip", images("")).read_bytes())
    at = data.find(b"PK\1\2")
    data[at + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(data)
    with pytest.raises(InputError, match="need a password"):
        build(tmp_path / "locked.zip")


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_an_archive_in_an_archive(build, kind):
    def inner(files: dict[str, bytes]) -> bytes:
        out = io.BytesIO()
        if kind == "zip":
            with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
                for name, data in files.items():
                    made.writestr(name, data)
        else:
            with tarfile.open(fileobj=out, mode="w:gz" if kind == "tar.gz" else "w") as made:
                for name, data in files.items():
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    made.addfile(entry, io.BytesIO(data))
        return out.getvalue()

    tested = inner(images("", n=5) | {"deep.zip": b"PK"})
    report, left = build({f"train.{kind}": inner(images("")), f"test.{kind}": tested})
    assert totals(report)["test"] == 10 and left == {"test/deep.zip": "archive"}


def test_a_tarball(build, tmp_path):
    with tarfile.open(tmp_path / "data.tgz", "w:gz") as made:
        for name, data in images("data/").items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            made.addfile(entry, io.BytesIO(data))
    assert build(tmp_path / "data.tgz")[0]["classes"] == ["cat", "dog"]
    (tmp_path / "data.tgz").write_bytes((tmp_path / "data.tgz").read_bytes()[:2000])
    with pytest.raises(InputError, match="no tar, or one that was cut short"):
        build(tmp_path / "data.tgz")


@pytest.mark.parametrize("start, name", [
    (b"7z\xbc\xaf\x27\x1c", "7-Zip"), (b"Rar!\x1a\x07", "RAR"), (b"\xfd7zXZ\0", "xz"), (b"%PDF-1.7", "PDF"),
    (b"\xff\xd8\xff\xe0", "a single image")])
def test_what_is_no_archive_is_named(build, tmp_path, start, name):
    (tmp_path / "data.zip").write_bytes(start + bytes(600))
    with pytest.raises(InputError, match=f"{name}.*give a folder, a zip, or a tar"):
        build(tmp_path / "data.zip")


def test_what_was_found_instead_of_images(build):
    with pytest.raises(InputError, match=r"no class was found among 3 files \(2 with .jpg, 1 with .txt\)"):
        build({"1.jpg": image(), "2.jpg": image(), "a.txt": b""})
    scans = {f"{name}/{k}.dcm": b"DICM" for name in ("a", "b") for k in range(3)}
    with pytest.raises(InputError, match=r"no image was found among 6 files \(6 unsupported_format\)"):
        build(scans)


FLAT = {
    "image and label": ("images/", "labels.csv", "image,label"),
    "image_name": ("", "train.csv", "image_name,label"),
    "Hugging Face": ("train/", "train/metadata.csv", "file_name,label"),
    "semicolons": ("", "l.csv", "image;label"),
    "other columns": ("images/", "data.csv", "photographer,file,label"),
    "no suffix": ("train/", "labels.csv", "id,breed")}


@pytest.mark.parametrize("kind", FLAT)
def test_a_flat_folder_with_a_table(build, kind):
    folder, table, header = FLAT[kind]
    mark = ";" if ";" in header else ","
    lines = [header]
    files = {f"{folder}{k}.jpg": image() for k in range(24)}
    for k in range(24):
        name = str(k) if kind == "no suffix" else f"{k}.jpg"
        cells = ["ann", name] if kind == "other columns" else [name]
        lines.append(mark.join([*cells, "sun" if k % 2 else "rain"]))
    report, left = build(files | {table: "\n".join(lines)} | {f"{folder}extra.jpg": image()})
    assert report["classes"] == ["rain", "sun"] and sum(totals(report).values()) == 24
    assert left == {table: "other_file", f"{folder}extra.jpg": "unlabelled"}


def test_a_table_that_leaves_a_doubt(build):
    files = {f"{k}.jpg": image() for k in range(24)}
    rows = [f"ann,{k}.jpg,{'sun' if k % 2 else 'rain'}" for k in range(24)]
    files["data.csv"] = "\n".join(["who,file,weather", *rows])
    with pytest.raises(InputError, match="data.csv: its fields .who, weather. do not tell .* label_field"):
        build(files)
    assert build(files, label_field="weather")[0]["classes"] == ["rain", "sun"]


def test_a_table_of_splits_and_one_that_is_made_up(build):
    files = {f"images/{k}.jpg": image() for k in range(40)}
    rows = [f"{k}.jpg,{'sun' if k % 2 else 'rain'},{'Train' if k < 30 else 'Test'}" for k in range(40)]
    report, _ = build(files | {"all.csv": "\n".join(["image,label,split", *rows])})
    assert totals(report)["test"] == 10
    made_up = "\n".join(["image,label", *(f"{k}.jpg,sun" for k in range(30, 40))])
    known = "\n".join(["image,label", *(f"{k}.jpg,{'sun' if k % 2 else 'rain'}" for k in range(30))])
    report, _ = build(files | {"train.csv": known, "sample_submission.csv": made_up})
    assert sum(totals(report).values()) == 30 and report["left_out"]["unlabelled"] == 10


def test_a_table_decides_where_folders_do_not(build):
    files = {f"{folder}/images/{k}.jpg": image() for folder in ("a", "b") for k in range(20)}
    with pytest.raises(InputError, match="a and b: they hold the same class 'images'"):
        build(files)
    rows = [f"{path},{'sun' if k % 2 else 'rain'}" for k, path in enumerate(files)]
    assert build(files | {"labels.csv": "\n".join(["path,label", *rows])})[0]["classes"] == ["rain", "sun"]


def test_unlabelled_parts_stay_out(build):
    report, _ = build(images("seg_train/seg_train/") | {f"seg_pred/seg_pred/{k}.jpg": image() for k in range(70)})
    assert report["unlabelled"] == 70 and report["classes"] == ["cat", "dog"]
    report, _ = build(images("train/") | {f"test/{k}.jpg": image() for k in range(70)})
    assert report["unlabelled"] == 70


@pytest.mark.parametrize("classes, count", [(6, 4), (100, 5)])
def test_no_seed_refuses_what_another_accepts(build, classes, count):
    files = images("", classes=tuple(f"c{k:02}" for k in range(classes)), n=count)
    for seed in range(20 if classes == 6 else 3):  # the notebook tries all of them on names alone
        report, _ = build(files, seed=seed)
        assert all(n > 0 for counts in report["counts"].values() for n in counts.values())


def test_near_duplicates_stay_on_one_side(build, tmp_path):
    photo = np.kron(rng.integers(0, 255, (12, 12, 3), np.uint8), np.ones((12, 12, 1), np.uint8))
    again = [encode_jpeg(photo, quality) for quality in (95, 90, 85, 80)]
    both = {"test/cat/x.jpg": again[0], "train/cat/y.jpg": again[1]}
    report, left = build(images("train/") | images("test/") | both)
    assert left == {"train/cat/y.jpg": "near_duplicate"} and totals(report)["test"] == 25
    report, left = build(images("", n=20) | {f"cat/again{k}.jpg": data for k, data in enumerate(again)})
    assert not left
    index = (tmp_path / "out" / "index.csv").read_text().splitlines()
    assert len({row["split"] for row in csv.DictReader(index) if "again" in row["path"]}) == 1


def lie(path: Path, files: dict[str, bytes], size: int, method: int = zipfile.ZIP_DEFLATED) -> Path:
    "Write a zip that declares `size` bytes for each file."
    with zipfile.ZipFile(path, "w", method) as made:
        for name, data in files.items():
            made.writestr(name, data)
    data = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        at = data.find(mark)
        while at >= 0:
            struct.pack_into("<L", data, at + offset, size)
            at = data.find(mark, at + 4)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("method, reason", [(zipfile.ZIP_DEFLATED, "unreadable"), (zipfile.ZIP_BZIP2, "unreadable"),
                                            (zipfile.ZIP_LZMA, "unreadable")])
def test_a_zip_that_lies(build, tmp_path, method, reason):
    bomb = lie(tmp_path / "bomb.zip", {"cat/bomb.jpg": bytes(10**7)}, 1000, method)
    with zipfile.ZipFile(bomb, "a") as made:
        for name, data in images("").items():
            made.writestr(name, data)
    _, left = build(bomb)
    assert left == {"cat/bomb.jpg": reason}


def test_a_zip_whose_files_overlap(build, tmp_path):
    data = pack(tmp_path / "data.zip", images("")).read_bytes()
    second = data.find(b"PK\1\2", data.find(b"PK\1\2") + 4)
    (tmp_path / "data.zip").write_bytes(data[:second + 42] + bytes(4) + data[second + 46:])
    with pytest.raises(InputError, match="overlap one another"):
        build(tmp_path / "data.zip")


@pytest.mark.parametrize("names", [("train_images", "test_images"), ("train", "test1"), ("Train_Set", "Test_Set")])
def test_flat_splits_are_no_classes(build, names):
    flat = {f"{names[0]}/{k}.jpg": image() for k in range(20)} | {f"{names[1]}/{k + 20}.jpg": image() for k in range(5)}
    with pytest.raises(InputError, match="no class was found"):
        build(flat)
    rows = [f"{k},{'sun' if k % 2 else 'rain'}" for k in range(20)]
    report, _ = build(flat | {"train.csv": "\n".join(["image_id,label", *rows])})
    assert report["classes"] == ["rain", "sun"] and report["unlabelled"] == 5


def test_a_table_and_folders_that_say_different_things(build):
    files = {f"part_{1 + k // 20}/{k}.jpg": image() for k in range(40)}
    table = "\n".join(["image,label", *(f"{k}.jpg,{'sun' if k % 2 else 'rain'}" for k in range(40))])
    with pytest.raises(InputError, match="data.label_field"):
        build(files | {"meta.csv": table})
    assert build(files | {"meta.csv": table}, label_field="label")[0]["classes"] == ["rain", "sun"]


@pytest.mark.parametrize("values", [("Training", "PublicTest"), ("0", "1"), ("train", "")])
def test_a_split_column_that_is_not_understood(build, values):
    files = {f"{k}.jpg": image() for k in range(40)}
    rows = [f"{k}.jpg,{'sun' if k % 2 else 'rain'},{values[k >= 30]}" for k in range(40)]
    with pytest.raises(InputError, match="its column Usage has the value"):
        build(files | {"all.csv": "\n".join(["image,label,Usage", *rows])})


def test_one_image_in_two_splits_of_a_table(build):
    files = {f"{k}.jpg": image() for k in range(40)}
    rows = "\n".join(["image,label", *(f"{k}.jpg,{'sun' if k % 2 else 'rain'}" for k in range(40))])
    with pytest.raises(InputError, match="another row says otherwise"):
        build(files | {"train.csv": rows, "test.csv": rows})


@pytest.mark.parametrize("test", ["test/images/", "test/new/", "other/test/"])
def test_a_test_split_of_another_depth(build, test):
    with pytest.raises(InputError, match="different depths|lie beside one another"):
        build(images("train/") | images(test, n=4))


@pytest.mark.parametrize("suffix", ["nef", "jpg_large", "heic"])
def test_a_class_without_usable_images_does_not_vanish(build, suffix):
    with pytest.raises(InputError, match="class owl has 0 of the 2 images"):
        build(images("") | {f"owl/{k}.{suffix}": b"raw" for k in range(5)})


def test_near_duplicates_by_the_dozen_are_a_persons_decision(build):
    photo = np.kron(rng.integers(0, 255, (12, 12, 3), np.uint8), np.ones((12, 12, 1), np.uint8))
    alike = [encode_jpeg(photo, quality) for quality in range(40, 90)]
    files = images("train/") | images("test/") | {"test/cat/x.jpg": alike[0]}
    files |= {f"train/cat/a{k}.jpg": data for k, data in enumerate(alike[1:])}
    with pytest.raises(InputError, match="near_duplicates=drop"):
        build(files)
    assert build(files, near_duplicates="drop")[0]["left_out"] == {"near_duplicate": 49}
    assert build(files, near_duplicates="keep")[0]["left_out"] == {}


def tar_of(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as made:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            made.addfile(entry, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize("damage", ["a flipped bit", "cut between files", "two tars", "a long name"])
def test_a_tar_that_ends_too_early(build, tmp_path, damage):
    data = bytearray(tar_of(images("")))
    middle = data.find(b"dog/0.jpg")
    if damage == "a flipped bit":
        data[middle + 150] ^= 1
    elif damage == "a long name":
        header = tarfile.TarInfo("././@LongLink")
        header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2**22
        data[:0] = header.tobuf() + b"a" * 2**22
    else:
        data = data[:middle] if damage == "cut between files" else data + data
    (tmp_path / "data.tar").write_bytes(data)
    with pytest.raises(InputError, match="no tar, or one that was cut short"):
        build(tmp_path / "data.tar")


def test_a_zip_with_a_wrong_count(build, tmp_path):
    data = bytearray(pack(tmp_path / "data.zip", images("")).read_bytes())
    at = data.rfind(b"PK\5\6")
    struct.pack_into("<HH", data, at + 8, 16, 16)
    (tmp_path / "data.zip").write_bytes(data)
    with pytest.raises(InputError, match="should have 16"):
        build(tmp_path / "data.zip")


def test_a_zip_that_was_cut_behind_one_in_it(build, tmp_path):
    whole = pack(tmp_path / "data.zip", images("") | {"inner.zip": pack(tmp_path / "in.zip", images("")).read_bytes()})
    data = whole.read_bytes()
    whole.write_bytes(data[:data.rfind(b"PK\5\6") - 900])
    with pytest.raises(InputError, match="cut"):
        build(whole)


def test_both_forms_of_a_name_on_one_disk(build, tmp_path):
    for name in ("fore\u0302t", "for\u00eat", "mer"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for k in range(12):
            (tmp_path / "data" / name / f"{k}.jpg").write_bytes(image())
    report, left = build(tmp_path / "data")
    assert sum(totals(report).values()) == 36 and report["classes"] == ["forêt", "mer"] and not left


@pytest.mark.parametrize("name", [b"caf\xe9", b"red\x1b[31m", b"two\nlines"])
def test_names_that_cannot_be_printed_are_refused(build, tmp_path, name):
    for folder in (name, b"mer"):
        (made := tmp_path / "data" / os.fsdecode(folder)).mkdir(parents=True)
        for k in range(12):
            (made / f"{k}.jpg").write_bytes(image())
    with pytest.raises(InputError, match="cannot be printed"):
        build(tmp_path / "data")


def test_folders_without_end(build, tmp_path):
    deep = tmp_path / "data" / "cat"
    for _ in range(200):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "1.jpg").write_bytes(image())
    for name, data in images("").items():
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_bytes(data)
    assert set(build(tmp_path / "data")[1].values()) == {"too_deep"}


@pytest.mark.parametrize("classes, count", [(6, 4), (100, 5), pytest.param(1000, 8, marks=pytest.mark.slow)])
def test_twenty_seeds(classes, count):
    total = classes * count
    rows = np.zeros(total, CHECKED)
    rows["sha256"] = sorted(hashlib.sha256(str(k).encode()).digest() for k in range(total))
    rows["number"] = rng.permutation(total)
    label = (np.arange(total) // count).astype(np.int32)
    named = Named(np.zeros(total, np.int8), label, [f"c{k:04}" for k in range(classes)], [], [])
    for seed in range(20):
        split = assign_splits(rows, np.arange(total), named, Settings(seed=seed)).split
        counts = np.zeros((3, classes), int)
        np.add.at(counts, (split, label[rows["number"]]), 1)
        assert (counts > 0).all()
