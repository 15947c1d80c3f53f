"""steer, unsteer, use, freeze, thaw and parameters: what a user does to a model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import TypeVar

from torch import Tensor, nn

from ._checks import check_model
from ._controller import Steering, base_tensors, steered_part, steering_of
from ._frozen import base_modules
from ._internals import is_compiled
from ._shards import align
from .backbone import ATTRIBUTE, Backbone, execution_device
from .config import FieldConfig, Rank, check_name, check_sites, match_train
from .errors import SteerError
from .injector import Injector
from .registry import find_backbone, own_backbone, same_blocks
from .routing import Asked, Mix

Model = TypeVar("Model", bound=nn.Module)


class Selection:
    """A selection made by `use`. As a context manager it restores, on leaving, what was selected before."""

    def __init__(self, model: nn.Module, mix: Mix, before: Mix) -> None:
        self._model, self._mix, self._before = model, mix, before

    def __repr__(self) -> str:
        return f"<selected: {self._mix}>"

    def __enter__(self) -> None:
        """Select again; what is left later is what was there now, if another selection was made since."""
        base, state = steering_of(self._model)
        if state.mix != self._mix:
            self._before = state.mix
        state.select(base, self._mix.again(state.specs))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore what was selected before; a model that was changed is an error, after an exception a warning."""
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
    rank: Rank = 32,
    scale: float = 1.0,
    layers: Sequence[int] | None = None,
    site: str | Sequence[str] | None = None,
    activation: str = "gelu",
    bias: bool = True,
    dropout: float = 0.0,
    name: str = "default",
    train: Sequence[str] | str = (),
) -> Model:
    """Freeze `model` and add a steering field to its residual stream (eq. 1, 2 and 5 of arXiv 2606.24396).

    At every steered block the stream that leaves becomes M(z) + λ·H(z). H starts at zero: until it is trained, the
    model's output stays the same to the last bit. Another call with another `name` adds a field, selects it, and
    freezes the others. Where torch.distributed has a process group, every process calls this, and they begin alike.

    | site | what becomes of what |
    | --- | --- |
    | "block" | a whole block M returns M(z) + λ·H(z) (eq. 1) |
    | "mixer", "mlp" | its attention or SSM, or its feed-forward, does (lemma 2) |
    | "input" | the mixer receives x + λ·H(x), the control input of §4.2 |
    | "after" | z', which leaves the block, becomes z' + λ·H(z') |
    | "mixer.q_proj", … | a linear map P, by its path: P(x) + λ·H(x); `find_backbone(model).projections` lists them |

    Args:
        model: a model of any size around one backbone; it is changed in place.
        arch: a registered backbone's name (`residual_steer.list_backbones()` lists them), "auto" to have the stream of
            any model found and proved, or a Backbone: one made by hand, or what `find_backbone(model, example=batch)`
            returned. None looks for a registered one, and falls back on "auto".
        rank: r, for all blocks, or `{block index: rank}`, which then says which blocks are steered. Several sites share
            it, the first ones taking what is left over; `{site: rank}`, with either of the two, says it site by site.
        scale: λ.
        layers: indices of the blocks to steer, negative ones from the end; None is all of them.
        site: one of the table, or several: `["input", "after"]`; None is what is best for the family, `Backbone.site`.
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
        sites=check_sites(site, rank, layers, state.backbone),
        scale=scale,
        activation=activation,
        bias=bias,
        dropout=dropout,
        train=match_train(base_tensors(base), train),
    )
    install(base, state, spec)
    align(state.parameters(name))
    return model


def install(model: nn.Module, state: Steering, spec: FieldConfig) -> None:
    """Check the field of `spec` against the model, then add it; raise if it does not fit, and change nothing."""
    blocks = state.backbone.blocks
    for site, ranks in spec.sites.items():
        points = {index: state.backbone.point(index, site) for index in ranks}
        for index, point in points.items():
            if point is None:
                there = [i for i in range(len(blocks)) if state.backbone.point(i, site) is not None]
                more = f", or a rank for each: rank={{{site!r}: {{block: rank}}, …}}" if len(spec.sites) > 1 else ""
                raise SteerError(
                    f"site {site!r} is not there in block {index} ({type(blocks[index]).__name__}), only in "
                    f"layers={there}: name these or some of them{more}, or choose another site."
                )
            spec.build((site, index), state.backbone, device="meta")  # refuses what HRes refuses, before any change
        if len({id(point) for point in points.values()}) < len(points):
            raise SteerError(
                f"some blocks share one module at site {site!r}: steer another site, or name one of them in `layers`."
            )
    tensors = base_tensors(model) if spec.train else {}
    away = [key for key in spec.train if tensors[key].is_meta]
    if away and all(execution_device(blocks[index]).type != "meta" for index in spec.ranks):
        raise SteerError(f"{away[0]}, which is to train along, is offloaded. Keep it on a device: `device_map`.")
    if not state.specs:
        state.install(model)
    try:
        state.add(model, spec)
    except BaseException:
        if not state.specs:
            state.remove(model)
        raise


def unsteer(model: Model, name: str | None = None) -> Model:
    """Take one field away, or for None all of them and every other trace of steering.

    With the last field goes the steering: every hook, key, value and `requires_grad` is as it was before `steer`. If
    the field acts, alone or in a mix, none acts afterwards.

    Raises:
        SteerError: no such field, or the model is not steered.
    """
    base, state = steering_of(model)
    if name is None or [state.name_of(name)] == list(state.specs):
        state.remove(base)
    else:
        state.discard(base, name)
    return model


def use(model: nn.Module, mix: Asked, *, on: str = "all", tokens: Tensor | None = None) -> Selection:
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

        on: "all", or "prompt" for fields that act on what a language model reads before it writes (arXiv 2605.14217):
            decoding is the frozen model then, and costs what it costs. In a call with `labels`, the prompt is what
            stands in front of each row's first label. In `generate` it is what that was given, however it reads it. In
            other calls, in evaluation mode, it is all that fills an empty cache, and calls of one token that go on with
            that cache are decoding. Any call may be given `prompt_mask`, a bool tensor `(batch, length)`, instead; what
            could be either, as a text without a cache, is an error without it. Files do not say it: select it again
            after `load`.

        tokens: where several texts are packed into one row: for each token, `(batch, length)`, the place of its text
            in the list, -1 for none. It holds for the batch that has these tokens. `generate_batch` of transformers
            needs none: there the list has a name or None for every request.

    Raises:
        SteerError: no such field, a weight that is no finite number, an empty list, fields that trained what the rows
            of one batch cannot differ in, or a model that is not steered, or decodes without a cache or a field that
            trained others along where they are to act on the prompt. What was selected stays. A list that does not
            fit the batch is an error when the model is called.
    """
    base, state = steering_of(model)
    before, chosen = state.mix, Mix.parse(mix, state.specs, on, tokens)
    if isinstance(model, nn.parallel.DistributedDataParallel) and chosen.by_name and chosen.names != before.names:
        raise SteerError(
            "what trains cannot change once a model is wrapped in DistributedDataParallel, which synchronises what "
            "trained when it was wrapped. Select first and wrap after, or give weights: {name: 1.0}."
        )
    state.select(base, chosen)
    return Selection(base, chosen, before)


def freeze(model: nn.Module, name: str | None = None) -> None:
    """Keep a field (None: the one that acts), and what it trained along, from training, until `thaw`.

    Raises:
        SteerError: no such field, not one that acts, or the model is not steered.
    """
    _wish(model, name, False)


def thaw(model: nn.Module, name: str | None = None) -> None:
    """Let a field (None: the one that acts) train wherever it acts: where it is selected by name, and in a mix too.

    In `{name: weight}` and row by row nothing trains otherwise. So one field can learn what another one leaves over:
    `use(model, {"law": 1, "new": 1})`, then `thaw(model, "new")`.

    Raises:
        SteerError: no such field, not one that acts, or the model is not steered.
    """
    _wish(model, name, True)


def _wish(model: nn.Module, name: str | None, on: bool) -> None:
    base, state = steering_of(model)
    before = dict(state.wish)
    state.wish[state.name_of(name)] = on
    try:
        state.select(base, state.mix)
    except SteerError:
        state.wish = before
        raise


def parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """Return the parameters of a field (None: the one that acts) and the base parameters that it trains, to optimize.

    Raises:
        SteerError: no such field, not one that acts, or the model is not steered.
    """
    base, state = steering_of(model)
    name = state.name_of(name)
    opened = {id(tensor): tensor for tensor in state.values(base, name).values() if isinstance(tensor, nn.Parameter)}
    return [*state.parameters(name), *opened.values()]


def begin(model: nn.Module, arch: str | Backbone | None = None) -> tuple[nn.Module, Steering]:
    """Return the module that is or will be steered, and its steering, maybe not installed yet; raise if none can be."""
    for path, module in base_modules(check_model(model)):
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
    base = steered_part(model)
    if base is not None:
        state: Steering = base.__dict__[ATTRIBUTE]
        mine = state.backbone
        if not (same_blocks(mine, arch) if isinstance(arch, Backbone) else arch in (None, mine.name)):
            other = f"a Backbone of {len(arch.blocks)} blocks" if isinstance(arch, Backbone) else f"arch={arch!r}"
            raise SteerError(f"this model is steered as {mine.name!r}; received {other}. Leave `arch` out.")
        return base, state
    backbone = own_backbone(model, arch) if isinstance(arch, Backbone) else find_backbone(model, arch)
    for path, module in model.named_modules():
        if ATTRIBUTE in module.__dict__:
            raise SteerError(f"a part of this model, {path!r}, is steered already; unsteer it first.")
    if any(isinstance(module, Injector) for block in backbone.blocks for module in block.modules()):
        raise SteerError("this model is part of a steered one; work on the model that was given to `steer`.")
    return model, Steering(backbone)
