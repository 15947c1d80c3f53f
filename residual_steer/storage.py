"""save, load, push and card: a field as two files, in a folder or on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ._checks import check_choice
from ._controller import Steering, base_tensors, steered_part, steering_of
from ._field_file import DESCRIPTION, TENSORS, describe, differences, find_names, open_field, pack, plain_key
from ._files import as_path, make_folder, write_whole
from ._internals import offload_hooks
from ._shards import flat_units, gather, is_sharded, like, once, several
from .backbone import Backbone, compute_dtype, execution_device
from .config import FieldConfig, check_name, check_sites
from .errors import SteerError, some
from .hub import fetch, is_repo, model_card, upload
from .registry import AUTO
from .steering import begin, install
from .trained_modules import master_dtype

__all__ = ["as_type", "card", "load", "match_tensors", "push", "save"]

_ADAPTER = ("adapter_model.safetensors", "adapter_config.json")  # PEFT's files
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}  # these load into one another

Model = TypeVar("Model", bound=nn.Module)
Returned = TypeVar("Returned")


def save(model: nn.Module, folder: str | Path, name: str | None = None, *, format: str = "native") -> Path:
    """Save a field, and the base tensors trained with it; return the folder.

    Sharded tensors are gathered (FSDP2, FSDP1 with `use_orig_params`, ZeRO-3, tensor parallelism), and no more of the
    base than stands beside them: every process calls `save`, the first one writes, and all return when it is done. What
    trains and belongs to no field is not stored, and a warning names it.

    Args:
        model: a steered model, as FSDP1 wrapped it.
        folder: where `steering.safetensors` and `steering.json` go; made if it is not there.
        name: which field; None is the selected one.
        format: "native", or "peft" for the files of an adapter, which PEFT and `load` read.

    Raises:
        SteerError: no such field, none selected, a tensor that `load` would refuse, one that the format has no place
            for, or the folder cannot be written; what it held before is untouched.
    """
    check_choice("format", format, ("native", "peft"))
    base, state = steering_of(model)
    name = state.name_of(name)
    beside = getattr(getattr(base, "peft_config", {}).get(name), "modules_to_save", None)
    if beside:
        raise SteerError(
            f"the field {name!r} trains {some(beside)} along in PEFT's wrappers, which PEFT saves. "
            "Call `save_pretrained` of the PEFT model."
        )
    described, tensors = _collect(model, name)
    folder = as_path(folder)

    def write() -> None:
        if format == "peft":
            from .peft._convert import pack_adapter

            files = pack_adapter(base, name, tensors, folder)
        else:
            files = pack(described, tensors)
        make_folder(folder)
        write_whole({folder / file: content for file, content in files.items()})

    _by_one(model, name, write)
    return folder


def store(model: nn.Module, folder: Path, name: str, given: Mapping[int, Tensor]) -> None:
    """Save a field by one process alone, with the tensors that were gathered already, by the ids of those in place."""
    described, tensors = _collect(model, name, given)
    make_folder(folder)
    write_whole({folder / file: content for file, content in pack(described, tensors).items()})


def push(
    model: nn.Module, repo: str, name: str | None = None, *, private: bool = False, message: str | None = None
) -> str:
    """Upload a field and a card to the Hugging Face Hub in one commit, for `load(model, repo)`; return the address.

    The repository is made if it is not there; what else it holds stays.

    Args:
        model: a steered model.
        repo: "owner/name" on the Hub.
        name: which field; None is the selected one.
        private: whether only the owner may see the repository. One that is public already is refused.
        message: of the commit; None names the field.

    Raises:
        SteerError: no such field, none selected, no name of a repository, or the Hub refuses or cannot be reached.
            Nothing was uploaded.
    """
    described, files = _with_card(model, repo, name)
    message = message or f"Field {described['field']['name']}, stored by residual_steer"
    return _by_one(model, described["field"]["name"], lambda: upload(repo, files, message, private=private))


def card(model: nn.Module, repo: str, name: str | None = None) -> str:
    """Return the card that `push` puts beside a field: Markdown with the front matter that the Hub reads.

    Args:
        model: a steered model.
        repo: "owner/name" on the Hub, for the lines that load it; the Hub is not asked.
        name: which field; None is the selected one.

    Raises:
        SteerError: no such field, none selected, or no name of a repository.
    """
    return _with_card(model, repo, name)[1]["README.md"].decode()


def load(
    model: Model,
    folder: str | Path,
    name: str | None = None,
    *,
    revision: str | None = None,
    arch: str | Backbone | None = None,
) -> Model:
    """Load a field that `save`, `push` or PEFT wrote and select it, on a fresh backbone or beside other fields.

    Tensors may be stored in fp64, fp32, fp16 or bf16; the field computes in its own type. Names may carry what
    wrappers add, `module.` in front and `_orig_mod.` anywhere. Returns the model, frozen and steered.

    Args:
        model: holds a backbone with the same number of blocks and the same widths. Another class or config of that
            shape is accepted with a warning that names what differs.
        folder: the folder that was given to `save`, or, where there is no such folder, "owner/name" on the Hub.
        name: what to call the field here; None keeps its name.
        revision: a branch, tag or commit on the Hub; None is the main branch.
        arch: as in `steer`; None also takes "auto" where the field was trained on a stream that "auto" found.

    Raises:
        SteerError: no, foreign or damaged files, another backbone, missing or extra tensors, a name in use, or the Hub
            refuses or cannot be reached. The model is as it was.
    """
    path = _find(folder, revision)
    stored: Any
    if (path / _ADAPTER[1]).is_file() and not (path / TENSORS).is_file():
        from .peft._convert import open_adapter

        stored = open_adapter(path, model, arch)
        arch = arch or stored.arch
    else:
        stored = open_field(path)
    there = stored.described["backbone"]
    if arch is None and steered_part(model) is None and there["name"] == AUTO:
        arch = AUTO  # a family may have been registered since
    base_model, state = begin(model, arch)
    spec = stored.spec if name is None else replace(stored.spec, name=name)
    check_name(spec.name, state.specs)
    here = describe(spec, base_model, state.backbone)["backbone"]
    if (here["name"], here["widths"]) != (there["name"], there["widths"]):
        raise SteerError(
            f"the field was trained on {_shape(there)}; this model has {_shape(here)}. "
            "A field fits a backbone of its own kind, with as many blocks of the same widths."
        )
    check_sites([*spec.sites], spec.sites, None, state.backbone)
    if any(execution_device(state.backbone.blocks[index]).type == "meta" for index in spec.ranks):
        raise SteerError("this model is on the meta device and has no values yet. Materialise it, then load.")
    spec, wanted = _needs(base_model, state, spec)
    keys = match_tensors(wanted, stored.shapes)
    tensors = stored.read()  # now that what the header claims is what this model needs, and no more
    values = {key: as_type(key, tensors[keys[key]], like) for key, like in wanted.items()}
    different = differences(there, here)
    if different:
        warnings.warn(
            f"the field {spec.name!r} was trained on another backbone of the same shape ({different:.600}). "
            "It runs; whether it does here what it did there is for you to see.",
            stacklevel=2,
        )
    install(base_model, state, spec)
    with torch.no_grad():
        for key, tensor in state.tensors(base_model, spec.name).items():
            tensor.copy_(like(values[key], tensor))
    return model


def _collect(
    model: nn.Module, name: str, given: Mapping[int, Tensor] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what `load` takes: a field's description and tensors, none missing, of another shape or not finite."""
    base, state = steering_of(model)
    spec, tensors = state.specs[name], _gather(model, name, given)
    _, wanted = _needs(base, state, spec)
    match_tensors(wanted, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    for key, tensor in tensors.items():
        as_type(key, tensor, wanted[key])
    lost = state.unsaved(base)
    if lost:
        warnings.warn(
            f"{some(lost)} require a gradient and belong to no field, so they are not stored with it. Steer with "
            "`train=[...]` to train them along, or save them yourself.",
            stacklevel=3,
        )
    return describe(spec, base, state.backbone), tensors


def _with_card(model: nn.Module, repo: str, name: str | None) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return a field's description, and its files with their card."""
    base, state = steering_of(model)
    described, tensors = _collect(model, state.name_of(name))
    if not is_repo(repo):
        raise SteerError(f"a repository on the Hub is named 'owner/name'; received {repo!r}.")
    files = pack(described, tensors)
    inner = base.get_submodule(state.backbone.path)
    page = model_card(repo, base, inner, described, tensors, len(files[TENSORS]))
    return described, {**files, "README.md": page.encode()}


def _gather(model: nn.Module, name: str, given: Mapping[int, Tensor] | None) -> dict[str, Tensor]:
    """Return copies on the CPU of all tensors of a field: sharded ones whole, offloaded ones brought back."""
    base, state = steering_of(model)
    with contextlib.ExitStack() as stack:
        for module in (part for field in state.fields(name).values() for part in (field.down, field.up)):
            if offload_hooks(module):
                from accelerate.utils import align_module_device

                stack.enter_context(align_module_device(module, execution_device="cpu"))
        if given is None:
            tensors = gather(model, lambda: state.tensors(base, name))
        else:
            tensors = {key: given.get(id(tensor), tensor) for key, tensor in state.tensors(base, name).items()}
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise SteerError(f"tensor {key} has no value: it is on the meta device. Materialise the model, then save.")
        if is_sharded(tensor):
            raise SteerError(f"tensor {key} is sharded, and not among those that were gathered. Call `save`.")
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def _by_one(model: nn.Module, name: str, act: Callable[[], Returned]) -> Returned:
    """Act by the first process where a field is sharded over several, and everywhere else by each."""
    base, state = steering_of(model)
    sharded = any(is_sharded(tensor) for tensor in state.tensors(base, name).values()) or bool(flat_units(model))
    return once(act) if sharded and several() else act()


def _find(folder: str | Path, revision: str | None) -> Path:
    """Return the folder that holds a field: a local one if there is one, else what was fetched from the Hub."""
    path = as_path(folder)
    on_hub = isinstance(folder, str) and is_repo(folder) and not os.path.exists(path)
    if revision is not None and not (on_hub and isinstance(revision, str) and revision):
        raise SteerError(
            "`revision` is a branch, tag or commit of a repository on the Hub, 'owner/name', or None; received "
            f"{revision!r} with {str(folder)!r}."
        )
    return fetch(str(folder), revision, (TENSORS, DESCRIPTION), _ADAPTER) if on_hub else path


def _needs(model: nn.Module, state: Steering, spec: FieldConfig) -> tuple[FieldConfig, dict[str, Tensor]]:
    """Return a field with the names of this model, and its tensors here: their types and shapes, on no device."""
    base = base_tensors(model)
    names = find_names(spec.train, base)
    absent = [key for key in spec.train if key not in names]
    if absent:
        raise SteerError(
            f"the field comes with trained base tensors that this model lacks: {some(absent)}. "
            "Give the model the same head before loading."
        )
    spec = replace(spec, train=tuple(names[key] for key in spec.train))
    wanted = {}
    for key in spec.train:
        tensor = base[key]
        dtype = master_dtype(tensor.dtype) if isinstance(tensor, nn.Parameter) else tensor.dtype
        wanted[f"train.{key}"] = tensor.to("meta", dtype)
    for place in spec.places:
        dtype = torch.promote_types(compute_dtype(state.backbone.blocks[place[1]]), torch.float32)
        field = spec.build(place, state.backbone, device="meta", dtype=dtype)
        wanted |= {f"{spec.point(place)}.{key}": value for key, value in field.state_dict().items()}
    return spec, wanted


def match_tensors(wanted: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, str]:
    """Return by which key of a file the model finds each tensor; none may be missing, left over or of another shape."""
    keys = find_names(wanted, shapes)
    twins = len({*map(plain_key, shapes)}) < len(shapes)
    more = " Some of its names become one without those of wrappers, `module.` in front." if twins else ""
    for what, left in (("missing", wanted.keys() - keys.keys()), ("left over", shapes.keys() - set(keys.values()))):
        if left:
            raise SteerError(f"{TENSORS} does not hold what it says: {what} are {some(sorted(left))}.{more}")
    for key, tensor in wanted.items():
        if tuple(tensor.shape) != shapes[keys[key]]:
            raise SteerError(f"tensor {key} has shape {shapes[keys[key]]}; this model needs {tuple(tensor.shape)}.")
    return keys


def as_type(key: str, stored: Tensor, like: Tensor) -> Tensor:
    """Return a stored tensor in the type of the model's, if that is the same kind of number, and all are finite."""
    if stored.dtype != like.dtype and not {stored.dtype, like.dtype} <= _FLOATS:
        raise SteerError(f"tensor {key} is stored as {stored.dtype}; this model needs {like.dtype}.")
    numbers = stored.float() if stored.is_floating_point() and stored.itemsize == 1 else stored  # torch: no float8
    if not numbers.isfinite().all():
        raise SteerError(f"tensor {key} holds NaN or infinite numbers, which would spoil every batch. Train it again.")
    value = stored.to(like.dtype)
    if value.dtype != stored.dtype and not value.isfinite().all():
        raise SteerError(f"tensor {key} holds numbers too large for {like.dtype}, which this model needs.")
    return value


def _shape(backbone: Mapping[str, Any]) -> str:
    widths = sorted(set(backbone["widths"]))
    return f"{backbone['name']:.100}, {len(backbone['widths'])} blocks of width {some([*map(str, widths)])}"
