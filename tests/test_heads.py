"""What fields train along: each field's own tensors, gradients and statistics, whatever is selected when."""

import copy
import re

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import prune

import residual_steer as rs
from cases import TABLE, VOCABULARY, randomise
from fields import assert_as, snapshot
from residual_steer.injector import Injector
from runs import fit

VIT, GPT2 = TABLE["timm-vit"], TABLE["gpt2"]
FIELDS = ("law", "art")


def two(case, model=None, train=(), names=FIELDS):
    """Return a model with a field of each name, all with random weights; the last one is selected."""
    model = case.build() if model is None else model
    for name in names:
        rs.steer(model, rank=2, name=name, train=train)
    return randomise(model)


@torch.no_grad()
def shifted(model, key, **moves):
    """Move each field's own tensor, by a number or, where that is None, at random."""
    for seed, (name, by) in enumerate(moves.items()):
        rs.use(model, name)
        tensor = model.get_parameter(key)
        tensor += torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)) if by is None else by
    return model


@torch.no_grad()
def check_rows(case, model, rows=("art", "law")):
    """Check that every row gets what its field gives it alone."""
    alone = {}
    for name in rows:
        rs.use(model, name)
        alone[name] = case.run(model)
    rs.use(model, list(rows))
    for place, (name, row) in enumerate(zip(rows, case.run(model), strict=True)):
        torch.testing.assert_close(row, alone[name][place], rtol=1e-5, atol=1e-5)


def test_every_field_has_a_head_with_gradient_and_optimizer_state_of_its_own():
    """Both losses are backed up before either optimizer steps."""
    model = two(VIT, train="head")
    heads = {name: rs.parameters(model, name)[-1] for name in FIELDS}
    assert heads["law"] is not heads["art"]
    optimizer = torch.optim.AdamW([p for name in heads for p in rs.parameters(model, name)], lr=0.1)
    before = {name: [p.detach().clone() for p in rs.parameters(model, name)] for name in heads}
    gradients = {}
    for factor, name in enumerate(heads, start=1):
        with rs.use(model, name):
            (factor * VIT.loss(model)).backward()
        gradients[name] = heads[name].grad.clone()
    assert not torch.equal(gradients["law"], gradients["art"])
    rs.use(model, None)
    base = VIT.build().head.bias
    optimizer.step()
    assert torch.equal(model.head.bias, base)
    for name in heads:
        assert torch.equal(heads[name].grad, gradients[name])
        assert not any(torch.equal(x, y) for x, y in zip(before[name], rs.parameters(model, name), strict=True))
        rs.use(model, name)
        assert model.head.bias is heads[name]
        rs.freeze(model)
        assert not any(p.requires_grad for p in model.parameters())
        rs.thaw(model)
        assert model.head.bias.requires_grad
    rs.unsteer(model)
    assert torch.equal(model.head.bias, base)


def test_a_field_that_trains_no_head_acts_with_the_original_one():
    model = shifted(two(VIT, train="head", names=["law"]), "head.weight", law=1)
    rs.steer(model, rank=4, name="art")
    assert torch.equal(model.head.weight, VIT.build().head.weight)
    assert not model.head.weight.requires_grad


def test_what_changes_while_the_base_is_in_place_is_the_bases():
    model = two(VIT, train="head")
    rs.use(model, None)
    for value in (5, 9):
        changed = {**VIT.build().state_dict(), "head.weight": torch.full((3, 16), float(value))}
        model.load_state_dict(changed, strict=False)
        with rs.use(model, "law"):
            assert not (model.head.weight == value).any()
        assert (model.head.weight == value).all()
    model.head = nn.Linear(16, 3)
    new = model.head.weight.detach().clone()
    with rs.use(model, "art"):
        assert not torch.equal(model.head.weight, new)
    assert torch.equal(model.head.weight, new)
    rs.unsteer(model)
    assert torch.equal(model.head.weight, new)


def test_weights_sum_what_the_heads_learned():
    """Task arithmetic (arXiv 2212.04089): base + Σ w·(head of the field - base)."""
    model = shifted(two(VIT, train="head"), "head.weight", law=1, art=2)
    base = VIT.build().head.weight
    rs.steer(model, rank=2, name="news")
    for mix, by in (({"law": 0.5, "art": -1.0}, -1.5), ({"law": 1.0, "news": 1.0}, 1.0), ({"art": 2}, 4), ({}, 0)):
        rs.use(model, mix)
        torch.testing.assert_close(model.head.weight, base + by)
        assert not model.head.weight.requires_grad
    rs.use(model, {"law": 1.0, "news": 1.0})
    exact = model.head.weight.detach().clone()
    rs.use(model, "law")
    assert torch.equal(model.head.weight, exact)
    rs.use(model, None)
    assert torch.equal(model.head.weight, base)


def test_a_head_trains_in_a_mix_where_it_is_the_only_one():
    model = two(VIT, two(VIT, names=["law"]), train="head", names=["new"])
    rs.use(model, {"law": 1, "new": 1})
    rs.thaw(model, "new")
    head = rs.parameters(model, "new")[-1]
    assert model.head.bias is head
    before = head.detach().clone()
    fit(model, [(torch.randn(4, 3, 16, 16), torch.arange(4) % 3)], steps=2, lr=0.1)
    assert not torch.equal(head, before)


BOTH = ["lm_head", "transformer.wte"]


@pytest.mark.parametrize(
    ("law", "art"), [(BOTH, "transformer.wte"), (BOTH, "lm_head"), ("transformer.wte", "lm_head")], ids=str
)
def test_a_tied_tensor_is_one_under_either_name(law, art):
    model = GPT2.build()
    tied, base = model.lm_head.weight, model.lm_head.weight.detach().clone()
    for name, by, train in (("law", 1, law), ("art", 10, art)):
        rs.steer(model, rank=2, name=name, train=train)
        assert model.lm_head.weight.requires_grad
        assert sum(p.shape == (VOCABULARY, 16) for p in rs.parameters(model)) == 1
        shifted(model, "lm_head.weight", **{name: by})
    for mix, by in (({"law": 0.5, "art": 0.25}, 3), ("law", 1), ("art", 10), (None, 0), ({"art": -1}, -10)):
        rs.use(model, mix)
        assert model.lm_head.weight is model.transformer.wte.weight
        torch.testing.assert_close(model.lm_head.weight, base + by)
    check_rows(GPT2, model)
    rs.unsteer(model)
    assert model.lm_head.weight is model.transformer.wte.weight is tied
    assert torch.equal(tied, base)
    assert not tied.requires_grad


@pytest.mark.parametrize("opened", ["lm_head", "transformer.wpe"])
def test_rows_meet_an_embedding_at_both_its_ends_and_a_table_that_is_added_to_all(opened):
    check_rows(GPT2, shifted(two(GPT2, train=opened), f"{opened}.weight", law=None, art=None))


def normed():
    model = VIT.build()
    model.head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 3))
    torch.manual_seed(0)
    nn.init.normal_(model.head[1].weight)
    rs.steer(model, rank=2, name="law", train="head")
    model.train()
    for _ in range(5):
        model(torch.randn(8, 3, 16, 16) + 2)
    assert model.head[0].num_batches_tracked == 5
    return two(VIT, model.eval(), names=["art"])


@torch.no_grad()
def test_statistics_act_with_the_field_that_gathered_them():
    model = normed()
    for p in rs.parameters(model, "art"):
        p.zero_()
    rs.use(model, "law")
    expected, mean = VIT.run(model), model.head[0].running_mean.clone()
    rs.use(model, {"law": 1, "art": 1})
    torch.testing.assert_close(VIT.run(model), expected)
    rs.use(model, ["law", "art"])
    torch.testing.assert_close(VIT.run(model)[0], expected[0])
    rs.use(model, ["law", None])
    VIT.run(model.train())  # a batch that fields share changes nobody's
    rs.use(model.eval(), "law")
    assert torch.equal(model.head[0].running_mean, mean)
    rs.use(model, None)
    assert (model.head[0].running_mean == 0).all()
    assert model.head[0].num_batches_tracked == 0


@torch.no_grad()
def test_statistics_go_on_after_a_cast_which_replaces_them(tmp_path):
    model = normed()
    rs.use(model, "law")
    model.double().train()(torch.randn(8, 3, 16, 16).double() + 5)
    mean = model.head[0].running_mean.clone()
    rs.save(model, tmp_path, "law")
    rs.use(model, None)
    rs.use(model, "law")
    assert torch.equal(model.head[0].running_mean, mean)
    fresh = VIT.build()
    fresh.head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 3))
    assert torch.equal(rs.load(fresh, tmp_path).head[0].running_mean, mean.float())


@torch.no_grad()
def test_statistics_of_several_fields_are_not_summed_unless_they_are_equal():
    model = two(VIT, normed(), train="head", names=["new", "newer"])
    rs.use(model, {"new": 0.5, "newer": 0.5})
    assert (model.head[0].running_mean == 0).all()
    rs.use(model, "new")
    before = VIT.run(model)
    with pytest.raises(rs.SteerError, match=r"law, new have different values of head.0.running_mean"):
        rs.use(model, {"law": 0.5, "new": 0.5})
    assert rs.summary(model).acting == "new"
    assert torch.equal(VIT.run(model), before)


def test_switches_go_with_the_fields_that_need_them():
    model = VIT.build()

    def standing():
        return [name for name in ("norm", "head") if hasattr(model.get_submodule(name), "steering_rows")]

    found = []
    for name, train in (("law", ()), ("art", "head"), ("news", ["head", "norm"])):
        rs.steer(model, rank=2, name=name, train=train)
        found.append(standing())
    for name in ("news", "art"):
        rs.unsteer(model, name)
        found.append(standing())
    assert found == [[], ["head"], ["norm", "head"], ["head"], []]


SPOILT = {
    "weight norm": lambda model: torch.nn.utils.weight_norm(model.head),
    "pruned": lambda model: prune.l1_unstructured(model.head, "weight", 0.5),
    "forward": lambda model: setattr(model.head, "forward", model.head.forward),  # as accelerate's hooks do it
}


@pytest.mark.parametrize(
    ("opened", "spoil", "late"),
    [("blocks.1", None, 0), ("pos_embed", None, 0), ("blocks.0.norm1", None, 0)]
    + [("head", spoil, 0) for spoil in SPOILT]
    + [("head", "forward", 1)],
)
def test_rows_that_cannot_differ_are_refused_and_nothing_changes(opened, spoil, late):
    model = VIT.build()
    if spoil and not late:
        SPOILT[spoil](model)
    rs.steer(model, rank=2, name="law", train=opened)
    rs.steer(model, rank=2, name="art")
    if late:
        SPOILT[spoil](model)
    expected = VIT.run(randomise(model))
    with pytest.raises(rs.SteerError, match=rf"field 'law' has its own value of {opened}.*cannot differ.*by name"):
        rs.use(model, ["law", "art"])
    assert rs.summary(model).acting == "art"
    assert torch.equal(VIT.run(model), expected)
    for mix in (["art", None], ["law", "law"], {"law": 0.5, "art": 0.5}):
        rs.use(model, mix)


class Positions(nn.Module):
    """A head that is fed what has no rows: positions, or tokens picked out of the batch."""

    def __init__(self, picked):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.table, self.head, self.picked = nn.Embedding(8, 4), nn.Linear(4, 3), picked

    def forward(self, z):
        z = self.blocks[0](z + self.table(torch.arange(8)))
        return self.head(z[z[..., 0] > -9][:6]) if self.picked else z


@pytest.mark.parametrize(("picked", "opened", "kind"), [(True, "head", "Linear"), (False, "table", "Embedding")])
@torch.no_grad()
def test_what_is_not_row_by_row_is_refused(picked, opened, kind):
    model = Positions(picked)
    rs.steer(model, rs.Backbone(blocks=model.blocks, width=4), rank=2, name="law", train=opened)
    rs.steer(model, rank=2, name="art", train=opened)
    rs.use(model, list(FIELDS))
    with pytest.raises(rs.SteerError, match=rf"their own {kind}, whose output, .*, has not the batch's rows, 2"):
        model(torch.randn(2, 8, 4))
    rs.use(model, "law")
    model(torch.randn(2, 8, 4))


@torch.no_grad()
def test_a_head_whose_weight_is_taken_straight_is_noticed():
    class Direct(type(VIT.build())):
        def forward_head(self, x, pre_logits=False):
            return nn.functional.linear(self.norm(x)[:, 0], self.head.weight)

    model = VIT.build()
    model.__class__ = Direct
    VIT.run(two(VIT, model, train="head"))
    rs.use(model, list(FIELDS))
    with pytest.warns(UserWarning, match="own values of a Linear that this call did not go through"):
        VIT.run(model)


def test_heads_chosen_in_inference_mode_can_train():
    model = two(VIT, train="head", names=["law", "art", "news"])
    with torch.inference_mode():
        rs.use(model, ["law", "news"])
        rs.thaw(model, "law")
        VIT.run(model)
    VIT.loss(model).backward()
    assert all(p.grad is not None for p in rs.parameters(model, "law")[:-2])
    with torch.inference_mode():
        rs.use(model, "law")
    VIT.loss(model).backward()
    assert all(p.grad is not None for p in rs.parameters(model))


@torch.no_grad()
def test_heads_by_row_follow_casts_modes_and_copies_and_foreign_hooks_see_every_row():
    model, seen = shifted(two(VIT, train="head"), "head.weight", law=1, art=-1), []
    handle = model.head.register_forward_hook(lambda _, args, out: seen.append(out.clone()))
    rs.use(model, ["law", None])
    expected = VIT.run(model)
    assert torch.equal(torch.stack(seen), expected[None]), "once"
    handle.remove()
    twin = copy.deepcopy(model)
    rs.use(model, None)
    assert torch.equal(VIT.run(twin), expected)
    late = twin.to(torch.float64)
    torch.testing.assert_close(VIT.run(late), expected.double(), rtol=1e-5, atol=1e-5)
    assert late.head.steering_rows._twins[0][0].weight.dtype == torch.float64
    late.train()
    assert late.head.steering_rows._twins[0][0].training
    assert list(model.state_dict()) == list(twin.state_dict())


def test_rows_with_heads_compile_once_whatever_the_rows():
    model = shifted(two(VIT, train="head", names=["law", "art", "news"]), "head.weight", law=None, art=None, news=None)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for rows in (["law", "art"], ["art", None], ["news", "news"], [None, None], ["law", "news"]):
            rs.use(model, rows)
            torch.testing.assert_close(VIT.run(compiled), VIT.run(model), rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2  # one more after the first eager call has ended the watch over the blocks


def test_a_refused_or_interrupted_addition_leaves_no_trace(tmp_path, monkeypatch):
    model = two(VIT, train="head")
    rs.save(model, tmp_path)
    rs.use(model, {"law": 0.5})
    before = snapshot(model)
    for method, last in (("select", 4), ("add", 2)):
        calls, act = [], getattr(Injector, method)

        def failing(self, *args, calls=calls, act=act, last=last):
            calls.append(1)
            if len(calls) == last:
                raise KeyboardInterrupt
            return act(self, *args)

        monkeypatch.setattr(Injector, method, failing)
        with pytest.raises(KeyboardInterrupt):
            rs.steer(model, name="new", rank=2, train="head", site="mlp" if method == "add" else "block")
        monkeypatch.undo()
        assert_as(model, before)
        assert rs.summary(model).acting == {"law": 0.5}
    model.head = nn.Linear(16, 7)
    before = snapshot(model)
    for call in (lambda: rs.steer(model, name="new"), lambda: rs.load(model, tmp_path, name="new")):
        with pytest.raises(rs.SteerError):
            call()
        assert_as(model, before)
        assert [field.name for field in rs.fields(model)] == list(FIELDS)


def test_steering_and_loading_in_inference_mode(tmp_path):
    rs.save(two(VIT, train="head"), tmp_path)
    model = VIT.build()
    with torch.inference_mode():
        rs.load(model, tmp_path)
        rs.steer(model, name="new", rank=2, train="head")
        rs.use(model, "art")
    VIT.loss(model).backward()
    assert all(p.grad is not None for p in rs.parameters(model))


def test_leaving_after_an_exception_does_not_hide_it_and_says_what_was_changed():
    model = two(VIT, train="head")

    def fail():
        with rs.use(model, "law"):
            model.head = nn.Linear(16, 7)
            raise KeyError("mine")

    with pytest.warns(UserWarning, match="was not restored: the model was changed"), pytest.raises(KeyError):
        fail()
    model = two(VIT, train="head")
    with pytest.raises(rs.SteerError, match="the model was changed"), rs.use(model, "law"):
        model.head = nn.Linear(16, 7)


def test_copies_and_casts_have_heads_of_their_own():
    model = two(VIT, train="head")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.head.weight += 1
    assert not torch.equal(twin.head.weight, model.head.weight)
    for name in ("art", "law"):
        rs.use(twin, name)
        assert twin.head.weight is rs.parameters(twin, name)[-2] is not rs.parameters(model, name)[-2]
    law = rs.parameters(model, "law")[-1]
    model.double()
    rs.use(model, "law")
    assert model.head.bias is law
    assert law.dtype == torch.float64
    rs.use(model, None)
    assert model.head.bias.dtype == torch.float64
    VIT.run(model)


def test_a_model_that_was_changed_can_still_be_unsteered():
    model = two(GPT2, train="lm_head", names=["law"])
    model.resize_token_embeddings(VOCABULARY + 3)
    for call in (lambda: rs.use(model, None), lambda: rs.freeze(model)):
        with pytest.raises(rs.SteerError, match=r"lm_head.weight, which a field trains, is gone or has another shape"):
            call()
    assert not rs.fields(model)["law"].frozen
    with pytest.warns(UserWarning, match=re.escape("lm_head.weight were not put back")):
        rs.unsteer(model)
    assert not any("steering_" in name for name, _ in model.named_modules())
    model = two(GPT2)
    nn.utils.parametrizations.weight_norm(model.transformer.ln_f)
    rs.use(model, None)
    rs.unsteer(model)
