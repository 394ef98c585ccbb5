"""Run a method that was just lowered in ExecuTorch's runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lowering.errors import SelfCheckFailed
from lowering.executorch_compat.output import CapturedOutput, captured_output

# Lines of the runtime's log that tell why it failed.
_REASONS = ("Check failed", "failed at instruction", "Failed to", "Error", "error")


class MethodRunner:
    """One method in ExecuTorch's runtime; its weights are given back at the end of the block."""

    def __init__(self, method: str, path: str, data: str | None) -> None:
        self.method = method
        self.path = path
        self.data = data
        self._loaded: Any = None

    def __enter__(self) -> Callable[[list[Tensor]], list[Tensor]]:
        from executorch.runtime import Runtime

        self._loaded = self._heard(
            lambda: Runtime.get().load_program(Path(self.path), data_path=self.data).load_method(self.method)
        )
        return self._run

    def __exit__(self, *_: object) -> None:
        self._loaded = None

    def _run(self, inputs: list[Tensor]) -> list[Tensor]:
        given = [torch.empty(value.shape, dtype=value.dtype).copy_(value) for value in inputs]
        # Copies: the runtime may hand out its own memory, which the next run overwrites.
        return self._heard(lambda: [value.clone() for value in self._loaded.execute(given)])

    def _heard(self, call: Callable[[], Any]) -> Any:
        """What the call gives; what the runtime prints meanwhile goes into the error, if there is one."""
        log = CapturedOutput()
        try:
            with captured_output(log):
                return call()
        except RuntimeError as error:
            failure = error
        raise SelfCheckFailed.broke(self.method, str(failure), log.lines(*_REASONS)) from failure


@contextmanager
def stored(finished: Any, weights: Any) -> Iterator[tuple[str, str | None]]:
    """Paths of the program and of its weights file; what is written for it has no name and goes with its handle."""
    with ExitStack() as stack:

        def written(content: Any) -> str:
            file: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())
            content.write_to_file(file)
            file.flush()
            return f"/dev/fd/{file.fileno()}"

        data = str(weights) if isinstance(weights, Path) else None if weights is None else written(weights)
        yield written(finished), data
