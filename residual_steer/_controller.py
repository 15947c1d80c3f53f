"""The state of a steered model: which fields it holds, which act, and what has to be put back."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import unserializable_hook

from ._calls import Call, Repeats, Selected, arrived, batch_of, encoding, running, tensors_in
from ._frozen import Frozen, Moving, adapters_own, base_modules, plain_name
from ._internals import compile_with_hooks, has_hook, owned_tensors
from ._prompt import MASK, Prompts, check_reads_prompts, compiled_prompt, generation
from ._row_order import length_first
from ._segments import batches_of_requests
from .backbone import ATTRIBUTE, Backbone, Handle, compute_dtype, execution_device
from .config import FieldConfig, Place
from .errors import SteerError, some
from .field import HRes
from .injector import Injector
from .routing import OFF, Mix, Tables
from .trained_modules import Entry, Heads

# From a model that is about to be steered and its controller to what is to be undone with it. Rooms above put it here.
attachments: list[Callable[[nn.Module, Steering], Sequence[Handle]]] = []


@dataclass
class Steering:
    """What steering did to a model, kept on the model itself."""

    backbone: Backbone
    frozen: Frozen = field(default_factory=Frozen)
    specs: dict[str, FieldConfig] = field(default_factory=dict)  # the fields
    mix: Mix = OFF  # which of them act
    wish: dict[str, bool] = field(default_factory=dict)  # of fields that were thawed or frozen: whether they train
    injectors: dict[Place, Injector] = field(default_factory=dict)
    heads: Heads = field(default_factory=Heads)
    handles: list[Handle] = field(default_factory=list)  # hooks on the model, and those that the family needs
    selected: Selected = field(default_factory=Selected)
    repeats: Repeats = field(default_factory=Repeats)
    prompts: Prompts = field(default_factory=Prompts)
    removed: list[bool] = field(default_factory=list)  # not empty once all of it was taken away
    open: frozenset[str] = frozenset()  # the fields whose parameters were opened
    unchecked: bool = True  # whether no call in training mode was watched since the selection was made
    moving: Moving | None = None

    def install(self, model: nn.Module) -> None:
        """Attach to a model that is about to get its first field."""
        compile_with_hooks()
        if self.backbone.prepare is not None:  # first, since it may raise, as may a warning
            self.handles.extend(self.backbone.prepare(self.backbone.blocks))
        self.frozen.close(model, self.backbone.blocks)
        self.handles.append(model.register_forward_pre_hook(self._enter, with_kwargs=True))
        self.handles.append(model.register_forward_hook(self._leave, always_call=True))
        self.handles += [*encoding(model, self), *batches_of_requests(model, self), *generation(model, self)]
        for attach in attachments:
            self.handles += attach(model, self)
        setattr(model, ATTRIBUTE, self)

    def name_of(self, name: str | None) -> str:
        """Return the name of a field, the one that acts for None; raise if there is none."""
        received = repr(name)
        if name is None:
            name = self.mix.names[0] if len(self.mix.names) == 1 else None
            received = f"None, while {'several of them act' if self.mix.names else 'none of them acts'}"
        if not isinstance(name, str) or name not in self.specs:
            raise SteerError(f"`name` is one of the fields {', '.join(self.specs)}; received {received}.")
        return name

    def trains(self, name: str, mix: Mix | None = None) -> bool:
        """Return whether a field trains: selected by name it does unless frozen, in other mixes only if thawed.

        So mixes for serving require no gradient, and neither other weights nor other rows are another graph to compile.
        """
        mix = mix or self.mix
        return name in mix.names and self.wish.get(name, mix.by_name)

    def fields(self, name: str) -> dict[Place, HRes]:
        """Return the modules of one field by site and block index."""
        return {place: cast(HRes, self.injectors[place].fields[name]) for place in self.specs[name].places}

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Return the parameters of one field's modules."""
        return [parameter for module in self.fields(name).values() for parameter in module.parameters()]

    def values(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """Return the base tensors that one field trains, its own."""
        return self.heads.values(name, _base_entries(model))

    def tensors(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """Return every tensor of a field itself: its own, by block, and those of the base that it trains, `train.…`."""
        spec = self.specs[name]
        own = {
            f"{spec.point(place)}.{key}": tensor
            for place, module in self.fields(name).items()
            for key, tensor in module.state_dict(keep_vars=True).items()
        }
        return own | {f"train.{key}": tensor for key, tensor in self.values(model, name).items()}

    def unsaved(self, model: nn.Module) -> list[str]:
        """Return the names of the base's parameters that train and belong neither to a field nor to another adapter."""
        known = self._own_values() | adapters_own(module for _, module in base_modules(model))
        found: dict[int, str] = {}
        for key, _, _, tensor in _base_entries(model):
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad and id(tensor) not in known:
                found.setdefault(id(tensor), key)
        return list(found.values())

    def _own_values(self) -> set[int]:
        return {id(tensor) for tensors in self.heads.own.values() for tensor in tensors.values()}

    @torch.inference_mode(False)  # what is made here is to be trained, whatever mode the caller is in
    def add(self, model: nn.Module, spec: FieldConfig) -> None:
        """Make the field of `spec` and select it; if that fails, all is as it was."""
        made, before = {}, self.mix
        for place in spec.places:
            block = self.backbone.blocks[place[1]]
            dtype = torch.promote_types(compute_dtype(block), torch.float32)
            made[place] = spec.build(place, self.backbone, device=execution_device(block), dtype=dtype)
        self.select(model, OFF)  # so that what the field begins with, and what is kept as the base's, is the base's
        try:
            self.specs[spec.name] = spec
            if spec.train:
                inside = {id(module) for block in self.backbone.blocks for _, module in base_modules(block)}
                self.heads.open(spec.name, spec.train, _base_entries(model), inside)
            for place, module in made.items():
                if place not in self.injectors:
                    self.injectors[place] = Injector(self.backbone, place[1], place[0])
                self.injectors[place].add(spec.name, module)
            self.select(model, Mix.parse(spec.name, self.specs))
        except BaseException:
            self.mix = OFF if spec.name in self.mix.names else self.mix
            self.discard(model, spec.name)
            self.select(model, before)
            raise

    @torch.inference_mode(False)  # what is made here may be saved for a backward pass later
    @torch.no_grad()
    def select(self, model: nn.Module, mix: Mix) -> None:
        """Let the fields of a mix act, with what they trained along, and train; raise if the base is no more there."""
        if mix.by_token:
            self._check_tokens(model, mix)
        if (mix.differs or mix.by_token) and any(map(length_first, self.backbone.blocks)):
            raise SteerError(
                "the blocks of this model carry (length, batch, width), where rows cannot have fields of their own. "
                "Make its layers with batch_first=True, or use one field at a time."
            )
        concerned = [name for name in dict.fromkeys((*self.mix.names, *mix.names)) if name in self.specs]
        if self.heads.base:
            entries = _base_entries(model)
            lost = self.heads.lost(concerned, entries)
            if lost:
                raise SteerError(
                    f"the model was changed since it was steered: {', '.join(lost)}, which a field trains, is gone or "
                    "has another shape. Undo that change first, or `unsteer` and steer again."
                )
            self.heads.select(mix, entries, partial(self.trains, mix=mix), self.frozen.move)
        self.mix = mix
        tables: Tables = {}
        routes = {place: injector.select(mix, tables) for place, injector in self.injectors.items()}
        for name in concerned:
            self._let_train(name, self.trains(name))
        trains = frozenset(filter(self.trains, mix.names))
        self.selected = Selected(mix, trains, routes, frozenset(self.heads.inner), removed=self.removed)
        self.repeats, self.unchecked = Repeats(), True

    def _check_tokens(self, model: nn.Module, mix: Mix) -> None:
        """Raise if fields cannot act on some tokens of a row alone in this model."""
        if mix.on != "all":
            check_reads_prompts(model, self.backbone.path)
        for name in mix.names:
            if self.specs[name].train:
                raise SteerError(
                    f"the field {name!r} trained {some(self.specs[name].train)} along, which act on every token. Use "
                    "such a field with on='all' and without `tokens`."
                )

    def _let_train(self, name: str, on: bool) -> None:
        """Open or close a field's parameters; the last of each module notices a backward pass after it was closed."""
        first = self.injectors[self.specs[name].places[0]].fields[name]
        if not on and name not in self.open and not cast(HRes, first).up.weight.requires_grad:
            return  # as most of the fields of many rows
        self.open = self.open | {name} if on else self.open - {name}
        for module in self.fields(name).values():
            last = module.up.weight
            if last.requires_grad and not on and not has_hook(last, _Watch):
                last.register_hook(_Watch(name, last))  # type: ignore[no-untyped-call]
            for parameter in module.parameters():
                if parameter.requires_grad is not on:
                    parameter.requires_grad_(on)

    def discard(self, model: nn.Module, name: str) -> None:
        """Take one of several fields away; a mix in which it acts ends."""
        self.select(model, OFF if name in self.mix.names else self.mix)
        spec = self.specs.pop(name)
        for place in spec.places:
            injector = self.injectors.get(place)
            if injector is not None and injector.discard(name):
                del self.injectors[place]
        self.wish.pop(name, None)
        self.open -= {name}
        self.heads.close(name, _base_entries(model))
        self.select(model, self.mix)

    def remove(self, model: nn.Module) -> None:
        """Take away everything that steering added, and put back what it changed."""
        lost = self.heads.lost(self.mix.names, _base_entries(model))
        if lost:
            warnings.warn(
                f"the values before steering of {', '.join(lost)} were not put back: the model was changed since.",
                stacklevel=4,
            )
        else:
            self.select(model, OFF)
        for attachment in (*self.injectors.values(), *self.heads.switches):
            attachment.detach()
        for handle in self.handles:
            handle.remove()
        self.removed.append(True)
        self.frozen.reopen(model)
        delattr(model, ATTRIBUTE)

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Check the rows and tokens of a mix against what the model is called with; raise if they do not fit."""
        if torch.compiler.is_compiling():
            if self.mix.by_token:
                raise compiled_prompt()
            return None
        running.again = False
        if self.unchecked and model.training and torch.is_grad_enabled():
            self._check_what_trains(model)
        call = Call(self, self.mix)
        if running.calls:
            running.end(self)
        if self.mix.watched:
            running.calls.append(call)  # before what may raise, since `_leave` takes it away
        if self.mix.on != "all":
            call.prompt = self.prompts.of(model, args, kwargs)
        elif kwargs.get(MASK) is not None and self.mix.names:
            raise SteerError(f"`{MASK}` is for fields that act on the prompt alone: use(model, …, on='prompt').")
        if not self.mix.watched:
            return None
        call.batch = batch = batch_of(model.get_submodule(self.backbone.path), args, kwargs)
        if callable(self.mix.segments):
            call.segments = self.mix.segments(args, kwargs)
        elif self.mix.rows is not None and self.mix.segments is None and batch is not None and batch != self.mix.rows:
            self.repeats.check(self.mix.rows, batch, args, kwargs)
        call.given = None if batch is None else (model, (args, kwargs), batch)
        return args, kwargs

    def _leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Let the output remember what was selected, and end what `_enter` began."""
        if torch.compiler.is_compiling():
            if self.mix.by_token:
                raise compiled_prompt()  # behind a break of the graph, where `_enter` was not compiled
            return
        call = running.end(self) if running.calls else None
        if call is not None and call.mix is not self.mix:
            call = None  # another selection was made while the model ran
        if torch.is_grad_enabled():
            selected = replace(self.selected, again=True) if running.again else self.selected
            if call is not None and self.mix.on != "all":
                selected = replace(selected, prompt=call.prompt)
            for tensor in tensors_in(output):
                if tensor.requires_grad and not tensor.is_leaf:
                    hook = unserializable_hook(partial(arrived, selected))  # type: ignore[no-untyped-call]
                    tensor.register_hook(hook)  # type: ignore[no-untyped-call]
        if self.moving is not None:
            moving, self.moving = self.moving, None
            if output is not None:
                moving.warn(self._own_values())
        if call is not None and output is not None:
            if self.mix.on != "all" and call.prompt is True:
                self.prompts.note(output)
            self.repeats.go_on(call.batch, output)
            for switch in self.heads.switches:
                switch.settle(call.met)

    def _check_what_trains(self, model: nn.Module) -> None:
        """In the first call in training mode after a selection, warn of what is not saved, and watch buffers."""
        trained = [name for name in self.mix.names if self.trains(name)]
        for name in trained:
            blocks = [self.backbone.blocks[index] for index in self.specs[name].ranks]
            if any(p.is_meta for p in self.parameters(name)) and execution_device(blocks[0]).type != "meta":
                raise SteerError(
                    f"the field {name!r} was offloaded after it was made, and would not train: gradients go to copies "
                    "of its tensors. Offload the model first and steer it then, which keeps the field on its device."
                )
        self.unchecked = False
        there = {id(module) for _, module in base_modules(model)}
        gone = {index: None for (_, index), injector in self.injectors.items() if id(injector.host) not in there}
        if gone and self.mix.names:
            warnings.warn(
                f"block {', '.join(map(str, gone))} was taken out of the model, or replaced, since it was steered: "
                "fields there neither act nor train. Undo that change, or `unsteer` and steer again.",
                stacklevel=4,
            )
        lost = self.unsaved(model) if self.mix.names else []
        if lost:
            warnings.warn(
                f"{some(lost)} train too, and `save` does not store what no field opened: they would be lost. Steer "
                "with `train=[...]` to train them along with a field, or save them yourself.",
                stacklevel=4,
            )
        shut = [name for name in trained if not any(p.requires_grad for p in self.parameters(name))]
        if shut:
            warnings.warn(
                f"the field {', '.join(shut)} is selected and does not train: somebody closed its parameters since, as "
                "`get_peft_model` and `prepare_model_for_kbit_training` do. Select it again by `use`, or `freeze` it.",
                stacklevel=4,
            )
        owners = {id(module) for module, _, _ in self.frozen.statistics}
        self.moving = Moving(
            (key, tensor)
            for key, module, _, tensor in _base_entries(model)
            if not isinstance(tensor, nn.Parameter) and id(module) not in owners
        )


def steered_part(model: nn.Module) -> nn.Module | None:
    """Return what is steered, the model or what `torch.compile`, data parallelism or PEFT wrapped; None if nothing."""
    waiting: list[object] = [model]
    while waiting:
        module = waiting.pop()
        if isinstance(module, nn.Module):
            if isinstance(module.__dict__.get(ATTRIBUTE), Steering):
                return module
            names = ["_orig_mod", "module"]
            if type(module).__module__.partition(".")[0] == "peft":
                names += ["base_model", "model"]
            waiting += [getattr(module, name, None) for name in names]
    return None


def steering_of(model: nn.Module) -> tuple[nn.Module, Steering]:
    """Return the steered module and its steering, through the wrappers around it; raise if there is none."""
    base = steered_part(model)
    if base is None:
        raise SteerError(f"this {type(model).__name__} is not steered; call residual_steer.steer(model) first.")
    return base, base.__dict__[ATTRIBUTE]


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and stored buffer that is not steering's, under each of its plain names."""
    return {name: tensor for name, _, _, tensor in _base_entries(model)}


def _base_entries(model: nn.Module) -> list[Entry]:
    return [
        (plain_name(f"{path}.{name}" if path else name), module, name, tensor)
        for path, module in base_modules(model)
        for name, tensor in owned_tensors(module)
    ]


class _Watch:
    """Refuse a gradient for a parameter that trains no more, which autograd would drop without a word."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self._name, self._parameter = name, weakref.ref(parameter)

    def __call__(self, gradient: Tensor) -> None:
        parameter = self._parameter()
        if parameter is not None and not parameter.requires_grad:
            raise SteerError(
                f"backward() reached field {self._name!r} after a selection was made in which it does not train: its "
                "gradient would be lost. Call backward() before the selection changes, inside the `with`."
            )
