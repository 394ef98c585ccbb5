"""Errors about Qualcomm's host libraries."""

from __future__ import annotations

MISSING = "Qualcomm's QNN host libraries (libQnnHtp.so, libQnnSystem.so) are not here"
REMEDY = "pip install --no-deps onnxruntime-qnn==2.3.0, or set QNN_SDK_ROOT to an unpacked Qualcomm AI Runtime SDK"


class HostLibrariesMissing(Exception):
    """No QNN libraries were found; `missing` and `remedy` say what and how to get it."""

    def __init__(self, missing: str = MISSING, remedy: str = REMEDY) -> None:
        self.missing = missing
        self.remedy = remedy
        super().__init__(f"{missing}: {remedy}")


class HostLibrariesUnusable(Exception):
    """QNN libraries were found, but cannot be loaded or are not what their names say."""

    def __init__(self, directory: object, reason: str) -> None:
        self.directory = directory
        self.reason = reason
        super().__init__(f"the QNN libraries in {directory} cannot be used: {reason}; {REMEDY}")
