"""The steps deploy and staging as papermill runs them: against a real registry and a real endpoint."""
import json
from functools import partial
from pathlib import Path

import numpy as np
import papermill
import pytest

from intel_nb.dataset import read_split, sample_dataset, write_predictions
from intel_nb.model import load_package, sample_package
from intel_nb.registry import open_registry
from intel_nb.serving.endpoints import LocalEndpoints

NOTEBOOKS = Path(__file__).parents[1] / "nbs"
pytestmark = pytest.mark.slow


def run(name: str, tmp_path: Path, **parameters) -> dict:
    "The result of a step's notebook."
    given = parameters | {"out_dir": str(tmp_path / "out")}
    papermill.execute_notebook(NOTEBOOKS / name, tmp_path / name, given, progress_bar=False)
    return json.loads((tmp_path / "out" / "result.json").read_text())


def test_an_approved_version_is_deployed_and_tested(tmp_path):
    package = load_package(sample_package(tmp_path / "model"))
    registry = open_registry(f"sqlite:///{tmp_path / 'mlflow.db'}")
    figures = {"multiclass_classification_metrics": {"accuracy": {"value": 0.9}}, "fingerprints": {"data": "d"}}
    version = registry.register(package.path, figures, status="PendingManualApproval", reason="passed", params={})
    endpoints = LocalEndpoints(tmp_path / "endpoints")
    places = {"registry": f"sqlite:///{tmp_path / 'mlflow.db'}", "endpoints": str(tmp_path / "endpoints")}
    with pytest.raises(papermill.PapermillExecutionError, match=f"intel-nb approve {version}"):
        run("03_deploy.ipynb", tmp_path, version=version, **places)
    assert endpoints.list() == []
    registry.set_status(version, "Approved")
    try:
        deployed = run("03_deploy.ipynb", tmp_path, version=version, **places)
        assert endpoints.describe("staging").status == "running"  # the kernel is gone, the endpoint is not
        assert (deployed["url"], deployed["version"]) == (endpoints.describe("staging").url, version)

        split = read_split(sample_dataset(tmp_path / "dataset"), "test")
        true = package.predict_bytes(split.images)["probabilities"]
        about = {"batch_tolerance": 1e-5, "fingerprint": package.fingerprint}
        write_predictions(tmp_path / "true.parquet", split, true, **about)
        write_predictions(tmp_path / "false.parquet", split, np.roll(true, 1, axis=1), **about)
        asked = {"url": deployed["url"], "dataset": str(tmp_path / "dataset"), "sample": 12}
        test_of = partial(run, "05_test_staging.ipynb", tmp_path, version=version, **asked)
        result = test_of(predictions=str(tmp_path / "true.parquet"))
        assert result["passed"] and result["images"] == 12
        with pytest.raises(papermill.PapermillExecutionError, match="a probability differs"):
            test_of(predictions=str(tmp_path / "false.parquet"))
        with pytest.raises(papermill.PapermillExecutionError, match=f"version {version} answered, not 99"):
            run("05_test_staging.ipynb", tmp_path, version="99", predictions=str(tmp_path / "true.parquet"), **asked)
        assert not json.loads((tmp_path / "out" / "staging.json").read_text())["passed"]
    finally:
        endpoints.stop("staging")
