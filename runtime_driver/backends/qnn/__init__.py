"""Qualcomm's QNN libraries on the host: where they are, and loading them so that ExecuTorch can use them.

With them a program is compiled for the HTP of a phone's chip, and runs here on the HTP's simulator. Importing this
package loads nothing; `enable` does.
"""

from __future__ import annotations

from runtime_driver.backends.qnn.errors import HostLibrariesMissing, HostLibrariesUnusable
from runtime_driver.backends.qnn.host import HostLibraries, enable, find, on_host

__all__ = ["HostLibraries", "HostLibrariesMissing", "HostLibrariesUnusable", "enable", "find", "on_host"]
