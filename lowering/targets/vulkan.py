"""Vulkan: GPUs of phones. Planned."""

from __future__ import annotations

from lowering.targets.planned import PlannedTarget


class VulkanTarget(PlannedTarget):
    """Not in this version."""

    name = "vulkan"
