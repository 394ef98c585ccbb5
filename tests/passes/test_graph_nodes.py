"""Arguments by name, and the one table of FLOPs."""

import operator

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from mobizo_passes.graph.flops import node_flops
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, set_arguments

aten = torch.ops.aten


def empty() -> Ir:
    graph = fx.Graph()
    graph.output(())
    return Ir(graph, {}, (), FakeTensorMode())


def call(target, *shapes, after=(), **kwargs) -> fx.Node:
    """One call on inputs of the given shapes, followed by other arguments."""
    ir = empty()
    inputs = [ir.add_input("batch", f"x{i}", torch.empty(shape)) for i, shape in enumerate(shapes)]
    with ir.graph.inserting_before(ir.graph.output_node()):
        return ir.call(target, *inputs, *after, **kwargs)


@pytest.mark.parametrize(("after", "kwargs"), [((1,), {}), ((), {"dim": 1})])
def test_an_argument_is_read_by_name_however_it_is_given(after, kwargs):
    node = call(aten.topk.default, (2, 5), after=(3, *after), **kwargs)
    found = arguments(node)
    assert (found.self, found.k, found.dim, found.largest) == (node.args[0], 3, 1, True)


def test_an_argument_that_is_left_out_has_the_default_of_the_schema():
    assert arguments(call(aten.topk.default, (2, 5), after=(3,))).dim == -1
    assert arguments(call(aten.layer_norm.default, (2, 5), after=([5],))).eps == 1e-5
    assert arguments(call(aten.sum.default, (2, 5))).get("dim", "none") == "none"


def test_our_own_operators_and_items_have_names():
    node = call(torch.ops.mobizo.expand.default, (2, 5), after=(4, 0, 1))
    assert (arguments(node).groups, arguments(node).outer) == (4, 1)
    item = fx.Graph().call_function(operator.getitem, (node, 1))
    assert (arguments(item).source, arguments(item).index) == (node, 1)


def test_a_name_that_is_none_is_an_error_that_lists_the_names():
    with pytest.raises(AttributeError, match="no argument 'axis', only self, dim, index"):
        _ = arguments(call(aten.select.int, (2, 5), after=(0, 1))).axis


def test_arguments_are_set_where_they_stand():
    node = call(aten.topk.default, (2, 5), after=(3,), largest=False)
    x = node.args[0]
    set_arguments(node, k=2, dim=-1, largest=True)
    assert (node.args, node.kwargs) == ((x, 2), {"largest": True})
    set_arguments(node, dim=0)
    assert (node.args, node.kwargs) == ((x, 2), {"largest": True, "dim": 0})


@pytest.mark.parametrize(
    ("node", "multiply_adds"),
    [
        (call(aten.linear.default, (2, 3, 5), (7, 5)), 2 * 3 * 5 * 7),
        (call(aten.mm.default, (3, 5), (5, 7)), 3 * 5 * 7),
        (call(aten.bmm.default, (2, 3, 5), (2, 5, 7)), 2 * 3 * 5 * 7),
        (call(aten.matmul.default, (4, 2, 3, 5), (5, 7)), 4 * 2 * 3 * 5 * 7),
        (call(aten.addmm.default, (7,), (3, 5), (5, 7)), 3 * 5 * 7),
        (call(aten.baddbmm.default, (2, 3, 7), (2, 3, 5), (2, 5, 7)), 2 * 3 * 5 * 7),
        (call(aten.conv2d.default, (2, 3, 8, 8), (5, 3, 2, 2)), 2 * 5 * 7 * 7 * 3 * 4),
        (
            call(aten.convolution.default, (2, 4, 8), (6, 2, 3), after=(None, [1], [0], [1], False, [0], 2)),
            2 * 6 * 6 * 2 * 3,
        ),
        (
            call(aten.convolution.default, (2, 4, 8), (4, 6, 3), after=(None, [1], [0], [1], True, [0], 1)),
            2 * 4 * 8 * 6 * 3,
        ),
        (
            call(aten.scaled_dot_product_attention.default, (2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 6)),
            2 * 3 * 4 * 5 * (8 + 6),
        ),
        (call(torch.ops.mobizo.mp_lora.default, (6, 5), (3, 7, 5), after=(0, 1, False)), 6 * 5 * 7),
        (call(aten.add.Tensor, (2, 3), (2, 3)), 0),
    ],
    ids=lambda each: each.name if isinstance(each, fx.Node) else "",
)
def test_flops_by_hand(node: fx.Node, multiply_adds: int):
    assert node_flops(node) == 2 * multiply_adds
