"""Replace an attribute of a class or module of others for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def patched(owner: type | ModuleType, name: str, value: Any) -> Iterator[None]:
    """Within, `owner.name` is `value`; afterwards it is what it was, or inherited again."""
    own = name in vars(owner)
    former = getattr(owner, name, None)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, former)
        else:
            delattr(owner, name)
