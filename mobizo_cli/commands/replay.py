"""`mobizo replay`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mobizo_cli import options as opt


def replay(
    program: opt.ProgramArgument,
    journal: Annotated[Path, typer.Option(help="The journal of a run of this program.")],
    adapter_out: Annotated[Path, typer.Option(help="PEFT directory to write.")],
    steps: Annotated[int | None, typer.Option(min=0, help="Replay so many steps. [default: all]")] = None,
    verify: opt.Verify = True,
    backend_library: opt.BackendLibrary = None,
) -> None:
    """Make the adapter of a run from its journal alone: no data, no forward pass, the same bits."""
    from mobizo_cli.console import facts
    from mobizo_cli.loaded_program import open_session

    session = open_session(program, verify=verify, backends=backend_library)
    count = session.replay(journal, steps)
    session.save_adapter(adapter_out)
    facts([("steps", count), ("adapter", adapter_out)])
