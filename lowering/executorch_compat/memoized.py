"""Compute once what ExecuTorch and torch.export compute anew for every table, tensor and node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

from executorch.exir import tensor
from executorch.exir.passes import replace_view_copy_with_view_pass
from torch._export import utils

from lowering.executorch_compat.patching import patched


@contextmanager
def memoized() -> Iterator[None]:
    """Within, operators are listed once, and the order of a tensor's dimensions is found once for given strides.

    torch.export asks the dispatcher for all composite operators, once for each of some forty namespaces, whenever a
    table of decompositions is read. ExecuTorch defines a class each time it sorts strides. Together that is a tenth of
    the time to lower a small model. No operator is registered during a lowering.
    """
    listed = lru_cache(utils._materialize_cpp_cia_ops)
    orders = lru_cache(maxsize=None)(tensor.dim_order_from_stride)

    def order(stride: Any) -> Any:
        stride = tuple(stride)
        return orders(stride) if all(type(each) is int for each in stride) else former(stride)

    former = tensor.dim_order_from_stride
    with ExitStack() as stack:
        stack.enter_context(patched(utils, "_materialize_cpp_cia_ops", listed))
        for module in (tensor, replace_view_copy_with_view_pass):
            stack.enter_context(patched(module, "dim_order_from_stride", order))
        yield
