"""H-Res as a method of PEFT: importing this module registers it, and PEFT's tools take `HResConfig` from then on."""

from __future__ import annotations

try:
    import peft
except ImportError as error:
    raise ImportError("residual_steer.peft needs PEFT: pip install 'residual-steer[peft]'.") from error

if tuple(map(int, peft.__version__.split(".")[:2])) < (0, 18):  # older tuners have no layer class of their own
    raise ImportError(f"residual_steer.peft needs peft 0.18 or newer; found {peft.__version__}.")

from ._config import HResConfig
from ._layer import HResLayer
from ._model import HResModel
from ._registry import register

__all__ = ["HResConfig", "HResLayer", "HResModel"]

register(HResConfig, HResModel)
