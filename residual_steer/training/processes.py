"""The processes and devices of a run, by accelerate and torch.distributed.

Accelerate is imported where it is needed and no sooner: it takes as long to import as all the rest of this library.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from residual_steer._shards import flat_units, several, whole
from residual_steer.errors import SteerError

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Processes:
    """The `number` processes that share a batch; this one is `index`. The `main` one of all writes.

    Under tensor parallelism all processes compute the same batch together, and `number` is 1. Where FSDP1 shards,
    `flat` is true, and each process trains pieces of its own.
    `precision` is `"no"`, `"bf16"`, `"fp16"`, or None for what `accelerate launch` or an Accelerator of the user says.
    `scaler` keeps small gradients of fp16 from vanishing, and does nothing in other precisions.
    """

    def __init__(self, precision: str | None, trackers: Sequence[str], folder: Path | None) -> None:
        from accelerate import Accelerator
        from accelerate.state import GradientState, is_initialized
        from accelerate.tracking import get_available_trackers
        from accelerate.utils import LoggerType, ProjectConfiguration

        there = {*map(str, get_available_trackers()), "all"}
        absent = [name for name in trackers if name in LoggerType.list() and name not in there]
        if absent:  # accelerate would go on without them
            raise SteerError(
                f"`trackers` has {', '.join(absent)}, which cannot be imported. Install it, or leave it out."
            )
        place = None if folder is None else str(folder)
        logs = None if folder is None else str(folder / "logs")
        self._fresh, self._accumulation = not is_initialized(), GradientState().plugin_kwargs
        try:
            self.accelerate = Accelerator(
                log_with=list(trackers) or None,
                project_config=ProjectConfiguration(project_dir=place, logging_dir=logs),
            )
        except ValueError as error:
            self._leave()
            raise SteerError(f"accelerate refused the options: {error}") from error
        self.precision = precision or self.accelerate.mixed_precision
        self.device = self.accelerate.device
        self.world = self.number = torch.distributed.get_world_size() if several() else 1
        self.rank = self.index = torch.distributed.get_rank() if several() else 0
        self.main, self.flat = self.rank == 0, False
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        if self.precision not in ("no", *HALVES):
            self.close()
            raise SteerError(f"`precision` is 'no', 'bf16' or 'fp16'; accelerate was told {self.precision!r}.")

    def open_logs(self, folder: Path, config: dict[str, str]) -> None:
        """Begin a run in every tracker, called as its folder is."""
        named = {"wandb": {"name": folder.name}, "trackio": {"name": folder.name}, "mlflow": {"run_name": folder.name}}
        self.accelerate.init_trackers("residual-steer", config=config, init_kwargs=named)

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        """Return what to call for a step; under FSDP2 model and optimizer have other parameters from here on."""
        accelerate = self.accelerate
        engines = [module for module in model.modules() if type(module).__module__.startswith("deepspeed.")]
        parted = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
        if engines or parted or accelerate.distributed_type == "DEEPSPEED":
            raise SteerError(
                "DeepSpeed takes the steps itself, so `fit` does not. Train by its engine, or by transformers' Trainer "
                "with `residual_steer.peft.HResConfig`; `save` gathers what ZeRO-3 sharded."
            )
        if self._is_sharded(model):
            return model
        if accelerate.num_processes != self.number:
            raise SteerError(
                f"torch.distributed has {self.number} processes, and accelerate knows of {accelerate.num_processes}. "
                "Start them by `accelerate launch` or `torchrun`, or shard the model by `fully_shard`."
            )
        names = ("forward", "_original_forward")
        kept = {name: vars(model)[name] for name in names if name in vars(model)}
        try:
            if accelerate.distributed_type == "FSDP":
                prepared = accelerate.prepare(model, optimizer)[0]
            else:
                prepared = accelerate.prepare_model(model)
        except ValueError as error:
            raise SteerError(f"accelerate refused the model: {error}") from error
        finally:  # autocast is the loop's, and not wrapped around the forward of the user's model
            for name in names:
                vars(model).pop(name, None)
            vars(model).update(kept)
        self.flat = bool(flat_units(prepared))
        return prepared  # type: ignore[no-any-return]

    def _is_sharded(self, model: nn.Module) -> bool:
        """Return whether somebody has sharded a model already; raise if its processes could not share a batch."""
        trained: list[Any] = [p for p in model.parameters() if p.requires_grad]
        self.flat = bool(flat_units(model))
        if self.flat and not isinstance(model, type(flat_units(model)[0])):
            raise SteerError("FSDP1 wrapped a part of the model: `fit` takes it as it was wrapped, from the outside.")
        if self.flat or not any(hasattr(p, "full_tensor") for p in model.parameters()):
            return self.flat
        from torch.distributed.fsdp import FSDPModule

        sharded = {hasattr(p, "full_tensor") for p in trained}
        by_fsdp = any(isinstance(module, FSDPModule) for module in model.modules())
        if sharded != {by_fsdp}:
            raise SteerError(
                "`fully_shard` or tensor parallelism was applied to a part of what trains: the gradients of the rest "
                "would differ between processes. Apply `fully_shard` to the whole model too, after its blocks; under "
                "tensor parallelism train fields alone."
            )
        meshes: list[Any] = [p for p in model.parameters() if hasattr(p, "full_tensor")]
        if any(p.device_mesh.size() != self.world or sum(one.is_shard() for one in p.placements) > 1 for p in meshes):
            raise SteerError(
                f"`fit` shares a batch among all {self.world} processes, or has all compute the same one; this model "
                "is sharded over some of them, or in two ways at once. Shard it in one way, over all."
            )
        if not by_fsdp:
            self.number, self.index = 1, 0
        return True

    def clip(self, model: nn.Module, parameters: Iterable[nn.Parameter], limit: float) -> float:
        """Clip the gradients of a step to a norm; return the norm before."""
        if self.flat:
            root: Any = model
            return float(root.clip_grad_norm_(limit))
        return float(whole(nn.utils.clip_grad_norm_(parameters, limit)))

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in the run's precision."""
        half = HALVES.get(self.precision)
        return contextlib.nullcontext() if half is None else torch.autocast(self.device.type, dtype=half)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sums over all processes; in fp64 where the device has it."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        values = values.to(self.device, dtype, copy=True)
        if self.number > 1:
            torch.distributed.all_reduce(values)
        return values

    def every(self, here: bool) -> bool:
        """Return whether something is true on every process."""
        return self._count(int(here)) == self.world

    def lend(self, wanted: Sequence[bytes], find: Callable[[bytes], Any]) -> dict[bytes, Any]:
        """Return what this process wants of what any of them finds by a key; every process has to call it."""
        if self.number == 1:
            return {}
        asked: list[Any] = [None] * self.number
        torch.distributed.all_gather_object(asked, list(wanted))
        keys = {key for each in asked for key in each}
        found: list[Any] = [None] * self.number
        torch.distributed.all_gather_object(found, {key: row for key in sorted(keys) if (row := find(key)) is not None})
        return {key: row for each in found for key, row in each.items() if key in wanted}

    def first(self, number: int) -> int:
        """Return the number that the first process gives."""
        return self._count(number * self.main)

    def _count(self, number: int) -> int:
        value = torch.tensor(number, device=self.device)
        if self.world > 1:
            torch.distributed.all_reduce(value)
        return int(value)

    def close(self) -> None:
        """End the logs, but not torch.distributed, and leave accelerate as it was."""
        for tracker in self.accelerate.trackers:
            tracker.finish()
        self._leave()

    def _leave(self) -> None:
        """Leave accelerate's shared state as it was: it refuses a later Accelerator with another precision."""
        from accelerate.state import AcceleratorState, GradientState, is_initialized

        GradientState().plugin_kwargs = self._accumulation
        if self._fresh and is_initialized():
            vars(AcceleratorState()).clear()
