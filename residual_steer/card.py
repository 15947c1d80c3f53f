"""The card of a field on the Hub: a README.md that states what is known about it, and how it is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ._controller import Steering
from .config import FieldConfig
from .hub import is_repo
from .identity import Identity

__all__ = ["model_card"]


def model_card(
    repo: str, model: nn.Module, state: Steering, spec: FieldConfig, tensors: Mapping[str, Tensor], size: int
) -> str:
    """Return the card of a field, with the front matter that the Hub reads.

    Args:
        repo: "owner/name", where the card goes.
        model: the model that the field steers.
        state: what steers it.
        spec: the field.
        tensors: what is stored of the field.
        size: bytes of the file that holds them.
    """
    identity = Identity.of(model, state.backbone)
    base = _base_model(model) or _base_model(model.get_submodule(state.backbone.path))
    front = ["library_name: residual-steer", "tags:", "- residual-steer", f"- {json.dumps(identity.name)}"]
    if base is not None:
        front += [f"base_model: {base}", "base_model_relation: adapter"]
    widths = ", ".join(map(str, sorted(set(identity.widths))))
    heads = [
        f"`{key.removeprefix('train.')}` {tuple(tensor.shape)}"
        for key, tensor in tensors.items()
        if key.startswith("train.")
    ]
    rows = {
        "backbone": f"{identity.name}: `{identity.kind}`, {len(identity.widths)} blocks of width {widths}",
        "base model": f"[{base}](https://huggingface.co/{base})" if base else "not recorded",
        "site": f"`{spec.site}`",
        "steered blocks": _list(spec.ranks),
        "rank": _list(sorted(set(spec.ranks.values()))),
        "scale": f"{spec.scale:g}",
        "activation": spec.activation,
        "trained base tensors": ", ".join(heads) or "none",
        "parameters": f"{sum(tensor.numel() for tensor in tensors.values()):,}",
        "size": f"{size:,} bytes",
    }
    return "\n".join(
        [
            "---",
            *front,
            "---",
            "",
            f"# {repo.partition('/')[2]}",
            "",
            "A steering field for a frozen backbone: a small vector field beside its residual stream (H-Res, "
            "[arXiv 2606.24396](https://arxiv.org/abs/2606.24396)), stored by `residual_steer`.",
            "",
            "| | |",
            "| --- | --- |",
            *(f"| {key} | {value} |" for key, value in rows.items()),
            "",
            "```python",
            *_code(repo, model, spec, identity, base),
            "```",
            "",
        ]
    )


def _code(repo: str, model: nn.Module, spec: FieldConfig, identity: Identity, base: str | None) -> list[str]:
    """Return the lines that load the field."""
    kind = type(model)
    lines = ["import residual_steer as rs"]
    if base is not None and kind.__module__.partition(".")[0] == "transformers":
        made = f'{kind.__name__}.from_pretrained("{base}")'
        lines = [f"from transformers import {kind.__name__}", *lines]
    else:
        made = (
            f"...  # {identity.kind} with {len(identity.widths)} blocks, and the weights that the field was trained on"
        )
    lines += ["", f"model = {made}"]
    if spec.train:
        lines.append("# the model needs the trained base tensors above, in these shapes, before the field is loaded")
    return [*lines, f'rs.load(model, "{repo}")']


def _base_model(model: nn.Module) -> str | None:
    """Return the name on the Hub that the model's config has, if it has one, and it is no folder here."""
    name: Any = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and is_repo(name) and not os.path.exists(name) else None


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
