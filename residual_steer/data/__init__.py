"""Data: made from a seed, shipped with Python and scikit-learn, or read from the Hugging Face Hub and local files."""

from .blocks import ByteBlocks, TokenBlocks
from .handwriting import digits
from .language import wikitext
from .latent import latent
from .pictures import ImageRows, Pixels, images
from .questions import Questions, squad
from .retrieval import mqar, recall
from .rows import TokenRows
from .scores import squad_scores
from .source import Plan, plan, splits
from .text import character_names, english_prose, python_source
from .vtab1k import vtab

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
