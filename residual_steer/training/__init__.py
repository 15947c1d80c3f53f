"""One training loop for every architecture and every method."""

from .history import History, progress
from .loop import fit
from .losses import evaluate, next_token_loss
from .options import FitOptions

__all__ = ["FitOptions", "History", "evaluate", "fit", "next_token_loss", "progress"]
