"""What the pipeline's cache answers: a pretended service carries out the definition, without any job.

SageMaker compares the arguments of a step that are listed in `COMPARED`, with all references resolved. Where a step
ran before with the same ones, its outputs are those of that earlier execution.
"""
import hashlib
import json
import shutil
from dataclasses import dataclass, field
from typing import Any

import pytest

from intel_nb.aws.definition import (
    Scope,
    bind_parameters,
    evaluate_condition,
    execution_values,
    lookup_path,
    resolve_value,
    sort_steps,
    step_arguments,
)
from intel_nb.aws.pipeline import EVALUATION, NEW, NOTEBOOKS, PipelineConfig, pipeline_definition
from intel_nb.chain.plan import notebooks_folder

COMPARED = {  # from the developer guide, "Caching pipeline steps"
    "Processing": ("AppSpecification", "Environment", "ProcessingInputs"),
    "Training": ("AlgorithmSpecification", "CheckpointConfig", "Environment", "HyperParameters", "InputDataConfig")}


@dataclass
class PretendedService:
    "A service with a cache and a registry: what a step would compute is a digest of what the cache compares."
    definition: dict
    cache: dict[str, dict] = field(default_factory=dict)  # what a step's job is described as, by what is compared
    registry: list[tuple[str, ...]] = field(default_factory=list)  # package, data and threshold of each version
    count: int = 0

    def start(self, **values: str) -> dict[str, str]:
        "Carry out an execution; return the steps that ran, each with `ran` or `cached`."
        self.count += 1
        execution = Execution(self, f"execution{self.count}", bind_parameters(self.definition, values))
        execution.run(self.definition["Steps"])
        return execution.ended


@dataclass
class Execution:
    service: PretendedService
    id: str
    values: dict[str, Any]
    results: dict[str, dict] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)

    @property
    def scope(self) -> Scope:
        return Scope(self.get, lambda file, path: lookup_path(self.results[file.split(".")[1]]["file"], path))

    def get(self, path: str) -> Any:
        root, _, rest = path.partition(".")
        name, _, inside = rest.partition(".")
        if root == "Steps":
            return lookup_path(self.results[name], inside)
        return self.values[rest] if root == "Parameters" else execution_values(self.id)[rest]

    def run(self, steps: list[dict]) -> None:
        for step in sort_steps(steps):
            if step["Type"] == "Condition":
                taken = all(evaluate_condition(one, self.scope) for one in step["Arguments"]["Conditions"])
                self.run(step["Arguments"]["IfSteps" if taken else "ElseSteps"])
                continue
            arguments = resolve_value(step_arguments(step), self.scope)
            compared = {name: arguments.get(name) for name in COMPARED.get(step["Type"], ())}
            key = hashlib.sha256(json.dumps([step["Name"], compared]).encode()).hexdigest()
            known = self.service.cache.get(key) if "CacheConfig" in step else None
            self.results[step["Name"]] = known or self.describe(step["Name"], arguments, key)
            self.ended[step["Name"]] = "cached" if known else "ran"
            if "CacheConfig" in step:
                self.service.cache[key] = self.results[step["Name"]]

    def describe(self, name: str, arguments: dict, key: str) -> dict:
        "Return a step's job as the service would describe it, with the content of its property file."
        if name == "register":
            self.service.registry.append(self.identity())
        outputs = arguments.get("ProcessingOutputConfig", {}).get("Outputs", [])
        described = {"Outputs": {output["OutputName"]: output for output in outputs}}
        model = f"{arguments.get('OutputDataConfig', {}).get('S3OutputPath')}/model.tar.gz"
        return arguments | {"ProcessingOutputConfig": described, "ModelArtifacts": {"S3ModelArtifacts": model},
                            "digest": key, "file": self.written(name)}

    def written(self, name: str) -> dict:
        if name == "evaluate":
            prints = {"package": self.results["train"]["digest"], "data": self.results["data"]["digest"]}
            return EVALUATION | {"fingerprints": prints}
        return {NEW: self.identity() not in self.service.registry} if name == "keep" else {}

    def identity(self) -> tuple[str, ...]:
        prints = self.results["evaluate"]["file"]["fingerprints"]
        return prints["package"], prints["data"], str(self.values["AccuracyThreshold"])


@pytest.fixture
def service() -> PretendedService:
    found = PretendedService(pipeline_definition(PipelineConfig()))
    assert set(found.start(DataVersion="one").values()) == {"ran"}
    assert len(found.registry) == 1
    return found


def test_the_same_start_is_answered_from_the_cache_and_registers_nothing(service):
    "An event that comes twice, or late."
    assert service.start(DataVersion="one") == {
        "data": "cached", "train": "cached", "evaluate": "cached", "keep": "ran"}
    assert len(service.registry) == 1


def test_another_archive_at_the_same_address_is_trained_on(service):
    assert set(service.start(DataVersion="two").values()) == {"ran"}
    assert len(service.registry) == 2


def test_another_champion_is_compared_with(service):
    "The package is the same, so its version is too."
    ended = service.start(DataVersion="one", ChampionVersion="3")
    assert ended == {"data": "cached", "train": "cached", "evaluate": "ran", "keep": "ran"}
    assert len(service.registry) == 1


def test_another_threshold_is_another_verdict(service):
    ended = service.start(DataVersion="one", AccuracyThreshold="0.85")
    assert ended == {"data": "cached", "train": "cached", "evaluate": "ran", "keep": "ran", "register": "ran"}
    assert service.start(DataVersion="one").get("register") is None, "the first verdict is known still"
    assert len(service.registry) == 2


def test_other_settings_train_again_on_the_same_dataset(service):
    ended = service.start(DataVersion="one", TrainSettings='{"seed": 1}')
    assert ended == {"data": "cached", "train": "ran", "evaluate": "ran", "keep": "ran", "register": "ran"}


def test_other_code_takes_no_result_of_this_code(service, tmp_path, monkeypatch):
    for notebook in NOTEBOOKS.values():
        shutil.copy(notebooks_folder() / notebook, tmp_path)
    (tmp_path / NOTEBOOKS["evaluate"]).write_text("{}")
    monkeypatch.setenv("INTEL_NB_NOTEBOOKS", str(tmp_path))
    service.definition = pipeline_definition(PipelineConfig())
    assert set(service.start(DataVersion="one").values()) == {"ran"}


def test_another_image_takes_no_result_of_this_image(service):
    "An image is named by its digest, so that is so for one that was built again."
    service.definition = pipeline_definition(PipelineConfig(image_steps="repository@sha256:" + 64 * "1"))
    assert set(service.start(DataVersion="one").values()) == {"ran"}
