"""Data that needs no download: made from a seed, or shipped with Python and scikit-learn."""

from .blocks import ByteBlocks, TokenBlocks
from .images import digits
from .latent import latent
from .retrieval import mqar, recall
from .rows import TokenRows
from .text import english_prose, python_source

__all__ = [
    "ByteBlocks",
    "TokenBlocks",
    "TokenRows",
    "digits",
    "english_prose",
    "latent",
    "mqar",
    "python_source",
    "recall",
]
