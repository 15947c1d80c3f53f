"""Accelerate, set up for one run: everything that this library needs of its insides is here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin

from residual_steer.errors import SteerError
from residual_steer.training.options import FitOptions

__all__ = ["accelerate_as_before", "make_accelerator"]


def make_accelerator(options: FitOptions, folder: Path | None) -> Accelerator:
    """Return the accelerator of a run: batches are global, and every process reads the data itself.

    Raises:
        SteerError: accelerate cannot do what the options ask for.
    """
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
    shared = AcceleratorState._shared_state
    before = dict(shared)
    if before and before.get("_mixed_precision") != _precision(options):
        AcceleratorState._reset_state()
    try:
        yield
    finally:
        shared.clear()
        shared.update(before)
