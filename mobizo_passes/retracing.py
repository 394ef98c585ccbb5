"""Keep torch from doing anew, at every export and every retrace, what does not depend on the program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch.export import exported_program
from torch.fx.graph import _PyTreeCodeGen


@contextmanager
def quick_retracing() -> Iterator[None]:
    """Within, the same graphs are made in about two thirds of the time.

    - A graph module's Python code is written when it is first called or read. ExecuTorch makes dozens of modules of a
      program that nobody ever calls.
    - The list of composite operators is made once, until an operator library is loaded that adds to it.
    - A kernel is registered without evaluating type annotations; a retrace registers some ten thousand.
    """
    with ExitStack() as stack:
        for owner, name, quick in (
            (fx.GraphModule, "recompile", _recompile_when_used),
            (exported_program, "_collect_all_valid_cia_ops", _composite_operators),
            (torch._ops.OperatorBase, "py_impl", _py_impl),
        ):
            stack.enter_context(mock.patch.object(owner, name, quick))
        yield


_recompile = fx.GraphModule.recompile
_collect = exported_program._collect_all_valid_cia_ops  # pyright: ignore[reportPrivateImportUsage]
_register = torch._ops.OperatorBase.py_impl
_composite: tuple[object, frozenset[Any]] = (None, frozenset())


def _recompile_when_used(module: fx.GraphModule) -> Any:
    # Each graph module is the only instance of a class of its own, on which torch itself puts `forward`.
    own: Any = type(module)
    # Compiling a graph with structured inputs sets more than code.
    if isinstance(module.graph._codegen, _PyTreeCodeGen) or own.__qualname__.rpartition(".")[2] != "GraphModuleImpl":
        return _recompile(module)
    own.forward = _first_call
    own._code = property(_first_read, _first_write)
    return None


def _first_call(module: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    _recompile(module)
    return module.forward(*args, **kwargs)


def _first_read(module: fx.GraphModule) -> str:
    _recompile(module)
    return module._code


def _first_write(module: fx.GraphModule, code: str) -> None:
    own: Any = type(module)
    del own._code
    module._code = code


def _composite_operators() -> set[Any]:
    global _composite
    known = (len(torch.ops._dir), *torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd"))
    if known != _composite[0]:
        _composite = known, frozenset(_collect())
    return set(_composite[1])


def _py_impl(operator: Any, key: Any) -> Callable[[Any], Any]:
    if not isinstance(key, torch._C.DispatchKey) or key == torch._C.DispatchKey.Python or key in operator.py_kernels:
        return _register(operator, key)

    def register(kernel):  # noqa: ANN001, ANN202 - annotations are what costs
        operator.py_kernels[key] = kernel
        operator._dispatch_cache.clear()
        return kernel

    return register
