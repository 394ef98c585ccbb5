"""Discovery of LoRA sites on the captured graph: by parameter name, by structure, or by the user's choice."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .errors import InputError, NoLoRASites
from .ir import Ir

aten = torch.ops.aten

# (down, up) parameter names of PEFT, torchtune, diffusers and the original loralib.
_CONVENTIONS = (
    (re.compile(r"(^|\.)lora_A(\.[^.]+)?(\.weight)?$"), re.compile(r"(^|\.)lora_B(\.[^.]+)?(\.weight)?$")),
    (re.compile(r"(^|\.)lora_a(\.weight)?$"), re.compile(r"(^|\.)lora_b(\.weight)?$")),
    (re.compile(r"(^|\.)lora\.down(\.weight)?$"), re.compile(r"(^|\.)lora\.up(\.weight)?$")),
)
_PASS_THROUGH = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.dropout.default, aten._to_copy.default)


@dataclass(frozen=True)
class LoRASite:
    """One low-rank update ``y += scaling · (x Aᵀ) Bᵀ``: FQNs of its factors and its sizes."""

    name: str
    lora_A: str  # noqa: N815  the field's own names
    lora_B: str  # noqa: N815
    rank: int
    scaling: float | None
    in_features: int
    out_features: int
    kind: str = "linear"


@dataclass(frozen=True)
class Rejected:
    """A candidate that was not taken, and why."""

    name: str
    reason: str


class Sites(tuple[LoRASite, ...]):
    """The sites of a program, in graph order; `rejected` lists the candidates that were not taken."""

    rejected: tuple[Rejected, ...] = ()


SiteChoice = Callable[[LoRASite], bool] | Sequence[str] | None


@dataclass(frozen=True)
class Factor:
    """One use of a weight: `node` multiplies by `weight`; `transposed` if the weight is stored [in, out]."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    transposed: bool

    @property
    def sizes(self) -> tuple[int, int]:
        """(in, out) features."""
        shape = self.weight.meta["val"].shape
        return (shape[0], shape[1]) if self.transposed else (shape[1], shape[0])


def as_factor(node: fx.Node) -> Factor | None:
    """Read a node as multiplication by a stored 2-D matrix, through any transposes of it; None if it is not one."""
    if node.op != "call_function" or node.kwargs:
        return None
    args: list[Any] = list(node.args)
    if node.target is aten.linear.default and (len(args) < 3 or args[2] is None):
        x, weight, transposed = args[0], args[1], False
    elif node.target in (aten.matmul.default, aten.mm.default):
        x, weight, transposed = args[0], args[1], True
    else:
        return None
    while isinstance(weight, fx.Node) and weight.target in (aten.t.default, aten.transpose.int, aten.permute.default):
        if weight.target is aten.permute.default and [d % 2 for d in weight.args[1]] != [1, 0]:  # type: ignore[union-attr]
            return None
        weight, transposed = weight.args[0], not transposed
    if not isinstance(weight, fx.Node) or not isinstance(x, fx.Node) or weight.op != "placeholder":
        return None
    if weight.meta["input"].kind not in ("parameter", "buffer", "adapter") or weight.meta["val"].dim() != 2:
        return None
    return Factor(node, x, weight, transposed)


def discover(ir: Ir, choice: SiteChoice = None, declared: Iterable[str] = ()) -> Sites:
    """Return the sites of a graph, all or those chosen by a predicate or a list of module or parameter FQNs.

    `declared` names all parameters of the model, also those that the graph no longer holds because nothing reads them.
    Raises `NoLoRASites` if there are none, with the nearest misses, and `InputError` if a listed FQN names no site.
    """
    factors = {f.node: f for node in ir.graph.nodes if (f := as_factor(node))}
    found: dict[tuple[str, str], LoRASite] = {}
    rejected: list[Rejected] = []
    for up in factors.values():
        scalings: list[float] = []
        down = factors.get(_through(up.x, scalings))
        if down is None:
            continue
        site, reason = _judge(down, up, scalings)
        if site is not None:
            found[site.lora_A, site.lora_B] = site
        elif reason:
            rejected.append(Rejected(_fqn(up), reason))
    taken = {s.lora_B for s in found.values()}
    nodes = {n.meta["input"].name: n for n in ir.placeholders("parameter")}
    for fqn in dict.fromkeys([*nodes, *declared]):
        if any(up.search(fqn) for _, up in _CONVENTIONS) and fqn not in taken and fqn not in {r.name for r in rejected}:
            rejected.append(Rejected(fqn, _why_unused(nodes.get(fqn))))
    chosen = Sites(_choose(list(found.values()), choice))
    left = [Rejected(s.lora_B, "not selected by sites=") for s in found.values() if s not in chosen]
    chosen.rejected = (*rejected, *left)
    if not chosen:
        misses = "".join(f"\n  {r.name}: {r.reason}" for r in chosen.rejected[:8])
        raise NoLoRASites(
            "found no LoRA site: no two matrices in sequence through a narrower middle whose product is added to "
            "another path. Attach an adapter (for example with peft.get_peft_model) before transform"
            + (f"\nnearest misses:{misses}" if misses else "")
        )
    return chosen


def _fqn(factor: Factor) -> str:
    return factor.weight.meta["input"].name


def _through(node: fx.Node, scalings: list[float]) -> fx.Node:
    """Walk up through scalings and inactive dropout between the two factors."""
    while node.target in _PASS_THROUGH and isinstance(node.args[0], fx.Node):
        if node.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor):
            if isinstance(node.args[1], fx.Node):
                return node
            value = float(node.args[1])  # type: ignore[arg-type]
            scalings.append(1 / value if node.target is aten.div.Tensor else value)
        node = node.args[0]
    return node


def _judge(down: Factor, up: Factor, scalings: list[float]) -> tuple[LoRASite | None, str]:
    """Decide whether two factors in sequence are a LoRA site; else give the reason, empty if it is no candidate."""
    a, b = _fqn(down), _fqn(up)
    (fan_in, rank), (_, fan_out) = down.sizes, up.sizes
    named = any(lo.search(a) and hi.search(b) for lo, hi in _CONVENTIONS)
    narrow = rank < min(fan_in, fan_out)
    if not named and not narrow:
        return None, ""
    added = _is_added(up.node, scalings)
    if not named and not added:
        return None, f"a bottleneck of rank {rank}, but its output is not added to another path"
    scaling = 1.0
    for factor in scalings:
        scaling *= factor
    return LoRASite(_module_name(a, b), a, b, rank, scaling, fan_in, fan_out), ""


def _is_added(node: fx.Node, scalings: list[float]) -> bool:
    """Follow the output through scalings to an addition, collecting literal scalings."""
    while True:
        users = list(node.users)
        if any(u.target is aten.add.Tensor for u in users):
            return True
        if len(users) != 1 or users[0].target not in _PASS_THROUGH or users[0].args[0] is not node:
            return False
        user = users[0]
        if user.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor) and not isinstance(user.args[1], fx.Node):
            value = float(user.args[1])  # type: ignore[arg-type]
            scalings.append(1 / value if user.target is aten.div.Tensor else value)
        node = user


def _module_name(a: str, b: str) -> str:
    for low, high in _CONVENTIONS:
        if low.search(a) and high.search(b):
            return high.sub("", b) or b
    shared = [x for x, y in zip(a.split("."), b.split("."), strict=False) if x == y]
    return ".".join(shared) or b


def _why_unused(node: fx.Node | None) -> str:
    if node is None or not node.users:
        return "the adapter is not active: nothing in the graph reads it"
    user = next(iter(node.users))
    return f"used by %{user.name} = {user.target}, which is not a plain product of two stored 2-D matrices"


def _choose(sites: list[LoRASite], choice: SiteChoice) -> Iterable[LoRASite]:
    if choice is None:
        return sites
    if callable(choice):
        return [s for s in sites if choice(s)]
    known = {key: s for s in sites for key in (s.name, s.lora_A, s.lora_B)}
    missing = [c for c in choice if c not in known]
    if missing:
        raise InputError(f"sites= names no LoRA site: {', '.join(missing)}; known: {', '.join(s.name for s in sites)}")
    wanted = {known[c] for c in choice}
    return [s for s in sites if s in wanted]


def trainable_fqns(sites: Sites, trainable: str) -> list[str]:
    """Return the FQNs to train, in site order; raises `InputError` for an unknown choice."""
    if trainable not in ("lora_B", "lora_A+lora_B"):
        raise InputError(f"trainable must be 'lora_B' or 'lora_A+lora_B', found {trainable!r}")
    names = [f for s in sites for f in ((s.lora_B,) if trainable == "lora_B" else (s.lora_A, s.lora_B))]
    return list(dict.fromkeys(names))


def check_dtypes(state: dict[str, Tensor], fqns: Iterable[str]) -> None:
    """Raise `InputError` unless every trainable tensor is float32."""
    for fqn in fqns:
        if state[fqn].dtype is not torch.float32:
            raise InputError(f"trainable tensor '{fqn}' must be float32, found {state[fqn].dtype}; call .float() on it")
