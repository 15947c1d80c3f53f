"""The description of a backbone, and how a stream is read from a call and written to an output."""

import copy
from collections import namedtuple

import pytest
import torch
from torch import nn

import residual_steer as rs
from residual_steer.backbone import blocks_at, first_of, parts, read_stream, replace_stream, write_stream
from residual_steer.field import HRes
from streams import ConvBlock

Pair = namedtuple("Pair", ["hidden", "weights"])
Z = torch.randn(2, 3, 4)


def linears(count=2, width=4):
    return nn.ModuleList(nn.Linear(width, width) for _ in range(count))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((Z,), {}),
        ((Z, torch.zeros(1)), {}),
        ((None, Z), {"mask": None}),
        ((), {"hidden_states": Z}),
        ((3,), {"x": 1, "hidden_states": Z}),
    ],
)
def test_read_and_replace_a_call(args, kwargs):
    assert read_stream(args, kwargs) is Z
    before = dict(kwargs)
    new_args, new_kwargs = replace_stream(args, kwargs, lambda z: z + 1)
    assert torch.equal(read_stream(new_args, new_kwargs), Z + 1)
    assert [a for a in new_args if not torch.is_tensor(a)] == [a for a in args if not torch.is_tensor(a)]
    assert new_kwargs.keys() == before.keys()
    assert kwargs == before


def test_a_call_without_a_stream_says_what_it_had():
    with pytest.raises(rs.SteerError, match=r"first positional tensor.*this call had \(NoneType, x=\)"):
        read_stream((None,), {"x": Z})


@pytest.mark.parametrize(
    "output", [Z, (Z,), (Z, None, 3), [Z, 1], Pair(Z, "w")], ids=["tensor", "one", "tuple", "list", "named"]
)
def test_write_an_output(output):
    written = write_stream(output, lambda z: z + 1)
    assert type(written) is type(output)
    stream = written if isinstance(written, torch.Tensor) else written[0]
    assert torch.equal(stream, Z + 1)
    if not isinstance(output, torch.Tensor):
        assert list(written[1:]) == list(output[1:])
        assert output[0] is Z


@pytest.mark.parametrize("output", [{"hidden": Z}, (), (None, Z), "text"])
def test_an_output_without_a_stream_says_what_it_is(output):
    with pytest.raises(rs.SteerError, match=f"this one returned {type(output).__name__}"):
        write_stream(output, lambda z: z)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": []}, "at least one block"),
        ({"blocks": [nn.ReLU(), 3]}, "block 1 is a int"),
        ({"width": 0}, "positive integer, or one per block .2 blocks.; received 0"),
        ({"width": (4, 4, 4)}, r"received \(4, 4, 4\)"),
        ({"width": (4, -1)}, r"received \(4, -1\)"),
        ({"channels": 2}, "`channels` is -1 .* or 1 .*; received 2"),
        (
            {"mixer": ("attn",)},
            r"`mixer` is an attribute path or None, or one per block .2 blocks.; received \('attn',\)",
        ),
        ({"mlp": ("mlp", 3)}, r"`mlp` is an attribute path .*; received \('mlp', 3\)"),
        ({"mlp": 3}, r"`mlp` is an attribute path .*; received 3"),
        ({"width": 2.0}, "`width` is a positive integer, .*; received 2.0"),
        ({"width": "ab"}, "`width` is a positive integer, .*; received 'ab'"),
        ({"width": True}, "`width` is a positive integer, .*; received True"),
    ],
)
def test_a_description_is_checked(arguments, message):
    with pytest.raises(rs.SteerError, match=message):
        rs.Backbone(**{"blocks": linears(), "width": 4, **arguments})


def test_widths_and_points():
    block = nn.ModuleDict({"attn": nn.ModuleDict({"inner": nn.Linear(4, 4)}), "mlp": nn.Identity()})
    backbone = rs.Backbone(blocks=[block, nn.Linear(4, 4)], width=(4, 8), mixer="attn.inner", mlp="mlp")
    assert backbone.widths == (4, 8)
    assert backbone.point(0, "block") is block
    assert backbone.point(0, "mixer") is backbone.point(0, "input") is block["attn"]["inner"]
    assert backbone.point(0, "mlp") is None, "an Identity is no feed-forward"
    assert backbone.point(1, "mixer") is None
    assert backbone.sites == ("block", "mixer", "input", "after")


def hybrid():
    """A list of blocks as hybrids have them: an SSM, an attention, both, and a feed-forward alone."""
    part = nn.Linear(4, 4)
    return [nn.ModuleDict(dict.fromkeys(names, part)) for names in (["mamba"], ["attn"], ["attn", "mamba"], ["mlp"])]


def test_a_path_per_block_where_they_differ():
    blocks = hybrid()
    assert parts(blocks, "mamba", "attn") == ("mamba", "attn", "mamba", None)
    assert parts(blocks, "attn", "mamba") == ("mamba", "attn", "attn", None)
    backbone = rs.Backbone(blocks=blocks, width=4, mixer=parts(blocks, "mamba", "attn"), mlp=parts(blocks, "mlp"))
    assert backbone.point(0, "mixer") is blocks[0]["mamba"]
    assert backbone.point(1, "input") is blocks[1]["attn"]
    assert [backbone.point(i, "mlp") is None for i in range(4)] == [True, True, True, False]
    assert backbone.sites == ("block", "mixer", "mlp", "input", "after")
    assert str(backbone).endswith("(mixer: .mamba, .attn; mlp: .mlp)")
    assert parts([nn.ModuleDict({"mlp": nn.Identity()})], "mlp") == (None,), "an Identity is no part"


def test_a_list_of_blocks_at_one_of_several_places():
    model = nn.ModuleDict(
        {"encoder": nn.ModuleDict({"layers": nn.ModuleList(linears())}), "h": nn.ModuleList(linears())}
    )
    assert blocks_at(model, "layers", "encoder.layers", "h") is model["encoder"]["layers"]
    assert first_of(model, "layers", "encoder.other") is None
    with pytest.raises(rs.SteerError, match="blocks of a ModuleDict were looked for at layers, blocks, and are"):
        blocks_at(model, "layers", "blocks")


def test_it_prints_as_a_short_tree():
    plain = rs.Backbone(blocks=linears(), width=4, name="toy", path="encoder")
    assert str(plain).splitlines() == [
        "toy at encoder",
        "├─ blocks: 2 × Linear",
        "├─ width:  4",
        "└─ sites:  block, after",
    ]
    changing = rs.Backbone(blocks=[nn.Sequential(nn.ReLU()), nn.ReLU()], width=(4, 8), mixer="0", channels=1)
    assert str(changing).splitlines() == [
        "unregistered at the model itself",
        "├─ blocks: 2 × Sequential, ReLU",
        "├─ width:  4 … 8 (channels first)",
        "└─ sites:  block, mixer, input, after  (mixer: .0)",
    ]


class MixingBlock(ConvBlock):
    """A convolution and a feed-forward, channels first."""

    def __init__(self, width):
        super().__init__(width)
        self.mlp = nn.Conv2d(width, width, 1)

    def forward(self, z):
        return z + self.mlp(torch.relu(self.conv(z)))


class TwoWidths(nn.Sequential):
    """Two stages of different widths, the stream channels first."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 6, 2, 2), MixingBlock(6), nn.Conv2d(6, 8, 1), MixingBlock(8), nn.Flatten(2))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return super().forward(x).mean(1)


@pytest.mark.parametrize("site", ["block", "mixer", "mlp", "input"])
def test_a_convnet_of_changing_width_works_from_end_to_end(site, tmp_path):
    @rs.register_backbone("convnet", matches=["test_backbone.TwoWidths"])
    def convnet(model):
        return rs.Backbone(blocks=[model[1], model[3]], width=(6, 8), mixer="conv", mlp="mlp", channels=1)

    frozen, x = TwoWidths().requires_grad_(False), torch.randn(2, 3, 8, 8)
    expected = frozen(x)
    model = rs.steer(copy.deepcopy(frozen), rank={0: 2, 1: 3}, site=site, train="head")
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    optimizer = torch.optim.SGD(rs.parameters(model), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 1])).backward()
        optimizer.step()
    fields = [module for module in model.modules() if isinstance(module, HRes)]
    assert [(field.width, field.rank) for field in fields] == [(6, 2), (8, 3)]
    assert all(p.grad.count_nonzero() for field in fields for p in field.parameters())
    assert not torch.equal(model(x), expected)
    rs.save(model, tmp_path / "field")
    assert torch.equal(rs.load(frozen, tmp_path / "field")(x), model(x))


@pytest.mark.parametrize("name", ["ParallelThingsBlock", "ParallelScalingBlock"])
def test_timms_parallel_blocks_are_steered_as_whole_blocks(name):
    from timm.models import vision_transformer

    model = vision_transformer.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, block_fn=getattr(vision_transformer, name)
    )
    model.eval().requires_grad_(False)
    images = torch.randn(2, 3, 8, 8)
    frozen = model(images)
    assert "block" in rs.find_backbone(model).sites
    assert torch.equal(rs.steer(model, rank=2)(images), frozen)
    with pytest.raises(rs.SteerError, match="received 'mixer'"):
        rs.steer(model, name="other", site="mixer")
