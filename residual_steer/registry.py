"""The registry of backbones: who describes which class of model.

A model that nobody describes goes to `residual_steer.discovery`, which proves where its stream is.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ._checks import check_model
from .backbone import ATTRIBUTE, Backbone, LayoutError
from .discovery import discover, is_marked
from .errors import SteerError
from .stream import prepared

__all__ = ["find_backbone", "list_backbones", "own_backbone", "register_backbone", "same_blocks"]

ENTRY_POINTS = "residual_steer.backbones"
AUTO, CUSTOM = "auto", "custom"

Describe = Callable[..., Backbone]

_BY_HAND = (
    "Describe it yourself: steer(model, residual_steer.Backbone(blocks=[...], width=...)), or, for every model of its "
    "class, @residual_steer.register_backbone('mine', matches=['package.Class']) on a function that returns a "
    "residual_steer.Backbone."
)


@dataclass(frozen=True)
class _Family:
    name: str
    matches: tuple[str, ...]
    describe: Describe


_Found = tuple[str, nn.Module, _Family]  # the path of a module, the module, and who describes it
_families: dict[str, _Family] = {}
_plugins_loaded = False


def register_backbone(name: str, *, matches: Iterable[str]) -> Callable[[Describe], Describe]:
    """Register a function that describes a family of models.

    >>> @register_backbone("mine", matches=["my_package.MyModel"])
    ... def mine(model: nn.Module) -> Backbone:
    ...     return Backbone(blocks=model.blocks, width=model.config.hidden_size, mixer="attention", mlp="feed_forward")

    An installed package names the module that does so under the entry point group `residual_steer.backbones`.

    Args:
        name: what users pass as `arch`.
        matches: qualified class names, `"package.Class"` (whatever module of the package defines it) or
            `"package.module.Class"`. They are tried along the MRO of the model and of its submodules, so that heads,
            wrappers and subclasses do not matter and nothing is imported to find out.

    Returns:
        A decorator for a function from the matched module to its `Backbone`.

    Raises:
        SteerError: the name or one of the classes is registered already, or `matches` is empty or a bare string.
    """
    if isinstance(matches, str):
        raise SteerError(f"`matches` is a list of qualified class names; received the string {matches!r}.")
    wanted = tuple(matches)
    if not wanted or not all(isinstance(match, str) and "." in match for match in wanted):
        raise SteerError(f"`matches` needs qualified class names such as 'transformers.GPT2Model'; received {wanted}.")

    def register(describe: Describe) -> Describe:
        if name in _families or name in {AUTO, CUSTOM}:
            raise SteerError(f"a backbone is registered once; {name!r} is taken. Choose another name.")
        for family in _families.values():
            for match in set(wanted) & set(family.matches):
                raise SteerError(f"a class belongs to one backbone; {match} is described by {family.name!r} already.")
        _families[name] = _Family(name, wanted, describe)
        return describe

    return register


def list_backbones(name: str | None = None) -> tuple[str, ...]:
    """Return the names of all registered backbones, or the classes that one of them describes, as `"package.Class"`.

    Raises:
        SteerError: `name` is unknown.
    """
    _load_plugins()
    return tuple(sorted(_families)) if name is None else _family(name).matches


def find_backbone(model: nn.Module, arch: str | None = None, *, example: Any = None) -> Backbone:
    """Find the one backbone in `model`.

    Registered families are recognised by their classes. For a model of none of them, or with `arch="auto"`, the model
    is run on a tiny input, and modules that hand a stream on as z + g(z) are proved from the graph of that run.

    Args:
        model: any module; heads and wrappers around the backbone do not matter. It is afterwards as it was.
        arch: consider this registered backbone only; `"auto"` asks none.
        example: a batch to run a model on that no family describes: a tensor, a tuple of arguments or a dict of
            keywords. None makes one from what the model says of itself.

    Returns:
        Its description, with `name` and `path` filled in. A model that is steered already has the one it is steered by.

    Raises:
        SteerError: `model` is no module, `arch` is unknown, no backbone is found or proved, or several are and its
            output depends on more than one stream.
    """
    steered = _steered(check_model(model))
    if steered is not None and arch in (None, steered.name) and arch != AUTO:
        return steered
    _load_plugins()
    return prepared(model, discover(model, example) if arch == AUTO else _registered(model, arch, example))


def _registered(model: nn.Module, arch: str | None, example: Any) -> Backbone:
    """Return what the families say of a model, and what a run shows where they say nothing, or too much."""
    families = [_family(arch)] if arch is not None else list(_families.values())
    found = list(_search(model, "", {match: family for family in families for match in family.matches}, set()))
    if len(found) > 1:
        return _of_several(model, found, None, arch, example)
    if found:
        path, module, family = found[0]
        try:
            described = replace(family.describe(module), name=family.name, path=path)
        except Exception as error:  # releases and options of a library rename and remove parts, in any way
            if isinstance(error, SteerError) and not isinstance(error, LayoutError):  # the family refuses this model
                raise
            why = f"{error}".rstrip(".") if isinstance(error, LayoutError) else f"{type(error).__name__}: {error}"
        else:
            inside = {id(part) for part in module.modules()}
            whole = not any(is_marked(part) and id(part) not in inside for part in model.modules())
            return described if whole or arch is not None else _of_several(model, found, described, arch, example)
        refusal = f"{family.name!r} describes {_qualified(type(module))}, and this one is laid out otherwise ({why})."
    else:
        refusal = (
            f"no known backbone in {_qualified(type(model))}: looked along the classes of the model and its submodules "
            f"for those of {', '.join(sorted(family.name for family in families))} "
            f"(residual_steer.list_backbones({families[0].name!r}) lists a family's classes)."
        )
    if arch is not None:
        raise SteerError(f"{refusal} {_BY_HAND}")
    try:
        return discover(model, example)
    except SteerError as refused:
        raise SteerError(f"{refused} Before that, {refusal} {_BY_HAND}") from refused


def _of_several(
    model: nn.Module, found: list[_Found], described: Backbone | None, arch: str | None, example: Any
) -> Backbone:
    """Return the one stream on which the output of a model with several backbones depends, as a run shows."""
    # so a language model is found beside the tower that reads its images, whether both are registered or only the tower
    # (then `described`), and an encoder with the decoder behind it
    listed = [f"model.{path} ({family.name})" for path, _, family in found]
    refusal = (
        f"several backbones in one model: {', '.join(listed)}. Steer one of them, for example "
        f"steer(model.{found[0][0]}, ...)."
    )
    if arch is not None:
        raise SteerError(refusal)
    try:
        proved = discover(model, example, dominant=False)
    except SteerError as refused:
        if described is not None:
            return described
        raise SteerError(refusal) from refused
    blocks = set(map(id, proved.blocks))
    beside = [
        name for name, (_, one, _) in zip(listed, found, strict=True) if blocks.isdisjoint(map(id, one.modules()))
    ]
    if not beside:
        return described or proved
    return replace(proved, origin=f"{proved.origin}; not part of it: {', '.join(beside)}")


def _family(name: str) -> _Family:
    if not isinstance(name, str) or name not in _families:
        known = ", ".join(sorted(_families))
        raise SteerError(f"unknown backbone {name!r}; registered are: {known}; 'auto' looks for itself.")
    return _families[name]


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def own_backbone(model: nn.Module, backbone: Backbone) -> Backbone:
    """Return a description of this model that was made by hand, or by an earlier call, named "custom" or as it was."""
    modules = {id(module): path for path, module in model.named_modules()}
    for index, block in enumerate(backbone.blocks):
        if id(block) not in modules:
            raise SteerError(
                f"a Backbone's blocks are modules of the model that is steered; block {index}, a "
                f"{type(block).__name__}, is none of this {type(model).__name__}. Describe this very model."
            )
    if backbone.path and backbone.path not in modules.values():
        raise SteerError(f"a Backbone's `path` leads to a module of the model; received {backbone.path!r}.")
    return prepared(model, replace(backbone, name=backbone.name or CUSTOM))


def same_blocks(one: Backbone, other: Backbone) -> bool:
    """Return whether two descriptions are of the same blocks."""
    return [id(block) for block in one.blocks] == [id(block) for block in other.blocks]


def _steered(model: nn.Module) -> Backbone | None:
    """Return the backbone that a model is steered by, through wrappers around it."""
    for path, module in model.named_modules():
        backbone = getattr(module.__dict__.get(ATTRIBUTE), "backbone", None)
        if isinstance(backbone, Backbone):
            return replace(backbone, path=".".join(part for part in (path, backbone.path) if part))
    return None


def _search(module: nn.Module, path: str, matches: dict[str, _Family], seen: set[nn.Module]) -> Iterator[_Found]:
    """Yield the outermost modules that match, each once."""
    if module in seen:
        return
    seen.add(module)
    for cls in type(module).__mro__:
        short = f"{cls.__module__.partition('.')[0]}.{cls.__qualname__}"
        family = matches.get(_qualified(cls)) or matches.get(short)
        if family:
            yield path, module, family
            return
    for name, child in module.named_children():
        yield from _search(child, f"{path}.{name}" if path else name, matches, seen)


def _load_plugins() -> None:
    """Import what installed packages registered under the entry point group, once; warn of what fails, and go on."""
    global _plugins_loaded
    if _plugins_loaded:
        return
    _plugins_loaded = True
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        before = dict(_families)
        try:
            entry.load()
        except Exception as error:  # a plugin may fail in any way; ours must go on working
            _families.clear()
            _families.update(before)
            plugin = f"{entry.name!r} of {entry.dist.name if entry.dist else 'an unknown distribution'}"
            message = f"the backbone plugin {plugin} was skipped: {type(error).__name__}: {error}"
            warnings.warn(message, stacklevel=4)
