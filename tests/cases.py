"""The table of backbones that the contract runs over: real libraries, tiny models, fixed seeds."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mamba_ssm_on_cpu import compiled, import_mamba_ssm
from residual_steer import HRes

VOCABULARY, LENGTH, WIDTH, RANK = 50, 7, 16, 4


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return what enters most modules: the first positional tensor, or `hidden_states`."""
    return next((value for value in args if isinstance(value, Tensor)), kwargs.get("hidden_states"))


def first_output(output: Any) -> Tensor:
    """Return what leaves most modules: a tensor, or the first of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def entering_pair(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return what enters a block of `mamba_ssm`: hidden + residual, or hidden alone in the first block."""
    hidden, residual = args
    return hidden if residual is None else hidden + residual


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: the case's name in test ids.
        make: builds the model.
        batch: the keywords of a call.
        points: site to the path of its module in block `{}`; written out here so that the backbones are checked.
        head: modules that `train` opens.
        enter: the stream that enters a block, from its call.
        leave: the stream that leaves a block, from its output.
        generates: whether it is a language model of transformers, which generates with and without a cache.
        scans: whether steering trains it through mambapy, which agrees with the model's own scan to rounding.
        kernels: whether it runs compiled kernels where they are installed.
        compiled_backward_fails: how the library's own model, unsteered, fails in a compiled backward pass on a CPU.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Any]]
    points: dict[str, str]
    head: str
    enter: Callable[[tuple[Any, ...], dict[str, Any]], Tensor] = first_tensor
    leave: Callable[[Any], Tensor] = first_output
    generates: bool = False
    scans: bool = False
    kernels: bool = False
    compiled_backward_fails: str = ""

    def build(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return a frozen model in evaluation mode; the same weights each time."""
        if self.kernels and device == "cpu" and compiled():
            pytest.skip("the kernels that are installed here take CUDA tensors alone; the cuda cases run them")
        model = copy.deepcopy(_built(self.make))
        return model.to(device, dtype).eval().requires_grad_(False)

    def inputs(self, model: nn.Module) -> dict[str, Any]:
        """Return the keywords of a call, on the model's device and in its dtype."""
        torch.manual_seed(1)
        like = next(model.parameters())
        return {key: _like(value, like) if isinstance(value, Tensor) else value for key, value in self.batch().items()}

    def run(self, model: nn.Module, **more: Any) -> Tensor:
        """Return the model's output as one tensor."""
        output = model(**self.inputs(model), **more)
        for name in ("logits", "last_hidden_state"):
            output = getattr(output, name, output)
        return output

    def loss(self, model: nn.Module) -> Tensor:
        """Return a loss to which every entry of the output matters differently."""
        output = self.run(model).float()
        generator = torch.Generator().manual_seed(2)
        return (output * torch.randn(output.shape, generator=generator).to(output.device)).mean()

    def modules(self, model: nn.Module, site: str) -> list[nn.Module]:
        """Return the module of every block that `site` steers."""
        path = self.points["mixer" if site == "input" else site]
        return [model.get_submodule(path.format(index)) for index in range(2)]


def _like(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.device, like.dtype) if value.is_floating_point() else value.to(like.device)


@functools.cache
def _built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def _images(keyword: str) -> dict[str, Tensor]:
    return {keyword: torch.randn(2, 3, 16, 16)}


def _tokens(**more: Any) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, VOCABULARY, (2, LENGTH)), **more}


def _timm(module: str, name: str, **more: Any) -> nn.Module:
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "num_classes": 3}
    package = pytest.importorskip("timm", reason="timm is not installed")
    return getattr(importlib.import_module(f"{package.__name__}.models.{module}"), name)(**shape, **more)


def _transformers(model: str, config: str, **settings: Any) -> nn.Module:
    package = pytest.importorskip("transformers", reason="transformers is not installed")
    return getattr(package, model)(getattr(package, config)(**settings))


def _vision(model: str, config: str) -> nn.Module:
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    more = {"mlp_ratio": 2} if "Dinov2" in config else {"intermediate_size": 32}
    return _transformers(model, config, **shape, **more, num_labels=3)


def _gpt2(model: str) -> nn.Module:
    shape = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "num_labels": 3}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return _transformers(model, "GPT2Config", **shape, **dropout, **_SPECIAL)


def _mamba(family: str, **more: Any) -> nn.Module:
    shape = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 4}
    return _transformers(f"{family}ForCausalLM", f"{family}Config", **shape, **more, **_SPECIAL)


def _mamba_ssm(layer: str, **more: Any) -> nn.Module:
    import_mamba_ssm()
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    fused = compiled()
    mixer: dict[str, Any] = {"layer": layer, "d_state": 16}
    if layer == "Mamba2":
        mixer |= {"headdim": 16, "chunk_size": 16, "use_mem_eff_path": fused}
    config = MambaConfig(
        d_model=WIDTH,
        n_layer=2,
        vocab_size=VOCABULARY,
        ssm_cfg=mixer,
        rms_norm=fused,
        fused_add_norm=fused,
        pad_vocab_size_multiple=1,
        **more,
    )
    return MambaLMHeadModel(config)


_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = functools.partial(_tokens, use_cache=False)


def _points(block: str, mixer: str, mlp: str | None = "mlp") -> dict[str, str]:
    found = {"block": block, "mixer": f"{block}.{mixer}", "input": f"{block}.{mixer}"}
    return found if mlp is None else {**found, "mlp": f"{block}.{mlp}"}


def _pixels(keyword: str) -> Callable[[], dict[str, Tensor]]:
    return functools.partial(_images, keyword)


_GPT2_POINTS = _points("transformer.h.{}", "attn")
_MAMBA_POINTS = _points("backbone.layers.{}", "mixer", None)

CASES = [
    Case(
        "timm-vit",
        functools.partial(_timm, "vision_transformer", "VisionTransformer", init_values=0.1),
        _pixels("x"),
        _points("blocks.{}", "attn"),
        "head",
    ),
    Case(
        "timm-eva",
        functools.partial(_timm, "eva", "Eva", use_rot_pos_emb=True, swiglu_mlp=True),
        _pixels("x"),
        _points("blocks.{}", "attn"),
        "head",
    ),
    Case(
        "timm-deit",
        functools.partial(_timm, "deit", "VisionTransformerDistilled"),
        _pixels("x"),
        _points("blocks.{}", "attn"),
        "head*",
    ),
    Case(
        "hf-vit",
        functools.partial(_vision, "ViTForImageClassification", "ViTConfig"),
        _pixels("pixel_values"),
        _points("vit.layers.{}", "attention"),
        "classifier",
    ),
    Case(
        "hf-deit",
        functools.partial(_vision, "DeiTForImageClassification", "DeiTConfig"),
        _pixels("pixel_values"),
        _points("deit.layers.{}", "attention"),
        "classifier",
    ),
    Case(
        "hf-dinov2",
        functools.partial(_vision, "Dinov2Model", "Dinov2Config"),
        _pixels("pixel_values"),
        _points("encoder.layer.{}", "attention"),
        "layernorm",
    ),
    Case(
        "hf-clip",
        functools.partial(_vision, "CLIPVisionModel", "CLIPVisionConfig"),
        _pixels("pixel_values"),
        _points("encoder.layers.{}", "self_attn"),
        "pre_layrnorm",
    ),
    Case(
        "gpt2",
        functools.partial(_gpt2, "GPT2LMHeadModel"),
        _TEXT,
        _GPT2_POINTS,
        "transformer.ln_f",
        generates=True,
    ),
    Case("gpt2-classifier", functools.partial(_gpt2, "GPT2ForSequenceClassification"), _TEXT, _GPT2_POINTS, "score"),
    Case(
        "mamba",
        functools.partial(_mamba, "Mamba"),
        _TEXT,
        _MAMBA_POINTS,
        "backbone.norm_f",
        generates=True,
        scans=True,
        kernels=True,
    ),
    Case(
        "mamba2",
        functools.partial(_mamba, "Mamba2", head_dim=8, num_heads=4, n_groups=1, chunk_size=4),
        _TEXT,
        _MAMBA_POINTS,
        "backbone.norm_f",
        generates=True,
        kernels=True,
    ),
    Case(
        "falcon-mamba",
        functools.partial(_mamba, "FalconMamba"),
        _TEXT,
        _MAMBA_POINTS,
        "backbone.norm_f",
        generates=True,
        scans=True,
        kernels=True,
    ),
    Case(
        "mamba_ssm-1",
        functools.partial(_mamba_ssm, "Mamba1", residual_in_fp32=True),
        _tokens,
        _MAMBA_POINTS,
        "backbone.norm_f",
        enter=entering_pair,
        leave=sum,
        kernels=True,
        compiled_backward_fails="view size is not compatible",
    ),
    Case(
        "mamba_ssm-2",
        functools.partial(_mamba_ssm, "Mamba2", residual_in_fp32=False, d_intermediate=32),
        _tokens,
        _points("backbone.layers.{}", "mixer"),
        "backbone.norm_f",
        enter=entering_pair,
        leave=sum,
        kernels=True,
    ),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]


def randomise(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Give every field of a steered model random weights and biases."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters() if isinstance(module, HRes) else ():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def closed_form(field: HRes, z: Tensor) -> Tensor:
    """Return H(z) = W_up · gelu(W_down · z + b_down) + b_up in fp64 (eq. 2), the width last."""
    weights = {name: parameter.detach().double() for name, parameter in field.named_parameters()}
    hidden = functional.gelu(z.double() @ weights["down.weight"].T + weights["down.bias"])
    return hidden @ weights["up.weight"].T + weights["up.bias"]
