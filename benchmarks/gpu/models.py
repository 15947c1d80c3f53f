"""What is run: backbones of well-known shapes for the costs, and small ones for the contract and for training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shapes import SHAPES, Shape

__all__ = ["SUBJECTS", "Subject", "small"]


class _MambaSSM(Shape):
    """`mamba_ssm`'s own model, which asks for other calls."""

    def loss(self, call: Callable[..., Any], inputs: Tensor) -> Tensor:
        logits = call(inputs).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), inputs[:, 1:].flatten())

    def cached(self, call: Callable[..., Any], inputs: Tensor, **room: Any) -> Any:
        from mamba_ssm.utils.generation import InferenceParams

        rows, length = inputs.shape
        state = InferenceParams(max_seqlen=length + 1, max_batch_size=rows)
        call(inputs, inference_params=state, num_last_tokens=1)
        state.seqlen_offset = length
        return state


def _llama(tiny: bool, changes: Mapping[str, Any]) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = (64, 32, 64, 2, 4) if tiny else (128256, 2048, 8192, 16, 32)
    shape = dict(zip(names, sizes, strict=True))
    heads = {"num_key_value_heads": shape["num_attention_heads"] // 4, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, **changes))


def _mamba_ssm(tiny: bool, changes: Mapping[str, Any]) -> nn.Module:
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    width, blocks, vocabulary = (32, 2, 64) if tiny else (768, 24, 50280)
    return MambaLMHeadModel(MambaConfig(d_model=width, n_layer=blocks, vocab_size=vocabulary, **changes))


@dataclass(frozen=True)
class Subject:
    """A backbone whose costs are measured.

    Attributes:
        shape: builds it and runs it.
        targets: LoRA's usual ones.
        rows: of a batch; halved until it fits.
        length: tokens of a row; None for images.
        traced: whether whole sequences go through `torch.compile` in time.
    """

    shape: Shape
    targets: tuple[str, ...]
    rows: int
    length: int | None
    traced: bool = True

    def build(self, tiny: bool, device: str, dtype: torch.dtype) -> nn.Module:
        """Return the frozen model; its weights are drawn on the device, which takes a GPU no time."""
        changes = {"n_layer": 1} if tiny and self is SUBJECTS["gpt2"] else {}  # which is traced many times
        with torch.device(device):
            return self.shape.build(tiny=tiny, device=device, dtype=dtype, **changes)


LLAMA = Shape("LLaMA-1B's shape (transformers)", _llama, 64, "keys and values")
MAMBA_SSM = _MambaSSM("mamba-130m's shape (mamba_ssm)", _mamba_ssm, 64, "states")
OF_MAMBA = ("in_proj", "x_proj")
SUBJECTS = {
    "gpt2": Subject(SHAPES["gpt2"], ("c_attn",), 16, 512),
    "llama": Subject(LLAMA, ("q_proj", "v_proj"), 4, 512),
    "vit": Subject(SHAPES["vit"], ("qkv",), 64, None),
    "mamba": Subject(SHAPES["mamba"], OF_MAMBA, 4, 64, False),  # without kernels transformers walks step by step
    "mamba-kernels": Subject(SHAPES["mamba"], OF_MAMBA, 8, 512, False),
    "mamba_ssm": Subject(MAMBA_SSM, OF_MAMBA, 8, 512, False),
}


def small(kind: str, device: str = "cpu", dtype: torch.dtype = torch.float32, quick: bool = False) -> nn.Module:
    """Return a small frozen model of transformers in evaluation mode, without dropout; the same weights each time.

    Args:
        kind: gpt2, llama, vit, mamba or mamba2.
        device: where.
        dtype: of the weights.
        quick: whether it is tiny.
    """
    import transformers as t

    width, heads, blocks = (32, 2, 2) if quick else (256, 4, 3)
    size = {"hidden_size": width, "num_hidden_layers": blocks}
    attention = {**size, "num_attention_heads": heads, "intermediate_size": 2 * width}
    text = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    gpt2 = {"n_embd": width, "n_layer": blocks, "n_head": heads, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    picture = {"image_size": 32, "patch_size": 8, "num_labels": 5, "hidden_dropout_prob": 0.0}
    head = {"head_dim": width // 4, "num_heads": 8, "n_groups": 1, "chunk_size": 8, "state_size": 16}
    name, config = {
        "gpt2": ("GPT2Config GPT2LMHeadModel", {**text, **gpt2}),
        "llama": ("LlamaConfig LlamaForCausalLM", {**text, **attention}),
        "vit": ("ViTConfig ViTForImageClassification", {**picture, **attention}),
        "mamba": ("MambaConfig MambaForCausalLM", {**text, **size}),
        "mamba2": ("Mamba2Config Mamba2ForCausalLM", {**text, **size, **head}),
    }[kind]
    names = name.split()  # by name, so that only one family is imported
    torch.manual_seed(0)
    return getattr(t, names[1])(getattr(t, names[0])(**config)).to(device, dtype).eval().requires_grad_(False)
