"""Lowering a program, or some of its methods, for the self-check that is part of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import settings

import lowering
import mobizo_passes as mz
from mobizo_passes.graph.ir import Ir

# Whether this is the long search of `make test-deep`.
DEEP = bool(settings.default and settings.default.max_examples >= 1000)


class Only:
    """A program without its other methods: less to lower."""

    def __init__(self, program: mz.TrainingProgram, *methods: str, cores: Mapping[str, Ir]) -> None:
        self.program = program
        self.methods = methods
        self.cores = cores
        self.run = program.run
        self.example_batch = program.example_batch
        self.initial_adapter, self.frozen_adapter = program.initial_adapter, program.frozen_adapter

    def core(self, method: str, adapter: str = "external") -> torch.export.ExportedProgram:
        if method in self.cores and adapter == "external":
            return self.cores[method].to_exported_program(self.program._verifier)
        return self.program.core(method, adapter)

    def manifest(self, adapter: str = "external") -> dict[str, Any]:
        described = self.program.manifest(adapter)
        methods = {name: described["methods"][name] for name in self.methods}
        return {**described, "methods": methods, "evaluation": described["evaluation"] if "loss" in methods else None}

    # lower asks for more of a TrainingProgram as it grows.
    def __getattr__(self, name: str) -> Any:
        return getattr(self.program, name)


def only(program: mz.TrainingProgram, *methods: str, cores: Mapping[str, Ir] | None = None) -> Any:
    return Only(program, *methods, cores=cores or {})


def check_itself(
    program: mz.TrainingProgram, target: str, *methods: str, cores: Mapping[str, Ir] | None = None
) -> None:
    """Lower these methods, and let each be compared with its eager form in the target's runtime.

    `cores`: methods that are in core ATen already.
    """
    assert lowering.lower(only(program, *methods, cores=cores), target=target).report.self_check.compared
