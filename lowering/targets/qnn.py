"""Qualcomm QNN: the NPU of Snapdragon chips. Planned."""

from __future__ import annotations

from lowering.targets.planned import PlannedTarget


class QnnTarget(PlannedTarget):
    """Not in this version."""

    name = "qnn"
    backend = "QnnBackend"
