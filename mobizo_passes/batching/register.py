"""Batching rules for operators of a user's own, each tried on examples before it is believed."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from mobizo_passes.batching.batcher import RULES, Batcher, Layout, Layouts, Rule, pointwise
from mobizo_passes.batching.walk import Walk
from mobizo_passes.errors import BatchingRuleError, InputError, UnsupportedOp
from mobizo_passes.graph import ops
from mobizo_passes.graph.ir import Ir, Output
from mobizo_passes.graph.nodes import named, set_arguments


@dataclass(frozen=True)
class BatchDims:
    """Where an operator holds the batch, as `in_dims` and `out_dims` of `torch.vmap` say it.

    `inputs`: for each tensor argument, in the order of the operator's schema, the dimension along which it treats the
    examples independently, or None if all examples share the argument. `outputs`: for each result the dimension that
    holds one entry for each example, or None if it does not depend on the batch; a number for a single result.
    """

    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...] | int = 0


#: From argument names to the dimension that holds the batch (None: shared), and to all values (tensors: their shapes).
RuleFn = Callable[[Mapping[str, int | None], Mapping[str, Any]], BatchDims | None]
Claim = Literal["pointwise"] | BatchDims | RuleFn

_registered: set[Any] = set()


def _held(dims: Mapping[str, int | None], args: Mapping[str, Any]) -> None:
    """Stands for a rule in the table: it may take the batch anywhere."""


def register_batching_rule(op: Any, rule: Claim, *, examples: Sequence[tuple[Any, ...]]) -> None:
    """Tell how a custom operator runs on several perturbed copies of the batch side by side.

    Args:
        op: what `torch.library.custom_op` returned, or ``torch.ops.NAMESPACE.NAME``, or an overload of it. It takes
            tensors and plain values, and needs a fake implementation, as for `torch.export`.
        rule: "pointwise" for an element-wise operator, with broadcasting; a `BatchDims`; or a function
            ``fn(dims, args) -> BatchDims | None`` for what depends on the call: `dims` has for each tensor argument,
            by name, the dimension in which it holds the batch now (None: it is shared), `args` all values, for tensors
            their shapes. None refuses the call.
        examples: at least two tuples of arguments for the operator, of the same shapes and with different values. The
            rule is tried on them: run side by side, by the rule, they must give what each gives alone.

    Raises:
        InputError: no such operator, it has a rule already, or the examples don't fit.
        BatchingRuleError: the rule is wrong: names the operator and what differs.
    """
    target = _overload(op)
    if target in RULES:
        raise InputError(f"{target} has a batching rule already; unregister_batching_rule takes one of your own away")
    check_rule(op, rule, examples=examples)
    RULES[target] = _rule(target, rule)
    _registered.add(target)


def check_rule(op: Any, rule: Claim | None = None, *, examples: Sequence[tuple[Any, ...]]) -> None:
    """Try a batching rule on examples, as `register_batching_rule` does it, and register nothing.

    Args:
        op: an operator, as for `register_batching_rule`, whether it has a rule or not.
        rule: what would be registered; None: the rule that the operator has, one of the compiler's own too.
        examples: at least two tuples of arguments for the operator, of the same shapes and with different values.

    Raises:
        InputError: no such operator, it has no rule and none is given, or the examples don't fit.
        BatchingRuleError: the rule is wrong: names the operator and what differs; or it takes none of the examples.
    """
    target = _overload(op)
    before = RULES.get(target)
    if rule is None:
        if before is None and torch.Tag.pointwise not in target.tags:
            raise InputError(f"{target} has no batching rule: pass rule=, or register one")
        _try(target, "pointwise" if before in (None, pointwise) else _held, examples)
        return
    RULES[target] = _rule(target, rule)
    try:
        _try(target, rule, examples)
    finally:
        del RULES[target]
        if before is not None:
            RULES[target] = before


def unregister_batching_rule(op: Any) -> None:
    """Take a registered rule away; raises `InputError` if the operator has none, or one that was not registered."""
    target = _overload(op)
    if target not in _registered:
        raise InputError(f"no batching rule was registered for {target}")
    _registered.remove(target)
    del RULES[target]


def _overload(op: Any) -> Any:
    """The one overload that is meant; raises `InputError` for what is no functional operator on tensors."""
    target = getattr(op, "_opoverload", op)
    if isinstance(target, torch._ops.OpOverloadPacket):
        names = target.overloads()
        if len(names) != 1:
            raise InputError(f"{target} has the overloads {', '.join(names)}: name one")
        target = getattr(target, names[0])
    if not isinstance(target, torch._ops.OpOverload):
        raise InputError(f"expected an operator, as torch.library.custom_op returns it, found {op!r}")
    if target._schema.is_mutable:
        raise InputError(f"{target} changes an argument in place: a program is a pure function, it can't hold that")
    listed = [a.name for a in target._schema.arguments if "List[" in str(a.type) and "Tensor" in str(a.type)]
    if listed:
        raise InputError(f"{target} takes a list of tensors, '{listed[0]}': a registered rule can't speak of that")
    return target


def _tensors(target: Any) -> list[str]:
    return [a.name for a in target._schema.arguments if "Tensor" in str(a.type)]


def _rule(target: Any, claim: Claim) -> Rule:
    if isinstance(claim, str):
        if claim != "pointwise":
            raise InputError(f"a rule is 'pointwise', a BatchDims or a function, found {claim!r}")
        return pointwise
    if not isinstance(claim, BatchDims) and not callable(claim):
        raise InputError(f"a rule is 'pointwise', a BatchDims or a function, found {claim!r}")
    names, results = _tensors(target), len(target._schema.returns)

    def rule(batcher: Batcher, node: fx.Node) -> Layouts:
        values = named(target, node.args, node.kwargs)
        layouts = {name: batcher.layout(values[name]) for name in names}
        if isinstance(claim, BatchDims):
            found: Any = claim
        else:
            dims = {name: None if layout is None else layout.dim for name, layout in layouts.items()}
            shapes = {k: batcher.shape(v) if isinstance(v, fx.Node) else v for k, v in values.items()}
            found = claim(dims, shapes)
        if found is None:
            raise batcher.refuse(node, f"its batching rule does not take {_places(layouts)}")
        _check_form(target, found, names, results)
        return _apply(batcher, node, found, values, layouts)

    return rule


def _check_form(target: Any, found: Any, names: Sequence[str], results: int) -> None:
    if not isinstance(found, BatchDims):
        raise BatchingRuleError(f"the batching rule of {target} gave {found!r}, expected a BatchDims or None")
    if len(found.inputs) != len(names):
        raise BatchingRuleError(
            f"the batching rule of {target} has {len(found.inputs)} inputs, expected {len(names)}, one for each of "
            f"{', '.join(names)}"
        )
    given = 1 if isinstance(found.outputs, int) else len(found.outputs)
    if given != results:
        raise BatchingRuleError(f"the batching rule of {target} has {given} outputs, the operator has {results}")


def _apply(
    batcher: Batcher, node: fx.Node, found: BatchDims, values: dict[str, Any], layouts: Mapping[str, Layout | None]
) -> Layouts:
    """Bring the arguments to where the rule wants the batch; returns where the results hold it."""
    outers = {layout.outer for layout in layouts.values() if layout is not None}
    wanted = {
        name: dim if dim is None or dim >= 0 else dim + len(batcher.shape(values[name]))
        for (name, dim) in zip(layouts, found.inputs, strict=True)
        if isinstance(values[name], fx.Node)
    }
    for name, dim in wanted.items():
        if dim is not None and not 0 <= dim < len(batcher.shape(values[name])):
            raise batcher.unsupported(node, f"its batching rule asks for dimension {dim} of '{name}', which has fewer")
    sizes = {batcher.shape(values[name])[dim] for name, dim in wanted.items() if dim is not None}
    if len(outers) != 1 or len(sizes) != 1:
        raise batcher.refuse(node, "its operands hold the batch in different dimensions")
    outer, size = outers.pop(), sizes.pop()
    for name, dim in wanted.items():
        layout = layouts[name]
        if layout is not None and layout.dim != dim:
            place = "shares it among all examples" if dim is None else f"wants it in dimension {dim}"
            raise batcher.refuse(
                node, f"'{name}' holds the batch in dimension {layout.dim}, and its batching rule {place}"
            )
        if dim is not None:
            values[name] = batcher.fuse(values[name], Layout(dim, outer))
    set_arguments(node, **values)
    plain = batcher.plain[node]
    shapes = [v.shape for v in plain] if isinstance(plain, tuple | list) else [plain.shape]
    outputs = (found.outputs,) if isinstance(found.outputs, int) else found.outputs
    places: list[Layout | None] = []
    for number, (dim, shape) in enumerate(zip(outputs, shapes, strict=True)):
        at = dim if dim is None else dim % len(shape) if shape else -1
        if at is not None and (at < 0 or shape[at] != size):
            raise batcher.unsupported(
                node, f"its batching rule puts a batch of {size} into dimension {dim} of result {number}, {list(shape)}"
            )
        places.append(None if at is None else Layout(at, outer))
    return tuple(places) if isinstance(plain, tuple | list) else places[0]


def _places(layouts: Mapping[str, Layout | None]) -> str:
    held = [f"dimension {layout.dim} of '{name}'" for name, layout in layouts.items() if layout is not None]
    return f"the batch in {' and '.join(held)}"


# Trying a rule -------------------------------------------------------------------------------------------------------


def _try(target: Any, claim: Claim, examples: Sequence[tuple[Any, ...]]) -> None:
    """Run the examples side by side by the rule wherever it takes the batch; raise unless all is as it is alone."""
    given = [named(target, each, {}) for each in examples]
    names = [name for name in _tensors(target) if isinstance(given[0].get(name), Tensor)] if given else []
    _check_examples(target, given, names)
    tried, refused = 0, ""
    for dims in _readings(target, claim, given[0], names):
        if all(torch.equal(each[name], given[0][name]) for each in given for name in dims):
            raise InputError(f"the examples for {target} have equal {', '.join(dims)}: give different values")
        (dim, name) = next((dim, name) for name, dim in dims.items())
        for outer in {1, given[0][name].shape[dim]}:
            try:
                _compare(target, given, {name: Layout(at, outer) for name, at in dims.items()})
                tried += 1
            except UnsupportedOp as error:
                refused = str(error).splitlines()[0]
    if not tried:
        raise BatchingRuleError(f"the batching rule of {target} takes none of the examples: {refused or 'no batch'}")


def _check_examples(target: Any, given: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    if len(given) < 2 or not names:
        raise InputError(f"{target} needs at least two examples, tuples of its arguments with a tensor among them")
    for each in given[1:]:
        for name, value in given[0].items():
            other = each.get(name)
            if isinstance(value, Tensor):
                same = isinstance(other, Tensor) and (other.shape, other.dtype) == (value.shape, value.dtype)
            else:
                same = not isinstance(other, Tensor) and other == value
            if not same:
                raise InputError(f"the examples for {target} differ in more than the values of tensors: see '{name}'")


def _readings(target: Any, claim: Claim, example: Mapping[str, Any], names: Sequence[str]) -> Iterator[dict[str, int]]:
    """Yield, for each way in which the batch may come to the operator, the dimension that holds it in each argument."""
    shapes = {name: example[name].shape for name in names}
    if isinstance(claim, BatchDims):
        _check_form(target, claim, _tensors(target), len(target._schema.returns))
        dims = dict(zip(_tensors(target), claim.inputs, strict=True))
        beyond = [n for n in names if (d := dims[n]) is not None and not -len(shapes[n]) <= d < len(shapes[n])]
        if beyond:
            raise BatchingRuleError(f"the batching rule of {target}: '{beyond[0]}' has no dimension {dims[beyond[0]]}")
        yield {n: d % len(shapes[n]) for n in names if (d := dims[n]) is not None}
        return
    deepest = max(len(shape) for shape in shapes.values())
    if claim == "pointwise":
        for back in range(1, deepest + 1):
            size = max(shape[-back] for shape in shapes.values() if len(shape) >= back)
            yield {n: len(s) - back for n, s in shapes.items() if len(s) >= back and s[-back] == size}
        return
    yield from ({n: dim for n, s in shapes.items() if len(s) > dim} for dim in range(deepest))
    yield from ({n: dim} for n, dim in itertools.product(names, range(deepest)) if len(shapes[n]) > dim)


def _compare(target: Any, given: Sequence[Mapping[str, Any]], fused: Mapping[str, Layout]) -> None:
    ir = Ir(_empty(), {}, (), FakeTensorMode())
    tensors = {name: value for name, value in given[0].items() if isinstance(value, Tensor)}
    # PyTorch's own operators call theirs "self", which no argument of generated code may be called.
    nodes = {name: ir.add_input("batch", f"{name}_", value) for name, value in tensors.items()}
    taken = {**given[0], **nodes}
    by_name = {a.name: taken.pop(a.name) for a in target._schema.arguments if a.kwarg_only and a.name in taken}
    with ir.graph.inserting_before(ir.graph.output_node()):
        try:
            node = ir.call(target, *taken.values(), **by_name)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"{target} does not run on the shapes of its examples alone: {reason}") from error
        several = isinstance(node.meta["val"], tuple | list)
        results = [ir.call(operator.getitem, node, i) for i in range(len(node.meta["val"]))] if several else [node]
    ir.set_outputs([(Output("logits", str(i)), result) for i, result in enumerate(results)])
    walk = Walk(ir, len(given))
    values = dict(tensors)
    for name, layout in fused.items():
        stacked = torch.stack([each[name] for each in given])
        values[name] = ops.regroup(stacked, layout.dim, layout.outer, tensors[name].shape[layout.dim])
        walk.plain[nodes[name]] = nodes[name].meta["val"]
        with ir.fake:
            nodes[name].meta["val"] = torch.empty(values[name].shape, dtype=values[name].dtype)
    walk.run({nodes[name]: layout for name, layout in fused.items()})
    ir.lint()
    found = list(ir.run({f"{name}_": value for name, value in values.items()}).values())
    for group, each in enumerate(given):
        alone = target(**{**given[0], **{name: each[name] for name in fused}})
        for number, expected in enumerate(alone if several else [alone]):
            layout = walk.layout(results[number])
            got = found[number]
            if layout is not None:
                got = ops.ungroup(got, len(given), layout.dim, layout.outer)[group]
            try:
                torch.testing.assert_close(got, expected, equal_nan=True)
            except AssertionError as error:
                raise BatchingRuleError(
                    f"the batching rule of {target} is wrong: with {_places(fused)}, result {number} of example "
                    f"{group} is not what it is alone: {' '.join(str(error).split())}"
                ) from error


def _empty() -> fx.Graph:
    graph = fx.Graph()
    graph.output(())
    return graph
