"""The `mobizo` command. Imports nothing heavy: every command imports what it needs when it runs."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from mobizo_cli.commands import evaluate, export, inspect, lower, plan, replay, targets, train
from mobizo_cli.errors import OptionError, is_expected, one_line

app = typer.Typer(
    name="mobizo",
    help="Compile a model with LoRA into a program that trains itself by forward passes, and drive that program.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_state = {"debug": False}


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    _state["debug"] = debug
    if not debug:
        # What torch, torchao and transformers say about their own insides at import is nothing a user can act on.
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, category: type[Warning], file: str, line: int, *more: object) -> None:
    """Ours in one line: where in our source it was raised helps nobody."""
    if category.__module__ == "runtime_driver.errors":
        print(f"mobizo: warning: {one_line(message)}", file=sys.stderr)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, file, line))


app.command("inspect")(inspect.inspect)
app.command("plan")(plan.plan)
app.command("lower")(lower.lower)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("replay")(replay.replay)
app.command("export-adapter")(export.export_adapter)
app.command("targets")(targets.targets)


def run(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exits with 0, 1 after an error of ours (one line on stderr), 2 for wrong usage, 130 after Ctrl-C."""
    _state["debug"] = False
    given = sys.argv[1:] if arguments is None else list(arguments)
    # A file's name need not be Unicode, and what was done is not undone by what cannot be printed.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        if any("\0" in argument for argument in given):
            raise OptionError("an argument holds a zero byte; no name or text may.")
        app(args=given, prog_name="mobizo")
    except KeyboardInterrupt:
        print("mobizo: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if _state["debug"] or not is_expected(error):
            raise
        print(f"mobizo: error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
