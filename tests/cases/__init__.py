"""The table of backbones that the contract runs over: real libraries, tiny models, fixed seeds."""

from typing import Any

import pytest
import torch
from torch import nn

import residual_steer as rs

from .case import LENGTH, RANK, VOCABULARY, WIDTH, Case, entering_pair, first_output, first_tensor
from .convolutions import CONVOLUTIONS
from .encoders import ENCODERS
from .fields import closed_form, randomise
from .hybrids import HYBRIDS
from .language import LANGUAGE
from .ssm import SSM
from .two_streams import TWO_STREAMS
from .vision import VISION

__all__ = [
    "CASES",
    "DEVICES",
    "LENGTH",
    "RANK",
    "TABLE",
    "VOCABULARY",
    "WIDTH",
    "Case",
    "closed_form",
    "entering_pair",
    "first_output",
    "first_tensor",
    "randomise",
    "steered",
]

CASES = [*VISION, *LANGUAGE, *SSM, *ENCODERS, *HYBRIDS, *TWO_STREAMS, *CONVOLUTIONS]
TABLE = {case.name: case for case in CASES}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]


def steered(name: str, /, **more: Any) -> tuple[Case, nn.Module]:
    """Return a case and its model, steered by random fields."""
    return TABLE[name], randomise(rs.steer(TABLE[name].build(), **{"rank": RANK, **more}))
