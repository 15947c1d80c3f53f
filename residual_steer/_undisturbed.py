"""What a run or a pass over data leaves as it was: modes, buffers, random generators; and hooks that only look.

All hooks that only look are registered by `watch`; they are gone when its `with` ends.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn


def train_mode(model: nn.Module, trained: Iterable[str]) -> None:
    """Set training mode, but keep the running statistics of frozen modules as they are."""
    model.train()
    owners = {name.rpartition(".")[0] for name in trained}
    for path, module in model.named_modules():
        if getattr(module, "running_mean", None) is not None and path not in owners:
            module.eval()


@contextlib.contextmanager
def changed(objects: Iterable[Any], name: str, value: object) -> Iterator[None]:
    """Give an attribute of several objects another value; on leaving, each has its own again, in the same order."""
    before = [(one, getattr(one, name)) for one in objects]
    try:
        for one, _ in before:
            setattr(one, name, value)
        yield
    finally:
        for one, old in before:
            setattr(one, name, old)


@contextlib.contextmanager
def watch(
    modules: Iterable[nn.Module],
    before: Callable[..., Any] | None = None,
    after: Callable[..., Any] | None = None,
    *,
    first: bool = False,
) -> Iterator[None]:
    """Call functions before and after every call of modules, as torch's hooks with keywords.

    What `before(module, args, kwargs)` returns, unless None, takes the place of `(args, kwargs)`; what
    `after(module, args, kwargs, output)` returns, that of the output. With `first` they come before the hooks that are
    there, such as those that steer.
    """
    with contextlib.ExitStack() as stack:
        for module in modules:
            if before is not None:
                handle = module.register_forward_pre_hook(before, with_kwargs=True, prepend=first)
                stack.callback(handle.remove)
            if after is not None:
                stack.callback(module.register_forward_hook(after, with_kwargs=True, prepend=first).remove)
        yield


@contextlib.contextmanager
def undisturbed(*models: nn.Module) -> Iterator[None]:
    """Run models in evaluation mode and without gradients; on leaving, modes and random generators are as before.

    What is compiled runs as it was written meanwhile: its graph would not call hooks that are added now.
    """
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    there = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with as_before(*models), apart(devices=there), torch.no_grad(), eager:
        for module in {module: None for model in models for module in model.modules()}:
            module.training = False  # on the modules themselves: a `train` of a model's own may do more than that
        yield


@contextlib.contextmanager
def as_before(*models: nn.Module) -> Iterator[None]:
    """Give back every module's mode."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def buffers_as_before(model: nn.Module) -> Iterator[None]:
    """Give back every buffer with its value, and None where a buffer was registered as None and filled in."""
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
    there = {(module, name) for module, name, _, _ in buffers}
    try:
        yield
    finally:
        for module in model.modules():
            for name in [name for name, _ in module.named_buffers(recurse=False) if (module, name) not in there]:
                setattr(module, name, None)
        for module, name, buffer, value in buffers:
            setattr(module, name, buffer)
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


@contextlib.contextmanager
def apart(*, devices: bool = True) -> Iterator[None]:
    """Leave the generators as they were, whatever happens inside; those of devices too, if they may be drawn from."""
    state = get_state(devices=devices)
    try:
        yield
    finally:
        set_state(state)


def seed(number: int) -> None:
    """Seed the generators of Python, NumPy and torch, but not those of devices, from which dropout draws."""
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)


def get_state(*, devices: bool = True) -> dict[str, Any]:
    """Return the state of the generators of Python, NumPy, torch and CUDA devices, which have to be waited for."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if devices and torch.cuda.is_available():
        state["cuda"] = [tensor.cpu() for tensor in torch.cuda.get_rng_state_all()]
    return state


def set_state(state: dict[str, Any]) -> None:
    """Put back what `get_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
