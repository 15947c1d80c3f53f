"""What a backbone is, so that a field can tell where it was trained from where it is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .backbone import Backbone

__all__ = ["Identity"]

# Entries of a transformers config that say how a model is run or stored, not what it computes.
_VOLATILE = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "dtype",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "use_mambapy",
    }
)


@dataclass(frozen=True)
class Identity:
    """The identity of a backbone.

    Attributes:
        name: registered name.
        kind: qualified name of its class.
        widths: width of the stream at every block.
        config: the plain values of its config, if it has one.
        config_hash: SHA-256 of the whole config.
    """

    name: str
    kind: str
    widths: tuple[int, ...]
    config: Mapping[str, Any]
    config_hash: str

    @classmethod
    def of(cls, model: nn.Module, backbone: Backbone) -> Identity:
        """Identify the backbone that was found in `model`."""
        module = model.get_submodule(backbone.path)
        whole = {key: value for key, value in _config(module).items() if key not in _VOLATILE}
        text = json.dumps(whole, sort_keys=True, default=repr)
        return cls(
            name=backbone.name,
            kind=f"{type(module).__module__}.{type(module).__qualname__}",
            widths=backbone.widths,
            config={key: value for key, value in whole.items() if isinstance(value, (bool, int, float, str))},
            config_hash=hashlib.sha256(text.encode()).hexdigest(),
        )

    def differences(self, other: Identity) -> list[str]:
        """Say in words in what `other` differs from this one, apart from its widths."""
        found = []
        if self.kind != other.kind:
            found.append(f"class {self.kind} against {other.kind}")
        elif self.config_hash != other.config_hash:
            keys = sorted(set(self.config) | set(other.config))
            changed = [key for key in keys if self.config.get(key) != other.config.get(key)]
            told = [f"{key} {self.config.get(key)!r} against {other.config.get(key)!r}" for key in changed]
            found.append(f"config: {', '.join(told[:6]) or 'nested entries'}{', …' if len(told) > 6 else ''}")
        return found


def _config(module: nn.Module) -> dict[str, Any]:
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    return {}
