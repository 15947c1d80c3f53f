"""Accelerate, set up for one run: everything that this library needs of it is here.

It is imported where it is needed and no sooner: it takes as long to import as all the rest of this library.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from residual_steer.errors import SteerError
from residual_steer.training.options import FitOptions

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["accelerate_as_before", "is_seeded", "make_accelerator", "seed_all", "sharded", "to_device"]


def make_accelerator(options: FitOptions, folder: Path | None) -> Accelerator:
    """Return the accelerator of a run: batches are global, and every process reads the data itself.

    Raises:
        SteerError: accelerate cannot do what the options ask for.
    """
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.utils import GradientAccumulationPlugin

    try:
        return Accelerator(
            mixed_precision=_precision(options),
            # given as a plug-in, since the number alone is overruled by an environment variable of `accelerate launch`
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dataloader_config=DataLoaderConfiguration(
                split_batches=True, dispatch_batches=False, use_seedable_sampler=True, data_seed=options.seed
            ),
            log_with=list(options.trackers) or None,
            project_dir=None if folder is None else str(folder),
        )
    except ValueError as error:
        raise SteerError(f"accelerate refused the options: {error}") from error


def _precision(options: FitOptions) -> str:
    return options.precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


@contextlib.contextmanager
def accelerate_as_before(options: FitOptions) -> Iterator[None]:
    """Let this run have a precision of its own, and leave accelerate's shared state as it was.

    Accelerate keeps one state for a process and refuses another precision. That state is private to it, and touched
    here alone.
    """
    from accelerate.state import AcceleratorState

    shared = AcceleratorState._shared_state
    before = dict(shared)
    if before and before.get("_mixed_precision") != _precision(options):
        AcceleratorState._reset_state()
    try:
        yield
    finally:
        shared.clear()
        shared.update(before)


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch, its tensors moved, whatever they are nested in."""
    from accelerate.utils import send_to_device

    return send_to_device(batch, device)


def seed_all(seed: int, *, device_specific: bool = False) -> None:
    """Seed every random generator; on each process of several with a seed of its own if `device_specific`."""
    from accelerate.utils import set_seed

    set_seed(seed, device_specific=device_specific)


def sharded(loader: DataLoader[Any], processes: int, index: int) -> Any:
    """Return a loader of the rows that one of several processes sees, none of them twice."""
    from accelerate.data_loader import prepare_data_loader

    return prepare_data_loader(
        loader, num_processes=processes, process_index=index, split_batches=True, even_batches=False
    )


def is_seeded(sampler: object) -> bool:
    """Say whether a sampler is accelerate's own, which seeds its generator anew in every epoch."""
    from accelerate.data_loader import SeedableRandomSampler

    return isinstance(sampler, SeedableRandomSampler)
