"""LoRA sites: what they are, which of the candidates are taken, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from mobizo_passes.errors import InputError, NoLoRASites, describe
from mobizo_passes.graph.facts import role
from mobizo_passes.graph.ir import Ir
from mobizo_passes.markup import counted, table
from mobizo_passes.sites.discovery import Candidates
from mobizo_passes.sites.lora_site import LoRASite, is_factor, is_up


@dataclass(frozen=True)
class Rejected:
    """A candidate that was not taken, and why; `read`: whether anything in the graph reads it."""

    name: str
    reason: str
    read: bool = True


class Sites(tuple[LoRASite, ...]):
    """The sites of a program, in graph order.

    `rejected` lists the candidates that were not taken; `left_out` has those that sites= or requires_grad left out.
    """

    rejected: tuple[Rejected, ...] = ()
    left_out: tuple[LoRASite, ...] = ()

    def _repr_html_(self) -> str:
        columns = ("site", "kind", "rank", "scaling", "in", "out")
        rows = [(s.name, s.kind, s.rank, s.scaling, s.in_features, s.out_features) for s in self]
        found = table(counted(len(self), "LoRA site"), columns, rows)
        if not self.rejected:
            return found
        missed = [(each.name, each.reason) for each in self.rejected]
        return found + table(f"{len(missed)} not taken", ("candidate", "reason"), missed, folded=True)


SiteChoice = Callable[[LoRASite], bool] | Sequence[str] | None


def discover(ir: Ir, choice: SiteChoice = None, declared: Iterable[str] = (), frozen: Collection[str] = ()) -> Sites:
    """Return the sites of a graph, all or those chosen by a predicate or a list of module or parameter FQNs.

    A listed FQN may also name a candidate that would not be taken by itself. `declared` names all parameters of the
    model, also those that the graph no longer holds because nothing reads them; `frozen` those that don't require
    gradients. Raises `NoLoRASites` if there are no sites, with the nearest misses, and `InputError` if a listed FQN
    names no candidate.
    """
    candidates = Candidates(ir).all()
    buffers = {role(n).name for n in ir.placeholders("buffer")}
    missed = {c.site: c.reason for c in candidates if c.reason}
    found = []
    for site in (c.site for c in candidates if not c.reason):
        if site.lora_B in buffers:
            missed[site] = "its lora_B is a buffer, not a parameter"
        else:
            found.append(site)
    held: list[LoRASite] = []
    if any(s.lora_B not in frozen for s in found):
        held = [s for s in found if s.lora_B in frozen]
        found = [s for s in found if s.lora_B not in frozen]
        reason = "its lora_B is frozen (requires_grad is False), while those of other sites are not"
        missed |= dict.fromkeys(held, reason)
    chosen = Sites(_choose(found, list(missed), choice))
    taken = {s.lora_B for s in found} | {s.lora_B for s in missed}
    nodes = {role(n).name: n for n in ir.placeholders("parameter")}
    rejected = [Rejected(site.lora_B, reason) for site, reason in missed.items() if site not in chosen]
    for fqn in dict.fromkeys([*nodes, *declared]):
        if is_up(fqn) and fqn not in taken:
            node = nodes.get(fqn)
            rejected.append(Rejected(fqn, _why_unused(node), node is not None and bool(node.users)))
    rejected += [Rejected(s.lora_B, "not selected by sites=") for s in found if s not in chosen]
    chosen.rejected = tuple(rejected)
    chosen.left_out = tuple(s for s in (*held, *found) if s not in chosen)
    if not chosen:
        misses = "".join(f"\n  {r.name}: {r.reason}" for r in chosen.rejected[:8])
        raise NoLoRASites(
            "found no LoRA site: no two linear maps in sequence through a narrower middle whose output is added to "
            "another map of the same input. Attach an adapter (for example with peft.get_peft_model) before transform, "
            "or say trainable= to train other parameters"
            + (f"\nnearest misses:{misses}" if misses else "")
            + ("\n  to take one all the same, list it in sites=" if missed else "")
        )
    return chosen


def _why_unused(node: fx.Node | None) -> str:
    if node is None or not node.users:
        return "the adapter is not active: nothing in the graph reads it"
    user = next(iter(node.users))
    return f"read by {describe(user)}, which is not one of two linear maps in sequence with stored weights"


def _choose(found: list[LoRASite], missed: list[LoRASite], choice: SiteChoice) -> Iterable[LoRASite]:
    if choice is None:
        return found
    if callable(choice):
        return [s for s in found if choice(s)]
    known: dict[str, list[LoRASite]] = {}
    for site in (*found, *missed):
        for key in dict.fromkeys((site.name, *site.factors.values())):
            # A near miss answers to a name that no site answers to.
            if site in found or not any(s in found for s in known.get(key, [])):
                known.setdefault(key, []).append(site)
    missing = [c for c in choice if c not in known]
    if missing:
        names = ", ".join(s.name for s in found) or "none"
        raise InputError(f"sites= names no LoRA site: {', '.join(missing)}; known: {names}")
    wanted = {site for c in choice for site in known[c]}
    return [s for s in (*found, *missed) if s in wanted]


def factors_of(sites: Sites, model: nn.Module) -> list[str]:
    """Return the FQNs of all factors: those of the sites, of sites left out, and all that are named as factors are."""
    found = [f for s in (*sites, *sites.left_out) for f in s.factors.values()]
    return list(dict.fromkeys([*found, *(name for name, _ in model.named_parameters() if is_factor(name))]))


def check_memory(model: nn.Module, fqns: Iterable[str]) -> None:
    """Raise `InputError` if a trained tensor shares memory with another parameter or buffer, as tied adapters do.

    In the program they are two: training would move one and leave the other. One tensor with two names is no such case.
    """
    state: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    named = dict(model.named_parameters(remove_duplicate=False))
    storages: dict[int, list[str]] = {}
    for name, value in state.items():
        if value.numel() and value.device.type != "meta":
            storages.setdefault(value.untyped_storage().data_ptr(), []).append(name)
    for fqn in fqns:
        value = named[fqn]
        for other in storages.get(value.untyped_storage().data_ptr(), ()):
            if state[other] is not value and _overlap(value, state[other]):
                raise InputError(
                    f"trained tensor '{fqn}' shares its memory with '{other}': trained apart, they would no longer be "
                    "tied. Leave the one out with sites=, or attach the adapter without tying "
                    "(PEFT: ensure_weight_tying=False)"
                )


def _overlap(left: Tensor, right: Tensor) -> bool:
    elements = [
        torch.arange(t.untyped_storage().nbytes() // t.element_size())
        .as_strided(t.shape, t.stride(), t.storage_offset())
        .flatten()
        for t in (left, right)
    ]
    if left.dtype != right.dtype:
        return True
    return bool(torch.isin(*elements).any())


def check_dtypes(state: dict[str, Tensor], fqns: Iterable[str]) -> None:
    """Raise `InputError` unless every trainable tensor is float32."""
    for fqn in fqns:
        if state[fqn].dtype is not torch.float32:
            raise InputError(f"trainable tensor '{fqn}' must be float32, found {state[fqn].dtype}; call .float() on it")
