"""ExecuTorch's runtime, imported without its compiler."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

_COMPILER = "executorch.exir"


def bindings() -> ModuleType:
    """The module `executorch.extension.pybindings.portable_lib`.

    Raises:
        ImportError: ExecuTorch is not installed.
    """
    return _imported("executorch.extension.pybindings.portable_lib")


def runtime() -> ModuleType:
    """The module `executorch.runtime`, with `Runtime` and `Verification`.

    Raises:
        ImportError: ExecuTorch is not installed.
    """
    return _imported("executorch.runtime")


def _imported(name: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    with _without_the_compiler():
        return import_module(name)


@contextmanager
def _without_the_compiler() -> Iterator[None]:
    """Within, `executorch.exir` is a package whose `__init__` is not run.

    The runtime imports one file of it, for the class of a warning; the package imports torch's own compilers on the
    way, which takes three times as long as all else that a session needs.
    """
    package = find_spec("executorch")
    if _COMPILER in sys.modules or package is None:
        yield
        return
    stand_in = ModuleType(_COMPILER)
    stand_in.__path__ = [str(Path(folder) / "exir") for folder in package.submodule_search_locations or ()]
    sys.modules[_COMPILER] = stand_in
    try:
        yield
    finally:
        # Whoever imports the compiler afterwards gets all of it.
        for name in [name for name in sys.modules if name == _COMPILER or name.startswith(f"{_COMPILER}.")]:
            del sys.modules[name]
        vars(sys.modules["executorch"]).pop("exir", None)
