"""Which field a request is served under, as vLLM's LoRA requests have it, and the units behind such a request.

vLLM keeps what it computed of a prompt under the name and the path of the request's adapter. The path here holds the
SHA-256 of every field, `{"/fields/law": [1.0, "5e0c…"]}`: one that is saved anew is another one, and never meets what
was computed under the old one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from residual_steer._checks import check_number
from residual_steer._field_file import Stored, open_field
from residual_steer.config import Place
from residual_steer.errors import SteerError, some
from residual_steer.field import HRes
from residual_steer.storage import as_type, match_tensors

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


class Units(NamedTuple):
    """Hidden units of one or more fields side by side at one place, weights and λ multiplied into what they add."""

    down: Tensor  # (units, width)
    down_bias: Tensor  # (units,)
    up: Tensor  # (units, width)
    up_bias: Tensor  # (width,)
    runs: tuple[tuple[str, int], ...]  # activation and number of units of each field


@dataclass(frozen=True)
class Mix:
    """Weights and open files of one or more fields, by folder; a file that is replaced stays readable here."""

    parts: Mapping[str, tuple[float, Stored]]

    @classmethod
    def open(cls, asked: str) -> Mix:
        """Open a folder, weights by folder as JSON, or what `path` returned; raise if that cannot be served."""
        parts: dict[str, tuple[float, Stored]] = {}
        for folder, (weight, sha256) in _parse(asked).items():
            stored = open_field(Path(folder))
            if not stored.spec.sites.keys() <= {"block", "after"}:
                raise SteerError(f"vLLM serves 'block' and 'after'; the field in {folder} is at {stored.spec.site!r}.")
            if stored.spec.train:
                raise SteerError(
                    f"vLLM serves one frozen model to all requests; the field in {folder} comes with trained base "
                    f"tensors ({some(stored.spec.train)}). Train one without `train`."
                )
            if sha256 not in (None, stored.described["sha256"]):
                raise SteerError(
                    f"the field in {folder} was saved anew since this request was made. Make the request again, or "
                    "unload the name and load it again."
                )
            parts[folder] = weight, stored
        return cls(parts)

    @property
    def path(self) -> str:
        """The mix as a text that names its contents."""
        pins = {folder: [weight, stored.described["sha256"]] for folder, (weight, stored) in self.parts.items()}
        return json.dumps(pins)

    @property
    def rank(self) -> int:
        """The most units at one place."""
        units: dict[Place, int] = {}
        for _, stored in self.parts.values():
            for site, index in stored.spec.places:
                units[site, index] = units.get((site, index), 0) + stored.spec.sites[site][index]
        return max(units.values())

    def read(self, dtype: torch.dtype = torch.float32) -> dict[Place, Units]:
        """Read the units of every place in a type; raise if a file is damaged or a number is not finite."""
        found: dict[Place, list[Units]] = {}
        for weight, stored in self.parts.values():
            for place, units in _read(stored, weight).items():
                found.setdefault(place, []).append(units)
        return {place: _side_by_side(units, place, dtype) for place, units in found.items()}


def request(fields: str | Path | Mapping[str, float]) -> LoRARequest:
    """Return the request that vLLM serves under a field, or under several with weights, which take one slot.

    >>> llm.generate(prompts, lora_request=[rs.vllm.request("fields/law"), None])
    >>> llm.generate(prompts, lora_request=rs.vllm.request({"fields/squad": 0.7, "fields/law": -0.3}))

    Args:
        fields: the folder that `save` wrote, or weights by folder.

    Raises:
        SteerError: no or damaged files, a field that cannot be served, or a weight that is no number.
        ImportError: vLLM is not installed.
    """
    try:
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        raise ImportError("residual_steer.vllm needs vLLM: pip install 'residual-steer[vllm]'.") from error
    mix = Mix.open(json.dumps(dict(fields)) if isinstance(fields, Mapping) else os.fspath(fields))
    mix.read()
    number = hashlib.sha256(mix.path.encode()).hexdigest()
    names = "+".join(stored.spec.name for _, stored in mix.parts.values())
    return LoRARequest(f"{names}-{number[:12]}", int(number[:15], 16) + 1, mix.path)


def _parse(asked: str) -> dict[str, tuple[float, str | None]]:
    """Return weights and SHA-256 by absolute folder; a folder alone has weight 1."""
    if not asked.startswith("{"):
        return {os.path.abspath(asked): (1.0, None)}
    try:
        given = json.loads(asked)
    except ValueError as error:
        raise SteerError(f"a mix is weights by folder as JSON; received {asked:.200} ({error}).") from error
    found: dict[str, tuple[float, str | None]] = {}
    for folder, value in given.items():
        weight, sha256 = value if isinstance(value, list) and len(value) == 2 else (value, None)
        found[os.path.abspath(folder)] = check_number(f"the weight of {folder}", weight), sha256
    if not found or len(found) < len(given):
        raise SteerError(f"a mix has one folder or more, each of them once; received {asked:.200}.")
    return found


def _read(stored: Stored, weight: float) -> dict[Place, Units]:
    """Return the units of one field by place, in fp32."""
    spec, width, parts = stored.spec, stored.described["backbone"]["widths"], {}
    for site, index in spec.places:
        field = HRes(width[index], spec.sites[site][index], bias=spec.bias, device="meta", dtype=torch.float32)
        parts[site, index] = {f"{spec.point((site, index))}.{key}": like for key, like in field.state_dict().items()}
    wanted = {key: like for part in parts.values() for key, like in part.items()}
    keys, tensors, factor = match_tensors(wanted, stored.shapes), stored.read(), weight * spec.scale
    found = {}
    for (site, index), part in parts.items():
        own = {
            key.partition(spec.point((site, index)) + ".")[2]: as_type(key, tensors[keys[key]], like)
            for key, like in part.items()
        }
        down, up = own["down.weight"], own["up.weight"].t() * factor
        down_bias, up_bias = own.get("down.bias", torch.zeros(len(down))), own.get("up.bias", torch.zeros(width[index]))
        found[site, index] = Units(down, down_bias, up, up_bias * factor, ((spec.activation, len(down)),))
    return found


def _side_by_side(units: Sequence[Units], place: Place, dtype: torch.dtype) -> Units:
    down, down_bias, up, up_bias, runs = zip(*units, strict=True)
    like = torch.empty(0, device="meta", dtype=dtype)
    tensors = torch.cat(down), torch.cat(down_bias), torch.cat(up), torch.stack(up_bias).sum(0)
    cast = [as_type(f"of {place}", tensor, like) for tensor in tensors]
    return Units(cast[0], cast[1], cast[2], cast[3], sum(runs, ()))
