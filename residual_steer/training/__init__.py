"""One training loop for every architecture and every method."""

from residual_steer._progress import progress

from .evaluation import evaluate
from .history import History
from .loop import fit
from .losses import next_token_loss
from .options import FitOptions

__all__ = ["FitOptions", "History", "evaluate", "fit", "next_token_loss", "progress"]
