"""InternalizeAdapter: the adapter as state of the step, with the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export.graph_signature import InputKind, OutputKind

import mobizo_passes as mz
from mobizo_passes.capture.inputs import bind_inputs
from mobizo_passes.graph.ir import Ir
from mobizo_passes.passes import InternalizeAdapter
from tests.models import case
from tests.passes.contract import PassContract, parsed, values_of

STEPS = 4
INITIAL = torch.arange(4.0)


class TestInternalizeAdapter(PassContract):
    one = InternalizeAdapter({"b": INITIAL})
    before = """
        %b: f32[4] = adapter 'b'
        %x: f32[2, 4] = batch 'x'

        %mul: f32[2, 4] = aten.mul(%x, %b)
        %sum_1: f32[4] = aten.sum(%mul, [0])

        return %mul: f32[2, 4] = losses
        return %sum_1: f32[4] = adapter 'b'
    """
    after = """
        %b: f32[4] = state 'b'
        %x: f32[2, 4] = batch 'x'

        %mul: f32[2, 4] = aten.mul(%x, %b)
        %sum_1: f32[4] = aten.sum(%mul, [0])

        return %mul: f32[2, 4] = losses
        return %sum_1: f32[4] = state 'b'
    """

    def compare(self, old: Ir, new: Ir, values: dict[str, Tensor]) -> None:
        """Each run goes on from the one before; a clone made earlier has its own state."""
        other = new.clone()
        want = old.run({**values, "b": INITIAL})
        for ir in (new, other):
            got = ir.run(values)
            assert all(torch.equal(got[name], value) for name, value in want.items())
        second = new.run(values)
        assert torch.equal(second["b"], old.run({**values, "b": want["b"]})["b"])
        assert not torch.equal(second["losses"], want["losses"])
        assert torch.equal(INITIAL, torch.arange(4.0))

    def test_a_program_that_only_reads_its_adapter_is_refused(self) -> None:
        text = self.before.replace("return %sum_1: f32[4] = adapter 'b'", "")
        with pytest.raises(mz.InputError, match=r"'b' is read, but the program returns no new value for it; only a"):
            self.one(parsed(text))

    def test_an_adapter_that_is_returned_as_it_came_is_refused(self) -> None:
        text = self.before.replace("return %sum_1:", "return %b:")
        with pytest.raises(mz.InputError, match="itself; inside, it would never be written"):
            self.one(parsed(text))

    @pytest.mark.parametrize(
        ("initial", "found"),
        [({}, "none"), ({"b": torch.zeros(3)}, r"f32\[3\]"), ({"b": torch.zeros(4).half()}, "f16")],
    )
    def test_an_initial_value_that_does_not_fit_is_refused(self, initial: Mapping[str, Tensor], found: str) -> None:
        with pytest.raises(mz.InputError, match=rf"'b' is f32\[4\], its initial value {found}"):
            InternalizeAdapter(initial)(parsed(self.before))

    def test_a_program_without_an_adapter_is_left_alone(self) -> None:
        ir = parsed("%x: f32[2] = batch 'x'\nreturn %x: f32[2] = losses")
        assert InternalizeAdapter({})(ir) == 0
        assert torch.equal(ir.run(values_of(ir))["losses"], values_of(ir)["x"])


@pytest.mark.parametrize("form", ["readable", "core"])
@pytest.mark.parametrize(
    ("name", "estimator", "options"),
    [
        ("block", mz.TwoSided(2), {}),
        ("block", mz.OneSided(2, normalize="std"), {"trainable": "lora_A+lora_B", "noise": "rademacher"}),
        ("sequence-first", mz.TwoSided(1), {}),
        ("tied", mz.TwoSided(2), {}),
        ("llama-qv", mz.TwoSided(2), {}),
    ],
    ids=str,
)
def test_steps_in_a_row_have_the_same_bits(
    compiled: Any, name: str, estimator: mz.TwoSided, options: dict[str, Any], form: str
) -> None:
    program, _, inputs = compiled(name, estimator=estimator, **options)
    batch = list(bind_inputs(program.inputs, inputs).values())
    plain = program._methods["step"] if form == "readable" else program.core_ir("step")
    initial = program.initial_adapter()

    def internal() -> Any:
        exported = program.internalized() if form == "readable" else program.core("step", "internal")
        return exported.module()

    module, adapter, losses = internal(), program.initial_adapter(), []
    for step in range(STEPS):
        lr, eps = torch.tensor([0.05]), torch.tensor([0.01])
        loss, each, gradients = module(*batch, torch.tensor([step]), lr, eps)
        given = {**adapter, **bind_inputs(program.inputs, inputs), "seed": torch.tensor([step]), "lr": lr, "eps": eps}
        want = plain.run(given)
        assert torch.equal(loss, want["loss"])
        assert torch.equal(each, want["losses"])
        assert torch.equal(gradients, want["projected_gradients"])
        adapter = {fqn: want[fqn] for fqn in adapter}
        losses.append(loss)
    assert len({float(loss) for loss in losses}) == STEPS
    state = dict(module.named_buffers())
    assert all(torch.equal(state[fqn], value) for fqn, value in adapter.items())
    # Another one starts anew: neither the program nor its model was written to.
    again = internal()(*batch, torch.tensor([0]), torch.tensor([0.05]), torch.tensor([0.01]))
    assert torch.equal(again[0], losses[0])
    assert all(torch.equal(initial[fqn], value) for fqn, value in program.initial_adapter().items())


def test_the_exported_program_mutates_buffers_and_takes_no_adapter(compiled: Any) -> None:
    program, _, _ = compiled("block")
    signature = program.internalized().graph_signature
    fqns = list(program.initial_adapter())
    kinds = [spec.kind for spec in signature.output_specs]
    assert kinds == [OutputKind.BUFFER_MUTATION] * len(fqns) + [OutputKind.USER_OUTPUT] * 3
    assert list(signature.buffers_to_mutate.values()) == fqns
    assert [s.target for s in signature.input_specs if s.kind == InputKind.BUFFER and s.target in fqns] == fqns
    assert len(signature.user_inputs) == len(program.inputs.tensors) + 3
    for name, value in program.initial_adapter().items():
        assert torch.equal(program.internalized().state_dict[name], value)


def test_the_manifest_says_where_the_adapter_is(compiled: Any) -> None:
    program, _, _ = compiled("block")
    outside, inside = program.manifest(), program.manifest("internal")
    assert (outside["adapter_state"], inside["adapter_state"]) == ("external", "internal")
    roles = [item["role"] for side in ("inputs", "outputs") for item in inside["methods"]["step"][side]]
    assert roles == ["batch", "batch", "seed", "lr", "eps", "loss", "losses", "projected_gradients"]
    assert inside["methods"]["apply"] == outside["methods"]["apply"]
    assert inside["adapter"] == outside["adapter"]


def test_an_unknown_form_is_refused() -> None:
    one = case("mlp")
    program = mz.transform(one.build(), one.inputs(), loss=F.cross_entropy)
    with pytest.raises(mz.InputError, match="adapter must be 'external' or 'internal', found 'inside'"):
        program.core("step", "inside")
