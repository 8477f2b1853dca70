"""Labels in each tool's form: usable ones join the dataset once, and the others are listed with a reason."""

import base64
import csv
import hashlib
import json
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cloud import cloud, cloud_once  # noqa: F401
from hypothesis import HealthCheck, given, settings, strategies as st

from intel_nb.data import build_dataset
from intel_nb.dataset import read_split
from intel_nb.images import MAX_BYTES, encode_jpeg
from intel_nb.labels.files import read_labels
from intel_nb.labels.lookup import read_annotations
from intel_nb.labels.records import LabelRecord
from intel_nb.scenes import SAMPLE_CLASSES, sample_archive, sample_scene
from intel_nb.storage import InputError, fetch, put, read_json, write_bytes


def scene(label: int, number: int) -> bytes:
    return encode_jpeg(sample_scene(label, np.random.default_rng([77, label, number])), 90)


SCENES = {f"{SAMPLE_CLASSES[label]}{number}.jpg": scene(label, number) for label in range(6) for number in range(8)}
LABELS = {name: name.rstrip("0123456789.jpg") for name in SCENES}


def manifest(labels: dict[str, str], where: str = "s3://labels/batch/images/", confidence: float = 0.95) -> str:
    "Return an augmented manifest of Ground Truth."
    metadata = {"type": "groundtruth/image-classification", "human-annotated": "yes", "job-name": "job",
                "confidence": confidence, "creation-date": "2026-11-01T00:00:00.000000"}
    lines = [{"source-ref": where + name, "scene": SAMPLE_CLASSES.index(label),
              "scene-metadata": {"class-name": label, **metadata}} for name, label in labels.items()]
    return "".join(json.dumps(line) + "\n" for line in lines)


def result(label: str) -> list[dict]:
    return [{"type": "choices", "from_name": "label", "to_name": "image", "value": {"choices": [label]}}]


def tasks(labels: dict[str, str], where: str = "s3://labels/batch/images/", **more) -> str:
    "Return an export of Label Studio."
    return json.dumps([{"id": k, "data": {"image": where + name}, "predictions": [{"result": result("street")}],
                        "annotations": [{"id": k, "was_cancelled": False, "result": result(label)}], **more}
                       for k, (name, label) in enumerate(labels.items())])


def table(labels: dict[str, str], where: str = "images/") -> str:
    "Return a CSV."
    return "image,label\n" + "".join(f"{where}{name},{label}\n" for name, label in labels.items())


FORMS = {"output.manifest": manifest, "label-studio.json": tasks, "labels.csv": table}


def batch(folder: Path, files: dict[str, str | bytes], images: dict[str, bytes] = SCENES) -> Path:
    "Write label files and images to the folder `batch` in `folder`, and return `folder`."
    for name, data in (files | {f"images/{image}": data for image, data in images.items()}).items():
        path = folder / "batch" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def zipped(folder: Path) -> Path:
    return Path(shutil.make_archive(str(folder), "zip", folder))


def in_thirds() -> dict[str, str]:
    "Return three label files, one of each form, with a third of the labels each."
    return {name: form(dict(list(LABELS.items())[k::3])) for k, (name, form) in enumerate(FORMS.items())}


def quarantine(out: Path) -> dict[str, tuple[str, str]]:
    "Return the reason and the detail of each rejected file or line by its path."
    with open(out / "quarantine.csv", newline="") as lines:
        return {row["path"]: (row["reason"], row["detail"]) for row in csv.DictReader(lines)}


def reasons(out: Path) -> Counter:
    return Counter(reason for reason, _ in quarantine(out).values())


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return sample_archive(tmp_path_factory.mktemp("small") / "scenes.zip", per_class=6, seed=3)


@pytest.fixture(scope="module")
def unlabelled(small, tmp_path_factory) -> tuple[Path, dict]:
    "The dataset of the small archive without annotations: its folder and report. Tests only read it."
    out = tmp_path_factory.mktemp("unlabelled")
    return out, build_dataset(small, out)


@pytest.fixture
def build(small, tmp_path):
    "Return a function that builds a dataset of the small archive with annotations and returns its folder and report."
    numbers = iter(range(100))

    def build(*annotations: Path, **more) -> tuple[Path, dict]:
        out = tmp_path / f"out{next(numbers)}"
        return out, build_dataset(small, out, annotations=annotations, **more)
    return build


# Labels that are used


def test_three_forms_are_accounted_for(build, tmp_path):
    out, report = build(zipped(batch(tmp_path / "b", in_thirds())))
    assert report["annotations"] == {"added": 48, "duplicate": 0, "quarantined": 0}
    added = {file["form"]: file["added"] for file in report["annotation_files"]}
    assert added == {"ground-truth": 16, "label-studio": 16, "csv": 16}
    assert read_json(out / "report.json") == report
    splits = {name: read_split(out / "dataset", name) for name in ("train", "validation", "test")}
    assert {name: Counter(s.source)["annotations"] for name, s in splits.items() if name == "test"} == {"test": 0}
    assert sum(Counter(s.source)["annotations"] for s in splits.values()) == 48
    assert Counter(splits["validation"].source)["annotations"] > 0
    for split in splits.values():
        assert split.sha256 == sorted(split.sha256)
        for image, label, source in zip(split.images, split.labels, split.source):
            name = next((name for name in SCENES if SCENES[name] == image), "")
            assert source == "archive" or LABELS[name] == split.classes[label]


def test_annotated_images_join_the_test_split_only_on_request(build, unlabelled, tmp_path):
    labels = batch(tmp_path / "b", in_thirds())
    without, _ = unlabelled
    usual, _ = build(labels)
    requested, _ = build(labels, test_annotations=True, test_fraction=0.3)
    splits = [read_split(out / "dataset", "test") for out in (without, usual, requested)]
    assert splits[0].sha256 == splits[1].sha256
    assert "annotations" in splits[2].source and set(splits[0].sha256) < set(splits[2].sha256)


def test_adding_images_moves_none(build, unlabelled, tmp_path):
    (before, _), (after, _) = unlabelled, build(batch(tmp_path / "b", in_thirds()))
    for name in ("train", "validation"):
        assert set(read_split(before / "dataset", name).sha256) < set(read_split(after / "dataset", name).sha256)


# Labels that come twice


def test_the_same_labels_in_another_form_add_nothing(build, tmp_path):
    folder = batch(tmp_path / "b", in_thirds())
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    archive = zipped(folder)
    shutil.copy(archive, inbox / "monday.zip")
    alone = {name: batch(tmp_path / f"{k}", {name: form(LABELS)}) for k, (name, form) in enumerate(FORMS.items())}
    _, report = build(archive)
    cases = [([archive, folder], 48), ([folder], 0), ([folder / "batch"], 0), ([inbox], 0),
             ([inbox, archive, folder], 96), ([*alone.values(), archive], 144),
             *(([folder], 0) for folder in alone.values())]
    for sources, duplicates in cases:
        out, again = build(*sources)
        assert again["annotations"] == {"added": 48, "duplicate": duplicates, "quarantined": 0}, sources
        assert again["fingerprint"] == report["fingerprint"]
        assert len(quarantine(out)) <= duplicates


def test_an_image_of_the_dataset_is_not_added_again(build, small, unlabelled, tmp_path):
    with zipfile.ZipFile(small) as z:
        known = {"tsea.jpg": z.read("seg_train/seg_train/sea/00000.jpg"),
                 "test.jpg": z.read("seg_test/seg_test/sea/00000.jpg"),
                 "wrong.jpg": z.read("seg_train/seg_train/forest/00000.jpg")}
    labels = {"tsea.jpg": "sea", "test.jpg": "sea", "wrong.jpg": "sea", "sea0.jpg": "sea"}
    _, without = unlabelled
    out, report = build(batch(tmp_path / "b", {"labels.csv": table(labels)}, SCENES | known))
    assert report["annotations"] == {"added": 1, "duplicate": 2, "quarantined": 1}
    rejected = quarantine(out)
    assert rejected["b/batch/labels.csv:2"][0] == rejected["b/batch/labels.csv:3"][0] == "duplicate"
    assert "seg_test/seg_test/sea/00000.jpg in the dataset" in rejected["b/batch/labels.csv:3"][1]
    assert rejected["b/batch/labels.csv:4"][0] == "contradictory"
    assert "which is labelled forest" in rejected["b/batch/labels.csv:4"][1]
    assert report["counts"]["test"] == without["counts"]["test"]


# Several labels for one image


def test_most_votes_decide(build, tmp_path):
    two = {"sea0.jpg": "sea", "sea1.jpg": "sea", "sea2.jpg": "forest"}
    other = two | {"sea1.jpg": "forest", "sea2.jpg": "forest"}
    files = {"ann.csv": table(two), "ben.csv": table(other) + "images/sea3.jpg,sea\n",
             "cas.csv": table({"sea0.jpg": "forest"})}
    out, report = build(batch(tmp_path / "b", files))
    rejected = quarantine(out)
    assert report["annotations"] == {"added": 3, "duplicate": 2, "quarantined": 3}
    assert rejected["b/batch/cas.csv:2"][0] == "outvoted"
    assert rejected["b/batch/ann.csv:3"][0] == rejected["b/batch/ben.csv:3"][0] == "contradictory"
    again, report = build(tmp_path / "b", zipped(tmp_path / "b"), tmp_path / "b")
    assert report["annotations"]["added"] == 3, "the same vote does not count twice"
    assert quarantine(again)["b.zip/batch/cas.csv:2"][0] == "outvoted"


def test_confidence_decides_if_every_vote_has_one(build, tmp_path):
    files = {"a.manifest": manifest({"sea0.jpg": "sea"}, confidence=0.9),
             "b.manifest": manifest({"sea0.jpg": "forest"}, confidence=0.6)}
    out, report = build(batch(tmp_path / "b", files))
    assert report["annotations"] == {"added": 1, "duplicate": 0, "quarantined": 1}
    assert quarantine(out)["b/batch/b.manifest:1"][0] == "outvoted"


def test_annotators_of_a_task_vote(build, tmp_path):
    def task(name: str, *labels: str) -> dict:
        by = [{"id": f"{name}{k}", "result": result(label)} for k, label in enumerate(labels)]
        return {"data": {"image": f"images/{name}"}, "annotations": by}
    export = [task("sea0.jpg", "forest", "sea", "sea"), task("sea1.jpg", "sea", "forest"), task("sea2.jpg")]
    later = [*export, task("sea1.jpg", "sea", "forest", "sea")]  # the same votes and one more
    out, report = build(batch(tmp_path / "b", {"monday.json": json.dumps(export)}))
    assert report["annotations"] == {"added": 1, "duplicate": 0, "quarantined": 2}
    assert reasons(out) == {"contradictory": 1, "no_label": 1}
    out, report = build(batch(tmp_path / "b", {"tuesday.json": json.dumps(later)}))
    assert report["annotations"]["added"] == 2, "a vote that is exported again does not count twice"


# Labels that cannot be used


JPEG = base64.b64encode(SCENES["sea0.jpg"]).decode()
UNUSABLE = {  # the line of a CSV, and the reason
    "images/sea1.jpg,lake": "unknown_label",
    "images/none.jpg,sea": "missing",
    "images/sea1.jpg,": "no_label",
    "images/sea1.jpg": "malformed",
    '"images/sea1.jpg,sea': "malformed",
    ",sea": "malformed",
    "../../../etc/passwd,sea": "outside",
    "images/../../../secret.jpg,sea": "outside",
    "s3://bucket/../../etc/passwd,sea": "outside",
    "file:///etc/passwd,sea": "missing",
    "/etc/passwd,sea": "missing",
    "images/link.jpg,sea": "missing",
    "https://example.com/sea.jpg,sea": "unsupported_reference",
    "ftp://example.com/sea.jpg,sea": "unsupported_reference",
    "images/torn.jpg,sea": "undecodable",
    "images/empty.jpg,sea": "empty",
    "labels.csv,sea": "unsupported_format",
    '"data:image/jpeg;base64,%%%",sea': "malformed",
    '"data:image/jpeg;base64,AAAA",sea': "unsupported_format",
    "s3://bucket/not/there.jpg,sea": "bucket_not_allowed",
}
USABLE = {
    "images/sea2.jpg,sea", "file:///home/ann/batch/images/sea3.jpg,sea", "s3://bucket/x/batch/images/sea4.jpg,sea",
    "/data/local-files/?d=batch/images/sea5.jpg,sea", "/data/upload/3/0a1b2c3d-sea6.jpg,sea", r"images\sea7.jpg,sea",
    f'"data:image/jpeg;base64,{JPEG}",sea', f"{base64.b64encode(SCENES['sea1.jpg']).decode()},sea",
    "../batch/images/forest0.jpg,forest",
}


def test_every_unusable_line_is_listed_and_the_others_are_added(build, tmp_path):
    lines = [*UNUSABLE, *USABLE]
    images = {f"images/{n}": d for n, d in SCENES.items() if n != "sea6.jpg"}
    folder = batch(tmp_path / "b", {
        "labels.csv": "image,label\n" + "\n".join(lines), "sea6.jpg": SCENES["sea6.jpg"], **images,
        "images/torn.jpg": SCENES["sea0.jpg"][:2000], "images/empty.jpg": b""}, {})
    (tmp_path / "secret.jpg").write_bytes(SCENES["forest7.jpg"])
    (folder / "batch" / "images" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    out, report = build(folder)
    rejected = quarantine(out)
    outcomes = {line: rejected.get(f"b/batch/labels.csv:{k}", ("added",))[0] for k, line in enumerate(lines, 2)}
    assert outcomes == UNUSABLE | dict.fromkeys(USABLE, "added")
    assert report["annotations"] == {"added": len(USABLE), "duplicate": 0, "quarantined": len(UNUSABLE)}
    assert report["annotation_reasons"] == dict(Counter(UNUSABLE.values()))
    assert all(detail for _, detail in rejected.values())


def test_paths_to_two_places_do_not_match_one_file(build, tmp_path):
    labels = "image,label\ns3://bucket/monday/sea0.jpg,sea\ns3://bucket/tuesday/sea0.jpg,forest\nimages/sea1.jpg,sea\n"
    out, report = build(batch(tmp_path / "b", {"labels.csv": labels}))
    assert (report["annotations"]["added"], report["annotation_reasons"]) == (1, {"ambiguous": 2})
    flat = batch(tmp_path / "c", {"labels.csv": labels, "sea0.jpg": SCENES["sea0.jpg"]})
    _, report = build(flat)
    assert (report["annotations"]["added"], report["annotation_reasons"]) == (1, {"ambiguous": 2})


def test_hostile_and_damaged_files(build, tmp_path):
    deep = '[{"data": {"image": "images/sea0.jpg"}, "annotations": ' + "[" * 5000 + "]" * 5000 + "}]"
    half = json.dumps([{"data": {"image": "images/sea1.jpg"}, "annotations": [{"result": result("\ud83d lake")}]}])
    line = '{"source-ref": "images/sea2.jpg", "s": 4, "s-metadata": {"class-name": "sea", "confidence": %s}}'
    files = {"deep.json": deep, "half.json": half, "big.manifest": line % ("1" + "0" * 4000),
             "nan.manifest": line % "NaN", "bomb.csv": b"image,label\n" + b"images/sea3.jpg,sea\n" * 3_500_000,
             "cut.json": tasks(LABELS)[:1000],
             "capture.json": '{"captured": "2026-11-01T00:00:00Z"}', "image.csv": SCENES["sea0.jpg"], "no.csv": b"",
             "labels.csv": table({"sea0.jpg": "sea"}), "__MACOSX/._labels.csv": b"\0"}
    folder = batch(tmp_path / "b", files)
    out, report = build(zipped(folder))
    rejected = {path.removeprefix("b.zip/batch/"): reason for path, (reason, _) in quarantine(out).items()}
    malformed = ("deep.json", "big.manifest:1", "nan.manifest:1", "cut.json", "capture.json:1", "image.csv", "no.csv")
    assert rejected == {"half.json:1": "unknown_label", "bomb.csv": "too_large"} | dict.fromkeys(malformed, "malformed")
    assert report["annotations"]["added"] == 1


def test_a_zip_with_a_path_that_leads_out_is_refused(build, tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as z:
        z.writestr("../labels.csv", "image,label\n")
    with pytest.raises(InputError, match="leads out of the zip"):
        build(tmp_path / "evil.zip")
    (tmp_path / "inbox").mkdir()
    shutil.move(tmp_path / "evil.zip", tmp_path / "inbox" / "evil.zip")
    out, report = build(batch(tmp_path / "inbox", {"labels.csv": table({"sea0.jpg": "sea"})}))
    assert (report["annotations"]["added"], quarantine(out)["inbox/evil.zip"][0]) == (1, "unreadable")


def test_a_source_without_label_files_is_listed(build, tmp_path):
    out, report = build(batch(tmp_path / "b", {}))
    assert report["annotations"] == {"added": 0, "duplicate": 0, "quarantined": 1}
    assert quarantine(out)["b"][0] == "no_labels"


KEYS = ["data", "image", "annotations", "result", "value", "choices", "type", "meta", "source", "captured",
        "x-metadata", "x", "class-name", "class-map", "confidence", "source-ref", "label"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12)
FILES = (st.lists(VALUES, max_size=4).map(json.dumps).map(str.encode) | st.binary(max_size=200)
         | st.binary(max_size=100).map(lambda tail: b"image,label\n" + tail))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([".json", ".manifest", ".csv"]), FILES)
def test_each_line_of_any_file_gives_a_record_or_a_reason(suffix, data):
    for _, record in read_labels(f"labels{suffix}", data):
        if isinstance(record, LabelRecord):
            assert record.image and all(isinstance(vote.label, str) for vote in record.votes)
            assert all(vote.confidence is None or 0 <= vote.confidence <= 1 for vote in record.votes)
            assert record.source == "annotations" or record.source.startswith("capture:")
        else:
            assert record.reason in ("malformed", "no_label", "contradictory") and "\n" not in str(record)


# In a bucket


def test_labels_and_images_in_a_bucket(cloud, build, tmp_path):  # noqa: F811
    "A prefix of a bucket is read like a folder, and images that are not beside a manifest are downloaded."
    bucket = cloud.bucket("labels")
    some = dict(list(LABELS.items())[::8])
    folder = batch(tmp_path / "b", {"labels.csv": table(some)}, {name: SCENES[name] for name in some})
    put(folder, f"{bucket}/new")
    _, report = build(folder)
    _, same = build(fetch(f"{bucket}/new/", tmp_path / "fetched"))
    assert same["annotations"] == {"added": 6, "duplicate": 0, "quarantined": 0}
    assert same["fingerprint"] == report["fingerprint"]
    (tmp_path / "out.manifest").write_text(manifest(some | {"none.jpg": "sea"}, f"{bucket}/new/batch/images/"))
    found, outcomes = read_annotations([tmp_path / "out.manifest"], tmp_path / "scratch", buckets=["labels"])
    assert [line.member.read() for line in found[:-1]] == [SCENES[name] for name in some] and not outcomes
    with pytest.raises(InputError, match=r"none.jpg does not exist"):
        found[-1].member.read()


def test_only_allowed_buckets_are_read_and_no_large_object(cloud, tmp_path):  # noqa: F811
    "A label file from outside names whatever it likes, also a prefix with many objects."
    bucket = cloud.bucket("labels")
    put(write_bytes(tmp_path / "large.jpg", bytes(MAX_BYTES + 1)), f"{bucket}/new/large.jpg")
    (tmp_path / "l.csv").write_text(f"image,label\n{bucket}/new/large.jpg,sea\n{bucket}/new,sea\ns3://other/a.jpg,sea\n")
    _, outcomes = read_annotations([tmp_path / "l.csv"], tmp_path / "scratch")
    assert [outcome.reason for outcome in outcomes] == ["bucket_not_allowed"] * 3
    assert "name its bucket labels in buckets" in outcomes[0].detail
    before = cloud.calls["s3", "get_object"]
    found, outcomes = read_annotations([tmp_path / "l.csv"], tmp_path / "scratch", buckets=["labels"])
    assert [outcome.reason for outcome in outcomes] == ["bucket_not_allowed"]
    with pytest.raises(OSError, match="16,777,217 bytes; at most 16,777,216 are accepted"):
        found[0].member.read()
    with pytest.raises(InputError, match="does not exist"):
        found[1].member.read()
    assert cloud.calls["s3", "get_object"] == before and not (tmp_path / "scratch").exists()


# Images that an endpoint captured


def test_a_capture_keeps_its_time(build, tmp_path):
    meta = {"source": "capture", "captured": "2026-11-02T10:00:00Z", "endpoint": "staging", "version": "3"}
    labelled = tasks({"sea0.jpg": "sea", "sea1.jpg": "sea"}, "images/", meta=meta)
    folder = batch(tmp_path / "b", {"export.json": labelled, "labels.csv": table(LABELS)})
    found, _ = read_annotations([folder], tmp_path)
    assert Counter(line.record.source for line in found)["capture:2026-11-02T10:00:00Z"] == 2
    outs = [build(tmp_path / "b")[0], build(batch(tmp_path / "c", {"z.json": labelled, "a.csv": table(LABELS)}))[0]]
    splits = [[read_split(out / "dataset", name) for name in ("train", "validation")] for out in outs]
    rows = [sorted(zip(train.sha256, train.source)) for train, _ in splits]
    assert rows[0] == rows[1]
    sources = Counter(source for pair in splits for split in pair for source in split.source)
    assert sources == {"archive": 72, "annotations": 92, "capture:2026-11-02T10:00:00Z": 4}


# The chain


def test_the_command_prints_the_outcomes(empty, tmp_path):
    batch(tmp_path / "b", in_thirds() | {"more.csv": "image,label\nimages/none.jpg,sea\n"})
    answer = empty.run("--annotations", "b", "--annotations", str(zipped(tmp_path / "b")), "--to", "data")
    assert answer.status == 0
    assert "annotated 48 added, 48 duplicate, 2 quarantined: " in answer.out
    result = empty.newest()["steps"][0]["result"]
    assert [result[f"annotations_{kind}"] for kind in ("added", "duplicate", "quarantined")] == [48, 48, 2]
    assert empty("run", "--annotations", "c.zip").status == 2


def test_images_of_a_capture_are_found(empty, tmp_path):
    "A person gives an export of Label Studio without images. A later run has them although the capture has gone."
    names = {f"{hashlib.sha256(SCENES[name]).hexdigest()}.jpg": name for name in ("sea0.jpg", "forest1.jpg")}
    capture = empty.home / "captures" / "staging" / "2026-01-31T120000Z-00000042"
    for digest, name in names.items():
        write_bytes(capture / "images" / digest, SCENES[name])
    labels = {digest: LABELS[name] for digest, name in names.items()}
    (tmp_path / "export.json").write_text(tasks(labels, "/data/local-files/?d=captures/images/"))
    write_bytes(tmp_path / "more" / "labels.csv", table(labels | {"0" * 64 + ".jpg": "sea"}).encode())
    answer = empty.run("--annotations", "export.json", "--to", "data")
    assert answer.status == 0 and "annotated 2 added, 0 duplicate, 0 quarantined" in answer.out
    shutil.rmtree(capture)
    answer = empty.run("--annotations", "export.json", "--annotations", "more", "--to", "data")
    assert answer.status == 0 and "annotated 2 added, 2 duplicate, 1 quarantined" in answer.out
    assert [path.name for path in (tmp_path / "more").iterdir()] == ["labels.csv"]


@pytest.mark.slow
def test_train_is_cached_if_the_labels_are_the_same(empty, tmp_path):
    """A zip, its folder, and both give the same dataset, so train is cached.

    A capture with enough rows becomes the reference of the detector."""
    batch(tmp_path / "b", in_thirds())
    archive = str(zipped(tmp_path / "b"))
    for sources, train in (([archive], "succeeded"), ([archive, "b"], "cached"), (["b"], "cached")):
        options = [part for source in sources for part in ("--annotations", source)]
        assert empty.run("--to", "train", *options).status == 0
        assert (empty.statuses()["data"], empty.statuses()["train"]) == ("succeeded", train)
    images = {f"{SAMPLE_CLASSES[k % 6]}{k}.jpg": scene(k % 6, 1000 + k) for k in range(210)}
    meta = {"source": "capture", "captured": "2026-11-02T10:00:00Z", "endpoint": "staging", "version": "1"}
    captured = tasks({name: name.rstrip("0123456789.jpg") for name in images}, "images/", meta=meta)
    batch(tmp_path / "captured", {"export.json": captured}, images)
    assert empty.run("--to", "train", "--annotations", "b", "--annotations", "captured").status == 0
    model = Path(empty.newest()["steps"][1]["out_dir"]) / "model"
    assert "captured at the drift alarm of 2026-11-02T10:00:00Z" in (model / "card.md").read_text()
    size = read_json(model / "manifest.json")["card"]["reference_size"]
    assert 65 <= size <= 70, "a third of the captured scenes, but for those that resemble the test split"
