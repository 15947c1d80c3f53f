"""Other ways to adapt a frozen model, under the same loop: what H-Res is compared with.

    model = residual_steer.baselines.apply(model, "lora", rank=8, train="classifier")
    residual_steer.fit(model, train, valid, steps=500)

| method | what trains | options |
| --- | --- | --- |
| `hres` | H-Res, arXiv 2606.24396 | those of `steer` |
| `adaptformer` | a bottleneck beside the MLP, λ = 0.1 (arXiv 2205.13535) | `rank`, `scale`, `dropout`, `layers` |
| `parallel-adapter` | the same, λ = 4, beside a mixer without MLP (2110.04366) | `rank`, `scale`, `dropout`, `layers` |
| `lora` | low-rank updates, by PEFT (2106.09685) | `rank`, `alpha`, `dropout`, `layers`, `targets`, `dora` |
| `prompt` | vectors before the embedded text (2104.08691) | `length` |
| `prefix` | keys and values in every attention layer (2101.00190) | `length` |
| `vpt-shallow` | tokens in the stream, from the first block on (2203.12119) | `length` |
| `vpt-deep` | tokens in the stream, others at every block (2203.12119) | `length` |
| `ssf` | scale and shift after norms and linear layers (2210.08823) | `layers` |
| `bitfit` | biases (2106.10199) | – |
| `linear` | the head | – |
| `full` | everything | – |

A method that makes no sense on a backbone says why: prompts are for language models, prefixes for those with
attention, VPT for ViTs and Mambas. VPT's tokens stand behind CLS and its like, prompts behind padding on the left;
outputs are those of the image or text alone, but hidden states between the blocks have the tokens of `vpt-shallow`.

LoRA's update is alpha/rank · B·A, with `alpha=None` B·A; `dora` is DoRA (2402.09353); `merge` folds it into the
weights. `targets` are names or globs of linear layers inside the blocks; None is the joint projection of attention, or
queries and values, or `in_proj` and `x_proj`, or else all of the mixer's. In blocks without any, as of a ResNet, they
are the 1 × 1 convolutions, which are linear maps of the channels. Layers whose weight a model reads without calling
them are left out, since nothing would train there: `dt_proj` of Mamba; `in_proj` of `mamba_ssm`'s Mamba-1, and all its
other layers while it takes its fused path; `x_proj` in transformers' Mamba where the kernels are installed; `qkv` of
timm's EVA, unless its `qkv_bias_separate` is set. The first training step checks the rest.
"""

from ._methods import apply, merge, methods

__all__ = ["apply", "merge", "methods"]
