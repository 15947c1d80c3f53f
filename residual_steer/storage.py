"""save and load: a field on disk, in `steering.safetensors` and `steering.json`.

The description of the field stands in the header of the tensor file, with a SHA-256 over itself and every tensor, so
that one rename puts the whole field in place; `steering.json` is the same description for people and other programs.
Tensors are named by block (`blocks.3.up.weight`), not by the model's own module names. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from .errors import SteerError
from .files import as_path, make_folder, write_whole
from .identity import Identity
from .spec import FieldSpec, check_name, check_site
from .state import Steering, base_tensors, steering_of
from .steering import begin, install

__all__ = ["load", "save"]

TENSORS, DESCRIPTION = "steering.safetensors", "steering.json"
FORMAT, FORMAT_VERSION = "residual_steer", 1
_HEADER_KEY = "residual_steer"

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class _Stored:
    """A field as read from disk: checked in itself, not yet against a model."""

    spec: FieldSpec
    identity: Identity
    tensors: Mapping[str, Tensor]


def save(model: nn.Module, folder: str | Path, name: str | None = None) -> Path:
    """Save a field, and the base tensors trained with it.

    Args:
        model: a steered model.
        folder: where `steering.safetensors` and `steering.json` go; made if it is not there.
        name: which field; None is the selected one.

    Returns:
        The folder.

    Raises:
        SteerError: no such field, none selected, or the folder cannot be written; what it held before is untouched.
    """
    base, state = steering_of(model)
    name = state.name_of(name)
    spec = state.specs[name]
    stored = {key: value.detach().cpu().contiguous().clone() for key, value in state.tensors(base, name).items()}
    description = _describe(spec, Identity.of(base, state.backbone))
    description["sha256"] = _digest(description, stored)
    text = json.dumps(description, sort_keys=True)
    folder = as_path(folder)
    make_folder(folder)
    write_whole(
        {
            folder / DESCRIPTION: (json.dumps(description, indent=2, sort_keys=True) + "\n").encode(),
            folder / TENSORS: safetensors.torch.save(stored, {_HEADER_KEY: text}),  # the last rename decides
        }
    )
    return folder


def load(model: Model, folder: str | Path, name: str | None = None) -> Model:
    """Load a field that `save` wrote and select it, on a fresh backbone or beside other fields.

    Args:
        model: holds a backbone with the same number of blocks and the same widths. Another class or config of that
            shape is accepted with a warning that says what differs.
        folder: the folder that was given to `save`.
        name: what to call the field here; None keeps its name.

    Returns:
        The same object, frozen and steered.

    Raises:
        SteerError: no, foreign or damaged files, another backbone, missing or extra tensors, a name in use. The model
            is as it was.
    """
    stored = _read(as_path(folder))
    state = begin(model)
    spec = stored.spec if name is None else replace(stored.spec, name=name)
    check_name(spec.name, state.specs)
    here = Identity.of(model, state.backbone)
    if here.widths != stored.identity.widths or here.name != stored.identity.name:
        raise SteerError(
            f"the field was trained on {_shape(stored.identity)}; this model has {_shape(here)}. "
            "A field fits a backbone of its own kind, with as many blocks of the same widths."
        )
    check_site(spec.site, state.backbone)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise SteerError("this model is on the meta device and has no values yet. Materialise it, then load.")
    _check_tensors(model, state, spec, stored.tensors)
    different = stored.identity.differences(here)
    if different:
        warnings.warn(
            f"the field {spec.name!r} was trained on another backbone of the same shape ({'; '.join(different)}). "
            "It runs; whether it does here what it did there is for you to see.",
            stacklevel=2,
        )
    install(model, state, spec)
    with torch.no_grad():
        for key, tensor in state.tensors(model, spec.name).items():
            tensor.copy_(stored.tensors[key])
    return model


def _check_tensors(model: nn.Module, state: Steering, spec: FieldSpec, tensors: Mapping[str, Tensor]) -> None:
    """Hold the tensors of a stored field against what the model needs.

    Raises:
        SteerError: one is missing, left over, or of another shape.
    """
    here = base_tensors(model)
    absent = [key for key in spec.train if key not in here]
    if absent:
        raise SteerError(
            f"the field comes with trained base tensors that this model lacks: {', '.join(absent[:6])}. "
            "Give the model the same head before loading."
        )
    wanted = {f"train.{key}": here[key].shape for key in spec.train}
    for index in spec.ranks:
        for key, value in spec.build(index, state.backbone, device="meta").state_dict().items():
            wanted[f"blocks.{index}.{key}"] = value.shape
    for what, keys in (("missing", wanted.keys() - tensors.keys()), ("left over", tensors.keys() - wanted.keys())):
        if keys:
            raise SteerError(f"{TENSORS} does not hold what it says: {what} are {', '.join(sorted(keys)[:6])}.")
    for key, shape in wanted.items():
        if tensors[key].shape != shape:
            raise SteerError(f"tensor {key} has shape {tuple(tensors[key].shape)}; this model needs {tuple(shape)}.")


def _read(folder: Path) -> _Stored:
    """Read and check both files.

    Raises:
        SteerError: one is missing, damaged, or not what `save` writes.
    """
    try:
        content = (folder / TENSORS).read_bytes()
        text = (folder / DESCRIPTION).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        what = f"{error.strerror} ({Path(error.filename).name})" if isinstance(error, OSError) else str(error)
        raise SteerError(
            f"could not read a field from {folder}: {what}. `save` writes {TENSORS} and {DESCRIPTION}."
        ) from error
    try:
        json_file = json.loads(text)
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        described = json.loads(header["__metadata__"][_HEADER_KEY])
    except Exception as error:  # bytes from anywhere can fail in any way
        raise SteerError(
            f"{folder} holds no field, or a damaged one ({type(error).__name__}: {error}). Save it again."
        ) from error
    _parse(json_file, DESCRIPTION)
    spec, identity = _parse(described, TENSORS)
    if json_file["sha256"] == described["sha256"] and json_file != described:
        raise SteerError(f"{folder / DESCRIPTION} was changed after it was saved: it says other than {TENSORS}.")
    if described["sha256"] != _digest(described, tensors):
        raise SteerError(f"{folder / TENSORS} was changed after it was saved: its SHA-256 differs. Save it again.")
    return _Stored(spec, identity, tensors)


def _describe(spec: FieldSpec, identity: Identity) -> dict[str, Any]:
    """Put a field in JSON's words."""
    try:
        library = version("residual-steer")
    except PackageNotFoundError:
        library = "unknown"
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": library,
        "field": {
            "name": spec.name,
            "site": spec.site,
            "ranks": {str(index): rank for index, rank in spec.ranks.items()},
            "scale": spec.scale,
            "activation": spec.activation,
            "bias": spec.bias,
            "dropout": spec.dropout,
            "train": list(spec.train),
        },
        "backbone": {
            "name": identity.name,
            "class": identity.kind,
            "blocks": len(identity.widths),
            "widths": list(identity.widths),
            "config": dict(identity.config),
            "config_sha256": identity.config_hash,
        },
    }


_KINDS: dict[str, tuple[type, ...]] = {
    "format": (str,),
    "format_version": (int,),
    "library_version": (str,),
    "sha256": (str,),
    "field": (dict,),
    "field.name": (str,),
    "field.site": (str,),
    "field.ranks": (dict,),
    "field.scale": (int, float),
    "field.activation": (str,),
    "field.bias": (bool,),
    "field.dropout": (int, float),
    "field.train": (list,),
    "backbone": (dict,),
    "backbone.name": (str,),
    "backbone.class": (str,),
    "backbone.blocks": (int,),
    "backbone.widths": (list,),
    "backbone.config": (dict,),
    "backbone.config_sha256": (str,),
}


def _parse(described: Any, source: str) -> tuple[FieldSpec, Identity]:
    """Turn JSON's words into a field, refusing whatever `_describe` would not have written.

    Raises:
        SteerError: an entry is missing or of the wrong kind, or the format is not ours or newer.
    """
    for path, kinds in _KINDS.items():
        value = described
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise SteerError(
                f"{source} needs {' or '.join(kind.__name__ for kind in kinds)} at {path!r}; found {_short(value)}."
            )
    if described["format"] != FORMAT or described["format_version"] != FORMAT_VERSION:
        raise SteerError(
            f"{source} is of format {described['format']!r}, version {_short(described['format_version'])}; "
            f"this library reads {FORMAT!r}, version {FORMAT_VERSION}."
        )
    told, stands = described["field"], described["backbone"]
    widths = stands["widths"]
    if len(widths) != stands["blocks"] or any(type(width) is not int or width < 1 for width in widths):
        raise SteerError(f"{source} has {_short(widths)} as widths of {_short(stands['blocks'])} blocks.")
    indices = {str(index): index for index in range(len(widths))}
    if not told["ranks"] or any(key not in indices or type(rank) is not int for key, rank in told["ranks"].items()):
        raise SteerError(f"{source} has {_short(told['ranks'])} as ranks of {len(widths)} blocks.")
    if not all(isinstance(key, str) for key in told["train"]) or len(set(told["train"])) < len(told["train"]):
        raise SteerError(f"{source} has {_short(told['train'])} as names of trained tensors.")
    spec = FieldSpec(
        name=told["name"],
        site=told["site"],
        ranks={indices[key]: told["ranks"][key] for key in sorted(told["ranks"], key=lambda key: indices[key])},
        scale=told["scale"],
        activation=told["activation"],
        bias=told["bias"],
        dropout=told["dropout"],
        train=tuple(told["train"]),
    )
    identity = Identity(stands["name"], stands["class"], tuple(widths), stands["config"], stands["config_sha256"])
    return spec, identity


def _digest(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a description and its tensors."""
    digest = hashlib.sha256()
    described = {key: value for key, value in description.items() if key != "sha256"}
    digest.update(json.dumps(described, sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"\n{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _shape(identity: Identity) -> str:
    widths = sorted(set(identity.widths))
    return f"{identity.name}, {len(identity.widths)} blocks of width {', '.join(map(str, widths))}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
