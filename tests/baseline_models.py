"""The models that baselines are tried on, one by one, and what their tests do to a model.

What the methods do on other families follows from the rules that these have in common, and is not tested.
"""

import torch

import residual_steer as rs
from cases import CASES

NAMES = (
    "timm-vit", "timm-eva", "timm-deit", "hf-vit", "hf-deit", "hf-dinov2", "hf-clip", "gpt2", "gpt2-classifier",
    "mamba", "mamba2", "falcon-mamba", "mamba_ssm-1", "mamba_ssm-2",
)  # fmt: skip
MODELS = {case.name: case for case in CASES if case.name in NAMES}
OPTIONS = {  # a ReLU with few units may be silent for the one token that a classifier reads
    **{"hres": {"rank": 4}, "adaptformer": {"rank": 8}, "parallel-adapter": {"rank": 8}, "lora": {"rank": 2}},
    **{method: {"length": 3} for method in ("prompt", "prefix", "vpt-shallow", "vpt-deep")},
}


def applied(model, method, seed=4, **options):
    """Return a model, or a fresh one of a name, with a method, small if nothing else is asked."""
    model = MODELS[model].build() if isinstance(model, str) else model
    torch.manual_seed(seed)
    return rs.baselines.apply(model, method, **{**OPTIONS.get(method, {}), **options})


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def shaken(model):
    """Make what trains random, so that it acts."""
    with torch.no_grad():
        for p in trained(model).values():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    return model


def snapshot(model):
    """All that a refused call must leave alone."""
    hooks = [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]
    return hooks, list(model.state_dict()), [p.requires_grad for p in model.parameters()], sorted(vars(model))
