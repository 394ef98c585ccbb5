"""Which tensors are trained: factors of LoRA sites, what the model marks, or any parameters that a user names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from mobizo_passes.errors import InputError, NoLoRASites
from mobizo_passes.graph.facts import role
from mobizo_passes.graph.ir import Ir
from mobizo_passes.sites.lora_site import LoRASite
from mobizo_passes.sites.peft import peft_models
from mobizo_passes.sites.select import SiteChoice, Sites, discover

# Choice -> roles of the factors that are trained. LoRA-FA, the default, freezes lora_A.
TRAINABLE: dict[str, tuple[str, ...]] = {"lora_B": ("lora_B",), "lora_A+lora_B": ("lora_A", "lora_B")}
#: Everything whose `requires_grad` is True.
MARKED = "requires_grad"
#: How the manifest calls parameters that a predicate or a list chose.
CHOSEN = "parameters"

Trainable = str | Callable[[str, nn.Parameter], bool] | Sequence[str] | None


@dataclass(frozen=True)
class Training:
    """What a program trains: the sites that it belongs to, FQNs in a fixed order, and the manifest's word for it."""

    sites: Sites
    fqns: list[str]
    kind: str


def find_trained(
    ir: Ir, model: nn.Module, trainable: Trainable, sites: SiteChoice, declared: Iterable[str] = ()
) -> Training:
    """Return what is trained of a captured model; `declared` names all its parameters as `discover` wants them.

    Without a choice (None) it is lora_B of the sites; in a model under PEFT without any site, such as VeRA, IA³ or
    prompt tuning, what PEFT marks. Raises `NoLoRASites` if that is nothing, and `InputError` for an unknown choice, a
    name that is no parameter, or one that nothing in the graph reads.
    """
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    if trainable is None or (isinstance(trainable, str) and trainable in TRAINABLE):
        try:
            found = discover(ir, sites, declared, frozen)
        except NoLoRASites:
            marked = _marked(ir, model) if trainable is None and sites is None and peft_models(model) else []
            if not marked:
                raise
            return Training(Sites(), marked, MARKED)
        kind = trainable or "lora_B"
        return Training(found, trainable_fqns(found, kind), kind)
    if sites is not None:
        raise InputError("sites= chooses among LoRA sites; with trainable= that names parameters, leave it out")
    if trainable == MARKED:
        fqns, kind = _marked(ir, model), MARKED
        if not fqns:
            raise InputError("trainable='requires_grad': no parameter that the graph reads requires gradients")
    else:
        fqns, kind = _chosen(ir, model, trainable), CHOSEN
    try:
        found = discover(ir, None, declared)
    except NoLoRASites:
        found = Sites()
    # A low-rank update of which nothing is trained is part of the base.
    return Training(Sites(s for s in found if not set(fqns).isdisjoint(s.factors.values())), fqns, kind)


def trainable_fqns(sites: Iterable[LoRASite], trainable: str) -> list[str]:
    """Return the FQNs of the factors to train, in site order."""
    return list(dict.fromkeys(site.factors[role] for site in sites for role in TRAINABLE[trainable]))


def _marked(ir: Ir, model: nn.Module) -> list[str]:
    names = _read(ir, model)
    return [names[fqn] for fqn, p in model.named_parameters() if p.requires_grad and fqn in names]


def _chosen(ir: Ir, model: nn.Module, trainable: Trainable) -> list[str]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = _read(ir, model)
    if callable(trainable):
        wanted = [fqn for fqn, p in model.named_parameters() if trainable(fqn, p)]
        fqns = [names[fqn] for fqn in wanted if fqn in names]
        if not fqns:
            raise InputError(f"trainable= selects {len(wanted)} parameters, none of which the graph reads")
        return fqns
    if isinstance(trainable, str) or not isinstance(trainable, Sequence) or not trainable:
        choices = ", ".join(map(repr, (*TRAINABLE, MARKED)))
        raise InputError(
            f"trainable must be one of {choices}, a predicate on (FQN, parameter), or a list of FQNs; "
            f"found {trainable!r}"
        )
    unknown = [fqn for fqn in trainable if fqn not in parameters]
    if unknown:
        near = [n for n in parameters if any(str(u).rsplit(".", 1)[-1] == n.rsplit(".", 1)[-1] for u in unknown)]
        hint = f"; the nearest names: {', '.join(near[:4])}" if near else ""
        raise InputError(f"trainable= names no parameter of the model: {', '.join(map(str, unknown))}{hint}")
    unread = [fqn for fqn in trainable if fqn not in names]
    if unread:
        raise InputError(f"trainable= names parameters that the loss does not depend on: {', '.join(unread)}")
    wanted = {names[fqn] for fqn in trainable}
    return [fqn for fqn in dict.fromkeys(names.values()) if fqn in wanted]


def _read(ir: Ir, model: nn.Module) -> dict[str, str]:
    """FQN -> the FQN by which the graph reads this parameter, for those that it reads; tied ones have several."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    reads = {id(parameters[name]): name for n in ir.placeholders("parameter") if n.users and (name := role(n).name)}
    return {fqn: reads[id(p)] for fqn, p in parameters.items() if id(p) in reads}
