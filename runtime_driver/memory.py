"""How much memory this process uses, from the operating system, in bytes."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_rss_bytes() -> int:
    """The largest resident set this process has had so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux counts kibibytes.
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
    """The resident set now, in bytes; the peak where the system has no ``/proc``."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_rss_bytes()
    for line in status.read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return peak_rss_bytes()
