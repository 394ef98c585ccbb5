"""What became of every node: delegated, or left to ExecuTorch's own kernels, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from lowering.memory import DelegateMemory, delegate_memory
from mobizo_passes.graph.facts import module_of, source_of
from mobizo_passes.graph.flops import node_flops
from mobizo_passes.graph.operators import operation_name, overload_name
from mobizo_passes.graph.passes import PassRecord
from mobizo_passes.markup import table


@dataclass(frozen=True)
class Refusal:
    """Why no delegate took a node: the name of the rule that it fails, and what is wrong.

    Rules are asked one after another, from the operator to its arguments to its place in the graph; this is the one
    that the node got to, the nearest to being taken.
    """

    rule: str
    why: str


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


NO_DELEGATE = Refusal("delegate", "the portable target has no delegate")


@dataclass(frozen=True)
class PortableNode:
    """One node that no delegate took. `origin` is the FQN of the module that it comes from and `source` the line of the
    model, if known; `rule` names the rule that it fails, and `reason` says why."""

    name: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    origin: str
    rule: str
    reason: str
    flops: int
    source: str = ""


@dataclass(frozen=True)
class MethodReport:
    """One method: partitions, nodes and FLOPs (of matrix products) on either side, passes that fired, and memory.

    `arena_bytes` is what ExecuTorch plans for values outside of delegates, and between them, `memory` what delegates
    hold.
    """

    method: str
    partitions: int
    delegated_nodes: int
    delegated_flops: int
    total_flops: int
    portable: tuple[PortableNode, ...]
    passes: tuple[PassRecord, ...]
    memory: DelegateMemory = field(default_factory=DelegateMemory)
    arena_bytes: int = 0

    @property
    def delegated_share(self) -> float:
        """Share of FLOPs that the delegate computes, 0 to 1; 0 for a method without matrix products."""
        return self.delegated_flops / self.total_flops if self.total_flops else 0.0

    def __str__(self) -> str:
        lines = [
            f"{self.method}: {self.partitions} partition{'' if self.partitions == 1 else 's'}, "
            f"{self.delegated_nodes} nodes delegated, {len(self.portable)} not; "
            f"{self.delegated_share:.1%} of {self.total_flops / 1e9:.2f} GFLOP delegated"
        ]
        if self.partitions:
            held, live, saved = self.memory.held, self.memory.live, self.memory.saved
            kept = f", {_mb(saved)} of them saved for the gradient" if saved else ""
            lines.append(
                f"  memory: values {_mb(live)}{kept}; delegate's weights {_mb(held)}; arena {_mb(self.arena_bytes)}"
            )
        lines += [f"  {count:4d} x {op} [{rule}]: {reason}" for count, op, rule, reason in self.refused]
        return "\n".join(lines)

    @property
    def refused(self) -> tuple[tuple[int, str, str, str], ...]:
        """What is not delegated, grouped, the most frequent first: how many nodes, operator, rule and reason."""
        groups = Counter((node.op, node.rule, node.reason) for node in self.portable)
        return tuple((count, *key) for key, count in groups.most_common())


@dataclass(frozen=True)
class Compared:
    """One output of a method beside its eager form: the largest absolute difference, and what rounding explains."""

    method: str
    output: str
    deviation: float
    tolerance: float


@dataclass(frozen=True)
class SelfCheck:
    """What was compared before the program was given out; nothing, and `skipped` says why, if it was not run."""

    compared: tuple[Compared, ...] = ()
    skipped: str = ""

    def __str__(self) -> str:
        if self.skipped:
            return f"self-check: not run: {self.skipped}"
        lines = ["self-check on the example inputs: every output agrees with the eager program; largest deviations"]
        for method in dict.fromkeys(each.method for each in self.compared):
            found = [each for each in self.compared if each.method == method]
            worst = {each.output: each for each in found if each.output in _NAMED}
            others = [each for each in found if each.output not in _NAMED]
            if others:
                worst["adapter"] = max(others, key=lambda each: each.deviation)
            shown = (f"{name} {each.deviation:.1e} (tolerance {each.tolerance:.1e})" for name, each in worst.items())
            lines.append(f"  {method}: {', '.join(shown)}")
        return "\n".join(lines)


_NAMED = ("loss", "losses", "projected_gradients", "logits")


#: Above this error, what a step follows is rounding as much as the loss.
BAR = 0.1


@dataclass(frozen=True)
class Fidelity:
    """Errors of a lowered step beside the same program in float32, over all batches.

    Attributes:
        batches: how many.
        loss_error: the largest difference of a loss, relative to the largest loss.
        gradient_error: of a projected gradient, relative to the largest one; for an exact program, of what a step adds
            to a trained tensor, relative to the most that it adds.
        sign_agreement: share, 0 to 1, of these numbers that have the sign that they have in float32.
        simulated: whether the partitioned graph was run in PyTorch, rounded as the delegate rounds, because the
            target's runtime is not at hand; see `lowering.simulate`.
        differences: whether the estimator divides differences of losses by an epsilon, and their errors with them.
    """

    batches: int
    loss_error: float
    gradient_error: float
    sign_agreement: float
    simulated: bool
    differences: bool

    @property
    def warning(self) -> str:
        """What to say where the precision loses the gradient; "" where it does not."""
        if self.gradient_error <= BAR:
            return ""
        way = "train in a higher precision"
        if self.differences:
            way = "use directional derivatives (ForwardGradient, --estimator forward-gradient), or " + way
        return f"gradients are off by {self.gradient_error:.2g} of the largest, above {BAR}: {way}"

    @property
    def summary(self) -> str:
        """The figures, in one line."""
        where = f"{self.batches} batch{'' if self.batches == 1 else 'es'}{', simulated' if self.simulated else ''}"
        return (
            f"losses off by {self.loss_error:.1e}, gradients by {self.gradient_error:.1e} of the largest, "
            f"{self.sign_agreement:.0%} of their signs agree ({where})"
        )

    def __str__(self) -> str:
        warning = f"\nwarning: {self.warning}" if self.warning else ""
        return f"beside float32: {self.summary}{warning}"


@dataclass(frozen=True)
class Report:
    """The report of a lowering, per method; `str(report)` groups equal nodes, `nodes` names each.

    `widened`: the half-precision dtypes of the model, whose values the program stores and computes in float32.
    `fidelity`: how far the step is from float32, if that was measured.
    """

    target: str
    methods: Mapping[str, MethodReport]
    weight_bytes: int
    program_bytes: int
    weights_file_bytes: int = 0
    self_check: SelfCheck = SelfCheck(skipped="not asked for")
    widened: tuple[str, ...] = ()
    fidelity: Fidelity | None = None

    @property
    def partitions(self) -> int:
        """Delegate calls over all methods."""
        return sum(each.partitions for each in self.methods.values())

    @property
    def nodes(self) -> tuple[tuple[str, PortableNode], ...]:
        """Every node that did not delegate, with its method."""
        return tuple((name, node) for name, each in self.methods.items() for node in each.portable)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "target": self.target,
            "weight_bytes": self.weight_bytes,
            "program_bytes": self.program_bytes,
            "weights_file_bytes": self.weights_file_bytes,
            "self_check": asdict(self.self_check),
            "widened": list(self.widened),
            "fidelity": None if self.fidelity is None else asdict(self.fidelity),
            "methods": {
                name: {**asdict(each), "delegated_share": each.delegated_share} for name, each in self.methods.items()
            },
        }

    def _repr_html_(self) -> str:
        head, *notes = self._about()
        methods = [
            (
                name,
                each.partitions,
                each.delegated_nodes,
                len(each.portable),
                f"{each.delegated_share:.1%} of {each.total_flops / 1e9:.2f} GFLOP",
                _mb(each.memory.held),
                _mb(each.memory.live),
                _mb(each.arena_bytes),
            )
            for name, each in self.methods.items()
        ]
        columns = ("method", "partitions", "delegated", "not", "FLOPs delegated", "weights held", "values", "arena")
        parts = [table(head, columns, methods)]
        for name, each in self.methods.items():
            if each.refused:
                columns = ("nodes", "operator", "rule", "reason")
                title = f"{name}: {len(each.portable)} nodes not delegated"
                parts.append(table(title, columns, each.refused, folded=True))
        said = [(each,) for each in (*notes, self.self_check, self.fidelity) if each is not None]
        return "".join([*parts, table("Checks", (), said)])

    def __str__(self) -> str:
        methods = (str(each) for each in self.methods.values())
        measured = [] if self.fidelity is None else [str(self.fidelity)]
        return "\n".join([*self._about(), *methods, str(self.self_check), *measured])

    def _about(self) -> list[str]:
        weights = f"of it weights {self.weight_bytes / 1e6:.1f} MB"
        if self.weights_file_bytes:
            weights = f"weights file {self.weights_file_bytes / 1e6:.1f} MB"
        head = (
            f"target {self.target}: {self.partitions} partitions in {len(self.methods)} methods; "
            f"program {self.program_bytes / 1e6:.1f} MB, {weights}"
        )
        note = f"the model has {' and '.join(self.widened)} values: they are stored and computed in float32 here"
        return [head, *([note] if self.widened else [])]


def method_report(
    method: str, edge: ExportedProgram, reasons: Mapping[str, Refusal], passes: Sequence[PassRecord]
) -> MethodReport:
    """Read the report off one partitioned edge program."""
    portable: list[PortableNode] = []
    partitions = delegated_nodes = delegated_flops = total_flops = 0
    for node in edge.graph.nodes:
        if node.op != "call_function" or operation_name(node) == "getitem":
            continue
        inner = _lowered_graph(edge, node)
        if inner is None:
            total_flops += node_flops(node)
            portable.append(_portable_node(node, reasons.get(node.name, NO_DELEGATE)))
            continue
        partitions += 1
        calls = [each for each in inner.nodes if each.op == "call_function"]
        delegated_nodes += len(calls)
        flops = sum(node_flops(each) for each in calls)
        delegated_flops += flops
        total_flops += flops
    return MethodReport(
        method,
        partitions,
        delegated_nodes,
        delegated_flops,
        total_flops,
        tuple(portable),
        tuple(passes),
        delegate_memory(edge),
    )


def _lowered_graph(edge: ExportedProgram, node: Node) -> torch.fx.Graph | None:
    if operation_name(node) != "executorch_call_delegate":
        return None
    module: Any = node.args[0]
    lowered = getattr(edge.graph_module, module.target)
    return lowered.original_module.graph


def _portable_node(node: Node, refusal: Refusal) -> PortableNode:
    value = node.meta.get("val")
    is_tensor = isinstance(value, torch.Tensor)
    return PortableNode(
        name=node.name,
        op=overload_name(node),
        shape=tuple(int(s) for s in value.shape) if is_tensor else (),
        dtype=str(value.dtype).removeprefix("torch.") if is_tensor else "",
        origin=module_of(node),
        rule=refusal.rule,
        reason=refusal.why,
        flops=node_flops(node),
        source=source_of(node),
    )
