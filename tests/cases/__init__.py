"""The table of backbones that the contract runs over: real libraries, tiny models, fixed seeds."""

import pytest
import torch

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
    "VOCABULARY",
    "WIDTH",
    "Case",
    "closed_form",
    "entering_pair",
    "first_output",
    "first_tensor",
    "randomise",
]

CASES = [*VISION, *LANGUAGE, *SSM, *ENCODERS, *HYBRIDS, *TWO_STREAMS, *CONVOLUTIONS]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]
