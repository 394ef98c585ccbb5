"""The registry of targets: one small file each."""

from __future__ import annotations

from lowering.errors import UnknownTarget
from lowering.targets.base import Availability, Target
from lowering.targets.portable import PortableTarget
from lowering.targets.qnn import QnnTarget
from lowering.targets.vulkan import VulkanTarget
from lowering.targets.xnnpack import XnnpackTarget

TARGETS: dict[str, Target] = {
    target.name: target for target in (XnnpackTarget(), PortableTarget(), VulkanTarget(), QnnTarget())
}


def get_target(name: str) -> Target:
    """The target called `name`.

    Raises:
        UnknownTarget: no such target; lists those there are.
    """
    if name not in TARGETS:
        raise UnknownTarget(name, TARGETS)
    return TARGETS[name]


__all__ = ["TARGETS", "Availability", "Target", "get_target"]
