"""Exports as tools write them and folders as people keep them: what is used, what is refused, and why."""
import json
import unicodedata
from pathlib import Path

import pytest

from intel_nb.labels.lookup import read_annotations

CLASSES = ("cat", "dog", "for\u00eat")


def choose(label: object, control: str = "choice") -> list[dict]:
    return [{"id": "Dx_aB91ISN", "type": "choices", "from_name": control, "to_name": "image", "origin": "manual",
             "value": {"choices": label}}]


def task(number: int, reference: str, *labels: str, key: str = "image", **more) -> dict:
    "A task as Label Studio exports it, with a prediction and a draft that are no labels."
    annotations = [{"id": 100 * number + k, "completed_by": k, "result": choose([label]), "was_cancelled": False,
                    "ground_truth": False, "created_at": f"2026-11-01T10:00:0{k}.513742Z", "lead_time": 3.1}
                   for k, label in enumerate(labels)]
    return {"id": number, "annotations": annotations, "file_upload": reference.rpartition("/")[2],
            "drafts": [{"result": choose(["dog"])}], "predictions": [{"result": choose(["dog"]), "score": 0.9}],
            "data": {key: reference}, "meta": {}, "total_annotations": len(labels), "cancelled_annotations": 0} | more


def read(folder: Path, files: dict[str, object], **settings) -> tuple[dict[str, list[str]], list[str]]:
    "Write files (images by their path with None) and return the labels of each file found, and the reasons."
    for name, content in files.items():
        path = folder / "batch" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else name if content is None else json.dumps(content)
        path.write_text(text, encoding="utf-8", newline="")
    found, outcomes = read_annotations([folder / "batch"], folder, classes=CLASSES, **settings)
    labels: dict[str, list[str]] = {}
    for line in found:
        labels.setdefault(line.member.read().decode(), []).extend(sorted(vote.label for vote in line.record.votes))
    return labels, [outcome.reason for outcome in outcomes]


CSV = '"annotation_id","annotator","choice","created_at","id","image","lead_time","updated_at","was_cancelled"\r\n'
MIN = {"id": 5, "annotator": 1, "annotation_id": 7, "created_at": "2026-11-01T10:00:00Z", "lead_time": 2.5}
COCO = {"info": {"year": 2026}, "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
        "images": [{"id": 0, "width": 24, "file_name": "..\\..\\label-studio\\media\\upload\\4\\1a2b3c4d-a.jpg"},
                   {"id": 1, "width": 24, "height": 24, "file_name": "images/b.jpg"}],
        "annotations": [{"id": 0, "image_id": 0, "category_id": 0, "bbox": [0, 0, 9, 9], "iscrowd": 0},
                        {"id": 1, "image_id": 0, "category_id": 0, "bbox": [9, 9, 3, 3], "iscrowd": 0},
                        {"id": 2, "image_id": 1, "category_id": 1}]}
STORED = {"id": 27, "result": choose(["cat"]), "completed_by": {"id": 1, "email": "ann@example.com"},
          "created_username": " ann@example.com, 1", "task": {"id": 594, "data": {"image": "s3://bucket/scenes/a.jpg"}}}

USED = {  # name: (files, and the labels of each image that is found)
    "Label Studio's media folder": (
        {"media/upload/3/11111111-a.jpg": None, "media/upload/3/22222222-b.jpg": None, "project-3.json": [
            task(1, "/data/upload/3/11111111-a.jpg", "cat"), task(2, "/data/upload/3/22222222-b.jpg", "dog")]},
        {"media/upload/3/11111111-a.jpg": ["cat"], "media/upload/3/22222222-b.jpg": ["dog"]}),
    "the export in a folder of its own, beside the media folder": (
        {"media/upload/12/0a1b2c3d-a_1.jpg": None, "exports/p.json": [
            task(1, "http://localhost:8080/data/upload/12/0a1b2c3d-a_1.jpg", "cat")]},
        {"media/upload/12/0a1b2c3d-a_1.jpg": ["cat"]}),
    "the originals, before the tool sanitised their names": (
        {"raw/a (1).jpg": None, "raw/b [2] c.jpg": None, "p.json": [
            task(1, "/data/upload/3/11111111-a_1.jpg", "cat"), task(2, "/data/upload/3-22222222-b__2__c.jpg", "dog")]},
        {"raw/a (1).jpg": ["cat"], "raw/b [2] c.jpg": ["dog"]}),
    "files of the tool, and the names that people know": (
        {"3-1a2b3c4d-a.jpg": None, "1a2b3c4d-b_2.jpg": None, "l.csv": "image,label\na.jpg,cat\nb (2).jpg,dog\n"},
        {"3-1a2b3c4d-a.jpg": ["cat"], "1a2b3c4d-b_2.jpg": ["dog"]}),
    "a labelling interface of one's own": (
        {"a.jpg": None, "b.jpg": None, "c.jpg": None,
         "tasks.json": [task(1, "", "cat", data={"camera": "north", "image_url": "s3://bucket/a.jpg"})],
         "min.json": [{"image_url": "s3://bucket/b.jpg", "id": 2, "image_classes": "dog", "annotator": 1}],
         "table.csv": "annotation_id,annotator,id,image_classes,image_url\n1,1,3,cat,s3://bucket/c.jpg\n"},
        {"a.jpg": ["cat"], "b.jpg": ["dog"], "c.jpg": ["cat"]}),
    "two controls with choices, of which one holds classes": (
        {"a.jpg": None, "p.json": [task(1, "gs://bucket/a.jpg", annotations=[
            {"id": 1, "result": [*choose(["fog"], "weather"), *choose(["cat"], "animal")]}])]},
        {"a.jpg": ["cat"]}),
    "columns beside the class, in a table with tabs": (
        {"a.jpg": None, "l.tsv": "photo\tcamera\tanimal\na.jpg\tnorth\tcat\nnone.jpg\tsouth\tcow\n"},
        {"a.jpg": ["cat"]}),
    "choices as a text, and as a list; annotators vote": (
        {"a.jpg": None, "b.jpg": None, "p.json": [
            task(1, "a.jpg", "cat", "dog", "cat"), task(2, "b.jpg", annotations=[{"id": 3, "result": choose("dog")}])]},
        {"a.jpg": ["cat", "cat", "dog"], "b.jpg": ["dog"]}),
    "JSON-MIN with one choice and with several": (
        {"a.jpg": None, "b.jpg": None, "min.json": [
            MIN | {"image": "/data/local-files/?d=scenes/a.jpg", "choice": "cat"},
            MIN | {"image": "/data/local-files/?d=scenes/b.jpg", "choice": {"choices": ["cat", "dog"]}}]},
        {"a.jpg": ["cat"], "b.jpg": ["cat", "dog"]}),
    "CSV with a cancelled annotation, several choices and a comment of two lines": (
        {"a.jpg": None, "b.jpg": None, "l.csv": CSV.replace("choice", 'choice","comment') +
         '7,"ann@example.com","cat","two\r\nlines","t",1,"a.jpg",2.1,"t",False\r\n'
         '8,"ann@example.com","dog","","t",1,"a.jpg",2.1,"t",True\r\n'
         '9,"ann@example.com","{""choices"": [""cat"", ""dog""]}","","t",2,"b.jpg",2.1,"t",False\r\n'},
        {"a.jpg": ["cat"], "b.jpg": ["cat", "dog"]}),
    "target storage with a suffix": ({"scenes/a.jpg": None, "27.json": STORED}, {"scenes/a.jpg": ["cat"]}),
    "target storage without one, an annotation a file": (
        {"scenes/a.jpg": None, "target/27": STORED, "target/28": STORED | {"id": 28, "result": choose(["dog"])}},
        {"scenes/a.jpg": ["cat", "dog"]}),
    "target storage with whole tasks": (
        {"a.jpg": None, "594": task(594, "s3://bucket/a.jpg", "cat")}, {"a.jpg": ["cat"]}),
    "references to the web, with a signature": (
        {"scenes/a.jpg": None, "b c.jpg": None, "p.json": [
            task(1, "https://bucket.example/scenes/a.jpg?X-Amz-Signature=0", "cat"),
            task(2, "https://bucket.example/x/b%20c.jpg#now", data={"image": "azure-blob://container/x/b c.jpg"},
                 annotations=[{"result": choose(["dog"])}])]},
        {"scenes/a.jpg": ["cat"], "b c.jpg": ["dog"]}),
    "a folder within the archive that the references do not know": (
        {"2026/export/scenes/a.jpg": None, "p.json": [task(1, "gs://bucket/scenes/a.jpg", "cat")]},
        {"2026/export/scenes/a.jpg": ["cat"]}),
    "COCO": ({"images/1a2b3c4d-a.jpg": None, "images/b.jpg": None, "result.json": COCO},
             {"images/1a2b3c4d-a.jpg": ["cat"], "images/b.jpg": ["dog"]}),
    "COCO with numbers as text": (
        {"a.jpg": None, "instances.json": {"images": [{"id": "x", "file_name": "a.jpg"}], "categories": [
            {"id": "c", "name": "cat"}], "annotations": [{"image_id": "x", "category_id": "c"}]}}, {"a.jpg": ["cat"]}),
    "letters that were decomposed, in the label, the file and the reference": (
        {"a.jpg": None, unicodedata.normalize("NFD", "\u00e9t\u00e9.jpg"): None, "\u00f4.jpg": None,
         "l.csv": "image,label\na.jpg,fore\u0302t\n\u00e9t\u00e9.jpg,for\u00eat\n",
         "p.json": [task(1, "/data/upload/1/0a1b2c3d-o%CC%82.jpg", "fore\u0302t")]},
        dict.fromkeys(["a.jpg", unicodedata.normalize("NFD", "\u00e9t\u00e9.jpg"), "\u00f4.jpg"], ["for\u00eat"])),
    "the only file of that name": ({"scenes/a.jpg": None, "p.json": [task(1, "s3://bucket/raw/a.jpg", "cat")]},
                                   {"scenes/a.jpg": ["cat"]}),
}


@pytest.mark.parametrize("name", USED)
def test_used(name, tmp_path):
    files, labels = USED[name]
    assert read(tmp_path, files)[0] == labels


REFUSED = {  # name: (files, and the reasons; no image is found)
    "two images of one name, and a name alone": (
        {"a/1.jpg": None, "b/1.jpg": None, "l.csv": "image,label\n1.jpg,cat\n"}, ["ambiguous"]),
    "two uploads of one name, and one file": (
        {"a.jpg": None, "p.json": [task(1, "/data/upload/3/11111111-a.jpg", "cat"),
                                   task(2, "/data/upload/3/22222222-a.jpg", "dog")]}, ["ambiguous"] * 2),
    "an upload, and the file of another with the same name": (
        {"11111111-a.jpg": None, "p.json": [task(1, "/data/upload/3/22222222-a.jpg", "cat")]}, ["missing"]),
    "two fields that look like images": (
        {"a.jpg": None, "b.jpg": None, "l.csv": "left,right,label\na.jpg,b.jpg,cat\n"}, ["malformed"]),
    "two columns of classes": ({"a.jpg": None, "l.csv": "image,ann,ben\na.jpg,cat,dog\n"}, ["malformed"]),
    "two controls, and neither holds classes": (
        {"a.jpg": None, "p.json": [task(1, "a.jpg", annotations=[
            {"result": [*choose(["fog"], "weather"), *choose(["noon"], "time")]}])]}, ["malformed"]),
    "a table without names of columns": ({"a.jpg": None, "l.csv": "a.jpg,cat\na.jpg,dog\n"}, ["malformed"]),
    "an annotation without its task": ({"a.jpg": None, "27": STORED | {"task": 594}}, ["malformed"]),
    "a climbing path": ({"a.jpg": None, "p.json": [task(1, "../../../etc/passwd.jpg", "cat")]}, ["outside"]),
    "a media path that climbs": (
        {"a.jpg": None, "p.json": [task(1, "/data/local-files/?d=../../etc/passwd", "cat")]}, ["outside"]),
    "boxes alone": ({"a.jpg": None, "p.json": [task(1, "a.jpg", annotations=[{"id": 1, "result": [
        {"type": "rectanglelabels", "from_name": "box", "value": {"rectanglelabels": ["cat"]}}]}])]}, ["no_label"]),
    "COCO: an image of two categories, and one of none": (
        {"a.jpg": None, "result.json": COCO | {"annotations": [{"image_id": 1, "category_id": k} for k in (0, 1)]}},
        ["no_label", "contradictory"]),
    "COCO: a category that the file does not name": (
        {"images/b.jpg": None, "result.json": COCO | {"categories": []}}, ["malformed"]),
    "COCO: two images of one number": (
        {"images/b.jpg": None, "result.json": COCO | {"images": COCO["images"] * 2}}, ["malformed"]),
    "more values than fit into memory": ({"l.json": "[" + "{}," * 2_100_000 + "{}]"}, ["too_large"]),
    "more lines than are read": ({"l.csv": "image,label\n" + "\n" * 1_000_001}, ["too_large"]),
    "more columns than a table has": ({"l.csv": "image,label\n" + "," * 100_000}, ["malformed"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    files, reasons = REFUSED[name]
    assert read(tmp_path, files) == ({}, reasons)


def test_parameters_name_what_the_values_leave_open(tmp_path):
    files = {"a.jpg": None, "pictures/b.jpg": None, "l.csv": "left,right,ann,ben\na.jpg,upload/b.jpg,cat,dog\n"}
    given = {"image_field": "right", "label_field": "ben"}
    assert read(tmp_path, files, **given) == ({"pictures/b.jpg": ["dog"]}, [])
    files = {"pictures/upload/3/1.jpg": None, "x/upload/3/1.jpg": None,
             "p.json": [task(1, "/data/upload/3/1.jpg", "cat")]}
    assert read(tmp_path / "media", files) == ({}, ["ambiguous"])
    assert read(tmp_path / "media", {}, media_root="pictures") == ({"pictures/upload/3/1.jpg": ["cat"]}, [])


def test_one_annotation_is_one_vote_in_every_export(tmp_path):
    "The same annotations as JSON, JSON-MIN, CSV and in a target storage: each voter is counted once."
    created = "2026-11-01T10:00:00.513742Z"
    annotation = {"id": 7, "completed_by": 1, "created_at": created, "result": choose(["cat"])}
    row = {"id": 1, "image": "a.jpg", "choice": "cat", "annotator": 1, "annotation_id": 7, "created_at": created}
    stored = annotation | {"completed_by": {"id": 1}, "task": {"id": 1, "data": {"image": "a.jpg"}}}
    files = {"a.jpg": None, "p.json": [{"id": 1, "data": {"image": "a.jpg"}, "annotations": [annotation]}], "7": stored,
             "min.json": [row], "l.csv": ",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n"}
    read(tmp_path, files)
    found, _ = read_annotations([tmp_path / "batch"], tmp_path)
    assert len(found) == 4 and len({vote for line in found for vote in line.record.votes}) == 1


def test_images_without_a_suffix_are_no_label_files(tmp_path):
    files = {"27": "\ufeff not JSON", "28": None, "l.csv": "image,label\n28,cat\n"}
    assert read(tmp_path, files) == ({"28": ["cat"]}, [])


def test_many_files_of_one_name_take_no_time(tmp_path):
    "Each line looks at a few candidates, however many files have its name."
    names = [f"f{k}/1.jpg" for k in range(2000)]
    table = "image,label\n" + "".join(f"s3://bucket/{name},cat\n" for name in names) + "1.jpg,cat\n"
    labels, reasons = read(tmp_path, dict.fromkeys(names) | {"l.csv": table})
    assert (list(labels), reasons) == (names, ["ambiguous"])
