"""Shared libraries that bring the runtime a delegate's backend."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from runtime_driver.backends.runtime import bindings
from runtime_driver.errors import BackendLibraryError
from runtime_driver.format.files import open_regular


def load_backend_library(path: str | Path) -> tuple[str, ...]:
    """Load a shared library, such as a Vulkan backend built from ExecuTorch's sources, into this process's runtime.

    Load it before a program that needs it. It has to be built for the installed release of ExecuTorch. A library that
    is loaded already is not loaded again.

    Returns:
        The backends that were registered by it: names such as ``"VulkanBackend"``.

    Raises:
        BackendLibraryError: missing, unreadable, not a shared library, or with symbols that are not to be had.
    """
    path = Path(path)
    try:
        os.close(open_regular(path))
    except OSError as error:
        raise BackendLibraryError(path, f"cannot be read ({error.strerror})") from error
    # First, so that the library finds the runtime's symbols.
    portable_lib = bindings()
    before = set(portable_lib._get_registered_backend_names())
    try:
        # An absolute path: the loader would look for a bare name in its own directories.
        ctypes.CDLL(str(path.absolute()), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise BackendLibraryError(path, f"the system cannot load it ({error})") from error
    return tuple(name for name in portable_lib._get_registered_backend_names() if name not in before)
