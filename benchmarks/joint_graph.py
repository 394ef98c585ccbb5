"""ExecuTorch's own training path: torch's joint graph of forward and backward, lowered to XNNPACK by ExecuTorch alone.

The loss is that of `backprop-eager-label-only`; the wheel's training extension has SGD as its only optimizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.task import EXACT_LEARNING_RATE, Task, load_lora_model, make_batch


def inputs_of(task: Task) -> tuple[Any, ...]:
    """Token ids, attention mask, and the label of each example."""
    batch = make_batch(task)
    return batch["input_ids"], batch["attention_mask"], batch["labels"][:, -1].contiguous()


def compile_joint(path: Path, layers: int) -> Path:
    """Export the task's model, cut off after its first `layers`, with its backward, and lower it to `path`."""
    if path.exists():
        return path
    import torch
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.config.generic_node_configs import SoftmaxConfig
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from torch.export.experimental import _export_forward_backward

    task = Task()
    model: Any = load_lora_model(task, layers, layers)
    # The runtime has no kernel for the backward of fused attention.
    model.get_base_model().set_attn_implementation("eager")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, label: Any) -> Any:
            out = self.model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=2)
            return torch.nn.functional.cross_entropy(out.logits[:, 0], label)

    exported = torch.export.export(Loss(), inputs_of(task), strict=False)
    joint = _export_forward_backward(exported)
    # What the decomposition of silu's backward makes a constant of, and ExecuTorch refuses.
    for node in list(joint.graph.nodes):
        if node.target is torch.ops.aten.full_like.default and "empty_permuted" in str(node.args[0].target):
            with joint.graph.inserting_before(node):
                full = joint.graph.call_function(
                    torch.ops.aten.full.default, (list(node.meta["val"].shape), node.args[1])
                )
            full.meta.update(node.meta)
            node.replace_all_uses_with(full)
            joint.graph.erase_node(node)
    joint.graph.eliminate_dead_code()
    joint.graph_module.recompile()
    # Its XNNPACK stage fails on a softmax that the backward reads as well ("pass through arguments").
    configs = [each for each in ALL_PARTITIONER_CONFIGS if each is not SoftmaxConfig]
    edge = to_edge_transform_and_lower(joint, partitioner=[XnnpackPartitioner(configs=configs)])
    calls = [str(node.target) for node in edge.exported_program().graph.nodes if node.op == "call_function"]
    delegates = sum("executorch_call_delegate" in name for name in calls)
    outside = sum("getitem" not in name for name in calls) - delegates
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "report.txt").write_text(f"{delegates} partitions, {outside} nodes outside\n", encoding="utf-8")
    with path.open("wb") as file:
        edge.to_executorch().write_to_file(file)
    return path


class JointGraph:
    """One forward and backward call of ExecuTorch's training module, and its SGD."""

    def __init__(self, task: Task, program: Path) -> None:
        from executorch.extension.training import _load_for_executorch_for_training

        self.module: Any = _load_for_executorch_for_training(str(program))
        self.inputs = inputs_of(task)
        self.optimizer: Any = None

    def step(self, number: int) -> float:
        from executorch.extension.training import get_sgd_optimizer

        (loss, *_) = self.module.forward_backward("forward", self.inputs)
        if self.optimizer is None:
            self.optimizer = get_sgd_optimizer(self.module.named_parameters(), EXACT_LEARNING_RATE, 0, 0, 0, False)
        self.optimizer.step(self.module.named_gradients())
        return float(loss)
