"""Every row of both tables against autograd, on shapes without two equal sizes and batches of two or more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from mobizo_passes.forward.engine import tangent
from mobizo_passes.forward.table import FLAT, TABLE
from mobizo_passes.graph.facts import role
from mobizo_passes.graph.inline import inline, trace
from mobizo_passes.graph.ir import Ir, Output
from mobizo_passes.passes import AppendGradients, Canonicalize, DecomposeForGradients
from mobizo_passes.reverse.table import ELEMENTWISE, RULES
from tests.models import integers, random

aten = torch.ops.aten
# Reverse mode is done before losses are regrouped.
REDUCE = torch.ops.mobizo.reduce_loss.default

# float64 leaves nothing but the formula: an error of a rule is never this small.
TOLERANCE = 1e-10


def graph_of(fn: Callable[..., Tensor], values: list[Tensor]) -> Ir:
    """The loss ``Σ fn(values) · w``, with fixed w, as a graph whose floating-point values are the adapter."""
    graph = fx.Graph()
    graph.output(())
    ir = Ir(graph, {}, (), FakeTensorMode())
    nodes = [
        ir.add_input("adapter" if value.is_floating_point() else "batch", f"x{i}", value)
        for i, value in enumerate(values)
    ]

    def loss(*given: Tensor) -> Tensor:
        out = fn(*given)
        return (out * weights(out)).sum()

    with ir.graph.inserting_before(ir.graph.output_node()):
        ir.set_outputs([(Output("loss", "loss"), _insert(ir, loss, nodes))])
    ir.lint()
    return ir


def _insert(ir: Ir, fn: Callable[..., Tensor], nodes: list[fx.Node]) -> fx.Node:
    """`fn` of these nodes as further nodes; tensors that it holds are constants."""
    made: dict[fx.Node, Any] = {}
    with ir.fake:
        traced = trace(fn, nodes, remember=False)
    given = iter(nodes)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            made[node] = next(given)
        elif node.op == "get_attr":
            made[node] = ir.add_constant("held", getattr(traced, node.target))
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), made.__getitem__)
            made[node] = ir.call(node.target, *args, **kwargs)
    result: Any = traced.graph.output_node().args[0]
    return made[result]


def weights(out: Tensor) -> Tensor:
    """Fixed weights without a pattern, so that no two elements of a result count the same; float32 holds them."""
    return torch.arange(1, out.numel() + 1, dtype=out.dtype).reshape(out.shape).mul(1.7).sin().float().to(out.dtype)


def check(fn: Callable[..., Tensor], *values: Tensor, unary: tuple[Any, ...] | None = None) -> None:
    """The gradient in every floating-point value equals autograd's, and its product with a direction the tangent."""
    wide = [value.double() if value.is_floating_point() else value for value in values]
    ir = _call(unary, wide) if unary is not None else graph_of(fn, wide)
    for one in (Canonicalize(keep_detached=True), DecomposeForGradients()):
        one(ir)
    forward = ir.clone()
    AppendGradients()(ir)
    found = ir.run({f"x{i}": value for i, value in enumerate(wide)})
    leaves = [value.clone().requires_grad_(True) if value.is_floating_point() else value for value in wide]
    real = [leaf for leaf in leaves if leaf.is_floating_point()]
    out = fn(*leaves)
    total = (out * weights(out)).sum() + sum(leaf.sum() * 0 for leaf in real)
    expected = torch.autograd.grad(total, real)
    names = [f"x{i}" for i, value in enumerate(wide) if value.is_floating_point()]
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=TOLERANCE, atol=TOLERANCE)
    directions = {name: weights(leaf).cos().float().double() for name, leaf in zip(names, real, strict=True)}
    along = sum((directions[name] * gradient).sum() for name, gradient in zip(names, expected, strict=True))
    torch.testing.assert_close(_tangent(forward, wide, directions), along, rtol=TOLERANCE, atol=TOLERANCE)


def _tangent(ir: Ir, values: list[Tensor], directions: dict[str, Tensor]) -> Tensor:
    """The tangent of the loss in these directions."""
    loss = ir.output_node("loss")
    seeds = {
        node: ir.add_input("tangent", f"t.{role(node).name}", node.meta["val"]) for node in ir.placeholders("adapter")
    }
    found = tangent(ir, loss, seeds)
    if found is None:
        return torch.zeros((), dtype=torch.float64)
    ir.set_outputs([(Output("loss", "loss"), found)])
    ir.lint()
    given = {f"t.{name}": value for name, value in directions.items()}
    return ir.run({**{f"x{i}": value for i, value in enumerate(values)}, **given})["loss"]


def _call(parts: tuple[Any, ...], values: list[Tensor]) -> Ir:
    """A graph with this very operator, which tracing would take apart."""
    graph = fx.Graph()
    graph.output(())
    ir = Ir(graph, {}, (), FakeTensorMode())
    nodes = [ir.add_input("adapter" if v.is_floating_point() else "batch", f"x{i}", v) for i, v in enumerate(values)]
    target, args = parts
    given = fx.map_arg(tuple(args), lambda n: n)
    given = tuple(
        nodes[a.place] if isinstance(a, Slot) else ir.add_constant("held", a) if isinstance(a, Tensor) else a
        for a in given
    )
    with ir.graph.inserting_before(ir.graph.output_node()):
        out = ir.call(target, *given)

        def loss(value: Tensor) -> Tensor:
            return (value * weights(value)).sum()

        ir.set_outputs([(Output("loss", "loss"), inline(ir, loss, [out]))])
    ir.lint()
    return ir


class Slot:
    """The value at a place among those that are differentiated."""

    def __init__(self, place: int) -> None:
        self.place = place


A, B, C = Slot(0), Slot(1), Slot(2)
X, Y, ROW, COLUMN = random(2, 3, 5), random(2, 3, 5, seed=1), random(5, seed=2), random(2, 1, 1, seed=3)
POSITIVE = X.abs() + 0.5

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": torch.neg,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "sin": torch.sin,
    "cos": torch.cos,
    "atan": torch.atan,
    "erf": torch.erf,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": lambda x: F.softplus(x, 2.0, 1.0),
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "abs": torch.abs,
    "square": torch.square,
    "pow-3": lambda x: x**3,
    "pow-scalar": lambda x: 2.0**x,
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "clamp-min": lambda x: x.clamp_min(-0.5),
    "clamp-max": lambda x: x.clamp(max=0.7),
    "hardtanh": F.hardtanh,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "relu6": F.relu6,
    "log_sigmoid": F.logsigmoid,
    "round": lambda x: x * x.round(),
    "rsub": lambda x: 2.0 - x,
    "number-over": lambda x: 2.0 / (x + 9.0),
    "where-number": lambda x: torch.where(x > 0, x, 0.5),
    "masked_fill": lambda x: x.masked_fill(x > 0, 2.0),
    "to": lambda x: x.float().double() * 1.0,
    "sum": lambda x: x.sum() * x,
    "sum-dim": lambda x: x.sum(1) * 2,
    "sum-keep": lambda x: x.sum((0, 2), keepdim=True) * x,
    "mean": lambda x: x.mean(1),
    "mean-all": lambda x: x.mean() * x,
    "var": lambda x: x.var(-1),
    "std": lambda x: x.std(1),
    "amax": lambda x: x.amax(-1),
    "amin": lambda x: x.amin((0, 1)),
    "max": lambda x: x.max(1).values,
    "min": lambda x: x.min(),
    "median": lambda x: x.median(-1).values,
    "topk": lambda x: x.topk(2, -1).values,
    "sort": lambda x: x.sort(1).values,
    "logsumexp": lambda x: x.logsumexp(1),
    "norm": lambda x: x.norm(dim=-1),
    "norm-1": lambda x: x.norm(1, dim=1),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "cumsum": lambda x: x.cumsum(1),
    "reshape": lambda x: x.reshape(6, 5),
    "permute": lambda x: x.permute(2, 0, 1),
    "transpose": lambda x: x.transpose(0, -1),
    "t": lambda x: x[0].t(),
    "expand": lambda x: x[:, :1].expand(2, 4, 5),
    "expand-rank": lambda x: x.expand(4, 2, 3, 5),
    "repeat": lambda x: x.repeat(2, 1, 3, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "cat": lambda x: torch.cat([x, x * 2, x], 1),
    "stack": lambda x: torch.stack([x, x * 3], 2),
    "slice": lambda x: x[:, 1:3],
    "slice-step": lambda x: x[:, :, 1::2],
    "slice-negative": lambda x: x[..., -2:],
    "slices-tile": lambda x: x[..., :2].sum() * x[..., 2:],
    "slices-overlap": lambda x: x[..., :3] * x[..., 1:4],
    "select": lambda x: x[:, 1],
    "select-last": lambda x: x[..., -1],
    "split": lambda x: x.split(2, -1)[1] * x.split(2, -1)[0],
    "chunk": lambda x: x.chunk(2, 1)[0],
    "unbind": lambda x: x.unbind(1)[2],
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "unsqueeze": lambda x: x.unsqueeze(-2),
    "flatten": lambda x: x.flatten(1),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(2, 1),
    "tril": lambda x: x.tril(),
    "glu": lambda x: F.glu(x[..., :4]),
    "index": lambda x: x[:, [2, 0, 2]],
    "index-two": lambda x: x[[0, 1], [2, 2]],
    "index_select": lambda x: x.index_select(1, torch.tensor([2, 2, 0])),
    "rms_norm": lambda x: F.rms_norm(x, (5,)),
    "upsample": lambda x: F.interpolate(x, scale_factor=2.0),
    "avg_pool1d": lambda x: F.avg_pool1d(x, 2),
    "adaptive": lambda x: F.adaptive_avg_pool1d(x, 1),
}
MORE: dict[str, Callable[[Tensor], Tensor]] = {
    "log": torch.log,
    "log1p": torch.log1p,
    "log2": torch.log2,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "pow-half": lambda x: x**1.5,
    "pow-tensor": lambda x: x ** (x * 0.5),
}
BINARY: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "add": (lambda a, b: torch.add(a, b, alpha=3), [X, ROW]),
    "sub": (lambda a, b: torch.sub(a, b, alpha=2), [COLUMN, X]),
    "mul": (torch.mul, [X, ROW]),
    "mul-column": (torch.mul, [COLUMN, Y]),
    "div": (torch.div, [X, POSITIVE]),
    "div-row": (torch.div, [X, ROW.abs() + 1]),
    "mean-broadcast": (lambda a, b: (a + b).mean(), [X, ROW]),
    "row-of-mean": (lambda a, b: (a * b).mean(-1, keepdim=True) * b, [X, ROW]),
    "maximum": (torch.maximum, [X, Y]),
    "minimum": (torch.minimum, [X, ROW]),
    "tie": (torch.maximum, [X, X.clone()]),
    "where": (lambda a, b: torch.where(a > b, a, b), [X, ROW]),
    "addcmul": (lambda a, b: torch.addcmul(a, a, b, value=2.0), [X, Y]),
    "lerp": (lambda a, b: torch.lerp(a, b, 0.3), [X, Y]),
    "gather": (lambda a, i: a.gather(1, i), [X, integers(3, 2, 4, 5)]),
    "gather-one": (lambda a, i: a.gather(-1, i), [X, integers(5, 2, 3, 1)]),
    "scatter_add": (lambda a, b, i: a.scatter_add(1, i, b), [X, Y[:, :2], integers(3, 2, 2, 5)]),
    "scatter": (lambda a, b, i: a.scatter(1, i, b), [X, Y, integers(9, 2, 3, 5).argsort(1)]),
    "select_scatter": (lambda a, b: a.select_scatter(b, 1, 2), [X, random(2, 5)]),
    "slice_scatter": (lambda a, b: a.slice_scatter(b, 1, 1, 3), [X, random(2, 2, 5)]),
    "index_put": (lambda a, b: a.index_put((torch.tensor([0, 1]), torch.tensor([2, 0])), b), [X, random(2, 5)]),
    "index_put-add": (lambda a, b: a.index_put((torch.tensor([1, 1]),), b, accumulate=True), [X, random(2, 3, 5)]),
    "mse": (F.mse_loss, [X, Y]),
    "l1": (F.l1_loss, [X, Y]),
    "smooth_l1": (F.smooth_l1_loss, [X, Y]),
    "huber": (F.huber_loss, [X, Y]),
    "bce": (F.binary_cross_entropy_with_logits, [X, Y.sigmoid()]),
    "kl": (lambda a, b: F.kl_div(a, b, reduction="batchmean"), [X, Y.softmax(-1)]),
    "cosine": (lambda a, b: F.cosine_similarity(a, b, dim=-1), [X, Y]),
}
WHOLE: dict[str, tuple[Any, tuple[Any, ...], list[Tensor]]] = {
    "linear": (aten.linear.default, (A, B, C), [random(2, 3, 5), random(4, 5), random(4)]),
    "linear-row": (aten.linear.default, (A, B), [random(5), random(4, 5)]),
    "matmul": (aten.matmul.default, (A, B), [random(2, 3, 4, 5), random(2, 3, 5, 6)]),
    "matmul-matrix": (aten.matmul.default, (A, B), [random(2, 3, 5), random(5, 4)]),
    "matmul-broadcast": (aten.matmul.default, (A, B), [random(2, 1, 4, 5), random(3, 5, 6)]),
    "matmul-left-matrix": (aten.matmul.default, (A, B), [random(4, 5), random(2, 5, 3)]),
    "matmul-vector": (aten.matmul.default, (A, B), [random(2, 3, 5), random(5)]),
    "vector-matmul": (aten.matmul.default, (A, B), [random(5), random(2, 5, 3)]),
    "vector-matrix": (aten.matmul.default, (A, B), [random(5), random(5, 3)]),
    "dot": (aten.matmul.default, (A, B), [random(5), random(5, seed=2)]),
    "mm": (aten.mm.default, (A, B), [random(3, 5), random(5, 4)]),
    "bmm": (aten.bmm.default, (A, B), [random(2, 3, 5), random(2, 5, 4)]),
    "mv": (aten.mv.default, (A, B), [random(3, 5), random(5)]),
    "addmm": (aten.addmm.default, (A, B, C), [random(4), random(3, 5), random(5, 4)]),
    "baddbmm": (aten.baddbmm.default, (A, B, C), [random(3, 1), random(2, 3, 5), random(2, 5, 4)]),
    "embedding": (aten.embedding.default, (A, B), [random(7, 4), integers(7, 2, 3)]),
    "gather_rows": (torch.ops.mobizo.gather_rows.default, (A, B), [random(2, 5, 3), integers(5, 2, 4)]),
    "conv1d": (aten.conv1d.default, (A, B, C, [2], [1]), [random(2, 4, 9), random(6, 4, 3), random(6)]),
    "conv1d-same": (aten.conv1d.padding, (A, B, C, [1], "same"), [random(2, 4, 9), random(6, 4, 3), random(6)]),
    "conv2d": (aten.conv2d.default, (A, B, C, [2, 1], [1, 2]), [random(2, 4, 7, 6), random(6, 4, 3, 2), random(6)]),
    "conv2d-groups": (
        aten.conv2d.default,
        (A, B, None, [1, 2], [0, 1], [2, 1], 2),
        [random(2, 4, 7, 6), random(6, 2, 3, 2)],
    ),
    "conv2d-pointwise": (aten.conv2d.default, (A, B), [random(2, 4, 3, 5), random(6, 4, 1, 1)]),
    "conv-transposed": (
        aten.conv_transpose1d.default,
        (A, B, C, [2], [1], [1]),
        [random(2, 4, 5), random(4, 6, 3), random(6)],
    ),
    "batch_norm": (
        aten.batch_norm.default,
        (A, torch.ones(3).double(), None, torch.zeros(3).double(), torch.ones(3).double(), False, 0.1, 1e-5, False),
        [random(2, 3, 5)],
    ),
    "group_norm": (aten.group_norm.default, (A, 2, B, C), [random(2, 6, 5), random(6), random(6)]),
    "layer_norm": (aten.layer_norm.default, (A, [5], B, C), [random(2, 3, 5), random(5), random(5)]),
    "layer_norm-two": (aten.layer_norm.default, (A, [3, 5], B), [random(2, 3, 5), random(3, 5)]),
    "detach": (aten.detach.default, (A,), [X]),
    "var": (aten.var.correction, (A, [1]), [X]),
    "std": (aten.std.correction, (A, [0, 2]), [X]),
    "rms_norm": (aten.rms_norm.default, (A, [5], B), [random(2, 3, 5), random(5)]),
    "avg_pool2d": (aten.avg_pool2d.default, (A, [3, 2], [2, 1], [1, 0]), [random(2, 3, 7, 6)]),
    "max_pool2d": (aten.max_pool2d.default, (A, [3, 2], [2, 1], [1, 0]), [random(2, 3, 7, 6)]),
    "adaptive_avg_pool2d": (aten.adaptive_avg_pool2d.default, (A, [2, 3]), [random(2, 3, 4, 6)]),
    "attention": (
        aten.scaled_dot_product_attention.default,
        (A, B, C),
        [random(2, 4, 3, 5), random(2, 4, 6, 5), random(2, 4, 6, 7)],
    ),
    "attention-causal": (
        aten.scaled_dot_product_attention.default,
        (A, B, C, None, 0.0, True),
        [random(2, 4, 3, 5), random(2, 4, 3, 5), random(2, 4, 3, 7)],
    ),
    "cross_entropy": (aten.cross_entropy_loss.default, (A, B), [random(4, 7), torch.tensor([2, -100, 6, 0])]),
    "cross_entropy-sum": (
        aten.cross_entropy_loss.default,
        (A, B, None, 2),
        [random(4, 7), torch.tensor([2, -100, 6, 0])],
    ),
    "cross_entropy-none": (
        aten.cross_entropy_loss.default,
        (A, B, None, 0),
        [random(4, 7), torch.tensor([2, -100, 6, 0])],
    ),
    "cross_entropy-smooth": (
        aten.cross_entropy_loss.default,
        (A, B, None, 1, -100, 0.1),
        [random(4, 7), torch.tensor([2, 1, 6, 0])],
    ),
    "nll": (aten.nll_loss_nd.default, (A, B), [random(4, 7), torch.tensor([2, -100, 6, 0])]),
    "silu": (aten.silu.default, (A,), [X]),
    "gelu": (aten.gelu.default, (A,), [X]),
    "softplus": (aten.softplus.default, (A,), [X * 9]),
    "mse": (aten.mse_loss.default, (A, B), [X, Y]),
}


@pytest.mark.parametrize("name", UNARY)
def test_of_one_value(name: str) -> None:
    check(UNARY[name], X)


@pytest.mark.parametrize("name", MORE)
def test_of_one_positive_value(name: str) -> None:
    check(MORE[name], POSITIVE)


@pytest.mark.parametrize("name", BINARY)
def test_of_two_values(name: str) -> None:
    fn, values = BINARY[name]
    check(fn, *values)


@pytest.mark.parametrize("name", WHOLE)
def test_of_operators_that_tracing_takes_apart(name: str) -> None:
    target, args, values = WHOLE[name]

    def run(*given: Tensor) -> Tensor:
        return target(*(given[a.place] if isinstance(a, Slot) else a for a in args))

    check(run, *values, unary=(target, args))


def test_what_has_a_cotangent_has_a_tangent() -> None:
    """Both modes take the same operators, so that `DecomposeForGradients` serves both."""
    assert {target for target, row in RULES.items() if row.kind != ELEMENTWISE} == {*TABLE, *FLAT} - {REDUCE}
