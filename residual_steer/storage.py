"""save, load and push: a field as two files, in a folder or on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ._controller import Steering, base_tensors, steered_part, steering_of
from ._frozen import unsaved
from ._internals import offload_hooks
from .backbone import Backbone, compute_dtype, execution_device
from .card import model_card
from .config import FieldConfig, check_name, check_site
from .errors import SteerError
from .files import as_path, make_folder, write_whole
from .format import DESCRIPTION, TENSORS, open_field, pack
from .hub import check_repo, fetch, is_repo, upload
from .identity import Identity
from .names import find_names, plain_keys, some
from .registry import AUTO
from .steering import begin, install
from .trained_modules import master_dtype

__all__ = ["load", "push", "save"]

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # these load into one another

Model = TypeVar("Model", bound=nn.Module)


def save(model: nn.Module, folder: str | Path, name: str | None = None) -> Path:
    """Save a field, and the base tensors trained with it.

    Args:
        model: a steered model.
        folder: where `steering.safetensors` and `steering.json` go; made if it is not there.
        name: which field; None is the selected one.

    Sharded tensors (FSDP2) are gathered: every process calls `save`, and the first one writes. What trains and belongs
    to no field is not stored, and a warning names it.

    Returns:
        The folder.

    Raises:
        SteerError: no such field, none selected, a tensor that `load` would refuse, or the folder cannot be written;
            what it held before is untouched.
    """
    base, state = steering_of(model)
    spec, tensors, first = _gather(base, state, name)
    folder = as_path(folder)
    if first:
        make_folder(folder)
        contents = pack(spec, Identity.of(base, state.backbone), tensors)
        write_whole({folder / file: content for file, content in contents.items()})
    return folder


def push(
    model: nn.Module, repo: str, name: str | None = None, *, private: bool = False, message: str | None = None
) -> str:
    """Upload a field to the Hugging Face Hub, with a card that says what it is: one commit.

    The repository is made if it is not there; what else it holds stays. `load(model, repo)` fetches the field.

    Args:
        model: a steered model.
        repo: "owner/name" on the Hub.
        name: which field; None is the selected one.
        private: whether only the owner may see the repository. One that is public already is refused.
        message: of the commit; None says which field it is.

    Returns:
        The repository's address.

    Raises:
        SteerError: no such field, none selected, no name of a repository, or the Hub refuses or cannot be reached:
            the message says what to do. Nothing was uploaded.
    """
    base, state = steering_of(model)
    spec, tensors, _ = _gather(base, state, name)
    repo = check_repo(repo)
    contents = pack(spec, Identity.of(base, state.backbone), tensors)
    card = model_card(repo, base, state, spec, tensors, len(contents[TENSORS]))
    return upload(
        repo,
        {**contents, "README.md": card.encode()},
        message or f"Field {spec.name}, stored by residual_steer",
        private=private,
    )


def load(
    model: Model,
    folder: str | Path,
    name: str | None = None,
    *,
    revision: str | None = None,
    arch: str | Backbone | None = None,
) -> Model:
    """Load a field that `save` or `push` wrote and select it, on a fresh backbone or beside other fields.

    Tensors may be stored in fp64, fp32, fp16 or bf16; the field computes in its own type. Their names may carry what
    wrappers put there, `module.` in front and `_orig_mod.` anywhere.

    Args:
        model: holds a backbone with the same number of blocks and the same widths. Another class or config of that
            shape is accepted with a warning that says what differs.
        folder: the folder that was given to `save`, or, where there is no such folder, "owner/name" on the Hub.
        name: what to call the field here; None keeps its name.
        revision: a branch, tag or commit on the Hub; None is the main branch.
        arch: as in `steer`. None takes the field's own: one that was trained on a stream that "auto" found is loaded
            onto the stream that "auto" finds here.

    Returns:
        The same object, frozen and steered.

    Raises:
        SteerError: no, foreign or damaged files, another backbone, missing or extra tensors, a name in use, or the Hub
            refuses or cannot be reached. The model is as it was.
    """
    with open_field(_find(folder, revision)) as stored:
        base_model, state = begin(model, _arch(model, arch, stored.identity))
        spec = stored.spec if name is None else replace(stored.spec, name=name)
        check_name(spec.name, state.specs)
        here = Identity.of(base_model, state.backbone)
        if here.widths != stored.identity.widths or here.name != stored.identity.name:
            raise SteerError(
                f"the field was trained on {_shape(stored.identity)}; this model has {_shape(here)}. "
                "A field fits a backbone of its own kind, with as many blocks of the same widths."
            )
        check_site(spec.site, state.backbone)
        base = base_tensors(base_model)
        if any(execution_device(state.backbone.blocks[index]).type == "meta" for index in spec.ranks):
            raise SteerError("this model is on the meta device and has no values yet. Materialise it, then load.")
        spec, wanted = _needs(base, state, spec)
        keys = _match(wanted, stored.shapes)
        tensors = stored.read()  # now that what the header says is what this model holds, and no more
    values = {key: _as_type(key, tensors[keys[key]], like) for key, like in wanted.items()}
    different = stored.identity.differences(here)
    if different:
        warnings.warn(
            f"the field {spec.name!r} was trained on another backbone of the same shape "
            f"({'; '.join(different)[:600]}). "
            "It runs; whether it does here what it did there is for you to see.",
            stacklevel=2,
        )
    install(base_model, state, spec)
    with torch.no_grad():
        for key, tensor in state.tensors(base_model, spec.name).items():
            tensor.copy_(values[key])
    return model


def _arch(model: nn.Module, arch: str | Backbone | None, stored: Identity) -> str | Backbone | None:
    """Return how to look for a field's backbone: a family may have been registered since "auto" found its stream."""
    fresh = steered_part(model) is None
    return AUTO if arch is None and fresh and stored.name == AUTO else arch


def _gather(base: nn.Module, state: Steering, name: str | None) -> tuple[FieldConfig, dict[str, Tensor], bool]:
    """Return a field, copies of all that is stored of it, and whether this process is the one that stores them.

    What is returned is what `load` takes: nothing is missing, left over, of another shape or kind, or not finite.

    Raises:
        SteerError: it is not, or has no values.
    """
    name = state.name_of(name)
    spec, tensors, sharded = state.specs[name], {}, False
    with contextlib.ExitStack() as stack:
        for module in state.fields(name).values():
            stack.enter_context(_in_place(module.down))
            stack.enter_context(_in_place(module.up))
        for key, part in state.tensors(base, name).items():
            sharded = sharded or hasattr(part, "full_tensor")
            value: Tensor = part.full_tensor() if hasattr(part, "full_tensor") else part
            if value.is_meta:
                raise SteerError(
                    f"tensor {key} has no value: it is on the meta device. Materialise the model, then save."
                )
            tensors[key] = value.detach().cpu().contiguous().clone()
    _, wanted = _needs(base_tensors(base), state, spec)
    _match(wanted, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    for key, tensor in tensors.items():
        _as_type(key, tensor, wanted[key])
    lost = unsaved(base, state.stored())
    if lost:
        warnings.warn(
            f"{some(lost)} require a gradient and belong to no field, so they are not stored with it. Steer with "
            "`train=[...]` to train them along, or save them yourself.",
            stacklevel=3,
        )
    return spec, tensors, not sharded or torch.distributed.get_rank() == 0


@contextlib.contextmanager
def _in_place(module: nn.Module) -> Iterator[None]:
    """Bring a module's tensors from where accelerate offloaded them."""
    if offload_hooks(module):
        from accelerate.utils import align_module_device

        with align_module_device(module, execution_device="cpu"):
            yield
    else:
        yield


def _find(folder: str | Path, revision: str | None) -> Path:
    """Return the folder that holds a field: a local one if there is one, else what was fetched from the Hub.

    Raises:
        SteerError: the Hub does not give it, or `revision` was given with a folder.
    """
    path = as_path(folder)
    if revision is not None and (not isinstance(revision, str) or not revision):
        raise SteerError(f"`revision` is a branch, tag or commit on the Hub, or None; received {revision!r}.")
    if isinstance(folder, str) and is_repo(folder) and not os.path.exists(path):
        return fetch(folder, revision, (TENSORS, DESCRIPTION))
    if revision is not None:
        raise SteerError(
            f"`revision` is for names on the Hub, 'owner/name'; received {revision!r} with {str(folder)!r}."
        )
    return path


def _needs(base: Mapping[str, Tensor], state: Steering, spec: FieldConfig) -> tuple[FieldConfig, dict[str, Tensor]]:
    """Return a stored field with the names of this model, and the tensors that it has here, its own on no device.

    Raises:
        SteerError: the model lacks a tensor that was trained with the field, or the field has a rank or an option
            that none can have.
    """
    names = find_names(spec.train, base)
    absent = [key for key in spec.train if key not in names]
    if absent:
        raise SteerError(
            f"the field comes with trained base tensors that this model lacks: {some(absent)}. "
            "Give the model the same head before loading."
        )
    spec = replace(spec, train=tuple(names[key] for key in spec.train))
    wanted = {f"train.{key}": base[key].to("meta", _trained_dtype(base[key])) for key in spec.train}
    for index in spec.ranks:
        dtype = torch.promote_types(compute_dtype(state.backbone.blocks[index]), torch.float32)
        field = spec.build(index, state.backbone, device="meta", dtype=dtype)
        wanted |= {f"blocks.{index}.{key}": value for key, value in field.state_dict().items()}
    return spec, wanted


def _trained_dtype(tensor: Tensor) -> torch.dtype:
    return master_dtype(tensor.dtype) if isinstance(tensor, nn.Parameter) else tensor.dtype


def _match(wanted: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, str]:
    """Find every tensor that the model needs among those of a file.

    Raises:
        SteerError: one is missing, left over, or of another shape.
    """
    keys = find_names(wanted, shapes)
    twins = "" if plain_keys(shapes) else " Some of its names become one without those of wrappers, `module.` in front."
    for what, left in (("missing", wanted.keys() - keys.keys()), ("left over", shapes.keys() - set(keys.values()))):
        if left:
            raise SteerError(f"{TENSORS} does not hold what it says: {what} are {some(sorted(left))}.{twins}")
    for key, tensor in wanted.items():
        if tuple(tensor.shape) != shapes[keys[key]]:
            raise SteerError(f"tensor {key} has shape {shapes[keys[key]]}; this model needs {tuple(tensor.shape)}.")
    return keys


def _as_type(key: str, stored: Tensor, like: Tensor) -> Tensor:
    """Return a stored tensor in the type of the model's.

    Raises:
        SteerError: that would be another kind of number, or some of them are not finite, or too large for it.
    """
    if stored.dtype != like.dtype and not {stored.dtype, like.dtype} <= set(_FLOATS):
        raise SteerError(f"tensor {key} is stored as {stored.dtype}; this model needs {like.dtype}.")
    numbers = stored.float() if stored.is_floating_point() and stored.itemsize == 1 else stored  # torch: no float8
    if not numbers.isfinite().all():
        raise SteerError(f"tensor {key} holds NaN or infinite numbers, which would spoil every batch. Train it again.")
    if stored.dtype == like.dtype:
        return stored
    value = stored.to(like.dtype)
    if not value.isfinite().all():
        raise SteerError(f"tensor {key} holds numbers too large for {like.dtype}, which this model needs.")
    return value


def _shape(identity: Identity) -> str:
    widths = sorted(set(identity.widths))
    return f"{identity.name[:100]}, {len(identity.widths)} blocks of width {some([*map(str, widths)])}"
