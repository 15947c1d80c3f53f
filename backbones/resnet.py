"""Residual ConvNets of timm, transformers and torchvision: ResNets, ConvNeXts, and the inverted residuals of MobileNet.

The stream is `(batch, channels, height, width)`, and the field beside a block is a pair of 1 × 1 convolutions, like the
parallel residual adapters of Rebuffi et al. 2018 (arXiv 1803.10082). Only blocks that add their input, unchanged, to
what they compute are described. Those that change its width or its resolution, or have no skip, pass no stream on.
"""

from torch import nn

from residual_steer.backbone import Backbone, first_of, parts
from residual_steer.registry import register_backbone

TIMM = "ResNet ResNetV2 RegNet ConvNeXt EfficientNet EfficientNetFeatures MobileNetV3 MobileNetV3Features"
TRANSFORMERS = (
    "ResNetModel ResNetBackbone RegNetModel BitModel BitBackbone ConvNextModel ConvNextBackbone ConvNextV2Model "
    "ConvNextV2Backbone EfficientNetModel MobileNetV2Model"
)
BLOCKS = (
    "BasicBlock Bottleneck Bottle2neck ResNestBottleneck SelectiveKernelBasic SelectiveKernelBottleneck PreActBasic "
    "PreActBottleneck ResNetBasicLayer ResNetBottleNeckLayer RegNetXLayer RegNetYLayer BitBottleneckLayer "
    "BitPreActivationBottleneckLayer ConvNeXtBlock ConvNextLayer ConvNextV2Layer ConvBnAct DepthwiseSeparableConv "
    "InvertedResidual UniversalInvertedResidual CondConvResidual EdgeResidual MobileAttention EfficientNetBlock "
    "MobileNetV2InvertedResidual"
)
SKIPS = ("has_skip", "use_residual", "projection.apply_dropout")  # timm's MobileNets; MobileNetV2's; EfficientNet's


@register_backbone(
    "resnet",
    matches=[
        *(f"timm.{name}" for name in TIMM.split()),
        *(f"transformers.{name}" for name in TRANSFORMERS.split()),
        "torchvision.ResNet",
    ],
)
def resnet(model: nn.Module) -> Backbone:
    """Describe the blocks with a skip, of all stages; a ConvNeXt's depthwise convolution is its mixer."""
    blocks = [module for module in model.modules() if type(module).__name__ in BLOCKS.split() and _passes_on(module)]
    depthwise = all("convnext" in type(block).__name__.lower() for block in blocks)
    mixer = parts(blocks, "conv_dw", "dwconv") if depthwise else None
    return Backbone(blocks=blocks, width=[_width(block) for block in blocks], mixer=mixer, channels=1)


def _passes_on(block: nn.Module) -> bool:
    """Return whether a block adds its input to its output as it is."""
    flag = first_of(block, *SKIPS)
    if flag is not None:
        return bool(flag)
    shortcut = first_of(block, "downsample", "shortcut")
    return shortcut is None or isinstance(shortcut, nn.Identity)


def _width(block: nn.Module) -> int:
    """Return the width of the stream: what the first convolution of a block reads."""
    last = first_of(block, "conv3.bn", "conv2.bn")
    if last is not None:  # convolutions with selective kernels read half of the stream each
        return int(last.num_features)
    return next(module.in_channels for module in block.modules() if isinstance(module, nn.Conv2d))
