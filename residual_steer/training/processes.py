"""The processes and devices of a run, by accelerate and torch.distributed.

Accelerate is imported where it is needed and no sooner: it takes as long to import as all the rest of this library.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from residual_steer.errors import SteerError

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Processes:
    """The `number` processes that train one model together; this one is `index`, and the `main` one writes.

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
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.number = torch.distributed.get_world_size() if several else 1
        self.index = torch.distributed.get_rank() if several else 0
        self.main = self.index == 0
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
        sharded = {hasattr(p, "full_tensor") for p in model.parameters() if p.requires_grad}
        if sharded == {True, False}:
            raise SteerError(
                "`fully_shard` was applied to a part of what trains: the gradients of the rest would differ between "
                "processes. Apply it to the whole model too, after its blocks."
            )
        if sharded == {True}:
            return model
        accelerate = self.accelerate
        if accelerate.num_processes != self.number:
            raise SteerError(
                f"torch.distributed has {self.number} processes, and accelerate knows of {accelerate.num_processes}. "
                "Start them by `accelerate launch` or `torchrun`, or shard the model by `fully_shard`."
            )
        names = ("forward", "_original_forward")
        kept = {name: vars(model)[name] for name in names if name in vars(model)}
        try:
            if accelerate.distributed_type == "FSDP":
                return accelerate.prepare(model, optimizer)[0]  # type: ignore[no-any-return]
            return accelerate.prepare_model(model)  # type: ignore[no-any-return]
        except ValueError as error:
            raise SteerError(f"accelerate refused the model: {error}") from error
        finally:  # autocast is the loop's, and not wrapped around the forward of the user's model
            for name in names:
                vars(model).pop(name, None)
            vars(model).update(kept)

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
        return bool(self.sum(torch.tensor(float(here))) == self.number)

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


def whole(tree: Any) -> Any:
    """Return a tree of plain values with its shards put together; every process has to call it."""
    return tree_map(lambda leaf: leaf.detach().full_tensor() if hasattr(leaf, "full_tensor") else leaf, tree)


def like(value: Any, parameter: Tensor) -> Any:
    """Return a whole tensor of a parameter's shape sharded as the parameter is."""
    if not hasattr(parameter, "full_tensor") or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    shard: Any = parameter
    return distribute_tensor(value.to(parameter.device), shard.device_mesh, shard.placements)
