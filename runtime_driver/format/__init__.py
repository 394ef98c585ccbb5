"""The manifest of a lowered program: its schema, its reader and its errors. Needs pydantic and nothing heavier."""

from runtime_driver.format.errors import ManifestError, ManifestVersionError
from runtime_driver.format.evaluation import EvaluationSpec
from runtime_driver.format.manifest import FORMAT, FORMAT_VERSION, Manifest
from runtime_driver.format.names import content_name
from runtime_driver.format.schema import (
    AdapterFile,
    AdapterTensor,
    BatchSpec,
    EstimatorSpec,
    FileTensor,
    InputSpec,
    MethodSpec,
    ModelSpec,
    NoiseSpec,
    OutputSpec,
    ProgramFileSpec,
    WeightsFileSpec,
)

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "AdapterFile",
    "AdapterTensor",
    "BatchSpec",
    "EstimatorSpec",
    "EvaluationSpec",
    "FileTensor",
    "InputSpec",
    "Manifest",
    "ManifestError",
    "ManifestVersionError",
    "MethodSpec",
    "ModelSpec",
    "NoiseSpec",
    "OutputSpec",
    "ProgramFileSpec",
    "WeightsFileSpec",
    "content_name",
]
