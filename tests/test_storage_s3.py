"""The artifact tree under s3://, and runs of the chain whose data lie there, against an emulator over real HTTP."""
import os
import subprocess
from pathlib import Path

import pytest
from cloud import cloud, cloud_once  # noqa: F401
from conftest import COMMAND, QUICK

from intel_nb.aws.client import client
from intel_nb.storage import InputError, fetch, files_of, put, tree_digest, write_bytes, write_text


@pytest.fixture
def bucket(cloud) -> str:
    return cloud.bucket("scenes")


def tree_of(folder: Path) -> Path:
    "A folder as a step leaves one: nested, with names that a URL would quote, a hidden file, and one of no bytes."
    for name, data in {"a.json": b"{}", "train/sea/1 %+ü.jpg": b"\xff\xd8", "train/street/2.jpg": b"", ".DS_Store": b"noise"}.items():
        write_bytes(folder / name, data)
    return folder


def test_a_tree_comes_back_the_same(bucket, tmp_path):
    tree = tree_of(tmp_path / "tree")
    assert put(tree, f"{bucket}/runs/1") == f"{bucket}/runs/1"
    for uri in (f"{bucket}/runs/1", f"{bucket}/runs/1/"):
        assert tree_digest(fetch(uri, tmp_path / "fetched")) == tree_digest(tree)
    assert files_of(fetch(f"{bucket}/runs/1/train", tmp_path / "part")) == ["sea/1 %+ü.jpg", "street/2.jpg"]
    assert put(tree, str(tmp_path / "local")) and tree_digest(tmp_path / "local") == tree_digest(tree)


def test_a_large_file_comes_back_the_same(bucket, tmp_path):
    "Over 8 MiB boto3 sends parts."
    path = write_bytes(tmp_path / "large.bin", os.urandom(20 * 2**20))
    put(path, f"{bucket}/large.bin")
    assert tree_digest(fetch(f"{bucket}/large.bin", tmp_path / "fetched")) == tree_digest(path)


@pytest.mark.slow
def test_more_files_than_a_page_has(bucket, tmp_path):
    for i in range(1100):
        client("s3").put_object(Bucket="scenes", Key=f"many/{i:04}", Body=b"")
    assert len(files_of(fetch(f"{bucket}/many", tmp_path))) == 1100


def test_what_changed_is_fetched_again_and_what_went_goes(bucket, tmp_path):
    put(tree_of(tmp_path / "tree"), f"{bucket}/x")
    fetch(f"{bucket}/x", tmp_path / "fetched")
    write_text(tmp_path / "tree" / "a.json", "[]")
    put(tmp_path / "tree", f"{bucket}/x")
    client("s3").delete_object(Bucket="scenes", Key="x/train/street/2.jpg")
    copy = fetch(f"{bucket}/x", tmp_path / "fetched")
    assert (copy / "a.json").read_text() == "[]" and files_of(copy) == ["a.json", "train/sea/1 %+ü.jpg"]


@pytest.mark.parametrize("key", ["x/../../evil", "x//evil", "x/./evil", "x/..", "x/a\\b"])
def test_no_key_leads_out_of_the_folder(bucket, tmp_path, key):
    listed = [{"Key": key, "ETag": "1", "Size": 0}]
    from intel_nb.aws import objects
    with pytest.raises(InputError, match="is no file's path"):
        [objects.check_relative(one["Key"].removeprefix("x/"), f"{bucket}/x") for one in listed]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_never_mixed_with_another(bucket, tmp_path):
    put(tree_of(tmp_path / "tree"), f"{bucket}/x")
    write_text(tmp_path / "other" / "b.json", "{}")
    with pytest.raises(InputError, match="holds a.json, which"):
        put(tmp_path / "other", f"{bucket}/x")
    assert len(client("s3").list_objects_v2(Bucket="scenes")["Contents"]) == 3


@pytest.mark.parametrize("uri, match", [
    ("s3://scenes/nothing.zip", "s3://scenes/nothing.zip does not exist"), ("s3://nowhere/x", "check the bucket"),
    ("s3://", "is no s3:// URI"), ("s3://UPPER/x", "is no s3:// URI"), ("gs://scenes/x", "only paths and s3://")])
def test_what_is_not_there(bucket, tmp_path, uri, match):
    with pytest.raises(InputError, match=match):
        fetch(uri, tmp_path)


def test_without_credentials(cloud, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(InputError, match="no AWS credentials are here"):
        fetch("s3://scenes/x", tmp_path)


def test_the_same_data_under_s3_are_the_same_data(bucket, waiting, archive):
    "A run that waits was made from a file; from a copy under s3:// every step is taken from the store."
    put(archive, f"{bucket}/incoming/intel.zip")
    answer = waiting("run", "--data", f"{bucket}/incoming/intel.zip", *QUICK)
    assert answer.status == 3, answer
    assert set(waiting.statuses().values()) == {"cached", "skipped"}
    wrong = waiting("run", "--data", f"{bucket}/incoming/intl.zip", *QUICK)
    assert (wrong.status, wrong.out) == (2, "") and "intl.zip does not exist" in wrong.err


@pytest.mark.slow
def test_a_whole_run_on_data_under_s3(bucket, empty, archive):
    put(archive, f"{bucket}/incoming/intel.zip")
    done = subprocess.run([COMMAND, "run", "--data", f"{bucket}/incoming/intel.zip", "--approve", *QUICK], env=empty.environ,
                          cwd=empty.root, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert [step["status"] for step in empty.newest()["steps"]] == ["succeeded"] * 6
