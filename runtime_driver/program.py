"""Loads a .pte and its manifest, and its methods when they are first asked for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime_driver.backends import qnn as qnn_host
from runtime_driver.backends.runtime import bindings, runtime
from runtime_driver.captured_output import captured_stderr
from runtime_driver.container import Container, delegates_of, examine, without_footer
from runtime_driver.errors import (
    AdapterError,
    ExecutionError,
    MissingMethodError,
    ProgramFileError,
    SidecarMismatchError,
    UnprovenWarning,
    WeightsFileError,
)
from runtime_driver.format import Manifest, ManifestError
from runtime_driver.weights_file import Weights, find_weights

if TYPE_CHECKING:
    from executorch.runtime import Method, Program
    from torch import Tensor

MANIFEST_METHOD = "mobizo_manifest"
INITIAL_ADAPTER_METHOD = "initial_adapter"
#: The methods with nothing of the model in them.
_WITHOUT_WEIGHTS = (MANIFEST_METHOD, INITIAL_ADAPTER_METHOD, "apply")
#: Programs of this backend run on a machine without the NPU in a simulator, whose libraries are loaded first.
_SIMULATED = "QnnBackend"


class LoadedProgram:
    """A .pte file opened by ExecuTorch's runtime.

    Methods are loaded on first use. Each gets a program object of its own (the file is mapped, so this costs no copy):
    a program object keeps every method it has loaded, so this is how :meth:`release` can give one back.
    """

    def __init__(self, path: str | Path, weights_file: str | Path | None = None, *, verify: bool = True) -> None:
        """Open the file and read the manifest in it.

        Args:
            weights_file: where the weights are, if the program has them in a file of their own; None: beside it.
            verify: read the whole file once and compare its hash with its footer's, before the runtime sees it.

        Raises:
            WeightsFileError: ``weights_file`` is given, and the program has its weights inside.
            ProgramFileError: not a whole, undamaged, loadable .pte with a manifest inside.
            ManifestError, ManifestVersionError: the manifest inside is not valid.
            SidecarMismatchError: the ``.json`` of the same name differs from the manifest inside.
        """
        self.path = Path(path)
        self._verify = verify
        self._container: Container = examine(self.path, verify=verify)
        self._methods: dict[str, Method] = {}
        self._programs: dict[str, Program] = {}
        self._delegates: list[str] | None = None
        program = self._open()
        self.method_names = tuple(sorted(program.method_names))
        # A program object holds the weights that are no delegate's in memory: one at a time.
        del program
        if MANIFEST_METHOD not in self.method_names:
            raise ProgramFileError(
                self.path,
                f"no `{MANIFEST_METHOD}` inside, only {list(self.method_names)}",
                "This .pte was not written by mobizo: lower the model with `mobizo lower`.",
            )
        self.manifest = Manifest.from_json(self._manifest_text())
        self._check_footer()
        self._check_methods()
        self._check_sidecar()
        self._given = None if weights_file is None else Path(weights_file)
        self._weights: Weights | None = None
        if self._given is not None and self.manifest.weights_file is None:
            raise WeightsFileError(self._given, f"{self.path} has its weights inside", "Leave the weights file out.")

    def require_weights(self) -> None:
        """Find and check the weights file, if the program has one; done once, before the first method that reads it.

        Raises:
            WeightsFileError: it is missing, or not the one that the program was lowered with.
        """
        if self._weights is None and self.manifest.weights_file is not None:
            self._weights = find_weights(self.path, self.manifest.weights_file, self._given, verify=self._verify)

    def execute(self, method: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run a method on contiguous tensors in the manifest's order; outputs are fresh tensors.

        Raises:
            MissingMethodError, ProgramFileError, WeightsFileError, ExecutionError.
        """
        loaded = self._load(method)
        try:
            return list(loaded.execute(list(inputs)))
        except RuntimeError as error:
            raise ExecutionError(method, str(error)) from error

    def initial_adapter(self) -> dict[str, Tensor]:
        """Every adapter tensor by FQN, trainable and frozen, as it was when the model was lowered.

        Raises:
            MissingMethodError: the .pte carries no initial adapter.
            AdapterError: what it carries is not what the manifest describes.
        """
        tensors = self._constant(INITIAL_ADAPTER_METHOD)
        specs = self.manifest.adapter
        found = [(list(t.shape), str(t.dtype).removeprefix("torch.")) for t in tensors]
        expected = [(list(spec.shape), str(spec.dtype)) for spec in specs]
        if found != expected:
            raise AdapterError(
                f"{self.path}: `{INITIAL_ADAPTER_METHOD}` returns {len(found)} tensors, and they are not the "
                f"{len(expected)} of the manifest's `adapter`. Lower the model again."
            )
        return {spec.fqn: tensor for spec, tensor in zip(specs, tensors, strict=True)}

    def resident_methods(self) -> tuple[str, ...]:
        """The methods that are loaded now."""
        return tuple(self._methods)

    def release(self, method: str) -> None:
        """Free a method's arenas and its delegates' packed weights. No-op if it is not loaded."""
        self._methods.pop(method, None)
        self._programs.pop(method, None)

    def _open(self, weights: Weights | None = None) -> Program:
        """Let the runtime map the files; they are still those that were checked, before and after."""
        self._require_unchanged(weights)
        program = self._map(None if weights is None else weights.path)
        self._require_unchanged(weights)
        return program

    def _require_unchanged(self, weights: Weights | None) -> None:
        if not self._container.identity.is_that_of(self.path):
            raise ProgramFileError(
                self.path, "replaced or changed since this session opened it", "Open it again in a new session."
            )
        if weights is not None:
            weights.require_unchanged()

    def _map(self, weights: Path | None) -> Program:
        with captured_stderr(f"opening {self.path}") as log:
            executorch = runtime()
            # The first use of the thread pool logs a dozen lines about the processor; let it be here, unseen.
            bindings()._threadpool_get_thread_count()
            try:
                return executorch.Runtime.get().load_program(
                    self.path, verification=executorch.Verification.InternalConsistency, data_path=weights
                )
            except RuntimeError as error:
                failure = error
        raise ProgramFileError(
            self.path,
            f"the ExecuTorch runtime refuses it ({log.reason() or failure})",
            "Copy the file again, or lower the model again with the installed ExecuTorch.",
        ) from failure

    def _load(self, name: str) -> Method:
        if name not in self._methods:
            if name not in self.method_names:
                raise MissingMethodError(name, [m for m in self.method_names if m in self.manifest.methods])
            if name not in _WITHOUT_WEIGHTS:
                self.require_weights()
            program = self._open(None if name in _WITHOUT_WEIGHTS else self._weights)
            method: Method | None = None
            failure: Exception | None = None
            with captured_stderr(f"loading method `{name}` of {self.path}") as log:
                missing = "" if name in (MANIFEST_METHOD, INITIAL_ADAPTER_METHOD) else self._simulator()
                try:
                    method = program.load_method(name)
                except RuntimeError as error:
                    failure = error
            if method is None:
                raise self._load_failure(name, log.reason() or str(failure), missing) from failure
            self._programs[name], self._methods[name] = program, method
        return self._methods[name]

    def _simulator(self) -> str:
        """Load the HTP simulator where the program needs one; what is missing if it cannot be."""
        if _SIMULATED not in self._backends() or not qnn_host.on_host():
            return ""
        try:
            qnn_host.enable()
        except (qnn_host.HostLibrariesMissing, qnn_host.HostLibrariesUnusable) as error:
            return str(error)
        return ""

    def _backends(self) -> list[str]:
        """The delegates that the program needs: the manifest's, or in older files those that the methods name."""
        if self.manifest.backend is not None:
            return [self.manifest.backend]
        if self._delegates is None:
            self._delegates = sorted(delegates_of(self.path))
        return self._delegates

    def _load_failure(self, method: str, reason: str, missing: str) -> ProgramFileError:
        if missing:
            return ProgramFileError(
                self.path,
                f"method `{method}` was compiled for Qualcomm's NPU and needs its simulator here; {missing}",
                "Or run it on the device that it was compiled for.",
            )
        registered = list(runtime().Runtime.get().backend_registry.registered_backend_names)
        lacking = [name for name in self._backends() if name not in registered]
        if lacking:
            return ProgramFileError(
                self.path,
                f"lowered for target `{self.manifest.target}`, which needs the runtime's {' and '.join(lacking)}; "
                f"this runtime has {registered}",
                "Run it on a device whose runtime has that delegate, or lower the model for another target.",
            )
        return ProgramFileError(
            self.path,
            f"the ExecuTorch runtime cannot load method `{method}` ({reason})",
            "Lower the model again with the installed ExecuTorch.",
        )

    def _constant(self, name: str) -> list[Any]:
        """The values of a constant method, which is not kept."""
        method = self._load(name)
        try:
            return list(method.execute([]))
        except RuntimeError as error:
            raise ExecutionError(name, str(error)) from error
        finally:
            self.release(name)

    def _manifest_text(self) -> str:
        values: list[Any] = []
        try:
            values = self._constant(MANIFEST_METHOD)
        except UnicodeDecodeError as error:
            raise ManifestError("manifest", f"expected UTF-8 text in {self.path} ({error.reason})") from error
        if len(values) != 1 or not isinstance(values[0], str):
            raise ManifestError("manifest", f"expected one text from `{MANIFEST_METHOD}` of {self.path}")
        return values[0]

    def _check_footer(self) -> None:
        found = self._container.hash
        if found is None or found.has_footer:
            return
        if self.manifest.format_version > 1:
            raise without_footer(self.path)
        warnings.warn(
            f"{self.path}: written in format 1, which has no hash of the program and its tokenizer: damage to "
            "their bytes would not be noticed. Lower the model again to have one.",
            UnprovenWarning,
            stacklevel=4,
        )

    def _check_methods(self) -> None:
        missing = sorted(set(self.manifest.methods) - set(self.method_names))
        if missing:
            raise ProgramFileError(
                self.path,
                f"the manifest describes {missing}, which the program does not have",
                "Lower the model again.",
            )

    def _check_sidecar(self) -> None:
        sidecar = self.path.with_suffix(".json")
        if not sidecar.exists():
            return
        inside, beside = self.manifest.to_dict(), Manifest.load(sidecar).to_dict()
        stated, found = beside.pop("program_file"), self._container.hash
        for field in beside:
            if inside[field] != beside[field]:
                raise SidecarMismatchError(sidecar, field, _short(inside[field]), _short(beside[field]))
        actual = {} if found is None else {"sha256": found.sha256, "bytes": found.bytes}
        if stated is not None and actual and stated != actual:
            raise SidecarMismatchError(sidecar, "program_file", actual, stated, "that program has")


def _short(value: object, limit: int = 120) -> str:
    text = str(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
