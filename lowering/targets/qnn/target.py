"""Qualcomm QNN: the NPU (HTP) of Snapdragon chips, in half precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lowering.errors import LoweringFailed, TargetUnavailable
from lowering.executorch_compat.output import CapturedOutput, captured_output
from lowering.targets.availability import Availability
from lowering.targets.base import Target
from lowering.targets.options import TargetOption
from runtime_driver.backends import qnn as qnn_host

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.fx import Node

    from lowering.calibration import Calibration
    from mobizo_passes.graph.dialect import Dialect
    from mobizo_passes.graph.passes import Pass

# ExecuTorch's names, which are Qualcomm's part numbers; see docs/qnn.md for those that were compiled for here.
SOCS = (
    "SM8650",
    "SM8750",
    "SM8850",
    "SM8845",
    "SM8550",
    "SM8475",
    "SM8450",
    "SM8350",
    "QCM6490",
    "QCS9100",
    "SA8255",
    "SA8295",
    "SA8797",
    "SAR2230P",
    "SC8380XP",
    "SSG2115P",
    "SSG2125P",
    "SW6100",
    "SXR1230P",
    "SXR2230P",
    "SXR2330P",
)


class QnnTarget(Target):
    """One HTP context binary a program, compiled ahead of time for one chip."""

    name = "qnn"
    backend = "QnnBackend"
    small_share = 0.0
    checks_itself = False
    precisions = ("fp16", "16a8w", "8a8w")
    precision_help = "What the HTP computes in: halves, or integers of 16 or 8 bits for activations and 8 for weights."
    implied = frozenset()
    options = (
        TargetOption("soc", SOCS, "SM8650", "The chip that the program is compiled for."),
        TargetOption(
            "weights",
            ("separate", "shared"),
            "separate",
            "Whether the methods in the context binary have one copy of the weights; the simulator cannot run shared.",
        ),
    )

    def availability(self) -> Availability:
        state = super().availability()
        if not state.ready:
            return state
        try:
            qnn_host.find()
        except qnn_host.HostLibrariesMissing as error:
            return Availability(self.name, False, error.missing, error.remedy)
        return state

    def survey(self) -> Availability:
        """The HTP simulator runs what was compiled here; it needs the same libraries."""
        state = super().survey()
        if state.ready or not state.runs:
            return state
        return replace(state, runs=False, runs_missing=state.missing, runs_remedy=state.remedy)

    @property
    def loss_tolerance(self) -> float:
        """Ten times what was seen on the simulator: it is to find what is broken, not what is coarse."""
        return {"fp16": 1e-2, "16a8w": 0.1, "8a8w": 0.5}[self.precision]

    @property
    def passes(self) -> Sequence[Pass]:
        from lowering.targets.qnn.pipeline import PASSES

        return PASSES[self.precision]

    @property
    def dialect(self) -> Dialect:
        from lowering.targets.qnn.dialect import dialect

        return dialect(copies=not self.quantizes)

    @property
    def quantizes(self) -> bool:
        return self.precision != "fp16"

    def quantizing(self, method: str, legal: ExportedProgram, calibration: Calibration) -> Sequence[Pass]:
        from lowering.passes.forms.copy_views import CopyViews
        from lowering.passes.values.quantize_body import QuantizeBody
        from lowering.targets.qnn.partitioner import body_of

        def body(calls: list[Node]) -> list[Node]:
            return list(body_of(calls)[0])

        def observe(nodes: Sequence[Node]) -> Iterator[list[Tensor]]:
            return calibration.values(method, legal, nodes)

        return QuantizeBody(body, observe, self._quantizer), CopyViews()

    def edge_passes(self, program: ExportedProgram) -> Sequence[Any]:
        if not self.quantizes:
            return ()
        from lowering.executorch_compat.qnn import quantized_value_passes

        return quantized_value_passes(program)

    @contextmanager
    def quantizing_context(self) -> Iterator[None]:
        """Within, nothing is heard of what torchao and QNN's quantizer miss on this machine."""
        from lowering.executorch_compat.qnn import only_warnings

        with only_warnings(), captured_output(CapturedOutput()):
            yield

    @property
    def kept_whole(self) -> tuple[Any, ...]:
        from lowering.targets.qnn.partitioner import WHOLE

        return WHOLE

    def partitioner(self, method: str, outside: frozenset[str] = frozenset()) -> Any | None:
        from lowering.targets.qnn.partitioner import HtpPartitioner

        return HtpPartitioner(method, self._compile_specs())

    @contextmanager
    def lowering_context(self) -> Iterator[None]:
        """Within, ExecuTorch's QNN manager is up: it checks operators and compiles context binaries, unheard."""
        from executorch.backends.qualcomm.utils.qnn_manager_lifecycle import QnnManagerContext

        from lowering.executorch_compat.qnn import only_warnings

        log = CapturedOutput()
        try:
            with only_warnings(), captured_output(log), QnnManagerContext({"step": self._compile_specs()}):
                yield
        except LoweringFailed as error:
            reason = "; ".join([error.reason, *log.lines("[ERROR]")])
            raise LoweringFailed(error.method, error.stage, reason, error.node) from error
        except RuntimeError as error:
            reason = "; ".join([str(error), *log.lines("[ERROR]")])
            raise LoweringFailed("every method", "starting QNN's compiler", reason) from error

    def _compile_specs(self) -> list[Any]:
        self._enable()
        from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset
        from executorch.backends.qualcomm.utils.utils import (
            generate_htp_compiler_spec,
            generate_qnn_executorch_compiler_spec,
        )

        options = generate_htp_compiler_spec(
            use_fp16=not self.quantizes, use_weight_sharing=self.chosen["weights"] == "shared"
        )
        return generate_qnn_executorch_compiler_spec(QcomChipset[self.chosen["soc"]], options)

    def _quantizer(self) -> Any:
        self._enable()
        from executorch.backends.qualcomm.quantizer.quantizer import QnnQuantizer, QuantDtype
        from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset, QnnExecuTorchBackendType
        from torchao.quantization.pt2e import MinMaxObserver

        from lowering.targets.qnn.observer import WideRange

        quantizer = QnnQuantizer(QnnExecuTorchBackendType.kHtpBackend, QcomChipset[self.chosen["soc"]])
        dtype = QuantDtype[f"use_{self.precision}"]
        # Not the moving average of the ranges, which is QNN's default: that is nearly the range of the first run.
        observer = WideRange if self.precision == "16a8w" else MinMaxObserver
        quantizer.set_default_quant_config(
            dtype, is_qat=False, is_conv_per_channel=True, is_linear_per_channel=True, act_observer=observer
        )
        return quantizer

    def _enable(self) -> None:
        try:
            qnn_host.enable()
        except qnn_host.HostLibrariesMissing as error:
            raise TargetUnavailable(self.name, error.missing, error.remedy) from error
        except qnn_host.HostLibrariesUnusable as error:
            raise LoweringFailed("every method", "loading QNN's libraries", str(error)) from error
