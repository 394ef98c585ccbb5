"""The registry of targets: a folder each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowering.errors import OptionNameTaken, TargetNameTaken, UnknownTarget, WeightsStayInside
from lowering.targets.availability import Availability
from lowering.targets.base import Target
from lowering.targets.options import RESERVED, TargetOption
from lowering.targets.portable.target import PortableTarget
from lowering.targets.qnn.target import QnnTarget
from lowering.targets.vulkan.target import VulkanTarget
from lowering.targets.xnnpack.target import XnnpackTarget

if TYPE_CHECKING:
    from runtime_driver.format import Manifest

TARGETS: dict[str, Target] = {}


def register(target: Target) -> Target:
    """Make `target` known to `lower`, `available` and the command line, under its name; gives it back.

    Raises:
        TargetNameTaken: another target has that name.
        OptionNameTaken: an option of the target is called as a keyword that `lower` has for every target.
    """
    for option in target.options:
        if option.name in RESERVED:
            raise OptionNameTaken(option.name, target.name)
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


def options_of(manifest: Manifest) -> dict[str, str]:
    """The options of its target that a program was lowered with, without the digest of its calibration."""
    return {name: value for name, value in manifest.options.items() if name != "calibration"}


def require_external_weights(target: Target) -> None:
    """Raise `WeightsStayInside`, which lists the targets that can, when `target` cannot have its weights outside."""
    if not target.external_weights:
        raise WeightsStayInside(target.name, (name for name, each in TARGETS.items() if each.external_weights))


__all__ = ["TARGETS", "Availability", "Target", "TargetOption", "get_target", "register", "require_external_weights"]
