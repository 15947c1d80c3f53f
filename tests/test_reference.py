"""The reference of a preference loss: the same backbone under what it began with."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

import residual_steer as rs
from residual_steer.errors import SteerError
from words import tokenizer

TINY = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
MADE = {  # a GPT-2 with dropout, which the reference must not have
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, **TINY)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, **TINY)),
}


def made(kind="gpt2", **options):
    torch.manual_seed(0)
    return rs.steer(MADE[kind](), rank=2, **options)


def shake(model, name=None):
    with torch.no_grad():
        for parameter in rs.parameters(model, name):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


def log_probs(model, tokens):
    logits = model(input_ids=tokens).logits[:, :-1].log_softmax(-1)
    return logits.gather(-1, tokens[:, 1:, None]).sum((1, 2))


def dpo(model, reference, chosen, rejected):
    """Eq. 7 of arXiv 2305.18290, β = 0.1."""
    ours = log_probs(model, chosen) - log_probs(model, rejected)
    theirs = log_probs(reference, chosen) - log_probs(reference, rejected)
    return -F.logsigmoid(0.1 * (ours - theirs)).mean()


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("trained", [False, True])
def test_the_first_loss_is_ln_2_and_falls(kind, trained):
    model = made(kind)
    if trained:
        shake(model)
    reference = rs.reference(model)
    chosen, rejected = torch.randint(1, 64, (2, 4, 12))
    assert dpo(model.eval(), reference, chosen, rejected).item() == pytest.approx(math.log(2), abs=1e-6)
    before = log_probs(reference, chosen)
    optimizer = torch.optim.AdamW(rs.parameters(model, "default"), 0.02)
    model.train()
    for _ in range(20):
        optimizer.zero_grad()
        loss = dpo(model, reference, chosen, rejected)
        loss.backward()
        optimizer.step()
    assert model.training
    assert all(module.training for module in model.modules())
    assert dpo(model.eval(), reference, chosen, rejected) < 0.65
    assert torch.equal(log_probs(reference, chosen), before)


def test_a_field_that_was_never_trained_is_the_base():
    model = made()
    tokens = torch.randint(1, 64, (2, 8))
    reference = rs.reference(model)
    assert "reference" not in str(rs.fields(model))
    shake(model)
    with rs.use(model.eval(), None), torch.no_grad():
        expected = log_probs(model, tokens)
    assert torch.equal(log_probs(reference, tokens), expected)
    assert torch.equal(log_probs(rs.reference(model, base=True), tokens), expected)


@pytest.mark.parametrize("mix", [{"default": 0.5, "law": -1.0}, ["law", None, "default"]])
def test_it_keeps_weights_and_rows(mix):
    model = made()
    shake(model)
    rs.steer(model, name="law", rank=3, site="mixer")
    shake(model)
    rs.use(model, mix)
    tokens = torch.randint(1, 64, (3, 8))
    with torch.no_grad():
        expected = log_probs(model.eval(), tokens)
    reference = rs.reference(model)
    for name in ("default", "law"):
        shake(model, name)
    torch.testing.assert_close(log_probs(reference, tokens), expected)
    with torch.no_grad():
        assert not torch.allclose(log_probs(model, tokens), expected)


def test_a_head_is_kept_with_its_field():
    model = made(train=["transformer.ln_f"])
    tokens = torch.randint(1, 64, (2, 8))
    reference = rs.reference(model)
    expected = log_probs(reference, tokens)
    shake(model)
    assert torch.equal(log_probs(reference, tokens), expected)


def test_it_has_nothing_to_train_and_is_the_model_in_all_else():
    model = made()
    reference = rs.reference(model)
    assert list(reference.parameters()) == []
    assert reference.state_dict() == {}
    assert reference.config is model.config
    model.train()
    reference.eval()
    assert model.training
    with pytest.raises(AttributeError, match="nothing"):
        reference.nothing_of_the_kind  # noqa: B018


def test_a_forward_that_others_put_there_runs_under_the_selection():
    model = made()
    shake(model)
    reference = rs.reference(model, base=True)
    reference.forward = lambda tokens: reference.base_model(tokens).last_hidden_state  # as TRL's fused head
    tokens = torch.randint(1, 64, (2, 8))
    with rs.use(model.eval(), None):
        expected = model.base_model(tokens).last_hidden_state
    assert torch.equal(reference(tokens), expected)


def test_the_wrappers_around_a_model_do_not_matter():
    model = made()
    shake(model)
    tokens = torch.randint(1, 64, (2, 8))
    with torch.no_grad():
        expected = log_probs(model.eval(), tokens)
    wrapped = torch.compile(model, backend="eager")
    assert torch.equal(log_probs(rs.reference(wrapped), tokens), expected)


def test_a_second_copy_is_refused():
    model = made()
    shake(model)
    rs.reference(model)
    with pytest.raises(SteerError, match="default-reference"):
        rs.reference(model)
    rs.unsteer(model, "default-reference")
    rs.use(model, "default")
    rs.reference(model)


def test_trl_begins_at_ln_2_without_a_second_backbone(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = {"prompt": ["a b"] * 8, "chosen": [" c d e"] * 8, "rejected": [" f g"] * 8}
    model = made()
    shake(model)
    options = {"per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 1, "learning_rate": 0.02}
    config = trl.DPOConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False, save_strategy="no", **options)
    data, words = datasets.Dataset.from_dict(rows), tokenizer("abcdefgh")
    trainer = trl.DPOTrainer(model, rs.reference(model), config, train_dataset=data, processing_class=words)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(losses[0]) == pytest.approx(math.log(2), abs=1e-4)
    assert float(losses[-1]) < float(losses[0])
