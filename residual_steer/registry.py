"""The registry of backbones: who describes which class of model.

A family is registered by one call, the built-in ones too:

    @register_backbone("rwkv", matches=["transformers.RwkvModel"])
    def rwkv(model: nn.Module) -> Backbone:
        return Backbone(blocks=model.blocks, width=model.config.hidden_size, mixer="attention", mlp="feed_forward")

An installed package registers by naming its module under the entry point group `residual_steer.backbones`.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from torch import nn

from .backbone import Backbone
from .errors import SteerError

__all__ = ["backbones", "find_backbone", "register_backbone"]

ENTRY_POINTS = "residual_steer.backbones"

Describe = Callable[..., Backbone]


@dataclass(frozen=True)
class _Family:
    name: str
    matches: tuple[str, ...]
    describe: Describe


_families: dict[str, _Family] = {}
_plugins_loaded = False


def register_backbone(name: str, *, matches: Iterable[str]) -> Callable[[Describe], Describe]:
    """Register a function that describes a family of models.

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
        if name in _families:
            raise SteerError(f"a backbone is registered once; {name!r} is taken. Choose another name.")
        for family in _families.values():
            for match in set(wanted) & set(family.matches):
                raise SteerError(f"a class belongs to one backbone; {match} is described by {family.name!r} already.")
        _families[name] = _Family(name, wanted, describe)
        return describe

    return register


def backbones() -> tuple[str, ...]:
    """Return the names of all registered backbones, built-in ones and those of installed packages."""
    _load_plugins()
    return tuple(sorted(_families))


def find_backbone(model: nn.Module, arch: str | None = None) -> Backbone:
    """Find the one backbone in `model`.

    Args:
        model: any module; heads and wrappers around the backbone do not matter.
        arch: consider this registered backbone only.

    Returns:
        Its description, with `name` and `path` filled in.

    Raises:
        SteerError: `model` is no module, `arch` is unknown, no backbone is found, or several are.
    """
    if not isinstance(model, nn.Module):
        raise SteerError(f"a model is a torch.nn.Module; received {type(model).__name__}.")
    known = backbones()
    if arch is not None and (not isinstance(arch, str) or arch not in _families):
        raise SteerError(f"unknown backbone {arch!r}; registered are: {', '.join(known)}.")
    families = [_families[arch]] if arch is not None else list(_families.values())
    found = _search(model, {match: family for family in families for match in family.matches})
    if not found:
        looked_for = ", ".join(match for family in families for match in family.matches)
        raise SteerError(
            f"no known backbone in {type(model).__module__}.{type(model).__qualname__}: looked along the classes of "
            f"the model and its submodules for {looked_for}. Describe it yourself: "
            "@residual_steer.register_backbone('mine', matches=['package.Class']) on a function that returns a "
            "residual_steer.Backbone(blocks=..., width=...)."
        )
    if len(found) > 1:
        listed = ", ".join(f"model.{path} ({family.name})" for path, _, family in found)
        raise SteerError(
            f"several backbones in one model: {listed}. Steer one of them, for example steer(model.{found[0][0]}, ...)."
        )
    path, module, family = found[0]
    return replace(family.describe(module), name=family.name, path=path)


def _search(model: nn.Module, matches: dict[str, _Family]) -> list[tuple[str, nn.Module, _Family]]:
    """Return the outermost matching modules as (path, module, family)."""
    found: list[tuple[str, nn.Module, _Family]] = []
    seen: set[int] = set()

    def visit(module: nn.Module, path: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        for cls in type(module).__mro__:
            package = cls.__module__.partition(".")[0]
            family = matches.get(f"{cls.__module__}.{cls.__qualname__}") or matches.get(f"{package}.{cls.__qualname__}")
            if family:
                found.append((path, module, family))
                return
        for name, child in module.named_children():
            visit(child, f"{path}.{name}" if path else name)

    visit(model, "")
    return found


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
            distribution = entry.dist.name if entry.dist else "an unknown distribution"
            warnings.warn(
                f"the backbone plugin {entry.name!r} of {distribution} was skipped: {type(error).__name__}: {error}",
                stacklevel=4,
            )
