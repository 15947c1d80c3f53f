"""Faults that were silent, a test for each kind: what a loop, a tool or a caller does comes out right, or is said."""

import copy
import io
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import transformers
from accelerate import cpu_offload
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import residual_steer as rs
from cases import CASES, randomise

TABLE = {case.name: case for case in CASES}
THREE = [TABLE[name] for name in ("gpt2", "timm-vit", "mamba")]
three = pytest.mark.parametrize("case", THREE, ids=lambda case: case.name)
RESNET = next(case for case in CASES if "resnet" in case.name)


def tiny(**more):
    """Return the same small GPT-2 each time."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **more})).eval()


def ids(rows=2, length=6):
    return torch.randint(3, 30, (rows, length), generator=torch.Generator().manual_seed(0))


def two(case, model=None, **more):
    model = case.build() if model is None else model
    for name in ("a", "b"):
        rs.steer(model, rank=2, name=name, **more)
    return randomise(model)


# The graph and the selection


def fresh(case):
    return rs.steer(case.build(), rank=2)


def switched(case):
    model = fresh(case)
    rs.use(model, None)
    rs.use(model, "default")
    return model


def loaded(case, folder):
    rs.save(fresh(case), folder)
    return rs.load(case.build(), folder)


def unpickled(case, _):
    file = io.BytesIO()
    torch.save(switched(case), file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assigned(case, _):
    model = switched(case)
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    return model


WAYS = {
    "fresh": lambda case, _: fresh(case),
    "switched": lambda case, _: switched(case),
    "copied": lambda case, _: copy.deepcopy(switched(case)),
    "loaded": loaded,
    "unpickled": unpickled,
    "assigned": assigned,
}


@three
@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_that_arrives_after_its_field_was_deselected_is_an_error_for_every_field(case, way, tmp_path):
    made = WAYS[way](case, tmp_path)
    for _ in range(2):
        loss = case.loss(made)
        rs.use(made, None)
        with pytest.raises(rs.SteerError, match=r"backward\(\) reached field 'default'"):
            loss.backward()
        rs.use(made, "default")
    case.loss(made).backward()
    assert all(p.grad is not None for p in rs.parameters(made))


class Recomputed(nn.Module):
    """A model whose steered blocks are recomputed, hooks and all, in `backward()`."""

    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Residual(8) for _ in range(3)])
        self.reentrant = reentrant

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mixer = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.mixer(x))


def recomputed(reentrant, site, then):
    model = Recomputed(reentrant)
    rs.steer(model, rs.Backbone(blocks=model.blocks, width=8, mixer="mixer"), rank=2, name="a", site=site)
    rs.steer(model, rank=2, name="b", site=site)
    randomise(model)
    rs.use(model, {"a": 1.0, "b": 0.5})
    rs.thaw(model, "a")
    rs.thaw(model, "b")
    x = torch.linspace(-1, 1, 2 * 5 * 8).reshape(2, 5, 8).requires_grad_(True)
    loss = model(x).square().sum()
    then(model, x)
    loss.backward()
    return [p.grad.clone() for name in ("a", "b") for p in rs.parameters(model, name)]


OTHER = {"a": 0.1, "b": 2.0}


@pytest.mark.parametrize(
    "then", [lambda m, _: rs.use(m, OTHER), lambda m, x: rs.use(m, OTHER) and m(x)], ids=["mix", "mix and pass"]
)
@pytest.mark.parametrize("site", ["block", "mixer", "input"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_uses_the_mix_of_its_forward_pass(reentrant, site, then):
    expected = recomputed(None, site, lambda *_: None)
    for actual, wanted in zip(recomputed(reentrant, site, then), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "then", [lambda m, _: rs.use(m, None), lambda m, _: rs.unsteer(m, "a")], ids=["off", "removed"]
)
def test_a_recomputation_that_cannot_be_what_it_was_is_an_error(reentrant, then):
    with pytest.raises(rs.SteerError, match=r"backward\(\) reached field|inside the `with`"):
        recomputed(reentrant, "block", then)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_with_other_trained_tensors_in_place_is_an_error(reentrant):
    def made():
        model = Recomputed(reentrant)
        described = rs.Backbone(blocks=model.blocks, width=8)
        rs.steer(model, described, rank=2, name="a", train="blocks.1.mixer")
        rs.steer(model, rank=2, name="b")
        randomise(model)
        rs.use(model, {"a": 1.0})
        rs.thaw(model, "a")
        return model, model(torch.ones(1, 2, 8, requires_grad=True)).sum()

    made()[1].backward()
    model, loss = made()
    rs.use(model, {"a": 0.5})
    with pytest.raises(rs.SteerError, match="own tensors another selection has replaced"):
        loss.backward()


def test_a_part_called_by_itself_is_recomputed_under_one_selection_alone():
    model = Recomputed(False)
    rs.steer(model, rs.Backbone(blocks=model.blocks, width=8), rank=2)
    randomise(model)
    rs.steer(model, rank=2, name="other")
    rs.use(model, {"default": 1.0})
    rs.thaw(model, "default")
    loss = checkpoint(model.blocks[0], torch.ones(1, 2, 8), use_reentrant=False).sum()
    rs.use(model, {"default": 2.0})
    with pytest.raises(rs.SteerError, match="another selection was made"):
        loss.backward()


class InPlace(Residual):
    def forward(self, x):
        x += torch.tanh(self.mixer(x))
        return x


def race(*runs):
    """Run functions at once; return what they returned, one after the other."""
    with ThreadPoolExecutor(len(runs)) as pool:
        return [future.result() for future in [pool.submit(torch.no_grad()(run)) for run in runs]]


@torch.no_grad()
def test_threads_that_run_one_model_get_their_own_streams():
    model = nn.Sequential(*[InPlace(16) for _ in range(3)])
    rs.steer(model, rs.Backbone(blocks=list(model), width=16, inplace=True), rank=4)
    randomise(model)
    streams = [torch.randn(1, 4, 16) for _ in range(4)]
    expected = [model(z.clone()) for z in streams]

    def run(z, want):
        return all(torch.allclose(model(z.clone()), want, atol=1e-5) for _ in range(100))

    assert all(race(*[partial(run, z, want) for z, want in zip(streams, expected, strict=True)]))


@torch.no_grad()
def test_threads_may_have_batches_of_several_sizes_under_heads_by_row():
    case = TABLE["gpt2-classifier"]
    model = two(case, train=case.head)
    rs.use(model, ["a", "b"])
    ids = case.inputs(model)["input_ids"][:2]
    expected = model(input_ids=ids).logits

    def fits():
        return all(torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5) for _ in range(30))

    def fails():
        for _ in range(30):
            with pytest.raises(rs.SteerError):
                model(input_ids=ids[:1])
        return True

    assert all(race(fits, fails, fits))


@dataclass
class Batch:
    words: torch.Tensor
    mask: torch.Tensor


class Task(nn.Module):
    """Hand what is nested in a batch to a language model."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, batch=None, mask=None, patches=None, words=None):
        if isinstance(batch, Batch):
            words = batch.words
        elif isinstance(batch, dict):
            words = batch["input_ids"]
        elif isinstance(batch, (list, tuple)):
            words = batch[0]
        return self.lm(input_ids=words).logits


class Opaque(Batch):
    pass


WRAPPED = {
    "dict": lambda x: ({"input_ids": x, "mask": torch.ones(1, 1, 6, 6)},),
    "list": lambda x: ([x, torch.zeros(1, 3)],),
    "dataclass": lambda x: (Batch(x, torch.ones(1, 1, 6, 6)),),
    "mask first": lambda x: (None, torch.ones(1, 1, 6, 6), None, x),
    "patches first": lambda x: (None, None, torch.ones(8, 5), x),
    "opaque": lambda x: (Opaque(x, torch.ones(1)),),
}


@pytest.mark.parametrize("way", WRAPPED)
@torch.no_grad()
def test_the_batch_is_found_wherever_it_stands(way):
    model, batch, own = two(None, Task(TABLE["gpt2"].build())), WRAPPED[way](ids(4)), {}
    for name in ("a", "b"):
        rs.use(model, name)
        own[name] = model(*batch)
    rs.use(model, ["a", "b", "b", "a"])
    mixed = model(*batch)
    for row, name in enumerate(["a", "b", "b", "a"]):
        torch.testing.assert_close(mixed[row], own[name][row])
    for names in (["a"], ["a", "b"], ["a"] * 3, ["a"] * 8):
        rs.use(model, names)

        def generate():
            return model(*batch)

        for call in (generate, lambda: model(*batch)):
            with pytest.raises(rs.SteerError, match=rf"has {len(names)} rows, and this batch has 4"):
                call()


@pytest.mark.parametrize("name", ["gpt2", "mamba", "t5"])
@torch.no_grad()
def test_a_batch_of_twice_as_many_rows_is_refused_though_generate_may_repeat_them(name):
    model = two(TABLE[name])
    rs.use(model, ["a", "b"])
    model.generate(ids(), num_beams=2, num_return_sequences=2, max_new_tokens=3, do_sample=False)
    words = {"input_ids": ids(4), "decoder_input_ids": ids(4)}
    with pytest.raises(rs.SteerError, match="has 2 rows, and this batch has 4"):
        model(**words if name == "t5" else {"input_ids": ids(4)})


def test_sentences_that_are_sorted_by_length_meet_their_own_fields(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *"abcdefgh"])}
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=20, **sizes)).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = st.SentenceTransformer(str(tmp_path), device="cpu")
    text, names, own = ["a", "a b c d e", "a b"], ["x", None, "y"], {}
    for name in ("x", "y"):
        rs.steer(model, rank=4, name=name)
    randomise(model)
    for name in ("x", "y", None):
        rs.use(model, name)
        own[name] = model.encode(text, convert_to_tensor=True)
    rs.use(model, names)
    for kind in ({"convert_to_tensor": True}, {}, {"convert_to_numpy": False}):
        mixed = model.encode(text, **kind)
        for row, name in enumerate(names):
            torch.testing.assert_close(torch.as_tensor(mixed[row]), own[name][row], rtol=0, atol=1e-5)
    assert rs.summary(model).acting == names
    with pytest.raises(rs.SteerError, match="has 3 rows, and `encode` was given 2"):
        model.encode(text[:2])
    twin = copy.deepcopy(model)
    rs.use(twin, "x")
    torch.testing.assert_close(twin.encode(text, convert_to_tensor=True), own["x"])
    rs.unsteer(model)
    assert "encode" not in model.__dict__


# What is frozen, what trains, what is saved are one set


def test_statistics_of_the_frozen_base_stay_in_a_loop_of_ones_own(tmp_path):
    base = RESNET.build().eval()
    keys = {key: value.clone() for key, value in base.state_dict().items()}
    with torch.no_grad():
        off = RESNET.run(base)
    trained = rs.steer(base, rank=2).train()
    optimizer = torch.optim.AdamW(rs.parameters(trained), lr=1e-2)
    for _ in range(3):
        RESNET.loss(trained).backward()
        optimizer.step()
    trained.eval()
    with torch.no_grad():
        on = RESNET.run(trained)
        rs.save(trained, tmp_path)
        assert torch.equal(RESNET.run(rs.load(RESNET.build().eval(), tmp_path)), on)
        with rs.use(trained, None):
            assert torch.equal(RESNET.run(trained), off)
        rs.unsteer(trained)
    assert all(torch.equal(value, keys[key]) for key, value in trained.state_dict().items())
    trained.train()
    RESNET.run(trained)
    assert any(not torch.equal(value, keys[key]) for key, value in trained.state_dict().items())  # as before steering


@pytest.mark.parametrize("kind", ["batch", "instance"])
@pytest.mark.parametrize("frozen_before", [True, False])
def test_statistics_that_a_field_trains_are_its_own_and_the_bases_come_back(kind, frozen_before):
    norm = nn.BatchNorm1d(8, momentum=0.3)
    if kind == "instance":
        norm = nn.InstanceNorm1d(8, momentum=0.3, affine=True, track_running_stats=True)

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.norm = nn.ModuleList([Residual(8)]), norm

        def forward(self, x):
            return self.norm(self.blocks[0](x).transpose(1, 2))

    model, x = Head(), torch.randn(4, 5, 8)
    model.blocks.requires_grad_(not frozen_before)  # by somebody who left the norm open
    before = {name: getattr(norm, name) for name in ("momentum", "track_running_stats")}
    off = model.eval()(x)
    rs.steer(model, rs.Backbone(blocks=model.blocks, width=8), rank=2, train="norm")
    mean = norm.running_mean.clone()
    model.train()(x + 3)
    assert not torch.equal(norm.running_mean, mean)
    rs.use(model, None)
    model(x + 3)
    assert torch.equal(norm.running_mean, mean)
    torch.testing.assert_close(model.eval()(x), off)
    rs.unsteer(model)
    assert {name: getattr(norm, name) for name in before} == before
    torch.testing.assert_close(model(x), off)


class Counting(nn.Module):
    """A block with a stored buffer of its own kind, which moves in training."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        if self.training:
            self.seen.add_(1)
        return x + self.linear(x)


def test_a_frozen_buffer_that_moves_all_the_same_is_said():
    model = nn.Sequential(Counting(), Counting())
    rs.steer(model, rs.Backbone(blocks=list(model), width=8), rank=2)
    model.train()
    with pytest.warns(UserWarning, match=r"changed 0\.seen, 1\.seen, which is frozen"):
        model(torch.ones(1, 2, 8))
    model.eval()
    model(torch.ones(1, 2, 8))


@three
def test_what_trains_and_is_not_saved_is_said(case, tmp_path):
    model = rs.steer(case.build().train(), rank=2)
    key, opened = next((k, p) for k, p in model.named_parameters() if "steering_" not in k and p.is_floating_point())
    opened.requires_grad_(True)
    with pytest.warns(UserWarning, match=rf"{key} train too, and `save` does not store"):
        case.loss(model)
    case.loss(model)  # said once
    with pytest.warns(UserWarning, match=rf"{key} require a gradient and belong to no field"):
        rs.save(model, tmp_path)
    rs.use(model, None)
    rs.use(model, "default")
    assert opened.requires_grad, "what somebody opened is theirs"


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # older PEFT, of a model without a name
@pytest.mark.parametrize("first", ["lora", "steering"])
def test_lora_and_a_field_train_together_in_both_orders(first, tmp_path):
    peft = pytest.importorskip("peft")
    case = TABLE["gpt2"]
    model = case.build()
    with torch.no_grad():
        off = case.run(model)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    if first == "lora":
        whole = peft.get_peft_model(model, config)
        rs.steer(whole, rank=2)
    else:
        rs.steer(model, rank=2)
        whole = peft.get_peft_model(model, config)
        whole.train()
        with pytest.warns(UserWarning, match="'?default'? is selected and does not train: somebody closed"):
            case.loss(whole)  # PEFT closes whatever is not its own
        rs.use(whole, "default")
    lora = [p for n, p in whole.named_parameters() if "lora_" in n]
    for _ in range(2):  # the second time after another selection
        assert all(p.requires_grad for p in lora)
        assert all(p.requires_grad for p in rs.parameters(whole, "default"))
        rs.use(whole, None)
        rs.use(whole, "default")
        rs.freeze(whole)
        rs.thaw(whole)
    whole.train()
    case.loss(whole).backward()
    assert all(p.grad is not None for p in (*lora, *rs.parameters(whole)))
    rs.save(whole, tmp_path / "field")
    whole.save_pretrained(tmp_path / "lora")
    with torch.no_grad(), rs.use(whole, None), whole.disable_adapter():
        torch.testing.assert_close(case.run(whole.eval()), off)
    rs.load(case.build(), tmp_path / "field")
    assert rs.steer(whole, rank=2, name="more") is whole
    assert len(rs.fields(whole)) == 2
    rs.unsteer(whole)
    assert all(p.requires_grad for p in lora)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("tool", ["dynamic", "torchao", "prune", "all-linear"])
def test_tools_that_convert_every_linear_leave_fields_alone(tool, tmp_path):
    case = TABLE["gpt-neox"]
    model = randomise(rs.steer(case.build(), rank=4))
    with torch.no_grad():
        before = case.run(model)
        if tool == "dynamic":
            model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        elif tool == "torchao":
            quantization = pytest.importorskip("torchao.quantization")
            quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        elif tool == "prune":
            for module in [m for m in model.modules() if isinstance(m, nn.Linear)]:
                prune.l1_unstructured(module, "weight", 0.01)
        else:
            peft = pytest.importorskip("peft")
            peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM"))
        assert (case.run(model) - before).abs().max() < 0.2 * before.abs().max()
    rs.save(model, tmp_path)
    rs.load(case.build(), tmp_path)


def test_save_refuses_what_load_would_refuse(tmp_path):
    model = fresh(TABLE["gpt2"])
    rs.save(model, tmp_path / "good")
    before = {file.name: file.read_bytes() for file in (tmp_path / "good").iterdir()}
    field = next(m for m in model.modules() if isinstance(m, rs.HRes))
    with torch.no_grad():
        field.up.weight[0, 0] = float("nan")
    with pytest.raises(rs.SteerError, match="NaN"):
        rs.save(model, tmp_path / "good")
    field.reset()
    field.down.register_parameter("extra", nn.Parameter(torch.ones(2)))
    with pytest.raises(rs.SteerError, match="left over"):
        rs.save(model, tmp_path / "good")
    assert {file.name: file.read_bytes() for file in (tmp_path / "good").iterdir()} == before


def test_a_class_that_steers_itself_starts_at_zero_after_from_pretrained(tmp_path):
    class Mine(transformers.GPT2LMHeadModel):
        def __init__(self, config):
            super().__init__(config)
            rs.steer(self.transformer, rank=4)

    base = tiny()
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        mine = Mine.from_pretrained(tmp_path / "base").eval()
        assert torch.equal(mine(ids()).logits, base(ids()).logits)
        assert all(m.down.weight.std() > 0 for m in mine.modules() if isinstance(m, rs.HRes))
        trained = randomise(mine)
        trained.save_pretrained(tmp_path / "steered")
        again = Mine.from_pretrained(tmp_path / "steered").eval()
        assert torch.equal(again(ids()).logits, trained(ids()).logits)


@three
def test_a_model_steered_on_meta_starts_at_zero_when_it_is_materialised(case):
    base = case.build()
    model = rs.steer(case.build().to("meta"), rank=2).to_empty(device="cpu")
    fields = [m for m in model.modules() if isinstance(m, rs.HRes)]
    model.load_state_dict(base.state_dict(), strict=False)
    for buffer, other in zip(model.named_buffers(), base.named_buffers(), strict=True):
        buffer[1].copy_(other[1])
    assert all(not f.up.weight.any() and f.down.weight.abs().max() <= 1 for f in fields)
    with torch.no_grad():
        torch.testing.assert_close(case.run(model.eval()), case.run(base.eval()))
    other = rs.steer(case.build().to("meta"), rank=2)
    other.load_state_dict(randomise(rs.steer(case.build(), rank=2)).state_dict(), assign=True)
    assert all(f.up.weight.any() for f in other.modules() if isinstance(f, rs.HRes))


@pytest.mark.parametrize("name", ["gpt2-classifier", "timm-vit"])
def test_a_head_beside_a_bf16_base_keeps_small_updates(name, tmp_path):
    case = TABLE[name]
    model = rs.steer(case.build("cpu", torch.bfloat16), rank=2, train=case.head)
    with torch.no_grad():
        assert torch.equal(case.run(model), case.run(case.build("cpu", torch.bfloat16)))
    inside = {id(p) for m in model.modules() if isinstance(m, rs.HRes) for p in m.parameters()}
    heads = [p for p in rs.parameters(model) if id(p) not in inside]
    assert heads
    assert all(p.dtype == torch.float32 and isinstance(p, nn.Parameter) for p in heads)
    assert {id(p) for p in heads} <= {id(p) for p in model.parameters()}
    before = [p.detach().clone() for p in heads]
    optimizer = torch.optim.SGD(heads, lr=1e-6)
    case.loss(model).backward()
    optimizer.step()
    assert all((p != q).any() for p, q in zip(heads, before, strict=True))
    with torch.no_grad():
        for p in heads:
            p += 0.5
        on = case.run(model)
        rs.save(model, tmp_path)
        assert torch.equal(case.run(rs.load(case.build("cpu", torch.bfloat16), tmp_path)), on)
        assert torch.equal(case.run(copy.deepcopy(model)), on)
        with rs.use(model, None):
            assert torch.equal(case.run(model), case.run(case.build("cpu", torch.bfloat16)))
        assert torch.equal(case.run(model), on)
        rs.steer(model, rank=2, name="b", train=case.head)
        rs.use(model, ["default", None])
        torch.testing.assert_close(case.run(model)[0], on[0], rtol=0.05, atol=0.05)
        rs.unsteer(model)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert {type(m) for m in model.modules()} == {type(m) for m in case.build().modules()}


# Where the field runs


@pytest.mark.parametrize("order", ["steer first", "offload first"])
@pytest.mark.parametrize("mix", ["default", {"default": 0.5, "b": 2.0}, ["default", "b"]])
def test_offloaded_models_are_steered_saved_and_loaded(order, mix, tmp_path):
    plain = rs.steer(rs.steer(tiny(), rank=4), rank=2, name="b")
    randomise(plain)
    rs.use(plain, mix)
    with torch.no_grad():
        want = plain(ids()).logits
    for name in ("default", "b"):
        rs.save(plain, tmp_path / name, name)
    model = tiny()
    if order == "offload first":
        cpu_offload(model, execution_device="cpu")
    for name in ("default", "b"):
        rs.load(model, tmp_path / name)
    if order == "steer first":
        cpu_offload(model, execution_device="cpu")
    rs.use(model, mix)
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, want)
    rs.save(model, tmp_path / "again", "b")
    assert (tmp_path / "again/steering.safetensors").read_bytes() == (tmp_path / "b/steering.safetensors").read_bytes()


def test_fields_stand_where_blocks_execute_and_meta_on_purpose_stays_meta():
    model = TABLE["gpt2"].build()
    cpu_offload(model, execution_device="cpu")
    rs.steer(model, rank=2)
    assert all(p.device.type == "cpu" for p in rs.parameters(model))
    with pytest.raises(rs.SteerError, match="which is to train along, is offloaded"):
        rs.steer(model, rank=2, name="b", train="lm_head")
    meta = rs.steer(TABLE["gpt2"].build().to("meta"), rank=2)
    assert all(p.is_meta for p in rs.parameters(meta))
    with pytest.raises(rs.SteerError, match="no value: it is on the meta device"):
        rs.save(meta, "nowhere")


class Eighth(nn.Module):
    """A block whose weights are stored in float8 and computed with in bf16."""

    def __init__(self, norm=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16).to(torch.float8_e4m3fn), requires_grad=False)
        self.norm = nn.LayerNorm(16, dtype=torch.bfloat16) if norm else nn.Identity()

    def forward(self, x):
        return x + self.norm(x) @ self.weight.to(x.dtype)


@pytest.mark.parametrize("norm", [True, False])
def test_a_field_computes_in_what_the_block_computes_in_not_in_what_it_is_stored_in(norm):
    model = nn.Sequential(Eighth(norm), Eighth(norm))
    x = torch.randn(2, 3, 16, dtype=torch.bfloat16 if norm else torch.float32)
    off = model(x)
    rs.steer(model, rs.Backbone(blocks=list(model), width=16), rank=2)
    assert all(p.dtype == torch.float32 for p in rs.parameters(model))
    assert torch.equal(model(x), off)
    model(x).float().sum().backward()
    assert all(p.grad is not None for p in rs.parameters(model))


def test_what_a_quantised_layer_says_it_computes_in_is_what_counts():
    from residual_steer.backbone import compute_dtype

    block = nn.Linear(4, 4)
    block.compute_dtype = torch.bfloat16  # as bitsandbytes' Linear4bit and HQQ's layer have it
    assert compute_dtype(nn.Sequential(nn.LayerNorm(4), block)) == torch.bfloat16


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_stream_is_refused_in_words():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    own = {"read": lambda args, _: args[0], "write": lambda output, f: f(output)}  # ours reads nested ones padded
    rs.steer(model, rs.Backbone(blocks=list(model), width=4, **own), rank=2)
    nested = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)])
    with pytest.raises(rs.SteerError, match=r"dense stream.*nested"):
        model(nested)


@three
def test_tracers_that_cannot_follow_hooks_say_what_can(case):
    model = randomise(rs.steer(case.build(), rank=2))
    for chosen in ("default", None):
        rs.use(model, chosen)
        with pytest.raises(rs.SteerError, match=r"torch\.jit\.script .*torch\.export"):
            torch.jit.script(model)


def test_fx_over_an_acting_field_says_what_works():
    model = nn.Sequential(Residual(8), Residual(8))
    rs.steer(model, rs.Backbone(blocks=list(model), width=8), rank=2)

    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return False

    with pytest.raises(rs.SteerError, match=r"torch\.fx .*torch\.export"):
        Leaves().trace(model)
    rs.use(model, None)
    Leaves().trace(model)


# Words


def test_ids_of_tokens_and_storage_make_no_other_backbone(tmp_path):
    rs.save(rs.steer(tiny(), rank=2), tmp_path)
    rs.load(tiny(pad_token_id=3, eos_token_id=5, bos_token_id=4, id2label={0: "x"}), tmp_path)
    with pytest.warns(UserWarning, match=r"n_head 2 against 4|layer_norm_epsilon"):
        rs.load(tiny(n_head=4), tmp_path)


def test_a_difference_inside_a_config_is_named():
    from residual_steer._format import differences

    def backbone(**config):
        return {"class": "k", "config": config}

    stored = backbone(**{"rope.theta": 1.0, "heads": 2})
    there = backbone(**{"rope.theta": 2.0, "heads": 2})
    assert differences(stored, there) == "config: rope.theta 1.0 against 2.0"
    assert not differences(stored, backbone(heads=2))


COMPILED = """
import copy, sys, torch
from transformers import GPT2Config, GPT2LMHeadModel
import residual_steer as rs
sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
config = GPT2Config(vocab_size=64, bos_token_id=0, eos_token_id=0, **sizes)
frozen = GPT2LMHeadModel(config).eval().requires_grad_(False)
x = torch.randint(0, 64, (2, 8))
def run(model):
    with torch.no_grad():
        return torch.compile(model, backend="eager")(x).logits
if sys.argv[1] == "frozen first":
    run(frozen)
steered = {"layers": [0]}, {"layers": [1]}, {}
models = [rs.steer(copy.deepcopy(frozen), rank=2, **more) for more in steered]
models.append(rs.baselines.apply(copy.deepcopy(frozen), "parallel-adapter", rank=2))
for model in models:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
run(frozen)
for model in models:
    with torch.no_grad():
        expected = model(x).logits
    torch.testing.assert_close(run(model), expected)
    assert not torch.allclose(expected, run(frozen))
"""


@pytest.mark.parametrize("order", ["frozen first", "steered first"])
def test_what_was_compiled_of_a_frozen_model_does_not_run_for_a_steered_one(order):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED, order], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
