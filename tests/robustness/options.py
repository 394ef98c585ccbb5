"""Options of the command line as `lower` hands them to the loading of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobizo_cli.options import BuildOptions

LABELS = "0=terrible,1=great"


def options(model: Path | str, **changed: Any) -> BuildOptions:
    given = {
        "model": str(model),
        "template": "{text} It was",
        "labels": LABELS,
        "label_column": "label",
        "loss": "label-words",
        "max_length": 8,
        "init_seed": 0,
        "trainable": "lora_B",
        "batch": 2,
        "queries": 1,
        "estimator": "two-sided",
        "noise": "gaussian",
        **dict.fromkeys(("rank", "alpha", "target_modules", "layers", "normalize")),
    }
    return BuildOptions(**{**given, **changed})
