"""`mobizo targets`."""

from __future__ import annotations

from mobizo_cli.errors import MissingPackageError


def targets() -> None:
    """List the targets and what each needs on this machine."""
    try:
        import lowering
    except ModuleNotFoundError as error:
        raise MissingPackageError(error.name or "executorch", "executorch") from error
    from mobizo_cli.console import table

    rows = [
        (name, "ready" if state.ready else state.missing, state.remedy)
        for name, state in sorted(lowering.available().items())
    ]
    table("Targets", ("target", "state", "remedy"), rows)
