"""Lowering a program, or some of its methods, for the self-check that is part of it."""

from __future__ import annotations

from typing import Any

from hypothesis import settings

import lowering
import mobizo_passes as mz

# Whether this is the long search of `make test-deep`.
DEEP = bool(settings.default and settings.default.max_examples >= 1000)


class Only:
    """A program without its other methods: less to lower."""

    def __init__(self, program: mz.TrainingProgram, *methods: str) -> None:
        self.program = program
        self.methods = methods
        self.core, self.run = program.core, program.run
        self.example_batch = program.example_batch
        self.initial_adapter, self.frozen_adapter = program.initial_adapter, program.frozen_adapter

    def manifest(self, adapter: str = "external") -> dict[str, Any]:
        described = self.program.manifest(adapter)
        methods = {name: described["methods"][name] for name in self.methods}
        return {**described, "methods": methods, "evaluation": described["evaluation"] if "loss" in methods else None}

    # lower asks for more of a TrainingProgram as it grows.
    def __getattr__(self, name: str) -> Any:
        return getattr(self.program, name)


def only(program: mz.TrainingProgram, *methods: str) -> Any:
    return Only(program, *methods)


def check_itself(program: mz.TrainingProgram, target: str, *methods: str) -> None:
    """Lower these methods, and let each be compared with its eager form in the target's runtime."""
    assert lowering.lower(only(program, *methods), target=target).report.self_check.compared
