"""The processes and devices of a run, by accelerate and torch.distributed; all that is needed of both is here.

Accelerate is imported where it is needed and no sooner: it takes as long to import as all the rest of this library.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from residual_steer.errors import SteerError

__all__ = ["Processes", "like", "seed_all", "to_device", "whole"]

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Processes:
    """The processes that train one model together.

    Args:
        precision: `"no"`, `"bf16"`, `"fp16"`, or None for what `accelerate launch` or an Accelerator of the user says.
        trackers: names of accelerate's trackers.
        folder: where they write.

    Attributes:
        device: of this process.
        number: how many there are.
        index: which of them this is.
        precision: as above, never None.

    Raises:
        SteerError: accelerate cannot do what is asked for, or does not know of the other processes.
    """

    def __init__(self, precision: str | None, trackers: Sequence[str], folder: Path | None) -> None:
        from accelerate import Accelerator
        from accelerate.state import GradientState, is_initialized

        self._fresh, self._accumulation = not is_initialized(), GradientState().plugin_kwargs
        try:
            self._accelerate = Accelerator(
                log_with=list(trackers) or None, project_dir=None if folder is None else str(folder)
            )
        except ValueError as error:
            self._leave()
            raise SteerError(f"accelerate refused the options: {error}") from error
        self.precision = precision or self._accelerate.mixed_precision
        self.device = self._accelerate.device
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.number = torch.distributed.get_world_size() if several else 1
        self.index = torch.distributed.get_rank() if several else 0
        if self.precision not in ("no", *HALVES):
            self.close()
            raise SteerError(f"`precision` is 'no', 'bf16' or 'fp16'; accelerate was told {self.precision!r}.")

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.index == 0

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        """Return what to call for a training step; the model itself, on its device, where one process trains.

        What its parameters are may be another object from here on: FSDP2 replaces them, in the optimizer too.

        Raises:
            SteerError: a part of what trains is sharded and a part is not, or these processes share nothing.
        """
        if (sharded := _sharded(model)) is not None:
            if not sharded:
                raise SteerError(
                    "`fully_shard` was applied to a part of what trains: the gradients of the rest would differ "
                    "between processes. Apply it to the whole model too, after its blocks."
                )
            return model
        accelerate = self._accelerate
        if accelerate.num_processes != self.number:
            raise SteerError(
                f"torch.distributed has {self.number} processes, and accelerate knows of {accelerate.num_processes}. "
                "Start them by `accelerate launch` or `torchrun`, or shard the model by `fully_shard`."
            )
        names = ("forward", "_original_forward")
        kept: dict[str, Any] = {name: vars(model)[name] for name in names if name in vars(model)}
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

    def unwrapped(self, model: nn.Module) -> nn.Module:
        """Return the model inside what `prepare` returned."""
        return self._accelerate.unwrap_model(model)  # type: ignore[no-any-return]

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in the run's precision."""
        half = HALVES.get(self.precision)
        return contextlib.nullcontext() if half is None else torch.autocast(self.device.type, dtype=half)

    def scaler(self) -> torch.amp.GradScaler | None:
        """Return what keeps small gradients of fp16 from vanishing; None in other precisions."""
        return torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None

    def apart(self, model: nn.Module, *, until: bool) -> AbstractContextManager[Any]:
        """Leave gradients on their own process, until the last part of a step."""
        if until or not isinstance(model, DistributedDataParallel):
            return contextlib.nullcontext()
        return model.no_sync()

    def sum(self, values: Iterable[float] | Tensor) -> Tensor:
        """Return the sums over all processes; in fp64 where the device has it."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        values = values if isinstance(values, Tensor) else torch.tensor(list(values))
        values = values.to(self.device, dtype, copy=True)
        if self.number > 1:
            torch.distributed.all_reduce(values)
        return values

    def every(self, here: bool) -> bool:
        """Return whether something is true on every process."""
        return bool(self.sum([float(here)]) == self.number)

    def from_first(self, value: Any) -> Any:
        """Return what the first process passes."""
        values = [value]
        if self.number > 1:
            torch.distributed.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def track(self, config: Mapping[str, str]) -> None:
        """Begin to write the trackers' logs."""
        self._accelerate.init_trackers("logs", config=dict(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write to them."""
        self._accelerate.log(dict(values), step=step)

    def close(self) -> None:
        """End the logs, but not torch.distributed, and leave accelerate as it was."""
        for tracker in self._accelerate.trackers:
            tracker.finish()
        self._leave()

    def _leave(self) -> None:
        """Leave accelerate's shared state as it was: it refuses a later Accelerator with another precision."""
        from accelerate.state import AcceleratorState, GradientState, is_initialized

        GradientState().plugin_kwargs = self._accumulation
        if self._fresh and is_initialized():
            vars(AcceleratorState()).clear()


def _sharded(model: nn.Module) -> bool | None:
    """Return whether all that trains is sharded by FSDP2; None where nothing is."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    from torch.distributed.tensor import DTensor

    found = [isinstance(p, DTensor) for p in model.parameters() if p.requires_grad]
    return all(found) if any(found) else None


def whole(tree: Any) -> Any:
    """Return a tree of plain values with its shards put together; every process has to call it."""
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(whole(value) for value in tree)
    return tree.detach().full_tensor() if hasattr(tree, "full_tensor") else tree


def like(value: Any, parameter: Tensor) -> Any:
    """Return a whole tensor of a parameter's shape sharded as the parameter is."""
    if not hasattr(parameter, "full_tensor") or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    shard: Any = parameter
    return distribute_tensor(value.to(parameter.device), shard.device_mesh, shard.placements)


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch, its tensors moved, whatever they are nested in."""
    from accelerate.utils import send_to_device

    return send_to_device(batch, device)


def seed_all(seed: int, *, device_specific: bool = False) -> None:
    """Seed every random generator; on each process of several with a seed of its own if `device_specific`."""
    from accelerate.utils import set_seed

    set_seed(seed, device_specific=device_specific)
