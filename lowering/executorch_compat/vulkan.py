"""ExecuTorch's Vulkan stage, beyond what it documents."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def root_log_level_kept() -> Iterator[None]:
    """Within, ExecuTorch's Vulkan modules are imported: they let the root logger report every node, for good."""
    root = logging.getLogger()
    level = root.level
    try:
        yield
    finally:
        root.setLevel(level)


@contextmanager
def only_fusions(*names: str) -> Iterator[None]:
    """Within, ExecuTorch's Vulkan stage fuses the patterns of these names and no others.

    Looking for a pattern exports it anew for every partition: half of the lowering time.
    """
    with root_log_level_kept():
        from executorch.backends.vulkan.patterns import fusable_patterns

    kept = dict(fusable_patterns)
    fusable_patterns.clear()
    fusable_patterns.update({name: kept[name] for name in names})
    try:
        yield
    finally:
        fusable_patterns.clear()
        fusable_patterns.update(kept)
