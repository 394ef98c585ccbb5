"""The manifest: what a driver must know to run a lowered program. Versioned, and validated whenever it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from runtime_driver.format import strict_json
from runtime_driver.format.errors import ManifestError, ManifestVersionError
from runtime_driver.format.evaluation import EvaluationSpec
from runtime_driver.format.files import read_regular
from runtime_driver.format.rules import (
    ManifestRuleError,
    check_adapter,
    check_batch,
    check_estimator,
    check_evaluation,
    check_files,
    check_methods,
)
from runtime_driver.format.schema import (
    AdapterFile,
    AdapterState,
    AdapterTensor,
    BatchSpec,
    EstimatorSpec,
    FileTensor,
    FreeForm,
    MethodSpec,
    ModelSpec,
    Name,
    NoiseSpec,
    OptimizerSpec,
    ProgramFileSpec,
    Trainable,
    WeightsFileSpec,
)

FORMAT = "mobizo"
#: The version that is written. Version 1 is read too; what it lacks has a default that means what it meant.
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)


class Manifest(BaseModel):
    """Everything about a lowered program that is not the program.

    ``adapter_state`` says where the step's adapter is. ``"external"``: among the inputs and outputs of ``step``.
    ``"internal"``: inside ``step``, which starts from the initial adapter when it is loaded and goes on from call to
    call; the adapter is then known only by applying the projected gradients that it returns.

    ``adapter_files``: what is written where when the adapter is saved. Version 1 has ``peft``, the configuration, and a
    key with each tensor instead; see :attr:`files`.

    ``backend``: the name under which the target's delegate registers itself with ExecuTorch's runtime; None: there is
    no delegate, or the manifest is of before the field.

    ``optimizer``: None for a step that is ``value − lr · gradient`` and nothing else.

    ``quantize``: in older manifests, and always null there; read, and no longer written.

    ``evaluation``: how losses of batches combine into the loss of all of them; None (version 1): it is not known.

    ``weights_file``: the file that the methods which run the model need beside the program; None: they need none.

    ``program_file``: in the ``.json`` beside a program, hash and size of that program; None in the program itself.

    Read one with :meth:`from_json`, :meth:`from_dict` or :meth:`load`, which raise :class:`ManifestError` or
    :class:`ManifestVersionError`. ``model_validate`` works too and raises pydantic's own error.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    format: Literal["mobizo"] = FORMAT
    format_version: Literal[1, 2] = FORMAT_VERSION
    mobizo_version: Name
    tool_versions: dict[str, str] = {}
    model: ModelSpec
    target: Name
    backend: Name | None = None
    quantize: str | None = Field(default=None, exclude=True)
    options: FreeForm = {}
    program_id: Name
    weights_file: WeightsFileSpec | None = None
    program_file: ProgramFileSpec | None = None
    estimator: EstimatorSpec
    optimizer: OptimizerSpec | None = None
    noise: NoiseSpec
    trainable: Trainable
    adapter_state: AdapterState = "external"
    adapter: tuple[AdapterTensor, ...]
    adapter_files: tuple[AdapterFile, ...] = ()
    peft: FreeForm | None = None
    batch: BatchSpec
    methods: dict[str, MethodSpec]
    evaluation: EvaluationSpec | None = None
    application: FreeForm = {}

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_adapter(self.adapter)
        check_files(self.adapter, self.adapter_files)
        check_batch(self.batch)
        check_estimator(self.estimator)
        check_methods(self.methods, self.adapter, self.batch, self.estimator, self.adapter_state)
        check_evaluation(self.evaluation, self.methods)
        return self

    @property
    def trainable_adapter(self) -> tuple[AdapterTensor, ...]:
        """The tensors that training changes, in the order in which the methods take and return them."""
        return tuple(tensor for tensor in self.adapter if tensor.trainable)

    @property
    def frozen_adapter(self) -> tuple[AdapterTensor, ...]:
        """The LoRA tensors that training leaves alone (``lora_A`` by default)."""
        return tuple(tensor for tensor in self.adapter if not tensor.trainable)

    @property
    def files(self) -> tuple[AdapterFile, ...]:
        """The directories of a saved adapter; of a program of version 1 the one that its ``peft_key``s make."""
        if self.adapter_files:
            return self.adapter_files
        tensors = (FileTensor(key=tensor.peft_key or tensor.fqn, fqn=tensor.fqn) for tensor in self.adapter)
        return (AdapterFile(config=self.peft, tensors=tuple(tensors)),)

    @classmethod
    def from_dict(cls, data: Any) -> Manifest:
        """Validate a decoded JSON document.

        Raises:
            ManifestVersionError: written in a format version that this release does not read.
            ManifestError: any other fault; ``.field`` is the path of the first offending field.
        """
        if not isinstance(data, dict):
            raise ManifestError("manifest", f"expected a JSON object, found {type(data).__name__}")
        if data.get("format") != FORMAT:
            raise ManifestError(
                "format",
                f"expected {FORMAT!r}, found {data.get('format')!r}",
                "Give a manifest or a .pte file that mobizo wrote.",
            )
        version = data.get("format_version")
        if type(version) is not int or version not in READABLE_VERSIONS:
            raise ManifestVersionError(version, READABLE_VERSIONS)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise _explain(error) from error

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Parse and validate. Raises as :meth:`from_dict`, and :class:`ManifestError` for text that is not JSON."""
        try:
            data = strict_json.loads(text)
        except strict_json.StrictJsonError as error:
            raise ManifestError("manifest", f"expected JSON, but the text does not parse ({error})") from error
        return cls.from_dict(data)

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Read ``model.json``. Raises as :meth:`from_json`, and :class:`ManifestError` for an unreadable file."""
        try:
            text = read_regular(path)
        except OSError as error:
            raise ManifestError("manifest", f"cannot read {path} ({error.strerror})", "Check the path.") from error
        return cls.from_json(text)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values (lists, not tuples), in the order of the fields."""
        return self.model_dump(mode="json")

    def to_json(self, indent: int | None = None) -> str:
        """ASCII JSON text (other characters escaped), the form that is embedded in a .pte file."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=True, allow_nan=False)


def _explain(error: ValidationError) -> ManifestError:
    details: ErrorDetails = error.errors(include_url=False)[0]
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, ManifestRuleError):
        return ManifestError(cause.field, cause.problem)
    field = ".".join(str(part) for part in details["loc"]) or "manifest"
    kind = details["type"]
    if kind == "missing":
        return ManifestError(field, "is required, and absent")
    if kind == "extra_forbidden":
        return ManifestError(field, f"is not a field of format versions 1 to {FORMAT_VERSION}")
    message = details["msg"]
    return ManifestError(field, f"{message[0].lower()}{message[1:]}; found {_short(details['input'])}")


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
