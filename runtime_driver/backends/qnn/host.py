"""Find and load Qualcomm's host libraries.

ExecuTorch's QNN delegate opens `libQnnHtp.so` by name when a program is compiled or loaded. Loaded here first, from
the onnxruntime-qnn package or from the user's SDK, that name is already taken, and it finds this one.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runtime_driver.backends.qnn.errors import MISSING, REMEDY, HostLibrariesMissing, HostLibrariesUnusable
from runtime_driver.backends.runtime import bindings

#: If this variable is set, even to nothing, ExecuTorch uses what it names and downloads nothing.
SDK_VARIABLE = "QNN_SDK_ROOT"
_PACKAGE = "onnxruntime_qnn"
_SDK_DIRECTORY = Path("lib") / "x86_64-linux-clang"
# In the order in which they have to be loaded.
_LIBRARIES = ("libQnnSystem.so", "libQnnHtp.so")

# QnnInterface_t: backend id and provider name (16 bytes), two API versions (24), then function pointers of 8 bytes.
_FUNCTIONS, _DEVICE_CREATE = 40, 40
_CUSTOM_CONFIG = 0


@dataclass(frozen=True)
class HostLibraries:
    """Where the libraries are; `source` is `"QNN_SDK_ROOT"` or `"onnxruntime-qnn"`."""

    directory: Path
    source: str


def on_host() -> bool:
    """Whether this is a machine that Qualcomm has host libraries for: Linux on x86-64."""
    return (platform.system(), platform.machine()) == ("Linux", "x86_64")


def find() -> HostLibraries:
    """The libraries that `enable` would load: those of the SDK if QNN_SDK_ROOT names one, else the package's.

    Raises:
        HostLibrariesMissing: there are none, or not for this machine.
    """
    if not on_host():
        raise HostLibrariesMissing(
            f"{MISSING}: there are none for {platform.system()} on {platform.machine()}", "use Linux on x86-64"
        )
    root = os.environ.get(SDK_VARIABLE)
    if root:
        found = HostLibraries(Path(root) / _SDK_DIRECTORY, SDK_VARIABLE)
        where = f"{SDK_VARIABLE} is {root}, but {found.directory} has no"
    else:
        package = find_spec(_PACKAGE)
        if package is None or package.origin is None:
            raise HostLibrariesMissing
        found = HostLibraries(Path(package.origin).parent, "onnxruntime-qnn")
        where = f"{found.directory} has no"
    absent = [name for name in _LIBRARIES if not (found.directory / name).is_file()]
    if absent:
        raise HostLibrariesMissing(f"{where} {', '.join(absent)}", REMEDY)
    return found


@cache
def enable() -> HostLibraries:
    """Load the libraries into this process, once, for compiling and for the simulator; imports torch and ExecuTorch.

    Raises:
        HostLibrariesMissing: there are none.
        HostLibrariesUnusable: they cannot be loaded, or have no HTP in them.
    """
    found = find()
    os.environ.setdefault(SDK_VARIABLE, "")
    # QNN's libraries bring a C++ runtime of their own. What is loaded after it takes its handlers for exceptions that
    # another runtime throws, and the process dies of the first one, say of a damaged program.
    for module in ("torch", "executorch.backends.qualcomm.python.PyQnnManagerAdaptor"):
        import_module(module)
    bindings()

    try:
        libraries = [ctypes.CDLL(str(found.directory / name), os.RTLD_NOW | os.RTLD_LOCAL) for name in _LIBRARIES]
    except OSError as error:
        raise HostLibrariesUnusable(found.directory, str(error)) from error
    _accept_old_device_configs(found, libraries[-1])
    return found


_Create = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)
_alive: list[Any] = []


def _accept_old_device_configs(found: HostLibraries, library: ctypes.CDLL) -> None:
    """Make `deviceCreate` take the device configuration as ExecuTorch writes it.

    ExecuTorch 1.5.1 was built with QNN 2.37. Later libraries have a pointer in the union of the HTP's device
    configuration, so the union starts 4 bytes later. Ours tries that layout first; the other one is refused by either
    library for an unknown chip 0, and nothing has happened then.
    """
    providers, count = ctypes.POINTER(ctypes.c_void_p)(), ctypes.c_uint32()
    library.QnnInterface_getProviders.restype = ctypes.c_uint64
    error = library.QnnInterface_getProviders(ctypes.byref(providers), ctypes.byref(count))
    if error or not count.value or not providers[0]:
        raise HostLibrariesUnusable(found.directory, f"QnnInterface_getProviders gave {count.value}, error {error}")
    slot = providers[0] + _FUNCTIONS + 8 * _DEVICE_CREATE
    original = _Create(ctypes.c_void_p.from_address(slot).value or 0)

    def create(log: Any, configs: Any, device: Any) -> int:
        kept: list[Any] = []
        adapted = ctypes.cast(_adapted(configs, kept), ctypes.POINTER(ctypes.c_void_p))
        return original(log, adapted, device) and original(log, configs, device)

    replacement = _Create(create)
    page = slot & ~(mmap.PAGESIZE - 1)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(2 * mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE):
        raise HostLibrariesUnusable(found.directory, f"mprotect: {os.strerror(ctypes.get_errno())}")
    ctypes.c_void_p.from_address(slot).value = ctypes.cast(replacement, ctypes.c_void_p).value
    _alive.extend((library, original, replacement))


def _adapted(configs: Any, kept: list[Any]) -> Any:
    """A null-ended list of QnnDevice_Config_t with each HTP configuration in the later layout; `kept` owns it."""
    pointers: list[int | None] = []
    while configs and configs[len(pointers)]:
        address = configs[len(pointers)]
        option = ctypes.c_uint32.from_address(address).value
        custom = ctypes.c_void_p.from_address(address + 8).value
        if option == _CUSTOM_CONFIG and custom:
            old = (ctypes.c_uint32 * 3).from_address(custom)
            kept.append((ctypes.c_uint32 * 4)(old[0], 0, old[1], old[2]))
            custom = ctypes.addressof(kept[-1])
        kept.append((ctypes.c_uint64 * 2)(option, custom or 0))
        pointers.append(ctypes.addressof(kept[-1]))
    kept.append((ctypes.c_void_p * (len(pointers) + 1))(*pointers, None))
    return kept[-1]
