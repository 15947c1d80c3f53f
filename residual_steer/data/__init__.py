"""Data: made from a seed, shipped with Python and scikit-learn, or read from the Hugging Face Hub and local files."""

from ._rows import ByteBlocks, ImageRows, Pixels, TokenBlocks, TokenRows
from .built_in import character_names, digits, english_prose, python_source
from .hub import Plan, images, plan, splits, vtab, wikitext
from .questions import Questions, squad, squad_scores
from .synthetic import latent, mqar, recall

__all__ = [
    "ByteBlocks",
    "ImageRows",
    "Pixels",
    "Plan",
    "Questions",
    "TokenBlocks",
    "TokenRows",
    "character_names",
    "digits",
    "english_prose",
    "images",
    "latent",
    "mqar",
    "plan",
    "python_source",
    "recall",
    "splits",
    "squad",
    "squad_scores",
    "vtab",
    "wikitext",
]
