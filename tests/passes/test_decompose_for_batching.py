"""DecomposeForBatching: an operator without a rule is taken apart into what has one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes as mz
from mobizo_passes.batching.parts import PARTS
from mobizo_passes.passes import DecomposeForBatching
from tests.models import Lora, integers, random, seeded
from tests.passes.contract import PassContract, left_alone

HEAD = """
    %a: f32[3, 4, 5] = adapter 'a'
    %b: f32[3, 4, 5] = batch 'b'
    %x: f32[3, 4, 5] = aten.add(%a, %b)
"""


class TestDecomposeForBatching(PassContract):
    one = DecomposeForBatching()
    before = f"""{HEAD}
        %y: f32[3, 4, 2, 3] = aten.unfold(%x, 2, 3, 2)

        return %y: f32[3, 4, 2, 3] = loss
    """
    after = """
        %a: f32[3, 4, 5] = adapter 'a'
        %b: f32[3, 4, 5] = batch 'b'
        %view_2: i64[6] = constant 'view'

        %x: f32[3, 4, 5] = aten.add(%a, %b)
        %index_select: f32[3, 4, 6] = aten.index_select(%x, 2, %view_2)  # | decompose-for-batching
        %view_1: f32[3, 4, 2, 3] = aten.reshape(%index_select, [3, 4, 2, 3])  # | decompose-for-batching
        %permute: f32[3, 4, 2, 3] = aten.permute(%view_1, [0, 1, 2, 3])  # | decompose-for-batching

        return %permute: f32[3, 4, 2, 3] = loss
    """

    @pytest.mark.parametrize(
        "call",
        [
            "%u: f32[3, 4, 5, 1] = aten.unfold(%b, 2, 1, 1)\n%v: f32[3, 4, 5] = aten.reshape(%u, [3, 4, 5])\n"
            "%y: f32[3, 4, 5] = aten.mul(%v, %x)",
            "%y: f32[3, 4, 5] = aten.cumsum(%x, 2)",
            "%y: f32[3] = aten._linalg_det(%x)",
        ],
    )
    def test_what_is_not_reached_has_a_rule_or_no_known_parts(self, call: str) -> None:
        head = HEAD.replace("4, 5]", "4, 4]") if "det" in call else HEAD
        if "det" in call:
            call = "%d: (f32[3], f32[3, 4, 4], i32[3, 4]) = aten._linalg_det(%x)\n%y: f32[3] = getitem(%d, 0)"
        kind = call.rsplit("%y: ", 1)[1].split(" =")[0]
        left_alone(f"{head}\n{call}\nreturn %y: {kind} = loss", self.one)


class Image(nn.Module):
    def __init__(self, function, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.lora, self.function, self.layer = Lora(6, 48), function, layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.lora(x).view(-1, 3, 4, 4)
        return (self.function(y) if self.layer is None else self.layer(self.function(y))).flatten(1)[:, :4]


FUNCTIONS = {
    "fold": lambda y: F.fold(F.unfold(y, 2, padding=1, stride=2).tanh(), (4, 5), 2, padding=1, stride=2),
    "unfold": lambda y: y.unfold(2, 2, 1).unfold(3, 3, 1).tanh(),
    "var_mean": lambda y: torch.cat(torch.var_mean(y, (1, 3)), 1),
    "grid": lambda y: F.grid_sample(y, y[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False),
    "bicubic": lambda y: F.interpolate(y, size=(5, 7), mode="bicubic"),
    "pixel_unshuffle": lambda y: F.pixel_unshuffle(y, 2),
    "reflect": lambda y: F.pad(y, (1, 2, 0, 1), mode="reflect"),
    "circular": lambda y: F.pad(y, (1, 2, 0, 1), mode="circular"),
    "uneven windows": lambda y: F.avg_pool2d(y, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    "distances": lambda y: torch.cdist(y[:, 0], y[:, 1]),
    "diagonal": lambda y: y.diagonal(1, 1, 3),
    "instance norm": lambda y: F.instance_norm(y),
    "pixel_shuffle": lambda y: F.pixel_shuffle(y.repeat(1, 4, 1, 1), 2),
}
LAYERS: dict[str, nn.Module] = {
    "bilinear": nn.Bilinear(4, 4, 3),
    "LSTM cell": nn.LSTMCell(4, 3),
    "LSTM": nn.LSTM(4, 3, bidirectional=True, batch_first=True),
}


class First(nn.Module):
    """Rows or sequences into a layer, and its first result."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, y: Tensor) -> Tensor:
        given = {nn.Bilinear: (y[:, 0], y[:, 1]), nn.LSTMCell: (y[:, 0, 0],), nn.LSTM: (y[:, 0],)}[type(self.layer)]
        out = self.layer(*given)
        return out if isinstance(out, Tensor) else torch.cat([out[0], out[0]], -1)


@pytest.mark.parametrize("estimator", [mz.OneSided(1), mz.Exact(), mz.ForwardGradient(1)], ids=str)
@pytest.mark.parametrize("name", [*FUNCTIONS, *LAYERS])
def test_what_has_no_rule_of_its_own(name: str, estimator: mz.Estimator) -> None:
    model = Image(FUNCTIONS[name]) if name in FUNCTIONS else Image(lambda y: y, First(LAYERS[name]))
    inputs = (random(3, 6), integers(4, 3))
    program = mz.transform(seeded(model), inputs, estimator=estimator, loss=F.cross_entropy)
    mz.verify(program, model, inputs)


class ImageAndText(nn.Module):
    """Features of images, a number of them for each example that its own mask says, among the words."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.words, self.tower, self.head = how, nn.Embedding(9, 5), Lora(6, 5), Lora(5, 4)

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        x, features, mask = self.words(ids), self.tower(image), ids == 0
        if self.how == "scatter":
            x = x.masked_scatter(mask[..., None], features)
        elif self.how == "put":
            x[mask] = features.flatten(0, 1)
        else:
            x = self.head.base(x.tanh() + features.sum(1, keepdim=True))
            x[mask] = 0.5
            return x.mean(1)
        return self.head(x.tanh()).mean(1)


@pytest.mark.parametrize("estimator", [mz.TwoSided(1), mz.Exact(), mz.ForwardGradient(1)], ids=str)
@pytest.mark.parametrize("how", ["scatter", "put", "put one"])
def test_features_where_a_mask_is_true(how: str, estimator: mz.Estimator) -> None:
    ids = torch.tensor([[0, 3, 0, 4, 1], [5, 0, 0, 0, 2], [1, 2, 3, 0, 4]])
    model, inputs = seeded(ImageAndText(how)), (ids, random(3, 2, 6), integers(4, 3))
    program = mz.transform(model, inputs, estimator=estimator, loss=F.cross_entropy)
    mz.verify(program, model, inputs)


def test_parts_are_of_operators_that_torch_has() -> None:
    assert all(isinstance(target, torch._ops.OpOverload) for target in PARTS)
