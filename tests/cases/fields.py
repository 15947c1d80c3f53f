"""What tests ask of fields: random weights, and the closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from residual_steer import HRes


def randomise(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Give every field of a steered model random weights and biases."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters() if isinstance(module, HRes) else ():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def closed_form(field: HRes, z: Tensor) -> Tensor:
    """Return H(z) = W_up · gelu(W_down · z + b_down) + b_up in fp64 (eq. 2), of z's shape."""
    weights = {name: parameter.detach().double() for name, parameter in field.named_parameters()}
    z = z.double().movedim(field.channels, -1)
    hidden = functional.gelu(z @ weights["down.weight"].T + weights["down.bias"])
    return (hidden @ weights["up.weight"].T + weights["up.bias"]).movedim(-1, field.channels)
