"""Data that needs no download: what ships with Python and scikit-learn."""

from .blocks import ByteBlocks, TokenBlocks
from .images import digits
from .text import english_prose, python_source

__all__ = ["ByteBlocks", "TokenBlocks", "digits", "english_prose", "python_source"]
