"""Models and tensors with fixed random values, and LoRA-B that is not zero: what tests are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def seeded(module: nn.Module, seed: int = 0, scale: float = 0.4) -> nn.Module:
    """Fill every parameter with fixed random values (norms' weights around one) and switch to eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            value = torch.randn(parameter.shape, generator=generator) * scale
            is_norm_weight = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + value if is_norm_weight else value)
    return module.eval()


def random(*shape: int, seed: int = 7) -> Tensor:
    """Standard normal float32 values, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(high: int, *shape: int, seed: int = 8) -> Tensor:
    """Integers below `high`, int64, the same for the same seed."""
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


class Lora(nn.Module):
    """A linear layer with a low-rank path beside it, under PEFT's parameter names."""

    def __init__(self, fan_in: int, fan_out: int, rank: int = 2, scaling: float = 1.5, bias: bool = True) -> None:
        super().__init__()
        self.base = nn.Linear(fan_in, fan_out, bias=bias)
        self.lora_A = nn.Linear(fan_in, rank, bias=False)
        self.lora_B = nn.Linear(rank, fan_out, bias=False)
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x)) * self.scaling
