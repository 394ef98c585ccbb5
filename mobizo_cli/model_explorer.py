"""A program in Google's Model Explorer, if that is installed."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobizo_cli.errors import MissingPackageError

if TYPE_CHECKING:
    from mobizo_passes import TrainingProgram


def check() -> None:
    """Raise `MissingPackageError` if it is not installed."""
    if importlib.util.find_spec("model_explorer") is None:
        raise MissingPackageError("ai-edge-model-explorer", "explore")


def show(program: TrainingProgram) -> None:
    """Start its server with the step and its node data, and open the browser; returns when it is stopped."""
    explorer: Any = importlib.import_module("model_explorer")
    with tempfile.TemporaryDirectory() as folder:
        graph = program.draw(Path(folder) / "step.json")
        config = explorer.config().add_model_from_path(str(graph))
        for each in sorted(graph.parent.glob("step.*.json")):
            config.add_node_data_from_path(str(each))
        explorer.visualize_from_config(config)
