"""Keep the order of a program's calls inside of delegates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from executorch.exir import lowered_backend_module
from torch.fx import Node

from lowering.executorch_compat.patching import patched


@contextmanager
def calls_in_order() -> Iterator[None]:
    """Within, the calls of a partition keep the order of the program.

    ExecuTorch sorts them by their distance from the inputs. What is computed late in order to hold it for a short time,
    such as a checkpointed layer's second forward, would be computed first.
    """
    with patched(lowered_backend_module, "topo_sort", _in_order):
        yield


def _in_order(nodes: list[Node]) -> list[Node]:
    chosen = set(nodes)
    return [node for node in nodes[0].graph.nodes if node in chosen] if nodes else []
