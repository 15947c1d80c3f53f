"""Residual-stream steering for frozen networks, whatever their architecture (H-Res, arXiv 2606.24396)."""

from typing import TYPE_CHECKING

from . import baselines, continual, data, diagnostics
from .backbone import Backbone
from .errors import SteerError
from .field import HRes
from .overview import fields, summary
from .registry import find_backbone, register_backbone
from .steering import freeze, parameters, steer, thaw, unsteer, use
from .storage import load, push, save
from .training import fit

if TYPE_CHECKING:
    from .registry import backbones
else:
    from . import backbones  # the package of families, which can be called: backbones()

__all__ = [
    "Backbone",
    "HRes",
    "SteerError",
    "backbones",
    "baselines",
    "continual",
    "data",
    "diagnostics",
    "fields",
    "find_backbone",
    "fit",
    "freeze",
    "load",
    "parameters",
    "push",
    "register_backbone",
    "save",
    "steer",
    "summary",
    "thaw",
    "unsteer",
    "use",
]
