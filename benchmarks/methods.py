"""The rows of the table of costs: the frozen model, the floor, H-Res, PEFT's methods, and full fine-tuning.

All stand on one copy of the weights. Weights that a method adds are random: zeros could be multiplied faster, and would
hide a method that does nothing.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import residual_steer as rs
from shapes import Shape, scan_linearly, scanning, twin

__all__ = [
    "CHEAPEST",
    "FLOOR",
    "FROZEN",
    "FULL",
    "IN_BF16",
    "OURS",
    "SITES",
    "Method",
    "build",
    "compile_apart",
    "floor",
    "lora",
    "mixed",
    "randomise",
    "steered",
    "why",
]

FROZEN, FLOOR, OURS, FULL = "frozen", "floor", "H-Res, block", "full fine-tuning"
IN_BF16 = "H-Res, fields in bf16"
CHEAPEST = "LoRA, usual targets"  # whom steering is to be ahead of
SITES = ("block", "mixer", "mlp", "input")
FIELDS = (2, 8)
PROMPT = 32  # virtual tokens: as many as the rank of the others by default
USUAL = {"gpt2": ["c_attn"], "vit": ["qkv"], "mamba": ["in_proj", "x_proj"]}


@dataclass(frozen=True)
class Method:
    """One way to adapt a backbone.

    Attributes:
        name: as in the table.
        model: prepared; what trains requires a gradient.
        reader: what decodes; another than the model where PEFT puts a prompt before every call.
        own: whether what its cache holds is not what the frozen model's holds.
        stored: bytes of a task on disk; None where there is none.
    """

    name: str
    model: nn.Module
    reader: nn.Module
    own: bool = False
    stored: int | None = None


def build(
    kind: str, shape: Shape, base: nn.Module, rank: int, only: Collection[str] = ()
) -> tuple[list[Method], dict[str, str]]:
    """Prepare every method on twins of `base`.

    Args:
        kind: the shape's name.
        shape: of the backbone.
        base: the frozen model, not changed.
        rank: of fields and adapters.
        only: names of those that are wanted; all if empty.

    Returns:
        The methods, and of those that cannot be prepared the reason, by name.
    """
    sites = [site for site in SITES if site in rs.find_backbone(base).sites]
    makers: dict[str, Callable[[nn.Module], Method]] = {
        FROZEN: lambda model: Method(FROZEN, model, model),
        FLOOR: lambda model: Method(FLOOR, floor(model), model),
    }
    for site in sites:
        makers[f"H-Res, {site}"] = lambda model, site=site: steered(model, rank, site=site)
    for number in FIELDS:
        makers[f"H-Res, {number} fields"] = lambda model, number=number: mixed(model, rank, number)
    makers[CHEAPEST] = lambda model: lora(model, USUAL[kind], rank)
    makers["LoRA, all linear layers"] = lambda model: lora(model, "all-linear", rank, "LoRA, all linear layers")
    makers["prompt tuning"] = lambda model: _prompt(model, shape)
    makers["ShadowPEFT"] = lambda model: _shadow(model, shape, rank)
    makers[FULL] = _full
    methods, refused = [], {}
    for name, make in makers.items():
        if only and name not in only:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                method = make(scan_linearly(twin(base)))
                scanning(method.model)
                methods.append(method)
        except Exception as error:  # a peer that fails is a row of the table, and no reason to lose the others
            if name in (FROZEN, FLOOR, OURS):
                raise
            refused[name] = why(error)
    return methods, refused


def compile_apart() -> None:
    """Let every method be compiled by itself: all run the code of one class, and dynamo overlooks hooks otherwise."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.skip_nnmodule_hook_guards = False  # or H-Res runs what was compiled of the frozen model


def why(error: Exception) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def floor(model: nn.Module) -> nn.Module:
    """Let what leaves the first block require a gradient, as if something beside it were learning."""
    backbone = rs.find_backbone(model)
    learning = torch.zeros((), device=next(model.parameters()).device, requires_grad=True)

    def require(z: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # which would break the graph in every block
            return _Floor.apply(z, learning)
        return z.detach().requires_grad_(torch.is_grad_enabled())

    backbone.blocks[0].register_forward_hook(lambda _, args, output: backbone.write(output, require))
    return model


class _Floor(torch.autograd.Function):
    """Return a stream as it is; its gradient is summed for `learning`, or else the compiler would leave it out."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, learning: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient.sum(dtype=torch.float32)


def steered(
    model: nn.Module, rank: int, *, site: str | Sequence[str] = "block", layers: Sequence[int] | None = None
) -> Method:
    """Steer a model by one field."""
    rs.steer(model, rank=rank, site=site, layers=layers)
    randomise(model)
    name = site if isinstance(site, str) else " + ".join(site)
    return Method(f"H-Res, {name}", model, model, stored=_size(lambda folder: rs.save(model, folder)))


def mixed(model: nn.Module, rank: int, number: int) -> Method:
    """Steer a model by a mix of fields that all train."""
    weights = {f"f{index}": (-1) ** index / (index + 1) for index in range(number)}
    for name in weights:
        rs.steer(model, rank=rank, name=name)
    rs.use(model, weights)
    for name in weights:
        rs.thaw(model, name)
    randomise(model)
    size = sum(_size(lambda folder, name=name: rs.save(model, folder, name)) for name in weights)
    return Method(f"H-Res, {number} fields", model, model, stored=size)


def lora(model: nn.Module, targets: Sequence[str] | str, rank: int, name: str = CHEAPEST) -> Method:
    """Give a model PEFT's LoRA."""
    import peft

    return _peft(name, model, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))


def _prompt(model: nn.Module, shape: Shape) -> Method:
    import peft

    if shape.cache is None:
        raise rs.SteerError("PEFT's prompt tuning puts vectors before embedded tokens; this model reads images.")
    # PEFT asks every model for its heads, of which prompt tuning makes no use.
    heads = {} if hasattr(model.config, "num_attention_heads") else {"num_attention_heads": 1}
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT, **heads)
    made = _peft("prompt tuning", model, config, own=True)
    return Method(made.name, made.model, made.model.base_model, True, made.stored)  # PEFT's generate does the same


def _shadow(model: nn.Module, shape: Shape, rank: int) -> Method:
    import peft

    if not hasattr(peft, "ShadowConfig"):
        raise rs.SteerError("this release of PEFT has no ShadowPEFT.")
    if shape.cache is None:
        raise rs.SteerError("ShadowPEFT is for decoders of text and of images; this model is a classifier of images.")
    return _peft("ShadowPEFT", model, peft.ShadowConfig(task_type="CAUSAL_LM", r=rank), own=True)


def _peft(name: str, model: nn.Module, config: Any, own: bool = False) -> Method:
    import peft

    adapted = peft.get_peft_model(model, config).eval()
    randomise(adapted)

    def save(folder: Path) -> object:
        return adapted.save_pretrained(folder, save_embedding_layers=False)

    return Method(name, adapted, adapted, own, _size(save))


def _full(model: nn.Module) -> Method:
    model.requires_grad_(True)
    return Method(FULL, model, model, stored=sum(p.numel() * p.element_size() for p in model.parameters()))


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Fill whatever trains, the same each time."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def _size(save: Callable[[Path], object]) -> int:
    """Return the bytes of the tensors that something saves."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        return sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
