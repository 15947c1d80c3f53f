"""One thread, no network, a fixed seed; the registry and accelerate's state are left as every test found them."""

import gc
import io
import logging
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCH_DYNAMO_RUN_GC_AFTER_COMPILE"] = "0"

import hypothesis
import pytest
import torch

from residual_steer import registry
from residual_steer._calls import running

collect_ignore = ["serving"]  # which `make test-vllm` runs
torch.set_num_threads(1)
if not torch.accelerator.is_available():  # whom a seed waits for in a list, with the whole stack of its call: slow
    torch.manual_seed = torch.default_generator.manual_seed
gc.set_threshold(100_000, 20, 20)  # else a tenth of the time goes into it
hypothesis.settings.register_profile("shared", deadline=None)  # of a machine that other work shares
hypothesis.settings.load_profile("shared")

NOISE = (
    "ignore:Dynamo detected a call to a `functools.lru_cache`-wrapped function:UserWarning",  # transformers' Mamba
)


def pytest_configure(config):
    for line in NOISE:
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(items):
    """Two processes must collect the same tests: an address in a name, as `ids=str` makes of a function, differs."""
    odd = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if odd:
        raise pytest.UsageError(f"give these tests names of their own: {odd[:3]}")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    yield
    assert not running.calls, "a call of a steered model has begun and not ended"


@pytest.fixture(scope="session")
def backbones(tmp_path_factory):
    """The folder into which experiments pre-train, each backbone once."""
    return str(tmp_path_factory.mktemp("backbones"))


@pytest.fixture
def logged():
    """A text to which warnings are logged."""
    handler = logging.StreamHandler(io.StringIO())
    loggers = [logging.getLogger(name) for name in ("residual_steer", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
    yield handler.stream
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    """Backbones that a test registers are gone after it."""
    monkeypatch.setattr(registry, "_families", dict(registry._families))


@pytest.fixture(autouse=True)
def _accelerate():
    """What a Trainer said to accelerate is forgotten after a test."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
        sys.modules["accelerate.state"].GradientState._reset_state()
