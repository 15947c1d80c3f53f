"""A steered model of transformers as a folder that loads anywhere, without this library: the fields are baked in."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ._controller import Steering, steering_of
from ._files import as_path, make_folder
from ._state_dict import ENTRY
from .backbone import read_stream, site_of, write_stream
from .errors import SteerError
from .injector import Injector
from .trained_modules import Switch

__all__ = ["export"]

_CODE = "modeling_steered"  # a module of the folder
_AUTO = {  # which of transformers' automatic classes have which of its mappings
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "AutoModel": "MODEL_MAPPING",
}


def export(model: nn.Module, folder: str | Path) -> Path:
    """Write a steered model of transformers with what is selected baked in, heads that fields trained included.

    The folder loads by transformers alone, `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`: its
    code is one short file beside the weights. Of a mix with weights the sum is written; nothing can be selected there.

    Args:
        model: a steered model of transformers, with one or more fields selected.
        folder: where to; made if it is not there.

    Returns:
        The folder.

    Raises:
        SteerError: nothing is selected, or rows; a field runs at a linear map; the model is none of transformers, or
            has no automatic class; or its family reads the stream in a way of its own.
    """
    root, state = steering_of(model)
    transformers = _library(root)
    weights = _weights(state)
    if (state.backbone.read, state.backbone.write) != (read_stream, write_stream) or state.backbone.inplace:
        raise SteerError(
            f"the family {state.backbone.name!r} reads the stream in its own way: `save` its field instead."
        )
    autos = _auto_classes(transformers, root)
    points, tensors = _points(root, state, weights)
    ours = [f"{name}." for name, part in root.named_modules() if isinstance(part, (Injector, Switch))]
    tensors |= {k: value for k, value in root.state_dict().items() if not k.startswith((*ours, f"{ENTRY}."))}
    folder = as_path(folder)
    make_folder(folder)
    kind: Any = type(root)
    kind.save_pretrained(root, folder, state_dict=tensors)
    code = Path(__file__).with_name("exported.py").read_text("utf-8")
    name = f"Steered{kind.__name__}"
    code = code.replace("import PreTrainedModel as Base", f"import {kind.__name__} as Base").replace(
        "Steered(", f"{name}("
    )
    (folder / f"{_CODE}.py").write_text(code, "utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config |= {"steering": points, "architectures": [name], "auto_map": dict.fromkeys(autos, f"{_CODE}.{name}")}
    path.write_text(json.dumps(config, indent=2) + os.linesep, "utf-8")
    return folder


def _library(root: nn.Module) -> Any:
    """Return transformers, if the model is one of its own."""
    transformers: Any = sys.modules.get("transformers")
    if transformers is None or not isinstance(root, transformers.PreTrainedModel):
        raise SteerError(f"`export` writes models of transformers; received {type(root).__name__}. `save` its field.")
    if getattr(transformers, type(root).__name__, None) is not type(root):
        raise SteerError(f"{type(root).__name__} is no class that transformers ships: `save` its field instead.")
    return transformers


def _weights(state: Steering) -> dict[str, float]:
    """Return the fields that act, and how strongly."""
    mix = state.mix
    mix.check_whole("an exported model")
    if mix.rows is not None or not mix.names:
        what = "no field acts" if mix.rows is None else "every row has a field of its own"
        raise SteerError(f"`export` bakes in the fields that act, the same in every row; {what}. Select with `use`.")
    return dict(zip(mix.names, mix.table[0], strict=True))


def _auto_classes(transformers: Any, root: nn.Module) -> list[str]:
    """Return by which of its automatic classes transformers loads such a model."""
    config: Any = type(root.config)
    found = [
        auto for auto, mapping in _AUTO.items() if getattr(transformers, mapping, {}).get(config, None) is type(root)
    ]
    if not found:
        raise SteerError(
            f"transformers loads a {type(root).__name__} by none of {', '.join(_AUTO)}: `save` its field instead."
        )
    return found


def _points(
    root: nn.Module, state: Steering, weights: dict[str, float]
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Return what is added where, and the tensors of it, by their keys in the exported model."""
    paths = {id(module): path for path, module in root.named_modules(remove_duplicate=False)}
    points: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    # what acts last at a block is hooked first
    for injector in sorted(state.injectors.values(), key=lambda one: one.site != "after"):
        fields = {name: field for name, field in injector.held.items() if name in weights}
        if not fields:
            continue
        if site_of(injector.site).projection:
            raise SteerError(
                f"`export` has no place for a field at a linear map, {injector.site!r}, since nothing there would "
                "see whether it is called: `save` the field instead."
            )
        for place, field in enumerate(fields.values()):
            values = {f"steering.{len(points)}.{place}.{key}": value for key, value in field.state_dict().items()}
            tensors |= {key: value.to(injector.compute_dtype) for key, value in values.items()}
        described = [
            {
                "width": field.width,
                "rank": field.rank,
                "bias": field.down.bias is not None,
                "activation": field.activation,
                "alpha": field.scale * weights[name],
                "channels": field.channels,
            }
            for name, field in fields.items()
        ]
        points.append({"module": paths[id(injector.host)], "site": injector.site, "fields": described})
    if any(not value.isfinite().all() for value in tensors.values()):
        raise SteerError("a field holds NaN or infinite numbers. Train it again.")
    return points, tensors
