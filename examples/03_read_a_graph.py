"""Read what the compiler did: the rewritten graph, what each pass changed, and what is computed only once.

With the name of an .svg or .html file as argument it also draws the graph; docs/training_step.svg was made so.
"""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

import mobizo_passes as mz


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_cache=False,
    )
    # LoRA on the upper of two layers: everything below it is computed once for all perturbations.
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[1], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config).eval(), lora).eval()
    tokens = torch.randint(0, 64, (2, 8))
    labels = torch.full_like(tokens, -100)
    labels[:, -1] = tokens[:, -1]
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    program = mz.transform(model, batch, estimator=mz.TwoSided(queries=2))

    print("The step program, as text:\n")
    print(program)
    print("\nWhat each pass did:\n")
    for entry in program.history:
        print(f"  {entry.name:<28} {entry.rewrites} rewrites")
    print("\nWhere each LoRA site became one product per group:\n")
    print(program.diff("insert-mp-lora"))
    print("\nThe lowest blocks with the most FLOPs, and how often they are computed:\n")
    blocks = [data for _, data in program.blocks().nodes(data=True)]
    for block in sorted(blocks, key=lambda data: -data["flops"])[:5]:
        print(f"  {block['flops'] / program.flops.total:6.1%}  {block['computed']:<9}  {block['name']}")
    graph = program.to_networkx()
    expanded = sum(bool(data.get("expanded")) for _, data in graph.nodes(data=True))
    print(f"\n{expanded} of {graph.number_of_nodes()} nodes are computed once per perturbation, the others once.")
    if len(sys.argv) > 1:
        print(f"Drawn in {program.draw(sys.argv[1])}.")


if __name__ == "__main__":
    main()
