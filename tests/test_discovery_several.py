"""Models in which several streams run: the one that their output depends on is found, and else all are named."""

import pytest
import torch
from torch import nn

import residual_steer as rs
from residual_steer.registry import find_backbone
from streams import WIDTH, Block, Model


class Tower(Model):
    """Ids, blocks, and no head."""

    def __init__(self, depth=3):
        super().__init__(depth=depth)
        self.head = nn.Identity()


class GradientCheckpointingLayer(Block):
    """A block that is marked as transformers marks its layers."""


class Writer(nn.Module):
    """A language model that looks at pictures if there are any."""

    def __init__(self, writer=Tower, looks=False, depth=3):
        super().__init__()
        self.tower, self.writer, self.looks = Tower(depth), writer(), looks

    def forward(self, input_ids):
        z = self.writer(input_ids)
        return z + self.tower(input_ids) if self.looks else z

    def get_input_embeddings(self):
        return self.writer.embedding


class Marked(Model):
    def __init__(self):
        super().__init__(GradientCheckpointingLayer)


def register(name="tower", kind="Tower"):
    @rs.register_backbone(name, matches=[f"test_discovery_several.{kind}"])
    def describe(model):
        return rs.Backbone(blocks=model.body, width=WIDTH)


def test_of_two_registered_stacks_the_one_that_runs_is_steered():
    register()
    model = Writer()
    backbone = find_backbone(model)
    assert list(backbone.blocks) == list(model.writer.body)
    assert "not part of it: model.tower (tower)" in str(backbone)
    rs.steer(model, rank=2)
    assert not any("steering" in name for name, _ in model.tower.named_modules())


@pytest.mark.parametrize("depth", [3, 12])
def test_two_registered_stacks_that_both_run_are_named_whatever_their_sizes(depth):
    register()
    with pytest.raises(rs.SteerError, match=r"several backbones .*: model.tower \(tower\), model.writer \(tower\)"):
        find_backbone(Writer(looks=True, depth=depth))


def test_a_family_that_was_asked_for_and_is_there_twice_is_refused_without_a_run():
    register()
    with pytest.raises(rs.SteerError, match="several backbones in one model"):
        find_backbone(Writer(), "tower")


def test_a_registered_tower_in_an_unknown_model_is_not_taken_for_its_stream():
    register()
    model = Writer(Marked)
    assert list(find_backbone(model).blocks) == list(model.writer.body)
    assert find_backbone(model, "tower").path == "tower"


def test_a_registered_stack_stays_where_a_run_shows_the_same_or_several():
    register("marked", "Marked")
    beside = Writer(Marked)
    beside.tower = Model(GradientCheckpointingLayer)
    assert (find_backbone(beside).name, find_backbone(beside).path) == ("marked", "writer")
    register()
    model = nn.Sequential(Tower())
    model.aside = nn.ModuleList([GradientCheckpointingLayer(), GradientCheckpointingLayer()])
    model.forward = lambda ids: model[0](ids) * model.aside[1](model.aside[0](model[0].embedding(ids)))
    assert find_backbone(model).name == "tower"
    model.forward = lambda ids: model[0](ids, "of which it takes one")
    assert find_backbone(model).name == "tower"


@pytest.mark.parametrize(("encoder", "decoder"), [(2, 2), (5, 1)])
def test_a_registered_encoder_and_decoder_are_one_stream(encoder, decoder):
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "pad_token_id": 0}
    configs = [
        transformers.BertConfig(**shape, num_hidden_layers=depth, is_decoder=late, add_cross_attention=late)
        for depth, late in ((encoder, False), (decoder, True))
    ]
    joint = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*configs, decoder_start_token_id=1)
    model = transformers.EncoderDecoderModel(joint).eval()
    assert len(find_backbone(model).blocks) == encoder + decoder


class Lent(nn.Module):
    """As CoaT: blocks that share a residual part, which also stands outside of them."""

    def __init__(self):
        super().__init__()
        self.embedding, self.shared = nn.Embedding(11, WIDTH), nn.ModuleList(Block() for _ in range(2))
        self.body = nn.ModuleList(Borrower(self.shared[index // 2]) for index in range(4))

    def forward(self, ids):
        z = self.embedding(ids)
        for block in self.body:
            z = block(z)
        return z


class Borrower(Block):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, z):
        return super().forward(self.part(z))


def test_a_part_that_blocks_share_is_no_block():
    model = Lent()
    assert list(find_backbone(model).blocks) == list(model.body)


class Pixels(nn.Module):
    """As TNT: blocks with pixels beside patches, of which nobody reads the pixels in the end."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = Block(), nn.Linear(WIDTH, WIDTH)

        def forward(self, pixels, patches):
            pixels = self.inner(pixels)
            return pixels, patches + self.outer(pixels + patches)

    def __init__(self):
        super().__init__()
        self.embedding, self.body = nn.Embedding(11, WIDTH), nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, ids):
        pixels = patches = self.embedding(ids)
        for block in self.body:
            pixels, patches = block(pixels, patches)
        return patches


def test_what_blocks_carry_beside_the_stream_is_not_taken_for_it():
    model = Pixels().eval()
    with pytest.raises(rs.SteerError, match=r"moved, so that this is not its stream"):
        find_backbone(model)
    backbone = rs.Backbone(blocks=model.body, width=WIDTH, read=lambda args, kwargs: args[1], write=_second)
    ids = torch.arange(6).reshape(2, 3)
    frozen = model(ids)
    assert torch.equal(rs.steer(model, backbone, rank=2)(ids), frozen)


def _second(output, f):
    return output[0], f(output[1])
