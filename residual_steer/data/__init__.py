"""Data: made from a seed, shipped with Python and scikit-learn, or read from the Hugging Face Hub and local files."""

from .built_in import character_names, digits, english_prose, python_source
from .hub import ImageRows, Pixels, Plan, images, plan, splits, vtab
from .synthetic import TokenRows, latent, mqar, recall
from .text import ByteBlocks, Questions, TokenBlocks, squad, squad_scores, wikitext

__all__ = [
    "ByteBlocks", "ImageRows", "Pixels", "Plan", "Questions", "TokenBlocks", "TokenRows", "character_names", "digits",
    "english_prose", "images", "latent", "mqar", "plan", "python_source", "recall", "splits", "squad", "squad_scores",
    "vtab", "wikitext",
]  # fmt: skip
