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

# Entries of a transformers config that say how a model is run, stored or labelled, not how it computes its stream.
_VOLATILE = frozenset(
    (
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "dtype",
        "experts_implementation",
        "finetuning_task",
        "gradient_checkpointing",
        "id2label",
        "label2id",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "quantization_config",
        "return_dict",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_bfloat16",
        "use_cache",
        "use_falcon_mambapy",
        "use_mambapy",
    )
)
_TOKENS = ("token_id", "token_ids", "token_index")  # how the names of special tokens end
_LONGEST = 200  # characters of a list that is compared


@dataclass(frozen=True)
class Identity:
    """The identity of a backbone.

    Attributes:
        name: registered name.
        kind: qualified name of its class.
        widths: width of the stream at every block.
        config: the plain values of its config that shape the stream, entries of nested ones as `outer.inner`.
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
        whole = _flat(_config(module))
        text = json.dumps(whole, sort_keys=True, default=repr)
        return cls(
            name=backbone.name,
            kind=f"{type(module).__module__}.{type(module).__qualname__}",
            widths=backbone.widths,
            config=whole,
            config_hash=hashlib.sha256(text.encode()).hexdigest(),
        )

    def differences(self, other: Identity) -> list[str]:
        """Return in words in what `other` differs from this one, apart from its widths.

        Entries that one of the two lacks come of another release of their library, and are no difference.
        """
        if self.kind != other.kind:
            return [f"class {self.kind} against {other.kind}"]
        both = sorted(key for key in self.config.keys() & other.config.keys() if not _is_volatile(key))
        changed = [key for key in both if self.config[key] != other.config[key]]
        told = [f"{key} {self.config[key]!r} against {other.config[key]!r}" for key in changed]
        return [f"config: {', '.join(told[:6])}{', …' if len(told) > 6 else ''}"] if told else []


def _is_volatile(key: str) -> bool:
    return any(part in _VOLATILE or part.endswith(_TOKENS) for part in key.split("."))


def _flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return the plain values of a config and of those inside it, lists as JSON."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{before}{key}"
        if _is_volatile(name):
            continue
        if isinstance(value, Mapping):
            found |= _flat({str(k): v for k, v in value.items()}, f"{name}.")
        elif isinstance(value, (list, tuple)):
            text = json.dumps(value, default=repr)
            found |= {name: text} if len(text) <= _LONGEST else {}
        elif isinstance(value, (bool, int, float, str)):
            found[name] = value
    return found


def _config(module: nn.Module) -> dict[str, Any]:
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    return {}
