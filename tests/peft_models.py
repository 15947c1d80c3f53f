"""The models that the tests of PEFT run over, and what they do to a field."""

import functools

import torch

import residual_steer as rs
from cases import CASES
from cases.case import WITHOUT_CACHE, Case, pair, text

_LLAMA = Case(
    "llama",
    functools.partial(text, "LlamaForCausalLM", "LlamaConfig"),
    WITHOUT_CACHE,
    pair("model.layers.{}", "self_attn"),
    "model.norm",
    generates=True,
)
BY_NAME = {case.name: case for case in (*CASES, _LLAMA)}
MODELS = [BY_NAME[name] for name in ("gpt2", "llama", "mamba", "mamba2", "hf-vit", "t5", "bert")]


def shake(model, name=None, seed=3):
    """Give a field random weights, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in rs.parameters(model, name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def run(case, model, **more):
    with torch.no_grad():
        return case.run(model.eval(), **more)
