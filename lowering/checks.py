"""What must hold of a program before and after lowering."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from executorch.exir.schema import ExecutionPlan, ScalarType, Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from lowering.errors import FrozenInput, InvalidProgram, MethodMismatch
from mobizo_manifest import Manifest, MethodSpec

_DTYPES = {
    ScalarType.FLOAT: "float32",
    ScalarType.DOUBLE: "float64",
    ScalarType.HALF: "float16",
    ScalarType.BFLOAT16: "bfloat16",
    ScalarType.LONG: "int64",
    ScalarType.INT: "int32",
    ScalarType.SHORT: "int16",
    ScalarType.CHAR: "int8",
    ScalarType.BYTE: "uint8",
    ScalarType.BOOL: "bool",
}


def check_program(method: str, program: ExportedProgram, spec: MethodSpec) -> None:
    """The transform's program has as many inputs and outputs as its manifest says, and mutates nothing.

    Raises:
        InvalidProgram: it has not.
    """
    signature = program.graph_signature
    counts = (len(signature.user_inputs), len(signature.user_outputs))
    expected = (len(spec.inputs), len(spec.outputs))
    if counts != expected:
        raise InvalidProgram(
            f"method {method!r}: the manifest lists {expected[0]} inputs and {expected[1]} outputs, the program has "
            f"{counts[0]} and {counts[1]}; transform the model anew with this version of mobizo_passes"
        )
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        written = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
        raise InvalidProgram(
            f"method {method!r} writes to {sorted(set(written.values()))} in place; expected a pure function of tensors"
        )


def check_inputs_alive(method: str, before: ExportedProgram, after: ExportedProgram, spec: MethodSpec) -> None:
    """Every input that the program read before lowering is still an input that something reads.

    Raises:
        FrozenInput: naming the first that is not.
    """
    old, new = _inputs(before), _inputs(after)
    if len(old) != len(new):
        raise FrozenInput(method, spec.inputs[0].name, f"{len(old)} inputs became {len(new)}")
    for described, was, now in zip(spec.inputs, old, new, strict=True):
        if was.users and not now.users:
            raise FrozenInput(method, described.name, "nothing reads it any more")


def check_methods(plans: Mapping[str, ExecutionPlan], manifest: Manifest) -> None:
    """The serialised methods take and give tensors of the dtypes and shapes that the manifest lists.

    Raises:
        MethodMismatch: naming the first method that does not.
    """
    for name, spec in manifest.methods.items():
        plan = plans.get(name)
        if plan is None:
            raise MethodMismatch(name, "methods", sorted(manifest.methods), sorted(plans))
        for what, described, indices in (("inputs", spec.inputs, plan.inputs), ("outputs", spec.outputs, plan.outputs)):
            expected = [(each.dtype, tuple(each.shape)) for each in described]
            found = [_tensor(plan.values[index].val) for index in indices]
            if expected != found:
                raise MethodMismatch(name, what, *_first_difference(expected, found))


def _inputs(program: ExportedProgram) -> list[Node]:
    names = set(program.graph_signature.user_inputs)
    return [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]


def _tensor(value: Any) -> tuple[str, tuple[int, ...]]:
    if not isinstance(value, Tensor):
        return (type(value).__name__, ())
    return (_DTYPES.get(value.scalar_type, value.scalar_type.name), tuple(value.sizes))


def _first_difference(expected: list[Any], found: list[Any]) -> tuple[str, str]:
    if len(expected) != len(found):
        return f"{len(expected)} tensors", f"{len(found)} tensors"
    index = next(i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
    return f"{expected[index]} at {index}", f"{found[index]} at {index}"
