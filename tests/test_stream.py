"""Streams that are nested tensors: in `nn.TransformerEncoder` under a padding mask, and in models of a user's own."""

import copy
import pickle

import pytest
import torch
from torch import nn

import residual_steer as rs
from cases import TABLE, randomise
from residual_steer.backbone import replace_stream
from residual_steer.stream import class_token, prefix_tokens
from streams import Block

IDS = torch.randint(30, (4, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(7) >= torch.tensor([7, 5, 7, 3])[:, None]  # where there is nothing but padding
ROWS = [torch.randn(length, 8, generator=torch.Generator().manual_seed(length)) for length in (5, 2, 3)]
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
layouts = pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)


class Padded(nn.Module):
    def __init__(self, nested=True):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.embedding, self.head = nn.Embedding(30, 16), nn.Linear(16, 4)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=nested)

    def forward(self, ids, mask=None):
        return self.head(self.encoder(self.embedding(ids), src_key_padding_mask=mask))


def steered(nested=True, **options):
    """Return a frozen model and its steered twin, both in evaluation mode."""
    torch.manual_seed(0)
    frozen = Padded(nested).eval().requires_grad_(False)
    return frozen, rs.steer(copy.deepcopy(frozen), rank=2, **options)


@torch.no_grad()
def nests(model):
    """Return whether a model's layers are given nested tensors."""
    seen = []
    handle = model.encoder.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].is_nested))
    model(IDS, MASK)
    handle.remove()
    return seen[0]


@torch.no_grad()
def test_a_padded_batch_gives_what_the_frozen_encoder_gives():
    frozen, model = steered()
    assert nests(frozen)
    assert nests(model)
    for batch in ((IDS,), (IDS, MASK)):
        expected = frozen(*batch)
        assert torch.equal(model(*batch), expected), "fresh"
        randomise(model)
        assert not torch.allclose(model(*batch), expected)
        with rs.use(model, None):
            assert torch.equal(model(*batch), expected), "off"
        rs.unsteer(model)
        assert torch.equal(model(*batch), expected)
        rs.steer(model, rank=2)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("site", ["block", "mixer", "input"])
def test_a_field_does_the_same_in_training_and_in_evaluation(site, nested):
    frozen, model = steered(nested, site=site)
    randomise(model)
    trained = model.train()(IDS, MASK)
    model.eval()
    with torch.no_grad():
        evaluated, base = model(IDS, MASK), frozen(IDS, MASK)
    for output in (evaluated, model(IDS, MASK)):  # without a gradient, and with one
        torch.testing.assert_close(output[~MASK], trained[~MASK], rtol=0, atol=1e-5)
    assert not torch.allclose(evaluated[~MASK], base[~MASK], atol=1e-2)


def test_a_gradient_goes_through_in_evaluation_mode_too():
    model = randomise(steered()[1])
    gradients = []
    for mode in (True, False):
        model.train(mode)(IDS, MASK)[~MASK].square().sum().backward()
        gradients.append([parameter.grad for parameter in rs.parameters(model)])
        assert all(gradient.abs().max() > 0 for gradient in gradients[-1])
        model.zero_grad()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_of_a_padded_batch_have_fields_of_their_own():
    frozen, model = steered()
    rs.steer(model, rank=3, name="other")
    randomise(model)
    chosen = ["default", None, "other", "other"]
    rs.use(model, chosen)
    mixed = model(IDS, MASK)
    for row, name in enumerate(chosen):
        with rs.use(model, name):
            torch.testing.assert_close(mixed[row], model(IDS, MASK)[row], rtol=0, atol=1e-5)
    assert torch.allclose(mixed[1], frozen(IDS, MASK)[1], atol=1e-5)


@torch.no_grad()
def test_copies_are_independent_and_unsteer_gives_the_encoder_back():
    _, model = steered()
    expected = randomise(model)(IDS, MASK)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS, MASK), expected)
        rs.unsteer(twin)
        assert twin.encoder.use_nested_tensor is True
    assert torch.equal(model(IDS, MASK), expected)
    assert model.encoder.use_nested_tensor is not True, "steered still"


def test_a_padded_batch_is_an_example_and_a_description_by_hand_is_prepared():
    for model in (Padded(), Padded(nested=False)):
        backbone = rs.find_backbone(model, example=(IDS, MASK))
        assert list(backbone.blocks) == list(model.encoder.layers)
        assert rs.find_backbone(model).mixer == "self_attn"
    by_hand = rs.Backbone(blocks=model.encoder.layers, width=16)
    model.encoder.use_nested_tensor = True
    randomise(rs.steer(model, by_hand, rank=2)).eval()(IDS, MASK).sum().backward()
    rs.steer(rs.unsteer(model), rs.find_backbone(model), rank=2)
    assert rs.unsteer(model).encoder.use_nested_tensor is True


def stack():
    blocks = nn.Sequential(Block(), Block())
    return randomise(rs.steer(blocks, rs.Backbone(blocks=list(blocks), width=8), rank=2))


@layouts
def test_nested_and_jagged_streams_are_moved_as_each_row_is(layout):
    model = stack()
    rs.steer(model, rank=3, name="other")
    randomise(model, std=0.5)
    for chosen in ("other", {"default": 0.5, "other": -1.0}, ["default", "other", None]):
        rs.use(model, chosen)
        nested = torch.nested.as_nested_tensor(ROWS, layout=layout)
        moved = model(nested)
        assert moved.layout is layout
        for row, z, out in zip(range(3), ROWS, moved.unbind(), strict=True):
            with rs.use(model, chosen[row] if isinstance(chosen, list) else chosen):
                torch.testing.assert_close(out, model(z[None])[0], rtol=0, atol=1e-5)
    if layout is torch.jagged:
        assert (moved + nested).shape == moved.shape, "of one ragged dimension"


@layouts
def test_a_field_learns_from_nested_rows(layout):
    model = stack()
    losses = [sum(row.square().sum() for row in model(torch.nested.as_nested_tensor(ROWS, layout=layout)).unbind())]
    losses.append(sum(model(z[None]).square().sum() for z in ROWS))
    one, other = (torch.autograd.grad(loss, rs.parameters(model)) for loss in losses)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_stream_that_is_query_key_and_value_is_replaced_as_all_three():
    z, other = torch.zeros(2, 3), torch.zeros(2, 3)
    args, kwargs = replace_stream((z, z), {"value": z, "mask": other}, lambda z: z + 1)
    assert [x.sum().item() for x in (*args, kwargs["value"], kwargs["mask"])] == [6, 6, 6, 0]
    assert args[0] is args[1] is kwargs["value"]


@pytest.mark.parametrize(
    ("name", "classed", "count"),
    [("gpt2", False, 0), ("timm-vit", True, 1), ("hf-vit", True, 1), ("hf-deit", True, 2), ("hf-swin", False, 0)],
)
def test_tokens_in_front_of_an_images_are_counted(name, classed, count):
    model = TABLE[name].build()
    assert (class_token(model), prefix_tokens(model)) == (classed, count)
    model.register_parameter("register_tokens", nn.Parameter(torch.zeros(1, 3, 8)))
    assert prefix_tokens(model) == count + (0 if name.startswith("timm") else 3), "timm counts its own"
