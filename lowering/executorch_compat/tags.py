"""The tag of constants that are stored outside of the program."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

#: ExecuTorch's name for the weights file while it lowers; the file's own name is the user's choice.
TAG = "weights"
# Where ExecuTorch's XNNPACK stage looks for the file of a constant; torch keeps it through every retrace.
_CUSTOM, _KEY = "custom", "delegate_constant_tag"


def tag(node: Node) -> None:
    """The constant behind `node` goes to the weights file."""
    node.meta[_CUSTOM] = {**node.meta.get(_CUSTOM, {}), _KEY: TAG}


def untag(node: Node) -> None:
    """The constant behind `node` stays in the program."""
    node.meta[_CUSTOM] = {key: value for key, value in node.meta.get(_CUSTOM, {}).items() if key != _KEY}


def is_tagged(node: Node) -> bool:
    """Whether the constant behind `node` goes to the weights file."""
    return node.meta.get(_CUSTOM, {}).get(_KEY) == TAG


def tag_like(node: Node, sources: Iterable[Node]) -> None:
    """Tag a constant that was computed from tagged ones alone and is as large as the largest of them.

    A transposed weight is a weight; a table spun from frequencies, or cut to a length, is the program's own.
    """
    origins = list(sources)
    size = max((each.meta["val"].nbytes for each in origins), default=-1)
    if node.meta["val"].nbytes == size and all(is_tagged(each) for each in origins):
        tag(node)
