"""One thread, no network, a fixed seed, and a registry that every test leaves as it found it."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from residual_steer import registry

torch.set_num_threads(1)

NOISE = (
    "ignore:Dynamo detected a call to a `functools.lru_cache`-wrapped function:UserWarning",  # transformers' Mamba
)


def pytest_configure(config):
    for line in NOISE:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    """Backbones that a test registers are gone after it."""
    monkeypatch.setattr(registry, "_families", dict(registry._families))
