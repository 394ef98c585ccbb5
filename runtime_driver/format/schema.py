"""The manifest's fields. One class per JSON object; all immutable; unknown keys are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

InputRole = Literal["adapter", "optimizer", "batch", "seed", "lr", "eps", "projected_gradients"]
OutputRole = Literal[
    "loss",
    "losses",
    "projected_gradients",
    "gradient",
    "adapter",
    "optimizer",
    "logits",
    "loss_sum",
    "loss_weight",
    "loss_scalar",
]
NoiseKind = Literal["gaussian", "rademacher"]
#: Factors of LoRA sites; all parameters that require gradients; or parameters that were named.
Trainable = Literal["lora_B", "lora_A+lora_B", "requires_grad", "parameters"]
#: Where the step's adapter is: passed in and returned, or held and written inside the step method.
AdapterState = Literal["external", "internal"]

#: dtype names as torch prints them without the ``torch.`` prefix.
DType = Literal["float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"]

# Strict: pydantic would take `true`, "1" and 1.0 for the number 1.
Dim = Annotated[StrictInt, Field(ge=0)]
Count = Annotated[StrictInt, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
#: Free-form JSON, written by one tool and read back by the same tool.
FreeForm = dict[str, Any]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class ModelSpec(_Record):
    """The frozen model: its class name and a hash over all frozen tensors (FQN and bytes, sorted by FQN)."""

    name: Name
    sha256: Name


class WeightsFileSpec(_Record):
    """The file with the weights that are not in the program.

    ``file`` is its name, in the program's directory (``None``: the program's own name, ending in ``.ptd``); ``sha256``
    and ``bytes`` are those of the whole file.
    """

    # Neither a path, nor `.` or `..`.
    file: Annotated[str, Field(pattern=r"^[^/\\\x00]*[^/\\\x00.][^/\\\x00]*$")] | None = None
    sha256: Sha256
    bytes: Dim


class ProgramFileSpec(_Record):
    """The program file that a manifest belongs to: SHA-256 and size of all of its bytes.

    It stands in the ``.json`` beside a program only: a file cannot hold its own hash.
    """

    sha256: Sha256
    bytes: Dim


class EstimatorSpec(_Record):
    """How the projected gradients are formed; ``groups`` is P, the number of copies of the batch in one forward.

    With 0 ``queries`` the gradient is exact: there are no projected gradients, no seed and no epsilon. Where ``step``
    has no input with the role ``eps`` otherwise, projected gradients are directional derivatives: the copies are of
    tangents, and its one loss is that of the adapter itself.

    ``kind`` is a name for people: the other fields say what has to be known. ``normalize``: what the projected
    gradients that the step returns are already divided by; ``"std"`` is the standard deviation of the losses of
    ``perturbed_groups`` (``None``: of all). No projected gradient, before it is normalized, is off by more than
    ``error_factor``·error/ε when no loss is off by more than that error. ``checkpoint``: with ``"layer"``, an exact
    gradient holds the layers' inputs and computes the rest again.
    """

    kind: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    queries: Dim
    groups: Count
    normalize: Literal["std"] | None = None
    perturbed_groups: tuple[Dim, ...] | None = None
    error_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    checkpoint: Literal["layer"] | None = None


class OptimizerSpec(_Record):
    """What makes a step of a gradient: a name for people, and its numbers.

    Its state is what the step takes and returns with the role ``optimizer``; all of it is zero before the first step.
    """

    kind: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    options: FreeForm = {}


class NoiseSpec(_Record):
    """The perturbation's distribution, and the version of the function that produces its bits."""

    kind: NoiseKind
    version: Count


class AdapterTensor(_Record):
    """One tensor of the adapter: its FQN in the model.

    ``peft_key`` is its key in the adapter's file, where the manifest has no ``adapter_files`` (format version 1).
    """

    fqn: Name
    shape: tuple[Dim, ...]
    dtype: DType
    trainable: StrictBool
    peft_key: Name | None = None


class FileTensor(_Record):
    """One key of an adapter's file, and the FQN of the adapter tensor that is stored under it.

    With ``dim`` only the entries ``index`` of that dimension are stored.
    """

    key: Name
    fqn: Name
    dim: Dim | None = None
    index: tuple[Dim, ...] = ()


class AdapterFile(_Record):
    """One directory of a saved adapter: ``directory`` below its path ("" for itself), what PEFT's
    ``adapter_config.json`` says (None: there is none), and the tensors of ``adapter_model.safetensors``.
    """

    directory: str = ""
    config: FreeForm | None = None
    tensors: tuple[FileTensor, ...]


class BatchSpec(_Record):
    """The batch that the program was compiled for.

    ``max_labels``: the step and loss programs read at most that many labelled (``!= ignore_index``) positions of each
    example (``None``: no limit). ``shift``: the model itself shifts the labels by one, so position 0 never counts.
    ``dims``: the dimension of each input that holds the batch (``None``: it holds none); without it, dimension 0 of
    every input whose size there is ``size``. ``logits_dim``: that of the logits, ``None`` if no dimension of theirs is
    the batch. ``class_inputs``: the inputs that name classes, whose values are columns of the logits; without it, all
    label inputs.
    """

    size: Count
    inputs: tuple[Name, ...]
    label_inputs: tuple[Name, ...] = ()
    max_labels: Count | None = None
    ignore_index: StrictInt | None = None
    shift: StrictBool = False
    dims: dict[Name, Dim | None] | None = None
    logits_dim: Dim | None = 0
    class_inputs: tuple[Name, ...] | None = None


class InputSpec(_Record):
    """One positional input of a method. Adapter inputs are named by FQN, batch inputs by the model's input name."""

    name: Name
    dtype: DType
    shape: tuple[Dim, ...]
    role: InputRole


class OutputSpec(_Record):
    """One positional output of a method. Adapter outputs are named by FQN."""

    name: Name
    dtype: DType
    shape: tuple[Dim, ...]
    role: OutputRole


class MethodSpec(_Record):
    """A method's positional inputs and outputs."""

    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
