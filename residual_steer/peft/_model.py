"""HResModel: what PEFT asks of a tuner, by the library's own calls. No module of the base is replaced."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, cast

import torch
from peft.peft_model import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.integrations import init_empty_weights
from peft.utils.other import AuxiliaryTrainingWrapper, set_additional_trainable_modules
from torch import Tensor, nn

from residual_steer._controller import steering_of
from residual_steer._shards import alone
from residual_steer._summary import fields
from residual_steer.errors import SteerError
from residual_steer.injector import Injector
from residual_steer.steering import freeze, steer, unsteer, use

from ._config import WRAPPER, HResConfig, check_backbone
from ._layer import HResLayer, adopt

_HEADS = {"classifier", "score", "qa_outputs"}  # PEFT asks for these by the task, whichever of them the model has


class HResModel(BaseTuner):
    """Steer a model with the fields that its configs describe.

    Args:
        model: the base, steered in place.
        peft_config: an `HResConfig`, or a dictionary of them by adapter name.
        adapter_name: which of them comes first.

    Raises:
        SteerError: what `steer` refuses, or a name that another kind of adapter has. The model is as it was.
    """

    prefix = "hres_"
    tuner_layer_cls = HResLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 – as PEFT declares it

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        taken = getattr(model, "peft_config", {}).get(adapter_name)
        if taken is not None and not isinstance(taken, HResConfig):
            raise SteerError(
                f"the adapter {adapter_name!r} of this model is one of {taken.peft_type.value}, which would be lost. "
                "Give the field another name: `adapter_name=`."
            )
        base = _without_wrapper(model)
        alone = not hasattr(base, "peft_config")
        super().__init__(base, peft_config, adapter_name, **kwargs)
        if alone:
            self.peft_config = _Configs(self.peft_config)
            base.peft_config = self.peft_config  # type: ignore[assignment]  # no tensor, and PEFT keeps it there

    def _config(self, adapter_name: str) -> HResConfig:
        return cast(HResConfig, self.peft_config[adapter_name])

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise SteerError("H-Res replaces no module: its fields run beside the blocks. Use `get_peft_model`.")

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add the field of a config.

        The first one acts, and trains unless its config is for inference; a later one waits for `set_adapter`.

        Args:
            model: the base.
            adapter_name: names a config in `peft_config`.
            autocast_adapter_dtype: makes no difference: a field is fp32 beside a bf16 base.
            low_cpu_mem_usage: make the field on the meta device, to be filled from a file.
            state_dict: not needed.

        Raises:
            SteerError: what `steer` refuses, a backbone other than the one that the adapter was trained on, or
                `modules_to_save` that match nothing or a steered module. The model is as it was.
        """
        config = self._config(adapter_name)
        others = any(isinstance(module, BaseTunerLayer) for module in model.modules())
        steered = any(isinstance(module, HResLayer) for module in model.modules())
        wrappers = {id(module) for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)}
        active = adapter_name in self.active_adapters
        try:
            set_additional_trainable_modules(
                model=model,
                peft_config=config,
                model_config=BaseTuner.get_model_config(model),
                adapter_name=adapter_name,
                activate_adapter=active,
            )
            empty = init_empty_weights() if low_cpu_mem_usage else nullcontext()
            kept = use(model, None) if steered else nullcontext()  # what acts now acts again afterwards
            with empty, kept, alone(config.backbone is not None):
                steer(
                    model,
                    config.arch,
                    rank=config.rank,
                    scale=config.scale,
                    layers=config.layers,
                    site=config.site,
                    activation=config.activation,
                    bias=config.field_bias,
                    dropout=config.dropout,
                    name=adapter_name,
                )
            try:
                site = steering_of(model)[1].specs[adapter_name].site
                config.site = site if isinstance(site, str) else list(site)  # not that of another release
                check_backbone(config, steering_of(model)[1].backbone)
                _check_modules_to_save(model, config)
            except SteerError:
                unsteer(model, adapter_name)
                raise
        except Exception:
            _unwrap(model, adapter_name, wrappers)
            raise
        adopt(model)
        if not others:
            self._mark_only_adapters_as_trainable(model)
        if active:
            self.set_adapter(adapter_name, inference_mode=config.inference_mode)
        elif config.inference_mode:
            freeze(model, adapter_name)
        self.targeted_module_names += [
            path
            for path, module in model.named_modules()
            if path not in self.targeted_module_names
            and any(isinstance(child, Injector) and adapter_name in child.fields for child in module.children())
        ]

    def _check_merge_allowed(self) -> NoReturn:
        raise SteerError(
            "H-Res cannot be merged: H(z) is no linear map, so no weight holds the sum. Keep the adapter, or take it "
            "away: `unload()`."
        )

    def unload(self) -> nn.Module:
        """Return the base without the fields; what other adapters brought stays.

        As with PEFT's other methods, the active adapter's `modules_to_save` stay in the place of the original ones.
        """
        for name in [name for name, config in self.peft_config.items() if isinstance(config, HResConfig)]:
            unsteer(self.model, name)
            if len(self.peft_config) > 1:
                del self.peft_config[name]
        if any(isinstance(module, BaseTunerLayer) for module in self.model.modules()):
            return cast(nn.Module, self.model)
        return super().unload()

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """Store Σ w·λ·H as one field of rank Σ r, to be chosen by `set_adapter`.

        Side by side, W_down and b_down of the fields are those of the sum; W_up and b_up are multiplied by w·λ. That is
        exact for fields of one activation. It does not train until `set_requires_grad`.

        Args:
            adapters: names of fields.
            weights: w for each, of any sign.
            adapter_name: of the new field.
            combination_type: only "cat" is known.

        Raises:
            SteerError: a name that is not there or taken, another number of weights, fields of different sites,
                activations or dropout, fields with `modules_to_save`, or a rank above the width. Nothing has changed.
        """
        if combination_type != "cat":
            raise SteerError(f"H-Res sums fields exactly, combination_type='cat'; received {combination_type!r}.")
        if not adapters or len(set(adapters)) < len(adapters) or len(weights) != len(adapters):
            raise SteerError(f"give each field one weight; received {list(adapters)} and {list(weights)}.")
        if not all(math.isfinite(weight) for weight in weights):
            raise SteerError(f"the weight of a field is a finite number; received {list(weights)}.")
        missing = [name for name in adapters if not isinstance(self.peft_config.get(name), HResConfig)]
        if missing or adapter_name in self.peft_config:
            what = f"no field {missing[0]!r}" if missing else f"an adapter {adapter_name!r} already"
            raise SteerError(f"this model has {what}; its adapters: {', '.join(self.peft_config)}.")
        parts = [field for name in adapters for field in fields(self.model) if field.name == name]
        for what in ("site", "activation", "dropout"):
            found = {str(getattr(part, what)) for part in parts}
            if len(found) > 1:
                raise SteerError(
                    f"fields that differ in {what} are no one field: {sorted(found)}. Select them side by side "
                    "instead: `residual_steer.use(model, {name: weight})`."
                )
        if any(self._config(name).modules_to_save for name in adapters):
            raise SteerError("fields with `modules_to_save` cannot be summed: a base module takes one field's tensors.")
        ranks: dict[str, dict[int, int]] = {site: {} for site in parts[0].sites}
        for site, index, rank in (
            (site, index, rank) for part in parts for site, by in part.sites.items() for index, rank in by.items()
        ):
            ranks[site][index] = ranks[site].get(index, 0) + rank
        self.peft_config[adapter_name] = replace(
            self._config(adapters[0]),
            rank=ranks if len(ranks) > 1 else next(iter(ranks.values())),
            scale=1.0,
            layers=None,
            field_bias=any(part.bias for part in parts),
        )
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        freeze(self.model, adapter_name)
        factors = {part.name: weight * part.scale for part, weight in zip(parts, weights, strict=True)}
        for layer in self.model.modules():
            if isinstance(layer, HResLayer) and adapter_name in layer:
                _fill(layer, adapter_name, {name: by for name, by in factors.items() if name in layer})

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Give each row of the batch the field that `adapter_names` names for it, `__base__` is none."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise SteerError("`adapter_names` is for inference: rows of several fields do not train. Call `eval()`.")
        names = list(names)
        unknown = sorted({*names} - {"__base__", *(field.name for field in fields(self.model))})
        if unknown:
            raise SteerError(f"`adapter_names` names no field of this model: {', '.join(unknown)}.")
        handles = []
        try:
            for module in self.modules():
                if isinstance(module, AuxiliaryTrainingWrapper):
                    handles.append(module.register_forward_pre_hook(partial(_name_rows, names=names), with_kwargs=True))
            with use(self.model, [None if name == "__base__" else name for name in names]):
                yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: Any,
    ) -> dict[str, Tensor]:
        """Select the tensors of one field, and of no other adapter or natively made field of the model."""
        names = _names(model, adapter_name)
        return {key: tensor for key, tensor in state_dict.items() if key.rpartition(".")[0] in names}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Find each tensor of a field in a file, whatever wrapped the model that was saved; raise if one lacks."""
        names = _names(model, adapter_name)
        wanted = {
            _plain(cls._remove_adapter_name_from_key(key, adapter_name)): key
            for key in model.state_dict()
            if key.rpartition(".")[0] in names
        }
        found = {_plain(key): key for key in state_dict if f".{cls.prefix}" in key}
        for what, keys in (("missing", wanted.keys() - found.keys()), ("left over", found.keys() - wanted.keys())):
            if keys:
                raise SteerError(
                    f"the file does not hold the field {adapter_name!r} as this model has it: {what} are "
                    f"{', '.join(sorted(keys)[:3])} ({len(keys)} in all). Load it on the model it was trained on."
                )
        return {wanted.get(_plain(key), key): tensor for key, tensor in state_dict.items()}


class _Configs(dict[str, Any]):
    """The configs by adapter name, which another tuner put on top shares, and would overwrite without a word."""

    def __setitem__(self, name: str, config: Any) -> None:
        if isinstance(self.get(name), HResConfig) and not isinstance(config, HResConfig):
            raise SteerError(
                f"the adapter {name!r} of this model is a steering field, which would be lost. Give the new one "
                "another name: `adapter_name=`."
            )
        super().__setitem__(name, config)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Take in other configs."""
        for name, config in dict(*args, **kwargs).items():
            self[name] = config


def _without_wrapper(model: nn.Module) -> nn.Module:
    """Return the base of a PEFT model whose layers stand in it: what both save then loads without the other.

    A wrapper that does something in a call, as for prompts, X-LoRA and aLoRA, stays.
    """
    while isinstance(model, PeftModel) and isinstance(model.base_model, BaseTuner):
        configs = model.peft_config.values()
        if any(config.peft_type == "XLORA" or getattr(config, "alora_invocation_tokens", None) for config in configs):
            break
        model = model.get_base_model()
    return model


def _names(model: nn.Module, adapter_name: str) -> set[str]:
    """Return the paths of a field's projections, as a state dict has them."""
    return {
        f"{path.replace('_fsdp_wrapped_module.', '')}.{part}.{adapter_name}"
        for path, module in model.named_modules()
        if isinstance(module, HResLayer) and adapter_name in module
        for part in HResLayer.adapter_layer_names
    }


def _plain(key: str) -> str:
    """Drop what PEFT's wrappers put in front of a name."""
    while key.startswith(WRAPPER):
        key = key.removeprefix(WRAPPER)
    return key


def _check_modules_to_save(model: nn.Module, config: HResConfig) -> None:
    """Raise if a name matches nothing, which PEFT passes over in silence, or a module that the field runs in."""
    for name in config.modules_to_save or ():
        found = [module for path, module in model.named_modules() if path.endswith(name)]
        if not found and name not in _HEADS:
            heads = ", ".join(child for child, _ in model.named_children())
            raise SteerError(f"`modules_to_save` names {name!r}, and no module's name ends so; the top ones: {heads}.")
        if any(isinstance(inner, Injector) for module in found for inner in module.modules()):
            raise SteerError(f"`modules_to_save` names {name!r}, in which the field runs: it would be copied with it.")


def _unwrap(model: nn.Module, adapter_name: str, before: set[int]) -> None:
    """Take away the wrappers of `modules_to_save` that were made for an adapter which failed."""
    for path, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.delete_adapter(adapter_name, new_active_adapters=None)
            if id(module) not in before:
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, module.original_module)


def _name_rows(module: Any, args: Any, kwargs: dict[str, Any], names: list[str]) -> tuple[Any, dict[str, Any]]:
    """Tell a wrapper of `modules_to_save` whose each row is; `generate` repeats rows for beams."""
    there = getattr(module, "modules_to_save", ())
    asked = [name if name in there else "__base__" for name in names]
    repeats = len(args[0]) // len(names) if args and isinstance(args[0], Tensor) else 1
    return args, {**kwargs, "adapter_names": [name for name in asked for _ in range(repeats)]}


@torch.no_grad()
def _fill(layer: HResLayer, name: str, factors: dict[str, float]) -> None:
    """Write the weighted sum of fields into a field of their joint rank."""
    end, whole = 0, layer[name]
    for part, by in factors.items():
        field, start = layer[part], end
        end = start + field.rank
        whole.down.weight[start:end] = field.down.weight
        whole.up.weight[:, start:end] = by * field.up.weight
        if field.down.bias is not None and field.up.bias is not None:
            cast(Tensor, whole.down.bias)[start:end] = field.down.bias
            cast(Tensor, whole.up.bias).add_(field.up.bias, alpha=by)
