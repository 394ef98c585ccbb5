"""ExecuTorch's edge manager and its configuration, beyond what it documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from executorch.exir import EdgeCompileConfig
from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass


def edge_config(kept_whole: Sequence[Any]) -> EdgeCompileConfig:
    """The configuration of the edge dialect; `kept_whole` are operators that are not decomposed.

    Dim order operators are skipped: all tensors are contiguous, and delegates would have to see through them.
    """
    return EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True, preserve_ops=list(kept_whole))


def set_constant_method(edge: Any, name: str, value: str) -> None:
    """Replace what a constant method returns: ExecuTorch takes constant methods before it partitions, and no later."""
    edge._config_methods[name] = value


def initial_value_passes(edge: Any) -> list[Any]:
    """Passes for `ExecutorchBackendConfig` that store the initial value of each buffer that a method writes.

    ExecuTorch keeps a mutated buffer's shape alone unless told otherwise.
    """
    written: set[str] = set()
    for method in edge.methods:
        signature = edge.exported_program(method).graph_signature
        mutated = set(signature.buffers_to_mutate.values())
        written.update(name for name, fqn in signature.inputs_to_buffers.items() if fqn in mutated)
    # The pass takes every placeholder whose name holds one of these; ExecuTorch heeds it on mutated buffers alone.
    return [InitializedMutableBufferPass(sorted(written))] if written else []
