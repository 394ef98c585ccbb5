"""Rules that span several fields of a manifest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from runtime_driver.format.evaluation import EvaluationSpec, faults
from runtime_driver.format.schema import (
    AdapterFile,
    AdapterState,
    AdapterTensor,
    BatchSpec,
    EstimatorSpec,
    InputSpec,
    MethodSpec,
    OutputSpec,
)

#: The methods of a lowered program whose tensors the manifest describes. Only ``step`` is compulsory.
KNOWN_METHODS = ("step", "apply", "loss", "logits", "gradients")


class ManifestRuleError(ValueError):
    """A broken rule; a ``ValueError`` so that pydantic collects it, with the field kept apart from the prose."""

    def __init__(self, field: str, problem: str) -> None:
        self.field = field
        self.problem = problem
        super().__init__(f"{field}: {problem}")


def _duplicates(names: Iterable[str]) -> list[str]:
    seen: set[str] = set()
    return sorted({name for name in names if name in seen or seen.add(name)})


def check_adapter(adapter: Sequence[AdapterTensor]) -> None:
    """Names are unique, at least one tensor is trainable, and the trainable ones come first."""
    for attribute in ("fqn", "peft_key"):
        names = (getattr(tensor, attribute) for tensor in adapter)
        repeated = _duplicates(name for name in names if name is not None)
        if repeated:
            raise ManifestRuleError("adapter", f"`{attribute}` must be unique, but {repeated} occurs more than once")
    flags = [tensor.trainable for tensor in adapter]
    if not any(flags):
        raise ManifestRuleError("adapter", "expected at least one trainable tensor, found none")
    if flags != sorted(flags, reverse=True):
        first = adapter[flags.index(False)].fqn
        raise ManifestRuleError("adapter", f"trainable tensors come first, but the frozen `{first}` precedes one")


def check_files(adapter: Sequence[AdapterTensor], files: Sequence[AdapterFile]) -> None:
    """Paths stay below the adapter's own, keys are unique, every tensor is known, every trainable one is stored."""
    if not files:
        lacking = [tensor.fqn for tensor in adapter if tensor.peft_key is None]
        if lacking:
            raise ManifestRuleError("adapter", f"without `adapter_files`, `{lacking[0]}` needs a `peft_key`")
        return
    specs = {tensor.fqn: tensor for tensor in adapter}
    repeated = _duplicates(file.directory for file in files)
    if repeated:
        raise ManifestRuleError("adapter_files", f"`directory` must be unique, but {repeated} occurs more than once")
    for file in files:
        if file.directory and not all(part.strip(".") for part in re.split(r"[/\\]", file.directory)):
            raise ManifestRuleError("adapter_files", f"expected a path below the adapter's, found {file.directory!r}")
        repeated = _duplicates(tensor.key for tensor in file.tensors)
        if repeated:
            raise ManifestRuleError("adapter_files", f"`key` must be unique, but {repeated} occurs more than once")
        for tensor in file.tensors:
            spec = specs.get(tensor.fqn)
            if spec is None:
                raise ManifestRuleError("adapter_files", f"`{tensor.fqn}` is not one of `adapter`")
            if tensor.dim is not None and (
                tensor.dim >= len(spec.shape) or any(i >= spec.shape[tensor.dim] for i in tensor.index)
            ):
                raise ManifestRuleError("adapter_files", f"`{tensor.key}` selects beyond {list(spec.shape)}")
    stored = {tensor.fqn for file in files for tensor in file.tensors}
    for tensor in adapter:
        if tensor.trainable and tensor.fqn not in stored:
            raise ManifestRuleError("adapter_files", f"the trainable `{tensor.fqn}` is stored in none of them")


def check_batch(batch: BatchSpec) -> None:
    """Input names are unique and hold every label input."""
    repeated = _duplicates(batch.inputs)
    if repeated:
        raise ManifestRuleError("batch.inputs", f"names must be unique, but {repeated} occurs more than once")
    for name in batch.label_inputs:
        if name not in batch.inputs:
            raise ManifestRuleError("batch.label_inputs", f"`{name}` is not one of batch.inputs {list(batch.inputs)}")
    for name in batch.dims or {}:
        if name not in batch.inputs:
            raise ManifestRuleError("batch.dims", f"`{name}` is not one of batch.inputs {list(batch.inputs)}")


def check_methods(
    methods: Mapping[str, MethodSpec],
    adapter: Sequence[AdapterTensor],
    batch: BatchSpec,
    estimator: EstimatorSpec,
    state: AdapterState,
) -> None:
    """Each method takes and returns the tensors that the driver will bind, by role."""
    if "step" not in methods:
        raise ManifestRuleError("methods", f"expected a method `step`, found {sorted(methods)}")
    for name, spec in methods.items():
        if name not in KNOWN_METHODS:
            raise ManifestRuleError(f"methods.{name}", f"expected one of {list(KNOWN_METHODS)}")
        inside = name == "step" and state == "internal"
        _check_adapter_io(name, spec, () if inside else adapter)
        for item in spec.inputs:
            if item.role == "batch" and item.name not in batch.inputs:
                raise ManifestRuleError(f"methods.{name}.inputs", f"`{item.name}` is not one of {list(batch.inputs)}")
            dim = (batch.dims or {}).get(item.name)
            if dim is not None and (dim >= len(item.shape) or item.shape[dim] != batch.size):
                raise ManifestRuleError(
                    f"batch.dims.{item.name}",
                    f"dimension {dim} of {list(item.shape)} does not hold the batch of {batch.size}",
                )
    if state == "internal" and "apply" not in methods:
        raise ManifestRuleError(
            "methods", "expected a method `apply`: an adapter inside the program is known only through it"
        )
    step = methods["step"]
    exact = estimator.queries == 0
    _need(step.inputs, "methods.step.inputs", ("lr",) if exact else ("seed", "lr"))
    _need(step.outputs, "methods.step.outputs", ("loss",) if exact else ("loss", "projected_gradients"))
    if exact and "apply" in methods:
        raise ManifestRuleError("methods", "an exact estimator (estimator.queries is 0) has no method `apply`")
    _check_state(methods)
    _check_queries("methods.step.outputs", step.outputs, estimator)
    if "apply" in methods:
        _need(methods["apply"].inputs, "methods.apply.inputs", ("seed", "lr", "projected_gradients"))
        _check_queries("methods.apply.inputs", methods["apply"].inputs, estimator)
    if "loss" in methods:
        _need(methods["loss"].outputs, "methods.loss.outputs", ("loss",))
    if "logits" in methods:
        _need(methods["logits"].outputs, "methods.logits.outputs", ("logits",))


def check_estimator(estimator: EstimatorSpec) -> None:
    """The perturbed groups are some of all; there are some unless the gradient is exact."""
    if estimator.queries and estimator.perturbed_groups == ():
        raise ManifestRuleError("estimator.perturbed_groups", "expected at least one group, found none")
    beyond = [group for group in estimator.perturbed_groups or () if group >= estimator.groups]
    if beyond:
        raise ManifestRuleError(
            "estimator.perturbed_groups", f"group {beyond[0]} is beyond estimator.groups, {estimator.groups}"
        )


def check_evaluation(evaluation: EvaluationSpec | None, methods: Mapping[str, MethodSpec]) -> None:
    """What the evaluation reads is an output of `loss`, and every step reads what is known by then."""
    if evaluation is not None:
        outputs = [item.name for item in methods["loss"].outputs] if "loss" in methods else []
        problem = faults(evaluation, outputs)
        if problem:
            raise ManifestRuleError("evaluation", problem)


def _check_adapter_io(name: str, spec: MethodSpec, adapter: Sequence[AdapterTensor]) -> None:
    expected = [(tensor.fqn, tensor.shape, tensor.dtype) for tensor in adapter if tensor.trainable]
    sides: list[tuple[str, Sequence[InputSpec | OutputSpec]]] = [("inputs", spec.inputs)]
    if name in ("step", "apply"):
        sides.append(("outputs", spec.outputs))
    for side, items in sides:
        problem = f"the adapter tensors must be the trainable ones of `adapter`, in order: expected {len(expected)}"
        _check_tensors(f"methods.{name}.{side}", items, "adapter", expected, problem)


def _check_state(methods: Mapping[str, MethodSpec]) -> None:
    """The optimizer's state is the same on every side that has it: what goes in comes out."""
    expected = _described(methods["step"].inputs, "optimizer")
    problem = f"the optimizer's state must be that of `step`'s inputs, in order: expected {len(expected)} tensors"
    for name in ("step", "apply"):
        spec = methods.get(name)
        for side, items in (("inputs", spec.inputs), ("outputs", spec.outputs)) if spec else ():
            _check_tensors(f"methods.{name}.{side}", items, "optimizer", expected, problem)


def _described(items: Sequence[InputSpec | OutputSpec], role: str) -> list[tuple[object, ...]]:
    return [(item.name, item.shape, item.dtype) for item in items if item.role == role]


def _check_tensors(
    field: str, items: Sequence[InputSpec | OutputSpec], role: str, expected: Sequence[object], problem: str
) -> None:
    """The items of a role are the expected ones, in order."""
    found = _described(items, role)
    if found != expected:
        raise ManifestRuleError(
            field, f"{problem}, found {len(found)}; first difference: {_first_difference(expected, found)}"
        )


def _first_difference(expected: Sequence[object], found: Sequence[object]) -> str:
    for left, right in zip(expected, found, strict=False):
        if left != right:
            return f"{left} against {right}"
    return "the count"


def _need(items: Sequence[InputSpec | OutputSpec], field: str, roles: Sequence[str]) -> None:
    for role in roles:
        count = sum(item.role == role for item in items)
        if count != 1:
            raise ManifestRuleError(field, f"expected exactly one tensor with role `{role}`, found {count}")


def _check_queries(field: str, items: Sequence[InputSpec | OutputSpec], estimator: EstimatorSpec) -> None:
    for item in items:
        if item.role == "projected_gradients" and item.shape != (estimator.queries,):
            raise ManifestRuleError(
                field, f"`{item.name}` has shape {list(item.shape)}, but estimator.queries is {estimator.queries}"
            )
