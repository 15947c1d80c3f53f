"""Tiny models whose attention is far from uniform, data for them, and what a diagnostic must leave behind of them."""

import copy

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


def method(name, frozen, **options):
    """Return a copy of a model that a method to compare with has adapted, far from its start."""
    torch.manual_seed(7)
    model = rs.baselines.apply(copy.deepcopy(frozen), name, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model


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
    return batch if labels is None else {**batch, "labels": (classes if labels == "class" else batch[key]).clone()}


def cut(whole, *sizes):
    """Return rows as batches of some sizes."""
    if isinstance(whole, tuple):
        return list(zip(*(part.split(sizes) for part in whole), strict=True))
    parts = {key: x.split(sizes) if torch.is_tensor(x) else [x] * len(sizes) for key, x in whole.items()}
    return [dict(zip(parts, each, strict=True)) for each in zip(*parts.values(), strict=True)]


def alone(texts):
    """Return each text as a batch of its own, without padding."""
    masks = texts["attention_mask"].bool()
    return [
        {key: x[row][mask][None] if torch.is_tensor(x) else x for key, x in texts.items()}
        for row, mask in enumerate(masks)
    ]


def padding_first(texts, positions):
    """Return texts with their padding on the left; with positions that begin behind it."""
    order = texts["attention_mask"].argsort(dim=1, stable=True)
    texts = {key: x.gather(1, order) if torch.is_tensor(x) else x for key, x in texts.items()}
    places = (texts["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return {**texts, "position_ids": places} if positions else texts


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
