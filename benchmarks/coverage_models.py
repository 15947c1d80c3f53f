"""Which models the table of coverage has, and how each is built small with random weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

# No module of these returns what entered it plus something: chains, concatenations, and streams that grow. (VoVNet's
# largest members do.)
NO_STREAM = {
    *("densenet", "dpn", "inception_v3", "inception_v4", "mobilenet_v1", "nasnet", "pnasnet", "pp_lcnet", "rdnet"),
    *("rexnet", "selecsls", "vgg", "vovnet"),
}
LIMIT = 30_000_000  # parameters
KINDS = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
    "masked": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES",),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
    "image": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",),
    "audio": ("MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES", "MODEL_FOR_CTC_MAPPING_NAMES"),
}


class UnbuiltError(Exception):
    """The model could not be built below the limit; the message says why."""


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        kind: `causal`, `masked`, `seq2seq`, `image`, `audio` or `timm`.
        name: model type of transformers, or module of timm.
        model: the class, or the name that timm creates.
        build: returns the model, or raises UnbuiltError.
    """

    kind: str
    name: str
    model: str
    build: Callable[[], nn.Module]


def entries(kind: str) -> list[Entry]:
    """Return all models of a kind."""
    return list(_of_timm() if kind == "timm" else _of_transformers(kind))


def _of_transformers(kind: str) -> Iterator[Entry]:
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    done: set[str] = set()
    for mapping in KINDS[kind]:
        for model_type, names in getattr(auto, mapping).items():
            for name in [names] if isinstance(names, str) else names:
                if f"{model_type} {name}" not in done:
                    done.add(f"{model_type} {name}")
                    yield Entry(kind, model_type, name, lambda t=model_type, n=name: _transformer(t, n))


def _transformer(model_type: str, name: str) -> nn.Module:
    import torch
    import transformers

    from coverage_shrink import shrunk

    try:
        cls = getattr(transformers, name)
        config = shrunk(cls.config_class, (name, model_type))
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in cls(config).parameters())
    except Exception as error:  # whatever a config or a class refuses
        raise UnbuiltError(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from error
    if size > LIMIT:
        raise UnbuiltError(f"{size / 1e6:.0f}M parameters with all that was shrunk")
    torch.manual_seed(0)
    return cls(config)


def _of_timm() -> Iterator[Entry]:
    import timm

    for module in timm.list_modules():
        names = [
            name for name in timm.list_models(module=module) if not name.startswith("test_") and name not in _WITHOUT
        ]
        names = names or timm.list_models(module=module)
        if names:
            yield Entry("timm", module, "", lambda m=module, n=tuple(names): _smallest(m, n))


def _smallest(module: str, names: tuple[str, ...]) -> nn.Module:
    """Build the smallest member of a module, its input and depth as small as it takes.

    Raises:
        UnbuiltError: none can be built below the limit.
    """
    import timm
    import torch

    names = tuple(sorted(names, key=lambda name: not any(hint in name for hint in _HINTS)))
    limit = 5 * LIMIT if module in NO_STREAM else LIMIT  # what is only refused costs little
    errors = ""
    sizes: dict[str, int] = {}
    for name in names:
        try:
            with torch.device("meta"):
                sizes[name] = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        except Exception as error:  # some compute with values while they are built
            errors = errors or f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        if len(sizes) == 5:
            break
    for name in sorted(sizes, key=lambda name: sizes[name]) or names[:1]:
        for settings in _OWN.get(module, _SETTINGS):
            try:
                with torch.device("meta"):
                    size = sum(p.numel() for p in timm.create_model(name, **settings).parameters())
            except Exception:
                continue
            if size <= limit:
                torch.manual_seed(0)
                return timm.create_model(name, **settings)
        try:
            torch.manual_seed(0)
            model = timm.create_model(name, **_INPUT)
        except Exception as error:
            errors = errors or f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            continue
        if sum(parameter.numel() for parameter in model.parameters()) <= limit:
            return model
    raise UnbuiltError(errors or f"its smallest member has {min(sizes.values()) / 1e6:.0f}M parameters")


_INPUT = {"pretrained_cfg_overlay": {"input_size": (3, 64, 64)}}
_WITHOUT = {"resnest14d"}  # has one block a stage, and each changes the width
_HINTS = ("atto", "femto", "pico", "nano", "xxs", "_xxt", "tiny", "_s12", "18", "_xs", "mini", "_t0", "_b0", "small")
_SETTINGS: tuple[dict[str, Any], ...] = (
    {"img_size": 64, "depth": 4, **_INPUT},
    {"img_size": 64, "depth": 4, "embed_dim": 64, "num_heads": 4, **_INPUT},
    {"depth": 4, **_INPUT},
    {"img_size": 64, **_INPUT},
    _INPUT,
)
_OWN: dict[str, tuple[dict[str, Any], ...]] = {
    "cait": ({"img_size": 64, "depth": 8},),  # beside two blocks of class attention
    "crossvit": ({},),
    "nextvit": ({"depths": (1, 2, 5, 2), **_INPUT},),
    "selecsls": ({"num_classes": 10, **_INPUT},),
    "tresnet": ({"num_classes": 10, **_INPUT},),
}
