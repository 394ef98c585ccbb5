"""What the installed ExecuTorch runtime has registered."""

from __future__ import annotations

from runtime_driver.backends.runtime import bindings


def registered_backends() -> frozenset[str] | None:
    """The delegates of the installed ExecuTorch runtime; None where there is none."""
    return _registered("_get_registered_backend_names")


def registered_operators() -> frozenset[str] | None:
    """The operators for which the installed ExecuTorch runtime has kernels; None where there is no runtime."""
    return _registered("_get_operator_names")


def _registered(listing: str) -> frozenset[str] | None:
    try:
        runtime = bindings()
    except ImportError:
        return None
    # Asked for each time: a library that is loaded later brings more.
    return frozenset(getattr(runtime, listing)())
