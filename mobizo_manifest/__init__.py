"""The manifest of a lowered program: its schema, its reader and its errors. Needs pydantic and nothing heavier."""

from mobizo_manifest.errors import ManifestError, ManifestVersionError
from mobizo_manifest.evaluation import EvaluationSpec
from mobizo_manifest.manifest import FORMAT, FORMAT_VERSION, Manifest
from mobizo_manifest.names import content_name
from mobizo_manifest.schema import (
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
