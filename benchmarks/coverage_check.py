"""What is checked of every model of the table: steered with no arguments, it is what the library promises."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import residual_steer as rs
from residual_steer._controller import steering_of
from residual_steer.discovery.example import examples

NEW_TOKENS = 4
RANK = 8  # of fewer hidden units all may be off at once, where the stream is large


class FailedError(Exception):
    """A check that failed; the message is a line for the table."""


def check(model: nn.Module) -> dict[str, Any]:
    """Steer a model with no arguments and check what that promises.

    Returns:
        What was found, for the table.

    Raises:
        FailedError: a check failed.
        SteerError: the model was not steered.
    """
    model.eval().requires_grad_(False)
    _wake(model)
    _settle(model, _batch(model))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    backbone = rs.find_backbone(model)
    batch = _batch(model)
    frozen = _floats(model, batch)
    cached = _cache_agrees(model, batch)
    _expect(_equal(frozen, _floats(model, batch)), "the frozen model's output changes from call to call")
    rs.steer(model, rank=min(RANK, *backbone.widths))
    after = {key: value for key, value in model.state_dict().items() if key in before}
    _expect(all(_same(after[key], value) for key, value in before.items()), "steering changed the model's tensors")
    _expect(_equal(frozen, _floats(model, batch)), "a fresh field changes the output")
    fields = steering_of(model)[1].fields("default")
    _expect(len(fields) == len(backbone.blocks), "not every block has a field")
    _learns(model, batch)
    _expect(not _equal(frozen, _floats(model, batch)), "a field that is not zero changes nothing")
    if cached:
        _expect(bool(_cache_agrees(model, batch)), "generation with and without the cache differ")
    with rs.use(model, None):
        _expect(_equal(frozen, _floats(model, batch)), "switched off, the model is not the frozen one")
    kinds = dict.fromkeys(type(block).__name__ for block in backbone.blocks)
    widths = backbone.widths
    return {
        "arch": backbone.name,
        "blocks": len(backbone.blocks),
        "block": ", ".join(kinds),
        "width": str(widths[0]) if len(set(widths)) == 1 else f"{widths[0]}–{widths[-1]}",
        "sites": list(backbone.sites),
        "generates": {True: "with and without the cache alike", False: "the frozen model differs with its cache"}.get(
            cached, ""
        ),
    }


@torch.no_grad()
def _wake(model: nn.Module) -> None:
    """Give matrices that begin at zero, such as a new head's, random values: else the output is the same for all."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dim() > 1 and not parameter.any():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


@torch.no_grad()
def _settle(model: nn.Module, batch: dict[str, Any]) -> None:
    """Give every batch norm the scale of what it is given: with statistics of no data, a random ConvNet's stream fades.

    The mean square stands for the variance, and no mean is taken off. Where two small pictures are almost alike, a
    variance is so near to zero that the stream would overflow as soon as a field moves it.
    """

    def measure(norm: nn.modules.batchnorm._BatchNorm, args: tuple[Tensor, ...]) -> None:
        if norm.running_mean is None or norm.running_var is None:
            return
        power = args[0].square().transpose(0, 1).flatten(1).mean(1)
        norm.running_mean.zero_()
        norm.running_var.copy_(power.clamp(min=power.mean().item() / 100 + 1e-12))

    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    handles = [norm.register_forward_pre_hook(measure) for norm in norms]
    if norms:
        _floats(model, batch)
    for handle in handles:
        handle.remove()


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise FailedError(otherwise)


def _batch(model: nn.Module) -> dict[str, Any]:
    """Return the first made-up input that the model takes, by keywords; "" is the one without a name.

    Raises:
        FailedError: it takes none.
    """
    for example in examples(model):
        batch = dict(example.kwargs) if example.kwargs else {"": example.args[0]}
        try:
            _floats(model, batch)
        except Exception:
            continue
        return batch
    raise FailedError("no input was found that the model runs on")


def _training(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """Return the batch without a cache, which training does not fill; some models write it in place."""
    config = getattr(model, "config", None)
    return {**batch, "use_cache": False} if hasattr(config, "use_cache") and "" not in batch else batch


def _run(model: nn.Module, batch: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return model(batch[""]) if "" in batch else model(**batch)


@torch.no_grad()
def _floats(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    return _tensors(_run(model, batch))


def _tensors(output: Any) -> list[Tensor]:
    output = dict(output) if hasattr(output, "keys") else output
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _same(one: Tensor, other: Tensor) -> bool:
    return (one.shape == other.shape and torch.equal(one, other)) or torch.equal(one.nan_to_num(), other.nan_to_num())


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))


def _learns(model: nn.Module, batch: dict[str, Any]) -> None:
    """Give the fields random weights, take a step, and hold every tensor's gradient against zero."""
    parameters = rs.parameters(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            inputs = parameter.shape[1] if parameter.dim() > 1 else 100  # a tenth of the stream, at any width
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 / inputs**0.5)
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    try:
        _floats(model, _training(model, batch))
        batch = _training(model, batch)
    except TypeError:  # the model has no such keyword
        pass
    for _ in range(2):
        optimizer.zero_grad()
        outputs = [tensor for tensor in _tensors(_run(model, batch)) if tensor.requires_grad]
        _expect(bool(outputs), "the output has no gradient")
        weights = [torch.randn(x.shape, generator=generator) for x in outputs]
        sum((x.float() * w).mean() for x, w in zip(outputs, weights, strict=True)).backward()
        optimizer.step()
    names = [
        f"{index}.{name}"
        for (_, index), field in steering_of(model)[1].fields("default").items()
        for name, parameter in field.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.any()
    ]
    _expect(not names, f"no gradient in {', '.join(names[:4])}{', …' if len(names) > 4 else ''}")


@torch.no_grad()
def _cache_agrees(model: nn.Module, batch: dict[str, Any]) -> bool | None:
    """Say whether greedy generation with the cache gives the tokens it gives without; None where there is none."""
    given = {key: value for key, value in batch.items() if key != "decoder_input_ids"}
    if not getattr(model, "can_generate", bool)() or not given or "" in given or "pixel_values" in given:
        return None
    if "input_ids" in given:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    if "decoder_input_ids" in batch:
        given["decoder_start_token_id"] = 1
    settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "min_new_tokens": NEW_TOKENS}
    settings |= {"max_new_tokens": NEW_TOKENS, "output_logits": True, "return_dict_in_generate": True}
    try:
        torch.manual_seed(0)
        with_cache = model.generate(**given, use_cache=True, **settings)
        torch.manual_seed(0)
        without = model.generate(**given, use_cache=False, **settings)
    except Exception:  # some models generate from something else, or with a cache alone
        return None
    if not all(isinstance(run.logits, tuple) for run in (with_cache, without)):
        return None  # a model with a CTC head calls decoding of one pass "generate"
    first, second = (torch.stack(run.logits).double() for run in (with_cache, without))
    if first.shape != second.shape:
        return False
    finite = first.isfinite() & second.isfinite()
    scale = second[finite].abs().max().clamp(min=1e-6)
    return bool(((first - second)[finite].abs().max() <= 1e-3 * scale).item())
