"""ExecuTorch's QNN stage, beyond what it documents."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.export import ExportedProgram


def quantized_value_passes(program: ExportedProgram) -> tuple[Any, ...]:
    """Passes of the edge dialect, for a quantized method `program`.

    QNN's stage reads quantized values from what it calls attributes of nodes, not from nodes that round.
    """
    from executorch.backends.qualcomm._passes.annotate_quant_attrs import AnnotateQuantAttrs
    from executorch.backends.qualcomm._passes.fold_qdq import FoldQDQ

    return AnnotateQuantAttrs(program), FoldQDQ(program)


@contextmanager
def only_warnings() -> Iterator[None]:
    """Within, ExecuTorch's QNN modules, which tell of every node at a level of their own, tell of warnings alone."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("executorch.backends.qualcomm")]
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
