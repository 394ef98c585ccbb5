"""Hypothesis, or an error that says how to get it."""

from mobizo_passes.errors import LibraryMissing

try:
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    raise LibraryMissing(
        "mobizo_passes.testing.strategies draws with hypothesis, which is not installed: pip install hypothesis"
    ) from error

__all__ = ["st"]
