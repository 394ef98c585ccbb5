"""Canaries: what `lowering.executorch_compat` stands on is still there; each message says what to do when it is not."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
from pathlib import Path
from typing import Any

import executorch
import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from torch import Tensor, nn
from torch.export import ExportedProgram, export

from lowering.checks import check_initial_values
from lowering.errors import StateLost
from lowering.executorch_compat import runtime
from lowering.executorch_compat.edge import edge_config, initial_value_passes, set_constant_method
from lowering.executorch_compat.ordering import calls_in_order
from lowering.executorch_compat.output import CapturedOutput, captured_output
from lowering.executorch_compat.retracing import KEPT_WHOLE, as_incremental, without_provenance
from lowering.executorch_compat.tags import TAG, tag
from lowering.executorch_compat.vulkan import only_fusions, root_log_level_kept
from lowering.executorch_compat.weights import DelegatedWeights, Weight, entries, promised_bytes, serialized
from lowering.executorch_compat.xnnpack import PLAIN_GRAPH, refusal_of
from lowering.targets.xnnpack.partitioner import ProductPartitioner
from mobizo_passes.graph.operators import is_functional, schema_of

QUALCOMM = Path(executorch.__path__[0]) / "backends" / "qualcomm"
X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


def exported(model: nn.Module | None = None) -> ExportedProgram:
    return export(model or nn.Linear(64, 64), (X,))


def edge_of(program: ExportedProgram, partitioned: bool = False, **arguments: Any) -> Any:
    partitioner: list[Any] = [ProductPartitioner()] if partitioned else []
    config = edge_config(KEPT_WHOLE)
    return to_edge_transform_and_lower(program, partitioner=partitioner, compile_config=config, **arguments)


def test_edge_configuration():
    wanted = {"_check_ir_validity", "_skip_dim_order", "preserve_ops"}
    known = set(inspect.signature(EdgeCompileConfig).parameters)
    assert wanted <= known, (
        f"EdgeCompileConfig has no {sorted(wanted - known)} any more: see what replaced it, and change "
        "`executorch_compat.edge.edge_config`; without it the legalized forms may be decomposed or dim orders inserted"
    )


def test_programs_are_not_retraced(monkeypatch: pytest.MonkeyPatch):
    retraced: list[ExportedProgram] = []
    original = ExportedProgram.run_decompositions

    def counted(self: ExportedProgram, *args: Any, **kwargs: Any) -> ExportedProgram:
        retraced.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", counted)
    edge_of(as_incremental(exported()))
    assert not retraced, (
        "ExecuTorch retraces programs that have nothing to decompose: it no longer calls `run_decompositions` of the "
        "program that it was given. See what `to_edge_transform_and_lower` calls now and answer that in "
        "`executorch_compat.retracing.IncrementalProgram`, or delete the class: lowering gets slower and gives the same"
    )


def test_provenance_is_shared():
    from torch.fx.traceback import NodeSource

    node = torch.fx.Graph().placeholder("x")
    source = NodeSource(node, "pass")
    with without_provenance():
        inside = copy.deepcopy(source)
    assert inside is source, (
        "torch no longer copies NodeSource by `__deepcopy__`: patch what it uses now in "
        "`executorch_compat.retracing.without_provenance`, or delete it: lowering takes a tenth longer"
    )
    assert copy.deepcopy(source) is not source, (
        "torch shares node provenance by itself: delete `executorch_compat.retracing.without_provenance`"
    )


def test_a_constant_method_can_be_replaced():
    edge = edge_of(exported(), constant_methods={"word": "before"})
    set_constant_method(edge, "word", "after it was partitioned")
    plans = {plan.name: plan for plan in edge.to_executorch().executorch_program.execution_plan}
    found = [getattr(value.val, "string_val", None) for value in plans["word"].values]
    assert "after it was partitioned" in found, (
        "ExecuTorch keeps constant methods elsewhere than in `EdgeProgramManager._config_methods`: change "
        "`executorch_compat.edge.set_constant_method`, or the manifest in a program with external weights will lack "
        "their hash"
    )


class Counting(nn.Module):
    """Writes a buffer that starts at 3."""

    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Buffer(torch.full((2,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x + self.count.sum()


def is_stored(plan: Any) -> bool:
    try:
        check_initial_values("step", plan, ["count"])
    except StateLost:
        return False
    return True


@pytest.mark.parametrize("kept", [True, False])
def test_a_written_buffer_s_initial_value_is_stored(kept: bool):
    edge = edge_of(exported(Counting()))
    passes = initial_value_passes(edge) if kept else []
    finished = edge.to_executorch(ExecutorchBackendConfig(passes=passes))
    plan = finished.executorch_program.execution_plan[0]
    if not kept:
        assert not is_stored(plan), (
            "ExecuTorch stores initial values of written buffers by itself: delete "
            "`executorch_compat.edge.initial_value_passes`"
        )
    else:
        assert is_stored(plan), (
            "InitializedMutableBufferPass no longer keeps initial values: see how ExecuTorch marks such buffers now "
            "(`et_init_buffer` before), and change `executorch_compat.edge.initial_value_passes`"
        )


def test_marked_weights_of_a_delegate_are_moved_to_a_file():
    program = exported()
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in program.graph_signature.inputs_to_parameters:
            tag(node)
    weights = DelegatedWeights(edge_of(as_incremental(program), partitioned=True), TAG)
    found = weights.found()
    sizes = sorted(len(each.data) for each in found.values())
    assert sizes == [64 * 4, 64 * 64 * 4], (
        "XNNPACK's stage no longer puts constants into the file that `meta['custom']['delegate_constant_tag']` names, "
        f"or ExecuTorch keeps them elsewhere than in `_named_data_store.external_data`: found entries of {sizes} "
        "bytes. Change `executorch_compat.tags` and `executorch_compat.weights.DelegatedWeights`"
    )
    weights.move_inside(found)
    assert not weights.found()


def test_weights_files_are_written_and_read():
    weights = {"b": Weight(b"12345678"), "a": Weight(b"abcd")}
    data = bytes(serialized(weights, TAG))
    read = {key: bytes(value) for key, value in entries(data).items()}
    assert read == {"a": b"abcd", "b": b"12345678"}, (
        "the format of weights files changed: see executorch/extension/flat_tensor/serialize, change "
        "`executorch_compat.weights`, and give weights files of the old format an error of their own"
    )
    assert promised_bytes(data) == len(data)
    assert promised_bytes(b"x" * 100) is None


def test_calls_of_a_delegate_keep_their_order():
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.sigmoid(self.first(x))) + self.first(x)

    with calls_in_order():
        edge = edge_of(as_incremental(exported(Late())), partitioned=True).exported_program()
    (lowered,) = (getattr(edge.graph_module, node.target) for node in edge.graph.nodes if node.op == "get_attr")
    inner = lowered.original_module.graph
    calls = [
        str(node.target).rpartition("aten.")[2].split(".")[0] for node in inner.nodes if node.op == "call_function"
    ]
    assert calls == ["linear", "sigmoid", "linear", "linear", "add"], (
        "ExecuTorch sorts the calls of a partition elsewhere than in `lowered_backend_module.topo_sort`: find where, "
        "and change `executorch_compat.ordering`; without it checkpoints save no memory"
    )


def test_xnnpack_takes_a_plain_graph():
    from executorch.backends.xnnpack import xnnpack_preprocess

    assert PLAIN_GRAPH.key in inspect.getsource(xnnpack_preprocess), (
        f"XNNPACK's stage no longer reads the compile spec {PLAIN_GRAPH.key!r}: lowering got slower by a third. See "
        "whether another spec leaves its graph passes out, or delete `executorch_compat.xnnpack.PLAIN_GRAPH`"
    )


def test_xnnpack_says_why_it_refuses():
    class Softmax(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x, 0)

    program = edge_of(exported(Softmax())).exported_program()
    (node,) = (each for each in program.graph.nodes if "softmax" in each.name)
    config = ProductPartitioner().target_partitioner_configs["_softmax.default"]
    assert refusal_of(config, node, program), (
        "XNNPACK's partitioner no longer remembers why it refused a node (`why.node`, `why.reason` in "
        "executorch/backends/xnnpack/partition/config): find out where it says it now, and change "
        "`executorch_compat.xnnpack.refusal_of`; the report has no reasons until then"
    )


def test_vulkan_s_fusions_can_be_chosen():
    with root_log_level_kept():
        from executorch.backends.vulkan.patterns import fusable_patterns
    before = dict(fusable_patterns)
    assert "rms_norm" in before, (
        "Vulkan's stage has no fusion called `rms_norm` in `fusable_patterns`: see what it is called now, and change "
        "`targets.vulkan.partitioner.tried_fusions_only`"
    )
    with only_fusions("rms_norm"):
        assert list(fusable_patterns) == ["rms_norm"]
    assert fusable_patterns == before


def test_vulkan_s_import_still_needs_quieting():
    with root_log_level_kept():
        from executorch.backends.vulkan.partitioner import vulkan_partitioner
    assert "logger.setLevel(logging.INFO)" in inspect.getsource(vulkan_partitioner), (
        "importing ExecuTorch's Vulkan modules no longer changes the root logger: delete "
        "`executorch_compat.vulkan.root_log_level_kept`"
    )


def test_an_import_that_fails_leaves_the_log_as_it_was():
    root = logging.getLogger()
    level = root.level

    def half_an_import() -> None:
        with root_log_level_kept():
            root.setLevel(logging.INFO)
            raise ImportError("half of it")

    with pytest.raises(ImportError):
        half_an_import()
    assert root.level == level


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("_passes/annotate_quant_attrs.py", "class AnnotateQuantAttrs"),
        ("_passes/fold_qdq.py", "class FoldQDQ"),
        ("utils/qnn_manager_lifecycle.py", "def QnnManagerContext"),
    ],
)
def test_qnn_s_passes_are_where_they_were(file: str, text: str):
    """Read, not imported: importing them needs Qualcomm's libraries."""
    path = QUALCOMM / file
    assert path.is_file() and text in path.read_text(), (  # noqa: PT018
        f"ExecuTorch's QNN stage has no {text.split()[1]} in {file}: see how its own recipes "
        "(executorch/backends/qualcomm/utils/utils.py) prepare programs now, and change "
        "`executorch_compat.qnn` and `targets.qnn.target`"
    )


def test_the_runtime_lists_what_it_has():
    backends, operators = runtime.registered_backends(), runtime.registered_operators()
    assert backends and "XnnpackBackend" in backends and operators and "aten::add.out" in operators, (  # noqa: PT018
        "ExecuTorch's runtime lists its backends and kernels elsewhere than in `portable_lib."
        "_get_registered_backend_names` and `_get_operator_names`: change `executorch_compat.runtime`"
    )


def test_schemas_of_operators():
    edge = edge_of(exported(), partitioned=False).exported_program()
    schemas = [schema_of(node.target) for node in edge.graph.nodes if node.op == "call_function"]
    names = [None if each is None else each.name for each in schemas]
    assert names == ["aten::linear"], (
        f"the schema of an edge operator is elsewhere than in `_op._schema`: found {names}; change "
        "`mobizo_passes.graph.operators.schema_of`, on which FLOPs and every report rest"
    )
    aten = torch.ops.aten
    assert is_functional(aten.add.Tensor) and not is_functional(aten.add_.Tensor), (  # noqa: PT018
        "torch tells elsewhere than in `OpOverload._schema.is_mutable` whether an operator writes: change "
        "`mobizo_passes.graph.operators`"
    )


def test_what_native_code_prints_is_captured(capfd: pytest.CaptureFixture[str]):
    import os

    log = CapturedOutput()
    with captured_output(log):
        os.write(1, b"[ERROR] of a compiler\n")
        os.write(2, b"noise\n")
    assert log.lines("[ERROR]") == ["[ERROR] of a compiler"]
    assert capfd.readouterr() == ("", "")


def test_a_delegate_s_entry_is_what_is_read_of_it():
    from executorch.exir._serialize.data_serializer import DataEntry

    fields = {field.name for field in dataclasses.fields(DataEntry)}
    assert {"buffer_index", "alignment"} <= fields, (
        f"an entry of ExecuTorch's data store has {sorted(fields)}: change `executorch_compat.weights`"
    )


def test_maxima_are_left_outside():
    class Maximum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(1, 4, 8, 8).max(-1, keepdim=True).values

    with pytest.raises(RuntimeError, match="only supports dim"):  # Else see whether its values are right now.
        to_edge_transform_and_lower(exported(Maximum()), partitioner=[XnnpackPartitioner()])
    lowered = to_edge_transform_and_lower(exported(Maximum()), partitioner=[ProductPartitioner()])
    assert "max.dim" in str(lowered.exported_program().graph)
