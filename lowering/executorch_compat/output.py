"""Keeps what native compilers print from the user's terminal, and what they say about errors for the user."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO


class CapturedOutput:
    """What was written; filled in when the block ends."""

    def __init__(self) -> None:
        self.text = ""

    def lines(self, *marks: str) -> list[str]:
        """The different lines that hold one of `marks`, in order."""
        found = (line.strip() for line in self.text.splitlines() if any(mark in line for mark in marks))
        return list(dict.fromkeys(found))


@contextmanager
def captured_output(captured: CapturedOutput) -> Iterator[None]:
    """Redirect file descriptors 1 and 2 while the block runs, for native code writes past `sys`; fills `captured`."""
    with ExitStack() as stack:
        sink = stack.enter_context(tempfile.TemporaryFile())
        stack.callback(lambda: _read(sink, captured))
        for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            saved = os.dup(descriptor)
            stack.callback(os.close, saved)
            stack.callback(os.dup2, saved, descriptor)
            stack.callback(stream.flush)
            os.dup2(sink.fileno(), descriptor)
        yield


def _read(sink: IO[bytes], captured: CapturedOutput) -> None:
    sink.seek(0)
    captured.text = sink.read().decode("utf-8", errors="replace")
