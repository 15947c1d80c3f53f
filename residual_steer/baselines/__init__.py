"""Other ways to adapt a frozen model, under the same loop: what H-Res is compared with.

    model = residual_steer.baselines.apply(model, "lora", rank=8, train="classifier")
    residual_steer.fit(model, train, valid, steps=500)

Each method is a function that says which paper it follows and which options it takes.
"""

from .application import apply, merge, methods

__all__ = ["apply", "merge", "methods"]
