"""Residual ConvNets: which blocks pass the stream on, and how it looks in memory."""

import copy
import functools

import pytest
import torch
from torch import nn

import residual_steer as rs
from cases import RANK, TABLE, closed_form, randomise, steered
from residual_steer.recording import record

NAMES = ["timm-resnet", "timm-mobilenet", "hf-convnext"]


def others():
    """Models whose blocks tell of their skips in other ways."""
    timm, transformers = pytest.importorskip("timm.models"), pytest.importorskip("transformers")
    from timm.models.regnet import RegNetCfg

    shape = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [2, 2]}
    yield timm.resnetv2.ResNetV2([2, 2], [128, 256], stem_chs=32, num_classes=3)
    yield timm.regnet.RegNet(RegNetCfg(depth=8, w0=8, wa=16.0, wm=2.0, group_size=4), num_classes=3)
    yield timm.convnext.ConvNeXt(depths=(1, 2, 1, 1), dims=(8, 12, 16, 20), num_classes=3)
    yield transformers.ResNetModel(transformers.ResNetConfig(**shape, layer_type="basic"))
    yield transformers.RegNetModel(transformers.RegNetConfig(**shape, groups_width=4))
    yield transformers.BitModel(transformers.BitConfig(embedding_size=32, hidden_sizes=[128, 256], depths=[2, 2]))
    yield transformers.ConvNextV2Model(transformers.ConvNextV2Config(hidden_sizes=[8, 12], depths=[2, 1], num_stages=2))
    yield transformers.MobileNetV2Model(transformers.MobileNetV2Config(depth_multiplier=0.25))
    yield transformers.EfficientNetModel(transformers.EfficientNetConfig(width_coefficient=0.1, hidden_dim=128))


def silenced(block):
    """Return a copy of a block that computes nothing: every weight and bias is zero, so that only its skip is left."""
    block = copy.deepcopy(block)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    return block


@torch.no_grad()
def test_the_blocks_are_those_that_pass_on_what_they_get():
    """A block whose weights are zero gives its input, or what its last activation makes of it, if it has a skip."""
    for model in (*(TABLE[name].build() for name in NAMES), *others()):
        backbone = rs.find_backbone(model.eval())
        kinds = {type(block) for block in backbone.blocks}
        modules = {module: module for module in model.modules() if type(module) in kinds}
        with record(modules) as seen:
            model(torch.randn(1, 3, 64, 64))
        passed = {module: (silenced(module)(z.abs()), z.abs()) for module, z in seen.entering.items()}
        chosen = [module for module in modules if torch.equal(*passed[module])]
        assert [id(block) for block in chosen] == [id(block) for block in backbone.blocks], type(model)
        assert backbone.widths == tuple(seen.entering[block].shape[1] for block in backbone.blocks), type(model)


@torch.no_grad()
def test_they_are_steered_without_a_change_at_first_and_moved_then():
    image = torch.randn(2, 3, 64, 64)
    for model in others():
        run = functools.partial(lambda model: getattr(out := model(image), "last_hidden_state", out), model.eval())
        expected = run()
        rs.steer(model.requires_grad_(False), rank=2)
        assert torch.equal(run(), expected), type(model)
        randomise(model)
        assert not torch.equal(run(), expected), type(model)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_stream_with_its_channels_last_in_memory_stays_so(name):
    case, model = steered(name)
    image = next(iter(case.inputs(model).values()))
    expected = model(image)
    with record(model) as seen:
        actual = model.to(memory_format=torch.channels_last)(image.to(memory_format=torch.channels_last))
    expected, actual = (getattr(output, "logits", output) for output in (expected, actual))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    if name != "hf-convnext":  # which permutes its stream itself
        assert seen.leaving[0].is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_torchvisions_resnet_overwrites_its_own_tensors_and_not_its_input():
    models = pytest.importorskip("torchvision.models", exc_type=ImportError)
    model = models.resnet18(num_classes=3).eval().requires_grad_(False)
    image = torch.randn(2, 3, 32, 32)
    frozen = copy.deepcopy(model)
    rs.steer(model, rank=RANK)
    assert torch.equal(model(image), frozen(image))
    backbone = rs.find_backbone(frozen)
    assert backbone.widths == (64, 64, 128, 256, 512)
    randomise(model, std=0.1)
    with record(model) as seen:
        model(image)
    block, z = model.layer1[1], seen.entering[1]
    move = closed_form(block.steering_block.fields["default"], z)
    torch.testing.assert_close(seen.leaving[1].double(), frozen.layer1[1](z).double() + move, rtol=0, atol=1e-4)


def test_the_width_of_blocks_whose_convolutions_read_half_of_the_stream():
    from timm.models.resnet import ResNet
    from timm.models.sknet import SelectiveKernelBasic

    shape = {"channels": (8, 8, 12, 12), "num_classes": 3, "block_args": {"sk_kwargs": {"rd_ratio": 1}}}
    model = ResNet(SelectiveKernelBasic, (2, 1, 1, 1), **shape)
    assert rs.find_backbone(model).widths == (8,)
    rs.steer(model.eval(), rank=2)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_a_convnet_without_skips_has_nothing_to_steer():
    from timm.models.resnet import BasicBlock, ResNet

    with pytest.raises(rs.SteerError, match=r"no residual stream.*'resnet' describes timm.*`blocks` is empty"):
        rs.steer(ResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 16, 24, 32), num_classes=3))


def test_a_field_beside_a_block_is_a_pair_of_one_by_one_convolutions():
    case, model = steered("timm-resnet")
    field = case.modules(model, "block")[0].steering_block.fields["default"]
    down, up = nn.Conv2d(16, RANK, 1), nn.Conv2d(RANK, 16, 1)
    for conv, linear in ((down, field.down), (up, field.up)):
        conv.weight.data, conv.bias.data = linear.weight.data[:, :, None, None], linear.bias.data
    z = torch.randn(2, 16, 5, 5)
    torch.testing.assert_close(field(z), up(torch.nn.functional.gelu(down(z))), rtol=0, atol=1e-5)
