"""Finding the residual stream of a model that no registered family describes, and proving it.

Nothing is concluded from names. The model runs on a tiny input (`example`), its calls are recorded (`trace`), and their
autograd graph shows which modules hand their input on as z + g(z) (`graph`). Of these the blocks are chosen
(`candidates`), and where their stream stands is found (`place`). What cannot be proved (`proof`) is refused.
"""

from .proof import NoStreamError, discover
from .trace import is_marked

__all__ = ["NoStreamError", "discover", "is_marked"]
