"""Finding the residual stream of a model that no registered family describes, and proving it.

Nothing is concluded from names. The model is run on a tiny input, and the autograd graph of that run says which modules
hand their input on as `z + g(z)`, in which order, and what stands between them. What cannot be proved is refused.

    example.py       an input for a model that says nothing about it
    trace.py         which modules were called, with what; the model is afterwards as it was before
    graph.py         what the autograd graph tells of one call: is it residual, does it follow on another
    candidates.py    which of the residual modules are the blocks, and whether they are one stream
    layout.py        the width, the mixer and the feed-forward of the blocks
    place.py         where the stream stands in a call and in what comes back
    proof.py         all of it in order
"""

from .proof import NoStreamError, discover
from .trace import is_marked

__all__ = ["NoStreamError", "discover", "is_marked"]
