"""A model with steering fields baked in (H-Res, arXiv 2606.24396), written by residual_steer, which it does not need.

For every point, `config.steering` has the module, the site, and the fields that are added: M(z) + Σ α·H(z) with
H(z) = W_up·σ(W_down·z + b_down) + b_up; at the site `input` the module receives x + Σ α·H(x), at the site `after` z is
what the module returns.
"""

from functools import partial

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel as Base

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


class Field(nn.Module):
    """One field: `(batch, length, width)` or `(batch, width, height, width)` in, as much out."""

    def __init__(self, width, rank, bias, activation, alpha, channels):
        super().__init__()
        self.activation, self.alpha, self.channels = activation, alpha, channels
        self.down, self.up = nn.Linear(width, rank, bias), nn.Linear(rank, width, bias)

    def forward(self, y, z):
        """Return y + α·H(z)."""
        z = z.movedim(self.channels, -1)
        hidden = ACTIVATIONS[self.activation](F.linear(z, *_cast(self.down, z.dtype)))
        weight, bias = _cast(self.up, hidden.dtype)
        if self.channels == 1 or not y.is_contiguous() or hidden.dtype != y.dtype:
            return torch.add(y, F.linear(hidden, weight, bias).movedim(-1, self.channels), alpha=self.alpha).to(y.dtype)
        flat = y.view(-1, y.shape[-1])
        flat = flat if bias is None else torch.add(flat, bias, alpha=self.alpha)
        return torch.addmm(flat, hidden.reshape(-1, hidden.shape[-1]), weight.t(), alpha=self.alpha).view_as(y)


class Point(nn.ModuleList):
    """The fields at one place, and the hook that adds them."""

    def __init__(self, fields, site):
        super().__init__([Field(**field) for field in fields])
        self.site = site

    def add(self, y, z):
        """Return y with every field of z."""
        for field in self:
            y = field(y, z)
        return y

    def before(self, host, args, kwargs):
        """Let a mixer receive x + Σ α·H(x)."""
        x = _stream(args, kwargs)
        new = self.add(x, x)
        return tuple(new if a is x else a for a in args), {k: new if a is x else a for k, a in kwargs.items()}

    def after(self, host, args, kwargs, output):
        """Let a module return M(z) + Σ α·H(z)."""
        y = output if isinstance(output, torch.Tensor) else output[0]
        new = self.add(y, y if self.site == "after" else _stream(args, kwargs))
        if output is y:
            return new
        rest = (new, *output[1:])
        return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)


class Steered(Base):
    """The base with its fields."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        torch._dynamo.config.skip_nnmodule_hook_guards = False  # else what is compiled of the base may run here
        self.steering = nn.ModuleList(Point(point["fields"], point["site"]) for point in config.steering)
        for point, described in zip(self.steering, config.steering, strict=True):
            host = self.get_submodule(described["module"])
            if point.site == "input":
                host.register_forward_pre_hook(point.before, with_kwargs=True)
            else:
                host.register_forward_hook(point.after, with_kwargs=True, prepend=True)  # `after` comes first in config


def _stream(args, kwargs):
    return next(x for x in (*args, kwargs.get("hidden_states")) if isinstance(x, torch.Tensor))


def _cast(linear, dtype):
    return linear.weight.to(dtype), None if linear.bias is None else linear.bias.to(dtype)
