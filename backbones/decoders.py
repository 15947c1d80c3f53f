"""Decoders of text: blocks of an attention and a feed-forward, in sequence or side by side, in one list."""

from torch import nn

from residual_steer.backbone import Backbone, stacked
from residual_steer.registry import register_backbone

GPT2 = (
    "GPT2 GPTBigCode GPTJ GPTNeo GPTNeoX GPTNeoXJapanese CodeGen Bloom Falcon Mpt OpenAIGPT ImageGPT "
    "DecisionTransformerGPT2"
)
LLAMA = (
    "Apertus Arcee AriaText BioGpt BitNet Cohere Cohere2 Cohere2Moe Cwm DeepseekV2 DeepseekV3 DeepseekV32 DiffLlama "
    "Doge Dots1 Emu3Text Ernie4_5 Ernie4_5_Moe EuroBert Exaone4 ExaoneMoe FlexOlmo Gemma Gemma2 Gemma3Text Glm Glm4 "
    "Glm4Moe Glm4MoeLite GlmMoeDsa GptOss Granite GraniteMoe GraniteMoeShared Helium HunYuanDenseV1 HunYuanMoEV1 "
    "HyperCLOVAX Jais2 JetMoe Laguna Llama Llama4Text MiMoV2Flash MiniCPM3 MiniMax MiniMaxM2 Ministral Ministral3 "
    "Mistral Mistral4 Mixtral MllamaText NanoChat Nemotron OPT Olmo Olmo2 Olmo3 Olmoe Persimmon Phi Phi3 "
    "Phi4Multimodal Phimoe Qwen2 Qwen2Moe Qwen2VLText Qwen2_5_VLText Qwen3 Qwen3Moe Qwen3VLMoeText Qwen3VLText SeedOss "
    "SmolLM3 SolarOpen StableLm Starcoder2 VaultGemma XGLM Youtu"
)


@register_backbone("gpt2", matches=[f"transformers.{name}Model" for name in GPT2.split()])
def gpt2(model: nn.Module) -> Backbone:
    """Describe GPT-2 or a decoder of its time; they differ in names alone."""
    return stacked(model, "h", "layers", "blocks", mixer=("attn", "attention", "self_attention"), mlp=("mlp", "ffn"))


@register_backbone("llama", matches=[f"transformers.{name}Model" for name in LLAMA.split()])
def llama(model: nn.Module) -> Backbone:
    """Describe LLaMA or a decoder after it, wherever its norms stand; a whole mixture of experts is the feed-forward.

    OPT, XGLM and BioGPT keep the two projections of theirs in the block itself, and so have no `mlp`.
    """
    return stacked(
        model, "layers", "decoder.layers", mixer=("self_attn", "self_attention"), mlp=("mlp", "block_sparse_moe")
    )
