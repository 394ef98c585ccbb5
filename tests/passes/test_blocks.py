"""Blocks of a step program: a partition along the module hierarchy whose flow has no cycle."""

from __future__ import annotations

from typing import Any

import networkx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes as mz
from mobizo_passes.graph.facts import facts, role
from mobizo_passes.views.blocks import Block, block_tree, fold_runs, signature
from tests.models import CASES, Lora, integers, random, seeded
from tests.passes.test_diff import deep

NAMES = [case.name for case in CASES]


def tree(program: mz.TrainingProgram) -> Block:
    return block_tree(program._methods["step"])


def named(block: Block, name: str) -> list[Block]:
    return [each for each in block.walk() if each.name == name and each.kind == "module"]


@pytest.mark.parametrize("name", NAMES)
def test_every_node_is_in_one_block_on_each_level(compiled, name: str) -> None:
    program, _, _ = compiled(name)
    root = tree(program)
    everything = [n for n in program._methods["step"].graph.nodes if n.op != "output"]
    assert list(root.nodes) == everything
    for block in root.walk():
        if block.children:
            held = [n for child in block.children for n in child.nodes]
            assert len(held) == len(set(held))
            assert set(held) == set(block.nodes)
            assert len(block.children) > 1


@pytest.mark.parametrize("name", NAMES)
def test_the_flow_between_siblings_goes_forward_and_is_the_graphs(compiled, name: str) -> None:
    for block in tree(compiled(name)[0]).walk():
        assert all(a < b for a, b in block.edges)
        place = {n: i for i, child in enumerate(block.children) for n in child.nodes}
        weights = {"parameter", "buffer", "constant"}
        used = {
            (place[source], place[node])
            for node in place
            for source in node.all_input_nodes
            if source in place and not (source.op == "placeholder" and role(source).kind in weights)
        }
        assert {(a, b) for a, b in used if a != b} == set(block.edges)


@pytest.mark.parametrize("depth", [None, 1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_flops_add_up_on_every_depth(compiled, name: str, depth: int | None) -> None:
    program, _, _ = compiled(name)
    graph = program.blocks(depth)
    assert networkx.is_directed_acyclic_graph(graph)
    rows: list[dict[str, Any]] = [attributes for _, attributes in graph.nodes(data=True)]
    assert sum(row["flops"] for row in rows) == program.flops.total
    assert sum(row["expanded_flops"] for row in rows) == program.flops.expanded
    members = [m for row in rows for m in row["members"]]
    assert sorted(members) == sorted(set(program.to_networkx()) - {"output"})
    assert all(row["nodes"] == len(row["members"]) for row in rows)
    assert sum(row["perturbed"] for row in rows) >= len(program.sites)


@pytest.mark.parametrize("name", NAMES)
def test_the_lowest_blocks_of_a_model_are_computed_one_way(compiled, name: str) -> None:
    graph = compiled(name)[0].blocks()
    rows = [row for _, row in graph.nodes(data=True) if row["kind"] in ("module", "operations")]
    assert {row["computed"] for row in rows} == {"once", "per group"}


def test_the_frontier_is_every_repeated_value(compiled) -> None:
    program, _, _ = compiled("block")
    expands = [a for _, a in program.to_networkx().nodes(data=True) if a["op"] == "mobizo.expand"]
    assert sorted(after for _, after in tree(program).frontier) == sorted(a["type"] for a in expands)


def test_a_branch_without_lora_is_computed_once(compiled) -> None:
    root = tree(compiled("one-branch")[0])
    computed = {name: named(root, name)[0].computed for name in ("stem", "plain", "tuned", "head")}
    assert computed == {"stem": "once", "plain": "once", "tuned": "both", "head": "per group"}
    (repeated,) = (block for block in root.children if block.kind == "expand")
    assert ("f32[3, 5]", "f32[24, 5]") in repeated.frontier


def test_a_module_called_twice_is_two_blocks(compiled) -> None:
    first, second = named(tree(compiled("called-twice")[0]), "layer")
    assert (first.computed, second.computed) == ("both", "per group")
    assert len(first.perturbed) == len(second.perturbed) == 1


def test_a_hoisted_selection_stands_with_its_reader(compiled) -> None:
    """Its own origin is the loss: taken literally that would cut the attention into two blocks."""
    (attention,) = named(tree(compiled("block")[0]), "attention.0")
    selects = [n for n in attention.nodes if n.target is torch.ops.aten.select.int]
    assert len(selects) == 1


def test_what_weights_alone_decide_is_no_shared_computation() -> None:
    """Gemma's norms multiply by ``1 + weight``: behind a LoRA they are computed per group, not in part once."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x) * (1 + self.weight)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora, self.norm = Lora(6, 6), Norm()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.lora(x))

    program = mz.transform(seeded(Model()), (random(2, 6), integers(6, 2)), loss=F.cross_entropy)
    (norm,) = named(tree(program), "norm")
    assert [str(n.target) for n in norm.calls if not facts(n).expanded] == ["aten.add.Tensor"]
    assert (norm.computed, norm.children) == ("per group", ())


def test_roles_stand_beside_the_modules(compiled) -> None:
    root = tree(compiled("llama-qv")[0])
    kinds = {child.kind: child for child in root.children}
    assert root.name == "base_model.model"
    assert [len(kinds[k].calls) for k in ("noise", "perturb", "update")] == [4, 4, 4]
    assert kinds["perturb"].computed == "per group"
    assert {role(n).name for n in kinds["batch"].nodes} == {"input_ids", "attention_mask", "labels"}
    assert {role(n).kind for n in kinds["scalars"].nodes} == {"seed", "lr", "eps"}


def runs(program: mz.TrainingProgram) -> list[list[str]]:
    found = fold_runs(tree(program))
    return [[block.name for block in run] for run in found if run[0].name.startswith("layers")]


def test_equal_layers_that_follow_each_other_are_one_run() -> None:
    once, first, many = runs(deep(7, trained=4))
    assert once == ["layers.0", "layers.1", "layers.2"]
    assert first == ["layers.3"]
    assert many == ["layers.4", "layers.5", "layers.6"]


def test_equal_blocks_with_others_between_them_are_no_run(compiled) -> None:
    """`norms.2` reads what reads `norms.1`: one block of both would read itself."""
    norms = [run for run in fold_runs(tree(compiled("block-tokens")[0])) if run[0].name in ("norms.1", "norms.2")]
    assert signature(norms[0][0]) == signature(norms[1][0])
    assert [len(run) for run in norms] == [1, 1]
