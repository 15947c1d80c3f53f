"""What the two files of a field contain, and whether that can be trusted.

The tensor file's header holds the description and a SHA-256 over all, so that one rename puts a field in place; the
JSON file repeats it, and stands in for a header that another program left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ._checks import release_of
from .backbone import Backbone
from .config import FieldConfig, in_order
from .errors import SteerError

TENSORS, DESCRIPTION = "steering.safetensors", "steering.json"
_FORMAT, _FORMAT_VERSION = "residual_steer", 2
_SITES = ("block", "mixer", "mlp", "input")  # a field at one of them is of version 1; others have ranks by site too
_HEADER_KEY = "residual_steer"
_LONGEST = 10_000_000  # bytes of a description
_LIKE: dict[str, Any] = {  # an entry of each kind that a description needs
    "format": "",
    "format_version": 0,
    "library_version": "",
    "sha256": "",
    "field": {
        **{"name": "", "site": "", "ranks": {}, "activation": "", "train": []},
        **{"scale": 0.0, "dropout": 0.0, "bias": True},
    },
    "backbone": {"name": "", "class": "", "blocks": 0, "widths": [], "config": {}},
}
# Entries of a transformers config that say how a model is run, stored or labelled, not how it computes its stream.
_VOLATILE = re.compile(
    r"_attn_implementation_autoset|_name_or_path|architectures|attn_implementation|dtype|experts_implementation|"
    r"finetuning_task|gradient_checkpointing|id2label|label2id|num_labels|output_attentions|output_hidden_states|"
    r"problem_type|quantization_config|return_dict|task_specific_params|tokenizer_class|torch_dtype|"
    r"transformers_version|use_bfloat16|use_cache|use_falcon_mambapy|use_mambapy|.*token_(id|ids|index)",
    re.DOTALL,
)
_LONGEST_LIST = 200  # characters of a list in a config that is compared
_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")
_PARALLEL = re.compile(r"\A(?:module\.)*(train\.)?(?:module\.)*")


@dataclasses.dataclass(frozen=True)
class Stored:
    """A field on disk, checked but for its tensors, which are not read yet.

    Attributes:
        spec: the field.
        described: the field and its backbone, as `describe` has them, and their SHA-256.
        shapes: the shape of every tensor, by its key in the file.
    """

    spec: FieldConfig
    described: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    _folder: Path
    _file: Any

    def read(self) -> dict[str, Tensor]:
        """Read every tensor, by its key in the file; raise if the file is damaged, or not what was saved."""
        with _refusing(self._folder):
            tensors = {key: self._file.get_tensor(key) for key in self.shapes}
            # by plain names, or by the names as they stand, which version 0.1 took where two plain ones were the same
            whole = any(digest(self.described, tensors, name) == self.described["sha256"] for name in (plain_key, str))
        if not whole:
            raise SteerError(
                f"{self._folder / TENSORS} was changed after it was saved: its SHA-256 differs. Save it again."
            )
        return tensors


def describe(spec: FieldConfig, model: nn.Module, backbone: Backbone) -> dict[str, Any]:
    """Return a field and the backbone in `model` as JSON has them."""
    module, config = model.get_submodule(backbone.path), {}
    its: Any = getattr(module, "config", None)
    if hasattr(its, "to_dict"):
        config = flat_config(its.to_dict())
    elif dataclasses.is_dataclass(its) and not isinstance(its, type):
        config = flat_config(dataclasses.asdict(its))
    return {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION if _by_site(spec) else 1,
        "library_version": release_of("residual-steer"),
        "field": {
            **{key: _plain(value) for key, value in vars(spec).items() if key != "sites"},
            "site": ", ".join(spec.sites),
            "ranks": _words(spec.ranks),
            "train": list(spec.train),
            **_by_site(spec),
        },
        "backbone": {
            "name": backbone.name,
            "class": f"{type(module).__module__}.{type(module).__qualname__}",
            "blocks": len(backbone.widths),
            "widths": list(backbone.widths),
            "config": config,
            "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        },
    }


def _by_site(spec: FieldConfig) -> dict[str, Any]:
    """Return what version 2 adds to the description of a field: its ranks site by site; nothing in version 1."""
    old = len(spec.sites) == 1 and spec.site in _SITES
    return {} if old else {"sites": {site: _words(ranks) for site, ranks in spec.sites.items()}}


def _words(ranks: Mapping[int, int]) -> dict[str, Any]:
    return {str(index): _plain(rank) for index, rank in ranks.items()}


def _numbers(ranks: Mapping[str, int]) -> dict[int, int]:
    return {int(index): ranks[index] for index in sorted(ranks, key=int)}


def _plain(value: Any) -> Any:
    """Return a number as one of Python's, which JSON has, if it is one of numpy's or a fraction."""
    if not isinstance(value, Real) or isinstance(value, (int, float)):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def flat_config(config: Mapping[Any, Any], before: str = "") -> dict[str, Any]:
    """Return the plain values of a config that shape the stream, nested ones as `outer.inner`, lists as JSON."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{before}{key}"
        if any(_VOLATILE.fullmatch(part) for part in name.split(".")):
            continue
        if isinstance(value, Mapping):
            found |= flat_config(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            text = json.dumps(value, default=repr)
            found |= {name: text} if len(text) <= _LONGEST_LIST else {}
        elif isinstance(value, (bool, int, float, str)):
            found[name] = value
    return found


def differences(stored: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return in what two described backbones of the same shape differ, "" for nothing.

    Entries of the config that one of them lacks come of another release of its library, and are no difference.
    """
    if stored["class"] != here["class"]:
        return f"class {stored['class']} against {here['class']}"
    one, other = stored["config"], here["config"]
    changed = [
        f"{key} {one[key]!r} against {other[key]!r}"
        for key in sorted(one.keys() & other.keys())
        if one[key] != other[key]
    ]
    return f"config: {', '.join(changed[:6])}{', …' if len(changed) > 6 else ''}" if changed else ""


def plain_key(key: str) -> str:
    """Strip what wrappers put into a tensor's name: `module.train.module.head._orig_mod.bias` is `train.head.bias`."""
    return _PARALLEL.sub(r"\1", _COMPILED.sub("", key))


def find_names(wanted: Iterable[str], there: Iterable[str]) -> dict[str, str]:
    """Find names among others, as they stand or else by their plain names; what is not there, or twice, is left out.

    So a part that is really called `module` is found by its own name.

    Raises:
        SteerError: two of the names find the same one.
    """
    names, by_plain = set(there), defaultdict(list)
    for name in names:
        by_plain[plain_key(name)].append(name)
    found: dict[str, str] = {}
    for name in wanted:
        hits = [name] if name in names else by_plain[plain_key(name)]
        if len(hits) == 1:
            found[name] = hits[0]
    finders = {hit: name for name, hit in found.items()}
    twins = [name for name, hit in found.items() if finders[hit] != name]
    if twins:
        raise SteerError(
            f"the tensors {twins[0]!r} and {finders[found[twins[0]]]!r} become one without the names of wrappers "
            "(`module.` in front, `_orig_mod.`). Drop one of them."
        )
    return found


def _canonical(described: Mapping[str, Any], name: Callable[[str], str] = plain_key) -> bytes:
    """Return a description as it is compared and digested."""
    field = {**described["field"], "train": [name(key) for key in described["field"]["train"]]}
    return json.dumps({**described, "field": field}, sort_keys=True).encode()


def digest(described: Mapping[str, Any], tensors: Mapping[str, Tensor], name: Callable[[str], str] = plain_key) -> str:
    """Return the SHA-256 of a description and its tensors, whose names are taken as `name` returns them."""
    found = hashlib.sha256(_canonical({key: value for key, value in described.items() if key != "sha256"}, name))
    for key in sorted(tensors, key=lambda key: (name(key), key)):
        tensor = tensors[key].contiguous()
        found.update(f"\n{name(key)} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def pack(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Return the contents of the two files, by name. The tensors come last: whoever has that file has the field."""
    described = {**described, "sha256": digest(described, tensors)}
    return {
        DESCRIPTION: (json.dumps(described, indent=2, sort_keys=True) + "\n").encode(),
        TENSORS: safetensors.torch.save(dict(tensors), {_HEADER_KEY: json.dumps(described, sort_keys=True)}),
    }


def open_field(folder: Path) -> Stored:
    """Open a folder that `save` wrote and check all of it but the tensors' values; raise if that fails."""
    with _refusing(folder):
        with open(folder / DESCRIPTION, "rb") as description:
            text = description.read(_LONGEST).decode()
        # "pread" reads from the file that it opened, also when another is renamed over it
        file: Any = safetensors.safe_open(folder / TENSORS, framework="pt", backend="pread")
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 – it is no dict
        beside = _decode(text, DESCRIPTION)
        inside = (file.metadata() or {}).get(_HEADER_KEY)
        described = beside if inside is None else _decode(inside, TENSORS)
        edited = beside["sha256"] == described["sha256"] and _canonical(beside) != _canonical(described)
        field = described["field"]
        sites = field.get("sites", {field["site"]: field["ranks"]})
        more = {key: value for key, value in field.items() if key not in ("site", "ranks")}
        sites = in_order({site: _numbers(ranks) for site, ranks in sites.items()})
        spec = FieldConfig(**{**more, "sites": sites, "train": tuple(field["train"])})
        differs = (", ".join(sites), _words(spec.ranks)) != (field["site"], _words(_numbers(field["ranks"])))
    if differs:
        raise SteerError(f"{folder / TENSORS} is damaged: the ranks of its field are not those of its sites together.")
    if edited:
        raise SteerError(f"{folder / DESCRIPTION} was changed after it was saved: it says other than {TENSORS}.")
    return Stored(spec, described, shapes, folder, file)


@contextlib.contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    """Turn any error into one that names the folder: bytes from anywhere can fail in any way."""
    try:
        yield
    except Exception as error:
        raise SteerError(
            f"could not read a field from {folder}: there is none, or a damaged one ({type(error).__name__}: "
            f"{str(error)[:300]}). `save` writes {TENSORS} and {DESCRIPTION}: check the folder, or save again."
        ) from error


def _decode(text: str, source: str) -> dict[str, Any]:
    """Return a description, checked entry by entry; raise ValueError if `describe` would not have made it."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError(f"{source} has a key twice")
        return dict(pairs)

    described: dict[str, Any] = json.loads(text, object_pairs_hook=once)
    _check_kinds(described, _LIKE, f"{source} needs")
    if described["format"] != _FORMAT or not 1 <= described["format_version"] <= _FORMAT_VERSION:
        raise ValueError(
            f"{source} is of format {described['format']!r:.80}, version {described['format_version']!r:.80}; this "
            f"library reads {_FORMAT!r}, version 1 to {_FORMAT_VERSION}"
        )
    field, backbone = described["field"], described["backbone"]
    widths, ranks, train = backbone["widths"], field["ranks"], field["train"]
    if len(widths) != backbone["blocks"] or any(type(width) is not int or width < 1 for width in widths):
        raise ValueError(f"{source} has {widths!r:.80} as widths of {backbone['blocks']!r:.80} blocks")
    sites = field.get("sites", {"": {}})
    if ("sites" in field) != (described["format_version"] == 2) or not isinstance(sites, dict):
        raise ValueError(f"{source} has {sites!r:.80} as sites in version {described['format_version']}")
    for each in (ranks, *(sites.values() if "sites" in field else ())):
        if not each or not each.keys() <= {*map(str, range(len(widths)))} or {*map(type, each.values())} != {int}:
            raise ValueError(f"{source} has {each!r:.80} as ranks of {len(widths)} blocks")
    if not all(isinstance(key, str) for key in train) or len(set(train)) < len(train):
        raise ValueError(f"{source} has {train!r:.80} as names of trained tensors")
    if not all(isinstance(value, (bool, int, float, str)) for value in backbone["config"].values()):
        raise ValueError(f"{source} has {backbone['config']!r:.80} as config, whose values are not plain")
    return described


def _check_kinds(found: Any, like: Mapping[str, Any], needs: str, at: str = "") -> None:
    """Check that a dictionary has every entry of another one, and of its kind; floats may be written as integers."""
    for key, example in like.items():
        kind, value = type(example), found.get(key) if isinstance(found, dict) else None
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{needs} {kind.__name__} at '{at}{key}'; found {value!r:.80}")
        if kind is dict:
            _check_kinds(value, example, needs, f"{at}{key}.")
