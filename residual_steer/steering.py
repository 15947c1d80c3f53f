"""steer, unsteer, use, freeze, thaw and parameters: what a user does to a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TypeVar

from torch import nn

from ._controller import ATTRIBUTE, Steering, base_tensors, steered_part, steering_of
from ._internals import is_compiled
from .backbone import Backbone, execution_device
from .config import FieldConfig, check_name, check_ranks, check_site, match_train
from .errors import SteerError
from .injector import Injector
from .registry import find_backbone, own_backbone, same_blocks
from .routing import Asked, Mix

__all__ = ["Selection", "begin", "freeze", "install", "parameters", "steer", "thaw", "unsteer", "use"]

Model = TypeVar("Model", bound=nn.Module)


class Selection:
    """A selection made by `use`. As a context manager it restores, on leaving, what was selected before."""

    def __init__(self, model: nn.Module, mix: Mix, before: Mix) -> None:
        self._model, self._mix, self._before = model, mix, before

    def __repr__(self) -> str:
        return f"<selected: {self._mix}>"

    def __enter__(self) -> None:
        """Enter; the selection is in effect already, unless another one was made since."""
        base, state = steering_of(self._model)
        if state.mix != self._mix:
            self._before = state.mix
        state.select(base, Mix.parse(self._mix.asked(), state.specs))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore what was selected before, also after an exception; a field that was removed since is not missed.

        Raises:
            SteerError: the model was changed, so that this cannot be; after an exception that is a warning.
        """
        base = steered_part(self._model)
        state = None if base is None else base.__dict__[ATTRIBUTE]
        if base is None or state is None or not all(name in state.specs for name in self._before.names):
            return
        try:
            state.select(base, self._before)
        except SteerError as failed:
            if error is None:
                raise
            warnings.warn(f"what was selected before was not restored: {failed}", stacklevel=2)


def steer(
    model: Model,
    arch: str | Backbone | None = None,
    *,
    rank: int | Mapping[int, int] = 32,
    scale: float = 1.0,
    layers: Sequence[int] | None = None,
    site: str = "block",
    activation: str = "gelu",
    bias: bool = True,
    dropout: float = 0.0,
    name: str = "default",
    train: Sequence[str] | str = (),
) -> Model:
    """Freeze `model` and add a steering field to its residual stream (eq. 1, 2 and 5 of arXiv 2606.24396).

    At every steered block the stream that leaves becomes M(z) + λ·H(z). H starts at zero: until it is trained, the
    model's output stays the same to the last bit. Another call with another `name` adds a field, selects it, and
    freezes the others.

    Args:
        model: a model of any size around one backbone; it is changed in place.
        arch: a registered backbone's name (`residual_steer.list_backbones()` lists them), "auto" to have the stream of
            any model found and proved, or a Backbone: one made by hand, or what `find_backbone(model, example=batch)`
            returned. None looks for a registered one, and falls back on "auto".
        rank: r, for all blocks, or `{block index: rank}`, which then says which blocks are steered.
        scale: λ.
        layers: indices of the blocks to steer, negative ones from the end; None is all of them.
        site: `"block"` beside the whole block (eq. 1), `"mixer"` beside its attention or SSM, `"mlp"` beside its
            feed-forward, or `"input"`: what the mixer receives becomes x + λ·H(x), the control input of §4.2.
        activation: σ: gelu, gelu_tanh, relu, silu, tanh or identity.
        bias: whether both projections have biases, as the paper's parameter counts imply.
        dropout: of the field's hidden units, in training mode.
        name: what `use` and `save` call the field: letters, digits, `_` and `-`.
        train: names or globs of base modules or parameters that train with the field, such as a new head. Their
            values belong to the field: they are saved with it, and `use(model, None)` and `unsteer` bring the
            original ones back.

    Returns:
        The same object, frozen and steered.

    Raises:
        SteerError: a rank outside 1 … width, an unknown site, activation, layer or backbone, a name in use, a `train`
            pattern that matches nothing, no known backbone or several, a compiled or wrapped model. Nothing changed.
    """
    base, state = begin(model, arch)
    check_name(name, state.specs)
    spec = FieldConfig(
        name=name,
        site=check_site(site, state.backbone),
        ranks=check_ranks(rank, layers, len(state.backbone.blocks)),
        scale=scale,
        activation=activation,
        bias=bias,
        dropout=dropout,
        train=match_train(base_tensors(base), train),
    )
    install(base, state, spec)
    return model


def install(model: nn.Module, state: Steering, spec: FieldConfig) -> None:
    """Check the field of `spec` against the model, then add it.

    Raises:
        SteerError: it does not fit; nothing was changed.
    """
    for index in spec.ranks:
        spec.build(index, state.backbone, device="meta")  # refuses what HRes refuses, before anything is changed
        if state.backbone.point(index, spec.site) is None:
            there = [i for i in range(len(state.backbone.blocks)) if state.backbone.point(i, spec.site) is not None]
            raise SteerError(
                f"site {spec.site!r} is not there in block {index} ({type(state.backbone.blocks[index]).__name__}), "
                f"only in layers={there}: name these or some of them, or choose another site."
            )
    tensors = base_tensors(model)
    away = [key for key in spec.train if tensors[key].is_meta]
    if away and all(execution_device(state.backbone.blocks[index]).type != "meta" for index in spec.ranks):
        raise SteerError(f"{away[0]}, which is to train along, is offloaded. Keep it on a device: `device_map`.")
    points = [state.backbone.point(index, spec.site) for index in spec.ranks]
    if len({id(point) for point in points}) < len(points):
        raise SteerError(
            f"some blocks share one module at site {spec.site!r}: steer another site, or name one of them in `layers`."
        )
    if not state.specs:
        state.install(model)
    try:
        state.add(model, spec)
    except BaseException:
        if not state.specs:
            state.remove(model)
        raise


def unsteer(model: Model, name: str | None = None) -> Model:
    """Take one field away, or all of them and every other trace of steering.

    With the last field goes the steering: every hook, key, value and `requires_grad` is as it was before `steer`. If
    the field acts, alone or in a mix, none acts afterwards.

    Args:
        model: a steered model.
        name: which field; None is all of them.

    Raises:
        SteerError: no such field, or the model is not steered.
    """
    base, state = steering_of(model)
    if name is None or [state.name_of(name)] == list(state.specs):
        state.remove(base)
    else:
        state.discard(base, name)
    return model


def use(model: nn.Module, mix: Asked) -> Selection:
    """Select which fields act, at once; in a `with` statement, until the block is left.

    What a field trained along, such as a classifier, acts with it. A field that is selected by its name also trains,
    unless it is frozen; in every other mix only fields that were thawed do. Call `backward()` before the selection
    changes: a gradient that arrives when its field does not train is an error.

    Args:
        model: a steered model.
        mix: one of

            - None: the frozen model, bit for bit;
            - a field's name;
            - `{name: weight}`: the stream moves by Σ w·λ·H. Weights may be negative (arithmetic, arXiv 2306.14870);
            - a list with a name or None for every row of the batch. Where `generate` repeats rows, for beams and
              `num_return_sequences`, each entry stands for as many consecutive ones.

    Raises:
        SteerError: no such field, a weight that is no finite number, an empty list, fields that trained what the rows
            of one batch cannot differ in, or a model that is not steered. What was selected stays. A list that does not
            fit the batch is an error when the model is called.
    """
    base, state = steering_of(model)
    before, chosen = state.mix, Mix.parse(mix, state.specs)
    if isinstance(model, nn.parallel.DistributedDataParallel) and chosen.by_name and chosen.names != before.names:
        raise SteerError(
            "what trains cannot change once a model is wrapped in DistributedDataParallel, which synchronises what "
            "trained when it was wrapped. Select first and wrap after, or give weights: {name: 1.0}."
        )
    state.select(base, chosen)
    return Selection(base, chosen, before)


def freeze(model: nn.Module, name: str | None = None) -> None:
    """Keep a field, and what it trained along, from training even where it is selected, until `thaw`.

    Args:
        model: a steered model.
        name: which field; None is the one that acts.

    Raises:
        SteerError: no such field, not one that acts, or the model is not steered.
    """
    _wish(model, name, False)


def thaw(model: nn.Module, name: str | None = None) -> None:
    """Let a field train wherever it acts: where it is selected by name, and in a mix too.

    In `{name: weight}` and row by row nothing trains otherwise. So one field can learn what another one leaves over:
    `use(model, {"law": 1, "new": 1})`, then `thaw(model, "new")`.

    Args:
        model: a steered model.
        name: which field; None is the one that acts.

    Raises:
        SteerError: no such field, not one that acts, or the model is not steered.
    """
    _wish(model, name, True)


def _wish(model: nn.Module, name: str | None, on: bool) -> None:
    base, state = steering_of(model)
    name = state.name_of(name)
    before = dict(state.wish)
    state.wish[name] = on
    try:
        state.select(base, state.mix)
    except SteerError:
        state.wish = before
        raise


def parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """Return the parameters of a field, ready for an optimizer, with the base parameters that it trains.

    Args:
        model: a steered model.
        name: which field; None is the one that acts.

    Raises:
        SteerError: no such field, not one that acts, or the model is not steered.
    """
    base, state = steering_of(model)
    name = state.name_of(name)
    found = [p for module in state.fields(name).values() for p in module.parameters()]
    opened = {id(tensor): tensor for tensor in state.values(base, name).values()}
    return found + [tensor for tensor in opened.values() if isinstance(tensor, nn.Parameter)]


def begin(model: nn.Module, arch: str | Backbone | None = None) -> tuple[nn.Module, Steering]:
    """Return the module that is or will be steered, and the steering that it has, or a fresh one, not installed yet.

    Raises:
        SteerError: the model cannot be steered, or is as another backbone.
    """
    _refuse_wrapped(model)
    base = steered_part(model)
    if base is not None:
        state: Steering = base.__dict__[ATTRIBUTE]
        mine = state.backbone
        same = same_blocks(mine, arch) if isinstance(arch, Backbone) else arch in (None, mine.name)
        if not same:
            told = f"a Backbone of {len(arch.blocks)} blocks" if isinstance(arch, Backbone) else f"arch={arch!r}"
            raise SteerError(f"this model is steered as {mine.name!r}; received {told}. Leave `arch` out.")
        return base, state
    backbone = own_backbone(model, arch) if isinstance(arch, Backbone) else find_backbone(model, arch)
    for path, module in model.named_modules():
        if ATTRIBUTE in module.__dict__:
            raise SteerError(f"a part of this model, {path!r}, is steered already; unsteer it first.")
    if any(isinstance(module, Injector) for block in backbone.blocks for module in block.modules()):
        raise SteerError("this model is part of a steered one; work on the model that was given to `steer`.")
    return model, Steering(backbone)


def _refuse_wrapped(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise SteerError(f"a model is a torch.nn.Module; received {type(model).__name__}.")
    for path, module in model.named_modules():
        kind = type(module).__name__
        if is_compiled(module):
            raise SteerError(
                f"a compiled model cannot be steered, since hooks added now would be ignored: {path or 'the model'} is "
                "compiled. Steer first, compile after."
            )
        if isinstance(module, nn.parallel.DistributedDataParallel) or kind.startswith(("FSDP", "FullyShardedData")):
            raise SteerError(
                f"a model that is wrapped in {kind} cannot be steered, since new parameters would not be "
                "synchronised. Steer first, wrap after."
            )
