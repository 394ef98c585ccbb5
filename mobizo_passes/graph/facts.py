"""What is known of a node beyond its operator, arguments and value, and what a node passes on to the one after it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.fx import Node

from mobizo_passes.graph.layout import Layout

_KEY = "mobizo"
# Where torch notes what a node was captured from.
_ORIGIN = ("nn_module_stack", "stack_trace")


@dataclass(frozen=True)
class Input:
    """A placeholder's role: `kind` is parameter, buffer or constant (held by the program), state (held, and written
    anew at every run), adapter, tangent (of an adapter tensor, until noise takes its place), optimizer (its state),
    batch, seed, lr, eps or projected_gradients (inputs), or input (of a program that comes from elsewhere)."""

    kind: str
    name: str


@dataclass(frozen=True)
class NodeFacts:
    """Facts about one node; `note` changes them."""

    #: Of a placeholder.
    role: Input | None = None
    #: Name of the pass that made it.
    made_by: str = ""
    #: Whether it is computed once per group.
    expanded: bool = False
    #: Whether it holds the batch, and where, unless tracking lost it on the way.
    batched: bool = False
    layout: Layout | None = None
    #: FQN of the adapter tensor that it is the noise of.
    noise_of: str = ""


_NONE = NodeFacts()


def facts(node: Node) -> NodeFacts:
    """Return the facts about a node."""
    return node.meta.get(_KEY, _NONE)


def note(node: Node, **changes: Any) -> None:
    """Change some of the facts about a node."""
    node.meta[_KEY] = replace(facts(node), **changes)


def role(node: Node) -> Input:
    """Return a placeholder's role; raises `ValueError` for a node that has none."""
    found = facts(node).role
    if found is None:
        raise ValueError(f"%{node.name} is no input of the program")
    return found


def come_from(node: Node, like: Node) -> None:
    """A new node was captured where `like` was."""
    node.meta.update({key: like.meta[key] for key in _ORIGIN if key in like.meta})


def succeed(node: Node, old: Node) -> None:
    """A node that takes the place of another is computed as often, and is the same noise."""
    before = facts(old)
    if before.expanded or before.noise_of:
        note(node, expanded=before.expanded or facts(node).expanded, noise_of=before.noise_of or facts(node).noise_of)


def module_of(node: Node) -> str:
    """Return the FQN of the innermost module that a node was captured in; "" if none is known."""
    stack = [each for each in (node.meta.get("nn_module_stack") or {}).values() if isinstance(each, tuple) and each]
    return str(stack[-1][0]) if stack else ""


# The testing kit holds models.
_COMPILER = re.compile("/mobizo_passes/(?!testing/)")
# File, line, function, and the line's text if torch noted it.
_FRAME = re.compile(r'File "(.*?)", line (\d+), in (\S+)(?:\n +(?!File)(.*))?')


def source_frames(node: Node) -> tuple[str, ...]:
    """Return the lines of the user's model that a node comes from, the innermost first; empty if none is known.

    Each is ``model.py:12 in forward: x = self.fc(x)``. Frames of this package are left out, those of PyTorch too where
    others are known. Paths begin below ``site-packages`` or the working directory: they say nothing of a machine.
    """
    return tuple(
        f"{_short_path(path)}:{line} in {function}" + (f": {text.strip()}" if text else "")
        for path, line, function, text in _frames(node)
    )


def source_line(node: Node) -> str:
    """Return the innermost of these frames as Python writes it, ``File "/home/me/model.py", line 12, in forward``."""
    return next((f'File "{path}", line {line}, in {function}' for path, line, function, _ in _frames(node)), "")


def source_of(node: Node) -> str:
    """Return the innermost of `source_frames`, or ""."""
    return next(iter(source_frames(node)), "")


def set_source(node: Node, path: str, line: str, function: str, text: str) -> None:
    """A node comes from one line of a file."""
    node.meta["stack_trace"] = f'File "{path}", line {line}, in {function}\n    {text}'


def _frames(node: Node) -> list[tuple[str, str, str, str]]:
    """File, line, function and the line's text of the user's frames, the innermost first."""
    frames = [each for each in _FRAME.findall(node.meta.get("stack_trace") or "") if not _COMPILER.search(each[0])]
    ours = [each for each in frames if "/site-packages/torch/" not in each[0]] or frames
    return ours[::-1]


def _short_path(path: str) -> str:
    _, mark, inside = path.rpartition("/site-packages/")
    if mark:
        return inside
    here = Path(path)
    if not here.is_absolute():
        return path
    return str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else Path(*here.parts[-2:]))
