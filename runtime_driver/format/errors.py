"""Errors of what both sides of a file know, and the base of the driver's own."""

from __future__ import annotations

from collections.abc import Sequence


class ManifestError(Exception):
    """A manifest that cannot be used.

    Attributes:
        field: dotted path of the offending field (``"batch.size"``), or ``"manifest"`` for the document as a whole.
        problem: what was expected and what was found.
        remedy: what the reader can do about it.
    """

    def __init__(
        self, field: str, problem: str, remedy: str = "Lower the model again to get a fresh manifest."
    ) -> None:
        self.field = field
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"Manifest field `{field}`: {problem}. {remedy}")


class ManifestVersionError(ManifestError):
    """A manifest whose ``format_version`` this release does not read."""

    def __init__(self, found: object, supported: Sequence[int]) -> None:
        self.found = found
        self.supported = supported
        super().__init__(
            "format_version",
            f"expected {' or '.join(map(str, supported))}, found {found!r}",
            "Use the mobizo release that wrote this file, or lower the model again with this one.",
        )


class DriverError(Exception):
    """Base of all errors raised by the driver."""


class HyperparameterError(DriverError):
    """A learning rate, epsilon, seed or step count outside its range."""

    def __init__(self, name: str, expected: str, found: object) -> None:
        self.name = name
        super().__init__(f"`{name}` must be {expected}, but it is {found!r}.")
