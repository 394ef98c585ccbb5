"""Compute once what ExecuTorch and torch.export compute anew for every table, tensor and node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

from executorch.exir import memory_planning, tensor
from executorch.exir.passes import replace_view_copy_with_view_pass
from torch._export import utils
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import Node

from lowering.executorch_compat.patching import patched


@contextmanager
def memoized() -> Iterator[None]:
    """Within, operators, the order of dimensions of given strides and a program's state are found once.

    torch.export asks the dispatcher for all composite operators, once for each of some forty namespaces, whenever a
    table of decompositions is read. ExecuTorch defines a class each time it sorts strides, and lists the whole state of
    a program for each of its inputs when it plans memory. Together that is an eighth of the time to lower a small
    model. No operator is registered during a lowering.
    """
    listed = lru_cache(utils._materialize_cpp_cia_ops)
    orders = lru_cache(maxsize=None)(tensor.dim_order_from_stride)

    def order(stride: Any) -> Any:
        stride = tuple(stride)
        return orders(stride) if all(type(each) is int for each in stride) else former(stride)

    def mutable(node: Node, signature: ExportGraphSignature | None = None) -> bool:
        if signature is None or node.op != "placeholder":
            return False
        if state.get("signature") is not signature:
            buffers, written = signature.inputs_to_buffers, set(signature.buffers_to_mutate.values())
            state.update(signature=signature, names={name for name, fqn in buffers.items() if fqn in written})
        return node.target in state["names"]

    state: dict[str, Any] = {}
    former = tensor.dim_order_from_stride
    with ExitStack() as stack:
        stack.enter_context(patched(memory_planning, "_is_mutable_buffer", mutable))
        stack.enter_context(patched(utils, "_materialize_cpp_cia_ops", listed))
        for module in (tensor, replace_view_copy_with_view_pass):
            stack.enter_context(patched(module, "dim_order_from_stride", order))
        yield
