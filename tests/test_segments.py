"""Rows that are tokens: packed texts, and requests of continuous batching, each as in a run of its own."""

import copy

import pytest
import torch
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

import residual_steer as rs
from residual_steer import _row_by_row
from test_mix import Block, near, pair

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SPECIAL = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "attn_implementation": "sdpa"}
TEXTS = [[5, 6, 7], [8, 9, 10, 11, 12], [5, 6, 7, 20]]
NAMES = ["law", None, "art"]


def llama():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **SPECIAL)).eval()
    rs.steer(model, rank=3, name="law", site="mixer")
    rs.steer(model, rank=2, name="art", bias=False)
    with torch.no_grad():
        for name in ("law", "art"):
            for parameter in rs.parameters(model, name):
                parameter.normal_(std=0.5)
    return model


def packed():
    """Return the texts in one row, with positions, and which text each token is of."""
    ids = torch.tensor([[token for text in TEXTS for token in text]])
    positions = torch.tensor([[place for text in TEXTS for place in range(len(text))]])
    tokens = torch.tensor([[number for number, text in enumerate(TEXTS) for _ in text]])
    return {"input_ids": ids, "position_ids": positions, "use_cache": False}, tokens


def alone(model, name, text):
    with rs.use(model, name):
        return model(torch.tensor([text])).logits[0]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", [False, True])
def test_packed_texts_are_as_each_by_itself(grad):
    model, (call, tokens) = llama(), packed()
    with torch.set_grad_enabled(grad):
        expected = [alone(model, name, text) for name, text in zip(NAMES, TEXTS, strict=True)]
        with rs.use(model, NAMES, tokens=tokens):
            actual = model(**call).logits[0]
        close(actual, torch.cat(expected))
        assert not torch.allclose(expected[0], alone(model, "art", TEXTS[0]), atol=1e-2)
    assert rs.summary(model).acting == "art"


def test_gradients_of_packed_texts_are_those_of_each_by_itself():
    model, (call, tokens) = llama(), packed()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable()
        rs.use(model, NAMES, tokens=tokens)
        rs.thaw(model, "law")
        model.zero_grad()
        loss = (model(**call).logits[0, :3] ** 2).sum()
        if checkpointing:
            rs.use(model, {"law": 1.0})  # computed again as it was
        loss.backward()
        found.append([p.grad.clone() for p in rs.parameters(model, "law")])
    model.eval()
    rs.use(model, "law")
    model.zero_grad()
    (alone(model, "law", TEXTS[0]) ** 2).sum().backward()
    for one, again, other in zip(*found, rs.parameters(model, "law"), strict=True):
        close(one, other.grad)
        close(again, other.grad)


@pytest.mark.parametrize("tokens", [[[0, 0, 1], [1, -1, 2]], [[2, 0, 2], [-1, -1, -1]], [[0], [2]]], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_any_token_meets_its_field(tokens, grad):
    model, tokens = pair({"rank": 2}), torch.tensor(tokens)
    z, names = torch.randn(*tokens.shape, 6).double(), ["a", None, "b"]
    rs.use(model, names, tokens=tokens)
    with torch.set_grad_enabled(grad):
        actual = model(z)
    for row in range(len(z)):
        for place in range(z.shape[1]):
            number = tokens[row, place].item()
            rs.use(model, None if number < 0 else names[number])
            near(actual[row, place], model(z[row : row + 1, place : place + 1])[0, 0])


def test_tokens_that_do_not_fit_are_refused():
    model, z = pair(), torch.randn(2, 3, 6).double()
    right = torch.zeros(2, 3, dtype=torch.long)
    rs.use(model, {"a": 0.5})
    for mix, tokens, words in (
        ("a", right, "is for a list"),
        (["a"], right + 1, "from 0 to 0, or -1"),
        (["a"], right - 2, "received -2"),
        (["a"], right[0], "a tensor of integers"),
        (["a"], right.float(), "a tensor of integers"),
        (["a"], [[0]], "a tensor of integers"),
    ):
        with pytest.raises(rs.SteerError, match=words):
            rs.use(model, mix, tokens=tokens)
        assert rs.summary(model).acting == {"a": 0.5}
    with pytest.raises(rs.SteerError, match="on='prompt'"):
        rs.use(model, ["a"], tokens=right, on="prompt")
    rs.use(model, ["a"], tokens=right)
    for other in (z[:1], z[:, :2], z.transpose(0, 1).contiguous()):
        with pytest.raises(rs.SteerError, match=r"are \(2, 3\), and the stream here is"):
            model(other)
    before = model(z)
    assert torch.equal(copy.deepcopy(model)(z), before)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, fullgraph=True, backend="eager")(z)
    torch._dynamo.reset()
    near(torch.compile(model, backend="eager")(z), before)
    chosen = rs.use(model, ["b"], tokens=right)
    rs.use(model, None)
    with chosen:
        after = model(z)
    rs.use(model, "b")
    near(after, model(z))
    headed = nn.Sequential(Block(), nn.Linear(6, 2)).double()
    rs.steer(headed, rs.Backbone(blocks=[headed[0]], width=6, mixer="mixer"), rank=2, train="1")
    with pytest.raises(rs.SteerError, match=r"trained 1\.\w+.* along"):
        rs.use(headed, ["default"], tokens=right)


SMALL = {"page_size": 16, "num_blocks": 16, "max_batch_tokens": 16, "auto_switch_to_flash": False}


def serve(model, inputs, **more):
    settings = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=2)
    config = ContinuousBatchingConfig(**{**SMALL, **more})
    return model.generate_batch(inputs, generation_config=settings, continuous_batching_config=config, warmup=False)


@torch.no_grad()
def test_continuous_batching_serves_a_field_for_every_request(monkeypatch):
    model = llama()
    inputs, names = [*TEXTS, TEXTS[0], TEXTS[0]], [*NAMES, "art", None]
    expected = []
    for name, text in zip(names, inputs, strict=True):
        rs.use(model, name)
        out = model.generate(torch.tensor([text]), max_new_tokens=5, do_sample=False, eos_token_id=None)
        expected.append(out[0, len(text) :].tolist())
    assert expected[0] != expected[3] != expected[4]  # the same words under other fields
    mixed, real = [], _row_by_row.runs_of
    monkeypatch.setattr("residual_steer._segments.runs_of", lambda names: mixed.append(set(names)) or real(names))
    rs.use(model, names)
    results = serve(model, inputs)
    assert [each.error for each in results.values()] == [None] * 5
    assert [each.generated_tokens for each in results.values()] == expected
    assert max(map(len, mixed)) == 3  # in one call
    assert rs.summary(model).acting == names
    with pytest.raises(rs.SteerError, match="5 rows, and `generate_batch` was given 2 requests"):
        serve(model, TEXTS[:2])
    with pytest.raises(rs.SteerError, match="CUDA graphs"):
        serve(model, inputs, use_cuda_graph=True)
    rs.use(model, "law", on="prompt")
    with pytest.raises(rs.SteerError, match="`generate_batch` has its fields act on every token"):
        serve(model, inputs)
    rs.unsteer(model)
    assert "generate_batch" not in vars(model)
