"The pipeline is started for one version of the data: by an upload, by an event, or by hand."
import json
import zipfile

import pytest
from cloud import ROLE, backend, cloud as cloud, cloud_once as cloud_once

from intel_nb.aws.client import client
from intel_nb.aws.executions import (
    check_start,
    execution_parameters,
    start_execution,
    start_upload,
    start_values,
)
from intel_nb.aws.objects import ObjectNotFound
from intel_nb.aws.pipeline import PipelineConfig, pipeline_definition
from intel_nb.aws.stages import upsert_pipeline
from intel_nb.storage import InputError

CONFIG = PipelineConfig(data="s3://scenes-data/intel.zip", annotations="s3://scenes-data/annotations/")


@pytest.fixture
def pipeline(cloud) -> str:
    "A deployed pipeline with its bucket for data, which keeps versions."
    cloud.bucket("scenes-data")
    cloud.aws("s3").put_bucket_versioning(Bucket="scenes-data", VersioningConfiguration={"Status": "Enabled"})
    upsert_pipeline("intel-nb", pipeline_definition(CONFIG), ROLE)
    return "intel-nb"


@pytest.fixture
def archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "scenes.zip", "w") as made:
        made.writestr("seg_train/sea/1.jpg", bytes(200_000))
    return tmp_path / "scenes.zip"


def started(cloud) -> list[str]:
    return list(backend(cloud).pipelines["intel-nb"].pipeline_executions)


def version_of_the_archive() -> str:
    return client("s3").head_object(Bucket="scenes-data", Key="intel.zip")["VersionId"]


def test_the_execution_of_an_upload_is_found_by_the_version_of_the_object(cloud, pipeline, archive):
    start_execution(pipeline, {"DataVersion": "an earlier one"})
    by_event, waited = [], []

    def pause(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 4:
            by_event.append(start_execution(pipeline, {"DataVersion": version_of_the_archive()}))
    lines: list[str] = []
    assert start_upload(pipeline, archive, lines.append, pause) == by_event[0]
    assert len(started(cloud)) == 2 and sum(waited) == 40
    assert lines[-1].endswith("to s3://scenes-data/intel.zip; waiting for the execution that this starts")
    assert lines[-2] == "uploaded 0.2 of 0.2 MB"


def test_an_upload_without_an_event_is_started_by_hand(cloud, pipeline, archive):
    waited: list[float] = []
    arn = start_upload(pipeline, archive, lambda line: None, waited.append)
    assert started(cloud) == [arn] and sum(waited) == 120
    assert execution_parameters(arn) == {"DataVersion": version_of_the_archive(), "ChampionVersion": "none"}


@pytest.mark.parametrize("name, content, expected", [
    ("none.zip", None, "none.zip does not exist; give the ZIP file"),
    ("photo.jpg", b"\xff\xd8", "photo.jpg is no ZIP file"),
    ("cut.zip", b"PK\x03\x04 and no more", "cut.zip is no ZIP file, or one that was cut short")])
def test_nothing_is_uploaded_that_is_no_archive(cloud, pipeline, tmp_path, name, content, expected):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=expected):
        start_upload(pipeline, tmp_path / name, lambda line: None, lambda seconds: None)
    assert started(cloud) == [] and "Contents" not in client("s3").list_objects_v2(Bucket="scenes-data")


def test_a_bucket_without_versions_is_refused(cloud, pipeline, archive):
    "All its archives would have one version, and the cache would answer for the first."
    cloud.aws("s3").create_bucket(Bucket="plain-data")
    plain = PipelineConfig(data="s3://plain-data/intel.zip", annotations=CONFIG.annotations)
    upsert_pipeline(pipeline, pipeline_definition(plain), ROLE)
    with pytest.raises(InputError, match="the bucket plain-data keeps no versions"):
        start_upload(pipeline, archive, lambda line: None, lambda seconds: None)


def test_no_bucket_and_no_pipeline_are_said_so(cloud, archive):
    with pytest.raises(InputError, match="there is no pipeline intel-nb; intel-nb aws deploy makes it"):
        start_upload("intel-nb", archive)
    upsert_pipeline("intel-nb", pipeline_definition(CONFIG), ROLE)
    with pytest.raises(InputError, match="there is no bucket scenes-data; intel-nb aws deploy makes it"):
        start_upload("intel-nb", archive, lambda line: None)


def test_a_start_says_which_data_and_which_champion_it_is_for(cloud, pipeline):
    with pytest.raises(ObjectNotFound, match="s3://scenes-data/intel.zip does not exist"):
        start_values(pipeline)
    seen = set()
    for key in ("intel.zip", "annotations/1.csv", "annotations/2.csv"):
        client("s3").put_object(Bucket="scenes-data", Key=key, Body=key.encode())
        values = start_values(pipeline)
        assert values == start_values(pipeline), "the same data has the same version"
        assert values["ChampionVersion"] == "none"
        seen.add(values["DataVersion"])
    assert len(seen) == 3
    chosen = start_values(pipeline, {"Profile": "full", "DataVersion": "mine"})
    assert chosen == {"Profile": "full", "DataVersion": "mine", "ChampionVersion": "none"}
    assert execution_parameters(start_execution(pipeline, chosen)) == chosen


def test_a_value_that_a_job_cannot_take_is_refused_before_the_start(cloud, pipeline):
    for values, expected in {
        json.dumps({"TrainSettings": json.dumps({"note": "x" * 250})}):
            r"step train: .* has 262 characters, more than 256; it comes from the parameter TrainSettings",
        json.dumps({"TrainingInstanceType": "ml.none"}): "step train: ResourceConfig.InstanceType is 'ml.none'",
        json.dumps({"InputDataUrl": "s3://scenes-data//intel.zip"}): "two slashes in a row",
        json.dumps({"AccuracyThreshold": "high"}): "which is no Float"}.items():
        with pytest.raises(InputError, match=expected):
            start_execution(pipeline, json.loads(values))
    assert started(cloud) == []


def test_an_older_definition_is_no_fault_of_the_values():
    "A deployed definition may have what a newer check would refuse; only what the values add counts."
    older = pipeline_definition(CONFIG)
    older["Steps"][0]["Arguments"]["RoleArn"] = "me"
    check_start(older, {"Profile": "full"})
    with pytest.raises(InputError, match="step train: "):
        check_start(older, {"TrainingInstanceType": "ml.none"})
