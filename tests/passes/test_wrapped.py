"""Models inside wrappers: torch.compile, data parallelism, a user's own module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes as mz
from tests.models import Lora, llama, llama_inputs, random, seeded
from tests.passes.contract import Tiny, rows

ONE = mz.TwoSided(queries=1)


@contextmanager
def distributed() -> Iterator[None]:
    """A process group of one."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (compiled, ["torch.compile"]),
        (nn.DataParallel, ["nn.DataParallel"]),
        (lambda model: nn.DataParallel(compiled(model)), ["nn.DataParallel", "torch.compile"]),
    ],
    ids=["compile", "data-parallel", "both"],
)
def test_wrappers_are_taken_off(wrap: Callable[[nn.Module], nn.Module], said: list[str]) -> None:
    model = llama(("q_proj",))
    wrapped = wrap(model)
    program = mz.transform(wrapped, llama_inputs(), estimator=ONE)
    assert [any(name in note for note in program.notes) for name in said] == [True] * len(said)
    assert all(fqn in dict(model.named_parameters()) for fqn in program.initial_adapter())
    (file,) = program.adapter_files
    assert all(each.key.startswith("base_model.model.model.layers.") for each in file.tensors)
    mz.verify(program, wrapped, llama_inputs())


def test_distributed_data_parallel() -> None:
    from torch.nn.parallel import DistributedDataParallel

    with distributed():
        wrapped = DistributedDataParallel(llama(("q_proj",)))
        program = mz.transform(wrapped, llama_inputs(), estimator=ONE)
    assert "DistributedDataParallel" in program.notes[0]
    assert all(fqn.startswith("base_model.") for fqn in program.initial_adapter())


def test_compiled_in_place() -> None:
    model = llama(("q_proj",))
    model.compile(backend="eager")
    program = mz.transform(model, llama_inputs(), estimator=ONE)
    assert len(program.sites) == 2
    # Its equal, which need not be compiled for each forward of the reference.
    mz.verify(program, llama(("q_proj",)), llama_inputs())


def test_the_reference_runs_what_is_compiled_in_place() -> None:
    model, inputs = Tiny(), rows()
    model.compile(backend="eager")
    mz.verify(mz.transform(model, inputs, estimator=ONE, loss=F.cross_entropy), model, inputs)


class FullyShardedDataParallel(nn.Module):
    """Has the name of torch's own, whose construction needs an accelerator."""


def test_sharded_parameters_are_refused() -> None:
    with pytest.raises(mz.InputError, match="FullyShardedDataParallel holds parts of the parameters only"):
        mz.transform(FullyShardedDataParallel(), llama_inputs())


class Passing(nn.Module):
    """Passes on whatever it is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **kwargs: Any) -> Any:
        return self.model(**kwargs)


class PassingAll(Passing):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def last_token(outputs: Any, answer: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits[:, -1], answer)


@pytest.mark.parametrize("kind", [Passing, PassingAll])
@pytest.mark.parametrize("own_loss", [True, False], ids=["model's-loss", "given-loss"])
def test_a_module_that_passes_everything_on(kind: type[Passing], own_loss: bool) -> None:
    wrapped = kind(llama(("q_proj",))).eval()
    inputs = llama_inputs()
    loss = None if own_loss else last_token
    if not own_loss:
        inputs["answer"] = inputs.pop("labels")[:, -1]
    program = mz.transform(wrapped, inputs, estimator=ONE, loss=loss)
    assert set(program.inputs.loss_only) == (set() if own_loss else {"answer"})
    assert all(fqn.startswith("model.base_model.") for fqn in program.initial_adapter())
    (file,) = program.adapter_files
    assert all(each.key.startswith("base_model.model.model.") for each in file.tensors)
    assert {each.fqn for each in file.tensors} >= set(program.initial_adapter())
    mz.verify(program, wrapped, inputs)


def test_matrices_of_experts_are_sites() -> None:
    from tests.coverage.test_adapter_files import mixture

    model: Any = mixture("mlp.experts.down_proj")
    program = mz.transform(model, llama_inputs(), estimator=ONE)
    assert sum("experts" in site.name for site in program.sites) == 2
    assert not program.notes
    (file,) = program.adapter_files
    assert sum("experts" in each.key for each in file.tensors) == 4


class Bent(nn.Module):
    """A site, and matrices with LoRA's names that are none: a function stands between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.base = Lora(5, 4, 2), nn.Linear(4, 4)
        self.lora_A, self.lora_B = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.base(h) + self.lora_B(torch.tanh(self.lora_A(h)))


def test_lora_matrices_that_are_not_trained_are_named() -> None:
    inputs = (random(2, 5), random(2, 4))
    with pytest.warns(
        UserWarning, match=r"1 LoRA matrices are not trained.*\n  lora_B\.weight: %tanh .* between its two"
    ):
        program = mz.transform(seeded(Bent()), inputs, estimator=mz.OneSided(), loss=F.mse_loss)
    assert [site.name for site in program.sites] == ["first"]
    assert "lora_B.weight" in program.notes[-1]
