"""The `mobizo` command, as tests call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Cli = Callable[..., Done]


def fails(done: Done, *words: str) -> None:
    """One clear line on stderr, exit code 1, nothing on stdout."""
    assert done.code == 1
    assert done.out == ""
    assert done.err.startswith("mobizo: error: ")
    assert done.err.count("\n") == 1
    for word in words:
        assert word in done.err
