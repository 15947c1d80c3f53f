"""Saving a steered model by transformers: its fields are saved with it, and come back.

`save_pretrained`, which `Trainer`, `push_to_hub` and sentence-transformers call too, writes a base whose file holds the
fields' tensors under names of their own, `residual_steer.NAME.…`, and beside it a folder `residual_steer/NAME` for each
field, as `save` writes it. Names of our own, since transformers renames what it saves and does not rename it back. A
plain `from_pretrained` reads the base alone, and names in its report the tensors that it did not use.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from logging import ERROR
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._controller import Steering, attachments, steering_of
from ._files import as_path
from ._frozen import chain, plain_name
from ._internals import saves_adapters_alone
from ._shards import is_sharded
from ._state_dict import ENTRY, finding
from .backbone import Handle
from .errors import SteerError
from .injector import Injector
from .steering import use
from .storage import load, save, store
from .trained_modules import Switch

__all__ = ["from_pretrained"]

_FOLDER = ENTRY  # of the fields beside the base
_NOTE = "residual_steer.from_pretrained_loads_this_field"  # which the report of a plain `from_pretrained` shows


def from_pretrained(folder: str | Path, kind: type[Any] | None = None, **options: Any) -> nn.Module:
    """Load what `save_pretrained` wrote of a steered model: the base, its fields, and what was selected.

    Args:
        folder: where it is: a folder, or "owner/name" on the Hub.
        kind: the class of the model, or one of transformers' `AutoModel…`; None is the class that was saved.
        **options: for `kind.from_pretrained`, such as `dtype`.

    Returns:
        The steered model.

    Raises:
        SteerError: there is no field, transformers does not have the class, or as `residual_steer.load`.

    >>> model.save_pretrained("runs/mine")
    >>> model = rs.from_pretrained("runs/mine")
    """
    import transformers
    from transformers.utils import logging

    config = transformers.AutoConfig.from_pretrained(
        folder, **_passed(options, "revision", "trust_remote_code", "token")
    )
    stored = getattr(config, ENTRY, None)
    if not isinstance(stored, Mapping) or not stored.get("fields"):
        raise SteerError(
            f"no field was saved with the model in {str(folder)!r}: its config has no {ENTRY!r}. Load it with "
            "transformers, and a field that `residual_steer.save` wrote with `residual_steer.load`."
        )
    named = next(iter(config.architectures or ()), "")
    loader: Any = getattr(transformers, named, None) if kind is None else kind
    if loader is None:
        raise SteerError(f"the model that was saved is a {named}, which transformers does not have: give its `kind`.")
    if not os.path.isdir(folder):
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            str(folder), allow_patterns=[f"{_FOLDER}/*"], **_passed(options, "revision", "token")
        )
    delattr(config, ENTRY)
    before = logging.get_verbosity()
    logging.set_verbosity(ERROR)  # the report names the fields' tensors, which `load` reads
    try:
        model: nn.Module = loader.from_pretrained(folder, config=config, **options)
    finally:
        logging.set_verbosity(before)
    for name in stored["fields"]:
        load(model, as_path(folder) / _FOLDER / name)
    use(model, stored["selected"], on=stored.get("on", "all"))
    return model


def _passed(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}


class _Saving:
    """Stand in the place of a module's `save_pretrained`, and find its tensors in what is loaded, until `remove`."""

    def __init__(self, root: nn.Module, module: nn.Module) -> None:
        self._root, self._module = root, module
        module.__dict__["save_pretrained"] = self
        self._handles = [] if module is root else [finding(root, module)]  # the root does so in any case

    def remove(self) -> None:
        """Let the module's own `save_pretrained` run again."""
        if self._module.__dict__.get("save_pretrained") is self:
            del self._module.__dict__["save_pretrained"]
        for handle in self._handles:
            handle.remove()

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Do what the class of the module does, with the fields' tensors renamed and a folder for each of them."""
        module: Any = self._module
        if saves_adapters_alone(module):
            return type(module).save_pretrained(module, save_directory, is_main_process, state_dict, *args, **kwargs)
        root, state = steering_of(self._root)
        folder = as_path(os.fspath(save_directory))
        given = None if state_dict is None else _gathered(module, state_dict)
        for name in state.specs:
            if given is None:
                save(root, folder / _FOLDER / name, name)
            elif is_main_process:  # which may be alone here: Trainer gathers on all before
                store(root, folder / _FOLDER / name, name, given)
        tensors = _base(root, state, module, module.state_dict() if state_dict is None else state_dict)
        device = next((tensor.device for tensor in tensors.values()), None)
        for name in state.specs:
            for key, value in state.tensors(root, name).items():
                tensors[f"{ENTRY}.{name}.{key}"] = (given or {}).get(id(value), value).detach()
        tensors[_NOTE] = torch.ones(1, device=device)
        config = module.config
        setattr(config, ENTRY, {"fields": list(state.specs), "selected": state.mix.asked(), "on": state.mix.on})
        try:
            return type(module).save_pretrained(module, save_directory, is_main_process, tensors, *args, **kwargs)
        finally:
            delattr(config, ENTRY)


def _gathered(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[int, Tensor] | None:
    """Return the tensors of a gathered state dict by the ids of the shards in place; None if there are none."""
    placed = module.state_dict(keep_vars=True)
    found = {id(value): tensors[key] for key, value in placed.items() if is_sharded(value) and key in tensors}
    return found or None


def _base(root: nn.Module, state: Steering, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a module as they are in the base: none of steering, and no trained head in place."""
    ours = [f"{name}." for name, part in module.named_modules() if isinstance(part, (Injector, Switch))]
    before = next(f"{name}." if name else "" for name, part in root.named_modules() if part is module)
    placed = {plain_name(key): id(tensor) for key, tensor in root.state_dict(keep_vars=True).items()}
    # by what is in place, since a head that is tied to the embedding stands under its name too
    base = {placed[key]: tensor for key, tensor in state.heads.base.items() if key in placed}
    return {
        key: base.get(placed.get(plain_name(before + key), 0), tensor).detach()
        for key, tensor in tensors.items()
        if not key.startswith((*ours, f"{ENTRY}."))
    }


def _attach(model: nn.Module, state: Steering) -> list[Handle]:
    """Let every model of transformers from the steered one down to the one with the blocks save its fields."""
    return [
        _Saving(model, part)
        for part in chain(model, state.backbone.path)
        if callable(getattr(part, "save_pretrained", None)) and hasattr(part.__dict__.get("config"), "to_json_file")
    ]


attachments.append(_attach)
