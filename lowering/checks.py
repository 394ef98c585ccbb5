"""What must hold of a program before and after lowering."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from executorch.exir.schema import ExecutionPlan, ScalarType, Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from lowering.errors import FrozenInput, InvalidProgram, KernelMissing, MethodMismatch, StateLost
from lowering.executorch_compat.runtime import registered_operators
from mobizo_passes.graph.facts import module_of, source_line
from mobizo_passes.graph.operators import operation_name, overload_name
from runtime_driver.format import Manifest, MethodSpec

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


def check_program(
    method: str, program: ExportedProgram, spec: MethodSpec, state: Collection[str] = frozenset()
) -> None:
    """The transform's program has as many inputs and outputs as its manifest says, and mutates `state` alone.

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
    written = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}.values()
    if set(written) != set(state):
        expected = f"only {sorted(state)}" if state else "a pure function of tensors"
        raise InvalidProgram(f"method {method!r} writes to {sorted(set(written))} in place; expected {expected}")


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


def check_state(method: str, before: ExportedProgram, partitioned: ExportedProgram, state: Collection[str]) -> None:
    """After partitioning each tensor of `state` is a buffer outside of all delegates, written, and read as `before`.

    A delegate that took the buffer in would hold its initial value as a constant: the program would run, give a loss,
    and never learn.

    Raises:
        StateLost: naming the first that is not.
    """
    nodes = {node.name: node for node in partitioned.graph.nodes}
    written = {fqn: nodes[name] for name, fqn in partitioned.graph_signature.buffers_to_mutate.items()}
    delegates = [
        getattr(partitioned.graph_module, node.args[0].target).original_module
        for node in partitioned.graph.nodes
        if operation_name(node) == "executorch_call_delegate"
    ]
    for fqn in state:
        if any(fqn in each.graph_signature.inputs_to_buffers.values() for each in delegates):
            raise StateLost(method, fqn, "was taken into a delegate, as a constant")
        if fqn not in written or written[fqn].op != "call_function":
            raise StateLost(method, fqn, "is no longer written")
        lost = _outputs_of(before, fqn) - _outputs_of(partitioned, fqn)
        if lost:
            raise StateLost(method, fqn, f"is no longer read for output {min(lost)}")


def check_initial_values(method: str, plan: ExecutionPlan, state: Collection[str]) -> None:
    """The serialized method has a stored initial value for each tensor of `state`.

    ExecuTorch keeps a mutated buffer's shape alone unless told otherwise; it would start from whatever memory holds.

    Raises:
        StateLost: there are fewer.
    """
    tensors = [value.val for value in plan.values if isinstance(value.val, Tensor)]
    # Only a buffer that is both written and initialized has a place in memory and one in the file; so have its views.
    places = (each.allocation_info for each in tensors if each.data_buffer_idx > 0)
    stored = len({(p.memory_id, p.memory_offset_low, p.memory_offset_high) for p in places if p is not None})
    if stored != len(state):
        missing = f"or another of {len(state)} has no stored initial value: {stored} have one"
        raise StateLost(method, next(iter(state), ""), missing)


def check_methods(plans: Mapping[str, ExecutionPlan], manifest: Manifest) -> None:
    """The serialized methods take and give tensors of the dtypes and shapes that the manifest lists.

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


def check_kernels(plans: Mapping[str, ExecutionPlan], programs: Mapping[str, ExportedProgram]) -> None:
    """ExecuTorch's runtime, as installed here, has a kernel for every operator outside of the delegates.

    `programs`: the methods before they were partitioned, in which an operator's node is looked up.

    Raises:
        KernelMissing: it has none for an operator; loading the method would fail.
    """
    known = registered_operators()
    if known is None:
        return
    for method, plan in plans.items():
        for operator in plan.operators:
            name = f"{operator.name}.{operator.overload}" if operator.overload else operator.name
            if name in known:
                continue
            node = next((n for n in programs[method].graph.nodes if _is_call(n, operator.name)), None)
            if node is None:
                raise KernelMissing(method, "?", name, "", "")
            raise KernelMissing(method, node.name, overload_name(node), module_of(node), source_line(node))


def _is_call(node: Node, schema: str) -> bool:
    return node.op == "call_function" and operation_name(node) == schema.split("::")[-1]


def _outputs_of(program: ExportedProgram, fqn: str) -> set[int]:
    """Positions of the user outputs that depend on a buffer."""
    signature = program.graph_signature
    name = next((name for name, each in signature.inputs_to_buffers.items() if each == fqn), None)
    reached: set[str] = set()
    for node in program.graph.nodes:
        if node.name == name or any(source.name in reached for source in node.all_input_nodes):
            reached.add(node.name)
    return {index for index, output in enumerate(signature.user_outputs) if output in reached}


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
