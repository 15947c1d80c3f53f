"""Tiny models whose attention is far from uniform, and what a diagnostic must leave behind of them."""

import torch

from cases import CASES, randomise


def case_of(name):
    return next(case for case in CASES if case.name == name)


def sharp(case, factor=12):
    """Build a case with larger matrices: fresh ones attend to everything alike."""
    model = case.build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(factor)
    return model


def steered(model, **options):
    import residual_steer as rs

    return randomise(rs.steer(model, rank=2, **options))


def traces(model):
    """List everything that a diagnostic may touch: hooks, switches, modes, and what configs name."""
    found = []
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
        found.append(
            (
                path,
                len(module._forward_hooks) + len(module._forward_pre_hooks),
                module.training,
                tuple(getattr(module, name, None) for name in ("fused_attn", "use_fast_path", "use_mem_eff_path")),
                tuple(getattr(part, "_attn_implementation", None) for part in parts),
            )
        )
    return found


class Broken(RuntimeError):
    """What a module raises in the middle of a measurement."""


def break_at(module):
    """Let a module fail when it is called."""

    def fail(*_):
        raise Broken

    return module.register_forward_hook(fail)
