"""`mobizo eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mobizo_cli import options as opt


def evaluate(
    program: opt.ProgramArgument,
    data: Annotated[Path, typer.Option(help="Data to evaluate on, .jsonl or .csv.")],
    adapter: Annotated[
        Path | None, typer.Option(help="PEFT directory to evaluate. [default: the adapter in the .pte]")
    ] = None,
    weights_file: opt.WeightsFile = None,
    verify: opt.Verify = True,
    backend_library: opt.BackendLibrary = None,
) -> None:
    """Loss and accuracy of a program with an adapter."""
    from mobizo_cli.console import facts
    from mobizo_cli.loaded_program import open_task

    use = open_task(program, weights_file, verify=verify, backends=backend_library)
    if adapter is not None:
        use.session.load_adapter(adapter)
    score = use.score(use.examples(data))
    facts(
        [
            ("examples", score.examples),
            ("loss", f"{score.loss:.4f}"),
            ("accuracy", f"{score.accuracy:.4f} ({score.correct} of {score.examples})"),
        ]
    )
