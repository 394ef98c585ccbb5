"""Keeps what native code and imported libraries write to stderr, so that an error can quote it."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


class CapturedLog:
    """What was written; filled in when the block ends."""

    def __init__(self) -> None:
        self.text = ""

    def reason(self) -> str:
        """The lines that the runtime marks with their source file, joined; empty when there are none."""
        lines = [line.strip() for line in self.text.splitlines()]
        return "; ".join(line for line in lines if ".cpp:" in line and "cpuinfo" not in line)


@contextmanager
def captured_stderr() -> Iterator[CapturedLog]:
    """Redirect file descriptor 2 to a temporary file while the block runs.

    The runtime logs from C++, past ``sys.stderr``, and says the true reason of a failed load only there. Used around
    loading alone; while steps run, stderr is left as it is.
    """
    log = CapturedLog()
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with tempfile.TemporaryFile() as sink:
            os.dup2(sink.fileno(), 2)
            try:
                yield log
            finally:
                sys.stderr.flush()
                os.dup2(saved, 2)
                sink.seek(0)
                log.text = sink.read().decode("utf-8", errors="replace")
    finally:
        os.close(saved)
