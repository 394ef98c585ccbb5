"""The registry of targets: one small file each."""

from __future__ import annotations

from lowering.errors import TargetNameTaken, UnknownTarget
from lowering.targets.base import Availability, Target, TargetOption
from lowering.targets.portable import PortableTarget
from lowering.targets.qnn import QnnTarget
from lowering.targets.vulkan import VulkanTarget
from lowering.targets.xnnpack import XnnpackTarget

TARGETS: dict[str, Target] = {}


def register(target: Target) -> Target:
    """Make `target` known to `lower`, `available` and the command line, under its name; gives it back.

    Raises:
        TargetNameTaken: another target has that name.
    """
    if TARGETS.setdefault(target.name, target) is not target:
        raise TargetNameTaken(target.name)
    return target


for _target in (XnnpackTarget(), PortableTarget(), VulkanTarget(), QnnTarget()):
    register(_target)


def get_target(name: str) -> Target:
    """The target called `name`.

    Raises:
        UnknownTarget: no such target; lists those there are.
    """
    if name not in TARGETS:
        raise UnknownTarget(name, TARGETS)
    return TARGETS[name]


__all__ = ["TARGETS", "Availability", "Target", "TargetOption", "get_target", "register"]
