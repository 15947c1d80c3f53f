"""Residual-stream steering for frozen networks, whatever their architecture (H-Res, arXiv 2606.24396)."""

import importlib
from typing import TYPE_CHECKING, Any

from .backbone import Backbone
from .errors import SteerError
from .export import export
from .field import HRes
from .prefix_cache import PrefixCache as _PrefixCache  # noqa: F401 – which tells fit of `cache_prefix`
from .pretrained import from_pretrained
from .reference import reference
from .registry import find_backbone, list_backbones, register_backbone
from .steering import fields, freeze, parameters, steer, summary, thaw, unsteer, use
from .storage import card, load, push, save
from .training import fit

if TYPE_CHECKING:
    from . import baselines, continual, data, diagnostics

importlib.import_module(".backbones", __name__)  # the built-in families register themselves

__all__ = [
    "Backbone",
    "HRes",
    "SteerError",
    "baselines",
    "card",
    "continual",
    "data",
    "diagnostics",
    "export",
    "fields",
    "find_backbone",
    "fit",
    "freeze",
    "from_pretrained",
    "list_backbones",
    "load",
    "parameters",
    "push",
    "reference",
    "register_backbone",
    "save",
    "steer",
    "summary",
    "thaw",
    "unsteer",
    "use",
]

_LATER = frozenset({"baselines", "continual", "data", "diagnostics", "peft", "vllm"})  # imported when asked for


def __getattr__(name: str) -> Any:
    """Import a part that not everybody needs, which takes more than half of all the time.

    Raises:
        AttributeError: there is no such part.
    """
    if name in _LATER:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List what is here and what comes later."""
    return sorted({*globals(), *_LATER})
