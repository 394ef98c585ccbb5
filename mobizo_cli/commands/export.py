"""`mobizo export-adapter`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mobizo_cli import options as opt


def export_adapter(
    program: opt.ProgramArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="PEFT directory to write.")],
    journal: Annotated[
        Path | None, typer.Option(help="Export the adapter of this run. [default: the one in the .pte]")
    ] = None,
    verify: opt.Verify = True,
    backend_library: opt.BackendLibrary = None,
) -> None:
    """Write the adapter of a program, or of a run of it, as a PEFT directory."""
    from mobizo_cli.console import facts
    from mobizo_cli.loaded_program import open_session

    session = open_session(program, verify=verify, backends=backend_library)
    steps = [] if journal is None else [("steps", session.replay(journal))]
    session.save_adapter(output)
    tensors = len(session.manifest.adapter)
    facts([*steps, ("tensors", tensors), ("adapter", output)])
