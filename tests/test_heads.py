"""What fields train along: each field's own tensors, gradients and statistics, whatever is selected when."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import residual_steer as rs
from cases import CASES, VOCABULARY, randomise
from residual_steer.injector import Injector
from runs import fit
from test_steering import fingerprint, same

TABLE = {case.name: case for case in CASES}
VIT, GPT2 = TABLE["timm-vit"], TABLE["gpt2"]


def two(case, model=None, **more):
    model = case.build() if model is None else model
    for name in ("law", "art"):
        rs.steer(model, rank=2, name=name, **more)
    return randomise(model)


def test_every_field_has_a_head_with_gradient_and_optimizer_state_of_its_own():
    """Both losses are backed up before either optimizer steps."""
    model = two(VIT, train="head")
    heads = {name: rs.parameters(model, name)[-1] for name in ("law", "art")}
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


def test_a_backward_pass_after_another_selection_is_refused_not_lost():
    model = two(GPT2)
    with rs.use(model, "law"):
        loss = GPT2.loss(model)
    with pytest.raises(rs.SteerError, match=r"backward\(\) reached field 'law' after a selection"):
        loss.backward()
    with rs.use(model, "law"):
        GPT2.loss(model).backward()
    assert all(p.grad is not None for p in rs.parameters(model, "law"))


def test_what_changes_while_the_base_is_in_place_is_the_bases():
    model = two(VIT, train="head")
    rs.use(model, None)
    with torch.no_grad():
        model.head.weight.fill_(5)
    with rs.use(model, "law"):
        assert not (model.head.weight == 5).any()
    assert (model.head.weight == 5).all()
    model.head = nn.Linear(16, 3)
    new = model.head.weight.detach().clone()
    with rs.use(model, "art"):
        assert not torch.equal(model.head.weight, new)
    assert torch.equal(model.head.weight, new)
    rs.unsteer(model)
    assert torch.equal(model.head.weight, new)


def test_a_state_dict_loaded_into_the_base_stays():
    model, other = two(VIT, train="head"), VIT.build()
    nn.init.constant_(other.head.weight, 9)
    rs.use(model, None)
    model.load_state_dict(other.state_dict(), strict=False)
    with rs.use(model, "law"):
        pass
    assert (model.head.weight == 9).all()


def normed():
    model = VIT.build()
    torch.manual_seed(0)
    model.head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 3))
    rs.steer(model, rank=2, name="law", train="head")
    model.train()
    for _ in range(5):
        model(torch.randn(8, 3, 16, 16) + 2)
    rs.steer(model.eval(), rank=2, name="art")
    return randomise(model)


@torch.no_grad()
def test_statistics_act_with_the_field_that_gathered_them():
    model = normed()
    with torch.no_grad():
        for p in rs.parameters(model, "art"):
            p.zero_()
    rs.use(model, "law")
    expected = VIT.run(model)
    rs.use(model, {"law": 1, "art": 1})
    torch.testing.assert_close(VIT.run(model), expected)
    rs.use(model, ["law", "art"])
    torch.testing.assert_close(VIT.run(model)[0], expected[0])
    rs.use(model, None)
    assert (model.head[0].running_mean == 0).all()


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
def test_statistics_of_several_fields_are_not_summed():
    model = normed()
    rs.steer(model, rank=2, name="new", train="head")
    before = VIT.run(model)
    with pytest.raises(rs.SteerError, match=r"law, new have different values of head.0.running_mean"):
        rs.use(model, {"law": 0.5, "new": 0.5})
    assert rs.summary(model).acting == "new"
    assert torch.equal(VIT.run(model), before)


@torch.no_grad()
def test_a_batch_that_fields_share_changes_nobodys_statistics():
    model = normed()
    rs.use(model, "law")
    mean = model.head[0].running_mean.clone()
    rs.use(model, ["law", None])
    VIT.run(model.train())
    rs.use(model, "law")
    assert torch.equal(model.head[0].running_mean, mean)


def test_a_head_trains_in_a_mix_where_it_is_the_only_one():
    model = VIT.build()
    rs.steer(model, rank=2, name="law")
    rs.steer(model, rank=2, name="new", train="head")
    rs.use(model, {"law": 1, "new": 1})
    rs.thaw(model, "new")
    head = rs.parameters(model, "new")[-1]
    assert model.head.bias is head
    before = head.detach().clone()
    data = [(torch.randn(4, 3, 16, 16), torch.arange(4) % 3)]
    fit(model, data, steps=2, lr=0.1)
    assert not torch.equal(head, before)


@torch.no_grad()
def test_a_table_of_positions_is_added_to_every_row():
    model = two(GPT2, train="transformer.wpe")
    alone = {}
    for seed, name in enumerate(("law", "art")):
        rs.use(model, name)
        torch.manual_seed(seed)
        model.transformer.wpe.weight += torch.randn_like(model.transformer.wpe.weight)
        alone[name] = GPT2.run(model)
    rs.use(model, ["art", "law"])
    mixed = GPT2.run(model)
    for place, name in enumerate(["art", "law"]):
        torch.testing.assert_close(mixed[place], alone[name][place], rtol=1e-5, atol=1e-5)


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
    @rs.register_backbone("positions", matches=[f"{__name__}.Positions"])
    def describe(model):
        return rs.Backbone(blocks=model.blocks, width=4)

    model = two(None, Positions(picked), train=opened)
    rs.use(model, ["law", "art"])
    with pytest.raises(rs.SteerError, match=rf"their own {kind}, whose output, .*, has not the batch's rows, 2"):
        model(torch.randn(2, 8, 4))
    rs.use(model, "law")
    model(torch.randn(2, 8, 4))


@pytest.mark.parametrize("way", ["weight_norm", "prune"])
def test_a_weight_that_a_hook_computes_cannot_differ_by_row(way):
    model = VIT.build()
    if way == "weight_norm":
        torch.nn.utils.weight_norm(model.head)
    else:
        prune.l1_unstructured(model.head, "weight", 0.5)
    two(VIT, model, train="head")
    with pytest.raises(rs.SteerError, match="a weight that something else computes"):
        rs.use(model, ["law", "art"])


def test_rows_with_heads_compile_once_whatever_the_rows():
    from torch._dynamo.testing import CompileCounter

    model = two(VIT, train="head")
    rs.steer(model, rank=2, name="news", train="head")
    for seed, name in enumerate(("law", "art", "news")):
        with rs.use(model, name), torch.no_grad():
            model.head.weight += torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for rows in (["law", "art"], ["art", None], ["news", "news"], [None, None], ["law", "news"]):
            rs.use(model, rows)
            torch.testing.assert_close(VIT.run(compiled), VIT.run(model), rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2  # one more after the first eager call has ended the watch over the blocks


def test_a_refused_steer_or_load_in_any_mode_leaves_no_trace(tmp_path):
    model = two(VIT, train="head")
    rs.save(model, tmp_path)
    model.head = nn.Linear(16, 7)
    before = fingerprint(model)
    for call in (lambda: rs.steer(model, name="new"), lambda: rs.load(model, tmp_path, name="new")):
        with pytest.raises(rs.SteerError):
            call()
        assert same(fingerprint(model), before)
        assert [field.name for field in rs.fields(model)] == ["law", "art"]


def test_steering_and_loading_in_inference_mode(tmp_path):
    rs.save(two(VIT, train="head"), tmp_path)
    model = VIT.build()
    with torch.inference_mode():
        rs.load(model, tmp_path)
        rs.steer(model, name="new", rank=2, train="head")
        rs.use(model, "art")
    VIT.loss(model).backward()
    assert all(p.grad is not None for p in rs.parameters(model))


def test_an_interrupted_add_is_undone(monkeypatch):
    model = two(VIT, train="head")
    rs.use(model, {"law": 0.5})
    before, acting = fingerprint(model), rs.summary(model).acting
    attach, calls = Injector.select, []

    def failing(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return attach(self, *args)

    monkeypatch.setattr(Injector, "select", failing)
    with pytest.raises(KeyboardInterrupt):
        rs.steer(model, name="new", rank=2, train="head")
    monkeypatch.undo()
    assert same(fingerprint(model), before)
    assert rs.summary(model).acting == acting
    assert [field.name for field in rs.fields(model)] == ["law", "art"]


def test_hooks_do_not_pile_up():
    model = two(VIT)
    hooks = len(model._forward_hooks), len(model._forward_pre_hooks), len(model.head._forward_hooks)
    for _ in range(3):
        rs.steer(model, name="new", rank=2, train="head")
        rs.unsteer(model, "new")
    assert (len(model._forward_hooks), len(model._forward_pre_hooks), len(model.head._forward_hooks)) == hooks


def test_leaving_after_an_exception_does_not_hide_it():
    model = two(VIT, train="head")

    def fail():
        with rs.use(model, "law"):
            model.head = nn.Linear(16, 7)
            raise KeyError("mine")

    with pytest.warns(UserWarning, match="was not restored: the model was changed"), pytest.raises(KeyError):
        fail()


def test_a_selection_that_is_entered_later_restores_what_it_found():
    model = two(VIT)
    rs.use(model, None)
    chosen = rs.use(model, "law")
    rs.use(model, "art")
    with chosen:
        assert rs.summary(model).acting == "law"
    assert rs.summary(model).acting == "art"
    assert repr(chosen) == "<selected: law>"


def test_a_copy_has_heads_of_its_own():
    model = two(VIT, train="head")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.head.weight += 1
    assert not torch.equal(twin.head.weight, model.head.weight)
    assert twin.head.weight is rs.parameters(twin, "art")[-2]
    rs.use(twin, "law")
    assert twin.head.weight is rs.parameters(twin, "law")[-2]
    assert rs.parameters(twin, "law")[-2] is not rs.parameters(model, "law")[-2]


def test_heads_that_were_away_follow_the_model():
    model = two(VIT, train="head")
    law = rs.parameters(model, "law")[-1]
    model.double()
    rs.use(model, "law")
    assert model.head.bias is law
    assert law.dtype == torch.float64
    rs.use(model, None)
    assert model.head.bias.dtype == torch.float64
    VIT.run(model)


def test_what_trains_cannot_change_under_data_parallelism():
    """The wrapper synchronises what required a gradient when it was made, and nothing else."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = two(GPT2)
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(rs.SteerError, match="what trains cannot change once a model is wrapped"):
            rs.use(wrapped, "law")
        rs.use(wrapped, "art")
        rs.use(wrapped, ["law", "art"])
    finally:
        torch.distributed.destroy_process_group()


def test_two_fields_that_train_one_tied_tensor_by_its_two_names():
    model = GPT2.build()
    tied = model.lm_head.weight
    original = tied.detach().clone()
    rs.steer(model, name="a", rank=2, train="transformer.wte")
    with torch.no_grad():
        model.transformer.wte.weight += 1
    rs.steer(model, name="b", rank=2, train="lm_head")
    for name, by in (("b", 0), ("a", 1)):
        rs.use(model, name)
        assert model.lm_head.weight is model.transformer.wte.weight
        assert torch.equal(model.lm_head.weight, original + by)
    rs.unsteer(model)
    assert model.lm_head.weight is model.transformer.wte.weight is tied
    assert torch.equal(tied, original)


def test_a_model_whose_head_was_resized_can_still_be_unsteered():
    model = rs.steer(GPT2.build(), rank=2, train="lm_head")
    model.resize_token_embeddings(VOCABULARY + 3)
    with pytest.raises(rs.SteerError, match=r"lm_head.weight, which a field trains, is gone or has another shape"):
        rs.use(model, None)
    with pytest.warns(UserWarning, match=r"lm_head.weight were not put back"):
        rs.unsteer(model)
    assert not any("steering_" in name for name, _ in model.named_modules())


def test_a_base_parameter_may_be_replaced_while_steered():
    model = rs.steer(GPT2.build(), rank=2)
    nn.utils.parametrizations.weight_norm(model.transformer.ln_f)
    rs.use(model, None)
    rs.unsteer(model)
