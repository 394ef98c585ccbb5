"""Names of what stands beside a program."""

from __future__ import annotations

from pathlib import PurePath


def content_name(name: str, sha256: str) -> str:
    """``model.ptd`` -> ``model.0123456789abcdef.ptd``, made from the content's hash.

    A file that belongs to a program but whose own name is still taken by the old program's has this name until the
    program itself is replaced. Readers look for it too, so that a writer can be killed at any moment.
    """
    path = PurePath(name)
    return f"{path.stem}.{sha256[:16]}{path.suffix}"
