"""`mobizo targets`."""

from __future__ import annotations

from mobizo_cli import options as opt
from mobizo_cli.errors import needs


def targets(backend_library: opt.BackendLibrary = None) -> None:
    """List the targets, what each needs on this machine, and their options."""
    with needs("executorch", "executorch"):
        import lowering
    from lowering.targets import TARGETS
    from mobizo_cli.console import table
    from mobizo_cli.loaded_program import load_backends

    load_backends(backend_library)
    rows = [
        (
            name,
            "yes" if state.ready else "no",
            "yes" if state.runs else "no",
            "\n".join(filter(None, (state.missing, state.runs_missing))),
            "\n".join(filter(None, (state.remedy, state.runs_remedy))),
        )
        for name, state in sorted(lowering.available().items())
    ]
    table("Targets", ("target", "lowers here", "runs here", "what is missing", "what brings it"), rows)
    options = [
        (
            name,
            f"--{each.name}" if each.name == "precision" else f"--option {each.name}=",
            each.default,
            ", ".join(each.choices),
            each.help,
        )
        for name, target in sorted(TARGETS.items())
        for each in target.all_options
    ]
    table("Options of `mobizo lower`", ("target", "option", "default", "values", "what it decides"), options)
