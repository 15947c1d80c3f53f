"""One step of decoding, run as it is, or recorded once into a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer._caches import cache_parameter
from shapes import Shape

ROOM = 40  # tokens that a cache holds beside the prompt
WARM = 3  # runs before one is recorded, as torch asks


class Decoder:
    """A model behind a prompt, which decodes the same next token again and again, its cache in one place of memory.

    Args:
        shape: says how the prompt is read.
        base: the library's own model.
        model: what was made of it.
        prompt: `(rows, length)`.
    """

    def __init__(self, shape: Shape, base: nn.Module, model: nn.Module, prompt: Tensor) -> None:
        self._cache = shape.cached(model, prompt, **shape.static(base, prompt.shape[1] + ROOM))
        # found once: to look at a signature takes as long as a kernel
        name = cache_parameter(base)
        given: dict[str, Any] = {name: self._cache, "use_cache": True} if name else {"inference_params": self._cache}
        self._call = {"input_ids": prompt[:, :1].contiguous(), **given}
        self._tensors = _tensors(self._cache, set())
        self._before = [tensor.clone() for tensor in self._tensors]

    def rewind(self) -> None:
        """Put the cache back behind the prompt."""
        for tensor, before in zip(self._tensors, self._before, strict=True):
            tensor.copy_(before)

    @torch.no_grad()
    def step(self, call: Callable[..., Any]) -> Tensor:
        """Decode one token by the model, or by what was compiled of it; return its logits."""
        logits: Tensor = call(**self._call).logits
        return logits

    @torch.no_grad()
    def recorded(self, call: Callable[..., Any]) -> Callable[[], None]:
        """Record a step into a CUDA graph, and return what replays it.

        Raises:
            RuntimeError: a replay gives other logits than the step.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                self.rewind()
                expected = self.step(call).float()
        torch.cuda.current_stream().wait_stream(side)
        self.rewind()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):  # where cuBLAS has its workspace by now
            written = self.step(call)
        self.rewind()
        graph.replay()
        apart = (written.float() - expected).abs().max().item()
        if not apart <= 1e-2 * expected.abs().max().item():
            raise RuntimeError(f"a replay of the CUDA graph gives logits that are {apart:g} from those of the step")
        return graph.replay


def _tensors(thing: Any, seen: set[int]) -> list[Tensor]:
    """Return every tensor that a cache holds, however deep."""
    if id(thing) in seen:
        return []
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return [thing]
    inner = thing if isinstance(thing, (list, tuple)) else thing.values() if isinstance(thing, Mapping) else ()
    if not inner and type(thing).__module__.startswith(("transformers.", "mamba_ssm.")):
        inner = getattr(thing, "__dict__", {}).values()
    return [tensor for one in inner for tensor in _tensors(one, seen)]
