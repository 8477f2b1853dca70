"""Write our pipeline with Amazon's SDK: `python sdk_oracle.py FILE`.

Only names and values come from our module; the form comes from the SDK."""
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sagemaker.core.model_metrics import MetricsSource, ModelMetrics
from sagemaker.core.processing import Processor
from sagemaker.core.shapes import (
    CheckpointConfig,
    OutputDataConfig,
    ProcessingInput,
    ProcessingOutput,
    ProcessingS3Input,
    ProcessingS3Output,
    StoppingCondition,
    TensorBoardOutputConfig,
)
from sagemaker.core.workflow.conditions import ConditionEquals, ConditionGreaterThanOrEqualTo
from sagemaker.core.workflow.execution_variables import ExecutionVariables
from sagemaker.core.workflow.functions import Join, JsonGet
from sagemaker.core.workflow.parameters import ParameterFloat, ParameterString
from sagemaker.core.workflow.pipeline_context import PipelineSession
from sagemaker.core.workflow.properties import PropertyFile
from sagemaker.mlops.workflow.condition_step import ConditionStep
from sagemaker.mlops.workflow.fail_step import FailStep
from sagemaker.mlops.workflow.model_step import ModelStep
from sagemaker.mlops.workflow.pipeline import Pipeline
from sagemaker.mlops.workflow.retry import (
    SageMakerJobExceptionTypeEnum,
    SageMakerJobStepRetryPolicy,
    StepExceptionTypeEnum,
    StepRetryPolicy,
)
from sagemaker.mlops.workflow.steps import CacheConfig, ProcessingStep, TrainingStep
from sagemaker.serve.model_builder import ModelBuilder
from sagemaker.train.configs import Compute, InputData
from sagemaker.train.model_trainer import ModelTrainer

from intel_nb.aws.package_group import SUPPORTED_TYPES
from intel_nb.aws.pipeline import (
    ACCURACY,
    CHOICES,
    ENTRY,
    PipelineConfig,
    code_environment,
    label_buckets,
    pipeline_parameters,
)

CODE, PROCESSING = code_environment(), "/opt/ml/processing"
CONFIG = PipelineConfig()
SESSION = PipelineSession(default_bucket=CONFIG.bucket)
SESSION._default_bucket = CONFIG.bucket
P = {name: ParameterFloat(name, default_value=default) if isinstance(default, float)
     else ParameterString(name, default_value=default, enum_values=CHOICES.get(name))
     for name, default in pipeline_parameters(CONFIG).items()}
CACHE = CacheConfig(enable_caching=True, expire_after="P30d")
STEP, JOB = StepExceptionTypeEnum, SageMakerJobExceptionTypeEnum
STEP_RETRY = StepRetryPolicy(exception_types=[STEP.SERVICE_FAULT, STEP.THROTTLING],
                             max_attempts=5, interval_seconds=10, backoff_rate=2.0)
RETRIES = [STEP_RETRY,
           SageMakerJobStepRetryPolicy(exception_types=[JOB.INTERNAL_ERROR],
                                       max_attempts=2, interval_seconds=60, backoff_rate=2.0),
           SageMakerJobStepRetryPolicy(exception_types=[JOB.CAPACITY_ERROR, JOB.RESOURCE_LIMIT],
                                       expire_after_mins=240, interval_seconds=300, backoff_rate=1.5)]


def run_uri(name: str) -> Join:
    runs = f"s3://{CONFIG.bucket}/{CONFIG.prefix}/runs"
    return Join(on="/", values=[runs, ExecutionVariables.PIPELINE_EXECUTION_ID, name])


def output_of(step: ProcessingStep, *path: str) -> Join:
    return Join(on="/", values=[step.properties.ProcessingOutputConfig.Outputs[step.name].S3Output.S3Uri, *path])


def processing_input(name: str, uri: object) -> ProcessingInput:
    return ProcessingInput(input_name=name, s3_input=ProcessingS3Input(
        s3_uri=uri, local_path=f"{PROCESSING}/input/{name}", s3_data_type="S3Prefix", s3_input_mode="File"))


def processing_output(name: str, folder: str, mode: str, uri: object = None) -> ProcessingOutput:
    return ProcessingOutput(output_name=name, s3_output=ProcessingS3Output(
        s3_uri=uri or run_uri(name), local_path=f"{PROCESSING}/{folder}", s3_upload_mode=mode))


def run_processor(role: str, inputs: dict, outputs: list, arguments: list, environment: Mapping[str, Any]) -> Any:
    processor = Processor(
        role=role, image_uri=CONFIG.image("steps"), entrypoint=ENTRY, sagemaker_session=SESSION,
        instance_count=1, instance_type=P["ProcessingInstanceType"], volume_size_in_gb=30,
        env={**CODE, **environment}, max_runtime_in_seconds=CONFIG.max_seconds)
    mounts = [processing_input(key, uri) for key, uri in inputs.items()]
    return processor.run(inputs=mounts, outputs=outputs, arguments=arguments)


def processing(name: str, notebook: str, inputs: dict, arguments: list, environment: Mapping[str, Any] = {},
               files: Sequence[PropertyFile] = ()) -> ProcessingStep:
    outputs = [processing_output(name, "output", "EndOfJob"), processing_output("executed", "executed", "Continuous")]
    run = run_processor(CONFIG.role, inputs, outputs, [notebook, *arguments], environment)
    return ProcessingStep(name, step_args=run, cache_config=CACHE, retry_policies=RETRIES, property_files=[*files])


def keep_step(inputs: dict, file: PropertyFile) -> ProcessingStep:
    uri = Join(on="/", values=[f"s3://{CONFIG.bucket}/registry", ExecutionVariables.PIPELINE_EXECUTION_ID])
    run = run_processor(CONFIG.registrar_role, inputs, [processing_output("keep", "output", "EndOfJob", uri)],
                        ["keep", P["Registry"]], {})
    return ProcessingStep("keep", step_args=run, retry_policies=RETRIES, property_files=[file])


def build() -> Pipeline:
    data = processing("data", "00_data.ipynb", {"archive": P["InputDataUrl"], "annotations": P["Annotations"]},
                      ["--param", f"buckets={','.join(label_buckets(CONFIG))}"],
                      {"INTEL_NB_DATA_VERSION": P["DataVersion"]})
    trainer = ModelTrainer(
        training_image=P["TrainingImage"], role=CONFIG.role, sagemaker_session=SESSION, base_job_name="train",
        compute=Compute(instance_type=P["TrainingInstanceType"], instance_count=1, volume_size_in_gb=50,
                        enable_managed_spot_training=False),
        stopping_condition=StoppingCondition(max_runtime_in_seconds=CONFIG.max_seconds),
        environment=CODE,
        output_data_config=OutputDataConfig(s3_output_path=run_uri("train")),
        checkpoint_config=CheckpointConfig(s3_uri=output_of(data, "checkpoints", *CODE.values()),
                                           local_path="/opt/ml/checkpoints"),
        input_data_config=[InputData(channel_name="dataset", data_source=output_of(data, "dataset"))],
    ).with_tensorboard_output_config(TensorBoardOutputConfig(s3_output_path=run_uri("tensorboard"),
                                                             local_path="/opt/ml/output/tensorboard"))
    train = TrainingStep("train", step_args=trainer.train(), cache_config=CACHE, retry_policies=RETRIES)
    file = PropertyFile(name="Evaluation", output_name="evaluate", path="evaluation.json")
    model = train.properties.ModelArtifacts.S3ModelArtifacts
    evaluate = processing(
        "evaluate", "02_evaluate.ipynb", {"dataset": output_of(data, "dataset"), "model": model},
        ["--param", Join(on="=", values=["min_accuracy", P["AccuracyThreshold"]]), "--param", "register=False",
         "--param", Join(on="=", values=["registry", P["Registry"]])],
        {"INTEL_NB_CHAMPION": P["ChampionVersion"]}, [file])
    kept = PropertyFile(name="Keep", output_name="keep", path="keep.json")
    whole = evaluate.properties.ProcessingOutputConfig.Outputs["evaluate"].S3Output.S3Uri
    keep = keep_step({"model": model, "evaluation": whole}, kept)

    def evaluation_entry(path: str) -> JsonGet:
        return JsonGet(step_name="evaluate", property_file=file, json_path=path)

    statistics = MetricsSource(content_type="application/json", s3_uri=output_of(keep, "evaluation.json"))
    builder = ModelBuilder(s3_model_data_url=output_of(keep, "model.tar.gz"), image_uri=CONFIG.image("serve"),
                           sagemaker_session=SESSION, role_arn=CONFIG.role)
    registered = builder.register(
        model_package_group_name=CONFIG.group, model_metrics=ModelMetrics(model_statistics=statistics),
        content_types=SUPPORTED_TYPES["SupportedContentTypes"],
        response_types=SUPPORTED_TYPES["SupportedResponseMIMETypes"], approval_status="PendingManualApproval",
        inference_instances=[CONFIG.instance_serve], transform_instances=[CONFIG.instance_serve],
        description=evaluation_entry("gate.reason"), customer_metadata_properties={
            "run_id": ExecutionVariables.PIPELINE_EXECUTION_ID, "fingerprint": evaluation_entry("fingerprints.package"),
            "data": evaluation_entry("fingerprints.data"), "dataset": output_of(data, "dataset")})
    accurate = ConditionGreaterThanOrEqualTo(left=evaluation_entry(ACCURACY), right=P["AccuracyThreshold"])
    passed = ConditionEquals(left=evaluation_entry("gate.passed"), right=True)
    register = ModelStep("register", step_args=registered, retry_policies=[STEP_RETRY])
    refuse = FailStep("refuse", error_message=evaluation_entry("gate.reason"))
    is_new = ConditionEquals(left=JsonGet(step_name="keep", property_file=kept, json_path="new"), right=True)
    once = ConditionStep("once", conditions=[accurate, passed, is_new], if_steps=[register], else_steps=[])
    gate = ConditionStep("gate", conditions=[accurate, passed], if_steps=[], else_steps=[refuse])
    return Pipeline(name="intel-nb", parameters=list(P.values()), steps=[data, train, evaluate, gate, keep, once],
                    sagemaker_session=SESSION, pipeline_experiment_config=None)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(build().definition())
