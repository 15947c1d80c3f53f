"""The models of the three families that baselines are held against, one by one.

What the methods do on other families follows from the rules that these have in common, and is not tested.
"""

from cases import CASES

NAMES = (
    "timm-vit", "timm-eva", "timm-deit", "hf-vit", "hf-deit", "hf-dinov2", "hf-clip", "gpt2", "gpt2-classifier",
    "mamba", "mamba2", "falcon-mamba", "mamba_ssm-1", "mamba_ssm-2",
)  # fmt: skip
HELD = [case for case in CASES if case.name in NAMES]
