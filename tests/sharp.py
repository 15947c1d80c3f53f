"""Tiny models whose attention is far from uniform, data for them, and what a diagnostic must leave behind of them."""

import torch

import residual_steer as rs
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
    return randomise(rs.steer(model, rank=2, **options))


def rows_for(case, model, rows=12, labels="class"):
    """Return rows as a case is called with them: texts of several lengths, padded on the right, or images.

    Labels are classes of the rows, or every token's own id.
    """
    given = case.inputs(model)
    key, like = next(iter(given.items()))
    classes, generator = torch.arange(rows) % 3, torch.Generator().manual_seed(3)
    if like.is_floating_point():
        values = torch.randn(rows, *like.shape[1:], generator=generator)
        return (values, classes) if key == "x" else {key: values, "labels": classes}
    values = torch.randint(3, 50, (rows, 7), generator=generator)
    mask = (torch.arange(7) < torch.arange(rows)[:, None] % 4 + 4).long()
    batch = {key: values * mask, **({"attention_mask": mask} if "mamba_ssm" not in case.name else {})}
    batch |= {name: value for name, value in given.items() if not torch.is_tensor(value)}
    return batch if labels is None else {**batch, "labels": classes if labels == "class" else batch[key]}


def cut(whole, *sizes):
    """Return rows as batches of some sizes."""
    if isinstance(whole, tuple):
        return list(zip(*(part.split(sizes) for part in whole), strict=True))
    parts = {key: x.split(sizes) if torch.is_tensor(x) else [x] * len(sizes) for key, x in whole.items()}
    return [dict(zip(parts, each, strict=True)) for each in zip(*parts.values(), strict=True)]


def traces(model):
    """List everything that a diagnostic may touch: hooks, switches, modes, and what configs name."""
    found = []
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
        names = ("_attn_implementation", "output_attentions", "return_dict")
        found.append(
            (
                path,
                len(module._forward_hooks) + len(module._forward_pre_hooks),
                module.training,
                tuple(getattr(module, name, None) for name in ("fused_attn", "use_fast_path", "use_mem_eff_path")),
                tuple(getattr(part, name, None) for part in parts for name in names),
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
