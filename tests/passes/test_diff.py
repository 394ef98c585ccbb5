"""What `program.diff` tells of a pass: changes by node, cut to a width, repetitions told once."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes as mz
from mobizo_passes.views.diff import fit, graph_diff
from tests.models import Lora, integers, random, seeded


class Deep(nn.Module):
    """Layers of one form: norm, LoRA, residual."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.proj = nn.LayerNorm(6), Lora(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.proj(self.norm(x))

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def deep(layers: int, trained: int | None = None) -> mz.TrainingProgram:
    """A program of equal layers, with LoRA on the last `trained` of them."""
    first = 0 if trained is None else layers - trained
    inputs = (random(2, 6), integers(6, 2))
    return mz.transform(
        seeded(Deep(layers)),
        inputs,
        estimator=mz.TwoSided(2),
        loss=F.cross_entropy,
        sites=lambda s: int(re.findall(r"\d+", s.lora_B)[0]) >= first,
    )


def marks(text: str) -> list[str]:
    return [line[0] for line in text.splitlines()[2:]]


def test_a_node_that_changed_stands_beside_itself(compiled) -> None:
    lines = compiled("mlp")[0].diff("expand-perturbations").splitlines()
    assert lines[:2] == ["--- before expand-perturbations", "+++ after expand-perturbations"]
    place = next(i for i, line in enumerate(lines) if line.startswith("-%mp_lora:"))
    assert lines[place + 1].startswith("+%mp_lora:")
    assert "~%relu: f32[3, 8] → f32[24, 8] = aten.relu(%add)" in lines


def test_what_did_not_change_is_not_shown(compiled) -> None:
    program, _, _ = compiled("mlp")
    text = program.diff("insert-noise")
    assert "%noise_1" in text
    assert "%relu" not in text
    assert graph_diff("%a: f32[1] = seed\n", "%a: f32[1] = seed\n", "nothing") == ""


def test_alignment_alone_is_no_change() -> None:
    assert marks(graph_diff("%a: x = f()    # m\n%b: x = f()\n", "%a: x = f()  # m\n%b: x = g()\n", "p")) == [*"@ -+"]


def test_repeated_layers_are_counted_and_can_be_written_out() -> None:
    short, long = deep(4).diff("expand-perturbations"), deep(9).diff("expand-perturbations")
    assert len(short.splitlines()) == len(long.splitlines())
    told = re.findall(r"… (layers\.\d+) to (\d+): the same, (\d+) lines", long)
    # The first layer reads what is not expanded yet; the second is the first of those that are alike.
    assert ("layers.2", "8") in {(first, last) for first, last, _ in told}
    whole = deep(9).diff("expand-perturbations", everything=True)
    assert "…" not in whole
    hidden = sum(int(count) for count in re.findall(r"the same, (\d+) lines", long))
    notes = sum(line.startswith("…") for line in long.splitlines())
    assert len(whole.splitlines()) == len(long.splitlines()) - notes + hidden
    assert all(f"layers.{i}.proj" in whole for i in range(9))


def test_a_layer_of_another_form_is_not_counted_away() -> None:
    """Same operators, but one layer's type differs: it must be seen."""
    line = "%mul{n}: f32[{size}] = aten.mul(%x, {factor})  # layers.{i}\n"
    before = "".join(line.format(n=f"_{i}" if i else "", size=2, factor=1.0, i=i) for i in range(4))
    after = "".join(line.format(n=f"_{i}" if i else "", size=8, factor=3.0 if i == 2 else 2.0, i=i) for i in range(4))
    text = graph_diff(before, after, "p")
    assert "… layers.1: the same, 2 lines" in text
    assert "+%mul_2: f32[8] = aten.mul(%x, 3.0)" in text
    assert "+%mul_3: f32[8] = aten.mul(%x, 2.0)" in text


@pytest.mark.parametrize("width", [20, 60, 80, 120])
@pytest.mark.parametrize("name", ["mlp", "llama-qv"])
def test_no_line_is_longer_than_the_terminal(compiled, name: str, width: int) -> None:
    program, _, _ = compiled(name)
    for record in program.history:
        assert all(len(line) <= width for line in program.diff(record.name, width=width).splitlines())


def test_a_cut_line_keeps_its_name_and_the_end_of_its_origin() -> None:
    line = "+%linear: f32[2, 8, 64] = aten.linear(%a, %some_very_long_weight_name)  # model.layers.0.mlp.up | a-pass"
    cut = fit(line, 70)
    assert len(cut) == 70
    assert cut.startswith("+%linear: f32[2, 8, 64] = aten.")
    assert cut.endswith(".mlp.up | a-pass")
    assert fit(line, 200) == line


def test_an_unknown_pass_is_an_error_that_names_the_known(compiled) -> None:
    with pytest.raises(mz.InputError, match=r"no pass 'nothing' ran; these did: .*insert-mp-lora"):
        compiled("mlp")[0].diff("nothing")


def test_diffs_are_stable() -> None:
    first, second = deep(3), deep(3)
    assert [first.diff(r.name) for r in first.history] == [second.diff(r.name) for r in second.history]
    assert torch.equal(*(p.initial_adapter()["layers.0.proj.lora_B.weight"] for p in (first, second)))
