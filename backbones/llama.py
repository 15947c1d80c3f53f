"""LLaMA and the decoders that followed it, dense or with experts: `layers`, each with `self_attn` and a feed-forward.

Where norms stand makes no difference: before the attention and the feed-forward (LLaMA), after them (OLMo 2), on both
sides (Gemma 2 and 3), or once for both (Cohere, Phi). The feed-forward is the whole mixture of experts where there is
one. OPT, XGLM and BioGPT keep its two projections in the block itself, and so have no `mlp`.
"""

from torch import nn

from residual_steer.backbone import Backbone, blocks_at, parts
from residual_steer.registry import register_backbone

MODELS = (
    "Apertus Arcee AriaText BioGpt BitNet Cohere Cohere2 Cohere2Moe Cwm DeepseekV2 DeepseekV3 DeepseekV32 DiffLlama "
    "Doge Dots1 Emu3Text Ernie4_5 Ernie4_5_Moe EuroBert Exaone4 ExaoneMoe FlexOlmo Gemma Gemma2 Gemma3Text Glm Glm4 "
    "Glm4Moe Glm4MoeLite GlmMoeDsa GptOss Granite GraniteMoe GraniteMoeShared Helium HunYuanDenseV1 HunYuanMoEV1 "
    "HyperCLOVAX Jais2 JetMoe Laguna Llama Llama4Text MiMoV2Flash MiniCPM3 MiniMax MiniMaxM2 Ministral Ministral3 "
    "Mistral Mistral4 Mixtral MllamaText NanoChat Nemotron OPT Olmo Olmo2 Olmo3 Olmoe Persimmon Phi Phi3 "
    "Phi4Multimodal Phimoe Qwen2 Qwen2Moe Qwen2VLText Qwen2_5_VLText Qwen3 Qwen3Moe Qwen3VLMoeText Qwen3VLText SeedOss "
    "SmolLM3 SolarOpen StableLm Starcoder2 VaultGemma XGLM Youtu"
)


@register_backbone("llama", matches=[f"transformers.{name}Model" for name in MODELS.split()])
def llama(model: nn.Module) -> Backbone:
    """Describe the stack of a decoder of transformers."""
    blocks = blocks_at(model, "layers", "decoder.layers")
    return Backbone(
        blocks=blocks,
        width=model.config.hidden_size,
        mixer=parts(blocks, "self_attn", "self_attention"),
        mlp=parts(blocks, "mlp", "block_sparse_moe"),
    )
