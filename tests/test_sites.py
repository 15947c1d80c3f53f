"""The sites beside those of the contract: `after`, linear maps inside a mixer or mlp, and several for one field."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import residual_steer as rs
from cases import CASES, RANK, TABLE, closed_form, first_output, first_tensor, randomise
from fields import shake
from residual_steer._calls import running
from residual_steer._controller import steering_of
from test_contract import close, recorded

SCALE = 0.7
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# one of each kind: tensors and tuples, a pair whose sum is the stream, channels first, two stacks, a hybrid, a scan
SOME = ["gpt2", "hf-vit", "mamba", "mamba_ssm-2", "t5", "jamba"]
some_cases = pytest.mark.parametrize("case", [TABLE[name] for name in SOME], ids=SOME)


@functools.cache
def called(name):
    """Return the linear maps of a case that its blocks call."""
    case, seen = TABLE[name], set()
    model = case.build()
    backbone = rs.find_backbone(model)
    modules = {(s, i): backbone.point(i, s) for s in backbone.projections for i in range(len(backbone.blocks))}
    for module in {m for m in modules.values() if m is not None}:
        # but for those of tables of positions, which have no batch
        module.register_forward_hook(lambda module, args, _: seen.add(module) if len(args[0]) > 1 else None)
    case.run(model)
    silent = {site for (site, _), module in modules.items() if module is not None and module not in seen}
    return [site for site in backbone.projections if site not in silent]


def ranks(case, model):
    """Return the ranks of a field after all blocks, at the first linear map of each part, and in front of the mixer."""
    backbone = rs.find_backbone(model)
    firsts = [next((s for s in called(case.name) if s.startswith(part)), None) for part in ("mixer", "mlp")]
    sites = ["after", *(["input"] if "input" in backbone.sites else ["block"]), *filter(None, firsts)]
    table = {}
    for site in sites:
        points = {i: backbone.point(i, site) for i in range(len(backbone.blocks))}
        unique = {id(point): i for i, point in reversed(points.items()) if point is not None}
        wide = {i: min(RANK, *backbone.features(i, site)) for i in sorted(unique.values())}
        table[site] = {i: rank for i, rank in wide.items() if rank > 0}
    return table


def steered(case, training=False, **more):
    """Return a model with one random field at several sites."""
    model = case.build().train(training)
    table = ranks(case, model)
    return randomise(rs.steer(model, rank=table, site=[*table], scale=SCALE, **more))


@every_case
def test_a_field_at_every_other_site_keeps_the_contract(case, tmp_path):
    expected, frozen = case.run(case.build()), case.build()
    model, table = case.build(), ranks(case, frozen)
    rs.steer(model, rank=table, site=[*table], scale=SCALE, train=case.head)
    assert torch.equal(case.run(model), expected)

    rs.steer(randomise(model), rank=RANK, site="after", scale=SCALE, name="law")
    shake(model, "law")
    blocks, twins = (each.blocks for each in (rs.find_backbone(model), rs.find_backbone(frozen)))
    with torch.no_grad(), recorded(blocks) as calls:
        case.run(model)
    for index, (twin, call) in enumerate(zip(twins, calls, strict=True)):
        before = case.leave(twin(*call["entered"][0], **call["entered"][1]))
        field = steering_of(model)[1].fields("law")["after", index]
        close(case.leave(call["left"]), before.double() + SCALE * closed_form(field, before))
    rs.unsteer(model, "law")
    rs.use(model, "default")

    spec, fields = rs.fields(model)[0], steering_of(model)[1].fields("default")
    assert spec.parameters == sum(p.numel() for field in fields.values() for p in field.parameters())
    backbone, plain = rs.find_backbone(model), rs.find_backbone(frozen)
    places = list(fields)
    with torch.no_grad(), recorded([backbone.point(i, site) for site, i in places]) as calls:
        actual = case.run(model)
    for (site, index), call in zip(places, calls, strict=True):
        twin = plain.point(index, site)
        if site in ("after", "block"):  # what leaves has passed more fields than one
            continue
        field = fields[site, index]
        args, kwargs = call["entered"]
        z = first_tensor(args, kwargs)
        before, after = z, first_tensor(*call["reached"])
        if site != "input":
            before, after = first_output(twin(*args, **kwargs)), first_output(call["left"])
        close(after, before.double() + SCALE * closed_form(field, z))

    learn = rs.parameters(model.train())
    case.loss(model).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for field in fields.values() for p in field.parameters())
    assert {id(p) for p in model.parameters() if p.grad is not None} == {id(p) for p in learn}

    rs.save(model.eval(), tmp_path / "field")
    with torch.no_grad():
        assert torch.equal(case.run(rs.load(case.build(), tmp_path / "field")), actual)
        with rs.use(model, None):
            assert torch.equal(case.run(model), expected)
        keys = list(rs.unsteer(model).state_dict())
    assert torch.equal(case.run(model), expected)
    assert keys == list(frozen.state_dict())


@pytest.mark.parametrize("name", ["gpt2", "mamba_ssm-1", "t5"])
@torch.no_grad()
def test_what_enters_the_next_block_moved_by_the_field_of_what_left(name):
    case = TABLE[name]
    frozen, model = case.build(), shake(rs.steer(case.build(), rank=2, site="after", layers=[0], scale=SCALE))
    seen = []
    for each in (frozen, model):
        with recorded(rs.find_backbone(each).blocks[1:2]) as calls:
            case.run(each)
        seen.append(case.enter(*calls[0]["entered"]))
    field = steering_of(model)[1].fields("default")["after", 0]
    close(seen[1], seen[0].double() + SCALE * closed_form(field, seen[0]))


def test_what_is_after_a_block_acts_on_what_is_beside_it_in_whatever_order_they_came():
    case = TABLE["gpt2"]
    expected = []
    for order in (["block", "after"], ["after", "block"], None):
        model = case.build()
        if order is None:
            rs.steer(model, rank={"block": 3, "after": 2}, site=["block", "after"])
        captured = model(**case.inputs(model), output_hidden_states=True)
        for site in order or ():
            rs.steer(model, rank={"block": 3, "after": 2}[site], site=site, name=site)
        for site in ("block", "after"):
            fields = steering_of(model)[1].fields(site if order else "default")
            generator = torch.Generator().manual_seed(len(site))
            with torch.no_grad():
                for p in (p for place, field in fields.items() if place[0] == site for p in field.parameters()):
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
        if order:
            rs.use(model, dict.fromkeys(order, 1.0))
        for twin in (model, copy.deepcopy(model)):
            with torch.no_grad(), recorded([twin.transformer.h[0]]) as calls:
                found = twin(**case.inputs(model), output_hidden_states=True)
            z = first_tensor(*calls[0]["entered"])
            block = twin.transformer.h[0]
            (beside,), (behind,) = block.steering_block.fields.values(), block.steering_after.fields.values()
            frozen = case.build().transformer.h[0](*calls[0]["entered"][0], **calls[0]["entered"][1])
            left = first_output(frozen).double() + closed_form(beside, z)
            close(found.hidden_states[1], left + closed_form(behind, left))
            assert not torch.equal(found.hidden_states[1], captured.hidden_states[1])
            expected.append(found.logits)
    assert all(torch.equal(one, expected[0]) or torch.allclose(one, expected[0], atol=1e-6) for one in expected)


@pytest.mark.parametrize(
    ("name", "site"),
    [("mamba_ssm-1", "mixer.in_proj"), ("mamba_ssm-1", "mixer.dt_proj"), ("mamba", "mixer.dt_proj")],
)
def test_a_linear_map_that_is_not_called_is_an_error_and_no_silence(name, site):
    case = TABLE[name]
    model = rs.steer(case.build(), rank=1, site=site)
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(rs.SteerError, match=rf"field at '{site}' would do nothing.*'input', 'after', 'mixer'"):
            case.run(each)
    with rs.use(model, None):
        assert torch.equal(case.run(model), case.run(case.build()))
    rs.unsteer(model)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in case.modules(model, "block"))


class Attending(nn.Module):
    """A block around torch's own attention, which reads the weight of its `out_proj`."""

    def __init__(self):
        super().__init__()
        self.attn, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.fc(self.attn(x, x, x)[0])


@pytest.mark.parametrize("compiled", [False, True])
def test_torch_attention_is_refused_at_its_projection_and_steered_as_a_whole(compiled):
    model = nn.Sequential(Attending(), Attending()).eval()
    backbone = rs.Backbone(blocks=list(model), width=8, mixer="attn", mlp="fc")
    assert backbone.projections == ("mixer.out_proj",)
    rs.steer(model, backbone, rank=2, site="mixer.out_proj")
    run = torch.compile(model, backend="eager") if compiled else model
    with pytest.raises(rs.SteerError, match="would do nothing"):
        run(torch.randn(2, 3, 8))
    with pytest.raises(
        rs.SteerError, match=r"inside a mixer or mlp; those of backbone 'custom' are mixer.out_proj; rec"
    ):
        rs.steer(model, rank=2, site="mixer.in_proj", name="law")
    rs.steer(rs.unsteer(model), backbone, rank=2, site="mixer")(torch.randn(2, 3, 8))


class LengthFirst(nn.Module):
    """A batch-first block around torch's own attention as it is by default, (length, batch, width)."""

    def __init__(self, how="whole"):
        super().__init__()
        self.norm, self.attn, self.how = nn.LayerNorm(8), nn.MultiheadAttention(8, 2), how
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x):
        h = self.norm(x.transpose(0, 1))
        h = self.attn(h, h, h)[0]
        if self.how == "flat":
            h = h.flatten(0, 1)
        return x + self.mlp(h).view(x.shape[1], x.shape[0], 8).transpose(0, 1)


def in_rows(model, x, rows=("a", "b")):
    """Return what the rows of a batch get under fields of their own, and one row at a time."""
    with torch.no_grad(), rs.use(model, list(rows)):
        together = model(x)
    alone = []
    for row, name in zip(x, rows, strict=True):
        with torch.no_grad(), rs.use(model, name):
            alone.append(model(row[None])[0])
    return together, torch.stack(alone)


@pytest.mark.parametrize("length", [2, 3, 4])
@pytest.mark.parametrize(
    ("site", "how"), [("block", "whole"), ("mixer", "whole"), ("input", "whole"), ("mlp", "flat"), ("mlp.0", "whole")]
)
def test_rows_that_do_not_stand_one_after_the_other_are_refused(site, how, length):
    """Where the length is a multiple of the rows its shape looks like that of windows."""
    torch.manual_seed(0)
    model = nn.Sequential(LengthFirst(how), LengthFirst(how)).eval()
    for name in ("a", "b"):
        rs.steer(model, rs.Backbone(list(model), 8, mixer="attn", mlp="mlp"), rank=2, site=site, name=name)
    randomise(model)
    x = torch.randn(2, length, 8)
    if site == "block":
        torch.testing.assert_close(*in_rows(model, x))
        return
    if length == 4 and how == "whole" and site != "mlp.0":
        with rs.use(model, ["a", "b"]), pytest.raises(rs.SteerError, match=r"and this batch has 4|may not stand"):
            torch.compile(model, backend="eager")(x)
        torch._dynamo.reset()
    wrong = "this batch has 3" if length == 3 and how == "whole" else "do not stand one after the other"
    with pytest.raises(rs.SteerError, match=wrong):
        in_rows(model, x)


class Transposed(nn.Module):
    """Blocks that carry (length, batch, width) in a model whose batch comes first."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(8, 8), nn.Tanh())})])
        self.blocks[0].forward = lambda x: x + self.blocks[0].mlp(x)

    def forward(self, x):
        return self.blocks[0](x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("site", ["block", "mlp", "mlp.0"])
def test_rows_of_a_stream_that_begins_with_its_length_are_refused(site):
    for length in (2, 4):
        model = Transposed()
        for name in ("a", "b"):
            rs.steer(model, rs.Backbone(model.blocks, 8, mlp="mlp"), rank=2, site=site, name=name)
        with pytest.raises(rs.SteerError, match="do not stand one after the other"):
            in_rows(model, torch.randn(2, length, 8))


def test_as_many_tokens_as_rows_are_in_order_at_every_site():
    model = TABLE["gpt2"].build()
    for name, sites in (("a", ["input", "block", "mlp.c_fc"]), ("b", ["mixer", "mlp", "after", "mixer.c_attn"])):
        rs.steer(model, rank=8, site=sites, name=name)
    randomise(model)
    ids = torch.full((2, 2), 5)
    with rs.use(model, ["a", "b"]):
        rs.thaw(model, "a")  # so that the cache is a part of the graph
        together = model(ids, use_cache=True).logits.detach()
    for row, name in enumerate(("a", "b")):
        with torch.no_grad(), rs.use(model, name):
            torch.testing.assert_close(together[row], model(ids[row : row + 1]).logits[0], rtol=1e-4, atol=1e-4)


def test_layers_of_torch_that_carry_their_length_in_front_have_no_rows():
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False).eval()
    rs.steer(layers, rs.Backbone(layers.layers, 8), rank=2, name="a")
    with pytest.raises(rs.SteerError, match=r"carry \(length, batch, width\)"):
        rs.use(layers, ["a", None])


def test_frames_that_are_folded_into_rows_keep_their_order_as_many_as_they_are():
    """Folded, (batch · frames, tokens, width), a part of a block may have as many tokens as the batch has rows."""

    class Folded(LengthFirst):
        def forward(self, x):
            h = x.unflatten(1, (2, -1)).flatten(0, 1)
            return x + self.mlp(h).view_as(x)

    torch.manual_seed(0)
    model = nn.Sequential(Folded(), Folded()).eval()
    for name in ("a", "b"):
        rs.steer(model, rs.Backbone(list(model), 8, mlp="mlp"), rank=2, site="mlp", name=name)
    randomise(model)
    torch.testing.assert_close(*in_rows(model, torch.randn(2, 4, 8)))


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 2), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))


def test_experts_see_some_tokens_each_and_are_no_site():
    model = nn.Sequential(nn.ModuleDict({"mlp": Expert()}))
    backbone = rs.Backbone(blocks=list(model), width=8, mlp="mlp")
    assert backbone.projections == ("mlp.gate",)
    with pytest.raises(rs.SteerError, match=r"are mlp.gate; received 'mlp.experts.0'. Experts"):
        rs.steer(model, backbone, site="mlp.experts.0")


@torch.no_grad()
def test_one_field_at_several_sites_is_several_fields_side_by_side():
    case, sites = TABLE["gpt2"], ["input", "mlp.c_fc", "after"]
    one, many = case.build(), case.build()
    shake(rs.steer(one, rank=7, site=sites, scale=SCALE))
    own = steering_of(one)[1].fields("default")
    for site in sites:
        rs.steer(many, rank=own[site, 0].rank, site=site, name=site.replace(".", "-"), scale=SCALE)
        for place, field in steering_of(many)[1].fields(site.replace(".", "-")).items():
            field.load_state_dict(own[place].state_dict())
    rs.use(many, dict.fromkeys([field.name for field in rs.fields(many)], 1.0))
    assert torch.equal(case.run(one), case.run(many))


@some_cases
def test_what_runs_a_model_otherwise_runs_every_site(case):
    model = steered(case)
    with torch.no_grad():
        expected = case.run(model)
        for twin in (copy.deepcopy(model), *(() if case.pickle_fails else (pickle.loads(pickle.dumps(model)),))):
            assert torch.equal(case.run(twin), expected)
            rs.unsteer(twin)
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules() if isinstance(m, nn.Linear))
        if case.name == "gpt2":
            torch._dynamo.reset()
            close(case.run(torch.compile(model, fullgraph=True, backend="eager")), expected)
        if case.name == "hf-vit":
            program = torch.export.export(model, (), case.inputs(model), strict=False)
            close(case.run(program.module()), expected)
        if case.generates:
            prompt, settings = case.inputs(model)["input_ids"][:, :4], {"min_new_tokens": 3, "max_new_tokens": 3}
            cached, plain = (
                model.generate(prompt, use_cache=cache, do_sample=False, **settings) for cache in (True, False)
            )
            assert torch.equal(cached, plain)
    plain, saving = (steered(case, training=True) for _ in range(2))
    for block in rs.find_backbone(saving).blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    for each in (plain, saving):
        case.loss(each).backward()
    for one, other in zip(rs.parameters(plain), rs.parameters(saving), strict=True):
        close(other.grad, one.grad)


@some_cases
@torch.no_grad()
def test_rows_have_fields_of_their_own_at_every_site(case):
    model = steered(case)
    rs.steer(model, rank=2, site="after", name="law")
    shake(model, "law")
    alone = []
    for name in ("default", "law"):
        with rs.use(model, name):
            alone.append(case.run(model))
    with rs.use(model, ["default", "law"]):
        both = case.run(model)
    half = len(both) // 2
    close(both, torch.cat([alone[0][:half], alone[1][half:]]))


class Tabled(nn.Module):
    """A mixer with a linear map of positions, whose table has not the batch's rows, though maybe as many."""

    def __init__(self, table):
        super().__init__()
        self.qkv, self.positions, self.table = nn.Linear(8, 8), nn.Linear(2, 8), torch.ones(table, 2)

    def forward(self, x):
        return self.qkv(x) + self.positions(self.table).sum(0)


@torch.no_grad()
def test_rows_of_a_table_are_not_those_of_the_batch():
    model = nn.Sequential(nn.ModuleDict({"mixer": Tabled(6)}))
    model[0].forward = lambda x: x + model[0].mixer(x)
    backbone = rs.Backbone(blocks=[model[0]], width=8, mixer="mixer")
    for name, site in (("law", "mixer.positions"), ("art", "mixer.qkv")):
        shake(rs.steer(model, backbone if name == "law" else None, site=site, rank=2, name=name), name)
    x = torch.randn(3, 4, 8)
    with (
        rs.use(model, ["law", None, None]),
        pytest.raises(rs.SteerError, match=r"calls its Linear with \(6, 8\), where they do not stand"),
    ):
        model(x)
    alone = []
    for name in ("art", None):
        with rs.use(model, name):
            alone.append(model(x))
    with rs.use(model, ["art", None, "art"]):
        close(model(x), torch.stack([alone[0][0], alone[1][1], alone[0][2]]))


def test_nothing_is_held_on_to_of_a_block_whose_part_did_not_run():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = nn.Linear(4, 4)

        def forward(self, x):
            return x * 2

    model = nn.Sequential(Skips())
    rs.steer(model, rs.Backbone(blocks=[model[0]], width=4, mixer="mixer"), rank=2, site="mixer", name="a")
    rs.steer(model, rank=2, site="mixer", name="b")
    rs.use(model, ["a", "b"])
    model(torch.randn(2, 3, 4))
    assert not running.blocks
