"""The state of a null space: held against a model before it is believed, and kept as one safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .errors import SteerError
from .files import as_path, make_folder, write_whole
from .protection import Held
from .subspace import Subspace

__all__ = ["FORMAT", "parse_space", "read_space", "write_space"]

_KEY, FORMAT = "residual_steer.null_space", 1
_ORTHONORMAL = 1e-6  # how far UᵀU may be from the identity


def parse_space(
    state: Mapping[str, Any], where: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, Held], dict[str, list[float]]]:
    """Return what is held at every point, and the share of every task's energy.

    Args:
        state: what `NullSpace.state_dict` returned.
        where: what it has to agree with: format, backbone, site, energy.
        shapes: outputs and inputs of the projection at every point.

    Raises:
        SteerError: it belongs to something else, or is damaged.
    """
    if not isinstance(state, Mapping) or state.get("format") != FORMAT or not isinstance(state.get("points"), Mapping):
        raise SteerError("this is no state of a NullSpace, or one of another version; it comes from `state_dict()`.")
    wrong = [f"{key} {state.get(key)!r}, here {value!r}" for key, value in where.items() if state.get(key) != value]
    if state["points"].keys() != shapes.keys():
        wrong.append(f"projections {_few(state['points'])}, here {_few(shapes)}")
    if wrong:
        raise SteerError(f"this state belongs to another NullSpace: {'; '.join(wrong)}. Make this one as that one was.")
    held: dict[str, Held] = {}
    shares: dict[str, list[float]] = {}
    for key, (outputs, inputs) in shapes.items():
        point = state["points"][key]
        try:
            basis, response, shares[key] = point["basis"], point["response"], [float(s) for s in point["shares"]]
            sizes, dimensions = (tuple(basis.shape), tuple(response.shape)), basis.shape[1]
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise SteerError(f"the state of {key} is damaged ({type(error).__name__}: {error}).") from error
        if sizes != ((inputs, dimensions), (outputs, dimensions)):
            raise SteerError(
                f"this state belongs to a model of other sizes: at {key} it has {sizes[0]} and {sizes[1]}, where this "
                f"model has {inputs} inputs and {outputs} outputs. Steer with the same rank."
            )
        basis, response = (tensor.detach().cpu().double().clone() for tensor in (basis, response))
        off = basis.t() @ basis - torch.eye(basis.shape[1], dtype=basis.dtype)
        if not bool(torch.isfinite(response).all()) or not float(off.abs().amax() if off.numel() else 0) < _ORTHONORMAL:
            raise SteerError(f"the state of {key} is damaged: its directions are not orthonormal, or not finite.")
        held[key] = Held(Subspace(basis), response)
    if len({len(each) for each in shares.values()}) > 1:
        raise SteerError("this state is damaged: its projections saw different numbers of tasks.")
    return held, shares


def write_space(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a state: tensors, and the rest as JSON in the header.

    Raises:
        SteerError: it cannot be written; what was there before is untouched.
    """
    place = as_path(path)
    points: Mapping[str, Mapping[str, Any]] = state["points"]
    tensors: dict[str, Tensor] = {
        f"{key}.{part}": point[part].contiguous() for key, point in points.items() for part in ("basis", "response")
    }
    plain = {**state, "points": {key: {"shares": point["shares"]} for key, point in points.items()}}
    make_folder(place.parent)
    write_whole({place: safetensors.torch.save(tensors, {_KEY: json.dumps(plain)})})


def read_space(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the state that `write_space` wrote.

    Raises:
        SteerError: there is no such file, or it is damaged or something else.
    """
    place = as_path(path)
    try:
        content = place.read_bytes()
    except OSError as error:
        raise SteerError(f"could not read {place}: {error.strerror or error}.") from error
    try:
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        state: dict[str, Any] = json.loads(header["__metadata__"][_KEY])
        for key, point in state["points"].items():
            point.update({part: tensors[f"{key}.{part}"] for part in ("basis", "response")})
    except Exception as error:  # bytes from anywhere can fail in any way
        raise SteerError(
            f"{place} is damaged or was not written by NullSpace.save ({type(error).__name__}: {error})."
        ) from error
    return state


def _few(keys: Mapping[str, Any]) -> str:
    names = list(map(str, keys))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "none"
