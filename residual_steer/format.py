"""A field as two files: what `steering.safetensors` and `steering.json` say, and whether that can be believed.

The description of the field stands in the header of the tensor file, with a SHA-256 over itself and every tensor, so
that one rename puts the whole field in place; `steering.json` is the same description for people and other programs,
and stands in for a header that another program left out. Tensors are named by block (`blocks.3.up.weight`), not by the
model's own module names. Nothing is ever unpickled, and no tensor is read before its header has been checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, NoReturn

import safetensors.torch
import torch
from torch import Tensor

from .config import FieldConfig
from .errors import SteerError
from .identity import Identity
from .names import plain_key, plain_keys

__all__ = ["DESCRIPTION", "FORMAT", "FORMAT_VERSION", "TENSORS", "Stored", "open_field", "pack"]

TENSORS, DESCRIPTION = "steering.safetensors", "steering.json"
FORMAT, FORMAT_VERSION = "residual_steer", 1
_HEADER_KEY = "residual_steer"
_LONGEST_HEADER = 100_000_000  # bytes; the limit of safetensors itself
_WIDEST = 8  # bytes of the widest entry that a tensor file can have
_DEPTH = 3  # of dictionaries and lists in one another: description, backbone, config


@dataclass(frozen=True)
class Stored:
    """A field on disk: described, its tensors not yet read.

    Attributes:
        spec: the field.
        identity: the backbone that it was trained on.
        shapes: the shape of every tensor, by its key as it stands in the file.
        described: the field and the backbone in JSON's words, with their SHA-256.
    """

    spec: FieldConfig
    identity: Identity
    shapes: Mapping[str, tuple[int, ...]]
    described: Mapping[str, Any]
    _file: IO[bytes]
    _size: int

    def read(self) -> dict[str, Tensor]:
        """Read every tensor, by its key as it stands in the file.

        Raises:
            SteerError: the file is damaged, or not what was saved.
        """
        path = self._file.name
        try:
            self._file.seek(0)
            content = self._file.read(self._size)
            tensors: dict[str, Tensor] = safetensors.torch.load(content)
        except Exception as error:  # bytes from anywhere can fail in any way
            _refuse(path, error)
        if not _verified(self.described, tensors):
            raise SteerError(f"{path} was changed after it was saved: its SHA-256 differs. Save it again.")
        return tensors


def pack(spec: FieldConfig, identity: Identity, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Return the contents of the two files, by name. The tensors come last: whoever has that file has the field."""
    description = _describe(spec, identity)
    plain = plain_keys([*tensors]) is not None
    description["sha256"] = digest(description, tensors, plain_key if plain else str)
    text = json.dumps(description, sort_keys=True)
    return {
        DESCRIPTION: (json.dumps(description, indent=2, sort_keys=True) + "\n").encode(),
        TENSORS: safetensors.torch.save(dict(tensors), {_HEADER_KEY: text}),
    }


@contextlib.contextmanager
def open_field(folder: Path) -> Iterator[Stored]:
    """Open a folder that `save` wrote, and check all of it but the tensors' values.

    Raises:
        SteerError: a file is missing, damaged, or not what `save` writes.
    """
    try:
        with contextlib.ExitStack() as stack:
            file: IO[bytes] = stack.enter_context(open(folder / TENSORS, "rb"))
            description: IO[bytes] = stack.enter_context(open(folder / DESCRIPTION, "rb"))
            text = description.read(
                min(_size(description), _LONGEST_HEADER)
            )  # read() makes room for all that it is asked
            size = _size(file)
            kept = stack.pop_all()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        what = (
            f"{error.strerror} ({Path(error.filename or TENSORS).name})" if isinstance(error, OSError) else str(error)
        )
        raise SteerError(
            f"could not read a field from {folder}: {what}. `save` writes {TENSORS} and {DESCRIPTION}."
        ) from error
    with kept:
        try:
            json_file = _decode(text)
            header = _read_header(file, size)
            metadata = header.pop("__metadata__", None) or {}
            described = _decode(metadata[_HEADER_KEY].encode()) if _HEADER_KEY in metadata else json_file
            shapes = {key: _shape_of(entry) for key, entry in header.items()}
        except Exception as error:  # bytes from anywhere can fail in any way
            _refuse(folder, error)
        _parse(json_file, DESCRIPTION)
        spec, identity = _parse(described, TENSORS)
        if json_file["sha256"] == described["sha256"] and _canonical(json_file) != _canonical(described):
            raise SteerError(f"{folder / DESCRIPTION} was changed after it was saved: it says other than {TENSORS}.")
        yield Stored(spec, identity, shapes, described, file, size)


def digest(described: Mapping[str, Any], tensors: Mapping[str, Tensor], name: Callable[[str], str] = plain_key) -> str:
    """Return the SHA-256 of a description and its tensors, whose names are taken as `name` returns them."""
    found = hashlib.sha256(_canonical({key: value for key, value in described.items() if key != "sha256"}, name))
    named = {name(key): tensor for key, tensor in tensors.items()}
    for key in sorted(named):
        tensor = named[key].contiguous()
        found.update(f"\n{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _verified(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Hold the SHA-256 against plain names, and against names as they stand, which may really begin with `module.`."""
    expected: str = described["sha256"]
    if plain_keys(tensors) is not None and digest(described, tensors) == expected:
        return True
    return digest(described, tensors, str) == expected


def _canonical(described: Mapping[str, Any], name: Callable[[str], str] = plain_key) -> bytes:
    """Put a description in the words that are compared and digested."""
    told = described["field"]
    named = {**described, "field": {**told, "train": [name(key) for key in told["train"]]}}
    return json.dumps(named, sort_keys=True).encode()


def _read_header(file: IO[bytes], size: int) -> dict[str, Any]:
    """Return the header of a tensor file, whose tensors fill the rest of it exactly.

    Raises:
        ValueError: it is none.
    """
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(size - 8, _LONGEST_HEADER):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = _decode(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    if max(ends, default=0) != size - 8 - length:
        raise ValueError(f"tensors that end at byte {max(ends, default=0)} of {size - 8 - length}")
    return header


def _shape_of(entry: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of a tensor in the header, which takes no more bytes than such a shape can.

    Raises:
        ValueError: it takes more.
    """
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (*shape, start, end)):
        raise ValueError(f"no sizes: {_short(entry)}")
    if not 0 <= end - start <= _WIDEST * math.prod(shape):
        raise ValueError(f"{end - start} bytes for a tensor of shape {_short(shape)}")
    return shape


def _size(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size


def _decode(text: bytes) -> Any:
    """Decode JSON whose objects name each key once, and which is no deeper than a description.

    Raises:
        ValueError: it is no such JSON.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key that stands there twice")
        return dict(pairs)

    found = json.loads(text.decode(), object_pairs_hook=once)
    level = [found]
    for _ in range(_DEPTH):
        level = [part for value in level if isinstance(value, (dict, list)) for part in _parts(value)]
    if any(isinstance(value, (dict, list)) for value in level):
        raise ValueError("nested more deeply than any description")
    return found


def _parts(value: dict[str, Any] | list[Any]) -> list[Any]:
    return [*value.values()] if isinstance(value, dict) else value


def _refuse(path: str | Path, error: Exception) -> NoReturn:
    raise SteerError(
        f"{path} holds no field, or a damaged one ({type(error).__name__}: {str(error)[:200]}). Save it again."
    ) from error


def _describe(spec: FieldConfig, identity: Identity) -> dict[str, Any]:
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


def _parse(described: Any, source: str) -> tuple[FieldConfig, Identity]:
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
    spec = FieldConfig(
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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
