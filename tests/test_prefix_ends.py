"""The frozen prefix where something else stands between its blocks: a change of width, a decoder behind an encoder."""

import pytest
import torch

import residual_steer as rs
from cases import CASES, RANK

TABLE = {case.name: case for case in CASES}


def train(case, layers, calls, **options):
    """Train a steered model for three epochs over two batches; count the calls of its blocks."""
    torch.manual_seed(4)
    batches = [{key: value for key, value in case.batch().items() if torch.is_tensor(value)} for _ in range(2)]
    model = case.build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # so that what a decoder reads from its encoder matters
    torch.manual_seed(5)
    rs.steer(model, rank=RANK, layers=layers)
    for block in case.modules(model, "block"):
        block.register_forward_hook(lambda block, *_: calls.append(block))

    def loss(model, batch):
        output = model(**batch, use_cache=False) if "decoder_input_ids" in batch else model(**batch)
        output = getattr(output, "logits", output).float()
        return (output / output.detach().abs().max()).square().mean()

    history = rs.fit(model, batches, steps=6, lr=1e-2, loss=loss, log_every=1, progress=False, **options)
    return history, model


ONE_RUN = [("bart", [2, 3]), ("timm-swin", [1, 2]), ("timm-resnet", [1])]
TWO_RUNS = [("bart", [3]), ("whisper", [3]), ("timm-swin", [2]), ("hf-convnext", [2])]


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize(("name", "layers"), ONE_RUN + TWO_RUNS)
def test_losses_are_those_without_a_cache(name, layers, on_disk, tmp_path):
    case, counted = TABLE[name], []
    plain, _ = train(case, layers, [])
    cached, model = train(case, layers, counted, cache_prefix=tmp_path if on_disk else True)
    expected, actual = ([record["loss"] for record in history.train] for history in (plain, cached))
    assert actual == pytest.approx(expected, rel=1e-4)
    assert cached.cache["hits"] == 4
    first, *_, last = case.modules(model, "block")
    assert counted.count(last) == 6 + 2  # one batch is computed twice more, as a proof
    assert counted.count(first) == 2 + 2 + 1  # an epoch, the two runs of the check, the proof


def test_a_block_that_is_used_twice_is_refused():
    with pytest.raises(rs.SteerError, match="or the model its frozen blocks, 2 times"):
        train(TABLE["albert"], [1], [], cache_prefix=True)
